"""The commands of etcdctl 2.3.8."""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import datetime
import http
import importlib
import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Callable, TypeVar

from ..client.client import Client
from ..client.watching import Watch
from ..transport.calls import clean_key, is_endpoint_failure
from ..transport.errors import EtcdError, HttpError
from ..transport.results import Member, Result
from .output import (
    _BLUE,
    _GREEN,
    _RED,
    _UNAVAILABLE,
    Exit,
    _coloured,
    _escape,
    _ExitError,
    _failure_line,
    _print,
    _print_error,
    _print_lines,
    _Progress,
    _table_lines,
)
from .program import _ask_password, _command, _Flag, _given_client, _keys_command, _Run, _split_user

_Answer = TypeVar("_Answer")
_Job = TypeVar("_Job")
_HEALTH_EVERY_S = 10.0
_SNAP_TTL_MIN_S = 300           # `import --snap` gives short-lived keys at least this long

_TTL = _Flag(("ttl",), int, "seconds until it expires; 0 and less: never")
_SORT = _Flag(("sort",), bool, "order by key")
_QUORUM = _Flag(("quorum", "q"), bool, "read through consensus: never stale")
_RECURSIVE = _Flag(("recursive", "r"), bool, "with everything below")
_AFTER_INDEX = _Flag(("after-index",), int, "begin with the first change after this index", least=0)
_ROLES = _Flag(("roles",), list, "name of a role; may be repeated", 1)
_JSON_TOO = ("simple", "json")
_NO_ARGUMENTS = "No arguments accepted"
_A_USER = "Please provide a username"
_A_ROLE = "Please provide a role name"
_PERMISSION_FLAGS = (
    _Flag(("path",), str, "a key, or a prefix of keys if it ends in *"),
    _Flag(("read",), bool, "the right to read"),
    _Flag(("write",), bool, "the right to write"),
    _Flag(("readwrite", "rw"), bool, "both rights"),
)


# -- keys


@_keys_command("get", "<key>", "print the value of a key", _SORT, _QUORUM)
def _cmd_get(run: _Run) -> None:
    result = run.client.get(
        run.key(), sorted=run.options.on("sort"), quorum=run.options.on("quorum"))
    if result.node.dir:
        raise _ExitError(f"{result.key}: is a directory")
    run.print_result(result)


@_keys_command("ls", "[key]", "list a directory", _SORT, _RECURSIVE,
               _Flag(("p",), bool, "put a slash behind directories"), _QUORUM)
def _cmd_ls(run: _Run) -> None:
    options = run.options
    if run.output != "simple":
        options.refuse(f"with --output {run.output}", "p")
    result = run.client.get(run.args[0] if run.args else "/", recursive=options.on("recursive"),
                            sorted=options.on("sort"), quorum=options.on("quorum"))
    if run.output != "simple":
        run.print_result(result)
        return
    shown = _escape if sys.stdout.isatty() else str     # keys may hold terminal commands
    _print_lines(_coloured(shown(node.key), _BLUE if node.dir else "")
                + ("/" if node.dir and options.on("p") else "")
                for node in (result.node.walk() if result.node.dir else (result.node,)))


@_keys_command("set", "<key> [value]", "write a key; its value may come from stdin", _TTL,
               _Flag(("swap-with-value",), str, "write only if this is the value", 1),
               _Flag(("swap-with-index",), int, "write only if this is the modified index", 1))
def _cmd_set(run: _Run) -> None:
    key, value = run.key(), run.value()
    run.print_result(run.client.write(
        key, value, ttl=run.ttl(), **run.conditions("swap-with-value", "swap-with-index")))


@_keys_command("mk", "<key> [value]", "write a key that must not exist",
               _Flag(("in-order",), bool, "take the next name in the directory <key>"), _TTL)
def _cmd_mk(run: _Run) -> None:
    key, value = run.key(), run.value()
    write = run.client.append if run.options.on("in-order") else run.client.create
    run.print_result(write(key, value, ttl=run.ttl()))


def _set_dir(client: Client, key: str, ttl: int | None, **conditions: Any) -> Result:
    return client.write(key, None, ttl=ttl, dir=True, **conditions)


