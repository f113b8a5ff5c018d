"""Clocks, timers, complaints, and threads for work that may block."""

from __future__ import annotations

import queue
import threading
import time
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

from ..base.ids import package_logger

COMPLAINT_SECONDS = 30.0            # the same complaint is not logged again within this time


TIMERS_SWEPT_MIN = 256              # waiting; from then on cancelled ones are looked for


class Clock(NamedTuple):
    """Where time comes from.  No other code reads a clock, so that a test can pass its own time."""

    now: Callable[[], float]            # monotonic seconds, for deadlines and durations
    wall_ns: Callable[[], int]          # unix nanoseconds, for what clients see and for expiry


SYSTEM_CLOCK = Clock(time.monotonic, time.time_ns)


class Timer:
    """One call at a later time; cancel() makes it do nothing."""

    __slots__ = ("callback", "args")

    def __init__(self, callback: Callable[..., None], args: Tuple[Any, ...]) -> None:
        self.callback: Optional[Callable[..., None]] = callback
        self.args = args

    def cancel(self) -> None:
        """Forget the call; harmless when it was made already."""
        self.callback = None
        self.args = ()


class Complaints:
    """Logs errors that would repeat with every attempt, each at most once in 30 s."""

    def __init__(self, package: str, now: Callable[[], float]) -> None:
        self._log = package_logger(package)
        self._now = now
        self._said: Dict[str, float] = {}

    def say(self, text: str, about: str = "") -> None:
        """Log `text` as an error, unless as much was said a short time ago.

        about  what makes two texts the same; "": the text itself
        """
        now, about = self._now(), (about or text)[:256]
        if now - self._said.get(about, -COMPLAINT_SECONDS) < COMPLAINT_SECONDS:
            return
        if len(self._said) >= 1_000:
            self._said.clear()
        self._said[about] = now
        self._log.error("%s", text)


class WorkKind(NamedTuple):
    """One kind of calls that block.  Each kind has threads of its own, so that one that hangs
    holds up no other.

    threads      at work at a time
    waiting_max  calls that wait for a thread; above: refused with WorkersBusy
    is_awaited   True: close() waits for the calls under way.  False: it leaves them behind
    """

    name: str
    threads: int
    waiting_max: int
    is_awaited: bool


FILE_WORK = WorkKind("files", 2, 16, True)              # snapshots, removal of old files
NAME_WORK = WorkKind("names", 16, 64, False)            # a name server may hang for a minute
PASSWORD_WORK = WorkKind("passwords", 2, 64, False)     # 0.1 s each, of another process
PEER_WORK = WorkKind("peers", 1, 1, False)              # a proxy's questions to the members


class WorkersBusy(OSError):
    """As many calls of this kind wait as may."""


def outcome_of(work: Callable[..., Any], *args: Any) -> Tuple[Optional[Exception], Any]:
    """Return (None, result) of work(*args), or (what it raised, None), for another thread."""
    try:
        return None, work(*args)
    except Exception as error:
        return error, None


class Workers:
    """The threads for one kind of calls that block.

    They are daemons: a call that hangs ends with the process.  Thread: reactor.
    """

    def __init__(self, kind: WorkKind, post: Callable[..., None]) -> None:
        self._kind = kind
        self._post = post               # as Reactor.call_soon_threadsafe
        self._calls: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._threads: List[threading.Thread] = []
        self._unfinished = 0            # calls that wait, or are under way

    def submit(
        self, work: Callable[..., Any], args: Tuple[Any, ...],
        done: Callable[[Optional[BaseException], Any], None],
    ) -> None:
        """Have work(*args) called; then done(error, result) on the reactor's thread."""
        kind = self._kind
        if self._unfinished >= kind.threads + kind.waiting_max:
            self._post(done, WorkersBusy(f"too many calls wait ({kind.name})"), None)
            return
        self._unfinished += 1
        self._calls.put((work, args, done))
        if len(self._threads) < min(self._unfinished, kind.threads):
            name = f"{kind.name}-{len(self._threads) + 1}"
            thread = threading.Thread(target=self._run, name=name, daemon=True)
            try:
                thread.start()
                self._threads.append(thread)
            except RuntimeError as error:       # the system has none left
                if not self._threads:
                    self._calls.get()
                    self._post(self._finish, done, WorkersBusy(f"{kind.name}: {error}"), None)

    def stop(self) -> None:
        """Take no more calls; those that are awaited are finished first."""
        for _ in self._threads:
            self._calls.put(None)
        for thread in self._threads if self._kind.is_awaited else ():
            thread.join()

    def _run(self) -> None:
        while self._serve(self._calls.get()):
            pass

    def _serve(self, call: Any) -> bool:
        """Make one call, and keep nothing of it; False: it was the last."""
        if call is None:
            return False
        work, args, done = call
        self._post(self._finish, done, *outcome_of(work, *args))
        return True

    def _finish(
        self, done: Callable[[Optional[BaseException], Any], None],
        error: Optional[BaseException], result: Any,
    ) -> None:
        self._unfinished -= 1
        done(error, result)
