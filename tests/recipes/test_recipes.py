"""Recipes: lost answers, late writes, expiry, and who may hold what."""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import contextlib
import dataclasses
import itertools
import math
import os
import random
import re
import threading
import time

import pytest

import pyetcd
import pyetcd_client
from pyetcd_client import Client
from tests.kit.basics import eventually, manual_code
from tests.kit.clients import (
    _CLIENT_WAIT_S,
    _client_background,
    _client_dead_url,
    _client_python,
    _ClientRawServer,
    _net_black_hole,
)


class _RecipeClient(Client):
    """A client whose calls fail as `fault(call)` says: None, or a name from below.

    unsent   there was no connection           unheard  carried out, the answer is lost
    lost     sent, and never carried out       late     carried out by `deliver`
    """

    def __init__(self, url, fault=lambda call: None):
        super().__init__(url)
        self.fault = fault
        self.calls = []                         # what was asked, faults included
        self.held_back = collections.deque()    # late writes

    def _perform(self, call, *more, **options):
        self.calls.append(call)
        kind = self.fault(call)
        if kind is None:
            return super()._perform(call, *more, **options)
        if kind == "late":
            self.held_back.append(call)
        if kind == "unheard":
            with contextlib.suppress(pyetcd_client.ApiError):
                super()._perform(call, *more, **options)
        raise pyetcd_client.ConnectionFailed(kind, maybe_applied=kind != "unsent" and call.write)

    def deliver(self):
        """Carry out the late writes; return how many of them succeeded."""
        done = 0
        while self.held_back:
            with contextlib.suppress(pyetcd_client.ApiError):
                super()._perform(self.held_back.popleft())
                done += 1
        return done

    def count(self, method):
        return sum(call.method == method for call in self.calls)


def _recipe_first(kind, method, times=1):
    """Return a fault for the first calls with `method`."""
    left = [times]

    def fault(call):
        if call.method == method and left[0]:
            left[0] -= 1
            return kind
        return None
    return fault


def _recipe_cut(client):
    """Cut a client off."""
    client.fault = lambda call: "unsent"


@contextlib.contextmanager
def _recipe_no_threads():
    yield
    names = [t.name for t in threading.enumerate() if t.name.startswith("pyetcd-")]
    assert not names, "threads of recipes outlive them"


@pytest.fixture(name="_recipe_client")
def _recipe_client_fixture(_client_server):
    with _recipe_no_threads(), _RecipeClient(_client_server.url) as client:
        yield client


def _recipe_absent(client, key):
    try:
        client.get(key, quorum=True)
    except pyetcd_client.KeyNotFound:
        return True
    return False


_RECIPE_FATES = ("unsent", "unheard", "lost")


# -- leases

def test_recipe_import_starts_no_thread():
    result = _client_python(
        "-c", "import threading, pyetcd_client; print(threading.active_count())")
    assert (result.returncode, result.stdout) == (0, b"1\n")


def test_recipe_lease_outlives_its_ttl_wakes_nobody_and_goes_with_stop(_recipe_client, _client_dir):
    key = _client_dir + "/k"
    with pyetcd_client.Lease(_recipe_client, key, "me", ttl=2) as lease:
        made = _recipe_client.get(key)
        eventually(lambda: _recipe_client.get(key).modified_index > made.modified_index + 3)
        assert lease.alive
        found = _recipe_client.get(key)
        names = [t.name for t in threading.enumerate() if t.name.startswith("pyetcd-")]
        assert names == [f"pyetcd-heartbeat {key}"]
        assert (found.value, found.created_index) == ("me", made.created_index)
        with pytest.raises(pyetcd_client.WatchTimeout):
            _recipe_client.watch(key, index=made.modified_index + 1, timeout=0.1)
    assert not lease.alive and _recipe_absent(_recipe_client, key)


def test_recipe_lease_stays_lost(_recipe_client, _client_dir):
    key = _client_dir + "/k"
    lost = threading.Event()
    lease = pyetcd_client.Lease(_recipe_client, key, ttl=2, on_lost=lost.set).start()
    _recipe_client.set(key, "other")            # a new owner
    assert lost.wait(_CLIENT_WAIT_S) and not lease.alive
    assert lease.stop() is False
    assert _recipe_client.get(key).value == "other"         # and stop has not removed its file


def test_recipe_lease_that_was_over_is_not_revived_by_a_late_renewal(_recipe_client, _client_dir):
    with pyetcd_client.Lease(_recipe_client, _client_dir + "/k", ttl=30) as lease:
        lease._expires_at = pyetcd_client._clock()
        lease._renew()
        assert not lease.alive and not lease.alive


def test_recipe_lease_of_another_is_refused(_recipe_client, _client_dir):
    key = _client_dir + "/k"
    _recipe_client.set(key, "other")
    with pytest.raises(pyetcd_client.NodeExists):
        pyetcd_client.Lease(_recipe_client, key, "me").start()


def test_recipe_lease_arguments():
    with Client(_client_dead_url()) as client:
        for ttl in (0, -1):
            with pytest.raises(ValueError, match="ttl"):
                pyetcd_client.Lease(client, "k", ttl=ttl)
        with pytest.raises(ValueError, match="empty"):
            pyetcd_client.Lease(client, "k", "")


@pytest.mark.parametrize("fate", _RECIPE_FATES)
def test_recipe_lease_is_made_once_whatever_becomes_of_the_answer(
        _recipe_client, _client_dir, fate):
    key = _client_dir + "/k"
    _recipe_client.fault = _recipe_first(fate, "PUT", 2)
    with pyetcd_client.Lease(_recipe_client, key, ttl=5) as lease:
        assert lease.alive and _recipe_client.get(key).value == lease.value
        assert _recipe_client.get(_client_dir).etcd_index >= lease._index


def test_recipe_lease_is_made_again_when_the_first_file_expires_unseen(_recipe_client, _client_dir):
    """A lost answer, and a member that pauses: the file is gone before the lease can read it."""
    key, create = _client_dir + "/k", _recipe_client.create

    def create_and_expire(*args, **kwargs):
        _recipe_client.create = create
        create(*args, **kwargs)
        try:
            return create(*args, **kwargs)          # the repetition finds the file ...
        finally:
            _recipe_client.delete(key)              # ... which expires then

    _recipe_client.create = create_and_expire
    with pyetcd_client.Lease(_recipe_client, key, ttl=5) as lease:
        assert lease.alive and _recipe_client.get(key).value == lease.value


def test_recipe_lease_gives_up_on_a_file_that_is_never_there_to_read(_recipe_client, _client_dir):
    """A server that says `exists` and then `not found` is asked a few times, not for ever."""
    calls = []

    def exists(*args, **kwargs):
        calls.append(args)
        raise pyetcd_client.NodeExists("Key already exists")

    _recipe_client.create = exists
    with pytest.raises(pyetcd_client.NodeExists):
        pyetcd_client.Lease(_recipe_client, _client_dir + "/k", ttl=5).start()
    assert 1 < len(calls) < 20


@pytest.mark.parametrize("fate", (*_RECIPE_FATES, "late"))
def test_recipe_renewals_with_lost_answers_keep_the_file(_recipe_client, _client_dir, fate):
    with pyetcd_client.Lease(_recipe_client, _client_dir + "/k", ttl=30) as lease:
        for _ in range(3):
            before = lease._expires_at
            _recipe_client.fault = _recipe_first(fate, "PUT")
            with pytest.raises(pyetcd_client.ConnectionFailed):
                lease._renew()
            assert lease._expires_at == before and lease.alive
            lease._renew()
            assert lease._expires_at > before


def test_recipe_late_renewal_cannot_take_effect_after_a_later_one(_recipe_client, _client_dir):
    with pyetcd_client.Lease(_recipe_client, _client_dir + "/k", ttl=30) as lease:
        lease._renew()
        _recipe_client.fault = _recipe_first("late", "PUT")
        with pytest.raises(pyetcd_client.ConnectionFailed):
            lease._renew()
        lease._renew()
        assert (_recipe_client.deliver(), lease.alive) == (0, True)


def test_recipe_lease_works_where_refresh_is_unknown(_recipe_client, _client_dir):
    """etcd before 2.3 ignores the parameter: what is sent must not empty the value."""
    class OldServerClient(_RecipeClient):
        def _perform(self, call, *more, **options):
            form = call.form and call.form.replace(b"refresh=true", b"unknown=true")
            return super()._perform(dataclasses.replace(call, form=form), *more, **options)
    with OldServerClient(_recipe_client.endpoints.current) as client:
        with pyetcd_client.Lease(client, _client_dir + "/k", ttl=30) as lease:
            for _ in range(2):
                lease._renew()
                assert client.get(_client_dir + "/k").value == lease.value


def test_recipe_heartbeat_keeps_a_file_of_another(_recipe_client, _client_dir):
    key = _client_dir + "/k"
    with pytest.raises(pyetcd_client.KeyNotFound):
        pyetcd_client.Heartbeat(_recipe_client, key, ttl=20).start()
    _recipe_client.set(key, "v", ttl=2)
    with pyetcd_client.Heartbeat(_recipe_client, key, ttl=20) as heartbeat:
        assert heartbeat.alive and heartbeat.value == "v"
        assert _recipe_client.get(key).node.ttl > 10
    assert not heartbeat.alive and _recipe_client.get(key).value == "v"


# -- locks

def _recipe_lock(client, directory, **options):
    return pyetcd_client.Lock(client, directory.strip("/"), **options)


