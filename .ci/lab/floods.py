"""Who attacks, and who knocks meanwhile: from a third host, at a steady rate.

The attacker's host has a cable of its own to the server. Every address of two wide prefixes is
local there, and so is the client's IPv4 address, which it can thus forge. Floods and the slow path
are made by processes of their own, see run_part(), for what is measured here is the server and not
who attacks it.

    attacker's host                                            server's host
    10.3.0.2, fd03::2                        ---- veth ----    10.3.0.1, fd03::1
    10.64.0.0/16, 2001:db8:a000::/36, and 10.1.0.2, the client's

Where the path is slow, each of the two cables has a second one beside it, with routes that are
preferred, whose ends the relay's host joins: it holds each frame for a while.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import fcntl
import gc
import hmac
import itertools
import json
import os
import resource as limits
import select
import selectors
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

# isort: off
import letmein
from lab.firewall import kernel
from lab.hosts import (
    CLIENT_4, CLIENT_6, CLONE_NEWNET, HERE, KEYS, LIMIT_S, SERVER_4, Lab, call_libc, cpu_seconds,
    eventually, resident_kb, run, run_all, server_conf, server_for, sysctl, unmeasured,
)
from lab.servers import Server
from lab.wire import (
    CHALLENGE, COMEIN, KNOCK, MAGIC, RESPONSE, REVOKE, Peer, Reply, handshake, message,
)
# isort: on


FLOOD_KINDS = {  # what can be done over which protocol
    "idle": ("tcp",),  # connect, and say nothing
    "replay": ("tcp", "udp"),  # one recorded KNOCK, again and again
    "random": ("tcp", "udp"),  # 56 bytes that look like a message, the rest of them random
    "slow": ("tcp",),  # a message of one byte a second
    "reset": ("tcp",),  # connect, and reset
    "key": ("tcp", "udp"),  # all that one can do with a key of one's own
}

FLOOD_SOURCES = {
    # Half of them IPv4 addresses, half of them of different IPv6 /56.
    "many": [f"10.64.{n >> 8}.{n & 0xFF}" for n in range(1, 2049)]
    + [f"2001:db8:a{n >> 8:03x}:{n & 0xFF:02x}00::1" for n in range(2048)],
    "one": ["10.64.0.1"],
    # Over TCP a neighbour behind the client's NAT, over UDP somebody else who forges it.
    "own": [CLIENT_4],
}
FLOOD_RULES = 10  # max-nr-rules, which an attacker with a key reaches at once
FLOOD_SLOT_S = 0.002  # the pace: what is due in this time is done in one go, and no more
FLOOD_CONNECTIONS = 4096  # that an attacker holds at the same time
UDP_SOCKETS = 256  # of an attacker with one address

# Both ends of a cable have the same MAC address and ask for none: what first goes through it is
# not held up, or lost, by ARP and NDP.
ATTACKER_LINKS = """
attacker ip link set lo up
attacker ip link add wire address {mac} type veth peer name hostile address {mac} netns {pid}
attacker ip link set wire arp off
server ip link set hostile arp off
attacker ip addr add 10.3.0.2/24 dev wire
attacker ip -6 addr add fd03::2/64 dev wire nodad
attacker ip link set wire up
attacker ip route add local 10.64.0.0/16 dev lo
attacker ip route add local 10.1.0.2/32 dev lo
attacker ip route add 10.1.0.1/32 via 10.3.0.1 metric 100
attacker ip -6 route add local 2001:db8:a000::/36 dev lo
attacker ip -6 route add fd01::1/128 via fd03::1 metric 100
server ip addr add 10.3.0.1/24 dev hostile
server ip -6 addr add fd03::1/64 dev hostile nodad
server ip link set hostile up
server ip route add 10.64.0.0/16 via 10.3.0.2 metric 100
server ip -6 route add 2001:db8:a000::/36 via fd03::2 metric 100
"""

RELAY_CABLE = """
{host} ip link add {end} address {mac} type veth peer name {end} netns {relay}
server ip link add {near} address {mac} type veth peer name {near} netns {relay}
{host} ip link set {end} arp off up
server ip link set {near} arp off up
relay ip link set {end} arp off up
relay ip link set {near} arp off up
"""

RELAY_ROUTES = """
client ip route add 10.1.0.1/32 dev far src 10.1.0.2
client ip -6 route add fd01::1/128 dev far src fd01::2 metric 1
server ip route add 10.1.0.2/32 dev near
server ip -6 route add fd01::2/128 dev near metric 1
attacker ip route add 10.1.0.1/32 dev farther src 10.3.0.2
attacker ip -6 route add fd01::1/128 dev farther src fd03::2 metric 1
server ip route add 10.64.0.0/16 dev nearer
server ip -6 route add 2001:db8:a000::/36 dev nearer metric 1
"""

# What arrives at the server: connections begun, and datagrams.
FLOOD_COUNTERS = """
add table inet measure
add counter inet measure by-tcp
add counter inet measure by-udp
add chain inet measure begin { type filter hook prerouting priority raw; }
add rule inet measure begin tcp dport 5800 tcp flags & (syn | ack) == syn counter name by-tcp
add rule inet measure begin udp dport 5800 counter name by-udp
"""
RELAY_CABLES = {"far": "near", "farther": "nearer"}
SIOCETHTOOL, ETHTOOL_STXCSUM, ETH_P_ALL = 0x8946, 0x17, 3  # linux/sockios.h, ethtool.h, if_ether.h
RESET = struct.pack("ii", 1, 0)  # struct linger: close() sends RST, and leaves no TIME_WAIT


class Flood(NamedTuple):
    """What a flooding process is told: how many a second, for how long, from where. answers_s:
    how long a connection takes at the least. message: the recorded one, in hex."""

    kind: str
    protocol: str
    addresses: list[str]
    rate: float
    seconds: float
    answers_s: float
    message: str


FloodSteps = tuple[Callable[[], int], Callable[[], None]]  # one(), tend() of pace()


def pace(rate: float, seconds: float, one: Callable[[], int], tend: Callable[[], None]) -> int:
    """Do one() rate times a second, evenly, and tend() in between; returns how often it worked.
    What is late by more than some slots is left out: to catch up would be a burst."""
    started = time.monotonic()
    most = max(1, int(5 * FLOOD_SLOT_S * rate))
    tried = done = 0
    while (elapsed := time.monotonic() - started) < seconds:
        due = int(elapsed * rate) + 1
        tried = max(tried, due - most)
        for _ in range(due - tried):
            done += one()
        tried = due
        tend()
        at = started + max(elapsed + FLOOD_SLOT_S, due / rate)
        time.sleep(max(at - time.monotonic(), 0))
    return done


def family_of(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def flood_udp(plan: Flood) -> FloodSteps:
    """Datagrams, from a pool of sockets that are connected to the server."""
    pool = []
    each = 1 if len(plan.addresses) > 1 else UDP_SOCKETS
    for address in plan.addresses * each:
        peer = socket.socket(family_of(address), socket.SOCK_DGRAM)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)  # answers are not looked at
        peer.setblocking(False)
        peer.bind((address, 0))
        peer.connect((server_for(address), 5800))
        pool.append(peer)
    messages = itertools.cycle(flood_messages(plan))
    peers = itertools.cycle(pool)

    def one() -> int:
        try:
            return int(next(peers).send(next(messages)) > 0)
        except OSError:
            return 0

    return one, lambda: None


def flood_tcp(plan: Flood) -> FloodSteps:
    """Connections: each is begun, and what it has to do is done once it stands."""
    names = [
        (family_of(address), address, (server_for(address), 5800))
        for address in plan.addresses
    ]
    sources = itertools.cycle(names)
    # Ports are given out in turn: to let the kernel search for a free one takes its time.
    ports = itertools.cycle(range(2048 + os.getpid() % 1000, 65536))
    messages = itertools.cycle(flood_messages(plan))
    standing: collections.deque[socket.socket] = collections.deque()
    waiting: collections.deque[tuple[float, socket.socket, bytes]] = collections.deque()
    stream = socket.SOCK_STREAM | socket.SOCK_NONBLOCK

    def one() -> int:
        family, address, server = next(sources)
        peer = socket.socket(family, stream)
        try:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            peer.bind((address, next(ports)))
            peer.connect(server)
        except BlockingIOError:
            pass
        except OSError:
            peer.close()
            return 0
        standing.append(peer)
        if len(standing) > FLOOD_CONNECTIONS:
            standing.popleft().close()
        if plan.kind == "reset":
            waiting.append((time.monotonic() + plan.answers_s, peer, b""))
        elif plan.kind != "idle":
            speak(peer, next(messages))
        return 1

    def speak(peer: socket.socket, rest: bytes) -> None:
        """Send what is next, at once if the connection stands, and come back for what is left."""
        try:
            sent = peer.send(rest[:1] if plan.kind == "slow" else rest)
        except BlockingIOError:
            sent = 0
        except OSError:
            peer.close()
            return
        if sent < len(rest):
            # All wait for the same time, so the line is in the order of what is due.
            again = time.monotonic() + (1 if sent else plan.answers_s)
            waiting.append((again, peer, rest[sent:]))

    def tend() -> None:
        now = time.monotonic()
        while waiting and waiting[0][0] <= now:
            _, peer, rest = waiting.popleft()
            if peer.fileno() >= 0 and rest:
                speak(peer, rest)
            else:
                peer.close()

    return one, tend


KEY_REQUESTS = ((KNOCK, 0x23), (KNOCK, 0x23), (REVOKE, 0x23), (KNOCK, 0x26), (REVOKE, 0x26))

# How user 2 answers a CHALLENGE: with so many RESPONSEs of different salts, for what was asked for
# or for what is user 1's alone.
KEY_ANSWERS = ((1, None), (0, None), (1, None), (8, None), (1, 0x26))


def flood_with_key(plan: Flood) -> FloodSteps:
    """Who holds a key, and wants more: handshakes that are complete, and others that are not."""
    poll = select.epoll()
    peers: dict[int, socket.socket] = {}
    requests = itertools.cycle(KEY_REQUESTS)
    answers = itertools.cycle(KEY_ANSWERS)
    is_udp = plan.protocol == "udp"
    kind = (socket.SOCK_DGRAM if is_udp else socket.SOCK_STREAM) | socket.SOCK_NONBLOCK

    def connect(address: str) -> socket.socket:
        peer = socket.socket(family_of(address), kind)
        if not is_udp:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        peer.bind((address, 0))
        with contextlib.suppress(BlockingIOError):
            peer.connect((server_for(address), 5800))
        peers[peer.fileno()] = peer
        poll.register(peer, select.EPOLLIN if is_udp else select.EPOLLOUT)
        return peer

    def request(peer: socket.socket) -> None:
        operation, resource = next(requests)
        peer.send(message(operation, resource, 2))

    each = UDP_SOCKETS if len(plan.addresses) == 1 else 1
    pool = itertools.cycle([connect(address) for address in plan.addresses * each if is_udp])
    addresses = itertools.cycle(plan.addresses)

    def one() -> int:
        try:
            if is_udp:
                request(next(pool))
            else:
                connect(next(addresses))
        except OSError:
            return 0
        return 1

    def answer(peer: socket.socket, said: Reply) -> None:
        count, resource = next(answers)
        for _ in range(count):
            peer.send(message(RESPONSE, resource or said.resource, 2, said.auth))

    def serve(peer: socket.socket, event: int) -> bool:
        """Returns whether this connection goes on."""
        if event & select.EPOLLOUT:
            request(peer)
            poll.modify(peer, select.EPOLLIN)
            return True
        said = Reply.parse(peer.recv(57))
        if said.operation == CHALLENGE:
            answer(peer, said)
        return is_udp or said.operation == CHALLENGE

    def tend() -> None:
        for descriptor, event in poll.poll(0):
            goes_on = is_udp
            with contextlib.suppress(OSError, AssertionError):  # of Reply.parse(): it was closed
                goes_on = serve(peers[descriptor], event)
            if not goes_on:
                peers.pop(descriptor).close()

    return one, tend


def flood_messages(plan: Flood) -> list[bytes]:
    """What is sent, in turn."""
    if plan.kind != "random":
        return [bytes.fromhex(plan.message)]
    return [MAGIC + bytes((0, 0, 0, n % 6)) + os.urandom(48) for n in range(4096)]


def flood_process() -> None:
    """`flood`: standard input has the plan and then an empty line at which to
    begin; standard output gets "ready", and at last how many, and how much of a CPU it took."""
    _, most = limits.getrlimit(limits.RLIMIT_NOFILE)
    limits.setrlimit(limits.RLIMIT_NOFILE, (most, most))
    gc.disable()
    plan = Flood(**json.loads(sys.stdin.readline()))
    flood = {"udp": flood_udp, "tcp": flood_tcp}[plan.protocol]
    flood = flood_with_key if plan.kind == "key" else flood
    one, tend = flood(plan)
    print("ready", flush=True)
    sys.stdin.readline()
    used = time.process_time()
    done = pace(plan.rate, plan.seconds, one, tend)
    print(json.dumps([done, time.process_time() - used]), flush=True)


def relay_process(delay: float) -> None:
    """`relay`: pass frames on between the two ends of each cable, each of
    them this much later. Ends with its standard input."""
    sockets = {}
    for name in itertools.chain(*RELAY_CABLES.items()):
        end = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
        with contextlib.suppress(PermissionError):  # it takes root in the first user namespace
            end.setsockopt(socket.SOL_SOCKET, letmein.SO_RCVBUFFORCE, 8 << 20)
        end.bind((name, ETH_P_ALL))
        end.setblocking(False)
        sockets[name] = end
    gc.disable()
    selector = selectors.DefaultSelector()
    for far, near in RELAY_CABLES.items():
        selector.register(sockets[far], selectors.EVENT_READ, sockets[near].send)
        selector.register(sockets[near], selectors.EVENT_READ, sockets[far].send)
    selector.register(sys.stdin, selectors.EVENT_READ)
    held: collections.deque[tuple[float, Callable[[bytes], int], bytes]] = collections.deque()
    print("ready", flush=True)
    while True:
        ready = selector.select(max(held[0][0] - time.monotonic(), 0) if held else None)
        at = time.monotonic() + delay
        for key, _ in ready:
            if not isinstance(key.fileobj, socket.socket):
                return
            with contextlib.suppress(BlockingIOError):
                while True:
                    held.append((at, key.data, key.fileobj.recv(2048)))
        now = time.monotonic()
        while held and held[0][0] <= now:
            _, send, frame = held.popleft()
            with contextlib.suppress(OSError):  # a full queue: a lost frame
                send(frame)
        time.sleep(0.0005)  # so that each turn has more than one frame to see to


def start_part(*arguments: str) -> subprocess.Popen[str]:
    """Start a process of this file, see run_part(). It is told what to do line by line."""
    code = f"import sys; sys.path.insert(0, {str(HERE / '.ci')!r}); from lab import floods"
    return subprocess.Popen(
        [sys.executable, "-c", f"{code}; floods.run_part()", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
        env=unmeasured(),
    )


def run_part() -> None:
    """What a process of start_part() does."""
    if sys.argv[1] == "flood":
        flood_process()
    elif sys.argv[1] == "rush":
        rush_process()
    else:
        relay_process(float(sys.argv[2]))


def tell(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()


def hear(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().rstrip("\n")


class Attacker:
    """The third host, from its start to its end. Its processes start there, or, for what is
    to come from the client's address, at the client's."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.namespaces = {"client": lab.client_ns, "server": lab.server_ns}
        self._make_host("attacker")
        self._run_all(ATTACKER_LINKS, pid=os.getpid())
        with self.inside("attacker"):
            sysctl("net/ipv6/ip_nonlocal_bind", 1)
        for name in ("all", "hostile"):
            sysctl(f"net/ipv4/conf/{name}/rp_filter", 0)  # or no forged datagram gets through

    def close(self) -> None:
        run("ip", "link", "del", "hostile")
        os.close(self.namespaces.pop("attacker"))

    def _make_host(self, host: str) -> None:
        call_libc("unshare", CLONE_NEWNET)
        self.namespaces[host] = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        call_libc("setns", self.lab.server_ns, CLONE_NEWNET)

    def inside(self, host: str) -> contextlib.AbstractContextManager[None]:
        """What is started or opened inside belongs to this host."""
        return self.lab.inside(self.namespaces[host])

    def _run_all(self, commands: str, **fields: object) -> None:
        run_all(self.namespaces, commands.format(mac="02:00:00:00:00:01", **fields))

    def start(self, host: str, *arguments: str) -> subprocess.Popen[str]:
        """Start a process of this file there."""
        with self.inside(host):
            process = start_part(*arguments)
        self.lab.processes.append(process)
        return process

    @contextlib.contextmanager
    def slow_path(self, delay: float) -> Iterator[None]:
        """From both hosts to the server it takes this long, and as long back."""
        if not delay:
            yield
            return
        self._make_host("relay")
        with self.inside("relay"):
            sysctl("net/ipv6/conf/all/disable_ipv6", 1)  # it has nothing to say itself
            sysctl("net/ipv6/conf/default/disable_ipv6", 1)
        path = f"/proc/{os.getpid()}/fd/{self.namespaces['relay']}"
        try:
            for host, (end, near) in zip(("client", "attacker"), RELAY_CABLES.items()):
                self._run_all(RELAY_CABLE, host=host, end=end, near=near, relay=path)
                for where, name in ((host, end), ("server", near)):
                    with self.inside(where):
                        finish_checksums(name)
                sysctl(f"net/ipv4/conf/{near}/rp_filter", 0)
            self._run_all(RELAY_ROUTES)
            relay = self.start("relay", "relay", str(delay))
            assert hear(relay) == "ready"
            yield
            relay.communicate(timeout=LIMIT_S)
        finally:
            for near in RELAY_CABLES.values():
                run("ip", "link", "del", near, check=False)
            os.close(self.namespaces.pop("relay"))


