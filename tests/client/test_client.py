"""Helpers of all sections."""

from __future__ import annotations

import contextlib
import copy
import datetime
import functools
import inspect
import json
import math
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import urllib.parse
import urllib.request
import warnings
from pathlib import Path
from typing import List

import pytest

import pyetcd
import pyetcd_client
from pyetcd_client import Client
from tests.kit.basics import eventually, free_port, manual, manual_code
from tests.kit.clients import (
    _CLIENT_GOOD,
    _CLIENT_HALF,
    _CLIENT_HEAD,
    _CLIENT_KINDS,
    _CLIENT_NODE,
    _CLIENT_TIMED_OUT,
    _CLIENT_WAIT_S,
    _client_background,
    _client_blurred,
    _client_dead_url,
    _client_etcdctl,
    _client_event,
    _client_hang_up,
    _client_main,
    _client_python,
    _client_reply,
    _client_running,
    _ClientRawServer,
)
from tests.kit.processes import compiled


def manual_commands(page: str, chapter: str) -> List[str]:
    """Return the commands that a chapter shows after `$ `, each on one line."""
    text = manual(page, chapter).replace("\\\n", " ")
    return [re.sub(r"  +(#.*)?", " ", line).strip()
            for line in re.findall(r"^    \$ (.*)$", text, re.M)]


_CLIENT_HALF_CHUNK = _CLIENT_HEAD + b"Transfer-Encoding: chunked\r\n\r\n40\r\n{\"action\":"


# -- api: the verbs, on real servers

def test_client_api_set_get_delete(_client, _client_dir):
    key = _client_dir + "/foo"
    first = _client.set(key, "bar")
    again = _client.set(key[1:], "b2")
    found = _client.get(key)
    gone = _client.delete(key)

    assert (first.action, first.value, first.prev_node) == ("set", "bar", None)
    assert again.prev_node.value == "bar" and again.modified_index == first.modified_index + 1
    assert (found.action, found.key, found.value) == ("get", key, "b2")
    assert found.created_index == again.created_index == found.etcd_index
    assert found.raw["node"]["modifiedIndex"] == found.node.raw["modifiedIndex"]
    assert (gone.action, gone.value, gone.prev_node.value) == ("delete", None, "b2")
    with pytest.raises(pyetcd_client.KeyNotFound) as caught:
        _client.get(key)
    assert (caught.value.code, caught.value.status, caught.value.cause) == (100, 404, key)
    assert caught.value.index == gone.modified_index and not caught.value.maybe_applied


def test_client_api_create_and_update(_client, _client_dir):
    key = _client_dir + "/k"
    with pytest.raises(pyetcd_client.KeyNotFound):
        _client.update(key, "x")
    created = _client.create(key, "one")
    with pytest.raises(pyetcd_client.NodeExists):
        _client.create(key, "two")
    updated = _client.update(key, "three")

    assert (created.action, updated.action) == ("create", "update")
    assert updated.created_index == created.created_index < updated.modified_index


def test_client_api_compare_and_swap(_client, _client_dir):
    key = _client_dir + "/k"
    index = _client.set(key, "one").modified_index
    with pytest.raises(pyetcd_client.CompareFailed) as caught:
        _client.compare_and_swap(key, "two", prev_value="nine")
    by_value = _client.compare_and_swap(key, "two", prev_value="one", ttl=100)
    by_index = _client.compare_and_swap(key, "three", prev_index=by_value.modified_index)

    assert caught.value.cause == "[nine != one]"
    assert by_value.prev_node.modified_index == index and by_value.node.ttl == 100
    assert (by_index.action, by_index.value, by_index.node.ttl) == ("compareAndSwap", "three", None)


def test_client_api_compare_and_delete(_client, _client_dir):
    key = _client_dir + "/k"
    index = _client.set(key, "one").modified_index
    with pytest.raises(pyetcd_client.CompareFailed):
        _client.compare_and_delete(key, prev_value="one", prev_index=index + 1)
    gone = _client.compare_and_delete(key, prev_value="one", prev_index=index)

    assert (gone.action, gone.prev_node.value) == ("compareAndDelete", "one")


def test_client_api_conditions_are_never_dropped():
    with _ClientRawServer(_CLIENT_GOOD) as server, Client(server.url) as client:
        calls = client.compare_and_delete, lambda key, **c: client.compare_and_swap(key, "v", **c)
        for call in calls:
            with pytest.raises(ValueError, match="needed"):
                call("k")
            with pytest.raises(ValueError, match="1 or more"):
                call("k", prev_index=0)
        assert server.requests == []


def test_client_api_append_orders(_client, _client_dir):
    keys = [_client.append(_client_dir, f"v{number}").key for number in range(3)]
    assert keys == sorted(keys)
    assert [node.value for node in _client.ls(_client_dir)] == ["v0", "v1", "v2"]


def test_client_api_ttl_and_refresh(_client, _client_dir):
    key = _client_dir + "/k"
    fresh = _client.set(key, "v", ttl=50)
    refreshed = _client.refresh(key, 500)
    kept = _client.get(key)
    permanent = _client.set(key, "v")

    assert fresh.node.ttl == 50 and fresh.node.expiration.endswith("Z")
    assert refreshed.node.ttl == 500
    assert kept.value == "v" and 490 < kept.node.ttl <= 500
    assert permanent.node.ttl is None and permanent.node.expiration is None
    with pytest.raises(pyetcd_client.KeyNotFound):
        _client.refresh(_client_dir + "/none", 5)


def test_client_api_expiry_is_an_event(_client, _client_dir):
    key = _client_dir + "/k"
    made = _client.set(key, "v", ttl=1)
    event = _client.watch(key, index=made.modified_index + 1, timeout=_CLIENT_WAIT_S)
    assert (event.action, event.prev_node.value) == ("expire", "v")


def test_client_api_directories(_client, _client_dir):
    made = _client.mkdir(_client_dir, ttl=300)
    with pytest.raises(pyetcd_client.NodeExists):
        _client.mkdir(_client_dir)
    _client.set(_client_dir + "/b/c", "1")
    _client.set(_client_dir + "/a", "2")
    _client.set(_client_dir + "/_hidden", "3")
    listed = _client.ls(_client_dir)
    deep = _client.ls(_client_dir, recursive=True)

    assert made.node.dir and made.node.ttl == 300 and made.value is None
    assert [node.key[len(_client_dir):] for node in listed] == ["/a", "/b"]
    assert [node.dir for node in listed] == [False, True]
    assert [node.key[len(_client_dir):] for node in deep] == ["/a", "/b", "/b/c"]
    assert _client.ls(_client_dir + "/a") == [_client.get(_client_dir + "/a").node]
    with pytest.raises(pyetcd_client.NotFile):
        _client.set(_client_dir, "x")
    with pytest.raises(pyetcd_client.NotDir):
        _client.set(_client_dir + "/a/below", "x")
    with pytest.raises(pyetcd_client.DirNotEmpty):
        _client.rmdir(_client_dir)
    assert _client.delete(_client_dir, recursive=True).node.dir


def test_client_api_rmdir_removes_an_empty_directory(_client, _client_dir):
    _client.mkdir(_client_dir)
    assert _client.rmdir(_client_dir).action == "delete"


def test_client_api_get_options(_client, _client_dir):
    for name in ("c", "a", "b/x"):
        _client.set(f"{_client_dir}/{name}", name)
    flat = _client.get(_client_dir, sorted=True, quorum=True)
    deep = _client.get(_client_dir, sorted=True, recursive=True)

    assert [node.key[len(_client_dir):] for node in flat.nodes] == ["/a", "/b", "/c"]
    assert flat.nodes[1].nodes == () and deep.nodes[1].nodes[0].value == "b/x"
    assert _client.get("/").node.key == "/"


@pytest.mark.parametrize("call, error", [
    (lambda client: client.delete("/"), pyetcd_client.RootReadOnly),
    (lambda client: client.compare_and_delete("x", prev_value=""), pyetcd_client.PrevValueRequired),
    (lambda client: client.set("x", "v", ttl=-1), pyetcd_client.TtlNotANumber),
    (lambda client: client.compare_and_swap("x", "v", prev_index=1 << 64),
     pyetcd_client.IndexNotANumber),
], ids=["root", "prev-value", "ttl", "index"])
def test_client_api_refusals_are_typed(_client, call, error):
    with pytest.raises(error) as caught:
        call(_client)
    assert caught.value.status == 400 and not caught.value.maybe_applied


@pytest.mark.parametrize("name", [
    "a b", "a+b", "a%b", "%2e%2e", "%zz", "q?x=1", "h#x", "a;b", "a&b=c", "..x", "...", "ü/日本",
    "~", "a\nb", "a\\b", "'\"<>", "a:b@c,d!$()*[]",
])
def test_client_api_any_key_and_value(_client, _client_dir, name):
    key = f"{_client_dir}/{name}"
    written = _client.set(key, name)
    assert (written.key, written.value) == (key, name)
    assert _client.get(key).node == written.node


def test_client_api_bytes_outside_utf8_reach_the_server(_client_server, _client, _client_dir):
    """As they are: etcd takes them for a key, pyetcd refuses it."""
    if _client_server.kind == "pyetcd":
        with pytest.raises(pyetcd_client.InvalidForm, match="the key is not UTF-8"):
            _client.set(_client_dir + "/\udcff", "x")
        return
    _client.set(_client_dir + "/\udcff", "x")
    assert _client.get(_client_dir + "/\udcff").value == "x"
    with pytest.raises(pyetcd_client.KeyNotFound):
        _client.get(_client_dir + "/\udcfe")


_CLIENT_REFUSED = [
    (b"\xff\x00", "base64"), ("a\udcff", "base64"), (bytearray(b"\xff"), "base64"),
    (memoryview(b"\xff"), "base64"), ({"a": 1}, "json.dumps"), ([1], "json.dumps"),
    ({1}, "json.dumps"), (object(), "json.dumps"), (None, "None")]


@pytest.mark.parametrize("verb", [
    lambda client, value: client.set("k", value), lambda client, value: client.create("k", value),
    lambda client, value: client.update("k", value),
    lambda client, value: client.write("k", b"\xff" if value is None else value),
    lambda client, value: client.append("k", value),
    lambda client, value: client.test_and_set("k", value, "v"),
    lambda client, value: client.compare_and_swap("k", "v", prev_value=value or b"\xff"),
], ids=["set", "create", "update", "write", "append", "test_and_set", "prev_value"])
@pytest.mark.parametrize("value, hint", _CLIENT_REFUSED, ids=lambda item: type(item).__name__)
def test_client_api_refuses_values_that_would_not_come_back(verb, value, hint):
    with _ClientRawServer(_CLIENT_GOOD) as server, Client(server.url) as client:
        with pytest.raises(pyetcd_client.EtcdValueError, match="base64|" + hint):
            verb(client, value)
        assert not server.requests


