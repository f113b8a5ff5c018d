"""The Raft core: elections, replication, commitment.

Messages and ticks go in, Ready comes out.
Sources: Ongaro's thesis (fig. 3.1, chapters 3, 4, 6.4.1, 10.6, 11.2) and etcd 2.3 raft/raft.go,
whose wire behaviour this is; rules of 3.x are named.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Callable, Dict, List, Optional, Sequence, Tuple

from ..base.errors import ProposalDropped
from ..base.messages import ConfChange, ConfChangeType, Entry, EntryID, Message, MsgType, Snapshot
from .log import RaftLog
from .progress import Mailbox, Progress, quorum_size
from .replication import PendingReads, RaftConfig, Replication

CAMPAIGN_TRANSFER = b"CampaignTransfer"     # context of a MsgVote that a leader asked for (3.x)


class RaftRole(IntEnum):
    """The role of a member at its term."""

    FOLLOWER = 0
    CANDIDATE = 1
    LEADER = 2
    PRE_CANDIDATE = 3


class Raft:
    """One member's protocol state.  Ids are 64-bit ints, 0 is no member."""

    def __init__(self, config: RaftConfig, log: RaftLog, term: int, vote: int,
                 voters: Sequence[int]) -> None:
        self.config = config
        self.id = config.id
        self.log = log
        self.term = term
        self.vote = vote
        self.lead = 0
        self.role = RaftRole.FOLLOWER
        self.removed = False                        # own removal was applied: never propose again
        self.votes: Dict[int, bool] = {}            # answers to the running candidacy
        self.pre_vote = False                       # all voters understand MsgPreVote
        self.election_elapsed = 0       # ticks since the leader was heard; leader: since it checked
        self.heartbeat_elapsed = 0
        self.election_timeout = 0                   # redrawn at every reset
        self.transferee = 0             # leader: target of the leadership transfer under way
        self.pending_conf_index = 0                 # leader: last conf change in the log
        self.applied_conf_index = 0                 # last conf change that was applied
        self.uncommitted_bytes = 0                  # leader: data behind the commit index
        self.mail = Mailbox(config.id, config.max_entries_bytes)    # until RawNode.ready()
        self.replication = Replication(config, log, self.mail)
        self.reads = PendingReads(config.id, self.mail)
        self._handlers = _FOLLOWER
        self.replication.set_voters(voters)
        self.become_follower(term, 0)

    # -- membership ----------------------------------------------------------

    @property
    def progress(self) -> Dict[int, Progress]:
        """Id of each voter, ascending -> its progress, which is current on a leader only."""
        return self.replication.progress

    @property
    def voters(self) -> Tuple[int, ...]:
        return tuple(self.progress)

    @property
    def quorum(self) -> int:
        return quorum_size(len(self.progress))

    def apply_conf_change(self, change: ConfChange) -> None:
        """Apply a committed change of the voters; node_id 0: refused, no longer pending.

        Differs from etcd 3.4: learners are not tracked, so a leader sends them nothing.
        """
        pending = self.log.conf_changes(self.log.commit + 1)
        unapplied = [index for index in pending if index > self.applied_conf_index]
        if unapplied:
            self.applied_conf_index = unapplied[0]
        if change.node_id and change.type == ConfChangeType.ADD_NODE:
            self._add_voter(change.node_id)
        elif change.node_id and change.type == ConfChangeType.REMOVE_NODE:
            self._remove_voter(change.node_id)

    def _add_voter(self, member: int) -> None:
        if member == self.id:
            self.removed = False
        if member not in self.progress:
            self.replication.set_voters((*self.progress, member))
            if self.role is RaftRole.LEADER:
                self.replication.mark_due(self.progress[member])

    def _remove_voter(self, member: int) -> None:
        if member == self.id:
            self.removed = True
        if self.progress.pop(member, None) is None or self.role is not RaftRole.LEADER:
            return
        if self.transferee == member:
            self.transferee = 0
        self._maybe_commit()            # a smaller quorum may have been reached already

    # -- roles ---------------------------------------------------------------

    def _reset(self, term: int) -> None:
        if term != self.term:
            self.term = term
            self.vote = 0
        self.lead = 0
        self.votes = {}
        self.election_elapsed = self.heartbeat_elapsed = 0
        ticks = self.config.election_ticks
        self.election_timeout = ticks + self.config.rng.randrange(ticks)
        self.transferee = 0
        self.mail.term = term
        self.replication.reset()
        self.reads.clear()

    def become_follower(self, term: int, lead: int) -> None:
        self._reset(term)
        self.lead = lead
        self.role, self._handlers = RaftRole.FOLLOWER, _FOLLOWER
        self.config.trace(f"{self.id:x} became follower at term {term}")

    def _become_pre_candidate(self) -> None:
        """Ask whether an election could be won, before the term goes up (thesis §9.6)."""
        self.lead, self.votes, self.election_elapsed = 0, {}, 0
        self.role, self._handlers = RaftRole.PRE_CANDIDATE, _PRE_CANDIDATE
        self.config.trace(f"{self.id:x} became pre-candidate at term {self.term}")

    def _become_candidate(self) -> None:
        self._reset(self.term + 1)
        self.vote = self.id
        self.role, self._handlers = RaftRole.CANDIDATE, _CANDIDATE
        self.config.trace(f"{self.id:x} became candidate at term {self.term}")

    def _become_leader(self) -> None:
        self._reset(self.term)
        self.lead = self.id
        self.role, self._handlers = RaftRole.LEADER, _LEADER
        log = self.log
        self.progress[self.id].maybe_update(log.stable)
        self.uncommitted_bytes = log.data_bytes(log.commit + 1, log.last_index + 1)
        # A second change before the first is applied could form two disjoint majorities (§4.1).
        self.pending_conf_index = max(log.conf_changes(log.last_index + 1), default=0)
        self.config.trace(f"{self.id:x} became leader at term {self.term}")
        # Only by counting entries of its own term may a leader commit older ones (§5.4.2), and a
        # client's entry may be long in coming.
        self._append_own([Entry()])

    # -- time ----------------------------------------------------------------

    def tick(self) -> None:
        if self.role is RaftRole.LEADER:
            self._tick_heartbeat()
        else:
            self._tick_election()

    def _tick_election(self) -> None:
        self.election_elapsed += 1
        if self.id not in self.progress:
            self.election_elapsed = 0
        elif self.election_elapsed >= self.election_timeout:
            self._campaign(None)

    def _tick_heartbeat(self) -> None:
        self.election_elapsed += 1
        if self.election_elapsed >= self.config.election_ticks:
            self.election_elapsed = 0
            if not self.replication.heard_quorum():
                # A leader without a quorum must not keep clients waiting (§6.2).
                self.config.trace(f"{self.id:x} stepped down: no answer of a majority")
                self.become_follower(self.term, 0)
                return
            self.transferee = 0         # it did not take over: serve proposals again
        self.heartbeat_elapsed += 1
        if self.heartbeat_elapsed >= self.config.heartbeat_ticks:
            self.heartbeat_elapsed = 0
            self.replication.send_heartbeats(self.reads.newest)

    # -- elections -----------------------------------------------------------

    def _campaign(self, context: Optional[bytes]) -> None:
        # While a conf change is committed but not applied, the voters of two changes before could
        # elect a second leader of the term.
        if self.id not in self.progress or self.log.conf_changes(self.log.commit + 1):
            return
        self.config.trace(f"{self.id:x} is starting a new election at term {self.term}")
        if self.pre_vote and context is None and self.quorum > 1:
            self._become_pre_candidate()
            self._request_votes(MsgType.PRE_VOTE, self.term + 1, None)
        else:
            self._start_election(context)

    def _start_election(self, context: Optional[bytes]) -> None:
        self._become_candidate()
        self._request_votes(MsgType.VOTE, self.term, context)
        if self.quorum == 1:
            self._become_leader()

    def _request_votes(self, kind: MsgType, term: int, context: Optional[bytes]) -> None:
        self._count_vote(self.id, granted=True)
        last, name = self.log.last_id, "pre-vote" if kind == MsgType.PRE_VOTE else "vote"
        for peer in self.progress:
            if peer != self.id:
                self.config.trace(
                    f"{self.id:x} [logterm: {last.term}, index: {last.index}] sent {name}"
                    f" request to {peer:x} at term {self.term}"
                )
                self.mail.hold(
                    kind, peer, index=last.index, log_term=last.term, context=context, term=term
                )

    def _count_vote(self, voter: int, *, granted: bool) -> None:
        answer = "vote" if granted else "vote rejection"
        self.config.trace(f"{self.id:x} received {answer} from {voter:x} at term {self.term}")
        self.votes.setdefault(voter, granted)       # a duplicate cannot change an answer

    def _hup(self, message: Message) -> None:
        self._campaign(CAMPAIGN_TRANSFER if message.type == MsgType.TIMEOUT_NOW else None)

    def _pre_candidate_resp(self, message: Message) -> None:
        """Handle an answer to MsgPreVote; a grant carries the term of the request."""
        if message.reject or message.term == self.term + 1:
            self._candidate_vote_resp(message)

    def _candidate_vote_resp(self, message: Message) -> None:
        self._count_vote(message.sender, granted=not message.reject)
        answers = [self.votes[voter] for voter in self.progress if voter in self.votes]
        grants, rejections = answers.count(True), answers.count(False)
        tally = f"{grants} votes and {rejections} vote rejections"
        self.config.trace(f"{self.id:x} [quorum:{self.quorum}] has received {tally}")
        if grants >= self.quorum and self.id in self.progress:
            if self.role is RaftRole.PRE_CANDIDATE:
                self._start_election(None)
            else:
                self._become_leader()
        elif rejections >= self.quorum:
            self.become_follower(self.term, 0)

    def _vote(self, message: Message) -> None:
        """Vote once per term, and only for a log as complete as ours (§5.2, §5.4.1)."""
        # A candidate and a leader have voted for themselves, so the rule is the same for all.
        candidate = EntryID(message.log_term, message.index)
        free = self.vote == message.sender or (not self.vote and not self.lead)
        granted = free and self.log.is_up_to_date(candidate)
        ours, verb = self.log.last_id, "voted for" if granted else "rejected vote from"
        self.config.trace(
            f"{self.id:x} [logterm: {ours.term}, index: {ours.index}, vote: {self.vote:x}]"
            f" {verb} {message.sender:x} [logterm: {candidate.term}, index: {candidate.index}]"
            f" at term {self.term}"
        )
        if granted:
            self.vote = message.sender
            self.election_elapsed = 0
        self.mail.hold(MsgType.VOTE_RESP, message.sender, reject=not granted)

    def _pre_vote(self, message: Message) -> None:
        """Tell a 3.x member if an election makes sense: not while a leader is heard (thesis §9.6).

        Promises and changes nothing.  A grant carries the term of the request.
        """
        hears_leader = self.lead and self.election_elapsed < self.config.election_ticks
        free = message.term > self.term or self.vote in (0, message.sender)
        candidate = EntryID(message.log_term, message.index)
        granted = free and not hears_leader and self.log.is_up_to_date(candidate)
        self.mail.hold(
            MsgType.PRE_VOTE_RESP, message.sender, reject=not granted,
            term=message.term if granted else self.term,
        )

    # -- messages ------------------------------------------------------------

    def step(self, message: Message) -> None:
        """Handle a message; term 0: local or a proposal, for which it may raise ProposalDropped."""
        kind = message.type
        if message.term > self.term and kind != MsgType.PRE_VOTE and (
            kind != MsgType.PRE_VOTE_RESP or message.reject
        ):
            self._handle_higher_term(message)
        elif 0 < message.term < self.term:
            self._handle_lower_term(message)
            return
        handler = self._handlers.get(kind)
        if handler is not None:
            handler(self, message)

    def _handle_higher_term(self, message: Message) -> None:
        kind = MsgType(message.type).name.title().replace("_", "")
        self.config.trace(
            f"{self.id:x} [term: {self.term}] received a Msg{kind} message with higher term"
            f" from {message.sender:x} [term: {message.term}]"
        )
        lead = message.sender if message.type in _FROM_LEADER else 0
        self.become_follower(message.term, lead)

    def _handle_lower_term(self, message: Message) -> None:
        """Tell a 3.x leader of an older term that it is deposed, else ignore the message.

        Without this answer a member whose term ran ahead is shut out for ever: leaders that check
        their quorum ignore its MsgVote.  Source: etcd 3.1 raft.go, Step.
        """
        if message.type == MsgType.APP or message.type == MsgType.HEARTBEAT:
            self.mail.hold(MsgType.APP_RESP, message.sender)
        elif message.type == MsgType.PRE_VOTE:
            self.mail.hold(MsgType.PRE_VOTE_RESP, message.sender, reject=True)

    # -- proposals -----------------------------------------------------------

    def _forward_prop(self, message: Message) -> None:
        # Never back to the sender: two members that take each other for the leader would loop.
        if not self.lead or message.sender == self.lead:
            raise ProposalDropped(f"{self.id:x} no leader at term {self.term}")
        self.mail.forward(self.lead, message.entries)

    def _leader_prop(self, message: Message) -> None:
        if self.transferee:
            raise ProposalDropped(f"{self.id:x} is transferring leadership to {self.transferee:x}")
        size = sum([len(entry.data) for entry in message.entries])
        uncommitted = self.uncommitted_bytes
        if uncommitted and size and uncommitted + size > self.config.max_uncommitted_bytes:
            raise ProposalDropped(f"{self.id:x} has {uncommitted} bytes that are not committed")
        self._append_own(message.entries)
        self.replication.note_proposer(message.sender)

    def _append_own(self, entries: Sequence[Entry]) -> None:
        """Append to the leader's log; the next ready() sends the entries in one MsgApp."""
        term, index = self.term, self.log.last_index
        appended: List[Entry] = []
        size = 0
        for entry in entries:
            index += 1
            if entry.type:
                if self.pending_conf_index > max(self.applied_conf_index, self.log.applied):
                    entry = Entry()     # one at a time: this one becomes a no-op (§4.1)
                else:
                    self.pending_conf_index = index
            entry.term, entry.index, entry.encoded = term, index, b""
            size += len(entry.data)
            appended.append(entry)
        if appended:
            self.uncommitted_bytes += size
            self.log.append(appended)
            self.replication.mark_all_due()

    # -- replication: leader -------------------------------------------------

    def _leader_app_resp(self, message: Message) -> None:
        if message.reject:
            self.replication.handle_reject(message)
        elif self.replication.handle_ack(message):
            self._maybe_commit()
            if message.sender == self.transferee and message.index == self.log.last_index:
                self.mail.send(MsgType.TIMEOUT_NOW, message.sender)

    def _leader_heartbeat_resp(self, message: Message) -> None:
        self.replication.handle_heartbeat_resp(message)
        self.reads.confirm(message.context or b"", message.sender, self.quorum)

    def _leader_read_index(self, message: Message) -> None:
        # Before the first commit of its term a leader may not know the newest commit index
        # (thesis §6.4): it drops the request.
        if message.entries and self.log.term(self.log.commit) == self.term:
            context = message.entries[0].data
            self.reads.begin(context, self.log.commit, message.sender or self.id)
            if self.id in self.progress:
                self.reads.confirm(context, self.id, self.quorum)
            self.replication.send_heartbeats(context)

    def _leader_transfer(self, message: Message) -> None:
        """Transfer leadership to message.sender as soon as its log is complete (thesis §3.10)."""
        progress = self.progress.get(message.sender)
        if progress is None or message.sender == self.id:
            return
        self.transferee, self.election_elapsed = message.sender, 0
        if progress.match_index == self.log.last_index:
            self.mail.send(MsgType.TIMEOUT_NOW, message.sender)
        else:
            self.replication.mark_due(progress)

    def on_stable(self) -> None:
        """Leader: count this member for the entries that are now durable (thesis §10.2.1)."""
        if self.role is RaftRole.LEADER and self.id in self.progress:
            self.progress[self.id].maybe_update(self.log.stable)
            self._maybe_commit()

    def _maybe_commit(self) -> None:
        """Commit the entries that a majority holds, if the last is of this term (§5.4.2)."""
        log = self.log
        index = self.replication.quorum_index
        if index <= log.commit or log.term(index) != self.term:
            return
        self.uncommitted_bytes -= log.data_bytes(log.commit + 1, index + 1)
        changes_voters = log.commit < self.pending_conf_index <= index
        self.replication.mark_commit_due(index, at_once=changes_voters)
        log.commit_to(index)

    # -- replication: follower -----------------------------------------------

    def _follow_sender(self, message: Message) -> None:
        self.election_elapsed = 0
        self.lead = message.sender

    def _follower_app(self, message: Message) -> None:
        self._follow_sender(message)
        log = self.log
        if message.index < log.commit:
            self.mail.hold_ack(message.sender, log.commit)
            return
        previous = EntryID(message.log_term, message.index)
        last_new = log.maybe_append(previous, message.commit, message.entries)
        if last_new is not None:
            self.mail.hold_ack(message.sender, last_new)
        else:
            self.mail.hold(
                MsgType.APP_RESP, message.sender, index=message.index, reject=True,
                reject_hint=log.last_index,
            )

    def _follower_heartbeat(self, message: Message) -> None:
        self._follow_sender(message)
        if message.commit > self.log.commit:
            self.log.commit_to(message.commit)
        # The answer promises nothing, so it need not wait for the disk.  3.x counts the context.
        self.mail.send(MsgType.HEARTBEAT_RESP, message.sender, context=message.context)

    def _follower_read_index(self, message: Message) -> None:
        if self.lead and not message.sender:        # our own; other members ask the leader
            self.mail.send(MsgType.READ_INDEX, self.lead, term=0, entries=message.entries)

    def _follower_read_index_resp(self, message: Message) -> None:
        if message.entries and message.sender == self.lead:
            self.reads.confirmed.append((message.entries[0].data, message.index))

    def _follower_snap(self, message: Message) -> None:
        self._follow_sender(message)
        if message.snapshot is not None and message.snapshot.index > self.log.commit:
            self._restore(message.snapshot)
        self.mail.hold_ack(message.sender, self.log.commit)

    def _restore(self, snapshot: Snapshot) -> None:
        """Replace the log by a snapshot, or commit up to it if the log holds its last entry."""
        log = self.log
        if log.match_term(snapshot.id):
            log.commit_to(snapshot.index)
            return
        log.restore(snapshot)
        self.replication.set_voters(snapshot.voters)
        self.config.trace(
            f"{self.id:x} [commit: {log.commit}] restored snapshot"
            f" [index: {snapshot.index}, term: {snapshot.term}]"
        )

    def _yield_to_leader(self, message: Message) -> None:
        self.become_follower(self.term, message.sender)
        _FOLLOWER[message.type](self, message)


