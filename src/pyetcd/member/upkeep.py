"""Upkeep: publication, cluster version, expiry of keys, removal of old files."""

from __future__ import annotations

import functools
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

from ..base.basics import _nothing
from ..base.errors import EtcdError, ServerStopped
from ..base.limits import DEFAULT_PEER_URLS, PURGE_SECONDS, SYNC_SECONDS
from ..base.messages import Request
from ..base.text import load_json
from ..base.urls import usable_urls
from ..base.versions import version_key
from ..disk.files import OsDisk
from ..disk.snapshots import purge_files
from ..net.http_calls import Answer, HttpCall, fetch
from ..net.reactor import Reactor
from ..net.tls import TlsContext
from ..net.workers import FILE_WORK, Timer
from ..store.tree import Store
from .cluster import FEATURES, SERVER_LOG, Cluster, Member, format_id
from .configuration import ServerConfig
from .waiting import Done

Propose = Callable[[Request, Done], None]       # as EtcdServer.do
LEADER_WAIT_SECONDS = 10.0          # between two lines of a member without a leader


def report_leader_wait(cluster: Cluster, problem: Callable[[int], str], unled_s: float) -> None:
    """Log which members a member without a leader waits for, unless an election is under way.

    problem  member id -> where it is dialed and what fails; "" if it can be reached
    """
    members = cluster.members
    if unled_s < LEADER_WAIT_SECONDS / 2:
        return
    missing = sorted(
        f"{member.name or format_id(id)} at {problem(id)}" for id, member in members.items()
        if problem(id)
    )
    SERVER_LOG.warning(
        "waiting for %s, %d of %d needed, %.0f s", ", ".join(missing) or "a leader",
        len(members) // 2 + 1, len(members), unled_s,
    )


class Publication:
    """Publishes this member's name and client URLs until that is applied; then calls done()."""

    def __init__(
        self, config: ServerConfig, cluster: Cluster, reactor: Reactor, propose: Propose,
        done: Callable[[], None],
    ) -> None:
        self._config = config
        self._cluster = cluster
        self._reactor = reactor
        self._propose = propose
        self._done = done
        self._is_applied = False

    def propose(self) -> None:
        """Propose the attributes unless they are applied; one more proposal is harmless."""
        if self._is_applied:
            return
        config, id = self._config, self._cluster.local_id
        member = Member(id, (), config.name, config.advertise_client_urls, FEATURES)
        path = f"/0/members/{format_id(id)}/attributes"
        self._propose(Request(method="PUT", path=path, val=member.attributes_json()), self._applied)

    def _applied(self, result: Any) -> None:
        if self._is_applied or isinstance(result, ServerStopped):
            return
        if isinstance(result, EtcdError):
            SERVER_LOG.error("publish error: %s", result.cause)
            self._reactor.call_later(SYNC_SECONDS, self.propose)
            return
        self._is_applied = True
        _check_peer_urls(self._config, self._cluster.members.get(self._cluster.local_id))
        SERVER_LOG.info(
            "published {Name:%s ClientURLs:[%s]} to cluster %s", self._config.name,
            " ".join(self._config.advertise_client_urls), format_id(self._cluster.id),
        )
        self._done()


def _check_peer_urls(config: ServerConfig, member: Optional[Member]) -> None:
    """Warn if the flags have other peer URLs than the cluster: only the first start uses them.

    Ignores default URLs, and ports that the system chose.
    """
    if member is None:                  # removed before its publication was applied
        return
    given = tuple(sorted(config.initial_advertise_peer_urls))
    is_chosen = given != tuple(DEFAULT_PEER_URLS.split(",")) and not any(
        url.endswith(":0") for url in config.listen_peer_urls
    )
    if given != member.peer_urls and is_chosen:
        SERVER_LOG.warning(
            "-initial-advertise-peer-urls %s does nothing: the other members know this one by"
            " %s; change that with PUT /v2/members/%s", ",".join(given),
            ",".join(member.peer_urls), format_id(member.id),
        )


