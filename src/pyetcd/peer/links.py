"""A peer as the sum of its links: streams, pipeline, prober."""

from __future__ import annotations

import collections
import functools
import re
from typing import Deque, Iterable, Optional, Set

from ..base.codec import encode_message_parts
from ..base.ids import package_logger
from ..base.limits import (
    LINK_TIMEOUT_SECONDS,
    NS,
    PIPELINE_QUEUE_BYTES_MAX,
    PIPELINE_QUEUE_MESSAGES_MAX,
    PIPELINE_WORKERS,
    PROBE_SECONDS,
    REQUEST_SECONDS_MAX,
)
from ..base.messages import Message, MsgType
from ..base.text import format_duration, parse_time
from ..base.versions import FIRST_V3_VERSION, major_minor
from ..net.http_calls import Answer, HttpCall, fetch
from ..net.http_requests import StreamReply
from ..net.workers import REPEAT_SECONDS
from .compatibility import (
    APP_STREAM,
    MESSAGE_STREAM,
    LinkContext,
    PeerStatus,
    Sent,
    StreamKind,
    UrlPicker,
)
from .frames import _U64, AppV2Encoder, EntryListEncoder, MessageEncoder
from .streams import StreamReader, StreamWriter, refusal_of

CLOCK_DIFFERENCE_MAX_NS = NS        # between a peer's clock and ours; above: a warning
_PIPELINE = "pipeline"              # its name in the log and in statistics


class PeerPost:
    """A message on its way by POST: to /raft, or with a database to /raft/snapshot (3.x's form)."""

    def __init__(self, message: Message, database: Optional[bytes]) -> None:
        self.message = message
        self.body = encode_message_parts(message)       # in pieces
        self.target, self.content_type = "/raft", "application/protobuf"
        if database is not None:
            self.target, self.content_type = "/raft/snapshot", "application/octet-stream"
            self.body = [_U64.pack(sum(map(len, self.body))), *self.body, database]
        self.size = sum(map(len, self.body))
        self.url = ""
        self.started = 0.0
        self.call: Optional[HttpCall] = None
        self.is_snapshot = message.type == MsgType.SNAP     # its outcome is reported


class Pipeline:
    """Messages to a member by POST: those to a peer without streams, and all snapshots."""

    def __init__(
        self, context: LinkContext, member_id: int, picker: UrlPicker, status: PeerStatus
    ) -> None:
        self.picker = picker
        self._context = context
        self._member_id = member_id
        self._status = status
        self._waiting: Deque[PeerPost] = collections.deque()
        self._under_way: Set[PeerPost] = set()
        self._congested = False

    def offer(self, message: Message) -> None:
        """Send, queue or drop a message; a drop is reported."""
        size = sum(post.size for post in self._waiting)
        if len(self._waiting) >= PIPELINE_QUEUE_MESSAGES_MAX or size > PIPELINE_QUEUE_BYTES_MAX:
            self._drop(message)
            return
        self._congested = False
        self._waiting.append(PeerPost(message, self._database_for(message)))
        self._send_waiting()

    def _database_for(self, message: Message) -> Optional[bytes]:
        """Return the database without which 3.x exits on a snapshot; 2.3 takes both forms."""
        version = self._status.version or self._context.identity.server
        if message.snapshot is None or (major_minor(version) or (0, 0)) < FIRST_V3_VERSION:
            return None
        return self._context.inspector.empty_database(message.snapshot.index)

    def stop(self) -> None:
        """Drop the waiting messages and cancel the calls; a snapshot counts as failed."""
        posts = [*self._under_way, *self._waiting]
        self._waiting.clear()
        self._under_way.clear()
        for post in posts:
            if post.call is not None:
                post.call.cancel()
            if post.is_snapshot:
                self._context.snapshot_done(self._member_id, False)

    def _drop(self, message: Message) -> None:
        self._context.sent(Sent(self._member_id, _PIPELINE, message, 0, 0.0, False))
        if not self._congested:
            self._congested = True
            package_logger("rafthttp").warning(
                "dropped messages to %x: too many wait for the pipeline", self._member_id
            )
            self._context.unreachable(self._member_id)
        if message.type == MsgType.SNAP:
            self._context.snapshot_done(self._member_id, False)

    def _send_waiting(self) -> None:
        while self._waiting and len(self._under_way) < PIPELINE_WORKERS:
            post = self._waiting.popleft()
            self._under_way.add(post)
            self._send(post)

    def _send(self, post: PeerPost) -> None:
        context = self._context
        post.url = self.picker.pick()
        post.started = context.reactor.now()
        post.call = fetch(
            context.reactor, post.url, post.target, functools.partial(self._answered, post),
            method="POST", body=post.body, tls=context.tls,
            headers={**context.headers, "Content-Type": post.content_type},
            connect_timeout_s=context.dial_timeout_s,
            # The answer to a snapshot comes after all of it was sent, over a slow line perhaps.
            idle_timeout_s=REQUEST_SECONDS_MAX if post.is_snapshot else LINK_TIMEOUT_SECONDS,
        )

    def _answered(self, post: PeerPost, error: Optional[Exception], answer: Answer) -> None:
        context = self._context
        self._under_way.discard(post)
        ok = error is None and answer.status == 204
        elapsed_s = context.reactor.now() - post.started
        context.sent(Sent(self._member_id, _PIPELINE, post.message, post.size, elapsed_s, ok))
        if ok:
            self._status.activate()
        else:
            if answer.status == 403:
                context.removed()
            reason = error or refusal_of(answer, context, self._member_id)
            self.picker.failed(post.url)
            self._status.deactivate("write", _PIPELINE, reason)
            context.unreachable(self._member_id)
        if post.is_snapshot:
            context.snapshot_done(self._member_id, ok)
        self._send_waiting()


