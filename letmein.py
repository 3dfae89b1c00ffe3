#!/usr/bin/env python3
"""letmein: an authenticated port knocker, client and server in one file.

The server's firewall drops everything. A client who holds a shared key knocks,
proves it by challenge and response (HMAC-SHA3-256), and the kernel's nftables
lets that one address in to that one port, for a while.

    letmein.py server                 the server (needs nft and root)
    letmein.py knock HOST PORT        open PORT on HOST for this address
    letmein.py revoke HOST PORT       close it again
    letmein.py status                 on the server: who holds what
    letmein.py gen-key                a new key, for both configuration files

The file has eight rooms. Each begins with a banner like the one below, and
uses only rooms above it:

    1 Protocol    messages and handshakes, without input or output
    2 Configuration
    3 Client
    4 Firewall    leases, the nft scripts for them, the one place that runs nft
    5 Network     the process that faces the internet: no keys, no programs
    6 Monitor     the privileged process: keys, handshakes, leases
    7 Sandbox     how the network process gives up what it does not need
    8 Command line

What is imported here is what a knock needs: the client's time goes into
starting Python, so each room imports what it alone needs where it needs it.
"""

from __future__ import annotations

import hmac
import os
import re
import selectors
import socket
import struct
import sys
import time
from collections import namedtuple

VERSION = "1.0.0"

TYPE_CHECKING = False  # as typing.TYPE_CHECKING: importing typing takes as long as a knock
if TYPE_CHECKING:
    import argparse
    import subprocess
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from typing import Any, NamedTuple, NoReturn
else:

    class _Record(type):
        """Turns an annotated class into a named tuple, as typing.NamedTuple does."""

        def __new__(cls, name, bases, body):
            fields = body.get("__annotations__", {})
            defaults = [body.pop(field) for field in fields if field in body]
            body["__slots__"] = ()
            return type(name, (namedtuple(name, fields, defaults=defaults),), body)

    NamedTuple = type.__new__(_Record, "NamedTuple", (), {})


class UserError(Exception):
    """Something the user can mend: one line with what is wrong, one with what to do.

    Args: problem, what is wrong and where; hint, what to do about it.
    """

    def __init__(self, problem: str, hint: str = "") -> None:
        super().__init__(problem)
        self.problem = problem
        self.hint = hint


# ============================================================================
# 1  Protocol
#
# Every message, in both directions, over TCP and UDP, is 56 bytes:
#
#     offset  size  field
#          0     4  magic      3B 1B B7 19
#          4     4  operation  0 knock, 1 challenge, 2 response, 3 come in,
#                              4 go away, 5 revoke
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
# The two handshakes below are state machines without input or output: bytes
# in, bytes and a verdict out. They know no socket, no clock and no firewall.
# ============================================================================

MAGIC = bytes.fromhex("3B1BB719")
MESSAGE = struct.Struct("!4sIII8s32s")
MESSAGE_SIZE = MESSAGE.size  # 56 bytes
KEY_SIZE = 32  # bytes
NO_TOKEN = bytes(32)
ANYBODY = 0xFFFFFFFF  # user and resource of a GOAWAY to a peer that named none

KNOCK, CHALLENGE, RESPONSE, COMEIN, GOAWAY, REVOKE = range(6)
OPERATIONS = ("KNOCK", "CHALLENGE", "RESPONSE", "COMEIN", "GOAWAY", "REVOKE")


class ProtocolError(Exception):
    """The peer said something that the protocol does not allow here."""


class Refused(ProtocolError):
    """The server answered GOAWAY."""


class Message(NamedTuple):
    """One message: operation, user and resource are numbers below 2**32,
    salt is 8 bytes, auth 32 bytes."""

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
        """The message in 56 bytes from the wire.

        Raises ProtocolError if the length, the magic or the operation is wrong:
        such bytes are no letmein message, and nobody answers them.
        """
        if len(data) != MESSAGE_SIZE:
            raise ProtocolError(f"a message has {MESSAGE_SIZE} bytes, not {len(data)}")
        magic, *fields = MESSAGE.unpack(data)
        if magic != MAGIC:
            raise ProtocolError("not a letmein message: the first four bytes are wrong")
        message = cls(*fields)
        if message.operation >= len(OPERATIONS):
            raise ProtocolError(f"unknown operation {message.operation}")
        return message

    def proves(self, key: bytes, token: bytes) -> bool:
        """Whether auth shows that the sender holds key. Takes the same time for any auth."""
        expected = authenticate(key, *self[:4], token)
        return hmac.compare_digest(expected, self.auth)


def authenticate(
    key: bytes, operation: int, user: int, resource: int, salt: bytes, token: bytes
) -> bytes:
    """The auth field: HMAC-SHA3-256 (RFC 2104, FIPS 202) over the message and a token.

    The token is 32 zero bytes in KNOCK and REVOKE ("basic auth": whoever saw
    one can send it again), and the CHALLENGE's auth field in RESPONSE.
    """
    text = struct.pack("!III", operation, user, resource) + salt + token
    return hmac.digest(key, text, "sha3_256")


def signed(operation: int, user: int, resource: int, key: bytes, token: bytes) -> bytes:
    """A new KNOCK, REVOKE or RESPONSE, as 56 bytes."""
    salt = os.urandom(8)
    auth = authenticate(key, operation, user, resource, salt, token)
    return Message(operation, user, resource, salt, auth).encode()


def unsigned(operation: int, user: int, resource: int, auth: bytes = bytes(32)) -> bytes:
    """A new CHALLENGE (auth is its token), COMEIN or GOAWAY, as 56 bytes."""
    return Message(operation, user, resource, os.urandom(8), auth).encode()


class ClientHandshake:
    """The client's side of one knock or revocation.

    Send `request`, feed each 56 bytes that come back to receive(), send what
    it returns, and stop when `done` is true.
    """

    def __init__(self, operation: int, user: int, resource: int, key: bytes) -> None:
        self.user = user
        self.resource = resource
        self.key = key
        self.expected = CHALLENGE
        self.done = False
        self.warnings: list[str] = []
        self.request = signed(operation, user, resource, key, NO_TOKEN)

    def receive(self, data: bytes) -> bytes:
        """Take one message from the server; returns the bytes to send, b"" for nothing.

        Raises Refused on GOAWAY, ProtocolError on anything else that is not
        the expected message. Foreign ids are only worth a warning: nothing but
        the token matters, and a wrong one leads nowhere.
        """
        message = Message.decode(data)
        if message.operation == GOAWAY:
            raise Refused("the server rejected the request")
        if message.operation != self.expected:
            raise ProtocolError(
                f"the server sent {OPERATIONS[message.operation]}, "
                f"not {OPERATIONS[self.expected]}"
            )
        if (message.user, message.resource) != (self.user, self.resource):
            self.warnings.append(
                f"the server speaks of user {message.user:08X}, resource {message.resource:08X}; "
                f"asked was user {self.user:08X}, resource {self.resource:08X}"
            )
        if self.expected == CHALLENGE:
            self.expected = COMEIN
            return signed(RESPONSE, self.user, self.resource, self.key, message.auth)
        self.done = True
        return b""


# What a server handshake's peer has proved, in the order of the proofs. An
# error policy is the least of these for which an error is answered by GOAWAY.
NO_AUTH, BASIC_AUTH, FULL_AUTH = range(3)
POLICIES = {"always": NO_AUTH, "basic-auth": BASIC_AUTH, "full-auth": FULL_AUTH}

# Which operations a server handshake takes in which state.
EXPECT_REQUEST, EXPECT_RESPONSE, AUTHENTICATED, ENDED = (
    "expect request",
    "expect response",
    "authenticated",
    "ended",
)
ALLOWED: Mapping[str, tuple[int, ...]] = {
    EXPECT_REQUEST: (KNOCK, REVOKE),
    EXPECT_RESPONSE: (RESPONSE,),
    AUTHENTICATED: (),
    ENDED: (),
}

# Verdicts of ServerHandshake.receive().
DROP = "drop"  # no letmein message: end it without a word
CONTINUE = "continue"  # send the reply and wait for the next message
REFUSE = "refuse"  # send the reply, if there is one, and end it
GRANT = "grant"  # the peer has proved itself: do what it asked for, then call finish()


class Step(NamedTuple):
    """What to do after a message: a verdict, the bytes to send (b"" for none),
    and for REFUSE and DROP the reason, for the log."""

    verdict: str
    reply: bytes = b""
    reason: str = ""


class ServerHandshake:
    """The server's side of one handshake, up to and after the change of the firewall.

    Args:
        policy: NO_AUTH, BASIC_AUTH or FULL_AUTH: what a peer must have proved
            for its errors to be answered.
        key_of: gives the key of a user, or None if there is no such user.
        objection: says why a user may not have a resource, "" if they may.
        new_token: gives the 32 bytes to challenge with, from operation, user
            and resource of the request.
    """

    # An unknown user's knock is checked against a key that nobody knows, so
    # that it takes as long, and looks the same, as one with a wrong key.
    NOBODYS_KEY = os.urandom(KEY_SIZE)

    def __init__(
        self,
        policy: int,
        key_of: Callable[[int], bytes | None],
        objection: Callable[[int, int], str],
        new_token: Callable[[int, int, int], bytes],
    ) -> None:
        self.policy = policy
        self.key_of = key_of
        self.objection = objection
        self.new_token = new_token
        self.state = EXPECT_REQUEST
        self.proved = NO_AUTH
        self.user = self.resource = ANYBODY
        self.operation = KNOCK  # what was asked for: KNOCK or REVOKE
        self.tokens: list[tuple[int, bytes]] = []  # (operation, token) a RESPONSE may answer
        self.answered = NO_TOKEN  # the one of them that it did answer

    def receive(self, data: bytes) -> Step:
        """Take one message from the peer; never raises."""
        try:
            message = Message.decode(data)
        except ProtocolError as error:
            self.state = ENDED
            return Step(DROP, reason=str(error))
        if message.operation not in ALLOWED[self.state]:
            return self._refuse(f"unexpected {OPERATIONS[message.operation]}")
        if self.state == EXPECT_REQUEST:
            return self._request(message)
        return self._response(message)

    def _request(self, message: Message) -> Step:
        self.operation, self.user, self.resource = message[:3]
        key = self.key_of(self.user)
        proved = message.proves(key or self.NOBODYS_KEY, NO_TOKEN)
        if key is None:
            return self._refuse("unknown user")
        if not proved:
            return self._refuse("wrong key")
        self.proved = BASIC_AUTH
        objection = self.objection(self.user, self.resource)
        if objection:
            return self._refuse(objection)
        token = self.new_token(self.operation, self.user, self.resource)
        self.expect_response(self.user, self.resource, [(self.operation, token)])
        return Step(CONTINUE, unsigned(CHALLENGE, self.user, self.resource, token))

    def expect_response(self, user: int, resource: int, tokens: list[tuple[int, bytes]]) -> None:
        """Go on as if a request had come in and been answered with one of these tokens.

        This is how a server keeps no state for UDP: it derives the tokens anew.
        """
        self.user, self.resource, self.tokens = user, resource, tokens
        self.state = EXPECT_RESPONSE

    def _response(self, message: Message) -> Step:
        if (message.user, message.resource) != (self.user, self.resource):
            return self._refuse("other ids in the RESPONSE than in the request")
        # Key and rights are looked up again: the configuration may have changed.
        key = self.key_of(self.user)
        answered = [
            pair for pair in self.tokens if message.proves(key or self.NOBODYS_KEY, pair[1])
        ]
        if key is None or not answered:
            return self._refuse("wrong RESPONSE")
        self.operation, self.answered = answered[0]
        self.proved = FULL_AUTH
        objection = self.objection(self.user, self.resource)
        if objection:
            return self._refuse(objection)
        self.state = AUTHENTICATED
        return Step(GRANT)

    def finish(self, done: bool) -> bytes:
        """After GRANT: the last message, COMEIN if it was done; b"" if silence is due."""
        if done:
            self.state = ENDED
            return unsigned(COMEIN, self.user, self.resource)
        return self._refuse("").reply

    def _refuse(self, reason: str) -> Step:
        self.state = ENDED
        if self.proved < self.policy:
            return Step(REFUSE, reason=reason)
        return Step(REFUSE, unsigned(GOAWAY, self.user, self.resource), reason)


