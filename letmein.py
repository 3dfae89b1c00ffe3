#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# ///
"""letmein: an authenticated port knocker, client and server in one file.

The server's firewall drops everything. A client who holds a shared key knocks, proves it by
challenge and response (HMAC-SHA3-256), and the kernel's nftables lets that one address in to that
one port, for a while.

It speaks the same protocol and reads the same files as letmein in Rust, called the reference below
(github.com/mbuesch/letmein).

The server is two processes. The monitor is privileged: it owns keys and firewall, and hears nothing
but small records. The network process faces the internet: it has no key and no rights.

The file has nine rooms, each behind a banner: protocol, configuration, client, firewall, monitor,
network, sandbox, administration, command line. A room uses only those above it. The top imports
only what a knock needs, or what is nearly free: a client spends most of its time starting Python.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":  # before all else: Ctrl-C ends us without a traceback
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # as it is in the background of a shell
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if hasattr(signal, "SIGHUP"):  # held back until we know whether we are a server
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP])

import contextlib
import errno
import functools
import itertools
import os
import re
import select
import selectors
import socket
import stat
import struct
import sys
import time
from collections import deque, namedtuple
from types import SimpleNamespace

VERSION = "1.0.0"
STARTED = time.monotonic()
PROGRAM = sys._getframe().f_code  # this module, compiled, for the network process

TYPE_CHECKING = False  # as typing.TYPE_CHECKING: importing typing takes as long as a knock
if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
    from typing import Any, BinaryIO, NamedTuple, TypeVar

    ControlSockets = dict[tuple[str, int], tuple[socket.socket, ...]]  # by protocol and port
    Handshake = Generator[bytes, bytes, None]  # of a client
    Say = Callable[[str], None]  # tells the user something
    Handles = dict[str, tuple[int, int]]  # of nftables, by set: of its table, and its own
    Item = TypeVar("Item")
    Selector = selectors.BaseSelector
    Results = dict[str, "UserError | None"]  # by address what went wrong, None for success
    Sections = Mapping[str, Mapping[str, "Entry"]]  # of a configuration file, by section and name
    NewHandshake = Callable[[], Handshake]
    ReadFiles = Callable[[str], Iterable[Sections]]  # that a value of `include` names
else:

    class _Record(type):
        """Turns an annotated class into a named tuple, as typing.NamedTuple does."""

        def __new__(cls, name, bases, body):
            fields = body.get("__annotations__", {})
            defaults = [body.pop(field) for field in fields if field in body]
            body["__slots__"] = ()
            return type(name, (namedtuple(name, fields, defaults=defaults),), body)

    NamedTuple = type.__new__(_Record, "NamedTuple", (), {})


NEVER = float("inf")  # as a time
LONGEST_WAIT_S = 3600.0  # of a selector; epoll takes no more than 2**31 ms


class UserError(Exception):
    """An error that the user can fix. Args: problem, what is wrong and where; hint, what to do."""

    def __init__(self, problem: str, hint: str = "") -> None:
        super().__init__(problem)
        self.problem = problem
        self.hint = hint


ERROR, WARNING, NOTICE, INFO, DEBUG = range(3, 8)  # priorities of the journal: sd-daemon(3)


def in_journal() -> bool:
    """Whether standard error goes to systemd's journal. The variable proves nothing by itself:
    systemd also sets it when only standard output goes there, see systemd.exec(5)."""
    stream = os.environ.get("JOURNAL_STREAM")
    if not stream:
        return False
    status = os.fstat(2)
    return stream == f"{status.st_dev}:{status.st_ino}"


def tell_at(priority: int, text: str) -> None:
    """Tell the user. The program goes on even if nobody can read it any more."""
    with contextlib.suppress(OSError):
        text = f"letmein: {text}"
        if in_journal():
            text = "\n".join(f"<{priority}>{line}" for line in text.split("\n"))
        # In one write: other threads print, too.
        print(f"{text}\n", end="", file=sys.stderr, flush=True)


def tell(text: str) -> None:
    """Tell the user what happens."""
    tell_at(INFO, text)


def warn(text: str) -> None:
    """Tell the user of something that is wrong, but does not stop the program."""
    tell_at(WARNING, f"warning: {text}")


def tell_error(error: Exception, kind: str = "error") -> None:
    """Tell the user what went wrong and, on a second line, what to do."""
    hint = getattr(error, "hint", "")
    tell_at(ERROR, f"{kind}: {error}" + (f"\n  {hint}" if hint else ""))


LINES_LIMIT = 10  # lines of the log for each of FLOODS, until the next summary
USER_LINES_LIMIT = 100  # and on what each user has got or lost
FLOODS = ("refused", "failed", "healed", "cannot-heal")  # events that others can cause at will
SUMMARY_S = 10.0
LOG_PATIENCE_S = 0.2  # for a reader of the log that has kept up so far
PRIORITIES = {  # in the journal, of events that are not INFO
    **dict.fromkeys(("cannot-heal", "network-process-lost", "reload-failed"), ERROR),
    **dict.fromkeys(("warning", "failed", "restart-wanted", "set-stays"), WARNING),
    **dict.fromkeys(("refused", "healed", "summary"), NOTICE),
    **dict.fromkeys(("nft", "kept", "ended"), DEBUG),
}


class Log:
    """The log, on standard error, and what it counts for `status`. Floods are summed up. If nobody
    reads the log, lines are dropped and counted, and the server carries on."""

    def __init__(self) -> None:
        from collections import Counter
        self.counts: Counter[str] = Counter()  # since the start: events, and COUNTED
        self.refusals: Counter[str] = Counter()  # by reason
        # Since the last summary: frequent lines by event and user, and lines left out by event.
        self.frequent: Counter[tuple[str, str]] = Counter()
        self.left_out: Counter[str] = Counter()
        self.sum_up_at = NEVER
        self.patience = LOG_PATIENCE_S
        self.is_journal = in_journal()

    def __call__(self, event: str, **fields: object) -> None:
        """Write one line, `event=... name=value ...`. Values that are not plain words are
        escaped. systemd's journal adds the time itself, and takes a priority instead."""
        self.counts[event] += 1
        if self.is_journal:
            start = f"<{PRIORITIES.get(event, INFO)}>"
        else:
            start = time.strftime("%Y-%m-%dT%H:%M:%S%z ")
        words = []
        for name, value in {"event": event, **fields}.items():
            plain = re.fullmatch(r"[A-Za-z0-9_.,:/+%-]+", str(value))
            words.append(f"{name}={value if plain else ascii(str(value))}")
        # A pipe that is ready takes PIPE_BUF bytes at once, and without blocking: pipe(7).
        line = (start + " ".join(words)).encode()[: select.PIPE_BUF - 1] + b"\n"
        written = 0
        with contextlib.suppress(OSError):
            if select.select([], [2], [], self.patience)[1]:
                written = os.write(2, line)
        self.patience = LOG_PATIENCE_S if written else 0
        if not written:
            self.counts["lines-lost"] += 1

    def often(self, event: str, **fields: str) -> None:
        """Write a line on an event that may come often, or only count it for the next summary.
        What users get and lose is limited for each of them: a busy one must not hide another."""
        is_flood = event in FLOODS
        limit = LINES_LIMIT if is_flood else USER_LINES_LIMIT
        user = "" if is_flood else fields.get("user", "")
        name = f"{event}-{fields['proto']}" if "proto" in fields else event
        self.frequent[name, user] += 1
        self.sum_up_at = min(self.sum_up_at, time.monotonic() + SUMMARY_S)
        if self.frequent[name, user] <= limit:
            self(event, **fields)
        else:
            self.counts[event] += 1
            self.left_out[name] += 1

    def summary(self) -> None:
        """Write how many events got no line since the last summary."""
        more = dict(self.left_out)
        self.frequent.clear()
        self.left_out.clear()
        self.sum_up_at = NEVER
        if more:
            self("summary", seconds=f"{SUMMARY_S:g}", **more)


def ids_of(request: Message | Lease) -> dict[str, str]:
    """User and resource, as fields of a log line."""
    return {"user": f"{request.user:08X}", "resource": f"{request.resource:08X}"}


class Backoff:
    """Pauses between attempts, each twice as long as the one before. Args: limits, in s: the first
    pause, and the longest."""

    def __init__(self, limits: tuple[float, float]) -> None:
        self.limits = limits
        self.next = limits[0]

    def reset(self) -> None:
        """Begin with the first pause again."""
        self.next = self.limits[0]

    def take(self) -> float:
        """The pause before the next attempt, in s."""
        pause = self.next
        self.next = min(2 * pause, self.limits[1])
        return pause


# ==== 1  Protocol ============================================================
# Every message, in both directions, over TCP and UDP, is 56 bytes:
#
#     offset  size  field
#          0     4  magic      3B 1B B7 19
#          4     4  operation  0 knock, 1 challenge, 2 response, 3 come in, 4 go away, 5 revoke
#          8     4  user       numbers are big-endian
#         12     4  resource
#         16     8  salt       fresh random bytes in every message
#         24    32  auth       see authenticate()
#
#     client                                     server
#       KNOCK or REVOKE, auth over 32 zero bytes  ->
#                   <-  CHALLENGE, auth = 32 random bytes: the token
#       RESPONSE, auth over the token             ->
#                                (the firewall changes)
#                   <-  COMEIN, or GOAWAY in place of any server message
#
# The two handshakes below do no input or output: they know no socket, no clock and no firewall.

MAGIC = bytes.fromhex("3B1BB719")
MESSAGE = struct.Struct("!4sIII8s32s")
MESSAGE_SIZE = MESSAGE.size  # 56 bytes
KEY_SIZE = 32  # bytes
NO_TOKEN = bytes(32)
ANYBODY = 0xFFFFFFFF  # user and resource of a GOAWAY to a peer that named none

KNOCK, CHALLENGE, RESPONSE, COMEIN, GOAWAY, REVOKE = range(6)
OPERATIONS = ("KNOCK", "CHALLENGE", "RESPONSE", "COMEIN", "GOAWAY", "REVOKE")
SERVER_OPERATIONS = (CHALLENGE, COMEIN, GOAWAY)


class ProtocolError(Exception):
    """The peer sent something that the protocol does not allow here."""


class Rejection(ProtocolError):
    """The server said GOAWAY. Args: is_challenged, whether that was after its CHALLENGE."""

    def __init__(self, is_challenged: bool) -> None:
        super().__init__("the server rejected the request")
        self.is_challenged = is_challenged


class Message(NamedTuple):
    """One message: three numbers below 2**32, the salt of 8 bytes, auth of 32 bytes."""

    operation: int
    user: int
    resource: int
    salt: bytes
    auth: bytes

    def encode(self) -> bytes:
        """The 56 bytes on the wire."""
        return MESSAGE.pack(MAGIC, *self)

    @classmethod
    def decode(cls, data: bytes) -> Message:
        """Read 56 bytes. Raises ProtocolError if length, magic or operation is wrong."""
        if len(data) != MESSAGE_SIZE or data[:4] != MAGIC:
            raise ProtocolError("it speaks another protocol")
        message = cls(*MESSAGE.unpack(data)[1:])
        if message.operation >= len(OPERATIONS):
            raise ProtocolError(f"unknown operation {message.operation}")
        return message

    def authenticate(self, key: bytes, token: bytes) -> bytes:
        """HMAC-SHA3-256 (RFC 2104, FIPS 202) over the message from operation to salt, and a token.
        A RESPONSE has that of the CHALLENGE, which makes it good once. KNOCK and REVOKE come before
        there is one: anybody can replay them, and gets no further than the CHALLENGE.

        A RESPONSE says neither which address it is for, nor whether it answers a KNOCK or a REVOKE.
        So an attacker on the path can relay it for an address of their own, or put an old KNOCK in
        place of a REVOKE, or the reverse."""
        import hmac  # here, because the network process needs none
        return hmac.digest(key, self.encode()[4:24] + token, "sha3_256")

    def proves(self, key: bytes, token: bytes) -> bool:
        """Whether auth shows that the sender holds key. Takes the same time for any auth."""
        import hmac
        return hmac.compare_digest(self.authenticate(key, token), self.auth)


def unsigned(operation: int, user: int, resource: int, auth: bytes = NO_TOKEN) -> bytes:
    """A new CHALLENGE (auth is its token), COMEIN or GOAWAY, as 56 bytes."""
    return Message(operation, user, resource, os.urandom(8), auth).encode()


def signed(operation: int, user: int, resource: int, key: bytes, token: bytes) -> bytes:
    """A new KNOCK, REVOKE or RESPONSE, as 56 bytes."""
    message = Message(operation, user, resource, os.urandom(8), NO_TOKEN)
    return message._replace(auth=message.authenticate(key, token)).encode()


def client_handshake(
    operation: int, user: int, resource: int, key: bytes, say_warning: Say, say: Say
) -> Handshake:
    """The client's side of one knock or revocation: yields each message to send, receives the
    answer through send(), and ends when the server has done what was asked. Wrong ids in an answer
    only cause a warning: they are not authenticated, and a wrong token leads nowhere. Raises
    ProtocolError on any other answer. Args: operation, KNOCK or REVOKE; say, told of each step."""
    token = NO_TOKEN
    for request, expected in ((operation, CHALLENGE), (RESPONSE, COMEIN)):
        say(f"sending {OPERATIONS[request]} for resource {resource:08X}")
        data = yield signed(request, user, resource, key, token)
        answer = Message.decode(data)
        name = OPERATIONS[answer.operation]
        say(f"received {name}")
        if answer.operation == GOAWAY:
            raise Rejection(is_challenged=request == RESPONSE)
        if answer.operation != expected:
            raise ProtocolError(f"{name} instead of {OPERATIONS[expected]}")
        if (answer.user, answer.resource) != (user, resource):
            ids = f"user {answer.user:08X}, resource {answer.resource:08X}"
            say_warning(f"the server answered for {ids}, which is not what was asked for")
        token = answer.auth


# What a peer has proved so far: nothing, the key in its KNOCK (a replay has it, too), or the key in
# its RESPONSE. An error policy names the least of these for which the server answers errors.
NO_AUTH, BASIC_AUTH, FULL_AUTH = range(3)
POLICIES = {"always": NO_AUTH, "basic-auth": BASIC_AUTH, "full-auth": FULL_AUTH}


class Challenge(NamedTuple):
    """A token that may have been given to a peer, and what became of it."""

    operation: int  # KNOCK or REVOKE
    token: bytes
    window: int  # the window of time it was given in; see Tokens
    base: bytes  # what Tokens has derived it from
    outcome: int | None = None  # COMEIN or GOAWAY, if its RESPONSE was answered before


class Verdict(NamedTuple):
    """What to do about a message."""

    reply: bytes  # b"" for none
    reason: str = ""  # why it was refused
    challenge: Challenge | None = None  # the challenge that this RESPONSE answers rightly


# An unknown user's knock is checked against this, to take as long as one with a wrong key.
NOBODYS_KEY = os.urandom(KEY_SIZE)


class ServerHandshake(NamedTuple):
    """The server's side: judges each message on its own and stores nothing about its peer, so a
    flood cannot fill memory."""

    policy: int  # what a peer must have proved for its errors to be answered
    key_of: Callable[[int], bytes | None]  # of a user
    why_not: Callable[[int, int], str]  # why a user may not have a resource, or ""

    def on_request(self, message: Message, new_token: Callable[[int], bytes]) -> Verdict:
        """Judge a peer's first message. Args: new_token, gives the token for an operation."""
        if message.operation not in (KNOCK, REVOKE):
            unnamed = message._replace(user=ANYBODY, resource=ANYBODY)
            return self._refuse(unnamed, NO_AUTH, f"unexpected {OPERATIONS[message.operation]}")
        user, resource = message.user, message.resource
        key = self.key_of(user)
        if not message.proves(key or NOBODYS_KEY, NO_TOKEN) or key is None:
            return self._refuse(message, NO_AUTH, "wrong key" if key else "unknown user")
        if reason := self.why_not(user, resource):
            return self._refuse(message, BASIC_AUTH, reason)
        return Verdict(unsigned(CHALLENGE, user, resource, new_token(message.operation)))

    def on_response(
        self, message: Message, proved: int, challenges: Iterable[Challenge]
    ) -> Verdict:
        """Judge what should be a RESPONSE. Args: proved, what this peer has proved before;
        challenges, all that it may have got for this user and resource."""
        if message.operation != RESPONSE:
            return self._refuse(message, proved, f"unexpected {OPERATIONS[message.operation]}")
        # Key and rights are looked up again: the configuration may have changed.
        key = self.key_of(message.user)
        for_proof = key or NOBODYS_KEY
        right = (each for each in challenges if message.proves(for_proof, each.token))
        challenge = next(right, None)
        if challenge is None or key is None:
            return self._refuse(message, proved, "wrong RESPONSE")
        if reason := self.why_not(message.user, message.resource):
            return self._refuse(message, FULL_AUTH, reason)
        return Verdict(b"", challenge=challenge)

    def _refuse(self, message: Message, proved: int, reason: str) -> Verdict:
        """Refuse a message: with a GOAWAY if the peer has proved enough for one. A message
        that only servers send is never answered: or two servers could be made to answer each other
        for ever (as in CVE-2024-2169)."""
        if proved < self.policy or message.operation in SERVER_OPERATIONS:
            return Verdict(b"", reason)
        return Verdict(unsigned(GOAWAY, message.user, message.resource), reason)


TOKEN_WINDOW_S = 5.0
TOKEN_LIMIT_S = 60.0  # the longest patience with a peer, whatever control-timeout is
SPENT_LIMIT = 1 << 17  # tokens remembered as spent; some 200 bytes each


class Spent(NamedTuple):
    """How many tokens of one base are spent."""

    number: int
    outcome: int  # how the latest RESPONSE was answered: COMEIN or GOAWAY


UNSPENT = Spent(0, GOAWAY)


class Tokens:
    """Challenge tokens that the server need not remember. A token is an HMAC, keyed with a secret
    of this run, over all that it is for: a window of time, KNOCK or REVOKE, and facts (the peer,
    and what is configured for it). The server computes it anew from the same facts: the same KNOCK
    gets the same CHALLENGE, and a RESPONSE is checked against all tokens that its peer may have.

    A token is good for one change of the firewall, so the server remembers which were spent. The
    next request for the same facts gets another token, and a RESPONSE that comes twice gets its
    answer again. Memory is bounded: above SPENT_LIMIT the oldest window is given up, and its
    tokens with it. Nobody who answers within the two newest windows loses a knock.

    Args: secret, 32 bytes. Times are in seconds, by any clock that does not go back."""

    def __init__(self, secret: bytes) -> None:
        self.secret = secret
        self.spent: dict[int, dict[bytes, Spent]] = {}  # by window and base
        self.oldest = 0  # the first window of which tokens are still good

    def new(self, facts: bytes, operation: int, now: float) -> bytes:
        """The token to challenge a KNOCK or REVOKE with: 32 bytes."""
        window = int(now / TOKEN_WINDOW_S)
        base = self._base(facts, operation, window)
        return self._token(base, self._spent(window, base).number)

    def challenges(self, facts: bytes, now: float, patience: float) -> Iterator[Challenge]:
        """All challenges that may have been given for these facts, newest first. A token lives
        for patience, in s, and up to two windows more."""
        newest = int(now / TOKEN_WINDOW_S)
        self._forget(newest, newest - 1 - int(min(patience, TOKEN_LIMIT_S) / TOKEN_WINDOW_S))
        for window in range(newest, self.oldest - 1, -1):
            for operation in (KNOCK, REVOKE):
                base = self._base(facts, operation, window)
                count, outcome = self._spent(window, base)
                yield Challenge(operation, self._token(base, count), window, base)
                if count:  # the answer to the last one that was spent may be asked for again
                    latest = self._token(base, count - 1)
                    yield Challenge(operation, latest, window, base, outcome)

    def note_outcome(self, challenge: Challenge, outcome: int) -> None:
        """Note that a token is spent, and its RESPONSE answered with COMEIN or GOAWAY."""
        window, base = challenge.window, challenge.base
        count = self._spent(window, base).number + 1
        self.spent.setdefault(window, {})[base] = Spent(count, outcome)

    def _base(self, facts: bytes, operation: int, window: int) -> bytes:
        """The first token for these facts in this window; later ones are derived from it."""
        import hmac
        return hmac.digest(self.secret, struct.pack("!QI", window, operation) + facts, "sha3_256")

    def _spent(self, window: int, base: bytes) -> Spent:
        return self.spent.get(window, {}).get(base, UNSPENT)

    def _token(self, base: bytes, count: int) -> bytes:
        """The token that follows so many that are spent."""
        import hmac
        if not count:
            return base
        return hmac.digest(self.secret, base + struct.pack("!Q", count), "sha3_256")

    def _forget(self, newest: int, oldest: int) -> None:
        """Give up the windows before oldest, and more of them while too much is remembered."""
        self.oldest = max(self.oldest, oldest)
        remembered = sum(map(len, self.spent.values()))
        for window in sorted(self.spent):
            is_too_much = remembered > SPENT_LIMIT and window < newest - 1
            if window < self.oldest or is_too_much:
                remembered -= len(self.spent.pop(window))
                self.oldest = max(self.oldest, window + 1)


# ==== 2  Configuration =======================================================
# letmeind.conf (server) and letmein.conf (client): text in, a frozen Config out, or a ConfigError
# that names file, line, option and what was expected. No message shows the text of a key.
#
# On the way down: what a Config holds; a parser of each kind of value, which raises Unfit; OPTIONS,
# the table of sections and options; the file as sections of entries; parse_config() for its text,
# read_config() for its path.

CONFIG_SIZE_LIMIT = 4 << 20  # bytes; of all included files together, too
INCLUDE_LIMIT = 1000  # files
CONFIG_PLACES = ("/opt/letmein/etc", "/etc")  # the client looks into XDG_CONFIG_HOME first
HOOKS = ("input", "forward", "output")
YES, NO = ("true", "1", "yes", "on"), ("false", "0", "no", "off")
SECCOMP = ("off", "log", "kill")
CONTROL_PORT = 5800
KEY_DIGITS = 2 * KEY_SIZE
MAX_NR_RULES_LIMIT = 1_000_000
NO_USER = -1  # nobody has this id, so nothing limits it
UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}
IPTABLES_TABLES = ("filter", "nat", "mangle", "raw", "security")


class ConfigError(UserError):
    """The configuration cannot be used."""

    warnings: tuple[str, ...] = ()  # which may tell why


class Unfit(UserError):
    """A value is not what it should be. Args: what is wrong, what was expected."""


class Jump(NamedTuple):
    """A rule that a knock adds: from our chain at a hook to another chain."""

    hook: str
    target: str
    match_saddr: bool  # for the client's address alone


class Resource(NamedTuple):
    """Something to knock for: a port, or some jumps."""

    identifier: int
    port: int  # 0 for jumps
    protocols: tuple[str, ...]  # "tcp", "udp"
    jumps: tuple[Jump, ...]
    timeout: float  # in seconds
    users: frozenset[int]  # who may knock for it; empty for everybody

    @property
    def weight(self) -> int:
        """How much one lease counts against max-nr-rules."""
        return len(self.protocols) + len(self.jumps)

    @property
    def meaning(self) -> str:
        """8 hex digits that change with port, protocols and jumps; no secret."""
        return checksum((self.port, self.protocols, tuple(map(tuple, self.jumps))))

    @property
    def is_gate(self) -> bool:
        """Whether one holder's lease opens something for everybody."""
        return any(not jump.match_saddr for jump in self.jumps)


class UserLimits(NamedTuple):
    """What [USERS] says of a user."""

    timeout: float = NEVER  # the longest lease, in s
    ends: float = NEVER  # when the last day of their key is over, by time.time()

    @property
    def last_day(self) -> str:
        """As it is written in the file; "" if there is none."""
        import datetime  # time.gmtime() may know no day after 2038
        if self.ends == NEVER:
            return ""
        first = datetime.date(1970, 1, 1)
        return str(first + datetime.timedelta(days=self.ends // UNITS_S["d"] - 1))


class Config(NamedTuple):
    """A configuration file, read and checked, with what it includes. Times are in seconds."""

    path: str
    warnings: tuple[str, ...]
    port: int  # the control port
    protocols: tuple[str, ...]
    keys: Mapping[int, bytes]
    resources: Mapping[int, Resource]
    chains: Mapping[str, str]  # by hook; chains that are not named are absent
    debug: bool = False
    control_timeout: float = 5.0
    error_policy: int = NO_AUTH
    seccomp: str = "off"
    default_user: int = 0
    nft: str = "nft"
    family: str = ""
    table: str = ""
    timeout: float = 600.0  # of resources that have none of their own
    max_nr_rules: int = 100
    include: str = ""  # of the server's file: a path, or a pattern as of glob(7)
    limits: Mapping[int, UserLimits] = {}  # by user, of those who have some

    @property
    def control(self) -> str:
        """The control port, such as 5800/tcp or 5800/tcp+udp."""
        return f"{self.port}/{'+'.join(self.protocols)}"

    @property
    def table_name(self) -> str:
        """The table with its family, as nft(8) has it."""
        return f"{self.family} {self.table}"

    def fixed_options(self) -> dict[str, object]:
        """What a running server cannot change, by the option's name in the file."""
        chains = {f"chain-{hook}": self.chains.get(hook) for hook in HOOKS}
        nftables = {"exe": self.nft, "family": self.family, "table": self.table, **chains}
        return {**nftables, "seccomp": self.seccomp}

    def why_not(self, user: int, resource: int) -> str:
        """Why this user may not have this resource; "" if they may."""
        found = self.resources.get(resource)
        if found is None:
            return "unknown resource"
        if found.users and user not in found.users:
            return "resource not allowed for this user"
        if time.time() >= self.limits_of(user).ends:
            return f"the user's last day was {self.limits_of(user).last_day}"
        if found.port == self.port:
            return f"port {found.port} is the control port"
        for jump in found.jumps:
            if jump.hook not in self.chains:
                return f"chain-{jump.hook} is not set in [NFTABLES]"
        return ""

    def limits_of(self, user: int) -> UserLimits:
        """What limits a user, whatever they knock for."""
        return self.limits.get(user, UserLimits())

    def timeout_of(self, user: int, resource: Resource) -> float:
        """For how long a knock of this user opens a resource on any day but their last, in s."""
        return min(resource.timeout, self.limits_of(user).timeout)

    def longest_lease(self, user: int, resource: Resource) -> float:
        """For how long a knock of this user opens a resource if it comes now, in s."""
        until_last_day = max(self.limits_of(user).ends - time.time(), 0.0)
        return min(self.timeout_of(user, resource), until_last_day)


@functools.lru_cache(1000)
def checksum(facts: tuple[object, ...]) -> str:
    """8 hex digits that change with these facts; no secret."""
    import binascii
    return f"{binascii.crc32(repr(facts).encode()):08x}"


def shown(text: str) -> str:
    """Text from a file or a peer, fit to be printed: short, escaped, nothing like a key. A key may
    be written with separators or 0x in it, and with mistakes: so 12 hex digits among 16 letters and
    digits are too many."""
    start = text[:80]
    letters = re.sub("[xX]|[^0-9A-Za-z]", "", start)
    windows = (letters[at : at + 16] for at in range(len(letters) - 15))
    if any(len(re.findall("[0-9A-Fa-f]", each)) >= 12 for each in windows):
        return "'...'"
    return ascii(start if text == start else start + "...")


def matched(text: str, pattern: str, expected: str) -> str:
    """The text without white space around it. Raises Unfit unless it has this pattern."""
    if not re.fullmatch(pattern, text.strip()):
        raise Unfit(f"{shown(text.strip())} is not valid", expected)
    return text.strip()


def parse_number(text: str, least: int = 0, limit: int = 0xFFFFFFFF) -> int:
    """ASCII digits, or hex digits behind 0x, from least to limit."""
    expected = f"a number from {least} to {limit}"
    digits = matched(text, r"\+?0*[0-9]{1,10}|0x\+?0*[0-9A-Fa-f]{1,8}", expected)
    is_hex = digits.startswith("0x")
    # int() takes no more than 4,300 digits, even if they are zeros.
    number = int(digits[2:], 16) if is_hex else int(digits.lstrip("+0") or "0")
    if not least <= number <= limit:
        raise Unfit(f"{number} is out of range", expected)
    return number


# The number of a TCP or UDP port.
parse_port = functools.partial(parse_number, least=1, limit=65535)
parse_family = functools.partial(matched, pattern="inet|ip|ip6", expected="inet, ip or ip6")
# The name of an nftables table or chain.
parse_name = functools.partial(
    matched, pattern="[A-Za-z0-9_.-]{1,64}", expected="1 to 64 of A-Z a-z 0-9 _ - ."
)
# What limits a jump: there is only the source address of packets.
parse_match = functools.partial(matched, pattern="saddr", expected="saddr")


def parse_rules_limit(text: str) -> int:
    """max-nr-rules. A number above our own limit counts as that limit."""
    return min(parse_number(text), MAX_NR_RULES_LIMIT)


def parse_duration(text: str) -> float:
    """Seconds: a number, or a decimal such as 0.5 or 1e3. The reference refuses a unit, so a file
    with one would serve only one of the two."""
    expected = "seconds, from 0 to 4294967295"
    with_unit = re.fullmatch(r"\s*([0-9]{1,5})\s*([smhd])\s*", text)
    if with_unit:
        seconds = int(with_unit[1]) * UNITS_S[with_unit[2]]
        raise Unfit(f"{shown(text.strip())} has a unit", f"{expected}; write {seconds}")
    decimal = r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?"
    text = matched(text, rf"0x\+?[0-9A-Fa-f]+|{decimal}", expected)
    number = float(parse_number(text) if text.startswith("0x") else text)
    if not 0 <= number <= 0xFFFFFFFF:
        raise Unfit(f"{shown(text)} is out of range", expected)
    return abs(number)  # of -0.0


def parse_identifier(text: str) -> int:
    """A user's or a resource's id."""
    expected = "1 to 8 hex digits, such as 0000002A"
    return int(matched(text, r"(?=.{1,8}$)\+?[0-9A-Fa-f]+", expected), 16)


def parse_key(text: str) -> bytes:
    """A shared secret."""
    digits = text.strip()
    problem = ""
    if len(digits) != KEY_DIGITS:
        problem = f"this key has {len(digits)} characters, not {KEY_DIGITS}"
    elif not re.fullmatch("[0-9A-Fa-f]+", digits):
        problem = "this key has characters that are not hex digits"
    elif not digits.strip("0") or not digits.strip("Ff"):
        problem = f"this key is all {digits[0]}, which anybody can guess"
    if problem:
        raise Unfit(problem, "64 hex digits, as 'letmein gen-key' prints them")
    return bytes.fromhex(digits)


def parse_word(text: str, words: Iterable[str]) -> str:
    """One of these words, in upper or lower case."""
    return matched(text.lower(), "|".join(words), f"one of: {', '.join(words)}")


def parse_boolean(text: str) -> bool:
    """Yes or no: one of YES and NO."""
    return parse_word(text, YES + NO) in YES


def parse_policy(text: str) -> int:
    """When an error is answered: see POLICIES."""
    return POLICIES[parse_word(text, POLICIES)]


# What happens at a system call that the filter does not allow; "off" for no filter.
parse_seccomp = functools.partial(parse_word, words=SECCOMP)


def parse_protocols(flags: Sequence[str], expected: str) -> tuple[str, ...]:
    """`tcp`, `udp`, or both. Args: flags, such as "tcp, udp", or several; none means tcp."""
    text = matched(", ".join(flags or ["tcp"]).lower(), r"(tcp|udp)(\s*,\s*(tcp|udp))*", expected)
    return tuple(sorted(set(re.findall("tcp|udp", text))))


def parse_control_port(text: str) -> tuple[int, tuple[str, ...]]:
    """`5800`, `5800/udp`, `5800 / tcp, udp`: the port, and "tcp", "udp" or both."""
    port = CONTROL_PORT
    flags = []
    for item in text.split("/"):
        item = item.strip()
        if re.fullmatch("0x[0-9A-Fa-f]+|[0-9]+", item):
            port = parse_port(item)  # of several the last one counts, as in the reference
        else:
            flags.append(item)
    return port, parse_protocols(flags, "such as '5800', '5800/udp' or '5800 / tcp, udp'")


def parse_users(text: str) -> frozenset[int]:
    """Ids of users, with commas between them."""
    return frozenset(parse_identifier(user) for user in text.split(","))


RESOURCE_SYNTAX = "'port: N / tcp, udp / timeout: SECONDS / users: ID, ID' or 'jump / input: CHAIN'"
PORT_ITEMS = {"port", "timeout", "users"}  # none of which may be repeated
RESOURCE_ITEMS: Mapping[str, Callable[[str], Any]] = {  # of a resource: `KEY: VALUE`
    "port": parse_port,
    "timeout": parse_duration,
    "users": parse_users,
    **{hook: parse_name for hook in HOOKS},
    **{f"{hook}-match": parse_match for hook in HOOKS},
}


def parse_items(text: str) -> tuple[dict[str, Any], list[str]]:
    """The items of a resource: those of the form `KEY: VALUE`, by key, and the others."""
    values: dict[str, Any] = {}
    flags = []
    for item in text.split("/"):
        key, colon, value = (part.strip() for part in item.partition(":"))
        if not colon:
            flags.append(key)
        elif key not in RESOURCE_ITEMS:
            raise Unfit(f"{shown(key)} is unknown here", RESOURCE_SYNTAX)
        elif key in values and key in PORT_ITEMS:
            raise Unfit(f"{key} appears twice", f"{key} once")
        else:
            try:
                values[key] = RESOURCE_ITEMS[key](value)
            except Unfit as unfit:
                raise Unfit(f"{key}: {unfit.problem}", unfit.hint) from None
    return values, flags


def parse_resource(identifier: int, text: str, timeout: float) -> Resource:
    """`port: 22 / tcp / timeout: 60 / users: 1, 2` or `jump / input: CHAIN / ...`. Args: timeout,
    for a value that has none, in s."""
    values, flags = parse_items(text)
    hooks = [hook for hook in HOOKS if hook in values]
    timeout = values.get("timeout", timeout)
    users = values.get("users", frozenset())
    if "port" in values:
        if not values.keys() <= PORT_ITEMS:
            raise Unfit("a port and a jump need a resource each", RESOURCE_SYNTAX)
        protocols = parse_protocols(flags, RESOURCE_SYNTAX)
        return Resource(identifier, values["port"], protocols, (), timeout, users)
    if set(flags) != {"jump"}:
        raise Unfit("this is neither a port nor a jump", RESOURCE_SYNTAX)
    if not hooks:
        raise Unfit("this jump has no chain to jump to", RESOURCE_SYNTAX)
    jumps = tuple(Jump(hook, values[hook], f"{hook}-match" in values) for hook in hooks)
    return Resource(identifier, 0, (), jumps, timeout, users)


def parse_last_day(text: str) -> float:
    """The end of this day in UTC, by time.time()."""
    import datetime
    expected = "a day as YYYY-MM-DD, such as 2027-01-31"
    day = matched(text, "[0-9]{4}-[0-9]{2}-[0-9]{2}", expected)
    try:
        days = datetime.date.fromisoformat(day) - datetime.date(1970, 1, 1)
    except ValueError:
        raise Unfit(f"there is no {day} in the calendar", expected) from None
    return float((days.days + 1) * UNITS_S["d"])


def parse_user_timeout(text: str) -> float:
    """As parse_duration(), but not 0."""
    timeout = parse_duration(text)
    if not timeout:
        raise Unfit("with a timeout of 0 the user can open nothing", "more than 0 seconds")
    return timeout


USER_LIMITS = {"timeout": parse_user_timeout, "not-after": parse_last_day}


def parse_user_limits(text: str) -> UserLimits:
    """`timeout: 60 / not-after: 2027-01-31`, or one of them."""
    values = {}
    for item in text.split("/"):
        key, _, value = (part.strip() for part in item.partition(":"))
        if key not in USER_LIMITS or key in values:
            expected = "'timeout: SECONDS / not-after: YYYY-MM-DD', or one of them"
            raise Unfit(f"{shown(key)} is unknown here, or appears twice", expected)
        values[key] = USER_LIMITS[key](value)
    return UserLimits(values.get("timeout", NEVER), values.get("not-after", NEVER))


class Setting(NamedTuple):
    """An option of the file."""

    field: str  # of Config; but "control" is both port and protocols, and "input" etc. are chains
    parse: Callable[[str], Any]  # its value. Raises Unfit


OPTIONS: Mapping[str, Mapping[str, Setting]] = {  # by section and name
    "GENERAL": {
        "debug": Setting("debug", parse_boolean),
        "port": Setting("control", parse_control_port),
        "control-timeout": Setting("control_timeout", parse_duration),
        "control-error-policy": Setting("error_policy", parse_policy),
        "seccomp": Setting("seccomp", parse_seccomp),
        "include": Setting("include", str.strip),
    },
    "CLIENT": {"default-user": Setting("default_user", parse_identifier)},
    "NFTABLES": {
        "exe": Setting("nft", str.strip),
        "family": Setting("family", parse_family),
        "table": Setting("table", parse_name),
        **{f"chain-{hook}": Setting(hook, parse_name) for hook in HOOKS},
        "timeout": Setting("timeout", parse_duration),
        "max-nr-rules": Setting("max_nr_rules", parse_rules_limit),
    },
    "KEYS": {},  # by user
    "RESOURCES": {},  # by id
    "USERS": {},  # by user
}
INCLUDABLE = ("KEYS", "RESOURCES")
REQUIRED = ("family", "table", "chain-input")  # of [NFTABLES]


class Entry(NamedTuple):
    """An option as the file has it; with the name "" the line that begins a section."""

    line: str  # "FILE:NUMBER"
    section: str
    name: str
    value: str

    @property
    def prefix(self) -> str:
        """How a message on it begins."""
        section, name = (shown(each)[1:-1] for each in (self.section, self.name))  # no quotes
        return f"{self.line}: [{section}] " + (f"{name}: " if name else "")


# Bytes that are not UTF-8 decode to DC80 to DCFF. Only Python takes 1C to 1F for white space.
NO_TEXT = re.compile("[\0\x1c-\x1f\udc80-\udcff]")
# A line that begins a section, or an option.
ENTRY = re.compile(r"\[(?P<section>.+)\]\s*|(?P<name>[^=\[][^=]*)=(?P<value>.*)")


def parse_sections(text: str, path: str) -> dict[str, dict[str, Entry]]:
    """The file as it is written, by section and name. The name "" is the section's own line.
    Raises ConfigError."""
    sections: dict[str, dict[str, Entry]] = {}
    section = name = ""
    for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), 1):
        where = f"{path}:{number}"
        if NO_TEXT.search(line):
            hint = "expected: UTF-8, without control characters"
            raise ConfigError(f"{where}: this is not text", hint)
        if name and line[:1] in (" ", "\t") and line.strip():  # it continues the value above
            entry = sections[section][name]
            sections[section][name] = entry._replace(value=f"{entry.value} {line.lstrip()}")
            continue
        name = ""
        line = line.lstrip()
        if not line or line.startswith("#"):
            continue
        found = ENTRY.fullmatch(line)
        if not found:
            hint = "expected: a line such as [GENERAL], or NAME = VALUE below one"
            problem = f"{shown(line.rstrip())} is neither a section nor an option"
            raise ConfigError(f"{where}: {problem}", hint)
        section = found["section"] or section
        name = (found["name"] or "").rstrip()
        if not section:
            hint = "expected: a line such as [GENERAL] above it"
            raise ConfigError(f"{where}: {shown(name)} is in no section", hint)
        entry = Entry(where, section, name, found["value"] or "")
        if name in sections.setdefault(section, {}):
            raise ConfigError(f"{entry.prefix}appears twice", "expected: each name once")
        sections[section][name] = entry
    return sections


