"""Codec, WAL, snapshots: recorded bytes, and every way to damage them."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random

import pytest

import pyetcd
from pyetcd import Entry, EntryID, HardState, RecordType, Wal
from tests.kit.basics import TESTDATA, open_files
from tests.kit.files import (
    _WAL_34,
    _WAL_FIRST,
    _WAL_RECORDED,
    _codec_check_entry,
    _wal_decode,
    _wal_lines,
    _wal_open,
    _wal_other_process_gets,
    _wal_request,
    _wal_unpack,
)
from tests.kit.stores import store_json


def _wal_entries(first, last, term=2):
    return [Entry(0, term, index, _wal_request(index)) for index in range(first, last + 1)]


def _wal_small(directory, **options):
    """A log with a record of every kind: 5 entries, 6 states, 2 snapshots."""
    metadata = pyetcd.encode_metadata(0xA80A825915E9E126, 0xC2403409)
    wal = Wal.create(str(directory), metadata, **options)
    change = pyetcd.encode_conf_change(pyetcd.ConfChange(0, 0, 7, b"{}"))
    wal.write(wal.encode(HardState(1, 0, 1), [Entry(1, 1, 1, change)]), sync=False)
    wal.write(wal.encode(HardState(2, 7, 2), [Entry(0, 2, 2)]), sync=False)
    wal.write(wal.encode_snapshot(EntryID(2, 2)), sync=True)
    for index in (3, 4, 5):
        wal.write(wal.encode(HardState(2, 7, index), _wal_entries(index, index)), sync=False)
    wal.write(wal.encode(HardState(3, 0, 5), []), sync=True)
    wal.close()


def _wal_place(directory, data, name=_WAL_FIRST):
    """Make `directory` a log of this one file."""
    directory.mkdir(exist_ok=True)      # and never removed, which takes ten times as long
    for left in directory.iterdir():
        left.unlink()
    (directory / name).write_bytes(data)


# -- reading what etcd wrote -------------------------------------------------------


@pytest.mark.parametrize("version", _WAL_RECORDED)
@pytest.mark.parametrize("use_snapshot", [True, False], ids=["snapshot", "from 0"])
def test_wal_opens_recorded_data_directory(version, use_snapshot, tmp_path):
    """Snapshot, entries behind it, hard state and identity of a directory of etcd itself."""
    member = _wal_unpack(version, tmp_path)
    lines = _wal_lines(f"datadir-{version}.wal-records.jsonl")
    expected = json.loads((TESTDATA / f"datadir-{version}.expected.json").read_text())
    before = {path.name: path.read_bytes() for path in (member / "wal").iterdir()}

    known = Wal.snapshots(str(member / "wal"))
    snapshot = pyetcd.Snapshotter(str(member / "snap")).load(set(known))
    start = EntryID(snapshot.term, snapshot.index) if use_snapshot else EntryID(0, 0)
    contents = _wal_open(member / "wal", start)

    assert known == [EntryID(0, 0), EntryID(2, 51), EntryID(2, 102)]
    assert (snapshot.term, snapshot.index, len(snapshot.voters)) == (2, 102, 1)
    assert [e.index for e in contents.entries] == list(range(start.index + 1, 125))
    wanted = {line["Index"]: line for line in lines if line["type"] == "entry"}
    for entry in contents.entries:
        _codec_check_entry(entry, wanted[entry.index])
    last = expected["wal_segments"][-1]["last_state"]
    assert contents.hard_state == (last["term"], int(last["vote"], 16), last["commit"])
    member_id, cluster_id = pyetcd.decode_metadata(contents.metadata)
    assert pyetcd.format_id(member_id) == expected["self"]["id"]
    assert pyetcd.format_id(cluster_id) == expected["cluster_id"]
    assert {path.name: path.read_bytes() for path in (member / "wal").iterdir()} == before


@pytest.mark.parametrize("version", _WAL_RECORDED)
def test_wal_recorded_directory_gives_the_keys_of_etcd(version, tmp_path):
    """Snapshot and log applied to a store: the same keys and members as etcd showed."""
    member = _wal_unpack(version, tmp_path)
    expected = json.loads((TESTDATA / f"datadir-{version}.expected.json").read_text())
    snapshot = pyetcd.Snapshotter(str(member / "snap")).load()
    contents = _wal_open(member / "wal", EntryID(snapshot.term, snapshot.index))

    store, now_ns = pyetcd.Store(), 1_795_388_500 * pyetcd.NS
    store.recover(snapshot.data)
    cluster = pyetcd.Cluster(store=store)
    cluster.recover()
    applier = pyetcd.Applier(store, cluster, 1, clock=lambda: now_ns)
    for entry in contents.entries:
        applier.apply_entry(entry)

    def without_ttl(node):
        kept = {key: value for key, value in node.items() if key not in ("ttl", "nodes")}
        return {**kept, "nodes": [without_ttl(child) for child in node.get("nodes", [])]}
    shown = json.loads(store_json(store, "/1", recursive=True, sorted=True, now_ns=now_ns))
    assert without_ttl(shown["node"]) == without_ttl(expected["keys"]["node"])
    assert str(store.current_index) == expected["headers_at_dump"]["X-Etcd-Index"]
    members = [json.loads(member.client_json()) for member in sorted(cluster.members.values())]
    assert members == expected["members"]["members"]


@pytest.mark.parametrize("tail", [0, 1, 7, 8, 4096, 200_000])
def test_wal_opens_34_with_preallocated_tail(tail, tmp_path):
    """Padding and zeros of 3.4 are read; our frames follow, without zeros between."""
    recorded = (TESTDATA / f"{_WAL_34}-{_WAL_FIRST}").read_bytes()
    _wal_place(tmp_path / "wal", recorded + bytes(tail))

    wal, contents = Wal.open(str(tmp_path / "wal"))
    wal.write(wal.encode(HardState(3, 0, 4), _wal_entries(5, 6, term=3)), sync=True)
    wal.close()

    assert [entry.index for entry in contents.entries] == [1, 2, 3, 4]
    assert contents.hard_state == (2, 0x3A40368DE0605E4D, 4)
    again = _wal_open(tmp_path / "wal")
    assert again.entries[:4] == contents.entries
    assert again.entries[4:] == _wal_entries(5, 6, term=3)
    data = (tmp_path / "wal" / _WAL_FIRST).read_bytes()
    assert data.startswith(recorded) and not data[len(recorded):].startswith(b"\0")


# -- writing -----------------------------------------------------------------------


def test_wal_first_file_has_the_head_of_etcd(tmp_path):
    """crc record 0, metadata, snapshot {0,0}; directory 0700, file 0600, as etcd leaves them."""
    metadata = pyetcd.encode_metadata(1, 2)
    wal = Wal.create(str(tmp_path / "wal"), metadata)
    wal.close()
    path = tmp_path / "wal" / _WAL_FIRST
    records = [(r.kind, r.data) for _, r in _wal_decode("", path.read_bytes())]
    assert records == [(4, b""), (1, metadata), (5, b"\x08\0\x10\0")]
    assert path.read_bytes()[:12] == bytes.fromhex("0400000000000000 08041000")
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert [p.name for p in path.parent.iterdir()] == [_WAL_FIRST]


def test_wal_create_refuses_to_replace_a_log(tmp_path):
    """What is there was promised to others; it is never overwritten."""
    _wal_small(tmp_path / "wal")
    with pytest.raises(pyetcd.WalError, match="already exists"):
        Wal.create(str(tmp_path / "wal"), b"\x08\x01\x10\x02")
    assert len(_wal_open(tmp_path / "wal").entries) == 5


def test_wal_encode_writes_entries_then_a_changed_state(tmp_path):
    """The order of 2.3; a state that has not changed is not written again."""
    wal = Wal.create(str(tmp_path / "wal"), b"\x08\x01\x10\x02")
    state = HardState(2, 1, 2)
    crc = wal._encoder.crc
    first = wal.encode(state, _wal_entries(1, 2))
    second = wal.encode(state, _wal_entries(3, 3))
    third = wal.encode(None, [])
    wal.close()
    kinds = [record.kind for _, record in _wal_decode("", first + second, crc)]
    assert kinds == [RecordType.ENTRY, RecordType.ENTRY, RecordType.STATE, RecordType.ENTRY]
    assert third == b""


def test_wal_rewritten_suffix_replaces_the_older_one(tmp_path):
    """Raft overwrites a conflicting tail; the last written entry of an index counts."""
    wal = Wal.create(str(tmp_path / "wal"), b"\x08\x01\x10\x02")
    wal.write(wal.encode(HardState(2, 0, 1), _wal_entries(1, 5)), sync=True)
    wal.write(wal.encode(HardState(3, 0, 1), _wal_entries(3, 4, term=3)), sync=True)
    wal.close()
    entries = _wal_open(tmp_path / "wal").entries
    assert entries == _wal_entries(1, 2) + _wal_entries(3, 4, term=3)


def test_wal_runs_hold_what_the_single_records_do(tmp_path):
    """A log of every kind of record, with suffixes rewritten, is the same read both ways."""
    rng, last = random.Random(20153), 0
    wal = Wal.create(str(tmp_path / "wal"), pyetcd.encode_metadata(1, 2))
    for term in range(2, 202):
        first = rng.randint(max(last - 3, 1), last + 1)
        last = first + rng.randrange(8)
        entries = _wal_entries(first, last, term=term * 40)
        spoiled = rng.choice(entries)
        spoiled.type, spoiled.data = rng.choice((
            (0, b""), (1, b"\x08\x01"), (0, spoiled.data), (0, b"x" * 20_000)))
        wal.write(wal.encode(HardState(term * 40, term % 3, 1), entries), sync=False)
    wal.close()

    data, entries = (tmp_path / "wal" / _WAL_FIRST).read_bytes(), []
    for _, record in _wal_decode("", data):
        if record.kind == RecordType.ENTRY:
            entry = pyetcd.decode_entry(record.data)
            entries[entry.index - 1:] = [entry]
    contents = _wal_open(tmp_path / "wal")
    assert contents.entries == entries and len(entries) > 300
    assert contents.hard_state == (201 * 40, 0, 1)


def test_wal_closes_a_segment_early_behind_a_snapshot(tmp_path):
    """A part of a segment is enough then, and what a start has to read stays small."""
    wal = Wal.create(str(tmp_path / "wal"), pyetcd.encode_metadata(1, 2), segment_bytes=64_000)
    assert not wal.segment_full(after_snapshot=True)
    wal.write(wal.encode(HardState(2, 1, 50), _wal_entries(1, 50)), sync=True)
    assert wal.segment_full(after_snapshot=True) and not wal.segment_full()
    wal.close()


def test_wal_continues_over_many_segments(tmp_path, wal_log):
    """Names count up, each file begins with chain, metadata and state; all read as one log."""
    wal = Wal.create(str(tmp_path / "wal"), pyetcd.encode_metadata(1, 2), segment_bytes=600)
    for index in range(1, 31):
        wal.write(wal.encode(HardState(2, 1, index), _wal_entries(index, index)), sync=True)
        if wal.segment_full():
            wal.cut(wal.encode_cut())
        if index % 10 == 0:             # over a restart too
            wal.close()
            wal, _ = Wal.open(str(tmp_path / "wal"), segment_bytes=600)
    wal.close()

    paths = sorted((tmp_path / "wal").iterdir())
    contents = _wal_open(tmp_path / "wal")
    assert contents.entries == _wal_entries(1, 30) and contents.hard_state == (2, 1, 30)
    assert len(paths) > 4 and wal_log.text.count("segmented wal file") == len(paths) - 1
    crc = 0
    for number, path in enumerate(paths):
        records = [record for _, record in _wal_decode("", path.read_bytes(), crc)]
        assert int(path.name[:16], 16) == number and records[0].crc == crc
        entries = [pyetcd.decode_entry(r.data) for r in records if r.kind == RecordType.ENTRY]
        if number and entries:
            assert [r.kind for r in records[:3]] == [4, 1, 3]
            assert int(path.name[17:33], 16) == entries[0].index
        crc = records[-1].crc


def test_wal_reads_from_the_segment_of_the_snapshot(tmp_path):
    """Segments before it may be gone; a segment missing in the middle is refused."""
    wal = Wal.create(str(tmp_path / "wal"), pyetcd.encode_metadata(1, 2), segment_bytes=1)
    for index in range(1, 6):
        wal.write(wal.encode(HardState(2, 1, index), _wal_entries(index, index)), sync=True)
        wal.write(wal.encode_snapshot(EntryID(2, index)), sync=True)
        wal.cut(wal.encode_cut())
    wal.close()
    paths = sorted((tmp_path / "wal").iterdir())
    for path in paths[:2]:
        path.unlink()
    assert [e.index for e in _wal_open(tmp_path / "wal", EntryID(2, 3)).entries] == [4, 5]
    with pytest.raises(pyetcd.WalError, match="wal: file not found"):
        _wal_open(tmp_path / "wal")
    paths[3].unlink()
    with pytest.raises(pyetcd.WalError, match="wal: file not found"):
        _wal_open(tmp_path / "wal", EntryID(2, 3))


@pytest.mark.parametrize("start", [EntryID(1, 2), EntryID(2, 3)], ids=["other term", "no record"])
def test_wal_refuses_a_snapshot_it_does_not_know(start, tmp_path):
    """A snapshot file without its record must not be combined with this log."""
    _wal_small(tmp_path / "wal")
    with pytest.raises(pyetcd.WalError, match="snapshot not found"):
        _wal_open(tmp_path / "wal", start)


def test_wal_snapshot_record_without_file_is_harmless(tmp_path):
    """A crash came before the file was written: the log from the snapshot before still holds."""
    _wal_small(tmp_path / "wal")
    known = Wal.snapshots(str(tmp_path / "wal"))
    (tmp_path / "snap").mkdir()
    assert known == [EntryID(0, 0), EntryID(2, 2)]
    assert pyetcd.Snapshotter(str(tmp_path / "snap")).load(set(known)) is None
    assert len(_wal_open(tmp_path / "wal").entries) == 5


def test_wal_received_snapshot_replaces_another_history(tmp_path):
    """Entries behind a snapshot of another term belonged to a log that is gone."""
    wal = Wal.create(str(tmp_path / "wal"), b"\x08\x01\x10\x02")
    wal.write(wal.encode(HardState(2, 0, 1), _wal_entries(1, 9)), sync=True)
    wal.write(wal.encode_snapshot(EntryID(4, 5)), sync=True)
    crashed = (tmp_path / "wal" / _WAL_FIRST).read_bytes()
    wal.write(wal.encode(HardState(4, 3, 5), _wal_entries(6, 6, term=4)), sync=True)
    wal.close()
    assert _wal_open(tmp_path / "wal", EntryID(4, 5)).entries == _wal_entries(6, 6, term=4)
    _wal_place(tmp_path / "crashed", crashed)
    contents = _wal_open(tmp_path / "crashed", EntryID(4, 5))
    assert contents.entries == [] and contents.hard_state == (4, 0, 5), "raised to the snapshot"


def test_wal_own_snapshot_keeps_the_entries_behind_it(tmp_path):
    """The same index and term as our own entry: nothing is replaced."""
    wal = Wal.create(str(tmp_path / "wal"), b"\x08\x01\x10\x02")
    wal.write(wal.encode(HardState(2, 1, 5), _wal_entries(1, 9)), sync=True)
    wal.write(wal.encode_snapshot(EntryID(2, 5)), sync=True)
    wal.close()
    contents = _wal_open(tmp_path / "wal", EntryID(2, 5))
    assert contents.entries == _wal_entries(6, 9) and contents.hard_state == (2, 1, 5)


def test_wal_backup_of_etcdctl_has_the_entries_before_the_snapshot(tmp_path):
    """Its log begins behind the snapshot, and says so last."""
    wal = Wal.create(str(tmp_path / "wal"), b"\x08\x01\x10\x02")
    wal.write(wal.encode(HardState(2, 1, 9), _wal_entries(6, 9)), sync=True)
    wal.write(wal.encode_snapshot(EntryID(2, 5)), sync=True)
    wal.close()
    contents = _wal_open(tmp_path / "wal", EntryID(2, 5))
    assert contents.entries == _wal_entries(6, 9) and contents.hard_state == (2, 1, 9)


# -- damage ------------------------------------------------------------------------


def test_wal_every_truncation_recovers_a_prefix(tmp_path, wal_log):
    """Cut at any byte, the whole records before remain; the torn tail is kept as .broken."""
    _wal_small(tmp_path / "wal")
    data = (tmp_path / "wal" / _WAL_FIRST).read_bytes()
    full = _wal_open(tmp_path / "wal")
    ends = [0, *(record.end for _, record in _wal_decode("", data))]
    for size in range(len(data)):
        _wal_place(tmp_path / "cut", data[:size])
        wal_log.clear()
        if size < ends[3]:              # head: no crash leaves this, as it got its name complete
            with pytest.raises(pyetcd.WalError, match=r"remove this member"):
                _wal_open(tmp_path / "cut")
            continue
        contents = _wal_open(tmp_path / "cut")
        whole = max(end for end in ends if end <= size)
        assert contents.entries == full.entries[:len(contents.entries)]
        assert (tmp_path / "cut" / _WAL_FIRST).read_bytes() == data[:whole]
        broken = tmp_path / "cut" / f"{_WAL_FIRST}.broken"
        assert broken.exists() == (size not in ends)
        if size not in ends:
            assert broken.read_bytes() == data[:size]
            assert f"repairing {tmp_path / 'cut' / _WAL_FIRST}" in wal_log.text
            assert "repaired WAL error (unexpected EOF)" in wal_log.text
        assert _wal_open(tmp_path / "cut") == contents, "one repair is enough"


def test_wal_goes_on_after_a_repair(tmp_path):
    """The chain of checksums continues from the last good record."""
    _wal_small(tmp_path / "wal")
    path = tmp_path / "wal" / _WAL_FIRST
    path.write_bytes(path.read_bytes()[:-40])
    wal, contents = Wal.open(str(tmp_path / "wal"))
    last = contents.entries[-1].index
    added = _wal_entries(last + 1, last + 3, term=4)
    wal.write(wal.encode(HardState(4, 0, last), added), sync=True)
    wal.close()
    assert _wal_open(tmp_path / "wal").entries == contents.entries + added


def test_wal_every_flipped_byte_is_refused_or_harmless(tmp_path):
    """No single wrong byte gives other entries, another state or another identity, or loses any.

    The checksum covers neither a length nor a type: a length of 0 looked like the end of the
    log, an entry like a hard state.
    """
    _wal_small(tmp_path / "wal")
    data = (tmp_path / "wal" / _WAL_FIRST).read_bytes()
    full, refused = _wal_open(tmp_path / "wal"), 0
    for offset, byte in enumerate(data):
        for flip in {1, 2, 3, 4, 6, 7, 0x10, 0x80, 0xFF, byte} - {0}:
            damaged = bytearray(data)
            damaged[offset] ^= flip
            _wal_place(tmp_path / "x", bytes(damaged))
            try:
                contents = _wal_open(tmp_path / "x")
            except pyetcd.WalError as error:
                refused += 1
                assert str(tmp_path / "x") in str(error) and "remove this member" in str(error)
                continue
            assert contents == full, f"byte {offset} xor {flip:#x} was accepted"
            assert os.listdir(tmp_path / "x") == [_WAL_FIRST], f"byte {offset} xor {flip:#x}"
    assert refused > 9 * len(data)


def test_wal_every_flipped_byte_of_34_is_refused_or_harmless(tmp_path):
    """The same with padded frames and a preallocated tail; padding itself means nothing."""
    recorded = (TESTDATA / f"{_WAL_34}-{_WAL_FIRST}").read_bytes()
    _wal_place(tmp_path / "x", recorded)
    full = _wal_open(tmp_path / "x")
    for offset, byte in enumerate(recorded):
        for flip in {1, 4, 0x80, byte} - {0}:
            damaged = bytearray(recorded) + bytes(64)
            damaged[offset] ^= flip
            _wal_place(tmp_path / "x", bytes(damaged))
            with contextlib.suppress(pyetcd.WalError):
                assert _wal_open(tmp_path / "x") == full, f"byte {offset} xor {flip:#x}"


def test_wal_random_damage_never_gives_wrong_entries(tmp_path):
    """Runs of zeros, garbage and lost pieces: a prefix at most, never anything else."""
    seed = 20152
    print(f"seed {seed}")
    rng = random.Random(seed)
    _wal_small(tmp_path / "wal")
    data = (tmp_path / "wal" / _WAL_FIRST).read_bytes()
    full = _wal_open(tmp_path / "wal")
    for _ in range(1500):
        start = rng.randrange(len(data))
        size = rng.randrange(1, 80)
        filler = rng.choice([bytes(size), rng.getrandbits(8 * size).to_bytes(size, "big"), b""])
        damaged = data[:start] + filler + data[start + size:]
        _wal_place(tmp_path / "x", damaged)
        with contextlib.suppress(pyetcd.WalError):
            contents = _wal_open(tmp_path / "x")
            assert contents.entries == full.entries[:len(contents.entries)]
            assert contents.metadata == full.metadata


def test_wal_damage_in_the_middle_says_where_and_what_to_do(tmp_path):
    """File, offset and the way out are in the one line that the operator sees."""
    _wal_small(tmp_path / "wal")
    path = tmp_path / "wal" / _WAL_FIRST
    data = bytearray(path.read_bytes())
    offset, record = _wal_decode("", bytes(data))[5]
    data[record.end - 1] ^= 1
    path.write_bytes(data)
    with pytest.raises(pyetcd.CrcMismatch) as caught:
        _wal_open(tmp_path / "wal")
    text = str(caught.value)
    assert f"{path} is damaged at offset {offset}" in text and "cannot be repaired" in text
    assert "remove this member" in text and "backup" in text and "\n" not in text
    assert path.read_bytes() == data, "nothing is touched"


def test_wal_torn_segment_before_the_last_is_refused(tmp_path):
    """Only the last file can be torn by a crash; entries of the later ones would be cut off."""
    wal = Wal.create(str(tmp_path / "wal"), pyetcd.encode_metadata(1, 2))
    wal.write(wal.encode(HardState(2, 1, 2), _wal_entries(1, 2)), sync=True)
    wal.cut(wal.encode_cut())
    wal.write(wal.encode(HardState(2, 1, 3), _wal_entries(3, 3)), sync=True)
    wal.close()
    path = tmp_path / "wal" / _WAL_FIRST
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(pyetcd.CrcMismatch, match="later segments exist"):
        _wal_open(tmp_path / "wal")


@pytest.mark.parametrize("tail", [0, 3000], ids=["grown", "preallocated"])
def test_wal_last_record_with_a_sector_never_written_is_torn(tail, tmp_path):
    """3.4's rule: the length reached the disk, a 512-byte sector of the data did not."""
    wal = Wal.create(str(tmp_path / "wal"), b"\x08\x01\x10\x02")
    wal.write(wal.encode(HardState(2, 1, 2), _wal_entries(1, 2)), sync=True)
    wal.write(wal.encode(None, [Entry(0, 2, 3, b"x" * 4000)]), sync=True)
    wal.close()
    path = tmp_path / "wal" / _WAL_FIRST
    data = bytearray(path.read_bytes())
    data[1024:1536] = bytes(512)
    path.write_bytes(bytes(data) + bytes(tail))
    assert _wal_open(tmp_path / "wal").entries == _wal_entries(1, 2)
    assert (tmp_path / "wal" / f"{_WAL_FIRST}.broken").exists()


