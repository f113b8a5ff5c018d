"""What peers must agree on: versions, ids, URLs and their state as seen from here."""

from __future__ import annotations

import logging
import re
from typing import (
    Callable,
    Dict,
    Generator,
    Iterable,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Tuple,
    Union,
)

from ..base.ids import package_logger
from ..base.limits import MIN_CLUSTER_VERSION, NS, OUTPUT_BYTES_MAX, SERVER_VERSION, UINT64_MAX
from ..base.messages import Message
from ..base.urls import check_url
from ..net.budgets import SlicedWork
from ..net.reactor import Reactor
from ..net.tls import TlsContext
from .frames import AppV2Encoder, MessageEncoder

_STREAM_PENDING_BYTES_MAX = OUTPUT_BYTES_MAX
ANSWER_BYTES_MAX = 4_096            # of the body of an answer; above: cut
CLOCK_DIFFERENCE_MAX_NS = NS        # of a peer's clock; above: a warning

StreamEncoder = Union[AppV2Encoder, MessageEncoder]


class StreamKind(NamedTuple):
    """One of the two streams that each member holds open to each peer."""

    path: str       # last but one element of the URL path
    title: str      # etcd's name of it in the log
    channel: str    # and in statistics


APP_STREAM = StreamKind("msgapp", "stream MsgApp v2", "msgappv2")
MESSAGE_STREAM = StreamKind("message", "stream Message", "message")
STREAM_KINDS = {kind.path: kind for kind in (APP_STREAM, MESSAGE_STREAM)}
_PIPELINE = "pipeline"

_VERSION = re.compile(r"(\d{1,9})\.(\d{1,9})\.\d{1,9}(?:[-+].*)?")


def major_minor(version: str) -> Optional[Tuple[int, int]]:
    """Return (major, minor) of a semantic version `a.b.c`, or None if it is not one."""
    match = _VERSION.fullmatch(version)
    return (int(match.group(1)), int(match.group(2))) if match else None


_OWN_VERSION = major_minor(SERVER_VERSION) or (0, 0)
_OLDEST_PEER_VERSION = major_minor(MIN_CLUSTER_VERSION) or (0, 0)
_OLDEST_STREAM_VERSION = (2, 1)     # etcd 2.0 has streams of another kind
_UNKNOWN_VERSION = "2.0.0"          # of a peer that announces none


def _parse_id(text: str) -> Optional[int]:
    """A member id in hex; None if it is not one."""
    if not re.fullmatch("[0-9a-fA-F]{1,32}", text):
        return None
    value = int(text, 16)
    return value if value <= UINT64_MAX else None


def _compatibility_error(headers: Mapping[str, str]) -> str:
    """Why the two versions in a peer's headers do not fit ours, or "".

    Source: etcd 2.3 rafthttp/http.go, checkClusterCompatibilityFromHeader.
    """
    name = headers.get("x-server-from", "")
    version = headers.get("x-server-version", _UNKNOWN_VERSION)
    key = major_minor(version)
    least = major_minor(headers.get("x-min-cluster-version", _UNKNOWN_VERSION))
    if key is None or least is None:
        return f"not a version: remote[{name}]={version}"
    if key < _OLDEST_PEER_VERSION:
        return f"remote version is too low: remote[{name}]={version}, local={SERVER_VERSION}"
    if least > _OWN_VERSION:
        return f"local version is too low: remote[{name}]={version}, local={SERVER_VERSION}"
    return ""


def _cause(reason: object) -> str:
    """An error as etcd words it: `connection refused`, not `[Errno 111] Connection refused`."""
    if isinstance(reason, OSError) and reason.strerror:
        return reason.strerror.lower()
    return str(reason)


class PeerStatus:
    """Whether a peer can be reached, as far as the last attempt tells."""

    def __init__(self, member_id: int, wall_ns: Callable[[], int]) -> None:
        self.active = False
        self.active_since = 0.0         # unix seconds; 0: inactive
        self.problem = "not connected yet"      # why it is inactive
        self._id = f"{member_id:x}"
        self._wall_ns = wall_ns

    def activate(self) -> None:
        """Something went through."""
        if not self.active:
            self.active = True
            self.active_since = self._wall_ns() / NS
            package_logger("rafthttp").info("the connection with %s became active", self._id)

    def deactivate(self, action: str, source: str, reason: object) -> None:
        """`action` (dial, read, write, heartbeat) on `source` failed; an error the first time."""
        log = package_logger("rafthttp")
        level = logging.ERROR if self.active else logging.DEBUG
        self.problem = _cause(reason)
        log.log(level, "failed to %s %s on %s (%s)", action, self._id, source, self.problem)
        if self.active:
            self.active = False
            self.active_since = 0.0
            log.info("the connection with %s became inactive", self._id)


class UrlPicker:
    """A peer's URLs, of which one is used until it fails.

    Those that cannot be dialed are left out: the log of a Go member may hold a port of 99999.
    """

    def __init__(self, urls: Iterable[str]) -> None:
        self.urls = _usable_urls(urls)          # sorted
        self._picked = 0

    def pick(self) -> str:
        """Return the URL to use now."""
        return self.urls[self._picked]

    def failed(self, url: str) -> None:
        """Go on to the next URL, if `url` is still the picked one."""
        if url == self.urls[self._picked]:
            self._picked = (self._picked + 1) % len(self.urls)

    def update(self, urls: Iterable[str]) -> None:
        """Replace the URLs and begin with the first."""
        self.urls = _usable_urls(urls)
        self._picked = 0


def _usable_urls(urls: Iterable[str]) -> List[str]:
    """The valid ones of `urls`, sorted; if there is none, one where every dial fails."""
    usable: List[str] = []
    for url in sorted(urls):
        try:
            usable.append(check_url(url))
        except ValueError as error:
            package_logger("rafthttp").error("ignored a peer URL: %s", error)
    return usable or ["http://127.0.0.1:0"]


class Sent(NamedTuple):
    """What became of one message to a peer."""

    to: int
    channel: str                        # msgappv2, message or pipeline
    message: Message
    size: int                           # bytes
    seconds: float                      # until the system took it; pipeline: until the answer
    ok: bool                            # False: lost, or dropped


class LinkContext(NamedTuple):
    """What all links of this member share: who we are, and whom to tell."""

    reactor: Reactor
    member_id: int
    cluster_id: str                                 # hex, as in the header
    headers: Dict[str, str]                         # of every request to a peer
    dial_timeout_s: float
    complain: Callable[[str], None]
    take: Callable[[Message, int], Generator[None, None, object]]   # a message; its bytes
    unreachable: Callable[[int], None]
    snapshot_done: Callable[[int, bool], None]
    removed: Callable[[], None]
    sent: Callable[[Sent], None]
    round_trip: Callable[[int, float], None]        # a peer has answered a probe, in seconds
    tls: Optional[TlsContext] = None                # None: the defaults, should a peer ask for it
    work: Optional[SlicedWork] = None               # where messages are decoded


ID_IN_USE = "member ID in use"       # the refusal of a second process with the id of a peer
FOREIGN_HINT = (
    "; two clusters use one peer URL: the member that does not belong there was started with the"
    " data directory of another one: stop it and correct its -data-dir"
)
DOUBLE_HINT = (
    ": one of the two was started with a copy of the other's data directory; stop it, move that"
    " directory away, and add it as a member of its own (POST /v2/members,"
    " -initial-cluster-state existing)"
)
