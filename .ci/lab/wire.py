"""The wire, written from its description alone: messages, and both ends of it byte by byte."""

from __future__ import annotations

import contextlib
import hmac
import itertools
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

# isort: off
from lab.hosts import CLIENT_4, KEYS, LIMIT_S, SERVER_4, SERVER_6, Lab, eventually, server_for
# isort: on


# ----------------------------------------------------------------------------
# Messages
# ----------------------------------------------------------------------------

MAGIC = bytes.fromhex("3B1BB719")
KNOCK, CHALLENGE, RESPONSE, COMEIN, GOAWAY, REVOKE = range(6)
# What a peer has proved when its error happens, in order; DROPPED: never answered.
NO_AUTH, BASIC_AUTH, FULL_AUTH, DROPPED = range(4)
POLICIES = {"always": NO_AUTH, "basic-auth": BASIC_AUTH, "full-auth": FULL_AUTH}
ANYBODY = 0xFFFFFFFF
ZEROS = bytes(32)


def message(
    operation: int, resource: int, user: int = 1, token: bytes = ZEROS, key: bytes | None = None
) -> bytes:
    """A client's message of 56 bytes."""
    text = struct.pack(">III", operation, user, resource) + os.urandom(8)
    secret = KEYS.get(user, ZEROS) if key is None else key
    return MAGIC + text + hmac.digest(secret, text + token, "sha3_256")


class Reply(NamedTuple):
    """A server's message, without its salt."""

    operation: int
    user: int
    resource: int
    auth: bytes

    @classmethod
    def parse(cls, data: bytes) -> Reply:
        assert len(data) == 56, data
        assert data[:4] == MAGIC, data
        return cls(*struct.unpack(">III8x32s", data[4:]))


def reply(operation: int, user: int = 1, resource: int = 0x22, auth: bytes = ZEROS) -> bytes:
    return MAGIC + struct.pack(">III", operation, user, resource) + os.urandom(8) + auth


TOKEN = bytes(range(32))


