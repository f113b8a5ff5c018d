"""Cluster, apply: who the members are, and what entries do."""

from __future__ import annotations

import json

import pytest

import pyetcd
from pyetcd import Applier, Cluster, Entry, EntryType, Member, Request, Store
from tests.kit.clusters import (
    _CLUSTER_NOW_NS,
    _apply_publish,
    _apply_put,
    _cluster_add,
    _cluster_of,
    _cluster_state,
    _cluster_url,
)

# -- apply -----------------------------------------------------------------------

_APPLY_TABLE = [
    ("PUT", {}, "set", {}),
    ("PUT", {"dir": True, "expiration": 7}, "set", {"dir": True, "expires_ns": 7}),
    ("PUT", {"refresh": True, "expiration": 7}, "set", {"refresh": True, "expires_ns": 7}),
    ("PUT", {"prev_exist": False, "prev_index": 3, "prev_value": "x"}, "create", {}),
    ("PUT", {"prev_exist": True, "expiration": 7}, "update", {"expires_ns": 7}),
    ("PUT", {"prev_exist": True, "refresh": True}, "update", {"refresh": True}),
    ("PUT", {"prev_exist": True, "prev_index": 3}, "compare_and_swap", {"prev_index": 3}),
    ("PUT", {"prev_exist": True, "prev_value": "x"}, "compare_and_swap", {"prev_value": "x"}),
    ("PUT", {"prev_index": 3}, "compare_and_swap", {"prev_index": 3}),
    ("PUT", {"prev_value": "x", "refresh": False}, "compare_and_swap", {"prev_value": "x"}),
    ("POST", {"prev_index": 3, "prev_exist": True}, "create", {"unique": True}),
    ("DELETE", {}, "delete", {"dir": False, "recursive": False}),
    ("DELETE", {"dir": True, "recursive": True}, "delete", {"dir": True, "recursive": True}),
    ("DELETE", {"prev_exist": True}, "delete", {}),
    ("DELETE", {"prev_index": 3}, "compare_and_delete", {"prev_index": 3}),
    ("DELETE", {"prev_value": "x"}, "compare_and_delete", {"prev_value": "x"}),
    ("QGET", {"recursive": True, "sorted": True}, "get", {"recursive": True}),
]


