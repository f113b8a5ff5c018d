"""Streams between members: the ones that we answer and the ones that we dial.

A link may lose, repeat and reorder messages: Raft tolerates it.
"""

from __future__ import annotations

from typing import Callable, Dict, Generator, Iterator, List, Optional, Tuple

from ..base.basics import Backoff
from ..base.codec import joined_parts
from ..base.errors import CodecError
from ..base.ids import package_logger
from ..base.limits import (
    LINK_HEARTBEAT_SECONDS,
    LINK_TIMEOUT_SECONDS,
    STREAM_RETRY_SECONDS,
    STREAM_RETRY_SECONDS_MAX,
)
from ..base.messages import Message
from ..base.text import text_of
from ..net.budgets import SlicedWork
from ..net.http_calls import HttpCall
from ..net.http_requests import StreamReply
from ..net.workers import Timer
from .compatibility import (
    _OLDEST_STREAM_VERSION,
    _STREAM_PENDING_BYTES_MAX,
    _UNKNOWN_VERSION,
    ANSWER_BYTES_MAX,
    APP_STREAM,
    DOUBLE_HINT,
    FOREIGN_HINT,
    ID_IN_USE,
    LinkContext,
    PeerStatus,
    Sent,
    StreamEncoder,
    StreamKind,
    UrlPicker,
    major_minor,
)
from .frames import AppV2Decoder, FrameDecoder, MessageDecoder, MessageEncoder


class Answer:
    """What is worth keeping of the answer to an HttpCall: body_max bytes, and no more."""

    __slots__ = ("status", "headers", "body", "_body_max")

    def __init__(self, body_max: int = ANSWER_BYTES_MAX) -> None:
        self._body_max = body_max
        self.status = 0
        self.headers: Dict[str, str] = {}
        self.body = b""

    def take_head(self, status: int, headers: Dict[str, str]) -> None:
        """For on_head."""
        self.status, self.headers = status, headers

    def take_data(self, data: bytes) -> None:
        """For on_data."""
        if len(self.body) < self._body_max:
            self.body += data[:self._body_max - len(self.body)]

    def refusal(self, context: LinkContext, member_id: int) -> str:
        """Why the peer refused a request of ours; what an operator must change is logged."""
        text = text_of(self.body).strip()
        if self.status == 404:
            return f"remote member {member_id:x} could not recognize local member"
        if self.status == 412 and text == "incompatible version":
            context.complain(
                f"request sent was ignored by peer {member_id:x} (server version incompatible)"
            )
            return text
        if self.status == 412 and text in ("cluster ID mismatch", "clusterID mismatch"):
            theirs = self.headers.get("x-etcd-cluster-id", "")
            context.complain(
                f"request sent was ignored (cluster ID mismatch: remote[{member_id:x}]={theirs},"
                f" local={context.cluster_id}){FOREIGN_HINT}"
            )
            return text
        if self.status == 412 and text == ID_IN_USE:
            context.complain(
                f"request sent was refused by peer {member_id:x}: another process uses our member"
                f" id {context.member_id:x}{DOUBLE_HINT}"
            )
            return text
        return f"unhandled http status {self.status}"