def flipped(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


# ----------------------------------------------------------------------------
# Peers
# ----------------------------------------------------------------------------


class Peer:
    """One end of a conversation with the server, spoken byte by byte."""

    def __init__(self, lab: Lab, protocol: str = "tcp", source: str = CLIENT_4) -> None:
        self.protocol = protocol
        self.socket = lab.socket(protocol, source)
        self.socket.connect((server_for(source), 5800))

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def receive(self) -> Reply:
        data = self.socket.recv(56)
        while self.protocol == "tcp" and 0 < len(data) < 56:
            data += self.socket.recv(56 - len(data))
        return Reply.parse(data)

    def rest(self) -> bytes:
        """All that still comes until the server closes the TCP connection."""
        data = b""
        with contextlib.suppress(ConnectionError):
            while part := self.socket.recv(4096):
                data += part
        return data

    def challenge(self, resource: int, user: int = 1, operation: int = KNOCK) -> bytes:
        """Knock; returns the token of the server's challenge."""
        self.send(message(operation, resource, user))
        reply = self.receive()
        assert reply[:3] == (CHALLENGE, user, resource)
        assert reply.auth != ZEROS
        return reply.auth


def handshake(
    lab: Lab,
    resource: int = 0x22,
    operation: int = KNOCK,
    protocol: str = "tcp",
    source: str = CLIENT_4,
    user: int = 1,
) -> int:
    """A whole handshake without a fault; returns the operation of its last message."""
    with Peer(lab, protocol, source) as peer:
        token = peer.challenge(resource, user, operation)
        peer.send(message(RESPONSE, resource, user, token))
        reply = peer.receive()
        assert reply == (reply.operation, user, resource, ZEROS)
        return reply.operation


def attempt(
    lab: Lab,
    resource: int = 0x22,
    operation: int = KNOCK,
    source: str = CLIENT_4,
    user: int = 1,
    key: bytes | None = None,
    port: int = 5800,
) -> int | None:
    """A handshake that may go wrong: its last message's operation, None if there was none."""
    with contextlib.suppress(OSError, AssertionError), lab.socket("tcp", source) as peer:
        peer.connect((server_for(source), port))
        peer.sendall(message(operation, resource, user, key=key))
        said = peer.recv(56)
        if said[7:8] == bytes([CHALLENGE]):
            peer.sendall(message(RESPONSE, resource, user, said[24:], key))
            said = peer.recv(56)
        return said[7] if len(said) == 56 else None
    return None


def refused_knock(
    lab: Lab, protocol: str, source: str = CLIENT_4, user: int = 1, resource: int = 0x22
) -> None:
    """A knock with a wrong key, to a server with the policy `always`. Over UDP only the first of
    the same ones counts."""
    with Peer(lab, protocol, source) as peer:
        peer.send(message(KNOCK, resource, user, key=KEYS[2]))
        assert peer.receive()[:2] == (GOAWAY, user)


def refused_burst(lab: Lab) -> None:
    """More of what is no knock than the log has lines for."""
    for number in range(30):
        for protocol in ("tcp", "udp"):
            with Peer(lab, protocol, f"10.77.4.{number}") as peer:
                peer.send(message(KNOCK, 0x22, 9) if number % 2 else os.urandom(56))


def knock_all(lab: Lab, *holders: tuple[str, int, int]) -> None:
    for address, resource, user in holders:
        assert handshake(lab, resource, source=address, user=user) == COMEIN


def says(*messages: bytes) -> Callable[[Peer], None]:
    def speak(peer: Peer) -> None:
        for data in messages:
            peer.send(data)

    return speak


def after_challenge(answer: Callable[[bytes], bytes]) -> Callable[[Peer], None]:
    """Knock for 22, and answer the challenge with what answer makes of its token."""

    def speak(peer: Peer) -> None:
        peer.send(answer(peer.challenge(0x22)))

    return speak


def slowly(data: bytes, pause: float) -> Callable[[Peer], None]:
    def speak(peer: Peer) -> None:
        with contextlib.suppress(ConnectionError):
            for byte in data:
                peer.send(bytes([byte]))
                time.sleep(pause)

    return speak


def ends(*messages: bytes) -> Callable[[Peer], None]:
    """Send all this, then say that no more comes."""

    def speak(peer: Peer) -> None:
        for data in messages:
            peer.send(data)
            if len(data) == 56:
                assert peer.receive().operation == CHALLENGE
        peer.socket.shutdown(socket.SHUT_WR)

    return speak


def two_knocks(peer: Peer) -> None:
    peer.challenge(0x22)
    peer.send(message(KNOCK, 0x22))


def byte_57(peer: Peer) -> None:
    """Over TCP the 57th byte is the first of the next message."""
    peer.send(message(KNOCK, 0x22) + b"\0")
    token = peer.receive().auth
    peer.send(message(RESPONSE, 0x22, token=token))


# ----------------------------------------------------------------------------
# Servers of the test's own
# ----------------------------------------------------------------------------


class FakeServer:
    """Plays a script with each client: bytes are sent, None waits for a message. (UDP: once.)
    Args: at, its address and port, 0 for any port that is free.
    """

    def __init__(
        self,
        protocol: str,
        script: Sequence[bytes | None],
        reset: bool = False,
        at: tuple[str, int] = (SERVER_4, 5800),
    ) -> None:
        self.protocol = protocol
        self.script = script
        self.reset = reset
        self.heard: list[bytes] = []
        kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
        self.socket = socket.socket(socket.AF_INET, kind)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.settimeout(LIMIT_S)
        self.socket.bind(at)
        self.port = self.socket.getsockname()[1]
        if protocol == "tcp":
            self.socket.listen()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._play, daemon=True)
        self.thread.start()

    def __enter__(self) -> FakeServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        with contextlib.suppress(OSError):  # UDP says ENOTCONN
            self.socket.shutdown(socket.SHUT_RDWR)
        self.thread.join(LIMIT_S)
        self.socket.close()

    def _play(self) -> None:
        if self.protocol == "udp":
            for step in self.script:
                if step is None:
                    data, peer = self.socket.recvfrom(100)
                    self.heard.append(data)
                else:
                    self.socket.sendto(step, peer)
            return
        with contextlib.suppress(OSError):  # the end, see __exit__()
            while True:
                connection, _ = self.socket.accept()
                with connection, contextlib.suppress(ConnectionError):
                    self._talk(connection)

    def _talk(self, connection: socket.socket) -> None:
        for step in self.script:
            if step is None:
                self.heard.append(connection.recv(56))
            elif step == b"":
                self.done.wait(LIMIT_S)
            else:
                connection.sendall(step)
        if self.reset:
            linger = struct.pack("ii", 1, 0)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)