# ============================================================================
# 2  Configuration
#
# letmeind.conf (server) and letmein.conf (client): text in, a frozen Config
# out, or a ConfigError that names file, line and option and says what was
# expected there. The text of a key never gets into a message.
# ============================================================================

CONFIG_SIZE_LIMIT = 4 << 20  # bytes
CONFIG_PLACES = ("/opt/letmein/etc", "/etc")
DURATION_LIMIT_S = 0xFFFFFFFF
RULES_LIMIT = 1_000_000
CHAIN_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
HOOKS = ("input", "forward", "output")

KNOWN_OPTIONS: Mapping[str, tuple[str, ...]] = {
    "GENERAL": ("debug", "port", "control-timeout", "control-error-policy", "seccomp"),
    "CLIENT": ("default-user",),
    "KEYS": (),
    "RESOURCES": (),
    "NFTABLES": (
        "exe",
        "family",
        "table",
        "chain-input",
        "chain-forward",
        "chain-output",
        "timeout",
        "max-nr-rules",
    ),
}


class ConfigError(UserError):
    """The configuration cannot be used."""


class Unfit(Exception):
    """A value is not what it should be. Args: what is wrong, what was expected."""

    def __init__(self, problem: str, expected: str) -> None:
        super().__init__(problem)
        self.problem = problem
        self.expected = expected


class Jump(NamedTuple):
    """A jump from the hook's chain to target, for the client's address alone or for all."""

    hook: str
    target: str
    match_saddr: bool


class Resource(NamedTuple):
    """What can be knocked for: a port (protocols "tcp", "udp") or a tuple of jumps.

    timeout is in seconds; users is empty where everybody may.
    """

    identifier: int
    port: int
    protocols: tuple[str, ...]
    jumps: tuple[Jump, ...]
    timeout: float
    users: frozenset[int]

    @property
    def rules(self) -> int:
        """How much one lease counts against max-nr-rules."""
        return len(self.protocols) + len(self.jumps)

    @property
    def is_gate(self) -> bool:
        """Whether one holder's lease opens something for everybody."""
        return any(not jump.match_saddr for jump in self.jumps)

    def __str__(self) -> str:
        if self.jumps:
            return f"resource {self.identifier:08X}"
        return f"port {self.port}/{'+'.join(self.protocols)}"


class Config(NamedTuple):
    """One configuration file, read and checked. Times are in seconds."""

    path: str
    warnings: tuple[str, ...]
    debug: bool
    port: int
    protocols: tuple[str, ...]
    control_timeout: float
    error_policy: int
    seccomp: str
    default_user: int
    keys: Mapping[int, bytes]
    resources: Mapping[int, Resource]
    nft: str
    family: str
    table: str
    chains: Mapping[str, str]  # by hook; chains that are not named are absent
    max_nr_rules: int

    def find_port(self, port: int, user: int) -> Resource | None:
        """The resource that opens this port for this user."""
        for resource in self.resources.values():
            if resource.port == port and (not resource.users or user in resource.users):
                return resource
        return None

    def objection(self, user: int, resource: int) -> str:
        """Why this user may not have this resource; "" if they may."""
        found = self.resources.get(resource)
        if found is None:
            return "unknown resource"
        if found.users and user not in found.users:
            return "resource not allowed for this user"
        if found.port == self.port:
            return "the resource is the control port"
        for jump in found.jumps:
            if jump.hook not in self.chains:
                return f"chain-{jump.hook} is not set in [NFTABLES]"
        return ""


class Entry(NamedTuple):
    """One option as it stands in the file."""

    line: int
    text: str


def shown(text: str, limit: int = 40) -> str:
    """Text from a file or a peer, fit to be printed: short, escaped, keys masked."""
    masked = re.sub(r"[0-9A-Fa-f]{16,}", "...", text)
    return ascii(masked if len(masked) <= limit else masked[:limit] + "...")


def parse_number(text: str, limit: int) -> int:
    """ASCII digits, or hex digits behind 0x, up to limit."""
    match = re.fullmatch(r"(?:(0x)\+?([0-9A-Fa-f]+)|\+?([0-9]+))", text.strip())
    # A number is no longer than its limit, but for leading zeros.
    digits = (match[2] or match[3]).lstrip("0") if match else ""
    if match is None or len(digits) > 10 or int(digits or "0", 16 if match[1] else 10) > limit:
        raise Unfit(f"{shown(text.strip())} is not a number in range", f"a number from 0 to {limit}")
    return int(digits or "0", 16 if match[1] else 10)


def parse_duration(text: str) -> float:
    """Seconds: a number, or a decimal such as 0.5 or 1e3."""
    try:
        return float(parse_number(text, DURATION_LIMIT_S))
    except Unfit:
        pass
    decimal = r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
    if re.fullmatch(decimal, text.strip()) and 0 <= float(text) <= DURATION_LIMIT_S:
        return abs(float(text))
    raise Unfit(
        f"{shown(text.strip())} is not a duration", f"seconds, from 0 to {DURATION_LIMIT_S}"
    )


def parse_boolean(text: str) -> bool:
    """true, 1, yes, on; false, 0, no, off; in any case."""
    word = text.strip().lower()
    if word not in ("true", "1", "yes", "on", "false", "0", "no", "off"):
        raise Unfit(f"{shown(word)} is not a yes or a no", "one of: true, yes, on, 1, false, no, off, 0")
    return word in ("true", "1", "yes", "on")


def parse_identifier(text: str) -> int:
    """A user's or a resource's id: 1 to 8 hex digits."""
    if not re.fullmatch(r"(?=.{1,8}$)\+?[0-9A-Fa-f]+", text.strip()):
        raise Unfit(f"{shown(text.strip())} is not an id", "1 to 8 hex digits, such as 0000002A")
    return int(text, 16)


def parse_key(text: str) -> bytes:
    """A shared secret: 64 hex digits, not all 0 and not all F."""
    expected = "64 hex digits, such as 'letmein.py gen-key' prints"
    if not re.fullmatch(r"[0-9A-Fa-f]{64}", text.strip()):
        raise Unfit(f"not a key ({len(text.strip())} characters)", expected)
    key = bytes.fromhex(text.strip())
    if key in (bytes(KEY_SIZE), b"\xff" * KEY_SIZE):
        raise Unfit("this key is all zeros or all ones", expected)
    return key


def parse_name(text: str) -> str:
    """The name of an nftables table or chain."""
    if not CHAIN_NAME.fullmatch(text.strip()):
        raise Unfit(f"{shown(text.strip())} is not a name", "1 to 64 of A-Z a-z 0-9 _ - .")
    return text.strip()


def parse_choice(*choices: str, fold: bool = True) -> Callable[[str], str]:
    """A parser for one of some words, in any case if fold."""

    def parse(text: str) -> str:
        word = text.strip().lower() if fold else text.strip()
        if word not in choices:
            raise Unfit(f"{shown(text.strip())} is not known here", f"one of: {', '.join(choices)}")
        return word

    return parse


def parse_items(text: str) -> list[tuple[str, list[str]]]:
    """A value of items such as `port: 22 / tcp, udp`: (key, list), the key "" for flags."""
    items = []
    for item in text.split("/"):
        key, colon, rest = item.partition(":")
        if colon and not key.strip():
            raise Unfit("an item has no key in front of its ':'", "items such as 'port: 22 / tcp'")
        values = [value.strip() for value in (rest if colon else item).split(",")]
        items.append((key.strip() if colon else "", values))
    return items


def parse_control_port(text: str) -> tuple[int, tuple[str, ...]]:
    """`5800`, `5800/udp`, `5800 / tcp, udp`: the port, and "tcp", "udp" or both."""
    expected = "such as '5800', '5800/udp' or '5800 / tcp, udp'"
    port, flags = 5800, set()
    for key, values in parse_items(text):
        if key:
            raise Unfit(f"unknown key {shown(key)}", expected)
        if len(values) == 1 and re.fullmatch(r"0x.*|[0-9]+", values[0]):
            port = parse_number(values[0], 65535)
        else:
            flags |= {value.lower() for value in values}
    if not flags <= {"tcp", "udp"}:
        raise Unfit(f"unknown flag {shown(min(flags - {'tcp', 'udp'}))}", expected)
    if port == 0:
        raise Unfit("port 0 cannot be served", expected)
    return port, tuple(sorted(flags)) or ("tcp",)


def parse_resource(identifier: int, text: str, default_timeout: float) -> Resource:
    """`port: 22 / tcp / timeout: 60 / users: 1, 2` or `jump / input: CHAIN / ...`."""
    expected = "'port: N / tcp, udp / timeout: SECONDS / users: ID, ID' or 'jump / input: CHAIN'"
    items = parse_items(text)
    flags = [value for key, values in items if not key for value in values]
    lists = dict(item for item in items if item[0])
    is_port, is_jump = "port" in lists, ("", ["jump"]) in items
    if is_port == is_jump:
        raise Unfit("neither a port nor a jump resource, or both", expected)

    known = ["timeout", "users"]
    if is_port:
        known += ["port"]
    else:
        known += [name for hook in HOOKS for name in (hook, hook + "-match")]
    seen = []
    for key, values in items:
        if key and key not in known:
            raise Unfit(f"unknown key {shown(key)}", expected)
        if key in seen and key in ("port", "timeout", "users"):
            raise Unfit(f"{key!r} stands there twice", expected)
        if key and key != "users" and len(values) != 1:
            raise Unfit(f"{key!r} takes one value", expected)
        seen.append(key)
    for flag in flags:
        if flag.lower() not in ("tcp", "udp") if is_port else flag != "jump":
            raise Unfit(f"unknown flag {shown(flag)}", expected)

    port = 0
    protocols: tuple[str, ...] = ()
    jumps = []
    if is_port:
        port = parse_number(lists["port"][0], 65535)
        protocols = tuple(sorted({flag.lower() for flag in flags})) or ("tcp",)
        if port == 0:
            raise Unfit("port 0 is nobody's port", "a port from 1 to 65535")
    for hook in HOOKS:
        match = lists.get(hook + "-match", ["saddr"])
        if match != ["saddr"]:
            raise Unfit(f"'{hook}-match' cannot be {shown(match[0])}", f"'{hook}-match: saddr'")
        if hook in lists:
            jumps.append(Jump(hook, parse_name(lists[hook][0]), hook + "-match" in lists))
    if not port and not jumps:
        raise Unfit("a jump resource without a chain to jump to", "'jump / input: CHAIN'")
    timeout = parse_duration(lists["timeout"][0]) if "timeout" in lists else default_timeout
    users = frozenset(parse_identifier(user) for user in lists.get("users", []))
    return Resource(identifier, port, protocols, tuple(jumps), timeout, users)