@contextlib.contextmanager
def blaming(entry: Entry) -> Iterator[None]:
    """Put an option's place in front of what is wrong with it. Raises ConfigError."""
    try:
        yield
    except Unfit as unfit:
        hint = f"expected: {unfit.hint}"
        if "#" in entry.value:
            hint += "; a comment needs a line of its own that is not indented"
        raise ConfigError(entry.prefix + unfit.problem, hint) from None


def most_similar(word: str, known: Iterable[str]) -> str:
    """The known word most like this one; "" if none is."""
    import difflib
    found = difflib.get_close_matches(word, list(known), 1)
    return found[0] if found else ""


def unknown_names(sections: Sections) -> Iterator[str]:
    """A warning for each section and option that we do not know, in the file's order."""
    for section, entries in sections.items():
        known = OPTIONS.get(section)
        for name, entry in entries.items():
            if known is None and not name:
                similar = most_similar(section.upper(), OPTIONS)
            elif known and name and name not in known:
                similar = most_similar(name.lower(), known)
            else:
                continue
            question = f"; did you mean {similar}?" if similar else ""
            yield f"{entry.prefix}is unknown and ignored{question}"


def parse_settings(entries: Mapping[str, Entry], known: Mapping[str, Setting]) -> dict[str, Any]:
    """The values of a section's known options, by field of Config. Raises ConfigError."""
    values = {}
    for name, entry in entries.items():
        if name in known:
            with blaming(entry):
                values[known[name].field] = known[name].parse(entry.value)
    return values


def entries_of(section: str, files: Iterable[Sections]) -> list[Entry]:
    """The options of a section, in all of these files."""
    entries = (entry for file in files for entry in file.get(section, {}).values())
    return [entry for entry in entries if entry.name]


def parse_by_user(
    entries: Iterable[Entry], parse: Callable[[str], Item], what: str
) -> dict[int, Item]:
    """[KEYS] or [USERS], by user. Args: parse, reads a value; what, the name of a value in
    messages. Raises ConfigError."""
    values: dict[int, Item] = {}
    lines: dict[int, str] = {}
    for entry in entries:
        with blaming(entry):
            user = parse_identifier(entry.name)
            if user in values:
                problem = f"user {user:08X} has {what} already, at {lines[user]}"
                raise Unfit(problem, "each user once")
            values[user] = parse(entry.value)
            lines[user] = entry.line
    return values


def parse_resources(entries: Iterable[Entry], timeout: float) -> dict[int, Resource]:
    """[RESOURCES], by id. Args: timeout, of those that have none, in s. Raises ConfigError."""
    resources: dict[int, Resource] = {}
    lines: dict[int, str] = {}
    owners: dict[int, int] = {}  # by port the resource that opens it
    for entry in entries:
        with blaming(entry):
            identifier = parse_identifier(entry.name)
            resource = parse_resource(identifier, entry.value, timeout)
            if identifier in resources:
                problem = f"resource {identifier:08X} appears twice, first at {lines[identifier]}"
                raise Unfit(problem, "each id once")
            if resource.port in owners:
                owner = owners[resource.port]
                problem = f"resource {owner:08X} has port {resource.port}, at {lines[owner]}"
                raise Unfit(problem, "each port once")
            resources[identifier] = resource
            lines[identifier] = entry.line
            if resource.port:
                owners[resource.port] = identifier
    return resources


def why_nobody_may(config: Config, resource: Resource) -> str:
    """Why no user can open a resource; "" if one can."""
    users = resource.users or {NO_USER}
    reasons = [config.why_not(user, resource.identifier) for user in users]
    if all(reasons):
        return reasons[0]
    return "" if resource.timeout else "its timeout is 0"


def server_warnings(config: Config, files: Sequence[Sections]) -> Iterator[str]:
    """What a server can do with this configuration, but its owner may not want."""
    if config.error_policy == NO_AUTH and "udp" in config.protocols:
        text = "control-error-policy: 'always' over UDP answers forged senders"
        yield f"{config.path}: [GENERAL] {text}; 'basic-auth' is recommended"
    if not config.control_timeout and "tcp" in config.protocols:
        text = "control-timeout: 0 seconds is too short for any knock over TCP"
        yield f"{config.path}: [GENERAL] {text}"
    if config.family != "inet" and config.table in IPTABLES_TABLES:
        text = f"iptables uses {config.table_name}, too, and what iptables-save makes of"
        text += " our rules lets everybody in; give the table another name"
        yield files[0]["NFTABLES"]["table"].prefix + text
    if not config.keys:
        text = "no user has a key, so nobody can knock; 'letmein gen-key' prints one"
        yield f"{config.path}: [KEYS] {text}"
    # Entries and their values are in the same order.
    for entry, resource in zip(entries_of("RESOURCES", files), config.resources.values()):
        if reason := why_nobody_may(config, resource):
            yield f"{entry.prefix}nobody can knock for it: {reason}"
        for hook in re.findall(r"(\w+)-match\s*:", entry.value):
            if hook not in {jump.hook for jump in resource.jumps}:
                yield f"{entry.prefix}{hook}-match limits nothing: there is no {hook}: CHAIN"
        if config.keys:
            for user in sorted(resource.users - config.keys.keys()):
                yield f"{entry.prefix}user {user:08X} has no key in [KEYS]"
    for entry, user in zip(entries_of("USERS", files), config.limits):
        if user not in config.keys:
            yield f"{entry.prefix}user {user:08X} has no key in [KEYS]"
        elif time.time() >= config.limits[user].ends:
            yield f"{entry.prefix}this day has passed: the user can no longer open anything"


def parse_config(
    text: str, path: str, server: bool, warnings: list[str], read_files: ReadFiles = lambda _: ()
) -> Config:
    """Read a configuration file's text. Args: path, for messages alone; warnings, to which more are
    added; read_files, which reads included files. Raises ConfigError."""
    sections = parse_sections(text, path)
    warnings += unknown_names(sections)
    values: dict[str, Any] = {"control": (CONTROL_PORT, ("tcp",)), **Config._field_defaults}
    for section in ("GENERAL", "NFTABLES" if server else "CLIENT"):
        values.update(parse_settings(sections.get(section, {}), OPTIONS[section]))
    files: list[Sections] = [sections]
    include = sections.get("GENERAL", {}).get("include")
    if include and server:
        with blaming(include):
            files += read_files(values["include"])
    elif include:
        warnings.append(f"{include.prefix}belongs in the server's file, and is ignored here")
    keys = parse_by_user(entries_of("KEYS", files), parse_key, "a key")
    resources = parse_resources(entries_of("RESOURCES", files), values["timeout"])
    if server:
        limits = parse_by_user(entries_of("USERS", files), parse_user_limits, "limits")
        values["limits"] = limits
        nftables = sections.get("NFTABLES", {})
        start = nftables.get("", Entry(f"{path}:1", "NFTABLES", "", ""))
        for option in REQUIRED:
            if option not in nftables:
                hint = "expected: family, table and chain-input, as in nftables.conf"
                raise ConfigError(f"{start.prefix}{option}: is not set", hint)
    port, protocols = values.pop("control")
    chains = {hook: values.pop(hook) for hook in HOOKS if hook in values}
    config = Config(path, (), port, protocols, keys, resources, chains, **values)
    if server:
        warnings += server_warnings(config, files)
    return config._replace(warnings=tuple(warnings))


def read_text(path: str, server: bool, warnings: list[str]) -> str:
    """The text of a configuration file. Args: warnings, gets more if others may read or change it.
    Raises OSError, ConfigError."""
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        data = file.read(CONFIG_SIZE_LIMIT + 1)
    if len(data) > CONFIG_SIZE_LIMIT:
        raise ConfigError(f"{path}: too large", f"expected: at most {CONFIG_SIZE_LIMIT} bytes")
    if os.name == "posix" and server and status.st_uid != 0:
        warnings.append(f"{path}: owned by user {status.st_uid}, not root; chown root {path}")
    # A group of administrators may read the server's file.
    if os.name == "posix" and status.st_mode & (0o026 if server else 0o066):
        mode = f"{status.st_mode & 0o777:o}"
        what = f"mode {mode} lets other users of this machine read or change it"
        warnings.append(f"{path}: {what}; chmod 600 {path}")
    data = data.removeprefix(b"\xef\xbb\xbf")  # the BOM, with which some editors begin a file
    return data.decode("utf-8", "surrogateescape")


def find_included(pattern: str, directory: str) -> list[str]:
    """The paths that a value of `include` names, sorted. Args: directory, where it begins. Raises
    Unfit."""
    import glob
    if not re.search("[*?[]", pattern):
        return [os.path.join(directory, pattern)]
    try:
        paths = glob.iglob(os.path.join(glob.escape(directory), pattern))
        found = list(itertools.islice(paths, INCLUDE_LIMIT + 1))
    except re.error as error:  # of a range such as [z-a], by Python up to 3.10
        raise Unfit(f"{shown(pattern)} is no pattern: {error}", "one as of glob(7)") from None
    if len(found) > INCLUDE_LIMIT:
        raise Unfit(f"more than {INCLUDE_LIMIT} files match", f"at most {INCLUDE_LIMIT}")
    return sorted(found)


def include_directory(config: Config) -> str:
    """The directory that `include` needs, for a service that sees only a part of the disk."""
    directory = os.path.dirname(os.path.join(os.path.dirname(config.path), config.include))
    while re.search("[*?[]", directory):
        directory = os.path.dirname(directory)
    return directory


def check_included(path: str) -> None:
    """Check that a pattern has found a file, and that nobody but root may change or replace it.
    Raises OSError, ConfigError."""
    target = os.path.realpath(path)  # it may be a link
    modes = {os.path.dirname(path): "755", os.path.dirname(target): "755", path: "600"}
    for name, mode in modes.items():
        status = os.stat(name)
        if status.st_mode & 0o022 or status.st_uid not in (0, os.geteuid()):
            hint = f"chown root {name}; chmod {mode} {name}"
            raise ConfigError(f"{path}: others may write to {name}", hint)
    if not stat.S_ISREG(os.stat(path).st_mode):  # a FIFO would keep us waiting
        raise ConfigError(f"{path}: not a regular file", "expected: files that can be read")


def read_included(paths: Iterable[str], warnings: list[str]) -> Iterator[Sections]:
    """The sections of each of these files. Raises Unfit, ConfigError."""
    size = 0
    for path in paths:
        try:
            check_included(path)
            text = read_text(path, True, warnings)
        except OSError as error:
            hint = "include in [GENERAL] of letmeind.conf names it"
            raise ConfigError(f"{path}: cannot be read: {error.strerror}", hint) from None
        size += len(text)
        if size > CONFIG_SIZE_LIMIT:
            raise Unfit("the files are too large", f"at most {CONFIG_SIZE_LIMIT} bytes together")
        sections = parse_sections(text, path)
        for section, entries in sections.items():
            if section not in INCLUDABLE:
                hint = "expected: [KEYS] and [RESOURCES] alone"
                raise ConfigError(f"{entries[''].prefix}is not for an included file", hint)
        yield sections


def read_config(path: str, server: bool) -> Config:
    """Read a configuration file. The client's may be missing. Raises ConfigError."""
    warnings: list[str] = []

    def read_files(pattern: str) -> Iterator[Sections]:
        paths = find_included(pattern, os.path.dirname(os.path.abspath(path)))
        if not paths:
            warnings.append(f"{path}: [GENERAL] include: no file matches {shown(pattern)}")
        return read_included(paths, warnings)

    try:
        text = read_text(path, server, warnings)
        return parse_config(text, path, server, warnings, read_files)
    except ConfigError as error:
        error.warnings = tuple(warnings)
        raise
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not server:
            return parse_config("", path, server, warnings)
        hint = "name another file with --config, or let this user read it"
        if not server:
            hint = "name a letmein.conf that you can read; the server's client-conf prints one"
        if isinstance(error, FileNotFoundError):
            hint = "this command is for the server: write the file there, or name one with -c"
        raise ConfigError(f"{path}: cannot be read: {error.strerror}", hint) from None


# ==== 3  Client ==============================================================
# The client knocks at all addresses of a host at the same time, so one that does not answer delays
# none of the others. `connect` and COMMAND keep open what they use, and close it at the end.
#
# On the way down: what can go wrong, and how the user is told; names and addresses; one handshake
# over TCP, and over UDP; Race, at all addresses; Client, for all resources; Hold, which keeps them
# open; Carrier, the data of `connect`.

ADDRESSES_LIMIT = 8  # of one host; the reference's server takes 8 connections from one client
UDP_REPEAT_S = 0.4  # UDP loses messages: see exchange_udp()
UDP_HANDSHAKES = 24  # at once; with 8 addresses they stay below macOS's limit of 256 descriptors
TCP_RETRIES = 3  # after the server hung up without a CHALLENGE: see exchange_tcp()
TCP_RETRY_S = 0.2  # the longest first pause; it doubles from one try to the next
OTHER_ADDRESS_S = 0.25  # how much longer to wait for the others once one address is open
CONNECT_S = 2.0  # a slower connect may have met a port that was closed meanwhile
RENEWAL_RETRY_S = 1.0  # the first pause after a failed renewal; it doubles from one try to the next
RENEWAL_RETRY_LIMIT_S = 60.0  # the longest pause
GONE_CHECK_S = 1.0  # how often to see whether the peer of a connection that only sends is gone
CHUNK = 1 << 16  # bytes
VERBS = {KNOCK: "open", REVOKE: "close"}
DONE = {KNOCK: "opened", REVOKE: "closed"}
BUG_HINT = "this is a bug in letmein: please report it"

# tcp(7): a peer that vanished is noticed within 90 s. macOS calls the first one TCP_KEEPALIVE.
# Not TCP_USER_TIMEOUT: it would also end a connection whose peer only stops reading for a while.
KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPALIVE": 30, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 4}


class Target(NamedTuple):
    """Where to knock. Socket addresses are as getaddrinfo() has them."""

    family: int
    remote: tuple[Any, ...]
    local: tuple[Any, ...] | None = None  # the address to come from, if that matters


class HungUp(ProtocolError):
    """The server closed the connection instead of answering. Args: as Rejection."""

    def __init__(self, is_challenged: bool = False) -> None:
        super().__init__()
        self.is_challenged = is_challenged


class Silent(ProtocolError):
    """Something accepts connections, but does not answer."""


class Rejected(UserError):
    """The server answered, but did not do what was asked."""


class Unsent(UserError):
    """This machine could send nothing."""


class AddressLost(Unsent):
    """This machine no longer has the address that `connect` uses."""


# What can go wrong at one address: the kind of error to tell, what happened, and the most likely
# remedy. By an errno or the type of a ProtocolError, and a detail: "tcp" or "udp" for a timeout,
# "challenged" if the server had challenged us, "link-local" for such an address, else "".
OTHER_CAUSE = (None, "")
CAUSES: dict[tuple[object, str], tuple[type[UserError], str, str]] = {
    (errno.ENETUNREACH, ""): (
        Unsent, "this machine has no route to it",
        "see whether this machine is online and has IPv{version}"),
    (errno.EADDRNOTAVAIL, ""): (
        Unsent, "this machine has no IPv{version} address to send from",
        "see whether this machine is online and has IPv{version}"),
    (errno.EPERM, ""): (
        Unsent, "this machine does not let letmein send to control port {port} ({error})",
        "allow it in this machine's own firewall, or in the sandbox that letmein runs in"),
    (errno.EINVAL, "link-local"): (
        Unsent, "a link-local address needs a zone, such as fe80::1%eth0",
        "use another of its addresses if there is one: servers refuse link-local clients"),
    (errno.EHOSTUNREACH, ""): (
        UserError, "the host is down, or a firewall rejects its control port {port} ({error})",
        "see whether the host is up, and whether you may reach it from this network"),
    (errno.ECONNREFUSED, ""): (
        UserError, "nothing listens on its control port {port}",
        "start the server, or name its control port: -P PORT, with -T (TCP) or -U (UDP)"),
    (errno.ETIMEDOUT, "tcp"): (
        UserError, "no answer on its control port {port} within {patience:g} s",
        "see whether the server runs, and has this control port: its firewall drops all others"),
    (errno.ETIMEDOUT, "udp"): (
        UserError, "no answer on its control port {port} within {patience:g} s",
        "see whether the server runs; compare user and key: over UDP it ignores wrong ones"),
    (Silent, ""): (
        Rejected, "its control port {port} is open, but gives no answer within {patience:g} s",
        "see whether a letmein server listens there, and what it logs"),
    (HungUp, ""): (
        Rejected, "the server closed the connection without an answer",
        "compare user and key with the server's file: it may not answer wrong ones"),
    (HungUp, "challenged"): (
        Rejected, "the server closed the connection after the challenge",
        "the key is right: see the server's log for the time of this knock"),
    (Rejection, ""): (
        Rejected, "{error}",
        "compare user, key and resource with the server's file; its log says which is wrong"),
    (Rejection, "challenged"): (
        Rejected, "{error}",
        "the key is right: event=failed in the server's log says what went wrong"),
    (ProtocolError, ""): (
        Rejected, "what answers on its control port {port} is not a letmein server ({error})",
        "name the server's control port: -P PORT, with -T (TCP) or -U (UDP)"),
    OTHER_CAUSE: (
        UserError, "{error} (on the way to its control port {port})",
        "see whether this machine is online, and whether you can reach the host otherwise"),
}
CAUSES[errno.EACCES, ""] = CAUSES[errno.EPERM, ""]  # by a route of the kind "prohibit"
CAUSES[errno.EAFNOSUPPORT, ""] = CAUSES[errno.EADDRNOTAVAIL, ""]  # a kernel without IPv6


def name_of(resource: Resource) -> str:
    """What the user calls it."""
    return f"port {resource.port}" if resource.port else f"resource {resource.identifier:08X}"


def not_done(operation: int, names: str, error: UserError) -> UserError:
    """What to tell of an error with the resources of these names."""
    return UserError(f"cannot {VERBS[operation]} {names} on {error}", error.hint)


def find_resources(config: Config, arguments: SimpleNamespace, user: int) -> list[Resource]:
    """The resources that the command line names, as far as the file knows them. Raises
    UserError."""
    if arguments.resources:
        found = []
        for identifier in arguments.resources:
            unknown = Resource(identifier, 0, (), (), config.timeout, frozenset())
            found.append(config.resources.get(identifier, unknown))
        return found
    ports = {r.port: r for r in config.resources.values() if not r.users or user in r.users}
    for port in set(arguments.ports) - set(ports):
        names = ", ".join(str(port) for port in sorted(ports) if port)
        hint = f"it has: {names or 'none'}; add port {port}, or name a resource with -r ID"
        problem = f"[RESOURCES] has no port {port} for user {user:08X}"
        raise UserError(f"{config.path}: {problem}", hint)
    return [ports[port] for port in arguments.ports]


def resolve(host: str, port: int, families: Sequence[int]) -> dict[str, Target]:
    """The addresses of host, ADDRESSES_LIMIT at most, by their text. Args: families, AF_INET or
    AF_INET6 or both, if it must have them. Raises UserError."""
    found: dict[int, list[Target]] = {socket.AF_INET6: [], socket.AF_INET: []}
    wanted = families[0] if len(set(families)) == 1 else int(socket.AF_UNSPEC)
    for family, _, _, _, remote in look_up(host, port, wanted):
        found[family].append(Target(family, remote))
    for needed, version in ((socket.AF_INET, 4), (socket.AF_INET6, 6)):
        if needed in families and not found[needed]:
            raise UserError(f"{host!a} has no IPv{version} address", f"leave out -{version}")
    targets: dict[str, Target] = {}
    numeric = socket.NI_NUMERICHOST | socket.NI_NUMERICSERV
    # In turns: a family with many addresses leaves room for the other.
    for turn in itertools.zip_longest(*found.values()):
        for target in filter(None, turn):
            if len(targets) < ADDRESSES_LIMIT:
                targets[socket.getnameinfo(target.remote, numeric)[0]] = target
    return targets


def look_up(host: str, port: int, family: int) -> list[Any]:
    """What getaddrinfo() finds for host: addresses of this family, or if it has none, any. Raises
    UserError."""
    try:
        # As bytes an ASCII name needs no IDNA codec, which some systems do not have.
        name = host.encode("ascii") if host.isascii() else host
        return socket.getaddrinfo(name, port, family, socket.SOCK_STREAM)
    except (OSError, UnicodeError, LookupError, ValueError) as error:
        if family != socket.AF_UNSPEC:
            return look_up(host, port, socket.AF_UNSPEC)
        reason = getattr(error, "strerror", None) or "this is not a host name"
        hint = "check how the name is written"
        if getattr(error, "errno", None) == socket.EAI_AGAIN:
            hint = "see whether this machine is online: its name server does not answer"
        raise UserError(f"cannot find the address of {host!a}: {reason}", hint) from None


def receive(peer: socket.socket, timeout: float) -> bytes:
    """One message over TCP, within timeout seconds. Raises HungUp, Silent, ProtocolError,
    OSError."""
    end = time.monotonic() + timeout
    received = b""
    while len(received) < MESSAGE_SIZE:
        peer.settimeout(max(end - time.monotonic(), 0.001))
        try:
            data = peer.recv(MESSAGE_SIZE - len(received))
        except socket.timeout:
            raise Silent from None
        received += data
        if not MAGIC.startswith(received[:4]):  # others may say less, and wait for us
            raise ProtocolError("it speaks another protocol")
        if not data:
            raise HungUp
    return received


def next_message(handshake: Handshake, answer: bytes) -> bytes:
    """What to send after this answer; b"" at the handshake's good end. Raises ProtocolError."""
    try:
        return handshake.send(answer)
    except StopIteration:
        return b""


def handshake_over(peer: socket.socket, handshake: Handshake, timeout: float) -> None:
    """One handshake over a TCP connection, with timeout seconds for each message. Raises HungUp if
    the server closes it, another ProtocolError, or OSError."""
    is_challenged = False
    message = next(handshake)
    try:
        while message:
            peer.sendall(message)
            message = next_message(handshake, receive(peer, timeout))
            is_challenged = True
    except (HungUp, ConnectionError):
        raise HungUp(is_challenged) from None


def exchange_tcp(new_handshake: NewHandshake, target: Target, timeout: float, say: Say) -> None:
    """One handshake, with timeout seconds for each message. Raises ProtocolError, OSError. Args:
    say, told of each step.

    A busy server hangs up on the oldest connections. So the client tries again, from a new port.
    The pauses grow, and they are random, or clients that collided once would collide again. A
    server may also hang up because of a wrong key, and then patience does not help: without a
    CHALLENGE, which takes the right key, the client tries only TCP_RETRIES more times."""
    end = time.monotonic() + timeout
    longest_pause = TCP_RETRY_S
    retries = TCP_RETRIES
    while True:
        with socket.socket(target.family, socket.SOCK_STREAM) as peer:
            peer.settimeout(timeout)
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if target.local:
                peer.bind(target.local)
            say("connecting")
            peer.connect(target.remote)
            say(f"connected from {peer.getsockname()[0]}")
            try:
                handshake_over(peer, new_handshake(), timeout)
                return
            except HungUp as error:
                pause = longest_pause * (os.urandom(1)[0] + 1) / 256
                if time.monotonic() + pause >= end or not (retries or error.is_challenged):
                    raise
                if not error.is_challenged:
                    retries -= 1
        say(f"the server hung up, another try in {1000 * pause:.0f} ms")
        time.sleep(pause)
        longest_pause *= 2


class UdpHandshake:
    """One handshake over UDP, from a port of its own. Args: selector, in which it is while it runs.
    Raises OSError."""

    def __init__(self, handshake: Handshake, target: Target, selector: Selector) -> None:
        self.handshake = handshake
        self.selector = selector
        self.response = b""
        self.heard = b""  # the last message, without its salt
        self.is_done = False
        self.socket = socket.socket(target.family, socket.SOCK_DGRAM)
        try:
            self.socket.setblocking(False)
            if target.local:
                self.socket.bind(target.local)
            self.socket.connect(target.remote)
            self.socket.send(next(handshake))
            selector.register(self.socket, selectors.EVENT_READ, self)
        except BaseException:
            self.socket.close()
            raise

    def receive(self) -> bool:
        """Read and answer a datagram; returns whether it moved the handshake on. Raises
        ProtocolError, OSError."""
        try:
            data = self.socket.recv(MESSAGE_SIZE + 1)
        except BlockingIOError:  # a broken datagram: select(2), BUGS
            return False
        facts = data[:16] + data[24:]  # all but the salt
        if len(data) != MESSAGE_SIZE or facts == self.heard:
            return False  # no message, or a CHALLENGE that the network brought twice
        self.heard = facts
        self.response = next_message(self.handshake, data)
        self.is_done = not self.response
        if self.response:
            self.socket.send(self.response)
        return True

    def close(self) -> None:
        """Give it up."""
        self.selector.unregister(self.socket)
        self.socket.close()


def exchange_udp(new_handshake: NewHandshake, target: Target, timeout: float, say: Say) -> None:
    """The same over UDP, which loses messages: every UDP_REPEAT_S a new handshake begins, from a
    port of its own, and each RESPONSE is sent again; older handshakes may still be answered. No
    KNOCK is sent twice from one port: the reference's server rejects that."""
    repeat_at = time.monotonic()
    no_start_after = repeat_at + timeout
    give_up_at = no_start_after  # each answer moves this, to give the next one its time
    running: deque[UdpHandshake] = deque()  # the oldest first
    # Not select(): it takes no descriptor above 1,023, and our parent may have left us many.
    selector = selectors.DefaultSelector()
    try:
        while (now := time.monotonic()) < give_up_at:
            if now >= repeat_at:
                repeat_at = now + UDP_REPEAT_S
                if running:
                    say("no answer yet, another try")
                if now < no_start_after:  # first: this may end it
                    if len(running) == UDP_HANDSHAKES:
                        running.popleft().close()
                    running.append(UdpHandshake(new_handshake(), target, selector))
                for handshake in running:
                    if handshake.response:
                        handshake.socket.send(handshake.response)
            for key, _ in selector.select(min(repeat_at, give_up_at) - now):
                handshake = key.data
                try:
                    if handshake.receive():
                        give_up_at = time.monotonic() + timeout
                except ProtocolError:
                    # The reference's server rejects a RESPONSE that it has granted before.
                    running.remove(handshake)
                    handshake.close()
                    if not running:
                        raise
                if handshake.is_done:
                    return
        raise socket.timeout
    finally:
        for handshake in running:
            handshake.close()
        selector.close()


def start_thread(run: Callable[[], None]) -> threading.Thread:
    """Run something at the same time, for as long as the program runs. Raises UserError."""
    import threading
    thread = threading.Thread(target=run, daemon=True)
    try:
        thread.start()
    except RuntimeError as error:
        hint = "raise the limit of processes: ulimit -u, or the container's"
        raise UserError(f"cannot start a thread: {error}", hint) from None
    return thread


