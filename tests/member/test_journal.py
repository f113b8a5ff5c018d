"""The journal: which thread syncs, and what a disk that stalls can do."""

import threading

import pytest

import pyetcd
import pyetcd_client
from tests.kit.basics import eventually
from tests.kit.http import _HttpSocket
from tests.kit.reactors import FakeReactor
from tests.kit.simulator import _sim_scenario, _SimWalWriter


class _Wal:
    """Notes the thread of each write; a write takes `seconds`, or raises `error`."""

    def __init__(self, reactor):
        self.reactor = reactor
        self.seconds = 0.0001
        self.error = None
        self.threads = []

    def write(self, *data, sync):
        assert sync
        self.threads.append(threading.current_thread().name)
        self.reactor.time += self.seconds
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def release_to(self, index):
        self.threads.append("release")

    def close(self):
        self.threads.append("closed")


@pytest.fixture(name="rig")
def _rig_fixture(monkeypatch):
    """A writer over a wal and a reactor that only tests move; `write` does one job."""
    monkeypatch.setattr(pyetcd.WalWriter, "QUICK_SYNCS_MIN", 10)

    class Rig:
        def __init__(self):
            self.reactor = FakeReactor()
            self.wal = _Wal(self.reactor)
            self.failed = []
            self.writer = pyetcd.WalWriter(
                self.wal, None, self.reactor, failed=self.failed.append, full=lambda why: None
            )
            self.writer.start()

        def write(self, size=100, ready_sockets=0, release_to=0):
            """Submit a job and turn until it is done; return the thread that wrote it."""
            done = []
            job = pyetcd.WalJob(b"", None, (b"x" * size,), None, release_to,
                                lambda: done.append(self.wal.threads[-1]))
            self.writer.submit(job)

            def turned():
                self.reactor.turn(ready_sockets)
                return done

            return eventually(turned)[0]

        def warm_up(self):
            """Write until the reactor syncs by itself; return how many the thread did."""
            count = 0
            while self.write() == "wal":
                count += 1
            return count

    rig = Rig()
    yield rig
    rig.writer.stop()


def test_journal_reactor_syncs_after_a_run_of_quick_syncs(rig):
    """A small job alone needs no thread once the disk has proved to be quick."""
    assert rig.warm_up() == pyetcd.WalWriter.QUICK_SYNCS_MIN
    assert {rig.write() for _ in range(20)} == {threading.current_thread().name}
    assert rig.writer.inline_syncs == 21


def test_journal_quiet_turn_syncs_at_once(rig):
    """Where nobody waits for the end of the turn, the answer leaves in the same one."""
    rig.warm_up()
    rig.reactor.is_quiet = True
    done = []
    rig.writer.submit(pyetcd.WalJob(b"", None, (b"x",), None, 0, lambda: done.append(1)))
    assert done and rig.wal.threads[-1] == threading.current_thread().name
    rig.wal.seconds = pyetcd.WalWriter.INLINE_SLOW_SECONDS
    rig.write()
    assert rig.write() == "wal"


@pytest.mark.parametrize("job", [
    {"ready_sockets": 1}, {"size": pyetcd.WalWriter.INLINE_BYTES_MAX + 1}, {"release_to": 7},
], ids=["a socket is ready", "many bytes", "work on other segments"])
def test_journal_thread_syncs_when_the_reactor_has_other_work(rig, job):
    """Whatever would keep the reactor from a client goes to the thread."""
    rig.warm_up()
    assert rig.write(**job) in ("wal", "release")
    assert rig.write() == threading.current_thread().name


def test_journal_one_slow_sync_sends_the_next_ones_to_the_thread(rig):
    """A disk that stalls stops the reactor once, not once per write."""
    rig.warm_up()
    rig.wal.seconds = pyetcd.WalWriter.INLINE_SLOW_SECONDS
    assert rig.write() == threading.current_thread().name
    assert {rig.write() for _ in range(9)} == {"wal"}
    rig.wal.seconds = 0.0001
    assert rig.warm_up() >= pyetcd.WalWriter.QUICK_SYNCS_MIN


