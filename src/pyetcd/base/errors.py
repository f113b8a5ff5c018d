"""Errors: one class per error; code, text and status live here only."""

from __future__ import annotations


class EtcdError(Exception):
    """An error of the keys API: code, message and HTTP status (etcd 2.3's) come from the class."""

    code = 300
    message = "Raft Internal Error"
    status = 400

    def __init__(self, cause: str = "", index: int = 0) -> None:
        super().__init__(cause)
        self.cause = cause          # detail of this request; "": left out of the body
        self.index = index          # store index, also X-Etcd-Index; 0: the request itself is wrong

    def __str__(self) -> str:
        cause = f" ({self.cause})" if self.cause else ""
        return f"{self.code}: {self.message}{cause} [{self.index}]"


class KeyNotFound(EtcdError):
    code, message, status = 100, "Key not found", 404


class CompareFailed(EtcdError):
    code, message, status = 101, "Compare failed", 412


class NotFile(EtcdError):
    code, message, status = 102, "Not a file", 403


class NotDir(EtcdError):
    code, message = 104, "Not a directory"


class NodeExists(EtcdError):
    code, message, status = 105, "Key already exists", 412


class RootReadOnly(EtcdError):
    code, message = 107, "Root is read only"


class DirNotEmpty(EtcdError):
    code, message, status = 108, "Directory not empty", 403


class Unauthorized(EtcdError):
    code, message, status = 110, "The request requires user authentication", 401


class PrevValueRequired(EtcdError):
    code, message = 201, "PrevValue is Required in POST form"


class TtlNotANumber(EtcdError):
    code, message = 202, "The given TTL in POST form is not a number"


class IndexNotANumber(EtcdError):
    code, message = 203, "The given index in POST form is not a number"


class InvalidField(EtcdError):
    code, message = 209, "Invalid field"


class InvalidForm(EtcdError):
    code, message = 210, "Invalid POST form"


class RefreshValue(EtcdError):
    code, message = 211, "Value provided on refresh"


class RefreshTtlRequired(EtcdError):
    code, message = 212, "A TTL must be provided on refresh"


class RaftInternal(EtcdError):
    """The request did not get through consensus: timeout, overload or stop."""

    code, message, status = 300, "Raft Internal Error", 500


class TooManyRequests(RaftInternal):
    """PROPOSALS_PENDING_MAX requests wait already; this one was not proposed."""

    status = 503


class RequestTimeout(RaftInternal):
    """No answer within the request timeout; the write may be applied later."""


class NoSpace(RaftInternal):
    """The disk of this member is full: the request changes nothing."""

    def __init__(self, cause: str = "", index: int = 0) -> None:
        super().__init__(f"etcdserver: {cause}; nothing was changed", index)


class ServerStopped(RaftInternal):
    """The member is stopping."""

    def __init__(self, cause: str = "etcdserver: server stopped", index: int = 0) -> None:
        super().__init__(cause, index)


class EventIndexCleared(EtcdError):
    code, message = 401, "The event in requested index is outdated and cleared"


class MemberError(Exception):
    """A membership change that the cluster refuses; the text is etcd's."""

    text = "etcdserver: membership error"

    def __str__(self) -> str:
        return self.text


class UnknownChange(MemberError):
    text = "etcdserver: unknown kind of membership change"


class MemberRemoved(MemberError):
    """The id was removed once and can never come back."""

    text = "etcdserver: ID removed"


class MemberExists(MemberError):
    text = "etcdserver: ID exists"


class MemberNotFound(MemberError):
    text = "etcdserver: ID not found"


class PeerUrlExists(MemberError):
    text = "etcdserver: peerURL exists"


class ReconfigurationRefused(MemberError):
    """Strict reconfiguration check: the change could lose the quorum."""

    counted = advice = ""

    def __init__(self, change: str, left: int, size: int) -> None:
        super().__init__()
        self.text += (
            f": {change} a member leaves {self.counted.format(left, size)}, and {size // 2 + 1} are"
            f" needed for a quorum; {self.advice}, and try again"
        )


class NotEnoughStarted(ReconfigurationRefused):
    """Too few members would have been started, as etcd 2.3 counts."""

    text = "etcdserver: re-configuration failed due to not enough started members"
    counted = "{} started of {} members"
    advice = "start the members that were added and not started yet, or remove those"


class NotEnoughActive(ReconfigurationRefused):
    """Too few members would be up, as etcd 3 counts."""

    text = "etcdserver: unhealthy cluster"
    counted = "{} of {} members that can be reached"
    advice = "start those that are down, or remove them first"


class ProposalDropped(Exception):
    """Raft cannot take the proposal now: no leader, too much uncommitted, or removed."""


class CodecError(ValueError):
    """Malformed bytes: wrong wire type, cut varint, length past the end."""


class WalError(Exception):
    """The write-ahead log cannot be read or opened; the text names the file and the remedy."""


class CrcMismatch(WalError):
    """A record's checksum is wrong in the middle of the log: damage, never repaired by guessing."""


class TornTail(WalError):
    """The last record is incomplete: a crash during a write.  Repairable."""


class FileLocked(WalError):
    """Another process holds the lock of the log."""


class DiskFull(WalError):
    """A file cannot grow.  The partial write was taken back, so the write may be repeated."""


class SnapshotError(Exception):
    """No usable snapshot, or one that does not fit the log."""


class DiscoveryError(Exception):
    """Joining by discovery failed; the text is etcd's."""


class StartError(Exception):
    """The member cannot start.  The text is one line with the remedy; exit code 1."""


class ClusterFull(StartError):
    """The discovery URL has all its members; this node may serve as a proxy of them."""


class InvariantError(Exception):
    """A bug: a state that must never exist.  The member ends rather than continue."""