class Race:
    """Asks several addresses the same at the same time. Args: ask, asks one address, and returns
    what went wrong, None for success."""

    def __init__(self, ask: Callable[[str], UserError | None], addresses: Iterable[str]) -> None:
        import threading
        self.addresses = list(addresses)
        self.is_given_up = False  # then nothing new begins
        self.ask = ask
        self.arrived: deque[tuple[str, UserError | None]] = deque()
        self.news = threading.Semaphore(0)  # how many have arrived
        self.threads = [
            threading.Thread(target=self._run, args=[address], daemon=True)
            for address in self.addresses
        ]

    def start(self) -> None:
        """Begin to ask."""
        for address, thread in zip(self.addresses, self.threads):
            try:
                thread.start()
            except RuntimeError:  # no more threads: one address after the other
                self._run(address)

    def _run(self, address: str) -> None:
        error = self.ask(address)
        self.arrived.append((address, error))
        self.news.release()

    def wait(self, is_enough: Callable[[Results], bool]) -> Results:
        """Wait for all results, or until OTHER_ADDRESS_S after there are enough."""
        results: Results = {}
        end: float | None = None
        while len(results) < len(self.addresses):
            if end is None and is_enough(results):
                end = time.monotonic() + OTHER_ADDRESS_S
            left = None if end is None else max(end - time.monotonic(), 0)
            if not self.news.acquire(timeout=left):
                break
            address, error = self.arrived.popleft()
            results[address] = error
        return results

    def is_running(self) -> bool:
        """Whether an address is still asked."""
        return any(thread.is_alive() for thread in self.threads)

    def give_up(self, patience: float) -> None:
        """Begin nothing new; what is under way has this many seconds to end."""
        self.is_given_up = True
        end = time.monotonic() + patience
        for thread in self.threads:
            if thread.is_alive():
                thread.join(max(end - time.monotonic(), 0))


class Client:
    """One run of the client. Args: arguments, of the command line. Raises UserError."""

    def __init__(self, config: Config, arguments: SimpleNamespace) -> None:
        self.arguments = arguments
        self.user = config.default_user if arguments.user is None else arguments.user
        if self.user not in config.keys:
            hint = "copy the user's line from the server's [KEYS], or name another user with -u ID"
            raise UserError(f"{config.path}: [KEYS] has no key for user {self.user:08X}", hint)
        self.say(f"read {config.path}: the key of user {self.user:08X}")
        self.key = config.keys[self.user]
        self.resources = find_resources(config, arguments, self.user)
        self.protocol = arguments.protocol or config.protocols[0]
        self.timeout = max(min(config.control_timeout, LONGEST_WAIT_S), 0.001)
        self.port = arguments.server_port or config.port
        # As in a URL: [2001:db8::1]
        self.host = re.sub(r"^\[(.*:.*)\]$", r"\1", arguments.host)
        self.targets = resolve(self.host, self.port, arguments.families)
        self.say(f"server: {' and '.join(self.targets)}, control port {self.port}/{self.protocol}")
        self.is_quiet = arguments.quiet or arguments.command.name == "connect"
        # Where each resource was opened, in this order, even if the answer came late.
        self.opened: dict[Resource, list[str]] = {r: [] for r in self.resources}
        self.races: list[Race] = []  # those that may still run

    def say(self, text: str) -> None:
        """With --verbose, tell the user of a step, and how long after the start it came."""
        if self.arguments.verbose:
            tell(f"{1000 * (time.monotonic() - STARTED):.0f} ms  {text}")

    def host_text(self, addresses: Iterable[str]) -> str:
        """The host as the user gave it, with these of its addresses."""
        names = ", ".join(addresses)
        return names if names == self.host else f"{self.host} ({names})"

    def attempt(self, operation: int, resource: int, address: str, race: Race) -> UserError | None:
        """Knock or revoke at one address; returns what went wrong, None for success."""
        exchange = exchange_tcp if self.protocol == "tcp" else exchange_udp
        host = self.host_text([address])

        def say(text: str) -> None:
            self.say(f"{host}: {text}")

        def say_warning(text: str) -> None:
            warn(f"{host}: {text}")

        def new_handshake() -> Handshake:
            if race.is_given_up:
                raise Unsent("given up: it is about to be closed")
            return client_handshake(operation, self.user, resource, self.key, say_warning, say)

        try:
            exchange(new_handshake, self.targets[address], self.timeout, say)
            return None
        except (ProtocolError, OSError) as error:
            failure = self.explain(error, address)
        except Unsent as error:
            failure = error
        except Exception as error:  # nobody sees an exception in a thread
            failure = UserError(f"{error!r}", BUG_HINT)
        say(str(failure))
        return failure

    def explain(self, error: ProtocolError | OSError, address: str) -> UserError:
        """What an error on the way to an address means, and what to do about it."""
        target = self.targets[address]
        kind: object = error.errno if isinstance(error, OSError) else type(error)
        detail = ""
        if isinstance(error, (socket.timeout, TimeoutError)):
            kind, detail = errno.ETIMEDOUT, self.protocol
        elif kind == errno.EINVAL and address.startswith("fe"):
            detail = "link-local"
        elif getattr(error, "is_challenged", False):
            detail = "challenged"
        elif kind == errno.EADDRNOTAVAIL and target.local:
            lost = f"this machine no longer has the address {target.local[0]}"
            return AddressLost(lost, "what is open for it closes by itself")
        told_as, problem, hint = CAUSES.get((kind, detail), CAUSES[OTHER_CAUSE])
        facts = {
            "port": f"{self.port}/{self.protocol}",
            "patience": self.timeout,
            "version": 6 if target.family == socket.AF_INET6 else 4,
            "error": getattr(error, "strerror", None) or str(error),
        }
        return told_as(problem.format(**facts), hint.format(**facts))

    def begin(self, operation: int, resource: Resource, addresses: Iterable[str] = ()) -> Race:
        """Begin to knock or revoke at these addresses; without any, at all of them."""
        opened = self.opened[resource]

        def ask(address: str) -> UserError | None:
            error = self.attempt(operation, resource.identifier, address, race)
            if operation == KNOCK and not error and address not in opened:
                opened.append(address)
            return error

        race = Race(ask, addresses or self.targets)
        self.races = [*filter(Race.is_running, self.races), race]
        race.start()
        return race

    def finish(self, race: Race, resource: Resource) -> Results:
        """Wait until there are enough answers, with those of all addresses where it is open."""

        def is_enough(results: Results) -> bool:
            is_open = set(self.opened[resource]).intersection(race.addresses)
            return results.keys() >= is_open and not self.unmet(race, results)

        results = race.wait(is_enough)
        for address in race.addresses:
            if address not in results:
                host = self.host_text([address])
                self.say(f"{host}: no answer within {OTHER_ADDRESS_S:g} s more")
        return results

    def unmet(self, race: Race, results: Results) -> set[int]:
        """The families that still lack a success. Without -4 and -6, one anywhere is enough."""
        families = {self.targets[address].family for address in race.addresses}
        good = {self.targets[address].family for address, error in results.items() if not error}
        if good and not self.arguments.families:
            return set()
        return families - good

    def failure(self, race: Race, results: Results) -> UserError | None:
        """Where it failed, and why; None for success. A server's word says more than the silence of
        another address, and that more than a missing route."""
        unmet = self.unmet(race, results)
        relevant = [each for each in race.addresses if self.targets[each].family in unmet]
        errors = {each: error for each in relevant if (error := results.get(each))}
        if not errors:
            return None

        def rank(error: UserError) -> tuple[bool, bool]:
            return isinstance(error, Rejected), not isinstance(error, Unsent)

        best = max(errors.values(), key=rank)
        addresses = [each for each, error in errors.items() if error.problem == best.problem]
        return type(best)(f"{self.host_text(addresses)}: {best}", best.hint)

    def ask_all(self, operation: int) -> list[Resource]:
        """Knock or revoke for each resource, and tell the user; returns those where it worked. A
        server that cannot be reached for one is not asked for the others."""
        done = []
        # What is the same is told once. By problem: the error, and the names of resources.
        failures: dict[str, tuple[UserError, list[str]]] = {}
        for number, resource in enumerate(self.resources):
            race = self.begin(operation, resource)
            results = self.finish(race, resource)
            error = self.failure(race, results)
            if error is None:
                if self.tell_done(operation, resource, race, results):
                    done.append(resource)
                continue
            is_reached = isinstance(error, Rejected)
            affected = [resource] if is_reached else self.resources[number:]
            _, names = failures.setdefault(error.problem, (error, []))
            names += map(name_of, affected)
            if not is_reached:
                break
        for error, names in failures.values():
            *others, last = names
            all_names = f"{', '.join(others)} and {last}" if others else last
            tell_error(not_done(operation, all_names, error))
        return done

    def tell_done(self, operation: int, resource: Resource, race: Race, results: Results) -> bool:
        """Tell the user of a success; returns False if nobody reads it."""
        name = name_of(resource)
        if operation == KNOCK and (resource.port or resource.jumps):
            limit = f"{resource.timeout:g} s, unless the server's file says otherwise"
            self.say(f"{name} is open to this machine for {limit}")
        if self.is_quiet:
            return True
        for address, error in results.items():
            if isinstance(error, Rejected):
                here = UserError(f"{self.host_text([address])}: {error}", error.hint)
                tell_error(not_done(operation, name, here), "note")
        good = [each for each in race.addresses if each in results and not results[each]]
        line = f"{DONE[operation]} {name} on {self.arguments.host} ({', '.join(good)})"
        if self.arguments.to_run:
            tell(line)  # standard output is COMMAND's
            return True
        try:
            print(line, flush=True)
        except OSError:  # go on with the other resources
            return False
        return True

    def keep_only_opened(self) -> None:
        """Forget what was not opened, so that it is not closed either; with -4 -6 one address may
        be open alone. From here on, success is not told."""
        self.resources = [resource for resource in self.resources if self.opened[resource]]
        self.is_quiet = True

    def be_quick(self, lease: float) -> None:
        """Leave time for another try within a lease of this length, in s."""
        self.timeout = min(self.timeout, max(lease / 8, 1.0))

    def bind_to(self, address: str, local: tuple[Any, ...]) -> None:
        """Send to this address from that one of ours alone."""
        self.targets[address] = self.targets[address]._replace(local=local)


class Hold:
    """`connect` and COMMAND: open all, renew it while it is used, and close it, whatever happens.

    A signal may come at any moment. Before anything is carried or run, and while data is carried,
    stop() raises SystemExit, which leads to _close(). Python swallows exceptions that are raised
    inside its own callbacks (during an import, for instance): then _obey() raises it again. From
    just before COMMAND starts, signals are for COMMAND. While we close, they are ignored."""

    def __init__(self, client: Client) -> None:
        import threading
        self.client = client
        self.may_renew = threading.Lock()  # held while a renewal begins, and by _close() for good
        # Where to renew: at all addresses, or where `connect` has its connection.
        self.addresses: list[str] = list(client.targets)
        self.ended_by = 0  # a signal's number

    def run(self) -> int:
        """Returns the exit status. Raises UserError, OSError."""
        client = self.client

        def stop(number: int, _: object) -> None:
            self.ended_by = number
            catch_signals(signal.SIG_IGN)
            raise SystemExit(128 + number)

        def print_nothing(_: object) -> None:
            """Of an exception that Python swallows: it is that of stop()."""

        sys.unraisablehook = print_nothing
        catch_signals(stop)
        try:
            try:
                is_good = client.ask_all(KNOCK) == client.resources
                client.keep_only_opened()
                if not is_good:
                    return 1
                return self._run_command() if client.arguments.to_run else self._connect()
            finally:
                catch_signals(signal.SIG_IGN)
        finally:  # another one: a signal may interrupt the inner one before it is ignored
            self._close()

    def _obey(self) -> None:
        """End the program if a signal has come, and Python has swallowed what stop() raised."""
        if self.ended_by:
            raise SystemExit(128 + self.ended_by)

    def _close(self) -> None:
        """End renewing, and close what was opened unless it is to stay."""
        self.may_renew.acquire()  # for good: nothing is renewed from here on
        for race in self.client.races:
            race.give_up(OTHER_ADDRESS_S)  # or it may open what was closed just before
        if not self.client.arguments.keep:
            self.client.ask_all(REVOKE)

    def _renew(self) -> None:
        """Knock again in the middle of each lease, for ever; for a thread of its own. Tells the
        user if a lease ends meanwhile."""
        client = self.client
        try:
            timeouts = [resource.timeout for resource in client.resources]
            lease = max(2.0, min(LONGEST_WAIT_S, *timeouts))
            client.be_quick(lease)
            retries = Backoff((min(RENEWAL_RETRY_S, lease / 8), RENEWAL_RETRY_LIMIT_S))
            pause = lease / 2
            end = time.monotonic() + lease
            is_told = False
            while True:
                time.sleep(pause)
                begun = time.monotonic()
                error = self._knock_again()
                if error is None:
                    pause = lease / 2
                    end = begun + lease
                    is_told = False
                    retries.reset()
                    continue
                pause = retries.take()
                client.say(f"not renewed yet: {error}")
                if not is_told and (isinstance(error, AddressLost) or time.monotonic() >= end):
                    is_told = True
                    tell_error(UserError(f"cannot renew {error}", error.hint))
        except Exception as error:  # nobody sees an exception in a thread
            tell_error(UserError(f"cannot renew what was opened: {error!r}", BUG_HINT))

    def _knock_again(self) -> UserError | None:
        """Knock for each resource once more; returns what went wrong."""
        errors = []
        for resource in self.client.resources:
            with self.may_renew:
                race = self.client.begin(KNOCK, resource, self.addresses)
            error = self.client.failure(race, self.client.finish(race, resource))
            if error:
                errors.append(type(error)(f"{name_of(resource)} on {error}", error.hint))
        return errors[0] if errors else None

    def _run_command(self) -> int:
        """Run COMMAND to its end; returns its exit status, as a shell would."""
        import subprocess
        start_thread(self._renew)
        early: list[int] = []
        catch_signals(lambda number, _: early.append(number))
        self._obey()
        command = self.client.arguments.to_run
        try:
            process = subprocess.Popen(command)
        except OSError as error:
            return tell_not_run(command[0], error)

        # A terminal sends its Ctrl-C and Ctrl-\ to COMMAND itself. Windows has no SIGQUIT.
        from_terminal = [signal.SIGINT, getattr(signal, "SIGQUIT", None)] if os.isatty(0) else []

        def pass_on(number: int, _: object) -> None:
            if number not in from_terminal:
                process.send_signal(number)

        catch_signals(pass_on)
        for number in early:
            pass_on(number, None)
        status = process.wait()
        return status if status >= 0 else 128 - status

    def _connect(self) -> int:
        """Carry standard input and output over a connection; returns 0. Raises UserError."""
        address, peer = self._reach()
        keep_alive(peer)
        # The connection has a use for this lease alone, and only from the address that it has.
        self.addresses = [address]
        ours, _, *flow_and_scope = peer.getsockname()
        self.client.bind_to(address, local=(ours, 0, *flow_and_scope))
        start_thread(self._renew)
        self.client.say("connected: carrying standard input and output")
        self._obey()
        Carrier(peer).run()
        return 0

    def _reach(self) -> tuple[str, socket.socket]:
        """Connect where it was opened; returns that address, and the connection. Knocks once more
        if that fails: somebody behind our address may have closed it. Raises UserError."""
        client = self.client
        port = client.arguments.ports[0]
        resource = client.resources[0]
        for is_last, patience in ((False, CONNECT_S), (True, client.timeout)):
            for address in client.opened[resource]:
                name: Any = address.encode()  # as bytes: see look_up()
                client.say(f"{client.host_text([address])}: connecting to port {port}")
                try:
                    peer = socket.create_connection((name, port), patience)
                    peer.settimeout(None)
                    return address, peer
                except OSError as error:
                    reason = error.strerror or f"no answer within {patience:g} s"
            if not is_last:
                client.ask_all(KNOCK)
        host = client.host_text(client.opened[resource])
        hint = "see whether the service runs on the server, and listens on this address"
        if resource.port not in (0, port):
            hint = f"name a resource that opens port {port}, or connect to port {resource.port}"
        problem = f"opened {name_of(resource)} on {host}, but cannot connect to port {port}"
        raise UserError(f"{problem}: {reason}", hint)


def tell_not_run(name: str, error: OSError) -> int:
    """Tell why COMMAND cannot be run; returns the exit status that a shell has for it."""
    status, problem = 126, error.strerror
    hint = "make it executable: chmod +x; a script begins with a line such as #!/bin/sh"
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        status, problem = 127, "not found"
        hint = "check its name, PATH and, if it is a script, the program that its first line names"
    tell_error(UserError(f"cannot run {name!r}: {problem}", hint))
    return status


def keep_alive(peer: socket.socket) -> None:
    """Have the kernel notice if the peer has vanished."""
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


class Carrier:
    """Carries standard input to a connection, and what comes from there to standard output."""

    def __init__(self, peer: socket.socket) -> None:
        self.peer = peer
        self.sent = 0  # bytes
        self.failure: UserError | None = None  # of the upload

    def run(self) -> None:
        """Carry until both directions have ended, or nobody reads the output any more. Raises
        UserError if anything may have been lost."""
        uploader = start_thread(self._upload)
        try:
            while data := self.peer.recv(CHUNK):
                if not self._write(data):
                    return
        except OSError as error:  # perhaps after _fail(), which tells why
            raise self.failure or broken(error) from None
        sent_before = self.sent
        drop_output()
        while uploader.is_alive():
            uploader.join(GONE_CHECK_S)
            if self.failure:
                break
            number = self.peer.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if number and self.sent > sent_before:
                raise broken(OSError(number, os.strerror(number)))
            if number:
                return  # the peer has gone, but nothing was sent after its end: nothing is lost
        if self.failure:
            raise self.failure

    def _write(self, data: bytes) -> bool:
        """Write to standard output; returns False if nobody reads it. Raises UserError."""
        while data:
            try:
                data = data[os.write(1, data) :]
            except BlockingIOError:  # our parent has made it so
                select.select([], [1], [])
            except ConnectionError:
                return False
            except OSError as error:
                problem = f"cannot write standard output: {error.strerror}"
                raise UserError(problem, "check where the output goes") from None
        return True

    def _upload(self) -> None:
        try:
            while data := self._read():
                self.sent += len(data)
                self.peer.sendall(data)
            with contextlib.suppress(OSError):  # the other direction will see it, too
                self.peer.shutdown(socket.SHUT_WR)
        except UserError as error:
            self._fail(error)
        except OSError as error:
            self._fail(broken(error))
        except Exception as error:  # nobody sees an exception in a thread
            self._fail(UserError(f"{error!r}", BUG_HINT))

    def _fail(self, failure: UserError) -> None:
        """End the other direction as well."""
        self.failure = failure
        with contextlib.suppress(OSError):
            self.peer.shutdown(socket.SHUT_RDWR)

    def _read(self) -> bytes:
        """Some of standard input, b"" at its end."""
        while True:
            try:
                return os.read(0, CHUNK)
            except BlockingIOError:  # our parent has made it so
                select.select([0], [], [])
            except OSError as error:
                problem = f"cannot read standard input: {error.strerror}"
                raise UserError(problem, "check where the input comes from") from None


def broken(error: OSError) -> UserError:
    """What to tell of a connection that did not end as it should."""
    hint = "connect again: some of what was sent or still to come may be lost"
    return UserError(f"the connection broke: {error.strerror}", hint)


def drop_output() -> None:
    """Close standard output so that Python does not complain about it."""
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)


def catch_signals(handler: Any) -> None:
    """Set a handler, as for signal.signal(), for the signals that would end this program."""
    for name in ("SIGINT", "SIGQUIT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has neither SIGQUIT nor SIGHUP
        if number and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


# ==== 4  Firewall ============================================================
# A lease is an element with a timeout in an nftables set: the kernel ends it even if we die.
#
#     set letmein-4, letmein-6    address . protocol . port, for all ports
#     set letmein-ID-4, -6        addresses that hold the jump resource ID
#     set letmein-ID-gate         ip and ip6, while anybody holds ID: for jumps of all traffic
#
# Sets and rules are few and change rarely: nft makes them, from a readable script. Leases come and
# go: they are sent over netlink(7), in some 50 microseconds.
# (nft takes 2 ms to start, and nft 1.0.6 reads all large sets of a table before it adds one
# element: 5 s with a block list of 300,000 ranges.) What the kernel has is read the same way.
#
# On the way down: Leases, who holds what; what that is in nftables; Nft and Kernel, the two ways to
# tell the kernel; checks of somebody's ruleset; Table, all that is ours in it; Look, which compares
# and heals it; Firewall, which clients ask, and which knows when to look.
#
# Sources: nft(8), linux/netfilter/nf_tables.h; the traps were measured on Linux 6.18.

SHORTEST_LEASE_S = 0.001  # the kernel takes 0 for "for ever": what is shorter is not installed
LONGEST_LEASE_S = 99_999_999.0  # nft(8) prints no more
EVERYBODY = "*"  # as the address of a gate
ENDED = 0.0  # as the end of a lease that was ended
GATE_COMMENT = "gate"
COMMENT = re.compile(
    "user=(?P<user>[0-9A-F]{8}) resource=(?P<resource>[0-9A-F]{8})"
    r" boot=(?P<boot>\S{8}) proof=(?P<proof>\S{8})"
)
# A socket sends some 160 to 210 KB at once (net.core.wmem_default). A lease takes up to 1.1 KB: two
# elements, each added, deleted and added again, in a table with a name of 64 characters.
LEASES_PER_BATCH = 100


def in_batches(items: list[Item]) -> Iterator[list[Item]]:
    """The items, as many at a time as fit into one transaction."""
    for start in range(0, len(items), LEASES_PER_BATCH):
        yield items[start : start + LEASES_PER_BATCH]


class LeaseKey(NamedTuple):
    """One address has one lease of a resource; two users behind it share that."""

    address: str
    resource: int


class Lease(NamedTuple):
    """That an address may use a resource, until ends (time.monotonic()). A gate is the same for
    EVERYBODY: it has no user, and weighs nothing."""

    address: str
    resource: int
    user: int = 0
    proof: str = ""  # of the key that it was given for and what the resource meant: lease_proof()
    weight: int = 0  # how much it counts against max-nr-rules
    ends: float = ENDED

    @property
    def key(self) -> LeaseKey:
        return LeaseKey(self.address, self.resource)

    def ended(self) -> Lease:
        """This lease as a change: the kernel is to drop it. Table.commit() takes both kinds."""
        return self._replace(ends=ENDED)


@functools.lru_cache(10_000)
def lease_proof(key: bytes, boot: str, meaning: str) -> str:
    """8 hex digits that change with a user's key, the boot, and what a resource means. Anybody may
    see them in the kernel, next to the lease: a keyed hash tells nothing of the key."""
    import hmac
    return hmac.digest(key, f"lease {boot} {meaning}".encode(), "sha3_256").hex()[:8]


def lease_comment(lease: Lease, boot: str) -> str:
    """The comment of a lease's elements. It tells people whose they are, and a server that starts
    later whether they still count."""
    if lease.address == EVERYBODY:
        return GATE_COMMENT
    ids = f"user={lease.user:08X} resource={lease.resource:08X}"
    return f"{ids} boot={boot} proof={lease.proof}"


def time_granted(config: Config, boot: str, user: int, resource: int, proof: str) -> float:
    """How long a configuration grants a lease with this proof from now on, in s; 0: not at all."""
    if user not in config.keys or config.why_not(user, resource):
        return 0.0
    found = config.resources[resource]
    if lease_proof(config.keys[user], boot, found.meaning) != proof:
        return 0.0
    return config.longest_lease(user, found)


class Leases:
    """The table of leases: who holds what, who holds most, and whose time is over. Pure: it knows
    neither nft nor the kernel, and gets the time as an argument."""

    def __init__(self) -> None:
        self.by_key: dict[LeaseKey, Lease] = {}
        self.weight = 0  # of all
        self.of_user: dict[int, dict[LeaseKey, None]] = {}  # by user, the longest unrenewed first
        self.weights: dict[int, int] = {}  # by user
        self.ending: dict[int, dict[LeaseKey, None]] = {}  # by the second of their end

    def __len__(self) -> int:
        return len(self.by_key)

    def keep(self, lease: Lease) -> None:
        """Note a lease, in place of the one that has its key."""
        self.forget(lease.key)
        self.by_key[lease.key] = lease
        self.weight += lease.weight
        self.of_user.setdefault(lease.user, {})[lease.key] = None
        self.weights[lease.user] = self.weights.get(lease.user, 0) + lease.weight
        self.ending.setdefault(int(lease.ends), {})[lease.key] = None

    def forget(self, key: LeaseKey) -> None:
        """Note the end of a lease, if there is one."""
        lease = self.by_key.pop(key, None)
        if lease is None:
            return
        self.weight -= lease.weight
        self.weights[lease.user] -= lease.weight
        del self.of_user[lease.user][key]
        if not self.of_user[lease.user]:  # a weight of 0 does not tell: gates weigh nothing
            del self.of_user[lease.user], self.weights[lease.user]
        second = int(lease.ends)
        del self.ending[second][key]
        if not self.ending[second]:
            del self.ending[second]

    def expire(self, now: float) -> list[Lease]:
        """Forget the leases that have ended, and return them: the kernel sends no word of it."""
        ended = []
        for second in [second for second in self.ending if second <= now]:
            for key in list(self.ending[second]):
                if self.by_key[key].ends <= now:
                    ended.append(self.by_key[key])
                    self.forget(key)
        return ended

    def last_ends(self, without: frozenset[LeaseKey] = frozenset()) -> dict[int, float]:
        """By resource, when its last lease ends. Args: without, those that do not count."""
        ends: dict[int, float] = {}
        for key, lease in self.by_key.items():
            if key not in without:
                ends[key.resource] = max(ends.get(key.resource, ENDED), lease.ends)
        return ends

    def make_room(self, lease: Lease, limit: int) -> list[Lease]:
        """The leases that have to end for this one, so that all weigh no more than limit: the
        oldest of whoever holds most, so nobody is kept out by others."""
        goal = max(limit, self.weight)  # a limit that was lowered ends no lease
        held = self.by_key.get(lease.key)
        weight = self.weight + lease.weight - (held.weight if held else 0)
        weights = dict(self.weights)
        weights[lease.user] = weights.get(lease.user, 0) + lease.weight
        queues: dict[int, Iterator[LeaseKey]] = {}
        displaced: list[Lease] = []
        while weight > goal:
            user = max(weights, key=weights.__getitem__)
            queue = queues.setdefault(user, iter(self.of_user.get(user, ())))
            key = next(queue, None)
            if key is None:
                del weights[user]
            elif key != lease.key:
                oldest = self.by_key[key]
                displaced.append(oldest)
                weight -= oldest.weight
                weights[user] -= oldest.weight
        return displaced


VERSIONS = {"inet": (4, 6), "ip": (4,), "ip6": (6,)}  # IP versions, by table family
IP = {4: "ip", 6: "ip6"}
PROTOCOL_NUMBERS = {"tcp": 6, "udp": 17}
OUR_SET = re.compile(r"letmein-(?:[0-9A-F]{8}-)?(?:4|6|gate)")
PORT_KEY = struct.Struct("!B3xH2x")  # protocol and port behind the address: fields of 4 bytes
GATE_KEYS = {4: bytes.fromhex("0800"), 6: bytes.fromhex("86DD")}  # linux/if_ether.h


class Ruleset(NamedTuple):
    """Our part of the table, but for the leases."""

    sets: dict[str, str]  # by name, the type of its elements
    rules: list[str]  # each behind the name of its chain
    rule_comment: str  # of each rule; it changes with the rules


def ruleset(config: Config) -> Ruleset:
    """What a server with this configuration has in its table, but for the leases."""
    chains, versions = config.chains, VERSIONS[config.family]
    sets: dict[str, str] = {}
    rules = [f"{chains['input']} {proto} dport {config.port} accept" for proto in config.protocols]
    for version in versions:
        sets[f"letmein-{version}"] = f"ipv{version}_addr . inet_proto . inet_service"
        key = f"{IP[version]} saddr . meta l4proto . th dport"
        rules.append(f"{chains['input']} {key} @letmein-{version} accept")
    for resource in config.resources.values():
        name = f"letmein-{resource.identifier:08X}"
        if resource.jumps:
            sets.update({f"{name}-{version}": f"ipv{version}_addr" for version in versions})
        if resource.is_gate:
            sets[f"{name}-gate"] = "ether_type"
        for hook, target, match_saddr in resource.jumps:
            # Families ip and ip6 take no `meta nfproto`; the ether type does in all three.
            keys = [f"meta protocol @{name}-gate"]
            if match_saddr:
                keys = [f"{IP[version]} saddr @{name}-{version}" for version in versions]
            if hook in chains:
                rules += [f"{chains[hook]} {key} jump {target}" for key in keys]
    comment = f"letmein {checksum(tuple(rules))}"
    return Ruleset(sets, [f'{rule} comment "{comment}"' for rule in rules], comment)


def ruleset_script(config: Config) -> str:
    """The nft script that adds our rules, and makes sets that are not there. It leaves alone what
    is in the sets, and all that is not ours."""
    table, ours = config.table_name, ruleset(config)
    lines = []
    for name, kind in ours.sets.items():
        lines.append(f"add set {table} {name} {{ type {kind}; flags timeout; counter; }}")
    lines += [f"add rule {table} {rule}" for rule in ours.rules]
    return "".join(line + "\n" for line in lines)


class ElementName(NamedTuple):
    """Where an element of a lease is: the set, and the key as the kernel has it."""

    set_name: str
    key: bytes


def lease_elements(lease: Lease, config: Config) -> list[ElementName]:
    """The elements that make up a lease, or a gate."""
    jump_set = f"letmein-{lease.resource:08X}"
    if lease.address == EVERYBODY:
        keys = [GATE_KEYS[version] for version in VERSIONS[config.family]]
        return [ElementName(f"{jump_set}-gate", key) for key in keys]
    version, family = (6, socket.AF_INET6) if ":" in lease.address else (4, socket.AF_INET)
    address = socket.inet_pton(family, lease.address)
    resource = config.resources[lease.resource]
    names = []
    for protocol in resource.protocols:
        key = address + PORT_KEY.pack(PROTOCOL_NUMBERS[protocol], resource.port)
        names.append(ElementName(f"letmein-{version}", key))
    if resource.jumps:
        names.append(ElementName(f"{jump_set}-{version}", address))
    return names


def read_key(name: ElementName) -> tuple[str, tuple[int, int] | None]:
    """What the key of an element says: the address ("" if it is none of ours), and protocol and
    port, if they are in it."""
    if name.set_name.endswith("-gate"):
        address = EVERYBODY if name.key in GATE_KEYS.values() else ""
        return address, None
    size, family = (16, socket.AF_INET6) if name.set_name.endswith("-6") else (4, socket.AF_INET)
    packed, port_key = name.key[:size], name.key[size:]
    if len(packed) != size or len(port_key) not in (0, PORT_KEY.size):
        return "", None
    return socket.inet_ntop(family, packed), PORT_KEY.unpack(port_key) if port_key else None


TRUSTED_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
LISTING_LIMIT = 16 << 20  # bytes of what nft says
NFT_LIMIT_S = (4.0, 60.0)  # an nft that takes longer is killed: at least, and at most
SLOW_NFT_S = 0.5  # --check warns of an nft that takes longer
TICK_S = 0.001  # between two looks whether a process has ended


def await_end(process: int, limit: float) -> int:
    """Wait for a child process, and kill it after limit seconds. Returns its exit status, or minus
    a signal. (The subprocess module would sleep for longer than nft takes; to wait by pidfd_open(2)
    takes a descriptor, and there may be none.)"""
    give_up = time.monotonic() + limit
    while not os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        if time.monotonic() > give_up:
            os.kill(process, signal.SIGKILL)
            break
        time.sleep(TICK_S)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


class Nft:
    """The one place that runs nft. Args: name, a path, or to be found in TRUSTED_PATH."""

    def __init__(self, name: str) -> None:
        places = [os.path.join(place, name) for place in TRUSTED_PATH.split(":")]
        self.path = next((path for path in places if os.access(path, os.X_OK)), places[0])
        self.limit = NFT_LIMIT_S[0]  # in s, for the next run

    def run(self, script: str, *arguments: str) -> str:
        """Run a script, and return what nft says. Raises UserError with its words. An nft that
        takes too long is killed, having perhaps done its work. After each run, the next one may
        take twice as long."""
        command = [self.path, *arguments, "-f", "-"]
        environment = {"PATH": TRUSTED_PATH, "LC_ALL": "C"}
        try:
            # Files in memory hold what nft reads and says: nobody has to serve it while it runs.
            files = [os.fdopen(os.memfd_create("nft"), "w+b") for _ in range(2)]
        except OSError as error:
            raise UserError(f"cannot run nft: {error.strerror}", "close other programs") from None
        with files[0] as text, files[1] as said:
            streams = [(os.POSIX_SPAWN_DUP2, text.fileno(), 0)]
            streams += [(os.POSIX_SPAWN_DUP2, said.fileno(), number) for number in (1, 2)]
            text.write(script.encode("ascii"))
            text.seek(0)
            began = time.monotonic()
            try:
                process = os.posix_spawn(self.path, command, environment, file_actions=streams)
                status = await_end(process, self.limit)
            except OSError as error:
                hint = "install nftables, or set exe in [NFTABLES] to an absolute path"
                if error.errno in (errno.EAGAIN, errno.ENOMEM):
                    hint = "a limit of processes or memory is reached: end other programs"
                raise UserError(f"cannot run {shown(self.path)}: {error.strerror}", hint) from None
            said.seek(0)
            words = said.read(LISTING_LIMIT).decode("utf-8", "replace")
            limit, took = self.limit, time.monotonic() - began
            self.limit = min(max(2 * took, NFT_LIMIT_S[0]), NFT_LIMIT_S[1])
            self._raise_if_failed(status, words, limit)
            return words

    def _raise_if_failed(self, status: int, said: str, limit: float) -> None:
        """Raise UserError if nft did not do what it was told."""
        if status == -9:
            hint = "the machine is busy, or the table holds large sets of others: move those away"
            raise UserError(f"nft did not end within {limit:g} s", hint)
        if status:
            # What is wrong, and the statement it is about.
            problem = ": ".join(said.strip().split("\n")[:2])
            hint = f"compare with the rules that the kernel has: {self.path} list ruleset"
            raise UserError(problem or f"nft ended with status {status}", hint)


# The kernel's nftables by netlink: linux/netlink.h, linux/netfilter/nfnetlink.h, nf_tables.h.
# A message is a header of netlink, one of netfilter, and attributes, each a type and a value.
NETLINK_NETFILTER, NFNLGRP_NFTABLES, NFNL_SUBSYS_NFTABLES = 12, 7, 10
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP, NLM_F_EXCL, NLM_F_CREATE = 0x1, 0x4, 0x300, 0x200, 0x400
NFPROTO = {"inet": 1, "ip": 2, "ip6": 10}  # linux/netfilter.h
# Types of messages; those of nftables name their subsystem.
NLMSG_ERROR, NLMSG_DONE, NFNL_MSG_BATCH_BEGIN, NFNL_MSG_BATCH_END = 2, 3, 16, 17
GETTABLE, NEWCHAIN, GETCHAIN, GETRULE, GETSET, NEWSETELEM, GETSETELEM, DELSETELEM = (
    NFNL_SUBSYS_NFTABLES << 8 | number for number in (1, 3, 4, 7, 10, 12, 13, 14)
)
# Types of attributes: of a table, chain, rule, set, list of elements, element, and what these hold.
NLA_F_NESTED, NLA_TYPE_MASK = 0x8000, 0x3FFF
NFTA_TABLE_NAME, NFTA_TABLE_FLAGS, NFTA_TABLE_HANDLE, NFT_TABLE_F_OWNER = 1, 2, 4, 0x2
NFTA_CHAIN_TABLE, NFTA_CHAIN_NAME, NFTA_CHAIN_HOOK, NFTA_CHAIN_USE = 1, 3, 4, 6
NFTA_RULE_TABLE, NFTA_RULE_CHAIN, NFTA_RULE_HANDLE, NFTA_RULE_USERDATA = 1, 2, 3, 7
NFTA_SET_TABLE, NFTA_SET_NAME, NFTA_SET_HANDLE = 1, 2, 16
NFTA_LIST_TABLE, NFTA_LIST_SET, NFTA_LIST_ELEMENTS, NFTA_LIST_ELEMENT = 1, 2, 3, 1
NFTA_ELEM_KEY, NFTA_ELEM_FLAGS, NFT_SET_ELEM_CATCHALL = 1, 3, 0x2
NFTA_ELEM_TIMEOUT, NFTA_ELEM_EXPIRATION, NFTA_ELEM_USERDATA = 4, 5, 6
NFTA_ELEM_EXPR, NFTA_ELEM_EXPRESSIONS, NFTA_DATA_VALUE, NFTA_EXPR_DATA = 7, 11, 1, 2
NFTA_COUNTER_BYTES, NFTA_COUNTER_PACKETS = 1, 2
COMMENT_TYPE = 0  # in user data, which is nft's own: libnftnl/udata.h
NETLINK_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence number, port
NETFILTER_HEADER = struct.Struct("!BBH")  # family, version, of a transaction: the subsystem
ATTRIBUTE_HEADER = struct.Struct("=HH")  # length, type
RECEIVE_SIZE = 1 << 17  # bytes, more than the kernel sends at once
NOTIFICATION_BUFFER = 8 << 20  # bytes; enough for 10,000 elements in one transaction
SO_RCVBUFFORCE = 33  # asm-generic/socket.h


def set_receive_buffer(receiver: socket.socket, size: int) -> None:
    """Let a socket hold up to size bytes, or as much as our rights allow; see socket(7)."""
    receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)
    with contextlib.suppress(PermissionError):  # it takes root in the first user namespace
        receiver.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, size)


