"""Elections, and values that are observed."""

from __future__ import annotations

from typing import Any, Callable, Generic, List, NamedTuple, Optional, Tuple

from ..client.client import Client
from ..client.watching import _REMOVALS
from ..transport.errors import WatchTimeout
from ..transport.results import _T, Node, Result
from .basics import LEASE_TTL_S, WAIT_SLICE_S, _await, _LostCallback, _number, _Recipe
from .locks import Contender

TAKEN_TTL_S = 120               # what was taken from a queue leaves a mark for so long
COUNTER_WRITERS = 32            # so many writers find out whether a lost change is in
PRIORITY = 100                  # of an item that comes without

_Wait = Tuple[str, int, Optional[Callable[[Result], bool]]]     # key, index, below: see _await


class Observed(_Recipe, Generic[_T]):
    """What somebody observes: `next` returns it, at first and whenever it has changed.

    Between two looks a state may be missed; the last one is not.  `close` ends the iteration, from
    any thread.  Raises WatchTimeout when there was no change in time; then `next` may be called
    again.

    look     returns what there is, and how to wait: key, index, and what must happen below the key
             (see _await)
    timeout  seconds each `next` may take; None: no limit; 0: it looks, and does not wait

    Thread: one, except for `close`.
    """

    def __init__(self, client: Client, look: Callable[[], Tuple[_T, _Wait]],
                 timeout: Optional[float] = None) -> None:
        super().__init__(client)
        self._look = look
        self._timeout = timeout
        self._seen: List[_T] = []                   # what was returned last
        self._closed = False

    def __iter__(self) -> Observed[_T]:
        return self

    def __next__(self) -> _T:
        with self._span(self._timeout) as span:
            while not self._closed:
                state, (key, index, below) = self._look()
                if [state] != self._seen:
                    self._seen = [state]
                    return state
                if not _await(self.client, span, key, index, WAIT_SLICE_S, below):
                    break
        if self._closed:
            raise StopIteration
        raise WatchTimeout("no change in time")

    def close(self) -> None:
        """End the iteration: a `next` that waits in another thread ends at once.  Thread: any."""
        self._closed = True
        self.cancel()

    def __enter__(self) -> Observed[_T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _is_change(event: Result) -> bool:
    return event.action in _CHANGES


_CHANGES = _REMOVALS | {"create", "set", "update", "compareAndSwap"}


class Leader(NamedTuple):
    """Who leads: what it said of itself, and its fencing token."""

    value: str
    token: int


class Election(Contender):
    """One of many candidates leads; when it is gone the one that came next leads.

        election = Election(client, "/scheduler", value="host-a", ttl=10, on_lost=stop)
        with election:                              # the block begins when this candidate leads
            work(fencing_token=election.token)
        election.run(work)                          # the same

        with Election(client, "/scheduler").observe() as leaders:       # anywhere
            for leader in leaders:
                print(leader.value if leader else "nobody")

    value    what others see of this candidate

    Guarantee: while `is_held` is True no other candidate's is.  A crashed leader is followed
    after its ttl.  Terms have rising tokens.
    Limit: as for Lock.

    Thread: any.  `campaign` is acquire, `resign` release, and the object a context manager.
    """

    def __init__(self, client: Client, key: str, value: str = "", *, ttl: int = LEASE_TTL_S,
                 on_lost: _LostCallback = None) -> None:
        super().__init__(client, key, ttl=ttl, on_lost=on_lost)
        self.label = ":" + value

    @property
    def is_leader(self) -> bool:
        """As is_held."""
        return self.is_held

    def campaign(self, timeout: Optional[float] = None) -> bool:
        """Stand for election until this candidate leads; return whether it does.  See acquire."""
        return self.acquire(timeout=timeout)

    def resign(self) -> bool:
        """Stop leading; return whether it led until now."""
        return self.release()

    def run(self, function: Callable[..., _T], *args: Any, **kwargs: Any) -> _T:
        """Call `function` as soon as this candidate leads, resign, and return its result.

        It should stop when the lead is lost: on_lost says so, `is_held` too.  Raises LockExpired
        if `cancel` ended the campaign.
        """
        with self:
            return function(*args, **kwargs)

    def leader(self) -> Optional[Leader]:
        """Return who leads now, by quorum; None if there are no candidates."""
        return self._first(self._line()[0])

    def observe(self, timeout: Optional[float] = None) -> Observed[Optional[Leader]]:
        """Return an iterator over who leads, now and whenever that changes; None: nobody.

        timeout  seconds without a change after which WatchTimeout is raised; None: never

        A leader between two looks may be missed; the last one is not.
        """
        def look() -> Tuple[Optional[Leader], _Wait]:
            entries, index = self._line()
            wait: _Wait = (self.path, index, lambda event: event.action == "create")
            return self._first(entries), (entries[0].key, index, None) if entries else wait
        return Observed(self.client, look, timeout)

    @staticmethod
    def _first(entries: List[Node]) -> Optional[Leader]:
        if not entries:
            return None
        value = entries[0].value or ""
        return Leader(value.partition(":")[2], _number(entries[0]))