def test_recipe_lock_is_given_in_order_with_rising_tokens(_recipe_client, _client_dir):
    locks = [_recipe_lock(_recipe_client, _client_dir) for _ in range(4)]
    order = []

    def work(lock):
        with lock:
            assert sum(other.is_held for other in locks) == 1
            order.append((locks.index(lock), lock.token))

    with contextlib.ExitStack() as stack:
        assert locks[0].acquire()
        first = locks[0].token
        for number, lock in enumerate(locks[1:]):
            stack.enter_context(_client_background(work, lock))
            eventually(lambda n=number: len(locks[0].contenders()) == n + 2)
        assert locks[0].release() is True
    tokens = [first, *(token for _, token in order)]
    assert [number for number, _ in order] == [1, 2, 3]
    assert tokens == sorted(set(tokens)) and locks[0].token == 0
    assert locks[0].contenders() == []


def test_recipe_lock_release_wakes_only_the_next(_recipe_client, _client_server, _client_dir):
    clients = [_RecipeClient(_client_server.url) for _ in range(5)]
    go_on = threading.Event()

    def work(client):
        with _recipe_lock(client, _client_dir):
            go_on.wait(_CLIENT_WAIT_S)

    with contextlib.ExitStack() as stack:
        lock = _recipe_lock(_recipe_client, _client_dir)
        lock.acquire()
        for number, client in enumerate(clients):
            stack.enter_context(_client_background(work, client))
            eventually(lambda n=number: len(lock.contenders()) == n + 2)
        eventually(lambda: all(client.count("GET") == 1 for client in clients))
        lock.release()
        eventually(lambda: clients[0].count("GET") == 2)
        gets = [client.count("GET") for client in clients]
        go_on.set()
    assert gets == [2, 1, 1, 1, 1]


def test_recipe_lock_who_gives_up_leaves_nothing(
        _recipe_client, _client_server, _client_dir, monkeypatch):
    with Client(_client_server.url) as other, _recipe_lock(other, _client_dir) as held:
        lock = _recipe_lock(_recipe_client, _client_dir)
        assert lock.acquire(blocking=False) is False
        assert lock.acquire(timeout=1) is False
        with _client_background(lock.acquire) as outcome:
            eventually(lambda: len(held.contenders()) == 2)
            lock.cancel()
        assert outcome == [False]

        def interrupt(*_):
            raise KeyboardInterrupt
        monkeypatch.setattr(lock, "_blocker", interrupt)
        with pytest.raises(KeyboardInterrupt):
            lock.acquire()
        assert held.contenders() == [held.uuid] and held.is_held and not lock.is_held


def test_recipe_lock_is_known_to_be_lost_before_another_gets_it(
        _recipe_client, _client_server, _client_dir):
    lost = []
    lock = _recipe_lock(_recipe_client, _client_dir, ttl=2,
                        on_lost=lambda: lost.append((lock.is_held, lock.token)))
    with lock, Client(_client_server.url) as other:
        _recipe_cut(_recipe_client)
        with _recipe_lock(other, _client_dir):
            assert not lock.is_held
            with pytest.raises(pyetcd_client.LockExpired):
                lock.check()
        eventually(lambda: lost)
        _recipe_client.fault = lambda call: None
    assert lost == [(False, 0)]


def test_recipe_lock_lost_by_removal_can_be_acquired_again(_recipe_client, _client_dir):
    lost = threading.Event()
    lock = _recipe_lock(_recipe_client, _client_dir, ttl=2, on_lost=lost.set)
    with lock:
        token = lock.token
        _recipe_client.delete(lock.path, recursive=True)
        assert lost.wait(_CLIENT_WAIT_S)
        assert lock.acquire() and lock.token > token


def test_recipe_lock_waiter_that_was_removed_stands_in_line_again(_recipe_client, _client_dir):
    held, lock = (_recipe_lock(_recipe_client, _client_dir, ttl=2) for _ in range(2))
    held.acquire()
    with _client_background(lock.acquire) as outcome:
        entry = eventually(lambda: _recipe_client.ls(held.path)[1:])[0]
        _recipe_client.delete(entry.key)
        eventually(lambda: [node for node in _recipe_client.ls(held.path)[1:]
                                    if node.key != entry.key])
        held.release()
    assert outcome == [True]
    lock.release()


@pytest.mark.parametrize("fate", _RECIPE_FATES)
def test_recipe_lock_one_acquire_makes_one_entry(_recipe_client, _client_dir, fate):
    _recipe_client.fault = _recipe_first(fate, "POST", 2)
    with _recipe_lock(_recipe_client, _client_dir) as lock:
        assert lock.contenders() == [lock.uuid]
        # What was found again is not written again.
        assert _recipe_client.count("POST") == (1 if fate == "unheard" else 3)
    assert lock.contenders() == []


def test_recipe_lock_second_entry_that_arrives_late_is_swept_away(_recipe_client, _client_dir):
    _recipe_client.fault = _recipe_first("late", "POST")
    with _recipe_lock(_recipe_client, _client_dir) as lock:
        assert _recipe_client.deliver() == 1
        assert lock.contenders() == [lock.uuid] * 2 and lock.is_held
    assert lock.contenders() == []


def test_recipe_lock_release_with_lost_answers(_recipe_client, _client_dir):
    lock = _recipe_lock(_recipe_client, _client_dir)
    lock.acquire()
    _recipe_client.fault = _recipe_first("unheard", "DELETE", 2)
    assert lock.release() is True and lock.contenders() == []
    assert lock.release() is False


def test_recipe_lock_has_the_interface_of_python_etcd(_recipe_client, _client_dir):
    lock = _recipe_lock(_recipe_client, _client_dir)
    assert lock.acquire(blocking=True, lock_ttl=60, timeout=0) and lock.is_acquired
    entry = _recipe_client.ls(lock.path)[0]
    assert lock.path == "/_locks" + _client_dir and lock.name == _client_dir[1:]
    assert entry.value == lock.uuid and 50 < entry.ttl <= 60
    assert lock.acquire(lock_ttl=100)           # renews, as there
    assert _recipe_client.ls(lock.path)[0].ttl > 60
    lock.release()
    assert not lock.is_acquired and lock.uuid == ""


def test_recipe_lock_stands_in_one_line_with_python_etcd(
        _recipe_client, _client_server, _client_dir):
    etcd = pytest.importorskip("etcd")
    host, port = _client_server.url[7:].split(":")
    theirs = etcd.Lock(etcd.Client(host=host, port=int(port)), _client_dir[1:])
    with _recipe_lock(_recipe_client, _client_dir) as ours:
        assert theirs.acquire(blocking=False) is False
    assert theirs.acquire() is True
    with _client_background(ours.acquire) as outcome:
        eventually(lambda: len(theirs.client.read(ours.path)._children) == 2)
        before = _recipe_client.count("GET")
        assert theirs.acquire(lock_ttl=60) is True      # renews by an unconditional write
        eventually(lambda: _recipe_client.count("GET") > before)
        assert outcome == [] and len(ours.contenders()) == 2
        theirs.release()
    assert outcome == [True] and ours.release()


def test_recipe_lock_threads_that_share_it_exclude_each_other(_recipe_client, _client_dir):
    lock = _recipe_lock(_recipe_client, _client_dir)
    with lock:
        with _client_background(lock.acquire, False) as outcome:
            eventually(lambda: outcome)
        assert outcome == [False]
        with _client_background(lock.acquire, True, None, 0.05) as outcome:
            eventually(lambda: outcome)
        assert outcome == [False] and lock.is_held
        assert lock.contenders() == [lock.uuid]


def test_recipe_lock_of_a_forked_child_is_not_held(_recipe_client, _client_dir, monkeypatch):
    with _recipe_lock(_recipe_client, _client_dir) as lock:
        parent = os.getpid()
        with monkeypatch.context() as child:
            child.setattr(pyetcd_client.os, "getpid", lambda: parent + 1)
            assert not lock.is_held and lock._held.stop() is False
        assert lock.is_held and lock.contenders() == [lock.uuid]


def test_recipe_lock_without_a_server_says_so(monkeypatch):
    monkeypatch.setattr(pyetcd_client, "OUTAGE_S", 0.2)
    with Client(_client_dead_url()) as client, pytest.raises(pyetcd_client.ConnectionFailed):
        pyetcd_client.Lock(client, "x").acquire()


def test_recipe_rlock_needs_as_many_releases_as_acquires(_recipe_client, _client_dir):
    lock = pyetcd_client.RLock(_recipe_client, _client_dir[1:], ttl=2)
    lost = threading.Event()
    lock._on_lost = lost.set
    with lock, lock:
        assert lock.acquire()
        assert lock.release() and lock.contenders() == [lock.uuid]
    assert not lock.is_held and lock.contenders() == []
    with lock:
        _recipe_client.delete(lock.path, recursive=True)
        assert lost.wait(_CLIENT_WAIT_S)
        assert lock.acquire() is False          # the outer block goes on without the lock
        with pytest.raises(pyetcd_client.LockExpired), lock:
            pass
    assert lock.acquire() and lock.release()


def test_recipe_rwlock_readers_share_and_writers_do_not(_recipe_client, _client_dir):
    both = pyetcd_client.RWLock(_recipe_client, _client_dir)
    with both.read_lock() as first, both.read_lock() as second:
        assert first.is_held and second.is_held
        writer = both.write_lock()
        assert writer.acquire(blocking=False) is False
        with _client_background(writer.acquire) as outcome:
            eventually(lambda: len(first.contenders()) == 3)
            # A reader that comes after a writer waits for it.
            assert both.read_lock().acquire(timeout=1) is False
            assert outcome == []
            first.release(), second.release()
        assert outcome == [True] and both.read_lock().acquire(blocking=False) is False
        writer.release()
    assert first.contenders() == []


