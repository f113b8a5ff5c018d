"""A client for the etcd v2 keys API (pyetcd, etcd 2.x, etcd 3.4 with --enable-v2).

    from pyetcd_client import Client, KeyNotFound

    client = Client()                                  # http://127.0.0.1:2379
    client = Client(["http://10.0.0.1:2379", "10.0.0.2:2379"])
    client.set("foo", "bar", ttl=60).modified_index
    client.get("foo").value
    client.compare_and_swap("foo", "new", prev_value="bar")
    for event in client.watch("/config", recursive=True):
        print(event.action, event.key, event.value)

The client never guesses.  A request goes to another endpoint only if the first connection was
never made, or if it is a read.  If the fate of a write is unknown (its reply was lost, late or
malformed, or the server gave up on it) the error has `maybe_applied=True`, and the client does not
repeat the write: only the program can decide whether it may be applied twice.

`python -m pyetcd_client` is a command line: etcdctl 2.3, and export, mirror, top and others.

@INDEX@

Sources: etcd 2.3 API (keys, members, errorcode), etcdctl 2.3.8, RFC 9110 section 9.2.
"""

from __future__ import annotations

from .client.client import Client
from .client.users import Auth, EtcdRole, EtcdUser, auth
from .client.watching import Watch, WatchedChange, each, to_thread
from .ctl.program import main  # noqa: F401  # for the script; not in __all__
from .recipes.barriers import Barrier, Counter, DoubleBarrier
from .recipes.basics import retry
from .recipes.copies import CachedTree, ChildrenWatch, DataWatch
from .recipes.elections import Election, Leader, Observed
from .recipes.leases import Heartbeat, Lease
from .recipes.locks import Contender, Lock, RLock, RWLock, Semaphore
from .recipes.queues import Queue, QueueItem
from .recipes.services import Instance, Party, Registration, ServiceRegistry
from .transport.connections import ConnectionState, Scope
from .transport.defaults import __version__
from .transport.endpoints import Endpoints
from .transport.errors import (
    ApiError,
    BadReply,
    Cancelled,
    ClusterIdChanged,
    CompareFailed,
    ConnectionFailed,
    DirNotEmpty,
    EtcdAlreadyExist,
    EtcdClusterIdChanged,
    EtcdCompareFailed,
    EtcdConnectionFailed,
    EtcdDirNotEmpty,
    EtcdError,
    EtcdEventIndexCleared,
    EtcdException,
    EtcdInsufficientPermissions,
    EtcdKeyError,
    EtcdKeyNotFound,
    EtcdLeaderElectionInProgress,
    EtcdLockExpired,
    EtcdNotDir,
    EtcdNotFile,
    EtcdRootReadOnly,
    EtcdValueError,
    EtcdWatcherCleared,
    EtcdWatchTimedOut,
    EventIndexCleared,
    HttpError,
    IndexNotANumber,
    InvalidField,
    InvalidForm,
    KeyNotFound,
    LeaderElectionInProgress,
    LockExpired,
    NodeExists,
    NotDir,
    NotFile,
    PrevValueRequired,
    RaftInternal,
    RefreshTtlRequired,
    RefreshValue,
    RequestTimeout,
    RootReadOnly,
    TransportError,
    TtlNotANumber,
    Unauthorized,
    WatcherCleared,
    WatchTimeout,
)
from .transport.results import EtcdResult, Member, Node, Result

__all__ = [
    "__version__", "EtcdError", "ApiError", "KeyNotFound", "CompareFailed", "NotFile", "NotDir",
    "NodeExists", "RootReadOnly", "DirNotEmpty", "Unauthorized", "PrevValueRequired",
    "TtlNotANumber", "IndexNotANumber", "InvalidField", "InvalidForm", "RefreshValue",
    "RefreshTtlRequired", "RaftInternal", "LeaderElectionInProgress", "WatcherCleared",
    "EventIndexCleared", "HttpError", "BadReply", "TransportError", "ConnectionFailed",
    "RequestTimeout", "WatchTimeout", "ClusterIdChanged", "Cancelled", "LockExpired",
    "EtcdKeyError", "EtcdValueError", "EtcdException", "EtcdKeyNotFound", "EtcdCompareFailed",
    "EtcdNotFile", "EtcdNotDir", "EtcdAlreadyExist", "EtcdRootReadOnly", "EtcdDirNotEmpty",
    "EtcdInsufficientPermissions", "EtcdLeaderElectionInProgress", "EtcdWatcherCleared",
    "EtcdEventIndexCleared", "EtcdConnectionFailed", "EtcdWatchTimedOut",
    "EtcdClusterIdChanged", "EtcdLockExpired", "Node", "EtcdResult", "Result", "Member",
    "Scope", "Endpoints", "ConnectionState", "Watch", "WatchedChange", "to_thread", "each",
    "EtcdUser", "EtcdRole", "Auth", "auth", "Client", "retry", "Heartbeat", "Lease",
    "Contender", "Lock", "RLock", "RWLock", "Semaphore", "Observed", "Leader", "Election",
    "QueueItem", "Queue", "Barrier", "DoubleBarrier", "Counter", "CachedTree", "ChildrenWatch",
    "DataWatch", "Instance", "Registration", "ServiceRegistry", "Party",
]