class StreamReader:
    """A stream that we dial: on it the peer sends to us.  Dials again whenever it ends."""

    def __init__(
        self, context: LinkContext, member_id: int, kind: StreamKind, picker: UrlPicker,
        status: PeerStatus, heard_version: Callable[[str], None],
    ) -> None:
        self._context = context
        self._member_id = member_id
        self._kind = kind
        self._picker = picker
        self._status = status
        self._heard_version = heard_version
        self._target = f"/raft/stream/{kind.path}/{context.member_id:x}"
        self._headers = {**context.headers, "X-Raft-To": f"{member_id:x}"}
        self._call: Optional[HttpCall] = None
        self._url = ""                              # that _call dialed
        self._answer = Answer()
        self._decoder: Optional[FrameDecoder] = None    # set while the stream is open
        self._unread_bytes = 0                      # received, in no message yet
        self._backoff = Backoff(STREAM_RETRY_SECONDS, STREAM_RETRY_SECONDS_MAX)
        self._retry = context.reactor.call_later(0.0, self._dial)

    def hurry(self) -> None:
        """The peer has just dialed us: it can be reached again."""
        if self._call is None and self._retry.callback is not None:
            self._retry.cancel()
            self._backoff.reset()
            self._retry = self._context.reactor.call_later(STREAM_RETRY_SECONDS, self._dial)

    def stop(self) -> None:
        """Close the stream and dial no more."""
        self._retry.cancel()
        if self._call is not None:
            self._call.cancel()
            self._call = None

    def _dial(self) -> None:
        context = self._context
        self._decoder = None
        self._unread_bytes = 0
        self._answer = Answer()
        self._url = self._picker.pick()
        self._call = HttpCall(
            context.reactor, self._url, "GET", self._target, self._headers,
            connect_timeout_s=context.dial_timeout_s, idle_timeout_s=LINK_TIMEOUT_SECONDS,
            tls=context.tls, on_head=self._on_head, on_data=self._on_data, on_done=self._on_done,
        )

    def _on_head(self, status: int, headers: Dict[str, str]) -> None:
        self._answer.take_head(status, headers)
        version = headers.get("x-server-version", _UNKNOWN_VERSION)
        if "x-server-version" in headers:
            self._heard_version(version)
        if status == 200 and (major_minor(version) or (0, 0)) >= _OLDEST_STREAM_VERSION:
            self._decoder = self._new_decoder()
            self._status.activate()

    def _new_decoder(self) -> FrameDecoder:
        if self._kind is APP_STREAM:
            return AppV2Decoder(self._context.member_id, self._member_id)
        return MessageDecoder()

    def _on_data(self, data: bytes) -> None:
        if self._decoder is None:
            self._answer.take_data(data)
            if self._call is not None and len(self._answer.body) >= ANSWER_BYTES_MAX:
                self._call.cancel()
                self._on_done(None)
            return
        self._status.activate()
        call = self._call
        self._unread_bytes += len(data)
        is_read = False

        def read(error: Optional[CodecError]) -> None:
            nonlocal is_read
            is_read = True
            if call is None or call is not self._call:
                return                              # another stream by now
            if error is not None:
                self._drop(error)
            else:
                self._backoff.reset()
                call.resume()

        (self._context.work or SlicedWork(self._context.reactor)).add(
            self._take(call, self._decoder.messages(data)), read)
        if not is_read and call is not None:
            call.pause()                            # until all of this is done

    def _take(
        self, call: Optional[HttpCall], messages: Iterator[Optional[Message]]
    ) -> Generator[None, None, Optional[CodecError]]:
        """Hand on the messages; return what was wrong with the stream."""
        try:
            for message in messages:
                if message is not None:
                    size, self._unread_bytes = self._unread_bytes, 0
                    yield from self._context.take(message, size)
                else:
                    yield
                if self._call is not call:
                    return None                     # stopped, perhaps by what the message caused
        except CodecError as error:
            return error
        return None

    def _drop(self, error: CodecError) -> None:
        """The peer sends nonsense: a new stream may do better."""
        if self._call is not None:
            self._call.cancel()
        self._on_done(error)

    def _on_done(self, error: Optional[Exception]) -> None:
        self._call = None
        self._retry = self._context.reactor.call_later(self._backoff.next(), self._dial)
        if self._decoder is not None:
            self._status.deactivate("read", self._kind.title, error or "EOF")
            return
        self._picker.failed(self._url)
        if self._answer.status == 410:
            self._context.removed()
        reason = error or self._reason()
        self._status.deactivate("dial", self._kind.title, reason)

    def _reason(self) -> str:
        if self._answer.status == 200:
            return "unsupported stream type"
        return self._answer.refusal(self._context, self._member_id)


