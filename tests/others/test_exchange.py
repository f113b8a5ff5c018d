"""Members of etcd 3.4, of etcd 2.3 and of pyetcd in one cluster, exchanged under load."""

from __future__ import annotations

import time

import pytest

from tests.kit.exchange import (
    EXCHANGE_SECONDS,
    MixedCluster,
    Writer,
    etcdctl3,
    needs_etcd,
    needs_etcd23,
)

_OFTEN = ("-snapshot-count", "40")      # the logs are compacted soon
_EXCHANGES = 3 if EXCHANGE_SECONDS >= 60 else 1     # of members by new ones, which take long


def _check(cluster, writer):
    """Nothing acknowledged is lost, and all members are equal.

    The longest pause is mostly below 2 s.
    """
    print(f"{len(writer.acknowledged)} writes, longest pause {writer.pause_s:.1f} s")
    cluster.check_equal(writer.acknowledged)


@pytest.mark.parametrize("kinds, version", [
    pytest.param(("etcd", "3.4", "etcd"), "3.4.0", marks=needs_etcd),
    pytest.param(("3.4", "etcd", "3.4"), "3.4.0", marks=needs_etcd),
    pytest.param(("2.3", "pyetcd", "2.3"), "2.3.0", marks=needs_etcd23),
    pytest.param(("pyetcd", "2.3", "pyetcd"), "2.3.0", marks=needs_etcd23),
], ids=lambda value: ",".join(value) if isinstance(value, tuple) else None)
def test_exchange_members_are_killed_and_come_back(tmp_path, kinds, version):
    """A static cluster with one or two members of pyetcd: each takes writes, dies, catches up."""
    with MixedCluster(tmp_path, kinds, *_OFTEN) as cluster:
        written = {}
        for member in cluster.members:
            written[f"/{member.name}"] = member.name
            cluster.put_through(member, member.name, member.name)
        for member in cluster.members:
            member.process.kill()
            others = [other for other in cluster.members if other is not member]
            for number in range(25):
                written[f"/{member.name}-{number}"] = str(number)
                cluster.put_through(others[number % 2], f"{member.name}-{number}", str(number), 20)
            cluster.start(member)
            cluster.wait_served(member)
        cluster.wait_version(version)
        cluster.check_equal(written)


@pytest.mark.parametrize("kinds", [
    pytest.param(("etcd", "3.4", "3.4"), marks=needs_etcd),
    pytest.param(("2.3", "pyetcd", "pyetcd"), marks=needs_etcd23),
], ids=",".join)
def test_exchange_killed_leaders_lose_no_acknowledged_write(tmp_path, kinds):
    """Leaders of both programs die again and again under a writer."""
    with MixedCluster(tmp_path, kinds, *_OFTEN) as cluster:
        with Writer(cluster) as writer:
            until = time.monotonic() + EXCHANGE_SECONDS
            while time.monotonic() < until:
                cluster.wait_served(cluster.kill_leader())
                writer.wait_more(100)
        _check(cluster, writer)


@needs_etcd23
def test_exchange_snapshots_go_both_ways_between_2_3_and_pyetcd(tmp_path):
    """A new member gets the compacted part of the log as a snapshot, whichever program leads."""
    with MixedCluster(tmp_path, ("pyetcd",), *_OFTEN) as cluster:
        written = {}
        for kind, line in (("2.3", "incoming snapshot"), ("pyetcd", "recovered from incoming")):
            first = cluster.members[0]
            for number in range(60):
                written[f"/{first.name}-{number}"] = str(number)
                cluster.put_through(first, f"{first.name}-{number}", str(number))
            cluster.add(kind).process.wait_log(line)
            cluster.remove(first)
        cluster.kill_leader()           # it starts on the directory that came with the snapshot
        cluster.check_equal(written)


