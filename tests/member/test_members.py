"""Clusters over real sockets, in processes of their own."""

from __future__ import annotations

import itertools
import logging
import re
import shutil
import signal
import threading

import pytest
import requests

import pyetcd
from pyetcd import ConfChangeType, MsgType
from tests.kit.basics import eventually, free_port
from tests.kit.exchange import Writer
from tests.kit.http import _http_ask, _http_keys
from tests.kit.processes import ClusterMember, StaticCluster, _members_embedded

# -- members come and go ------------------------------------------------------------


_MEMBERS_QUICK = ("-heartbeat-interval", "50", "-election-timeout", "300")


def _members_ids(member):
    """Name -> id, as `member` sees its cluster; "" is one that was not started."""
    listing = member.request("GET", "/v2/members")
    return {m["name"]: m["id"] for m in listing[1]["members"]}


def _members_join(cluster, via, name):
    """Add a member to the cluster through `via`, start it, and wait until it is published."""
    member = ClusterMember(cluster.directory, name)
    body = {"peerURLs": [member.peer]}
    added = eventually(lambda: requests.post(via.client + "/v2/members", json=body, timeout=10).ok)
    assert added
    listing = requests.get(via.client + "/v2/members", timeout=10).json()["members"]
    names = [f"{m['name'] or name}={url}" for m in listing for url in m["peerURLs"]]
    cluster.members.append(member)
    member.start("-initial-cluster", ",".join(names), "-initial-cluster-state", "existing",
                 *cluster.flags)
    member.process.wait_log("published")
    return member


def _members_change(cluster, via, method, id="", urls=()):
    """Change the members through `via` until it is done; they may refuse while links come up."""
    def changed():
        answer = requests.request(
            method, f"{via.client}/v2/members/{id}", json={"peerURLs": urls}, timeout=10)
        assert answer.ok or "unhealthy cluster" in answer.text, answer.text
        return answer.ok
    eventually(changed, what=f"{method} of member {id}")


def test_members_are_added_moved_and_replaced_under_load(tmp_path):
    """Until none of the first three is left; the leader is among those who go."""
    with StaticCluster(tmp_path, 3, *_MEMBERS_QUICK) as cluster:
        originals = list(cluster.members)
        with Writer(cluster) as writer:
            _members_join(cluster, originals[0], "fourth")
            leader = cluster.leader()
            moved = next(m for m in originals if m is not leader)
            moved.peer = f"http://127.0.0.1:{free_port()}"
            _members_change(cluster, leader, "PUT", _members_ids(leader)[moved.name], [moved.peer])
            assert moved.process.kill(signal.SIGTERM) == -signal.SIGTERM
            moved.start(*_MEMBERS_QUICK)
            moved.process.wait_log("published")
            for number, old in enumerate(
                    sorted(originals, key=lambda m: (m is not leader, m is not moved))):
                new = _members_join(cluster, old, f"new{number}")
                asked = old if number else cluster.members[3 - number]
                _members_change(cluster, asked, "DELETE", _members_ids(new)[old.name])
                cluster.members.remove(old)
                assert old.process.popen.wait(60) == 0
                assert "permanently removed from the cluster" in old.process.log()
            writer.wait_more(50)
        print(f"longest pause of the writer: {writer.pause_s:.1f} s")
        names = {"fourth", "new0", "new1", "new2"}
        for member in cluster.members:
            eventually(lambda m=member: m.index() == cluster.members[0].index())
            assert set(_members_ids(member)) == names
            nodes = member.request("GET", "/v2/keys/w")[1]["node"]["nodes"]
            missing = writer.acknowledged.keys() - {node["key"] for node in nodes}
            assert not missing, f"{member.name} lost {len(missing)} of {len(writer.acknowledged)}"


def test_members_one_survivor_makes_a_new_cluster_of_three(tmp_path):
    """-force-new-cluster: nothing is lost, the dead are removed, and others may join again."""
    with StaticCluster(tmp_path, 3, *_MEMBERS_QUICK) as cluster:
        survivor, dead, _ = cluster.members
        written = {f"k{number}" for number in range(50)}
        for key in written:
            assert cluster.members[1].put(key, key)[0] == 201
        eventually(lambda: survivor.index() == dead.index())
        for member in cluster.members[1:]:
            member.process.kill()
        survivor.process.kill()         # its disk may not know that the last writes are committed
        survivor.start(*_MEMBERS_QUICK, "-force-new-cluster")
        survivor.process.wait_log("forcing restart of member")
        survivor.process.wait_log("published")
        assert set(_members_ids(survivor)) == {"n0"}
        assert survivor.put("alone", "1")[0] == 201
        survivor.process.kill()                     # without the flag it stays what it is now
        survivor.start(*_MEMBERS_QUICK)
        survivor.process.wait_log("published")
        dead.start(*_MEMBERS_QUICK)
        assert dead.process.popen.wait(60) == 0
        assert "permanently removed from the cluster" in dead.process.log()
        for name in ("j1", "j2"):
            joined = _members_join(cluster, survivor, name)
        assert set(_members_ids(joined)) == {"n0", "j1", "j2"}
        eventually(lambda: joined.index() == survivor.index())
        nodes = joined.request("GET", "/v2/keys/")[1]["node"]["nodes"]
        assert {node["key"][1:] for node in nodes} == written | {"alone"}
        survivor.process.kill()
        cluster.put_through(joined, "after", "1")


