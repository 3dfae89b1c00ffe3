#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# ///
"""letmein: an authenticated port knocker, client and server in one file.

The server's firewall drops everything. A client who holds a shared key knocks, proves it by
challenge and response (HMAC-SHA3-256), and the kernel's nftables lets that one address in to that
one port, for a while.

The file has eight rooms, each behind a banner: protocol, configuration, client, firewall, monitor,
network, sandbox, command line. A room uses only those above it. Imported at the top is what a
knock needs, or what costs it next to nothing: a client's time goes into starting Python.
"""

from __future__ import annotations

if __name__ == "__main__":
    import signal  # before all else: Ctrl-C ends us without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if hasattr(signal, "SIGHUP"):  # it waits until main() knows what it is for
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP])

import contextlib
import functools
import os
import re
import select
import selectors
import socket
import struct
import sys
import time
from collections import deque, namedtuple

VERSION = "1.0.0"
PROGRAM = sys._getframe().f_code  # this module, compiled, for the network process

TYPE_CHECKING = False  # as typing.TYPE_CHECKING: importing typing takes as long as a knock
if TYPE_CHECKING:
    import argparse
    import threading
    from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
    from typing import Any, BinaryIO, NamedTuple, NoReturn

    ControlSockets = dict[tuple[str, int], tuple[socket.socket, ...]]  # by protocol and port
    Handshake = Generator[bytes, bytes, None]  # of a client
    Sets = dict[str, tuple[int, int]]  # by name the handles of table and set
    LeaseKey = tuple[str, int]  # the client's address, the resource
    Elements = dict[tuple[str, str], tuple[float, str]]  # by (set, key) the end and a comment
    Leases = dict[LeaseKey, "Lease"]
    Plan = dict[LeaseKey, "Lease | None"]  # leases that are to be, or, with None, to end
    NewHandshake = Callable[[], Handshake]
    Target = tuple[int, tuple[Any, ...]]  # family and socket address, as of getaddrinfo()
    Tokens = Iterable[tuple[int, bytes]]  # of challenges: for KNOCK or REVOKE, 32 bytes
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
    """Something the user can mend. Args: problem, what is wrong and where; hint, what to do."""

    def __init__(self, problem: str, hint: str = "") -> None:
        super().__init__(problem)
        self.problem = problem
        self.hint = hint


def tell(text: str) -> None:
    """Tell the user. If nobody reads it any more, that is no reason to stop."""
    with contextlib.suppress(OSError):
        print(f"letmein: {text}", file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """Tell the user of something that is not right, but no reason to stop."""
    tell(f"warning: {text}")


def tell_error(error: Exception) -> None:
    """Tell the user what went wrong and, on a second line, what to do."""
    hint = getattr(error, "hint", "")
    tell(f"error: {error}" + (f"\n  {hint}" if hint else ""))


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
LONGEST_WAIT_S = 3600.0  # of a selector; epoll takes no more than 2**31 ms
NEVER = float("inf")  # as a time
NO_TOKEN = bytes(32)
ANYBODY = 0xFFFFFFFF  # user and resource of a GOAWAY to a peer that named none

KNOCK, CHALLENGE, RESPONSE, COMEIN, GOAWAY, REVOKE = range(6)
OPERATIONS = ("KNOCK", "CHALLENGE", "RESPONSE", "COMEIN", "GOAWAY", "REVOKE")


class ProtocolError(Exception):
    """The peer said something that the protocol does not allow here."""


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
            raise ProtocolError("this is no letmein message")
        message = cls(*MESSAGE.unpack(data)[1:])
        if message.operation >= len(OPERATIONS):
            raise ProtocolError(f"unknown operation {message.operation}")
        return message

    def authenticate(self, key: bytes, token: bytes) -> bytes:
        """HMAC-SHA3-256 (RFC 2104, FIPS 202) over all from operation to salt, and a token: the auth
        of the CHALLENGE; zeros in KNOCK and REVOKE, which whoever saw one can send again."""
        import hmac  # here, for the network process needs none
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
    operation: int, user: int, resource: int, key: bytes, warn: Callable[[str], None]
) -> Handshake:
    """The client's side of one knock or revocation: yields the 56 bytes to send, wants those that
    come back, and ends when the server has done what was asked for. Foreign ids are only worth a
    warning: a wrong token leads nowhere anyway. Raises ProtocolError on all that is not due."""
    token = NO_TOKEN
    for said, due in ((operation, CHALLENGE), (RESPONSE, COMEIN)):
        answer = Message.decode((yield signed(said, user, resource, key, token)))
        if answer.operation == GOAWAY:
            raise ProtocolError("the server rejected the request")
        if answer.operation != due:
            names = OPERATIONS[answer.operation], OPERATIONS[due]
            raise ProtocolError("the server sent {}, not {}".format(*names))
        if answer[1:3] != (user, resource):
            warn(f"the server speaks of user {answer.user:08X}, resource {answer.resource:08X}")
        token = answer.auth


# What a peer has proved, in this order. An error policy is the least that has errors answered.
NO_AUTH, BASIC_AUTH, FULL_AUTH = range(3)
POLICIES = {"always": NO_AUTH, "basic-auth": BASIC_AUTH, "full-auth": FULL_AUTH}


class Verdict(NamedTuple):
    """On a message: the reply (b"": none), why it was refused, what is granted: KNOCK or REVOKE."""

    reply: bytes
    reason: str = ""
    granted: int | None = None


# An unknown user's knock is checked against this, to take as long as one with a wrong key.
NOBODYS_KEY = os.urandom(KEY_SIZE)


class ServerHandshake(NamedTuple):
    """The server's side: judges each message by itself and keeps nothing of its peer, so there is
    nothing to fill. policy is what a peer must have proved for its errors to be answered; key_of
    gives a user's key or None; objection says why a user may not have a resource, or ""."""

    policy: int
    key_of: Callable[[int], bytes | None]
    objection: Callable[[int, int], str]

    def on_request(self, message: Message, new_token: Callable[[int], bytes]) -> Verdict:
        """Judge a peer's first message. new_token gives 32 bytes to challenge a KNOCK or REVOKE."""
        operation, user, resource = message[:3]
        if operation not in (KNOCK, REVOKE):
            return self.refuse(NO_AUTH, ANYBODY, ANYBODY, f"unexpected {OPERATIONS[operation]}")
        key = self.key_of(user)
        if not message.proves(key or NOBODYS_KEY, NO_TOKEN) or key is None:
            return self.refuse(NO_AUTH, user, resource, "wrong key" if key else "unknown user")
        if objection := self.objection(user, resource):
            return self.refuse(BASIC_AUTH, user, resource, objection)
        return Verdict(unsigned(CHALLENGE, user, resource, new_token(operation)))

    def on_response(self, message: Message, proved: int, tokens: Tokens) -> Verdict:
        """Judge what should be the RESPONSE of a peer that has proved so much before. tokens
        are those that a request of this peer for the same user and resource may have got."""
        operation, user, resource = message[:3]
        if operation != RESPONSE:
            return self.refuse(proved, user, resource, f"unexpected {OPERATIONS[operation]}")
        # Key and rights are looked up again: the configuration may have changed.
        key = self.key_of(user) or NOBODYS_KEY
        asked = next((asked for asked, token in tokens if message.proves(key, token)), None)
        if key == NOBODYS_KEY or asked is None:
            return self.refuse(proved, user, resource, "wrong RESPONSE")
        if objection := self.objection(user, resource):
            return self.refuse(FULL_AUTH, user, resource, objection)
        return Verdict(b"", granted=asked)

    def refuse(self, proved: int, user: int, resource: int, reason: str) -> Verdict:
        """Refuse a peer that has proved so much."""
        reply = unsigned(GOAWAY, user, resource) if proved >= self.policy else b""
        return Verdict(reply, reason)


# ==== 2  Configuration =======================================================
# letmeind.conf (server) and letmein.conf (client): text in, a frozen Config out, or a ConfigError
# that names file, line, option and what was expected. The text of a key gets into no message.

CONFIG_SIZE_LIMIT = 4 << 20  # bytes
CONFIG_PLACES = ("/opt/letmein/etc", "/etc")  # the client looks into XDG_CONFIG_HOME first
HOOKS = ("input", "forward", "output")
YES, NO = ("true", "1", "yes", "on"), ("false", "0", "no", "off")
SECCOMP = ("off", "log", "kill")


class ConfigError(UserError):
    """The configuration cannot be used."""


class Unfit(UserError):
    """A value is not what it should be. Args: what is wrong, what was expected."""


class Resource(NamedTuple):
    """What can be knocked for: a port or some jumps. users is empty where everybody may."""

    identifier: int
    port: int
    protocols: tuple[str, ...]  # "tcp", "udp"
    jumps: tuple[tuple[str, str, bool], ...]  # (hook, target, for the client's address alone)
    timeout: float  # in seconds
    users: frozenset[int]

    @property
    def rules(self) -> int:
        """How much one lease counts against max-nr-rules."""
        return len(self.protocols) + len(self.jumps)

    @property
    def meaning(self) -> str:
        """8 hex digits that change with port, protocols and jumps; no secret."""
        return digest(self[1:4])

    @property
    def is_gate(self) -> bool:
        """Whether one holder's lease opens something for everybody."""
        return any(not match_saddr for _, _, match_saddr in self.jumps)


class Config(NamedTuple):
    """One configuration file, read and checked. Times are in seconds."""

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

    def objection(self, user: int, resource: int) -> str:
        """Why this user may not have this resource; "" if they may."""
        found = self.resources.get(resource)
        if found is None:
            return "unknown resource"
        if found.users and user not in found.users:
            return "resource not allowed for this user"
        if found.port == self.port:
            return "it is the control port"
        for hook, *_ in found.jumps:
            if hook not in self.chains:
                return f"chain-{hook} is not set in [NFTABLES]"
        return ""

    def allowed(self, lease: Lease, meaning: str) -> Lease | None:
        """The lease with at most the time that its resource gives now; None if its user may
        not have it any more, or if it was given when the resource had another meaning."""
        if lease.user not in self.keys or self.objection(lease.user, lease.resource):
            return None
        resource = self.resources[lease.resource]
        if resource.meaning != meaning:
            return None
        return lease._replace(ends=min(lease.ends, time.monotonic() + resource.timeout))


@functools.lru_cache(1000)
def digest(facts: tuple[object, ...]) -> str:
    """8 hex digits that change with these facts; no secret."""
    import binascii
    return f"{binascii.crc32(repr(facts).encode()):08x}"


def shown(text: str) -> str:
    """Text from a file or a peer, fit to be printed: short, escaped, nothing like a key."""
    if len(re.findall("[0-9A-Fa-f]", text)) >= 16:
        return "'...'"
    return ascii(text if len(text) <= 80 else text[:80] + "...")


def matched(text: str, pattern: str, expected: str) -> str:
    """The text without white space around it. Raises Unfit unless it has this pattern."""
    if not re.fullmatch(pattern, text.strip()):
        raise Unfit(f"{shown(text.strip())} will not do", expected)
    return text.strip()


def parse_number(text: str, least: int = 0, limit: int = 0xFFFFFFFF) -> int:
    """ASCII digits, or hex digits behind 0x, from least to limit."""
    expected = f"a number from {least} to {limit}"
    digits = matched(text, r"\+?0*[0-9]{1,10}|0x\+?0*[0-9A-Fa-f]{1,8}", expected)
    number = int(digits.lstrip("0x+") or "0", 16 if digits.startswith("0x") else 10)
    if not least <= number <= limit:
        raise Unfit(f"{number} is out of range", expected)
    return number


parse_port = functools.partial(parse_number, least=1, limit=65535)
parse_family = functools.partial(matched, pattern="inet|ip|ip6", expected="inet, ip or ip6")
NAME = "1 to 64 of A-Z a-z 0-9 _ - ."  # of an nftables table or chain
parse_name = functools.partial(matched, pattern=r"[A-Za-z0-9_.-]{1,64}", expected=NAME)


def parse_duration(text: str) -> float:
    """Seconds: a number, or a decimal such as 0.5 or 1e3."""
    expected = "seconds, from 0 to 4294967295"
    decimal = r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?"
    text = matched(text, rf"0x\+?[0-9A-Fa-f]+|{decimal}", expected)
    number = float(parse_number(text) if text.startswith("0x") else text)
    if not 0 <= number <= 0xFFFFFFFF:
        raise Unfit(f"{shown(text)} is out of range", expected)
    return abs(number)


def parse_identifier(text: str) -> int:
    """A user's or a resource's id."""
    expected = "1 to 8 hex digits, such as 0000002A"
    return int(matched(text, r"(?=.{1,8}$)\+?[0-9A-Fa-f]+", expected), 16)


