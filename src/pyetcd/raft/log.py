"""The Raft log: its stable, committed and applied parts."""

from __future__ import annotations

from typing import List, NamedTuple, Optional, Sequence, Tuple

from ..base.errors import InvariantError
from ..base.limits import COMPACT_SLICE_ENTRIES
from ..base.messages import Entry, EntryID, Snapshot
from .progress import _ENTRY_OVERHEAD


class Mark(NamedTuple):
    """The end of the log at one Ready.  Opaque to the server."""

    index: int  # type: ignore[assignment]  # hides tuple.index
    generation: int


_NOWHERE = EntryID(0, 0)


class RaftLog:
    """The entries behind a snapshot point, and four indexes into them.

        offset <= applied <= commit <= last_index        (applied < offset: a snapshot waits)
        stable <= handed <= last_index

    offset    index of the snapshot point; its entry is gone, its term is known
    last_index  of the last entry, or of the snapshot point
    applied   the state machine has it;  commit: a quorum has it
    handed    given to the disk by Ready;  stable: known to be durable
    generation  grows whenever entries that were handed out are replaced: marks of an earlier
                generation say nothing about the entries that stand there now

    Entries are never changed once appended, only replaced.  Source: etcd raft/log.go.
    """

    def __init__(
        self, offset: EntryID = _NOWHERE, entries: Sequence[Entry] = (), *,
        commit: int = 0, applied: int = 0,
    ) -> None:
        """Begin with durable `entries`.  Raises InvariantError if the indexes do not fit."""
        self.offset = self.commit = self.stable = self._handed = self.last_index = offset.index
        self._offset_term = offset.term
        self._entries: List[Entry] = []
        self._replaced: List[Entry] = []    # by a snapshot; freed in slices
        self.generation = 0
        self.pending_snapshot: Optional[Snapshot] = None    # received, not yet handed out
        if entries:
            self.append(entries)
        for entry in entries:
            entry.encoded = None
        self.stable = self._handed = self.last_index
        # A snapshot is committed by nature, though a crash may have kept its HardState off disk.
        self.commit = max(commit, self.offset)
        self.applied = max(applied, self.offset)
        if not self.applied <= self.commit <= self.last_index:
            raise InvariantError(
                f"applied {self.applied}, commit {self.commit} and last index {self.last_index}"
                " must ascend: the log has lost entries"
            )

    @property
    def last_id(self) -> EntryID:
        last = self._entries[-1].term if self._entries else self._offset_term
        return EntryID(last, self.last_index)

    def term(self, index: int) -> int:
        """Return the term at `index`, 0 above the last.  Raises InvariantError below `offset`."""
        position = index - self.offset
        if position > len(self._entries):
            return 0
        if position > 0:
            return self._entries[position - 1].term
        if position < 0:
            raise InvariantError(f"entry {index} lies before the snapshot point {self.offset}")
        return self._offset_term

    def match_term(self, entry_id: EntryID) -> bool:
        """Return whether our log holds that entry; False above the last and when compacted."""
        is_held = self.offset <= entry_id.index <= self.last_index
        return is_held and self.term(entry_id.index) == entry_id.term

    def is_up_to_date(self, last_id: EntryID) -> bool:
        """Return whether a log ending at `last_id` is at least as complete as ours (§5.4.1)."""
        return last_id >= self.last_id

    def slice(self, low: int, high: int, max_bytes: Optional[int] = None) -> List[Entry]:
        """Return the entries low <= index < high, cut to `max_bytes` but at least one.

        Raises InvariantError if the log does not hold them all.
        """
        if low <= self.offset or high > self.last_index + 1:
            raise InvariantError(
                f"entries {low} to {high - 1} are not in the log, which has {self.offset + 1} to"
                f" {self.last_index}"
            )
        start, end = low - self.offset - 1, high - self.offset - 1
        if max_bytes is None:
            return self._entries[start:end]
        entries = self._entries[start:min(end, start + max_bytes // _ENTRY_OVERHEAD + 1)]
        size = 0
        for count, entry in enumerate(entries):
            size += len(entry.data) + _ENTRY_OVERHEAD
            if size > max_bytes and count:
                return entries[:count]
        return entries

    def data_bytes(self, low: int, high: int) -> int:
        return sum([len(entry.data) for entry in self.slice(low, high)])

    def conf_changes(self, high: int) -> List[int]:
        """Return the indexes of the conf changes that are not applied and lie below `high`."""
        low = max(self.applied, self.offset) + 1
        return [entry.index for entry in self.slice(low, max(low, high)) if entry.type]

    def maybe_append(
        self, previous: EntryID, commit: int, entries: Sequence[Entry]
    ) -> Optional[int]:
        """Append behind `previous` if our log holds it; return the last new index, or None.

        Entries that conflict (same index, other term) and all after them are replaced; entries
        already present are kept, so a delayed duplicate cannot shorten the log.

        commit   leader's commit index; ours becomes min(commit, last new index)
        entries  contiguous, ascending from previous.index + 1; may be empty

        Raises InvariantError if a conflict lies at or below our commit index.
        Source: Raft thesis fig. 3.1 (AppendEntries receiver, rules 2-5).
        """
        if not self.match_term(previous):
            return None
        known = 0
        if previous.index < self.last_index:
            for entry in entries:
                if self.term(entry.index) != entry.term:
                    break
                known += 1
        if known < len(entries):
            self.append(entries[known:] if known else entries)
        last_new = previous.index + len(entries)
        if commit > self.commit:
            self.commit_to(max(self.commit, min(commit, last_new)))
        return last_new

    def append(self, entries: Sequence[Entry]) -> None:
        """Put `entries` (at least one) at their indexes; entries there and behind are dropped.

        Raises InvariantError for a gap and for a change at or below the commit index.
        """
        first = entries[0].index
        if first > self.last_index + 1:
            raise InvariantError(f"entry {first} would leave a gap after {self.last_index}")
        if first <= self.last_index:
            self._truncate(first)
        self._entries.extend(entries)
        self.last_index = self.offset + len(self._entries)

    def _truncate(self, first: int) -> None:
        if first <= self.commit:
            raise InvariantError(f"entry {first} conflicts with committed entry {self.commit}")
        del self._entries[first - self.offset - 1:]
        self.last_index = first - 1
        if first <= self._handed:
            self._handed = first - 1
            self.stable = min(self.stable, first - 1)
            self.generation += 1

    def commit_to(self, index: int) -> None:
        """Move the commit index.  Raises InvariantError for a step back or past the end."""
        if index < self.commit:
            raise InvariantError(f"commit cannot go back from {self.commit} to {index}")
        if index > self.last_index:
            raise InvariantError(
                f"commit {index} is out of range [last index {self.last_index}]:"
                " was the log corrupted, truncated, or lost?"
            )
        self.commit = index

    def applied_to(self, index: int) -> None:
        if not self.applied <= index <= self.commit:
            raise InvariantError(
                f"applied {index} is out of range [{self.applied}, commit {self.commit}]"
            )
        self.applied = index

    def committed(self, max_entries: int) -> List[Entry]:
        if self.applied < self.offset:
            return []               # the state machine must take the snapshot first
        high = min(self.commit, self.stable, self.applied + max_entries)
        return self.slice(self.applied + 1, high + 1) if high > self.applied else []

    def compact(self, index: int) -> None:
        """Move the snapshot point up to `index`; InvariantError if not applied and durable."""
        if index <= self.offset:
            return
        if index > min(self.applied, self.stable):
            raise InvariantError(f"cannot compact to {index}: applied {self.applied}")
        self._offset_term = self.term(index)
        del self._entries[:index - self.offset]
        self.offset = index

    def restore(self, snapshot: Snapshot) -> None:
        """Replace the whole log by a received snapshot, which the next hand_out() returns."""
        if snapshot.index <= self.commit:
            raise InvariantError(f"snapshot {snapshot.index} is behind commit {self.commit}")
        self.offset = self.commit = self._handed = self.last_index = snapshot.index
        self._offset_term = snapshot.term
        self._replaced, self._entries = self._entries, []
        self.stable = 0
        self.generation += 1
        self.pending_snapshot = snapshot

    @property
    def has_unhanded(self) -> bool:
        return self._handed < self.last_index or self.pending_snapshot is not None

    def hand_out(self) -> Tuple[Optional[Snapshot], List[Entry], Mark]:
        """Return the snapshot and the entries that the disk lacks, and the mark of their end."""
        snapshot, self.pending_snapshot = self.pending_snapshot, None
        del self._replaced[-COMPACT_SLICE_ENTRIES:]
        entries = self._entries[self._handed - self.offset:]
        self._handed = self.last_index
        return snapshot, entries, Mark(self._handed, self.generation)

    def stable_to(self, mark: Mark) -> bool:
        """Note that the log is durable up to `mark`; False if that was known, or is outdated."""
        if mark.generation != self.generation or mark.index <= self.stable:
            return False
        self.stable = mark.index
        return True
