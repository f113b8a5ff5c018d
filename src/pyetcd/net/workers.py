"""Clocks, timers, a throttled log, and threads for calls that block."""

from __future__ import annotations

import queue
import threading
import time
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

from ..base.ids import package_logger

REPEAT_SECONDS = 30.0               # between two log lines about the same fault
TIMERS_SWEPT_MIN = 256              # waiting timers; above: cancelled ones are removed


class Clock(NamedTuple):
    """The source of time.  No other code reads a clock: a test can pass its own."""

    now: Callable[[], float]            # monotonic seconds, for deadlines and durations
    wall_ns: Callable[[], int]          # unix nanoseconds, for clients and for expiry


SYSTEM_CLOCK = Clock(time.monotonic, time.time_ns)


class Timer:
    """A call at a later time, unless it is cancelled before."""

    __slots__ = ("callback", "args")

    def __init__(self, callback: Callable[..., None], args: Tuple[Any, ...]) -> None:
        self.callback: Optional[Callable[..., None]] = callback
        self.args = args

    def cancel(self) -> None:
        self.callback = None
        self.args = ()


class ThrottledLog:
    """Logs the errors that every attempt would repeat, each at most once in 30 s."""

    def __init__(self, package: str, now: Callable[[], float]) -> None:
        self._log = package_logger(package)
        self._now = now
        self._logged: Dict[str, float] = {}     # fault -> monotonic time

    def error(self, text: str, fault: str = "") -> None:
        """Log `text`, unless an error with the same `fault` (default: text) is recent."""
        now, fault = self._now(), (fault or text)[:256]
        if now - self._logged.get(fault, -REPEAT_SECONDS) < REPEAT_SECONDS:
            return
        if len(self._logged) >= 1_000:
            self._logged.clear()
        self._logged[fault] = now
        self._log.error("%s", text)


class WorkKind(NamedTuple):
    """A kind of blocking calls with its own threads, so that a hanging kind delays no other."""

    name: str
    threads: int                        # at most
    waiting_max: int                    # calls that wait for a thread; above: WorkersBusy
    is_awaited: bool                    # stop() waits for the calls under way


FILE_WORK = WorkKind("files", 2, 16, True)              # snapshots, removal of old files
NAME_WORK = WorkKind("names", 16, 64, False)            # a name server may hang for a minute
PASSWORD_WORK = WorkKind("passwords", 2, 64, False)     # 0.1 s each, of another process
PEER_WORK = WorkKind("peers", 1, 1, False)              # a proxy's requests to the members


class WorkersBusy(OSError):
    """Too many calls of this kind wait."""


def outcome_of(work: Callable[..., Any], *args: Any) -> Tuple[Optional[Exception], Any]:
    """Return (None, result) of work(*args), or (its exception, None)."""
    try:
        return None, work(*args)
    except Exception as error:
        return error, None


class Workers:
    """Daemon threads for one kind of blocking calls, which may hang.  Thread: reactor."""

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
        """Call work(*args) on a thread; then done(error, result) on the reactor's."""
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
        """Take no more calls; wait for those under way if their kind is awaited."""
        for _ in self._threads:
            self._calls.put(None)
        for thread in self._threads if self._kind.is_awaited else ():
            thread.join()

    def _run(self) -> None:
        while self._serve(self._calls.get()):
            pass

    def _serve(self, call: Any) -> bool:
        """Make one call; False: stop().  In its own frame, which keeps nothing of the call."""
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
