"""The port knockers that `.ci/bench` compares, each in a lab of its own.

`knockers.py NAME` is one of bench's workers. It makes the hosts of .ci/lab, and then takes
requests: a line of JSON on standard input names a method of Knocker and its arguments, a line on
standard output has the result. Each program has its own hosts and its own worker, so all of them
are ready at the same time, and bench can ask them in turn.

The programs run as their Debian packages set them up: fwknopd and knockd sniff packets and call
iptables, whose rules refuse what nftables.conf refuses. Only the control port differs: it is 5800
for all of them, so that one flood fits all.
"""

from __future__ import annotations

import base64
import collections
import contextlib
import ctypes
import ctypes.util
import functools
import ipaddress
import json
import os
import pwd
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from lab import floods, hosts, servers, wire
from lab.floods import Attacker
from lab.hosts import CLIENT_4, SERVER_4, Lab
from lab.wire import COMEIN, KNOCK, RESPONSE, REVOKE

PORT = 22  # which a knock opens
LEASE_S = 600
PATIENCE_S = 6.0  # a client that takes longer has failed
THEN_S = 2.0  # after its client has ended, a knock that got through opens the port in less
FLOOD_PATIENCE_S = 3.0
RULES_LIMIT = 200_000
NEVER = float("inf")
PYTHON = getattr(sys, "_base_executable", sys.executable)  # no .venv, whose start takes longer

# 30 % of all packets get lost in each direction, except those of the opened port: this is about the
# knock. They get lost on the client's host, because a sniffer on the server's host sees packets
# before any rule there.
LOSS = """
table netdev loss {
    chain out {
        type filter hook egress device wan priority 0
        tcp dport != 22 numgen random mod 100 < 30 drop
        udp dport 5800 numgen random mod 100 < 30 drop
    }
    chain in {
        type filter hook ingress device wan priority 0
        tcp sport != 22 numgen random mod 100 < 30 drop
        udp sport 5800 numgen random mod 100 < 30 drop
    }
}
"""
# What nftables.conf says, in iptables' words.
IPTABLES_RULES = """*filter
:INPUT DROP
:FORWARD ACCEPT
:OUTPUT ACCEPT
-A INPUT -i lo -j ACCEPT
-A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A INPUT -m conntrack --ctstate INVALID -j DROP
-A INPUT -p tcp -j REJECT --reject-with tcp-reset
-A INPUT -j REJECT
COMMIT
"""


Rushed = tuple[float, list[float]]  # seconds in all, and of each knock that was good


class Missing(Exception):
    """This program cannot run here; says why."""


def address(number: int) -> str:
    """One of the client host's 65,535."""
    return str(ipaddress.IPv4Address("10.77.0.0") + 1 + number % 65_000)


def program(name: str) -> str:
    """Where a program is."""
    path = shutil.which(name)
    if path is None:
        raise Missing(f"{name} is not installed")
    return path


class RuleWatch:
    """Counts the rules that anybody adds to the server's firewall, as the kernel tells it."""

    GROUP, NEW_RULE = 7, 10 << 8 | 6  # linux/netfilter/nfnetlink.h, nf_tables.h

    def __init__(self) -> None:
        self.socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12)  # NETLINK_NETFILTER
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        self.socket.bind((0, 1 << self.GROUP - 1))

    def wait(self, seconds: float) -> int:
        """Wait for the next ones; returns how many, or 0 if none comes in this time."""
        deadline, count = time.monotonic() + seconds, 0
        while not count and (left := deadline - time.monotonic()) > 0:
            if select.select([self.socket], [], [], left)[0]:
                count = self._count(self.socket.recv(1 << 20))
        return count

    def _count(self, data: bytes) -> int:
        count = 0
        while data:
            length, kind = struct.unpack_from("=IH", data)
            count += kind == self.NEW_RULE
            data = data[length + 3 & ~3 :]
        return count