def finish_checksums(name: str) -> None:
    """Have this host's packets leave with their checksums: on a cable between two hosts of one
    kernel they are left to be filled in later, which nobody does behind a relay."""
    value = ctypes.create_string_buffer(struct.pack("II", ETHTOOL_STXCSUM, 0))
    request = struct.pack("16sP16x", name.encode(), ctypes.addressof(value))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as anything:
        fcntl.ioctl(anything, SIOCETHTOOL, request)


class Outcome(NamedTuple):
    """What a flood came to. Memory and descriptors are those of both server processes, in kB
    beside what they had before; cpu: seconds of monitor, network process and flood."""

    sent: float  # a second, really
    arrived: float  # of these; TCP: may be a little more, for a lost SYN is sent again
    took: list[float]  # by those knocks that were good
    failed: list[str]  # why the others were not
    slowest: float
    memory_peak: int
    memory_after: int
    descriptors_before: int
    descriptors_after: int
    back_s: float  # how long it took until the descriptors were as before
    lost: int  # network processes
    faults: list[str]  # of the leases in the end
    cpu: tuple[float, float, float]

    @property
    def knocks(self) -> int:
        return len(self.took) + len(self.failed)

    def __str__(self) -> str:
        median = statistics.median(self.took) if self.took else float("nan")
        return (
            f"{self.sent:5.0f}/s, {self.arrived:.0f} arrived,"
            f" {len(self.took):3}/{self.knocks} good,"
            f" median {median * 1000:4.0f} ms, slowest {self.slowest * 1000:5.0f} ms, memory"
            f" +{self.memory_peak} kB, then +{self.memory_after} kB, descriptors"
            f" {self.descriptors_before} -> {self.descriptors_after} in {self.back_s:.1f} s, CPU"
            + "".join(f" {seconds:.1f}" for seconds in self.cpu)
        )


