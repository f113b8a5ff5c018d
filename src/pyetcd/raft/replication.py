"""Replication: the messages that a leader sends to its followers, and reads without an entry.

Knows neither roles nor elections.
"""

from __future__ import annotations

from typing import Any, Callable, Dict, Iterable, List, NamedTuple, Optional, Set, Tuple

from ..base.limits import (
    ENTRIES_BYTES_MAX,
    INFLIGHT_MSGAPP_MAX,
    READ_ROUNDS_MAX,
    UNCOMMITTED_BYTES_MAX,
)
from ..base.messages import Entry, Message, MsgType, Snapshot
from .log import RaftLog
from .progress import Mailbox, Progress, ProgressState, quorum_size


class RaftConfig(NamedTuple):
    """The settings of a Raft, and its ways to the outside."""

    id: int
    rng: Any                            # with randrange(n), e.g. a seeded random.Random
    trace: Callable[[str], None]        # gets the lines that etcd's raft package logs at info level
    election_ticks: int = 10
    heartbeat_ticks: int = 1
    max_entries_bytes: int = ENTRIES_BYTES_MAX
    max_inflight: int = INFLIGHT_MSGAPP_MAX
    max_uncommitted_bytes: int = UNCOMMITTED_BYTES_MAX
    defer_commit: bool = False          # a new commit alone is sent only by broadcast_commit()


