"""The write-ahead log: the files of etcd 2.x, read and written.

Knows neither the store nor the rules of Raft.
"""

from __future__ import annotations

import contextlib
import functools
import os
from typing import Generator, Iterator, List, NamedTuple, Optional, Sequence, Set, Tuple

from ..base.basics import NO_DESCRIPTOR
from ..base.codec import (
    decode_entry,
    decode_hard_state,
    decode_known,
    encode_entry,
    encode_hard_state,
    encode_varint,
)
from ..base.errors import CodecError, CrcMismatch, FileLocked, TornTail, WalError
from ..base.ids import package_logger
from ..base.limits import REPAIR_HINT, SEGMENT_BYTES_MAX, SEGMENT_PARTS
from ..base.messages import Entry, EntryID, EntryType, HardState
from ..base.text import finish
from .files import _WAL_NAME, OS_DISK, OsDisk, disk_full_as_error
from .records import (
    LONG_ENTRY_BYTES,
    RecordType,
    WalContents,
    WalDecoder,
    WalEncoder,
    WalRecord,
    _decode_record,
    _wal_frame,
)

_LOG_START = EntryID(0, 0)


class Cut(NamedTuple):
    """The next segment: its file name and the bytes it begins with."""

    name: str
    head: bytes


class Wal:
    """The write-ahead log: a directory of segments, each continuing the checksum of the last.

    encode, encode_snapshot, segment_full and encode_cut belong to the reactor's thread and touch
    no file; write, cut, release_to and close belong to the wal thread and touch only files.
    Source: etcd 2.3 wal/wal.go; file formats in wal/walpb.
    """

    def __init__(
        self, directory: str, metadata: bytes, *, disk: OsDisk, segment_bytes: int
    ) -> None:
        self.directory = directory
        self._metadata = metadata
        self._disk = disk
        self._segment_bytes = segment_bytes
        self._encoder = WalEncoder()
        self._hard_state = HardState()          # as last encoded
        self._last_index = -1                   # of the last entry encoded; -1: no segment yet
        self._sequence = -1                     # of the segment that encode() fills
        self._size = 0                          # bytes handed out for it
        self._held: List[Tuple[str, int]] = []  # locked segments, oldest first: name, handle
        self._end = 0                           # bytes written to the newest of them

    # -- opening -----------------------------------------------------------

    @classmethod
    def create(
        cls, directory: str, metadata: bytes, *, disk: OsDisk = OS_DISK,
        segment_bytes: int = SEGMENT_BYTES_MAX,
    ) -> Wal:
        """Begin a new log, durably.  Raises WalError if there is one, FileLocked, OSError."""
        if cls.exists(directory, disk=disk):
            raise WalError(f"wal: file already exists: {directory} holds a log")
        wal = cls(directory, metadata, disk=disk, segment_bytes=segment_bytes)
        disk.makedirs(directory)
        name, head = wal.encode_cut()
        wal.cut(Cut(name, head + wal.encode_snapshot(_LOG_START)))
        return wal

    @classmethod
    def open(
        cls, directory: str, start: EntryID = _LOG_START, *, disk: OsDisk = OS_DISK,
        segment_bytes: int = SEGMENT_BYTES_MAX,
    ) -> Tuple[Wal, WalContents]:
        """Read the log behind the snapshot `start`, and get ready to append.

        A torn tail is cut off, as no entry in it was ever acknowledged; a copy stays as
        `.broken`.  Raises CrcMismatch, FileLocked and WalError; the text names the remedy.
        """
        names = _segments_from(directory, start.index, disk)
        reader = _WalReader(directory, start, disk)
        size = 0
        with contextlib.ExitStack() as cleanup:
            held = cls._lock(directory, names, disk, cleanup)
            for name, handle in held:
                size = reader.read(name, handle, last=name == names[-1])
            contents = reader.contents()
            cleanup.pop_all()
        wal = cls(directory, contents.metadata, disk=disk, segment_bytes=segment_bytes)
        wal._encoder.crc = reader.crc
        wal._hard_state = contents.hard_state
        wal._last_index = contents.entries[-1].index if contents.entries else start.index
        wal._sequence, wal._size = _wal_position(names[-1])[0], size
        wal._held, wal._end = held, size
        return wal, contents

    @classmethod
    def _lock(
        cls, directory: str, names: List[str], disk: OsDisk, cleanup: contextlib.ExitStack
    ) -> List[Tuple[str, int]]:
        """Open and lock segments, which `cleanup` unlocks."""
        held: List[Tuple[str, int]] = []
        cleanup.callback(cls._unlock, directory, held, disk)
        for name in names:
            path = os.path.join(directory, name)
            # Closing a descriptor would free the lock of a member in this process: open none.
            handle = None if disk.is_locked(path) else disk.open_append(path)
            if handle is None or not _lock_or_close(disk, path, handle):
                raise FileLocked(
                    f"open wal error: file already locked: {path} belongs to a running member;"
                    " stop it, or give this one another -data-dir"
                )
            held.append((name, handle))
        return held

    @staticmethod
    def _unlock(directory: str, held: List[Tuple[str, int]], disk: OsDisk) -> None:
        """Free each of the files, even if closing one of them fails."""
        with contextlib.ExitStack() as each:
            for name, handle in held:
                each.callback(disk.unlock, os.path.join(directory, name))
                each.callback(disk.close, handle)

    @staticmethod
    def exists(directory: str, *, disk: OsDisk = OS_DISK) -> bool:
        return any(map(_WAL_NAME.fullmatch, disk.listdir(directory)))

    @staticmethod
    def snapshots(directory: str, *, disk: OsDisk = OS_DISK) -> List[EntryID]:
        """Return the snapshots in the log; only their files may be used.  Raises FileLocked."""
        names = [name for name in disk.listdir(directory) if _WAL_NAME.fullmatch(name)]
        with contextlib.ExitStack() as cleanup:
            held = Wal._lock(directory, names, disk, cleanup)
            # Without the checksums, which open() checks.
            return [id for _, handle in held for id, _ in _scan_snapshots(disk.read_open(handle))]

    @staticmethod
    def read_until_damage(
        directory: str, start: EntryID, *, disk: OsDisk
    ) -> Tuple[WalContents, str]:
        """Return what the log holds behind the snapshot `start` up to the first damage, and what
        the damage is; "" if all is well.  Raises FileLocked, OSError.
        """
        reader = _WalReader(directory, start, disk)
        try:
            names = _segments_from(directory, start.index, disk)
            with contextlib.ExitStack() as cleanup:
                for name, handle in Wal._lock(directory, names, disk, cleanup):
                    reader.read(name, handle, last=name == names[-1])
            return reader.contents(), ""
        except FileLocked:
            raise
        except WalError as error:
            return reader.contents_so_far(), str(error)

    @staticmethod
    def voters_recorded(directory: str, *, disk: OsDisk) -> Set[EntryID]:
        """Return the snapshots whose records in the log carry the voters, as etcd 3.5 writes."""
        return {
            id for name in filter(_WAL_NAME.fullmatch, disk.listdir(directory))
            for id, data in _scan_snapshots(disk.read(os.path.join(directory, name)))
            if data != _encode_walpb_snapshot(id)
        }

    # -- reactor's side ----------------------------------------------------

    def encode(self, hard_state: Optional[HardState], entries: Sequence[Entry]) -> bytes:
        """Return the frames of entries, then of the hard state if it changed."""
        return b"".join(finish(self.encode_steps(hard_state, entries)))

    def encode_steps(
        self, hard_state: Optional[HardState], entries: Sequence[Entry]
    ) -> Generator[None, None, List[bytes]]:
        """Do encode() in steps of some ms, into pieces; no other encode may come between."""
        state = b""
        if entries:
            self._last_index = entries[-1].index
        if hard_state is not None and hard_state != self._hard_state:
            self._hard_state = hard_state
            state = encode_hard_state(hard_state)
        if max([len(entry.data) for entry in entries], default=0) < LONG_ENTRY_BYTES:
            data = [self._encoder.batch([e.encoded or encode_entry(e) for e in entries], state)]
        else:
            data = yield from self._encoder.long_batch(entries, state)
        for entry in entries:
            entry.encoded = None
        self._size += sum(map(len, data))
        return data

    def encode_snapshot(self, snapshot_id: EntryID) -> bytes:
        """Return the frame that makes a snapshot's file usable; it is synced before the file."""
        data = self._encoder.record(RecordType.SNAPSHOT, _encode_walpb_snapshot(snapshot_id))
        self._size += len(data)
        self._last_index = max(self._last_index, snapshot_id.index)
        return data

    def segment_full(self, *, after_snapshot: bool = False) -> bool:
        """Return whether the next batch begins a new segment, as it does after most snapshots.

        A start reads from the segment that holds the snapshot's index, some 3 us an entry.
        """
        return self._size >= self._segment_bytes // (SEGMENT_PARTS if after_snapshot else 1)

    def encode_cut(self) -> Cut:
        self._sequence += 1
        encoder = self._encoder
        head = encoder.chain() + encoder.record(RecordType.METADATA, self._metadata)
        if self._hard_state != HardState():
            head += encoder.record(RecordType.STATE, encode_hard_state(self._hard_state))
        self._size = len(head)
        return Cut(f"{self._sequence:016x}-{self._last_index + 1:016x}.wal", head)

    # -- wal thread's side -------------------------------------------------

    def write(self, *data: bytes, sync: bool) -> None:
        """Append to the last segment.  Raises DiskFull: retry later; OSError: never write again."""
        name, handle = self._held[-1]
        try:
            self._disk.write(handle, *data)
        except OSError:                 # only now: the `with` takes 3 us
            undo = functools.partial(self._disk.truncate, handle, self._end)
            with disk_full_as_error(os.path.join(self.directory, name), undo):
                raise
        self._end += sum(map(len, data))
        if sync:
            self._disk.fdatasync(handle)

    def cut(self, cut: Cut) -> None:
        """Sync the current segment, begin the next, name it once durable.  Raises like write()."""
        disk, directory = self._disk, self.directory
        if self._held:
            disk.fsync(self._held[-1][1])
        path = os.path.join(directory, cut.name)
        with disk_full_as_error(path):
            handle = disk.create(path + ".tmp")
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(disk.close, handle)
            with disk_full_as_error(path):
                disk.write(handle, cut.head)
            disk.fsync(handle)
            disk.rename(path + ".tmp", path)
            with disk_full_as_error(path, codes=NO_DESCRIPTOR):
                disk.fsync_dir(directory)   # opens it
            if not disk.lock(path, handle):
                raise FileLocked(f"open wal error: file already locked: {path}")
            on_failure.pop_all()
        if self._held:
            package_logger("wal").info("segmented wal file %s is created", path)
        self._held.append((cut.name, handle))
        self._end = len(cut.head)

    def release_to(self, index: int) -> None:
        """Unlock the segments that a snapshot at `index` replaces, so that they can be purged."""
        earlier = sum(_wal_position(name)[1] < index for name, _ in self._held)
        keep_from = max(earlier - 1, 0)         # the last of them holds `index`
        self._unlock(self.directory, self._held[:keep_from], self._disk)
        del self._held[:keep_from]

    def close(self) -> None:
        """Release all files; a second call has no effect."""
        held, self._held = self._held, []
        self._unlock(self.directory, held, self._disk)