def test_client_api_write_without_a_value_is_python_etcds_empty_file():
    with _ClientRawServer(_CLIENT_GOOD) as server, Client(server.url) as client:
        client.write("k", None)
        assert server.requests == [("PUT", "/v2/keys/k", "")]


@pytest.mark.parametrize("value, stored", [
    ("a\0ä\u2028", "a\0ä\u2028"), ("ä".encode(), "ä"), (bytearray(b"a"), "a"), (1, "1"),
    (0.5, "0.5"), (True, "True"), (datetime.date(2026, 1, 2), "2026-01-02"), (Path("/a"), "/a"),
    ("", "")])
def test_client_api_stores_what_is_text(_client, _client_dir, value, stored):
    _client.set(_client_dir, value)
    assert _client[_client_dir] == stored


def test_client_api_reads_as_a_mapping_does(_client, _client_dir):
    key = _client_dir + "/k"
    assert _client.get(key, default=None) is None and _client.get(key, default=5) == 5
    with pytest.raises(KeyError):
        _client[key]
    _client.set(key, "v")
    assert _client[key] == "v" and _client.get(key, default=None).value == "v"
    with pytest.raises(pyetcd_client.NotFile):
        _client[_client_dir]
    with pytest.raises(TypeError):
        iter(_client)
    assert repr(_client) == f"Client({list(_client.endpoints.urls)!r})"


def test_client_api_ttl_0_is_refused_as_it_means_two_things():
    with _ClientRawServer(_CLIENT_GOOD) as server, Client(server.url) as client:
        for call in (lambda: client.set("k", "v", ttl=0), lambda: client.mkdir("k", ttl=0),
                     lambda: client.refresh("k", 0), lambda: client.append("k", "v", ttl=0)):
            with pytest.raises(pyetcd_client.EtcdValueError, match="ttl"):
                call()
        assert not server.requests


@pytest.mark.parametrize("given, filed", [
    ("//a//b/", "/a/b"), ("a/./b", "/a/b"), ("a/../b", "/b"), ("../../../../members", "/members"),
])
def test_client_api_unclean_keys_stay_below_keys(given, filed):
    with _ClientRawServer(_CLIENT_GOOD) as server, Client(server.url) as client:
        client.set(given, "v")
        assert server.requests == [("PUT", "/v2/keys" + filed, "value=v")]


def test_client_api_cluster(_client, _client_server):
    member, = _client.member_list()
    assert (member.name, member.client_urls) == ("m1", (_client_server.url,))
    assert _client.leader_member() == member
    assert _client.health() is True and _client.health(_client_server.url) is True
    assert set(_client.server_version()) >= {"etcdserver", "etcdcluster"}
    assert _client.statistics()["state"] == "StateLeader"
    assert _client.statistics("store")["getsSuccess"] > 0
    assert _client.statistics("leader")["leader"] == member.id
    with pytest.raises(ValueError, match="statistics"):
        _client.statistics("../keys")


def test_client_api_threads_share_a_client(_client, _client_dir):
    def work(number):
        for count in range(20):
            _client.set(f"{_client_dir}/{number}", str(count))
            assert _client.get(f"{_client_dir}/{number}").value == str(count)

    with contextlib.ExitStack() as stack:
        outcomes = [stack.enter_context(_client_background(work, number)) for number in range(8)]
    assert outcomes == [[None]] * 8


def test_client_api_falls_over_from_a_dead_endpoint(_client_server, _client_dir):
    with Client([_client_dead_url(), _client_server.url]) as client:
        client.set(_client_dir, "v")
        assert client.endpoints.current == _client_server.url       # and stays there
        assert client.get(_client_dir).value == "v"


# -- api: the same program with python-etcd and with this client

_CLIENT_PARITY_ERRORS = """
    EtcdException EtcdValueError EtcdCompareFailed EtcdClusterIdChanged EtcdKeyError
    EtcdKeyNotFound EtcdNotFile EtcdNotDir EtcdAlreadyExist EtcdEventIndexCleared
    EtcdConnectionFailed EtcdInsufficientPermissions EtcdWatchTimedOut EtcdWatcherCleared
    EtcdLeaderElectionInProgress EtcdRootReadOnly EtcdDirNotEmpty EtcdLockExpired""".split()


