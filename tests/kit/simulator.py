"""Simulation: real server code under virtual time, network and disk."""

from __future__ import annotations

import collections
import copy
import errno
import functools
import heapq
import itertools
import math
import random
import re
import types

import pyetcd
from pyetcd import EntryType, MsgType
from tests.kit.histories import Operation, find_violation

SIM_EPOCH_NS = 1_700_000_000 * 10**9
SIM_ERRORS = (pyetcd.WalError, pyetcd.SnapshotError, pyetcd.CodecError)     # of a damaged disk


class _SimPowerLoss(BaseException):
    """Raised inside a disk operation: the member is gone at once."""


class _SimFile:
    """Bytes written, and how many of them survive a power loss."""

    def __init__(self):
        self.data = bytearray()
        self.synced = b""
        self.flips = []                 # (offset, bit) that went bad on the disk


class SimDisk:
    """An in-memory disk: written is not synced, created is not yet in the directory.

    Stands for pyetcd.OsDisk.  crash() keeps what was synced, and by chance a part of the rest.
    """

    read_only = False

    def __init__(self, rng):
        self.rng = rng
        self.live = {}
        self.durable = {}
        self.handles = {}
        self.locked = set()
        self.next_handle = 3
        self.crash_after = None         # operations until the power fails
        self.operations = 0
        self.tear = None                # (unsynced tail, offset) -> what of it survives
        self.keeps_names = None         # whether a name that is not durable survives; None: chance
        self.is_full = False
        self.slowness = 1.0             # factor on the time of every job

    def crash(self):
        """Forget what was never synced; an unsynced tail survives in part, by chance."""
        names = dict(self.durable)
        for path, file in self.live.items():
            kept = self.rng.random() < 0.3 if self.keeps_names is None else self.keeps_names
            if path not in names and kept:
                names[path] = file      # the directory reached the disk by itself
        self.live = names
        self.durable = dict(names)
        for file in names.values():
            kept, tail = file.synced, bytes(file.data[len(file.synced):])
            if tail and bytes(file.data[:len(kept)]) == kept:
                kept += (self.tear or self._torn)(tail, len(kept))
            file.data = bytearray(kept)
            file.synced = kept
        self.handles = {}
        self.locked = set()
        self.crash_after = None

    def fork(self):
        """Return a disk of the same content, which can crash and be used apart from this one."""
        disk = SimDisk(self.rng)
        files = {id(f): copy.copy(f) for f in (*self.live.values(), *self.durable.values())}
        disk.live, disk.durable = ({path: files[id(file)] for path, file in names.items()}
                                   for names in (self.live, self.durable))
        return disk             # crash() gives the files bytes of their own

    def _torn(self, tail, offset):
        chance = self.rng.random()
        cut = self.rng.randrange(len(tail) + 1)
        if chance < 0.5:
            return b""
        if chance < 0.9:
            return tail[:cut]
        cut = min(cut + -(offset + cut) % 512, len(tail))
        return tail[:cut] + bytes(len(tail) - cut)      # its size was written, the last sectors not

    def flip(self):
        """Damage one bit of one file; return whether there was any."""
        files = [(path, file) for path, file in sorted(self.live.items()) if file.data]
        snapshots = [(path, file) for path, file in files if path.endswith(".snap")]
        if files:
            chosen = snapshots if snapshots and self.rng.random() < 0.5 else files
            file = self.rng.choice(chosen)[1]
            flip = (self.rng.randrange(len(file.data)), self.rng.randrange(8))
            file.flips.append(flip)
            self._turn(file, flip)
        return bool(files)

    def flip_value(self):
        """Damage the number of a value in the newest snapshot."""
        file = self.live[max(path for path in self.live if path.endswith(".snap"))]
        values = list(re.finditer(rb'"v\d*(?=\d")', file.data))
        offset = self.rng.choice(values).end()
        file.flips.append((offset, 0))
        self._turn(file, (offset, 0))

    @staticmethod
    def _turn(file, flip):
        offset, bit = flip
        if offset < len(file.data):
            file.data[offset] ^= 1 << bit
        file.synced = bytes(file.data)

    def copy(self):
        """Return what is on the disk now, for put_back()."""
        return {path: (f, bytes(f.data), list(f.flips)) for path, f in self.live.items()}

    def put_back(self, copied, *, mended=False):
        """Bring back what copy() returned; mended: without the damage, as from a good copy."""
        self.live = {}
        for path, (file, data, flips) in copied.items():
            file.data, file.flips = bytearray(data), [] if mended else flips
            for flip in flips if mended else ():
                self._turn(file, flip)
            file.synced = bytes(file.data)
            self.live[path] = file
        self.durable = dict(self.live)
        self.handles, self.locked = {}, set()

    def _operation(self):
        self.operations += 1
        if self.crash_after is not None:
            self.crash_after -= 1
            if self.crash_after <= 0:
                raise _SimPowerLoss()

    def _need_space(self, path):
        if self.is_full:
            raise OSError(errno.ENOSPC, "No space left on device", path)

    def _open(self, path, file):
        handle, self.next_handle = self.next_handle, self.next_handle + 1
        self.handles[handle] = (path, file)
        return handle

    def makedirs(self, path):
        pass

    def listdir(self, path):
        prefix = path.rstrip("/") + "/"
        return sorted(name[len(prefix):] for name in self.live if name.startswith(prefix))

    def read(self, path):
        if path not in self.live:
            raise FileNotFoundError(2, "No such file", path)
        return bytes(self.live[path].data)

    def create(self, path, mode=0o600):
        self._operation()
        self._need_space(path)
        self.live[path] = _SimFile()
        return self._open(path, self.live[path])

    def open_append(self, path):
        return self._open(path, self.live[path])

    def write(self, handle, *pieces):
        data = b"".join(pieces)
        path, file = self.handles[handle]
        if len(data) > 1 and (self.crash_after == 1 or self.is_full):
            file.data += data[:self.rng.randrange(len(data))]
        self._operation()
        self._need_space(path)
        file.data += data

    def fdatasync(self, handle):
        self._operation()
        file = self.handles[handle][1]
        file.synced = bytes(file.data)

    fsync = fdatasync

    def read_open(self, handle):
        return bytes(self.handles[handle][1].data)

    def truncate(self, handle, size):
        self._operation()
        file = self.handles[handle][1]
        del file.data[size:]
        file.synced = bytes(file.data)

    def rename(self, old, new):
        self._operation()
        self.live[new] = self.live.pop(old)

    def unlink(self, path):
        self._operation()
        del self.live[path]

    def fsync_dir(self, path):
        self._operation()
        prefix = path.rstrip("/") + "/"
        for name in [n for n in self.durable if n.startswith(prefix)]:
            del self.durable[name]
        self.durable.update((n, f) for n, f in self.live.items() if n.startswith(prefix))

    def lock(self, path, handle):
        self.locked.add(path)
        return True

    def unlock(self, path):
        self.locked.discard(path)

    def is_locked(self, path):
        return path in self.locked

    def close(self, handle):
        self.handles.pop(handle, None)


