"""RawNode: the core with its log, as the member drives it."""

from __future__ import annotations

import operator
from typing import List, NamedTuple, Optional, Sequence, Tuple

from ..base.codec import decode_conf_change, encode_conf_change
from ..base.errors import ProposalDropped
from ..base.limits import INDEX_MAX, REPAIR_HINT, TERM_LEAP_MAX
from ..base.messages import (
    LOCAL_MESSAGES,
    ConfChange,
    Entry,
    EntryType,
    HardState,
    Message,
    MsgType,
    Snapshot,
)
from .core import _RESPONSES, Raft
from .log import Mark, RaftLog
from .replication import RaftConfig


class Ready(NamedTuple):
    """The next work of the server, in this order where the order matters.

    snapshot    received: save it, then give it to the state machine
    entries     append to the WAL; they may rewrite a suffix that was handed out before
    hard_state  write it behind the entries; None if unchanged since the last Ready
    must_sync   the above needs an fsync before `held` may leave
    messages    may be sent at once, before anything is written
    held        may be sent only when this Ready and all before it are durable
    mark        goes to persisted() when this Ready is durable
    """

    hard_state: Optional[HardState]
    entries: List[Entry]
    snapshot: Optional[Snapshot]
    must_sync: bool
    messages: List[Message]
    held: List[Message]
    mark: Mark


_FRESH = HardState()


