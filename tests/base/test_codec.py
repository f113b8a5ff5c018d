"""Codec, WAL, snapshots: recorded bytes, and every way to damage them."""

from __future__ import annotations

import contextlib
import gzip
import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

import pyetcd
from pyetcd import Entry, Message, MsgType, RecordType
from tests.kit.basics import TESTDATA
from tests.kit.files import (
    _WAL_34,
    _WAL_FIRST,
    _WAL_RECORDED,
    _codec_check_entry,
    _wal_decode,
    _wal_lines,
    _wal_request,
    _wal_unpack,
)


def _codec_check_record(record, line):
    """Compare a WAL record with its line; return what our encoder makes of its contents."""
    shown = RecordType(record.kind).name.lower(), record.crc
    assert shown == (line["type"], int(line["crc"], 16))
    if record.kind == RecordType.ENTRY:
        entry = pyetcd.decode_entry(record.data)
        _codec_check_entry(entry, line)
        return pyetcd.encode_entry(entry)
    if record.kind == RecordType.STATE:
        state, wanted = pyetcd.decode_hard_state(record.data), line["HardState"]
        assert state == (wanted["term"], int(wanted["vote"], 16), wanted["commit"])
        return pyetcd.encode_hard_state(state)
    if record.kind == RecordType.METADATA:
        ids = pyetcd.decode_metadata(record.data)
        assert ids == (int(line["NodeID"], 16), int(line["ClusterID"], 16))
        return pyetcd.encode_metadata(*ids)
    if record.kind == RecordType.SNAPSHOT:
        found = pyetcd._decode_walpb_snapshot(record.data)
        assert found == (line["Snapshot"]["term"], line["Snapshot"]["index"])
        return pyetcd._encode_walpb_snapshot(found)
    return b""


def _codec_check_message(data, wanted):
    """Compare a raftpb.Message with its JSON; the bytes must come back the same."""
    message = pyetcd.decode_message(data)
    assert message.type == wanted["type"]
    assert [message.to, message.sender] == [int(wanted[key], 16) for key in ("to", "from")]
    assert (
        message.term, message.log_term, message.index, message.commit, message.reject,
        message.reject_hint,
    ) == tuple(wanted[k] for k in ("term", "logTerm", "index", "commit", "reject", "rejectHint"))
    for entry, line in zip(message.entries, wanted["entries"]):
        _codec_check_entry(entry, line)
    assert len(message.entries) == len(wanted["entries"])
    snapshot, metadata = message.snapshot or pyetcd.Snapshot(), wanted["snapshot"]["metadata"]
    assert (len(snapshot.data), snapshot.index, snapshot.term) == (
        wanted["snapshot"]["data_len"], metadata["index"], metadata["term"])
    assert list(map(pyetcd.format_id, snapshot.voters)) == metadata["conf_state_nodes"]
    assert pyetcd.encode_message(message) == data


# -- codec ---------------------------------------------------------------------


@pytest.mark.parametrize("version", _WAL_RECORDED)
def test_codec_wal_records_as_recorded(version, tmp_path):
    """Every record of the 2.x directories reads as in the .jsonl and comes back the same."""
    member = _wal_unpack(version, tmp_path)
    lines = _wal_lines(f"datadir-{version}.wal-records.jsonl")
    crc = 0
    for path in sorted((member / "wal").iterdir()):
        data, encoder, out = path.read_bytes(), pyetcd.WalEncoder(crc), []
        for offset, record in _wal_decode(path.name, data, crc):
            line = lines.pop(0)
            assert (path.name, offset) == (line["file"], line["off"])
            assert record.end - offset - 8 == line["len"]
            encoded = _codec_check_record(record, line)
            if version == "2.0.13" and record.data == encoded + b'"\0':
                encoded = record.data       # 2.0 writes an empty data field too
            is_crc = record.kind == RecordType.CRC
            out.append(encoder.chain() if is_crc else encoder.record(record.kind, encoded))
        assert b"".join(out) == data
        crc = encoder.crc
    assert not lines


def test_codec_wal_34_padded_records():
    """Frames of 3.4 carry 0 to 7 bytes of padding and say so in the length."""
    data = (TESTDATA / f"{_WAL_34}-{_WAL_FIRST}").read_bytes()
    lines = _wal_lines(f"{_WAL_34}.records.jsonl")
    encoder, out = pyetcd.WalEncoder(), []
    for (offset, record), line in zip(_wal_decode("3.4", data), lines):
        assert (offset, record.end - offset - 8) == (line["off"], line["len"] + line["pad"])
        encoded = _codec_check_record(record, line)
        is_crc = record.kind == RecordType.CRC
        frame = encoder.chain() if is_crc else encoder.record(record.kind, encoded)
        top = bytes([0x80 | line["pad"]]) if line["pad"] else b"\0"
        out.append(frame[:7] + top + frame[8:] + bytes(line["pad"]))
    assert b"".join(out) == data and len(out) == len(lines)


