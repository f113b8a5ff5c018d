"""Auth: who may do what, and what it costs to find out."""

from __future__ import annotations

import base64
import concurrent.futures
import gc
import itertools
import json
import logging
import os
import re
import sys
import threading
import time
import tracemalloc

import pytest
import requests

import pyetcd
from pyetcd import Snapshot
from tests.kit.basics import eventually
from tests.kit.http import _http_member
from tests.kit.reactors import FakeReactor
from tests.kit.users import _AUTH_ROOT, _auth_call, _auth_enable, _auth_key

# Made by etcd 3.4.23 --enable-v2 for the password "wonderland".
_AUTH_HASH_OF_ETCD = "$2a$10$ik6vJNcLBS9qUmSC56ic6eBU0fUklCUp/tYH/LHNoms.cKRj3hje6"


def _auth_add(url, name, password, **kv):
    """Create a user with a role of the same name."""
    role = {"role": name, "permissions": {"kv": kv}}
    assert _auth_call(url, "PUT", f"roles/{name}", role)[0] == 201
    user = {"user": name, "password": password, "roles": [name]}
    assert _auth_call(url, "PUT", f"users/{name}", user)[0] == 200
    return name, password


@pytest.fixture
def auth_server(tmp_path):
    """A member with auth enabled and no rights for guests; its client URL is second."""
    with _http_member(tmp_path) as server:
        _auth_enable(server.client_urls[0])
        yield server, server.client_urls[0]


@pytest.mark.parametrize(("patterns", "key", "plain", "recursive"), [
    (["/*"], "/", True, True),
    (["/*"], "", False, False),             # /v2/keys without a slash
    (["*"], "", True, True),
    (["/pub/*"], "/pub", False, False),
    (["/pub/*"], "/pub/", True, True),
    (["/pub/*"], "/pub/x/y", True, True),
    (["/pub*"], "/public", True, True),
    (["/exact"], "/exact", True, False),
    (["/exact"], "/exact/", False, False),
    (["/a", "/b/*"], "/b/c", True, True),
    ([], "/", False, False),
    (None, "/", False, False),
])
def test_auth_patterns(patterns, key, plain, recursive):
    """A `*` at the end covers all below, and only that covers recursion."""
    for write in (False, True):
        allowed = pyetcd.Permissions(**{"write" if write else "read": patterns})
        assert allowed.allow(key, write=write, recursive=False) is plain
        assert allowed.allow(key, write=write, recursive=True) is recursive
        assert not allowed.allow(key, write=not write, recursive=False)


@pytest.mark.parametrize("header", [
    "", "Basic", "Basic ", "Basic !!!", "Bearer x", "Basic " + base64.b64encode(b"ab").decode(),
    "Digest cm9vdDp4",
])
def test_auth_malformed_credentials_are_none(header):
    """No guest rights for them either."""
    assert pyetcd.parse_credential(header) is None


def test_auth_credentials_may_hold_any_bytes():
    """The first colon divides; the rest belongs to the password."""
    encoded = base64.b64encode(b"al\xff:p:w:").decode()
    assert pyetcd.parse_credential(f"bAsIc {encoded}") == ("al\udcff", "p:w:")


def test_auth_hashes_of_etcd_verify_and_ours_look_the_same():
    """bcrypt by the system's library; a wrong password and a damaged hash do not verify."""
    passwords = pyetcd.Passwords(time.monotonic)
    if not passwords.bcrypt("x", "$2a$04$" + 22 * "."):
        pytest.skip("libcrypt of this system has no bcrypt")
    assert passwords.verify("wonderland", _AUTH_HASH_OF_ETCD)
    assert not passwords.verify("Wonderland", _AUTH_HASH_OF_ETCD)
    assert not passwords.verify("wonderland", _AUTH_HASH_OF_ETCD[:-1])
    assert not passwords.verify("x", "x") and not passwords.verify("", "")
    assert not passwords.verify("wonderland\0", _AUTH_HASH_OF_ETCD)
    assert not passwords.verify("wonder\0land", _AUTH_HASH_OF_ETCD)
    made = passwords.hash("p\u00e9")
    assert re.fullmatch(r"\$2a\$10\$[./A-Za-z0-9]{53}", made) and made != passwords.hash("p\u00e9")
    assert passwords.verify("p\u00e9", made) and not passwords.verify("pe", made)


