"""Statistics: what a member counts about itself, and how metrics are written."""

from __future__ import annotations

import bisect
import collections
from typing import Callable, Deque, Dict, Iterable, Iterator, List, Mapping, Sequence, Tuple, Union

from ..base.basics import _nothing
from ..base.limits import NS
from ..base.text import format_duration, format_local_time, json_string
from ..net.workers import Clock
from .cluster import format_id

RATE_SAMPLES_MAX = 200              # append messages that the rates of /v2/stats/self look at
RATE_SECONDS_MAX = 1.0              # after this long without a message the rates are 0


class RateWindow:
    """The last messages and their sizes, for a rate per second.

    Source: etcd 2.3 etcdserver/stats/queue.go.
    Differs from etcd: a single message gives 0; there the rate is infinite, which JSON lacks.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._samples: Deque[Tuple[float, int]] = collections.deque(maxlen=RATE_SAMPLES_MAX)

    def add(self, size: int) -> None:
        """Count one message of `size` bytes."""
        self._samples.append((self._now(), size))

    def rates(self) -> Tuple[float, float]:
        """Return messages and bytes per second; (0, 0) when nothing moves."""
        samples = self._samples
        if not samples or self._now() - samples[-1][0] > RATE_SECONDS_MAX:
            samples.clear()
            return 0.0, 0.0
        seconds = samples[-1][0] - samples[0][0]
        if seconds <= 0:
            return 0.0, 0.0
        return len(samples) / seconds, sum(size for _, size in samples) / seconds


def format_decimal(value: float) -> str:
    """Return `value` with at most six decimals and no exponent, as Go shows such numbers."""
    return f"{value:.6f}".rstrip("0").rstrip(".")


class ServerStats:
    """What /v2/stats/self shows; times in unix ns.  Source: etcd 2.3 etcdserver/stats."""

    def __init__(self, name: str, member_id: int, clock: Clock) -> None:
        self.name = name
        self.member_id = member_id
        self._wall_ns = clock.wall_ns
        self.started_ns = clock.wall_ns()
        self.lead = 0                   # id of the leader last known
        self.lead_since_ns = 0          # when it became that
        self.received_appends = 0
        self.sent_appends = 0
        self._received = RateWindow(clock.now)
        self._sent = RateWindow(clock.now)

    def became(self, lead: int) -> None:
        """The member `lead` leads from now on."""
        if lead != self.lead:
            self.lead = lead
            self.lead_since_ns = self._wall_ns()

    def recv_append(self, sender: int, size: int) -> None:
        """A MsgApp of `size` bytes has come from the leader `sender`."""
        self.became(sender)
        self.received_appends += 1
        self._received.add(size)

    def send_append(self, size: int) -> None:
        """A MsgApp of `size` bytes goes to a follower."""
        self.sent_appends += 1
        self._sent.add(size)

    def json(self, state: str) -> str:
        """Return the object of /v2/stats/self.  state: StateFollower, -Candidate or -Leader.

        Differs from etcd: without a leader so far the uptime is 0s, not 292 years.
        """
        uptime_s = (self._wall_ns() - self.lead_since_ns) / NS if self.lead else 0.0
        since = format_local_time(self.lead_since_ns) if self.lead else "0001-01-01T00:00:00Z"
        leader = format_id(self.lead) if self.lead else ""
        return (
            f'{{"name":{json_string(self.name)},"id":"{format_id(self.member_id)}"'
            f',"state":"{state}","startTime":"{format_local_time(self.started_ns)}"'
            f',"leaderInfo":{{"leader":"{leader}","uptime":"{format_duration(max(uptime_s, 0.0))}"'
            f',"startTime":"{since}"}}'
            f',"recvAppendRequestCnt":{self.received_appends}{_rates("recv", self._received)}'
            f',"sendAppendRequestCnt":{self.sent_appends}{_rates("send", self._sent)}}}'
        )


def _rates(prefix: str, window: RateWindow) -> str:
    """The two rates as JSON members; left out when 0."""
    parts = zip(("Pkg", "Bandwidth"), window.rates())
    return "".join(f',"{prefix}{what}Rate":{format_decimal(rate)}' for what, rate in parts if rate)


class FollowerStats:
    """Latency of the MsgApps sent to one follower, in ms.  Source: etcd 2.3 stats/leader.go."""

    __slots__ = ("successes", "fails", "current", "total", "squares", "minimum", "maximum")

    def __init__(self) -> None:
        self.successes = self.fails = 0
        self.current = self.total = self.squares = self.maximum = 0.0
        self.minimum = float(1 << 63)   # what etcd shows before the first success

    def json(self) -> str:
        """Return this follower's part of /v2/stats/leader."""
        count = self.successes or 1
        average = self.total / count
        deviation = max(self.squares / count - average * average, 0.0) ** 0.5
        fields = {
            "current": self.current, "average": average, "standardDeviation": deviation,
            "minimum": self.minimum, "maximum": self.maximum,
        }
        latency = ",".join(f'"{name}":{format_decimal(ms)}' for name, ms in fields.items())
        return (
            f'{{"latency":{{{latency}}}'
            f',"counts":{{"fail":{self.fails},"success":{self.successes}}}}}'
        )


