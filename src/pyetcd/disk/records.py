"""Records of the write-ahead log, encoded and decoded."""

from __future__ import annotations

import re
from enum import IntEnum
from typing import Callable, Dict, Generator, Iterator, List, NamedTuple, Optional, Sequence, Tuple

from ..base.checksums import CRC_BLOCK_BYTES, crc32c, crc32c_chain
from ..base.codec import _SMALL, decode_known, decode_varint, encode_entry_head, encode_varint
from ..base.errors import CodecError, CrcMismatch, TornTail, WalError
from ..base.limits import REPAIR_HINT
from ..base.messages import Entry, EntryID, HardState

_RECORD_START = re.compile(rb"\x08[\x01-\x05]\x10")
_PLAIN_RECORD = re.compile(             # the head of a normal entry with data, or a hard state
    rb"(?s:.{7})\0\x08(?:\x02\x10(%b)\x1a(%b)\x08\0\x10(%b)\x18(%b)\"(%b)|"
    rb"\x03\x10(%b)\x1a(%b)(\x08%b\x10%b\x18%b))".replace(b"%b", rb"[\x80-\xff]{0,9}[\x00-\x7f]")
)


class RecordType(IntEnum):
    """walpb.Record types."""

    METADATA = 1
    ENTRY = 2
    STATE = 3
    CRC = 4
    SNAPSHOT = 5


class WalContents(NamedTuple):
    """The contents of a log behind its snapshot: entries ascend and have no gap."""

    metadata: bytes
    hard_state: HardState
    entries: List[Entry]
    snapshots: List[EntryID]            # of every snapshot record, {0, 0} included


LONG_ENTRY_BYTES = 4_096            # longer entries are not copied
CRC_STEP_BYTES = 1 << 20            # summed in one step: 3 ms
_RECORD_HEADS: Dict[int, bytes] = {kind: b"\x08%c\x10" % kind for kind in RecordType}
_STATE_HEAD = _RECORD_HEADS[RecordType.STATE]


class WalEncoder:
    """Frames in etcd 2.x form, and the running checksum through all of them."""

    __slots__ = ("crc",)

    def __init__(self, crc: int = 0) -> None:
        self.crc = crc

    def record(self, kind: int, data: bytes) -> bytes:
        """Return the frame of one record; the chain includes its data."""
        self.crc = crc32c(data, self.crc)
        return self._frame_head(kind, len(data)) + data

    def batch(self, entries: Sequence[bytes], state: bytes) -> bytes:
        """Return the frames of entries and, unless it is empty, a hard state."""
        pieces = [*entries, state] if state else entries
        kind = _RECORD_HEADS[RecordType.ENTRY]
        parts: List[bytes] = []
        crcs = crc32c_chain(pieces, self.crc)
        for data, crc in zip(pieces, crcs):     # a hot path
            size = len(data)
            head = b"%b%b\x1a%b" % (
                kind if data is not state else _STATE_HEAD, encode_varint(crc),
                _SMALL[size] if size < 1_024 else encode_varint(size),
            )
            parts += (len(head) + size).to_bytes(8, "little"), head, data
        self.crc = crcs[-1] if crcs else self.crc
        return b"".join(parts)

    def long_batch(
        self, entries: Sequence[Entry], state: bytes
    ) -> Generator[None, None, List[bytes]]:
        """Do batch() in pieces, without copies, in steps of CRC_STEP_BYTES; 256 KB: 0.5 ms less."""
        parts: List[bytes] = []
        summed = 0                      # bytes in this step
        for entry in entries:
            head = encode_entry_head(entry)
            crc, view = crc32c(head, self.crc), memoryview(entry.data)
            for offset in range(0, len(view), CRC_STEP_BYTES):
                if summed >= CRC_STEP_BYTES:
                    summed = 0
                    yield
                block = view[offset:offset + CRC_STEP_BYTES]
                crc = crc32c(block, crc)
                summed += len(block)
            self.crc = crc
            start = self._frame_head(RecordType.ENTRY, len(head) + len(entry.data))
            parts += start, head, entry.data
        if state:
            parts.append(self.record(RecordType.STATE, state))
        return parts

    def _frame_head(self, kind: int, size: int) -> bytes:
        """Return the frame of a record up to its `size` bytes of data."""
        head = b"%b%b\x1a%b" % (_RECORD_HEADS[kind], encode_varint(self.crc), encode_varint(size))
        return (len(head) + size).to_bytes(8, "little") + head

    def chain(self) -> bytes:
        """Return the crc record that begins a file."""
        record = _RECORD_HEADS[RecordType.CRC] + encode_varint(self.crc)
        return len(record).to_bytes(8, "little") + record


