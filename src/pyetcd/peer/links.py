"""Posts, probes, and a peer as the sum of its links."""

from __future__ import annotations

import collections
import re
from typing import Deque, Iterable, Optional, Sequence, Set

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
from ..net.http_calls import HttpCall
from ..net.http_requests import StreamReply
from ..net.workers import COMPLAINT_SECONDS
from .compatibility import (
    _PIPELINE,
    ANSWER_BYTES_MAX,
    APP_STREAM,
    CLOCK_DIFFERENCE_MAX_NS,
    MESSAGE_STREAM,
    LinkContext,
    PeerStatus,
    Sent,
    StreamKind,
    UrlPicker,
    major_minor,
)
from .frames import AppV2Encoder, EntryListEncoder, MessageEncoder
from .streams import Answer, StreamReader, StreamWriter


class PeerPost:
    """One message on its way by POST /raft."""

    def __init__(self, message: Message, body: Sequence[bytes]) -> None:
        self.message = message
        self.body = body                # in pieces
        self.size = sum(map(len, body))
        self.answer = Answer()
        self.url = ""
        self.started = 0.0
        self.call: Optional[HttpCall] = None

    @property
    def is_snapshot(self) -> bool:
        """True if the outcome matters to more than reachability."""
        return self.message.type == MsgType.SNAP


class Pipeline:
    """Messages that no stream takes: each in a POST of its own, a few at a time."""

    def __init__(
        self, context: LinkContext, member_id: int, picker: UrlPicker, status: PeerStatus
    ) -> None:
        self._context = context
        self._member_id = member_id
        self._picker = picker
        self._status = status
        self._waiting: Deque[PeerPost] = collections.deque()
        self._under_way: Set[PeerPost] = set()
        self._congested = False
        self._headers = {**context.headers, "Content-Type": "application/protobuf"}

    def offer(self, message: Message) -> None:
        """Send, queue or drop a message; a drop is reported."""
        size = sum(post.size for post in self._waiting)
        if len(self._waiting) >= PIPELINE_QUEUE_MESSAGES_MAX or size > PIPELINE_QUEUE_BYTES_MAX:
            self._context.sent(Sent(self._member_id, _PIPELINE, message, 0, 0.0, False))
            self._full(message)
            return
        self._congested = False
        self._waiting.append(PeerPost(message, encode_message_parts(message)))
        self._begin()

    def stop(self) -> None:
        """Forget what waits and break off what is under way; a snapshot counts as failed."""
        posts = [*self._under_way, *self._waiting]
        self._waiting.clear()
        self._under_way.clear()
        for post in posts:
            if post.call is not None:
                post.call.cancel()
            if post.is_snapshot:
                self._context.snapshot_done(self._member_id, False)

    def _full(self, message: Message) -> None:
        if not self._congested:
            self._congested = True
            package_logger("rafthttp").warning(
                "dropped messages to %x: too many wait for the pipeline", self._member_id
            )
            self._context.unreachable(self._member_id)
        if message.type == MsgType.SNAP:
            self._context.snapshot_done(self._member_id, False)

    def _begin(self) -> None:
        while self._waiting and len(self._under_way) < PIPELINE_WORKERS:
            post = self._waiting.popleft()
            self._under_way.add(post)
            self._send(post)

    def _send(self, post: PeerPost) -> None:
        context = self._context
        post.url = self._picker.pick()
        post.started = context.reactor.now()

        def done(error: Optional[Exception]) -> None:
            self._done(post, error)

        post.call = HttpCall(
            context.reactor, post.url, "POST", "/raft", self._headers, post.body[0],
            post.body[1:],
            connect_timeout_s=context.dial_timeout_s,
            # The answer to a snapshot comes after all of it was sent, over a slow line perhaps.
            idle_timeout_s=REQUEST_SECONDS_MAX if post.is_snapshot else LINK_TIMEOUT_SECONDS,
            answer_max=ANSWER_BYTES_MAX, tls=context.tls, on_head=post.answer.take_head,
            on_data=post.answer.take_data, on_done=done,
        )

    def _done(self, post: PeerPost, error: Optional[Exception]) -> None:
        context = self._context
        self._under_way.discard(post)
        ok = error is None and post.answer.status == 204
        elapsed_s = context.reactor.now() - post.started
        context.sent(
            Sent(self._member_id, _PIPELINE, post.message, post.size, elapsed_s, ok))
        if ok:
            self._status.activate()
        else:
            self._failed(post, error)
        if post.is_snapshot:
            context.snapshot_done(self._member_id, ok)
        self._begin()

    def _failed(self, post: PeerPost, error: Optional[Exception]) -> None:
        if post.answer.status == 403:
            self._context.removed()
        reason = error or post.answer.refusal(self._context, self._member_id)
        self._picker.failed(post.url)
        self._status.deactivate("write", _PIPELINE, reason)
        self._context.unreachable(self._member_id)