def parse_sections(text: str, path: str) -> tuple[dict[str, dict[str, Entry]], dict[str, int]]:
    """The file as it is written: options by section, and the line of each section.

    Raises ConfigError.
    """

    def wrong(problem: str, expected: str) -> ConfigError:
        return ConfigError(f"{path}:{number}: {where}{problem}", f"expected: {expected}")

    sections: dict[str, dict[str, Entry]] = {}
    lines: dict[str, int] = {}
    section = option = ""
    where = ""
    for number, line in enumerate(text.split("\n"), 1):
        line = line[:-1] if line.endswith("\r") else line
        if option and line[:1] in (" ", "\t") and line.strip():
            entry = sections[section][option]
            sections[section][option] = Entry(entry.line, f"{entry.text} {line.lstrip()}")
            continue
        option = ""
        line = line.lstrip()
        if not line or line.startswith("#"):
            continue
        if line.startswith("["):
            name = line.rstrip()[1:-1]
            if not line.rstrip().endswith("]") or not name:
                raise wrong(f"{shown(line.rstrip())} is not a section", "a line such as [GENERAL]")
            if name in sections:
                raise wrong(f"a second section [{shown(name)[1:-1]}]", "each section once")
            section, where = name, f"[{shown(name)[1:-1]}] "
            sections[section], lines[section] = {}, number
            continue
        name, equals, value = line.partition("=")
        name = name.rstrip()
        if not section:
            raise wrong("an option outside of a section", "a line such as [GENERAL] above it")
        if not equals or not name:
            raise wrong("not an option", "a line such as NAME = VALUE")
        if name in sections[section]:
            first = sections[section][name].line
            raise wrong(f"{shown(name)[1:-1]}: stands in line {first} already", "each option once")
        sections[section][name] = Entry(number, value)
        option = name
    return sections, lines


def parse_config(text: str, path: str, server: bool) -> Config:
    """Read one configuration file's text; path is for messages alone.

    [NFTABLES] is read for the server only, [CLIENT] for the client only.
    Raises ConfigError.
    """
    sections, section_lines = parse_sections(text, path)
    warnings = []

    def place(section: str, option: str) -> str:
        return f"{path}:{sections[section][option].line}: [{section}] {shown(option, 80)[1:-1]}: "

    def wrong(section: str, option: str, unfit: Unfit) -> ConfigError:
        return ConfigError(place(section, option) + unfit.problem, f"expected: {unfit.expected}")

    def value(section: str, option: str, default: Any, parse: Callable[[str], Any]) -> Any:
        if option not in sections.get(section, {}):
            return default
        try:
            return parse(sections[section][option].text)
        except Unfit as unfit:
            raise wrong(section, option, unfit) from None

    for section, options in sections.items():
        if section not in KNOWN_OPTIONS:
            near = nearest(section, KNOWN_OPTIONS)
            line = section_lines[section]
            warnings.append(f"{path}:{line}: [{shown(section)[1:-1]}] is ignored: unknown{near}")
        elif KNOWN_OPTIONS[section]:
            for option in options:
                if option not in KNOWN_OPTIONS[section]:
                    near = nearest(option, KNOWN_OPTIONS[section])
                    warnings.append(f"{place(section, option)}ignored: unknown{near}")

    port, protocols = value("GENERAL", "port", (5800, ("tcp",)), parse_control_port)
    policy = value("GENERAL", "control-error-policy", "always", parse_choice(*POLICIES))
    if policy == "always" and "udp" in protocols and server:
        warnings.append(
            f"{path}: [GENERAL] control-error-policy: 'always' and a UDP control port make this "
            "server answer forged senders; 'basic-auth' is recommended"
        )
    # The default for leases comes before the resources, which take it over.
    timeout = value("NFTABLES", "timeout", 600.0, parse_duration) if server else 600.0

    keys: dict[int, bytes] = {}
    resources: dict[int, Resource] = {}
    ports: dict[int, int] = {}
    for option, entry in sections.get("KEYS", {}).items():
        try:
            user = parse_identifier(option)
            if user in keys:
                raise Unfit(f"user {user:08X} has a key already", "each user once")
            keys[user] = parse_key(entry.text)
        except Unfit as unfit:
            raise wrong("KEYS", option, unfit) from None
    for option, entry in sections.get("RESOURCES", {}).items():
        try:
            identifier = parse_identifier(option)
            resource = parse_resource(identifier, entry.text, timeout)
            if identifier in resources:
                raise Unfit(f"resource {identifier:08X} is defined already", "each resource once")
            if resource.port and resource.port in ports:
                other = ports[resource.port]
                raise Unfit(f"resource {other:08X} is port {resource.port}", "each port once")
            resources[identifier] = resource
            ports[resource.port] = identifier
        except Unfit as unfit:
            raise wrong("RESOURCES", option, unfit) from None

    chains: dict[str, str] = {}
    if server:
        for option in ("family", "table", "chain-input"):
            if option not in sections.get("NFTABLES", {}):
                line = section_lines.get("NFTABLES", 1)
                raise ConfigError(
                    f"{path}:{line}: [NFTABLES] {option}: is not set",
                    "expected: family, table and chain-input, as in nftables.conf",
                )
        for hook in HOOKS:
            chain = value("NFTABLES", f"chain-{hook}", "", parse_name)
            if chain:
                chains[hook] = chain
        for resource in resources.values():
            option = next(o for o in sections["RESOURCES"] if int(o, 16) == resource.identifier)
            for jump in resource.jumps:
                if jump.hook not in chains:
                    warnings.append(
                        f"{place('RESOURCES', option)}cannot be knocked for: "
                        f"chain-{jump.hook} is not set in [NFTABLES]"
                    )
            if resource.port == port:
                warnings.append(
                    f"{place('RESOURCES', option)}cannot be knocked for: it is the control port"
                )
            if resource.timeout < SHORTEST_LEASE_S:
                warnings.append(f"{place('RESOURCES', option)}a timeout of 0 opens nothing")
    return Config(
        path=path,
        warnings=tuple(warnings),
        debug=value("GENERAL", "debug", False, parse_boolean),
        port=port,
        protocols=protocols,
        control_timeout=value("GENERAL", "control-timeout", 5.0, parse_duration),
        error_policy=POLICIES[policy],
        seccomp=value("GENERAL", "seccomp", "off", parse_choice("off", "log", "kill")),
        default_user=0 if server else value("CLIENT", "default-user", 0, parse_identifier),
        keys=keys,
        resources=resources,
        nft=value("NFTABLES", "exe", "nft", str.strip) if server else "",
        family=value("NFTABLES", "family", "", parse_choice("inet", "ip", "ip6", fold=False))
        if server
        else "",
        table=value("NFTABLES", "table", "", parse_name) if server else "",
        chains=chains,
        max_nr_rules=value(
            "NFTABLES",
            "max-nr-rules",
            100,
            lambda text: min(parse_number(text, 0xFFFFFFFF), RULES_LIMIT),
        )
        if server
        else 0,
    )


def nearest(name: str, names: Iterable[str]) -> str:
    """A hint at the known name that is most like this one; "" if none is."""
    import difflib

    folded = {known.lower(): known for known in names}
    found = difflib.get_close_matches(name.lower(), folded, 1)
    return f"; did you mean {folded[found[0]]}?" if found else ""


def read_config(path: str, server: bool) -> Config:
    """Read a configuration file. The client's may be missing: then all is default.

    Raises ConfigError.
    """
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            data = file.read(CONFIG_SIZE_LIMIT + 1)
    except FileNotFoundError:
        if server:
            raise ConfigError(
                f"{path}: there is no such file",
                "write one (letmeind.conf.example is a start), or name one with --config",
            ) from None
        return parse_config("", path, server)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read: {error.strerror}", "name a file that you may read with --config"
        ) from None
    if len(data) > CONFIG_SIZE_LIMIT:
        raise ConfigError(
            f"{path}: too large", f"expected: a file of at most {CONFIG_SIZE_LIMIT} bytes"
        )
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: not UTF-8", "expected: a UTF-8 text file") from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ConfigError(f"{path}:{line}: a NUL byte", "expected: a UTF-8 text file")
    config = parse_config(text, path, server)
    return config._replace(warnings=config.warnings + file_warnings(path, status, server))


def file_warnings(path: str, status: os.stat_result, server: bool) -> tuple[str, ...]:
    """What is unsafe about a configuration file's owner and mode (POSIX only)."""
    warnings = []
    if os.name == "posix":
        mask, safe = (0o026, "640") if server else (0o022, "600")
        if server and status.st_uid != 0:
            warnings.append(f"{path}: owned by user {status.st_uid}, not root; chown root {path}")
        if status.st_mode & mask:
            mode = f"{status.st_mode & 0o777:o}"
            warnings.append(f"{path}: others have rights on it (mode {mode}); chmod {safe} {path}")
    return tuple(warnings)


def default_config_path(name: str) -> str:
    """Where a file of this name stands: the first place that has it, else the last one."""
    paths = [f"{place}/{name}" for place in CONFIG_PLACES]
    return next((path for path in paths if os.path.exists(path)), paths[-1])


# ============================================================================
# 3  Client
#
# Resolve the host, connect, and pump one handshake for each address family,
# all at the same time: a family that does not answer costs its own deadline
# and not the other's time.
# ============================================================================


class Attempt:
    """One handshake with one address, over one socket that never blocks.

    Args:
        address: as socket.getaddrinfo gives it: family and socket address.
        protocol: "tcp" or "udp".
        timeout: in seconds, for each wait (control-timeout).
    """

    def __init__(
        self,
        handshake: ClientHandshake,
        address: tuple[int, tuple[Any, ...]],
        protocol: str,
        timeout: float,
    ) -> None:
        self.handshake = handshake
        self.family, self.sockaddr = address
        self.protocol = protocol
        self.timeout = timeout
        self.socket: socket.socket | None = None
        self.received = b""
        self.error: UserError | None = None
        self.deadline = time.monotonic() + timeout

    @property
    def label(self) -> str:
        """The address as a person writes it."""
        return str(self.sockaddr[0])

    def start(self, selector: selectors.BaseSelector) -> None:
        """Open the socket and begin to connect."""
        kind = socket.SOCK_STREAM if self.protocol == "tcp" else socket.SOCK_DGRAM
        try:
            self.socket = socket.socket(self.family, kind)
            self.socket.setblocking(False)
            if self.protocol == "tcp":
                self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            selector.register(self.socket, selectors.EVENT_WRITE, self)
            self.socket.connect(self.sockaddr)
        except BlockingIOError:
            pass
        except OSError as error:
            self.fail(selector, f"cannot reach {self.label}: {error.strerror}")

    def advance(self, selector: selectors.BaseSelector, events: int) -> None:
        """Go on after the selector has said that the socket is ready."""
        assert self.socket is not None
        try:
            if events & selectors.EVENT_WRITE:
                number = self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if number:
                    raise OSError(number, os.strerror(number))
                self.socket.send(self.handshake.request)
                selector.modify(self.socket, selectors.EVENT_READ, self)
            else:
                self._read(selector)
        except BlockingIOError:
            return
        except Refused as error:
            hint = "check that key, user and resource are the same there; its log says more"
            self.fail(selector, f"{self.label}: {error}", hint)
        except ProtocolError as error:
            self.fail(selector, f"{self.label}: {error}", "is that a letmein server's port?")
        except OSError as error:
            hint = "is the server running, and is its control port open for everybody?"
            self.fail(selector, f"cannot talk to {self.label}: {error.strerror}", hint)
        self.deadline = time.monotonic() + self.timeout

    def _read(self, selector: selectors.BaseSelector) -> None:
        assert self.socket is not None
        if self.protocol == "udp":
            self.received = self.socket.recv(MESSAGE_SIZE + 1)
            if len(self.received) != MESSAGE_SIZE:
                return
        else:
            data = self.socket.recv(MESSAGE_SIZE - len(self.received))
            if not data:
                raise ProtocolError("the server closed the connection without an answer")
            self.received += data
            if len(self.received) < MESSAGE_SIZE:
                return
        reply = self.handshake.receive(self.received)
        self.received = b""
        if reply:
            self.socket.send(reply)
        if self.handshake.done:
            self.close(selector)

    def fail(self, selector: selectors.BaseSelector, problem: str, hint: str = "") -> None:
        """End the attempt without success."""
        self.error = UserError(problem, hint)
        self.close(selector)

    def close(self, selector: selectors.BaseSelector) -> None:
        """Free the socket; the attempt is over."""
        if self.socket is not None:
            if self.socket.fileno() in selector.get_map():
                selector.unregister(self.socket)
            self.socket.close()
            self.socket = None