class Element(NamedTuple):
    """One element of a set, as the kernel has it."""

    key: bytes  # b"" of nft's `*`, which stands for all that the set does not have
    left: float  # in s; NEVER for one without a timeout
    read_at: float  # by time.monotonic(), just before: it ends at read_at + left, or later
    comment: str
    packets: int
    octets: int


class Rule(NamedTuple):
    """One rule of a chain, as far as it matters to us."""

    chain: str
    handle: int
    comment: str


class Change(NamedTuple):
    """A change of nftables that the kernel is asked for: what a message says."""

    kind: int  # NEWSETELEM or DELSETELEM
    flags: int
    attributes: bytes


def attribute(kind: int, value: bytes) -> bytes:
    """One attribute of a netlink message, padded to 4 bytes."""
    length = ATTRIBUTE_HEADER.size + len(value)
    return ATTRIBUTE_HEADER.pack(length, kind) + value + bytes(-length % 4)


def nested(kind: int, *values: bytes) -> bytes:
    """An attribute that is made of others."""
    return attribute(kind | NLA_F_NESTED, b"".join(values))


def text_attribute(kind: int, text: str) -> bytes:
    """An attribute that is a text."""
    return attribute(kind, text.encode("ascii") + b"\0")


def key_attribute(key: bytes) -> bytes:
    """What names an element in a message; see Element."""
    if not key:
        return attribute(NFTA_ELEM_FLAGS, struct.pack("!I", NFT_SET_ELEM_CATCHALL))
    return nested(NFTA_ELEM_KEY, attribute(NFTA_DATA_VALUE, key))


def each_attribute(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The attributes in a message, or in another attribute: type and value of each."""
    offset, end = 0, len(data) - ATTRIBUTE_HEADER.size
    while offset <= end:
        length, kind = ATTRIBUTE_HEADER.unpack_from(data, offset)
        if length < ATTRIBUTE_HEADER.size:
            return  # no kernel writes that; it would lead nowhere
        yield kind & NLA_TYPE_MASK, data[offset + ATTRIBUTE_HEADER.size : offset + length]
        offset += (length + 3) & ~3


class Attributes(dict[int, bytes]):
    """The attributes in a message, or in another attribute, by type."""

    def __init__(self, data: bytes) -> None:
        super().__init__(each_attribute(data))

    def number(self, kind: int) -> int:
        """A number; 0 if it is absent."""
        return int.from_bytes(self.get(kind, b""), "big")

    def text(self, kind: int) -> str:
        """A name."""
        return self.get(kind, b"").rstrip(b"\0").decode("utf-8", "replace")

    def within(self, kind: int) -> Attributes:
        """The attributes that one is made of; none if it is absent."""
        return Attributes(self.get(kind, b""))

    def comment(self, kind: int) -> str:
        """The comment in an element's or a rule's user data: type, length, text (of libnftnl)."""
        userdata, offset = self.get(kind, b""), 0
        while offset + 2 <= len(userdata):
            what, length = userdata[offset], userdata[offset + 1]
            offset += 2
            if what == COMMENT_TYPE:
                text = userdata[offset : offset + length]
                return text.rstrip(b"\0").decode("utf-8", "replace")
            offset += length
        return ""


class Packet(NamedTuple):
    """A netlink message from the kernel."""

    kind: int
    flags: int
    sequence: int  # that of the question
    port: int  # of who asked, or who made the change
    body: bytes  # all behind the first header

    @property
    def attributes(self) -> Attributes:
        """What an answer says."""
        return Attributes(self.body[NETFILTER_HEADER.size :])

    @property
    def is_last(self) -> bool:
        """Whether it ends an answer."""
        return self.kind in (NLMSG_ERROR, NLMSG_DONE)

    def check(self) -> None:
        """Raise the OSError that it tells of, if it does."""
        (error,) = struct.unpack_from("=i", self.body) if self.is_last else (0,)
        if error:
            raise OSError(-error, os.strerror(-error))


def each_packet(data: bytes) -> Iterator[Packet]:
    """The messages in what a netlink socket has received at once."""
    offset, end = 0, len(data) - NETLINK_HEADER.size
    while offset <= end:
        length, kind, flags, sequence, port = NETLINK_HEADER.unpack_from(data, offset)
        if length < NETLINK_HEADER.size:
            return
        body = data[offset + NETLINK_HEADER.size : offset + length]
        yield Packet(kind, flags, sequence, port, body)
        offset += (length + 3) & ~3


def netlink_socket(is_listener: bool = False) -> socket.socket:
    """A socket to ask the kernel's nftables, or to be told of each change of it."""
    netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)
    if is_listener:
        set_receive_buffer(netlink, NOTIFICATION_BUFFER)
    netlink.bind((0, 1 << (NFNLGRP_NFTABLES - 1) if is_listener else 0))
    netlink.setblocking(False)  # the kernel has answered when it comes back from a call
    return netlink


class Kernel:
    """One table of the kernel's nftables, asked and changed by netlink. Each method raises OSError
    with what the kernel objects to. Args: family, as in [NFTABLES]; table, its name."""

    def __init__(self, family: str, table: str) -> None:
        self.family = NFPROTO[family]
        self.table = table
        self.sequence = 0
        self.socket = netlink_socket()
        # As long as we hold it nobody else has this port: so it marks changes as ours.
        self.port = self.socket.getsockname()[0]

    # -- how it is asked

    def _message(self, kind: int, flags: int, attributes: bytes) -> bytes:
        """One message of ours."""
        self.sequence = (self.sequence + 1) & 0xFFFFFFFF
        body = NETFILTER_HEADER.pack(self.family, 0, NFNL_SUBSYS_NFTABLES) + attributes
        length = NETLINK_HEADER.size + len(body)
        return NETLINK_HEADER.pack(length, kind, flags | NLM_F_REQUEST, self.sequence, 0) + body

    def _ask(self, kind: int, *attributes: bytes, dump: bool = False) -> list[Attributes]:
        """Ask for one thing, or with dump for all such; returns the attributes of each."""
        flags = NLM_F_DUMP if dump else NLM_F_ACK
        self.socket.send(self._message(kind, flags, b"".join(attributes)))
        found: list[Attributes] = []
        while True:
            for packet in each_packet(self.socket.recv(RECEIVE_SIZE)):
                if packet.sequence != self.sequence:
                    continue  # of something that failed before
                packet.check()
                if packet.is_last:
                    return found
                found.append(packet.attributes)

    def change(self, changes: Iterable[Change]) -> None:
        """Make changes in one transaction: all or none."""
        begin = self._message(NFNL_MSG_BATCH_BEGIN, 0, b"")
        messages = [self._message(*change) for change in changes]
        end = self._message(NFNL_MSG_BATCH_END, 0, b"")
        self.socket.send(b"".join((begin, *messages, end)))
        for complaint in self._answers():  # there are none if all went well
            complaint.check()

    def _answers(self) -> list[Packet]:
        """All that has come: the next question must find nothing here."""
        answers: list[Packet] = []
        while True:
            try:
                answers += each_packet(self.socket.recv(RECEIVE_SIZE))
            except BlockingIOError:
                return answers
            except OSError as error:
                if error.errno != errno.ENOBUFS:  # more than it holds: the first ones are there
                    raise

    # -- table, chains, rules, sets

    def table_facts(self) -> tuple[int, int]:
        """The table's handle and its flags."""
        (found,) = self._ask(GETTABLE, text_attribute(NFTA_TABLE_NAME, self.table))
        return found.number(NFTA_TABLE_HANDLE), found.number(NFTA_TABLE_FLAGS)

    def base_chains(self) -> list[str]:
        """The names of the table's chains that have a hook."""
        names = []
        for found in self._ask(GETCHAIN, dump=True):  # of all tables of the family
            if found.text(NFTA_CHAIN_TABLE) == self.table and NFTA_CHAIN_HOOK in found:
                names.append(found.text(NFTA_CHAIN_NAME))
        return names

    def jumps_to(self, chain: str) -> int:
        """How many rules, or elements of verdict maps, lead to a chain."""
        table = text_attribute(NFTA_CHAIN_TABLE, self.table)
        (found,) = self._ask(GETCHAIN, table, text_attribute(NFTA_CHAIN_NAME, chain))
        # The kernel counts its own rules as well.
        return found.number(NFTA_CHAIN_USE) - len(self.rules(chain))

    def rules(self, chain: str) -> list[Rule]:
        """The rules of a chain, in their order."""
        table = text_attribute(NFTA_RULE_TABLE, self.table)
        self._ask(GETCHAIN, table, text_attribute(NFTA_CHAIN_NAME, chain))  # raises if it is none
        rules = []
        for found in self._ask(GETRULE, table, text_attribute(NFTA_RULE_CHAIN, chain), dump=True):
            comment = found.comment(NFTA_RULE_USERDATA)
            rules.append(Rule(chain, found.number(NFTA_RULE_HANDLE), comment))
        return rules

    def sets(self) -> dict[str, int]:
        """The sets of the table that have a name of ours, with their handles."""
        handles = {}
        for found in self._ask(GETSET, text_attribute(NFTA_SET_TABLE, self.table), dump=True):
            name = found.text(NFTA_SET_NAME)
            if OUR_SET.fullmatch(name):
                handles[name] = found.number(NFTA_SET_HANDLE)
        return handles

    # -- elements

    def _elements_of(self, set_name: str, elements: bytes = b"") -> bytes:
        """The attributes that say which set, and which elements of it."""
        table = text_attribute(NFTA_LIST_TABLE, self.table)
        both = table + text_attribute(NFTA_LIST_SET, set_name)
        return both + (nested(NFTA_LIST_ELEMENTS, elements) if elements else b"")

    def elements(self, set_name: str) -> Iterator[Element]:
        """The elements of a set. The kernel gives some 200 at a time, ever more slowly (1 s for
        100,000). One that changes meanwhile may come twice or be left out; so may any other, while
        the set grows."""
        read_at = time.monotonic()
        with netlink_socket() as netlink:  # of its own: others are asked for in between
            netlink.send(self._message(GETSETELEM, NLM_F_DUMP, self._elements_of(set_name)))
            while True:
                # The kernel reads the next piece when it hands one out.
                next_read_at = time.monotonic()
                for packet in each_packet(netlink.recv(RECEIVE_SIZE)):
                    packet.check()
                    if packet.is_last:
                        return
                    listed = packet.attributes.get(NFTA_LIST_ELEMENTS, b"")
                    for _, element in each_attribute(listed):
                        yield self._element(Attributes(element), read_at)
                read_at = next_read_at

    @staticmethod
    def _element(found: Attributes, read_at: float) -> Element:
        key = found.within(NFTA_ELEM_KEY).get(NFTA_DATA_VALUE, b"")
        left = NEVER
        # NFTA_ELEM_TIMEOUT tells less: it is 0 for "never", and absent if it is the set's own.
        if NFTA_ELEM_EXPIRATION in found:
            left = found.number(NFTA_ELEM_EXPIRATION) / 1000  # it is in ms
        counter = found.within(NFTA_ELEM_EXPR)
        if NFTA_ELEM_EXPRESSIONS in found:
            counter = found.within(NFTA_ELEM_EXPRESSIONS).within(NFTA_LIST_ELEMENT)
        counts = counter.within(NFTA_EXPR_DATA)
        packets, octets = counts.number(NFTA_COUNTER_PACKETS), counts.number(NFTA_COUNTER_BYTES)
        return Element(key, left, read_at, found.comment(NFTA_ELEM_USERDATA), packets, octets)

    def _one_element(self, name: ElementName, *facts: bytes) -> bytes:
        """The attributes that name one element, and say more of it."""
        element = nested(NFTA_LIST_ELEMENT, key_attribute(name.key), *facts)
        return self._elements_of(name.set_name, element)

    def has_element(self, name: ElementName) -> bool:
        """Whether a set has this element just now. Exact, unlike elements()."""
        try:
            return bool(self._ask(GETSETELEM, self._one_element(name)))
        except FileNotFoundError:
            return False

    def put(self, name: ElementName, left: float, comment: str, is_new: bool) -> Change:
        """The change that adds an element with so many seconds left, or restarts the time of one
        that is there. Args: is_new, to have the kernel object if it is there."""
        milliseconds = round(min(max(left, SHORTEST_LEASE_S), LONGEST_LEASE_S) * 1000)
        time_left = struct.pack("!Q", milliseconds)
        text = comment.encode("ascii") + b"\0"
        attributes = self._one_element(
            name,
            # Both: a timeout alone does not restart the time of one that is there (Linux 6.12).
            attribute(NFTA_ELEM_TIMEOUT, time_left),
            attribute(NFTA_ELEM_EXPIRATION, time_left),
            attribute(NFTA_ELEM_USERDATA, bytes((COMMENT_TYPE, len(text))) + text),
        )
        return Change(NEWSETELEM, NLM_F_CREATE | (NLM_F_EXCL if is_new else 0), attributes)

    def delete(self, name: ElementName) -> list[Change]:
        """The changes that delete an element, whether it is there or not. It may just have expired,
        and the kernel objects if it is not there: so it is added first."""
        added = self.put(name, 1.0, "", is_new=False)
        return [added, Change(DELSETELEM, 0, self._one_element(name))]

    # -- changes of others

    def tells_of(self, data: bytes, names: Iterable[bytes]) -> bool:
        """Whether any notification reports that another process changed our table, and either
        renamed a chain or touched an object whose name contains one of these. Our own nft counts as
        another, too: its port is a process id, which may be somebody's by now."""
        # The table's name is attribute 1 everywhere; here without its padding.
        table = text_attribute(1, self.table)[: ATTRIBUTE_HEADER.size + len(self.table) + 1]
        for packet in each_packet(data):
            is_our_table = packet.body[:1] == bytes([self.family]) and table in packet.body
            if packet.port == self.port or not is_our_table:
                continue
            # The kernel tells of the new name alone, as of a new chain that nobody has created.
            is_renamed = packet.kind == NEWCHAIN and not packet.flags & NLM_F_CREATE
            if is_renamed or any(name in packet.body for name in names):
                return True
        return False


IPTABLES_CHAINS = frozenset(("INPUT", "FORWARD", "OUTPUT", "PREROUTING", "POSTROUTING"))


def check_kernel(kernel: Kernel, nft: Nft, config: Config) -> None:
    """Check that the kernel's table is fit for our rules, and takes them. Changes nothing. Raises
    UserError."""
    base_chains = check_table(kernel, config)
    check_targets(kernel, config, base_chains)
    nft.run(ruleset_script(config), "-c")


def unreadable(config: Config, error: OSError) -> UserError:
    """The error of a table that cannot be read."""
    table = f"table {config.table_name}"
    if isinstance(error, FileNotFoundError):
        hint = "load your firewall first (nft -f FILE), or name one of these: nft list tables"
        return UserError(f"{config.path}: [NFTABLES] table: {table} does not exist", hint)
    if isinstance(error, PermissionError):
        return UserError(f"cannot read {table}: only root may", "run this as root")
    return UserError(f"cannot read {table}: {error.strerror}")


def check_table(kernel: Kernel, config: Config) -> list[str]:
    """Check that table and chains are there, and that nobody else has a claim to them: all rules in
    the chains are ours, or the Rust server's. Returns the table's base chains. Raises UserError."""
    table = f"table {config.table_name}"
    section = f"{config.path}: [NFTABLES]"
    try:
        _, flags = kernel.table_facts()
        base_chains = kernel.base_chains()
    except OSError as error:
        raise unreadable(config, error) from None
    own_table = "give letmein a table of its own, as in nftables.conf, and name it in [NFTABLES]"
    if flags & NFT_TABLE_F_OWNER:
        problem = f"{section} table: {table} belongs to another program, which alone may change it"
        raise UserError(problem, own_table)
    if config.family != "inet" and IPTABLES_CHAINS.intersection(base_chains):
        loss = "which would restore letmein's rules without their sets"
        raise UserError(f"{section} table: {table} belongs to iptables, {loss}", own_table)
    for hook, chain in config.chains.items():
        option = f"{section} chain-{hook}"
        if chain in base_chains:
            hint = f"name a chain that it jumps to, such as LETMEIN-{hook.upper()}"
            raise UserError(f"{option}: {chain} is a base chain: it has a hook", hint)
        foreign = sum(not is_ours(rule) for rule in rules_of(kernel, config, option, chain))
        if foreign:
            clear = f"nft flush chain {config.table_name} {chain}"
            hint = f"move them to another chain, and empty this one: {clear}"
            problem = f"{chain} holds rules that are not letmein's ({foreign})"
            raise UserError(f"{option}: {problem}", hint)
    return base_chains


def check_targets(kernel: Kernel, config: Config, base_chains: list[str]) -> None:
    """Check that the chains are there that resources jump to. Raises UserError."""
    for resource in config.resources.values():
        for hook, target, _ in resource.jumps:
            option = f"{config.path}: [RESOURCES] {resource.identifier:08X}: {hook}"
            if hook in config.chains:
                rules_of(kernel, config, option, target)
            if target in base_chains:
                problem = f"{option}: {target} is a base chain: it has a hook"
                raise UserError(problem, "name a chain without a hook, which rules can jump to")


def rules_of(kernel: Kernel, config: Config, option: str, chain: str) -> list[Rule]:
    """The rules of a chain that an option names. Raises UserError if there is no such chain."""
    try:
        return kernel.rules(chain)
    except OSError:
        problem = f"table {config.table_name} has no chain {chain}"
        hint = f"add `chain {chain} {{ }}` to the table in your firewall's file, and load that"
        raise UserError(f"{option}: {problem}", hint) from None


def unreached_chains(kernel: Kernel, config: Config) -> list[str]:
    """Warnings of chains that no other chain jumps to: what letmein puts there has no effect.
    Raises OSError."""
    warnings = []
    for hook, chain in config.chains.items():
        if not kernel.jumps_to(chain):
            place = next((name for name in kernel.base_chains() if hook in name.lower()), hook)
            problem = f"nothing jumps to {chain}, so its rules have no effect"
            hint = "add the jump to your firewall's file, and for now"
            command = f"nft insert rule {config.table_name} {place} jump {chain}"
            warnings.append(f"{problem}; {hint}: {command}")
    return warnings


def is_ours(rule: Rule) -> bool:
    """Whether a rule was made by letmein, this one or the one in Rust."""
    return rule.comment.startswith("letmein ") or rule.comment.endswith("/LETMEIN")


class Table:
    """Our part of the kernel's table: rules, sets, and in these the leases and gates. It does what
    it is told. Args: boot, 8 hex digits of the boot id."""

    def __init__(self, nft: Nft, config: Config, boot: str, log: Log) -> None:
        self.nft = nft
        self.config = config
        self.boot = boot
        self.log = log
        self.kernel = Kernel(config.family, config.table)
        self.leases = Leases()
        self.tell_change: Callable[..., None] = lambda *_: None  # as Monitor._tell_change()
        self.gates = Leases()  # of EVERYBODY, until the last lease of their resource ends
        self.handles: Handles = {}  # of the sets that hold all these
        # Whether a new expiration restarts the time of an element that is there.
        release = re.findall(r"\d+", os.uname().release)
        self.refreshes = [int(number) for number in release[:2]] >= [6, 12]

    # -- rules and sets

    def install(self) -> None:
        """Put our rules and sets into the table. Raises UserError."""
        self._replace_rules(ruleset_script(self.config))
        self._delete_sets(self.read_handles().keys() - ruleset(self.config).sets.keys())

    def inspect(self) -> tuple[str, Handles]:
        """What is wrong with our sets and rules, and the handles of the sets. Raises UserError."""
        handles = self.read_handles()
        wanted = ruleset(self.config)
        comments = [rule.comment for rule in self._rules()]
        if wanted.sets.keys() - handles.keys():
            return "sets are missing", handles
        if comments != [wanted.rule_comment] * len(wanted.rules):
            return "rules are missing", handles
        return "", handles

    def remove(self) -> None:
        """Remove all that is ours, if the table is still there. Raises UserError if something
        stays."""
        with contextlib.suppress(OSError):
            self.kernel.table_facts()
            self._replace_rules("", even_if_incomplete=True)
            self._delete_sets(self.read_handles())

    def read_handles(self) -> Handles:
        """The handles of table and set of each of our sets. (The table's belongs to it: a new table
        counts its sets from the start.) Raises UserError."""
        try:
            table, _ = self.kernel.table_facts()
            return {name: (table, handle) for name, handle in self.kernel.sets().items()}
        except OSError as error:
            name = f"table {self.config.table_name}"
            raise UserError(f"cannot read {name}: {error.strerror}") from None

    def _replace_rules(self, script: str, even_if_incomplete: bool = False) -> None:
        """Delete our rules and run an nft script, in one transaction. Raises UserError."""
        table = self.config.table_name
        for is_last in (False, True):
            rules = self._rules(even_if_incomplete)
            lines = [f"delete rule {table} {rule.chain} handle {rule.handle}\n" for rule in rules]
            full = "".join(lines) + script
            if not full:
                return
            if self.config.debug:
                self.log("nft", script=full)
            try:
                self.nft.run(full)
                return
            except UserError as error:
                # Somebody may have deleted one of these rules meanwhile.
                if is_last or "No such file" not in error.problem:
                    raise

    def _rules(self, even_if_incomplete: bool = False) -> list[Rule]:
        """Our rules, as the kernel has them. Raises UserError if it has not all of our chains."""
        found = []
        hooks = {chain: hook for hook, chain in self.config.chains.items()}  # two may share one
        for chain, hook in hooks.items():
            try:
                found += self.kernel.rules(chain)
            except OSError as error:
                if even_if_incomplete:
                    continue
                where = f"{self.config.table_name} {chain}"
                raise UserError(f"chain-{hook}: cannot read {where}: {error.strerror}") from None
        return [rule for rule in found if is_ours(rule)]

    def _delete_sets(self, names: Iterable[str]) -> None:
        """Delete sets. One that a foreign rule uses cannot be deleted, and fails its transaction:
        then each has its own, and that one is emptied. Raises UserError."""
        table = self.config.table_name
        scripts = {name: f"delete set {table} {name}\n" for name in names}
        if len(scripts) > 1:
            with contextlib.suppress(UserError):
                self.nft.run("".join(scripts.values()))
                return
        for name, script in scripts.items():
            try:
                self.nft.run(script)
            except UserError as error:
                if name in self.read_handles():  # an nft that failed may have done its work
                    self.nft.run(f"flush set {table} {name}\n")
                    self.log("set-stays", set=name, reason=error.problem)

    # -- leases and gates

    def find(self, key: LeaseKey) -> Lease | None:
        """The lease, or gate, that has this key."""
        return self._leases_or_gates(key).by_key.get(key)

    def _leases_or_gates(self, key: LeaseKey) -> Leases:
        return self.gates if key.address == EVERYBODY else self.leases

    def expire(self) -> None:
        """Forget what has ended by its time."""
        now = time.monotonic()
        for lease in self.leases.expire(now):
            self.tell_change("closed", lease, "expired")
        self.gates.expire(now)

    def note(self, lease: Lease, reason: str) -> None:
        """Note a lease, or that it was ended, and for what reason; and tell of that."""
        noted = self._leases_or_gates(lease.key)
        is_known = lease.key in noted.by_key
        if lease.ends == ENDED:
            noted.forget(lease.key)
            event = "closed" if is_known else ""
        else:
            noted.keep(lease)
            event = "renewed" if is_known else "opened"
        if event and lease.address != EVERYBODY:
            self.tell_change(event, lease, reason if event == "closed" else "")

    def commit(self, leases: list[Lease], replace: bool = False, reason: str = "") -> set[LeaseKey]:
        """Have the kernel hold these leases, or drop those that were ended, and move their gates,
        in one transaction; then note all that. Returns the keys of what has changed. Args: replace,
        as for changes_for(); reason, why some were ended. Raises OSError, with nothing changed."""
        leases = [*leases, *self._gates_with(leases)]
        self.kernel.change(self.changes_for(leases, replace))
        for lease in leases:
            self.note(lease, reason)
            if self.config.debug:
                event = "ended" if lease.ends == ENDED else "kept"
                left = f"{max(lease.ends - time.monotonic(), 0):.3f}"
                self.log(event, peer=lease.address, **ids_of(lease), seconds=left)
        return {lease.key for lease in leases}

    def changes_for(self, leases: list[Lease], replace: bool = False) -> list[Change]:
        """What makes the kernel hold these leases, or drop those that were ended. Args: replace,
        whether it may have elements of them that we do not know of: they are deleted first."""
        now = time.monotonic()
        changes: list[Change] = []
        for lease in leases:
            # A new lease is added. One that differs only in its end gets its time restarted (Linux
            # 6.12). Any other is deleted and added again: an element keeps its comment.
            old = self.find(lease.key)
            is_new = old is None and not replace
            is_same = old is not None and old._replace(ends=lease.ends) == lease
            can_restart = is_same and self.refreshes and not replace
            left, comment = lease.ends - now, lease_comment(lease, self.boot)
            for name in lease_elements(lease, self.config):
                if lease.ends == ENDED or not (is_new or can_restart):
                    changes += self.kernel.delete(name)
                if lease.ends != ENDED:
                    changes.append(self.kernel.put(name, left, comment, is_new=not can_restart))
        return changes

    def _gates_with(self, leases: list[Lease]) -> list[Lease]:
        """The gates that change with these leases: each ends with the last lease of its resource,
        one of these or another."""
        keys = frozenset(lease.key for lease in leases)
        changed = []
        for resource in {lease.resource for lease in leases}:
            if self.config.resources[resource].is_gate:
                gate = self.find(LeaseKey(EVERYBODY, resource)) or Lease(EVERYBODY, resource)
                ends = max(lease.ends for lease in leases if lease.resource == resource)
                if ends < gate.ends:  # only then another lease matters, which may end later
                    ends = max(ends, self.leases.last_ends(without=keys).get(resource, ENDED))
                if ends != gate.ends:
                    changed.append(gate._replace(ends=ends))
        return changed

    def note_gates(self) -> None:
        """Note which gates should be open for the leases, and until when."""
        self.gates = Leases()
        for resource, ends in self.leases.last_ends().items():
            if self.config.resources[resource].is_gate:
                self.gates.keep(Lease(EVERYBODY, resource, ends=ends))

    def log_revoked(self, lease: Lease, reason: str) -> None:
        """Tell of a lease that ended otherwise than by its time or its client."""
        self.log.often("revoked", peer=lease.address, **ids_of(lease), reason=reason)


# What a look finds in the kernel        what that means                     what is done about it
#
# an element that fits its lease        as it should be                     nothing
# one of another time or comment        somebody changed it, or has loaded  it is written anew
#                                       what they saved before a knock      (wrong)
# one that ends too early, in an old    an administrator has shortened the  the lease ends then
#     set                               lease                               (shortened)
# one of no lease, of this boot, and    a predecessor has granted it        at the start: it is
#     still granted                                                         adopted if whole (heirs)
# any other of no lease                 somebody has planted it             it is deleted (strange)
# none for a lease, in a new set        it has gone with the old set        it is put back (missing)
# none for a lease, in an old set       an administrator has deleted it     the lease ends
#
# A set is new if it was made since the last look.

LATE_S = 0.1  # by how much the kernel may end a lease later than we do
EARLY_S = 0.5  # by how much earlier, before we believe that somebody meant it