def test_auth_without_bcrypt_another_hash_serves(tmp_path, monkeypatch, caplog):
    """PBKDF2, marked as such; hashes made by etcd are refused with a line that says why."""
    monkeypatch.setattr(pyetcd, "_BCRYPT_PROGRAM", "print('*0', end='')")
    passwords = pyetcd.Passwords(time.monotonic)
    assert not passwords.verify("wonderland", _AUTH_HASH_OF_ETCD)
    assert "libcrypt has no bcrypt" in caplog.text
    with _http_member(tmp_path) as server:
        url = server.client_urls[0]
        _auth_enable(url)
        stored = server.call(lambda etcd: etcd.store.value("/2/users/root"))
        assert json.loads(stored)["password"].startswith("$pbkdf2-sha256$")
        assert _auth_key(url, "GET", "/", auth=_AUTH_ROOT) == 200
        assert _auth_key(url, "GET", "/", auth=("root", "wrong")) == 401


@pytest.mark.parametrize("program", ["/nowhere/python", "/bin/false", "/bin/true", "/bin/echo"])
def test_auth_a_failed_check_says_nothing_about_the_password(
    auth_server, monkeypatch, caplog, program
):
    """503 and nothing remembered, also for a new password; never another kind of hash."""
    server, url = auth_server
    alice = _auth_add(url, "alice", "a", read=["/*"])
    assert _auth_key(url, "GET", "/", auth=_AUTH_ROOT) == 200
    before = server.call(lambda etcd: etcd.store.value("/2/users/alice"))
    with monkeypatch.context() as broken:
        broken.setattr(pyetcd, "_python", lambda: program)
        assert pyetcd.Passwords(time.monotonic).verify("a", json.loads(before)["password"]) is None
        with pytest.raises(pyetcd.AuthError, match="passwords cannot be hashed now"):
            pyetcd.Passwords(time.monotonic).hash("x")
        for auth in (alice, ("alice", "wrong"), ("nobody", "x")):
            assert _auth_key(url, "GET", "/", auth=auth) == 503
        for name in ("alice", "bob"):
            status, body = _auth_call(url, "PUT", f"users/{name}", {"user": name, "password": "y"})
            assert status == 503 and "try again" in body["message"]
        assert server.call(lambda etcd: etcd.store.value("/2/users/alice")) == before
        assert server.call(lambda etcd: etcd.store.value("/2/users/bob")) is None
    assert "passwords cannot be verified now" in caplog.text
    assert _auth_key(url, "GET", "/", auth=alice) == 200
    assert _auth_key(url, "GET", "/", auth=("alice", "wrong")) == 401


@pytest.mark.parametrize("executable", ["", "/usr/local/bin/etcd", "/bin/true"])
def test_auth_checks_need_no_right_name_of_the_program(monkeypatch, executable):
    """`exec -a etcd python3 pyetcd.py` makes Python believe that it is another."""
    if executable and not os.path.exists("/proc/self/exe"):
        pytest.skip("only Linux's /proc tells which program runs")
    monkeypatch.setattr(sys, "executable", executable)
    passwords = pyetcd.Passwords(time.monotonic)
    assert passwords.bcrypt("wonderland", _AUTH_HASH_OF_ETCD) in (_AUTH_HASH_OF_ETCD, "")
    assert passwords.verify("wonderland", passwords.hash("wonderland"))


def test_auth_half_a_surrogate_pair_is_a_wrong_password(auth_server, caplog):
    """No traceback; JSON that has it means U+FFFD, as in Go."""
    _, url = auth_server
    assert pyetcd.Passwords(time.monotonic).verify("\ud800", _AUTH_HASH_OF_ETCD) is False
    checks = pyetcd.PasswordChecks(FakeReactor())
    assert checks.known("\ud800", _AUTH_HASH_OF_ETCD, "\ud800") is None
    for raw in (b"\xed\xa0\x80", b"\xff", b"\xed\xb0\x80"):
        header = {"Authorization": "Basic " + base64.b64encode(b"root:" + raw).decode()}
        assert requests.get(url + "/v2/keys/", headers=header, timeout=60).status_code == 401
    body = b'{"user":"u","password":"\\ud800","roles":["\\udfff"]}'
    answer = requests.put(url + "/v2/auth/users/u", body, auth=_AUTH_ROOT, timeout=60)
    assert answer.json() == {"user": "u", "roles": ["\ufffd"]}
    assert _auth_call(url, "GET", "users/u")[0] == 404, "a role that does not exist"
    assert "Traceback" not in caplog.text and not any(r.exc_info for r in caplog.records)


