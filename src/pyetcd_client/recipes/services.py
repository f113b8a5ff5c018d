"""Services and parties."""

from __future__ import annotations

import json
import os
import socket
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..client.client import Client
from ..transport.calls import clean_key
from ..transport.connections import Scope
from ..transport.errors import Cancelled, EtcdError
from ..transport.results import Node
from .basics import LEASE_TTL_S, _checked_ttl, _children, _LostCallback, _name, _recipe_key, _Wait
from .elections import Observed, _is_change
from .leases import Lease


@dataclass(frozen=True)
class Instance:
    """An instance of a service; unpacks as a pair of id and address."""

    id: str
    address: str
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)
    tags: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[str]:
        return iter((self.id, self.address))

    @classmethod
    def of(cls, node: Node) -> Instance:
        """Return the instance in a file: an address, or JSON with an address in it."""
        text = node.value or ""
        try:
            raw = json.loads(text) if text.startswith("{") else None
            if isinstance(raw, dict) and isinstance(raw.get("address"), str):
                return cls(_name(node.key), raw["address"], dict(raw.get("metadata") or {}),
                           tuple(map(str, raw.get("tags") or ())))
        except (ValueError, TypeError, RecursionError):     # the format of another program
            pass
        return cls(_name(node.key), text)

    def text(self) -> str:
        """Return the text of its file: the address, or JSON if there are metadata or tags."""
        if not self.metadata and not self.tags and not self.address.startswith("{"):
            return self.address
        return json.dumps({"address": self.address, "metadata": dict(self.metadata),
                           "tags": list(self.tags)})


class Registration(Lease):
    """A Lease of ServiceRegistry or Party: after a loss it calls on_lost and recreates the file."""

    def _regain(self, scope: Scope) -> bool:
        self._report_loss()
        while scope.wait(min(1.0, self.ttl / 3)):
            try:
                with Scope(1.0):
                    self._acquire_file()
            except Cancelled:
                raise
            except EtcdError:
                continue
            return True
        return False


class ServiceRegistry:
    """A registry of services and their instances.

        registry = ServiceRegistry(client, ttl=10)
        with registry.register("mail", "10.0.0.5:25", tags=["v2"], metadata={"zone": "a"}): ...

        [instance.address for instance in registry.resolve("mail", tag="v2")]
        with registry.watch("mail") as changes:
            for instances in changes: ...

    Guarantee: an instance is listed while its process lives and reaches the cluster, and at most
    ttl seconds longer.  Its renewals cause no events.
    Limit: a process that lives but does not serve is listed.  resolve may return an instance that
    died less than ttl seconds ago.

    prefix   directory of all services; an instance is the file <prefix>/<service>/<id> with the
             address or, with metadata or tags, JSON: address, metadata, tags

    Thread: any.
    """

    def __init__(self, client: Client, prefix: str = "/services", *,
                 ttl: int = LEASE_TTL_S) -> None:
        self.client = client
        self.prefix = clean_key(prefix)
        self.ttl = _checked_ttl(ttl)

    def register(self, service: str, address: str, *, metadata: Mapping[str, Any] | None = None,
                 tags: Iterable[str] = (), on_lost: _LostCallback = None) -> Registration:
        """List `address` for `service`, until the Registration is stopped or its block ends.

        metadata  any JSON values, for the users of the service
        tags      for resolve(service, tag=...)
        on_lost   called on another thread after the instance was missing from the list
        """
        if isinstance(tags, str):
            raise ValueError("tags are several: a list of strings")
        instance = Instance(uuid.uuid4().hex, address, metadata or {}, tuple(tags))
        return Registration(self.client, f"{self.path(service)}/{instance.id}", instance.text(),
                            self.ttl, on_lost=on_lost).start()

    def resolve(self, service: str, tag: str | None = None) -> list[Instance]:
        """Return the instances of `service` (with this tag, if given), oldest first."""
        return self._instances(_children(self.client, self.path(service))[0], tag)

    def watch(self, service: str, timeout: float | None = None,
              tag: str | None = None) -> Observed[list[Instance]]:
        """Return an iterator over the instances of `service`, now and after each change."""
        path = self.path(service)

        def read() -> tuple[list[Instance], _Wait]:
            nodes, index = _children(self.client, path)
            return self._instances(nodes, tag), _Wait(path, index, _is_change)
        return Observed(self.client, read, timeout)

    def path(self, service: str) -> str:
        """Return the directory of a service, for example for a CachedTree."""
        return self.prefix.rstrip("/") + _recipe_key(service)

    @staticmethod
    def _instances(nodes: list[Node], tag: str | None) -> list[Instance]:
        found = [Instance.of(node) for node in nodes if not node.dir]
        return [instance for instance in found if tag is None or tag in instance.tags]


class Party:
    """A group of processes, each a member while it lives.

        with Party(client, "/workers", "host-a") as party:
            list(party), len(party)

    name  the name of this member; None: the name of the host

    Guarantee: a process is a member while it lives and reaches the cluster, and at most ttl
    seconds longer.

    Thread: any.
    """

    def __init__(self, client: Client, key: str, name: str | None = None, *,
                 ttl: int = LEASE_TTL_S) -> None:
        self.client = client
        self.path = _recipe_key(key)
        self.name = name or socket.gethostname()
        self.ttl = _checked_ttl(ttl)
        self._member: Registration | None = None

    def join(self) -> None:
        """Become a member; no effect if this object is one."""
        member = self._member
        if member is None or member._pid != os.getpid():    # a forked child is another member
            key = f"{self.path}/{uuid.uuid4().hex}"
            self._member = Registration(self.client, key, self.name, self.ttl).start()

    def leave(self) -> None:
        """Cease to be a member."""
        member, self._member = self._member, None
        if member is not None:
            member.stop()

    def __iter__(self) -> Iterator[str]:
        """Return an iterator over the names of the members, oldest first."""
        nodes, _ = _children(self.client, self.path)
        return iter([node.value or "" for node in nodes if not node.dir])

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __enter__(self) -> Party:
        self.join()
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()
