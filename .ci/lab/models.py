"""Rooms of letmein.py in the test's own process, and models of what they have to do."""

from __future__ import annotations

import contextlib
import json
import os
import select
import selectors
import signal
import socket
import time
from collections.abc import Callable, Generator, Iterator
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import pytest

# isort: off
import letmein
from letmein import Message
from lab.firewall import (
    DOOR, OPENS, WatchedNft, comment, flush_and_reload, flush_the_chain, kernel, nft_do,
    restore_what_was_saved, rows, status,
)
from lab.hosts import CLIENT_4, CLIENT_6, KEYS, LIMIT_S, OTHER_4, OTHER_6, Lab, eventually
from lab.servers import Server, crash, happened, quiet, reconfigure
from lab.wire import CHALLENGE, COMEIN, GOAWAY, KNOCK, RESPONSE, REVOKE, attempt, message, reply
# isort: on


# ----------------------------------------------------------------------------
# The protocol
# ----------------------------------------------------------------------------

USER, RESOURCE = 0xA423DDA7, 0xBC5D8077
KEY, OTHER_KEY = bytes(range(32)), bytes(range(1, 33))
NO_TOKEN, THE_TOKEN, REVOKE_TOKEN = bytes(32), bytes([0xB8]) * 32, bytes([0xB9]) * 32


class Conversation:
    """The server's side of one connection. It knows USER, lets it have RESOURCE, and takes the
    first message for a request and the next for the answer to its CHALLENGE. Args: proved, what
    a peer has proved by its request being answered: over UDP nobody remembers that."""

    TOKENS: ClassVar[dict[int, bytes]] = {KNOCK: THE_TOKEN, REVOKE: REVOKE_TOKEN}

    def __init__(self, policy: str = "always", proved: int = letmein.BASIC_AUTH) -> None:
        self.rights = {RESOURCE: ""}
        self.proved = proved
        self.ids: tuple[int, int] | None = None  # of the request
        self.handshake = letmein.ServerHandshake(
            letmein.POLICIES[policy],
            {USER: KEY}.get,
            lambda user, resource: self.rights.get(resource, "unknown resource"),
        )

    def receive(self, wire: bytes) -> letmein.Verdict:
        message = Message.decode(wire)
        if self.ids is None:
            self.ids = message.user, message.resource
            return self.handshake.on_request(message, self.TOKENS.__getitem__)
        tokens = self.TOKENS if message[1:3] == self.ids else {}  # a token is for its ids alone
        challenges = [letmein.Challenge(asked, token, 0, b"") for asked, token in tokens.items()]
        return self.handshake.on_response(message, self.proved, challenges)


def met(verdict: letmein.Verdict) -> int | None:
    """What a verdict grants: KNOCK, REVOKE or nothing."""
    return verdict.challenge.operation if verdict.challenge else None


def sealed(
    operation: int,
    token: bytes = NO_TOKEN,
    key: bytes = KEY,
    user: int = USER,
    resource: int = RESOURCE,
) -> bytes:
    """A message whose AUTH is right for key and token."""
    return message(operation, resource, user, token, key)


def plain(operation: int, user: int = USER, resource: int = RESOURCE) -> bytes:
    """A message whose AUTH proves nothing."""
    return reply(operation, user, resource)


def new_client(
    operation: int = KNOCK, warnings: list[str] | None = None
) -> Generator[bytes, bytes, None]:
    """A client that may have no warnings unless somebody wants them."""

    def warn(line: str) -> None:
        assert warnings is not None, line
        warnings.append(line)

    return letmein.client_handshake(operation, USER, RESOURCE, KEY, warn, lambda text: None)


def is_done(client: Generator[bytes, bytes, None], data: bytes) -> bool:
    """Whether the client is content with this as the server's last message."""
    try:
        client.send(data)
    except StopIteration:
        return True
    return False


# ----------------------------------------------------------------------------
# The configuration
# ----------------------------------------------------------------------------

NFTABLES = {"family": "inet", "table": "filter", "chain-input": "LETMEIN"}


