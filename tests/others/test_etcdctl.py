"""Other clients: etcdctl and libraries, side by side."""

from __future__ import annotations

import concurrent.futures
import contextlib
import math
import os
import re
import shlex
import shutil
import signal
import subprocess

import pytest

from tests.kit.basics import _ports, eventually, free_port
from tests.kit.clients import _client_etcdctl
from tests.kit.processes import PROCESS_TYPES, EtcdProcess, StaticCluster

_WALK_INDEX = re.compile(
    r'(?<=Index":)\d+|(?<=Index: )\d+|(?<=\[)\d+(?=\]| != )|(?<= != )\d+(?=\])|(?<=/)\d{20}')


class _WalkSide:
    """One of the two clusters under comparison, and the words that stand for what is its own.

    URL0, PEER0, ID0 and NAME0 belong to the member that leads when the walk begins, 1 and 2 to the
    others; PEER3 and PEER4 are free, ID3 was added last; @5 is the fifth index from here.
    """

    def __init__(self, cluster):
        leader = cluster.leader()
        self.members = [leader, *(m for m in cluster.members if m is not leader)]
        for member in self.members:
            eventually(lambda m=member: self._is_settled(m), what="names and a cluster version")
        listing = leader.request("GET", "/v2/members")[1]["members"]
        ids = {member["name"]: member["id"] for member in listing}
        self.words = {f"PEER{rank}": f"http://127.0.0.1:{free_port()}" for rank in (3, 4)}
        for rank, member in enumerate(self.members):
            self.words.update({f"URL{rank}": member.client, f"PEER{rank}": member.peer,
                               f"ID{rank}": ids[member.name], f"NAME{rank}": member.name})
        self.first_index = leader.index()
        self.data_dir = leader.directory / f"{leader.name}.etcd"

    @staticmethod
    def _is_settled(member):
        """Tell whether this member has heard of all that happens by itself after a start."""
        listing = member.request("GET", "/v2/members")[1]["members"]
        version = member.request("GET", "/version")[1]["etcdcluster"]
        return version != "not_decided" and all(known["clientURLs"] for known in listing)

    def run(self, line):
        """Run `words [< stdin]`; return exit code, output and errors, made comparable."""
        command, _, stdin = line.partition(" < ")
        code, out, err = _client_etcdctl(
            self.members[0].client, *self.arguments(command), stdin=stdin.encode())
        added = re.search(r"with ID (\w+) to cluster", out)
        if added:
            self.words["ID3"] = added[1]
        return code, self.plain(out), self.plain(err)

    def wait_for(self, line, *writes):
        """Run a command that waits for events, with writes meanwhile; SIGINT ends it."""
        process = self.start(line)
        try:
            eventually(lambda: self.watchers() == 1, what="a watcher")
            for write in writes:
                assert self.run(write)[0] == 0
                verb, *_, value = write.split()
                if verb == "set":
                    eventually(lambda v=value: v in self.log.read_text(), what=f"value {value}")
            if "forever" in line or "exec" in line:
                process.send_signal(signal.SIGINT)
            return process.wait(20), self.plain(self.log.read_text())
        finally:
            process.kill()
            process.wait(20)

    def health_until_interrupted(self):
        """Return exit code and text of `cluster-health --forever` up to its first pause."""
        process = self.start("cluster-health --forever")
        eventually(lambda: "next check" in self.log.read_text(), what="the end of a check")
        process.send_signal(signal.SIGINT)
        return process.wait(20), self.plain(self.log.read_text())

    def restart_from_backup(self, process_type):
        """Stop the only member, let etcdctl copy its directory, start a program from the copy."""
        member = self.members[0]
        member.process.kill(signal.SIGTERM)
        source, self.data_dir = self.data_dir, member.directory / f"backup{next(_ports)}"
        code, out, _ = self.run(f"backup --data-dir {source} --backup-dir {self.data_dir}")
        member.process_type = process_type or member.process_type
        member.start("-data-dir", str(self.data_dir), "-force-new-cluster")
        member.process.wait_log("published")
        listing = member.request("GET", "/v2/members")[1]["members"]
        self.words["ID0"] = listing[0]["id"]
        return code, out

    def start(self, line):
        """Start etcdctl; `self.log` gets what it says."""
        self.log = self.members[0].directory / f"log{next(_ports)}"
        with open(self.log, "wb") as log:
            return subprocess.Popen(
                ["etcdctl", "--endpoints", self.members[0].client, *self.arguments(line)],
                stdout=log, stderr=log, env={**os.environ, "ETCDCTL_API": "2"})

    def watchers(self):
        return self.members[0].request("GET", "/v2/stats/store")[1]["watchers"]

    def arguments(self, command):
        """Return the words of a command, with the URLs, ids and indexes of this side put in."""
        def own(match):
            if match[0][0] == "@":
                return str(self.first_index + int(match[0][1:]))
            return self.words[match[0]]
        return [re.sub(r"@\d+|\b(?:URL|PEER|ID|NAME)\d\b", own, word)
                for word in shlex.split(command)]

    def plain(self, text):
        """Put the common words in place of what only this side has, and blur times.

        Lists in the order of the members' ids are sorted by those words.
        """
        for word, own in self.words.items():
            own = re.escape(own.replace("http://", ""))
            text = re.sub(rf"(?<!\w){own}(?!\w)", word, text)
        text = _WALK_INDEX.sub(lambda match: f"@{int(match[0]) - self.first_index}", text)
        text = re.sub(r'"ttl":(\d+)', lambda m: f'"ttl":{math.ceil(int(m[1]) / 10) * 10}', text)
        text = re.sub(r"\b20\d\d-\d\d-\d\d[T ][\d:.]+Z?", "TIME", text)
        text = text.replace("membership: ", "etcdserver: ")     # 3.4's word for it
        # An id is made of the URL and the second: within one second it is the id that exists.
        text = text.replace("etcdserver: ID exists", "etcdserver: peerURL exists")
        text = re.sub(r'(?<=CLUSTER=")[^"]+', lambda m: ",".join(sorted(m[0].split(","))), text)
        return re.sub(r"(?m)(^(failed to check the health of )?(member )?ID\d.*\n)+",
                      lambda m: "".join(sorted(m[0].splitlines(keepends=True))), text)