def parse_key(text: str) -> bytes:
    """A shared secret. What is wrong with one is not shown."""
    if not re.fullmatch("(?!0+$|[Ff]+$)[0-9A-Fa-f]{64}", text.strip()):
        expected = "64 hex digits, not all 0 or all F, such as 'letmein.py gen-key' prints"
        raise Unfit(f"not a key (it has {len(text.strip())} characters)", expected)
    return bytes.fromhex(text.strip())


def parse_word(text: str, words: Iterable[str]) -> str:
    """One of some words, in any case."""
    return matched(text.lower(), "|".join(words), f"one of: {', '.join(words)}")


def parse_protocols(flags: Sequence[str], expected: str) -> tuple[str, ...]:
    """Items such as `udp` or `tcp, udp`; without any it is tcp."""
    text = matched(", ".join(flags or ["tcp"]).lower(), r"(tcp|udp)(\s*,\s*(tcp|udp))*", expected)
    return tuple(sorted(set(re.findall("tcp|udp", text))))


def parse_control_port(text: str) -> tuple[int, tuple[str, ...]]:
    """`5800`, `5800/udp`, `5800 / tcp, udp`: the port, and "tcp", "udp" or both."""
    items = [item.strip() for item in text.split("/")]
    numbers = [item for item in items if re.fullmatch("0x[0-9A-Fa-f]+|[0-9]+", item)]
    flags = [item for item in items if item not in numbers]
    protocols = parse_protocols(flags, "such as '5800', '5800/udp' or '5800 / tcp, udp'")
    return [5800, *map(parse_port, numbers)][-1], protocols


RESOURCE = "'port: N / tcp, udp / timeout: SECONDS / users: ID, ID' or 'jump / input: CHAIN'"
PORT_ITEMS = {"port", "timeout", "users"}  # none of which may be repeated
parse_match = functools.partial(matched, pattern="saddr", expected="saddr")
ITEMS: Mapping[str, Callable[[str], Any]] = {  # of a resource: `KEY: VALUE`
    "port": parse_port,
    "timeout": parse_duration,
    "users": lambda text: frozenset(map(parse_identifier, text.split(","))),
    **{hook: parse_name for hook in HOOKS},
    **{f"{hook}-match": parse_match for hook in HOOKS},
}


def parse_resource(identifier: int, text: str, timeout: float) -> Resource:
    """`port: 22 / tcp / timeout: 60 / users: 1, 2` or `jump / input: CHAIN / ...`"""
    values: dict[str, Any] = {}
    flags = []
    for item in text.split("/"):
        key, colon, value = (part.strip() for part in item.partition(":"))
        if not colon:
            flags.append(key)
        elif key not in ITEMS or (key in values and key in PORT_ITEMS):
            raise Unfit(f"{shown(key)} is not known here, or stands there twice", RESOURCE)
        else:
            values[key] = ITEMS[key](value)

    port = values.get("port", 0)
    protocols = parse_protocols(flags, RESOURCE) if port else ()
    hooks = [hook for hook in HOOKS if hook in values]
    jumps = tuple((hook, values[hook], f"{hook}-match" in values) for hook in hooks)
    is_port = port and values.keys() <= PORT_ITEMS
    is_jump = not port and hooks and set(flags) == {"jump"}
    if not (is_port or is_jump):
        raise Unfit("neither a port nor a jump resource, or both", RESOURCE)
    timeout, users = values.get("timeout", timeout), values.get("users", frozenset())
    return Resource(identifier, port, protocols, jumps, timeout, users)


# By section and option: the field of Config, and its parser. Resources depend on what is above.
OPTIONS: Mapping[str, Mapping[str, tuple[str, Callable[[str], Any]]]] = {
    "GENERAL": {
        "debug": ("debug", lambda text: parse_word(text, YES + NO) in YES),
        "port": ("control", parse_control_port),
        "control-timeout": ("control_timeout", parse_duration),
        "control-error-policy": ("error_policy", lambda text: POLICIES[parse_word(text, POLICIES)]),
        "seccomp": ("seccomp", lambda text: parse_word(text, SECCOMP)),
    },
    "CLIENT": {"default-user": ("default_user", parse_identifier)},
    "NFTABLES": {
        "exe": ("nft", str.strip),
        "family": ("family", parse_family),
        "table": ("table", parse_name),
        **{f"chain-{hook}": (hook, parse_name) for hook in HOOKS},
        "timeout": ("timeout", parse_duration),
        "max-nr-rules": ("max_nr_rules", lambda text: min(parse_number(text), 1_000_000)),
    },
    "KEYS": {},
    "RESOURCES": {},
}


# What is not UTF-8 decodes to DC80 to DCFF. 1C to 1F are white space for Python alone.
NO_TEXT = re.compile("[\0\x1c-\x1f\udc80-\udcff]")
# A line that begins a section, or an option.
ENTRY = re.compile(r"\[(?P<section>.+)\]\s*|(?P<name>[^=\[][^=]*)=(?P<value>.*)")


def parse_sections(text: str, path: str) -> dict[str, dict[str, tuple[str, str]]]:
    """The file as it is written: by section and name where it stands, for messages, and the
    value. The name "" is the section's own line. Raises ConfigError."""
    sections: dict[str, dict[str, tuple[str, str]]] = {}
    section = name = ""
    for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), 1):
        if NO_TEXT.search(line):
            hint = "expected: UTF-8, without control characters"
            raise ConfigError(f"{path}:{number}: this is no text", hint)
        if name and line[:1] in (" ", "\t") and line.strip():
            place, value = sections[section][name]
            sections[section][name] = (place, f"{value} {line.lstrip()}")
            continue
        name = ""
        line = line.lstrip()
        if not line or line.startswith("#"):
            continue
        found = ENTRY.fullmatch(line)
        if not found or not (section or found["section"]):
            hint = "expected: a line such as [GENERAL], or NAME = VALUE below one"
            raise ConfigError(f"{path}:{number}: neither a section nor an option in one", hint)
        section, name = found["section"] or section, (found["name"] or "").rstrip()
        place = f"{path}:{number}: [{shown(section)[1:-1]}] "
        place += f"{shown(name)[1:-1]}: " if name else ""
        if name in sections.setdefault(section, {}):
            raise ConfigError(f"{place}stands above already", "expected: each name once")
        sections[section][name] = (place, found["value"] or "")
    return sections


def unknown(name: str, names: Iterable[str]) -> str:
    """What to say of an unknown name, with the known one that is most like it."""
    import difflib
    found = difflib.get_close_matches(name, names, 1)
    return "is unknown and ignored" + "".join(f"; did you mean {known}?" for known in found)


def parse_config(text: str, path: str, server: bool) -> Config:
    """Read one configuration file's text; path is for messages alone. Raises ConfigError."""
    sections = parse_sections(text, path)
    begins = {section: options.pop("")[0] for section, options in sections.items()}
    others = [section for section in sections if section not in OPTIONS]
    warnings = [begins[section] + unknown(section.upper(), OPTIONS) for section in others]
    values: dict[str, Any] = {"control": (5800, ("tcp",)), **Config._field_defaults}
    keys: dict[int, bytes] = {}
    resources: dict[int, Resource] = {}
    ports: set[int] = set()
    for section, known in OPTIONS.items():
        for name, (place, value) in sections.setdefault(section, {}).items():
            try:
                if section == "KEYS":
                    user = parse_identifier(name)
                    if user in keys:
                        raise Unfit(f"{user:08X} has a key already", "each id once")
                    keys[user] = parse_key(value)
                elif section == "RESOURCES":
                    resource = parse_resource(parse_identifier(name), value, values["timeout"])
                    if resource.identifier in resources or resource.port in ports:
                        raise Unfit("its id or port has a resource already", "each of them once")
                    resources[resource.identifier] = resource
                    ports |= {resource.port} - {0}
                elif name not in known:
                    warnings.append(place + unknown(name.lower(), known))
                elif section != ("CLIENT" if server else "NFTABLES"):
                    field, parse = known[name]
                    values[field] = parse(value)
            except Unfit as unfit:
                raise ConfigError(place + unfit.problem, f"expected: {unfit.hint}") from None
    for option in ("family", "table", "chain-input"):
        if server and option not in sections["NFTABLES"]:
            place = begins.get("NFTABLES", f"{path}:1: [NFTABLES] ")
            hint = "expected: family, table and chain-input, as in nftables.conf"
            raise ConfigError(f"{place}{option}: is not set", hint)

    port, protocols = values.pop("control")
    chains = {hook: values.pop(hook) for hook in HOOKS if hook in values}
    config = Config(path, (), port, protocols, keys, resources, chains, **values)
    if server and config.error_policy == NO_AUTH and "udp" in protocols:
        text = "control-error-policy: 'always' over UDP answers forged senders"
        warnings.append(f"{path}: [GENERAL] {text}; 'basic-auth' is recommended")
    for (place, _), resource in zip(sections["RESOURCES"].values(), resources.values()):
        somebody = min(resource.users, default=0)  # who may have it, if anybody can
        objection = config.objection(somebody, resource.identifier)
        if server and (objection or not resource.timeout):
            warnings.append(f"{place}cannot be had: {objection or 'its timeout is 0'}")
    return config._replace(warnings=tuple(warnings))


def read_config(path: str, server: bool) -> Config:
    """Read a configuration file. The client's may be missing. Raises ConfigError."""
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            data = file.read(CONFIG_SIZE_LIMIT + 1)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not server:
            return parse_config("", path, server)
        hint = "write one, letmeind.conf.example is a start, or name one with --config"
        raise ConfigError(f"{path}: cannot be read: {error.strerror}", hint) from None
    if len(data) > CONFIG_SIZE_LIMIT:
        raise ConfigError(f"{path}: too large", f"expected: at most {CONFIG_SIZE_LIMIT} bytes")
    config = parse_config(data.decode("utf-8", "surrogateescape"), path, server)
    warnings = list(config.warnings)
    if os.name == "posix" and server and status.st_uid != 0:
        warnings.append(f"{path}: owned by user {status.st_uid}, not root; chown root {path}")
    if os.name == "posix" and status.st_mode & (0o026 if server else 0o066):
        mode = f"{status.st_mode & 0o777:o}"
        warnings.append(f"{path}: others have rights on it (mode {mode}); chmod 600 {path}")
    return config._replace(warnings=tuple(warnings))


# ==== 3  Client ==============================================================
# Shake hands with the host's IPv6 and IPv4 address at the same time: one that does not answer costs
# the other no time. `connect` and COMMAND hold open what was opened for as long as they use it.

UDP_REPEAT_S = 0.4  # over UDP messages get lost: see exchange_udp()
OTHER_ADDRESS_S = 0.25  # where one address is open, the other is not waited for any longer
CONNECT_S = 2.0  # a connect that takes longer may have met a port that was closed meanwhile
CHUNK = 1 << 16  # bytes


def find_resources(config: Config, arguments: argparse.Namespace, user: int) -> list[Resource]:
    """What is to be opened or closed, as far as the client knows it. Raises UserError."""
    if arguments.resources:
        unknown = Resource(0, 0, (), (), config.timeout, frozenset())
        known = config.resources
        return [known.get(i, unknown._replace(identifier=i)) for i in arguments.resources]
    ports = {r.port: r for r in config.resources.values() if not r.users or user in r.users}
    for port in set(arguments.ports) - set(ports):
        names = ", ".join(str(port) for port in sorted(ports) if port)
        hint = f"it has: {names or 'none'}; or name a --resource"
        problem = f"[RESOURCES] has no port {port} for user {user:08X}"
        raise UserError(f"{config.path}: {problem}", hint)
    return [ports[port] for port in arguments.ports]


