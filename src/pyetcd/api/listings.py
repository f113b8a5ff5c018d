"""Listings of directories, written in slices and shared."""

from __future__ import annotations

import functools
from typing import Any, Callable, Dict, NamedTuple, Optional, Tuple, Union

from ..base.errors import EtcdError
from ..net.http_requests import HttpRequest
from ..net.reactor import Reactor
from ..net.workers import Timer
from ..store.tree import Store
from ..store.walks import LISTING_SLICE_WORK, Listing


class Wanted(NamedTuple):
    """What a GET of a directory asks for; path is internal."""

    path: str
    recursive: bool
    sorted: bool


class ListingTaker:
    """A request that waits for a listing; done(Listing, or EtcdError) is called once."""

    __slots__ = ("done", "group")

    def __init__(self, done: Callable[[Any], None]) -> None:
        self.done = done
        self.group: Dict[ListingTaker, None] = {}       # of those that wait for the same


class Listings:
    """Directories as JSON, long ones in slices, a slice per turn: nobody waits for them.

    Listings are made one after the other, each of the state that its first slice finds.  All
    that want the same while they wait share one, as do those that come before the store changes.
    Thread: reactor.
    """

    KEPT_BYTES_MAX = 16 << 20       # of complete ones, as long as the store's index holds
    KEPT_SECONDS = 5.0

    def __init__(self, store: Store, reactor: Reactor) -> None:
        self._store = store
        self._reactor = reactor
        self._current: Optional[Tuple[Wanted, Listing]] = None
        self._takers: Dict[ListingTaker, None] = {}             # of the current one
        self._waiting: Dict[Wanted, Dict[ListingTaker, None]] = {}      # in order of arrival
        self._kept: Dict[Wanted, Listing] = {}
        self._kept_bytes = 0
        self._expiry: Optional[Timer] = None
        self._is_posted = False         # the next slice is on its way: never two in one turn
        self._turn = 0                  # of the reactor
        self._work_done = 0             # in that turn

    def ask(self, wanted: Wanted, request: HttpRequest, done: Callable[[Any], None]) -> None:
        """Call done(Listing, or EtcdError): at once if it is short, and not too many are."""
        kept = self._kept.get(wanted)
        if kept is not None and kept.index == self._store.current_index:
            done(kept)
            return
        taker = ListingTaker(done)
        request.on_close = functools.partial(self._leave, taker)
        if self._join(wanted, taker):
            return
        if self._work_left() <= 0 or wanted in self._waiting:
            self._wait(wanted, taker)
            return
        try:
            listing = self._begin(wanted)
        except EtcdError as error:
            done(error)
            return
        if listing.done:
            done(listing)
        elif self._current is None:
            self._current, self._takers = (wanted, listing), {}
            self._enter(taker, self._takers)
            self._post()
        else:
            listing.end()
            self._wait(wanted, taker)

    def _join(self, wanted: Wanted, taker: ListingTaker) -> bool:
        """Have a share in the listing under way, if it is as good as a new one."""
        if self._current is None:
            return False
        its, listing = self._current
        if its != wanted or listing.index != self._store.current_index:
            return False
        self._enter(taker, self._takers)
        return True

    def _wait(self, wanted: Wanted, taker: ListingTaker) -> None:
        if self._current is None and not self._waiting:
            self._post()
        self._enter(taker, self._waiting.setdefault(wanted, {}))

    @staticmethod
    def _enter(taker: ListingTaker, group: Dict[ListingTaker, None]) -> None:
        group[taker] = None
        taker.group = group

    def _leave(self, taker: ListingTaker) -> None:
        """The client is gone; a listing for nobody ends, or is never begun."""
        taker.group.pop(taker, None)
        if self._current is not None and not self._takers:
            self._current[1].end()
            self._current = None

    def _work_left(self) -> int:
        """How many more nodes this turn may look at."""
        if self._turn != self._reactor.turns:
            self._turn, self._work_done = self._reactor.turns, 0
        return LISTING_SLICE_WORK - self._work_done

    def _begin(self, wanted: Wanted) -> Listing:
        listing = self._store.listing(
            wanted.path, recursive=wanted.recursive, sorted=wanted.sorted,
            now_ns=self._reactor.wall_ns(),
        )
        self._work(wanted, listing)
        return listing

    def _work(self, wanted: Wanted, listing: Listing) -> None:
        before = listing.work_done
        listing.work(max(self._work_left(), 1))
        self._work_done += listing.work_done - before
        size = sum(map(len, listing.chunks)) if listing.done and listing.cacheable else 0
        if size and self._kept_bytes + size <= self.KEPT_BYTES_MAX:
            self._keep(wanted, listing, size)

    def _keep(self, wanted: Wanted, listing: Listing, size: int) -> None:
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

    def _post(self) -> None:
        if not self._is_posted:
            self._is_posted = True
            self._reactor.call_in_turn(self._go_on)

    def _go_on(self) -> None:
        """One slice: of the listing under way, or of the next."""
        self._is_posted = False
        if self._current is None:
            while self._waiting and not self._takers:
                wanted = next(iter(self._waiting))
                self._takers = self._waiting.pop(wanted)
            if not self._takers:
                return                  # all have left
            try:
                self._current = wanted, self._begin(wanted)
            except EtcdError as error:
                self._finish(error)
        else:
            self._work(*self._current)
        if self._current is not None and self._current[1].done:
            self._finish(self._current[1])
        if self._current is not None or self._waiting:
            self._post()

    def _finish(self, result: Union[Listing, EtcdError]) -> None:
        takers, self._takers, self._current = self._takers, {}, None
        for taker in takers:
            self._reactor.call_in_turn(taker.done, result)
