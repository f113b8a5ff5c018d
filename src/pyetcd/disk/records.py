"""Records of the write-ahead log, encoded and decoded."""

from __future__ import annotations

from typing import Callable, Dict, Generator, Iterator, List, NamedTuple, Optional, Sequence, Tuple

from ..base.checksums import CRC_BLOCK_BYTES, crc32c, crc32c_chain
from ..base.codec import (
    _BYTE,
    _SMALL,
    check_wire_type,
    decode_fields,
    decode_varint,
    encode_entry_head,
    encode_varint,
)
from ..base.errors import CodecError, CrcMismatch, TornTail, WalError
from ..base.limits import REPAIR_HINT
from ..base.messages import Entry, EntryID, HardState
from .files import _PLAIN_RECORD, _RECORD_START, RecordType


class WalContents(NamedTuple):
    """What a log holds behind its snapshot: entries ascend and have no gap."""

    metadata: bytes
    hard_state: HardState
    entries: List[Entry]
    snapshots: List[EntryID]            # of every snapshot record seen, {0, 0} included


LONG_ENTRY_BYTES = 4_096            # from here on it pays not to copy an entry
CRC_STEP_BYTES = 1 << 20            # summed in one step: 3 ms
_RECORD_HEADS: Dict[int, bytes] = {kind: b"\x08%b\x10" % _BYTE[kind] for kind in RecordType}
_STATE_HEAD = _RECORD_HEADS[RecordType.STATE]


class WalEncoder:
    """Frames in etcd 2.x form, and the running checksum through all of them."""

    __slots__ = ("crc",)

    def __init__(self, crc: int = 0) -> None:
        self.crc = crc

    def record(self, kind: int, data: bytes) -> bytes:
        """Return the frame of one record; the chain includes its data."""
        self.crc = crc = crc32c(data, self.crc)
        head = b"%b%b\x1a%b" % (_RECORD_HEADS[kind], encode_varint(crc), encode_varint(len(data)))
        return self._frame(head + data)

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
        """Return the same in pieces, none of which is copied, in steps of CRC_STEP_BYTES.

        256 KB take 0.5 ms less than by batch().
        """
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
            size = len(head) + len(entry.data)
            start = b"%b%b\x1a%b" % (
                _RECORD_HEADS[RecordType.ENTRY], encode_varint(self.crc), encode_varint(size))
            parts += (len(start) + size).to_bytes(8, "little"), start, head, entry.data
        if state:
            parts.append(self.record(RecordType.STATE, state))
        return parts

    def chain(self) -> bytes:
        """Return the crc record that begins a file."""
        return self._frame(b"\x08\x04\x10" + encode_varint(self.crc))

    @staticmethod
    def _frame(record: bytes) -> bytes:
        return len(record).to_bytes(8, "little") + record


class WalRecord(NamedTuple):
    """One record of a file: kind (RecordType), stored checksum, data, and where it ends."""

    kind: int
    crc: int
    data: bytes
    end: int


RunTaker = Callable[["WalDecoder", List[Entry], bytes], None]   # entries; hard state, or b""