def test_recipe_semaphore_lets_in_as_many_as_its_limit(_recipe_client, _client_dir):
    units = [pyetcd_client.Semaphore(_recipe_client, _client_dir, 2) for _ in range(6)]
    for unit in units[:2]:
        assert unit.acquire()
    with contextlib.ExitStack() as stack:
        outcomes = []
        for number, unit in enumerate(units[2:]):
            outcomes.append(stack.enter_context(_client_background(unit.acquire)))
            eventually(lambda n=number: len(units[0].contenders()) == n + 3)
        assert not any(outcomes)
        for released in range(4):               # out of order: what counts is the number
            units[(1, 0, 3, 2)[released]].release()
            # Sooner than WAIT_SLICE_S, after which a waiter looks without having been woken.
            eventually(lambda n=released: outcomes[n] == [True])
            assert sum(unit.is_held for unit in units) == 2
    assert [unit.release() for unit in units[4:]] == [True, True]


def test_recipe_semaphore_notices_another_limit(_recipe_client, _client_dir):
    with pyetcd_client.Semaphore(_recipe_client, _client_dir, 2):
        with pytest.raises(ValueError, match="limit=3"):
            pyetcd_client.Semaphore(_recipe_client, _client_dir, 3).acquire()
    with pytest.raises(ValueError, match="at least 1"):
        pyetcd_client.Semaphore(_recipe_client, _client_dir, 0)


def test_recipe_election_leaders_follow_each_other(_recipe_client, _client_server, _client_dir):
    first, second = (pyetcd_client.Election(_recipe_client, _client_dir, name, ttl=2)
                     for name in ("a:1", "b"))
    with Client(_client_server.url) as observer:
        seen = pyetcd_client.Election(observer, _client_dir).observe(timeout=_CLIENT_WAIT_S)
        assert next(seen) is None
        assert first.campaign() and first.is_leader
        with _client_background(second.campaign) as outcome:
            eventually(lambda: len(first.contenders()) == 2)
            leaders = [next(seen)]
            assert outcome == [] and second.campaign(timeout=0.01) is False
            first.resign()
            leaders.append(next(seen))
        assert outcome == [True] and second.leader() == leaders[1] == ("b", second.token)
        assert leaders[0].value == "a:1" and leaders[0].token < leaders[1].token
        assert second.resign() and next(seen) is None and second.leader() is None


def test_recipe_election_observer_times_out(_recipe_client, _client_dir):
    seen = pyetcd_client.Election(_recipe_client, _client_dir).observe(timeout=2.0)
    assert next(seen) is None
    with pytest.raises(pyetcd_client.WatchTimeout):
        next(seen)


# -- queues, barriers, counters

def test_recipe_queue_is_first_in_first_out(_recipe_client, _client_dir):
    queue = pyetcd_client.Queue(_recipe_client, _client_dir)
    assert queue.get(timeout=0) is None
    for value in ("a", "b", "", "a"):
        queue.put(value)
    assert len(queue) == 4
    assert [queue.get(0) for _ in range(5)] == ["a", "b", "", "a", None]
    assert len(queue) == 0 and queue.get(timeout=1) is None


@pytest.mark.parametrize("fate", _RECIPE_FATES)
def test_recipe_queue_lost_answers_neither_lose_nor_double(_recipe_client, _client_dir, fate):
    queue, got = pyetcd_client.Queue(_recipe_client, _client_dir), []
    for value in "abc":
        _recipe_client.fault = _recipe_first(fate, "PUT")
        queue.put(value)
        _recipe_client.fault = _recipe_first(fate, "PUT")
        got.append(queue.get(timeout=0))
    assert got == ["a", "b", "c"] and queue.get(0) is None


def test_recipe_queue_put_again_after_it_was_taken_adds_nothing(_recipe_client, _client_dir):
    """The answer to the first attempt is lost, and a consumer faster than the second."""
    queue, got = pyetcd_client.Queue(_recipe_client, _client_dir), []

    def fault(call):
        if call.method == "POST" and not got:
            super(_RecipeClient, _recipe_client)._perform(call)
            got.append("")
            got.append(queue.get(timeout=0))
            return "lost"
        return None
    _recipe_client.fault = fault
    queue.put("once")
    assert got == ["", "once"] and queue.get(0) is None


def test_recipe_queue_late_claim_of_a_taken_item_fails(_recipe_client, _client_dir):
    queue = pyetcd_client.Queue(_recipe_client, _client_dir)
    queue.put("a")
    _recipe_client.fault = _recipe_first("late", "PUT")
    assert queue.get(0) == "a"
    assert _recipe_client.deliver() == 0


def test_recipe_queue_item_wakes_one_of_the_waiting(_recipe_client, _client_server, _client_dir):
    clients = [_RecipeClient(_client_server.url) for _ in range(3)]
    line = pyetcd_client.Contender(_recipe_client, _client_dir + "/_waiting")
    with contextlib.ExitStack() as stack:
        outcomes = []
        for number, client in enumerate(clients):
            consumer = pyetcd_client.Queue(client, _client_dir)
            outcomes.append(stack.enter_context(_client_background(consumer.get)))
            eventually(lambda n=number: len(line.contenders()) == n + 1)
        eventually(lambda: clients[2].count("GET") == 2)
        before = clients[2].count("GET")
        queue = pyetcd_client.Queue(_recipe_client, _client_dir)
        queue.put("a")
        eventually(lambda: outcomes[0])
        assert outcomes == [["a"], [], []] and clients[2].count("GET") == before
        queue.put("b"), queue.put("c")
    assert outcomes == [["a"], ["b"], ["c"]]


def test_recipe_queue_taken_item_comes_back_unless_it_is_done(_recipe_client, _client_dir):
    queue = pyetcd_client.Queue(_recipe_client, _client_dir, ttl=2)
    queue.put("a")
    with pytest.raises(ZeroDivisionError), queue.take(timeout=0) as item:
        assert item.is_held and len(queue) == 1
        with pytest.raises(pyetcd_client.WatchTimeout):
            queue.take(timeout=0)
        1 / 0  # noqa: B018
    crashed = queue.take(timeout=0)
    crashed._lease._end()
    with queue.take(timeout=_CLIENT_WAIT_S) as item:
        assert item.value == "a" and not crashed.is_held
    assert crashed.done() is False and len(queue) == 0


def test_recipe_queue_take_notices_that_its_look_was_stale(_recipe_client, _client_dir):
    one, two = (pyetcd_client.Queue(_recipe_client, _client_dir) for _ in range(2))
    one.put("a"), one.put("b")
    assert one.take(timeout=0).done() is True   # and has seen b
    assert two.take(timeout=0).done() is True
    with pytest.raises(pyetcd_client.WatchTimeout):
        one.take(timeout=0)


def test_recipe_barrier_opens_for_all(_recipe_client, _client_dir):
    barrier = pyetcd_client.Barrier(_recipe_client, _client_dir + "/b")
    assert barrier.wait(timeout=0) is True and barrier.remove() is False
    assert barrier.create() is True and barrier.create() is False
    assert barrier.wait(timeout=1) is False
    with _client_background(barrier.wait) as one, _client_background(barrier.wait) as two:
        _recipe_client.fault = _recipe_first("unheard", "DELETE")
        assert barrier.remove() is True
    assert one == two == [True]
    barrier.create(ttl=50)
    assert _recipe_client.get(barrier.path).node.ttl == 50


def test_recipe_double_barrier_rounds_begin_and_end_together(_recipe_client, _client_dir):
    inside, log, lock = [], [], threading.Lock()

    def take_part(name):
        barrier = pyetcd_client.DoubleBarrier(_recipe_client, _client_dir, size=3)
        for number in range(3):
            with barrier:
                with lock:
                    inside.append((number, name))
                eventually(lambda n=number: sum(r == n for r, _ in inside) == 3)
            with lock:
                log.append((number, len(inside)))

    with contextlib.ExitStack() as stack:
        outcomes = [stack.enter_context(_client_background(take_part, n)) for n in range(3)]
    assert outcomes == [[None]] * 3
    assert [number for number, _ in inside] == sorted(n for n, _ in inside)
    assert all(entered >= 3 * (number + 1) for number, entered in log)


def test_recipe_double_barrier_who_waits_in_vain_is_not_counted(_recipe_client, _client_dir):
    barrier = pyetcd_client.DoubleBarrier(_recipe_client, _client_dir, size=2)
    assert barrier.enter(timeout=1) is False
    assert _recipe_client.ls(_client_dir + "/members") == []
    other = pyetcd_client.DoubleBarrier(_recipe_client, _client_dir, size=2)
    with _client_background(other.enter) as outcome:
        assert barrier.enter() is True
    assert outcome == [True] and barrier.leave(timeout=1) is False
    assert other.leave() and barrier.leave()
    assert barrier.enter(timeout=1) is False     # the next round needs two again


@pytest.mark.parametrize("fate", (*_RECIPE_FATES, "late"))
def test_recipe_counter_counts_each_change_once(_recipe_client, _client_dir, fate):
    counter = pyetcd_client.Counter(_recipe_client, _client_dir + "/n", initial=10)
    assert counter.value == 10
    for expected in range(11, 16):
        _recipe_client.fault = _recipe_first(fate, "PUT")
        assert counter.add() == expected
        assert _recipe_client.deliver() == 0
    assert counter.add(-5) == 10 == counter.value


def test_recipe_counter_finds_its_change_below_those_of_others(_recipe_client, _client_dir):
    key = _client_dir + "/n"
    counter, other = (pyetcd_client.Counter(_recipe_client, key) for _ in range(2))

    def fault(call):
        if call.method != "PUT":
            return None
        super(_RecipeClient, _recipe_client)._perform(call)
        _recipe_client.fault = lambda call: None
        other.add(5)
        return "late"
    _recipe_client.fault = fault
    assert counter.add() == 1 and counter.value == 6


