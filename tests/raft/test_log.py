"""Raft log, progress: tables."""

from __future__ import annotations

from typing import Any, Callable, List

import pytest

import pyetcd
from pyetcd import EntryID, InvariantError, Progress, ProgressState, RaftLog, Snapshot
from tests.kit.raft_network import _RAFT_PROBE, _RAFT_REPLICATE, _raft_entries, _raft_terms


def _raft_handed(log: RaftLog) -> List[int]:
    """Hand out, and tell the indexes of the entries."""
    return [entry.index for entry in log.hand_out()[1]]


def test_raft_log_fresh_is_empty_at_index_zero():
    """Index 0 is the snapshot point of an empty log: term 0, and it matches."""
    log = RaftLog()
    assert (log.offset, log.last_index, log.last_id) == (0, 0, EntryID(0, 0))
    assert (log.term(0), log.term(1)) == (0, 0)
    assert log.match_term(EntryID(0, 0)) and not log.match_term(EntryID(0, 1))
    assert log.committed(10) == [] and not log.has_unhanded


def test_raft_log_term_around_the_snapshot_point():
    """The term of the snapshot point is known, what lies below is compacted, above is 0."""
    log = RaftLog(EntryID(2, 10), _raft_entries([2, 3], 11))
    assert [log.term(index) for index in (10, 11, 12, 13)] == [2, 2, 3, 0]
    with pytest.raises(InvariantError):
        log.term(9)
    assert not log.match_term(EntryID(2, 9)) and log.match_term(EntryID(2, 10))


@pytest.mark.parametrize(
    ("previous", "commit", "terms", "expected", "log_terms", "log_commit"),
    [
        (EntryID(3, 3), 3, [], 3, [1, 2, 3], 3),
        (EntryID(2, 3), 3, [4], None, [1, 2, 3], 1),
        (EntryID(3, 4), 4, [4], None, [1, 2, 3], 1),
        (EntryID(3, 3), 9, [4], 4, [1, 2, 3, 4], 4),
        (EntryID(3, 3), 2, [], 3, [1, 2, 3], 2),
        (EntryID(1, 1), 1, [4], 2, [1, 4], 1),
        (EntryID(1, 1), 1, [2], 2, [1, 2, 3], 1),
        (EntryID(1, 1), 9, [2], 2, [1, 2, 3], 2),
        (EntryID(2, 2), 3, [3, 4, 4], 5, [1, 2, 3, 4, 4], 3),
        (EntryID(2, 2), 2, [4, 4], 4, [1, 2, 4, 4], 2),
    ],
    ids=["empty", "wrong-term", "gap", "append", "lower-commit", "replace-suffix",
         "duplicate-keeps-tail", "commit-only-to-last-new", "overlap", "conflict-then-append"],
)
def test_raft_log_maybe_append(previous, commit, terms, expected, log_terms, log_commit):
    """Receiver rules 2-5 of AppendEntries (thesis fig. 3.1)."""
    log = RaftLog(entries=_raft_entries([1, 2, 3]), commit=1)
    assert log.maybe_append(previous, commit, _raft_entries(terms, previous.index + 1)) == expected
    assert (_raft_terms(log), log.commit) == (log_terms, log_commit)


def test_raft_log_conflict_at_or_below_commit_is_a_bug():
    """Committed entries never change; such a message proves that somebody is broken."""
    log = RaftLog(entries=_raft_entries([1, 2, 3]), commit=2)
    with pytest.raises(InvariantError, match="conflicts with committed"):
        log.maybe_append(EntryID(1, 1), 2, _raft_entries([9], 2))


@pytest.mark.parametrize(
    "act",
    [
        lambda log: log.commit_to(1),
        lambda log: log.commit_to(4),
        lambda log: log.applied_to(3),
        lambda log: log.append(_raft_entries([3], 5)),
        lambda log: log.compact(3),
        lambda log: log.restore(Snapshot(index=2, term=1)),
    ],
    ids=["commit-back", "commit-past-end", "applied-past-commit", "gap", "compact-unapplied",
         "restore-back"],
)
def test_raft_log_refuses_the_impossible(act: Callable[[RaftLog], Any]):
    """What can only come from a bug ends the member."""
    log = RaftLog(entries=_raft_entries([1, 1, 2]), commit=2)
    with pytest.raises(InvariantError):
        act(log)


def test_raft_log_restart_with_lost_entries_is_refused():
    """A commit index past the last entry means that the disk lost acknowledged entries."""
    with pytest.raises(InvariantError, match="lost entries"):
        RaftLog(entries=_raft_entries([1]), commit=2)