class VersionMonitor:
    """Raises the cluster version to the lowest version of any member.  For a leader.

    Differs from etcd: a leader of identity `bridge` lowers it if no member reports a higher one.
    Source: etcd 2.3 etcdserver/cluster_util.go.
    """

    PERIOD_S = 4.0

    def __init__(
        self, reactor: Reactor, cluster: Cluster, propose: Propose,
        tls: Optional[TlsContext] = None,
    ) -> None:
        self._reactor = reactor
        self._cluster = cluster
        self._propose = propose
        self.tls = tls
        self._calls: List[HttpCall] = []
        self._versions: Dict[int, str] = {}
        self._timer = Timer(_nothing, ())

    def start(self) -> None:
        """Ask all members, now and every few seconds until the version is as high as ours."""
        self.stop()
        cluster, own = self._cluster, self._cluster.identity.reported
        if cluster.version and version_key(cluster.version) == version_key(own):
            return
        self._versions = {cluster.local_id: own}
        for member in cluster.members.values():
            urls = usable_urls(member.peer_urls)
            if member.id != cluster.local_id and urls:
                self._ask(member, urls[0])
        self._timer = self._reactor.call_later(self.PERIOD_S, self.start)
        self._decide()

    def stop(self) -> None:
        for call in self._calls:
            call.cancel()
        self._calls = []
        self._timer.cancel()

    def _ask(self, member: Member, url: str) -> None:
        def done(error: Optional[Exception], answer: Answer) -> None:
            version = _server_version(answer.body)
            if error is None and version:
                self._versions[member.id] = version
            self._decide()

        self._calls.append(fetch(
            self._reactor, url, "/version", done, connect_timeout_s=1.0, idle_timeout_s=2.0,
            tls=self.tls,
        ))

    def _decide(self) -> None:
        """Propose the minimum when every member has answered; a first guess when one cannot."""
        current = self._cluster.version
        if self._versions.keys() >= self._cluster.members.keys():
            known = version_key(current) if current else (0, 0)
            keys = sorted(map(version_key, self._versions.values()))
            if keys[0] > known or keys[-1] < known:
                self._propose_version("%d.%d.0" % keys[0])
        elif not current and self._calls and all(call.ended for call in self._calls):
            self._propose_version(self._cluster.identity.min_cluster)

    def _propose_version(self, wanted: str) -> None:
        short, current = wanted.rpartition(".")[0], self._cluster.version
        if current:
            SERVER_LOG.info("updating the cluster version from %s to %s",
                            current.rpartition(".")[0], short)
        else:
            SERVER_LOG.info("setting up the initial cluster version to %s", short)
        self.stop()
        self._propose(Request(method="PUT", path="/0/version", val=wanted), lambda result: None)
        self._timer = self._reactor.call_later(self.PERIOD_S, self.start)


def _server_version(body: bytes) -> str:
    try:
        version = str(load_json(body)["etcdserver"])
        version_key(version)
    except (ValueError, KeyError, TypeError):
        return ""
    return version


class ExpirySync:
    """Puts the leader's clock into the log, where every member expires keys alike.

    Differs from etcd: if many keys expire, the time in the log catches up with the clock in
    steps, each after the one before is applied, so that no other request waits for all of them.
    """

    def __init__(
        self, store: Store, wall_ns: Callable[[], int], propose: Propose,
        may_propose: Callable[[], bool],
    ) -> None:
        self._store = store
        self._wall_ns = wall_ns
        self._propose = propose
        self._may_propose = may_propose
        self._is_under_way = False

    def tick(self) -> None:
        """Propose the time if keys have a TTL; every SYNC_SECONDS."""
        if self._is_under_way or not self._store.has_ttl or not self._may_propose():
            return
        now_ns = self._wall_ns()
        time_ns = self._store.expiry_step_ns(now_ns)
        self._is_under_way = True
        applied = functools.partial(self._step_applied, time_ns == now_ns)
        self._propose(Request(method="SYNC", time=time_ns), applied)

    def _step_applied(self, is_last: bool, result: Any) -> None:
        self._is_under_way = False
        if result is None and not is_last:      # a step that failed is repeated by tick()
            self.tick()


def purge_periodically(
    reactor: Reactor, disk: OsDisk, kept: Sequence[Tuple[str, str, int]]
) -> None:
    """Remove old files now and every 30 s.  kept: (directory, suffix, number of newest), ..."""
    def purge() -> None:
        for directory, suffix, keep in kept:
            purge_files(directory, suffix, keep, disk=disk)

    def purged(error: Optional[BaseException], _: Any) -> None:
        reactor.call_later(PURGE_SECONDS, purge_periodically, reactor, disk, kept)
        if error is not None:
            SERVER_LOG.error("cannot remove old files: %s", error)

    reactor.run_blocking(purge, kind=FILE_WORK, done=purged)
