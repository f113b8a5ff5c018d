"""The transport: the links to all peers, and the paths below /raft of the peer listener."""

from __future__ import annotations

import contextlib
import functools
import io
import mmap
import tempfile
import weakref
from typing import IO, Any, Callable, Dict, Generator, Iterable, Optional, Sequence, Tuple, Union

from ..base.codec import decode_message, decode_message_steps
from ..base.errors import CodecError
from ..base.ids import package_logger
from ..base.limits import (
    PEER_BODIES_BYTES_MAX,
    PEER_BODY_BYTES_MAX,
    RAFT_BODY_BYTES_MAX,
    REMOVED_SECONDS,
)
from ..base.messages import Message, MsgType
from ..base.text import format_time
from ..base.urls import parse_urls
from ..base.versions import DEFAULT_IDENTITY, Identity
from ..net.budgets import SlicedWork
from ..net.http_calls import _ignore
from ..net.http_messages import HttpHead
from ..net.http_requests import HttpRequest
from ..net.http_server import Listener
from ..net.reactor import Reactor
from ..net.tls import TlsContext
from ..net.workers import FILE_WORK, ThrottledLog
from .compatibility import (
    DOUBLE_HINT,
    FOREIGN_HINT,
    ID_IN_USE,
    STREAM_KINDS,
    LinkContext,
    MessageInspector,
    PeerStatus,
    Sent,
    UrlPicker,
    _parse_id,
)
from .frames import _U64, EntryListEncoder
from .links import Peer, Pipeline

REMOTES_MAX = 256                   # members remembered that are no peers; above: ignored