def test_recipe_counter_says_so_when_it_cannot_know(_recipe_client, _client_dir, monkeypatch):
    monkeypatch.setattr(pyetcd_client, "COUNTER_WRITERS", 2)
    key = _client_dir + "/n"

    def fault(call):
        if call.method != "PUT":
            return None
        _recipe_client.fault = lambda call: None
        for _ in range(2):
            pyetcd_client.Counter(_recipe_client, key).add()
        return "lost"
    _recipe_client.fault = fault
    with pytest.raises(pyetcd_client.ConnectionFailed) as caught:
        pyetcd_client.Counter(_recipe_client, key).add()
    assert caught.value.maybe_applied


def test_recipe_counter_can_be_cancelled():
    """Who asks and who waits for its turn; with timeout=0 nobody waits for it."""
    ended = []

    def add():
        with pytest.raises(pyetcd_client.Cancelled) as caught:
            counter.add()
        ended.append(caught.value.maybe_applied)

    with _ClientRawServer(_net_black_hole) as server:
        with Client(server.url) as client:
            counter = pyetcd_client.Counter(client, "k")
            with _client_background(add), _client_background(add):
                eventually(lambda: len(counter._scopes) == 2 and server.connections)
                with pytest.raises(pyetcd_client.RequestTimeout):
                    counter.add(timeout=0)
                counter.cancel()
                eventually(lambda: ended == [False, False])


def test_recipe_counter_reads_a_number_that_others_wrote(_recipe_client, _client_dir):
    counter = pyetcd_client.Counter(_recipe_client, _client_dir + "/n")
    _recipe_client.set(counter.path, "41")
    assert counter.add() == 42
    for text in ("many", ""):
        _recipe_client.set(counter.path, text)
        with pytest.raises(ValueError):
            counter.add()


# -- copies and services

def _recipe_names(tree):
    return {key[len(tree.path):]: node.value for key, node in tree.snapshot().items()}


def test_recipe_cached_tree_follows_the_directory(_recipe_client, _client_dir):
    changes = []
    _recipe_client.set(_client_dir + "/d/a", "1")
    tree = pyetcd_client.CachedTree(
        _recipe_client, _client_dir, on_change=lambda *change: changes.append(change))
    with tree:
        assert _recipe_names(tree) == {"/d/a": "1"} and not changes
        _recipe_client.set(_client_dir + "/d/_hidden", "x")
        _recipe_client.set(_client_dir + "/d/b", "2")
        index = _recipe_client.set(_client_dir + "/d/a", "3").modified_index
        assert tree.wait_for(index, _CLIENT_WAIT_S)
        assert tree[_client_dir + "/d/a"].value == "3" and len(tree) == 2 == len(list(tree))
        index = _recipe_client.delete(_client_dir + "/d", recursive=True).modified_index
        assert tree.wait_for(index, _CLIENT_WAIT_S) and dict(tree) == {}
        _recipe_client.set(_client_dir + "/f", "4")
        _recipe_client.delete(_client_dir + "/f")
        index = _recipe_client.set(_client_dir + "/f/g", "5").modified_index
        assert tree.wait_for(index, _CLIENT_WAIT_S) and _recipe_names(tree) == {"/f/g": "5"}
        # etcd 2.3 returns events of hidden keys from its history.
        concerns = tree._watch._state._concerns
        assert concerns(_client_dir + "/f") and not concerns(_client_dir + "/_d/f")
        assert concerns(_client_dir) and not concerns(_client_dir + "2/f")
        assert tree.error is None and not tree.wait_for(tree.index + 1000, 0.01)
    told = [(key[len(_client_dir):], old and old.value, new and new.value)
            for key, old, new in changes]
    assert told == [("/d/b", None, "2"), ("/d/a", "1", "3"), ("/d/a", "3", None),
                    ("/d/b", "2", None), ("/f", None, "4"), ("/f", "4", None),
                    ("/f/g", None, "5")]


def test_recipe_cached_tree_reads_anew_what_it_has_missed(tmp_path, monkeypatch):
    monkeypatch.setattr(pyetcd_client, "WAIT_SLICE_S", 0.2)
    with pyetcd.Server(data_dir=str(tmp_path / "d"), history_events=10) as server, \
            _recipe_no_threads():
        server.wait_ready()
        client, changes = Client(server.client_urls[0]), []
        for name in ("same", "changed", "removed"):
            client.set(f"/c/{name}", "1")
        tree = pyetcd_client.CachedTree(
            client, "/c", on_change=lambda key, old, new: changes.append((key, new and new.value)))
        with pytest.raises(KeyError), tree:
            tree.start()                            # it is already: one thread
            tree["/c/none"]
        for number in range(20):                    # before it follows: the history is too short
            client.set("/c/changed", str(number))
        client.delete("/c/removed")
        index = client.set("/c/added", "2").modified_index
        with tree:
            assert tree.wait_for(index, _CLIENT_WAIT_S)
            names = _recipe_names(tree)
        client.close()
    assert names == {"/same": "1", "/changed": "19", "/added": "2"}


def test_recipe_registry_lists_who_lives(_recipe_client, _client_dir):
    registry = pyetcd_client.ServiceRegistry(_recipe_client, _client_dir, ttl=2)
    seen = registry.watch("mail", timeout=_CLIENT_WAIT_S)
    assert next(seen) == [] == registry.resolve("mail")
    missed = threading.Event()
    with registry.register("mail", "a:25", on_lost=missed.set) as first:
        assert [instance.address for instance in next(seen)] == ["a:25"]
        with registry.register("mail", "b:25"):
            addresses = [instance.address for instance in registry.resolve("mail")]
            assert addresses == ["a:25", "b:25"] and len(next(seen)) == 2
        assert len(next(seen)) == 1
        _recipe_client.delete(first.key)        # it lists itself again
        assert missed.wait(_CLIENT_WAIT_S)
        eventually(lambda: registry.resolve("mail"))
        assert eventually(lambda: first.alive)
    assert registry.resolve("mail") == []


# -- time and its end

_RECIPE_WAITS = {
    "lock": lambda client, d, s: pyetcd_client.Lock(client, d[1:]).acquire(timeout=s),
    "rlock": lambda client, d, s: pyetcd_client.RLock(client, d[1:]).acquire(timeout=s),
    "writer": lambda client, d, s: pyetcd_client.RWLock(client, d).write_lock().acquire(timeout=s),
    "semaphore": lambda client, d, s: pyetcd_client.Semaphore(client, d, 1).acquire(timeout=s),
    "campaign": lambda client, d, s: pyetcd_client.Election(client, d).campaign(timeout=s),
    "observe": lambda client, d, s: next(pyetcd_client.Election(client, d).observe(timeout=s)),
    "get": lambda client, d, s: pyetcd_client.Queue(client, d).get(timeout=s),
    "take": lambda client, d, s: pyetcd_client.Queue(client, d).take(timeout=s),
    "barrier": lambda client, d, s: pyetcd_client.Barrier(client, d).wait(timeout=s),
    "enter": lambda client, d, s: pyetcd_client.DoubleBarrier(client, d, 2).enter(timeout=s),
    "leave": lambda client, d, s: pyetcd_client.DoubleBarrier(client, d, 2).leave(timeout=s),
    "counter": lambda client, d, s: pyetcd_client.Counter(client, d).add(timeout=s),
    "registry": lambda client, d, s: next(
        pyetcd_client.ServiceRegistry(client).watch(d[1:], timeout=s)),
    "retry": lambda client, d, s: pyetcd_client.retry(client, lambda: client.get(d), timeout=s)
    if s else client.get(d, timeout=0.1),
}


def _recipe_patience(monkeypatch, **limits):
    """Make all limits of the recipes an hour, but for those given."""
    names = ("CALL_TIMEOUT_S", "OUTAGE_S", "WAIT_SLICE_S", "TRY_S", "TIDY_S", "LEAVE_S")
    for name in names:
        monkeypatch.setattr(pyetcd_client, name, limits.get(name, 3600.0))


@pytest.mark.parametrize("timeout", [0.3, 0])
@pytest.mark.parametrize("wait", _RECIPE_WAITS.values(), ids=_RECIPE_WAITS)
def test_recipe_deadline_holds_while_a_server_is_silent(wait, timeout, monkeypatch):
    """All other limits are an hour: that it ends shows that the deadline rules them."""
    _recipe_patience(monkeypatch, TRY_S=0.3, TIDY_S=0.1)
    with _ClientRawServer(_net_black_hole) as server, _recipe_no_threads(), \
            Client(server.url, total_timeout=3600, read_timeout=3600) as client:
        with _client_background(wait, client, "/d", timeout) as outcome:
            eventually(lambda: outcome)
        assert isinstance(outcome[0], pyetcd_client.EtcdError) and server.requests


_RECIPE_BLOCKED = {
    "lock": (lambda c, d: pyetcd_client.Lock(c, d[1:]), lambda r, s: r.acquire(timeout=s), False),
    "semaphore": (lambda c, d: pyetcd_client.Semaphore(c, d + "/s", 1),
                  lambda r, s: r.acquire(timeout=s), False),
    "election": (lambda c, d: pyetcd_client.Election(c, d + "/e"),
                 lambda r, s: r.campaign(timeout=s), False),
    "queue": (lambda c, d: pyetcd_client.Queue(c, d), lambda r, s: r.get(timeout=s), None),
    "barrier": (lambda c, d: pyetcd_client.Barrier(c, d + "/b"),
                lambda r, s: r.wait(timeout=s), False),
    "double": (lambda c, d: pyetcd_client.DoubleBarrier(c, d, 2),
               lambda r, s: r.enter(timeout=s), False),
}


@pytest.fixture(name="_recipe_blocker")
def _recipe_blocker_fixture(_client_server, _client_dir):
    """What another process holds, so that everything of _RECIPE_BLOCKED must wait."""
    with Client(_client_server.url) as other, pyetcd_client.Lock(other, _client_dir[1:]), \
            pyetcd_client.Semaphore(other, _client_dir + "/s", 1), \
            pyetcd_client.Election(other, _client_dir + "/e"):
        barrier = pyetcd_client.Barrier(other, _client_dir + "/b")
        barrier.create()
        yield
        barrier.remove()


