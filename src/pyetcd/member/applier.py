"""The applier: committed entries change store and cluster; peers' entries are inspected before.

Deterministic: every member gets the same result from the same entry.  Only the shown ttl
depends on the clock.
"""

from __future__ import annotations

import re
from typing import IO, Callable, Dict, Generator, Optional, Union

from ..base.basics import clean_path
from ..base.codec import (
    LONG_REQUEST_BYTES,
    STEP_BYTES,
    STEP_ENTRIES,
    Buffer,
    decode_conf_change,
    decode_fields,
    decode_long_request,
    decode_request,
    decode_request_head,
)
from ..base.errors import CodecError, EtcdError, MemberError, RaftInternal, UnknownChange
from ..base.limits import PATH_COST_MAX
from ..base.messages import ConfChange, ConfChangeType, Entry, EntryType, Message, MsgType, Request
from ..base.text import load_json, utf8
from ..base.urls import check_advertised_url
from ..base.versions import DEFAULT_IDENTITY, Identity
from ..disk.v3_data import empty_database, holds_v3_data
from ..peer.compatibility import MessageInspector
from ..store.events import Event
from ..store.tree import Store, StoreState
from .cluster import SERVER_LOG, Cluster, format_id, parse_member

_ATTRIBUTES_PATH = re.compile(r"/0/members/([0-9a-fA-F]{1,16})/attributes")
_VERSION_VALUE = re.compile(r"[0-9]{1,9}\.[0-9]{1,9}\.[0-9]{1,9}")

_V3_FIELDS_WITHOUT_DATA = {1, 10, 100}  # of InternalRaftRequest: id, alarm, header

Applied = Union[Event, EtcdError, None]


