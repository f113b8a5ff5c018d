"""Clusters of several programs, whose members are exchanged while a writer runs."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import threading
import time

import pytest
import requests

from tests.kit.basics import eventually
from tests.kit.processes import ClusterMember, EtcdProcess, Process, StaticCluster

EXCHANGE_SECONDS = float(os.environ.get("PYETCD_EXCHANGE_SECONDS", "8"))
_QUICK = ("-heartbeat-interval", "50", "-election-timeout", "500")

needs_etcd = pytest.mark.skipif(shutil.which("etcd") is None, reason="etcd 3.4 is not installed")
needs_etcd23 = pytest.mark.skipif(
    "PYETCD_ETCD23" not in os.environ, reason="PYETCD_ETCD23 names no etcd 2.3.8")


class ActingAs34(Process):
    """pyetcd that acts as etcd 3.4."""

    program = (*Process.program, "-compat-version", "3.4")


class Bridge(Process):
    """pyetcd that members of 2.3 and of 3.4 accept, in a cluster of version 2.3."""

    program = (*Process.program, "-compat-version", "bridge")


class Etcd23(Process):
    """etcd 2.3.8: PYETCD_ETCD23=path of one, or pyetcd with its rules for peers."""

    program = (
        (os.environ["PYETCD_ETCD23"],) if "PYETCD_ETCD23" in os.environ
        else (*Process.program, "-compat-version", "2.3")
    )


KINDS = {
    "etcd": EtcdProcess, "pyetcd": Process, "3.4": ActingAs34, "bridge": Bridge, "2.3": Etcd23,
}


class MixedCluster(StaticCluster):
    """Members of several KINDS, which can be added, removed and restarted as another kind."""

    def __init__(self, directory, kinds, *flags):
        super().__init__(directory, len(kinds), *_QUICK, *flags)
        self._names = (f"m{number}" for number in itertools.count())
        for member, kind in zip(self.members, kinds):
            member.process_type = KINDS[kind]

    def add(self, kind):
        """Add a member by the API, and start it; return it when it serves."""
        member = ClusterMember(self.directory, next(self._names), KINDS[kind])
        known = eventually(lambda: self.listing(named=True), what="the members")
        eventually(lambda: self._post(member.peer), what="a new member in the list")
        pairs = [f"{m['name']}={m['peerURLs'][0]}" for m in known]
        self.members.append(member)
        member.start(
            "-initial-cluster", ",".join([*pairs, f"{member.name}={member.peer}"]),
            "-initial-cluster-state", "existing", *self.flags,
        )
        self.wait_served(member)
        return member

    def _post(self, peer):
        if any(peer in known["peerURLs"] for known in self.listing() or ()):
            return True
        for member in self.members:
            answer = requests.post(
                f"{member.client}/v2/members", json={"peerURLs": [peer]}, timeout=10)
            if answer.status_code in (201, 409):
                return True
        return False

    def listing(self, named=False):
        """Return the members as the first that answers has them; None if nobody answers."""
        for member in self.members:
            answer = member.request("GET", "/v2/members", timeout_s=2)
            if answer and answer[0] == 200:
                found = answer[1]["members"]
                return found if not named or all(m["name"] for m in found) else None
        return None

    def remove(self, member):
        """Remove a member by the API; it exits."""
        others = [other for other in self.members if other is not member]

        def removed():
            known = next(
                (m["id"] for m in self.listing() or () if member.peer in m["peerURLs"]), None)
            if known is None:
                return True
            for other in others:
                answer = other.request("DELETE", f"/v2/members/{known}")
                if answer and answer[0] in (204, 410):
                    return True
            return False

        eventually(removed, what=f"the removal of {member.name}")
        self.members.remove(member)
        try:
            member.process.popen.wait(5)
        except Exception:
            member.process.kill()

    def exchange(self, member, kind):
        """Put a new member of another kind in the place of `member`."""
        self.add(kind)
        self.remove(member)

    def restart_as(self, member, kind, *more):
        """Stop a member, and start a program of another kind on its directory."""
        member.process.kill(signal.SIGTERM)
        member.process_type = KINDS[kind]
        self.start(member, *more)
        self.wait_served(member)

    def wait_served(self, member):
        """Wait until a member serves, and has applied a write made through it."""
        member.process.wait_log("published", 30)
        self.put_through(member, "served", member.name, 20)

    def wait_version(self, version):
        """Wait until all members have this cluster version."""
        eventually(lambda: {
            answer and answer[1]["etcdcluster"] for answer in (
                member.request("GET", "/version") for member in self.members)
        } == {version}, 30, f"cluster version {version}")

    def lead_by(self, *kinds):
        """Let a member of one of `kinds` lead: stop the others while they do."""
        types = tuple(KINDS[kind] for kind in kinds)

        def leads():
            leader = self.leader()
            if leader.process_type in types:
                return True
            leader.process.kill(signal.SIGTERM)
            self.start(leader)
            self.wait_served(leader)
            return False

        eventually(leads, what=f"a leader of {kinds}")

    def kill_leader(self):
        leader = self.leader()
        leader.process.kill()
        self.start(leader)
        return leader

    def keys(self, member):
        answer = member.request("GET", "/v2/keys/", recursive="true", sorted="true")
        return answer and answer[0] == 200 and (answer[1]["node"], answer[2]["X-Etcd-Index"])

    def check_equal(self, acknowledged):
        """All members come to hold the same, and all that was acknowledged."""
        self.put_through(self.members[0], "last", "1", 20)

        def equal():
            first, *others = (self.keys(member) for member in self.members)
            return first and all(other == first for other in others) and first

        root, _ = eventually(equal, 30, "equal members")
        found = {}
        waiting = [root]
        while waiting:
            node = waiting.pop()
            waiting += node.get("nodes", ())
            found[node.get("key")] = node.get("value")
        lost = {key for key, value in acknowledged.items() if found.get(key) != value}
        assert not lost, f"{len(lost)} of {len(acknowledged)} acknowledged writes are lost: {lost}"


class Writer:
    """Writes new keys through all members at once, and remembers what is acknowledged.

    As clients do, a thread goes on to the next member when one does not answer.
    """

    THREADS = 3

    def __init__(self, cluster):
        self.cluster = cluster
        self.acknowledged = {}
        self.pause_s = 0.0              # longest time without an acknowledged write
        self._last = time.monotonic()   # acknowledged write; with pause_s below the lock
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(number,), name=f"writer{number}")
            for number in range(self.THREADS)
        ]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        self.wait_more(1)
        return self

    def __exit__(self, *exc_info):
        self._stopped.set()
        for thread in self._threads:
            thread.join()

    def wait_more(self, count):
        """Wait until so many more writes are acknowledged."""
        wanted = len(self.acknowledged) + count
        eventually(lambda: len(self.acknowledged) >= wanted, what=f"{wanted} writes")

    def _run(self, thread):
        session = requests.Session()
        turn = thread
        for number in itertools.count():
            if self._stopped.wait(0.08):
                return
            members = list(self.cluster.members)
            turn += number % 50 == 0
            member, key = members[turn % len(members)], f"/w/{thread}-{number}"
            try:
                answer = session.put(
                    f"{member.client}/v2/keys{key}", {"value": number}, timeout=1)
            except requests.RequestException:
                turn += 1
                continue
            if answer.status_code in (200, 201):
                with self._lock:
                    now = time.monotonic()
                    self.pause_s = max(self.pause_s, now - self._last)
                    self._last = now
                    self.acknowledged[key] = str(number)


def etcdctl3(member, *arguments):
    """Run a command of the v3 API, which must succeed; return its output."""
    return subprocess.run(
        ["etcdctl", "--endpoints", member.client, *arguments], check=True, capture_output=True,
        text=True, timeout=60, env={**os.environ, "ETCDCTL_API": "3"},
    ).stdout