def knock_steadily(
    lab: Lab,
    protocol: str,
    sources: Sequence[str],
    seconds: float,
    meanwhile: Callable[[], None],
    then: Callable[[str], None],
) -> tuple[list[float], list[str], float]:
    """A knock every 200 ms, however long the ones before take, and then() with its source; returns
    how long the good ones took, why the others failed, and what the slowest of all took."""
    good: list[float] = []
    failed: list[str] = []
    slowest: list[float] = [0.0]

    def knock(source: str) -> None:
        began = time.monotonic()
        try:
            assert handshake(lab, protocol=protocol, source=source) == COMEIN, "GOAWAY"
            took = time.monotonic() - began
            then(source)
            good.append(took)
        except (OSError, AssertionError) as error:
            failed.append(f"{source}: {error!r}"[:200])
        slowest.append(time.monotonic() - began)

    threads = []
    started = time.monotonic()
    for number in range(round(seconds / 0.2)):
        while (wait := started + 0.1 + 0.2 * number - time.monotonic()) > 0:
            meanwhile()
            time.sleep(min(wait, 0.1))
        source = sources[number % len(sources)]
        threads.append(threading.Thread(target=knock, args=(source,), daemon=True))
        threads[-1].start()
    for thread in threads:
        thread.join()
    return good, failed, max(slowest)


