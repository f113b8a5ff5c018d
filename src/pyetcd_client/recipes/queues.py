"""Queues."""

from __future__ import annotations

import contextlib
import re
import uuid
from collections import deque
from collections.abc import Iterable
from typing import Callable, NamedTuple

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
from ..transport.results import _T, Node, Result
from .basics import (
    LEASE_TTL_S,
    WAIT_SLICE_S,
    _append_once,
    _checked_ttl,
    _cleanup_scope,
    _create_once,
    _entries,
    _is_entry,
    _name,
    _number,
    _read,
    _Recipe,
    _recipe_key,
    _remove,
    _Wait,
    _with_retries,
)
from .leases import Lease
from .locks import Contender

TAKEN_TTL_S = 120               # lifetime of the mark of an item that was taken
PRIORITY = 100                  # default priority of an item


class _Item(NamedTuple):
    uid: str                                        # the same in both files of an item that was
    value: str                                      # written twice after a lost reply
    priority: int
    node: Node                                      # its first file
    mark: str                                       # the value that this consumer writes to take it

    @classmethod
    def of(cls, node: Node, root: str) -> _Item:
        """Return the item in a file; other programs may create files by hand."""
        found = _ITEM.fullmatch(node.value or "") if _is_entry(node) else None
        uid, priority, value = found.groups() if found else (
            node.key[len(root):], PRIORITY, node.value or "")
        return cls(uid, value, int(priority), node, uuid.uuid4().hex + ":" + _name(node.key))

    def order(self) -> tuple[int, int]:
        node = self.node
        return self.priority, _number(node) if _is_entry(node) else node.created_index


_ITEM = re.compile(r"([0-9a-f]{32}):(-?[0-9]{1,9}):(.*)", re.DOTALL)


class QueueItem:
    """An item that this process works on, from Queue.take; `value` is the one given to `put`.

    A context manager: the item is done after the block, or given back after an exception.
    """

    def __init__(self, queue: Queue, item: _Item, lease: Lease) -> None:
        self.value = item.value
        self._queue = queue
        self._item = item
        self._lease = lease

    @property
    def is_held(self) -> bool:
        """True as long as no other consumer can have the item."""
        return self._lease.is_held

    def done(self) -> bool:
        """Remove the item; False if another consumer has removed it."""
        try:
            return self._queue._remove(self._item)
        finally:
            self._lease.stop()

    def give_back(self) -> None:
        """Return the item to the queue."""
        self._lease.stop()

    def __enter__(self) -> QueueItem:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.done()
        else:
            self.give_back()


