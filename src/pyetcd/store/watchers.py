"""The event history, watchers, time to live, and counts of operations."""

from __future__ import annotations

import collections
import heapq
import itertools
import math
from typing import Callable, Deque, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

from ..base.basics import _nothing
from ..base.limits import WATCHERS_MAX, WATCHERS_NOTIFIED_MAX
from ..base.text import json_text
from .events import Event, Texts

TTL_STALE_MIN = 64                  # stale heap entries always tolerated; above and > live: rebuilt


class EventHistory:
    """The last `capacity` events, one per store index, for watches that begin in the past."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.events: Deque[Event] = collections.deque(maxlen=capacity)
        self._back = 0                  # slot of the next event in etcd's ring (event_queue.go)

    @property
    def first_index(self) -> int:
        return self.events[0].index if self.events else 0

    @property
    def last_index(self) -> int:
        return self.events[-1].index if self.events else 0

    def append(self, event: Event) -> None:
        self.events.append(event)
        self._back += 1
        if self._back == self.capacity:
            self._back = 0

    def matches(self, watcher: Watcher) -> Iterator[Event]:
        """Yield the events from index `since` on for a watcher.

        Three oddities are etcd's, and kept because clients see them: hidden keys are not
        filtered; the deletion of a directory counts for every path that begins with its name
        (`/bar` for `/barbaz`); a recursive watch compares all events but the first with
        `path/`, so it misses later ones on exactly `path`.

        Differs from etcd: a stream has no third oddity, for it would lose events.
        Source: etcd 2.3 store/event_history.go, scan.
        """
        path, recursive = watcher.path, watcher.recursive
        below = path if path == "/" else path + "/"
        exact, start = path, max(watcher.since - self.first_index, 0)
        for event in itertools.islice(self.events, start, None):
            if event.refresh:
                continue
            key = event.key
            if key == exact or (recursive and key.startswith(below)) or (
                path.startswith(key) and event.action in ("delete", "expire")
                and event.prev is not None and event.prev.children is not None
            ):
                yield event
            if recursive and not watcher.stream:
                exact = below

    def pieces(self) -> Texts:
        """Yield the EventHistory object of a snapshot, as of the first next(): etcd's ring."""
        first, last, back, size = self.first_index, self.last_index, self._back, len(self.events)
        front = (back - size) % self.capacity
        slots = collections.deque([*self.events, *[None] * (self.capacity - size)])
        slots.rotate(front)
        comma = ""
        yield '{"Queue":{"Events":['
        for slot in slots:
            yield comma
            yield from ("null",) if slot is None else slot.history_texts()
            comma = ","
        yield f'],"Size":{size},"Front":{front},"Back":{back},"Capacity":{self.capacity}}}'
        yield f',"StartIndex":{first},"LastIndex":{last}}}'

    def load(self, events: List[Event], back: int, capacity: int) -> None:
        """Take over the events of another ring, oldest first."""
        self.events = collections.deque(events, maxlen=self.capacity)
        same = capacity == self.capacity        # then every event keeps its slot
        self._back = (back if same else len(self.events)) % self.capacity


class Watcher:
    """One watch: deliver(event) is called for one event, or with `stream` for each."""

    __slots__ = ("path", "recursive", "stream", "since", "deliver", "lost", "_hub")

    def __init__(
        self, path: str, *, recursive: bool, stream: bool, since: int,
        deliver: Callable[[Event], None], lost: Callable[[], None] = _nothing,
    ) -> None:
        self.path = path
        self.recursive = recursive
        self.stream = stream
        self.since = since
        self.deliver = deliver
        self.lost = lost        # called instead if the history lacks events, which ends the watch
        self._hub: Optional[WatcherHub] = None      # None: not registered

    def cancel(self) -> None:
        """Stop delivery now.  May be called from deliver, and twice."""
        if self._hub is not None:
            self._hub.remove(self)


