"""Bootstrap, before the reactor starts: a member of a new cluster, a joining one, or a restart."""

from __future__ import annotations

import contextlib
import os
from typing import Iterable, List, Mapping, Optional, Sequence

from ..base.codec import encode_metadata
from ..base.errors import (
    ClusterFull,
    CodecError,
    DiscoveryError,
    InvariantError,
    SnapshotError,
    StartError,
    WalError,
)
from ..base.limits import ARTICLE_VERSION, DEFAULT_PEER_URLS
from ..base.messages import HardState
from ..base.urls import is_local, url_address
from ..base.versions import (
    AUTO_IDENTITY,
    DEFAULT_IDENTITY,
    IDENTITIES,
    Identity,
    choose_identity,
    version_key,
)
from ..disk.records import WalContents
from ..disk.snapshots import (
    DataDir,
    Snapshotter,
    absent_dirs,
    make_dirs,
    prepare_data_dir,
    remove_dirs,
)
from ..disk.v3_data import V3Mark
from ..disk.wal import Wal
from ..member.cluster import (
    SERVER_LOG,
    Cluster,
    Member,
    format_id,
    format_initial_cluster,
    parse_initial_cluster,
)
from ..member.configuration import Bootstrap, ServerConfig
from ..net.tls import TlsContext
from ..store.tree import Store
from .addresses import (
    ETCD_LOG,
    JOIN_ANSWER_SECONDS,
    PROBE_ANSWER_SECONDS,
    _bootstrap_entries,
    _cluster_version,
    _initial_members,
    _log_config,
    _new_cluster,
    default_route_address,
    fetch_cluster,
    is_elsewhere,
    same_urls,
    url_given_twice,
)
from .discovery import Discovery, DiscoveryFull, DuplicateId, DuplicateName, check_discovery_url
from .restart import _restart


def bootstrap(config: ServerConfig) -> Bootstrap:
    """Restart from the log on disk, or form or join a cluster; return the state to start with.

    A log on disk takes precedence over every flag, and stays open and locked.  Raises StartError.
    Thread: the caller's; blocks, with discovery until all members have registered.
    Source: etcd 2.3 etcdserver/server.go NewServer.
    """
    root = config.data_dir or config.name + ".etcd"
    member = os.path.join(root, "member")
    fresh = absent_dirs(config.wal_dir or os.path.join(member, "wal"), os.path.join(member, "snap"))
    with contextlib.ExitStack() as on_failure:
        on_failure.callback(remove_dirs, fresh)
        boot = _bootstrap(config, prepare_data_dir(root, config.wal_dir), fresh)
        _prepare_database(boot)
        _log_identity(config.compat_version, boot.cluster.identity)
        on_failure.pop_all()
    return boot


def _bootstrap(config: ServerConfig, data_dir: DataDir, fresh: Sequence[str]) -> Bootstrap:
    """Do the work of bootstrap(), which made the `fresh` directories; raise StartError only."""
    SERVER_LOG.info("datadir is valid for the %s format", ARTICLE_VERSION)
    try:
        tls = make_peer_tls(config)
        if Wal.exists(data_dir.wal):
            return _restart(config, data_dir)._replace(peer_tls=tls)
        _check_log_is_not_missing(data_dir)
        if config.force_new_cluster:
            SERVER_LOG.warning(
                "-force-new-cluster does nothing for a member without data; leave it out: at a"
                " later start it would remove all other members"
            )
        joins = config.initial_cluster_state == "existing"
        boot = _join(config, data_dir, tls) if joins else _form(config, data_dir, tls, fresh)
        return boot._replace(peer_tls=tls)
    except (WalError, SnapshotError, CodecError, InvariantError) as error:
        raise StartError(str(error)) from error     # nothing runs yet: no state to protect
    except DiscoveryFull as error:
        text = _discovery_failure(config, data_dir.root, error)
        if config.discovery_fallback != "proxy":
            raise StartError(text) from error
        # Empty directories of a member would stop the proxy that starts instead.
        remove_dirs((os.path.join(data_dir.member, "wal"), data_dir.snap, data_dir.member))
        raise ClusterFull(text) from error
    except DiscoveryError as error:
        raise StartError(_discovery_failure(config, data_dir.root, error)) from error
    except OSError as error:
        raise StartError(f"cannot use data directory {data_dir.root}: {error}") from error