class _SimReactor:
    """Virtual time for one life of one member."""

    def __init__(self, sim, member):
        self.sim = sim
        self.member = member
        self.life = member.life

    @property
    def is_current(self):
        return self.member.up and self.member.life == self.life

    def now(self):
        return self.sim.now

    def wall_ns(self):
        return SIM_EPOCH_NS + int((self.sim.now + self.member.skew_s) * 1e9)

    def call_later(self, delay_s, callback, *args):
        timer = pyetcd.Timer(callback, args)
        self.sim.at(delay_s * self.member.drift, self._fire, timer, life=self)
        return timer

    def every(self, period_s, callback):
        def call():
            self.sim.at(period_s * self.member.drift, self._fire, timer, life=self)
            callback()
        timer = self.call_later(period_s, call)
        return timer

    def _fire(self, timer):
        if timer.callback is not None:
            timer.callback(*timer.args)

    def call_soon(self, callback, *args):
        self.call_later(0.0, callback, *args)

    call_soon_threadsafe = call_soon

    def run_blocking(self, work, *args, kind, done):
        def run():
            error = result = None
            try:
                result = work(*args)
            except (OSError, pyetcd.SnapshotError, pyetcd.WalError) as failure:
                error = failure
            done(error, result)
        self.call_later(self.sim.rng.expovariate(1 / 0.01) * self.member.disk.slowness, run)


class _SimWalWriter(pyetcd.WalWriter):
    """The wal thread: a step of a job is done some virtual milliseconds later."""

    def __init__(self, wal, snapshotter, reactor, *, failed, full):
        super().__init__(wal, snapshotter, reactor, failed=failed, full=full)
        self.waiting = []               # jobs; of the first, the steps that are left
        self.steps = []

    def start(self):
        pass

    def stop(self):
        pass

    def submit(self, job):
        self.waiting.append(job)
        if len(self.waiting) == 1:
            self._begin()

    def _begin(self):
        self.steps = self._steps(self.waiting[0])
        self._later()

    def _later(self):
        self._reactor.call_later(self._delay_s(), self._work)

    def _delay_s(self):
        sim = self._reactor.sim
        slow = 0.2 if sim.rng.random() < 0.02 else 0.002
        return min(sim.rng.expovariate(1 / slow) * self._reactor.member.disk.slowness, 20.0)

    def _work(self):
        while self.steps:
            if not self._try(self.steps[0]):
                self._later()           # the disk is full: again
                return
            self.steps.pop(0)
        self.waiting.pop(0).done()
        if self.waiting:
            self._begin()


class _SimTransport:
    """Peers reached through the simulated network; every message is encoded and decoded."""

    def __init__(self, reactor, *, member_id, deliver, unreachable, snapshot_done, removed,
                 is_removed, **_):
        self.reactor, self.id = reactor, member_id
        self.deliver, self.unreachable = deliver, unreachable
        self.snapshot_done, self.removed, self.is_removed = snapshot_done, removed, is_removed
        self.peers = set()
        self.stopped = False

    def offer(self, messages):
        for message in messages:
            if message.to in self.peers and not self.stopped:
                self.reactor.sim.send(self.reactor.member, message)

    def add_peer(self, member_id, urls):
        self.peers.add(member_id)

    add_remote = add_peer

    def remove_peer(self, member_id):
        self.peers.discard(member_id)

    def remove_all(self):
        self.peers.clear()

    def problem(self, member_id):
        return "http://simulated: unreachable" * (not self.active_since(member_id))

    def active_since(self, member_id):
        return 1.0

    def stop(self):
        self.stopped = True


