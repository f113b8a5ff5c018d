"""The reactor: one thread, every socket."""

from __future__ import annotations

import collections
import heapq
import os
import selectors
import socket
import threading
from email.utils import formatdate
from typing import IO, Any, Callable, Deque, Dict, List, Optional, OrderedDict, Set, Tuple, Union

from ..base.limits import NS
from ..base.system import make_poll
from .workers import NAME_WORK, SYSTEM_CLOCK, TIMERS_SWEPT_MIN, Clock, Timer, Workers, WorkKind

QUICK_SECONDS = 0.000_200           # a short wait, falling asleep and waking included
QUICK_WAITS_MIN = 8                 # short ones in a row, after which waits begin awake
AWAKE_SECONDS = 0.000_120           # of one wait; without an event by then, asleep
CLIENTS_SECONDS = 0.005             # for clients in each of three parts of a turn: their sockets,
                                    # their queued calls, their replies; above: the next turn
CLOCK_STRIDE = 4                    # callbacks of clients between two looks at the clock


Pollable = Union[socket.socket, IO[bytes]]      # a socket or a pipe
_IN, _OUT, _INVALID = 1, 4, 32      # EPOLLIN and POLLIN, EPOLLOUT and POLLOUT, POLLNVAL
_EPOLL_EVENTS = (0, _IN, _OUT, _IN | _OUT)
# epoll's masks as EVENT_READ and EVENT_WRITE; errors and hang-ups count as both.
_READY = tuple(
    (selectors.EVENT_READ if mask & ~_OUT else 0) | (selectors.EVENT_WRITE if mask & ~_IN else 0)
    for mask in range(2 * _INVALID)
)


