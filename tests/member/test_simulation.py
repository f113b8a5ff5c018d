"""Simulation: real server code under virtual time, network and disk."""

from __future__ import annotations

import itertools
import os
import time

import pytest

import pyetcd
from tests.kit.simulator import (
    _SIM_BUG_SCENARIOS,
    _SIM_BUGS,
    SIM_ERRORS,
    Sim,
    _sim_boot_after,
    _sim_damaged_snapshots,
    _sim_deposed_leader,
    _sim_figure_8,
    _sim_files,
    _sim_new_leader,
    _sim_one_member_until,
    _sim_scenario,
)

_ONLY = os.environ.get("PYETCD_SIM_SEED")
_SEEDS = [int(_ONLY)] if _ONLY else list(range(int(os.environ.get("PYETCD_SIM_SEEDS", "100"))))
_BLOCKS = [block for block in (_SEEDS[number::10] for number in range(10)) if block]


@pytest.mark.parametrize("seeds", _BLOCKS, ids=lambda seeds: f"{seeds[0]}-{seeds[-1]}")
def test_sim_seeds(seeds):
    """Whatever chance does to a cluster, what was acknowledged stays and all members agree."""
    nodes = int(os.environ.get("PYETCD_SIM_NODES", "0")) or None
    commits = acknowledged = reads = operations = refused = 0
    started = time.monotonic()
    for seed in seeds:
        sim = _sim_scenario(seed, nodes)
        commits += len(sim.invariants.committed)
        acknowledged += len(sim.acknowledged)
        reads += sim.reads
        refused += sim.refused
        operations += sum(map(len, sim.histories.values()))
    assert acknowledged > len(seeds), "the scenarios hardly ever got a write through"
    assert reads > len(seeds) / 2, "the scenarios hardly ever got a quorum read through"
    minutes = (time.monotonic() - started) / 60
    print(f"{len(seeds)} seeds, {len(seeds) / minutes:.0f} a minute: {commits} committed entries,"
          f" {acknowledged} acknowledged writes, {operations} operations in histories,"
          f" {refused} damaged disks refused")


def test_sim_member_may_be_removed_before_its_publication_is_applied():
    """Found by seed 388 of 5 members: what was said of its peer URLs ended the member."""
    _sim_scenario(388, 5)


def test_sim_lives_in_its_own_time(monkeypatch):
    """No clock of this machine is read: requests time out, and a seed always does the same."""
    def expire(proposals, now, error):
        expired.append(expire_really(proposals, now, error))
        return expired[-1]

    def run(seed):
        sim = _sim_scenario(seed)
        return sim.steps, sim.now, len(sim.heap), sim.acknowledged, sim.histories

    expired, expire_really = [], pyetcd.Proposals.expire
    monkeypatch.setattr(pyetcd.Proposals, "expire", expire)
    monkeypatch.setattr(pyetcd, "time", None)
    monkeypatch.setattr(pyetcd, "SYSTEM_CLOCK", None)
    runs = [run(seed) for seed in range(50_000, 50_012)]
    assert sum(expired) > 50
    assert run(50_000) == runs[0]


def test_sim_work_in_small_pieces(monkeypatch):
    """Batches written, entries applied and keys removed, a few at a time over several turns."""
    monkeypatch.setattr(pyetcd, "WORK_BYTES_MAX", 150)
    monkeypatch.setattr(pyetcd, "REMOVED_NODES_MAX", 1)
    pieces, encode_on = [], pyetcd.Journal._encode_on

    def count(journal):
        encode_on(journal)
        pieces.append(journal.is_encoding)

    monkeypatch.setattr(pyetcd.Journal, "_encode_on", count)
    for seed in range(40_000, 40_015):
        _sim_scenario(seed)
    assert sum(pieces) > 100


@pytest.mark.parametrize("bug", _SIM_BUGS, ids=lambda bug: bug.__name__[5:])
def test_sim_finds_seeded_bug(bug, monkeypatch):
    """The simulation can fail: a program that lacks one rule does not get through 500 seeds."""
    bug(monkeypatch)
    scenario = _SIM_BUG_SCENARIOS.get(bug.__name__[5:], _sim_scenario)
    for seed in range(500):
        try:
            scenario(seed)
        except (AssertionError, pyetcd.InvariantError, *SIM_ERRORS) as error:
            print(f"found by seed {seed}: {error}")
            return
    raise AssertionError("no seed found it")