def test_auth_unknown_users_cost_the_same_as_known_ones(auth_server, monkeypatch):
    """One check each, of a hash of the same kind; the second time it is remembered."""
    _, url = auth_server
    _auth_add(url, "alice", "a", read=["/*"])
    assert _auth_key(url, "GET", "/", auth=_AUTH_ROOT) == 200
    checked, verify = [], pyetcd.Passwords.verify

    def count(self, password, stored):
        checked.append(stored)
        return verify(self, password, stored)

    monkeypatch.setattr(pyetcd.Passwords, "verify", count)
    for user in ("alice", "nobody", "else"):
        before = len(checked)
        for _ in range(2):
            assert _auth_key(url, "GET", "/", auth=(user, "wrong")) == 401
            assert len(checked) == before + 1
    assert len({stored[:7] for stored in checked}) == 1
    assert {len(stored) for stored in checked} == {60}
    for user in ("x" * 2_000, "alice"):
        assert _auth_key(url, "GET", "/", auth=(user, "y" * 5_000)) == 401
    assert len(checked) == 3, "too long: wrong at once"
    assert pyetcd.Passwords.decoy("$pbkdf2-sha256$200000$aa$bb") == (
        "$pbkdf2-sha256$200000$aa$" + 64 * "0")


def test_auth_unknown_names_leave_nothing_in_memory(http_server):
    """Of users and roles that do not exist nothing is kept; long names are refused."""
    url = http_server.client_urls[0]

    def look(etcd):
        auth = pyetcd.Auth(etcd.store, etcd.applier, etcd.reactor)
        tracemalloc.start()
        try:
            for number in range(500):
                assert auth.user(f"{number}" + 10_000 * "x") is None
                assert auth.role(f"{number}" + 10_000 * "x") is None
            return tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()

    assert http_server.call(look) < 500_000
    name = 2_000 * "x"
    for method, kind in itertools.product(("GET", "PUT", "DELETE"), ("users", "roles")):
        body = {"user": name, "role": name, "password": "x"}
        assert _auth_call(url, method, f"{kind}/{name}", body)[0] == 400


def _finish_check(reactor):
    """Finish the next check, waiting for it if it has to wait; return its password."""
    while not reactor.jobs:
        reactor.next_timer()
    ((password, _), done), = reactor.jobs
    reactor.jobs.clear()
    done(None, password == "right")
    return password


@pytest.mark.parametrize("alike", [True, False], ids=["one name", "many names"])
def test_auth_guessers_slow_only_themselves(alike):
    """80 guess all the time from one address: eight others wait for one check each at most."""
    reactor = FakeReactor()
    checks = pyetcd.PasswordChecks(reactor)
    refused = []

    def guess(number, attempt=0):
        def done(known):
            refused.extend([] if known else [number])
            guess(number, attempt + 1)
        sender = pyetcd.Sender("root" if alike else f"u{number}", "10.0.0.1")
        checks.check(sender, "hash", f"wrong {number} {attempt}", done)

    for number in range(80):
        guess(number)
    for _ in range(160):
        _finish_check(reactor)
    began, answered = reactor.time, []
    for number in range(8):
        sender = pyetcd.Sender(f"other {number}", "10.0.0.1")
        checks.check(sender, f"hash {number}", "right", answered.append)
    order = [_finish_check(reactor) for _ in range(9)]
    assert order.count("right") == 8 and answered == [True] * 8
    assert reactor.time <= began + pyetcd.WRONG_PASSWORD_PAUSE_SECONDS, "no pause for them"
    assert not refused