def server_text(section: str, *lines: str) -> str:
    """A letmeind.conf with these lines in a section, from line 2 on, and all that is required."""
    given_names = {line.partition("=")[0].strip() for line in lines}
    required = [f"{name} = {value}" for name, value in NFTABLES.items() if name not in given_names]
    heading = [] if section == "NFTABLES" else ["[NFTABLES]"]
    return "\n".join([f"[{section}]", *lines, *heading, *required, ""])


def parse(text: str, server: bool = True) -> letmein.Config:
    return letmein.parse_config(text, "f.conf", server, [])


def rejection(text: str, server: bool = True) -> letmein.ConfigError:
    with pytest.raises(letmein.ConfigError) as error:
        parse(text, server)
    assert "\n" not in error.value.problem + error.value.hint
    return error.value


# ----------------------------------------------------------------------------
# The monitor, and the network process
# ----------------------------------------------------------------------------


class QuietLog(letmein.Log):
    """The log's lines in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[dict[str, object]] = []

    def __call__(self, event: str, **fields: object) -> None:
        self.counts[event] += 1
        self.lines.append({"event": event, **fields})


class NotedFirewall:
    """Notes what it is asked for, and does it, unless it is to object."""

    def __init__(self) -> None:
        self.changes: list[tuple[int, str, int]] = []
        self.problem = ""
        self.leases = letmein.Leases()
        self.user = 0  # of the latest knock
        self.table = SimpleNamespace()

    def knock(self, address: str, resource: int, user: int) -> str:
        self.changes.append((KNOCK, address, resource))
        self.user = user
        return self.problem

    def revoke(self, address: str, resource: int) -> str:
        self.changes.append((REVOKE, address, resource))
        return self.problem


class LoneChild(letmein.NetworkChild):
    """A network process that is never started: the test is it."""

    def _replace_sockets(self) -> None:
        """There are none."""


class LoneMonitor(letmein.Monitor):
    """The privileged process without its kernel: changes are but noted, and the
    test is the network process, at the other end of the link."""

    log: QuietLog
    firewall: NotedFirewall  # type: ignore[assignment]

    def __init__(self, config: letmein.Config) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(letmein, "Log", QuietLog)
            patch.setattr(letmein, "Nft", lambda name: None)
            patch.setattr(letmein, "Firewall", lambda *_: NotedFirewall())
            patch.setattr(letmein, "NetworkChild", LoneChild)
            patch.setattr(letmein, "lock_table", lambda *_: -1)
            patch.setattr(letmein, "empty_directory", lambda _: os.open("/", os.O_PATH))
            patch.setattr(letmein, "control_sockets", lambda *_: {})
            patch.setattr(os, "umask", lambda mask: mask)
            super().__init__(config, letmein.ServerOptions("/", "none", 1, 1, None, {}, -1))
        self.judge.tokens = letmein.Tokens(bytes(32))
        self.network.is_ready = self.network.is_serving = True
        self.connect()

    def connect(self) -> None:
        """Have new channels, as after the start of a network process."""
        self.theirs, self.writer = self.network._connect()

    def hand(self, data: bytes) -> list[letmein.Record]:
        """Send it a record; returns what it sends back."""
        if data:
            self.writer.write(data)
        else:
            self.writer.close()
        self.network._on_pipe()
        return self.said()

    def said(self) -> list[letmein.Record]:
        records = []
        with contextlib.suppress(BlockingIOError):
            while data := self.theirs.recv(4096):
                assert len(data) == letmein.RECORD.size
                records.append(letmein.Record(*letmein.RECORD.unpack(data)))
        return records

    def close(self) -> None:
        self.network.close()
        self.theirs.close()
        self.writer.close()
        self.selector.close()
        os.close(self.network.root)


@contextlib.contextmanager
def lone_monitor(text: str) -> Iterator[LoneMonitor]:
    monitor = LoneMonitor(parse(text))
    try:
        yield monitor
    finally:
        monitor.close()


def monitor_text(policy: str) -> str:
    """A server that knows USER, lets it have RESOURCE, and serves 5800."""
    return (
        f"[GENERAL]\ncontrol-error-policy = {policy}\n[KEYS]\n{USER:X} = {KEY.hex()}\n"
        f"[RESOURCES]\n{RESOURCE:X} = port: 22\n58 = port: 5800\n" + server_text("NFTABLES")
    )


# All that an eavesdropper has of earlier handshakes, where another token was used.
RECORDED = [
    sealed(KNOCK), sealed(REVOKE), plain(CHALLENGE), sealed(RESPONSE, OTHER_KEY), plain(COMEIN),
]  # fmt: skip


class Talker:
    """A peer of a server in this process, and what it must hear. Args: udp; source, its address
    on the loopback interface."""

    def __init__(self, server: BothProcesses, udp: bool, source: str) -> None:
        self.server = server
        self.udp = udp
        self.socket = socket.socket(type=socket.SOCK_DGRAM if udp else socket.SOCK_STREAM)
        self.socket.bind((source, 0))
        self.socket.connect(server.names[udp])
        self.socket.setblocking(False)
        self.source = source
        self.unsent = b""
        self.stream = b""  # what the server has, and has not made a message of
        self.asked = False  # whether a request was accepted, over TCP
        # Messages with the right key, and what they ask for: everybody knows some old ones.
        self.requests = {RECORDED[0]: KNOCK, RECORDED[1]: REVOKE}
        self.tokens: dict[bytes, int] = {}
        self.responses: dict[bytes, tuple[int, bytes]] = {}  # what it asks for, and the token
        self.done: set[bytes] = set()  # over UDP: the tokens that were met
        self.closed = False  # by the server, or by us
        self.inbox = b""
        self.at_end = False

    def say(self, what: str, data: bytes, cut: int) -> None:
        """Send what is left of the last message, and a part of the next."""
        if what in ("knock", "revoke"):
            operation = KNOCK if what == "knock" else REVOKE
            data = sealed(operation)
            self.requests[data] = operation
        elif what == "response" and self.tokens:
            token, operation = list(self.tokens.items())[-1]
            data = sealed(RESPONSE, token)
            self.responses[data] = (operation, token)
        elif what == "other ids" and self.tokens:
            data = sealed(RESPONSE, list(self.tokens)[-1], user=7)
        elif what == "again":
            data = list(self.responses or self.requests)[-1]
        if self.udp:
            data = data[:cut] if what == "junk" else data
            self.socket.send(data)
            if len(data) == 56:
                self.expect(data)
            return
        sent, self.unsent = self.unsent + data[:cut], data[cut:]
        with contextlib.suppress(ConnectionError):
            self.socket.send(sent)
        self.stream += sent
        while len(self.stream) >= 56 and not self.closed:
            message, self.stream = self.stream[:56], self.stream[56:]
            self.expect(message)

    def hang_up(self, half: bool) -> None:
        self.closed = True
        self.socket.shutdown(socket.SHUT_WR if half else socket.SHUT_RDWR)

    def expect(self, data: bytes) -> None:
        """Check what the server makes of a message."""
        asked, token = None, b""
        if self.asked or self.udp:
            asked, token = self.responses.get(data, (None, b""))
        follows = b"" if self.udp else self.stream[:56]
        if len(follows) == 56 and not self.is_message(follows) and not self.asked:
            # What came right behind it closes the connection, perhaps before the answer is there.
            self.closed = True
            self.server.until(self.is_over)
            self.inbox = b""
            return
        if data in self.requests and not self.asked:
            challenge = Message.decode(self.reply())
            assert challenge[:3] == (CHALLENGE, USER, RESOURCE)
            self.tokens[challenge.auth] = self.requests[data]
            self.asked = not self.udp
        elif asked is not None:
            assert Message.decode(self.reply())[:3] == (COMEIN, USER, RESOURCE)
            change = (asked, self.source, RESOURCE)
            assert self.server.changes == ([] if token in self.done else [change])
            self.server.changes.clear()
            if self.udp:
                self.done.add(token)
            self.closed = not self.udp
        else:
            # The policy is basic-auth: GOAWAY only after a right request, and over TCP.
            if self.asked and self.is_message(data) and data[7] in (KNOCK, RESPONSE, REVOKE):
                ids = Message.decode(data)[1:3]
                assert Message.decode(self.reply())[:3] == (GOAWAY, *ids)
            self.closed = not self.udp
        if self.closed:
            self.server.until(lambda: not self.heard() and self.at_end)

    @staticmethod
    def is_message(data: bytes) -> bool:
        return data[:7] == letmein.MAGIC + bytes(3) and data[7] < 6

    def reply(self) -> bytes:
        """The server's next message."""
        self.server.until(lambda: len(self.heard()) >= 56)
        reply, self.inbox = self.inbox[:56], self.inbox[56:]
        return reply

    def is_over(self) -> bool:
        """Whether the server has closed the connection."""
        self.heard()
        return self.at_end

    def heard(self) -> bytes:
        """All that has come, and was not taken yet."""
        try:
            while not self.at_end:
                part = self.socket.recv(4096)
                self.inbox += part
                self.at_end = not part and not self.udp
        except BlockingIOError:
            pass
        except ConnectionError:
            self.at_end = True
        return self.inbox