def run_attempts(attempts: Sequence[Attempt]) -> None:
    """Pump all attempts until each has succeeded or has its error set."""
    with selectors.DefaultSelector() as selector:
        for attempt in attempts:
            attempt.start(selector)
        while True:
            pending = [attempt for attempt in attempts if attempt.socket is not None]
            if not pending:
                return
            wait = min(attempt.deadline for attempt in pending) - time.monotonic()
            for key, events in selector.select(max(wait, 0)):
                key.data.advance(selector, events)
            for attempt in pending:
                if attempt.socket is not None and time.monotonic() >= attempt.deadline:
                    attempt.fail(
                        selector,
                        f"no answer from {attempt.label} over {attempt.protocol} "
                        f"within {attempt.timeout:g} s",
                        "is the server running, is its control port right (-P, -T, -U), "
                        "and does no firewall drop it on the way?",
                    )


def resolve(host: str, port: int, families: Sequence[int]) -> dict[int, tuple[Any, ...]]:
    """The first address of each of these families that host has.

    Families are socket.AF_INET and AF_INET6. Raises UserError if there is none.
    """
    try:
        # As bytes an ASCII name needs no IDNA codec, which some systems do not have.
        name = host.encode("ascii") if host.isascii() else host
        family = families[0] if len(families) == 1 else socket.AF_UNSPEC
        found = socket.getaddrinfo(name, port, family, socket.SOCK_STREAM)
    except (OSError, UnicodeError, LookupError, ValueError) as error:
        raise UserError(
            f"cannot find the address of {shown(host)}: {getattr(error, 'strerror', error)}",
            "check the name, and that this machine can resolve names",
        ) from None
    addresses: dict[int, tuple[Any, ...]] = {}
    for entry in found:
        if entry[0] in families:
            addresses.setdefault(entry[0], entry[4])
    return addresses


def knock(
    config: Config,
    operation: int,
    host: str,
    port: int | None,
    resource: int | None,
    user: int | None,
    server_port: int | None,
    protocol: str | None,
    families: tuple[int, ...],
    say: Callable[[str], None],
) -> str:
    """Knock (or revoke, as operation says) at a server; returns a line for the user.

    Args:
        port, resource: what to open or close; one of them is None.
        user, server_port, protocol: None for what the configuration says.
        families: the ones that must succeed; empty for any that host has.
        say: takes lines that tell what is going on (--verbose).

    Raises UserError.
    """
    user = config.default_user if user is None else user
    key = config.keys.get(user)
    if key is None:
        raise UserError(
            f"{config.path}: [KEYS] has no key for user {user:08X}",
            "copy the user's line from the server's [KEYS], or name another user with --user",
        )
    if resource is None:
        found = config.find_port(port or 0, user)
        if found is None:
            ports = sorted(r.port for r in config.resources.values() if r.port)
            named = ", ".join(map(str, ports)) or "none"
            raise UserError(
                f"{config.path}: [RESOURCES] has no port {port} for user {user:08X}",
                f"ports that it has: {named}; or name a resource with --resource",
            )
        resource = found.identifier
    server_port = server_port or config.port
    protocol = protocol or config.protocols[0]

    both = (socket.AF_INET6, socket.AF_INET)
    addresses = resolve(host, server_port, families or both)
    for family in families:
        if family not in addresses:
            name = "IPv4" if family == socket.AF_INET else "IPv6"
            raise UserError(f"{shown(host)} has no {name} address", "leave out -4 or -6")
    attempts = []
    for family, sockaddr in addresses.items():
        handshake = ClientHandshake(operation, user, resource, key)
        attempts.append(Attempt(handshake, (family, sockaddr), protocol, config.control_timeout))
        say(f"{OPERATIONS[operation]} to {sockaddr[0]} port {server_port}/{protocol}")
    run_attempts(attempts)

    for attempt in attempts:
        for warning in attempt.handshake.warnings:
            print(f"letmein: warning: {attempt.label}: {warning}", file=sys.stderr)
        say(f"{attempt.label}: {attempt.error.problem if attempt.error else 'COMEIN'}")
    errors = [attempt.error for attempt in attempts if attempt.error]
    if errors and (families or len(errors) == len(attempts)):
        raise errors[0]
    what = f"port {port}" if port is not None else f"resource {resource:08X}"
    where = ", ".join(attempt.label for attempt in attempts if not attempt.error)
    return f"{'opened' if operation == KNOCK else 'closed'} {what} on {host} ({where})"


# ============================================================================
# 4  Firewall
#
# A lease is an element with a timeout in an nftables set: the kernel ends it,
# to the second, whatever becomes of this program.
#
#     set letmein-4, letmein-6    address . protocol . port, for all ports
#     set letmein-ID-4, -6        addresses that hold the jump resource ID
#     set letmein-ID-gate         ip and ip6, while anybody holds ID: for jumps
#                                 that apply to all traffic
#
# First the pure functions that turn "what should be" into an nft script, then
# NftRun, the one place that runs nft, then Firewall, which knows the leases.
# Sources: nft(8); traps measured with nft 1.0.6 on Linux 6.18.
# ============================================================================

TRUSTED_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
NFT_LIMIT_S = 4.0  # an nft that takes longer is killed: less than a client's patience of 5 s
QUEUE_LIMIT = 4096  # changes that may wait for nft
SHORTEST_LEASE_S = 0.001  # nft takes 0 for "for ever": what is shorter is not installed
LONGEST_LEASE_S = 99_999_999.0  # nft: "value too large" above it
VERSIONS = {"inet": (4, 6), "ip": (4,), "ip6": (6,)}  # IP versions, by table family
COMMENT = re.compile(r"user=([0-9A-F]{8}) resource=([0-9A-F]{8}) boot=([0-9a-f]{8})")


class Lease(NamedTuple):
    """That an address may use a resource: address as 4 or 16 bytes, ends by time.monotonic()."""

    address: bytes
    resource: int
    user: int
    ends: float


class Element(NamedTuple):
    """An element of one of our sets as it should be: seconds left, comment without quotes."""

    set: str
    key: str
    left: float
    comment: str


def address_text(address: bytes) -> str:
    """4 or 16 bytes as an IP address is written. Nothing but 0-9 a-f : . can come out."""
    return socket.inet_ntop(socket.AF_INET if len(address) == 4 else socket.AF_INET6, address)


def duration_text(seconds: float) -> str:
    """Seconds as nft reads them, rounded down to milliseconds, never 0 (for ever)."""
    milliseconds = int(min(max(seconds, SHORTEST_LEASE_S), LONGEST_LEASE_S) * 1000)
    return f"{milliseconds // 1000}s{milliseconds % 1000}ms"


def set_types(config: Config) -> dict[str, str]:
    """All sets of a configuration: names and the types of their elements."""
    versions = VERSIONS[config.family]
    sets = {f"letmein-{v}": f"ipv{v}_addr . inet_proto . inet_service" for v in versions}
    for resource in config.resources.values():
        if resource.jumps:
            sets.update(
                {f"letmein-{resource.identifier:08X}-{v}": f"ipv{v}_addr" for v in versions}
            )
        if resource.is_gate:
            sets[f"letmein-{resource.identifier:08X}-gate"] = "ether_type"
    return sets


def ruleset_script(config: Config) -> str:
    """The nft script that declares our sets and fills our chains anew."""
    table = f"{config.family} {config.table}"
    lines = [
        f"add set {table} {name} {{ type {type}; flags timeout; counter; }}"
        for name, type in set_types(config).items()
    ]
    lines += [f"flush chain {table} {chain}" for chain in config.chains.values()]

    def rule(hook: str, text: str) -> None:
        lines.append(f"add rule {table} {config.chains[hook]} {text}")

    for protocol in config.protocols:
        rule("input", f"{protocol} dport {config.port} accept")
    ip_of = {4: "ip", 6: "ip6"}
    versions = VERSIONS[config.family]
    for v in versions:
        rule("input", f"{ip_of[v]} saddr . meta l4proto . th dport @letmein-{v} accept")
    for resource in config.resources.values():
        for jump in resource.jumps:
            name = f"letmein-{resource.identifier:08X}"
            if jump.hook not in config.chains:
                continue
            if not jump.match_saddr:
                # Families ip and ip6 take no `meta nfproto`; the ether type does in all three.
                rule(jump.hook, f"meta protocol @{name}-gate jump {jump.target}")
                continue
            for v in versions:
                rule(jump.hook, f"{ip_of[v]} saddr @{name}-{v} jump {jump.target}")
    return "\n".join(lines) + "\n"


def lease_keys(resource: Resource, address: bytes) -> list[tuple[str, str]]:
    """The elements that make up a lease: (set, key) for each."""
    v = 4 if len(address) == 4 else 6
    if resource.jumps:
        return [(f"letmein-{resource.identifier:08X}-{v}", address_text(address))]
    return [
        (f"letmein-{v}", f"{address_text(address)} . {protocol} . {resource.port}")
        for protocol in resource.protocols
    ]


def gate_keys(config: Config, resource: Resource) -> list[tuple[str, str]]:
    """The elements that open the gate of a jump resource for all traffic."""
    name = f"letmein-{resource.identifier:08X}-gate"
    return [(name, "ip" if v == 4 else "ip6") for v in VERSIONS[config.family]]


def elements_script(
    config: Config, removals: Iterable[tuple[str, str]], elements: Iterable[Element]
) -> str:
    """The nft script that removes these (set, key), then puts these elements.

    Traps: `delete` fails for an element that has just expired, and takes the
    whole transaction along, so each is added first. An element that exists
    gets its full time anew by `timeout T expires T` only from Linux 6.12 on,
    and never another comment: where that is wanted, it must be among removals.
    """
    removed: dict[str, list[str]] = {}
    added: dict[str, list[str]] = {}
    for name, key in removals:
        removed.setdefault(name, []).append(key)
    for element in elements:
        time_left = duration_text(element.left)
        added.setdefault(element.set, []).append(
            f'{element.key} timeout {time_left} expires {time_left} comment "{element.comment}"'
        )
    table = f"{config.family} {config.table}"
    lines = []
    for name, keys in removed.items():
        again = ", ".join(f"{key} timeout 1s" for key in keys)
        lines.append(f"add element {table} {name} {{ {again} }}")
        lines.append(f"delete element {table} {name} {{ {', '.join(keys)} }}")
    for name, texts in added.items():
        lines.append(f"add element {table} {name} {{ {', '.join(texts)} }}")
    return "\n".join(lines) + "\n"


def find_nft(name: str) -> str:
    """The absolute path of nft. Raises UserError if there is no such program."""
    import shutil

    path = shutil.which(name, path=TRUSTED_PATH)
    if path is None or not os.path.isabs(path):
        raise UserError(
            f"cannot find the program {shown(name, 80)}",
            f"install nftables (it is looked for in {TRUSTED_PATH}), "
            "or set exe in [NFTABLES] to its absolute path",
        )
    return path