def flood_case(
    attacker: Attacker,
    kind: str,
    protocol: str,
    source: str,
    rate: float,
    seconds: float,
    delay: float = 0.0,
) -> Outcome:
    """A server of its own under this flood, and knocks of the client meanwhile. delay: of the
    path, in seconds, one way."""
    lab = attacker.lab
    knock = message(KNOCK, 0x22)
    addresses = FLOOD_SOURCES[source]
    flood = Flood(kind, protocol, addresses, rate, seconds + 0.2, 2.2 * delay + 0.005, knock.hex())
    lab.load(more=FLOOD_COUNTERS)
    forget_connections()
    with contextlib.ExitStack() as stack:
        stack.enter_context(attacker.slow_path(delay))
        host = "client" if source == "own" and protocol == "tcp" else "attacker"
        process = stack.enter_context(attacker.start(host, "flood"))
        stack.callback(process.kill)
        conf = server_conf(nftables=f"max-nr-rules = {FLOOD_RULES}")
        server = stack.enter_context(Server(lab, conf, env=unmeasured()))
        sources = [CLIENT_4] if source == "own" else [CLIENT_4, CLIENT_6]
        if kind == "key" and source != "own":
            sources = [f"10.77.9.{n}" for n in range(5)] + [f"fd77::9:{n}" for n in range(5)]
        with Peer(lab, protocol) as peer:  # this is where it was recorded
            peer.send(knock)
            peer.send(message(RESPONSE, 0x22, token=peer.receive().auth))
            assert peer.receive().operation == COMEIN
        for way in ("tcp", "udp"):  # what is used for the first time takes memory once
            assert handshake(lab, protocol=way, source=CLIENT_4) == COMEIN
            assert handshake(lab, protocol=way, source=CLIENT_6) == COMEIN
        pids = (server.process.pid, server.network_process())

        def descriptors() -> int:
            return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids)

        def memory() -> int:
            return sum(resident_kb(pid) for pid in pids)

        time.sleep(0.1)  # for the knocks above to be over
        opened, before, peak = descriptors(), memory(), 0
        used = [cpu_seconds(pid) for pid in pids]
        others = lab.counters()[f"by-{protocol}"]

        def look() -> None:
            nonlocal peak
            with contextlib.suppress(OSError):  # a network process that is gone
                peak = max(peak, memory() - before)

        tell(process, json.dumps(flood._asdict()))
        assert hear(process) == "ready"
        tell(process, "")

        def go_in(source: str) -> None:
            assert lab.reaches(22, source), "the lease is lost"
            if kind == "key" and source != CLIENT_4:  # so that the next knock is for a new lease
                assert handshake(lab, 0x22, REVOKE, protocol, source) == COMEIN, "not revoked"

        took, failed, slowest = knock_steadily(lab, protocol, sources, seconds, look, go_in)
        sent, flood_cpu = json.loads(hear(process))
        process.wait(LIMIT_S)
        look()
        arrived = lab.counters()[f"by-{protocol}"] - others
        # A knock is one connection, or two datagrams.
        arrived -= (len(took) + len(failed)) * (1 if protocol == "tcp" else 2)
        ended = time.monotonic()
        after, left, back_s = 0, -1, float("nan")
        with contextlib.suppress(OSError):
            with contextlib.suppress(AssertionError):
                eventually(lambda: descriptors() <= opened, "descriptors stay open")
            back_s = time.monotonic() - ended
            left, after = descriptors(), memory() - before
            used = [cpu_seconds(pid) - was for pid, was in zip(pids, used)]
        lost = sum("network-process-lost" in line for line in server.lines)
        faults = lease_faults()
        is_blind = source == "own" and protocol == "udp"  # no answer comes to who forges a sender
        if kind == "key" and not is_blind and not server.events("granted", user=f"{2:08X}"):
            faults.append("nobody was let in with a key, so it was no attack")
    return Outcome(
        sent=sent / flood.seconds,
        arrived=arrived / flood.seconds,
        took=took,
        failed=failed,
        slowest=slowest,
        memory_peak=peak,
        memory_after=after,
        descriptors_before=opened,
        descriptors_after=left,
        back_s=back_s,
        lost=lost,
        faults=faults,
        cpu=(used[0], used[1], flood_cpu),
    )


