"""A reactor whose time, turns and blocking work move only when the test says so."""

from __future__ import annotations

import collections
import heapq
import itertools
from typing import Any, Callable, Deque, List, Tuple

import pyetcd


class FakeReactor:
    """posted: calls for the next turn; timers: (when, order, timer); jobs: of run_blocking."""

    http_date = "now"
    ready_sockets = 0
    is_quiet = False

    def __init__(self) -> None:
        self.time = 1_000.0
        self.posted: Deque[Tuple[Callable[..., None], Tuple[Any, ...]]] = collections.deque()
        self.timers: List[Tuple[float, int, pyetcd.Timer]] = []
        self.jobs: List[Tuple[Tuple[Any, ...], Callable[..., None]]] = []
        self._order = itertools.count()

    def register(self, sock: Any, events: int, callback: Any, *, patient: bool = False) -> None:
        pass

    def modify(self, sock: Any, events: int, callback: Any) -> None:
        pass

    def unregister(self, sock: Any) -> None:
        pass

    def now(self) -> float:
        return self.time

    def wall_ns(self) -> int:
        return int(self.time * pyetcd.NS)

    def call_soon(self, callback: Callable[..., None], *args: Any) -> None:
        self.posted.append((callback, args))

    call_in_turn = call_soon_threadsafe = flush_soon = call_soon

    def call_later(self, delay_s: float, callback: Callable[..., None], *args: Any) -> Any:
        timer = pyetcd.Timer(callback, args)
        self._begin(delay_s, timer)
        return timer

    def every(self, period_s: float, callback: Callable[[], None]) -> Any:
        def call() -> None:
            self._begin(period_s, timer)
            callback()

        timer = self.call_later(period_s, call)
        return timer

    def _begin(self, delay_s: float, timer: pyetcd.Timer) -> None:
        heapq.heappush(self.timers, (self.time + delay_s, next(self._order), timer))

    def run_blocking(self, work: Any, *args: Any, kind: str, done: Callable[..., None]) -> None:
        self.jobs.append((args, done))

    def turn(self, ready_sockets: int = 0) -> None:
        """Run what is posted, as one turn with so many ready sockets."""
        self.ready_sockets = ready_sockets
        for _ in range(len(self.posted)):
            callback, args = self.posted.popleft()
            callback(*args)

    def rest(self) -> None:
        """Turn until nothing is posted."""
        for _ in range(1_000):
            if not self.posted:
                return
            self.turn()
        raise AssertionError("it never comes to rest")

    def next_timer(self) -> None:
        """Let time pass until the next timer, and call it."""
        self.time, _, timer = heapq.heappop(self.timers)
        if timer.callback is not None:
            timer.callback(*timer.args)

    def pass_time(self, seconds: float) -> None:
        end = self.time + seconds
        while self.timers and self.timers[0][0] <= end:
            self.next_timer()
        self.time = end
