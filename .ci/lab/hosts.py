"""The hosts of the lab, what runs on them, and how a test waits for it.

The lab is two hosts in network namespaces, joined by a veth pair. The process that makes it enters
a new network namespace itself: that is the server's host, with the nftables.conf of this tree as
its firewall. The client's host is another one, which `with lab.client():` enters for a while;
sockets and programs that are made there stay there. As root this takes nothing else; anybody else
gets a user namespace around it. Nothing outlives the process: no namespace, no mount, no file.

    client's host                                       server's host
    10.1.0.2 and .3, fd01::2 and ::3   ---- veth ----   10.1.0.1, fd01::1
    all of 10.77.0.0/16 and fd77::/64                   routes to 10.2.0.0/24 and fd02::/64

The lab's ports answer wherever the firewall lets somebody through, and the lab's firewall
rejects what it does not accept, so that "shut" is known as soon as "open".
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import hashlib
import itertools
import json
import os
import re
import resource as limits
import select
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

# ----------------------------------------------------------------------------
# Configurations
# ----------------------------------------------------------------------------

KEYS = {user: hashlib.sha256(b"user %d" % user).digest() for user in (1, 2)}

RESOURCES = """
22 = port: 22
23 = port: 23 / tcp, udp
24 = port: 24 / udp / timeout: 60
25 = port: 25 / timeout: 3
26 = port: 26 / users: 1
27 = port: 27 / timeout: 0
58 = port: 5800
"""


def keys_text() -> str:
    return "[KEYS]\n" + "".join(f"{user} = {key.hex()}\n" for user, key in KEYS.items())


def server_conf(
    resources: str = RESOURCES,
    port: str = "5800 / tcp, udp",
    general: str = "control-error-policy = basic-auth",
    family: str = "inet",
    nftables: str = "",
) -> str:
    return f"""
[GENERAL]
port = {port}
{general}
{keys_text()}
[RESOURCES]
{resources}
[NFTABLES]
family = {family}
table = filter
chain-input = LETMEIN-INPUT
{nftables}
"""


def client_conf(port: str = "5800 / tcp, udp", timeout: float = 5, resources: str = "") -> str:
    return f"""