def test_codec_plain_message_is_the_same_by_the_short_way(monkeypatch):
    """Random numbers of all sizes, whole, cut and damaged: both ways agree, also in refusing."""
    rng = random.Random(5)

    def decoded(data):
        try:
            return pyetcd.encode_message(pyetcd.decode_message(data))
        except pyetcd.CodecError as error:
            return str(error)

    short = 0
    for _ in range(500):
        numbers = [rng.getrandbits(rng.choice((0, 7, 14, 32, 64))) for _ in range(7)]
        message = Message(rng.choice(list(MsgType)), **dict(zip(
            ("to", "sender", "term", "log_term", "index", "commit", "reject_hint"), numbers)))
        message.reject = rng.random() < 0.2
        data = bytearray(pyetcd.encode_message(message))
        if rng.random() < 0.3:
            data[rng.randrange(len(data))] = rng.randrange(256)
        if rng.random() < 0.1:
            del data[rng.randrange(len(data)):]
        short += pyetcd._decode_plain_message(bytes(data)) is not None
        quick = decoded(bytes(data))
        with monkeypatch.context() as patch:
            patch.setattr(pyetcd, "_decode_plain_message", lambda data: None)
            assert decoded(bytes(data)) == quick, bytes(data)
    assert short > 200


@pytest.mark.parametrize("sizes", [(0,), (1, 5_000), (4_096, 0, 70_000), (300_000, 300_000)],
                         ids=str)
@pytest.mark.parametrize("state", [b"", b"\x08\x02\x10\x01\x18\x03"], ids=["", "state"])
def test_codec_long_batch_is_the_plain_one(sizes, state):
    """The way without copies gives the same bytes, and the same checksum to go on with."""
    entries = [Entry(0, 3, index, random.Random(size).randbytes(size))
               for index, size in enumerate(sizes, 1 << 20)]
    plain, quick = pyetcd.WalEncoder(77), pyetcd.WalEncoder(77)
    wanted = plain.batch([pyetcd.encode_entry(entry) for entry in entries], state)
    assert b"".join(pyetcd.finish(quick.long_batch(entries, state))) == wanted
    assert quick.crc == plain.crc


@pytest.mark.parametrize(("sizes", "count"), [
    ((), 0), ((5,), 1), ((100,), 1), ((60, 40), 2), ((60, 39, 2, 1), 3), ((101, 1), 1),
    ((0, 0, 200, 1), 3),
])
def test_codec_first_entries_are_as_many_as_fill_the_bytes(sizes, count, monkeypatch):
    monkeypatch.setattr(pyetcd, "WORK_BYTES_MAX", 100)
    entries = [Entry(0, 1, index, bytes(size)) for index, size in enumerate(sizes, 1)]
    assert pyetcd.first_part(entries) == count


@pytest.mark.parametrize("name", [
    "election-candidate-to-voter", "election-voter-to-candidate", "follower-to-leader",
    "leader-to-follower",
])
def test_codec_message_stream_as_recorded(name):
    """8 bytes of big-endian length, then a Message; all of it comes back the same."""
    data = (TESTDATA / f"stream-message-{name}.bin").read_bytes()
    frames = json.loads((TESTDATA / f"stream-message-{name}.json").read_text())["frames"]
    offset = 0
    for frame in frames:
        size = int.from_bytes(data[offset:offset + 8], "big")
        assert (offset, size) == (frame["offset"], frame["frame_len"])
        _codec_check_message(data[offset + 8:offset + 8 + size], frame["message"])
        offset += 8 + size
    assert offset == len(data)


@pytest.mark.parametrize("number", range(7))
def test_codec_pipeline_post_as_recorded(number):
    """Bodies of POST /raft are one Message each, MsgSnap with its store included."""
    post = json.loads((TESTDATA / "pipeline-post.json").read_text())["posts"][number]
    _codec_check_message((TESTDATA / post["file"]).read_bytes(), post["message"])