class LeaderStats:
    """What /v2/stats/leader shows: how sending to each follower goes."""

    def __init__(self, member_id: int) -> None:
        self.member_id = member_id
        self._followers: Dict[int, FollowerStats] = {}

    def success(self, member_id: int, seconds: float) -> None:
        """A MsgApp reached this follower's connection after `seconds`."""
        stats = self._followers.setdefault(member_id, FollowerStats())
        latency = seconds * 1e3
        stats.successes += 1
        stats.current = latency
        stats.total += latency
        stats.squares += latency * latency
        stats.minimum = min(stats.minimum, latency)
        stats.maximum = max(stats.maximum, latency)

    def fail(self, member_id: int) -> None:
        """A MsgApp to this follower was lost."""
        self._followers.setdefault(member_id, FollowerStats()).fails += 1

    def remove(self, member_id: int) -> None:
        """The member is one no more."""
        self._followers.pop(member_id, None)

    def json(self, followers: Iterable[int]) -> str:
        """Return the object of /v2/stats/leader with these members, whether sent to or not."""
        unknown = FollowerStats()
        parts = [
            f'"{name}":{self._followers.get(member_id, unknown).json()}'
            for name, member_id in sorted((format_id(each), each) for each in followers)
        ]
        return f'{{"leader":"{format_id(self.member_id)}","followers":{{{",".join(parts)}}}}}'


class ServerCounts:
    """What happens to a member that only /metrics tells."""

    SLOW_APPLY_SECONDS = 0.1            # etcd 3's limit

    def __init__(self, heartbeat_s: float) -> None:
        self.leader_changes = 0         # a leader became known that was not the one before
        self.slow_applies = 0
        self.late_heartbeats = 0        # to each follower, sent a period late or more
        self.turn_durations = Histogram(exponential_bounds(0.0001, 14))     # of the reactor, s
        self._heartbeat_s = heartbeat_s
        self._ticked_at = 0.0

    def tick(self, now: float, followers: int) -> None:
        """Raft's clock ticks, and with it heartbeats leave to `followers`; monotonic seconds."""
        if self._ticked_at and now - self._ticked_at > 2 * self._heartbeat_s:
            self.late_heartbeats += followers
        self._ticked_at = now

    def time_apply(self, apply: Callable[[], None], now: Callable[[], float]) -> None:
        """Have one turn's entries applied."""
        started = now()
        apply()
        self.slow_applies += now() - started > self.SLOW_APPLY_SECONDS


Labels = Tuple[str, ...]
Sample = Tuple[str, str, float]     # name suffix, labels as text, value


def _label_text(names: Labels, values: Labels) -> str:
    parts = (
        '{}="{}"'.format(name, value.replace("\\", r"\\").replace('"', r'\"').replace("\n", r"\n"))
        for name, value in zip(names, values)
    )
    return ",".join(parts)


class Counter:
    """How often something happened, per combination of label values."""

    kind = "counter"
    __slots__ = ("_labels", "_values")

    def __init__(self, labels: Labels = ()) -> None:
        self._labels = labels
        self._values: Dict[Labels, int] = {} if labels else {(): 0}

    def inc(self, *values: str) -> None:
        """Count one more."""
        self._values[values] = self._values.get(values, 0) + 1

    def value(self, *values: str) -> int:
        """Return how often it happened with these label values."""
        return self._values.get(values, 0)

    def samples(self) -> Iterator[Sample]:
        """Yield what Prometheus reads."""
        for values, count in self._values.items():
            yield "", _label_text(self._labels, values), count


class Reading:
    """A number that someone else keeps, asked for when Prometheus comes."""

    __slots__ = ("kind", "_labels", "_read")

    def __init__(
        self, kind: str, labels: Labels, read: Callable[[], Mapping[Labels, float]]
    ) -> None:
        self.kind = kind                # counter or gauge
        self._labels = labels
        self._read = read

    def samples(self) -> Iterator[Sample]:
        """Yield what Prometheus reads."""
        for values, value in self._read().items():
            yield "", _label_text(self._labels, values), value