def _prepare_database(boot: Bootstrap) -> None:
    """Let etcd 3.4 start on this data directory if this member acts as one, else etcd 2.3."""
    mark = boot.cluster.v3_mark = V3Mark(boot.data_dir.member)
    if boot.cluster.identity == IDENTITIES["3.4"]:
        boot.snapshotter.before_write = mark.write_database
        if boot.snapshot is not None:
            mark.write_database(boot.snapshot.index)
    else:
        mark.remove_database()


def _log_identity(compat_version: str, identity: Identity) -> None:
    if identity is not DEFAULT_IDENTITY:
        why = "the cluster version is 3.0 or higher" if compat_version == AUTO_IDENTITY else (
            f"-compat-version is {compat_version}")
        SERVER_LOG.info(
            "this member acts as etcd %s towards other members: %s", identity.server, why)


def make_peer_tls(config: ServerConfig) -> Optional[TlsContext]:
    """Return the TLS context for calls to members; None if no flag or URL speaks of TLS.

    Without it, calls to https members trust the system's authorities.  Raises StartError.
    """
    urls = ",".join((*config.initial_advertise_peer_urls, config.initial_cluster))
    if any(config.peer_tls) or "https:" in urls:
        return TlsContext(config.peer_tls, server=False)
    return None


def _check_log_is_not_missing(data_dir: DataDir) -> None:
    """Raise StartError if a member without a log has other files here: it is not new."""
    usual = os.path.join(data_dir.member, "wal")
    if Wal.exists(usual):
        raise StartError(
            f"{usual} holds the log of this member, but -wal-dir names {data_dir.wal}, which holds"
            f" none; leave -wal-dir out, or stop the member and move the log there"
        )
    Snapshotter(data_dir.snap).check_log(data_dir.wal, ())


def _discovery_failure(config: ServerConfig, data_dir: str, error: DiscoveryError) -> str:
    """Return one line for the operator, in the words of etcd, which prints up to four lines."""
    url = config.discovery
    if isinstance(error, DuplicateId):
        return (
            f'member "{config.name}" has previously registered with discovery service token'
            f" ({url}). But etcd could not find valid cluster configuration in the given data dir"
            f" ({data_dir}). Please check the given data dir path if the previous bootstrap"
            f" succeeded or use a new discovery token if the previous bootstrap failed. If this"
            f" member never ran before, another one has registered with the same"
            f" -initial-advertise-peer-urls ({','.join(config.initial_advertise_peer_urls)})."
        )
    if isinstance(error, DuplicateName):
        return (
            f"member with duplicated name has registered with discovery service token({url})."
            " please check (cURL) the discovery token for more information."
            " please do not reuse the discovery token and generate a new one to bootstrap the"
            " cluster, with another -name for each member."
        )
    if isinstance(error, DiscoveryFull) and config.discovery_fallback == "proxy":
        return (
            f"discovery cluster is full ({url}): start a proxy of it, or add this member with POST"
            f" /v2/members on a running member and start it with -initial-cluster-state existing,"
            f" or generate a new discovery token"
        )
    if config.discovery_srv:
        return f"error setting up initial cluster: {error}"
    hint = ""
    if "size key" in str(error):
        hint = f"set it with `curl {url}/_config/size -XPUT -d value=3`, or "
    return (
        f"failed to join discovery cluster ({error}): discovery token {url} was used, but failed"
        f" to bootstrap the cluster; {hint}please generate a new discovery token and try to"
        f" bootstrap again."
    )


def _check_advertised(config: ServerConfig, initial: Mapping[str, Sequence[str]]) -> None:
    """Raise StartError unless `initial` has the advertised peer URLs under this member's name."""
    advertised = config.initial_advertise_peer_urls
    if same_urls(initial[config.name], advertised):
        return
    listed = sorted(set(initial[config.name]))
    if set(listed) > set(advertised):
        raise StartError(
            f"--initial-cluster has the name {config.name} more than once, for"
            f" {' and '.join(listed)}: give each member a name of its own; if all these are URLs"
            f" of {config.name}, set --initial-advertise-peer-urls={','.join(listed)}"
        )
    wanted, given = ",".join(f"{config.name}={url}" for url in advertised), ",".join(advertised)
    forgot = "; forgot to set --initial-advertise-peer-urls flag?"
    raise StartError(
        f"--initial-cluster must include {wanted} given"
        f" --initial-advertise-peer-urls={given}{forgot if given == DEFAULT_PEER_URLS else ''}"
    )


