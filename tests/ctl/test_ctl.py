"""Pyetcdctl: beside Debian's etcdctl, then what only pyetcdctl has."""

from __future__ import annotations

import base64
import contextlib
import datetime
import functools
import io
import itertools
import json
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import termios
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pyetcd
import pyetcd_client
from pyetcd_client import Client
from tests.kit.basics import eventually, free_port, manual_code
from tests.kit.clients import (
    _CLIENT_GOOD,
    _CLIENT_TIMED_OUT,
    _CLIENT_WAIT_S,
    _client_blurred,
    _client_dead_url,
    _client_etcdctl,
    _client_main,
    _client_reply,
    _ClientCaptured,
    _ClientRawServer,
)
from tests.kit.processes import compiled

# D is a directory, U begins names of users and roles: each program has its own.
_CTL_SCRIPTS = {
    "keys": r"""
set D/foo bar | set D/foo b2 | get D/foo | get D/nope | mk D/foo x | mk D/n v | mk --in-order D/q v
mk --in-order --ttl 50 D/q w | mkdir D/d | mkdir D/d | get D/d | set D/d v | set D/d/x 1
set D/d/sub/y 2 | ls --sort D | ls --sort -p D | ls --recursive --sort -p D/d | ls D/foo | ls D/nope
ls --sort --recursive D | ls -sort D/d/ | get --quorum D/foo | get -q D/foo | ls --quorum --sort D
get --sort D/foo | update D/foo b3 | update D/nope v | update D/d v | update --ttl 50 D/foo b4
rm D/d | rm --dir D/d | rmdir D/d | rm --with-value no D/n | rm --with-value v D/n
rm --with-index 1 D/foo | rm D/foo | rm D/foo | rm --recursive D/d | mkdir D/e | rmdir D/e
set D/f 1 | rmdir D/f | mkdir D/e | rm --dir D/e | set D/v -5 | set -- D/v -7 | get D/v
setdir D/new | setdir D/new | set D/file v | setdir D/file | setdir --ttl 40 D/sd | updatedir D/nope
updatedir --ttl 30 D/sd | updatedir D/sd | mkdir --ttl 90 D/td | setdir D/v/x | rm -r D/td
set --swap-with-value 1 D/v 2 | set --swap-with-value=-7 D/v 2 | set --swap-with-index 1 D/v 3
set --swap-with-index 1 D/nope 3 | set --ttl 0 D/v 4 | rm D/nope | rm --recursive / | rmdir /
mkdir / | set / x | set D/ü/ö ä | ls D/ü | set D//p/../q2 1 | set D/k < stdin\n | get D/k
mk D/k2 < x
update D/k < again | mk --in-order D/q < ü | set D/k < | get D/k < ignored
""",
    "formats": r"""
-o extended set D/t x | -o json get D/t | --output json set D/t y | --output=extended mk D/m z
-o json mk D/m z | -o json rm D/m | -o extended rm D/t | -o extended mkdir D/dd | -o json mkdir D/ee
-o extended get D/dd | -o json get D/dd | -o json ls D/dd | -o extended ls D/dd | set D/dd/a 1
-o json ls --recursive --sort D | -o json set D/html <a>&b | -o json rm --recursive D/ee
-o extended rm --with-value <a>&b D/html | -o json set --ttl 50 D/t x | -o json get D/t
-o json setdir D/j | -o extended updatedir --ttl 90 D/j | -o json updatedir --ttl 90 D/j
-o extended set D/c a | -o json set --swap-with-value a D/c <b> | -o extended update D/c e
-o extended get D/nope | -o json get D/nope | -o xml set D/x v | get D/x | -o xml get D/dd
-o json set D/ü ä | -o json rm --with-value ä D/ü
""",
    "usage": r"""
set | get | mk | rm | mkdir | rmdir | setdir | updatedir | update | watch | exec-watch
exec-watch D/k | set D/k | update D/k | mk D/k | member list x | member add | member add a
member remove
member remove x | member update | member update x | member add a bad-url
member update ID bad-url | member add again PEER | cluster-health | member list | user list x
role list x | user add | user get | user remove | user passwd | role add | role get | role remove
auth enable x | auth disable x | --no-sync set D/v v | --no-sync get D/v | -C URL get D/v
--endpoints http://127.0.0.1:1,URL get D/v | --endpoints http://127.0.0.1:1,URL --no-sync get D/v
--timeout 1s --total-timeout 2s get D/v | --peers URL get D/v | --endpoint URL get D/v
--endpoints HOST get D/v | --endpoints DEAD get D/v | --endpoints DEAD set D/v 1
--endpoints DEAD ls D/v | --endpoints DEAD member list | --endpoints DEAD cluster-health
--no-sync --endpoints DEAD get D/v | --no-sync --endpoints DEAD user list
--no-sync --endpoints DEAD member list | --debug set D/v 2 | --debug member list
--debug --no-sync mkdir D/deb | --debug get D/v | --debug user list | bogus | member bogus
get --bogus D/v | --bogus get D/v | --timeout x get D/v | import | --timeout 0 get D/v
--ca-file /none get D/v | --cert-file /none --key-file /none get D/v
""",
    "auth": r"""
auth disable | auth enable | role list | user list | user add root:pw | user add root:pw | user list
user get root | user get nobody | user add Ual:al1 | user get Ual | role add Ur1 | role add Ur1
role get Ur1 | role get nope | role grant --path /a --read Ur1
role grant --path /a/* --readwrite Ur1 | role grant --path /b --write Ur1 | role grant Ur1
role grant --path a --read Ur1 | role grant --path /a/ --read | role grant --path /a Ur1
role grant --path /a --read --write Ur1 | role grant --path /a --read Ur1
role grant --path /a --rw nope | role get Ur1 | role revoke --path /b --write Ur1
role revoke --path /b --write Ur1 | role get Ur1 | role list | user grant --roles Ur1 Ual
user grant --roles Ur1 Ual | user grant Ual | user revoke Ual | user grant --roles Ur1
user grant --roles nope Ual | user get Ual | user revoke --roles nope Ual | user get Ual
user grant --roles Ur1 nobody | user list | user passwd Ual < new\n | user add Uempty
user add Ubo < secret\n | user remove Ubo | user remove Ubo | set /a/x 1 | set /c 1 | auth enable
user list | role list | user get Ual | role get Ur1 | auth enable | -u root:pw user list
-u Ual:new get /a/x | -u Ual:new set /a/x 2 | -u Ual:new get /c | -u Ual:wrong get /a/x
-u Ual:new user list | -u root:pw role remove guest | get /c | set /c 2 | -o json get /c
member list | member update ID PEER | -u root get /c < pw\n | -u root:pw user remove root
-u root:pw role remove root | cluster-health | auth disable | -u root:pw auth disable | auth disable
user remove Ual | role remove Ur1 | role remove Ur1 | user remove root | user list
rm --recursive /a | rm /c
""",
}
_CTL_STTY = "stty: 'standard input': Inappropriate ioctl for device\n"
_CTL_ANY = object()                 # not compared
# All the differences between etcdctl 3.4 and 2.3, whose behaviour is ours, and our own: script and
# lines, why, and what we give where 3.4 gives (code, out, err).
_CTL_DIFFERENCES = [
    ("usage", r"DEAD", "3.4 has the endpoints' errors twice, 2.3 once, or never (member, user)",
     lambda code, out, err: (code, out, _ctl_unavailable(err))),
    ("usage", r"^(member )?bogus$", "2.3 says it on stdout and exits with 0, 3.4 on stderr with 3",
     lambda code, out, err: (0, err, _CTL_ANY)),
    ("usage", r"^import$", "3.4 has no import",
     lambda code, out, err: (1, "no snapshot file provided (use --snap)\n", "")),
    ("usage", r"--bogus|--timeout x", "2.3 exits with 0 and no detail; help has our words",
     lambda code, out, err: (0, _CTL_ANY, _CTL_ANY)),
    ("usage", r"--endpoints HOST", "2.3 takes host:port, 3.4 does not",
     lambda code, out, err: (0, "v\n", "")),
    ("usage", r"--endpoints http://127.0.0.1:1,URL", "we tell that the first endpoint is silent",
     lambda code, out, err: (code, out, _CTL_ANY)),
    ("usage", r"bad-url", "3.4 checks by itself, and has more schemes; we show the server's answer",
     lambda code, out, err: (code, out, _CTL_ANY)),
    ("usage", r"--debug get", "we leave out parameters that say nothing",
     lambda code, out, err: (code, out, re.sub(r"\?quorum=.*", "", err))),
    ("usage", r"--debug .*mkdir", "we send all parameters of a PUT in its body",
     lambda code, out, err: (code, out, re.sub(r'\?(\S+) -d ""', r' -d "\1"', err))),
    ("usage", r"--debug user", "3.4 says the endpoints twice for users",
     lambda code, out, err: (code, out, re.sub(r"(Cluster-Endpoints: .*\n)\1", r"\1", err))),
    ("auth", r"user get", "3.4 puts two spaces behind `Roles:`",
     lambda code, out, err: (code, re.sub("^Roles:  ?", "Roles: ", out, flags=re.M), err)),
    ("auth", r"(user|role) list", "2.3 does not read the answer if a listing is refused",
     lambda code, out, err: (
         code, out, err.replace("Insufficient credentials", "unexpected status code 401"))),
    ("auth", r"^user (grant|revoke) U|^role grant U|role grant .*-path a ", "2.3 writes one dash",
     lambda code, out, err: (code, out, err.replace("`--", "`-"))),
    ("auth", r"^role grant --path /a(/ --read| Ur1| --read --write Ur1)$", "2.3 writes one dash",
     lambda code, out, err: (code, out, re.sub("--(read|write|readwrite)", r"-\1", err))),
    ("auth", r"< (new|secret)|-u root get|user add Uempty", "3.4 complains about a pipe",
     lambda code, out, err: (code, out, err.replace(_CTL_STTY, ""))),
]
_CTL_TWICE = "user add root:pw"     # 3.4 gives a user who exists another password; 2.3 refuses


def _ctl_unavailable(err):
    first = err.split("; ")[0] + "\n"
    details = "error #0: dial tcp 127.0.0.1:1: connect: connection refused\n\n"
    return first + (details if first.startswith("Error:") else "")


def _ctl_lines(script):
    return re.split(r" \| |\n", script.strip())