class SimMember:
    """One member: what its disk holds outlives its lives."""

    def __init__(self, sim, name, *, joins=None):
        self.sim, self.name = sim, name
        self.peer_url = f"http://{name}:2380"
        self.joins = joins              # a Cluster that it was added to; None: formed with others
        token = "sim" if joins is None else str(int(sim.now))
        self.id = pyetcd.member_id([self.peer_url], token)
        self.disk = SimDisk(sim.rng)
        self.life = 0
        self.etcd = None
        self.is_gone = False            # removed from the cluster: never starts again
        self.frozen_until = 0.0
        self.skew_s = sim.rng.uniform(-5, 5)
        self.drift = sim.rng.uniform(0.9, 1.1)
        self.said_term = 0              # highest term of a promise that left this member
        self.said_votes = {}            # term -> who got our vote
        self.seen_term = (0, 0)         # term and vote in this life
        self.seen_commit = self.seen_applied = 0
        self.seen_log = None            # (last id, generation) when its log was looked at
        self.last_event = 0             # index of the last event that its watcher was told
        self.events = {}                # index -> event, as told
        self.unwatched = 0              # events up to here may be missing: the history was cut

    @property
    def up(self):
        return self.etcd is not None

    def start(self):
        """Boot from the disk; a disk that is refused as damaged is mended and booted again."""
        copied = self.disk.copy()
        try:
            boot = self._boot()
        except (OSError, pyetcd.DiskFull) as error:
            assert self.disk.is_full, f"{self.name}: {error!r}"
            self.disk.put_back(copied)  # it ends with a message; its operator makes space
            return
        except SIM_ERRORS as error:
            assert any(flips for _, _, flips in copied.values()), f"{self.name}: {error}"
            self.sim.note(self, f"refused: {error}")
            self.sim.refused += 1
            self.disk.put_back(copied, mended=True)
            self.start()
            return
        self.life += 1
        self.seen_commit = self.seen_applied = 0
        self.seen_term, self.seen_log = (0, 0), None
        reactor = _SimReactor(self.sim, self)
        config = pyetcd.ServerConfig(
            name=self.name, data_dir="/disk", snapshot_count=self.sim.snapshot_count,
            initial_advertise_peer_urls=(self.peer_url,),
            advertise_client_urls=("http://127.0.0.1:1",),
        )
        self.etcd = pyetcd.EtcdServer(
            config, boot, reactor, failed=self._fail, removed=self.leave,
            published=lambda: None, transport_type=_SimTransport,
            wal_writer_type=_SimWalWriter, rng=self.sim.rng,
        )
        self.etcd.versions = types.SimpleNamespace(start=lambda: None, stop=lambda: None)
        self.etcd.applier.clock = reactor.wall_ns
        replication = self.etcd.node.raft.replication
        replication._config = replication._config._replace(
            max_entries_bytes=self.sim.message_bytes)
        self.etcd.start()
        self._watch()

    def _boot(self):
        """As pyetcd.bootstrap does it, without flags and network."""
        directory = pyetcd.DataDir(
            "/disk", "/disk/member", "/disk/member/wal", "/disk/member/snap")
        store = pyetcd.Store(history_capacity=self.sim.history)
        snapshotter = pyetcd.Snapshotter(directory.snap, disk=self.disk)
        options = {"disk": self.disk, "segment_bytes": self.sim.segment_bytes}
        formed = pyetcd.Cluster.from_initial("sim", self.sim.initial_map())
        cluster = formed if self.joins is None else pyetcd.Cluster()
        if self.joins is not None:
            cluster.id = formed.id
        cluster.store = store
        metadata, snapshot, remotes = pyetcd.encode_metadata(self.id, cluster.id), None, ()
        if not pyetcd.Wal.exists(directory.wal, disk=self.disk):
            wal = pyetcd.Wal.create(directory.wal, metadata, **options)
            contents = pyetcd.WalContents(metadata, pyetcd.HardState(), [], [])
            if self.joins is not None:
                cluster.members = dict(self.joins.members)
                remotes = [m for m in cluster.members.values() if m.id != self.id]
        else:
            snapshot = snapshotter.load(set(pyetcd.Wal.snapshots(directory.wal, disk=self.disk)))
            start = pyetcd.EntryID(0, 0)
            if snapshot is not None:
                start = pyetcd.EntryID(snapshot.term, snapshot.index)
                pyetcd._recover(store, snapshot)
            wal, contents = pyetcd.Wal.open(directory.wal, start, **options)
            is_blank = not contents.entries and contents.hard_state == pyetcd.HardState()
            if snapshot is not None or not is_blank:
                cluster.members = {}
            if snapshot is not None:
                cluster.recover()
        boot = pyetcd.Bootstrap(
            directory, self.id, cluster, store, wal, snapshotter, contents, snapshot,
            remotes=remotes)
        if self.joins is None and pyetcd._is_blank(boot):
            boot = boot._replace(bootstrap_entries=pyetcd._bootstrap_entries(formed))
        return boot

    def _watch(self):
        store = self.etcd.store
        try:
            store.watch("/1", recursive=True, stream=True, since=self.last_event + 1,
                        deliver=self._told, lost=self._lost)
        except pyetcd.EventIndexCleared:
            self._lost()

    def _lost(self):
        self.unwatched = self.last_event = self.etcd.store.current_index
        self._watch()

    def _told(self, event):
        assert event.index > self.last_event, f"{self.name}: told {event.index} out of order"
        self.last_event = event.index
        self.events[event.index] = (event.action, event.key, event.node.value)

    def _fail(self, error):
        raise AssertionError(f"{self.name} failed: {error!r}")

    def promise(self, message):
        """Note what this member has bound itself to; no crash may undo it."""
        if message.type in (pyetcd.MsgType.VOTE, pyetcd.MsgType.VOTE_RESP,
                            pyetcd.MsgType.APP_RESP):
            self.said_term = max(self.said_term, message.term)
        candidate = None
        if message.type == pyetcd.MsgType.VOTE:
            candidate = self.id
        elif message.type == pyetcd.MsgType.VOTE_RESP and not message.reject:
            candidate = message.to
        if candidate is not None:
            known = self.said_votes.setdefault(message.term, candidate)
            assert known == candidate, f"{self.name} voted twice in term {message.term}"

    def crash(self):
        """Power loss: memory is gone, and what the disk had not synced."""
        if self.etcd is not None:
            self.etcd.transport.stop()
            self.etcd = None
            self.life += 1
            self.disk.crash()

    def leave(self):
        """The member was removed from the cluster: its process ends, for ever."""
        self.is_gone = True
        self.crash()


class _Invariants:
    """What Raft and the store promise, checked after every event (Raft thesis fig. 3.2)."""

    def __init__(self):
        self.committed = {}             # raft index -> (term, data): what can never change
        self.commit_terms = {}          # raft index -> term in which somebody knew it committed
        self.entries = {}               # (index, term) -> (data, term of the entry before)
        self.leaders = {}               # term -> name
        self.states = {}                # raft index -> (store index, digest or None)
        self.events = {}                # store index -> what every watcher is told

    def check(self, member):
        """Check the member to which something has just happened."""
        raft = member.etcd.node.raft
        log = raft.log
        self._check_term(member, raft)
        if raft.role == pyetcd.RaftRole.LEADER and self.leaders.get(raft.term) != member.name:
            self._check_new_leader(member, raft)
        seen_log = (log.last_id, log.generation, log.offset)
        if seen_log != member.seen_log:
            member.seen_log = seen_log
            self._check_log(member, log)
        assert log.commit >= member.seen_commit, f"{member.name}: commit went back"
        assert log.applied >= member.seen_applied, f"{member.name}: applied went back"
        assert log.applied <= log.commit <= log.last_index
        if log.commit > member.seen_commit:
            first = max(member.seen_commit, log.offset) + 1
            for entry in log.slice(first, log.commit + 1) if log.commit >= first else ():
                known = self.committed.setdefault(entry.index, (entry.term, entry.data))
                assert known == (entry.term, entry.data), f"committed entry {entry.index} changed"
                self.commit_terms.setdefault(entry.index, raft.term)
        if log.applied > member.seen_applied or member.etcd.raft_index > member.seen_applied:
            self._check_state(member)
        member.seen_commit, member.seen_applied = log.commit, log.applied

    def _check_term(self, member, raft):
        """Term and vote never go back, not even by a crash."""
        term, vote = member.seen_term
        if (raft.term, raft.vote) == (term, vote):
            return
        assert raft.term >= max(term, member.said_term), f"{member.name}: term went back"
        if raft.term == term and vote:
            assert raft.vote == vote, f"{member.name}: voted twice in term {term}"
        said = member.said_votes.get(raft.term)
        assert said in (None, raft.vote), f"{member.name}: forgot its vote in term {raft.term}"
        member.seen_term = (raft.term, raft.vote)

    def _check_new_leader(self, member, raft):
        """One leader per term (election safety), who holds all that is committed (completeness)."""
        known = self.leaders.setdefault(raft.term, member.name)
        assert known == member.name, f"two leaders in term {raft.term}"
        log = raft.log
        for index, committed_in in self.commit_terms.items():
            if committed_in < raft.term and index > log.offset:
                term = self.committed[index][0]
                assert log.term(index) == term, f"leader {member.name} lacks entry {index}"

    def _check_log(self, member, log):
        """Same index and term: same entry, and the same before it (log matching)."""
        first = max(min(member.seen_commit, log.commit), log.offset) + 1
        before = log.term(first - 1)
        for entry in log.slice(first, log.last_index + 1) if log.last_index >= first else ():
            known = self.entries.setdefault((entry.index, entry.term), (entry.data, before))
            assert known == (entry.data, before), f"{member.name}: entry {entry.index} differs"
            before = entry.term

    def _check_state(self, member):
        """State machines that have applied the same entries are equal, expired keys included."""
        store, index = member.etcd.store, member.etcd.raft_index
        digest = tuple(sorted(_sim_files(store).items())) if index % 16 == 0 else None
        known = self.states.setdefault(index, (store.current_index, digest))
        assert known == (store.current_index, digest), f"{member.name} differs at {index}"
        recent = store.hub.history.events
        for event in itertools.islice(reversed(recent), 4):
            if event.key.startswith("/1/"):
                seen = (event.action, event.key, event.node.value)
                assert self.events.setdefault(event.index, seen) == seen, f"event {event.index}"

    def check_events(self, member):
        """Watchers see each event once (their order is checked when they are told)."""
        for index, event in self.events.items():
            if member.unwatched < index <= member.etcd.store.current_index:
                assert member.events.get(index) == event, f"{member.name} missed event {index}"


