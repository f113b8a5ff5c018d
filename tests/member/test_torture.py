"""Torture: real processes under faults, and a check of what clients saw."""

from __future__ import annotations

import collections
import contextlib
import http.client
import http.server
import json
import random
import threading

import pytest

from tests.kit.basics import eventually
from tests.kit.torture import (
    _TORTURE_FAST,
    _TORTURE_FLAGS,
    _TORTURE_FULL_DISK,
    TORTURE_SECONDS,
    TORTURE_SEED,
    CuttingProxy,
    NamespaceNetwork,
    Torture,
    TortureCluster,
    _why_no_namespaces,
    small_disk,
)


@pytest.mark.parametrize("network_type, size, seconds", [
    (CuttingProxy, 3, 3), (CuttingProxy, 5, 3), (NamespaceNetwork, 3, 2),
], ids=["proxy-3", "proxy-5", "namespaces-3"])
def test_torture_clients_see_one_history(tmp_path, network_type, size, seconds):
    """kill -9, pauses, partitions: every answer and every event fits into one order."""
    if network_type is NamespaceNetwork and _why_no_namespaces():
        pytest.skip(f"no network namespaces: {_why_no_namespaces()}")
    rng = random.Random(f"{TORTURE_SEED}/{network_type.__name__}/{size}")
    timing = _TORTURE_FAST if not TORTURE_SECONDS or rng.random() < 0.7 else ()
    print(f"PYETCD_TORTURE_SEED={TORTURE_SEED}, {' '.join(timing) or 'default timing'}")
    cluster = TortureCluster(tmp_path, size, *_TORTURE_FLAGS, *timing, network_type=network_type)
    with contextlib.ExitStack() as stack:
        small = cluster.members[:(size - 1) // 2 if _TORTURE_FULL_DISK else 0]
        problems = [stack.enter_context(small_disk(member.disk, 48)) for member in small]
        if any(problems):
            print(f"no disk is ever full: {problems}")
        stack.enter_context(cluster)
        torture = Torture(cluster, rng, [] if any(problems) else small)
        torture.run(TORTURE_SECONDS or seconds)
        torture.check_convergence()
        print(f"{size} members: {torture.judge()}")


def test_torture_paused_leader_serves_no_stale_quorum_read(tmp_path):
    """Asked when it wakes up, it has not heard of its successor: by chance, or as it is cut off."""
    with TortureCluster(tmp_path, 3, *_TORTURE_FAST) as cluster:
        for number in range(4):
            old, value = cluster.leader(), f"{number}.new"
            cluster.put_through(old, "a", f"{number}.old")
            new = cluster.others(old)[number % 2]
            cut_off = cluster.others(old) if number % 3 else []
            door = http.client.HTTPConnection(old.address, timeout=10)
            with contextlib.closing(door), cluster.cut_between([old], cut_off):
                with cluster.paused(old):
                    eventually(lambda m=new, v=value: m.request(
                        "PUT", "/v2/keys/a", {"value": v}, timeout_s=0.3))
                    door.request("GET", "/v2/keys/a?quorum=true")
                threading.Event().wait(0.2 if cut_off else 0)
                cluster.network.heal({(a, b) for a in cluster.members for b in cluster.members})
                answer = door.getresponse()
                body = json.loads(answer.read())
                assert answer.status != 200 or body["node"]["value"] == value
            eventually(lambda m=old, v=value: m.value("a", quorum="true") == v)


def test_torture_rejoining_member_disturbs_nobody(tmp_path):
    """A member that was cut off for many election timeouts: no new term, no failed write."""
    with TortureCluster(tmp_path, 3, *_TORTURE_FAST) as cluster:
        leader = cluster.leader()
        away = cluster.others(leader)[0]
        term = leader.put("a", "1")[2]["X-Raft-Term"]
        statuses, ended = collections.Counter(), threading.Event()

        def write():
            while not ended.wait(0.005):
                answer = leader.put("b", "1")
                statuses[answer and answer[0]] += 1

        writer = threading.Thread(target=write)
        writer.start()
        for value, resets in (("held", False), ("reset", True)):
            with cluster.cut_between([away], cluster.others(away), resets=resets):
                threading.Event().wait(1.2)         # four election timeouts
                leader.put("a", value)
                assert away.value("a") != value
            eventually(lambda v=value: away.value("a") == v)
            threading.Event().wait(0.4)
        ended.set()
        writer.join()
        assert set(statuses) <= {200, 201}, statuses
        assert leader.put("a", "last")[2]["X-Raft-Term"] == term
        assert leader.is_leader()