def test_wal_other_files_are_ignored(tmp_path, wal_log):
    """What a crash, a repair or 3.x leaves there does not matter; the unknown is named."""
    _wal_small(tmp_path / "wal")
    for name in ("0.tmp", f"{_WAL_FIRST}.broken", "readme"):
        (tmp_path / "wal" / name).write_bytes(b"junk")
    assert len(_wal_open(tmp_path / "wal").entries) == 5
    assert "ignored file readme in wal" in wal_log.text


# -- locks, release, purge ---------------------------------------------------------


@pytest.mark.parametrize("how", ["create", "open", "repair"])
def test_wal_is_locked_against_other_processes(how, tmp_path):
    """POSIX locks vanish when any descriptor of the file is closed: reading must not do that."""
    directory, path = str(tmp_path / "wal"), tmp_path / "wal" / _WAL_FIRST
    if how == "create":
        wal = Wal.create(directory, b"\x08\x01\x10\x02")
    else:
        _wal_small(directory)
        if how == "repair":
            path.write_bytes(path.read_bytes()[:-3])
        wal, _ = Wal.open(directory)
    assert not _wal_other_process_gets(path)
    for attempt in (Wal.open, Wal.snapshots):       # nor may another member of this process
        with pytest.raises(pyetcd.FileLocked, match="file already locked.*-data-dir"):
            attempt(directory)
    assert not _wal_other_process_gets(path)
    wal.close()
    assert _wal_other_process_gets(path)
    assert Wal.snapshots(directory)