def lease_faults() -> list[str]:
    """What is wrong with the leases after a flood: who has user 2's key may have been let in to
    port 23 and nowhere else, and there are no more rules than there may be."""
    elements = kernel().elements
    others = [row for row in elements if row.user != f"{1:08X}"]
    faults = [f"{row} is too much" for row in others if row.resource != f"{0x23:08X}"]
    faults += [f"{row} lasts too long" for row, left in elements.items() if not 0 <= left <= 600]
    if len(elements) > FLOOD_RULES - 2:
        faults.append(f"{len(elements)} rules for leases")
    return faults


def forget_connections() -> None:
    """Empty the server's table of connections: it is finite, and full after some floods."""
    # linux/netfilter/nfnetlink.h: NFNL_SUBSYS_CTNETLINK 1, IPCTNL_MSG_CT_DELETE 2; NLM_F_REQUEST 1
    request = struct.pack("=IHHIIBBH", 20, 1 << 8 | 2, 1, 0, 0, socket.AF_UNSPEC, 0, 0)
    with contextlib.suppress(OSError), socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW, letmein.NETLINK_NETFILTER
    ) as netlink:
        netlink.send(request)


class Rush(NamedTuple):
    """What came of knocks from one address after the other: in which time, how long each that
    succeeded took, and the seconds of CPU that went to who knocked, and to the server's
    processes with those that they started."""

    seconds: float
    took: list[float]
    cpu: float
    server_cpu: list[float]

    @property
    def rate(self) -> float:
        return len(self.took) / self.seconds