class NftRun:
    """One run of nft, from its start to its end. Script and output go through memory files,
    so that neither side ever waits for a pipe."""

    def __init__(self, path: str, script: str, *arguments: str) -> None:
        import subprocess

        self.output = os.fdopen(os.memfd_create("letmein-out"), "w+b")
        self.errors = os.fdopen(os.memfd_create("letmein-err"), "w+b")
        self.kill_at = time.monotonic() + NFT_LIMIT_S
        self.failure = ""
        self.process: subprocess.Popen[bytes] | None = None
        with os.fdopen(os.memfd_create("letmein-in"), "w+b") as file:
            file.write(script.encode("ascii"))
            file.seek(0)
            try:
                self.process = subprocess.Popen(
                    [path, *arguments, "-f", "-"] if script else [path, *arguments],
                    stdin=file,
                    stdout=self.output,
                    stderr=self.errors,
                    cwd="/",
                    env={"PATH": TRUSTED_PATH, "LC_ALL": "C"},
                )
            except OSError as error:
                self.failure = f"cannot run {path}: {error.strerror}"

    @property
    def running(self) -> bool:
        """Whether nft has not ended yet."""
        return self.process is not None and self.process.poll() is None

    def kill(self) -> None:
        """End an nft that has taken too long."""
        if self.process is not None and self.running:
            self.process.kill()
            self.process.wait()
            self.failure = f"nft was killed after {NFT_LIMIT_S:g} s without an end"

    def result(self) -> str:
        """Frees the run; returns "" for success, else what nft said in one line."""
        if self.process is not None and self.process.returncode and not self.failure:
            self.errors.seek(0)
            said = self.errors.read(4096).decode("utf-8", "replace").strip().split("\n")
            self.failure = said[0] or f"nft exited with status {self.process.returncode}"
        self.output.close()
        self.errors.close()
        return self.failure


def run_nft(path: str, script: str, *arguments: str) -> bytes:
    """Run nft and wait for it. Returns what it printed; raises UserError if it fails."""
    import subprocess

    run = NftRun(path, script, *arguments)
    if run.process is not None:
        try:
            run.process.wait(NFT_LIMIT_S)
        except subprocess.TimeoutExpired:
            run.kill()
    run.output.seek(0)
    printed = run.output.read()
    failure = run.result()
    if failure:
        hint = f"try by hand: {path} {' '.join(arguments) or '-f FILE'}"
        if "Operation not permitted" in failure:
            hint = "run it as root: changing the firewall takes CAP_NET_ADMIN"
        raise UserError(f"nft: {failure}", hint)
    return printed


def list_table(path: str, config: Config, *options: str) -> list[dict[str, Any]]:
    """All objects of our table, as `nft -j list table` gives them.

    Raises UserError, naming the table if it does not exist.
    """
    import json

    try:
        text = run_nft(path, "", "-j", *options, "list", "table", config.family, config.table)
    except UserError as error:
        if "No such file or directory" not in error.problem:
            raise
        raise UserError(
            f"there is no nftables table {config.family} {config.table}",
            "load your ruleset first: nft -f /etc/nftables.conf",
        ) from None
    objects = json.loads(text).get("nftables", [])
    return [item for item in objects if isinstance(item, dict)]


def check_ruleset(path: str, config: Config) -> str:
    """Whether the kernel would take our ruleset; returns the script.

    Raises UserError naming the table or chain that is missing, or what nft says.
    """
    chains = {item["chain"]["name"] for item in list_table(path, config, "-t") if "chain" in item}
    for hook, chain in config.chains.items():
        if chain not in chains:
            raise UserError(
                f"there is no chain {chain} (chain-{hook}) in table {config.family} {config.table}",
                "declare it in your ruleset, as nftables.conf shows, and load that first",
            )
    script = ruleset_script(config)
    try:
        run_nft(path, script, "-c")
    except UserError as error:
        raise UserError(
            f"nft does not take the ruleset: {error.problem}",
            "do all chains that resources jump to exist, under names that nft takes?",
        ) from None
    return script


class Change(NamedTuple):
    """What a client asked for; operation is KNOCK or REVOKE. done is called once,
    with "" when the change is in force, else with the reason why it is not."""

    operation: int
    address: bytes
    resource: int
    user: int
    done: Callable[[str], None]


class Firewall:
    """The leases, and the kernel's sets that hold them.

    One nft runs at a time. While it runs, changes queue up, and the next run
    takes all of them in one transaction; if that fails, each is tried alone.

    Args: path, of nft; boot, the first 8 hex digits of the kernel's boot id.
    """

    def __init__(self, path: str, config: Config, boot: str) -> None:
        from collections import deque

        self.path = path
        self.config = config
        self.boot = boot
        self.leases: dict[tuple[bytes, int], Lease] = {}
        self.expiries: list[tuple[float, tuple[bytes, int]]] = []  # a heap; may hold old ends
        self.rules = 0  # of the leases, as max-nr-rules counts
        self.queue: deque[Change] = deque()
        self.alone: deque[Change] = deque()  # members of a batch that failed
        self.run: NftRun | None = None
        self.batch: list[Change] = []  # what the run is doing
        self.planned: dict[tuple[bytes, int], Lease | None] = {}  # what holds once it is done
        self.started = 0.0  # the time that its leases count from
        release = re.match(r"(\d+)\.(\d+)", os.uname().release)
        version = (int(release[1]), int(release[2])) if release else (0, 0)
        self.refreshes_in_place = version >= (6, 12)

    def open(self) -> None:
        """Install sets and rules. Raises UserError."""
        script = check_ruleset(self.path, self.config)
        table = f"{self.config.family} {self.config.table}"
        script += "".join(f"flush set {table} {name}\n" for name in set_types(self.config))
        run_nft(self.path, script)

    def close(self) -> list[str]:
        """Remove all that was installed; returns what could not be removed and why."""
        if self.run is not None:
            self.run.kill()
        table = f"{self.config.family} {self.config.table}"
        sets = set_types(self.config)
        emptying = [f"flush chain {table} {chain}" for chain in self.config.chains.values()]
        emptying += [f"flush set {table} {name}" for name in sets]
        # A set that a foreign rule uses cannot be deleted, and would roll all back.
        problems = []
        for script in ("\n".join(emptying), *(f"delete set {table} {name}" for name in sets)):
            try:
                run_nft(self.path, script + "\n")
            except UserError as error:
                problems.append(f"{script.splitlines()[0]}: {error.problem}")
        return problems

    def submit(self, change: Change) -> None:
        """Queue a change; call advance() when all that has come in is queued."""
        if len(self.queue) >= QUEUE_LIMIT:
            change.done("too many changes are waiting for nft")
        else:
            self.queue.append(change)

    def deadline(self) -> float | None:
        """When advance() wants to be called at the latest."""
        return self.run.kill_at if self.run is not None else None

    def advance(self) -> None:
        """Finish the run that has ended, and start the next one."""
        if self.run is not None:
            if self.run.running and time.monotonic() < self.run.kill_at:
                return
            self.run.kill()
            self._finish(self.run.result())
        while self.run is None and (self.alone or self.queue):
            if self.alone:
                self._start([self.alone.popleft()])
            else:
                changes = list(self.queue)
                self.queue.clear()
                self._start(changes)

    def _start(self, changes: list[Change]) -> None:
        """Run nft for these changes; those that need no nft are done at once."""
        self.expire()
        now = time.monotonic()
        rules = self.rules + len(self.config.protocols)
        planned: dict[tuple[bytes, int], Lease | None] = {}
        for change in changes:
            key = (change.address, change.resource)
            resource = self.config.resources.get(change.resource)
            if key in planned:
                self.queue.append(change)  # one change of a lease in a transaction
            elif resource is None:
                change.done("unknown resource")
            elif change.operation == REVOKE:
                if key in self.leases:
                    planned[key] = None
                    rules -= resource.rules
                    self.batch.append(change)
                else:
                    change.done("")
            else:
                added = 0 if key in self.leases else resource.rules
                problem = ""
                if (4 if len(change.address) == 4 else 6) not in VERSIONS[self.config.family]:
                    problem = f"a table of family {self.config.family} cannot hold this address"
                elif resource.timeout < SHORTEST_LEASE_S:
                    problem = "the resource's timeout is 0"
                elif rules + added > self.config.max_nr_rules:
                    problem = f"max-nr-rules ({self.config.max_nr_rules}) is reached"
                if problem:
                    change.done(problem)
                    continue
                rules += added
                ends = now + min(resource.timeout, LONGEST_LEASE_S)
                planned[key] = Lease(change.address, change.resource, change.user, ends)
                self.batch.append(change)
        if self.batch:
            self.planned, self.started = planned, now
            self.run = NftRun(self.path, self._script(now))
            if self.run.process is None:
                self._finish(self.run.result())

    def _script(self, now: float) -> str:
        """The nft script for what is planned."""
        removals: list[tuple[str, str]] = []
        elements: list[Element] = []

        def put(keys: list[tuple[str, str]], left: float, comment: str, anew: bool) -> None:
            elements.extend(Element(*key, left, comment) for key in keys)
            if anew:
                removals.extend(keys)

        gates = set()
        for key, lease in self.planned.items():
            resource = self.config.resources[key[1]]
            old = self.leases.get(key)
            if resource.is_gate:
                gates.add(key[1])
            if lease is None:
                removals += lease_keys(resource, key[0])
            else:
                anew = old is not None and (
                    old.user != lease.user or not self.refreshes_in_place
                )
                comment = self.comment(lease.user, lease.resource)
                put(lease_keys(resource, key[0]), lease.ends - now, comment, anew)
        for identifier in sorted(gates):
            resource = self.config.resources[identifier]
            after = {**self.leases, **self.planned}
            ends = [lease.ends for lease in after.values() if lease and lease.resource == identifier]
            held = any(key[1] == identifier for key in self.leases)
            if ends:
                comment = f"gate {self.comment(ANYBODY, identifier)}"
                anew = held and not self.refreshes_in_place
                put(gate_keys(self.config, resource), max(ends) - now, comment, anew)
            elif held:
                removals += gate_keys(self.config, resource)
        return elements_script(self.config, removals, elements)

    def comment(self, user: int, resource: int) -> str:
        """What an element says of itself."""
        return f"user={user:08X} resource={resource:08X} boot={self.boot}"

    def _finish(self, failure: str) -> None:
        """Take over what the run did, or try each of its changes alone if it failed."""
        batch, planned = self.batch, self.planned
        self.run, self.batch, self.planned = None, [], {}
        if failure and len(batch) > 1:
            self.alone.extend(batch)
            return
        if not failure:
            # A lease's time counts from here: then the kernel's element never outlives ours.
            elapsed = time.monotonic() - self.started
            for key, lease in planned.items():
                self._keep(key, lease and lease._replace(ends=lease.ends + elapsed))
        for change in batch:
            change.done(failure and f"nft: {failure}")

    def _keep(self, key: tuple[bytes, int], lease: Lease | None) -> None:
        """Note a lease, or with None its end, in the table."""
        import heapq

        weight = self.config.resources[key[1]].rules
        if self.leases.pop(key, None) is not None:
            self.rules -= weight
        if lease is not None:
            self.leases[key] = lease
            self.rules += weight
            heapq.heappush(self.expiries, (lease.ends, key))
            if len(self.expiries) > 2 * len(self.leases) + 64:
                self.expiries = [(lease.ends, key) for key, lease in self.leases.items()]
                heapq.heapify(self.expiries)

    def expire(self) -> None:
        """Forget the leases that have ended: the kernel sends no word of it."""
        import heapq

        now = time.monotonic()
        while self.expiries and self.expiries[0][0] <= now:
            ends, key = heapq.heappop(self.expiries)
            lease = self.leases.get(key)
            if lease is not None and lease.ends == ends:
                self._keep(key, None)


# ============================================================================
# 5  Monitor
#
# The privileged process: it owns keys, handshakes and leases, and is the only
# one that runs nft and writes the log. It opens the control sockets and hands
# them to the network process, which it starts by executing this program anew,
# so that neither a key nor the layout of memory is inherited.
#
# The two speak in records of one fixed size over a SOCK_SEQPACKET socketpair:
#
#     network -> monitor   READY, MESSAGE, CLOSED
#     monitor -> network   SETTINGS (with the sockets), REPLY, LAST, CLOSE, PROVED
#
# The monitor trusts nothing in a record but its size.
# ============================================================================

