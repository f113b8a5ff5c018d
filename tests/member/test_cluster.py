"""Cluster, apply: who the members are, and what entries do."""

from __future__ import annotations

import io
import itertools
import json
import logging

import pytest

import pyetcd
from pyetcd import Cluster, ConfChange, ConfChangeType, Member
from tests.kit.clusters import (
    _apply_publish,
    _apply_put,
    _cluster_change,
    _cluster_of,
    _cluster_state,
    _cluster_url,
)
from tests.kit.reactors import FakeReactor

_CLUSTER_ARTICLE_TOKEN = "https://discovery.etcd.io/9dfd14389c921bdde47847f13b7f51cb"


# -- ids -----------------------------------------------------------------------


def test_cluster_ids_of_the_article():
    """The token of discovery is the whole URL; the name is not hashed."""
    initial = {
        f"machine{number}": (f"http://127.0.0.1:{port}",)
        for number, port in enumerate((2380, 22380, 32380), 1)
    }
    cluster = Cluster.from_initial(_CLUSTER_ARTICLE_TOKEN, initial)
    ids = {member.name: pyetcd.format_id(id) for id, member in cluster.members.items()}
    assert ids == {
        "machine1": "a956683cc771ba75", "machine2": "2307dad4ec70be21",
        "machine3": "6693db807ca7130f",
    }
    assert pyetcd.format_id(cluster.id) == "31fef011866a5fd7"


def test_cluster_ids_of_the_recording():
    """The data directory of 2.3.8 was made with this URL and token."""
    id = pyetcd.member_id(["http://127.0.0.1:31002"], "fixture-token")
    assert pyetcd.format_id(id) == "a80a825915e9e126"
    assert pyetcd.format_id(pyetcd.cluster_id([id])) == "c2403409e85ab695"


def test_cluster_member_id_hashes_sorted_urls_token_and_time():
    """Order of the URLs does not matter; a member added at run time hashes the time too."""
    urls = ["http://b:1", "http://a:1"]
    assert pyetcd.member_id(urls, "t") == pyetcd.member_id(urls[::-1], "t")
    by_hand = pyetcd._hash_id(b"http://a:1http://b:11448000000")
    assert pyetcd.member_id(urls, "1448000000") == by_hand
    assert len({pyetcd.member_id(urls, token) for token in ("t", "u", "")}) == 3


def test_cluster_id_does_not_depend_on_the_order():
    """Members are sorted by number; an id of 15 digits is printed with 15."""
    assert len({pyetcd.cluster_id(ids) for ids in itertools.permutations((3, 2**63, 11))}) == 1
    assert pyetcd.format_id(0xD3C8FC06750E7F5) == "d3c8fc06750e7f5"


def test_cluster_identical_ids_are_refused():
    """Two names with the same URLs are one member."""
    with pytest.raises(ValueError, match="member exists with identical ID"):
        Cluster.from_initial("t", {"a": ("http://a:1",), "b": ("http://a:1",)})


# -- text forms ------------------------------------------------------------------


@pytest.mark.parametrize(("text", "expected"), [
    ("a=http://a:1", {"a": ("http://a:1",)}),
    ("a=http://b:2,a=http://a:1", {"a": ("http://a:1", "http://b:2")}),
    (" a=http://a:1 , ,b=https://b:2,", {"a": ("http://a:1",), "b": ("https://b:2",)}),
    ("a=http://[::1]:2380", {"a": ("http://[::1]:2380",)}),
    ("", {}),
], ids=["one", "repeated name", "blanks", "ipv6", "empty"])
def test_cluster_initial_cluster_is_parsed(text, expected):
    """name=url pairs; a name may repeat, empty pieces are skipped, URLs are sorted."""
    assert pyetcd.parse_initial_cluster(text) == expected


@pytest.mark.parametrize(("text", "words"), [
    ("a", "Empty URL given for"),
    ("a=", "Empty URL given for"),
    ("=http://a:1", "write name=url"),
    ("a=ftp://a:1", "URL scheme must be http or https: ftp://a:1"),
    ("a=a:1", "URL scheme must be http or https: a:1"),
    ("a=http://a", 'URL address does not have the form "host:port": http://a'),
    ("a=http://a:1/", "URL must not contain a path: http://a:1/"),
    ("a=http://a:1,b=http://b:x", "parse \"http://b:x\""),
])
def test_cluster_initial_cluster_errors_use_the_words_of_etcd(text, words):
    """Each names what is wrong; the caller says which flag."""
    with pytest.raises(ValueError, match=".*") as caught:
        pyetcd.parse_initial_cluster(text)
    assert words in str(caught.value)


