"""Replication: what a leader sends, and to which follower.

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
from ..base.messages import Entry, EntryID, Message, MsgType, Snapshot
from .log import RaftLog
from .progress import Mailbox, Progress, ProgressState, quorum_index, quorum_size


class RaftConfig(NamedTuple):
    """What a Raft needs from outside.

    rng      anything with randrange(n), e.g. a seeded random.Random
    trace    receives the lines that etcd's raft package logs at info level
    patient  a new commit index alone makes no message, until broadcast_commit()
    """

    id: int
    rng: Any
    trace: Callable[[str], None]
    election_ticks: int = 10
    heartbeat_ticks: int = 1
    max_entries_bytes: int = ENTRIES_BYTES_MAX
    max_inflight: int = INFLIGHT_MSGAPP_MAX
    max_uncommitted_bytes: int = UNCOMMITTED_BYTES_MAX
    patient: bool = False


class Replication:
    """The sending side of a leader.  On other members only the ids in `progress` mean anything.

    Nothing is sent when it becomes due: send_due() sends one MsgApp per follower and ready(),
    with everything proposed since, so the work per proposal does not grow with the cluster.
    """

    def __init__(self, config: RaftConfig, log: RaftLog, mail: Mailbox) -> None:
        self.progress: Dict[int, Progress] = {}     # the voters, ascending by id
        self.snapshot_source: Callable[[], Optional[Snapshot]] = _no_snapshot
        self._id = config.id
        self._max_bytes = config.max_entries_bytes
        self._window = config.max_inflight
        self._log = log
        self._mail = mail
        self._append_due = False                    # some progress is due
        self._broadcast_due = False                 # every progress is due
        self._patient = config.patient
        self.commit_unsent = False                  # some follower may not know our commit index

    def set_voters(self, voters: Iterable[int]) -> None:
        """Keep what is known of the voters, begin anew with new ones, forget the others."""
        known, following = self.progress, self._log.last_index + 1
        self.progress = {
            voter: known.get(voter) or Progress(following, self._window)
            for voter in sorted(set(voters))
        }

    def reset(self) -> None:
        """Forget everything but the ids: a new term begins."""
        self._append_due = self._broadcast_due = self.commit_unsent = False
        following = self._log.last_index + 1
        self.progress = {voter: Progress(following, self._window) for voter in self.progress}

    @property
    def quorum_index(self) -> int:
        """The highest index that is durable on a majority."""
        return quorum_index([progress.match_index for progress in self.progress.values()])

    @property
    def is_due(self) -> bool:
        """True if send_due() may send something."""
        return self._append_due or self._broadcast_due

    def mark_unsent(self, progress: Progress) -> None:
        """Let one follower have a MsgApp, an empty one if need be."""
        progress.due = self._append_due = True

    def mark_all_unsent(self) -> None:
        """Let every follower have a MsgApp: there are new entries, or a new commit index."""
        self._broadcast_due = True

    def asked_by(self, member: int) -> None:
        """The last entries are of a member's clients: they wait until it knows of the commit."""
        if member in self.progress:
            self.progress[member].asked = self._log.last_index

    def mark_commit_unsent(self, index: int, *, at_once: bool) -> None:
        """The commit index becomes `index`.  A patient leader only tells those whose clients wait.

        The others hear of it with the next entries, mostly within a millisecond: messages and
        answers for it alone are half of all where writes come one by one.

        at_once  tell all: voters change, and who leaves must hear of it while it gets messages
        """
        if at_once or not self._patient:
            self.mark_all_unsent()
            return
        self.commit_unsent = len(self.progress) > 1
        for progress in self.progress.values():
            if progress.asked:
                self.mark_unsent(progress)
                if progress.asked <= index:
                    progress.asked = 0

    def send_due(self) -> None:
        """Send a MsgApp, or a MsgSnap, to every follower that is due and not paused."""
        everyone = self._broadcast_due
        self._append_due = self._broadcast_due = False
        self.commit_unsent = self.commit_unsent and not everyone
        batches: Dict[int, List[Entry]] = {}        # next index -> entries, shared by the peers
        for peer, progress in self.progress.items():
            if (everyone or progress.due) and peer != self._id:
                progress.due = False
                if not progress.is_paused:
                    self._send_append(peer, progress, batches)

    def _send_append(
        self, peer: int, progress: Progress, batches: Dict[int, List[Entry]]
    ) -> None:
        log, following = self._log, progress.next_index
        if following <= log.offset:
            self._send_snapshot(peer, progress)
            return
        entries = batches.get(following)
        if entries is None:
            entries = log.slice(following, log.last_index + 1, self._max_bytes)
            batches[following] = entries
        self._mail.send(
            MsgType.APP, peer, index=following - 1, log_term=log.term(following - 1),
            entries=entries, commit=log.commit,
        )
        if entries:
            progress.sent(entries[-1].index)

    def _send_snapshot(self, peer: int, progress: Progress) -> None:
        """Its next entries are compacted: send the state, if the peer answers and we have one."""
        if not progress.recent_active:
            return
        snapshot, log = self.snapshot_source(), self._log
        if snapshot is None or snapshot.index > log.commit:
            return                                  # tried again at its next heartbeat answer
        if not log.match_term(EntryID(snapshot.term, snapshot.index)):
            return                                  # of another log, or older than ours begins
        self._mail.send(MsgType.SNAP, peer, snapshot=snapshot)
        progress.become_snapshot(snapshot.index)

    def send_heartbeats(self, context: Optional[bytes]) -> None:
        """Keep every follower from campaigning, and let paused probes go on.

        context  comes back with the answers (Reads)
        """
        for peer, progress in self.progress.items():
            if peer != self._id:
                # Not beyond its match: it may not hold those entries, or other ones there.
                commit = min(progress.match_index, self._log.commit)
                self._mail.send(MsgType.HEARTBEAT, peer, commit=commit, context=context)
                progress.paused = False

    def handle_reject(self, message: Message) -> None:
        """The entry before our MsgApp did not match: go back and try again."""
        progress = self.progress[message.sender]
        progress.recent_active = True
        if progress.maybe_decrease(message.index, message.reject_hint):
            self.mark_unsent(progress)

    def handle_ack(self, message: Message) -> bool:
        """A follower has everything up to message.index; False if that is no news."""
        progress, last = self.progress[message.sender], self._log.last_index
        progress.recent_active = True
        was_paused = progress.is_paused
        if message.index > last or not progress.acknowledge(message.index):
            return False                            # nobody can hold more than its leader
        if was_paused or progress.next_index <= last:
            self.mark_unsent(progress)
        return True

    def handle_heartbeat_resp(self, message: Message) -> None:
        """A follower lives: if it may lack something, send."""
        progress = self.progress[message.sender]
        progress.recent_active = True
        if progress.state == ProgressState.REPLICATE and progress.inflights.full:
            progress.inflights.free_first()         # its answers may be lost: go on carefully
        if progress.match_index < self._log.last_index:
            # An empty MsgApp is wanted, too: if entries were lost, it will be rejected.
            self.mark_unsent(progress)

    def heard_quorum(self) -> bool:
        """True if a majority, ourselves included, has answered since the last call."""
        heard = sum(p.recent_active or id == self._id for id, p in self.progress.items())
        for progress in self.progress.values():
            progress.recent_active = False
        return heard >= quorum_size(len(self.progress))

    def unreachable(self, peer: int) -> None:
        """A message to `peer` was lost: stop sending ahead."""
        progress = self.progress.get(peer)
        if progress is None:
            return
        progress.recent_active = False
        if progress.state == ProgressState.REPLICATE:
            progress.become_probe()

    def snapshot_done(self, peer: int, *, ok: bool) -> None:
        """The snapshot to `peer` left this member completely, or did not."""
        progress = self.progress.get(peer)
        if progress is None or progress.state != ProgressState.SNAPSHOT:
            return
        if ok:
            progress.become_probe()
        else:
            progress.snapshot_failed()
        progress.paused = True                      # let it digest until the next heartbeat


