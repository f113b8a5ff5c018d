"""Raft log, progress: tables."""

from __future__ import annotations

from typing import List, Sequence

from pyetcd import Entry, ProgressState, RaftLog


def _raft_entries(terms: Sequence[int], first: int = 1) -> List[Entry]:
    """Entries at first, first+1, ... of the given terms."""
    return [Entry(0, term, first + offset, b"%d" % (first + offset))
            for offset, term in enumerate(terms)]


def _raft_terms(log: RaftLog) -> List[int]:
    return [entry.term for entry in log.slice(log.first_index, log.last_index + 1)]


_RAFT_PROBE, _RAFT_REPLICATE = ProgressState.PROBE, ProgressState.REPLICATE