def knock_from(
    addresses: Sequence[str], at_once: int, operation: int, resource: int = 0x22
) -> Callable[[float], list[float]]:
    """Prepare a handshake over TCP from each of these addresses, at_once of them at a time. What it
    returns does them, in as little time as it can, and begins none after so many seconds; that
    returns how long each one took that was answered with COMEIN."""
    ids = struct.pack(">II", 1, resource)
    answer = struct.pack(">I", RESPONSE) + ids + os.urandom(8)
    waiting = [(address, message(operation, resource)) for address in reversed(addresses)]
    running: dict[int, tuple[socket.socket, float]] = {}
    answered: set[int] = set()
    took: list[float] = []
    poll = select.epoll()

    def start() -> None:
        address, knock = waiting.pop()
        began = time.monotonic()
        peer = socket.socket()
        peer.bind((address, 0))
        peer.connect((SERVER_4, 5800))  # does not wait: the server's kernel answers at once
        peer.send(knock)
        poll.register(peer, select.EPOLLIN)
        running[peer.fileno()] = (peer, began)

    def begin(limit: float) -> list[float]:
        started = time.monotonic()
        for _ in range(min(at_once, len(waiting))):
            start()
        while running and (ready := poll.poll(LIMIT_S)):
            for descriptor, _ in ready:
                peer, began = running[descriptor]
                said = peer.recv(56)
                if said[7:8] == bytes([CHALLENGE]) and descriptor not in answered:
                    answered.add(descriptor)
                    proof = hmac.digest(KEYS[1], answer + said[24:], "sha3_256")
                    peer.send(MAGIC + answer + proof)
                    continue
                now = time.monotonic()
                if said[7:8] == bytes([COMEIN]):
                    took.append(now - began)
                del running[descriptor]
                answered.discard(descriptor)
                peer.close()
                if waiting and now < started + limit:
                    start()
        return took

    return begin