class Prober:
    """Asks a peer for its time every 4 s, and warns every 30 s if something is wrong.

    Source: etcd 2.3 rafthttp/probing_status.go.
    """

    def __init__(self, context: LinkContext, member_id: int, picker: UrlPicker) -> None:
        self._context = context
        self._member_id = member_id
        self._picker = picker
        self._answer = Answer()
        self._asked = 0.0                           # when the probe was sent
        self._call: Optional[HttpCall] = None
        self._warn_at = context.reactor.now() + COMPLAINT_SECONDS
        self._timer = context.reactor.call_later(PROBE_SECONDS, self._probe)

    def stop(self) -> None:
        """Ask no more."""
        self._timer.cancel()
        if self._call is not None:
            self._call.cancel()

    def _probe(self) -> None:
        reactor = self._context.reactor
        self._answer = Answer()
        self._asked = reactor.now()
        self._call = HttpCall(
            reactor, self._picker.pick(), "GET", "/raft/probing", {},
            connect_timeout_s=PROBE_SECONDS, idle_timeout_s=PROBE_SECONDS,
            answer_max=ANSWER_BYTES_MAX, tls=self._context.tls,
            on_head=self._answer.take_head, on_data=self._answer.take_data, on_done=self._done,
        )

    def _done(self, error: Optional[Exception]) -> None:
        reactor = self._context.reactor
        self._call = None
        self._timer = reactor.call_later(PROBE_SECONDS, self._probe)
        theirs_ns = None if error else _probed_time(self._answer)
        now = reactor.now()
        if theirs_ns is None:
            if now >= self._warn_at:
                self._warn("the connection to peer %x is unhealthy", self._member_id)
            return
        self._context.round_trip(self._member_id, now - self._asked)
        one_way_ns = int((now - self._asked) * NS) // 2
        difference_ns = reactor.wall_ns() - one_way_ns - theirs_ns
        if abs(difference_ns) > CLOCK_DIFFERENCE_MAX_NS and now >= self._warn_at:
            sign = "-" if difference_ns < 0 else ""
            self._warn(
                "the clock difference against peer %x is too high [%s > 1s]", self._member_id,
                sign + format_duration(abs(difference_ns) / NS),
            )

    def _warn(self, text: str, *args: object) -> None:
        self._warn_at = self._context.reactor.now() + COMPLAINT_SECONDS
        package_logger("rafthttp").warning(text, *args)


_PROBED_NOW = re.compile(rb'"Now"\s*:\s*"([0-9TZ:.+-]{1,64})"')


def _probed_time(answer: Answer) -> Optional[int]:
    """The peer's clock in unix ns, or None if the answer is not that of a healthy peer."""
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
        self.id = member_id
        self.status = PeerStatus(member_id, context.reactor.wall_ns)
        self.version = ""               # as the peer announced it last; "": never
        self._advertised = ""           # peer URLs, by the process that dialed the streams
        self._context = context
        self._lists = lists
        self._picker = UrlPicker(urls)
        self._app_writer = StreamWriter(context, member_id, APP_STREAM, self.status)
        self._message_writer = StreamWriter(context, member_id, MESSAGE_STREAM, self.status)
        self._pipeline = Pipeline(context, member_id, self._picker, self.status)
        self._readers = [
            StreamReader(context, member_id, kind, self._picker, self.status, self.heard_version)
            for kind in (APP_STREAM, MESSAGE_STREAM)
        ]
        self._prober = Prober(context, member_id, self._picker)

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
        """Write what was offered."""
        self._app_writer.flush()
        self._message_writer.flush()

    @property
    def problem(self) -> str:
        """Where the peer is dialed and what fails; "" if it can be reached."""
        return "" if self.status.active else f"{self._picker.pick()}: {self.status.problem}"

    def heard_version(self, version: str) -> None:
        """The peer announced its version."""
        self.version = version

    def other_process(self, advertised: str) -> str:
        """Return the peer URLs of the process with the peer's streams if they are others, or "".

        `advertised` are those of a process that says it is this peer.  Both may hold what the
        other does not, and each would count for both.  Who has the URLs that the cluster knows is
        right: the peer has moved, and the streams are left from before.  Differs from etcd, where
        streams of the one replace those of the other in turn.
        """
        is_attached = self._app_writer.attached or self._message_writer.attached
        is_right = sorted(advertised.split(",")) == self._picker.urls
        return "" if is_right or advertised == self._advertised or not is_attached else (
            self._advertised
        )

    def attach(self, kind: StreamKind, reply: StreamReply, advertised: str) -> None:
        """The peer has dialed one of its streams."""
        self._advertised = advertised
        for reader in self._readers:
            reader.hurry()
        if kind is APP_STREAM:
            self._app_writer.attach(reply, AppV2Encoder(self._lists))
        else:
            self._message_writer.attach(reply, MessageEncoder())

    def update(self, urls: Iterable[str]) -> None:
        """Use other URLs from the next dial on."""
        self._picker.update(urls)

    def stop(self) -> None:
        """Close everything."""
        for reader in self._readers:
            reader.stop()
        self._app_writer.close()
        self._message_writer.close()
        self._pipeline.stop()
        self._prober.stop()

    def _offer_snapshot(self, message: Message) -> None:
        """Send a snapshot, unless it would kill the receiver.

        etcd 3.x needs a bolt database with it and ends itself when it gets none.
        """
        if (major_minor(self.version) or (0, 0)) < (3, 0):
            self._pipeline.offer(message)
            return
        self._context.complain(
            f"cannot send a snapshot to {self.id:x}: etcd {self.version} needs a database that"
            " this member does not have; start it with a copy of another 3.x member's data"
            " directory, or replace it by a 2.3 member"
        )
        self._context.unreachable(self.id)
        self._context.snapshot_done(self.id, False)


class Remote:
    """A member of the cluster that our own view of it does not know yet: only POSTs."""

    def __init__(self, context: LinkContext, member_id: int, urls: Iterable[str]) -> None:
        status = PeerStatus(member_id, context.reactor.wall_ns)
        self._picker = UrlPicker(urls)
        self._pipeline = Pipeline(context, member_id, self._picker, status)

    def offer(self, message: Message) -> None:
        """Send by POST, or drop and report."""
        self._pipeline.offer(message)

    def update(self, urls: Iterable[str]) -> None:
        """Use other URLs from the next POST on."""
        self._picker.update(urls)

    def stop(self) -> None:
        """Break off what is under way."""
        self._pipeline.stop()
