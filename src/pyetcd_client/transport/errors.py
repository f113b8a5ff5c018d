"""Errors: a class for each error code that programs handle, and those of the transport."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NoReturn

_CODES_BY_STATUS = {401: 110, 404: 100}         # the members and auth APIs send no code


class EtcdError(Exception):
    """Root of all errors about a server or the connection to it.

    message        description without the endpoint
    payload        JSON of the error reply and its HTTP `status`; {} without a reply
    code           etcd's error code; 0 without a code or without a reply
    index          etcd index at the time of the error
    status         HTTP status; 0 without a reply
    endpoint       base URL of the server
    maybe_applied  True if the request was a write that was, or may yet be, applied
    """

    code = 0
    error_exceptions: ClassVar[dict[int, type[EtcdError]]] = {}     # by code; programs may add

    def __init_subclass__(cls, code: int = 0) -> None:
        if code:
            cls.code = code
            cls.error_exceptions[code] = cls

    def __init__(self, message: str | None = "", payload: Mapping[str, Any] | None = None,
                 cause: Any = "", *, code: int | None = None, index: int = 0, status: int = 0,
                 endpoint: str = "", maybe_applied: bool = False) -> None:
        super().__init__(message or "")
        self.message = message or ""
        self.payload: dict[str, Any] = dict(payload or {})
        self.code = self.code if code is None else code
        self.index = index
        self.status = status
        self.endpoint = endpoint
        self.maybe_applied = maybe_applied
        self.others: tuple[EtcdError, ...] = ()     # of the endpoints tried after this one
        self._cause = cause

    @property
    def cause(self) -> Any:
        """etcd's cause, usually the key; without a reply, the underlying exception."""
        return self._cause or self.__cause__ or ""

    @cause.setter
    def cause(self, cause: Any) -> None:
        self._cause = cause

    @property
    def failures(self) -> tuple[EtcdError, ...]:
        """One error for each endpoint that was tried, in order; the first is this one."""
        return (self, *self.others)

    @classmethod
    def from_payload(cls, payload: Mapping[str, Any], *, endpoint: str = "",
                     maybe_applied: bool = False) -> EtcdError:
        """Return the error for the JSON of an error reply and its HTTP `status`.

        Only the keys API sends a code.  Without one the status decides: 401 is Unauthorized, 404
        KeyNotFound, all others HttpError.
        """
        status, message = payload.get("status", 0), str(payload.get("message", ""))
        code, index = payload.get("errorCode"), payload.get("index")
        if not isinstance(code, int):
            code = _CODES_BY_STATUS.get(status, 0)
        error_class = cls.error_exceptions.get(code, ApiError if code else HttpError)
        return error_class(
            message or f"HTTP status {status}", payload, str(payload.get("cause", "")),
            code=code, index=index if isinstance(index, int) else 0, status=status,
            endpoint=endpoint, maybe_applied=maybe_applied)

    @classmethod
    def handle(cls, payload: Mapping[str, Any]) -> NoReturn:
        """Raise the error for the JSON of an error reply."""
        raise cls.from_payload(payload)

    def describe(self) -> str:
        """Return this error as one line, without those of other endpoints."""
        return f"{self.endpoint}: {self.message}" if self.endpoint else self.message

    def __str__(self) -> str:
        text = "; ".join(error.describe() for error in self.failures)
        return f"{text} (the write may have been applied)" if self.maybe_applied else text


class ApiError(EtcdError):
    """An error reply of the keys API; also the class for codes that have none of their own."""

    def describe(self) -> str:
        """Return code, message, cause and index in the form of etcdctl."""
        if not self._cause and not self.index:      # of the members or auth API, or of the client
            return super().describe()
        return f"{self.code}: {self.message} ({self.cause}) [{self.index}]"


class EtcdKeyError(ApiError):
    """The tree does not allow the operation: the key is missing, or is of the wrong kind."""


class EtcdValueError(ApiError, ValueError):
    """An argument is invalid (raised before anything is sent), or a comparison failed.

    Also the class for the codes 200 and 204 to 208, malformed fields; `code` tells them apart.
    """