def test_members_survivor_of_two_goes_on_when_the_leader_is_removed(tmp_path):
    """The leader dies right after it has answered; the other one must know what was committed."""
    with StaticCluster(tmp_path, 1, *_MEMBERS_QUICK) as cluster:
        for number in range(4):
            _members_join(cluster, cluster.members[0], f"j{number}")
            leader = cluster.leader()
            other = next(m for m in cluster.members if m is not leader)
            asked = (leader, other)[number % 2]
            gone = _members_ids(asked)[leader.name]
            answer = requests.delete(f"{asked.client}/v2/members/{gone}", timeout=10)
            leader.process.kill()
            assert answer.status_code == 204, answer.text
            assert "leadership transfer" in leader.process.log()
            cluster.members.remove(leader)
            assert cluster.put_through(other, "alone", str(number)) < 3
            assert set(_members_ids(other)) == {other.name}


@pytest.mark.parametrize("restarts", [False, True])
def test_members_one_without_its_data_does_not_vote_when_it_finds_out_late(tmp_path, restarts):
    """Nobody was up when it was started anew; the next one who is tells it of its past."""
    with StaticCluster(tmp_path, 3, *_MEMBERS_QUICK) as cluster:
        leader = cluster.leader()
        lost, stale = [m for m in cluster.members if m is not leader]
        for number in range(5):                         # with each, the disks hear of a commit
            assert stale.put("b", str(number))[0] in (200, 201)
        stale.process.kill()
        assert leader.put("a", "1")[0] == 201           # on the disks of two
        for member in (leader, lost):
            member.process.kill()
        shutil.rmtree(tmp_path / f"{lost.name}.etcd")
        cluster.start(lost)
        lost.process.wait_log("is starting a new election")
        if restarts:
            lost.process.kill()
            cluster.start(lost)
        cluster.start(stale)                            # with its vote, `a` would be lost
        assert lost.process.popen.wait(60) == 1
        line = lost.process.log().splitlines()[-1]
        assert "its data directory is lost" in line and "-initial-cluster-state existing" in line
        assert not re.search(r"elected leader \w+ at term [3-9]", stale.process.log())
        cluster.start(leader)
        eventually(lambda: stale.value("a") == "1")


def test_members_data_directory_of_another_cluster_is_ignored(tmp_path):
    """At the URL of a member: both sides say so, and the others go on without it."""
    with StaticCluster(tmp_path, 3, *_MEMBERS_QUICK) as cluster:
        strange = cluster.members[2]
        strange.process.kill()
        shutil.rmtree(tmp_path / "n2.etcd")
        strange.start("-initial-cluster", f"n2={strange.peer}", "-initial-cluster-token", "other")
        strange.process.wait_log("two clusters use one peer URL")
        assert "request cluster ID mismatch (got " in strange.process.log()
        for member in cluster.members[:2]:
            member.process.wait_log("request sent was ignored (cluster ID mismatch: remote[")
            assert "stop it and correct its -data-dir" in member.process.log()
            assert member.put("a", "1")[0] in (200, 201)
        assert strange.put("b", "1")[0] == 201 and cluster.members[0].value("b") is None


@pytest.mark.parametrize("takes_place", [False, True])
def test_members_copy_of_a_data_directory_is_refused(tmp_path, takes_place):
    """At a new URL, or at that of another member: the owner of the id stays undisturbed."""
    with StaticCluster(tmp_path, 3, *_MEMBERS_QUICK) as cluster:
        leader = cluster.leader()
        owner, other = [m for m in cluster.members if m is not leader]
        for number in range(20):
            assert leader.put("a", str(number))[0] in (200, 201)
        copy = ClusterMember(tmp_path, "copy")
        if takes_place:
            other.process.kill()
            copy.peer = other.peer
        shutil.copytree(tmp_path / f"{owner.name}.etcd", tmp_path / "copy.etcd")
        id = _members_ids(leader)[owner.name]
        before = leader.process.log()
        cluster.members.append(copy)
        copy.start(*_MEMBERS_QUICK)
        copy.process.wait_log(f"another process uses our member id {id}: one of the two was")
        said = f"two processes use member id {id}, with the peer URLs [{owner.peer}] and ["
        leader.process.wait_log(said)
        if takes_place:
            copy.process.wait_log("; our peer URL is that of another member: if it was not moved")
        for number in range(50):
            assert owner.put("b", str(number))[0] in (200, 201)
        after = leader.process.log()[len(before):]
        assert not re.search(f"with {id} became|(lost|elected|changed) leader", after), after
        copy.process.kill()
        assert copy.process.log().count("became leader") == 0


