"""Errors: one class per error code of etcd, and those of the transport."""

from __future__ import annotations

from typing import Any, Callable, ClassVar, Dict, Mapping, NoReturn, Optional, Tuple, Type, TypeVar

_CODES_BY_STATUS = {401: 110, 404: 100}         # of answers without a code: members, auth


class EtcdError(Exception):
    """Root of everything this module raises about a server or the way to it.

    message        what went wrong, without the endpoint
    payload        the JSON of the error answer and its HTTP `status`; {} if there was no answer
    code           etcd's error code; 0 if the answer had none, or there was no answer
    index          etcd index at the time of the error
    status         HTTP status; 0 if there was no answer
    endpoint       base URL of the server that was asked
    maybe_applied  True if this was a write which may have been, or may yet be, applied

    python-etcd calls it EtcdException.
    """

    code = 0
    error_exceptions: ClassVar[Dict[int, Type[EtcdError]]] = {}     # by etcd's code; may be changed

    def __init__(
        self, message: Optional[str] = "", payload: Optional[Mapping[str, Any]] = None,
        cause: Any = "", *, code: Optional[int] = None, index: int = 0, status: int = 0,
        endpoint: str = "", maybe_applied: bool = False,
    ) -> None:
        super().__init__(message or "")
        self.message = message or ""
        self.payload: Dict[str, Any] = dict(payload or {})
        self.code = self.code if code is None else code
        self.index = index
        self.status = status
        self.endpoint = endpoint
        self.maybe_applied = maybe_applied
        self.others: Tuple[EtcdError, ...] = ()     # from the endpoints tried after this one
        self._cause = cause

    @property
    def cause(self) -> Any:
        """etcd's cause, usually the key; without an answer, the exception from below."""
        return self._cause or self.__cause__ or ""

    @cause.setter
    def cause(self, cause: Any) -> None:
        """Say what it was, as programs do that raise these errors themselves."""
        self._cause = cause

    @property
    def failures(self) -> Tuple[EtcdError, ...]:
        """One error per endpoint that was tried, in order; the first is this one."""
        return (self, *self.others)

    @classmethod
    def from_payload(
        cls, payload: Mapping[str, Any], *, endpoint: str = "", maybe_applied: bool = False,
    ) -> EtcdError:
        """Return the error that the JSON of an answer, with its HTTP `status`, stands for.

        The keys API tells by a code.  Members and auth tell by the status: 401 is Unauthorized,
        404 KeyNotFound, anything else HttpError.
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
        """Raise the error that the JSON of an answer stands for."""
        raise cls.from_payload(payload)

    def describe(self) -> str:
        """Return this error alone, as one line."""
        return f"{self.endpoint}: {self.message}" if self.endpoint else self.message

    def __str__(self) -> str:
        text = "; ".join(error.describe() for error in self.failures)
        return f"{text} (the write may have been applied)" if self.maybe_applied else text


class ApiError(EtcdError):
    """An error answer of the keys API; codes without a class of their own come as this one."""

    def describe(self) -> str:
        """Return code, message, cause and index in the form etcdctl prints them."""
        if not self._cause and not self.index:      # of the members or auth API, or our own
            return super().describe()
        return f"{self.code}: {self.message} ({self.cause}) [{self.index}]"


_ApiErrorType = TypeVar("_ApiErrorType", bound=Type[ApiError])


def _registered(code: int) -> Callable[[_ApiErrorType], _ApiErrorType]:
    """Make the decorated class the one raised for error `code`."""
    def register(error_class: _ApiErrorType) -> _ApiErrorType:
        error_class.code = code
        EtcdError.error_exceptions[code] = error_class
        return error_class
    return register


class EtcdKeyError(ApiError):
    """The tree does not allow it: there is no such key, or not of the kind that is needed."""


class EtcdValueError(ApiError, ValueError):
    """A value does not fit: an argument (raised before anything is sent), or one compared with."""


EtcdError.error_exceptions.update(dict.fromkeys((200, *range(204, 209)), EtcdValueError))


@_registered(100)
class KeyNotFound(EtcdKeyError, KeyError):
    """A path component does not exist; the cause is its path.  Also: no such user, role, member."""


@_registered(101)
class CompareFailed(EtcdValueError):
    """prev_value or prev_index does not hold; the cause shows given and stored."""


@_registered(102)
class NotFile(EtcdKeyError):
    """A directory stands where a file is needed."""


@_registered(104)
class NotDir(EtcdKeyError):
    """A file stands in the middle of the path."""


@_registered(105)
class NodeExists(EtcdKeyError):
    """create or mkdir found the key."""


@_registered(107)
class RootReadOnly(EtcdKeyError):
    """The root cannot be changed."""


@_registered(108)
class DirNotEmpty(EtcdValueError):
    """Deleting a directory with children, hidden ones included, needs recursive=True."""


@_registered(110)
class Unauthorized(ApiError):
    """Auth is enabled and the request lacks the right, or user and password are wrong."""


@_registered(201)
class PrevValueRequired(EtcdValueError):
    """prev_value was given, but empty."""


@_registered(202)
class TtlNotANumber(EtcdValueError):
    """ttl is not an unsigned integer."""


@_registered(203)
class IndexNotANumber(EtcdValueError):
    """prev_index or index is not an unsigned integer."""


@_registered(209)
class InvalidField(EtcdValueError):
    """A boolean parameter has another value, or does not fit the method."""


@_registered(210)
class InvalidForm(EtcdValueError):
    """The query or the body cannot be parsed, or is too large (10 MiB)."""


@_registered(211)
class RefreshValue(EtcdValueError):
    """A refresh came with a value."""


@_registered(212)
class RefreshTtlRequired(EtcdValueError):
    """A refresh came without a ttl."""


@_registered(300)
class RaftInternal(ApiError):
    """The request did not get through consensus in time; a write may be applied later."""


@_registered(301)
class LeaderElectionInProgress(ApiError):
    """There is no leader at the moment."""


@_registered(400)
class WatcherCleared(ApiError):
    """The member restored a snapshot, and its watchers with it."""


@_registered(401)
class EventIndexCleared(ApiError):
    """The index to watch from lies before the event history (1000 events)."""


class HttpError(EtcdError):
    """An error answer that is not one of the keys API: members, health, a proxy in between."""


class TransportError(EtcdError):
    """There was no usable answer."""


class ConnectionFailed(TransportError):
    """The connection could not be made, broke, or brought no answer.

    For a write, maybe_applied=False means that it was never made: the request was not sent.
    """


class RequestTimeout(ConnectionFailed):
    """The server did not answer in time."""


class WatchTimeout(RequestTimeout):
    """No event came in time; `index` is where the next watch must begin to miss none."""


class BadReply(TransportError):
    """The answer is not what etcd would say: garbage, cut short, or redirected for ever."""


class ClusterIdChanged(TransportError):
    """The answer comes from another cluster than earlier ones.

    A write was applied there.  Set `client.cluster_id = None` to accept the next cluster seen.
    """


class Cancelled(EtcdError):
    """Somebody cancelled the Scope of this wait, or closed its client.

    maybe_applied=True: a write had been sent.
    """


class LockExpired(EtcdError):
    """The key of a lock was gone while its holder still waited for it or relied on it."""


# What python-etcd calls them.
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
