"""Backup and restore."""

from __future__ import annotations

import concurrent.futures
import errno
import gzip
import io
import itertools
import json
import os
import re
import shutil
import sys
import threading

import pytest
import requests

import pyetcd
from pyetcd import (
    ConfChange,
    ConfChangeType,
    Entry,
    EntryID,
    EntryType,
    HardState,
    Member,
    Request,
    Snapshot,
    Store,
    Wal,
)
from tests.kit.basics import TESTDATA, eventually
from tests.kit.clients import run_tool
from tests.kit.files import _WAL_FIRST, _wal_other_process_gets, _wal_unpack
from tests.kit.processes import PROCESS_TYPES, ClusterMember, ended
from tests.kit.stores import store_json

_BACKUP_QUICK = ("-heartbeat-interval", "20", "-election-timeout", "200")
_BACKUP_DAMAGED = "0000000000000002-0000000000000066.snap"     # the newer one of the recording


def _backup_make(directory, *arguments):
    code, out, err = run_tool(directory, *arguments)
    assert (code, err) == (0, ""), err
    return out


def _backup_files(directory):
    """What is below a directory: path -> bytes; None for a directory."""
    return {path: None if path.is_dir() else path.read_bytes()
            for path in sorted(directory.rglob("*"))}


def _backup_keys(member):
    """What _backup_flat finds in a member."""
    return _backup_flat(member.request("GET", "/v2/keys/", recursive="true")[1]["node"])


def _backup_flat(node):
    """Key -> (value, modified index, created index, expiry) of all below a node."""
    found = {}
    for child in node.get("nodes", ()):
        found[child["key"]] = tuple(map(child.get, (
            "value", "modifiedIndex", "createdIndex", "expiration")))
        found.update(_backup_flat(child))
    return found


def _backup_recorded(directory):
    """Unpack a data directory that etcd 2.3.8 wrote; return its path and its lasting keys."""
    member = _wal_unpack("2.3.8", directory)
    expected = json.loads((TESTDATA / "datadir-2.3.8.expected.json").read_text())
    keys = _backup_flat(expected["keys"]["node"])
    return member.parent, {key: node for key, node in keys.items() if not node[3]}


def _backup_ids(member):
    """The ids of cluster and members."""
    status, listing, headers = member.request("GET", "/v2/members")
    return headers["X-Etcd-Cluster-Id"], {m["id"] for m in listing["members"]}


@pytest.mark.parametrize("copy_kind", ["pyetcd", "etcd"])
def test_backup_of_running_and_stopped_member_starts_with_every_key(copy_kind, tmp_path):
    """First the log alone, then with a snapshot; the source is not touched, no index changes."""
    if copy_kind == "etcd" and shutil.which("etcd") is None:
        pytest.skip("etcd is not installed")
    source, *copies = ClusterMember(tmp_path, "source"), *(
        ClusterMember(tmp_path, f"copy{number}", PROCESS_TYPES[copy_kind]) for number in range(3))

    def copy_to(copy):
        out = _backup_make(tmp_path, "backup", "-data-dir", "source.etcd",
                           "-backup-dir", f"{copy.name}.etcd")
        copy.start("-force-new-cluster", "-data-dir", f"{copy.name}.etcd", *_BACKUP_QUICK)
        return out

    with ended(source, *copies):
        source.start("-initial-cluster", f"source={source.peer}", "-snapshot-count", "40")
        source.process.wait_log("published")
        for number in range(20):
            source.put(f"d{number % 3}/{number}", f"v{number}")
        source.put("t", "soon", ttl=500)
        early = _backup_keys(source)
        copy_to(copies[0])
        for number in range(40):
            source.put("d1/1", number)
        source.process.wait_log("saved snapshot")
        source.put("behind", "snapshot")
        late = _backup_keys(source)
        copy_to(copies[1])
        source.process.kill()
        before = _backup_files(tmp_path / "source.etcd")
        assert re.match(r"copy2.etcd: member \w+ of cluster \w+, 22 keys", copy_to(copies[2]))
        assert _backup_files(tmp_path / "source.etcd") == before

        for copy, keys in zip(copies, (early, late, late)):
            copy.process.wait_log("published")
            assert _backup_keys(copy) == keys
            assert copy.put("more", "works")[0] == 201
        assert len({_backup_ids(copy)[0] for copy in copies}) == 3