def test_codec_snapshot_post_of_34():
    """A ConfState of 3.4 has one field more; voters, index and term are found all the same."""
    body = gzip.decompress((TESTDATA / "snapshot-post-3.4.23.bin.gz").read_bytes())
    wanted = json.loads((TESTDATA / "snapshot-post-3.4.23.json").read_text())
    size = int.from_bytes(body[:8], "big")
    message = pyetcd.decode_message(body[8:8 + size])
    assert size == wanted["message_len"]
    assert len(message.snapshot.data) == wanted["snapshot_data_len"]
    metadata = wanted["snapshot_metadata"]
    assert (message.snapshot.index, message.snapshot.term) == (metadata["index"], metadata["term"])
    voters = b"".join(b"\x08" + pyetcd.encode_varint(voter) for voter in message.snapshot.voters)
    assert voters.hex() + "2800" == metadata["conf_state_hex"]


def test_codec_snapshot_file_as_recorded():
    """The .snap file of 2.3.8: checksum, voters, index, term and the store inside."""
    name = "0000000000000002-0000000000000066.snap"
    content = (TESTDATA / name).read_bytes()
    wanted = json.loads((TESTDATA / f"{name}.json").read_text())
    snapshot = pyetcd.decode_snapshot_file(content)
    metadata = wanted["snapshot"]["metadata"]
    assert (snapshot.index, snapshot.term) == (metadata["index"], metadata["term"])
    assert list(map(pyetcd.format_id, snapshot.voters)) == metadata["conf_state_nodes"]
    assert json.loads(bytes(snapshot.data)) == wanted["store"]
    data = b"".join(pyetcd.encode_snapshot_parts(snapshot))
    head = b"\x08%b\x12%b" % (pyetcd.encode_varint(wanted["crc"]), pyetcd.encode_varint(len(data)))
    assert head + data == content


@pytest.mark.parametrize(("data", "crc"), [
    (b"", 0), (b"a", 0xC1D04330), (b"123456789", 0xE3069283), (b"\0" * 32, 0x8A9136AA),
    (b"\xff" * 32, 0x62A8AB43), (bytes(range(32)), 0x46DD794E),
])
def test_codec_crc32c_known_values(data, crc):
    """RFC 3720 B.4; and a checksum can be continued at any byte."""
    assert pyetcd.crc32c(data) == crc
    for cut in range(len(data)):
        assert pyetcd.crc32c(data[cut:], pyetcd.crc32c(data[:cut])) == crc


def plain_crc32c(data, crc=0):
    """The checksum bit by bit, as its definition goes."""
    crc ^= 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def test_codec_crc32c_of_long_data_is_that_of_its_pieces():
    """Long data take another way through the arithmetic; every length around its limits."""
    data = random.Random(7).randbytes(140_000)
    piece = pyetcd.CRC_FOLD_BYTES_MIN // 2          # no piece takes that way
    for size in (*range(390, 410), *range(700, 720), 1024, 4099, 65535, 65536, 65537, 65935, 65936,
                 131073, 140_000):
        crc = 0
        for offset in range(0, size, piece):
            crc = pyetcd.crc32c(data[offset:min(offset + piece, size)], crc)
        assert pyetcd.crc32c(data[:size]) == crc, size


@given(st.binary(max_size=1_500), st.integers(0, 0xFFFFFFFF))
def test_codec_crc32c_equals_its_definition(data, crc):
    """Whatever was summed before, and whatever comes now."""
    assert pyetcd.crc32c(data, crc) == plain_crc32c(data, crc)


@given(st.text(max_size=30), st.integers(0, 300))
def test_codec_json_of_long_text_is_that_of_its_pieces(text, padding):
    """Long text without anything to escape is recognized in another way than short text."""
    long = "x" * padding + text
    wanted = "".join(pyetcd.json_string(char)[1:-1] for char in long)
    assert pyetcd.json_string(long) == f'"{wanted}"'


def test_codec_empty_messages_as_etcd_writes_them():
    """The link heartbeat of a message stream: 28 bytes from 2.3, 30 from 3.4, read alike."""
    head, tail = "08081000180020002800300040004a", "50005800"
    ours = bytes.fromhex(head + "0812060a0010001800" + tail)
    theirs = bytes.fromhex(head + "0a12080a02280010001800" + tail)
    assert pyetcd.encode_message(pyetcd.Message(pyetcd.MsgType.HEARTBEAT)) == ours
    assert pyetcd.encode_message(pyetcd.decode_message(theirs)) == ours
    assert (len(ours), len(theirs)) == (28, 30)