_FROM_LEADER = frozenset((MsgType.APP, MsgType.HEARTBEAT, MsgType.SNAP))
_RESPONSES = frozenset((
    MsgType.APP_RESP, MsgType.VOTE_RESP, MsgType.HEARTBEAT_RESP, MsgType.PRE_VOTE_RESP,
))

_FOLLOWER: Dict[int, Callable[[Raft, Message], None]] = {
    MsgType.HUP: Raft._hup,
    MsgType.PROP: Raft._forward_prop,
    MsgType.APP: Raft._follower_app,
    MsgType.HEARTBEAT: Raft._follower_heartbeat,
    MsgType.SNAP: Raft._follower_snap,
    MsgType.VOTE: Raft._vote,
    MsgType.PRE_VOTE: Raft._pre_vote,
    MsgType.TIMEOUT_NOW: Raft._hup,
    MsgType.READ_INDEX: Raft._follower_read_index,
    MsgType.READ_INDEX_RESP: Raft._follower_read_index_resp,
}
_CANDIDATE: Dict[int, Callable[[Raft, Message], None]] = {
    MsgType.HUP: Raft._hup,
    MsgType.PROP: Raft._forward_prop,     # refuses it: a candidate knows no leader
    MsgType.APP: Raft._yield_to_leader,
    MsgType.HEARTBEAT: Raft._yield_to_leader,
    MsgType.SNAP: Raft._yield_to_leader,
    MsgType.VOTE: Raft._vote,
    MsgType.VOTE_RESP: Raft._candidate_vote_resp,
    MsgType.PRE_VOTE: Raft._pre_vote,
}
_PRE_CANDIDATE: Dict[int, Callable[[Raft, Message], None]] = {
    **_CANDIDATE, MsgType.PRE_VOTE_RESP: Raft._pre_candidate_resp,
}
del _PRE_CANDIDATE[MsgType.VOTE_RESP]
_LEADER: Dict[int, Callable[[Raft, Message], None]] = {
    MsgType.PROP: Raft._leader_prop,
    MsgType.APP_RESP: Raft._leader_app_resp,
    MsgType.HEARTBEAT_RESP: Raft._leader_heartbeat_resp,
    MsgType.VOTE: Raft._vote,
    MsgType.PRE_VOTE: Raft._pre_vote,
    MsgType.TRANSFER_LEADER: Raft._leader_transfer,
    MsgType.READ_INDEX: Raft._leader_read_index,
}