def test_cluster_initial_cluster_is_printed_sorted():
    """All pairs sorted as text; reads back the same."""
    text = pyetcd.format_initial_cluster({"b": ("http://b:1",), "a": ("http://z:1", "http://c:1")})
    assert text == "a=http://c:1,a=http://z:1,b=http://b:1"
    assert pyetcd.format_initial_cluster(pyetcd.parse_initial_cluster(text)) == text


def test_cluster_member_json_forms():
    """Decimal id and no empty parts between peers; hexadecimal and all parts for clients."""
    bare = Member(2**64 - 1, ("http://a:1?x=<&>",))
    full = Member(10, ("http://a:1",), "n", ("http://a:2",))
    assert bare.context_json() == (
        '{"id":18446744073709551615,"peerURLs":["http://a:1?x=\\u003c\\u0026\\u003e"]}')
    assert full.context_json() == (
        '{"id":10,"peerURLs":["http://a:1"],"name":"n","clientURLs":["http://a:2"]}')
    assert full.client_json() == (
        '{"id":"a","name":"n","peerURLs":["http://a:1"],"clientURLs":["http://a:2"]}')
    assert bare.client_json().endswith('"clientURLs":[]}')
    assert full.attributes_json() == '{"name":"n","clientURLs":["http://a:2"]}'
    assert full.raft_attributes_json() == '{"peerURLs":["http://a:1"]}'
    assert pyetcd.parse_member(full.context_json().encode(), 10) == full
    assert pyetcd.parse_member(bare.context_json().encode(), bare.id) == bare
    assert (full.started, bare.started) == (True, False)


@pytest.mark.parametrize("context", [b"", b"[]", b"{", b"\xff", b"7"])
def test_cluster_nonsense_in_a_context_is_a_codec_error(context):
    """It is data from the log, so not a mistake of the caller."""
    with pytest.raises(pyetcd.CodecError, match="not a member"):
        pyetcd.parse_member(context, 1)


# -- changes ---------------------------------------------------------------------


@pytest.mark.parametrize(("change", "error"), [
    (_cluster_change("add", 9, _cluster_url(9)), None),
    (_cluster_change("add", 9, "http://new:1", _cluster_url(2)), pyetcd.PeerUrlExists),
    (_cluster_change("add", 2, "http://new:1"), pyetcd.MemberExists),
    (_cluster_change("add", 2, _cluster_url(1)), pyetcd.MemberExists),
    (_cluster_change("add", 5, _cluster_url(9)), pyetcd.MemberRemoved),
    (_cluster_change("add", 9, _cluster_url(5)), None),
    (_cluster_change("remove", 2), None),
    (_cluster_change("remove", 9), pyetcd.MemberNotFound),
    (_cluster_change("remove", 5), pyetcd.MemberRemoved),
    (_cluster_change("update", 2, "http://new:1"), None),
    (_cluster_change("update", 2, _cluster_url(2)), None),
    (_cluster_change("update", 2, _cluster_url(1)), pyetcd.PeerUrlExists),
    (_cluster_change("update", 9, "http://new:1"), pyetcd.MemberNotFound),
    (_cluster_change("update", 5, "http://new:1"), pyetcd.MemberRemoved),
    (ConfChange(1, ConfChangeType.ADD_NODE, 9, b'{"id":9,"peerURLs":null}'), None),
], ids=[
    "add", "add url taken", "add known", "add known url taken", "add removed",
    "add url of a removed one", "remove", "remove unknown", "remove twice", "update",
    "update same url", "update url taken", "update unknown", "update removed", "add without urls",
])
def test_cluster_change_is_validated_by_what_is_applied(change, error):
    """Members 1 and 2, and 5 was removed: an invalid change leaves everything as it is."""
    cluster, store, applier = _cluster_of(1, 2, removed=(5,))
    before = _cluster_state(cluster, store)
    result = applier.apply_conf_change(change)
    assert type(result) is (type(None) if error is None else error)
    assert (_cluster_state(cluster, store) == before) == (error is not None)


def test_cluster_members_of_the_flags_are_not_yet_applied():
    """Every initial member applies the additions of all, its own included."""
    cluster = Cluster.from_initial("t", {"a": (_cluster_url(1),), "b": (_cluster_url(2),)})
    cluster.store = pyetcd.Store()
    assert len(cluster.members) == 2
    for member in sorted(cluster.members.values()):
        assert not cluster.is_known(member.id)
        change = ConfChange(0, ConfChangeType.ADD_NODE, member.id, member.context_json().encode())
        assert cluster.validate_change(change) == member
        cluster.add(member)
        with pytest.raises(pyetcd.MemberExists):
            cluster.validate_change(change)