def resolve(host: str, port: int, families: Sequence[int]) -> dict[str, Target]:
    """The first address of host in each family (socket.AF_INET, AF_INET6). families are
    those that must be there; empty for what host has. Raises UserError."""
    try:
        # As bytes an ASCII name needs no IDNA codec, which some systems do not have.
        name = host.encode("ascii") if host.isascii() else host
        family = families[0] if len(families) == 1 else socket.AF_UNSPEC
        found = socket.getaddrinfo(name, port, family, socket.SOCK_STREAM)
    except (OSError, UnicodeError, LookupError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no host name"
        hint = "check the name, and that this machine can resolve names"
        raise UserError(f"cannot find the address of {host!a}: {reason}", hint) from None
    addresses: dict[int, Any] = {entry[0]: entry[4] for entry in reversed(found)}
    if not addresses.keys() >= set(families):
        raise UserError(f"{host!a} has no IPv6 address, or no IPv4 address", "leave out -4 or -6")
    wanted = [f for f in families or (socket.AF_INET6, socket.AF_INET) if f in addresses]
    numeric = socket.NI_NUMERICHOST | socket.NI_NUMERICSERV
    return {socket.getnameinfo(addresses[f], numeric)[0]: (f, addresses[f]) for f in wanted}


def exchange_tcp(new_handshake: NewHandshake, target: Target, timeout: float) -> NoReturn:
    """One handshake, timeout seconds for each message. Ends with StopIteration, or an error."""
    with socket.socket(target[0], socket.SOCK_STREAM) as peer:
        peer.settimeout(timeout)
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        peer.connect(target[1])
        handshake = new_handshake()
        message = next(handshake)
        while True:
            peer.sendall(message)
            end = time.monotonic() + timeout
            received = b""
            while len(received) < MESSAGE_SIZE:
                peer.settimeout(max(end - time.monotonic(), 0.001))
                data = peer.recv(MESSAGE_SIZE - len(received))
                if not data:
                    raise ProtocolError("the server closed the connection without an answer")
                received += data
            message = handshake.send(received)


def exchange_udp(new_handshake: NewHandshake, target: Target, timeout: float) -> NoReturn:
    """The same over UDP, where messages get lost: every UDP_REPEAT_S a new handshake begins, from
    a port of its own, and each RESPONSE is sent again, while the older ones may still be
    answered. No KNOCK is sent twice from one port: the reference's server rejects that."""
    handshakes: dict[socket.socket, Handshake] = {}
    responses: dict[socket.socket, bytes] = {}
    heard: dict[socket.socket, bytes] = {}
    start = again = time.monotonic()
    end = start + timeout
    with contextlib.ExitStack() as sockets:
        while (now := time.monotonic()) < end:
            if now >= again:
                again = now + UDP_REPEAT_S
                for peer, response in responses.items():
                    peer.send(response)
                if now < start + timeout:
                    peer = sockets.enter_context(socket.socket(target[0], socket.SOCK_DGRAM))
                    peer.setblocking(False)
                    peer.connect(target[1])
                    handshakes[peer] = new_handshake()
                    peer.send(next(handshakes[peer]))
            for peer in select.select(handshakes, [], [], min(again, end) - now)[0]:
                with contextlib.suppress(BlockingIOError):  # a broken datagram: select(2), BUGS
                    data = peer.recv(MESSAGE_SIZE + 1)
                    facts = data[:16] + data[24:]  # all but the salt
                    if len(data) != MESSAGE_SIZE or facts == heard.get(peer):
                        continue  # no message, or a CHALLENGE that the network brought twice
                    try:
                        responses[peer] = handshakes[peer].send(data)
                    except ProtocolError:
                        # The reference's server rejects a RESPONSE that it has granted before.
                        del handshakes[peer]
                        responses.pop(peer, None)
                        if not handshakes:
                            raise
                    else:
                        heard[peer] = facts
                        peer.send(responses[peer])
                        end = time.monotonic() + timeout
    raise socket.timeout


class Client:
    """One run of the client. Args: arguments, of the command line. Raises UserError."""

    def __init__(self, config: Config, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.user = config.default_user if arguments.user is None else arguments.user
        if self.user not in config.keys:
            hint = "copy its line from the server's [KEYS], or name another user with --user"
            raise UserError(f"{config.path}: [KEYS] has no key for user {self.user:08X}", hint)
        self.key = config.keys[self.user]
        self.resources = find_resources(config, arguments, self.user)
        self.protocol = arguments.protocol or config.protocols[0]
        self.timeout = max(min(config.control_timeout, LONGEST_WAIT_S), 0.001)
        port = arguments.server_port or config.port
        self.targets = resolve(arguments.host, port, arguments.families)
        self.is_quiet = arguments.quiet or arguments.command == "connect"
        # Where each resource was opened, even if the answer came late: the first first.
        self.opened: dict[Resource, list[str]] = {r: [] for r in self.resources}
        self.asking: list[threading.Thread] = []  # those of the last question
        self.say: Callable[[str], None] = tell if arguments.verbose else lambda line: None
        self.say(f"configuration: {config.path}")
        self.say(f"server: {' and '.join(self.targets)}, port {port}/{self.protocol}")

    def attempt(self, new_handshake: NewHandshake, where: str) -> UserError | None:
        """Knock or revoke at one address; returns what went wrong, None for success."""
        exchange = exchange_tcp if self.protocol == "tcp" else exchange_udp
        try:
            exchange(new_handshake, self.targets[where], self.timeout)
        except StopIteration:
            return None
        except ProtocolError as error:
            hint = "are key, user and resource the same there? the log of that server says more"
            return UserError(f"{where}: {error}", hint)
        except OSError as error:
            reason = error.strerror or f"no answer over {self.protocol} within {self.timeout:g} s"
            hint = "does a server run there, is its control port right (-P, -T, -U), and the key?"
            return UserError(f"{where}: {reason}", hint)

    def ask(self, operation: int, resource: Resource) -> bool:
        """Knock or revoke at all addresses at the same time, and tell the user; returns whether it
        worked. Without -4 -6 one is enough: another is waited for a little, or if it is open."""
        import threading
        ids = operation, self.user, resource.identifier, self.key
        new_handshake = functools.partial(client_handshake, *ids, warn)
        results: dict[str, UserError | None] = {}
        opened = self.opened[resource]
        news = threading.Semaphore(0)

        def run(where: str) -> None:
            if threading.current_thread() not in self.asking:
                return  # it was interrupted while it started: hold() is at its end
            results[where] = self.attempt(new_handshake, where)
            if operation == KNOCK and not results[where] and where not in opened:
                opened.append(where)
            news.release()

        self.asking = [threading.Thread(target=run, args=[w], daemon=True) for w in self.targets]
        for thread in self.asking:
            thread.start()
        wait = None
        while len(results) < len(self.targets) and news.acquire(timeout=wait):
            is_enough = None in results.values() and results.keys() >= set(opened)
            wait = OTHER_ADDRESS_S if is_enough and not self.arguments.families else None
        answers = results.copy()  # for another may still come
        for where in self.targets:
            error = answers.get(where, UserError(f"no answer within {OTHER_ADDRESS_S:g} s more"))
            self.say(f"{where}: {error.problem if error else 'COMEIN'}")
        good = [where for where, error in answers.items() if not error]
        errors = [error for error in map(answers.get, self.targets) if error]
        if errors and (self.arguments.families or not good):
            tell_error(errors[0])
            return False
        done = "opened" if operation == KNOCK else "closed"
        what = f"port {resource.port}" if resource.port else f"resource {resource.identifier:08X}"
        line = f"{done} {what} on {self.arguments.host} ({', '.join(good)})"
        if self.arguments.to_run and not self.is_quiet:
            tell(line)  # standard output is COMMAND's
        elif not self.is_quiet:
            try:
                print(line, flush=True)
            except OSError:  # the user will not know; the other resources are to be seen to
                return False
        return True

    def ask_all(self, operation: int) -> list[Resource]:
        """Knock or revoke for each resource; returns those where it worked."""
        return [resource for resource in self.resources if self.ask(operation, resource)]

    def hold(self) -> int:
        """Open all, run COMMAND or carry a connection, renew; and close all, whatever happens."""
        import signal
        import threading
        turn = threading.Lock()

        def stop(number: int, _: object) -> None:
            catch_signals(signal.SIG_IGN)
            raise SystemExit(128 + number)

        def renew() -> None:
            while True:
                shortest = min(LONGEST_WAIT_S, *(resource.timeout for resource in self.resources))
                time.sleep(max(shortest / 2, 1))
                with turn:
                    self.ask_all(KNOCK)

        catch_signals(stop)
        try:
            try:
                is_good = self.ask_all(KNOCK) == self.resources
                # What was not opened is not closed; with -4 -6 one address may be open alone.
                self.resources = [resource for resource in self.resources if self.opened[resource]]
                self.is_quiet = True
                if not is_good:
                    return 1
                threading.Thread(target=renew, daemon=True).start()
                return self.run_command() if self.arguments.to_run else self.carry()
            finally:
                catch_signals(signal.SIG_IGN)
        finally:  # of its own: a signal may have come before it was ignored
            turn.acquire()  # for good: nothing is renewed from here on
            asking, self.asking = self.asking, []
            for thread in asking:
                if thread.is_alive():
                    thread.join(OTHER_ADDRESS_S)  # or it may open what was closed just before
            if not self.arguments.keep:
                self.ask_all(REVOKE)

    def run_command(self) -> int:
        """Run COMMAND to its end; returns its exit status, as a shell would. Raises OSError."""
        import signal
        import subprocess
        early: list[int] = []
        catch_signals(lambda number, _: early.append(number))
        process = subprocess.Popen(self.arguments.to_run)

        def pass_on(number: int, _: object) -> None:
            # A terminal sends its Ctrl-C to COMMAND itself.
            if number != signal.SIGINT or not os.isatty(0):
                process.send_signal(number)

        catch_signals(pass_on)
        for number in early:
            pass_on(number, None)
        status = process.wait()
        return status if status >= 0 else 128 - status

    def connect(self) -> socket.socket:
        """Connect; knock once more if somebody behind our address closed it. Raises UserError."""
        port = self.arguments.ports[0]
        for patience in (CONNECT_S, self.timeout):
            for where in self.opened[self.resources[0]]:
                address: Any = (where.encode(), port)  # as bytes: see resolve()
                try:
                    peer = socket.create_connection(address, patience)
                except OSError as error:
                    reason = error.strerror or "it does not answer"
                else:
                    peer.settimeout(None)
                    return peer
            if patience == CONNECT_S:
                self.ask_all(KNOCK)
        problem = f"port {port} was opened, but cannot be reached: {reason}"
        raise UserError(problem, "does the service run there?")

    def carry(self) -> int:
        """Carry standard input and output until both have come to their ends, or one has broken."""
        import threading
        peer = self.connect()

        def upload() -> None:
            with contextlib.suppress(OSError):  # the other direction will see it, too
                while data := os.read(0, CHUNK):
                    peer.sendall(data)
                peer.shutdown(socket.SHUT_WR)

        uploader = threading.Thread(target=upload, daemon=True)
        uploader.start()
        with contextlib.suppress(OSError):
            while data := peer.recv(CHUNK):
                while data:
                    data = data[os.write(1, data) :]
            drop_output()
            uploader.join()
        return 0


def drop_output() -> None:
    """Close standard output, in a way that leaves Python nothing to complain of."""
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)


def catch_signals(handler: Any) -> None:
    """Have what would end this program go to handler, as of signal.signal()."""
    import signal
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


# ==== 4  Firewall ============================================================
# A lease is an element with a timeout in an nftables set: the kernel ends it, whatever dies here.
#
#     set letmein-4, letmein-6    address . protocol . port, for all ports
#     set letmein-ID-4, -6        addresses that hold the jump resource ID
#     set letmein-ID-gate         ip and ip6, while anybody holds ID: for jumps of all traffic
#
# Sources: nft(8); the traps were measured with nft 1.0.6 on Linux 6.18.

TRUSTED_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
NFT_LIMIT_S = 4.0  # an nft that takes longer is killed: less than a client's patience of 5 s
RETRY_S = (0.1, 1.0, 30.0)  # pauses: the first; the longest if healing does not last, or fails
SHORTEST_LEASE_S = 0.001  # nft takes 0 for "for ever": what is shorter is not installed
LONGEST_LEASE_S = 99_999_999.0  # nft: "value too large" above it
VERSIONS = {"inet": (4, 6), "ip": (4,), "ip6": (6,)}  # IP versions, by table family
IP = {4: "ip", 6: "ip6"}
NFPROTO = {"inet": 1, "ip": 2, "ip6": 10}  # linux/netfilter.h
NETLINK_NETFILTER, NFNLGRP_NFTABLES = 12, 7  # linux/netlink.h, linux/netfilter/nfnetlink.h
SO_RCVBUFFORCE = 33  # asm-generic/socket.h
NOTIFICATION_BUFFER = 8 << 20  # bytes; enough for 10,000 elements in one transaction
OUR_SET = re.compile(r"letmein-(?:[0-9A-F]{8}-)?(?:4|6|gate)")
COMMENT = re.compile(r"user=([0-9A-F]{8}) resource=([0-9A-F]{8}) boot=(\S{8}) means=(\S{8})")


class Lease(NamedTuple):
    """That an address (as nft writes it) may use a resource, until ends (time.monotonic())."""

    address: str
    resource: int
    user: int
    ends: float


class Listing(NamedTuple):
    """Our sets in the kernel, by (set, key) their elements as JSON has them, how many rules."""

    sets: Sets
    elements: dict[tuple[str, str], dict[str, Any]]
    rules: int


def ruleset(config: Config) -> tuple[dict[str, str], list[str]]:
    """Our sets, by name the types of their elements, and our rules, each behind its chain."""
    chains, versions = config.chains, VERSIONS[config.family]
    sets: dict[str, str] = {}
    rules = [f"{chains['input']} {proto} dport {config.port} accept" for proto in config.protocols]
    for v in versions:
        sets[f"letmein-{v}"] = f"ipv{v}_addr . inet_proto . inet_service"
        key = f"{IP[v]} saddr . meta l4proto . th dport"
        rules.append(f"{chains['input']} {key} @letmein-{v} accept")
    for resource in config.resources.values():
        name = f"letmein-{resource.identifier:08X}"
        if resource.jumps:
            sets.update({f"{name}-{v}": f"ipv{v}_addr" for v in versions})
        if resource.is_gate:
            sets[f"{name}-gate"] = "ether_type"
        for hook, target, match_saddr in resource.jumps:
            # Families ip and ip6 take no `meta nfproto`; the ether type does in all three.
            keys = [f"{IP[v]} saddr @{name}-{v}" for v in versions]
            keys = keys if match_saddr else [f"meta protocol @{name}-gate"]
            if hook in chains:
                rules += [f"{chains[hook]} {key} jump {target}" for key in keys]
    # The comment tells our rules from others, and from those of another configuration.
    return sets, [f'{rule} comment "letmein {digest(tuple(rules))}"' for rule in rules]


def lease_elements(config: Config, leases: Iterable[Lease], boot: str = "") -> Elements:
    """The elements that make up these leases. Their comments tell people, and a successor of this
    server, when they count (boot) and what they mean. A gate is open until its last lease ends."""
    elements: Elements = {}
    for lease in leases:
        resource = config.resources[lease.resource]
        name, v = f"letmein-{lease.resource:08X}", 6 if ":" in lease.address else 4
        ids = f"user={lease.user:08X} resource={lease.resource:08X}"
        facts = lease.ends, f"{ids} boot={boot} means={resource.meaning}"
        for protocol in resource.protocols:
            elements[f"letmein-{v}", f"{lease.address} . {protocol} . {resource.port}"] = facts
        if resource.jumps:
            elements[f"{name}-{v}", lease.address] = facts
        for version in VERSIONS[config.family] if resource.is_gate else ():
            gate = f"{name}-gate", IP[version]
            elements[gate] = max(elements.get(gate, (0.0, "")), (lease.ends, "gate"))
    return elements


def elements_script(
    config: Config, before: Elements, after: Elements, now: float, refreshes: bool = True
) -> str:
    """The nft script that makes of the elements before those after. Traps: `delete` of one that has
    just expired takes the whole transaction along, so it is added first. One that exists never
    gets another comment, and its full time only where the kernel refreshes: so it goes first."""
    where = f"element {config.family} {config.table}"
    lines = []
    for name, key in {**before, **after}:
        old, new = before.get((name, key)), after.get((name, key))
        if old and old != new and not (refreshes and new and new[1] == old[1]):
            lines.append(f"add {where} {name} {{ {key} timeout 1s }}")
            lines.append(f"delete {where} {name} {{ {key} }}")
        if new and new != old:
            ends, comment = new
            # Rounded down, but never to 0. nft takes numbers of up to 8 digits.
            time_left = int(min(max(ends - now, SHORTEST_LEASE_S), LONGEST_LEASE_S) * 1000)
            left = f"{time_left // 1000}s{time_left % 1000}ms"
            text = f'{key} timeout {left} expires {left} comment "{comment}"'
            lines.append(f"add {where} {name} {{ {text} }}")
    return "".join(line + "\n" for line in lines)


def ruleset_script(config: Config) -> str:
    """The nft script that makes sets and rules as they should be, whatever is there."""
    table, (sets, rules) = f"{config.family} {config.table}", ruleset(config)
    lines = [f"flush chain {table} {chain}" for chain in config.chains.values()]
    for name, kind in sets.items():
        lines.append(f"add set {table} {name} {{ type {kind}; flags timeout; counter; }}")
        lines.append(f"flush set {table} {name}")
    lines += [f"add rule {table} {rule}" for rule in rules]
    return "".join(line + "\n" for line in lines)


def await_end(process: int, limit: float) -> int:
    """Wait for a child process, and kill it after limit seconds. Returns its exit status, or minus
    a signal. (The subprocess module would sleep for longer than nft takes. Linux 5.3.)"""
    import signal
    descriptor = os.pidfd_open(process)
    if not select.select([descriptor], [], [], limit)[0]:
        os.kill(process, signal.SIGKILL)
    os.close(descriptor)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


class Nft:
    """The one place that runs nft. Args: name, a path, or to be found in TRUSTED_PATH."""

    def __init__(self, name: str) -> None:
        places = [os.path.join(place, name) for place in TRUSTED_PATH.split(":")]
        self.path = next((path for path in places if os.access(path, os.X_OK)), places[0])
        self.process_ids: deque[int] = deque(maxlen=16)  # of the latest runs

    def run(self, script: str, *arguments: str) -> bytes:
        """Run a script, or with "" the arguments alone; returns what nft printed. Raises UserError
        with nft's words. After NFT_LIMIT_S nft is killed: it may have done its work."""
        command = [self.path, *arguments, *(["-f", "-"] if script else [])]
        environment = {"PATH": TRUSTED_PATH, "LC_ALL": "C"}
        # Files in memory hold what nft reads and says: nobody has to serve it while it runs.
        files = [os.fdopen(os.memfd_create("nft"), "w+b") for _ in range(3)]
        streams = [(os.POSIX_SPAWN_DUP2, file.fileno(), n) for n, file in enumerate(files)]
        with files[0] as text, files[1] as printed, files[2] as said:
            text.write(script.encode("ascii"))
            text.seek(0)
            try:
                process = os.posix_spawn(self.path, command, environment, file_actions=streams)
            except OSError as error:
                hint = "install nftables, or set exe in [NFTABLES] to an absolute path"
                raise UserError(f"cannot run {shown(self.path)}: {error.strerror}", hint) from None
            self.process_ids.append(process)
            status = await_end(process, NFT_LIMIT_S)
            printed.seek(0)
            said.seek(0)
            # What is wrong, and the statement, up to where there may be times in it.
            lines = said.read(4096).decode("utf-8", "replace").strip().split("\n")[:2]
            problem = ": ".join(line.partition(" {")[0] for line in lines)
            if status == -9:
                problem = f"nft did not end within {NFT_LIMIT_S:g} s"
            if status:
                hint = f"are you root, and your ruleset loaded? {self.path} list ruleset"
                raise UserError(problem or f"nft ended with status {status}", hint)
            return printed.read()


def list_table(nft: Nft, config: Config) -> Listing:
    """Our part of our table, as the kernel has it. The table's handle belongs to a set's facts,
    too: a new table counts its handles from the start. Raises UserError."""
    import json
    listing = Listing({}, {}, 0)
    tag = ruleset(config)[1][0]
    rules = table = 0
    printed = nft.run("", "-j", "list", "table", config.family, config.table)
    try:
        for item in json.loads(printed)["nftables"]:
            kind, found = next(iter(item.items()))
            name = found.get("name", "")
            if kind == "table":
                table = found["handle"]
            elif kind == "rule":
                rules += f'comment "{found.get("comment")}"' in tag
            elif kind == "set" and OUR_SET.fullmatch(name):
                listing.sets[name] = table, found["handle"]
                for element in found.get("elem", []):
                    # One with nothing but a key comes as that key alone.
                    rich = isinstance(element, dict) and "elem" in element
                    facts = element["elem"] if rich else {"val": element}
                    value = facts["val"]
                    parts = value.get("concat", [value]) if isinstance(value, dict) else [value]
                    key = " . ".join(map(str, parts))  # with numbers if there is no /etc/protocols
                    key = key.replace(" . 6 . ", " . tcp . ").replace(" . 17 . ", " . udp . ")
                    listing.elements[name, key] = facts
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration):
        raise UserError("nft printed no listing", "is it 1.0 or newer, with JSON?") from None
    return listing._replace(rules=rules)