class WatcherHub:
    """The registered watchers and the history of events (etcd 2.3 store/watcher_hub.go)."""

    def __init__(self, history: EventHistory, stats: StoreStats) -> None:
        self.history = history
        self._stats = stats             # the hub keeps its `watchers`
        # Path -> watchers in order of registration (a dict as ordered set: 10,000 watchers of
        # one key come and go in O(1) each).  No empty groups.
        self._groups: Dict[str, Dict[Watcher, None]] = {}
        self._due: Deque[Tuple[Event, Deque[Watcher]]] = collections.deque()    # to be notified
        self._budget: float = math.inf  # notifications left in this turn; no limit before the first
        self.backlog = 0                # watchers in _due
        self.watched_bytes = 0          # of the paths of registered watchers

    @property
    def paths(self) -> Iterator[str]:
        return iter(self._groups)

    def remove(self, watcher: Watcher) -> None:
        watcher._hub = None
        group = self._groups.get(watcher.path)
        if group is not None and watcher in group:
            del group[watcher]
            self._stats.watchers -= 1
            self.watched_bytes -= len(watcher.path)
            if not group:
                del self._groups[watcher.path]

    def watch(self, watcher: Watcher) -> None:
        """Serve `watcher` from the history; register it if it is a stream, or not served.

        Differs from etcd: a stream gets all its events of the history and then new ones; etcd
        sends one event of the history, and no other event ever.
        """
        history = self.history
        if watcher.since <= history.last_index:
            found = history.matches(watcher)
            for event in list(found) if watcher.stream else found:
                watcher.deliver(event)
                if not watcher.stream:
                    return
            if watcher.stream:
                watcher.since = history.last_index + 1
        self._groups.setdefault(watcher.path, {})[watcher] = None
        self._stats.watchers += 1
        self.watched_bytes += len(watcher.path)
        watcher._hub = self

    def begin_turn(self) -> None:
        """Notify at most WATCHERS_NOTIFIED_MAX watchers until the next call, in order of events."""
        self._budget = WATCHERS_NOTIFIED_MAX
        if self._due:
            self._notify_due()

    def catch_up(self, seen: int) -> None:
        """Notify the watchers of the events after index `seen`, which came with a snapshot.

        A watcher that would miss events is closed.  Differs from etcd, which notifies no watcher.
        """
        self._budget = math.inf         # first the backlog
        self._notify_due()
        history = self.history
        for watcher in [watcher for group in self._groups.values() for watcher in group]:
            if watcher._hub is None:
                continue                # cancelled by an earlier deliver
            self.remove(watcher)
            watcher.since = max(watcher.since, seen + 1)
            if not history.events or watcher.since < history.first_index:
                watcher.lost()
            else:
                self.watch(watcher)

    def notify(self, event: Event, removed: Sequence[str] = ()) -> None:
        """Record `event`; unless it is a refresh, notify the watchers of its key and all above.

        removed  paths that the event removed, parents first: their watchers come first, deepest
                 path first, so a stream on exactly the key gets the event twice, as in etcd
        """
        self.history.append(event)
        if not self._groups or event.refresh:
            return
        for path in reversed(removed):
            self._deliver(path, event, forced=True)
        key = event.key
        self._deliver("/", event, forced=False)
        end = key.find("/", 1)
        while end > 0:
            self._deliver(key[:end], event, forced=False)
            end = key.find("/", end + 1)
        self._deliver(key, event, forced=False)

    def _deliver(self, path: str, event: Event, *, forced: bool) -> None:
        group = self._groups.get(path)
        if group is None:
            return
        exact = path == event.key
        if not exact and "/_" in "/" + event.key[len(path):]:
            return                      # hidden from here; a path below the key is never
        index, every = event.index, exact or forced
        notified = [w for w in group if index >= w.since and (every or w.recursive)]
        if not notified:
            return
        once = [watcher for watcher in notified if not watcher.stream]
        if len(once) == len(group):
            del self._groups[path]
        else:
            for watcher in once:
                del group[watcher]
        self._stats.watchers -= len(once)
        self.watched_bytes -= len(once) * len(path)
        self._due.append((event, collections.deque(notified)))
        self.backlog += len(notified)
        self._notify_due()

    def _notify_due(self) -> None:
        """Notify watchers within the budget, and beyond it while the backlog is too long."""
        while self._due:
            event, watchers = self._due[0]
            while watchers:
                if self._budget <= 0 and self.backlog <= WATCHERS_MAX:
                    return
                watcher = watchers.popleft()
                self.backlog -= 1
                if watcher._hub is not None:        # else cancelled, perhaps by an earlier deliver
                    self._budget -= 1
                    if not watcher.stream:
                        watcher._hub = None
                    watcher.deliver(event)
            if self._due and self._due[0][1] is watchers:
                self._due.popleft()