def test_wal_release_and_purge(tmp_path, wal_log):
    """A snapshot frees the segments before it; purge removes the oldest up to a locked one."""
    wal = Wal.create(str(tmp_path / "wal"), pyetcd.encode_metadata(1, 2))
    for index in range(1, 6):
        wal.write(wal.encode(HardState(2, 1, index), _wal_entries(index, index)), sync=True)
        wal.write(wal.encode_snapshot(EntryID(2, index)), sync=True)
        wal.cut(wal.encode_cut())
    paths = sorted((tmp_path / "wal").iterdir())
    stale = tmp_path / "wal" / f"{paths[2].name}.tmp"
    growing = tmp_path / "wal" / "0000000000000009-0000000000000009.wal.tmp"
    stale.write_bytes(b""), growing.write_bytes(b"")
    directory = str(tmp_path / "wal")
    assert pyetcd.purge_files(directory, ".wal", 0) == []
    assert pyetcd.purge_files(directory, ".wal", 2) == [str(stale)], "all of them are locked"

    wal.release_to(3)                   # names begin at 0, 2, 3, 4, 5, 6: 3 is in the second
    assert [_wal_other_process_gets(path) for path in paths] == [True] + [False] * 5
    wal.release_to(100)
    assert [_wal_other_process_gets(path) for path in paths] == [True] * 5 + [False]
    assert pyetcd.purge_files(directory, ".wal", 2) == [str(path) for path in paths[:4]]
    assert f"purged file {paths[0]} successfully" in wal_log.text
    wal.close()
    assert growing.exists() and _wal_open(directory, EntryID(2, 5)).entries == []


