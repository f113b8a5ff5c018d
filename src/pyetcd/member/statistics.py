"""Statistics of /v2/stats and metrics of /metrics: counters, histograms, traffic."""

from __future__ import annotations

import bisect
import collections
from typing import Callable, Deque, Dict, Iterable, Iterator, List, Mapping, Sequence, Tuple, Union

from ..base.basics import _nothing
from ..base.limits import NS
from ..base.messages import Message, MsgType
from ..base.text import format_duration, format_local_time, json_string
from ..net.workers import Clock
from ..peer.compatibility import Sent
from ..peer.transport import REMOTES_MAX
from .cluster import format_id

RATE_SAMPLES_MAX = 200              # append messages behind the rates of /v2/stats/self
RATE_SECONDS_MAX = 1.0              # after this long without a message the rates are 0


class RateWindow:
    """The last messages and their sizes.  Source: etcd 2.3 etcdserver/stats/queue.go.

    Differs from etcd: a single message gives 0; there the rate is infinite, which JSON lacks.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._samples: Deque[Tuple[float, int]] = collections.deque(maxlen=RATE_SAMPLES_MAX)
        self.count = 0                  # of all messages

    def add(self, size: int) -> None:
        self.count += 1
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
    """The statistics of /v2/stats/self; times in unix ns.  Source: etcd 2.3 etcdserver/stats."""

    def __init__(self, name: str, member_id: int, clock: Clock) -> None:
        self.name = name
        self.member_id = member_id
        self._wall_ns = clock.wall_ns
        self.started_ns = clock.wall_ns()
        self.lead = 0                   # id of the leader last known
        self.lead_since_ns = 0          # when it became leader
        self._received = RateWindow(clock.now)
        self._sent = RateWindow(clock.now)
        self.send_append = self._sent.add       # counts a MsgApp of some size to a follower

    def became(self, lead: int) -> None:
        if lead != self.lead:
            self.lead = lead
            self.lead_since_ns = self._wall_ns()

    def recv_append(self, sender: int, size: int) -> None:
        self.became(sender)
        self._received.add(size)

    def json(self, state: str) -> str:
        """Return the object of /v2/stats/self.  state: StateFollower, -Candidate or -Leader.

        Differs from etcd: before the first leader the uptime is 0s, not 292 years.
        """
        uptime_s = (self._wall_ns() - self.lead_since_ns) / NS if self.lead else 0.0
        since = format_local_time(self.lead_since_ns) if self.lead else "0001-01-01T00:00:00Z"
        leader = format_id(self.lead) if self.lead else ""
        return (
            f'{{"name":{json_string(self.name)},"id":"{format_id(self.member_id)}"'
            f',"state":"{state}","startTime":"{format_local_time(self.started_ns)}"'
            f',"leaderInfo":{{"leader":"{leader}","uptime":"{format_duration(max(uptime_s, 0.0))}"'
            f',"startTime":"{since}"}}'
            f',"recvAppendRequestCnt":{self._received.count}{_rates("recv", self._received)}'
            f',"sendAppendRequestCnt":{self._sent.count}{_rates("send", self._sent)}}}'
        )


def _rates(prefix: str, window: RateWindow) -> str:
    parts = zip(("Pkg", "Bandwidth"), window.rates())
    return "".join(f',"{prefix}{what}Rate":{format_decimal(rate)}' for what, rate in parts if rate)


class FollowerStats:
    """Latency of the MsgApps sent to one follower, in ms.  Source: etcd 2.3 stats/leader.go."""

    __slots__ = ("successes", "fails", "current", "total", "squares", "minimum", "maximum")

    def __init__(self) -> None:
        self.successes = self.fails = 0
        self.current = self.total = self.squares = self.maximum = 0.0
        self.minimum = float(1 << 63)   # as etcd before the first success

    def json(self) -> str:
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
    """The statistics of /v2/stats/leader: latency and losses of each follower."""

    def __init__(self, member_id: int) -> None:
        self.member_id = member_id
        self._followers: Dict[int, FollowerStats] = {}

    def success(self, member_id: int, seconds: float) -> None:
        stats = self._followers.setdefault(member_id, FollowerStats())
        latency = seconds * 1e3
        stats.successes += 1
        stats.current = latency
        stats.total += latency
        stats.squares += latency * latency
        stats.minimum = min(stats.minimum, latency)
        stats.maximum = max(stats.maximum, latency)

    def fail(self, member_id: int) -> None:
        self._followers.setdefault(member_id, FollowerStats()).fails += 1

    def remove(self, member_id: int) -> None:
        self._followers.pop(member_id, None)

    def json(self, followers: Iterable[int]) -> str:
        """Return the object of /v2/stats/leader, with members that no message went to as well."""
        unknown = FollowerStats()
        parts = [
            f'"{name}":{self._followers.get(member_id, unknown).json()}'
            for name, member_id in sorted((format_id(each), each) for each in followers)
        ]
        return f'{{"leader":"{format_id(self.member_id)}","followers":{{{",".join(parts)}}}}}'


class ServerCounts:
    """Counters of a member that only /metrics shows."""

    SLOW_APPLY_SECONDS = 0.1            # etcd 3's limit

    def __init__(self, heartbeat_s: float) -> None:
        self.leader_changes = 0         # leaders that became known
        self.slow_applies = 0
        self.late_heartbeats = 0        # to each follower, a period late or more
        self.turn_durations = Histogram(exponential_bounds(0.0001, 14))     # of the reactor, s
        self._heartbeat_s = heartbeat_s
        self._ticked_at = 0.0

    def tick(self, now: float, followers: int) -> None:
        """Count late heartbeats: at each tick of Raft one leaves to each of `followers`."""
        if self._ticked_at and now - self._ticked_at > 2 * self._heartbeat_s:
            self.late_heartbeats += followers
        self._ticked_at = now

    def time_apply(self, apply: Callable[[], None], now: Callable[[], float]) -> None:
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


class Reading:
    """A counter or gauge that is kept elsewhere, and read when Prometheus asks."""

    __slots__ = ("kind", "_labels", "_read")

    def __init__(
        self, kind: str, labels: Labels, read: Callable[[], Mapping[Labels, float]]
    ) -> None:
        self.kind = kind                # counter or gauge
        self._labels = labels
        self._read = read

    def samples(self) -> Iterator[Sample]:
        for values, value in self._read().items():
            yield "", _label_text(self._labels, values), value


class Counter(Reading):
    """The number of events, per combination of label values."""

    __slots__ = ("_values",)

    def __init__(self, labels: Labels = ()) -> None:
        self._values: Dict[Labels, int] = {} if labels else {(): 0}
        super().__init__("counter", labels, self._values.copy)

    def inc(self, *values: str) -> None:
        self._values[values] = self._values.get(values, 0) + 1

    def value(self, *values: str) -> int:
        return self._values.get(values, 0)


def exponential_bounds(start: float, count: int) -> List[float]:
    return [start * (1 << step) for step in range(count)]


class Histogram:
    """Counts of values per bucket; `bounds` are upper, inclusive, ascending.  One thread writes."""

    kind = "histogram"
    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)       # the last one: what is above all bounds
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.sum += value

    def observe_many(self, values: List[float]) -> None:
        """Count all values: 0.04 us each instead of 0.17."""
        values.sort()
        before = 0
        for position, bound in enumerate(self.bounds):
            below = bisect.bisect_right(values, bound)
            self.counts[position] += below - before
            before = below
        self.counts[-1] += len(values) - before
        self.sum += sum(values)

    @property
    def count(self) -> int:
        return sum(self.counts)

    @property
    def mean(self) -> float:
        return self.sum / (self.count or 1)

    def samples(self, labels: str = "") -> Iterator[Sample]:
        count = self.count
        comma, below = "," if labels else "", 0
        for bound, here in zip(self.bounds, self.counts):
            below += here
            yield "_bucket", f'{labels}{comma}le="{bound!r}"', below
        yield "_bucket", f'{labels}{comma}le="+Inf"', count
        yield "_sum", labels, self.sum
        yield "_count", labels, count


class Histograms:
    """One histogram per combination of label values, shown from its first value on."""

    kind = "histogram"
    __slots__ = ("_labels", "_bounds", "_children")

    def __init__(self, bounds: Sequence[float], labels: Labels) -> None:
        self._labels = labels
        self._bounds = bounds
        self._children: Dict[Labels, Histogram] = {}

    def child(self, *values: str) -> Histogram:
        if values not in self._children:
            self._children[values] = Histogram(self._bounds)
        return self._children[values]

    def samples(self) -> Iterator[Sample]:
        for values, child in self._children.items():
            if child.count:
                yield from child.samples(_label_text(self._labels, values))


Family = Union[Reading, Histogram, Histograms]


class Metrics:
    """Named counters, readings and histograms, and their text for Prometheus (version 0.0.4)."""

    def __init__(self) -> None:
        self.before_text: Callable[[], None] = _nothing     # makes the counts complete
        self._families: Dict[str, Tuple[str, Family]] = {}

    def add(self, name: str, help: str, family: Family) -> None:
        self._families[name] = help, family

    def counter(self, name: str, help: str, labels: Labels = ()) -> Counter:
        counter = Counter(labels)
        self.add(name, help, counter)
        return counter

    def gauge(self, name: str, help: str, read: Callable[[], float]) -> None:
        self.add(name, help, Reading("gauge", (), lambda: {(): read()}))

    def fact(self, name: str, help: str, label: str, read: Callable[[], str]) -> None:
        """Add a text: the value of `label` of a sample that is always 1."""
        self.add(name, help, Reading("gauge", (label,), lambda: {(read(),): 1}))

    def total(
        self, name: str, help: str, read: Callable[[], Mapping[Labels, float]], labels: Labels = (),
    ) -> None:
        """Add counters that are kept elsewhere: label values -> count."""
        self.add(name, help, Reading("counter", labels, read))

    def text(self) -> str:
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


class Traffic:
    """Counts the messages that the transport sends and receives, by member id."""

    def __init__(
        self, stats: ServerStats, leader_stats: LeaderStats, now: Callable[[], float]
    ) -> None:
        self.sent_bytes: Dict[int, int] = {}
        self.sent_failures: Dict[int, int] = {}
        self.received_bytes: Dict[int, int] = {}
        labels = ("sendingType", "remoteID", "msgType")
        self.latencies = Histograms(exponential_bounds(0.0005, 13), labels)
        self.failures = Counter(labels)
        self.round_trips = Histograms(exponential_bounds(0.0001, 16), ("To",))
        self._stats = stats
        self._leader_stats = leader_stats
        self._now = now
        self._sent_at: Dict[int, float] = {}    # follower -> when entries went to it
        self._labels: Dict[Tuple[str, int, int], Labels] = {}

    def sent(self, sent: Sent) -> None:
        to, message = sent.to, sent.message
        key = (sent.channel, to, message.type)
        labels = self._labels.get(key)
        if labels is None:
            name = "Msg" + MsgType(message.type).name.title().replace("_", "")
            labels = self._labels[key] = (sent.channel, format_id(to), name)
        if sent.ok:
            self.sent_bytes[to] = self.sent_bytes.get(to, 0) + sent.size
            self.latencies.child(*labels).observe(sent.seconds)
        else:
            self.sent_failures[to] = self.sent_failures.get(to, 0) + 1
            self.failures.inc(*labels)
        if message.type == MsgType.APP:
            self._stats.send_append(sent.size)
            if not sent.ok:
                self._leader_stats.fail(to)
            elif message.entries:
                self._sent_at.setdefault(to, self._now() - sent.seconds)

    def received(self, sender: int, message: Message, size: int) -> None:
        """Count a message; the latency of a follower is from entries to its next answer."""
        if sender in self.received_bytes or len(self.received_bytes) < REMOTES_MAX:
            self.received_bytes[sender] = self.received_bytes.get(sender, 0) + size
        if message.type == MsgType.APP:
            self._stats.recv_append(sender, size)
        elif message.type == MsgType.APP_RESP and sender in self._sent_at:
            self._leader_stats.success(sender, self._now() - self._sent_at.pop(sender))

    def round_trip(self, member_id: int, seconds: float) -> None:
        self.round_trips.child(format_id(member_id)).observe(seconds)