class Look:
    """Compares the elements in the kernel's table with our leases, once, and heals what differs.
    It works in steps; knocks are served in between. A lease that such a knock changes goes into
    `outdated` and is skipped: what was read of it is stale.

    Args: handles, of the sets as they are; is_adopting, whether a predecessor's leases count."""

    def __init__(self, table: Table, handles: Handles, is_adopting: bool) -> None:
        self.table = table
        self.config = table.config
        self.is_adopting = is_adopting
        self.handles = handles
        self.new_sets = {name for name in handles if handles[name] != table.handles.get(name)}
        self.resource_of = {
            (PROTOCOL_NUMBERS[protocol], resource.port): resource.identifier
            for resource in self.config.resources.values()
            for protocol in resource.protocols
        }
        self.outdated: set[LeaseKey] = set()  # leases that were changed since it began
        self.found: set[ElementName] = set()  # parts of leases
        self.strange: list[ElementName] = []  # parts of no lease
        self.heirs: dict[LeaseKey, Lease] = {}  # to be adopted, if all their parts are found
        self.shortened: dict[LeaseKey, float] = {}  # when leases end that somebody has shortened
        self.missing: list[LeaseKey] = []  # leases to be put back
        self.wrong: set[LeaseKey] = set()  # leases to be written anew

    def steps(self) -> Iterator[None]:
        """Compare, and heal. Raises UserError, OSError."""
        sets = ruleset(self.config).sets
        gates = [name for name in sets if name.endswith("-gate")]
        for name in sets:
            if name not in gates:
                yield
                yield from self._read(name)
        self._shorten_by_hand()
        yield from self._adopt()
        self.table.note_gates()
        for name in gates:  # after the leases, which say how long they should be open
            yield from self._read(name)
        yield from self._sort_absent()
        yield from self._heal()
        self.table.handles = self.handles  # not before what was lost with the old ones is back

    @property
    def damage(self) -> str:
        """What was wrong; "" if nothing was."""
        if self.strange or self.wrong:
            return "somebody has added or changed elements"
        return "leases are missing" if self.missing else ""

    def _read(self, set_name: str) -> Iterator[None]:
        """Sort the elements of a set."""
        for number, element in enumerate(self.table.kernel.elements(set_name)):
            self._sort(ElementName(set_name, element.key), element)
            if number % LEASES_PER_BATCH == 0:
                yield

    def _sort(self, name: ElementName, element: Element) -> None:
        """Note what an element is part of: a lease, one to be adopted, or nothing of ours."""
        key = self._holder(name)
        if key in self.outdated:
            return
        lease = self.table.find(key) if key else None
        heir = self._heir(key, element) if key and not lease else None
        # That of a lease which has just ended may still be there.
        is_ending = element.read_at + element.left <= time.monotonic() + EARLY_S
        if lease:
            self.found.add(name)
            self._compare(lease, name, element)
        elif heir:
            self.found.add(name)
            known = self.heirs.get(heir.key, heir)
            self.heirs[heir.key] = min(heir, known, key=lambda lease: lease.ends)
        elif not is_ending:
            self.strange.append(name)

    def _compare(self, lease: Lease, name: ElementName, element: Element) -> None:
        """Note it if an element does not fit its lease, or gate. When it ends is known to within
        the time that reading it took."""
        earliest, latest = element.read_at + element.left, time.monotonic() + element.left
        is_right = element.comment == lease_comment(lease, self.table.boot)
        is_long = earliest > lease.ends + LATE_S
        is_short = latest < lease.ends - EARLY_S
        # In a new set it may be what somebody saved before a later knock.
        is_by_hand = lease.address != EVERYBODY and name.set_name not in self.new_sets
        if is_right and is_short and is_by_hand:
            self.shortened[lease.key] = min(latest, self.shortened.get(lease.key, NEVER))
        elif not is_right or is_long or is_short:
            self.wrong.add(lease.key)

    def _holder(self, name: ElementName) -> LeaseKey | None:
        """The lease, or gate, that an element is part of, if it can be that."""
        address, port_key = read_key(name)
        if not address:
            return None
        if port_key is None:
            return LeaseKey(address, int(name.set_name[8:16], 16))
        resource = self.resource_of.get(port_key)
        return None if resource is None else LeaseKey(address, resource)

    def _heir(self, key: LeaseKey, element: Element) -> Lease | None:
        """The lease that an element stands for, if a server of this boot gave it (an administrator
        may have saved the ruleset and loaded it again), and this configuration still does."""
        comment = COMMENT.fullmatch(element.comment)
        if not self.is_adopting or not comment or comment["boot"] != self.table.boot:
            return None
        user, resource = int(comment["user"], 16), int(comment["resource"], 16)
        if key.address == EVERYBODY or key.resource != resource or element.left == NEVER:
            return None
        proof = comment["proof"]
        if not time_granted(self.config, self.table.boot, user, resource, proof):
            return None
        ends = element.read_at + element.left  # at the earliest; later by the time reading took
        return Lease(*key, user, proof, self.config.resources[resource].weight, ends)

    def _is_whole(self, lease: Lease) -> bool:
        """Whether the kernel has all elements of a lease, or gate. Raises OSError."""
        # A listing may leave out an element while a knock makes the set grow.
        has_element = self.table.kernel.has_element
        names = lease_elements(lease, self.config)
        return all(name in self.found or has_element(name) for name in names)

    def _check_sets(self) -> None:
        """Raise OSError if the sets were made anew since the look began: then no administrator has
        deleted or shortened what was in them."""
        if self.table.read_handles() != self.handles:
            raise OSError(errno.ESTALE, "the sets were made anew")

    def _shorten_by_hand(self) -> None:
        """An administrator has shortened an element of each of these leases: that shortens all of
        it, unless another element was deleted. Raises UserError, OSError."""
        if self.shortened:
            self._check_sets()
        for key, ends in self.shortened.items():
            lease = self.table.find(key)
            if lease and key not in self.outdated and self._is_whole(lease):
                self.outdated |= self.table.commit([lease._replace(ends=ends)], replace=True)
                self.table.log("shortened", peer=lease.address, **ids_of(lease), reason="by hand")

    def _adopt(self) -> Iterator[None]:
        """Take over the leases of which all elements are there, the oldest first."""
        for batch in in_batches(sorted(self.heirs.values(), key=lambda heir: heir.ends)):
            yield
            for heir in batch:
                if heir.key in self.outdated:
                    continue
                if not self._is_whole(heir):
                    self.strange += self.found.intersection(lease_elements(heir, self.config))
                    continue
                resource = self.config.resources[heir.resource]
                latest = time.monotonic() + self.config.longest_lease(heir.user, resource)
                if heir.ends > latest:
                    self.wrong.add(heir.key)
                self.table.leases.keep(heir._replace(ends=min(heir.ends, latest)))

    def _sort_absent(self) -> Iterator[None]:
        """Sort the leases and gates of which the kernel lacks an element. If its set is new, it has
        gone with the old one, and is put back. If not, an administrator has deleted it, or it has
        just ended."""
        leases = [*self.table.leases.by_key.values(), *self.table.gates.by_key.values()]
        for batch in in_batches(leases):
            yield
            deleted = []
            for lease in batch:
                names = lease_elements(lease, self.config)
                if lease.key in self.outdated or self.found.issuperset(names):
                    continue
                # A predecessor's gate may have been shut while nobody knew of its leases yet.
                is_gate_of_heirs = self.is_adopting and lease.address == EVERYBODY
                if is_gate_of_heirs or any(name.set_name in self.new_sets for name in names):
                    self.missing.append(lease.key)
                    continue
                is_ending = lease.ends < time.monotonic() + EARLY_S
                if not is_ending and not self._is_whole(lease):
                    deleted.append(lease)
            self._end_by_hand(deleted)

    def _end_by_hand(self, deleted: list[Lease]) -> None:
        """An administrator has deleted an element of each of these: that ends all of a lease, and a
        gate for all who hold it. Raises UserError, OSError."""
        if deleted:
            self._check_sets()
        ended = {lease.key: lease for lease in deleted if lease.address != EVERYBODY}
        shut = {gate.resource for gate in deleted if gate.address == EVERYBODY}
        if shut:
            holders = self.table.leases.by_key.values()
            ended.update({lease.key: lease for lease in holders if lease.resource in shut})
        for batch in in_batches(list(ended.values())):
            ended_leases = [lease.ended() for lease in batch]
            self.outdated |= self.table.commit(ended_leases, reason="by hand")
            for lease in batch:
                self.table.log_revoked(lease, "by hand")

    def _heal(self) -> Iterator[None]:
        """Put back what is missing, write anew what is wrong, remove what nothing explains."""
        yield from self._write(self.missing, replace=False)
        yield from self._write(list(self.wrong), replace=True)
        kernel = self.table.kernel
        for strange in in_batches(self.strange):
            names = [name for name in strange if self._holder(name) not in self.outdated]
            kernel.change(change for name in names for change in kernel.delete(name))
            yield

    def _write(self, keys: list[LeaseKey], replace: bool) -> Iterator[None]:
        """Have the kernel hold these leases. Those that were changed meanwhile are as they should
        be."""
        for batch in in_batches(keys):
            found = [self.table.find(key) for key in batch if key not in self.outdated]
            leases = [lease for lease in found if lease and lease.ends > time.monotonic()]
            if leases:
                self.table.kernel.change(self.table.changes_for(leases, replace))
            yield


HEAL_PAUSE_S = (0.1, 30.0)  # before another look: at first, and at most
CONTEST_PAUSE_S = 1.0  # at most while healing succeeds, but does not last
CALM_S = 10.0  # after so long without damage, pauses begin small again, and a contest is told again
FUTILE_LIMIT = 3  # attempts to heal, before we say that they change nothing
DISTURBED_LIMIT = 10  # and if it is the kernel that objects: others may have changed the table
LOOK_TURN_S = 0.02  # for how long a look keeps others waiting
NOTIFICATIONS_PER_TURN = 1000
LINK_LOCAL = re.compile("fe[89ab][0-9a-f]:")  # RFC 4291, section 2.5.6: fe80::/10


class Healing:
    """The state of healing: when to look again, and which obstacles were logged."""

    def __init__(self, log: Log) -> None:
        self.log = log
        self.pause = Backoff(HEAL_PAUSE_S)
        self.calm_at = 0.0  # when a while without damage is over
        self.trouble = ""  # why healing fails, once that was logged
        self.claim = ""  # somebody else's, to our table or chains, once that was logged
        self.futile = 0  # how often in a row nft has changed nothing
        self.disturbed = 0  # how often in a row the kernel has objected to something
        self.is_contested = False  # whether others undo what is healed, once that was logged

    def first_pause(self) -> float:
        """How long to wait after a change by others, in s: a little, so that one look serves a
        whole burst; longer while looks keep finding damage."""
        if self.trouble:
            return HEAL_PAUSE_S[0] / 4
        return min(self.pause.next, CONTEST_PAUSE_S) / 4

    def next_look(self, damage: str, trouble: str) -> float:
        """When to look again (by time.monotonic()) after a look that found damage or failed: after
        a pause, which grows until nothing was found for CALM_S. (One good look is not enough: a
        second server for this table may be slower than we are.)"""
        now = time.monotonic()
        if now > self.calm_at:
            self.pause.reset()
            self.is_contested = False
        self._note_trouble(trouble)
        if not (damage or trouble):
            return NEVER
        self.calm_at = now + CALM_S
        pause = self.pause.take()
        if trouble:
            return now + pause
        if pause >= CONTEST_PAUSE_S:
            self._warn_of_contest()
        return now + min(pause, CONTEST_PAUSE_S)

    def _note_trouble(self, trouble: str) -> None:
        """Note why healing fails; "" if it does not. What is new is logged, and tried soon."""
        if trouble == self.trouble:
            return
        self.trouble = trouble
        self.pause.reset()
        if trouble:
            self.log.often("cannot-heal", reason=trouble)

    def _warn_of_contest(self) -> None:
        if not self.is_contested:
            self.is_contested = True
            hint = "is there a second server for this table, with another --rundir?"
            self.log("warning", reason="repairs are undone at once", hint=hint)

    def warn_of_claims(self, table: Table) -> None:
        """Warn, once, if somebody has made the table unfit for us: the server goes on, but the next
        SIGHUP or start will fail."""
        claim = hint = ""
        try:
            check_table(table.kernel, table.config)
        except UserError as error:
            claim, hint = error.problem, error.hint
        if claim not in ("", self.claim):
            reason = f"{claim}; until that is fixed, SIGHUP and the next start fail"
            self.log("warning", reason=reason, hint=hint)
        self.claim = claim


class Firewall:
    """Gives and ends leases, and has the kernel's table hold them, whatever others do to it.
    Args: as for Table."""

    def __init__(self, nft: Nft, config: Config, boot: str, log: Log) -> None:
        self.log = log
        self.table = Table(nft, config, boot, log)
        self.leases = self.table.leases
        self.healing = Healing(log)
        self.notifications: socket.socket  # of what others change; open() makes it
        self.installed = False  # whether there is something to remove in the end
        self.inspect_at = NEVER  # when to look whether the kernel has what it should
        self.steps: Generator[None, None, str] | None = None  # what a look has yet to do
        self.look: Look | None = None  # what it has found so far
        self.is_adopting = False  # whether it looks for a predecessor's leases

    @property
    def config(self) -> Config:
        """The configuration in force."""
        return self.table.config

    def open(self, selector: selectors.BaseSelector) -> None:
        """Install sets and rules, have selector listen to the kernel's nftables notifications, and
        begin to take over a predecessor's leases. Raises UserError."""
        self.table.nft.limit = NFT_LIMIT_S[1]  # nobody waits for an answer yet
        check_kernel(self.table.kernel, self.table.nft, self.config)
        self._warn_of_unreached_chains()
        self.notifications = netlink_socket(is_listener=True)
        selector.register(self.notifications, selectors.EVENT_READ, self._on_notification)
        self.installed = True
        self.table.install()
        self.is_adopting = True
        self.steps = self._inspect_and_heal()

    def close(self) -> None:
        """Remove all that was installed. Raises UserError if something stays."""
        self.table.nft.limit = NFT_LIMIT_S[1]  # nobody waits for an answer any more
        self.table.remove()

    # -- what clients ask for

    def knock(self, address: str, resource: int, user: int) -> str:
        """Open a resource for an address, or restart the lease's time. Returns "" once the kernel
        has it, or why it does not."""
        found = self.config.resources[resource]
        unfit = self._unfit_address(address, found)
        if unfit:
            return unfit
        self.table.expire()
        proof = lease_proof(self.config.keys[user], self.table.boot, found.meaning)
        longest = self.config.longest_lease(user, found)
        ends = time.monotonic() + min(longest, LONGEST_LEASE_S)
        lease = Lease(address, resource, user, proof, found.weight, ends)
        room = self.config.max_nr_rules - len(self.config.protocols)
        if lease.weight > room:
            return f"max-nr-rules ({self.config.max_nr_rules}) is too small for this resource"
        displaced = self.leases.make_room(lease, room)
        ended = [other.ended() for other in displaced]
        problem = self._commit_or_repair([lease, *ended], "replaced")
        if not problem:
            for other in displaced:
                self.table.log_revoked(other, "max-nr-rules is reached")
        return problem

    def _unfit_address(self, address: str, resource: Resource) -> str:
        """Why this resource does not open for this address; "" if it does."""
        if (6 if ":" in address else 4) not in VERSIONS[self.config.family]:
            return f"a table of family {self.config.family} has no place for this address"
        if resource.timeout < SHORTEST_LEASE_S:
            return "the resource's timeout is 0"
        if LINK_LOCAL.match(address):
            return "a link-local address is not unique: any network may have it"
        return ""

    def revoke(self, address: str, resource: int) -> str:
        """Close a resource for an address; if it is not open, that is a success. Returns "" or why
        the kernel does not close it."""
        self.table.expire()
        lease = self.table.find(LeaseKey(address, resource))
        if lease is None and not self.is_adopting:
            return ""
        lease = lease or Lease(address, resource)  # perhaps a predecessor has opened it
        return self._commit_or_repair([lease.ended()], "revoked")

    def _commit_or_repair(self, leases: list[Lease], reason: str) -> str:
        """Have the kernel hold these leases, or drop those that were ended, for that reason.
        Returns "" or what is in the way, with nothing changed."""
        try:
            try:
                self._commit(leases, reason)
            except FileExistsError:  # a set has an element that we did not know of
                self._commit(leases, reason, replace=True)
            except OSError:  # the firewall was changed under us: put back what others need
                if self.healing.trouble:  # nft did not help: do not run it for each knock
                    return self.healing.trouble
                self.inspect_at = 0.0
                self.table.install()
                self._commit(leases, reason, replace=True)
        except UserError as error:
            return error.problem
        except OSError as error:
            return f"the kernel does not take it: {error.strerror}"
        return ""

    def _commit(self, leases: list[Lease], reason: str, replace: bool = False) -> None:
        """As Table.commit(); and tell a look that is under way."""
        changed = self.table.commit(leases, replace, reason)
        if self.look is not None:
            self.look.outdated |= changed

    # -- what the configuration asks for

    def reconfigure(self, config: Config) -> None:
        """Go on with another configuration for the same chains; a lease that it does not grant is
        revoked. Raises UserError, changing nothing, if the kernel rejects it."""
        check_kernel(self.table.kernel, self.table.nft, config)
        self.table.expire()
        lost, shortened = self._differences(config)
        self.steps = self.look = None  # a look under way is out of date
        self.inspect_at = 0.0  # if anything below fails, the next look logs that and tries again
        # They end while the configuration that tells what they opened is still in force.
        with contextlib.suppress(OSError):  # what stays, the look will find
            for batch in in_batches(lost):
                self.table.commit([lease.ended() for lease in batch], reason="configuration")
        for lease in lost:
            self.table.note(lease.ended(), "configuration")  # even if the kernel has failed above
            self.table.log_revoked(lease, "configuration")
        self.table.config = config
        with contextlib.suppress(UserError, OSError):
            damage, _ = self.table.inspect()
            if damage:
                self.table.install()
            for batch in in_batches(shortened):
                self.table.commit(batch, replace=True)
        for lease in shortened:
            self.leases.keep(lease)
        self._warn_of_limit()
        self._warn_of_unreached_chains()

    def _differences(self, config: Config) -> tuple[list[Lease], list[Lease]]:
        """The leases that this configuration does not grant, and those that it grants for less time
        than they have, with the end that it grants."""
        now = time.monotonic()
        granted: dict[tuple[int, int, str], float] = {}  # in s, by user, resource and proof
        lost, shortened = [], []
        for lease in self.leases.by_key.values():
            facts = (lease.user, lease.resource, lease.proof)
            if facts not in granted:
                granted[facts] = time_granted(config, self.table.boot, *facts)
            if not granted[facts]:
                lost.append(lease)
            elif lease.ends > now + granted[facts]:
                shortened.append(lease._replace(ends=now + granted[facts]))
        return lost, shortened

    def _warn_of_unreached_chains(self) -> None:
        with contextlib.suppress(OSError):
            for warning in unreached_chains(self.table.kernel, self.config):
                self.log("warning", reason=warning)

    def _warn_of_limit(self) -> None:
        """Warn if the leases, adopted or given before the limit was lowered, exceed it."""
        weight = self.leases.weight + len(self.config.protocols)
        if weight > self.config.max_nr_rules:
            limit = f"max-nr-rules is {self.config.max_nr_rules}, but {weight} rules are in use"
            reason = f"{limit}: until some end, a new lease takes the place of an old one"
            self.log("warning", reason=reason)

    # -- what others change

    def _on_notification(self) -> None:
        """Read what waits, and plan a look if somebody else has changed something of ours."""
        chains = self.config.chains.values()
        names = [b"letmein-", *(chain.encode() + b"\0" for chain in chains)]
        for _ in range(NOTIFICATIONS_PER_TURN):
            try:
                data = self.notifications.recv(RECEIVE_SIZE)
            except BlockingIOError:
                return
            except OSError:
                data = b""  # ENOBUFS: the kernel has dropped some
            if not data or self.table.kernel.tells_of(data, names):
                look_at = time.monotonic() + self.healing.first_pause()
                self.inspect_at = min(self.inspect_at, look_at)

    @property
    def wakes_at(self) -> float:
        """When advance() is to be called, by time.monotonic()."""
        return 0.0 if self.steps is not None else self.inspect_at

    def advance(self) -> None:
        """Go on with the look that is under way, or begin one if it is time, for a short while."""
        now = time.monotonic()
        if now < self.wakes_at:
            return
        if self.steps is None:
            self.inspect_at = NEVER
            self.log.counts["looks"] += 1
            self.steps = self._inspect_and_heal()
        damage = trouble = ""
        try:
            while time.monotonic() < now + LOOK_TURN_S:
                next(self.steps)
            return
        except StopIteration as end:
            damage = end.value
            self.healing.disturbed = 0
        except UserError as error:
            trouble = error.problem
        except OSError as error:
            damage = f"changed meanwhile: {error.strerror}"
            self.healing.disturbed += 1
            if self.healing.disturbed >= DISTURBED_LIMIT:
                trouble = f"the kernel does not take it: {error.strerror}"
        self.steps = self.look = None
        self.inspect_at = min(self.inspect_at, self.healing.next_look(damage, trouble))

    def _inspect_and_heal(self) -> Generator[None, None, str]:
        """Make our part of the kernel's table what it should be, in steps; knocks are served in
        between. Returns what was wrong, or "". Raises UserError, OSError."""
        self.table.expire()
        damage, handles = self.table.inspect()
        if damage:
            self.table.install()
            remains, handles = self.table.inspect()
            if remains:  # perhaps somebody has changed the table again at once
                self.healing.futile += 1
                if self.healing.futile >= FUTILE_LIMIT:
                    raise UserError(f"nft reports success, but {remains}")
                return damage
        self.healing.futile = 0
        self.healing.warn_of_claims(self.table)
        look = self.look = Look(self.table, handles, self.is_adopting)
        yield from look.steps()
        if not self.is_adopting:
            damage = damage or look.damage
            if damage:
                self.log.often("healed", reason=damage, leases=str(len(self.leases)))
                self.table.tell_change("healed")
        elif look.heirs and look.outdated:
            self.inspect_at = 0.0  # these knocks may have kept others out of the listing
        else:
            self.is_adopting = False
            if len(self.leases):
                self.log("adopted", leases=len(self.leases))
            self._warn_of_limit()
        return damage


# ==== 5  Monitor =============================================================
# The privileged process: it owns keys, handshakes and leases, runs nft and writes the log. It opens
# the control sockets for the network process, which it starts by executing this program anew, so
# that neither a key nor the layout of memory is inherited.
#
# They exchange fixed-size records over two one-way channels. The network process writes READY,
# FIRST, SECOND and COUNTS to a pipe, which carries only bytes: a socket would let it send
# descriptors, and closing a hostile descriptor can block the monitor for ever. The monitor writes
# SETTINGS (with the control sockets), REPLY and LAST to the link, a SOCK_SEQPACKET socketpair that
# is shut down in the other direction. It trusts nothing in a record, and keeps nothing of a peer
# that has not proved itself: a challenge's token is derived from a secret of this run and from all
# that it must fit, and a RESPONSE is checked against what was possible.
#
# On the way down: the records; the control port's sockets; the run directory; Followers and
# RunSocket, for `status`; NetworkChild, its start, its channels and its end; Judge, which follows a
# message to its answer; Monitor, which joins all that.

# kind, protocol, connection (UDP: the socket's number), peer's address (IPv6, or IPv4 mapped
# into it), the rest of the way back to it (see ROUTE), message
RECORD = struct.Struct("!BBI16s26s56s")
# Kinds, from the network process: it serves; a peer's first message; over TCP its second one, if
# the first was accepted; how many peers it has closed by itself, and why, see COUNTED. From the
# monitor: what is configured; a reply to a peer that may go on; the last one, or none: close.
READY, FIRST, SECOND, COUNTS, SETTINGS, REPLY, LAST = range(1, 8)
TCP, UDP = 6, 17  # IP protocol numbers
SETTINGS_PAYLOAD = struct.Struct("!d")  # control-timeout in s
COUNTS_PAYLOAD = struct.Struct("!3I")
COUNTED = ("evicted", "late", "garbage")  # in favour of another, out of time, or no letmein client
IPV4_MAPPED = bytes(10) + b"\xff\xff"  # RFC 4291, section 2.5.5.2
LISTED_LIMIT = 20  # resources that the log names at the start, and users of each


class Record(NamedTuple):
    """One record between the processes; see RECORD."""

    kind: int
    protocol: int = TCP
    connection: int = 0
    address: bytes = bytes(16)
    route: bytes = bytes(26)
    payload: bytes = bytes(MESSAGE_SIZE)

    @property
    def peer(self) -> str:
        """The peer's address, of 0-9 a-f : . alone; an IPv4-mapped peer is an IPv4 client."""
        if self.address.startswith(IPV4_MAPPED):
            return socket.inet_ntoa(self.address[12:])
        return socket.inet_ntop(socket.AF_INET6, self.address)


def lease_terms(resource: Resource, timeout: float) -> dict[str, str]:
    """What a resource opens, its port or the chains it jumps to, and for how long, as fields of a
    log line."""
    seconds = f"{round(timeout, 3):.10g}"
    if resource.port:
        return {"port": f"{resource.port}/{'+'.join(resource.protocols)}", "seconds": seconds}
    return {"jump": ",".join(target for _, target, _ in resource.jumps), "seconds": seconds}


def who_may(config: Config, resource: Resource) -> str:
    """Who can knock for a resource: users' ids, "all" who have a key, or "nobody"."""

    def may(user: int) -> bool:
        return user in config.keys and not config.why_not(user, resource.identifier)

    if not resource.timeout:
        return "nobody"
    if not resource.users:
        return "all" if any(map(may, config.keys)) else "nobody"
    return listed([f"{user:08X}" for user in sorted(filter(may, resource.users))]) or "nobody"


def listed(names: list[str], comma: str = ",") -> str:
    """Names in a row, up to a limit, and how many more there are."""
    more = len(names) - LISTED_LIMIT
    return comma.join([*names[:LISTED_LIMIT], *([f"+{more}"] if more > 0 else [])])


def log_resources(config: Config, log: Log) -> None:
    """Say who may have what: a line for each resource, up to a limit."""
    who = {resource: who_may(config, resource) for resource in config.resources.values()}
    open_to_some = [resource for resource in who if who[resource] != "nobody"]
    for resource in open_to_some[:LISTED_LIMIT]:
        opens = lease_terms(resource, resource.timeout)
        log("resource", resource=f"{resource.identifier:08X}", **opens, users=who[resource])
    if len(open_to_some) > LISTED_LIMIT:
        log("more-resources", count=len(open_to_some) - LISTED_LIMIT)


NOTIFY_PATIENCE_S = 1.0  # with a systemd that reads nothing


def notify_systemd() -> None:
    """Tell systemd, if it has started us, that we serve: sd_notify(3)."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if path:
        unix = (socket.AF_UNIX, socket.SOCK_DGRAM)
        with contextlib.suppress(OSError), socket.socket(*unix) as notify:
            notify.settimeout(NOTIFY_PATIENCE_S)
            notify.connect("\0" + path[1:] if path[0] == "@" else path)
            notify.send(b"READY=1")


LISTENERS_LIMIT = 16  # control sockets, of systemd and ours
LISTEN_BACKLOG = 4096  # connections; as many as net.core.somaxconn allows
DATAGRAM_BUFFER = 1 << 20  # bytes of the UDP control socket: what comes in some 0.1 s of a flood
BIND_LIMIT_S = 0.2  # to wait for a port that somebody has just left
LINGER_LIMIT_S = 0.02  # for which close() may wait, and so keep the monitor from its work
IP_PKTINFO = getattr(socket, "IP_PKTINFO", 8)  # linux/in.h; Python names it from 3.14 on


def control_sockets(config: Config, old: ControlSockets) -> ControlSockets:
    """The sockets of the control port: for IPv6, where the kernel has it, and IPv4 in one. Those
    that are old stay. Raises UserError."""
    sockets = {}
    ipv6 = socket.has_dualstack_ipv6()
    for name in [(protocol, config.port) for protocol in config.protocols]:
        if name in old:
            sockets[name] = old[name]
            continue
        kind = socket.SOCK_STREAM if name[0] == "tcp" else socket.SOCK_DGRAM
        try:
            control = socket.socket(socket.AF_INET6 if ipv6 else socket.AF_INET, kind)
            if ipv6:
                control.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            if kind == socket.SOCK_STREAM:
                control.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            else:
                set_receive_buffer(control, DATAGRAM_BUFFER)
            bind_soon(control, ("::" if ipv6 else "0.0.0.0", config.port))
            prepare_control(control)
        except OSError as error:
            problem = f"cannot serve the control port {config.port}/{name[0]}: {error.strerror}"
            hint = "a limit of descriptors or memory is reached: end other programs"
            if isinstance(error, PermissionError):
                hint = "run the server as root, or set port in [GENERAL] to 1024 or more"
            if error.errno == errno.EADDRINUSE:
                hint = f"find out which program has it: ss -lntup 'sport = :{config.port}'"
            raise UserError(problem, hint) from None
        sockets[name] = (control,)
    return sockets


def bind_soon(control: socket.socket, name: tuple[str, int]) -> None:
    """Bind a socket. After a quick change of the configuration and back, the network process may
    not have closed the old one yet. Raises OSError."""
    give_up = time.monotonic() + BIND_LIMIT_S
    while True:
        try:
            return control.bind(name)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > give_up:
                raise
        time.sleep(BIND_LIMIT_S / 20)


def prepare_control(control: socket.socket) -> None:
    """Make a bound socket what the network process, which may set no options, expects."""
    control.setblocking(False)
    control.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes(8))  # as it is at first
    if control.type == socket.SOCK_STREAM:
        # Connections inherit these. What is less than a message stays in the kernel.
        control.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, MESSAGE_SIZE)
        control.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        control.listen(LISTEN_BACKLOG)
    else:
        # Which of our addresses a datagram came to: RFC 3542, section 6.1; ip(7).
        option = (socket.IPPROTO_IP, IP_PKTINFO)
        if control.family == socket.AF_INET6:
            option = (socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO)
        control.setsockopt(*option, 1)


def close_control(control: socket.socket) -> None:
    """Close a socket that a network process had. One that was taken over may have made it linger
    for as long as it likes, socket(7): SIGALRM, which note_signals() catches, ends the wait."""
    signal.setitimer(signal.ITIMER_REAL, LINGER_LIMIT_S, LINGER_LIMIT_S)
    control.close()
    signal.setitimer(signal.ITIMER_REAL, 0)


def activated_sockets() -> ControlSockets:
    """The control sockets that systemd has opened for us, if it has; see sd_listen_fds(3). There
    may be several of one protocol and port, for different addresses. Raises UserError."""
    mine = os.environ.get("LISTEN_PID") == str(os.getpid())
    most = LISTENERS_LIMIT - 1  # one more may be ours
    try:
        number = parse_number(os.environ.get("LISTEN_FDS", ""), limit=most) if mine else 0
    except Unfit as unfit:
        hint = f"expected: {unfit.hint} sockets; unset LISTEN_PID if systemd has not set it"
        raise UserError(f"LISTEN_FDS in the environment: {unfit.problem}", hint) from None
    kinds = {  # by type, protocol, and whether it listens
        (socket.SOCK_STREAM, socket.IPPROTO_TCP, 1): "tcp",
        (socket.SOCK_DGRAM, socket.IPPROTO_UDP, 0): "udp",
    }
    sockets: ControlSockets = {}
    for descriptor in range(3, 3 + number):
        try:  # a family other than AF_INET and AF_INET6 has none of these protocols
            control = socket.socket(fileno=descriptor)
            listens = control.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            protocol = kinds[control.type, control.proto, listens]
        except (OSError, KeyError):
            problem = f"systemd gave descriptor {descriptor}, which is no socket for a control port"
            hint = "letmeind.socket takes ListenStream=PORT and ListenDatagram=PORT, and Accept=no"
            raise UserError(problem, hint) from None
        control.set_inheritable(False)
        name = (protocol, control.getsockname()[1])
        sockets[name] = (*sockets.get(name, ()), control)
    return sockets


def run_path(rundir: str, config: Config) -> str:
    """The common prefix of the run directory's files for this table in this network namespace."""
    namespace = 0
    with contextlib.suppress(FileNotFoundError):  # a kernel without namespaces
        namespace = os.stat("/proc/self/ns/net").st_ino
    return f"{rundir}/letmeind-{namespace}-{config.family}-{config.table}"


def check_rundir(rundir: str) -> None:
    """Check that nobody else may put files into the run directory: those could keep the server
    from starting, or answer `status` in its name. Raises UserError."""
    with contextlib.suppress(OSError):  # if it is not there: who needs it will say so
        status = os.stat(rundir)
        # In a user namespace root outside has another number, and who owns / may do anything.
        owners = (0, os.geteuid(), os.stat("/").st_uid)
        if status.st_mode & 0o022 or status.st_uid not in owners:
            hint = "take one that is root's alone: mkdir -m 755 DIR, and --rundir DIR"
            raise UserError(f"others may write to the run directory {rundir}", hint)


def need_rundir(rundir: str) -> None:
    """As check_rundir(), and it must be there."""
    check_rundir(rundir)
    if not os.path.isdir(rundir):
        hint = f"create it (mkdir -m 755 {rundir}), or name another with --rundir"
        raise UserError(f"there is no run directory {rundir}", hint)


def lock_table(rundir: str, config: Config) -> int:
    """Keep other servers off this table. Returns the lock's descriptor. Raises UserError."""
    import fcntl
    need_rundir(rundir)
    path = run_path(rundir, config) + ".lock"
    try:
        lock = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        hint = "make room on its disk, or name another place with --rundir"
        if isinstance(error, PermissionError):
            hint = "start the server as root, or give it a --rundir that it may write to"
        raise UserError(f"cannot open {path}: {error.strerror}", hint) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        hint = f"stop that one first; it holds {path}"
        problem = f"a server for the table {config.table_name} runs already"
        raise UserError(problem, hint) from None
    except OSError as error:
        hint = "name a directory on a local disk with --rundir"
        raise UserError(f"cannot lock {path}: {error.strerror}", hint) from None
    return lock


def empty_directory(rundir: str) -> int:
    """Make a directory, open it and remove it: it stays empty and leaves nothing behind. Every
    network process uses it as its root. Made once, it needs no free disk space later. Returns its
    descriptor. Raises UserError."""
    path = f"{rundir}/letmeind-{os.urandom(8).hex()}"
    try:
        os.mkdir(path, 0o700)
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
        os.rmdir(path)
    except OSError as error:
        hint = "make room on its disk (see 'df' and 'df -i'), or name another place with --rundir"
        raise UserError(f"cannot make a directory in {rundir}: {error.strerror}", hint) from None
    return descriptor