def check_kernel(nft: Nft, config: Config) -> Listing:
    """Returns what is there now. Raises UserError with what nft does not take of our ruleset."""
    listing = list_table(nft, config)
    try:
        nft.run(ruleset_script(config), "-c")
    except UserError as error:
        hint = "has your ruleset all chains of this file, and no set letmein-... of its own?"
        raise UserError(f"nft does not take our ruleset: {error.problem}", hint) from None
    return listing


class Change(NamedTuple):
    """What a client asked for. done is called once, with "" or why the change is not in force."""

    operation: int
    address: str
    resource: int
    user: int
    done: Callable[[str], None]


class Firewall:
    """The leases, and the kernel's sets that hold them. All changes that have come in while nft
    ran go into its next run, as one transaction. After a failure or a foreign change heal() looks
    what is there. Args: boot, 8 hex digits of the boot id; log, takes event and fields."""

    def __init__(self, nft: Nft, config: Config, boot: str, log: Callable[..., None]) -> None:
        self.nft = nft
        self.config = config
        self.boot = boot
        self.log = log
        self.leases: Leases = {}
        self.next_end = NEVER  # no lease ends before this
        self.rules = 0  # of the leases, as max-nr-rules counts
        self.queue: list[Change] = []
        self.installed = False  # whether there is something to remove in the end
        self.sets: Sets = {}  # as installed
        self.look_at = NEVER  # when to heal()
        self.pause = RETRY_S[0]
        self.trouble = ""  # what keeps us from healing, once it was logged
        # Whether `timeout T expires T` restarts the time of an element that exists.
        release = re.findall(r"\d+", os.uname().release)
        self.refreshes = [int(number) for number in release[:2]] >= [6, 12]

    def open(self, selector: selectors.BaseSelector) -> None:
        """Install sets and rules, take over the leases of a predecessor, and have selector listen
        to the kernel's nftables notifications. Raises UserError."""
        listing = check_kernel(self.nft, self.config)
        netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)
        set_receive_buffer(netlink, NOTIFICATION_BUFFER)
        netlink.setblocking(False)
        netlink.bind((0, 1 << (NFNLGRP_NFTABLES - 1)))
        notified = functools.partial(self._on_notification, netlink)
        selector.register(netlink, selectors.EVENT_READ, notified)
        self._adopt(listing)
        self._install()
        if self.leases:
            self.log("adopted", leases=len(self.leases))

    def _adopt(self, listing: Listing) -> None:
        """Take over the leases in a listing that a server of this boot gave (an administrator may
        have saved the ruleset and loaded it again), and that this configuration still allows."""
        now = time.monotonic()
        for name, element in listing.elements.items():
            comment = COMMENT.fullmatch(str(element.get("comment")))
            left = element.get("expires", 0)
            if comment and comment[3] == self.boot and left:
                user, resource = int(comment[1], 16), int(comment[2], 16)
                found = Lease(name[1].split(" ")[0], resource, user, now + left)
                lease = self.config.allowed(found, comment[4])
                names = lease_elements(self.config, [lease]).keys() if lease else set()
                if lease and name in names and names <= listing.elements.keys():
                    self._keep(lease[:2], lease)

    def reconfigure(self, config: Config) -> None:
        """Go on with another configuration for the same chains; a lease that it would
        not give is revoked. Raises UserError, changing nothing, if the kernel rejects it."""
        check_kernel(self.nft, config)
        for key, lease in list(self.leases.items()):
            meaning = self.config.resources[key[1]].meaning
            self._keep(key, config.allowed(lease, meaning), "configuration")
        self.config = config
        self.look_at = 0  # to say so and to try again if this fails
        with contextlib.suppress(UserError):
            self._install()

    def _install(self) -> None:
        """Make the kernel's part of our table what it should be. Raises UserError."""
        self.expire()
        self.installed = True
        self._run((), self.leases.values(), time.monotonic(), ruleset_script(self.config))
        self.sets = list_table(self.nft, self.config).sets
        self._delete_sets(self.sets.keys() - ruleset(self.config)[0].keys())

    def _run(self, old: Iterable[Lease], new: Iterable[Lease], now: float, first: str = "") -> None:
        """Run a first script, and what makes the new leases of the old ones. Raises UserError."""
        before = lease_elements(self.config, old, self.boot)
        after = lease_elements(self.config, new, self.boot)
        script = first + elements_script(self.config, before, after, now, self.refreshes)
        if script and self.config.debug:
            self.log("nft", script=script)
        if script:
            self.nft.run(script)

    def close(self) -> None:
        """Remove all that was installed. Raises UserError if something stays."""
        for chain in self.config.chains.values():
            with contextlib.suppress(UserError):  # if it is there: the sets cannot go before
                self.nft.run(f"flush chain {self.config.family} {self.config.table} {chain}\n")
        self._delete_sets(self.sets.keys() | ruleset(self.config)[0].keys())

    def _delete_sets(self, names: Iterable[str]) -> None:
        """A set that a foreign rule uses cannot be deleted, and would take a whole
        transaction along: so each has its own, and that one is emptied."""
        table = f"{self.config.family} {self.config.table}"
        for name in names:
            try:
                self.nft.run(f"delete set {table} {name}\n")
            except UserError as error:
                if not re.search("(Error|rule): No such file", error.problem):  # it is there
                    self.nft.run(f"flush set {table} {name}\n")
                    self.log("set-stays", set=name, reason=error.problem)

    def advance(self) -> None:
        """Do all that is due: heal, then the changes that have come in, in one transaction. If
        that fails, the kernel may have been changed under us: heal, and try each change alone,
        so that a bad one harms nobody else; but only as long as clients are patient."""
        if time.monotonic() >= self.look_at:
            self.heal()
        changes, self.queue = self.queue, []
        give_up = time.monotonic() + NFT_LIMIT_S
        problem = self._apply(changes)
        if problem and time.monotonic() < give_up:
            self.heal()
        for change in changes if problem else ():
            in_time = time.monotonic() < give_up
            problem = self._apply([change]) if in_time else problem or "nft is too slow"
            if problem:
                self.look_at = 0
                change.done(self.trouble or problem)

    def _apply(self, changes: list[Change]) -> str:
        """Make these changes. Returns what nft objects to, with none of them done, or ""."""
        self.expire()
        now = time.monotonic()
        planned, objections = self._plan(changes, now)
        old = {key: self.leases[key] for key in planned if key in self.leases}
        gates = {key[1] for key in planned if self.config.resources[key[1]].is_gate}
        if gates:
            old.update((key, lease) for key, lease in self.leases.items() if key[1] in gates)
        new = filter(None, {**old, **planned}.values())
        try:
            self._run(old.values(), new, now)
        except UserError as error:
            return error.problem
        # A lease's time counts from here: so the kernel's element never outlives ours.
        elapsed = time.monotonic() - now
        for key, lease in planned.items():
            self._keep(key, lease and lease._replace(ends=lease.ends + elapsed))
        for change, objection in zip(changes, objections):
            change.done(objection)
        return ""

    def _plan(self, changes: list[Change], now: float) -> tuple[Plan, list[str]]:
        """What these changes make of the leases, and for each why it cannot be; "" if it can."""
        config = self.config
        planned: Plan = {}
        objections = []
        rules = self.rules + len(config.protocols)
        for change in changes:
            key = (change.address, change.resource)
            resource = config.resources[change.resource]
            standing = rules - (resource.rules if planned.get(key, self.leases.get(key)) else 0)
            lease, objection = None, ""
            if change.operation == KNOCK:
                lease = Lease(*key, change.user, now + min(resource.timeout, LONGEST_LEASE_S))
                standing += resource.rules
                if (6 if ":" in change.address else 4) not in VERSIONS[config.family]:
                    objection = f"a table of family {config.family} has no place for this address"
                elif resource.timeout < SHORTEST_LEASE_S:
                    objection = "the resource's timeout is 0"
                elif standing > config.max_nr_rules:
                    objection = f"max-nr-rules ({config.max_nr_rules}) is reached"
            if not objection:
                planned[key], rules = lease, standing
            objections.append(objection)
        return planned, objections

    def _keep(self, key: LeaseKey, lease: Lease | None, reason: str = "") -> None:
        """Note a lease, or with None its end; for what reason, if its client has not asked."""
        rules = self.config.resources[key[1]].rules
        self.rules -= rules if self.leases.pop(key, None) else 0
        if lease:
            self.leases[key] = lease
            self.rules += rules
            self.next_end = min(self.next_end, lease.ends)
        elif reason:
            self.log("revoked", peer=key[0], resource=f"{key[1]:08X}", reason=reason)

    def expire(self) -> None:
        """Forget the leases that have ended: the kernel sends no word of it."""
        now = time.monotonic()
        if now >= self.next_end:
            for key in [key for key, lease in self.leases.items() if lease.ends <= now]:
                self._keep(key, None)
            self.next_end = min((lease.ends for lease in self.leases.values()), default=NEVER)

    def _on_notification(self, netlink: socket.socket) -> None:
        """Read what waits, and want a look if somebody else changed something of ours."""
        while True:
            try:
                data = netlink.recv(1 << 16)
            except BlockingIOError:
                return
            except OSError:
                data = b""  # ENOBUFS: the kernel has dropped some
            if not data or self._is_foreign(data):
                soon = time.monotonic() + (RETRY_S[0] if self.trouble else self.pause) / 4
                self.look_at = min(self.look_at, soon)

    def _is_foreign(self, data: bytes) -> bool:
        """Whether these netlink messages (netlink(7)) tell of a change by another process of
        our chains or sets: those in our table, which is attribute 1 everywhere."""
        names = [b"letmein-", *(chain.encode() + b"\0" for chain in self.config.chains.values())]
        table = self.config.table.encode() + b"\0"
        table = struct.pack("=HH", 4 + len(table), 1) + table
        while len(data) >= 20:
            length, process_id, family = struct.unpack_from("=I8xIB", data)
            message, data = data[20:length], data[max((length + 3) & ~3, 20) :]
            ours = table in message and any(name in message for name in names)
            ours = ours and family == NFPROTO[self.config.family]
            if ours and process_id not in self.nft.process_ids:
                return True
        return False

    def heal(self) -> None:
        """Compare the kernel with what should be, and install all anew if that differs, or say once
        why it cannot be. Then look again after a pause, which grows as long as it helps nothing."""
        now = time.monotonic()  # before the listing, which may take its time
        damage = trouble = ""
        try:
            listing = list_table(self.nft, self.config)
            deleted, damage = self._compare(listing, now)
            if deleted:  # a listing may lack elements while the kernel lets a set grow: look twice
                time.sleep(RETRY_S[0] / 4)
                listing = list_table(self.nft, self.config)
                deleted &= self._compare(listing, now)[0]
                for key, lease in list(self.leases.items()):
                    if deleted & lease_elements(self.config, [lease]).keys():
                        self._keep(key, None, "by hand")
                damage = self._compare(listing, now)[1]
            if damage:
                self._install()
                self.log("healed", reason=damage, leases=len(self.leases))
        except UserError as error:
            trouble = error.problem
            if trouble != self.trouble:
                self.log("cannot-heal", reason=trouble)
        pause = self.pause if trouble == self.trouble else RETRY_S[0]
        self.look_at, self.pause, self.trouble = NEVER, RETRY_S[0], trouble
        if damage or trouble:
            self.look_at = time.monotonic() + pause
            self.pause = min(2 * pause, RETRY_S[2 if trouble else 1])

    def _compare(self, listing: Listing, now: float) -> tuple[set[tuple[str, str]], str]:
        """The (set, key) deleted from sets that stayed, before their time; what else is amiss."""
        sets, rules = ruleset(self.config)
        same = dict(listing.sets.items() & self.sets.items())
        elements = lease_elements(self.config, self.leases.values())
        standing = {name for name, (ends, _) in elements.items() if ends - now > 1}
        deleted = {name for name in standing - listing.elements.keys() if name[0] in same}
        if sets.keys() - same:
            return deleted, "sets are missing"
        if listing.rules != len(rules):
            return deleted, "rules are missing"
        for name, element in listing.elements.items():
            left = element.get("expires", NEVER)
            if left and left > elements.get(name, (0.0, ""))[0] - now + 1:
                return deleted, "there are foreign elements"
        return deleted, ""