@pytest.mark.parametrize(("change", "id", "members", "active", "allowed"), [
    ("REMOVE", 3, 3, {1, 2}, True), ("REMOVE", 2, 3, {1, 2}, False), ("REMOVE", 1, 3, {2}, False),
    ("REMOVE", 2, 2, {1, 2}, True), ("REMOVE", 2, 5, {1, 2, 3, 4}, True),
    ("REMOVE", 2, 5, {1, 2, 3}, False), ("REMOVE", 2, 3, {1}, True), ("REMOVE", 9, 3, {1}, True),
    ("ADD", 9, 3, {1, 2, 3}, True), ("ADD", 9, 3, {1, 2}, False), ("ADD", 9, 5, {1, 2, 3, 4}, True),
    ("ADD", 9, 1, {1}, True), ("ADD", 9, 2, {1}, False), ("UPDATE", 2, 3, {1}, True),
])
def test_members_strict_check_counts_those_that_can_be_reached(
    change, id, members, active, allowed
):
    """Those that are up afterwards are a quorum; who is down may go; member 1 is asked."""
    cluster = pyetcd.Cluster()
    cluster.local_id = 1
    cluster.members = {each: pyetcd.Member(each, ()) for each in range(1, members + 1)}

    def check():
        cluster.check_active(
            ConfChangeType[change + "_NODE"], id, lambda member: float(member in active))
    if allowed:
        check()
    else:
        with pytest.raises(pyetcd.NotEnoughActive, match="unhealthy cluster: (add|remov)ing a me"):
            check()


def test_members_change_that_would_lose_the_quorum_is_refused(tmp_path):
    """One of three is down: a live one may not go, a fourth one may not come, the dead one may."""
    with StaticCluster(tmp_path, 3, *_MEMBERS_QUICK) as cluster:
        down, other = [m for m in cluster.members if m is not cluster.leader()]
        ids = _members_ids(other)
        down.process.kill()
        path = f"{other.client}/v2/members"
        other.process.wait_log(f"the connection with {ids[down.name]} became inactive")
        refused = requests.delete(f"{path}/{ids[cluster.leader().name]}", timeout=10)
        assert refused.status_code == 500
        assert refused.json()["message"] == (
            "etcdserver: unhealthy cluster: removing a member leaves 1 of 2 members that can be"
            " reached, and 2 are needed for a quorum; start those that are down, or remove them"
            " first, and try again")
        refused = requests.post(path, json={"peerURLs": ["http://127.0.0.1:1"]}, timeout=10)
        assert refused.status_code == 500 and "adding a member leaves 2 of 4" in refused.text
        assert other.put("a", "1")[0] == 201
        assert requests.delete(f"{path}/{ids[down.name]}", timeout=10).status_code == 204
        cluster.members.remove(down)
        _members_join(cluster, other, "n3")
        assert cluster.members[-1].value("a") == "1"


@pytest.mark.parametrize("asked", [0, 1])
def test_members_leader_does_not_commit_its_own_removal(tmp_path, asked):
    """What it says of that commit may be lost, here by force, and itself be gone."""
    with _members_embedded(tmp_path, 2) as servers:
        leader, other = servers

        def lose_commits(etcd):
            known = etcd.node.raft.log.commit
            etcd.transport.drop = lambda m: m.sender == etcd.member_id and m.commit > known
            return f"{etcd.member_id:x}"

        gone = leader.call(lose_commits)
        status, _, _ = _http_ask(servers[asked], "DELETE", "/v2/members/" + gone)
        assert status == 204
        leader.kill()
        assert _http_keys(other, "PUT", "/a", "value=1")[0] == 201


def test_members_leader_without_an_heir_commits_its_own_removal(tmp_path, caplog):
    """The other one cannot take over: after one election timeout it is done directly, once."""
    caplog.set_level(logging.INFO)
    with _members_embedded(tmp_path, 2) as (leader, other):
        def refuse_to_lead(etcd):
            etcd.transport.drop = lambda m: m.type == MsgType.TIMEOUT_NOW

        other.call(refuse_to_lead)
        gone = leader.call(lambda etcd: f"{etcd.member_id:x}")
        acknowledged, ended = [], threading.Event()

        def write():
            for number in itertools.count():
                if ended.is_set() or _http_keys(leader, "POST", "/q", f"value={number}")[0] != 201:
                    return
                acknowledged.append(str(number))

        writer = threading.Thread(target=write)
        writer.start()
        eventually(lambda: len(acknowledged) > 5)
        assert _http_ask(leader, "DELETE", "/v2/members/" + gone)[0] == 204
        ended.set()
        writer.join()
        assert sum("leadership transfer" in line for line in caplog.messages) == 1
        assert leader._server.wait() == 0
        assert _http_keys(other, "PUT", "/a", "value=1")[0] == 201
        nodes = _http_keys(other, "GET", "/q?sorted=true")[1]["node"]["nodes"]
        values = [node["value"] for node in nodes]
        assert values[:len(acknowledged)] == acknowledged and len(set(values)) == len(values)
