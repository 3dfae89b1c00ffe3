"""The documents, the texts of the program, and hosts to follow the documents on."""

from __future__ import annotations

import ast
import collections
import contextlib
import functools
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pytest

# isort: off
import letmein
from lab.hosts import (
    CLIENT_4, CLONE_NEWNET, HERE, LETMEIN, LIMIT_S, NFT, Lab, call_libc, environment, run, run_all,
)
from lab.servers import Server, Sshd
# isort: on


# ----------------------------------------------------------------------------
# Blocks and commands of the documents
# ----------------------------------------------------------------------------


def document_block(first: str) -> str:
    """The example of the documents whose first line this is."""
    found = re.search(rf"(?ms)^```\w+\n({re.escape(first)}\n.*?)^```$", documents())
    assert found, f"no document has an example {first}"
    return found[1]


class Block(NamedTuple):
    """A fenced block. Args: language; host, where it runs when the tests follow the document, ""
    for nowhere; text."""

    language: str
    host: str
    text: str


DOCUMENTS = ("README.md", "MANUAL.md", "RECIPES.md")


@functools.lru_cache(None)
def documents() -> str:
    """The text of all of them."""
    return "\n".join((HERE / name).read_text(encoding="utf-8") for name in DOCUMENTS)


def prose(text: str) -> str:
    """What is in no fenced block."""
    return re.sub("(?ms)^```.*?^```$", "", text)


def document_section(title: str) -> str:
    """A section of a document, with those below it."""
    lines = documents().splitlines(keepends=True)
    (start,) = (at for at, line in enumerate(lines) if re.fullmatch(rf"#+ {title}\n", line))
    level = len(lines[start].split()[0])
    is_code = False
    for end in range(start + 1, len(lines)):
        is_code ^= lines[end].startswith("```")
        if not is_code and re.match(rf"#{{1,{level}}} ", lines[end]):
            return "".join(lines[start:end])
    return "".join(lines[start:])


def fenced(language: str, text: str | None = None) -> list[Block]:
    """The blocks in this language, of a section's text or of all documents."""
    text = documents() if text is None else text
    fences = re.findall(r"(?ms)^```(\w+)(?: (\w+))?\n(.*?)^```$", text)
    return [Block(*fence) for fence in fences if fence[0] == language]


# What a command may stand behind, in a shell, an ssh_config or a wg-quick file.
COMES_BEFORE = {"|", "&&", "||", ";", "do", "=", "sudo", "exec", "ProxyCommand", "root@server"}
COMES_BEFORE.add("HOST")  # xargs -I HOST


def letmein_words(text: str) -> list[list[str]]:
    """The words behind `letmein`, `letmein.py` or `letmeind`, of all such commands in a text."""
    text = text.replace("\\\n", " ").replace("%h", "host").replace("%p", "22")
    text = re.sub('exec "(.*?)"', r"exec \1 ;", text)
    commands = []
    for line in text.splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        try:
            words = [";", *lexer]
        except ValueError:  # a quotation over several lines
            continue
        for before, (at, word) in zip(words, enumerate(words[1:], 1)):
            name = os.path.basename(word) if "init.d" not in word else ""
            if name in ("letmein", "letmein.py", "letmeind") and before in COMES_BEFORE:
                rest = words[at + 1 :]
                ends = (n for n, more in enumerate(rest) if re.fullmatch("[|&;<>()]+", more))
                rest = rest[: next(ends, None)]
                commands.append([*(["server"] if name == "letmeind" else []), *rest])
    return commands