def test_cluster_changes_use_as_many_store_indexes_as_etcd(cluster_log):
    """add 1, update 1, publish 1, remove 2: other members compute the same numbers."""
    cluster, store, applier = _cluster_of(1, 2)
    indexes = [store.current_index]
    steps = [
        lambda: applier.apply_conf_change(_cluster_change("update", 2, "http://new:1")),
        lambda: _apply_publish(applier, 2),
        lambda: applier.apply_conf_change(_cluster_change("remove", 2)),
        lambda: applier.apply_conf_change(_cluster_change("remove", 2)),
    ]
    for step in steps:
        step()
        indexes.append(store.current_index)
    assert indexes == [2, 3, 4, 6, 6]
    assert store.value("/0/removed_members/2") == "" and store.children("/0/members/2") == []
    assert (sorted(cluster.members), cluster.removed) == ([1], {2})
    assert cluster.is_removed(2) and not cluster.is_removed(1)
    for line in (
        "added local member 1 [http://10.0.0.1:2380] to cluster c1",
        "added member 2 [http://10.0.0.2:2380] to cluster c1",
        "update member 2 [http://new:1] in cluster c1",
        "removed member 2 from cluster c1",
    ):
        assert line in cluster_log.messages


def test_cluster_store_values_are_those_of_etcd():
    """Other members of an old cluster read them."""
    _, store, applier = _cluster_of(0xAB)
    _apply_publish(applier, 0xAB, "n")
    assert store.value("/0/members/ab/raftAttributes") == '{"peerURLs":["http://10.0.0.171:2380"]}'
    assert json.loads(store.value("/0/members/ab/attributes"))["name"] == "n"
    assert store.children("/0/members/ab") == [("raftAttributes", False), ("attributes", False)]


def test_cluster_is_rebuilt_from_the_store(cluster_log):
    """After a snapshot members, removed ids and version are what /0 says, and nothing else."""
    _, store, applier = _cluster_of(1, 0xABC, removed=(5,))
    _apply_publish(applier, 0xABC, "n")
    _apply_put(applier, "/0/version", "2.3.0")
    copy = pyetcd.Store()
    copy.recover(store.save())
    cluster = Cluster(copy)
    cluster.id, cluster.local_id, cluster.members = 0xC1, 1, {77: Member(77, ())}
    cluster_log.clear()

    cluster.recover()

    assert cluster.members == {
        1: Member(1, (_cluster_url(1),)),
        0xABC: Member(0xABC, (_cluster_url(0xABC),), "n", ("http://10.0.0.2748:2379",)),
    }
    assert (cluster.removed, cluster.version) == ({5}, "2.3.0")
    assert cluster.member_by_name("n").id == 0xABC and cluster.member_by_name("x") is None
    assert cluster.client_urls() == ["http://10.0.0.2748:2379"]
    assert sorted(cluster.peer_urls()) == [_cluster_url(1), _cluster_url(0xABC)]
    assert cluster_log.messages == [
        "added local member 1 [http://10.0.0.1:2380] to cluster c1 from store",
        "added member abc [http://10.0.0.2748:2380] to cluster c1 from store",
        "set the cluster version to 2.3 from store",
    ]


def test_cluster_recover_forgets_a_version_that_the_store_lacks():
    """The snapshot decides, also about what is not there."""
    cluster, store, applier = _cluster_of(1)
    empty = store.save()
    _apply_put(applier, "/0/version", "2.3.0")
    store.recover(empty)
    cluster.recover()
    assert cluster.version is None


@pytest.mark.parametrize(("started", "members", "allowed"), [
    (1, 1, True), (0, 1, False), (2, 2, True), (1, 2, False), (2, 3, False), (3, 3, True),
    (3, 4, True), (2, 4, False),
])
def test_cluster_strict_add(started, members, allowed):
    """With one more, the started ones must still be a quorum; one member may always grow."""
    _cluster_strict(started, members, allowed, ConfChangeType.ADD_NODE)


@pytest.mark.parametrize(("started", "members", "allowed"), [
    (3, 3, True), (2, 3, False), (2, 2, True), (4, 5, True), (3, 5, False),
])
def test_cluster_strict_remove_of_a_started_member(started, members, allowed):
    """Of the rest, the started ones must be a quorum; member 1 is a started one."""
    _cluster_strict(started, members, allowed, ConfChangeType.REMOVE_NODE)