def note_signals() -> int:
    """From now on keep the signals that a server knows. Returns a pipe's descriptor, from which
    their numbers can be read, also of those that were blocked until now."""
    ours, theirs = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(theirs, warn_on_full_buffer=False)
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD, signal.SIGALRM)
    for number in numbers:
        signal.signal(number, lambda *_: None)
    return ours


def ending(status: int) -> str:
    """How a process ended, in words. Args: status, of a signal N it is -N."""
    with contextlib.suppress(ValueError):
        return signal.Signals(-status).name
    return f"status {status}"


def json_line(document: Mapping[str, Any]) -> bytes:
    """A document for other programs, as one line."""
    import json
    return json.dumps(document).encode() + b"\n"


def lease_facts(address: str, user: int, resource: Resource, left: int) -> dict[str, Any]:
    """A lease as `status --follow` tells of it; MANUAL.md documents the names."""
    return {
        "address": address,
        "ip_version": 6 if ":" in address else 4,
        "protocols": resource.protocols,
        "port": resource.port or None,
        "resource": f"{resource.identifier:08X}",
        "chains": [target for _, target, _ in resource.jumps],
        "user": f"{user:08X}",
        "seconds_left": left,
    }


FOLLOWERS_LIMIT = 64  # of `status --follow`
FOLLOWER_BUFFER = 1 << 20  # bytes that wait for a follower to read them, before it is cut off
NEWS_LIMIT = 4096  # changes at once, before all followers have to read the leases anew
NEWS_PAUSE_S = 0.05  # between two messages to followers


class Followers:
    """Who runs `status --follow`: each gets one JSON object a line. A follower never holds us up:
    one that does not read is cut off, and has to read the leases from the kernel again, which it
    does at first, too. So all that it missed does not matter."""

    def __init__(self, selector: selectors.BaseSelector) -> None:
        self.selector = selector
        # This loads json, while there are descriptors to read it.
        self.greeting, self.refusal = (json_line({"event": e}) for e in ("following", "refused"))
        self.peers: set[socket.socket] = set()
        self.news: list[bytes] = []
        self.send_at = NEVER  # time.monotonic()
        self.sent_at = 0.0

    def add(self, peer: socket.socket) -> None:
        """Let a peer know that it will hear of all that changes from now on, or why not."""
        if len(self.peers) >= FOLLOWERS_LIMIT:
            with peer:
                peer.send(self.refusal)
            return
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, FOLLOWER_BUFFER)
        # They say nothing: what can be read is their end.
        self.selector.register(peer, selectors.EVENT_READ, functools.partial(self.drop, peer))
        self.peers.add(peer)
        self._send(peer, self.greeting)

    def drop(self, peer: socket.socket) -> None:
        """Cut a follower off."""
        if peer in self.peers:  # one turn may have two reasons
            self.peers.remove(peer)
            self.selector.unregister(peer)
            peer.close()

    def drop_all(self) -> None:
        """Have all followers read the leases anew."""
        for peer in list(self.peers):
            self.drop(peer)
        self.news.clear()

    def tell(self, change: Mapping[str, Any]) -> None:
        """Tell all followers soon, together with what else changes: 64 messages for each knock
        would take longer than the knock."""
        if len(self.news) >= NEWS_LIMIT:
            self.drop_all()
        else:
            self.news.append(json_line(change))
            self.send_at = self.sent_at + NEWS_PAUSE_S

    def send_news(self) -> None:
        """Tell them now."""
        data = b"".join(self.news)
        self.news.clear()
        self.sent_at, self.send_at = time.monotonic(), NEVER
        for peer in list(self.peers):
            self._send(peer, data)

    def _send(self, peer: socket.socket, data: bytes) -> None:
        with contextlib.suppress(OSError):
            if peer.send(data) == len(data):
                return
        self.drop(peer)


SCARCE_PAUSE_S = 0.02  # between attempts to accept a peer of the status socket


class RunSocket:
    """A socket in the run directory, to which only our rights let anybody connect. Args: path, of
    which a predecessor may have left the file; on_peer, is given each peer. Raises UserError."""

    def __init__(self, path: str, on_peer: Callable[[socket.socket], None]) -> None:
        self.on_peer = on_peer
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            self.listener.bind(path)
            self.listener.listen()
        except OSError as error:
            reason = error.strerror or error  # of a path above 107 bytes Python alone complains
            other = "another place" if error.strerror else "a shorter path"
            problem = f"cannot make the socket {path}: {reason}"
            raise UserError(problem, f"name {other} with --rundir") from None
        self.listener.setblocking(False)
        # Where descriptors are scarce, a peer that is not accepted would wake us up for ever.
        self.spare = os.open(os.devnull, os.O_RDONLY)

    def serve(self) -> None:
        """Accept and answer a peer, with the spare descriptor if there is no other."""
        if self.spare >= 0:
            os.close(self.spare)
        with contextlib.suppress(OSError):
            peer = self.listener.accept()[0]
            peer.setblocking(False)
            self.on_peer(peer)
        try:
            self.spare = os.open(os.devnull, os.O_RDONLY)
        except OSError:  # there are none at all: then it wakes us up, but not all the time
            self.spare = -1
            time.sleep(SCARCE_PAUSE_S)


class ServerOptions(NamedTuple):
    """What a server is told in front of its configuration: by the command line, and by whoever
    started it."""

    rundir: str
    account: str  # of the network process; "none" leaves it ours
    connections: int  # at the same time
    prefix_connections: int  # and from one peer: see Connection.prefix
    seccomp: str | None  # in place of what the configuration says
    activated: ControlSockets  # by systemd
    signals: int  # the pipe of note_signals()


NETWORK_COMMAND = "network-process"
NETWORK_PAUSE_S = (0.1, 30.0)  # the first pause before a new network process, and the longest
NETWORK_END_S = 1.0  # for a network process to end by itself when the server stops
NETWORK_HANG_LIMIT_S = 2.0  # a network process that reads nothing for so long is replaced
RECORDS_PER_TURN = 256
TEXT_LIMIT = 400  # bytes of what a network process says at its end instead of a record
PIPE_SIZE = 1 << 18  # bytes, of which each record takes a page: enough for one run of nft
F_SETPIPE_SZ = 1031  # linux/fcntl.h; Python names it from 3.10 on
PYTHON_HINT = "if an upgrade has replaced Python, restart the server with the new one"
# The network process's program: the compiled form of this one, which only the same Python reads.
NETWORK_PROGRAM = """
import marshal, sys
if sys.hexversion == {python}:
    exec(marshal.load(open({file}, "rb")), {{"__name__": "__main__"}})
else:
    print("it was started with another version of Python\\n{hint}", end="")
"""


class NetworkChild:
    """The network process, as its parent has it: started, told the settings, listened to, replaced
    when it is lost. Neither it nor what it says is trusted: what is unexpected ends it.

    Args: selector, for what it says. Raises UserError if the control port cannot be served."""

    on_message: Callable[[Record, Message], None]  # is given each message of a peer; set later

    def __init__(
        self, config: Config, options: ServerOptions, selector: selectors.BaseSelector, log: Log
    ) -> None:
        self.config = config
        self.options = options
        self.selector = selector
        self.log = log
        self.root = empty_directory(options.rundir)
        # The control sockets. activated: those that systemd has opened, and we never open again;
        # sockets: all that we have; shared: those that the running process was given.
        self.activated = [control for group in options.activated.values() for control in group]
        for control in self.activated:
            prepare_control(control)
        self.sockets = self.sockets_for(config, options.activated)
        self.shared: list[socket.socket] = []
        self.process = 0  # its id, while it runs
        self.link: socket.socket | None = None  # to it
        self.pipe = -1  # from it
        self.is_ready = False  # whether one has started well: from then on a lost one is replaced
        self.is_serving = False  # whether peers are served: until the firewall is open, they wait
        self.start_at = 0.0  # when to start it
        self.started_at = 0.0
        self.pause = Backoff(NETWORK_PAUSE_S)

    # -- start

    def sockets_for(self, config: Config, old: ControlSockets) -> ControlSockets:
        """The sockets of its control port. Those that are old stay. Raises UserError, also if
        systemd has opened another port."""
        wanted = {(protocol, config.port) for protocol in config.protocols}
        for protocol, port in self.options.activated.keys() - wanted:
            problem = f"systemd gave a socket for {port}/{protocol}, which is no control port"
            raise UserError(problem, "letmeind.socket and port in [GENERAL] must agree")
        return control_sockets(config, old)

    def start(self) -> None:
        """Start it, or plan another attempt. Raises UserError at our start."""
        self.start_at = NEVER
        self.started_at = time.monotonic()
        try:
            self.sockets = control_sockets(self.config, self.sockets)  # if some are missing
        except UserError as error:
            return self.lose(error.problem, error.hint)
        try:
            self._spawn()
        except OSError as error:
            hint = "a limit of descriptors, processes or memory is reached: end other programs"
            problem = f"the network process cannot be started: {error.strerror}"
            if error.filename:  # of posix_spawn()
                hint = PYTHON_HINT
                problem += f": {error.filename}"
            self.lose(problem, hint)

    def _spawn(self) -> None:
        """Start it with its ends of the channels as standard input and output. Its program is the
        one that we run, even if the file has been replaced; not to compile it again saves 6 MB. It
        inherits that and the root directory, and nothing else. Raises OSError."""
        import marshal
        link, pipe = self._connect()
        with link, pipe, os.fdopen(os.memfd_create("letmein-program", 0), "w+b") as program:
            self._send_settings()  # before it may have gone, having said why
            if self.link is None:
                return  # that failed, and lose() has planned the next start
            program.write(marshal.dumps(PROGRAM))
            program.seek(0)
            facts = {"python": sys.hexversion, "file": program.fileno(), "hint": PYTHON_HINT}
            start = NETWORK_PROGRAM.format(**facts)
            limits = (str(self.options.connections), str(self.options.prefix_connections))
            words = (self.options.account, self.config.seccomp, *limits, str(self.root))
            command = [sys.executable, "-IB", "-c", start, NETWORK_COMMAND, *words]
            streams: list[Any] = [
                (os.POSIX_SPAWN_DUP2, link.fileno(), 0),
                (os.POSIX_SPAWN_DUP2, pipe.fileno(), 1),
                (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
            ]
            os.set_inheritable(self.root, True)
            try:
                self.process = os.posix_spawn(sys.executable, command, {}, file_actions=streams)
            finally:
                os.set_inheritable(self.root, False)

    def _connect(self) -> tuple[socket.socket, BinaryIO]:
        """Make the channels, and return its ends: of the link to read from, of the pipe to write
        to. Neither has a flag in common with ours: we never wait for it."""
        import fcntl
        self.link, link = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.link.setblocking(False)
        self.link.shutdown(socket.SHUT_RD)  # it can send nothing: unix(7)
        link.setblocking(False)
        # O_DIRECT: what was written at once is read at once, pipe(2).
        self.pipe, theirs = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC | os.O_DIRECT)
        pipe = os.fdopen(theirs, "wb", buffering=0)
        with contextlib.suppress(OSError):  # then it holds fewer records
            fcntl.fcntl(self.pipe, F_SETPIPE_SZ, PIPE_SIZE)
        self.selector.register(self.pipe, selectors.EVENT_READ, self._on_pipe)
        return link, pipe

    # -- what it is told

    def reconfigure(self, config: Config, sockets: ControlSockets) -> None:
        """Go on with this configuration, and these sockets of its control port."""
        self.config, self.sockets = config, sockets
        self._send_settings()

    def _send_settings(self) -> None:
        payload = SETTINGS_PAYLOAD.pack(self.config.control_timeout)
        controls = [control for group in self.sockets.values() for control in group]
        self.send(Record(SETTINGS, payload=payload), [control.fileno() for control in controls])
        for control in set(self.shared).difference(controls):
            close_control(control)
        self.shared = controls

    def send(self, record: Record, descriptors: Sequence[int] = ()) -> None:
        """Send it a record. If it does not read for NETWORK_HANG_LIMIT_S, it is replaced."""
        while self.link:
            try:
                socket.send_fds(self.link, [RECORD.pack(*record)], descriptors)
                return
            except BlockingIOError:
                if not select.select([], [self.link], [], NETWORK_HANG_LIMIT_S)[1]:
                    self.lose("it reads nothing")
            except ConnectionError:  # it has closed its end; the pipe will say why
                if self.process:
                    os.kill(self.process, signal.SIGKILL)
                return
            except OSError as error:
                self.lose(error.strerror or "")

    # -- what it says

    def _on_pipe(self) -> None:
        """Take what it has said, at most a batch's worth."""
        for _ in range(RECORDS_PER_TURN):
            if self.pipe < 0 or (self.is_ready and not self.is_serving):
                return
            try:
                data = os.read(self.pipe, TEXT_LIMIT)
            except BlockingIOError:
                return
            if len(data) == RECORD.size and data[0] < ord(" "):  # a text begins with a letter
                self._receive(Record(*RECORD.unpack(data)))
            else:
                reason, _, hint = data.decode("utf-8", "replace").partition("\n")
                self.lose(reason or "it ended", hint)

    def _receive(self, record: Record) -> None:
        """Check one record, and hand on what a peer has said."""
        if record.kind == READY:
            self.is_ready = True
        elif record.kind == COUNTS:
            counts = zip(COUNTED, COUNTS_PAYLOAD.unpack_from(record.payload))
            self.log.counts.update(dict(counts))
        elif record.kind not in (FIRST, SECOND) or record.protocol not in (TCP, UDP):
            self.lose("it sent a bad record")
        else:
            try:
                message = Message.decode(record.payload)
            except ProtocolError:
                return self.lose("it sent a bad message")
            self.on_message(record, message)

    # -- its end

    def notice_stop(self) -> None:
        """Replace it if somebody has stopped it (SIGSTOP). Of its end the pipe tells."""
        changes = os.WSTOPPED | os.WEXITED | os.WNOHANG | os.WNOWAIT
        change = os.waitid(os.P_PID, self.process, changes) if self.process else None
        if change and change.si_code == os.CLD_STOPPED:
            self.lose("it was stopped")

    def lose(self, reason: str, hint: str = "") -> None:
        """It is gone or useless: start another after a pause. Raises UserError at our start."""
        status = self._stop(0)
        if status not in (0, -signal.SIGKILL):  # which is perhaps ours
            reason += f" ({ending(status)})"
        if status == -signal.SIGSYS:
            hint = "the filter of system calls did that; with seccomp = log the kernel says why"
        if not self.is_ready:
            raise UserError(re.sub("^it ", "the network process ", reason), hint)
        self._replace_sockets()
        if time.monotonic() - self.started_at > NETWORK_PAUSE_S[1]:
            self.pause.reset()
        pause = self.pause.take()
        more = {"hint": hint} if hint else {}
        self.log("network-process-lost", reason=reason, pause=f"{pause:g}", **more)
        self.start_at = time.monotonic() + pause

    def _replace_sockets(self) -> None:
        """Open the control sockets anew: if the network process was taken over, it may have made
        them deaf. systemd's sockets cannot be opened again: their options are reset, but an
        attached filter or a bound interface remains."""
        for control in self.shared:
            if control not in self.activated:
                close_control(control)
        opened = {name: group for name, group in self.sockets.items() if group[0].fileno() >= 0}
        self.sockets, self.shared = opened, []
        with contextlib.suppress(UserError):  # it is tried again with the next network process
            self.sockets = control_sockets(self.config, opened)
        for control in self.activated:
            with contextlib.suppress(OSError):
                prepare_control(control)

    def _stop(self, patience: float) -> int:
        """It ends when its link closes, or is killed after patience, in s. Returns its status, of a
        signal N it is -N."""
        if self.link is not None:
            self.link.close()
            self.link = None
        if self.pipe >= 0:
            with contextlib.suppress(KeyError):  # if there was no memory to register it
                self.selector.unregister(self.pipe)
            os.close(self.pipe)
            self.pipe = -1
        process, self.process = self.process, 0
        return await_end(process, patience) if process else 0

    def close(self) -> None:
        """End it, and close the control port."""
        self._stop(NETWORK_END_S)
        for control in (*self.shared, *self.activated):
            close_control(control)


SAME_REFUSAL_S = 10.0  # for which the same refusal over UDP is the same knock: a client sends many
REFUSALS_LIMIT = 100  # such refusals that are remembered


class Judge:
    """Follows each message from its arrival to its answer: judges it, changes the firewall, logs
    it. Args: send, takes a record for the network process."""

    def __init__(
        self, config: Config, firewall: Firewall, log: Log, send: Callable[[Record], None]
    ) -> None:
        self.firewall = firewall
        self.log = log
        self.send = send
        self.tokens = Tokens(os.urandom(32))
        self.tokens.new(b"", KNOCK, 0.0)  # loads hmac, while there are descriptors to read it
        self.refusals: dict[tuple[object, ...], float] = {}  # of UDP, and until when
        self.reconfigure(config)

    def reconfigure(self, config: Config) -> None:
        """Judge by this configuration from now on."""
        self.config = config
        # A resource may have many users, who are not to be read for each datagram of a flood.
        self.checksums = {number: checksum(found) for number, found in config.resources.items()}

    def on_message(self, record: Record, message: Message) -> None:
        """Judge one message of a peer, and answer it."""
        verdict = self._judge(record, message)
        if verdict.challenge is not None:
            answer = self._carry_out(verdict.challenge, record, message)
            self._end(record, unsigned(answer, message.user, message.resource))
        elif verdict.reason:
            self._log_refusal(record, message, verdict.reason)
            self._end(record, verdict.reply)
        else:
            self.send(record._replace(kind=REPLY, payload=verdict.reply))

    def _judge(self, record: Record, message: Message) -> Verdict:
        """What to make of a peer's message."""
        config, now = self.config, time.monotonic()
        facts = self._facts(record, message)
        handshake = ServerHandshake(config.error_policy, config.keys.get, config.why_not)

        def new_token(operation: int) -> bytes:
            return self.tokens.new(facts, operation, now)

        # Over UDP nobody knows whether a peer has knocked before: the message must tell.
        is_udp_response = record.protocol == UDP and message.operation == RESPONSE
        if record.kind == FIRST and not is_udp_response:
            return handshake.on_request(message, new_token)
        # Over TCP a second message comes only from a peer whose KNOCK was accepted. (A network
        # process that was taken over may lie: that earns it a GOAWAY.)
        proved = BASIC_AUTH if record.protocol == TCP else NO_AUTH
        challenges = self.tokens.challenges(facts, now, config.control_timeout)
        return handshake.on_response(message, proved, challenges)

    def _facts(self, record: Record, message: Message) -> bytes:
        """What a challenge is for: the peer, what it asks for, and what is configured for that. If
        any of it changes meanwhile, the RESPONSE is wrong."""
        user, resource = message.user, message.resource
        peer = (record.protocol, record.connection, record.address, record.route)
        configured = (self.config.keys.get(user, NOBODYS_KEY), self.checksums.get(resource))
        return repr((peer, user, resource, configured)).encode()

    def _carry_out(self, challenge: Challenge, record: Record, message: Message) -> int:
        """The peer has proved itself: do what it asked for, once. A RESPONSE that comes again
        changes nothing, and gets its answer again: COMEIN or GOAWAY."""
        if challenge.outcome is not None:
            return challenge.outcome
        if challenge.operation == KNOCK:
            problem = self._knock(record, message)
        else:
            problem = self.firewall.revoke(record.peer, message.resource)
            if not problem:
                self._log("revoked", record, message)
        if problem:
            self._log("failed", record, message, reason=problem)
        answer = GOAWAY if problem else COMEIN
        self.tokens.note_outcome(challenge, answer)
        return answer

    def _knock(self, record: Record, message: Message) -> str:
        """Open a resource for a peer. Returns "" or why it is not open."""
        resource = self.config.resources[message.resource]
        facts = lease_terms(resource, self.config.longest_lease(message.user, resource))
        held = self.firewall.leases.by_key.get(LeaseKey(record.peer, message.resource))
        if held and held.ends > time.monotonic():
            facts["renewed"] = "yes"
        problem = self.firewall.knock(record.peer, message.resource, message.user)
        if not problem:
            self._log("granted", record, message, **facts)
        return problem

    def _end(self, record: Record, reply: bytes) -> None:
        """Send a peer its last message; b"" closes a TCP connection without a word."""
        if reply or record.protocol == TCP:
            self.send(record._replace(kind=LAST, payload=reply or bytes(MESSAGE_SIZE)))

    def _log_refusal(self, record: Record, message: Message, reason: str) -> None:
        """Log that a peer was refused, over UDP once for a knock: a client that hears nothing sends
        it again and again, each time from another port."""
        if record.protocol == UDP:
            refusal = (record.address, message.user, message.resource, reason)
            now = time.monotonic()
            if self.refusals.get(refusal, 0.0) > now:
                self.log.counts["repeated"] += 1
                return
            self.refusals.pop(refusal, None)  # the oldest comes first
            self.refusals[refusal] = now + SAME_REFUSAL_S
            if len(self.refusals) > REFUSALS_LIMIT:
                del self.refusals[next(iter(self.refusals))]
        self.log.refusals[reason] += 1
        self._log("refused", record, message, reason=reason)

    def _log(self, event: str, record: Record, message: Message, **facts: str) -> None:
        """Write one line on what became of a peer's request."""
        protocol = "tcp" if record.protocol == TCP else "udp"
        self.log.often(event, peer=record.peer, proto=protocol, **ids_of(message), **facts)


class Monitor:
    """The privileged process: it joins network process, judge, firewall, log and followers, and
    waits for all of them. Raises UserError."""

    def __init__(self, config: Config, options: ServerOptions) -> None:
        os.umask(0o077)
        self.config = config
        self.options = options
        self.log = Log()
        self.lock = lock_table(options.rundir, config)
        self.selector = selectors.DefaultSelector()
        self.network = NetworkChild(config, options, self.selector, self.log)
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            self.firewall = Firewall(Nft(config.nft), config, file.read(8), self.log)
        self.firewall.table.tell_change = self._tell_change
        self.judge = Judge(config, self.firewall, self.log, self.network.send)
        self.network.on_message = self.judge.on_message
        self.followers = Followers(self.selector)
        self.is_stopping = False
        self.is_reload_wanted = False
        self.since = time.time()

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT. Raises UserError if the start fails."""
        self.selector.register(self.options.signals, selectors.EVENT_READ, self._on_signal)
        if self.options.account == "none":
            reason = "--user none: the network process keeps the server's rights"
            self.log("warning", reason=reason, hint="name an account for it with --user")
        try:
            self._start()
            while not self.is_stopping:
                if self.is_reload_wanted:
                    self.is_reload_wanted = False
                    self._reload()
                self._turn()
        finally:
            self._stop()

    def _start(self) -> None:
        """Serve as soon as a network process is ready, and the firewall takes our rules. Returns
        early if it is to stop meanwhile."""
        while not (self.network.is_ready or self.is_stopping):
            self._turn()
        if self.is_stopping:
            return
        for name, on_peer in (("status", self._send_status), ("follow", self._add_follower)):
            served = RunSocket(self._run_path(name), on_peer)
            self.selector.register(served.listener, selectors.EVENT_READ, served.serve)
        self.firewall.open(self.selector)
        self.network.is_serving = True
        while self.firewall.is_adopting and not self.is_stopping:
            self._turn()
        if self.is_stopping:
            return
        self.followers.drop_all()  # they may have read leases that were not adopted
        notify_systemd()
        self._log_configuration("ready")

    def _stop(self) -> None:
        self.network.close()
        for name in ("status", "follow"):
            with contextlib.suppress(OSError):
                os.unlink(self._run_path(name))
        if self.firewall.installed:
            self.firewall.close()
            self.log.summary()
            self.log("stopped")

    def _run_path(self, name: str) -> str:
        return f"{run_path(self.options.rundir, self.config)}.{name}"

    def _on_signal(self) -> None:
        numbers = os.read(self.options.signals, 4096)
        self.is_reload_wanted |= signal.SIGHUP in numbers  # it waits until the firewall is open
        self.is_stopping |= signal.SIGTERM in numbers or signal.SIGINT in numbers
        self.network.notice_stop()

    def _turn(self) -> None:
        """Wait for something to happen, and handle it."""
        wakes_at = min(at for at, _ in self._timers())
        wait = min(max(wakes_at - time.monotonic(), 0), LONGEST_WAIT_S)
        for key, _ in self.selector.select(wait):
            key.data()
        for at, handle in self._timers():
            if time.monotonic() >= at:
                handle()

    def _timers(self) -> tuple[tuple[float, Callable[[], None]], ...]:
        """When there is something to do, and what."""
        expires_at = NEVER  # only followers want to know of leases that the kernel ends
        if self.followers.peers:
            # All that end within one second are told together, when it is over.
            expires_at = min(self.firewall.leases.ending, default=NEVER) + 1
        return (
            (self.network.start_at, self.network.start),
            (self.firewall.wakes_at, self.firewall.advance),
            (expires_at, self.firewall.table.expire),
            (self.followers.send_at, self.followers.send_news),
            (self.log.sum_up_at, self.log.summary),
        )

    def _reload(self) -> None:
        """Take over the configuration file anew, or say why not and go on as before."""
        old = self.config
        try:
            config = read_config(old.path, server=True)
            config = config._replace(seccomp=self.options.seccomp or config.seccomp)
            fixed = old.fixed_options()
            for name, value in config.fixed_options().items():
                if value != fixed[name]:
                    reason = "the new value takes effect when the server is restarted"
                    self.log("restart-wanted", option=name, reason=reason)
            names = ("nft", "family", "table", "chains", "seccomp")
            config = config._replace(**{name: getattr(old, name) for name in names})
            sockets = self.network.sockets_for(config, self.network.sockets)
            self.firewall.reconfigure(config)
        except UserError as error:
            for warning in getattr(error, "warnings", ()):  # which may tell why
                self.log("warning", reason=warning)
            self.log("reload-failed", reason=error.problem, hint=error.hint)
        else:
            self.config = config
            self.judge.reconfigure(config)
            self.network.reconfigure(config, sockets)
            self._log_configuration("reloaded")

    # -- what it tells

    def _log_configuration(self, event: str) -> None:
        """Log that this configuration is in force, and what it is."""
        config = self.config
        for warning in config.warnings:
            self.log("warning", reason=warning)
        log_resources(config, self.log)
        port = config.control
        counts = {"users": len(config.keys), "resources": len(config.resources)}
        self.log(event, port=port, table=f"{config.family}/{config.table}", **counts)

    def _tell_change(self, event: str, lease: Lease | None = None, reason: str = "") -> None:
        """Tell followers what has become of a lease. Args: event, "opened", "renewed" or "closed",
        or "healed" without a lease: others had changed what a follower may have read."""
        if lease is None:
            self.followers.drop_all()
        elif self.followers.peers:
            left = 0 if event == "closed" else int(lease.ends - time.monotonic()) + 1
            found = self.firewall.config.resources[lease.resource]
            facts = lease_facts(lease.address, lease.user, found, left)
            self.followers.tell({"event": event, "time": time.time(), "reason": reason, **facts})

    def _add_follower(self, peer: socket.socket) -> None:
        """Tell this peer of all changes from now on, and not of what has ended before."""
        self.firewall.table.expire()
        self.followers.add(peer)

    def _send_status(self, peer: socket.socket) -> None:
        """Answer `status` with one JSON document; MANUAL.md documents the names."""
        config, leases = self.config, self.firewall.leases
        self.firewall.table.expire()
        document = {
            "process": os.getpid(),
            "since": self.since,
            "port": config.control,
            "table": f"{config.family}/{config.table}",
            "leases": len(leases),
            "rules": leases.weight + len(config.protocols),
            "max_nr_rules": config.max_nr_rules,
            "refused": self.log.refusals,
            "counts": self.log.counts,
        }
        with peer:
            peer.send(json_line(document))


# ==== 6  Network =============================================================
# The process that faces the internet. It owns sockets, deadlines and limits, and forwards messages
# between peers and the monitor. It knows no key, and could not run a program.

ROUTE = struct.Struct("!HI20s")  # port, scope id, where to answer from: struct in6_pktinfo, ipv6(7)
MSG_DONTWAIT = 0x40  # linux/socket.h
PKTINFO_LEVELS = (socket.IPPROTO_IP, socket.IPPROTO_IPV6)  # systemd may have asked for others
PKTINFO4 = struct.Struct("!4s4s4s")  # interface, where to answer from, destination: ip(7)
ACCEPTS_PER_TURN = 64
SLOTS_LIMIT = 20_000  # of --num-connections: to find whom to evict takes time in proportion
EVENT_LIMIT_S = 2.0  # of the processor's time: a process that needs more has lost its way


class Connection:
    """One TCP connection. It competes for a slot until its second message has come."""

    awaits_reply = False  # whether the monitor has yet to answer: then it is not evicted

    def __init__(self, number: int, peer: socket.socket, name: tuple[Any, ...]) -> None:
        self.number = number
        self.socket = peer
        self.since = time.monotonic()
        self.record = Record(FIRST, TCP, number, *split_name(name))  # for its next message
        # What counts as one peer: an IPv4 address, or the first 56 bits of an IPv6 address.
        address = self.record.address
        self.prefix = address if address.startswith(IPV4_MAPPED) else address[:7]


def split_name(name: tuple[Any, ...], local: bytes = b"") -> tuple[bytes, bytes]:
    """A peer's socket address as (16 bytes, route): the address, IPv4 mapped into IPv6, and
    what else it takes to answer. Args: local, the in6_pktinfo or in_pktinfo of a datagram."""
    host, port, *more = name
    if not more:
        answer_from = PKTINFO4.unpack(local)[1] if local else b""
        return IPV4_MAPPED + socket.inet_aton(host), ROUTE.pack(port, 0, answer_from)
    # Only a link-local peer needs the interface (its scope id is not 0): else routing chooses.
    local = local if more[1] else local[:16]
    address = socket.inet_pton(socket.AF_INET6, host.partition("%")[0])
    return address, ROUTE.pack(port, more[1], local)


class Network:
    """The network process's loop, for after it has given up its privileges. It sets no option and
    no flag: what its sockets need has been set by the monitor. Args: link, from the monitor; pipe,
    to it, a descriptor; limit, to connections, and prefix_limit, to one peer's."""

    def __init__(self, link: socket.socket, pipe: int, limit: int, prefix_limit: int) -> None:
        self.link = link
        self.pipe = pipe
        self.limit = limit
        self.prefix_limit = prefix_limit
        # By number, oldest first: those that compete for slots, and by prefix the same ones.
        self.connections: dict[int, Connection] = {}
        self.prefixes: dict[bytes, dict[int, Connection]] = {}
        # Those whose second message was forwarded: not read again and not evicted.
        self.awaiting_verdict: dict[int, Connection] = {}
        self.number = int.from_bytes(os.urandom(4), "big")
        self.counts = dict.fromkeys(COUNTED, 0)  # those that the monitor has not been told
        self.listeners: list[socket.socket] = []
        self.selector = selectors.DefaultSelector()
        self.selector.register(link, selectors.EVENT_READ, self._on_link)

    def _settle(self, payload: bytes, listeners: list[socket.socket]) -> None:
        """Begin, or go on, with these settings and sockets; connections stay."""
        for listener in self.listeners:
            self.selector.unregister(listener)
            listener.close()
        self.listeners = listeners
        (self.timeout,) = SETTINGS_PAYLOAD.unpack_from(payload)
        for number, listener in enumerate(listeners):
            if listener.type == socket.SOCK_STREAM:
                serve = functools.partial(self._accept, listener)
            else:
                serve = functools.partial(self._receive, listener, number)
            self.selector.register(listener, selectors.EVENT_READ, serve)
        self._send(Record(READY))

    def run(self) -> None:
        """Serve until the monitor is gone: then it raises ConnectionError."""
        while True:
            if any(self.counts.values()):
                self._send(Record(COUNTS, payload=COUNTS_PAYLOAD.pack(*self.counts.values())))
                self.counts = dict.fromkeys(COUNTED, 0)
            wait = None
            if self.connections:
                oldest = next(iter(self.connections.values()))
                left = oldest.since + self.timeout - time.monotonic()
                if left <= 0:
                    self._close(oldest, "late")
                    continue
                wait = min(left, LONGEST_WAIT_S)
            for key, _ in self.selector.select(wait):
                # SIGPROF ends the process. Set anew for each event: a turn may have thousands.
                signal.setitimer(signal.ITIMER_PROF, EVENT_LIMIT_S)
                key.data()

    def _send(self, record: Record) -> None:
        """Pass a record on. While the monitor lags behind, nothing is taken from the internet."""
        while not select.select([self.link], [self.pipe], [])[1]:
            self._on_link()
        os.write(self.pipe, RECORD.pack(*record))

    def _on_link(self) -> None:
        try:
            data, descriptors, flags, _ = socket.recv_fds(self.link, RECORD.size, LISTENERS_LIMIT)
        except BlockingIOError:
            return
        if not data:
            raise ConnectionError("the monitor is gone")
        if flags & socket.MSG_CTRUNC:
            raise OSError(errno.EMFILE, "it has no descriptor left for the control port")
        record = Record(*RECORD.unpack(data))
        if record.kind == SETTINGS:
            return self._settle(record.payload, [socket.socket(fileno=fd) for fd in descriptors])
        if record.protocol == UDP:
            return self._send_datagram(record)
        number = record.connection
        connection = self.connections.get(number) or self.awaiting_verdict.get(number)
        if connection is None:
            return
        connection.awaits_reply = False
        sent = 0
        with contextlib.suppress(OSError):
            # Two messages at most: a socket that does not take them at once is no client's.
            if any(record.payload):
                sent = connection.socket.send(record.payload, MSG_DONTWAIT)
        if record.kind == LAST or sent != MESSAGE_SIZE:
            self._close(connection)

    def _accept(self, listener: socket.socket) -> None:
        if listener not in self.listeners:
            return  # closed earlier in this turn
        for _ in range(ACCEPTS_PER_TURN):
            try:
                peer, name = listener.accept()
            except BlockingIOError:
                return
            except ConnectionError:
                continue  # the peer is gone already
            except OSError:
                # Out of descriptors or memory: the oldest goes, or the monitor lets one go.
                if self.connections:
                    self._close(next(iter(self.connections.values())), "evicted")
                return
            self.number = (self.number + 1) & 0xFFFFFFFF
            connection = Connection(self.number, peer, name)
            self._make_room(connection.prefix)
            self.connections[self.number] = connection
            self.prefixes.setdefault(connection.prefix, {})[self.number] = connection
            read = functools.partial(self._read, connection)
            self.selector.register(peer, selectors.EVENT_READ, read)

    def _make_room(self, prefix: bytes) -> None:
        """Close the oldest connection of the newcomer's prefix if that has its share, or of the
        largest prefix if all slots are taken: a flood evicts itself. Nobody is refused."""
        crowd = self.prefixes.get(prefix, {})
        if len(crowd) < self.prefix_limit:
            if len(self.connections) < self.limit:
                return
            crowd = max(self.prefixes.values(), key=len)
        # A valid first message gives no priority, because a replayed KNOCK is valid too. Who waits
        # for the monitor is spared: that wait is short, and the channels bound their number.
        idle = next((one for one in crowd.values() if not one.awaits_reply), None)
        if idle:
            self._close(idle, "evicted")

    def _read(self, connection: Connection) -> None:
        if connection.number not in self.connections:
            return  # closed earlier in this turn
        try:
            payload = connection.socket.recv(MESSAGE_SIZE, MSG_DONTWAIT)
            Message.decode(payload)
        except OSError:
            return self._close(connection)
        except ProtocolError:
            return self._close(connection, "garbage" if payload else "")
        record = connection.record._replace(payload=payload)
        connection.record = record._replace(kind=SECOND)
        if record.kind == SECOND:
            self._leave(connection)
            self.awaiting_verdict[connection.number] = connection
        connection.awaits_reply = True
        self._send(record)

    def _leave(self, connection: Connection) -> None:
        """Take a connection out of the competition for slots, and read it no more."""
        self.selector.unregister(connection.socket)
        del self.connections[connection.number]
        siblings = self.prefixes[connection.prefix]
        del siblings[connection.number]
        if not siblings:
            del self.prefixes[connection.prefix]

    def _close(self, connection: Connection, why: str = "") -> None:
        """Close a connection. Args: why, one of COUNTED, if the monitor does not know of it."""
        if why:
            self.counts[why] += 1
        if self.awaiting_verdict.pop(connection.number, None) is None:
            self._leave(connection)
        connection.socket.close()

    def _receive(self, listener: socket.socket, number: int) -> None:
        for _ in range(ACCEPTS_PER_TURN):
            try:
                data, extra, _, name = listener.recvmsg(MESSAGE_SIZE + 1, 64, MSG_DONTWAIT)
                Message.decode(data)
            except ProtocolError:
                self.counts["garbage"] += 1
                continue
            except OSError:
                return
            local = next((value for level, _, value in extra if level in PKTINFO_LEVELS), b"")
            self._send(Record(FIRST, UDP, number, *split_name(name, local), payload=data))

    def _send_datagram(self, record: Record) -> None:
        """Answer a datagram, from the address that it came to."""
        port, scope, local = ROUTE.unpack(record.route)
        name: tuple[Any, ...]
        # If it is lost, or its socket is no longer there: the client asks again.
        with contextlib.suppress(IndexError, OSError):
            listener = self.listeners[record.connection]
            if listener.family == socket.AF_INET6:
                name = (socket.inet_ntop(socket.AF_INET6, record.address), port, 0, scope)
                extra = (socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, local)
            else:
                name = (record.peer, port)
                extra = (socket.IPPROTO_IP, IP_PKTINFO, PKTINFO4.pack(b"", local[:4], b""))
            ancillary = [extra] if any(local) else []
            listener.sendmsg([record.payload], ancillary, MSG_DONTWAIT, name)