def program(*words: object) -> subprocess.CompletedProcess[str]:
    """letmein.py with these words, as a user starts it."""
    done = subprocess.run(
        [sys.executable, str(LETMEIN), *map(str, words)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert "Traceback" not in done.stderr
    return done


def failure(done: subprocess.CompletedProcess[str]) -> str:
    """The words of a run that failed as it should: one line with the error, one with a hint."""
    assert (done.returncode, done.stdout) == (1, "")
    problem, hint = done.stderr.splitlines()
    assert problem.startswith("letmein: error: ") and hint.startswith("  ") and hint.strip()
    return done.stderr


def assert_parses(words: list[str], where: str) -> None:
    """The real parser takes these words."""
    try:
        letmein.parse_words(words)
    except SystemExit as end:  # --version and --help end as a success
        assert end.code in (0, None), (where, words)


@functools.lru_cache(None)
def helps() -> dict[str, str]:
    """What --help prints, by command; "" for the whole program."""
    text = program("--help").stdout
    commands = re.findall(r"(?m)^ {2,4}([a-z-]+)(?: \(close\))? {2,}", text)
    assert len(commands) > 7
    return {"": text, **{name: program(name, "--help").stdout for name in commands}}


# Options for scripts that other programs of these names run, and that help does not name.
HIDDEN_OPTIONS = {"--dns", "--dns-crypt", "--no-systemd"}


def option_names() -> set[str]:
    """All options of all commands."""
    lines = re.findall(r"(?m)^ +-.*", "\n".join(helps().values()))
    return HIDDEN_OPTIONS.union(*(re.findall(r"(?<![\w-])--?\w[a-z0-9-]*", x) for x in lines))


# ----------------------------------------------------------------------------
# Texts of the program
# ----------------------------------------------------------------------------

LOGGERS = {"log", "self", "often", "_log", "_log_configuration"}  # whose first argument is an event


def log_events() -> set[str]:
    """The names of all events that the program may log, as its source has them."""
    events: set[str] = set()
    functions = [
        node for node in ast.walk(ast.parse(LETMEIN.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
    ]  # fmt: skip
    for function in functions:
        texts: dict[str, set[str]] = collections.defaultdict(set)  # by the variable that has them
        for node in ast.walk(function):
            if isinstance(node, ast.Assign):
                names, value = node.targets, node.value
            elif isinstance(node, ast.For):
                names, value = [node.target], node.iter
            else:
                continue
            keys = {key for n in ast.walk(value) if isinstance(n, ast.Dict) for key in n.keys}
            found = {
                n.value for n in ast.walk(value) if isinstance(n, ast.Constant) and n not in keys
            }
            for name in (n for target in names for n in ast.walk(target)):
                if isinstance(name, ast.Name):
                    texts[name.id] |= {text for text in found if isinstance(text, str)}
        for call in (node for node in ast.walk(function) if isinstance(node, ast.Call)):
            called = getattr(call.func, "attr", getattr(call.func, "id", ""))
            for node in ast.walk(call.args[0]) if call.args and called in LOGGERS else ():
                if isinstance(node, ast.Constant):
                    events.add(str(node.value))
                elif isinstance(node, ast.Name):
                    events |= texts[node.id]
    return {event for event in events if re.fullmatch(r"[a-z]+(-[a-z]+)*", event)}


# What reads like a translation, or makes a reader think twice.
TICS = re.compile(
    r"will not do|cannot be had|\bshall\b|\bstands?\b|who can|what is .*\bthere\b|so long as|"
    r"\bit is \w+ that\b"
)

# Errors that may come without a hint: what the kernel says of a table that was just there, an nft
# that lies, and what --verbose alone tells.
NO_HINT = re.compile("cannot read |nft reports success, but |given up: ")


class Said(NamedTuple):
    """A text in letmein.py that somebody may read: the function it is in, and what it is."""

    function: str
    kind: str  # "problem" and "hint" of an error, else "text"
    text: str  # with "{}" for what is put in


class Sayings(ast.NodeVisitor):
    """Collects all of them: whatever string is not a docstring, and both parts of each error, by
    way of the local names that they were given."""

    def __init__(self) -> None:
        self.function = "the module"
        self.names: dict[str, list[str]] = {}
        self.found: list[Said] = []
        self.visit(ast.parse(LETMEIN.read_text(encoding="utf-8")))

    def texts(self, node: ast.AST | None) -> list[str]:
        """What a node may come to."""
        if isinstance(node, ast.Constant):
            return [node.value] if isinstance(node.value, str) else []
        if isinstance(node, ast.JoinedStr):
            parts = [(self.texts(value) or ["{}"])[0] for value in node.values]
            return ["".join(parts)]
        if isinstance(node, ast.BinOp):
            return [(self.texts(node.left) or ["{}"])[0] + (self.texts(node.right) or ["{}"])[0]]
        if isinstance(node, ast.IfExp):
            return self.texts(node.body) + self.texts(node.orelse)
        if isinstance(node, ast.Name):
            return self.names.get(node.id, [])
        return []

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        outside = self.function, self.names
        self.function = node.name if self.function == "the module" else self.function
        assigned = [each for each in ast.walk(node) if isinstance(each, ast.Assign)]
        self.names = dict(self.names)
        for each in assigned:
            for name in each.targets:
                if isinstance(name, ast.Name):
                    self.names[name.id] = self.names.get(name.id, []) + self.texts(each.value)
        self.generic_visit(node)
        self.function, self.names = outside

    def visit_Expr(self, node: ast.Expr) -> None:
        if not isinstance(node.value, ast.Constant):  # a docstring
            self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        self.note("text", self.texts(node))

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        self.note("text", self.texts(node))
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        kind = getattr(letmein, getattr(node.func, "id", ""), None)
        is_error = isinstance(kind, type) and issubclass(kind, letmein.UserError)
        if is_error and not isinstance(node.args[0], ast.Starred):
            problems = self.texts(node.args[0])
            self.note("problem", problems)
            if node.args[1:] or not any(map(NO_HINT.search, problems)):
                self.note("hint", self.texts(node.args[1]) if node.args[1:] else [""])
        for keyword in node.keywords:
            if keyword.arg == "hint":
                self.note("hint", filter(None, self.texts(keyword.value)))
        self.generic_visit(node)

    def note(self, kind: str, texts: Iterable[str]) -> None:
        self.found += [Said(self.function, kind, text) for text in texts]


def objection(said: Said) -> str:
    """What is wrong with a text, by rules that keep them good; "" if nothing is."""
    if said.kind == "hint" and not said.text:
        return "an error without a hint"
    if found := TICS.search(said.text):
        return f"a tic: {found[0]}"
    if re.search("[a-z]+ [a-z]+", said.text):
        if not said.text.isascii():
            return "not ASCII"
        if max(map(len, said.text.splitlines())) > 120:
            return "a long line"
    if said.kind != "text" and said.text.endswith("."):
        return "a full stop at its end"
    if said.kind == "hint" and re.match("[A-Z][a-z]", said.text):
        return "a hint that begins with a capital"
    return ""


def service(lab: Lab, kind: str, *arguments: str | Path) -> str:
    """What `letmein.py service` prints."""
    result = lab.command("service", kind, *arguments, program=(sys.executable, LETMEIN))
    result.assert_good()
    return result.out


def unit_settings(unit: str) -> dict[str, list[str]]:
    """What stands in a unit, by name."""
    settings: dict[str, list[str]] = {}
    for name, value in re.findall(r"^(\w+)=(.*)$", unit, re.M):
        settings.setdefault(name, []).append(value)
    return settings


# ----------------------------------------------------------------------------
# Hosts to follow the documents on
# ----------------------------------------------------------------------------

# A host to follow a document on: its /etc, /usr and /run are copies that nobody keeps. $1 is a
# directory.
DOCUMENT_HOST = """
mount -t tmpfs none "$1"
for place in etc usr; do
    mkdir -p "$1/$place/upper" "$1/$place/work"
    options="lowerdir=/$place,upperdir=$1/$place/upper,workdir=$1/$place/work"
    mount -t overlay -o "$options" none "/$place"
done
mount -t tmpfs none /run
mkdir -m 755 /run/letmeind
echo '10.1.0.1 server' >/etc/hosts
touch /etc/nftables.conf
echo ready
exec cat
"""

# The programs there that are not the real ones. HOME is a directory.
DOCUMENT_PROGRAMS = {
    "apt-get": "",
    "sudo": 'exec "$@"',
    "python3": f'exec {sys.executable} "$@"',
    "journalctl": "cat HOME/log",
    "systemd-run": 'shift 2; echo "$@" >HOME/net',
    # What the user adds: a refusal, so that a closed port is known as soon as an open one.
    "editor": 'sed -i "s/jump LETMEIN-INPUT/&; reject/" "$1"',
    "systemctl": r"""
case "$*" in
"enable nftables" | daemon-reload) ;;
"enable --now letmeind" | "restart letmeind")
    [ ! -e HOME/pid ] || kill "$(cat HOME/pid)"
    while [ -e HOME/pid ] && kill -0 "$(cat HOME/pid)" 2>/dev/null; do sleep 0.05; done
    unit=/usr/local/lib/systemd/system/letmeind.service
    : >HOME/log
    $(sed -n "s/^ExecStart=//p" $unit) >/dev/null 2>HOME/log &
    echo $! >HOME/pid
    until grep -q event=ready HOME/log; do kill -0 $! && sleep 0.05; done ;;
"reload letmeind")
    kill -HUP "$(cat HOME/pid)"
    until grep -q event=reloaded HOME/log; do kill -0 "$(cat HOME/pid)" && sleep 0.05; done ;;
"stop reopen.timer") rm HOME/net ;;
*) echo "systemctl $*?" >&2; exit 1 ;;
esac""",
}

OPENWRT_PROGRAMS = {
    "opkg": "",
    "logread": "cat HOME/log",
    "fw4": '[ "$1" != reload ] || nft -f HOME/fw4.nft',
}

OPENWRT_FUNCTIONS = """
user_exists() { getent passwd "$1" >/dev/null; }
group_add_next() { echo 999; }
user_add() { useradd "$1"; }
"""

OPENWRT_RC = """
procd_open_instance() { :; }
procd_close_instance() { :; }
procd_set_param() { [ "$1" != command ] || { shift; command=$*; }; }
. "$1"
[ "$2" = start ] || exit 0
start_service
$command >/dev/null 2>HOME/log &
echo $! >HOME/pid
until grep -q event=ready HOME/log; do kill -0 $! && sleep 0.05; done
"""


class DocumentHost:
    """A host to follow a document on, on the caller's network. Args: programs, more of those that
    are not the real ones."""

    def __init__(self, lab: Lab, **programs: str) -> None:
        self.home = Path(tempfile.mkdtemp(dir=lab.directory))
        if not lab.real_root:
            pytest.skip("a user namespace has no other root's files")
        for name in ("disk", "programs"):
            (self.home / name).mkdir()
        for name, text in {**DOCUMENT_PROGRAMS, **programs}.items():
            text = text.replace("HOME", str(self.home))
            program = self.home / "programs" / name
            program.write_text(f"#!/bin/sh -e\n{text}\n", encoding="utf-8")
            program.chmod(0o755)
        self.process = subprocess.Popen(
            ["unshare", "--mount", "sh", "-ec", DOCUMENT_HOST, "sh", self.home / "disk"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8",
        )  # fmt: skip
        lab.processes.append(self.process)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"
        path = f"{self.home}/programs:/usr/local/sbin:/usr/local/bin:{os.environ['PATH']}:/usr/sbin"
        self.enter = [
            *("nsenter", "--mount", "--net", f"--target={self.process.pid}", "--wd=" + str(HERE)),
            *("env", "-i", f"PATH={path}", f"HOME={self.home}"),
        ]

    def run(self, script: str) -> str:
        """Run a block as its user would, in a clone; returns what it prints."""
        done = subprocess.run(
            [*self.enter, "sh", "-ec", script],
            stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", timeout=LIMIT_S,
        )  # fmt: skip
        assert done.returncode == 0, (script, done.stdout, done.stderr, self.log())
        return done.stdout

    def log(self) -> str:
        log = self.home / "log"
        return log.read_text(encoding="utf-8") if log.exists() else ""

    def close(self) -> None:
        with contextlib.suppress(AssertionError):
            self.run(f'[ ! -e {self.home}/pid ] || kill "$(cat {self.home}/pid)"')
        self.process.kill()
        self.process.wait()


class Recipe:
    """A recipe that follows the leases, run as its service runs it: again and again. Args: names,
    of its scripts, from blocks of the documents; command, what the service starts."""

    def __init__(self, lab: Lab, server: Server, *names: str, command: str = "") -> None:
        self.server = server
        self.process: subprocess.Popen[bytes] | None = None
        self.directory = Path(tempfile.mkdtemp(dir=lab.directory))
        words = (lab.installed, "-c", server.path, "status", "--rundir", server.rundir)
        letmein_words = shlex.join(str(word) for word in (sys.executable, *words))
        (pipeline,) = re.findall("(?m)^ExecStart=/bin/sh -c '(.*)'$", documents())
        pipeline = pipeline.replace("letmein-ipset", names[0])
        files = {
            "letmein": f'#!/bin/sh\nshift\nexec {letmein_words} "$@"\n',
            "service": f"while :; do setsid -w sh -c '{command or pipeline}'; sleep 0.1; done\n",
        }
        for name in names:
            # The first line of a block and its last two put the script between into its place.
            script = document_block(f"cat >/usr/local/sbin/{name} <<'EOF'").partition("\n")[2]
            script = script.partition("\nEOF\n")[0].replace("/usr/local/sbin", str(self.directory))
            files[name] = script.replace("/var/lib", f"{self.directory}/lib") + "\n"
        for name, text in files.items():
            self.file(name, text)

    def file(self, name: str, text: str) -> None:
        """A program of the recipe."""
        (self.directory / name).write_text(text, encoding="utf-8")
        (self.directory / name).chmod(0o755)

    def __enter__(self) -> Recipe:
        path = f"{self.directory}:{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
        self.process = subprocess.Popen(
            ["sh", "service"], cwd=self.directory, env={**environment(), "PATH": path}
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        self.kill()

    def parts(self) -> list[int]:
        """All processes that work for it, but for the service."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if os.readlink(path / "cwd") == str(self.directory):
                    found.append(int(path.name))
        return [pid for pid in found if self.process and pid != self.process.pid]

    def kill(self, word: str = "") -> None:
        """SIGKILL all parts of it, or those that have this in their command line."""
        for pid in self.parts():
            with contextlib.suppress(OSError):
                if word.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)


class FleetHost:
    """A machine behind the gateway, the server's host, with a firewall and an sshd of its own."""

    def __init__(self, lab: Lab, number: int, sets: str) -> None:
        self.lab = lab
        self.address = f"10.3.{number}.2"
        call_libc("unshare", CLONE_NEWNET)
        self.namespace = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        call_libc("setns", lab.server_ns, CLONE_NEWNET)
        links = f"""
            host ip link set lo up
            host ip link add uplink type veth peer name fleet{number} netns {os.getpid()}
            host ip addr add {self.address}/24 dev uplink
            host ip link set uplink up
            server ip addr add 10.3.{number}.1/24 dev fleet{number}
            server ip link set fleet{number} up
            host ip route add default via 10.3.{number}.1
            client ip route add 10.3.{number}.0/24 via 10.1.0.1
        """
        namespaces = {"host": self.namespace, "server": lab.server_ns, "client": lab.client_ns}
        run_all(namespaces, links)
        drop = "type filter hook input priority filter; policy drop; iif lo accept;"
        known = f"ct state established,related accept; ip saddr 10.3.{number}.1 accept;"
        rest = "meta l4proto tcp reject with tcp reset;"
        chain = f"chain input {{ {drop}{known}\\1 {rest} }}"
        ruleset = re.sub(r"chain input \{((?:.|\n)*?)\}", chain, sets)
        with lab.inside(self.namespace):
            run(NFT, "-f", "-", text=ruleset)
            self.listener = socket.create_server(("", 22))
            self.sshd = Sshd(lab)

    def close(self) -> None:
        self.sshd.process.kill()
        self.sshd.process.wait()
        self.listener.close()
        os.close(self.namespace)

    def reachable(self) -> bool:
        """Whether the client gets through to its port 22."""
        with self.lab.socket("tcp", CLIENT_4) as probe:
            return probe.connect_ex((self.address, 22)) == 0

    def state(self) -> set[str]:
        """What its two sets hold."""
        with self.lab.inside(self.namespace):
            listing = json.loads(run(NFT, "-j", "list", "ruleset"))["nftables"]
        found = set()
        for item in listing:
            for wrapped in item.get("set", {}).get("elem", []):
                address, protocol, port = wrapped["elem"]["val"]["concat"]
                assert wrapped["elem"]["timeout"] > 0
                found.add(f"{address} {protocol}/{port}")
        return found
