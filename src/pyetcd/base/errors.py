"""Errors: one class per error; code, text and status live here only."""

from __future__ import annotations


class EtcdError(Exception):
    """An answer of the keys API: code, message and HTTP status come from the class.

    cause  what exactly was wrong, or "" (then it is left out of the body)
    index  store index for the body and X-Etcd-Index; 0 for errors of the request itself

    Source: etcd 2.3 API, errorcode.
    """

    code = 300
    message = "Raft Internal Error"
    status = 400

    def __init__(self, cause: str = "", index: int = 0) -> None:
        super().__init__(cause)
        self.cause = cause
        self.index = index

    def __str__(self) -> str:
        cause = f" ({self.cause})" if self.cause else ""
        return f"{self.code}: {self.message}{cause} [{self.index}]"


class KeyNotFound(EtcdError):
    """A path component does not exist; the cause is its path."""

    code, message, status = 100, "Key not found", 404


class CompareFailed(EtcdError):
    """prevValue or prevIndex does not hold; the cause shows given and stored."""

    code, message, status = 101, "Compare failed", 412


class NotFile(EtcdError):
    """A directory stands where a file is needed."""

    code, message, status = 102, "Not a file", 403


class NotDir(EtcdError):
    """A file stands in the middle of the path."""

    code, message = 104, "Not a directory"


class NodeExists(EtcdError):
    """create found the key."""

    code, message, status = 105, "Key already exists", 412


class RootReadOnly(EtcdError):
    """The root cannot be changed."""

    code, message = 107, "Root is read only"


class DirNotEmpty(EtcdError):
    """Deleting a directory with children needs recursive=true."""

    code, message, status = 108, "Directory not empty", 403


class Unauthorized(EtcdError):
    """Auth is enabled and the request lacks the right."""

    code, message, status = 110, "The request requires user authentication", 401


class PrevValueRequired(EtcdError):
    """prevValue was given, but empty."""

    code, message = 201, "PrevValue is Required in POST form"


class TtlNotANumber(EtcdError):
    """ttl is not an unsigned integer."""

    code, message = 202, "The given TTL in POST form is not a number"


class IndexNotANumber(EtcdError):
    """prevIndex or waitIndex is not an unsigned integer."""

    code, message = 203, "The given index in POST form is not a number"


class InvalidField(EtcdError):
    """A boolean parameter has another value, or does not fit the method."""

    code, message = 209, "Invalid field"


class InvalidForm(EtcdError):
    """The query or the body cannot be parsed, or is too large."""

    code, message = 210, "Invalid POST form"


class RefreshValue(EtcdError):
    """refresh=true with a value."""

    code, message = 211, "Value provided on refresh"


class RefreshTtlRequired(EtcdError):
    """refresh=true without a ttl."""

    code, message = 212, "A TTL must be provided on refresh"


class RaftInternal(EtcdError):
    """The request did not get through consensus: timeout, overload or stop."""

    code, message, status = 300, "Raft Internal Error", 500


class TooManyRequests(RaftInternal):
    """PROPOSALS_PENDING_MAX requests wait already; this one was not even tried."""

    status = 503


class RequestTimeout(RaftInternal):
    """No answer within the request timeout; the write may still be applied later."""


class NoSpace(RaftInternal):
    """The disk of this member is full: nothing was changed, or will be by this request."""

    def __init__(self, cause: str = "", index: int = 0) -> None:
        super().__init__(f"etcdserver: {cause}; nothing was changed", index)


class ServerStopped(RaftInternal):
    """The member is stopping."""

    def __init__(self, cause: str = "etcdserver: server stopped", index: int = 0) -> None:
        super().__init__(cause, index)


class EventIndexCleared(EtcdError):
    """waitIndex lies before the event history."""

    code, message = 401, "The event in requested index is outdated and cleared"


class MemberError(Exception):
    """A membership change that the cluster refuses; the text is etcd's."""

    text = "etcdserver: membership error"

    def __str__(self) -> str:
        return self.text


class UnknownChange(MemberError):
    """A kind of change that this program does not know."""

    text = "etcdserver: unknown kind of membership change"


class MemberRemoved(MemberError):
    """The id was removed once and can never come back."""

    text = "etcdserver: ID removed"


class MemberExists(MemberError):
    """The id is a member already."""

    text = "etcdserver: ID exists"


class MemberNotFound(MemberError):
    """No member has this id."""

    text = "etcdserver: ID not found"


class PeerUrlExists(MemberError):
    """Another member uses one of the peer URLs."""

    text = "etcdserver: peerURL exists"


class ReconfigurationRefused(MemberError):
    """Strict reconfiguration check: the change could lose the quorum."""

    detail = ""                         # the numbers, and what to do

    def __str__(self) -> str:
        return f"{self.text}: {self.detail}"


class NotEnoughStarted(ReconfigurationRefused):
    """Too few members would have been started, as etcd 2.3 counts."""

    text = "etcdserver: re-configuration failed due to not enough started members"

    def __init__(self, what: str, started: int, size: int) -> None:
        super().__init__()
        self.detail = (
            f"{what} a member leaves {started} started of {size} members, and {size // 2 + 1} are"
            f" needed for a quorum; start the members that were added and not started yet, or"
            f" remove those, and try again"
        )


class NotEnoughActive(ReconfigurationRefused):
    """Too few members would be up, as etcd 3 counts."""

    text = "etcdserver: unhealthy cluster"

    def __init__(self, what: str, active: int, size: int) -> None:
        super().__init__()
        self.detail = (
            f"{what} a member leaves {active} of {size} members that can be reached, and"
            f" {size // 2 + 1} are needed for a quorum; start those that are down, or remove them"
            f" first, and try again"
        )


class RaftError(Exception):
    """The Raft core cannot do what was asked, now or ever; nothing is broken."""


class ProposalDropped(RaftError):
    """No leader is known, or this member may not propose."""


class Compacted(RaftError):
    """The wanted entries lie before the first index of the log."""


class Unavailable(RaftError):
    """The wanted entries lie after the last index of the log."""


class CodecError(ValueError):
    """Bytes that are not what they should be: wrong wire type, cut varint, length past the end."""


class WalError(Exception):
    """The write-ahead log cannot be read or opened; the text says which file and what to do."""


class CrcMismatch(WalError):
    """A record's checksum is wrong in the middle of the log: damage, never repaired by guessing."""


class TornTail(WalError):
    """The last record is incomplete: a crash during a write.  Repairable."""


class FileLocked(WalError):
    """Another process holds the lock of the log."""


class DiskFull(WalError):
    """A file cannot grow; what was written of this visit is taken back, so it may be repeated."""


class SnapshotError(Exception):
    """No usable snapshot, or one that does not fit the log."""


class DiscoveryError(Exception):
    """Joining by discovery failed; the text says why (etcd's words)."""


class StartError(Exception):
    """The member cannot start.  The text is one line that says what to do; exit code 1."""


class ClusterFull(StartError):
    """The discovery URL has all its members; this node may serve as a proxy of them."""


class InvariantError(Exception):
    """A bug: state that must never exist does.  The member ends rather than continue."""
