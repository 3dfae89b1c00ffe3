"""Servers and clients of ours, and of the reference, from their start to their end."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pwd
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

# isort: off
from lab.hosts import (
    JUMP_RULESET, LAUNCHER, LETMEIN, LIMIT_S, OTHER_4, OTHER_6, SECCOMP, SERVER_4, Lab, Result,
    alive, client_conf, environment, eventually, need_seccomp, run, seccomp_for, server_conf,
    unmeasured,
)
from lab.wire import COMEIN, REVOKE, handshake
# isort: on


# ----------------------------------------------------------------------------
# A server
# ----------------------------------------------------------------------------

LOG_FIELD = re.compile(r"""([a-z-]+)=('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|\S*)""")
# The log's grammar: time, or for the journal a priority; names; words, or quoted what is no word.
LOG_LINE = re.compile(
    r"(?:\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4} |<[3-7]>)event=[a-z-]+"
    r"""(?: [a-z-]+=(?:[A-Za-z0-9_.,:/+%-]+|'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"))*"""
)


def assert_grammar(lines: Iterable[str]) -> None:
    for line in lines:
        assert line.isascii() and line.isprintable(), ascii(line)
        assert LOG_LINE.fullmatch(line), line


class Server:
    """A server on the server's host, from its start to its end.

    Args: program, what to run instead of `letmein.py server`.
    """

    def __init__(
        self,
        lab: Lab,
        conf: str,
        *arguments: str,
        account: str = "none",
        program: Sequence[str | Path] = (),
        env: dict[str, str] | None = None,
        wait: bool = True,
    ) -> None:
        self.lab = lab
        self.path = lab.file(conf)
        self.rundir = Path(tempfile.mkdtemp(dir=lab.directory))
        words: list[str | Path] = [*(program or (sys.executable, lab.installed, "server"))]
        words += ["-c", self.path, "--rundir", self.rundir, "--user", account]
        words += ["--seccomp", SECCOMP, *arguments]
        self.lines: list[str] = []
        self.news = threading.Condition()
        self.ended = False
        self.process = subprocess.Popen(
            [str(word) for word in words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            env=environment() if env is None else env,
        )
        lab.processes.append(self.process)
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()
        if wait:
            self.wait_for("ready")

    def __enter__(self) -> Server:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self.kill()
        self.stop()

    def kill(self) -> None:
        """SIGKILL for both processes. Once they are gone, nobody holds the control port: not even
        a network process that would not notice its monitor's end for a while."""
        if self.process.poll() is None:
            network = Path("/proc/none")
            with contextlib.suppress(AssertionError, OSError):
                number = self.network_process()
                network = Path(f"/proc/{number}")
                os.kill(number, signal.SIGKILL)
            self.process.kill()
            self.wait()
            eventually(lambda: not alive(network), "the network process lives on")

    def _note(self, line: str) -> None:
        with self.news:
            self.lines.append(line.rstrip("\n"))
            self.news.notify_all()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._note(line)
        with self.news:
            self.ended = True
            self.news.notify_all()

    def events(self, event: str, **fields: str) -> list[dict[str, str]]:
        """The log lines with this event and these fields, so far."""
        found = []
        for line in list(self.lines):
            parsed = {name: text.strip("'\"") for name, text in LOG_FIELD.findall(line)}
            wanted = {"event": event, **fields}
            if all(parsed.get(name) == text for name, text in wanted.items()):
                found.append(parsed)
        return found

    def wait_for(self, event: str, count: int = 1, **fields: str) -> dict[str, str]:
        """Wait until the log has count such lines; returns the last of them."""
        deadline = time.monotonic() + LIMIT_S
        with self.news:
            while len(found := self.events(event, **fields)) < count:
                left = deadline - time.monotonic()
                if self.ended or left <= 0:
                    raise AssertionError(f"no event={event} {fields} in the log:\n{self.log}")
                self.news.wait(left)
        return found[count - 1]

    @property
    def log(self) -> str:
        return "\n".join(self.lines)

    def wait(self) -> int:
        """Wait for the server's end."""
        status = self.process.wait(LIMIT_S)
        self.reader.join(LIMIT_S)
        return status

    def stop(self, number: int = signal.SIGTERM) -> None:
        """End the server, and see that it cleans up."""
        if self.process.poll() is None:
            self.process.send_signal(number)
            assert self.wait() == 0, self.log
            assert "Traceback" not in self.log, self.log
            assert self.events("stopped"), self.log
            left = self.lab.ruleset()
            assert "letmein" not in left, left
            assert "LETMEIN" not in left or re.search(r"chain LETMEIN-INPUT \{\s*\}", left), left
        self.reader.join(LIMIT_S)

    def network_process(self) -> int:
        """The pid of the process that faces the internet."""
        python = os.readlink(f"/proc/{self.process.pid}/exe")
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                parent = path.read_text(encoding="utf-8").rpartition(")")[2].split()[1]
                if int(parent) == self.process.pid and os.readlink(path.parent / "exe") == python:
                    return int(path.parent.name)
        raise AssertionError("there is no network process")


class Shared:
    """A server that tests use one after the other. One that does not leave it as it was gets the
    next test a new one, so that a failure stays alone; so does one that wants another."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.server: Server | None = None
        self.wanted: tuple[str, ...] = ()  # what it was started with

    @contextlib.contextmanager
    def lend(self, conf: str, *arguments: str) -> Iterator[Server]:
        """The server with this configuration, with nothing open."""
        if self.wanted != (conf, *arguments):
            self.stop()
            self.wanted = (conf, *arguments)
        if self.server is None:
            self.lab.load()
            self.server = Server(self.lab, conf, *arguments)
        yield self.server
        # End it if it is not as good as new, without asking for more.
        if self.server.process.poll() is not None or self.lab.elements():
            self.server.kill()
            self.server = None

    def stop(self) -> None:
        if self.server is not None:
            self.server.stop()
            self.server = None


SANDBOX_ACCOUNT = "nobody"  # every machine has it


def confined(lab: Lab, conf: str, *arguments: str, seccomp: str = "", **more: Any) -> Server:
    """A server whose network process is in the whole sandbox, as far as we may make one. Who
    measures coverage would want to open files in there."""
    if seccomp == "kill":
        need_seccomp()
    account = SANDBOX_ACCOUNT if lab.real_root else "none"
    words = ("--seccomp", seccomp) if seccomp else ()
    return Server(lab, conf, *words, *arguments, account=account, env=unmeasured(), **more)


def assert_serves(lab: Lab, server: Server, *protocols: str) -> None:
    """Nothing is open, and an honest client is served, over both protocols if none is given."""
    assert lab.elements() == [], server.log
    assert "Traceback" not in server.log, server.log
    for protocol in protocols or ("tcp", "udp"):
        assert handshake(lab, 0x22, protocol=protocol) == COMEIN
        assert len(lab.elements()) == 1
        assert handshake(lab, 0x22, REVOKE, protocol) == COMEIN
        assert lab.elements() == []


def status_socket(server: Server) -> Path:
    """Where the server answers `status`."""
    (found,) = server.rundir.glob("*.status")
    return found


def counted(server: Server) -> dict[str, Any]:
    """What `status` says of the server itself, whether it runs or not."""
    arguments = ("status", "--json", "--rundir", server.rundir, "-c", server.path)
    result = server.lab.command(*arguments)
    assert result.status == 0, result
    found: dict[str, Any] = json.loads(result.out)["server"]
    return found


def happened(server: Server, event: str) -> int:
    """How often something has happened, also if the log has summed it up."""
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(str(status_socket(server)))
        return int(json.load(peer.makefile("rb"))["counts"].get(event, 0))


def looks(server: Server) -> int:
    """How often the server has compared the kernel's table with its own."""
    return happened(server, "looks")


def quiet(server: Server) -> None:
    """Wait until the server has looked at all that has happened."""
    seen, since = looks(server), time.monotonic()
    while time.monotonic() < since + 0.3:
        time.sleep(0.05)
        if looks(server) != seen:
            seen, since = looks(server), time.monotonic()


def crash(server: Server, network: bool = False) -> None:
    """SIGKILL the monitor, with network both at once, and wait for their end."""
    number = server.network_process()
    server.process.kill()
    if network:
        os.kill(number, signal.SIGKILL)
    server.wait()
    eventually(lambda: not alive(Path(f"/proc/{number}")), "the network process lives on")


def reconfigure(server: Server, conf: str, good: bool = True) -> None:
    """Give the server another configuration file, and wait until it has read it."""
    event = "reloaded" if good else "reload-failed"
    count = len(server.events(event))
    server.path.write_text(conf, encoding="utf-8")
    server.process.send_signal(signal.SIGHUP)
    server.wait_for(event, count + 1)


# ----------------------------------------------------------------------------
# A server that is not as it should be
# ----------------------------------------------------------------------------


def adjusted(lab: Lab, statement: str) -> tuple[str | Path, ...]:
    """How to run a server whose monitor has executed this before it starts: it sets a constant."""
    text = LAUNCHER.replace("import letmein\n", f"import letmein\n{statement}\n")
    return (sys.executable, lab.file(text, mode=0o755), "server")


def altered(lab: Lab, *changes: tuple[str, str]) -> tuple[str | Path, ...]:
    """How to run a server whose program has each first text replaced by its second one."""
    text = LETMEIN.read_text(encoding="utf-8")
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path = lab.file(text, f"letmein-{next(lab.numbers)}.py", 0o755)
    return (sys.executable, path, "server")


# A server that is slow at a place of its start, and says when it is there.
SLOW_STEP = """
os.write(2, b"event=slow\\n")
time.sleep(1)
"""

SLOW_PLACES = {
    "Python itself": "\nVERSION = ",
    "the file is read": "    find_account(arguments.account)\n",
    "the network process starts": "        enter_sandbox(account,",
    "the firewall opens": "        self.is_adopting = True\n",
}


def slow_at(lab: Lab, place: str) -> tuple[str | Path, ...]:
    """How to run it."""
    old = SLOW_PLACES[place]
    indent = re.match(r"\n*( *)", old)
    assert indent
    step = textwrap.indent(SLOW_STEP, indent[1])
    if place == "the network process starts":  # it has no standard error
        step = step.replace("os.write(2,", f"open({str(lab.directory / 'slow')!r}, 'wb').write(")
    return altered(lab, (old, step + old))


def without_refresh(lab: Lab) -> Path:
    """letmein.py as on a kernel where `timeout T expires T` does not restart an element's time."""
    text = LETMEIN.read_text(encoding="utf-8")
    changed, count = re.subn(r"(?m)^(\s+self\.refreshes) = .*$", r"\1 = False", text)
    assert count == 1
    return lab.file(changed, f"letmein-{next(lab.numbers)}.py", 0o755)


# A network process that somebody has taken over: at SIGUSR1 it does what the attack says, and
# only this one does, which is the first. After it, if it still runs, it serves as before.
HOSTILE = """
# What an attack needs. From inside the sandbox nothing can be imported.
import ctypes, errno, fcntl, itertools, mmap, random, resource, select, signal, threading

LIBC = ctypes.CDLL(None, use_errno=True)
MONITOR = os.getppid()


def libc(name, *arguments):
    result = getattr(LIBC, name)(*arguments)
    if result == -1:
        raise OSError(ctypes.get_errno(), name)
    return result


class Hostile(Network):
    def __init__(self, *arguments):
        self.request = self.answer = None
        signal.signal(signal.SIGUSR1, lambda *_: self.attack())
        super().__init__(*arguments)

    def _send(self, record):
        self.request = record if record.kind == FIRST else self.request
        self.answer = record if record.kind == SECOND else self.answer
        super()._send(record)

    def say(self, kind, protocol=TCP, payload=unsigned(KNOCK, 1, 0x22), number=7, address=None):
        address = address or IPV4_MAPPED + bytes([10, 77, 7, 7])
        route = ROUTE.pack(1234, 0, bytes(20))
        self.tell(RECORD.pack(kind, protocol, number, address, route, payload))

    def tell(self, data):
        try:
            while True:
                try:
                    return os.write(self.pipe, data)
                except BlockingIOError:
                    select.select([self.link], [self.pipe], [])
                    self.hear()
        except OSError:
            raise SystemExit(0) from None  # the monitor has closed its end

    def hear(self):
        try:
            while True:
                self.link.recv(RECORD.size, socket.MSG_DONTWAIT)
        except BlockingIOError:
            pass

    def attack(self):
        @ATTACK@


Network = Hostile

"""


def with_attack(lab: Lab, attack: str) -> tuple[str | Path, ...]:
    """How to run a server with a network process that turns hostile at SIGUSR1."""
    end = '\nif __name__ == "__main__":\n    sys.exit'
    return altered(lab, (end, HOSTILE.replace("@ATTACK@", attack.strip()) + end))


def replaced(server: Server, old: int, reason: str = "") -> None:
    """Wait until the network process `old` has gone, for this reason, and is replaced."""
    lost = server.wait_for("network-process-lost")
    assert reason in lost["reason"], lost
    eventually(lambda: not alive(Path(f"/proc/{old}")), "the old network process lives on")
    for protocol, source in (("tcp", OTHER_4), ("udp", OTHER_6)):
        assert handshake(server.lab, 0x23, protocol=protocol, source=source) == COMEIN
        assert handshake(server.lab, 0x23, REVOKE, protocol, source) == COMEIN
    assert server.network_process() != old
    assert len(server.events("network-process-lost")) == 1, server.log


def assert_lives(server: Server) -> None:
    """The server does all that it is for, whatever its network process was."""
    healed = len(server.events("healed"))
    server.lab.load()
    server.wait_for("healed", healed + 1)
    reconfigure(server, server_conf())
    assert counted(server)["process"] == server.process.pid
    for protocol, source in (("tcp", OTHER_4), ("udp", OTHER_6), ("udp", OTHER_4)):
        assert handshake(server.lab, 0x23, protocol=protocol, source=source) == COMEIN
        assert server.lab.reaches(23, source)


def server_is_back(server: Server) -> bool:
    """Whether there is a network process."""
    with contextlib.suppress(AssertionError):
        return server.network_process() > 0
    return False


class Mute:
    """A server whose standard error is not ours to read, but a file, closed, or this pipe."""

    PIPE_SIZE = 1031  # fcntl.F_SETPIPE_SZ, which Python names from 3.10 on

    def __init__(self, lab: Lab, where: str, program: Sequence[str | Path] = ()) -> None:
        self.pipe = lab.directory / f"pipe-{next(lab.numbers)}"
        os.mkfifo(self.pipe)
        # Who has opened it to read and write neither waits for the other end nor misses it.
        self.end = os.open(self.pipe, os.O_RDWR | os.O_NONBLOCK)
        fcntl.fcntl(self.end, self.PIPE_SIZE, 16384)
        if where == "full pipe":
            self.fill()
        redirection = {"closed": "2>&-", "/dev/full": "2>/dev/full"}.get(where, f"2>{self.pipe}")
        shell = ("sh", "-c", f'exec "$@" {redirection}', "sh")
        words = (*shell, *(program or (sys.executable, LETMEIN, "server")))
        self.server = Server(lab, server_conf(), program=words, wait=False)

        def ready() -> bool:
            assert self.server.process.poll() is None, "it does not start"
            return "letmein" in lab.ruleset()

        eventually(ready, "it does not start")

    def __enter__(self) -> Mute:
        return self

    def __exit__(self, *_: object) -> None:
        self.server.kill()
        os.close(self.end)

    def fill(self) -> None:
        """Have the pipe take no byte more."""
        with contextlib.suppress(BlockingIOError):
            while os.write(self.end, b"-" * 80 + b"\n"):
                pass
        with contextlib.suppress(BlockingIOError):
            while os.write(self.end, b"\n"):
                pass

    def read(self) -> str:
        """What is in the pipe."""
        said = b""
        with contextlib.suppress(BlockingIOError):
            while part := os.read(self.end, 65536):
                said += part
        return said.decode("utf-8")

    def stop(self) -> None:
        self.server.process.terminate()
        assert self.server.wait() == 0
        assert "letmein" not in self.server.lab.ruleset()


# The same for anything: each word of $1 is "KIND ADDRESS PORT".
GIVE = """
import os, socket, sys
kinds = {
    "tcp": (socket.SOCK_STREAM, 6),
    "udp": (socket.SOCK_DGRAM, 17),
    "udp-lite": (socket.SOCK_DGRAM, 136),
}
given = sys.argv[1].split(",")
for number, text in enumerate(given):
    kind, address, port = (text.split() + ["", ""])[:3]
    if kind in kinds:
        family = socket.AF_INET if "." in address else socket.AF_INET6
        made = socket.socket(family, *kinds[kind])
        if family == socket.AF_INET6 and any("." in other for other in given):
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((address, int(port or 5800)))
        if kind == "tcp" and port != "5805":  # that one is left silent
            made.listen()
        os.dup2(made.detach(), 30 + number)
    elif kind == "unix":
        made = socket.socket(socket.AF_UNIX)
        made.bind("")
        if address:
            made.listen()
        os.dup2(made.detach(), 30 + number)
    elif kind == "file":
        os.dup2(os.open("/dev/null", os.O_RDWR), 30 + number)
    elif kind == "pipe":
        os.dup2(os.pipe()[0], 30 + number)
for number, text in enumerate(given):
    if text == "closed":
        os.closerange(3 + number, 4 + number)
    else:
        os.dup2(30 + number, 3 + number)
os.environ.update(LISTEN_FDS=str(len(given)), LISTEN_PID=str(os.getpid()))
os.execv(sys.argv[2], sys.argv[2:])
"""


def activated(*sockets: str, program: Sequence[str | Path] = ()) -> tuple[str | Path, ...]:
    """How to run a server that is given these."""
    program = program or (sys.executable, LETMEIN, "server")
    return (sys.executable, "-c", GIVE, ",".join(sockets), *program)


# ----------------------------------------------------------------------------
# Clients, and other programs that a test talks to
# ----------------------------------------------------------------------------

HOLD_RESOURCES = """
22 = port: 22
23 = port: 23
26 = port: 26 / users: USERS
90 = port: 9000
91 = port: 9001 / timeout: 2
"""
HOLD_CONF = client_conf(resources=HOLD_RESOURCES.replace("USERS", "1"))  # but the server:
HOLD_SERVER = server_conf(HOLD_RESOURCES.replace("USERS", "2"))
PATIENT_CONF = client_conf(timeout=5 * LIMIT_S, resources=HOLD_RESOURCES.replace("USERS", "1"))
UNMEASURED = {"COVERAGE_PROCESS_START": ""}


class Running:
    """A program on the client's host, of which a test holds standard input and output. Args:
    words, of the command line of letmein.py, or of another script, or of a whole one with
    program=().
    """

    def __init__(
        self,
        lab: Lab,
        *words: str | Path,
        conf: str = HOLD_CONF,
        script: Path = LETMEIN,
        program: Sequence[str | Path] | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        if program is None:
            program = (sys.executable, script, "-c", lab.file(conf))
            program = (*program, "--seccomp", seccomp_for(words))
        with lab.client():
            self.process = subprocess.Popen(
                [str(word) for word in (*program, *words)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={**environment(), **(env or {})},
            )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        self.started = time.monotonic()

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.end()

    def say(self, data: bytes) -> None:
        self.stdin.write(data)
        self.stdin.flush()

    def end_input(self) -> None:
        self.process.stdin = None  # first: communicate() does not expect that it is closed
        self.stdin.close()

    def hear(self, size: int) -> bytes:
        """So many bytes, or all until the end."""
        return self.stdout.read(size)

    def end(self, number: int = 0) -> Result:
        """Wait for its end, after a signal if one is given. What it said goes with it."""
        if number:
            self.process.send_signal(number)
        out, err = b"", b""
        if not self.stdout.closed:
            out, err = self.process.communicate(timeout=LIMIT_S)
        took = time.monotonic() - self.started
        return Result(self.process.returncode, out.decode(), err.decode(), took)


def patched(
    lab: Lab, code: str, *words: str, conf: str = HOLD_CONF, script: Path = LETMEIN
) -> list[str | Path]:
    """A command line that runs letmein.py as a program, in a Python that ran this code before."""
    lines = f"import runpy\n{textwrap.dedent(code)}\n" + (
        "import sys; sys.argv = sys.argv[1:]"
        "\nsys.path[0] = ''; runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    return [sys.executable, lab.file(lines), script, "-c", lab.file(conf), *words]


def assert_no_traceback(result: Result) -> None:
    """But for one from the interpreter's own start, until our first statement is done."""
    text = LETMEIN.read_text(encoding="utf-8")
    first = text[: text.index("\nimport contextlib\n")].count("\n")
    lines = re.findall(r'letmein.py", line ([0-9]+)', result.err)
    assert all(int(line) <= first for line in lines), result


def shell(redirection: str, *words: str | Path, conf: str = HOLD_CONF, lab: Lab) -> list[str]:
    """A command line by which a shell starts our client with some redirection."""
    options = ["-c", lab.file(conf), "--seccomp", seccomp_for(words)]
    program = [sys.executable, LETMEIN, *options, *words]
    return ["sh", "-c", f"{shlex.join(map(str, program))} {redirection}"]


class Heard:
    """What a service has heard on its connections; it says `greeting` first."""

    def __init__(self, greeting: bytes = b"") -> None:
        self.greeting = greeting
        self.data = b""
        self.ended = threading.Event()

    def __call__(self, connection: socket.socket) -> None:
        if self.greeting:
            connection.sendall(self.greeting)
        connection.settimeout(LIMIT_S)
        while data := connection.recv(1 << 16):
            self.data += data
        self.ended.set()


def child_of(process: subprocess.Popen[bytes]) -> int:
    """The pid of its only child."""
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    (child,) = path.read_text(encoding="ascii").split()
    return int(child)


class Sshd:
    """A real sshd on the server's host, and the way to log in to it through the firewall."""

    def __init__(self, lab: Lab) -> None:
        for name in ("sshd", "ssh", "ssh-keygen"):
            if shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin") is None:
                pytest.skip(f"{name} is not installed")
        if not lab.real_root:
            pytest.skip("sshd takes real root")
        self.lab = lab
        directory = Path(tempfile.mkdtemp(dir=lab.directory))
        for name in ("host", "user"):
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", directory / name)
        conf = directory / "sshd_config"
        conf.write_text(
            f"Port 9000\nPidFile none\nHostKey {directory}/host\nUsePAM no\nStrictModes no\n"
            f"AuthorizedKeysFile {directory}/user.pub\nPermitRootLogin yes\n",
            encoding="utf-8",
        )
        # sshd wants to find this directory; and root's shell is not to say what its files make it.
        mounts = "mount -t tmpfs none /run && mkdir /run/sshd && mount -t tmpfs none ~root"
        script = f"{mounts} && exec /usr/sbin/sshd -Def {conf}"
        self.process = subprocess.Popen(
            ["unshare", "--mount", "sh", "-c", script], stderr=subprocess.PIPE, encoding="utf-8"
        )
        lab.processes.append(self.process)
        assert self.process.stderr is not None
        while "listening" not in (line := self.process.stderr.readline()):
            assert line, "sshd does not start"
        threading.Thread(target=self.process.stderr.read, daemon=True).start()
        options = f"-F none -i {directory}/user -p 9000 -l root -o BatchMode=yes -o LogLevel=ERROR"
        self.command = [
            "ssh", *options.split(), "-o", f"UserKnownHostsFile={directory}/known",
            "-o", "StrictHostKeyChecking=accept-new",
        ]  # fmt: skip
        self.proxy = f"{sys.executable} {lab.patient} -c {lab.file(HOLD_CONF)} connect %h %p"

    def log_in(self, *words: str, host: str = SERVER_4) -> Running:
        """ssh to the server by `letmein connect`, to run this."""
        proxy = f"ProxyCommand={self.proxy}"
        return Running(self.lab, *self.command, "-o", proxy, host, *words, program=())


# ----------------------------------------------------------------------------
# The reference implementation, where it is installed
# ----------------------------------------------------------------------------


def reference(*programs: str) -> dict[str, str]:
    """Where these programs of the reference are. Skips the test if one is nowhere."""
    found = {name: shutil.which(name) for name in programs}
    for name, path in found.items():
        if path is None:
            pytest.skip(f"{name} is not in PATH")
    return {name: path for name, path in found.items() if path}


REFERENCE_ACCOUNT = "letmeind"

REFERENCE_RESOURCES = """
22 = port: 22
23 = port: 23 / tcp, udp
24 = port: 24 / udp
26 = port: 26 / users: 1
32 = jump / input: DOOR-INPUT / input-match: saddr
33 = jump / input: DOOR-INPUT
"""
REFERENCE_CLIENT = client_conf(resources=REFERENCE_RESOURCES)


class ReferenceServer:
    """letmeinfwd as root and letmeind as its account, from their start to their end."""

    def __init__(self, lab: Lab, programs: dict[str, str], conf: str) -> None:
        self.lab = lab
        self.rundir = Path(tempfile.mkdtemp(dir=lab.directory))
        self.rundir.chmod(0o755)
        (self.rundir / "letmeind").mkdir()
        shutil.chown(self.rundir / "letmeind", REFERENCE_ACCOUNT, REFERENCE_ACCOUNT)
        path = lab.file(conf, mode=0o640)
        shutil.chown(path, group=REFERENCE_ACCOUNT)
        self.output = (self.rundir / "output").open("w+", encoding="utf-8")
        self.started: list[subprocess.Popen[str]] = []
        options = ["-c", str(path), "--rundir", str(self.rundir), "--no-systemd"]
        self._start(programs["letmeinfwd"], *options)
        self._await(lambda: "5800" in lab.ruleset())
        account = ["setpriv", "--reuid", REFERENCE_ACCOUNT, "--regid", REFERENCE_ACCOUNT]
        self._start(*account, "--clear-groups", programs["letmeind"], *options)
        self._await(lambda: (self.rundir / "letmeind" / "letmeind.pid").exists())

    def _start(self, *command: str | Path) -> None:
        words = [str(word) for word in command]
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=self.output, stderr=self.output, text=True
        )
        self.lab.processes.append(process)
        self.started.append(process)

    def _await(self, condition: Callable[[], bool]) -> None:
        def ready() -> bool:
            assert all(process.poll() is None for process in self.started), self.said()
            return condition()

        eventually(ready, f"the reference does not start: {self.said()}")

    def said(self) -> str:
        self.output.flush()
        return Path(self.output.name).read_text(encoding="utf-8")

    def __enter__(self) -> ReferenceServer:
        return self

    def __exit__(self, *_: object) -> None:
        for process in reversed(self.started):
            process.terminate()
            process.wait(LIMIT_S)
        self.output.close()


@contextlib.contextmanager
def reference_client(lab: Lab) -> Iterator[Callable[..., Result]]:
    """Runs the reference's client against a server of ours."""
    program = reference("letmein")["letmein"]
    path = lab.file(REFERENCE_CLIENT)

    def call(*arguments: str) -> Result:
        with lab.client():
            return lab.command("-c", path, *arguments, program=(program,))

    lab.load(JUMP_RULESET.format(family="inet"))
    with Server(lab, server_conf(REFERENCE_RESOURCES)):
        yield call


@contextlib.contextmanager
def reference_server(lab: Lab) -> Iterator[Callable[..., Result]]:
    """Runs our client against the reference's server."""
    programs = reference("letmeinfwd", "letmeind")
    if not lab.real_root:
        pytest.skip("letmeind runs as an account of its own: that takes real root")
    if REFERENCE_ACCOUNT not in {account.pw_name for account in pwd.getpwall()}:
        pytest.skip(f"letmeind's account {REFERENCE_ACCOUNT} does not exist")

    def call(*arguments: str) -> Result:
        return lab.letmein(*arguments, conf=REFERENCE_CLIENT, script=lab.patient)

    lab.load(JUMP_RULESET.format(family="inet"))
    # Options that are ours alone, it has to ignore.
    conf = server_conf(REFERENCE_RESOURCES, general="include = /nowhere/*.conf")
    conf += "[USERS]\n1 = timeout: 1 / not-after: 2020-02-29\n"
    with ReferenceServer(lab, programs, conf):
        yield call