class _ClientParityNotes:
    """What a program sees; indexes count from the first one, its directory is called ROOT."""

    def __init__(self, etcd, client, root):
        self.etcd, self.root, self.lines = etcd, root, []
        self.first = client.write(root + "/first", "1").modifiedIndex

    def plain(self, value):
        if isinstance(value, str):
            return re.sub(r"\[\d+( != |/)\d+\]", r"[N\1N]", value.replace(self.root, "ROOT"))
        if isinstance(value, dict):
            return {self.plain(name): self.plain(item) for name, item in value.items()}
        return [self.plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    def add(self, label, value):
        self.lines.append((label, self.plain(value)))

    def index(self, index):
        return f"@{index - self.first}"

    def node(self, node):
        return [node.key, node.value, node.dir, node.ttl, node.expiration is not None,
                node.newKey, self.index(node.modifiedIndex), self.index(node.createdIndex)]

    def result(self, label, result):
        # A node that is no answer has the action None there, "" here.
        self.add(label, [result.action or None, *self.node(result)])
        self.add(label + " leaves", [leaf.key for leaf in result.leaves])
        self.add(label + " children", [(child.key, child.value) for child in result.children])
        self.add(label + " subtree", [node.key for node in result.get_subtree()])
        if result.action:
            self.add(label + " index", [self.index(result.etcd_index), result.raft_index > 0])
        previous = getattr(result, "_prev_node", None)
        if previous is not None:
            self.add(label + " previous", self.node(previous))

    def error(self, label, call, *arguments, **options):
        try:
            call(*arguments, **options)
        except self.etcd.EtcdException as error:
            kinds = [name for name in _CLIENT_PARITY_ERRORS
                     if isinstance(error, getattr(self.etcd, name))]
            payload = dict(error.payload or {})
            payload["index"] = self.index(payload.get("index") or self.first)
            self.add(label, [*kinds, isinstance(error, ValueError), payload])
        else:
            self.add(label, "no error")


def _client_parity_writes(etcd, notes, client, root):
    key = root + "/k"
    notes.result("new", client.write(key, "1"))
    notes.result("again", client.write(key, 2))
    notes.result("without slash", client.write(key[1:], "ü & = % +"))
    notes.result("bytes", client.write(key, "ü".encode()))
    notes.result("true", client.write(key, True))
    notes.result("none", client.write(key, None))
    notes.result("ttl", client.write(key, "3", ttl=60))
    notes.result("positional ttl", client.write(key, "3", 50))
    notes.result("refresh", client.refresh(key, 70))
    notes.result("refresh by write", client.write(key, None, ttl=80, refresh=True, prevExist=True))
    notes.result("prevValue", client.write(key, "4", prevValue="3"))
    index = client.read(key).modifiedIndex
    notes.result("prevIndex", client.write(key, "5", prevIndex=index, ttl=9))
    notes.result("prevExist", client.write(key, "6", prevExist=True))
    notes.result("create", client.write(root + "/c", "1", prevExist=False))
    queue = [client.write(root + "/q", number, append=True, ttl=50) for number in range(3)]
    notes.add("order", [job.value for job in sorted(queue, key=lambda job: job.key)])
    notes.result("directory", client.write(root + "/d", None, dir=True))
    notes.result("directory ttl", client.write(root + "/d", None, dir=True, prevExist=True, ttl=50))
    notes.result("set", client.set(key, "7"))
    notes.result("set ttl", client.set(key, "7", 60))
    notes.result("test and set", client.test_and_set(key, "8", "7"))
    notes.result("test and set ttl", client.test_and_set(key, "9", "8", ttl=7))
    notes.result("pop", client.pop(key))
    notes.result("delete", client.delete(root + "/c"))
    notes.result("delete directory", client.delete(root + "/d", dir=True))
    notes.result("delete all", client.delete(root + "/q", recursive=True))
    client.write(key, "1")
    notes.result("delete by value", client.delete(key, prevValue="1"))
    index = client.write(key, "1").modifiedIndex
    notes.result("pop by index", client.pop(key, prevIndex=index))


def _client_parity_updates(etcd, notes, client, root):
    client.write(root + "/u", "1", ttl=60)
    mine, stale = client.read(root + "/u"), client.read(root + "/u")
    mine.value = "2"
    notes.result("updated", client.update(mine))
    notes.error("stale", client.update, stale)
    fresh = client.read(root + "/u")
    fresh.ttl = None
    notes.result("ttl gone", client.update(fresh))
    client.write(root + "/dir/x", "1")
    directory = client.read(root + "/dir")
    directory.ttl = 50
    notes.result("directory", client.update(directory))
    client.delete(root + "/u")
    notes.error("deleted", client.update, fresh)
    one, same = client.read(root + "/dir/x"), client.read(root + "/dir/x")
    notes.add("equal", [one == same, one != same, one == client.read(root + "/dir"), one == 1])
    for child in client.read(root + "/dir").children:
        child.value = "changed"
        notes.result("child", client.update(child))


def _client_parity_reads(etcd, notes, client, root):
    for name in ("b/x", "b/y/z", "a", "_hidden"):
        client.write(f"{root}/tree/{name}", name)
    client.write(root + "/tree/empty", None, dir=True)
    notes.result("get", client.get(root + "/tree/a"))
    notes.result("read", client.read(root + "/tree", sorted=True))
    notes.result("recursive", client.read(root + "/tree", recursive=True, sorted=True))
    notes.result("quorum", client.read(root + "/tree/a", quorum=True))
    notes.result("off", client.read(root + "/tree/a", quorum=False, sorted=False, recursive=False))
    notes.result("timeout", client.read(root + "/tree/a", timeout=5))
    notes.result("no timeout", client.read(root + "/tree/a", timeout=0))
    notes.result("empty", client.read(root + "/tree/empty"))
    notes.result("hidden", client.read(root + "/tree/_hidden"))
    tree = client.read(root + "/tree", recursive=True, sorted=True)
    notes.add("leaves only", [node.key for node in tree.get_subtree(leaves_only=True)])
    notes.add("values", {leaf.key: leaf.value for leaf in tree.leaves})
    notes.add("nodes", [notes.node(node) for node in tree.get_subtree()])
    notes.add("in", [root + "/tree/a" in client, root + "/nope" in client])


def _client_parity_errors(etcd, notes, client, root):
    client.write(root + "/e/f", "1")
    notes.error("no key", client.read, root + "/nope")
    notes.error("no key to get", client.get, root + "/nope")
    notes.error("no key to delete", client.delete, root + "/nope")
    notes.error("no key to pop", client.pop, root + "/nope")
    notes.error("no key to update", client.write, root + "/nope", "1", prevExist=True)
    notes.error("no key to refresh", client.refresh, root + "/nope", 5)
    notes.error("compare value", client.test_and_set, root + "/e/f", "2", "9")
    notes.error("compare index", client.write, root + "/e/f", "2", prevIndex=1)
    notes.error("compare to delete", client.delete, root + "/e/f", prevValue="9")
    notes.error("empty value", client.delete, root + "/e/f", prevValue="")
    notes.error("exists", client.write, root + "/e/f", "2", prevExist=False)
    notes.error("not a file", client.write, root + "/e", "2")
    notes.error("not a file to delete", client.delete, root + "/e")
    notes.error("not a directory", client.write, root + "/e/f/g", "2")
    notes.error("not empty", client.delete, root + "/e", dir=True)
    notes.error("root", client.delete, "/", recursive=True)
    notes.error("ttl", client.write, root + "/e/f", "2", ttl="soon")
    notes.error("index", client.write, root + "/e/f", "2", prevIndex="soon")
    nobody = etcd.Client(port=free_port(), read_timeout=2, allow_reconnect=False)
    notes.error("connection", nobody.read, "/k")
    notes.error("connection to write", nobody.write, "/k", "1")
    for error in (etcd.EtcdException, etcd.EtcdKeyNotFound, etcd.EtcdWatchTimedOut):
        notes.add("own", [error("gone", {"a": 1}).payload, error().payload or {}])
    for code in (*range(100, 111), *range(200, 211), 300, 301, 400, 401, 999):
        payload = {"errorCode": code, "message": "m", "cause": "c"}
        notes.error(f"code {code}", etcd.EtcdError.handle, payload)
    for status in (401, 404, 409):
        notes.error(f"status {status}", etcd.EtcdError.handle, {"message": "m", "status": status})


def _client_parity_watches(etcd, notes, client, root):
    key = root + "/w"
    start = client.write(key, "1").modifiedIndex
    client.write(key, "2", ttl=60)
    client.delete(key)
    notes.result("watch", client.watch(key, index=start))
    notes.result("positional", client.watch(key, start + 1, 5))
    notes.result("recursive", client.watch(root, index=start + 2, recursive=True))
    notes.result("read", client.read(key, wait=True, waitIndex=start + 1, timeout=0))
    notes.error("timeout", client.watch, key, timeout=0.1)
    notes.error("timeout of a read", client.read, key, wait=True, timeout=0.1, recursive=True)
    notes.error("timeout by index", client.watch, key, index=start + 3, timeout=0.1)
    events = client.eternal_watch(root, index=start, recursive=True)
    for number in range(3):
        notes.result(f"event {number}", next(events))
    events.close()
    quick = etcd.Client(host=client.host, port=client.port, read_timeout=0.1)
    notes.error("read_timeout", quick.read, key, wait=True)


def _client_parity_cluster(etcd, notes, client, root):
    notes.add("machines", client.machines)
    notes.add("members", client.members)
    notes.add("leader", client.leader)
    notes.add("stats", sorted(client.stats))
    notes.add("leader stats", client.leader_stats)
    notes.add("store stats", sorted(client.store_stats))
    notes.add("versions", [client.version, client.cluster_version])
    names = ["base_uri", "host", "port", "protocol", "key_endpoint", "version_prefix",
             "read_timeout", "allow_redirect", "lock_prefix", "username", "password"]
    notes.add("properties", [getattr(client, name) for name in names])
    other = etcd.Client(
        host=((client.host, client.port), (client.host, client.port)), allow_reconnect=True,
        read_timeout=7, lock_prefix="/locks", version_prefix="/v2", protocol="http",
        allow_redirect=False, username="u", password="p", use_proxies=True,
        expected_cluster_id=None, per_host_pool_size=2)
    notes.add("other properties", [getattr(other, name) for name in names])


def _client_parity_requests(etcd, notes, client, root):
    path = client.key_endpoint + root + "/x"
    response = client.api_execute(path, "PUT", params={"value": "ü", "ttl": 60})
    notes.add("put", [response.status, json.loads(response.data.decode("utf-8"))["action"]])
    notes.add("header", notes.index(int(response.getheader("x-etcd-index"))))
    notes.add("no header", [response.getheader("x-no"), response.getheader("x-no", "")])
    notes.add("headers", response.headers["X-Etcd-Index"] == response.getheader("x-etcd-index"))
    response = client.api_execute(path, client._MGET, params={"quorum": "true"}, timeout=5)
    notes.add("get", [response.status, json.loads(response.data.decode("utf-8"))["node"]["value"]])
    response = client.api_execute(client.key_endpoint + root + "/y", "POST", {"value": "1"})
    notes.add("post", response.status)
    response = client.api_execute(path, "DELETE", params={"prevValue": "ü"})
    notes.add("delete", json.loads(response.data.decode("utf-8"))["action"])
    notes.error("gone", client.api_execute, path, "GET")
    notes.error("wait", client.api_execute, path, "GET", {"wait": "true"}, 0.1)
    response = client.api_execute("/v2/auth/enable", "GET")
    notes.add("auth", json.loads(response.data.decode("utf-8")))
    notes.error("json", client.api_execute_json, "/v2/auth/roles/a", "PUT", {"role": "other"})


_CLIENT_PARITY = {
    function.__name__.rpartition("_")[2]: function for function in (
        _client_parity_writes, _client_parity_updates, _client_parity_reads,
        _client_parity_errors, _client_parity_watches, _client_parity_cluster,
        _client_parity_requests)}


@pytest.mark.filterwarnings("ignore:.*getheaders:DeprecationWarning")
@pytest.mark.parametrize("program", _CLIENT_PARITY.values(), ids=_CLIENT_PARITY)
def test_client_api_shows_a_program_what_python_etcd_showed_it(program, _client_server):
    """Results, errors and their payloads, watches, properties and bare requests are the same."""
    python_etcd = pytest.importorskip("etcd", reason="python-etcd is not installed")
    address = urllib.parse.urlsplit(_client_server.url)
    seen = []
    for etcd in (python_etcd, pyetcd_client):
        client = etcd.Client(host=address.hostname, port=address.port)
        root = f"/p{random.getrandbits(40):010x}"
        notes = _ClientParityNotes(etcd, client, root)
        program(etcd, notes, client, root)
        seen.append(notes.lines)
    assert len(seen[0]) > 5 and seen[1] == seen[0]


@pytest.mark.parametrize("name", [
    *_CLIENT_PARITY_ERRORS, "EtcdResult", "Client", "EtcdError"])
def test_client_api_has_the_names_of_python_etcd(name):
    """Every class is there, above and below the same ones."""
    python_etcd = pytest.importorskip("etcd", reason="python-etcd is not installed")
    theirs, ours = getattr(python_etcd, name), getattr(pyetcd_client, name)
    assert name in pyetcd_client.__all__
    for other in _CLIENT_PARITY_ERRORS if name in _CLIENT_PARITY_ERRORS else ():
        if issubclass(theirs, getattr(python_etcd, other)):
            assert issubclass(ours, getattr(pyetcd_client, other))
    public = {attribute for attribute in vars(theirs) if not attribute.startswith("_")}
    missing = public - set(dir(Client() if name == "Client" else ours))
    # What only raises NotImplementedError, and the pool of urllib3 and its headers.
    assert missing <= {"get_lock", "election", "http", "parse_headers"}


def test_client_api_takes_the_arguments_of_python_etcd():
    """Names and order of the constructor and of the verbs; new arguments come after them."""
    python_etcd = pytest.importorskip("etcd", reason="python-etcd is not installed")
    for name in ("__init__", "watch", "eternal_watch", "set", "get", "write", "test_and_set",
                 "delete", "pop", "refresh", "api_execute", "api_execute_json", "read"):
        theirs = inspect.signature(getattr(python_etcd.Client, name)).parameters
        ours = inspect.signature(getattr(Client, name)).parameters
        positional = [parameter for parameter in theirs if parameter != "kwdargs"
                      and parameter != "kwargs"]
        assert list(ours)[:len(positional)] == positional, name


# -- api: where it is deliberately other than python-etcd

@pytest.mark.parametrize("call", [
    lambda client: client.write("k", "v", prevValue=None),
    lambda client: client.write("k", "v", prevIndex=None),
    lambda client: client.write("k", "v", prevExist=None),
    lambda client: client.write("k", "v", prevIndex=0),
    lambda client: client.test_and_set("k", "v", None),
    lambda client: client.delete("k", prevValue=None),
    lambda client: client.delete("k", prevIndex=-1),
    lambda client: client.pop("k", prevIndex=None),
    lambda client: client.refresh("k", 5, prevValue=None),
    lambda client: client.write("k", "v", dir=True),
    lambda client: client.api_execute("v2/keys", "GET"),
    lambda client: client.api_execute("/v2/keys", "PATCH"),
    lambda client: client.statistics("../keys"),
    lambda client: client.role_grant("r", "/k", "rw"),
], ids=range(14))
def test_client_api_refuses_what_would_do_something_else(call):
    """Nothing is sent: a condition that got lost would make a write unconditional."""
    with _ClientRawServer(_CLIENT_GOOD) as server, Client(server.url) as client:
        with pytest.raises(pyetcd_client.EtcdValueError) as caught:
            call(client)
        assert server.requests == []
    assert isinstance(caught.value, ValueError) and not str(caught.value).startswith("0:")


@pytest.mark.parametrize("verb", ["write", "read", "delete", "pop", "refresh", "watch"])
def test_client_api_refuses_an_option_that_does_not_exist(verb):
    with Client(_client_dead_url()) as client, pytest.raises(TypeError, match="prevvalue"):
        getattr(client, verb)("k", prevvalue="x")


def test_client_api_lets_the_attributes_of_a_result_change(_client, _client_dir):
    """As python-etcd does; `node` stays what the server said."""
    result = _client.set(_client_dir, "v", ttl=60)
    result.value, result.ttl = "w", 50
    assert (result.value, result.node.value, result.ttl, result.node.ttl) == ("w", "v", 50, 60)
    assert bool(result) and result == copy.deepcopy(result)
    for name in ("key", "modified_index", "modifiedIndex", "dir", "newKey", "other"):
        setattr(result, name, "mine")
        assert getattr(result, name) == "mine"
    assert result.node.key == _client_dir and result != _client.get(_client_dir)
    stale = _client.get(_client_dir)
    stale.modifiedIndex -= 1
    with pytest.raises(pyetcd_client.CompareFailed):
        _client.update(stale)
    with pytest.raises(TypeError, match="unhashable"):
        hash(result)
    assert "'v'" in repr(result)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))],
                         ids=["copy", "pickle"])