def test_backup_and_restore_use_dedicated_wal_directories(tmp_path):
    """Of the source, of the copy and of the new member; a backup is a source, too."""
    data_dir, expected = _backup_recorded(tmp_path)
    shutil.move(data_dir / "member" / "wal", tmp_path / "wal")
    assert "holds no log" in run_tool(tmp_path, "restore", data_dir)[2]
    _backup_make(tmp_path, "backup", "-data-dir", data_dir, "-wal-dir", "wal",
                 "-backup-dir", "copy", "-backup-wal-dir", "copy-wal")
    assert sorted(path.name for path in (tmp_path / "copy-wal").iterdir()) == [_WAL_FIRST]
    assert sorted(path.name for path in (tmp_path / "copy" / "member").iterdir()) == ["snap"]
    shutil.move(tmp_path / "copy-wal", tmp_path / "copy" / "member" / "wal")
    _backup_make(tmp_path, "restore", "copy", "-name", "m", "-wal-dir", "m-wal")
    member = ClusterMember(tmp_path, "m")
    with ended(member):
        member.start("-wal-dir", "m-wal", *_BACKUP_QUICK)
        member.process.wait_log("published")
        keys = _backup_keys(member)
    modes = {oct(path.stat().st_mode & 0o777) for path in (tmp_path / "m.etcd", tmp_path / "m-wal")}
    assert modes == {"0o700"}
    assert {key: node for key, node in keys.items() if not node[3]} == expected


def test_restore_of_snapshot_under_writes_makes_three_new_members(tmp_path):
    """Exactly the keys up to its index; users and roles stay; old ids are refused."""
    source = ClusterMember(tmp_path, "source")
    news = [ClusterMember(tmp_path, f"m{i}") for i in (1, 2, 3)]
    news[0].peer = source.peer
    root, written, stop = ("root", "pw"), {}, threading.Event()

    def write():
        with requests.Session() as session:
            for number in itertools.takewhile(lambda _: not stop.is_set(), itertools.count()):
                answer = session.put(
                    f"{source.client}/v2/keys/k{number}", {"value": number}, auth=root)
                written[f"/k{number}"] = answer.json()["node"]["modifiedIndex"]

    with ended(source, *news):
        source.start("-initial-cluster", f"source={source.peer}")
        source.process.wait_log("set the initial cluster version")
        url = source.client + "/v2/auth"
        requests.put(f"{url}/users/root", json={"user": "root", "password": "pw"})
        requests.put(f"{url}/roles/r", json={
            "role": "r", "permissions": {"kv": {"read": ["/k1"], "write": []}}})
        requests.put(f"{url}/users/al", json={"user": "al", "password": "x", "roles": ["r"]})
        assert requests.put(f"{url}/enable").status_code == 200
        requests.delete(f"{url}/roles/guest", auth=root)
        writer = threading.Thread(target=write)
        writer.start()
        eventually(lambda: len(written) > 200, what="some keys")
        assert source.request("GET", "/v2/snapshot")[0] == 401
        answer = requests.get(f"{source.client}/v2/snapshot", auth=root)
        count = len(written)
        eventually(lambda: len(written) > count + 50, what="keys behind the snapshot")
        stop.set()
        writer.join()
        old_cluster, old_ids = _backup_ids(source)
        source.process.kill()

        (tmp_path / "s.snap").write_bytes(answer.content)
        initial = ",".join(f"{m.name}={m.peer}" for m in news)
        flags = ("-initial-cluster", initial, "-initial-cluster-token")
        code, _, err = run_tool(tmp_path, "restore", "s.snap", "-name", "m1", *flags,
                                "etcd-cluster")
        assert code == 1 and "name another -initial-cluster-token than etcd-cluster" in err
        for member in news:
            _backup_make(tmp_path, "restore", "s.snap", "-name", member.name, *flags, "new")
        for member in news:
            member.start(*_BACKUP_QUICK)
        for member in news:
            member.process.wait_log("published")

        index = int(answer.headers["X-Etcd-Index"])
        found = requests.get(f"{news[1].client}/v2/keys/", auth=root).json()["node"]["nodes"]
        assert {n["key"]: n["modifiedIndex"] for n in found} == {
            key: modified for key, modified in written.items() if modified <= index}
        read = requests.get(f"{news[2].client}/v2/keys/k1?quorum=true", auth=("al", "x"))
        assert read.status_code == 200 and read.json()["node"]["value"] == "1"
        put = requests.put(f"{news[2].client}/v2/keys/k2", {"value": 9}, auth=root)
        assert put.status_code == 200 and put.json()["node"]["modifiedIndex"] > index
        new_cluster, new_ids = _backup_ids(news[0])
        assert len(new_ids) == 3 and not new_ids & old_ids and new_cluster != old_cluster
        sent = requests.post(f"{news[1].peer}/raft", b"", headers={
            "X-Etcd-Cluster-ID": old_cluster, "X-Server-From": old_ids.pop(),
            "X-Server-Version": "2.3.8", "X-Min-Cluster-Version": "2.2.0"})
        assert sent.status_code == 412