class Knocker:
    """One program: its server, its client, and what bench asks of them.

    A subclass knows how to start it, what a user types, and how to knock without the client
    program: under load, it is the server that is measured.
    """

    # The floods that apply to it: kind, protocol, and one of the lab's FLOOD_SOURCES.
    floods: tuple[tuple[str, str, str], ...] = ()
    protocols: tuple[str, ...] = ()  # over which one can knock
    refreshes = False
    is_sniffer = False

    def __init__(self) -> None:
        self.find()
        self.lab = Lab()
        self.attacker = Attacker(self.lab)
        self.next_address = 0
        self.lossy = False

    # -- of each program -----------------------------------------------------

    def find(self) -> None:
        """See whether the program is installed. Raises: Missing."""
        raise NotImplementedError

    def version(self) -> str:
        raise NotImplementedError

    def load_firewall(self) -> None:
        """What the administrator does at boot, and after each change."""
        raise NotImplementedError

    def start(self, lease_s: int) -> None:
        """Start the server and wait until it is ready."""
        raise NotImplementedError

    def stop(self) -> None:
        """Stop the server as its service would."""
        raise NotImplementedError

    def parents(self) -> list[int]:
        """The processes that start() has started."""
        raise NotImplementedError

    def command(self, host: str, protocol: str, how: str) -> list[str]:
        """What a user types to get in at host."""
        raise NotImplementedError

    def knock(self, source: str, protocol: str = "") -> None:
        """Knock once, from an address of the client's host."""
        raise NotImplementedError

    def replay(self, source: str) -> None:
        """Record a knock, and send it again from this address, which has no lease."""
        raise NotImplementedError

    def close(self, source: str) -> None:
        """End the lease of this address."""
        raise NotImplementedError

    def rush_at(self, addresses: list[str], at_once: int, limit: float) -> Rushed:
        """Knock from each, at_once at a time, until limit."""
        raise NotImplementedError

    def fill(self, count: int) -> None:
        """Make so many leases. Where granting takes too long, all but one are copies."""
        raise NotImplementedError

    def dump(self) -> tuple[str, str]:
        """The firewall as text, with a rule behind the leases that accepts port 9; and the part of
        this text that is its only lease."""
        raise NotImplementedError

    def restore(self, ruleset: str) -> None:
        """Load a text from dump()."""
        raise NotImplementedError

    def recorded(self, kind: str) -> bytes:
        """What a flood of this kind sends."""
        raise NotImplementedError

    # -- tools ----------------------------------------------------------------

    def fresh(self, count: int) -> list[str]:
        """Addresses that have not knocked yet."""
        self.next_address += count
        return [address(self.next_address - count + number) for number in range(count)]

    def pids(self) -> list[int]:
        """The server's processes that run, with all that they have started."""
        children = collections.defaultdict(list)
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                fields = path.read_text(encoding="utf-8").rpartition(")")[2].split()
                if fields[0] != "Z":
                    children[int(fields[1])].append(int(path.parent.name))
        found = []
        waiting = [pid for pid in self.parents() if hosts.alive(Path(f"/proc/{pid}"))]
        while waiting:
            found.append(waiting.pop())
            waiting += children[found[-1]]
        return found

    def connect(self, source: str, deadline: float, pause_s: float = 0.001) -> bool:
        """Try to connect to the port until it is open; whether it was before the deadline."""
        while time.monotonic() < deadline:
            try:
                with self.lab.socket("tcp", source, 1.0) as peer:
                    peer.connect((SERVER_4, PORT))
                return True
            except OSError:
                time.sleep(pause_s)
        return False

    def get_in(self, source: str, patience_s: float, protocol: str = "") -> float:
        """Knock, and connect; how long it took, or NEVER."""
        started = time.monotonic()
        with contextlib.suppress(OSError, AssertionError):
            self.knock(source, protocol)
            if self.connect(source, started + patience_s):
                return time.monotonic() - started
        return NEVER

    # -- what bench asks for ---------------------------------------------------

    def describe(self) -> dict[str, Any]:
        return {
            "version": self.version(),
            "floods": self.floods,
            "protocols": self.protocols,
            "refreshes": self.refreshes,
        }

    def begin(self, lease_s: int = LEASE_S) -> None:
        """A server without leases."""
        self.load_firewall()
        # A minute of knocks would fill the server's table of connections.
        hosts.sysctl("net/netfilter/nf_conntrack_tcp_timeout_time_wait", 5)
        floods.forget_connections()
        self.start(lease_s)
        self.next_address = 0

    def end(self) -> None:
        self.stop()

    def enter(self, host: str, protocol: str = "", how: str = "") -> float:
        """Seconds from Enter to the first accepted connection, or NEVER."""
        words = self.command(host, protocol, how)
        environment = {**hosts.unmeasured(), "HOME": str(self.lab.directory)}
        with self.lab.client():
            started = time.monotonic()
            client = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=environment,
            )
        # A wait with a timeout would look only now and then.
        limit = threading.Timer(PATIENCE_S, client.kill)
        limit.start()
        client.wait()
        limit.cancel()
        if how == "bare":
            return time.monotonic() - started
        took = NEVER
        if client.returncode == 0 and self.connect(CLIENT_4, time.monotonic() + THEN_S):
            took = time.monotonic() - started
        with self.without_loss():
            self.close(CLIENT_4)
        return took

    @contextlib.contextmanager
    def without_loss(self) -> Iterator[None]:
        """Nothing gets lost for a while."""
        lossy = self.lossy
        if lossy:
            self.lose(False)
        yield
        if lossy:
            self.lose(True)

    def lose(self, lossy: bool) -> None:
        """Start or stop losing 30 % of all packets."""
        self.lossy = lossy
        with self.lab.client():
            text = "table netdev loss\ndelete table netdev loss\n" + (LOSS if lossy else "")
            hosts.run(hosts.NFT, "-f", "-", text=text)

    @functools.cached_property
    def far(self) -> contextlib.ExitStack:
        return contextlib.ExitStack()

    def move(self, round_trip_s: float) -> None:
        """Make the path to the server this long; 0 ends it."""
        self.far.close()
        if round_trip_s:
            self.far.enter_context(self.attacker.slow_path(round_trip_s / 2))
        self.sniff("near" if round_trip_s else "lan")

    def sniff(self, interface: str) -> None:
        """Listen on this interface, if that matters to the program."""

    def rush(self, at_once: int, count: int, limit: float) -> list[float]:
        """From new addresses: how many knocks a second, and how many were good."""
        addresses = self.fresh(count)
        seconds, took = self.rush_at(addresses, at_once, limit)
        return [len(took) / seconds if seconds else 0.0, len(took)]

    def refresh(self, count: int, limit: float) -> float:
        """How many knocks a second, 32 at a time, from those who hold a lease."""
        addresses = self.fresh(count)
        _, took = self.rush_at(addresses, 32, limit)
        holders = addresses[: max(32, len(took))]
        addresses = (holders * count)[:count]
        seconds, took = self.rush_at(addresses, 32, limit)
        return len(took) / seconds if seconds else 0.0

    def memory(self) -> float:
        """MB of all of the server's processes: private to each, plus what they share, once."""
        own, shared = 0, [0]
        for pid in self.pids():
            with contextlib.suppress(OSError):
                text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
                sizes = {name: int(kb) for name, kb in re.findall(r"(\w+): +(\d+) kB", text)}
                private = sizes["Private_Clean"] + sizes["Private_Dirty"]
                own += private
                shared.append(sizes["Rss"] - private)
        return (own + max(shared)) / 1024

    def prepare_packets(self, leases: int) -> None:
        """Load a firewall with so many copies of a lease that the program has granted."""
        self.begin()
        source = address(50_000)
        assert self.get_in(source, PATIENCE_S) < NEVER
        ruleset, lease = self.dump()
        self.end()
        first = ipaddress.IPv4Address("10.128.0.0")
        copies = [lease.replace(source, str(first + number)) for number in range(leases)]
        self.restore(ruleset.replace(lease, "".join(copies)))

    def packets(self, count: int) -> list[float]:
        """µs from sending to receiving a datagram that matches no lease."""
        took = []
        with self.lab.socket("udp", address(60_000)) as sender, socket.socket(
            socket.AF_INET, socket.SOCK_DGRAM
        ) as receiver:
            receiver.bind(("", 9))
            receiver.settimeout(2)
            sender.connect((SERVER_4, 9))
            for _ in range(count):
                began = time.perf_counter()
                sender.send(b"x")
                receiver.recv(1)
                took.append(1e6 * (time.perf_counter() - began))
        return took

    def lateness(self, count: int, lease_s: int) -> list[float]:
        """By how many seconds leases end late (early: below 0)."""
        opened: dict[str, float] = {}
        late: list[float] = []
        sources = self.fresh(count)
        started = time.monotonic()
        for number, source in enumerate(sources):
            time.sleep(max(0.0, started + 0.37 * number - time.monotonic()))
            if self.get_in(source, PATIENCE_S) < NEVER:
                opened[source] = time.monotonic()
        deadline = time.monotonic() + lease_s + 5
        while opened and time.monotonic() < deadline:
            for source, at in list(opened.items()):
                now = time.monotonic()
                if now > at + lease_s - 1.2 and not self.lab.reaches(PORT, source):
                    late.append(now - at - lease_s)
                    del opened[source]
            time.sleep(0.003)
        return late + [NEVER] * len(opened)

    def survival(self, lease_s: int) -> dict[str, bool]:
        """Whether a port stays shut, or open, whatever happens to a server."""
        found = {}
        first, second, third, fourth, fifth = self.fresh(5)

        def let_in(source: str) -> None:
            assert self.get_in(source, PATIENCE_S) < NEVER, "nobody gets in"

        def is_open(source: str) -> bool:
            time.sleep(1)  # for whatever the server does with what it finds, or does not find
            return self.connect(source, time.monotonic() + 0.5)

        self.begin()
        let_in(first)
        self.kill()
        self.start(LEASE_S)
        found["kept by a restart after SIGKILL"] = is_open(first)
        let_in(second)
        self.load_firewall()
        found["kept by a reload"] = is_open(second)
        found["knock after a reload"] = self.get_in(third, FLOOD_PATIENCE_S) < NEVER
        with contextlib.suppress(AssertionError, OSError):  # it may have ended at that
            self.stop()

        self.begin()
        self.replay(fifth)
        found["shut to a replay"] = not is_open(fifth)
        let_in(fourth)
        self.stop()
        found["gone at a stop"] = not self.lab.reaches(PORT, fourth)
        self.start(LEASE_S)
        found["kept by a clean restart"] = is_open(fourth)
        self.stop()

        self.begin(lease_s)
        let_in(first)
        at = time.monotonic()
        self.kill()
        found["kept after SIGKILL"] = self.lab.reaches(PORT, first)
        time.sleep(max(0.0, at + lease_s + 2 - time.monotonic()))
        found["ends on time after SIGKILL"] = not self.lab.reaches(PORT, first)
        return found

    def kill(self) -> None:
        """SIGKILL to all of the server's processes."""
        pids = self.pids()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        hosts.eventually(
            lambda: not any(hosts.alive(Path(f"/proc/{pid}")) for pid in pids),
            "a killed process lives on",
        )

    def flood(
        self, kind: str, protocol: str, source: str, rate: float, seconds: float
    ) -> dict[str, Any]:
        """Knocks of a client, five a second, while others attack."""
        self.begin()
        message = self.recorded(kind)
        if kind == "random" and self.is_sniffer:
            kind = "replay"  # of recorded(): the lab's random messages are too short
        sources = floods.FLOOD_SOURCES[source]
        plan = floods.Flood(kind, protocol, sources, rate, seconds, 0.005, message.hex())
        count = round(seconds / 0.2)
        clients = [CLIENT_4] * count if source == "own" else self.fresh(count)
        # Over UDP an attacker forges the client's address, over TCP it is a neighbour behind a NAT.
        host = "client" if source == "own" and protocol == "tcp" else "attacker"
        took: list[float] = []

        def knock(client: str) -> None:
            took.append(self.get_in(client, FLOOD_PATIENCE_S, protocol))

        threads = []
        with self.attacker.start(host, "flood") as process:
            floods.tell(process, json.dumps(plan._asdict()))
            assert floods.hear(process) == "ready"
            floods.tell(process, "")
            started = time.monotonic()
            for number, client in enumerate(clients):
                time.sleep(max(0.0, started + 0.1 + 0.2 * number - time.monotonic()))
                threads.append(threading.Thread(target=knock, args=(client,), daemon=True))
                threads[-1].start()
            for thread in threads:
                thread.join()
            sent, _ = json.loads(floods.hear(process))
        crashed = not self.pids()
        with contextlib.suppress(AssertionError, OSError):
            self.stop()
        return {"took": took, "sent": sent / seconds, "crashed": crashed}


