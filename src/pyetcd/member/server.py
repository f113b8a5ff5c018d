"""The server: consensus, disk and store brought together."""

from __future__ import annotations

import contextlib
import functools
import random
from typing import Any, Callable, List, Optional

from ..base.basics import _nothing
from ..base.codec import encode_request
from ..base.errors import (
    EtcdError,
    NoSpace,
    ProposalDropped,
    ReconfigurationRefused,
    RequestTimeout,
    ServerStopped,
    TooManyRequests,
)
from ..base.ids import IdGenerator, package_logger
from ..base.limits import (
    COMPACT_SLICE_ENTRIES,
    DEFAULT_PEER_URLS,
    NS,
    PURGE_SECONDS,
    QUEUED_BYTES_MAX,
    REMOVED_SECONDS,
    SYNC_SECONDS,
)
from ..base.messages import (
    ConfChange,
    ConfChangeType,
    Entry,
    EntryID,
    HardState,
    Message,
    MsgType,
    Request,
    Snapshot,
)
from ..base.text import utf8
from ..disk.snapshots import DataDir, purge_files
from ..net.reactor import Reactor
from ..net.workers import FILE_WORK, Clock
from ..peer.transport import Transport
from ..raft.core import RaftRole
from ..raft.node import RawNode, Ready
from ..raft.replication import RaftConfig
from ..store.tree import StoreState
from .applier import Applier, read_change
from .cluster import FEATURE_PRE_VOTE, FEATURE_READ_INDEX, FEATURES, Member, format_id
from .configuration import Bootstrap, ServerConfig
from .inspection import MemberInspector
from .journal import WORK_ENTRIES_MAX, Batch, Journal, WalWriter, first_part
from .monitors import LeaderWait, Traffic, VersionMonitor
from .reconfiguration import LeadershipTransfer, check_active
from .snapshots import SnapshotKeeper
from .statistics import LeaderStats, Metrics, ServerCounts, ServerStats
from .waiting import Done, LateProposals, Proposals, QuorumReads


class CommitBroadcast:
    """Sends the new commit index to followers when no entries follow within 1 ms to carry it."""

    DELAY_SECONDS = 0.001

    def __init__(self, node: RawNode, reactor: Reactor) -> None:
        self._node = node
        self._reactor = reactor
        self._waiting = False

    def turn(self) -> None:
        """Look whether somebody has to be told; at the end of each turn."""
        if self._node.commit_unsent and not self._waiting:
            self._waiting = True
            self._reactor.call_later(self.DELAY_SECONDS, self._tell)

    def _tell(self) -> None:
        self._waiting = False
        self._node.broadcast_commit()