@pytest.mark.parametrize("kind", _RECIPE_BLOCKED.values(), ids=_RECIPE_BLOCKED)
def test_recipe_timeout_of_zero_tries_once_and_does_not_wait(
        _recipe_client, _client_dir, _recipe_blocker, kind, monkeypatch):
    make, wait, nothing = kind
    _recipe_patience(monkeypatch)
    monkeypatch.setattr(pyetcd_client._CallScope, "wait_for_event", lambda scope, *_, **__: (
        1 / 0 if scope.wait_s() else False))
    assert wait(make(_recipe_client, _client_dir), 0) is nothing
    with pytest.raises(ValueError, match="timeout"):
        wait(make(_recipe_client, _client_dir), -1)


@pytest.mark.parametrize("ender", ["recipe", "scope", "client"])
@pytest.mark.parametrize("kind", _RECIPE_BLOCKED.values(), ids=_RECIPE_BLOCKED)
def test_recipe_every_wait_can_be_ended_from_another_thread(
        _recipe_client, _client_dir, _recipe_blocker, kind, ender, monkeypatch):
    make, wait, nothing = kind
    _recipe_patience(monkeypatch)
    recipe, scope = make(_recipe_client, _client_dir), pyetcd_client.Scope()

    def work():
        with scope:
            return wait(recipe, None)

    with _client_background(work) as outcome:
        eventually(lambda: recipe._scopes and next(iter(recipe._scopes)).waited)
        {"recipe": recipe.cancel, "scope": scope.cancel, "client": _recipe_client.close}[ender]()
        eventually(lambda: outcome)
    if ender == "recipe":
        assert outcome == [nothing]
    else:
        assert isinstance(outcome[0], pyetcd_client.Cancelled)
    assert not recipe._scopes and not _recipe_client.scope._wakers
    if ender != "client":                       # then what is in a line is left to its ttl
        left = [node.key for node in _client_files(_recipe_client, _client_dir)]
        assert not [key for key in left if re.search(r"\d{20}$", key) and "/s/" not in key
                    and "/e/" not in key], "an entry stays"


def _client_files(client, directory):
    try:
        return [node for node in client.get(directory, recursive=True).node.walk() if not node.dir]
    except pyetcd_client.KeyNotFound:
        return []


def test_recipe_iterators_end_when_they_are_closed(_recipe_client, _client_dir, monkeypatch):
    _recipe_patience(monkeypatch)
    for observed in (pyetcd_client.Election(_recipe_client, _client_dir).observe(),
                     pyetcd_client.ServiceRegistry(_recipe_client, _client_dir).watch("mail")):
        next(observed)
        with _client_background(lambda observed=observed: list(observed)) as outcome:
            eventually(lambda observed=observed: observed._scopes)
            observed.close()
            eventually(lambda: outcome)
        assert outcome == [[]]


def test_recipe_nothing_outlives_the_client(_recipe_client, _client_server, _client_dir):
    lost = []
    client = Client(_client_server.url)
    lock = _recipe_lock(client, _client_dir, on_lost=lambda: lost.append("lock"))
    lease = pyetcd_client.Lease(client, _client_dir + "/k", on_lost=lambda: lost.append("lease"))
    tree = pyetcd_client.CachedTree(client, _client_dir).start()
    changes = pyetcd_client.ChildrenWatch(client, _client_dir, lambda names: None)
    assert lock.acquire() and lease.start().is_held
    client.close()
    with _recipe_no_threads():
        eventually(lambda: not any(
            thread.name.startswith("pyetcd-") for thread in threading.enumerate()))
    assert sorted(lost) == ["lease", "lock"] and not lock.is_held and not lease.alive
    assert isinstance(tree.error, pyetcd_client.Cancelled) and not tree.wait_for(1 << 60)
    assert not [way for one in client._idle for way in one._routes.values() if way.connection.sock]
    changes.close(), tree.close()
    assert lock.release() is False              # the entry goes: the client can be used again
    client.close()
    _recipe_client.delete(_client_dir, recursive=True)


def test_recipe_release_does_not_wait_for_a_renewal_that_hangs(monkeypatch):
    """Its DELETE has LEAVE_S; all other limits are an hour."""
    _recipe_patience(monkeypatch, LEAVE_S=0.2)
    with pyetcd.LocalMember() as member, Client(member.client_url) as client:
        lock = pyetcd_client.Lock(client, "x", ttl=3600)
        assert lock.acquire()
        member.pause()
        with _client_background(lock.renew):
            eventually(lambda: lock._held._renewing.locked())
            with _client_background(lock.release) as outcome:
                eventually(lambda: outcome)
            client.close()
        member.resume()
    assert outcome == [True] and not lock.is_held


# -- who holds, and what it is called

@pytest.mark.parametrize("name", ["", "/", "..", "a/..", "../a", ".", "a/./b"])
def test_recipe_names_that_are_no_place_are_refused(name):
    with Client(_client_dead_url()) as client:
        registry = pyetcd_client.ServiceRegistry(client)
        for make in (pyetcd_client.Lock, pyetcd_client.RLock, pyetcd_client.RWLock,
                     pyetcd_client.Election, pyetcd_client.Queue, pyetcd_client.Barrier,
                     pyetcd_client.Counter, pyetcd_client.Lease, pyetcd_client.Party,
                     lambda client, name: pyetcd_client.Semaphore(client, name, 1),
                     lambda client, name: pyetcd_client.DoubleBarrier(client, name, 1),
                     lambda client, name: registry.register(name, "a"),
                     lambda client, name: registry.resolve(name)):
            with pytest.raises(ValueError, match="names no key"):
                make(client, name)


def test_recipe_lock_whose_name_begins_anothers_is_acquired(_recipe_client, _client_dir):
    name = _client_dir[1:]
    for inner in ("1", "0" * 20, "7" * 20, "\u0662", "a/b"):
        with pyetcd_client.Lock(_recipe_client, f"{name}/{inner}"):
            with pyetcd_client.Lock(_recipe_client, name) as lock:
                assert lock.contenders() == [lock.uuid]
    lock.release()


def test_recipe_files_that_are_no_entries_count_nowhere(_recipe_client, _client_dir):
    makers = {
        "rw": lambda key: pyetcd_client.RWLock(_recipe_client, key).write_lock(),
        "sem": lambda key: pyetcd_client.Semaphore(_recipe_client, key, 1),
        "el": lambda key: pyetcd_client.Election(_recipe_client, key, "me"),
    }
    for kind, make in makers.items():
        path = f"{_client_dir}/{kind}"
        for stray in ("note", "12", "\u0662", "9" * 19, "9" * 5000):
            _recipe_client.set(f"{path}/{stray}", "a stray")
        _recipe_client.append(path, "written by hand")
        _recipe_client.set(f"{path}/{'8' * 20}/x", "in a directory")
        with make(path) as held:
            assert held.is_held and len(held.contenders()) == 1
            assert make(path).acquire(timeout=0) is False
    election = pyetcd_client.Election(_recipe_client, _client_dir + "/el")
    assert election.leader() is None and next(election.observe()) is None


def test_recipe_lock_is_held_by_one_of_the_tasks_that_share_it(_recipe_client, _client_dir):
    """Tasks take turns on the threads of a pool: the thread does not tell who holds."""
    lock, inside, most = _recipe_lock(_recipe_client, _client_dir), [], []

    async def work(number, pool):
        loop = asyncio.get_running_loop()
        for _ in range(3):
            assert await loop.run_in_executor(pool, lock.acquire)
            inside.append(number)
            most.append(len(inside))
            await asyncio.sleep(0)
            inside.remove(number)
            assert await loop.run_in_executor(pool, lock.release, lock.token)

    async def main():
        with concurrent.futures.ThreadPoolExecutor(5) as pool:
            await asyncio.gather(*(work(number, pool) for number in range(4)))

    asyncio.run(main())
    assert set(most) == {1} and len(most) == 12


def test_recipe_lock_acquired_again_waits_unless_that_could_never_end(
        _recipe_client, _client_dir, caplog):
    lock = _recipe_lock(_recipe_client, _client_dir)
    with lock:
        assert lock.acquire(timeout=0) is False and lock.acquire(blocking=False) is False
        with pytest.raises(RuntimeError, match="RLock"), lock:
            pass

        async def task():
            return lock.acquire(timeout=0.01)
        assert asyncio.run(task()) is False
        with _client_background(lock.acquire) as outcome:
            eventually(lambda: len(lock._scopes) == 1)
            assert not outcome and lock.release()
        assert outcome == [True] and lock.is_held
    assert lock.is_held                         # this block's hold was given up before
    with _client_background(lambda: lock.acquire(timeout=0.01)) as outcome:
        pass
    assert outcome == [False] and lock.release()
    assert ["RLock" in record.getMessage() for record in caplog.records] == [True]


def test_recipe_lock_is_given_back_though_the_time_of_the_block_is_over(
        _recipe_client, _client_dir):
    lock = _recipe_lock(_recipe_client, _client_dir)
    for cancel in (True, False):
        scope = pyetcd_client.Scope(1000)
        with scope, lock:
            if cancel:
                scope.cancel()
            scope.deadline = 0
        assert not lock.is_held and lock.contenders() == []


def test_recipe_lock_release_names_the_hold_by_its_token(_recipe_client, _client_dir):
    lost = threading.Event()
    lock = _recipe_lock(_recipe_client, _client_dir, ttl=2, on_lost=lost.set)
    assert lock.acquire()
    old = lock.token
    _recipe_client.delete(lock.path, recursive=True)
    assert lost.wait(_CLIENT_WAIT_S) and lock.acquire() and lock.token > old
    assert lock.release(old) is False and lock.is_held
    assert lock.release(lock.token) is True and lock.contenders() == []