class BothProcesses:
    """The network process's loop and the monitor, joined by their link, in this process."""

    def __init__(self) -> None:
        self.monitor = LoneMonitor(parse(monitor_text("basic-auth")))
        self.listeners = [socket.create_server(("127.0.0.1", 0))]
        self.listeners.append(socket.socket(type=socket.SOCK_DGRAM))
        self.listeners[1].bind(("127.0.0.1", 0))
        for listener in self.listeners:
            letmein.prepare_control(listener)
        self.names = [listener.getsockname() for listener in self.listeners]
        self.network = letmein.Network(
            self.monitor.theirs, self.monitor.writer.fileno(), 1000, 1000
        )
        self.network._settle(letmein.SETTINGS_PAYLOAD.pack(60.0), self.listeners)
        self.talkers: list[Talker] = []

    @property
    def changes(self) -> list[tuple[int, str, int]]:
        return self.monitor.firewall.changes

    def settle(self, wait: float = 0) -> None:
        """Let both work until neither has anything to do."""
        while ready := self.network.selector.select(wait):
            wait = 0
            for key, _ in ready:
                key.data()
            self.monitor.network._on_pipe()
            assert self.monitor.network.link is not None, self.monitor.log.lines

    def until(self, condition: Callable[[], bool]) -> None:
        """Let both work until something holds."""
        deadline = time.monotonic() + 2  # a failure is tried often, to be made short
        self.settle()
        while not condition():
            assert time.monotonic() < deadline, "nothing comes"
            self.settle(0.01)

    def close(self) -> None:
        for talker in self.talkers:
            talker.socket.close()
        waiting = self.network.awaiting_verdict.values()
        for connection in [*self.network.connections.values(), *waiting]:
            connection.socket.close()
        for listener in self.listeners:
            listener.close()
        self.network.selector.close()
        self.monitor.close()