class StreamWriter:
    """A stream that the peer has dialed, if it has: on it we send to the peer."""

    def __init__(
        self, context: LinkContext, member_id: int, kind: StreamKind, status: PeerStatus
    ) -> None:
        self._context = context
        self._member_id = member_id
        self._kind = kind
        self._status = status
        self._reply: Optional[StreamReply] = None
        self._encoder: StreamEncoder = MessageEncoder()
        self._frames: List[bytes] = []      # of the offer under way
        self._frames_bytes = 0
        self._unsent: List[Tuple[Message, int, float]] = []     # size; since when: monotonic
        self._congested = False             # messages are dropped until the peer reads on
        self._queued_bytes = 0              # given to the connection so far
        self._taken_bytes = 0               # of these, taken by the socket, as last seen
        self._taken_at = 0.0                # when that number was last seen growing
        self._heartbeat: Optional[Timer] = None

    @property
    def attached(self) -> bool:
        """True if the peer has dialed this stream."""
        return self._reply is not None

    def attach(self, reply: StreamReply, encoder: StreamEncoder) -> None:
        """Use the stream just opened; it replaces the one before."""
        self.close()
        self._reply = reply
        self._encoder = encoder
        self._queued_bytes, self._taken_bytes = reply.pending, 0    # so far the reply's head
        self._taken_at = self._context.reactor.now()
        reply.on_close = self._on_close
        self._status.activate()
        self._beat()

    def close(self) -> None:
        """Drop the stream, if there is one."""
        reply, self._reply = self._reply, None
        self._frames, self._frames_bytes = [], 0
        self._congested = False
        self._report(ok=False)
        if self._heartbeat is not None:
            self._heartbeat.cancel()
        if reply is not None:
            reply.abort()

    def offer(self, message: Message) -> bool:
        """Queue a message until flush(); False if the peer reads too slowly: it is dropped."""
        reply = self._reply
        if reply is None:
            return False
        if self._is_full(reply):
            self._context.sent(Sent(self._member_id, self._kind.channel, message, 0, 0.0, False))
            return False
        parts = self._encoder.parts(message)
        size = sum(map(len, parts))
        self._frames += parts
        self._frames_bytes += size
        self._unsent.append((message, size, self._context.reactor.now()))
        return True

    def flush(self) -> None:
        """Write the frames queued since the last flush as one piece."""
        frames = self._frames
        if frames:
            self._frames, self._frames_bytes = [], 0
            self._write(*joined_parts(frames) if len(frames) > 1 else frames)
            if self._reply is not None:
                self._reply.when_read(self._report)

    def _report(self, *, ok: bool = True) -> None:
        """The connection has taken everything: our messages are sent.  Not ok: it is lost."""
        unsent, self._unsent = self._unsent, []
        now = self._context.reactor.now()
        for message, size, since in unsent:
            self._context.sent(
                Sent(self._member_id, self._kind.channel, message, size, now - since, ok))

    def _is_full(self, reply: StreamReply) -> bool:
        if reply.pending + self._frames_bytes <= _STREAM_PENDING_BYTES_MAX:
            self._congested = False
            return False
        if not self._congested:
            self._congested = True
            package_logger("rafthttp").warning(
                "dropped messages to %x: it reads too slowly from %s (overloaded network?)",
                self._member_id, self._kind.title,
            )
            self._context.unreachable(self._member_id)
        return True

    def _write(self, data: bytes, *more: bytes) -> None:
        reply = self._reply
        if reply is not None:
            before = reply.pending
            reply.write(data, more)
            self._queued_bytes += reply.pending - before

    def _beat(self) -> None:
        """Keep the stream alive, or give it up when the peer has taken nothing for 5 s."""
        reply = self._reply
        if reply is None:
            return
        now = self._context.reactor.now()
        taken = self._queued_bytes - reply.pending
        if taken != self._taken_bytes or not reply.pending:
            self._taken_bytes, self._taken_at = taken, now
        if now - self._taken_at > LINK_TIMEOUT_SECONDS:
            self._lost("i/o timeout")
            return
        if reply.pending <= _STREAM_PENDING_BYTES_MAX:
            self._write(self._encoder.heartbeat)
        self._heartbeat = self._context.reactor.call_later(LINK_HEARTBEAT_SECONDS, self._beat)

    def _on_close(self) -> None:
        self._lost("closed by the peer")

    def _lost(self, reason: str) -> None:
        self.close()
        self._status.deactivate("write", self._kind.title, reason)
        self._context.unreachable(self._member_id)