class _CtlProgram:
    """etcdctl or pyetcdctl, with a directory and a user of its own on the same server."""

    def __init__(self, server, name):
        self.name = name
        self.directory, self.user = ("/aaaa", "ua") if name == "pyetcdctl" else ("/bbbb", "ub")
        with Client(server.url) as client:
            member = client.member_list()[0]
            with contextlib.suppress(pyetcd_client.KeyNotFound):
                client.delete(self.directory, recursive=True)
        self.url = server.url
        self._words = [
            ("URL", server.url), ("HOST", server.url[7:]), ("DEAD", "http://127.0.0.1:1"),
            ("PEER", member.peer_urls[0]), ("ID", member.id), ("NAME", member.name),
            (r"D(?=/|$)", self.directory), (r"U(?=al|r1|bo|x|empty)", self.user)]

    def run(self, line):
        """Run `words [< stdin]`; return exit code, output and errors without what is its own."""
        command, stdin = re.fullmatch(r"(.*?)(?: <(?: (.*))?)?", line).groups(default="")
        return self.run_words(command.split(), stdin.replace("\\n", "\n").encode())

    def run_words(self, words, stdin=b""):
        words = [*map(self._own, words)]
        # The second and the five of the defaults are too short for passwords on a busy machine.
        words = ["--timeout", "20s", "--total-timeout", "60s", *words]
        if self.name == "pyetcdctl":
            outcome = _client_main("--endpoints", self.url, *words, stdin=stdin)
        else:
            outcome = _client_etcdctl(self.url, *words, stdin=stdin)
        code, *texts = _client_blurred(outcome, self.directory)
        return (code, *(re.sub(rf"\b{self.user}(?=al|r1|bo|x|empty)", "U", text)
                        for text in texts))

    def _own(self, word):
        for pattern, own in self._words:
            word = re.sub(rf"\b{pattern}" if pattern[0] != "D" or pattern == "DEAD"
                          else rf"^{pattern}", own, word)
        return word


def _ctl_as_in_2_3(script, line, outcome, used):
    """Return what 2.3 gives where 3.4 gives `outcome`."""
    for differing, pattern, why, change in _CTL_DIFFERENCES:
        if differing == script and re.search(pattern, line):
            changed = change(*outcome)
            if changed != outcome:
                used.add(why)
            outcome = changed
    return outcome


@pytest.mark.parametrize("script", _CTL_SCRIPTS)
def test_ctl_side_by_side(_client_server, script):
    """Same exit code, output and errors as Debian's etcdctl, on pyetcd and on etcd.

    What differs is in _CTL_DIFFERENCES, where 2.3 differs from 3.4, and nothing is there in vain.
    """
    if shutil.which("etcdctl") is None:
        pytest.skip("etcdctl is not installed")
    lines, used = _ctl_lines(_CTL_SCRIPTS[script]), set()
    theirs, ours = _CtlProgram(_client_server, "etcdctl"), _CtlProgram(_client_server, "pyetcdctl")
    expected = [theirs.run(line) for line in lines]
    got = [ours.run(line) for line in lines]
    differing = []
    for number, line in enumerate(lines):
        wanted = _ctl_as_in_2_3(script, line, expected[number], used)
        if line == _CTL_TWICE and line in lines[:number]:
            wanted = (1, "", "User root already exists\n")
        if any(want is not _CTL_ANY and want != have for want, have in zip(wanted, got[number])):
            differing.append(f"{line}\n  wanted {wanted}\n  got    {got[number]}")
    assert not differing, "\n".join(differing)
    listed = {why for differing, _, why, _ in _CTL_DIFFERENCES if differing == script}
    assert used == listed or _client_server.kind == "etcd"      # whose messages are of 3.4


# As units, scripts and guides of other projects have them, but for the directory D.  2.3.8 takes
# options behind arguments, 3.4 does not: it gets them in front.
_CTL_PUBLIC = r"""
# fleet: sidekick units
set D/services/website/nginx1 '{ "host": "core-01", "port": 8080, "version": "52c724" }' --ttl 60
-o json get D/services/website/nginx1
set D/announce/services/apache7777 10.132.249.206:7777 --ttl 60
-o extended get D/announce/services/apache7777
rm D/announce/services/apache7777
rm D/announce/services/apache7777
# Deis: makefiles, publishers, logs
-C URL setdir D/deis
-C URL setdir D/deis/builder
set D/deis/services/app/app_v2.web.1 10.21.12.107:49153 --ttl 60
-o json get D/deis/services/app/app_v2.web.1
ls D/deis/domains
rm --recursive D/deis/services/app
set D/deis/migrations/data/0001 done
ls D/deis --recursive
# flannel and Kubernetes guides
set D/coreos.com/network/config '{ "Network": "10.1.0.0/16", "Backend": {"Type": "vxlan"}}'
--no-sync -C URL get D/coreos.com/network/config
mk D/coreos.com/network/config '{"Network":"172.17.0.0/16"}'
--no-sync ls D/coreos.com/network --recursive
mkdir D/kube-centos/network
mk D/kube-centos/network/config '{ "Network": "172.30.0.0/16", "SubnetLen": 24 }'
rm --recursive D/registry
-C URL ls D/deis --recursive -p
# confd: its quick start; SkyDNS; Vulcand's sidekick; kontena's tests; APISIX' backup
set D/myapp/database/url db.example.com
set D/myapp/upstream/app1 "10.0.1.100:80"
ls -r -p D/myapp
get --quorum D/myapp/database/url
-C URL --no-sync set D/skydns/local/domain/h1 '{"host":"10.0.0.5"}'
set D/lb/http/api.example.com/upstreams/root/path / --ttl 60
rm --recursive D/kontena/haproxy/lb/services/service-b
# Salt's etcd_pillar
set D/salt-shared/mykey my_value
set D/salt-private/special_minion_id/mykey my_other_value
# scripts that set up users
user add Ual:secret
role add Ur1
role grant Ur1 -path '/*' -readwrite
user grant Ual -roles Ur1
role revoke Ur1 -path '/*' -write
role get Ur1
user remove Ual
role remove Ur1
# CoreOS' and other guides
mkdir D/here/you/go --ttl 120
updatedir D/here/you/go --ttl 500
-o json ls D/here/you
mk D/timedkey "It's going to expire in 30 sec" --ttl 30
-o extended get D/timedkey
set D/message "hello, etcd"
set --swap-with-value "hello, etcd" D/message "goodbye, etcd"
set D/message again --swap-with-value "hello, etcd"
mk --in-order D/queue job1
mk D/queue job2 --in-order
update D/message turtles --ttl 100
rm D/here --recursive
rm D/message --with-value no
rm D/message --with-value turtles
setdir D/hosts --ttl 30
get D/hosts
rmdir D/hosts
"""


def _ctl_in_front(words):
    """Return the line with its options, as far as `--`, in front of the arguments."""
    name = next(name for name in pyetcd_client._COMMANDS if f" {name} " in f" {' '.join(words)} ")
    start = words.index(name.split()[-1]) + 1
    first = next((n for n in range(start, len(words)) if words[n].startswith("-")), len(words))
    return words[:start] + words[first:] + words[start:first]


def test_ctl_lines_of_public_programs_side_by_side(_client_server):
    """Same exit code, output and errors as etcdctl; a listing in any order."""
    if shutil.which("etcdctl") is None:
        pytest.skip("etcdctl is not installed")
    theirs, ours = _CtlProgram(_client_server, "etcdctl"), _CtlProgram(_client_server, "pyetcdctl")
    for line in _CTL_PUBLIC.strip().split("\n"):
        words = shlex.split(line, comments=True)
        if words:
            wanted, got = theirs.run_words(_ctl_in_front(words)), ours.run_words(words)
            if "ls" in words:
                wanted, got = ([code, sorted(out.split("\n")), err] for code, out, err in (
                    wanted, got))
            assert got == wanted, line


# -- no word is ignored


@pytest.fixture(name="_ctl_seen")
def _ctl_seen_fixture(monkeypatch):
    """Every command notes what it was given, and does nothing else."""
    seen = []
    for name, command in list(pyetcd_client._COMMANDS.items()):
        monkeypatch.setitem(pyetcd_client._COMMANDS, name, command._replace(
            run=lambda run: seen.append(run)))
    yield seen


def _ctl_arguments(name):
    """Return as many arguments as a command takes, and what stands behind `--`."""
    if name in ("exec-watch", "completion"):
        return ["/a"], ["--", "sh", "--bogus"] if name == "exec-watch" else []
    most = pyetcd_client._COMMANDS[name].words()[1]
    return ["/a", "b", "c"][:most], []


_CTL_SAMPLES = {bool: [], int: ["17"], str: ["text"], float: ["3s"], list: ["text"]}
_CTL_NAMES = list(pyetcd_client._COMMANDS)


@pytest.mark.parametrize("name", _CTL_NAMES)
def test_ctl_every_option_counts_wherever_it_stands(_ctl_seen, name):
    """In front of the arguments, behind them, between them: each form, with one dash and two."""
    command, (arguments, behind) = pyetcd_client._COMMANDS[name], _ctl_arguments(name)
    for flag, dashes in itertools.product(command.flags, ("-", "--")):
        option = [dashes + flag.names[-1], *_CTL_SAMPLES[flag.kind]]
        lines = [[*arguments[:n], *option, *arguments[n:], *behind]
                 for n in range(len(arguments) + 1)]
        if option[1:]:
            lines.append([*arguments, "=".join(option), *behind])
        for line in lines:
            assert _client_main(*name.split(), *line) == (0, "", ""), line
            run = _ctl_seen.pop()
            assert list(run.options._values) == [flag.names[0]], line
            assert run.args == arguments + behind[1:]
            assert run.behind == (behind[1:] or None)


@pytest.mark.parametrize("name", _CTL_NAMES)
def test_ctl_no_command_runs_with_a_word_it_does_not_know(_ctl_seen, name):
    """An option that is none, wherever it stands; one word too many; a value that cannot be."""
    command, (arguments, behind) = pyetcd_client._COMMANDS[name], _ctl_arguments(name)
    for line in ([*arguments, "--bogus", *behind], ["--bogus", *arguments, *behind],
                 ["-x=1", *arguments, *behind], ["--endpoints", "http://x:1", *arguments, *behind]):
        if name == "completion":            # behind the first word it is somebody else's line
            continue
        code, out, err = _client_main(*name.split(), *line)
        assert code == (1 if command.own else 0), line
        assert out.startswith(f"Incorrect Usage.\n\nNAME:\n   pyetcdctl {name} - ")
        assert err.startswith(f"pyetcdctl {name}: there is no option ") and err.count("\n") == 1
        assert "stands before the command" in err or "http://x:1" not in line
    for flag in command.flags:
        for text in {bool: ["yes"], int: ["x", "1.5", "", "9" * 19], float: ["5", "x"]}.get(
                flag.kind, []):
            code, out, err = _client_main(*name.split(), f"--{flag.names[0]}={text}", *arguments)
            assert code == (1 if command.own else 0) and out.startswith("Incorrect Usage.\n")
            assert f'{flag.dashed} takes a' in err or f"{flag.dashed} takes true" in err
            assert f'not "{text}"' in err
        if flag.kind is not bool:
            _, out, err = _client_main(*name.split(), *arguments, flag.dashed)
            assert "needs a value behind it" in err
    if not behind and command.mixed:
        for line in ([*arguments, "extra"], [*arguments, "--", "extra"],
                     ["--", *arguments, "extra"], [*arguments, ""]):
            code, out, err = _client_main(*name.split(), *line)
            assert (code, out) == (1, "") and err.count("\n") == 1
            assert f'"{line[-1]}" is one word too many' in err or (
                not arguments and err == command.wrong + "\n")
    assert _ctl_seen == []


