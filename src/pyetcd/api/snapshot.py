"""The snapshot API: the whole state, over HTTP."""

from __future__ import annotations

import functools
from typing import Callable, Iterator, Optional, Set

from ..base.limits import HELD_BYTES_MAX
from ..disk.snapshots import SnapshotFile
from ..member.cluster import format_id
from ..member.server import EtcdServer
from ..member.snapshots import SnapshotReceiver
from ..net.http_requests import HttpRequest, StreamReply
from .forms import write_message

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
        self._reply: Optional[StreamReply] = None
        self._pieces: Iterator[bytes] = iter(())
        # Kept, as withdraw() needs the same object.
        self._receiver: Optional[SnapshotReceiver] = self._start
        request.connection.on_close = self._client_gone
        server.snapshots.request(self._receiver)

    def _start(self, file: SnapshotFile, etcd_index: int) -> None:
        headers = (
            f"X-Etcd-Cluster-Id: {format_id(self._server.cluster.id)}\r\n"
            f"X-Etcd-Index: {etcd_index}\r\nX-Raft-Index: {file.id.index}\r\n"
            f"X-Raft-Term: {file.id.term}\r\n"
            f'Content-Disposition: attachment; filename="{file.name}"\r\n'
        )
        self.file = file
        self._pieces = iter((file.head, *file.pieces))
        self._reply = self._request.start_stream(
            200, "application/octet-stream", headers, length=len(file.head) + file.size
        )
        self._reply.on_close = self._client_gone
        self._send_piece()

    def _send_piece(self) -> None:
        """Send the next piece: one in a turn, so that other requests get theirs."""
        if self._reply is None or self._reply.closed:
            return
        piece = next(self._pieces, None)
        if piece is None:
            self._reply.end()
            self._receiver = None
            self._ended(self)
            return
        self._reply.when_read(functools.partial(self._server.reactor.call_soon, self._send_piece))
        self._reply.write(piece)

    def _client_gone(self) -> None:
        self._pieces = iter(())
        receiver, self._receiver = self._receiver, None
        if receiver is not None:
            self._server.snapshots.withdraw(receiver)
        self._ended(self)
