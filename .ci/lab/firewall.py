"""What the kernel has of ours, an nft that fails, and what others do to the firewall."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

# isort: off
import letmein
from lab.hosts import (
    BEHIND_4, BEHIND_6, HERE, LIMIT_S, NFT, REJECT, RESOURCES, Lab, environment, eventually, run,
    server_conf,
)
from lab.servers import Server
# isort: on


# ----------------------------------------------------------------------------
# What the kernel has
# ----------------------------------------------------------------------------

BOOT = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")[:8]

TRUTH_RESOURCES = f"""{RESOURCES}
40 = jump / input: DOOR / input-match: saddr
41 = jump / input: DOOR
"""
TRUTH_RULES = 7  # control port 2, sets of ports 2, resource 40 2, resource 41 1

DOOR = """
add chain inet filter DOOR
add rule inet filter DOOR tcp dport 8080 accept
"""

OPENS = {  # what each resource's elements open; a jump's is for an address alone
    0x22: ["tcp/22"],
    0x23: ["tcp/23", "udp/23"],
    0x24: ["udp/24"],
    0x25: ["tcp/25"],
    0x26: ["tcp/26"],
    0x40: [""],
    0x41: [""],
}


class Row(NamedTuple):
    """One element that lets somebody in, as the kernel or `status` has it."""

    address: str
    opens: str
    resource: str
    user: str


def rows(*holders: tuple[str, int, int]) -> set[Row]:
    """What should stand there for these leases: address, resource, user."""
    return {
        Row(address, opens, f"{resource:08X}", f"{user:08X}")
        for address, resource, user in holders
        for opens in OPENS[resource]
    }


class Kernel(NamedTuple):
    """What the kernel has of ours: elements and gates with the whole seconds that they have
    left (-1: for ever), and how many rules."""

    elements: dict[Row, int]
    gates: dict[str, int]
    rules: int


def kernel(family: str = "inet") -> Kernel:
    """Ask the kernel. Nothing of letmein.py has a hand in it."""
    found = Kernel({}, {}, 0)
    rules = 0
    for item in json.loads(run(NFT, "-j", "list", "table", family, "filter"))["nftables"]:
        rules += item.get("rule", {}).get("comment", "").startswith("letmein")
        name = item.get("set", {}).get("name", "")
        if not name.startswith("letmein-"):
            continue
        for wrapped in item["set"].get("elem", []):
            element = wrapped["elem"]
            left = int(element.get("expires", -1))
            if name.endswith("-gate"):
                found.gates[f"{name[8:16]} {element['val']}"] = left
                continue
            key = element["val"]["concat"] if "concat" in element["val"] else [element["val"]]
            opens = f"{key[1]}/{key[2]}" if len(key) == 3 else ""
            words = dict(w.split("=") for w in element.get("comment", "").split() if "=" in w)
            row = Row(key[0], opens, words.get("resource", "?"), words.get("user", "?"))
            if row in found.elements:
                return kernel(family)  # a set that just grew can be listed twice in part
            found.elements[row] = left
    return found._replace(rules=rules)


def status(server: Server) -> dict[Row, int]:
    """What `status --json` says, in the same form. It runs in this process: most tests ask several
    times, and a Python of its own takes ten times as long to start as to answer."""
    said = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    with contextlib.redirect_stdout(said):
        assert letmein.main(["status", "--json", "-c", str(server.path)]) == 0
    said.seek(0)
    told = {}
    for lease in json.load(said)["leases"]:
        opens = f"{lease['protocol']}/{lease['port']}" if lease["port"] else ""
        row = Row(lease["address"], opens, lease["resource"] or "?", lease["user"] or "?")
        assert row not in told
        left = lease["seconds_left"]
        told[row] = -1 if left is None else int(left)
    return told


def milliseconds_left(address: str, table: str = "inet filter") -> list[float]:
    """The seconds that each element of an address has left, to the millisecond."""
    found = []
    units = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
    text = run(NFT, "list", "table", *table.split())
    for match in re.finditer(rf"[ \t]{re.escape(address)}[ ,][^,}}]* expires (\w+)", text):
        parts = re.findall(r"(\d+)(ms|[dhms])", match[1])
        found.append(sum(int(number) * units[unit] for number, unit in parts))
    return found


def agree(
    lab: Lab, server: Server, *holders: tuple[str, int, int], family: str = "inet"
) -> None:
    """Wait until the kernel has these leases and no others; `status` has to say so, too."""
    wanted = rows(*holders)
    eventually(
        lambda: set(kernel(family).elements) == wanted,
        f"the kernel does not have what it should: {sorted(wanted)}\n{server.log}",
    )
    assert set(status(server)) == wanted


class Remaining:
    """The seconds that the leases of an address have left, by the kernel, and when it was asked:
    between `began` and `done`."""

    def __init__(self, address: str) -> None:
        self.began = time.monotonic()
        self.seconds = milliseconds_left(address)
        self.done = time.monotonic()

    def assert_runs_on_from(self, before: Remaining, more: float = 0.3, less: float = 0.3) -> None:
        """A second for each second since then, whatever was done to them: they have at most so
        much more or less."""
        lost = min(before.seconds) - max(self.seconds), min(before.seconds) - min(self.seconds)
        passed = self.began - before.done, self.done - before.began
        assert passed[0] - more <= lost[0], "they have got more time"
        assert lost[1] <= passed[1] + less, "they have lost time"


def looks_until(condition: Callable[[], bool], what: str) -> int:
    """How often one has to look until something holds. A busy machine makes each look slower, and
    what is waited for; so their number says how long it took where seconds do not. (On a machine
    that has nothing else to do, a look with kernel() comes every 20 ms.)"""
    looks = itertools.count(1)
    eventually(lambda: next(looks) > 0 and condition(), what)
    return next(looks) - 1


class Following:
    """`letmein status --follow --json`, and the rows that a reader of it believes in."""

    def __init__(self, server: Server) -> None:
        self.events: list[dict[str, Any]] = []
        self.held: dict[tuple[str, str], set[Row]] = {}
        self.news = threading.Condition()
        words = [sys.executable, server.lab.installed, "status", "--follow", "--json"]
        words += ["-c", server.path, "--rundir", server.rundir]
        self.process = subprocess.Popen(
            [str(word) for word in words],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", env=environment(),
        )  # fmt: skip
        server.lab.processes.append(self.process)
        threading.Thread(target=self._read, daemon=True).start()

    def __enter__(self) -> Following:
        self.wait_for("snapshot")
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self.news:
                event = json.loads(line)
                self.events.append(event)
                if event["event"] == "snapshot":
                    self.held.clear()
                for lease in event.get("leases", [event]):
                    opens = [f"{name}/{lease['port']}" for name in lease["protocols"]] or [""]
                    holder = (lease["address"], lease["resource"])
                    self.held[holder] = {
                        Row(lease["address"], each, lease["resource"], lease["user"])
                        for each in opens
                    }
                    if event["event"] == "closed":
                        del self.held[holder]
                self.news.notify_all()

    def wait_for(self, event: str, count: int = 1, **fields: object) -> dict[str, Any]:
        """Wait for count such events; returns the last of them."""
        wanted = {"event": event, **fields}

        def found() -> list[dict[str, Any]]:
            return [each for each in self.events if wanted.items() <= each.items()]

        with self.news:
            assert self.news.wait_for(lambda: len(found()) >= count, LIMIT_S), self.events
            return found()[count - 1]

    def assert_agrees(self, server: Server) -> None:
        """It comes to believe what `status` says."""

        def agrees() -> bool:
            with self.news:
                return set().union(*self.held.values()) == set(status(server))

        eventually(agrees, f"{self.held} is not what `status` says")


TRANSPARENT = {socket.AF_INET: (socket.SOL_IP, 19), socket.AF_INET6: (socket.IPPROTO_IPV6, 75)}


def jumps(lab: Lab, source: str) -> str:
    """The hooks whose target chain a packet from source comes to."""
    before = lab.counters()
    behind = (BEHIND_6 if ":" in source else BEHIND_4, 9)
    with lab.socket("udp", source) as sender:
        sender.sendto(b"", behind)
    # The server's own packet, with an address that need not be its own (ip(7)).
    family = socket.AF_INET6 if ":" in source else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sender:
        sender.setsockopt(*TRANSPARENT[family], 1)
        sender.bind((source, 0))
        sender.sendto(b"", behind)
    # Packets go the same way in turn: once this one is answered, those before it are counted.
    through = lab.reaches(8080, source)
    after = lab.counters()
    hooks = [
        name[5:]
        for name in ("seen-input", "seen-forward", "seen-output")
        if after[name] > before[name]
    ]
    assert through == ("input" in hooks)
    return " ".join(hooks)


# ----------------------------------------------------------------------------
# An nft that fails
# ----------------------------------------------------------------------------

# Does as the file `mode` says. Listings and checks work in all modes without "all". Each call
# leaves a line in `calls`: its process id, which is nft's as well, and its arguments.
WATCHED_NFT = r"""#!/bin/sh
echo "$$ $*" >>@HERE@/calls
mode=$(cat @HERE@/mode)
case "$mode:$*" in *all:*) ;; *:*list*|*:*-c*) exec @NFT@ "$@";; esac
case "$mode" in
    fail*) echo "Error: made to fail" >&2; echo "more of it" >&2; exit 1;;
    mute) exit 3;;
    killed) kill -9 $$;;
    noise) head -c 3000000 /dev/zero >&2; exit 1;;
    hang*) exec sleep 60;;
    slow*) sleep 2;;
    late*) @NFT@ "$@"; exec sleep 60;;
    liar) text=$(cat); echo "$text" | @NFT@ "$@"; case $text in "delete set"*) exit 1;; esac; exit;;
