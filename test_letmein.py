"""Tests of letmein.py on the real kernel, by its command line, its log, the wire and nft.

The lab is in .ci/lab: two hosts in network namespaces, servers, clients, attackers, models. No test
needs root, but for those that say so; nothing outlives the process that runs them. The sections
follow the rooms of letmein.py, from Protocol to Command line; then comes what takes all of it.

    What is claimed                                 Where it is proven
    A knock opens its port, for its address alone   TestPackets.test_knock_and_revoke
    A lease ends on time, by the kernel alone       TestTime, TestExactly
    A stop removes all that the server installed    TestRules.test_a_stop_removes_everything
    Leases live through crashes and reloads         TestAdopt, TestHeal
    What others plant or prolong is put right       TestHeal
    Server, kernel and `status` agree at all times  TestAnything
    A reload ends what the file forbids now         TestSighup
    Client and server work with the reference's     TestReference, test_vector
    Files mean what they mean to the reference      test_accepted, test_rejected_option
    No message holds a key                          test_no_message_holds_a_key
    One ssh command opens, connects and shuts       TestConnect, TestSsh
    A command runs while its ports are open         TestCommand
    An error says what is wrong, and what to do     TestWords, test_every_message_keeps_the_rules
    Dead addresses and lost packets cost little     TestDeadAddress, TestLossyPath
    A knock imports no more than it needs           TestImports
    The log is short, whole, and nobody's weapon    TestLogUnderAttack, TestUnreadLog
    The documents are right, their recipes work     TestDocuments, TestRecipes, TestFail2ban

    Who attacks                                     What shows how far they get
    A stranger                                      TestWire, test_nobody_gets_in_without_the_key
    A replayer                                      TestWire, TestRepeats
    A man in the middle                             TestThreats
    A flooder                                       TestFloods, TestMany, TestLogUnderAttack
    A user with a key                               TestPackets.test_a_resource_of_another_user
    Who takes the network process over              TestTakeover, TestNetworkProcess
    ... and goes on from there                      TestPrivileges, TestSeccomp, TestEgress
    A local user of the server                      test_file_mode, TestCounters.test_who_may_ask
"""

from __future__ import annotations

import ast
import bisect
import collections
import contextlib
import dis
import errno
import fcntl
import functools
import hashlib
import hmac
import importlib.machinery
import importlib.metadata
import importlib.util
import ipaddress
import itertools
import json
import math
import os
import platform
import pwd
import re
import resource as limits
import select
import selectors
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import sysconfig
import tempfile
import termios
import textwrap
import threading
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import CodeType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

# isort: off
sys.path.insert(0, str(Path(__file__).resolve().parent / ".ci"))
from lab.documents import (
    DOCUMENTS, OPENWRT_FUNCTIONS, OPENWRT_PROGRAMS, OPENWRT_RC, DocumentHost, FleetHost, Recipe,
    Said, Sayings, assert_parses, document_block, document_section, documents, failure, fenced,
    helps, letmein_words, log_events, objection, option_names, program, prose, service,
    unit_settings,
)
from lab.firewall import (
    BOOT, DOOR, MEANINGS, OPENS, TRUTH_RESOURCES, TRUTH_RULES, Following, Remaining, WatchedNft,
    agree, comment, delete_a_rule, delete_the_rules, delete_the_sets, delete_the_sets_alone,
    egress_rules, flush_all_chains, flush_and_reload, flush_the_chain, jumps, kernel,
    load_the_file_again, looks_until, milliseconds_left, nft_do, our_rules, restore_what_was_saved,
    rows, status,
)
from lab.floods import Attacker, flood_case, storm
from lab.hosts import (
    CLIENT_4, CLIENT_6, CLIENT_CONF, HERE, JUMP_RULESET, KEYS, LETMEIN, LIMIT_S, MS_BIND, NFT,
    OTHER_4, OTHER_6, REJECT, RESOURCES, SECCOMP, SERVER_4, SERVER_6, TICK_S, Ending, Lab, Result,
    alive, call_libc, children_s, client_conf, cpu_seconds, environment, eventually, inodes,
    keys_in, keys_text, memory_of, need_root, need_seccomp, on_a_terminal, proc_limit, proc_status,
    python, resident_kb, run, seccomp_for, server_conf, server_for, things_of, unmeasured,
)
from lab.models import (
    KEY, NFTABLES, NO_TOKEN, OTHER_KEY, RANDOM_RESOURCES, RECORDED, RESOURCE, THE_TOKEN, USER,
    VARIANTS, BothProcesses, Conversation, Feeder, Held4And6, LoneMonitor, SocketModule, Talker,
    World, is_done, lone_monitor, met, monitor_text, new_client, parse, plain, rejection, sealed,
    server_text, settle,
)
from lab.servers import (
    HOLD_CONF, HOLD_RESOURCES, HOLD_SERVER, PATIENT_CONF, REFERENCE_ACCOUNT, SANDBOX_ACCOUNT,
    SLOW_PLACES, UNMEASURED, Heard, Mute, ReferenceServer, Running, Server, Shared, Sshd, activated,
    adjusted, altered, assert_grammar, assert_lives, assert_no_traceback, assert_serves, child_of,
    confined, counted, crash, happened, looks, patched, quiet, reconfigure, reference,
    reference_client, reference_server, replaced, server_is_back, shell, slow_at, status_socket,
    with_attack, without_refresh,
)
from lab.wire import (
    ANYBODY, BASIC_AUTH, CHALLENGE, COMEIN, DROPPED, GOAWAY, KNOCK, MAGIC, NO_AUTH, POLICIES,
    RESPONSE, REVOKE, TOKEN, ZEROS, Door, FakeServer, HangsUp, Peer, Reply, Service,
    after_challenge, attempt, byte_57, echo, ends, flipped, handshake, knock_all, message,
    refused_burst, refused_knock, reply, says, shut_soon, slowly, two_knocks,
)
import letmein
from letmein import Message
# isort: on


# ----------------------------------------------------------------------------
# 1  Protocol
#
# Messages and the handshake, by the rules alone: without a kernel, and without any rights.
# ----------------------------------------------------------------------------

# name, operation, user, resource, salt, auth, and what AUTH was made from: key and token, if any
VECTORS = [
    pytest.param(
        0, 0xA423DDA7, 0xBC5D8077, "4a" * 8,
        "6399e5e0ff16219a5ebf6299c41dca189a2f7619bd0ab2ea5f81b8aef9fe0600",
        "9e" * 32, "00" * 32, id="knock",
    ),
    pytest.param(
        5, 0xA423DDA7, 0xBC5D8077, "4a" * 8,
        "b4bb7a905b52ef9d7eddbb030a7f7bd75d565a880ff3cb83a54e64a676828ef8",
        "9e" * 32, "00" * 32, id="revoke",
    ),
    pytest.param(1, 0x280D04F3, 0xE2EE7397, "91" * 8, "b8" * 32, "", "", id="challenge"),
    pytest.param(
        2, 0x280D04F3, 0xE2EE7397, "62" * 8,
        "ac41973381d5934958ac028899fb90a130bc94eb6e8c54808d21931debb9ca2a",
        "6b" * 32, "b8" * 32, id="response",
    ),
    pytest.param(3, 0xF90201B2, 0xB3E46B6C, "9a" * 8, "00" * 32, "", "", id="comein"),
    pytest.param(4, 0xFFFFFFFF, 0xFFFFFFFF, "8c" * 8, "00" * 32, "", "", id="goaway"),
]  # fmt: skip


@pytest.mark.parametrize("operation, user, resource, salt, auth, key, token", VECTORS)
def test_vector(
    operation: int, user: int, resource: int, salt: str, auth: str, key: str, token: str
) -> None:
    """Messages on the wire are those of the reference, byte for byte."""
    wire = bytes.fromhex(f"3b1bb719{operation:08x}{user:08x}{resource:08x}{salt}{auth}")
    fields = (operation, user, resource, bytes.fromhex(salt), bytes.fromhex(auth))
    assert Message(*fields).encode() == wire
    assert Message.decode(wire) == fields
    if key:
        made = Message(*fields).authenticate(bytes.fromhex(key), bytes.fromhex(token))
        assert made.hex() == auth


@pytest.mark.parametrize(
    "wire",
    [
        pytest.param(b"", id="empty"),
        pytest.param(bytes.fromhex("3b1bb719") + bytes(51), id="55 bytes"),
        pytest.param(bytes.fromhex("3b1bb719") + bytes(53), id="57 bytes"),
        pytest.param(bytes.fromhex("3b1bb718") + bytes(52), id="wrong magic"),
        pytest.param(bytes.fromhex("19b71b3b") + bytes(52), id="little-endian magic"),
        pytest.param(bytes.fromhex("3b1bb71900000006") + bytes(48), id="operation 6"),
        pytest.param(bytes.fromhex("3b1bb71901000000") + bytes(48), id="little-endian operation"),
        pytest.param(bytes.fromhex("3b1bb719ffffffff") + bytes(48), id="operation FFFFFFFF"),
    ],
)
def test_no_message(wire: bytes) -> None:
    """Whatever has a wrong length, magic or operation is no message."""
    with pytest.raises(letmein.ProtocolError) as error:
        Message.decode(wire)
    said = "it speaks another protocol"
    if len(wire) == 56 and wire[:4] == letmein.MAGIC:
        said = f"unknown operation {int.from_bytes(wire[4:8], 'big')}"
    assert str(error.value) == said


# How many times as many examples `make fuzz` tries, 0 for the suite, where they are the same each
# time.
FUZZ = int(os.environ.get("FUZZ", "0"))


def examples(number: int) -> settings:
    return settings(
        deadline=None,
        database=None,
        derandomize=not FUZZ,
        max_examples=number * (FUZZ or 1),
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )


PROPERTY = examples(100)


@PROPERTY
@given(st.binary(max_size=60) | st.binary(min_size=52, max_size=52).map(letmein.MAGIC.__add__))
def test_decode_is_the_inverse_of_encode_or_an_error(data: bytes) -> None:
    """Any bytes are a message that encodes to the same bytes, or an error."""
    try:
        message = Message.decode(data)
    except letmein.ProtocolError:
        return
    assert message.encode() == data


_lab: list[Lab] = []


@pytest.fixture(scope="session")
def lab() -> Lab:
    if not _lab:
        _lab.append(Lab())
    return _lab[0]


@pytest.fixture(scope="class")
def shared(lab: Lab) -> Iterator[Shared]:
    """What lends the tests of a class their server."""
    shared = Shared(lab)
    yield shared
    shared.stop()


@pytest.fixture
def server(shared: Shared) -> Iterator[Server]:
    """A server with RESOURCES, with nothing open."""
    with shared.lend(server_conf()) as server:
        yield server


@pytest.mark.parametrize("operation", [KNOCK, REVOKE])
@pytest.mark.parametrize("policy", letmein.POLICIES)
def test_client_and_server_agree(operation: int, policy: str) -> None:
    """A handshake grants what was asked for before COMEIN, and no salt comes twice."""
    client, server = new_client(operation), Conversation(policy)
    request = Message.decode(next(client))
    assert request[:3] == (operation, USER, RESOURCE)

    verdict = server.receive(request.encode())
    challenge = Message.decode(verdict.reply)
    assert (verdict.reason, verdict.challenge) == ("", None)
    assert challenge[:3] == (CHALLENGE, USER, RESOURCE)
    assert challenge.auth == Conversation.TOKENS[operation]

    response = Message.decode(client.send(verdict.reply))
    granted = server.receive(response.encode())
    assert (granted.reply, met(granted)) == (b"", operation), "the firewall comes before COMEIN"

    last = Message.decode(letmein.unsigned(COMEIN, USER, RESOURCE))
    assert last[:3] == (COMEIN, USER, RESOURCE) and last.auth == NO_TOKEN
    assert is_done(client, last.encode())
    salts = {m.salt for m in (request, challenge, response, last)}
    assert len(salts) == 4, "each message has a fresh salt"


NOBODY, PEER = (0xFFFFFFFF, 0xFFFFFFFF), (USER, RESOURCE)
FIRST = sealed(KNOCK)


def right_taken_away(server: Conversation) -> bytes:
    server.receive(FIRST)
    server.rights[RESOURCE] = "taken away meanwhile"
    verdict = server.receive(sealed(RESPONSE, THE_TOKEN))
    assert (verdict.reason, verdict.challenge) == ("taken away meanwhile", None)
    return verdict.reply


def key_taken_away(server: Conversation) -> bytes:
    server.receive(FIRST)
    server.handshake = server.handshake._replace(key_of=lambda user: None)
    verdict = server.receive(sealed(RESPONSE, THE_TOKEN, letmein.NOBODYS_KEY))
    assert (verdict.reason, verdict.challenge) == ("wrong RESPONSE", None)
    return verdict.reply


def speaks(*messages: bytes) -> Callable[[Conversation], bytes]:
    """A peer that sends these messages, of which the last is an error."""

    def talk(server: Conversation) -> bytes:
        for data in messages[:-1]:
            verdict = server.receive(data)
            assert not verdict.reason and Message.decode(verdict.reply).operation == CHALLENGE
        verdict = server.receive(messages[-1])
        assert verdict.reason and verdict.challenge is None
        return verdict.reply

    return talk


# what the peer has proved before its error (0 nothing, 1 basic-auth, 2 full-auth; -1: never mind,
# it says what only a server says, and gets no answer), the ids in a GOAWAY, and the peer
WRONG_STEPS = [
    pytest.param(0, NOBODY, speaks(sealed(RESPONSE)), id="RESPONSE first"),
    *(
        pytest.param(-1, NOBODY, speaks(sealed(operation)), id=f"{operation} first")
        for operation in (CHALLENGE, COMEIN, GOAWAY)
    ),
    pytest.param(0, (7, RESOURCE), speaks(sealed(KNOCK, user=7)), id="unknown user"),
    pytest.param(0, PEER, speaks(sealed(KNOCK, key=OTHER_KEY)), id="wrong key"),
    pytest.param(0, PEER, speaks(sealed(REVOKE, key=OTHER_KEY)), id="wrong key, REVOKE"),
    pytest.param(0, PEER, speaks(plain(KNOCK)), id="no auth"),
    pytest.param(0, PEER, speaks(flipped(FIRST, 55)), id="last byte of auth"),
    pytest.param(0, PEER, speaks(sealed(KNOCK, THE_TOKEN)), id="basic auth with a token"),
    pytest.param(1, (USER, 7), speaks(sealed(KNOCK, resource=7)), id="resource refused"),
    *(
        pytest.param(
            1 if operation in (KNOCK, REVOKE) else -1,
            PEER,
            speaks(FIRST, sealed(operation, THE_TOKEN)),
            id=f"{operation} for RESPONSE",
        )
        for operation in (KNOCK, CHALLENGE, COMEIN, GOAWAY, REVOKE)
    ),
    pytest.param(1, PEER, speaks(FIRST, FIRST), id="the same KNOCK twice"),
    pytest.param(
        1, (7, RESOURCE), speaks(FIRST, sealed(RESPONSE, THE_TOKEN, user=7)), id="changed user"
    ),
    pytest.param(
        1, (USER, 7), speaks(FIRST, sealed(RESPONSE, THE_TOKEN, resource=7)), id="changed resource"
    ),
    pytest.param(
        1, PEER, speaks(FIRST, sealed(RESPONSE, THE_TOKEN, OTHER_KEY)), id="wrong full auth"
    ),
    pytest.param(1, PEER, speaks(FIRST, sealed(RESPONSE)), id="RESPONSE without the token"),
    pytest.param(1, PEER, speaks(FIRST, sealed(RESPONSE, KEY)), id="RESPONSE to another token"),
    pytest.param(1, PEER, speaks(FIRST, plain(RESPONSE)), id="RESPONSE without auth"),
    pytest.param(
        1, PEER, speaks(FIRST, flipped(sealed(RESPONSE, THE_TOKEN), 55)), id="last byte"
    ),
    pytest.param(
        1, PEER, speaks(sealed(REVOKE), sealed(RESPONSE, NO_TOKEN)), id="REVOKE without the token"
    ),
    pytest.param(1, PEER, key_taken_away, id="key taken away"),
    pytest.param(2, PEER, right_taken_away, id="right taken away"),
]


@pytest.mark.parametrize("udp", [False, True], ids=["tcp", "udp"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("proved, ids, talk", WRONG_STEPS)
def test_error_policy(
    policy: str,
    proved: int,
    ids: tuple[int, int],
    talk: Callable[[Conversation], bytes],
    udp: bool,
) -> None:
    """Each fault is answered with GOAWAY if the policy allows it, else with silence."""
    server = Conversation(policy, letmein.NO_AUTH if udp else letmein.BASIC_AUTH)
    reply = talk(server)
    if udp and server.ids == PEER and proved == 1:
        proved = 0  # who answers wrongly may never have knocked
    if proved < POLICIES[policy]:
        assert reply == b""
    else:
        goaway = Message.decode(reply)
        assert goaway[:3] == (GOAWAY, *ids) and goaway.auth == NO_TOKEN


@pytest.mark.parametrize("policy", letmein.POLICIES)
def test_unknown_user_and_wrong_key_look_the_same(policy: str) -> None:
    """No policy tells a stranger which users exist."""
    replies = []
    knocks = {"unknown user": sealed(KNOCK, user=7), "wrong key": sealed(KNOCK, key=OTHER_KEY)}
    for reason, data in knocks.items():
        verdict = Conversation(policy).receive(data)
        assert verdict.reason == reason, "in the log alone"
        reply = verdict.reply
        replies.append((verdict.challenge, len(reply), reply[:8], reply[24:]))
    assert replies[0] == replies[1]


FORGED = st.builds(
    lambda operation, key, token: sealed(operation, token, key),
    st.integers(0, 5),
    st.just(OTHER_KEY) | st.binary(min_size=32, max_size=32).filter(lambda key: key != KEY),
    st.sampled_from([NO_TOKEN, THE_TOKEN]),
)
STREAM = st.lists(st.sampled_from(RECORDED), max_size=4).map(b"".join)


@PROPERTY
@given(
    st.lists(
        st.binary(max_size=60)
        | st.sampled_from([*RECORDED, b"echo", b"echo as RESPONSE"])
        | FORGED
        | st.tuples(STREAM, st.integers(0, 224), st.integers(0, 224)).map(
            lambda cut: cut[0][min(cut[1:]) : max(cut[1:])]
        ),
        max_size=6,
    ),
    st.sampled_from(sorted(letmein.POLICIES)),
)
def test_nobody_gets_in_without_the_key(sent: list[bytes], policy: str) -> None:
    """Recorded, forged and echoed messages, in any order and pieces, grant nothing."""
    server = Conversation(policy)
    last = b""
    for data in sent:
        if data.startswith(b"echo"):
            data = last if data == b"echo" else last[:4] + RESPONSE.to_bytes(4, "big") + last[8:]
        try:
            message = Message.decode(data)
        except letmein.ProtocolError:
            continue
        # Wherever in a conversation it comes.
        for server.ids in (None, (message.user, message.resource), (USER, RESOURCE)):
            verdict = server.receive(data)
            last = verdict.reply or last
            assert verdict.challenge is None
            allowed = (GOAWAY,) if verdict.reason else (CHALLENGE,)
            assert not verdict.reply or Message.decode(verdict.reply).operation in allowed


def test_client_proves_the_key_for_the_servers_token() -> None:
    """The client's two messages prove the key: the first alone, the second for the token."""
    client = new_client()
    request = Message.decode(next(client))
    assert request.auth == request.authenticate(KEY, NO_TOKEN)
    challenge = Message(CHALLENGE, USER, RESOURCE, bytes(8), THE_TOKEN)
    response = Message.decode(client.send(challenge.encode()))
    assert response[:3] == (RESPONSE, USER, RESOURCE)
    assert response.auth == response.authenticate(KEY, THE_TOKEN)


@pytest.mark.parametrize("ids", [(7, RESOURCE), (USER, 7), NOBODY])
def test_client_warns_of_foreign_ids_and_goes_on(ids: tuple[int, int]) -> None:
    """A reply with other ids than asked for costs a warning, not the knock."""
    warnings: list[str] = []
    client = new_client(KNOCK, warnings)
    next(client)
    response = Message.decode(client.send(plain(CHALLENGE, *ids)))
    assert response[:3] == (RESPONSE, USER, RESOURCE)
    assert len(warnings) == 1
    assert is_done(client, plain(COMEIN, *ids)) and len(warnings) == 2
    assert f"{ids[0]:08X}" in warnings[0] and f"{ids[1]:08X}" in warnings[0]


@pytest.mark.parametrize("challenged", [False, True])
@pytest.mark.parametrize("operation", range(6), ids=letmein.OPERATIONS)
def test_client_takes_only_what_is_due(operation: int, challenged: bool) -> None:
    """The client takes a CHALLENGE, then COMEIN; anything else is an error."""
    client = new_client()
    next(client)
    if challenged:
        client.send(plain(CHALLENGE))
    if operation == (COMEIN if challenged else CHALLENGE):
        assert is_done(client, plain(operation)) == challenged
        return
    with pytest.raises(letmein.ProtocolError) as error:
        client.send(plain(operation))
    if operation == GOAWAY:
        assert str(error.value) == "the server rejected the request"
        assert isinstance(error.value, letmein.Rejection)
        assert error.value.is_challenged == challenged
    else:
        due = "COMEIN" if challenged else "CHALLENGE"
        assert str(error.value) == f"{letmein.OPERATIONS[operation]} instead of {due}"


def test_client_says_each_message() -> None:
    """What --verbose prints of a handshake."""
    said: list[str] = []
    client = letmein.client_handshake(KNOCK, USER, RESOURCE, KEY, said.append, said.append)
    next(client)
    client.send(plain(CHALLENGE))
    assert is_done(client, plain(COMEIN))
    assert said == [
        "sending KNOCK for resource BC5D8077", "received CHALLENGE",
        "sending RESPONSE for resource BC5D8077", "received COMEIN",
    ]  # fmt: skip


@PROPERTY
@given(st.lists(st.binary(max_size=60) | st.sampled_from(RECORDED), max_size=4))
def test_client_survives_any_server(sent: list[bytes]) -> None:
    """Whatever a server sends, only CHALLENGE and COMEIN make a success."""
    client = new_client()
    next(client)
    done = False
    with contextlib.suppress(letmein.ProtocolError):
        for data in sent:
            done = is_done(client, data)
            if done:
                break
    assert not done or [data[:8] for data in sent[:2]] == [
        plain(CHALLENGE)[:8], plain(COMEIN)[:8],
    ]  # fmt: skip


# ------------------------------------------------------------------ tokens

WINDOW_S = letmein.TOKEN_WINDOW_S


def test_a_token_is_good_once() -> None:
    """The next request gets another one, and a repeated RESPONSE to the latest gets its answer."""
    tokens = letmein.Tokens(bytes(32))
    given = []
    for operation in (COMEIN, GOAWAY, COMEIN):
        given.append(tokens.new(b"facts", KNOCK, 1000))
        for answer in (None, operation):
            possible = tokens.challenges(b"facts", 1000, 5)
            (challenge,) = [each for each in possible if each.token == given[-1]]
            assert (challenge.operation, challenge.outcome) == (KNOCK, answer)
            if answer is None:
                tokens.note_outcome(challenge, operation)
    possible = tokens.challenges(b"facts", 1000, 5)
    assert {each.token for each in possible}.intersection(given) == {given[2]}
    assert len(set(given)) == 3


@pytest.mark.parametrize("given_at", [0.0, 1000.0, 1004.9])
@pytest.mark.parametrize("patience, least", [(0, 0), (5, 5), (60, 60), (1000, 60)])
def test_how_long_a_token_lives(given_at: float, patience: float, least: float) -> None:
    """For patience, of which 60 s count, and up to two windows more."""
    for age, is_alive in ((0, True), (least, True), (least + 2 * WINDOW_S, False)):
        tokens = letmein.Tokens(bytes(32))
        token = tokens.new(b"facts", KNOCK, given_at)
        possible = tokens.challenges(b"facts", given_at + age, patience)
        assert (token in [each.token for each in possible]) == is_alive


@pytest.mark.parametrize(
    "answered, patience, remembered, oldest",
    [
        pytest.param({198: 4}, 60, [198], 189, id="just not too many"),
        pytest.param({198: 1, 199: 1, 200: 4}, 60, [200], 200, id="the oldest go"),
        pytest.param({200: 5}, 60, [], 201, id="older than the latest two"),
        pytest.param({201: 5, 202: 3}, 60, [201, 202], 189, id="the latest two stay"),
        pytest.param({199: 1, 200: 1}, 5, [200], 200, id="out of time"),
    ],
)
def test_answers_that_are_remembered(
    monkeypatch: pytest.MonkeyPatch,
    answered: dict[int, int],
    patience: float,
    remembered: list[int],
    oldest: int,
) -> None:
    """By window how many were given, with a limit of 4: some go, and with them all tokens of their
    window and of those before."""
    monkeypatch.setattr(letmein, "SPENT_LIMIT", 4)
    tokens = letmein.Tokens(bytes(32))
    for window, number in answered.items():
        for name in range(number):
            tokens.note_outcome(letmein.Challenge(KNOCK, b"", window, bytes([name])), COMEIN)
    possible = list(tokens.challenges(b"facts", 202 * WINDOW_S, patience))
    assert list(tokens.spent) == remembered
    assert sorted({each.window for each in possible}) == list(range(oldest, 203))


# ----------------------------------------------------------------------------
# 2  Configuration
#
# Each file is read as documented, or refused with a message that names line and option.
# ----------------------------------------------------------------------------

KEY_TEXT = "0123456789abcdefABCDEF0123456789" * 2
OVER_TCP, OVER_UDP, EITHER = ("tcp",), ("udp",), ("tcp", "udp")
ALWAYS, BASIC, FULL = (letmein.POLICIES[p] for p in ("always", "basic-auth", "full-auth"))
LONG_NAME = "Az09_-." * 9 + "x"

# section, line, field of Config, value
ACCEPTED = [
    *(("GENERAL", f"debug = {word}", "debug", True) for word in ("true", "1", "Yes", " ON ")),
    *(("GENERAL", f"debug ={word}", "debug", False) for word in ("False", "0", "no", "oFF")),
    ("GENERAL", "port = 1", "port", 1),
    ("GENERAL", "port=65535", "port", 65535),
    ("GENERAL", "port = 0x16A8", "port", 5800),
    ("GENERAL", "port = 0005801", "port", 5801),
    ("GENERAL", "port = 1 / 2", "port", 2),
    ("GENERAL", "port = udp", "port", 5800),
    ("GENERAL", "port = 5800", "protocols", OVER_TCP),
    ("GENERAL", "port = 5800/udp", "protocols", OVER_UDP),
    ("GENERAL", "port = 5800 / UDP , tcp", "protocols", EITHER),
    ("GENERAL", "port = tcp/udp/5800", "protocols", EITHER),
    ("GENERAL", "control-timeout = 0x10", "control_timeout", 16),
    ("GENERAL", "control-timeout = +7", "control_timeout", 7),
    ("GENERAL", "control-timeout = 0x+7", "control_timeout", 7),
    ("GENERAL", "control-timeout = 0", "control_timeout", 0),
    ("GENERAL", "control-timeout = -0", "control_timeout", 0),
    ("GENERAL", "control-timeout = .5", "control_timeout", 0.5),
    ("GENERAL", "control-timeout = +.5", "control_timeout", 0.5),
    ("GENERAL", "control-timeout = 5.", "control_timeout", 5),
    ("GENERAL", "control-timeout = 1e-3", "control_timeout", 0.001),
    ("GENERAL", "control-timeout = 1E3", "control_timeout", 1000),
    ("GENERAL", "control-timeout = 4294967295", "control_timeout", 4294967295),
    ("GENERAL", "control-timeout = " + "0" * 5000 + "8", "control_timeout", 8),
    ("GENERAL", "control-timeout = \u00a0.5\u3000", "control_timeout", 0.5),
    ("GENERAL", "control-error-policy = always", "error_policy", ALWAYS),
    ("GENERAL", "control-error-policy = Basic-Auth ", "error_policy", BASIC),
    ("GENERAL", "control-error-policy = FULL-AUTH", "error_policy", FULL),
    *(("GENERAL", f"seccomp = {word}", "seccomp", word.lower()) for word in ("off", "LOG", "Kill")),
    ("KEYS", f"2A = {KEY_TEXT}", "keys", {0x2A: bytes.fromhex(KEY_TEXT)}),
    ("KEYS", f"+000002a ={KEY_TEXT} ", "keys", {0x2A: bytes.fromhex(KEY_TEXT)}),
    ("KEYS", f"FFFFFFFF =\t{KEY_TEXT}", "keys", {0xFFFFFFFF: bytes.fromhex(KEY_TEXT)}),
    ("KEYS", f"1 = {KEY_TEXT}\u3000", "keys", {1: bytes.fromhex(KEY_TEXT)}),
    ("KEYS", "1 = " + "0" * 63 + "1", "keys", {1: bytes(31) + b"\1"}),
    ("NFTABLES", "exe = /opt/nft \t", "nft", "/opt/nft"),
    *(("NFTABLES", f"family = {word}", "family", word) for word in ("inet", "ip", "ip6")),
    ("NFTABLES", f"table = {LONG_NAME}", "table", LONG_NAME),
    ("NFTABLES", f"chain-input = {LONG_NAME}", "chains", {"input": LONG_NAME}),
    ("NFTABLES", "chain-forward = F", "chains", {"input": "LETMEIN", "forward": "F"}),
    ("NFTABLES", "chain-output = O", "chains", {"input": "LETMEIN", "output": "O"}),
    ("NFTABLES", "max-nr-rules = 0x10", "max_nr_rules", 16),
    ("NFTABLES", "max-nr-rules = 4294967295", "max_nr_rules", 1_000_000),
    # the grammar, seen through options that keep their text
    ("NFTABLES", "exe = a # b", "nft", "a # b"),
    ("NFTABLES", "exe = a=b", "nft", "a=b"),
    ("NFTABLES", "  exe = indented", "nft", "indented"),
    ("NFTABLES", "exe = a  \n \t b\n\tc", "nft", "a   b c"),
    ("NFTABLES", "exe =\n  a", "nft", "a"),
    ("NFTABLES", "exe = a\n # b", "nft", "a # b"),
    ("NFTABLES", "exe = a\n [KEYS]", "nft", "a [KEYS]"),
    ("NFTABLES", "exe = a\n b = c", "nft", "a b = c"),
    ("NFTABLES", "exe = a\n\n timeout = 5", "nft", "a"),
    ("NFTABLES", "exe = a\n \t\n timeout = 5", "nft", "a"),
    ("NFTABLES", "exe = a\n# b\n timeout = 5", "nft", "a"),
    ("NFTABLES", "exe = a\r\n  b\r\n\r\n # c\r", "nft", "a b"),
    ("NFTABLES", "exe = a\u2028b\x0bc", "nft", "a\u2028b\x0bc"),
    ("GENERAL", "port = 5801\n  / udp", "protocols", OVER_UDP),
    ("GENERAL", "# debug = yes\n  # debug = yes", "debug", False),
    ("GENERAL", "Debug = yes", "debug", False),
    (" GENERAL ", "debug = yes", "debug", False),
    ("GENERAL", "debug = yes\n[X]\na = 1\nA = 1\n\n  [Y] \na = 1", "debug", True),
]


@pytest.mark.parametrize("section, line, field, value", ACCEPTED)
def test_accepted(section: str, line: str, field: str, value: object) -> None:
    """Each option takes the values that the reference takes, with the same meaning."""
    assert getattr(parse(server_text(section, line)), field) == value


@pytest.mark.parametrize("server", [True, False])
def test_defaults(server: bool) -> None:
    """An option that is missing has its documented default."""
    config = parse(server_text("GENERAL") if server else "", server)
    assert (config.port, config.protocols, config.control_timeout) == (5800, OVER_TCP, 5)
    assert (config.debug, config.seccomp, config.error_policy) == (False, "off", ALWAYS)
    assert (config.default_user, config.keys, config.resources) == (0, {}, {})
    assert ["no user has a key" in warning for warning in config.warnings] == [True] * server
    chains = {"chain-input": "LETMEIN" if server else None, "chain-forward": None}
    table = {"exe": "nft", "family": "inet" * server, "table": "filter" * server}
    assert config.fixed_options() == {**table, **chains, "chain-output": None, "seccomp": "off"}
    if server:
        assert (config.nft, config.max_nr_rules) == ("nft", 100)
        assert config.chains == {"input": "LETMEIN"}


def test_sections_of_the_other_program_are_not_read() -> None:
    """The client ignores the server's sections, and the server the client's."""
    assert parse("[CLIENT]\ndefault-user = 2A\n[NFTABLES]\nfamily = x\n", False).default_user == 42
    assert parse(server_text("CLIENT", "default-user = nobody")).default_user == 0


def jump(
    *hooks: str, timeout: float = 600, users: frozenset[int] = frozenset()
) -> tuple[object, ...]:
    """What a jump resource comes to; a hook is "input:TARGET", with "!" for input-match."""
    jumps = tuple((h.split(":")[0], h.split(":")[1].rstrip("!"), h[-1] == "!") for h in hooks)
    return (0, (), jumps, timeout, users)


NO_USERS: frozenset[int] = frozenset()


@pytest.mark.parametrize(
    "text, resource",
    [
        ("port: 22", (22, OVER_TCP, (), 600, NO_USERS)),
        ("port : 0x16 / UDP", (22, OVER_UDP, (), 600, NO_USERS)),
        ("port:+22/udp , Tcp/ tcp", (22, EITHER, (), 600, NO_USERS)),
        ("udp / timeout: .5 / port: 65535", (65535, OVER_UDP, (), 0.5, NO_USERS)),
        ("port: 22 / users: 1, 0000002a ,+3, 1", (22, OVER_TCP, (), 600, frozenset({1, 42, 3}))),
        ("port: 22\n  / users: 1\n  / timeout: 9", (22, OVER_TCP, (), 9, frozenset({1}))),
        ("port: " + "0" * 5000 + "22", (22, OVER_TCP, (), 600, NO_USERS)),
        ("jump / input: A", jump("input:A")),
        ("input: A / jump / input-match: saddr", jump("input:A!")),
        (
            "jump/forward:B/output:C/output-match:saddr/users:7/timeout:1",
            jump("forward:B", "output:C!", timeout=1, users=frozenset({7})),
        ),
        ("jump / forward: B / input-match: saddr", jump("forward:B")),
        ("jump / input: A / jump / input: B", jump("input:B")),
        ("jump / output: " + LONG_NAME, jump("output:" + LONG_NAME)),
    ],
)
@pytest.mark.parametrize("server", [True, False])
def test_accepted_resource(text: str, resource: tuple[object, ...], server: bool) -> None:
    """A resource may be written in all ways that the reference takes."""
    config = parse(server_text("RESOURCES", f"0000002a = {text}"), server)
    found = config.resources[0x2A]
    assert (found.port, found.protocols, found.jumps, found.timeout, found.users) == resource


def test_resources_take_the_default_timeout_wherever_it_stands() -> None:
    """[NFTABLES] timeout counts for resources above it, too."""
    text = server_text(
        "RESOURCES", "1 = port: 22", "2 = jump / input: A", "3 = port: 1 / timeout:2"
    )
    config = parse(text + "timeout = 50.5\n")
    assert [config.resources[i].timeout for i in (1, 2, 3)] == [50.5, 50.5, 2]


def test_users_rights() -> None:
    """A user may have what is for everybody or for them, and never the control port."""
    text = server_text("RESOURCES", "1 = port: 22 / users: A", "2 = port: 80", "3 = port: 5800")
    config = parse(text)
    assert not config.why_not(0xA, 1) and not config.why_not(0xB, 2)
    assert config.why_not(0xB, 1) == "resource not allowed for this user"
    assert config.why_not(0xA, 4) == "unknown resource"
    assert config.why_not(0xA, 3) == "port 5800 is the control port"


# section, line, what the hint names: each is wrong in line 2, in the option the line begins with
REJECTED_OPTIONS = [
    *(("GENERAL", f"debug = {word}", "yes") for word in ("", "2", "tru", "y e s", "yes # no")),
    *(
        ("GENERAL", f"port = {text}", "5800|65535|port:")
        for text in (
            "", "65536", "0x10000", "-1", "+5800", "0x+16", "0x", "0xZZ", "58_00", "58 00", "0X16",
            "\u0665\u0668\u0660\u0660", "tls", "5800 /", "5800/tcp,", "5800 / tcp, 5900",
            "port: 5800", "5800 / tcp: x", ": 5800", "5800 # control",
        )
    ),
    *(
        ("GENERAL", f"control-timeout = {text}", "seconds")
        for text in (
            "", "inf", "-inf", "nan", "infinity", "-1", "-.1", "4294967296", "4294967295.5",
            "1e400", "1e10", ".", "e5", "1e", "1.2.3", "1_0", "1 0", "0x1.5", "\u0665", "5s",
        )
    ),
    *(
        ("GENERAL", f"control-timeout = {text}", f"write {seconds}$")
        for text, seconds in (("90s", 90), ("10m", 600), (" 1 h ", 3600), ("2d", 172800))
    ),
    ("GENERAL", "control-error-policy = basic_auth", "basic-auth"),
    ("GENERAL", "control-error-policy =", "always"),
    ("GENERAL", "seccomp = on", "kill"),
    *(("KEYS", f"{text} = {KEY_TEXT}", "hex") for text in ("100000000", "0x1", "g", "-1", "1 2")),
    # The reference takes leading zeros without end; SPEC does not.
    *(("KEYS", f"{text} = {KEY_TEXT}", "hex") for text in ("000000001", "+00000001", "\u0661")),
    ("KEYS", f"1 = {KEY_TEXT[1:]}", "64 hex"),
    ("KEYS", f"1 = {KEY_TEXT}0", "64 hex"),
    ("KEYS", f"1 = {KEY_TEXT[:-1]}g", "64 hex"),
    ("KEYS", f"1 = +{KEY_TEXT[1:]}", "64 hex"),
    ("KEYS", f"1 = {KEY_TEXT[:32]} {KEY_TEXT[32:]}", "64 hex"),
    ("KEYS", f"1 = {KEY_TEXT} # alice", "64 hex"),
    ("KEYS", "1 =", "64 hex"),
    ("KEYS", "1 = " + "0" * 64, "64 hex"),
    ("KEYS", "1 = " + "f" * 64, "64 hex"),
    ("KEYS", "1 = " + "F" * 64, "64 hex"),
    ("RESOURCES", "x = port: 22", "hex"),
    *(
        ("RESOURCES", f"1 = {text}", hint)
        for text, hint in (
            ("", "port: N"), ("tcp", "port: N"), ("port", "port: N"), ("Port: 22", "port: N"),
            ("22", "port: N"), ("Jump / input: A", "jump"), ("port: 22 / jump", "port: N"),
            ("jump / port: 22 / input: A", "port: N"), ("jump: A / input: A", "jump"),
            ("port: 0", "1 to 65535"), ("port: 65536", "65535"), ("port: -1", "65535"),
            ("port:", "65535"), ("port: ssh", "65535"), ("port: 22, 23", "65535"),
            ("port: 22 / port: 22", "port once"), ("port: 22 / sctp", "tcp"), ("port: 22 /", "tcp"),
            ("port: 22 / tcp,", "tcp"), ("port: 22 / input: A", "port: N"),
            ("port: 22 / : x", "port:"), ("port: 22 / proto: tcp", "port: N"),
            ("port: 22 / Timeout: 5", "timeout"),
            ("port: 22 / timeout:", "seconds"), ("port: 22 / timeout: 1, 2", "seconds"),
            ("port: 22 / timeout: 1 / timeout: 1", "timeout"), ("port: 22 / timeout: x", "seconds"),
            ("port: 22 / users:", "hex"), ("port: 22 / users: 1,", "hex"),
            ("port: 22 / users: 1,, 2", "hex"), ("port: 22 / users: alice", "hex"),
            ("port: 22 / users: 1 / users: 2", "users"), ("port: 22 / users: 1:2", "hex"),
            ("jump", "input: CHAIN"), ("jump / input-match: saddr", "input: CHAIN"),
            ("jump / tcp / input: A", "jump"), ("jump / input: A / jump, jump", "jump"),
            ("jump / input:", "1 to 64"), ("jump / input: a b", "1 to 64"),
            ("jump / input: A, B", "1 to 64"), ("jump / input: A, B / input: A", "1 to 64"),
            (f"jump / forward: {'x' * 65}", "1 to 64"), ("jump / output: \u00e4", "1 to 64"),
            ("jump / input: A / input-match: daddr", "saddr"),
            ("jump / input: A / input-match: daddr / input-match: saddr", "saddr"),
            ("jump / input: A / output-match: Saddr", "saddr"),
            ("jump / input: A / users:", "hex"), ("jump / input: A / timeout: inf", "seconds"),
            ("jump / input: A / timeout: 1 / timeout: 1", "timeout"),
            ("jump / input: A / users: 1 / users: 1", "users"), ("jump / prerouting: A", "jump"),
        )
    ),
    *(("NFTABLES", f"family = {word}", "inet") for word in ("", "Inet", "arp", "inet ip")),
    *(
        ("NFTABLES", f"{option} = {text}", "1 to 64")
        for option in ("table", "chain-input", "chain-forward", "chain-output")
        for text in ("", "a b", "a/b", "a;b", "x" * 65, "\u00e4")
    ),
    ("NFTABLES", "timeout = never", "seconds"),
    ("NFTABLES", "max-nr-rules = -1", "number"),
    ("NFTABLES", "max-nr-rules = 4294967296", "number"),
    ("NFTABLES", "max-nr-rules = 1e3", "number"),
]  # fmt: skip


@pytest.mark.parametrize("section, line, hint", REJECTED_OPTIONS)
def test_rejected_option(section: str, line: str, hint: str) -> None:
    """A bad value is refused with file, line, section, option, and what is right."""
    error = rejection(server_text(section, line))
    name = ascii(line.partition("=")[0].strip())[1:-1]
    assert error.problem.startswith(f"f.conf:2: [{section}] {name}: ")
    assert re.search(hint, error.hint)


# the text of a file, the start of the error behind "f.conf:", its hint behind "expected: "
SAID = [
    ("[GENERAL]\ndebug = ja", "2: [GENERAL] debug: 'ja' is not valid",
     "one of: true, 1, yes, on, false, 0, no, off"),
    ("[GENERAL]\nport = tls", "2: [GENERAL] port: 'tls' is not valid",
     "such as '5800', '5800/udp' or '5800 / tcp, udp'"),
    ("[RESOURCES]\n1 = jump / input: A / input-match: daddr",
     "2: [RESOURCES] 1: input-match: 'daddr' is not valid", "saddr"),
    ("[GENERAL]\ncontrol-timeout = 10m", "2: [GENERAL] control-timeout: '10m' has a unit",
     "seconds, from 0 to 4294967295; write 600"),
    ("[GENERAL]\ndebug yes", "2: 'debug yes' is neither a section nor an option",
     "a line such as [GENERAL], or NAME = VALUE below one"),
    ("debug = yes", "1: 'debug' is in no section", "a line such as [GENERAL] above it"),
    ("[KEYS]\n1 = " + "0" * 64,
     "2: [KEYS] 1: this key is all 0, which anybody can guess",
     "64 hex digits, as 'letmein gen-key' prints them"),
    ("[KEYS]\n1 = " + "fF" * 32,
     "2: [KEYS] 1: this key is all f, which anybody can guess", "64 hex digits"),
    ("[KEYS]\n1 = " + "0" * 63, "2: [KEYS] 1: this key has 63 characters, not 64", "64 hex"),
    ("[KEYS]\n1 = " + "O" * 64, "2: [KEYS] 1: this key has characters that are not hex digits",
     "64 hex digits"),
    (f"[KEYS]\n1 = {KEY_TEXT}\n  # alice", "2: [KEYS] 1: this key has 72 characters, not 64",
     "64 hex digits, as 'letmein gen-key' prints them; a comment needs a line of its own"),
    (f"[KEYS]\n1 = {KEY_TEXT}\n01 = {KEY_TEXT}",
     "3: [KEYS] 01: user 00000001 has a key already, at f.conf:2", "each user once"),
    ("[RESOURCES]\n1 = port: 22\n2 = port: 22",
     "3: [RESOURCES] 2: resource 00000001 has port 22, at f.conf:2", "each port once"),
    ("[RESOURCES]\n1 = port: 22\n01 = port: 23",
     "3: [RESOURCES] 01: resource 00000001 appears twice, first at f.conf:2", "each id once"),
    ("[RESOURCES]\n1 = port: 22 / input: A",
     "2: [RESOURCES] 1: a port and a jump need a resource each", letmein.RESOURCE_SYNTAX),
    ("[RESOURCES]\n1 = jump", "2: [RESOURCES] 1: this jump has no chain to jump to", "'port: N"),
    ("[RESOURCES]\n1 = port: 22 / timeout: 1h", "2: [RESOURCES] 1: timeout: '1h' has a unit",
     "seconds, from 0 to 4294967295; write 3600"),
    ("[RESOURCES]\n1 = tcp", "2: [RESOURCES] 1: this is neither a port nor a jump", "'port: N"),
    ("[RESOURCES]\n1 = port: 22 / proto: x", "2: [RESOURCES] 1: 'proto' is unknown here",
     "'port: N"),
]  # fmt: skip


@pytest.mark.parametrize("text, start, expected", SAID)
@pytest.mark.parametrize("server", [True, False])
def test_what_an_error_says(text: str, start: str, expected: str, server: bool) -> None:
    """Where it is, what is there unless it is a key, and what was expected."""
    error = rejection(f"{text}\n{server_text('NFTABLES')}", server)
    assert error.problem == f"f.conf:{start}"
    assert error.hint.startswith(f"expected: {expected}")


K1 = f"1 = {KEY_TEXT}"


@pytest.mark.parametrize(
    "text, start, hint",
    [
        pytest.param("\ndebug = yes", "2: ", "[GENERAL]", id="option outside of a section"),
        pytest.param("[]", "1: ", "[GENERAL]", id="empty section name"),
        pytest.param("# a\n[GENERAL", "2: ", "[GENERAL]", id="section without ]"),
        pytest.param("[", "1: ", "[GENERAL]", id="section that only begins"),
        pytest.param("[GENERAL] # x", "1: ", "[GENERAL]", id="comment behind a section"),
        pytest.param("[A]\n[B]\n [A]", "3: ", "once", id="section twice"),
        pytest.param("[GENERAL]\ndebug", "2: ", "=", id="no ="),
        pytest.param("[GENERAL]\n\n  debug", "3: ", "=", id="indented, no ="),
        pytest.param("[GENERAL]\n= yes", "2: ", "=", id="no name"),
        pytest.param("[A]\n  = yes", "2: ", "=", id="indented, no name"),
        pytest.param(
            "[GENERAL]\ndebug = 1\ndebug=1", "3: [GENERAL] debug: ", "once", id="option twice"
        ),
        pytest.param("[A]\nb = 1\r\n\r\nb =1", "4: [A] b: ", "once", id="twice, unknown section"),
        pytest.param(f"[KEYS]\n{K1}\n{K1}", "3: [KEYS] 1: ", "once", id="key twice"),
        pytest.param(
            f"[KEYS]\n{K1}\n0000000{K1}", "3: [KEYS] 00000001: ", "once", id="key 1 and 00000001"
        ),
        pytest.param(
            "[RESOURCES]\na = port: 1\n\n0A = jump / input: A",
            "4: [RESOURCES] 0A: ", "once", id="resource a and 0A",
        ),
        pytest.param(
            "[RESOURCES]\n1 = port: 22 / tcp / users: 1\n2 = port: 0x16 / udp / users: 2",
            "3: [RESOURCES] 2: ", "once", id="port twice",
        ),
        pytest.param("[GENERAL]\nport = 1\n  / sctp", "2: [GENERAL] port: ", "tcp", id="continued"),
        pytest.param("[GENERAL]\ndebug = 1\n # x", "2: [GENERAL] debug: ", "yes", id="# continues"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("server", [True, False])
def test_rejected_file(text: str, start: str, hint: str, server: bool) -> None:
    """A bad line is refused with its number and with what is right."""
    error = (
        rejection(text, server) if not server else rejection(f"{text}\n{server_text('NFTABLES')}")
    )
    assert error.problem.startswith(f"f.conf:{start}")
    assert hint in error.hint


def test_user_limits() -> None:
    """[USERS] limits the time of a lease and the last day of a key, which ends in UTC."""
    lines = ["[RESOURCES]", "1 = port: 22 / timeout: 60", "2 = port: 23 / timeout: 5", "[USERS]"]
    limits = ["1 = timeout: 9", "2 = not-after: 9999-12-31 / timeout: 7"]
    limits.append("3 = not-after: 2020-02-29")
    keys = [f"{user} = {user:064}" for user in (1, 2, 3, 4)]
    text = "\n".join([*lines, *limits, "[KEYS]", *keys, server_text("NFTABLES")])
    config = parse(text)
    terms = {
        user: [config.longest_lease(user, each) for each in config.resources.values()]
        for user in config.keys
    }
    assert terms == {1: [9, 5], 2: [7, 5], 3: [0, 0], 4: [60, 5]}
    assert config.limits[3].ends == 1582934400 + 24 * 60 * 60  # date -d 2020-02-29T00:00Z +%s
    assert config.why_not(3, 1) == "the user's last day was 2020-02-29"
    assert not any(config.why_not(user, 1) for user in (1, 2, 4))
    assert config.warnings == (
        "f.conf:7: [USERS] 3: this day has passed: the user can no longer open anything",
    )
    (warning,) = parse(text.replace(keys[0], "")).warnings[:-1]
    assert warning == "f.conf:5: [USERS] 1: user 00000001 has no key in [KEYS]"
    assert parse("[USERS]\n1 = nonsense", server=False).warnings == ()


@pytest.mark.parametrize(
    "line, problem, hint",
    [
        ("1 = not-after: 2027-02-31", "there is no 2027-02-31 in the calendar", "YYYY-MM-DD"),
        ("1 = not-after: 0000-01-01", "there is no 0000-01-01 in the calendar", "YYYY-MM-DD"),
        ("1 = not-after: 12027-01-31", "'12027-01-31' is not valid", "YYYY-MM-DD"),
        ("1 = not-after: 2027-W01-1", "'2027-W01-1' is not valid", "YYYY-MM-DD"),
        ("1 = not-after: 20270131", "'20270131' is not valid", "YYYY-MM-DD"),
        ("1 = not-after: \u0662027-01-31", "is not valid", "YYYY-MM-DD"),
        ("1 = not-after: 2027-01-31T00:00", "'2027-01-31T00:00' is not valid", "YYYY-MM-DD"),
        ("1 = not-after:", "'' is not valid", "YYYY-MM-DD"),
        ("1 = timeout: 0", "with a timeout of 0 the user can open nothing", "more than 0"),
        ("1 = timeout: -1", "'-1' is out of range", "4294967295"),
        ("1 = timeout: 1 / timeout: 2", "'timeout' is unknown here, or appears twice", "not-after"),
        ("1 = port: 22", "'port' is unknown here", "timeout: SECONDS / not-after"),
        ("1 =", "'' is unknown here", "timeout: SECONDS"),
        ("root = timeout: 5", "'root' is not valid", "hex digits"),
        ("1 = timeout: 5\n01 =", "user 00000001 has limits already, at f.conf:2", "each user once"),
    ],
)
def test_bad_user_limits(line: str, problem: str, hint: str) -> None:
    """Limits that make no sense are refused, with what is right."""
    error = rejection(server_text("USERS", *line.split("\n")))
    assert error.problem.startswith("f.conf:") and "[USERS]" in error.problem
    assert problem in error.problem and hint in error.hint


def test_default_user_must_be_an_id() -> None:
    """A default-user that is no id is refused."""
    error = rejection("\n[CLIENT]\ndefault-user = root\n", server=False)
    assert error.problem.startswith("f.conf:3: [CLIENT] default-user: ") and "hex" in error.hint


@pytest.mark.parametrize("option", NFTABLES)
def test_required(option: str) -> None:
    """The server's file must name family, table and chain; the error says which is missing."""
    lines = [f"{name} = {value}" for name, value in NFTABLES.items() if name != option]
    error = rejection("\n".join(["[GENERAL]", "[NFTABLES]", *lines]))
    assert error.problem.startswith(f"f.conf:2: [NFTABLES] {option}: ") and option in error.hint


@pytest.mark.parametrize(
    "text, start, words",
    [
        ("[GENERL]\ndebug = 1", "f.conf:1: [GENERL]", "GENERAL"),
        ("[general]", "f.conf:1: [general]", "GENERAL"),
        ("[GENERAL]\n\ndebgu = 1", "f.conf:3: [GENERAL] debgu:", "debug"),
        ("[GENERAL]\nPort = 1", "f.conf:2: [GENERAL] Port:", "port"),
        ("[CLIENT]\ndefault_user = 1", "f.conf:2: [CLIENT] default_user:", "default-user"),
        ("[ZZZZZZ]", "f.conf:1: [ZZZZZZ]", ""),
        ("[GENERAL]\ncontrol-error-timeout = 1", "f.conf:2: [GENERAL] control-error-timeout: ",
         ": is unknown and ignored; did you mean control-timeout?"),
        ("[GENERAL]\nport = 5800/udp", "f.conf", "basic-auth"),
        ("[RESOURCES]\n\n1 = jump / forward: A", "f.conf:3: [RESOURCES] 1:", "chain-forward"),
        (
            "[RESOURCES]\n2 = jump / input: A / output: A",
            "f.conf:2: [RESOURCES] 2:",
            "chain-output",
        ),
        ("[RESOURCES]\n2 = port: 5800", "f.conf:2: [RESOURCES] 2:", "control port"),
        ("[RESOURCES]\n1 = jump / input: A / forward-match: saddr", "f.conf:2: [RESOURCES] 1:",
         "forward-match limits nothing: there is no forward: CHAIN"),
        ("[GENERAL]\ncontrol-timeout = 0", "f.conf: [GENERAL] control-timeout:", "TCP"),
        (
            "[RESOURCES]\n\n2 = port: 22 / users: 1, 2A",
            "f.conf:3: [RESOURCES] 2:",
            "user 0000002A has no key in [KEYS]",
        ),
    ],
)
def test_warning(text: str, start: str, words: str) -> None:
    """It says where, and what is wrong there."""
    (warning,) = parse(f"{text}\n{server_text('KEYS', K1)}").warnings
    assert warning.startswith(start) and words in warning and "\n" not in warning
    assert warning.count("did you mean") <= 1


@pytest.mark.parametrize(
    "lines",
    [
        ("port = 5800 / tcp, udp", "control-error-policy = basic-auth"),
        ("port = 5800 / udp", "control-error-policy = full-auth"),
        ("port = 5800 / tcp", "control-error-policy = always"),
    ],
)
def test_no_reflector_no_warning(lines: tuple[str, ...]) -> None:
    """No warning where the server answers no forged sender."""
    assert not parse(server_text("GENERAL", *lines) + f"[KEYS]\n{K1}\n").warnings


def test_warnings_come_before_an_error(tmp_path: Path) -> None:
    """[NFTABLE] is the reason why nothing in [NFTABLES] is set; and a file with an error may still
    have a key that others can read."""
    path = tmp_path / "letmeind.conf"
    path.write_text(server_text("GENERAL").replace("NFTABLES", "NFTABLE"))
    path.chmod(0o644)
    lines = program("-c", path, "server", "--check").stderr.splitlines()
    assert [line for line in lines if "chown" not in line] == [
        f"letmein: warning: {path}: mode 644 lets other users of this machine read or change it;"
        f" chmod 600 {path}",
        f"letmein: warning: {path}:2: [NFTABLE] is unknown and ignored; did you mean NFTABLES?",
        f"letmein: error: {path}:1: [NFTABLES] family: is not set",
        "  expected: family, table and chain-input, as in nftables.conf",
    ]


FRAGMENTS = st.sampled_from(
    [
        "[GENERAL]\n", "[KEYS]\n", "[RESOURCES]\n", "[NFTABLES]\n", "[CLIENT]\n", "[X]\n", "[", "]",
        "debug =", "port =", "control-timeout =", "1 =", "00000001 = ", "family = inet\n",
        "timeout=", "table = t\n", "chain-input = c\n", "max-nr-rules = ", "default-user = ",
        KEY_TEXT, "5800", "port: 22", "jump", " / ", "input: A", "users: 1", "timeout: ", ",", ":",
        ".5", "1e3", "0x", "+", "\n", "\r\n", "\n  ", "#", "=", "\x1f", "\u3000", "\u0665", "\x00",
        "\ud800", "'", '"', "\\",
    ]
)  # fmt: skip


@examples(400)
@given(st.text() | st.lists(FRAGMENTS, max_size=25).map("".join), st.booleans())
@example("[GENERAL]\ncontrol-timeout = .5\x1f", False)
@example("[CLIENT]\ndefault-user = 1\x1f", False)
@example(f"[KEYS]\n1 = {KEY_TEXT}\u00a0", False)
@example("[GENERAL]\nport = " + "0" * 5000 + "1", False)
def test_any_text_is_a_config_or_a_config_error(text: str, server: bool) -> None:
    """Any text is read, or refused in printable words with a line and a hint."""
    for candidate in (text, f"{server_text('NFTABLES')}\n{text}"):
        try:
            config = parse(candidate, server)
        except letmein.ConfigError as error:
            assert re.match(r"f\.conf:[0-9]+: ", error.problem) and error.hint
            assert (error.problem + error.hint).isprintable()
        else:
            assert all(warning.isprintable() for warning in config.warnings)


PLACES = [
    "{}", "[{}]", "[{}", "[{}] x", "[{0}]\n[{0}]", "[{0}]\n{0}", "[{}]\na = 1\na = 1", "[X]\n{}",
    "[X]\n{0} = 1\n{0} = 1", "[GENERAL]\n{} = 1", "[GENERAL]\ndebug = {}", "[GENERAL]\nport = {}",
    "[GENERAL]\nport = 1 / {}", "[GENERAL]\nport = {}: x", "[GENERAL]\ncontrol-timeout = {}",
    "[GENERAL]\ncontrol-error-policy = {}", "[GENERAL]\nseccomp = {}", "[CLIENT]\n{} = 1",
    "[CLIENT]\ndefault-user = {}", "[KEYS]\n{}", "[KEYS]\n1 = {}", "[KEYS]\n1 = x\n  {}",
    "[KEYS]\n{} = 1", "[KEYS]\n{0} = {0}", "[KEYS]\n1 = {0}\n1 = {0}", "[KEYS]\n1 = {0}\n01 = {0}",
    "[RESOURCES]\n{} = port: 22", "[RESOURCES]\n1 = {}", "[RESOURCES]\n1 = port: {}",
    "[RESOURCES]\n1 = port: 22 / {}", "[RESOURCES]\n1 = port: 22 / tcp, {}",
    "[RESOURCES]\n1 = port: 22 / {}: 1", "[RESOURCES]\n1 = port: 22 / users: 1, {}",
    "[RESOURCES]\n1 = port: 22 / timeout: {}", "[RESOURCES]\n1 = jump / input: {}",
    "[RESOURCES]\n1 = jump / input: A / input-match: {}", "[RESOURCES]\n1 = jump / {}: A",
    *(f"[NFTABLES]\n{name} = {{}}" for name in (*NFTABLES, "timeout", "max-nr-rules", "{}")),
]  # fmt: skip
A_KEY = st.binary(min_size=32, max_size=32).map(bytes.hex)

PASTED = (
    A_KEY.map(str.upper)
    | A_KEY.map(lambda key: key[:-1])
    | A_KEY.map(lambda key: key + "0")
    | st.builds(lambda key, at, bad: key[:at] + bad + key[at + 1 :], A_KEY, st.integers(0, 63),
                st.sampled_from("GgOlxz +-.:"))
    | st.builds(lambda key, n, by: by.join(re.findall(f".{{{n}}}", key)), A_KEY,
                st.sampled_from([2, 4, 8, 16]), st.sampled_from(":- ._"))
    | st.builds(lambda key, n: re.sub(f"(.{{{n}}}).", r"\1O", key), A_KEY, st.sampled_from([9, 15]))
)  # fmt: skip


@examples(400)
@given(PASTED, st.sampled_from(PLACES), st.booleans())
@example(":".join(["c3"] * 32), "[KEYS]\n{} = 1", False)
@example(("0123456789ABCDE" + "O") * 4, "[RESOURCES]\n1 = port: {}", True)
def test_no_message_holds_a_key(pasted: str, place: str, server: bool) -> None:
    """No error and no warning repeats 16 digits of what may be a key, wherever it was pasted."""
    text = place.replace("{0}", pasted).replace("{}", pasted)
    try:
        messages = [*parse(f"{text}\n{server_text('NFTABLES')}", server).warnings]
    except letmein.ConfigError as error:
        messages = [error.problem, error.hint]
    digits = re.sub("[^0-9a-z]", "", pasted.lower())
    for said in messages:
        seen = re.sub("[^0-9a-z]", "", said.lower())
        leaks = [at for at in range(len(digits) - 15) if digits[at : at + 16] in seen]
        assert not leaks, said


def test_missing_file(tmp_path: Path) -> None:
    """Without a file the client takes the defaults, and the server refuses to start."""
    path = str(tmp_path / "absent.conf")
    config = letmein.read_config(path, False)
    assert (config.path, config.port, config.keys, config.warnings) == (path, 5800, {}, ())
    with pytest.raises(letmein.ConfigError) as error:
        letmein.read_config(path, True)
    assert path in error.value.problem and "name one with -c" in error.value.hint


@pytest.mark.parametrize("server", [True, False])
@pytest.mark.parametrize(
    "data, start, hint",
    [
        pytest.param(b"[X]\n# caf\xe9\n", "2: ", "UTF-8", id="Latin-1"),
        pytest.param(b"[X]\r\na = 1\r\nb = \xc3", "3: ", "UTF-8", id="UTF-8, cut off"),
        pytest.param("[X]\n".encode("utf-16"), "1: ", "UTF-8", id="UTF-16"),
        pytest.param(b"[X]\n\na = \0\n", "3: ", "UTF-8", id="NUL byte"),
        # str.strip() takes 1C to 1F for white space; Unicode and the reference do not
        pytest.param(b"[GENERAL]\ndebug = yes\x1f\n", "2: ", "", id="control character"),
        pytest.param(b"[CLIENT]\n[GENERAL]\x1c\n", "2: ", "", id="control character at ]"),
        pytest.param(b"[X]\n" + b"a" * 10_000_000, "", "bytes", id="a line of 10 MB"),
        pytest.param(b"x" * 4_000_000, "1: ", "[GENERAL]", id="a line of 4 MB"),
        pytest.param(b"[X]\n" + b" " * 4_000_000 + b"=", "2: ", "=", id="4 MB of blanks"),
    ],
)
def test_bad_file(tmp_path: Path, data: bytes, start: str, hint: str, server: bool) -> None:
    """A file that is no text, or far too long, is refused in a short message."""
    path = tmp_path / "bad.conf"
    path.write_bytes(data)
    with pytest.raises(letmein.ConfigError) as error:
        letmein.read_config(str(path), server)
    assert error.value.problem.startswith(f"{path}:{start}")
    assert len(error.value.problem) < len(str(path)) + 200
    assert hint in error.value.problem + error.value.hint


def test_a_byte_order_mark(tmp_path: Path) -> None:
    """Some editors begin a file with one, and it is invisible: it is taken."""
    path = tmp_path / "letmein.conf"
    path.write_text("[GENERAL]\nport = 5801\n", "utf-8-sig")
    assert letmein.read_config(str(path), False).port == 5801


class Included(NamedTuple):
    """What `include` meets: files of d/ by name, what make() does to d/, and what is said."""

    files: dict[str, str]
    said: str
    pattern: str = "d/*.conf"
    make: Callable[[Path], object] = lambda directory: None


def fill(directory: Path, number: int, text: str) -> None:
    for index in range(number):
        (directory / f"{index:05}.conf").write_text(text)


def add_secret(directory: Path, name: str) -> None:
    """A link that leads to a file that whoever owns its directory can replace."""
    directory.with_name("home").mkdir(0o777)
    directory.with_name("home").chmod(0o777)
    directory.with_name("home").joinpath(name).write_text("[KEYS]\n")
    (directory / name).symlink_to(f"../home/{name}")


KEY_2 = f"[KEYS]\n\n2 = {OTHER_KEY.hex()}\n"

BAD_INCLUDES = {
    "another section": Included({"a.conf": "[GENERAL]\n"}, "d/a.conf:1: [GENERAL] is not for an"),
    "an error": Included({"a.conf": "[KEYS]\n2 = x\n"}, "d/a.conf:2: [KEYS] 2: this key has 1 "),
    "an id twice": Included(
        {"a.conf": KEY_2, "b.conf": KEY_2},
        "d/b.conf:3: [KEYS] 2: user 00000002 has a key already, at HERE/d/a.conf:3\n",
    ),
    "an id of the main file": Included(
        {"a.conf": KEY_2.replace("2 =", "01 =")},
        "d/a.conf:3: [KEYS] 01: user 00000001 has a key already, at HERE/letmeind.conf:4\n",
    ),
    "a resource twice": Included(
        {"a.conf": "[RESOURCES]\n1 = port: 1", "b.conf": "[RESOURCES]\n01 = port: 2"},
        "d/b.conf:2: [RESOURCES] 01: resource 00000001 appears twice, first at HERE/d/a.conf:2\n",
    ),
    "a port twice": Included(
        {"a.conf": "[RESOURCES]\n1 = port: 1", "b.conf": "[RESOURCES]\n2 = port: 1"},
        "d/b.conf:2: [RESOURCES] 2: resource 00000001 has port 1, at HERE/d/a.conf:2\n",
    ),
    "no such file": Included({}, "none.conf: cannot be read: No such file", "none.conf"),
    "a directory": Included({}, "d: not a regular file", "d"),
    "nothing": Included({}, ": not a regular file", ""),
    "a FIFO": Included(
        {}, "d/a.conf: not a regular file", make=lambda d: os.mkfifo(d / "a.conf")
    ),
    "a link that leads nowhere": Included(
        {}, "d/a.conf: cannot be read: No such file", make=lambda d: (d / "a.conf").symlink_to("x")
    ),
    "a loop of links": Included(
        {}, "d/a.conf: cannot be read: Too many levels",
        make=lambda d: (d / "a.conf").symlink_to("a.conf"),
    ),
    "10,000 files": Included({}, "more than 1000 files match", make=lambda d: fill(d, 10_000, "")),
    "large files": Included(
        {}, "too large", make=lambda d: fill(d, 5, "#" * 1_000_000)
    ),
    "a directory of others": Included(
        {"a.conf": ""}, "others may write to HERE/d\n", make=lambda d: d.chmod(0o775)
    ),
    "a link into a directory of others": Included(
        {}, "others may write to HERE/home\n", make=lambda d: add_secret(d, "a.conf")
    ),
    "a file that others may write to": Included(
        {"a.conf": ""}, "others may write to HERE/d/a.conf\n",
        make=lambda d: (d / "a.conf").chmod(0o620),
    ),
    "a file of somebody else": Included(
        {"a.conf": ""}, "others may write to HERE/d/a.conf\nchown root HERE/d/a.conf; chmod 600",
        make=lambda d: os.chown(d / "a.conf", 65534, 65534),
    ),
}  # fmt: skip


@pytest.fixture
def including(tmp_path: Path) -> Path:
    """The directory d/ beside a letmeind.conf with a key for user 1 that ends in `include`."""
    (tmp_path / "d").mkdir(0o755)
    path = tmp_path / "letmeind.conf"
    text = f"[KEYS]\n# a key\n\n1 = {KEY.hex()}\n{server_text('GENERAL', 'include = d/*.conf')}"
    path.write_text(text)
    path.chmod(0o600)
    return tmp_path / "d"


LONE_CONF = f"""
[GENERAL]
control-timeout = 0.5
[KEYS]
00000000 = {KEY.hex()}
A423DDA7 = {KEY.hex()}
[RESOURCES]
BC5D8077 = port: 22
000000FF = port: 80 / users: A423DDA7
"""


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    path = tmp_path / "letmein.conf"
    path.write_text(LONE_CONF)
    path.chmod(0o600)
    return path


def test_a_pattern_that_python_cannot_read(
    including: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some of these are errors in Python 3.9 and 3.10, as [z-a] is there."""
    conf = including.with_name("letmeind.conf")
    monkeypatch.setattr("glob.iglob", lambda _: re.compile("[z-a]"))
    with pytest.raises(letmein.ConfigError) as error:
        letmein.read_config(str(conf), True)
    assert "is no pattern: bad character range z-a" in error.value.problem


@pytest.mark.parametrize("name", BAD_INCLUDES)
def test_bad_include(including: Path, name: str) -> None:
    """What cannot be included is one error that names file and line, and keeps nobody waiting."""
    case, conf = BAD_INCLUDES[name], including.with_name("letmeind.conf")
    conf.write_text(conf.read_text().replace("d/*.conf", case.pattern))
    for file, text in case.files.items():
        (including / file).write_text(text)
    try:
        case.make(including)
    except OSError:
        return  # root of a user namespace, where nobody else can own a file
    with pytest.raises(letmein.ConfigError) as error:
        letmein.read_config(str(conf), True)
    said = f"{error.value.problem}\n{error.value.hint}"
    assert case.said.replace("HERE", str(including.parent)) in said
    assert said.count("\n") == 1 and error.value.hint


def test_include(including: Path) -> None:
    """Keys and resources come from all files that match, in the order of their names; what is
    wrong with a file's owner or mode is told; a client ignores the option, and says so."""
    conf = str(including.with_name("letmeind.conf"))
    (warning,) = letmein.read_config(conf, True).warnings
    assert "no file matches" in warning
    files = {"b": "[RESOURCES]\n3 = port: 3", "a": KEY_2 + "[RESOURCES]\n4 = port: 4"}
    for name, text in files.items():
        (including / f"{name}.conf").write_text(text)
        (including / f"{name}.conf").chmod(0o600)
    (including / "none.txt").write_text("?")
    config = letmein.read_config(conf, True)
    assert config.keys == {1: KEY, 2: OTHER_KEY}
    assert list(config.resources) == [4, 3]
    assert config.warnings == ()
    (including / "a.conf").chmod(0o644)
    (warning,) = letmein.read_config(conf, True).warnings
    assert warning.startswith(f"{including}/a.conf: mode 644")
    config = letmein.read_config(conf, False)
    assert config.keys == {1: KEY}
    assert ["include: belongs in the server's file" in each for each in config.warnings] == [True]


def test_include_below_a_directory_with_brackets(including: Path, tmp_path: Path) -> None:
    """The pattern is what the option says, and not where its file lies."""
    (including / "a.conf").write_text(KEY_2)
    (including / "a.conf").chmod(0o600)
    place = tmp_path.with_name(f"{tmp_path.name}[1]")
    shutil.copytree(including.parent, place)
    assert letmein.read_config(str(place / "letmeind.conf"), True).keys == {1: KEY, 2: OTHER_KEY}


@pytest.mark.parametrize(
    "text, told",
    [
        ("port 22", "'port 22'"),
        ("g" * 80, f"'{'g' * 80}'"),
        ("g" * 81, f"'{'g' * 80}...'"),
        ("\x1b[2J", "'\\x1b[2J'"),
        ("0" * 11 + "g" * 5, f"'{'0' * 11}{'g' * 5}'"),
        ("0" * 12 + "g" * 4, "'...'"),
        ("g" * 40 + "0" * 12 + "g" * 4, "'...'"),
        ("ABCDEF01" * 2, "'...'"),
        ("abcdef01" * 2, "'...'"),
        ("ab-cd-ef-01-ab-cd-ef-01", "'...'"),
        ("0xAB0XCD" * 4, "'...'"),
    ],
)
def test_what_a_message_shows_of_a_file(text: str, told: str) -> None:
    """Its start, without what a terminal would take for a command, and nothing like a key."""
    assert letmein.shown(text) == told


def test_a_long_path_is_told(including: Path) -> None:
    """Plain words are no key, however many of their letters are hex digits."""
    pattern = "customers/warehouse/berlin/backdoor/cameras/*.conf"
    path = including.with_name("letmeind.conf")
    path.write_text(path.read_text().replace("d/*.conf", pattern))
    (warning,) = letmein.read_config(str(path), True).warnings
    assert warning.endswith(f"no file matches '{pattern}'")


@pytest.mark.parametrize("server", [True, False])
def test_directory(tmp_path: Path, server: bool) -> None:
    """A directory in place of the file is named as one."""
    with pytest.raises(letmein.ConfigError, match=re.escape(str(tmp_path))) as error:
        letmein.read_config(str(tmp_path), server)
    assert "directory" in error.value.problem


@pytest.mark.parametrize("server", [True, False])
def test_unreadable_file(tmp_path: Path, server: bool) -> None:
    """A file that may not be read is an error, not a missing file."""
    path = tmp_path / "secret.conf"
    path.touch(0o000)
    uid = os.geteuid()
    try:
        if uid == 0:
            os.seteuid(65534)  # root may read everything
    except OSError:
        return  # root of a user namespace, who can be nobody else
    try:
        with pytest.raises(letmein.ConfigError, match="denied") as error:
            letmein.read_config(str(path), server)
        hint = "name another file with --config, or let this user read it"
        if not server:
            hint = "name a letmein.conf that you can read; the server's client-conf prints one"
        assert error.value.hint == hint
    finally:
        os.seteuid(uid)


@pytest.mark.parametrize(
    "server, mode, unsafe",
    [
        (True, 0o600, False), (True, 0o640, False), (True, 0o751, False), (True, 0o644, True),
        (True, 0o660, True), (True, 0o602, True), (False, 0o600, False), (False, 0o700, False),
        (False, 0o711, False), (False, 0o640, True), (False, 0o604, True), (False, 0o602, True),
    ],
)  # fmt: skip
def test_file_mode(tmp_path: Path, server: bool, mode: int, unsafe: bool) -> None:
    """Others' rights on the file are worth a warning with the chmod to run."""
    path = tmp_path / "letmein.conf"
    path.write_text(server_text("KEYS", K1))
    path.chmod(mode)
    warnings = [w for w in letmein.read_config(str(path), server).warnings if "chown" not in w]
    assert len(warnings) == unsafe
    assert all(f"{mode:o}" in warning and "chmod" in warning for warning in warnings)


@pytest.mark.parametrize("server", [True, False])
def test_file_owner(tmp_path: Path, server: bool) -> None:
    """A server's file that is not root's is worth a warning with the chown to run."""
    path = tmp_path / "letmein.conf"
    path.write_text(server_text("KEYS", K1))
    path.chmod(0o600)
    if os.geteuid() == 0:
        assert not letmein.read_config(str(path), server).warnings
        try:
            os.chown(path, 65534, 65534)
        except OSError:
            return  # root of a user namespace, where nobody else can own a file
    warnings = letmein.read_config(str(path), server).warnings
    assert ["chown root" in warning for warning in warnings] == ([True] if server else [])


class TestConfigurationPlaces:
    """Which file the client reads. (The places in /opt and /etc are others here.)"""

    @pytest.fixture
    def homes(self, lab: Lab) -> Path:
        directory = Path(tempfile.mkdtemp(dir=lab.directory))
        for place in ("xdg/letmein", "home/.config/letmein", "opt/letmein/etc", "etc"):
            (directory / place).mkdir(parents=True)
        return directory

    def write(self, directory: Path, place: str, mode: int = 0o600) -> Path:
        """A file of which an error tells that it was the one."""
        path = directory / place / "letmein.conf"
        path.write_text("[CLIENT]\ndefault-user = BAD0\n", encoding="utf-8")
        path.chmod(mode)
        return path

    def run(self, directory: Path, *words: str | Path, xdg: str | None = "xdg") -> str:
        """What the client says of a knock with the files there are."""
        env = {name: text for name, text in unmeasured().items() if name != "XDG_CONFIG_HOME"}
        env["HOME"] = str(directory / "home")
        if xdg is not None:
            env["XDG_CONFIG_HOME"] = str(directory / xdg) if xdg else ""
        script = (
            "import sys, letmein; letmein.CONFIG_PLACES = sys.argv[1:3]; sys.argv[1:3] = [];"
            "sys.exit(letmein.main())"
        )
        places = [str(directory / place) for place in ("opt/letmein/etc", "etc")]
        done = subprocess.run(
            [sys.executable, "-c", script, *places, *map(str, words), "knock", "::1", "22"],
            capture_output=True, encoding="utf-8", timeout=LIMIT_S, env=env, cwd=HERE,
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (1, "")
        return done.stderr

    def test_their_order(self, homes: Path) -> None:
        """From the last to the first, each wins over all before it."""
        places = [
            ("etc", "xdg"), ("opt/letmein/etc", "xdg"), ("home/.config/letmein", None),
            ("home/.config/letmein", ""), ("xdg/letmein", "xdg"),
        ]  # fmt: skip
        for place, xdg in places:
            path = self.write(homes, place)
            problem = f"letmein: error: {path}: [KEYS] has no key for user 0000BAD0\n"
            assert problem in self.run(homes, xdg=xdg)
        other = self.write(homes, "home")
        assert f"{other}: [KEYS]" in self.run(homes, "-c", other)

    def test_none_is_there(self, homes: Path) -> None:
        """Without any file the client says where it has looked."""
        said = self.run(homes)
        assert f"no configuration file, and so no key: {homes}/xdg/letmein/letmein.conf, " in said

    def test_verbose_says_which(self, lab: Lab, homes: Path) -> None:
        """--verbose names the file that was read."""
        path = homes / "xdg/letmein/letmein.conf"
        path.write_text(client_conf(timeout=0.1), encoding="utf-8")
        path.chmod(0o600)
        assert f" ms  read {path}: " in self.run(homes, "--verbose")

    @pytest.mark.parametrize("mode", [0o600, 0o604, 0o640, 0o620])
    def test_others_may_read_it(self, homes: Path, mode: int) -> None:
        """A file that others may read or change is worth a warning."""
        path = self.write(homes, "xdg/letmein", mode)
        rights = f"{path}: mode {mode:o} lets other users of this machine read or change it"
        rights += f"; chmod 600 {path}"
        assert (f"letmein: warning: {rights}\n" in self.run(homes)) == (mode != 0o600)


# ----------------------------------------------------------------------------
# 3  Client
#
# A knock opens the port wherever a server answers, and says what is wrong wherever none does.
# ----------------------------------------------------------------------------


LOOPBACK = ("127.0.0.1", 0)
GRANTS = [None, reply(CHALLENGE, USER, RESOURCE, TOKEN), None, reply(COMEIN, USER, RESOURCE)]


@pytest.mark.parametrize(
    "words, operation",
    [
        pytest.param("knock 127.0.0.1 22 -u A423DDA7 -P PORT", KNOCK, id="knock"),
        pytest.param("knock -4TuA423DDA7 127.0.0.1 22 -PPORT", KNOCK, id="in one word"),
        pytest.param("knock 127.0.0.1 22 --user=A423DDA7 -P=PORT", KNOCK, id="with ="),
        pytest.param("knock -u a423dda7 -P PORT 127.0.0.1 22", KNOCK, id="options first"),
        pytest.param("knock 127.0.0.1 -u A423DDA7 -P PORT 22", KNOCK, id="options between"),
        pytest.param("knock --seccomp off -u a423dda7 127.0.0.1 22 -P PORT", KNOCK, id="of all"),
        pytest.param("knock 127.0.0.1 -r BC5D8077 -u A423DDA7 -P PORT", KNOCK, id="resource"),
        pytest.param("knock 127.0.0.1 22 -4 -u A423DDA7 -T -P PORT", KNOCK, id="-4 -T"),
        pytest.param("knock 127.0.0.1 22 -u A423DDA7 -U -P PORT", KNOCK, id="UDP"),
        pytest.param("revoke 127.0.0.1 22 --user A423DDA7 --server-port PORT", REVOKE, id="revoke"),
        pytest.param("close 127.0.0.1 --resource BC5D8077 -u A423DDA7 -P PORT", REVOKE, id="close"),
    ],
)
def test_knock(conf: Path, words: str, operation: int) -> None:
    """Options in any order and spelling lead to the same knock."""
    with FakeServer("udp" if "-U" in words else "tcp", GRANTS, at=LOOPBACK) as server:
        done = program("-c", conf, *words.replace("PORT", str(server.port)).split())
    assert (done.returncode, done.stderr) == (0, "")
    assert "127.0.0.1" in done.stdout and len(done.stdout.splitlines()) == 1
    knock, response = map(Message.decode, server.heard)
    assert knock[:3] == (operation, USER, RESOURCE) and knock.proves(KEY, NO_TOKEN)
    assert response[:3] == (RESPONSE, USER, RESOURCE) and response.proves(KEY, TOKEN)


def test_warnings_do_not_keep_from_knocking(conf: Path) -> None:
    """A knock succeeds in spite of warnings, each of which is one line."""
    conf.write_text("[GENERL]\n" + LONE_CONF)
    conf.chmod(0o666)
    with FakeServer("tcp", GRANTS, at=LOOPBACK) as server:
        words = ["--dns", "quad9", "--dns-crypt", "tls", "knock", "127.0.0.1", "22"]
        words += ["-u", "A423DDA7", "-P", str(server.port)]
        done = program("-c", conf, "--seccomp", "off", *words)
    assert done.returncode == 0 and len(server.heard) == 2
    lines = done.stderr.splitlines()
    assert lines and all(line.startswith("letmein: warning: ") for line in lines)
    for word in ("GENERAL", "666", "--dns"):
        assert sum(word in line for line in lines) == 1, word


def test_verbose_and_main(conf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--verbose tells file and port, and never the key."""
    with FakeServer("tcp", GRANTS, at=LOOPBACK) as server:
        words = ["knock", "127.0.0.1", "22", "-u", "A423DDA7", "-P", str(server.port)]
        assert letmein.main(["-c", str(conf), "--verbose", *words]) == 0
    output = capsys.readouterr()
    assert str(conf) in output.err and str(server.port) in output.err
    assert KEY.hex() not in (output.out + output.err).lower()


def test_unknown_user(conf: Path) -> None:
    """A user without a key is named, with the file that was read."""
    text = failure(program("-c", conf, "knock", "127.0.0.1", "22", "-u", "123"))
    assert "00000123" in text and str(conf) in text


@pytest.mark.parametrize(
    "port", [pytest.param(23, id="nobody's"), pytest.param(80, id="another's")]
)
def test_port_without_a_resource(conf: Path, port: int) -> None:
    """A port that no resource of this user opens is named, and where to add it."""
    text = failure(program("-c", conf, "knock", "127.0.0.1", port))
    assert str(port) in text and "RESOURCES" in text


@pytest.mark.parametrize(
    "words, complaint",
    [
        pytest.param("knock no-such-host.invalid 22", "no-such-host.invalid", id="unresolvable"),
        pytest.param("knock no-such-host.invalid 22 -4 -6", "no-such-host.invalid", id="both"),
        pytest.param("knock ::1 22 -4", "::1", id="-4 with an IPv6 address"),
        pytest.param("knock 127.0.0.1 22 -6", "127.0.0.1", id="-6 with an IPv4 address"),
        pytest.param("knock 127.0.0.1 22 -4 -6", "IPv6", id="-4 -6 with an IPv4 address"),
        pytest.param("knock \x1b[2J 22", r"\x1b[2J", id="control characters"),
        pytest.param("revoke " + "x" * 70 + ".invalid 22", "invalid", id="label too long"),
    ],
)
def test_unreachable(conf: Path, words: str, complaint: str) -> None:
    """A host without an address of the wanted kind is one printable error."""
    assert complaint in failure(program("-c", conf, *words.split(" ")))


@pytest.mark.parametrize("protocol", ["-T", "-U"])
def test_refused_connection(conf: Path, protocol: str) -> None:
    """A port that nobody serves is an error that names the host."""
    with socket.socket() as unused, socket.socket(type=socket.SOCK_DGRAM) as unused_too:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        unused_too.bind(("127.0.0.1", port))
        unused_too.close()
        done = program("-c", conf, "knock", "127.0.0.1", "22", protocol, "-P", port)
    assert "127.0.0.1" in failure(done)


SERVER_SAYS = st.sampled_from(
    [plain(CHALLENGE), plain(CHALLENGE), plain(COMEIN), plain(COMEIN), plain(GOAWAY), bytes(56)]
) | st.binary(max_size=60)


def parts_of(stream: bytes, cuts: list[int]) -> list[bytes]:
    """A stream as it may come: in pieces."""
    ends = sorted({cut for cut in cuts if 0 < cut < len(stream)} | {len(stream)})
    return [stream[start:end] for start, end in zip([0, *ends], ends) if start < end]


@examples(100)
@given(
    st.lists(SERVER_SAYS, max_size=4),
    st.lists(st.integers(1, 230), max_size=6),
    st.booleans(),
    st.booleans(),
)
@example([plain(CHALLENGE), plain(COMEIN)], [1, 55, 57, 111], False, False)
@example([b"", plain(CHALLENGE), b"x", plain(COMEIN)], [], True, False)
def test_client_survives_any_bytes(
    said: list[bytes], cuts: list[int], udp: bool, hangs_up: bool
) -> None:
    """In whatever pieces they come: the client ends, with COMEIN or with an error in words."""
    messages = [data for data in said if len(data) == 56 or not udp]
    if udp:  # the same CHALLENGE again is passed over
        first = (messages or [b""])[0]
        is_new = [m[:16] + m[24:] != first[:16] + first[24:] for m in messages[1:]]
        if first[:8] == plain(CHALLENGE)[:8]:
            messages[1:] = itertools.compress(messages[1:], is_new)
    heard = b"".join(messages)
    first, second = heard[:56], heard[56:112]
    challenged = len(first) == 56 and first[:8] == plain(CHALLENGE)[:8]
    feeder = Feeder(list(said) if udp else parts_of(heard, cuts), udp, hangs_up)
    target = letmein.Target(socket.AF_INET, feeder.listener.getsockname())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(letmein, "socket", SocketModule(feeder))
        fed = SimpleNamespace(DefaultSelector=feeder.selector, EVENT_READ=selectors.EVENT_READ)
        patch.setattr(letmein, "selectors", fed)
        patch.setattr(letmein, "UDP_REPEAT_S", LIMIT_S)
        patch.setattr(letmein, "TCP_RETRY_S", 1e9)
        caller = object.__new__(letmein.Client)
        caller.protocol, caller.timeout = "udp" if udp else "tcp", 5.0
        caller.targets, caller.port = {"server": target}, 5800
        caller.arguments, caller.host = SimpleNamespace(verbose=False), "server"
        caller.user, caller.key = USER, KEY
        race = letmein.Race(lambda address: None, [])
        error = caller.attempt(KNOCK, RESOURCE, "server", race)
    feeder.close()

    last = second if challenged else first
    if error is None:
        assert challenged and last[:8] == plain(COMEIN)[:8]
    else:
        assert error.hint and error.problem.isprintable()
        is_late = "no answer" in error.problem or "closed" in error.problem
        is_a_beginning = len(last) < 56 and letmein.MAGIC.startswith(last[:4])
        assert is_late == is_a_beginning, error.problem
        assert ("rejected" in error.problem) == (last[:8] == plain(GOAWAY)[:8] and not is_late)
        assert not challenged or last[:8] != plain(COMEIN)[:8] or is_late
    assert Message.decode(feeder.requests[:56])[:3] == (KNOCK, USER, RESOURCE)
    if challenged:
        response = Message.decode(feeder.requests[56:])
        assert response[:3] == (RESPONSE, USER, RESOURCE) and response.proves(KEY, first[24:])
    else:
        assert len(feeder.requests) == 56


HANG = b""  # in a script over TCP: keep the connection open
BOTH, TCP, UDP = ("tcp", "udp"), ("tcp",), ("udp",)
CHALLENGED: list[bytes | None] = [None, reply(CHALLENGE), None]

LIES: list[tuple[str, Sequence[str], list[bytes | None], str]] = [
    ("garbage", BOTH, [None, b"HTTP/1.0 400 Bad Request\r\n" + bytes(30)], "not a letmein server"),
    ("a banner", TCP, [b"SSH-2.0-OpenSSH_9.2\r\n", HANG], "is not a letmein server"),
    ("short garbage", TCP, [None, b"nobody here\r\n", HANG], "is not a letmein server"),
    ("GOAWAY", TCP, [None, reply(GOAWAY)], "rejected"),
    ("GOAWAY to nobody", UDP, [None, reply(GOAWAY, ANYBODY, ANYBODY)], "rejected"),
    ("GOAWAY to the RESPONSE", BOTH, [*CHALLENGED, reply(GOAWAY)], "rejected"),
    ("nothing", BOTH, [None, HANG], "no answer"),
    ("nothing after the CHALLENGE", BOTH, [*CHALLENGED, HANG], "no answer"),
    ("55 bytes", BOTH, [None, reply(CHALLENGE)[:55], HANG], "no answer"),
    ("closed at once", TCP, [], ""),
    ("closed after the KNOCK", TCP, [None], "closed"),
    ("closed after the RESPONSE", TCP, CHALLENGED, "closed"),
    ("CHALLENGE twice", TCP, [*CHALLENGED, reply(CHALLENGE)], "CHALLENGE"),
    ("another CHALLENGE", BOTH, [*CHALLENGED, reply(CHALLENGE, auth=TOKEN)], "CHALLENGE"),
    ("COMEIN at once", TCP, [None, reply(COMEIN)], "COMEIN"),
    ("KNOCK", UDP, [None, reply(KNOCK)], "KNOCK"),
    ("operation 6", TCP, [None, reply(6)], "6"),
]

LIES_BY_PROTOCOL = [
    pytest.param(protocol, script, word, id=f"{protocol}-{name}")
    for name, protocols, script, word in LIES
    for protocol in protocols
]


@pytest.fixture(scope="class")
def no_firewall(lab: Lab) -> None:
    lab.load("")


@pytest.mark.usefixtures("no_firewall")
class TestLyingServers:
    @pytest.mark.parametrize("protocol, script, word", LIES_BY_PROTOCOL)
    def test_one_clear_error(
        self, lab: Lab, protocol: str, script: list[bytes | None], word: str
    ) -> None:
        """Each wrong answer is one error that names the server, and ends in time."""
        steps = [step for step in script if protocol == "tcp" or step != HANG]
        with FakeServer(protocol, steps):
            option = "-T" if protocol == "tcp" else "-U"
            # Only silence ends with the client's patience.
            conf = client_conf(timeout=5 if word not in ("", "no answer") else 0.3)
            result = lab.letmein("knock", option, SERVER_4, "22", conf=conf)
            result.assert_error(SERVER_4, word)
            # Who was challenged tries again as long as control-timeout lasts, and no longer.
            assert result.took < 5 + 3, result

    def test_a_reset_connection(self, lab: Lab) -> None:
        """A connection that is reset is one error that names the server."""
        with FakeServer("tcp", [None], reset=True):
            lab.letmein("knock", "-T", SERVER_4, "22").assert_error(SERVER_4)

    def test_a_server_that_drips(self, lab: Lab) -> None:
        """Bytes that come one by one are one message."""
        knocked = reply(CHALLENGE, auth=TOKEN)
        drips = [knocked[at : at + 1] for at in range(56)]
        with FakeServer("tcp", [None, *drips, None, reply(COMEIN)]) as fake:
            lab.letmein("knock", "-T", SERVER_4, "22").assert_good()
        assert len(fake.heard) == 2

    @pytest.mark.parametrize("protocol", ["tcp", "udp"])
    def test_foreign_ids_are_worth_a_warning(self, lab: Lab, protocol: str) -> None:
        """Other ids are a warning; the client's messages are as the wire's description says."""
        script = [None, reply(CHALLENGE, 7, 8, TOKEN), None, reply(COMEIN, 7, 8)]
        with FakeServer(protocol, script) as fake:
            option = "-T" if protocol == "tcp" else "-U"
            result = lab.letmein("knock", option, SERVER_4, "22")
        assert result.status == 0, result
        assert "warning" in result.err
        assert "00000007" in result.err
        # And what the client said is what it should say, by the wire's description.
        knock, response = fake.heard
        for data, operation, token in ((knock, KNOCK, ZEROS), (response, RESPONSE, TOKEN)):
            assert data[:16] == MAGIC + struct.pack(">III", operation, 1, 0x22)
            assert data[24:] == hmac.digest(KEYS[1], data[4:24] + token, "sha3_256")
        assert knock[16:24] != response[16:24]

    def test_datagrams_of_a_wrong_size_are_dropped(self, lab: Lab) -> None:
        """Over UDP only whole messages count."""
        challenge, comein = reply(CHALLENGE, auth=TOKEN), reply(COMEIN)
        script = [None, b"?", challenge + b"?", challenge[:55], challenge, None, comein * 2, comein]
        with FakeServer("udp", script):
            lab.letmein("knock", "-U", SERVER_4, "22").assert_good()

    @pytest.mark.parametrize("option", ["-T", "-U"])
    def test_nobody_listens(self, lab: Lab, option: str) -> None:
        """Where nobody listens, the client says so at once."""
        result = lab.letmein("knock", option, SERVER_4, "22")
        result.assert_error(SERVER_4)
        assert result.took < 3, result


@pytest.mark.usefixtures("no_firewall")
class TestDoor:
    """What the client makes of a server that is good, but slow, or in a bad place."""

    def test_the_slow_address_is_closed_as_well(self, lab: Lab) -> None:
        """Its knock came to an end while COMMAND ran already."""
        place = Path(tempfile.mkdtemp(dir=lab.directory))

        def granted(operation: int, where: str) -> None:
            """COMMAND runs before IPv6 is open, and for a second more."""
            if (operation, where) == (KNOCK, SERVER_6):
                eventually((place / "runs").exists, "COMMAND does not run")
                (place / "open").touch()

        script = f"cd {place}; touch runs; until [ -e open ]; do sleep 0.05; done; sleep 1"
        words = ["knock", "both.test", "22", "--", "sh", "-c", script]
        with Door(granted=granted) as door:
            result = lab.letmein(*words, conf=PATIENT_CONF)
        assert result.status == 0, result
        assert result.took < LIMIT_S, result
        assert "opened port 22 on both.test (10.1.0.1)\n" in result.err
        assert set(door.grants) == {(o, w) for o in (KNOCK, REVOKE) for w in (SERVER_4, SERVER_6)}

    def test_the_slow_address_is_not_waited_for_long(self, lab: Lab) -> None:
        """One address that opens is enough; the other gets a moment, not a timeout."""
        done = threading.Event()

        def granted(operation: int, where: str) -> None:
            if where == SERVER_6:
                done.wait(2 * LIMIT_S)

        with Door(granted=granted) as door:
            result = lab.letmein("knock", "both.test", "22", conf=PATIENT_CONF)
            grants = door.grants.copy()
            done.set()
        assert result[:3] == (0, "opened port 22 on both.test (10.1.0.1)\n", "")
        assert result.took < LIMIT_S
        assert grants == [(KNOCK, SERVER_4)]

    @pytest.mark.parametrize("control", ["-T", "-U"])
    def test_ctrl_c_while_the_server_opens(self, lab: Lab, control: str) -> None:
        """It is closed after it was opened, and not before."""
        opening = threading.Event()

        def granted(operation: int, where: str) -> None:
            if operation == KNOCK:
                opening.set()
                time.sleep(0.15)

        words = ["connect", control, "both.test", "9000"]
        with Door(granted=granted) as door, Running(lab, *words, script=lab.patient) as client:
            assert opening.wait(LIMIT_S)
            assert client.end(signal.SIGINT)[:3] == (128 + signal.SIGINT, "", "")
            time.sleep(0.3)
        for where in (SERVER_4, SERVER_6):
            assert [operation for operation, at in door.grants if at == where][-1] == REVOKE

    @pytest.mark.parametrize("words", [[], ["-q"], ["-4", "-6"]])
    def test_a_server_that_refuses_one_address(self, lab: Lab, words: list[str]) -> None:
        """It is a success, but the user is told of the other address; -4 -6 wants both."""

        def talk(connection: socket.socket) -> None:
            connection.recv(56, socket.MSG_WAITALL)
            connection.sendall(reply(CHALLENGE, auth=TOKEN))
            connection.recv(56, socket.MSG_WAITALL)
            is_4 = connection.getsockname()[0].startswith("::ffff:")
            connection.sendall(reply(GOAWAY if is_4 else COMEIN))

        with Service(5800, talk):
            result = lab.letmein("knock", *words, "both.test", "22", script=lab.patient)
        told = f"cannot open port 22 on both.test ({SERVER_4}): the server rejected the request\n"
        told += "  the key is right: event=failed in the server's log says what went wrong\n"
        opened = f"opened port 22 on both.test ({SERVER_6})\n"
        assert result[:3] == {
            "": (0, opened, f"letmein: note: {told}"),
            "-q": (0, "", ""),
            "-4 -6": (1, "", f"letmein: error: {told}"),
        }[" ".join(words)]

    def test_datagrams_that_come_twice(self, lab: Lab) -> None:
        """As of networks that mean it too well."""
        with Door(udp_copies=2) as door:
            result = lab.letmein("knock", "-U", SERVER_4, "22", conf=HOLD_CONF)
        assert result[:3] == (0, f"opened port 22 on {SERVER_4} ({SERVER_4})\n", "")
        assert door.grants == [(KNOCK, SERVER_4)]

    @pytest.mark.parametrize("word", ["knock", "revoke"])
    @pytest.mark.parametrize("stage", ["at once", "after the KNOCK", "after the RESPONSE"])
    def test_a_server_that_hangs_up_sometimes(self, lab: Lab, word: str, stage: str) -> None:
        """As one does at which many knock at once: the client tries again, from a new port."""
        busy = HangsUp(stage, 3)
        with Service(5800, busy):
            result = lab.letmein("--verbose", word, "-T", SERVER_4, "22")
        result.assert_good()
        assert len(re.findall("the server hung up, another try in [0-9]+ ms", result.err)) == 3
        assert len(busy.ports) == len(set(busy.ports)) == 4

    def test_a_server_that_always_hangs_up(self, lab: Lab) -> None:
        """A few tries are enough: it may be a wrong key, or no letmein at all."""
        busy = HangsUp("after the KNOCK", 1000)
        with Service(5800, busy):
            result = lab.letmein("knock", "-T", SERVER_4, "22")
        result.assert_error("closed the connection without an answer")
        assert len(busy.ports) == 4
        assert result.took < 4

    @pytest.mark.parametrize(
        "said", [reply(GOAWAY), b"SSH-2.0-OpenSSH_9.2\r\n"], ids=["GOAWAY", "another service"]
    )
    def test_a_server_that_says_something_is_not_asked_again(self, lab: Lab, said: bytes) -> None:
        """A clear answer ends the knock: no second connection."""
        with FakeServer("tcp", [None, said]) as fake:
            lab.letmein("knock", "-T", SERVER_4, "22").assert_error(SERVER_4)
        assert len(fake.heard) == 1

    def test_what_failed_is_not_asked_to_close(self, lab: Lab) -> None:
        """One error, and the time of one."""
        conf = client_conf(timeout=3)
        result = lab.letmein("knock", "dead.test", "22", "--", "echo", "run", conf=conf)
        result.assert_error(
            "(fd01::98, 10.1.0.98): no answer on its control port 5800/tcp within 3 s"
        )
        assert result.took < 6

    @pytest.mark.parametrize("host", [SERVER_4, "both.test"])
    @pytest.mark.parametrize("opens", [True, False])
    def test_shut_out_between_knock_and_connect(self, lab: Lab, opens: bool, host: str) -> None:
        """Somebody behind the same address has closed the port meanwhile: knock again, once."""
        services: list[Service] = []
        one_at_a_time = threading.Lock()

        def granted(operation: int, where: str) -> None:
            """The first knock does not open it, the second one does."""
            with one_at_a_time:
                is_second = operation == KNOCK and (KNOCK, where) in door.grants
                if opens and is_second and not services:
                    services.append(Service(9000, echo))

        words = ["connect", host, "9000"]
        with Door(granted=granted) as door, Running(lab, *words, script=lab.patient) as client:
            client.say(b"here")
            result = client.end()
        for running in services:
            running.__exit__()
        if opens:
            assert result[:3] == (0, "here", "")
        else:
            result.assert_error("but cannot connect to port 9000: Connection refused\n")
        addresses = [SERVER_4] if host == SERVER_4 else [SERVER_4, SERVER_6]
        for where in addresses:
            assert [operation for operation, at in door.grants if at == where] == [
                KNOCK, KNOCK, REVOKE,
            ]  # fmt: skip

    def test_a_firewall_that_drops_the_first_connection(self, lab: Lab) -> None:
        """Shut means silence there, and a client is not to wait for its kernel's patience."""
        lab.load("""
            table inet filter {
                chain input {
                    type filter hook input priority 0
                    tcp dport 9000 tcp flags syn counter meta mark 0 drop
                }
            }
        """)

        def granted(operation: int, where: str) -> None:
            if operation == KNOCK and (KNOCK, where) in door.grants:
                run(NFT, "flush", "chain", "inet", "filter", "input")

        try:
            words = ["connect", SERVER_4, "9000"]
            with Service(9000, echo), Door(granted=granted) as door, Running(lab, *words) as client:
                client.say(b"here")
                result = client.end()
        finally:
            lab.load("")
        assert result[:3] == (0, "here", "")
        assert letmein.CONNECT_S < result.took < letmein.CONNECT_S + LIMIT_S / 2  # not 2 minutes


@pytest.fixture
def hold(shared: Shared) -> Iterator[Server]:
    """A server with HOLD_RESOURCES, with nothing open."""
    with shared.lend(HOLD_SERVER) as server:
        yield server


class TestDeadAddress:
    """Of a name with two addresses, one leads nowhere."""

    @pytest.mark.parametrize("control", ["-T", "-U"])
    @pytest.mark.parametrize("host, option", [("v6dead.test", "-4"), ("v4dead.test", "-6")])
    def test_costs_little(
        self, lab: Lab, hold: Server, host: str, option: str, control: str
    ) -> None:
        """An address of the host that is dead costs less than a second."""
        dead = "fd01::99" if option == "-4" else "10.1.0.99"
        times: dict[str, list[float]] = {"": [], option: []}
        extra = float("inf")
        # A busy machine takes its own time, but hardly five times: a deadline takes 5 s.
        while extra >= 1 and len(times[option]) < 5:
            for words, took in times.items():
                options = [words] if words else []
                knock = ("--verbose", "knock", *options, control, host, "22")
                result = lab.letmein(*knock, conf=HOLD_CONF)
                result.assert_good()
                waited = f"({dead}): no answer within {letmein.OTHER_ADDRESS_S} s more\n"
                assert (waited in result.err) == (words == "")
                took.append(result.took)
            extra = min(times[""]) - min(times[option])
        print(f"{extra:.3f} s more")
        assert extra < 1  # a dead address would cost 5 s

    @pytest.fixture
    def far(self, lab: Lab) -> Iterator[None]:
        """Addresses of the server that a system tries last: the others are more like its own."""
        addresses = "10.1.0.130/32", "fd01::8000:0:0:1/128"
        for address in addresses:
            run("ip", "addr", "add", address, "dev", "lan", *["nodad"][: ":" in address])
        yield
        for address in addresses:
            run("ip", "addr", "del", address, "dev", "lan")

    @pytest.mark.usefixtures("far")
    @pytest.mark.parametrize("control", ["-T", "-U"])
    @pytest.mark.parametrize(
        "host, options, open_to",
        [
            ("several.test", [], [CLIENT_4]),
            ("several.test", ["-4"], [CLIENT_4]),
            ("several.both.test", ["-4", "-4"], [CLIENT_4]),
            ("several6.test", ["-6"], [CLIENT_6]),
            ("several.both.test", [], [CLIENT_4, CLIENT_6]),
            ("several.both.test", ["-4", "-6"], [CLIENT_4, CLIENT_6]),
        ],
    )
    def test_several_of_one_family(
        self,
        lab: Lab,
        hold: Server,
        host: str,
        options: list[str],
        open_to: list[str],
        control: str,
    ) -> None:
        """The first refuses, the second is silent, the third is enough, in each family wanted."""
        result = lab.letmein("knock", *options, control, host, "22", conf=HOLD_CONF)
        result.assert_good()
        assert result.took < 4
        for source in (CLIENT_4, CLIENT_6):
            assert lab.reaches(22, source) == (source in open_to)
        lab.letmein("revoke", *options, control, host, "22", conf=HOLD_CONF).assert_good()
        assert lab.elements() == []

    @pytest.mark.usefixtures("far")
    @pytest.mark.parametrize("host", ["several.test", "several6.test", "several.both.test"])
    def test_connect_to_one_that_was_opened(self, lab: Lab, hold: Server, host: str) -> None:
        """Nobody waits for those that lead nowhere."""
        with Service(9000, echo), Running(lab, "connect", host, "9000") as client:
            client.say(b"here")
            assert client.end()[:3] == (0, "here", "")
        assert lab.elements() == []

    def test_a_crowd(self, lab: Lab, hold: Server) -> None:
        """Eight are knocked at the most, and one family leaves room for the other."""
        words = ["--verbose", "knock", "crowd.test", "22"]
        result = lab.letmein(*words, conf=HOLD_CONF)
        result.assert_good()
        (line,) = re.findall("(?m)^letmein: .* ms  server: (.*),", result.err)
        assert len(line.split(" and ")) == 8
        assert lab.reaches(22, CLIENT_4)

    def test_what_a_server_says_is_told_first(self, lab: Lab, hold: Server) -> None:
        """And not that another address is silent."""
        conf = HOLD_CONF.replace("control-timeout = 5", "control-timeout = 0.5")
        result = lab.letmein("knock", "v6dead.test", "-r", "99", conf=conf)
        result.assert_error(f"on v6dead.test ({SERVER_4}): the server rejected the request")

    def test_both_are_demanded(self, lab: Lab, hold: Server) -> None:
        """-4 and -6: what one address has opened does not stay open without the other."""
        conf = client_conf(timeout=1.5)  # enough for the one that lives
        words = ["-4", "-6", "v6dead.test", "22"]
        result = lab.letmein("knock", *words, "--", "echo", "run", conf=conf)
        assert (result.status, result.out) == (1, "")
        assert "(fd01::99): no answer" in result.err
        assert lab.elements() == []


class TestNames:
    """What a host may be called, and where."""

    def test_an_address_with_a_zone(self, lab: Lab, hold: Server) -> None:
        """The client reaches it, and the server refuses it: a lease for it would be for everybody
        who takes that address on any other link."""
        said = run("ip", "-6", "addr", "show", "dev", "lan", "scope", "link")
        (address,) = re.findall("inet6 (fe80:[0-9a-f:]+)/", said)
        host = f"{address}%wan"
        for control in ("-T", "-U"):
            result = lab.letmein("knock", control, host, "22", conf=HOLD_CONF)
            result.assert_error(host, "rejected")
            hold.wait_for("failed", proto="tcp" if control == "-T" else "udp")
            assert "link-local" in hold.events("failed")[-1]["reason"]
            assert lab.elements() == []

    def test_no_ipv6(self, lab: Lab, hold: Server) -> None:
        """An IPv6 address that a name has costs nothing where no packet can go there."""
        with lab.without_ipv6():
            for host in (SERVER_4, "both.test", "v6dead.test"):
                call = ("--verbose", "knock", host, "22")
                result = lab.letmein(*call, conf=PATIENT_CONF, script=lab.patient)
                result.assert_good()
                assert "no answer" not in result.err, "it was waited for"
                assert result.took < LIMIT_S
            lab.letmein("knock", SERVER_6, "22").assert_error("has no IPv6 address to", SERVER_6)
            words = ["connect", "both.test", "9000"]
            with Service(9000, echo), Running(lab, *words) as client:
                client.say(b"here")
                assert client.end()[:3] == (0, "here", "")

    def test_no_localhost(self, lab: Lab, hold: Server) -> None:
        """/etc/hosts does not even have that name, and is no concern of ours."""
        hosts = Path("/etc/hosts")
        before = hosts.read_text(encoding="ascii")
        try:
            hosts.write_text(before.replace("127.0.0.1 localhost\n", ""), encoding="ascii")
            for host in (SERVER_4, SERVER_6, "both.test"):
                lab.letmein("knock", host, "22", conf=HOLD_CONF).assert_good()
        finally:
            hosts.write_text(before, encoding="ascii")


class TestOffice:
    @pytest.mark.parametrize("control", ["-T", "-U"])
    def test_forty_clients_at_once(self, lab: Lab, hold: Server, control: str) -> None:
        """All behind one address, of which a server serves eight at a time over TCP."""
        words = ["knock", control, SERVER_4, "22"]
        with contextlib.ExitStack() as stack:
            clients = [
                stack.enter_context(Running(lab, *words, env=UNMEASURED)) for _ in range(40)
            ]
            results = [client.end() for client in clients]
        assert {(result.status, result.err) for result in results} == {(0, "")}


LOSSY = """
table ip lossy {
    chain prerouting {
        type filter hook prerouting priority raw
        udp dport 5800 numgen random mod 100 < 30 drop
        udp sport 5800 numgen random mod 100 < 30 drop
    }
}
"""
LOSSY_KNOCKS = int(os.environ.get("LOSSY_KNOCKS", "5"))


@pytest.fixture
def lossy(lab: Lab) -> Iterator[None]:
    """30 of 100 datagrams to and from the control port get lost, each way."""
    with lab.client():
        run(NFT, "-f", "-", text=LOSSY)
    yield
    with lab.client():
        run(NFT, "flush", "ruleset")


def knock_lossily(lab: Lab, knocks: int) -> list[float]:
    """How long each knock took, infinite for one that failed."""
    times = []
    for _ in range(knocks):
        result = lab.letmein("knock", "-U", SERVER_4, "22", conf=PATIENT_CONF)
        times.append(result.took if result.status == 0 else float("inf"))
    print(" ".join(f"{took:.2f}" for took in sorted(times)))
    return times


@pytest.mark.usefixtures("lossy")
class TestLossyPath:
    """Over UDP. (TCP sees to lost packets by itself.) One knock of 2,000 is so unlucky that none of
    its tries gets through in 5 s, and of a million in 10 s."""

    def test_our_server(self, lab: Lab) -> None:
        """A knock gets through where 30 % of the datagrams are lost, each way."""
        lab.load(more=LOSSY)
        with Server(lab, HOLD_SERVER):
            times = knock_lossily(lab, LOSSY_KNOCKS)
            assert max(times) < 10
            run(NFT, "delete", "table", "ip", "lossy")

    def test_revoke(self, lab: Lab) -> None:
        """So does a revocation."""
        lab.load(more=LOSSY)
        with Server(lab, HOLD_SERVER):
            for word in ("knock", "revoke"):
                lab.letmein(word, "-U", SERVER_4, "22", conf=PATIENT_CONF).assert_good()
            run(NFT, "delete", "table", "ip", "lossy")

    def test_the_reference_server(self, lab: Lab) -> None:
        """So do nearly all knocks on the reference's server."""
        programs = reference("letmeinfwd", "letmeind")
        if not lab.real_root:
            pytest.skip("letmeind runs as an account of its own: that takes real root")
        if REFERENCE_ACCOUNT not in {account.pw_name for account in pwd.getpwall()}:
            pytest.skip(f"letmeind's account {REFERENCE_ACCOUNT} does not exist")
        lab.load(more=LOSSY)
        with ReferenceServer(lab, programs, server_conf("22 = port: 22", general="")):
            times = knock_lossily(lab, LOSSY_KNOCKS)
            assert sum(took < 10 for took in times) >= LOSSY_KNOCKS * 13 // 15


ENDINGS = ["SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT"]

VANISH = """
table ip vanish {
    chain prerouting {
        type filter hook prerouting priority raw
        tcp sport 9001 drop
    }
}
"""

# For patched(): what the kernel waits for on its own takes a second, not a minute.
IMPATIENT_SOCKETS = """
    import socket
    class Socket(socket.socket):
        def setsockopt(self, level, name, value):
            super().setsockopt(level, name, 1 if level == socket.IPPROTO_TCP else value)
    socket.socket = Socket
"""


@pytest.mark.usefixtures("hold")
class TestConnect:
    """`connect HOST PORT`, without ssh."""

    @pytest.mark.parametrize("control", ["-T", "-U"])
    @pytest.mark.parametrize("host", [SERVER_4, SERVER_6, "both.test", "v6dead.test"])
    def test_any_bytes_there_and_back(self, lab: Lab, host: str, control: str) -> None:
        """2 MB of any bytes go both ways unchanged, and the lease ends with them."""
        data = bytes(range(256)) * 8000

        def give() -> None:
            client.say(data)
            client.end_input()

        script = LETMEIN if "dead" in host else lab.patient
        words = ["connect", control, host, "9000"]
        with Service(9000, echo), Running(lab, *words, script=script) as client:
            threading.Thread(target=give).start()
            assert client.hear(-1) == data
            assert client.end()[:3] == (0, "", "")
            assert lab.elements() == []

    def test_input_ends_first(self, lab: Lab) -> None:
        """The service hears the end, and can answer still."""

        def count(connection: socket.socket) -> None:
            heard = Heard()
            heard(connection)
            time.sleep(0.3)
            connection.sendall(b"%d" % len(heard.data))

        with Service(9000, count), Running(lab, "connect", SERVER_4, "9000") as client:
            client.say(bytes(100_000))
            client.end_input()
            assert client.hear(-1) == b"100000"
            assert client.process.wait(LIMIT_S) == 0

    def test_output_ends_first(self, lab: Lab) -> None:
        """Who reads our output hears the end, and what still comes in is carried."""
        heard = Heard(b"that is all")

        def half(connection: socket.socket) -> None:
            connection.sendall(heard.greeting)
            connection.shutdown(socket.SHUT_WR)
            heard.greeting = b""
            heard(connection)

        with Service(9000, half), Running(lab, "connect", SERVER_4, "9000") as client:
            assert client.hear(-1) == b"that is all"
            assert client.process.poll() is None
            client.say(b"one more thing")
            client.end_input()
            assert client.process.wait(LIMIT_S) == 0
            assert heard.ended.wait(LIMIT_S)
        assert heard.data == b"one more thing"

    def test_nobody_reads_our_output(self, lab: Lab) -> None:
        """A reader that has gone ends it as a success, and its lease with it."""
        with Service(9000, echo), Running(lab, "connect", SERVER_4, "9000") as client:
            client.stdout.close()
            client.say(b"here")
            assert client.process.wait(LIMIT_S) == 0
            assert lab.elements() == []

    def test_the_service_breaks_off(self, lab: Lab) -> None:
        """A service that resets the connection is one error, and the lease ends."""
        def reset(connection: socket.socket) -> None:
            connection.recv(4)
            linger = struct.pack("ii", 1, 0)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)

        with Service(9000, reset), Running(lab, "connect", SERVER_4, "9000") as client:
            client.say(b"here")
            # Though our input has not ended.
            assert client.process.wait(LIMIT_S) == 1
            assert lab.elements() == []
            client.end_input()
            client.end().assert_error("the connection broke: Connection reset by peer")

    def test_non_blocking_pipes(self, lab: Lab) -> None:
        """All bytes arrive, in both directions, though our parent has set O_NONBLOCK."""
        script = "import os, sys; [os.set_blocking(number, False) for number in (0, 1)]"
        script += "; os.execv(sys.argv[1], sys.argv[1:])"
        words: list[str | Path] = [sys.executable, LETMEIN, "-c", lab.file(HOLD_CONF)]
        words = [*python(script), *words, "connect", SERVER_4, "9000"]
        data = os.urandom(2_000_000)

        def give() -> None:
            time.sleep(0.5)  # there is nothing to read at first
            client.say(data)
            client.end_input()

        with Service(9000, echo), Running(lab, *words, program=()) as client:
            giver = threading.Thread(target=give)
            giver.start()
            assert client.hear(4) == data[:4]
            time.sleep(0.5)  # the output is full meanwhile
            assert client.hear(-1) == data[4:]
            giver.join(LIMIT_S)
            assert client.end()[:3] == (0, "", "")
            assert lab.elements() == []

    @pytest.mark.parametrize(
        "redirection, problem",
        [
            (">/dev/full", "cannot write standard output: No space left on device"),
            ("0>/dev/null", "cannot read standard input: Bad file descriptor"),
        ],
    )
    def test_a_stream_that_fails(self, lab: Lab, redirection: str, problem: str) -> None:
        """What is not carried is an error, and the door closes."""
        words = shell(redirection, "connect", SERVER_4, "9000", lab=lab)
        greet = Heard(b"greeting")
        with Service(9000, greet), Running(lab, *words, program=()) as client:
            assert client.process.wait(LIMIT_S) == 1
            assert problem in client.end().err
            assert lab.elements() == []

    def test_a_stream_that_fails_while_the_peer_speaks(self, lab: Lab) -> None:
        """That the connection is reset as well does not hide the error."""
        slow = """
            import socket, time
            class Socket(socket.socket):
                def shutdown(self, how):
                    super().shutdown(how)
                    time.sleep(0.5)  # so the reset is first
            socket.socket = Socket
        """
        program = shlex.join(map(str, patched(lab, slow, "connect", SERVER_4, "9000")))

        def reply(connection: socket.socket) -> None:
            assert connection.recv(1) == b""
            connection.sendall(b"too late")

        words = ["sh", "-c", f"{program} 0>/dev/null"]
        with Service(9000, reply), Running(lab, *words, program=()) as client:
            assert client.process.wait(LIMIT_S) == 1
            assert "cannot read standard input" in client.end().err
            assert lab.elements() == []

    def test_a_peer_that_vanished(self, lab: Lab) -> None:
        """Its connection ends, and with it the lease, though the server grants each renewal."""
        words = patched(lab, IMPATIENT_SOCKETS, "connect", SERVER_4, "9001")
        with Service(9001, echo), Running(lab, *words, program=()) as client:
            client.say(b"here")
            assert client.hear(4) == b"here"
            with lab.client():
                run(NFT, "-f", "-", text=VANISH)
            try:
                assert client.process.wait(LIMIT_S) == 1
                client.end().assert_error("the connection broke: Connection timed out")
                assert lab.elements() == []
            finally:
                with lab.client():
                    run(NFT, "flush", "ruleset")

    def test_a_peer_that_stops_reading_for_a_while(self, lab: Lab) -> None:
        """It is alive, so its connection goes on, and no byte is lost."""
        data = os.urandom(20_000_000)
        heard = Heard()

        def late(connection: socket.socket) -> None:
            time.sleep(4)
            heard(connection)

        words = patched(lab, IMPATIENT_SOCKETS, "connect", SERVER_4, "9000")
        with Service(9000, late), Running(lab, *words, program=()) as client:
            client.say(data)
            client.end_input()
            assert client.end()[:3] == (0, "", "")
            assert heard.ended.wait(LIMIT_S)
        assert heard.data == data

    def test_a_parent_that_ignores_the_end_of_the_output(self, lab: Lab) -> None:
        """The service has closed its connection, and our input goes on: the door does not."""
        words = patched(lab, IMPATIENT_SOCKETS, "connect", SERVER_4, "9000")
        greet = Service(9000, lambda connection: connection.sendall(b"bye"))
        patience = Path("/proc/sys/net/ipv4/tcp_fin_timeout")
        before = patience.read_text(encoding="ascii")
        try:
            patience.write_text("1", encoding="ascii")
            with greet, Running(lab, *words, program=()) as client:
                assert client.hear(-1) == b"bye"
                assert client.process.wait(LIMIT_S) == 0
                assert lab.elements() == []
        finally:
            patience.write_text(before, encoding="ascii")

    @pytest.mark.parametrize("control", ["-T", "-U"])
    def test_renewed_for_the_connections_own_address(
        self, lab: Lab, hold: Server, control: str
    ) -> None:
        """A machine that has moved renews nothing from its new address, and says so."""
        moving = "10.1.0.4"
        with lab.client():
            run("ip", "addr", "add", f"{moving}/24", "dev", "wan")
            run("ip", "route", "add", f"{SERVER_4}/32", "dev", "wan", "src", moving)
        try:
            words = ["connect", control, SERVER_4, "9001"]
            with Service(9001, echo), Running(lab, *words) as client:
                client.say(b"here")
                assert client.hear(4) == b"here"
                with lab.client():  # other connections come from CLIENT_4 now
                    run("ip", "route", "del", f"{SERVER_4}/32")
                before = len(hold.events("granted", peer=CLIENT_4))
                count = len(hold.events("granted", peer=moving))
                hold.wait_for("granted", count + 2, peer=moving)
                with lab.client():
                    run("ip", "addr", "del", f"{moving}/24", "dev", "wan")
                assert client.process.stderr is not None
                lines = [client.process.stderr.readline().decode() for _ in range(2)]
                told = lines[0].partition(f"cannot renew port 9001 on {SERVER_4}: ")[2]
                # A renewal that was under way just then gets no answer.
                lost = f"this machine no longer has the address {moving}"
                silent = "its control port 5800/tcp is open, but gives no answer"
                assert told.startswith((lost, "no answer on its control port", silent)), lines
                eventually(lambda: lab.elements() == [], "the lease does not end")
                result = client.end(signal.SIGTERM)
                assert (result.status, result.out) == (128 + signal.SIGTERM, "")
                assert "Traceback" not in result.err
                assert len(hold.events("granted", peer=CLIENT_4)) == before
        finally:
            with lab.client():
                run("ip", "route", "del", f"{SERVER_4}/32", check=False)
                run("ip", "addr", "del", f"{moving}/24", "dev", "wan", check=False)

    @pytest.mark.parametrize("name", ENDINGS)
    def test_a_signal(self, lab: Lab, name: str) -> None:
        """Each signal ends it with the status of a shell, without a word, and its lease."""
        number = getattr(signal, name)
        with Service(9000, echo), Running(lab, "connect", SERVER_4, "9000") as client:
            client.say(b"here")
            assert client.hear(4) == b"here"
            assert client.end(number)[:3] == (128 + number, "", "")
            assert lab.elements() == []

    def test_a_signal_just_before_signals_are_ignored(self, lab: Lab) -> None:
        """Such as that by which ssh ends who carries its connection."""
        patch = """
            import os, signal
            set_handler = signal.signal
            def new_signal(number, handler):
                if handler == signal.SIG_IGN:
                    signal.signal = set_handler
                    os.kill(os.getpid(), signal.SIGTERM)
                set_handler(number, handler)
            signal.signal = new_signal
        """
        words = patched(lab, patch, "connect", SERVER_4, "9000")
        with Service(9000, echo), Running(lab, *words, program=()) as client:
            assert client.end()[:3] == (128 + signal.SIGTERM, "", "")
        assert lab.elements() == []

    @pytest.mark.parametrize("words", [["connect", "9000"], ["knock", "9000"]])
    def test_ctrl_c_at_any_moment(self, lab: Lab, words: list[str]) -> None:
        """Ctrl-C prints no traceback at any moment, and leaves no lease of `connect`."""
        with Service(9000, echo):
            for step in range(30):
                call = [words[0], "both.test", words[1]]
                with Running(lab, *call, script=lab.patient, env=UNMEASURED) as client:
                    time.sleep(0.03 + 0.01 * step)
                    result = client.end(signal.SIGINT)
                    assert_no_traceback(result)
                    assert result.status in (-signal.SIGINT, 128 + signal.SIGINT, 0, 1)
                if words[0] == "connect":
                    assert lab.elements() == []

    def test_a_lease_that_would_end_is_renewed(self, lab: Lab, hold: Server) -> None:
        """A connection that outlives its lease keeps the port open."""
        with Service(9001, echo), Running(lab, "connect", SERVER_4, "9001") as client:
            for _ in range(5):
                client.say(b"here")
                assert client.hear(4) == b"here"
                eventually(lambda: len(lab.elements()) == 1, "it is not renewed")
                time.sleep(0.8)
            assert client.end()[:3] == (0, "", "")
            assert lab.elements() == []

    def test_keep(self, lab: Lab) -> None:
        """--keep leaves the lease."""
        with Service(9000, echo), Running(lab, "connect", "--keep", SERVER_4, "9000") as client:
            assert client.end()[:3] == (0, "", "")
        assert len(lab.elements()) == 1

    def test_under_a_filter_of_system_calls(self, lab: Lab) -> None:
        """It works, and renews, under `--seccomp kill`."""
        pytest.importorskip("pyseccomp")
        words = ["--seccomp", "kill", "connect", "both.test", "9001"]
        with Service(9001, echo), Running(
            lab, *words, script=lab.patient, env=UNMEASURED
        ) as client:
            client.say(b"here")
            assert client.hear(4) == b"here"
            time.sleep(1.5)  # so that it knocks again
            assert client.end()[:3] == (0, "", "")
            assert lab.elements() == []

    def test_another_resource_opens_the_port(self, lab: Lab) -> None:
        """Resources named with -r open the port, all of them."""
        with Service(9001, echo), Running(
            lab, "connect", "-r", "90", "-r", "91", SERVER_4, "9001"
        ) as client:
            client.say(b"here")
            assert client.hear(4) == b"here"
            assert len(lab.elements()) == 2
            assert client.end()[:3] == (0, "", "")
            assert lab.elements() == []

    @pytest.mark.parametrize(
        "redirection, heard",
        [(">&-", b"in"), ("2>&-", b"in"), ("<&-", b""), ("<&- >&- 2>&-", b"")],
    )
    def test_closed_streams(self, lab: Lab, redirection: str, heard: bytes) -> None:
        """The connection does not get the number of one, and no warning gets into the output."""
        service = Heard(b"greeting")
        conf = f"{HOLD_CONF}\n[UNKNOWN]\n"
        words = shell(redirection, "connect", SERVER_4, "9000", conf=conf, lab=lab)
        with Service(9000, service), Running(lab, *words, program=()) as client:
            with contextlib.suppress(BrokenPipeError):  # its input may be closed by now
                client.say(b"in")
            result = client.end()
            assert service.ended.wait(LIMIT_S)
        assert service.data == heard
        assert result.out in ("", "greeting")
        assert ("warning" in result.err) == ("2>" not in redirection)
        shut_soon(lab)


@pytest.fixture(scope="class")
def sshd(lab: Lab) -> Iterator[Sshd]:
    made = Sshd(lab)
    yield made
    made.process.kill()
    made.process.wait()  # or its port is still taken when the next test wants it


@pytest.mark.usefixtures("hold")
class TestSsh:
    """`ssh -o ProxyCommand='letmein connect %h %p'`."""

    @pytest.mark.parametrize("host", [SERVER_4, SERVER_6, "both.test"])
    def test_a_command(self, lab: Lab, sshd: Sshd, host: str) -> None:
        """ssh through ProxyCommand runs a command; then the port is shut again."""
        with sshd.log_in("echo $((6*7)); exit 5", host=host) as ssh:
            assert ssh.end()[:3] == (5, "42\n", "")
        shut_soon(lab)
        assert not lab.reaches(9000, CLIENT_4)

    def test_20_mb_in_each_direction(self, lab: Lab, sshd: Sshd) -> None:
        """20 MB go through ssh unchanged in each direction."""
        data = os.urandom(20_000_000)
        path = lab.directory / "copied"
        with sshd.log_in(f"cat >{path}") as ssh:
            ssh.say(data)
            assert ssh.end()[:3] == (0, "", "")
        assert path.read_bytes() == data
        with sshd.log_in(f"cat {path}") as ssh:
            assert ssh.hear(-1) == data
            assert ssh.process.wait(LIMIT_S) == 0
        path.unlink()
        shut_soon(lab)

    @pytest.mark.parametrize("whom", ["ssh", "letmein"])
    @pytest.mark.parametrize("name", [*ENDINGS, "SIGKILL"])
    def test_a_signal_in_the_middle(self, lab: Lab, sshd: Sshd, whom: str, name: str) -> None:
        """(Nothing of ours can be done when SIGKILL ends our client: the kernel's timeout does.)"""
        with sshd.log_in("echo here; sleep 60") as ssh:
            assert ssh.hear(5) == b"here\n"
            pid = ssh.process.pid if whom == "ssh" else child_of(ssh.process)
            assert len(lab.elements()) == 1
            os.kill(pid, getattr(signal, name))
            assert ssh.end().status != 0
        if (whom, name) != ("letmein", "SIGKILL"):
            shut_soon(lab)

    @pytest.mark.parametrize("first", [0, 1])
    def test_two_at_once(self, lab: Lab, sshd: Sshd, first: int) -> None:
        """Two sessions share a lease: the end of one does not shut out the other."""
        with sshd.log_in("cat") as one, sshd.log_in("cat") as other:
            sessions = [one, other]
            for ssh in sessions:
                ssh.say(b"here\n")
                assert ssh.hear(5) == b"here\n"
            assert sessions[first].end()[:3] == (0, "", "")
            shut_soon(lab)
            sessions[1 - first].say(b"still here\n")
            assert sessions[1 - first].end()[:3] == (0, "still here\n", "")
        assert lab.elements() == []


REACH = f"import socket; socket.create_connection(('{SERVER_4}', PORT)).recv(4)"


@pytest.mark.usefixtures("hold")
class TestCommand:
    """`knock HOST PORT... -- COMMAND`."""

    @pytest.mark.parametrize(
        "script, status",
        [("exit 0", 0), ("exit 7", 7), ("exit 255", 255), ("kill -9 $$", 137), ("kill $$", 143)],
    )
    def test_its_exit_status_is_ours(self, lab: Lab, script: str, status: int) -> None:
        """The exit status of COMMAND, or its signal, is ours, and the lease ends with it."""
        words = ["knock", SERVER_4, "22", "--", "sh", "-c", f"echo heard; {script}"]
        result = lab.letmein(*words, conf=HOLD_CONF)
        where = f"port 22 on {SERVER_4} ({SERVER_4})"
        said = f"letmein: opened {where}\n"
        assert result[:3] == (status, "heard\n", said)
        assert lab.elements() == []

    def test_a_parent_that_ignores_the_end_of_children(self, lab: Lab) -> None:
        """Then COMMAND's failure is a failure, too."""
        ignore = "import signal; signal.signal(signal.SIGCHLD, signal.SIG_IGN)"
        words = patched(lab, ignore, "knock", SERVER_4, "22", "--", "false")
        with Running(lab, *words, program=()) as client:
            assert client.end().status == 1

    def test_in_the_background_of_a_shell(self, lab: Lab) -> None:
        """Ctrl-C is for another program, and so for none of us."""
        ignore = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"
        words = patched(lab, ignore, "knock", SERVER_4, "22", "--", "cat")
        with Running(lab, *words, program=()) as client:
            client.say(b"here")
            assert client.hear(4) == b"here"
            client.process.send_signal(signal.SIGINT)
            client.say(b"still here")
            client.end_input()
            assert client.hear(10) == b"still here"
            assert client.end().status == 0
        assert lab.elements() == []

    def test_all_is_open_meanwhile(self, lab: Lab) -> None:
        """All ports are open while COMMAND runs, and none afterwards."""
        check = python("; ".join(REACH.replace("PORT", str(port)) for port in (22, 23)))
        result = lab.letmein("knock", SERVER_4, "22", "23", "-q", "--", *check, conf=HOLD_CONF)
        assert result[:3] == (0, "", "")
        assert not lab.reaches(22, CLIENT_4)
        assert not lab.reaches(23, CLIENT_4)

    @pytest.mark.parametrize(
        "words, status",
        [
            (["22"], 0),
            (["22", "23"], 0),
            (["-r", "22", "-r", "23"], 0),
            (["22", "26", "23"], 1),
            (["-r", "99", "-r", "22"], 1),
        ],
    )
    def test_a_line_for_each(self, lab: Lab, words: list[str], status: int) -> None:
        """Without COMMAND: what can be opened is, and it is success if all were."""
        for word in ("knock", "revoke"):
            result = lab.letmein(word, SERVER_4, *words, conf=HOLD_CONF)
            assert result.status == status, result
            assert result.err.count("error: ") == status
            wanted = [f"{w} on {SERVER_4} ({SERVER_4})" for w in words if w in ("22", "23")]
            assert [line.split(" ", 2)[2].lstrip("0") for line in result.out.splitlines()] == wanted
            assert len(lab.elements()) == (len(wanted) if word == "knock" else 0)

    @pytest.mark.parametrize("words", [["26", "22"], ["22", "26"], ["-r", "22", "-r", "99"]])
    def test_not_run_if_one_fails(self, lab: Lab, words: list[str]) -> None:
        """COMMAND does not run if one of its ports does not open; the others are shut."""
        command = ["--", "echo", "run"]
        result = lab.letmein("knock", SERVER_4, *words, *command, conf=HOLD_CONF)
        assert (result.status, result.out) == (1, "")
        assert result.err.count("error") == 1
        assert result.err.count("opened ") == 1
        assert lab.elements() == []

    @pytest.mark.parametrize(
        "text, mode, status, problem",
        [
            (None, 0, 127, "not found"),
            ("#!/no/such/interpreter\n", 0o755, 127, "not found"),
            ("#!/bin/sh\n", 0o644, 126, "Permission denied"),
            ("no program\n", 0o755, 126, "Exec format error"),
        ],
    )
    def test_a_command_that_cannot_be_run(
        self, lab: Lab, text: str | None, mode: int, status: int, problem: str
    ) -> None:
        """A shell's exit status, one error in words, and the port is closed again."""
        path = "no-such-thing" if text is None else lab.file(text, mode=mode)
        result = lab.letmein("knock", "-q", SERVER_4, "22", "--", path, conf=HOLD_CONF)
        said = f"letmein: error: cannot run '{path}': {problem}\n"
        assert (result.status, result.out) == (status, "")
        assert result.err.startswith(said)
        assert "Errno" not in result.err
        assert lab.elements() == []

    def test_keep(self, lab: Lab) -> None:
        """--keep leaves the lease."""
        result = lab.letmein("knock", "--keep", SERVER_4, "22", "--", "true", conf=HOLD_CONF)
        assert result.status == 0, result
        assert "closed" not in result.err
        assert lab.reaches(22, CLIENT_4)

    def test_a_lease_that_would_end_is_renewed(self, lab: Lab) -> None:
        """A COMMAND that outlives its lease keeps the port open."""
        check = f"import time; time.sleep(4.5); {REACH.replace('PORT', '22')}"
        conf = HOLD_CONF.replace("port: 22", "port: 22 / timeout: 3")
        words = ["knock", "-q", SERVER_4, "9001", "22", "--"]
        result = lab.letmein(*words, *python(check), conf=conf)
        assert result[:3] == (0, "", "")
        assert lab.elements() == []

    @pytest.mark.parametrize("name", ENDINGS)
    def test_a_signal_ends_command_too(self, lab: Lab, name: str) -> None:
        """Each signal ends COMMAND, then us, and the lease."""
        words = ["-q", "knock", SERVER_4, "22", "--", "sh", "-c", "echo $$; exec sleep 60"]
        number = getattr(signal, name)
        with Running(lab, *words[1:3], "-q", *words[3:]) as client:
            pid = int(client.stdout.readline())
            assert len(lab.elements()) == 1
            assert client.end(number)[:3] == (128 + number, "", "")
        assert not Path(f"/proc/{pid}").exists()
        assert lab.elements() == []

    def test_a_command_that_takes_a_signal_well(self, lab: Lab) -> None:
        """It ends when it wants to, and what it opened stays until then."""
        script = "trap 'echo caught' TERM; echo here; while ! read line; do :; done; exit 3"
        with Running(lab, "knock", "-q", SERVER_4, "22", "--", "sh", "-c", script) as client:
            assert client.hear(5) == b"here\n"
            client.process.terminate()
            assert client.hear(7) == b"caught\n"
            assert len(lab.elements()) == 1
            client.say(b"go\n")
            assert client.end()[:3] == (3, "", "")
        assert lab.elements() == []

    def test_a_signal_at_any_moment(self, lab: Lab) -> None:
        """Nothing stays open, and COMMAND does not stay behind."""
        mark = f"60.{os.getpid()}"
        for step in range(25):
            words = ["knock", SERVER_4, "22", "--", "sleep", mark]
            with Running(lab, *words, script=lab.patient, env=UNMEASURED) as client:
                time.sleep(0.04 + step * 0.02)
                name = ENDINGS[step % len(ENDINGS)]
                result = client.end(getattr(signal, name))
                assert_no_traceback(result)
                assert result.status in (-getattr(signal, name), 128 + getattr(signal, name), 1)
            assert lab.elements() == []
            assert run("pgrep", "-f", f"^sleep {mark}$", check=False) == ""

    @pytest.mark.parametrize("where", ["before", "after", "in a callback"])
    def test_a_signal_while_command_starts(self, lab: Lab, where: str) -> None:
        """It ends all, also where Python loses the exception: in a callback of its own."""
        patch = f"""
            import os, signal, subprocess, threading
            class Popen(subprocess.Popen):
                def __init__(self, command):
                    os.kill(os.getpid(), signal.SIGTERM) if {where!r} == "before" else None
                    super().__init__(command)
                    os.kill(os.getpid(), signal.SIGTERM) if {where!r} == "after" else None
            subprocess.Popen = Popen
            class Callback:
                def __del__(self):
                    os.kill(os.getpid(), signal.SIGTERM)
            class Thread(threading.Thread):
                def start(self):
                    Callback() if {where!r} == "in a callback" else None
                    super().start()
            threading.Thread = Thread
        """
        seconds = f"60.{os.getpid()}"
        words = patched(lab, patch, "knock", "-q", SERVER_4, "22", "--", "sleep", seconds)
        with Running(lab, *words, program=()) as client:
            assert client.end()[:3] == (128 + signal.SIGTERM, "", "")
        assert lab.elements() == []
        assert run("pgrep", "-f", f"^sleep {seconds}$", check=False) == ""

    def test_not_under_a_filter_of_system_calls(self, lab: Lab) -> None:
        """COMMAND with --seccomp is refused before anything opens."""
        words = ["--seccomp", "kill", "knock", SERVER_4, "22", "--", "echo", "run"]
        result = lab.letmein(*words, conf=HOLD_CONF)
        result.assert_error("COMMAND would run with the filter", "use connect, or --seccomp off")
        assert lab.elements() == []


class TestRenewal:
    @pytest.mark.parametrize("words", [["knock", "-q"], ["connect"]])
    def test_a_renewal_that_fails_is_tried_again_soon(self, lab: Lab, words: list[str]) -> None:
        """Before the lease ends: one that is lost shuts no door."""
        resources = "92 = port: 9002 / timeout: 8"
        refuse = """
            table inet refuse {
                counter refused { }
                chain input {
                    type filter hook input priority -1
                    tcp dport 5800 counter name refused reject with tcp reset
                }
            }
        """
        words = [words[0], "--verbose", *words[1:], SERVER_4, "9002"]
        words += ["--", "cat"] if words[0] == "knock" else []
        lab.load()
        conf = client_conf(resources=resources)
        with Server(lab, server_conf(resources)) as server, Service(9002, echo):
            with Running(lab, *words, conf=conf) as client:
                client.say(b"here")
                assert client.hear(4) == b"here"
                server.wait_for("granted")
                run(NFT, "-f", "-", text=refuse)
                eventually(lambda: lab.counters()["refused"] > 0, "nothing is renewed")
                run(NFT, "delete", "table", "inet", "refuse")
                while len(server.events("granted")) < 2:
                    assert lab.elements() != []
                    time.sleep(0.1)
                result = client.end()
            assert (result.status, lab.elements()) == (0, [])
            told = "not renewed yet: port 9002 on 10.1.0.1: nothing listens on its control port"
            assert told in result.err


class TestClientLimits:
    """What a system gives may run out: that is an error in words, and soon."""

    def test_descriptors_above_1023(self, lab: Lab, hold: Server) -> None:
        """Our parent has left us many open files."""
        many = """
            import os, resource
            resource.setrlimit(resource.RLIMIT_NOFILE, (2048, 2048))
            many = [os.dup(0) for _ in range(1100)]
        """
        words = patched(lab, many, "knock", "-U", "both.test", "22")
        with Running(lab, *words, program=()) as client:
            result = client.end()
        assert (result.status, result.err) == (0, "")

    def test_a_long_time_without_an_answer(self, lab: Lab) -> None:
        """Over UDP the handshakes that are waited for do not grow without limit."""
        often = adjusted(lab, "letmein.UDP_REPEAT_S = 0.002")[:2]
        program = ("prlimit", "--nofile=64", "--", *often)
        path = lab.file(client_conf(timeout=1))
        with lab.client():
            words = ("-c", path, "knock", "-U", "10.1.0.99", "22")
            result = lab.command(*words, program=program)
        result.assert_error("10.1.0.99: no answer on its control port 5800/udp within 1 s")

    @pytest.mark.parametrize("words", [["knock", "-U"], ["revoke", "-U"]])
    def test_a_thread_that_dies(self, lab: Lab, words: list[str]) -> None:
        """Whatever it died of is told, and nobody waits for it."""
        bomb = """
            import selectors
            def broken():
                raise ValueError("boom")
            selectors.DefaultSelector = broken
        """
        words = [str(word) for word in patched(lab, bomb, *words, "both.test", "22")]
        with Running(lab, *words, program=()) as client:
            assert client.process.wait(LIMIT_S) == 1
            client.end().assert_error("ValueError('boom')", "a bug in letmein")

    @pytest.mark.parametrize("word", ["knock", "connect"])
    def test_no_more_threads(self, lab: Lab, hold: Server, word: str) -> None:
        """A knock takes none; `connect` needs them, says so, and closes the port again."""
        limit = """
            import threading
            def start(thread):
                raise RuntimeError("can't start new thread")
            threading.Thread.start = start
        """
        words = patched(lab, limit, word, "both.test", "9000")
        with Service(9000, echo), Running(lab, *words, program=()) as client:
            assert client.process.wait(LIMIT_S) == (word == "connect")
            result = client.end()
        if word == "connect":
            result.assert_error("cannot start a thread: can't start new thread")
        assert len(lab.elements()) == (0 if word == "connect" else 2)


REJECTED = "compare user, key and resource with the server's file; its log says which is wrong"
SILENT = "compare user and key with the server's file: it may not answer wrong ones"
SILENT_UDP = "see whether the server runs; compare user and key: over UDP it ignores wrong ones"
DROPPED_ON_THE_WAY = (
    "see whether the server runs, and has this control port: its firewall drops all others"
)
NOBODY_THERE = "start the server, or name its control port: -P PORT, with -T (TCP) or -U (UDP)"
UNUSABLE = "use another of its addresses if there is one: servers refuse link-local clients"
NO_PORT = "add port 80, or name a resource with -r ID"
NO_SERVICE = "see whether the service runs on the server, and listens on this address"
REFUSED = "the server rejected the request"
CLOSED = "the server closed the connection without an answer"

FAILURES = {  # by the command line the error and its hint, word for word
    "knock SERVER -r 99": (f"cannot open resource 00000099 on SERVER: {REFUSED}", REJECTED),
    "knock SERVER 26": (f"cannot open port 26 on SERVER: {REFUSED}", REJECTED),
    "knock SERVER 26 -U": (f"cannot open port 26 on SERVER: {REFUSED}", REJECTED),
    "knock SERVER -r 98 -r 99": (
        f"cannot open resource 00000098 and resource 00000099 on SERVER: {REFUSED}", REJECTED,
    ),
    "revoke SERVER -r 99": (f"cannot close resource 00000099 on SERVER: {REFUSED}", REJECTED),
    "knock SERVER 22 -u 2": (f"cannot open port 22 on SERVER: {CLOSED}", SILENT),
    "knock SERVER 22 -u 3": (f"cannot open port 22 on SERVER: {CLOSED}", SILENT),
    "knock SERVER 22 -U -u 3": (
        "cannot open port 22 on SERVER: no answer on its control port 5800/udp within 0.4 s",
        SILENT_UDP,
    ),
    "knock 10.1.0.99 22 23 26": (
        "cannot open port 22, port 23 and port 26 on 10.1.0.99:"
        " no answer on its control port 5800/tcp within 0.4 s", DROPPED_ON_THE_WAY,
    ),
    "knock dead.test 22 -U": (
        "cannot open port 22 on dead.test (fd01::98, 10.1.0.98):"
        " no answer on its control port 5800/udp within 0.4 s", SILENT_UDP,
    ),
    "revoke fd01::99 22": (
        "cannot close port 22 on fd01::99: no answer on its control port 5800/tcp within 0.4 s",
        DROPPED_ON_THE_WAY,
    ),
    "knock SERVER 22 -P 5801": (
        "cannot open port 22 on SERVER: nothing listens on its control port 5801/tcp",
        NOBODY_THERE,
    ),
    "knock SERVER 22 -P 5801 -U": (
        "cannot open port 22 on SERVER: nothing listens on its control port 5801/udp",
        NOBODY_THERE,
    ),
    "knock 10.9.9.9 22": (
        "cannot open port 22 on 10.9.9.9: this machine has no route to it",
        "see whether this machine is online and has IPv4",
    ),
    "knock 10.5.0.1 22": (
        "cannot open port 22 on 10.5.0.1: this machine does not let letmein send to control port"
        " 5800/tcp (Permission denied)",
        "allow it in this machine's own firewall, or in the sandbox that letmein runs in",
    ),
    "knock 10.6.0.1 22": (
        "cannot open port 22 on 10.6.0.1: the host is down, or a firewall rejects its control port"
        " 5800/tcp (No route to host)",
        "see whether the host is up, and whether you may reach it from this network",
    ),
    "knock fe80::1 22": (
        "cannot open port 22 on fe80::1: a link-local address needs a zone, such as fe80::1%eth0",
        UNUSABLE,
    ),
    "knock [fd01::99] 22": (
        "cannot open port 22 on fd01::99: no answer on its control port 5800/tcp within 0.4 s",
        DROPPED_ON_THE_WAY,
    ),
    "knock no.invalid 22": ("cannot find the address of 'no.invalid': NO_NAME", ""),
    "connect no.invalid 22": ("cannot find the address of 'no.invalid': NO_NAME", ""),
    "knock b\xfccher.invalid 22": (
        r"cannot find the address of 'b\xfccher.invalid': NO_NAME", "",
    ),
    "knock both..test 22": ("cannot find the address of 'both..test': NO_NAME", ""),
    "knock v4dead.test.not 22 -4 -6": (
        "'v4dead.test.not' has no IPv6 address", "leave out -6",
    ),
    "knock v4dead.test.not 22 -6": ("'v4dead.test.not' has no IPv6 address", "leave out -6"),
    "knock fd01::1 22 -4": ("'fd01::1' has no IPv4 address", "leave out -4"),
    "knock SERVER 80": (
        "CONF: [RESOURCES] has no port 80 for user 00000001",
        f"it has: 22, 23, 26, 9000, 9001; {NO_PORT}",
    ),
    "knock SERVER 26 -u 2": (
        "CONF: [RESOURCES] has no port 26 for user 00000002",
        "it has: 22, 23, 9000, 9001; add port 26, or name a resource with -r ID",
    ),
    "connect SERVER 80": (
        "CONF: [RESOURCES] has no port 80 for user 00000001",
        f"it has: 22, 23, 26, 9000, 9001; {NO_PORT}",
    ),
    "knock SERVER 22 -u 9": (
        "CONF: [KEYS] has no key for user 00000009",
        "copy the user's line from the server's [KEYS], or name another user with -u ID",
    ),
    "knock -q SERVER 22 -- no-such-thing": (
        "cannot run 'no-such-thing': not found",
        "check its name, PATH and, if it is a script, the program that its first line names",
    ),
    "knock -q SERVER 22 -- /etc": (
        "cannot run '/etc': Permission denied",
        "make it executable: chmod +x; a script begins with a line such as #!/bin/sh",
    ),
    "connect SERVER 9000": (
        "opened port 9000 on SERVER, but cannot connect to port 9000: Connection refused",
        NO_SERVICE,
    ),
    "connect SERVER 9000 -r 22": (
        "opened port 22 on SERVER, but cannot connect to port 9000: Connection refused",
        "name a resource that opens port 9000, or connect to port 22",
    ),
}  # fmt: skip
NOT_RUN = {"knock -q SERVER 22 -- no-such-thing": 127, "knock -q SERVER 22 -- /etc": 126}

NAME_ERRORS = {  # they differ between systems, and with the network
    "Name or service not known", "Temporary failure in name resolution",
    "No address associated with hostname", "this is not a host name",
}  # fmt: skip


@pytest.mark.usefixtures("hold")
class TestWords:
    """What people read when it does not work, and how little when it does."""

    @pytest.mark.parametrize("words", FAILURES)
    def test_a_failure_in_two_lines(self, lab: Lab, words: str) -> None:
        """Each failure is the right problem and the right hint, word for word."""
        problem, hint = FAILURES[words]
        wrong = "".join(f"{user} = {os.urandom(32).hex()}\n" for user in (2, 3))
        # Patience ends soon where silence is what the client gets, and nowhere else.
        patience = 0.4 if "no answer" in problem else 5
        conf = client_conf(timeout=patience, resources=HOLD_RESOURCES.replace("USERS", "1"))
        path = lab.file(conf.replace(f"2 = {KEYS[2].hex()}\n", wrong))
        with lab.client():
            options = ["--seccomp", seccomp_for(words.split())]
            result = lab.command("-c", path, *options, *words.replace("SERVER", SERVER_4).split())
        for reason in NAME_ERRORS:
            if words.split()[1] in ("no.invalid", "b\xfccher.invalid", "both..test"):
                err = re.sub(f": {reason}\n  (check|see) .*\n", ": NO_NAME\n", result.err)
                result = result._replace(err=err)
        wanted = f"letmein: error: {problem}\n" + (f"  {hint}\n" if hint else "")
        wanted = wanted.replace("SERVER", SERVER_4).replace("CONF", str(path))
        assert result[:3] == (NOT_RUN.get(words, 1), "", wanted)
        assert lab.elements() == []

    @pytest.mark.parametrize("control", ["-T", "-U"])
    def test_success(self, lab: Lab, control: str) -> None:
        """A success is one line that names host, port and addresses; with -q it is none."""
        words = [control, "both.test", "22"]
        for word, done in (("knock", "opened"), ("revoke", "closed")):
            result = lab.letmein(word, *words, conf=HOLD_CONF, script=lab.patient)
            first, second = sorted([SERVER_4, SERVER_6])
            orders = [f"({first}, {second})", f"({second}, {first})"]
            assert result.out in [f"{done} port 22 on both.test {order}\n" for order in orders]
            assert (result.status, result.err) == (0, "")
            assert lab.letmein(word, "-q", *words, conf=HOLD_CONF)[:3] == (0, "", "")

    @pytest.mark.parametrize("control", ["-T", "-U"])
    def test_verbose(self, lab: Lab, control: str) -> None:
        """It tells each step, in order, with the time since the start, and no key."""
        words = ["--verbose", "knock", control, "v6dead.test", "22"]
        result = lab.letmein(*words, conf=HOLD_CONF)
        assert result.status == 0
        lines = re.findall(r"(?m)^letmein: (\d+) ms  (.*)$", result.err)
        assert len(lines) == len(result.err.splitlines())
        assert [int(time) for time, _ in lines] == sorted(int(time) for time, _ in lines)
        protocol = "tcp" if control == "-T" else "udp"
        connecting = ["connecting", f"connected from {CLIENT_4}"] if control == "-T" else []
        shaken = [
            "sending KNOCK for resource 00000022", "received CHALLENGE",
            "sending RESPONSE for resource 00000022", "received COMEIN",
        ]  # fmt: skip
        steps = [line for _, line in lines if "fd01::99)" not in line]
        assert steps[0].startswith("read /") and steps[0].endswith(": the key of user 00000001")
        assert steps[1:] == [
            f"server: fd01::99 and {SERVER_4}, control port 5800/{protocol}",
            *[f"v6dead.test ({SERVER_4}): {step}" for step in connecting + shaken],
            "port 22 is open to this machine for 600 s, unless the server's file says otherwise",
        ]
        waited = f"v6dead.test (fd01::99): no answer within {letmein.OTHER_ADDRESS_S} s more"
        assert waited in [line for _, line in lines]
        assert KEYS[1].hex() not in result.err.lower()

    @pytest.mark.parametrize("redirection", ["2>/dev/full", "2>&-", "2>&1 >/dev/null | true"])
    def test_nobody_reads_our_errors(self, lab: Lab, redirection: str) -> None:
        """What is done is the same: COMMAND runs, and all is closed."""
        path = lab.directory / "ran"
        words = ["knock", SERVER_4, "22", "23", "--", "sh", "-c", f"sleep 0.5; echo >>{path}"]
        with lab.client():
            lab.command(program=shell(redirection, *words, lab=lab))
        eventually(path.exists, "COMMAND ran")
        shut_soon(lab)
        path.unlink()

    @pytest.mark.parametrize("word", ["knock", "revoke"])
    def test_nobody_reads_our_output(self, lab: Lab, word: str) -> None:
        """All is done, but it is no success."""
        gone = "trap '' PIPE; while echo; do :; done 2>/dev/null"  # whoever might have read
        for end, unbuffered in itertools.product(("| true", ">/dev/full"), ("", "1")):
            words = shell("", word, SERVER_4, "22", "23", lab=lab)[2]
            script = f"{{ {gone}; {words}; }} {end}; echo ${{PIPESTATUS[0]}}"
            env = {"PYTHONUNBUFFERED": unbuffered}
            with Running(lab, "bash", "-c", script, program=(), env=env) as client:
                result = client.end()
            assert result.out == "1\n", result
            assert result.err in ("", "letmein: error: [Errno 28] No space left on device\n")
            assert len(lab.elements()) == (2 if word == "knock" else 0)

    def test_closed_output(self, lab: Lab) -> None:
        """A knock works without any of its standard streams."""
        for redirection in (">&-", "2>&-", "<&-", "<&- >&- 2>&-"):
            with lab.client():
                words = shell(redirection, "knock", SERVER_4, "22", lab=lab)
                result = lab.command(program=words)
            assert (result.status, result.err) == (0, "")
            words = shell(redirection, "knock", SERVER_4, lab=lab)
            assert lab.command(program=words).status == 2

    @pytest.mark.parametrize("timeout, status", [("0", 1), ("4294967295", 0), ("1e7", 0)])
    @pytest.mark.parametrize("control", ["-T", "-U"])
    def test_any_control_timeout(
        self, lab: Lab, timeout: str, status: int, control: str
    ) -> None:
        """Any control-timeout works, from none to 136 years."""
        conf = HOLD_CONF.replace("control-timeout = 5", f"control-timeout = {timeout}")
        target = "10.1.0.99" if status else SERVER_4
        result = lab.letmein("knock", control, target, "22", conf=conf)
        assert result.status == status
        assert "10.1.0.99: no answer" in result.err or not status

    @pytest.mark.parametrize("timeout", ["0", "0.001", "4294967295"])
    def test_any_timeout_of_a_lease(self, lab: Lab, timeout: str) -> None:
        """Any timeout of a lease works while COMMAND runs, from none to 136 years."""
        conf = HOLD_CONF.replace("port: 22", f"port: 22 / timeout: {timeout}")
        result = lab.letmein("knock", "-q", SERVER_4, "22", "--", "sleep", "1.2", conf=conf)
        assert result[:3] == (0, "", "")

    @pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1", "cp1252"])
    @pytest.mark.parametrize("name", ["b\xfccher.test", "\u4f8b.test"])
    def test_a_name_in_any_alphabet(self, lab: Lab, name: str, encoding: str) -> None:
        """A host's name in any alphabet is found, and printed as the terminal can."""
        words = ["knock", name, "22"]
        with Running(lab, *words, env={"PYTHONIOENCODING": encoding}) as client:
            out = client.hear(-1)
            assert client.process.wait(LIMIT_S) == 0
        said = name.encode(encoding, "backslashreplace")
        assert out == b"opened port 22 on %s (10.1.0.1)\n" % said


# What Windows or macOS lacks (or both), and what the OpenWrt package python3-light does. In
# such a Python our client has to work; in OpenWrt's the server, too.
ELSEWHERE = """
    import os, select, selectors, shutil, signal, socket, subprocess, sys
    for name in (
        "crypt curses fcntl grp nis pty pwd readline resource spwd syslog termios tty _curses"
    ).split():
        sys.modules[name] = None
    socket.socket.recvmsg = socket.socket.sendmsg = property()
    for module, names in {
        os: "chroot confstr fork forkpty get_blocking getegid geteuid getgid getgroups getloadavg"
        " getresuid getuid initgroups memfd_create mkfifo nice openpty pidfd_open pipe2"
        " posix_fadvise posix_spawn posix_spawnp pread prlimit sched_getaffinity sendfile"
        " set_blocking setgid setgroups setresuid setsid setuid splice statvfs sysconf uname",
        select: "PIPE_BUF epoll poll",
        selectors: "EpollSelector PollSelector",
        signal: "SIGALRM SIGCHLD SIGHUP SIGKILL SIGPIPE SIGQUIT SIGUSR1 SIGUSR2 pthread_kill"
        " pthread_sigmask setitimer sigwait",
        socket: "AF_NETLINK AF_PACKET AF_UNIX CMSG_LEN CMSG_SPACE IPV6_PKTINFO IPV6_RECVPKTINFO"
        " MSG_DONTWAIT MSG_NOSIGNAL SCM_RIGHTS SOCK_CLOEXEC SOCK_NONBLOCK SO_BINDTODEVICE"
        " SO_REUSEPORT recv_fds send_fds",
    }.items():
        for name in names.split():
            if hasattr(module, name):
                delattr(module, name)
    selectors.DefaultSelector = selectors.SelectSelector
    os.name = "nt"
"""

PYTHON3_LIGHT = """
    import sys
    for name in (
        "asyncio bz2 cgi concurrent ctypes curses dbm decimal distutils email encodings.idna"
        " ensurepip http idlelib lib2to3 logging lzma multiprocessing pydoc readline sqlite3 ssl"
        " stringprep turtle unicodedata unittest urllib uuid venv xml xmlrpc _asyncio _ctypes"
        " _decimal _hashlib _multiprocessing _sqlite3 _ssl _uuid"
    ).split():
        sys.modules[name] = None
"""
CLIENT_ELSEWHERE = {"Windows and macOS": ELSEWHERE, "python3-light": PYTHON3_LIGHT}


@pytest.mark.parametrize("system", CLIENT_ELSEWHERE)
@pytest.mark.usefixtures("hold")
class TestElsewhere:
    """The client in a Python that lacks what other systems' Pythons lack."""

    @pytest.mark.parametrize("control", ["-T", "-U"])
    @pytest.mark.parametrize("host", [SERVER_4, SERVER_6, "both.test", "v6dead.test"])
    def test_knock_and_revoke(self, lab: Lab, system: str, host: str, control: str) -> None:
        """Over both protocols and IP versions."""
        script = LETMEIN if "dead" in host else lab.patient
        for word, done in (("knock", "opened"), ("revoke", "closed")):
            code = CLIENT_ELSEWHERE[system]
            words = patched(lab, code, word, control, host, "22", script=script)
            with Running(lab, *words, program=()) as client:
                result = client.end()
            assert (result.status, result.err) == (0, "")
            assert result.out.startswith(f"{done} port 22 on {host} (")
            assert bool(lab.elements()) == (word == "knock")

    def test_connect(self, lab: Lab, system: str) -> None:
        """With a lease that has to be renewed."""
        call = ["connect", "both.test", "9001"]
        words = patched(lab, CLIENT_ELSEWHERE[system], *call, script=lab.patient)
        with Service(9001, echo), Running(lab, *words, program=()) as client:
            client.say(b"here")
            assert client.hear(4) == b"here"
            time.sleep(1.2)  # so that it knocks again
            assert client.end()[:3] == (0, "", "")
        assert lab.elements() == []

    @pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
    def test_a_signal(self, lab: Lab, system: str, name: str) -> None:
        """It ends `connect` and its lease."""
        call = ["connect", "both.test", "9000"]
        words = patched(lab, CLIENT_ELSEWHERE[system], *call, script=lab.patient)
        number = getattr(signal, name)
        with Service(9000, echo), Running(lab, *words, program=()) as client:
            client.say(b"here")
            assert client.hear(4) == b"here"
            assert client.end(number)[:3] == (128 + number, "", "")
        assert lab.elements() == []

    def test_command(self, lab: Lab, system: str) -> None:
        """Its exit status is ours."""
        command = ["-q", "both.test", "22", "--", "sh", "-c", "echo here; exit 7"]
        words = patched(lab, CLIENT_ELSEWHERE[system], "knock", *command, script=lab.patient)
        with Running(lab, *words, program=()) as client:
            assert client.end()[:3] == (7, "here\n", "")
        assert lab.elements() == []

    def test_errors(self, lab: Lab, system: str) -> None:
        """They are the same as on Linux."""
        for word, problem in (
            ("no.invalid", "cannot find the address of 'no.invalid': "),
            ("b\xfccher.invalid", r"cannot find the address of 'b\xfccher.invalid': "),
            ("dead.test", "cannot open port 22 on dead.test (fd01::98, 10.1.0.98): no answer"),
        ):
            conf = client_conf(timeout=0.2)
            words = patched(lab, CLIENT_ELSEWHERE[system], "knock", word, "22", conf=conf)
            with Running(lab, *words, program=()) as client:
                client.end().assert_error(f"letmein: error: {problem}")

    def test_gen_key(self, lab: Lab, system: str) -> None:
        """It prints a key."""
        words = patched(lab, CLIENT_ELSEWHERE[system], "gen-key")
        with Running(lab, *words, program=()) as client:
            assert re.fullmatch("00000003 = [0-9A-F]{64}\n", client.end().out)


# What a knock imports beyond a bare Python: ours, and what those need.
KNOCK_IMPORTS = """
    collections contextlib errno functools hmac itertools letmein os re select selectors
    signal socket struct sys threading time
    __future__ array copyreg enum hashlib heapq keyword math operator reprlib
    sre_compile sre_constants sre_parse types warnings
"""


class TestImports:
    def test_a_knock_imports_no_more_than_it_needs(self, lab: Lab, hold: Server) -> None:
        """Each module costs time between Enter and the open port."""
        knock = """
            sys.path.insert(0, sys.argv[1])
            import letmein
            assert letmein.main(["-c", sys.argv[2], "knock", "both.test", "22"]) == 0
        """
        seen = []
        for code in ("", textwrap.dedent(knock)):
            script = f"import sys\n{code}\nprint(*sys.modules, file=sys.stderr)"
            with lab.client():
                done = subprocess.run(
                    [sys.executable, "-I", "-c", script, HERE, lab.file(HOLD_CONF)],
                    capture_output=True, encoding="utf-8", timeout=LIMIT_S, env=unmeasured(),
                )  # fmt: skip
            assert done.returncode == 0, done.stderr
            seen.append({name.split(".")[0] for name in done.stderr.split()})
        found = {name for name in seen[1] - seen[0] if name == "__future__" or name[0] != "_"}
        assert found - set(KNOCK_IMPORTS.split()) == set()


# ----------------------------------------------------------------------------
# 4  Firewall
#
# The kernel lets in whoever holds a lease, nobody else and no longer, whatever is done to it.
# ----------------------------------------------------------------------------

# All pairs of what is opened, over which protocol and IP version it is asked for.
KNOCKS = [
    (22, "tcp", "-T", CLIENT_4, OTHER_4),
    (22, "tcp", "-U", CLIENT_6, OTHER_6),
    (24, "udp", "-T", CLIENT_6, OTHER_6),
    (24, "udp", "-U", CLIENT_4, OTHER_4),
    (23, "tcp udp", "-T", CLIENT_6, OTHER_6),
    (23, "tcp udp", "-U", CLIENT_4, OTHER_4),
]


class TestPackets:
    """Who gets through, where a class's tests can share a server."""

    @pytest.mark.parametrize("port, open_to, control, source, other", KNOCKS)
    def test_knock_and_revoke(
        self,
        lab: Lab,
        server: Server,
        source: str,
        other: str,
        control: str,
        port: int,
        open_to: str,
    ) -> None:
        """A knock opens its port for its address alone, a revocation shuts it; both are logged."""
        host = server_for(source)
        proto = "tcp" if control == "-T" else "udp"
        fields = {"peer": source, "proto": proto, "user": "00000001", "resource": f"000000{port}"}
        before = len(server.events("granted", **fields))
        assert lab.protocols_to(port, source) == []
        lab.letmein("knock", control, host, str(port)).assert_good()
        assert lab.protocols_to(port, source) == open_to.split()
        assert lab.protocols_to(port, other) == []
        assert not lab.reaches(22 if port != 22 else 23, source)
        server.wait_for("granted", before + 1, **fields)
        lab.letmein("revoke", control, host, str(port)).assert_good()
        assert lab.protocols_to(port, source) == []
        assert lab.elements() == []
        server.wait_for("revoked", before + 1, **fields)

    def test_what_the_client_says(self, lab: Lab, server: Server) -> None:
        """It names port and host; --verbose tells the messages; `close` is `revoke`."""
        result = lab.letmein("--verbose", "knock", SERVER_4, "22")
        result.assert_good()
        assert "22" in result.out
        assert SERVER_4 in result.out
        assert "COMEIN" in result.err
        result = lab.letmein("--verbose", "knock", SERVER_4, "-r", "99")
        assert f" ms  {SERVER_4}: the server rejected the request\n" in result.err, result
        result = lab.letmein("close", SERVER_4, "-r", "22")
        result.assert_good()
        assert result.out.count("\n") == 1
        assert not lab.reaches(22, CLIENT_4)

    def test_revoking_what_is_not_open_succeeds(self, lab: Lab, server: Server) -> None:
        """A revocation of nothing is a success."""
        for control in ("-T", "-U"):
            lab.letmein("revoke", control, SERVER_4, "22").assert_good()
        assert lab.elements() == []

    @pytest.mark.parametrize("control", ["-T", "-U"])
    def test_a_resource_of_another_user(self, lab: Lab, server: Server, control: str) -> None:
        """Only its users open or shut a resource."""
        lab.letmein("knock", control, "-u", "2", SERVER_4, "-r", "26").assert_error("rejected")
        assert not lab.reaches(26, CLIENT_4)
        server.wait_for("refused", user="00000002", resource="00000026")
        lab.letmein("knock", control, "-u", "1", SERVER_4, "-r", "26").assert_good()
        assert lab.reaches(26, CLIENT_4)
        lab.letmein("revoke", control, "-u", "2", SERVER_4, "-r", "26").assert_error("rejected")
        assert lab.reaches(26, CLIENT_4)
        lab.letmein("revoke", control, "-u", "1", SERVER_4, "-r", "26").assert_good()

    def test_leases_of_several_addresses(self, lab: Lab, server: Server) -> None:
        """Each address has a lease of its own, and its neighbours have none."""
        for source in (CLIENT_4, OTHER_4, CLIENT_6, "10.77.1.1", "fd77::1"):
            assert handshake(lab, source=source) == COMEIN
        for source in (CLIENT_4, OTHER_4, CLIENT_6, "10.77.1.1", "fd77::1"):
            assert lab.reaches(22, source), source
        assert not lab.reaches(22, "10.77.1.2")
        assert not lab.reaches(22, OTHER_6)
        assert handshake(lab, operation=REVOKE, source=OTHER_4) == COMEIN
        assert not lab.reaches(22, OTHER_4)
        for source in (CLIENT_4, CLIENT_6, "10.77.1.1", "fd77::1"):
            assert lab.reaches(22, source), source
            assert handshake(lab, operation=REVOKE, source=source) == COMEIN

    @pytest.mark.parametrize("control", ["-T", "-U"])
    def test_a_timeout_of_0_opens_nothing(self, lab: Lab, server: Server, control: str) -> None:
        """A resource with a timeout of 0 is refused, and the server warns of it."""
        lab.letmein("knock", control, SERVER_4, "27").assert_error("rejected")
        assert not lab.reaches(27, CLIENT_4)
        assert lab.elements() == []
        assert re.search(r"event=warning .* 27: .*timeout", server.log), server.log

    def test_the_control_port_is_no_resource(self, lab: Lab, server: Server) -> None:
        """A knock for a resource that names the control port is refused."""
        lab.letmein("knock", SERVER_4, "-r", "58").assert_error("rejected")
        assert lab.elements() == []

    def test_a_name_with_both_families(self, lab: Lab, server: Server) -> None:
        """A name is knocked over IPv4 and IPv6."""
        for options in ([], ["-4", "-6"]):
            words = (*options, "both.test", "22")
            lab.letmein("knock", *words, script=lab.patient).assert_good()
            assert lab.reaches(22, CLIENT_4)
            assert lab.reaches(22, CLIENT_6)
            lab.letmein("revoke", *words, script=lab.patient).assert_good()
            assert lab.elements() == []

    @pytest.mark.parametrize(
        "option, in_, out", [("-4", CLIENT_4, CLIENT_6), ("-6", CLIENT_6, CLIENT_4)]
    )
    def test_one_family_of_a_name(
        self, lab: Lab, server: Server, option: str, in_: str, out: str
    ) -> None:
        """-4 and -6 knock over one of them alone."""
        lab.letmein("knock", option, "both.test", "22").assert_good()
        assert lab.reaches(22, in_)
        assert not lab.reaches(22, out)
        lab.letmein("revoke", option, "both.test", "22").assert_good()

    @pytest.mark.parametrize(
        "control, name, alive",
        [
            ("-T", "v4dead.test", CLIENT_6),
            ("-T", "v6dead.test", CLIENT_4),
            ("-U", "v6dead.test", CLIENT_4),
        ],
    )
    def test_a_name_with_one_dead_family(
        self, lab: Lab, server: Server, control: str, name: str, alive: str
    ) -> None:
        """One dead family is no failure and costs little, unless -4 -6 asks for both."""
        result = lab.letmein("knock", control, name, "22")
        assert result.status == 0, result
        assert result.took < 4, "the dead family is waited for"
        assert lab.reaches(22, alive)
        # Time enough for the one that lives.
        conf = client_conf(timeout=1.5)
        result = lab.letmein("revoke", control, "-4", "-6", name, "22", conf=conf)
        result.assert_error()
        assert lab.elements() == []

    def test_status(self, lab: Lab, server: Server) -> None:
        """`status` says who holds what, for how long, and how many packets came through."""
        def status(*arguments: str) -> str:
            result = lab.command("status", "-c", server.path, *arguments)
            assert result.status == 0, result
            return result.out

        assert "Nobody holds a lease" in status()
        assert json.loads(status("--json"))["leases"] == []

        assert handshake(lab, 0x22) == COMEIN
        assert handshake(lab, 0x24, source=CLIENT_6, user=2) == COMEIN
        assert lab.reaches(22, CLIENT_4)
        table = re.sub(" +", " ", status())
        # What ends next comes first.
        assert re.match(
            "ADDRESS OPEN USER LEFT PACKETS BYTES\n"
            rf"{CLIENT_6} 24/udp 00000002 (5.s|1m 0s) 0 0\n"
            rf"{CLIENT_4} 22/tcp 00000001 (9m 5.s|10m 0s) [1-9]\d* [1-9]\d*\n\n",
            table,
        ), table

        leases = {lease["address"]: lease for lease in json.loads(status("--json"))["leases"]}
        assert set(leases) == {CLIENT_4, CLIENT_6}
        lease = leases[CLIENT_4]
        assert (lease["protocol"], lease["port"]) == ("tcp", 22)
        assert (lease["user"], lease["resource"]) == ("00000001", "00000022")
        assert 590 <= lease["seconds_left"] <= 600
        assert lease["packets"] >= 1
        assert leases[CLIENT_6]["packets"] == 0

        # Two users at one address share the lease: the last who knocked is its user.
        assert handshake(lab, 0x22, user=2) == COMEIN
        leases = {lease["address"]: lease for lease in json.loads(status("--json"))["leases"]}
        assert leases[CLIENT_4]["user"] == "00000002"
        assert handshake(lab, 0x22, operation=REVOKE, user=1) == COMEIN
        assert handshake(lab, 0x24, operation=REVOKE, source=CLIENT_6, user=2) == COMEIN
        assert json.loads(status("--json"))["leases"] == []

    def test_the_table_of_leases(self, lab: Lab, server: Server) -> None:
        """It is aligned and fits 80 columns; on a terminal it has colours, unless NO_COLOR is set;
        --watch shows it again and again, and Ctrl-C ends that as a success."""
        assert handshake(lab, 0x23) == COMEIN
        assert handshake(lab, 0x24, source=CLIENT_6, user=2) == COMEIN
        words = [sys.executable, str(LETMEIN), "status", "-c", str(server.path)]
        words += ["--rundir", str(server.rundir)]
        plain = lab.command(*words[2:]).out
        lines = plain.split("\n\n")[0].splitlines()
        assert "23/tcp+udp" in plain and max(map(len, lines)) <= 80
        starts = [[match.start() for match in re.finditer(r"(?<!\S)\S", line)][1] for line in lines]
        assert len(set(starts)) == 1, "the second column is aligned"
        (told,) = [line for line in plain.splitlines() if line.startswith("Server: ")]
        assert f"pid {server.process.pid}, up " in told and len(told) <= 80
        assert "port 5800/tcp+udp, inet/filter, rules 5 of 100" in plain
        for colour in (True, False):
            env = {**environment("NO_COLOR"), **({} if colour else {"NO_COLOR": "1"})}
            env["COLUMNS"] = "40"
            shown = on_a_terminal([*words, "--watch"], env, lambda text: text.count("ADDRESS") == 2)
            assert ("\x1b[1mADDRESS" in shown) == colour
            about = shown.partition("Server: ")[2].partition("\x1b")[0].splitlines()
            assert max(map(len, about[1:])) <= 40, "what is below the table is wrapped"
        for resource, source in ((0x23, CLIENT_4), (0x24, CLIENT_6)):
            assert handshake(lab, resource, REVOKE, source=source) == COMEIN

    def test_a_status_that_cannot_be_had(self, lab: Lab, server: Server) -> None:
        """Each cause has its own words: no server, no table, no right."""
        arguments = ("status", "-c", server.path)
        elsewhere = lab.command(*arguments, "--rundir", lab.directory)
        said = f"No server answers in {lab.directory}, but its rules are in table inet filter."
        assert said in elsewhere.out, elsewhere
        path = lab.file(server_conf().replace("table = filter", "table = filtr"))
        lab.command("status", "-c", path).assert_error("table inet filtr does not exist")
        words = ["unshare", "--user", "--", sys.executable, str(LETMEIN), *map(str, arguments)]
        lab.command(program=words).assert_error("cannot read table inet filter: only root may")

    def test_the_network_process_is_replaced(self, lab: Lab, server: Server) -> None:
        """It is killed, and leases stay while another one takes its place."""
        assert handshake(lab, 0x22) == COMEIN
        first = server.network_process()
        os.kill(first, signal.SIGKILL)
        server.wait_for("network-process-lost")
        lab.letmein("knock", "-T", SERVER_4, "23").assert_good()
        assert server.network_process() != first
        assert lab.reaches(22, CLIENT_4)
        assert lab.reaches(23, CLIENT_4)
        for resource in (0x22, 0x23):
            assert handshake(lab, resource, REVOKE) == COMEIN

    def test_knocks_that_come_together(self, lab: Lab, server: Server) -> None:
        """40 knocks at once, and 40 revocations, all succeed."""
        addresses = [f"10.77.2.{number}" for number in range(1, 41)]
        assert storm(lab, addresses, 40, KNOCK) == 40
        assert len(lab.elements()) == 40
        assert storm(lab, addresses, 40, REVOKE) == 40
        assert lab.elements() == []


class TestTime:
    """Leases end by themselves."""

    def test_a_lease_ends_on_time(self, lab: Lab) -> None:
        """A lease ends when its timeout has passed, counted from the last knock."""
        lab.load()
        resources = "25 = port: 25 / timeout: 3\n23 = port: 23 / timeout: 2"
        with Server(lab, server_conf(resources)):
            before = time.monotonic()
            assert handshake(lab, 0x25) == COMEIN
            told = time.monotonic()
            assert handshake(lab, 0x23) == COMEIN
            ending, other = Ending(lab, 25), Ending(lab, 23)
            # The other lease is to last 2 s from its second knock.
            while time.monotonic() < told + 1.5:
                ending.look()
                time.sleep(0.02)
            again = time.monotonic()
            assert handshake(lab, 0x23, protocol="udp") == COMEIN
            told_again = time.monotonic()
            eventually(lambda: not ending.look() | other.look(), "the leases do not end")
            # The kernel counts from just before it says so: that is what `before` allows for.
            ending.assert_took(3, before, told)
            other.assert_took(2, again, told_again)
            # What has ended by itself can be revoked and opened again.
            assert handshake(lab, 0x25, REVOKE) == COMEIN
            assert handshake(lab, 0x23) == COMEIN
            assert lab.reaches(23, CLIENT_4)

    def test_a_lease_survives_sigkill_and_ends_by_itself(self, lab: Lab) -> None:
        """Without any server it lasts, ends on time, and a next server serves."""
        lab.load()
        with Server(lab, server_conf("22 = port: 22 / timeout: 4")) as server:
            before = time.monotonic()
            assert handshake(lab) == COMEIN
            told = time.monotonic()
            server.kill()
            assert lab.reaches(22, CLIENT_4)
            result = lab.command("status", "--json", "-c", server.path)
            assert [lease["address"] for lease in json.loads(result.out)["leases"]] == [CLIENT_4]
            ending = Ending(lab, 22)
            ending.wait()
            ending.assert_took(4, before, told)
        # And the next server takes up the place.
        with Server(lab, server_conf()):
            assert handshake(lab) == COMEIN
            assert lab.reaches(22, CLIENT_4)

    def test_without_a_monitor_the_network_process_ends(self, lab: Lab) -> None:
        """The network process does not outlive its monitor."""
        lab.load()
        with Server(lab, server_conf()) as server:
            network = Path(f"/proc/{server.network_process()}")
            server.process.kill()
            server.wait()
            eventually(lambda: not alive(network), "the network process lives on alone")


CHAINS = "chain-forward = LETMEIN-FORWARD\nchain-output = LETMEIN-OUTPUT"

JUMPS = """
30 = jump / input: DOOR-INPUT / input-match: saddr / forward: DOOR-FORWARD
     / forward-match: saddr / output: DOOR-OUTPUT / output-match: saddr
31 = jump / input: DOOR-INPUT / forward: DOOR-FORWARD / output: DOOR-OUTPUT
32 = jump / input: DOOR-INPUT / input-match: saddr / timeout: 0.6
33 = jump / input: DOOR-INPUT / timeout: 0.6 / users: 1
34 = jump / input: DOOR-INPUT / input-match: saddr
"""
JUMPS_CLIENT = client_conf(resources=JUMPS)


class TestJumps:
    @pytest.mark.parametrize(
        "family, source, other",
        [
            ("inet", CLIENT_4, OTHER_4),
            ("inet", CLIENT_6, OTHER_6),
            ("ip", CLIENT_4, OTHER_4),
            ("ip6", CLIENT_6, OTHER_6),
        ],
    )
    def test_jumps(self, lab: Lab, family: str, source: str, other: str) -> None:
        """A jump applies to its holder with `-match: saddr`, else to all while anybody holds it."""
        everything = "input forward output"
        host = server_for(source)
        icmp = {"inet": "{ icmp, icmpv6 }", "ip": "icmp", "ip6": "icmpv6"}[family]
        ruleset = JUMP_RULESET.format(family=family).replace("{ icmp, icmpv6 }", icmp)
        lab.load(ruleset)
        with Server(lab, server_conf(JUMPS, family=family, nftables=CHAINS)) as server:
            server.wait_for("ready", table=f"{family}/filter")

            def call(command: str, resource: str) -> None:
                if family == "inet":
                    lab.letmein(command, host, "-r", resource, conf=JUMPS_CLIENT).assert_good()
                else:
                    operation = KNOCK if command == "knock" else REVOKE
                    assert handshake(lab, int(resource, 16), operation, source=source) == COMEIN

            assert jumps(lab, source) == ""
            call("knock", "30")
            assert jumps(lab, source) == everything
            assert jumps(lab, other) == ""
            result = lab.command("status", "--json", "-c", server.path)
            (lease,) = json.loads(result.out)["leases"]
            assert (lease["address"], lease["resource"]) == (source, "00000030")
            text = lab.command("status", "-c", server.path).out
            assert re.search(f"(?m)^{source} +00000030: DOOR-INPUT, ", text), text
            call("revoke", "30")
            assert jumps(lab, source) == ""

            # Without -match it is for all, as long as anybody holds it.
            call("knock", "31")
            assert jumps(lab, source) == everything
            assert jumps(lab, other) == everything
            assert handshake(lab, 0x31, source=other) == COMEIN
            call("revoke", "31")
            assert jumps(lab, source) == everything
            assert handshake(lab, 0x31, REVOKE, source=other) == COMEIN
            assert jumps(lab, source) == ""
            assert lab.elements() == []

    def test_leases_for_the_same_chain_are_apart(self, lab: Lab) -> None:
        """Of two leases for one chain, revoking one leaves the other."""
        lab.load(JUMP_RULESET.format(family="inet"))
        with Server(lab, server_conf(JUMPS, nftables=CHAINS)):
            for resource in (0x30, 0x34):
                assert handshake(lab, resource) == COMEIN
            assert handshake(lab, 0x34, REVOKE) == COMEIN
            assert lab.reaches(8080, CLIENT_4)
            assert handshake(lab, 0x34) == COMEIN
            assert handshake(lab, 0x30, REVOKE) == COMEIN
            assert lab.reaches(8080, CLIENT_4)
            assert handshake(lab, 0x34, REVOKE) == COMEIN
            assert not lab.reaches(8080, CLIENT_4)

    def test_jumps_end_by_themselves(self, lab: Lab) -> None:
        """Jumps end on time, and a gate with its longest lease."""
        lab.load(JUMP_RULESET.format(family="inet"))
        with Server(lab, server_conf(JUMPS, nftables=CHAINS)):
            before = time.monotonic()
            assert handshake(lab, 0x32) == COMEIN
            told = time.monotonic()
            ending = Ending(lab, 8080)
            ending.wait()
            ending.assert_took(0.6, before, told)
            # A gate is open as long as the longest lease, and not longer.
            assert handshake(lab, 0x33) == COMEIN
            time.sleep(0.3)
            before = time.monotonic()
            assert handshake(lab, 0x33, source=OTHER_4) == COMEIN
            told = time.monotonic()
            ending = Ending(lab, 8080, CLIENT_6)
            ending.wait()
            ending.assert_took(0.6, before, told)
            assert handshake(lab, 0x33, REVOKE) == COMEIN
            assert not lab.reaches(8080, CLIENT_4)

    def test_the_gate_closes_early_when_the_longest_lease_is_revoked(self, lab: Lab) -> None:
        """A gate shuts with the longest lease that is left."""
        lab.load(JUMP_RULESET.format(family="inet"))
        resources = "33 = jump / input: DOOR-INPUT / timeout: 3"
        with Server(lab, server_conf(resources, nftables=CHAINS)):
            before = time.monotonic()
            assert handshake(lab, 0x33) == COMEIN
            told = time.monotonic()
            time.sleep(1)
            assert handshake(lab, 0x33, source=OTHER_4) == COMEIN
            assert handshake(lab, 0x33, REVOKE, source=OTHER_4) == COMEIN
            assert lab.reaches(8080, OTHER_6)
            ending = Ending(lab, 8080, OTHER_6)
            ending.wait()
            # The lease that was revoked would have lasted a second more.
            ending.assert_took(3, before, told, more=0.5)

    @pytest.mark.parametrize("end", ["revoked", "expired"])
    def test_the_leases_of_two_gates_end(self, lab: Lab, end: str) -> None:
        """One after the other, with no new one in between: the server goes on."""
        lab.load(JUMP_RULESET.format(family="inet"))
        text = "jump / input: DOOR-INPUT / timeout: 0.6"
        with Server(lab, server_conf(f"31 = {text}\n33 = {text}\n34 = {text}")):
            for resource in (0x31, 0x33):
                assert handshake(lab, resource) == COMEIN
            if end == "expired":
                eventually(lambda: not lab.reaches(8080, CLIENT_4), "the leases do not end")
            for resource in (0x31, 0x33):
                assert handshake(lab, resource, REVOKE) == COMEIN
            assert not lab.reaches(8080, CLIENT_4)
            assert handshake(lab, 0x34) == COMEIN
            assert lab.reaches(8080, CLIENT_4)

    def test_one_chain_for_two_hooks(self, lab: Lab) -> None:
        """Its rules are there once, and nothing is missing."""
        lab.load(JUMP_RULESET.format(family="inet"))
        nft_do("add rule inet filter output jump LETMEIN-INPUT")
        conf = server_conf("22 = port: 22", nftables="chain-output = LETMEIN-INPUT")
        with Server(lab, conf) as server:
            assert handshake(lab) == COMEIN
            flush_the_chain(lab)
            server.wait_for("healed", leases="1")
            quiet(server)
            assert lab.reaches(22, CLIENT_4)
            assert "cannot-heal" not in server.log

    def test_other_users_and_rules(self, lab: Lab) -> None:
        """Users and max-nr-rules count for jumps as for ports."""
        lab.load(JUMP_RULESET.format(family="inet"))
        with Server(lab, server_conf(JUMPS, "5800", nftables=f"{CHAINS}\nmax-nr-rules = 4")):
            result = lab.letmein("knock", "-u", "2", SERVER_4, "-r", "33", conf=JUMPS_CLIENT)
            result.assert_error("rejected")
            assert handshake(lab, 0x30) == COMEIN, "three jumps and the control port are four"
            before = jumps(lab, CLIENT_4)
            assert handshake(lab, 0x34) == COMEIN
            assert jumps(lab, CLIENT_4) == "input" != before, "it took the place of the three"
            assert not lab.reaches(8080, OTHER_4)

    def test_a_chain_that_is_not_set(self, lab: Lab) -> None:
        """A jump without its chain is a warning, and its knock is refused."""
        lab.load(JUMP_RULESET.format(family="inet"))
        with Server(lab, server_conf(JUMPS)) as server:
            assert "chain-forward" in server.log, "a warning"
            for resource in ("30", "31"):
                result = lab.letmein("knock", SERVER_4, "-r", resource, conf=JUMPS_CLIENT)
                result.assert_error("rejected")
            assert jumps(lab, CLIENT_4) == ""
            assert lab.elements() == []
            lab.letmein("knock", SERVER_4, "-r", "34", conf=JUMPS_CLIENT).assert_good()
            assert jumps(lab, CLIENT_4) == "input"


# Families ip and ip6 filter one IP version only.
class TestFamilies:
    def test_the_longest_control_timeout(self, lab: Lab) -> None:
        """The longest control-timeout works, on both sides."""
        lab.load()
        conf = client_conf(timeout=4e9)
        with Server(lab, server_conf(general="control-timeout = 4294967295")):
            for protocol in ("-T", "-U"):
                lab.letmein("knock", protocol, SERVER_4, "22", conf=conf).assert_good()

    @pytest.mark.parametrize(
        "family, inside, outside", [("ip", CLIENT_4, CLIENT_6), ("ip6", CLIENT_6, CLIENT_4)]
    )
    def test_one_version(self, lab: Lab, family: str, inside: str, outside: str) -> None:
        """Families ip and ip6 serve their version, and refuse the other."""
        ruleset = JUMP_RULESET.format(family=family)
        icmp = "icmp" if family == "ip" else "icmpv6"
        lab.load(ruleset.replace("{ icmp, icmpv6 }", icmp))
        with Server(lab, server_conf(family=family)) as server:
            for protocol in ("tcp", "udp"):
                assert handshake(lab, 0x23, protocol=protocol, source=inside) == COMEIN
                assert lab.reaches(23, inside)
                assert lab.reaches(23, inside, "udp")
                assert handshake(lab, 0x23, REVOKE, protocol, inside) == COMEIN
                assert not lab.reaches(23, inside)
                assert handshake(lab, 0x23, protocol=protocol, source=outside) == GOAWAY
            lab.letmein("knock", server_for(inside), "23").assert_good()
            lab.letmein("revoke", server_for(inside), "23").assert_good()
            lab.letmein("knock", server_for(outside), "23").assert_error("rejected")
            server.wait_for("failed", peer=outside)
            assert lab.elements() == []


CHECK = ("--user", "nobody", "--check")  # an account that every machine has

CHECKED = """\
file          {path}
control port  5800/tcp+udp
error policy  basic-auth
seccomp       off
table         inet filter
chains        LETMEIN-INPUT (input)
sets          letmein-4, letmein-6, letmein-00000030-4, letmein-00000030-6
keys of       00000001, 00000002

RESOURCE  OPENS        SECONDS  USERS
00000022  22/tcp           600  everybody with a key
00000030  jump to WEB     60.5  00000002

1 warning: nothing was changed
"""


class TestRules:
    """max-nr-rules, stop, --check and the ways to start."""

    def test_max_nr_rules_at_its_edge(self, lab: Lab) -> None:
        """When it is full, a newcomer takes the place of the oldest lease, and the log says so."""
        lab.load()
        with Server(lab, server_conf(port="5800", nftables="max-nr-rules = 4")) as server:
            # One rule is the control port's, so three are left, and 23 takes two of them.
            assert handshake(lab, 0x22, source="10.77.0.1") == COMEIN
            assert handshake(lab, 0x23, source="10.77.0.2") == COMEIN
            assert handshake(lab, 0x22, source="10.77.0.1") == COMEIN, "a repeated knock is no more"
            assert len(lab.elements()) == 3
            # The repeated knock has made the first lease the youngest.
            assert handshake(lab, 0x22, source="10.77.0.3") == COMEIN
            server.wait_for("revoked", peer="10.77.0.2", reason="max-nr-rules is reached")
            assert lab.reaches(22, "10.77.0.1")
            assert not lab.reaches(23, "10.77.0.2")
            assert lab.reaches(22, "10.77.0.3")
            assert len(lab.elements()) == 2
            # Two do not fit into the one that is free: one more goes.
            assert handshake(lab, 0x23, source="10.77.0.4") == COMEIN
            assert not lab.reaches(22, "10.77.0.1")
            assert lab.reaches(22, "10.77.0.3")
            assert len(lab.elements()) == 3

    def test_max_nr_rules_counts_both_control_ports(self, lab: Lab) -> None:
        """What can never fit is refused, and costs nobody a lease."""
        lab.load()
        with Server(lab, server_conf(nftables="max-nr-rules = 3")) as server:
            assert handshake(lab, 0x22, source="10.77.0.1") == COMEIN
            assert handshake(lab, 0x23, source="10.77.0.2") == GOAWAY
            assert "max-nr-rules (3)" in server.wait_for("failed", peer="10.77.0.2")["reason"]
            assert lab.reaches(22, "10.77.0.1")
            assert not lab.reaches(23, "10.77.0.2")

    def test_nobody_is_kept_out_by_the_leases_of_others(self, lab: Lab) -> None:
        """A user who knocks from many addresses pushes out their own leases, never another's."""
        lab.load()
        with Server(lab, server_conf(nftables="max-nr-rules = 12")) as server:
            assert handshake(lab, 0x22, source="10.77.0.1", user=1) == COMEIN
            for number in range(40):
                assert handshake(lab, 0x22, source=f"10.77.1.{number}", user=2) == COMEIN
            assert lab.reaches(22, "10.77.0.1")
            assert len(lab.elements()) == 10
            assert handshake(lab, 0x23, source="10.77.0.2", user=1) == COMEIN
            assert lab.reaches(22, "10.77.0.1")
            assert lab.reaches(23, "10.77.0.2")
            assert len(lab.elements()) == 10
            ended = server.events("revoked", reason="max-nr-rules is reached")
            assert {event["user"] for event in ended} == {"00000002"}
            assert len(ended) == 40 - 9 + 2

    def test_an_ended_lease_makes_room(self, lab: Lab) -> None:
        """It goes before one that still counts."""
        lab.load()
        resources = "22 = port: 22 / timeout: 0.3\n23 = port: 23"
        with Server(lab, server_conf(resources, "5800", nftables="max-nr-rules = 3")) as server:
            assert handshake(lab, 0x23, source="10.77.0.1") == COMEIN
            assert handshake(lab, 0x22, source="10.77.0.2") == COMEIN
            eventually(lambda: not lab.reaches(22, "10.77.0.2"), "the lease does not end")
            time.sleep(2 * TICK_S)  # until the server counts it as ended as well
            assert handshake(lab, 0x23, source="10.77.0.3") == COMEIN
            assert lab.reaches(23, "10.77.0.1")
            assert lab.reaches(23, "10.77.0.3")
            assert not server.events("revoked")

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_a_stop_removes_everything(self, lab: Lab, number: int) -> None:
        """A stop shuts all ports at once, and the control port."""
        lab.load()
        with Server(lab, server_conf()) as server:
            for source in (CLIENT_4, CLIENT_6):
                assert handshake(lab, 0x23, source=source) == COMEIN
            assert lab.reaches(23, CLIENT_4)
            server.stop(number)
            assert not lab.reaches(23, CLIENT_4)
            assert not lab.reaches(23, CLIENT_6, "udp")
            with pytest.raises(ConnectionRefusedError):
                Peer(lab)

    def test_a_stop_leaves_the_rest_alone(self, lab: Lab) -> None:
        """A stop leaves all that is not the server's as it was."""
        more = "add table ip other { set letters { type ipv4_addr; }; chain c { }; }"
        lab.load(more=more)
        before = lab.ruleset()
        with Server(lab, server_conf()):
            assert handshake(lab) == COMEIN
            assert lab.ruleset() != before
        assert lab.ruleset() == before

    @pytest.mark.parametrize("how", ["link", "copy"])
    def test_a_program_named_letmeind(self, lab: Lab, how: str) -> None:
        """A link or copy named letmeind is the server."""
        lab.load()
        program = Path(tempfile.mkdtemp(dir=lab.directory)) / "letmeind"
        if how == "link":
            program.symlink_to(LETMEIN)
        else:
            shutil.copy(LETMEIN, program)
        with Server(lab, server_conf(), "--no-systemd", program=(sys.executable, program)):
            lab.letmein("knock", SERVER_4, "22").assert_good()
            assert lab.reaches(22, CLIENT_4)

    def test_what_its_parent_has_open_is_closed(self, lab: Lab) -> None:
        """Neither process keeps a file that its parent had open."""
        lab.load()
        parent = ("sh", "-c", 'exec 9</dev/zero; exec "$@"', "sh")
        program = (*parent, sys.executable, LETMEIN, "server")
        with Server(lab, server_conf(), program=program) as server:
            for process in (server.process.pid, server.network_process()):
                paths = Path(f"/proc/{process}/fd").iterdir()
                open_files = [os.readlink(path) for path in paths]
                assert open_files and "/dev/zero" not in open_files

    @pytest.mark.parametrize("port, works", [("5900", "-T"), ("5900 / udp", "-U")])
    def test_another_control_port(self, lab: Lab, port: str, works: str) -> None:
        """Number and protocol of the control port are as configured, and no other."""
        lab.load()
        with Server(lab, server_conf(port=port)) as server:
            assert server.wait_for("ready")["port"] == f"5900/{'udp' if works == '-U' else 'tcp'}"
            lab.letmein("knock", works, "-P", "5900", SERVER_4, "22").assert_good()
            assert lab.reaches(22, CLIENT_4)
            fails = "-U" if works == "-T" else "-T"
            impatient = client_conf(timeout=0.5)
            lab.letmein("knock", fails, "-P", "5900", SERVER_4, "23", conf=impatient).assert_error()
            assert not lab.reaches(23, CLIENT_4)
            # The client's configuration may have it, too.
            lab.letmein("revoke", SERVER_4, "22", conf=client_conf(port)).assert_good()
            assert lab.elements() == []

    def test_check_changes_nothing(self, lab: Lab) -> None:
        """--check leaves the firewall alone, and needs no free control port."""
        lab.load()
        before = lab.ruleset()
        result = lab.command("server", "-c", lab.file(server_conf()), *CHECK)
        assert result.status == 0, result
        for word in ("5800", "LETMEIN-INPUT", "nothing was changed"):
            assert word in result.out, result
        assert lab.ruleset() == before
        # It needs no free control port either: the server may be running.
        with Server(lab, server_conf()) as server:
            assert handshake(lab) == COMEIN
            assert lab.command("server", "-c", server.path, *CHECK).status == 0
            assert lab.reaches(22, CLIENT_4)

    def test_check_tells_what_the_server_does(self, lab: Lab) -> None:
        """Port, table, chain, sets, and who may have what, with which limits; nft's script with
        --verbose alone; each user without a key."""
        lab.load(more="add chain inet filter WEB")
        resources = "22 = port: 22\n30 = jump / input: WEB / input-match: saddr"
        resources += " / timeout: 60.5 / users: 2, 3"
        path = lab.file(server_conf(resources))
        done = lab.command("server", "-c", path, *CHECK)
        assert done.status == 0, done
        assert done.out == CHECKED.format(path=path), done
        assert "[RESOURCES] 30: user 00000003 has no key in [KEYS]" in done.err, done
        verbose = lab.command("server", "-c", path, "--verbose", *CHECK)
        assert "\nadd rule inet filter LETMEIN-INPUT tcp dport 5800 accept" in verbose.out
        path = lab.file(server_conf(resources.replace(", 3", "")))
        good = lab.command("server", "-c", path, *CHECK)
        assert good.out.endswith("\n\ngood: nothing was changed\n") and not good.err, good
        limits = "[USERS]\n2 = not-after: 2020-01-01\n1 = timeout: 60 / not-after: 9999-12-31\n"
        path = lab.file(server_conf(resources) + limits)
        limited = lab.command("server", "-c", path, *CHECK)
        assert "\n00000022  22/tcp           600  everybody with a key\n" in limited.out
        assert "\n00000030  jump to WEB     60.5  nobody\n" in limited.out
        assert "\n\nUSER      SECONDS  LAST DAY\n00000002      any  2020-01-01\n" in limited.out
        assert "\n00000001       60  9999-12-31\n" in limited.out
        assert "[USERS] 2: this day has passed" in limited.err
        path = lab.file(server_conf(resources).replace(keys_text(), "[KEYS]"))
        nobody = lab.command("server", "-c", path, *CHECK)
        assert "[KEYS] no user has a key, so nobody can knock" in nobody.err, nobody
        assert nobody.out.count("  nobody\n") == 3, nobody

    def test_check_says_what_is_wrong(self, lab: Lab) -> None:
        """--check fails where a start would, and says why."""
        lab.load("table inet filter { chain other { }; }")
        path = lab.file(server_conf())
        lab.command("server", "-c", path, *CHECK).assert_error("LETMEIN-INPUT")
        path = lab.file("[GENERAL]\nport = x\n")
        lab.command("server", "-c", path, *CHECK).assert_error(f"{path}:2:")
        # Whatever the file says, the server would not start without an account to become.
        path = lab.file(server_conf())
        done = lab.command("server", "-c", path, "--user", "no-such-account", "--check")
        done.assert_error("no-such-account")

    def test_status_without_the_table(self, lab: Lab) -> None:
        """`status` without the table is an error that names it."""
        lab.load("")
        path = lab.file(server_conf())
        lab.command("status", "-c", path).assert_error("filter")

    def test_status_of_what_is_none_of_ours(self, lab: Lab) -> None:
        """Sets of somebody else that have our names, of whatever type: each element is shown."""
        lab.load()
        path = lab.file(server_conf())
        nft_do(
            "add set inet filter letmein-4 { type inet_service; elements = { 22 }; }",
            "add set inet filter letmein-6 { type ipv4_addr . inet_service;"
            " elements = { 10.77.6.1 . 22 }; }",
            "add set inet filter letmein-00000040-4 { type ether_addr; elements = { * }; }",
        )
        result = lab.command("status", "-c", path)
        result.assert_good()
        addresses = [line.split()[0] for line in result.out.splitlines() if line]
        assert {"0016", "0a4d060100160000", "*"} < set(addresses)

    def test_status_while_a_set_goes(
        self, lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """A reload in the middle of a listing: what is still there is shown."""
        kind = "type ipv4_addr; elements = { 10.77.6.1 };"
        lab.load(more=f"add set inet filter letmein-00000040-4 {{ {kind} }}")
        nft_do("add set inet filter letmein-4 { type ipv4_addr . inet_proto . inet_service; }")
        names = letmein.Kernel.sets

        def sets(table: letmein.Kernel) -> dict[str, int]:
            found = names(table)
            nft_do("delete set inet filter letmein-4")
            return found

        monkeypatch.setattr(letmein.Kernel, "sets", sets)
        conf = lab.file(server_conf("22 = port: 22"))
        status = letmein.main(["status", "-c", str(conf)])
        told = capsys.readouterr()
        assert (status, told.err) == (0, ""), told
        assert "10.77.6.1 " in told.out

    def test_the_account_of_the_network_process(self, lab: Lab) -> None:
        """As root it becomes another user; where that cannot be, there is no server."""
        lab.load()
        if not lab.real_root:
            server = Server(lab, server_conf(), account="nobody", wait=False)
            assert server.wait() == 1
            assert "letmein: error: " in server.log
            assert "Traceback" not in server.log
            assert "letmein-4" not in lab.ruleset()
            return
        with Server(lab, server_conf(), account="nobody") as server:
            nobody = pwd.getpwnam("nobody").pw_uid
            process = Path(f"/proc/{server.network_process()}")
            status = (process / "status").read_text(encoding="utf-8")
            assert re.search(r"^Uid:" + rf"\s+{nobody}" * 4 + "$", status, re.M), status
            assert re.search(r"^Groups:\s*$", status, re.M), status
            assert re.search(r"^CapEff:\s+0+$", status, re.M), status
            assert list((process / "root").iterdir()) == []
            for control, source in (("-T", CLIENT_4), ("-U", CLIENT_6)):
                lab.letmein("knock", control, server_for(source), "22").assert_good()
                assert lab.reaches(22, source)


@pytest.fixture(scope="class")
def nft(lab: Lab) -> WatchedNft:
    return WatchedNft(lab)


@pytest.fixture
def faulty(shared: Shared, nft: WatchedNft) -> Iterator[Server]:
    """A server that runs the faulty nft."""
    with shared.lend(server_conf(nftables=f"exe = {nft.exe}")) as server:
        yield server


class TestFaultyNft:
    """Sets and rules need nft, once; a lease does not."""

    @pytest.mark.parametrize("mode", ["fail", "hang", "gone"])
    @pytest.mark.parametrize("protocol", ["tcp", "udp"])
    def test_a_knock_needs_no_nft(
        self, lab: Lab, nft: WatchedNft, faulty: Server, mode: str, protocol: str
    ) -> None:
        """With an nft that fails, hangs or has vanished, leases come and go as ever."""
        assert handshake(lab, 0x23) == COMEIN
        away = nft.directory / "away"
        if mode == "gone":
            nft.exe.rename(away)
        else:
            nft.mode(mode)
        try:
            for operation in (KNOCK, KNOCK, REVOKE, REVOKE, KNOCK):
                assert handshake(lab, 0x22, operation, protocol=protocol) == COMEIN
                assert lab.reaches(22, CLIENT_4) == (operation == KNOCK)
            assert handshake(lab, 0x23, REVOKE, protocol=protocol) == COMEIN
            assert not lab.reaches(23, CLIENT_4)
        finally:
            if mode == "gone":
                away.rename(nft.exe)
            nft.mode("good")
        assert handshake(lab, 0x22, REVOKE) == COMEIN
        assert lab.elements() == []
        assert not faulty.events("failed")


@pytest.mark.parametrize("mode", ["fail", "mute", "killed", "noise", "hang"])
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_a_change_that_the_kernel_refuses(lab: Lab, mode: str, protocol: str) -> None:
    """Where a lease's set is gone and nft does not bring it back, nobody is told that a port was
    opened; as soon as nft works, all is as it was."""
    lab.load()
    nft = WatchedNft(lab)
    with Server(lab, server_conf(nftables=f"exe = {nft.exe}")) as server:
        assert handshake(lab, 0x23) == COMEIN
        nft.mode(mode)
        try:
            with Peer(lab, protocol) as peer:
                peer.socket.settimeout(LIMIT_S)
                challenge = peer.challenge(0x22)
                # All but the control port, which must go on for the answer to arrive.
                doomed = our_rules()[2:]
                nft_do(*doomed, *(f"delete set inet filter letmein-{v}" for v in (4, 6)))
                peer.send(message(RESPONSE, 0x22, token=challenge))
                assert peer.receive().operation == GOAWAY
            server.wait_for("failed", peer=CLIENT_4, proto=protocol)
            assert not lab.reaches(22, CLIENT_4)
        finally:
            nft.mode("good")
        server.wait_for("healed")
        eventually(lambda: lab.reaches(23, CLIENT_4), "the other lease is not back")
        assert not lab.reaches(22, CLIENT_4)
        assert handshake(lab, 0x22, protocol=protocol) == COMEIN
        assert lab.reaches(22, CLIENT_4)
        server.stop()
    assert "letmein" not in lab.ruleset()


@pytest.mark.parametrize("mode", ["fail", "mute", "killed", "noise"])
def test_an_nft_that_fails_at_the_start(lab: Lab, mode: str) -> None:
    """An nft that fails ends the start with its words, and leaves nothing behind."""
    lab.load()
    nft = WatchedNft(lab)
    nft.mode(mode)
    path = lab.file(server_conf(nftables=f"exe = {nft.exe}"))
    arguments = ("server", "-c", path, "--rundir", lab.directory, "--user", "none")
    lab.command(*arguments).assert_error("made to fail" if mode == "fail" else "nft")
    assert "letmein" not in lab.ruleset()


@pytest.fixture(scope="session")
def meanings(lab: Lab) -> None:
    """Learn from the kernel what a comment looks like, so that one can be forged."""
    lab.load(more=DOOR)
    with Server(lab, server_conf(TRUTH_RESOURCES)):
        for resource in (0x22, 0x23, 0x26, 0x40, 0x41):
            assert handshake(lab, resource) == COMEIN
        text = run(NFT, "list", "table", "inet", "filter")
    form = r'comment "user=00000001 resource=(\w{8}) boot=(\w{8})([^"]*)"'
    for number, boot, rest in re.findall(form, text):
        assert boot == BOOT
        MEANINGS[int(number, 16)] = rest
    assert len(MEANINGS) == 5, text


@pytest.fixture
def watched(lab: Lab, meanings: None) -> WatchedNft:
    return WatchedNft(lab)


@pytest.fixture
def guarded(lab: Lab, watched: WatchedNft) -> Iterator[Server]:
    """A server with TRUTH_RESOURCES that runs the watched nft."""
    lab.load(more=DOOR)
    with Server(lab, watched.conf()) as server:
        yield server
        watched.mode("good")


HOLDERS = [
    (CLIENT_4, 0x22, 1),
    (CLIENT_4, 0x23, 2),
    (CLIENT_6, 0x24, 1),
    (CLIENT_4, 0x40, 1),
    (OTHER_6, 0x41, 2),
]


class TestNftFaults:
    """After each of them the kernel, `status` and what clients were told are one."""

    def test_missing_while_the_firewall_is_reloaded(
        self, lab: Lab, guarded: Server, watched: WatchedNft
    ) -> None:
        """An nft that was away is found again, and the reload healed."""
        knock_all(lab, *HOLDERS)
        away = watched.directory / "away"
        watched.exe.rename(away)
        try:
            flush_and_reload(lab)
            guarded.wait_for("cannot-heal")
        finally:
            away.rename(watched.exe)
        eventually(lambda: set(kernel().elements) == rows(*HOLDERS), "not healed")
        agree(lab, guarded, *HOLDERS)

    @pytest.mark.parametrize("mode", ["hang", "late"])
    def test_killed(self, lab: Lab, guarded: Server, watched: WatchedNft, mode: str) -> None:
        """An nft that hangs is killed, whether it has done its work before or not; then the server
        looks what is there, and mends it."""
        knock_all(lab, *HOLDERS)
        watched.mode(mode)
        delete_the_rules(lab)
        event = guarded.wait_for("cannot-heal")
        assert "did not end within 4 s" in event["reason"], event
        watched.mode("good")
        eventually(lambda: kernel().rules == TRUTH_RULES, "not healed")
        agree(lab, guarded, *HOLDERS)
        assert handshake(lab, 0x22, source=OTHER_4) == COMEIN
        agree(lab, guarded, *HOLDERS, (OTHER_4, 0x22, 1))

    def test_a_stop_takes_a_few_runs(self, lab: Lab, guarded: Server, watched: WatchedNft) -> None:
        """However many sets there are: systemd does not wait for ever."""
        assert lab.ruleset().count("set letmein-") > 4
        before = watched.runs()
        guarded.stop()
        assert watched.runs() - before <= 3
        assert "letmein" not in lab.ruleset()

    def test_a_stop_with_an_nft_that_fails_after_its_work(
        self, lab: Lab, watched: WatchedNft
    ) -> None:
        """What has gone is gone, whatever nft says."""
        lab.load(more=DOOR)
        with Server(lab, watched.conf()) as server:
            knock_all(lab, *HOLDERS)
            watched.mode("liar")
            server.stop()
        assert "letmein" not in lab.ruleset()
        assert not server.events("set-stays")

    def test_slower_than_the_limit(self, lab: Lab, watched: WatchedNft) -> None:
        """What nft took at the start, it may take at a reload; an nft that is fast again is killed
        early again when it hangs."""
        lab.load(more=DOOR)
        program = adjusted(lab, "letmein.NFT_LIMIT_S = (1.0, 60.0)")
        watched.mode("slow-all")
        with Server(lab, watched.conf(), program=program) as server:
            reconfigure(server, watched.conf())
            watched.mode("good")
            reconfigure(server, watched.conf())
            watched.mode("hang")
            delete_the_rules(lab)
            event = server.wait_for("cannot-heal")
            assert "did not end within 1 s" in event["reason"], event
            watched.mode("good")

    def test_slow(self, lab: Lab, watched: WatchedNft) -> None:
        """An nft that takes 2 s prolongs no lease: not at a heal, nor at a start after kill -9."""
        lab.load(more=DOOR)
        with Server(lab, watched.conf()) as server:
            knock_all(lab, *HOLDERS)
            before = Remaining(CLIENT_4)
            watched.mode("slow")
            for turn in (1, 2):
                flush_and_reload(lab)
                server.wait_for("healed", turn, leases="5")
            crash(server)
        with Server(lab, watched.conf()) as server:
            now = Remaining(CLIENT_4)
            assert len(now.seconds) == len(before.seconds) == 4
            now.assert_runs_on_from(before)
            assert now.began - before.done > 4
            watched.mode("good")
            agree(lab, server, *HOLDERS)

    def test_a_chain_that_vanished(self, lab: Lab, guarded: Server, watched: WatchedNft) -> None:
        """Without its chain no change is made by half; once it is back, all is healed."""
        knock_all(lab, *HOLDERS)
        nft_do(
            *our_rules(),
            "flush chain inet filter input",
            "delete chain inet filter LETMEIN-INPUT",
            "add rule inet filter input accept",
        )
        guarded.wait_for("cannot-heal")
        # The sets are still there, so what is asked for can be done or not; but not half.
        answer = handshake(lab, 0x22, source=OTHER_4)
        told = [(OTHER_4, 0x22, 1)] if answer == COMEIN else []
        assert set(kernel().elements) == rows(*HOLDERS, *told)
        flush_and_reload(lab)
        agree(lab, guarded, *HOLDERS, *told)
        assert len(guarded.events("cannot-heal")) == 1, guarded.log
        assert lab.reaches(22, CLIENT_4)

    def test_a_target_chain_that_vanished(
        self, lab: Lab, guarded: Server, watched: WatchedNft
    ) -> None:
        """Without it the jumps cannot be; it is back, and so are they."""
        knock_all(lab, *HOLDERS)
        lab.load()
        guarded.wait_for("cannot-heal")
        nft_do(DOOR)
        agree(lab, guarded, *HOLDERS)
        assert lab.reaches(8080, CLIENT_4)


SOAK = int(os.environ.get("SOAK", "0"))  # how many random sequences, 0: as many as the suite has


class TestHeal:
    @pytest.mark.parametrize(
        "damage",
        [
            flush_and_reload,
            load_the_file_again,
            restore_what_was_saved,
            delete_the_rules,
            delete_a_rule,
            delete_the_sets,
            flush_the_chain,
            flush_all_chains,
        ],
        ids=lambda damage: damage.__name__,
    )
    def test_what_vanished_is_back(
        self,
        lab: Lab,
        guarded: Server,
        damage: Callable[[Lab], None],
    ) -> None:
        """Whatever somebody did to what is ours: rules, sets and leases are back, with the time
        that is left, and only they."""
        knock_all(lab, *HOLDERS)
        agree(lab, guarded, *HOLDERS)
        before = Remaining(CLIENT_4)
        counts = []
        for turn in range(1, 4):
            damage(lab)

            def healed() -> bool:
                now = kernel()
                return now.rules == TRUTH_RULES and set(now.elements) == rows(*HOLDERS)

            counts.append(looks_until(healed, f"not healed:\n{guarded.log}"))
            if damage is not restore_what_was_saved:  # that has brought it all back by itself
                guarded.wait_for("healed", turn, leases="5")
            quiet(guarded)
        print(f"looks: {counts}", end=" ")
        assert min(counts) <= 10
        assert max(counts) <= 20
        agree(lab, guarded, *HOLDERS)
        # They have the time left that they had.
        now = Remaining(CLIENT_4)
        assert len(now.seconds) == len(before.seconds) == 4
        now.assert_runs_on_from(before)
        # Those get through who did, and nobody else; knocks are answered.
        for port, source, protocol in ((22, CLIENT_4, "tcp"), (23, CLIENT_4, "udp"),
                                       (24, CLIENT_6, "udp"), (8080, OTHER_4, "tcp")):
            assert lab.reaches(port, source, protocol), (port, source)
        assert not lab.reaches(22, OTHER_4)
        assert not lab.reaches(24, CLIENT_4, "udp")
        assert handshake(lab, 0x22, source=OTHER_4) == COMEIN
        assert handshake(lab, 0x41, REVOKE, source=OTHER_6) == COMEIN
        assert not lab.reaches(8080, OTHER_4)
        assert lab.reaches(8080, CLIENT_4)
        assert "cannot-heal" not in guarded.log

    def test_what_was_revoked_does_not_come_back(self, lab: Lab, guarded: Server) -> None:
        """A restored ruleset brings back no lease that was revoked since."""
        knock_all(lab, *HOLDERS)
        saved = run(NFT, "list", "ruleset")
        assert handshake(lab, 0x22, REVOKE) == COMEIN
        assert handshake(lab, 0x41, REVOKE, source=OTHER_6, user=2) == COMEIN
        nft_do("flush ruleset", saved)
        guarded.wait_for("healed")
        agree(lab, guarded, *HOLDERS[1:4])
        assert kernel().gates == {}
        assert not lab.reaches(22, CLIENT_4)

    @pytest.mark.parametrize("told", ["a rule", "a table of iptables"])
    def test_what_others_make_of_our_table(self, lab: Lab, told: str) -> None:
        """It is told when it happens, once, and not when a SIGHUP fails that a stolen key makes
        urgent."""
        base = "{ type filter hook input priority filter; policy drop; jump LETMEIN-INPUT; }"
        lab.load(f"table ip filter {{ chain LETMEIN-INPUT {{ }}; chain input {base}; }}")
        change, said = {
            "a rule": ("add rule ip filter LETMEIN-INPUT tcp dport 443 accept", "holds rules"),
            "a table of iptables": (f"add chain ip filter INPUT {base}", "belongs to iptables"),
        }[told]
        with Server(lab, server_conf(family="ip")) as server:
            began = len(server.events("warning"))
            nft_do(change)
            reason = server.wait_for("warning", began + 1)["reason"]
            assert said in reason
            assert "SIGHUP and the next start fail" in reason
            assert handshake(lab) == COMEIN
            nft_do("flush chain ip filter LETMEIN-INPUT")
            server.wait_for("healed")
            quiet(server)
            assert len(server.events("warning")) == began + 1
            lab.load()

    def test_two_servers_for_one_table(self, lab: Lab, guarded: Server) -> None:
        """The lock does not keep them apart where each has its own run directory: they undo each
        other's work, and say what it may be. When one goes, the other has all it needs."""
        knock_all(lab, *HOLDERS)
        with Server(lab, server_conf(TRUTH_RESOURCES, port="5900")) as other:
            hint = "is there a second server for this table, with another --rundir?"
            guarded.wait_for("warning", hint=hint)
            other.kill()
            quiet(guarded)
        agree(lab, guarded, *HOLDERS)
        assert kernel().rules == TRUTH_RULES
        assert len(guarded.events("warning", hint=hint)) == 1

    def test_elements_deleted_by_hand_are_revoked(self, lab: Lab, guarded: Server) -> None:
        """A lease that somebody deletes, or half of it, is revoked and stays so."""
        knock_all(lab, *HOLDERS)
        nft_do(f"delete element inet filter letmein-4 {{ {CLIENT_4} . tcp . 22 }}")
        event = guarded.wait_for("revoked", reason="by hand")
        assert (event["peer"], event["resource"]) == (CLIENT_4, "00000022")
        agree(lab, guarded, *HOLDERS[1:])
        # Half of a lease: the other half goes, too.
        nft_do(f"delete element inet filter letmein-4 {{ {CLIENT_4} . tcp . 23 }}")
        guarded.wait_for("revoked", 2, reason="by hand")
        agree(lab, guarded, *HOLDERS[2:])
        assert not lab.reaches(23, CLIENT_4, "udp")
        nft_do(f"delete element inet filter letmein-00000040-4 {{ {CLIENT_4} }}")
        guarded.wait_for("revoked", 3, reason="by hand")
        # The holder of a gate: its gate closes.
        nft_do(f"delete element inet filter letmein-00000041-6 {{ {OTHER_6} }}")
        guarded.wait_for("revoked", 4, reason="by hand")
        eventually(lambda: kernel().gates == {}, "the gate stays open")
        agree(lab, guarded, *HOLDERS[2:3])
        # What is forgotten stays so, and can be had again.
        flush_and_reload(lab)
        guarded.wait_for("healed", leases="1")
        agree(lab, guarded, *HOLDERS[2:3])
        knock_all(lab, *HOLDERS)
        agree(lab, guarded, *HOLDERS)

    def test_a_gate_shut_by_hand(self, lab: Lab, guarded: Server) -> None:
        """All those who hold it have lost it."""
        knock_all(lab, *HOLDERS, (CLIENT_4, 0x41, 1))
        nft_do("delete element inet filter letmein-00000041-gate { ip }")
        guarded.wait_for("revoked", 2, reason="by hand", resource="00000041")
        agree(lab, guarded, *HOLDERS[:4])
        assert kernel().gates == {}

    def test_a_set_flushed_by_hand_is_revoked(self, lab: Lab, guarded: Server) -> None:
        """A set that somebody flushes revokes its leases, and no others."""
        knock_all(lab, *HOLDERS)
        nft_do("flush set inet filter letmein-4")
        guarded.wait_for("revoked", 2, reason="by hand", peer=CLIENT_4)
        agree(lab, guarded, *HOLDERS[2:])
        assert not guarded.events("healed")

    def test_a_table_that_comes_back_later(self, lab: Lab, guarded: Server) -> None:
        """Until then nobody is told that a port was opened; then all is as it was."""
        knock_all(lab, *HOLDERS)
        before = Remaining(CLIENT_4)
        nft_do("delete table inet filter")
        guarded.wait_for("cannot-heal")
        tries = looks(guarded)
        eventually(lambda: looks(guarded) >= tries + 3, "it does not go on trying")
        # Without a firewall anybody gets here; but nobody is told that a port was opened.
        assert handshake(lab, 0x22, source=OTHER_4) == GOAWAY
        assert handshake(lab, 0x23, REVOKE) == GOAWAY
        flush_and_reload(lab)
        count = looks_until(
            lambda: kernel().rules == TRUTH_RULES and set(kernel().elements) == rows(*HOLDERS),
            "the table came back, and is not healed",
        )
        print(f"looks: {count}", end=" ")
        assert count <= 20
        agree(lab, guarded, *HOLDERS)
        assert lab.reaches(22, CLIENT_4)
        Remaining(CLIENT_4).assert_runs_on_from(before)
        # It may have gone in the middle of a look, which then misses something else.
        reasons = [event["reason"] for event in guarded.events("cannot-heal")]
        assert all("inet filter" in reason for reason in reasons), reasons
        assert len(set(reasons)) == len(reasons) <= 2, reasons

    def test_a_chain_that_is_missing(self, lab: Lab, guarded: Server) -> None:
        """Said once, tried again with growing pauses, and mended when the chain is back."""
        knock_all(lab, *HOLDERS)
        lab.load("table inet filter { chain input { }; }")
        guarded.wait_for("cannot-heal")
        # Pauses of 0.1, 0.2, 0.4 s: three more tries take 0.7 s, not 0.1.
        tries, started = looks(guarded), time.monotonic()
        eventually(lambda: looks(guarded) >= tries + 3, "it does not go on trying")
        assert time.monotonic() - started > 0.5
        assert len(guarded.events("cannot-heal")) == 1, guarded.log
        assert handshake(lab, 0x22, source=OTHER_4) == GOAWAY
        flush_and_reload(lab)
        count = looks_until(lambda: set(kernel().elements) == rows(*HOLDERS), "not healed")
        assert count <= 20
        agree(lab, guarded, *HOLDERS)
        assert handshake(lab, 0x22, source=OTHER_4) == COMEIN
        assert len(guarded.events("cannot-heal")) == 1, guarded.log
        # The next trouble is another one, and said again.
        nft_do("flush ruleset")
        guarded.wait_for("cannot-heal", 2)
        flush_and_reload(lab)
        agree(lab, guarded, *HOLDERS, (OTHER_4, 0x22, 1))

    def test_a_chain_that_is_renamed(self, lab: Lab, guarded: Server) -> None:
        """The kernel tells of the new name alone, which is none of ours: it is seen at once, and
        not when somebody changes something else."""
        knock_all(lab, *HOLDERS)
        quiet(guarded)
        nft_do("rename chain inet filter LETMEIN-INPUT ANOTHER")
        guarded.wait_for("cannot-heal")
        nft_do("rename chain inet filter ANOTHER LETMEIN-INPUT")
        quiet(guarded)
        agree(lab, guarded, *HOLDERS)
        assert handshake(lab, 0x22, source=OTHER_4) == COMEIN

    def test_a_set_that_takes_no_leases(self, lab: Lab, guarded: Server) -> None:
        """Somebody has made ours anew, without its timeouts: that is said, and mended when the set
        is as it was."""
        knock_all(lab, *HOLDERS)
        chain = run(NFT, "list", "chain", "inet", "filter", "LETMEIN-INPUT")
        rules = re.findall(r"\S.* comment \"letmein .*", chain)
        nft_do(
            "flush chain inet filter LETMEIN-INPUT",
            "delete set inet filter letmein-4",
            "add set inet filter letmein-4 { type ipv4_addr . inet_proto . inet_service; }",
            *(f"add rule inet filter LETMEIN-INPUT {rule}" for rule in rules),
        )
        event = guarded.wait_for("cannot-heal")
        assert "Invalid argument" in event["reason"], event
        assert attempt(lab, 0x22, source=OTHER_4) == GOAWAY
        delete_the_sets_alone(lab)
        guarded.wait_for("healed", leases="5")
        agree(lab, guarded, *HOLDERS)
        assert len(guarded.events("cannot-heal")) == 1, guarded.log

    def test_a_reload_every_100_ms(self, lab: Lab, guarded: Server) -> None:
        """Knocks succeed and no lease is lost under one reload after the other."""
        knock_all(lab, *HOLDERS)
        sources = [f"10.77.{number >> 8}.{number & 255}" for number in range(1281, 2280)]
        let_in: list[tuple[str, int, int]] = []
        started = following = time.monotonic()
        reloads = 0
        for source in sources:
            now = time.monotonic()
            enough = now > started + (10 if SOAK else 3) and min(reloads, len(let_in)) > 3
            if enough or now > started + LIMIT_S:
                break
            if now >= following:
                following += 0.1
                reloads += 1
                flush_and_reload(lab)
            # (There is room for a hundred rules.)
            if len(let_in) < 80 and attempt(lab, 0x22, source=source) == COMEIN:
                let_in.append((source, 0x22, 1))
            time.sleep(max(0, following - time.monotonic()) / 2)
        print(f"{reloads} reloads, {len(let_in)} knocks", end=" ")
        assert reloads > 3
        assert len(let_in) > 3
        eventually(lambda: kernel().rules == TRUTH_RULES, "not healed at the end")
        agree(lab, guarded, *HOLDERS, *let_in)
        assert not guarded.events("revoked")
        assert not guarded.events("cannot-heal")

    @pytest.mark.parametrize(
        "change",
        [
            "add table ip other|add chain ip other letmein|delete table ip other",
            "add table inet myfilter|delete table inet myfilter",
            "add table ip filter|add chain ip filter LETMEIN-INPUT|delete table ip filter",
            "add set inet filter mine { type ipv4_addr; }"
            "|add element inet filter mine { 10.1.0.2 }|flush set inet filter mine"
            "|delete set inet filter mine",
            "add chain inet filter mine|add rule inet filter mine tcp dport 22 accept"
            "|flush chain inet filter mine|delete chain inet filter mine",
            "add rule inet filter input tcp dport 1 accept",
        ],
        ids=["another table", "a table's end", "another family", "a set", "a chain", "a rule"],
    )
    def test_what_is_not_ours_is_none_of_our_business(
        self, lab: Lab, guarded: Server, change: str
    ) -> None:
        """It costs the server no look at the table."""
        knock_all(lab, *HOLDERS)
        quiet(guarded)
        before = looks(guarded)
        for line in change.split("|"):
            nft_do(line)
        # The look that must not be would come within 25 ms.
        time.sleep(0.25)
        assert looks(guarded) == before
        # It has not fallen asleep: this does concern us.
        nft_do(f"delete element inet filter letmein-4 {{ {CLIENT_4} . tcp . 22 }}")
        guarded.wait_for("revoked", reason="by hand")
        assert looks(guarded) > before

    @pytest.mark.parametrize(
        "name, element",
        [
            ("letmein-4", "10.77.6.1 . tcp . 22"),
            ("letmein-4", f"10.77.6.1 . tcp . 22 timeout 60s {comment()}"),
            ("letmein-6", "fd77::6 . 253 . 22 timeout 60s"),
            ("letmein-00000040-4", "10.77.6.1"),
            ("letmein-00000041-gate", "ip"),
            ("letmein-00000041-gate", "0x1234 timeout 60s"),
            ("letmein-4", "* timeout 60s"),
            ("letmein-6", "*"),
            ("letmein-00000041-gate", "*"),
        ],
    )
    def test_what_somebody_plants_is_removed(
        self, lab: Lab, guarded: Server, name: str, element: str
    ) -> None:
        """An element that no knock has made is removed, and lets nobody in for long."""
        knock_all(lab, HOLDERS[0])
        nft_do(f"add element inet filter {name} {{ {element} }}")
        guarded.wait_for("healed", leases="1")
        agree(lab, guarded, HOLDERS[0])
        assert kernel().gates == {}
        assert not lab.reaches(22, "10.77.6.1")
        assert lab.reaches(22, CLIENT_4)

    def test_a_set_with_a_timeout_of_its_own(self, lab: Lab, guarded: Server) -> None:
        """The kernel then tells of an element's timeout in another way: an element without end is
        seen and removed, and a lease of just the set's timeout is left alone."""
        nft_do(
            "add set inet filter letmein-4 { type ipv4_addr . inet_proto . inet_service;"
            " flags timeout; counter; timeout 1h; }"
        )
        if "timeout 1h" not in lab.ruleset():
            pytest.skip("this kernel does not change a set's own timeout")
        text = guarded.path.read_text(encoding="utf-8")
        reconfigure(guarded, text.replace("22 = port: 22", "22 = port: 22 / timeout: 3600"))
        holder = (CLIENT_4, 0x22, 1)
        knock_all(lab, holder)
        # As a newer nft does it; nft 1.0.6 takes "timeout 0s" for none, which is the set's.
        table = letmein.Kernel("inet", "filter")
        for_ever = letmein.attribute(letmein.NFTA_ELEM_TIMEOUT, bytes(8))
        key = socket.inet_aton("10.77.6.1") + letmein.PORT_KEY.pack(6, 22)
        element = letmein.nested(1, letmein.key_attribute(key), for_ever)
        where = table._elements_of("letmein-4", element)
        table.change([letmein.Change(letmein.NEWSETELEM, letmein.NLM_F_CREATE, where)])
        guarded.wait_for("healed", leases="1")
        agree(lab, guarded, holder)
        time.sleep(1.2)  # the look that must not be would come within 1 s
        assert len(guarded.events("healed")) == 1, guarded.log

    def test_a_lease_prolonged_by_hand_is_cut(self, lab: Lab, guarded: Server) -> None:
        """A lease that somebody prolongs gets its own time back."""
        knock_all(lab, HOLDERS[0])
        key = f"{CLIENT_4} . tcp . 22"
        nft_do(
            f"delete element inet filter letmein-4 {{ {key} }}",
            f"add element inet filter letmein-4 {{ {key} timeout 1d {comment()} }}",
        )
        guarded.wait_for("healed")
        agree(lab, guarded, HOLDERS[0])
        assert milliseconds_left(CLIENT_4)[0] <= 600

    def test_a_reload_by_a_recycled_process_id(
        self, lab: Lab, guarded: Server, watched: WatchedNft
    ) -> None:
        """Whoever changes the table is somebody else, even by a process id that the server's own
        nft had: here in another process namespace, as in a container on the host's network."""
        knock_all(lab, *HOLDERS)
        quiet(guarded)
        path = lab.file(f"flush ruleset\n{(HERE / 'nftables.conf').read_text()}\n{REJECT}\n{DOOR}")
        for turn, number in enumerate(watched.processes()[-3:], 1):
            last = "/proc/sys/kernel/ns_last_pid"
            command = f"echo {number - 1} >{last}; {NFT} -f {path} & echo $!; wait $!"
            said = run("unshare", "--pid", "--fork", "--mount-proc", "sh", "-ec", command)
            assert int(said) == number
            guarded.wait_for("healed", turn, leases="5")
            quiet(guarded)
        agree(lab, guarded, *HOLDERS)
        assert lab.reaches(22, CLIENT_4)
        assert handshake(lab, 0x22, source=OTHER_4) == COMEIN

    def test_a_reload_by_a_recycled_process_id_of_the_same_namespace(
        self, lab: Lab, guarded: Server, watched: WatchedNft
    ) -> None:
        """The same where server and administrator see the same processes (root alone may choose a
        process id there)."""
        if not lab.real_root:
            return
        knock_all(lab, *HOLDERS)
        quiet(guarded)
        text = f"flush ruleset\n{(HERE / 'nftables.conf').read_text()}\n{REJECT}\n{DOOR}"
        path = lab.file(text)
        number = watched.processes()[-1]
        last = "/proc/sys/kernel/ns_last_pid"
        command = f"echo {number - 1} >{last}; {NFT} -f {path} & echo $!; wait $!"
        for _ in range(50):
            count = happened(guarded, "healed")
            said = int(run("sh", "-ec", command))
            eventually(
                lambda count=count: happened(guarded, "healed") > count,  # type: ignore[misc]
                "not healed",
            )
            if said == number:
                break  # no other program has taken it first
        else:
            raise AssertionError("others are always faster to take the process id")
        agree(lab, guarded, *HOLDERS)

    def test_an_element_shortened_by_hand(self, lab: Lab, guarded: Server) -> None:
        """It is an administrator's decision: no heal gives the time back."""
        knock_all(lab, *HOLDERS)
        key = f"{CLIENT_4} . tcp . 22"
        (text,) = re.findall(rf'{re.escape(key)}[^,}}]*(comment "[^"]*")', lab.ruleset())
        nft_do(
            f"delete element inet filter letmein-4 {{ {key} }}",
            f"add element inet filter letmein-4 {{ {key} timeout 60s {text} }}",
        )
        event = guarded.wait_for("shortened", peer=CLIENT_4)
        assert (event["resource"], event["reason"]) == ("00000022", "by hand")
        flush_and_reload(lab)
        guarded.wait_for("healed", leases="5")
        agree(lab, guarded, *HOLDERS)
        assert max(milliseconds_left(key)) <= 60
        # The next knock gives it its full time again.
        knock_all(lab, HOLDERS[0])
        assert min(milliseconds_left(key)) > 590

    def test_one_of_two_elements_shortened_by_hand(self, lab: Lab, guarded: Server) -> None:
        """It shortens the whole lease, whichever element the kernel lists first, and is no damage
        that must be healed."""
        (holder,) = [holder for holder in HOLDERS if holder[1] == 0x23]
        for turn, protocol in enumerate(("tcp", "udp"), 1):
            knock_all(lab, holder)
            assert min(milliseconds_left(CLIENT_4)) > 590
            key = f"{CLIENT_4} . {protocol} . 23"
            (text,) = re.findall(rf'{re.escape(key)}[^,}}]*(comment "[^"]*")', lab.ruleset())
            nft_do(
                f"delete element inet filter letmein-4 {{ {key} }}",
                f"add element inet filter letmein-4 {{ {key} timeout 60s {text} }}",
            )
            guarded.wait_for("shortened", turn, peer=CLIENT_4)
            assert max(milliseconds_left(CLIENT_4)) <= 60
        quiet(guarded)
        agree(lab, guarded, holder)
        assert len(guarded.events("shortened")) == 2
        assert not guarded.events("healed")
        # One that is shortened while the other is deleted ends.
        nft_do(
            *(f"delete element inet filter letmein-4 {{ {CLIENT_4} . {name} . 23 }}"
              for name in ("tcp", "udp")),
            f"add element inet filter letmein-4 {{ {key} timeout 30s {text} }}",
        )  # fmt: skip
        guarded.wait_for("revoked", reason="by hand", peer=CLIENT_4)
        agree(lab, guarded)

    def test_an_old_ruleset_is_restored(self, lab: Lab, guarded: Server) -> None:
        """What was saved before a lease was renewed knows too little of it: nobody has shortened
        it, and its client, who renews in time, stays in."""
        text = guarded.path.read_text(encoding="utf-8")
        shorter = text.replace("22 = port: 22", "22 = port: 22 / timeout: 60")
        reconfigure(guarded, shorter)
        knock_all(lab, HOLDERS[0])
        saved = run(NFT, "list", "ruleset")
        reconfigure(guarded, text)
        knock_all(lab, HOLDERS[0])
        nft_do("flush ruleset", saved)
        guarded.wait_for("healed", leases="1")
        agree(lab, guarded, HOLDERS[0])
        assert min(milliseconds_left(CLIENT_4)) > 500
        assert not guarded.events("shortened")

    def test_lost_notifications(self, lab: Lab, guarded: Server) -> None:
        """The kernel's buffer for them overflows while the server sleeps."""

        def lost() -> int:
            for line in Path("/proc/thread-self/net/netlink").read_text("ascii").splitlines():
                words = line.split()
                if words[1] == "12" and words[3] == "00000040":
                    return int(words[8])
            raise AssertionError("the server does not listen to the kernel")

        knock_all(lab, *HOLDERS)
        nft_do("add table ip noise", "add set ip noise s { type ipv4_addr; }")
        first = 10 << 24
        numbers = [f"{socket.inet_ntoa((first + n).to_bytes(4, 'big'))}" for n in range(20_000)]
        guarded.process.send_signal(signal.SIGSTOP)
        try:
            for _ in range(20):
                for start in range(0, len(numbers), 1000):
                    some = ", ".join(numbers[start : start + 1000])
                    nft_do(f"add element ip noise s {{ {some} }}")
                nft_do("flush set ip noise s")
                if lost():
                    break
            before = lost()
            assert before, "nothing was lost"
            flush_the_chain(lab)
            assert lost() > before, "this was to be lost, too"
        finally:
            guarded.process.send_signal(signal.SIGCONT)
        guarded.wait_for("healed", leases="5")
        agree(lab, guarded, *HOLDERS)
        assert lab.reaches(22, CLIENT_4)

    def test_a_failing_nft_while_healing(
        self, lab: Lab, guarded: Server, watched: WatchedNft
    ) -> None:
        """It goes on trying, says so once, and heals when nft works again."""
        knock_all(lab, *HOLDERS)
        for mode in ("fail", "fail-all"):
            watched.mode(mode)
            count = len(guarded.events("cannot-heal"))
            flush_and_reload(lab)
            guarded.wait_for("cannot-heal", count + 1)
            tries = watched.runs()
            eventually(lambda tries=tries: watched.runs() > tries + 3, "it gave up")  # type: ignore[misc]
            assert len(guarded.events("cannot-heal")) == count + 1
            watched.mode("good")
            agree(lab, guarded, *HOLDERS)
            eventually(lambda: kernel().rules == TRUTH_RULES, "not healed")

    def test_an_nft_that_prints_nothing(
        self, lab: Lab, guarded: Server, watched: WatchedNft
    ) -> None:
        """It ends well, and has not done what it should: no reason to die."""
        knock_all(lab, *HOLDERS)
        good = watched.exe.read_text(encoding="utf-8")
        fresh = watched.directory / "fresh"
        for text in ("#!/bin/sh\nexit 0\n", good):
            fresh.write_text(text, encoding="utf-8")
            fresh.chmod(0o755)
            fresh.replace(watched.exe)
            flush_the_chain(lab)
            if text != good:
                guarded.wait_for("cannot-heal")
        agree(lab, guarded, *HOLDERS)


@pytest.fixture
def stepwise(lab: Lab) -> Iterator[Held4And6]:
    """Its look at the kernel's table has begun, and has read the IPv4 leases."""
    lab.load(more=DOOR)
    log = letmein.Log()
    config = letmein.parse_config(server_conf(TRUTH_RESOURCES), "", True, [])
    firewall = letmein.Firewall(letmein.Nft(NFT), config, BOOT, log)
    holders = (CLIENT_4, 0x22, 1), (CLIENT_6, 0x22, 1), (OTHER_6, 0x41, 1)
    with selectors.DefaultSelector() as selector:
        firewall.open(selector)
        settle(firewall)
        for holder in holders:
            assert firewall.knock(*holder) == ""
        firewall.inspect_at = 0.0
        settle(firewall)
        firewall.steps = firewall._inspect_and_heal()
        next(firewall.steps)
        yield Held4And6(firewall, holders)
        for key in list(selector.get_map().values()):
            assert isinstance(key.fileobj, socket.socket)
            key.fileobj.close()
    firewall.close()


class TestBetweenTwoSteps:
    """A look at the kernel's table takes its time, in which others change it."""

    def test_a_reload_and_a_knock_in_the_middle_of_a_look(
        self, lab: Lab, stepwise: Held4And6
    ) -> None:
        """The knock makes the sets anew. That those of the others are empty now is nobody's wish to
        have them out."""
        flush_and_reload(lab)
        assert stepwise.firewall.knock(OTHER_4, 0x22, 2) == ""
        settle(stepwise.firewall)
        assert set(kernel().elements) == rows(*stepwise.holders, (OTHER_4, 0x22, 2))
        assert len(kernel().gates) == 2

    def test_an_old_ruleset_is_restored_in_the_middle_of_a_look(
        self, lab: Lab, stepwise: Held4And6
    ) -> None:
        """It brings sets, but not all leases, and one with little time: nobody has meant that."""
        saved = run(NFT, "list", "ruleset").replace(f"{CLIENT_6} . tcp . 22", "fd77::7 . tcp . 22")
        old = rf"({OTHER_6} counter packets 0 bytes 0) timeout \S+ expires \w+"
        saved, count = re.subn(old, r"\1 timeout 9s", saved)
        assert count == 1, saved
        nft_do("flush ruleset", saved)
        settle(stepwise.firewall)
        assert set(kernel().elements) == rows(*stepwise.holders)
        assert min(milliseconds_left(OTHER_6)) > 500

    def test_the_kernel_objects_in_the_middle_of_a_reload(
        self, lab: Lab, stepwise: Held4And6
    ) -> None:
        """Whichever question it does not answer, the server goes on and no lease is lost."""
        firewall = stepwise.firewall
        kernel_, ask = firewall.table.kernel, firewall.table.kernel._ask
        refused = 0
        for number in range(100):
            answered: list[int] = []

            def ask_or_fail(
                *words: Any, number: int = number, answered: list[int] = answered, **options: Any
            ) -> list[letmein.Attributes]:
                if len(answered) == number:
                    raise OSError(errno.ENOBUFS, "no buffer")
                answered.append(1)
                return ask(*words, **options)

            kernel_._ask = ask_or_fail  # type: ignore[method-assign]
            try:
                firewall.reconfigure(firewall.config)
            except letmein.UserError:
                refused += 1
            if len(answered) < number:
                break
        assert refused > 5
        kernel_._ask = ask  # type: ignore[method-assign]
        settle(firewall)
        assert set(kernel().elements) == rows(*stepwise.holders)

    def test_more_complaints_than_fit(self, lab: Lab, stepwise: Held4And6) -> None:
        """The kernel complains of each element of a large change. What is left of that is no word
        on the next change, whose element would stand there without anybody's knowing."""
        lease = letmein.Lease("10.77.6.1", 0x22, 1, "proof", 1, time.monotonic() + 60)
        many = [lease._replace(address=f"10.77.6.{n}") for n in range(250)]
        firewall = stepwise.firewall
        lab.load(more=DOOR)
        with pytest.raises(OSError):
            firewall.table.kernel.change(firewall.table.changes_for(many, replace=True))
        run(NFT, "-f", "-", text=letmein.ruleset_script(firewall.config))
        assert firewall.knock(OTHER_4, 0x22, 2) == ""
        settle(firewall)
        assert set(kernel().elements) == rows(*stepwise.holders, (OTHER_4, 0x22, 2))


    def test_the_largest_transaction(self, lab: Lab) -> None:
        """A socket takes it, however long the names are: leases that nobody can write anew would
        be open for longer than a new configuration says."""
        name = 64 * "t"
        lab.load(f"table inet {name} {{ chain LETMEIN-INPUT {{ }}; }}")
        text = server_conf(TRUTH_RESOURCES).replace("table = filter", f"table = {name}")
        config = letmein.parse_config(text, "", True, [])._replace(resources={
            0x23: letmein.parse_resource(0x23, "port: 23 / tcp, udp", 60)
        })
        table = letmein.Table(letmein.Nft(NFT), config, BOOT, letmein.Log())
        table.install()
        lease = letmein.Lease("", 0x23, 1, "12345678", 2, time.monotonic() + 60)
        many = [lease._replace(address=f"fd77::7:{n:x}") for n in range(300)]
        for some in letmein.in_batches(many):
            table.kernel.change(table.changes_for(some, replace=True))
        assert run(NFT, "list", "table", "inet", name).count("proof=") == 600

    def test_a_rule_is_deleted_in_the_middle_of_a_stop(
        self, lab: Lab, stepwise: Held4And6
    ) -> None:
        """That fails nft's whole transaction: it is tried again without that rule."""
        nft, again = stepwise.firewall.table.nft, stepwise.firewall.table.nft.run

        def run_late(script: str, *arguments: str) -> str:
            nft.run = again  # type: ignore[method-assign]
            delete_a_rule(lab)
            return again(script, *arguments)

        nft.run = run_late  # type: ignore[method-assign]
        stepwise.firewall.close()
        assert "letmein" not in lab.ruleset()

    def test_a_listing_without_half_of_a_lease(self, lab: Lab, stepwise: Held4And6) -> None:
        """The kernel may leave something out while a set grows: a server that starts then keeps
        the lease all the same."""
        settle(stepwise.firewall)
        old = stepwise.firewall
        assert old.knock(CLIENT_4, 0x23, 1) == ""
        successor = letmein.Firewall(old.table.nft, old.config, BOOT, letmein.Log())
        listed = successor.table.kernel.elements
        lease = old.leases.by_key[letmein.LeaseKey(CLIENT_4, 0x23)]
        half = letmein.lease_elements(lease, old.config)[1].key

        def incomplete(set_name: str) -> Iterator[letmein.Element]:
            successor.table.kernel.elements = listed  # type: ignore[method-assign]
            return (element for element in listed(set_name) if element.key != half)

        successor.table.kernel.elements = incomplete  # type: ignore[method-assign]
        with selectors.DefaultSelector() as selector:
            successor.open(selector)
            settle(successor)
            for key in list(selector.get_map().values()):
                assert isinstance(key.fileobj, socket.socket)
                key.fileobj.close()
        assert set(kernel().elements) == rows(*stepwise.holders, (CLIENT_4, 0x23, 1))
        assert len(successor.leases) == 4

    def test_a_gate_opens_and_shuts_while_its_leases_are_adopted(
        self, lab: Lab, stepwise: Held4And6
    ) -> None:
        """Somebody who comes and goes then, before it is known who holds it, shuts it for nobody
        else."""
        settle(stepwise.firewall)
        old = stepwise.firewall
        successor = letmein.Firewall(old.table.nft, old.config, BOOT, letmein.Log())
        with selectors.DefaultSelector() as selector:
            successor.open(selector)
            assert successor.steps is not None
            next(successor.steps)
            assert successor.knock(OTHER_4, 0x41, 2) == ""
            assert successor.revoke(OTHER_4, 0x41) == ""
            settle(successor)
            for key in list(selector.get_map().values()):
                assert isinstance(key.fileobj, socket.socket)
                key.fileobj.close()
        assert set(kernel().elements) == rows(*stepwise.holders)
        assert len(kernel().gates) == 2


class TestLargeTable:
    """Somebody else's large set in our table, such as a block list."""

    def test_200_000_ranges(self, lab: Lab, meanings: None) -> None:
        """nft 1.0.6 takes seconds to list such a table, or to add an element to it. The server
        starts, lets in, heals, adopts, reloads and stops as ever."""
        # An ordinary user's nft cannot send as much to the kernel, and not in one piece.
        count, at_once = (200_000, 200_000) if lab.real_root else (5_000, 1_000)
        first = 1 << 24
        ranges = [socket.inet_ntoa((first + 512 * n).to_bytes(4, "big")) for n in range(count)]
        lab.load(more=f"{DOOR}\nadd set inet filter block {{ type ipv4_addr; flags interval; }}")
        for start in range(0, count, at_once):
            listed = ",\n".join(f"{address}/24" for address in ranges[start : start + at_once])
            nft_do(f"add element inet filter block {{ {listed} }}")
        conf = server_conf(TRUTH_RESOURCES)
        path = lab.file(conf)
        checked = lab.command("server", "-c", path, "--check", "--user", "nobody")
        assert checked.status == 0, checked
        with Server(lab, conf) as server:
            knock_all(lab, *HOLDERS)
            assert len(status(server)) == len(rows(*HOLDERS))
            for damage in (flush_the_chain, delete_the_sets_alone):
                count = len(server.events("healed"))
                damage(lab)
                server.wait_for("healed", count + 1, leases="5")
                assert lab.reaches(22, CLIENT_4)
            reconfigure(server, conf)
            crash(server)
        with Server(lab, conf) as server:
            server.wait_for("adopted", leases="5")
            assert handshake(lab, 0x22, REVOKE) == COMEIN
            assert not lab.reaches(22, CLIENT_4)
            server.process.terminate()
            assert server.wait() == 0, server.log
            assert not server.events("failed") and not server.events("cannot-heal"), server.log


class TestTenThousand:
    def test_10_000_leases(self, lab: Lab, watched: WatchedNft) -> None:
        """Adopted, healed within 1 s, and no burden to a further knock."""
        # An ordinary user's nft cannot send as much to the kernel in one piece.
        count = 10_000 if lab.real_root else 1_000
        first = (10 << 24) + (77 << 16) + (16 << 8)
        addresses = [socket.inet_ntoa((first + n).to_bytes(4, "big")) for n in range(count)]
        lab.load(more=DOOR)
        conf = watched.conf(nftables="max-nr-rules = 20000")

        def knocks(server: Server) -> float:
            """The processor's time that goes into knocks, in seconds: it has to be said of the
            server alone, and not of what else the machine does."""
            pids = (server.process.pid, server.network_process())
            used = sum(map(cpu_seconds, pids))
            for number in range(1000):  # the system counts in units of 10 ms
                assert handshake(lab, 0x22, source=f"10.77.1.{number % 100}") == COMEIN
            return sum(map(cpu_seconds, pids)) - used

        with Server(lab, conf, env=unmeasured()) as server:
            alone = min(knocks(server), knocks(server))
            crash(server)
        listed = ", ".join(f"{a} . tcp . 22 timeout 600s {comment()}" for a in addresses)
        nft_do(f"add element inet filter letmein-4 {{ {listed} }}")
        with Server(lab, conf, env=unmeasured()) as server:
            server.wait_for("adopted", leases=str(count + 100))
            among_many = min(knocks(server), knocks(server))
            used = cpu_seconds(server.process.pid)
            healed_before = len(server.events("healed"))
            flush_and_reload(lab)

            def healed() -> bool:
                text = run(NFT, "list", "chain", "inet", "filter", "LETMEIN-INPUT")
                return text.count('comment "letmein') == TRUTH_RULES

            eventually(healed, "not healed")
            server.wait_for("healed", healed_before + 1)
            took = cpu_seconds(server.process.pid) - used
            print(f"healed in {took:.2f} s of CPU", end=", ")
            print(f"a knock costs {alone:.2f} / {among_many:.2f} ms", end=" ")
            assert len(kernel().elements) == count + 100
            assert len(status(server)) == count + 100
            assert lab.reaches(22, addresses[-1])
            assert took < 2.0
            # To go through all leases would take some 10 ms: that is what this is about.
            assert among_many < 5 * alone
            assert handshake(lab, 0x22, REVOKE, source=addresses[7]) == COMEIN
            assert not lab.reaches(22, addresses[7])
            assert lab.reaches(22, addresses[8])


class TestAdopt:
    @pytest.mark.parametrize("network", [False, True])
    def test_after_a_sigkill(self, lab: Lab, watched: WatchedNft, network: bool) -> None:
        """The next server takes over all leases, with the time they had left."""
        lab.load(more=DOOR)
        with Server(lab, watched.conf()) as server:
            knock_all(lab, *HOLDERS)
            before = Remaining(CLIENT_4)
            crash(server, network)
        assert lab.reaches(22, CLIENT_4)
        assert lab.reaches(8080, OTHER_4)
        with Server(lab, watched.conf()) as server:
            server.wait_for("adopted", leases="5")
            agree(lab, server, *HOLDERS)
            # Never longer than it was, up to 1 s shorter.
            Remaining(CLIENT_4).assert_runs_on_from(before, less=1.3)
            assert lab.reaches(22, CLIENT_4)
            assert lab.reaches(8080, OTHER_4), "the gate"
            # They are this server's in every way.
            flush_and_reload(lab)
            server.wait_for("healed", leases="5")
            agree(lab, server, *HOLDERS)
            assert handshake(lab, 0x41, REVOKE, source=OTHER_6) == COMEIN
            assert not lab.reaches(8080, OTHER_4)
            assert lab.reaches(8080, CLIENT_4), "a lease of its own"
            assert handshake(lab, 0x23, REVOKE) == COMEIN
            agree(lab, server, HOLDERS[0], *HOLDERS[2:4])

    def test_what_it_counts(self, lab: Lab, watched: WatchedNft) -> None:
        """Adopted leases count against max-nr-rules."""
        lab.load(more=DOOR)
        conf = watched.conf(nftables="max-nr-rules = 5")
        with Server(lab, conf) as server:
            knock_all(lab, (CLIENT_4, 0x22, 1), (CLIENT_4, 0x23, 1))
            crash(server)
        with Server(lab, conf) as server:
            assert handshake(lab, 0x22, source=OTHER_4) == COMEIN
            server.wait_for("revoked", reason="max-nr-rules is reached")
            assert len(kernel().elements) <= 3

    def test_more_than_may_be(self, lab: Lab, watched: WatchedNft) -> None:
        """Nobody is thrown out because max-nr-rules is lower now, and the log says what is so; a
        newcomer takes the place of an old lease."""
        lab.load(more=DOOR)
        holders = [(f"10.77.0.{number}", 0x22, 1) for number in range(8)]
        with Server(lab, watched.conf()) as server:
            knock_all(lab, holders[0])
            time.sleep(5 * TICK_S)  # its successor can tell which is the oldest
            knock_all(lab, *holders[1:])
            crash(server)
        with Server(lab, watched.conf(nftables="max-nr-rules = 5")) as server:
            warnings = [event["reason"] for event in server.events("warning")]
            assert any("max-nr-rules is 5, but 10 rules" in reason for reason in warnings)
            agree(lab, server, *holders)
            knock_all(lab, (OTHER_4, 0x22, 2))
            agree(lab, server, *holders[1:], (OTHER_4, 0x22, 2))

    def test_the_time_left_is_at_most_what_is_configured(
        self, lab: Lab, watched: WatchedNft
    ) -> None:
        """A shorter timeout in the file cuts the leases that are taken over."""
        lab.load(more=DOOR)
        with Server(lab, watched.conf()) as server:
            knock_all(lab, *HOLDERS)
            crash(server)
        shorter = TRUTH_RESOURCES.replace("22 = port: 22", "22 = port: 22 / timeout: 5")
        with Server(lab, watched.conf(shorter)) as server:
            server.wait_for("adopted", leases="5")
            now = kernel()
            for row, left in now.elements.items():
                assert (left <= 5) == (row.opens == "tcp/22"), now

    def test_what_ended_meanwhile_is_gone(self, lab: Lab, watched: WatchedNft) -> None:
        """A lease that ended between two servers is not taken over."""
        lab.load(more=DOOR)
        resources = "22 = port: 22 / timeout: 1\n23 = port: 23 / tcp, udp"
        with Server(lab, watched.conf(resources)) as server:
            knock_all(lab, (CLIENT_4, 0x22, 1), (CLIENT_4, 0x23, 1))
            crash(server)
        eventually(lambda: not lab.reaches(22, CLIENT_4), "the lease does not end")
        with Server(lab, watched.conf(resources)) as server:
            server.wait_for("adopted", leases="1")
            agree(lab, server, (CLIENT_4, 0x23, 1))

    @pytest.mark.parametrize(
        "name, element",
        [
            ("letmein-4", "10.77.6.1 . tcp . 22"),
            ("letmein-4", "10.77.6.1 . tcp . 22 timeout 600s"),
            ("letmein-4", f"10.77.6.1 . tcp . 22 timeout 600s {comment(boot='00000000')}"),
            ("letmein-4", f"10.77.6.1 . tcp . 22 {comment()}"),
            ("letmein-4", f"10.77.6.1 . tcp . 22 timeout 600s {comment(user=3)}"),
            ("letmein-4", f"10.77.6.1 . tcp . 26 timeout 600s {comment(0x26, user=2)}"),
            ("letmein-4", f"10.77.6.1 . tcp . 22 timeout 600s {comment(0x99, like=0x22)}"),
            ("letmein-4", f"10.77.6.1 . tcp . 26 timeout 600s {comment()}"),
            ("letmein-4", f"10.77.6.1 . udp . 22 timeout 600s {comment()}"),
            ("letmein-4", f"10.77.6.1 . tcp . 23 timeout 600s {comment(0x23)}"),
            ("letmein-4", f"10.77.6.1 . 253 . 22 timeout 600s {comment()}"),
            ("letmein-4", f"10.77.6.1 . tcp . 5800 timeout 600s {comment(0x58, like=0x22)}"),
            ("letmein-4", f"10.77.6.1 . tcp . 27 timeout 600s {comment(0x27, like=0x22)}"),
            ("letmein-6", "fd77::6 . tcp . 22 timeout 600s"),
            ("letmein-00000040-4", f"10.77.6.1 timeout 600s {comment(0x41)}"),
            ("letmein-00000040-4", "10.77.6.1"),
            ("letmein-00000041-gate", "ip"),
            ("letmein-00000041-gate", 'ip timeout 600s comment "gate"'),
            ("letmein-00000041-gate", f"ip timeout 600s {comment(0x41)}"),
            ("letmein-00000041-gate", f"0x1234 timeout 600s {comment(0x41)}"),
        ],
    )
    def test_what_was_planted_or_restored_is_removed(
        self, lab: Lab, watched: WatchedNft, name: str, element: str
    ) -> None:
        """Elements that are not of this boot, user, resource or form are removed."""
        lab.load(more=DOOR)
        with Server(lab, watched.conf()) as server:
            knock_all(lab, HOLDERS[0])
            crash(server)
        nft_do(f"add element inet filter {name} {{ {element} }}")
        with Server(lab, watched.conf()) as server:
            server.wait_for("adopted", leases="1")
            agree(lab, server, HOLDERS[0])
            assert kernel().gates == {}

    def test_a_resource_that_means_another_thing_now(
        self, lab: Lab, watched: WatchedNft
    ) -> None:
        """A lease whose resource has changed its meaning is not taken over."""
        lab.load(more=f"{DOOR}\nadd chain inet filter OTHER")
        with Server(lab, watched.conf()) as server:
            knock_all(lab, *HOLDERS)
            crash(server)
        changed = TRUTH_RESOURCES.replace("22 = port: 22", "22 = port: 26")
        changed = changed.replace("26 = port: 26", "26 = port: 22").replace("tcp, udp", "udp")
        changed = changed.replace("40 = jump / input: DOOR", "40 = jump / input: OTHER")
        with Server(lab, watched.conf(changed)) as server:
            server.wait_for("adopted", leases="2")
            agree(lab, server, HOLDERS[2], HOLDERS[4])

    def test_a_key_that_was_replaced(self, lab: Lab, watched: WatchedNft) -> None:
        """What a key got that is no longer valid at the next start is not taken over, and nothing
        of a key is in the kernel."""
        lab.load(more=DOOR)
        with Server(lab, watched.conf()) as server:
            knock_all(lab, *HOLDERS)
            crash(server)
        text = lab.ruleset().lower()
        assert not any(key.hex()[n : n + 8] in text for key in KEYS.values() for n in range(57))
        conf = watched.conf().replace(KEYS[1].hex(), bytes(range(32)).hex())
        with Server(lab, conf) as server:
            server.wait_for("adopted", leases="2")
            agree(lab, server, *(holder for holder in HOLDERS if holder[2] == 2))
            assert not lab.reaches(22, CLIENT_4)

    def test_sets_that_nobody_has_any_more(self, lab: Lab, watched: WatchedNft) -> None:
        """Sets of resources that are gone are removed."""
        lab.load(more=DOOR)
        with Server(lab, watched.conf()) as server:
            knock_all(lab, *HOLDERS)
            crash(server)
        with Server(lab, watched.conf(RESOURCES)) as server:
            server.wait_for("adopted", leases="3")
            agree(lab, server, *HOLDERS[:3])
            assert "letmein-00000040" not in lab.ruleset()
            assert "letmein-00000041" not in lab.ruleset()

    def test_a_clean_stop_leaves_nothing_to_adopt(self, lab: Lab, watched: WatchedNft) -> None:
        """After a clean stop the next server begins with nothing."""
        lab.load(more=DOOR)
        before = lab.ruleset()
        with Server(lab, watched.conf()) as server:
            knock_all(lab, *HOLDERS)
        assert lab.ruleset() == before
        with Server(lab, watched.conf()) as server:
            assert not server.events("adopted")
            agree(lab, server)

    def test_a_second_server_for_the_same_table(self, lab: Lab, guarded: Server) -> None:
        """It is refused and changes nothing; one for another table starts."""
        knock_all(lab, *HOLDERS)
        before = lab.ruleset()
        path = lab.file(server_conf(TRUTH_RESOURCES, port="5900"))
        arguments = ["server", "-c", str(path), "--rundir", str(guarded.rundir), "--user", "none"]
        result = lab.command(*arguments)
        result.assert_error("already", "inet-filter")
        assert lab.ruleset() == before
        assert handshake(lab, 0x22, source=OTHER_4) == COMEIN
        # A server for another table is welcome.
        nft_do("add table ip filter", "add chain ip filter LETMEIN-INPUT")
        other = server_conf("22 = port: 22", port="5900", family="ip")
        server = Server(lab, other, "--rundir", str(guarded.rundir))
        server.process.terminate()
        assert server.wait() == 0, server.log
        agree(lab, guarded, *HOLDERS, (OTHER_4, 0x22, 1))

    def test_a_stop_when_a_foreign_rule_uses_a_set(self, lab: Lab, watched: WatchedNft) -> None:
        """The set stays, empty, and the next server lives with it."""
        lab.load(more=DOOR)
        server = Server(lab, watched.conf())
        knock_all(lab, *HOLDERS)
        key = "ip saddr . meta l4proto . th dport"
        nft_do(f"insert rule inet filter input {key} @letmein-4 counter accept")
        server.process.terminate()
        assert server.wait() == 0, server.log
        assert server.wait_for("set-stays")["set"] == "letmein-4"
        assert server.events("stopped")
        left = kernel()
        assert (left.elements, left.gates, left.rules) == ({}, {}, 0)
        assert set(re.findall(r"set (letmein-\S+)", lab.ruleset())) == {"letmein-4"}
        assert not lab.reaches(22, CLIENT_4)
        # The next server lives with it.
        server = Server(lab, watched.conf())
        knock_all(lab, HOLDERS[0])
        agree(lab, server, HOLDERS[0])
        nft_do("flush chain inet filter input")
        server.stop()

    @pytest.mark.parametrize("gone", ["delete table inet filter", "flush ruleset"])
    def test_a_stop_when_the_table_is_gone(
        self, lab: Lab, watched: WatchedNft, gone: str
    ) -> None:
        """Nothing of ours is there: that is a clean stop."""
        lab.load(more=DOOR)
        server = Server(lab, watched.conf())
        knock_all(lab, *HOLDERS)
        nft_do(gone)
        server.process.terminate()
        assert server.wait() == 0, server.log
        assert server.events("stopped")

    def test_a_stop_while_nft_fails(self, lab: Lab, watched: WatchedNft) -> None:
        """One clear error, and the leases end by themselves; the next server cleans up."""
        lab.load(more=DOOR)
        server = Server(lab, watched.conf())
        knock_all(lab, *HOLDERS)
        watched.mode("fail")
        server.process.terminate()
        assert server.wait() == 1, server.log
        assert "Traceback" not in server.log
        assert "letmein: error: " in server.log
        watched.mode("good")
        with Server(lab, watched.conf()) as server:
            agree(lab, server, *HOLDERS)


class TestExactly:
    def test_a_revoke_leaves_the_rest(self, lab: Lab, guarded: Server) -> None:
        """Each revocation takes its own elements, and a gate with its last lease."""
        knock_all(lab, *HOLDERS, (CLIENT_4, 0x41, 1))
        assert handshake(lab, 0x22, REVOKE) == COMEIN
        agree(lab, guarded, *HOLDERS[1:], (CLIENT_4, 0x41, 1))
        assert handshake(lab, 0x23, REVOKE) == COMEIN
        agree(lab, guarded, *HOLDERS[2:], (CLIENT_4, 0x41, 1))
        assert handshake(lab, 0x40, REVOKE) == COMEIN
        assert handshake(lab, 0x41, REVOKE, source=OTHER_6) == COMEIN
        agree(lab, guarded, HOLDERS[2], (CLIENT_4, 0x41, 1))
        assert set(kernel().gates) == {"00000041 ip", "00000041 ip6"}
        assert handshake(lab, 0x41, REVOKE) == COMEIN
        assert kernel().gates == {}

    @pytest.mark.parametrize("refreshes", [True, False])
    def test_a_refresh_restarts_the_clock(
        self, lab: Lab, watched: WatchedNft, refreshes: bool
    ) -> None:
        """A repeated knock gives the whole time anew, on kernels that refresh and others."""
        lab.load(more=DOOR)
        program = LETMEIN if refreshes else without_refresh(lab)
        resources = re.sub(r"(?m)^(23 .*|4. .*)$", r"\1 / timeout: 3", TRUTH_RESOURCES)
        every = [0x25, 0x23, 0x40, 0x41]
        runner = (sys.executable, program, "server")
        with Server(lab, watched.conf(resources), program=runner):
            told = 0.0
            # On a busy machine the first ones may have ended before they are knocked for again.
            for _ in range(5):
                began = time.monotonic()
                knock_all(lab, *((CLIENT_4, resource, 1) for resource in every))
                time.sleep(1.5)
                before = time.monotonic()
                knock_all(lab, *((CLIENT_4, resource, 1) for resource in every))
                told = time.monotonic()
                if told - began < 3:
                    break
            assert told - began < 3, "the machine was too slow for this test"
            held = set(kernel().elements)
            wanted = rows(*((CLIENT_4, resource, 1) for resource in every))
            assert held == wanted or time.monotonic() > before + 3
            endings = [Ending(lab, port) for port in (25, 23, 8080)]
            eventually(
                lambda: not any([ending.look() for ending in endings]), "the leases do not end"
            )
            for ending in endings:
                ending.assert_took(3, before, told)

    @pytest.mark.parametrize("refreshes", [True, False])
    def test_another_user_takes_a_lease_over(
        self, lab: Lab, watched: WatchedNft, refreshes: bool
    ) -> None:
        """The last to knock is the holder, with the whole time, and anybody may revoke."""
        lab.load(more=DOOR)
        program = LETMEIN if refreshes else without_refresh(lab)
        runner = (sys.executable, program, "server")
        with Server(lab, watched.conf(), program=runner) as server:
            both = [(CLIENT_4, 0x22), (CLIENT_4, 0x23), (CLIENT_4, 0x40), (CLIENT_4, 0x41)]
            for user in (1, 2, 2, 1):
                if user == 2:
                    time.sleep(1.1)
                knocked = time.monotonic()
                knock_all(lab, *((*lease, user) for lease in both))
                agree(lab, server, *((*lease, user) for lease in both))
                # Each has its full time anew, less what this has taken.
                left = min(milliseconds_left(CLIENT_4))
                assert left > 600 - (time.monotonic() - knocked) - 0.05
            flush_and_reload(lab)
            server.wait_for("healed", leases="4")
            agree(lab, server, *((*lease, 1) for lease in both))
            for resource in (0x22, 0x23, 0x40, 0x41):
                assert handshake(lab, resource, REVOKE, user=2) == COMEIN
            agree(lab, server)
            assert kernel().gates == {}

    def test_two_resources_with_one_target(self, lab: Lab, watched: WatchedNft) -> None:
        """They are two leases, each with its own time and end."""
        lab.load(more=DOOR)
        OPENS.update({0x42: [""]})
        twice = TRUTH_RESOURCES + "42 = jump / input: DOOR / input-match: saddr / timeout: 90\n"
        with Server(lab, watched.conf(twice)) as server:
            knock_all(lab, (CLIENT_4, 0x40, 1), (CLIENT_4, 0x42, 2))
            agree(lab, server, (CLIENT_4, 0x40, 1), (CLIENT_4, 0x42, 2))
            assert handshake(lab, 0x40, REVOKE) == COMEIN
            agree(lab, server, (CLIENT_4, 0x42, 2))
            assert lab.reaches(8080, CLIENT_4)
            assert max(milliseconds_left(CLIENT_4)) <= 90
            assert handshake(lab, 0x42, REVOKE) == COMEIN
            assert not lab.reaches(8080, CLIENT_4)

    @pytest.mark.parametrize("refreshes", [True, False])
    @pytest.mark.parametrize(
        "family, first, second, other",
        [
            ("inet", CLIENT_4, CLIENT_6, OTHER_6),
            ("ip", CLIENT_4, OTHER_4, "10.77.0.1"),
            ("ip6", CLIENT_6, OTHER_6, "fd77::1"),
        ],
    )
    def test_jumps_for_all_traffic(
        self, lab: Lab, family: str, first: str, second: str, other: str, refreshes: bool
    ) -> None:
        """A gate lasts as long as the longest lease that is left, whichever goes first."""
        icmp = {"inet": "{ icmp, icmpv6 }", "ip": "icmp", "ip6": "icmpv6"}[family]
        lab.load(JUMP_RULESET.format(family=family).replace("{ icmp, icmpv6 }", icmp))
        conf = server_conf("41 = jump / input: DOOR-INPUT / timeout: 60", family=family)
        program = LETMEIN if refreshes else without_refresh(lab)
        runner = (sys.executable, program, "server")
        with Server(lab, conf, program=runner) as server:

            def gate() -> float:
                """The least that the gate has left."""
                table = f"{family} filter"
                return min(s for v in kernel(family).gates for s in
                           milliseconds_left(v.split()[1], table))

            def left(address: str) -> float:
                return max(milliseconds_left(address, f"{family} filter"))

            def ends_with(address: str) -> None:
                """The gate has as much left as this lease, which is asked for in between."""
                before, lease, after = gate(), left(address), gate()
                assert after - 0.1 <= lease <= before + 0.1

            assert handshake(lab, 0x41, source=first) == COMEIN
            time.sleep(1.1)
            assert handshake(lab, 0x41, source=second) == COMEIN
            agree(lab, server, (first, 0x41, 1), (second, 0x41, 1), family=family)
            ends_with(second)
            assert lab.reaches(8080, other)
            # The longest goes: the gate is open as long as the other.
            assert handshake(lab, 0x41, REVOKE, source=second) == COMEIN
            agree(lab, server, (first, 0x41, 1), family=family)
            ends_with(first)
            assert gate() < 59
            assert lab.reaches(8080, other)
            # It is back; the shorter goes.
            assert handshake(lab, 0x41, source=second) == COMEIN
            assert handshake(lab, 0x41, REVOKE, source=first) == COMEIN
            ends_with(second)
            assert gate() > 58.5
            assert lab.reaches(8080, other)
            assert handshake(lab, 0x41, REVOKE, source=second) == COMEIN
            agree(lab, server, family=family)
            assert kernel(family).gates == {}
            assert not lab.reaches(8080, other)

    @pytest.mark.parametrize("resource, size", [(0x22, 1), (0x23, 2)])
    def test_max_nr_rules_under_64_knocks_at_once(
        self, lab: Lab, watched: WatchedNft, resource: int, size: int
    ) -> None:
        """There are never too many rules, and each knock gets in."""
        lab.load(more=DOOR)
        addresses = [f"10.77.4.{number}" for number in range(1, 65)]
        room = 20
        conf = watched.conf(nftables=f"max-nr-rules = {2 + room * size + size - 1}")
        with Server(lab, conf) as server:
            for _ in range(3):
                # Each comes in, in the place of an older one; and never are there too many.
                assert storm(lab, addresses, 64, KNOCK, resource) == 64
                held = {row.address for row in kernel().elements}
                assert len(held) == room
                agree(lab, server, *((address, resource, 1) for address in held))
                # All those may knock again: nobody goes for that.
                ended = len(server.events("revoked", reason="max-nr-rules is reached"))
                assert storm(lab, held, 64, KNOCK, resource) == room
                assert {row.address for row in kernel().elements} == held
                assert len(server.events("revoked", reason="max-nr-rules is reached")) == ended
                assert storm(lab, addresses, 64, REVOKE, resource) == 64
                agree(lab, server)

    @pytest.mark.parametrize("protocol", ["tcp", "udp"])
    def test_an_ipv6_knock_for_family_ip(
        self, lab: Lab, watched: WatchedNft, protocol: str
    ) -> None:
        """It is refused, with the reason in the log."""
        lab.load(JUMP_RULESET.format(family="ip").replace("{ icmp, icmpv6 }", "icmp"))
        with Server(lab, server_conf(family="ip")) as server:
            assert handshake(lab, 0x22, source=CLIENT_4) == COMEIN
            assert handshake(lab, 0x22, source=CLIENT_6, protocol=protocol) == GOAWAY
            event = server.wait_for("failed", peer=CLIENT_6, proto=protocol)
            assert "family ip" in event["reason"], event
            agree(lab, server, (CLIENT_4, 0x22, 1), family="ip")

    def test_3_seconds_with_everything_killed(self, lab: Lab, watched: WatchedNft) -> None:
        """A lease ends on time without any process."""
        lab.load(more=DOOR)
        with Server(lab, watched.conf()) as server:
            before = time.monotonic()
            assert handshake(lab, 0x25) == COMEIN
            told = time.monotonic()
            ending = Ending(lab, 25)
            crash(server, network=True)
            ending.wait()
            ending.assert_took(3, before, told)

    def test_3_seconds_with_reloads(self, lab: Lab, guarded: Server) -> None:
        """Neither healing nor a SIGHUP lets a lease end later."""
        before = time.monotonic()
        assert handshake(lab, 0x25) == COMEIN
        told = time.monotonic()
        while time.monotonic() < before + 2.5:
            flush_and_reload(lab)
            eventually(
                lambda: lab.reaches(25, CLIENT_4) or time.monotonic() > before + 3, "not healed"
            )
            guarded.process.send_signal(signal.SIGHUP)
        ending = Ending(lab, 25)
        ending.wait()
        ending.assert_took(3, before, told)


# nft takes some words for its own, none of which begins with an X.
NFT_NAMES = st.text("Xx09_.-", max_size=63).map("X".__add__)
TARGETS = st.sampled_from(["XTARGET-1", "XTARGET.2", "XTARGET_" + 56 * "3"])
TIMES = st.sampled_from(["0.001", "1", "600", "4294967295"])


def port_text(port: int, protocols: str, timeout: str) -> str:
    return f"port: {port} / {protocols} / timeout: {timeout}"


def jump_text(hooks: dict[str, tuple[str, bool]]) -> str:
    items = ["jump", *(f"{hook}: {target}" for hook, (target, _) in hooks.items())]
    items += [f"{hook}-match: saddr" for hook, (_, match_saddr) in hooks.items() if match_saddr]
    return " / ".join(items)


RESOURCE_TEXTS = st.builds(
    port_text, st.integers(1, 65535), st.sampled_from(["tcp", "udp", "tcp, udp"]), TIMES
) | st.dictionaries(
    st.sampled_from(letmein.HOOKS), st.tuples(TARGETS, st.booleans()), min_size=1
).map(jump_text)


class Ours(NamedTuple):
    """The only words that may stand in a script of ours."""

    config: letmein.Config

    def allows(self, line: str) -> bool:
        config = self.config
        table = re.escape(f" {config.family} {config.table} ")
        name = r"letmein-(?:[0-9A-F]{8}-)?(?:4|6|gate)"
        chain = f"(?:{'|'.join(map(re.escape, config.chains.values()))})"
        match = r"ip6? saddr(?: \. meta l4proto \. th dport)?|meta protocol"
        verdict = r"accept|jump XTARGET[-._][123]+"
        rule = rf"(?:(?:tcp|udp) dport {config.port}|(?:{match}) @{name}) (?:{verdict})"
        kind = "ipv[46]_addr(?: [.] inet_proto [.] inet_service)?|ether_type"
        patterns = [
            rf"add set{table}{name} {{ type (?:{kind}); flags timeout; counter; }}",
            rf'add rule{table}{chain} {rule} comment "letmein [0-9a-f]{{8}}"',
        ]
        return any(re.fullmatch(pattern, line) for pattern in patterns)


@examples(15)
@given(
    st.sampled_from(sorted(letmein.VERSIONS)),
    NFT_NAMES,
    st.tuples(NFT_NAMES, st.none() | NFT_NAMES, st.none() | NFT_NAMES),
    st.dictionaries(st.integers(0, 0xFFFFFFFF), RESOURCE_TEXTS, max_size=6),
    st.sampled_from(["tcp", "udp", "tcp, udp"]),
)
def test_nft_takes_all_that_is_ours(
    lab: Lab,
    family: str,
    table: str,
    names: tuple[str, str | None, str | None],
    resources: dict[int, str],
    protocols: str,
) -> None:
    """Whatever is configured: nft takes the script, and it is about our names alone."""
    texts: dict[str, str] = {}  # by port, which may stand there once
    for identifier, text in resources.items():
        texts[text.split("/")[0] if "port" in text else text + str(identifier)] = (
            f"{identifier:X} = {text}"
        )
    chains = {f"chain-{hook}": chain for hook, chain in zip(letmein.HOOKS, names) if chain}
    lines = [f"{option} = {chain}" for option, chain in chains.items()]
    config = parse(
        "\n".join([
            "[GENERAL]", f"port = 5800 / {protocols}", "[RESOURCES]", *texts.values(),
            server_text("NFTABLES", f"family = {family}", f"table = {table}", *lines),
        ])
    )  # fmt: skip
    script = letmein.ruleset_script(config)
    assert script.isascii()
    ours = Ours(config)
    for line in script.splitlines():
        assert ours.allows(line), line

    targets = {target for r in config.resources.values() for _, target, _ in r.jumps}
    found = f"add table {family} {table}\n" + "".join(
        f"add chain {family} {table} {chain}\n" for chain in {*config.chains.values(), *targets}
    )
    run(NFT, "-c", "-f", "-", text=found + script)


LEASES = st.builds(
    letmein.Lease,
    address=st.sampled_from(["10.0.0.1", "10.0.0.2", "fd00::1"]),
    resource=st.integers(1, 2),
    user=st.integers(1, 3),
    proof=st.just(""),
    weight=st.integers(1, 3),
    ends=st.integers(0, 8).map(lambda halves: halves / 2),
)


def assert_right_room(held: list[letmein.Lease], lease: letmein.Lease, limit: int) -> None:
    """That what has to end for a lease is needed, and the longest unrenewed of who holds most."""
    leases = letmein.Leases()
    for each in held:
        leases.keep(each)

    def excess(left: list[letmein.Lease]) -> int:
        return lease.weight + sum(each.weight for each in left) - max(limit, leases.weight)

    left = [each for each in held if each.key != lease.key]
    renewed = [each for each in held if each.key == lease.key]
    for ended in leases.make_room(lease, limit):
        assert excess(left) > 0
        weights: collections.Counter[int] = collections.Counter()
        for each in [*left, *renewed, lease]:
            weights[each.user] += each.weight
        assert weights[ended.user] == max(weights[each.user] for each in left)
        assert ended == next(each for each in left if each.user == ended.user)
        left.remove(ended)
    assert excess(left) <= 0


@examples(400)
@given(
    st.lists(st.tuples(st.sampled_from(["keep", "keep", "forget", "expire"]), LEASES), max_size=20),
    LEASES,
    st.integers(3, 12),
)
def test_leases_and_a_list(
    steps: list[tuple[str, letmein.Lease]], new: letmein.Lease, limit: int
) -> None:
    """The table knows the same as a list of leases, and keeps nothing of those that ended."""
    leases, held = letmein.Leases(), list[letmein.Lease]()
    for step, lease in [*steps, ("expire", new._replace(ends=4.0))]:
        if step == "expire":
            ended = [each for each in held if each.ends <= lease.ends]
            assert sorted(leases.expire(lease.ends)) == sorted(ended)
            held = [each for each in held if each not in ended]
        else:
            held = [each for each in held if each.key != lease.key]
            if step == "keep":
                leases.keep(lease)
                held.append(lease)
            else:
                leases.forget(lease.key)
        assert len(leases) == len(held)
        assert leases.by_key == {each.key: each for each in held}
        assert leases.weight == sum(each.weight for each in held)
        for but in (frozenset(), frozenset(each.key for each in held[:1])):
            counted = [each for each in held if each.key not in but]
            ends = {
                resource: max(each.ends for each in counted if each.resource == resource)
                for resource in {each.resource for each in counted}
            }
            assert leases.last_ends(but) == ends
        assert_right_room(held, new, limit)
    assert vars(leases) == vars(letmein.Leases())


NFT_CONF = f"""
[GENERAL]
port = 5801 / tcp, udp
[KEYS]
1 = {KEYS[1].hex()}
[RESOURCES]
22 = port: 22 / tcp, udp
40 = jump / input: T / input-match: saddr / forward: U / users: 1
[NFTABLES]
table = filter
chain-input = I
chain-forward = F
"""


@pytest.mark.parametrize("family, versions", [("inet", (4, 6)), ("ip", (4,)), ("ip6", (6,))])
def test_what_nft_is_told(family: str, versions: tuple[int, ...]) -> None:
    """Sets and rules for a port and for jumps, in each family, and how they are deleted."""
    script = letmein.ruleset_script(parse(f"{NFT_CONF}family = {family}\n"))
    tags = re.findall(r' comment "(letmein [0-9a-f]{8})"$', script, re.MULTILINE)
    options = "flags timeout; counter;"
    table, address = f"{family} filter", {4: "ip saddr", 6: "ip6 saddr"}
    sets = [(f"letmein-{n}", f"ipv{n}_addr . inet_proto . inet_service") for n in versions]
    sets += [(f"letmein-00000040-{n}", f"ipv{n}_addr") for n in versions]
    sets += [("letmein-00000040-gate", "ether_type")]
    rules = [f"I {protocol} dport 5801 accept" for protocol in ("tcp", "udp")]
    rules += [f"I {address[n]} . meta l4proto . th dport @letmein-{n} accept" for n in versions]
    rules += [f"I {address[n]} @letmein-00000040-{n} jump T" for n in versions]
    rules += ["F meta protocol @letmein-00000040-gate jump U"]
    assert script.splitlines() == [
        *(f"add set {table} {name} {{ type {kind}; {options} }}" for name, kind in sets),
        *(f'add rule {table} {rule} comment "{tags[0]}"' for rule in rules),
    ]


@pytest.mark.parametrize(
    "address, resource, elements",
    [
        ("10.0.0.1", 0x22, [("4", "0a000001 06000000 00160000"),
                            ("4", "0a000001 11000000 00160000")]),
        ("fd00::1", 0x22, [("6", f"fd{'00' * 14}01 06000000 00160000"),
                           ("6", f"fd{'00' * 14}01 11000000 00160000")]),
        ("10.0.0.1", 0x40, [("00000040-4", "0a000001")]),
        ("fd00::1", 0x40, [("00000040-6", f"fd{'00' * 14}01")]),
        (letmein.EVERYBODY, 0x40, [("00000040-gate", "0800"), ("00000040-gate", "86dd")]),
    ],
)  # fmt: skip
def test_elements_of_a_lease(
    address: str, resource: int, elements: list[tuple[str, str]]
) -> None:
    """Their sets and keys, which can be read again, and their comment."""
    lease = letmein.Lease(address, resource, 0xA, "89abcdef", 1, 0.0)
    names = letmein.lease_elements(lease, parse(f"{NFT_CONF}family = inet\n"))
    assert names == [(f"letmein-{name}", bytes.fromhex(key)) for name, key in elements]
    places = [letmein.read_key(name) for name in names]
    assert [place[0] for place in places] == [address] * len(names)
    assert [place[1] for place in places if place[1]] == [(6, 22), (17, 22)] * (resource == 0x22)
    comment = letmein.lease_comment(lease, "01234567")
    if address == letmein.EVERYBODY:
        assert comment == "gate"
    else:
        assert comment == f"user=0000000A resource={resource:08X} boot=01234567 proof=89abcdef"
        assert letmein.COMMENT.fullmatch(comment)


@pytest.mark.parametrize(
    "name, key",
    [
        ("4", ""), ("4", "0a0000"), ("4", "0a000001 06"), ("4", "0a000001 06000000 00160000 00"),
        ("6", "0a000001"), ("00000040-4", "0a0000"), ("00000040-gate", "0806"),
    ],
)  # fmt: skip
def test_a_key_that_is_none_of_ours(name: str, key: str) -> None:
    """Others may put anything into our sets."""
    found = letmein.read_key(letmein.ElementName(f"letmein-{name}", bytes.fromhex(key)))
    assert found == ("", None)


VALUES = st.lists(st.tuples(st.integers(0, 0x3FFF), st.binary(max_size=9)), max_size=5)
PARTS = st.lists(st.tuples(*[st.integers(0, 0xFFFF)] * 4, st.binary(max_size=9)), max_size=4)


@PROPERTY
@given(VALUES, PARTS, st.binary(max_size=40), st.integers(0, 40))
def test_netlink_is_read_as_it_is_written(
    values: list[tuple[int, bytes]],
    messages: list[tuple[int, int, int, int, bytes]],
    garbage: bytes,
    size: int,
) -> None:
    """Attributes and messages: whole, cut off, and anything at all."""
    data = b"".join(letmein.attribute(kind, value) for kind, value in values)
    assert list(letmein.each_attribute(data)) == values
    assert len(data) % 4 == 0
    assert letmein.Attributes(letmein.nested(7, data)).within(7) == dict(values)
    received = b""
    for kind, flags, sequence, port, body in messages:
        length = 16 + len(body)
        received += struct.pack("=IHHII", length, kind, flags, sequence, port) + body
        received += bytes(-length % 4)
    assert list(letmein.each_packet(received)) == messages
    for read, whole, most in (
        (letmein.each_attribute, data, len(values)),
        (letmein.each_packet, received, len(messages)),
    ):
        assert len(list(read(whole[:size]))) <= most
        assert len(list(read(garbage))) <= len(garbage) // 4 + 1


def test_values_in_netlink() -> None:
    """Numbers, names, comments, keys and errors, also where there are none."""
    others = bytes([1, 2]) + b"xx"  # type, length and value of what is no comment
    written = [
        letmein.attribute(1, bytes([0, 0, 1, 2])), letmein.text_attribute(2, "letmein-4"),
        letmein.attribute(3, others + bytes([0, 5]) + b"gate\0"), letmein.attribute(4, others),
        letmein.attribute(5, bytes([0, 9]) + b"ab\xff"), letmein.attribute(6, bytes([0])),
    ]  # fmt: skip
    found = letmein.Attributes(b"".join(written))
    assert (found.number(1), found.number(9)) == (0x102, 0)
    assert (found[2], found.text(2), found.text(9)) == (b"letmein-4\0", "letmein-4", "")
    comments = ["gate", "", "ab\ufffd", "", ""]
    assert [found.comment(kind) for kind in (3, 4, 5, 6, 9)] == comments
    assert found.within(9) == {}
    # linux/netfilter/nf_tables.h: NFTA_SET_ELEM_KEY 1, _FLAGS 3, NFTA_DATA_VALUE 1; 0x8000 nests.
    assert letmein.key_attribute(b"\x08\0") == bytes.fromhex("0c000180 06000100 08000000")
    assert letmein.key_attribute(b"") == bytes.fromhex("08000300 00000002")


@pytest.mark.parametrize(
    "comment, ours",
    [("letmein 01234567", True), ("01234567/LETMEIN", True), ("letmeins", False), ("", False),
     ("LETMEIN ", False), ("my letmein 1", False), ("/LETMEIN 1", False)],
)  # fmt: skip
def test_whose_rule_it_is(comment: str, ours: bool) -> None:
    """Ours, or the Rust server's: these we delete."""
    assert letmein.is_ours(letmein.Rule("I", 1, comment)) == ours


@pytest.mark.parametrize(
    "user, resource, changes, seconds",
    [
        (1, 0x22, {}, 600.0), (1, 0x40, {}, 600.0), (2, 0x22, {}, 0.0), (1, 0x23, {}, 0.0),
        (1, 0x22, {"boot": "76543210"}, 0.0), (1, 0x22, {"meaning": 0x40}, 0.0),
        (1, 0x22, {"key": KEYS[2]}, 0.0),
    ],
)  # fmt: skip
def test_a_lease_is_taken_over_for_what_it_was_given_for(
    user: int, resource: int, changes: dict[str, Any], seconds: float
) -> None:
    """By the same key, in the same boot, for a resource that means the same."""
    config = parse(f"{NFT_CONF}family = inet\n")
    meaning = config.resources[changes.get("meaning", resource if resource != 0x23 else 0x22)]
    key, boot = changes.get("key", KEYS[1]), changes.get("boot", BOOT)
    proof = letmein.lease_proof(key, boot, meaning.meaning)
    assert letmein.time_granted(config, BOOT, user, resource, proof) == seconds


# ----------------------------------------------------------------------------
# 5  Monitor
#
# The process with the keys grants for whole handshakes alone, reloads, and keeps its log short.
# ----------------------------------------------------------------------------

ANY_MESSAGE = (
    st.sampled_from(RECORDED)
    | FORGED
    | st.builds(flipped, st.sampled_from(RECORDED), st.integers(0, 55))
    | st.binary(min_size=56, max_size=56)
)

# What stands between protocol and message in a record: whose it is.
WAY = letmein.RECORD.size - 2 - 56
WAYS = st.sampled_from([bytes(WAY), (bytes(4) + letmein.IPV4_MAPPED).ljust(WAY, b"\0")])

ANY_RECORD = st.tuples(
    st.sampled_from([letmein.FIRST, letmein.SECOND] * 4 + [*range(10), 255]),
    st.sampled_from([letmein.TCP, letmein.UDP] * 5 + [0, 255]),
    WAYS | st.binary(min_size=WAY, max_size=WAY),
    ANY_MESSAGE | st.just(b"echo"),
    st.sampled_from([letmein.RECORD.size] * 20 + [0, 1, 56, 300])
    | st.sampled_from([letmein.RECORD.size + more for more in (-1, 0, 0, 0, 0, 0, 0, 0, 0, 1)]),
    st.sampled_from([1] * 9 + [3 * letmein.LINES_LIMIT]),  # how many of these
)


@examples(100)
@given(
    st.lists(ANY_RECORD, min_size=5, max_size=50), st.sampled_from(sorted(letmein.POLICIES))
)
def test_monitor_survives_any_network_process(
    records: list[tuple[int, int, bytes, bytes, int, int]], policy: str
) -> None:
    """Nothing but whole handshakes changes the firewall, and nothing that can be repeated grows:
    the network process may be anybody's."""
    with lone_monitor(monitor_text(policy)) as monitor:
        last = bytes(56)
        for kind, protocol, way, payload, size, times in records:
            if payload == b"echo":  # the server's own token, as if it were the answer to it
                payload = last[:4] + RESPONSE.to_bytes(4, "big") + last[8:]
            data = (bytes([kind, protocol]) + way + payload).ljust(size, b"\0")[:size]
            good = size == letmein.RECORD.size
            if kind not in (letmein.READY, letmein.COUNTS):
                good = good and kind in (letmein.FIRST, letmein.SECOND)
                good = good and protocol in (letmein.TCP, letmein.UDP)
                good = good and payload[:7] == letmein.MAGIC + bytes(3) and payload[7] < 6
            for _ in range(times):
                replies = monitor.hand(data)
                assert (monitor.network.link is not None) == good
                assert len(replies) <= good
                for reply in replies:
                    assert letmein.RECORD.pack(*reply)[1:-56] == data[1:-56], "it goes back"
                    assert reply.kind in (letmein.REPLY, letmein.LAST)
                    last = reply.payload
                    if any(last):
                        assert Message.decode(last).operation in (CHALLENGE, GOAWAY)
                assert not monitor.firewall.changes and not monitor.judge.tokens.spent
                if monitor.network.link is None:
                    monitor.theirs.close()
                    monitor.writer.close()
                    monitor.connect()
        assert not {"granted", "revoked", "failed"} & set(monitor.log.counts)
        log = monitor.log
        lines = [line for line in log.lines if line["event"] == "refused"]
        assert len(lines) <= 2 * letmein.LINES_LIMIT
        for counter in (log.counts, log.refusals, log.frequent, log.left_out):
            assert len(counter) < 20, counter


class Conf(NamedTuple):
    """What the model's configurations differ in; "" for a key or resource that is not there."""

    policy: str = "basic-auth"
    timeout: float = 5
    port: int = 5800  # the control port
    keys: tuple[str, str] = (KEYS[1].hex(), KEYS[2].hex())  # of user 1 and 2
    open_to_all: str = "port: 22"  # resource 22
    of_user_1: str = "port: 26 / users: 1"  # resource 26

    def text(self) -> str:
        keys = [f"{user} = {key}" for user, key in enumerate(self.keys, 1) if key]
        resources = {"22": self.open_to_all, "26": self.of_user_1, "58": "port: 5800"}
        lines = [f"{name} = {text}" for name, text in resources.items() if text]
        return "\n".join([
            "[GENERAL]", f"control-error-policy = {self.policy}",
            f"control-timeout = {self.timeout}", f"port = {self.port} / tcp, udp",
            "[KEYS]", *keys, "[RESOURCES]", *lines, server_text("NFTABLES"),
        ])  # fmt: skip

    def key(self, user: int) -> bytes:
        return bytes.fromhex(self.keys[user - 1]) if user in (1, 2) else b""

    def resource(self, resource: int) -> str:
        return {0x22: self.open_to_all, 0x26: self.of_user_1, 0x58: "port: 5800"}.get(resource, "")

    def refuses(self, user: int, resource: int) -> bool:
        text = self.resource(resource)
        port = text.split(" / ")[0]
        closed = port in ("", f"port: {self.port}")
        return closed or ("users" in text and f"users: {user}" not in text)


class From(NamedTuple):
    """Where a message comes from. Over TCP, connection is the connection's number."""

    protocol: int
    connection: int
    name: tuple[Any, ...]  # as socket.accept() has it

    def record(self, kind: int, data: bytes) -> letmein.Record:
        name = letmein.split_name(self.name)
        return letmein.Record(kind, self.protocol, self.connection, *name, data)

    def address(self) -> str:
        return str(self.name[0])


FROM = st.sampled_from(
    [
        From(letmein.UDP, 1, ("10.0.0.1", 1000)),
        From(letmein.TCP, 1, ("10.0.0.1", 1000)),
        From(letmein.TCP, 2, ("10.0.0.1", 1000)),
        From(letmein.UDP, 1, ("10.0.0.1", 1001)),
        From(letmein.UDP, 1, ("10.0.0.2", 1000)),
        From(letmein.UDP, 2, ("10.0.0.1", 1000)),
        From(letmein.UDP, 1, ("fe80::1", 1000, 0, 1)),
        From(letmein.UDP, 1, ("fe80::1", 1000, 0, 2)),
        From(letmein.TCP, 3, ("fd01::1", 1000, 0, 0)),
    ]
)

RELOADS: list[tuple[str, Any]] = [
    ("policy", "basic-auth"), ("policy", "always"), ("policy", "full-auth"),
    ("timeout", 0.5), ("timeout", 5), ("timeout", 7.5), ("timeout", 60), ("timeout", 3600),
    ("port", 5800), ("port", 22),
    ("keys", (KEYS[1].hex(), KEYS[2].hex())), ("keys", (KEYS[1].hex(), KEYS[1].hex())),
    ("keys", (KEYS[2].hex(), KEYS[1].hex())), ("keys", (OTHER_KEY.hex(), KEYS[2].hex())),
    ("keys", ("", KEYS[2].hex())),
    ("open_to_all", "port: 22"), ("open_to_all", "port: 23"), ("open_to_all", ""),
    ("open_to_all", "port: 22 / timeout: 7"), ("of_user_1", "port: 26"),
    ("of_user_1", "port: 26 / users: 1"), ("of_user_1", "port: 26 / users: 2"),
]  # fmt: skip
PICK = st.sampled_from([0] * 8 + [1, 1, 1, 2, 3, 4, 5, 6])  # the latest, the one before it, ...
USERS_OF_MODEL = st.sampled_from([1] * 4 + [2, 2, 3])
RESOURCES_OF_MODEL = st.sampled_from([0x22] * 4 + [0x26] * 4 + [0x58, 0x99])
WRONG = st.sampled_from([""] * 7 + ["peer", "key", "ids"])


class Challenged(NamedTuple):
    """A CHALLENGE that was sent, and all that it was good for."""

    token: bytes
    operation: int
    facts: tuple[object, ...]
    peer: From
    user: int
    resource: int
    at: float
    place: tuple[object, ...]  # what tokens of the same facts and window are counted by


NEVER_ANSWERED = -1  # what a peer has proved who says what only a server says


class Sent(NamedTuple):
    """A RESPONSE, as the monitor got it."""

    peer: From
    kind: int
    data: bytes


class ServerModel(RuleBasedStateMachine):
    """The server's side of all handshakes, beside a model that says what each message must lead
    to: which reply, and which change of the firewall."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.patch = pytest.MonkeyPatch()
        clock = SimpleNamespace(
            monotonic=lambda: self.now, strftime=time.strftime, time=time.time
        )
        self.patch.setattr(letmein, "time", clock)
        self.patch.setattr(letmein, "SPENT_LIMIT", 4)
        self.conf = Conf()
        self.shortest = self.conf.timeout
        self.monitor = LoneMonitor(parse(self.conf.text()))
        self.challenges: list[Challenged] = []
        self.windows: dict[tuple[object, ...], bytes] = {}  # tokens, by all they depend on
        self.met: dict[tuple[object, ...], list[bytes]] = {}  # tokens that were met, by the same
        self.responses: list[Sent] = []
        self.answers: dict[bytes, int] = {}  # by token that was met: COMEIN or GOAWAY

    def teardown(self) -> None:
        self.monitor.close()
        self.patch.undo()

    # -- what happens --------------------------------------------------------

    @rule(
        peer=FROM,
        operation=st.sampled_from([KNOCK, REVOKE]),
        user=USERS_OF_MODEL,
        resource=RESOURCES_OF_MODEL,
        right_key=st.sampled_from([True] * 7 + [False]),
    )
    def request(
        self, peer: From, operation: int, user: int, resource: int, right_key: bool
    ) -> None:
        key = (self.conf.key(user) if right_key else b"") or bytes(32)
        self.send(peer, letmein.FIRST, sealed(operation, NO_TOKEN, key, user, resource))

    @precondition(lambda self: self.challenges)
    @rule(pick=PICK, wrong=WRONG, peer=FROM, other=PICK)
    def respond(self, pick: int, wrong: str, peer: From, other: int) -> None:
        """Answer a CHALLENGE, rightly or not."""
        challenge = self.latest(self.challenges, pick)
        user, resource = challenge.user, challenge.resource
        key = self.conf.key(3 - user if wrong == "key" else user) or bytes(32)
        if wrong == "ids":
            user, resource = self.latest(self.challenges, other)[4:6]
        peer = peer if wrong == "peer" else challenge.peer
        self.answer(peer, sealed(RESPONSE, challenge.token, key, user, resource))

    @rule(
        peer=FROM,
        operation=st.sampled_from([KNOCK, REVOKE]),
        resource=st.sampled_from([0x22, 0x26]),
        seconds=st.sampled_from([0, 0, 0, 4.9, 9.9]),
        change=st.sampled_from([None] * len(RELOADS) + RELOADS),
    )
    def handshake(
        self,
        peer: From,
        operation: int,
        resource: int,
        seconds: float,
        change: tuple[str, Any] | None,
    ) -> None:
        """A client that does all as it should; meanwhile the configuration may change."""
        before = len(self.challenges)
        self.request(peer, operation, 1, resource, True)
        self.now += seconds
        if change:
            self.reload(change)
        if len(self.challenges) > before:
            self.respond(0, "", peer, 0)

    @precondition(lambda self: self.responses)
    @rule(pick=PICK, peer=st.none() | FROM)
    def replay(self, pick: int, peer: From | None) -> None:
        """A RESPONSE comes again, from its sender or from somebody else."""
        sent = self.latest(self.responses, pick)
        self.answer(peer or sent.peer, sent.data)

    @rule(
        peer=FROM,
        kind=st.sampled_from([letmein.FIRST, letmein.SECOND]),
        operation=st.integers(0, 5),
        user=USERS_OF_MODEL,
        resource=RESOURCES_OF_MODEL,
        token=st.none() | PICK,
    )
    def anything(
        self, peer: From, kind: int, operation: int, user: int, resource: int, token: int | None
    ) -> None:
        """The holder of a key says what is not due."""
        there = token is not None and self.challenges
        text = self.latest(self.challenges, token or 0).token if there else NO_TOKEN
        key = self.conf.key(user) or bytes(32)
        self.send(peer, kind, sealed(operation, text, key, user, resource))

    @rule(seconds=st.sampled_from([0.1, 0.1, 1, 1, 2.5, 4.9, 5, 5.1, 10, 14.9, 20, 60, 69.9, 75]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(change=st.sampled_from(RELOADS))
    def reload(self, change: tuple[str, Any]) -> None:
        self.conf = self.conf._replace(**{change[0]: change[1]})
        self.shortest = min(self.shortest, self.conf.timeout)
        self.monitor.judge.reconfigure(parse(self.conf.text()))

    @rule(problem=st.sampled_from(["", "", "the kernel objects"]))
    def firewall(self, problem: str) -> None:
        """From now on the firewall does what it is asked for, or does not."""
        self.monitor.firewall.problem = problem

    # -- what must follow ----------------------------------------------------

    @staticmethod
    def latest(items: list[Any], pick: int) -> Any:
        return items[-1 - pick % len(items)]

    def facts(self, peer: From, user: int, resource: int) -> tuple[object, ...]:
        """What a challenge is bound to: the peer and its request, as configured."""
        return peer, user, resource, self.conf.key(user), self.conf.resource(resource)

    def answer(self, peer: From, data: bytes) -> None:
        """Send a RESPONSE as the network process would, which knows who has asked over TCP."""
        self.send(peer, letmein.SECOND if peer.protocol == letmein.TCP else letmein.FIRST, data)

    def send(self, peer: From, kind: int, data: bytes) -> None:
        message = Message.decode(data)
        udp = peer.protocol == letmein.UDP
        if kind == letmein.SECOND or (udp and message.operation == RESPONSE):
            self.expect_answer(Sent(peer, kind, data), message)
        else:
            self.expect_request(Sent(peer, kind, data), message)

    def hand(self, sent: Sent) -> tuple[list[letmein.Record], list[tuple[int, str, int]]]:
        """What a message leads to: records, which go back the way it came, and changes."""
        before = len(self.monitor.firewall.changes)
        self.monitor.log.lines.clear()
        record = sent.peer.record(sent.kind, sent.data)
        replies = self.monitor.hand(letmein.RECORD.pack(*record))
        for back in replies:
            assert back._replace(kind=0, payload=b"") == record._replace(kind=0, payload=b"")
        return replies, self.monitor.firewall.changes[before:]

    def is_refusal(
        self,
        sent: Sent,
        proved: int,
        ids: tuple[int, int],
        replies: list[letmein.Record],
        changes: list[tuple[int, str, int]],
    ) -> bool:
        """GOAWAY for those who have proved enough, else silence."""
        kinds = [reply.kind for reply in replies]
        if changes or kinds not in ([], [letmein.LAST]):
            return False
        if proved >= letmein.POLICIES[self.conf.policy]:
            payloads = [reply.payload for reply in replies if any(reply.payload)]
            return [Message.decode(data)[:3] for data in payloads] == [(GOAWAY, *ids)]
        closes = sent.peer.protocol == letmein.TCP
        return [reply.payload for reply in replies] == ([bytes(56)] if closes else [])

    def expect_refusal(self, sent: Sent, proved: int, ids: tuple[int, int]) -> None:
        result = self.hand(sent)
        assert self.is_refusal(sent, proved, ids, *result), result

    def expect_request(self, sent: Sent, message: Message) -> None:
        operation, user, resource = message[:3]
        key = self.conf.key(user)
        if operation not in (KNOCK, REVOKE):
            proved = letmein.NO_AUTH if operation == RESPONSE else NEVER_ANSWERED
            return self.expect_refusal(sent, proved, NOBODY)
        if not key or not message.proves(key, NO_TOKEN):
            return self.expect_refusal(sent, letmein.NO_AUTH, (user, resource))
        if self.conf.refuses(user, resource):
            return self.expect_refusal(sent, letmein.BASIC_AUTH, (user, resource))
        (reply,), changes = self.hand(sent)
        challenge = Message.decode(reply.payload)
        assert reply.kind == letmein.REPLY and not changes
        assert challenge[:3] == (CHALLENGE, user, resource)
        facts = self.facts(sent.peer, user, resource)
        place = (facts, operation, int(self.now / letmein.TOKEN_WINDOW_S))
        name = (*place, len(self.met.get(place, [])))
        if name in self.windows:
            assert challenge.auth == self.windows[name], "a repeated request gets the same token"
        else:
            assert challenge.auth not in self.windows.values(), "a token is for one request alone"
            self.windows[name] = challenge.auth
        self.challenges.append(Challenged(
            challenge.auth, operation, facts, sent.peer, user, resource, self.now, place
        ))  # fmt: skip

    def expect_answer(self, sent: Sent, message: Message) -> None:
        udp = sent.peer.protocol == letmein.UDP
        proved = letmein.NO_AUTH if udp else letmein.BASIC_AUTH
        ids = message.user, message.resource
        key = self.conf.key(message.user)
        facts = self.facts(sent.peer, *ids)
        answers = [c for c in self.challenges if c.facts == facts and message.proves(key, c.token)]
        # A token lives as long as a client is given time, and some more, as windows do.
        patience = min(self.conf.timeout, letmein.TOKEN_LIMIT_S)
        latest = patience + 2 * letmein.TOKEN_WINDOW_S
        age = self.now - max((c.at for c in answers), default=0)
        if message.operation in (CHALLENGE, COMEIN, GOAWAY):
            return self.expect_refusal(sent, NEVER_ANSWERED, ids)
        if message.operation != RESPONSE or not key or not answers or age > latest:
            return self.expect_refusal(sent, proved, ids)
        replies, changes = self.hand(sent)
        is_refused = self.is_refusal(sent, proved, ids, replies, changes)
        challenge = answers[-1]
        met = self.met.setdefault(challenge.place, [])
        is_old = int(challenge.at / 5) < int(self.now / 5) - 1 and len(self.answers) > 4
        # A token that was dead while control-timeout was shorter stays so.
        was_dead = age > self.shortest
        if is_refused and (age > patience or was_dead or is_old):
            return  # too late, or more answers are remembered than there is room for
        if challenge.token in met[:-1]:
            assert is_refused, "a later challenge has taken its place"
        elif self.conf.refuses(*ids):
            assert self.is_refusal(sent, letmein.FULL_AUTH, ids, replies, changes)
        else:
            self.expect_grant(sent, challenge, replies, changes)

    def expect_grant(
        self,
        sent: Sent,
        challenge: Challenged,
        replies: list[letmein.Record],
        changes: list[tuple[int, str, int]],
    ) -> None:
        """A token is good for one change; a RESPONSE that comes again gets the same answer."""
        ids = challenge.user, challenge.resource
        if challenge.token not in self.answers:
            assert changes == [(challenge.operation, sent.peer.address(), challenge.resource)]
            problem = self.monitor.firewall.problem
            self.answers[challenge.token] = GOAWAY if problem else COMEIN
            self.met[challenge.place].append(challenge.token)
            self.responses.append(sent)
            event = {KNOCK: "granted", REVOKE: "revoked"}[challenge.operation]
            for line in self.monitor.log.lines:
                assert line["event"] == ("failed" if problem else event)
        else:
            assert not changes, "what was done is not done again"
        (reply,) = replies
        assert reply == sent.peer.record(letmein.LAST, reply.payload)
        last = Message.decode(reply.payload)
        assert last[:3] == (self.answers[challenge.token], *ids)
        assert last.auth == NO_TOKEN

    @invariant()
    def the_network_process_is_not_blamed(self) -> None:
        assert self.monitor.network.link is not None


ServerModel.TestCase.settings = settings(examples(60), stateful_step_count=40)
TestServerModel = ServerModel.TestCase


def test_a_longer_control_timeout_brings_no_response_back() -> None:
    """A RESPONSE that was forgotten when its token had died must not be good again."""
    first, second = (From(letmein.UDP, 1, (f"10.0.0.{number}", 1000)) for number in (1, 2))
    model = ServerModel()
    try:
        model.handshake(first, KNOCK, 0x22, 0, None)
        model.wait(15.1)
        model.handshake(second, KNOCK, 0x22, 0, None)
        model.reload(("timeout", 60))
        model.replay(1, None)
    finally:
        model.teardown()


def test_what_comes_before_the_firewall_is_open_waits_for_it() -> None:
    """No peer is answered behind a READY until the predecessor's leases were adopted."""
    with lone_monitor(monitor_text("basic-auth")) as monitor:
        monitor.network.is_ready = monitor.network.is_serving = False
        knock = letmein.signed(KNOCK, USER, RESOURCE, KEY, letmein.NO_TOKEN)
        monitor.writer.write(letmein.RECORD.pack(*letmein.Record(letmein.READY)))
        monitor.writer.write(letmein.RECORD.pack(*letmein.Record(letmein.FIRST, payload=knock)))
        monitor.network._on_pipe()
        assert monitor.network.is_ready and monitor.said() == []
        monitor.network.is_serving = True
        monitor.network._on_pipe()
        (reply,) = monitor.said()
        assert Message.decode(reply.payload).operation == CHALLENGE


NAMED_CONF = server_conf("30 = jump / input: WEB")

FAULTS_OF_THE_FIREWALL = [
    pytest.param(
        ("table = filter", "table = filtr"),
        "[NFTABLES] table: table inet filtr does not exist",
        "load your firewall first",
        id="table",
    ),
    pytest.param(
        ("LETMEIN-INPUT", "LETMEIN-INPT"),
        "[NFTABLES] chain-input: table inet filter has no chain LETMEIN-INPT",
        "add `chain LETMEIN-INPT { }` to the table",
        id="chain",
    ),
    pytest.param(
        ("input: WEB", "input: WEP"),
        "[RESOURCES] 00000030: input: table inet filter has no chain WEP",
        "add `chain WEP { }` to the table",
        id="jump",
    ),
    pytest.param(
        ("input: WEB", "input: input"),
        "[RESOURCES] 00000030: input: input is a base chain: it has a hook",
        "name a chain without a hook",
        id="jump to a base chain",
    ),
]
DROPS = "drops all knocks, whatever letmein accepts; "

# Rules of others, and what --check says of them, "" for nothing. Those that are not a whole
# firewall stand next to nftables.conf.
INPUT = "type filter hook input priority"

FIREWALLD = f"""
table inet firewalld {{
    chain filter_INPUT {{
        {INPUT} filter + 10; policy accept;
        ct state {{ established, related }} accept
        iifname "lo" accept
        jump filter_INPUT_ZONES
        reject with icmpx admin-prohibited
    }}
    chain filter_INPUT_ZONES {{ goto filter_IN_public; }}
    chain filter_IN_public {{ tcp dport PORT accept; }}
}}"""

UFW = f"""
table ip filter {{
    chain INPUT {{ {INPUT} filter; policy drop; jump ufw-before-input; jump ufw-user-input; }}
    chain ufw-before-input {{ iifname "lo" accept; ct state established accept; }}
    chain ufw-user-input {{ tcp dport PORT accept; }}
}}"""

DOCKER = """
table ip nat {
    chain PREROUTING { type nat hook prerouting priority dstnat; fib daddr type local jump DOCKER; }
    chain DOCKER { tcp dport 8080 dnat to 172.17.0.2:80; }
}
table ip filter {
    chain FORWARD { type filter hook forward priority filter; policy drop; jump DOCKER-USER; }
    chain DOCKER-USER { return; }
}"""

FAIL2BAN = f"""
table inet f2b-table {{
    set addr-set-sshd {{ type ipv4_addr; elements = {{ 192.0.2.1 }}; }}
    chain f2b-chain {{ {INPUT} filter - 1; policy accept; ip saddr @addr-set-sshd reject; }}
}}"""


def own_rules(rules: str) -> str:
    """A firewall of letmein's table alone, with these rules in its input chain."""
    chain = f"chain input {{ {INPUT} filter; policy drop; {rules}; }}"
    return f"table inet filter {{ chain LETMEIN-INPUT {{ }}; {chain}; }}"


def other_rules(rules: str) -> str:
    """Another table, which drops what these rules do not accept."""
    return f"table inet other {{ chain in {{ {INPUT} 1; policy drop; {rules}; }}; }}"


LET_IT = "let it accept the control port, and the ports of your resources: "
OTHER_DROPS = f"chain in of table inet other {DROPS}{LET_IT}nft insert rule inet other in tcp "
BEHIND = "the jump to LETMEIN-INPUT is behind a rule of input that drops everything; move the jump"

FOREIGN_RULES = {
    "nftables.conf": ("", ""),
    "Docker": (DOCKER, ""),
    "fail2ban": (FAIL2BAN, ""),
    "firewalld": (
        FIREWALLD.replace("PORT", "22"),
        f"chain filter_INPUT of table inet firewalld {DROPS}{LET_IT}firewall-cmd --permanent ",
    ),
    "firewalld that accepts": (FIREWALLD.replace("PORT", "5800"), ""),
    "ufw": (UFW.replace("PORT", "22"), f"chain INPUT of table ip filter {DROPS}"),
    "ufw that accepts": (UFW.replace("PORT", "5800"), ""),
    "ufw, IPv6": (UFW.replace("PORT", "22").replace("ip f", "ip6 f"), f"{LET_IT}ufw allow 5800/t"),
    "a policy": (other_rules("tcp dport 22 accept"), OTHER_DROPS),
    "another set": (other_rules("tcp dport { 80, 5000-5799, 5801-6000 } accept"), OTHER_DROPS),
    "a source port": (other_rules("tcp sport 5800 accept"), OTHER_DROPS),
    "a set": (other_rules("tcp dport { 80, 5800 } accept"), ""),
    "a set of ranges": (other_rules("tcp dport { 80, 5700-5900 } accept"), ""),
    "a map": (other_rules("tcp dport vmap { 80 : drop, 5800 : accept }"), ""),
    "a range": (other_rules("tcp dport 5000-6000 accept"), ""),
    "no condition": (other_rules("counter accept"), ""),
    "a drop in front": (own_rules("counter drop; jump LETMEIN-INPUT"), BEHIND),
    "a reject in front": (own_rules("log reject; jump LETMEIN-INPUT"), BEHIND),
    "a drop behind": (own_rules("tcp dport 80 drop; jump LETMEIN-INPUT; drop"), ""),
    "one jump of two": (
        own_rules("meta l4proto tcp jump LETMEIN-INPUT; drop; jump LETMEIN-INPUT"), ""
    ),
    "a jump by a map": (own_rules("meta l4proto vmap { tcp : jump LETMEIN-INPUT }"), ""),
}


class TestStart:
    def fails(self, lab: Lab, *words: str, conf: str = "", user: str = "none", **more: Any) -> None:
        """The server does not start, says why and what to do, and has installed nothing."""
        before = lab.ruleset()
        path = lab.file(conf or server_conf())
        program = (*more.get("launcher", ()), sys.executable, LETMEIN)
        arguments = ("server", "-c", path, "--rundir", lab.directory, "--user", user)
        result = lab.command(*arguments, *more.get("more_words", ()), program=program)
        result.assert_error(*words)
        lines = result.err.splitlines()
        (at,) = (n for n, line in enumerate(lines) if line.startswith("letmein: error: "))
        assert len(lines) > at + 1, f"no hint: {result.err}"
        assert lines[at + 1].startswith("  "), result
        assert lab.ruleset() == before

    def test_no_nft(self, lab: Lab) -> None:
        """An nft that is missing or no program is named."""
        lab.load()
        for exe in ("/nowhere/nft", "no-such-nft", "/etc/passwd"):
            self.fails(lab, exe, conf=server_conf(nftables=f"exe = {exe}"))

    @pytest.mark.parametrize("more", [[], ["--check"]])
    def test_a_python_without_memory_files(self, lab: Lab, more: list[str]) -> None:
        """One that is built for a glibc before 2.27 is named."""
        lab.load()
        words = patched(lab, "import os; del os.memfd_create", "server", "--user", "none", *more)
        lab.command(program=words).assert_error("no memfd_create", "/usr/bin/python3")

    def test_no_run_directory(self, lab: Lab) -> None:
        """Each thing that can be wrong with it has its own words."""
        lab.load()
        conf, file = lab.file(server_conf()), lab.file("")
        words = ("server", "-c", conf, "--user", "none", "--rundir")
        for place in (lab.directory / "missing", file):
            said = (f"there is no run directory {place}", "mkdir")
            lab.command(*words, place).assert_error(*said)
            lab.command(*words, place, "--check").assert_error(*said)
        with Server(lab, server_conf()) as server:
            said = ("a server for the table inet filter runs already", "stop that one first")
            lab.command(*words, server.rundir).assert_error(*said)

    @pytest.mark.parametrize("mode", [0o1777, 0o775, 0o757])
    def test_a_run_directory_that_others_may_write_to(self, lab: Lab, mode: int) -> None:
        """They could hold the lock, or answer `status`: neither the server nor `status` uses it."""
        lab.load()
        place = Path(tempfile.mkdtemp(dir=lab.directory))
        place.chmod(mode)
        for words in (("server", "--user", "none"), ("status",)):
            result = lab.command(*words, "-c", lab.file(server_conf()), "--rundir", place)
            result.assert_error(f"others may write to the run directory {place}", "mkdir -m 755")
        assert not list(place.iterdir())

    @pytest.mark.parametrize("command", ["server", "status"])
    def test_a_run_directory_that_another_user_owns(self, lab: Lab, command: str) -> None:
        """Its owner could do all that, whatever its mode."""
        if not lab.real_root:
            pytest.skip("only real root can give a directory to another user")
        lab.load()
        place = Path(tempfile.mkdtemp(dir=lab.directory))
        place.chmod(0o755)
        os.chown(place, 65534, 65534)
        result = lab.command(command, "-c", lab.file(server_conf()), "--rundir", place)
        result.assert_error(f"others may write to the run directory {place}", "mkdir -m 755")

    def test_no_place_for_the_status_socket(self, lab: Lab) -> None:
        """Its path is named, and nothing is installed."""
        lab.load()
        place = Path(tempfile.mkdtemp(dir=lab.directory)) / ("d" * 80)
        place.mkdir()
        words = ("server", "--user", "none", "-c", lab.file(server_conf()), "--rundir", place)
        result = lab.command(*words)
        result.assert_error(f"cannot make the socket {place}/letmeind-", ".status: ", "--rundir")
        assert "letmein" not in lab.ruleset()

    def test_a_run_directory_of_somebody_else(self, lab: Lab) -> None:
        """Who may not write there is told so, and not that a server may run."""
        need_root(lab)
        lab.load()
        program = ("setpriv", "--reuid", "65534", "--clear-groups", "--bounding-set", "-all")
        conf = lab.file(server_conf(), mode=0o644)
        text = LETMEIN.read_text(encoding="utf-8")
        python = ("/usr/bin/python3", lab.file(text, mode=0o644))
        if not os.access(python[0], os.X_OK):
            pytest.skip("nobody has no Python")
        words = ("server", "-c", conf, "--user", "none", "--rundir", lab.directory)
        result = lab.command(*words, program=(*program, *python))
        result.assert_error("Permission denied", "start the server as root")
        assert "run already" not in result.err

    def test_no_table(self, lab: Lab) -> None:
        """A missing table is named."""
        lab.load("table ip filter { chain LETMEIN-INPUT { }; }")
        self.fails(lab, "inet filter")

    @pytest.mark.parametrize("option", ["input", "forward", "output"])
    def test_no_chain(self, lab: Lab, option: str) -> None:
        """A missing chain is named."""
        lab.load("table inet filter { chain LETMEIN-OTHER { }; }")
        there = {"input": "", "forward": "", "output": ""}
        if option != "input":
            lab.load()
            there[option] = f"chain-{option} = MISSING"
            self.fails(lab, "MISSING", conf=server_conf(nftables=there[option]))
        else:
            self.fails(lab, "LETMEIN-INPUT")

    @pytest.mark.parametrize("check", [False, True])
    def test_a_base_chain(self, lab: Lab, check: bool) -> None:
        """A chain with a hook is the administrator's: its rules are not flushed, not even by a
        server that could work with it."""
        base = "type filter hook input priority filter; policy drop; tcp dport 443 accept"
        lab.load(f"table inet filter {{ chain input {{ {base}; }}; }}")
        conf = server_conf().replace("LETMEIN-INPUT", "input")
        more = ("--check",) if check else ()
        self.fails(lab, "chain-input", "input is a base chain", conf=conf, more_words=more)

    @pytest.mark.parametrize("check", [False, True])
    def test_a_chain_with_rules_of_others(self, lab: Lab, check: bool) -> None:
        """They are not flushed either."""
        lab.load(more="add rule inet filter LETMEIN-INPUT tcp dport 443 accept")
        more = ("--check",) if check else ()
        self.fails(lab, "LETMEIN-INPUT holds rules that are not", more_words=more)

    def test_a_chain_that_nothing_jumps_to(self, lab: Lab) -> None:
        """The server works, and says that its rules have no effect, and what to do about it; it
        says nothing where some chain jumps there."""
        lab.load("table inet filter { chain LETMEIN-INPUT { }; chain input { }; }")
        path = lab.file(server_conf())
        words = ("server", "-c", path, "--check", "--user", "nobody")
        warning = "nothing jumps to LETMEIN-INPUT"
        checked = lab.command(*words)
        assert checked.status == 0 and warning in checked.err
        assert "nft insert rule inet filter input jump LETMEIN-INPUT" in checked.err
        with Server(lab, server_conf()) as server:
            assert warning in server.log
            nft_do("add rule inet filter input jump LETMEIN-INPUT")
            reconfigure(server, server_conf())
            assert server.log.count(warning) == 1
        assert warning not in lab.command(*words).err

    @pytest.mark.parametrize("case", FOREIGN_RULES)
    def test_rules_of_others(self, lab: Lab, case: str) -> None:
        """--check warns of rules that drop all knocks, names the chain and what to do; it does not
        warn of rules that leave them alone."""
        ruleset, said = FOREIGN_RULES[case]
        if "table inet filter" in ruleset:
            lab.load(ruleset)
        else:
            lab.load(more=ruleset)
        checked = lab.command("server", "-c", lab.file(server_conf()), *CHECK)
        assert checked.status == 0, checked
        assert not said or said in checked.err, checked
        ours = [line for line in checked.err.splitlines() if "[RESOURCES]" not in line]
        assert len(ours) == bool(said), checked

    def test_rules_of_iptables(self, lab: Lab) -> None:
        """What iptables makes of its rules is understood as well."""
        lab.load()
        if not shutil.which("iptables-nft"):
            pytest.skip("iptables-nft is not in PATH")
        said = "chain INPUT of table ip filter drops all knocks, whatever letmein accepts; "
        said += "let it accept the control port, and the ports of your resources: "
        said += "iptables -I INPUT -p tcp --dport 5800 -j ACCEPT"
        rule = ("iptables-nft", "-A", "INPUT")
        run(*rule, "-p", "tcp", "--dport", "80", "-j", "ACCEPT")
        run(*rule, "-j", "REJECT")
        check = ("server", "-c", lab.file(server_conf()), *CHECK)
        assert said in lab.command(*check).err
        for match in ("--dport 5800", "--dport 5000:6000", "-m multiport --dports 1,5800"):
            run("iptables-nft", "-I", "INPUT", "-p", "tcp", *match.split(), "-j", "ACCEPT")
            assert "drops all knocks" not in lab.command(*check).err, match
            run("iptables-nft", "-D", "INPUT", "1")
        assert said in lab.command(*check).err
        nft_do("delete table ip filter")

    @pytest.mark.parametrize("change, said, hint", FAULTS_OF_THE_FIREWALL)
    def test_each_fault_of_the_firewall_has_its_words(
        self, lab: Lab, change: tuple[str, str], said: str, hint: str
    ) -> None:
        """File, option, value and what to do."""
        lab.load(more="add chain inet filter WEB")
        assert change[0] in NAMED_CONF
        path = lab.file(NAMED_CONF.replace(*change))
        done = lab.command("server", "-c", path, *CHECK)
        done.assert_error(f"error: {path}: {said}\n", f"\n  {hint}")

    def test_what_the_rust_server_has_left(self, lab: Lab) -> None:
        """Its rules go when this one takes over."""
        rule = 'tcp dport 22 accept comment "10.1.0.2/port/22/TCP/accept/LETMEIN"'
        lab.load(more=f"add rule inet filter LETMEIN-INPUT {rule}")
        with Server(lab, server_conf()):
            assert "/LETMEIN" not in lab.ruleset()
            assert not lab.reaches(22, CLIENT_4)

    @pytest.mark.parametrize("family, version", [("ip", "4"), ("ip6", "6")])
    def test_a_table_of_iptables(self, lab: Lab, family: str, version: str) -> None:
        """iptables-save would write our rules without their sets, and restore them as rules that
        accept everything: so the server does not work in a table of iptables."""
        base = "type filter hook input priority filter; policy drop; jump LETMEIN-INPUT"
        lab.load(
            f"table {family} filter {{ chain LETMEIN-INPUT {{ }}; chain INPUT {{ {base}; }}; }}"
        )
        conf = server_conf(family=family)
        self.fails(lab, f"table {family} filter belongs to iptables", conf=conf)

    @pytest.mark.parametrize("table, told", [("filter", True), ("mangle", True), ("own", False)])
    def test_a_table_that_iptables_may_take(self, lab: Lab, table: str, told: bool) -> None:
        """Whoever gives the table the name of one of iptables' is told before iptables comes."""
        lab.load(f"table ip {table} {{ chain LETMEIN-INPUT {{ }}; }}")
        conf = server_conf(family="ip").replace("table = filter", f"table = {table}")
        checked = lab.command("server", "--check", "--user", "none", "-c", lab.file(conf))
        assert checked.status == 0, checked
        assert (f"table: iptables uses ip {table}, too" in checked.err) == told, checked

    def test_a_table_that_another_program_owns(self, lab: Lab) -> None:
        """As firewalld's may be: nobody else can change it."""
        lab.load("")
        owned = "add table inet filter { flags owner; }; add chain inet filter LETMEIN-INPUT\n"
        # Only as long as its owner lives: nft -i keeps its socket open.
        command = [NFT, "-i"]
        owner = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        assert owner.stdin is not None
        try:
            owner.stdin.write(owned.replace("; add", "\nadd").encode())
            owner.stdin.flush()
            eventually(lambda: "LETMEIN-INPUT" in lab.ruleset(), "no table")
            self.fails(lab, "belongs to another program")
        finally:
            owner.stdin.close()
            owner.wait(LIMIT_S)

    @pytest.mark.parametrize(
        "kind", ["ipv4_addr; flags timeout", "ipv4_addr . inet_proto . inet_service"]
    )
    def test_a_foreign_set(self, lab: Lab, kind: str) -> None:
        """A set of our name and another type is named."""
        lab.load(more=f"add set inet filter letmein-4 {{ type {kind}; counter; }}")
        self.fails(lab, "inet filter", "letmein-4")

    @pytest.mark.parametrize("protocol", ["tcp", "udp"])
    @pytest.mark.parametrize("address", ["::", "0.0.0.0"])
    def test_control_port_in_use(self, lab: Lab, protocol: str, address: str) -> None:
        """A control port that is taken is named, with its protocol."""
        lab.load()
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
        with socket.socket(family, kind) as occupant:
            # Connections of earlier tests may linger; this does not share the port with a server.
            occupant.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, protocol == "tcp")
            occupant.bind((address, 5800))
            if protocol == "tcp":
                occupant.listen()
            self.fails(lab, "5800", protocol)

    def test_another_server_runs(self, lab: Lab) -> None:
        """A second server changes nothing of the first one's."""
        lab.load()
        with Server(lab, server_conf()):
            assert handshake(lab) == COMEIN
            self.fails(lab)
            assert lab.reaches(22, CLIENT_4)
            assert handshake(lab, operation=REVOKE) == COMEIN

    def test_not_root(self, lab: Lab) -> None:
        """Without root's rights the error says so."""
        lab.load()
        self.fails(lab, "root", launcher=("unshare", "--user", "--"))

    def test_unknown_account(self, lab: Lab) -> None:
        """An unknown account is named."""
        lab.load()
        self.fails(lab, "no-such-account", user="no-such-account")

    def test_no_configuration(self, lab: Lab) -> None:
        """A missing file is named."""
        lab.load()
        result = lab.command("server", "-c", lab.directory / "missing.conf", "--user", "none")
        result.assert_error("missing.conf")


class TestSignalsAtTheStart:
    """Signals that come before the server is ready."""

    @staticmethod
    def wait_until_slow(lab: Lab, server: Server, place: str) -> None:
        if place == "the network process starts":
            mark = lab.directory / "slow"
            eventually(mark.exists, "it does not start")
            mark.unlink()
        else:
            server.wait_for("slow")

    @pytest.mark.parametrize("place", SLOW_PLACES)
    def test_sighup(self, lab: Lab, place: str) -> None:
        """SIGHUP never ends it; a file that was changed is read, but not before the leases of a
        predecessor were adopted: none is lost, and `ready` comes first."""
        lab.load()
        old = server_conf()
        with Server(lab, old) as server:
            assert handshake(lab) == COMEIN
            crash(server)
        words = ("--rundir", str(server.rundir))
        program = slow_at(lab, place)
        with Server(lab, old, *words, program=program, wait=False) as successor:
            self.wait_until_slow(lab, successor, place)
            successor.path.write_text(server_conf(port="5900 / tcp, udp"), encoding="utf-8")
            successor.process.send_signal(signal.SIGHUP)
            successor.wait_for("adopted", leases="1")
            assert successor.wait_for("reloaded")["port"] == "5900/tcp+udp"
            assert re.findall(r"event=(ready|reloaded)", successor.log) == ["ready", "reloaded"]
            assert lab.reaches(22, CLIENT_4), "the lease"

    @pytest.mark.parametrize("place", SLOW_PLACES)
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_an_end(self, lab: Lab, place: str, number: signal.Signals) -> None:
        """SIGTERM and Ctrl-C end it at any time, and nothing of it is left."""
        lab.load()
        before = lab.ruleset()
        server = Server(lab, server_conf(), program=slow_at(lab, place), wait=False)
        with server:
            self.wait_until_slow(lab, server, place)
            server.process.send_signal(number)
            assert server.wait() in (0, -number)
            assert "Traceback" not in server.log, server.log
            assert not server.events("ready"), "it was already about to stop"
        assert lab.ruleset() == before
        for path in server.rundir.iterdir():
            assert path.suffix == ".lock"


class TestSighup:
    def test_more_of_everything(self, lab: Lab, guarded: Server, watched: WatchedNft) -> None:
        """A new resource can be knocked for at once, and no lease is lost."""
        knock_all(lab, *HOLDERS)
        assert attempt(lab, 0x28) != COMEIN
        shut = TRUTH_RESOURCES.replace("27 = port: 27 / timeout: 0", "28 = port: 27 / timeout: 9")
        reconfigure(guarded, watched.conf(shut))
        agree(lab, guarded, *HOLDERS)
        assert attempt(lab, 0x28) == COMEIN
        assert lab.reaches(27, CLIENT_4)
        assert max(milliseconds_left(f"{CLIENT_4} . tcp . 27")) <= 9
        assert attempt(lab, 0x28, REVOKE) == COMEIN
        agree(lab, guarded, *HOLDERS)
        # Nothing changed at all: nothing is lost either.
        reconfigure(guarded, watched.conf(shut))
        agree(lab, guarded, *HOLDERS)
        assert not guarded.events("revoked", reason="configuration")

    def test_keys(self, lab: Lab, guarded: Server, watched: WatchedNft) -> None:
        """A lease belongs to the key it was given for: with a new key for its user it ends."""
        knock_all(lab, *HOLDERS)
        new = bytes(range(32))
        conf = watched.conf().replace(KEYS[1].hex(), new.hex())
        reconfigure(guarded, conf)
        kept = [holder for holder in HOLDERS if holder[2] == 2]
        agree(lab, guarded, *kept)
        assert len(guarded.events("revoked", reason="configuration")) == 3
        assert not lab.reaches(22, CLIENT_4)
        assert attempt(lab, 0x26) is None
        assert attempt(lab, 0x26, key=new) == COMEIN
        assert handshake(lab, 0x22, source=OTHER_4, user=2) == COMEIN
        agree(lab, guarded, *kept, (CLIENT_4, 0x26, 1), (OTHER_4, 0x22, 2))

    def test_users_and_resources_that_are_gone(
        self, lab: Lab, guarded: Server, watched: WatchedNft
    ) -> None:
        """Their leases end at once, and no others."""
        knock_all(lab, *HOLDERS, (OTHER_4, 0x22, 2))
        without = "\n".join(
            line for line in watched.conf().splitlines() if not line.startswith("2 = ")
        )
        reconfigure(guarded, without)
        agree(lab, guarded, HOLDERS[0], HOLDERS[2], HOLDERS[3])
        assert kernel().gates == {}
        assert len(guarded.events("revoked", reason="configuration")) == 3
        assert attempt(lab, user=2) is None
        assert not lab.reaches(23, CLIENT_4)
        assert not lab.reaches(22, OTHER_4)
        assert not lab.reaches(8080, OTHER_4)
        assert lab.reaches(8080, CLIENT_4)
        few = without.replace("22 = port: 22\n", "").replace("40 = jump", "42 = jump")
        reconfigure(guarded, few)
        agree(lab, guarded, HOLDERS[2])
        assert "letmein-00000040" not in lab.ruleset()
        assert not lab.reaches(22, CLIENT_4)
        assert not lab.reaches(8080, CLIENT_4)
        assert lab.reaches(24, CLIENT_6, "udp")
        assert len(guarded.events("revoked", reason="configuration")) == 5

    def test_resources_that_mean_something_else(
        self, lab: Lab, guarded: Server, watched: WatchedNft
    ) -> None:
        """Leases of resources whose meaning has changed end at once, and no others."""
        knock_all(lab, *HOLDERS, (CLIENT_4, 0x26, 1))
        nft_do("add chain inet filter OTHER")
        changed = TRUTH_RESOURCES.replace("23 = port: 23 / tcp, udp", "23 = port: 23")
        changed = changed.replace("22 = port: 22\n", "22 = port: 26 / users: 1\n")
        changed = changed.replace("26 = port: 26 / users: 1", "26 = port: 22 / users: 2")
        changed = changed.replace("40 = jump / input: DOOR", "40 = jump / input: OTHER")
        reconfigure(guarded, watched.conf(changed))
        agree(lab, guarded, HOLDERS[2], HOLDERS[4])
        assert len(guarded.events("revoked", reason="configuration")) == 4
        assert not lab.reaches(22, CLIENT_4)
        assert not lab.reaches(26, CLIENT_4)

    def test_timeouts(self, lab: Lab, guarded: Server, watched: WatchedNft) -> None:
        """A shorter timeout cuts leases that run; a longer one is for the next knock."""
        knock_all(lab, *HOLDERS)
        shorter = TRUTH_RESOURCES.replace("22 = port: 22", "22 = port: 22 / timeout: 5")
        longer = TRUTH_RESOURCES.replace("timeout: 60", "timeout: 900")
        reconfigure(guarded, watched.conf(shorter))
        for row, left in kernel().elements.items():
            assert (left <= 5) == (row.opens == "tcp/22"), row
        # A longer one is for the next knock, not for those who are in.
        reconfigure(guarded, watched.conf(longer))
        assert max(milliseconds_left(f"{CLIENT_4} . tcp . 22")) <= 5
        assert max(milliseconds_left(CLIENT_6)) <= 60
        knock_all(lab, HOLDERS[2])
        assert max(milliseconds_left(CLIENT_6)) > 890

    def test_an_included_file(self, lab: Lab, guarded: Server, watched: WatchedNft) -> None:
        """A reload reads included files, too; if one of them is gone, all stays as it was."""
        directory = Path(tempfile.mkdtemp(dir=lab.directory))
        for user in (1, 2):
            (directory / f"{user}.conf").write_text(f"[KEYS]\n{user} = {KEYS[user].hex()}\n")
        general = f"include = {directory}/*.conf"
        included = watched.conf(general=general).replace(keys_text(), "")
        reconfigure(guarded, included)
        knock_all(lab, (CLIENT_4, 0x22, 1), (OTHER_4, 0x22, 2))
        (directory / "2.conf").rename(directory / "2.conf.off")
        (directory / "1.conf.off").symlink_to("none")
        reconfigure(guarded, included)
        agree(lab, guarded, (CLIENT_4, 0x22, 1))
        assert attempt(lab, user=2) == GOAWAY
        (directory / "1.conf").rename(directory / "0.conf")
        reconfigure(guarded, included.replace("/*.conf", "/1.conf"), good=False)
        assert f"{directory}/1.conf: cannot be read" in guarded.log
        (directory / "0.conf").rename(directory / "1.conf")
        knock_all(lab, (CLIENT_6, 0x22, 1))
        agree(lab, guarded, (CLIENT_4, 0x22, 1), (CLIENT_6, 0x22, 1))

    def test_user_limits(self, lab: Lab, guarded: Server, watched: WatchedNft) -> None:
        """What a user may have at most counts for a knock and for leases that exist; after the last
        day, these end, and a knock is refused with the reason."""
        knock_all(lab, (CLIENT_4, 0x22, 1), (CLIENT_4, 0x24, 2), (OTHER_4, 0x22, 2))
        reconfigure(guarded, watched.conf() + "[USERS]\n1 = timeout: 30\n2 = timeout: 90")
        assert max(milliseconds_left(f"{CLIENT_4} . tcp . 22")) <= 30
        knock_all(lab, (CLIENT_6, 0x22, 1), (CLIENT_4, 0x24, 2), (OTHER_4, 0x22, 2))
        assert 20 < max(milliseconds_left(CLIENT_6)) <= 30
        assert 50 < max(milliseconds_left(f"{CLIENT_4} . udp . 24")) <= 60
        assert 80 < max(milliseconds_left(OTHER_4)) <= 90
        reconfigure(guarded, watched.conf() + "[USERS]\n1 = not-after: 2020-01-01")
        agree(lab, guarded, (CLIENT_4, 0x24, 2), (OTHER_4, 0x22, 2))
        assert len(guarded.events("revoked", reason="configuration")) == 2
        assert attempt(lab) == GOAWAY
        guarded.wait_for("refused", reason="the user's last day was 2020-01-01")

    def test_the_last_day_ends(self, lab: Lab) -> None:
        """A lease ends with its user's last day, and the next knock is refused. (For this server it
        ends 4 s after the file was read.)"""
        lab.load()
        change = ('float((days.days + 1) * UNITS_S["d"])', "time.time() + 4")
        conf = server_conf() + "[USERS]\n1 = not-after: 2027-01-31"
        with Server(lab, conf, program=altered(lab, change)) as server:
            knock_all(lab, (CLIENT_4, 0x22, 1))
            assert float(server.wait_for("granted")["seconds"]) <= 4
            assert max(milliseconds_left(CLIENT_4)) <= 4
            eventually(lambda: not lab.reaches(22, CLIENT_4), "port 22 stays open")
            # The kernel may have ended the lease some milliseconds early.
            eventually(lambda: attempt(lab) == GOAWAY, "the user still gets in")
            assert "the user's last day was " in server.wait_for("refused")["reason"]

    def test_error_policy(self, lab: Lab, guarded: Server, watched: WatchedNft) -> None:
        """A new policy counts at once."""
        for policy, answer in (("always", GOAWAY), ("full-auth", None), ("basic-auth", None)):
            general = f"control-error-policy = {policy}"
            reconfigure(guarded, watched.conf(general=general))
            assert attempt(lab, key=bytes(32)) == answer, policy

    def test_max_nr_rules(self, lab: Lab, guarded: Server, watched: WatchedNft) -> None:
        """A lower limit ends no lease, and refuses new ones."""
        knock_all(lab, *HOLDERS)
        reconfigure(guarded, watched.conf(nftables="max-nr-rules = 2"))
        assert handshake(lab, 0x22, source=OTHER_4) == GOAWAY
        agree(lab, guarded, *HOLDERS)
        reconfigure(guarded, watched.conf())
        assert handshake(lab, 0x22, source=OTHER_4) == COMEIN
        agree(lab, guarded, *HOLDERS, (OTHER_4, 0x22, 1))

    def test_control_port(self, lab: Lab, guarded: Server, watched: WatchedNft) -> None:
        """The new port answers, the old one is shut, and leases stay."""
        knock_all(lab, *HOLDERS)
        for port, other in ((5900, 5800), (5800, 5900), (5900, 5800)):
            reconfigure(guarded, watched.conf(port=f"{port} / tcp, udp"))
            agree(lab, guarded, *HOLDERS)
            eventually(
                lambda port=port: attempt(lab, port=port) == COMEIN,  # type: ignore[misc]
                f"no answer at the new port:\n{guarded.log}",
            )
            assert attempt(lab, port=other) is None
            assert f"tcp dport {other}" not in lab.ruleset()
            assert kernel().rules == TRUTH_RULES
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", other), 5):
                raise AssertionError("the old port is still served")

    def test_protocols(self, lab: Lab, guarded: Server, watched: WatchedNft) -> None:
        """The protocols of the control port change, and leases stay."""
        knock_all(lab, *HOLDERS)
        for protocols in ("tcp", "tcp, udp", "udp", "tcp, udp"):
            reconfigure(guarded, watched.conf(port=f"5800 / {protocols}"))
            agree(lab, guarded, *HOLDERS)
            assert kernel().rules == TRUTH_RULES - (protocols in ("tcp", "udp"))
            for protocol in ("tcp", "udp"):
                control = "-T" if protocol == "tcp" else "-U"
                conf = client_conf(timeout=5 if protocol in protocols else 0.5)
                result = lab.letmein("knock", control, SERVER_4, "22", conf=conf)
                assert (result.status == 0) == (protocol in protocols), (protocols, result)

    def test_a_control_port_that_is_taken(
        self, lab: Lab, guarded: Server, watched: WatchedNft
    ) -> None:
        """The reload fails with the reason, and changes nothing."""
        knock_all(lab, *HOLDERS)
        before = lab.ruleset()
        with socket.socket(socket.AF_INET6) as occupant:
            occupant.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            occupant.bind(("::", 5900))
            occupant.listen()
            few = TRUTH_RESOURCES.replace("22 = port: 22\n", "")
            reconfigure(guarded, watched.conf(few, port="5900"), good=False)
        (event,) = guarded.events("reload-failed")
        assert "5900" in event["reason"], event
        assert event["hint"]
        assert lab.ruleset() == before
        assert handshake(lab, 0x22, source=OTHER_4) == COMEIN
        agree(lab, guarded, *HOLDERS, (OTHER_4, 0x22, 1))

    def test_a_bad_file(self, lab: Lab, guarded: Server, watched: WatchedNft) -> None:
        """It is refused with its line, and everything goes on as before."""
        knock_all(lab, *HOLDERS)
        before = lab.ruleset()
        good = watched.conf()
        bad = [
            (good.replace("22 = port: 22", "22 = port: x"), "22 = port: x"),
            (good.replace(KEYS[2].hex(), "00"), "2 = 00"),
            (good + "\n[NONSENSE\n", "[NONSENSE"),
        ]
        for conf, line in bad:
            count = len(guarded.events("reload-failed"))
            reconfigure(guarded, conf, good=False)
            event = guarded.wait_for("reload-failed", count + 1)
            number = conf.split("\n").index(line) + 1
            assert f"{guarded.path}:{number}:" in event["reason"], event
            assert lab.ruleset() == before
        reconfigure(guarded, good.replace("table = filter", "tabel = filter"), good=False)
        warnings = [event["reason"] for event in guarded.events("warning")]
        assert any("tabel" in warning for warning in warnings), "it tells why"
        guarded.path.unlink()
        guarded.process.send_signal(signal.SIGHUP)
        event = guarded.wait_for("reload-failed", 5)
        assert str(guarded.path) in event["reason"]
        guarded.path.write_text(good, encoding="utf-8")
        assert lab.ruleset() == before
        assert handshake(lab, 0x22, source=OTHER_4, user=2) == COMEIN
        agree(lab, guarded, *HOLDERS, (OTHER_4, 0x22, 2))
        flush_and_reload(lab)
        agree(lab, guarded, *HOLDERS, (OTHER_4, 0x22, 2))
        assert not guarded.events("reloaded")

    @pytest.mark.parametrize(
        "line",
        [
            "family = ip",
            "table = other",
            "chain-input = OTHER",
            "chain-forward = OTHER",
            "exe = /usr/sbin/nft",
        ],
    )
    def test_what_wants_a_restart(
        self, lab: Lab, guarded: Server, watched: WatchedNft, line: str
    ) -> None:
        """The log names the option as the file does, and the server goes on with the old value."""
        knock_all(lab, *HOLDERS)
        before = kernel()
        name = line.split()[0]
        kept = [old for old in watched.conf().splitlines() if not old.startswith(f"{name} =")]
        # The rest of the file is taken over.
        conf = "\n".join([*kept, line]).replace("22 = port: 22", "28 = port: 22")
        reconfigure(guarded, conf)
        event = guarded.wait_for("restart-wanted")
        assert event["option"] == name, event
        assert set(kernel().elements) == rows(*HOLDERS[1:])
        assert kernel().rules == before.rules
        assert attempt(lab, 0x28) == COMEIN
        assert lab.reaches(22, CLIENT_4)

    @pytest.mark.parametrize("mode", ["fail", "fail-all", "hang", "hang-all"])
    def test_an_nft_that_fails(
        self, lab: Lab, guarded: Server, watched: WatchedNft, mode: str
    ) -> None:
        """Where nft cannot even check, the old configuration stays; where it can, the new one
        is in force as soon as nft works. Nothing in between, and nobody is locked out."""
        knock_all(lab, *HOLDERS)
        before = lab.ruleset()
        changed = "28 = port: 22\n42 = jump / input: DOOR / input-match: saddr\n"
        new = watched.conf(TRUTH_RESOURCES.replace("22 = port: 22\n", changed))
        kept = [*HOLDERS, (OTHER_4, 0x23, 1)]
        watched.mode(mode)
        if "all" in mode:
            reconfigure(guarded, new, good=False)
            assert not guarded.events("revoked")
            watched.mode("good")
            assert lab.ruleset() == before
        else:
            reconfigure(guarded, new)
            guarded.wait_for("cannot-heal")
            watched.mode("good")
            del kept[0]
        assert handshake(lab, 0x23, source=OTHER_4) == COMEIN
        agree(lab, guarded, *kept)
        # It is that one that heals, too.
        flush_and_reload(lab)
        agree(lab, guarded, *kept)
        reconfigure(guarded, new)
        agree(lab, guarded, *HOLDERS[1:], kept[-1])
        assert attempt(lab, 0x28) == COMEIN

    def test_a_chain_that_is_missing(
        self, lab: Lab, guarded: Server, watched: WatchedNft
    ) -> None:
        """A reload that nft refuses changes nothing."""
        knock_all(lab, *HOLDERS)
        before = lab.ruleset()
        new = TRUTH_RESOURCES.replace("22 = port: 22", "30 = jump / input: MISSING")
        reconfigure(guarded, watched.conf(new), good=False)
        assert lab.ruleset() == before
        agree(lab, guarded, *HOLDERS)
        nft_do("delete table inet filter")
        reconfigure(guarded, watched.conf(), good=False)
        flush_and_reload(lab)
        agree(lab, guarded, *HOLDERS)

    @pytest.mark.parametrize("protocol", ["tcp", "udp"])
    @pytest.mark.parametrize(
        "old, new, goes_on",
        [
            ("", "", True),
            ("22 = port: 22\n", "22 = port: 22\n28 = port: 29\n", True),
            ("26 = port: 26 / users: 1", "", True),
            (KEYS[2].hex(), "11" * 32, True),
            ("max-nr-rules = 90", "max-nr-rules = 80", True),
            ("basic-auth", "full-auth", True),
            ("control-timeout = 5", "control-timeout = 30", True),
            ("control-timeout = 5", "control-timeout = 4", True),
            ("[GENERAL]\nport = 5800", "[GENERAL]\nport = 5900", True),
            (KEYS[1].hex(), "11" * 32, False),
            (f"1 = {KEYS[1].hex()}\n", "", False),
            ("22 = port: 22\n", "", False),
            ("22 = port: 22\n", "22 = port: 29\n", False),
            ("22 = port: 22\n", "22 = port: 22 / users: 2\n", False),
        ],
    )
    def test_a_client_between_challenge_and_response(
        self, lab: Lab, watched: WatchedNft, old: str, new: str, goes_on: bool, protocol: str
    ) -> None:
        """It goes on, unless what it relies on has changed."""
        if "5900" in new and protocol == "udp":
            return  # a datagram to the old port finds nobody there
        lab.load(more=DOOR)
        general = "control-error-policy = basic-auth\ncontrol-timeout = 5"
        conf = watched.conf(nftables="max-nr-rules = 90", general=general)
        assert old in conf
        with Server(lab, conf) as server:
            with Peer(lab, protocol) as peer, Peer(lab, protocol, OTHER_4) as later:
                token = peer.challenge(0x22)
                later.challenge(0x22)
                reconfigure(server, conf.replace(old, new, 1))
                later.socket.close()
                peer.socket.settimeout(3 if goes_on else 0.5)
                peer.send(message(RESPONSE, 0x22, token=token))
                try:
                    answer = peer.receive().operation
                except (OSError, AssertionError):
                    answer = -1
                assert (answer == COMEIN) == goes_on, server.log
            agree(lab, server, *([(CLIENT_4, 0x22, 1)] if goes_on else []))

    def test_clients_while_it_rains_sighups(
        self, lab: Lab, guarded: Server, watched: WatchedNft
    ) -> None:
        """Nobody's connection is lost, whenever the new settings come."""
        stop = threading.Event()

        def rain() -> None:
            while not stop.is_set():
                count = len(guarded.events("reloaded"))
                guarded.process.send_signal(signal.SIGHUP)
                with contextlib.suppress(AssertionError):
                    guarded.wait_for("reloaded", count + 1)

        general = "control-timeout = 60"  # for the one who waits meanwhile
        reconfigure(guarded, watched.conf(nftables="max-nr-rules = 1000", general=general))
        addresses = [f"10.77.7.{number}" for number in range(1, 251)]
        with Peer(lab) as peer:
            token = peer.challenge(0x23)
            thread = threading.Thread(target=rain)
            thread.start()
            try:
                assert storm(lab, addresses, 16, KNOCK) == 250
            finally:
                stop.set()
                thread.join()
            peer.send(message(RESPONSE, 0x23, token=token))
            assert peer.receive().operation == COMEIN
        print(f"{len(guarded.events('reloaded'))} reloads", end=" ")
        agree(lab, guarded, (CLIENT_4, 0x23, 1), *((a, 0x22, 1) for a in addresses))


    def test_a_chain_with_rules_of_others(
        self, lab: Lab, guarded: Server, watched: WatchedNft
    ) -> None:
        """The old configuration stays, and so do those rules, also after a stop."""
        knock_all(lab, *HOLDERS)
        nft_do("add rule inet filter LETMEIN-INPUT tcp dport 443 accept")
        reconfigure(guarded, watched.conf(port="5900"), good=False)
        assert "not letmein's" in guarded.events("reload-failed")[0]["reason"]
        agree(lab, guarded, *HOLDERS)
        flush_and_reload(lab)
        nft_do("add rule inet filter LETMEIN-INPUT tcp dport 443 accept")
        guarded.wait_for("healed")
        delete_the_rules(lab)
        guarded.wait_for("healed", 2)
        agree(lab, guarded, *HOLDERS)
        guarded.process.terminate()
        assert guarded.wait() == 0
        left = lab.ruleset()
        assert "letmein" not in left and "tcp dport 443 accept" in left


class TestRepeats:
    """What comes twice."""

    @pytest.mark.parametrize("source", [CLIENT_4, CLIENT_6])
    @pytest.mark.parametrize("resource, answer", [(0x22, COMEIN), (0x27, GOAWAY)])
    def test_a_response_repeated(
        self, lab: Lab, guarded: Server, source: str, resource: int, answer: int
    ) -> None:
        """It changes nothing, and gets no other answer than the first one."""
        with Peer(lab, "udp", source) as peer:
            response = message(RESPONSE, resource, token=peer.challenge(resource))
            replies = []
            for _ in range(5):
                peer.send(response)
                replies.append(peer.receive())
        assert {reply.operation for reply in replies} == {answer}
        event = "granted" if answer == COMEIN else "failed"
        guarded.wait_for(event)  # the peer hears before the log
        agree(lab, guarded, *([(source, 0x22, 1)] if answer == COMEIN else []))
        assert len(guarded.events(event)) == 1

    @pytest.mark.parametrize("protocol", ["tcp", "udp"])
    def test_a_challenge_is_good_for_one_change(
        self, lab: Lab, guarded: Server, protocol: str
    ) -> None:
        """Further RESPONSEs to it, each with another salt, change nothing; a new KNOCK from the
        same port does, with a CHALLENGE of its own."""
        with Peer(lab, protocol) as peer:
            token = peer.challenge(0x22)
            responses = [message(RESPONSE, 0x22, token=token) for _ in range(20)]
            if protocol == "tcp":  # the server closes behind the first, which may end all at once
                peer.send(b"".join(responses))
                guarded.wait_for("granted")
                assert handshake(lab, 0x22, source=OTHER_4) == COMEIN
                assert len(guarded.events("granted", peer=CLIENT_4)) == 1
                return
            for response in responses:
                peer.send(response)
            assert peer.receive().operation == COMEIN
            guarded.wait_for("granted")
            assert handshake(lab, 0x22, REVOKE) == COMEIN
            peer.send(message(RESPONSE, 0x22, token=token))
            second = next(r for r in iter(peer.receive, None) if r.operation == COMEIN)
            assert second.operation == COMEIN, "the answer of the one that was granted"
            agree(lab, guarded)
            assert len(guarded.events("granted")) == 1
            while peer.socket in select.select([peer.socket], [], [], 0.1)[0]:
                peer.receive()
            again = peer.challenge(0x22)
            assert again != token
            peer.send(message(RESPONSE, 0x22, token=again))
            assert peer.receive().operation == COMEIN
            agree(lab, guarded, (CLIENT_4, 0x22, 1))
            assert len(guarded.events("granted")) == 2


ANSWERS_ALL = server_conf(general="control-error-policy = always")


class TestLogUnderAttack:
    """No flood fills the disk, and none hides who was let in."""

    def test_a_burst_is_summed_up(self, lab: Lab) -> None:
        """Refusals get ten lines and then a sum in which none is missing."""
        lab.load()
        program = adjusted(lab, "letmein.SUMMARY_S = 4.0")
        with Server(lab, ANSWERS_ALL, "-N", "1000", program=program) as server:
            for number in range(300):
                for protocol in ("tcp", "udp"):
                    refused_knock(lab, protocol, user=9 if number % 2 else 1, resource=number)
                if number % 30 == 0:
                    assert handshake(lab, source=f"10.77.6.{number // 30}") == COMEIN

            def told(proto: str) -> int:
                """How many refused peers the log has told of, by their lines or summed up."""
                name = f"refused-{proto}"
                sums = (int(line.get(name, "0")) for line in server.events("summary"))
                return len(server.events("refused", proto=proto)) + sum(sums)

            eventually(lambda: told("tcp") == told("udp") == 300, "not all are accounted for")
            assert len(server.events("granted")) == 10
            begun = {"tcp": 0, "udp": 0}  # lines since the last summary
            for line in server.lines:
                if "event=summary" in line:
                    begun = {"tcp": 0, "udp": 0}
                for proto in begun:
                    begun[proto] += "event=refused" in line and f"proto={proto}" in line
                assert max(begun.values()) <= 10, server.log
            assert len(server.events("summary")) >= 1
            assert len(server.events("refused")) < 300

    def test_ten_lines_then_one_summary(self, lab: Lab) -> None:
        """At a stop at the latest: the summary that is due is written."""
        lab.load()
        with Server(lab, ANSWERS_ALL) as server:
            for number in range(13):
                refused_knock(lab, "tcp")
                refused_knock(lab, "udp", CLIENT_6, resource=number)
            refused_knock(lab, "tcp")
            server.stop()
        assert len(server.events("refused", proto="tcp", peer=CLIENT_4)) == 10
        assert len(server.events("refused", proto="udp", peer=CLIENT_6)) == 10
        (summary,) = server.events("summary")
        assert (summary["refused-tcp"], summary["refused-udp"]) == ("4", "3")
        events = [line.partition("event=")[2].split()[0] for line in server.lines[-2:]]
        assert events == ["summary", "stopped"]

    @pytest.mark.parametrize(
        "event, change, change_back",
        [
            ("healed", "flush chain inet filter LETMEIN-INPUT", ""),
            (
                "cannot-heal",
                "rename chain inet filter LETMEIN-INPUT ANOTHER",
                "rename chain inet filter ANOTHER LETMEIN-INPUT",
            ),
        ],
    )
    def test_a_table_that_is_changed_all_the_time(
        self, lab: Lab, event: str, change: str, change_back: str
    ) -> None:
        """A loop of reloads does not fill the disk, either."""
        lab.load()
        program = adjusted(lab, "letmein.LINES_LIMIT, letmein.SUMMARY_S = 2, 600.0")
        with Server(lab, server_conf(), program=program) as server:
            for turn in range(1, 6):
                nft_do(change)
                eventually(
                    lambda turn=turn: happened(server, event) == turn,  # type: ignore[misc]
                    "it sees nothing",
                )
                nft_do(change_back)
                quiet(server)
            server.stop()
        assert len(server.events(event)) == 2
        assert [line[event] for line in server.events("summary")] == ["3"]

    @pytest.mark.parametrize("stream", ["", "8:1", "$(stat -L -c %d:%i /proc/self/fd/2)"])
    def test_nothing_from_the_wire_is_in_the_log_as_it_came(self, lab: Lab, stream: str) -> None:
        """Each line has a time, or where standard error goes to systemd's journal a priority."""
        journal = "stat" in stream
        lab.load()
        shell = ("sh", "-c", f'JOURNAL_STREAM={stream} exec "$@"', "sh")
        program = (*shell, sys.executable, lab.installed, "server")
        with Server(lab, ANSWERS_ALL, program=program) as server:
            for text in (b"\nev=", b"\x1b[2J", b"' a=", b"\0\r\xff%"):
                number = int.from_bytes(text, "big")
                for protocol, source in (("tcp", CLIENT_4), ("udp", CLIENT_6)):
                    refused_knock(lab, protocol, source, user=number)
                    with Peer(lab, protocol, source) as peer:
                        peer.send(message(KNOCK, number))
                        assert peer.receive().operation == GOAWAY
                    with Peer(lab, protocol, source) as peer:
                        peer.send(text * 14)
                server.wait_for("refused", proto="udp", user=f"{number:08X}")
                server.wait_for("refused", proto="tcp", resource=f"{number:08X}")
            assert handshake(lab, 0x22, source=CLIENT_6) == COMEIN
            assert handshake(lab, 0x27) == GOAWAY
            server.wait_for("failed")
            server.stop()
        first = next(at for at, line in enumerate(server.lines) if "event=" in line)
        assert_grammar(server.lines[first:])
        assert all(line.startswith("<") == journal for line in server.lines[first:])
        priorities = {"warning": 4, "ready": 6, "granted": 6, "refused": 5, "failed": 4}
        for event, priority in priorities.items() if journal else ():
            assert f"<{priority}>event={event} " in server.log, event
        failing = lab.command("-c", server.path, "--user", "no-such-account", program=program)
        prefix = "<3>" if journal else ""
        assert failing.err.startswith(f"{prefix}letmein: error: ")


    def test_what_the_log_says_of_resources_and_leases(self, lab: Lab) -> None:
        """Who may have what, at the start, for some resources; of a grant, what it opens, for how
        long, and whether it renews a lease."""
        resources = f"30 = jump / input: WEB / timeout: 60\n{RESOURCES}"
        resources += "".join(f"{number} = port: {number}\n" for number in range(100, 130))
        port, jump = "00000023 port=23/tcp+udp seconds=600", "00000030 jump=WEB seconds=60"
        lab.load(more="add chain inet filter WEB")
        with Server(lab, server_conf(resources)) as server:

            def lines(event: str) -> list[str]:
                found = [line for line in server.lines if f"event={event} " in line]
                return [line.partition(" resource=")[2] for line in found]

            told = lines("resource")
            assert len(told) == 20
            assert told[0] == f"{jump} users=all"
            assert f"{port} users=all" in told
            assert "00000026 port=26/tcp seconds=600 users=00000001" in told
            assert server.events("more-resources", count="16")
            for resource in (0x23, 0x30, 0x23):
                assert handshake(lab, resource) == COMEIN
            assert handshake(lab, 0x23, source=CLIENT_6) == COMEIN
            assert handshake(lab, 0x23, operation=REVOKE) == COMEIN
            assert handshake(lab, 0x23) == COMEIN
            server.wait_for("granted", 5)
            assert lines("granted") == [port, jump, f"{port} renewed=yes", port, port]

    def test_one_knock_is_one_refusal(self, lab: Lab) -> None:
        """A client with a wrong key asks again and again over UDP, and is refused once; a knock
        for something else, or by somebody else, is another one."""
        lab.load()
        wrong = CLIENT_CONF.replace(KEYS[1].hex(), KEYS[2].hex())
        with Server(lab, server_conf()) as server:
            lab.letmein("knock", "-U", SERVER_4, "22", conf=wrong).assert_error("no answer")
            assert counted(server)["refused"] == {"wrong key": 1}
            assert counted(server)["counts"]["repeated"] > 1
            assert len(server.events("refused")) == 1
            for resource in (0x23, 0x23, 0x23, 0x22):
                with Peer(lab, "udp", OTHER_4) as peer:
                    peer.send(message(KNOCK, resource, key=KEYS[2]))
            server.wait_for("refused", 3)
            assert counted(server)["refused"] == {"wrong key": 3}


class TestUnreadLog:
    """A log that nobody reads keeps nobody out, and nobody in."""

    @pytest.mark.parametrize("where", ["full pipe", "/dev/full", "closed"])
    def test_it_serves_and_stops(self, lab: Lab, where: str) -> None:
        """A log that takes no line keeps nobody out, and does not hold up the stop."""
        lab.load()
        with Mute(lab, where) as mute:
            for protocol, source in (("tcp", CLIENT_4), ("udp", CLIENT_6)):
                assert handshake(lab, 0x23, protocol=protocol, source=source) == COMEIN
                assert lab.reaches(23, source)
            assert handshake(lab, 0x27) == GOAWAY
            assert handshake(lab, 0x23, REVOKE) == COMEIN
            assert not lab.reaches(23, CLIENT_4)
            assert counted(mute.server)["counts"]["granted"] == 2
            # What was closed stays so: the log does not go into a file that has come in its place.
            for path in mute.server.rundir.iterdir():
                assert path.is_socket() or path.read_text(encoding="utf-8") == ""
            mute.stop()

    def test_a_reader_that_comes_back(self, lab: Lab) -> None:
        """The log goes on, and `status` says how many lines it has missed."""
        lab.load()
        with Mute(lab, "pipe") as mute:
            eventually(lambda: "event=ready" in mute.read(), "it is never ready")
            mute.fill()
            addresses = [f"10.77.6.{number}" for number in range(1, 41)]
            assert storm(lab, addresses, 1, KNOCK) == 40
            assert counted(mute.server)["counts"]["lines-lost"] == 40
            assert "event=granted" not in mute.read()
            assert handshake(lab) == COMEIN
            eventually(lambda: "event=granted" in mute.read(), "the log does not go on")
            mute.stop()

    def test_a_long_line(self, lab: Lab) -> None:
        """It is cut to what a pipe takes as a whole."""
        lab.load(more=DOOR)
        many = "".join(f"{n:X} = jump / input: DOOR / input-match: saddr\n" for n in range(80))
        with Server(lab, server_conf(many, general="debug = 1")) as server:
            flush_and_reload(lab)
            server.wait_for("healed")
            assert max(map(len, server.lines)) == select.PIPE_BUF - 1
            assert max(line.count("event=") for line in server.lines) == 1


FAREWELL = b"it says why, in a text as long as a record".ljust(letmein.RECORD.size, b".")


@pytest.mark.parametrize(
    "record, reason",
    [
        (letmein.Record(9), "it sent a bad record"),
        (letmein.Record(letmein.FIRST, protocol=9), "it sent a bad record"),
        (letmein.Record(letmein.FIRST), "it sent a bad message"),
        (letmein.Record(*letmein.RECORD.unpack(FAREWELL)), FAREWELL.decode()),
        (letmein.Record(letmein.COUNTS, payload=struct.pack("!3I", 1, 2, 3) + bytes(44)), ""),
    ],
)
def test_records_that_are_no_message(record: letmein.Record, reason: str) -> None:
    """A bad one costs the network process its life; COUNTS are added up."""
    with lone_monitor(monitor_text("always")) as monitor:
        for _ in range(1 if reason else 2):
            monitor.hand(letmein.RECORD.pack(*record))
        reasons = [line["reason"] for line in monitor.log.lines]
        counts = [monitor.log.counts[name] for name in ("evicted", "late", "garbage")]
        assert (reasons, counts) == (([reason], [0, 0, 0]) if reason else ([], [2, 4, 6]))


def test_settings_that_cannot_be_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """No network process is started without its link: another attempt is made later."""
    started = []

    def fail(*_: object) -> None:
        raise OSError("there are too many")

    with lone_monitor(monitor_text("always")) as monitor:
        network = monitor.network
        network._stop(0)
        network.start_at = letmein.NEVER
        monkeypatch.setattr(letmein, "control_sockets", lambda *_: {})
        monkeypatch.setattr(socket, "send_fds", fail)
        monkeypatch.setattr(os, "posix_spawn", lambda *_, **__: started.append(1))
        network.start()
        assert (started, network.process, network.link, network.pipe) == ([], 0, None, -1)
        assert network.start_at < letmein.NEVER
        assert monitor.log.counts["network-process-lost"] == 1


def test_what_a_datagram_costs() -> None:
    """The users of a resource are not read for each datagram that nobody has proved."""

    class Users(frozenset[int]):
        reads = 0

        def __iter__(self) -> Iterator[int]:
            Users.reads += 1
            return super().__iter__()

    with lone_monitor(monitor_text("always")) as monitor:
        config = monitor.config
        resource = config.resources[RESOURCE]._replace(users=Users((1, 2, USER)))
        monitor.judge.reconfigure(config._replace(resources={RESOURCE: resource}))
        before = Users.reads
        sender = From(letmein.UDP, 1, ("10.0.0.1", 1000))
        for said in (KNOCK, RESPONSE):
            record = sender.record(letmein.FIRST, sealed(said, NO_TOKEN))
            monitor.hand(letmein.RECORD.pack(*record))
        assert Users.reads == before


def test_one_refused_knock_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over UDP it comes again and again, from other ports. Two refusals are remembered here."""
    clock = SimpleNamespace(strftime=time.strftime, time=time.time)
    monkeypatch.setattr(letmein, "time", clock)
    monkeypatch.setattr(letmein, "REFUSALS_LIMIT", 2)
    udp, tcp = letmein.UDP, letmein.TCP
    steps = [  # when, from where, for which user and resource, and whether that is new
        (0, udp, "10.0.0.1", 1000, 7, 1, True),
        (0, udp, "10.0.0.1", 1001, 7, 1, False),
        (1, udp, "10.0.0.2", 1000, 7, 1, True),
        (letmein.SAME_REFUSAL_S - 0.1, udp, "10.0.0.1", 1000, 7, 1, False),
        (letmein.SAME_REFUSAL_S, udp, "10.0.0.1", 1000, 7, 1, True),
        (10.5, udp, "10.0.0.1", 1000, 8, 1, True),  # 10.0.0.2, the oldest, is forgotten
        (10.6, udp, "10.0.0.1", 1000, 7, 1, False),
        (10.6, udp, "10.0.0.2", 1000, 7, 1, True),
        (10.7, udp, "10.0.0.1", 1000, 8, 2, True),
        (10.8, tcp, "10.0.0.1", 1000, 8, 2, True),
        (10.8, tcp, "10.0.0.1", 1000, 8, 2, True),
    ]
    clock.monotonic = lambda: 1000.0
    with lone_monitor(monitor_text("always")) as monitor:
        lines = []
        for when, protocol, address, port, user, resource, is_new in steps:
            clock.monotonic = lambda now=1000.0 + when: now
            sender = From(protocol, 1, (address, port))
            knock = sealed(KNOCK, user=user, resource=resource)
            monitor.hand(letmein.RECORD.pack(*sender.record(letmein.FIRST, knock)))
            if is_new:
                lines.append({
                    "event": "refused", "peer": address, "reason": "unknown user",
                    "proto": "tcp" if protocol == tcp else "udp",
                    "user": f"{user:08X}", "resource": f"{resource:08X}",
                })  # fmt: skip
            assert monitor.log.lines == lines
        assert monitor.log.counts["repeated"] == len(steps) - len(lines)
        assert monitor.log.refusals == {"unknown user": len(lines)}


GRANTED = {"port": "22/tcp", "seconds": "600"}


@pytest.mark.parametrize(
    "operation, problem, left, event, facts",
    [
        (KNOCK, "", None, "granted", GRANTED),
        (KNOCK, "", 60, "granted", {**GRANTED, "renewed": "yes"}),
        (KNOCK, "", -60, "granted", GRANTED),
        (KNOCK, "full", None, "failed", {"reason": "full"}),
        (REVOKE, "", 60, "revoked", {}),
        (REVOKE, "no", 60, "failed", {"reason": "no"}),
    ],
)
def test_what_becomes_of_a_handshake(
    operation: int, problem: str, left: float | None, event: str, facts: dict[str, str]
) -> None:
    """The change of the firewall, in whose name, and its line in the log. Args: left, for how long
    the peer has had a lease, in s."""
    with lone_monitor(monitor_text("always")) as monitor:
        firewall, sender = monitor.firewall, From(letmein.UDP, 1, ("10.0.0.1", 1000))
        firewall.problem = problem
        if left is not None:
            ends = time.monotonic() + left
            firewall.leases.keep(letmein.Lease("10.0.0.1", RESOURCE, 1, "", 1, ends))
        token = NO_TOKEN
        for said in (operation, RESPONSE):
            record = sender.record(letmein.FIRST, sealed(said, token))
            (reply,) = monitor.hand(letmein.RECORD.pack(*record))
            token = Message.decode(reply.payload).auth
        assert Message.decode(reply.payload).operation == (GOAWAY if problem else COMEIN)
        assert firewall.changes == [(operation, "10.0.0.1", RESOURCE)]
        assert firewall.user == (USER if operation == KNOCK else 0)
        ids = {"user": f"{USER:08X}", "resource": f"{RESOURCE:08X}"}
        line = {"event": event, "peer": "10.0.0.1", "proto": "udp", **ids, **facts}
        assert monitor.log.lines == [line]


# ----------------------------------------------------------------------------
# 6  Network
#
# The process that faces the internet serves everybody, has limits, and may die or turn hostile.
# ----------------------------------------------------------------------------

SAYINGS = st.tuples(
    st.integers(0, 3),
    st.sampled_from(
        ["knock", "response"] * 5
        + ["revoke", "again", "again", "other ids", "junk", "junk", "hang up", "half"]
    ),
    ANY_MESSAGE | st.binary(max_size=130),
    st.sampled_from([56] * 5 + [0, 1, 55]) | st.integers(0, 130),
)


@examples(60)
@given(st.lists(SAYINGS, min_size=8, max_size=40))
def test_both_processes_survive_any_peers(sayings: list[tuple[int, str, bytes, int]]) -> None:
    """Whatever peers send, in whatever pieces and order: each hears what its own messages ask
    for, and the firewall changes for whole handshakes alone."""
    server = BothProcesses()
    try:
        for number in range(4):
            source = f"127.0.0.{2 + number // 2}"
            server.talkers.append(Talker(server, udp=number % 2 == 1, source=source))
            server.settle()
        for number, what, data, cut in sayings:
            talker = server.talkers[number]
            if talker.closed:
                server.talkers.append(talker)
                talker = server.talkers[number] = Talker(server, talker.udp, "127.0.0.4")
            if what in ("hang up", "half") and not talker.udp:
                talker.hang_up(half=what == "half")
            else:
                talker.say(what, data, cut)
            server.settle()
            assert not server.changes and not any(other.heard() for other in server.talkers)
        here = [talker for talker in server.talkers if not talker.udp and not talker.closed]
        server.until(lambda: len(server.network.connections) == len(here))
        assert not server.network.awaiting_verdict and not server.changes
        for talker in server.talkers:
            assert not talker.heard() and (talker.closed or not talker.at_end)
        assert "network-process-lost" not in server.monitor.log.counts
    finally:
        server.close()


def test_a_peer_of_a_listener_that_is_closed() -> None:
    """Settings that come together with a peer of the old control port cost nobody a connection."""
    server = BothProcesses()
    try:
        server.talkers.append(Talker(server, udp=False, source="127.0.0.2"))
        server.settle()
        settings = letmein.Record(
            letmein.SETTINGS, payload=letmein.SETTINGS_PAYLOAD.pack(60.0)
        )
        with socket.create_server(("127.0.0.1", 0)) as listener:
            letmein.prepare_control(listener)
            server.monitor.network.send(settings, [listener.fileno()])
            server.talkers.append(Talker(server, udp=False, source="127.0.0.3"))
            server.settle()
        server.listeners = server.network.listeners
        assert len(server.network.connections) == 1 and not server.talkers[0].is_over()
    finally:
        server.close()


def test_the_time_limit_is_for_each_event(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many connections at once do not use up the network process's limit together."""
    steps = []

    def end() -> None:
        raise ConnectionError

    works = [lambda: steps.append("event"), lambda: steps.append("event"), end]
    ready = [(SimpleNamespace(data=work), 1) for work in works]
    server = BothProcesses()
    try:
        monkeypatch.setattr(signal, "setitimer", lambda *_: steps.append("limit"))
        monkeypatch.setattr(server.network.selector, "select", lambda _: ready)
        with pytest.raises(ConnectionError):
            server.network.run()
        assert steps == ["limit", "event", "limit", "event", "limit"]
    finally:
        server.close()


def test_nobody_is_pushed_out_for_the_monitors_delay() -> None:
    """Who has knocked and waits for the monitor keeps its slot; who does nothing gives it up."""
    server = BothProcesses()
    server.network.prefix_limit = 4

    def forward() -> None:
        """What the network process does while the monitor is busy."""
        while ready := server.network.selector.select(0.05):
            for key, _ in ready:
                key.data()

    try:
        talkers = server.talkers
        talkers += [Talker(server, udp=False, source="127.0.0.2") for _ in range(4)]
        forward()
        knock = letmein.signed(KNOCK, USER, RESOURCE, KEY, letmein.NO_TOKEN)
        for talker in talkers:
            talker.socket.send(knock)
        forward()
        talkers += [Talker(server, udp=False, source="127.0.0.2") for _ in range(2)]
        forward()
        assert not any(talker.is_over() for talker in talkers[:4])
        assert talkers[4].is_over(), "it was there and said nothing"
        server.monitor.network._on_pipe()
        assert all(Message.decode(one.reply()).operation == CHALLENGE for one in talkers[:4])
        talkers.append(Talker(server, udp=False, source="127.0.0.2"))
        server.until(talkers[0].is_over)
        assert not any(talker.is_over() for talker in talkers[1:4])
    finally:
        server.close()


class TestAddresses:
    """A server with more than one."""

    @pytest.mark.parametrize("source, second", [(CLIENT_4, "10.1.0.77"), (CLIENT_6, "fd01::77")])
    def test_an_answer_comes_from_the_address_that_was_asked(
        self, lab: Lab, server: Server, source: str, second: str
    ) -> None:
        """Over UDP it need not, and a client takes no other's."""
        version, prefix, *more = ("-6", 64, "nodad") if ":" in source else ("-4", 24)
        run("ip", version, "addr", "add", f"{second}/{prefix}", "dev", "lan", *more)
        try:
            with Peer(lab, "udp", source) as peer:
                for address in (second, server_for(source), second):
                    # A socket that is connected hears nobody else.
                    peer.socket.connect((address, 5800))
                    peer.send(message(RESPONSE, 0x22, token=peer.challenge(0x22)))
                    assert peer.receive().operation == COMEIN
            assert lab.elements() != []
            lab.letmein("knock", "-U", second, "23").assert_good()
            for resource in (0x22, 0x23):
                assert handshake(lab, resource, REVOKE, source=source) == COMEIN
        finally:
            run("ip", version, "addr", "del", f"{second}/{prefix}", "dev", "lan")


# Runs a program for which socket(AF_INET6, ...) fails as on a kernel without IPv6.
NO_IPV6 = """
import ctypes, os, platform, struct, sys
number = {"x86_64": 41, "aarch64": 198}[platform.machine()]
code = b"".join(struct.pack("=HBBI", *op) for op in (
    (0x20, 0, 0, 0), (0x15, 0, 3, number), (0x20, 0, 0, 16), (0x15, 0, 1, 10),
    (0x06, 0, 0, 0x50000 | 97), (0x06, 0, 0, 0x7FFF0000)))
class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]
libc = ctypes.CDLL(None)
program = Program(6, code)
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, ctypes.byref(program), 0, 0) == 0
os.execv(sys.argv[1], sys.argv[1:])
"""


class TestWithoutIPv6:
    def test_disabled_in_the_kernel(self, lab: Lab) -> None:
        """Client and server work where IPv6 is disabled."""
        lab.load()
        with lab.without_ipv6(), Server(lab, server_conf()):
            for control in ("-T", "-U"):
                lab.letmein("knock", control, SERVER_4, "22").assert_good()
                assert lab.reaches(22, CLIENT_4)
                assert not lab.reaches(22, OTHER_4)
                lab.letmein("revoke", control, SERVER_4, "22").assert_good()
            # A name may still have an IPv6 address.
            lab.letmein("knock", "both.test", "22").assert_good()
            assert lab.reaches(22, CLIENT_4)
        assert lab.letmein("knock", SERVER_6, "22").status == 1, "IPv6 is back, the server is not"

    def test_absent_from_the_kernel(self, lab: Lab) -> None:
        """Client and server work where no IPv6 socket can be made."""
        if platform.machine() not in ("x86_64", "aarch64"):
            pytest.skip(f"no seccomp filter for {platform.machine()}")
        lab.load()
        without = (sys.executable, "-c", NO_IPV6, sys.executable)
        with Server(lab, server_conf(), program=(*without, LETMEIN, "server")):
            path = lab.file(CLIENT_CONF)
            for control, host in (("-T", "both.test"), ("-U", SERVER_4)):
                for word in ("knock", "revoke"):
                    with lab.client():
                        arguments = ("-c", path, word, control, host, "22")
                        result = lab.command(*arguments, program=(*without, LETMEIN))
                    assert result.status == 0, result
                    assert lab.reaches(22, CLIENT_4) == (word == "knock")


# Runs $@ with a /tmp that nobody can write to, but for the lab's own directory in there.
FULL_TMP = """
mount --bind @LAB@ @LAB@ && mount --rbind /tmp /tmp && mount -o remount,bind,ro /tmp && exec "$@"
"""


class TestLimits:
    """What is scarce."""

    def test_tmp_is_full(self, lab: Lab) -> None:
        """Who fills /tmp keeps neither the server from starting nor its network process from coming
        back."""
        need_root(lab)
        lab.load()
        mounts = FULL_TMP.replace("@LAB@", str(lab.directory))
        python = (sys.executable, LETMEIN, "server")
        program = ("unshare", "--mount", "sh", "-c", mounts, "sh", *python)
        with confined(lab, server_conf(), program=program) as server:
            network = server.network_process()
            os.kill(network, signal.SIGKILL)
            replaced(server, network)

    def test_the_run_directory_fills_up(self, lab: Lab) -> None:
        """A server that runs needs no more of the disk."""
        need_root(lab)
        lab.load()
        place = Path(tempfile.mkdtemp(dir=lab.directory))
        call_libc("mount", b"none", bytes(place), b"tmpfs", 0, b"nr_inodes=20,mode=755")
        try:
            with confined(lab, server_conf(), "--rundir", str(place)) as server:
                with contextlib.suppress(OSError):
                    for number in range(30):
                        (place / str(number)).touch()
                network = server.network_process()
                os.kill(network, signal.SIGKILL)
                replaced(server, network)
                server.rundir = place
                assert_lives(server)
        finally:
            call_libc("umount", bytes(place))

    def test_descriptors_run_out(self, lab: Lab) -> None:
        """When the monitor can open nothing at all it says so, keeps the leases, and does what it
        could not do when it can again."""
        lab.load()
        with Server(lab, server_conf()) as server:
            assert handshake(lab) == COMEIN
            monitor, network = server.process.pid, server.network_process()
            _, most = limits.prlimit(monitor, limits.RLIMIT_NOFILE)
            limits.prlimit(monitor, limits.RLIMIT_NOFILE, (0, most))
            os.kill(network, signal.SIGKILL)
            lost = server.wait_for("network-process-lost", 2)
            assert "Too many open files" in lost["reason"], lost
            server.process.send_signal(signal.SIGHUP)
            server.wait_for("reload-failed")
            with socket.socket(socket.AF_UNIX) as peer:
                peer.connect(str(status_socket(server)))
                server.process.send_signal(signal.SIGHUP)
                server.wait_for("reload-failed", 2)
                limits.prlimit(monitor, limits.RLIMIT_NOFILE, (most, most))
                assert json.load(peer.makefile("rb"))["process"] == monitor
            eventually(lambda: server_is_back(server), "no new network process")
            assert lab.reaches(22, CLIENT_4), "the lease"
            assert_lives(server)

    def test_no_descriptor_to_wait_for_nft(self, lab: Lab) -> None:
        """Descriptors for what nft reads and says are enough: it is not killed for want of one to
        wait for its end."""
        lab.load()
        with Server(lab, server_conf()) as server:
            monitor = server.process.pid
            taken = {int(name) for name in os.listdir(f"/proc/{monitor}/fd")}
            free = itertools.filterfalse(taken.__contains__, itertools.count())
            _, last = next(free), next(free)
            _, most = limits.prlimit(monitor, limits.RLIMIT_NOFILE)
            limits.prlimit(monitor, limits.RLIMIT_NOFILE, (last + 1, most))
            flush_the_chain(lab)
            server.wait_for("healed")
            assert "cannot-heal" not in server.log
            limits.prlimit(monitor, limits.RLIMIT_NOFILE, (most, most))
            assert_serves(lab, server)

    @pytest.mark.parametrize("number", range(7, 12))
    def test_too_few_descriptors_to_start(self, lab: Lab, number: int) -> None:
        """Wherever they run out, that is said, without a traceback."""
        lab.load()
        program = ("prlimit", f"--nofile={number}", sys.executable, lab.installed)
        words = ("server", "-c", lab.file(server_conf()), "--rundir", lab.directory)
        lab.command(*words, "--user", "none", program=program).assert_error("Too many open files")

    def test_an_office(self, lab: Lab) -> None:
        """A hundred people behind one address knock in the same moment, and nobody pushes anybody
        out."""
        lab.load()
        with Server(lab, server_conf()) as server, contextlib.ExitStack() as stack:
            peers = [stack.enter_context(Peer(lab)) for _ in range(100)]
            for peer in peers:
                peer.send(message(KNOCK, 0x22))
            tokens = [peer.receive().auth for peer in peers]
            for peer, token in zip(peers, tokens):
                peer.send(message(RESPONSE, 0x22, 1, token))
            assert {peer.receive().operation for peer in peers} == {COMEIN}
            assert "evicted" not in counted(server)["counts"]

    def test_few_descriptors(self, lab: Lab) -> None:
        """Idle connections may take all descriptors there are, and yet lock nobody out."""
        lab.load()
        program = ("prlimit", "--nofile=80:80", sys.executable, LETMEIN, "server")
        with Server(lab, server_conf(general="control-timeout = 60"), "-N", "1024",
                    program=program) as server, contextlib.ExitStack() as stack:
            for number in range(200):
                stack.enter_context(Peer(lab, source=f"10.77.9.{number}")).send(b"\x3b")
            for protocol, source in (("tcp", CLIENT_4), ("udp", CLIENT_6), ("tcp", CLIENT_6)):
                assert handshake(lab, 0x23, protocol=protocol, source=source) == COMEIN
                assert lab.reaches(23, source)
            # It waits for what comes next, and does not ask for it over and over.
            network = server.network_process()
            descriptors = len(list(Path(f"/proc/{network}/fd").iterdir()))
            assert 60 <= descriptors <= 80
            used, pause = cpu_seconds(network), 0.8
            time.sleep(pause)
            assert cpu_seconds(network) - used < pause / 4
            assert not server.events("network-process-lost")


SPIN = "while True: pass"

BAD_RECORDS = {
    "too short": "self.tell(bytes(10))",
    "nothing": "os.close(self.pipe)",
    "too long for a pipe at once": "self.tell(bytes(10_000))",
    "too long": "self.tell(bytes(RECORD.size + 1))",
    "unknown kind": "self.say(99)",
    "kind 0": "self.say(0)",
    "REPLY": "self.say(REPLY)",
    "SETTINGS": "self.say(SETTINGS)",
    "unknown protocol": "self.say(FIRST, 41)",
    "no message": "self.say(FIRST, payload=bytes(56))",
    "unknown operation": "self.say(FIRST, payload=unsigned(6, 1, 0x22))",
}

FLOOD = """
        signal.setitimer(signal.ITIMER_PROF, 0)
        numbers = random.Random(1)
        while True:
"""

FLOODS = {
    "requests": """
            operation, noise = numbers.randrange(6), numbers.randbytes(48)
            payload = MAGIC + operation.to_bytes(4, "big") + noise
            protocol = numbers.choice([TCP, UDP])
            self.say(FIRST, protocol, payload, numbers.getrandbits(32), numbers.randbytes(16))
            self.hear()
""",
    "answers": """
            operation, noise = numbers.randrange(6), numbers.randbytes(48)
            payload = MAGIC + operation.to_bytes(4, "big") + noise
            self.say(SECOND, TCP, payload, numbers.getrandbits(32), numbers.randbytes(16))
            self.hear()
""",
    "replays": """
            self.tell(RECORD.pack(*self.answer))
            self.hear()
""",
    "counts": """
            self.say(COUNTS, payload=COUNTS_PAYLOAD.pack(*[0xFFFFFFFF] * 3).ljust(56))
            self.say(READY)
""",
    # What a client who has the key has said, as if from others, at other times, in any order.
    "all at once": """
            record = numbers.choice([self.request, self.answer])
            near = IPV4_MAPPED + bytes([10, 77, 7, 7])
            local = bytes.fromhex("fe80") + bytes(13) + b"1"
            self.tell(RECORD.pack(*record._replace(
                kind=numbers.choice([READY, FIRST, FIRST, SECOND, SECOND, COUNTS]),
                protocol=numbers.choice([TCP, UDP]),
                connection=numbers.choice([record.connection, numbers.getrandbits(32)]),
                address=numbers.choice([record.address, near, local, numbers.randbytes(16)]),
                route=numbers.choice([record.route, numbers.randbytes(26)]),
            )))
            self.hear()
""",
}

NOT_READING = """
            self.say(FIRST)
            select.select([], [self.pipe], [])
"""

# Takes a record now and then, so that it is never found deaf, and asks for more than that. When
# the link is full, it lets the monitor be told to stop.
SLOW_READER = """
            while select.select([], [self.pipe], [], 0.3)[1]:
                self.say(FIRST)
            os.kill(MONITOR, signal.SIGTERM)
            while os.getppid() == MONITOR:
                time.sleep(0.2)
                self.link.recv(RECORD.size)
            raise SystemExit(0)
"""

# What the network process does to what it has in common with the monitor, or sends it. Where the
# kernel refuses a step, that is no reason to leave the next one out.
LINGER = """
        def linger(kept):
            # To close it takes an hour, for its peer takes nothing.
            forever = struct.pack("ii", 1, 3600)
            kept.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, forever)
            kept.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    kept.send(bytes(1 << 16), socket.MSG_DONTWAIT)

        def give(kept):
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", kept.fileno()))]
            for channel in (0, 1):
                with contextlib.suppress(OSError), socket.socket(fileno=os.dup(channel)) as towards:
                    for _ in range(100):
                        towards.sendmsg([RECORD.pack(*Record(COUNTS))], rights)
                    kept.close()  # while others are on their way
"""

ATTACKS_ON_THE_MONITOR = {
    "a descriptor that lingers": LINGER
    + """
        kept = next(iter(self.connections.values())).socket
        linger(kept)
        give(kept)
""",
    "a control socket that lingers": LINGER
    + """
        kept = self.listeners[0]
        kept.shutdown(socket.SHUT_RDWR)
        kept.setblocking(True)
        kept.connect(("::ffff:10.1.0.2", 9001))
        linger(kept)
        os._exit(0)
""",
    "deaf control sockets": """
        drop = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0))
        program = struct.pack("@HP", 1, ctypes.addressof(drop))
        for control in self.listeners:
            for level, name, value in (
                (socket.SOL_SOCKET, 26, program),  # SO_ATTACH_FILTER
                (socket.SOL_SOCKET, 44, 1),  # SO_LOCK_FILTER
                (socket.SOL_SOCKET, 25, b"lo"),  # SO_BINDTODEVICE
                (socket.SOL_SOCKET, socket.SO_RCVBUF, 1),
                (socket.IPPROTO_IP, 21, 255),  # IP_MINTTL
                (socket.IPPROTO_IPV6, 73, 255),  # IPV6_MINHOPCOUNT
            ):
                with contextlib.suppress(OSError):
                    control.setsockopt(level, name, value)
            with contextlib.suppress(OSError):
                control.listen(0)
        self.listeners[1].connect(("::ffff:10.1.0.2", 9))
        os._exit(0)
""",
    "shut control sockets": """
        for control in self.listeners:
            with contextlib.suppress(OSError):
                control.shutdown(socket.SHUT_RDWR)
        os._exit(0)
""",
    "sockets that block": """
        for control in self.listeners:
            fcntl.ioctl(control, 0x5421, struct.pack("i", 0))  # FIONBIO
        fcntl.ioctl(0, 0x5421, struct.pack("i", 0))
        os._exit(0)
""",
    "signals": """
        for number in (0, 1, *(control.fileno() for control in self.listeners)):
            for command, value in (
                (8, MONITOR),  # F_SETOWN
                (10, signal.SIGTERM),  # F_SETSIG
                (1024, 0),  # F_SETLEASE
            ):
                with contextlib.suppress(OSError):
                    fcntl.fcntl(number, command, value)
            with contextlib.suppress(OSError):
                fcntl.ioctl(number, 0x5452, struct.pack("i", 1))  # FIOASYNC
""",
    "another pipe": """
        fcntl.fcntl(self.pipe, 4, 0)  # F_SETFL: it blocks, and packs
        with contextlib.suppress(OSError):
            fcntl.fcntl(self.pipe, 1031, 4096)  # F_SETPIPE_SZ
        for _ in range(3):
            os.write(self.pipe, bytes(RECORD.size // 2))
""",
    "a shut link": """
        self.link.shutdown(socket.SHUT_RDWR)
        self.selector.unregister(self.link)
        self.say(FIRST)
""",
    "half a datagram": """
        self.listeners[1].sendto(b"half", 0x8000, ("::ffff:10.1.0.2", 9))  # MSG_MORE
        os._exit(0)
""",
}


class TestNetworkProcess:
    """The process that faces the internet dies, hangs, or turns against us."""

    def test_killed_again_and_again(self, lab: Lab) -> None:
        """It comes back each time, after a longer pause, and leases stay."""
        lab.load()
        with Server(lab, server_conf()) as server:
            assert handshake(lab) == COMEIN
            leases = lab.elements()
            killed = 0
            for count, pause in enumerate(("0.1", "0.2", "0.4"), 1):

                def is_new(old: int = killed) -> bool:
                    with contextlib.suppress(AssertionError):
                        return server.network_process() != old
                    return False

                eventually(is_new, "no new network process")
                killed = server.network_process()
                os.kill(killed, signal.SIGKILL)
                lost = server.wait_for("network-process-lost", count)
                assert lost["pause"] == pause
            assert lab.elements() == leases
            assert lab.reaches(22, CLIENT_4)
            for protocol in ("tcp", "udp"):
                assert handshake(lab, 0x23, protocol=protocol) == COMEIN
            assert lab.reaches(23, CLIENT_4)

    @pytest.mark.parametrize("number, hint", [("SIGSEGV", ""), ("SIGSYS", "seccomp = log")])
    def test_the_log_names_the_signal(self, lab: Lab, number: str, hint: str) -> None:
        """What ended the network process, and where it can be told what to do."""
        lab.load()
        with Server(lab, server_conf()) as server:
            os.kill(server.network_process(), signal.Signals[number])
            lost = server.wait_for("network-process-lost", reason=f"it ended ({number})")
            assert hint in lost.get("hint", "")

    def test_a_python_that_is_gone(self, lab: Lab) -> None:
        """Neither process can be started again: the log names the path, and what to do."""
        lab.load()
        python = lab.directory / f"python-{next(lab.numbers)}"
        python.symlink_to(sys.executable)
        with Server(lab, server_conf(), program=(python, LETMEIN, "server")) as server:
            network = server.network_process()
            python.unlink()
            os.kill(network, signal.SIGKILL)
            lost = server.wait_for("network-process-lost", 2)
            said = f"the network process cannot be started: No such file or directory: {python}"
            assert lost["reason"] == said
            assert "restart the server" in lost["hint"]

    def test_a_python_that_was_replaced(self, lab: Lab) -> None:
        """Another version cannot read the compiled program: the log says what to do."""
        lab.load()
        python = lab.directory / f"python-{next(lab.numbers)}"
        python.symlink_to(sys.executable)
        with Server(lab, server_conf(), program=(python, LETMEIN, "server")) as server:
            network = server.network_process()
            python.unlink()
            pretend = "import sys; sys.hexversion += 1; exec(sys.argv.pop(1))"
            command = f'shift 2\nexec {sys.executable} -IB -c "{pretend}" "$@"'
            python.write_text(f"#!/bin/sh\n{command}\n", encoding="utf-8")
            python.chmod(0o755)
            os.kill(network, signal.SIGKILL)
            lost = server.wait_for("network-process-lost", 2)
            assert lost["reason"] == "it was started with another version of Python"
            assert "restart the server" in lost["hint"]

    def test_stopped(self, lab: Lab) -> None:
        """One that stands still is replaced, and leases stay."""
        lab.load()
        with Server(lab, server_conf()) as server:
            assert handshake(lab) == COMEIN
            network = server.network_process()
            os.kill(network, signal.SIGSTOP)
            replaced(server, network, "stopped")
            assert lab.reaches(22, CLIENT_4)

    @pytest.mark.parametrize(
        "attack, reason",
        [
            pytest.param(SPIN, "", id="an endless loop"),
            pytest.param(FLOOD + NOT_READING, "reads nothing", id="it reads nothing"),
        ],
    )
    def test_it_hangs(self, lab: Lab, attack: str, reason: str) -> None:
        """One that loops, or reads nothing, is replaced, and leases stay."""
        lab.load()
        with Server(lab, server_conf(), program=with_attack(lab, attack)) as server:
            assert handshake(lab) == COMEIN
            network = server.network_process()
            os.kill(network, signal.SIGUSR1)
            replaced(server, network, reason)
            assert lab.reaches(22, CLIENT_4)

    @pytest.mark.parametrize("attack", BAD_RECORDS)
    def test_a_bad_record(self, lab: Lab, attack: str) -> None:
        """One that sends what it should not is replaced, and no lease changes."""
        lab.load()
        program = with_attack(lab, BAD_RECORDS[attack])
        with Server(lab, server_conf(), program=program) as server:
            assert handshake(lab) == COMEIN
            leases, network = lab.elements(), server.network_process()
            os.kill(network, signal.SIGUSR1)
            replaced(server, network)
            assert lab.elements() == leases
            server.stop()
            first = next(at for at, line in enumerate(server.lines) if "event=" in line)
            assert_grammar(server.lines[first:])

    @pytest.mark.parametrize("attack", FLOODS)
    def test_a_flood(self, lab: Lab, attack: str) -> None:
        """A flood of records costs no memory, descriptor or disk, and does not hold up the stop."""
        lab.load()
        program = with_attack(lab, FLOOD + FLOODS[attack])
        with Server(lab, server_conf(), program=program, env=unmeasured()) as server:
            assert handshake(lab) == COMEIN
            leases, memory = lab.elements(), resident_kb(server.process.pid)
            things = things_of(server.process.pid)
            used = cpu_seconds(server.process.pid)
            network = server.network_process()
            os.kill(network, signal.SIGUSR1)
            # It is at work, for so long in its own time as no machine makes shorter.
            eventually(lambda: cpu_seconds(server.process.pid) > used + 0.5, "it does not work")
            assert lab.elements() == leases
            reconfigure(server, server_conf())
            assert counted(server)["process"] == server.process.pid
            assert resident_kb(server.process.pid) < memory + 10 * 1024
            eventually(lambda: things_of(server.process.pid) == things, "a descriptor is left")
            assert server.events("network-process-lost") == []
            assert len(server.lines) < 100, "the disk gets full"
            assert lab.reaches(22, CLIENT_4)
            before = children_s() + sum(map(cpu_seconds, (server.process.pid, network)))
            server.stop()
            assert children_s() - before < 3, "it does not stop at once"

    @pytest.mark.parametrize("attack", ATTACKS_ON_THE_MONITOR)
    @pytest.mark.parametrize("seccomp", ["off", "kill"])
    def test_an_attack_on_the_monitor(self, lab: Lab, seccomp: str, attack: str) -> None:
        """Nothing that it does to a kernel object hangs the monitor, or makes the next one deaf."""
        if attack == "signals" and seccomp == "off":
            need_root(lab)  # or both are one account, and may send each other any signal
        lab.load()
        program = with_attack(lab, ATTACKS_ON_THE_MONITOR[attack])
        with contextlib.ExitStack() as stack:
            with lab.client():  # somebody takes the call, and takes nothing more
                sink = stack.enter_context(socket.socket())
            sink.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            sink.bind(("10.1.0.2", 9001))
            sink.listen()
            words = (lab, server_conf(general="control-timeout = 60"))
            server = stack.enter_context(confined(*words, seccomp=seccomp, program=program))
            assert handshake(lab) == COMEIN
            peer = stack.enter_context(Peer(lab))
            peer.send(message(KNOCK, 0x22))
            peer.receive()
            network = server.network_process()
            os.kill(network, signal.SIGUSR1)
            if seccomp == "kill" or "os._exit" in ATTACKS_ON_THE_MONITOR[attack]:
                server.wait_for("network-process-lost")
            assert lab.reaches(22, CLIENT_4), "the lease"
            assert_lives(server)
            assert len(server.events("network-process-lost")) <= 1, server.log

    def test_somebody_else_takes_the_control_port(self, lab: Lab) -> None:
        """In the moment in which its sockets are opened anew: that is told, and tried again."""
        lab.load()
        opening = "        with contextlib.suppress(UserError):  # it is tried again with the next"
        taken = (
            '        taken = getattr(self, "taken", None)\n'
            '        self.taken = taken is None and socket.create_server(("0.0.0.0", 5800))\n'
            "        if taken: taken.close()\n"
        )
        program = altered(lab, (opening, taken + opening))
        with Server(lab, server_conf(), program=program) as server:
            assert handshake(lab) == COMEIN
            os.kill(server.network_process(), signal.SIGKILL)
            lost = server.wait_for("network-process-lost", 2)
            assert "cannot serve the control port 5800/tcp: Address already" in lost["reason"]
            eventually(lambda: server_is_back(server), "no new network process")
            assert_lives(server)
            assert lab.reaches(22, CLIENT_4), "the lease"

    def test_it_reads_slowly(self, lab: Lab) -> None:
        """The administrator is heard all the same."""
        lab.load()
        program = with_attack(lab, FLOOD + SLOW_READER)
        with Server(lab, server_conf(), "--seccomp", "off", program=program) as server:
            assert handshake(lab) == COMEIN
            os.kill(server.network_process(), signal.SIGUSR1)
            assert server.wait() == 0
            server.stop()
            assert lab.elements() == []


# ----------------------------------------------------------------------------
# 7  Sandbox
#
# Whoever takes the network process over gets no key, file, program or right.
# ----------------------------------------------------------------------------

# The rights that the server keeps, as setpriv writes them and by their numbers in
# linux/capability.h.
KEPT_NAMES = "-all,+kill,+setgid,+setuid,+net_bind_service,+net_admin,+sys_chroot"
KEPT_CAPABILITIES = f"{sum(1 << number for number in (5, 6, 7, 10, 12, 18)):016x}"
LOUD = "--user none: the network process keeps the server's rights"


class TestPrivileges:
    """What the two processes may do, as the kernel has it."""

    @pytest.mark.parametrize("seccomp", ["off", "kill"])
    def test_the_network_process(self, lab: Lab, seccomp: str) -> None:
        """It has no capability, root, group or file, and tight limits."""
        need_root(lab)
        lab.load()
        account = pwd.getpwnam(SANDBOX_ACCOUNT)
        # Who starts the server may be in more groups.
        program = ("setpriv", "--groups", "4,20", sys.executable, LETMEIN, "server")
        words = ("-n", "100")
        with confined(lab, server_conf(), *words, seccomp=seccomp, program=program) as server:
            assert handshake(lab) == COMEIN
            network = server.network_process()
            status = proc_status(network)
            assert status["Uid"].split() == [str(account.pw_uid)] * 4
            assert status["Gid"].split() == [str(account.pw_gid)] * 4
            assert status["Groups"] == ""
            for name in ("CapEff", "CapPrm", "CapInh", "CapAmb"):
                assert int(status[name], 16) == 0, name
            assert status["NoNewPrivs"] == "1"
            assert status["Seccomp"] == {"off": "0", "kill": "2"}[seccomp]
            assert status["Threads"] == "1"

            process = Path(f"/proc/{network}")
            root = os.readlink(process / "root")
            assert re.fullmatch(rf"{server.rundir}/letmeind-[0-9a-f]{{16}} \(deleted\)", root)
            assert os.readlink(process / "cwd") == root
            assert list((process / "root").iterdir()) == []
            assert not Path(root.split()[0]).exists()
            assert (process / "environ").read_bytes() == b""
            assert (process / "fd").stat().st_uid == 0  # not dumpable: proc(5)

            # Its channels, and the control port over TCP and over UDP. (The handshake's own may be
            # there for a moment more.)
            wanted = ["/dev/null", "anon_inode:[eventpoll]", "pipe:[]", *["socket:[]"] * 3]

            def open_files() -> list[str]:
                with contextlib.suppress(FileNotFoundError):
                    links = [os.readlink(path) for path in (process / "fd").iterdir()]
                    return sorted(re.sub(r"\d+", "", link) for link in links)
                return []

            eventually(lambda: open_files() == wanted, "it has other files open")

            for name in ("Max processes", "Max file size", "Max core file size"):
                assert proc_limit(network, name) == 0, name
            assert proc_limit(network, "Max open files") == 1124
            assert proc_limit(network, "Max data size") == (128 << 20) + 100 * (16 << 10)

    @pytest.mark.parametrize("seccomp", ["off", "kill"])
    def test_the_monitor(self, lab: Lab, seccomp: str) -> None:
        """It has six capabilities, and other programs of root cannot look into it."""
        lab.load()
        with confined(lab, server_conf(), seccomp=seccomp) as server:
            monitor = server.process.pid
            status = proc_status(monitor)
            assert status["CapEff"] == status["CapPrm"] == KEPT_CAPABILITIES
            assert int(status["CapInh"], 16) == int(status["CapAmb"], 16) == 0
            assert status["NoNewPrivs"] == "1"
            assert status["Seccomp"] == {"off": "0", "kill": "2"}[seccomp]
            assert status["Umask"] == "0077"
            assert proc_limit(monitor, "Max core file size") == 0
            for path in server.rundir.iterdir():
                assert path.stat().st_mode & 0o077 == 0, path

            # Not dumpable: root with no more rights than it has cannot look into it.
            words = ("setpriv", "--bounding-set", KEPT_NAMES)
            with subprocess.Popen([*words, "sleep", "60"]) as other:
                path = Path(f"/proc/{other.pid}/exe")
                eventually(lambda: path.resolve().name != "setpriv", "it does not run")
                assert run(*words, "cat", f"/proc/{other.pid}/environ")
                other.kill()
            denied = lab.command("cat", f"/proc/{monitor}/environ", program=words)
            assert "Permission denied" in denied.err

    def test_a_memory_limit_of_the_system(self, lab: Lab) -> None:
        """Where the server may have less than the network process is given, it has that."""
        lab.load()
        limit = 100 << 20
        program = ("prlimit", f"--data={limit}:{limit}", sys.executable, LETMEIN, "server")
        with confined(lab, server_conf(), program=program) as server:
            assert handshake(lab) == COMEIN
            assert proc_limit(server.network_process(), "Max data size") == limit

    def test_no_account_with_rights(self, lab: Lab) -> None:
        """Neither root, nor root by another name, nor one of root's group."""
        lab.load()
        more = "toor:x:0:12345::/:/bin/sh\nrootgroup:x:12345:0::/:/bin/sh\n"
        accounts = lab.file(Path("/etc/passwd").read_text(encoding="utf-8") + more, mode=0o644)
        call_libc("mount", bytes(accounts), b"/etc/passwd", None, MS_BIND, None)
        try:
            for name in ("root", "toor", "rootgroup"):
                TestStart().fails(lab, f"the account {name} has root's rights", user=name)
        finally:
            call_libc("umount", b"/etc/passwd")
        words = ("the account rootgroup does not exist", "useradd --system")
        TestStart().fails(lab, *words, user="rootgroup")

    def test_user_none_is_loud(self, lab: Lab) -> None:
        """The server warns where its network process keeps its rights."""
        lab.load()
        with Server(lab, server_conf()) as server:
            assert [warning["reason"] for warning in server.events("warning")].count(LOUD) == 1
            status = proc_status(server.network_process())
            assert status["CapEff"] == KEPT_CAPABILITIES
            assert status["NoNewPrivs"] == "1"
        with confined(lab, server_conf()) as server:
            assert bool(server.events("warning", reason=LOUD)) == (not lab.real_root)

    @pytest.mark.parametrize(
        "step, launcher",
        [
            ("enter an empty root directory", ("setpriv", "--bounding-set", "-sys_chroot")),
            ("become the user nobody", ("setpriv", "--bounding-set", "-setgid")),
            ("become the user nobody", ("setpriv", "--bounding-set", "-setuid")),
            ("give up its capabilities", ("setpriv", "--securebits", "+no_setuid_fixup")),
        ],
    )
    def test_no_step_is_left_out(self, lab: Lab, step: str, launcher: tuple[str, ...]) -> None:
        """Where one cannot be made, there is no server."""
        need_root(lab)
        lab.load()
        TestStart().fails(lab, f"cannot {step}:", user=SANDBOX_ACCOUNT, launcher=launcher)

    @pytest.mark.parametrize("more", ["", ",+setuid"])
    def test_rights_without_root(self, lab: Lab, more: str) -> None:
        """Nobody's server that has what it needs as ambient capabilities: if its network process
        is the same account, that keeps them."""
        need_root(lab)
        lab.load()
        account = pwd.getpwnam(SANDBOX_ACCOUNT)
        place = Path(tempfile.mkdtemp(dir=lab.directory))
        conf = lab.file(server_conf())
        for path in (place, conf):
            os.chown(path, account.pw_uid, account.pw_gid)
        rights = f"+net_admin,+sys_chroot,+setgid{more}"
        words = ["setpriv", "--reuid", str(account.pw_uid), "--regid", str(account.pw_gid)]
        words += ["--clear-groups", "--inh-caps", rights, "--ambient-caps", rights]
        # This Python may be in a directory of root's, and so may be the program.
        pythons = (sys.executable, "/usr/bin/python3")
        test = ("-c", "import os, sys; os.execv(sys.executable, ['python', '-V'])")
        found = [name for name in pythons if not lab.command(name, *test, program=words).status]
        if not found:
            pytest.skip(f"{SANDBOX_ACCOUNT} has no Python")
        program = lab.file(LETMEIN.read_text(encoding="utf-8"), mode=0o644)
        words += [found[0], str(program), "server", "--rundir", str(place), "-c", str(conf)]
        result = lab.command("--user", SANDBOX_ACCOUNT, program=words)
        result.assert_error("the network process cannot give up its capabilities")
        assert "letmein-4" not in lab.ruleset()


SIGSYS = "(SIGSYS)"  # how the log says that a filter has ended a process

# What somebody tries who has taken over the network process, and what each of it has to end with,
# by the kernel's rules for accounts alone: without seccomp.
ATTEMPTS = {
    "open('/etc/passwd')": "EACCES",
    "open('@CONF@')": "EACCES",
    "open(f'/proc/{MONITOR}/mem', 'rb')": "EACCES",
    "open('../../../../etc/passwd')": "EACCES",
    "os.listdir('/')": "EACCES",
    "os.listdir('.')": "EACCES",
    "open('/x', 'w')": "EACCES",
    "os.mkdir('/x')": "EACCES",
    "os.write(os.memfd_create('x'), b'#!/bin/sh')": "EFBIG",
    "os.execv('/bin/sh', ['sh'])": "EACCES",
    "os.fork() or os._exit(0)": "EAGAIN",
    "threading.Thread(target=print).start()": "RuntimeError",
    "resource.setrlimit(resource.RLIMIT_NPROC, (9, 9))": "ValueError",
    "os.kill(MONITOR, 0)": "EPERM",
    "os.kill(MONITOR, signal.SIGKILL)": "EPERM",
    "libc('ptrace', 16, MONITOR, 0, 0)": "EPERM",
    "libc('process_vm_readv', MONITOR, VECTOR, 1, VECTOR, 1, 0)": "EPERM",
    "libc('syscall', 438, libc('syscall', 434, MONITOR, 0), 0, 0)": "EPERM",  # pidfd_getfd
    "os.setuid(0)": "EPERM",
    "os.setgroups([0])": "EPERM",
    "os.chroot('.')": "EACCES",
    "libc('unshare', 0x10000000)": "EPERM",  # a user namespace
    "libc('mount', b'/', b'/', None, 0x1000, None)": "EPERM",
    "socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)": "EPERM",
    "socket.socket(socket.AF_PACKET, socket.SOCK_RAW)": "EPERM",
    "socket.socket(socket.AF_INET).bind(('', 81))": "EACCES",
    "list_firewall()": "EPERM",
}

# And what the kernel does not refuse without seccomp. (An address of its own, a port of the lab.)
POSSIBLE = {
    "os.kill(os.getpid(), 0)": "done",
    "socket.socket().connect(('127.0.0.1', 22))": "done",
    "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).bind(('', 0))": "done",
    "socket.socket(socket.AF_UNIX).bind(b'\\0x' + os.urandom(8))": "done",
}

TRYING = """
        vector = ctypes.create_string_buffer(8)
        VECTOR = struct.pack("@PN", ctypes.addressof(vector), 8)

        def list_firewall():
            link = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12)
            link.send(struct.pack("=IHHIIBBH", 20, 10 << 8 | 1, 0x305, 1, 0, 1, 0, 0))
            answer = struct.unpack_from("=IHHIIi", link.recv(8192))
            if answer[1] == 2 and answer[5]:
                raise OSError(-answer[5], "NLMSG_ERROR")

        outcomes = []
        for attempt in @ATTEMPTS@:
            try:
                exec(attempt, globals(), {"VECTOR": VECTOR, "list_firewall": list_firewall})
                outcomes.append("done")
            except OSError as error:
                outcomes.append(errno.errorcode[error.errno])
            except Exception as error:
                outcomes.append(type(error).__name__)
        self.tell(" ".join(outcomes).encode())
"""

# The first thing of each kind that a filter ends the process for. None of it needs another call.
FORBIDDEN = {
    "open": "open('/etc/passwd')",
    "list": "os.listdir('/')",
    "execve": "os.execv('/bin/sh', ['sh'])",
    "fork": "os.fork()",
    "thread": "threading.Thread(target=print).start()",
    "socket": "socket.socket()",
    "connect": "self.listeners[1].connect(('::1', 22))",
    "bind": "self.listeners[1].bind(('::1', 0))",
    "shutdown": "self.listeners[0].shutdown(socket.SHUT_RDWR)",
    "kill": "os.kill(MONITOR, 0)",
    "ptrace": "libc('ptrace', 16, MONITOR, 0, 0)",
    "process_vm_readv": "libc('process_vm_readv', MONITOR, None, 0, None, 0, 0)",
    "memfd_create": "os.memfd_create('x')",
    "prctl": "libc('prctl', 38, 1, 0, 0, 0)",
    "setuid": "os.setuid(os.getpid())",
    "io_uring_setup": "libc('syscall', 425, 1, None)",
    "setsockopt": "self.listeners[1].setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)",
    "listen": "self.listeners[0].listen(0)",
    "ioctl": "self.listeners[0].setblocking(True)",
    "fcntl": "libc('fcntl', self.pipe, 1031, 4096)",  # F_SETPIPE_SZ
    "the pid of a peer": "self.link.getsockopt(socket.SOL_SOCKET, 77, 4)",  # SO_PEERPIDFD
    "half a datagram": "self.listeners[1].sendmsg([b'x'], [], 0x8000, ('::1', 9))",  # MSG_MORE
    "to read twice": "self.link.recv(1, socket.MSG_PEEK)",
    "another timer": "signal.setitimer(signal.ITIMER_REAL, 1)",
}

EVERY_RECORD = """
        ids = itertools.product(range(6), (0, 1, 2, 0xFFFFFFFF), (0, 0x22, 0x23, 0x26, 0x99))
        for operation, user, resource_id in ids:
            payload = unsigned(operation, user, resource_id, os.urandom(32))
            for kind, protocol in itertools.product((FIRST, SECOND), (TCP, UDP)):
                self.say(kind, protocol, payload)
                self.hear()
        for kind in (READY, COUNTS):
            self.say(kind, payload=os.urandom(56))
        self.tell(b"these were all")
"""

DIVERT = """
        Honest = Hostile.__mro__[1]
        mine = IPV4_MAPPED + bytes([10, 77, 7, 7])
        Hostile._send = lambda self, record: Honest._send(self, record._replace(address=mine))
"""


class TestTakeover:
    """Somebody has taken over the process that faces the internet: nothing to steal in there, and
    nothing to do."""

    def test_no_key_is_in_its_reach(self, lab: Lab) -> None:
        """No key is in its memory, command line or environment."""
        lab.load()
        with confined(lab, server_conf(general="control-error-policy = always")) as server:
            for protocol, source in (("tcp", CLIENT_4), ("udp", CLIENT_6)):
                assert handshake(lab, 0x23, KNOCK, protocol, source) == COMEIN
                assert handshake(lab, 0x23, REVOKE, protocol, source) == COMEIN
                refused_knock(lab, protocol, source)
            reconfigure(server, server_conf())
            network = server.network_process()
            memory = memory_of(network)
            assert MAGIC in memory
            assert keys_in(memory) == []
            for name in ("cmdline", "environ"):
                assert keys_in(Path(f"/proc/{network}/{name}").read_bytes()) == []
            # That they would be found where they are.
            assert len(keys_in(memory_of(server.process.pid))) >= len(KEYS)

    def test_what_the_kernel_refuses_without_seccomp(self, lab: Lab) -> None:
        """And what it does not: without seccomp the process can make sockets and connect them."""
        need_root(lab)
        lab.load()
        conf = str(lab.file(server_conf()))
        attempts = {text.replace("@CONF@", conf): end for text, end in ATTEMPTS.items()}
        wanted = {**attempts, **POSSIBLE}
        program = with_attack(lab, TRYING.replace("@ATTEMPTS@", repr(list(wanted))))
        with confined(lab, server_conf(), seccomp="off", program=program) as server:
            assert handshake(lab) == COMEIN
            leases, rules = lab.elements(), our_rules()
            network = server.network_process()
            os.kill(network, signal.SIGUSR1)
            replaced(server, network)
            (lost,) = server.events("network-process-lost")
            assert dict(zip(wanted, lost["reason"].split())) == wanted
            assert len(lost["reason"].split()) == len(wanted)
            assert lab.elements() == leases
            assert our_rules() == rules

    @pytest.mark.parametrize("call", FORBIDDEN)
    def test_what_ends_it_under_seccomp(self, lab: Lab, call: str) -> None:
        """Each forbidden call ends it, and changes nothing."""
        lab.load()
        program = with_attack(lab, f"exec({FORBIDDEN[call]!r})")
        with confined(lab, server_conf(), seccomp="kill", program=program) as server:
            assert handshake(lab) == COMEIN
            leases, rules, network = lab.elements(), our_rules(), server.network_process()
            os.kill(network, signal.SIGUSR1)
            replaced(server, network, SIGSYS)
            assert lab.elements() == leases
            assert our_rules() == rules

    def test_what_does_not_end_it(self, lab: Lab) -> None:
        """That it was the call in the test above, and not the way to it."""
        lab.load()
        program = with_attack(lab, "exec('self.say(COUNTS)')")
        with confined(lab, server_conf(), seccomp="kill", program=program) as server:
            network = server.network_process()
            for _ in range(3):
                os.kill(network, signal.SIGUSR1)
                assert handshake(lab) == COMEIN
            assert server.network_process() == network
            assert not server.events("network-process-lost")

    @pytest.mark.skipif(platform.machine() != "x86_64", reason="of x86_64 alone")
    def test_no_call_by_another_door(self, lab: Lab) -> None:
        """Linux for x86_64 has the calls of i386 as well, with other numbers: 20 is there getpid
        and not writev."""
        lab.load()
        code = bytes.fromhex("b814000000cd80c3")  # mov $20, %eax; int $0x80; ret
        attack = f"""
        page = mmap.mmap(-1, 4096, prot=7)
        page.write({code!r})
        ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
        self.tell(b"it has called")
"""
        program = with_attack(lab, attack)
        with confined(lab, server_conf(), seccomp="kill", program=program) as server:
            network = server.network_process()
            os.kill(network, signal.SIGUSR1)
            lost = server.wait_for("network-process-lost")
            assert re.search("SIGSYS|SIGSEGV", lost["reason"]), lost

    @pytest.mark.parametrize("seccomp", ["off", "kill"])
    def test_no_record_opens_a_port(self, lab: Lab, seccomp: str) -> None:
        """No record without a client's proof opens a port."""
        lab.load()
        program = with_attack(lab, EVERY_RECORD)
        with confined(lab, server_conf(), seccomp=seccomp, program=program) as server:
            rules, network = our_rules(), server.network_process()
            os.kill(network, signal.SIGUSR1)
            replaced(server, network, "these were all")
            assert lab.elements() == []
            assert our_rules() == rules
            assert not server.events("granted", resource="00000022")

    def test_it_can_divert_a_lease_and_no_more(self, lab: Lab) -> None:
        """What a man in the middle can do: one lease for one knock of somebody who has the key,
        for what was knocked for."""
        lab.load()
        with confined(lab, server_conf(), program=with_attack(lab, DIVERT)) as server:
            os.kill(server.network_process(), signal.SIGUSR1)
            assert handshake(lab) == COMEIN
            assert not lab.reaches(22, CLIENT_4)
            assert lab.reaches(22, "10.77.7.7")
            assert len(lab.elements()) == 1
            assert server.wait_for("granted")["peer"] == "10.77.7.7"


def forbidden_call_is_logged(pid: int, number: int) -> bool:
    """Whether the kernel's log tells of this call: type 1326 is AUDIT_SECCOMP."""
    text = subprocess.run(["dmesg"], capture_output=True, encoding="utf-8").stdout
    return bool(re.search(rf"type=1326 .* pid={pid} .* syscall={number} .* code=0x7ffc0000", text))


def run_python(lab: Lab, words: Sequence[str | Path], tries: int = 10) -> Iterator[int]:
    """Run a program several times; yields how it was called by the kernel."""
    for _ in range(tries):
        with subprocess.Popen(
            [str(word) for word in words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            assert process.wait(LIMIT_S) == 0
        yield process.pid


# A call that no process of ours makes, harmless and on every machine: getpgid(2), and its number.
GETPGID = {"x86_64": 121, "aarch64": 155}

# What the monitor and the client never do.
NEVER_CALLED = {
    "getpgid": "os.getpgid(0)",
    "sync": "os.sync()",
    "ptrace": "__import__('ctypes').CDLL(None).ptrace(0, 0, 0, 0)",
    "mount": "__import__('ctypes').CDLL(None).mount(None, None, None, 0, None)",
    "unshare": "__import__('ctypes').CDLL(None).unshare(0)",
    "init_module": "__import__('ctypes').CDLL(None).syscall(@NUMBER@, 0, 0, 0)",
}
CLIENT_STEP = "    system_call_filter(config.seccomp, CLIENT_CALLS)()\n"


class TestSeccomp:
    """`seccomp = kill` and `log`."""

    def client(
        self, lab: Lab, *words: str, conf: str = CLIENT_CONF, script: Path = LETMEIN
    ) -> Result:
        with lab.client():
            program = (sys.executable, script, "-c", lab.file(conf), "--seccomp", "kill")
            return lab.command(*words, program=program)

    def test_everything_under_kill(self, lab: Lab) -> None:
        """All that client and server can do, once."""
        lab.load()
        with confined(lab, server_conf(), seccomp="kill") as server:
            pair = (server.process.pid, server.network_process())
            for options in ("-T both.test 22", "-U both.test 23", "-4 both.test 24"):
                words = ("--verbose", "knock", *options.split())
                self.client(lab, *words, script=lab.patient).assert_good()
            self.client(lab, "knock", "-6", "-U", "both.test", "25").assert_good()
            assert lab.reaches(25, CLIENT_6)
            for source in (CLIENT_4, CLIENT_6):
                assert lab.reaches(22, source) and lab.reaches(23, source, "udp")
            assert lab.reaches(24, CLIENT_4, "udp")

            # Errors.
            wrong = CLIENT_CONF.replace(KEYS[1].hex(), KEYS[2].hex())
            hurried = client_conf(timeout=0.5)
            self.client(lab, "knock", "v4dead.test", "22").assert_good()
            self.client(lab, "knock", "dead.test", "22", conf=hurried).assert_error("no answer")
            self.client(lab, "knock", SERVER_4, "22", conf=wrong).assert_error("closed")
            self.client(lab, "knock", SERVER_4, "27").assert_error("rejected")
            self.client(lab, "knock", SERVER_4, "99").assert_error("no port 99")
            self.client(lab, "knock", "nowhere.invalid", "22").assert_error("nowhere.invalid")
            self.client(lab, "knock", "-P", "5801", SERVER_4, "22").assert_error("nothing listens")
            self.client(lab, "gen-key").assert_good()
            refused_burst(lab)

            # Somebody else's changes, the administrator's, and time.
            leases = len(lab.elements())
            lab.load()
            server.wait_for("healed")
            assert len(lab.elements()) >= leases - 1
            self.client(lab, "revoke", "both.test", "22").assert_good()
            eventually(lambda: not lab.reaches(25, CLIENT_6), "no lease ends")
            reconfigure(server, server_conf(port="5801 / tcp, udp"))
            reconfigure(server, "nonsense", good=False)
            reconfigure(server, server_conf())
            more = ("--rundir", server.rundir, "--seccomp", "kill", "-c", server.path)
            for command in (("status",), ("server", "--check", "--user", SANDBOX_ACCOUNT)):
                assert lab.command(*command, *more).status == 0
            assert counted(server)["process"] == server.process.pid
            storm(lab, [f"10.77.5.{number}" for number in range(50)], 20, KNOCK)
            assert pair == (server.process.pid, server.network_process())

            # Its network process again and again.
            os.kill(pair[1], signal.SIGKILL)
            replaced(server, pair[1])
            assert handshake(lab) == COMEIN

    def test_nothing_is_compiled(self, lab: Lab) -> None:
        """A Python that has compiled none of its modules would write them down as it goes."""
        lab.load()
        place = Path(tempfile.mkdtemp(dir=lab.directory))
        words = ("env", "-u", "PYTHONDONTWRITEBYTECODE", f"PYTHONPYCACHEPREFIX={place}")
        python = (*words, sys.executable, LETMEIN)
        with confined(lab, server_conf(), seccomp="kill", program=(*python, "server")) as server:
            call = ("-c", lab.file(CLIENT_CONF), "--seccomp", "kill", "knock", "both.test", "22")
            with lab.client():
                lab.command(*call, program=python).assert_good()
            server.wait_for("granted")
            assert counted(server)["process"] == server.process.pid
            reconfigure(server, server_conf())
            command = Path(f"/proc/{server.network_process()}/cmdline").read_bytes()
            assert b"-IB" in command.split(b"\0")

    @pytest.mark.parametrize("mode", ["log", "kill"])
    @pytest.mark.parametrize("place", ["file", "option"])
    def test_no_pyseccomp(self, lab: Lab, mode: str, place: str) -> None:
        """Without it neither server nor client starts, and both say how to get it."""
        lab.load()
        program = (sys.executable, "-S", LETMEIN)  # -S: nothing but the standard library
        words = ("--seccomp", mode) if place == "option" else ()
        general = f"seccomp = {mode}" if place == "file" else ""
        rules = lab.ruleset()
        for command, conf in (
            (("server", "--rundir", lab.directory, "--user", "none"), server_conf(general=general)),
            (("knock", SERVER_4, "22"), CLIENT_CONF.replace("[GENERAL]", f"[GENERAL]\n{general}")),
        ):
            result = lab.command("-c", lab.file(conf), *words, *command, program=program)
            result.assert_error(f"seccomp = {mode} does not work here", "pip install pyseccomp")
        assert lab.ruleset() == rules
        # With it, or without seccomp, the same commands work.
        lab.command("gen-key", program=program).assert_good()

    def test_log(self, lab: Lab) -> None:
        """`log` lets a call through, and tells the kernel's log of it."""
        need_seccomp()
        number = GETPGID.get(platform.machine())
        if number is None:
            pytest.skip(f"the number of getpgid is not known on {platform.machine()}")
        script = (
            "import os, pyseccomp; f = pyseccomp.SyscallFilter(pyseccomp.ALLOW);"
            "f.add_rule(pyseccomp.LOG, 'getpgid'); f.load(); os.getpgid(0)"
        )
        control = run_python(lab, (sys.executable, "-c", script))
        if not any(forbidden_call_is_logged(pid, number) for pid in control):
            pytest.skip("here the kernel's log tells nobody, or nothing of filtered calls")
        lab.load()
        with confined(lab, server_conf(), seccomp="log") as server:
            for pid in (server.process.pid, server.network_process()):
                assert proc_status(pid)["Seccomp"] == "2"
            program = altered(lab, (CLIENT_STEP, CLIENT_STEP + "    os.getpgid(0)\n"))[:2]
            conf = lab.file(CLIENT_CONF)
            words = (*program, "-c", conf, "--seccomp", "log", "knock", SERVER_4, "22")
            with lab.client():
                runs = run_python(lab, words)
                assert any(forbidden_call_is_logged(pid, number) for pid in runs)
            assert lab.reaches(22, CLIENT_4)
            assert not server.events("network-process-lost")

    @pytest.mark.parametrize("call", NEVER_CALLED)
    def test_what_ends_monitor_and_client(self, lab: Lab, call: str) -> None:
        """A call that neither of them makes ends it under `kill`."""
        need_seccomp()
        lab.load()
        number = {"x86_64": "175", "aarch64": "105"}.get(platform.machine(), "105")
        statement = NEVER_CALLED[call].replace("@NUMBER@", number)
        changes = (CLIENT_STEP, f"{CLIENT_STEP}    {statement}\n")
        hup = "                if self.is_reload_wanted:\n"
        program = altered(lab, changes, (hup, f"{hup}                    {statement}\n"))
        client = (*program[:2], "-c", lab.file(CLIENT_CONF), "--seccomp")
        with confined(lab, server_conf(), seccomp="kill", program=program) as server:
            network = server.network_process()
            with lab.client():
                ended = lab.command("knock", SERVER_4, "22", program=(*client, "kill"))
                assert ended.status == -signal.SIGSYS
                lab.command("knock", SERVER_4, "22", program=(*client, "off")).assert_good()
            server.wait_for("granted")
            assert len(server.events("granted")) == 1
            server.process.send_signal(signal.SIGHUP)
            assert server.wait() == -signal.SIGSYS
            eventually(lambda: not alive(Path(f"/proc/{network}")), "the network process lives on")


KNOCKERS = list(itertools.product(("tcp", "udp"), (CLIENT_4, CLIENT_6)))

# What goes out of a network process that was taken over: a connection, a datagram of a socket of
# its own, and one of the control port's socket. In between it serves.
CALL_OUT = """
        outcomes = []
        for host in ("10.1.0.2", "fd01::2"):
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            calling = socket.socket(family)
            calling.settimeout(0.5)
            sending = socket.socket(family, socket.SOCK_DGRAM)
            mapped = host if family == socket.AF_INET6 else f"::ffff:{host}"
            for attempt in (
                lambda: calling.connect((host, 9001)),
                lambda: sending.sendto(b"own", (host, 9002)),
                lambda: self.listeners[1].sendto(b"control port", (mapped, 9002)),
            ):
                try:
                    attempt()
                    outcomes.append("done")
                except OSError:
                    outcomes.append("refused")
        self.tell(" ".join(outcomes).encode())
"""


class TestEgress:
    @pytest.mark.parametrize("guarded", [False, True])
    def test_it_calls_nobody(self, lab: Lab, guarded: bool) -> None:
        """The rule of nftables.conf: who took the network process over can call nobody, without
        seccomp, and knocks are answered all the same."""
        need_root(lab)
        lab.load(more=egress_rules(SANDBOX_ACCOUNT) if guarded else "")
        with contextlib.ExitStack() as stack:
            called = []
            with lab.client():
                for kind, port in ((socket.SOCK_STREAM, 9001), (socket.SOCK_DGRAM, 9002)):
                    called.append(stack.enter_context(socket.socket(socket.AF_INET6, kind)))
                    called[-1].bind(("::", port))
                    called[-1].settimeout(0.3 if guarded else 5)
            called[0].listen()
            program = with_attack(lab, CALL_OUT)
            server = confined(lab, server_conf(), seccomp="off", program=program)
            with server:
                network = server.network_process()
                for protocol, source in KNOCKERS:
                    assert handshake(lab, 0x23, KNOCK, protocol, source) == COMEIN
                    assert lab.reaches(23, source)
                    assert handshake(lab, 0x23, REVOKE, protocol, source) == COMEIN
                os.kill(network, signal.SIGUSR1)
                outcome = server.wait_for("network-process-lost")["reason"]
                came = set()
                with contextlib.suppress(socket.timeout):
                    for _ in range(2):
                        came.add(("call", str(called[0].accept()[1][0])))
                with contextlib.suppress(socket.timeout):
                    for _ in range(4):
                        data, name = called[1].recvfrom(100)
                        came.add((data.decode(), str(name[0])))
                if guarded:
                    assert came == set()
                    assert outcome.split() == ["refused"] * 6
                else:
                    whats = ("call", "own", "control port")
                    hosts = (f"::ffff:{SERVER_4}", SERVER_6)
                    assert came == set(itertools.product(whats, hosts))
                    assert outcome.split() == ["done"] * 6
                replaced(server, network)


# ----------------------------------------------------------------------------
# 8  Command line
#
# Each command does what its help says, and its errors name the way out.
# ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, complaint",
    [
        pytest.param("", "command", id="no command"),
        pytest.param("open host 22", "open", id="unknown command"),
        pytest.param("--frobnicate knock host 22", "--frobnicate", id="unknown option"),
        pytest.param("knock", "HOST", id="no host"),
        pytest.param("knock host", "PORT", id="neither port nor resource"),
        pytest.param("revoke host", "--resource", id="neither port nor resource to revoke"),
        pytest.param("knock host 22 -r BC5D8077", "", id="port and resource"),
        pytest.param("knock -r BC5D8077 host 22", "", id="resource and port"),
        pytest.param("knock host 22 23 -r BC5D8077", "", id="two ports and resource"),
        pytest.param("knock host 0", "65535", id="port 0"),
        pytest.param("knock host 65536", "65535", id="port 65536"),
        pytest.param("knock host abc", "65535", id="port abc"),
        pytest.param("knock host 22 -P 0", "65535", id="server port 0"),
        pytest.param("knock host 22 -P 65536", "65535", id="server port 65536"),
        pytest.param("knock host -r xyz", "hex", id="bad resource"),
        pytest.param("knock host -r 123456789", "hex", id="resource of 9 digits"),
        pytest.param("knock host 22 -u root", "hex", id="bad user"),
        pytest.param("gen-key -u root", "hex", id="bad user for a key"),
        pytest.param("--seccomp on knock host 22", "kill", id="bad seccomp"),
        pytest.param("-c", "", id="option without value"),
        pytest.param("server -n 0", "1", id="no connections"),
        pytest.param("server -n 20001", "20000", id="too many connections"),
        pytest.param("server --user 0day!", "a user's name", id="no name of a user"),
        pytest.param("revoke host 22 -- ls", "revoke takes no COMMAND", id="COMMAND of revoke"),
        pytest.param("knock host 22 --", "COMMAND is missing", id="no COMMAND behind --"),
        pytest.param("connect host 22 23", "one PORT", id="two ports to connect to"),
        pytest.param("connect host", "PORT", id="no port to connect to"),
        pytest.param("status 5", "'5' is one word too many", id="word too many"),
        pytest.param("client-conf", "-u/--user", id="whose client file"),
        pytest.param("knock host 22 -x", "'-x'", id="unknown letter"),
        pytest.param("knock host 22 -4x", "'-x'", id="unknown letter behind a known one"),
        pytest.param("knock host 22 --quiet=1", "-q/--quiet takes no value", id="value of a flag"),
        pytest.param("knock host 22 -u", "-u/--user needs its ID", id="no value at the end"),
        pytest.param("knock host 22 -u --quiet", "-u/--user needs its ID", id="no value"),
        pytest.param("revoke host 22 --keep", "--keep", id="nothing to keep"),
        pytest.param("connect host 22 -q", "-q", id="always quiet"),
        pytest.param("completion tcsh", "bash, zsh, fish", id="unknown shell"),
    ],
)
def test_usage_error(conf: Path, words: str, complaint: str) -> None:
    """Each wrong command line is status 2, what is wrong, and what is right."""
    done = program(*([] if words == "-c" else ["-c", conf]), *words.split())
    assert (done.returncode, done.stdout) == (2, "")
    first, second = done.stderr.splitlines()
    assert first.startswith("letmein: error: ") and complaint in first + second
    starts = "usage: letmein |did you mean|'letmein .*--help' |expected: |for example: "
    assert re.match(f"  ({starts})", second)


@pytest.mark.parametrize(
    "words, suggestion",
    [
        ("kock server 22", "there is no command 'kock'\n  did you mean knock? "),
        ("knock --quite server 22", "there is no option '--quite'\n  did you mean --quiet? "),
        ("knock server 22 -ualice", "-u/--user: 'alice' is not valid\n  expected: 1 to 8 hex"),
        ("knock server ssh", "PORT: 'ssh' is not valid\n  expected: a number from 1 to 65535"),
        ("service upstart", "KIND: 'upstart' is not valid\n  expected: one of: systemd, "),
        ("revoke host 22 --keep", "no option '--keep'\n  'letmein revoke --help' lists all"),
        ("--rundir /x status", "in front of a command\n  put it behind the command: letmein"),
        ("-v knock server 22", "-v prints the version; it does not go with knock\n  did you mean"),
        ("", "a command is missing\n  for example: letmein knock server 22; 'letmein --help'"),
        ("help kock", "there is no command 'kock'\n  did you mean knock? "),
        ("network-process", "there is no command 'network-process'\n"),
        ("knock server", "\n  usage: letmein knock [OPTION...] HOST (PORT... | -r ID...)"),
    ],
)
def test_a_usage_error_says_what_to_do(words: str, suggestion: str) -> None:
    """It names the option, and what may have been meant; its usage is that of the one command."""
    done = program(*words.split())
    assert done.returncode == 2 and suggestion in done.stderr, done.stderr


HIDDEN = {"--dns", "--dns-crypt", "--no-systemd"}  # of the Rust programs; they do nothing


@pytest.mark.parametrize("command", (letmein.LETMEIN, *letmein.COMMANDS), ids=lambda c: c.name)
def test_help(command: letmein.Command) -> None:
    """It explains each option and argument, has examples, and fits 80 columns. `help COMMAND` is
    the same, wherever its options are."""
    done = program("help", *filter(None, [command.name]))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == program(*filter(None, [command.name]), "-h").stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    options = [*command.arguments, *letmein.options_of(command)]
    assert {name for o in options if not o.text for name in o.names} <= HIDDEN
    for option in options:
        if option.text:
            names = ", ".join(option.names)
            assert re.search(rf"^  {names}( {option.metavar or '.*'})?\s+\S", done.stdout, re.M)
            assert option.metavar != "N" and option.text[0].islower() and option.text[-1] != "."
    assert command.about in done.stdout
    assert f"\nExamples:\n{command.examples}\n" in done.stdout


def test_examples_are_right() -> None:
    """Each example of --help is a command line that we take."""
    for command in (letmein.LETMEIN, *letmein.COMMANDS):
        found = re.findall(r"^  letmein (.*?)(?:   .*| [>|].*)?$", command.examples, re.M)
        assert found or command.name in ("connect", "completion")
        for words in found:
            assert letmein.parse_words(words.split()).command


def test_help_on_a_terminal() -> None:
    """It is as wide as the terminal, but not wider than people read."""
    ours, theirs = os.openpty()
    widths = []
    for columns in (40, 90, 300):
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
        process = subprocess.Popen([sys.executable, LETMEIN, "help", "knock"], stdout=theirs)
        text = ""
        while "close it\r\n" not in text:
            text += os.read(ours, 65536).decode()
        assert process.wait(LIMIT_S) == 0
        options = text.partition("Options:")[2].partition("Examples:")[0]
        widths.append(max(map(len, options.split("\r\n"))))
    assert widths[0] <= 52 < 80 < widths[1] <= 90 < widths[2] <= 100
    os.close(ours)
    os.close(theirs)


COMPLETED = {  # by the words so far what the last one may become
    "letmein kn": "knock",
    "letmein -c file knock server --server-port-": "--server-port-tcp --server-port-udp",
    "letmein service ope": "openwrt",
    "letmein status --j": "--json",
    "letmein revoke --kee": "",
}


@pytest.mark.parametrize("shell", ["bash", "fish"])
def test_completion(shell: str) -> None:
    """The shell itself, where it is installed, completes commands, options and values."""
    if not shutil.which(shell):
        return
    script = program("completion", shell).stdout
    for typed, wanted in COMPLETED.items():
        ask = f"complete -C {shlex.quote(typed)} | cut -f 1"
        if shell == "bash":
            ask = f"COMP_WORDS=({typed}) COMP_CWORD={typed.count(' ')}; _letmein; "
            ask += "printf '%s\\n' ${COMPREPLY[@]}"
        words = [shell, "-c", f"{script}\n{ask}"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=LIMIT_S)
        assert sorted(done.stdout.split()) == wanted.split(), (typed, done)


@pytest.mark.parametrize("option", ["-v", "--version"])
def test_version(option: str) -> None:
    """-v and --version print the version."""
    done = program(option)
    assert done.returncode == 0 and letmein.VERSION in done.stdout and not done.stderr


@pytest.mark.parametrize("text", ["", "[KEYS]\n1 = broken\n", "not a configuration", "[GENERAL\n"])
def test_gen_key(tmp_path: Path, text: str) -> None:
    """A key for any user, whatever the file says, and never the same twice."""
    path = tmp_path / "letmein.conf"
    path.write_text(text)
    path.chmod(0o600)
    lines = [
        program("-c", path, "gen-key").stdout,
        program("-c", path, "gen-key", "-u", "2a").stdout,
    ]
    assert re.fullmatch("00000000 = [0-9A-F]{64}\n", lines[0])
    assert re.fullmatch("0000002A = [0-9A-F]{64}\n", lines[1])
    assert set(parse("[KEYS]\n" + "".join(lines), server=False).keys) == {0, 42}
    assert lines[0][11:] != lines[1][11:]


def test_gen_key_takes_the_next_free_user(tmp_path: Path) -> None:
    """Its lines can be added to letmeind.conf one after the other, and the client is told which
    default-user it needs; a user who is named is replaced, and that is said."""
    path = tmp_path / "letmeind.conf"
    path.write_text("[KEYS]\n")
    path.chmod(0o600)
    errors = []
    for _ in range(3):
        done = program("-c", path, "gen-key")
        path.write_text(path.read_text() + done.stdout)
        errors.append(done.stderr)
    assert set(parse(path.read_text(), server=False).keys) == {0, 1, 2}
    assert f"user 00000000 has a key in {path}, so this one is for user 00000002" in errors[2]
    assert ["default-user = 00000002" in text for text in errors] == [False, False, True]
    done = program("-c", path, "gen-key", "-u", "1")
    assert done.stdout.startswith("00000001 = ")
    assert f"user 00000001 has a key in {path}: this line replaces that one" in done.stderr


def test_gen_key_knows_the_keys_of_included_files(including: Path) -> None:
    """A user whose key is in an included file has one already."""
    (including / "a.conf").write_text(f"[KEYS]\n0 = {OTHER_KEY.hex()}\n")
    done = program("-c", including.with_name("letmeind.conf"), "gen-key")
    assert done.stdout.startswith("00000002 = ") and "user 00000000 has a key in" in done.stderr


def test_gen_key_says_where_the_line_belongs() -> None:
    """On standard error: standard output is the line alone."""
    done = program("gen-key", "-u", "7")
    assert len(done.stdout.splitlines()) == 1
    assert "letmeind.conf" in done.stderr and "client-conf" in done.stderr


def test_gen_key_for_the_default_user(tmp_path: Path) -> None:
    """Without -u the key is for the file's default-user."""
    path = tmp_path / "letmein.conf"
    path.write_text("[CLIENT]\ndefault-user = 7\n")
    path.chmod(0o600)
    done = program("-c", path, "gen-key")
    assert done.stdout.startswith("00000007 = ") and done.returncode == 0


def test_gen_key_never_prints_a_key_twice(tmp_path: Path) -> None:
    """A key is 32 random bytes."""
    lines = [program("-c", tmp_path / "none", "gen-key", "-u", "2a").stdout for _ in range(2)]
    assert lines[0] != lines[1]
    assert all(re.fullmatch("0000002A = [0-9A-F]{64}\n", line) for line in lines)


def test_client_conf(tmp_path: Path) -> None:
    """It is a file that the client reads, with what this user may have on the server, and no more;
    nothing but the file goes to standard output."""
    path = tmp_path / "letmeind.conf"
    lines = ["22 = port: 22 / timeout: 60", "23 = port: 23 / tcp, udp / users: 2",
             "40 = jump / input: DOOR / input-match: saddr", "58 = port: 5900"]
    path.write_text("\n".join([
        "[GENERAL]", "port = 5900 / udp", "[KEYS]", f"1 = {KEY.hex()}", f"2 = {OTHER_KEY.hex()}",
        "[RESOURCES]", *lines, server_text("NFTABLES"),
    ]))  # fmt: skip
    path.chmod(0o600)
    done = program("-c", path, "client-conf", "-u", "1", "--host", "server.example")
    assert done.returncode == 0, done
    config = parse(done.stdout, server=False)
    assert not config.warnings
    assert (config.port, config.protocols, config.default_user) == (5900, ("udp",), 1)
    assert config.keys == {1: KEY}
    assert [(r.identifier, r.port, r.timeout) for r in config.resources.values()] == [
        (0x22, 22, 60), (0x40, 0, 600),
    ]  # fmt: skip
    assert "letmein knock server.example 22" in done.stdout
    with path.open("a") as file:
        file.write("[USERS]\n1 = timeout: 90 / not-after: 9999-12-31\n")
    limited = program("-c", path, "client-conf", "-u", "1", "--host", "server.example").stdout
    resources = parse(limited, server=False).resources.values()
    assert [each.timeout for each in resources] == [60, 90]
    assert "up to the end of 9999-12-31 (UTC)" in limited
    for host in ("a\n[KEYS]", "a b", "a\x1b[2J", ""):
        done = program("-c", path, "client-conf", "-u", "1", "--host", host)
        assert (done.returncode, done.stdout) == (2, ""), "it would write lines of its own"
    done = program("-c", path, "client-conf", "-u", "9")
    assert done.returncode == 1 and not done.stdout
    assert "no key for user 00000009" in done.stderr and "gen-key -u 9" in done.stderr


def test_no_client_file(tmp_path: Path) -> None:
    """Whoever has none is told where it was looked for, and who can make one."""
    done = program("-c", tmp_path / "missing.conf", "knock", "host", "22")
    assert done.returncode == 1
    assert f"no configuration file, and so no key: {tmp_path}/missing.conf" in done.stderr
    assert "client-conf" in done.stderr and "check the path" in done.stderr
    said = failure(program("-c", tmp_path, "knock", "host", "22"))
    assert f"{tmp_path}: cannot be read: Is a directory\n  name a letmein.conf that you" in said


@pytest.mark.parametrize("command", [["knock", "127.0.0.1", "22"], ["server"], ["status"]])
def test_configuration_that_cannot_be_used(tmp_path: Path, command: list[str]) -> None:
    """Each command names the bad line, and not the key."""
    path = tmp_path / "bad.conf"
    path.write_text(server_text("KEYS", f"1 = {KEY_TEXT[:-1]}"))
    path.chmod(0o600)
    text = failure(program("-c", path, *command))
    assert f"{path}:2: [KEYS] 1: " in text and "64 hex digits" in text and KEY_TEXT[:16] not in text


@pytest.mark.parametrize("command", ["server", "status"])
def test_server_without_a_configuration(tmp_path: Path, command: str) -> None:
    """The server's commands name a file that is missing."""
    assert "no such file" in failure(program(command, "-c", tmp_path / "absent.conf")).lower()


class TestCounters:
    """What `status` tells of the server itself."""

    def test_a_lease_that_has_ended(self, lab: Lab) -> None:
        """It does not count any more, even if nobody has knocked since."""
        lab.load()
        with Server(lab, server_conf()) as server:
            assert handshake(lab, 0x25) == COMEIN
            assert counted(server)["leases"] == 1
            eventually(lambda: lab.elements() == [], "it does not end")
            eventually(lambda: counted(server)["leases"] == 0, "it still counts")

    def test_what_is_counted(self, lab: Lab) -> None:
        """`status` has each refusal by its reason, and says when no server runs."""
        lab.load()
        conf = server_conf(general="control-error-policy = always\ncontrol-timeout = 60")
        with Server(lab, conf, "-N", "2") as server:
            before = counted(server)
            assert before["process"] == server.process.pid
            assert before["leases"] == 0
            assert before["refused"] == {}
            for source in (CLIENT_4, CLIENT_6):
                assert handshake(lab, source=source) == COMEIN
            assert handshake(lab, operation=REVOKE, protocol="udp") == COMEIN
            for protocol in ("tcp", "udp"):
                refused_knock(lab, protocol, OTHER_4)
                refused_knock(lab, protocol, OTHER_4, user=9)
            refused_knock(lab, "udp", OTHER_4, user=9, resource=0x23)
            assert handshake(lab, 0x27) == GOAWAY
            # Nobody else is late, however busy the machine is.
            with Peer(lab, source=OTHER_4) as peer:
                reconfigure(server, conf.replace("control-timeout = 60", "control-timeout = 0.1"))
                assert peer.rest() == b"", "it is late"
            reconfigure(server, conf)
            idle = [Peer(lab) for _ in range(3)]
            assert idle[0].rest() == b"", "it is evicted"
            for peer in idle[1:]:
                peer.socket.close()
            with Peer(lab, source="10.77.6.1") as peer:
                peer.send(b"GET / HTTP/1.1\r\n" * 4)
                assert peer.rest() == b""
            with Peer(lab, "udp") as peer:
                peer.send(b"GET / HTTP/1.1\r\n" * 4)
                peer.send(b"?")
            lab.load()
            server.wait_for("healed")
            expected = {
                "granted": 2, "revoked": 1, "refused": 5, "failed": 1, "healed": 1,
                "late": 1, "evicted": 1, "garbage": 3,
            }

            def all_counted() -> bool:
                found = counted(server)["counts"]
                return all(found.get(name) == number for name, number in expected.items())

            # The network process tells what it has counted every second or so.
            eventually(all_counted, f"{expected} are not counted")
            after = counted(server)
            assert after["refused"] == {"wrong key": 2, "unknown user": 3}
            assert after["leases"] == 1
            arguments = ("status", "--rundir", server.rundir, "-c", server.path)
            text = lab.command(*arguments).out
            for name, number in {**expected, **after["refused"]}.items():
                assert f"{name} {number}" in text
            server.stop()
            assert counted(server) is None
            said = f"No server for table inet filter runs in {server.rundir}"
            assert said in lab.command(*arguments).out

    def test_who_may_ask(self, lab: Lab) -> None:
        """The administrator, and nobody else: the counters tell of attacks, and who holds what."""
        lab.load()
        with Server(lab, server_conf()) as server:
            path = status_socket(server)
            assert path.stat().st_mode & 0o077 == 0
            if lab.real_root:
                server.rundir.chmod(0o755)
                connect = (
                    "import os, socket, sys; peer = socket.socket(socket.AF_UNIX);"
                    "os.setgroups([]); os.setuid(int(sys.argv[2])); peer.connect(sys.argv[1])"
                )
                for account, good in (("root", True), ("nobody", False)):
                    number = str(pwd.getpwnam(account).pw_uid)
                    program = (sys.executable, "-I", "-c", connect)
                    result = lab.command(path, number, program=program)
                    assert (result.status == 0) == good, result
                    assert good or "PermissionError" in result.err, result
                follow = (
                    "import os, sys; sys.path.insert(0, sys.argv.pop(1)); import letmein;"
                    "os.setgroups([]); os.setuid(65534); sys.exit(letmein.main(sys.argv[1:]))"
                )
                words = ("status", "--follow", "-c", lab.file(server_conf(), mode=0o644))
                program = (sys.executable, "-I", "-c", follow)
                said = lab.command(
                    LETMEIN.parent, *words, "--rundir", server.rundir, program=program
                )
                said.assert_error("cannot read table inet filter: only root may", "as root")
            server.stop()
            assert not path.exists()

    def test_a_successor(self, lab: Lab) -> None:
        """What a killed server left behind is in nobody's way."""
        lab.load()
        with Server(lab, server_conf()) as server:
            assert handshake(lab) == COMEIN
            server.kill()
            assert status_socket(server).exists()
            assert counted(server) is None
            with Server(lab, server_conf(), "--rundir", str(server.rundir)) as successor:
                assert counted(server)["process"] == successor.process.pid
                assert counted(server)["counts"].get("granted", 0) == 0

    def test_readers_that_do_not_read(self, lab: Lab) -> None:
        """200 of them keep nobody out, and do not hold up the stop."""
        lab.load()
        with Server(lab, server_conf()) as server, contextlib.ExitStack() as stack:
            path = str(status_socket(server))
            readers = []
            for _ in range(200):
                readers.append(stack.enter_context(socket.socket(socket.AF_UNIX)))
                # How long connect() may wait for its turn, and recv() for what comes: socket(7).
                for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
                    limit = struct.pack("ll", int(LIMIT_S), 0)
                    readers[-1].setsockopt(socket.SOL_SOCKET, option, limit)
                readers[-1].connect(path)
            assert handshake(lab) == COMEIN
            assert handshake(lab, protocol="udp", source=CLIENT_6) == COMEIN
            assert counted(server)["counts"]["granted"] == 2
            for reader in readers[::2]:
                with reader.makefile("rb") as file:
                    assert json.loads(file.read())["process"] == server.process.pid
            server.stop()


class TestFollow:
    """`letmein status --follow`: whoever reads it can bring another device to the same state."""

    def test_each_change(self, lab: Lab, guarded: Server, watched: WatchedNft) -> None:
        """All that happens to a lease is told, once, with its reason and all fields."""
        knock_all(lab, (CLIENT_4, 0x22, 1))
        with Following(guarded) as following:
            knock_all(lab, (CLIENT_6, 0x23, 2), (CLIENT_6, 0x23, 2), (CLIENT_4, 0x40, 1))
            event = following.wait_for("renewed", address=CLIENT_6)
            assert abs(event.pop("time") - time.time()) < LIMIT_S
            assert event == {
                "event": "renewed", "reason": "", "address": CLIENT_6, "ip_version": 6,
                "protocols": ["tcp", "udp"], "port": 23, "resource": "00000023", "chains": [],
                "user": "00000002", "seconds_left": 600,
            }  # fmt: skip
            event = following.wait_for("opened", resource="00000040")
            assert (event["chains"], event["port"], event["protocols"]) == (["DOOR"], None, [])
            following.assert_agrees(guarded)
            handshake(lab, 0x40, REVOKE)
            following.wait_for("closed", reason="revoked", resource="00000040")
            nft_do(f"delete element inet filter letmein-4 {{ {CLIENT_4} . tcp . 22 }}")
            following.wait_for("closed", reason="by hand", resource="00000022")
            knock_all(lab, (CLIENT_4, 0x25, 1))
            following.wait_for("closed", reason="expired", resource="00000025")
            reconfigure(guarded, watched.conf(nftables="max-nr-rules = 4"))
            knock_all(lab, (CLIENT_4, 0x22, 1))
            following.wait_for("closed", reason="replaced", resource="00000023")
            reconfigure(guarded, watched.conf(RESOURCES.replace("22 = port: 22", "")))
            following.wait_for("closed", reason="configuration", resource="00000022")
            following.assert_agrees(guarded)
            names = [event["event"] for event in following.events]
            assert (names.count("snapshot"), names.count("opened")) == (1, 4)
            assert (names.count("renewed"), names.count("closed")) == (1, 5)

    def test_what_others_change(self, lab: Lab, guarded: Server) -> None:
        """What somebody has added to the kernel's sets by hand, a reader does not keep."""
        with Following(guarded) as following:
            forged = f"{OTHER_4} . tcp . 22 timeout 60s {comment()}"
            nft_do(f"add element inet filter letmein-4 {{ {forged} }}")
            following.wait_for("snapshot", 2)
            following.assert_agrees(guarded)

    def test_the_server_is_killed(self, lab: Lab, guarded: Server) -> None:
        """A reader learns what ends while no server runs, and goes on with the next one. If it is
        there before that has adopted leases, it reads them again: some may not be adopted."""
        knock_all(lab, *HOLDERS, (CLIENT_4, 0x25, 1))
        with Following(guarded) as following:
            guarded.kill()
            following.wait_for("snapshot", 2)
            eventually(lambda: (CLIENT_4, "00000025") not in following.held, "it is not told")
            assert {row.address for row in set().union(*following.held.values())} == {
                CLIENT_4, CLIENT_6, OTHER_6
            }  # fmt: skip
            conf = guarded.path.read_text(encoding="utf-8").replace("\n2 = ", "\n3 = ")
            count = sum(event["event"] == "snapshot" for event in following.events)
            adopting = "self.firewall.is_adopting"
            waits = f"while ({adopting} or not self.followers.peers) and"
            program = altered(lab, (f"while {adopting} and", waits))
            arguments = ("--rundir", str(guarded.rundir))
            with Server(lab, conf, *arguments, program=program) as successor:
                following.wait_for("snapshot", count + 2)
                eventually(lambda: len(following.held) == 3, f"{following.held}")
                knock_all(lab, (OTHER_4, 0x22, 1))
                following.wait_for("opened", address=OTHER_4)
                following.assert_agrees(successor)
                successor.stop()
            eventually(lambda: not following.held, "it believes in leases of a server that stopped")

    def test_a_lease_of_a_month(self, lab: Lab) -> None:
        """The server lives on although no selector can wait so long for the lease's end."""
        lab.load()
        conf = server_conf("29 = port: 29 / timeout: 2592000")
        with Server(lab, conf) as server:
            assert handshake(lab, 0x29) == COMEIN
            crash(server)
        arguments = ("--rundir", str(server.rundir))
        with Server(lab, conf, *arguments), Following(server) as following:
            assert handshake(lab, 0x29) == COMEIN
            following.wait_for("renewed", resource="00000029")

    def test_64_followers(self, lab: Lab) -> None:
        """Readers that read nothing, or a byte at a time, are cut off when their buffer is full,
        one that dies is forgotten, and the 65th is told why it gets nothing. Nobody waits for
        them."""
        lab.load()
        program = adjusted(lab, "letmein.FOLLOWER_BUFFER = 1 << 12")
        with contextlib.ExitStack() as stack, Server(lab, server_conf(), program=program) as server:
            (path,) = server.rundir.glob("*.follow")
            peers = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(63)]
            for peer in peers:
                peer.settimeout(LIMIT_S)
                peer.connect(str(path))
                assert json.loads(peer.recv(1000)) == {"event": "following"}
            following = stack.enter_context(Following(server))
            words = ("status", "--follow", "--rundir", server.rundir, "-c", server.path)
            lab.command(*words).assert_error("64 followers")
            peers.pop().close()
            stack.enter_context(Following(server))

            def knock_once() -> bool:
                """Whether all of them were cut off."""
                assert handshake(lab) == COMEIN
                for peer in peers[::2]:
                    peer.recv(1)
                return len(inodes(server.process.pid)) <= before - len(peers)

            before = len(inodes(server.process.pid))
            eventually(knock_once, "a reader that does not read is not cut off")
            assert all(peer.recv(1) for peer in peers), "what was sent before can still be read"
            following.assert_agrees(server)

    def test_an_idle_server(self, lab: Lab, guarded: Server) -> None:
        """Nobody wakes up while nothing happens, however many follow."""
        knock_all(lab, (CLIENT_4, 0x22, 1))
        with Following(guarded), Following(guarded):

            def sleeps() -> bool:
                before = proc_status(guarded.process.pid)["voluntary_ctxt_switches"]
                time.sleep(1.5)
                return proc_status(guarded.process.pid)["voluntary_ctxt_switches"] == before

            eventually(sleeps, "it wakes up")

    def test_what_had_ended_before(self, lab: Lab, guarded: Server) -> None:
        """Nobody is told of the end of a lease that they were never told of."""
        knock_all(lab, (CLIENT_4, 0x25, 1))
        eventually(lambda: lab.elements() == [], "it does not end")
        with Following(guarded) as following:
            knock_all(lab, (CLIENT_4, 0x22, 1))
            following.wait_for("opened", resource="00000022")
            assert [event["event"] for event in following.events] == ["snapshot", "opened"]

    @pytest.mark.parametrize("runs", [True, False])
    def test_nobody_reads_its_output(self, lab: Lab, guarded: Server, runs: bool) -> None:
        """With the reader of its output the program ends, before there is more to write, whether a
        server runs or not."""
        if not runs:
            guarded.stop()
        words = (lab.installed, "status", "--follow", "-c", guarded.path, "--rundir")
        follow = shlex.join(str(word) for word in (sys.executable, *words, guarded.rundir))
        result = lab.command(program=("sh", "-c", f"{follow} | head -n 1"))
        assert result.out.endswith("nobody holds a lease\n") and "error" not in result.err


# The table that OpenWrt's fw4 makes, in short: how it begins anew, where it includes files of
# others, and a zone that rejects.
FW4 = """
table inet fw4
flush table inet fw4
table inet fw4 {
    include "ROOT/etc/nftables.d/*.nft"
    chain input {
        type filter hook input priority filter; policy drop;
        iifname "lo" accept
        include "ROOT/usr/share/nftables.d/chain-pre/input/letmein.nft"
        ct state vmap { established : accept, related : accept }
        iifname "lan" jump input_wan
        jump handle_reject
    }
    chain handle_reject { meta l4proto tcp reject with tcp reset; reject; }
    chain input_wan { meta l4proto ipv6-icmp accept; jump reject_from_wan; }
    chain reject_from_wan { iifname "lan" counter jump handle_reject; }
}
"""

# A shell that knows OpenWrt's words, and says what it hears: what sources the file that is $1.
PROCD = """
for word in procd_open_instance procd_set_param procd_close_instance procd_send_signal; do
    eval "$word() { echo $word \\"\\$@\\"; }"
done
. "$1"
echo "START $START USE_PROCD $USE_PROCD"
start_service
reload_service
"""

# A parent that opens the control port's sockets, as systemd does: sd_listen_fds(3). $1 is the file
# for their inodes; the rest is the server.
ACTIVATE = """
import os, socket, sys
for number, kind in enumerate((socket.SOCK_STREAM, socket.SOCK_DGRAM)):
    control = socket.socket(socket.AF_INET6, kind)
    control.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    control.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    control.bind(("::", 5800))
    if kind == socket.SOCK_STREAM:
        control.listen()
    os.dup2(control.detach(), 30 + number)
with open(sys.argv[1], "w") as file:
    for number in range(2):
        os.dup2(30 + number, 3 + number)
        print(os.fstat(3 + number).st_ino, file=file)
os.environ.update(LISTEN_FDS="2", LISTEN_PID=str(os.getpid()))
os.execv(sys.argv[2], sys.argv[2:])
"""


class TestService:
    """The files that start the server with the system."""

    def test_systemd_starts_this_copy(self, lab: Lab) -> None:
        """The unit starts this copy with these options, and lets it see what it needs."""
        conf = lab.file(server_conf())
        for words, path, account in (
            ((), Path("/etc/letmeind.conf"), "letmeind"),
            (("-c", conf, "--user", "nobody"), conf, "nobody"),
        ):
            unit = unit_settings(service(lab, "systemd", *words))
            (command,) = unit["ExecStart"]
            expected = [sys.executable, "-I", str(LETMEIN), "server", "-c", str(path)]
            assert shlex.split(command)[:8] == [*expected, "--user", account]
            # What that command needs can be seen in there.
            seen = [Path(place.lstrip("-")) for place in shlex.split(unit["BindReadOnlyPaths"][0])]
            for needed in (LETMEIN, path, Path(sys.executable), Path(NFT), Path(os.__file__)):
                assert any(place in needed.parents for place in seen), (needed, seen)
        included = lab.file(server_conf(general="include = /srv/*/keys.d/*.conf"))
        (seen_there,) = unit_settings(service(lab, "systemd", "-c", included))["BindReadOnlyPaths"]
        assert "/srv" in shlex.split(seen_there)
        # Its command line is one that the server takes.
        (*_, option, rundir) = shlex.split(command)
        assert (option, rundir) == ("--rundir", f"/run/{unit['RuntimeDirectory'][0].split()[0]}")

    def test_the_sockets_are_those_of_the_configuration(self, lab: Lab) -> None:
        """systemd opens the configured port for the configured protocols; which these are, only
        the file can tell."""
        for port, stream, datagram in (
            ("5800", ["5800"], []), ("5900 / udp", [], ["5900"]),
            ("5801 / tcp, udp", ["5801"], ["5801"]),
        ):  # fmt: skip
            conf = lab.file(server_conf(port=port))
            unit = unit_settings(service(lab, "systemd-socket", "-c", conf))
            assert unit.get("ListenStream", []) == stream
            assert unit.get("ListenDatagram", []) == datagram
        result = lab.command("service", "systemd-socket", "-c", lab.directory / "none.conf")
        result.assert_error("none.conf: cannot be read", "write the file there")

    def test_systemd_takes_it(self, lab: Lab) -> None:
        """systemd finds no fault with the unit, and gives it an exposure of 2.6 at most."""
        program = shutil.which("systemd-analyze")
        if program is None:
            pytest.skip("systemd-analyze is not in PATH")
        if "--offline" not in run(program, "--help"):
            pytest.skip("this systemd-analyze cannot judge a file (systemd 250)")
        unit = lab.file(service(lab, "systemd"), "letmeind.service")
        conf = lab.file(server_conf())
        socket_unit = lab.file(service(lab, "systemd-socket", "-c", conf), "letmeind.socket")
        result = lab.command("verify", unit, socket_unit, program=(program,))
        assert (result.status, result.err) == (0, ""), result
        said = run(program, "security", "--offline=true", "--no-pager", unit)
        found = re.search(r"exposure level for letmeind.service: ([0-9.]+)", said)
        assert found and float(found[1]) <= 2.6, said

    @pytest.mark.parametrize("number", ["", "x", "-1", "16"])
    def test_a_wrong_number_of_sockets(self, lab: Lab, number: str) -> None:
        """The error names the variable that says so."""
        lab.load()
        shell = ("sh", "-c", f'LISTEN_PID=$$ LISTEN_FDS={number} exec "$@"', "sh")
        words = ("server", "-c", lab.file(server_conf()), "--user", "none")
        result = lab.command(*words, program=(*shell, sys.executable, lab.installed))
        result.assert_error("LISTEN_FDS in the environment", "from 0 to 15 sockets")

    def test_a_systemd_that_reads_nothing(self, lab: Lab) -> None:
        """Nobody takes its word that it is ready: it serves all the same, and takes a SIGHUP."""
        lab.load()
        path = str(lab.directory / "notify")
        unix = (socket.AF_UNIX, socket.SOCK_DGRAM)
        with socket.socket(*unix) as busy, socket.socket(*unix) as sender:
            busy.bind(path)
            sender.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    sender.sendto(b"no room", path)
            with Server(lab, server_conf(), env={**environment(), "NOTIFY_SOCKET": path}) as server:
                assert handshake(lab) == COMEIN
                reconfigure(server, server_conf())
                assert handshake(lab, 0x23) == COMEIN

    def test_the_rights_are_enough(self, lab: Lab) -> None:
        """The server does all its work with the capabilities of the unit alone."""
        if not lab.real_root:
            pytest.skip("the network process becomes another user: that takes real root")
        (names,) = unit_settings(service(lab, "systemd"))["CapabilityBoundingSet"]
        rights = ",".join(f"+{name[4:].lower()}" for name in names.split())
        program = ("setpriv", f"--bounding-set=-all,{rights}", "--inh-caps=-all", "--no-new-privs",
                   sys.executable, LETMEIN, "server")
        lab.load()
        with Server(lab, server_conf(), program=program, account="nobody") as server:
            assert handshake(lab) == COMEIN
            lab.load()
            server.wait_for("healed")
            assert lab.reaches(22, CLIENT_4)
            network = server.network_process()
            for process in (server.process.pid, network):
                status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
                (bounds,) = re.findall(r"^CapBnd:\s+(\w+)$", status, re.M)
                assert bin(int(bounds, 16)).count("1") == len(names.split()), status
                assert re.search(r"^NoNewPrivs:\s+1$", status, re.M), status
            # Who is another user, and does not end by itself.
            os.kill(network, signal.SIGSTOP)
            replaced(server, network, "stopped")
            reconfigure(server, server_conf(port="5900 / tcp, udp"))
            reconfigure(server, server_conf())
            assert handshake(lab, 0x23, protocol="udp", source=CLIENT_6) == COMEIN

    def test_sockets_of_systemd(self, lab: Lab) -> None:
        """The server serves the sockets that it is given."""
        lab.load()
        file = lab.file("")
        program = (sys.executable, "-c", ACTIVATE, file, sys.executable, LETMEIN, "server")
        with Server(lab, server_conf(), program=program) as server:
            for protocol, source in (("tcp", CLIENT_4), ("udp", CLIENT_6)):
                assert handshake(lab, 0x23, protocol=protocol, source=source) == COMEIN
            assert set(file.read_text().split()) <= inodes(server.process.pid)

    def test_two_sockets_of_one_name(self, lab: Lab) -> None:
        """One for IPv4 and one for IPv6, as BindIPv6Only=ipv6-only has them: both are served, also
        after a reload, which must not name another port, and by the next network process."""
        lab.load()
        sockets = [f"{kind} {address}" for kind in ("tcp", "udp") for address in ("0.0.0.0", "::")]
        with Server(lab, server_conf(), program=activated(*sockets)) as server:
            reconfigure(server, server_conf(port="5900 / tcp, udp"), good=False)
            reconfigure(server, server_conf())
            for _ in range(2):
                for protocol, source in KNOCKERS:
                    assert handshake(lab, 0x23, protocol=protocol, source=source) == COMEIN
                lost = len(server.events("network-process-lost"))
                os.kill(server.network_process(), signal.SIGKILL)
                server.wait_for("network-process-lost", lost + 1)
                eventually(lambda: server_is_back(server), "no new network process")

    def test_a_socket_that_was_shut(self, lab: Lab) -> None:
        """What a network process that was taken over has done to systemd's listening socket is
        undone for the next one."""
        lab.load()
        attack = with_attack(lab, ATTACKS_ON_THE_MONITOR["shut control sockets"])
        program = activated("tcp ::", program=attack)
        conf = server_conf(port="5800 / tcp")
        with confined(lab, conf, seccomp="off", program=program) as server:
            assert handshake(lab, source=CLIENT_6) == COMEIN
            os.kill(server.network_process(), signal.SIGUSR1)
            server.wait_for("network-process-lost")
            assert handshake(lab, 0x23, source=CLIENT_6) == COMEIN

    @pytest.mark.parametrize(
        "given", ["unix", "unix listening", "tcp :: 5805", "udp-lite ::", "file", "pipe", "closed"]
    )
    def test_what_is_no_control_socket(self, lab: Lab, given: str) -> None:
        """Whatever else systemd gives is refused by its number, and not served."""
        lab.load()
        program = (*activated("tcp ::", given), "--user", "none", "--rundir", lab.directory)
        result = lab.command("-c", lab.file(server_conf()), program=program)
        result.assert_error("descriptor 4, which is no socket for a control port", "ListenStream")

    def test_a_socket_of_another_port(self, lab: Lab) -> None:
        """It is refused by name."""
        lab.load()
        program = (*activated("tcp ::", "tcp :: 5801"), "--user", "none")
        conf = lab.file(server_conf())
        result = lab.command("-c", conf, "--rundir", lab.directory, program=program)
        result.assert_error("a socket for 5801/tcp, which is no control port")

    @pytest.mark.parametrize("command", ["server", "status"])
    def test_its_server_is_found(self, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
        """Without --rundir, where the unit's server runs, and where none runs."""
        monkeypatch.setattr(os.path, "isdir", "/run/letmeind".__eq__)
        assert letmein.parse_words([command]).rundir == "/run/letmeind"
        for place in ("/run", "/var/run"):
            monkeypatch.setattr(os.path, "isdir", place.__eq__)
            assert letmein.parse_words([command]).rundir == place

    def test_no_unit_that_shows_all_of_the_disk(self, lab: Lab) -> None:
        """A configuration file in / would make that directory visible to the service."""
        words = ["-c", "/letmeind.conf", "service", "systemd"]
        result = lab.command(*words, program=(sys.executable, LETMEIN))
        result.assert_error("/letmeind.conf lies in /", "move it into a directory")
        assert not result.out
        conf = lab.file(server_conf(general="include = /*.keys"))
        result = lab.command("service", "systemd", "-c", conf, program=(sys.executable, LETMEIN))
        result.assert_error(f"what include in {conf} names lies in /", "move it into a directory")

    @pytest.mark.parametrize("name", ["50%", "$HOME", "a:b", "it's", 'a"b', "a\\b", "a\nb"])
    def test_no_unit_with_a_path_that_systemd_reads_otherwise(self, lab: Lab, name: str) -> None:
        """systemd would start another command, or show the service another directory."""
        path = lab.directory / name / "letmeind.conf"
        words = ("-c", path, "service", "systemd")
        result = lab.command(*words, program=(sys.executable, LETMEIN))
        result.assert_error("systemd would not read ", "use a path without")
        assert not result.out

    def test_openwrt_starts_this_copy(self, lab: Lab) -> None:
        """procd starts this copy, again if it ends, and reloads it."""
        conf = lab.file(server_conf())
        script = lab.file(service(lab, "openwrt", "-c", conf), "letmeind.init")
        assert script.read_text().startswith("#!/bin/sh /etc/rc.common\n")
        said = run("sh", "-eu", "-c", PROCD, "sh", script).splitlines()
        command = [sys.executable, "-I", LETMEIN, "server", "-c", conf, "--user", "letmeind"]
        assert said == [
            "START 95 USE_PROCD 1",
            "procd_open_instance",
            " ".join(map(str, ("procd_set_param command", *command))),
            "procd_set_param respawn 3600 5 0",
            "procd_set_param stderr 1",
            "procd_close_instance",
            "procd_send_signal letmeind * HUP",
        ]

    def test_in_the_firewall_of_openwrt(self, lab: Lab) -> None:
        """The commands in the script put us into fw4's table, however that is made anew."""
        root = Path(tempfile.mkdtemp(dir=lab.directory))
        (root / "etc/nftables.d").mkdir(parents=True)
        commands = re.findall(r"^#     (.*)$", service(lab, "openwrt"), re.M)
        assert len(commands) == 3
        for command in commands:
            for place in ("/etc/", "/usr/"):
                command = command.replace(f" {place}", f" {root}{place}")
                command = command.replace(f">{place}", f">{root}{place}")
            run("sh", "-eu", "-c", command)
        fw4 = FW4.replace("ROOT", str(root))
        lab.load(fw4)
        with Server(lab, server_conf().replace("table = filter", "table = fw4")) as server:
            told = [warning["reason"] for warning in server.events("warning")]
            assert all("[RESOURCES]" in reason or reason == LOUD for reason in told), told
            for source in (CLIENT_4, CLIENT_6):
                assert not lab.reaches(22, source)
                lab.letmein("knock", server_for(source), "22").assert_good()
            for turn, before in enumerate(("", "", "delete table inet fw4", "flush ruleset"), 1):
                nft_do(before, fw4)
                server.wait_for("healed", turn, leases="2")
                for source in (CLIENT_4, CLIENT_6):
                    eventually(functools.partial(lab.reaches, 22, source), "not healed")
                assert not lab.reaches(22, OTHER_4)
                assert handshake(lab, 0x23, protocol="udp") == COMEIN
                assert handshake(lab, 0x23, REVOKE, protocol="udp") == COMEIN
            # fw4 is stopped for a while: the server waits, and makes no table of its own.
            nft_do("delete table inet fw4")
            server.wait_for("cannot-heal")
            assert "fw4" not in lab.ruleset()
            nft_do(fw4)
            server.wait_for("healed", 5, leases="2")
            assert lab.reaches(22, CLIENT_6)


# ----------------------------------------------------------------------------
# 9  The whole: the wire
#
# A server answers each fault as its policy says, and a recorded or relayed message gains nothing.
# ----------------------------------------------------------------------------

OWN_IDS, NO_IDS = (1, 0x22), (ANYBODY, ANYBODY)


class Fault(NamedTuple):
    """A conversation that goes wrong: what the peer sends, and what may answer it."""

    name: str
    speak: Callable[[Peer], None]
    proved: int
    ids: tuple[int, int] = OWN_IDS


def named(faults: Iterable[Fault]) -> list[Any]:
    return [pytest.param(fault, id=fault.name) for fault in faults]


GOOD_KNOCK = message(KNOCK, 0x22)

COMMON_FAULTS = [
    Fault("wrong magic", says(b"\x3b\x1b\xb7\x18" + GOOD_KNOCK[4:]), DROPPED),
    Fault("operation 6", says(message(6, 0x22)), DROPPED),
    Fault("operation 2**31", says(message(1 << 31, 0x22)), DROPPED),
    Fault("CHALLENGE first", says(message(CHALLENGE, 0x22)), DROPPED),
    Fault("COMEIN first", says(message(COMEIN, 0x22)), DROPPED),
    Fault("GOAWAY first", says(message(GOAWAY, 0x22)), DROPPED),
    Fault("unknown user", says(message(KNOCK, 0x22, 9)), NO_AUTH, (9, 0x22)),
    Fault("wrong key", says(message(KNOCK, 0x22, key=KEYS[2])), NO_AUTH),
    Fault("wrong key, REVOKE", says(message(REVOKE, 0x22, key=KEYS[2])), NO_AUTH),
    Fault("changed salt", says(flipped(GOOD_KNOCK, 20)), NO_AUTH),
    Fault("KNOCK made REVOKE", says(GOOD_KNOCK[:7] + b"\5" + GOOD_KNOCK[8:]), NO_AUTH),
    Fault("unknown resource", says(message(KNOCK, 0x99)), BASIC_AUTH, (1, 0x99)),
    Fault("other user's resource", says(message(KNOCK, 0x26, 2)), BASIC_AUTH, (2, 0x26)),
    Fault("control port", says(message(KNOCK, 0x58)), BASIC_AUTH, (1, 0x58)),
]

TCP_FAULTS = [
    *COMMON_FAULTS,
    Fault("RESPONSE first", says(message(RESPONSE, 0x22)), NO_AUTH, NO_IDS),
    Fault("half-closed at once", ends(), DROPPED),
    Fault("half-closed in the KNOCK", ends(GOOD_KNOCK[:20]), DROPPED),
    Fault("half-closed after the KNOCK", ends(GOOD_KNOCK), DROPPED),
    Fault("KNOCK twice", two_knocks, BASIC_AUTH),
    Fault(
        "wrong magic in the RESPONSE",
        after_challenge(lambda token: b"X" + message(RESPONSE, 0x22, token=token)[1:]),
        DROPPED,
    ),
    Fault(
        "other user in the RESPONSE",
        after_challenge(lambda token: message(RESPONSE, 0x22, 2, token)),
        BASIC_AUTH,
        (2, 0x22),
    ),
    Fault(
        "other resource in the RESPONSE",
        after_challenge(lambda token: message(RESPONSE, 0x23, 1, token)),
        BASIC_AUTH,
        (1, 0x23),
    ),
    Fault(
        "RESPONSE to no token", after_challenge(lambda token: message(RESPONSE, 0x22)), BASIC_AUTH
    ),
    Fault(
        "wrong RESPONSE",
        after_challenge(lambda token: flipped(message(RESPONSE, 0x22, token=token), 55)),
        BASIC_AUTH,
    ),
    Fault(
        "RESPONSE with a wrong key",
        after_challenge(lambda token: message(RESPONSE, 0x22, token=token, key=KEYS[2])),
        BASIC_AUTH,
    ),
]
SLOWLY_S = 4.0  # to say a KNOCK

# What never becomes a message. The last one takes time to say.
TCP_WAITS = [
    says(),
    says(GOOD_KNOCK[:55]),
    byte_57,
    after_challenge(lambda token: b""),
    after_challenge(lambda token: message(RESPONSE, 0x22, token=token)[:55]),
    slowly(GOOD_KNOCK, SLOWLY_S / 56),
]

# A server that keeps no state cannot know whom a RESPONSE follows: it speaks under `always` only.
UDP_FAULTS = [
    *COMMON_FAULTS,
    Fault("RESPONSE first", says(message(RESPONSE, 0x22)), NO_AUTH),
    Fault("55 bytes", says(GOOD_KNOCK[:55]), DROPPED),
    Fault("57 bytes", says(GOOD_KNOCK + b"\0"), DROPPED),
    Fault("112 bytes", says(GOOD_KNOCK * 2), DROPPED),
    Fault("1 byte", says(b"\x3b"), DROPPED),
    Fault(
        "other user in the RESPONSE",
        after_challenge(lambda token: message(RESPONSE, 0x22, 2, token)),
        NO_AUTH,
        (2, 0x22),
    ),
    Fault(
        "other resource in the RESPONSE",
        after_challenge(lambda token: message(RESPONSE, 0x23, 1, token)),
        NO_AUTH,
        (1, 0x23),
    ),
    Fault(
        "wrong RESPONSE",
        after_challenge(lambda token: flipped(message(RESPONSE, 0x22, token=token), 55)),
        NO_AUTH,
    ),
]


class Strict(NamedTuple):
    """A server and the proof that its error policy asks for."""

    server: Server
    policy: int


WIRE_RESOURCES = """
22 = port: 22
23 = port: 23
26 = port: 26 / users: 1
27 = port: 27 / timeout: 0
58 = port: 5800
"""


@pytest.fixture(scope="class", params=list(POLICIES))
def error_policy(request: pytest.FixtureRequest) -> str:
    """An error policy; of the class, so that all tests of one come before those of the next."""
    return str(request.param)


@pytest.fixture
def strict(shared: Shared, error_policy: str) -> Iterator[Strict]:
    """A server with each of the error policies."""
    conf = server_conf(
        WIRE_RESOURCES, general=f"control-error-policy = {error_policy}\ncontrol-timeout = 5"
    )
    with shared.lend(conf, "-n", "20") as server:
        yield Strict(server, POLICIES[error_policy])


class TestWire:
    @pytest.mark.parametrize("fault", named(TCP_FAULTS))
    def test_tcp(self, lab: Lab, strict: Strict, fault: Fault) -> None:
        """Each fault over TCP is answered as the policy says, and the next client is served."""
        with Peer(lab) as peer:
            fault.speak(peer)
            said = peer.rest()
        if strict.policy <= fault.proved < DROPPED:
            assert Reply.parse(said) == (GOAWAY, *fault.ids, ZEROS)
        else:
            assert said == b""
        assert_serves(lab, strict.server, "tcp")

    @pytest.mark.parametrize("fault", named(UDP_FAULTS))
    def test_udp(self, lab: Lab, strict: Strict, fault: Fault) -> None:
        """Each fault over UDP is answered as the policy says, and the next client is served."""
        with Peer(lab, "udp") as peer:
            fault.speak(peer)
            # What the fault is answered with comes before the answer to this.
            peer.send(message(KNOCK, 0x23))
            replies = [peer.receive()]
            while replies[-1].operation != CHALLENGE:
                replies.append(peer.receive())
        said = replies[:-1]
        if strict.policy <= fault.proved < DROPPED:
            assert [reply.operation for reply in said] == [GOAWAY]
            assert said[0].auth == ZEROS
            if fault.proved == NO_AUTH and "RESPONSE" in fault.name:
                assert said[0][1:3] in (fault.ids, NO_IDS, OWN_IDS)
            else:
                assert said[0][1:3] == fault.ids
        else:
            assert said == []
        assert_serves(lab, strict.server, "udp")

    def test_too_slow(self, lab: Lab, strict: Strict) -> None:
        """The control-timeout of 0.4 s is for the whole of a handshake, not for each byte."""
        patient = strict.server.path.read_text(encoding="utf-8")
        hurried = patient.replace("control-timeout = 5\n", "control-timeout = 0.4\n")
        assert hurried != patient
        # Who waits for a challenge gets it in time.
        started = time.monotonic()
        peers = [Peer(lab) for _ in TCP_WAITS]
        for peer, speak in zip(peers, TCP_WAITS[:-1]):
            speak(peer)
        reconfigure(strict.server, hurried)
        TCP_WAITS[-1](peers[-1])
        for peer in peers:
            with peer:
                assert peer.rest() == b""
        assert 0.4 <= time.monotonic() - started < SLOWLY_S
        # An honest client is not to be late as well, however busy the machine is.
        reconfigure(strict.server, patient)
        assert_serves(lab, strict.server, "tcp")

    @pytest.mark.parametrize("protocol", ["tcp", "udp"])
    def test_an_error_after_full_authentication(
        self, lab: Lab, strict: Strict, protocol: str
    ) -> None:
        """A change that fails is GOAWAY under every policy."""
        assert handshake(lab, 0x27, protocol=protocol) == GOAWAY
        strict.server.wait_for("failed", proto=protocol, resource="00000027")
        assert_serves(lab, strict.server)

    def test_one_byte_at_a_time_in_time(self, lab: Lab, strict: Strict) -> None:
        """Messages may come byte by byte."""
        with Peer(lab) as peer:
            peer.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            slowly(message(KNOCK, 0x22), 0)(peer)
            reply = peer.receive()
            assert reply.operation == CHALLENGE
            slowly(message(RESPONSE, 0x22, token=reply.auth), 0)(peer)
            assert peer.receive().operation == COMEIN
            assert peer.rest() == b""
        assert lab.reaches(22, CLIENT_4)
        assert handshake(lab, 0x22, REVOKE) == COMEIN
        assert_serves(lab, strict.server)

    def test_a_replayed_response_over_tcp(self, lab: Lab, strict: Strict) -> None:
        """A recorded handshake opens nothing: its token is not good twice."""
        knock = message(KNOCK, 0x22)
        with Peer(lab) as peer:
            peer.send(knock)
            first = peer.receive().auth
            response = message(RESPONSE, 0x22, token=first)
            peer.send(response)
            assert peer.receive().operation == COMEIN
        assert handshake(lab, 0x22, REVOKE) == COMEIN
        with Peer(lab) as peer:
            peer.send(knock)
            assert peer.receive().auth != first
            peer.send(response)
            said = peer.rest()
        if strict.policy <= BASIC_AUTH:
            assert Reply.parse(said) == (GOAWAY, *OWN_IDS, ZEROS)
        else:
            assert said == b""
        assert_serves(lab, strict.server)

    def test_a_response_of_another_peer_over_udp(self, lab: Lab, strict: Strict) -> None:
        """A token is for one address and port, so nobody else can use its RESPONSE."""
        with Peer(lab, "udp") as peer:
            response = message(RESPONSE, 0x22, token=peer.challenge(0x22))
        for source in (OTHER_4, CLIENT_4):
            with Peer(lab, "udp", source) as thief:
                thief.send(response)
                thief.challenge(0x22) if strict.policy else thief.receive()
        assert_serves(lab, strict.server)

    def test_repeats_over_udp_are_answered_alike(self, lab: Lab, strict: Strict) -> None:
        """A repeat gets the same answer, and opens nothing again that was revoked."""
        server = strict.server

        def try_it(source: str) -> bool:
            with Peer(lab, "udp", source) as peer:
                knock = message(KNOCK, 0x23)
                tokens = set()
                for _ in range(3):
                    peer.send(knock)
                    reply = peer.receive()
                    assert reply[:3] == (CHALLENGE, 1, 0x23)
                    tokens.add(reply.auth)
                response = message(RESPONSE, 0x23, token=reply.auth)
                comeins = set()
                for _ in range(3):
                    peer.send(response)
                    comeins.add(peer.receive())
                assert comeins == {(COMEIN, 1, 0x23, ZEROS)}
                # What was revoked meanwhile is not opened again by a repeat.
                assert handshake(lab, 0x23, REVOKE, source=source) == COMEIN
                peer.send(response)
                peer.receive()
                assert lab.elements() == []
            server.wait_for("revoked", peer=source)
            assert len(server.events("granted", peer=source)) == 1
            return len(tokens) == 1

        # The token changes from time to time, though hardly twice within so short a time.
        assert any(try_it(f"10.77.5.{number}") for number in range(1, 4))
        assert_serves(lab, strict.server)

    def test_more_connections_at_once_than_an_address_may_have(
        self, lab: Lab, strict: Strict
    ) -> None:
        """Some are pushed out while they speak, and the network process lives on."""
        for _ in range(5):
            with contextlib.ExitStack() as stack:
                peers = [stack.enter_context(Peer(lab)) for _ in range(40)]
                for peer in peers:
                    with contextlib.suppress(ConnectionError):
                        peer.send(b"\x3b")
        assert_serves(lab, strict.server)
        assert not strict.server.events("network-process-lost")

    def test_a_port_may_knock_again_over_udp(self, lab: Lab, strict: Strict) -> None:
        """A source port may be used for one knock after the other."""
        with Peer(lab, "udp") as peer:
            for _ in range(3):
                peer.send(message(KNOCK, 0x23))
                peer.send(message(RESPONSE, 0x23, token=peer.receive().auth))
                assert peer.receive()[:3] == (COMEIN, 1, 0x23)
                assert len(lab.elements()) == 1
                assert handshake(lab, 0x23, REVOKE) == COMEIN
                assert lab.elements() == []
        assert_serves(lab, strict.server)

    def test_a_late_repeat_of_a_revoke_over_udp(self, lab: Lab, strict: Strict) -> None:
        """It does not shut what was opened since."""
        with Peer(lab, "udp") as peer:
            response = message(RESPONSE, 0x23, token=peer.challenge(0x23, operation=REVOKE))
            peer.send(response)
            assert peer.receive().operation == COMEIN
            assert handshake(lab, 0x23) == COMEIN
            peer.send(response)
            assert peer.receive().operation == COMEIN
            assert lab.reaches(23, CLIENT_4)
        assert handshake(lab, 0x23, REVOKE) == COMEIN

    def test_reset_connections(self, lab: Lab, strict: Strict) -> None:
        """Connections that are reset at any stage harm nobody."""
        for count in (0, 20, 56):
            peer = Peer(lab)
            peer.send(message(KNOCK, 0x22)[:count])
            if count == 56:
                peer.receive()
            peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            peer.socket.close()
        assert_serves(lab, strict.server)

    def test_half_closed_after_the_response(self, lab: Lab, strict: Strict) -> None:
        """A client that has said all it has to say still gets its answer."""
        with Peer(lab) as peer:
            peer.send(message(RESPONSE, 0x22, token=peer.challenge(0x22)))
            peer.socket.shutdown(socket.SHUT_WR)
            assert peer.receive().operation == COMEIN
        assert handshake(lab, 0x22, REVOKE) == COMEIN

    def test_connections_that_say_nothing(self, lab: Lab, strict: Strict) -> None:
        """They can take all slots (-n 20), and yet lock nobody out."""
        idle = [Peer(lab, source=f"10.77.3.{number}") for number in range(1, 41)]
        try:
            assert handshake(lab, 0x22) == COMEIN
        finally:
            for peer in idle:
                peer.socket.close()
        assert handshake(lab, 0x22, REVOKE) == COMEIN
        assert_serves(lab, strict.server)

    def test_anything(self, lab: Lab, strict: Strict) -> None:
        """No bytes without a proof get more than CHALLENGE and GOAWAY."""
        real = st.builds(
            message,
            st.integers(0, 7),
            st.sampled_from([0x22, 0x26, 0x27, 0x99, ANYBODY]),
            st.sampled_from([0, 1, 2, ANYBODY]),
            st.binary(min_size=32, max_size=32),
        )
        cut = st.builds(lambda data, end: data[:end], real, st.integers(0, 55))
        bent = st.builds(flipped, real, st.integers(0, 55))
        parts = st.lists(real | cut | bent | st.binary(max_size=130), max_size=5)

        @settings(
            max_examples=25,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(parts, st.sampled_from(["tcp", "udp"]))
        def speak(parts: list[bytes], protocol: str) -> None:
            with Peer(lab, protocol) as peer:
                replies = []
                with contextlib.suppress(ConnectionError):
                    says(*parts)(peer)
                if protocol == "tcp":
                    with contextlib.suppress(OSError):
                        peer.socket.shutdown(socket.SHUT_WR)
                    said = peer.rest()
                    assert len(said) % 56 == 0
                    replies += [Reply.parse(said[at : at + 56]) for at in range(0, len(said), 56)]
                else:
                    peer.send(message(KNOCK, 0x23))
                    while not replies or replies[-1].resource != 0x23:
                        replies.append(peer.receive())
            assert {reply.operation for reply in replies} <= {CHALLENGE, GOAWAY}

        speak()
        assert_serves(lab, strict.server)


class TestThreats:
    """The threat model: what it admits, and that its table is of this file."""

    def test_who_relays_a_knock_gets_its_lease(self, lab: Lab) -> None:
        """A man in the middle: one lease, for what was knocked for, and no second one."""
        lab.load()
        with Server(lab, server_conf()) as server, contextlib.ExitStack() as stack:
            with lab.client():
                trap = stack.enter_context(socket.create_server((CLIENT_4, 5802)))
            onward = stack.enter_context(Peer(lab, source=OTHER_4))
            heard: list[bytes] = []

            def relay() -> None:
                victim, _ = trap.accept()
                with victim:
                    for _ in range(2):
                        heard.append(victim.recv(56, socket.MSG_WAITALL))
                        onward.send(heard[-1])
                        victim.sendall(onward.socket.recv(56, socket.MSG_WAITALL))

            thread = threading.Thread(target=relay, daemon=True)
            thread.start()
            lab.letmein("knock", "-P", "5802", CLIENT_4, "22").assert_good()
            thread.join(LIMIT_S)
            assert lab.reaches(22, OTHER_4)
            assert not lab.reaches(22, CLIENT_4)
            # The same messages once more, and for another resource.
            for knock in (heard[0], heard[0][:15] + b"\x23" + heard[0][16:]):
                with Peer(lab, source=OTHER_6) as again, contextlib.suppress(ConnectionError):
                    again.send(knock)
                    again.send(heard[1])
                    while data := again.socket.recv(56, socket.MSG_WAITALL):
                        assert data[7] in (CHALLENGE, GOAWAY)
            server.wait_for("granted")
            assert len(server.events("granted")) == len(lab.elements()) == 1

    def test_the_table_names_tests_of_this_file(self) -> None:
        """Each test that the threat model, or the table at the top of this file, names is here."""
        text = document_section("Threat model")
        names = re.findall(r"`((?:Test[A-Z]\w+\.)?test_\w+|Test[A-Z]\w+)`", text)
        assert len(names) > 20
        assert __doc__
        names += re.findall(r"(?:Test[A-Z]\w+\.)?test_\w+|Test[A-Z]\w+", __doc__)
        assert len(names) > 60
        for name in names:
            place: Any = sys.modules[__name__]
            for part in name.split("."):
                place = getattr(place, part)
            assert callable(place), name


# ----------------------------------------------------------------------------
# 10  The whole: floods
#
# Whoever has a key gets in while others attack, and the server is afterwards as it was.
# ----------------------------------------------------------------------------


class TestMany:
    def test_2000_knocks(self, lab: Lab) -> None:
        """Each takes a third of the processor's time that an nft takes, or less; and all of them
        less than 44 MB."""
        count = 2000
        first = ipaddress.IPv4Address("10.77.8.0")
        addresses = [str(first + number) for number in range(count)]
        lab.load(
            more="add table ip measure { set s { type ipv4_addr . inet_proto . inet_service;"
            " flags timeout; counter; }; }"
        )

        def one_by_one(number: int) -> float:
            """What one knock would cost if each ran nft, in seconds of the processor's time."""
            used = children_s()
            for address in addresses[:number]:
                text = f"add element ip measure s {{ {address} . tcp . 22 timeout 600s }}\n"
                subprocess.run([NFT, "-f", "-"], input=text.encode(), check=True)
            return (children_s() - used) / number

        conf = server_conf(nftables="max-nr-rules = 5000")
        with Server(lab, conf, env=unmeasured()) as server:
            pids = (server.process.pid, server.network_process())
            before, used = one_by_one(150), sum(map(cpu_seconds, pids))
            good = storm(lab, addresses, 32, KNOCK)
            each, after = (sum(map(cpu_seconds, pids)) - used) / count, one_by_one(150)
            single = (before + after) / 2
            memory = sum(map(resident_kb, pids))
            print(f"{each * 1000:.2f} ms a knock, {single * 1000:.2f} an nft, {memory} kB", end=" ")
            assert good == count
            assert len(lab.elements()) == count
            assert lab.reaches(22, addresses[0])
            assert lab.reaches(22, addresses[-1])
            assert not lab.reaches(22, str(first + count))
            # Straight from the file: Python keeps the syntax tree of a script, some 9 MB of this.
            assert memory < (44 if SECCOMP == "off" else 52) * 1024  # pyseccomp has its own
            assert each <= single / 3


@pytest.fixture(scope="class")
def attacker(lab: Lab) -> Iterator[Attacker]:
    made = Attacker(lab)
    yield made
    made.close()


class TestFloods:
    """Who has a key gets in while others attack, and the server is afterwards as it was. (At what
    rates, and how fast, is measured by .ci/bench: here it is whether, at a rate that any
    machine can take.)"""

    @pytest.mark.parametrize(
        "kind, protocol, source, rate, delay",
        [
            pytest.param("idle", "tcp", "many", 300, 0, id="idle"),
            pytest.param("replay", "tcp", "many", 300, 0, id="replay-tcp"),
            pytest.param("replay", "udp", "many", 300, 0, id="replay-udp"),
            pytest.param("random", "tcp", "many", 300, 0, id="random-tcp"),
            pytest.param("random", "udp", "many", 300, 0, id="random-udp"),
            pytest.param("slow", "tcp", "one", 300, 0, id="slow"),
            pytest.param("reset", "tcp", "many", 300, 0, id="reset"),
            pytest.param("idle", "tcp", "own", 20, 0, id="idle-own"),
            pytest.param("replay", "udp", "own", 20, 0, id="replay-udp-own"),
            pytest.param("replay", "tcp", "many", 300, 0.05, id="replay-tcp-far"),
            pytest.param("key", "tcp", "many", 300, 0, id="key-tcp"),
            pytest.param("key", "udp", "many", 300, 0, id="key-udp"),
            pytest.param("key", "tcp", "one", 300, 0, id="key-tcp-one"),
            pytest.param("key", "udp", "one", 300, 0, id="key-udp-one"),
        ],
    )
    def test_a_knock_succeeds(
        self, attacker: Attacker, kind: str, protocol: str, source: str, rate: float, delay: float
    ) -> None:
        """Five knocks succeed under each flood; memory, descriptors and leases are as they were."""
        outcome = flood_case(attacker, kind, protocol, source, rate, 1, delay)
        print(outcome, end=" ")
        assert outcome.arrived >= rate / 4, outcome  # or it was no flood
        assert outcome.failed == []
        assert outcome.knocks == 5
        assert outcome.lost == 0
        assert outcome.faults == []
        assert outcome.memory_peak < 10 * 1024
        assert outcome.memory_after < 10 * 1024
        assert outcome.descriptors_after <= outcome.descriptors_before


# ----------------------------------------------------------------------------
# 11  The whole: the reference
#
# Our client and server work with those of the reference implementation.
# ----------------------------------------------------------------------------


@pytest.fixture(scope="class", params=[reference_client, reference_server])
def mixed(lab: Lab, request: pytest.FixtureRequest) -> Iterator[Callable[..., Result]]:
    """Runs a client: the reference's client on our server, or ours on the reference's."""
    with request.param(lab) as call:
        yield call


class TestReference:
    """A client on the other implementation's server."""

    @pytest.mark.parametrize("port, open_to, control, source, other", KNOCKS)
    def test_open_and_revoke(
        self,
        lab: Lab,
        mixed: Callable[..., Result],
        source: str,
        other: str,
        control: str,
        port: int,
        open_to: str,
    ) -> None:
        """Over each protocol and IP version, for each kind of port."""
        assert lab.protocols_to(port, source) == []
        for word, expected in (("knock", open_to.split()), ("revoke", [])):
            result = mixed(word, control, server_for(source), str(port))
            assert result.status == 0, result
            assert lab.protocols_to(port, source) == expected
            assert lab.protocols_to(port, other) == []

    @pytest.mark.parametrize("source, other", [(CLIENT_4, OTHER_4), (CLIENT_6, OTHER_6)])
    @pytest.mark.parametrize("resource", ["32", "33"])
    def test_jump_and_revoke(
        self, lab: Lab, mixed: Callable[..., Result], source: str, other: str, resource: str
    ) -> None:
        """For its holder alone, or for all."""
        for word in ("knock", "revoke"):
            result = mixed(word, "-r", resource, server_for(source))
            assert result.status == 0, result
            assert lab.reaches(8080, source) == (word == "knock")
            assert lab.reaches(8080, other) == (word == "knock" and resource == "33")

    @pytest.mark.parametrize("control", ["-T", "-U"])
    def test_a_name_with_both_families(
        self, lab: Lab, mixed: Callable[..., Result], control: str
    ) -> None:
        """A name is knocked over IPv4 and IPv6."""
        for word in ("knock", "revoke"):
            result = mixed(word, control, "both.test", "22")
            assert result.status == 0, result
            assert lab.reaches(22, CLIENT_4) == (word == "knock")
            assert lab.reaches(22, CLIENT_6) == (word == "knock")

    @pytest.mark.parametrize("control", ["-T", "-U"])
    def test_a_resource_of_another_user(
        self, lab: Lab, mixed: Callable[..., Result], control: str
    ) -> None:
        """Only its users open a resource."""
        result = mixed("knock", control, "-u", "2", "-r", "26", SERVER_4)
        assert result.status != 0, result
        assert not lab.reaches(26, CLIENT_4)
        for word in ("knock", "revoke"):
            assert mixed(word, control, "-u", "1", "-r", "26", SERVER_4).status == 0
            assert lab.reaches(26, CLIENT_4) == (word == "knock")

    def test_an_unknown_resource(self, lab: Lab, mixed: Callable[..., Result]) -> None:
        """It is an error, and opens nothing."""
        result = mixed("knock", "-u", "2", "-r", "99", SERVER_4)
        assert result.status != 0, result
        assert not lab.reaches(22, CLIENT_4)


# ----------------------------------------------------------------------------
# 12  The whole: anything
#
# Server, kernel, `status` and a model agree after any sequence of events. `make soak` runs more.
# ----------------------------------------------------------------------------

NUMBERS = st.integers(0, 3)
KNOWN = st.sampled_from(list(RANDOM_RESOURCES))
USERS = st.sampled_from([1, 1, 2])

STEPS = st.one_of(
    st.tuples(st.just("knock"), NUMBERS, KNOWN, USERS),
    st.tuples(st.just("knock"), NUMBERS, KNOWN, USERS),
    st.tuples(st.just("knock"), NUMBERS, KNOWN, USERS),
    st.tuples(st.just("revoke"), NUMBERS, KNOWN, USERS),
    st.tuples(st.sampled_from(["reload", "flush", "restore", "plant", "expire", "faulty_reload"])),
    st.tuples(st.sampled_from(["bad_sighup", "restart", "network"])),
    st.tuples(st.just("sighup"), st.integers(0, len(VARIANTS) - 1)),
    st.tuples(st.sampled_from(["by_hand", "sigkill"]), NUMBERS),
    st.tuples(st.just("fault"), NUMBERS, KNOWN, st.sampled_from([KNOCK, REVOKE]), st.booleans()),
)


@pytest.fixture(scope="class")
def world(lab: Lab, meanings: None) -> Iterator[World]:
    made = World(lab)
    yield made
    if made.server is not None:
        made.server.stop()


class TestAnything:
    @settings(
        max_examples=SOAK or 30,
        derandomize=not SOAK,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(steps=st.lists(STEPS, min_size=8, max_size=8))
    def test_anything(self, world: World, steps: Iterable[tuple[Any, ...]]) -> None:
        """Model, status and kernel are one after every step."""
        done: list[tuple[Any, ...]] = []
        try:
            world.reset()
            for step in steps:
                done.append(step)
                getattr(world, step[0])(*step[1:])
                world.compare(done)
        except BaseException:
            print(done)
            world.drop()
            raise


# ----------------------------------------------------------------------------
# 13  The whole: documents
#
# What the documents and messages say is so, and the documents' commands and recipes work.
# ----------------------------------------------------------------------------


class TestDocuments:
    """What the documents say is so, and their commands do what they say."""

    def test_server_in_ten_minutes(self, lab: Lab) -> None:
        """Followed to the letter, it ends with a port 22 that only a knock opens; its safety net
        opens it again, and deletes nothing."""
        if shutil.which("make") is None:
            pytest.skip("make is not in PATH")
        lab.load("")
        stack = contextlib.ExitStack()
        server = DocumentHost(lab)
        stack.callback(server.close)
        to_server = shlex.join(server.enter)
        with lab.client():
            client = DocumentHost(lab, ssh=f'shift; {to_server} "$@"')
        stack.callback(client.close)
        hosts = {"server": server, "client": client}
        blocks = [b for b in fenced("sh", document_section("Server in ten minutes")) if b.host]
        said = {}
        with stack:
            for block in blocks:
                said[block.text] = hosts[block.host].run(block.text)
                if "systemd-run" in block.text:
                    eventually(lambda: lab.reaches(22, CLIENT_4), "the lease is lost")
                    assert not lab.reaches(22, OTHER_4)
                    before = lab.ruleset()
                    server.run((server.home / "net").read_text())
                    assert lab.reaches(22, OTHER_4)
                    assert set(before.splitlines()) <= set(lab.ruleset().splitlines())
                    server.run("nft -f /etc/nftables.conf")
                    eventually(lambda: not lab.reaches(22, OTHER_4), "the safety net stays")
            assert not (server.home / "net").exists()
            # What a command prints, where a comment behind it says so.
            for text, out in said.items():
                for comment in re.findall("(?m)^(?:letmein|journalctl) .*? # (.*)$", text):
                    assert comment.partition(" (")[0] in out, (comment, out)
            table = fenced("text", document_section("Server in ten minutes"))[0].text
            out = said["letmein status\n"]
            assert table.splitlines()[0].split() == out.splitlines()[0].split()
            assert re.search(rf"(?m)^{CLIENT_4} +22/tcp +00000001 ", out)
            assert not lab.reaches(22, CLIENT_4)  # the restart has ended the leases
            client.run("letmein knock server 22")
            assert lab.reaches(22, CLIENT_4)

    def test_openwrt(self, lab: Lab) -> None:
        """Followed on a host with OpenWrt's words and fw4's table, it ends with a port that only
        a knock opens, and that stays open when the firewall is made anew."""
        lab.load("")
        host = DocumentHost(lab, **OPENWRT_PROGRAMS)
        init = OPENWRT_RC.replace("HOME", str(host.home))
        files = {"fw4.nft": FW4.replace("ROOT", ""), "rc.common": init}
        for name, text in {**files, "functions.sh": OPENWRT_FUNCTIONS}.items():
            (host.home / name).write_text(text, encoding="utf-8")
        prepare, start, keep, forward = (b.text for b in fenced("sh") if b.host == "openwrt")
        _, conf, *_ = fenced("sh", document_section("Server in ten minutes"))
        with contextlib.closing(host):
            host.run(f"cd {host.home}; cp functions.sh /lib; cp rc.common /etc")
            host.run("cp letmein.py /usr/sbin/; mkdir -p /etc/nftables.d /etc/init.d")
            host.run(prepare)
            ours = conf.text.replace("letmein gen", "letmein.py gen")
            host.run(ours.replace("table = filter", "table = fw4"))
            assert "event=ready" in host.run(start)
            key = host.run("letmein.py client-conf -u 1")
            assert not lab.reaches(22, CLIENT_4)
            lab.letmein("knock", SERVER_4, "22", conf=key).assert_good()
            host.run(keep)
            host.run(forward)
            eventually(lambda: lab.reaches(22, CLIENT_4), "not healed")
            assert not lab.reaches(22, OTHER_4)
            host.run("sed -i 's/^table/chain-forward = LETMEIN-FORWARD\\n&/' /etc/letmeind.conf")
            host.run("letmein.py server --check")

    def test_a_firewall_of_your_own(self, lab: Lab) -> None:
        """The two commands for it are enough for a server, which has nothing to warn of."""
        own = "table inet filter { chain input { type filter hook input priority 0; policy drop;"
        lab.load(own + " ct state established accept; }; }")
        (block,) = [b for b in fenced("sh") if b.text.startswith("nft add chain")]
        run("sh", "-ec", f"PATH=$PATH:/usr/sbin\n{block.text}")
        check = ("server", "--check", "--user", "none")
        assert lab.command("-c", lab.file(server_conf(resources="22 = port: 22")), *check).err == ""
        with Server(lab, server_conf()):
            lab.letmein("knock", SERVER_4, "22").assert_good()
            assert lab.reaches(22, CLIENT_4)

    def test_a_gate_in_front_of_iptables(self, lab: Lab) -> None:
        """On a host whose iptables drops what it does not accept, the gate's table lets in those
        who knocked, and nobody else."""
        iptables = shutil.which("iptables-nft", path=f"{os.environ['PATH']}:/usr/sbin")
        if iptables is None:
            pytest.skip("iptables-nft is not in PATH")
        (gate,) = [b for b in fenced("nft") if "delete table inet gate" in b.text]
        lab.load("")
        run(iptables, "-P", "INPUT", "DROP")
        for port in (22, 5800):
            run(iptables, "-A", "INPUT", "-p", "tcp", "--dport", str(port), "-j", "ACCEPT")
        run(NFT, "-f", "-", text=gate.text.replace("drop\n", "reject with tcp reset\n"))
        with Server(lab, server_conf().replace("table = filter", "table = gate")) as server:
            assert not lab.reaches(22, CLIENT_4)
            lab.letmein("knock", SERVER_4, "22").assert_good()
            assert lab.reaches(22, CLIENT_4) and not lab.reaches(22, OTHER_4)
            run(NFT, "-f", "-", text=gate.text.replace("drop\n", "reject with tcp reset\n"))
            server.wait_for("healed")
            eventually(lambda: lab.reaches(22, CLIENT_4), "not healed")

    def test_a_range_of_ports(self, lab: Lab) -> None:
        """The jump for mosh opens its range to the address that knocked, and no more."""
        text = document_section("mosh: a range of ports")
        (chain,), (line,) = fenced("nft", text), re.findall("`([0-9]{8} = [^`]*)`", text)
        rules = chain.text.replace("60000-61000", "24-25")
        lab.load(more=f"table inet filter {{\n{rules}\n}}")
        ((command, _, *words),) = letmein_words(fenced("sh", text)[0].text)
        with Server(lab, server_conf(f"22 = port: 22\n{line}")):
            lab.letmein(command, SERVER_4, *words[: words.index("--")]).assert_good()
            assert lab.reaches(22, CLIENT_4) and lab.reaches(25, CLIENT_4, "udp")
            assert not lab.reaches(26, CLIENT_4, "udp") and not lab.reaches(25, OTHER_4, "udp")

    def test_a_key_without_opening_anything(self, lab: Lab) -> None:
        """`revoke` tries a key: it succeeds with the right one, fails with a wrong one, opens
        nothing."""
        (block,) = fenced("sh", document_section("Try a key without opening anything"))
        ((command, _, port),) = letmein_words(block.text)
        lab.load()
        with Server(lab, server_conf()):
            lab.letmein(command, SERVER_4, port).assert_good()
            wrong = CLIENT_CONF.replace(KEYS[1].hex(), KEYS[2].hex())
            lab.letmein(command, SERVER_4, port, conf=wrong).assert_error()
            assert not lab.elements()

    def test_commands(self) -> None:
        """Each `letmein` command line parses, in blocks and in running text."""
        blocks = [b for name in ("sh", "sshconfig", "ini") for b in fenced(name)]
        found = [(words, b.text) for b in blocks for words in letmein_words(b.text)]
        assert len(found) > 25
        text = prose(documents()).replace("\n", " ")
        spans = [x for x in re.findall("`([^`]*)`", text) if re.search(r"letmein(\.py|d)? ", x)]
        bare = [[name] for name in helps()]
        for span in spans:
            commands = letmein_words(span.replace("PORT", "22").replace(" ID", " 1"))
            found += [(words, span) for words in commands if words not in bare]
        for words, where in found:
            assert_parses(words, where)

    def test_configurations(self) -> None:
        """Each configuration is one for both sides, without a warning, as the examples are."""
        required = "[NFTABLES]\nfamily = inet\ntable = filter\nchain-input = LETMEIN-INPUT\n"
        server, client = (HERE / f"{name}.conf.example" for name in ("letmeind", "letmein"))
        texts = [b.text for b in fenced("conf")]
        spans = re.findall("`([0-9A-F]{8} = (?:port|jump)[^`]*)`", documents().replace("\n", " "))
        chains = f"{required}chain-forward = F\nchain-output = O\n[RESOURCES]\n"
        texts += [f"{chains}{span}\n" for span in spans]
        assert len(texts) > 4
        texts += re.findall("(?ms)^cat >/etc/letmeind.conf <<'END'\n(.*?)^END$", documents())
        for text in texts:
            keys = "".join(f"{user} = {KEYS[1].hex()}\n" for user in range(4))
            text = text if "[KEYS]\n" in text else f"{text}\n[KEYS]\n"
            text = text.replace("[KEYS]\n", f"[KEYS]\n{keys}")
            if "[NFTABLES]" not in text:
                text += required
            elif "family" not in text:
                text = text.replace("[NFTABLES]\n", required)
            for side in (True,) if "[USERS]" in text else (False, True):
                assert not letmein.parse_config(text, "letmein.conf", side, []).warnings
        for path in (server, client):
            text = re.sub("# (.*) = PUT-THE-.*", rf"\1 = {KEYS[1].hex()}", path.read_text())
            config = letmein.parse_config(text, path.name, path == server, [])
            assert config.keys and not config.warnings

    def test_rules(self, lab: Lab) -> None:
        """nft takes each ruleset, in the table that it is for."""
        rules = [(b.text, "filter") for b in fenced("nft")]
        assert len(rules) >= 3
        for block in fenced("sh"):
            files = re.findall(r"(?ms)>>?/etc/nftables.d/\S+ <<'END'\n(.*?)^END$", block.text)
            rules += [(text, "fw4") for text in files]
        assert len({table for _, table in rules}) == 2
        lab.load()
        for text, table in rules:
            if not text.startswith("table"):
                text = f"table inet {table} {{\n{text}\n}}\n"
            run(NFT, "-c", "-f", "-", text=text)

    def test_ssh(self, lab: Lab) -> None:
        """ssh takes each configuration for it."""
        if shutil.which("ssh") is None:
            pytest.skip("ssh is not in PATH")
        blocks = fenced("sshconfig")
        assert len(blocks) >= 4
        for block in blocks:
            path = lab.file(block.text)
            host = "nas" if "Host nas" in block.text else "server"
            done = lab.command("-G", "-F", path, host, program=("env", "HOME=/nowhere", "ssh"))
            assert done.status == 0, (block, done)
            ours = r"proxycommand .*letmein(\.py)? connect|exec .letmein knock"
            assert re.search(ours, done.out + block.text), done

    def test_links(self) -> None:
        """Each link leads to a heading or a file, and README's contents to all that are below."""
        anchors: dict[str, set[str]] = {}
        links: dict[str, set[tuple[str, str]]] = {}
        for name in DOCUMENTS:
            text = prose((HERE / name).read_text(encoding="utf-8"))
            headings = re.findall("(?m)^#{2,3} (.*)$", text)
            words = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
            anchors[name] = {"", *(heading.replace(" ", "-") for heading in words)}
            assert len(anchors[name]) == len(headings) + 1
            found = re.findall(r"(?<!!)\[[^\]]*\]\(([^)#]*)#?([^)]*)\)", text)
            links[name] = {(place or name, anchor) for place, anchor in found}
        for name in DOCUMENTS:
            for place, anchor in links[name]:
                assert ":" in place or anchor in anchors[place], (name, place, anchor)
        contents = re.findall(r"\]\(([^)#]*)#?([^)]*)\)", document_section("Contents"))
        listed = {(place or "README.md", anchor) for place, anchor in contents}
        below = {(name, anchor) for name in DOCUMENTS for anchor in anchors[name]}
        assert below - listed <= {("README.md", name) for name in ("", "try-it", "contents")}

    def test_options_of_the_command_line(self) -> None:
        """The chapter has each command and each option that the parser has, and no other."""
        text = document_section("Command line")
        cells = re.findall(r"(?m)^\| (`.*?`) \| ", text.replace("\\|", ""))
        spans = " ".join(re.findall("`([^`]+)`", " ".join(cells)))
        named = set(re.findall(r"(?<![\w-])--?[A-Za-z0-9][a-z0-9-]*", spans))
        assert named == option_names()
        for command in helps():
            assert re.search(rf"\| `{command}", text), command

    def test_options_of_the_files(self) -> None:
        """The chapter has each option that the program knows, and no other, and so have the
        examples, each those of its side."""
        known = {(section, name) for section, names in letmein.OPTIONS.items() for name in names}
        text = document_section("Configuration files")
        named = set()
        for section, names in re.findall(r"(?m)^\| ([A-Z]+) \| (`.*?) \|", text):
            named |= {(section, name) for name in re.findall("`([^`]+)`", names)}
        assert named == known
        for name, others in (("letmeind", {"CLIENT"}), ("letmein", {"NFTABLES", "include"})):
            text = (HERE / f"{name}.conf.example").read_text(encoding="utf-8")
            there = set(re.findall("(?m)^(?:# )?([a-z-]+) = ", text))
            ours = {option for section, option in known if not others & {section, option}}
            assert there == ours

    def test_events_of_the_log(self) -> None:
        """The chapter's table has each event that the program logs, and no other."""
        rows = re.findall(r"(?m)^\| (`[^|]*) \|", document_section("Log"))
        named = {name for row in rows for name in re.findall("`([a-z-]+)`", row)}
        assert len(named) > 15
        assert named == log_events()

    def test_words_of_the_client(self) -> None:
        """What the client says, by the table of likely causes, is what it says."""
        texts = set()
        for node in ast.walk(ast.parse(LETMEIN.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (p.value if isinstance(p, ast.Constant) else "{}" for p in node.values)
                text = "".join(map(str, parts))
            else:
                text = re.sub("{.*?}", "{}", str(getattr(node, "value", "")))
            texts |= {text, text.partition(": ")[2]}  # behind the place
        texts = {text for text in texts if len(text.replace("{}", "")) > 12}
        patterns = [re.escape(text).replace(r"\{\}", ".+") for text in texts]
        words = re.findall(r"(?m)^\| `([^|]*)` \|", document_section("When it does not work"))
        assert len(words) >= 8
        for word in words:
            assert any(re.match(pattern, word) for pattern in patterns), word

    def test_version(self) -> None:
        """The documents name the version that this is."""
        assert f"Version {letmein.VERSION}," in documents()

    def test_lines(self) -> None:
        """Prose is at most 100 characters wide, but for what the bench writes."""
        text = re.sub("(?s)<!-- bench -->.*<!-- /bench -->", "", documents())
        lines = prose(text).splitlines()
        assert not [line for line in lines if len(line) > 100 and line[0] != "|"]


FOLLOWER = "--follow\0--json"  # of which command line it is a part
IPTABLES_RULE = "iptables -A INPUT -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT"


class TestRecipes:
    """The recipes for other devices: they end up as `status` says, whatever is killed."""

    def exercise(
        self, lab: Lab, server: Server, recipes: list[Recipe], state: Callable[[], set[str]]
    ) -> None:
        """Args: state, the addresses that the device lets in, with what is open for them."""

        def agree_with(server: Server) -> None:
            def is_equal() -> bool:
                return state() == {f"{row.address} {row.opens}" for row in status(server)}

            eventually(is_equal, f"{state()} is not what `status` says")

        knock_all(lab, (CLIENT_4, 0x22, 1), (CLIENT_6, 0x23, 1), (OTHER_4, 0x22, 2))
        agree_with(server)
        assert handshake(lab, operation=REVOKE) == COMEIN
        knock_all(lab, (CLIENT_4, 0x24, 1), (OTHER_4, 0x22, 2))
        agree_with(server)
        for word in (FOLLOWER, ""):
            for recipe in recipes:
                recipe.kill(word)
            assert handshake(lab, 0x23, REVOKE, source=CLIENT_6) == COMEIN
            knock_all(lab, (CLIENT_6, 0x22, 1))
            agree_with(server)
            assert handshake(lab, 0x22, REVOKE, source=CLIENT_6) == COMEIN
            knock_all(lab, (CLIENT_6, 0x23, 1))
            agree_with(server)
        knock_all(lab, (CLIENT_4, 0x25, 1))
        server.kill()
        eventually(lambda: len(status(server)) == 4, "its 3 seconds do not end")
        agree_with(server)
        conf = server.path.read_text(encoding="utf-8")
        with Server(lab, conf, "--rundir", str(server.rundir)) as successor:
            knock_all(lab, (OTHER_6, 0x22, 1), (CLIENT_4, 0x25, 1))
            agree_with(successor)
            assert handshake(lab, 0x22, REVOKE, source=OTHER_6) == COMEIN
            agree_with(successor)
        eventually(lambda: not state(), "the server has stopped, and something is open still")

    def test_ipset(self, lab: Lab) -> None:
        """An ipset with timeouts, and an iptables firewall that lets in who is in it."""
        try:
            run("ipset", "create", "letmein-probe", "hash:ip")
            run("ipset", "destroy", "letmein-probe")
        except (OSError, AssertionError) as error:
            pytest.skip(f"ipset does not work here: {error}")

        def state() -> set[str]:
            listing = run("ipset", "-output", "save", "list")
            found = re.findall(r"(?m)^add letmein[46] (\S+?),(\w+):(\d+) timeout [1-9]", listing)
            return {f"{address} {protocol}/{port}" for address, protocol, port in found}

        lab.load()
        with Server(lab, server_conf()) as server, Recipe(lab, server, "letmein-ipset") as recipe:
            eventually(lambda: "letmein6\n" in run("ipset", "-name", "list"), "there are no sets")
            for rule in document_block(IPTABLES_RULE).strip().splitlines():
                run(*rule.split())
            run("iptables", "-A", "INPUT", "-s", "10.1.0.0/24", "-j", "REJECT")
            knock_all(lab, (CLIENT_4, 0x22, 1))
            eventually(lambda: lab.reaches(22, CLIENT_4), "iptables drops it")
            run("ipset", "flush", "letmein4")
            recipe.kill("letmein-ipset\0")
            eventually(lambda: lab.reaches(22, CLIENT_4), "the set stays empty")
            self.exercise(lab, server, [recipe], state)
            run("iptables", "-F", "INPUT")
        run("ipset", "destroy")

    def test_own_command(self, lab: Lab) -> None:
        """A command on open and on close: here one that keeps a file for each lease."""
        lab.load()
        with Server(lab, server_conf()) as server, Recipe(lab, server, "letmein-hook") as recipe:
            place = recipe.directory / "device"
            place.mkdir()
            act = 'case $1 in open) touch "$2 $3";; close) rm -f "$2 $3";; esac'
            recipe.file("letmein-command", f'#!/bin/sh -e\ncd "{place}"\n{act}\n')

            def state() -> set[str]:
                held = [path.name.split() for path in place.iterdir()]
                return {
                    f"{address} {opens}"
                    for address, resource in held
                    for opens in OPENS[int(resource, 16)]
                }

            self.exercise(lab, server, [recipe], state)

    def test_fleet(self, lab: Lab) -> None:
        """The sets of three other machines, over ssh: one knock at the gateway opens them all."""
        lab.load()
        sets = document_block("table inet filter {")
        with contextlib.ExitStack() as stack:
            server = stack.enter_context(Server(lab, server_conf()))
            hosts = [FleetHost(lab, number, sets) for number in (1, 2, 3)]
            recipes = []
            for host in hosts:
                stack.callback(host.close)
                names = ("letmein-nft", "letmein-fleet")
                recipe = Recipe(lab, server, *names, command=f"letmein-fleet {host.address}")
                ssh = shlex.join([shutil.which("ssh") or "ssh", *host.sshd.command[1:]])
                recipe.file("ssh", f'#!/bin/sh\nexec {ssh} "$@"\n')
                recipes.append(stack.enter_context(recipe))
            assert not any(host.reachable() for host in hosts)
            knock_all(lab, (CLIENT_4, 0x22, 1))
            for host in hosts:
                eventually(host.reachable, f"{host.address} stays shut")
            with lab.inside(hosts[0].namespace):
                run(NFT, "flush set inet filter letmein4")
            recipes[0].kill("BatchMode")  # ssh
            eventually(hosts[0].reachable, "its set stays empty")

            def state() -> set[str]:
                states = [host.state() for host in hosts]
                return states[0] if states == states[:1] * 3 else {"they differ"}

            self.exercise(lab, server, recipes, state)
            assert not any(host.reachable() for host in hosts)


class TestFail2ban:
    def test_the_filter_of_the_documents(self, lab: Lab) -> None:
        """It bans those who speak the protocol without a key, over TCP: nobody can forge them."""
        program = shutil.which("fail2ban-regex")
        if program is None:
            pytest.skip("fail2ban-regex is not in PATH")
        banned = {CLIENT_4, CLIENT_6, OTHER_4}
        lab.load()
        with Server(lab, ANSWERS_ALL) as server:
            refused_knock(lab, "tcp", CLIENT_4)
            refused_knock(lab, "tcp", CLIENT_6, user=9)
            with Peer(lab, source=OTHER_4) as peer:
                peer.send(message(RESPONSE, 0x22, token=peer.challenge(0x22), key=KEYS[2]))
                assert peer.receive().operation == GOAWAY
            with Peer(lab, source="10.77.6.1") as peer:
                peer.send(message(KNOCK, 0x99))
                assert peer.receive().operation == GOAWAY
            refused_knock(lab, "udp", OTHER_6)
            for source in ("10.77.6.2", "fd77::2"):
                assert handshake(lab, source=source) == COMEIN
                assert handshake(lab, source=source, operation=REVOKE) == COMEIN
                assert handshake(lab, 0x27, source=source) == GOAWAY
            for number in range(11):
                refused_knock(lab, "udp", "fd77::3", resource=number)
            server.stop()
        for event in ("refused", "granted", "revoked", "failed", "summary", "stopped"):
            assert server.events(event), event
        rules = lab.file(document_block("# /etc/fail2ban/filter.d/letmein.conf"), "filter.conf")
        # As a file, as the journal's reader puts it together, and as syslog writes it.
        bare = [line.partition(" ")[2] if line[0] == "2" else line for line in server.lines]
        for prefix, lines in (
            ("", server.lines),
            ("", bare),
            ("host letmein.py[123]: ", bare),
            ("Nov 21 11:56:26 host letmeind[123]: ", bare),
        ):
            log = lab.file("".join(f"{prefix}{line}\n" for line in lines))
            result = lab.command("--out", "ip", log, rules, program=(program,))
            assert result.status == 0, result
            assert sorted(result.out.split()) == sorted(banned), (prefix, result)


def test_every_message_keeps_the_rules() -> None:
    """Short, plain, in ASCII; and each error has a hint."""
    found = Sayings().found
    for _, problem, hint in letmein.CAUSES.values():
        found += [Said("CAUSES", "problem", problem), Said("CAUSES", "hint", hint)]
    assert len([said for said in found if said.kind == "hint"]) > 50
    wrong = {f"{said.function}: {said.text!r}: {objection(said)}" for said in found}
    wrong = {line for line in wrong if not line.endswith(": ")}
    assert not wrong, "\n".join(sorted(wrong))


def test_a_room_uses_only_those_above_it() -> None:
    """One goes down letmein.py once: no function needs what a later room defines."""
    text = LETMEIN.read_text(encoding="utf-8")
    banners = [n for n, line in enumerate(text.split("\n"), 1) if line.startswith("# ==== ")]
    rooms: dict[str, int] = {}  # by name: where it is defined
    for statement in ast.parse(text).body:
        names = {getattr(statement, "name", "")}
        if isinstance(statement, (ast.Assign, ast.AnnAssign)):
            found = filter(lambda node: isinstance(node, ast.Name), ast.walk(statement))
            names = {node.id for node in found if isinstance(node.ctx, ast.Store)}  # type: ignore[attr-defined]
        rooms.update(dict.fromkeys(names, bisect.bisect(banners, statement.lineno)))

    def too_early(code: CodeType) -> Iterator[str]:
        """What a function uses of later rooms. (Of a module's or class's body Python says so.)"""
        room = bisect.bisect(banners, code.co_firstlineno)
        for instruction in dis.get_instructions(code):
            is_global = instruction.opname == "LOAD_GLOBAL"
            if is_global and rooms.get(instruction.argval, 0) > room:
                yield f"{code.co_name}, in room {room}: {instruction.argval}"
        for inner in code.co_consts:
            if isinstance(inner, CodeType):
                yield from too_early(inner)

    assert list(too_early(compile(text, "", "exec"))) == []


# ----------------------------------------------------------------------------
# 14  The whole: installation
#
# `make install`, the locked tools and the bare file give a program that runs.
# ----------------------------------------------------------------------------


class TestInstall:
    """`make install` and `make uninstall`."""

    @staticmethod
    def make(lab: Lab, *words: str, path: str = "") -> None:
        if shutil.which("make") is None:
            pytest.skip("make is not in PATH")
        clean = ("env", "-u", "MAKEFLAGS", "-u", "MFLAGS", f"PATH={path}{os.environ['PATH']}")
        python = f"PYTHON={sys.executable}"
        result = lab.command(*words, python, program=(*clean, "make", "--silent", "-C", HERE))
        said = 'installed letmein and letmeind; next: README.md, "Server in ten minutes"\n'
        assert (result.status, result.out) == (0, said if words[0] == "install" else ""), result

    @staticmethod
    def tree(root: Path) -> dict[str, tuple[int, bytes]]:
        """The files below a directory: mode and content."""
        files = (path for path in root.rglob("*") if not path.is_dir())
        return {
            str(path.relative_to(root)): (path.stat().st_mode & 0o777, path.read_bytes())
            for path in files
        }

    def test_into_a_package(self, lab: Lab, tmp_path: Path) -> None:
        """Just the files that are named come, work from there, and go again."""
        mine = tmp_path / "etc/letmeind.conf"
        mine.parent.mkdir()
        mine.write_text("mine")
        before = self.tree(tmp_path)
        self.make(lab, "install", f"DESTDIR={tmp_path}")
        installed = self.tree(tmp_path)
        pyc = f"usr/local/lib/letmein/__pycache__/letmein.{sys.implementation.cache_tag}.pyc"
        assert installed.keys() - before.keys() == {
            "usr/local/bin/letmein",
            "usr/local/sbin/letmeind",
            "usr/local/lib/letmein/letmein.py",
            pyc,
            "usr/local/lib/systemd/system/letmeind.service",
            *(f"usr/local/share/doc/letmein/{name}" for name in DOCUMENTS),
            "usr/local/share/doc/letmein/letmein.conf.example",
            "usr/local/share/doc/letmein/letmeind.conf.example",
            "usr/local/share/doc/letmein/nftables.conf",
            "usr/local/share/man/man1/letmein.1",
        }
        modes = {name: mode for name, (mode, _) in installed.items() if name not in before}
        assert {name for name, mode in modes.items() if mode != 0o644} == {
            "usr/local/bin/letmein",
            "usr/local/sbin/letmeind",
        }
        assert modes["usr/local/bin/letmein"] == modes["usr/local/sbin/letmeind"] == 0o755
        # Nothing in there knows where the package was made.
        assert not any(str(tmp_path).encode() in content for _, content in installed.values())
        _, unit = installed["usr/local/lib/systemd/system/letmeind.service"]
        command = f"ExecStart={sys.executable} -I /usr/local/bin/letmein server -c /etc/"
        assert command in unit.decode()
        page = installed["usr/local/share/man/man1/letmein.1"][1].decode().replace("\\-", "-")
        assert page.startswith(".TH LETMEIN 1\n")
        assert all(f".SH {command.name.upper()}\n" in page for command in letmein.COMMANDS)
        assert "\n\\&  -r, --resource ID " in page
        # The same again changes nothing, and what is the owner's is never touched.
        self.make(lab, "install", f"DESTDIR={tmp_path}")
        assert self.tree(tmp_path) == installed
        self.make(lab, "uninstall", f"DESTDIR={tmp_path}")
        self.make(lab, "uninstall", f"DESTDIR={tmp_path}")
        assert self.tree(tmp_path) == before

    def test_the_account(self, lab: Lab, tmp_path: Path) -> None:
        """It is made for this machine alone, once."""
        told = tmp_path / "told"
        programs = tmp_path / "programs"
        programs.mkdir()
        for name, text in (
            ("useradd", f'echo "$@" >>{told}'),
            ("getent", f"[ -e {told} ]"),
        ):
            (programs / name).write_text(f"#!/bin/sh\n{text}\n")
            (programs / name).chmod(0o755)
        self.make(lab, "install", f"DESTDIR={tmp_path}/package", path=f"{programs}:")
        assert not told.exists()
        for _ in range(2):
            self.make(lab, "install", f"PREFIX={tmp_path}/prefix", path=f"{programs}:")
        assert told.read_text().split() == [
            *("--system", "--no-create-home", "--shell", "/usr/sbin/nologin", "letmeind"),
        ]

    def test_it_runs(self, lab: Lab, tmp_path: Path) -> None:
        """Client and server, from the bytecode that was installed."""
        self.make(lab, "install", "DESTDIR=/", f"PREFIX={tmp_path}")
        letmein_program, letmeind_program = tmp_path / "bin/letmein", tmp_path / "sbin/letmeind"
        version = lab.command("--version", program=(letmein_program,))
        assert (version.status, version.out) == (0, f"letmein.py {letmein.VERSION}\n")
        verbose = (sys.executable, "-I", "-v", letmein_program)
        loaded = lab.command("--version", program=verbose).err
        assert re.search(rf"code object from .*{tmp_path}/lib/letmein/__pycache__/", loaded)
        lab.load()
        account = "nobody" if lab.real_root else "none"
        with Server(lab, server_conf(), account=account, program=(letmeind_program,)) as server:
            # The network process starts from the module's code as well, and does so again.
            network = server.network_process()
            os.kill(network, signal.SIGKILL)
            replaced(server, network)
            words = ("-c", lab.file(CLIENT_CONF), "knock", SERVER_4, "22")
            with lab.client():
                lab.command(*words, program=(letmein_program,)).assert_good()
            assert lab.reaches(22, CLIENT_4)


    def test_ctrl_c_while_python_starts(self, lab: Lab, tmp_path: Path) -> None:
        """It ends an installed program at any moment, without a traceback of Python's own."""
        if lab.command("--block-signal=INT", "true", program=("env",)).status != 0:
            pytest.skip("this env cannot block signals")
        self.make(lab, "install", "DESTDIR=/", f"PREFIX={tmp_path}")
        program = tmp_path / "bin/letmein"
        took = min(lab.command("--version", program=(program,)).took for _ in range(5))
        for step in range(60):
            with Running(lab, "--version", program=(program,), env=UNMEASURED) as client:
                time.sleep(took * step / 60)
                result = client.end(signal.SIGINT)
                assert (result.status, result.err) in ((-signal.SIGINT, ""), (0, ""))


LOCKS = HERE / ".ci/lock"
LOCKED_PYTHONS = [f"3.{minor}" for minor in range(9, 15)]

LOCK_INPUTS = {  # what each lock was made from
    **{python: "tools.in" for python in LOCKED_PYTHONS},
    **{f"{python}-bench": "bench.in" for python in LOCKED_PYTHONS},
    **{f"{python}-mutants": "mutants.in" for python in LOCKED_PYTHONS[1:]},
    "uv": "uv.in",
}


class TestLock:
    """The tools of `make`: what .ci/lock names, and nothing else."""

    @staticmethod
    def requirements(path: Path) -> list[str]:
        """Of a lock or its input: one a line, without comments."""
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        lines = (line.partition("#")[0].strip() for line in text.splitlines())
        return [line for line in lines if line]

    def locked(self, name: str) -> dict[str, str]:
        """The version of each package in this lock."""
        found = {}
        for line in self.requirements(LOCKS / f"{name}.txt"):
            package, _, version = line.split()[0].partition("==")
            found[package] = version
        return found

    @staticmethod
    def installed(site: str | Path) -> dict[str, str]:
        """The version of each package there, but for those that a new venv has."""
        found = {}
        for package in importlib.metadata.distributions(path=[str(site)]):
            name = re.sub("[-_.]+", "-", package.metadata["Name"]).lower()
            if name not in ("pip", "setuptools"):
                found[name] = package.version
        return found

    def test_what_runs_is_what_is_locked(self) -> None:
        """The packages beside this Python are those of its lock: each of them, and no others."""
        site = sysconfig.get_path("purelib")
        hint = f"{site} is not what `make tools` installs from .ci/lock"
        assert self.installed(site) == self.locked("{}.{}".format(*sys.version_info)), hint

    def test_each_lock_has_its_input(self) -> None:
        """No lock is missing, none is left over."""
        assert {path.stem for path in LOCKS.glob("*.txt")} == LOCK_INPUTS.keys()
        assert {path.name for path in LOCKS.glob("*.in")} == set(LOCK_INPUTS.values())

    @pytest.mark.parametrize("name", LOCK_INPUTS)
    def test_versions_and_hashes(self, name: str) -> None:
        """Each requirement says which files will do; none says where they come from."""
        path = LOCKS / f"{name}.txt"
        requirements = self.requirements(path)
        for line in requirements:
            words = line.split()
            assert re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", words[0]), line
            assert len(words) > 1, line
            assert all(re.fullmatch("--hash=sha256:[0-9a-f]{64}", word) for word in words[1:]), line
        assert len(requirements) == len(self.locked(name))
        assert "://" not in path.read_text(encoding="utf-8")

    @pytest.mark.parametrize("name", LOCK_INPUTS)
    def test_nothing_is_missing(self, name: str) -> None:
        """What the input asks for is in the lock."""
        lines = self.requirements(LOCKS / LOCK_INPUTS[name])
        asked = {re.split("[^a-z0-9-]", line)[0] for line in lines}
        assert asked
        assert asked <= self.locked(name).keys()

    @pytest.mark.parametrize("python", LOCKED_PYTHONS)
    def test_the_same_everywhere(self, python: str) -> None:
        """All Pythons have the versions that 3.9 can have: mypy reads them as Python 3.9."""
        oldest, tools = self.locked("3.9").items(), self.locked(python)
        assert tools.items() <= oldest
        drawing = self.locked(f"{python}-bench")
        assert {package: drawing.get(package, tools[package]) for package in tools} == tools

    @staticmethod
    def wheel(directory: Path, name: str, version: str) -> str:
        """Write a package that needs `other`; returns the line of a lock for it."""
        path = directory / f"{name}-{version}-py3-none-any.whl"
        metadata = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        if name != "other":
            metadata.append("Requires-Dist: other")
        files = {
            "METADATA": metadata,
            "WHEEL": ["Wheel-Version: 1.0", "Root-Is-Purelib: true", "Tag: py3-none-any"],
            "RECORD": [],
        }
        with zipfile.ZipFile(path, "w") as archive:
            for file, lines in files.items():
                text = "".join(f"{line}\n" for line in lines)
                archive.writestr(f"{name}-{version}.dist-info/{file}", text)
        return f"{name}=={version} --hash=sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}\n"

    def test_make_installs_the_lock_alone(self, tmp_path: Path) -> None:
        """Not what is newer, not what is needed besides, not what pip's settings add; once."""
        name = "{}.{}".format(*sys.version_info)
        index, tree = tmp_path / "index", tmp_path / "tree"
        lock, venv = tree / f".ci/lock/{name}.txt", tree / f".venv/{name}"
        index.mkdir()
        lock.parent.mkdir(parents=True)
        shutil.copy(HERE / "Makefile", tree)
        older = self.wheel(index, "example", "1.0")
        newer = self.wheel(index, "example", "2.0")
        more = tmp_path / "more"
        more.write_text(self.wheel(index, "other", "1.0"))
        clean = ("env", "-u", "MAKEFLAGS", "-u", "MFLAGS")
        settings = (
            *("PIP_NO_INDEX=1", f"PIP_FIND_LINKS={index}"),
            *(f"PIP_REQUIREMENT={more}", f"PIP_TARGET={tmp_path / 'elsewhere'}"),
        )

        def make_tools() -> tuple[bool, str]:
            make = ("make", "--silent", "-C", tree, "tools", f"PYTHON={sys.executable}")
            done = subprocess.run(
                [*clean, *settings, *make], capture_output=True, encoding="utf-8", timeout=120
            )
            return done.returncode == 0, done.stdout + done.stderr

        def installed() -> dict[str, str]:
            return self.installed(venv / f"lib/python{name}/site-packages")

        # No lock at all, and then files that are not those of the lock.
        good, said = make_tools()
        assert not good
        assert said.startswith(f"There is no .ci/lock/{name}.txt")
        assert "make test PYTHON=python3.13\n" in said
        lock.write_text(newer.replace("2.0", "1.0"))
        good, said = make_tools()
        assert not good
        assert "HASH" in said
        assert installed() == {}
        # What failed is done anew.
        lock.write_text(older)
        said = f"Installing into .venv/{name} what .ci/lock/{name}.txt says\n"
        assert make_tools() == (True, said)
        assert installed() == {"example": "1.0"}
        # Then nothing is asked for, so it works without an index, until the lock changes.
        index.rename(tmp_path / "offline")
        assert make_tools() == (True, "")
        (tmp_path / "offline").rename(index)
        lock.write_text(newer)
        assert make_tools()[0]
        assert installed() == {"example": "2.0"}


def test_header_for_script_runners() -> None:
    """What `uv run letmein.py` reads: inline script metadata, as PyPA's specification has it."""
    text = LETMEIN.read_text(encoding="utf-8")
    block = re.search(r"(?m)^# /// script$\s(?P<content>(^#(| .*)$\s)+)^# ///$", text)
    assert block is not None
    assert block["content"] == '# requires-python = ">=3.9"\n'
    assert block.start() < text.index("import")


class TestLightServer:
    @pytest.mark.skipif(SECCOMP != "off", reason="there is no pyseccomp without ctypes")
    def test_both_processes_without_what_openwrt_leaves_out(self, lab: Lab) -> None:
        """Client, server, reload and status work with python3-light."""
        lab.load()
        block = textwrap.dedent(PYTHON3_LIGHT)
        python = lab.file(
            f"#!/bin/sh\ncode=$3; shift 3\nexec {sys.executable} -I -c '{block}'\"$code\" \"$@\"\n",
            mode=0o755,
        )
        words = patched(lab, f"{block}\nsys.executable = {str(python)!r}", "")[:3]
        with Server(lab, HOLD_SERVER, program=[*words, "server"]) as server:
            for control, source in itertools.product(("-T", "-U"), (SERVER_4, SERVER_6)):
                for word in ("knock", "revoke"):
                    lab.letmein(word, control, source, "22", conf=HOLD_CONF).assert_good()
                    assert bool(lab.elements()) == (word == "knock")
            server.process.send_signal(signal.SIGHUP)
            server.wait_for("reloaded")
            result = lab.command("status", "-c", server.path, "--rundir", server.rundir)
            assert "Nobody holds a lease.\nServer: pid " in result.out


# ----------------------------------------------------------------------------
# 15  The whole: bench
#
# The table of .ci/bench tells who is better. What it measures, each run shows.
# ----------------------------------------------------------------------------


class TestBench:
    """The table of .ci/bench tells who is better. What it measures, each run shows."""

    @pytest.fixture(scope="class")
    def bench(self) -> Any:
        loader = importlib.machinery.SourceFileLoader("bench", str(HERE / ".ci/bench"))
        spec = importlib.util.spec_from_loader("bench", loader)
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
        return module

    @pytest.mark.parametrize(
        "better, ours, others, verdict",
        [
            ("less", [10, 20, 30], [[40], [100]], "2 times better"),
            ("less", [20], [[100], [5]], "4 times worse"),
            ("more", [1000], [[10], [500]], "2 times better"),
            ("more", [100], [[150], "- [1]"], "1.50 times worse"),
            ("less", [100], [[102]], "the same"),
            ("less", [0], [[100]], "better"),
            ("less", [math.inf], [[100]], "worse"),
            ("less", [100], [[math.inf]], "better"),
            ("less", [100], ["- [1]"], ""),
            ("", [100], [[200]], ""),
        ],
    )
    def test_who_is_better(
        self, bench: Any, better: str, ours: list[float], others: list[Any], verdict: str
    ) -> None:
        """By the medians, against the best of the others, if there is anything to compare."""
        cells = dict(zip(bench.PROGRAMS, [ours, *others]))
        assert bench.verdict(bench.Row("", "ms", better, cells)) == verdict

    @pytest.mark.parametrize(
        "cell, text",
        [
            ([3], "3"),
            ([1.234, 5.678, 123.4], "5.68 (1.23 to 123)"),
            ([1, 2, math.inf], "2 (1 to never; 2/3)"),
            ("- [1]", "- [1]"),
        ],
    )
    def test_a_figure(self, bench: Any, cell: Any, text: str) -> None:
        """The median, the range, and how many of the knocks succeeded."""
        assert bench.figure(cell) == text

    def test_the_block_of_readme(self, bench: Any, tmp_path: Path) -> None:
        """A new table replaces the old one, and nothing else."""
        path = tmp_path / "README.md"
        path.write_text("before\n<!-- bench -->\nold\n<!-- /bench -->\nbehind\n", encoding="utf-8")
        assert bench.replace_block(path, "new \\1")
        text = path.read_text(encoding="utf-8")
        assert text == "before\n<!-- bench -->\nnew \\1\n<!-- /bench -->\nbehind\n"
        path.write_text("no markers", encoding="utf-8")
        assert not bench.replace_block(path, "new")
        assert path.read_text(encoding="utf-8") == "no markers"
