"""`pyetcd dev`: a LocalCluster in this process, to try things on."""

from __future__ import annotations

import contextlib
import errno
import http.client
import json
import logging
import os
import signal
import tempfile
import threading
from typing import Any, Dict, List, Tuple

from ..base.errors import ServerStopped, StartError
from ..base.limits import DEFAULT_ELECTION_MS, DEFAULT_HEARTBEAT_MS
from ..base.text import is_ip
from ..base.urls import WILDCARD_HOSTS, is_local, url_address
from .addresses import default_route_address
from .discovery import blocking_get
from .embedding import BIND_HINTS
from .flags import FLAGS, Flag, FlagError, parse_bool
from .settings import Settings
from .testkit import LocalCluster

DEV_SIZES = (1, 3, 5, 7, 9)
_DISCOVERY_SIZE = 3                 # members of the cluster that -discovery-url is for
_LOOK_SECONDS = 0.5                 # between two looks whether all members run
_ANSWER_SECONDS = 5.0               # for /new of a member in this process
_KEPT_FILE = "dev.json"                # in a kept data directory: the URLs of its members

Address = Tuple[str, int, int]      # host, client port, peer port; port 0: a free one


def _parse_port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text[:9]) <= 65535:
        raise ValueError("a port is a number from 1 to 65535")
    return int(text)


def _parse_host(text: str) -> str:
    if not is_ip(text):
        raise ValueError("an IP address of this machine is wanted, without a port")
    if text in WILDCARD_HOSTS:
        raise ValueError("the URLs need one address of this machine, such as"
                         f" {default_route_address() or '10.0.0.5'}")
    return text


DEV_FLAGS = (
    Flag("port", _parse_port, 0,
         "client port of the first member; its peer port is the next one, then come those of the"
         " second member, and so on (default: free ports)."),
    Flag("host", _parse_host, "",
         "address of this machine to listen on (default: 127.0.0.1, which only this machine"
         " reaches)."),
    Flag("data-dir", str, "",
         "directory that keeps data, number of members and ports for the next `pyetcd dev`"
         " (default: a temporary one, removed at the end)."),
    Flag("discovery-url", parse_bool, False,
         "print a fresh discovery URL for three members elsewhere; without -host this listens on"
         " this machine's address on the default route."),
    *FLAGS["logging"],
)


def dev_size(word: str) -> int:
    """Return the number of members that a word asks for.  Raises FlagError."""
    sizes = ", ".join(map(str, DEV_SIZES[:-1])) + f" or {DEV_SIZES[-1]}"
    if not (word.isascii() and word.isdecimal()):
        raise FlagError(f"'{word}' is not a number of members; use {sizes}")
    size = int(word[:9])
    if size in DEV_SIZES:
        return size
    if not size:
        raise FlagError(f"a cluster has at least one member; use {sizes}")
    if size > DEV_SIZES[-1]:
        raise FlagError(f"{word} members are too many for one process; use {sizes}")
    raise FlagError(
        f"{size} members survive no more failures than {size - 1}: both need a majority; use"
        f" {sizes}"
    )


class EndSignals:
    """SIGINT, SIGTERM and SIGHUP wake wait(); later ones do not disturb the removal of data."""

    def __enter__(self) -> EndSignals:
        self._is_over = False
        self._until = threading.Lock()      # a handler may release it, whatever it interrupts
        self._until.acquire()
        self._before: Dict[int, Any] = {}
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:      # as nohup leaves it
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exc_info: object) -> None:
        # A late signal must not change the exit code of a process that has cleaned up.
        for number, before in self._before.items():
            signal.signal(number, signal.SIG_IGN if self._is_over else before)

    def _receive(self, number: int, frame: object) -> None:
        self._is_over = True
        with contextlib.suppress(RuntimeError):         # not the first signal
            self._until.release()

    def wait(self, timeout_s: float) -> bool:
        """Block until a signal has come, for at most timeout_s; tell whether one has."""
        if not self._is_over:
            self._until.acquire(timeout=timeout_s)
        return self._is_over


# -- where the members live ------------------------------------------------------


def plan_addresses(settings: Settings, size: int) -> List[Address]:
    """Return the addresses of all members: those of a kept data directory, or new ones.

    size  0: as many as the data directory has, or one.  Raises FlagError for contradictions.
    """
    port, host, data_dir = settings["port"], settings["host"], settings["data-dir"]
    recorded = _read_kept(data_dir) if data_dir else []
    if recorded:
        count, (own_host, own_port, _) = len(recorded), recorded[0]
        if size not in (0, count) or port not in (0, own_port) or host not in ("", own_host):
            raise FlagError(
                f"{data_dir} keeps a cluster of {count} on {own_host}, ports from {own_port};"
                f" leave N, -port and -host out, or name another -data-dir"
            )
        return recorded
    if not host and settings["discovery-url"]:
        host = default_route_address()
    last = port + 2 * (size or 1) - 1
    if last > 65535:
        raise FlagError(f"-port {port} leaves too few ports for {size} members; use one up to"
                        f" {65536 - 2 * size}")
    return [
        (host or "127.0.0.1", port and port + 2 * place, port and port + 2 * place + 1)
        for place in range(size or 1)
    ]