def test_codec_request_forms_in_an_entry():
    """A bare Request, one wrapped by InternalRaftRequest, and an operation of the v3 API."""
    request = pyetcd.Request(
        id=2**64 - 1, method="PUT", path="/1/\udcff", val="ä", prev_exist=False, refresh=True,
        expiration=-5, time=2**62, prev_index=2**63, dir=True,
    )
    bare = pyetcd.encode_request(request)
    assert pyetcd.decode_request(bare) == request
    wrapped = b"\x08\x05\x12" + pyetcd.encode_varint(len(bare)) + bare
    assert pyetcd.decode_request(wrapped) == request
    assert pyetcd.decode_request(b"\x08\x05\x22\x03\x0a\x01a") is None


def test_codec_varints_of_ids_are_read_like_any_other():
    """The short way for numbers that differ in their lowest bits, up to ten bytes of any value."""
    rng = random.Random(20156)
    for _ in range(2_000):
        data = pyetcd.encode_varint(rng.getrandbits(rng.choice((3, 7, 14, 15, 21, 35, 63, 64))))
        padded = bytes(byte | 128 for byte in rng.randbytes(rng.randrange(10))) + b"\x7f"
        for varint in (data, padded):
            assert pyetcd._varint_number(varint) == pyetcd.decode_varint(varint, 0)[0]


@pytest.mark.parametrize("size", [1 << 31, 1 << 32, 1 << 35, 1 << 62, 1 << 63, (1 << 64) - 1])
def test_codec_entry_with_a_huge_size_in_it_is_damaged(size):
    """Not too large for this machine's numbers: that ended each member that applied the entry."""
    key, value = b"\x1a\x04/1/k", b'"\x01v'
    data = pyetcd.encode_request(pyetcd.Request(1, "PUT", "/1/k", "v"))
    huge = pyetcd.encode_varint(size)
    for field in (key, value):
        assert field in data
        with pytest.raises(pyetcd.CodecError):
            pyetcd.read_command(data.replace(field, field[:1] + huge + field[2:]))
    nested = b"\x08\x05\x12" + huge + data
    with pytest.raises(pyetcd.CodecError):
        pyetcd.read_command(nested)


def test_codec_plain_put_is_read_like_any_other():
    """The short way for a PUT of a value returns what the general one does, also for near ones."""
    rng = random.Random(20152)
    for _ in range(500):
        request = pyetcd.Request(
            rng.getrandbits(rng.choice((7, 30, 64))), "PUT",
            "/1/" + "k" * rng.choice((0, 1, 124, 125, 20_000)),
            rng.choice(("", "v", "ä\udcff", '"(' * 64, "x" * 70_000)),
            dir=rng.random() < 0.2, expiration=rng.choice((0, 0, 0, 1 << 60)),
        )
        data = pyetcd.encode_request(request)
        nested = b"\x08\x05\x12" + pyetcd.encode_varint(len(data)) + data
        assert pyetcd.decode_request(data) == pyetcd.decode_request(nested) == request


@pytest.mark.parametrize("decode", [
    pyetcd.decode_entry, pyetcd.decode_message, pyetcd.decode_request, pyetcd.decode_snapshot,
    pyetcd.decode_conf_change, pyetcd.decode_hard_state, pyetcd.decode_metadata,
    pyetcd.decode_snapshot_file,
])
def test_codec_garbage_raises_codec_error_only(decode):
    """Bytes from the network or a damaged disk never end in another exception."""
    seed = 20151
    print(f"seed {seed}")
    rng = random.Random(seed)
    entry = Entry(0, 2, 3, _wal_request(3))
    snapshot = pyetcd.Snapshot(b"{}", (1,), 2, 3)
    message = pyetcd.Message(3, to=1, sender=2, entries=[entry], snapshot=snapshot)
    samples = [
        pyetcd.encode_message(message), pyetcd.encode_entry(entry), entry.data,
        b"".join(pyetcd.encode_snapshot_parts(snapshot)),
    ]
    for _ in range(2000):
        data = bytearray(rng.choice(samples))
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        with contextlib.suppress(pyetcd.CodecError):
            decode(bytes(data[:rng.randrange(len(data) + 1)]))


@pytest.mark.parametrize("text", [
    "2027-01-15T24:00:00Z", "2027-01-15T08:00:60Z", "2027-02-30T08:00:00Z",
    "2027-01-15T08:00:00+01:60", "2027-01-15T08:00:00-00:99", "2027-01-15T08:00:00+24:00",
])
def test_codec_time_out_of_range_is_refused_by_every_python(text):
    """Members on different versions of Python read the same snapshot."""
    with pytest.raises(ValueError):
        pyetcd.parse_time(text)
