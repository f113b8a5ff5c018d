"""check, dump, export and import: what is in a data directory, and on the way to etcd 3."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import struct
import subprocess

import pytest

import pyetcd
from pyetcd_client import Client
from tests.kit.basics import TESTDATA, eventually
from tests.kit.clients import run_tool
from tests.kit.exchange import etcdctl3
from tests.kit.files import _wal_unpack
from tests.kit.processes import ClusterMember, EtcdProcess, ended

_NEEDS_ETCD = pytest.mark.skipif(
    not (shutil.which("etcd") and shutil.which("etcdctl")),
    reason="needs etcd and etcdctl 3.4 (Debian: etcd-server, etcd-client)")


def _rescue_check(directory, path):
    """Return the JSON of `pyetcd check`, with the verdicts by version."""
    code, out, err = run_tool(directory, "check", path, "-json")
    assert code in (0, 1, 2) and not err, err
    found = json.loads(out)
    found["verdicts"] = {verdict["version"]: verdict for verdict in found["verdicts"]}
    assert (code == 1) == bool(found["damage"])
    return found


def _rescue_files(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture(name="_rescue_dir")
def _rescue_dir_fixture(tmp_path):
    """The recorded directory of etcd 2.3.8."""
    _wal_unpack("2.3.8", tmp_path)
    return tmp_path / "fixture.etcd"


# -- databases


@pytest.mark.parametrize("count", [0, 1, 30, 31, 5000])
def test_bolt_reads_what_it_writes(tmp_path, count):
    """Inline buckets, one leaf, several levels of branches, values of many pages."""
    items = [(b"%08d" % number, b"v" * (number % 300) + b"z" * 20_000 * (number % 999 == 7))
             for number in range(count)]
    path = tmp_path / "db"
    with open(path, "w+b") as file:
        pyetcd.write_bolt(file, {b"key": iter(items), b"empty": [], b"meta": [(b"a", b"b")]})
    with pyetcd.BoltReader(str(path)) as reader:
        assert list(reader._buckets) == [b"empty", b"key", b"meta"]
        assert list(reader.items(b"key")) == items
        assert list(reader.items(b"meta")) == [(b"a", b"b")]
        assert list(reader.items(b"empty")) == list(reader.items(b"absent")) == []


def test_bolt_damage_is_an_error_of_its_own(tmp_path):
    """Bytes that are changed, cut or invented end in BoltError, and in bounded work."""
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    rng, path = random.Random(seed), tmp_path / "db"
    whole = io.BytesIO()
    pyetcd.write_bolt(whole, {b"key": [(b"%04d" % n, b"v" * 50) for n in range(300)],
                              b"meta": [(b"a", b"b")]})
    for _ in range(300):
        data = bytearray(whole.getvalue())
        for _ in range(rng.randrange(1, 30)):
            data[rng.randrange(len(data))] = rng.choice((0, 1, 2, 255, rng.randrange(256)))
        path.write_bytes(data[:rng.choice((len(data), rng.randrange(len(data))))])
        try:
            with pyetcd.BoltReader(str(path)) as reader:
                for name in reader._buckets:
                    assert sum(1 for _ in reader.items(name)) < 100_000
        except pyetcd.BoltError as error:
            assert str(path) in str(error)


def _bolt_with(pages, root, overflow=0, children=()):
    """A database whose intact heads name so many pages; page 3 is a branch with `children`."""
    whole = io.BytesIO()
    pyetcd.write_bolt(whole, {b"key": [(b"%04d" % n, b"v" * 50) for n in range(300)]})
    data = bytearray(whole.getvalue())
    for start in (0, pyetcd.PAGE_BYTES):
        body = data[start + 16:start + 72]
        body[16:24], body[40:48] = root.to_bytes(8, "little"), pages.to_bytes(8, "little")
        data[start + 16:start + 72] = body
        data[start + 72:start + 80] = pyetcd._checksum(bytes(body)).to_bytes(8, "little")
    branch = struct.pack("<QHHI", 3, 1, len(children), overflow)
    branch += b"".join(struct.pack("<IIQ", 16, 0, child) for child in children)
    if children:
        start = 3 * pyetcd.PAGE_BYTES
        data[start:start + len(branch)] = branch
    return bytes(data)


@pytest.mark.parametrize("data", [
    _bolt_with(2**64 - 1, 2**64 - 2), _bolt_with(2**64 - 1, 2**51),
    _bolt_with(2**64 - 1, 3, overflow=2**32 - 1, children=(4,)),
    _bolt_with(2**64 - 1, 3, children=(3,)), _bolt_with(2**64 - 1, 3, children=(4,) * 200),
], ids=["root", "far-root", "overflow", "circle", "one-page-200-times"])
def test_bolt_head_that_names_more_pages_than_the_file_has_is_damage(tmp_path, data):
    """With a checksum that fits: a peer can send such a database with its snapshot."""
    path = tmp_path / "db"
    path.write_bytes(data)
    with pytest.raises(pyetcd.BoltError):
        pyetcd.BoltReader(str(path))
    assert pyetcd.holds_v3_data(io.BytesIO(data))


# -- check and dump


def test_rescue_check_says_what_a_directory_of_2_3_holds(_rescue_dir, tmp_path):
    """Ids, indexes, keys by place, and for each etcd whether it starts, with what is to blame."""
    before = _rescue_files(_rescue_dir)
    found = _rescue_check(tmp_path, _rescue_dir)
    expected = json.loads((TESTDATA / "datadir-2.3.8.expected.json").read_text())
    assert expected and found["etcdIndex"] == 103 and found["v2Keys"] == 14
    assert (found["snapshot"]["index"], found["lastIndex"]) == (102, 124)
    assert [member["name"] for member in found["members"]] == ["fixture"]
    verdicts = found["verdicts"]
    assert [version for version, verdict in verdicts.items() if verdict["starts"]] == ["2.3"]
    assert "failed to find database snapshot file" in verdicts["3.5"]["reasons"][0]
    assert any("detected disallowed custom content in v2store" in reason
               for reason in verdicts["3.6"]["reasons"])
    assert {"/alpha", "/dir1/k1", "/emptydir"} <= set(verdicts["3.6"]["keys"])
    assert "/_hidden/secret" not in verdicts["3.6"]["keys"]      # etcd's listing leaves it out
    assert {entry["index"] for entry in verdicts["3.6"]["entries"]} <= set(range(103, 125))
    assert _rescue_files(_rescue_dir) == before


def test_rescue_dump_names_the_place_of_every_key(_rescue_dir, tmp_path):
    """A key that only the log holds names the entry that wrote it."""
    code, out, err = run_tool(tmp_path, "dump", _rescue_dir, "-json")
    rows = [json.loads(line) for line in out.splitlines()]
    keys = {row["key"]: row for row in rows if "key" in row}
    assert (code, err) == (0, "")
    assert keys["/alpha"]["place"] == "snapshot" and keys["/alpha"]["modifiedIndex"] == 4
    assert (keys["/after-snap"]["place"], keys["/after-snap"]["entry"]) == ("log", 120)
    assert keys["/ttlfar"]["expiration"].startswith("2090-") and keys["/dir1"]["dir"]
    assert "/_hidden/secret" in keys
    entries = {row["entry"]: row for row in rows if "method" in row}
    assert entries[120]["path"] == "/after-snap" and entries[120]["committed"]
    code, text, err = run_tool(tmp_path, "dump", _rescue_dir)
    assert len(text.splitlines()) == len(rows)


@pytest.mark.parametrize("version", ["2.0.13", "2.3.8"])
def test_rescue_reads_a_damaged_directory_as_far_as_it_goes(tmp_path, version):
    """A cut or changed byte is reported with the last entry read; nothing is repaired."""
    _wal_unpack(version, tmp_path)
    directory = tmp_path / "fixture.etcd"
    wal = sorted((directory / "member/wal").glob("*.wal"))[-1]
    whole = wal.read_bytes()
    end = len(whole.rstrip(b"\0"))
    middle = bytearray(whole)
    middle[end - 300] ^= 0xFF
    wal.write_bytes(middle)
    before = _rescue_files(directory)
    found = _rescue_check(tmp_path, directory)
    assert len(found["damage"]) == 1 and "the log is read up to entry" in found["damage"][0]
    assert "replace the member" in found["next"] and found["v2Keys"] > 0
    code, out, err = run_tool(tmp_path, "export", directory)
    assert code == 1 and "read up to entry" in err and json.loads(out)["nodes"]
    assert _rescue_files(directory) == before


def test_rescue_of_random_damage_ends_with_a_report_or_an_error(tmp_path):
    """No damage of any file makes check, dump or export end in a traceback."""
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    rng = random.Random(seed)
    _wal_unpack("2.3.8", tmp_path)
    original = _rescue_files(tmp_path / "fixture.etcd")
    for number in range(40):
        path = tmp_path / "fixture.etcd"
        for file, data in original.items():
            file.write_bytes(data)
        for file in rng.sample(sorted(original), rng.randrange(1, 3)):
            data = bytearray(original[file])
            used = max(len(bytes(data).rstrip(b"\0")), 1)
            for _ in range(rng.randrange(4)):
                data[rng.randrange(used)] = rng.randrange(256)
            file.write_bytes(data[:rng.choice((len(data), rng.randrange(used)))])
        try:
            found = pyetcd.inspect_dir(str(path), "", lambda share, keys: None)
        except pyetcd.BackupError as error:
            assert "\n" not in str(error), number
            continue
        assert pyetcd.check_lines(found) and json.dumps(pyetcd.check_json(found))
        assert all(isinstance(line, str) for line in pyetcd.dump_lines(found))
        assert pyetcd.write_json(pyetcd.records_of_store(found.store), io.StringIO(), 1) >= 0


@pytest.mark.parametrize("words, text", [
    ((), "DIR is missing: a data directory"), (("a", "b"), "one word too many"),
    (("nowhere",), "nowhere does not exist"), ((".",), "holds no log"),
    (("x", "-jsn"), "did you mean -json"),
], ids=["none", "two", "absent", "no log", "typo"])
def test_rescue_wrong_words_are_answered_in_a_line(tmp_path, words, text):
    code, out, err = run_tool(tmp_path, "check", *words)
    assert code == 1 and out == "" and text in err and err.count("\n") == 1


_RESCUE_URL = "http://127.0.0.1:1"


@pytest.mark.parametrize("line, text", [
    ("backup x -data-dir d", "'x' is no flag: name directories with -data-dir and -backup-dir."),
    ("backup -data-dir d -dry-run true", "'true' is not a valid flag; -dry-run is a switch: write"),
    ("backup -data-dri d", "-data-dri; did you mean -data-dir? See 'pyetcd backup -help'."),
    ("backup -data-dir d x -bogus", "flag provided but not defined: -bogus."),
    ("restore -name r S -bogus", "flag provided but not defined: -bogus."),
    ("restore -name r a -dry-run b", "'b' is one word too many."),
    ("restore -dry-run -- S -name", "'-name' is one word too many."),
    ("restore —name r S", "it begins with a typographic dash, write -name."),
    ("restore EMPTY -name r", "SOURCE is missing: a snapshot file, or a data directory."),
    ("check EMPTY", "DIR is missing: a data directory."),
    ("check d -json yes", "'yes' is not a valid flag; -json is a switch: write -json, or"),
    ("dump - -json", "- does not exist; name the data directory of a member"),
    ("dump d -json extra -wal-dir x", "'extra' is one word too many."),
    ("export EMPTY", "DIR is missing: a data directory, or a URL of a cluster."),
    ("export http://::1:1", "; write http://[::1]:1."),
    (f"export {_RESCUE_URL} -endpoints {_RESCUE_URL}", "name one source."),
    (f"export {_RESCUE_URL} -wal-dir x", "-wal-dir has no effect with a cluster; leave it out."),
    ("export d -username a:b", "-username has no effect with a data directory; leave it out."),
    ("export d -ca-file a", "-ca-file has no effect with a data directory; leave it out."),
    (f"export {_RESCUE_URL} -ttl lease", "-ttl has no effect with -format json, which keeps times"),
    (f"export {_RESCUE_URL} -username a", "-username has no password: write NAME:PASSWORD."),
    (f"import -endpoints {_RESCUE_URL} f -bogus", "flag provided but not defined: -bogus."),
    (f"import -endpoints {_RESCUE_URL} f -key-file k", "-key-file is of no use without -cert-file"),
    (f"import - -endpoints {_RESCUE_URL} x", "'x' is one word too many."),
    ("bakup -data-dir d", "; did you mean the command `pyetcd backup`? See 'pyetcd -help'."),
    ("Restore x", "; did you mean the command `pyetcd restore`? See 'pyetcd -help'."),
    ("devv 3", "; did you mean the command `pyetcd dev`? See 'pyetcd -help'."),
])
def test_tools_word_that_would_be_ignored_is_answered(line, text, capsys, flags_logging):
    """In a line on stderr, with exit code 1, wherever the word stands."""
    words = ["" if word == "EMPTY" else word for word in line.split()]
    assert pyetcd.main(words) == 1
    out, err = capsys.readouterr()
    assert out == "" and text in err and err.count("\n") == 1


def test_tools_take_flags_before_between_and_behind_the_words(
    _rescue_dir, capsys, flags_logging
):
    lines = set()
    source, name = str(_rescue_dir), ["-name", "r"]
    for words in ([source, *name, "-dry-run"], [*name, source, "-dry-run"],
                  ["-dry-run", *name, source], ["-dry-run", *name, "--", source]):
        assert pyetcd.main(["restore", *words]) == 0, words
        lines.add(capsys.readouterr())
    assert len(lines) == 1


def test_tools_tell_what_is_odd_about_their_flags(_rescue_dir, capsys, flags_logging):
    for words, told in ((["-name", "'r'"], "quotes are part of it"),
                        (["-name", "q", "-name", "r"], "-name is given more than once: only"),
                        (["-name", "r", "-initial-cluster", "r=http://0.0.0.0:1"],
                         "nobody can connect to it")):
        assert pyetcd.main(["restore", str(_rescue_dir), "-dry-run", *words]) == 0
        err = capsys.readouterr().err
        assert err.startswith("restore: ") and told in err and err.count("\n") == 1


# -- export and import


def test_rescue_export_is_what_pyetcdctl_imports(_rescue_dir, tmp_path):
    """JSON of export, written into a cluster, gives the keys and the times to live back."""
    code, _, err = run_tool(tmp_path, "export", _rescue_dir, "-output", "keys.json")
    assert (code, err) == (0, "")
    with pyetcd.LocalMember() as member, Client(member.client_url) as client:
        code, out, err = run_tool(tmp_path, "import", "keys.json", "-endpoints", member.client_url,
                                  "-map", "/dir1=/moved")
        assert (code, err) == (0, "") and out.startswith("14 keys written")
        assert client.get("alpha").value == "1"
        assert client.get("moved/sub/deep").value == "déjà vu 中文"
        assert "dir1" not in client and client.get("ttlfar").ttl > 10**9
        client.set("alpha", "2")
        code, out, _ = run_tool(tmp_path, "import", "keys.json", "-endpoints", member.client_url,
                                "-keep")
        assert "existed and were kept" in out and client.get("alpha").value == "2"
        code, out, _ = run_tool(tmp_path, "export", member.client_url)
    records = {record["key"]: record for record in json.loads(out)["nodes"]}
    assert records["/queue/00000000000000000012"]["value"] == "job0"
    assert "expiration" in records["/ttlfar"]


@_NEEDS_ETCD
@pytest.mark.parametrize("ttl", ["drop", "lease"])
def test_rescue_export_as_database_is_restored_by_etcd_3(_rescue_dir, tmp_path, ttl):
    """etcdctl restores the snapshot, etcd 3.4 serves its keys, and import brings them back."""
    code, out, err = run_tool(tmp_path, "export", _rescue_dir, "-format", "db", "-output", "k.db",
                              "-ttl", ttl)
    assert (code, err) == (0, "") and out.startswith("k.db: 14 keys")
    member = ClusterMember(tmp_path, "m", EtcdProcess)
    subprocess.run(
        ["etcdctl", "snapshot", "restore", "k.db", "--name", "m", "--data-dir", "m.etcd",
         "--initial-cluster", f"m={member.peer}", "--initial-advertise-peer-urls", member.peer],
        cwd=tmp_path, check=True, capture_output=True, timeout=60,
        env={**os.environ, "ETCDCTL_API": "3"})
    member.start()
    with ended(member):
        eventually(lambda: member.request("GET", "/health") and member.request(
            "GET", "/health")[1].get("health") == "true", what="etcd 3.4 is healthy")
        assert etcdctl3(member, "get", "/dir1/sub/deep", "--print-value-only") == (
            "déjà vu 中文\n")
        assert len(etcdctl3(member, "get", "--prefix", "", "--keys-only").split()) == 14
        assert bool(etcdctl3(member, "lease", "list").split()[1:][2:]) == (ttl == "lease")
        etcdctl3(member, "put", "/new", "3")
        etcdctl3(member, "del", "/alpha")
        etcdctl3(member, "put", "bad//key", "x")
        etcdctl3(member, "snapshot", "save", str(tmp_path / "back.db"))
        etcdctl3(member, "snapshot", "status", str(tmp_path / "back.db"))
    with pyetcd.LocalMember() as target, Client(target.client_url) as client:
        code, out, err = run_tool(tmp_path, "import", "back.db", "-endpoints", target.client_url)
        assert code == 1 and err.splitlines() == [
            "import: bad//key: v2 cannot hold a key with an empty part"]
        assert client.get("new").value == "3" and "alpha" not in client
        assert client.get("dir1/sub/deep").value == "déjà vu 中文"
        assert (client.get("ttlfar").ttl is not None) == (ttl == "lease")


@_NEEDS_ETCD
def test_rescue_script_puts_every_key_into_etcd_3(tmp_path):
    """Quotes, newlines, options and long values arrive as they were; leases keep times to live."""
    values = {"plain": "1", "quote": "it's \"$x\" `y` \\", "lines": "a\nb\n", "dash": "--lease=1",
              "empty": "", "long": "<é>" * 100_000}
    with pyetcd.LocalMember() as member, Client(member.client_url) as client:
        for key, value in values.items():
            client.set(f"s/{key}", value)
        client.set("s/soon", "x", ttl=3000)
        code, _, err = run_tool(tmp_path, "export", member.client_url, "-format", "script",
                                "-output", "keys.sh", "-ttl", "lease", "-map", "/s=/t")
        assert (code, err) == (0, "")
    target = ClusterMember(tmp_path, "t", EtcdProcess)
    target.start_alone()
    with ended(target):
        subprocess.run(["sh", "keys.sh"], cwd=tmp_path, check=True, timeout=60,
                       env={**os.environ, "ETCDCTL_ENDPOINTS": target.client})
        for key, value in values.items():
            out = etcdctl3(target, "get", f"/t/{key}", "--print-value-only")
            assert out == value + "\n"
        assert len(etcdctl3(target, "lease", "list").split()) > 3


@_NEEDS_ETCD
def test_rescue_frees_a_directory_of_etcd_3_that_newer_ones_refuse(tmp_path):
    """check names what blocks; after the removal and a snapshot nothing does, up to etcd 3.6."""
    member = ClusterMember(tmp_path, "m", EtcdProcess)
    member.start("-initial-cluster", f"m={member.peer}", "--snapshot-count", "10")
    with ended(member):
        eventually(member._serves, what="etcd serves")
        for number in range(15):
            member.put(f"old/{number}", "x")
        member.process.kill(15)
        blocked = _rescue_check(tmp_path, tmp_path / "m.etcd")
        assert blocked["verdicts"]["3.5"]["starts"] and not blocked["verdicts"]["3.6"]["starts"]
        assert "/old/3" in blocked["verdicts"]["3.6"]["keys"]
        assert "Free a directory" in blocked["next"]
        member.start("-initial-cluster", f"m={member.peer}", "--snapshot-count", "10")
        eventually(member._serves, what="etcd serves")
        assert member.request("DELETE", "/v2/keys/old", recursive="true")[0] == 200
        for number in range(15):
            etcdctl3(member, "put", "k", str(number))
        member.process.kill(15)
        freed = _rescue_check(tmp_path, tmp_path / "m.etcd")
        assert freed["verdicts"]["3.6"]["starts"], freed["verdicts"]["3.6"]
        assert freed["v3Entries"] > 0 and freed["database"]["revisions"] == 15


def test_rescue_wants_one_source_and_a_target(tmp_path):
    for words, text in (
        (("export",), "name one source"), (("export", "d", "-endpoints", "http://127.0.0.1:1"),
                                           "name one source"),
        (("import", "f"), "-endpoints is missing"),
        (("export", "d", "-format", "xml"), "json, script"),
        (("import", "f", "-endpoints", "http://127.0.0.1:1"), "is no file"),
        (("export", "http://127.0.0.1:1"), "no answer from"),
    ):
        code, out, err = run_tool(tmp_path, *words)
        assert code == 1 and out == "" and text in err and err.count("\n") == 1, words


def test_rescue_import_refuses_a_file_that_is_cut_or_foreign(tmp_path):
    """The line with the fault is named; a file of another form is sent to another program."""
    head = '{"pyetcd_export": 1, "key": "/", "etcdIndex": 3, "nodes": [\n'
    for text, words in (
        (head + '{"key": "/a", "value": "1"}\n', "is cut"),
        (head + '{"key": "/a"}\n]}\n', "line 2"), ('{"node": {}}\n', "pyetcdctl import"),
        ("\0" * 5000, "no intact head"),
    ):
        (tmp_path / "f").write_text(text)
        code, _, err = run_tool(tmp_path, "import", "f", "-endpoints", "http://127.0.0.1:1",
                                "-dry-run")
        assert code == 1 and words in err and err.count("\n") == 1, err


def test_rescue_export_of_users_needs_no_password_in_dump(tmp_path):
    """dump shows that a user exists, never its hash."""
    with pyetcd.LocalMember("m", str(tmp_path)) as member, Client(member.client_url) as client:
        client.user_add("root", "pw")
    code, out, _ = run_tool(tmp_path, "dump", "m", "-json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and "$2" not in out
    assert any(row.get("key") == "/2/users/root" and "value" not in row for row in rows)
