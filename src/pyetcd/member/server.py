"""The server: Raft, disk and store of one member, brought together.

The way of a PUT, from HTTP to the log, to the disk, to the store, and back:

    PUT /v2/keys/a
      |
    KeysApi._put                    reads the form: a Request
    KeysApi._submit                 notes which HTTP request waits for the answer
    EtcdServer.do                   registers the callback, queues an Entry
      :
      :  end of the turn            all entries of the turn together
      :
    EtcdServer._propose_queued
    RawNode.propose                 one MsgProp
    Raft.step  -- follower -->      Raft._forward_prop --> the leader's RawNode.step
      | leader
    Raft._leader_prop
    Raft._append_own                gives each Entry its term and index
    RaftLog.append
      |
    RawNode.ready  ------------->   Transport.offer --> MsgApp to the followers
    Journal.add
    Journal.submit                  one batch at a time
      :
      :  thread `wal`               WalWriter._run: one write, one fdatasync; a small write on a
      :                             quick disk: WalWriter._sync_inline, in the reactor's turn
      :
    EtcdServer._durable             followers: their answers may leave
    RawNode.persisted
    Raft._maybe_commit  <--------   Raft._leader_app_resp <-- answers of the followers
      |
    EtcdServer._apply
    Applier.apply_entry
    Store.set  ----------------->   WatcherHub.notify --> watchers
      |
    Proposals.pop                   the callback that EtcdServer.do registered
    KeysApi._reply_applied
      |
    201 Created

EtcdServer.on_turn makes the steps between the dotted lines, once per turn of the reactor.
"""

from __future__ import annotations

import contextlib
import functools
import random
from typing import Any, Callable, List, Optional

from ..base.basics import _nothing
from ..base.codec import LONG_REQUEST_BYTES, encode_request
from ..base.errors import (
    NoSpace,
    ProposalDropped,
    ReconfigurationRefused,
    RequestTimeout,
    ServerStopped,
    TooManyRequests,
)
from ..base.ids import IdGenerator, package_logger
from ..base.limits import COMPACT_SLICE_ENTRIES, QUEUED_BYTES_MAX, REMOVED_SECONDS, SYNC_SECONDS
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
from ..net.reactor import Reactor
from ..net.workers import Clock, Timer
from ..peer.transport import Transport
from ..raft.core import RaftRole
from ..raft.node import RawNode, Ready
from ..raft.replication import RaftConfig
from ..store.tree import StoreState
from .applier import Applier, MemberInspector, read_change
from .cluster import FEATURE_PRE_VOTE, FEATURE_READ_INDEX, SERVER_LOG, Member
from .configuration import Bootstrap, ServerConfig
from .journal import WORK_ENTRIES_MAX, Batch, Journal, WalWriter, first_part
from .leadership import Leadership
from .snapshots import SnapshotKeeper
from .statistics import LeaderStats, Metrics, ServerCounts, ServerStats, Traffic
from .upkeep import (
    LEADER_WAIT_SECONDS,
    ExpirySync,
    Publication,
    VersionMonitor,
    purge_periodically,
    report_leader_wait,
)
from .waiting import Done, LateProposals, Proposals, QuorumReads