@pytest.mark.parametrize("name", _CTL_NAMES)
def test_ctl_every_output_format_is_used_or_refused(_ctl_seen, name):
    command, (arguments, behind) = pyetcd_client._COMMANDS[name], _ctl_arguments(name)
    for form in ("simple", "extended", "json", "xml"):
        code, out, err = _client_main("-o", form, *name.split(), *arguments, *behind)
        # etcdctl writes, then complains of a format that it does not know.
        if form in command.formats or (form == "xml" and len(command.formats) == 3):
            assert (code, out, err) == (0, "", "") and _ctl_seen.pop().output == form
        else:
            assert (code, out) == (1, "") and f"--output {form} is not possible here" in err
    assert _ctl_seen == []


@pytest.mark.parametrize("line, status, complaint", [
    ("set --ttl abc /k v", 0, 'pyetcdctl set: --ttl takes a whole number, not "abc"'),
    ("set --ttl 5s /k v", 0, 'pyetcdctl set: --ttl takes a whole number, not "5s"; did you mean '
                             "5?"),
    ("--timeout 5 get /k", 0, 'pyetcdctl: --timeout takes a time such as 500ms or 1m30s, not "5"; '
                              "did you mean 5s?"),
    ("set /k v --tll 5", 0, 'pyetcdctl set: there is no option "--tll"; did you mean --ttl?'),
    ("set /k -v", 0, 'pyetcdctl set: there is no option "-v" here: -v stands before the command'),
    ("set /k -x", 0, 'pyetcdctl set: there is no option "-x"; put -- in front of a value that '
                     "begins with a dash"),
    ("--ttl 5 set /k v", 0, 'pyetcdctl: there is no option "--ttl" here: --ttl stands behind the '
                            "command"),
    ("--endpoint", 0, "pyetcdctl: --endpoint needs a value behind it"),
    ("-o json --output json get /k", 0, "pyetcdctl: --output and -o are the same"),
    ("upadte /k v", 0, 'pyetcdctl: there is no command "upadte"; did you mean update?'),
    ("delete /k", 0, 'pyetcdctl: there is no command "delete"; did you mean rm?'),
    ("put /k v", 0, 'pyetcdctl: there is no command "put"; did you mean set?'),
    ("member lst", 0, 'pyetcdctl: there is no command "member lst"; did you mean list?'),
    ("user delete u", 0, 'pyetcdctl: there is no command "user delete"'),
    ("member --bogus list", 0, 'pyetcdctl: there is no option "--bogus"'),
    ("help nonsense", 0, 'pyetcdctl: there is no command "nonsense"'),
    ("help get put", 1, 'pyetcdctl help: "put" is one word too many'),
    ("set /k hello world", 1, 'pyetcdctl set: "world" is one word too many (a value with spaces '
                              "needs quotes); usage: pyetcdctl set [options] <key> [value]"),
    ("ls / /other", 1, 'pyetcdctl ls: "/other" is one word too many; usage: pyetcdctl ls [options] '
                       "[key]"),
    ("rm --with-value= /k", 1, "pyetcdctl: --with-value must not be empty"),
    ("set --swap-with-value= /k v", 1, "pyetcdctl: --swap-with-value must not be empty"),
    ("rm /k --with-index 0", 1, "pyetcdctl: --with-index is 1 or more"),
    ("set /k v --swap-with-index -1", 1, "pyetcdctl: --swap-with-index is 1 or more"),
    ("watch /k --after-index -2", 1, "pyetcdctl: --after-index is 0 or more"),
    ("bench --total x", 1, 'pyetcdctl bench: --total takes a whole number, not "x"'),
    ("bench --total 0", 1, "pyetcdctl: --total is 1 or more"),
    ("--no-sync bench put --reads 50", 1, "pyetcdctl: --reads has no effect with put"),
    ("top --interval 0s", 1, "pyetcdctl: --interval is 0.001 or more"),
    ("tree / --valeus", 1, 'pyetcdctl tree: there is no option "--valeus"; did you mean --values?'),
    ("import - --hidden /_h", 1, "pyetcdctl: --hidden has no effect without --snap"),
    ("import --snap f --keep", 1, "pyetcdctl: --keep has no effect with --snap"),
    ("import --snap f g", 1, 'pyetcdctl import: "g" has no effect with --snap'),
    ("-o json --no-sync ls / -p", 1, "pyetcdctl: -p has no effect with --output json"),
    ("--no-sync true get /k", 0, 'pyetcdctl: there is no command "true"; a switch takes true '
                                 "behind ="),
    ("get /k --quorum false", 1, 'pyetcdctl get: "false" is one word too many (a switch takes '
                                 "false behind =); usage: pyetcdctl get [options] <key>"),
    ("GTE /k", 0, 'pyetcdctl: there is no command "GTE"; did you mean get?'),
    ("Delete /k", 0, 'pyetcdctl: there is no command "Delete"; did you mean rm?'),
    *((f"{line} EMPTY", 1, complaint) for line, complaint in (
        ("user get", "Please provide a username"), ("user remove", "Please provide a username"),
        ("role get", "Please provide a role name"), ("role add", "Please provide a role name"),
        ("member remove", "Provide a single member ID"),
        ("mirror", "Provide the endpoints of the target, comma between"),
        ("export --hidden", "pyetcdctl: --hidden must not be empty"),
        ("bench --prefix", "pyetcdctl: --prefix must not be empty"),
        ("import - --dest-prefix", "pyetcdctl: --dest-prefix must not be empty"),
        ("user grant u --roles", "pyetcdctl: --roles must not be empty"))),
    ("user add :pw", 1, "Please provide a username"),
    ("user get .", 1, "Please provide a username"),
    ("role get ..", 1, "Please provide a role name"),
    ("member add EMPTY http://h:1", 1, "Provide a name and a single member peerURL"),
    ("member add a,b http://h:1", 1, 'the name "a,b" cannot stand in ETCD_INITIAL_CLUSTER, where = '
                                     "and , separate names and URLs: choose another"),
    ("mirror http://h:1 --dest-key k", 1,
     "pyetcdctl: the key k is of no use without --dest-cert"),
    ("--key-file k --no-sync get /k", 1, "pyetcdctl: the key k is of no use without --cert-file"),
])
def test_ctl_says_what_is_wrong_with_a_line(line, status, complaint):
    """On stderr; the exit code is that of etcdctl 2.3.8, and 1 for what only pyetcdctl refuses."""
    dead = "" if "endpoint" in line else f"--endpoints {_client_dead_url()} "
    words = (dead + line).replace("= ", "=").split(" ") if "= " not in line else [
        *dead.split(), *line.split(" ")]
    code, out, err = _client_main(*("" if word == "EMPTY" else word for word in words))
    assert (code, err) == (status, complaint + "\n")
    assert not status or out.startswith("Incorrect Usage.") or out == ""


@pytest.mark.parametrize("line, told", [
    ("set --ttl 60 K v --ttl 70", "pyetcdctl: --ttl is given twice: only the last counts\n"),
    ("-o json -o simple set K v", ""),
    ("set --ttl 60 K v --ttl=60", ""),
    ("--cert-file EMPTY set K v", "pyetcdctl: --cert-file is empty, as if it were not there\n"),
])
def test_ctl_tells_of_an_option_that_does_not_count(_client_server, _client_dir, line, told):
    """2.3.8 takes the last one, and an empty text for none, without a word."""
    words = [{"K": _client_dir + "/k", "EMPTY": ""}.get(word, word) for word in line.split()]
    assert _client_main("--endpoints", _client_server.url, *words) == (0, "v\n", told)


@pytest.mark.parametrize("url, advice", [
    ("::1:21379", "; an IPv6 address needs brackets"), ("http://::1:1", "; an IPv6 address needs"),
    ("'http://h:1'", "; the quotes are part of it"), ("\u201chttp://h:1\u201d", "; the quotes are"),
    ("http://h:1,", "; it is empty, or there is a comma too many"), ("http://h:", ""),
    ("http://${IP}:1", "; a variable or placeholder"), ("http://a:1 http://b:1", "; separate"),
    ("http://a b:1", "; separate endpoints by commas"), ("http://[::g]:1", ""),
    ("http://[::1]x:1", ""), ("http://x[::1]:1", ""), ("http://[::1]]:1", ""),
])
def test_ctl_says_what_is_wrong_with_an_endpoint(url, advice):
    for words in (["get", "/k"], ["member", "list"], ["export"]):
        code, out, err = _client_main("--endpoints", url, *words)
        assert (code, out) == (1, "") and err.count("\n") == 1
        assert " is not http://HOST:PORT or https://HOST:PORT" + advice in err, err


def test_ctl_numbers_and_times_are_those_of_go():
    assert pyetcd_client._parse_integer("-9223372036854775808") == -1 << 63
    assert pyetcd_client._parse_duration("5\u03bcs") == pyetcd_client._parse_duration("5\u00b5s")
    for text in ("9223372036854775808", "-9223372036854775809", "1_0", " 5", "\u0665"):
        with pytest.raises(ValueError):
            pyetcd_client._parse_integer(text)


def test_ctl_options_behind_arguments_do_what_they_say(_client_server, _client, _client_dir):
    """The lines that were misread: what they say happens, or nothing does."""
    run = functools.partial(_client_main, "--endpoints", _client_server.url)
    key = _client_dir + "/k"
    for line in (["set", key, "up", "--ttl", "60"], ["set", key, "--ttl", "60", "up"],
                 ["set", "--ttl=60", key, "up"], ["set", key, "up", "-ttl", "0x3c"]):
        assert run(*line) == (0, "up\n", "") and 50 < _client.get(key).ttl <= 60, line
    assert run("rm", key, "--with-value", "x")[0] == 4 and _client.get(key).value == "up"
    assert run("set", key, "new", "--bogus")[0] == 0 and _client.get(key).value == "up"
    assert run("set", key, "two", "words")[0] == 1 and _client.get(key).value == "up"
    assert run("rm", key, key + "2")[0] == 1 and _client.get(key).value == "up"
    assert run("set", key, "--ttl", "5", stdin=b"text") == (0, "text\n", "")
    for value, line in (("--ttl", ["--", "--ttl"]), ("-5", ["-5"]), ("-", ["-"]), ("", [""])):
        assert run("set", key, *line) == (0, value + "\n", "")
        assert _client.get(key).value == value and _client.get(key).ttl is None
    _client.set(_client_dir + "/d/e", "1")
    assert run("ls", _client_dir + "/d", "--recursive", "-p") == (0, _client_dir + "/d/e\n", "")
    assert run("export", _client_dir + "/d", "--format", "text")[1].endswith("/d/e\t1\n")
    assert run("bench", "put", "--total", "7")[1].startswith("put: 7 requests")
    assert run("rm", _client_dir + "/d", "--recursive")[0] == 0
    assert run("rm", "--recursive", "--with-value", "x", _client_dir)[0] == 4   # not a file
    assert _client.get(key).value == ""