# ----------------------------------------------------------------------------
# The client
# ----------------------------------------------------------------------------


class Feeder:
    """A server for one client in this process. Each time that the client has read what there is,
    it gets one more piece; after the last the server hangs up, or is silent until the client's
    patience is over."""

    def __init__(self, pieces: list[bytes], udp: bool, hangs_up: bool) -> None:
        self.pieces = pieces
        self.udp = udp
        self.hangs_up = hangs_up
        self.requests = b""  # all that the client has sent
        self.listener = socket.socket(type=socket.SOCK_DGRAM if udp else socket.SOCK_STREAM)
        self.listener.bind(("127.0.0.1", 0))
        self.listener.settimeout(LIMIT_S)
        if not udp:
            self.listener.listen()
        self.peer: socket.socket | None = None  # the client's connection

    def feed(self) -> None:
        if self.peer is None and not self.udp:
            self.peer, _ = self.listener.accept()
            self.peer.settimeout(LIMIT_S)
        if self.udp and not self.requests:
            self.requests, self.name = self.listener.recvfrom(100)
        if self.pieces:
            piece = self.pieces.pop(0)
            if self.peer is None:
                self.listener.sendto(piece, self.name)
            else:
                self.peer.sendall(piece)
        elif self.peer is not None and self.hangs_up:
            self.peer.shutdown(socket.SHUT_WR)
        else:
            raise socket.timeout

    def selector(self) -> selectors.BaseSelector:
        """In place of a selector: the next piece comes when the client waits for it."""
        feeder = self

        class Fed(selectors.SelectSelector):
            def select(self, timeout: float | None = None) -> Any:
                if not super().select(0):
                    feeder.feed()
                return super().select(LIMIT_S)

        return Fed()

    def close(self) -> None:
        """Read the rest of what the client has sent."""
        if self.peer is not None:
            with self.peer, contextlib.suppress(ConnectionError):
                while data := self.peer.recv(4096):
                    self.requests += data
        with self.listener, contextlib.suppress(BlockingIOError):
            self.listener.setblocking(False)
            while self.udp:
                self.requests += self.listener.recv(100)