def test_journal_slow_disk_never_stops_the_reactor(rig):
    """Syncs of 1 ms each are too long to wait for, even if none of them is an outlier."""
    rig.wal.seconds = 2 * pyetcd.WalWriter.INLINE_MEAN_SECONDS
    assert {rig.write() for _ in range(2 * pyetcd.WalWriter.QUICK_SYNCS_MIN)} == {"wal"}


def test_journal_failed_sync_on_the_reactor_ends_the_member(rig):
    """A failure is final on either thread: the job is not done, and `failed` hears of it."""
    rig.warm_up()
    rig.wal.error = OSError(5, "Input/output error")
    done = []
    rig.writer.submit(pyetcd.WalJob(b"", None, (b"x",), None, 0, lambda: done.append(1)))
    rig.reactor.turn()
    rig.reactor.turn()
    assert [error.errno for error in rig.failed] == [5] and not done
    written = rig.wal.threads.count("wal") + rig.wal.threads.count(threading.current_thread().name)
    rig.writer.submit(pyetcd.WalJob(b"", None, (b"y",) * 1000, None, 7, lambda: done.append(2)))
    rig.writer.stop()
    assert not done and "release" not in rig.wal.threads, "a job was begun after the failed sync"
    assert written == rig.wal.threads.count("wal") + rig.wal.threads.count(
        threading.current_thread().name)


def test_journal_full_disk_on_the_reactor_is_left_to_the_thread(rig):
    """The thread repeats the write until there is space; the reactor does not wait."""
    rig.warm_up()
    rig.wal.error = pyetcd.DiskFull("no space left on device")
    assert rig.write() == "wal" and not rig.failed


def test_journal_stop_writes_the_deferred_job(rig):
    """A job that waits for the reactor's next turn is on disk when the writer has stopped."""
    rig.warm_up()
    rig.writer.submit(pyetcd.WalJob(b"", None, (b"last",), None, 0, lambda: None))
    before = len(rig.wal.threads)
    rig.writer.stop()
    assert rig.wal.threads[before:before + 2] == ["wal", "closed"]


def test_journal_sim_members_that_sync_on_the_reactor(monkeypatch):
    """A member stands still for each of its syncs: nothing is lost, all members agree."""
    delay_s = _SimWalWriter._delay_s

    def stand_still(writer):
        seconds, reactor = delay_s(writer), writer._reactor
        reactor.member.frozen_until = max(reactor.member.frozen_until, reactor.sim.now + seconds)
        return seconds

    monkeypatch.setattr(_SimWalWriter, "_delay_s", stand_still)
    for seed in range(10):
        assert _sim_scenario(seed, None).acknowledged, f"seed {seed}"


def test_journal_syncs_of_the_turn_itself_keep_the_promises_of_raft(monkeypatch):
    """The simulation, with half of the lone writes durable before submit() returns."""
    submit, done = _SimWalWriter.submit, []

    def submit_or_sync(writer, job):
        is_plain = not (job.record or job.snapshot or job.cut or job.release_to)
        alone = is_plain and not writer.waiting and writer._reactor.sim.rng.random() < 0.5
        if alone and writer._try(lambda: writer._write_frames(job.data)):
            done.append(job)
            job.done()
        else:
            submit(writer, job)

    monkeypatch.setattr(_SimWalWriter, "submit", submit_or_sync)
    for seed in range(10):
        assert _sim_scenario(seed, None).acknowledged, f"seed {seed}"
    assert len(done) > 100