@contextlib.contextmanager
def _walk_pair(directory, size=1, *flags):
    """Two fresh clusters: the real etcd, then pyetcd."""
    for program in ("etcd", "etcdctl"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    with contextlib.ExitStack() as stack:
        clusters = []
        for kind, process_type in PROCESS_TYPES.items():
            (directory / kind).mkdir()
            clusters.append(stack.enter_context(StaticCluster(
                directory / kind, size, *flags, process_type=process_type)))
        yield [_WalkSide(cluster) for cluster in clusters]


def _walk_both(sides, function, *arguments):
    """Return what `function(side, *arguments)` gives for each side; the sides run at once."""
    with concurrent.futures.ThreadPoolExecutor(len(sides)) as pool:
        return list(pool.map(lambda side: function(side, *arguments), sides))


def _walk_compare(sides, script):
    """Run a script on both sides: same exit codes, the ones in front of the lines, same texts."""
    lines = [re.fullmatch(r"(?:(\d) )?(.*)", line).groups() for line in script.strip().split("\n")]
    theirs, ours = _walk_both(
        sides, lambda side: [side.run(command) for _, command in lines])
    differing = [f"{command}\n  etcd   {expected}\n  pyetcd {got}"
                 for (_, command), expected, got in zip(lines, theirs, ours) if expected != got]
    assert not differing, "\n".join(differing)
    assert [(command, int(code or 0)) for code, command in lines] == [
        (command, outcome[0]) for (_, command), outcome in zip(lines, theirs)]


@pytest.fixture(scope="module", name="_walk_shared")
def _walk_shared_fixture(tmp_path_factory):
    with _walk_pair(tmp_path_factory.mktemp("walk")) as sides:
        yield sides


@pytest.fixture(name="_walk_sides")
def _walk_sides_fixture(_walk_shared):
    """Two clusters of one that tests share, with indexes counted from here."""
    for side in _walk_shared:
        side.first_index = side.members[0].index()
    return _walk_shared


_WALK_KEYS = """
set /foo bar
set /foo b2
get /foo
4 get /nope
4 mk /foo x
mk /n v
mk --in-order /q v
mk --in-order --ttl 50 /q w
mkdir /d
4 mkdir /d
1 get /d
4 set /d v
set /d/x 1
set /d/sub/y 2
ls --sort
ls --sort -p /
ls --sort --recursive -p /d
ls --sort --recursive /
ls --quorum --sort /
ls /foo
4 ls /nope
get --quorum --sort /foo
get -q /foo
update /foo b3
4 update /nope v
4 update /d v
update --ttl 50 /foo b4
-o extended get /foo
-o json get /foo
1 -o json get /d
-o json ls --sort /d
-o json ls --recursive --sort /
-o extended ls /d
4 -o extended get /nope
4 -o json get /nope
1 -o xml get /d
setdir /new
4 setdir /new
setdir /foo
setdir --ttl 40 /n
updatedir --ttl 30 /d
4 updatedir /nope
updatedir /n
mkdir --ttl 90 /dt
-o json mkdir /dj
-o extended mkdir /de
-o json setdir /dj2
-o json updatedir --ttl 90 /dj
-o extended updatedir --ttl 90 /dj
4 rm /d
4 rm --dir /d
4 rmdir /d
rm --recursive /d
4 rmdir /d
set /f one
4 rm --with-value no /f
4 rm --with-index @1 /f
rm --with-value one /f
set /f 2
-o json rm --with-value 2 /f
set /f 3
-o extended rm --with-value 3 /f
set /f 4
rm --with-index @29 /f
set /f 5
rm /f
rmdir /new
4 rm --dir /new
4 rm /nope
4 rm --recursive /
4 rm /
4 rmdir /
4 set / x
4 mkdir /
4 mk / x
4 update / x
set /foo/sub x
4 mkdir /foo/sub
4 set /foo/sub/deeper x
4 get /foo/sub/deeper
ls /foo/sub
set /v -5
set -- /v -7
get /v
4 set --swap-with-value no /v 2
set --swap-with-value=-7 /v 2
4 set --swap-with-index @1 /v 3
4 set --swap-with-index @1 /nope 3
4 set --swap-with-value no /foo 3
set --swap-with-index @37 /v 3
set --ttl 0 /v 4
-o json set --ttl 50 /t x
-o extended set /t y
-o extended mk /m z
4 -o json mk /m z
-o json mk /m2 z
-o json rm /m
-o extended rm /t
-o json rm --recursive /dj
-o json set /html <a>&b
-o json set --swap-with-value <a>&b /html c
-o extended set --swap-with-value c /html d
-o extended update /html e
set /k < from stdin
get /k
update /k < again
mk --in-order /q < ü
set /ü/ö ä
ls /ü
-o json get /ü/ö
set '/sp ace' 'a b'
get '/sp ace'
set /a//b/../c 1
ls -p --sort /a
set foo2 x
get foo2
4 ls _hidden
set /_h/x 1
ls --sort /
ls /_h
get /_h/x
rm --recursive /_h
"""
_WALK_USAGE = """
1 set
1 get
1 mk
1 rm
1 mkdir
1 rmdir
1 setdir
1 updatedir
1 update
1 watch
1 exec-watch
1 exec-watch /foo
1 set /k
1 update /k
1 mk /k
3 bogus
1 get --bogus /foo
1 --bogus get /foo
1 --timeout x get /v
member list
1 member list x
1 member add
1 member add a
1 member add a bad-url
1 member remove
1 member remove x
1 member remove NAME0
1 member update
1 member update x
1 member update ID0 bad-url
3 member bogus
cluster-health
set /v v
--no-sync get /v
--debug get /v
--debug --no-sync get /v
--debug -o json set /v 2
--debug member list
--timeout 1s --total-timeout 2s get /v
--endpoints http://127.0.0.1:1,URL0 get /v
--endpoints http://127.0.0.1:1,URL0 --no-sync get /v
2 --endpoints http://127.0.0.1:1 get /v
2 --endpoints http://127.0.0.1:1 set /v 1
2 --endpoints http://127.0.0.1:1 ls /v
2 --endpoints http://127.0.0.1:1 member list
4 --endpoints http://127.0.0.1:1 cluster-health
auth
user
role
3 import
"""


def test_walk_etcdctl_keys(_walk_sides):
    """get, set, mk, update, mkdir, setdir, updatedir, rm, rmdir, ls with all their options."""
    _walk_compare(_walk_sides, _WALK_KEYS)


def test_walk_etcdctl_usage_and_global_options(_walk_sides):
    """Bad arguments, endpoints that nobody listens on, --debug, --no-sync, timeouts."""
    _walk_compare(_walk_sides, _WALK_USAGE)


def test_walk_etcdctl_watch_of_the_past(_walk_sides):
    """One event from the history, or the expiry that comes next."""
    _walk_compare(_walk_sides, """
set /w/a 1
set /w/d/b 2
rm /w/a
mkdir /w/e
set /w/a 3
-o extended watch --after-index @0 --recursive /w
set --ttl 1 /w/ttl soon
watch --after-index @0 /w/a
watch --after-index @1 /w/a
watch --after-index @2 --recursive /w
watch --after-index @3 --recursive /w
-o json watch --after-index @1 --recursive /w/d
-o json watch --after-index @2 /w/a
watch --recursive --after-index @6 /w
-o json watch --after-index @6 /w/ttl
""")


@pytest.mark.parametrize("line", [
    "watch /live/a", "watch --recursive /live", "watch --forever /live/a",
    "watch --forever --recursive /live", "-o json watch --forever --recursive /live",
    "-o extended watch --forever --recursive /live",
    "exec-watch --recursive /live -- sh -c 'echo $ETCD_WATCH_ACTION $ETCD_WATCH_KEY"
    " $ETCD_WATCH_VALUE Index: $ETCD_WATCH_MODIFIED_INDEX'",
])
def test_walk_etcdctl_watch_live(_walk_sides, line):
    """Events as they happen; --forever and exec-watch end with SIGINT."""
    writes = ["set /live/a first"]
    if "forever" in line or "exec" in line:
        writes += ["set /live/a second", "rm /live/a", "set /live/a third"]
    if "--recursive" in line and len(writes) > 1:
        writes += ["mkdir /live/dir", "set /live/dir/b fourth", "rm --recursive /live/dir",
                   "set /live/b fifth"]
    theirs, ours = _walk_both(_walk_sides, _WalkSide.wait_for, line, *writes)
    assert ours == theirs
    assert theirs[0] == 0 and writes[-1].split()[-1] in theirs[1]


def test_walk_etcdctl_cluster_health_forever(_walk_sides):
    """The second check is ten seconds away; SIGINT ends the waiting."""
    theirs, ours = _walk_both(_walk_sides, _WalkSide.health_until_interrupted)
    assert ours == theirs and "cluster is healthy" in theirs[1]


def test_walk_etcdctl_backup(tmp_path):
    """A copy made by etcdctl, of log and snapshot, starts as a new cluster of one with every key.

    Then the real etcd starts from a copy of what pyetcd wrote.
    """
    with _walk_pair(tmp_path, 1, "-snapshot-count", "10") as sides:
        _walk_compare(sides, "\n".join([
            *(f"set /a/{number % 4} {number}" for number in range(20)),
            "mkdir /a/c", "set --ttl 500 /a/t 2", "mk --in-order /q x"]))
        for process_type in (None, EtcdProcess):
            theirs, ours = _walk_both(sides, _WalkSide.restart_from_backup, process_type)
            assert ours == theirs == (0, "")
            _walk_compare(sides, """
-o json ls --sort --recursive /
member update ID0 PEER0
member list
set /a/b 2
mk --in-order /q y
cluster-health
""")


def test_walk_etcdctl_members(tmp_path):
    """member add, update, remove, list and cluster-health in a cluster of three."""
    with _walk_pair(tmp_path, 3) as sides:
        _walk_compare(sides, """
member list
cluster-health
--no-sync member add fourth PEER3
1 --no-sync member add again PEER3
1 --no-sync member add again PEER1
--no-sync member list
5 --no-sync cluster-health
--no-sync member update ID3 PEER4
1 --no-sync member update ID3 PEER0
1 --no-sync member update abcdef PEER3
--no-sync member list
--no-sync --endpoints URL1 member remove ID3
1 --no-sync member remove ID3
1 --no-sync member remove fourth
1 --no-sync member update ID3 PEER3
--no-sync member list
set /a 1
--no-sync member remove ID2
--no-sync member list
""")
        theirs, ours = _walk_both(sides, lambda side: side.members[2].process.popen.wait(60))
        assert ours == theirs == 0
        _walk_both(sides, lambda side: side.members[1].process.kill())
        _walk_both(sides, lambda side: eventually(
            lambda: side.run("cluster-health")[0] == 5, what="an unhealthy cluster"))
        _walk_compare(sides, """
5 cluster-health
get /a
4 --total-timeout 1s set /a 2
""")


_WALK_AUTH = """
1 auth enable
user list
role list
user add root:pw
user add root:pw
user list
user get root
1 user get nobody
user add al:al1
1 user add
1 user add x y
role add r1
1 role add r1
1 role add
role get r1
1 role get nope
role grant r1 --path /a --read
1 role grant --path /a --read r1
role grant --path '/a/*' --readwrite r1
role grant --path /b --write r1
1 role grant r1
1 role grant --path a --read r1
1 role grant --path /a r1
1 role grant --path /a --read --write r1
1 role grant --path /a --read r1
role get r1
role revoke --path /b --write r1
1 role revoke --path /b --write r1
role get r1
role list
user grant --roles r1 al
1 user grant --roles r1 al
1 user grant al
user grant --roles nope al
user grant --roles r1,r2 al
1 user grant --roles r1 nobody
1 user get al
user revoke --roles nope al
user revoke --roles r1 al
1 user get al
user grant --roles r1 al
set /a/x 1
set /c 1
auth enable
1 user list
1 role list
1 user get al
1 auth enable
1 -u root:pw auth enable
-u root:pw user list
-u root:pw role list
1 -u root:wrong user list
1 -u al:al1 user list
-u root:pw role get root
-u root:pw role get guest
-u root:pw role remove guest
4 get /a/x
4 get /c
4 set /c 2
-u al:al1 get /a/x
-u al:al1 watch --after-index @0 /a/x
4 watch --after-index @0 /a/x
-u al:al1 -o json get /a/x
-u root:pw ls --sort --recursive /
4 -u al:al1 watch --after-index @0 /c
1 -u al:al1 get /a
-u al:al1 set /a/x 2
4 -u al:al1 get /c
4 -u al:al1 set /c 2
4 -u al:al1 ls /
-u al:al1 ls /a
4 -u al:al1 rm --recursive /a
4 -u al:wrong get /a/x
4 -u nobody:x get /a/x
-u root:pw get /c
-u root:pw set /c 3
member list
1 member update ID0 PEER3
1 member add x PEER3
1 -u al:al1 member add x PEER3
-u root:pw member list
cluster-health
-u root:pw cluster-health
1 user passwd al < new
-u root:pw user passwd al < new
4 -u al:al1 get /a/x
1 -u root:pw user remove root
-u root:pw user remove al
1 -u root:pw user remove al
-u root:pw role remove r1
1 -u root:pw role remove r1
1 -u root:pw role remove root
1 -u root:pw role add root
-u root:pw user revoke --roles root root
1 auth disable
1 -u al:al1 auth disable
1 -u root:pw role grant --path '/c' --read guest
-u root:pw role add guest
-u root:pw role grant --path '/c' --read guest
get /c
4 set /c 4
4 ls /
-u root:pw auth disable
1 -u root:pw auth disable
1 auth disable
user remove root
user list
get /c
set /c 5
1 auth enable x
1 auth disable x
1 user list x
1 role list x
1 user get
1 user remove
1 role remove
1 user passwd
"""


def test_walk_etcdctl_auth(tmp_path):
    """user, role, auth and -u: what each says, and what users and guests may do."""
    with _walk_pair(tmp_path) as sides:
        _walk_compare(sides, _WALK_AUTH)