def test_client_api_results_can_be_copied(copied, _client, _client_dir):
    """Also the one that a watch returned; its copy goes on with no client."""
    written = _client.set(_client_dir, "v")
    seen = _client.watch(_client_dir, index=written.modified_index, timeout=_CLIENT_WAIT_S)
    for result in (written, seen):
        other = copied(result)
        other.value = "w"
        assert result.value == "v" and other.node == result.node
        assert type(other) is pyetcd_client.EtcdResult


def test_client_api_makes_results_of_dicts():
    """As tests of other programs do."""
    result = pyetcd_client.EtcdResult(
        "set", {"key": "/k", "value": "v", "modifiedIndex": 3},
        prevNode={"key": "/k", "value": "u", "createdIndex": 2})
    assert (result.key, result.value, result.modifiedIndex, result.newKey) == ("/k", "v", 3, False)
    assert result._prev_node.value == result.prev_node.value == "u"
    assert pyetcd_client.EtcdResult(node={"nodes": [{"key": "/a"}]}).key == "/"


def test_client_api_raises_the_class_a_program_put_into_the_table(monkeypatch):
    """Patroni has one of its own for code 300."""
    class Own(pyetcd_client.EtcdException):
        """Raft is busy."""

    monkeypatch.setitem(pyetcd_client.EtcdError.error_exceptions, 300, Own)
    with _ClientRawServer(_CLIENT_TIMED_OUT) as server, Client(server.url) as client:
        with pytest.raises(Own) as caught:
            client.set("k", "v")
    assert caught.value.maybe_applied and caught.value.code == 300


def test_client_api_error_of_the_connection_has_its_cause():
    with Client(_client_dead_url(), retry=False) as client, pytest.raises(
            pyetcd_client.EtcdConnectionFailed) as caught:
        client.get("k")
    assert isinstance(caught.value.cause, Exception) and caught.value.payload == {}
    assert pickle.loads(pickle.dumps(caught.value)).cause == ""


def test_client_api_json_of_somebody_else_is_no_missing_key():
    """A gateway that does not know the path says 404 in JSON too, but it is not etcd."""
    gateway = _client_reply({"message": "no Route matched"}, status=404).replace(
        b"X-Etcd-Cluster-Id", b"X-Gateway")
    with _ClientRawServer(gateway) as server, Client(server.url) as client:
        with pytest.raises(pyetcd_client.HttpError, match="no Route"):
            client.get("k")


def test_client_api_version_prefix_is_everywhere():
    answers = {"members": [], "enabled": False, "leader": "", "health": "true", **_CLIENT_NODE}
    with _ClientRawServer(_client_reply(answers)) as server:
        with Client(server.url, version_prefix="/etcd/v2") as client:
            assert client.key_endpoint == "/etcd/v2/keys"
            for call in (client.member_list, client.auth_status, client.statistics,
                         lambda: client.machines, *(functools.partial(write, client)
                                                    for write in _CLIENT_WRITES.values())):
                call()
        targets = [target for _, target, _ in server.requests]
    assert len(targets) > 10 and all(target.startswith("/etcd/v2/") for target in targets)


def test_client_api_timeout_of_one_call():
    """It is the deadline of that call; 0 is none, None the client's."""
    hold = threading.Event()
    stored = pyetcd_client.EtcdResult(node=_CLIENT_NODE["node"])

    def late(connection):
        hold.wait(_CLIENT_WAIT_S)
        connection.sendall(_CLIENT_GOOD)

    with _ClientRawServer(late) as server:
        with Client(server.url) as client:
            for call in (lambda: client.get("k", timeout=0.1),
                         lambda: client.read("k", timeout=0.1),
                         lambda: client.ls("k", timeout=0.1),
                         lambda: client.write("k", "v", timeout=0.1),
                         lambda: client.update(stored, timeout=0.1),
                         lambda: client.rmdir("k", timeout=0.1),
                         lambda: client.pop("k", timeout=0.1),
                         lambda: client.api_execute("/v2/keys", "GET", timeout=0.1)):
                with pytest.raises(pyetcd_client.RequestTimeout):
                    call()
        with Client(server.url, total_timeout=0.1) as client:
            with _client_background(lambda: client.get("k", timeout=math.inf)) as patient:
                with pytest.raises(pyetcd_client.RequestTimeout):
                    client.get("k")
                hold.set()
        assert patient[0].value == "v"


# -- api: what is new

def test_client_api_watch_goes_on_when_iterated(_client, _client_dir):
    """`for event in client.watch(...)`: this change, then every later one."""
    start = _client.set(_client_dir + "/a", "0").modified_index
    seen = []
    for event in _client.watch(_client_dir, index=start, recursive=True):
        seen.append(event.value)
        if len(seen) == 4:
            break
        _client.set(f"{_client_dir}/{len(seen)}", len(seen))
    assert seen == ["0", "1", "2", "3"]


def test_client_api_watch_with_timeout_0_takes_what_is_in_the_history(_client, _client_dir):
    start = _client.set(_client_dir + "/a", "0").modified_index
    second = _client.set(_client_dir + "/a", "1").modified_index
    with _client.watcher(_client_dir, recursive=True, index=start, relist=False,
                         timeout=0) as events:
        assert [next(events).value for _ in range(2)] == ["0", "1"]
        with pytest.raises(pyetcd_client.WatchTimeout) as caught:
            next(events)
        assert caught.value.index == second + 1
        _client.set(_client_dir + "/a", "2")
        assert next(events).value == "2"
    with pyetcd_client.Scope(0):
        assert _client.watch(_client_dir, start, recursive=True).value == "0"
        with pytest.raises(pyetcd_client.WatchTimeout):
            _client.watch(_client_dir)
    with pytest.raises(pyetcd_client.WatchTimeout):
        _client.watch(_client_dir, timeout=0)
    with _client.watcher(_client_dir, recursive=True, timeout=0) as listed:
        with pytest.raises(pyetcd_client.WatchTimeout):
            next(listed)


def test_client_api_eternal_watch_never_ends_by_itself(_client, _client_dir):
    start = _client.set(_client_dir + "/a", "0").modified_index
    events = _client.eternal_watch(_client_dir, start, True)
    assert next(events).value == "0"
    _client.delete(_client_dir + "/a")
    assert next(events).action == "delete"
    events.close()
    assert list(events) == []


def test_client_api_members_come_and_go():
    with pyetcd.LocalCluster(3, election_ms=500) as cluster, Client(cluster.client_urls) as client:
        url, other = (f"http://127.0.0.1:{free_port()}" for _ in range(2))
        added = client.member_add(url)
        assert (added.name, added.peer_urls) == ("", (url,))
        with pytest.raises(pyetcd_client.HttpError) as caught:
            client.member_add([url])
        assert caught.value.status == 409
        client.member_update(added.id, [other])
        assert [m.peer_urls for m in client.member_list() if m.id == added.id] == [(other,)]
        client.member_remove(added.id)
        assert len(client.members) == 3 and client.leader["id"] in client.members
        with pytest.raises(pyetcd_client.HttpError) as caught:
            client.member_remove(added.id)
        assert caught.value.status == 410
        with pytest.raises(pyetcd_client.KeyNotFound):
            client.member_update("abc", [url])


def test_client_api_no_leader():
    election = _client_reply({"message": "During election"}, status=503)
    with _ClientRawServer(election) as server, Client(server.url) as client:
        with pytest.raises(pyetcd_client.EtcdLeaderElectionInProgress):
            client.leader  # noqa: B018


def test_client_api_users_of_etcd_2_1_are_names():
    with _ClientRawServer(_client_reply({"users": ["al"], "roles": ["r"]})) as server:
        with Client(server.url) as client:
            assert client.user_list() == [{"user": "al"}] and client.role_list() == [{"role": "r"}]
            user = pyetcd_client.EtcdUser(client, "al")
            user.read()
            assert user.roles == {"r"} and user.password is None


def _client_role_names(user):
    return [role["role"] for role in user.get("roles", ())]


def test_client_api_users_and_roles(_client_own_server):
    """Who may do what, changed by methods of the client and felt by other clients."""
    url, unauthorized = _client_own_server, pyetcd_client.Unauthorized
    with Client(url) as guest:
        eventually(lambda: guest.cluster_version != "not_decided")
        guest.set("/pub/x", "1")
        guest.user_add("root", "pw")
        guest.role_add("reader", read=["/pub/*"])
        guest.role_grant("reader", "/own/*")
        guest.role_revoke("reader", "/own/*", "read")
        guest.user_add("al", "old", ["reader"])
        guest.user_password("al", "new")
        for exists in (lambda: guest.user_add("root", "other"), lambda: guest.role_add("reader"),
                       lambda: guest.user_add("al", "other", ["reader"])):
            with pytest.raises(pyetcd_client.NodeExists):
                exists()
        for missing in (lambda: guest.user_password("jo", "pw"), lambda: guest.user_get("jo"),
                        lambda: guest.user_remove("jo"), lambda: guest.role_get("r"),
                        lambda: guest.role_remove("r"), lambda: guest.role_grant("r", "/x")):
            with pytest.raises(pyetcd_client.KeyNotFound):
                missing()
        with pytest.raises(pyetcd_client.HttpError, match="duplicate") as caught:
            guest.user_grant("al", ["reader"])
        assert caught.value.status == 409
        assert [user["user"] for user in guest.user_list()] == ["al", "root"]
        assert _client_role_names(guest.user_get("al")) == ["reader"]
        assert [role["role"] for role in guest.role_list()] == ["reader", "root"]
        assert guest.role_get("reader")["permissions"]["kv"] == {
            "read": ["/pub/*"], "write": ["/own/*"]}
        guest.auth_enable()
        assert guest.auth_status() == {"enabled": True}

        with Client(url, username="root", password="pw") as root, Client(
                url, username="al", password="new") as al, Client(
                url, username="al", password="old") as late:
            root.role_revoke("guest", "/*")
            assert al.get("/pub/x").value == "1" and al.set("/own/x", "2").new_key
            for refused in (lambda: al.set("/pub/x", "2"), lambda: al.get("/own/x"), al.user_list,
                            lambda: guest.get("/pub/x"), lambda: late.get("/pub/x"),
                            guest.auth_disable, lambda: al.member_remove("1")):
                with pytest.raises(unauthorized) as caught:
                    refused()
                assert caught.value.status == 401 and not caught.value.maybe_applied
            root.user_revoke("al", ["reader"])
            with pytest.raises(unauthorized):
                al.get("/pub/x")
            root.user_remove("al")
            root.role_remove("reader")
            root.auth_disable()
            with pytest.raises(pyetcd_client.HttpError, match="already disabled"):
                root.auth_disable()
        assert guest.get("/own/x").value == "2"