@pytest.mark.parametrize(
    ("low", "high", "max_bytes", "expected"),
    [(1, 4, None, 3), (1, 4, 0, 1), (1, 4, 81, 1), (1, 4, 82, 2), (2, 4, 82, 2), (1, 4, 999, 3),
     (2, 2, 99, 0)],
)
def test_raft_log_slice_is_cut_by_size_but_not_below_one(low, high, max_bytes, expected):
    """Each of these entries counts 41 bytes."""
    log = RaftLog(entries=_raft_entries([1, 1, 1]))
    assert len(log.slice(low, high, max_bytes)) == expected


def test_raft_log_slice_outside_raises():
    """Before the first entry, and after the last."""
    log = RaftLog(EntryID(1, 5), _raft_entries([1], 6))
    with pytest.raises(InvariantError):
        log.slice(5, 6)
    with pytest.raises(InvariantError):
        log.slice(6, 8)


def test_raft_log_up_to_date_compares_term_then_index():
    """§5.4.1: the later last term wins, then the longer log."""
    log = RaftLog(entries=_raft_entries([1, 1, 2]))
    logs = [EntryID(1, 9), EntryID(2, 2), EntryID(2, 3), EntryID(3, 1)]
    assert [log.is_up_to_date(last) for last in logs] == [False, False, True, True]


def test_raft_log_only_durable_committed_entries_are_applied():
    """Commit alone does not do: the entry must be on our own disk as well."""
    log = RaftLog()
    log.append(_raft_entries([1, 1]))
    mark = log.hand_out()[2]
    log.commit_to(2)
    assert log.committed(10) == []
    assert log.stable_to(mark)
    assert [entry.index for entry in log.committed(10)] == [1, 2]
    assert [entry.index for entry in log.committed(1)] == [1]
    log.applied_to(2)
    assert log.committed(10) == []


@pytest.mark.parametrize("count", [1, 2, 3])
def test_raft_log_mark_of_replaced_entries_says_nothing(count):
    """Entries handed out, then replaced, also by as many or more: only the new mark counts."""
    log = RaftLog()
    log.append(_raft_entries([1, 1, 1]))
    old = log.hand_out()[2]
    log.maybe_append(EntryID(1, 1), 0, _raft_entries([2] * count, 2))
    new_entries, new = log.hand_out()[1:]
    assert [(e.term, e.index) for e in new_entries] == [(2, 2 + n) for n in range(count)]
    assert not log.stable_to(old) and log.stable == 0
    assert log.stable_to(new) and log.stable == 1 + count


def test_raft_log_replacing_durable_entries_lowers_stable():
    """What replaces a durable entry is not durable."""
    log = RaftLog(entries=_raft_entries([1, 1, 1]))
    log.maybe_append(EntryID(1, 1), 0, _raft_entries([2, 2, 2], 2))
    assert log.stable == 1
    assert _raft_handed(log) == [2, 3, 4]


def test_raft_log_replacing_entries_nobody_saw_keeps_marks():
    """The disk never got them, so marks before stay good."""
    log = RaftLog()
    log.append(_raft_entries([1]))
    mark = log.hand_out()[2]
    log.append(_raft_entries([1, 1], 2))
    log.append(_raft_entries([2], 2))
    assert log.stable_to(mark) and log.stable == 1
    assert _raft_handed(log) == [2]


def test_raft_log_compact_moves_the_snapshot_point():
    """The term of the point stays known; a second call further back does nothing."""
    log = RaftLog(entries=_raft_entries([1, 2, 2]), commit=3, applied=3)
    log.compact(2)
    log.compact(1)
    assert (log.offset, log.last_index, log.term(2)) == (2, 3, 2)
    assert not log.match_term(EntryID(1, 1))


def test_raft_log_restored_snapshot_gates_everything_behind_it():
    """Nothing is applied before the state machine took the snapshot and the disk has it."""
    log = RaftLog(entries=_raft_entries([1, 1]), commit=1)
    log.restore(Snapshot(index=10, term=3, voters=(1,)))
    log.append(_raft_entries([3], 11))
    snapshot, entries, mark = log.hand_out()
    log.commit_to(11)
    assert snapshot is not None and snapshot.index == 10
    assert [entry.index for entry in entries] == [11]
    assert log.hand_out()[0] is None
    assert log.stable == 0 and log.stable_to(mark) and log.stable == 11
    assert log.committed(10) == []
    log.applied_to(10)
    assert [entry.index for entry in log.committed(10)] == [11]


