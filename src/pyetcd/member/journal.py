"""The journal: batches on their way to the disk, in order; threads `reactor` and `wal`."""

from __future__ import annotations

import bisect
import collections
import contextlib
import functools
import itertools
import queue
import threading
from typing import Callable, Deque, Generator, List, NamedTuple, Optional, Sequence, Tuple

from ..base.basics import _nothing
from ..base.errors import DiskFull
from ..base.ids import package_logger
from ..base.messages import Entry, EntryID, HardState, Message, Snapshot
from ..base.text import finish
from ..disk.snapshots import Snapshotter
from ..disk.wal import Cut, Wal
from ..net.reactor import Reactor
from ..raft.log import Mark
from ..raft.node import Ready
from .statistics import Histogram, exponential_bounds


class Batch:
    """The state and entries of one visit to the disk, and the messages held back until then."""

    __slots__ = ("hard_state", "entries", "snapshot", "must_sync", "held", "mark")

    def __init__(self) -> None:
        self.hard_state: Optional[HardState] = None
        self.entries: List[Entry] = []
        self.snapshot: Optional[Snapshot] = None    # received from the leader; before entries
        self.must_sync = False
        self.held: List[Message] = []
        self.mark: Optional[Mark] = None


class WalJob(NamedTuple):
    """One visit to the disk, in this order; empty parts are left out.

    A snapshot's file is complete before any entry behind it is written: after a crash between
    the two, the log fits the snapshot before.
    """

    record: bytes                       # of the snapshot
    snapshot: Optional[Snapshot]        # its file
    data: Sequence[bytes]               # frames to append
    cut: Optional[Cut]
    release_to: int                     # unlock segments before this index; 0: none
    done: Callable[[], None]            # called on the reactor when all of it is durable