def test_wal_write_failure_reaches_the_caller(tmp_path):
    """Nobody knows then what is on disk; the wal thread ends the process."""
    class Full(pyetcd.OsDisk):
        def fdatasync(self, handle):
            raise OSError(28, "No space left on device")

    wal = Wal.create(str(tmp_path / "wal"), b"\x08\x01\x10\x02", disk=Full())
    with pytest.raises(OSError, match="No space left"):
        wal.write(wal.encode(HardState(1, 0, 0), []), sync=True)
    wal.close()


class _NoDescriptorDisk(pyetcd.OsDisk):
    """The operations named in `failing` find no descriptor, until they have failed once."""

    def __init__(self, code, failing):
        self.code, self.failing = code, failing

    def _fail(self, what):
        if what in self.failing:
            self.failing.discard(what)
            raise OSError(self.code, os.strerror(self.code))

    def create(self, path):
        self._fail("create")
        return super().create(path)

    def fsync_dir(self, path):
        self._fail("fsync_dir")
        super().fsync_dir(path)


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE], ids=["process", "system"])
@pytest.mark.parametrize("step", ["create", "fsync_dir"])
def test_wal_without_descriptors_is_like_a_full_disk(tmp_path, code, step):
    """A new segment and a snapshot: nothing is left open, and the next try succeeds."""
    disk = _NoDescriptorDisk(code, set())
    snapshotter = pyetcd.Snapshotter(str(tmp_path), disk=disk)
    wal = Wal.create(str(tmp_path / "wal"), b"\x08\x01\x10\x02", disk=disk)
    with contextlib.closing(wal):
        wal.write(wal.encode(HardState(1, 0, 0), []), sync=True)
        cut = wal.encode_cut()
        snapshot = pyetcd.Snapshot(b"{}", (1, 2), 5, 2)
        before = len(open_files())
        disk.failing = {step}
        with pytest.raises(pyetcd.DiskFull, match="too many open files.*ulimit -n"):
            wal.cut(cut)
        disk.failing = {step}
        with pytest.raises(pyetcd.DiskFull, match="too many open files.*ulimit -n"):
            snapshotter.save(snapshot)
        assert len(open_files()) == before
        wal.cut(cut)
        snapshotter.save(snapshot)
        assert snapshotter.load() == snapshot
    assert len(list((tmp_path / "wal").glob("*.wal"))) == 2
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("size", [7, 5_000, 1 << 20])
def test_wal_short_writes_are_continued(tmp_path, monkeypatch, size):
    """The system may write a part only, as on a disk that is nearly full."""
    calls = []

    def write_some(handle, pieces):
        calls.append(len(pieces))
        return os.write(handle, b"".join(pieces)[:size])

    values = [os.urandom(1_000 * number) for number in range(8)]        # some in pieces
    entries = [Entry(0, 1, index, value) for index, value in enumerate(values, 1)]
    monkeypatch.setattr(os, "writev", write_some)
    with contextlib.closing(Wal.create(str(tmp_path / "wal"), b"\x08\x01\x10\x02")) as wal:
        wal.write(*pyetcd.finish(wal.encode_steps(HardState(1, 0, 8), entries)), sync=True)
    assert _wal_open(tmp_path / "wal").entries == entries
    assert len(calls) >= sum(map(len, values)) // size and max(calls) > 1


