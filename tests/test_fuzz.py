"""Fuzzing: any bytes, in any pieces, at every door."""

from __future__ import annotations

import contextlib
import json
import os
import random
import time
from typing import List, Tuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

import pyetcd
from pyetcd import Message, MsgType, Request, Store
from tests.kit import fuzzing
from tests.kit.basics import TESTDATA
from tests.kit.flags import _FLAGS_FILE, _FLAGS_FILE_JSON
from tests.kit.http import _http_ask, _http_keys, _HttpSocket
from tests.kit.links import _door_change, _door_entry


def _peer_door_seeds():
    """Messages of peer 2 at member 1, each behind its length in eights."""
    entries = [_door_entry(), _door_change(), _door_entry(path="/0/version", val="2.3.0"),
               _door_entry(path="/0/members/9/attributes", val='{"name":"n"}'),
               _door_entry(method="DELETE"), _door_entry(method="SYNC", path="", time=5)]
    for index, entry in enumerate(entries, 2):
        entry.index, entry.term = index, 1
    messages = [
        Message(MsgType.APP, to=1, sender=2, term=1, log_term=1, index=1, commit=9,
                entries=entries),
        Message(MsgType.HEARTBEAT, to=1, sender=2, term=2, commit=2),
        Message(MsgType.VOTE, to=1, sender=2, term=3, log_term=2, index=9),
        Message(MsgType.PROP, to=1, sender=2, entries=entries[:1]),
        Message(MsgType.SNAP, to=1, sender=2, term=4, snapshot=pyetcd.Snapshot(
            Store(history_capacity=1).save(), (1, 2), 50, 3)),
    ]
    seeds = []
    for message in messages:
        body = pyetcd.encode_message(message)
        size = -(-max(len(body) - 8, 0) // 8)
        if size < 256:
            unknown = size * 8 + 8 - len(body)      # up to its length: a field nobody knows
            filler = b"\x7a" + bytes([unknown - 2]) + bytes(unknown - 2) if unknown > 1 else b""
            seeds.append(bytes([size]) + body + filler.ljust(unknown, b"\0"))
    return [*seeds, b"".join(seeds)]


FUZZ_TARGETS = {
    name[5:]: target for name, target in vars(fuzzing).items() if name.startswith("fuzz_")
}


def fuzz_seeds(name):
    """Real input for a target: what it starts to change from."""
    def recorded(pattern):
        return [path.read_bytes()[:4000] for path in sorted(TESTDATA.glob(pattern))]

    requests = [
        b"\x01\x02\x03\x04GET /v2/keys/a?wait=true HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x05\x05\x05\x05PUT /v2/keys/a HTTP/1.1\r\nHost: x\r\nContent-Length: 7\r\n\r\nvalue=1"
        b"GET / HTTP/1.0\r\n\r\n",
        b"\x07\x01\x01\x01POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"3;x=y\r\nabc\r\n0\r\nA: b\r\n\r\n",
        b"\x02\x0a\x04\x09GET / HTTP/1.0\nConnection: keep-alive\n\nHEAD /a HTTP/1.0\n\n",
        b"\x09\x09\x09\x09PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0\0\0\2\1\5\0\0\0\1"
        b"\x82\x86",
    ]
    return {
        "http_requests": requests,
        "http_answers": [
            b"\x03\x03\x03\x03HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
            b"\x02\x02\x02\x02HTTP/1.1 100 C\r\n\r\nHTTP/1.1 200 OK\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
        ],
        "chunks": [b"\x01\x01\x01\x014\r\nWiki\r\n5;a=b\r\npedia\r\n0\r\nX: y\r\n\r\nrest"],
        "forms": [
            b"value=a%20b&ttl=5&prevExist=true", b'text/html; charset="a"; q=1',
            b'{"peerURLs":["http://127.0.0.1:2380"]}', b"Basic cm9vdDpw",
            b"a=http://h:1,b=http://h:2",
            b'{"user":"u","password":"p","roles":["r"],"grant":null,"revoke":[]}',
            b'{"role":"r","permissions":{"kv":{"read":["/*"],"write":null}}}',
        ],
        "peer_streams": recorded("stream-*.bin"),
        "peer_door": _peer_door_seeds(),
        "codec": recorded("pipeline-post-*.bin") + recorded("*.snap"),
        "apply": [pyetcd.encode_request(Request(1, "PUT", path, "v")) for path in (
            "/1/a", "/0/version", "/0/members/1/attributes", "/2/users/u")],
        "store_snapshot": [b"".join(Store().snapshot_chunks())],
        "config_file": [_FLAGS_FILE.encode(), json.dumps(_FLAGS_FILE_JSON).encode()],
    }[name]


# Inputs that once made something escape, with what it was.
_FUZZ_FOUND: List[Tuple[str, bytes]] = [
    # An empty line ended by the line feed with which another one begins.
    ("http_requests", b"\x02\n\x04\tHEAD /a HTTP/1.0\n\n\r\n\r\n\n\r\n"),
    # An empty line without CR: 400 if it came in a piece of its own, 505 if not.
    ("http_requests", b"\t\t\t\tPRI * HTTP/2.0\r\n\nM\r\n\r\n\0\0\0\4\0\0\0\0"),
    # A cluster version that is none ended the member.
    ("apply", pyetcd.encode_request(Request(1, "PUT", "/0/version", "v"))),
    # A change of members of a type that nobody knows was taken for an addition.
    ("apply", b"\x08" + b"\0" * 63 + b"\x08\x01\x10\xed\xa0\x80\xac\xde\x01" + b"\0" * 9),
    # Attributes of a member that are not JSON ended whoever read them later.
    ("apply", b'\x08\x01\x12\x03PUT\x1a\x17/0/members/1/attributes"\x01v(\0002\x80\0008\0@\0P\0X\0`'
              b"\0h8\0@\0P\0X(\0002\0008\0H\0P\0X\0`\0h\0p\0x\0\x80\x01\0"),
    # A key beside the members, where nothing but ids belongs.
    ("apply", b'\x08\x01\x12\x03PUT\x1a\x17/0/members/18attributes"\x01v(\0002\0008\0H\0P\0X\0`\0h'
              b"\0p\0x\0\x80\x01\x08h\0p\0x\0\x80\x01\0x\0\x80\x01\x08h\0p\0x\0\x80\x01\0"),
    # A quoted name with what JSON does not allow in quotes.
    ("config_file", b'"key-\0file": k'),
    ("config_file", b'{"a":' + b"[" * 100_000),
    ("forms", b"[" * 100_000),
    ("http_requests", b"\1\1\1\1GET / HTTP/1.0\n\r\n\n"),
]


@pytest.mark.parametrize("name", FUZZ_TARGETS)
def test_fuzz(name):
    """Changed copies of real input; the seed is printed when it fails."""
    seconds = float(os.environ.get("PYETCD_FUZZ_SECONDS", "0"))
    seed = int(os.environ.get("PYETCD_FUZZ_SEED", "1"))
    rng, seeds, target = random.Random(seed), fuzz_seeds(name), FUZZ_TARGETS[name]
    deadline, runs = time.monotonic() + seconds, 0
    while runs < 300 or time.monotonic() < deadline:
        data = _fuzz_mutate(rng, seeds)
        runs += 1
        try:
            target(data)
        except BaseException:
            print(f"fuzz target {name}, seed {seed}, run {runs}: {data!r}")
            raise
    print(f"{name}: {runs} runs")


def _fuzz_mutate(rng, seeds):
    """Return a seed with bytes changed, cut, doubled, mixed with another."""
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.randrange(8)):
        at = rng.randrange(len(data) + 1)
        change = rng.randrange(6)
        if change == 0:
            data[at:at + 1] = bytes([rng.randrange(256)])
        elif change == 1:
            del data[at:at + rng.randrange(1, 20)]
        elif change == 2:
            data[at:at] = data[at:at + rng.randrange(1, 40)]
        elif change == 3:
            other = rng.choice(seeds)
            data[at:] = other[rng.randrange(len(other) + 1):]
        elif change == 4:
            data[at:at] = rng.choice((b"\xff" * 9, b"\0" * 8, b"\r\n", b"\r\n\r\n", b"%", b"\x80"))
        elif at < len(data):
            data[at] ^= 1 << rng.randrange(8)
    return bytes(data[:8_000])


@given(st.sampled_from(sorted(FUZZ_TARGETS)), st.binary(max_size=300))
def test_fuzz_any_bytes(name, data):
    """Bytes that look like nothing at all."""
    FUZZ_TARGETS[name](data)


@pytest.mark.parametrize(("name", "data"), _FUZZ_FOUND)
def test_fuzz_what_was_found(name, data):
    """The corpus: each of these escaped once."""
    FUZZ_TARGETS[name](data)


def test_fuzz_a_live_member_survives(http_server, caplog):
    """Changed requests and frames at both ports; then it answers, and no bug was logged."""
    rng = random.Random(3)
    seeds = [*fuzz_seeds("http_requests"), *fuzz_seeds("peer_streams"), *fuzz_seeds("codec")]
    for url in (*http_server.client_urls, *http_server.peer_urls):
        for _ in range(150):
            with _HttpSocket(url) as client, contextlib.suppress(OSError):
                client.send(_fuzz_mutate(rng, seeds)[4:])
    assert _http_keys(http_server, "PUT", "/after", "value=1")[0] == 201
    assert _http_ask(http_server, "GET", "/version", peer=True)[0] == 200
    assert not [record for record in caplog.messages if record.startswith("bug:")]