class Transport:
    """The links to all other members, and the paths below /raft of the peer listener.

    deliver        (message) of a peer; may call the transport
    unreachable    (member id) after the loss of messages to it
    snapshot_done  (member id, ok) of the receiver of a snapshot
    removed        () once, a second after a peer says that the cluster has removed this member
    sent           (Sent) for every message to a peer, when its fate is known
    received       (sender, message, bytes), before deliver
    round_trip     (member id, seconds) of every probe that a peer has answered
    inspector      looks at every message before it is delivered
    `drop`, if set, loses the messages, sent and received, for which it returns true.
    The reactor calls the first three, outside of offer().  Thread: reactor.
    """

    def __init__(
        self, reactor: Reactor, *, member_id: int, cluster_id: int, peer_urls: Sequence[str],
        is_removed: Callable[[int], bool], deliver: Callable[[Message], None],
        unreachable: Callable[[int], None], snapshot_done: Callable[[int, bool], None],
        removed: Callable[[], None], election_s: float,
        sent: Callable[[Sent], None] = _ignore,
        received: Callable[[int, Message, int], None] = _ignore,
        round_trip: Callable[[int, float], None] = _ignore,
        tls: Optional[TlsContext] = None, inspector: Optional[MessageInspector] = None,
        identity: Identity = DEFAULT_IDENTITY,
    ) -> None:
        self.drop: Optional[Callable[[Message], bool]] = None
        self._member_id = member_id
        self._cluster_id = f"{cluster_id:x}"
        self._identity = identity
        self._is_removed = is_removed
        self._deliver = deliver
        self._removed: Optional[Callable[[], None]] = removed
        self._received = received
        self._inspector = inspector or MessageInspector()
        self._is_reading_snapshot = False   # one after the other
        self._spools: weakref.WeakSet[IO[bytes]] = weakref.WeakSet()    # snapshots that arrive
        self._log = ThrottledLog("rafthttp", reactor.now)
        self._lists = EntryListEncoder()
        self._peers: Dict[int, Peer] = {}
        self._remotes: Dict[int, Pipeline] = {}     # to members that are no peers yet
        self._stopped = False
        self._routes: Dict[str, Tuple[str, Callable[[HttpRequest], None]]] = {
            "/raft": ("POST", self._handle_post), "/raft/snapshot": ("POST", self._handle_post),
            "/raft/stream/": ("GET", self._handle_stream),
            "/raft/stream": ("", self._redirect_stream),
            "/raft/probing": ("", self._handle_probing),
        }
        headers = {
            "X-Etcd-Cluster-Id": self._cluster_id,
            "X-Min-Cluster-Version": identity.min_cluster,
            "X-Peerurls": ",".join(peer_urls),
            "X-Server-From": f"{member_id:x}",
            "X-Server-Version": identity.server,
        }
        self._context = LinkContext(
            reactor, member_id, self._cluster_id, headers,
            1.0 + election_s / 5, self._log.error, self._receive,
            functools.partial(reactor.call_soon, self._report, unreachable),
            functools.partial(reactor.call_soon, self._report, snapshot_done),
            self._report_removal, sent, round_trip, tls, SlicedWork(reactor), self._inspector,
            identity,
        )

    # -- members -----------------------------------------------------------

    def add_peer(self, member_id: int, urls: Iterable[str]) -> None:
        """Open the links to a member; a known one gets new URLs."""
        if member_id in self._peers:
            self._peers[member_id].picker.update(urls)
        elif not self._stopped:
            self._peers[member_id] = Peer(self._context, member_id, urls, self._lists)

    def add_remote(self, member_id: int, urls: Iterable[str]) -> None:
        """Answer a member by POST while it is no peer yet: its addition is not applied here."""
        if member_id in (0, self._member_id) or member_id in self._peers or self._stopped:
            return
        if member_id in self._remotes:
            self._remotes[member_id].picker.update(urls)
        elif len(self._remotes) < REMOTES_MAX:
            status = PeerStatus(member_id, self._context.reactor.wall_ns)
            self._remotes[member_id] = Pipeline(self._context, member_id, UrlPicker(urls), status)

    def remove_peer(self, member_id: int) -> None:
        """Close the links to a member; unknown ids are ignored."""
        for link in (self._peers.pop(member_id, None), self._remotes.pop(member_id, None)):
            if link is not None:
                link.stop()

    def remove_all(self) -> None:
        """Close the links to all peers; remotes stay."""
        while self._peers:
            self._peers.popitem()[1].stop()

    def active_since(self, member_id: int) -> float:
        """Return since when a peer can be reached, in unix seconds; 0: it cannot."""
        peer = self._peers.get(member_id)
        return peer.status.active_since if peer is not None else 0.0

    def inactive_since(self, member_id: int) -> float:
        """Unix seconds since when a peer cannot be reached, 0 if it can or is no peer."""
        peer = self._peers.get(member_id)
        return 0.0 if peer is None or peer.status.active_since else peer.status.inactive_since

    def problem(self, member_id: int) -> str:
        """Say where a peer is dialed and what fails; "" if it can be reached, or is no peer."""
        peer = self._peers.get(member_id)
        if peer is None or peer.status.active_since:
            return ""
        return f"{peer.picker.pick()}: {peer.status.problem}"

    def stop(self) -> None:
        """Close all links; no callback comes any more."""
        self._stopped = True
        self.remove_all()
        while self._remotes:
            self._remotes.popitem()[1].stop()

    # -- sending -----------------------------------------------------------

    def offer(self, messages: Iterable[Message]) -> None:
        """Send messages, or drop them: to unknown ids silently, to slow peers with a report."""
        for message in messages:
            to = message.to
            link = self._peers.get(to) or self._remotes.get(to)
            if link is None or self.drop is not None and self.drop(message):
                continue
            link.offer(message)             # encodes the message at once, and never blocks
        for peer in self._peers.values():
            peer.flush()
        self._lists.forget()

    def _report(self, report: Callable[..., None], *args: Any) -> None:
        """Report in a posted call: the cause may be a call of Raft itself."""
        if not self._stopped:
            report(*args)

    def _report_removal(self) -> None:
        """Wait before the report: the entry may be on its way to our disk, a reply to a client."""
        removed, self._removed = self._removed, None
        if removed is not None:
            self._context.reactor.call_later(REMOVED_SECONDS, self._report, removed)

    # -- receiving ---------------------------------------------------------

    def handle(self, request: HttpRequest) -> bool:
        """Answer a request of the peer listener; False: its path is not below /raft."""
        is_stream = request.path.startswith("/raft/stream/")
        route = self._routes.get("/raft/stream/" if is_stream else request.path)
        if route is None:
            return False
        method, handle = route
        if self._stopped:
            _reply_error(request, 503, "etcdserver: server stopped")
        elif method and request.method != method:
            _reply_error(request, 405, "Method Not Allowed", f"Allow: {method}\r\n")
        elif not method or self._is_compatible(request):
            handle(request)
        return True

    def guard(self, listener: Listener, directory: str) -> None:
        """Make a listener read only what members may send; `directory` keeps large snapshots."""
        listener.body_limit = self._body_max
        listener.memory_max = RAFT_BODY_BYTES_MAX
        listener.held_max = PEER_BODIES_BYTES_MAX
        listener.open_spool = functools.partial(self._open_spool, directory)

    def _open_spool(self, directory: str, first: bytes) -> Optional[IO[bytes]]:
        """Return a file for a large body if it is a snapshot and few arrive; None: refuse it."""
        is_snapshot = _SNAPSHOT_START in (first[:2], first[8:10])
        if not is_snapshot or len(self._spools) >= _SPOOLS_MAX:
            return None
        try:
            file = tempfile.TemporaryFile(dir=directory)
        except OSError as error:
            self._log.error(f"cannot keep a snapshot that a peer sends: {error}")
            return None
        self._spools.add(file)
        return file

    def _body_max(self, head: HttpHead) -> int:
        """Return how long a body behind this head may be: members may send the most."""
        if head.method != "POST" or head.path not in ("/raft", "/raft/snapshot"):
            return 0
        sender = _parse_id(head.headers.get("x-server-from", "")) or 0
        theirs = head.headers.get("x-etcd-cluster-id", "")
        if (theirs != self._cluster_id or self._is_removed(sender) or self._stopped
                or self._identity.refusal(head.headers)):
            return 0
        is_known = sender in self._peers or sender in self._remotes
        return PEER_BODY_BYTES_MAX if is_known else _UNKNOWN_BODY_BYTES_MAX

    def _receive(self, message: Message, size: int) -> Generator[None, None, int]:
        """Check and deliver a message, in steps; return the HTTP status of the outcome."""
        # A removed member may not know it yet, and must not disturb the others.
        if message.to != self._member_id or self._is_removed(message.sender):
            return 500
        if message.type == MsgType.SNAP and message.snapshot is None:
            return 500
        fault = yield from self._inspector.inspect(message)
        if fault:
            name = "Msg" + MsgType(message.type).name.title().replace("_", "")
            self._log.error(f"refused a {name} of {message.sender:x}: {fault}")
            return 400
        if not self._stopped and (self.drop is None or not self.drop(message)):
            self._received(message.sender, message, size)
            self._deliver(message)
        return 204

    def _handle_stream(self, request: HttpRequest) -> None:
        """GET /raft/stream/<kind>/<dialer>: answer with all messages to the dialer."""
        directory, _, name = request.path.rpartition("/")
        kind = STREAM_KINDS.get(directory[len("/raft/stream/"):])
        dialer = _parse_id(name)
        if kind is None or dialer is None:
            self._refuse(request, 404, "invalid path" if kind is None else "invalid from")
        elif self._is_removed(dialer):
            package_logger("rafthttp").warning(
                "rejected the stream from peer %x since it was removed", dialer
            )
            self._refuse(request, 410, "removed member")
        elif dialer not in self._peers:
            self._remember_sender(request, dialer)
            self._refuse(
                request, 404, "error sender not found",
                f"failed to find remote peer {dialer:x} in cluster {self._cluster_id}",
            )
        elif request.headers.get("x-raft-to", "") != f"{self._member_id:x}":
            self._refuse(
                request, 412, "to field mismatch",
                f"streaming request ignored (ID mismatch got {request.headers.get('x-raft-to')}"
                f" want {self._member_id:x}); our peer URL is that of another member: if it was not"
                " moved, this process was started with a wrong -data-dir",
            )
        else:
            advertised = request.headers.get("x-peerurls", "")
            stream = request.start_stream(200, None, self._headers_for(request))
            self._peers[dialer].attach(kind, stream, advertised)

    def _handle_post(self, request: HttpRequest) -> None:
        """POST /raft: one message.  POST /raft/snapshot: the form of 3.x for a snapshot."""
        self._remember_sender(request, _parse_id(request.headers.get("x-server-from", "")))
        is_framed = request.path == "/raft/snapshot"
        is_long = request.body_file is not None or request.body.startswith(_SNAPSHOT_START)
        if request.body_too_large:
            self._refuse(
                request, 413, "error reading raft message",
                f"refused a message from {request.remote}: its sender is not known here, or it is"
                " too large",
            )
        elif is_framed or is_long:
            self._read_snapshot(request, is_framed=is_framed)
        else:
            steps = self._receive_body(memoryview(request.body))
            self._context.decoding.add(steps, lambda status: self._answer(request, status))

    def _receive_body(self, body: memoryview) -> Generator[None, None, int]:
        """Decode and receive one message; return the status for its sender."""
        try:
            message = yield from decode_message_steps(body)
        except CodecError as error:
            self._log.error(f"failed to unmarshal raft message ({error})")
            return 422
        if self._is_removed(message.sender):
            return 403
        return (yield from self._receive(message, len(body)))

    def _answer(self, request: HttpRequest, status: int) -> None:
        if status == 204:
            request.reply(204, headers=self._headers_for(request))
        elif status == 403:
            text = b'{"message":"cannot process message from removed member"}'
            request.reply(403, text, headers=self._headers_for(request))
        elif status == 422:
            self._refuse(request, 400, "error unmarshaling raft message")
        else:
            self._refuse(request, status, "error processing raft message")

    def _headers_for(self, request: HttpRequest) -> str:
        is_stream = request.path.startswith("/raft/stream/")
        version = f"X-Server-Version: {self._identity.server}\r\n" if is_stream else ""
        return f"X-Etcd-Cluster-Id: {self._cluster_id}\r\n{version}"

    def _refuse(self, request: HttpRequest, status: int, text: str, why: str = "") -> None:
        if why:
            self._log.error(why)
        _reply_error(request, status, text, self._headers_for(request))

    def _read_snapshot(self, request: HttpRequest, *, is_framed: bool) -> None:
        """Read a posted snapshot on a thread: it is checked before any of it is written."""
        if self._is_reading_snapshot:
            self._refuse(request, 503, "another snapshot is being read")
            return
        self._is_reading_snapshot = True

        def done(error: Optional[BaseException], found: Any) -> None:
            self._is_reading_snapshot = False
            if error is not None:
                why = f"refused a snapshot from {request.remote}: {error}"
                self._refuse(request, 400, str(error), why)
                return
            message, has_v3_data = found
            if has_v3_data:
                self._inspector.note_v3_data()
            if self._is_removed(message.sender):
                self._answer(request, 403)
            else:
                steps = self._receive(message, size)
                self._context.decoding.add(steps, lambda status: self._answer(request, status))

        body, size = request.body_file or request.body, len(request.body)
        self._context.reactor.run_blocking(
            _posted_snapshot, body, self._inspector, is_framed, kind=FILE_WORK,
            done=done)

    def _handle_probing(self, request: HttpRequest) -> None:
        now = format_time(self._context.reactor.wall_ns())
        request.reply(200, b'{"OK":true,"Now":"%b"}\n' % now.encode(), "text/plain; charset=utf-8")

    @staticmethod
    def _redirect_stream(request: HttpRequest) -> None:
        request.reply(
            301, b'<a href="/raft/stream/">Moved Permanently</a>.\n\n',
            "text/html; charset=utf-8", "Location: /raft/stream/\r\n",
        )

    def _is_compatible(self, request: HttpRequest) -> bool:
        """Check versions, cluster and id, in this order; refuse at the first fault."""
        headers = request.headers
        fault = self._identity.refusal(headers)
        theirs, advertised = headers.get("x-etcd-cluster-id", ""), headers.get("x-peerurls", "")
        id = _parse_id(headers.get("x-server-from", "")) or 0
        other = self._other_process(id, advertised)
        if fault:
            self._refuse(
                request, 412, "incompatible version", f"request version incompatibility ({fault})")
        elif theirs != self._cluster_id:
            self._refuse(
                request, 412, "cluster ID mismatch",
                f"request cluster ID mismatch (got {theirs} want {self._cluster_id}){FOREIGN_HINT}",
            )
        elif other:
            self._refuse(
                request, 412, ID_IN_USE,
                f"two processes use member id {id:x}, with the peer URLs [{other}] and"
                f" [{advertised}]{DOUBLE_HINT}",
            )
        else:
            if id in self._peers:
                self._peers[id].status.version = headers.get("x-server-version", "")
            return True
        return False

    def _other_process(self, id: int, advertised: str) -> str:
        """Return the peer URLs of another process with this id, perhaps of this one, or ""."""
        if id in self._peers:
            return self._peers[id].other_process(advertised)
        return self._context.headers["X-Peerurls"] if id == self._member_id else ""

    def _remember_sender(self, request: HttpRequest, sender: Optional[int]) -> None:
        """Note the peer URLs of a member that is not known here yet, to answer it."""
        urls = request.headers.get("x-peerurls", "")
        if not urls or sender is None or sender in self._remotes or self._is_removed(sender):
            return
        with contextlib.suppress(ValueError):
            self.add_remote(sender, parse_urls(urls))