[GENERAL]
port = {port}
control-timeout = {timeout:g}
[CLIENT]
default-user = 1
{keys_text()}
[RESOURCES]
{resources or RESOURCES}
"""


CLIENT_CONF = client_conf()

# A firewall with a hook of each kind. Each target chain counts what comes to it.
JUMP_RULESET = """
table {family} filter {{
    counter seen-input {{ }}
    counter seen-forward {{ }}
    counter seen-output {{ }}
    chain input {{
        type filter hook input priority filter; policy drop;
        iif lo accept
        ct state established,related accept
        meta l4proto {{ icmp, icmpv6 }} accept
        jump LETMEIN-INPUT
        meta l4proto tcp reject with tcp reset
        reject
    }}
    chain forward {{ type filter hook forward priority filter; jump LETMEIN-FORWARD; }}
    chain output {{ type filter hook output priority filter; jump LETMEIN-OUTPUT; }}
    chain LETMEIN-INPUT {{ }}
    chain LETMEIN-FORWARD {{ }}
    chain LETMEIN-OUTPUT {{ }}
    chain DOOR-INPUT {{ tcp dport 8080 counter name seen-input accept; }}
    chain DOOR-FORWARD {{ udp dport 9 counter name seen-forward; }}
    chain DOOR-OUTPUT {{ udp dport 9 counter name seen-output; }}
}}
"""


# ----------------------------------------------------------------------------
# Programs, processes and time
# ----------------------------------------------------------------------------

HERE = Path(__file__).resolve().parents[2]
LETMEIN = HERE / "letmein.py"
NFT = shutil.which("nft", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") or "nft"
TICK_S = 0.01  # the kernel's timeouts count in ticks, of up to 10 ms
LIMIT_S = 60.0  # no single step of a test takes longer, on however busy a machine
SECCOMP = os.environ.get("SECCOMP", "off")  # what every server and client of a test is started with
LIBC = ctypes.CDLL(None, use_errno=True)


def call_libc(name: str, *arguments: int | bytes | None) -> None:
    if getattr(LIBC, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def run(*command: str | Path, text: str = "", check: bool = True) -> str:
    """Run a program to its end; returns what it printed."""
    done = subprocess.run(
        [str(word) for word in command],
        input=text,
        capture_output=True,
        encoding="utf-8",
        timeout=60,
    )
    if check and done.returncode != 0:
        raise AssertionError(f"{command} ended with status {done.returncode}: {done.stderr}")
    return done.stdout


def python(text: str) -> list[str]:
    return [sys.executable, "-S", "-c", text]


def sysctl(name: str, value: int) -> None:
    Path("/proc/sys", name).write_text(str(value), encoding="ascii")


def environment(*without: str) -> dict[str, str]:
    """What a program of ours is started with: all but the journal, and without these. Under a
    filter of system calls it cannot write down its coverage."""
    drop = ("JOURNAL_STREAM", *without, *(("COVERAGE_PROCESS_START",) if SECCOMP != "off" else ()))
    return {name: text for name, text in os.environ.items() if name not in drop}


def seccomp_for(words: Sequence[str | Path]) -> str:
    """What a client is started with: COMMAND cannot be had under a filter."""
    return "off" if "--" in words else SECCOMP


def unmeasured() -> dict[str, str]:
    """The environment of what is not to be slowed down by who measures its coverage."""
    return environment("COVERAGE_PROCESS_START")


def eventually(condition: Callable[[], bool], what: str) -> None:
    """Wait until something holds that nobody can tell us about."""
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def alive(process: Path) -> bool:
    """Whether a process, given as its directory in /proc, runs still."""
    try:
        return (process / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def resident_kb(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found, status
    return int(found[1])


def children_s() -> float:
    """The processor's time of all processes that this one has started and that have ended, in s."""
    used = limits.getrusage(limits.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def cpu_seconds(pid: int) -> float:
    """The processor's time of a process and of those that it started and that have ended, in s."""
    text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    ticks = text.rpartition(")")[2].split()[11:15]  # user and system, its own and its children's
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")


def things_of(pid: int) -> tuple[int, int]:
    """How many threads and descriptors a process has."""
    return len(os.listdir(f"/proc/{pid}/task")), len(os.listdir(f"/proc/{pid}/fd"))


def inodes(process: int) -> set[str]:
    """The sockets that a process has open."""
    links = []
    for path in Path(f"/proc/{process}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # it has just been closed
            links.append(os.readlink(path))
    return {link[8:-1] for link in links if link.startswith("socket:[")}


def proc_status(pid: int) -> dict[str, str]:
    """What the kernel says of a process, by name; numbers of a list are separated by a space."""
    text = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    pairs = (line.partition(":") for line in text.splitlines())
    return {name: " ".join(value.split()) for name, _, value in pairs}


def proc_limit(pid: int, name: str) -> int:
    """A limit that a process has, and can raise no more."""
    text = Path(f"/proc/{pid}/limits").read_text(encoding="utf-8")
    found = re.search(rf"(?m)^{name} +(\d+) +(\d+) ", text)
    assert found, text
    assert found[1] == found[2], found
    return int(found[1])


def memory_of(pid: int) -> bytes:
    """All that a process has in its memory and could read there."""
    found = []
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text(encoding="utf-8").splitlines():
            start, end = (int(number, 16) for number in line.split()[0].split("-"))
            if line.split()[1].startswith("r") and "[v" not in line:  # the kernel's own pages
                with contextlib.suppress(OSError):  # behind the end of a file
                    memory.seek(start)
                    found.append(memory.read(end - start))
    return b"\n".join(found)


def keys_in(data: bytes) -> list[str]:
    """Which configured keys are in there, as bytes or as hex digits."""
    found = []
    for user, key in KEYS.items():
        for form in (key, key.hex().encode(), key.hex().upper().encode(), key[:16], key[16:]):
            if form in data:
                found.append(f"{user}: {form!r}")
    return found


def on_a_terminal(
    words: list[str], env: dict[str, str], is_enough: Callable[[str], bool]
) -> str:
    """What a program prints on a terminal, until that is enough; then Ctrl-C has to end it as a
    success."""
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        words, stdin=theirs, stdout=theirs, stderr=theirs, env=env, start_new_session=True
    )
    os.close(theirs)
    text = ""
    with contextlib.suppress(OSError):  # EIO: it has ended
        while not is_enough(text):
            assert select.select([ours], [], [], LIMIT_S)[0], text
            text += os.read(ours, 4096).decode()
    process.send_signal(signal.SIGINT)
    assert process.wait(LIMIT_S) == 0, text
    os.close(ours)
    return text


def need_root(lab: Lab) -> None:
    if not lab.real_root:
        pytest.skip("only real root can become another user")


def need_seccomp() -> None:
    try:
        import pyseccomp  # type: ignore  # noqa: F401
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"seccomp cannot be had here: {error}")


