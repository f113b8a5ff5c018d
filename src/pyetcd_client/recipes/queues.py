"""Queues."""

from __future__ import annotations

import contextlib
import re
import uuid
from collections import deque
from typing import Callable, Deque, Dict, Iterable, List, NamedTuple, Optional, Tuple, Type

from ..client.client import Client
from ..client.watching import _REMOVALS
from ..transport.calls import _text
from ..transport.errors import (
    CompareFailed,
    EtcdError,
    KeyNotFound,
    LockExpired,
    NodeExists,
    WatchTimeout,
)
from ..transport.results import Node, Result
from .basics import (
    LEASE_TTL_S,
    TIDY_S,
    WAIT_SLICE_S,
    _apart,
    _append_once,
    _await,
    _checked_ttl,
    _create_once,
    _entries,
    _insist,
    _is_entry,
    _name,
    _number,
    _read,
    _Recipe,
    _recipe_key,
    _remove,
)
from .elections import PRIORITY, TAKEN_TTL_S
from .leases import Lease
from .locks import Contender


class _Item(NamedTuple):
    """An item of a queue, as a look found it."""

    uid: str                                        # tells it from others, and stays when it is
    value: str                                      # written twice after a lost answer
    priority: int
    node: Node                                      # its first entry
    mark: str                                       # what we write when we take it

    @classmethod
    def of(cls, node: Node, root: str) -> _Item:
        """Return the item in a file; any program may put one there by hand."""
        found = _ITEM.fullmatch(node.value or "") if _is_entry(node) else None
        uid, priority, value = found.groups() if found else (
            node.key[len(root):], PRIORITY, node.value or "")
        return cls(uid, value, int(priority), node, uuid.uuid4().hex + ":" + _name(node.key))

    def place(self) -> Tuple[int, int]:
        """Return what items are ordered by."""
        node = self.node
        return self.priority, _number(node) if _is_entry(node) else node.created_index


_ITEM = re.compile(r"([0-9a-f]{32}):(-?[0-9]{1,9}):(.*)", re.DOTALL)


class QueueItem:
    """An item that this process works on; from Queue.take.

    value  what was put

    A context manager: without an exception the item is done, with one it is given back.
    """

    def __init__(self, queue: Queue, item: _Item, lease: Lease) -> None:
        self.value = item.value
        self._queue = queue
        self._item = item
        self._lease = lease

    @property
    def is_held(self) -> bool:
        """Whether no other consumer can have got the item meanwhile."""
        return self._lease.is_held

    def done(self) -> bool:
        """Remove the item; False if another consumer has removed it first."""
        try:
            return self._queue._remove(self._item)
        finally:
            self._lease.stop()

    def give_back(self) -> None:
        """Let another consumer have the item."""
        self._lease.stop()

    def __enter__(self) -> QueueItem:
        return self

    def __exit__(self, kind: Optional[Type[BaseException]], *_: object) -> None:
        if kind is None:
            self.done()
        else:
            self.give_back()