class Sim:
    """A cluster in virtual time: one event heap, one rng, invariants after every event.

    catchup   entries that a leader keeps behind a snapshot
    history   events that a member keeps
    message_bytes  of entries in one message; 1: each travels alone
    features  what members publish; (): they behave as members of etcd 2.3 do
    """

    def __init__(self, *, nodes=3, seed, snapshot_count=40, segment_bytes=4096, catchup=5000,
                 history=1000, message_bytes=1 << 20, features=pyetcd.FEATURES):
        self.seed = seed
        self.rng = random.Random(seed)
        self.now = 0.0
        self.snapshot_count, self.segment_bytes = snapshot_count, segment_bytes
        self.history, self.message_bytes = history, message_bytes
        self.patches = {"SNAPSHOT_CATCHUP_ENTRIES": catchup, "FEATURES": features}
        self.heap = []
        self.sequence = self.steps = 0
        self.trace = collections.deque(maxlen=50)
        self.drop = 0.0
        self.short_reigns = 0           # leaders that will crash soon after their election
        self.cut = set()                # ordered pairs of names between which nothing passes
        self.clogged = {}               # ordered pair of names -> when it lets through again
        self.invariants = _Invariants()
        self.acknowledged = {}          # request id -> (key, value)
        self.histories = {}             # register -> what clients did to it: section Histories
        self.waiting = {}               # register -> lives of members that owe an answer
        self.last_seen = {}             # register -> value that somebody saw last
        self.members = []               # all that ever were
        self.members += [SimMember(self, f"m{i}") for i in range(nodes)]
        self.initial = tuple(self.members)
        self.by_id = {member.id: member for member in self.members}
        self.writes = self.reads = 0    # asked for; quorum reads that were answered
        self.refused = 0                # starts that were refused because of a damaged disk
        self.acknowledged_index = 0     # highest store index of an acknowledged write

    def initial_map(self):
        return {member.name: (member.peer_url,) for member in self.initial}

    def __enter__(self):
        self.unpatched = {name: getattr(pyetcd, name) for name in self.patches}
        for name, value in self.patches.items():
            setattr(pyetcd, name, value)
        for member in self.members:
            self.start(member)
        return self

    def __exit__(self, kind, error, traceback):
        for name, value in self.unpatched.items():
            setattr(pyetcd, name, value)
        if kind is not None and issubclass(kind, Exception):
            print(f"simulation failed: seed={self.seed} time={self.now:.4f}")
            for when, name, *what in self.trace:
                print(f"    {when:.4f} {name}", *what)

    def note(self, member, *what):
        self.trace.append((self.now, member.name, *what))

    # -- events ---------------------------------------------------------------

    def at(self, delay_s, callback, *args, life=None):
        self.sequence += 1
        heapq.heappush(self.heap, (self.now + delay_s, self.sequence, life, callback, args))

    def step(self):
        """Run one event, then the member's turn, then the checks."""
        self.steps += 1
        assert self.steps < 1_000_000, f"seed {self.seed}: it turns without end"
        self.now, _, life, callback, args = heapq.heappop(self.heap)
        if life is None:
            callback(*args)
            return
        member = life.member
        if not life.is_current:
            return
        if member.frozen_until > self.now:
            self.at(member.frozen_until - self.now, callback, *args, life=life)
            return
        self.trace.append((self.now, member.name, callback.__name__))
        self._act(member, callback, *args)

    def _act(self, member, callback, *args):
        self._guard(member, self._turn, member, callback, args)
        if member.up:
            elected = len(self.invariants.leaders)
            self.invariants.check(member)
            if self.short_reigns and len(self.invariants.leaders) > elected:
                self.short_reigns -= 1
                self._shorten_reign(member)

    def _shorten_reign(self, leader):
        """Crash a new leader soon, every other one before anybody has heard of its first entry."""
        if self.short_reigns % 2:
            self.lose_in_flight(leader)
            self.isolate(leader)
        self.at(self.rng.uniform(0, 0.04), self._end_reign, leader)
        self.at(self.rng.uniform(0.5, 5.0), self.start, leader)

    def _end_reign(self, leader):
        self.lose_in_flight(leader)
        self.cut = {link for link in self.cut if leader.name not in link}
        leader.crash()

    def _turn(self, member, callback, args):
        callback(*args)
        if member.up:
            member.etcd.on_turn()

    def _guard(self, member, work, *args):
        try:
            work(*args)
        except _SimPowerLoss:
            self.note(member, "POWER LOSS")
            member.crash()

    def start(self, member):
        """Start a member that is down, if it is still one."""
        if not member.up and not member.is_gone:
            self._guard(member, member.start)

    def run(self, seconds):
        end = self.now + seconds
        while self.heap and self.heap[0][0] <= end:
            self.step()
        self.now = end

    def run_until(self, condition, seconds=10.0):
        """Step until the condition holds, or for so long."""
        end = self.now + seconds
        while self.heap and self.heap[0][0] <= end and not condition():
            self.step()

    def send(self, sender, message):
        """Encode, then lose, delay, duplicate or reorder."""
        sender.promise(message)
        receiver = self.by_id.get(message.to)
        if receiver is None:
            return                      # added, but never started
        rng, link = self.rng, (sender.name, receiver.name)
        is_snapshot = message.type == pyetcd.MsgType.SNAP
        lost = link in self.cut or rng.random() < self.drop
        life = sender.etcd.reactor if sender.up else None
        if is_snapshot and life:
            self.at(0.05, self._snapshot_done, sender, receiver.id, not lost, life=life)
        if lost:
            return
        data = pyetcd.encode_message(message)
        # A stream repeats nothing; what is sent again by POST after a lost answer is no proposal.
        is_repeated = rng.random() < 0.02 and message.type != pyetcd.MsgType.PROP
        for _ in range(1 + is_repeated):
            delay_s = rng.expovariate(20 if rng.random() < 0.1 else 500)
            if self.clogged.get(link, 0.0) > self.now + delay_s:
                delay_s = self.clogged[link] - self.now + rng.random() * 0.2    # then in disorder
            self.at(delay_s, self._arrive, sender, receiver, data)

    def lose_in_flight(self, sender):
        """What a member has sent and nobody received is gone with its sockets."""
        self.heap = [event for event in self.heap
                     if event[3] != self._arrive or event[4][0] is not sender]
        heapq.heapify(self.heap)

    def _snapshot_done(self, sender, member_id, ok):
        sender.etcd.transport.snapshot_done(member_id, ok)

    def _arrive(self, sender, receiver, data):
        if not receiver.up:
            return
        if receiver.frozen_until > self.now:
            self.at(receiver.frozen_until - self.now, self._arrive, sender, receiver, data)
            return
        if receiver.etcd.transport.is_removed(sender.id):
            if sender.up:
                sender.leave()          # it is told: 410 Gone
            return
        message = pyetcd.decode_message(data)
        self.note(receiver, "<-", message)
        transport = receiver.etcd.transport
        transport.add_remote(sender.id, ())     # as learned from the head of its request
        self._act(receiver, transport.deliver, message)

    # -- what clients do --------------------------------------------------------

    def leader(self):
        """The leader with the highest term among those up, or None."""
        leaders = [m for m in self.members if m.up and m.etcd.is_leader]
        return max(leaders, key=lambda m: m.etcd.node.raft.term, default=None)

    def _any(self, member):
        up = [m for m in self.members if m.up]
        return member or (self.rng.choice(up) if up else None)

    def _do(self, member, done, **request):
        etcd = member.etcd
        request = pyetcd.Request(id=etcd.ids.next(), **request)
        self.at(0.0, etcd.do, request, lambda result: done(request, result), life=etcd.reactor)

    def write(self, member=None, ttl_s=None):
        """Send one PUT to a member (any that is up); count it when acknowledged."""
        member = self._any(member)
        if member is None:
            return
        self.writes += 1
        expires = member.etcd.reactor.wall_ns() + int(ttl_s * 1e9) if ttl_s else 0
        self._do(member, self._acknowledge, method="PUT", path=f"/1/k{self.rng.randrange(8)}",
                 val=f"v{self.writes}", expiration=expires)

    def _acknowledge(self, request, result):
        if not isinstance(result, pyetcd.EtcdError):
            self.acknowledged[request.id] = (request.path, request.val)
            self.acknowledged_index = max(self.acknowledged_index, result.index)

    def read(self, member=None):
        """Ask any member for all, with quorum: nothing acknowledged before may be missing."""
        member, floor = self._any(member), self.acknowledged_index
        if member is None:
            return

        def done(request, result):
            if not isinstance(result, pyetcd.EtcdError):
                self.reads += 1
                assert result.index >= floor, f"stale read, seed {self.seed}"
        self._do(member, done, method="QGET", path="/1", recursive=True)

    def operate(self, verb, register, member=None):
        """Read, write, delete or swap a register, for its history; five clients at most wait."""
        member = self._any(member)
        waiting = [life for life in self.waiting.get(register, ()) if life.is_current]
        self.waiting[register] = waiting
        if member is None or len(waiting) >= 5:
            return
        self.writes += verb != "read"
        new, old, request = f"v{self.writes}", None, {"method": "QGET"}
        if verb == "write":
            request = {"method": "PUT", "val": new}
        elif verb == "delete":
            verb, new, request = "write", None, {"method": "DELETE"}
        elif verb == "swap":
            old = self.last_seen.get(register) or "none"
            request = {"method": "PUT", "val": new, "prev_value": old}
        history = self.histories.setdefault(register, [])
        place, called = len(history), self.now
        history.append(Operation(called, math.inf, verb, new, old))
        life = member.etcd.reactor
        waiting.append(life)

        def done(request, result):
            self.waiting[register].remove(life)
            history[place] = self._operated(history[place], request, result)
        self._do(member, done, path=f"/1/{register}", **request)

    def _operated(self, operation, request, result):
        """What is known of an operation after its answer; None: it surely did not happen."""
        answered = operation._replace(returned=self.now)
        if not isinstance(result, pyetcd.EtcdError):
            self.last_seen[request.path[3:]] = result.node.value
            if operation.verb == "read":
                return answered._replace(new=result.node.value)
            self._acknowledge(request, result)
            return answered
        if isinstance(result, pyetcd.CompareFailed):
            return answered._replace(ok=False)
        if isinstance(result, pyetcd.KeyNotFound):
            if operation.verb == "swap":
                return answered._replace(ok=False)
            return answered._replace(verb="read", new=None)
        certain = isinstance(result, (pyetcd.TooManyRequests, pyetcd.NoSpace))
        return None if operation.verb == "read" or certain else operation

    # -- what operators and fate do ---------------------------------------------

    def isolate(self, member):
        self.part([member], [other for other in self.members if other is not member])

    def part(self, some, others):
        """Cut all links between two groups, in both directions."""
        for one, other in itertools.product(some, others):
            self.cut |= {(one.name, other.name), (other.name, one.name)}

    def add_member(self):
        """Ask any member to add one, which starts when that is applied there."""
        asked = self._any(None)
        if asked is None:
            return
        joiner = SimMember(self, f"m{len(self.members)}", joins=asked.etcd.cluster)
        self.members.append(joiner)
        self.by_id[joiner.id] = joiner

        def done(error):
            if error is None:
                self.start_joiner(joiner, asked.etcd.cluster)
        added = pyetcd.Member(joiner.id, (joiner.peer_url,))
        self._change(asked, pyetcd.ConfChangeType.ADD_NODE, added, done)

    def start_joiner(self, joiner, cluster):
        """Its operator sees that it was added, and starts it."""
        if joiner.joins is not None and joiner.life == 0 and joiner.id in cluster.members:
            joiner.joins = cluster
            self.at(0.0, self.start, joiner)

    def remove_member(self, member, asked=None):
        """Ask a member to remove one."""
        asked = self._any(asked)
        if asked is not None:
            gone = pyetcd.Member(member.id, ())
            self._change(asked, pyetcd.ConfChangeType.REMOVE_NODE, gone, lambda error: None)

    def _change(self, asked, kind, member, done):
        life = asked.etcd.reactor
        self.at(0.0, asked.etcd.change_member, kind, member, done, life=life)

    def heal(self):
        """End every fault, and start whoever is a member and down."""
        self.cut.clear()
        self.clogged.clear()
        self.drop, self.short_reigns = 0.0, 0
        for member in self.members:
            disk = member.disk
            disk.crash_after, disk.is_full, disk.slowness = None, False, 1.0
            if member.joins is None or member.life:
                self.start(member)
        for member in self.members:
            for other in self.members if not member.life else ():
                if other.up:
                    self.start_joiner(member, other.etcd.cluster)

    def current(self):
        """The members of the cluster as the leader has it."""
        leader = self.leader()
        ids = leader.etcd.cluster.members if leader else ()
        return [member for member in self.members if member.id in ids]

    def settle(self, seconds=30.0):
        """Heal, wait until all members have applied the same, and compare everything."""
        end = self.now + seconds
        while self.now < end:
            self.heal()
            self.run(0.5)
            leader, members = self.leader(), self.current()
            applied = {m.etcd.raft_index for m in members if m.up}
            if leader and len(applied) == 1 and all(m.up for m in members):
                log = leader.etcd.node.raft.log
                if log.last_index == log.applied and not leader.etcd.store.has_ttl:
                    break
        else:
            raise AssertionError(f"seed {self.seed}: no agreement within {seconds} virtual seconds")
        self.check_end()

    def check_end(self):
        """All members equal, nothing acknowledged gone, and every history has an explanation."""
        members = self.current()
        stores = [_sim_files(m.etcd.store) for m in members]
        assert all(files == stores[0] for files in stores)
        requests = {
            pyetcd.decode_request(data).id for term, data in self.invariants.committed.values()
            if data[:1] == b"\x08" and b"/1/" in data
        }
        missing = self.acknowledged.keys() - requests
        assert not missing, f"{len(missing)} acknowledged writes are gone"
        for member in members:
            self.invariants.check_events(member)
        for register, history in self.histories.items():
            violation = find_violation([op for op in history if op is not None])
            assert violation is None, f"{register}: nothing explains {violation}"