# kind, protocol, connection, peer's address (IPv6, or IPv4 mapped into it), its
# port, scope id, the in6_pktinfo that says at which address it knocked, message
RECORD = struct.Struct("!BBI16sHI20s56s")
READY, MESSAGE_IN, CLOSED, SETTINGS, REPLY, LAST, CLOSE, PROVED = range(1, 9)
TCP, UDP = 6, 17  # IP protocol numbers
PROTOCOL_NAMES = {TCP: "tcp", UDP: "udp"}
SETTINGS_PAYLOAD = struct.Struct("!dII")  # control-timeout in s, connections, per prefix
IPV4_MAPPED = bytes(10) + b"\xff\xff"  # RFC 4291, 2.5.5.2
NETWORK_COMMAND = "network-process"
NETWORK_START_LIMIT_S = 10.0
NETWORK_RESTART_S = (0.1, 30.0)  # the first pause before another one, and the longest
OUTBOX_LIMIT = 4096  # records that may wait for the network process
ACCEPTED_LIMIT = 65536  # UDP handshakes remembered for a repeated RESPONSE


class Record(NamedTuple):
    """One record between the processes; see RECORD."""

    kind: int
    protocol: int = TCP
    connection: int = 0
    address: bytes = bytes(16)
    port: int = 0
    scope: int = 0
    local: bytes = bytes(20)
    payload: bytes = bytes(MESSAGE_SIZE)

    def encode(self) -> bytes:
        """The record's bytes."""
        return RECORD.pack(*self)

    @classmethod
    def decode(cls, data: bytes) -> Record:
        """Raises struct.error unless data has the size of a record."""
        return cls(*RECORD.unpack(data))

    @property
    def peer(self) -> bytes:
        """The peer's address in 4 or 16 bytes: an IPv4-mapped peer is an IPv4 client."""
        return self.address[12:] if self.address.startswith(IPV4_MAPPED) else self.address


def log(event: str, **fields: object) -> None:
    """Write one line, `event=... name=value ...`, to standard error.

    Values that are not plain words are quoted and escaped. Under systemd, which
    adds a time of its own, the line has none.
    """
    words = [f"event={event}"]
    for name, value in fields.items():
        text = str(value)
        plain = re.fullmatch(r"[A-Za-z0-9_.,:/+%-]+", text)
        words.append(f"{name}={text if plain else ascii(text)}")
    if "JOURNAL_STREAM" not in os.environ:
        words.insert(0, time.strftime("%Y-%m-%dT%H:%M:%S%z"))
    print(*words, file=sys.stderr, flush=True)


class ServerOptions(NamedTuple):
    """What the command line says about the server."""

    config_path: str
    rundir: str
    connections: int
    prefix_connections: int
    account: str  # the user that the network process becomes, "none" for no change


def control_sockets(config: Config) -> list[socket.socket]:
    """The sockets of the control port: for IPv6 and IPv4 in one, or for IPv4 where the
    kernel has no IPv6. Raises UserError if one cannot be had."""
    sockets = []
    for protocol in config.protocols:
        kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
        try:
            try:
                control = socket.socket(socket.AF_INET6, kind)
                control.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
                control.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, kind == socket.SOCK_STREAM)
                control.bind(("::", config.port))
            except OSError as error:
                import errno

                if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                    raise
                control = socket.socket(socket.AF_INET, kind)
                control.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, kind == socket.SOCK_STREAM)
                control.bind(("0.0.0.0", config.port))
            if kind == socket.SOCK_STREAM:
                control.listen(1024)
        except OSError as error:
            raise UserError(
                f"cannot serve the control port {config.port}/{protocol}: {error.strerror}",
                "does another server run already? (ss -lntup tells)",
            ) from None
        sockets.append(control)
    return sockets


class Monitor:
    """The privileged process, after its start. run() returns when it was told to stop."""

    def __init__(self, config: Config, options: ServerOptions) -> None:
        from collections import deque

        self.config = config
        self.options = options
        self.sockets = control_sockets(config)
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            boot = file.read(8)
        self.firewall = Firewall(find_nft(config.nft), config, boot)
        self.selector = selectors.DefaultSelector()
        self.stopping = False

        self.network: subprocess.Popen[bytes] | None = None
        self.link: socket.socket | None = None  # to the network process
        self.outbox: deque[bytes] = deque()
        self.restart_at: float | None = None
        self.restart_pause = NETWORK_RESTART_S[0]

        self.handshakes: dict[int, ServerHandshake] = {}  # TCP, by connection number
        self.secret = os.urandom(32)  # of the UDP tokens of this run
        self.window_s = max(config.control_timeout, 1.0)
        self.accepted: dict[bytes, tuple[float, bytes]] = {}  # UDP token: since when, reply

    # -- start and stop ------------------------------------------------------

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT. Raises UserError if the start fails."""
        signals = self._catch_signals()
        try:
            check_ruleset(self.firewall.path, self.config)
            self._start_network()
            self._await_network()
            self.firewall.open()
            notify_systemd("READY=1")
            log(
                "ready",
                port=f"{self.config.port}/{'+'.join(self.config.protocols)}",
                table=f"{self.config.family}/{self.config.table}",
                users=len(self.config.keys),
                resources=len(self.config.resources),
            )
            try:
                while not self.stopping:
                    self._turn()
            finally:
                notify_systemd("STOPPING=1")
                for problem in self.firewall.close():
                    log("cleanup-failed", problem=problem)
                log("stopped")
        finally:
            self._stop_network()
            signals.close()

    def _catch_signals(self) -> socket.socket:
        """Have signals wake the selector up, by way of a socket."""
        import signal

        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.setblocking(False)
        signal.set_wakeup_fd(theirs.detach(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)

        def on_signal() -> None:
            for number in ours.recv(4096):
                if number in (signal.SIGTERM, signal.SIGINT):
                    self.stopping = True

        self.selector.register(ours, selectors.EVENT_READ, on_signal)
        return ours

    def _turn(self) -> None:
        """Wait for something to happen, and see to it."""
        deadlines = [self.firewall.deadline(), self.restart_at]
        times = [deadline for deadline in deadlines if deadline is not None]
        wait = max(min(times) - time.monotonic(), 0) if times else None
        for key, _ in self.selector.select(wait):
            key.data()
        if self.network is not None and self.network.poll() is not None:
            self._lose_network(f"it ended with status {self.network.returncode}")
        if self.restart_at is not None and time.monotonic() >= self.restart_at:
            self._start_network()
        self.firewall.advance()
        self._flush()

    # -- the network process -------------------------------------------------

    def _start_network(self) -> None:
        import subprocess

        self.restart_at = None
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        with theirs:
            self.network = subprocess.Popen(
                [sys.executable, "-I", os.path.abspath(__file__), NETWORK_COMMAND],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                cwd="/",
                env={},
            )
        self.link = ours
        self.selector.register(ours, selectors.EVENT_READ, self._on_link)
        settings = SETTINGS_PAYLOAD.pack(
            self.config.control_timeout, self.options.connections, self.options.prefix_connections
        )
        account = self.options.account.encode()[: MESSAGE_SIZE - len(settings)]
        payload = (settings + account).ljust(MESSAGE_SIZE, b"\0")
        record = Record(SETTINGS, payload=payload).encode()
        socket.send_fds(ours, [record], [control.fileno() for control in self.sockets])

    def _await_network(self) -> None:
        """Wait at the start until the network process is ready. Raises UserError."""
        assert self.link is not None and self.network is not None
        import select

        readable, _, _ = select.select([self.link], [], [], NETWORK_START_LIMIT_S)
        data = self.link.recv(RECORD.size) if readable else b""
        if not data or Record.decode(data).kind != READY:
            raise UserError(
                "the network process did not start",
                "it has said why above; --user none runs it without a change of user",
            )

    def _lose_network(self, reason: str) -> None:
        """The network process is gone or useless: end it, and start another after a pause."""
        log("network-process-lost", reason=reason, pause=f"{self.restart_pause:g}")
        self._stop_network()
        self.handshakes.clear()
        self.outbox.clear()
        self.restart_at = time.monotonic() + self.restart_pause
        self.restart_pause = min(self.restart_pause * 2, NETWORK_RESTART_S[1])

    def _stop_network(self) -> None:
        if self.link is not None:
            if self.link in self.selector.get_map():
                self.selector.unregister(self.link)
            self.link.close()
            self.link = None
        if self.network is not None:
            self.network.kill()
            self.network.wait()
            self.network = None

    def _on_link(self) -> None:
        """Take what the network process has sent, at most a batch's worth."""
        for _ in range(256):
            if self.link is None:
                return
            try:
                data = self.link.recv(RECORD.size + 1)
            except BlockingIOError:
                return
            except OSError as error:
                return self._lose_network(error.strerror or "")
            if len(data) != RECORD.size:
                return self._lose_network("it closed its end" if not data else "a bad record")
            self._receive(Record.decode(data))

    def _send(self, record: Record) -> None:
        self.outbox.append(record.encode())
        if len(self.outbox) > OUTBOX_LIMIT:
            self._lose_network("it reads no more")

    def _flush(self) -> None:
        """Send what waits for the network process, as far as the link takes it."""
        if self.link is None:
            return
        try:
            while self.outbox:
                self.link.send(self.outbox[0])
                self.outbox.popleft()
        except BlockingIOError:
            pass
        except OSError as error:
            return self._lose_network(error.strerror or "")
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if self.outbox else 0)
        if self.selector.get_key(self.link).events != events:
            self.selector.modify(self.link, events, self._on_link)

    # -- what peers say ------------------------------------------------------

    def _receive(self, record: Record) -> None:
        """See to one record from the network process."""
        if record.kind == READY:
            self.restart_pause = NETWORK_RESTART_S[0]
        elif record.kind == CLOSED:
            self.handshakes.pop(record.connection, None)
        elif record.kind == MESSAGE_IN and record.protocol == TCP:
            self._receive_tcp(record)
        elif record.kind == MESSAGE_IN and record.protocol == UDP:
            self._receive_udp(record)

    def _handshake(self, new_token: Callable[[int, int, int], bytes]) -> ServerHandshake:
        config = self.config
        return ServerHandshake(config.error_policy, config.keys.get, config.objection, new_token)

    def _receive_tcp(self, record: Record) -> None:
        """A connection has a handshake of its own, from its first message to its last."""
        handshake = self.handshakes.get(record.connection)
        if handshake is None:
            handshake = self._handshake(lambda *_: os.urandom(32))
            self.handshakes[record.connection] = handshake
        step = handshake.receive(record.payload)
        if step.verdict == CONTINUE:
            self._send(record._replace(kind=REPLY, payload=step.reply))
        elif step.verdict == GRANT:
            self._send(record._replace(kind=PROVED))
            self._change(handshake, record, lambda reply: self._end(record, reply))
        else:
            self._refuse(handshake, record, step)
            self._end(record, step.reply)

    def _end(self, record: Record, reply: bytes) -> None:
        """Send the last message of a TCP connection, if there is one, and close it."""
        self.handshakes.pop(record.connection, None)
        if reply:
            self._send(record._replace(kind=LAST, payload=reply))
        else:
            self._send(record._replace(kind=CLOSE))

    def _receive_udp(self, record: Record) -> None:
        """No state before full authentication: the challenge token is derived from a secret
        of this run, a time window, the peer and the request, so a repeated KNOCK gets the
        same CHALLENGE, and a RESPONSE is checked against the tokens that were possible."""
        now = time.monotonic()
        window = int(now / self.window_s)

        def token(operation: int, user: int, resource: int, window: int = window) -> bytes:
            text = struct.pack("!QHIII", window, record.port, operation, user, resource)
            return hmac.digest(self.secret, text + record.address, "sha3_256")

        handshake = self._handshake(token)
        try:
            message = Message.decode(record.payload)
        except ProtocolError:
            return
        if message.operation == RESPONSE:
            user, resource = message.user, message.resource
            tokens = [
                (operation, token(operation, user, resource, past))
                for past in (window, window - 1)
                for operation in (KNOCK, REVOKE)
            ]
            handshake.expect_response(user, resource, tokens)
        step = handshake.receive(record.payload)
        if step.verdict != GRANT:
            if step.verdict == REFUSE:
                self._refuse(handshake, record, step)
            if step.reply:
                self._send(record._replace(kind=REPLY, payload=step.reply))
            return

        for old, (since, _) in list(self.accepted.items()):
            if now - since < 2 * self.window_s:
                break
            del self.accepted[old]
        answered = handshake.answered
        if answered in self.accepted:
            # A repeated RESPONSE changes nothing, and gets the same reply once it is there.
            reply = self.accepted[answered][1]
            if reply:
                self._send(record._replace(kind=REPLY, payload=reply))
            return
        if len(self.accepted) >= ACCEPTED_LIMIT:
            return
        self.accepted[answered] = (now, b"")

        def finish(reply: bytes) -> None:
            self.accepted[answered] = (now, reply)
            if reply:
                self._send(record._replace(kind=REPLY, payload=reply))

        self._change(handshake, record, finish)

    def _change(
        self, handshake: ServerHandshake, record: Record, finish: Callable[[bytes], None]
    ) -> None:
        """Have the firewall do what the peer asked for, then finish with the last message."""
        ids = {"user": f"{handshake.user:08X}", "resource": f"{handshake.resource:08X}"}
        event = "granted" if handshake.operation == KNOCK else "revoked"

        def done(problem: str) -> None:
            if problem:
                log("failed", **peer_fields(record), **ids, reason=problem)
            else:
                log(event, **peer_fields(record), **ids)
            finish(handshake.finish(not problem))

        self.firewall.submit(
            Change(handshake.operation, record.peer, handshake.resource, handshake.user, done)
        )

    def _refuse(self, handshake: ServerHandshake, record: Record, step: Step) -> None:
        """Log why a peer was refused. What is no letmein message is not worth a line."""
        if step.verdict == REFUSE:
            ids = {"user": f"{handshake.user:08X}", "resource": f"{handshake.resource:08X}"}
            log("refused", **peer_fields(record), **ids, reason=step.reason)