def test_ctl_ttl_of_nothing_or_less_is_for_ever(_client_server, _client, _client_dir):
    """As in 2.3.8, which leaves it out."""
    run = functools.partial(_client_main, "--endpoints", _client_server.url)
    for verb, ttl in itertools.product(("set", "update", "mk", "setdir"), ("-1", "0", "-60")):
        key = f"{_client_dir}/{verb}{ttl}"
        if verb == "update":
            _client.set(key, "x", ttl=100)
        value = [] if verb == "setdir" else ["v"]
        assert run(verb, "--ttl", ttl, key, *value)[0] == 0
        assert _client.get(key).ttl is None


def test_ctl_exec_watch_takes_options_on_both_sides(_client_server, _client, _client_dir):
    """Behind `--` they are the command's."""
    with _ctl_process(_client_server.url, "exec-watch", _client_dir, "--recursive", "--", "sh",
                      "-c", "echo $ETCD_WATCH_KEY $1", "sh", "--recursive") as process:
        eventually(lambda: _client.statistics("store")["watchers"] == 1, what="a watcher")
        _client.set(_client_dir + "/a", "1")
        assert _ctl_lines_from(process, 1) == [f"{_client_dir}/a --recursive"]
        assert _ctl_interrupt(process) == (0, "", "")
    for line in (["exec-watch", "/k", "surplus", "--", "true"], ["exec-watch", "/k", "--"]):
        assert _client_main("--endpoints", _client_server.url, *line) == (
            1, "", "Error:  key and command to exec required\n")


@pytest.mark.parametrize("line", ["set KEY", "update KEY", "mk --in-order KEY"])
def test_ctl_refuses_values_that_would_not_come_back(_client_server, _client, _client_dir, line):
    """etcd v2 stores text; a zero byte is text, and comes back."""
    _client.set(_client_dir + "/k", "before")
    words = [word.replace("KEY", _client_dir + "/k") for word in line.split()]
    run = functools.partial(_client_main, "--endpoints", _client_server.url)
    for stdin in (b"a\0\xffb", b"\xff", "ü".encode("latin-1"), b"\xed\xa0\x80"):
        code, out, err = run(*words, stdin=stdin)
        assert (code, out) == (1, "") and "the value on stdin is not UTF-8" in err
    code, out, err = run(*words, "a\udcff")
    assert (code, out) == (1, "") and 'is not UTF-8' in err and err.count("\n") == 1
    assert run(words[0], _client_dir + "/\udcff", "v")[0] == 1
    assert run("rm", "--with-value", "\udcff", _client_dir + "/k")[0] == 1
    assert _client.get(_client_dir + "/k").value == "before"
    assert run("set", _client_dir + "/k", stdin="a\0ü".encode())[0] == 0
    assert _client.get(_client_dir + "/k").value == "a\0ü"


# -- which server, and how it is shown


def test_ctl_tells_when_another_endpoint_answers(_client_server, monkeypatch):
    """With --no-sync and without; not if it is the first, nor if nobody answers."""
    dead = _client_dead_url()
    told = f"pyetcdctl: answered by {_client_server.url}, not by {dead}\n"
    for line in (["ls", "/"], ["--no-sync", "ls", "/"], ["cluster-health"], ["member", "list"]):
        for urls, complaint in (([dead, _client_server.url], told),
                                ([_client_server.url, dead], "")):
            code, _, err = _client_main("--endpoints", ",".join(urls), *line)
            assert (code, err) == (0, complaint), line
    assert "answered by" not in _client_main("--endpoints", f"{dead},{dead}", "ls")[2]
    monkeypatch.setattr(pyetcd_client, "CLI_ENDPOINTS", f"{dead},{_client_server.url}")
    monkeypatch.delenv("ETCDCTL_ENDPOINTS", raising=False)
    assert _client_main("ls", "/")[2] == told       # the discovery service, perhaps


def test_ctl_tells_which_option_is_not_used(monkeypatch):
    """Some variables are stronger than some options in 2.3.8."""
    with _ClientRawServer(_CLIENT_GOOD) as server:
        monkeypatch.setenv("ETCDCTL_ENDPOINTS", server.url)
        assert _client_main("-C", "http://x:1", "--no-sync", "get", "k") == (
            0, "v\n", "pyetcdctl: --peers is not used: ETCDCTL_ENDPOINTS is stronger\n")
        assert _client_main("-C", server.url, "--no-sync", "get", "k") == (0, "v\n", "")
        assert _client_main("--endpoints", server.url, "--endpoint", "http://x:1", "--no-sync",
                            "get", "k")[2] == (
            "pyetcdctl: --endpoint is not used: --endpoints is stronger\n")


@pytest.mark.parametrize("asked, removed", [
    ("n0", "a1"), ("a1", "a1"), ("b2", "b2"), ("twin", None), ("nobody", None)])
def test_ctl_member_remove_takes_an_id_or_a_name(asked, removed):
    """An id is stronger; a name that two members have is none."""
    member = {"peerURLs": [_CTL_A], "clientURLs": []}
    listing = _client_reply({"members": [
        {"id": id, "name": name, **member} for id, name in (
            ("a1", "n0"), ("b2", "a1"), ("c3", "twin"), ("d4", "twin"))]})
    with _ClientRawServer(listing, _CTL_DONE) as server:
        code, out, err = _client_main(
            "--no-sync", "--endpoints", server.url, "member", "remove", asked)
        deleted = [path for method, path, *_ in server.requests if method == "DELETE"]
    if removed:
        assert (code, out, err) == (0, f"Removed member {removed} from cluster\n", "")
        assert deleted == [f"/v2/members/{removed}"]
    else:
        assert code == 1 and deleted == [] and ("c3, d4" in err) == (asked == "twin")


def test_ctl_json_of_members_users_and_roles(_client_server, _client):
    run = functools.partial(_client_main, "--endpoints", _client_server.url, "-o", "json")
    member = json.loads(run("member", "list")[1])["members"][0]
    assert member["isLeader"] is True and member["clientURLs"] == [_client_server.url]
    run("user", "add", "x")
    role = _client_reply({"role": "r", "permissions": {"kv": {"read": ["/a"], "write": []}}})
    for line, answer, shown in (
            ("user list", {"users": [{"user": "u", "roles": []}]}, {"users": ["u"]}),
            ("role list", {"roles": [{"role": "r"}]}, {"roles": ["r"]}),
            ("user get u", {"user": "u", "roles": ["r"]}, {"user": "u", "roles": ["r"]})):
        with _ClientRawServer(_client_reply(answer)) as server:
            code, out, err = _client_main(
                "--no-sync", "--endpoints", server.url, "-o", "json", *line.split())
        assert (code, json.loads(out), err) == (0, shown, "")
    with _ClientRawServer(role) as server:
        out = _client_main("--no-sync", "--endpoints", server.url, "-o", "json", "role", "get",
                           "r")[1]
    assert json.loads(out)["permissions"]["kv"]["read"] == ["/a"]


def _ctl_on_a_terminal(url, *words, **environment):
    """Return what a command prints on a terminal, less than that keeps."""
    controller, terminal = pty.openpty()
    try:
        with pytest.MonkeyPatch.context() as patch, open(terminal, "w") as stdout, \
                open(os.devnull) as stdin, contextlib.redirect_stderr(io.StringIO()) as errors:
            for name, value in {"TERM": "xterm", "NO_COLOR": "", **environment}.items():
                patch.setenv(name, value)
            patch.setattr(sys, "stdout", stdout)
            patch.setattr(sys, "stdin", stdin)
            assert pyetcd_client.main(["--endpoints", url, *words]) == 0
            assert errors.getvalue() == ""
        shown = b""
        with contextlib.suppress(OSError):          # EIO: all was read
            while True:
                shown += os.read(controller, 4096)
        return shown.decode().replace("\r\n", "\n")
    finally:
        os.close(controller)


@pytest.mark.parametrize("line, coloured", [
    ("ls --sort DIR", "\x1b[1;34mDIR/d\x1b[0m\nDIR/e\\u001b[31m\n"),
    ("tree --ascii DIR", "DIR/\n|-- \x1b[1;34md\x1b[0m/\n|   `-- x\n`-- e\\u001b[31m\n\n"
                         "1 directories, 2 keys\n"),
    ("member list", "\x1b[32mID: name=NAME peerURLs=PEER clientURLs=URL isLeader=true\x1b[0m\n"),
    ("cluster-health", "member ID is \x1b[32mhealthy\x1b[0m: got healthy result from URL\n"
                       "cluster is \x1b[32mhealthy\x1b[0m\n"),
], ids=["ls", "tree", "member-list", "cluster-health"])
def test_ctl_colours_are_for_terminals(_client_server, _client, _client_dir, line, coloured):
    """Not with NO_COLOR, not on a dumb terminal, not in a pipe; a key cannot command the terminal.
    """
    _client.set(_client_dir + "/d/x", "1"), _client.set(_client_dir + "/e\x1b[31m", "2")
    member = _client.member_list()[0]
    for name, text in (("DIR", _client_dir), ("ID", member.id), ("NAME", member.name),
                       ("PEER", member.peer_urls[0]), ("URL", _client_server.url)):
        coloured = re.sub(rf"\b{name}\b|(?<=m){name}\b", text, coloured)
        line = line.replace(name, text)
    plain = re.sub("\x1b\\[[0-9;]*m", "", coloured)
    show = functools.partial(_ctl_on_a_terminal, _client_server.url, *line.split())
    assert (show(), show(NO_COLOR="1"), show(TERM="dumb")) == (coloured, plain, plain)
    piped = _client_main("--endpoints", _client_server.url, *line.split())[1]
    assert piped.replace("\x1b", "\\u001b") == plain


def test_ctl_members_stand_in_columns_on_a_terminal(monkeypatch):
    members = {"members": [
        {"id": "a1", "name": "longer", "peerURLs": [_CTL_A], "clientURLs": [_CTL_A]},
        {"id": "b2c3", "name": "", "peerURLs": [_CTL_A, _CTL_B], "clientURLs": []},
        {"id": "d4", "name": "m", "peerURLs": [_CTL_A, _CTL_B], "clientURLs": [_CTL_A]}]}
    with _CtlAnswering(lambda path: members if path.endswith("members") else {
            "id": "a1", "name": "longer"}) as server:
        shown = _ctl_on_a_terminal(server.url, "--no-sync", "member", "list", NO_COLOR="x")
    lines = shown.splitlines()
    assert {line.index("peerURLs=") for line in lines} == {lines[0].index("peerURLs=")}
    assert lines[0].index("clientURLs=") == lines[2].index("clientURLs=")


