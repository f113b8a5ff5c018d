"""Members of etcd 3.4, of etcd 2.3 and of pyetcd in one cluster, exchanged under load."""

from __future__ import annotations

import time

import pytest

from tests.kit.exchange import EXCHANGE_SECONDS, MixedCluster, Writer, etcdctl3, needs_etcd

_OFTEN = ("-snapshot-count", "40")      # the logs are compacted soon
_PAUSE_SECONDS_MAX = 3                  # of writes, while members are exchanged
_EXCHANGES = 3 if EXCHANGE_SECONDS >= 60 else 1     # of members by new ones, which take long


@needs_etcd
@pytest.mark.parametrize("kinds", [("etcd", "3.4", "etcd"), ("3.4", "etcd", "3.4")], ids=",".join)
def test_exchange_members_are_killed_and_come_back(tmp_path, kinds):
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
        cluster.wait_version("3.4.0")
        cluster.check_equal(written)


@needs_etcd
def test_exchange_killed_leaders_lose_no_acknowledged_write(tmp_path):
    """Leaders of both programs die again and again under a writer."""
    with MixedCluster(tmp_path, ("etcd", "3.4", "3.4"), *_OFTEN) as cluster:
        with Writer(cluster) as writer:
            until = time.monotonic() + EXCHANGE_SECONDS
            while time.monotonic() < until:
                cluster.wait_served(cluster.kill_leader())
        cluster.check_equal(writer.acknowledged)
        print(f"{len(writer.acknowledged)} writes, longest pause {writer.pause_s:.1f} s")


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


@needs_etcd
@pytest.mark.parametrize("way, count", [
    (MixedCluster.restart_as, 3), (MixedCluster.exchange, _EXCHANGES),
], ids=["in-place", "new-members"])
def test_exchange_of_members_under_load(tmp_path, way, count):
    """Members of etcd 3.4 become members of pyetcd, and again of etcd."""
    with MixedCluster(tmp_path, ("etcd",) * 3, *_OFTEN) as cluster:
        with Writer(cluster) as writer:
            for kind in ("pyetcd", "etcd"):
                for member in cluster.members[-count:]:
                    way(cluster, member, kind)
        cluster.check_equal(writer.acknowledged)
    assert writer.pause_s < _PAUSE_SECONDS_MAX


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
        cluster.check_equal(writer.acknowledged)
        cluster.wait_version("2.3.0")
    assert writer.pause_s < _PAUSE_SECONDS_MAX


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