_SPOOLS_MAX = 2                     # snapshots that arrive at a time; above: 413
_UNKNOWN_BODY_BYTES_MAX = 1 << 16   # of a sender that is not known here; above: 413
_SNAPSHOT_START = b"\x08%c" % MsgType.SNAP      # of an encoded MsgSnap


def _posted_snapshot(
    body: Union[bytes, IO[bytes]], inspector: MessageInspector, is_framed: bool
) -> Tuple[Message, bool]:
    """Return the MsgSnap in a POST, with its store state, and whether it comes with v3 data.

    is_framed  the form of 3.x: a length, the message, and a database, which is not kept
    Raises CodecError, OSError.
    """
    with io.BytesIO(body) if isinstance(body, bytes) else body as file:
        data, size, start = _view(body), PEER_BODY_BYTES_MAX, 8 if is_framed else 0
        if is_framed and len(data) >= start:
            (size,) = _U64.unpack_from(data)
        try:
            if size > PEER_BODY_BYTES_MAX:
                raise CodecError(f"frame of {size} bytes")
            if is_framed and (not size or len(data) < start + size):
                raise CodecError("unexpected EOF")
            message = decode_message(data[start:start + size])
        except CodecError as error:
            raise CodecError(f"failed to decode raft message ({error})") from None
        file.seek(min(len(data), start + size))
        has_v3_data = is_framed and inspector.has_v3_data(file)
    if message.type != MsgType.SNAP:
        raise CodecError("wrong raft message type")
    snapshot = message.snapshot
    if snapshot is not None:
        try:
            message.snapshot = snapshot._replace(state=inspector.read_state(snapshot.data))
        except ValueError as error:
            raise CodecError(f"not a snapshot that this member can take: {error}") from None
    return message, has_v3_data


def _view(body: Union[bytes, IO[bytes]]) -> memoryview:
    """Return a body without a copy: to copy or free 200 MB stops all threads for 0.1 s."""
    if isinstance(body, bytes):
        return memoryview(body)
    body.flush()
    return memoryview(mmap.mmap(body.fileno(), 0, access=mmap.ACCESS_READ))


def _reply_error(request: HttpRequest, status: int, text: str, headers: str = "") -> None:
    """Answer as Go's http.Error does."""
    request.reply(
        status, text.encode("latin-1", "replace") + b"\n", "text/plain; charset=utf-8",
        headers + "X-Content-Type-Options: nosniff\r\n",
    )