# ==== 5  Monitor =============================================================
# The privileged process: it owns keys, handshakes and leases, runs nft and writes the log. It opens
# the control sockets for the network process, which it starts by executing this program anew, so
# that neither a key nor the layout of memory is inherited.
#
# The two speak in records of one fixed size, over one channel for each direction. The network
# process says READY, REQUEST, ANSWER, COUNTS through a pipe, which carries bytes alone: a
# descriptor that came with them would be the monitor's to close, and that can take for ever. The
# monitor says SETTINGS (with the control sockets), REPLY, LAST through the link, a SOCK_SEQPACKET
# socketpair that is shut in the other direction. It trusts nothing in a record, and keeps nothing
# of a peer that has not proved itself: a challenge's token is derived from a secret of this run and
# from all that it must fit, and a RESPONSE is checked against what was possible.

# kind, protocol, connection (UDP: the socket's number), peer's address (IPv6, or IPv4 mapped
# into it), the rest of the way back to it (see ROUTE), message
RECORD = struct.Struct("!BBI16s26s56s")
READY, REQUEST, ANSWER, COUNTS, SETTINGS, REPLY, LAST = range(1, 8)
TCP, UDP = 6, 17  # IP protocol numbers
SETTINGS_PAYLOAD = struct.Struct("!d")  # control-timeout in s
COUNTS_PAYLOAD = struct.Struct("!3I")  # how many peers the network process has closed by itself:
COUNTED = ("evicted", "late", "garbage")  # in favour of another, out of time, or no letmein client
IPV4_MAPPED = bytes(10) + b"\xff\xff"  # RFC 4291, section 2.5.5.2
NETWORK_COMMAND = "network-process"
TEXT_LIMIT = 400  # bytes of what a network process says at its end instead of a record
NETWORK_PAUSE_S = (0.1, 30.0)  # the first pause before a new network process, and the longest
NETWORK_HANG_LIMIT_S = 2.0  # a network process that reads nothing for so long is replaced
PIPE_SIZE = 1 << 18  # bytes, of which each record takes a page: enough for one run of nft
F_SETPIPE_SZ = 1031  # linux/fcntl.h; Python names it from 3.10 on
LISTEN_BACKLOG = 4096  # connections; as many as net.core.somaxconn allows
LINGER_LIMIT_S = 0.02  # for which close() may wait, and so keep the monitor from its work
LISTENERS_LIMIT = 16  # control sockets, of systemd and ours
IP_PKTINFO = getattr(socket, "IP_PKTINFO", 8)  # linux/in.h; Python names it from 3.14 on
DATAGRAM_BUFFER = 1 << 20  # bytes of the UDP control socket: what comes in some 0.1 s of a flood
TOKEN_WINDOW_S = 5.0  # a challenge token is good until a window that begins after its time,
TOKEN_LIMIT_S = 60.0  # which is control-timeout, but not more than this
ACCEPTED_LIMIT = 1 << 17  # handshakes remembered for a repeated RESPONSE
LINES_LIMIT = 10  # lines of the log on refused peers, for each protocol, until the next summary
SUMMARY_S = 10.0
LOG_PATIENCE_S = 0.2  # for a reader of the log that has kept up so far


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


class Log:
    """The log, on standard error, and what it counts for `status`. Floods are summed up. A log that
    nobody reads is no reason to let nobody in: the line is lost, and counted."""

    def __init__(self) -> None:
        from collections import Counter
        self.counts: Counter[str] = Counter()  # since the start: events, and COUNTED
        self.refusals: Counter[str] = Counter()  # by reason
        self.failures: Counter[str] = Counter()  # of peers, since the last summary
        self.sum_up_at = NEVER
        self.patience = LOG_PATIENCE_S

    def __call__(self, event: str, **fields: object) -> None:
        """Write one line, `event=... name=value ...`. Values that are not plain words are
        escaped. Under systemd, which adds a time itself, the line has none."""
        self.counts[event] += 1
        words = [] if "JOURNAL_STREAM" in os.environ else [time.strftime("%Y-%m-%dT%H:%M:%S%z")]
        for name, value in {"event": event, **fields}.items():
            plain = re.fullmatch(r"[A-Za-z0-9_.,:/+%-]+", str(value))
            words.append(f"{name}={value if plain else ascii(str(value))}")
        # A pipe that is ready takes so much at once, and without blocking: pipe(7).
        line = " ".join(words).encode()[: select.PIPE_BUF - 1] + b"\n"
        written = 0
        with contextlib.suppress(OSError):
            written = os.write(2, line) if select.select([], [2], [], self.patience)[1] else 0
        self.patience = LOG_PATIENCE_S if written else 0
        if not written:
            self.counts["lines-lost"] += 1

    def failure(self, event: str, **fields: str) -> None:
        """A peer was refused, or has failed for another reason: a line, or one to sum up."""
        kind = f"{event}-{fields['proto']}"
        self.failures[kind] += 1
        self.sum_up_at = min(self.sum_up_at, time.monotonic() + SUMMARY_S)
        if self.failures[kind] <= LINES_LIMIT:
            self(event, **fields)
        else:
            self.counts[event] += 1

    def summary(self) -> None:
        """Write how many got no line since the last one."""
        more = {kind: n - LINES_LIMIT for kind, n in self.failures.items() if n > LINES_LIMIT}
        self.failures.clear()
        self.sum_up_at = NEVER
        if more:
            self("summary", seconds=f"{SUMMARY_S:g}", **more)


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
            control.bind(("::" if ipv6 else "0.0.0.0", config.port))
            prepare_control(control)
        except OSError as error:
            problem = f"cannot serve the control port {config.port}/{name[0]}"
            hint = "does another server run already? 'ss -lntup' tells"
            raise UserError(f"{problem}: {error.strerror}", hint) from None
        sockets[name] = (control,)
    return sockets


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
        ipv6 = control.family == socket.AF_INET6
        level = socket.IPPROTO_IPV6 if ipv6 else socket.IPPROTO_IP
        control.setsockopt(level, socket.IPV6_RECVPKTINFO if ipv6 else IP_PKTINFO, 1)