class _ApplySpy:
    """Stands for the store and notes what it is asked."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        def call(*args, **options):
            self.calls.append((name, args, options))
            return name
        return call


@pytest.mark.parametrize(("method", "fields", "operation", "options"), _APPLY_TABLE, ids=[
    " ".join([row[0], *(f"{key}={value}" for key, value in row[1].items())])
    for row in _APPLY_TABLE
])
def test_apply_dispatches_like_etcd(method, fields, operation, options):
    """keys API 3.1: which operation of the store a request is, and with what."""
    spy = _ApplySpy()
    applier = Applier(spy, Cluster(), 1, clock=lambda: 42)
    request = Request(method=method, path="/1/k", val="v", **fields)
    assert applier.apply_request(request) == operation
    ((name, args, given),) = spy.calls
    assert (name, args, given["now_ns"]) == (operation, ("/1/k",), 42)
    assert {key: given[key] for key in options} == options
    if name not in ("get", "delete", "compare_and_delete"):
        assert given["value"] == "v"
    if name == "create":
        assert not given.get("refresh") and given.get("unique", False) == (method == "POST")


@pytest.mark.parametrize("fields", [
    {"path": "/1/\udcff"}, {"path": "/1/d\udc80/a", "dir": True}, {"val": "v\udcfe"},
    {"prev_value": "\udcfe"}, {"path": "/2/users/\udcff"},
    {"path": "/0/members/1/attributes", "val": '{"name":"\udcff","clientURLs":["\udcfe"]}'},
    {"path": "/0/members/1/attributes", "val": '{"name":"\\ud800"}'},
], ids=["key", "directory", "value", "prevValue", "user", "attributes", "half a pair"])
def test_apply_what_is_not_utf8_is_the_same_before_and_after_a_restart(fields):
    """From peers and old logs: a member that recovered a snapshot in between agrees with one
    that did not."""
    def entry(**changed):
        request = Request(**{"id": 7, "method": "PUT", "path": "/1/k", "val": "v", **changed})
        return Entry(data=pyetcd.encode_request(request))

    def state(applier, store, cluster, entries):
        shown = [applier.apply_entry(one) for one in entries]
        results = [getattr(one, "action", None) or getattr(one, "code", None) for one in shown]
        return results, json.loads(store.save()), cluster.members

    cluster, store, applier = _cluster_of(1)
    before, after = entry(**fields), [
        entry(**fields), entry(path="/1/k", prev_value="v\udcfe"),
        entry(path="/1/k", prev_value="v\udcfd"), entry(path="/1/\udcff", prev_exist=False)]
    applier.apply_entry(before)
    restarted = Store()
    restarted.recover(store.save())
    again = Cluster(restarted)
    again.id = cluster.id
    again.recover()
    other = Applier(restarted, again, 1, clock=lambda: 1)
    assert again.members == cluster.members
    assert state(applier, store, cluster, after) == state(other, restarted, again, after)


def test_apply_sync_expires_by_the_time_of_the_entry():
    """Never by the clock of this member: all expire the same keys at the same index."""
    _, store, applier = _cluster_of(1)
    applier.clock = lambda: 10 * _CLUSTER_NOW_NS
    _apply_put(applier, "/1/a", expiration=_CLUSTER_NOW_NS + 5)
    _apply_put(applier, "/1/b", expiration=_CLUSTER_NOW_NS + 6)
    assert applier.apply_request(Request(method="SYNC", time=_CLUSTER_NOW_NS + 5)) is None
    assert (store.value("/1/a"), store.value("/1/b")) == (None, "v")


def test_apply_returns_the_error_of_the_store():
    """An error is a result like any other: it must not stop the apply loop."""
    _, store, applier = _cluster_of(1)
    result = _apply_put(applier, "/1/none", prev_exist=True)
    assert isinstance(result, pyetcd.KeyNotFound) and result.index == store.current_index
    unknown = applier.apply_request(Request(method="PATCH", path="/1/a"))
    assert isinstance(unknown, pyetcd.RaftInternal) and "PATCH" in unknown.cause


def test_apply_entry_decodes_once_and_passes_over_what_is_not_v2():
    """The request stays with the entry; a leader's first entry and v3 operations do nothing."""
    _, store, applier = _cluster_of(1)
    before = store.current_index
    request = Request(id=7, method="PUT", path="/1/a", val="x")
    entry = Entry(EntryType.NORMAL, 1, 9, pyetcd.encode_request(request))
    assert applier.apply_entry(entry).action == "set" and entry.request == request
    known = Entry(EntryType.NORMAL, 1, 10, b"not looked at", request)
    assert applier.apply_entry(known).action == "set"
    v3 = Entry(EntryType.NORMAL, 1, 11, b"\x08\x05\x22\x03\x0a\x01a")
    assert applier.apply_entry(v3) is None and v3.request is None
    assert applier.apply_entry(Entry(EntryType.NORMAL, 1, 12)) is None
    assert store.current_index == before + 2


def test_apply_publish_updates_the_member_and_the_store():
    """The plain PUT of /0/members/<id>/attributes."""
    cluster, store, applier = _cluster_of(0xAB)
    event = _apply_publish(applier, 0xAB, "n")
    assert event.action == "set"
    assert cluster.members[0xAB] == Member(
        0xAB, (_cluster_url(0xAB),), "n", ("http://10.0.0.171:2379",))


@pytest.mark.parametrize("fields", [
    {"prev_exist": True}, {"prev_exist": False}, {"prev_value": "x"}, {"prev_index": 1},
])
def test_apply_only_the_plain_put_publishes(fields):
    """Other forms go to the store alone, as in etcd."""
    cluster, _, applier = _cluster_of(1)
    _apply_put(applier, "/0/members/1/attributes", '{"name":"x"}', **fields)
    assert cluster.members[1].name == ""