def _cluster_strict(started, members, allowed, change):
    cluster = Cluster()
    cluster.members = {
        id: Member(id, (), "name" if id <= started else "") for id in range(1, members + 1)
    }
    if allowed:
        cluster.check_strict(change, 1)
    else:
        with pytest.raises(pyetcd.NotEnoughStarted, match="not enough started members"):
            cluster.check_strict(change, 1)


def test_cluster_strict_refusal_is_logged_like_etcd(cluster_log):
    """The client only sees a 500; the operator reads why."""
    cluster = Cluster()
    cluster.members = {id: Member(id, (), "n" if id == 1 else "") for id in (1, 2)}
    with pytest.raises(pyetcd.NotEnoughStarted):
        cluster.check_strict(ConfChangeType.ADD_NODE, 9)
    assert cluster_log.messages == [
        "Reject add member request: the number of started member (1) will be less than the"
        " quorum number of the cluster (2)"
    ]


def test_cluster_learner_of_etcd_3_4_gets_its_vote_by_promotion(cluster_log):
    """The store holds what 3.4 writes, and only the promotion makes a voter; the log warns."""
    cluster, store, applier = _cluster_of(1)
    path = "/0/members/7/raftAttributes"
    context = json.dumps({"id": 7, "peerURLs": [_cluster_url(7)], "isLearner": True}).encode()
    assert applier.apply_conf_change(
        ConfChange(1, ConfChangeType.ADD_LEARNER, 7, context)) is None
    assert json.loads(store.value(path)) == {"peerURLs": [_cluster_url(7)], "isLearner": True}
    _apply_publish(applier, 7)
    assert cluster.members[7].is_learner
    assert "member 7 is a learner, which gets the log from a leader of etcd" in cluster_log.text

    index = store.current_index
    promotion = b'{"id":7,"peerURLs":null,"isPromote":true}'
    assert applier.apply_conf_change(
        ConfChange(2, ConfChangeType.ADD_NODE, 7, promotion)) is None
    assert json.loads(store.value(path)) == {"peerURLs": [_cluster_url(7)]}
    assert store.current_index == index + 1
    assert not cluster.members[7].is_learner and cluster.members[7].name == "m"
    for again in (7, 8):            # it votes already; nobody
        assert applier.apply_conf_change(
            ConfChange(3, ConfChangeType.ADD_NODE, again, promotion)) is not None


@pytest.mark.parametrize("name, own, versions, wanted", [
    ("2.3", "2.3.8", ("2.3.8", "2.3.8"), None),
    ("3.4", "3.4.23", ("2.3.8", "3.4.23"), None),
    ("3.4", "3.4.23", ("3.4.23", "3.4.23"), "3.4.0"),
    ("bridge", "2.3.8", ("2.3.8", "3.4.23"), None),
], ids=["2.3", "one of 2.3", "all of 3.4", "bridge"])
def test_cluster_version_is_that_of_the_oldest_member(name, own, versions, wanted):
    """Whatever this member announces, a member of 2.3 would end at a higher one."""
    assert pyetcd.IDENTITIES[name].reported == own
    assert _monitored("2.3.0", name, *versions) == wanted


@pytest.mark.parametrize("name, versions, wanted", [
    ("bridge", ("2.3.8", "2.3.8"), "2.3.0"),
    ("bridge", ("2.3.8", "3.4.23"), None),
    ("3.4", ("2.3.8", "2.3.8"), None),
], ids=["all of 2.3", "one of 3.4", "not by 3.4"])
def test_cluster_version_is_lowered_by_a_bridge_where_nobody_has_more(name, versions, wanted):
    assert _monitored("3.4.0", name, *versions) == wanted


def _monitored(current, name, *versions):
    """The version that a leader proposes whose peers report `versions`; None: it lets it be."""
    cluster, _, _ = _cluster_of(1, *range(2, 2 + len(versions)))
    cluster.identity = pyetcd.IDENTITIES[name]
    cluster.version = current
    proposed = []
    monitor = pyetcd.VersionMonitor(
        FakeReactor(), cluster, lambda request, done: proposed.append(request.val))
    monitor._ask = lambda member, url: monitor._versions.update(
        {member.id: versions[member.id - 2]})
    monitor.start()
    return proposed[0] if proposed else None