class SocketModule:
    """The module socket, but that its sockets are fed."""

    def __init__(self, feeder: Feeder) -> None:
        class Fed(socket.socket):
            def recv(self, size: int, flags: int = 0) -> bytes:
                if not select.select([self], [], [], 0)[0]:
                    feeder.feed()
                    assert select.select([self], [], [], LIMIT_S)[0]
                return super().recv(size, flags)

        self.socket = Fed

    def __getattr__(self, name: str) -> object:
        return getattr(socket, name)


# ----------------------------------------------------------------------------
# The firewall, and a model of its leases
# ----------------------------------------------------------------------------


class Held4And6(NamedTuple):
    """A firewall without its processes, which a test makes go on step by step, and who is in."""

    firewall: letmein.Firewall
    holders: tuple[tuple[str, int, int], ...]


def settle(firewall: letmein.Firewall) -> None:
    """Have it look at the kernel's table until it finds no reason to do so again."""
    deadline = time.monotonic() + LIMIT_S
    while firewall.wakes_at < letmein.NEVER:
        assert time.monotonic() < deadline, "it looks for ever"
        firewall.advance()
        time.sleep(max(0.0, min(firewall.inspect_at - time.monotonic(), 1.0)))


SOURCES = [CLIENT_4, OTHER_4, CLIENT_6, OTHER_6]
SHORT_S = 1.2

RANDOM_RESOURCES = {
    0x22: "port: 22",
    0x23: "port: 23 / tcp, udp",
    0x25: f"port: 25 / timeout: {SHORT_S}",
    0x26: "port: 26 / users: 1",
    0x40: "jump / input: DOOR / input-match: saddr",
    0x41: "jump / input: DOOR",
}


class Variant(NamedTuple):
    """One configuration of the random test: its users, resources, longest timeout."""

    users: tuple[int, ...] = (1, 2)
    resources: tuple[int, ...] = tuple(RANDOM_RESOURCES)
    timeout: int = 600

    def conf(self, nft: WatchedNft) -> str:
        lines = [f"{number:X} = {RANDOM_RESOURCES[number]}" for number in self.resources]
        long = [
            line if "timeout" in line else f"{line} / timeout: {self.timeout}" for line in lines
        ]
        conf = nft.conf("\n".join(long))
        return "\n".join(
            line
            for line in conf.splitlines()
            if not any(line == f"{u} = {k.hex()}" for u, k in KEYS.items() if u not in self.users)
        )

    def seconds(self, resource: int) -> float:
        return SHORT_S if resource == 0x25 else self.timeout

    def may(self, user: int, resource: int) -> bool:
        known = user in self.users and resource in self.resources
        return known and (resource != 0x26 or user == 1)

    @property
    def rules(self) -> int:
        return 4 + 2 * (0x40 in self.resources) + (0x41 in self.resources)


