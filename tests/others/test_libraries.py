"""Other clients: etcdctl and libraries, side by side."""

from __future__ import annotations

import functools
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import types
import urllib.parse
import urllib.request
from unittest import mock

import pytest
import requests

import pyetcd
import pyetcd_client
from tests.kit.basics import ROOT, eventually, free_port
from tests.kit.clients import _client_background
from tests.kit.http import _http_keys
from tests.kit.processes import copy_module

# Libraries from PyPI.  Every test runs on the real etcd too: that proves the test.


def _lib_address(url):
    return urllib.parse.urlsplit(url).hostname, urllib.parse.urlsplit(url).port


@functools.cache
def _lib_contrib():
    """contrib/etcd.py, under a name of its own beside python-etcd."""
    spec = importlib.util.spec_from_file_location("contrib_etcd", ROOT / "contrib" / "etcd.py")
    module = sys.modules["contrib_etcd"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(name="_lib_etcd", params=["python-etcd", "ours", "contrib"])
def _lib_etcd_fixture(request):
    """What a program imports: python-etcd, or pyetcd_client or contrib/etcd.py in its place."""
    if request.param == "ours":
        return pyetcd_client
    if request.param == "contrib":
        return _lib_contrib()
    pytest.importorskip("etcd.auth", reason="python-etcd is not installed")
    return sys.modules["etcd"]


@pytest.fixture(name="_lib_python")
def _lib_python_fixture(_client_server, _lib_etcd):
    """A client of python-etcd, or ours in its place."""
    host, port = _lib_address(_client_server.url)
    return _lib_etcd.Client(host=host, port=port, read_timeout=10)


@pytest.fixture(name="_lib_k3etcd")
def _lib_k3etcd_fixture():
    return pytest.importorskip("k3etcd", reason="k3etcd is not installed")


@pytest.fixture(name="_lib_k3")
def _lib_k3_fixture(_client_server, _lib_k3etcd):
    """A client of k3etcd."""
    host, port = _lib_address(_client_server.url)
    return _lib_k3etcd.Client(host=host, port=port)


def test_lib_python_etcd_keys(_lib_etcd, _lib_python, _client_dir):
    """Results carry action, indexes and previous node; errors are the classes of their codes."""
    key, other = _client_dir + "/a", _client_dir + "/b"
    created = _lib_python.write(key, "1")
    assert created.newKey and created.action == "set" and created.value == "1"
    assert created.createdIndex == created.modifiedIndex == created.etcd_index
    swapped = _lib_python.test_and_set(key, "2", "1")
    assert swapped.action == "compareAndSwap" and swapped._prev_node.value == "1"
    assert _lib_python.read(key, quorum=True).value == "2" and key in _lib_python
    assert other not in _lib_python
    mine, stale = _lib_python.read(key), _lib_python.read(key)
    mine.value = "3"
    assert _lib_python.update(mine).action == "compareAndSwap"
    refused = [
        (_lib_etcd.EtcdCompareFailed, _lib_python.update, stale),
        (_lib_etcd.EtcdCompareFailed, lambda: _lib_python.test_and_set(key, "x", "1")),
        (_lib_etcd.EtcdCompareFailed, lambda: _lib_python.delete(key, prevValue="1")),
        (_lib_etcd.EtcdAlreadyExist, lambda: _lib_python.write(key, "x", prevExist=False)),
        (_lib_etcd.EtcdKeyNotFound, lambda: _lib_python.write(other, "x", prevExist=True)),
        (_lib_etcd.EtcdKeyNotFound, _lib_python.delete, other),
        (_lib_etcd.EtcdNotFile, _lib_python.write, _client_dir, "x"),
        (_lib_etcd.EtcdNotFile, _lib_python.delete, _client_dir),
        (_lib_etcd.EtcdNotDir, _lib_python.write, key + "/below", "x"),
        (_lib_etcd.EtcdDirNotEmpty, lambda: _lib_python.delete(_client_dir, dir=True)),
        (_lib_etcd.EtcdRootReadOnly, lambda: _lib_python.delete("/", recursive=True)),
    ]
    for error, function, *arguments in refused:
        with pytest.raises(error):
            function(*arguments)
    last = _lib_python.delete(key, prevIndex=_lib_python.read(key).modifiedIndex)
    assert last.action == "compareAndDelete" and last._prev_node.value == "3"
    _lib_python.set(other, "ü & = % +")
    assert _lib_python.pop(other).value == "ü & = % +"


def test_lib_python_etcd_directories_and_order(_lib_python, _client_dir):
    """In-order keys, recursive sorted listings, hidden keys."""
    queue = [_lib_python.write(_client_dir + "/q", str(i), append=True).key for i in range(3)]
    assert queue == sorted(queue) and len(set(queue)) == 3
    _lib_python.write(_client_dir + "/d/e", "4")
    _lib_python.write(_client_dir + "/empty", None, dir=True)
    _lib_python.write(_client_dir + "/_hidden", "5")
    listing = _lib_python.read(_client_dir, recursive=True, sorted=True)
    assert [(leaf.key, leaf.value) for leaf in listing.leaves] == [
        (_client_dir + "/d/e", "4"), (_client_dir + "/empty", None),
        *zip(queue, ["0", "1", "2"])]
    assert listing.dir and _lib_python.read(_client_dir + "/_hidden").value == "5"
    assert _lib_python.delete(_client_dir, recursive=True).action == "delete"


def test_lib_python_etcd_ttl(_lib_python, _client_dir):
    """Keys and directories expire; a refresh keeps the value and wakes nobody."""
    key = _client_dir + "/a"
    written = _lib_python.write(key, "1", ttl=60)
    assert written.ttl == 60 and written.expiration
    refreshed = _lib_python.refresh(key, 30)
    assert refreshed.ttl == 30 and refreshed.value == "1"
    _lib_python.write(key, "2", ttl=None, prevExist=True)
    event = _lib_python.watch(key, index=written.modifiedIndex + 1)
    assert (event.value, event._prev_node.value) == ("2", "1")
    _lib_python.write(_client_dir + "/d", None, dir=True, ttl=1)
    _lib_python.write(_client_dir + "/d/x", "1")
    gone = _lib_python.watch(_client_dir + "/d", index=event.modifiedIndex + 3, timeout=10)
    assert gone.action == "expire" and _client_dir + "/d/x" not in _lib_python
    assert _lib_python.read(key).ttl is None


def test_lib_python_etcd_watch(_lib_etcd, _lib_python, _client_dir):
    """Past events by index, a timeout, and events without end."""
    first = _lib_python.write(_client_dir + "/a", "0").modifiedIndex
    with pytest.raises(_lib_etcd.EtcdWatchTimedOut):
        _lib_python.watch(_client_dir, timeout=0.2, recursive=True)
    watch = _lib_python.eternal_watch(_client_dir, index=first, recursive=True)
    with _client_background(lambda: [next(watch) for _ in range(5)]) as outcome:
        for value in ("1", "2"):
            _lib_python.write(_client_dir + "/b", value)
        _lib_python.test_and_set(_client_dir + "/b", "3", "2")
        _lib_python.delete(_client_dir + "/b")
    assert [(event.action, event.value) for event in outcome[0]] == [
        ("set", "0"), ("set", "1"), ("set", "2"), ("compareAndSwap", "3"), ("delete", None)]


@pytest.mark.parametrize("_lib_etcd", ["python-etcd"], indirect=True)   # ours: client_watch_
def test_lib_python_etcd_index_that_is_no_longer_kept(
    _lib_etcd, _lib_python, _client_server, _client_dir
):
    """After 1000 events a watch from the first one is told to read again."""
    first = _lib_python.write(_client_dir + "/a", "0").modifiedIndex
    _client_server.put_many([(_client_dir[1:] + "/a", "x")] * 1_008)
    with pytest.raises(_lib_etcd.EtcdEventIndexCleared):
        _lib_python.watch(_client_dir + "/a", index=first)


def test_lib_python_etcd_lock(_lib_etcd, _client_server, _client_dir):
    """One holder at a time; the next one wakes up when it lets go, or its TTL ends."""
    host, port = _lib_address(_client_server.url)
    client = _lib_etcd.Client(host=host, port=port, lock_prefix=_client_dir)
    mine, yours = (_lib_etcd.Lock(client, "door") for _ in range(2))
    assert mine.acquire(lock_ttl=60) and mine.is_acquired
    assert (mine.name, mine.path) == ("door", _client_dir + "/door")
    assert [leaf.value for leaf in client.read(mine.path).leaves] == [mine.uuid]
    assert not yours.acquire(blocking=False, lock_ttl=60) and not yours.is_acquired
    with _client_background(lambda: yours.acquire(blocking=True, lock_ttl=1)) as outcome:
        mine.release()
    assert outcome == [True] and not mine.is_acquired
    third = _lib_etcd.Lock(client, "door")
    if issubclass(_lib_etcd.Client, pyetcd_client.Client):
        yours.release()                             # ours is renewed as long as its holder lives
    assert third.acquire(blocking=True, timeout=10)
    third.release()
    with _lib_etcd.Lock(client, "door") as last:
        assert last.is_acquired


def test_lib_python_etcd_cluster_properties(_lib_python, _client_server):
    """Machines, members, leader, the three statistics, versions."""
    assert _lib_python.machines == [_client_server.url]
    (member,) = _lib_python.members.values()
    assert _lib_python.leader == member and member["clientURLs"] == [_client_server.url]
    assert _lib_python.stats["state"] == "StateLeader" and _lib_python.stats["id"] == member["id"]
    assert _lib_python.leader_stats == {"leader": member["id"], "followers": {}}
    before = _lib_python.store_stats["setsSuccess"]
    _lib_python.write("/counted", "1")
    assert _lib_python.store_stats["setsSuccess"] == before + 1
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", _lib_python.version)
    assert re.fullmatch(r"\d+\.\d+\.0", _lib_python.cluster_version)


def test_lib_python_etcd_goes_on_when_its_server_is_killed(_lib_etcd):
    """Writes and an endless watch move to another member and lose nothing."""
    with pyetcd.LocalCluster(3, election_ms=500) as cluster:
        addresses = tuple(map(_lib_address, cluster.client_urls))
        writer, watcher = (_lib_etcd.Client(host=addresses, allow_reconnect=True, read_timeout=15)
                           for _ in range(2))
        assert watcher.base_uri in cluster.client_urls
        start = writer.write("/w/0", "0").modifiedIndex
        events = watcher.eternal_watch("/w", index=start, recursive=True)
        with _client_background(lambda: [next(events).value for _ in range(20)]) as outcome:
            for number in range(1, 20):
                if number == 10:
                    next(m for m in cluster.members if m.client_url == writer.base_uri).kill()
                writer.write(f"/w/{number}", number)
        assert outcome == [[str(number) for number in range(20)]]
        assert len(writer.members) == 3 and writer.read("/w/19").value == "19"


def test_lib_python_etcd_auth(_lib_etcd, _client_own_server):
    """Users, roles and the switch; a user reads and writes what the role allows."""
    auth = _lib_etcd.auth
    host, port = _lib_address(_client_own_server)
    open_client = _lib_etcd.Client(host=host, port=port)
    open_client.write("/secret", "1")
    for name in ("root", "al"):
        user = auth.EtcdUser(open_client, name)
        user.password = "pw-" + name
        user.write()
    role = auth.EtcdRole(open_client, "reader")
    role.grant("/pub/*", "RW")
    role.grant("/read", "R")
    role.write()
    user = auth.EtcdUser(open_client, "al")
    user.read()
    user.roles = ["reader"]
    user.write()
    auth.Auth(open_client).active = True
    root, al = (_lib_etcd.Client(host=host, port=port, username=name, password="pw-" + name)
                for name in ("root", "al"))
    guest = auth.EtcdRole(root, "guest")
    guest.read()
    assert guest.acls == {"/*": "RW"}
    guest.delete()
    assert al.write("/pub/x", "1").newKey and al.read("/pub/x").value == "1"
    for refused in (lambda: al.read("/secret"), lambda: al.write("/read", "x"),
                    lambda: open_client.read("/pub/x"), lambda: auth.EtcdUser(al, "root").read()):
        with pytest.raises(_lib_etcd.EtcdInsufficientPermissions):
            refused()
    assert [user["user"] for user in auth.EtcdUser(root, "al").names] == ["al", "root"]
    assert root.read("/secret").value == "1"
    role.client = root
    role.revoke("/pub/*", "W")
    role.write()
    assert al.read("/pub/x").value == "1"
    with pytest.raises(_lib_etcd.EtcdInsufficientPermissions):
        al.write("/pub/x", "2")
    auth.Auth(root).active = False
    assert not auth.Auth(open_client).active and open_client.read("/secret").value == "1"


def test_lib_python_etcd_as_salt_uses_it(_lib_etcd, _client_server, _client_dir):
    """The calls of Salt's etcd_util, with its arguments; what it looks at, and catches."""
    host, port = _lib_address(_client_server.url)
    client = _lib_etcd.Client(host=host, port=port)
    top = _client_dir
    assert client.write(top + "/a", "1", ttl=None, dir=False).value == "1"
    assert client.write(top + "/d", None, ttl=None, dir=True).dir is True
    client.write(top + "/d/b", "2", ttl=60, dir=False)
    with pytest.raises(_lib_etcd.EtcdNotFile):
        client.write(top + "/d", None, ttl=None, dir=True)
    with pytest.raises(_lib_etcd.EtcdNotFile):
        client.write(top + "/d", "x", ttl=None, dir=False)
    with pytest.raises(_lib_etcd.EtcdNotDir):
        client.write(top + "/a/x", None, ttl=None, dir=True)
    with pytest.raises(_lib_etcd.EtcdRootReadOnly):
        client.write("/", None, ttl=None, dir=True)
    listed = client.read(top, recursive=False, wait=False, timeout=None)
    assert sorted((item.key, item.value, item.dir is True) for item in listed.children) == [
        (top + "/a", "1", False), (top + "/d", None, True)]
    client.write(top + "/empty", None, ttl=None, dir=True)
    (itself,) = client.read(top + "/empty", recursive=False, wait=False, timeout=None).children
    assert itself.key == top + "/empty" and itself.dir is True
    index = client.write(top + "/a", "3", ttl=None, dir=False).modifiedIndex
    seen = client.read(top + "/a", recursive=False, wait=True, timeout=0, waitIndex=index)
    assert (seen.key, seen.value, seen.dir, seen.modifiedIndex) == (top + "/a", "3", False, index)
    with pytest.raises(_lib_etcd.EtcdConnectionFailed):
        client.read(top + "/a", recursive=False, wait=True, timeout=1)
    with pytest.raises(_lib_etcd.EtcdDirNotEmpty) as caught:
        client.delete(top + "/d", dir=True)
    assert isinstance(caught.value, ValueError)
    with pytest.raises(_lib_etcd.EtcdNotFile):
        client.delete(top + "/d", recursive=False)
    assert client.delete(top, recursive=True)
    with pytest.raises(_lib_etcd.EtcdKeyNotFound) as caught:
        client.read(top, recursive=False, wait=False, timeout=None)
    assert isinstance(caught.value, _lib_etcd.EtcdException)
    assert not isinstance(caught.value, ValueError)


def test_lib_python_etcd_log_is_where_salts_cache_looks_for_it(_lib_etcd):
    log = _lib_etcd._log
    log.setLevel(log.level)
    assert log.name in ("etcd", "pyetcd_client")


def test_lib_python_etcd_as_conftool_uses_it(_lib_etcd, _client_server, _client_dir):
    """The calls of conftool's driver: options from a file, objects as JSON, atomic updates."""
    host, port = _lib_address(_client_server.url)
    options = json.loads(json.dumps({"host": host, "port": port, "protocol": "http"}))
    client = _lib_etcd.Client(**options)
    key = _client_dir + "/pools/eqiad/web/host1"
    with pytest.raises(_lib_etcd.EtcdKeyNotFound):
        client.read(key, quorum=True)
    assert client.write(key, json.dumps({"weight": 1}), prevExist=False).newKey
    with pytest.raises(_lib_etcd.EtcdAlreadyExist):
        client.write(key, "{}", prevExist=False)
    mine, stale = client.read(key, quorum=True), client.read(key)
    mine.value = json.dumps({**json.loads(mine.value), "pooled": "yes"})
    assert json.loads(client.update(mine).value) == {"weight": 1, "pooled": "yes"}
    stale.value = "{}"
    with pytest.raises(_lib_etcd.EtcdException):
        client.update(stale)
    assert client.read(_client_dir).dir is True and client.read(key).dir is False
    tree = client.read(_client_dir, recursive=True)
    assert [leaf.key for leaf in tree.leaves if leaf.key != _client_dir and not leaf.dir] == [key]
    flat = client.read(_client_dir, recursive=False)
    assert [leaf.key for leaf in flat.leaves] == [_client_dir + "/pools"]
    client.delete(key)
    assert client.delete(_client_dir, recursive=True, dir=True)


# -- seams: what programs replace, subclass, mock or reach for


class _LibAnswer:
    """What a test of a program lets `api_execute` return."""

    def __init__(self, payload, status=200):
        self.status, self.headers = status, {"x-etcd-index": "7"}
        self.data = json.dumps(payload).encode()

    def getheader(self, name, default=None):
        return self.headers.get(name.lower(), default)

    def getheaders(self):
        return self.headers


_LIB_CALLS = [
    (lambda client: client.read("/k", recursive=True, timeout=3),
     mock.call("/v2/keys/k", "GET", params={"recursive": "true"}, timeout=3)),
    (lambda client: client.read("/k"), mock.call("/v2/keys/k", "GET", params={}, timeout=None)),
    (lambda client: client.read("/k", timeout=0),
     mock.call("/v2/keys/k", "GET", params={}, timeout=0)),
    (lambda client: client.write("/k", "ü &", ttl=3, prevExist=False),
     mock.call("/v2/keys/k", "PUT", params={"value": "ü &", "ttl": "3", "prevExist": "false"})),
    (lambda client: client.write("/k", "v", append=True),
     mock.call("/v2/keys/k", "POST", params={"value": "v"})),
    (lambda client: client.delete("/k", "tid", prevValue="v"),
     mock.call("/v2/keys/k", "DELETE", params={"recursive": "true", "prevValue": "v"})),
    (lambda client: client.read("/a b", wait=True, waitIndex=3, timeout=4),
     mock.call("/v2/keys/a b", "GET", params={"wait": "true", "waitIndex": "3"}, timeout=4)),
    (lambda client: next(client.eternal_watch("/k", 3)),
     mock.call("/v2/keys/k", "GET", params={"wait": "true", "waitIndex": "3"}, timeout=0)),
]


@pytest.mark.parametrize("number", range(len(_LIB_CALLS)))
def test_lib_python_etcd_api_execute_may_be_replaced(_lib_etcd, number):
    """All verbs of a client go through it, with the same arguments: nothing is sent."""
    function, expected = _LIB_CALLS[number]
    node = {"key": "/k", "value": "v", "modifiedIndex": 3, "newKey": True}
    client = _lib_etcd.Client(port=1)
    client.api_execute = mock.Mock(return_value=_LibAnswer({"action": "get", "node": node}))
    result = function(client)
    (call,) = client.api_execute.mock_calls
    params = {name: str(value) for name, value in call.kwargs["params"].items()}
    assert call.args == expected.args and params == expected.kwargs["params"]
    assert call.kwargs.get("timeout") == expected.kwargs.get("timeout")
    assert (result.key, result.value, result.modifiedIndex) == ("/k", "v", 3) and result.newKey
    client.api_execute = mock.Mock(side_effect=_lib_etcd.EtcdKeyNotFound("/k"))
    assert "/k" not in client


def test_lib_python_etcd_client_may_be_subclassed(_lib_etcd, _client_server, _client_dir):
    """With an `api_execute` that looks at what passes, and a `key_endpoint` of its own."""
    class Client(_lib_etcd.Client):
        seen = ()
        below = _client_dir

        def api_execute(self, path, method, params=None, timeout=None):
            self.seen = (*self.seen, (method, path))
            return super().api_execute(path, method, params=params, timeout=timeout)

        @property
        def key_endpoint(self):
            return super().key_endpoint + self.below

    host, port = _lib_address(_client_server.url)
    client = Client(host=host, port=port, read_timeout=10)
    assert client.write("/a", "1").key == _client_dir + "/a" and client.read("/a").value == "1"
    index = client.write("/a", "2").modifiedIndex
    assert client.watch("/a", index=index).value == "2" and "/b" not in client
    path = f"/v2/keys{_client_dir}/"
    assert client.seen == (("PUT", path + "a"), ("GET", path + "a"), ("PUT", path + "a"),
                           ("GET", path + "a"), ("GET", path + "b"))
    with pytest.raises(_lib_etcd.EtcdWatchTimedOut):
        client.watch("/a", timeout=0.1)


def test_lib_python_etcd_results_and_errors_may_be_subclassed(_lib_etcd, _lib_python, _client_dir):
    """Attributes of results may be set, they are true, and compared by `_node_props`."""
    class Result(_lib_etcd.EtcdResult):
        def __init__(self, action=None, node=None, prevNode=None, **_):
            super().__init__(action, node, prevNode)
            self.extra, self.dir = "x", True

    result = Result("get", {"key": "/k", "modifiedIndex": 3})
    assert result and result.extra == "x" and result.dir and result.modifiedIndex == 3
    read = _lib_python.write(_client_dir, "v")
    read.key, read.note = "/other", 1
    assert read and read.key == "/other" and read.note == 1
    assert read != _lib_python.read(_client_dir) == _lib_python.read(_client_dir)
    assert set(_lib_etcd.EtcdResult._node_props) == {
        "key", "value", "expiration", "ttl", "modifiedIndex", "createdIndex", "newKey", "dir"}


def test_lib_python_etcd_causes_and_locks(_lib_etcd, _lib_python, _client_dir):
    """`cause` of an error that a program raises, or we; `is_taken` and `lock_key`."""
    class Failed(_lib_etcd.EtcdConnectionFailed):
        pass

    why = OSError("down")
    error = Failed("failed", cause=why)
    assert error.cause is why and isinstance(error, _lib_etcd.EtcdException)
    error.cause = None
    with pytest.raises(_lib_etcd.EtcdConnectionFailed) as caught:
        _lib_etcd.Client(port=1, allow_reconnect=False).read("/k")
    assert isinstance(caught.value.cause, Exception)
    lock = _lib_etcd.Lock(_lib_python, _client_dir.strip("/"))
    assert lock.is_taken is False and lock.acquire(lock_ttl=60) and lock.is_taken
    assert _lib_python.read(lock.lock_key).value == lock.uuid
    lock.release()
    assert not lock.is_taken


def test_lib_python_etcd_members_are_found(_lib_etcd):
    """With allow_reconnect=True one address is enough: when that server dies another is asked."""
    with pyetcd.LocalCluster(3, election_ms=500) as cluster:
        first = cluster.members[0]
        host, port = _lib_address(first.client_url)
        client = _lib_etcd.Client(host=host, port=port, allow_reconnect=True, read_timeout=15)
        client.write("/k", "1")
        # A follower answers 404 until it has applied the write.
        eventually(lambda: all(_http_keys(member, "GET", "/k")[0] == 200
                               for member in cluster.members), what="the write on all members")
        first.kill()
        eventually(lambda: client.read("/k").value == "1", what="a read from another member")
        assert client.base_uri != first.client_url


_LIB_NAMES = """
EtcdException EtcdError EtcdKeyError EtcdValueError EtcdKeyNotFound EtcdNotFile EtcdNotDir
EtcdAlreadyExist EtcdRootReadOnly EtcdDirNotEmpty EtcdCompareFailed EtcdConnectionFailed
EtcdWatchTimedOut EtcdInsufficientPermissions EtcdLockExpired EtcdClusterIdChanged
EtcdEventIndexCleared EtcdWatcherCleared EtcdLeaderElectionInProgress EtcdResult Lock Client
"""
_LIB_PROGRAM = f"""
import etcd, etcd.client, etcd.lock, etcd.auth
from etcd.client import Client
from etcd.lock import Lock
from etcd import auth
assert etcd.Client is etcd.client.Client is Client and etcd.Lock is etcd.lock.Lock is Lock
assert auth.EtcdUser and auth.EtcdRole and auth.Auth and "pyetcd_client" in repr(Lock)
assert not {set(_LIB_NAMES.split())} - set(dir(etcd)) and not hasattr(etcd, "main")
client = Client()
assert client.port == 4001 and client.protocol == "http" and client.read_timeout == 60
"""


def test_lib_python_etcd_contrib_names(tmp_path):
    """A program finds `etcd` and its modules, and the names that Salt and conftool use."""
    shutil.copy(ROOT / "contrib/etcd.py", tmp_path)
    copy_module(pyetcd_client, tmp_path)
    (tmp_path / "program.py").write_text(_LIB_PROGRAM)
    done = subprocess.run([sys.executable, str(tmp_path / "program.py")], capture_output=True,
                          text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_lib_python_etcd_contrib_http_may_be_replaced():
    """What programs mock below `api_execute`: errors, headers of a subclass, JSON."""
    etcd = _lib_contrib()

    class Client(etcd.Client):
        def _get_headers(self):
            return {"X-Token": "t"}

    client = Client(port=1)
    client.http.request = mock.Mock(return_value=_LibAnswer(
        {"action": "get", "node": {"key": "/k", "value": "v"}}))
    assert client.read("/k", quorum=True).value == "v"
    (call,) = client.http.request.mock_calls
    assert call.args == ("GET", "http://127.0.0.1:1/v2/keys/k")
    assert call.kwargs["fields"] == {"quorum": "true"}
    assert call.kwargs["headers"]["X-Token"] == "t"
    client.http.request_encode_body = mock.Mock(side_effect=OSError("broken"))
    with pytest.raises(etcd.EtcdConnectionFailed) as caught:
        client.write("/k", "v")
    assert caught.value.maybe_applied and isinstance(caught.value.cause, OSError)
    client.http.urlopen = mock.Mock(return_value=_LibAnswer({"user": "jo"}))
    client.http.request = mock.Mock(return_value=_LibAnswer({"users": []}))
    client.user_add("jo", "pw")
    assert json.loads(client.http.urlopen.mock_calls[0].kwargs["body"])["user"] == "jo"
    client.http = types.SimpleNamespace(request=mock.Mock(side_effect=OSError("broken")))
    with pytest.raises(etcd.EtcdConnectionFailed):
        client.read("/k")


def test_lib_k3etcd_keys(_lib_k3etcd, _lib_k3, _client_dir):
    """Writes, conditions, directories, TTL, and the classes of errors."""
    key = _client_dir + "/a"
    assert _lib_k3.set(key, "1").newKey and _lib_k3.get(key).value == "1"
    assert _lib_k3.test_and_set(key, "2", prevValue="1").action == "compareAndSwap"
    with pytest.raises(_lib_k3etcd.EcodeTestFailed):
        _lib_k3.test_and_delete(key, prevValue="1")
    with pytest.raises(_lib_k3etcd.EcodeNodeExist):
        _lib_k3.write(key, "x", prevExist=False)
    with pytest.raises(_lib_k3etcd.EcodeKeyNotFound):
        _lib_k3.get(_client_dir + "/nope")
    with pytest.raises(_lib_k3etcd.EcodeNotFile):
        _lib_k3.set(_client_dir, "x")
    _lib_k3.mkdir(_client_dir + "/d", ttl=60)
    assert _lib_k3.lsdir(_client_dir + "/d").ttl == 60
    assert _lib_k3.refresh(key, 30).ttl == 30 and _lib_k3.get(key).value == "2"
    _lib_k3.write(_client_dir + "/d", "x", append=True)
    assert [leaf.value for leaf in _lib_k3.rlsdir(_client_dir, sorted=True).leaves] == ["2", "x"]
    with pytest.raises(_lib_k3etcd.EcodeDirNotEmpty):
        _lib_k3.deldir(_client_dir + "/d")
    assert _lib_k3.test_and_delete(key, prevValue="2").action == "compareAndDelete"
    assert _lib_k3.rdeldir(_client_dir).action == "delete"


def test_lib_k3etcd_watch(_lib_k3etcd, _lib_k3, _client_dir):
    """A watch that ends with its timeout, and one up to a given index."""
    first = _lib_k3.set(_client_dir + "/a", "1").modifiedIndex
    for value in ("2", "3"):
        _lib_k3.set(_client_dir + "/a", value)
    with pytest.raises(_lib_k3etcd.EtcdReadTimeoutError):
        _lib_k3.watch(_client_dir + "/a", timeout=0.2)
    events = _lib_k3.eternal_watch(_client_dir + "/a", waitindex=first, until=first + 2)
    assert [event.value for event in events] == ["1", "2", "3"]


def test_lib_k3etcd_cluster(_lib_k3etcd):
    """Members and statistics of three; the client goes on when its server is killed."""
    with pyetcd.LocalCluster(3, election_ms=500) as cluster:
        hosts = tuple(map(_lib_address, cluster.client_urls))
        client = _lib_k3etcd.Client(host=hosts, allow_reconnect=True)
        urls = set(cluster.client_urls)
        assert set(client.clienturls) == set(client.machines) == urls
        assert sorted(client.names) == ["etcd1", "etcd2", "etcd3"] and len(set(client.ids)) == 3
        assert client.leader["clientURLs"] == [cluster.wait_leader().client_url]
        assert client.st_self["name"] == "etcd1" and "watchers" in client.st_store
        assert set(client.version) == {"etcdserver", "etcdcluster"}
        added = client.add_member(f"http://127.0.0.1:{free_port()}")
        client.change_peerurls(added["id"], f"http://127.0.0.1:{free_port()}")
        client.del_member(added["id"])
        assert added["id"] not in client.ids
        client.set("/a", "1")
        next(m for m in cluster.members if m.client_url == client.base_uri).kill()
        eventually(lambda: client.set("/a", "2").value == "2", what="a write by another member")
        assert client.base_uri in urls and client.get("/a").value == "2"


def test_lib_k3etcd_auth(_lib_k3etcd, _client_own_server):
    """root, one user and one role, made, used and removed."""
    host, port = _lib_address(_client_own_server)
    client = _lib_k3etcd.Client(host=host, port=port)
    assert client.create_root("pw") == {"user": "root", "roles": ["root"]}
    client.create_role("r", "pw", {"read": ["/a/*"], "write": []})
    assert client.create_user("al", "al1", "pw", ["r"]) == {"user": "al", "roles": ["r"]}
    client.enable_auth("pw")
    client.delete_role("guest", "pw")
    client.set("/a/x", "1")
    al = _lib_k3etcd.Client(host=host, port=port, basic_auth_account="al:al1")
    assert al.get("/a/x").value == "1"
    with pytest.raises(_lib_k3etcd.EcodeInscientPermissions):
        al.set("/a/x", "2")
    granted = client.grant_role_permissions("r", "pw", {"read": [], "write": ["/a/*"]})
    assert granted["permissions"]["kv"] == {"read": ["/a/*"], "write": ["/a/*"]}
    assert al.set("/a/x", "2").value == "2"
    assert client.get_user("al", "pw")["roles"] == [granted]
    assert client.revoke_user_roles("al", "pw", ["r"]) == {"user": "al", "roles": []}
    client.delete_user("al", "pw")
    client.delete_role("r", "pw")
    client.disable_auth("pw")
    assert _lib_k3etcd.Client(host=host, port=port).get("/a/x").value == "2"


def test_lib_patroni_leader_race(_client_server, _client_dir, monkeypatch):
    """Two members of Patroni: one leads, keeps and hands over its key; both see the whole state."""
    dcs = pytest.importorskip("patroni.dcs", reason="patroni or psycopg2 is not installed")
    connections = pytest.importorskip("urllib3.util.connection")
    monkeypatch.setattr(connections, "create_connection", connections.create_connection)
    host, port = _lib_address(_client_server.url)
    one, two = (dcs.get_dcs({
        "scope": "demo", "namespace": _client_dir, "name": name, "ttl": 30, "loop_wait": 5,
        "retry_timeout": 10, "etcd": {"host": f"{host}:{port}"}}) for name in ("one", "two"))
    assert one.get_cluster().is_unlocked() and one.initialize(create_new=True, sysid="7")
    assert not two.initialize(create_new=True, sysid="8")
    assert one.set_config_value('{"ttl":30}') and one.attempt_to_acquire_leader()
    assert not two.attempt_to_acquire_leader()
    for member in (one, two):
        assert member.touch_member({"conn_url": "postgres://x", "state": "running"})
    cluster = two.get_cluster()
    assert cluster.initialize == "7" and cluster.config.data == {"ttl": 30}
    assert cluster.leader.name == "one" and {m.name for m in cluster.members} == {"one", "two"}
    assert one.update_leader(cluster, 100) and two.get_cluster().status.last_lsn == 100
    assert two.manual_failover("one", "two") and one.get_cluster().failover.candidate == "two"
    sync = one.write_sync_state("one", ["two"], 0)
    assert sync and two.get_cluster().sync.leader == "one"
    with _client_background(two.watch, two.get_cluster().leader.version, 10.0) as seen:
        assert one.delete_leader(one.get_cluster().leader)
    assert seen == [True] and two.attempt_to_acquire_leader()
    assert one.delete_cluster() and one.get_cluster().is_empty()


# What well known users of etcd v2 send: method, key, form or query, and the answer's status with
# its action or error code.  {i} is the index of the last change.
_USER_REQUESTS = {
    "fleet": """
PUT machines/m1/object prevExist=true&ttl=30&value=m 404 100
PUT machines/m1/object prevExist=false&ttl=30&value=m 201 create
PUT machines/m1/object prevExist=true&ttl=30&value=m 200 update
GET machines recursive=true&sorted=true 200 get
PUT lease/engine-leader prevExist=false&ttl=30&value=m1 201 create
PUT lease/engine-leader prevExist=false&ttl=30&value=m2 412 105
PUT lease/engine-leader prevIndex={i}&ttl=30&value=m1 200 compareAndSwap
PUT lease/engine-leader prevIndex=1&ttl=30&value=m2 412 101
DELETE lease/engine-leader prevIndex=1 412 101
DELETE lease/engine-leader prevIndex={i} 200 compareAndDelete
PUT engine/version prevValue=1&value=2 404 100
PUT engine/version prevExist=false&value=1 201 create
PUT engine/version prevValue=1&value=2 200 compareAndSwap
PUT unit/5af prevExist=false&value=[Unit] 201 create
PUT unit/5af prevExist=false&value=[Unit] 412 105
PUT job/a.service/object prevExist=false&value=o 201 create
PUT job/a.service/target-state value=launched 201 set
PUT job/a.service/target prevExist=false&value=m1 201 create
GET job recursive=true&wait=true&waitIndex={i} 200 create
DELETE job/a.service/target prevValue=m2 412 101
DELETE job/a.service/target prevValue=m1 200 compareAndDelete
PUT job/a.service/job-state ttl=30&value=m1 201 set
PUT states/a.service/m1 ttl=30&value=active 201 set
GET state/a.service sorted=true 404 100
DELETE job/a.service recursive=true 200 delete
GET job recursive=true&sorted=true 200 get
DELETE job/a.service recursive=true 404 100
""",
    "skydns": """
PUT skydns/local/cluster/db/x1 ttl=60&value={"host":"10.0.0.1","port":5432} 201 set
PUT skydns/local/cluster/db/x2 value={"host":"10.0.0.2"} 201 set
GET skydns/local/cluster/db/x1 sorted=true&recursive=true 200 get
GET skydns/local/cluster sorted=true&recursive=true 200 get
GET skydns/local/nope sorted=true&recursive=true 404 100
GET skydns recursive=true&wait=true&waitIndex={i} 200 set
DELETE skydns/local/cluster/db/x1 dir=false&recursive=false 200 delete
""",
    "confd": """
PUT app/url value=http://x 201 set
PUT app/upstream/a value=1 201 set
GET app quorum=true&recursive=true&sorted=true 200 get
GET nope quorum=true&recursive=true&sorted=true 404 100
GET app recursive=true&wait=true&waitIndex={i} 200 set
""",
    "locksmith": """
PUT rebootlock/semaphore prevExist=false&value={"semaphore":1} 201 create
PUT rebootlock/semaphore prevExist=false&value={"semaphore":1} 412 105
PUT rebootlock/semaphore prevIndex={i}&value={"semaphore":0} 200 compareAndSwap
PUT rebootlock/semaphore prevIndex=1&value={"semaphore":0} 412 101
""",
    "flannel": """
PUT network/config value={"Network":"10.1.0.0/16"} 201 set
PUT network/subnets/10.1.15.0-24 prevExist=false&ttl=86400&value={} 201 create
PUT network/subnets/10.1.15.0-24 prevExist=false&ttl=86400&value={} 412 105
PUT network/subnets/10.1.15.0-24 prevExist=true&ttl=86400&value={} 200 update
GET network/subnets recursive=true 200 get
GET network/subnets recursive=true&wait=true&waitIndex={i} 200 update
""",
    "kubernetes": """
PUT registry/pods/default/a prevExist=false&value={} 201 create
PUT registry/pods/default/a prevExist=false&value={} 412 105
GET registry/pods/default/a quorum=true&recursive=false&sorted=false 200 get
PUT registry/pods/default/a prevIndex={i}&prevValue={}&value={"a":1} 200 compareAndSwap
PUT registry/pods/default/a prevIndex={i}&prevValue={}&value={"a":2} 412 101
GET registry/pods quorum=true&recursive=true&sorted=true 200 get
DELETE registry/pods/default/a prevIndex=1 412 101
DELETE registry/pods/default/a prevIndex={i} 200 compareAndDelete
GET registry/pods recursive=true&wait=true&waitIndex={i} 200 compareAndDelete
PUT registry/events/default/e prevExist=false&ttl=3600&value={} 201 create
""",
}


@pytest.mark.parametrize("user", _USER_REQUESTS)
def test_lib_requests_of_well_known_users(_client_server, _client_dir, user):
    """The sequence of requests of one user, below a hidden directory as fleet has it."""
    prefix = f"{_client_server.url}/v2/keys{_client_dir}/_{user}/"
    index, wrong = 0, []
    for line in _USER_REQUESTS[user].strip().split("\n"):
        method, key, parameters, status, expected = line.split()
        pairs = [pair.split("=", 1) for pair in parameters.replace("{i}", str(index)).split("&")]
        where = "data" if method == "PUT" else "params"
        answer = requests.request(method, prefix + key, timeout=10, **{where: dict(pairs)})
        body = answer.json()
        if (answer.status_code, str(body.get("action", body.get("errorCode")))) != (
                int(status), expected):
            wrong.append(f"{line}: {answer.status_code} {answer.text}")
        if answer.ok and method != "GET":
            index = body["node"]["modifiedIndex"]
    assert not wrong, "\n".join(wrong)
    assert not requests.get(f"{_client_server.url}/v2/keys{_client_dir}", timeout=10).json()[
        "node"].get("nodes")