class Reactor:
    """The loop whose thread owns all state, with its sockets, timers and posted calls.

    One turn: poll, serve ready sockets, run due timers, run posted calls, on_turn(), flush.
    Thread: the reactor's own, except for call_soon_threadsafe and stop.
    """

    PHASES = ("waiting", "sockets", "timers", "posted", "server", "flush")

    def __init__(self, clock: Clock = SYSTEM_CLOCK) -> None:
        self.now, self.wall_ns = clock
        self.on_turn: Callable[[], None] = lambda: None
        self.on_turned: Callable[[float], None] = lambda seconds: None
        self.turns = 0
        self.ready_sockets = 0          # in this turn
        self.slowest_turn_s = 0.0
        self.phase_seconds = dict.fromkeys(self.PHASES, 0.0)    # sums; waiting: for sockets
        self._turned_at = self.now()    # the end of the last turn
        self._quick_waits = 0           # so many in a row were short
        self._epoll = make_poll()       # selectors would cost some 3 us more per event
        self._callbacks: Dict[int, Callable[[int], None]] = {}      # by descriptor
        self._gone: Set[int] = set()    # unregistered in this turn: their events are stale
        self._timers: List[Tuple[float, int, Timer]] = []
        self._timer_count = 0
        self._timers_max = TIMERS_SWEPT_MIN     # above: remove the cancelled ones
        self._posted: Deque[Tuple[Callable[..., None], Tuple[Any, ...]]] = collections.deque()
        self._polling = False           # True: a poster must write to the wake socket
        self._stopping = False
        self._flushes: List[Callable[[], None]] = []
        # Work for clients gets CLIENTS_SECONDS of each part of a turn; the rest has to wait.
        self._patient: Set[int] = set()         # descriptors
        self._urgent = make_poll()              # all others: looked at while some are late
        self._late: OrderedDict[int, int] = collections.OrderedDict()   # of _patient -> event
        self._client_calls: Deque[Tuple[Callable[..., None], Tuple[Any, ...]]] = collections.deque()
        self._client_flushes: List[Callable[[], None]] = []
        # flush_soon(flush) calls it at the end of this turn; flush_in_turn(flush) then or at the
        # end of a later one, within the time for clients.
        self.flush_soon = self._flushes.append
        self.flush_in_turn = self._client_flushes.append
        wake_in, wake_out = os.pipe()
        os.set_blocking(wake_in, False)
        os.set_blocking(wake_out, False)
        self._wake_in = open(wake_in, "rb", buffering=0)
        self._wake_out = open(wake_out, "wb", buffering=0)
        self._wake_lock = threading.Lock()      # a leaf: _wake_out is open during a write
        self._workers: Dict[WorkKind, Workers] = {}
        self._look_ups: Dict[Tuple[str, int], List[Timer]] = {}     # (host, port) -> callbacks
        self._set_date(self._turned_at)
        self.register(self._wake_in, selectors.EVENT_READ, self._drain_wake)

    def call_later(self, delay_s: float, callback: Callable[..., None], *args: Any) -> Timer:
        timer = Timer(callback, args)
        self._schedule(delay_s, timer)
        return timer

    def every(self, period_s: float, callback: Callable[[], None]) -> Timer:
        """Call every period_s, first after one, until cancelled; a stall drops missed calls."""
        def call() -> None:
            self._schedule(period_s, timer)
            callback()

        timer = self.call_later(period_s, call)
        return timer

    def _schedule(self, delay_s: float, timer: Timer) -> None:
        self._timer_count += 1
        if len(self._timers) >= self._timers_max:
            self._timers = [entry for entry in self._timers if entry[2].callback is not None]
            heapq.heapify(self._timers)
            self._timers_max = max(2 * len(self._timers), TIMERS_SWEPT_MIN)
        heapq.heappush(self._timers, (self.now() + delay_s, self._timer_count, timer))

    def call_soon(self, callback: Callable[..., None], *args: Any) -> None:
        """Call in this turn, or in the next one."""
        self._posted.append((callback, args))

    def call_soon_threadsafe(self, callback: Callable[..., None], *args: Any) -> None:
        """Call on the reactor's thread.  Thread: any."""
        self._posted.append((callback, args))
        if self._polling:
            self._polling = False
            with self._wake_lock:
                if not self._wake_out.closed:
                    self._wake_out.write(b"\0")     # a full pipe wakes the reactor as well

    def run_blocking(
        self, work: Callable[..., Any], *args: Any, kind: WorkKind,
        done: Callable[[Optional[BaseException], Any], None],
    ) -> None:
        """Run `work(*args)` on a thread for its kind, then done(error, result) in the reactor."""
        if kind not in self._workers:
            self._workers[kind] = Workers(kind, self.call_soon_threadsafe)
        self._workers[kind].submit(work, args, done)

    def look_up(
        self, host: str, port: int, done: Callable[[Optional[BaseException], Any], None]
    ) -> Timer:
        """Call done(error, result of getaddrinfo), unless the returned Timer is cancelled."""
        waiter = Timer(done, ())
        waiters = self._look_ups.get((host, port))
        if waiters is not None:         # share the thread, which a name server may keep waiting
            waiters[:] = [other for other in waiters if other.callback is not None]
            waiters.append(waiter)
            return waiter
        self._look_ups[host, port] = [waiter]

        def found(error: Optional[BaseException], addresses: Any) -> None:
            for waiter in self._look_ups.pop((host, port)):
                if waiter.callback is not None:
                    waiter.callback(error, addresses)

        self.run_blocking(
            socket.getaddrinfo, host, port, 0, socket.SOCK_STREAM, kind=NAME_WORK, done=found
        )
        return waiter

    def register(
        self, sock: Pollable, events: int, callback: Callable[[int], None], *,
        patient: bool = False,
    ) -> None:
        """Call callback(mask) whenever `sock` is ready for any of `events`, selectors.EVENT_*.

        A socket must be unregistered before it is closed.  patient: if many sockets are ready,
        this one may wait for a later turn, in the order in which they became ready.
        """
        descriptor = sock.fileno()
        self._epoll.register(descriptor, _EPOLL_EVENTS[events])
        self._callbacks[descriptor] = callback
        if patient:
            self._patient.add(descriptor)
        else:
            self._urgent.register(descriptor, _EPOLL_EVENTS[events])

    def modify(self, sock: Pollable, events: int, callback: Callable[[int], None]) -> None:
        descriptor = sock.fileno()
        self._epoll.modify(descriptor, _EPOLL_EVENTS[events])
        self._callbacks[descriptor] = callback
        if descriptor not in self._patient:
            self._urgent.modify(descriptor, _EPOLL_EVENTS[events])

    def unregister(self, sock: Pollable) -> None:
        descriptor = sock.fileno()
        del self._callbacks[descriptor]
        if descriptor in self._patient:
            self._patient.remove(descriptor)
            self._late.pop(descriptor, None)
        else:
            self._urgent.unregister(descriptor)
        self._gone.add(descriptor)
        self._epoll.unregister(descriptor)

    def call_in_turn(self, callback: Callable[..., None], *args: Any) -> None:
        """Call in this turn or a later one, in order, within the time for clients."""
        self._client_calls.append((callback, args))

    def run(self) -> None:
        self._turned_at = self.now()
        while not self._stopping:
            self._turn(self._poll())

    def close(self) -> None:
        """Release threads and pipes; all sockets are closed before."""
        for workers in self._workers.values():
            workers.stop()
        self._epoll.close()
        with self._wake_lock:
            self._wake_out.close()
        self._urgent.close()
        self._wake_in.close()

    @property
    def is_quiet(self) -> bool:
        """True if this turn has served at most one socket, and nothing waits for its end."""
        return self.ready_sockets < 2 and not (
            self._flushes or self._client_flushes or self._posted or self._client_calls
            or self._late
        )

    def stop(self) -> None:
        """End run() after the current turn.  Thread: any."""
        self._stopping = True
        self.call_soon_threadsafe(lambda: None)

    def _poll(self) -> List[Tuple[int, int]]:
        wait_s: Optional[float] = None
        if self._timers:                # epoll rounds up to milliseconds; below 0 it never ends
            wait_s = self._timers[0][0] - self._turned_at
            if wait_s < 0.0:
                wait_s = 0.0
        self._polling = True            # set before _posted is read: no wake-up is lost
        if (self._posted or self._flushes or self._late or self._client_calls
                or self._client_flushes):
            wait_s = 0.0
        if self._late:
            events = self._urgent.poll(0.0)
        else:
            events = self._epoll.poll(wait_s) if wait_s == 0.0 else self._wait(wait_s)
        self._polling = False
        return events

    def _wait(self, wait_s: Optional[float]) -> List[Tuple[int, int]]:
        """Wait for a socket: awake for a short time if the last waits were short, then asleep.

        Falling asleep and waking takes 50 us, about as long as a client on this machine takes for
        its next request: awake, GETs on one connection are answered at 1.8 times the rate.
        """
        poll, clock, began = self._epoll.poll, self.now, self._turned_at
        while self._quick_waits >= QUICK_WAITS_MIN:
            events = poll(0)
            if events or self._posted:
                return events
            if clock() - began > AWAKE_SECONDS:
                self._quick_waits = 0
        events = poll(wait_s)
        self._quick_waits = self._quick_waits + 1 if clock() - began < QUICK_SECONDS else 0
        return events

    def _turn(self, events: List[Tuple[int, int]]) -> None:
        clock, phases = self.now, self.phase_seconds
        self.ready_sockets = len(events)
        started = clock()
        phases["waiting"] += started - self._turned_at
        if started >= self._date_until:
            self._set_date(started)
        callbacks, gone = self._callbacks, self._gone
        if gone:
            gone.clear()
        until, count, is_late = started + CLIENTS_SECONDS, 0, False
        for descriptor, mask in events:
            if is_late and descriptor in self._patient:
                self._late[descriptor] = mask
                continue
            callback = callbacks.get(descriptor)
            if callback is not None and not (gone and descriptor in gone):
                callback(_READY[mask])
                count += 1
                if not count % CLOCK_STRIDE:
                    is_late = clock() > until
        if self._late:
            self._serve_late(until)
        served = called = clock()
        phases["sockets"] += served - started
        if self._timers and self._timers[0][0] <= served:
            self._run_timers(served)
            called = clock()
            phases["timers"] += called - served
        if self._posted or self._client_calls:
            timed = called
            for _ in range(len(self._posted)):
                posted, args = self._posted.popleft()
                posted(*args)
            if self._client_calls:
                self._run_client_calls(clock() + CLIENTS_SECONDS)
            called = clock()
            phases["posted"] += called - timed
        self.on_turn()
        done = clock()
        phases["server"] += done - called
        if self._flushes:
            for flush in self._flushes:     # and those added meanwhile
                flush()
            self._flushes.clear()
        if self._client_flushes:
            self._flush_clients(done + CLIENTS_SECONDS)
        self._turned_at = ended = clock()
        phases["flush"] += ended - done
        self.turns += 1
        if ended - started > self.slowest_turn_s:
            self.slowest_turn_s = ended - started
        self.on_turned(ended - started)

    def _serve_late(self, until: float) -> None:
        """Serve the sockets that the last turn had no time for."""
        late = self._late
        while late and self.now() <= until:
            descriptor, mask = late.popitem(last=False)
            self._callbacks[descriptor](_READY[mask])

    def _run_client_calls(self, until: float) -> None:
        calls = self._client_calls
        for _ in range(len(calls)):     # those added meanwhile belong to the next turn
            callback, args = calls.popleft()
            callback(*args)
            if self.now() > until:
                return

    def _flush_clients(self, until: float) -> None:
        flushes, count = self._client_flushes, 0
        for flush in flushes:           # and those added meanwhile
            flush()
            count += 1
            if not count % CLOCK_STRIDE and self.now() > until:
                break
        del flushes[:count]

    def _run_timers(self, now: float) -> None:
        while self._timers and self._timers[0][0] <= now:
            timer = heapq.heappop(self._timers)[2]
            if timer.callback is not None:
                timer.callback(*timer.args)

    def _set_date(self, now: float) -> None:
        """Make the value of the Date header for the rest of this second."""
        wall_ns = self.wall_ns()
        self.http_date = formatdate(wall_ns // NS, usegmt=True)
        self._date_until = now + 1.0 - wall_ns % NS / NS

    def _drain_wake(self, mask: int) -> None:
        self._wake_in.read(4096)        # the rest makes it ready again