def _sim_files(store):
    """Return path -> (value, modified index) of all user keys."""
    files = {}
    todo = ["/1"]
    for path in todo:
        for name, is_dir in store.children(path):
            child = f"{path}/{name}"
            if is_dir:
                todo.append(child)
            else:
                node = store._nodes[child]
                files[child] = (node.value, node.modified_index)
    return files


def _sim_scenario(seed, nodes=None, faults=()):
    """Faults of every kind, or of `faults`, by chance, then calm, then the comparison."""
    rng = random.Random(f"scenario {seed}")
    options = {
        "nodes": nodes or rng.choice((3, 3, 5)),
        "snapshot_count": rng.choice((10, 40)),
        "catchup": rng.choice((5, 5000)),
        "history": rng.choice((20, 1000, 1000)),
        "message_bytes": rng.choice((1, 1 << 20)),
        "features": () if rng.random() < 0.2 else pyetcd.FEATURES,
    }
    with Sim(seed=seed, **options) as sim:
        sim.run(2.0)
        for number in range(sim.rng.randrange(20, 50)):
            _sim_fault(sim, sim.rng, faults or _SIM_FAULTS)
            _sim_load(sim, sim.rng, f"r{number // 10}")
            sim.run(sim.rng.choice((0.01, 0.1, 0.4, 1.5)))
        sim.settle(120.0)
        return sim