# ==== 7  Sandbox =============================================================
# What each process gives up for good before it hears a word from the internet. What the
# monitor gives up is inherited by all that it starts; the network process goes on from there.

PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 4, 38  # linux/prctl.h
CAPABILITY_VERSION = 0x20080522  # linux/capability.h
# KILL, SETGID, SETUID, NET_BIND_SERVICE (a control port below 1024), NET_ADMIN (nft), SYS_CHROOT.
MONITOR_CAPABILITIES = sum(1 << number for number in (5, 6, 7, 10, 12, 18))
# The system calls that each process makes: by Python 3.9 to 3.13, with glibc or musl, on x86_64
# or aarch64. A name that an architecture does not have is ignored there.
NETWORK_CALLS = """
    accept4 brk clock_gettime close epoll_ctl epoll_pwait epoll_wait exit exit_group futex
    getpeername getrandom getsockname getsockopt madvise mmap mprotect mremap munmap pselect6
    recvfrom recvmsg restart_syscall rt_sigaction rt_sigprocmask rt_sigreturn select sendmsg sendto
    setitimer sigaltstack write"""
# Some of these only with certain arguments: by name the alternatives, each of (position, value)
# pairs that must all fit.
# A datagram that waits for more (MSG_MORE) would wait in a socket that the next process gets, too.
NETWORK_ARGUMENTS = {
    "getsockopt": (((1, 1), (2, 3)), ((1, 1), (2, 38))),  # SOL_SOCKET: SO_TYPE, SO_PROTOCOL
    "recvfrom": (((3, MSG_DONTWAIT),),),
    "recvmsg": (((2, MSG_DONTWAIT),), ((2, 0),)),  # recv_fds() passes no flags on
    "sendmsg": (((2, MSG_DONTWAIT),),),
    "sendto": (((3, MSG_DONTWAIT),),),
    "setitimer": (((0, 2),),),  # ITIMER_PROF
}
CLIENT_CALLS = NETWORK_CALLS + """
    access bind clock_nanosleep clone clone3 connect dup dup2 dup3 epoll_create1 faccessat
    faccessat2 fcntl fstat fstatfs getcwd getdents64 getegid geteuid getgid getpid gettid
    getuid ioctl lseek lstat membarrier newfstatat open openat poll ppoll pread64 prlimit64
    read readlink readlinkat recvmmsg rseq sched_getaffinity sched_yield sendmmsg set_robust_list
    setsockopt shutdown socket stat statfs statx sysinfo uname writev"""
# A filter is inherited: this one has to let Python start, and nft work, or a script around it.
MONITOR_CALLS = CLIENT_CALLS + """
    accept arch_prctl chdir chroot close_range copy_file_range execve fadvise64 fchdir flock fork
    getppid kill listen memfd_create mkdir mkdirat pidfd_open pipe pipe2 prctl rmdir seccomp
    set_tid_address setgroups setresgid setresuid socketpair umask unlink unlinkat vfork wait4
    waitid"""


def system_call_filter(
    mode: str, names: str, arguments: Mapping[str, Any] | None = None
) -> Callable[[], None]:
    """What has the kernel allow only these system calls to this process and all that it starts:
    others end it (mode "kill"), or are logged ("log"); see seccomp(2). Args: arguments, by name of
    a call, as NETWORK_ARGUMENTS. Raises UserError."""
    if mode == "off":
        return lambda: None
    try:
        sys.dont_write_bytecode = True  # of modules that are imported behind the filter
        import pyseccomp  # type: ignore
        action = pyseccomp.KILL_PROCESS if mode == "kill" else pyseccomp.LOG
        allowed = pyseccomp.SyscallFilter(action)
        low = 0xFFFFFFFF  # these are ints, of which the kernel reads no more
        for name in names.split():
            for values in (arguments or {}).get(name, [()]):
                conditions = [pyseccomp.Arg(n, pyseccomp.MASKED_EQ, low, v) for n, v in values]
                allowed.add_rule(pyseccomp.ALLOW, name, *conditions)
        return lambda: allowed.load()
    except (ImportError, OSError, RuntimeError) as error:
        hint = "install it (pip install pyseccomp; it needs libseccomp), or set seccomp = off"
        raise UserError(f"seccomp = {mode} does not work here: {error}", hint) from None


def give_up_rights() -> tuple[str, ...]:
    """Have no core dumps, no rights but those needed, no_new_privs; also for all that is started.
    Returns warnings. Raises OSError. See prctl(2), capabilities(7)."""
    import resource
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        import ctypes
    except ImportError:
        return ("Python has no ctypes: the server keeps its capabilities, and no_new_privs is off",)
    libc = ctypes.CDLL(None, use_errno=True)
    header = struct.pack("=Ii", CAPABILITY_VERSION, 0)  # of this process
    sets = ctypes.create_string_buffer(24)
    failed = libc.capget(header, sets)
    lower = [bits & MONITOR_CAPABILITIES for bits in struct.unpack("=3I", sets.raw[:12])]
    failed |= libc.capset(header, struct.pack("=6I", *lower, 0, 0, 0))
    failed |= libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) | libc.prctl(PR_SET_DUMPABLE, 0)
    if failed:
        raise OSError(ctypes.get_errno(), "cannot give up rights")
    return ()


def give_back_memory() -> None:
    """Return to the system what compiling this file took, some 8 MB: malloc_trim(3), of glibc."""
    with contextlib.suppress(ImportError, OSError, AttributeError):
        import ctypes
        ctypes.CDLL(None).malloc_trim(0)


def find_account(name: str) -> tuple[int, int]:
    """User and group id of an account; "none" has none. Raises UserError."""
    import pwd
    if name == "none":
        return 0, 0
    try:
        user, group = pwd.getpwnam(name)[2:4]
    except KeyError:
        hint = f"make it (useradd --system {name}), or name another with --user"
        raise UserError(f"the account {name} does not exist", hint) from None
    if not user or not group:
        problem = f"the account {name} has root's rights (user id {user}, group id {group})"
        raise UserError(problem, "name an ordinary account with --user")
    return user, group


def enter_sandbox(account: str, connections: int, root: int, seccomp: str) -> None:
    """Become account (a user's name, or "none" to stay what we are), in an empty root directory, of
    which root is a descriptor, with no way to get more. Raises UserError naming the step that
    failed."""
    import resource
    user, group = find_account(account)
    filter_system_calls = system_call_filter(seccomp, NETWORK_CALLS, NETWORK_ARGUMENTS)
    step = "limit descriptors and memory"
    try:
        # Beside the slots: link, listeners, and peers that wait for nft, which the link bounds.
        memory = (128 << 20) + (16 << 10) * connections  # bytes
        wanted = ((resource.RLIMIT_NOFILE, connections + 1024), (resource.RLIMIT_DATA, memory))
        for kind, limit in wanted:
            _, most = resource.getrlimit(kind)
            limit = limit if most == resource.RLIM_INFINITY else min(limit, most)
            resource.setrlimit(kind, (limit, limit))
        if account != "none":
            step = "enter an empty root directory"
            os.fchdir(root)
            with open("/proc/self/status", "rb") as status:
                os.chroot(".")
                step = f"become the user {account}"
                os.setgroups([])
                os.setresgid(group, group, group)
                os.setresuid(user, user, user)  # takes root's capabilities, too: capabilities(7)
                resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
                resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
                step = "give up its capabilities"  # of a server that is not root, they stay
                if b"CapPrm:\t0000000000000000\n" not in status.read():
                    raise OSError(0, "it has some left")
        os.close(root)  # it would be a way to it without a root directory
        step = f"filter system calls (seccomp = {seccomp})"
        filter_system_calls()
    except OSError as error:
        hint = "run the server as root, or give --user none"
        raise UserError(f"the network process cannot {step}: {error.strerror}", hint) from None


def network_process(
    account: str, seccomp: str, limit: str, prefix_limit: str, root: str
) -> None:
    """The whole life of the network process. What the monitor says is its standard input, and its
    standard output goes there."""
    # The monitor handles Ctrl-C, and SIGHUP, which has been blocked since our start.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        network = Network(socket.socket(fileno=0), 1, int(limit), int(prefix_limit))
        enter_sandbox(account, int(limit), int(root), seccomp)
        network.run()
    except Exception as error:
        what = "" if isinstance(error, UserError) else f"it failed with {type(error).__name__}: "
        with contextlib.suppress(OSError):  # the monitor may be gone
            os.write(1, f"{what}{error}\n{getattr(error, 'hint', '')}".encode())


# ==== 8  Administration ======================================================
# What an administrator asks for on the server: who holds what, whether the server could work, keys,
# and the files for clients and for the system. None of it needs a running server.

STATUS_PATIENCE_S = 8.0  # with a server that is busy


HEADINGS = ("ADDRESS", "OPEN", "USER", "LEFT", "PACKETS", "BYTES")
ALIGNMENT = "<<<>>>"  # of the columns, as format() has it
BOLD, YELLOW, PLAIN = "\x1b[1m", "\x1b[33m", "\x1b[0m"
CLEAR = "\x1b[H\x1b[J"  # the whole terminal
SOON_S = 60  # a lease that ends earlier is coloured
WATCH_S = 1.0
FOLLOW_PAUSE_S = 0.5  # before a server that has ended, or cut us off, is asked again


def show_status(config: Config, rundir: str, as_json: bool) -> None:
    """Print who holds what, as the kernel has it, and what a running server tells of itself.
    Raises UserError."""
    import json
    elements = list_elements(config)
    check_rundir(rundir)
    server, why = ask_server(config, rundir)
    if as_json:
        table = {"family": config.family, "table": config.table}
        print(json.dumps({**table, "leases": elements, "server": server}, indent=1), flush=True)
        return
    is_coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    lines = lease_table(elements, config, is_coloured) or ["Nobody holds a lease."]
    about = server_lines(server) if server else [why]
    if sys.stdout.isatty():
        import shutil
        import textwrap
        width = shutil.get_terminal_size().columns
        about = [textwrap.fill(line, width, subsequent_indent="  ") for line in about]
    print("\n".join(lines + about), flush=True)


def watch_status(config: Config, rundir: str) -> None:
    """Show the status anew each second, until Ctrl-C. Raises UserError."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            print(CLEAR, end="")
            show_status(config, rundir, as_json=False)
            time.sleep(WATCH_S)
    print()


def follow_status(config: Config, rundir: str, as_json: bool) -> None:
    """Print who holds what, then each change, for as long as somebody reads it. While no server
    runs, the kernel is asked again and again. Raises UserError."""
    known = None
    while True:
        check_rundir(rundir)
        with contextlib.suppress(ConfigError):  # it may have changed, with the server
            config = read_config(config.path, server=True)
        with socket.socket(socket.AF_UNIX) as peer:
            try:
                peer.connect(run_path(rundir, config) + ".follow")
            except PermissionError as error:
                raise unreadable(config, error) from None
            except (FileNotFoundError, ConnectionRefusedError):
                change = snapshot(config)
                found = [{**lease, "seconds_left": 0} for lease in change["leases"]]
                if found != known:
                    print_change(change, as_json)
                known = found
            else:
                known = None
                for change in changes_from(peer):
                    is_greeting = change["event"] == "following"  # from now on it misses nothing
                    print_change(snapshot(config) if is_greeting else change, as_json)
        wait_for_news(seconds=FOLLOW_PAUSE_S)


def wait_for_news(peer: socket.socket | None = None, seconds: float | None = None) -> None:
    """Wait until the peer says something, for so many seconds at most. Raises BrokenPipeError as
    soon as nobody reads our output any more."""
    poll = select.poll()
    poll.register(1, 0)  # it tells of an output that was closed
    if peer:
        poll.register(peer, select.POLLIN)
    ready = poll.poll(None if seconds is None else 1000 * seconds)
    if any(descriptor == 1 for descriptor, _ in ready):
        raise BrokenPipeError


def changes_from(peer: socket.socket) -> Iterator[dict[str, Any]]:
    """What a server tells, until it ends or cuts us off. Raises BrokenPipeError if nobody reads
    our output any more, UserError if the server has too many followers."""
    import json
    rest = b""
    while True:
        wait_for_news(peer)
        data = b""
        with contextlib.suppress(ConnectionError):
            data = peer.recv(1 << 16)
        if not data:
            return
        *lines, rest = (rest + data).split(b"\n")
        for change in map(json.loads, lines):
            if change["event"] == "refused":
                hint = "end one of them: 'ps ax' shows who runs 'letmein status --follow'"
                raise UserError(f"the server has {FOLLOWERS_LIMIT} followers already", hint)
            yield change


def snapshot(config: Config) -> dict[str, Any]:
    """All leases as the kernel has them, as an event. Raises UserError."""
    elements_of: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
    for element in list_elements(config):
        # The others are none of ours, or end so soon that their end may have been told already.
        if element["user"] and element["seconds_left"]:
            ids = int(element["resource"], 16), int(element["user"], 16)
            elements_of.setdefault((element["address"], *ids), []).append(element)
    leases = []
    for (address, identifier, user), elements in elements_of.items():
        protocols = tuple(sorted(each["protocol"] for each in elements if each["protocol"]))
        known = config.resources.get(identifier)
        jumps = known.jumps if known else ()
        port = elements[0]["port"] or 0
        resource = Resource(identifier, port, protocols, jumps, 0.0, frozenset())
        left = min(each["seconds_left"] for each in elements) + 1  # it was rounded down
        leases.append(lease_facts(address, user, resource, left))
    return {"event": "snapshot", "time": time.time(), "leases": leases}


def print_change(change: dict[str, Any], as_json: bool) -> None:
    """Print an event, for people one line for each lease."""
    if as_json:
        print(json_line(change).decode(), end="", flush=True)
        return
    clock = time.strftime("%H:%M:%S", time.localtime(change["time"]))
    is_snapshot = change["event"] == "snapshot"
    leases = change["leases"] if is_snapshot else [change]
    if not leases:
        print(clock, "nobody holds a lease", sep="  ")
    for lease in leases:
        what = opened(lease["port"], lease["protocols"], lease["resource"], lease["chains"])
        event = "open" if is_snapshot else change["event"]
        end = lease.get("reason") or f"{duration(lease['seconds_left'])} left"
        print(clock, f"{event:8}", lease["address"], what, f"user {lease['user']}", end, sep="  ")
    sys.stdout.flush()


def ask_server(config: Config, rundir: str) -> tuple[dict[str, Any] | None, str]:
    """What a running server says of itself, or None and why it says nothing."""
    import json
    table = f"table {config.table_name}"
    try:
        with socket.socket(socket.AF_UNIX) as peer:
            peer.settimeout(STATUS_PATIENCE_S)
            peer.connect(run_path(rundir, config) + ".status")
            return json.load(peer.makefile("rb")), ""
    except (FileNotFoundError, ConnectionRefusedError):
        if has_rules(config):
            why = "It was killed, or runs with another --rundir."
            return None, f"No server answers in {rundir}, but its rules are in {table}. {why}"
        return None, f"No server for {table} runs in {rundir}; leases end by themselves."
    except socket.timeout:
        return None, f"The server for {table} does not answer: see its log."
    except (OSError, ValueError) as error:
        return None, f"The server for {table} cannot be asked: {error}."


def has_rules(config: Config) -> bool:
    """Whether a server's rules are in its chain."""
    kernel = Kernel(config.family, config.table)
    with contextlib.suppress(OSError), contextlib.closing(kernel.socket):
        return any(map(is_ours, kernel.rules(config.chains["input"])))
    return False


def aligned(rows: Sequence[Sequence[str]], alignment: str) -> list[str]:
    """The lines of a table. Args: alignment, of the columns, as format() has it."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for row in rows:
        cells = (f"{cell:{align}{width}}" for cell, align, width in zip(row, alignment, widths))
        lines.append("  ".join(cells).rstrip())
    return lines


def opened(
    port: int | None, protocols: Iterable[str], resource: str | None, chains: Iterable[str]
) -> str:
    """What a lease opens: a port, such as 22/tcp, or the chains of a jump resource."""
    if port is not None:
        return f"{port}/{'+'.join(sorted(protocols))}"
    return f"{resource}: {', '.join(chains)}" if resource else "?"


def lease_table(elements: list[dict[str, Any]], config: Config, is_coloured: bool) -> list[str]:
    """The lines of the table of leases, the first to end first; none if there are no leases. All
    protocols of a port are one lease."""
    elements_of: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for element in elements:
        lease = (element["address"], element["resource"], element["port"])
        elements_of.setdefault(lease, []).append(element)
    rows = []  # each behind the seconds that are left
    for (address, resource, port), parts in elements_of.items():
        known = config.resources.get(int(resource, 16)) if resource else None
        chains = [jump.target for jump in known.jumps] if known else ["?"]
        what = opened(port, [part["protocol"] for part in parts], resource, chains)
        times = [part["seconds_left"] for part in parts]
        left = min(NEVER if seconds is None else seconds for seconds in times)
        packets, octets = (sum(part[name] for part in parts) for name in ("packets", "bytes"))
        numbers = (duration(left), scaled(packets), scaled(octets))
        rows.append((left, (address, what, parts[0]["user"] or "?", *numbers)))
    if not rows:
        return []
    rows.sort()
    lines = aligned([HEADINGS, *(row for _, row in rows)], ALIGNMENT)
    if is_coloured:
        lines[0] = BOLD + lines[0] + PLAIN
        for number, (left, _) in enumerate(rows, 1):
            if left < SOON_S:
                lines[number] = YELLOW + lines[number] + PLAIN
    return [*lines, ""]


def duration(seconds: float) -> str:
    """A time for people: its two largest units, such as 9m 58s."""
    if seconds == NEVER:
        return "for ever"
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    units = [(days, "d"), (hours, "h"), (minutes, "m"), (seconds, "s")]
    first = next((at for at, (number, _) in enumerate(units) if number), 3)
    return " ".join(f"{number}{unit}" for number, unit in units[first : first + 2])


def scaled(number: float) -> str:
    """A number for people: three digits at least, such as 1500, 64.2k, 3.1M."""
    for unit in ("", "k", "M", "G"):
        if number < 10_000 or unit == "G":
            break
        number /= 1000
    return f"{number:.1f}{unit}" if unit else str(number)


def server_lines(server: dict[str, Any]) -> list[str]:
    """Lines about a running server, for people."""
    up = duration(max(time.time() - server["since"], 0))
    where = f"port {server['port']}, {server['table']}"
    rules = f"rules {server['rules']} of {server['max_nr_rules']}"
    lines = [f"Server: pid {server['process']}, up {up}, {where}, {rules}"]
    for title in ("refused", "counts"):
        counts = ", ".join(f"{name} {number}" for name, number in server[title].items())
        lines.append(f"{title.capitalize()}: {counts or 'none'}")
    return lines


def list_elements(config: Config) -> list[dict[str, Any]]:
    """Who holds what, by the elements that the kernel has. Raises UserError."""
    elements: list[dict[str, Any]] = []
    protocols = {number: name for name, number in PROTOCOL_NUMBERS.items()}
    try:
        kernel = Kernel(config.family, config.table)
        kernel.table_facts()
        # By name: the kernel may tell of an element twice while a set grows.
        found: dict[ElementName, Element] = {}
        for set_name in sorted(kernel.sets()):
            with contextlib.suppress(FileNotFoundError):  # it has just been deleted
                for each in kernel.elements(set_name):
                    found[ElementName(set_name, each.key)] = each
    except OSError as error:
        raise unreadable(config, error) from None
    for name, element in found.items():
        if name.set_name.endswith("-gate"):
            continue
        address, opens = read_key(name)
        protocol, port = opens or (None, None)
        comment = COMMENT.fullmatch(element.comment)
        elements.append({
            "address": address or element.key.hex() or "*",  # what is none of ours as nft has it
            "protocol": protocols.get(protocol, str(protocol)) if protocol is not None else None,
            "port": port,
            "resource": comment["resource"] if comment else None,
            "user": comment["user"] if comment else None,
            "seconds_left": None if element.left == NEVER else int(element.left),
            "packets": element.packets,
            "bytes": element.octets,
        })
    return elements


# What other rules do with a knock is read from the text that nft prints. It is for a warning alone,
# so what is not clear counts as good.
LISTED_TABLE = re.compile(r"table (\w+) (\S+) \{")
LISTED_CHAIN = re.compile(r"\tchain (\S+) \{")
# What may be in a rule that holds for every packet, beside its verdict.
NO_CONDITION = re.compile(
    r"counter packets \d+ bytes \d+ ?|log( prefix \"[^\"]*\"| (level|group|flags) \S+)* ?"
    r"| ?comment \"[^\"]*\""
)
LISTED_PORTS = re.compile(r"dport (?:vmap )?(?:\{ (.*?) \}|(@\S+|[\d-]+))")


class ListedChain(NamedTuple):
    """A chain, as nft lists it. Of a base chain the first rule is its hook and policy."""

    family: str
    table: str
    name: str
    rules: list[str]

    def drops_at(self) -> int:
        """The number of the rule from which on this chain drops everything; -1 if none does."""
        for number, rule in enumerate(self.rules):
            verdict = NO_CONDITION.sub("", rule)
            if verdict == "drop" or verdict.startswith("reject"):
                return number
            if verdict == "accept":
                return -1
        return len(self.rules) if self.rules and "policy drop;" in self.rules[0] else -1

    def names_port(self, port: int) -> bool:
        """Whether a rule looks at this destination port; or at something that may hold it: a set,
        or a match of iptables that nft does not know."""
        rules = "\n".join(self.rules)
        if "xt match" in rules:
            return True
        for found in LISTED_PORTS.finditer(rules):
            for item in re.findall(r"@|\d+-\d+|\d+", found[1] or found[2]):
                first, _, last = item.partition("-")
                if item == "@" or int(first) <= port <= int(last or first):
                    return True
        return False


def listed_chains(listing: str) -> list[ListedChain]:
    """The chains in what `nft list ruleset` prints."""
    chains: list[ListedChain] = []
    family = table = ""
    is_inside = False
    for line in listing.splitlines():
        if found := LISTED_TABLE.fullmatch(line):
            family, table = found.groups()
        elif found := LISTED_CHAIN.fullmatch(line):
            chains.append(ListedChain(family, table, found[1], []))
            is_inside = True
        elif line == "\t}":
            is_inside = False
        elif is_inside:
            chains[-1].rules.append(line.strip())
    return chains


def late_jumps(chains: list[ListedChain], config: Config) -> list[str]:
    """Warnings of rules that drop everything in front of the jump to our chain."""
    warnings = []
    own = [each for each in chains if (each.family, each.table) == (config.family, config.table)]
    for target in config.chains.values():
        jump = re.compile(rf"(jump|goto) {re.escape(target)}(?![\w.-])")
        is_behind = {}  # by chain, whether its jumps come too late
        for chain in own:
            jumps = [number for number, rule in enumerate(chain.rules) if jump.search(rule)]
            if jumps:
                is_behind[chain.name] = 0 <= chain.drops_at() < jumps[0]
        if is_behind and all(is_behind.values()):
            problem = f"the jump to {target} is behind a rule of {', '.join(is_behind)}"
            warnings.append(f"{problem} that drops everything; move the jump above that rule")
    return warnings


def foreign_drops(chains: list[ListedChain], config: Config) -> list[str]:
    """Warnings of other tables that drop all knocks: what one table accepts another one may drop,
    nft(8)."""
    warnings = []
    for chain in chains:
        table = (chain.family, chain.table)
        is_hook = chain.rules and chain.rules[0].startswith("type filter hook input ")
        versions = set(VERSIONS.get(chain.family, ())).intersection(VERSIONS[config.family])
        is_own = table == (config.family, config.table)
        if is_own or not is_hook or not versions or chain.drops_at() < 0:
            continue
        siblings = [each for each in chains if (each.family, each.table) == table]
        if not any(each.names_port(config.port) for each in siblings):
            problem = f"chain {chain.name} of table {' '.join(table)} drops all knocks"
            hint = "let it accept the control port, and the ports of your resources"
            command = way_in(chain, [each.name for each in siblings], config)
            warnings.append(f"{problem}, whatever letmein accepts; {hint}: {command}")
    return warnings


def way_in(chain: ListedChain, siblings: Iterable[str], config: Config) -> str:
    """The command that has another program's firewall accept the control port."""
    protocol = config.protocols[0]
    port = f"{config.port}/{protocol}"
    if chain.table == "firewalld":
        return f"firewall-cmd --permanent --add-port={port} && firewall-cmd --reload"
    if any(name.startswith(("ufw-", "ufw6-")) for name in siblings):
        return f"ufw allow {port}"
    place = f"{chain.family} {chain.table} {chain.name}"
    if place in ("ip filter INPUT", "ip6 filter INPUT"):
        program = {"ip": "iptables", "ip6": "ip6tables"}[chain.family]
        return f"{program} -I INPUT -p {protocol} --dport {config.port} -j ACCEPT"
    return f"nft insert rule {place} {protocol} dport {config.port} accept"


def check(config: Config, is_verbose: bool) -> None:
    """Check whether the server could work, and print what it would do. Raises UserError."""
    began = time.monotonic()
    nft = Nft(config.nft)
    nft.limit = NFT_LIMIT_S[1]
    kernel = Kernel(config.family, config.table)
    check_kernel(kernel, nft, config)
    took = time.monotonic() - began
    warnings = unreached_chains(kernel, config)
    chains = listed_chains(nft.run("list ruleset", "-t"))
    warnings += late_jumps(chains, config) + foreign_drops(chains, config)
    if took > SLOW_NFT_S:
        hint = "move large sets of others to a table of their own, if this machine is not just busy"
        warnings.append(f"nft took {took:.1f} s; {hint}")
    for warning in warnings:
        warn(warning)
    print("\n".join(server_facts(config)))
    if is_verbose:
        print(f"\n{ruleset_script(config)}", end="")
    number = len(config.warnings) + len(warnings)
    verdict = {0: "good", 1: "1 warning"}.get(number, f"{number} warnings")
    print(f"\n{verdict}: nothing was changed")


def server_facts(config: Config) -> list[str]:
    """What a server with this configuration does, in lines for people."""
    policies = {rank: name for name, rank in POLICIES.items()}
    facts = [
        ("file", config.path),
        ("control port", config.control),
        ("error policy", policies[config.error_policy]),
        ("seccomp", config.seccomp),
        ("table", config.table_name),
        ("chains", ", ".join(f"{chain} ({hook})" for hook, chain in config.chains.items())),
        ("sets", listed(list(ruleset(config).sets), ", ")),
        ("keys of", listed([f"{user:08X}" for user in config.keys], ", ") or "nobody"),
    ]
    rows = [("RESOURCE", "OPENS", "SECONDS", "USERS")]
    for resource in config.resources.values():
        granted = lease_terms(resource, resource.timeout)
        what = granted.get("port") or f"jump to {granted['jump']}"
        users = who_may(config, resource).replace(",", ", ")
        users = "everybody with a key" if users == "all" else users
        rows.append((f"{resource.identifier:08X}", what, granted["seconds"], users))
    lines = [*aligned(facts, "<<"), "", *aligned(rows, "<<><")]
    if config.limits:
        limits = [("USER", "SECONDS", "LAST DAY")]
        for user, each in config.limits.items():
            seconds = "any" if each.timeout == NEVER else f"{each.timeout:.10g}"
            limits.append((f"{user:08X}", seconds, each.last_day or "none"))
        lines += ["", *aligned(limits, "<><")]
    return lines


def resource_text(resource: Resource, timeout: float) -> str:
    """A resource's value as it is written in a file, without its users, with this timeout."""
    items = [f"port: {resource.port}", ", ".join(resource.protocols)]
    if resource.jumps:
        items = ["jump"]
    for hook, target, match_saddr in resource.jumps:
        items.append(f"{hook}: {target}")
        if match_saddr:
            items.append(f"{hook}-match: saddr")
    return " / ".join([*items, f"timeout: {timeout:.10g}"])


def client_file(config: Config, user: int, host: str) -> str:
    """The complete letmein.conf of a user, from the server's configuration: what that user may
    have, and the key. Raises UserError."""
    if user not in config.keys:
        hint = f"make one: letmein gen-key -u {user:X}, and put that line below [KEYS]"
        raise UserError(f"{config.path}: [KEYS] has no key for user {user:08X}", hint)
    allowed = [
        resource
        for resource in config.resources.values()
        if not config.why_not(user, resource.identifier) and resource.timeout
    ]
    if not allowed:
        warn(f"{config.path}: [RESOURCES] has nothing for user {user:08X}")
    first = allowed[0] if allowed else None
    what = "PORT" if first is None else str(first.port or f"-r {first.identifier:X}")
    example = f"letmein knock {host} {what}"
    lines = [
        f"# letmein.conf of user {user:08X} for {host}. It holds a key: show it to nobody else.",
        "# Install it, on the client:",
        "#     umask 077; mkdir -p ~/.config/letmein; cat >~/.config/letmein/letmein.conf",
        f"# Then: {example}",
        "[GENERAL]",
        f"port = {config.port} / {', '.join(config.protocols)}",
        "[CLIENT]",
        f"default-user = {user:08X}",
        "[KEYS]",
        f"{user:08X} = {config.keys[user].hex().upper()}",
        "[RESOURCES]",
    ]
    for resource in allowed:
        text = resource_text(resource, config.timeout_of(user, resource))
        lines.append(f"{resource.identifier:08X} = {text}")
    if last_day := config.limits_of(user).last_day:
        lines.insert(1, f"# The server takes this key up to the end of {last_day} (UTC).")
    return "".join(line + "\n" for line in lines)


