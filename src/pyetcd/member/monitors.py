"""The cluster version, and counts of traffic."""

from __future__ import annotations

from typing import Callable, Dict, List, Optional, Tuple

from ..base.ids import package_logger
from ..base.limits import MIN_CLUSTER_VERSION, SERVER_VERSION
from ..base.messages import Message, MsgType
from ..base.text import load_json
from ..base.urls import usable_urls
from ..net.http_calls import HttpCall
from ..net.reactor import Reactor
from ..net.tls import TlsContext
from ..net.workers import Timer
from ..peer.compatibility import ANSWER_BYTES_MAX, Sent
from ..peer.streams import Answer
from ..peer.transport import REMOTES_MAX
from .cluster import Cluster, Member, format_id, version_key
from .statistics import Counter, Histograms, Labels, LeaderStats, ServerStats, exponential_bounds


class VersionMonitor:
    """The leader's watch over the cluster version: the lowest version of any member, never lowered.

    Source: etcd 2.3 etcdserver/cluster_util.go; peer-and-disk notes on the server loop.
    """

    PERIOD_S = 4.0

    def __init__(
        self, reactor: Reactor, cluster: Cluster, member_id: int,
        propose: Callable[[str], None], tls: Optional[TlsContext] = None,
    ) -> None:
        self._reactor = reactor
        self._cluster = cluster
        self._member_id = member_id
        self._propose = propose
        self._tls = tls
        self._calls: List[HttpCall] = []
        self._versions: Dict[int, str] = {}
        self._timer: Optional[Timer] = None

    def start(self) -> None:
        """Look now, and every few seconds until the version is as high as ours."""
        self.stop()
        self._look()

    def stop(self) -> None:
        """Look no more: we lead no more."""
        for call in self._calls:
            call.cancel()
        self._calls = []
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self.stop()
        if self._cluster.version and version_key(self._cluster.version) >= _OWN_VERSION_KEY:
            return
        self._versions = {self._member_id: SERVER_VERSION}
        for member in list(self._cluster.members.values()):
            urls = usable_urls(member.peer_urls)
            if member.id != self._member_id and urls:
                self._ask(member, urls[0])
        self._timer = self._reactor.call_later(self.PERIOD_S, self._look)
        self._decide()

    def _ask(self, member: Member, url: str) -> None:
        answer = Answer()

        def done(error: Optional[Exception]) -> None:
            version = _server_version(answer.body)
            if error is None and version:
                self._versions[member.id] = version
            self._decide()

        self._calls.append(HttpCall(
            self._reactor, url, "GET", "/version", {}, connect_timeout_s=1.0,
            idle_timeout_s=2.0, answer_max=ANSWER_BYTES_MAX, tls=self._tls,
            on_data=answer.take_data, on_done=done,
        ))

    def _decide(self) -> None:
        """Propose the minimum when every member has answered; a first guess when one cannot."""
        current = self._cluster.version
        complete = self._versions.keys() >= self._cluster.members.keys()
        if complete:
            lowest = min(self._versions.values(), key=version_key)
            wanted = ".".join(lowest.split(".")[:2]) + ".0"
            if not current or version_key(wanted) > version_key(current):
                self._announce(wanted, current)
        elif not current and self._calls and all(call.ended for call in self._calls):
            self._announce(MIN_CLUSTER_VERSION, current)

    def _announce(self, wanted: str, current: Optional[str]) -> None:
        log = package_logger("etcdserver")
        short = wanted.rpartition(".")[0]
        if current:
            before = current.rpartition(".")[0]
            log.info("updating the cluster version from %s to %s", before, short)
        else:
            log.info("setting up the initial cluster version to %s", short)
        self.stop()
        self._propose(wanted)
        self._timer = self._reactor.call_later(self.PERIOD_S, self._look)


_OWN_VERSION_KEY = version_key(SERVER_VERSION)


def _server_version(body: bytes) -> str:
    """The `etcdserver` of a /version answer, or "" if it is not one."""
    try:
        version = str(load_json(body)["etcdserver"])
        version_key(version)
    except (ValueError, KeyError, TypeError):
        return ""
    return version


class LeaderWait:
    """Says every ten seconds which members a member without a leader waits for.

    problem  says of a peer's id where it is dialed and what fails; "" if it can be reached
    """

    PERIOD_S = 10.0

    def __init__(
        self, reactor: Reactor, cluster: Cluster, problem: Callable[[int], str]
    ) -> None:
        self._reactor = reactor
        self._cluster = cluster
        self._problem = problem
        self._since = 0.0               # monotonic: without a leader
        self._timer: Optional[Timer] = None

    def watch(self, lead: int) -> None:
        """The leader is `lead` now; 0: nobody."""
        if lead:
            self.stop()
        elif self._timer is None:
            self._since = self._reactor.now()
            self._timer = self._reactor.call_later(self.PERIOD_S, self._say)

    def stop(self) -> None:
        """Say no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _say(self) -> None:
        self._timer = self._reactor.call_later(self.PERIOD_S, self._say)
        members = self._cluster.members
        missing = sorted(
            f"{member.name or format_id(id)} at {problem}" for id, member in members.items()
            for problem in (self._problem(id),) if problem
        )
        package_logger("etcdserver").warning(
            "waiting for %s, %d of %d needed, %.0f s", ", ".join(missing) or "a leader",
            len(members) // 2 + 1, len(members), self._reactor.now() - self._since,
        )


class Traffic:
    """Counts the messages that the transport sends and receives.

    sent_bytes, sent_failures, received_bytes are by member id.
    """

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
        """A message has left, or could not."""
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
            self._sent_append(sent)

    def _sent_append(self, sent: Sent) -> None:
        self._stats.send_append(sent.size)
        if not sent.ok:
            self._leader_stats.fail(sent.to)
        elif sent.message.entries:
            self._sent_at.setdefault(sent.to, self._now() - sent.seconds)

    def received(self, sender: int, message: Message, size: int) -> None:
        """A message came; a follower's latency is from entries to the answer that follows."""
        if sender in self.received_bytes or len(self.received_bytes) < REMOTES_MAX:
            self.received_bytes[sender] = self.received_bytes.get(sender, 0) + size
        if message.type == MsgType.APP:
            self._stats.recv_append(sender, size)
        elif message.type == MsgType.APP_RESP and sender in self._sent_at:
            self._leader_stats.success(sender, self._now() - self._sent_at.pop(sender))

    def round_trip(self, member_id: int, seconds: float) -> None:
        """A peer has answered a probe."""
        self.round_trips.child(format_id(member_id)).observe(seconds)