def _sim_figure_8(seed):
    """A leader returns, brings its old entry to a majority, and crashes; a later one returns.

    Figure 8 of the Raft paper: the entry is committed only with one of the leader's own term.
    """
    with Sim(nodes=5, seed=seed, message_bytes=1) as sim:
        sim.run(3.0)
        old = sim.leader()
        near, *far = [member for member in sim.members if member is not old]
        sim.part([old], far)
        sim.write(old)
        sim.run(0.1)
        entry = old.etcd.node.raft.log.last_index       # known to two of five
        old.crash()
        sim.cut.clear()
        sim.isolate(near)
        sim.run_until(lambda: sim.leader() in far)
        late = sim.leader()
        sim.lose_in_flight(late)
        sim.isolate(late)
        sim.run(0.1)
        late.crash()
        sim.cut.clear()
        sim.start(old)
        _sim_crown(sim, old)
        helper, spare = (member for member in far if member is not late)
        sim.isolate(spare)
        sim.run_until(lambda: helper.etcd.node.raft.log.last_index >= entry)
        sim.cut.add((old.name, helper.name))            # its next entry does not get through
        sim.lose_in_flight(old)
        sim.run_until(lambda: old.etcd.node.raft.log.commit >= entry, 0.2)
        old.crash()
        sim.cut.clear()
        sim.isolate(near)
        sim.start(late)
        _sim_crown(sim, late)
        sim.settle()
        return sim


def _sim_deposed_leader(seed):
    """A leader is cut off, and asked when its successor has acknowledged: (asked, served)."""
    asked = 0
    with Sim(nodes=3, seed=seed) as sim:
        sim.run(4.0)
        old = sim.leader()
        assert old.etcd.reads.enabled
        sim.isolate(old)
        for _ in range(400):
            sim.run(0.01)
            new = sim.leader()
            if new is not old and new is not None and old.etcd.is_leader:
                if not sim.acknowledged:
                    sim.write(new)
                else:
                    asked += 1
                    sim.read(old)
        served = sim.reads
        sim.settle()
        return asked, served


def _sim_new_leader(seed):
    """A leader acknowledges and crashes before it tells; its successor is asked at once."""
    with Sim(nodes=3, seed=seed) as sim:
        sim.run(4.0)
        old = sim.leader()
        sim.write(old)
        sim.run_until(lambda: sim.acknowledged)
        sim.lose_in_flight(old)
        old.crash()
        sim.run_until(lambda: sim.leader())
        sim.read(sim.leader())
        sim.settle()
        return sim


def _sim_damaged_snapshots(seed):
    """A value in a snapshot goes bad while its member is down, of one member after the other."""
    with Sim(nodes=3, seed=seed, snapshot_count=5) as sim:
        sim.run(3.0)
        for member in sim.members:
            for _ in range(12):
                sim.write()
                sim.run(0.02)
            sim.run(1.0)
            member.crash()
            member.disk.flip_value()
            sim.start(member)
            sim.run(1.0)
        sim.settle()
        return sim