def exponential_bounds(start: float, count: int) -> List[float]:
    """Return the bounds start * 2**n of a histogram, n < count."""
    return [start * (1 << step) for step in range(count)]


class Histogram:
    """How values spread over buckets.  bounds: upper, inclusive, ascending.

    Thread: one that observes; any may read.
    """

    kind = "histogram"
    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self._counts[bisect.bisect_left(self._bounds, value)] += 1
        self._sum += value

    def observe_many(self, values: List[float]) -> None:
        """Count all of them: 0.04 us each instead of 0.17."""
        values.sort()
        before = 0
        for position, bound in enumerate(self._bounds):
            below = bisect.bisect_right(values, bound)
            self._counts[position] += below - before
            before = below
        self._counts[-1] += len(values) - before
        self._sum += sum(values)

    @property
    def totals(self) -> Tuple[List[int], float]:
        """A copy of the counts by bucket, the last one for what is above all bounds; the sum."""
        return self._counts[:], self._sum

    @property
    def bounds(self) -> Sequence[float]:
        """The upper bounds of all buckets but the last."""
        return self._bounds

    @property
    def count(self) -> int:
        """Number of values."""
        return sum(self._counts)

    @property
    def mean(self) -> float:
        """Their mean; 0 without any."""
        return self._sum / (self.count or 1)

    def samples(self, labels: str = "") -> Iterator[Sample]:
        """Yield what Prometheus reads."""
        count = self.count
        comma, below = "," if labels else "", 0
        for bound, here in zip(self._bounds, self._counts):
            below += here
            yield "_bucket", f'{labels}{comma}le="{bound!r}"', below
        yield "_bucket", f'{labels}{comma}le="+Inf"', count
        yield "_sum", labels, self._sum
        yield "_count", labels, count


class Histograms:
    """One histogram per combination of label values."""

    kind = "histogram"
    __slots__ = ("_labels", "_bounds", "_children")

    def __init__(self, bounds: Sequence[float], labels: Labels) -> None:
        self._labels = labels
        self._bounds = bounds
        self._children: Dict[Labels, Histogram] = {}

    def child(self, *values: str) -> Histogram:
        """Return the histogram of these label values."""
        if values not in self._children:
            self._children[values] = Histogram(self._bounds)
        return self._children[values]

    def samples(self) -> Iterator[Sample]:
        """Yield what Prometheus reads; nothing of a child before its first value."""
        for values, child in self._children.items():
            if child.count:
                yield from child.samples(_label_text(self._labels, values))


Family = Union[Counter, Reading, Histogram, Histograms]


class Metrics:
    """Named counters, readings and histograms, and their text for Prometheus (version 0.0.4)."""

    def __init__(self) -> None:
        self.before_text: Callable[[], None] = _nothing     # counts what was not counted yet
        self._families: Dict[str, Tuple[str, Family]] = {}

    def add(self, name: str, help: str, family: Family) -> None:
        """Show what someone else fills; an older one of this name is replaced."""
        self._families[name] = help, family

    def counter(self, name: str, help: str, labels: Labels = ()) -> Counter:
        """Add and return a counter."""
        counter = Counter(labels)
        self.add(name, help, counter)
        return counter

    def gauge(self, name: str, help: str, read: Callable[[], float]) -> None:
        """Add a number that goes up and down."""
        self.add(name, help, Reading("gauge", (), lambda: {(): read()}))

    def fact(self, name: str, help: str, label: str, read: Callable[[], str]) -> None:
        """Add a text: the value of `label` of a sample that is always 1."""
        self.add(name, help, Reading("gauge", (label,), lambda: {(read(),): 1}))

    def total(
        self, name: str, help: str, read: Callable[[], Mapping[Labels, float]],
        labels: Labels = (),
    ) -> None:
        """Add counters that are kept elsewhere: label values -> count."""
        self.add(name, help, Reading("counter", labels, read))

    def text(self) -> str:
        """Return everything that has a value, by name."""
        self.before_text()
        lines: List[str] = []
        for name, (help, family) in sorted(self._families.items()):
            samples = list(family.samples())
            if not samples:
                continue
            lines += [f"# HELP {name} {help}", f"# TYPE {name} {family.kind}"]
            for suffix, labels, value in samples:
                shown = f"{{{labels}}}" if labels else ""
                lines.append(f"{name}{suffix}{shown} {value!r}")
        return "\n".join(lines) + "\n"