_keys_command("update", "<key> [value]", "write a key that must exist", _TTL)(
    lambda run: run.print_result(run.client.update(run.key(), run.value(), ttl=run.ttl())))
_keys_command("mkdir", "<key>", "create a directory that must not exist", _TTL)(
    lambda run: run.print_unless_silent(run.client.mkdir(run.key(), ttl=run.ttl())))
_keys_command("setdir", "<key>", "create a directory, also in place of a key", _TTL)(
    lambda run: run.print_unless_silent(_set_dir(run.client, run.key(), run.ttl())))
_keys_command("updatedir", "<key>", "give a directory a new time to live, or none", _TTL)(
    lambda run: run.print_unless_silent(_set_dir(run.client, run.key(), run.ttl(), prevExist=True)))
_keys_command("rmdir", "<key>", "remove an empty directory, or a key")(
    lambda run: run.print_unless_silent(run.client.rmdir(run.key())))


@_keys_command("rm", "<key>", "remove a key or a directory",
               _Flag(("dir",), bool, "also an empty directory"),
               _Flag(("recursive", "r"), bool, "also a directory with everything below"),
               _Flag(("with-value",), str, "remove only if this is the value", 1),
               _Flag(("with-index",), int, "remove only if this is the modified index", 1))
def _cmd_rm(run: _Run) -> None:
    run.print_unless_silent(run.client.delete(
        run.key(), dir=run.options.on("dir"), recursive=run.options.on("recursive"),
        **run.conditions("with-value", "with-index")))


def _watch(run: _Run, key: str) -> Watch:
    after_index = run.options.number("after-index")
    return run.client.watcher(key, recursive=run.options.on("recursive"),
                              index=after_index + 1 if after_index else None, relist=False)


@_keys_command("watch", "<key>", "print the next change of a key",
               _Flag(("forever", "f"), bool, "and all later ones, until Ctrl-C"), _AFTER_INDEX,
               _RECURSIVE)
def _cmd_watch(run: _Run) -> None:
    with contextlib.suppress(KeyboardInterrupt):    # ends --forever; not an error
        with _watch(run, run.key()) as changes:
            for change in changes:
                if change.node.dir:
                    continue
                if run.options.on("recursive"):
                    _print(f"[{change.action}] {change.key}")
                run.print_result(change)
                if not run.options.on("forever"):
                    break


@_command("exec-watch", "<key> -- <command> [args...]",
          "run a command for each change of a key", _AFTER_INDEX, _RECURSIVE)
def _cmd_exec_watch(run: _Run) -> None:
    key, command = run.args[-1:], run.args[:-1]     # as etcdctl, if there is no `--`
    if run.behind is not None and len(run.args) > len(run.behind):
        key, command = run.args[:-len(run.behind) or None], run.behind
    if len(key) != 1 or not command:
        raise _ExitError("Error:  key and command to exec required")
    children: list[subprocess.Popen[bytes]] = []
    with contextlib.suppress(KeyboardInterrupt):
        with _watch(run, key[0]) as changes:
            for change in changes:
                children = [child for child in children if child.poll() is None]
                if change.node.dir:
                    _print_error(f"Ignored dir {change.key} change")
                else:
                    children.append(_start_for(change, command))