def _auth_guess_with_new_names(checks, guessers, refused):
    """So many guess all the time from 10.0.0.1, each time as a user that does not exist."""
    names, decoy = itertools.count(), pyetcd.Passwords.decoy("")

    def guess():
        sender = pyetcd.Sender(f"no {next(names)}", "10.0.0.1")
        checks.check(sender, decoy, "guess", done)

    def done(known):
        refused.extend([] if known else [1])
        guess()

    for _ in range(guessers):
        guess()


@pytest.mark.parametrize("host", ["10.0.0.1", "10.0.0.2"])
@pytest.mark.parametrize("guessers", [80, 1_000])
def test_auth_guessers_with_new_names_slow_only_themselves(guessers, host):
    """Eight others, of their host or another, wait for one check each, and one pause at most."""
    reactor = FakeReactor()
    checks = pyetcd.PasswordChecks(reactor)
    refused, answered = [], []
    _auth_guess_with_new_names(checks, guessers, refused)
    for _ in range(160):
        _finish_check(reactor)
    began = reactor.time
    for number in range(8):
        sender = pyetcd.Sender(f"other {number}", host)
        checks.check(sender, f"hash {number}", "right", answered.append)
    order = [_finish_check(reactor) for _ in range(9)]
    assert order.count("right") == 8 and answered == [True] * 8
    assert reactor.time <= began + pyetcd.WRONG_PASSWORD_PAUSE_SECONDS and not refused
    before = reactor.time
    for _ in range(10):
        _finish_check(reactor)
    assert reactor.time >= before + 9 * pyetcd.WRONG_PASSWORD_PAUSE_SECONDS, "a pause for each"


def test_auth_a_host_that_guesses_learns_no_names_by_time():
    """One request after the other: users that exist wait for the same pause as others."""
    reactor = FakeReactor()
    checks = pyetcd.PasswordChecks(reactor)
    decoy, took = pyetcd.Passwords.decoy(""), []
    for number in range(60):
        sender, began = pyetcd.Sender(f"u{number}", "10.0.0.1"), reactor.time
        checks.check(sender, decoy if number % 2 else f"hash {number}", "no", lambda known: None)
        _finish_check(reactor)
        took.append(round(reactor.time - began, 3))
    assert set(took[10:]) == {pyetcd.WRONG_PASSWORD_PAUSE_SECONDS}


def test_auth_new_names_push_nobody_out_of_a_full_queue(monkeypatch):
    """The guessers' own checks are refused; what was counted of them is forgotten."""
    monkeypatch.setattr(pyetcd, "PASSWORD_CHECKS_MAX", 50)
    monkeypatch.setattr(pyetcd, "GUESSERS_MAX", 20)
    reactor = FakeReactor()
    checks = pyetcd.PasswordChecks(reactor)
    guessed, answered = [], []
    for number in range(120):
        sender = pyetcd.Sender(f"no {number}", "10.0.0.1")
        checks.check(sender, pyetcd.Passwords.decoy(""), "guess", guessed.append)
    assert guessed == [False] * 70
    for number in range(8):
        sender = pyetcd.Sender(f"other {number}", f"10.0.0.{number % 2 + 1}")
        checks.check(sender, f"hash {number}", "right", answered.append)
    for _ in range(50):
        _finish_check(reactor)
    assert answered == [True] * 8 and guessed.count(True) == 42
    assert len(checks._wrong) == 20 and not (checks._pending or checks._waiting)


def test_auth_who_guesses_most_is_refused_first_when_too_many_wait(monkeypatch):
    """A full queue has room for a user that has not been wrong."""
    monkeypatch.setattr(pyetcd, "PASSWORD_CHECKS_MAX", 50)
    reactor = FakeReactor()
    checks = pyetcd.PasswordChecks(reactor)
    guessed, answered = [], []
    for number in range(60):
        checks.check(pyetcd.Sender("root", "h"), "hash", f"wrong {number}", guessed.append)
    assert guessed == [False] * 10
    checks.check(pyetcd.Sender("alice", "h"), "other", "right", answered.append)
    assert guessed == [False] * 11 and not answered
    _finish_check(reactor)
    assert _finish_check(reactor) == "right" and answered == [True]