# ----------------------------------------------------------------------------
# Hosts
# ----------------------------------------------------------------------------

SERVER_4, CLIENT_4, OTHER_4, BEHIND_4 = "10.1.0.1", "10.1.0.2", "10.1.0.3", "10.2.0.9"
SERVER_6, CLIENT_6, OTHER_6, BEHIND_6 = "fd01::1", "fd01::2", "fd01::3", "fd02::9"
CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWNET = 0x00020000, 0x10000000, 0x40000000
MS_BIND, MS_PRIVATE_ALL = 0x1000, 0x4000 | 0x40000
PORTS = (22, 23, 24, 25, 26, 27, 8080)  # of the server's host, TCP and UDP

# letmein.py as `make install` has it run: from its bytecode. To compile the file takes longer than
# most of what a test has it do.
LAUNCHER = f"""
import signal, sys
if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP])
sys.path.insert(0, {str(HERE)!r})
import letmein
sys.exit(letmein.main())
"""

# The network part of the lab. "server" and "client" say where a command runs. The dead addresses
# of LAB_HOSTS have neighbours that never answer: to ask for a missing one takes the kernel 3 s, and
# whoever connects meanwhile gets "No route to host" in the end, by whatever test has asked first.
LAB_LINKS = """
client ip link set lo up
client ip link add wan type veth peer name lan netns {pid}
client ip addr add 10.1.0.2/24 dev wan
client ip addr add 10.1.0.3/24 dev wan
client ip link set wan up
client ip route add local 10.77.0.0/16 dev lo
client ip route add 10.2.0.0/24 via 10.1.0.1
client ip route add prohibit 10.5.0.0/24
client ip route add unreachable 10.6.0.0/24
client ip neigh replace 10.1.0.98 lladdr 02:00:00:00:00:98 dev wan nud permanent
client ip neigh replace 10.1.0.99 lladdr 02:00:00:00:00:99 dev wan nud permanent
server ip link set lo up
server ip addr add 10.1.0.1/24 dev lan
server ip link set lan up
server ip route add 10.77.0.0/16 via 10.1.0.2
server ip route add 10.2.0.0/24 via 10.1.0.3
"""

LAB_IPV6 = """
client ip -6 addr add fd01::2/64 dev wan nodad
client ip -6 addr add fd01::3/64 dev wan nodad preferred_lft 0
client ip -6 route add local fd77::/64 dev lo
client ip -6 route add fd02::/64 via fd01::1
client ip -6 neigh replace fd01::98 lladdr 02:00:00:00:00:98 dev wan nud permanent
client ip -6 neigh replace fd01::99 lladdr 02:00:00:00:00:99 dev wan nud permanent
server ip -6 addr add fd01::1/64 dev lan nodad
server ip -6 route add fd77::/64 via fd01::2
server ip -6 route add fd02::/64 via fd01::3
"""