class Applier:
    """Turns requests into changes of the store, and conf changes into changes of the cluster.

    clock  returns unix nanoseconds, for the ttl that is shown; never for what expires
    """

    def __init__(
        self, store: Store, cluster: Cluster, local_id: int, clock: Callable[[], int],
    ) -> None:
        self.clock = clock
        self.v3_entries = 0             # skipped so far
        self.auth_changes = 0           # times that something below /2 may have changed
        self._store = store
        self._cluster = cluster
        self._long: Optional[Entry] = None      # the entry that prepare() is decoding
        self._steps: Generator[None, None, Optional[Request]] = decode_long_request(b"")
        cluster.local_id = local_id

    def prepare(self, entry: Entry) -> bool:
        """Decode a slice of a long entry; True when all of it is decoded.  10 MB: 40-500 ms."""
        if self._long is not entry:
            self._long, self._steps = entry, decode_long_request(entry.data)
        try:
            next(self._steps)
            return False
        except StopIteration as end:
            request: Optional[Request] = end.value
            if request is not None and request.path.startswith("/1/"):
                entry.request = _with_clean_path(request)
        except CodecError:              # apply_entry() logs it
            pass
        self._long = None
        return True

    def apply_entry(self, entry: Entry) -> Applied:
        """Apply a normal entry, and leave its request in entry.request.

        Returns None for a leader's first entry, operations of etcd 3's API, and garbage.
        """
        request = entry.request
        if request is None:
            if not entry.data:
                return None
            try:
                request = entry.request = read_command(entry.data)
            except CodecError as error:     # in a log from before check_entry(); etcd exits here
                SERVER_LOG.error("ignored entry %d: %s", entry.index, error)
                return None
            if request is None:
                self._skip_v3(entry)
                return None
        return self.apply_request(request)

    def _skip_v3(self, entry: Entry) -> None:
        self.v3_entries += 1
        if not {number for number, _, _ in decode_fields(entry.data)} <= _V3_FIELDS_WITHOUT_DATA:
            self._cluster.v3_mark.set(f"entry {entry.index} of the log")

    def apply_request(self, request: Request) -> Applied:
        """Execute one command; errors of the store are returned, not raised."""
        path = request.path
        handler = _METHODS.get(request.method)
        if path.startswith("/2"):
            # Only here etcd proposes paths that its store has to clean: `/2/users/`.
            request = request._replace(path=clean_path(path))
            self.auth_changes += 1
        if handler is None:
            return RaftInternal(f"etcdserver: unknown method {request.method}")
        try:
            return handler(self, request)
        except EtcdError as error:
            return error.with_traceback(None)       # its frames hold the request

    def _put(self, r: Request) -> Applied:
        store, now_ns = self._store, self.clock()
        if r.prev_exist is None:
            if not r.prev_index and not r.prev_value:
                if r.path.startswith("/0/") and not self._note_cluster(r):
                    return None
                return store.set(
                    r.path, dir=r.dir, value=r.val, expires_ns=r.expiration,
                    refresh=bool(r.refresh), now_ns=now_ns,
                )
        elif not r.prev_exist:
            return store.create(
                r.path, dir=r.dir, value=r.val, expires_ns=r.expiration, now_ns=now_ns
            )
        elif not r.prev_index and not r.prev_value:
            return store.update(
                r.path, value=r.val, expires_ns=r.expiration, refresh=bool(r.refresh),
                now_ns=now_ns,
            )
        return store.compare_and_swap(
            r.path, prev_value=r.prev_value, prev_index=r.prev_index, value=r.val,
            expires_ns=r.expiration, refresh=bool(r.refresh), now_ns=now_ns,
        )

    def _post(self, r: Request) -> Applied:
        return self._store.create(
            r.path, dir=r.dir, value=r.val, unique=True, expires_ns=r.expiration,
            now_ns=self.clock(),
        )

    def _delete(self, r: Request) -> Applied:
        if r.prev_index or r.prev_value:
            return self._store.compare_and_delete(
                r.path, prev_value=r.prev_value, prev_index=r.prev_index, now_ns=self.clock()
            )
        return self._store.delete(r.path, dir=r.dir, recursive=r.recursive, now_ns=self.clock())

    def _get(self, r: Request) -> Applied:
        return self._store.get(r.path, recursive=r.recursive, now_ns=self.clock())

    def _sync(self, r: Request) -> Applied:
        self._store.expire(r.time)
        return None

    def _note_cluster(self, r: Request) -> bool:
        """Note a member's attributes or the cluster version; False if the store stays as it is."""
        match = _ATTRIBUTES_PATH.fullmatch(r.path)
        if match is not None:
            return self._note_attributes(int(match.group(1), 16), r.val)
        if r.path == "/0/version":
            if not _VERSION_VALUE.fullmatch(r.val):
                SERVER_LOG.error("ignored a cluster version that is none: %s", r.val)
                return False            # etcd exits here
            self._cluster.set_version(r.val)
        return True

    def _note_attributes(self, id: int, value: str) -> bool:
        if not self._cluster.is_known(id):
            if not self._cluster.is_removed(id):    # etcd exits here; the store alone is harmless
                SERVER_LOG.warning("ignored the attributes of unknown member %s", format_id(id))
            return False
        try:
            member = parse_member(utf8(value), id)
        except CodecError as error:     # etcd exits here
            SERVER_LOG.error("ignored attributes: %s", error)
            return False
        self._cluster.update_attributes(member)
        return True

    def apply_conf_change(self, change: ConfChange) -> Optional[MemberError]:
        """Change the cluster, or return the reason against it; then Raft must not change either."""
        try:
            self._change_cluster(change)
        except MemberError as error:
            return error.with_traceback(None)       # its frames hold the request
        except (CodecError, EtcdError) as error:        # etcd exits here
            SERVER_LOG.error("ignored a change of members: %s", error)
            return UnknownChange()
        return None

    def _change_cluster(self, change: ConfChange) -> None:
        member = self._cluster.validate_change(change)
        now_ns = self.clock()
        if member is None:
            self._cluster.remove(change.node_id, now_ns=now_ns)
        elif self._cluster.is_known(change.node_id):    # new peer URLs, or a learner's vote
            self._cluster.update_raft_attributes(member, now_ns=now_ns)
        else:
            self._cluster.add(member, now_ns=now_ns)


_METHODS: Dict[str, Callable[[Applier, Request], Applied]] = {
    "PUT": Applier._put,
    "POST": Applier._post,
    "DELETE": Applier._delete,
    "QGET": Applier._get,
    "SYNC": Applier._sync,
}


# -- inspection of entries -----------------------------------------------------


def read_command(data: Buffer) -> Optional[Request]:
    """Decode a request as UTF-8, with a clean path as in etcd's store.  Raises CodecError."""
    request = decode_request(data)
    if request is None:
        return None
    path = request.path
    if path.startswith("/1/") and "//" not in path and "/." not in path and path[-1] != "/":
        if path.isascii() and request.val.isascii() and request.prev_value.isascii():
            return request              # as most are: these lines save 1 us
    return _with_clean_path(request.as_unicode())


def _with_clean_path(request: Request) -> Request:
    path = clean_path(request.path)
    return request if path == request.path else request._replace(path=path)


def read_change(entry: Entry) -> ConfChange:
    """Return the change in an entry; one of unknown type for garbage from before check_entry()."""
    try:
        return decode_conf_change(entry.data)
    except CodecError as error:         # etcd exits here
        SERVER_LOG.error("ignored entry %d: %s", entry.index, error)
        return ConfChange(type=-1)