def test_recipe_lock_block_that_lost_it_does_not_release_what_another_thread_has(
        _recipe_client, _client_dir):
    lost = threading.Event()
    lock = _recipe_lock(_recipe_client, _client_dir, ttl=2, on_lost=lost.set)
    with lock:
        _recipe_client.delete(lock.path, recursive=True)
        assert lost.wait(_CLIENT_WAIT_S)
        with _client_background(lock.acquire) as outcome:
            eventually(lambda: outcome)
    assert outcome == [True] and lock.is_held and lock.release()


def test_recipe_rlock_is_held_by_whom_it_names(_recipe_client, _client_dir):
    lock = pyetcd_client.RLock(_recipe_client, _client_dir[1:])
    assert lock.acquire(holder="task 1") and lock.acquire(holder="task 1", lock_ttl=90)
    assert lock.acquire(timeout=0, holder="task 2") is False and lock.acquire(timeout=0) is False
    assert _recipe_client.ls(lock.path)[0].ttl > 60
    assert lock.release() and lock.is_held and lock.release() and not lock.is_held
    assert lock.acquire(timeout=0, holder="task 2") and lock.release()
    assert lock.release() is False
    for expected in (True, False):              # two threads, perhaps with one ident
        with _client_background(lambda: lock.acquire(timeout=0)) as outcome:
            pass
        assert outcome == [expected]
    lock.release()


def test_recipe_renewals_of_several_threads_do_not_lose_the_file(_recipe_client, _client_dir):
    lost = []
    lock = _recipe_lock(_recipe_client, _client_dir, ttl=3, on_lost=lambda: lost.append(1))
    assert lock.acquire()
    place = lock._held
    place._due_at = 0                           # the heartbeat renews as fast as it can
    with contextlib.ExitStack() as stack:
        def renew():
            for _ in range(60):
                place._due_at = 0
                assert lock.renew()
        for _ in range(3):
            stack.enter_context(_client_background(renew))
        for _ in range(60):                     # python-etcd's way to renew
            assert lock.acquire()
    assert not lost and lock.contenders() == [place.value] and lock.release()


def test_recipe_renew_sees_at_once_that_the_entry_is_gone(_recipe_client, _client_dir):
    lost = threading.Event()
    lock = _recipe_lock(_recipe_client, _client_dir, ttl=3600, on_lost=lost.set)
    assert lock.acquire() and lock.renew(1800) and _recipe_client.ls(lock.path)[0].ttl <= 1800
    _recipe_client.delete(lock.path, recursive=True)
    assert lock.is_held                         # it does not look
    assert lock.renew() is False and not lock.is_held and lost.wait(_CLIENT_WAIT_S)
    lock.release()
    with pytest.raises(ValueError, match="at least 1"):
        lock.acquire(lock_ttl=0)


_RECIPE_FORK = """
import os, sys, threading, time
from pyetcd_client import *
client = Client(sys.argv[1])
client.set("/f/a", "1")
lock, rlock = Lock(client, "f"), RLock(client, "g")
lease, beat = Lease(client, "/f/l", "me"), Heartbeat(client, "/f/a")
tree, counter, queue = CachedTree(client, "/f"), Counter(client, "/f/n"), Queue(client, "/f/q")
late, party = Lease(client, "/f/late"), Party(client, "/f/party", "me")
for thing in (lock, rlock): assert thing.acquire()
for thing in (lease, beat, tree): thing.start()
counter.add(); queue.put_all("wxy"); queue.get(); party.join()
guards = [lock._changed, rlock._changed, lease._lock, lease._renewing, beat._lock, tree._changed,
          tree._control, counter._changed]
ready, done = threading.Event(), threading.Event()
def hold():                     # a thread that the child does not have holds every lock
    for guard in guards: guard.acquire()
    ready.set(); done.wait(60)
    for guard in guards: guard.release()
threading.Thread(target=hold, daemon=True).start()
ready.wait(60)
pid = os.fork()
if pid:
    done.set()
    status = os.waitpid(pid, 0)[1]
    assert lock.is_held and rlock.is_held and lease.is_held and beat.is_held and not tree.error
    assert counter.value == 2 and lock.contenders() == [lock.uuid] and list(party) == ["me"] * 2
    try: late.start()
    except NodeExists: pass         # it is the child's, until its ttl is over
    else: status = "both have it"
    print(status)
    sys.stdout.flush()
    os._exit(0)
import signal
signal.alarm(50)
def refuses(function):
    try: function()
    except RuntimeError: return True
for held in (lock, rlock):
    assert not held.is_held and held.token == 0 and not held.release() and not held.renew()
    assert not held.acquire(timeout=0) and not held.acquire(timeout=0.2)
assert not lease.is_held and not lease.stop() and refuses(lease.start)
assert not beat.is_held and not beat.stop() and refuses(beat.start)
for use in (lambda: tree["/f/a"], lambda: len(tree), tree.items, lambda: tree.wait_for(1, 9)):
    assert refuses(use)
assert tree.start()["/f/a"].value == "1" and not tree.error
assert counter.add() == 2 and queue.get(timeout=0) == "x"
assert late.start().is_held
party.join()
other = Lock(client, "h")
assert other.acquire() and other.release()
tree.close(); client.close()
os._exit(0)
"""


@pytest.mark.skipif(not hasattr(os, "register_at_fork"), reason="no fork")
def test_recipe_objects_of_the_parent_are_usable_or_refuse_in_a_forked_child(_client_server):
    result = _client_python("-W", "ignore::DeprecationWarning", "-c", _RECIPE_FORK,
                            _client_server.url)
    assert (result.returncode, result.stdout) == (0, b"0\n"), result.stderr.decode()


# -- queues that stay as fast as they were

def test_recipe_queue_work_for_an_item_does_not_grow(_recipe_client, _client_dir):
    queue, work = pyetcd_client.Queue(_recipe_client, _client_dir), []
    for number in range(40):
        queue.put(str(number))
        before = len(_recipe_client.calls)
        assert queue.get(timeout=0) == str(number)
        calls = _recipe_client.calls[before:]
        work.append([call.method for call in calls])
        assert not _client_files(_recipe_client, _client_dir)      # what the next look reads
    assert work == [["GET", "PUT", "DELETE"]] * 40


def test_recipe_queue_serves_urgent_items_first(_recipe_client, _client_dir):
    queue = pyetcd_client.Queue(_recipe_client, _client_dir)
    queue.put_all(["c", "d"])
    queue.put("a", priority=-1), queue.put("b", 1), queue.put("e", priority=101)
    assert [queue.get(0) for _ in range(6)] == ["a", "b", "c", "d", "e", None]
    queue.put("1:2:\n:"), queue.put("")
    assert [queue.get(0) for _ in range(3)] == ["1:2:\n:", "", None]


def test_recipe_queue_takes_what_an_older_version_or_a_hand_has_put(_recipe_client, _client_dir):
    queue = pyetcd_client.Queue(_recipe_client, _client_dir)
    for name, value in (("f" * 32, "old"), ("by/hand", "x:1:y")):
        _recipe_client.create(f"{_client_dir}/items/{name}", value)
    _recipe_client.append(f"{_client_dir}/items", "posted")
    _recipe_client.create(f"{_client_dir}/items/{'a' * 32}", "mark of 0.4.0", ttl=100)
    queue.put("new")
    assert [queue.get(0) for _ in range(5)] == ["old", "x:1:y", "posted", "new", None]


def test_recipe_queue_second_file_of_an_item_adds_nothing(_recipe_client, _client_dir):
    """The first write of it is late: before the item is taken, and after that."""
    queue = pyetcd_client.Queue(_recipe_client, _client_dir)
    for deliver_first in (True, False):
        _recipe_client.fault = _recipe_first("late", "POST")
        queue.put("once")
        if deliver_first:
            assert _recipe_client.deliver() == 1 and len(queue) == 1
        assert queue.get(timeout=0) == "once"
        assert _recipe_client.deliver() == (not deliver_first)
        with pytest.raises(pyetcd_client.WatchTimeout):
            queue.take(timeout=0)
        assert queue.get(timeout=0) is None and len(queue) == 0
    assert not _client_files(_recipe_client, _client_dir)


@pytest.mark.parametrize("fate", _RECIPE_FATES)
def test_recipe_queue_lost_answers_to_deletions_are_looked_into(
        _recipe_client, _client_dir, fate):
    queue, got = pyetcd_client.Queue(_recipe_client, _client_dir), []
    for value in "abc":
        queue.put(value)
        _recipe_client.fault = _recipe_first(fate, "DELETE")
        got.append(queue.get(timeout=0))
    queue.put("d")
    with queue.take(timeout=0) as item:
        got.append(item.value)
        _recipe_client.fault = _recipe_first(fate, "DELETE")
    assert got == ["a", "b", "c", "d"] and queue.get(0) is None


def test_recipe_queue_item_that_could_not_be_taken_is_there_at_once(
        _recipe_client, _client_dir, monkeypatch):
    _recipe_patience(monkeypatch, OUTAGE_S=0.2)
    queue = pyetcd_client.Queue(_recipe_client, _client_dir)
    queue.put("a")

    def fault(call):
        return "unsent" if call.method == "DELETE" and "/items/" in call.target else None
    _recipe_client.fault = fault
    with pytest.raises(pyetcd_client.ConnectionFailed):
        queue.get(timeout=0)
    _recipe_client.fault = lambda call: None
    assert pyetcd_client.Queue(_recipe_client, _client_dir).get(timeout=0) == "a"


# -- copies, services, parties