@pytest.mark.parametrize("how", ["-m", "file", "script"])
def test_ctl_without_requests_says_how_to_get_it(tmp_path, how):
    """In one line; a program that imports the client gets the ImportError."""
    (tmp_path / "requests.py").write_text("raise ImportError('No module named requests')\n")
    (tmp_path / "pyetcdctl").write_text("import pyetcd_client\n")
    client = Path(pyetcd_client.__file__)
    arguments = {"-m": ["-m", "pyetcd_client"], "file": [str(client)],
                 "script": [str(tmp_path / "pyetcdctl")]}[how]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{client.parent}"}
    done = subprocess.run([sys.executable, *arguments, "ls"], env=environment, capture_output=True,
                          text=True, timeout=_CLIENT_WAIT_S, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1 and "pip install requests" in done.stderr
    other = subprocess.run([sys.executable, "-c", "import pyetcd_client"], env=environment,
                           capture_output=True, text=True, timeout=_CLIENT_WAIT_S, check=False)
    assert "ImportError: No module named requests" in other.stderr


_CTL_A, _CTL_B = "http://127.0.0.1:32001", "http://127.0.0.1:32002"
_CTL_MEMBERS = _client_reply({"members": [
    {"id": "a1", "name": "n0", "peerURLs": [_CTL_A, _CTL_B], "clientURLs": [_CTL_A]},
    {"id": "b2", "name": "", "peerURLs": [_CTL_B], "clientURLs": []}]})
_CTL_ADDED = _client_reply({"id": "b2", "name": "", "peerURLs": [_CTL_B], "clientURLs": []}, 201)
_CTL_DONE = _client_reply(b"", 204)
_CTL_GONE = _client_reply({"message": "Member permanently removed: a1"}, 410)


@pytest.mark.parametrize("line, replies", [
    (f"member add new {_CTL_B}", (_CTL_ADDED, _CTL_MEMBERS)),
    (f"member add new {_CTL_B}", (_client_reply({"message": "x exists"}, 409),)),
    ("member list", (_CTL_MEMBERS, _client_reply({"id": "a1", "name": "n0"}))),
    ("member list", (_CTL_MEMBERS, _client_reply({"message": "in an election"}, 503))),
    ("member remove a1", (_CTL_MEMBERS, _CTL_DONE)),
    ("member remove a1", (_CTL_MEMBERS, _CTL_GONE)),
    (f"member update b2 {_CTL_A},{_CTL_B}", (_CTL_DONE,)),
    (f"member update b2 {_CTL_A}", (_CTL_GONE,)),
    ("cluster-health", (_CTL_MEMBERS,)),
], ids=["add", "add-refused", "list", "list-no-leader", "remove", "remove-refused", "update",
        "update-refused", "health"])
def test_ctl_member_changes_side_by_side(line, replies):
    """Two servers with the same answers get the same requests and cause the same output."""
    if shutil.which("etcdctl") is None:
        pytest.skip("etcdctl is not installed")
    words = ["--no-sync", *line.split()]
    with _ClientRawServer(*replies) as server:
        theirs = *_client_etcdctl(server.url, *words), [request[:2] for request in server.requests]
    with _ClientRawServer(*replies) as server:
        ours = *_client_main("--endpoints", server.url, *words), [
            request[:2] for request in server.requests]
    code, out, *rest = theirs
    out = re.sub("Get .*?: ", "", out).replace("is unavailable", "is unhealthy")    # words of 3.4
    if b"an election" in replies[-1]:       # not an error to us: nobody leads
        code, out, rest[0] = 0, ours[1], ""
        assert "isLeader=false" in out
    assert ours == (code, out, *rest)


@contextlib.contextmanager
def _ctl_process(url, *words, program="pyetcdctl", **options):
    """Run the command line in a process of its own, which ends with the block."""
    command = ["etcdctl"]
    if program == "pyetcdctl":
        command = [sys.executable, compiled(pyetcd_client)]
    with subprocess.Popen(
            [*command, "--endpoints", url, *words], **{
                "env": {**os.environ, "ETCDCTL_API": "2"}, "stdout": subprocess.PIPE,
                "stderr": subprocess.PIPE, **options}) as process:
        try:
            yield process
        finally:
            process.kill()                          # nothing if it was waited for


def _ctl_lines_from(process, count, stream="stdout"):
    """Return the next lines that a process prints; it is killed if they do not come."""
    guard = threading.Timer(_CLIENT_WAIT_S, process.kill)
    guard.start()
    try:
        return [getattr(process, stream).readline().decode().rstrip("\n") for _ in range(count)]
    finally:
        guard.cancel()


def _ctl_interrupt(process):
    """Send SIGINT; return exit code, the rest of the output, and errors."""
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=_CLIENT_WAIT_S)
    return process.returncode, out.decode(), err.decode()


@pytest.fixture(params=["etcdctl", "pyetcdctl"], name="_ctl_program")
def _ctl_program_fixture(request):
    if shutil.which(request.param) is None and request.param == "etcdctl":
        pytest.skip("etcdctl is not installed")
    return request.param


def test_ctl_exec_watch_starts_a_command_for_each_change(
        _client_server, _client, _client_dir, _ctl_program):
    """With the change in its environment; not for directories; SIGINT is no failure."""
    script = "echo $ETCD_WATCH_ACTION $ETCD_WATCH_KEY $ETCD_WATCH_VALUE $1" \
             " Index: $ETCD_WATCH_MODIFIED_INDEX"
    with _ctl_process(_client_server.url, "exec-watch", "--recursive", _client_dir, "--", "sh",
                      "-c", script, "sh", "argument", program=_ctl_program) as process:
        eventually(lambda: _client.statistics("store")["watchers"] == 1, what="a watcher")
        first = _client.set(_client_dir + "/a", "1").modified_index
        lines = _ctl_lines_from(process, 1)
        _client.mkdir(_client_dir + "/d"), _client.set(_client_dir + "/b", "2")
        lines += _ctl_lines_from(process, 1)
        outcome = _ctl_interrupt(process)
    assert lines == [f"set {_client_dir}/a 1 argument Index: {first}",
                     f"set {_client_dir}/b 2 argument Index: {first + 2}"]
    assert outcome == (0, "", f"Ignored dir {_client_dir}/d change\n")


def test_ctl_exec_watch_begins_after_an_index(_client_server, _client, _client_dir):
    """With the first change after it; etcdctl leaves out one, and takes the last word for a key."""
    start = _client.set(_client_dir + "/a", "1").modified_index
    with _ctl_process(
            _client_server.url, "exec-watch", "--recursive", "--after-index", str(start - 1),
            _client_dir, "--", "sh", "-c", "echo $ETCD_WATCH_KEY $1", "sh", "x") as process:
        assert _ctl_lines_from(process, 1) == [f"{_client_dir}/a x"]
        assert _ctl_interrupt(process) == (0, "", "")


def test_ctl_exec_watch_of_a_program_that_is_not_there(_client_server, _client, _client_dir):
    start = _client.set(_client_dir, "1").modified_index
    words = ["exec-watch", "--after-index", str(start - 1)]
    for rest in ([_client_dir, "--", "/no/such"], ["/no/such", _client_dir]):
        code, _, err = _client_main("--endpoints", _client_server.url, *words, *rest)
        assert (code, err) == (1, "/no/such: No such file or directory\n")


def test_ctl_cluster_health_forever_ends_with_sigint(_client_server, _ctl_program):
    with _ctl_process(
            _client_server.url, "cluster-health", "-forever", program=_ctl_program) as process:
        lines = _ctl_lines_from(process, 5)
        outcome = _ctl_interrupt(process)
    assert [re.sub(r" [0-9a-f]{10,} ", " ID ", line) for line in lines] == [
        f"member ID is healthy: got healthy result from {_client_server.url}",
        "cluster is healthy", "", "next check after 10 second...", ""]
    assert outcome == (0, "", "")


def test_ctl_settings_come_from_flags_then_environment(monkeypatch, tmp_path):
    """ETCDCTL_* variables of certificates, user and SRV domain; a flag is stronger."""
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "c", "k"):
        (tmp_path / name).touch()
    for name, value in (("CERT_FILE", "c"), ("KEY_FILE", "k"), ("CA_FILE", "a"),
                        ("USERNAME", "u:p:q"), ("DISCOVERY_SRV", "example.com")):
        monkeypatch.setenv(f"ETCDCTL_{name}", value)
    flags = pyetcd_client._GLOBAL_FLAGS
    given, _ = pyetcd_client._parse_flags(["--ca-file", "b", "--timeout", "3s"], flags)
    access = pyetcd_client._Access.from_settings(given)
    assert access.options == {
        "cert": ("c", "k"), "ca_cert": "b", "username": "u", "password": "p:q",
        "connect_timeout": 3.0, "read_timeout": 3.0, "total_timeout": 5.0, "retry": False}
    made = []
    monkeypatch.setattr(pyetcd_client, "Client", lambda **options: made.append(options))
    pyetcd_client._given_client(given, access)
    assert made[0]["srv_domain"] == "example.com" and "endpoints" not in made[0]
    monkeypatch.setenv("ETCDCTL_USERNAME", "u")
    monkeypatch.setenv("ETCDCTL_PASSWORD", "x")
    assert pyetcd_client._Access.from_settings(given).options["password"] == "x"
    other = pyetcd_client._Access.from_settings(given, environment=False)
    assert (other.options["cert"], other.options["username"]) == (None, None)


def test_ctl_endpoints_come_from_srv_records(monkeypatch):
    """_etcd-client-ssl first, then _etcd-client; a domain without them is an error."""
    asked = []
    with _ClientRawServer(_CLIENT_GOOD) as server:
        zone = {"_etcd-client._tcp.example.com": [server.url[7:]]}
        monkeypatch.setattr(
            pyetcd_client, "_lookup_srv",
            lambda name, deadline: asked.append(name) or zone.get(name, []))
        assert _client_main("--no-sync", "-D", "example.com", "get", "k") == (0, "v\n", "")
    assert asked == ["_etcd-client-ssl._tcp.example.com", "_etcd-client._tcp.example.com"]
    code, _, err = _client_main("-D", "example.org", "get", "k")
    assert code == 2 and "error #0: there are no SRV records for etcd in example.org\n" in err


def test_ctl_does_not_go_from_https_to_published_http(monkeypatch):
    """The password would travel in clear."""
    members = [pyetcd_client.Member(id="a", name="m", peer_urls=(), client_urls=(
        "http://127.0.0.1:32001", *extra)) for extra in ([], ["https://127.0.0.1:32002"])]
    given = pyetcd_client._parse_flags(
        ["--endpoints", "https://127.0.0.1:32003"], pyetcd_client._GLOBAL_FLAGS)[0]
    access = pyetcd_client._Access.from_settings(given)
    monkeypatch.setattr(Client, "member_list", lambda _: members[1:])
    client = pyetcd_client._synced_client(given, access)
    assert client.endpoints.urls == ("https://127.0.0.1:32002",)
    monkeypatch.setattr(Client, "member_list", lambda _: members[:1])
    with pytest.raises(pyetcd_client._ExitError, match="no published client endpoints"):
        pyetcd_client._synced_client(given, access)


@pytest.mark.parametrize("line", ["user add x:y", "role add x", "user list", "auth enable"])
def test_ctl_failing_servers_are_one_line_to_users_and_roles(line):
    with _ClientRawServer(_CLIENT_TIMED_OUT) as server:
        assert _client_main("--no-sync", "--endpoints", server.url, *line.split()) == (
            1, "", "client: etcd cluster is unavailable or misconfigured\n")


