"""The transport: all links, and raft's part of the peer listener.

Hands every message to a callable.
"""

from __future__ import annotations

import contextlib
import functools
import io
import tempfile
import weakref
from typing import IO, Any, Callable, Dict, Generator, Iterable, Optional, Sequence, Tuple, Union

from ..base.codec import decode_message, decode_message_steps
from ..base.errors import CodecError
from ..base.ids import package_logger
from ..base.limits import (
    MIN_CLUSTER_VERSION,
    PEER_BODIES_BYTES_MAX,
    PEER_BODY_BYTES_MAX,
    RAFT_BODY_BYTES_MAX,
    REMOVED_SECONDS,
    SERVER_VERSION,
)
from ..base.messages import Message, MsgType
from ..base.text import format_time
from ..base.urls import parse_urls
from ..net.budgets import SlicedWork
from ..net.http_messages import HttpHead
from ..net.http_requests import HttpRequest
from ..net.http_server import Listener
from ..net.reactor import Reactor
from ..net.tls import TlsContext
from ..net.workers import FILE_WORK, Complaints
from .compatibility import (
    DOUBLE_HINT,
    FOREIGN_HINT,
    ID_IN_USE,
    STREAM_KINDS,
    LinkContext,
    Sent,
    _compatibility_error,
    _parse_id,
)
from .frames import _U64, EntryListEncoder
from .links import Peer, Remote

REMOTES_MAX = 256                   # members remembered that are no peers; above: ignored


def _ignore_sent(sent: Sent) -> None:
    """Default of Transport's `sent`."""


def _ignore_received(sender: int, message: Message, size: int) -> None:
    """Default of Transport's `received`."""


def _ignore_round_trip(member_id: int, seconds: float) -> None:
    """Default of Transport's `round_trip`."""


class MessageInspector:
    """What may pass from peers to this member: all.  What they send is never trusted."""

    def inspect(self, message: Message) -> Generator[None, None, str]:
        """Say, in steps, why `message` must not be delivered; "": it may."""
        yield from ()
        return ""

    def read_state(self, data: bytes) -> Any:
        """Return what the store makes of a snapshot's data.  Raises ValueError.  Thread: any."""
        return None