def close_control(control: socket.socket) -> None:
    """Close a socket that a network process had. One that was taken over may have made it linger
    for as long as it likes, socket(7): then a signal wakes us up."""
    import signal
    signal.setitimer(signal.ITIMER_REAL, LINGER_LIMIT_S, LINGER_LIMIT_S)
    control.close()
    signal.setitimer(signal.ITIMER_REAL, 0)


def activated_sockets() -> ControlSockets:
    """The control sockets that systemd has opened for us, if it has; see sd_listen_fds(3). There
    may be several of one protocol and port, for different addresses. Raises UserError."""
    mine = os.environ.get("LISTEN_PID") == str(os.getpid())
    most = LISTENERS_LIMIT - 1  # one more may be ours
    number = parse_number(os.environ.get("LISTEN_FDS", ""), limit=most) if mine else 0
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


def set_receive_buffer(receiver: socket.socket, size: int) -> None:
    """Let a socket hold up to size bytes, or as much as our rights allow; see socket(7)."""
    receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)
    with contextlib.suppress(PermissionError):  # it takes root in the first user namespace
        receiver.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, size)


def run_path(rundir: str, config: Config) -> str:
    """How the run directory's files of the server for this namespace's table begin."""
    namespace = os.stat("/proc/self/ns/net").st_ino
    return f"{rundir}/letmeind-{namespace}-{config.family}-{config.table}"


def lock_table(rundir: str, config: Config) -> int:
    """Have no other server work on this table. Returns the lock's descriptor. Raises UserError."""
    import fcntl
    path = run_path(rundir, config) + ".lock"
    try:
        lock = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except (FileNotFoundError, NotADirectoryError):
        hint = f"make it (mkdir -m 755 {rundir}), or name another with --rundir"
        raise UserError(f"there is no run directory {rundir}", hint) from None
    except OSError as error:
        hint = "is its disk full, or read-only? --rundir names another place"
        if isinstance(error, PermissionError):
            hint = "start the server as root, or give it a --rundir that it may write to"
        raise UserError(f"cannot open {path}: {error.strerror}", hint) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        hint = f"stop that one first; it holds {path}"
        problem = f"a server for the table {config.family} {config.table} runs already"
        raise UserError(problem, hint) from None
    except OSError as error:
        raise UserError(f"cannot lock {path}: {error.strerror}", hint) from None
    return lock


def empty_directory(rundir: str) -> int:
    """A directory that has been removed is empty and stays so, and nothing is left of it. It is the
    root directory of every network process, made once: a disk that is full later keeps none of
    them from starting. Returns its descriptor. Raises UserError."""
    path = f"{rundir}/letmeind-{os.urandom(8).hex()}"
    try:
        os.mkdir(path, 0o700)
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
        os.rmdir(path)
    except OSError as error:
        hint = "is its disk full? 'df -i' and 'df' tell; --rundir names another place"
        raise UserError(f"cannot make a directory in {rundir}: {error.strerror}", hint) from None
    return descriptor


def note_signals() -> int:
    """From now on keep the signals that a server knows. Returns a pipe's descriptor, from which
    their numbers can be read, also of those that were blocked until now."""
    import signal
    ours, theirs = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(theirs, warn_on_full_buffer=False)
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD, signal.SIGALRM)
    for number in numbers:
        signal.signal(number, lambda *_: None)
    return ours


class Monitor:
    """The privileged process. Args: arguments, of the command line, and of them activated."""

    def __init__(self, config: Config, arguments: argparse.Namespace) -> None:
        os.umask(0o077)
        self.config = config
        self.arguments = arguments
        self.log = Log()
        self.lock = lock_table(arguments.rundir, config)
        self.root = empty_directory(arguments.rundir)
        for controls in arguments.activated.values():
            for control in controls:
                prepare_control(control)
        self.sockets = control_sockets(config, arguments.activated)
        for protocol, port in arguments.activated.keys() - self.sockets.keys():
            problem = f"systemd gave a socket for {port}/{protocol}, which is no control port"
            raise UserError(problem, "letmeind.socket and port in [GENERAL] must agree")
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            self.firewall = Firewall(Nft(config.nft), config, file.read(8), self.log)
        self.selector = selectors.DefaultSelector()
        self.ready = self.is_open = self.stopping = self.reload_wanted = False

        self.network = 0  # the network process, if there is one
        self.link: socket.socket | None = None  # to the network process
        self.pipe = -1  # from the network process
        self.shared: list[socket.socket] = []  # the sockets that it was given
        self.start_at = 0.0  # when to start it
        self.pause = NETWORK_PAUSE_S[0]

        self.secret = os.urandom(32)  # of the challenge tokens of this run
        self.accepted: dict[bytes, tuple[float, bytes]] = {}  # by RESPONSE: since when, the reply

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT. Raises UserError if the start fails."""
        import hmac  # here: it may not be had any more when descriptors have become scarce
        hmac.digest(self.secret, b"", "sha3_256")
        self._catch_signals()
        if self.arguments.user == "none":
            self.log("warning", reason="--user none: the network process keeps the server's rights")
        try:
            while not (self.ready or self.stopping):
                self._turn()
            self._open_status()
            self.firewall.open(self.selector)
            self.is_open = True
            self._tell_ready("ready")
            while not self.stopping:
                if self.reload_wanted:
                    self.reload_wanted = False
                    self._reload()
                self._turn()
        finally:
            self._stop_network(1)
            for group in (self.shared, *self.arguments.activated.values()):
                for control in group:
                    close_control(control)
            with contextlib.suppress(OSError):
                os.unlink(run_path(self.arguments.rundir, self.config) + ".status")
            if self.firewall.installed:
                self.firewall.close()
                self.log.summary()
                self.log("stopped")

    def _tell_ready(self, event: str) -> None:
        """Say that this configuration is in force; to systemd, too: sd_notify(3)."""
        path = os.environ.get("NOTIFY_SOCKET", "")
        if path:
            unix = (socket.AF_UNIX, socket.SOCK_DGRAM)
            with contextlib.suppress(OSError), socket.socket(*unix) as notify:
                notify.sendto(b"READY=1", "\0" + path[1:] if path[0] == "@" else path)
        for warning in self.config.warnings:
            self.log("warning", reason=warning)
        config, port = self.config, f"{self.config.port}/{'+'.join(self.config.protocols)}"
        counts = {"users": len(config.keys), "resources": len(config.resources)}
        self.log(event, port=port, table=f"{config.family}/{config.table}", **counts)

    def _open_status(self) -> None:
        """Serve `status`: whoever connects, which takes our rights, gets one JSON document."""
        import json
        path = run_path(self.arguments.rundir, self.config) + ".status"
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)  # a predecessor's: we hold the lock
        listener.bind(path)
        listener.listen()
        listener.setblocking(False)

        def serve() -> None:
            counts = {"refused": self.log.refusals, "counts": self.log.counts}
            document = {"process": os.getpid(), "leases": len(self.firewall.leases), **counts}
            with contextlib.suppress(OSError), listener.accept()[0] as peer:
                peer.setblocking(False)
                peer.send(json.dumps(document).encode())

        self.selector.register(listener, selectors.EVENT_READ, serve)

    def _catch_signals(self) -> None:
        """Have the signals that are noted wake the selector up."""
        import signal

        def on_signal() -> None:
            numbers = os.read(self.arguments.signals, 4096)
            self.reload_wanted |= signal.SIGHUP in numbers  # until the firewall is open, it waits
            self.stopping |= signal.SIGTERM in numbers or signal.SIGINT in numbers
            changes = os.WSTOPPED | os.WEXITED | os.WNOHANG | os.WNOWAIT
            child = self.network and os.waitid(os.P_PID, self.network, changes)
            if child and child.si_code == os.CLD_STOPPED:  # of its end the link tells
                self._lose_network("it was stopped")

        self.selector.register(self.arguments.signals, selectors.EVENT_READ, on_signal)

    def _turn(self) -> None:
        """Wait for something to happen, and see to it."""
        wait = min(self.firewall.look_at, self.start_at, self.log.sum_up_at) - time.monotonic()
        for key, _ in self.selector.select(max(wait, 0) if wait < NEVER else None):
            key.data()
        if time.monotonic() >= self.start_at:
            try:
                self._start_network()
            except OSError as error:
                self._lose_network(error.strerror or "")
        self.firewall.advance()
        if time.monotonic() >= self.log.sum_up_at:
            self.log.summary()

    def _reload(self) -> None:
        """Take over the configuration file anew, or say why not and go on as before."""
        self.firewall.advance()  # what has come in until now was checked by the old rules
        old = self.config
        try:
            config = read_config(old.path, server=True)
            config = config._replace(seccomp=self.arguments.seccomp or config.seccomp)
            for name in ("nft", "family", "table", "chains", "seccomp"):
                if getattr(config, name) != getattr(old, name):
                    self.log("restart-wanted", option=name, reason="it cannot change while running")
                    config = config._replace(**{name: getattr(old, name)})
            sockets = control_sockets(config, self.sockets)
            self.firewall.reconfigure(config)
        except UserError as error:
            self.log("reload-failed", reason=error.problem, hint=error.hint)
        else:
            self.config, self.sockets = config, sockets
            self._send_settings()
            self._tell_ready("reloaded")

    def _connect(self) -> tuple[socket.socket, BinaryIO]:
        """Make the channels to a network process, and return its ends: of the link to read from, of
        the pipe to write to. Neither has a flag in common with ours: we never wait for it."""
        import fcntl
        self.link, link = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.link.setblocking(False)
        self.link.shutdown(socket.SHUT_RD)  # it can send nothing: unix(7)
        link.setblocking(False)
        # O_DIRECT: what was written at once is read at once, pipe(2).
        self.pipe, pipe = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC | os.O_DIRECT)
        with contextlib.suppress(OSError):  # then it holds fewer records
            fcntl.fcntl(self.pipe, F_SETPIPE_SZ, PIPE_SIZE)
        self.selector.register(self.pipe, selectors.EVENT_READ, self._on_pipe)
        return link, os.fdopen(pipe, "wb", buffering=0)

    def _start_network(self) -> None:
        """Start it with its ends of the channels as standard input and output. Its program is the
        compiled form of this one, even if the file has been replaced; that saves 6 MB, too. It
        inherits that and the root directory, and nothing else. Raises OSError."""
        import marshal
        self.start_at = NEVER
        self.started = time.monotonic()
        try:
            self.sockets = control_sockets(self.config, self.sockets)  # if some are missing
        except UserError as error:
            return self._lose_network(error.problem)
        link, pipe = self._connect()
        self._send_settings()  # before it may have gone, having said why
        with link, pipe, os.fdopen(os.memfd_create("letmein-program", 0), "w+b") as program:
            program.write(marshal.dumps(PROGRAM))
            program.seek(0)
            code = f"marshal.load(open({program.fileno()}, 'rb'))"
            start = f"import marshal; exec({code}, {{'__name__': '__main__'}})"
            words: list[Any] = [NETWORK_COMMAND, self.arguments.user, self.config.seccomp]
            words += [self.arguments.num_connections, self.arguments.num_ip_connections, self.root]
            command = [sys.executable, "-IB", "-c", start, *map(str, words)]
            dup = os.POSIX_SPAWN_DUP2
            streams: list[Any] = [(dup, link.fileno(), 0), (dup, pipe.fileno(), 1)]
            streams.append((os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0))
            os.set_inheritable(self.root, True)
            try:
                self.network = os.posix_spawn(sys.executable, command, {}, file_actions=streams)
            finally:
                os.set_inheritable(self.root, False)

    def _send_settings(self) -> None:
        payload = SETTINGS_PAYLOAD.pack(self.config.control_timeout)
        controls = [control for group in self.sockets.values() for control in group]
        self._send(Record(SETTINGS, payload=payload), [control.fileno() for control in controls])
        for control in set(self.shared).difference(controls):
            close_control(control)
        self.shared = controls

    def _lose_network(self, reason: str) -> None:
        """It is gone or useless: start another after a pause. Raises UserError at our start."""
        status = self._stop_network(0)
        if status not in (0, -9):  # of a signal N it is -N, and 9 is ours
            reason += f", with status {status}"
        if not self.ready:
            raise UserError(*reason.split("\n")[:2])
        self._replace_sockets()
        if time.monotonic() - self.started > NETWORK_PAUSE_S[1]:
            self.pause = NETWORK_PAUSE_S[0]
        self.log("network-process-lost", reason=reason, pause=f"{self.pause:g}")
        self.start_at = time.monotonic() + self.pause
        self.pause = min(self.pause * 2, NETWORK_PAUSE_S[1])

    def _replace_sockets(self) -> None:
        """Open the control sockets anew: if the network process was taken over, it may have made
        them deaf. Those of systemd are not ours to open: they stay, with their options as at
        first, but a filter or an interface that they were bound to stays as well."""
        for control in self.shared:
            if not any(control in group for group in self.arguments.activated.values()):
                close_control(control)
        opened = {name: group for name, group in self.sockets.items() if group[0].fileno() >= 0}
        self.sockets, self.shared = opened, []
        with contextlib.suppress(UserError):  # it is tried again with the next network process
            self.sockets = control_sockets(self.config, opened)
        for group in self.arguments.activated.values():
            for control in group:
                with contextlib.suppress(OSError):
                    prepare_control(control)

    def _stop_network(self, patience: float) -> int:
        """It ends when its link closes, or is killed after so many seconds. Returns its status."""
        if self.link is not None:
            self.link.close()
            self.link = None
        if self.pipe >= 0:
            with contextlib.suppress(KeyError):  # if there was no memory to register it
                self.selector.unregister(self.pipe)
            os.close(self.pipe)
            self.pipe = -1
        process, self.network = self.network, 0
        try:
            return await_end(process, patience) if process else 0
        except OSError:  # to wait for a time takes a descriptor
            import signal
            os.kill(process, signal.SIGKILL)
            return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])

    def _on_pipe(self) -> None:
        """Take what the network process has said, at most a batch's worth."""
        for _ in range(256):
            if self.pipe < 0 or (self.ready and not self.is_open):
                return  # it is gone; or what comes behind READY waits for the firewall
            try:
                data = os.read(self.pipe, TEXT_LIMIT)
            except BlockingIOError:
                return
            if len(data) == RECORD.size:
                self._receive(Record(*RECORD.unpack(data)))
            else:
                said = data.decode("utf-8", "replace")
                self._lose_network(said or "it ended")

    def _send(self, record: Record, descriptors: Sequence[int] = ()) -> None:
        """The network process reads at once whatever it does, or is not to be trusted."""
        while self.link:
            try:
                socket.send_fds(self.link, [RECORD.pack(*record)], descriptors)
                return
            except BlockingIOError:
                if not select.select([], [self.link], [], NETWORK_HANG_LIMIT_S)[1]:
                    self._lose_network("it reads nothing")
            except ConnectionError:  # it has closed its end: why, and its own end, the pipe tells
                if self.network:
                    import signal
                    os.kill(self.network, signal.SIGKILL)
                return
            except OSError as error:
                self._lose_network(error.strerror or "")

    def _receive(self, record: Record) -> None:
        """See to one record from the network process, which is not trusted."""
        if record.kind == COUNTS:
            counts = zip(COUNTED, COUNTS_PAYLOAD.unpack_from(record.payload))
            self.log.counts.update(dict(counts))
        self.ready |= record.kind == READY
        if record.kind in (READY, COUNTS):
            return
        if record.kind not in (REQUEST, ANSWER) or record.protocol not in (TCP, UDP):
            return self._lose_network("it sent a bad record")
        try:
            message = Message.decode(record.payload)
        except ProtocolError:
            return self._lose_network("it sent a bad message")
        config, (operation, user, resource, *_) = self.config, message
        # What a token is for: peer, connection, ids, and what is configured for them just now.
        key = config.keys.get(user, NOBODYS_KEY)
        text = repr((record[1:5], user, resource, key, config.resources.get(resource))).encode()

        def token(asked: int, age: int = 0) -> bytes:
            """The token for a KNOCK or REVOKE of some windows ago."""
            import hmac
            start = struct.pack("!QI", int(time.monotonic() / TOKEN_WINDOW_S) - age, asked)
            return hmac.digest(self.secret, start + text, "sha3_256")

        handshake = ServerHandshake(config.error_policy, config.keys.get, config.objection)
        # Over UDP nobody knows whether a peer has knocked before: the message must tell.
        if record.kind == ANSWER or (record.protocol == UDP and operation == RESPONSE):
            ages = range(2 + int(min(config.control_timeout, TOKEN_LIMIT_S) / TOKEN_WINDOW_S))
            tokens = ((asked, token(asked, age)) for age in ages for asked in (KNOCK, REVOKE))
            # A TCP connection whose first message proved nothing has been closed.
            proved = BASIC_AUTH if record.protocol == TCP else NO_AUTH
            verdict = handshake.on_response(message, proved, tokens)
        else:
            verdict = handshake.on_request(message, token)
        if verdict.granted is not None:
            self._grant(verdict.granted, message, record)
        elif verdict.reason:
            self.log.refusals[verdict.reason] += 1
            self._log_peer("refused", message, record, verdict.reason)
            self._end(record, verdict.reply)
        else:
            self._send(record._replace(kind=REPLY, payload=verdict.reply))

    def _end(self, record: Record, reply: bytes) -> None:
        """Send a peer its last message; b"" closes a TCP connection without a word."""
        if reply or record.protocol == TCP:
            self._send(record._replace(kind=LAST, payload=reply or bytes(MESSAGE_SIZE)))

    def _grant(self, operation: int, message: Message, record: Record) -> None:
        """The peer has proved itself: have the firewall do what it asked for. Its RESPONSE is known
        until the token's time is over: a repeated one changes nothing, and gets the same reply."""
        now = time.monotonic()
        oldest = now - TOKEN_LIMIT_S - 2 * TOKEN_WINDOW_S  # control-timeout may have become longer
        while self.accepted and next(iter(self.accepted.values()))[0] < oldest:
            del self.accepted[next(iter(self.accepted))]
        if record.payload in self.accepted or len(self.accepted) >= ACCEPTED_LIMIT:
            return self._end(record, self.accepted.get(record.payload, (now, b""))[1])
        self.accepted[record.payload] = (now, b"")

        def done(problem: str) -> None:
            reply = unsigned(GOAWAY if problem else COMEIN, message.user, message.resource)
            self.accepted[record.payload] = (now, reply)
            self._end(record, reply)
            event = "granted" if operation == KNOCK else "revoked"
            self._log_peer("failed" if problem else event, message, record, problem)

        ids = (message.resource, message.user)
        self.firewall.queue.append(Change(operation, record.peer, *ids, done))

    def _log_peer(self, event: str, message: Message, record: Record, reason: str) -> None:
        """One line on what became of a peer's request."""
        protocol = "tcp" if record.protocol == TCP else "udp"
        ids = {"user": f"{message.user:08X}", "resource": f"{message.resource:08X}"}
        write, more = (self.log.failure, {"reason": reason}) if reason else (self.log, {})
        write(event, peer=record.peer, proto=protocol, **ids, **more)