def _check_reachable(config: ServerConfig, initial: Mapping[str, Sequence[str]]) -> None:
    """Raise StartError if other members can never connect to this one; warn if they might not.

    Differs from etcd, which waits without end for members that talk to themselves.
    """
    others = [url for name, urls in initial.items() if name != config.name for url in urls]
    far = [url for url in others if not is_local(url)]
    near = [url for url in others if is_local(url)]
    own, advice = initial[config.name], f"e.g. http://{default_route_address() or '10.0.0.5'}"
    if far and all(map(is_local, own)):
        port = url_address(own[0])[1]
        what = (
            f"the peer URL {','.join(own)} of {config.name} can be reached from this machine only,"
            f" but {far[0]} is another member's; write an address that all members can reach,"
            f" {advice}:{port}, in -initial-advertise-peer-urls and wherever the members are listed"
        )
        if any(map(is_elsewhere, far)):
            new = "; then take a new discovery URL" if config.discovery else ""
            raise StartError(what + new)
        ETCD_LOG.warning("%s", what)
    elif near and not all(map(is_local, own)):
        ETCD_LOG.warning(
            "%s is listed for another member, but means this machine here; write an address that"
            " all members can reach", near[0],
        )
    is_spread = others and not all(map(is_local, [*others, *own]))
    if is_spread and all(map(is_local, config.advertise_client_urls)):
        ETCD_LOG.warning(
            "clients on other machines are told %s, which is their own machine; set"
            " -advertise-client-urls to an address of this one, %s:%d",
            ",".join(config.advertise_client_urls), advice,
            url_address(config.advertise_client_urls[0])[1],
        )


def _check_registration(config: ServerConfig) -> None:
    """Warn if a loopback URL is registered at a discovery service on another machine."""
    urls = config.initial_advertise_peer_urls
    if all(map(is_local, urls)) and not is_local(config.discovery):
        ETCD_LOG.warning(
            "registers %s, which other machines take for themselves; if members run elsewhere,"
            " stop, set -initial-advertise-peer-urls to an address of this machine, e.g."
            " http://%s:%d, and take a new discovery URL", ",".join(urls),
            default_route_address() or "10.0.0.5", url_address(urls[0])[1],
        )


def _form(
    config: ServerConfig, data_dir: DataDir, tls: Optional[TlsContext], fresh: Sequence[str]
) -> Bootstrap:
    """Form a new cluster: all members start with the same entries, which count as committed."""
    initial = _initial_members(config)
    _check_advertised(config, initial)
    _check_reachable(config, initial)
    token = check_discovery_url(config.discovery) if config.discovery else ""
    token = token or config.initial_cluster_token
    cluster, member = _new_cluster(config, token, initial)
    _check_no_past(member.id, cluster.members.values(), tls)
    if config.discovery:
        _check_registration(config)
        discovery = Discovery(
            config.discovery, member.id, format_initial_cluster(initial),
            proxy=config.discovery_proxy,
        )
        remove_dirs(fresh)              # a member that ends while it waits leaves no directory
        initial = parse_initial_cluster(discovery.join())
        make_dirs(fresh)
        url = url_given_twice(initial)
        if url:
            text = format_initial_cluster(initial)
            raise DiscoveryError(f"discovery cluster {text} has duplicate url: {url}")
        _check_reachable(config, initial)
        cluster, member = _new_cluster(config, token, initial)
        if discovery.resumed:
            _check_no_past(member.id, cluster.members.values(), tls)
    cluster.identity = choose_identity(config.compat_version)
    boot = _create_log(config, data_dir, cluster, initial)
    return boot._replace(bootstrap_entries=_bootstrap_entries(cluster))


def _create_log(
    config: ServerConfig, data_dir: DataDir, cluster: Cluster, initial: Mapping[str, Sequence[str]],
) -> Bootstrap:
    """Create the log of the new member cluster.local_id, whose cluster has `initial` members."""
    store = Store(history_capacity=config.history_events)
    cluster.store = store
    _log_config(config, data_dir, format_initial_cluster(initial))
    metadata = encode_metadata(cluster.local_id, cluster.id)
    wal = Wal.create(data_dir.wal, metadata)
    SERVER_LOG.info(
        "start member %s in cluster %s", format_id(cluster.local_id), format_id(cluster.id)
    )
    return Bootstrap(
        data_dir, cluster.local_id, cluster, store, wal, Snapshotter(data_dir.snap),
        WalContents(metadata, HardState(), [], []), None,
    )


