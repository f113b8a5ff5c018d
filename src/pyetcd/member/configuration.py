"""The settings of a member, and the state that it boots with."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Optional, Sequence, Tuple

from ..base.basics import TlsFiles
from ..base.limits import (
    DEFAULT_CLIENT_URLS,
    DEFAULT_CLUSTER_TOKEN,
    DEFAULT_ELECTION_MS,
    DEFAULT_HEARTBEAT_MS,
    DEFAULT_NAME,
    DEFAULT_PEER_URLS,
    DEFAULT_SNAPSHOT_COUNT,
    DEFAULT_SNAPSHOTS_KEPT,
    DEFAULT_WALS_KEPT,
    HISTORY_EVENTS_MAX,
)
from ..base.messages import Entry, Snapshot
from ..disk.records import WalContents
from ..disk.snapshots import DataDir, Snapshotter
from ..disk.wal import Wal
from ..net.tls import TlsContext
from ..store.tree import Store
from .cluster import Cluster, Member

if TYPE_CHECKING:
    from typing_extensions import TypedDict


class ServerConfig(NamedTuple):
    """All settings of a member; frozen after start.  URLs are checked; times in ms."""

    name: str = DEFAULT_NAME
    data_dir: str = ""                  # "": <name>.etcd in the working directory
    wal_dir: str = ""                   # "": <data_dir>/member/wal
    snapshot_count: int = DEFAULT_SNAPSHOT_COUNT
    heartbeat_ms: int = DEFAULT_HEARTBEAT_MS
    election_ms: int = DEFAULT_ELECTION_MS
    max_snapshots: int = DEFAULT_SNAPSHOTS_KEPT
    max_wals: int = DEFAULT_WALS_KEPT
    initial_cluster: str = ""           # "": this member alone
    initial_cluster_token: str = DEFAULT_CLUSTER_TOKEN
    initial_cluster_state: str = "new"
    force_new_cluster: bool = False
    listen_client_urls: Tuple[str, ...] = tuple(DEFAULT_CLIENT_URLS.split(","))
    listen_peer_urls: Tuple[str, ...] = tuple(DEFAULT_PEER_URLS.split(","))
    advertise_client_urls: Tuple[str, ...] = tuple(DEFAULT_CLIENT_URLS.split(","))
    initial_advertise_peer_urls: Tuple[str, ...] = tuple(DEFAULT_PEER_URLS.split(","))
    discovery: str = ""
    discovery_fallback: str = "proxy"
    discovery_proxy: str = ""
    discovery_srv: str = ""
    compat_version: str = "auto"        # or `2.3`, `3.4`, `bridge`: see base/versions.py
    strict_reconfig_check: bool = True
    history_events: int = HISTORY_EVENTS_MAX
    cors: Tuple[str, ...] = ()
    ui: str = "true"                    # the page: `true`, `false`, or `readonly`
    client_tls: TlsFiles = TlsFiles()
    peer_tls: TlsFiles = TlsFiles()
    proxy: str = "off"                  # `on` or `readonly`: no member, see life/proxy.py
    proxy_failure_wait_ms: int = 5000
    proxy_refresh_interval_ms: int = 30_000
    proxy_dial_timeout_ms: int = 1000   # this and the next two: 0 is no limit
    proxy_write_timeout_ms: int = 5000
    proxy_read_timeout_ms: int = 0
    debug: bool = False

    @property
    def request_timeout_s(self) -> float:
        """Time for a commit before a client gets an error: 5 s and two elections (etcd 2.3)."""
        return 5.0 + 2 * self.election_ms / 1000


if TYPE_CHECKING:
    class MemberSettings(TypedDict, total=False):
        """The fields of ServerConfig without the name, as keyword arguments."""

        data_dir: str
        wal_dir: str
        snapshot_count: int
        heartbeat_ms: int
        election_ms: int
        max_snapshots: int
        max_wals: int
        initial_cluster: str
        initial_cluster_token: str
        initial_cluster_state: str
        force_new_cluster: bool
        listen_client_urls: Sequence[str]
        listen_peer_urls: Sequence[str]
        advertise_client_urls: Sequence[str]
        initial_advertise_peer_urls: Sequence[str]
        discovery: str
        discovery_fallback: str
        discovery_proxy: str
        discovery_srv: str
        compat_version: str
        strict_reconfig_check: bool
        history_events: int
        cors: Sequence[str]
        ui: str
        client_tls: TlsFiles
        peer_tls: TlsFiles
        proxy: str
        proxy_failure_wait_ms: int
        proxy_refresh_interval_ms: int
        proxy_dial_timeout_ms: int
        proxy_write_timeout_ms: int
        proxy_read_timeout_ms: int
        debug: bool

    class ServerSettings(MemberSettings, total=False):
        """The fields of ServerConfig as keyword arguments."""

        name: str


class Bootstrap(NamedTuple):
    """The state that bootstrap found or made on disk, for the start of a member."""

    data_dir: DataDir
    member_id: int
    cluster: Cluster
    store: Store
    wal: Wal
    snapshotter: Snapshotter
    contents: WalContents               # empty hard state and entries for a new member
    snapshot: Optional[Snapshot]        # already recovered into store and cluster; data dropped
    bootstrap_entries: Sequence[Entry] = ()     # of a new cluster, not yet on disk
    remotes: Sequence[Member] = ()      # members of the existing cluster that we join
    peer_tls: Optional[TlsContext] = None       # as client of other members