@pytest.mark.parametrize("seed", range(5))
def test_sim_entry_of_an_older_term_is_not_committed_by_counting(seed):
    """Figure 8 of the Raft paper: a majority holds it, and it is overwritten all the same."""
    assert "v1" not in {value for value, _ in _sim_files(
        _sim_figure_8(seed).leader().etcd.store).values()}


def test_sim_deposed_leader_discards_uncommitted_tail():
    """What only the isolated leader holds is overwritten by the newer term (Raft paper §5.3)."""
    with Sim(nodes=5, seed=8) as sim:
        sim.run(3.0)
        old = sim.leader()
        sim.isolate(old)
        sim.write(old)
        sim.run(0.2)
        sim.run(4.0)
        new = max((m for m in sim.members if m is not old), key=lambda m: m.etcd.is_leader)
        assert new.etcd.is_leader and old.etcd.node.raft.log.last_index > 0
        sim.write(new)
        sim.run(1.0)
        assert len(sim.acknowledged) == 1
        sim.settle()
        assert list(sim.acknowledged.values())[0][1] == "v2"
        assert "v1" not in {value for value, _ in _sim_files(new.etcd.store).values()}


def test_sim_deposed_leader_serves_no_quorum_read():
    """Cut off, it believes to lead while another one acknowledges: its reads stay unanswered."""
    outcomes = [_sim_deposed_leader(seed) for seed in range(12)]
    assert [served for _, served in outcomes] == [0] * 12
    assert sum(asked for asked, _ in outcomes) > 12, "no seed had two that believe to lead"


@pytest.mark.parametrize("scenario", [_sim_new_leader, _sim_damaged_snapshots])
def test_sim_scenario_of_a_rare_bug_is_survived(scenario):
    """What finds the bug in a program that lacks the rule passes in one that has it."""
    for seed in range(5):
        scenario(seed)


def test_sim_far_behind_follower_gets_a_snapshot():
    """A follower whose entries are compacted is brought back by MsgSnap (Raft thesis §5.2)."""
    with Sim(nodes=3, seed=5, snapshot_count=20) as sim:
        pyetcd_keep = pyetcd.SNAPSHOT_CATCHUP_ENTRIES
        pyetcd.SNAPSHOT_CATCHUP_ENTRIES = 5
        try:
            sim.run(3.0)
            leader = sim.leader()
            behind = next(m for m in sim.members if m is not leader)
            sim.isolate(behind)
            for _ in range(150):
                sim.write(leader)
                sim.run(0.02)
            assert leader.etcd.node.raft.log.offset > behind.etcd.node.raft.log.last_index
            sim.settle()
            assert behind.etcd.raft_index >= 150
            assert behind.etcd.snapshots.index > 0
        finally:
            pyetcd.SNAPSHOT_CATCHUP_ENTRIES = pyetcd_keep


def test_sim_all_members_crash_at_once_and_lose_nothing():
    """kill -9 of everybody: every acknowledged write is there after the restart."""
    with Sim(nodes=3, seed=3) as sim:
        sim.run(3.0)
        for _ in range(60):
            sim.write()
            sim.run(0.01)
        assert len(sim.acknowledged) > 20
        for member in sim.members:
            member.crash()
        sim.settle()


@pytest.mark.parametrize("asks_leader", [True, False])
def test_sim_removed_leader_of_two_strands_nobody(asks_leader):
    """The other member knows that the removal is committed, or it did not happen (§4.2.2)."""
    removed = 0
    for seed in range(30):
        with Sim(nodes=2, seed=seed) as sim:
            sim.run(4.0)
            old = sim.leader()
            heir = next(member for member in sim.members if member is not old)
            sim.remove_member(old, asked=old if asks_leader else heir)
            while sim.now < 20.0 and old.up and old.id in old.etcd.cluster.members:
                sim.step()
            removed += sim.now < 20.0
            sim.lose_in_flight(old)
            old.leave()                 # at the first moment at which it may
            sim.run(3.0)
            sim.write(heir)
            sim.run(3.0)
            sim.settle()
            assert sim.acknowledged, f"seed {seed}: the survivor serves nobody"
    assert removed > 25