class Queue(_Recipe):
    """A queue in the cluster: first in, first out, any number of producers and consumers.

        queue = Queue(client, "/jobs")
        queue.put("one")
        queue.put("urgent", priority=1)             # before those with a higher number
        queue.get(timeout=5)                        # "urgent", or None after 5 s
        with queue.take(timeout=5) as item:         # at least once
            work(item.value)

    Guarantee: what put has returned for is in the queue once.  An item is removed once, in the
    order of priority, then of their making: `get` hands each to one consumer only, which may
    crash with it; what `take` hands out comes back, ttl seconds after a crash, until done has
    removed it.  A consumer that finds its queue empty looks once, and its work for an item does
    not depend on how many were taken before.  An idle queue wakes one of the waiting consumers
    for each item; the others stand in line.
    How: an item is an in-order file with a uuid in it.  To take it is to write a hidden mark for
    this uuid, which only one consumer can do, and then to delete the file.  A second file of the
    same item, from an answer that was lost, is known by the mark, which stays for TAKEN_TTL_S.
    Limit: after an error with maybe_applied, and when a request is executed more than TAKEN_TTL_S
    late, an item may be there twice or lost with its consumer.  A consumer that crashes between
    mark and deletion delays its item for TAKEN_TTL_S.  Consumers of one queue use either get or
    take: a get may remove what another one has taken.  A consumer reads the whole directory, and
    then takes what it has seen (an urgent item that was put meanwhile comes after that): made for
    thousands of items, not for millions.
    Differs from 0.4.0: that could not read the items put now; those it has put are taken.

    ttl      seconds a crashed consumer delays what it had taken, or the line

    Thread: any.
    """

    def __init__(self, client: Client, key: str, *, ttl: int = LEASE_TTL_S) -> None:
        super().__init__(client)
        self.path = _recipe_key(key)
        self.ttl = _checked_ttl(ttl)
        self._items = f"{self.path}/items"
        self._after_fork()

    def put(self, value: str, priority: int = PRIORITY) -> str:
        """Add an item, behind all of the same priority; return its key.

        priority  lower ones are taken first
        """
        uid = uuid.uuid4().hex
        text = f"{uid}:{priority:d}:{_text(value)}"

        def find() -> Optional[Node]:
            with contextlib.suppress(KeyNotFound):  # perhaps it was taken already
                return _read(self.client, self._mark_of(uid)).node
            nodes, _ = _entries(self.client, self._items)
            return next((node for node in nodes if node.value == text), None)
        return _append_once(self.client, self._items, text, None, find)[0].key

    def put_all(self, values: Iterable[str], priority: int = PRIORITY) -> List[str]:
        """Add items one after the other; return their keys."""
        return [self.put(value, priority) for value in values]

    def get(self, timeout: Optional[float] = None) -> Optional[str]:
        """Remove the first item and return its value; None after `timeout` seconds (None: never).

        With timeout=0 it does not wait.  None after `cancel`, too.
        """
        item = self._first(timeout, self._remove)
        return None if item is None else item.value

    def take(self, timeout: Optional[float] = None) -> QueueItem:
        """Return the first item that nobody works on.

        Raises WatchTimeout where `get` returns None, since a `with` needs an item.
        """
        leases: List[Lease] = []
        item = self._first(timeout, lambda item: self._claim(item, leases))
        if item is None:
            raise WatchTimeout("no item in time", cause=self.path)
        return QueueItem(self, item, leases[0])

    def __len__(self) -> int:
        """Return the number of items, those included that somebody works on."""
        free, claimed, _ = self._look()
        return len(free) + claimed

    # -- below: no public names

    def _after_fork(self) -> None:
        super()._after_fork()
        self._seen: Deque[_Item] = deque()          # items of the last look; append and pop are
                                                    # atomic, and all it gives is hints

    def _mark_of(self, uid: str) -> str:
        return f"{self.path}/_taken/{uid}"

    def _look(self) -> Tuple[List[_Item], int, int]:
        """Return the items that are free, first one first, how many are claimed, and the index."""
        try:
            found = _read(self.client, self.path, recursive=True)
        except KeyNotFound as error:
            return [], 0, error.index
        files = [node for node in found.node.walk() if not node.dir]
        claims = {_name(node.key) for node in files if node.key.startswith(f"{self.path}/claims/")}
        first: Dict[str, _Item] = {}
        # A file with a ttl is a mark of 0.4.0.
        for node in files:
            if node.ttl is None and node.key.startswith(f"{self._items}/"):
                item = _Item.of(node, self._items + "/")
                first[item.uid] = min(item, first.get(item.uid, item), key=_Item.place)
        items = sorted(first.values(), key=_Item.place)
        free = [item for item in items if item.uid not in claims]
        return free, len(items) - len(free), found.etcd_index

    def _first(self, timeout: Optional[float], obtain: Callable[[_Item], bool]) -> Optional[_Item]:
        """Return the first item that `obtain` gets; None if time is up, or after `cancel`."""
        with self._span(timeout) as span:
            item, _ = self._try(obtain)
            if item is not None or not span.wait_s():
                return item
            line = Contender(self.client, f"{self.path}/_waiting", ttl=self.ttl)
            if not line.acquire():
                return None
            try:
                while True:
                    item, index = self._try(obtain)
                    if item is not None or not _await(
                            self.client, span, self.path, index, min(WAIT_SLICE_S, self.ttl),
                            self._is_arrival):
                        return item
            finally:
                with _apart(TIDY_S):
                    line.release()
        return None

    def _is_arrival(self, event: Result) -> bool:
        """Whether there may be an item now: it is new, or somebody gave it back."""
        if event.key.startswith(f"{self.path}/claims/"):
            return event.action in _REMOVALS
        return event.action in ("create", "set")

    def _try(self, obtain: Callable[[_Item], bool]) -> Tuple[Optional[_Item], int]:
        """Try the items seen last, then those of a new look; return the index of that."""
        while self._seen:
            with contextlib.suppress(IndexError):   # another thread was faster
                item = self._seen.popleft()
                if obtain(item):
                    return item, 0
        free, _, index = self._look()
        for position, item in enumerate(free):
            if obtain(item):
                self._seen.extend(free[position + 1:])
                return item, index
        return None, index

    def _remove(self, item: _Item) -> bool:
        """Remove an item for ever; False if somebody else has done so."""
        try:
            _create_once(self.client, self._mark_of(item.uid), item.mark, TAKEN_TTL_S)
        except NodeExists:
            self._is_taken(item)
            return False
        except EtcdError as error:
            self._unmark(item)
            error.maybe_applied = False             # the item is there
            raise
        return self._delete(item)

    def _unmark(self, item: _Item) -> None:
        """Let others have an item at once that we could not take."""
        with _apart(TIDY_S):
            _remove(self.client, self._mark_of(item.uid), item.mark)

    def _is_taken(self, item: _Item) -> bool:
        """Whether the item has a mark; if it was taken as another file, this one is removed."""
        try:
            mark = _read(self.client, self._mark_of(item.uid)).node.value or ""
        except KeyNotFound:
            return False
        if mark.rpartition(":")[2] != _name(item.node.key):
            with contextlib.suppress(EtcdError):
                self.client.compare_and_delete(
                    item.node.key, prev_index=item.node.modified_index)
        return True

    def _delete(self, item: _Item) -> bool:
        """Delete the file of an item; False if somebody else has."""
        unsure = False

        def attempt() -> bool:
            nonlocal unsure
            try:
                self.client.compare_and_delete(
                    item.node.key, prev_index=item.node.modified_index)
            except (KeyNotFound, CompareFailed) as error:
                # Nobody else deletes it before our mark has expired.
                return unsure and isinstance(error, KeyNotFound) and item.mark == _read(
                    self.client, self._mark_of(item.uid)).node.value
            except EtcdError as error:
                unsure = unsure or error.maybe_applied
                raise
            return True
        try:
            return _insist(self.client, attempt)
        except EtcdError as error:
            if not error.maybe_applied:
                self._unmark(item)
            raise

    def _claim(self, item: _Item, leases: List[Lease]) -> bool:
        lease = Lease(self.client, f"{self.path}/claims/{item.uid}", ttl=self.ttl)
        ours = True
        try:
            lease.start()
            # The item may be gone since it was seen: whoever had claimed it has finished.
            index = _read(self.client, item.node.key).node.modified_index
            if index == item.node.modified_index and not self._is_taken(item):
                leases.append(lease)
        except (NodeExists, LockExpired):
            ours = False
        except KeyNotFound:
            pass
        finally:
            if ours and not leases:
                with _apart(TIDY_S):
                    lease._end()
                    lease._leave()
        return bool(leases)
