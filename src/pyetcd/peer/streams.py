"""The streams between two members: one that this member dials, one that it answers.

A link may lose, repeat and reorder messages: Raft tolerates it.
"""

from __future__ import annotations

import functools
from typing import Dict, Generator, Iterator, List, Optional, Tuple, Union

from ..base.basics import Backoff
from ..base.codec import joined_parts
from ..base.errors import CodecError
from ..base.ids import package_logger
from ..base.limits import (
    LINK_HEARTBEAT_SECONDS,
    LINK_TIMEOUT_SECONDS,
    OUTPUT_BYTES_MAX,
    STREAM_RETRY_SECONDS,
    STREAM_RETRY_SECONDS_MAX,
)
from ..base.messages import Message
from ..base.text import finish, text_of
from ..base.versions import UNKNOWN_VERSION, major_minor
from ..net.http_calls import ANSWER_BYTES_MAX, Answer, HttpCall
from ..net.http_messages import StreamParser
from ..net.http_requests import StreamReply
from ..net.workers import Timer
from .compatibility import (
    APP_STREAM,
    DOUBLE_HINT,
    FOREIGN_HINT,
    ID_IN_USE,
    LinkContext,
    PeerStatus,
    Sent,
    StreamKind,
    UrlPicker,
)
from .frames import AppV2Encoder, MessageEncoder, app_v2_frames, message_frames

_OLDEST_STREAM_VERSION = (2, 1)     # etcd 2.0 has streams of another kind


def refusal_of(answer: Answer, context: LinkContext, member_id: int) -> str:
    """Return why the peer refused a request; log the reasons that an operator must remove."""
    text = text_of(answer.body).strip()
    if answer.status == 404:
        return f"remote member {member_id:x} could not recognize local member"
    if answer.status == 412 and text == "incompatible version":
        fault = f"ignored by peer {member_id:x} (server version incompatible)"
    elif answer.status == 412 and text in ("cluster ID mismatch", "clusterID mismatch"):
        theirs = answer.headers.get("x-etcd-cluster-id", "")
        fault = (
            f"ignored (cluster ID mismatch: remote[{member_id:x}]={theirs},"
            f" local={context.cluster_id}){FOREIGN_HINT}"
        )
    elif answer.status == 412 and text == ID_IN_USE:
        fault = (
            f"refused by peer {member_id:x}: another process uses our member"
            f" id {context.member_id:x}{DOUBLE_HINT}"
        )
    else:
        return f"unhandled http status {answer.status}"
    context.log_error(f"request sent was {fault}")
    return text


_SHORT_BYTES = 1_024        # of a message: decoded at once, 1.5 ms if all of it are heartbeats


class StreamReader:
    """A stream from a peer, dialed by this member, and dialed again whenever it ends."""

    def __init__(
        self, context: LinkContext, member_id: int, kind: StreamKind, picker: UrlPicker,
        status: PeerStatus,
    ) -> None:
        self._context = context
        self._member_id = member_id
        self._kind = kind
        self._picker = picker
        self._status = status
        self._target = f"/raft/stream/{kind.path}/{context.member_id:x}"
        self._headers = {**context.headers, "X-Raft-To": f"{member_id:x}"}
        self._call: Optional[HttpCall] = None
        self._backoff = Backoff(STREAM_RETRY_SECONDS, STREAM_RETRY_SECONDS_MAX)
        self._retry = context.reactor.call_later(0.0, self._dial)

    def retry_soon(self) -> None:
        """Dial again without back-off: the peer has dialed this member, and so can be reached."""
        if self._call is None and self._retry.callback is not None:
            self._retry.cancel()
            self._backoff.reset()
            self._retry = self._context.reactor.call_later(STREAM_RETRY_SECONDS, self._dial)

    def stop(self) -> None:
        self._retry.cancel()
        if self._call is not None:
            self._call.cancel()
            self._call = None

    def _dial(self) -> None:
        context = self._context
        self._decoder: Optional[StreamParser] = None    # set while the stream is open
        self._unread_bytes = 0                      # received, in no message yet
        self._is_decoding = False                   # the last data, in the next turns
        self._answer = Answer()
        self._url = self._picker.pick()
        self._call = HttpCall(
            context.reactor, self._url, "GET", self._target, self._headers,
            connect_timeout_s=context.dial_timeout_s, idle_timeout_s=LINK_TIMEOUT_SECONDS,
            tls=context.tls, on_head=self._on_head, on_data=self._on_data, on_done=self._on_done,
        )

    def _on_head(self, status: int, headers: Dict[str, str]) -> None:
        self._answer.take_head(status, headers)
        version = headers.get("x-server-version", UNKNOWN_VERSION)
        if "x-server-version" in headers:
            self._status.version = version
        if status == 200 and (major_minor(version) or (0, 0)) >= _OLDEST_STREAM_VERSION:
            self._decoder = StreamParser(
                app_v2_frames(self._context.member_id, self._member_id)
                if self._kind is APP_STREAM else message_frames())
            self._status.activate()

    def _on_data(self, data: bytes) -> None:
        call = self._call
        assert call is not None
        if self._decoder is None:
            self._answer.take_data(data)
            if len(self._answer.body) >= ANSWER_BYTES_MAX:
                call.cancel()
                self._on_done(None)
            return
        self._status.activate()
        self._unread_bytes += len(data)
        steps = self._receive(call, self._decoder.feed(data))
        if self._unread_bytes <= _SHORT_BYTES and not self._is_decoding:
            self._decoded(call, finish(steps))
            return
        self._is_decoding = True
        self._context.decoding.add(steps, functools.partial(self._decoded, call))
        if self._is_decoding:
            call.pause()                            # back-pressure, until all of it is decoded

    def _decoded(self, call: HttpCall, error: Optional[CodecError]) -> None:
        if call is not self._call:
            return                                  # the stream was closed meanwhile
        if error is not None:
            call.cancel()
            self._on_done(error)
            return
        self._backoff.reset()
        if self._is_decoding:
            self._is_decoding = False
            call.resume()

    def _receive(
        self, call: HttpCall, messages: Iterator[Optional[Message]]
    ) -> Generator[None, None, Optional[CodecError]]:
        """Hand the messages on; return the error that makes the rest of the stream useless."""
        try:
            for message in messages:
                if message is not None:
                    size, self._unread_bytes = self._unread_bytes, 0
                    yield from self._context.receive(message, size)
                else:
                    yield
                if self._call is not call:
                    return None                     # closed, perhaps because of the message
        except CodecError as error:
            return error
        return None

    def _on_done(self, error: Optional[Exception]) -> None:
        self._call = None
        self._retry = self._context.reactor.call_later(self._backoff.next(), self._dial)
        if self._decoder is not None:
            self._status.deactivate("read", self._kind.title, error or "EOF")
            return
        self._picker.failed(self._url)
        if self._answer.status == 410:
            self._context.removed()
        reason = error or ("unsupported stream type" if self._answer.status == 200 else
                           refusal_of(self._answer, self._context, self._member_id))
        self._status.deactivate("dial", self._kind.title, reason)


