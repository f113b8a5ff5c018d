"""Budgets: the time of long works in a turn, and the memory of connections."""

from __future__ import annotations

import collections
from typing import Any, Callable, Deque, Dict, Generator, Iterator, Protocol, Set, Tuple, Union

from ..base.limits import HELD_BYTES_MAX
from .reactor import Reactor
from .workers import Complaints


class SlicedWork:
    """Long works in steps, all together for TURN_S of a turn, each for a while in its turn.

    What is short is done at once.  Thread: reactor.
    """

    TURN_S = 0.005

    def __init__(self, reactor: Reactor) -> None:
        self._reactor = reactor
        self._works: Deque[Tuple[Iterator[None], Callable[[Any], None]]] = collections.deque()
        self._turn = -1                 # of the reactor, and what was spent in it
        self._spent_s = 0.0
        self._is_posted = False

    def add(self, steps: Generator[None, None, Any], done: Callable[[Any], None]) -> None:
        """Do a work; then call done(result of the generator), which may be before add() returns."""
        self._works.append((steps, done))
        if not self._is_posted:
            self._go()

    def _go(self) -> None:
        self._is_posted = False
        reactor = self._reactor
        if self._turn != reactor.turns:
            self._turn, self._spent_s = reactor.turns, 0.0
        while self._works and self._spent_s < self.TURN_S:
            steps, done = self._works.popleft()
            started = reactor.now()
            try:
                next(steps)
                self._works.append((steps, done))
            except StopIteration as stop:
                done(stop.value)
            self._spent_s += reactor.now() - started
        if self._works and not self._is_posted:
            self._is_posted = True
            reactor.call_soon(self._go)


class Holder(Protocol):
    """A connection, as far as HeldBytes knows it."""

    def pieces(self) -> Iterator[Union[bytes, bytearray]]:
        """What it holds in memory; a piece may be of several at a time."""

    def close(self) -> None:
        """Let go of all."""


class HeldBytes:
    """What the connections of a member hold together: replies that nobody takes, and requests of
    which bytes are missing.

    Pieces that several share count once, so it takes a look at all to know; that is due when as
    much has come as there was room for.  If it is too much, the connections go that have not
    moved for the longest.  Thread: reactor.
    """

    LOOK_PIECES = 10_000                # in one turn: 3 ms

    def __init__(self, reactor: Reactor) -> None:
        self._reactor = reactor
        self._holders: Dict[Holder, float] = {}     # and when they moved last (monotonic)
        self._grown = 0                 # bytes since the last look
        self._room = HELD_BYTES_MAX     # as of the last look
        self._look: Iterator[None] = iter(())
        self._looking = False
        self._complaints = Complaints("http", reactor.now)

    def hold(self, connection: Holder, grown: int, *, moved: bool = False) -> None:
        """The connection keeps `grown` bytes more.  moved: its client has taken some."""
        if moved or connection not in self._holders:
            self._holders[connection] = self._reactor.now()
        self._grown += grown
        if self._grown >= self._room and not self._looking:
            self._looking, self._grown = True, 0
            self._look = self._look_at_all()
            self._reactor.call_soon(self._go_on)

    def forget(self, connection: Holder) -> None:
        """The connection is closed."""
        self._holders.pop(connection, None)

    def _go_on(self) -> None:
        for _ in self._look:
            self._reactor.call_soon(self._go_on)
            return
        self._looking = False

    def _look_at_all(self) -> Iterator[None]:
        """Close what is too much; those that moved last are kept, one of them in any case."""
        kept = closed = looked = 0
        seen: Set[int] = set()
        for connection in sorted(self._holders, key=self._holders.__getitem__, reverse=True):
            pieces = {id(piece): len(piece) for piece in connection.pieces()}
            if not pieces:
                self._holders.pop(connection, None)
                continue
            size = sum(pieces[piece] for piece in pieces if piece not in seen)
            if kept and kept + size > HELD_BYTES_MAX:
                closed += 1
                connection.close()
            else:
                kept += size
                seen.update(pieces)
            looked += len(pieces)
            if looked > self.LOOK_PIECES:
                looked = 0
                yield
        self._room = max(HELD_BYTES_MAX - kept, HELD_BYTES_MAX // 8)
        if closed:
            text = f"closed connections that held more than {HELD_BYTES_MAX >> 20} MB together"
            self._complaints.say(
                f"{text}: {closed}, whose clients did not read replies or finish requests", text
            )