def test_auth_guessers_remembered_are_bounded(monkeypatch):
    """Senders, and passwords known: as many as the constants say."""
    monkeypatch.setattr(pyetcd, "GUESSERS_MAX", 10)
    monkeypatch.setattr(pyetcd, "PASSWORDS_KNOWN_MAX", 10)
    reactor = FakeReactor()
    checks = pyetcd.PasswordChecks(reactor)
    before = len(gc.get_objects())
    for number in range(100):
        checks.check(pyetcd.Sender(f"u{number}", "h"), "hash", "wrong", lambda known: None)
        _finish_check(reactor)
    del reactor.timers[:]
    assert len(gc.get_objects()) < before + 100


def test_auth_readers_writers_and_guests(auth_server):
    """GET needs read, all else write; watches and recursion too; guests have their own role."""
    _, url = auth_server
    reader = _auth_add(url, "reader", "r", read=["/pub/*"], write=None)
    writer = _auth_add(url, "writer", "w", read=None, write=["/pub/*", ""])
    assert _auth_key(url, "PUT", "/pub/a", auth=writer, value="1") == 201
    assert _auth_key(url, "GET", "/pub/a", auth=writer) == 401
    assert _auth_key(url, "GET", "/pub/a", auth=reader) == 200
    assert _auth_key(url, "GET", "/pub/", auth=reader, recursive="true") == 200
    assert _auth_key(url, "GET", "/pub/a", auth=reader, wait="true", recursive="bad") == 400
    assert _auth_key(url, "GET", "/else", auth=reader, wait="true") == 401
    assert _auth_key(url, "DELETE", "/pub/a", auth=reader) == 401
    assert _auth_key(url, "PUT", "/pub/a", auth=reader, ttl="x") == 400, "what is wrong comes first"
    assert _auth_key(url, "GET", "/pub/a") == 401
    _auth_call(url, "PUT", "roles/guest", {"role": "guest", "grant": {"kv": {"read": ["/pub/*"]}}})
    assert _auth_key(url, "GET", "/pub/a") == 200
    assert _auth_key(url, "GET", "/pub/", recursive="true") == 200, "guests: the plain test"
    assert _auth_call(url, "DELETE", "roles/guest")[0] == 200
    assert _auth_key(url, "GET", "/pub/a") == 401


def test_auth_guests_need_no_pattern_to_go_deeper(auth_server):
    """As in etcd 2.3.8, which looks at `recursive` for users only; the manual says so."""
    _, url = auth_server
    assert _auth_call(url, "DELETE", "roles/guest")[0] == 200
    role = {"role": "guest", "permissions": {"kv": {"read": ["/d"], "write": ["/d"]}}}
    assert _auth_call(url, "PUT", "roles/guest", role)[0] == 201
    user = _auth_add(url, "exact", "x", read=["/d"], write=["/d"])
    assert _auth_key(url, "PUT", "/d/e/f", auth=_AUTH_ROOT, value="1") == 201
    for key, query, guest, named in (
        ("/d", "", 200, 200), ("/d", "?recursive=true", 200, 401), ("/d/e", "", 401, 401),
        ("/d/e", "?recursive=true", 401, 401),
    ):
        assert _auth_key(url, "GET", key + query) == guest
        assert _auth_key(url, "GET", key + query, auth=user) == named
    assert _auth_key(url, "DELETE", "/d?recursive=true", auth=user) == 401
    assert _auth_key(url, "DELETE", "/d?recursive=true") == 200


def test_auth_members_and_settings_are_for_root(auth_server):
    """Reading members is open, changing them is not; nor is any of /v2/auth/ but one GET."""
    _, url = auth_server
    alice = _auth_add(url, "alice", "a", read=["/*"], write=["/*"])
    admin = {"user": "admin", "password": "x", "roles": ["root"]}
    assert _auth_call(url, "PUT", "users/admin", admin)[0] == 200
    assert requests.get(url + "/v2/members", timeout=10).status_code == 200
    for auth, status in ((None, 401), (alice, 401), (("admin", "x"), 404)):
        answer = requests.delete(url + "/v2/members/abc", auth=auth, timeout=10)
        assert answer.status_code == status
        assert ("X-Etcd-Cluster-Id" in answer.headers) is (status == 404)
        assert (_auth_call(url, "GET", "users", auth=auth)[0] == 200) is (status == 404)
    assert _auth_call(url, "GET", "enable", auth=None) == (200, {"enabled": True})
    for path in ("/version", "/health", "/v2/stats/self", "/metrics", "/v2/machines"):
        assert requests.get(url + path, timeout=10).status_code == 200