# -- api: what the manual shows

def _client_manual_program(page):
    """Return the Python of a page as one program, and what its comments say it prints."""
    code = "\n".join(block for block in manual_code(page) if "def test_" not in block)
    said = re.findall(r"^ *print\(.*\) +# (.*)$", code, re.MULTILINE)
    return code, [re.sub(r"\[\d+\]$", "[N]", line) for line in said]


@pytest.fixture(name="_client_embedded")
def _client_embedded_fixture(tmp_path):
    """A member in this process, whose cluster version is known: only then it has users."""
    with pyetcd.Server(data_dir=str(tmp_path / "data")) as server:
        server.wait_ready()
        with Client(server.client_urls[0]) as client:
            eventually(lambda: client.cluster_version != "not_decided")
        yield server


@pytest.mark.parametrize("page, least", [("README", 3), ("client", 14)])
def test_client_api_examples_of_the_manual_print_what_they_say(
    page, least, _client_embedded, capsys
):
    code, said = _client_manual_program(page)
    port = urllib.parse.urlsplit(_client_embedded.client_urls[0]).port
    code = code.replace("Client()", "Client('127.0.0.1:2379')").replace("2379", str(port))
    exec(compile(code, f"{page}.md", "exec"), {})
    printed = [re.sub(r"\[\d+\]$", "[N]", line) for line in capsys.readouterr().out.splitlines()]
    assert len(said) >= least and said == [line for line in printed if line in said]


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_client_api_first_answer_in_the_readme_is_real(_client_embedded, tmp_path):
    shown = re.search(r"^    (curl \S+ .*?) +# answers:\n    (.*)$", manual("README"), re.M)
    with pyetcd.Server(data_dir=str(tmp_path / "new")) as server:
        server.wait_ready()
        words = shlex.split(shown[1].replace("http://127.0.0.1:2379", server.client_urls[0]))
        done = subprocess.run([*words, "-s"], stdout=subprocess.PIPE, timeout=_CLIENT_WAIT_S,
                              check=True, text=True)
    keys = [{**answer["node"], "createdIndex": 0, "modifiedIndex": 0}
            for answer in map(json.loads, (done.stdout, shown[2]))]
    assert keys[0] == keys[1]


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
@pytest.mark.parametrize("page, chapter, least", [
    ("clusters", "Discovery service", 1), ("clusters", "Members", 3),
    ("security", "Users and roles", 7), ("operations", "Backup and restore", 3)])
def test_client_api_commands_of_the_manual_work(page, chapter, least, _client_embedded, tmp_path):
    """Each with curl, and each that makes files, in order; not those with a <place> to fill."""
    port, ran = urllib.parse.urlsplit(_client_embedded.client_urls[0]).port, 0
    tool = f"{shlex.quote(sys.executable)} {shlex.quote(compiled(pyetcd))} "
    for command in manual_commands(page, chapter):
        words = command.split()
        if words[0] == "curl" and "<" not in command:
            command = re.sub(r"127.0.0.1:(2379|4001)", f"127.0.0.1:{port}", command)
            command = command.replace("curl ", "curl -sS -f ", 1)
        elif words[:2] == ["python3", "pyetcd.py"] and words[2] in ("backup", "restore"):
            command = command.replace("python3 pyetcd.py ", tool)
        else:
            continue
        done = subprocess.run(
            command, shell=True, cwd=str(tmp_path), timeout=_CLIENT_WAIT_S, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert done.returncode == 0, (command, done.stdout)
        ran += 1
    assert ran >= least


def test_client_api_auth_objects_write_what_differs(_client_embedded):
    with Client(_client_embedded.client_urls[0]) as client:
        role, seen = (pyetcd_client.auth.EtcdRole(client, "n") for _ in range(2))
        role.acls = {"/a": "R", "/b/*": "RW"}
        role.write()
        seen.read()
        assert seen.acls == role.acls == {"/a": "R", "/b/*": "RW"}
        role.grant("/a", "w")
        role.revoke("/b/*", "R")
        role.write()
        seen.read()
        assert seen.acls == {"/a": "RW", "/b/*": "W"}
        with pytest.raises(pyetcd_client.EtcdValueError):
            role.grant("/a", "X")
        client.role_add("m")
        user, other = (pyetcd_client.auth.EtcdUser(client, "al") for _ in range(2))
        user.password, user.roles = "pw", ["n"]
        user.write()
        user.password, user.roles = "other", ["m"]
        user.write()
        other.read()
        assert other.roles == {"m"} and other.uri == "/v2/auth/users/al"
        assert [known["user"] for known in other.names] == ["al"]
        assert [known["role"] for known in role.names] == ["m", "n", "root"]
        for gone in (user, role):
            gone.delete()
            with pytest.raises(pyetcd_client.EtcdKeyNotFound):
                gone.read()


def test_client_api_serves_a_program_that_imports_etcd(_client_embedded, tmp_path):
    """The manual's file etcd.py; what is done here is how Salt and conftool use python-etcd."""
    (tmp_path / "etcd.py").write_text("from pyetcd_client import *\n")
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent("""
        import sys
        import etcd
        client = etcd.Client(
            host="127.0.0.1", port=int(sys.argv[1]), protocol="http", allow_reconnect=True,
            allow_redirect=True, read_timeout=60, username=None, password=None, ca_cert=None,
            cert=None, version_prefix="/v2")
        try:
            client.read("/salt/x", recursive=False, wait=False, timeout=None)
        except (etcd.EtcdConnectionFailed, etcd.EtcdKeyNotFound) as error:
            assert error.payload["errorCode"] == 100
        assert getattr(client.write("/salt/x", "1", ttl=None, dir=False), "value") == "1"
        assert client.write("/salt/d", None, ttl=None, dir=True).dir
        try:
            client.write("/salt/d", "2", ttl=None, dir=False)
        except (etcd.EtcdNotFile, etcd.EtcdNotDir, etcd.EtcdRootReadOnly, ValueError) as error:
            assert isinstance(error, etcd.EtcdNotFile)
        tree = {}
        for item in client.read("/salt").children:
            if item.dir is True and item.key != "/salt":
                tree[item.key] = {}
            else:
                tree[item.key] = item.value
        assert tree == {"/salt/x": "1", "/salt/d": {}}, tree
        index = client.read("/salt/x").modifiedIndex
        seen = client.read("/salt/x", recursive=False, wait=True, timeout=0, waitIndex=index)
        fields = {name: getattr(seen, name, None) for name in ("key", "value", "dir")}
        assert fields == {"key": "/salt/x", "value": "1", "dir": False}
        assert seen.modifiedIndex == index
        try:
            client.read("/salt/x", recursive=True, wait=True, timeout=0.1)
        except etcd.EtcdWatchTimedOut:
            print("timed out")
        assert client.delete("/salt", recursive=True, dir=True)
        for name in ("a/1", "a/2"):
            client.write("/conftool/" + name, '{"pooled": "yes"}')
        objects = [leaf for leaf in client.read("/conftool", recursive=True).leaves if not leaf.dir]
        objects[0].value = '{"pooled": "no"}'
        assert client.update(objects[0]).action == "compareAndSwap"
        assert [item.key for item in objects] == ["/conftool/a/1", "/conftool/a/2"]
        print(etcd.auth.Auth(client).active)
        """))
    port = urllib.parse.urlsplit(_client_embedded.client_urls[0]).port
    result = _client_python(str(program), str(port))
    assert (result.returncode, result.stdout, result.stderr) == (0, b"timed out\nFalse\n", b"")


# -- watch

def test_client_watch_returns_one_event(_client, _client_dir):
    made = _client.set(_client_dir, "one")
    _client.set(_client_dir, "two")
    event = _client.watch(_client_dir, index=made.modified_index + 1, timeout=_CLIENT_WAIT_S)
    assert (event.action, event.value, event.prev_node.value) == ("set", "two", "one")


def test_client_watch_waits_for_a_change_while_others_write(_client, _client_dir):
    watchers = _client.statistics("store")["watchers"]
    with _client_background(_client.watch, _client_dir) as outcome:
        eventually(lambda: _client.statistics("store")["watchers"] > watchers)
        written = _client.set(_client_dir, "v")
    assert outcome[0].node == written.node


def test_client_watch_times_out_and_says_where_to_go_on(_client, _client_dir):
    made = _client.set(_client_dir, "v")
    with pytest.raises(pyetcd_client.WatchTimeout) as caught:
        _client.watch(_client_dir, timeout=1)
    assert caught.value.index == made.modified_index + 1 and not caught.value.maybe_applied


def test_client_watch_loses_and_repeats_nothing(_client, _client_dir):
    start = _client.mkdir(_client_dir).modified_index + 1
    written = [_client.set(f"{_client_dir}/{number}", "v").node for number in range(5)]
    seen = []
    with _client.watcher(_client_dir, recursive=True, index=start) as events:
        for event in events:
            seen.append(event.node)
            if len(seen) == 3:
                written.append(_client.set(_client_dir + "/more", "v").node)
            if len(seen) == 6:
                break
    assert seen == written


def test_client_watch_history_cleared(_client, _client_dir):
    start = _client.set(_client_dir + "/a", "old").modified_index
    for number in range(1005):
        _client.set(_client_dir + "/a", str(number))
    with pytest.raises(pyetcd_client.EventIndexCleared):
        _client.watch(_client_dir, recursive=True, index=start)
    with _client.watcher(_client_dir, recursive=True, index=start) as events:
        listed = next(events)
        written = _client.set(_client_dir + "/b", "new")
        after = next(events)

    assert (listed.action, listed.key, listed.value) == ("set", _client_dir + "/a", "1004")
    assert listed.relisted and listed.modified_index < written.modified_index
    assert after.node == written.node and not after.relisted