class EtcdServer:
    """One member: its Raft node, its journal on disk, and the store that entries change.

    do() and change_member() are the ways in.  Every answer comes through the callback given,
    after the change is durable on a quorum and applied here.  Knows no HTTP.  Thread: reactor.

    failed     called when the disk has failed: what is durable is unknown from then on
    removed    called a while after the removal of this member is applied
    published  called when the cluster knows this member's name and client URLs
    transport_type, wal_writer_type, rng  seams of the simulator
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
        self.node: RawNode = self._make_node(boot, rng or random.Random())
        self.transport: Transport = (transport_type or Transport)(
            reactor, member_id=boot.member_id, cluster_id=boot.cluster.id,
            peer_urls=config.initial_advertise_peer_urls, is_removed=boot.cluster.is_removed,
            deliver=self._deliver, removed=removed, round_trip=traffic.round_trip,
            unreachable=self.node.report_unreachable, snapshot_done=self.node.report_snapshot,
            election_s=config.election_ms / 1000, sent=traffic.sent, received=traffic.received,
            tls=boot.peer_tls, identity=self.cluster.identity,
            inspector=MemberInspector(self.cluster, self.node.protocol_violation),
        )
        self.versions = VersionMonitor(reactor, self.cluster, self.do, boot.peer_tls)
        self.publication = Publication(config, self.cluster, reactor, self.do, published)
        self._leadership = Leadership(
            self.node, self.journal, reactor, config, self.transport.active_since
        )
        self._data_dir = boot.data_dir
        self._removed = removed
        self._queue: List[Entry] = []           # proposals of this turn, or without a leader
        self._queued_bytes = 0                  # of their data
        self._changes: List[ConfChange] = []    # proposed changes of members, likewise
        self._late_proposals = LateProposals(2 * config.election_ms / 1000)
        self._timers: List[Timer] = []
        for member in boot.remotes:
            self.transport.add_remote(member.id, member.peer_urls)
        self._connect_others()

    def _make_node(self, boot: Bootstrap, rng: random.Random) -> RawNode:
        config = RaftConfig(
            id=boot.member_id, rng=rng, trace=package_logger("raft").info, defer_commit=True,
            election_ticks=max(self.config.election_ms // self.config.heartbeat_ms, 1),
        )
        if boot.bootstrap_entries:
            node = RawNode.bootstrap(config, boot.bootstrap_entries)
        else:
            node = RawNode(
                config, hard_state=boot.contents.hard_state, snapshot=boot.snapshot,
                entries=boot.contents.entries, applied=self.raft_index,
            )
        node.raft.replication.snapshot_source = functools.partial(
            self.snapshots.newest, is_v3=self.cluster.identity.bears("3.0.0"))
        return node

    # -- life --------------------------------------------------------------

    def start(self) -> None:
        """Begin to take part.  The reactor must call on_turn() from now on."""
        config, reactor = self.config, self.reactor
        reactor.on_turned = self.counts.turn_durations.observe
        self.journal.writer.start()
        if len(self.node.raft.voters) > 1:
            self.node.advance_ticks(self.node.raft.config.election_ticks - 1)
        expiry = ExpirySync(
            self.store, reactor.wall_ns, self.do, lambda: self.is_leader and not self.no_space
        )
        self._timers = [
            reactor.every(config.heartbeat_ms / 1000, self._tick),
            reactor.every(SYNC_SECONDS, expiry.tick),
            reactor.every(LEADER_WAIT_SECONDS, lambda: report_leader_wait(
                self.cluster, self.transport.problem, self._leadership.unled_s())),
        ]
        purge_periodically(reactor, self.snapshots.snapshotter.disk, (
            (self._data_dir.snap, ".snap", config.max_snapshots),
            (self._data_dir.wal, ".wal", config.max_wals),
        ))
        self.publication.propose()

    def leave(self, done: Callable[[], None]) -> None:
        """Prepare a planned stop: done() when another member leads, and no request waits here."""
        self._leadership.leave(self.proposals, done)

    def stop(self) -> None:
        """Reject waiting requests, write the last batch, close the log.  Blocks for one sync."""
        self.stopping = True
        self.proposals.fail_all(ServerStopped())
        if self.node.has_ready():
            self.journal.add(self.node.ready())
        self.journal.close()
        self.abandon()

    def abandon(self) -> None:
        """Free everything and send nothing more, as a crash would; harmless after stop()."""
        self.stopping = True
        for timer in self._timers:
            timer.cancel()
        with contextlib.ExitStack() as each:
            for free in (self.journal.writer.stop, self.transport.stop, self.versions.stop):
                each.callback(free)

    def _disk_full(self, why: str) -> None:
        """The log cannot grow (`why`), or can again (""): reads go on, nothing is lost."""
        self.no_space = why
        if not why:
            SERVER_LOG.warning("the log can be written again")
            return
        SERVER_LOG.error("%s; writes are refused until there is space again", why)
        cause = f"etcdserver: {why}; the change may still be made when there is space again"
        self.proposals.fail_all(RequestTimeout(cause))

    # -- ways in -----------------------------------------------------------

    @property
    def lead(self) -> int:
        """The known leader's id, 0 if none."""
        return self.node.raft.lead

    @property
    def is_leader(self) -> bool:
        return self.node.raft.role == RaftRole.LEADER

    @property
    def is_healthy(self) -> bool:
        """True if the disk has space, and this member leads a quorum or knows a leader."""
        if self.no_space:
            return False
        return self._leadership.has_links() if self.is_leader else self.lead != 0

    def do(self, request: Request, done: Done, encoded: bytes = b"") -> None:
        """Send a command through consensus; done(Event, or EtcdError) when it is applied here.

        The command may still be applied after a RequestTimeout.

        encoded  encode_request(request), if known; then the request has an id
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
        elif not encoded and request.method == "QGET" and self.reads.enabled:
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
                self.cluster.check_active(change_type, member.id, self.transport.active_since)
            except ReconfigurationRefused as error:
                done(error)
                return
        is_removal = change_type == ConfChangeType.REMOVE_NODE
        context = None if is_removal else utf8(member.context_json())
        change = ConfChange(self.ids.next(), change_type, member.id, context)
        if self.proposals.add(change.id, done, self.reactor.now()):
            self._changes.append(change)
        else:
            done(TooManyRequests("etcdserver: too many requests"))

    def _deliver(self, message: Message) -> None:
        """Step a peer's message into Raft; proposals without a leader wait for the next one.

        Differs from etcd, which drops them: the peer's client then waits for its timeout.  While
        the disk is full, entries are dropped, as they would fill the memory.
        """
        if self.no_space and message.type == MsgType.APP and message.entries:
            return
        if message.type == MsgType.PROP:
            self._leadership.transfer_before_entries(message.entries)
        try:
            self.node.step(message)
        except ProposalDropped:
            self._late_proposals.add(message.entries, self.reactor.now())

    # -- clock -------------------------------------------------------------

    def _tick(self) -> None:
        """One tick of Raft, however late: ticks missed in a stall are dropped, not replayed."""
        now = self.reactor.now()
        self.node.raft.pre_vote = self.cluster.all_have(FEATURE_PRE_VOTE)
        self.reads.enabled = self.cluster.all_have(FEATURE_READ_INDEX)
        self.reads.tick(self.proposals)
        self._late_proposals.expire(now)
        self.counts.tick(now, self.is_leader * (len(self.node.raft.voters) - 1))
        self.node.tick()
        self._leadership.watch_disk()
        self._expire_proposals()

    def _expire_proposals(self) -> None:
        explain = self._leadership.explain_timeout
        if self.proposals.expire(self.reactor.now(), explain) >= WORK_ENTRIES_MAX:
            self.reactor.call_soon(self._expire_proposals)

    # -- one turn ----------------------------------------------------------

    def on_turn(self) -> None:
        """Propose, send, write, apply: once per turn of the reactor."""
        if self.stopping:
            return
        node, log, hub, refused = self.node, self.node.raft.log, self.store.hub, False
        if self._late_proposals and self.lead and not node.raft.transferee:
            with contextlib.suppress(ProposalDropped):  # as if the network had lost them
                node.propose(*self._late_proposals.take(self.reactor.now()))
        if self.reads:
            self._serve_reads()
        if self._queue or self._changes:
            refused = not self._propose_queued()
        if node.has_ready():
            self._take(node.ready())
        self.journal.submit()
        self.store.begin_turn()
        if log.applied < log.commit:
            self.counts.time_apply(self._apply, self.reactor.now)
        if self.reads:
            self._serve_reads()
        self.snapshots.work(self._compact, self._maybe_snapshot)
        self._leadership.schedule_commit_broadcast()
        waiting = hub.backlog or not refused and (self._queue or self._changes)
        if waiting or self.store.has_garbage or self.journal.is_encoding or node.has_ready():
            self.reactor.call_soon(_nothing)    # turn again at once: there is more to do

    def _propose_queued(self) -> bool:
        """Propose the queued entries; False if they have to wait for a leader.

        Differs from etcd: proposals also wait while no link to the leader is up.  A message to a
        dead leader is lost, and its client would wait for the whole timeout.
        """
        if self.lead and not self.is_leader and not self.transport.active_since(self.lead):
            return False
        queue, self._queue, self._queued_bytes = self._queue, [], 0
        self._leadership.transfer_before_removal(self._changes)
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

    def _repeat(self, change: ConfChange) -> None:
        """Propose a change again that was lost, or that met another pending one at the leader."""
        if change.id in self.proposals:     # a change that is applied already has no effect
            self._changes.append(change)

    def _serve_reads(self) -> None:
        for request in self.reads.take(self.node, self.raft_index):
            done = self.proposals.pop(request.id)
            if done is not None:
                done(self.applier.apply_request(request))

    def _take(self, ready: Ready) -> None:
        """Send the messages that may leave at once, and give the rest to the journal."""
        if self._leadership.observe():
            if self.lead:
                self.counts.leader_changes += 1
                self.stats.became(self.lead)
            if self.lead != self.member_id:
                self.versions.stop()
        if ready.messages:
            self.transport.offer(ready.messages)
        self.journal.add(ready)

    def _durable(self, batch: Batch) -> None:
        """A batch is on disk: count its entries, become its snapshot, send what it held back."""
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
        log, store, prepare = self.node.raft.log, self.store, self.applier.prepare
        for entry in entries:
            is_long = len(entry.data) > LONG_REQUEST_BYTES
            if not store.accepts_changes or is_long and not entry.type and not prepare(entry):
                break
            if not entry.type:
                self._apply_normal(entry)
                continue
            log.applied_to(self.raft_index)
            if not self._apply_conf_change(entry):
                return
        log.applied_to(self.raft_index)
        if log.applied < log.commit:
            self.reactor.call_soon(_nothing)    # more work than for one turn: turn again at once
        self._maybe_campaign_alone()
        self._maybe_snapshot()

    def _apply_normal(self, entry: Entry) -> None:
        """Apply a command and answer it; _apply() tells the log.  A hot path."""
        result = self.applier.apply_entry(entry)
        self.raft_index, self.raft_term = entry.index, entry.term
        request = entry.request
        if request is None:
            if not entry.data and self.is_leader:
                self.versions.start()           # the first entry of our term is committed
            return
        entry.request = None                    # the log keeps the bytes only
        done = self.proposals.pop(request.id)
        if done is not None:
            done(result)

    def _apply_conf_change(self, entry: Entry) -> bool:
        """Apply a membership change; False if its commit must first be on disk.

        After a crash, a member could otherwise know fewer voters than it had counted, and commit
        alone an entry that the others never saw.
        """
        if self.journal.durable_commit < entry.index:
            raft = self.node.raft
            self.journal.sync_commit(HardState(raft.term, raft.vote, raft.log.commit))
            if self.journal.durable_commit < entry.index:
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
        elif member is not None and change.node_id != self.member_id:
            self.transport.add_peer(member.id, member.peer_urls)

    def _connect_others(self) -> None:
        for member in self.cluster.members.values():
            if member.id != self.member_id:
                self.transport.add_peer(member.id, member.peer_urls)

    def _maybe_campaign_alone(self) -> None:
        """Campaign at once in a cluster of one, where no other member can lead.

        Not before all committed entries are applied: until then the voters are of an earlier time.
        """
        raft = self.node.raft
        if raft.lead or raft.voters != (self.member_id,) or raft.role != RaftRole.FOLLOWER:
            return
        if raft.log.applied >= raft.log.commit:
            self.node.campaign()

    # -- snapshots ---------------------------------------------------------

    def _maybe_snapshot(self) -> None:
        if self.cluster.was_lowered:
            self.cluster.was_lowered, self.snapshots.least_index = False, self.raft_index
        count = self.config.snapshot_count
        is_due = self.snapshots.is_due(self.raft_index, len(self.store), count)
        if self.store.is_expiring or self.snapshots.busy:
            return
        if is_due or self.snapshots.is_requested:
            applied = EntryID(self.raft_term, self.raft_index)
            self.snapshots.begin(self.store, applied, self.node.raft.voters, lent=not is_due)

    def _compact(self, index: int) -> bool:
        log = self.node.raft.log
        self.node.compact(min(index, log.offset + COMPACT_SLICE_ENTRIES))
        if log.offset == index:
            SERVER_LOG.info("compacted raft log at %d", index)
        return log.offset >= index

    def _recover(self, snapshot: Snapshot) -> None:
        """A snapshot of the leader is durable here: the store becomes its state."""
        self.snapshots.received(snapshot.index)
        self.store.install(snapshot.state or StoreState.read(snapshot.data))
        self.cluster.recover()
        self.applier.auth_changes += 1
        SERVER_LOG.info("recovered from incoming snapshot at index %d", snapshot.index)
        self.transport.remove_all()
        self._connect_others()
        self.raft_index, self.raft_term = snapshot.index, snapshot.term
        self.node.applied_to(snapshot.index)
        self.publication.propose()      # the snapshot may hold the first one, without an answer