VARIANTS = [
    Variant(),
    Variant(users=(1,)),
    Variant(resources=(0x23, 0x25, 0x41)),
    Variant(timeout=30),
    Variant(resources=(0x22, 0x23, 0x25, 0x26, 0x40)),
]


class Held(NamedTuple):
    """A lease of the model: it ends between these two times."""

    user: int
    earliest: float
    latest: float


class World:
    """A server, what is done to it, and a simple model of what it should make of that."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.nft = WatchedNft(lab)
        self.server: Server | None = None
        self.variant = VARIANTS[0]
        self.leases: dict[tuple[str, int], Held] = {}

    def reset(self) -> None:
        """Begin with an empty server. A new one only if there is none."""
        self.leases.clear()
        if self.server is None:
            self.lab.load(more=DOOR)
            self.variant = VARIANTS[0]
            self.server = Server(self.lab, self.variant.conf(self.nft))
            return
        self.sighup(1)
        reconfigure(self.server, Variant(users=()).conf(self.nft))
        self.sighup(0)
        self.leases.clear()
        self.compare("reset")

    def drop(self) -> None:
        """Something went wrong: the next sequence is to have a new server."""
        if self.server is not None:
            self.server.kill()
            self.server = None
        self.nft.mode("good")

    # -- the steps -----------------------------------------------------------

    def knock(self, source: int, resource: int, user: int, operation: int = KNOCK) -> None:
        address, variant = SOURCES[source], self.variant
        before = time.monotonic()
        answer = attempt(self.lab, resource, operation, address, user)
        now = time.monotonic()
        allowed = variant.may(user, resource)
        assert (answer == COMEIN) == allowed, (answer, variant)
        if allowed and operation == REVOKE:
            self.leases.pop((address, resource), None)
        elif allowed:
            seconds = variant.seconds(resource)
            self.leases[address, resource] = Held(user, before + seconds, now + seconds)

    def revoke(self, source: int, resource: int, user: int) -> None:
        self.knock(source, resource, user, REVOKE)

    def expire(self) -> None:
        """Wait until what ends soon has ended."""
        soon = [held.latest for held in self.leases.values() if held.latest < time.monotonic() + 2]
        if soon:
            time.sleep(max(0, max(soon) - time.monotonic()))

    def reload(self) -> None:
        flush_and_reload(self.lab)

    def flush(self) -> None:
        flush_the_chain(self.lab)

    def restore(self) -> None:
        restore_what_was_saved(self.lab)

    def plant(self) -> None:
        assert self.server is not None
        server, count = self.server, happened(self.server, "healed")
        nft_do(f"add element inet filter letmein-4 {{ 10.77.6.1 . tcp . 22 {comment()} }}")
        eventually(lambda: happened(server, "healed") > count, "it is not removed")

    def by_hand(self, number: int) -> None:
        """Delete a lease that stands for some while yet from the kernel."""
        assert self.server is not None
        quiet(self.server)
        soon = time.monotonic() + 2
        firm = sorted(key for key, held in self.leases.items() if held.earliest > soon)
        if not firm:
            return
        address, resource = firm[number % len(firm)]
        version = 6 if ":" in address else 4
        if resource in (0x40, 0x41):
            name, keys = f"letmein-{resource:08X}-{version}", [address]
        else:
            pairs = [opens.split("/") for opens in OPENS[resource]]
            name, keys = f"letmein-{version}", [f"{address} . {p} . {n}" for p, n in pairs]
        count = len(self.server.events("revoked", reason="by hand"))
        nft_do(f"delete element inet filter {name} {{ {keys[0]} }}")
        self.server.wait_for("revoked", count + 1, reason="by hand")
        del self.leases[address, resource]

    def sighup(self, number: int) -> None:
        assert self.server is not None
        self.variant = variant = VARIANTS[number]
        before = time.monotonic()
        reconfigure(self.server, variant.conf(self.nft))
        now = time.monotonic()
        for (address, resource), held in list(self.leases.items()):
            seconds = variant.seconds(resource)
            self.leases[address, resource] = Held(
                held.user,
                min(held.earliest, before + seconds),
                min(held.latest, now + seconds),
            )
            if not variant.may(held.user, resource):
                del self.leases[address, resource]

    def bad_sighup(self) -> None:
        assert self.server is not None
        reconfigure(self.server, "[RESOURCES]\n1 = nonsense\n", good=False)
        self.server.path.write_text(self.variant.conf(self.nft), encoding="utf-8")

    def sigkill(self, number: int) -> None:
        assert self.server is not None
        crash(self.server, network=bool(number % 2))
        self.server = Server(self.lab, self.variant.conf(self.nft))

    def restart(self) -> None:
        assert self.server is not None
        self.server.stop()
        self.server = Server(self.lab, self.variant.conf(self.nft))
        self.leases.clear()

    def network(self) -> None:
        """The network process dies; another one comes."""
        assert self.server is not None
        count = len(self.server.events("network-process-lost"))
        os.kill(self.server.network_process(), signal.SIGKILL)
        self.server.wait_for("network-process-lost", count + 1)
        eventually(lambda: attempt(self.lab, 0x99) is not None, "no new network process")

    def fault(self, source: int, resource: int, operation: int, all_fails: bool) -> None:
        """nft fails meanwhile: that is nothing to a lease."""
        self.nft.mode("fail-all" if all_fails else "fail")
        self.knock(source, resource, 1, operation)
        self.nft.mode("good")

    def faulty_reload(self) -> None:
        """The firewall is reloaded while nft fails; later it works again."""
        assert self.server is not None
        server, count = self.server, happened(self.server, "cannot-heal")
        self.nft.mode("fail")
        flush_and_reload(self.lab)
        eventually(lambda: happened(server, "cannot-heal") > count, "nft has not failed")
        self.nft.mode("good")

    # -- the comparison ------------------------------------------------------

    def differences(self) -> str:
        """How the kernel, `status` and the model differ; "" if they do not."""
        assert self.server is not None
        before = time.monotonic()
        said = kernel()
        told = status(self.server)
        now = time.monotonic()
        if said.rules != self.variant.rules:
            return f"{said.rules} rules in place of {self.variant.rules}"
        for name, seen in (("the kernel", said.elements), ("status", told)):
            possible = set()
            for (address, resource), held in self.leases.items():
                for row in rows((address, resource, held.user)):
                    if held.earliest > now and row not in seen:
                        return f"{name} lacks {row}"
                    if held.latest < before and row in seen:
                        return f"{name} still has {row}"
                    possible.add(row)
                    if row in seen and not (
                        held.earliest - now - 1.05 <= seen[row] <= held.latest - before + 0.05
                    ):
                        return f"{name} gives {row} {seen[row]} s"
            if set(seen) - possible:
                return f"{name} has {sorted(set(seen) - possible)}"
        holders = [held for (_, resource), held in self.leases.items() if resource == 0x41]
        latest = max((held.latest for held in holders), default=0)
        earliest = max((held.earliest for held in holders), default=0)
        if latest < before and said.gates:
            return f"a gate is open: {said.gates}"
        if earliest > now and len(said.gates) != 2:
            return f"the gate is shut: {said.gates}"
        for left in said.gates.values():
            if not earliest - now - 1.05 <= left <= latest - before + 0.05:
                return f"the gate has {left} s left"
        return ""

    def compare(self, step: object) -> None:
        """They have to become one, soon."""
        assert self.server is not None
        deadline = time.monotonic() + LIMIT_S
        while difference := self.differences():
            if time.monotonic() > deadline:
                held = json.dumps({str(k): v for k, v in self.leases.items()}, indent=1)
                log = "\n".join(self.server.lines[-30:])
                raise AssertionError(f"after {step}: {difference}\n{held}\n{log}")
            time.sleep(0.02)
