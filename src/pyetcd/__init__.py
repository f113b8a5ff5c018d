"""pyetcd: etcd v2 in one Python file, with the standard library only.

A member, a whole cluster in one process, or a discovery service: same flags, same HTTP API, same
peer protocol and same files on disk as etcd 2.3.8.  Run it (`python pyetcd.py -h`), or embed it:

    with pyetcd.Server(data_dir="x.etcd") as server:
        print(server.client_urls)

One thread, the reactor, owns all state; a second one, `wal`, writes and syncs:

    clients --> HTTP server --> keys API --> Raft core --> journal ==> wal thread ==> disk
       ^                          |           |     ^                     |
       |                       (reads)     streams  +---- persisted ------+
       |                          v           v
       +---- replies, events -- store <--- applier        other members

@INDEX@

Sources: the Raft paper and Ongaro's thesis; the documents and the observed behaviour of etcd 2.0,
2.3 and 3.4.  Differences from etcd are listed in docs/differences.md.
"""

from __future__ import annotations

from .base.errors import EtcdError, StartError
from .base.limits import __version__
from .life.backup import backup, restore
from .life.command_line import main
from .life.embedding import Server
from .life.proxy import ProxyServer
from .life.sources import BackupError
from .life.testkit import ClusterFactory, LocalCluster, LocalMember

__all__ = [
    "__version__", "Server", "ProxyServer", "StartError", "EtcdError", "backup", "restore",
    "BackupError", "LocalMember", "LocalCluster", "ClusterFactory", "main",
]