def peer_fields(record: Record) -> dict[str, str]:
    """The peer, for the log."""
    return {
        "peer": address_text(record.peer),
        "proto": PROTOCOL_NAMES.get(record.protocol, "?"),
    }


def notify_systemd(state: str) -> None:
    """Tell systemd about our state, if it asked for it; see sd_notify(3)."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if path:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            try:
                notify.connect("\0" + path[1:] if path[0] == "@" else path)
                notify.send(state.encode())
            except OSError as error:
                log("notify-failed", problem=error.strerror)


# ============================================================================
# 6  Network
#
# The process that faces the internet. It owns sockets, deadlines and limits,
# and forwards messages between peers and the monitor. It knows no key, and
# could not run a program.
# ============================================================================

IP_PKTINFO = getattr(socket, "IP_PKTINFO", 8)  # linux/in.h; Python names it from 3.14 on
ACCEPTS_PER_TURN = 64
PROVED_LIMIT_S = 60.0  # a peer that waits for the firewall is given up after this


class Connection:
    """One TCP connection: its peer, what has come of a message, and when its time is up."""

    def __init__(self, number: int, peer: socket.socket, name: tuple[Any, ...]) -> None:
        self.number = number
        self.socket = peer
        self.address, self.port, self.scope = split_name(name)
        self.prefix = prefix_of(self.address)
        self.received = b""
        self.deadline = 0.0
        self.reading = True


def split_name(name: tuple[Any, ...]) -> tuple[bytes, int, int]:
    """A socket address as (16 bytes, port, scope id), IPv4 mapped into IPv6."""
    host, port, *more = name
    if not more:
        return IPV4_MAPPED + socket.inet_aton(host), port, 0
    return socket.inet_pton(socket.AF_INET6, host.partition("%")[0]), port, more[1]


def prefix_of(address: bytes) -> bytes:
    """What counts as one peer: an IPv4 address, an IPv6 /56."""
    return address if address.startswith(IPV4_MAPPED) else address[:7]


class Network:
    """The network process's loop, after it has given up its privileges.

    Args:
        link: the socketpair to the monitor.
        timeout: control-timeout in seconds, for a whole handshake.
        limit, prefix_limit: TCP connections at once, in all and by prefix.
    """

    def __init__(
        self,
        link: socket.socket,
        listeners: Sequence[socket.socket],
        timeout: float,
        limit: int,
        prefix_limit: int,
    ) -> None:
        from collections import deque

        self.link = link
        self.timeout = timeout
        self.limit = limit
        self.prefix_limit = prefix_limit
        self.outbox: deque[bytes] = deque()
        # By number, oldest first; peers that have proved themselves wait apart.
        self.connections: dict[int, Connection] = {}
        self.proved: dict[int, Connection] = {}
        self.prefixes: dict[bytes, dict[int, Connection]] = {}
        self.number = 0
        self.datagrams: list[socket.socket] = []
        self.selector = selectors.DefaultSelector()
        self.selector.register(link, selectors.EVENT_READ, self._on_link)
        for listener in listeners:
            listener.setblocking(False)
            if listener.type == socket.SOCK_STREAM:
                self.selector.register(
                    listener, selectors.EVENT_READ, lambda listener=listener: self._accept(listener)
                )
            else:
                self._serve_datagrams(listener)
        link.setblocking(False)
        self._send(Record(READY))

    def run(self) -> None:
        """Serve until the monitor is gone."""
        import select

        while True:
            now = time.monotonic()
            wait = None
            for group in (self.connections, self.proved):
                # The order is that of the deadlines, for each has the same time.
                while group and next(iter(group.values())).deadline <= now:
                    self._close(next(iter(group.values())))
                if group:
                    first = next(iter(group.values())).deadline - now
                    wait = first if wait is None else min(wait, first)
            if self.outbox:
                # The monitor lags behind: take nothing more from the internet until it follows.
                select.select([], [self.link], [], wait)
                self._flush()
                continue
            for key, _ in self.selector.select(wait):
                key.data()

    # -- the monitor ---------------------------------------------------------

    def _send(self, record: Record) -> None:
        self.outbox.append(record.encode())
        self._flush()

    def _flush(self) -> None:
        try:
            while self.outbox:
                self.link.send(self.outbox[0])
                self.outbox.popleft()
        except BlockingIOError:
            pass
        except OSError:
            raise SystemExit(0) from None  # the monitor is gone

    def _on_link(self) -> None:
        try:
            data = self.link.recv(RECORD.size)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            raise SystemExit(0)
        record = Record.decode(data)
        if record.protocol == UDP:
            self._answer(record)
            return
        connection = self.connections.get(record.connection) or self.proved.get(record.connection)
        if connection is None:
            return
        if record.kind == PROVED:
            self._forget(connection)
            connection.deadline = time.monotonic() + PROVED_LIMIT_S
            self.proved[connection.number] = connection
        elif record.kind == CLOSE:
            self._close(connection, tell=False)
        else:
            try:
                # Two messages at most: a socket that does not take them at once is no client's.
                sent = connection.socket.send(record.payload)
            except OSError:
                sent = 0
            if record.kind == LAST:
                self._close(connection, tell=False)
            elif sent != MESSAGE_SIZE:
                self._close(connection)
            else:
                self._listen_to(connection)

    # -- TCP -----------------------------------------------------------------

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(ACCEPTS_PER_TURN):
            try:
                peer, name = listener.accept()
            except BlockingIOError:
                return
            except OSError:
                # Out of descriptors or memory, or the peer is gone already (accept(2)).
                if self.connections:
                    self._close(next(iter(self.connections.values())))
                return
            peer.setblocking(False)
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.number = (self.number + 1) & 0xFFFFFFFF
            connection = Connection(self.number, peer, name)
            self._make_room(connection.prefix)
            connection.deadline = time.monotonic() + self.timeout
            self.connections[connection.number] = connection
            self.prefixes.setdefault(connection.prefix, {})[connection.number] = connection
            self._listen_to(connection)

    def _make_room(self, prefix: bytes) -> None:
        """Close the oldest connection of the newcomer's prefix if that has its share, or of
        the prefix that has the most if all slots are taken. Nobody is refused: a flood only
        ever pushes out itself, or the oldest of all where no prefix has more than another."""
        siblings = self.prefixes.get(prefix, {})
        if len(siblings) >= self.prefix_limit:
            self._close(next(iter(siblings.values())))
        elif len(self.connections) >= self.limit:
            most = max(map(len, self.prefixes.values()))
            if most == 1:
                self._close(next(iter(self.connections.values())))
            else:
                crowd = next(group for group in self.prefixes.values() if len(group) == most)
                self._close(next(iter(crowd.values())))

    def _listen_to(self, connection: Connection) -> None:
        connection.reading = True
        self.selector.register(
            connection.socket, selectors.EVENT_READ, lambda: self._read(connection)
        )

    def _pause(self, connection: Connection) -> None:
        """Read no more until the monitor has answered: one message at a time."""
        if connection.reading:
            connection.reading = False
            self.selector.unregister(connection.socket)

    def _read(self, connection: Connection) -> None:
        if not connection.reading:
            return  # closed or paused earlier in this turn
        try:
            data = connection.socket.recv(MESSAGE_SIZE - len(connection.received))
        except BlockingIOError:
            return
        except OSError:
            data = b""
        connection.received += data
        if not data:
            self._close(connection)
        elif len(connection.received) == MESSAGE_SIZE:
            payload, connection.received = connection.received, b""
            try:
                Message.decode(payload)
            except ProtocolError:
                return self._close(connection)
            self._pause(connection)
            self._send(
                Record(
                    MESSAGE_IN,
                    TCP,
                    connection.number,
                    connection.address,
                    connection.port,
                    connection.scope,
                    payload=payload,
                )
            )

    def _forget(self, connection: Connection) -> None:
        """Take a connection out of the competition for slots."""
        self.proved.pop(connection.number, None)
        if self.connections.pop(connection.number, None) is not None:
            siblings = self.prefixes[connection.prefix]
            del siblings[connection.number]
            if not siblings:
                del self.prefixes[connection.prefix]

    def _close(self, connection: Connection, tell: bool = True) -> None:
        self._forget(connection)
        self._pause(connection)
        connection.socket.close()
        if tell:
            self._send(Record(CLOSED, connection=connection.number))

    # -- UDP -----------------------------------------------------------------

    def _serve_datagrams(self, listener: socket.socket) -> None:
        """Hosts have more than one address: ask for the one that a datagram came to
        (RFC 3542, section 6.1), to answer from it."""
        if listener.family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
        else:
            listener.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)
        self.datagrams.append(listener)
        number = len(self.datagrams) - 1
        self.selector.register(
            listener, selectors.EVENT_READ, lambda: self._receive(listener, number)
        )

    def _receive(self, listener: socket.socket, number: int) -> None:
        for _ in range(ACCEPTS_PER_TURN):
            try:
                data, extra, _, name = listener.recvmsg(MESSAGE_SIZE + 1, 64)
                Message.decode(data)
            except ProtocolError:
                continue
            except OSError:
                return
            local = extra[0][2][:20].ljust(20, b"\0") if extra else bytes(20)
            address, port, scope = split_name(name)
            self._send(Record(MESSAGE_IN, UDP, number, address, port, scope, local, data))
            if self.outbox:
                return

    def _answer(self, record: Record) -> None:
        """Send a datagram, from the address that the peer's came to."""
        if record.connection >= len(self.datagrams):
            return
        listener = self.datagrams[record.connection]
        name: tuple[Any, ...]
        if listener.family == socket.AF_INET6:
            name = (socket.inet_ntop(socket.AF_INET6, record.address), record.port, 0, record.scope)
            # The interface is only given where the address means nothing without it.
            interface = record.local[16:] if record.scope else bytes(4)
            extra = (socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, record.local[:16] + interface)
        else:
            name = (socket.inet_ntoa(record.peer), record.port)
            # struct in_pktinfo: interface, local address, destination address; see ip(7)
            extra = (socket.IPPROTO_IP, IP_PKTINFO, bytes(4) + record.local[4:8] + bytes(4))
        try:
            listener.sendmsg([record.payload], [extra] if any(record.local) else [], 0, name)
        except OSError:
            pass  # a lost datagram: the client asks again