def test_auth_log_level_is_for_root(auth_server):
    """DEBUG fills the disk with requests, CRITICAL hides what an intruder does."""
    _, url = auth_server
    alice = _auth_add(url, "alice", "a", read=["/*"], write=["/*"])
    before = logging.getLogger("pyetcd").level
    for auth, status in ((None, 401), (alice, 401), (_AUTH_ROOT, 204)):
        answer = requests.put(url + "/config/local/log", json={"Level": "DEBUG"}, auth=auth,
                              timeout=10)
        assert answer.status_code == status
        assert (logging.getLogger("pyetcd").level == before) is (status == 401)


def test_auth_snapshot_over_http_is_for_root_where_it_holds_hashes(tmp_path):
    """Also before auth is enabled, and after: the users are there, and their hashes."""
    def snapshot(url, auth=None):
        return requests.get(url + "/v2/snapshot", auth=auth, timeout=10)

    with _http_member(tmp_path) as server:
        url = server.client_urls[0]
        assert snapshot(url).status_code == 200
        root = {"user": "root", "password": _AUTH_ROOT[1]}
        assert _auth_call(url, "PUT", "users/root", root, auth=None)[0] == 201
        for switch in (None, "PUT", "DELETE"):
            if switch:
                assert _auth_call(url, switch, "enable")[0] == 200
            for auth in (None, ("root", "wrong"), ("nobody", "")):
                refused = snapshot(url, auth)
                assert refused.status_code == 401 and b"$2a$" not in refused.content
                assert b"role root" in refused.content
            assert b"$2a$" in snapshot(url, _AUTH_ROOT).content
        assert _auth_call(url, "DELETE", "users/root")[0] == 200
        assert snapshot(url).status_code == 200


def test_auth_snapshot_files_are_for_their_owner_alone(tmp_path):
    """They hold password hashes, whatever the umask, and wherever they are moved."""
    before = os.umask(0)
    try:
        pyetcd.Snapshotter(str(tmp_path)).save(Snapshot(b"{}", (1,), 1, 1))
    finally:
        os.umask(before)
    (file,) = tmp_path.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600


def test_auth_changes_count_at_once_on_every_member(tmp_path):
    """A changed password and a revoked role: the next request sees them, also after a restart."""
    with pyetcd.LocalCluster(3, str(tmp_path), election_ms=500) as cluster:
        urls = cluster.client_urls
        eventually(lambda: "2.3.0" in requests.get(urls[0] + "/version", timeout=10).text)
        _auth_enable(urls[0])
        alice = _auth_add(urls[1], "alice", "a", read=["/*"], write=["/a/*"])
        for url in urls:
            eventually(lambda url=url: _auth_key(url, "GET", "/", auth=alice) == 200)
            assert _auth_key(url, "PUT", "/a/x", auth=alice, value="1") in (200, 201)
        revoke = {"role": "alice", "revoke": {"kv": {"write": ["/a/*"]}}}
        assert _auth_call(urls[2], "PUT", "roles/alice", revoke)[0] == 200
        assert _auth_key(urls[2], "PUT", "/a/x", auth=alice, value="1") == 401
        for url in urls:
            eventually(lambda url=url: _auth_key(url, "PUT", "/a/x", auth=alice, value="1") == 401)
        change = {"user": "alice", "password": "b"}
        assert _auth_call(urls[0], "PUT", "users/alice", change)[0] == 200
        assert _auth_key(urls[0], "GET", "/", auth=alice) == 401
        cluster.members[1].stop()
        cluster.members[1].start()
        assert _auth_key(urls[1], "GET", "/", auth=("alice", "b")) == 200
        assert _auth_key(urls[1], "GET", "/", auth=alice) == 401
        assert _auth_key(urls[1], "GET", "/") == 401