def test_restore_of_data_directory_applies_what_is_committed_behind_the_snapshot(tmp_path):
    """Of two members: the entry beyond the commit index is left out, and the report says so."""
    ids = (7, 8)
    entries = [
        Entry(EntryType.CONF_CHANGE, 1, index, pyetcd.encode_conf_change(ConfChange(
            0, ConfChangeType.ADD_NODE, id,
            Member(id, (f"http://a:{id}",)).context_json().encode())))
        for index, id in enumerate(ids, 1)
    ] + [
        Entry(EntryType.NORMAL, 1, index, pyetcd.encode_request(Request(
            id=index, method="PUT", path=f"/1/k{index}", val="x")))
        for index in range(3, 7)
    ]
    wal = Wal.create(str(tmp_path / "d" / "member" / "wal"), pyetcd.encode_metadata(7, 1))
    wal.write(wal.encode(HardState(1, 7, 5), entries), sync=True)
    wal.close()

    out = _backup_make(tmp_path, "restore", "d", "-dry-run",
                       "-initial-advertise-peer-urls", "http://10.0.0.1:2380")
    report = pyetcd.restore(str(tmp_path / "d"), "n", data_dir=str(tmp_path / "n"), wal_dir="")
    backup = pyetcd.backup(str(tmp_path / "d"), str(tmp_path / "b"))

    assert "index 5\nleft out:    1 entries" in out and "default=http://10.0.0.1:2380" in out
    assert (report.etcd_index, report.keys, report.source.last) == (5, 3, EntryID(1, 5))
    store = Store()
    restored = pyetcd.read_source(str(tmp_path / "n"))
    store.recover(restored.snapshot.data)
    assert [name for name, _ in store.children("/0/members")] == [
        pyetcd.format_id(report.member_id)]
    assert restored.snapshot.voters == (report.member_id,)
    assert pyetcd.read_source(str(tmp_path / "b")).entries == entries[:5]
    assert {member.id for member in backup.members} == {7, 8}


def test_restore_keeps_every_index_and_expiry_time(tmp_path):
    """Of a data directory of etcd 2.3.8: snapshot, and the log behind it; only /0 changes."""
    data_dir, _ = _backup_recorded(tmp_path)
    report = pyetcd.restore(str(data_dir), "m", data_dir=str(tmp_path / "m"))
    source, _ = pyetcd.load_state(pyetcd.read_source(str(data_dir)), lambda share, keys: None)
    store, _ = pyetcd.load_state(pyetcd.read_source(str(tmp_path / "m")), lambda share, keys: None)
    for path in ("/1", "/"):
        shown = [store_json(tree, path, recursive=True, sorted=True, now_ns=0)
                 for tree in (source, store)]
        assert (shown[0] == shown[1]) == (path == "/1"), path
    assert store.current_index == source.current_index == report.etcd_index
    assert store._ttl.first()[0] == source._ttl.first()[0] != 0
    assert store.value("/0/version") == "2.3.0" and not store.children("/0/removed_members")


def test_restore_forgets_members_removed_ones_and_a_newer_version(tmp_path):
    store = Store()
    store.set("/0/members/5/raftAttributes", value='{"peerURLs":["http://a:1"]}', now_ns=0)
    store.set("/0/removed_members/6", now_ns=0)
    store.set("/0/version", value="3.4.0", now_ns=0)
    store.set("/1/a", value="b", now_ns=0)
    pyetcd.Snapshotter(str(tmp_path)).save(Snapshot(store.save(), (5,), 9, 3))
    report = pyetcd.restore(str(tmp_path / "0000000000000003-0000000000000009.snap"), "m",
                            data_dir=str(tmp_path / "m"))
    store, cluster = pyetcd.load_state(
        pyetcd.read_source(str(tmp_path / "m")), lambda share, keys: None)
    assert store.children("/0") == [("members", True)] and store.value("/1/a") == "b"
    assert tuple(cluster.members.values()) == (
        Member(report.member_id, tuple(sorted(pyetcd.DEFAULT_PEER_URLS.split(",")))),)
    assert store.current_index == 4