def test_raft_log_frees_the_entries_before_a_snapshot_in_slices(monkeypatch):
    monkeypatch.setattr(pyetcd, "COMPACT_SLICE_ENTRIES", 10)
    log = RaftLog(entries=_raft_entries([1] * 25), commit=1)
    log.restore(Snapshot(index=100, term=3, voters=(1,)))
    left = []
    for _ in range(3):
        log.hand_out()
        left.append(len(log._replaced))
    assert left == [15, 5, 0]


def test_raft_progress_pauses_at_a_full_window_and_an_answer_frees_all_up_to_it():
    """A window of three."""
    progress = Progress(4, 3, match_index=3)
    progress.become_replicate()
    for index in (4, 7, 9):
        assert not progress.is_paused
        progress.sent(index)
    assert progress.is_paused
    assert progress.acknowledge(7)
    assert list(progress.inflights) == [9] and not progress.is_paused


def _raft_progress(state: ProgressState, match: int, following: int) -> Progress:
    progress = Progress(following, 2, match_index=match)
    progress.state = state
    return progress


_RAFT_SNAPSHOT = ProgressState.SNAPSHOT


@pytest.mark.parametrize(
    ("state", "match", "following", "rejected", "hint", "expected"),
    [
        (_RAFT_PROBE, 0, 10, 9, 9, (True, _RAFT_PROBE, 9)),
        (_RAFT_PROBE, 0, 10, 9, 4, (True, _RAFT_PROBE, 5)),
        (_RAFT_PROBE, 0, 10, 8, 4, (False, _RAFT_PROBE, 10)),
        (_RAFT_PROBE, 0, 1, 0, 0, (True, _RAFT_PROBE, 1)),
        (_RAFT_PROBE, 5, 10, 9, 2, (True, _RAFT_PROBE, 6)),
        (_RAFT_REPLICATE, 5, 10, 5, 5, (False, _RAFT_REPLICATE, 10)),
        (_RAFT_REPLICATE, 5, 10, 9, 5, (True, _RAFT_PROBE, 6)),
        (_RAFT_SNAPSHOT, 5, 10, 9, 5, (False, _RAFT_SNAPSHOT, 10)),
    ],
    ids=["probe-one-back", "probe-to-hint", "probe-stale", "probe-at-one", "probe-not-below-match",
         "replicate-stale", "replicate-falls-back", "snapshot-ignores"],
)
def test_raft_progress_rejection(state, match, following, rejected, hint, expected):
    """next goes back to the hint, never to the match or below it (spec §9.4)."""
    progress = _raft_progress(state, match, following)
    changed = progress.maybe_decrease(rejected, hint)
    assert (changed, progress.state, progress.next_index) == expected


def test_raft_progress_probe_waits_then_replicates():
    """A probe pauses; its answer opens the window; a full window pauses again."""
    progress = Progress(5, 2)
    progress.sent(6)
    assert progress.is_paused and progress.next_index == 5
    assert progress.acknowledge(6)
    assert (progress.state, progress.next_index, progress.is_paused) == (_RAFT_REPLICATE, 7, False)
    progress.sent(8)
    progress.sent(9)
    assert progress.is_paused and progress.next_index == 10
    assert not progress.acknowledge(6)
    assert progress.acknowledge(8) and not progress.is_paused


def test_raft_progress_snapshot_ends_by_answer_or_report():
    """Answer at the snapshot: replicate.  Report: probe behind it."""
    answered, reported = (_raft_progress(_RAFT_REPLICATE, 1, 5) for _ in range(2))
    for progress in (answered, reported):
        progress.become_snapshot(9)
        assert progress.is_paused
    assert answered.acknowledge(8) and answered.state == _RAFT_SNAPSHOT
    assert answered.acknowledge(9) and answered.state == _RAFT_REPLICATE
    assert answered.next_index == 10
    reported.become_probe()
    assert reported.next_index == 10


@pytest.mark.parametrize(
    ("matches", "expected"),
    [([], 0), ([7], 7), ([7, 3], 3), ([7, 3, 5], 5), ([1, 2, 3, 4], 2), ([9, 1, 9, 1, 5], 5)],
)
def test_raft_quorum_index_is_held_by_a_majority(matches, expected):
    """At least quorum_size members have reached it, and it is the highest such index."""
    replication = pyetcd.Replication(None, None, None)
    replication.progress = {
        id: Progress(match + 1, 1, match_index=match) for id, match in enumerate(matches, 1)}
    assert replication.quorum_index == expected