def storm(
    lab: Lab, addresses: Iterable[str], at_once: int, operation: int, resource: int = 0x22
) -> int:
    """knock_from() these addresses, in this process; returns how many succeeded."""
    with lab.client():
        return len(knock_from(list(addresses), at_once, operation, resource)(LIMIT_S))


def rush_process() -> None:
    """`rush`: knock_from() in a process of its own. In: addresses, how many at a time, operation,
    limit in seconds; then a line at which to begin. Out: "ready", and then seconds, how long each
    good one took, seconds of CPU."""
    addresses, at_once, operation, limit = json.loads(sys.stdin.readline())
    begin = knock_from(addresses, at_once, operation)
    gc.disable()
    print("ready", flush=True)
    sys.stdin.readline()
    started, used = time.monotonic(), time.process_time()
    took = begin(limit)
    done = [time.monotonic() - started, took, time.process_time() - used]
    print(json.dumps(done), flush=True)


def rush(
    lab: Lab,
    pids: Sequence[int],
    addresses: Sequence[str],
    at_once: int,
    operation: int = KNOCK,
    limit: float = 60,
) -> Rush:
    """Knock from each of these addresses of the client's host. Where it is many at once, from
    two processes, for there are servers that are faster than one. pids: of the server."""
    count = min(at_once, 2)
    processes = []
    for number in range(count):
        plan = [addresses[number::count], at_once // count, operation, limit]
        with lab.client():
            process = start_part("rush")
        lab.processes.append(process)
        processes.append(process)
        tell(process, json.dumps(plan))
    for process in processes:
        assert hear(process) == "ready"
    used = [cpu_seconds(pid) for pid in pids]
    for process in processes:
        tell(process, "")
    parts = [json.loads(hear(process)) for process in processes]
    used = [cpu_seconds(pid) - was for pid, was in zip(pids, used)]
    for process in processes:
        process.communicate(timeout=LIMIT_S)
    took = [one for part in parts for one in part[1]]
    return Rush(max(part[0] for part in parts), took, sum(part[2] for part in parts), used)
