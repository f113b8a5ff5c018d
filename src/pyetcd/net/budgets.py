"""Budgets: time for long work in a turn, and memory for the buffers of connections."""

from __future__ import annotations

import collections
from typing import Any, Callable, Deque, Dict, Generator, Iterator, Protocol, Set, Tuple, Union

from ..base.limits import HELD_BYTES_MAX
from .reactor import Reactor
from .workers import ThrottledLog


class SlicedWork:
    """Long work in steps: TURN_S of each turn in all, by round robin.  Thread: reactor."""

    TURN_S = 0.005

    def __init__(self, reactor: Reactor) -> None:
        self._reactor = reactor
        self._queue: Deque[Tuple[Iterator[None], Callable[[Any], None]]] = collections.deque()
        self._turn = -1                 # of the reactor
        self._spent_s = 0.0             # in that turn
        self._is_posted = False

    def add(self, steps: Generator[None, None, Any], done: Callable[[Any], None]) -> None:
        """Run the generator, then done(its result), perhaps before add() returns."""
        self._queue.append((steps, done))
        if not self._is_posted:
            self._go()

    def _go(self) -> None:
        self._is_posted = False
        reactor = self._reactor
        if self._turn != reactor.turns:
            self._turn, self._spent_s = reactor.turns, 0.0
        while self._queue and self._spent_s < self.TURN_S:
            steps, done = self._queue.popleft()
            started = reactor.now()
            try:
                next(steps)
                self._queue.append((steps, done))
            except StopIteration as stop:
                done(stop.value)
            self._spent_s += reactor.now() - started
        if self._queue and not self._is_posted:
            self._is_posted = True
            reactor.call_soon(self._go)


class BufferOwner(Protocol):
    """A connection with buffers in memory."""

    def pieces(self) -> Iterator[Union[bytes, bytearray]]: ...
    def close(self) -> None: ...


class BufferBudget:
    """A limit on the memory of all connections: unsent replies and incomplete requests.

    Connections may share buffers, which count once, so only a walk over all connections finds the
    sum.  A walk begins when the connections have received as many bytes as there was room for
    after the last.  Above the limit it closes those with the longest time since their last
    progress.  Thread: reactor.
    """

    TURN_PIECES = 10_000                # of a walk in one turn: 3 ms

    def __init__(self, reactor: Reactor) -> None:
        self._reactor = reactor
        self._owners: Dict[BufferOwner, float] = {}     # and their last progress (monotonic)
        self._grown = 0                 # bytes since the begin of the last walk
        self._room = HELD_BYTES_MAX     # after the last walk
        self._is_walking = False
        self._log = ThrottledLog("http", reactor.now)

    def grow(self, connection: BufferOwner, grown: int, *, moved: bool = False) -> None:
        """Count bytes that a connection keeps.  moved: its client has read some."""
        if moved or connection not in self._owners:
            self._owners[connection] = self._reactor.now()
        self._grown += grown
        if self._grown >= self._room and not self._is_walking:
            self._is_walking, self._grown = True, 0
            self._reactor.call_soon(self._go_on, self._close_excess())

    def forget(self, connection: BufferOwner) -> None:
        self._owners.pop(connection, None)

    def _go_on(self, walk: Iterator[None]) -> None:
        for _ in walk:
            self._reactor.call_soon(self._go_on, walk)
            return
        self._is_walking = False

    def _close_excess(self) -> Iterator[None]:
        """Keep the connections with the latest progress, at least one; close the others."""
        kept = closed = walked = 0
        seen: Set[int] = set()
        for connection in sorted(self._owners, key=self._owners.__getitem__, reverse=True):
            pieces = {id(piece): len(piece) for piece in connection.pieces()}
            if not pieces:
                self._owners.pop(connection, None)
                continue
            size = sum(pieces[piece] for piece in pieces if piece not in seen)
            if kept and kept + size > HELD_BYTES_MAX:
                closed += 1
                connection.close()
            else:
                kept += size
                seen.update(pieces)
            walked += len(pieces)
            if walked > self.TURN_PIECES:
                walked = 0
                yield
        self._room = max(HELD_BYTES_MAX - kept, HELD_BYTES_MAX // 8)
        if closed:
            text = f"closed connections that held more than {HELD_BYTES_MAX >> 20} MB together"
            self._log.error(
                f"{text}: {closed}, whose clients did not read replies or finish requests", text
            )
