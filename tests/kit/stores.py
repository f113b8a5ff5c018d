"""Store: one test per sentence of the keys API, on a clock that is passed in."""

from __future__ import annotations

from typing import List

import pytest

from pyetcd import Event, Store


def delete_expired(store: Store, cutoff_ns: int) -> List[Event]:
    """Do Store.expire() to its end in one turn; return the events that the history still has."""
    before = store.current_index
    store.expire(cutoff_ns)
    while store.is_expiring:
        store.expire(cutoff_ns)
    return [event for event in store.hub.history.events if event.index > before]


def event_line(event: Event) -> bytes:
    return b"".join(event.client_pieces())


def store_json(
    store: Store, path: str, *, recursive: bool = False, sorted: bool = False, now_ns: int
) -> bytes:
    """The line that answers a GET, in one go."""
    body = store.file_json(path, recursive=recursive, now_ns=now_ns)
    if body:
        return b"".join(body)
    listing = store.listing(path, recursive=recursive, sorted=sorted, now_ns=now_ns)
    while not listing.done:
        listing.work()
    return b"".join(listing.chunks)


@pytest.fixture
def store() -> Store:
    return Store()