def test_journal_disk_that_stalls_stops_its_leader_once(monkeypatch):
    """Its sync does not return: another leader takes over, and no acknowledged write is lost."""
    stalled, release, reactors = threading.Event(), threading.Event(), []
    sync = pyetcd.OsDisk.fdatasync

    def fdatasync(disk, handle):
        if threading.get_ident() in reactors:
            stalled.set()
            assert release.wait(60)
        sync(handle)

    monkeypatch.setattr(pyetcd.OsDisk, "fdatasync", fdatasync)
    monkeypatch.setattr(pyetcd.WalWriter, "QUICK_SYNCS_MIN", 5)
    monkeypatch.setattr(pyetcd.WalWriter, "INLINE_MEAN_SECONDS", 30.0)
    monkeypatch.setattr(pyetcd.WalWriter, "INLINE_SLOW_SECONDS", 30.0)
    with pyetcd.LocalCluster(3) as cluster:
        try:
            old = cluster.wait_leader()
            client = pyetcd_client.Client(cluster.client_urls, read_timeout=60)
            client.set("/before", "1")
            reactors.append(old.call(lambda etcd: threading.get_ident()))
            for number in range(1000):
                _put_without_waiting(old, number)
                if stalled.wait(0.01):
                    break
            assert stalled.is_set()
            others = [member for member in cluster.members if member is not old]
            new = eventually(lambda: next(filter(_leads, others), None), what="another leader")
            with pyetcd_client.Client([new.client_url]) as other:
                assert other.get("/before").value == "1"
                other.set("/after", "1")
        finally:
            reactors.clear()
            release.set()
        with pyetcd_client.Client([old.client_url]) as late:
            eventually(lambda: late.get("/after", default=None), what="the old leader's copy")
            assert old.call(lambda etcd: etcd.journal.writer.inline_syncs) > 0


def _put_without_waiting(member, number):
    """Send a PUT and close: a member whose reactor stands still cannot answer."""
    with _HttpSocket(member.client_url) as client:
        client.send(b"PUT /v2/keys/n?value=%d HTTP/1.1\r\nHost: x\r\n"
                    b"Content-Length: 0\r\n\r\n" % number)


def _leads(member):
    return member.leading_term() > 0


@pytest.fixture(name="inline")
def _inline_fixture(monkeypatch):
    """Every small write is synced on the reactor where its turn allows that."""
    monkeypatch.setattr(pyetcd.WalWriter, "QUICK_SYNCS_MIN", 0)
    monkeypatch.setattr(pyetcd.WalWriter, "INLINE_MEAN_SECONDS", 30.0)
    monkeypatch.setattr(pyetcd.WalWriter, "INLINE_SLOW_SECONDS", 30.0)


def test_journal_write_alone_takes_one_turn(inline, tmp_path, monkeypatch):
    """A lone client gets its answer from the turn that read its request; a restart finds it."""
    later, sync_alone = [], pyetcd.WalWriter._sync_alone
    monkeypatch.setattr(pyetcd.WalWriter, "_sync_alone",
                        lambda writer: later.append(1) or sync_alone(writer))
    with pyetcd.LocalMember(directory=str(tmp_path)) as member:
        with pyetcd_client.Client([member.client_url]) as client:
            before = member.call(lambda etcd: etcd.journal.writer.inline_syncs)
            later.clear()
            for number in range(200):
                assert client.set("/n", str(number)).value == str(number)
            inline_syncs = member.call(lambda etcd: etcd.journal.writer.inline_syncs) - before
            assert inline_syncs - len(later) > 100
            member.restart()
            assert client.get("/n").value == "199"


def test_journal_membership_changes_are_durable_before_they_apply(inline):
    """Also where the sync of their commit ends before it is waited for."""
    with pyetcd.LocalCluster(3) as cluster:
        with pyetcd_client.Client(cluster.client_urls) as client:
            for number in range(5):
                added = client.member_add(f"http://127.0.0.1:{2 + number}")
                client.set("/with", str(number))
                client.member_remove(added.id)
            assert len(client.member_list()) == 3