@pytest.mark.parametrize("kind", _CLIENT_KINDS)
def test_client_watch_survives_a_restart(kind, tmp_path):
    with _client_running(kind, tmp_path) as member:
        with Client(member.url) as client, client.watcher("/k") as events:
            with _client_background(lambda: [next(events).value for _ in range(2)]) as outcome:
                eventually(lambda: client.statistics("store")["watchers"] > 0)
                member.process.kill()
                member.start_alone()
                client.set("/k", "one")
                client.set("/k", "two")
        assert outcome == [["one", "two"]]


def test_client_watch_without_index_has_no_gap_after_a_lost_connection():
    """The head of the first answer says from where the watch runs; the next request asks for it."""
    lost = (_CLIENT_HEAD + b"Transfer-Encoding: chunked\r\n\r\n",)
    with _ClientRawServer(lost, _client_event(9)) as server, Client(server.url) as client:
        assert client.watch("k", timeout=_CLIENT_WAIT_S).value == "v9"
        targets = [target for _, target, _ in server.requests]
    assert targets == ["/v2/keys/k?wait=true", "/v2/keys/k?wait=true&waitIndex=8"]


def test_client_watch_asks_from_the_index_after_the_last_event():
    with _ClientRawServer(_client_event(9), _client_event(12)) as server:
        with Client(server.url) as client, client.watcher("k", index=3, relist=False) as events:
            assert [next(events).modified_index for _ in range(2)] == [9, 12]
        assert [target.rpartition("=")[2] for _, target, _ in server.requests] == ["3", "10"]
        assert server.connections == 1


def test_client_watch_silence_is_not_a_failed_endpoint(monkeypatch):
    monkeypatch.setattr(pyetcd_client, "WATCH_POLL_S", 0.5)
    hold = threading.Event()

    def silent(connection):
        connection.sendall(_CLIENT_HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        hold.wait(_CLIENT_WAIT_S)

    with _ClientRawServer(silent, silent, _client_event(9)) as server, _ClientRawServer(
            _CLIENT_GOOD) as other, Client([server.url, other.url]) as client:
        assert client.watch("k").value == "v9"
        hold.set()
        assert client.endpoints.current == server.url and other.requests == []


def test_client_watch_moves_on_from_a_server_that_says_nothing_at_all(monkeypatch):
    monkeypatch.setattr(pyetcd_client, "WATCH_POLL_S", 0.1)
    hold = threading.Event()
    with _ClientRawServer(lambda _: hold.wait(_CLIENT_WAIT_S)) as dumb, _ClientRawServer(
            _client_event(9)) as server, Client([dumb.url, server.url]) as client:
        assert client.watch("k").value == "v9"
        hold.set()


@pytest.mark.parametrize("bad", [_client_hang_up, _CLIENT_HALF, (b"",), _client_reply(b"")],
                         ids=["hang-up", "half", "nothing", "empty"])
def test_client_watch_outlives_bad_answers(bad, monkeypatch):
    monkeypatch.setattr(pyetcd_client, "BACKOFF_MAX_S", 0.02)
    bad = (bad,) if isinstance(bad, bytes) else bad
    with _ClientRawServer(_client_event(9), bad, bad, _client_event(12)) as server:
        with Client(server.url) as client, client.watcher("k", index=9, relist=False) as events:
            assert [next(events).modified_index for _ in range(2)] == [9, 12]
        waits = [target.rpartition("=")[2] for _, target, _ in server.requests]
    assert waits == ["9", "10", "10", "10"]


def test_client_watch_that_never_reached_a_server_says_so():
    with Client([_client_dead_url(), _client_dead_url()]) as client:
        with pytest.raises(pyetcd_client.ConnectionFailed):
            next(client.watcher("k"))


def test_client_watch_refusal_is_raised():
    refusal = _client_reply({"errorCode": 110, "message": "The request requires", "index": 0}, 401)
    with _ClientRawServer(refusal) as server, Client(server.url) as client:
        with pytest.raises(pyetcd_client.Unauthorized):
            client.watch("k")


def test_client_watch_relists_again_when_that_failed(monkeypatch):
    monkeypatch.setattr(pyetcd_client, "BACKOFF_MAX_S", 0.02)
    cleared = _client_reply({"errorCode": 401, "message": "cleared", "index": 2000}, 400)
    with _ClientRawServer(
            _CLIENT_GOOD, cleared, (b"",), _CLIENT_TIMED_OUT, _client_event(8), cleared,
            _client_event(8), _client_event(9),
    ) as server, Client(server.url) as client:
        with client.watcher("k", index=3) as events:
            told = [next(events), next(events)]
        targets = [target.partition("?")[2] for _, target, _ in server.requests]
    assert [(e.value, e.relisted) for e in told] == [("v8", True), ("v9", False)]
    assert targets == ["", "wait=true&waitIndex=3", *["quorum=true"] * 3, "wait=true&waitIndex=9",
                       "quorum=true", "wait=true&waitIndex=9"]


def test_client_watch_close_ends_a_backoff_and_the_iteration(monkeypatch):
    monkeypatch.setattr(pyetcd_client, "BACKOFF_MIN_S", 3600.0)
    monkeypatch.setattr(pyetcd_client, "BACKOFF_MAX_S", 3600.0)
    with _ClientRawServer(_CLIENT_GOOD, _client_event(9), _client_hang_up) as server:
        events = Client(server.url).watcher("k")
        next(events)
        with _client_background(list, events) as outcome:
            assert server.closed.acquire(timeout=_CLIENT_WAIT_S)
            events.close()
    assert outcome == [[]]


# -- fate: what happens to a request whose answer does not come

_CLIENT_WRITES = {
    "set": lambda client: client.set("k", "v"),
    "create": lambda client: client.create("k", "v"),
    "append": lambda client: client.append("k", "v"),
    "cas": lambda client: client.compare_and_swap("k", "v", prev_index=3),
    "delete": lambda client: client.delete("k"),
    "refresh": lambda client: client.refresh("k", 5),
    "mkdir": lambda client: client.mkdir("k"),
}


def _client_each_write(function):
    return pytest.mark.parametrize("write", _CLIENT_WRITES.values(), ids=_CLIENT_WRITES)(function)


@_client_each_write
def test_client_fate_lost_reply_to_a_write_is_not_sent_again(write):
    with _ClientRawServer(_client_hang_up) as server, _ClientRawServer(_CLIENT_GOOD) as other:
        with Client([server.url, other.url]) as client:
            with pytest.raises(pyetcd_client.ConnectionFailed) as caught:
                write(client)
            assert caught.value.maybe_applied
            assert "may have been applied" in str(caught.value)
            assert len(server.requests) == 1 and other.requests == []
            assert client.endpoints.current == other.url            # the next call goes there


def test_client_fate_lost_reply_on_a_kept_connection():
    with _ClientRawServer(_CLIENT_GOOD, _client_hang_up, _CLIENT_GOOD) as server:
        with Client(server.url) as client:
            client.set("k", "1")
            with pytest.raises(pyetcd_client.ConnectionFailed) as caught:
                client.set("k", "2")
            assert caught.value.maybe_applied and server.connections == 1
            client.set("k", "3")
        assert [body for _, _, body in server.requests] == ["value=1", "value=2", "value=3"]


@pytest.mark.parametrize("reply, error", [
    (_client_hang_up, pyetcd_client.ConnectionFailed),
    ((_CLIENT_HALF,), pyetcd_client.TransportError),
    ((_CLIENT_HALF_CHUNK,), pyetcd_client.ConnectionFailed),
    ((b"SSH-2.0-OpenSSH_9\r\n",), pyetcd_client.ConnectionFailed),
    (_client_reply(b"{garbage"), pyetcd_client.BadReply),
    (_client_reply(b"[" * 200_000), pyetcd_client.BadReply),
    (_client_reply([1]), pyetcd_client.BadReply),
    (_client_reply({"action": "set", "node": {"nodes": [3]}}), pyetcd_client.BadReply),
    (_CLIENT_TIMED_OUT, pyetcd_client.RaftInternal),
    (_client_reply({"message": "Internal Server Error"}, status=500), pyetcd_client.HttpError),
    (_client_reply(b"<html>", status=502), pyetcd_client.HttpError),
], ids=["lost", "half", "half-chunk", "not-http", "garbage", "deep", "list", "bad-node",
        "error-300", "500", "502"])
def test_client_fate_of_writes_and_reads(reply, error):
    with _ClientRawServer(reply) as server, _ClientRawServer(_CLIENT_GOOD) as other:
        with Client([server.url, other.url]) as client, pytest.raises(error) as caught:
            client.set("k", "v")
        assert caught.value.maybe_applied and caught.value.endpoint == server.url
        assert len(server.requests) == 1 and other.requests == []

        with Client([server.url, other.url]) as client:
            assert client.get("k").value == "v"                     # a read just goes on
        with Client(server.url, retry=False) as client, pytest.raises(error) as caught:
            client.get("k")
        assert not caught.value.maybe_applied


def test_client_fate_late_reply():
    hold = threading.Event()
    with _ClientRawServer(lambda _: hold.wait(_CLIENT_WAIT_S)) as server, _ClientRawServer(
            _CLIENT_GOOD) as other:
        with Client([server.url, other.url], read_timeout=0.2) as client:
            with pytest.raises(pyetcd_client.RequestTimeout) as caught:
                client.set("k", "v")
            assert caught.value.maybe_applied and other.requests == []
        with Client([server.url, other.url], read_timeout=1) as client:
            assert client.get("k").value == "v"
        hold.set()


def test_client_fate_total_timeout_ends_the_round():
    hold = threading.Event()
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(_ClientRawServer(lambda _: hold.wait(_CLIENT_WAIT_S)))
                   for _ in range(3)]
        urls = [server.url for server in servers]
        with Client(endpoints=urls, total_timeout=1.5) as client:
            with pytest.raises(pyetcd_client.RequestTimeout) as caught:
                client.get("k")
            assert len(caught.value.failures) == 3                  # each got its part of the time
            with pytest.raises(pyetcd_client.RequestTimeout) as caught:
                client.set("k", "v")
            assert caught.value.maybe_applied and caught.value.failures == (caught.value,)
        hold.set()


@_client_each_write
def test_client_fate_refused_connection_falls_over(write):
    with _ClientRawServer(_CLIENT_GOOD) as server, Client(
            [_client_dead_url(), server.url]) as client:
        assert write(client).key == "/k"
        assert len(server.requests) == 1


