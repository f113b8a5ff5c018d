"""Leadership: which member leads, and how a leader gives leadership to another member."""

from __future__ import annotations

import contextlib
import math
from typing import Callable, Iterable

from ..base.codec import decode_conf_change
from ..base.errors import CodecError, EtcdError, RequestTimeout
from ..base.ids import package_logger
from ..base.limits import NS
from ..base.messages import ConfChange, ConfChangeType, Entry, EntryType
from ..net.reactor import Reactor
from ..raft.core import RaftRole
from ..raft.node import RawNode
from .cluster import SERVER_LOG, format_id
from .configuration import ServerConfig
from .journal import Journal
from .waiting import Proposals


class Leadership:
    """The leader as this member sees it, and the transfer of leadership from this member.

    active_since  member id -> unix seconds since when its links are up; 0: down

    Source: Raft thesis §3.10; etcd 3 server.go, TransferLeadership (2.3 has none).
    """

    COMMIT_DELAY_SECONDS = 0.001

    def __init__(
        self, node: RawNode, journal: Journal, reactor: Reactor, config: ServerConfig,
        active_since: Callable[[int], float],
    ) -> None:
        self._node = node
        self._journal = journal
        self._reactor = reactor
        self._active_since = active_since
        self._heartbeat_s = config.heartbeat_ms / 1000
        self._election_s = config.election_ms / 1000
        self._seen = 0                  # the leader at the last look
        self._since = 0.0               # when a leader became known (monotonic); 0: never
        self._lost_at = reactor.now()   # when the last leader was lost (monotonic)
        self._removal_term = 0          # the term of the last transfer before a removal
        self._visit = 0                 # of the journal, at the last tick; 0: it was idle
        self._visit_ticks = 0           # that the visit has taken
        self._is_commit_scheduled = False

    def observe(self) -> bool:
        """Log a change of leader, in etcd's words; True if there was one since the last call."""
        raft, seen = self._node.raft, self._seen
        lead = raft.lead
        if lead == seen:
            return False
        self._seen = lead
        if lead:
            self._since = self._reactor.now()
            what = f"changed leader from {seen:x} to" if seen else "elected leader"
        else:
            self._lost_at = self._reactor.now()
            what = "lost leader"
        package_logger("raft.node").info(
            "%x %s %x at term %d", raft.id, what, lead or seen, raft.term)
        return True

    def unled_s(self) -> float:
        return 0.0 if self._node.raft.lead else self._reactor.now() - self._lost_at

    def has_links(self, since_s: float = math.inf) -> bool:
        """Leader: True if links to a quorum are up; others: True if the one to the leader is.

        since_s  the links have been up since this time at the latest, unix seconds
        """
        raft = self._node.raft
        if raft.role is not RaftRole.LEADER:
            return 0 < self._active_since(raft.lead) <= since_s
        up = sum(v == raft.id or 0 < self._active_since(v) <= since_s for v in raft.voters)
        return up > len(raft.voters) // 2

    def explain_timeout(self, started: float) -> EtcdError:
        """Say why a request that came at `started` (monotonic) timed out, in etcd 2.3's words."""
        cause = "etcdserver: request timed out"
        started_s = self._reactor.wall_ns() / NS - (self._reactor.now() - started)
        if self._since and self._since - 2 * self._election_s < started < self._since:
            cause += ", possibly due to previous leader failure"
        elif self._node.raft.lead and not self.has_links(started_s):
            cause += ", possibly due to connection lost"
        return RequestTimeout(cause)

    def schedule_commit_broadcast(self) -> None:
        """Send the new commit index to followers if no entries follow within 1 ms to carry it."""
        if self._node.commit_unsent and not self._is_commit_scheduled:
            self._is_commit_scheduled = True
            self._reactor.call_later(self.COMMIT_DELAY_SECONDS, self._broadcast_commit)

    def _broadcast_commit(self) -> None:
        self._is_commit_scheduled = False
        self._node.broadcast_commit()

    # -- leadership transfer -------------------------------------------------

    def transfer(self, beyond: int = -1) -> int:
        """Leader: transfer leadership to the reachable member with the most of our log.

        Returns its id, 0 if there is none or we do not lead.  Proposals are refused until the
        transferee leads, or has not done so for an election timeout.

        beyond  the transferee must have more of our log on its disk than this index
        """
        raft = self._node.raft
        if raft.role is not RaftRole.LEADER:
            return 0
        transferee = max((
            (progress.match_index, id) for id, progress in raft.progress.items()
            if id != raft.id and progress.match_index > beyond and self._active_since(id) > 0
        ), default=(0, 0))[1]
        if transferee:
            SERVER_LOG.info(
                "leadership transfer %s -> %s", format_id(raft.id), format_id(transferee)
            )
            self._node.transfer_leader(transferee)
        return transferee

    def transfer_before_removal(self, changes: Iterable[ConfChange]) -> None:
        """Transfer leadership if one of `changes`, about to be proposed, removes us; once a term.

        A leader that removes itself may exit before its followers learn of the commit.  The other
        of two members then waits for ever for its vote (thesis §4.2.2).  If no other member takes
        over, this one proposes the change all the same.
        """
        raft = self._node.raft
        if raft.term != self._removal_term and any(
            change.type == ConfChangeType.REMOVE_NODE and change.node_id == raft.id
            for change in changes
        ) and self.transfer():
            self._removal_term = raft.term

    def transfer_before_entries(self, entries: Iterable[Entry]) -> None:
        """Do the same for the proposals of another member."""
        for entry in entries:
            if entry.type == EntryType.CONF_CHANGE:
                with contextlib.suppress(CodecError):
                    self.transfer_before_removal((decode_conf_change(entry.data),))

    def watch_disk(self) -> None:
        """Transfer leadership if our disk has not answered for an election timeout; every tick.

        Heartbeats need no disk, so no follower would notice.  The transferee must have more on its
        disk than we have: if all members share one slow disk, a transfer gains nothing.
        """
        journal, raft = self._journal, self._node.raft
        visit = journal.visits if journal.busy else 0
        self._visit_ticks = self._visit_ticks + 1 if visit and visit == self._visit else 0
        self._visit = visit
        if self._visit_ticks >= raft.config.election_ticks and not raft.transferee:
            if self.transfer(beyond=raft.log.stable):
                SERVER_LOG.warning(
                    "stepped aside: the disk has not answered for %d ms",
                    round(self._visit_ticks * self._heartbeat_s * 1000),
                )

    def leave(self, proposals: Proposals, done: Callable[[], None]) -> None:
        """Transfer leadership and await answers to `proposals`, an election timeout at most."""
        deadline = self._reactor.now() + self._election_s
        self._wait_to_leave(proposals, self.transfer(), deadline, done)

    def _wait_to_leave(
        self, proposals: Proposals, transferee: int, deadline: float, done: Callable[[], None]
    ) -> None:
        raft, call_later = self._node.raft, self._reactor.call_later
        is_unled = raft.lead in (0, raft.id)
        is_waiting = is_unled if transferee else raft.lead and len(proposals)
        if is_waiting and self._reactor.now() < deadline:
            call_later(0.005, self._wait_to_leave, proposals, transferee, deadline, done)
        elif transferee and not is_unled:
            # Followers may forward proposals to us until they hear the new leader: pass them on.
            call_later(2 * self._heartbeat_s, self._wait_to_leave, proposals, 0, deadline, done)
        else:
            done()