# ----------------------------------------------------------------------------
# letmein.py and the Rust letmein
# ----------------------------------------------------------------------------

# The last two are what the lab's "key" flood asks for.
RESOURCES = f"""
22 = port: {PORT} / timeout: {{lease_s}}
23 = port: 23
26 = port: 26 / users: 1
"""
BLOCK_LIST = """
table inet filter {{
    set blocked {{ type ipv4_addr; flags interval; elements = {{ {ranges} }}; }}
}}
"""


class Letmein(Knocker):
    """What the two share: the protocol, and nftables."""

    floods = (
        ("idle", "tcp", "many"),
        ("replay", "tcp", "many"),
        ("replay", "udp", "many"),
        ("random", "tcp", "many"),
        ("random", "udp", "many"),
        ("slow", "tcp", "many"),
        ("reset", "tcp", "many"),
        ("idle", "tcp", "own"),
        ("replay", "udp", "own"),
        ("key", "tcp", "many"),
        ("key", "udp", "many"),
    )
    protocols = ("tcp", "udp")
    refreshes = True
    general = ""

    def load_firewall(self) -> None:
        self.lab.load()

    def add_ranges(self, count: int) -> None:
        """Put somebody else's set beside our chain."""
        first = ipaddress.IPv4Address("20.0.0.0")
        ranges = ", ".join(f"{first + 8 * n}-{first + 8 * n + 5}" for n in range(count))
        self.restore(BLOCK_LIST.format(ranges=ranges))

    def knock_once(self) -> float:
        """Seconds from a knock to its open port, or NEVER."""
        return self.get_in(self.fresh(1)[0], PATIENCE_S)

    def conf(self, lease_s: int) -> str:
        return hosts.server_conf(
            resources=RESOURCES.format(lease_s=lease_s),
            general=self.general,
            nftables=f"max-nr-rules = {RULES_LIMIT}",
        )

    @functools.cached_property
    def client_file(self) -> Path:
        return self.lab.file(hosts.client_conf(resources=RESOURCES.format(lease_s=LEASE_S)))

    def words(self, host: str, protocol: str) -> list[str]:
        option = {"tcp": ["-T"], "udp": ["-U"], "": []}[protocol]
        return ["-c", str(self.client_file), "knock", *option, host, str(PORT)]

    def knock(self, source: str, protocol: str = "") -> None:
        answer = wire.handshake(self.lab, protocol=protocol or "tcp", source=source)
        assert answer == COMEIN

    def replay(self, source: str) -> None:
        knock = self.recorded("replay")
        with wire.Peer(self.lab) as client:
            client.send(knock)
            response = wire.message(RESPONSE, 0x22, token=client.receive().auth)
            client.send(response)
            assert client.receive().operation == COMEIN
        with wire.Peer(self.lab, source=source) as attacker:
            attacker.send(knock)
            attacker.receive()
            attacker.send(response)
            attacker.rest()

    def close(self, source: str) -> None:
        with contextlib.suppress(OSError, AssertionError):
            wire.handshake(self.lab, operation=REVOKE, source=source)

    def rush_at(self, addresses: list[str], at_once: int, limit: float) -> Rushed:
        done = floods.rush(self.lab, [], addresses, at_once, KNOCK, limit)
        return done.seconds, done.took

    def dump(self) -> tuple[str, str]:
        ruleset = hosts.run(hosts.NFT, "list", "ruleset")
        behind = "jump LETMEIN-INPUT\n"
        assert behind in ruleset
        return "flush ruleset\n" + ruleset.replace(behind, behind + "udp dport 9 accept\n"), ""

    def restore(self, ruleset: str) -> None:
        hosts.run(hosts.NFT, "-f", "-", text=ruleset)

    def recorded(self, kind: str) -> bytes:
        return wire.message(KNOCK, 0x22)