class HangsUp:
    """A Service that hangs up on its first peers at some stage, and serves the others."""

    def __init__(self, stage: str, count: int) -> None:
        self.stage = stage
        self.count = count
        self.ports: list[int] = []  # of its peers

    def __call__(self, connection: socket.socket) -> None:
        self.ports.append(connection.getpeername()[1])
        hangs_up = len(self.ports) <= self.count
        for stage, answer in (
            ("at once", b""),
            ("after the KNOCK", reply(CHALLENGE, auth=TOKEN)),
            ("after the RESPONSE", reply(COMEIN)),
        ):
            if answer:
                connection.recv(56, socket.MSG_WAITALL)
            if hangs_up and stage == self.stage:
                return
            connection.sendall(answer)


class Door:
    """A server in this process without a firewall behind it, over TCP and UDP, so that a test
    says how it behaves. Args: delays, by protocol and IP version (such as "tcp6"), of each
    answer; granted, called with KNOCK or REVOKE and the address asked, before a COMEIN."""

    def __init__(
        self,
        delays: Mapping[str, float] | None = None,
        granted: Callable[[int, str], object] = lambda operation, where: None,
        udp_copies: int = 1,
    ) -> None:
        self.delays = delays or {}
        self.granted = granted
        self.udp_copies = udp_copies
        self.grants: list[tuple[int, str]] = []  # KNOCK or REVOKE, and the address
        self.sockets = []
        for address, protocol in itertools.product((SERVER_4, SERVER_6), ("tcp", "udp")):
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
            listener = socket.socket(family, kind)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((address, 5800))
            if protocol == "tcp":
                listener.listen()
            self.sockets.append(listener)
            serve = self._serve_tcp if protocol == "tcp" else self._serve_udp
            arguments = listener, address, self.delays.get(protocol + "46"[":" in address], 0)
            threading.Thread(target=serve, args=arguments, daemon=True).start()

    def __enter__(self) -> Door:
        return self

    def __exit__(self, *_: object) -> None:
        for listener in self.sockets:
            with contextlib.suppress(OSError):  # a UDP socket wakes up, and says ENOTCONN
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()

    def _answer(self, data: bytes, asked: dict[int, int], where: str) -> bytes:
        """asked: KNOCK or REVOKE, by the user."""
        operation, user, resource = struct.unpack(">III", data[4:16])
        if operation in (KNOCK, REVOKE):
            asked[user] = operation
            return reply(CHALLENGE, user, resource, TOKEN)
        assert data[24:] == hmac.digest(KEYS[user], data[4:24] + TOKEN, "sha3_256")
        self.granted(asked[user], where)
        self.grants.append((asked[user], where))
        return reply(COMEIN, user, resource)

    def _serve_tcp(self, listener: socket.socket, where: str, delay: float) -> None:
        def talk(connection: socket.socket) -> None:
            asked: dict[int, int] = {}
            with connection, contextlib.suppress(OSError):
                for _ in range(2):
                    data = connection.recv(56, socket.MSG_WAITALL)
                    if data:
                        time.sleep(delay)
                        connection.sendall(self._answer(data, asked, where))

        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=talk, args=(connection,), daemon=True).start()

    def _serve_udp(self, listener: socket.socket, where: str, delay: float) -> None:
        asked: dict[object, dict[int, int]] = {}
        with contextlib.suppress(OSError):
            while True:
                data, peer = listener.recvfrom(100)
                if not data:  # the end, see __exit__()
                    return
                time.sleep(delay)
                answer = self._answer(data, asked.setdefault(peer, {}), where)
                for _ in range(self.udp_copies):
                    listener.sendto(answer, peer)


class Service:
    """A TCP service on the server's host: each connection goes to a function, in a thread."""

    def __init__(self, port: int, serve: Callable[[socket.socket], object]) -> None:
        self.listener = socket.create_server(
            ("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=64
        )
        self.serve = serve
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                threading.Thread(target=self._run, args=(connection,), daemon=True).start()

    def _run(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            self.serve(connection)

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()


def echo(connection: socket.socket) -> None:
    while data := connection.recv(1 << 16):
        connection.sendall(data)


def shut_soon(lab: Lab) -> None:
    """All leases end long before their time."""
    eventually(lambda: not lab.elements(), "a port stays open")