def test_auth_snapshots_carry_users(tmp_path):
    """After a restart from a snapshot the old credentials count, and the store is as it was."""
    with _http_member(tmp_path, snapshot_count=5) as server:
        _auth_enable(server.client_urls[0])
        for i in range(30):
            _auth_key(server.client_urls[0], "PUT", f"/k{i}", auth=_AUTH_ROOT, value="1")
        eventually(lambda: server.call(lambda etcd: etcd.snapshots.index) > 10)
    with _http_member(tmp_path) as server:
        assert _auth_key(server.client_urls[0], "GET", "/k1", auth=_AUTH_ROOT) == 200
        assert _auth_key(server.client_urls[0], "GET", "/k1") == 401


def test_auth_grants_at_the_same_time_are_all_kept(auth_server):
    """What one wrote, the other does not overwrite."""
    _, url = auth_server
    _auth_add(url, "alice", "a", read=["/*"])

    def grant(number):
        body = {"user": "alice", "grant": [f"r{number}"]}
        return _auth_call(url, "PUT", "users/alice", body)[0]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        statuses = list(pool.map(grant, range(24)))
    assert statuses == [200] * 24
    user = _auth_call(url, "PUT", "users/alice", {"user": "alice", "revoke": ["r0"]})[1]
    assert user["roles"] == sorted(["alice", *(f"r{i}" for i in range(1, 24))])


def test_auth_wrong_passwords_do_not_lock_others_out(auth_server):
    """Guesses queue up behind each other; who is known passes, who is right is known soon."""
    _, url = auth_server
    alice = _auth_add(url, "alice", "a", read=["/*"])
    assert _auth_key(url, "GET", "/", auth=_AUTH_ROOT) == 200
    ended, wrong = threading.Event(), []

    def guess(number):
        for attempt in itertools.count():
            if ended.is_set():
                return
            wrong.append(_auth_key(url, "GET", "/", auth=("root", f"guess {number} {attempt}")))

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        guesses = [pool.submit(guess, number) for number in range(6)]
        try:
            eventually(lambda: len(wrong) > 2)
            for _ in range(50):
                assert _auth_key(url, "GET", "/", auth=_AUTH_ROOT) == 200
            assert _auth_key(url, "GET", "/", auth=alice) == 200, "verified under attack"
        finally:
            ended.set()
        for future in guesses:
            future.result()
    assert set(wrong) == {401}


def test_auth_password_checks_are_bounded_and_shared(auth_server, monkeypatch):
    """The same question is asked once; beyond the limit the answer is 503."""
    _, url = auth_server
    monkeypatch.setattr(pyetcd, "PASSWORD_CHECKS_MAX", 4)
    go_on, asked = threading.Event(), []

    def verify(self, password, stored):
        asked.append(password)
        go_on.wait(20)
        return password == "rootpw"

    monkeypatch.setattr(pyetcd.Passwords, "verify", verify)
    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        def ask(password):
            return pool.submit(_auth_key, url, "GET", "/", auth=("root", password))

        same = [ask("no") for _ in range(6)]
        eventually(lambda: asked)
        others = [ask(f"no{i}") for i in range(9)]
        eventually(lambda: sum(future.done() for future in others) == 6)
        go_on.set()
        assert [future.result() for future in same] == [401] * 6
        statuses = sorted(future.result() for future in others)
    assert statuses == [401] * 3 + [503] * 6
    assert sorted(asked) == sorted({"no", *asked}) and len(asked) == 4
    assert _auth_key(url, "GET", "/", auth=("root", "no")) == 401 and len(asked) == 4, "remembered"


def test_auth_what_is_stored_by_others_may_be_anything(auth_server, caplog):
    """A record that is none is no user and no role, and says so in the log."""
    server, url = auth_server
    for path, value in (("/2/users/bad", "[]"), ("/2/roles/bad", '{"permissions":7}')):
        server.call(lambda etcd, path=path, value=value: etcd.do(
            pyetcd.Request(method="PUT", path=path, val=value), lambda result: None))
    eventually(lambda: server.call(lambda etcd: etcd.store.value("/2/roles/bad")))
    assert _auth_call(url, "GET", "users/bad")[0] == 404
    assert _auth_call(url, "GET", "roles/bad")[0] == 404
    assert _auth_call(url, "GET", "users")[0] == _auth_call(url, "GET", "roles")[0] == 200
    assert _auth_key(url, "GET", "/", auth=("bad", "x")) == 401
    assert "what is stored is no user" in caplog.text and "is no role" in caplog.text


