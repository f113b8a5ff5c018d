"""The commands of docs/moving.md, run as they stand.

A command goes to `sh`, where `etcd`, `etcdctl`, `python3`, `pyetcdctl`, `sudo` and `systemctl` are
scripts of the test, first in PATH:

    etcd        etcd 2.3 (PYETCD_ETCD23, or pyetcd -compat-version 2.3) or Debian's 3.4
    etcdctl     pyetcdctl, or the one beside PYETCD_ETCD23; for the API of v3 that of Debian
    sudo        drops `-u etcd`; systemctl stop ends the member at hand

Guide.given maps what a reader replaces: addresses, directories, `<its name>`, `…` (other flags).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import pyetcd
import pyetcd_client
from tests.kit.basics import eventually, manual
from tests.kit.exchange import Etcd23, MixedCluster, Writer, needs_etcd
from tests.kit.processes import ClusterMember, EtcdProcess, Process, compiled, ended

_OFTEN = ("-snapshot-count", "40")


def _commands(chapter):
    """Return the blocks of commands of a chapter, without prompts and remarks."""
    found = []
    for block in re.findall(r"(?:^ {4,}\$ .*\n(?: {8,}.*\n)*)+", manual("moving", chapter), re.M):
        joined = re.sub(r"\\\n\s+", "", re.sub(r" +# .*$", "", block, flags=re.M))
        found.append([line.strip()[2:] for line in joined.splitlines()])
    return found


class Typed(Process):
    """A member that a command line of the page started."""

    program = ("sh", "-c")


class Guide:
    """A shell in which the commands of the page mean the programs and members of a test."""

    def __init__(self, directory, etcd=Etcd23):
        self.directory = directory
        self.given = {}                 # text of the page -> of this test
        self.bin = directory / "bin"
        self.bin.mkdir()
        self.python = sys.executable
        real = Path(os.environ.get("PYETCD_ETCD23", "none")).with_name("etcdctl")
        ours = f"{self.python} {compiled(pyetcd_client)}"
        etcdctl2 = str(real) if real.exists() else ours
        self._script("etcd", self._words(etcd.program) + ' "$@"')
        self._script("etcdctl", f'{etcdctl2} "$@"',
                     f'[ "$ETCDCTL_API" = 3 ] && exec {shutil.which("etcdctl")} "$@"')
        self._script("pyetcdctl", f'{ours} "$@"')
        self._script("python3", f'{self.python} {compiled(pyetcd)} "$@"', "shift")
        self._script("sudo", '"$@"', "shift 2")
        self._script("systemctl", "true", "kill -TERM $MEMBER || exit")

    @staticmethod
    def _words(program):
        return " ".join([shutil.which(program[0]) or program[0], *program[1:]])

    def _script(self, name, last, *before):
        path = self.bin / name
        path.write_text("\n".join(["#!/bin/sh", *before, f"exec {last}", ""]))
        path.chmod(0o755)

    def _environment(self, member):
        client = member.client if member else ""
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("ETCD_", "ETCDCTL_"))}
        return {
            **clean, "PATH": f"{self.bin}:{os.environ['PATH']}", "ETCDCTL_PEERS": client,
            "ETCDCTL_ENDPOINT": client, "ETCDCTL_ENDPOINTS": client, "ETCDCTL_API": "2",
            "MEMBER": str(member.process.popen.pid) if member and member.process else "",
        }

    def _ours(self, command):
        for text, value in sorted(self.given.items(), key=lambda pair: -len(pair[0])):
            command = command.replace(text, str(value))
        assert not re.search("[<…]|10[.]0[.]0|/var/", command), command
        return command

    def run(self, command, member=None, status=0):
        """Run a command to its end; return what it prints."""
        ours = self._ours(command)
        done = subprocess.run(
            ["sh", "-c", ours], cwd=self.directory, capture_output=True, text=True, timeout=120,
            env=self._environment(member))
        print(f"$ {ours}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        assert done.returncode == status, command
        if command.startswith("systemctl stop"):
            member.process.popen.wait(60)
        return done.stdout

    def start(self, command, member):
        """Run the command that starts a member; return when it is published."""
        member.process = Typed(
            self.directory, f"exec {self._ours(command)}", env=self._environment(None))
        member.process.wait_log("published")

    def healthy(self, command, member):
        def is_healthy():
            try:
                return "cluster is healthy" in self.run(command, member)
            except AssertionError:
                return False
        eventually(is_healthy, what="a healthy cluster")

    def restart(self, commands, cluster, member):
        """Carry out `stop, start, look` for one member."""
        stop, start, health = commands
        flags = [*member.flags()[2:], "-initial-cluster", cluster.initial, *cluster.flags]
        self.given |= {"<its name>": member.name, "…": " ".join(flags),
                       "/var/lib/etcd2": f"{member.name}.etcd",
                       "/var/lib/etcd": f"{member.name}.etcd"}
        self.run(stop, member)
        self.start(start, member)
        self.healthy(health, member)
        cluster.put_through(member, "through", member.name, 30)


def _flags_of(member, known):
    """The other flags of a member that joins."""
    return " ".join([*member.flags()[2:], *known])


def test_moving_etcd_2_3_is_replaced_member_by_member_and_comes_back(tmp_path):
    """The block of the page for each member, then the other program with the same flags."""
    guide = Guide(tmp_path)
    (block,) = _commands("Replacing a running etcd 2.3 member")
    with MixedCluster(tmp_path, ("2.3",) * 3, *_OFTEN) as cluster:
        for member in cluster.members:
            cluster.put_through(member, f"a{member.name}", "1")
        with Writer(cluster) as writer:
            for member in cluster.members:
                guide.given = {"/var/lib/etcd2": f"{member.name}.etcd",
                               "/var/backups/etcd2": f"{member.name}.backup"}
                backup, health, *exchange = block
                guide.run(backup, member)
                guide.healthy(health, member)
                guide.restart(exchange, cluster, member)
            for member in cluster.members:
                cluster.restart_as(member, "2.3")
        cluster.check_equal(writer.acknowledged)
        assert (tmp_path / f"{member.name}.backup" / "member" / "wal").is_dir()


@needs_etcd
def test_moving_from_2_3_to_3_4_and_back(tmp_path):
    """The blocks of the chapter, in their order, under a writer."""
    guides = {}
    for name, program in (("2.3", Etcd23), ("3.4", EtcdProcess)):
        (tmp_path / name).mkdir()
        guides[name] = Guide(tmp_path / name, program)
        guides[name].directory = tmp_path
    with MixedCluster(tmp_path, ("2.3",) * 3, *_OFTEN) as cluster:
        cluster.wait_version("2.3.0")
        with Writer(cluster) as writer:
            _to_3_4_and_back(guides, cluster)
        cluster.check_equal(writer.acknowledged)


def _to_3_4_and_back(guides, cluster):
    to_bridge, to_34, to_etcd, from_etcd, by_new = _commands("From 2.3 to 3.4 through pyetcd")
    for name, block, version in (("2.3", to_bridge, "2.3.0"), ("2.3", to_34, "3.4.0"),
                                 ("3.4", to_etcd, "3.4.0"), ("3.4", from_etcd, "2.3.0")):
        guide = guides[name]
        for member in cluster.members:
            guide.restart(block[:3], cluster, member)
        cluster.wait_version(version)
        guide.given["http://10.0.0.1:2380"] = member.peer
        assert all(version in guide.run(line) for line in block[3:])
    _join_by_commands(guides["2.3"], cluster, by_new)


def _join_by_commands(guide, cluster, block):
    """Add a member with the three commands of the page, and remove the first one."""
    first, other = cluster.members[:2]
    add, start, remove = block
    joiner = ClusterMember(guide.directory, "m4")
    guide.given = {"http://10.0.0.4:2380": joiner.peer, "/var/lib/etcd2": "m4.etcd"}
    printed = guide.run(add, other)
    guide.given["<list>"] = re.search(r'ETCD_INITIAL_CLUSTER="(.*?)"', printed)[1]
    guide.given["…"] = _flags_of(joiner, cluster.flags)
    guide.start(start, joiner)
    guide.given["<id of m1>"] = re.search(
        rf"(\w+): name={first.name} ", guide.run("etcdctl member list", other))[1]
    guide.run(remove, other)
    cluster.members = [*cluster.members[1:], joiner]
    first.process.popen.wait(60)


@needs_etcd
def test_moving_between_etcd_3_4_and_pyetcd(tmp_path):
    """In place, and by a new member of the other program."""
    guide = Guide(tmp_path, EtcdProcess)
    in_place, (add, start, remove) = _commands("Between etcd 3.4 and pyetcd")
    with MixedCluster(tmp_path, ("etcd",) * 3, *_OFTEN) as cluster:
        cluster.wait_version("3.4.0")
        with Writer(cluster) as writer:
            first, second = cluster.members[:2]
            guide.restart(in_place, cluster, second)
            joiner = ClusterMember(tmp_path, "m4")
            guide.given = {
                "http://10.0.0.1:2379": first.client, "http://10.0.0.4:2380": joiner.peer,
                "http://10.0.0.4:2379": joiner.client,
            }
            guide.run(add)
            known = ",".join(f"{m.name}={m.peer}" for m in cluster.members)
            guide.given |= {"m1=http://10.0.0.1:2380,…": known,
                            " …": " " + _flags_of(joiner, cluster.flags)}
            guide.start(start, joiner)
            cluster.members.append(joiner)
            guide.given["<id of m1>"] = next(
                m["id"] for m in cluster.listing(named=True) if m["name"] == first.name)
            guide.run(remove)
            cluster.members.remove(first)
            first.process.popen.wait(60)
        cluster.check_equal(writer.acknowledged)


@needs_etcd
def test_moving_frees_a_directory_that_etcd_3_6_refuses(tmp_path):
    """Export, script, removal, snapshot and check, on a member of etcd 3.4."""
    guide = Guide(tmp_path, EtcdProcess)
    (export, export_script, script, remove), (fill, check) = _commands(
        "Free a directory that blocks etcd 3.6")
    member = ClusterMember(tmp_path, "m1", EtcdProcess)
    guide.given = {"http://10.0.0.1:2379": member.client, "/var/lib/etcd": "m1.etcd"}
    initial = ("-initial-cluster", f"m1={member.peer}")
    with ended(member):
        member.start_alone()
        for number in range(12):
            member.put(f"old/{number}", str(number))
        for line in (export, export_script, script, remove):
            guide.run(line, member)
        assert (tmp_path / "keys.json").stat().st_size > 0
        member.process.kill(15)
        member.start(*initial, "--snapshot-count=10")
        eventually(member._serves, what="etcd serves")
        guide.run(fill, member)
        moved = guide.run("ETCDCTL_API=3 etcdctl get /old/7 --print-value-only", member)
        member.process.kill(15)
        assert moved == "7\n"
        checked = guide.run(check, status=2)        # etcd 3.7 wants a snapshot of 3.6 first
        assert re.search(r"^etcd 3.6: +starts$", checked, re.M)


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_moving_forms_a_cluster_by_a_discovery_service_of_its_own(tmp_path):
    """A pyetcd outside of the cluster gives a fresh URL, with which three members find together."""
    guide = Guide(tmp_path)
    ((service, fresh, start),) = _commands("A discovery service of your own")
    outside = ClusterMember(tmp_path, "discovery")
    members = [ClusterMember(tmp_path, f"m{number}") for number in range(3)]
    with ended(outside, *members):
        guide.given = {"/var/lib/discovery": "discovery.etcd", "…": _flags_of(
            outside, ["-initial-cluster", f"discovery={outside.peer}"]),
            "http://10.0.0.9:2379": outside.client}
        guide.start(service, outside)
        guide.given["<a fresh URL>"] = guide.run(fresh)
        for member in members:
            guide.given |= {"<its name>": member.name, "…": _flags_of(member, ())}
            member.process = Typed(
                tmp_path, f"exec {guide._ours(start)}", env=guide._environment(None))
        for member in members:
            member.process.wait_log("published")
        assert eventually(lambda: members[0].put("a", "1"))[0] == 201
        assert len(members[1].request("GET", "/v2/members")[1]["members"]) == 3


@pytest.mark.parametrize("chapter", ["restore", "mirror"])
def test_moving_keys_to_a_new_cluster(tmp_path, chapter):
    """From etcd 3.x: its directory is restored, or a copy follows what clients write."""
    guide = Guide(tmp_path)
    (restore,), (mirror,) = _commands("From etcd 3.x")
    old, new = ClusterMember(tmp_path, "old"), ClusterMember(tmp_path, "m1")
    guide.given = {
        "/var/lib/etcd": "old.etcd", "http://old:2379": old.client, "http://new:2379": new.client,
        "http://10.0.0.1:2380": new.peer,
    }
    mirroring = None
    try:
        old.start_alone()
        assert old.put("a", "1")[0] == 201
        if chapter == "restore":
            old.process.kill(15)
            guide.run(restore)
            new.start_alone()
        else:
            new.start_alone()
            mirroring = Typed(tmp_path, f"exec {guide._ours(mirror)}", env=guide._environment(None))
            eventually(lambda: new.value("a") == "1", what="the copy")
            old.put("b", "2")
            eventually(lambda: new.value("b") == "2", what="the change in the copy")
        assert new.value("a") == "1"
    finally:
        for process in (old.process, new.process, mirroring):
            if process:
                process.kill()
