"""The cluster file of a proxy: peer URLs of the members, and where they come from."""

from __future__ import annotations

import json
import os
from typing import NamedTuple, Optional, Tuple

from ..base.basics import fsync_dir
from ..base.errors import DiscoveryError, StartError
from ..base.ids import package_logger
from ..base.text import go_quote, json_text, utf8
from ..base.urls import check_url, usable_urls
from ..disk.snapshots import check_layout, check_writable, make_dirs
from ..member.cluster import parse_initial_cluster
from ..member.configuration import ServerConfig
from ..net.dns import _reason, name_servers
from .addresses import default_initial_cluster
from .bootstrap import _discovery_failure
from .discovery import Discovery, srv_cluster

PROXY_LOG = package_logger("proxy")


class ClusterFile(NamedTuple):
    """The contents of a cluster file."""

    peer_urls: Tuple[str, ...]
    client_urls: Tuple[str, ...] = ()   # that worked when the published ones did not; not of etcd


def find_cluster(config: ServerConfig, cluster_file: str) -> ClusterFile:
    """Return the URLs of the members, from the cluster file or else from bootstrap flags.

    Raises StartError.  Discovery waits for the members.  Source: etcd 2.3 startProxy.
    """
    known = read_cluster_file(cluster_file)
    if known is not None:
        for what, given in (
            ("discovery token", config.discovery), ("DNS SRV discovery", config.discovery_srv),
        ):
            if given:
                PROXY_LOG.warning(
                    "%s ignored since the proxy has already been initialized. Valid cluster file"
                    " found at %s", what, go_quote(cluster_file),
                )
        PROXY_LOG.info("using peer urls [%s] from cluster file %s", " ".join(known.peer_urls),
                 go_quote(cluster_file))
        return known
    try:
        text = config.initial_cluster or default_initial_cluster(config)
        if config.discovery:
            text = Discovery(config.discovery, 0, "", proxy=config.discovery_proxy).find()
        elif config.discovery_srv:
            advertised = config.initial_advertise_peer_urls
            text = srv_cluster(config.discovery_srv, config.name, advertised, name_servers())
        initial = parse_initial_cluster(text)
    except DiscoveryError as error:
        raise StartError(_discovery_failure(config, config.data_dir, error)) from error
    except ValueError as error:
        raise StartError(f"error setting up initial cluster: {error}") from None
    urls = tuple(sorted(url for member in initial.values() for url in member))
    PROXY_LOG.info("using peer urls [%s] ", " ".join(urls))
    return ClusterFile(urls)


def read_cluster_file(path: str) -> Optional[ClusterFile]:
    """Return the contents of a cluster file; None if it does not exist.  Raises StartError."""
    try:
        with open(path, "rb") as file:
            content = json.load(file)
        kept = content.get("ClientURLs")
        return ClusterFile(
            tuple(map(check_url, content["PeerURLs"])),
            tuple(usable_urls(map(str, kept if isinstance(kept, list) else ()))),
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StartError(
            f"cannot use the cluster file {path}: {_reason(error)}; remove it to begin again with"
            f" -initial-cluster or -discovery"
        ) from None


def write_cluster_file(path: str, cluster: ClusterFile) -> None:
    """Replace the cluster file atomically.  Raises OSError."""
    content = {"PeerURLs": cluster.peer_urls}
    if cluster.client_urls:
        content["ClientURLs"] = cluster.client_urls
    descriptor = os.open(path + ".bak", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(descriptor, "wb") as file:
        file.write(utf8(json_text(content)))
        file.flush()
        os.fsync(descriptor)
    os.replace(path + ".bak", path)
    fsync_dir(os.path.dirname(path))


def prepare_proxy_dir(config: ServerConfig) -> str:
    """Make <data dir>/proxy and return the path of the cluster file in it.  Raises StartError."""
    root = config.data_dir or config.name + ".etcd"
    path = os.path.join(root, "proxy")
    try:
        names = set(os.listdir(root)) if os.path.exists(root) else set()
        if "member" in names and "proxy" not in names:
            raise StartError(f"{root} belongs to a member; choose another -data-dir for a proxy")
        check_layout(root, names)
        make_dirs((path, root))
        check_writable(path)
    except OSError as error:
        raise StartError(
            f"cannot write to proxy directory: {error}; give the directory to this user, or choose"
            f" another -data-dir"
        ) from None
    return os.path.join(path, "cluster")