def test_cluster_guard_and_entries_go_by_the_identity():
    """A member that acts as 3.4 lives in a cluster of 3.4, and with 2.3 it says what to do."""
    cluster, _, applier = _cluster_of(1)
    entry = pyetcd.Entry(data=pyetcd.encode_request(
        pyetcd.Request(id=1, method="PUT", path="/0/version", val="3.4.0")))
    with pytest.raises(pyetcd.CodecError, match="newer than this program"):
        pyetcd.check_entry(entry, cluster.identity)
    with pytest.raises(pyetcd.InvariantError, match="downgraded.* -compat-version 3.4"):
        cluster.set_version("3.4.0")
    cluster.identity = pyetcd.IDENTITIES["3.4"]
    pyetcd.check_entry(entry, cluster.identity)
    cluster.set_version("3.4.0")
    with pytest.raises(pyetcd.InvariantError, match="cannot be downgraded"):
        cluster.set_version("3.5.0")
    assert not cluster.was_lowered
    cluster.set_version("2.3.0")
    assert cluster.was_lowered


def _v3_entry(*fields):
    """An InternalRaftRequest with an id and these fields, empty."""
    data = b"\x08\x01" + b"".join(
        pyetcd.encode_varint(number << 3 | 2) + b"\0" for number in fields)
    return pyetcd.Entry(term=1, index=9, data=data)


def test_cluster_v3_entries_are_counted_and_remembered(tmp_path, cluster_log):
    """An alarm is no data; of writes there is one warning, and a file for the next start."""
    cluster, store, applier = _cluster_of(1)
    cluster.v3_mark = pyetcd.V3Mark(str(tmp_path))
    before = store.current_index
    assert applier.apply_entry(_v3_entry(10)) is None and not cluster.v3_mark.is_set
    for field in (4, 6, 8, 1100):
        assert applier.apply_entry(_v3_entry(field)) is None

    assert applier.v3_entries == 5 and store.current_index == before
    warnings = [r.message for r in cluster_log.records if r.levelno >= logging.WARNING]
    assert len(warnings) == 1 and "entry 9 of the log holds data of etcd's v3 API" in warnings[0]
    assert pyetcd.V3Mark(str(tmp_path)).is_set


@pytest.mark.parametrize("buckets, holds", [
    ({}, False), ({b"key": [(b"k", b"v")]}, True), ({b"authUsers": [(b"u", b"v")]}, True),
], ids=["empty", "key", "user"])
def test_cluster_v3_data_is_found_behind_a_snapshot(buckets, holds):
    file = io.BytesIO(b"a message")
    file.seek(0, io.SEEK_END)
    body = io.BytesIO()
    pyetcd.write_bolt(body, {**pyetcd.v3_buckets(5), **buckets})
    file.write(body.getvalue())
    file.seek(len(b"a message"))
    assert pyetcd.holds_v3_data(file) is holds


def test_cluster_v3_database_is_written_beside_snapshots_unless_it_holds_data(tmp_path):
    (tmp_path / "snap").mkdir()
    mark, database = pyetcd.V3Mark(str(tmp_path)), tmp_path / "snap" / "db"
    mark.write_database(7)
    with pyetcd.BoltReader(str(database)) as reader:
        assert dict(reader.items(b"meta"))[b"consistent_index"] == (7).to_bytes(8, "big")
    mark.remove_database()
    assert not database.exists()

    with open(database, "wb") as file:
        pyetcd.write_bolt(file, {**pyetcd.v3_buckets(7), b"key": [(b"k", b"v")]})
    mark = pyetcd.V3Mark(str(tmp_path))
    mark.write_database(9)
    mark.remove_database()
    assert mark.is_set and pyetcd.holds_v3_data(open(database, "rb"))


def test_cluster_member_publishes_again_until_it_is_applied(cluster_log):
    """After a snapshot, which may have swallowed the first proposal; and after an error."""
    cluster, _, _ = _cluster_of(1)
    proposed, done, reactor = [], [], FakeReactor()
    publication = pyetcd.Publication(
        pyetcd.ServerConfig(name="m1"), cluster, reactor,
        lambda request, answer: proposed.append(answer), lambda: done.append(1))
    publication.propose()
    publication.propose()
    first, second = proposed
    first(pyetcd.RequestTimeout("lost"))
    reactor.next_timer()
    second(None)
    proposed[2](pyetcd.RequestTimeout("late"))
    publication.propose()
    assert (done, reactor.timers, len(proposed)) == ([1], [], 3)
    assert sum("published {Name:m1" in line for line in cluster_log.messages) == 1