class StreamWriter:
    """A stream to a peer, attached while the peer has dialed it."""

    PENDING_BYTES_MAX = OUTPUT_BYTES_MAX    # unsent; above: messages are dropped

    def __init__(
        self, context: LinkContext, member_id: int, kind: StreamKind, status: PeerStatus
    ) -> None:
        self._context = context
        self._member_id = member_id
        self._kind = kind
        self._status = status
        self._reply: Optional[StreamReply] = None
        self._encoder: Union[AppV2Encoder, MessageEncoder] = MessageEncoder()
        self._frames: List[bytes] = []      # since the last flush
        self._frames_bytes = 0
        self._unsent: List[Tuple[Message, int, float]] = []     # size; since when: monotonic
        self._congested = False             # messages are dropped until the peer reads on
        self._queued_bytes = 0              # given to the connection so far
        self._taken_bytes = 0               # of these, taken by the socket at the last heartbeat
        self._taken_at = 0.0                # last heartbeat at which that number had grown
        self._heartbeat: Optional[Timer] = None

    @property
    def attached(self) -> bool:
        return self._reply is not None

    def attach(self, reply: StreamReply, encoder: Union[AppV2Encoder, MessageEncoder]) -> None:
        """Use the stream that the peer has opened; it replaces the one before."""
        self.close()
        self._reply = reply
        self._encoder = encoder
        self._queued_bytes, self._taken_bytes = reply.pending, 0    # so far the reply's head
        self._taken_at = self._context.reactor.now()
        reply.on_close = lambda: self._lost("closed by the peer")
        self._status.activate()
        self._heartbeat = self._context.reactor.every(LINK_HEARTBEAT_SECONDS, self._beat)
        self._beat()

    def close(self) -> None:
        reply, self._reply = self._reply, None
        self._frames, self._frames_bytes = [], 0
        self._congested = False
        self._report(ok=False)
        if self._heartbeat is not None:
            self._heartbeat.cancel()
        if reply is not None:
            reply.abort()

    def offer(self, message: Message) -> bool:
        """Queue a message until flush(); False: it is dropped, as the peer reads too slowly."""
        reply = self._reply
        if reply is None:
            return False
        if self._is_congested(reply):
            self._context.sent(Sent(self._member_id, self._kind.channel, message, 0, 0.0, False))
            return False
        parts = self._encoder.encode(message)
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
        """Report the messages as sent, since the socket has taken them; not ok: as lost."""
        unsent, self._unsent = self._unsent, []
        now = self._context.reactor.now()
        for message, size, since in unsent:
            self._context.sent(
                Sent(self._member_id, self._kind.channel, message, size, now - since, ok))

    def _is_congested(self, reply: StreamReply) -> bool:
        if reply.pending + self._frames_bytes <= self.PENDING_BYTES_MAX:
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
        """Send a heartbeat, or give the stream up when the peer has taken nothing for 5 s."""
        reply = self._reply
        if reply is None:
            return
        now = self._context.reactor.now()
        taken = self._queued_bytes - reply.pending
        if taken != self._taken_bytes or not reply.pending:
            self._taken_bytes, self._taken_at = taken, now
        if now - self._taken_at > LINK_TIMEOUT_SECONDS:
            self._lost("i/o timeout")
        elif reply.pending <= self.PENDING_BYTES_MAX:
            self._write(self._encoder.heartbeat)

    def _lost(self, reason: str) -> None:
        self.close()
        self._status.deactivate("write", self._kind.title, reason)
        self._context.unreachable(self._member_id)