class Queue(_Recipe):
    """A first in, first out queue for any number of producers and consumers in the cluster.

        queue = Queue(client, "/jobs")
        queue.put("one")
        queue.put("urgent", priority=1)             # before items with a higher number
        queue.get(timeout=5)                        # "urgent", or None after 5 s
        with queue.take(timeout=5) as item:         # at least once
            work(item.value)

    Guarantee: after put returns, the item is in the queue once.  Items are removed once, ordered
    by priority, then by creation.  `get` hands each item to one consumer, which may crash with
    it.  An item of `take` returns to the queue ttl seconds after a crash, until done has removed
    it.  A consumer that finds the queue empty reads it once, and the cost of an item does not
    depend on the number of earlier items.  A new item wakes one of the waiting consumers; the
    others wait in a line.
    How: an item is an in-order file with a uuid.  To take it a consumer creates a hidden mark for
    this uuid, at which only one can succeed, and then deletes the file.  A second file of the
    same item, from a lost reply, is recognised by the mark, which stays for TAKEN_TTL_S.
    Limit: after an error with maybe_applied, and if a request is executed more than TAKEN_TTL_S
    late, an item may appear twice or be lost with its consumer.  A consumer that crashes between
    mark and deletion delays its item for TAKEN_TTL_S.  Consumers of one queue use either get or
    take: get may remove an item that was taken.  A consumer lists the whole directory and takes
    the listed items before it lists again (an urgent item that arrives meanwhile comes later):
    suitable for thousands of items, not for millions.
    Differs from 0.4.0: its items are read, but 0.4.0 cannot read the present ones.

    ttl      seconds by which a crash delays an item that was taken, or the line

    Thread: any.
    """

    def __init__(self, client: Client, key: str, *, ttl: int = LEASE_TTL_S) -> None:
        super().__init__(client, _recipe_key(key))
        self.ttl = _checked_ttl(ttl)
        self._items = f"{self.path}/items"
        self._after_fork()

    def put(self, value: str, priority: int = PRIORITY) -> str:
        """Add an item, behind all of the same priority (lower numbers first); return its key."""
        uid = uuid.uuid4().hex
        text = f"{uid}:{priority:d}:{_text(value)}"

        def find() -> Node | None:
            with contextlib.suppress(KeyNotFound):  # found: it was taken already
                return _read(self.client, self._mark_of(uid)).node
            nodes, _ = _entries(self.client, self._items)
            return next((node for node in nodes if node.value == text), None)
        return _append_once(self.client, self._items, text, None, find)[0].key

    def put_all(self, values: Iterable[str], priority: int = PRIORITY) -> list[str]:
        """Add items in order; return their keys."""
        return [self.put(value, priority) for value in values]

    def get(self, timeout: float | None = None) -> str | None:
        """Remove the first item and return its value; None after the timeout, or `cancel`.

        timeout  seconds; None: no limit; 0: do not wait
        """
        return self._first(timeout, lambda item: item.value if self._remove(item) else None)

    def take(self, timeout: float | None = None) -> QueueItem:
        """Return the first item that no other consumer works on.  Raises WatchTimeout."""
        item = self._first(timeout, self._claim)
        if item is None:
            raise WatchTimeout("no item in time", cause=self.path)
        return item

    def __len__(self) -> int:
        """Return the number of items, including those that consumers work on."""
        free, claimed, _ = self._list()
        return len(free) + claimed

    def _after_fork(self) -> None:
        super()._after_fork()
        # Items of the last listing.  Append and pop are atomic; an item may be gone.
        self._seen: deque[_Item] = deque()

    def _mark_of(self, uid: str) -> str:
        return f"{self.path}/_taken/{uid}"

    def _list(self) -> tuple[list[_Item], int, int]:
        """Return the free items in order, the number of claimed ones, and the index."""
        try:
            found = _read(self.client, self.path, recursive=True)
        except KeyNotFound as error:
            return [], 0, error.index
        files = [node for node in found.node.walk() if not node.dir]
        claims = {_name(node.key) for node in files if node.key.startswith(f"{self.path}/claims/")}
        first: dict[str, _Item] = {}
        # A file with a ttl is a mark of 0.4.0.
        for node in files:
            if node.ttl is None and node.key.startswith(f"{self._items}/"):
                item = _Item.of(node, self._items + "/")
                first[item.uid] = min(item, first.get(item.uid, item), key=_Item.order)
        items = sorted(first.values(), key=_Item.order)
        free = [item for item in items if item.uid not in claims]
        return free, len(items) - len(free), found.etcd_index

    def _first(self, timeout: float | None, obtain: Callable[[_Item], _T | None]) -> _T | None:
        """Return the first result of `obtain` that is not None; None after timeout or `cancel`."""
        with self._call_scope(timeout) as scope:
            found, _ = self._try(obtain)
            if found is not None or not scope.wait_s():
                return found
            line = Contender(self.client, f"{self.path}/_waiting", ttl=self.ttl)
            if not line.acquire():
                return None
            try:
                return self._poll(scope, lambda: self._try(obtain), min(WAIT_SLICE_S, self.ttl))
            finally:
                with _cleanup_scope():
                    line.release()
        return None

    def _is_arrival(self, event: Result) -> bool:
        """Return whether there may be an item: a new one, or one that was given back."""
        if event.key.startswith(f"{self.path}/claims/"):
            return event.action in _REMOVALS
        return event.action in ("create", "set")

    def _try(self, obtain: Callable[[_Item], _T | None]) -> tuple[_T | None, _Wait]:
        """Try the items of the last listing, then those of a new one."""
        while self._seen:
            with contextlib.suppress(IndexError):   # another thread was faster
                found = obtain(self._seen.popleft())
                if found is not None:
                    return found, _Wait(self.path, 0)
        free, _, index = self._list()
        wait = _Wait(self.path, index, self._is_arrival)
        for position, item in enumerate(free):
            found = obtain(item)
            if found is not None:
                self._seen.extend(free[position + 1:])
                return found, wait
        return None, wait

    def _remove(self, item: _Item) -> bool:
        """Remove an item; False if another consumer has removed it."""
        try:
            _create_once(self.client, self._mark_of(item.uid), item.mark, TAKEN_TTL_S)
        except NodeExists:
            self._is_taken(item)
            return False
        except EtcdError as error:
            self._unmark(item)
            error.maybe_applied = False             # the item is in the queue
            raise
        return self._delete(item)

    def _unmark(self, item: _Item) -> None:
        """Let other consumers have an item that this one could not take."""
        with _cleanup_scope():
            _remove(self.client, self._mark_of(item.uid), item.mark)

    def _is_taken(self, item: _Item) -> bool:
        """Return whether the item has a mark; if it was taken as another file, delete this one."""
        try:
            mark = _read(self.client, self._mark_of(item.uid)).node.value or ""
        except KeyNotFound:
            return False
        if mark.rpartition(":")[2] != _name(item.node.key):
            with contextlib.suppress(EtcdError):
                self.client.compare_and_delete(item.node.key, prev_index=item.node.modified_index)
        return True

    def _delete(self, item: _Item) -> bool:
        """Delete the file of an item; False if another consumer has deleted it."""
        unsure = False

        def attempt() -> bool:
            nonlocal unsure
            try:
                self.client.compare_and_delete(item.node.key, prev_index=item.node.modified_index)
            except (KeyNotFound, CompareFailed) as error:
                # Other consumers leave it alone until our mark expires.
                return unsure and isinstance(error, KeyNotFound) and item.mark == _read(
                    self.client, self._mark_of(item.uid)).node.value
            except EtcdError as error:
                unsure = unsure or error.maybe_applied
                raise
            return True
        try:
            return _with_retries(self.client, attempt)
        except EtcdError as error:
            if not error.maybe_applied:
                self._unmark(item)
            raise

    def _claim(self, item: _Item) -> QueueItem | None:
        lease = Lease(self.client, f"{self.path}/claims/{item.uid}", ttl=self.ttl)
        claimed, ours = None, True
        try:
            lease.start()
            # Another consumer may have claimed and finished the item since the listing.
            index = _read(self.client, item.node.key).node.modified_index
            if index == item.node.modified_index and not self._is_taken(item):
                claimed = QueueItem(self, item, lease)
        except (NodeExists, LockExpired):
            ours = False
        except KeyNotFound:
            pass
        finally:
            if ours and claimed is None:
                with _cleanup_scope():
                    lease._end()
                    lease._remove_file()
        return claimed