class FileLoggedServer(servers.Server):
    """A server whose log goes to a file as soon as it is ready: to read it takes time."""

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._note(line)
            if "event=ready" in line:
                break
        path = self.lab.directory / "log"
        with path.open("w", encoding="utf-8") as file:
            shutil.copyfileobj(self.process.stderr, file, 1 << 20)
        with self.news:
            self.lines += path.read_text(encoding="utf-8").splitlines()
            self.ended = True
            self.news.notify_all()


class Ours(Letmein):
    """letmein.py of this tree, as `make install` has it run: from its bytecode, its network
    process under an account of its own if there is one."""

    general = "control-error-policy = basic-auth"

    def find(self) -> None:
        names = {account.pw_name for account in pwd.getpwall()}
        wanted = servers.REFERENCE_ACCOUNT  # which `make install` makes
        self.account = wanted if wanted in names and os.geteuid() == 0 else "none"

    def version(self) -> str:
        script = str(hosts.LETMEIN)
        return hosts.run(PYTHON, script, "--version").strip().rpartition(" ")[2]

    def start(
        self, lease_s: int, server_type: type[servers.Server] = FileLoggedServer
    ) -> None:
        account = self.account if self.lab.real_root else "none"
        program = (PYTHON, "-I", self.lab.installed, "server")
        self.server = server_type(
            self.lab,
            self.conf(lease_s),
            account=account,
            program=program,
            env=hosts.unmeasured(),
        )

    def stop(self) -> None:
        self.server.stop()

    def costs(self, leases: int) -> dict[str, float]:
        """What a server does that finds so many leases at its start: seconds of the processor's
        time for each task, of the slowest knock meanwhile, and MB."""
        self.prepare_packets(leases)
        took: list[float] = []
        self.start(LEASE_S, servers.Server)
        monitor = self.server.process.pid

        def used_since(before: float) -> float:
            return hosts.cpu_seconds(monitor) - before

        with self.knocking(took):
            self.server.wait_for("adopted")
            costs = {"adopt": used_since(0)}
            before, others = hosts.cpu_seconds(monitor), hosts.children_s()
            words = [PYTHON, "-I", str(self.lab.installed), "status"]
            words += ["-c", str(self.server.path), "--rundir", str(self.server.rundir)]
            hosts.run(*words)
            costs["status"] = used_since(before) + hosts.children_s() - others
            before = hosts.cpu_seconds(monitor)
            self.load_firewall()
            self.server.wait_for("healed")
            costs["heal"] = used_since(before)
        costs["memory"] = self.memory()
        costs["slowest"] = 1000 * max(took)
        self.stop()
        return costs

    @contextlib.contextmanager
    def knocking(self, took: list[float]) -> Iterator[None]:
        """Meanwhile somebody knocks from ever new addresses; notes how long each took to get in.
        Right after a reload the control port is shut: then they try again, as a client does."""
        ended = threading.Event()

        def knock() -> None:
            while not ended.wait(0.05):
                source, started = self.fresh(1)[0], time.monotonic()
                while self.get_in(source, PATIENCE_S) == NEVER:
                    if time.monotonic() > started + PATIENCE_S:
                        took.append(NEVER)
                        return
                took.append(time.monotonic() - started)

        thread = threading.Thread(target=knock, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def parents(self) -> list[int]:
        return [self.server.process.pid]

    def command(self, host: str, protocol: str, how: str) -> list[str]:
        words = {
            "": [PYTHON, "-I", str(self.lab.installed)],
            "file": [PYTHON, "-I", str(hosts.LETMEIN)],
            "bare": [PYTHON, "-I", "-c", "pass"],
        }[how]
        return words if how == "bare" else [*words, *self.words(host, protocol)]

    def fill(self, count: int) -> None:
        _, took = self.rush_at(self.fresh(count), 32, 30)
        assert len(took) == count, f"{len(took)} of {count} leases granted"

    def dump(self) -> tuple[str, str]:
        ruleset, _ = super().dump()
        found = re.search(r"elements = \{ ([^}]*) \}", ruleset)
        assert found, ruleset
        element = found[1] + ",\n"  # nft takes a comma behind the last one
        return ruleset.replace(found[1], element), element


class Rust(Letmein):
    """The reference implementation: letmeinfwd as root, letmeind under its own account."""

    def find(self) -> None:
        place = Path(program("letmeinfwd")).parent
        self.programs = {name: str(place / name) for name in ("letmein", "letmeind", "letmeinfwd")}
        for path in self.programs.values():
            program(path)
        account = servers.REFERENCE_ACCOUNT
        if os.geteuid() != 0:
            raise Missing("letmeind takes real root")
        if account not in {known.pw_name for known in pwd.getpwall()}:
            raise Missing(f"letmeind wants an account: useradd --system {account}")

    def version(self) -> str:
        return hosts.run(self.programs["letmeind"], "--version").split()[-1]

    def start(self, lease_s: int) -> None:
        self.server = servers.ReferenceServer(self.lab, self.programs, self.conf(lease_s))

    def stop(self) -> None:
        self.server.__exit__(None)

    def parents(self) -> list[int]:
        return [process.pid for process in self.server.started]

    def command(self, host: str, protocol: str, how: str) -> list[str]:
        return [self.programs["letmein"], *self.words(host, protocol)]

    def dump(self) -> tuple[str, str]:
        ruleset, _ = super().dump()
        found = re.search(r"\t\tip saddr 10\.77\..*\n", ruleset)
        assert found, ruleset
        return ruleset, found[0]

    def fill(self, count: int) -> None:
        source, *others = self.fresh(count)
        self.knock(source)
        _, lease = self.dump()
        add = "add rule inet filter LETMEIN-INPUT" + lease
        self.restore("".join(add.replace(source, other) for other in others))


# ----------------------------------------------------------------------------
# fwknop and knockd
# ----------------------------------------------------------------------------


class Sniffer(Knocker):
    """What these two share: they sniff packets, never answer, and call iptables. A knock has
    succeeded when the kernel reports a new rule."""

    is_sniffer = True
    interface = "lan"
    daemon: subprocess.Popen[bytes]

    def find(self) -> None:
        self.iptables = program("iptables-nft")
        program(type(self).__name__.lower())

    def load_firewall(self) -> None:
        hosts.run(hosts.NFT, "flush", "ruleset")
        self.restore(IPTABLES_RULES)

    def restore(self, ruleset: str) -> None:
        hosts.run(program("iptables-nft-restore"), text=ruleset)

    def launch(self, words: Sequence[str], is_ready: Callable[[], bool]) -> None:
        with (self.lab.directory / "output").open("wb") as output:
            self.daemon = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
        self.lab.processes.append(self.daemon)  # type: ignore[arg-type]
        hosts.eventually(is_ready, f"{words[0]} does not start")

    def sniff(self, interface: str) -> None:
        self.stop()
        self.interface = interface
        if interface != "lan":  # knockd wants to see the address there
            hosts.run("ip", "addr", "add", f"{SERVER_4}/32", "dev", interface)
        self.start(LEASE_S)

    def output(self) -> str:
        return (self.lab.directory / "output").read_text(encoding="utf-8", errors="replace")

    def sniffs(self) -> bool:
        """Whether its socket takes packets by now. (/proc/net/packet has a line for each: the sixth
        word says whether it runs, the ninth is its inode.)"""
        assert self.daemon.poll() is None, self.output()
        own = set()
        for path in Path(f"/proc/{self.daemon.pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                own.add(os.readlink(path))
        lines = Path("/proc/thread-self/net/packet").read_text(encoding="ascii").splitlines()[1:]
        words = [line.split() for line in lines]
        return any(line[5] == "1" and f"socket:[{line[8]}]" in own for line in words)

    def parents(self) -> list[int]:
        return [self.daemon.pid]

    def stop(self) -> None:
        if self.daemon.poll() is None:
            for pid in self.pids():  # knockd waits for its children: so systemd kills all
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
            try:
                self.daemon.wait(5)
            except subprocess.TimeoutExpired:
                self.kill()
            self.daemon.wait()

    def for_ipv4(self, host: str) -> str:
        """A name in the lab with the IPv4 address alone: these programs prefer IPv6, but open
        IPv4."""
        return {"both.test": "xn--bcher-kva.test"}.get(host, host)

    def close(self, source: str) -> None:
        rules = hosts.run(program("iptables-nft-save"))
        kept = [line for line in rules.splitlines() if f"-s {source}/32" not in line]
        self.restore("\n".join(kept) + "\n")

    def dump(self) -> tuple[str, str]:
        rules = hosts.run(program("iptables-nft-save"))
        found = re.search(r"-A \S+ -s 10\.77\..*\n", rules)
        assert found, rules
        last = "-A INPUT -p tcp -j REJECT"
        assert last in rules
        return rules.replace(last, f"-A INPUT -p udp --dport 9 -j ACCEPT\n{last}"), found[0]

    def fill(self, count: int) -> None:
        source, *others = self.fresh(count)
        assert self.get_in(source, PATIENCE_S) < NEVER
        _, lease = self.dump()
        lease = lease.replace("-A INPUT", "-I INPUT")
        copies = "".join(lease.replace(source, other) for other in others)
        words = [program("iptables-nft-restore"), "--noflush"]
        hosts.run(*words, text=f"*filter\n{copies}COMMIT\n")

    def rush_at(self, addresses: list[str], at_once: int, limit: float) -> Rushed:
        watch = RuleWatch()
        waiting = collections.deque(addresses)
        running: collections.deque[float] = collections.deque()
        took: list[float] = []
        started = last = time.monotonic()
        while True:
            while waiting and len(running) < at_once and time.monotonic() < started + limit:
                running.append(time.monotonic())
                self.knock(waiting.popleft())
            if not running:
                break
            count = watch.wait(2.0 if took else PATIENCE_S)
            if count == 0 or last > started + limit + 3:
                break  # the rest is lost, or far too slow
            last = time.monotonic()
            took += [last - running.popleft() for _ in range(min(count, len(running)))]
        watch.socket.close()
        return last - started, took

    def recorded(self, kind: str) -> bytes:
        return base64.b64encode(os.urandom(160))


class Fwknopd(Sniffer):
    """fwknop: one encrypted datagram, and a sniffer that looks every 100 ms."""

    floods = (("random", "udp", "many"), ("replay", "udp", "many"))
    protocols = ("udp",)
    KEY, HMAC_KEY = b"k" * 32, b"h" * 32
    HMAC_SHA256 = 3  # fko.h

    def find(self) -> None:
        super().find()
        program("fwknop")
        library = ctypes.util.find_library("fko")
        if library is None:
            raise Missing("libfko is not installed")
        self.fko = ctypes.CDLL(library)

    def version(self) -> str:
        found = re.search(r"[\d.]+\d", hosts.run(program("fwknopd"), "--version"))
        return found[0] if found else "?"

    def start(self, lease_s: int) -> None:
        key, hmac_key = (base64.b64encode(key).decode() for key in (self.KEY, self.HMAC_KEY))
        conf = (
            f"PCAP_INTF {self.interface};\nPCAP_FILTER udp port 5800;\n"
            f"FIREWALL_EXE {self.iptables};\n"
        )
        access = (
            f"SOURCE ANY\nKEY_BASE64 {key}\nHMAC_KEY_BASE64 {hmac_key}\nOPEN_PORTS tcp/{PORT}\n"
            f"REQUIRE_SOURCE_ADDRESS Y\nFW_ACCESS_TIMEOUT {lease_s}\nMAX_FW_TIMEOUT {LEASE_S}\n"
        )
        run_directory = self.lab.directory / "fwknop"
        run_directory.mkdir(mode=0o700, exist_ok=True)
        words = ["fwknopd", "--foreground", "-r", str(run_directory)]
        words += ["-c", str(self.lab.file(conf, "fwknopd.conf"))]
        words += ["-a", str(self.lab.file(access, "access.conf"))]
        self.launch(words, lambda: self.sniffs() and "main event loop" in self.output())

    def command(self, host: str, protocol: str, how: str) -> list[str]:
        key, hmac_key = (base64.b64encode(key).decode() for key in (self.KEY, self.HMAC_KEY))
        words = ["fwknop", "-A", f"tcp/{PORT}", "-a", CLIENT_4, "-D", self.for_ipv4(host)]
        words += ["-p", "5800", "--use-hmac"]
        return [*words, "--key-base64-rijndael", key, "--key-base64-hmac", hmac_key]

    def packet(self, source: str) -> bytes:
        """What the client sends, made by its library."""
        context, data = ctypes.c_void_p(), ctypes.c_char_p()
        request = f"{source},tcp/{PORT}".encode()
        assert self.fko.fko_new(ctypes.byref(context)) == 0
        assert self.fko.fko_set_spa_message(context, request) == 0
        assert self.fko.fko_set_spa_hmac_type(context, self.HMAC_SHA256) == 0
        keys = (self.KEY, len(self.KEY), self.HMAC_KEY, len(self.HMAC_KEY))
        assert self.fko.fko_spa_data_final(context, *keys) == 0
        assert self.fko.fko_get_spa_data(context, ctypes.byref(data)) == 0
        packet = bytes(data.value or b"")
        self.fko.fko_destroy(context)
        return packet

    def knock(self, source: str, protocol: str = "") -> None:
        self.send(source, self.packet(source))

    def send(self, source: str, packet: bytes) -> None:
        with self.lab.socket("udp", source) as peer:
            peer.sendto(packet, (SERVER_4, 5800))

    def replay(self, source: str) -> None:
        packet = self.packet(source)
        self.send(source, packet)
        assert self.connect(source, time.monotonic() + PATIENCE_S)
        self.close(source)
        assert not self.lab.reaches(PORT, source)
        self.send(source, packet)

    def recorded(self, kind: str) -> bytes:
        return self.packet(address(64_000)) if kind == "replay" else super().recorded(kind)


class Knockd(Sniffer):
    """knockd: three ports in the right order, and no proof of who knocks."""

    floods = (("reset", "tcp", "many"),)
    protocols = ("tcp",)
    SEQUENCE = (5800, 8000, 9000)

    def find(self) -> None:
        super().find()
        program("knock")

    def version(self) -> str:
        return hosts.run(program("knockd"), "-V").split()[1]

    def start(self, lease_s: int) -> None:
        rule = f"INPUT -s %IP% -p tcp --dport {PORT} -j ACCEPT"
        conf = f"""
[options]
    LogFile = {self.lab.directory}/knockd.log
[ssh]
    sequence = {",".join(map(str, self.SEQUENCE))}
    seq_timeout = 5
    tcpflags = syn
    start_command = {self.iptables} -I {rule}
    cmd_timeout = {lease_s}
    stop_command = {self.iptables} -D {rule}
"""
        words = ["knockd", "-i", self.interface, "-c", str(self.lab.file(conf))]
        self.launch(words, self.sniffs)
        time.sleep(0.2)  # until its filter is in place, too: it does not say when

    def command(self, host: str, protocol: str, how: str) -> list[str]:
        return ["knock", self.for_ipv4(host), *map(str, self.SEQUENCE)]

    def replay(self, source: str) -> None:
        self.knock(source)  # it is the same whoever sends it

    def knock(self, source: str, protocol: str = "") -> None:
        for port in self.SEQUENCE:
            with self.lab.socket("tcp", source) as peer, contextlib.suppress(ConnectionError):
                peer.connect((SERVER_4, port))


KNOCKERS: dict[str, type[Knocker]] = {
    "letmein.py": Ours,
    "Rust": Rust,
    "fwknop": Fwknopd,
    "knockd": Knockd,
}


# ----------------------------------------------------------------------------
# The worker
# ----------------------------------------------------------------------------


def requests() -> Iterator[tuple[str, dict[str, Any]]]:
    for line in sys.stdin:
        name, arguments = json.loads(line)
        yield name, arguments


def work(name: str, answer: Callable[[dict[str, Any]], None]) -> None:
    """Do what is asked until standard input ends."""
    try:
        knocker = KNOCKERS[name]()
        answer({"good": knocker.describe()})
    except Missing as error:
        answer({"missing": str(error)})
        return
    for method, arguments in requests():
        try:
            answer({"good": getattr(knocker, method)(**arguments)})
        except Exception as error:
            traceback.print_exc()
            answer({"bad": str(error).strip().splitlines()[:1] or [type(error).__name__]})


def main() -> NoReturn:
    # Programs that are started must not write among the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(what: dict[str, Any]) -> None:
        answers.write(json.dumps(what) + "\n")
        answers.flush()

    work(sys.argv[1], answer)
    sys.exit(0)


if __name__ == "__main__":
    main()