esac
exec @NFT@ "$@"
"""


class WatchedNft:
    """An nft that keeps account of its runs, and fails when it is told to."""

    def __init__(self, lab: Lab) -> None:
        self.directory = Path(tempfile.mkdtemp(dir=lab.directory))
        self.exe = self.directory / "nft"
        text = WATCHED_NFT.replace("@HERE@", str(self.directory)).replace("@NFT@", NFT)
        self.exe.write_text(text, encoding="utf-8")
        self.exe.chmod(0o755)
        (self.directory / "calls").touch()
        self.mode("good")

    def mode(self, mode: str) -> None:
        fresh = self.directory / "mode.new"
        fresh.write_text(mode, encoding="ascii")
        fresh.replace(self.directory / "mode")

    def processes(self) -> list[int]:
        """The process ids of all runs."""
        lines = (self.directory / "calls").read_text(encoding="ascii").splitlines()
        return [int(line.split()[0]) for line in lines]

    def runs(self) -> int:
        """How many runs there were."""
        return len(self.processes())

    def conf(self, resources: str = TRUTH_RESOURCES, nftables: str = "", **more: str) -> str:
        return server_conf(resources, nftables=f"exe = {self.exe}\n{nftables}", **more)


# ----------------------------------------------------------------------------
# What others do
# ----------------------------------------------------------------------------


def egress_rules(account: str) -> str:
    """The chain for what goes out, which is a comment in nftables.conf."""
    text = (HERE / "nftables.conf").read_text(encoding="utf-8")
    found = re.search(r"(?m)^\t# chain output \{\n(?:\t# .*\n)*?\t# \}\n(?=\t# chain)", text)
    assert found, "nftables.conf has no chain output"
    chain = found[0].replace("\t# ", "\t").replace('"letmeind"', f'"{account}"')
    return f"table inet filter {{\nchain LETMEIN-OUTPUT {{ }}\n{chain}}}\n"


def nft_do(*lines: str) -> None:
    """Change the firewall by hand, in one transaction."""
    text = "".join(f"{line}\n" for line in lines)
    run(NFT, "-f", "-", text=re.sub(r"<(\w+)>", lambda m: MEANINGS[int(m[1], 16)], text))


def our_rules() -> list[str]:
    """How to delete each of our rules."""
    listing = json.loads(run(NFT, "-j", "list", "table", "inet", "filter"))["nftables"]
    rules = [item["rule"] for item in listing if "rule" in item]
    found = [rule for rule in rules if rule.get("comment", "").startswith("letmein")]
    return [f"delete rule inet filter {r['chain']} handle {r['handle']}" for r in found]


MEANINGS: dict[int, str] = {}  # how a lease's comment ends, by resource of TRUTH_RESOURCES


def comment(resource: int = 0x22, user: int = 1, boot: str = BOOT, like: int = 0) -> str:
    """A lease's comment for nft_do(). like: the resource whose meaning it has, if another's."""
    means = f"<{like or resource:X}>"
    return f'comment "user={user:08X} resource={resource:08X} boot={boot}{means}"'


def flush_and_reload(lab: Lab) -> None:
    lab.load(more=DOOR)


def load_the_file_again(lab: Lab) -> None:
    text = (HERE / "nftables.conf").read_text(encoding="utf-8")
    nft_do(text, REJECT, DOOR)


def restore_what_was_saved(lab: Lab) -> None:
    nft_do("flush ruleset", run(NFT, "list", "ruleset"))


def delete_the_rules(lab: Lab) -> None:
    nft_do(*our_rules())


def delete_a_rule(lab: Lab) -> None:
    nft_do(our_rules()[0])


def delete_the_sets(lab: Lab) -> None:
    sets = re.findall(r"set (letmein-\S+)", run(NFT, "list", "table", "inet", "filter"))
    nft_do(*our_rules(), *(f"delete set inet filter {name}" for name in sets))


def delete_the_sets_alone(lab: Lab) -> None:
    """As delete_the_sets(), without a listing of the whole table."""
    nft_do(
        "flush chain inet filter LETMEIN-INPUT",
        *(f"delete set inet filter letmein-{name}" for name in (4, 6, "00000041-gate")),
    )


def flush_the_chain(lab: Lab) -> None:
    nft_do("flush chain inet filter LETMEIN-INPUT")


def flush_all_chains(lab: Lab) -> None:
    """As OpenWrt's fw4: everything flushed, and written anew but for what is ours."""
    text = (HERE / "nftables.conf").read_text(encoding="utf-8")
    text = text.replace("table inet filter\ndelete table inet filter\n", "")
    nft_do("flush table inet filter", text, REJECT, DOOR)