def test_ctl_password_is_read_without_echo_on_a_terminal(monkeypatch):
    stdin = _ClientCaptured().stream
    monkeypatch.setattr(stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stdin", stdin)
    monkeypatch.setattr(pyetcd_client.getpass, "getpass", lambda prompt: f"<{prompt}>")
    assert pyetcd_client._split_user("al", "Password: ") == ("al", "<Password: >")


def test_ctl_backup_makes_a_data_directory(tmp_path):
    """By the server's module; what it refuses is one line and exit code 1."""
    with pyetcd.Server(data_dir=str(tmp_path / "d")) as server, Client(
            server.client_urls[0]) as client:
        client.set("/a", "1")
    words = ["backup", "--data-dir", str(tmp_path / "d"), "--backup-dir", str(tmp_path / "b")]
    assert _client_main(*words) == (0, "", "")
    source, copy = (pyetcd.read_source(str(tmp_path / name)) for name in "db")
    assert copy.last == source.last and copy.member_id != source.member_id
    code, out, err = _client_main(*words)
    assert (code, out) == (1, "") and "is not empty" in err
    assert _client_main("backup")[::2] == (1, "backup needs --data-dir and --backup-dir\n")


def test_ctl_backup_without_the_server_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyetcd", None)
    code, _, err = _client_main("backup", "--data-dir", "x", "--backup-dir", "y")
    assert code == 1 and "put pyetcd.py beside pyetcd_client.py" in err


def _ctl_server_of_tree(url, directory):
    """Return the tree as {key: value, None for a directory}, without `directory` in the keys."""
    with Client(url) as client:
        try:
            nodes = client.get(directory, recursive=True).node.walk()
        except pyetcd_client.KeyNotFound:
            return {}
        return {node.key[len(directory):]: node.value for node in nodes}


@pytest.mark.parametrize("envelope", [False, True], ids=["store", "file"])
def test_ctl_import_of_a_snapshot_of_etcd_0_4(_client_server, _client_dir, tmp_path, envelope):
    """Files without hidden ones, except those asked for; short lives become 300 s."""
    def node(value=None, left_s=None, **children):
        at = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=left_s or 0)
        return {"Value": value or "", "Children": children if value is None else None,
                "ExpireTime": at.isoformat().replace("+00:00", "000Z") if left_s
                else "0001-01-01T00:00:00Z"}

    top = _client_dir[1:]
    state = json.dumps({"Root": node(**{top: node(
        a=node("1"), d=node(b=node("2", 20), c=node("ü", 900)), old=node("x", -5),
        _h=node(s=node("3")), _other=node("4"))})})
    outer = {"state": base64.b64encode(state.encode()).decode(), "lastIndex": 7}
    path = tmp_path / "snap"
    path.write_text(f"0a0b0c0d\n{json.dumps(outer)}" if envelope else state, encoding="utf-8")
    got = _client_main("--endpoints", _client_server.url, "import", "--snap", str(path), "-c", "3",
                       "--hidden", f"{_client_dir}/_h")
    assert got == (0, f"starting to import snapshot {path} with 3 clients\n"
                      "finished importing 4 keys\n", "")
    tree = _ctl_server_of_tree(_client_server.url, _client_dir)
    assert tree == {"/a": "1", "/d": None, "/d/b": "2", "/d/c": "ü"}
    with Client(_client_server.url) as client:
        assert client.get(_client_dir + "/_h/s").value == "3"
        assert 290 <= client.get(_client_dir + "/d/b").ttl <= 300
        assert 890 <= client.get(_client_dir + "/d/c").ttl <= 900


@pytest.mark.parametrize("content", ["", "x", "[]", "{}", '{"Root": {"Children": {"a": 1}}}'])
def test_ctl_import_refuses_what_is_no_snapshot(tmp_path, content):
    path = tmp_path / "snap"
    path.write_text(content)
    code, out, err = _client_main("import", "--snap", str(path))
    assert (code, out) == (1, "") and err.startswith(f"{path} is no snapshot of etcd 0.4 (")
    assert _client_main("import", "--snap", "/no/such")[::2] == (
        1, "cannot read snapshot file /no/such\n")


# -- export, import, mirror, tree


_CTL_TEXTS = st.text(max_size=12)   # hypothesis makes no surrogates here
_CTL_KEYS = st.lists(
    _CTL_TEXTS.map(lambda text: text.replace("/", "") or "x"), min_size=1, max_size=3,
).map(lambda parts: "/" + "/".join(parts))


@given(st.lists(st.builds(
    pyetcd_client._Record, _CTL_KEYS, st.none() | _CTL_TEXTS,
    st.none() | st.just("2026-11-27T15:30:00.123456789Z")), max_size=5))
@settings(max_examples=30, deadline=None)
def test_ctl_records_survive_both_forms(records):
    """Any keys and values come back from a line each; a line has no control characters."""
    text = "\n".join(["# comment", *(record.line() for record in records), ""])
    assert pyetcd_client._parse_export(text) == records
    assert pyetcd_client._parse_export(text.replace("\n", "\r\n")) == records
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]", text)
    raw = '{"nodes": [' + ",".join(record.json() for record in records) + "]}"
    assert pyetcd_client._parse_export(raw) == records


_CTL_TREE = {
    "/a": "1", "/empty": "", "/lines": "one\ntwo\r\n\ttab \\ \\n end", "/ü ö": "ä\u2028\x00\x7f",
    "/d": None, "/d/x": "{\"json\": [1]}", "/d/none": None, "/ttl": "soon", "/lease": None,
    "/lease/k": "v",
}


def _ctl_plant(client, directory):
    for key, value in _CTL_TREE.items():
        if value is None:
            client.mkdir(directory + key, ttl=400 if key == "/lease" else None)
        else:
            client.set(directory + key, value, ttl=500 if key == "/ttl" else None)


@pytest.mark.parametrize("form", ["json", "text"])
def test_ctl_import_restores_what_export_printed(
        _client_server, _client, _client_dir, tmp_path, form):
    """Values of any text, empty directories and times to live; a second export is the same."""
    _ctl_plant(_client, _client_dir + "/from")
    run = functools.partial(_client_main, "--endpoints", _client_server.url)
    code, exported, err = run("export", "--format", form, _client_dir + "/from")
    assert (code, err) == (0, "")
    assert run("export", "--format", form, _client_dir + "/from")[1] == exported or form == "json"
    path = tmp_path / "tree"
    path.write_bytes(exported.encode())
    moved = ["--prefix", _client_dir + "/from", "--dest-prefix", _client_dir + "/to"]
    assert run("import", "--dry-run", *moved, str(path))[1].count("\n") == len(_CTL_TREE) + 1
    assert run("import", *moved, str(path)) == (0, "imported 7 keys\n", "")
    assert _ctl_server_of_tree(_client_server.url, _client_dir + "/to") == _CTL_TREE
    nodes = {node.key: node for node in _client.ls(_client_dir + "/to", recursive=True)}
    left = {key[len(_client_dir):]: node.ttl for key, node in nodes.items() if node.ttl}
    assert set(left) == {"/to/ttl", "/to/lease"}
    assert 490 <= left["/to/ttl"] <= 501 and 390 <= left["/to/lease"] <= 401
    _client.set(_client_dir + "/to/a", "mine")
    assert run("import", "--keep", "-c", "2", *moved, "-", stdin=exported.encode()) == (
        0, "imported 0 keys; 7 existed and were kept\n", "")
    assert _client.get(_client_dir + "/to/a").value == "mine"
    assert run("import", *moved, str(path))[0] == 0         # and directories are there already


def test_ctl_export_as_text_is_a_line_a_key(_client_server, _client, _client_dir):
    """Sorted, without indexes: two exports differ in the lines whose keys differ."""
    _ctl_plant(_client, _client_dir)
    _client.set(_client_dir + "/_hidden/x", "h")
    run = functools.partial(_client_main, "--endpoints", _client_server.url, "export", "--format")
    lines = run("text", _client_dir)[1].replace(_client_dir, "D").splitlines()
    assert [re.sub(r"=20.*Z$", "=TIME", line) for line in lines[1:]] == [
        "D/", "D/a\t1", "D/d/", "D/d/none/", 'D/d/x\t{"json": [1]}', "D/empty\t",
        "D/lease/\t\texpires=TIME", "D/lease/k\tv", r"D/lines" "\t" r"one\ntwo\r\n\ttab \\ \\n end",
        "D/ttl\tsoon\texpires=TIME", "D/ü ö\tä\\u2028\\u0000\\u007f"]
    assert lines[0].startswith("# ")
    hidden = run("text", "--hidden", _client_dir + "/_hidden", _client_dir + "/a")[1]
    assert hidden.replace(_client_dir, "D").splitlines()[1:] == [
        "D/a\t1", "D/_hidden/", "D/_hidden/x\th"]
    assert run("xml", "/")[::2] == (1, "--format is json or text\n")


def test_ctl_import_decides_about_what_has_expired(_client_server, _client, _client_dir):
    """Left out, unless --ttl gives it a new life; keys elsewhere are left out too."""
    text = (f"{_client_dir}/old\tv\texpires=2020-01-01T00:00:00Z\n"
            f"{_client_dir}/k\tw\n/elsewhere\tx\n")
    run = functools.partial(
        _client_main, "--endpoints", _client_server.url, "import", "--prefix", _client_dir,
        stdin=text.encode())
    assert run("-") == (0, "imported 1 keys; 1 had expired and were left out; "
                           "1 lie elsewhere and were left out\n", "")
    assert _ctl_server_of_tree(_client_server.url, _client_dir) == {"/k": "w"}
    assert run("--ttl", "60", "-")[0] == 0
    assert 50 <= _client.get(_client_dir + "/old").ttl <= 60
    assert _client.get(_client_dir + "/k").ttl is None


def test_ctl_import_takes_an_answer_of_the_keys_api(_client_server, _client, _client_dir):
    """What `-o json ls --recursive` or curl has printed."""
    _client.set(_client_dir + "/a/b", "1")
    listing = _client_main(
        "--endpoints", _client_server.url, "-o", "json", "ls", "--recursive", _client_dir)[1]
    _client.delete(_client_dir, recursive=True)
    assert _client_main("--endpoints", _client_server.url, "import", "-", stdin=listing.encode()) \
        == (0, "imported 1 keys\n", "")
    assert _ctl_server_of_tree(_client_server.url, _client_dir) == {"/a": None, "/a/b": "1"}