class RawNode:
    """The interface of a Raft for the server and the simulator.  Thread: reactor.

    The cycle: step, tick, propose -> ready() -> write and sync -> persisted(mark) ->
    committed_entries() -> apply (apply_conf_change for conf changes) -> applied_to(index).
    Several Readys may be on their way to the disk; they become durable in order.
    """

    def __init__(
        self, config: RaftConfig, *, hard_state: HardState = _FRESH,
        snapshot: Optional[Snapshot] = None, entries: Sequence[Entry] = (), applied: int = 0,
    ) -> None:
        """Restart from the state on disk; without arguments: a joiner that knows no other member.

        snapshot  only its index, term and voters are used
        applied   index of the state machine (0: at the snapshot)

        Raises InvariantError if hard_state.commit lies behind the last entry.
        """
        point = snapshot or Snapshot()
        if entries and entries[0].term < point.term:
            entries = ()        # a crash kept the tail of the log that the snapshot replaced
        log = RaftLog(point.id, entries, commit=hard_state.commit, applied=applied)
        self.raft = Raft(config, log, hard_state.term, hard_state.vote, point.voters)
        self._hard_state = hard_state       # as of the last Ready
        last = log.last_id
        config.trace(
            f"newRaft {config.id:x} [peers: [{','.join(f'{voter:x}' for voter in point.voters)}],"
            f" term: {hard_state.term}, commit: {log.commit}, applied: {log.applied},"
            f" lastindex: {last.index}, lastterm: {last.term}]"
        )

    @classmethod
    def bootstrap(cls, config: RaftConfig, entries: Sequence[Entry]) -> RawNode:
        """Return a member of a new cluster, whose first Ready holds `entries`.

        entries  one ConfChange per initial member at indexes 1..n, term 1, equal everywhere:
                 they count as committed without any message (etcd 2.3 raft/node.go, StartNode)
        """
        node = cls(config)
        raft = node.raft
        raft.become_follower(1, 0)
        raft.log.append(entries)
        raft.log.commit_to(raft.log.last_index)
        raft.replication.set_voters(decode_conf_change(entry.data).node_id for entry in entries)
        return node

    def tick(self, count: int = 1) -> None:
        for _ in range(count):
            self.raft.tick()

    def advance_ticks(self, count: int) -> None:
        """Count ticks that pass without an election, to shorten the first wait after a start."""
        self.raft.election_elapsed += count

    def campaign(self) -> None:
        """Start an election now, if this member may lead and does not."""
        self.raft.step(Message(MsgType.HUP))

    def transfer_leader(self, to: int) -> None:
        """Leader: let `to` campaign once its log is complete, and refuse proposals meanwhile.

        Gives up after election_ticks.
        """
        self.raft.step(Message(MsgType.TRANSFER_LEADER, sender=to))

    def step(self, message: Message) -> None:
        """Handle a message from the network; stale, foreign and nonsensical ones are dropped.

        Raises ProposalDropped for a MsgProp that cannot be handled here.
        """
        raft, kind = self.raft, message.type
        if message.to != raft.id or message.sender == raft.id:
            return
        if kind == MsgType.PROP:
            # Copies: the leader numbers the entries, and a duplicate may share them.
            entries = [Entry(e.type, 0, 0, e.data, e.request) for e in message.entries]
            self.propose(*entries, sender=message.sender)
        elif (
            (message.term or kind == MsgType.READ_INDEX) and kind not in LOCAL_MESSAGES
            and (kind not in _RESPONSES or message.sender in raft.progress)
            and (kind != MsgType.APP or _is_contiguous(message))
        ):
            raft.step(message)

    def protocol_violation(self, message: Message) -> str:
        """Return the reason why no healthy member sends this message to us, or "".

        A message that passes leaves a log that can be read and a next term that can be written.
        """
        raft, kind = self.raft, message.type
        if kind in LOCAL_MESSAGES:
            return "such a message never leaves its member"
        if message.term > raft.term + TERM_LEAP_MAX:
            return f"no election leads from term {raft.term} to term {message.term}"
        if max(message.index, message.commit, message.reject_hint) > INDEX_MAX:
            return "no log has such an index"
        if kind == MsgType.APP:
            return _append_violation(message)
        if kind in _RESPONSES:
            return ""
        if kind == MsgType.SNAP:
            return _snapshot_violation(message)
        if kind == MsgType.PROP and not message.entries:
            return "it proposes nothing"
        last = raft.log.last_index
        if kind == MsgType.HEARTBEAT and message.term >= raft.term and message.commit > last:
            return (
                f"the leader has heard from us of entry {message.commit}, but our last one is"
                f" {last}: this member has lost a part of its log; {REPAIR_HINT}"
            )
        return ""

    def propose(self, *entries: Entry, sender: int = 0) -> None:
        """Propose all of `entries` for member `sender` (0: this one).

        A leader numbers and appends these very objects.  Raises ProposalDropped, for all of them,
        without a leader, after this member's removal, or while too much is uncommitted.  Even
        without an exception an entry may be lost.
        """
        if self.raft.removed:
            raise ProposalDropped(f"{self.raft.id:x} is removed from the cluster")
        self.raft.step(Message(MsgType.PROP, sender=sender, entries=entries))

    def propose_conf_change(self, change: ConfChange) -> None:
        """Propose a membership change, which becomes a no-op while another one is pending."""
        self.propose(Entry(EntryType.CONF_CHANGE, data=encode_conf_change(change)))

    def apply_conf_change(self, change: ConfChange) -> Tuple[int, ...]:
        """Apply a ConfChange entry, with node_id=0 if the state machine refused it; return voters.

        Call it once for each such entry before applied_to() passes it.
        """
        self.raft.apply_conf_change(change)
        return self.raft.voters

    def read_index(self, context: bytes) -> None:
        """Request the index at which a read sees every write that is acknowledged now.

        The answer comes through confirmed_reads(), or never: then try again with another context.
        """
        self.raft.step(Message(MsgType.READ_INDEX, entries=[Entry(data=context)]))

    def confirmed_reads(self) -> List[Tuple[bytes, int]]:
        """Return (context, index) of the reads that were confirmed since the last call."""
        confirmed, self.raft.reads.confirmed = self.raft.reads.confirmed, []
        return confirmed

    def report_unreachable(self, id: int) -> None:
        self.raft.replication.unreachable(id)

    def report_snapshot(self, id: int, ok: bool) -> None:
        self.raft.replication.snapshot_done(id, ok=ok)

    @property
    def commit_unsent(self) -> bool:
        """True if a follower may not know the commit index (RaftConfig.defer_commit)."""
        return self.raft.replication.commit_unsent

    def broadcast_commit(self) -> None:
        if self.raft.replication.commit_unsent:
            self.raft.replication.mark_all_due()

    def has_ready(self) -> bool:
        raft, known = self.raft, self._hard_state
        return (
            raft.log.has_unhanded or raft.log.commit != known.commit or not raft.mail.is_empty
            or raft.replication.is_due or raft.term != known.term or raft.vote != known.vote
        )

    def ready(self) -> Ready:
        raft = self.raft
        if raft.replication.is_due:
            raft.replication.send_due()
        messages, held = raft.mail.take()
        snapshot, entries, mark = raft.log.hand_out()
        before, now = self._hard_state, HardState(raft.term, raft.vote, raft.log.commit)
        must_sync = bool(entries) or snapshot is not None or now[:2] != before[:2]
        self._hard_state = now
        changed = now if now != before else None
        return Ready(changed, entries, snapshot, must_sync, messages, held, mark)

    def persisted(self, mark: Mark) -> None:
        """Note that the Ready with this mark and all before it are durable."""
        if self.raft.log.stable_to(mark):
            self.raft.on_stable()

    def committed_entries(self, max_entries: int = 4096) -> List[Entry]:
        """Return the next entries to apply: committed, durable here, not applied yet."""
        return self.raft.log.committed(max_entries)

    def applied_to(self, index: int) -> None:
        self.raft.log.applied_to(index)

    def compact(self, index: int) -> None:
        """Drop the entries up to `index`, which must be applied, from memory."""
        self.raft.log.compact(index)


def _is_contiguous(message: Message) -> bool:
    first, entries = message.index + 1, message.entries
    if len(entries) <= 1:
        return not entries or entries[0].index == first
    indexes = [entry.index for entry in entries]
    return indexes == list(range(first, first + len(indexes)))


def _append_violation(message: Message) -> str:
    if not message.entries and message.log_term <= message.term:
        return ""
    if not _is_contiguous(message):
        return f"the entries do not follow entry {message.index} one by one"
    terms = [message.log_term, *[entry.term for entry in message.entries], message.term]
    if any(map(operator.gt, terms, terms[1:])) or (message.entries and not terms[1]):
        return "the terms of the entries do not ascend to that of the leader"
    return ""


def _snapshot_violation(message: Message) -> str:
    snapshot = message.snapshot
    if snapshot is None or not 0 < snapshot.index <= INDEX_MAX:
        return "there is no snapshot in it"
    if not 0 < snapshot.term <= message.term:
        return f"the snapshot is of term {snapshot.term}, its leader of term {message.term}"
    if not snapshot.voters or 0 in snapshot.voters:
        return "the snapshot names no voters"
    return ""