def test_recipe_cached_tree_is_of_one_moment_and_starts_again(_recipe_client, _client_dir):
    changes, over = [], threading.Event()
    tree = pyetcd_client.CachedTree(
        _recipe_client, _client_dir, on_change=lambda *change: changes.append(change))

    def churn():
        for number in itertools.count():
            if over.is_set():
                return
            _recipe_client.set(f"{_client_dir}/{number % 7}", str(number))
            _recipe_client.delete(f"{_client_dir}/{number % 7}")

    with tree, _client_background(churn):
        eventually(lambda: len(changes) > 5)
        for _ in range(300):
            assert all(node.key == key for key, node in tree.items())
            assert len(tree.keys()) + len(tree.values()) >= 0
        assert tree.start() is tree             # one thread is enough
        assert [t.name for t in threading.enumerate() if t.name.startswith("pyetcd-")] == [
            f"pyetcd-tree {_client_dir}"]
        over.set()
    before = tree.snapshot()
    changes.clear()
    index = _recipe_client.set(_client_dir + "/new", "1").modified_index
    assert tree.snapshot() == before and not tree.wait_for(index)
    with tree:                                  # goes on, and tells the difference
        assert tree.wait_for(index) and (changes[-1][0], changes[-1][1]) == (
            _client_dir + "/new", None)
        index = _recipe_client.set(_client_dir + "/new", "2").modified_index
        assert tree.wait_for(index, _CLIENT_WAIT_S) and tree[_client_dir + "/new"].value == "2"


def test_recipe_cached_tree_survives_what_its_callback_raises(_recipe_client, _client_dir, caplog):
    def fail(*_):
        raise SystemExit(1)
    with pyetcd_client.CachedTree(_recipe_client, _client_dir, on_change=fail) as tree:
        for value in "ab":
            index = _recipe_client.set(_client_dir + "/k", value).modified_index
            assert tree.wait_for(index, _CLIENT_WAIT_S)
        eventually(lambda: len(caplog.records) == 2)
        assert tree._thread.is_alive() and tree.error is None


def test_recipe_cached_tree_error_is_there_as_long_as_the_server_is_not():
    with pyetcd.LocalMember() as member, Client(member.client_url) as client:
        client.set("/c/k", "1")
        with pyetcd_client.CachedTree(client, "/c") as tree:
            assert tree.error is None
            member.kill()
            assert isinstance(eventually(lambda: tree.error), pyetcd_client.EtcdError)
            member.start()
            index = client.set("/c/k", "2").modified_index
            assert tree.wait_for(index, _CLIENT_WAIT_S) and tree["/c/k"].value == "2"
            eventually(lambda: tree.error is None)


def test_recipe_cached_tree_is_read_once_however_long_it_is_quiet(
        _recipe_client, _client_dir, monkeypatch):
    monkeypatch.setattr(pyetcd_client, "WAIT_SLICE_S", 0.01)
    reads = []
    _recipe_client.fault = lambda call: (
        reads.append(call.target) if "recursive" in call.target else None)
    with pyetcd_client.CachedTree(_recipe_client, _client_dir) as tree:
        for number in range(30):
            index = _recipe_client.set(f"{_client_dir}2/x", str(number)).modified_index
        index = _recipe_client.set(f"{_client_dir}/x", "1").modified_index
        assert tree.wait_for(index, _CLIENT_WAIT_S) and len(reads) == 1


def test_recipe_registry_carries_metadata_and_tags(_recipe_client, _client_dir):
    registry = pyetcd_client.ServiceRegistry(_recipe_client, _client_dir)
    zone = {"zone": "a", "weight": 3}
    with registry.register("mail", "a:25", tags=["v2", "tls"], metadata=zone) as first, \
            registry.register("mail", "b:25"), registry.register("mail", '{"odd'):
        found = registry.resolve("mail")
        assert [(i.address, i.metadata, i.tags) for i in found] == [
            ("a:25", zone, ("v2", "tls")), ("b:25", {}, ()), ('{"odd', {}, ())]
        assert registry.resolve("mail", tag="tls") == found[:1] and len(set(found)) == 3
        assert [address for _, address in registry.resolve("mail", tag="none")] == []
        assert _recipe_client.get(first.key).value.startswith("{")
        assert next(registry.watch("mail", tag="v2")) == found[:1]
        for text in ('{"address": 5}', '{"address": "x", "tags": 5}', "[]", "{" * 50000):
            _recipe_client.set(registry.path("mail") + "/hand", text)
            assert registry.resolve("mail")[-1].address == text
    with pytest.raises(ValueError, match="several"):
        registry.register("mail", "a", tags="v2")


def test_recipe_election_run_leads_while_the_function_runs(_recipe_client, _client_dir):
    election = pyetcd_client.Election(_recipe_client, _client_dir, "me")
    assert election.run(lambda a, b: (election.leader().value, a, b), 1, b=2) == ("me", 1, 2)
    with pytest.raises(ZeroDivisionError):
        election.run(lambda: 1 / 0)
    assert election.leader() is None
    with pyetcd_client.Election(_recipe_client, _client_dir), \
            _client_background(election.run, list) as outcome:
        eventually(lambda: len(election.contenders()) == 2)
        election.cancel()
    assert isinstance(outcome[0], pyetcd_client.LockExpired)


def test_recipe_party_lists_who_is_there(_recipe_client, _client_dir):
    first, second = (pyetcd_client.Party(_recipe_client, _client_dir, name) for name in "ab")
    assert list(first) == [] and len(first) == 0
    with first:
        second.join(), second.join()
        assert list(first) == ["a", "b"] and len(second) == 2
        second.leave()
        assert list(first) == ["a"]
        second.join()
    assert list(first) == ["b"]
    second.leave()


def test_recipe_watches_call_back_until_they_are_told_to_end(_recipe_client, _client_dir):
    seen, data = [], []

    @pyetcd_client.ChildrenWatch(_recipe_client, _client_dir)
    def children(names):
        seen.append(names)
        return "stop" not in names
    watch = pyetcd_client.DataWatch(
        _recipe_client, _client_dir + "/a",
        lambda value, node: data.append((value, node and node.key)))
    assert seen == [[]] and data == [(None, None)]
    _recipe_client.set(_client_dir + "/a", "1")
    eventually(lambda: seen[-1] == ["a"] and data[-1] == ("1", _client_dir + "/a"))
    _recipe_client.delete(_client_dir + "/a")
    eventually(lambda: seen[-1] == [] and data[-1] == (None, None))
    _recipe_client.set(_client_dir + "/stop", "1")
    eventually(lambda: seen[-1] == ["stop"])
    watch.close()
    eventually(lambda: threading.active_count() and not any(
        t.name.startswith("pyetcd-watch") for t in threading.enumerate()))
    with pytest.raises(ValueError, match="already"):
        watch(print)


def test_recipe_retry_repeats_only_what_may_be_repeated(_recipe_client, _client_dir):
    key = _client_dir + "/k"
    for fate in ("unsent", "lost", "unheard"):
        _recipe_client.fault = _recipe_first(fate, "PUT", 2)
        done = pyetcd_client.retry(
            _recipe_client, lambda: _recipe_client.set(key, "1"), idempotent=True)
        assert done.value == "1"
    _recipe_client.fault = _recipe_first("unheard", "PUT", 2)
    before = _recipe_client.count("PUT")
    with pytest.raises(pyetcd_client.ConnectionFailed) as caught:
        pyetcd_client.retry(_recipe_client, lambda: _recipe_client.set(key, "1"))
    assert caught.value.maybe_applied and _recipe_client.count("PUT") == before + 1
    with pytest.raises(pyetcd_client.KeyNotFound):
        pyetcd_client.retry(_recipe_client, lambda: _recipe_client.get(_client_dir + "/none"))


# -- all at once, with every fault

class _RecipeChaos:
    """Chooses faults by chance, and delivers late writes some time later."""

    KINDS = ("unsent", "unheard", "unheard", "lost", "late")

    def __init__(self, seed, rate):
        self.rng, self.rate = random.Random(seed), rate

    def __call__(self, call):
        return self.rng.choice(self.KINDS) if self.rng.random() < self.rate else None


@contextlib.contextmanager
def _recipe_postman(clients):
    """Deliver the late writes of `clients` from time to time."""
    over = threading.Event()

    def run():
        while not over.wait(0.05):
            for client in clients:
                with contextlib.suppress(pyetcd_client.EtcdError):
                    client.deliver()

    with _client_background(run):
        yield
        over.set()


class _RecipeWitness:
    """What several threads saw: who was inside when, with which token, and what it did."""

    def __init__(self):
        self.lock = threading.Lock()
        self.spans = collections.defaultdict(list)  # name: (token, entered, left) while held
        self.counted = self.in_doubt = 0
        self.put, self.got, self.done, self.perhaps_put = [], [], [], set()

    def note(self, name, value):
        with self.lock:
            getattr(self, name).append(value)

    def attempt(self, function, *args, **kwargs):
        """Return what it returns; None if no server answered in time, which may be in doubt."""
        try:
            return function(*args, **kwargs)
        except pyetcd_client.WatchTimeout:
            return None
        except (pyetcd_client.TransportError, pyetcd_client.HttpError,
                pyetcd_client.RaftInternal, pyetcd_client.LockExpired) as error:
            with self.lock:
                self.in_doubt += error.maybe_applied
            return None

    def hold(self, name, contender, work=lambda: None):
        """Hold `contender` for a moment; what it held to the end counts."""
        if self.attempt(contender.acquire, timeout=2):
            entered, token = time.monotonic(), contender.token
            work()
            left, held = time.monotonic(), contender.is_held
            contender.release()
            if held and token:
                with self.lock:
                    self.spans[name].append((token, entered, left))

    def check(self, counter_value):
        for name, spans in self.spans.items():
            spans.sort()
            limit = {"semaphore": 2, "reader": math.inf}.get(name, 1)
            assert len({token for token, _, _ in spans}) == len(spans)
            for position, (_, entered, _) in enumerate(spans):
                inside = [left for _, since, left in spans if since <= entered < left]
                assert len(inside) <= limit, f"{name}: too many at the same time"
                if limit == 1 and position and name != "reader":
                    assert spans[position - 1][2] <= entered, f"{name}: tokens do not rise"
        for _, entered, left in self.spans["reader"]:
            assert not [token for token, since, until in self.spans["writer"]
                        if since < left and entered < until], "a writer among readers"
        assert self.counted <= counter_value <= self.counted + self.in_doubt
        for out in (self.got, self.done):
            assert len(set(out)) == len(out), "items doubled"
            assert set(out) <= set(self.put) | self.perhaps_put, "items out of nowhere"
            assert len(set(self.put) - set(out)) <= self.in_doubt, "items lost"