@needs_etcd
def test_exchange_snapshots_go_both_ways(tmp_path):
    """A pyetcd leader sends one to a new member of etcd, and gets one where etcd leads."""
    with MixedCluster(tmp_path, ("3.4",), *_OFTEN) as cluster:
        first = cluster.members[0]
        written = {f"/a{number}": str(number) for number in range(60)}
        for key, value in written.items():
            cluster.put_through(first, key[1:], value)
        cluster.wait_version("3.4.0")
        first.process.wait_log("compacted raft log")
        second = cluster.add("etcd")
        second.process.wait_log("applied incoming snapshot")
        second.process.kill()
        cluster.start(second)           # on the database that came with the snapshot
        cluster.wait_served(second)
        third = cluster.add("etcd")
        cluster.remove(first)
        for number in range(60):
            written[f"/b{number}"] = str(number)
            cluster.put_through(third, f"b{number}", str(number))
        fourth = cluster.add("pyetcd")
        fourth.process.wait_log("acts as etcd 3.4.23")
        fourth.process.wait_log("recovered from incoming snapshot")
        fourth.process.kill()
        cluster.start(fourth)
        cluster.wait_served(fourth)
        cluster.check_equal(written)


@pytest.mark.parametrize("etcd", [
    pytest.param("etcd", marks=needs_etcd), pytest.param("2.3", marks=needs_etcd23),
])
@pytest.mark.parametrize("way, count", [
    (MixedCluster.restart_as, 3), (MixedCluster.exchange, _EXCHANGES),
], ids=["in-place", "new-members"])
def test_exchange_of_members_under_load(tmp_path, way, count, etcd):
    """Members of etcd become members of pyetcd, and again of etcd."""
    with MixedCluster(tmp_path, (etcd,) * 3, *_OFTEN) as cluster:
        with Writer(cluster) as writer:
            for kind in ("pyetcd", etcd):
                for member in cluster.members[-count:]:
                    way(cluster, member, kind)
        _check(cluster, writer)


@needs_etcd
def test_exchange_moves_from_2_3_to_3_4_and_back_under_load(tmp_path):
    """As docs/moving.md says: 2.3, bridge, 3.4, etcd 3.4; and back, with new members at the end."""
    with MixedCluster(tmp_path, ("2.3",) * 3, *_OFTEN) as cluster:
        with Writer(cluster) as writer:
            cluster.wait_version("2.3.0")
            members = cluster.members
            cluster.restart_as(members[0], "bridge")
            cluster.restart_as(members[0], "2.3")       # nothing has changed yet
            for kind, version in (("bridge", "2.3.0"), ("3.4", "3.4.0"), ("etcd", "3.4.0"),
                                  ("bridge", "2.3.0")):
                for member in members:
                    cluster.restart_as(member, kind)
                cluster.wait_version(version)
            for member in members[-_EXCHANGES:]:
                cluster.exchange(member, "2.3")
        _check(cluster, writer)
        cluster.wait_version("2.3.0")


@needs_etcd
def test_exchange_v3_entries_are_passed_over(tmp_path):
    """v3 writes through etcd: pyetcd counts them, remembers them, and goes on with v2."""
    with MixedCluster(tmp_path, ("etcd", "3.4", "etcd"), *_OFTEN) as cluster:
        first, second, third = cluster.members
        cluster.wait_version("3.4.0")
        for number in range(50):
            etcdctl3(first, "put", f"k{number}", "v")
        cluster.put_through(second, "a", "1")
        metrics = second.request("GET", "/metrics")[1]
        assert "\npyetcd_v3_entries_skipped_total 50\n" in metrics
        assert second.process.log().count("holds data of etcd's v3 API") == 1
        assert (tmp_path / f"{second.name}.etcd" / "member" / "v3-data").exists()

        cluster.lead_by("etcd")
        fourth = cluster.add("pyetcd")
        fourth.process.wait_log("a snapshot of the leader holds data of etcd's v3 API")
        second.process.kill()
        cluster.start(second)
        cluster.wait_served(second)
        assert etcdctl3(third, "get", "k49") == "k49\nv\n"
        cluster.check_equal({"/a": "1"})