class Transport:
    """All links to other members, and the raft part of the peer listener.

    deliver        gets every message of the peers; may call the transport
    unreachable    gets the id of a member to which messages were lost
    snapshot_done  gets the id of the receiver and whether it has taken a snapshot
    removed        called once, a second after a peer says that we were removed from the cluster
    sent           gets a Sent for every message to a peer, when its fate is known
    received       (sender, message, bytes), before deliver
    round_trip     (member id, seconds) of every probe that a peer has answered
    inspector      looks at every message before it is delivered
    `drop`, if set, loses the messages, sent and received, for which it returns true.
    The first three are called by the reactor, never from inside offer().  Thread: reactor.
    """

    def __init__(
        self, reactor: Reactor, *, member_id: int, cluster_id: int, peer_urls: Sequence[str],
        is_removed: Callable[[int], bool], deliver: Callable[[Message], None],
        unreachable: Callable[[int], None], snapshot_done: Callable[[int, bool], None],
        removed: Callable[[], None], election_s: float,
        sent: Callable[[Sent], None] = _ignore_sent,
        received: Callable[[int, Message, int], None] = _ignore_received,
        round_trip: Callable[[int, float], None] = _ignore_round_trip,
        tls: Optional[TlsContext] = None, inspector: Optional[MessageInspector] = None,
    ) -> None:
        self.drop: Optional[Callable[[Message], bool]] = None
        self._reactor = reactor
        self._member_id = member_id
        self._cluster_id = f"{cluster_id:x}"
        self._is_removed = is_removed
        self._deliver = deliver
        self._removed: Optional[Callable[[], None]] = removed
        self._received = received
        self._inspector = inspector or MessageInspector()
        self._work = SlicedWork(reactor)
        self._is_reading = False            # a snapshot: one after the other
        self._spools: weakref.WeakSet[IO[bytes]] = weakref.WeakSet()    # those that arrive
        self._complaints = Complaints("rafthttp", reactor.now)
        self._lists = EntryListEncoder()
        self._peers: Dict[int, Peer] = {}
        self._remotes: Dict[int, Remote] = {}
        self._stopped = False
        self._routes: Dict[str, Callable[[HttpRequest], None]] = {
            "/raft": self._handle_post, "/raft/snapshot": self._handle_snapshot,
            "/raft/probing": self._handle_probing, "/raft/stream": self._redirect_stream,
        }
        self._context = LinkContext(
            reactor, member_id, self._cluster_id, self._request_headers(peer_urls),
            1.0 + election_s / 5, self._complaints.say, self._take,
            lambda to: self._soon(unreachable, to),
            lambda to, ok: self._soon(snapshot_done, to, ok), self._we_are_removed, sent,
            round_trip, tls, self._work,
        )

    # -- members -----------------------------------------------------------

    def add_peer(self, member_id: int, urls: Iterable[str]) -> None:
        """Open the links to a member; a known one gets new URLs."""
        if member_id in self._peers:
            self.update_peer(member_id, urls)
        elif not self._stopped:
            self._peers[member_id] = Peer(self._context, member_id, urls, self._lists)

    def add_remote(self, member_id: int, urls: Iterable[str]) -> None:
        """Remember where a member is that is no peer yet; a peer of that id wins."""
        if member_id in (0, self._member_id) or member_id in self._peers or self._stopped:
            return
        if member_id in self._remotes:
            self._remotes[member_id].update(urls)
        elif len(self._remotes) < REMOTES_MAX:
            self._remotes[member_id] = Remote(self._context, member_id, urls)

    def update_peer(self, member_id: int, urls: Iterable[str]) -> None:
        """Use other URLs for a member; unknown ids are ignored."""
        peer = self._peers.get(member_id)
        if peer is not None:
            peer.update(urls)

    def remove_peer(self, member_id: int) -> None:
        """Close the links to a member; unknown ids are ignored."""
        peer = self._peers.pop(member_id, None)
        remote = self._remotes.pop(member_id, None)
        if peer is not None:
            peer.stop()
        if remote is not None:
            remote.stop()

    def remove_all(self) -> None:
        """Close the links to all peers; remotes stay."""
        peers, self._peers = self._peers, {}
        for peer in peers.values():
            peer.stop()

    def active_since(self, member_id: int) -> float:
        """Unix seconds since when a peer can be reached, 0 if it cannot."""
        peer = self._peers.get(member_id)
        return peer.status.active_since if peer is not None else 0.0

    def problem(self, member_id: int) -> str:
        """Say where a peer is dialed and what fails; "" if it can be reached, or is no peer."""
        peer = self._peers.get(member_id)
        return peer.problem if peer is not None else ""

    def stop(self) -> None:
        """Close everything and call nobody any more."""
        self._stopped = True
        self.remove_all()
        for remote in self._remotes.values():
            remote.stop()
        self._remotes = {}

    # -- sending -----------------------------------------------------------

    def offer(self, messages: Iterable[Message]) -> None:
        """Send messages, or drop them: to unknown ids silently, to slow peers with a report.

        Never blocks.  The messages are encoded before it returns.
        """
        for message in messages:
            to = message.to
            link = self._peers.get(to) or self._remotes.get(to)
            if link is None or self.drop is not None and self.drop(message):
                continue
            link.offer(message)
        for peer in self._peers.values():
            peer.flush()
        self._lists.forget()

    def _soon(self, report: Callable[..., None], *args: Any) -> None:
        """Report outside of the call that found out, which may come from Raft itself."""
        self._reactor.call_soon(self._report, report, args)

    def _report(self, report: Callable[..., None], args: Tuple[Any, ...]) -> None:
        if not self._stopped:
            report(*args)

    def _we_are_removed(self) -> None:
        """Wait a moment: our removal may be on its way to our disk, and its client for that."""
        removed, self._removed = self._removed, None
        if removed is not None:
            self._reactor.call_later(REMOVED_SECONDS, self._report, removed, ())

    def _request_headers(self, peer_urls: Sequence[str]) -> Dict[str, str]:
        return {
            "X-Etcd-Cluster-Id": self._cluster_id,
            "X-Min-Cluster-Version": MIN_CLUSTER_VERSION,
            "X-Peerurls": ",".join(peer_urls),
            "X-Server-From": f"{self._member_id:x}",
            "X-Server-Version": SERVER_VERSION,
        }

    # -- receiving ---------------------------------------------------------

    def handle(self, request: HttpRequest) -> bool:
        """Answer a request of the peer listener; False if its path is none of raft's."""
        path = request.path
        route = self._routes.get(path)
        if route is None and path.startswith("/raft/stream/"):
            route = self._handle_stream
        if route is None:
            return False
        if self._stopped:
            _reply_error(request, 503, "etcdserver: server stopped")
        else:
            route(request)
        return True

    def guard(self, listener: Listener, directory: str) -> None:
        """Have a listener read bodies only of those from whom we expect one, and only so many.

        directory  where snapshots are kept until they are complete
        """
        listener.body_limit = self._body_max
        listener.memory_max = RAFT_BODY_BYTES_MAX
        listener.held_max = PEER_BODIES_BYTES_MAX
        listener.open_spool = functools.partial(self._open_spool, directory)

    def _open_spool(self, directory: str, first: bytes) -> Optional[IO[bytes]]:
        """A file for the body that begins so: only snapshots may be so large, and few at a time."""
        is_snapshot = _SNAPSHOT_START in (first[:2], first[8:10])
        if not is_snapshot or len(self._spools) >= _SPOOLS_MAX:
            return None
        try:
            file = tempfile.TemporaryFile(dir=directory)
        except OSError as error:
            self._complaints.say(f"cannot keep a snapshot that a peer sends: {error}")
            return None
        self._spools.add(file)
        return file

    def _body_max(self, head: HttpHead) -> int:
        """How many bytes of body are wanted from the sender of this head.

        Only members have something to tell that is more than a few numbers.
        """
        if head.method != "POST" or head.path not in ("/raft", "/raft/snapshot"):
            return 0
        sender = _parse_id(head.headers.get("x-server-from", "")) or 0
        theirs = head.headers.get("x-etcd-cluster-id", "")
        if theirs != self._cluster_id or self._is_removed(sender) or self._stopped:
            return 0
        if _compatibility_error(head.headers):
            return 0
        is_known = sender in self._peers or sender in self._remotes
        return PEER_BODY_BYTES_MAX if is_known else _STRANGER_BODY_BYTES_MAX

    def _take(self, message: Message, size: int) -> Generator[None, None, int]:
        """Hand a message on, in steps; return the status that says what became of it.

        A removed member may not disturb the others any more: it does not know yet.
        """
        if message.to != self._member_id or self._is_removed(message.sender):
            return 500
        if message.type == MsgType.SNAP and message.snapshot is None:
            return 500
        fault = yield from self._inspector.inspect(message)
        if fault:
            name = "Msg" + MsgType(message.type).name.title().replace("_", "")
            self._complaints.say(f"refused a {name} of {message.sender:x}: {fault}")
            return 400
        if not self._stopped and (self.drop is None or not self.drop(message)):
            self._received(message.sender, message, size)
            self._deliver(message)
        return 204

    def _handle_stream(self, request: HttpRequest) -> None:
        """GET /raft/stream/<kind>/<dialer>: answer with our messages to the dialer, for ever."""
        headers = f"{self._cluster_header()}X-Server-Version: {SERVER_VERSION}\r\n"
        if not self._is_welcome(request, "GET", headers):
            return
        directory, _, name = request.path.rpartition("/")
        kind = STREAM_KINDS.get(directory[len("/raft/stream/"):])
        dialer = _parse_id(name)
        if kind is None:
            _reply_error(request, 404, "invalid path", headers)
        elif dialer is None:
            _reply_error(request, 404, "invalid from", headers)
        elif self._is_removed(dialer):
            package_logger("rafthttp").warning(
                "rejected the stream from peer %x since it was removed", dialer
            )
            _reply_error(request, 410, "removed member", headers)
        elif dialer not in self._peers:
            self._remember_sender(request, dialer)
            self._complaints.say(
                f"failed to find remote peer {dialer:x} in cluster {self._cluster_id}"
            )
            _reply_error(request, 404, "error sender not found", headers)
        elif request.headers.get("x-raft-to", "") != f"{self._member_id:x}":
            self._complaints.say(
                f"streaming request ignored (ID mismatch got {request.headers.get('x-raft-to')}"
                f" want {self._member_id:x}); our peer URL is that of another member: if it was not"
                " moved, this process was started with a wrong -data-dir"
            )
            _reply_error(request, 412, "to field mismatch", headers)
        else:
            advertised = request.headers.get("x-peerurls", "")
            stream = request.start_stream(200, None, headers)
            self._peers[dialer].attach(kind, stream, advertised)

    def _handle_post(self, request: HttpRequest) -> None:
        """POST /raft: one message."""
        headers = self._cluster_header()
        if not self._is_welcome(request, "POST", headers):
            return
        self._remember_sender(request, _parse_id(request.headers.get("x-server-from", "")))
        if request.body_too_large:
            self._reply_too_large(request, headers)
        elif request.body_file is not None or request.body.startswith(_SNAPSHOT_START):
            self._read_snapshot(request, headers, is_framed=False)
        else:
            steps = self._posted_steps(memoryview(request.body))
            self._work.add(steps, lambda status: self._answer(request, status, headers))

    def _posted_steps(self, body: memoryview) -> Generator[None, None, int]:
        """Decode and take one message; return the status for its sender."""
        try:
            message = yield from decode_message_steps(body)
        except CodecError as error:
            self._complaints.say(f"failed to unmarshal raft message ({error})")
            return 422
        if self._is_removed(message.sender):
            return 403
        return (yield from self._take(message, len(body)))

    def _answer(self, request: HttpRequest, status: int, headers: str) -> None:
        if status == 204:
            request.reply(204, headers=headers)
        elif status == 403:
            text = b'{"message":"cannot process message from removed member"}'
            request.reply(403, text, headers=headers)
        elif status == 422:
            _reply_error(request, 400, "error unmarshaling raft message", headers)
        else:
            _reply_error(request, status, "error processing raft message", headers)

    def _reply_too_large(self, request: HttpRequest, headers: str) -> None:
        self._complaints.say(
            f"refused a message from {request.remote}: its sender is not known here, or it is"
            " too large"
        )
        _reply_error(request, 413, "error reading raft message", headers)

    def _handle_snapshot(self, request: HttpRequest) -> None:
        """POST /raft/snapshot, the form of 3.x: a length, a MsgSnap, and a database we ignore."""
        headers = self._cluster_header()
        if not self._is_welcome(request, "POST", headers):
            return
        if request.body_too_large:
            self._reply_too_large(request, headers)
        else:
            self._read_snapshot(request, headers, is_framed=True)

    def _read_snapshot(self, request: HttpRequest, headers: str, *, is_framed: bool) -> None:
        """Read a posted snapshot on a thread: it is checked before anything of it is written."""
        if self._is_reading:
            _reply_error(request, 503, "another snapshot is being read", headers)
            return
        self._is_reading = True

        def done(error: Optional[BaseException], message: Any) -> None:
            self._is_reading = False
            if error is not None:
                self._complaints.say(f"refused a snapshot from {request.remote}: {error}")
                _reply_error(request, 400, str(error), headers)
            elif self._is_removed(message.sender):
                self._answer(request, 403, headers)
            else:
                steps = self._take(message, size)
                self._work.add(steps, lambda status: self._answer(request, status, headers))

        body, size = request.body_file or request.body, len(request.body)
        self._reactor.run_blocking(
            _posted_snapshot, body, self._inspector.read_state, is_framed, kind=FILE_WORK,
            done=done)

    def _handle_probing(self, request: HttpRequest) -> None:
        now = format_time(self._reactor.wall_ns())
        request.reply(200, b'{"OK":true,"Now":"%b"}\n' % now.encode(), "text/plain; charset=utf-8")

    @staticmethod
    def _redirect_stream(request: HttpRequest) -> None:
        request.reply(
            301, b'<a href="/raft/stream/">Moved Permanently</a>.\n\n',
            "text/html; charset=utf-8", "Location: /raft/stream/\r\n",
        )

    def _cluster_header(self) -> str:
        return f"X-Etcd-Cluster-Id: {self._cluster_id}\r\n"

    def _is_welcome(self, request: HttpRequest, method: str, headers: str) -> bool:
        """Check method, versions, cluster and id, in this order; answer what does not fit."""
        if request.method != method:
            _reply_error(request, 405, "Method Not Allowed", f"Allow: {method}\r\n")
            return False
        error = _compatibility_error(request.headers)
        if error:
            self._complaints.say(f"request version incompatibility ({error})")
            _reply_error(request, 412, "incompatible version", headers)
            return False
        theirs = request.headers.get("x-etcd-cluster-id", "")
        if theirs != self._cluster_id:
            self._complaints.say(
                f"request cluster ID mismatch (got {theirs} want {self._cluster_id}){FOREIGN_HINT}"
            )
            _reply_error(request, 412, "cluster ID mismatch", headers)
            return False
        id = _parse_id(request.headers.get("x-server-from", "")) or 0
        if self._is_double(id, request.headers.get("x-peerurls", "")):
            _reply_error(request, 412, ID_IN_USE, headers)
            return False
        sender = self._peers.get(id)
        if sender is not None:
            sender.heard_version(request.headers.get("x-server-version", ""))
        return True

    def _is_double(self, id: int, advertised: str) -> bool:
        """Tell whether this id belongs to another process, ours perhaps; say so in the log."""
        sender = self._peers.get(id)
        if sender is not None:
            other = sender.other_process(advertised)
        else:
            other = self._context.headers["X-Peerurls"] if id == self._member_id else ""
        if other:
            self._complaints.say(
                f"two processes use member id {id:x}, with the peer URLs [{other}] and"
                f" [{advertised}]{DOUBLE_HINT}"
            )
        return bool(other)

    def _remember_sender(self, request: HttpRequest, sender: Optional[int]) -> None:
        """A member that we do not know yet says where it can be answered."""
        urls = request.headers.get("x-peerurls", "")
        if not urls or sender is None or sender in self._remotes or self._is_removed(sender):
            return
        with contextlib.suppress(ValueError):
            self.add_remote(sender, parse_urls(urls))


