"""Snapshots of the store: written in slices, then the log behind them is compacted."""

from __future__ import annotations

from typing import Any, Callable, Iterator, List, Optional, Tuple

from ..base.basics import _nothing
from ..base.checksums import CRC_BLOCK_BYTES, crc32c
from ..base.codec import encode_snapshot_around
from ..base.errors import DiskFull
from ..base.limits import PURGE_SECONDS, SNAPSHOT_CATCHUP_ENTRIES
from ..base.messages import EntryID, Snapshot
from ..disk.snapshots import SnapshotFile, Snapshotter
from ..net.reactor import Reactor
from ..net.workers import FILE_WORK, WorkersBusy
from ..store.tree import Store
from .cluster import SERVER_LOG
from .journal import Journal
from .statistics import Histogram, exponential_bounds


class SnapshotJob:
    """Encodes the store, as it is now, as a snapshot file, in slices; close `walk` to give up."""

    SLICE_S = 0.002

    def __init__(
        self, store: Store, snapshot_id: EntryID, voters: Tuple[int, ...], now: Callable[[], float],
    ) -> None:
        self.id = snapshot_id
        self.etcd_index = store.current_index
        self.done: Optional[SnapshotFile] = None
        self.started = now()            # monotonic
        self.work_seconds = 0.0         # of all slices
        self.walked_bytes = 0           # so far, of the store's JSON
        self.walk = store.snapshot_chunks()
        self._voters = voters
        self._now = now
        self._steps = self._run()
        next(self._steps)               # fixes the state of the snapshot

    def work(self) -> None:
        """Work for a few milliseconds; in the end `done` is the file to write."""
        started = self._now()
        for _ in self._steps:
            if self._now() >= started + self.SLICE_S:
                break
        self.work_seconds += self._now() - started

    def _run(self) -> Iterator[None]:
        """Walk, then sum: a thread for the checksum would hold Python's lock most of the time."""
        pieces: List[bytes] = []
        for chunk in self.walk:
            pieces.append(chunk)
            self.walked_bytes += len(chunk)
            yield
        before, after = encode_snapshot_around(sum(map(len, pieces)), self._voters, self.id)
        pieces = [before, *pieces, after]
        crc = 0
        for piece in pieces:
            for offset in range(0, len(piece), CRC_BLOCK_BYTES):
                crc = crc32c(memoryview(piece)[offset:offset + CRC_BLOCK_BYTES], crc)
                yield
        self.done = SnapshotFile(self.id, pieces, sum(map(len, pieces)), crc)


SnapshotReceiver = Callable[[SnapshotFile, int], None]  # gets a snapshot, and its etcd index


SNAPSHOT_CHEAP_NODES = 10_000       # walked in 40 ms; more nodes: see is_due