def _sim_crown(sim, member):
    """Let the member campaign until it leads, or for a while."""
    for _ in range(8):
        if member.etcd.is_leader:
            break
        sim.at(0.0, member.etcd.node.campaign, life=member.etcd.reactor)
        sim.run_until(lambda: member.etcd.is_leader, 0.3)


def _sim_load(sim, rng, register):
    for _ in range(rng.randrange(5)):
        sim.write(ttl_s=rng.choice((None, None, None, 0.5)))
    for _ in range(rng.randrange(2)):
        sim.read()
    for _ in range(rng.randrange(6)):
        leads = [m for m in sim.members if m.up and m.etcd.is_leader]     # or believes it does
        asked = rng.choice(leads) if leads and rng.random() < 0.3 else None
        verb = rng.choice(("read", "read", "write", "swap", "swap", "delete"))
        sim.operate(verb, register, asked)


def _sim_fault(sim, rng, faults):
    """Let one thing happen; each kind is as likely as it is listed."""
    fault = rng.choice(faults)
    leader = sim.leader() if rng.random() < 0.4 else None
    member = leader or rng.choice([m for m in sim.members if not m.is_gone])
    sim.note(member, fault.__name__)
    fault(sim, rng, member)


def _fault_crash(sim, rng, member):
    member.crash()


def _fault_crash_at_disk(sim, rng, member):
    member.disk.crash_after = rng.randrange(1, 12)


def _fault_crash_all(sim, rng, member):
    if rng.random() < 0.3:
        for other in sim.members:
            other.crash()


def _fault_restart(sim, rng, member):
    for other in sim.members:
        if other.life:
            sim.start(other)


def _fault_flip(sim, rng, member):
    """Only on one disk at a time: what the others hold brings everything back."""
    member.crash()
    if not any(f.flips for m in sim.members for f in m.disk.live.values()):
        member.disk.flip()


def _fault_isolate(sim, rng, member):
    sim.isolate(member)


def _fault_one_way(sim, rng, member):
    sim.cut.add((member.name, rng.choice(sim.members).name))


