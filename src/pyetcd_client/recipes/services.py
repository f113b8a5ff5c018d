"""Services and parties."""

from __future__ import annotations

import json
import os
import socket
import uuid
from dataclasses import dataclass, field
from typing import Any, Iterable, Iterator, List, Mapping, Optional, Tuple

from ..client.client import Client
from ..transport.calls import clean_key
from ..transport.connections import Scope
from ..transport.errors import Cancelled, EtcdError
from ..transport.results import Node
from .basics import LEASE_TTL_S, _checked_ttl, _children, _LostCallback, _name, _recipe_key
from .elections import Observed, _is_change, _Wait
from .leases import Lease


@dataclass(frozen=True)
class Instance:
    """One place at which a service can be had; also a pair of id and address."""

    id: str
    address: str
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)
    tags: Tuple[str, ...] = ()

    def __iter__(self) -> Iterator[str]:
        return iter((self.id, self.address))

    @classmethod
    def of(cls, node: Node) -> Instance:
        """Return the instance in a file: an address, or JSON with an address in it."""
        text = node.value or ""
        try:
            said = json.loads(text) if text.startswith("{") else None
            if isinstance(said, dict) and isinstance(said.get("address"), str):
                return cls(_name(node.key), said["address"], dict(said.get("metadata") or {}),
                           tuple(map(str, said.get("tags") or ())))
        except (ValueError, TypeError, RecursionError):     # somebody else's way to write it
            pass
        return cls(_name(node.key), text)

    def text(self) -> str:
        """Return what its file says: the address alone, if there is no more to say."""
        if not self.metadata and not self.tags and not self.address.startswith("{"):
            return self.address
        return json.dumps({"address": self.address, "metadata": dict(self.metadata),
                           "tags": list(self.tags)})


class Registration(Lease):
    """A file that is there as long as this process lives; from ServiceRegistry.register and Party.

    When it is lost, on_lost is called, and it is made again as soon as a server answers.

    Thread: any.
    """

    # -- below: no public names

    def _regain(self, scope: Scope) -> bool:
        super()._regain(scope)
        while scope.wait(min(1.0, self.ttl / 3)):
            try:
                with Scope(1.0):
                    self._obtain()
            except Cancelled:
                raise
            except EtcdError:                       # the next attempt is soon
                continue
            return True
        return False


class ServiceRegistry:
    """Where services say where they are, and where others find that.

        registry = ServiceRegistry(client, ttl=10)
        with registry.register("mail", "10.0.0.5:25", tags=["v2"], metadata={"zone": "a"}): ...

        [instance.address for instance in registry.resolve("mail", tag="v2")]
        with registry.watch("mail") as changes:
            for instances in changes: ...

    Guarantee: an instance is listed while its process lives and reaches the cluster, and at most
    ttl seconds longer; it keeps itself listed without waking anybody.
    Limit: a process that lives but does not serve is listed.  resolve may name an instance that
    has died less than ttl seconds ago.

    prefix   directory of all services; an instance is the file <prefix>/<service>/<id>, which
             holds the address, or with metadata or tags JSON: address, metadata, tags

    Thread: any.
    """

    def __init__(self, client: Client, prefix: str = "/services", *,
                 ttl: int = LEASE_TTL_S) -> None:
        self.client = client
        self.prefix = clean_key(prefix)
        self.ttl = _checked_ttl(ttl)

    def register(
        self, service: str, address: str, *, metadata: Optional[Mapping[str, Any]] = None,
        tags: Iterable[str] = (), on_lost: _LostCallback = None,
    ) -> Registration:
        """List `address` for `service`, until the Registration is stopped or its block ends.

        metadata  what JSON can hold: who resolves the service gets it
        tags      by which others may choose; resolve(service, tag=...)
        on_lost   called on another thread whenever the instance was missing from the list
        """
        if isinstance(tags, str):
            raise ValueError("tags are several: a list of strings")
        instance = Instance(uuid.uuid4().hex, address, metadata or {}, tuple(tags))
        return Registration(self.client, f"{self.path(service)}/{instance.id}", instance.text(),
                            self.ttl, on_lost=on_lost).start()

    def resolve(self, service: str, tag: Optional[str] = None) -> List[Instance]:
        """Return the instances of `service`, the one that came first at the head.

        tag  only those that have it
        """
        return self._instances(_children(self.client, self.path(service))[0], tag)

    def watch(self, service: str, timeout: Optional[float] = None,
              tag: Optional[str] = None) -> Observed[List[Instance]]:
        """Return an iterator over the instances of `service`, now and whenever they have changed.

        timeout  seconds without a change after which WatchTimeout is raised; None: never
        """
        path = self.path(service)

        def look() -> Tuple[List[Instance], _Wait]:
            nodes, index = _children(self.client, path)
            return self._instances(nodes, tag), (path, index, _is_change)
        return Observed(self.client, look, timeout)

    def path(self, service: str) -> str:
        """Return the directory of a service, for a CachedTree for instance."""
        return self.prefix.rstrip("/") + _recipe_key(service)

    @staticmethod
    def _instances(nodes: List[Node], tag: Optional[str]) -> List[Instance]:
        found = [Instance.of(node) for node in nodes if not node.dir]
        return [instance for instance in found if tag is None or tag in instance.tags]


class Party:
    """Who takes part: processes that join, and are no members any more when they die.

        with Party(client, "/workers", "host-a") as party:
            list(party), len(party)

    name  what others see of this member; None: the name of the host

    Guarantee: a member is in it while its process lives and reaches the cluster, and at most ttl
    seconds longer.

    Thread: any.
    """

    def __init__(self, client: Client, key: str, name: Optional[str] = None, *,
                 ttl: int = LEASE_TTL_S) -> None:
        self.client = client
        self.path = _recipe_key(key)
        self.name = name or socket.gethostname()
        self.ttl = _checked_ttl(ttl)
        self._member: Optional[Registration] = None

    def join(self) -> None:
        """Take part; nothing happens if this object does."""
        member = self._member
        if member is None or member._pid != os.getpid():    # a forked child is another member
            key = f"{self.path}/{uuid.uuid4().hex}"
            self._member = Registration(self.client, key, self.name, self.ttl).start()

    def leave(self) -> None:
        """Take part no more."""
        member, self._member = self._member, None
        if member is not None:
            member.stop()

    def __iter__(self) -> Iterator[str]:
        """Yield the names of the members, the one that came first at the head."""
        nodes, _ = _children(self.client, self.path)
        return iter([node.value or "" for node in nodes if not node.dir])

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __enter__(self) -> Party:
        self.join()
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()