# ============================================================================
# 7  Sandbox
#
# What the network process gives up before it reads a byte from the internet.
# ============================================================================


def enter_sandbox(account: str, connections: int) -> None:
    """Become account, in an empty root directory, with no way to get more.

    Args: account, a user's name, or "none" to stay what we are.
    Raises UserError naming the step that failed.
    """
    import resource

    step = "limit the number of descriptors"
    try:
        # Above the slots stand link, listeners, selectors, and peers that wait for nft.
        files = 2 * connections + 64
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        files = files if most == resource.RLIM_INFINITY else min(files, most)
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
        if account == "none":
            return
        import pwd
        import tempfile

        step = f"find the user {account} (useradd --system {account} makes one)"
        user = pwd.getpwnam(account)
        # A directory that has been removed is empty and stays so, and nothing is left of it.
        step = "make an empty root directory"
        path = tempfile.mkdtemp(prefix="letmeind-")
        os.chdir(path)
        os.rmdir(path)
        step = "change the root directory"
        os.chroot(".")
        step = f"become the user {account}"
        os.setgroups([])
        os.setresgid(user.pw_gid, user.pw_gid, user.pw_gid)
        os.setresuid(user.pw_uid, user.pw_uid, user.pw_uid)
    except (OSError, KeyError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "there is none"
        raise UserError(
            f"the network process cannot {step}: {reason}",
            "run the server as root, or give --user another user, or none",
        ) from None


def network_process() -> None:
    """The whole life of the network process; its standard input is the link to the monitor."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the monitor's to see to
    link = socket.socket(fileno=0)
    data, descriptors, _, _ = socket.recv_fds(link, RECORD.size, 16)
    if not data:
        return
    payload = Record.decode(data).payload
    timeout, limit, prefix_limit = SETTINGS_PAYLOAD.unpack_from(payload)
    account = payload[SETTINGS_PAYLOAD.size :].rstrip(b"\0").decode()
    listeners = [socket.socket(fileno=descriptor) for descriptor in descriptors]
    enter_sandbox(account, limit)
    Network(link, listeners, timeout, limit, prefix_limit).run()


# ============================================================================
# 8  Command line
# ============================================================================


def status_rows(config: Config, objects: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The leases in a listing of our table, as `status --json` prints them."""
    rows = []
    for item in objects:
        found = item.get("set", {})
        name = re.fullmatch(r"letmein-(?:[0-9A-F]{8}-)?[46]", found.get("name", ""))
        for wrapped in found.get("elem", []) if name else []:
            element = wrapped.get("elem", {}) if isinstance(wrapped, dict) else {}
            comment = COMMENT.fullmatch(element.get("comment", ""))
            key = element.get("val", "")
            parts = key["concat"] if isinstance(key, dict) else [key, None, None]
            rows.append(
                {
                    "address": parts[0],
                    "protocol": parts[1],
                    "port": parts[2],
                    "resource": comment[2] if comment else None,
                    "user": comment[1] if comment else None,
                    "seconds_left": element.get("expires"),
                    "packets": element.get("counter", {}).get("packets"),
                    "bytes": element.get("counter", {}).get("bytes"),
                }
            )
    return sorted(rows, key=lambda row: (row["address"], row["port"] or 0, str(row["resource"])))


def time_text(seconds: int) -> str:
    """Seconds for a person: 59s, 9m59s, 23h59m, 12d3h."""
    for size, unit, lesser_size, lesser in ((86400, "d", 3600, "h"), (3600, "h", 60, "m")):
        if seconds >= size:
            return f"{seconds // size}{unit}{seconds % size // lesser_size}{lesser}"
    return f"{seconds // 60}m{seconds % 60}s" if seconds >= 60 else f"{seconds}s"


def status(config: Config, as_json: bool) -> int:
    """Print who holds what, as the kernel has it."""
    rows = status_rows(config, list_table(find_nft(config.nft), config))
    if as_json:
        import json

        print(json.dumps({"family": config.family, "table": config.table, "leases": rows}, indent=1))
        return 0
    if not rows:
        print("nobody holds a lease: all ports are shut")
        return 0
    print(f"{'ADDRESS':<39} {'OPEN':<9} {'USER':<8} {'LEFT':>7} {'PACKETS':>10}")
    for row in rows:
        what = f"{row['port']}/{row['protocol']}" if row["port"] else row["resource"] or "?"
        left = "for ever" if row["seconds_left"] is None else time_text(row["seconds_left"])
        packets = "-" if row["packets"] is None else row["packets"]
        print(f"{row['address']:<39} {what:<9} {row['user'] or '?':<8} {left:>7} {packets:>10}")
    return 0


def check(config: Config) -> int:
    """Say what the server would do, having tried it with `nft -c`."""
    script = check_ruleset(find_nft(config.nft), config)
    print(script, end="")
    for user in config.keys:
        allowed = [
            f"{resource} ({time_text(int(resource.timeout))})"
            for resource in config.resources.values()
            if not config.objection(user, resource.identifier)
        ]
        print(f"# user {user:08X} may knock for: {', '.join(allowed) or 'nothing'}")
    print(f"# {config.path}: good, and nft takes the ruleset above; nothing was changed")
    return 0


def server(arguments: argparse.Namespace, config: Config) -> int:
    """Run the server, or --check what it would do."""
    if not sys.platform.startswith("linux"):
        raise UserError("the server needs Linux", "only the client runs elsewhere")
    if arguments.check:
        return check(config)
    options = ServerOptions(
        config.path,
        arguments.rundir,
        arguments.num_connections,
        arguments.num_ip_connections,
        arguments.user or "letmeind",
    )
    if options.account == "none":
        log("warning", text="--user none: the network process keeps all the rights it has")
    Monitor(config, options).run()
    return 0


def generate_key(config: Config, user: int | None) -> int:
    """Print a new key as a line for both files' [KEYS]."""
    user = config.default_user if user is None else user
    print(f"{user:08X} = {os.urandom(KEY_SIZE).hex().upper()}")
    return 0


def argument_type(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """A parser of option values as argparse wants it."""

    def convert(text: str) -> Any:
        import argparse

        try:
            return parse(text)
        except Unfit as unfit:
            raise argparse.ArgumentTypeError(f"{unfit.problem}; expected: {unfit.expected}") from None

    return convert


def parse_port(text: str) -> int:
    """A port number from 1 to 65535."""
    port = parse_number(text, 65535)
    if port == 0:
        raise Unfit("port 0 is nobody's port", "a port from 1 to 65535")
    return port


def parse_slots(text: str) -> int:
    """A number of connections, at least 1."""
    slots = parse_number(text, 1_000_000)
    if slots == 0:
        raise Unfit("0 connections serve nobody", "a number from 1 to 1000000")
    return slots


def build_parser() -> argparse.ArgumentParser:
    """The command line, as README's tables have it."""
    import argparse

    identifier, port = argument_type(parse_identifier), argument_type(parse_port)
    seccomp = argument_type(parse_choice("off", "log", "kill"))

    def common(parser: argparse.ArgumentParser, default: Any) -> None:
        parser.add_argument("-c", "--config", metavar="FILE", default=default)
        parser.add_argument("--seccomp", metavar="off|log|kill", type=seccomp, default=default)
        parser.add_argument("-v", "--version", action="version", version=f"letmein.py {VERSION}")

    parser = argparse.ArgumentParser(
        prog="letmein", description="An authenticated port knocker: client and server."
    )
    common(parser, None)
    parser.add_argument("--verbose", action="store_true", help="say what is going on")
    parser.add_argument("--dns", help=argparse.SUPPRESS)
    parser.add_argument("--dns-crypt", help=argparse.SUPPRESS)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    for name, aliases, text in (
        ("knock", [], "open a port for this address"),
        ("revoke", ["close"], "close it again"),
    ):
        command = commands.add_parser(name, aliases=aliases, help=text, description=text)
        command.add_argument("host", metavar="HOST")
        what = command.add_mutually_exclusive_group(required=True)
        what.add_argument("port", metavar="PORT", nargs="?", type=port)
        what.add_argument("-r", "--resource", metavar="ID", type=identifier)
        command.add_argument("-u", "--user", metavar="ID", type=identifier)
        command.add_argument("-P", "--server-port", metavar="PORT", type=port)
        for letter, protocol in (("-T", "tcp"), ("-U", "udp")):
            command.add_argument(
                letter,
                f"--server-port-{protocol}",
                dest="protocol",
                action="store_const",
                const=protocol,
            )
        for letter, version, family in (
            ("-4", "--ipv4", socket.AF_INET),
            ("-6", "--ipv6", socket.AF_INET6),
        ):
            command.add_argument(
                letter, version, dest="families", action="append_const", const=family, default=[]
            )

    command = commands.add_parser("gen-key", help="print a new key")
    command.add_argument("-u", "--user", metavar="ID", type=identifier)

    command = commands.add_parser("server", help="run the server")
    common(command, argparse.SUPPRESS)
    command.add_argument("--rundir", metavar="DIR", default="/run")
    slots = argument_type(parse_slots)
    command.add_argument("-n", "--num-connections", metavar="N", type=slots, default=1024)
    command.add_argument("-N", "--num-ip-connections", metavar="N", type=slots, default=8)
    command.add_argument("--no-systemd", action="store_true")
    command.add_argument("--check", action="store_true", help="try the configuration and leave")
    command.add_argument("--user", metavar="NAME", help="of the network process, or none")

    command = commands.add_parser("status", help="who holds what")
    common(command, argparse.SUPPRESS)
    command.add_argument("--json", action="store_true")
    return parser


def run_command(arguments: argparse.Namespace) -> int:
    """Do what the command line says; returns the exit status. Raises UserError."""
    is_server = arguments.command in ("server", "status")
    name = "letmeind.conf" if is_server else "letmein.conf"
    path = arguments.config or default_config_path(name)
    if arguments.command == "gen-key":
        # A key is what one needs before there is a configuration.
        try:
            config = read_config(path, False)
        except ConfigError:
            config = parse_config("", path, False)
        return generate_key(config, arguments.user)

    config = read_config(path, is_server)
    for warning in config.warnings:
        print(f"letmein: warning: {warning}", file=sys.stderr)
    if arguments.dns or arguments.dns_crypt:
        print("letmein: warning: --dns is obsolete; the system resolves names", file=sys.stderr)
    if (arguments.seccomp or config.seccomp) != "off" and arguments.command != "status":
        raise UserError(
            f"seccomp={arguments.seccomp or config.seccomp}: this version has no seccomp filter",
            "set seccomp = off in [GENERAL], or --seccomp off",
        )
    if arguments.command == "server":
        return server(arguments, config)
    if arguments.command == "status":
        return status(config, arguments.json)

    def say(line: str) -> None:
        if arguments.verbose:
            print(f"letmein: {line}", file=sys.stderr)

    say(f"configuration: {config.path}")
    print(
        knock(
            config,
            KNOCK if arguments.command == "knock" else REVOKE,
            arguments.host,
            arguments.port,
            arguments.resource,
            arguments.user,
            arguments.server_port,
            arguments.protocol,
            tuple(arguments.families),
            say,
        )
    )
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The program: returns the exit status, 0 for success, 1 for failure (2: bad usage)."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if words == [NETWORK_COMMAND]:
            network_process()
            return 0
        if os.path.basename(sys.argv[0]) == "letmeind":
            words.insert(0, "server")
        return run_command(build_parser().parse_args(words))
    except UserError as error:
        print(f"letmein: error: {error.problem}", file=sys.stderr)
        if error.hint:
            print(f"  {error.hint}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