def _lock_or_close(disk: OsDisk, path: str, handle: int) -> bool:
    with contextlib.ExitStack() as on_failure:
        on_failure.callback(disk.close, handle)
        if disk.lock(path, handle):
            on_failure.pop_all()
            return True
    return False


def _scan_snapshots(data: bytes) -> Iterator[Tuple[EntryID, bytes]]:
    """Yield the snapshot records of a segment, up to the first impossible frame: id, data."""
    offset = 0
    while offset + 8 <= len(data):
        length, padding = _wal_frame(data, offset)
        body = offset + 8
        offset = body + length + padding
        if not length or padding < 0 or offset > len(data):
            return
        if data[body:body + 2] == b"\x08\x05":
            with contextlib.suppress(CodecError):
                record = _decode_record(data[body:body + length])[2]
                yield _decode_walpb_snapshot(record), record


class _WalReader:
    """Collects the contents of the segments, in order."""

    def __init__(self, directory: str, start: EntryID, disk: OsDisk) -> None:
        self.crc = 0
        self._directory = directory
        self._start = start
        self._disk = disk
        self._metadata = b""
        self._headed = False                # the current file has its metadata
        self._hard_state = HardState()
        self._entries: List[Entry] = []
        self._snapshots: List[EntryID] = []
        self._start_term = start.term if not start.index else 0     # of our entry at start.index

    def read(self, name: str, handle: int, *, last: bool) -> int:
        """Read one segment; return its size after a repair."""
        path = os.path.join(self._directory, name)
        decoder = WalDecoder(path, self._disk.read_open(handle), self.crc, self._add_run)
        self._headed, torn = False, ""
        try:
            for record in decoder:
                self._add_record(decoder, record)
        except TornTail as error:
            torn = str(error)
        if not self._headed:
            raise decoder.damage("cut inside its head")     # no crash does that: it was renamed
        if torn and not last:
            raise CrcMismatch(
                f"read wal error ({torn}) and cannot be repaired: later segments exist;"
                f" {REPAIR_HINT}"
            )
        repairs = not self._disk.read_only
        if torn and repairs:
            self._keep_copy(decoder)
        self.crc = decoder.crc
        if last and repairs and decoder.end < len(decoder.data):
            self._disk.truncate(handle, decoder.end)    # zeros of preallocation, or torn bytes
        return decoder.end

    def contents_so_far(self) -> WalContents:
        return WalContents(self._metadata, self._hard_state, self._entries, self._snapshots)

    def contents(self) -> WalContents:
        """Return the log behind the snapshot.  Raises WalError if they do not fit.

        The state may be older than the snapshot: after a crash between the file of a received
        snapshot and the frames behind it.  Then this member has not voted in the snapshot's term.
        """
        start = self._start
        if start not in self._snapshots:
            raise WalError(
                f"wal: snapshot not found: {self._directory} has no record of the snapshot at"
                f" index {start.index}; {REPAIR_HINT}"
            )
        term, vote, commit = self._hard_state
        if start.index:
            vote = vote if term >= start.term else 0
            term, commit = max(term, start.term), max(commit, start.index)
        last = start.index + len(self._entries)
        if commit > last:
            raise WalError(
                f"wal: entries {last + 1} to {commit} are missing: {self._directory} and the"
                f" snapshot at index {start.index} do not fit, perhaps as a later snapshot file is"
                f" lost or damaged; {REPAIR_HINT}"
            )
        state = HardState(term, vote, commit)
        return WalContents(self._metadata, state, self._entries, self._snapshots)

    def _keep_copy(self, decoder: WalDecoder) -> None:
        path, log = decoder.path, package_logger("wal")
        log.warning("repairing %s", path)
        broken = self._disk.create(path + ".broken")
        self._disk.write(broken, decoder.data)
        self._disk.fsync(broken)
        self._disk.close(broken)
        log.warning("repaired WAL error (unexpected EOF): cut %s at offset %d", path, decoder.end)

    def _add_record(self, decoder: WalDecoder, record: WalRecord) -> None:
        data = record.data
        try:
            if record.kind == RecordType.ENTRY:
                self._add_entry(decoder, _wal_entry(data))
            elif record.kind == RecordType.STATE:
                self._set_state(data)
            elif record.kind == RecordType.METADATA:
                if not data or (self._metadata and self._metadata != data):
                    raise decoder.damage("wal: conflicting metadata found")
                self._metadata, self._headed = data, True
            elif record.kind == RecordType.SNAPSHOT:
                self._add_snapshot(_decode_walpb_snapshot(data))
        except CodecError as error:
            raise decoder.damage(str(error)) from None

    def _add_run(self, decoder: WalDecoder, entries: List[Entry], state: bytes) -> None:
        if entries and entries[0].index > self._start.index:    # the usual case
            self._add_entry(decoder, entries[0])
            self._entries += entries[1:]
        else:
            for entry in entries:
                self._add_entry(decoder, entry)
        if state:
            self._set_state(state)

    def _set_state(self, data: bytes) -> None:
        self._hard_state = decode_hard_state(data)
        if not self._hard_state.term or encode_hard_state(self._hard_state) != data:
            raise CodecError("not a hard state")

    def _add_entry(self, decoder: WalDecoder, entry: Entry) -> None:
        start = self._start.index
        if entry.index <= start:
            self._start_term = entry.term if entry.index == start else 0
            self._entries.clear()       # a rewritten suffix begins before the snapshot
            return
        position = entry.index - start - 1
        if position > len(self._entries):
            raise decoder.damage(
                f"entries {start + len(self._entries) + 1} to {entry.index - 1} are missing"
            )
        del self._entries[position:]
        self._entries.append(entry)

    def _add_snapshot(self, snapshot_id: EntryID) -> None:
        """Note a snapshot.  It replaces a log with another entry in its place: a leader sent it.

        Entries before the record of their snapshot come from a backup by etcdctl.
        """
        self._snapshots.append(snapshot_id)
        if snapshot_id == self._start and self._start_term not in (0, snapshot_id.term):
            self._entries.clear()
            self._start_term = snapshot_id.term