@pytest.mark.parametrize("url", ["http://nowhere.invalid:1", None], ids=["name", "port"])
def test_client_fate_no_connection_at_all(url):
    urls = [url or _client_dead_url(), _client_dead_url()]
    with Client(endpoints=urls, retry=False) as client, pytest.raises(
            pyetcd_client.ConnectionFailed) as caught:
        client.set("k", "v")
    assert not caught.value.maybe_applied
    assert [failure.endpoint for failure in caught.value.failures] == urls
    assert urls[0] in str(caught.value) and urls[1] in str(caught.value)


def test_client_fate_connect_timeout_was_never_sent():
    """A full accept queue drops the handshake: the connection is never made."""
    with socket.socket() as listener, contextlib.ExitStack() as stack, _ClientRawServer(
            _CLIENT_GOOD) as server:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        full = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with Client([full, server.url], connect_timeout=0.2) as client:
            assert client.set("k", "v").key == "/k"
        with Client(full, connect_timeout=0.2, retry=False) as client:
            with pytest.raises(pyetcd_client.ConnectionFailed, match="timed out") as caught:
                client.set("k", "v")
        assert not caught.value.maybe_applied


def test_client_fate_an_etcd_refusal_is_final():
    refusal = _client_reply({"errorCode": 100, "message": "Key not found", "index": 3}, status=404)
    with _ClientRawServer(refusal) as server, _ClientRawServer(_CLIENT_GOOD) as other:
        with Client([server.url, other.url]) as client, pytest.raises(pyetcd_client.KeyNotFound):
            client.get("k")
        assert other.requests == [] and client.endpoints.current == server.url


@pytest.mark.parametrize("status, followed", [(307, True), (308, True), (301, False), (302, False)])
def test_client_fate_redirects_of_writes_are_followed_if_nothing_was_done(status, followed):
    """RFC 9110 15.4: with 307 and 308 the same request is to go elsewhere."""
    with _ClientRawServer(_CLIENT_GOOD) as target:
        moved = _client_reply(b"", status=status, extra=f"Location: {target.url}/v2/keys/k?x=1\r\n")
        with _ClientRawServer(moved) as server, Client(server.url) as client:
            assert client.get("k").value == "v"
            if followed:
                client.set("k", "v")
                assert target.requests[1:] == [("PUT", "/v2/keys/k?x=1", "value=v")]
                return
            for write in _CLIENT_WRITES.values():
                with pytest.raises(pyetcd_client.HttpError, match="not followed") as caught:
                    write(client)
                assert caught.value.status == status and not caught.value.maybe_applied
        assert target.requests == [("GET", "/v2/keys/k?x=1", "")]


def test_client_fate_see_other_means_that_a_write_was_done():
    moved = _client_reply(b"", status=303, extra="Location: /elsewhere\r\n")
    with _ClientRawServer(moved) as server, Client(server.url) as client:
        with pytest.raises(pyetcd_client.HttpError) as caught:
            client.set("k", "v")
        assert caught.value.maybe_applied and len(server.requests) == 1


def test_client_fate_redirects_are_not_followed_on_request():
    moved = _client_reply(b"", status=307, extra="Location: /elsewhere\r\n")
    with _ClientRawServer(moved) as server, Client(server.url, allow_redirect=False) as client:
        for call in (client.get, client.delete):
            with pytest.raises(pyetcd_client.HttpError, match="not followed"):
                call("k")
        assert len(server.requests) == 2


def test_client_fate_endless_redirects():
    loop = _client_reply(b"", status=302, extra="Location: /v2/keys/k\r\n")
    with _ClientRawServer(loop) as server, Client(server.url) as client:
        with pytest.raises(pyetcd_client.BadReply, match="redirects"):
            client.get("k")
        assert len(server.requests) == pyetcd_client.REDIRECTS_MAX + 1


def test_client_fate_of_a_connection_the_server_closed_is_known():
    """urllib3 sees the end of a connection before it writes: no error, one request each."""
    with _ClientRawServer((_CLIENT_GOOD,)) as server, Client(server.url) as client:
        for count in range(1, 4):
            client.set("k", "v")
            assert server.closed.acquire(timeout=_CLIENT_WAIT_S)
            assert len(server.requests) == server.connections == count


def test_client_fate_idle_connections_are_not_used_again(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(pyetcd_client.time, "monotonic", lambda: clock[0])
    with _ClientRawServer(_CLIENT_GOOD) as server, Client(server.url) as client:
        client.set("k", "v")
        client.set("k", "v")
        assert server.connections == 1
        clock[0] += pyetcd_client.IDLE_CLOSE_S - 0.1
        client.set("k", "v")
        assert server.connections == 1
        clock[0] += pyetcd_client.IDLE_CLOSE_S + 0.1
        client.set("k", "v")
        assert server.connections == 2


def test_client_fate_another_cluster():
    with _ClientRawServer(_client_reply(_CLIENT_NODE, cluster="c1"),
                          _client_reply(_CLIENT_NODE, cluster="c2")) as server:
        with Client(server.url) as client:
            client.get("k")
            with pytest.raises(pyetcd_client.ClusterIdChanged, match="is c2, was c1") as caught:
                client.set("k", "v")
            assert caught.value.maybe_applied
            client.cluster_id = None
            assert client.get("k").value == "v"


def test_client_fate_health_answers():
    replies = [_client_reply(b'{"health": "true"}'), _client_reply(b'{"health":true}'),
               _client_reply(b'{"health": "false"}', status=503), _client_reply(b"<html>")]
    with _ClientRawServer(*replies) as server, Client(server.url) as client:
        assert [client.health() for _ in range(3)] == [True, True, False]
        with pytest.raises(pyetcd_client.BadReply):
            client.health()
        with pytest.raises(pyetcd_client.ConnectionFailed):
            client.health(_client_dead_url())


def test_client_fate_old_and_odd_answers():
    with _ClientRawServer(
            _client_reply(b"etcd 2.0.13"),
            _client_reply({"message": "During election"}, status=503),
            _client_reply({"errorCode": 999, "message": "New", "index": 1}, status=400),
            _client_reply(b"404 page not found\n", status=404)) as server:
        with Client(server.url) as client:
            assert client.server_version() == {"etcdserver": "2.0.13"}
            assert client.leader_member() is None
            with pytest.raises(pyetcd_client.ApiError) as caught:
                client.get("k")
            assert type(caught.value) is pyetcd_client.ApiError and caught.value.code == 999
            with pytest.raises(pyetcd_client.HttpError, match="404"):
                client.get("k")


# -- unit

@pytest.mark.parametrize("given, urls", [
    ((), ("http://127.0.0.1:2379",)),
    (("h",), ("http://h:2379",)),
    (("h", 4001), ("http://h:4001",)),
    ((("::1", 2379),), ("http://[::1]:2379",)),
    ((("h", 3),), ("http://h:3",)),
    (("::1", 3), ("http://[::1]:3",)),
    (("::1,fe80::2,h",), ("http://[::1]:2379", "http://[fe80::2]:2379", "http://h:2379")),
    ((["h:1", "https://h:2/", "g"], 7), ("http://h:1", "https://h:2", "http://g:7")),
    ((("http://[::1]:2379", ("::1", 3), ("h", 4)),),
     ("http://[::1]:2379", "http://[::1]:3", "http://h:4")),
    (("a:1, b:2,a:1",), ("http://a:1", "http://b:2")),
])
def test_client_unit_endpoints(given, urls):
    assert Client(*given).endpoints.urls == urls
    assert Client("ignored", endpoints=list(urls)).endpoints.urls == urls


def test_client_unit_endpoints_take_their_scheme_from_the_protocol():
    assert Client("h,http://g:1", protocol="https").endpoints.urls == (
        "https://h:2379", "http://g:1")


@pytest.mark.parametrize("url", [
    "http://:2379", "http://", "", "ftp://h:1", "http://h:x", "http://h:99999", "http://h:1/v2",
    "http://u:p@h:1", "http://h:1?x", "a:1,,b:2",
])
def test_client_unit_malformed_endpoint(url):
    with pytest.raises(ValueError, match="endpoint"):
        Client(url)


def test_client_unit_an_empty_list_of_endpoints_is_not_the_default():
    with pytest.raises(ValueError, match="at least one endpoint"):
        Client(endpoints=[])


def test_client_unit_endpoints_rotate():
    endpoints = pyetcd_client.Endpoints(["a:1", "b:1", "c:1"])
    endpoints.failed("http://a:1")
    endpoints.failed("http://a:1")                                  # another thread was first
    assert endpoints.candidates() == ("http://b:1", "http://c:1", "http://a:1")
    for url in endpoints.candidates():
        endpoints.failed(url)
    assert endpoints.current == "http://b:1"


def test_client_unit_arguments():
    with pytest.raises(ValueError, match="timeouts"):
        Client(read_timeout=-1)
    with pytest.raises(ValueError, match="belong together"):
        Client(username="u")
    with pytest.raises(ValueError, match="proxy"):
        Client(proxies={"http": "socks5://h:1"})


def test_client_unit_errors_can_be_pickled():
    error = pyetcd_client.KeyNotFound("Key not found", cause="/k", index=3, status=404)
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), copy.index) == (type(error), "100: Key not found (/k) [3]", 3)


def test_client_unit_values_are_frozen():
    with pytest.raises(AttributeError):
        pyetcd_client.Node("/k").value = "x"


def test_client_unit_a_forked_child_makes_its_own_connections(monkeypatch):
    with _ClientRawServer(_CLIENT_GOOD) as server, Client(server.url) as client:
        client.get("k")
        parent = os.getpid()
        monkeypatch.setattr(pyetcd_client.os, "getpid", lambda: parent + 1)
        client.get("k")
        assert server.connections == 2


def test_client_unit_environment_is_not_asked(monkeypatch):
    dead = _client_dead_url()
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, dead)
    monkeypatch.delenv("no_proxy", raising=False)
    with _ClientRawServer(_CLIENT_GOOD) as server, Client(server.url) as client:
        assert client.get("k").value == "v"


def test_client_unit_public_names_have_docstrings():
    source = Path(pyetcd_client.__file__).read_text(encoding="utf-8")
    for name in pyetcd_client.__all__:
        public = getattr(pyetcd_client, name)
        assert public.__doc__, name
        for member, function in vars(public).items() if isinstance(public, type) else ():
            assert member.startswith("_") or not callable(function) or function.__doc__, member
    banners = re.findall(r"^# (\d+\. [^-\n]+?)(?: --.*)?$", source, re.MULTILINE)
    assert banners == re.findall(r"^ {1,2}(\d+\. .+)$", pyetcd_client.__doc__, re.MULTILINE)