class WalRecord(NamedTuple):
    """One record of a file: kind (RecordType), stored checksum, data, and its end."""

    kind: int
    crc: int
    data: bytes
    end: int


RunHandler = Callable[["WalDecoder", List[Entry], bytes], None]     # entries; hard state, or b""


class WalDecoder:
    """The records of one file, checked against the chain of checksums.

    Reads 2.x frames and the padded ones of 3.x, also mixed.  `end` is the offset behind the last
    record that its reader has handled.  Raises TornTail if the file ends as a crash during a write
    leaves it, CrcMismatch for any other damage.

    The checksum covers neither lengths nor types: a wrong length shows as the record is whole
    without it, a wrong type in the shape of the data (see _WalReader).
    """

    def __init__(
        self, path: str, data: bytes, crc: int, handle_run: Optional[RunHandler] = None
    ) -> None:
        self.path = path
        self.data = data
        self.crc = crc
        self.end = 0
        self._handle_run = handle_run   # gets each run of plain records that _run finds

    def __iter__(self) -> Iterator[WalRecord]:
        size = len(self.data)
        while self.end < size:
            if self._handle_run is not None and self._run(self._handle_run):
                continue
            record = self._record()
            if record is None:
                return
            self._check(record)
            yield record
            self.end = record.end

    def _run(self, handle: RunHandler) -> bool:
        """Decode normal entries in a row, and the last hard state between them; False: none.

        One checksum is compared: that of the last record continues all before.  3 us an entry
        instead of 15.  Any other form is left to _record().
        """
        data, offset = self.data, self.end
        stop = offset + CRC_BLOCK_BYTES
        entries: List[Entry] = []
        parts: List[bytes] = []
        crc = state = term_bytes = b""
        term = index = 0
        while offset < stop:
            match = _PLAIN_RECORD.match(data, offset)
            end = offset + 8 + int.from_bytes(data[offset:offset + 7], "little")
            if match is None or end > len(data):
                break
            if match.group(8):
                last_crc, size, new_state = match.group(6, 7, 8)
                start = match.start(8)
                if match.end() != end or encode_varint(end - start) != size:
                    break
                state = new_state
            else:
                last_crc, size, terms, indexes, body_size = match.group(1, 2, 3, 4, 5)
                start, body = match.end(2), match.end()
                if encode_varint(end - start) != size or encode_varint(end - body) != body_size:
                    break
                if terms != term_bytes:
                    term_bytes, term = terms, decode_varint(terms, 0)[0]
                before, index = index, decode_varint(indexes, 0)[0]
                if index != before + 1 and entries:
                    break
                entries.append(Entry(0, term, index, data[body:end]))
            parts.append(data[start:end])
            crc, offset = last_crc, end
        if not parts or crc32c(b"".join(parts), self.crc) != decode_varint(crc, 0)[0]:
            return False
        try:
            handle(self, entries, state)
        except CodecError as error:
            raise self.damage(str(error)) from None
        self.crc, self.end = decode_varint(crc, 0)[0], offset
        return True

    def damage(self, reason: str) -> CrcMismatch:
        return CrcMismatch(
            f"read wal error ({reason}) and cannot be repaired: {self.path} is damaged at offset"
            f" {self.end}; {REPAIR_HINT}"
        )

    def _record(self) -> Optional[WalRecord]:
        """Return the record at `end`; None for the zeros of a preallocated tail."""
        data, offset = self.data, self.end
        if offset + 8 > len(data):
            raise self._torn("inside a length")
        length, padding = _wal_frame(data, offset)
        if padding < 0:
            raise self.damage("impossible length")
        end = offset + 8 + length + padding
        if not length or end > len(data):
            self._check_tail(length)
            return None
        try:
            return WalRecord(*_decode_record(data[offset + 8:offset + 8 + length]), end)
        except CodecError as error:
            raise self._bad_record(end, str(error)) from None

    def _check(self, record: WalRecord) -> None:
        if record.kind == RecordType.CRC:
            if record.data or (self.crc and record.crc != self.crc):
                raise self.damage("wal: crc mismatch")
            self.crc = record.crc
            return
        crc = crc32c(record.data, self.crc)
        if crc != record.crc:
            raise self._bad_record(record.end, "walpb: crc mismatch")
        self.crc = crc

    def _check_tail(self, length: int) -> None:
        """Tell the tail from damage, after a length that is 0 or points past the end."""
        data, offset = self.data, self.end
        if not data[offset:].strip(b"\0"):
            return
        # A cut before acknowledged records would lose them.
        whole = _intact_length(data, offset + 8, self.crc)
        if (whole and whole != length) or _has_records(data, offset + 9, self.crc):
            raise self.damage("impossible length")
        raise self._torn("inside a record")

    def _bad_record(self, end: int, reason: str) -> WalError:
        """Return the error of a bad record: torn if it is the last and lacks a sector (3.4)."""
        if not self.data[end:].strip(b"\0"):
            for sector in range(-(-self.end // 512) * 512, end, 512):
                if not self.data[sector:min(sector + 512, end)].strip(b"\0"):
                    return self._torn("in a sector that was never written")
        return self.damage(reason)

    def _torn(self, where: str) -> TornTail:
        return TornTail(f"unexpected EOF: {self.path} ends {where} at offset {self.end}")


def _wal_frame(data: bytes, offset: int) -> Tuple[int, int]:
    """Return (length, padding) of the frame at `offset`; padding -1: impossible."""
    field = int.from_bytes(data[offset:offset + 8], "little")
    length, top = field & ((1 << 56) - 1), field >> 56
    if top == 0:
        return length, 0
    return length, top & 7 if top == 0x80 | -length % 8 else -1


_RECORD = {1: ("kind", 0, int), 2: ("crc", 0, int), 3: ("data", 2, bytes)}


def _decode_record(data: bytes) -> Tuple[int, int, bytes]:
    values = decode_known(data, _RECORD, "Record")
    kind = values.get("kind", 0)
    if not RecordType.METADATA <= kind <= RecordType.SNAPSHOT:
        raise CodecError(f"unknown record type {kind}")
    return kind, values.get("crc", 0), values.get("data", b"")


def _intact_length(data: bytes, start: int, crc: int) -> int:
    """Return the length of the record at `start` by its own fields, 0 if it is not intact."""
    try:
        stored, offset = decode_varint(data, start + 3)
        if data[start:start + 3] == b"\x08\x04\x10":
            return offset - start if stored == crc else 0
        size, offset = decode_varint(data, offset + 1)
    except CodecError:
        return 0
    end = offset + size
    if end > len(data) or crc32c(data[offset:end], crc) != stored:
        return 0
    return end - start


def _has_records(data: bytes, start: int, crc: int) -> bool:
    """Return whether a record behind `start` continues the chain at `crc`, or another record."""
    for match in _RECORD_START.finditer(data, start):
        if _intact_length(data, match.start(), crc):
            return True
        record = _unchecked_record(data, match.start() - 8)
        following = record and _unchecked_record(data, record.end)
        if record and following and crc32c(following.data, record.crc) == following.crc:
            return True
    return False


def _unchecked_record(data: bytes, offset: int) -> Optional[WalRecord]:
    length, padding = _wal_frame(data, offset)
    end = offset + 8 + length
    if length < 4 or padding < 0 or end + padding > len(data):
        return None
    try:
        return WalRecord(*_decode_record(data[offset + 8:end]), end + padding)
    except CodecError:
        return None