@pytest.mark.parametrize(("path", "body", "message"), [
    ("users/u", {"user": "u", "password": 7}, "Invalid JSON in request body."),
    ("users/u", {"user": "u", "password": "x", "roles": "r"}, "Invalid JSON in request body."),
    ("users/u", {"user": "u", "password": "x\0"}, "the password is too long, or has a NUL in it"),
    ("users/u", {"user": "u", "password": "x" * 5000},
     "the password is too long, or has a NUL in it"),
    ("roles/r", {"role": "r", "permissions": []}, "Invalid JSON in request body."),
    ("roles/r", {"role": "r", "grant": {"kv": {"read": [1]}}}, "Invalid JSON in request body."),
    ("roles/r", [], "Invalid JSON in request body."),
    ("users/u", None, "Invalid JSON in request body."),
])
def test_auth_bad_bodies_are_refused(http_server, path, body, message):
    """400 with a message; nothing is stored."""
    url = http_server.client_urls[0]
    assert _auth_call(url, "PUT", path, body) == (400, {"message": message})
    assert http_server.call(lambda etcd: etcd.store.value("/2/" + path)) is None


def test_auth_paths_of_real_etcd_are_cleaned(auth_server):
    """Another member may propose `/2/users/`: the same as without the slash, on every member."""
    server, _ = auth_server
    results = []
    server.call(lambda etcd: etcd.do(pyetcd.Request(
        method="PUT", path="/2/users/", dir=True, prev_exist=False), results.append))
    eventually(lambda: results)
    assert isinstance(results[0], pyetcd.NodeExists)
    assert server.call(lambda etcd: etcd.store.children("/2/users")) == [("root", False)]


def test_auth_hidden_names_are_not_listed(auth_server):
    """They work, but only who knows them finds them."""
    _, url = auth_server
    _auth_add(url, "_hidden", "x", read=["/*"])
    assert _auth_key(url, "GET", "/", auth=("_hidden", "x")) == 200
    users, roles = (_auth_call(url, "GET", kind)[1][kind] for kind in ("users", "roles"))
    assert [user["user"] for user in users] == ["root"]
    assert [role["role"] for role in roles] == ["guest", "root"]


def test_auth_tokens_of_the_discovery_service_are_writes(auth_server):
    """Who may not write below /_etcd/registry gets no token, and cannot register."""
    _, url = auth_server
    assert requests.post(url + "/new", timeout=10).status_code == 401
    answer = requests.post(url + "/new", auth=_AUTH_ROOT, timeout=10)
    assert answer.status_code == 200
    registration = {"value": "a=http://h:1"}
    assert requests.put(answer.text + "/1", registration, timeout=10).status_code == 401


def test_auth_waits_until_all_members_can_have_it(http_server):
    """Before the cluster version is known there may be members without users."""
    url = http_server.client_urls[0]
    http_server.call(lambda etcd: setattr(etcd.cluster, "version", None))
    assert _auth_call(url, "GET", "enable") == (500, {
        "message": "Not capable of accessing auth feature during rolling upgrades."})
    http_server.call(lambda etcd: setattr(etcd.cluster, "version", "2.1.0"))
    assert _auth_call(url, "GET", "enable") == (200, {"enabled": False})


def test_auth_refusals_can_be_read_by_scripts_of_allowed_origins(tmp_path):
    """CORS headers are on every reply."""
    with _http_member(tmp_path, cors=["http://a.example"]) as server:
        _auth_enable(server.client_urls[0])
        answer = requests.get(server.client_urls[0] + "/v2/keys/a", timeout=10,
                              headers={"Origin": "http://a.example"})
        assert answer.status_code == 401
        assert answer.headers["Access-Control-Allow-Origin"] == "http://a.example"