@pytest.mark.parametrize("text, message", [
    ("/a\t1\nb\t2", "line 2: not KEY, tab, value or DIRECTORY/"),
    ("/a", "line 1: not KEY, tab, value or DIRECTORY/"),
    ("/a/\tx", "line 1: not KEY, tab, value or DIRECTORY/"),
    ("/a\t1\tlater", "line 1: not KEY, tab, value or DIRECTORY/"),
    ("/a\tx\\q", "line 1: \\q is no escape"),
    ("/a\tx\\", "line 1: \\ is no escape"),
    ("/a\tx\texpires=soon", "line 1: 'soon' is no RFC 3339 instant"),
    ('{"nodes": [{"key": "/a"}]}', "{'key': '/a'} has not either a value or dir"),
    ('{"nodes": [{"key": "/a", "value": 1}]}', "the value of /a is not text"),
    ('{"nodes": 7}', "'int' object is not iterable"),
    ("{", "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
])
def test_ctl_import_says_what_is_wrong_with_a_file(text, message):
    assert _client_main("import", "-", stdin=text.encode()) == (
        1, "", f"- is not what export writes: {message}\n")


def test_ctl_import_of_a_missing_file():
    assert _client_main("import", "/no/such") == (
        1, "", "cannot read /no/such: No such file or directory\n")


def test_ctl_import_ends_with_the_first_error(_client_server, _client, _client_dir):
    """A key that is a directory in the cluster: etcd's error, exit code 4."""
    _client.mkdir(_client_dir + "/d")
    text = f"{_client_dir}/d\tvalue\n"
    code, out, err = _client_main(
        "--endpoints", _client_server.url, "import", "-", stdin=text.encode())
    assert (code, out) == (4, "") and err.startswith(f"Error:  102: Not a file ({_client_dir}/d)")


def test_ctl_long_work_shows_progress_on_a_terminal_only(monkeypatch):
    stderr = _ClientCaptured().stream
    monkeypatch.setattr(sys, "stderr", stderr)
    for terminal in (False, True):
        monkeypatch.setattr(stderr, "isatty", lambda yes=terminal: yes, raising=False)
        monkeypatch.setattr(pyetcd_client, "_PROGRESS_EVERY_S", -1.0)
        with pyetcd_client._Progress("import", 2000) as progress:
            progress.show(500)
        text = stderr.buffer.getvalue().decode()
        assert text == ("\r\x1b[Kimport: 0/2,000 (0 %)\r\x1b[Kimport: 500/2,000 (25 %)\r\x1b[K"
                        if terminal else "")


@contextlib.contextmanager
def _ctl_member(directory, **config):
    """A cluster of one in this process; yields its URL once it is published."""
    with pyetcd.Server(data_dir=str(directory), **config) as server, Client(
            server.client_urls[0]) as client:
        eventually(lambda: client.member_list()[0].client_urls, what="the member is published")
        yield server.client_urls[0]


@pytest.fixture(name="_ctl_pair")
def _ctl_pair_fixture(tmp_path):
    """Two clusters of one: source and target of a mirror."""
    with _ctl_member(tmp_path / "source") as source, _ctl_member(tmp_path / "target") as target:
        yield source, target


def _ctl_mirror(source, target, *options):
    return _ctl_process(
        source, "mirror", "--prefix", "/from", "--dest-prefix", "/to", *options, target)


def _ctl_is_mirrored(source, target):
    return _ctl_server_of_tree(source, "/from") == _ctl_server_of_tree(target, "/to")


def test_ctl_mirror_copies_follows_and_goes_on_after_a_pause(_ctl_pair):
    """Every kind of change; what happened while it did not run; and more than history holds."""
    source, target = _ctl_pair
    with Client(source) as client, Client(target) as copies:
        client.set("/from/a", "1"), client.set("/from/d/b", "2"), client.mkdir("/from/e")
        client.set("/elsewhere", "x")
        copies.set("/to/a", "1"), copies.set("/to/d", "a file"), copies.set("/to/old/x", "y")
        copies.set("/kept", "z")
        with _ctl_mirror(source, target) as process:
            assert _ctl_lines_from(process, 1)[0].startswith(
                "copied 1 keys, removed 2; source index ")
            assert _ctl_is_mirrored(source, target)
            client.set("/from/a", "changed"), client.delete("/from/d", recursive=True)
            client.set("/from/short", "v", ttl=1), client.append("/from/queue", "q")
            client.set("/from/f", "1"), client.write("/from/f", None, dir=True)
            client.set("/from/f/g", "2"), client.compare_and_swap("/from/a", "3",
                                                                  prev_value="changed")
            eventually(lambda: _ctl_server_of_tree(target, "/to").get("/short") == "v"
                       or "/f/g" in _ctl_server_of_tree(target, "/to"), what="changes arrive")
            eventually(lambda: not _ctl_server_of_tree(source, "/from").get("/short")
                       and _ctl_is_mirrored(source, target), what="the copy is equal")
            process.send_signal(signal.SIGSTOP)
            for number in range(1_300):             # history holds 1,000; it may stop a bit later
                client.set(f"/from/many/{number % 20}", str(number))
            client.delete("/from/a")
            process.send_signal(signal.SIGCONT)
            eventually(lambda: _ctl_is_mirrored(source, target), what="the copy is equal again")
            code, out, err = _ctl_interrupt(process)
        assert (code, err) == (130, "")
        # Once more, unless the buffers of the stream held all changes meanwhile.
        assert re.fullmatch(r"(copied \d+ keys, removed 1; source index \d+\n)?", out)
        client.delete("/from/f", recursive=True), client.set("/from/z", "late")
        again = _client_main("--endpoints", source, "mirror", "--once", "--prefix", "/from",
                             "--dest-prefix", "/to", target)
        assert again[0] == 0 and again[1].startswith("copied 1 keys, removed 1; source index ")
        assert _ctl_is_mirrored(source, target)
        assert copies.get("/kept").value == "z"


def test_ctl_mirror_waits_for_a_target_that_is_away(tmp_path):
    """It says so, tries again, and loses nothing."""
    target = f"http://127.0.0.1:{free_port()}"
    start = functools.partial(_ctl_member, tmp_path / "target", listen_client_urls=[target])
    with _ctl_member(tmp_path / "source") as source, Client(source) as client, \
            contextlib.ExitStack() as stack:
        with start():
            client.set("/from/a", "1")
            process = stack.enter_context(_ctl_mirror(source, target))
            assert _ctl_lines_from(process, 1)[0].startswith("copied 1 keys")
        client.set("/from/b", "2"), client.delete("/from/a")
        assert "trying again" in _ctl_lines_from(process, 1, "stderr")[0]
        with start():
            eventually(lambda: _ctl_is_mirrored(source, target), what="the copy is equal")
            assert _ctl_interrupt(process)[0] == 130


def test_ctl_mirror_dry_run_changes_nothing(_ctl_pair):
    source, target = _ctl_pair
    with Client(source) as client, Client(target) as copies:
        client.set("/from/a", "1"), client.mkdir("/from/d"), copies.set("/to/old", "y")
    words = ["--endpoints", source, "mirror", "--prefix", "/from", "--dest-prefix", "/to"]
    code, out, err = _client_main(*words, "--dry-run", target)
    assert (code, err) == (0, "")
    assert out.splitlines()[:-1] == ["delete /to/old", "mkdir /to/d", "set /to/a"]
    assert out.splitlines()[-1].startswith("would copy 1 keys, would remove 1; source index ")
    assert _ctl_server_of_tree(target, "/to") == {"/old": "y"}
    code, out, _ = _client_main(*words, "--once", "--verbose", "--no-delete", target)
    assert code == 0 and out.splitlines()[:-1] == ["mkdir /to/d", "set /to/a"]
    assert _ctl_server_of_tree(target, "/to") == {"/a": "1", "/d": None, "/old": "y"}


def test_ctl_mirror_copies_times_to_live_only_when_told(_ctl_pair):
    """A refresh tells no watcher: a copy with a time to live would end before the original."""
    source, target = _ctl_pair
    words = ["--endpoints", source, "mirror", "--once", "--prefix", "/from"]
    with Client(source) as client, Client(target) as copies:
        client.set("/from/a", "1", ttl=300)
        assert _client_main(*words, target)[0] == 0
        assert copies.get("/from/a").ttl is None
        assert _client_main(*words, "--ttl", target)[1].startswith("copied 1 keys")
        assert 290 <= copies.get("/from/a").ttl <= 300
        assert _client_main(*words, "--ttl", target)[1].startswith("copied 0 keys")


@pytest.mark.parametrize("prefix, dest_prefix", [
    ("/", "/"), ("/a", "/a/b"), ("/a/b", "/a"), ("/", "/copy")])
def test_ctl_mirror_refuses_to_mirror_itself(_client_server, prefix, dest_prefix):
    """Its writes would be changes of the source."""
    words = ["mirror", "--prefix", prefix, "--dest-prefix", dest_prefix, _client_server.url]
    assert _client_main("--endpoints", _client_server.url, *words) == (
        1, "", "source and target overlap: they are the same cluster\n")
    assert _client_main("mirror") == (1, "", "Provide the endpoints of the target, comma between\n")


def test_ctl_mirror_of_a_key_that_is_no_directory(_ctl_pair):
    source, target = _ctl_pair
    with Client(source) as client:
        client.set("/from", "1")
    assert _client_main("--endpoints", source, "mirror", "--prefix", "/from", target) == (
        1, "", "/from is no directory\n")


def test_ctl_tree_draws_what_is_there(_client_server, _client, _client_dir):
    for key, value in (("/a/b/c", "1"), ("/a/d", "two\nlines"), ("/z", "x" * 99)):
        _client.set(_client_dir + key, value)
    run = functools.partial(_client_main, "--endpoints", _client_server.url, "tree")
    assert run(_client_dir)[1] == f"""\
{_client_dir}/
├── a/
│   ├── b/
│   │   └── c
│   └── d
└── z

2 directories, 3 keys
"""
    assert run("--ascii", "--values", _client_dir)[1] == f"""\
{_client_dir}/
|-- a/
|   |-- b/
|   |   `-- c = 1
|   `-- d = two\\nlines
`-- z = {"x" * 59}…

2 directories, 3 keys
"""
    assert run("--values", _client_dir + "/a/d")[1] == (
        f"{_client_dir}/a/d = two\\nlines\n\n0 directories, 1 keys\n")


# -- top, bench


def test_ctl_top_once_shows_the_rates_of_an_interval(_client_server, _client, _client_dir):
    code, out, err = _client_main(
        "--endpoints", _client_server.url, "top", "--once", "--interval", "50ms")
    first, _, header, row = out.splitlines()
    assert (code, err) == (0, "") and first.endswith("1 of 1 members answer")
    assert header.split() == [
        "NAME", "STATE", "GET/S", "WRITE/S", "FAIL/S", "EXPIRE/S", "WATCH", "SINCE", "ADDRESS"]
    assert re.fullmatch(rf"m1 +leader +(\d+\.\d +){{4}}\d+ +20\S+ +{_client_server.url}", row)


def _ctl_raise():
    raise pyetcd_client.ConnectionFailed("gone")


def test_ctl_top_shows_rates_and_members_that_are_silent(monkeypatch):
    """The difference of two samples by the time between; a dead member has dashes."""
    dead, counts = _client_dead_url(), itertools.count(1)

    def answer(path):
        if path == "/v2/members":
            return {"members": [
                {"id": "a", "name": "m1", "peerURLs": [], "clientURLs": [server.url]},
                {"id": "b", "name": "m2", "peerURLs": [], "clientURLs": [dead]},
                {"id": "c", "name": "", "peerURLs": [], "clientURLs": []}]}
        if path == "/v2/stats/self":
            return {"state": "StateFollower", "startTime": "2026-11-27T15:30:00.5Z"}
        number = next(counts)
        return {"getsSuccess": 100 * number, "setsSuccess": 7 * number, "createFail": 3 * number,
                "deleteSuccess": number, "expireCount": 0, "watchers": 5}

    with _CtlAnswering(answer) as server:
        run = pyetcd_client._Run(
            pyetcd_client._parse_flags(["--endpoints", server.url], pyetcd_client._GLOBAL_FLAGS)[0],
            pyetcd_client._Options(), [])
        top = pyetcd_client._Top(run)
        clock = iter([10.0, 12.0])
        sample = pyetcd_client._Sample
        monkeypatch.setattr(
            pyetcd_client, "_Sample", lambda _, *rest: sample(next(clock), *rest))
        assert "-  " in top.lines()[3]
        lines = [line.split() for line in top.lines()]
        monkeypatch.setattr(Client, "member_list", lambda _: _ctl_raise())
        monkeypatch.setattr(Client, "statistics", lambda *_: _ctl_raise())
        assert top.lines()[0].endswith(": 0 of 3 members answer")
    assert lines[0][-5:] == ["1", "of", "3", "members", "answer"]
    assert lines[3:] == [
        ["m1", "follower", "50.0", "4.0", "1.5", "0.0", "5", "2026-11-27T15:30", server.url],
        ["m2", "silent", *"------", dead], ["c", "unstarted", *"------"]]


class _CtlAnswering(_ClientRawServer):
    """Answers each GET with the JSON that `answer(path)` returns."""

    def __init__(self, answer):
        self._made = answer
        super().__init__()

    def _answer(self, connection, request):
        connection.sendall(_client_reply(self._made(request[1])))
        return True


def test_ctl_top_prints_lines_where_there_is_no_terminal(_client_server):
    """Block after block without escapes, until it is interrupted: exit code 130."""
    with _ctl_process(_client_server.url, "top", "--interval", "100ms") as process:
        lines = _ctl_lines_from(process, 10)
        code, rest, err = _ctl_interrupt(process)
    assert (code, err) == (130, "") and "\x1b" not in "".join([*lines, rest])
    assert [line.split(",")[0] for line in lines[::5]] == ["pyetcdctl top"] * 2


@pytest.mark.parametrize("how, code", [
    ("q", 0), (signal.SIGINT, 130), (signal.SIGTERM, 130)], ids=["q", "ctrl-c", "terminated"])
def test_ctl_top_leaves_the_terminal_as_it_was(_client_server, how, code):
    controller, terminal = pty.openpty()
    try:
        before = termios.tcgetattr(terminal)
        with _ctl_process(_client_server.url, "top", "--interval", "10s", stdin=terminal,
                          stdout=terminal) as process:
            shown = b""
            while b"q: quit" not in shown:
                shown += os.read(controller, 4096)
            assert termios.tcgetattr(terminal) != before
            if how == "q":
                os.write(controller, b"q")
            else:
                process.send_signal(how)
            assert process.wait(_CLIENT_WAIT_S) == code
            assert process.stderr.read() == b""
        shown += os.read(controller, 4096)
        assert termios.tcgetattr(terminal) == before
    finally:
        os.close(controller)
        os.close(terminal)
    assert shown.startswith(b"\x1b[?1049h\x1b[?25l") and shown.endswith(b"\x1b[?25h\x1b[?1049l")
    assert b"m1" in shown and b"leader" in shown


@pytest.mark.parametrize("kind", ["put", "get", "mixed"])
def test_ctl_bench_prints_rate_and_percentiles(_client_server, _client, kind):
    before = {node.key for node in _client.get("/").nodes}
    code, out, err = _client_main(
        "--endpoints", _client_server.url, "bench", "--total", "60", "--connections", "3",
        "--size", "10", "--prefix", "/ctl-bench", kind)
    assert (code, err) == (0, "")
    assert re.fullmatch(
        rf"{kind}: 60 requests, values of 10 bytes, 3 connections, \d+\.\d\d s: [\d,]+ per second\n"
        r"milliseconds: p50 [\d.]+, p90 [\d.]+, p99 [\d.]+, p99.9 [\d.]+, max [\d.]+\n", out)
    assert {node.key for node in _client.get("/").nodes} == before


def test_ctl_bench_leaves_what_was_there(_client_server, _client, _client_dir):
    """It removes the directories that it made, and no other; those of one that was killed."""
    run = functools.partial(
        _client_main, "--endpoints", _client_server.url, "bench", "--total", "3")
    _client.mkdir(_client_dir + "/mine")
    assert run("--prefix", _client_dir + "/mine/a/b/c")[0] == 0
    assert run("--prefix", _client_dir + "/mine")[0] == 0
    assert [node.key for node in _client.ls(_client_dir, recursive=True)] == [_client_dir + "/mine"]
    _client.set("/pyetcd-bench/other/0001", "x")
    assert run()[0] == 0 and len(_client.ls("/pyetcd-bench")) == 1      # another one runs
    _client.delete("/pyetcd-bench/other", recursive=True)
    assert run()[0] == 0 and "/pyetcd-bench" not in [node.key for node in _client.ls("/")]


def test_ctl_bench_cleans_up_after_ctrl_c(_client_server, _client, _client_dir):
    _client.mkdir(_client_dir)
    with _ctl_process(_client_server.url, "bench", "--total", "1000000", "--prefix",
                      _client_dir + "/bench") as process:
        eventually(lambda: _client.ls(_client_dir), what="load")
        assert _ctl_interrupt(process) == (130, "", "")
    assert _client.ls(_client_dir) == []


def test_ctl_bench_interrupted_at_its_start_sends_nothing(monkeypatch):
    """The pool does not wait for a thread whose start was interrupted: its write came too late."""
    taken, started, start = threading.Event(), [], threading.Thread.start

    def interrupted(thread):
        start(thread)
        started.append(thread)
        if len(started) == 2:
            taken.wait(0.5)
            raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pyetcd_client._run_parallel(range(9), 4, lambda item: taken.set(), "bench")
    for thread in started:
        thread.join(_CLIENT_WAIT_S)
    assert not taken.is_set()


def test_ctl_bench_says_what_it_could_not_remove():
    refusal = _client_reply({"errorCode": 110, "message": "no", "cause": "x", "index": 1}, 401)
    with _ClientRawServer(refusal) as server:
        _, _, err = _client_main("--no-sync", "--endpoints", server.url, "bench", "--total", "1")
    assert re.search(r"^pyetcdctl bench: /pyetcd-bench/\w+ is still there: 110: no", err)


def test_ctl_bench_counts_failures():
    """Requests that fail are no part of the rate; the exit code tells."""
    refusal = _client_reply({"errorCode": 110, "message": "no", "cause": "x", "index": 1}, 401)
    with _ClientRawServer(refusal) as server:
        code, out, _ = _client_main(
            "--no-sync", "--endpoints", server.url, "bench", "--total", "5", "put")
    assert code == 4 and "5 requests failed, the first: 110: no (x) [1]" in out
    assert _client_main("--no-sync", "bench", "burn")[0] == 1


# -- completion


@pytest.mark.parametrize("words, expected", [
    (["ge"], ["get"]), (["user", "re"], ["remove", "revoke"]),
    (["--en"], ["--endpoint", "--endpoints"]), (["set", "--ttl", ""], []),
    (["-o", ""], ["simple", "extended", "json"]), (["-o", "json", "member", "u"], ["update"]),
    (["set", "--sw"], ["--swap-with-value", "--swap-with-index"]), (["bogus", ""], []),
    (["--endpoints", ""], []), (["completion", ""], ["bash", "zsh", "fish"]),
    (["set", "--bogus", "x"], []),
    (["ls", "--sort", "-"], ["--sort", "--recursive", "-p", "--quorum"]),
    (["get", "/x", "/y"], []), (["ls", "/x", "--so"], ["--sort"]), (["set", "/x", "--ttl", ""], []),
])
def test_ctl_completion_knows_the_table_of_commands(words, expected):
    code, out, _ = _client_main("--endpoints", _client_dead_url(), "completion", "words", *words)
    assert (code, [line.split("\t")[0] for line in out.splitlines()]) == (0, expected)


def test_ctl_completion_asks_the_server_for_keys(_client_server, _client, _client_dir):
    _client.set(_client_dir + "/alpha/x", "1"), _client.set(_client_dir + "/album", "2")
    for slash in ("/", ""):
        current = slash + _client_dir[1:] + "/al"
        code, out, _ = _client_main(
            "completion", "words", "--endpoints", _client_server.url, "get", current)
        assert code == 0 and sorted(out.split()) == [current + "bum", current + "pha/"]


@pytest.mark.parametrize("shell, script", [
    ("bash", "source $1; COMP_WORDS=(pyetcdctl member u); COMP_CWORD=2; _pyetcdctl; "
             'echo "${COMPREPLY[@]}"'),
    ("zsh", "compdef() {:}; compadd() { print $words_found }; source $1; "
            "words=(pyetcdctl member u); CURRENT=3; _pyetcdctl"),
    ("fish", "source $argv[1]; complete -C 'pyetcdctl member u' | cut -f 1"),
])
def test_ctl_completion_scripts_work_in_their_shells(tmp_path, shell, script):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    program = tmp_path / "pyetcdctl"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {compiled(pyetcd_client)} "$@"\n')
    program.chmod(0o755)
    path = tmp_path / "completion"
    path.write_text(_client_main("completion", shell)[1])
    words = ["-c", script, str(path)] if shell == "fish" else ["-c", script, shell, str(path)]
    done = subprocess.run(
        [shell, *words], capture_output=True, text=True, timeout=_CLIENT_WAIT_S,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path)})
    assert (done.stdout, done.stderr) == ("update\n", "")
    assert _client_main("completion")[::2] == (
        1, "Provide the name of a shell: bash, zsh or fish\n")