def _no_snapshot() -> Optional[Snapshot]:
    return None


class ReadRound:
    """One question whether a leader still leads; index: its commit index when it was asked."""

    __slots__ = ("index", "requester", "heard")

    def __init__(self, index: int, requester: int, heard: Set[int]) -> None:
        self.index = index
        self.requester = requester
        self.heard = heard              # voters that have confirmed


class Reads:
    """Reads that see every write acknowledged before them, without an entry in the log.

    A leader notes its commit index, asks with a heartbeat whether it still leads, and when a
    majority has confirmed, everything up to that index may be read (thesis §6.4).
    """

    def __init__(self, id: int, mail: Mailbox) -> None:
        self.confirmed: List[Tuple[bytes, int]] = []    # (context, index) asked for here
        self._rounds: Dict[bytes, ReadRound] = {}       # leader only, oldest first
        self._id = id
        self._mail = mail

    @property
    def newest(self) -> Optional[bytes]:
        """The context that a heartbeat has to carry; None: nobody asks."""
        return next(reversed(self._rounds), None) if self._rounds else None

    def clear(self) -> None:
        """A new term: whoever asked asks again."""
        self._rounds.clear()

    def begin(self, context: bytes, index: int, requester: int) -> None:
        """Leader: member `requester` wants to read what is committed now."""
        if len(self._rounds) < READ_ROUNDS_MAX:
            self._rounds[context] = ReadRound(index, requester, set())

    def confirm(self, context: bytes, voter: int, quorum: int) -> None:
        """Leader: `voter` has heard us after the question `context` was asked."""
        asked = self._rounds.get(context)
        if asked is None:
            return
        asked.heard.add(voter)
        if len(asked.heard) >= quorum:
            for earlier in list(self._rounds):      # what was asked before is answered as well
                self._release(earlier, self._rounds.pop(earlier))
                if earlier == context:
                    return

    def _release(self, context: bytes, asked: ReadRound) -> None:
        if asked.requester == self._id:
            self.confirmed.append((context, asked.index))
        else:
            self._mail.send(
                MsgType.READ_INDEX_RESP, asked.requester, index=asked.index,
                entries=[Entry(data=context)],
            )