def test_wal_batch_is_written_in_few_calls(tmp_path, monkeypatch):
    """Each call lets another thread run: three a record made PUTs of 16 KB a fifth slower."""
    calls, write_some = [], os.writev
    monkeypatch.setattr(os, "writev", lambda *call: calls.append(1) or write_some(*call))
    with contextlib.closing(Wal.create(str(tmp_path / "wal"), b"\x08\x01\x10\x02")) as wal:
        entries = [Entry(0, 1, index, bytes(16 << 10)) for index in range(1, 2_001)]
        pieces = pyetcd.finish(wal.encode_steps(HardState(1, 0, 8), entries))
        del calls[:]
        wal.write(*pieces, sync=True)
    assert len(pieces) >= 2_000 and len(calls) == -(-len(pieces) // 1_024)
    assert _wal_open(tmp_path / "wal").entries == entries


# -- power loss between any two disk operations ----------------------------------


class _WalPowerLoss(BaseException):
    """The power fails inside a disk operation."""


class _WalMemoryDisk(pyetcd.OsDisk):
    """Files in memory; what was not synced, and names whose directory was not, can be lost."""

    def __init__(self, operations, keep):
        self.left = operations          # until the power fails
        self.keep = keep                # part of the unsynced bytes that survives: 0.0 to 1.0
        self.live, self.durable, self.handles = {}, {}, {}

    def _spend(self):
        self.left -= 1
        if self.left < 0:
            raise _WalPowerLoss

    def lose_power(self):
        """Return the disk that the next start finds."""
        after = _WalMemoryDisk(10**9, 1.0)
        names = self.live if self.keep == 1.0 else self.durable
        for path, file in names.items():
            kept = len(file["synced"]) + int((len(file["data"]) - len(file["synced"])) * self.keep)
            data = bytes(file["data"][:kept])
            after.live[path] = {"data": bytearray(data), "synced": data}
        after.durable = dict(after.live)
        return after

    def makedirs(self, path): pass

    def listdir(self, path):
        return sorted(os.path.basename(p) for p in self.live if os.path.dirname(p) == path)

    def read(self, path):
        return bytes(self.live[path]["data"])

    def read_open(self, handle):
        return bytes(handle["data"])

    def create(self, path, mode=0o600):
        self._spend()
        self.live[path] = {"data": bytearray(), "synced": b""}
        return self.live[path]

    def open_append(self, path):
        return self.live[path]

    def write(self, handle, *data):
        self._spend()
        handle["data"] += b"".join(data)

    def fdatasync(self, handle):
        self._spend()
        handle["synced"] = bytes(handle["data"])

    fsync = fdatasync

    def truncate(self, handle, size):
        self._spend()
        del handle["data"][size:]
        handle["synced"] = bytes(handle["data"])

    def rename(self, old, new):
        self._spend()
        self.live[new] = self.live.pop(old)

    def fsync_dir(self, path):
        self._spend()
        self.durable = {p: f for p, f in self.durable.items() if os.path.dirname(p) != path}
        self.durable.update((p, f) for p, f in self.live.items() if os.path.dirname(p) == path)

    def lock(self, path, handle): return True
    def unlock(self, path): pass
    def is_locked(self, path): return False
    def close(self, handle): pass


def _wal_life(disk, acknowledged):
    """Write entries, own snapshots, a received one and cuts; note what was acknowledged."""
    wal = Wal.create("/wal", pyetcd.encode_metadata(1, 2), disk=disk, segment_bytes=700)
    snapshotter = pyetcd.Snapshotter("/snap", disk=disk)
    index = 0
    for turn in range(9):
        wal.write(wal.encode(HardState(2, 1, index), _wal_entries(index + 1, index + 2)), sync=True)
        index += 2
        acknowledged.append(index)
        received = turn == 5            # of entries that we never had
        if received or turn in (2, 7):
            index += 10 if received else 0
            wal.write(wal.encode_snapshot(EntryID(2, index)), sync=True)
            snapshotter.save(pyetcd.Snapshot(b"{}", (1,), index, 2))
            if received:
                wal.write(wal.encode(HardState(2, 1, index), []), sync=True)
                acknowledged.append(index)
        if wal.segment_full():
            wal.cut(wal.encode_cut())
    wal.close()


@pytest.mark.parametrize("keep", [0.0, 0.4, 1.0])
def test_wal_recovers_from_power_loss_at_every_disk_operation(keep):
    """Whatever was acknowledged is there again, and the log can be opened and continued."""
    operations, finished = 0, False
    while not finished:
        disk, acknowledged = _WalMemoryDisk(operations, keep), [0]
        try:
            _wal_life(disk, acknowledged)
            finished = True
        except _WalPowerLoss:
            pass
        operations += 1
        after = disk.lose_power()
        if not Wal.exists("/wal", disk=after):
            assert acknowledged == [0], "the log is gone"
            continue
        known = set(Wal.snapshots("/wal", disk=after))
        snapshot = pyetcd.Snapshotter("/snap", disk=after).load(known)
        start = EntryID(snapshot.term, snapshot.index) if snapshot else EntryID(0, 0)
        wal, contents = Wal.open("/wal", start, disk=after)
        last = contents.entries[-1].index if contents.entries else start.index
        assert last >= acknowledged[-1], f"operation {operations}: {last} of {acknowledged[-1]}"
        assert start.index <= contents.hard_state.commit <= last
        wal.write(wal.encode(HardState(3, 0, last), _wal_entries(last + 1, last + 1, 3)), sync=True)
        assert Wal.open("/wal", start, disk=after)[1].entries[-1].index == last + 1
    assert operations > 50


def test_wal_a_lock_is_freed_when_its_path_leads_elsewhere(tmp_path, monkeypatch):
    """A link that was moved, or a relative path from another working directory."""
    real = tmp_path / "real"
    real.mkdir()
    link = tmp_path / "link"
    link.symlink_to(real)
    wal = Wal.create(str(link), b"m")
    link.unlink()
    link.symlink_to(tmp_path)
    wal.close()
    monkeypatch.chdir(tmp_path)
    wal, _ = Wal.open("real")
    monkeypatch.chdir(real)
    wal.close()
    assert not pyetcd._locked_paths
    Wal.open(str(real))[0].close()
