"""Listings of directories: written in slices, and shared by requests."""

from __future__ import annotations

import functools
from typing import Any, Callable, Dict, NamedTuple, Optional, Union

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


Waiters = Dict[HttpRequest, Callable[[Any], None]]      # request -> done(Listing, or EtcdError)


class CurrentListing(NamedTuple):
    """The listing under way, and the requests that wait for it."""

    wanted: ListingRequest
    listing: Listing
    waiters: Waiters


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
        self._current: Optional[CurrentListing] = None
        self._queue: Dict[ListingRequest, Waiters] = {}     # by arrival
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
        index, current = self._store.current_index, self._current
        kept = self._kept.get(wanted)
        if kept is not None and kept.index == index:
            done(kept)
            return
        if current is not None and current.wanted == wanted and current.listing.index == index:
            waiters = current.waiters
        else:
            listing = None
            if self._work_left() > 0 and wanted not in self._queue:
                try:
                    listing = self._start_listing(wanted)
                except EtcdError as error:
                    done(error)
                    return
                if listing.done:
                    done(listing)
                    return
            waiters = self._line_up(wanted, listing)
        waiters[request] = done
        request.connection.on_close = functools.partial(self._leave, waiters, request)

    def _line_up(self, wanted: ListingRequest, listing: Optional[Listing]) -> Waiters:
        """Go on with a begun listing if it is the only one, else queue `wanted`."""
        self._schedule_slice()
        if listing is not None:
            if self._current is None:
                self._current = CurrentListing(wanted, listing, {})
                return self._current.waiters
            listing.end()
        return self._queue.setdefault(wanted, {})

    def _leave(self, waiters: Waiters, request: HttpRequest) -> None:
        """Forget a request whose client is gone, and end a listing that nobody waits for."""
        waiters.pop(request, None)
        if self._current is not None and not self._current.waiters:
            self._current.listing.end()
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
        self._is_posted = False
        if self._current is None:
            self._begin_next()
        else:
            self._work(self._current.wanted, self._current.listing)
        current = self._current
        if current is not None and current.listing.done:
            self._current = None
            self._tell(current.waiters, current.listing)
        if self._current is not None or self._queue:
            self._schedule_slice()

    def _begin_next(self) -> None:
        while self._queue:
            wanted = next(iter(self._queue))
            waiters = self._queue.pop(wanted)
            if waiters:                 # not all have left
                try:
                    self._current = CurrentListing(wanted, self._start_listing(wanted), waiters)
                except EtcdError as error:
                    self._tell(waiters, error)
                return

    def _tell(self, waiters: Waiters, result: Union[Listing, EtcdError]) -> None:
        for done in waiters.values():
            self._reactor.call_in_turn(done, result)