def test_sim_leader_whose_disk_stalls_steps_aside():
    """Its heartbeats go on, its answers do not: another one takes over, and it is not chosen."""
    for seed in range(10):
        with Sim(nodes=3, seed=seed) as sim:
            sim.run(4.0)
            old = sim.leader()
            old.disk.is_full = seed % 2 == 0
            old.disk.slowness = 1e9             # every job takes 20 s
            others = [member for member in sim.members if member is not old]
            for _ in range(10):
                sim.write(old)
                sim.write(others[0])
                sim.run(0.4)
            assert sim.leader() in others, f"seed {seed}"
            before = len(sim.acknowledged)
            for _ in range(10):
                sim.write(others[0])
                sim.write(others[1])
                sim.run(0.2)
            sim.run(2.0)                        # a healthy disk may take a second, too
            assert len(sim.acknowledged) == before + 20, f"seed {seed}"
            sim.settle(60.0)


def test_sim_one_slow_disk_for_all_changes_no_leader():
    """Nobody's disk is better than the leader's: to hand the lead over would only cost time."""
    kept = 0
    for seed in range(5):
        with Sim(nodes=3, seed=seed) as sim:
            sim.run(4.0)
            old = sim.leader()
            for member in sim.members:
                member.disk.slowness = 1e9
            sim.write(old)
            sim.run(15.0)
            kept += sim.leader() is old
            sim.settle(60.0)
    assert kept == 5


def test_sim_crash_at_every_disk_operation_with_every_torn_tail():
    """Whenever the power fails, and whatever of the last write is on the disk: nothing is lost.

    The values are overwritten, so what counts is that every acknowledged one was applied: the last
    one of its key is in the tree, or in an entry behind the snapshot.
    """
    member, acknowledged = _sim_one_member_until(None)
    operations, names = member.disk.operations, set(member.disk.live)
    assert len(acknowledged) == 14
    assert sum(name.endswith(".snap") for name in names) >= 2
    assert sum(name.endswith(".wal") for name in names) >= 3
    crashes, found = 0, {}                      # bytes on the disk -> values after the boot
    for number in range(1, operations + 1):
        member, acknowledged = _sim_one_member_until(number)
        last = {}
        for key, value in sorted(acknowledged, key=lambda pair: int(pair[1][1:])):
            last[key] = value
        written = member.disk
        tails = {path: len(f.data) - len(f.synced) for path, f in written.live.items()}
        torn = max((size for path, size in tails.items() if path.endswith(".wal")), default=0)
        lengths = sorted({*range(torn + 1), *tails.values()})
        for keeps_names, length in itertools.product((False, True), lengths):
            disk = written.fork()
            disk.keeps_names, disk.tear = keeps_names, lambda tail, _, n=length: tail[:n]
            disk.crash()
            left = tuple(sorted((path, file.synced) for path, file in disk.live.items()))
            if left not in found:               # two crashes in three leave the same bytes
                found[left], _ = _sim_boot_after(member, disk)
            assert set(last.items()) <= found[left], f"operation {number}, {length} bytes"
            crashes += 1
    assert crashes > 1000
    print(f"{operations} operations, {crashes} crashes, {len(found)} boots")


def test_sim_minority_acknowledges_nothing():
    """Two of five members cut off from the rest commit nothing new (Raft paper §5.4)."""
    with Sim(nodes=5, seed=11) as sim:
        sim.run(3.0)
        minority = sim.members[:2]
        for one in minority:
            for other in sim.members[2:]:
                sim.cut |= {(one.name, other.name), (other.name, one.name)}
        sim.run(5.0)
        before = len(sim.acknowledged)
        for _ in range(10):
            sim.write(minority[0])
            sim.write(minority[1])
        sim.run(5.0)
        assert len(sim.acknowledged) == before
        sim.settle()