class TtlHeap:
    """The paths that expire, soonest first; stale entries are dropped when they reach the top.

    Ties go by path, so that every member expires keys in the same order (in etcd it varies).
    """

    def __init__(self) -> None:
        self._expires_ns: Dict[str, int] = {}           # path -> unix ns
        self._heap: List[Tuple[int, str]] = []          # all of these, and stale ones

    def __len__(self) -> int:
        return len(self._expires_ns)

    def set(self, path: str, expires_ns: int) -> None:
        if not expires_ns:
            self._expires_ns.pop(path, None)
        elif self._expires_ns.get(path) != expires_ns:
            self._expires_ns[path] = expires_ns
            heapq.heappush(self._heap, (expires_ns, path))
        # A key refreshed every second would leave one stale entry a second, far down the heap.
        if len(self._heap) > 2 * len(self._expires_ns) + TTL_STALE_MIN:
            self._heap = [(when_ns, name) for name, when_ns in self._expires_ns.items()]
            heapq.heapify(self._heap)

    def free(self, count: int) -> None:
        """Free a part of a heap that nobody reads any more, so that its end takes no time."""
        for _ in range(min(len(self._expires_ns), count)):
            self._expires_ns.popitem()
        del self._heap[-2 * count:]     # with the stale entries

    def nth_ns(self, count: int, until_ns: int) -> int:
        """Return the time of entry `count`, stale ones included, or `until_ns` if earlier."""
        heap = self._heap
        reached = [(entry, place) for place, entry in enumerate(heap[:1])]
        while reached:                  # about `count` times, in the order of the heap
            (when_ns, _), place = heapq.heappop(reached)
            count -= 1
            if when_ns >= until_ns or not count:
                return min(when_ns, until_ns)
            below = 2 * place + 1
            for child in range(below, min(below + 2, len(heap))):
                heapq.heappush(reached, (heap[child], child))
        return until_ns

    def first(self) -> Tuple[int, str]:
        """Return (unix ns, path) of the next to expire; (0, "") if there is none."""
        heap = self._heap
        while heap and self._expires_ns.get(heap[0][1]) != heap[0][0]:
            heapq.heappop(heap)
        return heap[0] if heap else (0, "")


class StoreStats:
    """Counters of operations on this member, saved in snapshots (etcd 2.3 store/stats.go).

    The attributes are the JSON members in snake_case, in their order.
    """

    def __init__(self) -> None:
        self.gets_success = self.gets_fail = 0
        self.sets_success = self.sets_fail = 0
        self.delete_success = self.delete_fail = 0
        self.update_success = self.update_fail = 0
        self.create_success = self.create_fail = 0
        self.compare_and_swap_success = self.compare_and_swap_fail = 0
        self.compare_and_delete_success = self.compare_and_delete_fail = 0
        self.expire_count = 0
        self.watchers = 0               # registered now; kept by WatcherHub

    def json(self) -> str:
        return json_text({self._member(name): count for name, count in vars(self).items()})

    def load(self, counters: Mapping[str, int]) -> None:
        for name in vars(self).keys() - {"watchers"}:
            setattr(self, name, counters.get(self._member(name), 0))

    @staticmethod
    def _member(name: str) -> str:
        first, *others = name.split("_")
        return first + "".join(map(str.capitalize, others))
