"""Versions of etcd: the identity that a member announces, and the peers that fit it."""

from __future__ import annotations

import re
from typing import Mapping, NamedTuple, Optional, Tuple

from .limits import MIN_CLUSTER_VERSION, SERVER_VERSION

UNKNOWN_VERSION = "2.0.0"           # of a peer without the header
_VERSION = re.compile(r"(\d{1,9})\.(\d{1,9})\.\d{1,9}(?:[-+].*)?")


def major_minor(version: str) -> Optional[Tuple[int, int]]:
    """Return (major, minor) of a semantic version `a.b.c`; None for any other text."""
    match = _VERSION.fullmatch(version)
    return (int(match.group(1)), int(match.group(2))) if match else None


def version_key(version: str) -> Tuple[int, int]:
    """Return (major, minor) of `a.b.c`.  Raises ValueError."""
    major, minor, _ = version.split(".", 2)
    return int(major), int(minor)


class Identity(NamedTuple):
    """The version of etcd that a member acts as (-compat-version).

    Etcd members refuse peers by the first two; a leader makes the lowest `etcdserver` of all
    members the cluster version.
    """

    server: str             # X-Server-Version: no cluster above its major.minor is joined
    min_cluster: str        # X-Min-Cluster-Version: oldest peer and oldest cluster version
    reported: str           # `etcdserver` in GET /version

    def bears(self, cluster_version: str) -> bool:
        """True if a member of this identity can live in a cluster of that version."""
        return version_key(cluster_version) <= version_key(self.server)

    def refusal(self, headers: Mapping[str, str]) -> str:
        """Return why the two versions in a peer's headers do not fit this identity; "": they do.

        Source: etcd 2.3 rafthttp/http.go, checkClusterCompatibilityFromHeader.
        """
        version = headers.get("x-server-version", UNKNOWN_VERSION)
        server = major_minor(version)
        least = major_minor(headers.get("x-min-cluster-version", UNKNOWN_VERSION))
        remote = f"remote[{headers.get('x-server-from', '')}]={version}"
        if server is None or least is None:
            return f"not a version: {remote}"
        if server < version_key(self.min_cluster):
            return f"remote version is too low: {remote}, local={self.server}"
        if least > version_key(self.server):
            hint = "; start this member with -compat-version 3.4" if least == (3, 0) else ""
            return f"local version is too low: {remote}, local={self.server}{hint}"
        return ""


AUTO_IDENTITY = "auto"
IDENTITIES = {
    "2.3": Identity(SERVER_VERSION, MIN_CLUSTER_VERSION, SERVER_VERSION),
    # Accepted by 2.3 as well, which looks only at the minimum of a newer peer.
    "3.4": Identity("3.4.23", MIN_CLUSTER_VERSION, "3.4.23"),
    # The same to peers, but the cluster version stays at 2.3, so members of 2.3 may come back.
    "bridge": Identity("3.4.23", MIN_CLUSTER_VERSION, SERVER_VERSION),
}
DEFAULT_IDENTITY = IDENTITIES["2.3"]
FIRST_V3_VERSION = (3, 0)


def choose_identity(name: str, *cluster_versions: Optional[str]) -> Identity:
    """Return the identity of -compat-version `name` for a cluster of these versions."""
    if name != AUTO_IDENTITY:
        return IDENTITIES[name]
    # 2.3, unless the cluster bears 3.0 or more: its members refuse 2.3 then.
    keys = [major_minor(version or "") or (0, 0) for version in cluster_versions]
    return IDENTITIES["3.4"] if max(keys, default=(0, 0)) >= FIRST_V3_VERSION else DEFAULT_IDENTITY