class SnapshotKeeper:
    """Writes snapshots when they are due, lends them to followers and clients.  Thread: reactor."""

    def __init__(
        self, reactor: Reactor, journal: Journal, snapshotter: Snapshotter, index: int,
        nodes: int, failed: Callable[[BaseException], None],
    ) -> None:
        self.index = index                          # of the newest snapshot file
        self.nodes = nodes                          # in it
        self.least_index = 0                        # an older file does not fit every follower
        self.snapshotter = snapshotter
        self.work_durations = Histogram(exponential_bounds(0.001, 14))  # of the reactor, s
        self.save_durations = Histogram(exponential_bounds(0.001, 14))  # from begin to file, s
        self._reactor = reactor
        self._journal = journal
        self._failed = failed
        self._job: Optional[SnapshotJob] = None     # a walk over the store
        self._receivers: List[SnapshotReceiver] = []    # that get it, instead of the disk
        self._waiting: List[SnapshotReceiver] = []      # that get the next one
        self._saving = False                        # the walk is over, the file not yet there
        self._compact_to = 0                        # entries up to here may be dropped
        self._not_before = 0.0                      # no new one while the disk is full (monotonic)
        self._cache: Optional[Snapshot] = None      # the newest file, while followers want it
        self._loading = False

    @property
    def busy(self) -> bool:
        return self._job is not None or self._saving

    def is_due(self, raft_index: int, nodes: int, count: int) -> bool:
        """True if the newest file is older than `count` entries, or than least_index.

        False for a while after the disk was full.  A walk takes 4 us per node: that of a large
        store waits for as many entries as it has nodes, as they cost less time and memory.  The
        nodes of the last snapshot count: a store that only grows has one at each doubling.
        """
        behind = raft_index - self.index
        if not self.index < self.least_index <= raft_index and (
            behind <= count or behind <= min(nodes, self.nodes) - SNAPSHOT_CHEAP_NODES
        ):
            return False
        return self._reactor.now() >= self._not_before

    def begin(self, store: Store, applied: EntryID, voters: Tuple[int, ...], *, lent: bool) -> None:
        """Begin to walk the store as of entry `applied`; lent: for waiting receivers, no file."""
        if lent:
            self._receivers, self._waiting = self._waiting, []
        else:
            SERVER_LOG.info(
                "start to snapshot (applied: %d, lastsnap: %d)", applied.index, self.index
            )
            self.nodes = len(store)
        self._job = SnapshotJob(store, applied, voters, self._reactor.now)

    @property
    def is_requested(self) -> bool:
        """True if a follower or a client waits for a snapshot, and none is in the making."""
        if not self._waiting and (
            self.index >= self.least_index or self._reactor.now() < self._not_before
        ):
            return False
        return not self.busy

    def request(self, receiver: SnapshotReceiver) -> None:
        """Call receiver(file, etcd index) with the state of a later moment, without the disk."""
        self._waiting.append(receiver)

    def withdraw(self, receiver: SnapshotReceiver) -> None:
        """Forget a receiver; end a walk without receivers."""
        if receiver in self._waiting:
            self._waiting.remove(receiver)
        elif receiver in self._receivers:
            self._receivers.remove(receiver)
            if not self._receivers:
                self._give_up()

    def _give_up(self) -> None:
        if self._job is not None:
            self._job.walk.close()
            self._job = None

    def work(self, compact: Callable[[int], bool], begin: Callable[[], None]) -> None:
        """Do a slice of the walk; at its end write record and file.

        compact  drops a slice of the log up to an index; True when all of it is dropped
        begin    called if a snapshot is requested
        """
        if self.is_requested:
            begin()
        if self._compact_to:
            if compact(self._compact_to):
                self._compact_to = 0
            else:
                self._reactor.call_soon(_nothing)
        if self._job is None:
            return
        if self._job.done is None:
            self._job.work()
        file = self._job.done
        if file is None:
            self._reactor.call_soon(_nothing)   # the next slice: in the next turn, at once
            return
        if self._receivers:
            receivers, etcd_index = self._receivers, self._job.etcd_index
            self._receivers, self._job = [], None
            for receiver in receivers:
                receiver(file, etcd_index)
            return
        started = self._job.started
        self.work_durations.observe(self._job.work_seconds)
        self._job, self._saving = None, True
        self._journal.record_snapshot(file.id, lambda: self._write_file(file, started))

    def _write_file(self, file: SnapshotFile, started: float) -> None:
        """Write the file, after its record is in the log, on another thread: the log must go on."""
        def done(error: Optional[BaseException], _: Any) -> None:
            self._saving = False
            if isinstance(error, (DiskFull, WorkersBusy)):
                SERVER_LOG.error("no snapshot could be saved: %s", error)
                self._not_before = self._reactor.now() + PURGE_SECONDS
                return
            if error is not None:
                self._failed(error)
                return
            self.save_durations.observe(self._reactor.now() - started)
            index = file.id.index
            SERVER_LOG.info("saved snapshot at index %d", index)
            self._cache = None
            if index > self.index:
                self.index = index
                self._journal.release(index)
            self._compact_to = max(1, index - SNAPSHOT_CATCHUP_ENTRIES)

        self._reactor.run_blocking(self.snapshotter.write, file, kind=FILE_WORK, done=done)

    def received(self, index: int) -> None:
        """Give up a walk over the old store, which the leader's snapshot has replaced."""
        self._give_up()
        self._waiting, self._receivers = self._receivers + self._waiting, []
        self.index, self.nodes = index, 0       # not counted: the next file comes sooner
        self._cache = None

    def newest(self, member_id: int, *, is_v3: bool) -> Optional[Snapshot]:
        """Return the newest snapshot for a follower that is too far behind; None: not ready.

        is_v3  the follower may be of etcd 3.x, which ignores a snapshot from before its addition:
               then a new one is due
        """
        if self._cache is None and self.index and not self._loading:
            self._loading = True
            self._reactor.run_blocking(self.snapshotter.load, kind=FILE_WORK, done=self._loaded)
        snapshot = self._cache
        if snapshot is None or self.index < self.least_index:
            return None
        if is_v3 and member_id not in snapshot.voters:
            self.least_index = snapshot.index + 1
            return None
        return snapshot

    def _loaded(self, error: Optional[BaseException], snapshot: Any) -> None:
        self._loading = False
        if error is not None:
            SERVER_LOG.error("cannot read the snapshot file: %s", error)
            return
        self._cache = snapshot
        # A damaged file was put aside: the one read is older, and the next one is due sooner.
        self.index = min(self.index, snapshot.index if snapshot is not None else 0)
        self._reactor.call_later(30.0, self._drop_cache)

    def _drop_cache(self) -> None:
        self._cache = None
