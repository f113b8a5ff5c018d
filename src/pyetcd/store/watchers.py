"""The event history, watchers, time to live, and counts of operations."""

from __future__ import annotations

import collections
import heapq
import itertools
import math
from typing import Callable, Deque, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

from ..base.basics import _nothing
from ..base.limits import WATCHERS_MAX, WATCHERS_TOLD_MAX
from ..base.text import json_text
from .events import TTL_STALE_MIN, Event, Texts


class EventHistory:
    """The last `capacity` events, one per store index, for watches that begin in the past.

    Source: etcd 2.3 store/event_history.go, event_queue.go.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.events: Deque[Event] = collections.deque(maxlen=capacity)
        self._back = 0                  # slot of the next event in etcd's ring; for snapshots

    @property
    def first_index(self) -> int:
        """Index of the oldest event; 0 if there is none."""
        return self.events[0].index if self.events else 0

    @property
    def last_index(self) -> int:
        """Index of the newest event; 0 if there is none."""
        return self.events[-1].index if self.events else 0

    def append(self, event: Event) -> None:
        """Add the newest event; a full history forgets its oldest."""
        self.events.append(event)
        self._back += 1
        if self._back == self.capacity:
            self._back = 0

    def matches(self, path: str, *, recursive: bool, stream: bool, since: int) -> Iterator[Event]:
        """Yield the events from index `since` on that a watch of `path` would be told.

        Three oddities are etcd's, and kept because clients see them: hidden keys are not
        filtered; the deletion of a directory counts for every path that begins with its name
        (`/bar` for `/barbaz`); a recursive watch compares all events but the first with
        `path/`, so it misses later ones on exactly `path`.

        Differs from etcd: a stream has no third oddity, for it would lose events.
        Source: etcd 2.3 store/event_history.go, scan.
        """
        below = path if path == "/" else path + "/"
        exact = path
        for event in itertools.islice(self.events, max(since - self.first_index, 0), None):
            if event.refresh:
                continue
            key = event.key
            if key == exact or (recursive and key.startswith(below)) or (
                path.startswith(key) and event.action in ("delete", "expire")
                and event.prev is not None and event.prev.children is not None
            ):
                yield event
            if recursive and not stream:
                exact = below

    def pieces(self) -> Texts:
        """Yield the EventHistory object of a snapshot; the events are those of the first next().

        Source: the ring of etcd 2.3 store/event_queue.go, unused slots null.
        """
        events, first, last, back = list(self.events), self.first_index, self.last_index, self._back
        front = (back - len(events)) % self.capacity
        slots: List[Optional[Event]] = [None] * self.capacity
        for offset, event in enumerate(events):
            slots[(front + offset) % self.capacity] = event
        comma = ""
        yield '{"Queue":{"Events":['
        for slot in slots:
            yield f"{comma}null" if slot is None else comma
            if slot is not None:
                yield from slot.history_texts()
            comma = ","
        yield f'],"Size":{len(events)},"Front":{front},"Back":{back},"Capacity":{self.capacity}}}'
        yield f',"StartIndex":{first},"LastIndex":{last}}}'

    def load(self, events: List[Event], back: int, capacity: int) -> None:
        """Take over the events of a ring, oldest first, as far as there is room."""
        self.events = collections.deque(events, maxlen=self.capacity)
        same = capacity == self.capacity        # then every event keeps its slot
        self._back = (back if same else len(self.events)) % self.capacity


class Watcher:
    """One watch; deliver(event) is called for each event it is told: for one, or a stream.

    lost  called instead when the watch ends because events are gone that it should have had
    """

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
        self.lost = lost
        self._hub: Optional[WatcherHub] = None      # None: not registered

    def cancel(self) -> None:
        """Deliver nothing more.  At any time, also from deliver; twice does no harm."""
        if self._hub is not None:
            self._hub.remove(self)


class WatcherHub:
    """Who watches what, and the history of events.

    Source: etcd 2.3 store/watcher_hub.go.
    """

    def __init__(self, history: EventHistory, stats: StoreStats) -> None:
        self.history = history
        self._stats = stats             # its `watchers` is ours
        # Path -> watchers in order of registration (a dict as ordered set: 10,000 watchers of
        # one key come and go in O(1) each).  No empty groups.
        self._groups: Dict[str, Dict[Watcher, None]] = {}
        self._due: Deque[Tuple[Event, Deque[Watcher]]] = collections.deque()    # to be told
        self._room: float = math.inf    # how many may be told in this turn

    backlog = 0                            # watchers in _due
    watched_bytes = 0                   # of the paths of registered watchers

    @property
    def paths(self) -> Iterator[str]:
        """What is watched."""
        return iter(self._groups)

    def remove(self, watcher: Watcher) -> None:
        """Forget a registered watcher, also one that is about to be told."""
        watcher._hub = None
        group = self._groups.get(watcher.path)
        if group is not None and watcher in group:
            del group[watcher]
            self._stats.watchers -= 1
            self.watched_bytes -= len(watcher.path)
            if not group:
                del self._groups[watcher.path]

    def watch(self, watcher: Watcher) -> None:
        """Serve `watcher` from the history, then register it if it wants more.

        Differs from etcd: a stream that finds something in the history gets all of it and is
        then told of new events; etcd sends one event and then nothing, ever.
        """
        history = self.history
        if watcher.since <= history.last_index:
            found = history.matches(
                watcher.path, recursive=watcher.recursive, stream=watcher.stream,
                since=watcher.since,
            )
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
        """Tell WATCHERS_TOLD_MAX watchers at most until the next call, in the order of events.

        `owed` others wait for it.  As long as this was never called, nobody has to wait.
        """
        self._room = WATCHERS_TOLD_MAX
        if self._due:
            self._tell()

    def catch_up(self, seen: int) -> None:
        """The events after index `seen` came with a snapshot: tell the watchers of them.

        Whoever would miss some is ended instead.  Differs from etcd, which tells nobody.
        """
        self._room = math.inf           # first what they were told of before
        self._tell()
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
        """Record `event`; unless it is a refresh, tell the watchers of its key and all above.

        removed  paths that the event took away, parents first: theirs are told before, deepest
                 first, so a stream on exactly the key is told twice; clients of etcd know it so
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
        told = [w for w in group if index >= w.since and (every or w.recursive)]
        if not told:
            return
        once = [watcher for watcher in told if not watcher.stream]
        if len(once) == len(group):
            del self._groups[path]
        else:
            for watcher in once:
                del group[watcher]
        self._stats.watchers -= len(once)
        self.watched_bytes -= len(once) * len(path)
        self._due.append((event, collections.deque(told)))
        self.backlog += len(told)
        self._tell()

    def _tell(self) -> None:
        """Tell whom there is room for; more if events come faster than that."""
        while self._due:
            event, told = self._due[0]
            while told:
                if self._room <= 0 and self.backlog <= WATCHERS_MAX:
                    return
                watcher = told.popleft()
                self.backlog -= 1
                if watcher._hub is not None:        # else cancelled, perhaps by an earlier deliver
                    self._room -= 1
                    if not watcher.stream:
                        watcher._hub = None
                    watcher.deliver(event)
            if self._due and self._due[0][1] is told:
                self._due.popleft()