# ==== 6  Network =============================================================
# The process that faces the internet. It owns sockets, deadlines and limits, and forwards messages
# between peers and the monitor. It knows no key, and could not run a program.

ROUTE = struct.Struct("!HI20s")  # port, scope id, where to answer from: struct in6_pktinfo, ipv6(7)
MSG_DONTWAIT = 0x40  # linux/socket.h
ACCEPTS_PER_TURN = 64
TURN_LIMIT_S = 2.0  # of the processor's time: a process that needs more has lost its way


class Connection:
    """One TCP connection. It competes for a slot until its second message has come."""

    is_owed = False  # an answer: it waits for the monitor, and is not the one to go

    def __init__(self, number: int, peer: socket.socket, name: tuple[Any, ...]) -> None:
        self.number = number
        self.socket = peer
        self.since = time.monotonic()
        self.record = Record(REQUEST, TCP, number, *split_name(name))  # for its next message
        # What counts as one peer: an IPv4 address, or the first 56 bits of an IPv6 address.
        address = self.record.address
        self.prefix = address if address.startswith(IPV4_MAPPED) else address[:7]


def split_name(name: tuple[Any, ...], local: bytes = b"") -> tuple[bytes, bytes]:
    """A peer's socket address as (16 bytes, route): the address, IPv4 mapped into IPv6, and
    what else it takes to answer. Args: local, the in6_pktinfo or in_pktinfo of a datagram."""
    host, port, *more = name
    if not more:  # in in_pktinfo the address to answer from is the second field: ip(7)
        return IPV4_MAPPED + socket.inet_aton(host), ROUTE.pack(port, 0, local[4:8])
    # The interface only matters where the address means nothing without it.
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
        # Those whose second message the monitor has are not read, nor pushed out: it answers soon.
        self.answered: dict[int, Connection] = {}
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
        import signal
        while True:
            signal.setitimer(signal.ITIMER_PROF, TURN_LIMIT_S)  # its signal ends the process
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
                key.data()

    def _send(self, record: Record) -> None:
        """Pass a record on. While the monitor lags behind, nothing is taken from the internet."""
        while not select.select([self.link], [self.pipe], [])[1]:
            self._on_link()
        os.write(self.pipe, RECORD.pack(*record))

    def _on_link(self) -> None:
        try:
            data, descriptors, _, _ = socket.recv_fds(self.link, RECORD.size, LISTENERS_LIMIT)
        except BlockingIOError:
            return
        if not data:
            raise ConnectionError("the monitor is gone")
        record = Record(*RECORD.unpack(data))
        if record.kind == SETTINGS:
            return self._settle(record.payload, [socket.socket(fileno=fd) for fd in descriptors])
        if record.protocol == UDP:
            return self._answer(record)
        connection = self.connections.get(record.connection) or self.answered.get(record.connection)
        if connection is None:
            return
        connection.is_owed = False
        sent = 0
        with contextlib.suppress(OSError):
            # Two messages at most: a socket that does not take them at once is no client's.
            if any(record.payload):
                sent = connection.socket.send(record.payload, MSG_DONTWAIT)
        if record.kind == LAST or sent != MESSAGE_SIZE:
            self._close(connection)

    def _accept(self, listener: socket.socket) -> None:
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
        largest prefix if all slots are taken: a flood pushes out itself. Nobody is refused."""
        crowd = self.prefixes.get(prefix, {})
        if len(crowd) < self.prefix_limit:
            if len(self.connections) < self.limit:
                return
            crowd = max(self.prefixes.values(), key=len)
        # What a peer has said earns it nothing: a replayed KNOCK would, too. But who waits for the
        # monitor does not sit there; of these there are never more than its channels hold.
        idle = next((one for one in crowd.values() if not one.is_owed), None)
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
        connection.record = record._replace(kind=ANSWER)
        if record.kind == ANSWER:
            self._leave(connection)
            self.answered[connection.number] = connection
        connection.is_owed = True
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
        if self.answered.pop(connection.number, None) is None:
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
            local = extra[0][2] if extra else b""
            self._send(Record(REQUEST, UDP, number, *split_name(name, local), payload=data))

    def _answer(self, record: Record) -> None:
        """Send a datagram, from the address that the peer's came to."""
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
                extra = (socket.IPPROTO_IP, IP_PKTINFO, bytes(4) + local[:4] + bytes(4))
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
# or aarch64. A name that an architecture does not have stands for nothing there.
NETWORK_CALLS = """
    accept4 brk clock_gettime close epoll_ctl epoll_pwait epoll_wait exit exit_group futex
    getpeername getrandom getsockname getsockopt madvise mmap mprotect mremap munmap pselect6
    recvfrom recvmsg restart_syscall rt_sigaction rt_sigprocmask rt_sigreturn select sendmsg sendto
    setitimer sigaltstack write"""
# Some of these with such arguments alone, (position, value): one of these sets must fit.
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
        raise UserError(f"seccomp = {mode} cannot be had: {error}", hint) from None


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


def find_account(name: str) -> tuple[int, int]:
    """User and group id of an account; "none" has none. Raises UserError."""
    import pwd
    if name == "none":
        return 0, 0
    user = group = 0
    with contextlib.suppress(KeyError):
        user, group = pwd.getpwnam(name)[2:4]
    if not user or not group:
        hint = f"useradd --system {name} makes one; --user names another, or none"
        raise UserError(f"there is no account {name} without root's rights", hint)
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
    import signal
    # Ctrl-C is the monitor's to see to, and so is SIGHUP, which has been blocked since our start.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        network = Network(socket.socket(fileno=0), 1, int(limit), int(prefix_limit))
        enter_sandbox(account, int(limit), int(root), seccomp)
        network.run()
    except Exception as error:
        what = "" if isinstance(error, UserError) else f"it failed with {type(error).__name__}: "
        with contextlib.suppress(OSError):  # the monitor may be gone
            os.write(1, f"{what}{error}\n{getattr(error, 'hint', '')}".encode())


# ==== 8  Command line ========================================================