def _start_for(change: Result, command: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start a command with a change in its environment; do not wait for its end, as in etcdctl."""
    added = {"ACTION": change.action, "MODIFIED_INDEX": str(change.modified_index),
             "KEY": change.key, "VALUE": change.value or ""}
    environment = {**os.environ, **{f"ETCD_WATCH_{name}": text for name, text in added.items()}}
    try:
        return subprocess.Popen(command, env=environment)
    except (OSError, ValueError) as error:          # ValueError: a NUL cannot be passed on
        raise _ExitError(f"{command[0]}: {getattr(error, 'strerror', None) or error}") from error


# -- members and health


@contextlib.contextmanager
def _one_line_errors(prefix: str = "", shown: Container[int] | None = None) -> Iterator[None]:
    """Turn errors of the members and auth APIs into one line without "Error:", and exit code 1.

    shown  HTTP statuses whose message etcdctl prints, in place of the number; None: all
    """
    try:
        yield
    except EtcdError as error:
        line = error.message
        if is_endpoint_failure(error):
            line = _UNAVAILABLE
        elif shown is not None and error.status not in shown:
            line = f"unexpected status code {error.status}"
        raise _ExitError(prefix + line) from error


def _print_json(shown: Any) -> None:
    _print(json.dumps(shown, ensure_ascii=False, separators=(",", ":")))


@_command("member list", "", "print the members", formats=_JSON_TOO,
          wrong=_NO_ARGUMENTS)
def _cmd_member_list(run: _Run) -> None:
    client = run.client
    with _one_line_errors(shown=()):
        members = client.member_list()
    with _one_line_errors("Failed to get leader:  ", shown=()):
        leader = client.leader_member()
    leads = [leader is not None and leader.id == member.id for member in members]
    if run.output == "json":
        _print_json({"members": [
            {**member.raw, "isLeader": leading} for member, leading in zip(members, leads)]})
        return
    rows = []
    for member, leading in zip(members, leads):
        peer_urls, client_urls = ",".join(member.peer_urls), ",".join(member.client_urls)
        rows.append([f"{member.id}:", f"name={member.name}", f"peerURLs={peer_urls}",
                     f"clientURLs={client_urls}", f"isLeader={str(leading).lower()}"]
                    if member.name else [f"{member.id}[unstarted]:", "", f"peerURLs={peer_urls}"])
    _print_lines(_table_lines(rows, [_GREEN if leading else "" for leading in leads]))


@_command("member add", "<name> <peerURL>", "add a member, before it starts",
          wrong="Provide a name and a single member peerURL")
def _cmd_member_add(run: _Run) -> None:
    name, url = run.args
    if re.search("[=,]", name):
        raise _ExitError(f'the name "{name}" cannot stand in ETCD_INITIAL_CLUSTER, where = and , '
                         "separate names and URLs: choose another")
    client = run.client
    with _one_line_errors(shown=(400, 409)):
        added = client.member_add([url])
        _print(f"Added member named {name} with ID {added.id} to cluster")
        members = client.member_list()
    cluster = ",".join(f"{name if member.id == added.id else member.name}={peer_url}"
                       for member in members for peer_url in member.peer_urls)
    _print(f'\nETCD_NAME="{name}"\nETCD_INITIAL_CLUSTER="{cluster}"\n'
          'ETCD_INITIAL_CLUSTER_STATE="existing"')


@_command("member remove", "<memberID>", "remove a member, by its id or its name",
          wrong="Provide a single member ID")
def _cmd_member_remove(run: _Run) -> None:
    asked, client = run.args[0], run.client
    with _one_line_errors("Error while verifying ID against known members: ", shown=()):
        members = client.member_list()
    found = [member.id for member in members if member.id == asked] or [
        member.id for member in members if member.name == asked]
    if not found:
        raise _ExitError(f"Couldn't find a member in the cluster with an ID of {asked}.")
    if len(found) > 1:
        raise _ExitError(f"{len(found)} members are named {asked}; remove one of them by its id: "
                         f"{', '.join(found)}")
    id = found[0]
    with _one_line_errors(f"Received an error trying to remove member {id}: ", shown=()):
        try:
            client.member_remove(id)
        except HttpError as error:
            if error.status != http.HTTPStatus.GONE:    # removed already
                raise
    _print(f"Removed member {id} from cluster")


@_command("member update", "<memberID> <peerURLs>", "give a member other peer URLs",
          wrong="Provide an ID and a list of comma separated peerURL "
                "(0xabcd http://example.com,http://example1.com)")
def _cmd_member_update(run: _Run) -> None:
    id, urls = run.args
    client = run.client
    with _one_line_errors(shown=(400, 404, 409)):
        client.member_update(id, urls.split(","))
    _print(f"Updated member with ID {id} in cluster")


@_command("cluster-health", "", "ask every member whether it is healthy",
          _Flag(("forever", "f"), bool, "ask again every 10 seconds, until Ctrl-C"))
def _cmd_cluster_health(run: _Run) -> int:
    if not run.options.on("forever"):
        return _check_health(run.connect(_given_client))
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            _check_health(run.connect(_given_client))
            _print("\nnext check after 10 second...\n")
            time.sleep(_HEALTH_EVERY_S)
    return Exit.OK


def _check_health(client: Client) -> int:
    try:
        members = client.member_list()
    except EtcdError:
        _print("cluster may be unhealthy: failed to list members")
        raise
    width = max(len(member.id) for member in members) if sys.stdout.isatty() and members else 0
    healthy = [_member_is_healthy(client, member, width) for member in members]
    _print("cluster is " + (_coloured("healthy", _GREEN) if any(healthy)
                           else _coloured("unhealthy", _RED)))
    return Exit.OK if any(healthy) else Exit.UNHEALTHY


def _member_is_healthy(client: Client, member: Member, width: int) -> bool:
    unreachable = f"member {member.id.ljust(width)} is {_coloured('unreachable', _RED)}"
    if not member.client_urls:
        _print(f"{unreachable}: no available published client urls")
        return False
    for url in member.client_urls:
        try:
            healthy = client.health(url)
        except (EtcdError, ValueError) as error:
            why = _failure_line(error) if isinstance(error, EtcdError) else str(error)
            _print(f"failed to check the health of member {member.id} on {url}: {why}")
            continue
        word = "healthy" if healthy else "unhealthy"
        verdict = _coloured(word, _GREEN if healthy else _RED)
        _print(f"member {member.id.ljust(width)} is {verdict}: got {word} result from {url}")
        return healthy
    _print(f"{unreachable}: [{' '.join(member.client_urls)}] are all unreachable")
    return False


# -- files


@_command("backup", "", "copy a member's data directory under new ids",
          _Flag(("data-dir",), str, "data directory of the member; it may run"),
          _Flag(("wal-dir",), str, "its log directory, if that is elsewhere"),
          _Flag(("backup-dir",), str, "the copy"),
          _Flag(("backup-wal-dir",), str, "log directory of the copy, if that is elsewhere"))
def _cmd_backup(run: _Run) -> None:
    text = run.options.text
    if not text("data-dir") or not text("backup-dir"):
        raise _ExitError("backup needs --data-dir and --backup-dir")
    try:
        server = importlib.import_module("pyetcd")
    except ImportError as error:
        raise _ExitError(
            "backup is done by the server's module: put pyetcd.py beside pyetcd_client.py, or "
            f"install it ({error})") from error
    try:
        server.backup(text("data-dir"), text("backup-dir"), wal_dir=text("wal-dir"),
                      backup_wal_dir=text("backup-wal-dir"))
    except server.BackupError as error:
        raise _ExitError(str(error)) from error


def _run_parallel(items: Sequence[_Job], workers: int, work: Callable[[_Job], None],
                  title: str) -> None:
    """Call `work` for every item on `workers` threads, until one raises; show the progress."""
    numbered, lock, stop = enumerate(items), threading.Lock(), threading.Event()

    def serve() -> None:
        try:
            while True:
                with lock:                          # guards the iterator and the terminal
                    number, item = next(numbered, (0, None))
                    if item is None or stop.is_set():
                        break
                    progress.show(number)
                work(item)
        finally:
            stop.set()

    with _Progress(title, len(items)) as progress, concurrent.futures.ThreadPoolExecutor(
            max(1, workers), "pyetcdctl") as pool:
        try:
            with lock:                              # the pool does not wait for a worker whose
                stop.set()                          # start Ctrl-C interrupted: it gets no item
                futures = [pool.submit(serve) for _ in range(max(1, workers))]
                stop.clear()
            for future in futures: future.result()
        finally:
            stop.set()


def _read_snapshot_04(path: str, hidden: Sequence[str]) -> list[tuple[str, str, int | None]]:
    """Return (key, value, ttl) of the files in a snapshot of etcd 0.4.

    Such a file is the JSON of a store, or a checksum line and JSON with the former in base64.
    Expired files are omitted, and hidden directories that are not in `hidden`.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        outer = json.loads(text if text.startswith("{") else text.partition("\n")[2])
        store = json.loads(base64.b64decode(outer["state"])) if "state" in outer else outer
        root = store["Root"]
        found = list(_snapshot_files(root, "", hidden=False))
        for key in hidden:
            node = root
            for name in clean_key(key).strip("/").split("/"):
                node = node["Children"][name]
            found += _snapshot_files(node, clean_key(key), hidden=True)
    except OSError:
        raise _ExitError(f"cannot read snapshot file {path}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _ExitError(f"{path} is no snapshot of etcd 0.4 ({error or error!r})") from error
    return [record for record in found if record[2] is None or record[2] > 0]


def _snapshot_files(node: Mapping[str, Any], key: str, *,
                    hidden: bool) -> Iterator[tuple[str, str, int | None]]:
    children = node.get("Children")
    if children is None:
        yield key, node["Value"], _seconds_left(node["ExpireTime"])
        return
    for name, child in sorted(children.items()):
        if hidden or not name.startswith("_"):
            yield from _snapshot_files(child, f"{key}/{name}", hidden=hidden)


def _seconds_left(instant: str | None) -> int | None:
    """Return the whole seconds until an RFC 3339 instant, rounded up; None for none."""
    if not instant or instant.startswith("0001-"):  # Go's zero time
        return None
    match = re.fullmatch(r"(\S{19})(\.\d+)?(Z|[+-]\d\d:\d\d)", instant)
    if match is None:
        raise ValueError(f"{instant!r} is no RFC 3339 instant")
    offset = "+00:00" if match[3] == "Z" else match[3]
    at = datetime.datetime.fromisoformat(match[1] + offset).timestamp() + float(match[2] or 0)
    return math.ceil(at - time.time())


def _import_snapshot_04(run: _Run) -> int:
    path, workers = run.options.text("snap"), run.options.number("c", 10)
    files = _read_snapshot_04(path, run.options.texts("hidden"))
    client = run.client

    def write(record: tuple[str, str, int | None]) -> None:
        key, value, ttl = record
        client.set(key, value, ttl=max(ttl, _SNAP_TTL_MIN_S) if ttl else None)

    _print(f"starting to import snapshot {path} with {workers} clients")
    _run_parallel(files, workers, write, "import")
    _print(f"finished importing {len(files)} keys")
    return Exit.OK


# -- users, roles, auth


def _names(entries: Sequence[Any] | None, field: str) -> list[str]:
    """Return the names in a list of names or of objects: servers have both."""
    return [entry[field] if isinstance(entry, dict) else str(entry) for entry in entries or ()]


def _auth_call(call: Callable[..., _Answer], *args: Any) -> _Answer:
    with _one_line_errors():
        return call(*args)


def _exists(get: Callable[[str], Any], name: str) -> bool:
    with _one_line_errors():
        try:
            get(name)
        except EtcdError as error:
            if is_endpoint_failure(error):
                raise
            return False
    return True


def _call_command(name: str, arguments: str, help: str, call: Callable[..., Any], done: str,
                  wrong: str) -> None:
    @_command(name, arguments, help, wrong=wrong)
    def run_it(run: _Run) -> None:
        _auth_call(call, run.client, *run.args)
        _print(done.format(*run.args))


@_command("user add", "<name>[:<password>]", "make a user", wrong=_A_USER)
def _cmd_user_add(run: _Run) -> None:
    text, client = run.args[0], run.client
    name = text.partition(":")[0]
    if _exists(client.user_get, name):
        raise _ExitError(f"User {name} already exists")
    _auth_call(client.user_add, name, _split_user(text, "New password: ")[1])
    _print(f"User {name} created")


@_command("user get", "<name>", "print a user's roles", wrong=_A_USER, formats=_JSON_TOO)
def _cmd_user_get(run: _Run) -> None:
    user = _auth_call(run.client.user_get, run.args[0])
    roles = _names(user.get("roles"), "role")
    if run.output == "json":
        _print_json({"user": user["user"], "roles": roles})
    else:
        _print(f"User: {user['user']}\nRoles: {' '.join(roles)}")


def _list_names(run: _Run, kind: str, listing: Callable[[Client], Sequence[Any]]) -> None:
    client = run.client
    with _one_line_errors(shown=()):
        names = _names(listing(client), kind)
    if run.output == "json":
        _print_json({f"{kind}s": names})
    else:
        _print_lines(names)


_command("user list", "", "print the names of all users", wrong=_NO_ARGUMENTS, formats=_JSON_TOO)(
    lambda run: _list_names(run, "user", Client.user_list))
_command("role list", "", "print the names of all roles", wrong=_NO_ARGUMENTS, formats=_JSON_TOO)(
    lambda run: _list_names(run, "role", Client.role_list))
_call_command(
    "user remove", "<name>", "remove a user", Client.user_remove, "User {} removed", _A_USER)


def _change_roles(run: _Run, change: Callable[[Client, str, Sequence[str]], Any]) -> None:
    roles = run.options.texts("roles")
    if not roles:
        raise _ExitError("No roles specified; please use `-roles`")
    _auth_call(change, run.client, run.args[0], roles)
    _print(f"User {run.args[0]} updated")


_command("user grant", "<name>", "grant roles to a user", _ROLES, wrong=_A_USER)(
    lambda run: _change_roles(run, Client.user_grant))
_command("user revoke", "<name>", "revoke roles of a user", _ROLES, wrong=_A_USER)(
    lambda run: _change_roles(run, Client.user_revoke))


@_command("user passwd", "<name>", "change a user's password", wrong=_A_USER)
def _cmd_user_passwd(run: _Run) -> None:
    name, client = run.args[0], run.client
    _auth_call(client.user_get, name)
    _auth_call(client.user_password, name, _ask_password("New password: "))
    _print("Password updated")


@_command("role add", "<name>", "make a role", wrong=_A_ROLE)
def _cmd_role_add(run: _Run) -> None:
    name, client = run.args[0], run.client
    if _exists(client.role_get, name):
        raise _ExitError(f"Role {name} already exists")
    _auth_call(client.role_add, name)
    _print(f"Role {name} created")


def _permitted(role: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    kv = role["permissions"]["kv"]
    return list(kv.get("read") or ()), list(kv.get("write") or ())


@_command("role get", "<name>", "print what a role permits", wrong=_A_ROLE, formats=_JSON_TOO)
def _cmd_role_get(run: _Run) -> None:
    role = _auth_call(run.client.role_get, run.args[0])
    read, write = _permitted(role)
    if run.output == "json":
        _print_json(role)
    else:
        _print_lines([f"Role: {role['role']}", "KV Read:", *(f"\t{path}" for path in read),
                     "KV Write:", *(f"\t{path}" for path in write)])


_call_command(
    "role remove", "<name>", "remove a role", Client.role_remove, "Role {} removed", _A_ROLE)


def _change_permission(run: _Run, change: Callable[[Client, str, str, str], dict[str, Any]],
                       done: str) -> None:
    path = run.options.text("path")
    if not path:
        raise _ExitError("No path specified; please use `-path`")
    canonical = clean_key(path) + ("/" if path.endswith("/") and path.strip("/") else "")
    if path != canonical:
        raise _ExitError(f"Not canonical path; please use `-path={canonical}`")
    kinds = [kind for kind in ("read", "write", "readwrite") if run.options.on(kind)]
    if len(kinds) != 1:
        raise _ExitError("Please specify exactly one of -read, -write or -readwrite")
    name, client = run.args[0], run.client
    before = _auth_call(client.role_get, name)
    after = _auth_call(change, client, name, path, kinds[0])
    unchanged = _permitted(before) == _permitted(after)
    _print(f"{f'Role unchanged; already {done}' if unchanged else ''}Role {name} updated")


_command("role grant", "<name>", "permit a path", *_PERMISSION_FLAGS, wrong=_A_ROLE)(
    lambda run: _change_permission(run, Client.role_grant, "granted"))
_command("role revoke", "<name>", "undo role grant", *_PERMISSION_FLAGS, wrong=_A_ROLE)(
    lambda run: _change_permission(run, Client.role_revoke, "revoked"))
_call_command("auth enable", "", "check the rights of every request",
              Client.auth_enable, "Authentication Enabled", _NO_ARGUMENTS)
_call_command("auth disable", "", "permit every request",
              Client.auth_disable, "Authentication Disabled", _NO_ARGUMENTS)