def _read_kept(data_dir: str) -> List[Address]:
    """Return the addresses that a data directory was used with; none for a new one."""
    path = os.path.join(data_dir, _KEPT_FILE)
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)["members"]
        return [(*url_address(client), url_address(peer)[1]) for client, peer in found]
    except FileNotFoundError:
        if os.path.isdir(data_dir) and os.listdir(data_dir):
            raise FlagError(
                f"{data_dir} is not empty and has no {_KEPT_FILE}: it is no directory of `pyetcd"
                f" dev`; name a new one"
            ) from None
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FlagError(f"cannot use {path}: {error}; name another -data-dir") from None


def _write_kept(data_dir: str, cluster: LocalCluster) -> None:
    urls = [[member.client_url, member.peer_url] for member in cluster.members]
    with open(os.path.join(data_dir, _KEPT_FILE), "w", encoding="utf-8") as file:
        json.dump({"members": urls}, file)


_PORT_HINTS = {
    **BIND_HINTS,
    errno.EADDRINUSE: "another program uses it; choose another -port, or leave it out for free"
                      " ports",
}


def start_cluster(cluster: LocalCluster, addresses: List[Address]) -> None:
    """Start the members on their addresses, and wait until all serve.  Raises StartError."""
    for member, (host, client_port, peer_port) in zip(cluster.members, addresses):
        try:
            member.reserve(host, client_port, peer_port)
        except OSError as error:
            ports = f" port {client_port} or {peer_port}" if client_port else ""
            hint = _PORT_HINTS.get(error.errno or 0, error.strerror or str(error))
            raise StartError(f"cannot listen on {host}{ports}: {hint}") from None
    try:
        cluster.start()
    except (TimeoutError, ServerStopped) as error:
        raise StartError(f"the cluster did not start: {error}") from None


# -- what it prints --------------------------------------------------------------


def describe_cluster(cluster: LocalCluster, data_dir: str) -> List[str]:
    first, last, leader = cluster.members[0], cluster.members[-1], cluster.leader()
    count = len(cluster.members)
    kept = "is kept" if data_dir else "is removed then"
    lines = [f"{count} member{'s' * (count > 1)} in this process. Ctrl-C ends it; the data"
             f" {kept}.", ""]
    for member in cluster.members:
        lines.append(f"  {member.name}  {member.client_url}{'  leader' * (member is leader)}")
    return [
        *lines, "", f"page: {first.client_url}/ui", *([f"data: {data_dir}"] * bool(data_dir)), "",
        "Try next:",
        f"  curl {first.client_url}/v2/keys/foo -XPUT -d value=bar",
        f"  curl {last.client_url}/v2/keys/foo",
        f"  curl '{last.client_url}/v2/keys/?wait=true&recursive=true'    # prints the next change",
    ]


def discovery_lines(client_url: str) -> List[str]:
    """Return the lines about a new discovery URL of this cluster.  Raises StartError."""
    try:
        status, _, body = blocking_get(client_url, _ANSWER_SECONDS, f"/new?size={_DISCOVERY_SIZE}")
    except (OSError, http.client.HTTPException) as error:
        raise StartError(f"no discovery URL from {client_url}: {error}") from None
    text = body.decode("utf-8", "replace").strip()
    if status != 200:
        raise StartError(f"no discovery URL from {client_url}: {text}")
    reach = "   (reached from this machine only; see -host)" if is_local(client_url) else ""
    return [
        f"discovery URL for {_DISCOVERY_SIZE} members elsewhere:{reach}", f"  {text}",
        "  give it to each as -discovery; for another number of members:",
        f"  curl '{client_url}/new?size=5'",
    ]


def run_dev(settings: Settings, size: int) -> int:
    """Run a cluster until a signal ends it; return the exit code.  Raises FlagError, StartError."""
    data_dir = settings["data-dir"]
    addresses = plan_addresses(settings, size)
    with contextlib.ExitStack() as owned:
        signals = owned.enter_context(EndSignals())
        directory = data_dir or owned.enter_context(
            tempfile.TemporaryDirectory(prefix="pyetcd-dev-"))
        cluster = LocalCluster(
            len(addresses), directory, heartbeat_ms=DEFAULT_HEARTBEAT_MS,
            election_ms=DEFAULT_ELECTION_MS,            # those for tests keep a laptop busy
        )
        owned.callback(cluster.close)
        start_cluster(cluster, addresses)
        lines = describe_cluster(cluster, data_dir)
        if data_dir:
            _write_kept(data_dir, cluster)
        if settings["discovery-url"]:
            lines += ["", *discovery_lines(cluster.members[0].client_url)]
        print("\n".join(lines), flush=True)
        while not signals.wait(_LOOK_SECONDS):
            ended = [member.name for member in cluster.members if not member.is_running]
            if ended:
                raise StartError(f"{', '.join(ended)} ended by itself, and so does the rest")
        logging.getLogger("pyetcd").setLevel(logging.CRITICAL)      # each loses the others now
    return 0
