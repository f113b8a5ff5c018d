"""The snapshot API: the whole state, over HTTP."""

from __future__ import annotations

from typing import Callable, Iterator, Optional, Set

from ..base.limits import HELD_BYTES_MAX
from ..disk.snapshots import SnapshotFile
from ..member.cluster import format_id
from ..member.server import EtcdServer
from ..net.http_requests import HttpRequest
from .forms import send_pieces, write_message

DOWNLOADS_MAX = 4                   # at a time, with HELD_BYTES_MAX of snapshots; above: 503


class SnapshotApi:
    """/v2/snapshot: the state at one index, as the file that a member would write.

    Differs from etcd 2.3, which has no such path.  Thread: reactor.
    """

    METHODS = ("GET",)

    def __init__(self, server: EtcdServer) -> None:
        self._server = server
        self._downloads: Set[Download] = set()

    def handle(self, request: HttpRequest) -> None:
        if not self._server.raft_index:
            write_message(request, 503, "this member has no state yet; ask another one")
        elif len(self._downloads) >= DOWNLOADS_MAX or self._held_bytes() > HELD_BYTES_MAX:
            write_message(request, 503, "too many snapshots are being taken; try again later")
        else:
            self._downloads.add(Download(request, self._server, self._downloads.discard))

    def _held_bytes(self) -> int:
        """Return the memory of the snapshots under way; several downloads may share one."""
        files = {id(each.file): each.file.size for each in self._downloads if each.file}
        return sum(files.values())


class Download:
    """One answer: it waits for the snapshot, then sends its pieces as fast as the client reads."""

    def __init__(
        self, request: HttpRequest, server: EtcdServer, ended: Callable[[Download], None]
    ) -> None:
        self._request = request
        self._server = server
        self._ended = ended
        self.file: Optional[SnapshotFile] = None        # once the snapshot is complete
        request.connection.on_close = self._client_gone
        server.snapshots.request(self._start)

    def _start(self, file: SnapshotFile, etcd_index: int) -> None:
        headers = (
            f"X-Etcd-Cluster-Id: {format_id(self._server.cluster.id)}\r\n"
            f"X-Etcd-Index: {etcd_index}\r\nX-Raft-Index: {file.id.index}\r\n"
            f"X-Raft-Term: {file.id.term}\r\n"
            f'Content-Disposition: attachment; filename="{file.name}"\r\n'
        )
        self.file = file
        reply = self._request.start_stream(
            200, "application/octet-stream", headers, length=len(file.head) + file.size
        )
        reply.on_close = self._client_gone
        send_pieces(reply, self._pieces(file), self._server.reactor)

    def _pieces(self, file: SnapshotFile) -> Iterator[bytes]:
        yield file.head
        yield from file.pieces
        self._ended(self)

    def _client_gone(self) -> None:
        self._server.snapshots.withdraw(self._start)
        self._ended(self)
