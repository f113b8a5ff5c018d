"""Peers as this member sees them: versions, ids, URLs, reachability."""

from __future__ import annotations

import logging
import re
from typing import IO, Any, Callable, Dict, Generator, Iterable, List, NamedTuple, Optional

from ..base.codec import Buffer
from ..base.ids import package_logger
from ..base.limits import NS, UINT64_MAX
from ..base.messages import Message
from ..base.urls import check_url
from ..base.versions import DEFAULT_IDENTITY, Identity
from ..net.budgets import SlicedWork
from ..net.reactor import Reactor
from ..net.tls import TlsContext


class StreamKind(NamedTuple):
    """One of the two streams that each member holds open to each peer."""

    path: str       # last but one element of the URL path
    title: str      # its name in the log
    channel: str    # its name in statistics


APP_STREAM = StreamKind("msgapp", "stream MsgApp v2", "msgappv2")
MESSAGE_STREAM = StreamKind("message", "stream Message", "message")
STREAM_KINDS = {kind.path: kind for kind in (APP_STREAM, MESSAGE_STREAM)}


def _parse_id(text: str) -> Optional[int]:
    """Return the member id of a hex number; None for any other text."""
    if not re.fullmatch("[0-9a-fA-F]{1,32}", text):
        return None
    value = int(text, 16)
    return value if value <= UINT64_MAX else None


class PeerStatus:
    """The result of the last attempt to reach a peer, and the version that it announced last."""

    def __init__(self, member_id: int, wall_ns: Callable[[], int]) -> None:
        self.version = ""               # "": none yet
        self.active_since = 0.0         # unix seconds; 0: inactive
        self.inactive_since = wall_ns() / NS    # unix seconds, from the last loss or our start
        self.problem = "not connected yet"      # why it is inactive
        self._id = f"{member_id:x}"
        self._wall_ns = wall_ns

    def activate(self) -> None:
        """Note that a message went through."""
        if not self.active_since:
            self.active_since = self._wall_ns() / NS
            package_logger("rafthttp").info("the connection with %s became active", self._id)

    def deactivate(self, action: str, source: str, reason: object) -> None:
        """Note that an action (dial, read, write) on `source` failed; the first is an error."""
        if isinstance(reason, OSError) and reason.strerror:     # etcd's words: no `[Errno 111]`
            reason = reason.strerror.lower()
        log = package_logger("rafthttp")
        level = logging.ERROR if self.active_since else logging.DEBUG
        self.problem = str(reason)
        log.log(level, "failed to %s %s on %s (%s)", action, self._id, source, self.problem)
        if self.active_since:
            self.active_since = 0.0
            self.inactive_since = self._wall_ns() / NS
            log.info("the connection with %s became inactive", self._id)


class UrlPicker:
    """The URLs of a peer.  One is in use until it fails; then the next."""

    def __init__(self, urls: Iterable[str]) -> None:
        self.update(urls)

    def update(self, urls: Iterable[str]) -> None:
        """Replace the URLs, and begin with the first in order."""
        self.urls: List[str] = []               # sorted
        self._picked = 0
        for url in sorted(urls):
            try:
                self.urls.append(check_url(url))
            except ValueError as error:         # the log of a Go member may hold a port of 99999
                package_logger("rafthttp").error("ignored a peer URL: %s", error)
        if not self.urls:
            self.urls.append("http://127.0.0.1:0")      # every dial fails

    def pick(self) -> str:
        return self.urls[self._picked]

    def failed(self, url: str) -> None:
        if url == self.urls[self._picked]:
            self._picked = (self._picked + 1) % len(self.urls)


class Sent(NamedTuple):
    """The fate of one message to a peer."""

    to: int
    channel: str                        # msgappv2, message or pipeline
    message: Message
    size: int                           # bytes
    seconds: float                      # until the system took it; pipeline: until the answer
    ok: bool                            # False: lost, or dropped


class MessageInspector:
    """The check of messages that peers send, and of databases of 3.x; this one lets all pass."""

    def inspect(self, message: Message) -> Generator[None, None, str]:
        """Return, in steps, why `message` must not be delivered; "": it may."""
        yield from ()
        return ""

    def read_state(self, data: Buffer) -> Any:
        """Return the store state in the data of a snapshot.  Raises ValueError.  Thread: any."""
        return None

    def has_v3_data(self, database: IO[bytes]) -> bool:
        """Return whether the database behind a snapshot of 3.x holds data.  Thread: any."""
        return False

    def note_v3_data(self) -> None:
        """Remember that the cluster holds data of the v3 API."""

    def needs_v3_data(self, member_id: int) -> bool:
        """Return whether an empty database beside a snapshot would harm that member."""
        return False

    def empty_database(self, raft_index: int) -> bytes:
        """Return the database for a member of 3.x beside a snapshot up to raft_index."""
        return b""


class LinkContext(NamedTuple):
    """The identity and the callbacks that all links of this member share."""

    reactor: Reactor
    member_id: int
    cluster_id: str                                 # hex, as in the header
    headers: Dict[str, str]                         # of every request to a peer
    dial_timeout_s: float
    log_error: Callable[[str], None]
    receive: Callable[[Message, int], Generator[None, None, object]]    # a message; its bytes
    unreachable: Callable[[int], None]
    snapshot_done: Callable[[int, bool], None]
    removed: Callable[[], None]
    sent: Callable[[Sent], None]
    round_trip: Callable[[int, float], None]        # of a probe to a peer, in seconds
    tls: Optional[TlsContext]                       # None: the defaults, for https peers
    decoding: SlicedWork
    inspector: MessageInspector = MessageInspector()
    identity: Identity = DEFAULT_IDENTITY


ID_IN_USE = "member ID in use"      # refusal of a second process with the id of a peer
FOREIGN_HINT = (
    "; two clusters use one peer URL: the member that does not belong there was started with the"
    " data directory of another one: stop it and correct its -data-dir"
)
DOUBLE_HINT = (
    ": one of the two was started with a copy of the other's data directory; stop it, move that"
    " directory away, and add it as a member of its own (POST /v2/members,"
    " -initial-cluster-state existing)"
)