class WalWriter:
    """The wal thread: one write and one fdatasync per job, or the reactor's for a small job alone.

    A failure is final: nobody knows which bytes are on disk, so no later job is begun and no
    write is acknowledged any more.  A full disk is no failure: the step that met it has left
    nothing, and is repeated until there is space.
    """

    FULL_SECONDS = 0.25                 # between two tries while the disk is full
    # The reactor syncs a small write itself: a write through the thread costs two hops, about
    # as long as a short sync.  A slow sync ends that for the next QUICK_SYNCS_MIN syncs, so a
    # disk that stalls stops the reactor at most once.
    INLINE_BYTES_MAX = 1 << 14
    INLINE_MEAN_SECONDS = 0.0005        # above: readers would wait for the disk too often
    INLINE_SLOW_SECONDS = 0.005
    QUICK_SYNCS_MIN = 100

    def __init__(
        self, wal: Wal, snapshotter: Snapshotter, reactor: Reactor, *,
        failed: Callable[[BaseException], None], full: Callable[[str], None],
    ) -> None:
        self._wal = wal
        self._snapshotter = snapshotter
        self._reactor = reactor
        self._failed = failed
        self._full = full               # called on the reactor, with the reason, or "" when over
        self._is_full = False
        self._jobs: queue.SimpleQueue[Optional[WalJob]] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="wal", daemon=True)
        self.sync_durations = Histogram(exponential_bounds(0.001, 14))  # write and fdatasync, s
        self._queued = 0                # jobs that the thread was given; owner: the reactor
        self._finished = 0              # jobs that the thread has done; owner: the thread
        self._deferred: Optional[WalJob] = None     # the reactor syncs it in its next turn
        self._mean_s = self.INLINE_MEAN_SECONDS     # of a sync, over about the last 16
        self._quick_syncs = 0           # in a row
        self.inline_syncs = 0

    def start(self) -> None:
        self._thread.start()

    def submit(self, job: WalJob) -> None:
        """Queue one visit.  Thread: reactor."""
        self._queue_deferred()
        self._deferred = job
        if not self._may_sync_inline(job):
            self._queue_deferred()
        elif self._reactor.is_quiet:
            self._sync_inline(job)
        else:                           # messages to followers leave at the end of this turn
            self._reactor.call_soon(self._sync_alone)

    def _queue_deferred(self) -> None:
        if self._deferred is not None:
            self._queued += 1
            self._jobs.put(self._deferred)
            self._deferred = None

    def _may_sync_inline(self, job: WalJob) -> bool:
        return (
            self._quick_syncs >= self.QUICK_SYNCS_MIN
            and self._mean_s < self.INLINE_MEAN_SECONDS
            and self._queued == self._finished
            and not (job.record or job.snapshot or job.cut or job.release_to)
            and sum(map(len, job.data)) <= self.INLINE_BYTES_MAX
        )

    def _sync_alone(self) -> None:
        """Do the deferred job on the reactor's thread, unless a socket became ready meanwhile."""
        job = self._deferred
        if job is None or self._reactor.ready_sockets:
            self._queue_deferred()
        else:
            self._sync_inline(job)

    def _sync_inline(self, job: WalJob) -> None:
        try:
            self._write_frames(job.data)
        except DiskFull:
            self._queue_deferred()      # the thread repeats it until there is space
        except OSError as error:
            self._deferred = None
            self._jobs.put(None)        # the thread ends, so it begins no later job either
            self._fail(error)
        else:
            self._deferred = None
            self.inline_syncs += 1
            job.done()

    def stop(self) -> None:
        """Finish the queued jobs if there is space, end the thread, close the files.  Blocks."""
        self._queue_deferred()
        self._stopping.set()
        self._jobs.put(None)
        if self._thread.is_alive():
            self._thread.join()
        self._wal.close()               # if the thread never ran

    def _run(self) -> None:
        try:
            with contextlib.closing(self._wal):
                while True:
                    job = self._jobs.get()
                    if job is None or not self._do(job):
                        return
                    self._finished += 1
                    self._reactor.call_soon_threadsafe(job.done)
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        package_logger("wal").critical("the write-ahead log failed: %s", error, exc_info=True)
        self._reactor.call_soon_threadsafe(self._failed, error)

    def _do(self, job: WalJob) -> bool:
        """Do all of a job; False: given up by stop(), as the disk stayed full."""
        for step in self._steps(job):
            while not self._try(step):
                if self._stopping.wait(self.FULL_SECONDS):
                    return False
        return True

    def _steps(self, job: WalJob) -> List[Callable[[], None]]:
        """Return the steps of a job, in order; none leaves anything behind on a full disk."""
        steps: List[Callable[[], None]] = []
        if job.record:
            steps.append(functools.partial(self._wal.write, job.record, sync=True))
        if job.snapshot is not None:
            steps.append(functools.partial(self._snapshotter.save, job.snapshot))
        if job.data:
            steps.append(functools.partial(self._write_frames, job.data))
        if job.cut is not None:
            steps.append(functools.partial(self._wal.cut, job.cut))
        if job.release_to:
            steps.append(functools.partial(self._wal.release_to, job.release_to))
        return steps

    def _write_frames(self, data: Sequence[bytes]) -> None:
        now = self._reactor.now
        started = now()
        self._wal.write(*data, sync=True)
        seconds = now() - started
        self.sync_durations.observe(seconds)
        self._mean_s += (seconds - self._mean_s) / 16
        self._quick_syncs = self._quick_syncs + 1 if seconds < self.INLINE_SLOW_SECONDS else 0

    def _try(self, step: Callable[[], None]) -> bool:
        """Do a step; False if the disk is full.  Reports each change of that to the reactor."""
        try:
            step()
        except DiskFull as error:
            if not self._is_full:
                self._is_full = True
                self._reactor.call_soon_threadsafe(self._full, str(error))
            return False
        if self._is_full:
            self._is_full = False
            self._reactor.call_soon_threadsafe(self._full, "")
        return True


WORK_ENTRIES_MAX = 400              # of the log, applied in one turn: 10 ms
WORK_BYTES_MAX = 1 << 19            # of entries encoded, and of those applied, in one turn: 3 ms


def first_part(entries: Sequence[Entry]) -> int:
    """Return how many of `entries` are the work of one turn; the last may exceed its bytes."""
    if len(entries) <= 1:
        return len(entries)
    sizes = [len(entry.data) for entry in entries[:WORK_ENTRIES_MAX]]
    if sum(sizes) <= WORK_BYTES_MAX:
        return len(sizes)
    return bisect.bisect_left(list(itertools.accumulate(sizes)), WORK_BYTES_MAX) + 1