class Prober:
    """Asks for a peer's time every 4 s (etcd 2.3 probing_status.go); warns every 30 s at most."""

    def __init__(self, context: LinkContext, member_id: int, picker: UrlPicker) -> None:
        self._context = context
        self._member_id = member_id
        self._picker = picker
        self._call: Optional[HttpCall] = None
        self._warn_at = context.reactor.now() + REPEAT_SECONDS
        self._timer = context.reactor.every(PROBE_SECONDS, self._probe)

    def stop(self) -> None:
        self._timer.cancel()
        if self._call is not None:
            self._call.cancel()

    def _probe(self) -> None:
        context = self._context
        if self._call is None or self._call.ended:
            self._call = fetch(
                context.reactor, self._picker.pick(), "/raft/probing",
                functools.partial(self._probed, context.reactor.now()), tls=context.tls,
                connect_timeout_s=PROBE_SECONDS, idle_timeout_s=PROBE_SECONDS,
            )

    def _probed(self, asked_at: float, error: Optional[Exception], answer: Answer) -> None:
        reactor = self._context.reactor
        elapsed_s = reactor.now() - asked_at
        theirs_ns = None if error else _probed_time(answer)
        if theirs_ns is None:
            self._warn("the connection to peer %x is unhealthy", self._member_id)
            return
        self._context.round_trip(self._member_id, elapsed_s)
        difference_ns = reactor.wall_ns() - int(elapsed_s * NS) // 2 - theirs_ns
        if abs(difference_ns) > CLOCK_DIFFERENCE_MAX_NS:
            sign = "-" if difference_ns < 0 else ""
            self._warn(
                "the clock difference against peer %x is too high [%s > 1s]", self._member_id,
                sign + format_duration(abs(difference_ns) / NS),
            )

    def _warn(self, text: str, *args: object) -> None:
        now = self._context.reactor.now()
        if now >= self._warn_at:
            self._warn_at = now + REPEAT_SECONDS
            package_logger("rafthttp").warning(text, *args)


_PROBED_NOW = re.compile(rb'"Now"\s*:\s*"([0-9TZ:.+-]{1,64})"')


def _probed_time(answer: Answer) -> Optional[int]:
    """Return the peer's clock in unix ns; None: it is not the answer of a healthy peer."""
    match = _PROBED_NOW.search(answer.body)
    if answer.status != 200 or match is None:
        return None
    try:
        return parse_time(match.group(1).decode("ascii"))
    except ValueError:
        return None


class Peer:
    """Another member: two streams each way, the pipeline, and the prober."""

    def __init__(
        self, context: LinkContext, member_id: int, urls: Iterable[str], lists: EntryListEncoder
    ) -> None:
        self.picker = UrlPicker(urls)
        self.status = PeerStatus(member_id, context.reactor.wall_ns)
        self._id = member_id
        self._advertised = ""           # peer URLs, by the process that dialed the streams
        self._context = context
        self._lists = lists
        self._app_writer = StreamWriter(context, member_id, APP_STREAM, self.status)
        self._message_writer = StreamWriter(context, member_id, MESSAGE_STREAM, self.status)
        self._pipeline = Pipeline(context, member_id, self.picker, self.status)
        self._readers = [
            StreamReader(context, member_id, kind, self.picker, self.status)
            for kind in (APP_STREAM, MESSAGE_STREAM)
        ]
        self._prober = Prober(context, member_id, self.picker)

    def offer(self, message: Message) -> None:
        """Send by the channel that fits, or drop and report; complete with flush()."""
        if message.type == MsgType.SNAP:
            self._offer_snapshot(message)
        elif message.type == MsgType.APP and self._app_writer.attached:
            self._app_writer.offer(message)
        elif self._message_writer.attached:
            self._message_writer.offer(message)
        else:
            self._pipeline.offer(message)

    def flush(self) -> None:
        self._app_writer.flush()
        self._message_writer.flush()

    def other_process(self, advertised: str) -> str:
        """Return the peer URLs of another process that has this peer's streams, or "".

        advertised  the peer URLs of a process that sends as this peer

        Each of the two may hold entries that the other lacks, and each would count for both.  A
        process with the URLs that the cluster knows is accepted: the peer has moved, and the
        streams are those of its old place.  Differs from etcd, where streams of one process
        replace those of the other in turn.
        """
        is_attached = self._app_writer.attached or self._message_writer.attached
        is_right = sorted(advertised.split(",")) == self.picker.urls
        return "" if is_right or advertised == self._advertised or not is_attached else (
            self._advertised
        )

    def attach(self, kind: StreamKind, reply: StreamReply, advertised: str) -> None:
        """Use a stream that the peer has dialed."""
        self._advertised = advertised
        for reader in self._readers:
            reader.retry_soon()
        if kind is APP_STREAM:
            self._app_writer.attach(reply, AppV2Encoder(self._lists))
        else:
            self._message_writer.attach(reply, MessageEncoder())

    def stop(self) -> None:
        for reader in self._readers:
            reader.stop()
        self._app_writer.close()
        self._message_writer.close()
        self._pipeline.stop()
        self._prober.stop()

    def _offer_snapshot(self, message: Message) -> None:
        """Send a snapshot, unless the receiver would lose data by the empty database in it."""
        if not self._context.inspector.needs_v3_data(self._id):
            self._pipeline.offer(message)
            return
        self._context.log_error(
            f"cannot send a snapshot to {self._id:x}: the cluster holds data of etcd's v3 API,"
            " which this member does not keep; a member of etcd 3 must lead to send it: restart"
            " this member, and others of pyetcd, until one does"
        )
        self._context.unreachable(self._id)
        self._context.snapshot_done(self._id, False)