def check_entry(
    entry: Entry, identity: Identity = DEFAULT_IDENTITY, *, is_proposal: bool = False
) -> None:
    """Raise CodecError for an entry whose application would fail here, or at the next start.

    The command of a normal entry stays in entry.request, so that it is decoded once.

    is_proposal  also refuse what the API of a member refuses: an entry in a leader's log must be
                 accepted, as other members have it already
    """
    if entry.type == EntryType.CONF_CHANGE:
        _check_change(entry.data, is_proposal)
    elif entry.type:
        raise CodecError(f"an entry of unknown type {entry.type}")
    elif len(entry.data) > LONG_REQUEST_BYTES:      # see Applier.prepare()
        request = decode_request_head(entry.data)
        if request is not None:
            request = _with_clean_path(request.as_unicode())
            if request.path.startswith("/0/"):
                raise CodecError(f"{len(entry.data)} bytes below /0")
            _check_path(request, identity)
    elif entry.data:
        request = entry.request = read_command(entry.data)
        if request is not None:
            _check_path(request, identity)


_PATH_CHARS_CHEAP = 4_096               # of a key; up to here no number of elements is costly


def _check_path(request: Request, identity: Identity) -> None:
    path = request.path
    if not path.startswith("/1/"):
        _check_own_path(request, identity)
    if len(path) > _PATH_CHARS_CHEAP and len(path) * path.count("/") > PATH_COST_MAX:
        raise CodecError(f"a key of {path.count('/')} path elements")


def _check_own_path(request: Request, identity: Identity) -> None:
    """Raise CodecError for a write below /0 other than members' attributes and the version."""
    path, value = request.path, request.val
    if request.method == "QGET" or not (path + "/").startswith("/0/"):
        return
    if request.method == "PUT" and _ATTRIBUTES_PATH.fullmatch(path):
        return
    if request.method != "PUT" or path != "/0/version":
        raise CodecError(f"a {request.method} of {path[:100]}, which belongs to the cluster")
    if _VERSION_VALUE.fullmatch(value) and not identity.bears(value):
        raise CodecError(f"cluster version {value} is newer than this program")


def _check_change(data: bytes, is_proposal: bool) -> None:
    change = decode_conf_change(data)
    if not data or not change.node_id:
        raise CodecError("a change of no member")
    if change.type not in (ConfChangeType.ADD_NODE, ConfChangeType.UPDATE_NODE):
        return
    context = change.context or b"{}"
    member = parse_member(context, change.node_id)
    if load_json(context).get("id", change.node_id) != change.node_id:
        raise CodecError(f"a change of member {change.node_id:x} that speaks of another one")
    try:
        if is_proposal and not list(map(check_advertised_url, member.peer_urls)):
            raise ValueError("no peer URL")
    except ValueError as error:
        raise CodecError(f"a change of member {change.node_id:x}: {error}") from None


class MemberInspector(MessageInspector):
    """Refuses messages that would be fatal when applied, or make our log unreadable."""

    def __init__(self, cluster: Cluster, fault: Callable[[Message], str]) -> None:
        self._cluster = cluster
        self._fault = fault             # by the rules of Raft alone

    def inspect(self, message: Message) -> Generator[None, None, str]:
        """Return, in steps, the reason against stepping `message`; "": none."""
        if message.type == MsgType.PROP and message.sender not in self._cluster.members:
            return "its sender is no member, and may propose nothing"
        if message.type == MsgType.SNAP and not (message.snapshot and message.snapshot.state):
            return "nobody has read the snapshot in it"
        fault, work, entries = self._fault(message), 0, message.entries
        if fault or not entries or message.type not in (MsgType.APP, MsgType.PROP):
            return fault
        identity, is_proposal = self._cluster.identity, message.type == MsgType.PROP
        try:
            for entry in entries:
                check_entry(entry, identity, is_proposal=is_proposal)
                work += STEP_BYTES // STEP_ENTRIES + len(entry.data)
                if work > STEP_BYTES:
                    work = 0
                    yield
        except CodecError as error:
            return str(error)
        return ""

    def read_state(self, data: Buffer) -> StoreState:
        """Return the state in a snapshot.  Raises ValueError if the store cannot become it."""
        state = StoreState.read(data)
        if state.version and not self._cluster.identity.bears(state.version):
            raise ValueError(f"cluster version {state.version} is newer than this program")
        return state

    def has_v3_data(self, database: IO[bytes]) -> bool:
        return holds_v3_data(database)

    def note_v3_data(self) -> None:
        self._cluster.v3_mark.set("a snapshot of the leader")

    def needs_v3_data(self, member_id: int) -> bool:
        """Where there is v3 data, every member of etcd needs it: only pyetcd publishes features."""
        member = self._cluster.members.get(member_id)
        return self._cluster.v3_mark.is_set and not (member and member.features)

    def empty_database(self, raft_index: int) -> bytes:
        return empty_database(raft_index)
