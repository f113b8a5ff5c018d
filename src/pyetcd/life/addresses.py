"""Addresses of this host, and the lists of members that flags, peers and DNS give."""

from __future__ import annotations

import contextlib
import errno
import http.client
import socket
from typing import Dict, List, Mapping, Optional, Sequence, Set, Tuple
from urllib.parse import urlsplit

from ..base.codec import encode_conf_change
from ..base.errors import DiscoveryError, StartError
from ..base.ids import package_logger
from ..base.limits import DEFAULT_PEER_URLS
from ..base.messages import ConfChange, ConfChangeType, Entry, EntryType
from ..base.text import is_ip, load_json, utf8
from ..base.urls import url_address
from ..base.versions import version_key
from ..disk.snapshots import DataDir
from ..member.cluster import (
    SERVER_LOG,
    Cluster,
    Member,
    format_id,
    format_initial_cluster,
    parse_initial_cluster,
)
from ..member.configuration import ServerConfig
from ..net.dns import _reason, name_servers
from ..net.tls import TlsContext
from .discovery import _resolve, blocking_get, srv_cluster

ETCD_LOG = package_logger("etcd")
JOIN_ANSWER_SECONDS = 10.0          # for /members and /version of the cluster to join
PROBE_ANSWER_SECONDS = 1.0          # for /members of peers that may be down


def is_elsewhere(url: str) -> bool:
    """True if the address in `url` is certainly of another machine; False for any name."""
    host = url_address(url)[0]
    if not is_ip(host):
        return False
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.bind((host, 0))
    except OSError as error:
        return error.errno == errno.EADDRNOTAVAIL
    return False