class Replication:
    """The sending side of a leader.  On other members only the ids in `progress` are current.

    A MsgApp waits until send_due(): one per follower and ready(), with all entries proposed
    since, so the work per proposal does not grow with the cluster.
    """

    def __init__(self, config: RaftConfig, log: RaftLog, mail: Mailbox) -> None:
        self.progress: Dict[int, Progress] = {}     # the voters, ascending by id
        # Called for a follower whose entries are compacted; None: not ready, asked again later.
        self.snapshot_source: Callable[[int], Optional[Snapshot]] = lambda peer: None
        self.commit_unsent = False                  # some follower may not know our commit index
        self._config = config
        self._log = log
        self._mail = mail
        self.is_due = False                         # leader: some progress is due
        self._broadcast_due = False                 # every progress is due

    def set_voters(self, voters: Iterable[int]) -> None:
        """Keep the progress of known voters, begin anew with new ones, forget the others."""
        known = self.progress
        self.progress = {
            voter: known.get(voter) or self._new_progress() for voter in sorted(set(voters))
        }

    def _new_progress(self) -> Progress:
        return Progress(self._log.last_index + 1, self._config.max_inflight)

    def reset(self) -> None:
        """Begin a new term: forget everything but the ids."""
        self.is_due = self._broadcast_due = self.commit_unsent = False
        self.progress = {voter: self._new_progress() for voter in self.progress}

    @property
    def quorum_index(self) -> int:
        """The highest index that is durable on a majority; 0 without members."""
        ascending = sorted([progress.match_index for progress in self.progress.values()])
        return ascending[(len(ascending) - 1) // 2] if ascending else 0

    def mark_due(self, progress: Progress) -> None:
        """Make the next send_due() send a MsgApp to one follower, an empty one if need be."""
        progress.due = self.is_due = True

    def mark_all_due(self) -> None:
        self._broadcast_due = self.is_due = True

    def note_proposer(self, member: int) -> None:
        """Note that the last entries come from clients of `member`, which wait for the commit."""
        if member in self.progress:
            self.progress[member].proposed_index = self._log.last_index

    def mark_commit_due(self, index: int, *, at_once: bool) -> None:
        """Send the new commit index `index` to all, or with defer_commit only to proposers.

        The other followers learn it from the next entries, mostly within 1 ms: where writes come
        one by one, half of all messages would carry only a commit index.

        at_once  to all: voters change, and a removed member must learn it while it gets messages
        """
        if at_once or not self._config.defer_commit:
            self.mark_all_due()
            return
        self.commit_unsent = len(self.progress) > 1
        for progress in self.progress.values():
            if progress.proposed_index:
                self.mark_due(progress)
                if progress.proposed_index <= index:
                    progress.proposed_index = 0

    def send_due(self) -> None:
        """Send a MsgApp, or a MsgSnap, to every follower that is due and not paused."""
        everyone = self._broadcast_due
        self.is_due = self._broadcast_due = False
        self.commit_unsent = self.commit_unsent and not everyone
        batches: Dict[int, List[Entry]] = {}        # next index -> entries, shared by the peers
        for peer, progress in self.progress.items():
            if (everyone or progress.due) and peer != self._config.id:
                progress.due = False
                if not progress.is_paused:
                    self._send_append(peer, progress, batches)

    def _send_append(self, peer: int, progress: Progress, batches: Dict[int, List[Entry]]) -> None:
        log, following = self._log, progress.next_index
        if following <= log.offset:
            self._send_snapshot(peer, progress)
            return
        entries = batches.get(following)
        if entries is None:
            entries = log.slice(following, log.last_index + 1, self._config.max_entries_bytes)
            batches[following] = entries
        self._mail.send(
            MsgType.APP, peer, index=following - 1, log_term=log.term(following - 1),
            entries=entries, commit=log.commit,
        )
        if entries:
            progress.sent(entries[-1].index)

    def _send_snapshot(self, peer: int, progress: Progress) -> None:
        """Send the state instead of compacted entries, if the peer answers and a snapshot fits."""
        if not progress.recent_active:
            return
        snapshot, log = self.snapshot_source(peer), self._log
        if snapshot is None or snapshot.index > log.commit:
            return                                  # tried again at its next heartbeat answer
        if not log.match_term(snapshot.id):
            return                                  # of another log, or older than ours begins
        self._mail.send(MsgType.SNAP, peer, snapshot=snapshot)
        progress.become_snapshot(snapshot.index)

    def send_heartbeats(self, context: Optional[bytes]) -> None:
        """Keep followers from campaigning, and resume probes; answers return `context`."""
        for peer, progress in self.progress.items():
            if peer != self._config.id:
                # Not beyond its match: it may not hold those entries, or other ones there.
                commit = min(progress.match_index, self._log.commit)
                self._mail.send(MsgType.HEARTBEAT, peer, commit=commit, context=context)
                progress.paused = False

    def handle_reject(self, message: Message) -> None:
        """Step back and retry: the entry before our MsgApp did not match."""
        progress = self.progress[message.sender]
        progress.recent_active = True
        if progress.maybe_decrease(message.index, message.reject_hint):
            self.mark_due(progress)

    def handle_ack(self, message: Message) -> bool:
        """Note that a follower has everything up to message.index; False if that was known."""
        progress, last = self.progress[message.sender], self._log.last_index
        progress.recent_active = True
        was_paused = progress.is_paused
        if message.index > last or not progress.acknowledge(message.index):
            return False                            # no follower can hold more than its leader
        if was_paused or progress.next_index <= last:
            self.mark_due(progress)
        return True

    def handle_heartbeat_resp(self, message: Message) -> None:
        """Note that a follower is alive; if it may lack entries, send."""
        progress = self.progress[message.sender]
        progress.recent_active = True
        if progress.state == ProgressState.REPLICATE and progress.is_paused:
            progress.inflights.popleft()            # its answers may be lost: go on carefully
        if progress.match_index < self._log.last_index:
            # An empty MsgApp is useful, too: if entries were lost, it will be rejected.
            self.mark_due(progress)

    def heard_quorum(self) -> bool:
        """True if a majority, ourselves included, has answered since the last call."""
        heard = sum(p.recent_active or id == self._config.id for id, p in self.progress.items())
        for progress in self.progress.values():
            progress.recent_active = False
        return heard >= quorum_size(len(self.progress))

    def unreachable(self, peer: int) -> None:
        """Stop sending ahead: a message to `peer` was lost."""
        progress = self.progress.get(peer)
        if progress is not None:
            progress.recent_active = False
            if progress.state == ProgressState.REPLICATE:
                progress.become_probe()

    def snapshot_done(self, peer: int, *, ok: bool) -> None:
        """Note that the snapshot to `peer` was sent completely (ok), or failed."""
        progress = self.progress.get(peer)
        if progress is None or progress.state != ProgressState.SNAPSHOT:
            return
        if not ok:
            progress.pending_snapshot = 0           # probe behind the match again
        progress.become_probe()
        progress.paused = True                      # until the next heartbeat: time to load it


class ReadRound(NamedTuple):
    """One check that a leader still leads."""

    commit: int             # its commit index when the read came
    requester: int
    heard: Set[int]         # voters that have confirmed


class PendingReads:
    """Reads that see every write acknowledged before them, without an entry in the log.

    A leader notes its commit index, checks with a heartbeat whether it still leads, and when a
    majority has confirmed, everything up to that index may be read (thesis §6.4).
    """

    def __init__(self, id: int, mail: Mailbox) -> None:
        self.confirmed: List[Tuple[bytes, int]] = []    # (context, index) of this member's reads
        self._rounds: Dict[bytes, ReadRound] = {}       # leader only, oldest first
        self._id = id
        self._mail = mail

    @property
    def newest(self) -> Optional[bytes]:
        """The context that a heartbeat has to carry; None without a round."""
        return next(reversed(self._rounds), None)

    def clear(self) -> None:
        self._rounds.clear()

    def begin(self, context: bytes, index: int, requester: int) -> None:
        if len(self._rounds) < READ_ROUNDS_MAX:
            self._rounds[context] = ReadRound(index, requester, set())

    def confirm(self, context: bytes, voter: int, quorum: int) -> None:
        """Leader: count the answer of `voter` to a heartbeat sent after the round began."""
        confirmed = self._rounds.get(context)
        if confirmed is None:
            return
        confirmed.heard.add(voter)
        if len(confirmed.heard) >= quorum:
            for earlier in list(self._rounds):      # a round confirms those before it as well
                self._release(earlier, self._rounds.pop(earlier))
                if earlier == context:
                    return

    def _release(self, context: bytes, confirmed: ReadRound) -> None:
        if confirmed.requester == self._id:
            self.confirmed.append((context, confirmed.commit))
        else:
            self._mail.send(
                MsgType.READ_INDEX_RESP, confirmed.requester, index=confirmed.commit,
                entries=[Entry(data=context)],
            )