def test_backup_database_beside_the_snapshot_is_the_recorded_one(tmp_path):
    """etcd 3.4 was seen to start with these bytes."""
    pyetcd._write_bolt(str(tmp_path / "db"), 102)
    recorded = gzip.decompress((TESTDATA / "bolt-minimal.db.gz").read_bytes())
    assert (tmp_path / "db").read_bytes() == recorded


def test_backup_dry_run_and_refusals_change_nothing(
    tmp_path, monkeypatch, capsys, flags_logging
):
    """Exit code 1 and one line that says what to do."""
    data_dir, _ = _backup_recorded(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    (tmp_path / "s.snap").write_bytes(b"no snapshot at all")
    before = _backup_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    out = _backup_make(tmp_path, "backup", "-data-dir", data_dir, "-backup-dir", "b", "-dry-run")
    assert re.search(r"member [0-9a-f]+ of cluster c2403409e85ab695", out)
    assert "raft:        term 2, index 1" in out and "target:      b\n" in out
    out = _backup_make(tmp_path, "restore", "-dry-run", "-name", "m", data_dir)
    assert "m=http://localhost:2380,http://localhost:7001" in out and "target:      m.etcd" in out
    for words, told in (
        (f"backup -data-dir {data_dir} -backup-dir full", "full is not empty; name another"),
        (f"restore {data_dir} -data-dir full", "full is not empty; name another"),
        ("backup -data-dir none -backup-dir b", "none does not exist; name"),
        ("backup -data-dir full -backup-dir b", "full is no data directory of a member"),
        ("restore s.snap", "s.snap is damaged"),
        (f"restore {data_dir} -name m -initial-cluster a=http://h:1", "couldn't find local name"),
        (f"restore {data_dir} -initial-cluster default=http://h:1"
         f" -initial-advertise-peer-urls http://i:1", "--initial-cluster must include"),
        ("backup -data-dir x", "-backup-dir is missing. See 'pyetcd backup -help'."),
        ("restore", "SOURCE is missing"),
        ("restore a b", "'b' is one word too many. See 'pyetcd restore -help'."),
        ("restore a -initial-cluster m=http://:1", "has no host"),
    ):
        code = pyetcd.main(words.split())
        out, err = capsys.readouterr()
        assert (code, out) == (1, "") and told in err and err.count("\n") == 1, (words, err)
    assert _backup_files(tmp_path) == before


@pytest.mark.parametrize("content, told", [
    (b"\0" * 16 + b"\xed\xda\x0c\xed", "it is a database of etcd 3, which holds no keys of v2"),
    (gzip.compress(b"x", mtime=0), "it is compressed; run `gunzip` on it first"),
    (b'{"node":{}}', "it is JSON; `pyetcdctl import` reads what export has written"),
    (b"", "it is empty; take one with GET /v2/snapshot"),
    (b"no snapshot at all", "take one with GET /v2/snapshot, or name a file of member/snap"),
])
def test_restore_of_what_is_no_snapshot_says_what_it_is(content, told, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(pyetcd.BackupError) as caught:
        pyetcd.restore(str(path), data_dir=str(tmp_path / "new"))
    assert f"{path} is damaged or no snapshot of etcd 2: " in str(caught.value)
    assert told in str(caught.value) and "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("source, told", [
    ("nowhere", "does not exist; name the data directory of a member"),
    ("file", "is a file; name the data directory of a member"),
])
def test_backup_source_must_be_a_data_directory(source, told, tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(pyetcd.BackupError, match=told):
        pyetcd.backup(str(tmp_path / source), str(tmp_path / "copy"))
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("what", ["snapshot", "log"])
def test_backup_refuses_damaged_source(what, tmp_path):
    """The file is named, and the older snapshot; nothing is renamed, cut or left behind."""
    data_dir, _ = _backup_recorded(tmp_path)
    snap = data_dir / "member" / "snap" / _BACKUP_DAMAGED
    path = snap if what == "snapshot" else data_dir / "member" / "wal" / _WAL_FIRST
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    before = _backup_files(tmp_path)
    for work in (pyetcd.backup, pyetcd.restore):
        with pytest.raises(pyetcd.BackupError) as caught:
            work(str(data_dir), str(tmp_path / "new"))
        assert str(path) in str(caught.value) and "damaged" in str(caught.value)
        told = {"snapshot": "0033.snap is intact: move", "log": f"or restore {snap}, without"}
        assert told[what] in str(caught.value)
    assert _backup_files(tmp_path) == before


def test_backup_reads_a_torn_log_and_leaves_it_torn(tmp_path):
    """As if the member were in the middle of a write."""
    data_dir, _ = _backup_recorded(tmp_path)
    path = data_dir / "member" / "wal" / _WAL_FIRST
    path.write_bytes(path.read_bytes()[:-3])
    before = _backup_files(data_dir)
    pyetcd.backup(str(data_dir), str(tmp_path / "copy"))
    assert _backup_files(data_dir) == before
    assert pyetcd.read_source(str(tmp_path / "copy")).committed


def test_backup_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    data_dir, _ = _backup_recorded(tmp_path)

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(pyetcd, "_write_bolt", full)
    with pytest.raises(pyetcd.BackupError, match="No space left on device; make room"):
        pyetcd.backup(str(data_dir), str(tmp_path / "copy"),
                      backup_wal_dir=str(tmp_path / "copy-wal"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fixture.etcd"]


def test_backup_of_a_member_in_this_process_keeps_its_lock(tmp_path):
    """To close its log, read here, would free it for another process."""
    with pyetcd.Server(data_dir=str(tmp_path / "s")) as server:
        assert server.wait_ready()
        with pytest.raises(pyetcd.BackupError, match="use GET /v2/snapshot"):
            pyetcd.backup(str(tmp_path / "s"), str(tmp_path / "b"))
        content = requests.get(server.client_urls[0] + "/v2/snapshot").content
        assert not _wal_other_process_gets(tmp_path / "s" / "member" / "wal" / _WAL_FIRST)
    assert pyetcd.decode_snapshot_file(content).voters


def test_backup_snapshots_of_a_big_store_while_others_read(tmp_path):
    """20,000 keys: readers do not wait, one state for all bytes, nothing for who goes away."""
    store = Store()
    for number in range(20_000):
        store.set(f"/1/d{number % 100}/{number}", value=f"{number:0500}", now_ns=0)
    pyetcd.Snapshotter(str(tmp_path)).save(Snapshot(store.save(), (1,), 20_000, 2))
    path = tmp_path / "0000000000000002-0000000000004e20.snap"
    member = ClusterMember(tmp_path, "big")
    with ended(member), concurrent.futures.ThreadPoolExecutor() as pool:
        _backup_make(tmp_path, "restore", path, "-name", "big", "-initial-cluster",
                     f"big={member.peer}")
        member.start(*_BACKUP_QUICK)
        member.process.wait_log("published")
        url = member.client + "/v2/snapshot"
        assert requests.put(url).headers["Allow"] == "GET"
        gone = [requests.get(url, stream=True) for _ in range(pyetcd.DOWNLOADS_MAX)]
        refused = requests.get(url)
        assert refused.status_code == 503 and "try again" in refused.json()["message"]
        for answer in gone:
            answer.close()
        eventually(lambda: requests.get(url, stream=True).close() or member.put("a", 1)[0] == 200)

        downloads = [pool.submit(requests.get, url) for _ in range(2)]
        with requests.Session() as session:
            while not all(download.done() for download in downloads):
                assert session.get(member.client + "/v2/keys/d7/7").status_code == 200
                session.put(member.client + "/v2/keys/d7/7", {"value": "changed"})
        for download in downloads:
            answer = download.result()
            snapshot = pyetcd.decode_snapshot_file(answer.content)
            store.recover(snapshot.data)
            assert store.current_index == int(answer.headers["X-Etcd-Index"])
            assert snapshot.index == int(answer.headers["X-Raft-Index"])
            assert store.count_files("/1") == 20_001
            assert f"{snapshot.term:016x}-{snapshot.index:016x}.snap" in answer.headers[
                "Content-Disposition"]


def test_backup_progress_is_one_line_on_a_terminal_after_a_second(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    clock = itertools.count(0, 0.6)
    monkeypatch.setattr(sys, "stderr", Terminal())
    line = pyetcd.ProgressLine("restore", lambda: next(clock))
    line.show(0.1, 100)
    assert sys.stderr.getvalue() == ""
    line.show(0.45, 123_456)
    line.clear()
    assert sys.stderr.getvalue() == "\rrestore: 45% (123,456 keys)\r" + " " * 27 + "\r"
