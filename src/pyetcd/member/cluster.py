"""The cluster: its members, which stand in the store below /0, as in etcd."""

from __future__ import annotations

import hashlib
import re
from typing import Callable, Dict, Iterable, List, Mapping, NamedTuple, Optional, Set, Tuple

from ..base.errors import (
    CodecError,
    InvariantError,
    MemberExists,
    MemberNotFound,
    MemberRemoved,
    NotEnoughActive,
    NotEnoughStarted,
    PeerUrlExists,
    UnknownChange,
)
from ..base.ids import package_logger
from ..base.messages import ConfChange, ConfChangeType
from ..base.text import as_unicode, go_quote, json_text, load_json, utf8
from ..base.urls import check_url
from ..base.versions import DEFAULT_IDENTITY, IDENTITIES, version_key
from ..disk.v3_data import V3Mark
from ..store.tree import Store

SERVER_LOG = package_logger("etcdserver")

_KNOWN_CHANGES = frozenset(map(int, ConfChangeType))
FEATURE_PRE_VOTE = "prevote"        # answers MsgPreVote (3.x)
FEATURE_READ_INDEX = "readindex"    # answers MsgReadIndex, returns the context of heartbeats
FEATURES = (FEATURE_PRE_VOTE, FEATURE_READ_INDEX)   # that this program publishes


class Member(NamedTuple):
    """One member as the cluster knows it; peer_urls are sorted."""

    id: int
    peer_urls: Tuple[str, ...]
    name: str = ""                      # "" until it has published itself
    client_urls: Tuple[str, ...] = ()
    features: Tuple[str, ...] = ()      # beyond etcd 2.3; published, and ignored by etcd
    is_learner: bool = False            # of etcd 3.4: gets the log, and has no vote yet

    @property
    def started(self) -> bool:
        return bool(self.name)

    def context_json(self) -> str:
        """Return the JSON of conf changes and of the peers' /members: decimal id, no empty part."""
        fields: Dict[str, object] = {"id": self.id, "peerURLs": self.peer_urls}
        if self.name:
            fields["name"] = self.name
        if self.client_urls:
            fields["clientURLs"] = self.client_urls
        return json_text(fields)

    def client_json(self) -> str:
        """Return the JSON of /v2/members: hexadecimal id, all parts."""
        return json_text({
            "id": format_id(self.id), "name": self.name, "peerURLs": self.peer_urls,
            "clientURLs": self.client_urls,
        })

    def attributes_json(self) -> str:
        features = {"features": self.features} if self.features else {}
        return json_text({"name": self.name, "clientURLs": self.client_urls, **features})

    def raft_attributes_json(self) -> str:
        learner = {"isLearner": True} if self.is_learner else {}
        return json_text({"peerURLs": self.peer_urls, **learner})


def format_id(id: int) -> str:
    """Return the hexadecimal text of a member or cluster id, not padded, as in etcd."""
    return f"{id:x}"


def _hash_id(data: bytes) -> int:
    return int.from_bytes(hashlib.sha1(data).digest()[:8], "big")


def member_id(peer_urls: Iterable[str], token: str) -> int:
    """Return the id of a member: SHA-1 of its peer URLs and the cluster token.

    The token is the whole URL with `discovery`, and the unix seconds for a member added at run
    time.  Source: etcd 2.3 etcdserver/member.go.
    """
    return _hash_id(utf8("".join(sorted(peer_urls)) + token))


def cluster_id(member_ids: Iterable[int]) -> int:
    """Return the id of a cluster: SHA-1 of its initial members' ids, ascending."""
    return _hash_id(b"".join(id.to_bytes(8, "big") for id in sorted(member_ids)))


def parse_initial_cluster(text: str, *, nameless: bool = False) -> Dict[str, Tuple[str, ...]]:
    """Return name -> sorted peer URLs of `name=url,name=url`; a name may repeat.

    nameless  take `=url` too, named `=url`, as no member can be: a member of a running cluster
              has no name before its first start

    Raises ValueError in etcd's words.
    """
    urls: Dict[str, List[str]] = {}
    for piece in filter(None, (part.strip() for part in text.split(","))):
        name, _, url = piece.partition("=")
        if not url:
            raise ValueError(f"Empty URL given for {go_quote(name)} in {piece!r}: write name=url")
        if not name and not nameless:
            raise ValueError(f"Empty name given for {url} in {piece!r}: write name=url; perhaps a"
                             f" variable was empty")
        urls.setdefault(name or piece, []).append(check_url(url))
    return {name: tuple(sorted(found)) for name, found in urls.items()}


def format_initial_cluster(initial: Mapping[str, Iterable[str]]) -> str:
    return ",".join(sorted(
        f"{name.partition('=')[0]}={url}" for name, urls in initial.items() for url in urls
    ))