def default_route_address() -> str:
    """Return the IPv4 address of the interface with the default route, or ""."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect(("192.0.2.1", 9))  # sends nothing: a datagram socket looks up the route
        return str(sock.getsockname()[0])
    return ""


def same_urls(ours: Sequence[str], theirs: Sequence[str]) -> bool:
    """True if each URL of one list shares an address with a URL of the other; names are resolved.

    `localhost` is compared as text, as in etcd: it means another machine everywhere.
    """
    def resolved(url: str) -> Set[Tuple[str, str, int]]:
        addresses = {url_address(url)}
        with contextlib.suppress(OSError):
            if url_address(url)[0] != "localhost":
                addresses = _resolve(url)
        return {(urlsplit(url).scheme, *address) for address in addresses}

    if sorted(ours) == sorted(theirs):
        return True
    some, others = list(map(resolved, ours)), list(map(resolved, theirs))
    return len(some) == len(others) and all(
        any(one & other for other in each)
        for each, ones in ((others, some), (some, others)) for one in ones
    )


def parse_members(body: bytes) -> List[Member]:
    """Return the members in an answer to GET /members.  Raises ValueError."""
    try:
        return [
            Member(
                int(member["id"]), tuple(sorted(map(str, member["peerURLs"]))),
                str(member.get("name", "")), tuple(map(str, member.get("clientURLs") or ())),
            )
            for member in load_json(body)
        ]
    except (KeyError, TypeError, AttributeError):
        raise ValueError("the answer is no list of members") from None


def fetch_cluster(
    url: str, timeout_s: float, tls: Optional[TlsContext], *, quiet: bool = False
) -> Optional[Tuple[int, List[Member]]]:
    """Return (cluster id, members) as the peer at `url` sees them; None, logged, if it is down."""
    try:
        status, headers, body = blocking_get(url, timeout_s, "/members", tls)
        if status != 200:
            raise ValueError(f"unexpected status {status}")
        return int(headers.get("X-Etcd-Cluster-Id", ""), 16), parse_members(body)
    except (OSError, http.client.HTTPException, ValueError) as error:
        if not quiet:
            SERVER_LOG.warning("could not get cluster response from %s: %s", url, _reason(error))
        return None


def _cluster_version(member: Member, tls: Optional[TlsContext]) -> str:
    """Return the cluster version that `member` reports; "" without an answer or a version."""
    for url in member.peer_urls:
        try:
            _, _, body = blocking_get(url, JOIN_ANSWER_SECONDS, "/version", tls)
            version = str(load_json(body)["etcdcluster"])
            version_key(version)
            return version
        except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
            SERVER_LOG.warning(
                "cannot get the version of member %s from %s: %s", format_id(member.id), url,
                _reason(error),
            )
    return ""


def _log_config(config: ServerConfig, data_dir: DataDir, initial: str = "") -> None:
    SERVER_LOG.info("name = %s", config.name)
    if config.force_new_cluster:
        SERVER_LOG.info("force new cluster")
    SERVER_LOG.info("data dir = %s", data_dir.root)
    SERVER_LOG.info("member dir = %s", data_dir.member)
    if config.wal_dir:
        SERVER_LOG.info("dedicated WAL dir = %s", data_dir.wal)
    SERVER_LOG.info("heartbeat = %dms", config.heartbeat_ms)
    SERVER_LOG.info("election = %dms", config.election_ms)
    SERVER_LOG.info("snapshot count = %d", config.snapshot_count)
    if config.discovery:
        SERVER_LOG.info("discovery URL= %s", config.discovery)
        if config.discovery_proxy:
            SERVER_LOG.info("discovery proxy = %s", config.discovery_proxy)
    SERVER_LOG.info("advertise client URLs = %s", ",".join(config.advertise_client_urls))
    if initial:
        urls = ",".join(config.initial_advertise_peer_urls)
        SERVER_LOG.info("initial advertise peer URLs = %s", urls)
        SERVER_LOG.info("initial cluster = %s", initial)


def default_initial_cluster(config: ServerConfig) -> str:
    """Return the default of -initial-cluster: the member alone, on the peer URLs it advertises.

    Source: etcd 3.  Differs from etcd 2.3, which puts the default peer URLs there, and then
    refuses a member that advertises others.
    """
    urls = config.initial_advertise_peer_urls or DEFAULT_PEER_URLS.split(",")
    return ",".join(f"{config.name}={url}" for url in urls)


def url_given_twice(initial: Mapping[str, Tuple[str, ...]]) -> str:
    urls = [url for urls in initial.values() for url in urls]
    return next((url for url in urls if urls.count(url) > 1), "")


def _initial_members(config: ServerConfig) -> Dict[str, Tuple[str, ...]]:
    """Return name -> peer URLs of the cluster to form or join, checked.  Raises StartError."""
    own = {config.name: tuple(sorted(config.initial_advertise_peer_urls))}
    text = config.initial_cluster
    if config.discovery:
        return own
    if config.discovery_srv:
        text = srv_cluster(
            config.discovery_srv, config.name, config.initial_advertise_peer_urls, name_servers()
        )
    elif not text:
        return own
    try:
        nameless = config.initial_cluster_state == "existing"
        initial = parse_initial_cluster(text, nameless=nameless)
    except ValueError as error:
        raise StartError(f"error setting up initial cluster: {error}") from None
    if config.name not in initial:
        if config.discovery_srv:
            raise DiscoveryError(f'cannot find local etcd member "{config.name}" in SRV records')
        raise StartError(
            f'couldn\'t find local name "{config.name}" in the initial cluster configuration;'
            f" -initial-cluster is {text}: add {config.name}=<peer URL>, or use one of its names"
            f" with -name"
        )
    url = url_given_twice(initial)
    if url:
        raise StartError(
            f"initial cluster {format_initial_cluster(initial)} has duplicate url;"
            f" {url} is there more than once, and each member needs peer URLs of its own"
        )
    return initial


def _new_cluster(
    config: ServerConfig, token: str, initial: Mapping[str, Tuple[str, ...]]
) -> Tuple[Cluster, Member]:
    """Return the cluster of these members and this member in it.  Raises StartError."""
    cluster = Cluster.from_initial(token, initial)     # no URL is given twice: the ids differ
    member = cluster.member_by_name(config.name)
    if member is None:
        raise StartError(f'member "{config.name}" is not in the cluster that discovery found')
    cluster.local_id = member.id
    return cluster, member


def _bootstrap_entries(cluster: Cluster) -> List[Entry]:
    """Return a ConfChange per initial member, ascending by id: the same bytes on every member."""
    entries = []
    for index, member in enumerate(sorted(cluster.members.values(), key=lambda m: m.id), 1):
        context = utf8(member.context_json())
        change = ConfChange(0, ConfChangeType.ADD_NODE, member.id, context)
        entries.append(Entry(EntryType.CONF_CHANGE, 1, index, encode_conf_change(change)))
    return entries