def status(config: Config, rundir: str, as_json: bool) -> int:
    """Print who holds what, as the kernel has it, and what a running server has counted."""
    import json
    server: Any = None
    with contextlib.suppress(OSError, ValueError), socket.socket(socket.AF_UNIX) as peer:
        peer.settimeout(2 * NFT_LIMIT_S)
        peer.connect(run_path(rundir, config) + ".status")
        server = json.load(peer.makefile("rb"))
    leases = []
    for (name, key), element in sorted(list_table(Nft(config.nft), config).elements.items()):
        address, protocol, port = (*key.split(" . "), None, None)[:3]
        comment = COMMENT.fullmatch(str(element.get("comment"))) or (None, None, None)
        place = {"address": address, "protocol": protocol, "port": port and int(port)}
        lease = {"resource": comment[2], "user": comment[1], "seconds_left": element.get("expires")}
        if not name.endswith("-gate"):
            leases.append({**place, **lease, **element.get("counter", {})})
    if as_json:
        table = {"family": config.family, "table": config.table}
        print(json.dumps({**table, "leases": leases, "server": server}, indent=1))
        return 0
    for lease in leases:
        print(*(f"{name}={value}" for name, value in lease.items() if value is not None))
    if not leases:
        print("nobody holds a lease")
    print("since the server's start:" if server else "no server runs")
    for title in ("refused", "counts") if server else ():
        counts = [f"{name} {number}" for name, number in server[title].items()]
        print(f"  {title}: {', '.join(counts) or 'none'}")
    return 0


def begin_service(arguments: argparse.Namespace) -> None:
    """What comes before all else: take over what systemd has given us, and note signals, so that a
    change of the file behind which a SIGHUP came is never missed. Raises UserError."""
    arguments.activated = given = activated_sockets()
    first = 3 + sum(map(len, given.values()))
    os.closerange(first, 1 << 16)  # what else our parent has left open is for nobody
    if not arguments.check:
        arguments.signals = note_signals()


def serve(config: Config, arguments: argparse.Namespace) -> int:
    """Run the server until it is told to stop, or with --check only try whether it could."""
    find_account(arguments.user)
    filter_system_calls = system_call_filter(config.seccomp, MONITOR_CALLS)
    if arguments.check:
        check_kernel(Nft(config.nft), config)
        print(ruleset_script(config), end="")
        print(f"# {config.path}: good, and nft takes the ruleset above; nothing was changed")
        return 0
    warnings = config.warnings + give_up_rights()
    filter_system_calls()
    Monitor(config._replace(warnings=warnings), arguments).run()
    return 0


def service_file(kind: str, path: str, account: str) -> str:
    """A file that starts this copy of the program with the system. Args: kind, as on the command
    line; path, of letmeind.conf; account, of the network process."""
    import shlex
    program, module, path = map(os.path.realpath, (sys.argv[0], __file__, path))
    command = shlex.join([sys.executable, "-I", program, "server", "-c", path, "--user", account])
    if kind == "openwrt":
        return f"""\
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
    if kind == "systemd-socket":
        return """\
# An extra. letmeind.service must be enabled as well: without it the firewall drops all knocks.
[Socket]
ListenStream=5800
ListenDatagram=5800
[Install]
WantedBy=sockets.target
"""
    places = {"/etc", "/usr", sys.prefix, sys.base_prefix}
    places.update(map(os.path.dirname, (program, module, path)))
    settings = """Type=notify KillMode=mixed Restart=on-failure RestartSec=3
        RestartForceExitStatus=SIGHUP UMask=0077 SyslogIdentifier=letmeind LockPersonality
        MemoryDenyWriteExecute NoNewPrivileges PrivateDevices PrivateMounts ProtectClock
        ProtectControlGroups ProtectHome=tmpfs ProtectHostname ProtectKernelLogs
        ProtectKernelModules ProtectKernelTunables ProtectProc=invisible ProtectSystem=strict
        RestrictNamespaces RestrictRealtime RestrictSUIDSGID SystemCallArchitectures=native
        SystemCallErrorNumber=EPERM"""
    lines = "\n".join(word if "=" in word else f"{word}=yes" for word in settings.split())
    return f"""\
[Unit]
Description=letmein, an authenticated port knocker
After=nftables.service network.target
[Service]
ExecStart={command} --rundir /run/letmeind
ExecReload=/bin/kill -HUP $MAINPID
{lines}
# Not PrivateTmp=: that makes a directory in /tmp, and whoever fills that up keeps us from starting.
# Not User=: what it gives is not lost by a change of user, so the network process would keep it.
CapabilityBoundingSet=CAP_NET_ADMIN CAP_SETUID CAP_SETGID CAP_SYS_CHROOT CAP_KILL
RestrictAddressFamilies=AF_INET AF_INET6 AF_NETLINK AF_UNIX
SystemCallFilter=@system-service chroot seccomp
SystemCallFilter=~@aio @chown @keyring @memlock @resources
# All that is there of the disk:
RuntimeDirectory=letmeind letmeind/root
RootDirectory=/run/letmeind/root
BindReadOnlyPaths=-/bin -/lib -/lib64 -/sbin {shlex.join(sorted(places))}
[Install]
WantedBy=multi-user.target
"""


ABOUT = """\
An authenticated port knocker. For example:
  letmein knock server 22                       open port 22 of server for this address
  letmein knock server 22 -- ssh server         the same, log in, and close it again
  ssh -o ProxyCommand='letmein connect %h %p' server"""


def build_parser(first: str) -> argparse.ArgumentParser:
    """The command line, as README's tables have it. A knock has no time for what is other
    commands': if its first word is one of the client's commands, there is that one alone."""
    import argparse
    # A server that runs by our systemd unit may write nowhere else.
    rundir = "/run/letmeind" if os.path.isdir("/run/letmeind") else "/run"
    # Without a width argparse would import shutil, to ask for the terminal's.
    form = functools.partial(argparse.RawDescriptionHelpFormatter, width=80)
    new_parser = functools.partial(argparse.ArgumentParser, formatter_class=form)
    # What may stand in front of COMMAND or behind it; parse_words() has the defaults.
    common = new_parser(add_help=False, argument_default=argparse.SUPPRESS)
    common.add_argument("-c", "--config", metavar="FILE")
    common.add_argument("--verbose", action="store_true", help="say what is going on")
    common.add_argument("--seccomp", choices=SECCOMP, type=str.lower)
    common.add_argument("--dns", "--dns-crypt", help=argparse.SUPPRESS)
    common.add_argument("-v", "--version", action="version", version=f"letmein.py {VERSION}")
    parser = new_parser(prog="letmein", description=ABOUT, parents=[common])
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    add_command = functools.partial(commands.add_parser, parents=[common], formatter_class=form)

    # A PORT may stand behind an option, where argparse loses it: see parse_words().
    client = new_parser(add_help=False)
    client.add_argument("host", metavar="HOST")
    client.add_argument("-q", "--quiet", action="store_true", help="say only what is wrong")
    client.add_argument("--keep", action="store_true", help="do not close at the end")
    client.add_argument("-u", "--user", metavar="ID", type=parse_identifier)
    client.add_argument("-P", "--server-port", metavar="PORT", type=parse_port)
    add = functools.partial(client.add_argument, dest="resources", action="append", default=[])
    add("-r", "--resource", metavar="ID", type=parse_identifier)
    add = functools.partial(client.add_argument, dest="protocol", action="store_const")
    add("-T", "--server-port-tcp", const="tcp")
    add("-U", "--server-port-udp", const="udp")
    add = functools.partial(client.add_argument, dest="families", action="append_const")
    add("-4", "--ipv4", const=socket.AF_INET, default=[])
    add("-6", "--ipv6", const=socket.AF_INET6, default=[])
    for name, aliases, what, text in (
        ("knock", [], "(PORT... | -r ID...) [-- COMMAND...]", "open a port for this address"),
        ("revoke", ["close"], "(PORT... | -r ID...)", "close it again"),
        ("connect", [], "PORT [-r ID]", "open, carry standard input and output there, close"),
    ):
        usage = f"letmein {name} [OPTION...] HOST {what}"
        if name == first or first not in ("knock", "revoke", "connect"):
            add_command(name, aliases=aliases, help=text, usage=usage, parents=[common, client])
    if first in ("knock", "revoke", "connect"):
        return parser

    command = add_command("gen-key", help="print a new key")
    command.add_argument("-u", "--user", metavar="ID", type=parse_identifier)

    command = add_command("server", help="run the server")
    command.add_argument("--rundir", metavar="DIR", default=rundir)
    slots = functools.partial(parse_number, least=1, limit=1_000_000)
    command.add_argument("-n", "--num-connections", metavar="N", type=slots, default=1024)
    command.add_argument("-N", "--num-ip-connections", metavar="N", type=slots, default=128)
    command.add_argument("--no-systemd", action="store_true")
    command.add_argument("--check", action="store_true", help="try the configuration and leave")
    name = r"[A-Za-z_][A-Za-z0-9_.-]{0,31}"
    account = functools.partial(matched, pattern=name, expected="a user's name, or none")
    command.add_argument("--user", metavar="NAME", type=account, default="letmeind")

    command = add_command("service", help="print what starts the server with the system")
    command.add_argument("kind", choices=("systemd", "systemd-socket", "openwrt"))
    command.add_argument("--user", metavar="NAME", type=account, default="letmeind")

    command = add_command("status", help="who holds what")
    command.add_argument("--rundir", metavar="DIR", default=rundir)
    command.add_argument("--json", action="store_true")
    return parser


def parse_words(words: list[str]) -> argparse.Namespace:
    """The command line. Ends the program (status 2) if it is wrong."""
    import argparse
    parser = build_parser(words[0] if words else "")
    arguments = argparse.Namespace(config=None, verbose=False, seccomp=None, dns=None)
    at = words.index("--") if "--" in words else len(words)
    try:
        _, rest = parser.parse_known_args(words[:at], arguments)
        if hasattr(arguments, "host") and not any(word.startswith("-") for word in rest):
            arguments.ports, rest = [parse_port(word) for word in rest], []
    except Unfit as unfit:
        parser.error(f"{unfit.problem}; expected: {unfit.hint}")
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.to_run = words[at + 1 :]
    if arguments.command == "connect":
        if len(arguments.ports) != 1:
            parser.error("give one PORT to connect to")
    elif hasattr(arguments, "host") and bool(arguments.ports) == bool(arguments.resources):
        parser.error("give a PORT, or a resource by -r/--resource ID, but not both")
    if at < len(words) and (arguments.command != "knock" or not arguments.to_run):
        parser.error("-- stands behind 'knock HOST PORT', and in front of a COMMAND")
    return arguments


def allow_hangup() -> None:
    """Take SIGHUP from now on, and the one that has come since our start."""
    signal = sys.modules.get("signal")  # who has blocked it has imported that
    if signal and hasattr(signal, "SIGHUP"):  # Windows has none
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGHUP])


def run_command(arguments: argparse.Namespace) -> int:
    """Do what the command line says; returns the exit status. Raises UserError."""
    if arguments.command == "server":
        begin_service(arguments)
    allow_hangup()
    is_server = arguments.command in ("server", "service", "status")
    name = "letmeind.conf" if is_server else "letmein.conf"
    home = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    homes = () if is_server else (f"{home}/letmein",)
    places = [f"{place}/{name}" for place in (*homes, *CONFIG_PLACES)]
    path = arguments.config or next(filter(os.path.exists, places), places[-1])
    if arguments.command == "gen-key":
        user = arguments.user
        with contextlib.suppress(ConfigError):  # one needs a key before there is a file
            user = read_config(path, False).default_user if user is None else user
        try:
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # type: ignore
            key = AESGCM.generate_key(8 * KEY_SIZE)
        except ImportError:
            key = os.urandom(KEY_SIZE)
        print(f"{user or 0:08X} = {key.hex().upper()}")
        return 0
    if arguments.command == "service":
        print(service_file(arguments.kind, path, arguments.user), end="")
        return 0

    config = read_config(path, is_server)
    serving = arguments.command == "server" and not arguments.check
    for warning in () if serving else config.warnings:
        warn(warning)
    if arguments.dns:
        warn("--dns and --dns-crypt are obsolete; the system resolves names")
    config = config._replace(seccomp=arguments.seccomp or config.seccomp)
    if arguments.command == "server":
        return serve(config, arguments)
    if arguments.command == "status":
        return status(config, arguments.rundir, arguments.json)
    if arguments.to_run and config.seccomp != "off":
        hint = "use connect, or --seccomp off"
        raise UserError("COMMAND would run with the filter that seccomp gives the client", hint)
    system_call_filter(config.seccomp, CLIENT_CALLS)()
    client = Client(config, arguments)
    if arguments.to_run or arguments.command == "connect":
        return client.hold()
    done = client.ask_all(KNOCK if arguments.command == "knock" else REVOKE)
    return 0 if done == client.resources else 1


def main(argv: Sequence[str] | None = None) -> int:
    """The program: returns the exit status, 0 for success, 1 for failure (2: bad usage)."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if words[:1] == [NETWORK_COMMAND]:
            network_process(*words[1:])
            return 0
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
    except (UserError, OSError) as error:
        if isinstance(error, OSError):
            drop_output()  # or Python tries again at its end to write what is left, and says so
        if not isinstance(error, BrokenPipeError):
            tell_error(error)
        return 1


if __name__ == "__main__":
    sys.exit(main())