class Cluster:
    """The members, kept below /0 of the store, where every member has the same ones.

    Changed only by applied entries and by snapshots.  Until the first of them, the members are
    those of the flags.  Thread: reactor.  Source: etcd 2.3 etcdserver/cluster.go.
    """

    def __init__(self, store: Optional[Store] = None) -> None:
        self.store = Store() if store is None else store
        self.id = 0
        self.local_id = 0                           # the log calls it "local member"
        self.members: Dict[int, Member] = {}
        self.removed: Set[int] = set()              # ids that can never come back
        self.version: Optional[str] = None          # "2.3.0"; None: not decided yet
        self.identity = DEFAULT_IDENTITY            # of this member; set before it starts
        self.v3_mark = V3Mark()                     # of data that this member does not keep
        self.was_lowered = False                    # the version: snapshots must be newer

    @classmethod
    def from_initial(cls, token: str, initial: Mapping[str, Iterable[str]]) -> Cluster:
        """Return a new cluster of the members in `initial`.  Raises ValueError if ids collide."""
        cluster = cls()
        for name, urls in initial.items():
            id = member_id(urls, token)
            if id in cluster.members or not id:
                raise ValueError(f"member exists with identical ID {format_id(id)}")
            cluster.members[id] = Member(id, tuple(sorted(urls)), name)
        cluster.id = cluster_id(cluster.members)
        return cluster

    def recover(self) -> None:
        """Read everything from the store again: a snapshot has replaced it."""
        members = map(self._read_member, self._ids("/0/members"))
        self.members = {member.id: member for member in members}
        self.removed = {int(name, 16) for name in self._ids("/0/removed_members")}
        self.version = self.store.value("/0/version")
        if self.version:
            self._check_version(self.version)
        for member in sorted(self.members.values()):
            self._log("added", member, "to", " from store")
        if self.version:
            SERVER_LOG.info(
                "set the cluster version to %s from store", self.version.rpartition(".")[0]
            )

    def _ids(self, path: str) -> List[str]:
        """Return the names below `path` that are ids; no others belong there."""
        children = self.store.children(path)
        return [name for name, _ in children if re.fullmatch("[0-9a-f]{1,16}", name)]

    def _read_member(self, name: str) -> Member:
        path = f"/0/members/{name}"
        id = int(name, 16)
        parts = (self.store.value(path + "/raftAttributes"), self.store.value(path + "/attributes"))
        try:
            raft, attributes = (parse_member(utf8(part or "{}"), id) for part in parts)
        except CodecError as error:
            SERVER_LOG.error("member %s is damaged: %s", name, error)
            return Member(id, ())
        return attributes._replace(peer_urls=raft.peer_urls, is_learner=raft.is_learner)

    def all_have(self, feature: str) -> bool:
        return all(feature in member.features for member in self.members.values())

    def member_by_name(self, name: str) -> Optional[Member]:
        return next((m for m in self.members.values() if m.name == name), None)

    def is_removed(self, id: int) -> bool:
        return id in self.removed

    def is_known(self, id: int) -> bool:
        """True if the store has the member; `members` has those of the flags, too."""
        return bool(self.store.children(f"/0/members/{format_id(id)}"))

    def client_urls(self) -> List[str]:
        return [url for member in self.members.values() for url in member.client_urls]

    def peer_urls(self) -> List[str]:
        return [url for member in self.members.values() for url in member.peer_urls]

    # -- changes -----------------------------------------------------------

    def validate_change(self, change: ConfChange) -> Optional[Member]:
        """Return the member in an add or update, None for a removal.  Raises MemberError.

        The applied state alone decides, so every member decides alike.
        """
        id = change.node_id
        if change.type not in _KNOWN_CHANGES:
            raise UnknownChange()       # of a newer etcd; 2.3 exits here
        if id in self.removed:
            raise MemberRemoved()
        known = self.is_known(id)
        adds = change.type in (ConfChangeType.ADD_NODE, ConfChangeType.ADD_LEARNER)
        context = change.context or b"{}"
        member = parse_member(context, id)
        if adds and load_json(context).get("isPromote"):
            learner = self._read_member(format_id(id))
            if not learner.is_learner:
                raise MemberNotFound()  # 3.4 has another error for one that votes already
            return learner._replace(is_learner=False)
        if adds and known:
            raise MemberExists()
        if not adds and not known:
            raise MemberNotFound()
        if change.type == ConfChangeType.REMOVE_NODE:
            return None
        for other in self._ids("/0/members"):
            if int(other, 16) != id:
                if set(self._read_member(other).peer_urls) & set(member.peer_urls):
                    raise PeerUrlExists()
        return member

    def add(self, member: Member, *, now_ns: int = 0) -> None:
        """Apply: a member joins.  One store index."""
        path = f"/0/members/{format_id(member.id)}/raftAttributes"
        self.store.create(path, value=member.raft_attributes_json(), now_ns=now_ns)
        if not member.name and member.id in self.members:
            member = self.members[member.id]._replace(peer_urls=member.peer_urls)
        self.members[member.id] = member
        self._log("added", member, "to")
        if member.is_learner:
            SERVER_LOG.warning(
                "member %s is a learner, which gets the log from a leader of etcd only: let a"
                " member of etcd lead, or remove it and add it without --learner",
                format_id(member.id))

    def remove(self, id: int, *, now_ns: int = 0) -> None:
        """Apply: a member leaves, and its id can never come back.  Two store indexes."""
        path = f"/0/members/{format_id(id)}"
        self.store.delete(path, dir=True, recursive=True, now_ns=now_ns)
        self.store.create(f"/0/removed_members/{format_id(id)}", now_ns=now_ns)
        self.members.pop(id, None)
        self.removed.add(id)
        SERVER_LOG.info("removed member %s from cluster %s", format_id(id), format_id(self.id))

    def update_raft_attributes(self, changed: Member, *, now_ns: int = 0) -> None:
        """Apply: a member has new peer URLs, or a vote.  One store index."""
        id = changed.id
        member = self.members[id]._replace(
            peer_urls=changed.peer_urls, is_learner=changed.is_learner)
        path = f"/0/members/{format_id(id)}/raftAttributes"
        self.store.update(path, value=member.raft_attributes_json(), now_ns=now_ns)
        self.members[id] = member
        self._log("update", member, "in")

    def update_attributes(self, published: Member) -> None:
        """Apply: a member has published itself (the store is written by the Applier)."""
        known = self.members.get(published.id) or published
        self.members[published.id] = published._replace(
            peer_urls=known.peer_urls, is_learner=known.is_learner)

    def set_version(self, version: str) -> None:
        """Apply the cluster version (the Applier writes the store).  Raises InvariantError."""
        self._check_version(version)
        short = version.rpartition(".")[0]
        if self.version is None:
            SERVER_LOG.info("set the initial cluster version to %s", short)
        elif self.version != version:
            self.was_lowered = version_key(version) < version_key(self.version)
            SERVER_LOG.info(
                "updated the cluster version from %s to %s", self.version.rpartition(".")[0], short
            )
        self.version = version

    def _check_version(self, version: str) -> None:
        if not self.identity.bears(version):
            able = [name for name, identity in IDENTITIES.items() if identity.bears(version)]
            hint = f", or start this one with -compat-version {able[0]}" if able else ""
            raise InvariantError(
                f"cluster cannot be downgraded (current version: {self.identity.server} is lower"
                f" than determined cluster version: {version.rpartition('.')[0]}). Run a program"
                f" that is at least as new as the cluster{hint}"
            )

    # -- strict reconfiguration check ----------------------------------------

    def check_strict(self, change_type: ConfChangeType, id: int) -> None:
        """Raise NotEnoughStarted if a change could leave too few started members for a quorum."""
        members = self.members.values()
        if change_type == ConfChangeType.ADD_NODE:
            what, size = "add", len(members) + 1
            started = sum(member.started for member in members)
            if started == 1 and size == 2:      # a cluster of one must be able to grow
                return
        elif change_type == ConfChangeType.REMOVE_NODE:
            rest = [member for member in members if member.id != id]
            what, size, started = "remove", len(rest), sum(member.started for member in rest)
        else:
            return
        if started < size // 2 + 1:
            SERVER_LOG.warning(
                "Reject %s member request: the number of started member (%d) will be less than"
                " the quorum number of the cluster (%d)", what, started, size // 2 + 1,
            )
            raise NotEnoughStarted({"add": "adding", "remove": "removing"}[what], started, size)

    def check_active(
        self, change_type: ConfChangeType, id: int, active_since: Callable[[int], float]
    ) -> None:
        """Raise NotEnoughActive if a change leaves too few reachable members for a quorum.

        A member that is down may always be removed.  Source: etcd 3 server.go, mayRemoveMember.
        Differs from it: active now is enough, it needs no 5 s, and one more may be added while
        others are down if all that are up will be a quorum.
        """
        active = {each for each in self.members if each == self.local_id or active_since(each) > 0}
        if change_type == ConfChangeType.ADD_NODE:
            what, left, size = "adding", len(active), len(self.members) + 1
            is_risky = size > 2             # a cluster of one must be able to grow
        else:
            what, left, size = "removing", len(active) - 1, len(self.members) - 1
            is_risky = change_type == ConfChangeType.REMOVE_NODE and id in active
        if is_risky and left < size // 2 + 1:
            SERVER_LOG.warning(
                "not healthy for reconfigure: %s a member leaves %d of %d active", what, left, size
            )
            raise NotEnoughActive(what, left, size)

    def _log(self, verb: str, member: Member, preposition: str, source: str = "") -> None:
        local = "local " if member.id == self.local_id else ""
        SERVER_LOG.info(
            "%s %smember %s [%s] %s cluster %s%s", verb, local, format_id(member.id),
            " ".join(member.peer_urls), preposition, format_id(self.id), source,
        )


def parse_member(context: bytes, id: int) -> Member:
    """Return the member in a conf change's context; missing parts are empty.  Raises CodecError."""
    try:
        fields = load_json(context)
        name = as_unicode(str(fields.get("name") or ""))
        urls, clients, features = (
            tuple(as_unicode(str(text)) for text in fields.get(part) or ())
            for part in ("peerURLs", "clientURLs", "features")
        )
        is_learner = fields.get("isLearner") is True
        return Member(id, tuple(sorted(urls)), name, clients, features, is_learner)
    except (ValueError, AttributeError, TypeError):
        raise CodecError(f"the context of a change is not a member: {context!r}") from None