class WalDecoder:
    """The records of one file, checked against the chain of checksums.

    Reads 2.x frames and the padded ones of 3.x, also mixed.  `end` is the offset behind the last
    record that its reader has taken.  Raises TornTail if the file ends as a crash during a write
    leaves it, CrcMismatch for everything else that is wrong.

    The checksum covers neither lengths nor types: a wrong length shows as the record is whole
    without it, a wrong type in the shape of the data (see _WalReader).
    """

    def __init__(
        self, path: str, data: bytes, crc: int,
        take_run: Optional[RunTaker] = None,
    ) -> None:
        self.path = path
        self.data = data
        self.crc = crc
        self.end = 0
        self._take_run = take_run       # gets the plain records in a row that _run finds

    def __iter__(self) -> Iterator[WalRecord]:
        size = len(self.data)
        while self.end < size:
            if self._take_run is not None and self._run(self._take_run):
                continue
            record = self._record(self.end)
            if record is None:
                return
            self._check(record)
            yield record
            self.end = record.end

    def _run(self, take: RunTaker) -> bool:
        """Hand out normal entries in a row, and the last hard state between them; False: none.

        They share one checksum: that of the last record continues all before.  3 us an entry
        instead of 15.  What is not exactly as expected is left to the way of single records.
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
            take(self, entries, state)
        except CodecError as error:
            raise self.damage(str(error)) from None
        self.crc, self.end = decode_varint(crc, 0)[0], offset
        return True

    def damage(self, what: str) -> CrcMismatch:
        """Return the error for a record at `end` that is not what was written."""
        return CrcMismatch(
            f"read wal error ({what}) and cannot be repaired: {self.path} is damaged at offset"
            f" {self.end}; {REPAIR_HINT}"
        )

    def _record(self, offset: int) -> Optional[WalRecord]:
        """Return the record at `offset`; None for the zeros of a preallocated tail."""
        data = self.data
        if offset + 8 > len(data):
            raise self._torn("inside a length")
        length, padding = _wal_frame(data, offset)
        if padding < 0:
            raise self.damage("impossible length")
        end = offset + 8 + length + padding
        if not length or end > len(data):
            self._bad_length(offset, length)
            return None
        try:
            return WalRecord(*_decode_record(data[offset + 8:offset + 8 + length]), end)
        except CodecError as error:
            raise self._bad_record(offset, end, str(error)) from None

    def _check(self, record: WalRecord) -> None:
        if record.kind == RecordType.CRC:
            if record.data or (self.crc and record.crc != self.crc):
                raise self.damage("wal: crc mismatch")
            self.crc = record.crc
            return
        crc = crc32c(record.data, self.crc)
        if crc != record.crc:
            raise self._bad_record(self.end, record.end, "walpb: crc mismatch")
        self.crc = crc

    def _bad_length(self, offset: int, length: int) -> None:
        """A length that is 0 or points past the end: is this the tail, or damage?

        To cut where acknowledged records follow would lose them.
        """
        data = self.data
        if not data[offset:].strip(b"\0"):
            return
        whole = _intact_length(data, offset + 8, self.crc)
        if (whole and whole != length) or _has_records(data, offset + 9, self.crc):
            raise self.damage("impossible length")
        raise self._torn("inside a record")

    def _bad_record(self, offset: int, end: int, what: str) -> WalError:
        """A wrong record: torn if it is the last, and a sector of it was never written (3.4)."""
        if not self.data[end:].strip(b"\0"):
            for sector in range(-(-offset // 512) * 512, end, 512):
                if not self.data[sector:min(sector + 512, end)].strip(b"\0"):
                    return self._torn("in a sector that was never written")
        return self.damage(what)

    def _torn(self, where: str) -> TornTail:
        return TornTail(f"unexpected EOF: {self.path} ends {where} at offset {self.end}")


def _wal_frame(data: bytes, offset: int) -> Tuple[int, int]:
    """Return (length, padding) of the frame at `offset`; padding -1: impossible."""
    field = int.from_bytes(data[offset:offset + 8], "little")
    length, top = field & ((1 << 56) - 1), field >> 56
    if top == 0:
        return length, 0
    return length, top & 7 if top == 0x80 | -length % 8 else -1


def _decode_record(data: bytes) -> Tuple[int, int, bytes]:
    kind = crc = 0
    payload = b""
    for number, wire_type, value in decode_fields(data):
        if number in (1, 2):
            check_wire_type(wire_type, 0, "Record")
            kind, crc = (value, crc) if number == 1 else (kind, value)
        elif number == 3:
            check_wire_type(wire_type, 2, "Record")
            payload = value
    if not RecordType.METADATA <= kind <= RecordType.SNAPSHOT:
        raise CodecError(f"unknown record type {kind}")
    return kind, crc, payload


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
    """Tell whether, behind `start`, a record continues the chain at `crc`, or one another."""
    for match in _RECORD_START.finditer(data, start):
        if _intact_length(data, match.start(), crc):
            return True
        record = _loose_record(data, match.start() - 8)
        following = record and _loose_record(data, record.end)
        if record and following and crc32c(following.data, record.crc) == following.crc:
            return True
    return False


def _loose_record(data: bytes, offset: int) -> Optional[WalRecord]:
    length, padding = _wal_frame(data, offset)
    end = offset + 8 + length
    if length < 4 or padding < 0 or end + padding > len(data):
        return None
    try:
        return WalRecord(*_decode_record(data[offset + 8:end]), end + padding)
    except CodecError:
        return None