def _fault_bridge(sim, rng, member):
    """Two halves that cannot meet, and one member that both can reach."""
    others = [other for other in sim.members if other is not member]
    rng.shuffle(others)
    sim.part(others[:len(others) // 2], others[len(others) // 2:])


def _fault_heal_links(sim, rng, member):
    sim.cut.clear()


def _fault_loss(sim, rng, member):
    sim.drop = rng.choice((0.0, 0.05, 0.3))


def _fault_clog(sim, rng, member):
    for other in rng.sample(sim.members, rng.randrange(1, len(sim.members))):
        sim.clogged[member.name, other.name] = sim.now + rng.uniform(0.1, 3)


def _fault_slow_disk(sim, rng, member):
    member.disk.slowness = rng.choice((1.0, 30.0, 300.0))


def _fault_full_disk(sim, rng, member):
    member.disk.is_full = not member.disk.is_full


def _fault_pause(sim, rng, member):
    member.frozen_until = sim.now + rng.uniform(0.1, 4)


def _fault_coup(sim, rng, member):
    """It is cut off, sleeps through the election of another leader, and is asked when it wakes."""
    sim.isolate(member)
    member.frozen_until = sim.now + rng.uniform(1, 4)
    if member.up:
        for verb in ("read", "swap", "write"):
            sim.operate(verb, "coup", member)
        for _ in range(4):
            sim.operate("write", "coup")


def _fault_elections(sim, rng, member):
    """Two timers run out that should not have."""
    for one in (member, rng.choice(sim.members)):
        if one.up:
            sim.at(0.0, one.etcd.node.campaign, life=one.etcd.reactor)


def _fault_short_reigns(sim, rng, member):
    """The next leaders write, and crash before or after others know of it (Raft paper fig. 8)."""
    sim.short_reigns = rng.choice((2, 4, 6))
    leader = sim.leader()
    if leader is not None:
        sim.isolate(leader)
        sim.write(leader)
        sim.at(0.05, sim._end_reign, leader)
        sim.at(rng.uniform(0.5, 3.0), sim.start, leader)


def _fault_clock(sim, rng, member):
    member.skew_s = rng.uniform(-20, 20)
    member.drift = rng.uniform(0.8, 1.25)


def _fault_transfer(sim, rng, member):
    leader = sim.leader()
    if leader is not None:
        leader.etcd.node.transfer_leader(member.id)


def _fault_add(sim, rng, member):
    if len(sim.current()) < 7 and all(m.life or m.is_gone for m in sim.members):
        sim.add_member()


def _fault_remove(sim, rng, member):
    if len(sim.current()) > 3:
        sim.remove_member(member)


def _fault_changes(sim, rng, member):
    """Two changes at once, asked for at different members."""
    _fault_add(sim, rng, member)
    if len(sim.current()) > 4:
        sim.remove_member(member)
        sim.remove_member(rng.choice(sim.current()))


def _fault_snapshots(sim, rng, member):
    """One more snapshot right now, whatever the count says: two back to back."""
    for other in sim.members:
        etcd = other.etcd
        if etcd and etcd.raft_index > etcd.snapshots.index and not etcd.snapshots.busy:
            applied = pyetcd.EntryID(etcd.raft_term, etcd.raft_index)
            etcd.snapshots.begin(etcd.store, applied, etcd.node.raft.voters, lent=False)


_SIM_FAULTS = [
    _fault_crash, _fault_crash, _fault_crash_at_disk, _fault_crash_at_disk, _fault_crash_all,
    _fault_restart, _fault_restart, _fault_restart, _fault_flip, _fault_isolate, _fault_one_way,
    _fault_bridge, _fault_heal_links, _fault_heal_links, _fault_heal_links, _fault_loss,
    _fault_loss, _fault_clog, _fault_slow_disk, _fault_slow_disk, _fault_full_disk,
    _fault_full_disk, _fault_pause, _fault_coup, _fault_coup, _fault_clock, _fault_transfer,
    _fault_elections, _fault_elections, _fault_short_reigns, _fault_short_reigns,
    _fault_short_reigns, _fault_short_reigns, _fault_add, _fault_remove, _fault_changes,
    _fault_snapshots,
]


# Bugs that the simulation must find: each takes one rule out of the program.

def _bug_vote_not_persisted(patch):
    encode = pyetcd.Wal.encode_steps
    patch.setattr(pyetcd.Wal, "encode_steps", lambda self, state, entries: encode(
        self, state and state._replace(vote=0), entries))


def _bug_term_and_vote_not_synced(patch):
    ready = pyetcd.RawNode.ready

    def careless(self):
        found = ready(self)
        return found._replace(must_sync=bool(found.entries) or found.snapshot is not None)
    patch.setattr(pyetcd.RawNode, "ready", careless)


def _bug_reply_before_sync(patch):
    ready = pyetcd.RawNode.ready

    def careless(self):
        found = ready(self)
        return found._replace(messages=found.messages + found.held, held=[])
    patch.setattr(pyetcd.RawNode, "ready", careless)


def _bug_log_not_synced(patch):
    write = pyetcd.Wal.write
    patch.setattr(pyetcd.Wal, "write", lambda self, data, *, sync: write(self, data, sync=False))


def _bug_directory_not_synced(patch):
    patch.setattr(SimDisk, "fsync_dir", lambda self, path: None)


def _bug_leader_counts_itself_before_sync(patch):
    append = pyetcd.Raft._append_own

    def hasty(self, entries):
        append(self, entries)
        self.progress[self.id].maybe_update(self.log.last_index)
    patch.setattr(pyetcd.Raft, "_append_own", hasty)


def _bug_older_term_committed_by_counting(patch):
    def commit(self):
        index = self.replication.quorum_index
        if index > self.log.commit:
            self.log.commit_to(index)
            self.replication.mark_all_due()
    patch.setattr(pyetcd.Raft, "_maybe_commit", commit)


def _bug_vote_for_a_shorter_log(patch):
    patch.setattr(pyetcd.RaftLog, "is_up_to_date", lambda self, last_id: True)


def _bug_two_votes_in_a_term(patch):
    vote = pyetcd.Raft._vote

    def generous(self, message):
        self.vote = self.lead = 0
        vote(self, message)
    for table in (pyetcd._FOLLOWER, pyetcd._CANDIDATE, pyetcd._PRE_CANDIDATE, pyetcd._LEADER):
        patch.setitem(table, MsgType.VOTE, generous)


def _bug_half_is_a_quorum(patch):
    patch.setattr(pyetcd, "quorum_size", lambda members: max(members // 2, 1))


def _bug_previous_term_not_compared(patch):
    patch.setattr(pyetcd.RaftLog, "match_term", lambda self, entry_id: (
        self.offset <= entry_id.index <= self.last_index))


def _bug_old_duplicate_shortens_the_log(patch):
    append = pyetcd.RaftLog.maybe_append

    def cut(self, previous, commit, entries):
        if self.match_term(previous) and self.commit <= previous.index < self.last_index:
            self._truncate(previous.index + 1)
        return append(self, previous, commit, entries)
    patch.setattr(pyetcd.RaftLog, "maybe_append", cut)


def _bug_heartbeat_commits_what_may_differ(patch):
    def heartbeats(self, context):
        for peer in self.progress:
            if peer != self._config.id:
                self._mail.send(MsgType.HEARTBEAT, peer, commit=self._log.commit, context=context)
    patch.setattr(pyetcd.Replication, "send_heartbeats", heartbeats)


def _bug_read_without_asking_the_others(patch):
    def begin(self, context, index, requester):
        self._release(context, pyetcd.ReadRound(index, requester, set()))
    patch.setattr(pyetcd.PendingReads, "begin", begin)


def _bug_read_before_the_first_commit(patch):
    def read(self, message):
        context = message.entries[0].data
        self.reads.begin(context, self.log.commit, message.sender or self.id)
        self.reads.confirm(context, self.id, self.quorum)
        self.replication.send_heartbeats(context)
    patch.setitem(pyetcd._LEADER, MsgType.READ_INDEX, read)


def _bug_received_snapshot_keeps_the_voters(patch):
    patch.setattr(pyetcd.Raft, "_restore", lambda self, snapshot: self.log.restore(snapshot))


def _bug_keys_expire_by_the_local_clock(patch):
    patch.setattr(pyetcd.Applier, "_sync", lambda self, request: (
        self._store.expire(self.clock())))
    patch.setitem(pyetcd._METHODS, "SYNC", pyetcd.Applier._sync)


def _bug_log_checksum_ignored(patch):
    patch.setattr(pyetcd.WalDecoder, "_check", lambda self, record: setattr(
        self, "crc", record.crc))


def _bug_snapshot_checksum_ignored(patch):
    def decode(content):
        values = pyetcd.decode_known(
            content, {1: ("crc", 0, int), 2: ("data", 2, bytes)}, "snappb.Snapshot")
        return pyetcd.decode_snapshot(values.get("data", b""))
    patch.setattr(pyetcd, "decode_snapshot_file", decode)


def _bug_watchers_miss_a_received_snapshot(patch):
    patch.setattr(pyetcd.WatcherHub, "catch_up", lambda self, seen: None)


def _bug_full_disk_loses_a_batch(patch):
    attempt = pyetcd.WalWriter._try
    patch.setattr(pyetcd.WalWriter, "_try", lambda self, step: attempt(self, step) or True)


_SIM_BUGS = [value for name, value in sorted(globals().items()) if name.startswith("_bug_")]
# Bugs that chance meets seldom: the scenario that a test looks for them in.
_SIM_BUG_SCENARIOS = {
    "older_term_committed_by_counting": _sim_figure_8,
    "leader_counts_itself_before_sync": functools.partial(_sim_scenario, nodes=3, faults=[
        _fault_crash, _fault_restart, _fault_short_reigns, _fault_slow_disk, _fault_heal_links]),
    "read_before_the_first_commit": _sim_new_leader,
    "read_without_asking_the_others": _sim_deposed_leader,
    "snapshot_checksum_ignored": _sim_damaged_snapshots,
}


def _sim_one_member_until(power_loss_at):
    """Write to a member alone, through segment cuts and snapshots; return it and what it owes.

    power_loss_at  number of the disk operation that meets the power loss; None: never
    """
    sim = Sim(nodes=1, seed=4, snapshot_count=5, segment_bytes=400, history=2)
    member = sim.members[0]
    member.disk.crash = lambda: None            # what is left on it is chosen by the caller
    member.disk.crash_after = power_loss_at
    with sim:
        for _ in range(40):
            if member.up and sim.writes < 14:
                sim.write(member)
            sim.run(0.1)
    return member, set(sim.acknowledged.values())


def _sim_boot_after(member, disk):
    """Boot from what is left on `disk`; return all values that are there, committed or not."""
    member.disk = disk
    boot = member._boot()
    values = {(path, value) for path, (value, _) in _sim_files(boot.store).items()}
    for entry in boot.contents.entries:
        request = pyetcd.decode_request(entry.data) if entry.type == EntryType.NORMAL else None
        if request is not None:
            values.add((request.path, request.val))
    return values, boot