def _recipe_worker(client, directory, name, witness, end):
    """Use one recipe after the other, until `end` says so."""
    lock = pyetcd_client.Lock(client, directory[1:] + "/lock", ttl=2)
    again = pyetcd_client.RLock(client, directory[1:] + "/again", ttl=2)
    semaphore = pyetcd_client.Semaphore(client, directory + "/semaphore", 2, ttl=2)
    election = pyetcd_client.Election(client, directory + "/election", str(name), ttl=2)
    counter = pyetcd_client.Counter(client, directory + "/n")
    queue = pyetcd_client.Queue(client, directory + "/q", ttl=2)
    tasks = pyetcd_client.Queue(client, directory + "/tasks", ttl=2)
    shared = pyetcd_client.RWLock(client, directory + "/rw", ttl=2)
    reader, writer = shared.read_lock(), shared.write_lock()
    barrier = pyetcd_client.DoubleBarrier(client, directory + "/double", 2, ttl=2)
    party = pyetcd_client.Party(client, directory + "/party", str(name), ttl=2)
    registry = pyetcd_client.ServiceRegistry(client, directory + "/services", ttl=2)

    def meet():
        """Be listed and counted for a moment, and pass a barrier if another one comes."""
        witness.attempt(party.join)
        listed = witness.attempt(registry.register, "storm", str(name))
        witness.attempt(lambda: list(party))
        witness.attempt(registry.resolve, "storm")
        if witness.attempt(barrier.enter, timeout=0.5):
            witness.attempt(barrier.leave, timeout=2)
        party.leave()
        if listed is not None:
            listed.stop()

    def count():
        if witness.attempt(counter.add) is not None:
            with witness.lock:
                witness.counted += 1

    def nest():
        if witness.attempt(again.acquire, timeout=1):
            again.release()

    def hand_on(number):
        for one in (queue, tasks):
            value = f"{name}.{number}"
            if witness.attempt(one.put, value, number % 3) is None:
                witness.perhaps_put.add(value)
            elif one is queue:
                witness.note("put", value)
        item = witness.attempt(queue.get, timeout=0)
        if item is not None:
            witness.note("got", item)
        task = witness.attempt(tasks.take, timeout=0)
        if task is not None and witness.attempt(task.done):
            witness.note("done", task.value)

    for number in itertools.count():
        if end.is_set():
            return
        witness.hold("lock", lock, count)
        witness.hold("rlock", again, nest)
        witness.hold("semaphore", semaphore)
        witness.hold("election", election)
        witness.hold("reader", reader)
        if number % 3 == 0:
            witness.hold("writer", writer)
            meet()
        hand_on(number)


def _recipe_storm(clients, directory, seconds, disturb=lambda end: None):
    """Let a worker per client run; return the number of locks held and items passed on."""
    witness, end = _RecipeWitness(), threading.Event()

    def finish():
        try:                            # on a busy machine the first results take longer
            eventually(lambda: end.is_set() or witness.spans["lock"] and witness.got)
        finally:
            end.set()

    with contextlib.ExitStack() as stack:
        outcomes = [stack.enter_context(_client_background(
            _recipe_worker, client, directory, name, witness, end))
            for name, client in enumerate(clients)]
        timer = threading.Timer(seconds, finish)
        timer.start()
        try:
            disturb(end)
            end.wait()
        finally:
            end.set()
            timer.cancel()
    assert outcomes == [[None]] * len(clients), outcomes
    for client in clients:
        client.fault = lambda call: None
        client.deliver()
    client = clients[0]
    rest, tasks = (pyetcd_client.Queue(client, directory + name) for name in ("/q", "/tasks"))
    for item in iter(lambda: rest.get(timeout=0.5), None):
        witness.got.append(item)
    with contextlib.suppress(pyetcd_client.WatchTimeout):
        while True:
            with tasks.take(timeout=3) as task:     # what a worker could not give back
                witness.done.append(task.value)
    witness.check(pyetcd_client.Counter(client, directory + "/n").value)
    party = pyetcd_client.Party(client, directory + "/party")
    registry = pyetcd_client.ServiceRegistry(client, directory + "/services")
    eventually(lambda: not len(party) and not registry.resolve("storm"))
    return len(witness.spans["lock"]), len(witness.got)


def test_recipe_storm_excludes_and_counts_and_hands_out_once(_client_server, _client_dir):
    seed = int(os.environ.get("PYETCD_RECIPE_SEED", random.randrange(10**6)))
    print(f"PYETCD_RECIPE_SEED={seed}")
    clients = [_RecipeClient(_client_server.url, _RecipeChaos(seed + n, 0.04)) for n in range(6)]
    with _recipe_no_threads(), _recipe_postman(clients):
        held, items = _recipe_storm(clients, _client_dir, 1.5)
    assert held and items


def _recipe_chaotic(cluster, seed):
    """Five clients that lose answers; each begins with another member."""
    clients, urls = [], list(cluster.client_urls)
    for number in range(5):
        client = _RecipeClient(urls[0], _RecipeChaos(seed + number, 0.02))
        client.endpoints = pyetcd_client.Endpoints(urls[number % 3:] + urls[:number % 3])
        clients.append(client)
    return clients


def test_recipe_storm_survives_the_death_of_the_leader(monkeypatch):
    # Writes that are given up early are really on their way still, some in the old leader's log.
    monkeypatch.setattr(pyetcd_client, "CALL_TIMEOUT_S", 0.5)
    seed = int(os.environ.get("PYETCD_RECIPE_SEED", random.randrange(10**6)))
    print(f"PYETCD_RECIPE_SEED={seed}")
    with pyetcd.LocalCluster(3, heartbeat_ms=50, election_ms=300) as cluster, \
            _recipe_no_threads():
        clients = _recipe_chaotic(cluster, seed)

        def kill_leader(end):
            end.wait(0.5)
            cluster.wait_leader().kill()
            end.wait()
            monkeypatch.setattr(pyetcd_client, "CALL_TIMEOUT_S", _CLIENT_WAIT_S)    # for the checks

        with _recipe_postman(clients):
            held, items = _recipe_storm(clients, "/storm", 2.0, kill_leader)
    assert held and items


def test_recipe_storm_survives_kills_and_pauses_of_members(monkeypatch):
    """PYETCD_RECIPE_SECONDS=600 is the long form."""
    monkeypatch.setattr(pyetcd_client, "CALL_TIMEOUT_S", 0.5)
    monkeypatch.setattr(pyetcd_client, "TAKEN_TTL_S", 10)      # less to do for the members
    seed = int(os.environ.get("PYETCD_RECIPE_SEED", random.randrange(10**6)))
    seconds = float(os.environ.get("PYETCD_RECIPE_SECONDS", 4))
    print(f"PYETCD_RECIPE_SEED={seed}")
    rng = random.Random(seed)

    def disturb(end):
        while not end.wait(rng.uniform(0.3, 1.0)):
            member = rng.choice(cluster.members)
            if rng.random() < 0.5:
                member.kill()
                end.wait(rng.uniform(0.0, 1.5))
                member.start()
            else:
                member.pause()
                end.wait(rng.uniform(0.0, 3.0))     # longer than a ttl: locks are lost
                member.resume()
        monkeypatch.setattr(pyetcd_client, "CALL_TIMEOUT_S", _CLIENT_WAIT_S)    # for the checks

    with pyetcd.LocalCluster(3) as cluster, _recipe_no_threads():
        clients = _recipe_chaotic(cluster, seed)
        with pyetcd_client.CachedTree(clients[0], "/storm") as tree:
            with _recipe_postman(clients):
                held, items = _recipe_storm(clients, "/storm", seconds, disturb)
            index = clients[0].set("/storm/end", "1").modified_index
            assert tree.wait_for(index, _CLIENT_WAIT_S)
            found = {node.key: node.value for node in _client_files(clients[0], "/storm")}
            copy = {key: node.value for key, node in tree.items()}
            assert {key: copy.get(key) for key in found} == found
        for client in clients:
            client.close()
    print(f"{held} locks held, {items} items passed on")
    assert held and items


# -- the page of the manual

@pytest.mark.parametrize("number", range(len(manual_code("recipes"))))
def test_recipe_example_of_the_manual_runs(number, tmp_path, capsys):
    code = manual_code("recipes")[number]
    with _recipe_no_threads(), pyetcd.Server(data_dir=str(tmp_path / "d")) as server:
        server.wait_ready()
        with Client(server.client_urls[0]) as client:
            exec(compile(code, f"recipes.md, example {number}", "exec"),
                 {"client": client})
    promised = re.findall(r"^ *print\(.*\) +# (.+)$", code, re.M)
    assert capsys.readouterr().out.splitlines() == promised


def test_recipe_page_names_every_recipe():
    text = "\n".join(manual_code("recipes"))
    recipes = ("Lock", "RLock", "RWLock", "Semaphore", "Election", "Lease", "Heartbeat", "Queue",
               "Barrier", "DoubleBarrier", "Counter", "CachedTree", "ServiceRegistry")
    assert [name for name in recipes if not re.search(rf"\b{name}\(", text)] == []