def _wal_entry(data: bytes) -> Entry:
    """Decode an entry.  Raises CodecError for the data of any other type of record."""
    entry = decode_entry(data)
    if not entry.index or entry.type > EntryType.CONF_CHANGE_V2 or (entry.type and not entry.data):
        raise CodecError("not an entry")
    return entry


def _wal_position(name: str) -> Tuple[int, int]:
    """Return (sequence, first index) of a segment's name."""
    return int(name[:16], 16), int(name[17:33], 16)


def _segments_from(directory: str, index: int, disk: OsDisk) -> List[str]:
    """Return the names of the segments that hold the entries behind `index`, in order."""
    names = []
    for name in disk.listdir(directory):
        if _WAL_NAME.fullmatch(name):
            names.append(name)
        elif not name.endswith((".tmp", ".broken")):
            package_logger("wal").warning("ignored file %s in wal", name)
    first = max((i for i, n in enumerate(names) if _wal_position(n)[1] <= index), default=-1)
    names = names[max(first, 0):]
    sequences = [_wal_position(name)[0] for name in names]
    if first < 0 or sequences != list(range(sequences[0], sequences[0] + len(names))):
        raise WalError(
            f"wal: file not found: {directory} lacks a segment behind index {index};"
            f" {REPAIR_HINT}"
        )
    return names


def _encode_walpb_snapshot(snapshot_id: EntryID) -> bytes:
    return b"\x08%b\x10%b" % (encode_varint(snapshot_id.index), encode_varint(snapshot_id.term))


def _decode_walpb_snapshot(data: bytes) -> EntryID:
    """Inverse of _encode_walpb_snapshot; etcd 3.5 adds the voters as field 3."""
    values = decode_known(data, {1: ("index", 0, int), 2: ("term", 0, int)}, "walpb.Snapshot")
    snapshot_id = EntryID(values.get("term", 0), values.get("index", 0))
    known = _encode_walpb_snapshot(snapshot_id)
    if data[:len(known)] != known or data[len(known):len(known) + 1] not in (b"", b"\x1a"):
        raise CodecError("not a snapshot record")
    return snapshot_id