class TtlHeap:
    """Which path expires next; entries that no longer hold are dropped when they come up.

    Ties go by path, so that every member expires keys in the same order (etcd leaves it open).
    """

    def __init__(self) -> None:
        self._expires_ns: Dict[str, int] = {}           # the truth: path -> unix ns
        self._heap: List[Tuple[int, str]] = []          # every pair of the truth, and stale ones

    def __len__(self) -> int:
        return len(self._expires_ns)

    def set(self, path: str, expires_ns: int) -> None:
        """Let `path` expire at `expires_ns`; 0: never."""
        if not expires_ns:
            self._expires_ns.pop(path, None)
        elif self._expires_ns.get(path) != expires_ns:
            self._expires_ns[path] = expires_ns
            heapq.heappush(self._heap, (expires_ns, path))
        # A key refreshed every second would leave one stale entry a second, far down the heap.
        if len(self._heap) > 2 * len(self._expires_ns) + TTL_STALE_MIN:
            self._heap = [(when_ns, name) for name, when_ns in self._expires_ns.items()]
            heapq.heapify(self._heap)

    def nth_ns(self, count: int, until_ns: int) -> int:
        """Return when entry number `count` is due, stale ones included, or `until_ns` if earlier.

        Looks at about as many entries, in the order of the heap.
        """
        heap = self._heap
        reached = [(entry, place) for place, entry in enumerate(heap[:1])]
        while reached:
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
    """Counters of operations on this member; they travel with the snapshot.

    Attributes are the JSON members in snake_case, made in their order.
    Source: etcd 2.3 store/stats.go.
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
        """Return the object of /v2/stats/store."""
        return json_text({self._member(name): count for name, count in vars(self).items()})

    def load(self, counters: Mapping[str, int]) -> None:
        """Take over the counters of a snapshot; watchers stay as they are."""
        for name in vars(self).keys() - {"watchers"}:
            setattr(self, name, counters.get(self._member(name), 0))

    @staticmethod
    def _member(name: str) -> str:
        first, *others = name.split("_")
        return first + "".join(map(str.capitalize, others))