@pytest.mark.parametrize("path", [
    "/1/0/members/1/attributes", "/1/members/1/attributes", "/1/0/version", "/1/version",
    "/0/members/1/attributes/x", "/0/members/1/raftAttributes2",
    "/0/members/11112222333344445/attributes",
])
def test_apply_keys_that_look_like_cluster_keys_are_ordinary(path):
    """The whole path is compared; etcd finds its pattern anywhere in it."""
    cluster, store, applier = _cluster_of(1)
    event = _apply_put(applier, path, '{"name":"x"}')
    assert event.action == "set" and store.value(path) == '{"name":"x"}'
    assert cluster.members[1].name == "" and cluster.version is None


def test_apply_attributes_of_a_removed_member_do_nothing():
    """Its last publish came too late: no store write, no index."""
    cluster, store, applier = _cluster_of(1, removed=(5,))
    before = _cluster_state(cluster, store)
    assert _apply_publish(applier, 5) is None
    assert _cluster_state(cluster, store) == before


def test_apply_attributes_of_an_unknown_member_are_logged_and_ignored(cluster_log):
    """etcd panics here; members of the flags that are not yet applied are unknown everywhere."""
    cluster, store, applier = _cluster_of(1)
    cluster.members[7] = Member(7, (_cluster_url(7),))
    before = _cluster_state(cluster, store)
    assert _apply_publish(applier, 7) is None
    assert _cluster_state(cluster, store) == before
    assert cluster_log.messages[-1] == "ignored the attributes of unknown member 7"


def test_apply_version_sets_the_cluster_version(cluster_log):
    """In memory and in the store; the log lines are those of etcd."""
    cluster, store, applier = _cluster_of(1)
    cluster_log.clear()
    for version in ("2.2.0", "2.3.0", "2.3.0"):
        assert _apply_put(applier, "/0/version", version).action == "set"
    assert (cluster.version, store.value("/0/version")) == ("2.3.0", "2.3.0")
    assert cluster_log.messages == [
        "set the initial cluster version to 2.2", "updated the cluster version from 2.2 to 2.3",
    ]


@pytest.mark.parametrize("version", ["2.4.0", "3.0.0", "10.0.0"])
@pytest.mark.parametrize("from_store", [False, True], ids=["entry", "store"])
def test_apply_newer_cluster_version_is_fatal(version, from_store):
    """A program older than its cluster must not go on."""
    cluster, store, applier = _cluster_of(1)
    with pytest.raises(pyetcd.InvariantError) as caught:
        if from_store:
            store.set("/0/version", value=version, now_ns=0)
            cluster.recover()
        else:
            _apply_put(applier, "/0/version", version)
    assert str(caught.value).startswith(
        "cluster cannot be downgraded (current version: 2.3.8 is lower than determined cluster"
        f" version: {version.rpartition('.')[0]}).")


def test_apply_is_the_same_on_every_member():
    """Two appliers with other clocks and ids end in the same store."""
    requests = [
        Request(method="PUT", path="/1/a", val="1", expiration=_CLUSTER_NOW_NS + 50),
        Request(method="POST", path="/1/q", val="2"),
        Request(method="PUT", path="/1/a", val="3", prev_value="1"),
        Request(method="PUT", path="/0/version", val="2.3.0"),
        Request(method="DELETE", path="/1/none"),
        Request(method="SYNC", time=_CLUSTER_NOW_NS + 100),
    ]
    states = []
    for id, now_ns in ((1, 0), (2, 9 * _CLUSTER_NOW_NS)):
        store = pyetcd.Store()
        applier = Applier(store, Cluster(store), id, clock=lambda now_ns=now_ns: now_ns)
        for member in (1, 2):
            applier.apply_conf_change(_cluster_add(member))
        for request in requests:
            applier.apply_request(request)
        state = json.loads(store.save())
        states.append((state["Root"], state["CurrentIndex"]))
    assert states[0] == states[1]