def _peer_urls_of_others(members: Iterable[Member], id: int) -> List[str]:
    return sorted(url for member in members if member.id != id for url in member.peer_urls)


def is_published(id: int, members: Sequence[Member]) -> bool:
    """True if a peer's list of members has client URLs for this member: it ran before."""
    return any(member.id == id and member.client_urls for member in members)


def data_lost(id: int) -> StartError:
    return StartError(
        f"member {format_id(id)} has already been bootstrapped; its data directory is"
        f" lost or -data-dir is wrong: restore it, or remove the member with DELETE"
        f" /v2/members/{format_id(id)} on another one, add it anew and start it with"
        f" -initial-cluster-state existing"
    )


def _check_no_past(id: int, members: Iterable[Member], tls: Optional[TlsContext]) -> None:
    """Raise StartError if a running peer knows that this member, whose log is empty, ran before.

    Such a member could vote a second time in a term, and lacks entries that a quorum counted it
    for.  All peers are asked: one may have missed its publication.
    """
    for url in _peer_urls_of_others(members, id):
        found = fetch_cluster(url, PROBE_ANSWER_SECONDS, tls, quiet=True)
        if found is not None and is_published(id, found[1]):
            raise data_lost(id)


def _join(config: ServerConfig, data_dir: DataDir, tls: Optional[TlsContext]) -> Bootstrap:
    """Join an existing cluster, which has these peer URLs already and will send the log."""
    if config.discovery:
        raise StartError(
            "discovery URL should not be set when joining existing initial cluster;"
            " remove -discovery (ETCD_DISCOVERY) and list the members in -initial-cluster"
        )
    initial = _initial_members(config)
    local, own = _new_cluster(config, config.initial_cluster_token, initial)
    urls = _peer_urls_of_others(local.members.values(), own.id)
    answers = (fetch_cluster(url, JOIN_ANSWER_SECONDS, tls) for url in urls)
    found = next(filter(None, answers), None)
    if found is None:
        raise StartError(
            "cannot fetch cluster info from peer urls: could not retrieve cluster information from"
            " the given urls; -initial-cluster must name at least one running member"
        )
    cluster_id, existing = found
    members = _match_members(local, existing)
    own = next(member for member in members if member.name == config.name)
    _check_no_past(own.id, members, tls)
    _check_reachable(config, initial)
    others = [member for member in members if member.id != own.id]
    versions = list(filter(None, (_cluster_version(member, tls) for member in others)))
    local.identity = identity = choose_identity(config.compat_version, *versions)
    low = version_key(identity.min_cluster)
    if not versions or not all(low <= version_key(v) and identity.bears(v) for v in versions):
        hint = "" if identity.bears("3.4.0") else "; -compat-version 3.4 joins one of 3.x"
        raise StartError(
            f"incompatible with current running cluster: its version must lie between"
            f" {identity.min_cluster} and {identity.server}; look at GET /version of its"
            f" members{hint}"
        )
    local.id, local.local_id = cluster_id, own.id
    local.members = {member.id: member for member in members}
    return _create_log(config, data_dir, local, initial)._replace(remotes=others)


def _match_members(local: Cluster, existing: Sequence[Member]) -> List[Member]:
    """Return the local members with the ids that the existing cluster gave them."""
    what = "error validating peerURLs of -initial-cluster"
    urls = " ".join(",".join(member.peer_urls) for member in existing)
    hint = f"the members have [{urls}]; list exactly these, and add this member there first"
    ours = list(local.members.values())
    if len(ours) != len(existing):
        raise StartError(f"{what}: member count is unequal; {hint}")
    matched = []
    for member in ours:
        same = [other for other in existing if same_urls(member.peer_urls, other.peer_urls)]
        if len(same) != 1:
            raise StartError(f"{what}: unmatched member while checking PeerURLs; {hint}")
        name = member.name.partition("=")[0]        # "" before its first start
        matched.append(member._replace(id=same[0].id, name=name))
    return sorted(matched, key=lambda member: member.id)
