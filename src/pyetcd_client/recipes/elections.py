"""Elections, and values that are observed."""

from __future__ import annotations

from typing import Any, Callable, Generic, NamedTuple

from ..client.client import Client
from ..client.watching import _REMOVALS
from ..transport.connections import _Closeable
from ..transport.errors import WatchTimeout
from ..transport.results import _T, Node, Result
from .basics import LEASE_TTL_S, _LostCallback, _number, _Recipe, _Wait
from .locks import Contender


class Observed(_Recipe, _Closeable, Generic[_T]):
    """An iterator over the states of a value: the present one, then each new one.

    An intermediate state may be missed, the last one is not.  `close` ends the iteration, from
    any thread.  Raises WatchTimeout when there was no change in time; `next` may be called again.

    read     returns the state, and the event to wait for before the next read
    timeout  seconds for each `next`; None: no limit; 0: read once, do not wait

    Thread: one, except for `close`.
    """

    def __init__(self, client: Client, read: Callable[[], tuple[_T, _Wait]],
                 timeout: float | None = None) -> None:
        super().__init__(client)
        self._read = read
        self._timeout = timeout
        self._seen: list[_T] = []                   # the last state
        self._closed = False

    def __iter__(self) -> Observed[_T]:
        return self

    def __next__(self) -> _T:
        def changed() -> tuple[list[_T] | None, _Wait]:
            state, wait = self._read()
            return None if [state] == self._seen else [state], wait

        with self._call_scope(self._timeout) as scope:
            found = None if self._closed else self._poll(scope, changed)
            if found is not None:
                self._seen = found
                return found[0]
        if self._closed:
            raise StopIteration
        raise WatchTimeout("no change in time")

    def close(self) -> None:
        """End the iteration, also a waiting `next`, at once.  Thread: any."""
        self._closed = True
        self.cancel()

def _is_change(event: Result) -> bool:
    return event.action in _CHANGES


_CHANGES = _REMOVALS | {"create", "set", "update", "compareAndSwap"}


class Leader(NamedTuple):
    """The leader of an election: its value and its fencing token."""

    value: str
    token: int


class Election(Contender):
    """An election: one of many candidates leads; after it the next one in order of arrival.

        election = Election(client, "/scheduler", value="host-a", ttl=10, on_lost=stop)
        with election:                              # the block begins when this candidate leads
            work(fencing_token=election.token)
        election.run(work)                          # the same

        with Election(client, "/scheduler").observe() as leaders:       # in any process
            for leader in leaders:
                print(leader.value if leader else "nobody")

    value    identifies this candidate to observers

    Guarantee: while `is_held` is True no other candidate's is.  A crashed leader is replaced
    after its ttl.  Successive leaders have rising tokens.
    Limit: as for Lock.

    Thread: any.  `campaign` is acquire, `resign` release, and the object a context manager.
    """

    def __init__(self, client: Client, key: str, value: str = "", *, ttl: int = LEASE_TTL_S,
                 on_lost: _LostCallback = None) -> None:
        super().__init__(client, key, ttl=ttl, on_lost=on_lost)
        self.label = ":" + value

    is_leader = Contender.is_held

    def campaign(self, timeout: float | None = None) -> bool:
        """Wait until this candidate leads; return whether it does.  See acquire."""
        return self.acquire(timeout=timeout)

    def resign(self) -> bool:
        """Step down; return whether this candidate led until now."""
        return self.release()

    def run(self, function: Callable[..., _T], *args: Any, **kwargs: Any) -> _T:
        """Call `function` when this candidate leads, then resign, and return the result.

        The function should stop after a loss, which on_lost and `is_held` show.  Raises
        LockExpired if `cancel` ended the campaign.
        """
        with self:
            return function(*args, **kwargs)

    def leader(self) -> Leader | None:
        """Return the present leader, by quorum; None if there are no candidates."""
        return self._first(self._line()[0])

    def observe(self, timeout: float | None = None) -> Observed[Leader | None]:
        """Return an iterator over the leader, now and after each change; None: no leader."""
        def read() -> tuple[Leader | None, _Wait]:
            entries, index = self._line()
            wait = _Wait(self.path, index, lambda event: event.action == "create")
            return self._first(entries), _Wait(entries[0].key, index) if entries else wait
        return Observed(self.client, read, timeout)

    @staticmethod
    def _first(entries: list[Node]) -> Leader | None:
        if not entries:
            return None
        value = entries[0].value or ""
        return Leader(value.partition(":")[2], _number(entries[0]))