def generate_key(user: int | None, client_path: str, server_path: str) -> None:
    """Print a new key's line and, on standard error, where it belongs. Without a user it is for the
    client's default user, or for the next one who has no key yet. Args: the paths of both files,
    which may be missing."""
    keys: Mapping[int, bytes] = {}
    default = 0
    # A key comes before there is a file, which need not be complete either: only its keys matter.
    with contextlib.suppress(ConfigError):
        default = read_config(client_path, server=False).default_user
    for with_included_files in (True, False):
        with contextlib.suppress(ConfigError):
            keys = read_config(server_path, server=with_included_files).keys
            break
    wanted = default if user is None else user
    new = wanted
    while user is None and new in keys:
        new = (new + 1) & 0xFFFFFFFF
    print(f"{new:08X} = {os.urandom(KEY_SIZE).hex().upper()}", flush=True)
    if new != wanted:
        tell(f"user {wanted:08X} has a key in {server_path}, so this one is for user {new:08X}")
    if new in keys:
        tell(f"user {new:08X} has a key in {server_path}: this line replaces that one")
    tell("put this line below [KEYS] in letmeind.conf on the server and in the client's file")
    if new != default:
        tell(f"the client's file also needs, below [CLIENT]: default-user = {new:08X}")
    tell(f"or have the server print the whole client's file: letmein client-conf -u {new:X}")


OPENWRT_SCRIPT = """\
#!/bin/sh /etc/rc.common
# The chain, and the jump to it, in the table that fw4 makes:
#     echo 'chain LETMEIN-INPUT {{ }}' >/etc/nftables.d/letmein.nft
#     mkdir -p /usr/share/nftables.d/chain-pre/input
#     echo 'jump LETMEIN-INPUT' >/usr/share/nftables.d/chain-pre/input/letmein.nft
START=95
USE_PROCD=1
start_service() {{
    procd_open_instance
    procd_set_param command {command}
    procd_set_param respawn 3600 5 0
    procd_set_param stderr 1
    procd_close_instance
}}
reload_service() {{ procd_send_signal letmeind '*' HUP; }}
"""
SYSTEMD_SOCKET = """\
# An extra. letmeind.service must be enabled as well: without it the firewall drops all knocks.
# The ports are those of letmeind.conf: print this file again when they change.
[Socket]
{sockets}
[Install]
WantedBy=sockets.target
"""
SYSTEMD_UNIT = """\
[Unit]
Description=letmein, an authenticated port knocker
After=nftables.service network.target
[Service]
ExecStart={command} --rundir /run/letmeind
ExecReload=/bin/kill -HUP $MAINPID
Type=notify
KillMode=mixed
Restart=on-failure
RestartSec=3
RestartForceExitStatus=SIGHUP
UMask=0077
SyslogIdentifier=letmeind
LockPersonality=yes
MemoryDenyWriteExecute=yes
NoNewPrivileges=yes
PrivateDevices=yes
PrivateMounts=yes
ProtectClock=yes
ProtectControlGroups=yes
ProtectHome=tmpfs
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectProc=invisible
ProtectSystem=strict
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
SystemCallArchitectures=native
SystemCallErrorNumber=EPERM
# Not PrivateTmp=: that makes a directory in /tmp, and whoever fills that up keeps us from starting.
# Not User=: what it gives is not lost by a change of user, so the network process would keep it.
CapabilityBoundingSet=CAP_NET_ADMIN CAP_SETUID CAP_SETGID CAP_SYS_CHROOT CAP_KILL
RestrictAddressFamilies=AF_INET AF_INET6 AF_NETLINK AF_UNIX
SystemCallFilter=@system-service chroot seccomp
SystemCallFilter=~@aio @chown @keyring @memlock @resources
# All that is there of the disk:
RuntimeDirectory=letmeind letmeind/root
RootDirectory=/run/letmeind/root
BindReadOnlyPaths=-/bin -/lib -/lib64 -/sbin {places}
[Install]
WantedBy=multi-user.target
"""


def service_file(kind: str, path: str, account: str) -> str:
    """A file that starts this copy of the program with the system. Args: kind, as on the command
    line; path, of letmeind.conf; account, of the network process. Raises UserError."""
    import shlex
    if kind == "systemd-socket":
        config = read_config(path, server=True)
        types = {"tcp": "Stream", "udp": "Datagram"}
        sockets = [f"Listen{types[protocol]}={config.port}" for protocol in config.protocols]
        return SYSTEMD_SOCKET.format(sockets="\n".join(sockets))
    program, module, path = map(os.path.realpath, (sys.argv[0], __file__, path))
    command = shlex.join([sys.executable, "-I", program, "server", "-c", path, "--user", account])
    if kind == "openwrt":
        return OPENWRT_SCRIPT.format(command=command)
    places = service_places(program, module, path)
    return SYSTEMD_UNIT.format(command=command, places=shlex.join(places))


def service_places(program: str, module: str, path: str) -> list[str]:
    """The directories that the service sees. Args: path, of letmeind.conf. Raises UserError."""
    files = {file: os.path.dirname(file) for file in (program, module, path)}
    with contextlib.suppress(ConfigError):
        config = read_config(path, server=True)
        if config.include:
            files[f"what include in {path} names"] = include_directory(config)
    for file, directory in files.items():
        if directory == "/":
            hint = "move it into a directory: the service sees its files' directories, and no more"
            raise UserError(f"{file} lies in /, which would show the service all of the disk", hint)
    for place in (sys.executable, sys.prefix, *files, *files.values()):
        if re.search(r"[%$:\\'\"\n]", place):
            problem = f"systemd would not read {shown(place)} as a path"
            raise UserError(problem, "use a path without % $ : \\ and quotation marks")
    return sorted({"/etc", "/usr", sys.prefix, sys.base_prefix, *files.values()})


# ==== 9  Command line ========================================================
# Words in, one call out: each Command names its options and what runs it.

HELP_COLUMN = 26  # where the text of --help begins
HELP_WIDTHS = (80, 100)  # where standard output is no terminal; the widest


class UsageError(UserError):
    """The command line is wrong. Args: what is wrong, what to do."""


class Option(NamedTuple):
    """An option of the command line; or an argument, whose name is in upper case."""

    names: tuple[str, ...]
    field: str  # of what parse_words() returns
    text: str  # for --help, which does not show an option that has none
    metavar: str = ""  # of its value; "" for an option that has none
    parse: Callable[[str], Any] = str  # its value. Raises Unfit
    words: tuple[str, ...] = ()  # the values that there are, in place of parse
    value: Any = True  # of an option without a metavar
    default: Any = None
    is_list: bool = False  # it may be repeated


class Command(NamedTuple):
    """A command, and what --help says of it. Lines of help are at most 80 characters long."""

    name: str
    summary: str  # for the list of commands
    usage: str
    about: str
    examples: str
    arguments: tuple[Option, ...] = ()
    options: tuple[Option, ...] = ()
    # Does it, given the words of the command line, and returns the exit status. Raises UserError.
    run: Callable[[SimpleNamespace], int] | None = None


# The name of a user of this machine.
parse_account = functools.partial(
    matched, pattern="[A-Za-z_][A-Za-z0-9_.-]{0,31}", expected="a user's name, or none"
)
# How many connections the server keeps.
parse_slots = functools.partial(parse_number, least=1, limit=SLOTS_LIMIT)
# A host's name or address, fit for a file: nothing that could begin a line of its own.
parse_host_name = functools.partial(
    matched, pattern=r"[\w.:%\[\]-]{1,255}", expected="a host's name or address"
)


def default_rundir() -> str:
    """The server's run directory. Our systemd unit lets it write to /run/letmeind alone; OpenWrt
    has had no /run before 24.10."""
    return next(filter(os.path.isdir, ("/run/letmeind", "/run", "/var/run")), "/run")


# -- what each command does

SERVER_FILE, CLIENT_FILE = "letmeind.conf", "letmein.conf"


def allow_hangup() -> None:
    """Take SIGHUP from now on, and the one that has come since our start."""
    if hasattr(signal, "SIGHUP"):  # Windows has none
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGHUP])


def config_places(name: str) -> list[str]:
    """Where a configuration file may be. Args: name, SERVER_FILE or CLIENT_FILE."""
    home = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    homes = [f"{home}/letmein"] if name == CLIENT_FILE else []
    return [f"{place}/{name}" for place in (*homes, *CONFIG_PLACES)]


def config_path(name: str, given: str | None) -> str:
    """The configuration file: the one given with --config, or the first that is there."""
    places = config_places(name)
    return given or next(filter(os.path.exists, places), places[-1])


def load_config(name: str, arguments: SimpleNamespace, is_told: bool = True) -> Config:
    """The configuration, with what the command line says instead. Args: is_told, whether the user
    is told the warnings. Raises ConfigError."""
    try:
        config = read_config(config_path(name, arguments.config), name == SERVER_FILE)
    except ConfigError as error:
        for warning in error.warnings:
            warn(warning)
        raise
    for warning in config.warnings if is_told else ():
        warn(warning)
    if arguments.dns:
        warn("--dns and --dns-crypt are obsolete; the system resolves names")
    return config._replace(seccomp=arguments.seccomp or config.seccomp)


def new_client(arguments: SimpleNamespace) -> Client:
    """A client that can make only the system calls that it needs. Raises UserError."""
    if not os.path.exists(config_path(CLIENT_FILE, arguments.config)):
        where = arguments.config or ", ".join(config_places(CLIENT_FILE))
        hint = "have the server's administrator make one: letmein client-conf -u ID"
        if arguments.config:
            hint = f"check the path, or {hint}"
        raise UserError(f"there is no configuration file, and so no key: {where}", hint)
    config = load_config(CLIENT_FILE, arguments)
    if arguments.to_run and config.seccomp != "off":
        hint = "use connect, or --seccomp off"
        raise UserError("COMMAND would run with the filter that seccomp gives the client", hint)
    system_call_filter(config.seccomp, CLIENT_CALLS)()
    return Client(config, arguments)


def run_knock(arguments: SimpleNamespace) -> int:
    client = new_client(arguments)
    if arguments.to_run:
        return Hold(client).run()
    return 0 if client.ask_all(KNOCK) == client.resources else 1


def run_revoke(arguments: SimpleNamespace) -> int:
    client = new_client(arguments)
    return 0 if client.ask_all(REVOKE) == client.resources else 1


def run_connect(arguments: SimpleNamespace) -> int:
    return Hold(new_client(arguments)).run()


def run_gen_key(arguments: SimpleNamespace) -> int:
    paths = (config_path(name, arguments.config) for name in (CLIENT_FILE, SERVER_FILE))
    generate_key(arguments.user, *paths)
    return 0


def run_client_conf(arguments: SimpleNamespace) -> int:
    config = load_config(SERVER_FILE, arguments)
    host = arguments.host_name or socket.gethostname()
    print(client_file(config, arguments.user, host), end="")
    return 0


def run_server(arguments: SimpleNamespace) -> int:
    """Serve until told to stop, or with --check only check whether that would work."""
    # Before all else: what systemd has given us, and signals, so that a change of the file behind
    # which a SIGHUP came is never missed.
    if not hasattr(os, "memfd_create"):  # it is built for a glibc before 2.27
        hint = "run it with the system's own Python, such as /usr/bin/python3"
        raise UserError("this Python is built for an older Linux: it has no memfd_create()", hint)
    activated = activated_sockets()
    first = 3 + sum(map(len, activated.values()))
    os.closerange(first, 1 << 16)  # what else our parent has left open is for nobody
    signals = -1 if arguments.check else note_signals()
    allow_hangup()
    config = load_config(SERVER_FILE, arguments, is_told=arguments.check)
    find_account(arguments.account)
    filter_system_calls = system_call_filter(config.seccomp, MONITOR_CALLS)
    if arguments.check:
        need_rundir(arguments.rundir)
        check(config, arguments.verbose)
        return 0
    give_back_memory()
    warnings = config.warnings + give_up_rights()
    filter_system_calls()
    options = ServerOptions(
        rundir=arguments.rundir,
        account=arguments.account,
        connections=arguments.num_connections,
        prefix_connections=arguments.num_ip_connections,
        seccomp=arguments.seccomp,
        activated=activated,
        signals=signals,
    )
    Monitor(config._replace(warnings=warnings), options).run()
    return 0


def run_service(arguments: SimpleNamespace) -> int:
    path = config_path(SERVER_FILE, arguments.config)
    print(service_file(arguments.kind, path, arguments.account), end="")
    return 0


def run_status(arguments: SimpleNamespace) -> int:
    config = load_config(SERVER_FILE, arguments)
    if arguments.follow:
        follow_status(config, arguments.rundir, arguments.json)
    elif arguments.watch:
        watch_status(config, arguments.rundir)
    else:
        show_status(config, arguments.rundir, arguments.json)
    return 0


def run_completion(arguments: SimpleNamespace) -> int:
    print(completion(arguments.shell))
    return 0


# -- the commands and their options

SERVICE_KINDS = ("systemd", "systemd-socket", "openwrt")
SHELLS = ("bash", "zsh", "fish")

CONFIG = Option(
    ("-c", "--config"), "config", "configuration file (default: letmein.conf in ~/.config/letmein,"
    " /opt/letmein/etc or /etc)", "FILE",
)  # fmt: skip
SERVER_CONFIG = CONFIG._replace(
    text="configuration file (default: letmeind.conf in /opt/letmein/etc or /etc)"
)
COMMON = (  # options of all commands, in front of COMMAND or behind it
    CONFIG,
    Option(("--verbose",), "verbose", "print more about what happens"),
    Option(
        ("--seccomp",), "seccomp", "filter system calls: off, log or kill (default: seccomp of the"
        " configuration file, else off)", "MODE", words=SECCOMP,
    ),
    Option(("-h", "--help"), "help", "print this help"),
    Option(("-v", "--version"), "version", "print the version"),
    Option(("--dns", "--dns-crypt"), "dns", "", "MODE"),  # obsolete in the reference, too
)  # fmt: skip

USER = Option(
    ("-u", "--user"), "user", "user whose key is used (default: default-user of the configuration"
    " file, else 00000000)", "ID", parse_identifier,
)  # fmt: skip
HOST = Option(("HOST",), "host", "name or address of the server")
PORT = Option(
    ("PORT",), "ports", "port of a resource in [RESOURCES] of the configuration file, such as 22;"
    " several may follow each other", parse=parse_port, is_list=True,
)  # fmt: skip
QUIET = Option(("-q", "--quiet"), "quiet", "print only warnings and errors")
RESOURCE_ID = Option(
    ("-r", "--resource"), "resources", "resource instead of a PORT, such as a jump; may be"
    " repeated", "ID", parse_identifier, is_list=True,
)  # fmt: skip
CONTACT = (  # how the client reaches the server
    USER,
    Option(
        ("-P", "--server-port"), "server_port", "control port of the server (default: port of the"
        " configuration file, else 5800)", "PORT", parse_port,
    ),
    Option(
        ("-T", "--server-port-tcp"), "protocol", "knock over TCP (default: what port in the"
        " configuration file says, TCP if it says both)", value="tcp",
    ),
    Option(("-U", "--server-port-udp"), "protocol", "knock over UDP", value="udp"),
    Option(
        ("-4", "--ipv4"), "families", "knock over IPv4 (default: over IPv4 and IPv6, and one of"
        " them is enough; with -4 and -6 both must work)", value=socket.AF_INET, is_list=True,
    ),
    Option(
        ("-6", "--ipv6"), "families", "knock over IPv6", value=socket.AF_INET6, is_list=True,
    ),
)  # fmt: skip
RUNDIR = Option(
    ("--rundir",), "rundir", "run directory of the server (default: /run/letmeind if it exists,"
    " else /run)", "DIR", default=default_rundir,
)  # fmt: skip
ACCOUNT = Option(
    ("--user",), "account", "account that the network process changes to; none: it stays root"
    " (default: letmeind)", "NAME", parse_account, default="letmeind",
)  # fmt: skip

LETMEIN = Command(
    "", "", "[OPTION...] COMMAND ...",
    "An authenticated port knocker: a firewall opens a port to clients with a key.",
    """\
  letmein knock server 22                  open port 22 for this machine
  letmein knock server 22 -- ssh server    open it, log in, close it
  ssh -o ProxyCommand='letmein connect %h %p' server
  letmein help knock                       more about one command""",
    options=(CONFIG._replace(text="configuration file (each command's help names its default)"),),
)  # fmt: skip
COMMANDS = (
    Command(
        "knock", "open a port for this machine's address",
        "[OPTION...] HOST (PORT... | -r ID...) [-- COMMAND...]",
        """\
Open ports of HOST for the address of this machine, for as long as the server
allows. With COMMAND they stay open while it runs, and are closed at its end.""",
        """\
  letmein knock server 22                  open port 22
  letmein knock server 22 443              open two ports
  letmein knock -r 80 server               open resource 00000080
  letmein knock server 22 -- ssh server    open port 22, log in, close it""",
        (HOST, PORT, Option(
            ("COMMAND",), "to_run", "program to run, with its arguments; its exit status is that"
            " of letmein", is_list=True,
        )),
        (
            RESOURCE_ID, *CONTACT, QUIET,
            Option(("--keep",), "keep", "leave the ports open when COMMAND ends"),
        ),
        run=run_knock,
    ),
    Command(
        "revoke", "close it again", "[OPTION...] HOST (PORT... | -r ID...)",
        """\
Close ports of HOST that this machine has opened. What is not open counts as
closed. The older name of this command is close.""",
        """\
  letmein revoke server 22                 close port 22
  letmein revoke -r 80 server              close resource 00000080""",
        (HOST, PORT),
        (RESOURCE_ID, *CONTACT, QUIET),
        run=run_revoke,
    ),
    Command(
        "connect", "open a port and connect to it, for ssh's ProxyCommand",
        "[OPTION...] HOST PORT [-r ID]",
        """\
Open PORT of HOST and connect to it: standard input goes there, and what comes
from there goes to standard output. The port is closed at the end.""",
        """\
  ssh -o ProxyCommand='letmein connect %h %p' server
  letmein connect -r 80 server 8443        open 00000080, connect to port 8443""",
        (HOST, PORT._replace(text="port to open and to connect to")),
        (
            RESOURCE_ID._replace(text="open this resource, and connect to PORT"), *CONTACT,
            Option(("--keep",), "keep", "leave the port open at the end"),
        ),
        run=run_connect,
    ),
    Command(
        "gen-key", "print a new key", "[OPTION...]",
        "Print a new key, as a line for [KEYS] in the files of server and client.",
        """\
  letmein gen-key                          a key for the first user without one
  letmein gen-key -u 2A                    a key for user 0000002A""",
        (),
        (USER._replace(
            text="user that the key is for (default: the client's default-user; if letmeind.conf"
            " has a key for it, the next one)"
        ),),
        run=run_gen_key,
    ),
    Command(
        "client-conf", "print a user's client file, on the server", "[OPTION...] -u ID",
        """\
Print the complete letmein.conf of a user, made from letmeind.conf: it has the
user's key, the control port and what the user may open.""",
        """\
  letmein client-conf -u 2A                the file for user 0000002A
  letmein client-conf -u 2A | qrencode -t ansiutf8""",
        (),
        (
            USER._replace(text="user whose file is printed (required)"),
            Option(
                ("--host",), "host_name", "name by which the client reaches this server (default:"
                " the name of this machine)", "NAME", parse_host_name,
            ),
            SERVER_CONFIG,
        ),
        run=run_client_conf,
    ),
    Command(
        "server", "run the server", "[OPTION...]",
        "Run the server in the foreground. Its log goes to standard error.",
        """\
  letmein server --check                   see whether it could run
  letmein server                           run it""",
        (),
        (
            Option(("--check",), "check", "check configuration and firewall, and change nothing"),
            RUNDIR,
            Option(
                ("-n", "--num-connections"), "num_connections", "connections at the same time"
                " (default: 1024)", "COUNT", parse_slots, default=1024,
            ),
            Option(
                ("-N", "--num-ip-connections"), "num_ip_connections", "connections at the same time"
                " from one IPv4 address or one IPv6 /56 (default: 128)", "COUNT", parse_slots,
                default=128,
            ),
            ACCOUNT, SERVER_CONFIG,
            Option(("--no-systemd",), "no_systemd", ""),  # for the scripts of letmeind
        ),
        run=run_server,
    ),
    Command(
        "service", "print a file that starts the server at boot", "[OPTION...] KIND",
        """\
Print a file that starts this copy of the program at boot:
  systemd          the unit /etc/systemd/system/letmeind.service
  systemd-socket   an extra, letmeind.socket: systemd opens the control port
  openwrt          the init script /etc/init.d/letmeind""",
        """\
  letmein service systemd >/etc/systemd/system/letmeind.service
  letmein service openwrt >/etc/init.d/letmeind""",
        (Option(("KIND",), "kind", ", ".join(SERVICE_KINDS), words=SERVICE_KINDS),),
        (ACCOUNT, SERVER_CONFIG),
        run=run_service,
    ),
    Command(
        "status", "print who has opened what, on the server", "[OPTION...]",
        "Print who has opened what, for how long still, and what the server has counted.",
        """\
  letmein status --watch                   again each second, until Ctrl-C
  letmein status --follow                  each change as it happens
  letmein status --json | jq .leases""",
        (),
        (
            RUNDIR,
            Option(("--json",), "json", "print one JSON document, for other programs"),
            Option(("--watch",), "watch", "print it again each second, until Ctrl-C"),
            Option(
                ("--follow",), "follow", "print it, then each change as it happens, until Ctrl-C;"
                " with --json one JSON object a line",
            ),
            SERVER_CONFIG,
        ),
        run=run_status,
    ),
    Command(
        "completion", "print a completion script for a shell", "[OPTION...] SHELL",
        "Print a script with which a shell completes commands and options.",
        """\
  eval "$(letmein completion bash)"        in ~/.bashrc
  eval "$(letmein completion zsh)"         in ~/.zshrc, after compinit
  letmein completion fish | source         in ~/.config/fish/config.fish""",
        (Option(("SHELL",), "shell", ", ".join(SHELLS), words=SHELLS),),
        run=run_completion,
    ),
)  # fmt: skip
ALIASES = {"close": "revoke"}  # its older name


def options_of(command: Command) -> list[Option]:
    """A command's own options, and the common ones that it does not replace by one of its own."""
    fields = {option.field for option in command.options}
    return [*command.options, *(option for option in COMMON if option.field not in fields)]


def usage_line(command: Command) -> str:
    """How a command is used."""
    return f"usage: {' '.join(filter(None, ('letmein', command.name, command.usage)))}"


def help_row(left: str, text: str, width: int) -> str:
    """One or more lines of help: what is explained, and its text in a column of its own."""
    import textwrap
    indent = " " * HELP_COLUMN
    start = f"  {left}"
    if len(start) + 2 > HELP_COLUMN:
        start += f"\n{indent}"
    else:
        start = start.ljust(HELP_COLUMN)
    lines = textwrap.wrap(text, width - HELP_COLUMN, break_on_hyphens=False)
    return start + f"\n{indent}".join(lines)


def help_text(command: Command) -> str:
    """The help of a command, as wide as the terminal."""
    try:
        width = min(os.get_terminal_size(1).columns, HELP_WIDTHS[-1])
    except OSError:  # standard output is no terminal
        width = HELP_WIDTHS[0]
    width = max(width, 2 * HELP_COLUMN)
    parts = [usage_line(command), "", command.about]
    lists = {"Arguments": command.arguments, "Options": options_of(command)}
    if command is LETMEIN:
        parts += ["", "Commands:"]
        parts += [help_row(each.name, each.summary, width) for each in COMMANDS]
    for title, options in lists.items():
        rows = [
            help_row(f"{', '.join(option.names)} {option.metavar}".rstrip(), option.text, width)
            for option in options
            if option.text
        ]
        parts += ["", f"{title}:", *rows] if rows else []
    return "\n".join([*parts, "", "Examples:", command.examples])


NO_WORD = "''"  # in a shell
BASH_COMPLETION = """\
_letmein() {{
    local word command= words=
    for word in "${{COMP_WORDS[@]:1:$((COMP_CWORD-1))}}"; do
        case $word in {names}) command=$word; break ;; esac
    done
    case $command in
{cases}
    esac
    COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o bashdefault -o default -F _letmein letmein"""


def completion_words(command: Command) -> list[str]:
    """The words that may follow a command, except for values that only the user knows."""
    words = [command.name for command in COMMANDS] if command is LETMEIN else []
    for argument in command.arguments:
        words += argument.words
    for option in options_of(command):
        words += option.names if option.text else ()
    return words


def completion(shell: str) -> str:
    """A script with which a shell completes the words of our command line."""
    words = {each.name: " ".join(completion_words(each)) for each in (LETMEIN, *COMMANDS)}
    names = [command.name for command in COMMANDS]
    if shell == "fish":  # see its complete(1)
        lines = ["complete -c letmein -s c -l config -r -F"]
        for name in names:
            when = f"__fish_seen_subcommand_from {name}"
            lines.append(f"complete -c letmein -n '{when}' -a '{words[name]}'")
        lines.append(f"complete -c letmein -f -n __fish_use_subcommand -a '{words['']}'")
        return "\n".join(lines)
    cases = [f"        {name or NO_WORD}) words='{words[name]}' ;;" for name in words]
    script = BASH_COMPLETION.format(names="|".join(names), cases="\n".join(cases))
    # zsh can do as bash does: zshcompsys(1), bashcompinit.
    return f"autoload -U +X bashcompinit && bashcompinit\n{script}" if shell == "zsh" else script


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A question that names the known word most like this one; "" if none is. Options are compared
    without their dashes, in which all are alike."""
    names = {name.lstrip("-"): name for name in known}
    similar = most_similar(word.lstrip("-"), names)
    return f"did you mean {names[similar]}? " if similar else ""


def find_command(word: str) -> Command:
    """The command of this name. Raises UsageError."""
    for command in COMMANDS:
        if command.name == ALIASES.get(word, word):
            return command
    names = [*(command.name for command in COMMANDS), *ALIASES]
    hint = f"{did_you_mean(word, names)}'letmein --help' lists all commands"
    raise UsageError(f"there is no command {shown(word)}", hint)


def no_option(name: str, command: Command) -> UsageError:
    """The error for an option that a command does not have."""
    names = [option.names[-1] for option in options_of(command)]
    program = f"letmein {command.name}".rstrip()
    hint = f"{did_you_mean(name, names)}'{program} --help' lists all options"
    for other in COMMANDS if command is LETMEIN else ():
        if any(name in option.names for option in other.options):
            hint = f"put it behind the command: letmein {other.name} {name}"
            return UsageError(f"{name} is no option in front of a command", hint)
    return UsageError(f"there is no option {shown(name)}", hint)


def parse_value(option: Option, text: str) -> Any:
    """The value of an option or argument. Raises UsageError."""
    try:
        return parse_word(text, option.words) if option.words else option.parse(text)
    except Unfit as unfit:
        problem = f"{'/'.join(option.names)}: {unfit.problem}"
        raise UsageError(problem, f"expected: {unfit.hint}") from None


def take_option(
    word: str, waiting: deque[str], command: Command, arguments: SimpleNamespace
) -> None:
    """Set what this word says: `--user=1`, `-u1`, or with the next of the waiting words `-u 1`. As
    everywhere, -4U is the same as -4 -U. Raises UsageError."""
    is_long = word.startswith("--")
    name, equals, text = word.partition("=")
    if not is_long:
        name, text = word[:2], word[2:].removeprefix("=")
    found = [option for option in options_of(command) if name in option.names]
    if not found:
        raise no_option(name, command)
    option = found[0]
    names = "/".join(option.names)
    value = option.value
    if option.metavar:
        if not text and not (is_long and equals):
            if not waiting or waiting[0].startswith("-"):
                raise UsageError(f"{names} needs its {option.metavar}", usage_line(command))
            text = waiting.popleft()
        value = parse_value(option, text)
    elif is_long and equals:
        raise UsageError(f"{names} takes no value", usage_line(command))
    elif text:
        waiting.appendleft(f"-{text}")
    if option.is_list:
        getattr(arguments, option.field).append(value)
    else:
        setattr(arguments, option.field, value)


def set_defaults(options: Iterable[Option], arguments: SimpleNamespace) -> None:
    """Set the defaults of options, except where something is set already."""
    for option in options:
        default = option.default() if callable(option.default) else option.default
        if not hasattr(arguments, option.field):
            setattr(arguments, option.field, [] if option.is_list else default)


def set_positional(words: list[str], command: Command, arguments: SimpleNamespace) -> None:
    """Set the command's arguments from the words that are no options. Raises UsageError."""
    rest = deque(words)
    for argument in command.arguments:
        if argument.field == "to_run":  # it is behind a --
            continue
        if argument.is_list:
            values = [parse_value(argument, word) for word in rest]
            setattr(arguments, argument.field, values)
            rest.clear()
        elif rest:
            setattr(arguments, argument.field, parse_value(argument, rest.popleft()))
        else:
            choices = ", ".join(argument.words)
            hint = f"expected: one of: {choices}" if choices else usage_line(command)
            raise UsageError(f"{argument.names[0]} is missing", hint)
    if rest:
        raise UsageError(f"{shown(rest[0])} is one word too many", usage_line(command))


def contradiction(command: Command, arguments: SimpleNamespace, has_dashes: bool) -> str:
    """Why words that are each valid do not go together; "" if they do."""
    if command.name in ("knock", "revoke"):
        if arguments.ports and arguments.resources:
            return "PORT and -r/--resource cannot be combined"
        if not arguments.ports and not arguments.resources:
            return "PORT is missing (or a resource: -r/--resource ID)"
    if command.name == "connect" and len(arguments.ports) != 1:
        return "PORT is missing" if not arguments.ports else "connect takes one PORT"
    if command.name == "client-conf" and arguments.user is None:
        return "-u/--user is missing"
    if has_dashes and command.name != "knock":
        return f"{command.name} takes no COMMAND behind --"
    if has_dashes and not arguments.to_run:
        return "COMMAND is missing behind --"
    return ""


def parse_words(words: list[str]) -> SimpleNamespace:
    """The command line; command is its Command. Options may come before, between and behind
    the arguments. Raises UsageError."""
    if words[:1] == ["help"]:
        words = [*words[1:], "--help"]
    at = words.index("--") if "--" in words else len(words)
    waiting = deque(words[:at])
    command = LETMEIN
    arguments = SimpleNamespace(quiet=False)
    set_defaults(COMMON, arguments)
    positional = []
    while waiting:
        word = waiting.popleft()
        if word.startswith("-") and len(word) > 1:
            take_option(word, waiting, command, arguments)
        elif command is LETMEIN:
            command = find_command(word)
            set_defaults((*command.arguments, *command.options), arguments)
        else:
            positional.append(word)
    arguments.command = command
    arguments.to_run = words[at + 1 :]
    # `letmeind -v` prints the version, and letmeind is our server.
    if arguments.help or (arguments.version and command.name in ("", "server")):
        return arguments
    if arguments.version:
        problem = f"-v prints the version; it does not go with {command.name}"
        raise UsageError(problem, "did you mean --verbose?")
    if command is LETMEIN:
        hint = "for example: letmein knock server 22; 'letmein --help' lists all commands"
        raise UsageError("a command is missing", hint)
    set_positional(positional, command, arguments)
    problem = contradiction(command, arguments, at < len(words))
    if problem:
        raise UsageError(problem, usage_line(command))
    return arguments


def run_command(arguments: SimpleNamespace) -> int:
    """Do what the command line says; returns the exit status. Raises UserError."""
    command = arguments.command
    if arguments.help or arguments.version:
        print(help_text(command) if arguments.help else f"letmein.py {VERSION}")
        return 0
    if command.run is not run_server:  # which has to note first what may come
        allow_hangup()
    status: int = command.run(arguments)
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """The program: returns the exit status, 0 for success, 1 for failure (2: bad usage)."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if words[:1] == [NETWORK_COMMAND] and len(words) == 6:  # as NetworkChild starts it
            network_process(*words[1:])
            return 0
        if hasattr(signal, "SIGCHLD"):  # a parent that ignores it would hide how COMMAND ends
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for stream in ("stdin", "stdout", "stderr"):
            if getattr(sys, stream) is None:  # it is closed: the next file would get its number
                setattr(sys, stream, os.fdopen(os.open(os.devnull, os.O_RDWR), "w"))
        output: Any = sys.stdout
        output.reconfigure(errors="backslashreplace")  # a host's name may be in any alphabet
        if os.path.basename(sys.argv[0]) == "letmeind":
            words.insert(0, "server")
        status = run_command(parse_words(words))
        print(end="", flush=True)
        return status
    except UsageError as error:
        tell_error(error)
        return 2
    except (UserError, OSError) as error:
        if isinstance(error, OSError):
            with contextlib.suppress(OSError):
                drop_output()  # or Python tries again at its end to write the rest, and says so
        if not isinstance(error, BrokenPipeError):
            tell_error(error)
        return 1


if __name__ == "__main__":
    sys.exit(main())