EtcdError.error_exceptions.update(dict.fromkeys((200, *range(204, 209)), EtcdValueError))


class KeyNotFound(EtcdKeyError, KeyError, code=100):
    """A path component is missing (the cause is its path), or a user, role or member."""


class CompareFailed(EtcdValueError, code=101):
    """prev_value or prev_index does not match; the cause shows the given and the stored value."""


class NotFile(EtcdKeyError, code=102):
    """The key is a directory; the operation needs a file."""


class NotDir(EtcdKeyError, code=104):
    """A path component is a file; the operation needs a directory."""


class NodeExists(EtcdKeyError, code=105):
    """create or mkdir found the key."""


class RootReadOnly(EtcdKeyError, code=107):
    """The root cannot be changed."""


class DirNotEmpty(EtcdValueError, code=108):
    """Deleting a directory with children, hidden ones included, needs recursive=True."""


class Unauthorized(ApiError, code=110):
    """Auth is enabled and the user lacks the right, or user and password are wrong."""


class PrevValueRequired(EtcdValueError, code=201):
    """prev_value is empty."""


class TtlNotANumber(EtcdValueError, code=202):
    """ttl is not an unsigned integer."""


class IndexNotANumber(EtcdValueError, code=203):
    """prev_index or index is not an unsigned integer."""


class InvalidField(EtcdValueError, code=209):
    """A boolean parameter has another value, or does not fit the method."""


class InvalidForm(EtcdValueError, code=210):
    """The query or the body cannot be parsed, or is too large (10 MiB)."""


class RefreshValue(EtcdValueError, code=211):
    """A refresh must not have a value."""


class RefreshTtlRequired(EtcdValueError, code=212):
    """A refresh needs a ttl."""


class RaftInternal(ApiError, code=300):
    """The request found no consensus in time; a write may be applied later."""


class LeaderElectionInProgress(ApiError, code=301):
    """The cluster has no leader at the moment."""


class WatcherCleared(ApiError, code=400):
    """The member restored a snapshot and dropped its watchers."""


class EventIndexCleared(ApiError, code=401):
    """The index to watch from is older than the event history (1000 events)."""


class HttpError(EtcdError):
    """An error reply outside the keys API: of members, health, or a proxy in between."""


class TransportError(EtcdError):
    """There was no usable reply."""


class ConnectionFailed(TransportError):
    """The connection could not be made, broke, or brought no reply.

    For a write, maybe_applied=False means that the request was not sent.
    """


class RequestTimeout(ConnectionFailed):
    """The server did not reply in time."""


class WatchTimeout(RequestTimeout):
    """No event arrived in time; the next watch must begin at `index` to miss none."""


class BadReply(TransportError):
    """The reply is not etcd's: malformed, truncated, or an endless redirect."""


class ClusterIdChanged(TransportError):
    """The reply comes from another cluster than earlier ones.

    A write was applied there.  Set `client.cluster_id = None` to accept the next cluster.
    """


class Cancelled(EtcdError):
    """The Scope was cancelled, or the client closed; maybe_applied: a write had been sent."""


class LockExpired(EtcdError):
    """The entry of a lock disappeared while its owner waited for the lock or held it."""


# The names of python-etcd.
EtcdException = EtcdError
EtcdKeyNotFound = KeyNotFound
EtcdCompareFailed = CompareFailed
EtcdNotFile = NotFile
EtcdNotDir = NotDir
EtcdAlreadyExist = NodeExists
EtcdRootReadOnly = RootReadOnly
EtcdDirNotEmpty = DirNotEmpty
EtcdInsufficientPermissions = Unauthorized
EtcdLeaderElectionInProgress = LeaderElectionInProgress
EtcdWatcherCleared = WatcherCleared
EtcdEventIndexCleared = EventIndexCleared
EtcdConnectionFailed = ConnectionFailed
EtcdWatchTimedOut = WatchTimeout
EtcdClusterIdChanged = ClusterIdChanged
EtcdLockExpired = LockExpired