@pytest.mark.parametrize("page, count", [("README", 2), ("pyetcdctl", 10)])
def test_ctl_manual_shows_what_is_printed(page, count, tmp_path):
    """The commands of a page, one after the other, on a new cluster."""
    blocks = manual_code(page, language="console")
    shown = re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", "".join(blocks), re.MULTILINE)
    files = {}
    with _ctl_member(tmp_path / "d") as url:
        for command, expected in shown:
            words, _, target = command.partition(" > ")
            program, *words = words.split()
            if program == "cat":
                assert files[words[0]] == expected
                continue
            stdin = files.get(words[-1], "").encode()
            words = ["-" if word in files else word for word in words]
            _, out, err = _client_main("--endpoints", url, *words, stdin=stdin)
            if target:
                files[target] = out
            else:
                assert out + err == expected, command
    assert len(shown) == count


def test_ctl_every_command_has_help():
    """From the table: usage, and a line for every option."""
    for name, command in pyetcd_client._COMMANDS.items():
        code, out, err = _client_main("help", *name.split())
        assert (code, err) == (0, "") and f"USAGE:\n   pyetcdctl {command.usage}\n" in out
        assert all(f"--{flag.names[0]}" in out or f"-{flag.names[0]}" in out
                   for flag in command.flags)
        assert command.help in _client_main("help", *name.split()[:-1])[1] or name not in (
            command.usage)