_SPOOLS_MAX = 2                     # snapshots that arrive at a time; above: 413
_STRANGER_BODY_BYTES_MAX = 1 << 16      # of a sender that no one has told us of
_SNAPSHOT_START = b"\x08%c" % MsgType.SNAP      # of an encoded MsgSnap


def _posted_snapshot(
    body: Union[bytes, IO[bytes]], read_state: Callable[[bytes], Any], is_framed: bool
) -> Message:
    """Return the MsgSnap in a POST, with the state of its store.  Raises CodecError, OSError.

    is_framed  the form of 3.x: a length, the message, and a database of which we know nothing
    """
    with io.BytesIO(body) if isinstance(body, bytes) else body as file:
        file.seek(0)
        head, size = file.read(8) if is_framed else b"", PEER_BODY_BYTES_MAX
        if len(head) == 8:
            (size,) = _U64.unpack(head)
        try:
            if size > PEER_BODY_BYTES_MAX:
                raise CodecError(f"frame of {size} bytes")
            data = file.read(size)
            if is_framed and (len(head) < 8 or not size or len(data) < size):
                raise CodecError("unexpected EOF")
            message = decode_message(data)
        except CodecError as error:
            raise CodecError(f"failed to decode raft message ({error})") from None
    if message.type != MsgType.SNAP:
        raise CodecError("wrong raft message type")
    snapshot = message.snapshot
    if snapshot is not None:
        try:
            message.snapshot = snapshot._replace(state=read_state(snapshot.data))
        except ValueError as error:
            raise CodecError(f"not a snapshot that this member can take: {error}") from None
    return message


def _reply_error(request: HttpRequest, status: int, text: str, headers: str = "") -> None:
    """Answer as Go's http.Error does."""
    request.reply(
        status, text.encode("latin-1", "replace") + b"\n", "text/plain; charset=utf-8",
        headers + "X-Content-Type-Options: nosniff\r\n",
    )