def test_client_unit_import_is_silent():
    result = _client_python("-W", "always", "-c", "import pyetcd_client")
    assert (result.returncode, result.stdout, result.stderr) == (0, b"", b"")


def test_client_unit_nothing_is_left_open():
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        with _ClientRawServer(_CLIENT_GOOD) as server, Client(server.url) as client:
            client.get("k")
            client.watch("k")


@pytest.mark.parametrize("words, stdin", [
    (["set", "/cli/in"], b"from stdin\n"), (["mk", "--in-order", "/cli/dir"], "ü".encode()),
    (["update", "/cli/in"], b"again"), (["get", "/cli/in"], b""),
])
def test_client_cli_value_from_stdin(_client_server, words, stdin):
    if shutil.which("etcdctl") is None:
        pytest.skip("etcdctl is not installed")
    _client_etcdctl(_client_server.url, "set", "/cli/in", "x")
    expected = _client_etcdctl(_client_server.url, *words, stdin=stdin)
    _client_etcdctl(_client_server.url, "set", "/cli/in", "x")
    got = _client_main("--endpoints", _client_server.url, *words, stdin=stdin)
    expected, got = (_client_blurred(outcome, "/cli") for outcome in (expected, got))
    assert got == expected or words[0] == "get"


@pytest.mark.parametrize("flags", [[], ["--recursive"], ["-o", "extended"], ["-o", "json"]],
                         ids=["plain", "recursive", "extended", "json"])
def test_client_cli_watch_side_by_side(_client_server, _client, _client_dir, flags):
    start = _client.set(_client_dir + "/other", "x").modified_index
    _client.set(_client_dir + "/k", "v")
    _client.delete(_client_dir + "/k")
    options = [flag for flag in flags if flag.startswith("--r")]
    words = [*[flag for flag in flags if flag not in options], "watch", *options]
    for index in (start, start + 1):
        command = [*words, "--after-index", str(index), _client_dir + "/k"]
        got = _client_main("--endpoints", _client_server.url, *command)
        assert got[0] == 0 and got[2] == ""
        if shutil.which("etcdctl"):
            assert got == _client_etcdctl(_client_server.url, *command)


def test_client_cli_watch_forever_ends_with_sigint(_client_server, _client, _client_dir):
    start = _client.set(_client_dir + "/a", "1").modified_index
    _client.set(_client_dir + "/b", "2")
    path = str(Path(pyetcd_client.__file__).parent)
    command = [sys.executable, "-m", "pyetcd_client", "--endpoints", _client_server.url, "watch",
               "--forever", "--recursive", "--after-index", str(start - 1), _client_dir]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          env={**os.environ, "PYTHONPATH": path}) as process:
        lines = [process.stdout.readline().decode() for _ in range(4)]
        process.send_signal(signal.SIGINT)
        rest, complaints = process.communicate(timeout=_CLIENT_WAIT_S)
    assert lines == [f"[set] {_client_dir}/a\n", "1\n", f"[set] {_client_dir}/b\n", "2\n"]
    assert (process.returncode, rest, complaints) == (0, b"", b"")


@pytest.mark.parametrize("words, code", [
    (["get", "k"], 2), (["--no-sync", "get", "k"], 4), (["member", "list"], 2),
    (["--no-sync", "member", "list"], 1), (["cluster-health"], 4),
])
def test_client_cli_unreachable(words, code):
    urls = [_client_dead_url(), _client_dead_url()]
    got = _client_main("--endpoints", ",".join(urls), *words)
    details = [f"error #{n}: dial tcp {url[7:]}: connect: connection refused"
               for n, url in enumerate(urls)]
    headline = "client: etcd cluster is unavailable or misconfigured"
    if code == 1:
        assert got == (1, "", headline + "\n")
    else:
        assert (got[0], got[2]) == (code, "\n".join([f"Error:  {headline}", *details, "", ""]))
    if shutil.which("etcdctl"):
        expected = _client_etcdctl(",".join(urls), *words)
        assert got[:2] == expected[:2]
        assert code == 1 or all(line[10:] in expected[2] for line in details)  # in any order


def test_client_cli_unknown_words_are_handled_as_by_etcdctl_2_3():
    assert _client_main("bogus")[:2] == (0, "No help topic for 'bogus'\n")
    for words in (["set", "--bogus", "k", "v"], ["--bogus", "get", "k"],
                  ["get", "--sort=maybe", "k"], ["set", "--ttl", "soon", "k", "v"],
                  ["--timeout", "soon", "get", "k"],
                  ["get", "-o"]):
        code, out, err = _client_main(*words)
        assert code == 0 and out.startswith("Incorrect Usage.\n") and err.startswith("pyetcdctl")


@pytest.mark.parametrize("words", [
    [], ["help"], ["-h"], ["--help"], ["help", "get"], ["get", "--help"], ["member"],
    ["help", "member", "list"], ["-h", "set"],
], ids=" ".join)
def test_client_cli_help(words):
    code, out, err = _client_main(*words)
    assert (code, err) == (0, "") and out.startswith("NAME:\n   pyetcdctl")


def test_client_cli_version():
    assert _client_main("--version") == (
        0, f"pyetcdctl version {pyetcd_client.__version__}\nBehaves as etcdctl 2.3.8\n", "")


def test_client_cli_endpoints_come_from_flags_then_environment(monkeypatch):
    dead = _client_dead_url()
    with _ClientRawServer(_CLIENT_GOOD) as server:
        monkeypatch.setenv("ETCDCTL_PEERS", dead)
        monkeypatch.setenv("ETCDCTL_ENDPOINT", dead)
        monkeypatch.setenv("ETCDCTL_ENDPOINTS", server.url[7:])
        assert _client_main("--no-sync", "get", "k") == (0, "v\n", "")
        monkeypatch.setenv("ETCDCTL_ENDPOINTS", dead)
        assert _client_main("-C", server.url, "--no-sync", "get", "k")[0] == 4
        assert _client_main("--endpoints", server.url, "--no-sync", "get", "k")[0] == 0
    assert _client_main("--endpoints", "http://:2379", "get", "k") == (
        1, "", "endpoint 'http://:2379' is not http://HOST:PORT or https://HOST:PORT\n")


def test_client_cli_timeouts():
    hold = threading.Event()
    with _ClientRawServer(lambda _: hold.wait(_CLIENT_WAIT_S)) as server:
        code, _, err = _client_main(
            "--no-sync", "--timeout", "150ms", "--debug", "--endpoints", server.url, "get", "k")
        hold.set()
    assert code == 4 and err.startswith(f"Cluster-Endpoints: {server.url}\n")
    assert f"error #0: client: endpoint {server.url} exceeded header timeout\n" in err
    assert pyetcd_client._parse_duration("1h1m1.5s10ms") == 3661.51


def test_client_cli_a_write_of_unknown_fate_is_reported_once():
    with _ClientRawServer(_CLIENT_TIMED_OUT) as server, _ClientRawServer(_CLIENT_GOOD) as other:
        code, out, err = _client_main(
            "--no-sync", "--endpoints", f"{server.url},{other.url}", "set", "k", "v")
        assert len(server.requests) == 1 and other.requests == []
    assert (code, out) == (4, "")
    assert f"error #0: client: etcd member {server.url} has no leader\n" in err
    assert "the write may have been applied" in err


def test_client_cli_uses_the_published_urls():
    with _ClientRawServer(_CLIENT_GOOD) as server:
        member = {"id": "a", "name": "m", "peerURLs": [], "clientURLs": [server.url]}
        members = {"members": [member]}
        with _ClientRawServer(_client_reply(members)) as entry:
            assert _client_main("--endpoints", entry.url, "get", "k") == (0, "v\n", "")
            assert [target for _, target, _ in entry.requests] == ["/v2/members"]


def test_client_cli_no_published_urls():
    with _ClientRawServer(_client_reply({"members": []})) as server:
        code, _, err = _client_main("--endpoints", server.url, "get", "k")
    assert code == 4 and err.startswith("etcd cluster has no published client endpoints.\n")


def test_client_cli_cluster_health_of_a_sick_cluster():
    sick = _client_reply(b'{"health": "false"}', status=503)
    dead = _client_dead_url()
    with _ClientRawServer(sick) as server:
        members = {"members": [
            {"id": "a1", "name": "m1", "peerURLs": [], "clientURLs": [server.url]},
            {"id": "a2", "name": "m2", "peerURLs": [], "clientURLs": [dead]},
            {"id": "a3", "name": "", "peerURLs": ["http://p:1"], "clientURLs": []}]}
        with _ClientRawServer(_client_reply(members)) as entry:
            code, out, err = _client_main("--endpoints", entry.url, "cluster-health")
    assert (code, err) == (5, "")
    assert out.splitlines() == [
        f"member a1 is unhealthy: got unhealthy result from {server.url}",
        f"failed to check the health of member a2 on {dead}: "
        f"dial tcp {dead[7:]}: connect: connection refused",
        f"member a2 is unreachable: [{dead}] are all unreachable",
        "member a3 is unreachable: no available published client urls",
        "cluster is unhealthy"]


def test_client_cli_unstarted_member_is_listed():
    members = {"members": [
        {"id": "a3", "name": "", "peerURLs": ["http://p:1", "http://p:2"], "clientURLs": []}]}
    with _ClientRawServer(_client_reply(members), _client_reply({"message": "x"}, 503)) as server:
        assert _client_main("--no-sync", "--endpoints", server.url, "member", "list") == (
            0, "a3[unstarted]: peerURLs=http://p:1,http://p:2\n", "")


def test_client_cli_runs_as_a_module(_client_server):
    result = _client_python(
        "-m", "pyetcd_client", "--endpoints", _client_server.url, "get", "/nope")
    assert result.returncode == 4
    assert re.fullmatch(rb"Error:  100: Key not found \(/nope\) \[\d+\]\n", result.stderr)


def test_client_cli_reader_that_went_away(_client_server, _client, _client_dir):
    for number in range(3):
        _client.set(f"{_client_dir}/{number}", "v")
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        path = str(Path(pyetcd_client.__file__).parent)
        result = subprocess.run(
            [sys.executable, "-m", "pyetcd_client", "--endpoints", _client_server.url, "ls",
             _client_dir], stdout=write_end, stderr=subprocess.PIPE, timeout=_CLIENT_WAIT_S,
            check=False, env={**os.environ, "PYTHONPATH": path})
    finally:
        os.close(write_end)
    assert (result.returncode, result.stderr) == (141, b"")
