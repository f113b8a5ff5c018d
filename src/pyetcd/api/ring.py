"""The last five minutes of a member, a sample a second: what the page draws.

Nothing is counted for it: a sample is the difference of counters that are there anyway.
"""

from __future__ import annotations

import collections
import itertools
from typing import Deque, NamedTuple, Sequence

from ..base.limits import NS
from ..member.server import EtcdServer
from ..store.tree import Store
from .keys import KeysApi

SAMPLES_MAX = 300                   # kept, one a second; above: the oldest is forgotten
SAMPLE_SECONDS = 1.0
_WRITES = ("sets", "create", "update", "delete", "compare_and_swap", "compare_and_delete")


class SecondSample(NamedTuple):
    """What happened in one second; latencies are 0 if nothing was measured."""

    unix_s: int
    writes_s: float                 # applied, per second: those of the whole cluster
    reads_s: float                  # of keys, that this member was asked for, per second
    p50_ms: float                   # of the writes that this member has answered
    p99_ms: float
    fsync_ms: float                 # mean time of a write and sync of the log
    watchers: int
    keys: int                       # of users, directories included


class _Totals(NamedTuple):
    at: float
    writes: int
    reads: int
    durations: Sequence[int]        # by bucket
    syncs: int
    sync_s: float


class Ring:
    """Takes a sample a second, as long as the member runs.  Thread: reactor."""

    def __init__(self, server: EtcdServer, keys: KeysApi) -> None:
        self.samples: Deque[SecondSample] = collections.deque(maxlen=SAMPLES_MAX)
        self._server = server
        self._keys = keys
        self._before = self._totals()
        self._timer = server.reactor.every(SAMPLE_SECONDS, self._sample)

    def _totals(self) -> _Totals:
        server, keys = self._server, self._keys
        keys.count_puts()
        stats = server.store.stats
        syncs = server.journal.writer.sync_durations
        return _Totals(
            server.reactor.now(), sum(getattr(stats, f"{name}_success") for name in _WRITES),
            keys.reads, keys.write_durations.counts[:], syncs.count, syncs.sum,
        )

    def _sample(self) -> None:
        server = self._server
        if server.stopping:
            self._timer.cancel()
            return
        before, now = self._before, self._totals()
        self._before = now
        seconds = max(now.at - before.at, 1e-3)
        counts = [new - old for new, old in zip(now.durations, before.durations)]
        syncs = now.syncs - before.syncs
        # A snapshot of the leader brings its counters along: no rate can be told from those.
        self.samples.append(SecondSample(
            server.reactor.wall_ns() // NS, max(now.writes - before.writes, 0) / seconds,
            (now.reads - before.reads) / seconds,
            1_000 * quantile(self._keys.write_durations.bounds, counts, 0.5),
            1_000 * quantile(self._keys.write_durations.bounds, counts, 0.99),
            1_000 * (now.sync_s - before.sync_s) / syncs if syncs else 0.0,
            server.store.stats.watchers, count_keys(server.store),
        ))


def quantile(bounds: Sequence[float], counts: Sequence[int], share: float) -> float:
    """Return the value below which `share` of the counted values lie; 0.0 if there are none.

    bounds  upper bounds of the buckets, whose values count as evenly spread; the last count is of
            what is above them
    """
    wanted = share * sum(counts)
    if not wanted:
        return 0.0
    steps = zip([0.0, *bounds], bounds, itertools.accumulate(counts), counts)
    for lower, upper, below, here in steps:
        if below >= wanted:
            return upper - (below - wanted) / here * (upper - lower)
    return bounds[-1]


def count_keys(store: Store) -> int:
    """Return how many keys and directories users have: all nodes but those of the cluster."""
    members = [f"/0/members/{name}" for name, _ in store.children("/0/members")]
    others = sum(map(store.count_children, (*_NOT_OF_USERS, *members)))
    return max(len(store) - 1 - others, 0)


# Where the cluster, users and roles lie; "/" itself has "/1", which is no key.
_NOT_OF_USERS = ("/", "/0", "/0/members", "/0/removed_members", "/2", "/2/users", "/2/roles")