LAB_HOSTS = """
127.0.0.1 localhost
10.1.0.1  both.test v4dead.test.not
fd01::1   both.test
10.1.0.1  v6dead.test xn--bcher-kva.test xn--fsq.test
fd01::99  v6dead.test
10.1.0.99 v4dead.test
fd01::1   v4dead.test
10.1.0.98 dead.test
fd01::98  dead.test
10.1.0.3   several.test several.both.test
10.1.0.98  several.test several.both.test
10.1.0.130 several.test several.both.test
fd01::3    several6.test several.both.test
fd01::98   several6.test several.both.test
fd01::8000:0:0:1 several6.test several.both.test
10.1.0.1  crowd.test
""" + "".join(f"fd01::{number} crowd.test\n" for number in range(9001, 9010))

REJECT = """
add rule inet filter input meta l4proto tcp reject with tcp reset
add rule inet filter input reject
"""


def run_all(namespaces: Mapping[str, int], commands: str) -> None:
    """Run each line, behind the name of the host that it is for."""
    for line in commands.strip().splitlines():
        host, *command = line.split()
        run("nsenter", f"--net=/proc/{os.getpid()}/fd/{namespaces[host]}", "--", *command)


class Lab:
    """The two hosts. To make one moves the calling process to the server's for good, so one
    process makes one, and before it starts a thread."""

    def __init__(self) -> None:
        # Whoever runs the tests behind nohup, or in the background, has these ignored, and so would
        # all that the tests start.
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
            if signal.getsignal(number) == signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)
        uid, gid = os.getuid(), os.getgid()
        try:
            call_libc("unshare", CLONE_NEWNET | CLONE_NEWNS)
        except PermissionError:
            call_libc("unshare", CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWNS)
            Path("/proc/self/setgroups").write_text("deny", encoding="ascii")
            Path("/proc/self/uid_map").write_text(f"0 {uid} 1", encoding="ascii")
            Path("/proc/self/gid_map").write_text(f"0 {gid} 1", encoding="ascii")
        # In a user namespace root is root of one user alone.
        self.real_root = "4294967295" in Path("/proc/self/uid_map").read_text(encoding="ascii")
        self.client_ns = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        call_libc("unshare", CLONE_NEWNET)
        self.server_ns = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        self.directory = Path(tempfile.mkdtemp(prefix="letmein-test-"))
        self.directory.chmod(0o755)
        self.processes: list[subprocess.Popen[str]] = []
        self.numbers = itertools.count()
        atexit.register(self.leave)

        call_libc("mount", None, b"/", None, MS_PRIVATE_ALL, None)
        hosts = self.file(LAB_HOSTS, "hosts", 0o644)
        call_libc("mount", bytes(hosts), b"/etc/hosts", None, MS_BIND, None)
        self._run_all(LAB_LINKS)
        self._run_all(LAB_IPV6)
        with self.client():
            sysctl("net/ipv6/ip_nonlocal_bind", 1)
        # Each refused packet is to be answered, and what is not ours forwarded.
        sysctl("net/ipv4/icmp_ratelimit", 0)
        sysctl("net/ipv6/icmp/ratelimit", 0)
        sysctl("net/ipv4/ip_forward", 1)
        sysctl("net/ipv6/conf/all/forwarding", 1)
        self._serve_ports()

    def leave(self) -> None:
        """End what still runs and remove the files. The namespaces end with the process."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _run_all(self, commands: str) -> None:
        namespaces = {"client": self.client_ns, "server": self.server_ns}
        run_all(namespaces, commands.format(pid=os.getpid()))

    def client(self) -> contextlib.AbstractContextManager[None]:
        """What is started or opened inside belongs to the client's host."""
        return self.inside(self.client_ns)

    @contextlib.contextmanager
    def inside(self, namespace: int) -> Iterator[None]:
        """What is started or opened inside belongs to this host."""
        call_libc("setns", namespace, CLONE_NEWNET)
        try:
            yield
        finally:
            call_libc("setns", self.server_ns, CLONE_NEWNET)

    @contextlib.contextmanager
    def without_ipv6(self) -> Iterator[None]:
        """IPv6 is disabled in the kernel of both hosts."""

        def disable(value: int) -> None:
            for name in ("all", "default", "lo", "wan", "lan"):
                path = f"net/ipv6/conf/{name}/disable_ipv6"
                if Path("/proc/sys", path).exists():
                    sysctl(path, value)

        try:
            disable(1)
            with self.client():
                disable(1)
            yield
        finally:
            disable(0)
            with self.client():
                disable(0)
            self._run_all(LAB_IPV6)

    def _serve_ports(self) -> None:
        """Let all of PORTS answer: over TCP b"open", over UDP the same datagram."""
        selector = selectors.DefaultSelector()
        for port, kind in itertools.product(PORTS, (socket.SOCK_STREAM, socket.SOCK_DGRAM)):
            listener = socket.socket(socket.AF_INET6, kind)
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("::", port))
            listener.setblocking(False)
            if kind == socket.SOCK_STREAM:
                listener.listen(64)
            selector.register(listener, selectors.EVENT_READ, listener)

        def serve() -> None:
            while True:
                for key, _ in selector.select():
                    listener: socket.socket = key.data
                    with contextlib.suppress(OSError):
                        if listener.type == socket.SOCK_DGRAM:
                            data, peer = listener.recvfrom(100)
                            listener.sendto(data, peer)
                        else:
                            connection, _ = listener.accept()
                            with connection:
                                connection.send(b"open")

        threading.Thread(target=serve, daemon=True).start()

    # -- what tests do with it -----------------------------------------------

    def file(self, text: str, name: str = "", mode: int = 0o600) -> Path:
        """A new file with this text, which lives as long as the lab."""
        path = self.directory / (name or f"file-{next(self.numbers)}")
        path.write_text(text, encoding="utf-8")
        path.chmod(mode)
        return path

    def load(self, ruleset: str | None = None, more: str = "") -> None:
        """Replace the server's firewall, by nftables.conf and a reject if nothing is given."""
        if ruleset is None:
            ruleset = (HERE / "nftables.conf").read_text(encoding="utf-8") + REJECT
        run(NFT, "-f", "-", text=f"flush ruleset\n{ruleset}\n{more}\n")

    def ruleset(self) -> str:
        """The server's firewall as text, without what changes by itself."""
        return re.sub(r" expires \w+| packets \d+ bytes \d+", "", run(NFT, "list", "ruleset"))

    def elements(self) -> list[str]:
        """The keys of all elements in the server's sets: a lease has one for each protocol."""
        listing = json.loads(run(NFT, "-j", "list", "ruleset"))["nftables"]
        found = []
        for item in listing:
            name = item.get("set", {}).get("name", "")
            if name.startswith("letmein"):
                for wrapped in item["set"].get("elem", []):
                    found.append(f"{name} {json.dumps(wrapped['elem']['val'])}")
        return found

    def counters(self) -> dict[str, int]:
        """How many packets the named counters of the server's firewall have seen."""
        listing = json.loads(run(NFT, "-j", "list", "counters"))["nftables"]
        found = [item["counter"] for item in listing if "counter" in item]
        return {counter["name"]: int(counter["packets"]) for counter in found}

    def socket(self, protocol: str, source: str, timeout: float = 5.0) -> socket.socket:
        """A socket of the client's host, bound to one of its addresses."""
        family = socket.AF_INET6 if ":" in source else socket.AF_INET
        kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
        with self.client():
            made = socket.socket(family, kind)
        made.settimeout(timeout)
        # Over UDP a port is a conversation, so no two tests are to have the same by chance.
        made.bind((source, 10_000 + next(self.numbers) % 20_000 if protocol == "udp" else 0))
        return made

    def reaches(self, port: int, source: str, protocol: str = "tcp") -> bool:
        """Whether somebody at source gets through to the server's port."""
        with self.socket(protocol, source) as probe:
            try:
                probe.connect((server_for(source), port))
                if protocol == "udp":
                    probe.send(b"open")
                return probe.recv(100) == b"open"
            except (ConnectionError, socket.timeout):
                return False

    def protocols_to(self, port: int, source: str) -> list[str]:
        """The protocols over which somebody at source gets through to the server's port."""
        return [protocol for protocol in ("tcp", "udp") if self.reaches(port, source, protocol)]

    @functools.cached_property
    def installed(self) -> Path:
        """A program that runs letmein.py from its bytecode."""
        return self.file(LAUNCHER, "letmein", 0o755)

    @functools.cached_property
    def patient(self) -> Path:
        """letmein.py, but its client waits for the other address of a host as long as for the
        first. The real one goes on after 0.25 s, which a busy machine may take for anything."""
        text = LETMEIN.read_text(encoding="utf-8")
        patience = f"OTHER_ADDRESS_S = {LIMIT_S}"
        text, count = re.subn(r"(?m)^OTHER_ADDRESS_S = [0-9.]+", patience, text)
        assert count == 1
        return self.file(text, "patient-letmein.py", 0o755)

    def letmein(
        self, *arguments: str | Path, conf: str | None = None, script: Path | None = None
    ) -> Result:
        """Run the client on the client's host."""
        path = self.file(CLIENT_CONF if conf is None else conf)
        words = ("-c", path, "--seccomp", seccomp_for(arguments), *arguments)
        with self.client():
            return self.command(*words, program=(sys.executable, script or self.installed))

    def command(self, *arguments: str | Path, program: Sequence[str | Path] = ()) -> Result:
        """Run letmein.py, or another program, to its end."""
        words = [*(program or (sys.executable, self.installed)), *arguments]
        started = time.monotonic()
        done = subprocess.run(
            [str(word) for word in words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            timeout=LIMIT_S,
            # The tests of the command line measure the client; here it only takes time.
            env=environment() if {"server", "status"}.intersection(arguments) else unmeasured(),
        )
        took = time.monotonic() - started
        return Result(done.returncode, done.stdout, done.stderr, took)


class Result(NamedTuple):
    """How a program ended."""

    status: int
    out: str
    err: str
    took: float

    def assert_good(self) -> None:
        assert self.status == 0, self
        assert "error" not in self.err, self

    def assert_error(self, *words: str) -> None:
        """It ended with one clear error that has all these words."""
        assert self.status == 1, self
        assert self.out == "", self
        assert "Traceback" not in self.err, self
        errors = [line for line in self.err.splitlines() if line.startswith("letmein: error: ")]
        assert len(errors) == 1, self
        for word in words:
            assert word in self.err, self


def server_for(source: str) -> str:
    """The server's address, as seen from one of the client's."""
    return SERVER_6 if ":" in source else SERVER_4


class Ending:
    """When a port that is open for somebody shuts, for a test that may be slow to look: it was
    open when the last packet that got through was sent, and shut when the first one that did not
    had come back."""

    def __init__(self, lab: Lab, port: int, source: str = CLIENT_4) -> None:
        self.lab, self.port, self.source = lab, port, source
        self.open_at = float("-inf")
        self.shut_at = float("inf")

    def look(self) -> bool:
        """Whether it is open still."""
        began = time.monotonic()
        is_open = self.lab.reaches(self.port, self.source)
        if is_open:
            self.open_at = began
        else:
            self.shut_at = min(self.shut_at, time.monotonic())
        return is_open

    def wait(self) -> None:
        eventually(lambda: not self.look(), f"port {self.port} stays open")

    def assert_took(self, seconds: float, before: float, told: float, more: float = 1) -> None:
        """It shut so many seconds after what began and was done at these times, or a little
        more."""
        assert self.shut_at >= before + seconds - TICK_S, "it shuts early"
        assert self.open_at <= told + seconds + more, "it shuts late"