class EtcdServer:
    """One member.  Owns the Raft node, the log on disk and what is applied; knows no HTTP.

    do() and change_member() are the ways in; every answer comes through the callback given, on
    the reactor's thread, after the change is durable on a quorum and applied here.
    Thread: reactor.  transport_type, wal_writer_type and rng are the seams of the simulator.
    """

    def __init__(
        self, config: ServerConfig, boot: Bootstrap, reactor: Reactor, *,
        failed: Callable[[BaseException], None], removed: Callable[[], None],
        published: Callable[[], None], transport_type: Any = None, wal_writer_type: Any = None,
        rng: Optional[random.Random] = None,
    ) -> None:
        self.config = config
        self.reactor = reactor
        self.member_id = boot.member_id
        self.store = boot.store
        self.cluster = boot.cluster
        self.ids = IdGenerator(boot.member_id, reactor.wall_ns() // 1_000_000)
        self.raft_index = boot.snapshot.index if boot.snapshot else 0   # last applied
        self.raft_term = boot.snapshot.term if boot.snapshot else 0     # of that entry
        self.stats = ServerStats(config.name, self.member_id, Clock(reactor.now, reactor.wall_ns))
        self.leader_stats = LeaderStats(boot.member_id)
        self.metrics = Metrics()
        self.proposals = Proposals(config.request_timeout_s)
        self.reads = QuorumReads(boot.member_id, self.ids.next())
        self.stopping = False
        self.no_space = ""              # why the log cannot be written; "": it can
        self.applier = Applier(self.store, self.cluster, self.member_id, reactor.wall_ns)
        writer = (wal_writer_type or WalWriter)(
            boot.wal, boot.snapshotter, reactor, failed=failed, full=self._disk_full
        )
        self.journal = Journal(boot.wal, writer, boot.contents.hard_state, self._durable)
        self.snapshots = SnapshotKeeper(
            reactor, self.journal, boot.snapshotter, self.raft_index, len(self.store), failed
        )
        self.counts = ServerCounts(config.heartbeat_ms / 1000)
        self.traffic = traffic = Traffic(self.stats, self.leader_stats, reactor.now)
        self.transport: Transport = (transport_type or Transport)(
            reactor, member_id=boot.member_id, cluster_id=boot.cluster.id,
            peer_urls=config.initial_advertise_peer_urls, is_removed=boot.cluster.is_removed,
            deliver=self._deliver, removed=removed, round_trip=traffic.round_trip,
            unreachable=lambda to: self.node.report_unreachable(to),
            snapshot_done=lambda to, ok: self.node.report_snapshot(to, ok),
            election_s=config.election_ms / 1000, sent=traffic.sent, received=traffic.received,
            tls=boot.peer_tls,
            inspector=MemberInspector(self.cluster, lambda m: self.node.protocol_violation(m)),
        )
        self.versions = VersionMonitor(
            reactor, self.cluster, self.member_id, self._propose_version, boot.peer_tls
        )
        self._leader_wait = LeaderWait(reactor, self.cluster, self.transport.problem)
        self.node: RawNode = self._make_node(boot, rng or random.Random())
        self.handover = LeadershipTransfer(self.node, self.transport.active_since)
        self._disk_watch = DiskWatch(self)
        self._news = CommitBroadcast(self.node, reactor)
        self._data_dir = boot.data_dir
        self._removed = removed
        self._tell_published = published
        self._queue: List[Entry] = []           # proposals of this turn, or without a leader
        self._queued_bytes = 0                  # in them
        self._changes: List[ConfChange] = []    # likewise
        self._late_proposals = LateProposals(2 * config.election_ms / 1000)
        self._lead = 0                          # as last seen by _watch_lead
        self.lead_since = 0.0                   # when it was elected (monotonic)
        for member in boot.remotes:
            self.transport.add_remote(member.id, member.peer_urls)
        _connect_others(self)

    def _make_node(self, boot: Bootstrap, rng: random.Random) -> RawNode:
        raft_log = package_logger("raft")
        config = RaftConfig(
            id=boot.member_id,
            election_ticks=max(self.config.election_ms // self.config.heartbeat_ms, 1),
            rng=rng,
            trace=raft_log.info,
            defer_commit=True,
        )
        if boot.bootstrap_entries:
            node = RawNode.bootstrap(config, boot.bootstrap_entries)
        else:
            node = RawNode(
                config, hard_state=boot.contents.hard_state, snapshot=boot.snapshot,
                entries=boot.contents.entries, applied=self.raft_index,
            )
        node.snapshot_source = self.snapshots.newest
        return node

    # -- life --------------------------------------------------------------

    def start(self) -> None:
        """Begin to take part.  The reactor must call on_turn() from now on."""
        self.reactor.on_turned = self.counts.turn_durations.observe
        self.journal.writer.start()
        self._leader_wait.watch(self.lead)
        if len(self.node.raft.voters) > 1:
            self.node.advance_ticks(self.node.raft.config.election_ticks - 1)
        self.reactor.call_later(self.config.heartbeat_ms / 1000, self._tick)
        Expiry(self)
        Purge(self, self._data_dir)
        Publication(self, self._tell_published)

    def stop(self) -> None:
        """Reject what waits, write the last batch, close the log.  Blocks for one sync."""
        self.stopping = True
        self.proposals.fail_all(ServerStopped())
        if self.node.has_ready():
            self.journal.add(self.node.ready())
        self.journal.close()
        self.abandon()

    def _disk_full(self, why: str) -> None:
        """The log cannot grow (`why`), or can again (""): reads go on, nothing is lost."""
        self.no_space, log = why, package_logger("etcdserver")
        if not why:
            log.warning("the log can be written again")
            return
        log.error("%s; writes are refused until there is space again", why)
        cause = f"etcdserver: {why}; the change may still be made when there is space again"
        self.proposals.fail_all(RequestTimeout(cause))

    def abandon(self) -> None:
        """Stop saying anything, as a crash would, and free all; harmless after stop()."""
        self.stopping = True
        with contextlib.ExitStack() as each:
            for part in (self.journal.writer, self.transport, self.versions, self._leader_wait):
                each.callback(part.stop)

    # -- ways in -----------------------------------------------------------

    @property
    def lead(self) -> int:
        """Member id of the known leader, 0 if none."""
        return self.node.raft.lead

    @property
    def is_leader(self) -> bool:
        """True if this member leads."""
        return self.node.raft.role == RaftRole.LEADER

    @property
    def is_healthy(self) -> bool:
        """True if a leader is known and, when that is us, a quorum of streams is up.

        False while the disk is full.
        """
        if self.no_space:
            return False
        if not self.is_leader:
            return self.lead != 0
        voters = self.node.raft.voters
        active = sum(v == self.member_id or self.transport.active_since(v) > 0 for v in voters)
        return active > len(voters) // 2

    def do(self, request: Request, done: Done, encoded: bytes = b"") -> None:
        """Send a command through consensus; done(Event, or EtcdError) when it is applied here.

        The command may still be applied after a RequestTimeout.

        encoded  its encode_request, where that is known; then it has an id
        """
        if self.stopping or self.no_space and request.method != "QGET":
            done(ServerStopped() if self.stopping else NoSpace(self.no_space))
            return
        if not request.id:
            request = request._replace(id=self.ids.next())
        if self._queued_bytes > QUEUED_BYTES_MAX or not (
            self.proposals.add(request.id, done, self.reactor.now())
        ):
            done(TooManyRequests("etcdserver: too many requests"))
        elif request.method == "QGET" and self.reads.enabled:
            self.reads.add(request)
        else:
            request = request if encoded else request.as_unicode()
            data = encoded or encode_request(request)
            self._queue.append(Entry(0, 0, 0, data, request))
            self._queued_bytes += len(data)

    def change_member(
        self, change_type: ConfChangeType, member: Member,
        done: Callable[[Optional[Exception]], None],
    ) -> None:
        """Add, remove or update a member; done(None), or done(MemberError or EtcdError)."""
        if self.stopping or self.no_space:
            done(ServerStopped() if self.stopping else NoSpace(self.no_space))
            return
        if self.config.strict_reconfig_check:
            try:
                self.cluster.check_strict(change_type, member.id)
                check_active(change_type, member.id, self.member_id, self.cluster.members,
                             self.transport.active_since)
            except ReconfigurationRefused as error:
                done(error)
                return
        context = None
        if change_type != ConfChangeType.REMOVE_NODE:
            context = utf8(member.context_json())
        change = ConfChange(self.ids.next(), change_type, member.id, context)
        if self.proposals.add(change.id, done, self.reactor.now()):
            self._changes.append(change)
        else:
            done(TooManyRequests("etcdserver: too many requests"))

    def _deliver(self, message: Message) -> None:
        """A message of a peer has arrived; its proposals wait for the next leader if need be.

        Differs from etcd, which drops them, so that the peer's client waits for its timeout.
        While the disk is full entries are dropped: they would fill the memory instead.
        """
        if self.no_space and message.type == MsgType.APP and message.entries:
            return
        if message.type == MsgType.PROP:
            self.handover.before_entries(message.entries)
        try:
            self.node.step(message)
        except ProposalDropped:
            self._late_proposals.add(message.entries, self.reactor.now())

    # -- clocks ------------------------------------------------------------

    def _tick(self) -> None:
        """One tick of Raft, however late: ticks missed in a stall are dropped, not replayed."""
        if self.stopping:
            return
        self.reactor.call_later(self.config.heartbeat_ms / 1000, self._tick)
        self.node.raft.pre_vote = self.cluster.all_have(FEATURE_PRE_VOTE)
        self.reads.enabled = self.cluster.all_have(FEATURE_READ_INDEX)
        self.reads.tick(self.proposals)
        self._late_proposals.expire(self.reactor.now())
        self.counts.tick(self.reactor.now(), self.is_leader * (len(self.node.raft.voters) - 1))
        self.node.tick()
        self._disk_watch.tick()
        expire_requests(self)

    def _propose_version(self, version: str) -> None:
        self.do(Request(method="PUT", path="/0/version", val=version), lambda result: None)

    # -- one turn (DESIGN: order inside one turn, steps 5 to 7) -------------

    def on_turn(self) -> None:
        """Propose, hand out, write, apply.  Called once per turn of the reactor."""
        if self.stopping:
            return
        node, hub, refused = self.node, self.store.hub, False
        if self._late_proposals and self.lead and not node.raft.transferee:
            with contextlib.suppress(ProposalDropped):  # again: as if the network had lost them
                node.propose(*self._late_proposals.take(self.reactor.now()))
        if self.reads:
            self._serve_reads()
        if self._queue or self._changes:
            refused = not self._propose_queued()
        if node.has_ready():
            self._take(node.ready())
        self.journal.submit()
        self.store.begin_turn()
        self.counts.time_apply(self._apply, self.reactor.now)
        if self.reads:
            self._serve_reads()
        if self.snapshots.is_requested:
            self._maybe_snapshot()
        self.snapshots.work(self._compact)
        self._news.turn()
        waiting = hub.backlog or not refused and (self._queue or self._changes)
        if waiting or self.store.has_garbage or self.journal.is_encoding or node.has_ready():
            self.reactor.call_soon(_nothing)    # what apply caused: in the next turn, at once

    def _propose_queued(self) -> bool:
        """Hand the waiting proposals to Raft; False if they have to wait for a leader.

        Differs from etcd: they also wait while no link to the leader is up.  It may be dead, and
        what is sent to a dead leader is lost: its client would wait for the whole timeout.
        """
        if self.lead and not self.is_leader and not self.transport.active_since(self.lead):
            return False
        queue, self._queue, self._queued_bytes = self._queue, [], 0
        self.handover.before(self._changes)
        try:
            if queue:
                self.node.propose(*queue)
                queue = []
            while self._changes:
                self.node.propose_conf_change(self._changes[0])
                self.reactor.call_later(SYNC_SECONDS, self._repeat, self._changes.pop(0))
        except ProposalDropped:
            waiting = self.proposals
            self._queue += [e for e in queue if e.request and e.request.id in waiting]
            self._queued_bytes = sum(len(entry.data) for entry in self._queue)
            self._changes = [change for change in self._changes if change.id in waiting]
            return False
        return True

    def _serve_reads(self) -> None:
        for request in self.reads.take(self.node, self.raft_index):
            done = self.proposals.pop(request.id)
            if done is not None:
                done(self.applier.apply_request(request))

    def _repeat(self, change: ConfChange) -> None:
        """Propose a change again that was lost, or met another one under way at the leader."""
        if change.id in self.proposals:     # applied twice it does nothing the second time
            self._changes.append(change)

    def _take(self, ready: Ready) -> None:
        """Send what may leave at once, and keep the rest for the disk."""
        self._watch_lead()
        if ready.messages:
            self.transport.offer(ready.messages)
        self.journal.add(ready)

    def _durable(self, batch: Batch) -> None:
        """Everything of this batch is on disk: now it may be said, and counted."""
        if self.stopping:
            return
        if batch.mark is not None:
            self.node.persisted(batch.mark)
        if batch.snapshot is not None:
            self._recover(batch.snapshot)
        if batch.held:
            self.transport.offer(batch.held)

    def _apply(self) -> None:
        entries = self.node.committed_entries(WORK_ENTRIES_MAX)
        if not entries:
            return
        del entries[first_part(entries):]
        log = self.node.raft.log
        for entry in entries:
            if not self.store.accepts_changes or not entry.type and not self.applier.prepare(entry):
                break
            if not entry.type:
                self._apply_normal(entry)
                continue
            log.applied_to(self.raft_index)
            if not self._apply_conf_change(entry):
                return
        log.applied_to(self.raft_index)
        if log.applied < log.commit:
            self.reactor.call_soon(_nothing)    # more than one turn's worth: go on at once
        self._maybe_campaign_alone()
        self._maybe_snapshot()

    def _apply_normal(self, entry: Entry) -> None:
        """Apply a command and answer it; the log is told by _apply().  A hot path."""
        result = self.applier.apply_entry(entry)
        self.raft_index, self.raft_term = entry.index, entry.term
        request = entry.request
        if request is None:
            if not entry.data and self.is_leader:
                self.versions.start()           # our term's first entry: we really lead
            return
        entry.request = None                    # the log keeps the bytes; this was for us alone
        done = self.proposals.pop(request.id)
        if done is not None:
            done(result)

    def _apply_conf_change(self, entry: Entry) -> bool:
        """Apply a membership change; False if its commit must first be on disk.

        A crash could otherwise bring back a member that knows fewer voters than it has already
        dealt with, and let it commit alone what the others never saw.
        """
        if self.journal.durable_commit < entry.index:
            raft = self.node.raft
            self.journal.sync_commit(HardState(raft.term, raft.vote, raft.log.commit))
            return False
        change = read_change(entry)
        error = self.applier.apply_conf_change(change)
        self.node.apply_conf_change(change if error is None else change._replace(node_id=0))
        self.raft_index, self.raft_term = entry.index, entry.term
        if error is None:
            self._adjust_peers(change)
        done = self.proposals.pop(change.id)
        if done is not None:
            done(error)
        return True

    def _adjust_peers(self, change: ConfChange) -> None:
        member = self.cluster.members.get(change.node_id)
        if change.type == ConfChangeType.REMOVE_NODE:
            if change.node_id == self.member_id:
                self.reactor.call_later(REMOVED_SECONDS, self._removed)
            else:
                self.transport.remove_peer(change.node_id)
                self.leader_stats.remove(change.node_id)
        elif member is None or change.node_id == self.member_id:
            return
        elif change.type == ConfChangeType.ADD_NODE:
            self.transport.add_peer(member.id, member.peer_urls)
        else:
            self.transport.update_peer(member.id, member.peer_urls)

    def _maybe_campaign_alone(self) -> None:
        """A cluster of one need not wait for a timeout: nobody else can lead.

        Only once everything known to be committed is applied: before that the voters are those
        of an earlier time.
        """
        raft = self.node.raft
        if raft.lead or raft.voters != (self.member_id,) or raft.role != RaftRole.FOLLOWER:
            return
        if raft.log.applied >= raft.log.commit:
            self.node.campaign()

    def _watch_lead(self) -> None:
        """Log a change of leader, in etcd's words, and act on it."""
        lead = self.node.raft.lead
        if lead == self._lead:
            return
        term, log = self.node.raft.term, package_logger("raft.node")
        me, old, new = (format_id(i) for i in (self.member_id, self._lead, lead))
        if not lead:
            log.info("%s lost leader %s at term %d", me, old, term)
        elif not self._lead:
            log.info("%s elected leader %s at term %d", me, new, term)
        else:
            log.info("%s changed leader from %s to %s at term %d", me, old, new, term)
        self._lead = lead
        self._leader_wait.watch(lead)
        if lead:
            self.lead_since = self.reactor.now()
            self.counts.leader_changes += 1
            self.stats.became(lead)
        if lead != self.member_id:
            self.versions.stop()

    # -- snapshots ---------------------------------------------------------

    def _maybe_snapshot(self) -> None:
        count = self.config.snapshot_count
        is_due = self.snapshots.is_due(self.raft_index, len(self.store), count)
        if (is_due or self.snapshots.is_requested) and not self.snapshots.busy:
            applied = EntryID(self.raft_term, self.raft_index)
            self.snapshots.begin(self.store, applied, self.node.raft.voters, lent=not is_due)

    def _compact(self, index: int) -> bool:
        log = self.node.raft.log
        self.node.compact(min(index, log.offset + COMPACT_SLICE_ENTRIES))
        if log.offset == index:
            package_logger("etcdserver").info("compacted raft log at %d", index)
        return log.offset >= index

    def _recover(self, snapshot: Snapshot) -> None:
        """A snapshot of the leader is durable here: the store becomes what it says."""
        self.snapshots.received(snapshot.index)
        self.store.install(snapshot.state or StoreState.read(snapshot.data))
        self.cluster.recover()
        self.applier.auth_changes += 1
        text = "recovered from incoming snapshot at index %d"
        package_logger("etcdserver").info(text, snapshot.index)
        self.transport.remove_all()
        _connect_others(self)
        self.raft_index, self.raft_term = snapshot.index, snapshot.term
        self.node.applied_to(snapshot.index)


def _connect_others(etcd: EtcdServer) -> None:
    for member in etcd.cluster.members.values():
        if member.id != etcd.member_id:
            etcd.transport.add_peer(member.id, member.peer_urls)


def explain_timeout(etcd: EtcdServer, started: float) -> EtcdError:
    """Say why a request got no answer (etcd 2.3: the same three sentences)."""
    cause = "etcdserver: request timed out"
    election_s = etcd.config.election_ms / 1000
    if etcd.lead_since and etcd.lead_since - 2 * election_s < started < etcd.lead_since:
        cause += ", possibly due to previous leader failure"
    elif etcd.lead and not _was_connected_since(etcd, started):
        cause += ", possibly due to connection lost"
    return RequestTimeout(cause)


def expire_requests(etcd: EtcdServer) -> None:
    """Fail what has waited too long, WORK_ENTRIES_MAX requests in a turn."""
    error = functools.partial(explain_timeout, etcd)
    if etcd.proposals.expire(etcd.reactor.now(), error) >= WORK_ENTRIES_MAX:
        etcd.reactor.call_soon(expire_requests, etcd)


def _was_connected_since(etcd: EtcdServer, started: float) -> bool:
    since = etcd.reactor.wall_ns() / NS - (etcd.reactor.now() - started)
    if not etcd.is_leader:
        return 0 < etcd.transport.active_since(etcd.lead) <= since
    voters = etcd.node.raft.voters
    connected = 1 + sum(0 < etcd.transport.active_since(v) <= since for v in voters)
    return connected > len(voters) // 2


class Publication:
    """Tells the cluster our name and client URLs, until it is applied; then calls done()."""

    def __init__(self, etcd: EtcdServer, done: Callable[[], None]) -> None:
        self._etcd = etcd
        self._done = done
        self._propose()

    def _propose(self) -> None:
        etcd, config = self._etcd, self._etcd.config
        if etcd.stopping:
            return
        member = Member(
            etcd.member_id, config.initial_advertise_peer_urls, config.name,
            config.advertise_client_urls, FEATURES,
        )
        path = f"/0/members/{format_id(etcd.member_id)}/attributes"
        etcd.do(Request(method="PUT", path=path, val=member.attributes_json()), self._applied)

    def _applied(self, result: Any) -> None:
        etcd, log = self._etcd, package_logger("etcdserver")
        if etcd.stopping:
            return
        if isinstance(result, EtcdError):
            log.error("publish error: %s", result.cause)
            etcd.reactor.call_later(SYNC_SECONDS, self._propose)
            return
        self._done()
        self._check_peer_urls()
        log.info(
            "published {Name:%s ClientURLs:[%s]} to cluster %s", etcd.config.name,
            " ".join(etcd.config.advertise_client_urls), format_id(etcd.cluster.id),
        )

    def _check_peer_urls(self) -> None:
        """Warn if the flags have other peer URLs than the cluster: only the first start uses them.

        Not if they are the default, or those of a port that the system chose.
        """
        etcd, config = self._etcd, self._etcd.config
        member = etcd.cluster.members.get(etcd.member_id)
        if member is None:                  # removed before its publication was applied
            return
        known = member.peer_urls
        given = tuple(sorted(config.initial_advertise_peer_urls))
        is_chosen = given != tuple(DEFAULT_PEER_URLS.split(",")) and not any(
            url.endswith(":0") for url in config.listen_peer_urls
        )
        if given != known and is_chosen:
            package_logger("etcdserver").warning(
                "-initial-advertise-peer-urls %s does nothing: the other members know this one by"
                " %s; change that with PUT /v2/members/%s", ",".join(given), ",".join(known),
                format_id(etcd.member_id),
            )


class Expiry:
    """The leader's clock reaches the log, where every member expires keys alike.

    Differs from etcd: if many keys are over, the time in the log catches up with the clock in
    steps, each when the one before is applied, so that nobody else has to wait for all of them.
    """

    def __init__(self, etcd: EtcdServer) -> None:
        self._etcd = etcd
        self._is_under_way = False
        self._wait()

    def _wait(self) -> None:
        if not self._etcd.stopping:
            self._etcd.reactor.call_later(SYNC_SECONDS, self._sync)

    def _sync(self) -> None:
        self._wait()
        if self._etcd.store.has_ttl and not self._is_under_way:
            self._step()

    def _step(self) -> None:
        etcd = self._etcd
        if etcd.stopping or etcd.no_space or not etcd.is_leader:
            return
        now_ns = etcd.reactor.wall_ns()
        time_ns = etcd.store.expiry_step_ns(now_ns)
        self._is_under_way = True
        request = Request(method="SYNC", time=time_ns)
        etcd.do(request, functools.partial(self._done, time_ns == now_ns))

    def _done(self, is_last: bool, result: Any) -> None:
        self._is_under_way = False
        if result is None and not is_last:      # else it failed, and may be tried in a while
            self._step()


class Purge:
    """Removes snapshots and segments beyond the number to keep, every 30 s."""

    def __init__(self, etcd: EtcdServer, data_dir: DataDir) -> None:
        self._etcd = etcd
        config = etcd.config
        self._kept = (
            (data_dir.snap, ".snap", config.max_snapshots), (data_dir.wal, ".wal", config.max_wals)
        )
        self._begin()

    def _begin(self) -> None:
        if not self._etcd.stopping:
            self._etcd.reactor.run_blocking(self._remove, kind=FILE_WORK, done=self._done)

    def _remove(self) -> None:
        disk = self._etcd.snapshots.snapshotter.disk
        for directory, suffix, keep in self._kept:
            purge_files(directory, suffix, keep, disk=disk)

    def _done(self, error: Optional[BaseException], _: Any) -> None:
        self._etcd.reactor.call_later(PURGE_SECONDS, self._begin)
        if error is not None:
            package_logger("etcdserver").error("cannot remove old files: %s", error)


class DiskWatch:
    """Has a leader step aside whose disk has not answered for an election timeout.

    Heartbeats do not need the disk, so nobody else would notice.  The heir must have more on its
    disk than we have on ours: where all members share one slow disk, nothing would be won.
    Thread: reactor.
    """

    def __init__(self, etcd: EtcdServer) -> None:
        self._etcd = etcd
        self._visit = 0                 # of the journal, when it was last looked at; 0: none
        self._ticks = 0                 # that it has taken

    def tick(self) -> None:
        """Look whether the same job is still under way."""
        etcd = self._etcd
        journal, raft = etcd.journal, etcd.node.raft
        visit = journal.visits if journal.busy else 0
        self._ticks = self._ticks + 1 if visit and visit == self._visit else 0
        self._visit = visit
        if self._ticks < raft.config.election_ticks or not etcd.is_leader or raft.transferee:
            return
        if etcd.handover.begin(beyond=raft.log.stable):
            package_logger("etcdserver").warning(
                "stepped aside: the disk has not answered for %d ms",
                self._ticks * etcd.config.heartbeat_ms,
            )


class GracefulStop:
    """A planned end: the lead goes to another member, and waiting requests get their answer.

    Takes one election timeout at most, then done() is called.  Thread: reactor.
    Source: Raft thesis §3.10; etcd 3 server.go, TransferLeadership (2.3 lets the others time out).
    """

    def __init__(self, etcd: EtcdServer, done: Callable[[], None]) -> None:
        self._etcd = etcd
        self._done = done
        self._deadline = etcd.reactor.now() + etcd.config.election_ms / 1000
        self._heir = etcd.handover.begin()
        self._wait()

    def _wait(self) -> None:
        etcd = self._etcd
        if etcd.stopping:
            return                      # ended by something else
        unled = etcd.lead in (0, etcd.member_id)
        waiting = unled if self._heir else etcd.lead and len(etcd.proposals)
        if waiting and etcd.reactor.now() < self._deadline:
            etcd.reactor.call_later(0.005, self._wait)
        elif self._heir and not unled:
            # Others may still send us their proposals: pass them on until they know better.
            self._heir = 0
            etcd.reactor.call_later(2 * etcd.config.heartbeat_ms / 1000, self._wait)
        else:
            self._done()