class Journal:
    """Readys on their way to the disk, in batches: while one is written the next one gathers.

    A batch becomes durable as a whole; then durable(batch) sends the messages held back, and
    counts the entries.  Thread: reactor.
    """

    def __init__(
        self, wal: Wal, writer: WalWriter, hard_state: HardState, durable: Callable[[Batch], None],
    ) -> None:
        self.writer = writer
        self.durable_commit = hard_state.commit     # commit index that a crash cannot take back
        self.busy = False                           # the writer has a job
        self.visits = 0                             # jobs given to the writer
        self.batch_entries = Histogram(exponential_bounds(1, 14))   # in one visit
        self._wal = wal
        self._durable = durable
        self._batch = Batch()
        self._waiting: Deque[Batch] = collections.deque()   # complete ones, before _batch
        self._steps: Optional[Generator[None, None, None]] = None   # the rest of a long batch
        self._release_to = 0
        self._record: Optional[Tuple[EntryID, Callable[[], None]]] = None   # waits for the writer

    @property
    def is_encoding(self) -> bool:
        """True if the rest of a long batch waits for submit() in the next turn."""
        return self._steps is not None

    def add(self, ready: Ready) -> None:
        batch = self._batch
        if ready.snapshot is not None:
            if batch.entries or batch.held or batch.snapshot:
                self._waiting.append(batch)
                self._batch = batch = Batch()
            batch.snapshot = ready.snapshot
        if ready.hard_state is not None:
            batch.hard_state = ready.hard_state
        batch.entries += ready.entries
        batch.must_sync = batch.must_sync or ready.must_sync
        batch.held += ready.held
        batch.mark = ready.mark

    def sync_commit(self, state: HardState) -> None:
        """Write this commit index soon; durable_commit tells when it is on disk."""
        self._batch.hard_state = state
        self._batch.must_sync = True
        if self._batch.mark is None:
            self._batch.mark = Mark(0, -1)          # stands for no entries
        self.submit()

    def submit(self) -> None:
        """Give an idle writer the next batch; a commit index alone waits for other work."""
        if self._steps is not None:
            self._encode_on()
        if self._record is not None and not self.busy:
            self._write_record(*self._record)
        while not self.busy:
            batch = self._waiting.popleft() if self._waiting else self._batch
            if batch is self._batch:
                if batch.mark is None or not (batch.must_sync or batch.held):
                    return
                self._batch = Batch()
            if batch.must_sync:         # a long one in parts, which the next turns encode
                self.busy = True
                self._steps = self._write_steps(batch)
                self._encode_on()
                continue
            if self._batch.hard_state is None:      # it travels with the next one that syncs
                self._batch.hard_state = batch.hard_state
            batch.hard_state = None
            self._durable(batch)

    def record_snapshot(self, snapshot_id: EntryID, done: Callable[[], None]) -> None:
        """Write the record of a snapshot file to come, before the next batch; then done()."""
        self._record = (snapshot_id, done)
        self.submit()

    def _write_record(self, snapshot_id: EntryID, done: Callable[[], None]) -> None:
        def written() -> None:
            self.busy = False
            done()

        self._record = None
        record = self._wal.encode_snapshot(snapshot_id)
        self._submit_job(WalJob(record, None, (), None, 0, written))

    def release(self, index: int) -> None:
        """Unlock the segments that only hold entries before `index`, with the next batch."""
        self._release_to = index

    def close(self) -> None:
        """Write all batches, and end the writer.  Blocks for the last sync."""
        while self._steps is not None:
            self._encode_on()
        for batch in (*self._waiting, self._batch):
            self.writer.submit(finish(self._encode_job(batch, _nothing)))
        self.writer.stop()

    def _encode_on(self) -> None:
        assert self._steps is not None
        if next(self._steps, self) is self:
            self._steps = None

    def _write_steps(self, batch: Batch) -> Generator[None, None, None]:
        entries = batch.entries
        count = first_part(entries)
        while count < len(entries) and batch.snapshot is None:
            self.batch_entries.observe(count)
            data = yield from self._wal.encode_steps(None, entries[:count])
            del entries[:count]
            self._submit_job(WalJob(b"", None, data, None, 0, _nothing))
            yield
            count = first_part(entries)

        def written() -> None:
            self.busy = False
            if batch.hard_state is not None:
                self.durable_commit = batch.hard_state.commit
            self._durable(batch)

        self.batch_entries.observe(count)
        self._submit_job((yield from self._encode_job(batch, written)))

    def _submit_job(self, job: WalJob) -> None:
        self.busy = True
        self.visits += 1
        self.writer.submit(job)

    def _encode_job(self, batch: Batch, done: Callable[[], None]) -> Generator[None, None, WalJob]:
        record = b""
        if batch.snapshot is not None:
            record = self._wal.encode_snapshot(batch.snapshot.id)
        data = yield from self._wal.encode_steps(batch.hard_state, batch.entries)
        release_to, self._release_to = self._release_to, 0
        is_full = self._wal.segment_full(after_snapshot=release_to > 0)
        cut = self._wal.encode_cut() if is_full else None
        return WalJob(record, batch.snapshot, data, cut, release_to, done)
