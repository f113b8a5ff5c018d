"""Listings of directories: written in slices, and shared by requests."""

from __future__ import annotations

import functools
from typing import Any, Callable, Dict, NamedTuple, Optional, Tuple, Union

from ..base.errors import EtcdError
from ..net.http_requests import HttpRequest
from ..net.reactor import Reactor
from ..net.workers import Timer
from ..store.tree import Store
from ..store.walks import LISTING_SLICE_WORK, Listing


class ListingRequest(NamedTuple):
    """The options of a GET of a directory; path is internal."""

    path: str
    recursive: bool
    sorted: bool


class ListingWaiter:
    """A request that waits for a listing; done(Listing, or EtcdError) is called once."""

    __slots__ = ("done", "group")

    def __init__(self, done: Callable[[Any], None]) -> None:
        self.done = done
        self.group: Dict[ListingWaiter, None] = {}      # waits for the same listing


class Listings:
    """Makes listings as JSON: long ones in slices, one slice per turn, so that nothing stalls.

    One listing is made after the other, each of the state at its first slice.  Equal requests
    share a listing if they wait at the same time, or come before the store changes.
    Thread: reactor.
    """

    KEPT_BYTES_MAX = 16 << 20       # of complete listings, kept until the store changes
    KEPT_SECONDS = 5.0

    def __init__(self, store: Store, reactor: Reactor) -> None:
        self._store = store
        self._reactor = reactor
        self._current: Optional[Tuple[ListingRequest, Listing]] = None
        self._waiters: Dict[ListingWaiter, None] = {}           # for the current listing
        self._queue: Dict[ListingRequest, Dict[ListingWaiter, None]] = {}     # by arrival
        self._kept: Dict[ListingRequest, Listing] = {}
        self._kept_bytes = 0
        self._expiry: Optional[Timer] = None
        self._is_posted = False         # a slice is scheduled: never two in one turn
        self._turn = 0                  # of the reactor, to which _work_done belongs
        self._work_done = 0

    def ask(
        self, wanted: ListingRequest, request: HttpRequest, done: Callable[[Any], None]
    ) -> None:
        """Call done(Listing, or EtcdError): at once for a short listing, if the turn has time."""
        kept = self._kept.get(wanted)
        if kept is not None and kept.index == self._store.current_index:
            done(kept)
            return
        waiter = ListingWaiter(done)
        request.on_close = functools.partial(self._leave, waiter)
        if self._join(wanted, waiter):
            return
        if self._work_left() <= 0 or wanted in self._queue:
            self._enqueue(wanted, waiter)
            return
        try:
            listing = self._start_listing(wanted)
        except EtcdError as error:
            done(error)
            return
        if listing.done:
            done(listing)
        elif self._current is None:
            self._current, self._waiters = (wanted, listing), {}
            self._enter(waiter, self._waiters)
            self._schedule_slice()
        else:
            listing.end()
            self._enqueue(wanted, waiter)

    def _join(self, wanted: ListingRequest, waiter: ListingWaiter) -> bool:
        """Share the listing under way if a new one would be the same; return whether it is."""
        if self._current is None:
            return False
        its, listing = self._current
        if its != wanted or listing.index != self._store.current_index:
            return False
        self._enter(waiter, self._waiters)
        return True

    def _enqueue(self, wanted: ListingRequest, waiter: ListingWaiter) -> None:
        if self._current is None and not self._queue:
            self._schedule_slice()
        self._enter(waiter, self._queue.setdefault(wanted, {}))

    @staticmethod
    def _enter(waiter: ListingWaiter, group: Dict[ListingWaiter, None]) -> None:
        group[waiter] = None
        waiter.group = group

    def _leave(self, waiter: ListingWaiter) -> None:
        """Forget a waiter whose client is gone, and end a listing without waiters."""
        waiter.group.pop(waiter, None)
        if self._current is not None and not self._waiters:
            self._current[1].end()
            self._current = None

    def _work_left(self) -> int:
        """Return the number of nodes that this turn may still visit."""
        if self._turn != self._reactor.turns:
            self._turn, self._work_done = self._reactor.turns, 0
        return LISTING_SLICE_WORK - self._work_done

    def _start_listing(self, wanted: ListingRequest) -> Listing:
        listing = self._store.listing(
            wanted.path, recursive=wanted.recursive, sorted=wanted.sorted,
            now_ns=self._reactor.wall_ns(),
        )
        self._work(wanted, listing)
        return listing

    def _work(self, wanted: ListingRequest, listing: Listing) -> None:
        before = listing.work_done
        listing.work(max(self._work_left(), 1))
        self._work_done += listing.work_done - before
        size = sum(map(len, listing.chunks)) if listing.done and listing.cacheable else 0
        if size and self._kept_bytes + size <= self.KEPT_BYTES_MAX:
            self._keep(wanted, listing, size)

    def _keep(self, wanted: ListingRequest, listing: Listing, size: int) -> None:
        if wanted in self._kept or listing.index != self._store.current_index:
            self._forget()
        self._kept[wanted] = listing
        self._kept_bytes += size
        if self._expiry is None:
            self._expiry = self._reactor.call_later(self.KEPT_SECONDS, self._forget)

    def _forget(self) -> None:
        self._kept, self._kept_bytes = {}, 0
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None

    def _schedule_slice(self) -> None:
        if not self._is_posted:
            self._is_posted = True
            self._reactor.call_in_turn(self._make_slice)

    def _make_slice(self) -> None:
        """Make one slice of the listing under way, or of the next one."""
        self._is_posted = False
        if self._current is None:
            while self._queue and not self._waiters:
                wanted = next(iter(self._queue))
                self._waiters = self._queue.pop(wanted)
            if not self._waiters:
                return                  # all have left
            try:
                self._current = wanted, self._start_listing(wanted)
            except EtcdError as error:
                self._finish(error)
        else:
            self._work(*self._current)
        if self._current is not None and self._current[1].done:
            self._finish(self._current[1])
        if self._current is not None or self._queue:
            self._schedule_slice()

    def _finish(self, result: Union[Listing, EtcdError]) -> None:
        waiters, self._waiters, self._current = self._waiters, {}, None
        for waiter in waiters:
            self._reactor.call_in_turn(waiter.done, result)
