"""pyetcd: etcd v2 in one Python file, with the standard library only.
A member, a whole cluster in one process, or a discovery service: same flags, same HTTP API, same
peer protocol and same files on disk as etcd 2.3.8.  Run it (`python pyetcd.py -h`), or embed it:

    with pyetcd.Server(data_dir="x.etcd") as server:
        print(server.client_urls)

One thread, the reactor, owns all state; a second one, `wal`, writes and syncs:

    clients --> HTTP server --> keys API --> Raft core --> journal ==> wal thread ==> disk
       ^                          |           |     ^                     |
       |                       (reads)     streams  +---- persisted ------+
       |                          v           v
       +---- replies, events -- store <--- applier        other members

Rooms and their modules, bottom up; each uses only names defined above it:

  base:   basics, checksums, errors, limits, ids, text, messages, codec, urls, versions
  raft:   progress, log, replication, core, node
  store:  events, walks, watchers, nodes, tree
  disk:   bolt, files, records, snapshots, v3_data, wal
  net:    http_messages, workers, reactor, budgets, http_requests, tls, dns, http_calls,
            http_connections, http_server
  peer:   compatibility, frames, streams, links, transport
  member: cluster, applier, configuration, passwords, auth, statistics, journal, snapshots,
            waiting, leadership, upkeep, server
  api:    forms, gojson, auth, listings, keys, members, metrics, snapshot, status, routes,
            discovery
  life:   discovery, addresses, flags, restart, bootstrap, data_loss, embedding, proxy_files,
            proxy, settings, checks, sources, backup, inspection, records, exchange, testkit,
            verdicts, tools, command_line

Sources: the Raft paper and Ongaro's thesis; the documents and the observed behaviour of etcd 2.0,
2.3 and 3.4.  Differences from etcd are listed in docs/differences.md.
"""

# Built from src/ by build.py: change it there.

from __future__ import annotations

import marshal
import os
import sys

if __name__ == "__main__":
    def _enter_fresh_image() -> None:
        """Run this file's byte code in a fresh image of the process; return if that cannot be.

        Python has just compiled all of this file, which leaves 24 MB behind that are never used
        again: 28 MB instead of 52.  The image gets the words that the user typed, with a compiled
        script in memory in the place of this file.  Raises OSError, ValueError.
        """
        from importlib.util import MAGIC_NUMBER
        with open("/proc/self/cmdline", "rb") as file:
            words = file.read().split(b"\0")[:-1]
        with open("/proc/self/comm", "rb") as file:
            name = file.read().rstrip(b"\n")
        at = len(words) - len(sys.argv)             # of the script
        if at < 1 or words[at:] != list(map(os.fsencode, sys.argv)):
            return
        if "python" not in os.path.basename(os.readlink("/proc/self/exe")):
            return                                  # the system's loader, or some other program
        _show_words(words)                          # no image if this cannot be done there
        image = os.memfd_create("pyetcd", 0)        # survives exec
        try:
            code = compile("_PAST_IMAGE = 'past'; exec('code')", __file__, "exec")
            past = image, words, name, tuple(sys.path), __file__
            values = {"past": past, "code": sys._getframe(1).f_code}
            code = code.replace(co_consts=tuple(values.get(str(it), it) for it in code.co_consts))
            with open(image, "wb", closefd=False) as file:
                file.write(MAGIC_NUMBER.ljust(16, b"\0") + marshal.dumps(code))
            # As long as the user's path, by more slashes: that is then written over it.
            folder = b"/dev" if os.path.exists("/dev/fd") else b"/proc/self"
            link = (b"/fd/%d" % image).rjust(len(words[at]) - len(folder), b"/")
            os.execv("/proc/self/exe", [*words[:at], folder + link, *words[at + 1:]])
        finally:
            os.close(image)

    def _leave_past_image(
        image: int, words: list[bytes], name: bytes, path: tuple[str, ...], script: str
    ) -> None:
        """Make all as if the user's script had been started, and not a file in memory."""
        os.close(image)
        at = len(words) - len(sys.argv)
        sys.argv[0] = os.fsdecode(words[at])
        if hasattr(sys, "orig_argv"):
            sys.orig_argv[at] = sys.argv[0]
        sys.path[:] = path
        globals()["__file__"] = script
        _show_words(words)
        with open("/proc/self/comm", "wb") as file:
            file.write(name)                # exec has made it `exe`

    def _show_words(words: list[bytes]) -> None:
        """Write over the memory in which `ps` looks for the command line.  Raises OSError."""
        with open("/proc/self/stat", "rb") as file:
            start, end = map(int, file.read().rpartition(b")")[2].split()[45:47])
        with open("/proc/self/mem", "r+b", buffering=0) as memory:
            memory.seek(start)
            memory.write(b"".join(word + b"\0" for word in words).ljust(end - start, b"\0"))

    try:
        if "_PAST_IMAGE" in globals():
            _leave_past_image(*globals()["_PAST_IMAGE"])
        # Not in a debugger, a profiler or a module that runs this file: they have frames below.
        elif (hasattr(os, "memfd_create") and not sys.gettrace() and "__file__" in globals()
              and sys._getframe().f_back is None):
            _enter_fresh_image()            # before the other imports, made again there: 25 ms
    except (OSError, ValueError):
        pass                                # the system forbids something: then without it

import base64
import binascii
import bisect
import codecs
import collections
import contextlib
import copy
import difflib
import errno
import fcntl
import functools
import gc
import hashlib
import heapq
import http.client
import http.server
import io
import itertools
import json
import logging
import math
import operator
import platform
import queue
import random
import re
import resource
import secrets
import select
import selectors
import shlex
import shutil
import signal
import socket
import socketserver
import ssl
import struct
import tempfile
import threading
import time
import types
import urllib.parse
import weakref
from array import array
from datetime import datetime, timedelta
from email.utils import formatdate
from enum import IntEnum
from operator import attrgetter
from struct import unpack_from as _unpack_from
from typing import (
    Any,
    BinaryIO,
    Callable,
    Container,
    Deque,
    Dict,
    FrozenSet,
    Generator,
    IO,
    Iterable,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Optional,
    OrderedDict,
    Protocol,
    Sequence,
    Set,
    TYPE_CHECKING,
    TextIO,
    Tuple,
    Type,
    TypeVar,
    Union,
    cast,
)
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from typing_extensions import TypedDict, Unpack

__all__ = [
    "__version__", "Server", "ProxyServer", "StartError", "EtcdError", "backup", "restore",
    "BackupError", "LocalMember", "LocalCluster", "ClusterFactory", "main",
]

if not hasattr(select, "epoll"):
    raise ImportError("pyetcd needs epoll: it runs on Linux only")


# ============================================================================
# base/basics -- Paths, back-off, TLS file names, and fsync of a directory.
# ============================================================================


_DOTS = re.compile(r"/\.{1,2}(?:/|\Z)")


def is_clean_path(path: str) -> bool:
    """True if clean_path() removes at most a trailing slash from an absolute path."""
    return path.startswith("/") and not (
        "//" in path or "/." in path and _DOTS.search(path) is not None
    )


def clean_path(path: str) -> str:
    """Return the shortest equivalent absolute path: no `.`, `..`, `//` and no trailing slash.

    Source: Go path.Clean, for a rooted path.
    """
    if is_clean_path(path):
        return path.rstrip("/") or "/"
    parts: List[str] = []
    for part in path.split("/"):
        if part == "..":
            if parts:
                parts.pop()
        elif part and part != ".":
            parts.append(part)
    return "/" + "/".join(parts)


class TlsFiles(NamedTuple):
    """The TLS settings of one side, client or peer; "" where not given.

    The files are PEM, and read again when one of them changes.
    """

    cert_file: str = ""
    key_file: str = ""
    trusted_ca_file: str = ""           # "": the system's authorities
    ca_file: str = ""                   # etcd 2.0's: trusted as well, and implies client_cert_auth
    client_cert_auth: bool = False      # refuse clients without a certificate of the trusted CA
    crl_file: str = ""                  # revoked certificates
    allowed_name: str = ""              # host that a client certificate must be for
    allowed_cn: str = ""                # common name that it must have


class Backoff:
    """Exponential back-off: next() returns first_s, then twice the last wait, up to max_s."""

    def __init__(self, first_s: float, max_s: float) -> None:
        self._first_s = first_s
        self._max_s = max_s
        self._next_s = first_s

    def next(self) -> float:
        wait_s = self._next_s
        self._next_s = min(wait_s * 2, self._max_s)
        return wait_s

    def reset(self) -> None:
        self._next_s = self._first_s


NO_DESCRIPTOR = (errno.EMFILE, errno.ENFILE)    # of OSError: too many open files


def descriptors_max(kept: int, part: int) -> int:
    """Return the limit of open descriptors, less a reserve of `kept` or one `part` of them."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft - min(kept, soft // part)


def fsync_dir(path: str) -> None:
    """Make names created, renamed or removed in directory `path` durable."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _nothing() -> None:
    """A callback without effect; posted, it makes the reactor turn."""


# ============================================================================
# base/checksums -- CRC-32C, the checksum of etcd's files.
# ============================================================================


def _crc_table(zeros: int) -> List[int]:
    """Return the CRC-32C of each byte followed by so many zero bytes.

    The CRC is linear over XOR, so eight single-bit values give all 256.
    """
    table = [0]
    for bit in range(8):
        crc = 1 << bit
        for _ in range(8 * zeros + 8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
        table += [known ^ crc for known in table]
    return table


CRC_BLOCK_BYTES = 1 << 16           # folded at once: 0.2 ms
CRC_FOLD_BYTES_MIN = 200            # below, the tables are as fast
_CRC_TABLES = tuple(map(_crc_table, (3, 2, 1, 0)))


def crc32c(data: Union[bytes, bytearray, memoryview], crc: int = 0) -> int:
    """Continue the CRC-32C (Castagnoli) `crc` over `data`; start with 0.

    zlib has another polynomial.  Four bytes a step take 50-60 ns per byte, one a step 110; tables
    of 64 K entries win only if they have the cache alone.  Long data are folded first: 1 KB takes
    19 us instead of 55, 64 KB 160 us.
    """
    if len(data) >= CRC_FOLD_BYTES_MIN:
        view = memoryview(data)
        for offset in range(0, len(data), CRC_BLOCK_BYTES):
            block = view[offset:offset + CRC_BLOCK_BYTES]
            if len(block) < CRC_FOLD_BYTES_MIN:
                return crc32c(block, crc)
            crc = crc32c(_crc_fold(block, crc), 0xFFFFFFFF)     # the fold contains `crc` already
        return crc
    crc ^= 0xFFFFFFFF
    first, second, third, fourth = _CRC_TABLES
    words = len(data) >> 2
    for word in _unpack_from("<%dI" % words, data):
        crc ^= word
        crc = first[crc & 255] ^ second[crc >> 8 & 255] ^ third[crc >> 16 & 255] ^ fourth[crc >> 24]
    for byte in data[words << 2:]:
        crc = fourth[(crc ^ byte) & 255] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


# Multiples of the CRC's polynomial with few terms, as exponents but the last, 0: that of x^5685 is
# x^1362 + x^426 + 1.  Squared k times they keep their terms, with exponents 2^k as large.
_FOLD_EXPONENTS = ((5685, 1362, 426), (266, 143, 121, 88, 71))


def _crc_fold(data: memoryview, crc: int) -> bytes:
    """Return about 33 bytes with the same remainder as `data` continued from `crc`.

    As an integer whose lowest bit was sent first, the low `size` bits stand for the highest
    powers; shifted copies of them replace them, so each step is a few operations on long
    integers, at memory speed.
    """
    bits = len(data) * 8
    rest = int.from_bytes(data, "little") ^ crc ^ 0xFFFFFFFF
    for high, middle, *others in _FOLD_EXPONENTS:
        for scale in range(max(0, (bits // high).bit_length() - 1), -1, -1):
            top, near = high << scale, (high - middle) << scale
            farther = [(high - other) << scale for other in (*others, 0)]
            while bits - top >= 8:
                size = min(bits - top, near) & ~7
                head = rest & ((1 << size) - 1)
                rest = (rest >> size) ^ (head << (near - size))
                for far in farther:
                    rest ^= head << (far - size)
                bits -= size
    return rest.to_bytes(bits // 8, "little")


CRC_LANES_MIN = 10                  # pieces; for fewer, one after the other is as fast
CRC_LANE_BYTES_MAX = 1_024          # longer ones are folded


def crc32c_chain(pieces: Sequence[bytes], crc: int) -> List[int]:
    """Return the CRC-32C after each of `pieces`, continued from `crc`.

    Many short pieces of about one length are summed side by side: 30 of 140 bytes take 2.7 us
    each instead of 6.1, 130 take 1.8.
    """
    longest = max(map(len, pieces), default=0)
    state, crcs = crc ^ 0xFFFFFFFF, []
    if (
        len(pieces) < CRC_LANES_MIN or longest > CRC_LANE_BYTES_MAX
        or longest * len(pieces) > 2 * sum(map(len, pieces))
    ):
        for piece in pieces:
            crc = crc32c(piece, crc)
            crcs.append(crc)
        return crcs
    for piece, own in zip(pieces, _crc_lanes(pieces, longest)):
        first, second, third, fourth = _crc_powers(len(piece))
        state = own ^ first[state & 255] ^ second[state >> 8 & 255] ^ third[
            state >> 16 & 255] ^ fourth[state >> 24]
        crcs.append(state ^ 0xFFFFFFFF)
    return crcs


def _crc_lanes(pieces: Sequence[bytes], longest: int) -> Sequence[int]:
    """Return the remainder of each of `pieces`, with the start value 0: leading zeros do not count.

    All first words lie together, then all second ones, ..., as four planes of bytes: one
    operation on integers and strings of that length works on all pieces.  The first half of the
    words, times a power of x, is added to the second half until few are left.
    """
    lanes, words = len(pieces), (longest + 3) // 4
    halvings = max(0, words.bit_length() - 3)
    words = ((words - 1 >> halvings) + 1) << halvings
    rows = memoryview(b"".join([piece.rjust(words * 4, b"\0") for piece in pieces])).cast("I")
    joined = b"".join([rows[word::words].tobytes() for word in range(words)])
    planes = [joined[plane::4] for plane in range(4)]
    while not words & 1:
        words >>= 1
        half = words * lanes
        moved = _crc_times([plane[:half] for plane in planes], words * 4)
        planes = [
            (new ^ int.from_bytes(plane[half:], "little")).to_bytes(half, "little")
            for new, plane in zip(moved, planes)
        ]
    total = [0] * 4
    for start in range(0, words * lanes, lanes):
        total = _crc_times([
            (before ^ int.from_bytes(row, "little")).to_bytes(lanes, "little")
            for before, row in zip(total, (plane[start:start + lanes] for plane in planes))
        ], 4)
    remainders = bytearray(4 * lanes)
    for plane, number in enumerate(total):
        remainders[plane::4] = number.to_bytes(lanes, "little")
    return _unpack_from("<%dI" % lanes, remainders)


def _crc_times(planes: Sequence[bytes], zeros: int) -> List[int]:
    """Return the four planes of all lanes after so many more zero bytes, as integers."""
    a, b, c, d = planes
    return [
        int.from_bytes(a.translate(first), "little") ^ int.from_bytes(b.translate(second), "little")
        ^ int.from_bytes(c.translate(third), "little") ^ int.from_bytes(d.translate(last), "little")
        for first, second, third, last in _crc_plane_powers(zeros)
    ]


@functools.lru_cache(maxsize=CRC_LANE_BYTES_MAX)
def _crc_powers(zeros: int) -> List[array[int]]:
    """Return for each byte of a CRC's state a table: the state after so many zero bytes."""
    tables, data = [], bytes(zeros)
    for shift in range(0, 32, 8):
        table = [0]
        for bit in range(shift, shift + 8):
            after = crc32c(data, 1 << bit ^ 0xFFFFFFFF) ^ 0xFFFFFFFF
            table += [known ^ after for known in table]
        tables.append(array("I", table))
    return tables


@functools.lru_cache(maxsize=CRC_LANE_BYTES_MAX)
def _crc_plane_powers(zeros: int) -> List[List[bytes]]:
    """Return _crc_powers() for each byte of the result, as tables of bytes.translate."""
    return [
        [bytes([value >> shift & 255 for value in table]) for table in _crc_powers(zeros)]
        for shift in range(0, 32, 8)
    ]


# ============================================================================
# base/errors -- Errors: one class per error; code, text and status live here only.
# ============================================================================


class EtcdError(Exception):
    """An error of the keys API: code, message and HTTP status come from the class.

    cause  detail of this request, or "" (then it is left out of the body)
    index  store index for the body and X-Etcd-Index; 0 for errors of the request itself

    Source: etcd 2.3 API, errorcode.
    """

    code = 300
    message = "Raft Internal Error"
    status = 400

    def __init__(self, cause: str = "", index: int = 0) -> None:
        super().__init__(cause)
        self.cause = cause
        self.index = index

    def __str__(self) -> str:
        cause = f" ({self.cause})" if self.cause else ""
        return f"{self.code}: {self.message}{cause} [{self.index}]"


class KeyNotFound(EtcdError):
    code, message, status = 100, "Key not found", 404


class CompareFailed(EtcdError):
    code, message, status = 101, "Compare failed", 412


class NotFile(EtcdError):
    code, message, status = 102, "Not a file", 403


class NotDir(EtcdError):
    code, message = 104, "Not a directory"


class NodeExists(EtcdError):
    code, message, status = 105, "Key already exists", 412


class RootReadOnly(EtcdError):
    code, message = 107, "Root is read only"


class DirNotEmpty(EtcdError):
    code, message, status = 108, "Directory not empty", 403


class Unauthorized(EtcdError):
    code, message, status = 110, "The request requires user authentication", 401


class PrevValueRequired(EtcdError):
    code, message = 201, "PrevValue is Required in POST form"


class TtlNotANumber(EtcdError):
    code, message = 202, "The given TTL in POST form is not a number"


class IndexNotANumber(EtcdError):
    code, message = 203, "The given index in POST form is not a number"


class InvalidField(EtcdError):
    code, message = 209, "Invalid field"


class InvalidForm(EtcdError):
    code, message = 210, "Invalid POST form"


class RefreshValue(EtcdError):
    code, message = 211, "Value provided on refresh"


class RefreshTtlRequired(EtcdError):
    code, message = 212, "A TTL must be provided on refresh"


class RaftInternal(EtcdError):
    """The request did not get through consensus: timeout, overload or stop."""

    code, message, status = 300, "Raft Internal Error", 500


class TooManyRequests(RaftInternal):
    """PROPOSALS_PENDING_MAX requests wait already; this one was not proposed."""

    status = 503


class RequestTimeout(RaftInternal):
    """No answer within the request timeout; the write may be applied later."""


class NoSpace(RaftInternal):
    """The disk of this member is full: the request changes nothing."""

    def __init__(self, cause: str = "", index: int = 0) -> None:
        super().__init__(f"etcdserver: {cause}; nothing was changed", index)


class ServerStopped(RaftInternal):
    """The member is stopping."""

    def __init__(self, cause: str = "etcdserver: server stopped", index: int = 0) -> None:
        super().__init__(cause, index)


class EventIndexCleared(EtcdError):
    code, message = 401, "The event in requested index is outdated and cleared"


class MemberError(Exception):
    """A membership change that the cluster refuses; the text is etcd's."""

    text = "etcdserver: membership error"

    def __str__(self) -> str:
        return self.text


class UnknownChange(MemberError):
    text = "etcdserver: unknown kind of membership change"


class MemberRemoved(MemberError):
    """The id was removed once and can never come back."""

    text = "etcdserver: ID removed"


class MemberExists(MemberError):
    text = "etcdserver: ID exists"


class MemberNotFound(MemberError):
    text = "etcdserver: ID not found"


class PeerUrlExists(MemberError):
    text = "etcdserver: peerURL exists"


class ReconfigurationRefused(MemberError):
    """Strict reconfiguration check: the change could lose the quorum."""

    counted = advice = ""

    def __init__(self, change: str, left: int, size: int) -> None:
        super().__init__()
        self.text += (
            f": {change} a member leaves {self.counted.format(left, size)}, and {size // 2 + 1} are"
            f" needed for a quorum; {self.advice}, and try again"
        )


class NotEnoughStarted(ReconfigurationRefused):
    """Too few members would have been started, as etcd 2.3 counts."""

    text = "etcdserver: re-configuration failed due to not enough started members"
    counted = "{} started of {} members"
    advice = "start the members that were added and not started yet, or remove those"


class NotEnoughActive(ReconfigurationRefused):
    """Too few members would be up, as etcd 3 counts."""

    text = "etcdserver: unhealthy cluster"
    counted = "{} of {} members that can be reached"
    advice = "start those that are down, or remove them first"


class ProposalDropped(Exception):
    """Raft cannot take the proposal now: no leader, too much uncommitted, or removed."""


class CodecError(ValueError):
    """Malformed bytes: wrong wire type, cut varint, length past the end."""


class WalError(Exception):
    """The write-ahead log cannot be read or opened; the text names the file and the remedy."""


class CrcMismatch(WalError):
    """A record's checksum is wrong in the middle of the log: damage, never repaired by guessing."""


class TornTail(WalError):
    """The last record is incomplete: a crash during a write.  Repairable."""


class FileLocked(WalError):
    """Another process holds the lock of the log."""


class DiskFull(WalError):
    """A file cannot grow.  The partial write was taken back, so the write may be repeated."""


class SnapshotError(Exception):
    """No usable snapshot, or one that does not fit the log."""


class DiscoveryError(Exception):
    """Joining by discovery failed; the text is etcd's."""


class StartError(Exception):
    """The member cannot start.  The text is one line with the remedy; exit code 1."""


class ClusterFull(StartError):
    """The discovery URL has all its members; this node may serve as a proxy of them."""


class InvariantError(Exception):
    """A bug: a state that must never exist.  The member ends rather than continue."""


# ============================================================================
# base/limits -- Limits and defaults.
# ----------------------------------------------------------------------------
# Every limit says what happens when it is reached.
# ============================================================================


__version__ = "0.4.0"

SERVER_VERSION = "2.3.8"            # shown to peers and by /version: the etcd to be compatible with
MIN_CLUSTER_VERSION = "2.2.0"       # oldest cluster version this member can live with
ARTICLE_VERSION = "2.0.1"           # data directory format named by etcd 2.0's start-up line

REGISTRY_KEY = "/_etcd/registry"    # tokens of the discovery service
V3_REFUSAL = "pyetcd has the v2 API only: set ETCDCTL_API=2, or use HTTP/1.1 below /v2/keys"

DEFAULT_NAME = "default"
DEFAULT_CLIENT_URLS = "http://localhost:2379,http://localhost:4001"
DEFAULT_PEER_URLS = "http://localhost:2380,http://localhost:7001"
DEFAULT_CLUSTER_TOKEN = "etcd-cluster"
DEFAULT_SNAPSHOT_COUNT = 10_000     # applied entries between snapshots
DEFAULT_HEARTBEAT_MS = 100
DEFAULT_ELECTION_MS = 1_000
ELECTION_MS_MAX = 50_000            # above: refused at start (etcd's own limit)
DEFAULT_SNAPSHOTS_KEPT = 5
DEFAULT_WALS_KEPT = 5

SEGMENT_BYTES_MAX = 64_000_000      # a WAL file at or above this size is closed and the next begun
SEGMENT_PARTS = 64                  # after a snapshot, one at or above this part of it is closed
COMPACT_SLICE_ENTRIES = 1_000       # dropped from memory in one turn: 1 ms
SNAPSHOT_CATCHUP_ENTRIES = 5_000    # entries kept in memory behind a snapshot for slow followers

ENTRIES_BYTES_MAX = 1 << 20         # entries in one MsgApp; always at least one entry
INFLIGHT_MSGAPP_MAX = 512           # unanswered MsgApp per follower; above: wait for an answer
READ_ROUNDS_MAX = 1_024             # read rounds of a leader; above: dropped, and tried again
UNCOMMITTED_BYTES_MAX = 256 << 20   # log tail not yet committed; above: proposals are refused
QUEUED_BYTES_MAX = 64 << 20         # of requests that wait for a leader, in a proxy for a member;
                                    # above: 503
PROPOSALS_PENDING_MAX = 65_536      # requests waiting for apply; above: error 300 with 503

REQUEST_HEAD_BYTES_MAX = 1_052_672  # request line and headers (Go's limit); above: 431, close
REQUEST_LINE_BYTES_MAX = 512 << 10  # method, path and query; above: 414, close
HEADER_LINES_MAX = 1_000            # of one request; above: 431, close
SHORT_HEADER_BYTES_MAX = 4_096      # of a header that says how to read the rest; above: 431, close
REQUEST_BODY_BYTES_MAX = 10 << 20   # one byte more: error 210 if it is a form, else 413
CHUNKS_MAX = 65_536                 # of one request body; above: as if the body were too large
PEER_BODY_BYTES_MAX = 512 << 20     # a snapshot of a peer; above: 413, close
RAFT_BODY_BYTES_MAX = 16 << 20      # any other message of a peer; above: 413, close
CALL_BODY_BYTES_MAX = 4 << 20       # of an answer of a registry or member; above: cut
PEER_BODIES_BYTES_MAX = 64 << 20    # of all messages that peers are sending; above: 413, close
MESSAGE_ENTRIES_MAX = 1 << 15       # in one message of a peer; above: refused
FIELDS_MAX = 512                    # of a protobuf message, entries not counted; above: refused
VOTERS_MAX = 1_024                  # in a snapshot; above: refused
TERM_LEAP_MAX = 1 << 32             # of a message beyond our term, a century; above: refused
INDEX_MAX = 1 << 62                 # of an entry; above: refused
PATH_COST_MAX = 64 << 20            # characters of a peer's key and all above it; above: refused
INTERIM_ANSWERS_MAX = 100           # `100 Continue` and the like before an answer; above: an error
SLICE_BYTES = 64 << 10              # of input that one connection reads in one turn
CHUNKED_SLICE_BYTES = 16 << 10      # of it decoded, if it is chunked: 2,700 chunks take 3 ms
CONNECTIONS_MAX = 50_000            # open sockets per listener; above: 503, close
DESCRIPTORS_KEPT = 256              # below the system's limit, or a quarter of it: for files and
                                    # calls, half of it for peers too; above: as CONNECTIONS_MAX
REFUSALS_MAX = 256                  # 503 answers being sent at a time; above: closed without one
REFUSALS_TOLD_MAX = 16              # likewise, of descriptors
OUTPUT_BYTES_MAX = 64 << 20         # unsent reply bytes of one connection; above: it is closed
HELD_BYTES_MAX = 256 << 20          # unsent and unread, of all connections; above: the most idle
                                    # are closed
OUTPUT_PAUSE_BYTES = 1 << 20        # above: its next requests wait until the client has read
OUTPUT_JOIN_BYTES_MAX = 1 << 16     # unsent bytes that are joined, if they are in pieces
OUTPUT_SHARED_BYTES_MIN = 1 << 10   # of a piece; above: shared with other replies, not copied
OUTPUT_PIECES_MAX = 16              # handed to the system in one call
REQUEST_SECONDS_MAX = 300.0         # from a request's first byte to its last; above: 408, close
UNREAD_SECONDS_MAX = 60.0           # in which a client reads UNREAD_BYTES_MIN of a reply, or the
UNREAD_BYTES_MIN = 64 << 10         # rest; above: closed
SLOW_CHECK_SECONDS = 10.0           # between two searches for such clients
HEAD_CACHE_MAX = 4_096              # parsed request heads remembered; full: forgotten all at once

PIPELINE_QUEUE_MESSAGES_MAX = 64    # messages waiting for a POST; above: dropped, peer unreachable
PIPELINE_QUEUE_BYTES_MAX = 16 << 20 # likewise
PIPELINE_WORKERS = 4                # concurrent POSTs to one peer
LINK_HEARTBEAT_SECONDS = 5 / 3      # between link heartbeats on a stream
LINK_TIMEOUT_SECONDS = 5.0          # silence after which a stream is given up
STREAM_RETRY_SECONDS = 0.1          # between two dials of a stream, then twice as long, ...
STREAM_RETRY_SECONDS_MAX = 1.6
PROBE_SECONDS = 4.0                 # between two health probes of a peer

HISTORY_EVENTS_MAX = 1_000          # events kept for waitIndex; older ones answer 401
WATCHERS_MAX = 100_000              # of one member, some 3 KB each; above: 503
WATCHED_BYTES_MAX = 64 << 20        # of the paths of all watchers; above: 503
WATCHERS_NOTIFIED_MAX = 400             # notified in one turn, 4 ms; the others: in the next turns
WATCHER_QUEUE_EVENTS_MAX = 100      # backlog of one slow watcher (etcd's limit); above: closed
KEY_DEPTH_MAX = 1_024               # path elements of a key; above: error 210
PURGE_SECONDS = 30.0                # between two removals of old files
SYNC_SECONDS = 0.5                  # between two searches of the leader for expired keys
REMOVED_NODES_MAX = 2_000           # of the key tree in one turn, 5 ms; above: in the next ones
EXPIRED_KEYS_MAX = 200              # that one entry of the log expires, 4 ms; above: several
REMOVED_SECONDS = 1.0               # from the removal of a member, as it learns of it, to its end

LOG_LINE_CHARS_MAX = 16_384         # above: cut off; journald would make several lines of it

NS = 1_000_000_000                  # nanoseconds in a second
UINT64_MAX = (1 << 64) - 1
REPAIR_HINT = (
    "remove this member from the cluster, delete its data directory and add it again;"
    " a cluster of one is restored from a backup"
)


# ============================================================================
# base/ids -- Loggers and request ids.
# ============================================================================


logging.getLogger("pyetcd").addHandler(logging.NullHandler())   # silent unless the program logs


# Characters that end a line, move the cursor or reverse the text, and surrogates.
_UNPRINTABLE = re.compile(
    "[\\x00-\\x1f\\x7f-\\x9f\\u061c\\u200e\\u200f\\u2028-\\u202e\\u2066-\\u2069\\ud800-\\udfff]")


def one_line(text: str) -> str:
    """Escape `text` so that it cannot pass for two lines, or for another line."""
    text = _UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], text)
    return text if len(text) <= LOG_LINE_CHARS_MAX else text[:LOG_LINE_CHARS_MAX] + "..."


def _make_one_line(record: logging.LogRecord) -> bool:
    """Filter a record: names, keys, headers and texts of peers may hold any character."""
    record.msg, record.args = one_line(record.getMessage()), None
    return True


def package_logger(package: str) -> logging.Logger:
    """Return the logger whose lines read `<package>: message` in etcd's format."""
    logger = logging.getLogger("pyetcd." + package)
    logger.addFilter(_make_one_line)            # no effect if it has it
    return logger


class IdGenerator:
    """Request ids, unique per member and start: member 16 bits | unix ms 40 bits | counter 8 bits.

    Source: etcd 2.3 pkg/idutil.
    """

    __slots__ = ("_high", "_low")

    def __init__(self, member_id: int, now_ms: int) -> None:
        self._high = (member_id & 0xFFFF) << 48
        self._low = (now_ms & ((1 << 40) - 1)) << 8

    def next(self) -> int:
        self._low = (self._low + 1) & ((1 << 48) - 1)
        return self._high | self._low


# ============================================================================
# base/text -- JSON strings and times as etcd writes them.
# ============================================================================


_Result = TypeVar("_Result")


def finish(steps: Generator[None, None, _Result]) -> _Result:
    """Run a generator of steps to its end; return its result."""
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            result: _Result = stop.value
            return result


_SURROGATE = re.compile("[\ud800-\udfff]")     # a byte that is not UTF-8, by surrogateescape
_JSON_UNSAFE = re.compile('[\x00-\x1f"\\\\<>&\u2028\u2029\ud800-\udfff]')
_JSON_SHORT = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
_JSON_ESCAPES = {
    char: _JSON_SHORT.get(char) or f"\\u{ord(char):04x}"
    for char in ("\\", '"', *map(chr, range(0x20)), *"<>&\u2028\u2029")
}
_JSON_MARKS = bytes(byte < 0x20 or byte in b'"\\<>&' for byte in range(128)).ljust(256, b"\1")
_JSON_LONG_CHARS = 200              # from this length the table is faster than the expression


def is_plain_json(text: str) -> bool:
    """True if no character of `text` has to be escaped; meant for long text.

    A table takes 0.4 ns per character of ASCII, the expression 3 (and 0.2 us for 64).
    """
    if not text.isascii():
        return _JSON_UNSAFE.search(text) is None
    return b"\1" not in text.encode("ascii").translate(_JSON_MARKS)


def json_string(text: str) -> str:
    """Encode `text` as etcd does: `<`, `>`, `&`, U+2028/9 and controls escaped, the rest raw."""
    if len(text) >= _JSON_LONG_CHARS:
        return f'"{_escape_long(text)}"'
    if _JSON_UNSAFE.search(text) is None:
        return f'"{text}"'
    escaped = _JSON_UNSAFE.sub(lambda match: _JSON_ESCAPES.get(match[0], "\\ufffd"), text)
    return f'"{escaped}"'


def _escape_long(text: str) -> str:
    """Escape as json_string() does, in one pass per character: 10 MB of quotes take 0.1 s, not 3.

    Returns the same object if `text` is plain.
    """
    if is_plain_json(text):
        return text
    for char, escape in _JSON_ESCAPES.items():      # the backslash first: the others bring some
        if char in text:
            text = text.replace(char, escape)
    return text if is_unicode(text) else _SURROGATE.sub(r"\\ufffd", text)


# The stored form of a long text: its JSON without the quotes, in pieces of which each is the JSON
# of some characters.  All answers, snapshots and listings share the pieces.
LongText = Tuple[bytes, ...]
Value = Union[str, LongText]
LONG_TEXT_STEP_BYTES = 1 << 15      # one piece: 2 ms where every character has to be escaped
_PLAIN_PIECES = 32                  # pieces without an escape that take as long as two with


def long_text_steps(data: Union[bytes, bytearray, memoryview]) -> Generator[None, None, LongText]:
    """Return the stored form of as_unicode(text_of(data)), in steps of some ms."""
    decode = codecs.getincrementaldecoder("utf-8")("replace").decode
    pieces: List[bytes] = []
    work = 0
    for start in range(0, len(data), LONG_TEXT_STEP_BYTES):
        end = start + LONG_TEXT_STEP_BYTES
        text = decode(data[start:end], end >= len(data))
        escaped = _escape_long(text)
        pieces.append(escaped.encode())
        work += 1 if escaped is text else _PLAIN_PIECES // 2
        if work >= _PLAIN_PIECES:
            work = 0
            yield
    return tuple(pieces)


def long_text(text: str) -> LongText:
    """Return the stored form of `text`, which is Unicode."""
    return finish(long_text_steps(text.encode()))


def text_of_long(pieces: Iterable[bytes]) -> str:
    """Inverse of long_text()."""
    return "".join([json.loads(b'"%b"' % piece) for piece in pieces])


def in_pieces(texts: Iterable[Union[str, bytes]]) -> List[bytes]:
    """Encode texts, joined where they follow each other; bytes stay as they are."""
    pieces: List[bytes] = []
    strings: List[str] = []
    for text in texts:
        if isinstance(text, str):
            strings.append(text)
            continue
        if strings:
            pieces.append("".join(strings).encode())
            strings = []
        pieces.append(text)
    if strings:
        pieces.append("".join(strings).encode())
    return pieces


def json_text(value: object) -> str:
    """Encode dicts, lists, strings, ints, floats, bools and None as Go's encoding/json does."""
    if isinstance(value, str):
        return json_string(value)
    if isinstance(value, dict):
        members = (f"{json_string(str(key))}:{json_text(item)}" for key, item in value.items())
        return "{" + ",".join(members) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(json_text, value)) + "]"
    return json.dumps(value)


def utf8(text: str) -> bytes:
    """Return the bytes of `text`; bytes that came in as invalid UTF-8 go out unchanged."""
    return text.encode("utf-8", "surrogateescape")


def text_of(data: bytes) -> str:
    """Return `data` as text that utf8() turns back into the same bytes."""
    return data.decode("utf-8", "surrogateescape")


def is_unicode(text: str) -> bool:
    """True if the bytes of `text` were UTF-8."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def as_unicode(text: str) -> str:
    """Return `text` with U+FFFD for bytes that are not UTF-8: no JSON or snapshot can hold them."""
    if is_unicode(text):
        return text
    try:
        return utf8(text).decode("utf-8", "replace")
    except UnicodeEncodeError:          # half of a surrogate pair, escaped in JSON
        return _SURROGATE.sub("\ufffd", text)


_ESCAPE_MARKS = bytes(
    ord("%") if byte == ord("%") else ord("h" if byte in b"0123456789abcdefABCDEF" else ".")
    for byte in range(256)
)


def unquote(data: bytes, *, plus: bool = False) -> bytes:
    """Return `data` with its percent escapes decoded: 10 ns for each of them.

    plus  a `+` is a space, as in forms
    Raises ValueError with the first three bytes that look like an escape and are none.
    urllib takes 400 ns and 100 bytes of memory for an escape, and holds the GIL.
    """
    if b"%" not in data:
        return data.replace(b"+", b" ") if plus else data
    marks = data.translate(_ESCAPE_MARKS)
    if marks.count(b"%hh") != marks.count(b"%"):
        at = marks.replace(b"%hh", b"...").find(b"%")
        raise ValueError(text_of(data[at:at + 3]))
    if plus:
        data = data.replace(b"+", b" ")
    return binascii.a2b_qp(data.replace(b"=", b"=3D").replace(b"%", b"="))


_EPOCH = datetime(1970, 1, 1)


def format_time(unix_ns: int) -> str:
    """Return RFC 3339 in UTC with up to 9 fraction digits, trailing zeros removed."""
    seconds, nanos = divmod(unix_ns, NS)
    fraction = f".{nanos:09d}".rstrip("0") if nanos else ""
    return (_EPOCH + timedelta(seconds=seconds)).isoformat() + fraction + "Z"


def format_local_time(unix_ns: int) -> str:
    """Return RFC 3339 in the zone of this machine, as Go shows a reading of the clock."""
    offset_s = time.localtime(unix_ns // NS).tm_gmtoff
    if not offset_s:
        return format_time(unix_ns)
    hours, minutes = divmod(abs(offset_s) // 60, 60)
    sign = "-" if offset_s < 0 else "+"
    return f"{format_time(unix_ns + offset_s * NS)[:-1]}{sign}{hours:02d}:{minutes:02d}"


_RFC3339 = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)T(\d\d):(\d\d):(\d\d)(?:\.(\d+))?(?:Z|([+-])(\d\d):(\d\d))\Z"
)


def load_json(text: Union[str, bytes]) -> Any:
    """Return the value of foreign JSON.  Raises ValueError, for depth as well."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None


def parse_time(text: str) -> int:
    """Return the unix nanoseconds of an RFC 3339 time.  Raises ValueError."""
    match = _RFC3339.match(text)
    if match is None:
        raise ValueError(f"not an RFC 3339 time: {text!r}")
    moment = datetime.strptime(text[:19], "%Y-%m-%dT%H:%M:%S")
    seconds = (moment - _EPOCH) // timedelta(seconds=1)
    if match.group(8):
        offset = int(match.group(9)) * 3600 + int(match.group(10)) * 60
        seconds += -offset if match.group(8) == "+" else offset
    return seconds * NS + int((match.group(7) or "0")[:9].ljust(9, "0"))


def format_duration(seconds: float) -> str:
    """Return Go's text of a duration: `1h2m3.5s`, `350.2ms`, `12µs`, `0s`."""
    if seconds == 0:
        return "0s"
    if seconds < 1:
        unit, factor = ("ms", 1e3) if seconds >= 1e-3 else ("µs", 1e6)
        return f"{seconds * factor:.6f}".rstrip("0").rstrip(".") + unit
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(int(minutes), 60)
    text = f"{rest:.9f}".rstrip("0").rstrip(".") + "s"
    if hours:
        return f"{hours}h{minutes}m{text}"
    return f"{minutes}m{text}" if minutes else text


_UNQUOTABLE = re.compile(r'["\\\x00-\x1f\x7f-\xa0\xad\u2028\u2029\udc80-\udcff]')
_GO_SHORT = {**_JSON_SHORT, "\a": "\\a", "\b": "\\b", "\f": "\\f", "\v": "\\v"}


def go_quote(text: str) -> str:
    """Return `text` in double quotes as Go's %q shows it."""
    return f'"{_UNQUOTABLE.sub(_go_escape, text)}"'


def _go_escape(match: re.Match[str]) -> str:
    char = match[0]
    code = ord(char)
    if char in _GO_SHORT:
        return _GO_SHORT[char]
    if code < 0x80 or code >= 0xDC80:       # the latter: one byte that is not UTF-8
        return f"\\x{code & 0xFF:02x}"
    return f"\\u{code:04x}"


_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(?://([^/?#]*))?(.*)", re.DOTALL)
_NOT_IN_URLS = re.compile(r"[\x00-\x1f\x7f]")
_NOT_IN_HOSTS = re.compile(r"[^A-Za-z0-9._\x80-\U0010ffff-]")
HOST_CHARS_MAX = 253                # of a name (RFC 1035 §2.3.4); above: refused


def is_ip(text: str) -> bool:
    for family in (socket.AF_INET, socket.AF_INET6):
        with contextlib.suppress(OSError, UnicodeError, ValueError):
            socket.inet_pton(family, text)
            return True
    return False


def split_url(url: str) -> Tuple[str, str, str]:
    """Return (scheme in lower case, authority, rest) of a URL; parts may be empty.

    Raises ValueError with the words of Go's url.Parse, also for a host that no machine can have:
    `${IP}`, `{{ip}}`, `a b`, `%41`, `10.0.0.256`, a zone.  Differs from Go, which takes some of
    them: a member that is added with such a URL costs a small cluster its quorum for ever.
    """
    match = _URL.fullmatch(url)
    scheme, authority, rest = match.groups("") if match else ("", "", url)
    bad = re.search("%(?![0-9A-Fa-f]{2})", url)
    why = _authority_error(authority)
    if _NOT_IN_URLS.search(url):
        why = "net/url: invalid control character in URL"
    elif bad is not None:
        why = f"invalid URL escape {go_quote(url[bad.start():bad.start() + 3])}"
    if why:
        raise ValueError(f"parse {go_quote(url)}: {why}")
    return scheme.lower(), authority, rest


def _authority_error(authority: str) -> str:
    """Return the error of `user@host:port`, or ""."""
    user, _, address = authority.rpartition("@")
    host, port = split_address(address)
    plain = host[1:-1] if host.startswith("[") else host
    bad = _NOT_IN_HOSTS.search(plain.replace(":", ""))
    if not re.fullmatch(r"[A-Za-z0-9._~!$&'()*+,;=:%-]*", user):
        return "net/url: invalid userinfo"
    if address.startswith("[") and not host.endswith("]"):
        return "missing ']' in host"
    if host.startswith("[") and "%" in plain:
        return "an address with a zone names an interface of one machine; leave the zone out"
    if "%" in plain:
        return f"invalid URL escape {go_quote(plain[plain.index('%'):][:3])}"
    if bad is not None:
        return f"invalid character {go_quote(bad.group())} in host name"
    if port and (not re.fullmatch(":[0-9]{0,5}", port) or int(port[1:] or 0) > 65535):
        return f"invalid port {go_quote(port)} after host"
    if host.startswith("["):
        return "" if is_ip(plain) and ":" in plain else f"invalid IPv6 address {go_quote(host)}"
    if re.fullmatch(r"[0-9]+(\.[0-9]+)+", host):
        return "" if is_ip(host) else f"invalid IPv4 address {go_quote(host)}"
    return "" if ":" in host or _is_name(host) else f"invalid host name {go_quote(host)}"


def split_address(address: str) -> Tuple[str, str]:
    """Return (host, `:port`) of `host:port`; brackets stay, the port is "" if there is none."""
    if address.startswith("["):
        host, bracket, port = address.partition("]")
        return host + bracket, port
    host, colon, port = address.rpartition(":")
    return (host, colon + port) if colon else (address, "")


def _is_name(host: str) -> bool:
    """True for a name that a resolver can look up, and for ""."""
    if len(host) > HOST_CHARS_MAX or not host.isprintable():
        return False
    with contextlib.suppress(UnicodeError):     # an empty label, or one above 63 characters
        return _NOT_IN_HOSTS.search(host.encode("idna").decode("ascii")) is None
    return False


# ============================================================================
# base/messages -- Raft's messages and etcd's requests as values.
# ============================================================================


class MsgType(IntEnum):
    """raftpb.MessageType; HUP to CHECK_QUORUM without network meaning are local."""

    HUP = 0
    BEAT = 1
    PROP = 2
    APP = 3
    APP_RESP = 4
    VOTE = 5
    VOTE_RESP = 6
    SNAP = 7
    HEARTBEAT = 8
    HEARTBEAT_RESP = 9
    UNREACHABLE = 10
    SNAP_STATUS = 11
    CHECK_QUORUM = 12
    TRANSFER_LEADER = 13
    TIMEOUT_NOW = 14
    READ_INDEX = 15
    READ_INDEX_RESP = 16
    PRE_VOTE = 17
    PRE_VOTE_RESP = 18


LOCAL_MESSAGES = frozenset(
    (MsgType.HUP, MsgType.BEAT, MsgType.UNREACHABLE, MsgType.SNAP_STATUS, MsgType.CHECK_QUORUM)
)


class EntryType(IntEnum):
    """raftpb.EntryType."""

    NORMAL = 0
    CONF_CHANGE = 1
    CONF_CHANGE_V2 = 2


class ConfChangeType(IntEnum):
    """raftpb.ConfChangeType."""

    ADD_NODE = 0
    REMOVE_NODE = 1
    UPDATE_NODE = 2
    ADD_LEARNER = 3


class EntryID(NamedTuple):
    """The place of an entry in the log."""

    term: int
    index: int  # type: ignore[assignment]  # hides tuple.index


class HardState(NamedTuple):
    """The state that survives a crash (Raft thesis fig. 3.1)."""

    term: int = 0
    vote: int = 0
    commit: int = 0


class Request(NamedTuple):
    """etcdserverpb.Request, one command of the store.

    expiration and time are unix nanoseconds (0: permanent); path begins with its namespace
    (`/1/foo` is the user's `/foo`); prev_exist and refresh are None when not given.
    """

    id: int = 0
    method: str = ""
    path: str = ""
    val: str = ""
    dir: bool = False
    prev_value: str = ""
    prev_index: int = 0
    prev_exist: Optional[bool] = None
    expiration: int = 0
    wait: bool = False
    since: int = 0
    recursive: bool = False
    sorted: bool = False
    quorum: bool = False
    time: int = 0
    stream: bool = False
    refresh: Optional[bool] = None

    def as_unicode(self) -> Request:
        """Return the command as every member applies it: with U+FFFD where a snapshot has it."""
        path, value, prev_value = self.path, self.val, self.prev_value
        if path.isascii() and value.isascii() and prev_value.isascii():
            return self
        return self._replace(
            path=as_unicode(path), val=as_unicode(value), prev_value=as_unicode(prev_value)
        )


class ConfChange(NamedTuple):
    """raftpb.ConfChange; context is the JSON of a member, or None."""

    id: int = 0
    type: int = ConfChangeType.ADD_NODE
    node_id: int = 0
    context: Optional[bytes] = None


class Entry:
    """One log entry.

    request  caches the decoded payload where the proposer knows it
    encoded  caches encode_entry, for peers and disk; b"": not known; None: it is on disk, and the
             cache is dropped
    """

    __slots__ = ("type", "term", "index", "data", "request", "encoded")

    def __init__(
        self, type: int = 0, term: int = 0, index: int = 0, data: bytes = b"",
        request: Optional[Request] = None,
    ) -> None:
        self.type = type
        self.term = term
        self.index = index
        self.data = data
        self.request = request
        self.encoded: Optional[bytes] = b""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Entry) and (self.type, self.term, self.index, self.data) == (
            other.type, other.term, other.index, other.data
        )

    def __repr__(self) -> str:
        return f"Entry({self.type}, {self.term}, {self.index}, {self.data!r})"


class Snapshot(NamedTuple):
    """raftpb.Snapshot: the store's JSON at (term, index) and the voters then, ascending.

    state  the decoded `data`, if known (StoreState); never encoded
    """

    data: bytes = b""
    voters: Tuple[int, ...] = ()
    index: int = 0  # type: ignore[assignment]  # hides tuple.index
    term: int = 0
    state: Any = None


class Message:
    """raftpb.Message.  `sender` is protobuf's `from`; snapshot and context are None when unset."""

    __slots__ = (
        "type", "to", "sender", "term", "log_term", "index", "entries", "commit", "snapshot",
        "reject", "reject_hint", "context",
    )

    def __init__(
        self, type: int, *, to: int = 0, sender: int = 0, term: int = 0, log_term: int = 0,
        index: int = 0, entries: Sequence[Entry] = (), commit: int = 0,
        snapshot: Optional[Snapshot] = None, reject: bool = False, reject_hint: int = 0,
        context: Optional[bytes] = None,
    ) -> None:
        self.type = type
        self.to = to
        self.sender = sender
        self.term = term
        self.log_term = log_term
        self.index = index
        self.entries = entries
        self.commit = commit
        self.snapshot = snapshot
        self.reject = reject
        self.reject_hint = reject_hint
        self.context = context

    def __repr__(self) -> str:
        return (
            f"Message({MsgType(self.type).name} {self.sender:x}->{self.to:x} term={self.term}"
            f" log=({self.log_term},{self.index}) entries={len(self.entries)}"
            f" commit={self.commit} reject={self.reject}:{self.reject_hint})"
        )


# ============================================================================
# base/codec -- The wire codec: etcd's protobuf messages, byte for byte.
# ----------------------------------------------------------------------------
# Fields ascend, and a non-nullable field is written even when zero.  Every decode_x is the inverse
# of encode_x and raises CodecError.
# Source: etcd 2.3 raft/raftpb, wal/walpb, snap/snappb, etcdserver/etcdserverpb.
# ============================================================================


_BYTE = [bytes((value,)) for value in range(128)]
_SMALL = _BYTE + [bytes((value & 127 | 128, value >> 7)) for value in range(128, 1_024)]
Buffer = Union[bytes, bytearray, memoryview]
Schema = Mapping[int, Tuple[str, int, Callable[[Any], Any]]]    # number: name, wire type, convert


def encode_varint(value: int) -> bytes:
    """Return the protobuf varint of 0 <= value < 2**64, or of a negative int64."""
    if 0 <= value < 1_024:
        return _SMALL[value]
    value &= UINT64_MAX
    if value < 1 << 14:
        return bytes((value & 127 | 128, value >> 7))
    if value < 1 << 21:                 # an index: these lines save 0.2 us each
        return bytes((value & 127 | 128, value >> 7 & 127 | 128, value >> 14))
    if 1 << 28 <= value < 1 << 35:      # a checksum
        return bytes((
            value & 127 | 128, value >> 7 & 127 | 128, value >> 14 & 127 | 128,
            value >> 21 & 127 | 128, value >> 28,
        ))
    return bytes((value & 127 | 128, value >> 7 & 127 | 128)) + _encode_rest(value >> 14)


@functools.lru_cache(maxsize=1_024)     # of ids, most of which differ only below
def _encode_rest(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def decode_varint(data: Buffer, offset: int) -> Tuple[int, int]:
    """Return (value, offset behind it).  Raises CodecError if cut or longer than 64 bits."""
    value = shift = 0
    try:
        while True:
            byte = data[offset]
            offset += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value & UINT64_MAX, offset
            shift += 7
            if shift > 63:
                raise CodecError("varint longer than 64 bits")
    except IndexError:
        raise CodecError("unexpected end inside a varint") from None


def decode_fields(data: Buffer, limit: int = FIELDS_MAX) -> Iterator[Tuple[int, int, Any]]:
    """Yield (field number, wire type, value): int for varint and fixed, a slice for bytes.

    Raises CodecError for anything that is not protobuf, and for more than `limit` fields: a
    later one replaces an earlier one, so millions are only work.  Callers skip unknown fields.
    """
    offset, end = 0, len(data)
    for _ in range(limit + 1):
        if offset >= end:
            return
        tag = data[offset]
        if tag < 128:
            offset += 1
        else:
            tag, offset = decode_varint(data, offset)
        wire_type = tag & 7
        if wire_type == 0:
            value, offset = decode_varint(data, offset)
            yield tag >> 3, 0, value
            continue
        if wire_type == 2:
            size, offset = decode_varint(data, offset)
        elif wire_type in (1, 5):
            size = 8 if wire_type == 1 else 4
        else:
            raise CodecError(f"unknown wire type {wire_type}")
        if offset + size > end:
            raise CodecError("unexpected end inside a field")
        chunk = data[offset:offset + size]
        offset += size
        yield tag >> 3, wire_type, chunk if wire_type == 2 else int.from_bytes(chunk, "little")
    raise CodecError(f"more than {limit} fields")


def check_wire_type(wire_type: int, expected: int, owner: str) -> None:
    if wire_type != expected:
        raise CodecError(f"{owner}: wire type {wire_type}, expected {expected}")


def decode_known(data: Buffer, schema: Schema, owner: str) -> Dict[str, Any]:
    """Decode the single-valued fields of `schema`."""
    values: Dict[str, Any] = {}
    for number, wire_type, value in decode_fields(data):
        known = schema.get(number)
        if known is not None:
            name, expected, convert = known
            check_wire_type(wire_type, expected, owner)
            values[name] = convert(value)
    return values


def _bytes_field(tag: bytes, data: bytes) -> bytes:
    return tag + encode_varint(len(data)) + data


def encode_hard_state(state: HardState) -> bytes:
    return b"\x08%b\x10%b\x18%b" % (
        encode_varint(state.term), encode_varint(state.vote), encode_varint(state.commit)
    )


_HARD_STATE = {1: ("term", 0, int), 2: ("vote", 0, int), 3: ("commit", 0, int)}


def decode_hard_state(data: Buffer) -> HardState:
    return HardState(**decode_known(data, _HARD_STATE, "HardState"))


def encode_entry(entry: Entry) -> bytes:
    """Data is left out when empty, as etcd 2.3 does."""
    data, term = entry.data, entry.term     # a hot path
    size = len(data)
    if not size:
        return b"\x08%b\x10%b\x18%b" % (
            _BYTE[entry.type], encode_varint(term), encode_varint(entry.index))
    return b'\x08%b\x10%b\x18%b"%b%b' % (
        _BYTE[entry.type], _SMALL[term] if term < 1_024 else encode_varint(term),
        encode_varint(entry.index), _SMALL[size] if size < 1_024 else encode_varint(size), data,
    )


def encode_entry_head(entry: Entry) -> bytes:
    """Return the part of encode_entry() before the data."""
    head = encode_entry(Entry(entry.type, entry.term, entry.index))
    return b'%b"%b' % (head, encode_varint(len(entry.data))) if entry.data else head


_ENTRY = {1: ("type", 0, int), 2: ("term", 0, int), 3: ("index", 0, int), 4: ("data", 2, bytes)}
_VARINT = rb"([\x80-\xff]{0,9}[\x00-\x7f])"
_PLAIN_ENTRY = re.compile(b'\x08\0\x10%b\x18%b"%b' % ((_VARINT,) * 3))


def decode_entry(data: Buffer) -> Entry:
    plain = _PLAIN_ENTRY.match(data)    # the usual form: 2 us instead of 7
    if plain is not None:
        term, index, size = map(_varint_value, plain.groups())
        if size == len(data) - plain.end():
            entry = Entry(0, term, index, bytes(data[plain.end():]))
            entry.encoded = bytes(data)
            return entry
    return Entry(**decode_known(data, _ENTRY, "Entry"))


@functools.lru_cache(maxsize=1_024)     # of terms and sizes
def _varint_value(data: bytes) -> int:
    return decode_varint(data, 0)[0]


def encode_conf_change(change: ConfChange) -> bytes:
    head = b"\x08%b\x10%b\x18%b" % (
        encode_varint(change.id), encode_varint(change.type), encode_varint(change.node_id)
    )
    return head if change.context is None else head + _bytes_field(b"\x22", change.context)


_CONF_CHANGE = {
    1: ("id", 0, int), 2: ("type", 0, int), 3: ("node_id", 0, int), 4: ("context", 2, bytes),
}


def decode_conf_change(data: Buffer) -> ConfChange:
    return ConfChange(**decode_known(data, _CONF_CHANGE, "ConfChange"))


def encode_snapshot(snapshot: Optional[Snapshot]) -> bytes:
    """None is the empty snapshot that every Message carries."""
    return b"".join(encode_snapshot_parts(snapshot))


def encode_snapshot_parts(snapshot: Optional[Snapshot]) -> Tuple[bytes, ...]:
    """Encode a snapshot without a copy of its data."""
    if snapshot is None:
        return (_EMPTY_SNAPSHOT,)
    before, after = encode_snapshot_around(
        len(snapshot.data), snapshot.voters, EntryID(snapshot.term, snapshot.index)
    )
    return before, snapshot.data, after


def encode_snapshot_around(
    size: int, voters: Iterable[int], snapshot_id: EntryID
) -> Tuple[bytes, bytes]:
    """Return the parts of a raftpb.Snapshot before and after its `size` bytes of data."""
    conf_state = b"".join(b"\x08" + encode_varint(voter) for voter in voters)
    metadata = b"%b\x10%b\x18%b" % (
        _bytes_field(b"\x0a", conf_state), encode_varint(snapshot_id.index),
        encode_varint(snapshot_id.term),
    )
    before = b"\x0a" + encode_varint(size) if size else b""
    return before, _bytes_field(b"\x12", metadata)


_EMPTY_SNAPSHOT = b"\x12\x06\x0a\x00\x10\x00\x18\x00"


def decode_snapshot(data: Buffer) -> Snapshot:
    """Inverse of encode_snapshot; the fields that etcd 3.x adds are skipped."""
    values = decode_known(data, _SNAPSHOT, "Snapshot")
    metadata = values.pop("metadata", b"")
    return Snapshot(**values, **decode_known(metadata, _SNAPSHOT_METADATA, "SnapshotMetadata"))


def _decode_voters(data: Buffer) -> Tuple[int, ...]:
    """The voters of a ConfState: field 1, unpacked, or packed by other writers."""
    voters: List[int] = []
    for number, wire_type, value in decode_fields(data):
        if number == 1 and wire_type == 0:
            voters.append(value)
        elif number == 1:
            check_wire_type(wire_type, 2, "ConfState")
            offset = 0
            while offset < len(value):
                voter, offset = decode_varint(value, offset)
                voters.append(voter)
                if len(voters) > VOTERS_MAX:
                    raise CodecError(f"more than {VOTERS_MAX} voters")
    return tuple(voters)


_SNAPSHOT: Schema = {1: ("data", 2, bytes), 2: ("metadata", 2, bytes)}
_SNAPSHOT_METADATA: Schema = {
    1: ("voters", 2, _decode_voters), 2: ("index", 0, int), 3: ("term", 0, int),
}

SHARED_DATA_BYTES = 1 << 16         # of an entry or a snapshot; above: never copied


def joined_parts(parts: Iterable[bytes]) -> List[bytes]:
    """Join short parts that follow each other."""
    joined: List[bytes] = []
    short: List[bytes] = []
    for part in parts:
        if len(part) <= SHARED_DATA_BYTES:
            short.append(part)
        else:
            joined += (b"".join(short), part)
            short = []
    joined.append(b"".join(short))
    return joined


def encode_message(message: Message) -> bytes:
    return b"".join(encode_message_parts(message))


def encode_message_parts(message: Message) -> List[bytes]:
    """Encode a message, with no copy of long data; the snapshot is written even when empty."""
    parts = [
        b"\x08%b\x10%b\x18%b\x20%b\x28%b\x30%b" % (
            encode_varint(message.type), encode_varint(message.to),
            encode_varint(message.sender), encode_varint(message.term),
            encode_varint(message.log_term), encode_varint(message.index),
        )
    ]
    for entry in message.entries:
        head = encode_entry_head(entry)
        parts += (b"\x3a", encode_varint(len(head) + len(entry.data)), head, entry.data)
    parts.append(b"\x40" + encode_varint(message.commit))
    snapshot = encode_snapshot_parts(message.snapshot)
    parts += (b"\x4a", encode_varint(sum(map(len, snapshot))), *snapshot)
    parts.append(b"\x50%b\x58%b" % (_BYTE[message.reject], encode_varint(message.reject_hint)))
    if message.context is not None:
        parts.append(_bytes_field(b"\x62", message.context))
    return joined_parts(parts)


def _snapshot_or_none(data: Buffer) -> Optional[Snapshot]:
    snapshot = decode_snapshot(data)
    return snapshot if snapshot.index else None


_MESSAGE: Schema = {
    1: ("type", 0, int), 2: ("to", 0, int), 3: ("sender", 0, int), 4: ("term", 0, int),
    5: ("log_term", 0, int), 6: ("index", 0, int), 8: ("commit", 0, int),
    9: ("snapshot", 2, _snapshot_or_none), 10: ("reject", 0, bool), 11: ("reject_hint", 0, int),
    12: ("context", 2, bytes),
}
_PLAIN_MESSAGE = re.compile(
    b"%b%b%b%b" % (
        b"".join([re.escape(bytes((tag,))) + _VARINT for tag in (8, 16, 24, 32, 40, 48, 64)]),
        re.escape(b"\x4a\x08" + _EMPTY_SNAPSHOT), rb"\x50([\x00\x01])", rb"\x58" + _VARINT,
    )
)


def _decode_plain_message(data: Buffer) -> Optional[Message]:
    """Decode a message of numbers alone, as most answers are: 3 us, not 13.  None: another form."""
    plain = _PLAIN_MESSAGE.fullmatch(data)
    if plain is None or plain.group(8) == b"\1":
        return None
    kind, to, sender, term, log_term, index, commit, _, hint = plain.groups()
    return Message(
        _varint_value(kind), to=_varint_value(to), sender=_varint_value(sender),
        term=_varint_value(term), log_term=_varint_value(log_term),
        index=decode_varint(index, 0)[0], commit=decode_varint(commit, 0)[0],
        reject_hint=_varint_value(hint),
    )


def decode_message(data: Buffer) -> Message:
    return finish(decode_message_steps(data))


def decode_message_steps(data: Buffer) -> Generator[None, None, Message]:
    """Decode a message in steps of 1 ms at most, or of one entry.

    Raises CodecError, also for a type that no etcd knows.
    """
    message = _decode_plain_message(data)
    if message is None:
        message = yield from _decode_any_message(data)
    if message.type > MsgType.PRE_VOTE_RESP:
        raise CodecError(f"unknown message type {message.type}")
    return message


STEP_ENTRIES = 200                  # of a peer's message, decoded or checked in one step
STEP_BYTES = 1 << 18                # of data in one step, or more with the last entry


def _decode_any_message(data: Buffer) -> Generator[None, None, Message]:
    entries: List[Entry] = []
    values: Dict[str, Any] = {"type": 0}
    others = work = 0
    for number, wire_type, value in decode_fields(data, MESSAGE_ENTRIES_MAX + FIELDS_MAX):
        if number == 7:
            check_wire_type(wire_type, 2, "Message")
            entries.append(decode_entry(value))
            work += STEP_BYTES // STEP_ENTRIES + len(value)
            if work > STEP_BYTES:
                work = 0
                yield
            continue
        others += 1
        if others > FIELDS_MAX:
            raise CodecError(f"more than {FIELDS_MAX} fields that are no entries")
        known = _MESSAGE.get(number)
        if known is not None:
            name, expected, convert = known
            check_wire_type(wire_type, expected, "Message")
            values[name] = convert(value)
    return Message(entries=entries, **values)


def encode_request(
    request: Request, val: Optional[List[bytes]] = None, prev_value: Optional[List[bytes]] = None
) -> bytes:
    """All fields are written, PrevExist and Refresh only when given.

    val, prev_value  the texts encoded, in pieces, where that is known
    """
    prev_exist, refresh = request.prev_exist, request.refresh
    val = [utf8(request.val)] if val is None else val
    prev_value = [utf8(request.prev_value)] if prev_value is None else prev_value
    return b"".join((
        b"\x08", encode_varint(request.id),
        _bytes_field(b"\x12", request.method.encode()),
        _bytes_field(b"\x1a", utf8(request.path)),
        b"\x22", encode_varint(sum(map(len, val))), *val,
        b"\x28", _BYTE[request.dir],
        b"\x32", encode_varint(sum(map(len, prev_value))), *prev_value,
        b"\x38", encode_varint(request.prev_index),
        b"" if prev_exist is None else b"\x40" + _BYTE[prev_exist],
        b"\x48", encode_varint(request.expiration),
        b"\x50", _BYTE[request.wait],
        b"\x58", encode_varint(request.since),
        b"\x60", _BYTE[request.recursive],
        b"\x68", _BYTE[request.sorted],
        b"\x70", _BYTE[request.quorum],
        b"\x78", encode_varint(request.time),
        b"\x80\x01", _BYTE[request.stream],
        b"" if refresh is None else b"\x88\x01" + _BYTE[refresh],
    ))


def encode_target(method: str, path: str) -> bytes:
    return _bytes_field(b"\x12", method.encode()) + _bytes_field(b"\x1a", utf8(path))


_NO_OPTIONS = encode_request(Request())[len(b"\x08\0\x12\0\x1a\0\x22\0"):]


def encode_plain(id: int, target: bytes, value: bytes) -> bytes:
    """Encode a Request with a value and no option: 0.8 us instead of 2.3.

    target  encode_target() of it
    """
    size = len(value)
    return b'\x08%b%b"%b%b%b' % (
        encode_varint(id), target, _SMALL[size] if size < 1_024 else encode_varint(size), value,
        _NO_OPTIONS,
    )


def wrap_int64(value: int) -> int:
    return (value + (1 << 63) & UINT64_MAX) - (1 << 63)


def _text(value: Buffer) -> str:
    return text_of(bytes(value))


_REQUEST: Schema = {
    1: ("id", 0, int), 2: ("method", 2, _text), 3: ("path", 2, _text), 4: ("val", 2, _text),
    5: ("dir", 0, bool), 6: ("prev_value", 2, _text), 7: ("prev_index", 0, int),
    8: ("prev_exist", 0, bool), 9: ("expiration", 0, wrap_int64), 10: ("wait", 0, bool),
    11: ("since", 0, int), 12: ("recursive", 0, bool), 13: ("sorted", 0, bool),
    14: ("quorum", 0, bool), 15: ("time", 0, wrap_int64), 16: ("stream", 0, bool),
    17: ("refresh", 0, bool),
}
_LONG_REQUEST: Schema = {
    **_REQUEST, 4: ("val", 2, memoryview), 6: ("prev_value", 2, memoryview)
}
LONG_REQUEST_BYTES = 1 << 17        # above: decoded in steps

_PLAIN_REST = b"(\x002\x008\x00H\x00P\x00X\x00`\x00h\x00p\x00x\x00\x80\x01\x00"
_PUT_HEAD = re.compile(rb"\x08([\x80-\xff]{0,9}[\x00-\x7f])\x12\x03PUT\x1a")


def _decode_plain_put(data: bytes) -> Optional[Request]:
    """Decode a PUT of a value without options: 2 us instead of 12.  None: another form."""
    head = _PUT_HEAD.match(data)
    if head is None or not data.endswith(_PLAIN_REST):
        return None
    size, path_at = decode_varint(data, head.end())
    value_tag = path_at + size
    size, value_at = decode_varint(data, value_tag + 1)
    end = value_at + size
    if data[value_tag] != 0x22 or end + len(_PLAIN_REST) != len(data):
        return None
    id, _ = decode_varint(head.group(1), 0)
    return Request(id, "PUT", text_of(data[path_at:value_tag]), text_of(data[value_at:end]))


def decode_request(data: Buffer) -> Optional[Request]:
    """Return the command in a normal entry's data, or None if it is an operation of etcd 3's API.

    A v2 command is a bare Request, or one nested in field 2 of InternalRaftRequest; only a bare
    Request has an upper-case method name there.
    """
    plain = _decode_plain_put(bytes(data))
    if plain is not None:
        return plain
    values = _request_fields(data, _REQUEST)
    return None if values is None else Request(**values)


def _request_fields(data: Buffer, schema: Schema) -> Optional[Dict[str, Any]]:
    nested = next((value for number, _, value in decode_fields(data) if number == 2), None)
    if nested is None:
        return None
    if isinstance(nested, int):
        raise CodecError("Request: method is not a string")
    if bytes(nested[:1]) == b"\x08":
        data = nested
    return decode_known(data, schema, "Request")


def decode_long_request(data: bytes) -> Generator[None, None, Optional[Request]]:
    """Do decode_request() in steps of some ms; long texts become LongText, all are Unicode."""
    values = _request_fields(memoryview(data), _LONG_REQUEST)
    if values is None:
        return None
    for name in ("val", "prev_value"):
        value: Buffer = values.get(name, b"")
        if len(value) > LONG_REQUEST_BYTES // 4:        # even if all have four bytes, it is long
            text: LongText = yield from long_text_steps(value)
            values[name] = text
        else:
            values[name] = as_unicode(_text(value))
    values["path"] = as_unicode(values.get("path", ""))
    return Request(**values)


def decode_request_head(data: bytes) -> Optional[Request]:
    """Do decode_request() without the texts, at once even if they are long."""
    values = _request_fields(memoryview(data), _LONG_REQUEST)
    return None if values is None else Request(**{**values, "val": "", "prev_value": ""})


def encode_request_steps(request: Request) -> Generator[None, None, bytes]:
    """Do encode_request() of long texts in steps of some ms."""
    texts: List[List[bytes]] = [[], []]
    for pieces, text in zip(texts, (request.val, request.prev_value)):
        for start in range(0, len(text), LONG_REQUEST_BYTES):
            pieces.append(utf8(text[start:start + LONG_REQUEST_BYTES]))
            if len(pieces) % 8 == 0:
                yield
    data = encode_request(request, *texts)
    yield                               # the copy took some ms
    return data


def encode_metadata(member_id: int, cluster_id: int) -> bytes:
    """Encode the identity in every WAL file (etcdserverpb.Metadata)."""
    return b"\x08%b\x10%b" % (encode_varint(member_id), encode_varint(cluster_id))


def decode_metadata(data: Buffer) -> Tuple[int, int]:
    """Return (member_id, cluster_id)."""
    schema = {1: ("member_id", 0, int), 2: ("cluster_id", 0, int)}
    values = decode_known(data, schema, "Metadata")
    return values.get("member_id", 0), values.get("cluster_id", 0)


# ============================================================================
# base/urls -- URLs as flags and member lists hold them.
# ============================================================================


def check_url(url: str) -> str:
    """Return `url` as scheme://host:port, or raise ValueError with etcd's words.

    The scheme is in lower case, as etcd writes it: member ids are hashes of these URLs.
    """
    url = url.strip()
    scheme, authority, rest = split_url(url)
    host, port = split_address(authority.rpartition("@")[2])
    if scheme not in ("http", "https"):
        raise ValueError(f"URL scheme must be http or https: {url}")
    if len(port) < 2 or (":" in host and not host.startswith("[")):
        raise ValueError(f'URL address does not have the form "host:port": {url}')
    if rest:
        raise ValueError(f"URL must not contain a path: {url}")
    return f"{scheme}://{authority}"


def usable_urls(urls: Iterable[str]) -> List[str]:
    """Return the `urls` that check_url accepts; an older or another program may have sent them."""
    usable: List[str] = []
    for url in urls:
        with contextlib.suppress(ValueError):
            usable.append(check_url(url))
    return usable


def check_advertised_url(url: str) -> str:
    """Return check_url(url), or raise ValueError if no client could connect to it."""
    checked = check_url(url)
    host, port = url_address(checked)
    if not host or not port:
        raise ValueError(f'URL address does not have the form "host:port": {url.strip()}')
    return checked


def parse_urls(text: str) -> Tuple[str, ...]:
    """Return the URLs of a comma-separated list, sorted as text.  Raises ValueError."""
    return tuple(sorted(check_url(url) for url in text.split(",")))


def is_https(url: str) -> bool:
    return url.startswith("https:")


def url_address(url: str) -> Tuple[str, int]:
    """Return (host, port) of a checked URL; the host of `http://:2379` is ""."""
    parts = urlsplit(url)
    port = parts.port
    if port is None:
        port = 443 if parts.scheme == "https" else 80
    return parts.hostname or "", port


WILDCARD_HOSTS = ("0.0.0.0", "::")


def is_local(url: str) -> bool:
    """True if `url` leads each client to its own machine: loopback, or a wildcard."""
    host = url_address(url)[0]
    is_loopback = host in ("localhost", "::1") or host.startswith("127.") and is_ip(host)
    return is_loopback or host in WILDCARD_HOSTS


# ============================================================================
# base/versions -- Versions of etcd: the identity that a member announces, and the peers that fit it.
# ============================================================================


UNKNOWN_VERSION = "2.0.0"           # of a peer without the header
_VERSION = re.compile(r"(\d{1,9})\.(\d{1,9})\.\d{1,9}(?:[-+].*)?")


def major_minor(version: str) -> Optional[Tuple[int, int]]:
    """Return (major, minor) of a semantic version `a.b.c`; None for any other text."""
    match = _VERSION.fullmatch(version)
    return (int(match.group(1)), int(match.group(2))) if match else None


def version_key(version: str) -> Tuple[int, int]:
    """Return (major, minor) of `a.b.c`.  Raises ValueError."""
    major, minor, _ = version.split(".", 2)
    return int(major), int(minor)


class Identity(NamedTuple):
    """The version of etcd that a member acts as (-compat-version).

    Etcd members refuse peers by the first two; a leader makes the lowest `etcdserver` of all
    members the cluster version.
    """

    server: str             # X-Server-Version: no cluster above its major.minor is joined
    min_cluster: str        # X-Min-Cluster-Version: oldest peer and oldest cluster version
    reported: str           # `etcdserver` in GET /version

    def bears(self, cluster_version: str) -> bool:
        """True if a member of this identity can live in a cluster of that version."""
        return version_key(cluster_version) <= version_key(self.server)

    def refusal(self, headers: Mapping[str, str]) -> str:
        """Return why the two versions in a peer's headers do not fit this identity; "": they do.

        Source: etcd 2.3 rafthttp/http.go, checkClusterCompatibilityFromHeader.
        """
        version = headers.get("x-server-version", UNKNOWN_VERSION)
        server = major_minor(version)
        least = major_minor(headers.get("x-min-cluster-version", UNKNOWN_VERSION))
        remote = f"remote[{headers.get('x-server-from', '')}]={version}"
        if server is None or least is None:
            return f"not a version: {remote}"
        if server < version_key(self.min_cluster):
            return f"remote version is too low: {remote}, local={self.server}"
        if least > version_key(self.server):
            hint = "; start this member with -compat-version 3.4" if least == (3, 0) else ""
            return f"local version is too low: {remote}, local={self.server}{hint}"
        return ""


AUTO_IDENTITY = "auto"
IDENTITIES = {
    "2.3": Identity(SERVER_VERSION, MIN_CLUSTER_VERSION, SERVER_VERSION),
    # Accepted by 2.3 as well, which looks only at the minimum of a newer peer.
    "3.4": Identity("3.4.23", MIN_CLUSTER_VERSION, "3.4.23"),
    # The same to peers, but the cluster version stays at 2.3, so members of 2.3 may come back.
    "bridge": Identity("3.4.23", MIN_CLUSTER_VERSION, SERVER_VERSION),
}
DEFAULT_IDENTITY = IDENTITIES["2.3"]
FIRST_V3_VERSION = (3, 0)


def choose_identity(name: str, *cluster_versions: Optional[str]) -> Identity:
    """Return the identity of -compat-version `name` for a cluster of these versions.

    `auto` is 2.3 unless the cluster bears 3.0 or more: its members refuse 2.3 then.
    """
    if name != AUTO_IDENTITY:
        return IDENTITIES[name]
    keys = [major_minor(version or "") or (0, 0) for version in cluster_versions]
    return IDENTITIES["3.4"] if max(keys, default=(0, 0)) >= FIRST_V3_VERSION else DEFAULT_IDENTITY


# ============================================================================
# raft/progress -- Progress and quorum: a leader's view of its followers, and the messages of one member.
# ----------------------------------------------------------------------------
# Knows neither the log's content nor time nor sockets.
# ============================================================================


class ProgressState(IntEnum):
    """How a leader sends to one follower (Raft thesis §10.2.1, etcd raft/progress.go)."""

    PROBE = 0           # the match is unknown: one MsgApp, then wait for an answer or a heartbeat
    REPLICATE = 1       # the match is known: send ahead, up to the in-flight window
    SNAPSHOT = 2        # a snapshot is under way: send nothing


class Progress:
    """A leader's view of one member, itself included.

    match_index < next_index holds always: everything up to match_index is durable there, and
    next_index is the first entry of the next MsgApp.
    """

    __slots__ = (
        "due", "inflights", "match_index", "next_index", "paused", "pending_snapshot",
        "proposed_index", "recent_active", "state", "_window",
    )

    def __init__(self, next_index: int, window: int, *, match_index: int = 0) -> None:
        self.match_index = match_index
        self.next_index = next_index
        self.state = ProgressState.PROBE
        self.paused = False             # PROBE only: a probe is unanswered
        self.pending_snapshot = 0       # SNAPSHOT only: index of the snapshot under way
        self.recent_active = False      # answered since the last report_unreachable
        self.due = False                # gets a MsgApp, maybe an empty one, at the next ready()
        self.proposed_index = 0         # index of its newest proposal that is not committed
        self.inflights: Deque[int] = collections.deque()    # last index of each unanswered MsgApp
        self._window = window

    @property
    def is_paused(self) -> bool:
        if self.state == ProgressState.REPLICATE:
            return len(self.inflights) >= self._window
        return self.paused or self.state == ProgressState.SNAPSHOT

    def become_probe(self) -> None:
        """Find out where the logs match; after a snapshot, assume that it arrived."""
        self.next_index = max(self.match_index, self.pending_snapshot) + 1
        self._enter(ProgressState.PROBE)

    def become_replicate(self) -> None:
        self._enter(ProgressState.REPLICATE)
        self.next_index = self.match_index + 1

    def become_snapshot(self, index: int) -> None:
        self._enter(ProgressState.SNAPSHOT)
        self.pending_snapshot = index

    def _enter(self, state: ProgressState) -> None:
        self.state = state
        self.paused = False
        self.pending_snapshot = 0
        self.inflights.clear()

    def sent(self, last: int) -> None:
        if self.state == ProgressState.REPLICATE:
            self.next_index = last + 1
            self.inflights.append(last)
        else:
            self.paused = True

    def maybe_update(self, index: int) -> bool:
        """Note that the member holds everything up to `index`; False if that was known."""
        if self.next_index <= index:
            self.next_index = index + 1
        if index <= self.match_index:
            return False
        self.match_index = index
        self.paused = False
        return True

    def acknowledge(self, index: int) -> bool:
        """Handle a positive answer: update, and move on to REPLICATE; False if it was known."""
        if not self.maybe_update(index):
            return False
        if self.state == ProgressState.REPLICATE:
            while self.inflights and self.inflights[0] <= index:
                self.inflights.popleft()
        elif self.match_index >= self.pending_snapshot:
            self.become_replicate()
        return True

    def maybe_decrease(self, rejected: int, hint: int) -> bool:
        """Step back after a rejection; False if the rejection is stale.

        rejected  index of the entry that did not match (that MsgApp's previous index)
        hint      last index of the follower's log
        """
        if self.state == ProgressState.REPLICATE:
            if rejected <= self.match_index:
                return False
            self.become_probe()
            return True
        if self.state == ProgressState.SNAPSHOT or rejected != self.next_index - 1:
            return False
        self.next_index = max(self.match_index + 1, min(rejected, hint + 1))
        self.paused = False
        return True


def quorum_size(voters: int) -> int:
    return voters // 2 + 1


def quorum_index(match_indexes: Iterable[int]) -> int:
    """Return the highest index that a majority has reached; 0 without members."""
    ascending = sorted(match_indexes)
    return ascending[(len(ascending) - 1) // 2] if ascending else 0


_ENTRY_OVERHEAD = 40            # bytes of an encoded entry besides its data, at most


class Mailbox:
    """The messages of one member until ready() takes them.

    Promises (votes, answers to MsgApp) are held until the state that they promise is durable.
    All other messages may leave at once.
    """

    def __init__(self, id: int, forward_bytes_max: int) -> None:
        self.id = id
        self.term = 0                               # stamped on every message; kept by Raft
        self._forward_bytes_max = forward_bytes_max
        self._messages: List[Message] = []
        self._held: List[Message] = []
        self._ack: Optional[Message] = None         # the one positive answer to a MsgApp
        self._forward_to = 0                        # addressee of the MsgProp that may grow
        self._forward: List[Entry] = []
        self._forward_bytes = 0

    def _message(self, kind: MsgType, to: int, fields: Dict[str, Any]) -> Message:
        fields.setdefault("term", self.term)
        return Message(kind, to=to, sender=self.id, **fields)

    def send(self, kind: MsgType, to: int, **fields: Any) -> None:
        """Send a message that promises nothing."""
        self._messages.append(self._message(kind, to, fields))

    def hold(self, kind: MsgType, to: int, **fields: Any) -> None:
        """Send a message when everything that is known now is durable."""
        self._held.append(self._message(kind, to, fields))

    def hold_ack(self, to: int, index: int) -> None:
        """Acknowledge every entry up to `index`; one such answer stands for all before.

        Of two answers to one leader the higher holds: within a term the follower's log only
        grows.  An answer to an earlier leader is dropped, as its entries may be gone by now.
        """
        ack = self._ack
        if ack is None or ack.to != to or ack.term != self.term or ack.index < index:
            self._ack = self._message(MsgType.APP_RESP, to, {"index": index})

    def forward(self, to: int, entries: Sequence[Entry]) -> None:
        """Pass proposals to the leader; those of one turn share a MsgProp, up to a size."""
        size = sum([len(entry.data) + _ENTRY_OVERHEAD for entry in entries])
        if self._forward_to != to or self._forward_bytes + size > self._forward_bytes_max:
            self._forward, self._forward_bytes, self._forward_to = [], 0, to
            self.send(MsgType.PROP, to, term=0, entries=self._forward)
        self._forward.extend(entries)
        self._forward_bytes += size

    @property
    def is_empty(self) -> bool:
        return not (self._messages or self._held or self._ack)

    def take(self) -> Tuple[List[Message], List[Message]]:
        """Return (messages, held ones) since the last call."""
        messages, held = self._messages, self._held
        self._messages, self._held = [], []
        self._forward_to = 0
        if self._ack is not None:
            held.append(self._ack)
            self._ack = None
        return messages, held


# ============================================================================
# raft/log -- The Raft log: its stable, committed and applied parts.
# ============================================================================


class Mark(NamedTuple):
    """The end of the log at one Ready.  Opaque to the server."""

    index: int  # type: ignore[assignment]  # hides tuple.index
    generation: int


_NOWHERE = EntryID(0, 0)


class RaftLog:
    """The entries behind a snapshot point, and four indexes into them.

        offset <= applied <= commit <= last_index        (applied < offset: a snapshot waits)
        stable <= handed <= last_index

    offset    index of the snapshot point; its entry is gone, its term is known
    applied   the state machine has it;  commit: a quorum has it
    handed    given to the disk by Ready;  stable: known to be durable
    generation  grows whenever entries that were handed out are replaced: marks of an earlier
                generation say nothing about the entries that stand there now

    Entries are never changed once appended, only replaced.  Source: etcd raft/log.go.
    """

    def __init__(
        self, offset: EntryID = _NOWHERE, entries: Sequence[Entry] = (), *,
        commit: int = 0, applied: int = 0,
    ) -> None:
        """All of `entries` is durable.  Raises InvariantError if the indexes do not fit."""
        self.offset = self.commit = self.stable = self._handed = offset.index
        self._offset_term = offset.term
        self._entries: List[Entry] = []
        self.generation = 0
        self.pending_snapshot: Optional[Snapshot] = None    # received, not yet handed out
        if entries:
            self.append(entries)
        for entry in entries:
            entry.encoded = None
        self.stable = self._handed = self.last_index
        # A snapshot is committed by nature, though a crash may have kept its HardState off disk.
        self.commit = max(commit, self.offset)
        self.applied = max(applied, self.offset)
        if not self.applied <= self.commit <= self.last_index:
            raise InvariantError(
                f"applied {self.applied}, commit {self.commit} and last index {self.last_index}"
                " must ascend: the log has lost entries"
            )

    @property
    def first_index(self) -> int:
        """Index of the first entry held, or of the next one if there is none."""
        return self.offset + 1

    @property
    def last_index(self) -> int:
        """Index of the last entry, or of the snapshot point."""
        return self.offset + len(self._entries)

    @property
    def last_id(self) -> EntryID:
        last = self._entries[-1].term if self._entries else self._offset_term
        return EntryID(last, self.last_index)

    def term(self, index: int) -> int:
        """Return the term of the entry at `index`, 0 above the last.

        Raises InvariantError below the snapshot point.
        """
        position = index - self.offset
        if position > len(self._entries):
            return 0
        if position > 0:
            return self._entries[position - 1].term
        if position < 0:
            raise InvariantError(f"entry {index} lies before the snapshot point {self.offset}")
        return self._offset_term

    def match_term(self, entry_id: EntryID) -> bool:
        """Tell whether our log holds that entry; False above the last and when compacted."""
        position = entry_id.index - self.offset
        return 0 <= position <= len(self._entries) and self.term(entry_id.index) == entry_id.term

    def is_up_to_date(self, last_id: EntryID) -> bool:
        """Tell whether a log that ends at `last_id` is at least as complete as ours (§5.4.1)."""
        return last_id >= self.last_id

    def slice(self, low: int, high: int, max_bytes: Optional[int] = None) -> List[Entry]:
        """Return the entries low <= index < high, cut to `max_bytes` but at least one.

        Raises InvariantError if the log does not hold them all.
        """
        if low <= self.offset or high > self.last_index + 1:
            raise InvariantError(
                f"entries {low} to {high - 1} are not in the log, which has {self.first_index} to"
                f" {self.last_index}"
            )
        start, end = low - self.offset - 1, high - self.offset - 1
        if max_bytes is None:
            return self._entries[start:end]
        entries = self._entries[start:min(end, start + max_bytes // _ENTRY_OVERHEAD + 1)]
        size = 0
        for count, entry in enumerate(entries):
            size += len(entry.data) + _ENTRY_OVERHEAD
            if size > max_bytes and count:
                return entries[:count]
        return entries

    def data_bytes(self, low: int, high: int) -> int:
        return sum([len(entry.data) for entry in self.slice(low, high)])

    def conf_changes(self, high: int) -> List[int]:
        """Return the indexes of the conf changes that are not applied and lie below `high`."""
        low = max(self.applied, self.offset) + 1
        return [entry.index for entry in self.slice(low, max(low, high)) if entry.type]

    def maybe_append(
        self, previous: EntryID, commit: int, entries: Sequence[Entry]
    ) -> Optional[int]:
        """Append behind `previous` if our log holds it; return the last new index, or None.

        Entries that conflict (same index, other term) and all after them are replaced; entries
        already present are kept, so a delayed duplicate cannot shorten the log.

        commit   leader's commit index; ours becomes min(commit, last new index)
        entries  contiguous, ascending from previous.index + 1; may be empty

        Raises InvariantError if a conflict lies at or below our commit index.
        Source: Raft thesis fig. 3.1 (AppendEntries receiver, rules 2-5).
        """
        if not self.match_term(previous):
            return None
        known = 0
        if previous.index < self.last_index:
            for entry in entries:
                if self.term(entry.index) != entry.term:
                    break
                known += 1
        if known < len(entries):
            self.append(entries[known:] if known else entries)
        last_new = previous.index + len(entries)
        if commit > self.commit:
            self.commit_to(max(self.commit, min(commit, last_new)))
        return last_new

    def append(self, entries: Sequence[Entry]) -> None:
        """Put `entries` (at least one) at their indexes; entries there and behind are dropped.

        Raises InvariantError for a gap and for a change at or below the commit index.
        """
        first = entries[0].index
        if first > self.last_index + 1:
            raise InvariantError(f"entry {first} would leave a gap after {self.last_index}")
        if first <= self.last_index:
            self._truncate(first)
        self._entries.extend(entries)

    def _truncate(self, first: int) -> None:
        if first <= self.commit:
            raise InvariantError(f"entry {first} conflicts with committed entry {self.commit}")
        del self._entries[first - self.offset - 1:]
        if first <= self._handed:
            self._handed = first - 1
            self.stable = min(self.stable, first - 1)
            self.generation += 1

    def commit_to(self, index: int) -> None:
        """Move the commit index.  Raises InvariantError for a step back or past the end."""
        if index < self.commit:
            raise InvariantError(f"commit cannot go back from {self.commit} to {index}")
        if index > self.last_index:
            raise InvariantError(
                f"commit {index} is out of range [last index {self.last_index}]:"
                " was the log corrupted, truncated, or lost?"
            )
        self.commit = index

    def applied_to(self, index: int) -> None:
        if not self.applied <= index <= self.commit:
            raise InvariantError(
                f"applied {index} is out of range [{self.applied}, commit {self.commit}]"
            )
        self.applied = index

    def committed(self, max_entries: int) -> List[Entry]:
        """Return entries that are committed and durable and not applied, the oldest first."""
        if self.applied < self.offset:
            return []               # the state machine must take the snapshot first
        high = min(self.commit, self.stable, self.applied + max_entries)
        return self.slice(self.applied + 1, high + 1) if high > self.applied else []

    def compact(self, index: int) -> None:
        """Move the snapshot point to `index`, unless it is there or further.

        Raises InvariantError if that entry is not applied and durable.
        """
        if index <= self.offset:
            return
        if index > min(self.applied, self.stable):
            raise InvariantError(f"cannot compact to {index}: applied {self.applied}")
        self._offset_term = self.term(index)
        del self._entries[:index - self.offset]
        self.offset = index

    def restore(self, snapshot: Snapshot) -> None:
        """Replace the whole log by a received snapshot.  It is handed out, then durable."""
        if snapshot.index <= self.commit:
            raise InvariantError(f"snapshot {snapshot.index} is behind commit {self.commit}")
        self.offset = self.commit = self._handed = snapshot.index
        self._offset_term = snapshot.term
        self._entries = []
        self.stable = 0
        self.generation += 1
        self.pending_snapshot = snapshot

    @property
    def has_unhanded(self) -> bool:
        return self._handed < self.last_index or self.pending_snapshot is not None

    def hand_out(self) -> Tuple[Optional[Snapshot], List[Entry], Mark]:
        """Return the snapshot and the entries that the disk lacks, and the mark of their end."""
        snapshot, self.pending_snapshot = self.pending_snapshot, None
        entries = self._entries[self._handed - self.offset:]
        self._handed = self.last_index
        return snapshot, entries, Mark(self._handed, self.generation)

    def stable_to(self, mark: Mark) -> bool:
        """Note that the log is durable up to `mark`; False if that was known, or is outdated."""
        if mark.generation != self.generation or mark.index <= self.stable:
            return False
        self.stable = mark.index
        return True


# ============================================================================
# raft/replication -- Replication: the messages that a leader sends to its followers, and reads without an entry.
# ----------------------------------------------------------------------------
# Knows neither roles nor elections.
# ============================================================================


class RaftConfig(NamedTuple):
    """The settings of a Raft, and its ways to the outside.

    rng    anything with randrange(n), e.g. a seeded random.Random
    trace  receives the lines that etcd's raft package logs at info level
    defer_commit  a new commit index alone makes no message before broadcast_commit()
    """

    id: int
    rng: Any
    trace: Callable[[str], None]
    election_ticks: int = 10
    heartbeat_ticks: int = 1
    max_entries_bytes: int = ENTRIES_BYTES_MAX
    max_inflight: int = INFLIGHT_MSGAPP_MAX
    max_uncommitted_bytes: int = UNCOMMITTED_BYTES_MAX
    defer_commit: bool = False


class Replication:
    """The sending side of a leader.  On other members only the ids in `progress` are current.

    A MsgApp waits until send_due(): one per follower and ready(), with all entries proposed
    since, so the work per proposal does not grow with the cluster.
    """

    def __init__(self, config: RaftConfig, log: RaftLog, mail: Mailbox) -> None:
        self.progress: Dict[int, Progress] = {}     # the voters, ascending by id
        # Called for a follower whose entries are compacted; None: not ready, asked again later.
        self.snapshot_source: Callable[[int], Optional[Snapshot]] = lambda peer: None
        self.commit_unsent = False                  # some follower may not know our commit index
        self._config = config
        self._log = log
        self._mail = mail
        self._append_due = False                    # some progress is due
        self._broadcast_due = False                 # every progress is due

    def set_voters(self, voters: Iterable[int]) -> None:
        """Keep the progress of known voters, begin anew with new ones, forget the others."""
        known = self.progress
        self.progress = {
            voter: known.get(voter) or self._new_progress() for voter in sorted(set(voters))
        }

    def _new_progress(self) -> Progress:
        return Progress(self._log.last_index + 1, self._config.max_inflight)

    def reset(self) -> None:
        """Begin a new term: forget everything but the ids."""
        self._append_due = self._broadcast_due = self.commit_unsent = False
        self.progress = {voter: self._new_progress() for voter in self.progress}

    @property
    def quorum_index(self) -> int:
        """The highest index that is durable on a majority."""
        return quorum_index([progress.match_index for progress in self.progress.values()])

    @property
    def is_due(self) -> bool:
        return self._append_due or self._broadcast_due

    def mark_due(self, progress: Progress) -> None:
        """Make the next send_due() send a MsgApp to one follower, an empty one if need be."""
        progress.due = self._append_due = True

    def mark_all_due(self) -> None:
        self._broadcast_due = True

    def note_proposer(self, member: int) -> None:
        """The last entries come from a member's clients, which wait until it knows the commit."""
        if member in self.progress:
            self.progress[member].proposed_index = self._log.last_index

    def mark_commit_due(self, index: int, *, at_once: bool) -> None:
        """Send the new commit index `index` to all, or with defer_commit only to proposers.

        The other followers hear of it with the next entries, mostly within a millisecond: where
        writes come one by one, half of all messages would carry nothing but a commit index.

        at_once  send it to all: voters change, and a member that leaves must hear of it while it
                 gets messages
        """
        if at_once or not self._config.defer_commit:
            self.mark_all_due()
            return
        self.commit_unsent = len(self.progress) > 1
        for progress in self.progress.values():
            if progress.proposed_index:
                self.mark_due(progress)
                if progress.proposed_index <= index:
                    progress.proposed_index = 0

    def send_due(self) -> None:
        """Send a MsgApp, or a MsgSnap, to every follower that is due and not paused."""
        everyone = self._broadcast_due
        self._append_due = self._broadcast_due = False
        self.commit_unsent = self.commit_unsent and not everyone
        batches: Dict[int, List[Entry]] = {}        # next index -> entries, shared by the peers
        for peer, progress in self.progress.items():
            if (everyone or progress.due) and peer != self._config.id:
                progress.due = False
                if not progress.is_paused:
                    self._send_append(peer, progress, batches)

    def _send_append(
        self, peer: int, progress: Progress, batches: Dict[int, List[Entry]]
    ) -> None:
        log, following = self._log, progress.next_index
        if following <= log.offset:
            self._send_snapshot(peer, progress)
            return
        entries = batches.get(following)
        if entries is None:
            entries = log.slice(following, log.last_index + 1, self._config.max_entries_bytes)
            batches[following] = entries
        self._mail.send(
            MsgType.APP, peer, index=following - 1, log_term=log.term(following - 1),
            entries=entries, commit=log.commit,
        )
        if entries:
            progress.sent(entries[-1].index)

    def _send_snapshot(self, peer: int, progress: Progress) -> None:
        """Send the state instead of compacted entries, if the peer answers and a snapshot fits."""
        if not progress.recent_active:
            return
        snapshot, log = self.snapshot_source(peer), self._log
        if snapshot is None or snapshot.index > log.commit:
            return                                  # tried again at its next heartbeat answer
        if not log.match_term(EntryID(snapshot.term, snapshot.index)):
            return                                  # of another log, or older than ours begins
        self._mail.send(MsgType.SNAP, peer, snapshot=snapshot)
        progress.become_snapshot(snapshot.index)

    def send_heartbeats(self, context: Optional[bytes]) -> None:
        """Keep every follower from campaigning, and resume paused probes.

        context  comes back with the answers (PendingReads)
        """
        for peer, progress in self.progress.items():
            if peer != self._config.id:
                # Not beyond its match: it may not hold those entries, or other ones there.
                commit = min(progress.match_index, self._log.commit)
                self._mail.send(MsgType.HEARTBEAT, peer, commit=commit, context=context)
                progress.paused = False

    def handle_reject(self, message: Message) -> None:
        """Go back and try again: the entry before our MsgApp did not match."""
        progress = self.progress[message.sender]
        progress.recent_active = True
        if progress.maybe_decrease(message.index, message.reject_hint):
            self.mark_due(progress)

    def handle_ack(self, message: Message) -> bool:
        """Note that a follower has everything up to message.index; False if that was known."""
        progress, last = self.progress[message.sender], self._log.last_index
        progress.recent_active = True
        was_paused = progress.is_paused
        if message.index > last or not progress.acknowledge(message.index):
            return False                            # no follower can hold more than its leader
        if was_paused or progress.next_index <= last:
            self.mark_due(progress)
        return True

    def handle_heartbeat_resp(self, message: Message) -> None:
        """Note that a follower is alive; if it may lack entries, send."""
        progress = self.progress[message.sender]
        progress.recent_active = True
        if progress.state == ProgressState.REPLICATE and progress.is_paused:
            progress.inflights.popleft()            # its answers may be lost: go on carefully
        if progress.match_index < self._log.last_index:
            # An empty MsgApp is useful, too: if entries were lost, it will be rejected.
            self.mark_due(progress)

    def heard_quorum(self) -> bool:
        """True if a majority, ourselves included, has answered since the last call."""
        heard = sum(p.recent_active or id == self._config.id for id, p in self.progress.items())
        for progress in self.progress.values():
            progress.recent_active = False
        return heard >= quorum_size(len(self.progress))

    def unreachable(self, peer: int) -> None:
        """Stop sending ahead: a message to `peer` was lost."""
        progress = self.progress.get(peer)
        if progress is not None:
            progress.recent_active = False
            if progress.state == ProgressState.REPLICATE:
                progress.become_probe()

    def snapshot_done(self, peer: int, *, ok: bool) -> None:
        """The snapshot to `peer` left this member completely (ok), or failed."""
        progress = self.progress.get(peer)
        if progress is None or progress.state != ProgressState.SNAPSHOT:
            return
        if not ok:
            progress.pending_snapshot = 0           # probe behind the match again
        progress.become_probe()
        progress.paused = True                      # until the next heartbeat: time to load it


class ReadRound(NamedTuple):
    """One check that a leader still leads."""

    commit: int             # its commit index when the read came
    requester: int
    heard: Set[int]         # voters that have confirmed


class PendingReads:
    """Reads that see every write acknowledged before them, without an entry in the log.

    A leader notes its commit index, checks with a heartbeat whether it still leads, and when a
    majority has confirmed, everything up to that index may be read (thesis §6.4).
    """

    def __init__(self, id: int, mail: Mailbox) -> None:
        self.confirmed: List[Tuple[bytes, int]] = []    # (context, index) of this member's reads
        self._rounds: Dict[bytes, ReadRound] = {}       # leader only, oldest first
        self._id = id
        self._mail = mail

    @property
    def newest(self) -> Optional[bytes]:
        """The context that a heartbeat has to carry; None without a round."""
        return next(reversed(self._rounds), None) if self._rounds else None

    def clear(self) -> None:
        self._rounds.clear()

    def begin(self, context: bytes, index: int, requester: int) -> None:
        if len(self._rounds) < READ_ROUNDS_MAX:
            self._rounds[context] = ReadRound(index, requester, set())

    def confirm(self, context: bytes, voter: int, quorum: int) -> None:
        """Leader: `voter` has answered a heartbeat that was sent after the round began."""
        confirmed = self._rounds.get(context)
        if confirmed is None:
            return
        confirmed.heard.add(voter)
        if len(confirmed.heard) >= quorum:
            for earlier in list(self._rounds):      # a round confirms those before it as well
                self._release(earlier, self._rounds.pop(earlier))
                if earlier == context:
                    return

    def _release(self, context: bytes, confirmed: ReadRound) -> None:
        if confirmed.requester == self._id:
            self.confirmed.append((context, confirmed.commit))
        else:
            self._mail.send(
                MsgType.READ_INDEX_RESP, confirmed.requester, index=confirmed.commit,
                entries=[Entry(data=context)],
            )


# ============================================================================
# raft/core -- The Raft core: elections, replication, commitment.
# ----------------------------------------------------------------------------
# Messages and ticks go in, Ready comes out.
# Sources: Ongaro's thesis (fig. 3.1, chapters 3, 4, 6.4.1, 10.6, 11.2) and etcd 2.3 raft/raft.go,
# whose wire behaviour this is; rules of 3.x are named.
# ============================================================================


CAMPAIGN_TRANSFER = b"CampaignTransfer"     # context of a MsgVote that a leader asked for (3.x)


class RaftRole(IntEnum):
    """The role of a member at its term."""

    FOLLOWER = 0
    CANDIDATE = 1
    LEADER = 2
    PRE_CANDIDATE = 3


class Status(NamedTuple):
    """A copy of a member's state.  progress: id -> (match, next, state name), leader only."""

    id: int
    term: int
    vote: int
    commit: int
    applied: int
    role: RaftRole
    lead: int
    progress: Dict[int, Tuple[int, int, str]]


class Raft:
    """One member's protocol state.  Ids are 64-bit ints, 0 is no member.

    Messages gather in `mail` until RawNode.ready() takes them.
    """

    def __init__(self, config: RaftConfig, log: RaftLog, term: int, vote: int,
                 voters: Sequence[int]) -> None:
        self.config = config
        self.id = config.id
        self.log = log
        self.term = term
        self.vote = vote
        self.lead = 0
        self.role = RaftRole.FOLLOWER
        self.removed = False                        # own removal was applied: never propose again
        self.votes: Dict[int, bool] = {}            # answers to the running candidacy
        self.pre_vote = False                       # all voters understand MsgPreVote
        self.election_elapsed = 0       # ticks since the leader was heard; leader: since it checked
        self.heartbeat_elapsed = 0
        self.election_timeout = 0                   # redrawn at every reset
        self.transferee = 0             # leader: target of the leadership transfer under way
        self.pending_conf_index = 0                 # leader: last conf change in the log
        self.applied_conf_index = 0                 # last conf change that was applied
        self.uncommitted_bytes = 0                  # leader: data behind the commit index
        self.mail = Mailbox(config.id, config.max_entries_bytes)
        self.replication = Replication(config, log, self.mail)
        self.reads = PendingReads(config.id, self.mail)
        self._handlers = _FOLLOWER
        self.replication.set_voters(voters)
        self.become_follower(term, 0)

    # -- membership ----------------------------------------------------------

    @property
    def progress(self) -> Dict[int, Progress]:
        """Id of each voter, ascending -> its progress, which is current on a leader only."""
        return self.replication.progress

    @property
    def voters(self) -> Tuple[int, ...]:
        return tuple(self.progress)

    @property
    def quorum(self) -> int:
        return quorum_size(len(self.progress))

    def apply_conf_change(self, change: ConfChange) -> None:
        """Apply a committed change of the voters; node_id 0: refused, it only stops to be pending.

        Differs from etcd 3.4: learners are not tracked, so a leader sends them nothing.
        """
        pending = self.log.conf_changes(self.log.commit + 1)
        unapplied = [index for index in pending if index > self.applied_conf_index]
        if unapplied:
            self.applied_conf_index = unapplied[0]
        if change.node_id and change.type == ConfChangeType.ADD_NODE:
            self._add_voter(change.node_id)
        elif change.node_id and change.type == ConfChangeType.REMOVE_NODE:
            self._remove_voter(change.node_id)

    def _add_voter(self, member: int) -> None:
        if member == self.id:
            self.removed = False
        if member not in self.progress:
            self.replication.set_voters((*self.progress, member))
            self.replication.mark_due(self.progress[member])

    def _remove_voter(self, member: int) -> None:
        if member == self.id:
            self.removed = True
        if self.progress.pop(member, None) is None or self.role is not RaftRole.LEADER:
            return
        if self.transferee == member:
            self.transferee = 0
        self._maybe_commit()            # a smaller quorum may have been reached already

    # -- roles ---------------------------------------------------------------

    def _reset(self, term: int) -> None:
        if term != self.term:
            self.term = term
            self.vote = 0
        self.lead = 0
        self.votes = {}
        self.election_elapsed = self.heartbeat_elapsed = 0
        ticks = self.config.election_ticks
        self.election_timeout = ticks + self.config.rng.randrange(ticks)
        self.transferee = 0
        self.mail.term = term
        self.replication.reset()
        self.reads.clear()

    def become_follower(self, term: int, lead: int) -> None:
        self._reset(term)
        self.lead = lead
        self.role, self._handlers = RaftRole.FOLLOWER, _FOLLOWER
        self.config.trace(f"{self.id:x} became follower at term {term}")

    def _become_pre_candidate(self) -> None:
        """Find out whether an election could be won, before the term goes up (thesis §9.6)."""
        self.lead, self.votes, self.election_elapsed = 0, {}, 0
        self.role, self._handlers = RaftRole.PRE_CANDIDATE, _PRE_CANDIDATE
        self.config.trace(f"{self.id:x} became pre-candidate at term {self.term}")

    def _become_candidate(self) -> None:
        self._reset(self.term + 1)
        self.vote = self.id
        self.role, self._handlers = RaftRole.CANDIDATE, _CANDIDATE
        self.config.trace(f"{self.id:x} became candidate at term {self.term}")

    def _become_leader(self) -> None:
        """Take the lead, and append an empty entry of the own term: only by counting entries of
        its own term may a leader commit older ones (§5.4.2), and a client's may be long in coming.
        """
        self._reset(self.term)
        self.lead = self.id
        self.role, self._handlers = RaftRole.LEADER, _LEADER
        log = self.log
        self.progress[self.id].maybe_update(log.stable)
        self.uncommitted_bytes = log.data_bytes(log.commit + 1, log.last_index + 1)
        # A second change before the first is applied could form two disjoint majorities (§4.1).
        self.pending_conf_index = max(log.conf_changes(log.last_index + 1), default=0)
        self.config.trace(f"{self.id:x} became leader at term {self.term}")
        self._append_own([Entry()])

    # -- time ----------------------------------------------------------------

    def tick(self) -> None:
        if self.role is RaftRole.LEADER:
            self._tick_heartbeat()
        else:
            self._tick_election()

    def _tick_election(self) -> None:
        self.election_elapsed += 1
        if self.id not in self.progress:
            self.election_elapsed = 0
        elif self.election_elapsed >= self.election_timeout:
            self._campaign(None)

    def _tick_heartbeat(self) -> None:
        self.election_elapsed += 1
        if self.election_elapsed >= self.config.election_ticks:
            self.election_elapsed = 0
            if not self.replication.heard_quorum():
                # A leader without a quorum must not keep clients waiting (§6.2).
                self.config.trace(f"{self.id:x} stepped down: no answer of a majority")
                self.become_follower(self.term, 0)
                return
            self.transferee = 0         # it did not take over: serve proposals again
        self.heartbeat_elapsed += 1
        if self.heartbeat_elapsed >= self.config.heartbeat_ticks:
            self.heartbeat_elapsed = 0
            self.replication.send_heartbeats(self.reads.newest)

    # -- elections -----------------------------------------------------------

    def _campaign(self, context: Optional[bytes]) -> None:
        """Start an election, unless this member may not lead.

        A committed conf change that is not applied yet forbids it: an election by the voters of
        two changes before could give the term a second leader.
        """
        if self.id not in self.progress or self.log.conf_changes(self.log.commit + 1):
            return
        self.config.trace(f"{self.id:x} is starting a new election at term {self.term}")
        if self.pre_vote and context is None and self.quorum > 1:
            self._become_pre_candidate()
            self._request_votes(MsgType.PRE_VOTE, self.term + 1, None)
        else:
            self._start_election(context)

    def _start_election(self, context: Optional[bytes]) -> None:
        self._become_candidate()
        self._request_votes(MsgType.VOTE, self.term, context)
        if self.quorum == 1:
            self._become_leader()

    def _request_votes(self, kind: MsgType, term: int, context: Optional[bytes]) -> None:
        """Vote for ourselves, and request the votes of the others at `term`."""
        self._count_vote(self.id, granted=True)
        last, name = self.log.last_id, "pre-vote" if kind == MsgType.PRE_VOTE else "vote"
        for peer in self.progress:
            if peer != self.id:
                self.config.trace(
                    f"{self.id:x} [logterm: {last.term}, index: {last.index}] sent {name}"
                    f" request to {peer:x} at term {self.term}"
                )
                self.mail.hold(
                    kind, peer, index=last.index, log_term=last.term, context=context, term=term
                )

    def _count_vote(self, voter: int, *, granted: bool) -> None:
        answer = "vote" if granted else "vote rejection"
        self.config.trace(f"{self.id:x} received {answer} from {voter:x} at term {self.term}")
        self.votes.setdefault(voter, granted)       # a duplicate cannot change an answer

    def _hup(self, message: Message) -> None:
        self._campaign(CAMPAIGN_TRANSFER if message.type == MsgType.TIMEOUT_NOW else None)

    def _pre_candidate_resp(self, message: Message) -> None:
        """Handle an answer to MsgPreVote; a grant carries the term of the request."""
        if message.reject or message.term == self.term + 1:
            self._candidate_vote_resp(message)

    def _candidate_vote_resp(self, message: Message) -> None:
        self._count_vote(message.sender, granted=not message.reject)
        answers = [self.votes[voter] for voter in self.progress if voter in self.votes]
        grants, rejections = answers.count(True), answers.count(False)
        tally = f"{grants} votes and {rejections} vote rejections"
        self.config.trace(f"{self.id:x} [quorum:{self.quorum}] has received {tally}")
        if grants >= self.quorum and self.id in self.progress:
            if self.role is RaftRole.PRE_CANDIDATE:
                self._start_election(None)
            else:
                self._become_leader()
        elif rejections >= self.quorum:
            self.become_follower(self.term, 0)

    def _vote(self, message: Message) -> None:
        """Vote once per term, and only for a log as complete as ours (§5.2, §5.4.1).

        A candidate and a leader have voted for themselves, so the rule is the same for all.
        """
        candidate = EntryID(message.log_term, message.index)
        free = self.vote == message.sender or (not self.vote and not self.lead)
        granted = free and self.log.is_up_to_date(candidate)
        ours, verb = self.log.last_id, "voted for" if granted else "rejected vote from"
        self.config.trace(
            f"{self.id:x} [logterm: {ours.term}, index: {ours.index}, vote: {self.vote:x}]"
            f" {verb} {message.sender:x} [logterm: {candidate.term}, index: {candidate.index}]"
            f" at term {self.term}"
        )
        if granted:
            self.vote = message.sender
            self.election_elapsed = 0
        self.mail.hold(MsgType.VOTE_RESP, message.sender, reject=not granted)

    def _pre_vote(self, message: Message) -> None:
        """Tell a 3.x member whether an election makes sense; promises and changes nothing.

        The answer is no while a leader is heard (thesis §9.6).  A grant carries the term of the
        request.
        """
        hears_leader = self.lead and self.election_elapsed < self.config.election_ticks
        free = message.term > self.term or self.vote in (0, message.sender)
        candidate = EntryID(message.log_term, message.index)
        granted = free and not hears_leader and self.log.is_up_to_date(candidate)
        self.mail.hold(
            MsgType.PRE_VOTE_RESP, message.sender, reject=not granted,
            term=message.term if granted else self.term,
        )

    # -- messages ------------------------------------------------------------

    def step(self, message: Message) -> None:
        """Handle one message; term 0 marks local ones and proposals.

        Raises ProposalDropped for a MsgProp that cannot be handled here.
        """
        kind = message.type
        if message.term > self.term and kind != MsgType.PRE_VOTE and (
            kind != MsgType.PRE_VOTE_RESP or message.reject
        ):
            self._handle_higher_term(message)
        elif 0 < message.term < self.term:
            self._handle_lower_term(message)
            return
        handler = self._handlers.get(kind)
        if handler is not None:
            handler(self, message)

    def _handle_higher_term(self, message: Message) -> None:
        kind = MsgType(message.type).name.title().replace("_", "")
        self.config.trace(
            f"{self.id:x} [term: {self.term}] received a Msg{kind} message with higher term"
            f" from {message.sender:x} [term: {message.term}]"
        )
        lead = message.sender if message.type in _FROM_LEADER else 0
        self.become_follower(message.term, lead)

    def _handle_lower_term(self, message: Message) -> None:
        """Tell a 3.x leader of an older term that it is deposed, else ignore the message.

        Without this answer a member whose term ran ahead is shut out for ever: leaders that check
        their quorum ignore its MsgVote.  Source: etcd 3.1 raft.go, Step.
        """
        if message.type == MsgType.APP or message.type == MsgType.HEARTBEAT:
            self.mail.hold(MsgType.APP_RESP, message.sender)
        elif message.type == MsgType.PRE_VOTE:
            self.mail.hold(MsgType.PRE_VOTE_RESP, message.sender, reject=True)

    # -- proposals -----------------------------------------------------------

    def _forward_prop(self, message: Message) -> None:
        """Forward to the leader, but never back to the sender: two members that take each other
        for the leader would send it to and fro."""
        if not self.lead or message.sender == self.lead:
            raise ProposalDropped(f"{self.id:x} no leader at term {self.term}")
        self.mail.forward(self.lead, message.entries)

    def _leader_prop(self, message: Message) -> None:
        if self.transferee:
            raise ProposalDropped(f"{self.id:x} is transferring leadership to {self.transferee:x}")
        size = sum([len(entry.data) for entry in message.entries])
        uncommitted = self.uncommitted_bytes
        if uncommitted and size and uncommitted + size > self.config.max_uncommitted_bytes:
            raise ProposalDropped(f"{self.id:x} has {uncommitted} bytes that are not committed")
        self._append_own(message.entries)
        self.replication.note_proposer(message.sender)

    def _append_own(self, entries: Sequence[Entry]) -> None:
        """Append to the leader's log; the next ready() sends the entries in one MsgApp."""
        term, index = self.term, self.log.last_index
        appended: List[Entry] = []
        size = 0
        for entry in entries:
            index += 1
            if entry.type:
                if self.pending_conf_index > max(self.applied_conf_index, self.log.applied):
                    entry = Entry()     # one at a time: this one becomes a no-op (§4.1)
                else:
                    self.pending_conf_index = index
            entry.term, entry.index, entry.encoded = term, index, b""
            size += len(entry.data)
            appended.append(entry)
        if appended:
            self.uncommitted_bytes += size
            self.log.append(appended)
            self.replication.mark_all_due()

    # -- replication: leader -------------------------------------------------

    def _leader_app_resp(self, message: Message) -> None:
        if message.reject:
            self.replication.handle_reject(message)
        elif self.replication.handle_ack(message):
            self._maybe_commit()
            if message.sender == self.transferee and message.index == self.log.last_index:
                self.mail.send(MsgType.TIMEOUT_NOW, message.sender)

    def _leader_heartbeat_resp(self, message: Message) -> None:
        self.replication.handle_heartbeat_resp(message)
        self.reads.confirm(message.context or b"", message.sender, self.quorum)

    def _leader_read_index(self, message: Message) -> None:
        """Begin a read round.  Not before the first commit of its term, as until then a leader may
        not know the newest commit index (thesis §6.4)."""
        if message.entries and self.log.term(self.log.commit) == self.term:
            context = message.entries[0].data
            self.reads.begin(context, self.log.commit, message.sender or self.id)
            if self.id in self.progress:
                self.reads.confirm(context, self.id, self.quorum)
            self.replication.send_heartbeats(context)

    def _leader_transfer(self, message: Message) -> None:
        """Transfer leadership to message.sender as soon as its log is complete (thesis §3.10)."""
        progress = self.progress.get(message.sender)
        if progress is None or message.sender == self.id:
            return
        self.transferee, self.election_elapsed = message.sender, 0
        if progress.match_index == self.log.last_index:
            self.mail.send(MsgType.TIMEOUT_NOW, message.sender)
        else:
            self.replication.mark_due(progress)

    def on_stable(self) -> None:
        """More of our log is durable: only now does a leader count itself (thesis §10.2.1)."""
        if self.role is RaftRole.LEADER and self.id in self.progress:
            self.progress[self.id].maybe_update(self.log.stable)
            self._maybe_commit()

    def _maybe_commit(self) -> None:
        """Commit the entries that a majority holds, if the last is of this term (§5.4.2)."""
        log = self.log
        index = self.replication.quorum_index
        if index <= log.commit or log.term(index) != self.term:
            return
        self.uncommitted_bytes -= log.data_bytes(log.commit + 1, index + 1)
        changes_voters = log.commit < self.pending_conf_index <= index
        self.replication.mark_commit_due(index, at_once=changes_voters)
        log.commit_to(index)

    # -- replication: follower -----------------------------------------------

    def _follow_sender(self, message: Message) -> None:
        self.election_elapsed = 0
        self.lead = message.sender

    def _follower_app(self, message: Message) -> None:
        self._follow_sender(message)
        log = self.log
        if message.index < log.commit:
            self.mail.hold_ack(message.sender, log.commit)
            return
        previous = EntryID(message.log_term, message.index)
        last_new = log.maybe_append(previous, message.commit, message.entries)
        if last_new is not None:
            self.mail.hold_ack(message.sender, last_new)
        else:
            self.mail.hold(
                MsgType.APP_RESP, message.sender, index=message.index, reject=True,
                reject_hint=log.last_index,
            )

    def _follower_heartbeat(self, message: Message) -> None:
        self._follow_sender(message)
        if message.commit > self.log.commit:
            self.log.commit_to(message.commit)
        # The answer promises nothing, so it need not wait for the disk.  3.x counts the context.
        self.mail.send(MsgType.HEARTBEAT_RESP, message.sender, context=message.context)

    def _follower_read_index(self, message: Message) -> None:
        if self.lead and not message.sender:        # our own; other members ask the leader
            self.mail.send(MsgType.READ_INDEX, self.lead, term=0, entries=message.entries)

    def _follower_read_index_resp(self, message: Message) -> None:
        if message.entries and message.sender == self.lead:
            self.reads.confirmed.append((message.entries[0].data, message.index))

    def _follower_snap(self, message: Message) -> None:
        self._follow_sender(message)
        if message.snapshot is not None and message.snapshot.index > self.log.commit:
            self._restore(message.snapshot)
        self.mail.hold_ack(message.sender, self.log.commit)

    def _restore(self, snapshot: Snapshot) -> None:
        """Replace the log by a snapshot, or commit up to it if the log holds its last entry."""
        log = self.log
        if log.match_term(EntryID(snapshot.term, snapshot.index)):
            log.commit_to(snapshot.index)
            return
        log.restore(snapshot)
        self.replication.set_voters(snapshot.voters)
        self.config.trace(
            f"{self.id:x} [commit: {log.commit}] restored snapshot"
            f" [index: {snapshot.index}, term: {snapshot.term}]"
        )

    def _yield_to_leader(self, message: Message) -> None:
        """End the candidacy: another member leads this term."""
        self.become_follower(self.term, message.sender)
        _FOLLOWER[message.type](self, message)


_FROM_LEADER = frozenset((MsgType.APP, MsgType.HEARTBEAT, MsgType.SNAP))
_RESPONSES = frozenset((
    MsgType.APP_RESP, MsgType.VOTE_RESP, MsgType.HEARTBEAT_RESP, MsgType.PRE_VOTE_RESP,
))

_FOLLOWER: Dict[int, Callable[[Raft, Message], None]] = {
    MsgType.HUP: Raft._hup,
    MsgType.PROP: Raft._forward_prop,
    MsgType.APP: Raft._follower_app,
    MsgType.HEARTBEAT: Raft._follower_heartbeat,
    MsgType.SNAP: Raft._follower_snap,
    MsgType.VOTE: Raft._vote,
    MsgType.PRE_VOTE: Raft._pre_vote,
    MsgType.TIMEOUT_NOW: Raft._hup,
    MsgType.READ_INDEX: Raft._follower_read_index,
    MsgType.READ_INDEX_RESP: Raft._follower_read_index_resp,
}
_CANDIDATE: Dict[int, Callable[[Raft, Message], None]] = {
    MsgType.HUP: Raft._hup,
    MsgType.PROP: Raft._forward_prop,     # refuses it: a candidate knows no leader
    MsgType.APP: Raft._yield_to_leader,
    MsgType.HEARTBEAT: Raft._yield_to_leader,
    MsgType.SNAP: Raft._yield_to_leader,
    MsgType.VOTE: Raft._vote,
    MsgType.VOTE_RESP: Raft._candidate_vote_resp,
    MsgType.PRE_VOTE: Raft._pre_vote,
}
_PRE_CANDIDATE: Dict[int, Callable[[Raft, Message], None]] = {
    **_CANDIDATE, MsgType.PRE_VOTE_RESP: Raft._pre_candidate_resp,
}
del _PRE_CANDIDATE[MsgType.VOTE_RESP]
_LEADER: Dict[int, Callable[[Raft, Message], None]] = {
    MsgType.PROP: Raft._leader_prop,
    MsgType.APP_RESP: Raft._leader_app_resp,
    MsgType.HEARTBEAT_RESP: Raft._leader_heartbeat_resp,
    MsgType.VOTE: Raft._vote,
    MsgType.PRE_VOTE: Raft._pre_vote,
    MsgType.TRANSFER_LEADER: Raft._leader_transfer,
    MsgType.READ_INDEX: Raft._leader_read_index,
}


# ============================================================================
# raft/node -- RawNode: the core with its log, as the member drives it.
# ============================================================================


class Ready(NamedTuple):
    """The next work of the server, in this order where the order matters.

    snapshot    received: save it, then give it to the state machine
    entries     append to the WAL; they may rewrite a suffix that was handed out before
    hard_state  write it behind the entries; None if unchanged since the last Ready
    must_sync   the above needs an fsync before `held` may leave
    messages    may be sent at once, before anything is written
    held        may be sent only when this Ready and all before it are durable
    mark        goes to persisted() when this Ready is durable
    """

    hard_state: Optional[HardState]
    entries: List[Entry]
    snapshot: Optional[Snapshot]
    must_sync: bool
    messages: List[Message]
    held: List[Message]
    mark: Mark


_FRESH = HardState()


class RawNode:
    """The interface of a Raft for the server and the simulator.  Thread: reactor.

    The cycle: step, tick, propose -> ready() -> write and sync -> persisted(mark) ->
    committed_entries() -> apply (apply_conf_change for conf changes) -> applied_to(index).
    Several Readys may be on their way to the disk; they become durable in order.
    """

    def __init__(
        self, config: RaftConfig, *, hard_state: HardState = _FRESH,
        snapshot: Optional[Snapshot] = None, entries: Sequence[Entry] = (), applied: int = 0,
    ) -> None:
        """Restart from the state on disk; without arguments: a joiner that knows no other member.

        snapshot  only its index, term and voters are used
        applied   index of the state machine (0: at the snapshot)

        Raises InvariantError if hard_state.commit lies behind the last entry.
        """
        point = snapshot or Snapshot()
        if entries and entries[0].term < point.term:
            entries = ()        # a crash kept the tail of the log that the snapshot replaced
        log = RaftLog(
            EntryID(point.term, point.index), entries, commit=hard_state.commit, applied=applied
        )
        self.raft = Raft(config, log, hard_state.term, hard_state.vote, point.voters)
        self._hard_state = hard_state       # as of the last Ready
        last = log.last_id
        config.trace(
            f"newRaft {config.id:x} [peers: [{','.join(f'{voter:x}' for voter in point.voters)}],"
            f" term: {hard_state.term}, commit: {log.commit}, applied: {log.applied},"
            f" lastindex: {last.index}, lastterm: {last.term}]"
        )

    @classmethod
    def bootstrap(cls, config: RaftConfig, entries: Sequence[Entry]) -> RawNode:
        """Return a member of a new cluster, whose first Ready holds `entries`.

        entries  one ConfChange per initial member at indexes 1..n, term 1, equal everywhere:
                 they count as committed without any message (etcd 2.3 raft/node.go, StartNode)
        """
        node = cls(config)
        raft = node.raft
        raft.become_follower(1, 0)
        raft.log.append(entries)
        raft.log.commit_to(raft.log.last_index)
        raft.replication.set_voters(decode_conf_change(entry.data).node_id for entry in entries)
        return node

    def tick(self, count: int = 1) -> None:
        for _ in range(count):
            self.raft.tick()

    def advance_ticks(self, count: int) -> None:
        """Shorten the first wait at start-up: ticks that pass without an election."""
        self.raft.election_elapsed += count

    def campaign(self) -> None:
        """Start an election now, if this member may lead and does not."""
        self.raft.step(Message(MsgType.HUP))

    def transfer_leader(self, to: int) -> None:
        """Leader: let `to` campaign once its log is complete, and refuse proposals meanwhile.

        Gives up after election_ticks.
        """
        self.raft.step(Message(MsgType.TRANSFER_LEADER, sender=to))

    def step(self, message: Message) -> None:
        """Handle a message from the network; stale, foreign and nonsensical ones are dropped.

        Raises ProposalDropped for a MsgProp that cannot be handled here.
        """
        raft, kind = self.raft, message.type
        if message.to != raft.id or message.sender == raft.id:
            return
        if kind == MsgType.PROP:
            # Copies: the leader numbers the entries, and a duplicate may share them.
            entries = [Entry(e.type, 0, 0, e.data, e.request) for e in message.entries]
            self.propose(*entries, sender=message.sender)
        elif (
            (not message.term and kind != MsgType.READ_INDEX)
            or kind in LOCAL_MESSAGES
            or (kind in _RESPONSES and message.sender not in raft.progress)
            or (kind == MsgType.APP and not _is_contiguous(message))
        ):
            return
        else:
            raft.step(message)

    def protocol_violation(self, message: Message) -> str:
        """Return the reason why no healthy member sends this message to us, or "".

        A message without one leaves a log that can be read, and a next term that can be written.
        """
        raft, kind = self.raft, message.type
        if kind in LOCAL_MESSAGES:
            return "such a message never leaves its member"
        if kind == MsgType.PROP and not message.entries:
            return "it proposes nothing"
        if message.term > raft.term + TERM_LEAP_MAX:
            return f"no election leads from term {raft.term} to term {message.term}"
        if max(message.index, message.commit, message.reject_hint) > INDEX_MAX:
            return "no log has such an index"
        if kind == MsgType.APP:
            return _append_violation(message)
        if kind == MsgType.SNAP:
            return _snapshot_violation(message)
        last = raft.log.last_index
        if kind == MsgType.HEARTBEAT and message.term >= raft.term and message.commit > last:
            return (
                f"the leader has heard from us of entry {message.commit}, but our last one is"
                f" {last}: this member has lost a part of its log; {REPAIR_HINT}"
            )
        return ""

    def propose(self, *entries: Entry, sender: int = 0) -> None:
        """Propose all of `entries` for member `sender` (0: this one).

        A leader numbers and appends these very objects.  Raises ProposalDropped, for all of them,
        without a leader, after the own removal, or while too much is uncommitted.  Without an
        exception an entry may be lost all the same.
        """
        if self.raft.removed:
            raise ProposalDropped(f"{self.raft.id:x} is removed from the cluster")
        self.raft.step(Message(MsgType.PROP, sender=sender, entries=entries))

    def propose_conf_change(self, change: ConfChange) -> None:
        """Propose a membership change, which becomes a no-op while another one is pending."""
        self.propose(Entry(EntryType.CONF_CHANGE, data=encode_conf_change(change)))

    def apply_conf_change(self, change: ConfChange) -> Tuple[int, ...]:
        """Apply a ConfChange entry, with node_id=0 if the state machine refused it; return the
        voters.  To be called once for each such entry before applied_to() passes it.
        """
        self.raft.apply_conf_change(change)
        return self.raft.voters

    def read_index(self, context: bytes) -> None:
        """Request the index at which a read sees every write that is acknowledged now.

        The answer comes through confirmed_reads(), or never: then try again with another context.
        """
        self.raft.step(Message(MsgType.READ_INDEX, entries=[Entry(data=context)]))

    def confirmed_reads(self) -> List[Tuple[bytes, int]]:
        """Return (context, index) of the reads that were confirmed since the last call."""
        confirmed, self.raft.reads.confirmed = self.raft.reads.confirmed, []
        return confirmed

    def report_unreachable(self, id: int) -> None:
        self.raft.replication.unreachable(id)

    def report_snapshot(self, id: int, ok: bool) -> None:
        self.raft.replication.snapshot_done(id, ok=ok)

    @property
    def commit_unsent(self) -> bool:
        """True if a follower may not know the commit index (RaftConfig.defer_commit)."""
        return self.raft.replication.commit_unsent

    def broadcast_commit(self) -> None:
        if self.raft.replication.commit_unsent:
            self.raft.replication.mark_all_due()

    def has_ready(self) -> bool:
        raft, known = self.raft, self._hard_state
        return (
            raft.log.has_unhanded or raft.log.commit != known.commit or not raft.mail.is_empty
            or self._is_append_due or raft.term != known.term or raft.vote != known.vote
        )

    @property
    def _is_append_due(self) -> bool:
        return self.raft.role is RaftRole.LEADER and self.raft.replication.is_due

    def ready(self) -> Ready:
        raft = self.raft
        if self._is_append_due:
            raft.replication.send_due()
        messages, held = raft.mail.take()
        snapshot, entries, mark = raft.log.hand_out()
        before, now = self._hard_state, HardState(raft.term, raft.vote, raft.log.commit)
        must_sync = bool(entries) or snapshot is not None or now[:2] != before[:2]
        self._hard_state = now
        changed = now if now != before else None
        return Ready(changed, entries, snapshot, must_sync, messages, held, mark)

    def persisted(self, mark: Mark) -> None:
        """Note that the Ready with this mark and all before it are durable."""
        if self.raft.log.stable_to(mark):
            self.raft.on_stable()

    def committed_entries(self, max_entries: int = 4096) -> List[Entry]:
        """Return the next entries to apply: committed, durable here, not applied yet."""
        return self.raft.log.committed(max_entries)

    def applied_to(self, index: int) -> None:
        self.raft.log.applied_to(index)

    def compact(self, index: int) -> None:
        """Drop the entries up to `index`, which must be applied, from memory."""
        self.raft.log.compact(index)

    def status(self) -> Status:
        raft = self.raft
        progress = raft.progress if raft.role is RaftRole.LEADER else {}
        return Status(
            raft.id, raft.term, raft.vote, raft.log.commit, raft.log.applied, raft.role, raft.lead,
            {id: (p.match_index, p.next_index, p.state.name) for id, p in progress.items()},
        )


def _is_contiguous(message: Message) -> bool:
    first, indexes = message.index + 1, [entry.index for entry in message.entries]
    return indexes == list(range(first, first + len(indexes)))


def _append_violation(message: Message) -> str:
    if not _is_contiguous(message):
        return f"the entries do not follow entry {message.index} one by one"
    terms = [message.log_term, *[entry.term for entry in message.entries], message.term]
    if any(map(operator.gt, terms, terms[1:])) or (message.entries and not terms[1]):
        return "the terms of the entries do not ascend to that of the leader"
    return ""


def _snapshot_violation(message: Message) -> str:
    snapshot = message.snapshot
    if snapshot is None or not 0 < snapshot.index <= INDEX_MAX:
        return "there is no snapshot in it"
    if not 0 < snapshot.term <= message.term:
        return f"the snapshot is of term {snapshot.term}, its leader of term {message.term}"
    if not snapshot.voters or 0 in snapshot.voters:
        return "the snapshot names no voters"
    return ""


# ============================================================================
# store/events -- Nodes of the key tree, events, and their JSON.
# ----------------------------------------------------------------------------
# Paths are internal and clean: `/1/foo` is the user's `/foo`.  Time is passed in.
# ============================================================================


LONG_VALUE_CHARS = 4_096            # of a value: above, it is kept as the JSON that is sent
SHOWN_VALUE_CHARS = 4_096           # of a value in the text of an error; above: cut

Texts = Iterator[Union[str, bytes]]     # JSON in pieces, of which the long ones are shared
_PERMANENT = "0001-01-01T00:00:00Z"     # Go's zero time


class Node:
    """A file.  Immutable: every write replaces it as a whole.

    value           the text; None only in the node of a delete or expire event
    created_index,
    modified_index  store indexes
    expires_ns      unix nanoseconds; 0: permanent

    The store knows the path of a node; the node does not.  64 bytes on CPython 3.11.
    """

    __slots__ = ("value", "created_index", "modified_index", "expires_ns")
    children: Optional[Dict[str, None]] = None

    def __init__(
        self, value: Optional[str], created_index: int, modified_index: int, expires_ns: int
    ) -> None:
        self.value = value
        self.created_index = created_index
        self.modified_index = modified_index
        self.expires_ns = expires_ns

    def ttl_s(self, now_ns: int) -> int:
        """Return the seconds left, rounded up; 0 or less when expired, 0 if permanent."""
        return -((now_ns - self.expires_ns) // NS) if self.expires_ns else 0


class LongNode(Node):
    """A file with a long value, stored as JSON: every value is shown as JSON at least once, and
    the encoding takes up to 60 ns a character.
    """

    __slots__ = ("json",)

    def __init__(
        self, json: LongText, created_index: int, modified_index: int, expires_ns: int
    ) -> None:
        self.json = json
        self.created_index = created_index
        self.modified_index = modified_index
        self.expires_ns = expires_ns

    @property
    def value(self) -> str:  # type: ignore[override]
        """The text; 10 MB take some ms."""
        return text_of_long(self.json)

    def has_value(self, value: Value) -> bool:
        if isinstance(value, str):
            value = long_text(value) if len(value) > LONG_VALUE_CHARS else ()
        if value == self.json or sum(map(len, value)) != sum(map(len, self.json)):
            return value == self.json
        return b"".join(value) == b"".join(self.json)       # perhaps in other pieces


def file_node(value: Value, created_index: int, modified_index: int, expires_ns: int) -> Node:
    if isinstance(value, str):
        if len(value) <= LONG_VALUE_CHARS:
            return Node(value, created_index, modified_index, expires_ns)
        value = long_text(value)
    return LongNode(value, created_index, modified_index, expires_ns)


def stored_value(node: Node) -> Value:
    return node.json if isinstance(node, LongNode) else node.value or ""


def value_excerpt(value: Value) -> str:
    """Return a value for the text of an error.  Differs from etcd, which shows 20 MB."""
    text = value if isinstance(value, str) else text_of_long(value[:1])
    is_all = isinstance(value, str) and len(value) <= SHOWN_VALUE_CHARS
    return text if is_all else text[:SHOWN_VALUE_CHARS] + "..."


class Directory(Node):
    """A node with children: their full paths, in order of creation (a dict as ordered set).

    The dict is the one mutable part; every version of the same directory shares it.
    """

    __slots__ = ("children",)
    children: Dict[str, None]

    def __init__(
        self, created_index: int, modified_index: int, expires_ns: int, children: Dict[str, None]
    ) -> None:
        super().__init__(None, created_index, modified_index, expires_ns)
        self.children = children


def _node_ends(key: str, node: Node, ttl_s: int) -> Tuple[str, str]:
    """Return the JSON of a node in an event before and after its `nodes`, or its long value.

    key  already encoded; `""` is the root, which has neither key nor indexes
    """
    members = "" if key == '""' else f',"key":{key}'
    expires = f',"expiration":"{format_time(node.expires_ns)}"' if node.expires_ns else ""
    if ttl_s:
        expires += f',"ttl":{ttl_s}'
    indexes = f',"modifiedIndex":{node.modified_index}' if node.modified_index else ""
    if node.created_index:
        indexes += f',"createdIndex":{node.created_index}'
    if isinstance(node, LongNode):
        return f'{{{members[1:]},"value":"', f'"{expires}{indexes}}}'
    if node.value is not None:
        members += f',"value":{json_string(node.value)}'
    if node.children is not None:
        members += ',"dir":true'
    return f"{{{(members + expires)[1:]}", indexes + "}"


def _node_texts(key: str, node: Node, ttl_s: int) -> Texts:
    """Yield the JSON of a file in pieces, with no copy of a long value."""
    head, tail = _node_ends(key, node, ttl_s)
    yield head
    if isinstance(node, LongNode):
        yield from node.json
    yield tail


def _node_json(key: str, node: Node, ttl_s: int) -> str:
    if node.value is None or node.expires_ns:
        return "".join(_node_ends(key, node, ttl_s))
    return (                            # the usual node: 0.7 us instead of 1.7
        f'{{"key":{key},"value":{json_string(node.value)},'
        f'"modifiedIndex":{node.modified_index},"createdIndex":{node.created_index}}}'
    )


class Event:
    """The effect of one operation on one key.  Immutable.

    action    get, set, create, update, compareAndSwap, delete, compareAndDelete or expire
    key       full internal path
    node      as the operation left it (deleted: without value)
    prev      as it was before, or None
    index     store index of the change; for a get, the current one
    ttl_s,
    prev_ttl_s  seconds left of both when it happened; 0: permanent or expired
    refresh   True: kept in the history, without a notification of watchers
    Source: etcd 2.3 store/event.go.
    """

    __slots__ = (
        "action", "key", "node", "prev", "index", "ttl_s", "prev_ttl_s", "refresh", "_json"
    )

    def __init__(
        self, action: str, key: str, node: Node, prev: Optional[Node], index: int, now_ns: int,
        refresh: bool = False, encoded: Optional[Sequence[bytes]] = None,
    ) -> None:
        self.action = action
        self.key = key
        self.node = node
        self.prev = prev
        self.index = index
        self.ttl_s = node.ttl_s(now_ns) if node.expires_ns else 0
        self.prev_ttl_s = prev.ttl_s(now_ns) if prev is not None and prev.expires_ns else 0
        self.refresh = refresh
        self._json = encoded

    @property
    def is_created(self) -> bool:
        """True if the key is new: HTTP answers 201 instead of 200."""
        return self.action == "create" or (self.action == "set" and self.prev is None)

    @property
    def _is_long(self) -> bool:
        return isinstance(self.node, LongNode) or isinstance(self.prev, LongNode)

    def client_pieces(self) -> Sequence[bytes]:
        """Return the line for clients, ending in a newline: encoded once, shared by all.

        The keys are without the namespace (`/1`).
        """
        if self._json is None:
            if self._is_long:
                self._json = in_pieces((*self._texts(self.key[2:]), "}\n"))
            else:
                self._json = (f"{self._text(self.key[2:])}}}\n".encode(),)
        return self._json

    def client_json(self) -> bytes:
        return b"".join(self.client_pieces())

    def history_texts(self) -> Texts:
        """Yield the form kept in snapshots: full keys, and the refresh mark."""
        end = ',"refresh":true}' if self.refresh else "}"
        if self._is_long:
            yield from self._texts(self.key)
            yield end
        else:
            yield self._text(self.key) + end

    def _text(self, key: str) -> str:
        node, prev = self.node, self.prev
        if (                            # the usual event: 1.6 us instead of 2.3
            prev is not None and prev.value is not None and node.value is not None
            and not (node.expires_ns or prev.expires_ns)
            and _JSON_UNSAFE.search(f"{key}{node.value}{prev.value}") is None
        ):
            return (
                f'{{"action":"{self.action}","node":{{"key":"{key}","value":"{node.value}",'
                f'"modifiedIndex":{node.modified_index},"createdIndex":{node.created_index}}},'
                f'"prevNode":{{"key":"{key}","value":"{prev.value}",'
                f'"modifiedIndex":{prev.modified_index},"createdIndex":{prev.created_index}}}'
            )
        key = json_string(key)
        text = f'{{"action":"{self.action}","node":{_node_json(key, self.node, self.ttl_s)}'
        if self.prev is None:
            return text
        return f'{text},"prevNode":{_node_json(key, self.prev, self.prev_ttl_s)}'

    def _texts(self, key: str) -> Texts:
        key = json_string(key)
        yield f'{{"action":"{self.action}","node":'
        yield from _node_texts(key, self.node, self.ttl_s)
        if self.prev is not None:
            yield ',"prevNode":'
            yield from _node_texts(key, self.prev, self.prev_ttl_s)


# ============================================================================
# store/walks -- Walks over the key tree in slices: listings and snapshots.
# ============================================================================


SNAPSHOT_SLICE_NODES = 500          # nodes per slice of a snapshot walk: 1 ms, all with ttl 3
SNAPSHOT_SLICE_CHARS = 1 << 18      # of text in a slice, or more with the last node
SNAPSHOT_SORT_MAX = 1_000           # children of larger directories stay in insertion order
LISTING_BLOCK_NODES = 100           # encoded at once
LISTING_BLOCK_CHARS = 1 << 16       # of the values of a block; above: node by node
LISTING_SORT_RUN = 4_000            # children sorted at once: 2 ms
LISTING_SLICE_WORK = 4_000          # nodes, or as much text, of a listing in one slice: 2 ms
LISTING_NODE_CHARS = 500            # text that is as much work as a node


def _sort_bytewise(paths: List[str]) -> bool:
    """Sort as Go does; True if not all is ASCII.

    Only surrogates (bytes that are not UTF-8) sort differently as code points.
    """
    is_plain = all(map(str.isascii, paths))
    paths.sort(key=None if is_plain else utf8)
    return not is_plain


def parent_path(path: str) -> str:
    return path[:path.rfind("/")] or "/"


def _files_json(paths: Sequence[str], nodes: Sequence[Node]) -> str:
    """Return the JSON of nodes, joined by commas; "" if one is not a file with plain text.

    Checks the text of all at once: 0.4 us per node instead of 1.  A hot path.
    """
    if LongNode in set(map(type, nodes)):
        return ""
    values = [node.value for node in nodes]
    if not all(values) or sum([node.expires_ns for node in nodes]) > 0:
        return ""
    texts: List[str] = values  # type: ignore[assignment]
    if sum(map(len, texts)) > LISTING_BLOCK_CHARS or not is_plain_json("".join(texts + [*paths])):
        return ""
    return ",".join([
        f'{{"key":"{path[2:]}","value":"{node.value}","modifiedIndex":{node.modified_index},'
        f'"createdIndex":{node.created_index}}}' for path, node in zip(paths, nodes)
    ])


class TreeWalk:
    """A walk over the tree as of the start of the walk, while the tree goes on changing.

    The store calls keep() before each change of a path; the walk then takes that image instead
    of the node in the tree.  Only changed nodes cost memory.

    walks  the walks under way; this one is among them until end()
    """

    __slots__ = ("_nodes", "_walks", "_images", "_kept")

    def __init__(self, nodes: Dict[str, Node], walks: List[TreeWalk]) -> None:
        self._nodes = nodes
        self._walks = walks
        self._images: Dict[str, Optional[Node]] = {}    # path -> node at the start; None: absent
        self._kept: Dict[str, List[str]] = {}           # directory -> children with an image
        walks.append(self)

    def keep(self, path: str, node: Optional[Node]) -> None:
        """Remember `node` as the image of `path`, unless an earlier change did."""
        if path not in self._images:
            self._images[path] = node
            if node is not None:
                self._kept.setdefault(parent_path(path), []).append(path)

    def end(self) -> None:
        """Stop to keep images: the walk is complete, or given up."""
        if self in self._walks:
            self._walks.remove(self)
        self._images, self._kept = {}, {}

    def _image(self, path: str) -> Optional[Node]:
        return self._images[path] if path in self._images else self._nodes[path]

    def _children(self, path: str) -> List[str]:
        """Return the children at the start, and perhaps later ones, whose image is None."""
        node = self._image(path)
        paths = list(node.children) if node is not None and node.children is not None else []
        if path in self._kept:
            paths = list(dict.fromkeys(paths + self._kept[path]))
        return paths


class SnapshotWalk(TreeWalk):
    """The walk that writes a snapshot."""

    __slots__ = ()

    def chunks(self, history: Texts, end: str) -> Iterator[bytes]:
        """Yield the snapshot in slices of some ms.  history: pieces of JSON; end: the rest."""
        slice: List[Union[str, bytes]] = []
        chars = 0
        for text in itertools.chain(
            ('{"Root":',), self._pieces(), (',"WatcherHub":{"EventHistory":', next(history)),
            history, ("}", end),
        ):
            slice.append(text)
            chars += len(text)
            if chars >= SNAPSHOT_SLICE_CHARS or len(slice) >= SNAPSHOT_SLICE_NODES:
                yield from in_pieces(slice)
                slice, chars = [], 0
        yield from in_pieces(slice)

    def _pieces(self) -> Texts:
        """Yield the JSON of the root in pieces, one for each node and one for each end.

        With a stack of its own: keys may be deeper than Python's.
        """
        stack = [iter(("/",))]
        comma = ""
        while stack:
            for path in stack[-1]:
                node = self._image(path)
                if node is None:
                    continue
                text = comma + self._head(path, node)
                if isinstance(node, LongNode):
                    yield text
                    yield from node.json
                    text = '","Children":'
                if node.children is None:
                    yield text + "null}"
                    comma = ","
                    continue
                yield text + "{"
                children = self._children(path)
                if len(children) <= SNAPSHOT_SORT_MAX:
                    _sort_bytewise(children)
                stack.append(iter(children))
                comma = ""
                break
            else:
                stack.pop()
                if stack:
                    yield "}}"
                comma = ","

    def _head(self, path: str, node: Node) -> str:
        name = "" if path == "/" else json_string(path[path.rfind("/") + 1:]) + ":"
        expires = format_time(node.expires_ns) if node.expires_ns else _PERMANENT
        text = (
            f'{name}{{"Path":{json_string(path)},"CreatedIndex":{node.created_index},'
            f'"ModifiedIndex":{node.modified_index},"ExpireTime":"{expires}","Value":'
        )
        if isinstance(node, LongNode):
            return text + '"'
        return f'{text}{json_string(node.value or "")},"Children":'


class _Level:
    """A directory whose listing has begun: its remaining items, and the JSON around them."""

    __slots__ = ("items", "comma", "tail")

    def __init__(self, items: Iterator[Union[str, Tuple[str, Node]]], tail: str) -> None:
        self.items = items
        self.comma = ',"nodes":['       # "," behind the first visible child
        self.tail = tail


class Listing(TreeWalk):
    """The answer to the GET of a directory at one index, made in slices while the tree changes.

    index   store index of the state in it
    chunks  of the answer so far, none of them huge
    done    the answer is complete
    cacheable  the answer holds as long as the index does: nothing in it expires

    Shows the visible children, with `recursive` all visible nodes below.
    """

    __slots__ = (
        "index", "chunks", "done", "cacheable", "work_done", "_recursive", "_sorted", "_now_ns",
        "_texts",
    )

    def __init__(
        self, nodes: Dict[str, Node], walks: List[TreeWalk], path: str, *, recursive: bool,
        sorted: bool, index: int, now_ns: int,
    ) -> None:
        super().__init__(nodes, walks)
        self.index = index
        self.chunks: List[bytes] = []
        self.done = False
        self.cacheable = True
        self.work_done = 0              # nodes so far, and text in units of LISTING_NODE_CHARS
        self._recursive = recursive
        self._sorted = sorted
        self._now_ns = now_ns
        self._texts = self._walk(path, nodes[path])

    def work(self, amount: int = LISTING_SLICE_WORK) -> None:
        until = self.work_done + amount
        texts: List[Union[str, bytes]] = []
        for text in self._texts:
            texts.append(text)
            if self.work_done >= until:
                break
        else:
            self.done = True
            self.end()
        self.chunks += in_pieces(texts) or [b""]

    def _walk(self, path: str, node: Node) -> Texts:
        """Yield the text in pieces, sometimes empty ones to allow a pause.

        With a stack of its own: keys may be deeper than Python's.
        """
        head, tail = self._ends(path, node)
        yield '{"action":"get","node":' + head
        levels = [_Level(self._items(path), tail)]
        while levels:
            level = levels[-1]
            for item in level.items:
                if isinstance(item, str):
                    yield level.comma + item if item else ""
                    level.comma = "," if item else level.comma
                    continue
                path, node = item
                head, tail = self._ends(path, node)
                text, level.comma = level.comma + head, ","
                if node.children is not None and self._recursive:
                    yield text
                    levels.append(_Level(self._items(path), tail))
                    break
                if isinstance(node, LongNode):
                    yield text
                    yield from node.json
                    text = ""
                yield text + tail
            else:
                levels.pop()            # without visible children there is no `nodes`
                yield "]" + level.tail if level.comma == "," else level.tail
        yield "}\n"

    def _ends(self, path: str, node: Node) -> Tuple[str, str]:
        """Return the JSON of a node before and after its children, or its long value."""
        self.cacheable = self.cacheable and not node.expires_ns
        if isinstance(node, LongNode):
            self.work_done += 1 + len(node.json)
        else:
            self.work_done += 1 + len(node.value or "") // LISTING_NODE_CHARS
        return _node_ends(json_string(path[2:]), node, node.ttl_s(self._now_ns))

    def _items(self, path: str) -> Iterator[Union[str, Tuple[str, Node]]]:
        """Yield the visible children: the text of a block of files, else single nodes.

        A text may be empty, to allow a pause.
        """
        name_at = len(path) + 1
        for block in self._blocks(path):
            if "/_" in "".join(block):
                block = [child for child in block if not child.startswith("_", name_at)]
            if self._images:
                block = [child for child in block if self._image(child) is not None]
                nodes = [self._image(child) for child in block]
            else:
                nodes = list(map(self._nodes.__getitem__, block))
            files: Sequence[Node] = nodes  # type: ignore[assignment]
            text = _files_json(block, files)
            if text or not block:
                self.work_done += len(block) + len(text) // LISTING_NODE_CHARS
                yield text
            else:
                yield from zip(block, files)

    def _blocks(self, path: str) -> Iterator[List[str]]:
        """Yield the children of a directory, hidden ones too, in blocks."""
        paths: Iterator[str]
        children = self._children(path)
        if self._sorted and len(children) > LISTING_SORT_RUN:
            runs = [
                children[start:start + LISTING_SORT_RUN]
                for start in range(0, len(children), LISTING_SORT_RUN)
            ]
            is_odd = False
            for run in runs:
                is_odd = _sort_bytewise(run) or is_odd
                self.work_done += len(run)
                yield []
            paths = heapq.merge(*runs, key=utf8 if is_odd else None)
        else:
            if self._sorted:
                _sort_bytewise(children)
            paths = iter(children)
        block = list(itertools.islice(paths, LISTING_BLOCK_NODES))
        while block:
            yield block
            block = list(itertools.islice(paths, LISTING_BLOCK_NODES))


# ============================================================================
# store/watchers -- The event history, watchers, time to live, and counts of operations.
# ============================================================================


TTL_STALE_MIN = 64                  # stale heap entries always tolerated; above and > live: rebuilt


class EventHistory:
    """The last `capacity` events, one per store index, for watches that begin in the past.

    Source: etcd 2.3 store/event_history.go, event_queue.go.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.events: Deque[Event] = collections.deque(maxlen=capacity)
        self._back = 0                  # slot of the next event in etcd's ring; for snapshots

    @property
    def first_index(self) -> int:
        """Index of the oldest event; 0 if there is none."""
        return self.events[0].index if self.events else 0

    @property
    def last_index(self) -> int:
        """Index of the newest event; 0 if there is none."""
        return self.events[-1].index if self.events else 0

    def append(self, event: Event) -> None:
        self.events.append(event)
        self._back += 1
        if self._back == self.capacity:
            self._back = 0

    def matches(self, path: str, *, recursive: bool, stream: bool, since: int) -> Iterator[Event]:
        """Yield the events from index `since` on for a watch of `path`.

        Three oddities are etcd's, and kept because clients see them: hidden keys are not
        filtered; the deletion of a directory counts for every path that begins with its name
        (`/bar` for `/barbaz`); a recursive watch compares all events but the first with
        `path/`, so it misses later ones on exactly `path`.

        Differs from etcd: a stream has no third oddity, for it would lose events.
        Source: etcd 2.3 store/event_history.go, scan.
        """
        below = path if path == "/" else path + "/"
        exact = path
        for event in itertools.islice(self.events, max(since - self.first_index, 0), None):
            if event.refresh:
                continue
            key = event.key
            if key == exact or (recursive and key.startswith(below)) or (
                path.startswith(key) and event.action in ("delete", "expire")
                and event.prev is not None and event.prev.children is not None
            ):
                yield event
            if recursive and not stream:
                exact = below

    def pieces(self) -> Texts:
        """Yield the EventHistory object of a snapshot, as of the first next().

        Source: the ring of etcd 2.3 store/event_queue.go, unused slots null.
        """
        events, first, last, back = list(self.events), self.first_index, self.last_index, self._back
        front = (back - len(events)) % self.capacity
        slots: List[Optional[Event]] = [None] * self.capacity
        for offset, event in enumerate(events):
            slots[(front + offset) % self.capacity] = event
        comma = ""
        yield '{"Queue":{"Events":['
        for slot in slots:
            yield comma
            yield from ("null",) if slot is None else slot.history_texts()
            comma = ","
        yield f'],"Size":{len(events)},"Front":{front},"Back":{back},"Capacity":{self.capacity}}}'
        yield f',"StartIndex":{first},"LastIndex":{last}}}'

    def load(self, events: List[Event], back: int, capacity: int) -> None:
        """Take over the events of another ring, oldest first."""
        self.events = collections.deque(events, maxlen=self.capacity)
        same = capacity == self.capacity        # then every event keeps its slot
        self._back = (back if same else len(self.events)) % self.capacity


class Watcher:
    """One watch: deliver(event) is called for one event, or with `stream` for each.

    lost  called instead if the history has lost events for this watch, which ends it
    """

    __slots__ = ("path", "recursive", "stream", "since", "deliver", "lost", "_hub")

    def __init__(
        self, path: str, *, recursive: bool, stream: bool, since: int,
        deliver: Callable[[Event], None], lost: Callable[[], None] = _nothing,
    ) -> None:
        self.path = path
        self.recursive = recursive
        self.stream = stream
        self.since = since
        self.deliver = deliver
        self.lost = lost
        self._hub: Optional[WatcherHub] = None      # None: not registered

    def cancel(self) -> None:
        """Stop delivery, now.  May be called from deliver, and twice."""
        if self._hub is not None:
            self._hub.remove(self)


class WatcherHub:
    """The registered watchers, and the history of events.

    Source: etcd 2.3 store/watcher_hub.go.
    """

    def __init__(self, history: EventHistory, stats: StoreStats) -> None:
        self.history = history
        self._stats = stats             # the hub keeps its `watchers`
        # Path -> watchers in order of registration (a dict as ordered set: 10,000 watchers of
        # one key come and go in O(1) each).  No empty groups.
        self._groups: Dict[str, Dict[Watcher, None]] = {}
        self._due: Deque[Tuple[Event, Deque[Watcher]]] = collections.deque()    # to be notified
        self._budget: float = math.inf  # notifications left in this turn
        self.backlog = 0                # watchers in _due
        self.watched_bytes = 0          # of the paths of registered watchers

    @property
    def paths(self) -> Iterator[str]:
        return iter(self._groups)

    def remove(self, watcher: Watcher) -> None:
        watcher._hub = None
        group = self._groups.get(watcher.path)
        if group is not None and watcher in group:
            del group[watcher]
            self._stats.watchers -= 1
            self.watched_bytes -= len(watcher.path)
            if not group:
                del self._groups[watcher.path]

    def watch(self, watcher: Watcher) -> None:
        """Serve `watcher` from the history; register it if it is a stream, or not served.

        Differs from etcd: a stream gets all its events of the history and then new ones; etcd
        sends one event of the history, and no other event ever.
        """
        history = self.history
        if watcher.since <= history.last_index:
            found = history.matches(
                watcher.path, recursive=watcher.recursive, stream=watcher.stream,
                since=watcher.since,
            )
            for event in list(found) if watcher.stream else found:
                watcher.deliver(event)
                if not watcher.stream:
                    return
            if watcher.stream:
                watcher.since = history.last_index + 1
        self._groups.setdefault(watcher.path, {})[watcher] = None
        self._stats.watchers += 1
        self.watched_bytes += len(watcher.path)
        watcher._hub = self

    def begin_turn(self) -> None:
        """Notify WATCHERS_NOTIFIED_MAX watchers at most until the next call, in order of events.

        Before the first call there is no limit.
        """
        self._budget = WATCHERS_NOTIFIED_MAX
        if self._due:
            self._notify_due()

    def catch_up(self, seen: int) -> None:
        """Notify the watchers of the events after index `seen`, which came with a snapshot.

        A watcher that would miss events is closed.  Differs from etcd, which notifies no watcher.
        """
        self._budget = math.inf         # first the backlog
        self._notify_due()
        history = self.history
        for watcher in [watcher for group in self._groups.values() for watcher in group]:
            if watcher._hub is None:
                continue                # cancelled by an earlier deliver
            self.remove(watcher)
            watcher.since = max(watcher.since, seen + 1)
            if not history.events or watcher.since < history.first_index:
                watcher.lost()
            else:
                self.watch(watcher)

    def notify(self, event: Event, removed: Sequence[str] = ()) -> None:
        """Record `event`; unless it is a refresh, notify the watchers of its key and all above.

        removed  paths that the event removed, parents first: their watchers come first, deepest
                 path first, so a stream on exactly the key gets the event twice, as in etcd
        """
        self.history.append(event)
        if not self._groups or event.refresh:
            return
        for path in reversed(removed):
            self._deliver(path, event, forced=True)
        key = event.key
        self._deliver("/", event, forced=False)
        end = key.find("/", 1)
        while end > 0:
            self._deliver(key[:end], event, forced=False)
            end = key.find("/", end + 1)
        self._deliver(key, event, forced=False)

    def _deliver(self, path: str, event: Event, *, forced: bool) -> None:
        group = self._groups.get(path)
        if group is None:
            return
        exact = path == event.key
        if not exact and "/_" in "/" + event.key[len(path):]:
            return                      # hidden from here; a path below the key is never
        index, every = event.index, exact or forced
        notified = [w for w in group if index >= w.since and (every or w.recursive)]
        if not notified:
            return
        once = [watcher for watcher in notified if not watcher.stream]
        if len(once) == len(group):
            del self._groups[path]
        else:
            for watcher in once:
                del group[watcher]
        self._stats.watchers -= len(once)
        self.watched_bytes -= len(once) * len(path)
        self._due.append((event, collections.deque(notified)))
        self.backlog += len(notified)
        self._notify_due()

    def _notify_due(self) -> None:
        """Notify watchers within the budget, and beyond it while the backlog is too long."""
        while self._due:
            event, watchers = self._due[0]
            while watchers:
                if self._budget <= 0 and self.backlog <= WATCHERS_MAX:
                    return
                watcher = watchers.popleft()
                self.backlog -= 1
                if watcher._hub is not None:        # else cancelled, perhaps by an earlier deliver
                    self._budget -= 1
                    if not watcher.stream:
                        watcher._hub = None
                    watcher.deliver(event)
            if self._due and self._due[0][1] is watchers:
                self._due.popleft()


class TtlHeap:
    """The paths that expire, soonest first; stale entries are dropped when they reach the top.

    Ties go by path, so that every member expires keys in the same order (in etcd it varies).
    """

    def __init__(self) -> None:
        self._expires_ns: Dict[str, int] = {}           # path -> unix ns
        self._heap: List[Tuple[int, str]] = []          # all of these, and stale ones

    def __len__(self) -> int:
        return len(self._expires_ns)

    def set(self, path: str, expires_ns: int) -> None:
        if not expires_ns:
            self._expires_ns.pop(path, None)
        elif self._expires_ns.get(path) != expires_ns:
            self._expires_ns[path] = expires_ns
            heapq.heappush(self._heap, (expires_ns, path))
        # A key refreshed every second would leave one stale entry a second, far down the heap.
        if len(self._heap) > 2 * len(self._expires_ns) + TTL_STALE_MIN:
            self._heap = [(when_ns, name) for name, when_ns in self._expires_ns.items()]
            heapq.heapify(self._heap)

    def nth_ns(self, count: int, until_ns: int) -> int:
        """Return the time of entry number `count`, stale ones included, or `until_ns` if earlier.

        Visits about as many entries, in the order of the heap.
        """
        heap = self._heap
        reached = [(entry, place) for place, entry in enumerate(heap[:1])]
        while reached:
            (when_ns, _), place = heapq.heappop(reached)
            count -= 1
            if when_ns >= until_ns or not count:
                return min(when_ns, until_ns)
            below = 2 * place + 1
            for child in range(below, min(below + 2, len(heap))):
                heapq.heappush(reached, (heap[child], child))
        return until_ns

    def first(self) -> Tuple[int, str]:
        """Return (unix ns, path) of the next to expire; (0, "") if there is none."""
        heap = self._heap
        while heap and self._expires_ns.get(heap[0][1]) != heap[0][0]:
            heapq.heappop(heap)
        return heap[0] if heap else (0, "")


class StoreStats:
    """Counters of operations on this member; snapshots contain them.

    Attributes are the JSON members in snake_case, and in their order.
    Source: etcd 2.3 store/stats.go.
    """

    def __init__(self) -> None:
        self.gets_success = self.gets_fail = 0
        self.sets_success = self.sets_fail = 0
        self.delete_success = self.delete_fail = 0
        self.update_success = self.update_fail = 0
        self.create_success = self.create_fail = 0
        self.compare_and_swap_success = self.compare_and_swap_fail = 0
        self.compare_and_delete_success = self.compare_and_delete_fail = 0
        self.expire_count = 0
        self.watchers = 0               # registered now; kept by WatcherHub

    def json(self) -> str:
        return json_text({self._member(name): count for name, count in vars(self).items()})

    def load(self, counters: Mapping[str, int]) -> None:
        """Take over the counters of a snapshot, but not `watchers`."""
        for name in vars(self).keys() - {"watchers"}:
            setattr(self, name, counters.get(self._member(name), 0))

    @staticmethod
    def _member(name: str) -> str:
        first, *others = name.split("_")
        return first + "".join(map(str.capitalize, others))


# ============================================================================
# store/nodes -- The nodes of a store: found by path, and removed in slices.
# ============================================================================


class NodeTree:
    """One flat dict of path -> node, with the children of each directory.

    Flat, because a lookup is one hash (0.05 us; a walk from the root takes 0.3) and costs no
    second string: the dict and the parent's children hold the same path.  100,000 keys of 10
    characters with 64-byte values take 370 bytes each.

    The removal of a directory detaches the nodes below it at once, and frees them over many turns.
    """

    def __init__(self) -> None:
        self._ttl = TtlHeap()
        self._walks: List[TreeWalk] = []                # the snapshot and the listings under way
        self._detached: Tuple[str, ...] = ()            # removed directories, each with a slash
        self._unfreed: List[Dict[str, None]] = []       # children of removed directories
        self._replaced: List[Tuple[Dict[str, Node], List[TreeWalk]]] = []   # earlier trees
        self._budget: float = math.inf                  # nodes that this turn may free
        self._nodes: Dict[str, Node] = {                # no path without its parents
            "/": Directory(0, 0, 0, {"/0": None, "/1": None}),
            "/0": Directory(0, 0, 0, {}),
            "/1": Directory(0, 0, 0, {}),
        }

    def __len__(self) -> int:
        return len(self._nodes)

    @property
    def accepts_changes(self) -> bool:
        """True if a change may be applied in this turn; False: after the next collect_garbage()."""
        return not self._detached and self._budget > 0

    @property
    def has_garbage(self) -> bool:
        return bool(self._detached) or bool(self._replaced) and not self._replaced[0][1]

    def collect_garbage(self) -> None:
        """Free REMOVED_NODES_MAX nodes at most until the next call.

        A removed directory with more is freed in this call and those of the next turns.  Before
        the first call there is no limit.
        """
        self._budget = REMOVED_NODES_MAX
        self._free_detached()
        if self._replaced and not self._replaced[0][1]:     # and no walk reads it any more
            nodes = self._replaced[0][0]
            for _ in range(min(len(nodes), REMOVED_NODES_MAX)):
                nodes.popitem()
            if not nodes:
                del self._replaced[0]

    def _replace_tree(self, nodes: Dict[str, Node], ttl: TtlHeap) -> None:
        self._detached, self._unfreed = (), []
        if len(self._nodes) > REMOVED_NODES_MAX:
            self._replaced.append((self._nodes, self._walks))
        self._walks = []                        # a walk under way keeps the tree it began with
        self._nodes, self._ttl = nodes, ttl

    def _free(self, path: str) -> None:
        """Remove one node; its children are freed later."""
        node = self._nodes.pop(path)
        self._budget -= 1
        for walk in self._walks:
            walk.keep(path, node)
        if node.expires_ns:
            self._ttl.set(path, 0)
        if node.children:
            self._unfreed.append(node.children)     # emptied: no event of the past may hold it

    def _free_detached(self) -> None:
        while self._unfreed and self._budget > 0:
            children = self._unfreed[-1]
            if children:
                self._free(children.popitem()[0])
            else:
                self._unfreed.pop()
        if not self._unfreed:
            self._detached = ()

    def _reachable(self, path: str) -> Optional[Node]:
        return None if path.startswith(self._detached) else self._nodes.get(path)

    def _to_change(self, path: str) -> Optional[Node]:
        """Return the node at `path`, after all detached nodes are freed."""
        if self._detached:
            budget, self._budget = self._budget, math.inf
            self._free_detached()
            self._budget = budget
        return self._nodes.get(path)


# ============================================================================
# store/tree -- The store: the operations on the key tree.
# ----------------------------------------------------------------------------
# Time is passed in.
# ============================================================================


EXPIRES_NS_MIN = 946_684_800 * NS   # 2000-01-01; an earlier instant is permanent for set and create
SNAPSHOT_PROGRESS_NODES = 20_000    # read between two reports of progress
_READ_ONLY = frozenset(("/", "/0", "/1"))


def _number(members: Mapping[str, Any], name: str) -> int:
    """Return members[name], 0 if missing.  Raises ValueError if it is no int >= 0."""
    value = members.get(name, 0)
    if type(value) is not int or value < 0:
        raise ValueError(f"{name} is not a number: {value!r}")
    return value


_STRING = r'"([^"\\]*(?:\\.[^"\\]*)*)"'
_SNAPSHOT_NODE = re.compile(
    rf'[}},]*(?:{_STRING}:)?{{"Path":{_STRING},"CreatedIndex":([0-9]+),"ModifiedIndex":([0-9]+),'
    rf'"ExpireTime":{_STRING},(?:"(?!Value")\w+":{_STRING},)*"Value":{_STRING},'
    r'"Children":(?:null\}|(\{))'
)


def _unquote(string: str) -> str:
    return as_unicode(load_json(f'"{string}"')) if "\\" in string else string


def _read_tree(
    text: str, progress: Callable[[float, int], None]
) -> Tuple[Dict[str, Node], int]:
    """Return the nodes of a snapshot by path, and the end of their JSON in `text`.

    Reads node after node, as Go writes their members in one order, instead of the nested objects:
    keys may be deeper than json.loads goes, and its 100,000 dicts would take four times the memory
    of the nodes.  A quote inside a string is escaped, so no string looks like a node.
    """
    nodes: Dict[str, Node] = {}
    end = len('{"Root":')
    match = _SNAPSHOT_NODE.match(text, end)
    while match is not None:
        end = match.end()
        _, path, created, modified, expires, _, value, children = match.groups()
        path, created_index = _unquote(path), int(created)
        modified_index = created_index if modified == created else int(modified)    # share the int
        expires_ns = 0 if expires == _PERMANENT else parse_time(expires)
        if children is None:
            nodes[path] = file_node(_unquote(value), created_index, modified_index, expires_ns)
        else:
            nodes[path] = Directory(created_index, modified_index, expires_ns, {})
        siblings = nodes[parent_path(path)].children
        if siblings is None:
            raise ValueError(f"{path} is in a file")
        if path != "/":
            siblings[path] = None
        if not len(nodes) % SNAPSHOT_PROGRESS_NODES:
            progress(end / len(text), len(nodes))
        match = _SNAPSHOT_NODE.match(text, end)
    return nodes, end


def _read_event(members: Mapping[str, Any]) -> Event:
    """Make an Event of its snapshot form; the seconds left are those it was written with."""
    shown, before = members["node"], members.get("prevNode")
    action, key = members["action"], shown["key"]
    if not (isinstance(action, str) and isinstance(key, str)):
        raise ValueError(f"not an event: {members!r}")
    node, prev = _read_event_node(shown), None if before is None else _read_event_node(before)
    event = Event(action, key, node, prev, node.modified_index, 0, "refresh" in members)
    event.ttl_s = int(shown.get("ttl", 0))
    event.prev_ttl_s = 0 if before is None else int(before.get("ttl", 0))
    return event


def _read_event_node(members: Mapping[str, Any]) -> Node:
    created, modified = _number(members, "createdIndex"), _number(members, "modifiedIndex")
    expires_ns = parse_time(members["expiration"]) if "expiration" in members else 0
    if members.get("dir"):
        return Directory(created, modified, expires_ns, {})
    value = members.get("value")
    if isinstance(value, str):
        return file_node(value, created, modified, expires_ns)
    if value is not None:
        raise ValueError(f"not a value: {value!r}")
    return Node(None, created, modified, expires_ns)


class StoreState(NamedTuple):
    """A decoded and checked snapshot, which a store installs in no time."""

    nodes: Dict[str, Node]
    ttl: TtlHeap
    current_index: int
    stats: Dict[str, int]
    events: List[Event]                 # the history, oldest first
    back: int                           # of the history's ring
    capacity: int

    @classmethod
    def read(
        cls, data: bytes, progress: Callable[[float, int], None] = lambda share, nodes: None
    ) -> StoreState:
        """Decode a snapshot's data.  Raises ValueError if it is not of a store."""
        try:
            text = data.decode("utf-8", "replace")
            nodes, end = _read_tree(text, progress)
            slots, rest = _read_slots(text, end)
            state = load_json("{" + rest.lstrip("}")[1:])
            counters = state.get("Stats") or {}
            history = (state.get("WatcherHub") or {}).get("EventHistory") or {}
            queue = history.get("Queue") or {}
            slots = slots or [m and _read_event(m) for m in queue.get("Events") or ()]
            front = _number(queue, "Front")
            ring = slots[front:] + slots[:front]        # oldest first, then the unused
            if nodes["/0"].children is None or nodes["/1"].children is None:
                raise ValueError("/0 and /1 must be directories")
            ttl = TtlHeap()
            for path, node in nodes.items():
                if node.expires_ns:
                    ttl.set(path, node.expires_ns)
            return cls(
                nodes, ttl, _number(state, "CurrentIndex"),
                {name: _number(counters, name) for name in counters},
                [event for event in ring if event is not None],
                _number(queue, "Back"), _number(queue, "Capacity"),
            )
        except (KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise ValueError(f"not a snapshot of a store: {error!r}") from None

    @property
    def version(self) -> str:
        node = self.nodes.get("/0/version")
        return (node.value if node is not None else None) or ""


_SLOTS = '"Events":['
_SLOT_END = re.compile(r"\s*([,\]])")


def _read_slots(text: str, end: int) -> Tuple[List[Optional[Event]], str]:
    """Return the slots of the history's ring, and the text from `end` on without them.

    One by one: json.loads of 1,000 events of 100 KB would stop every thread for 0.5 s.
    """
    slots: List[Optional[Event]] = []
    first = text.find(_SLOTS, end) + len(_SLOTS)
    if first < len(_SLOTS) or text.startswith("]", first):
        return slots, text[end:]
    decoder, at, comma = json.JSONDecoder(), first, ","
    while comma == ",":
        members, at = decoder.raw_decode(text, at)
        slots.append(None if members is None else _read_event(members))
        match = _SLOT_END.match(text, at)
        if match is None:
            raise ValueError("the history of events has no end")
        comma, at = match.group(1), match.end()
    return slots, text[end:first] + text[at - 1:]


class Store(NodeTree):
    """The key tree, its watchers and counters.

    now_ns      unix nanoseconds, to show the rest of a ttl
    expires_ns  unix nanoseconds; 0: permanent
    current_index  number of changes so far; every change makes one event

    Errors are EtcdError subclasses whose cause is without the namespace.
    Thread: reactor.  Source: etcd 2.3 store/store.go; "etcd 2.3 API: keys".
    """

    def __init__(self, *, history_capacity: int = HISTORY_EVENTS_MAX) -> None:
        super().__init__()
        self.current_index = 0
        self.stats = StoreStats()
        self.hub = WatcherHub(EventHistory(history_capacity), self.stats)
        self.recursive_gets = {"success": 0, "fail": 0}     # part of the gets in stats

    def get(self, path: str, *, recursive: bool = False, now_ns: int) -> Event:
        """Return a get event, without the children of a directory.  Raises KeyNotFound, NotDir."""
        encoded = self.file_json(path, recursive=recursive, now_ns=now_ns) or None
        node = self._nodes[path]
        return Event("get", path, node, None, self.current_index, now_ns, encoded=encoded)

    def file_json(self, path: str, *, recursive: bool = False, now_ns: int) -> Sequence[bytes]:
        """Return the answer to the GET of a file, in pieces; () for a directory: see listing().

        A hot path.  recursive is only counted.  Raises KeyNotFound, NotDir.
        """
        node = self._nodes.get(path)
        if self._detached and path.startswith(self._detached):
            node = None
        if recursive:
            self.recursive_gets["fail" if node is None else "success"] += 1
        if node is None:
            raise self._count_failure("gets", self._not_found(path))
        self.stats.gets_success += 1
        if node.children is not None:
            return ()
        key, ttl_s = json_string(path[2:]), node.ttl_s(now_ns)
        if isinstance(node, LongNode):
            return in_pieces(('{"action":"get","node":', *_node_texts(key, node, ttl_s), "}\n"))
        return (f'{{"action":"get","node":{_node_json(key, node, ttl_s)}}}\n'.encode(),)

    def listing(
        self, path: str, *, recursive: bool = False, sorted: bool = False, now_ns: int
    ) -> Listing:
        """Begin the answer to the GET of a directory, as of now; its work() makes it in slices.

        Not counted.  Raises KeyNotFound, NotDir, also for a file.
        """
        node = self._reachable(path)
        if node is None:
            raise self._not_found(path)
        if node.children is None:
            raise NotDir(path[2:], self.current_index)
        return Listing(
            self._nodes, self._walks, path, recursive=recursive, sorted=sorted,
            index=self.current_index, now_ns=now_ns,
        )

    def value(self, path: str) -> Optional[str]:
        """Return the value of a file, or None; not counted."""
        node = self._reachable(path)
        return None if node is None else node.value

    def children(self, path: str) -> List[Tuple[str, bool]]:
        """Return (name, is directory) of each child, hidden ones too."""
        node = self._reachable(path)
        if node is None or not node.children:
            return []
        return [
            (child[child.rfind("/") + 1:], self._nodes[child].children is not None)
            for child in node.children
        ]

    def watch(
        self, path: str, *, recursive: bool = False, stream: bool = False, since: int = 0,
        deliver: Callable[[Event], None], lost: Callable[[], None] = _nothing,
    ) -> Watcher:
        """Call deliver(event) for the first event on `path` with index >= since; stream: for each.

        since  0: from the next change on
        lost   called at the end of the watch if a snapshot skips events for it

        Events of the history are delivered before this returns.  Raises EventIndexCleared.
        Source: etcd 2.3 store/watcher_hub.go, watch.
        """
        first = self.hub.history.first_index
        since = since or self.current_index + 1
        if since < first:
            cause = f"the requested history has been cleared [{first}/{since}]"
            raise EventIndexCleared(cause, self.current_index)
        watcher = Watcher(
            path, recursive=recursive, stream=stream, since=since, deliver=deliver, lost=lost
        )
        self.hub.watch(watcher)
        return watcher

    def set(
        self, path: str, *, dir: bool = False, value: Value = "", expires_ns: int = 0,
        refresh: bool = False, now_ns: int,
    ) -> Event:
        """Put a new file, or with `dir` an empty directory, at `path`; a file there is replaced.

        refresh  keep the value of the file, which must exist, and notify no watcher
        Raises NotFile, NotDir, RootReadOnly, KeyNotFound (refresh only).
        """
        old = self._to_change(path)
        if old is None:
            if refresh:
                raise self._count_failure("sets", self._not_found(path))
        elif path in _READ_ONLY:
            raise self._count_failure("sets", RootReadOnly("/", self.current_index))
        elif old.children is not None:
            raise self._count_failure("sets", NotFile(path[2:], self.current_index))
        elif refresh:
            value = stored_value(old)
        event = self._put_new(
            "set", path, old, None if dir else value, expires_ns, now_ns, refresh
        )
        self.stats.sets_success += 1
        return event

    def create(
        self, path: str, *, dir: bool = False, value: Value = "", unique: bool = False,
        expires_ns: int = 0, now_ns: int,
    ) -> Event:
        """Make a new file or directory at `path`, or with `unique` below it under a number.

        Raises NodeExists, NotDir, RootReadOnly.
        """
        if unique:
            path = f"{path}/{self.current_index + 1:020d}"
        if path in _READ_ONLY:
            raise self._count_failure("create", RootReadOnly("/", self.current_index))
        if self._to_change(path) is not None:
            raise self._count_failure("create", NodeExists(path[2:], self.current_index))
        event = self._put_new("create", path, None, None if dir else value, expires_ns, now_ns)
        self.stats.create_success += 1
        return event

    def update(
        self, path: str, *, value: Value = "", expires_ns: int = 0, refresh: bool = False,
        now_ns: int,
    ) -> Event:
        """Give a file a new value and TTL, keeping its created index; a directory a new TTL.

        The event of a directory shows the new modified index, the stored one keeps the old.
        Raises KeyNotFound, NotDir, NotFile (value for a directory), RootReadOnly.
        """
        old = self._to_change(path)
        if old is None:
            raise self._count_failure("update", self._not_found(path))
        self.stats.update_success += 1          # also of the two failures below, as in etcd
        if path in _READ_ONLY:
            raise RootReadOnly("/", self.current_index)
        if old.children is None:
            return self._rewrite("update", path, old, value, expires_ns, now_ns, refresh)
        if value:
            raise NotFile(path[2:], self.current_index)
        index, children = self.current_index + 1, old.children
        stored = Directory(old.created_index, old.modified_index, expires_ns, children)
        shown = Directory(old.created_index, index, expires_ns, children)
        self._put_node(path, old, stored)
        return self._publish(Event("update", path, shown, old, index, now_ns, refresh))

    def compare_and_swap(
        self, path: str, *, prev_value: Value = "", prev_index: int = 0, value: Value = "",
        expires_ns: int = 0, refresh: bool = False, now_ns: int,
    ) -> Event:
        """Update a file if its value and its modified index are those given; "" and 0: any.
        Raises CompareFailed, KeyNotFound, NotDir, NotFile, RootReadOnly.
        """
        if path in _READ_ONLY:
            self.stats.compare_and_swap_success += 1        # as etcd counts
            raise RootReadOnly("/", self.current_index)
        try:
            old = self._checked_file(path, prev_value, prev_index)
        except EtcdError as error:
            raise self._count_failure("compare_and_swap", error) from None
        self.stats.compare_and_swap_success += 1
        return self._rewrite("compareAndSwap", path, old, value, expires_ns, now_ns, refresh)

    def delete(
        self, path: str, *, dir: bool = False, recursive: bool = False, now_ns: int
    ) -> Event:
        """Remove a file, with `dir` an empty directory, with `recursive` anything: one event.

        Raises KeyNotFound, NotDir, NotFile (directory without dir), DirNotEmpty, RootReadOnly.
        """
        if path in _READ_ONLY:
            self.stats.delete_success += 1                  # as etcd counts
            raise RootReadOnly("/", self.current_index)
        old = self._to_change(path)
        if old is None:
            raise self._count_failure("delete", self._not_found(path))
        if old.children is not None and not recursive:
            if not dir:
                raise self._count_failure("delete", NotFile(path[2:], self.current_index))
            if old.children:
                raise self._count_failure("delete", DirNotEmpty(path[2:], self.current_index))
        self.stats.delete_success += 1
        return self._remove("delete", path, old, now_ns)

    def compare_and_delete(
        self, path: str, *, prev_value: Value = "", prev_index: int = 0, now_ns: int
    ) -> Event:
        """Remove a file if its value and its modified index are those given; "" and 0: any.
        Raises CompareFailed, KeyNotFound, NotDir, NotFile (also for the root, with no cause).
        """
        try:
            old = self._checked_file(path, prev_value, prev_index)
        except (CompareFailed, NotFile):
            self.stats.compare_and_delete_success += 1      # as etcd counts
            raise
        except EtcdError as error:
            raise self._count_failure("compare_and_delete", error) from None
        self.stats.compare_and_delete_success += 1
        return self._remove("compareAndDelete", path, old, now_ns)

    def begin_turn(self) -> None:
        """Go on with notifications and removals; from now on they are spread over turns."""
        self.hub.begin_turn()
        self.collect_garbage()

    def delete_expired(self, cutoff_ns: int) -> List[Event]:
        """Remove the nodes that expire at or before `cutoff_ns`, earliest first; one event each."""
        events: List[Event] = []
        while True:
            expires_ns, path = self._ttl.first()
            if not path or expires_ns > cutoff_ns:
                return events
            if path.startswith(self._detached):
                self._ttl.set(path, 0)
                continue
            self.stats.expire_count += 1
            events.append(self._remove("expire", path, self._nodes[path], cutoff_ns))

    @property
    def has_ttl(self) -> bool:
        return len(self._ttl) > 0

    def expiry_step_ns(self, until_ns: int) -> int:
        """Return a time up to `until_ns` by which some keys expire, but not too many at once."""
        return self._ttl.nth_ns(EXPIRED_KEYS_MAX, until_ns)

    def snapshot_chunks(self) -> Generator[bytes, None, None]:
        """Yield the snapshot as of the first next(), in slices of some ms.

        Changes between slices are not in it.  Close the generator to give up.  Raises
        InvariantError if another snapshot is under way.
        Source: etcd 2.3 store/store.go, Save.
        """
        if any(isinstance(walk, SnapshotWalk) for walk in self._walks):
            raise InvariantError("a snapshot walk is under way")
        walk = SnapshotWalk(self._nodes, self._walks)
        stats = copy.copy(self.stats)
        stats.watchers = 0                      # not a part of the state
        end = f',"CurrentIndex":{self.current_index},"Stats":{stats.json()},"CurrentVersion":2}}'
        try:
            yield from walk.chunks(self.hub.history.pieces(), end)
        finally:
            walk.end()

    def save(self) -> bytes:
        return b"".join(self.snapshot_chunks())

    def count_files(self, directory: str) -> int:
        """Return the number of files below `directory`, at any depth; reads every node."""
        below = directory + "/"
        return sum(n.children is None and p.startswith(below) for p, n in self._nodes.items())

    def nodes_below(self, directory: str) -> List[Tuple[str, Node]]:
        """Return all nodes below `directory` with their paths, sorted; looks at every node."""
        below = directory + "/"
        return sorted(((p, n) for p, n in self._nodes.items() if p.startswith(below)),
                      key=lambda item: item[0])

    def replace_files(self, directory: str, files: Mapping[str, str]) -> None:
        """Put `files`, path -> value, in the place of all below `directory`, without an event."""
        below = directory + "/"
        for path in [path for path in self._nodes if path.startswith(below)]:
            del self._nodes[path]
        (self._nodes[directory].children or {}).clear()
        for path, value in files.items():
            self._make_parents(path, self.current_index)
            self._put_node(path, None, file_node(value, self.current_index, self.current_index, 0))

    def recover(
        self, data: bytes, progress: Callable[[float, int], None] = lambda share, nodes: None
    ) -> None:
        """Install the snapshot `data`.  Raises ValueError, before any change, if it is not one.

        progress  called now and then with the share that is read, 0.0 to 1.0, and the nodes in it
        """
        self.install(StoreState.read(data, progress))

    def install(self, state: StoreState) -> None:
        """Take ownership of a snapshot's state, and notify the watchers of its events.

        Expired nodes go with the next delete_expired.  Source: etcd 2.3 store/store.go, Recovery.
        """
        self._replace_tree(state.nodes, state.ttl)
        seen, self.current_index = self.current_index, state.current_index
        self.stats.load(state.stats)
        self.hub.history.load(state.events, state.back, state.capacity)
        if self.current_index > seen:
            self.hub.catch_up(seen)

    def _put_new(
        self, action: str, path: str, old: Optional[Node], value: Optional[Value],
        expires_ns: int, now_ns: int, refresh: bool = False,
    ) -> Event:
        """Put a file, or a directory if value is None, in the place of `old`.  A hot path."""
        index = self.current_index + 1
        if old is None:
            try:
                self._make_parents(path, index)
            except NotDir:
                self.stats.sets_fail += 1
                self.stats.create_fail += action == "create"    # etcd counts it in both
                raise
        if expires_ns < EXPIRES_NS_MIN:
            expires_ns = 0
        node = (
            Directory(index, index, expires_ns, {}) if value is None
            else file_node(value, index, index, expires_ns)
        )
        if self._walks or expires_ns or (old is not None and old.expires_ns):
            self._put_node(path, old, node)
        else:
            self._nodes[path] = node
        return self._publish(Event(action, path, node, old, index, now_ns, refresh))

    def _rewrite(
        self, action: str, path: str, old: Node, value: Value, expires_ns: int, now_ns: int,
        refresh: bool,
    ) -> Event:
        """Give the file `old` a value and a TTL, keeping its created index."""
        index = self.current_index + 1
        text = stored_value(old) if refresh else value
        node = file_node(text, old.created_index, index, expires_ns)
        self._put_node(path, old, node)
        return self._publish(Event(action, path, node, old, index, now_ns, refresh))

    def _put_node(self, path: str, old: Optional[Node], node: Node) -> None:
        for walk in self._walks:
            walk.keep(path, old)
        self._nodes[path] = node
        if node.expires_ns or (old is not None and old.expires_ns):
            self._ttl.set(path, node.expires_ns)

    def _make_parents(self, path: str, index: int) -> None:
        """Enter `path` in its directory, with all missing parents.  Raises NotDir before that."""
        missing = [path]
        while True:
            path = parent_path(path)
            parent = self._nodes.get(path)
            if parent is not None:
                break
            missing.append(path)
        children = parent.children
        if children is None:
            raise NotDir(path[2:], self.current_index)
        while len(missing) > 1:
            path = missing.pop()
            children[path] = None
            children = {}
            self._put_node(path, None, Directory(index, index, 0, children))
        children[missing[0]] = None

    def _remove(self, action: str, path: str, old: Node, now_ns: int) -> Event:
        """Take `old` and all below it out of the tree: one event, at the top."""
        removed = [path]
        for below in removed:                   # grows under the loop: parents before children
            children = self._nodes[below].children or ()
            if len(removed) + len(children) > self._budget:
                removed = self._watched_below(path)
                break
            removed += children
        siblings = self._nodes[parent_path(path)].children
        if siblings is not None:
            del siblings[path]
        self._free(path)
        if old.children:
            self._detached += (path + "/",)
            self._free_detached()
        index = self.current_index + 1
        if old.children is None or action == "expire":      # etcd 2.3: expire never says dir
            shown = Node(None, old.created_index, index, 0)
        else:
            shown = Directory(old.created_index, index, 0, {})
        return self._publish(Event(action, path, shown, old, index, now_ns), removed)

    def _watched_below(self, path: str) -> List[str]:
        """Return the watched nodes at and below `path`, parents first."""
        below = path + "/"
        watched = [
            name for name in self.hub.paths
            if (name == path or name.startswith(below)) and self._reachable(name) is not None
        ]
        return sorted(watched, key=lambda name: name.count("/"))

    def _publish(self, event: Event, removed: Sequence[str] = ()) -> Event:
        self.current_index = event.index
        self.hub.notify(event, removed)
        return event

    def _checked_file(self, path: str, prev_value: Value, prev_index: int) -> Node:
        """Return the file at `path` if it passes the comparison.  Raises as compare_and_swap."""
        node = self._to_change(path)
        if node is None:
            raise self._not_found(path)
        if node.children is not None:
            raise NotFile(path[2:], self.current_index)
        wrong = []
        if prev_value and not (
            node.has_value(prev_value) if isinstance(node, LongNode) else node.value == prev_value
        ):
            wrong.append(f"[{value_excerpt(prev_value)} != {value_excerpt(stored_value(node))}]")
        if prev_index and prev_index != node.modified_index:
            wrong.append(f"[{prev_index} != {node.modified_index}]")
        if wrong:
            raise CompareFailed(" ".join(wrong), self.current_index)
        return node

    def _not_found(self, path: str) -> EtcdError:
        """Return the error for a missing path; it names the first missing part, or a file."""
        end = path.find("/", 1)
        while end > 0:
            node = self._nodes.get(path[:end])
            if node is None:
                break
            if node.children is None:
                return NotDir(path[2:end], self.current_index)
            end = path.find("/", end + 1)
        return KeyNotFound((path[2:end] if end > 0 else path[2:]) or "/", self.current_index)

    def _count_failure(self, verb: str, error: EtcdError) -> EtcdError:
        name = verb + "_fail"
        setattr(self.stats, name, getattr(self.stats, name) + 1)
        return error


# ============================================================================
# disk/bolt -- Database files of etcd 3 (bbolt): read page by page, and written in one pass.
# ----------------------------------------------------------------------------
# Source: bbolt, doc of the file format (page.go, bucket.go, node.go).
# ============================================================================


PAGE_BYTES = 4_096                  # of the files that are written here
_PAGE_BYTES_MAX = 1 << 16
_DEPTH_MAX = 32                     # of a tree; one with 2^64 keys has less
_INLINE_BYTES_MAX = PAGE_BYTES // 4     # a bucket up to this size stands in its parent's page
_BRANCH, _LEAF, _META, _FREELIST = 1, 2, 4, 16      # kinds of pages
_BUCKET = 1                         # flag of a leaf element: its value is a bucket
_BOLT_MAGIC, _BOLT_VERSION = 0xED0CDAED, 2
_PAGE_HEAD = struct.Struct("<QHHI")         # id, kind, count of elements, overflow
_LEAF_ELEMENT = struct.Struct("<IIII")      # flags, position, key bytes, value bytes
_BRANCH_ELEMENT = struct.Struct("<IIQ")     # position, key bytes, page
_BUCKET_HEAD = struct.Struct("<QQ")         # root page (0: inline), sequence
_META_BODY = struct.Struct("<IIIIQQQQQ")    # magic, version, page size, flags, root page,
                                            # sequence, freelist page, pages, transaction
Items = Iterable[Tuple[bytes, bytes]]


class BoltError(Exception):
    """A file that is no intact database of etcd 3.  The text is one line."""


class _Meta(NamedTuple):
    page_bytes: int
    root: int
    pages: int
    transaction: int


def _checksum(data: bytes) -> int:
    """FNV-1a, 64 bits."""
    result = 0xCBF29CE484222325
    for byte in data:
        result = (result ^ byte) * 0x100000001B3 & UINT64_MAX
    return result


_BUCKET_NAMES = (                   # of etcd 3.0 to 3.4; later ones add theirs when they start
    b"alarm", b"auth", b"authRoles", b"authUsers", b"cluster", b"key", b"lease", b"members",
    b"members_removed", b"meta",
)


def v3_buckets(consistent_index: int) -> Dict[bytes, Items]:
    """Return the buckets of a member of etcd 3 without keys, up to date with a raft index."""
    return {
        **dict.fromkeys(_BUCKET_NAMES, ()),
        b"auth": [(b"authRevision", (1).to_bytes(8, "big"))],
        b"meta": [(b"consistent_index", consistent_index.to_bytes(8, "big"))],
    }


# -- reading


class BoltReader:
    """The buckets of a database file, as of its last complete transaction.

    Reads one page at a time, so a file of any size costs little memory.  The file may belong to
    a running member: its pages are replaced, never changed, until the next transactions.
    All methods raise BoltError and OSError.
    """

    def __init__(self, path: str, file: Optional[BinaryIO] = None) -> None:
        """Read `file` if it is given, and name it `path` in errors."""
        self.path = path
        self._file: BinaryIO = file or open(path, "rb")
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(self.close)
            self._meta = self._newest_meta()
            self._buckets = self._top_buckets()
            on_failure.pop_all()

    def __enter__(self) -> BoltReader:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    @property
    def names(self) -> List[bytes]:
        """The names of the buckets, sorted."""
        return list(self._buckets)

    def items(self, bucket: bytes) -> Iterator[Tuple[bytes, bytes]]:
        """Yield the keys and values of a bucket in the order of keys; nothing if it is absent."""
        value = self._buckets.get(bucket)
        if value is None:
            return
        if len(value) < _BUCKET_HEAD.size:
            raise self._damage(f"bucket {bucket!r} is cut")
        root = _BUCKET_HEAD.unpack_from(value)[0]
        if root:
            for _, key, content in self._walk(root):
                yield key, content
        else:
            for _, key, content in self._leaf(value[_BUCKET_HEAD.size:], "an inline bucket"):
                yield key, content

    def _newest_meta(self) -> _Meta:
        found = []
        sizes = (PAGE_BYTES, 1 << 13, 1 << 14, 1 << 15, _PAGE_BYTES_MAX)
        for offset in (0, *sizes):      # the second one stands one page behind the first
            self._file.seek(offset)
            data = self._file.read(_PAGE_HEAD.size + _META_BODY.size + 8)[_PAGE_HEAD.size:]
            if len(data) < _META_BODY.size + 8:
                continue
            body = data[:_META_BODY.size]
            magic, version, page, _, root, _, _, pages, number = _META_BODY.unpack(body)
            intact = _checksum(body) == int.from_bytes(data[_META_BODY.size:], "little")
            if magic == _BOLT_MAGIC and version == _BOLT_VERSION and intact and offset in (0, page):
                found.append(_Meta(page, root, pages, number))
        if not found or not 512 <= found[0].page_bytes <= _PAGE_BYTES_MAX:
            raise self._damage("it has no intact head: no database of etcd 3, or a damaged one")
        return max(found, key=lambda meta: meta.transaction)

    def _top_buckets(self) -> Dict[bytes, bytes]:
        return {key: value for flags, key, value in self._walk(self._meta.root)
                if flags & _BUCKET}

    def _walk(self, root: int) -> Iterator[Tuple[int, bytes, bytes]]:
        """Yield (flags, key, value) of all leaves below a page."""
        waiting = [[root]]              # pages to come, of each level
        seen = 0
        while waiting:
            if not waiting[-1]:
                waiting.pop()
                continue
            page = waiting[-1].pop()
            kind, data = self._page(page)
            seen += 1
            if seen > self._meta.pages or len(waiting) > _DEPTH_MAX:
                raise self._damage("its pages form a circle")
            if kind == _LEAF:
                yield from self._leaf(data, f"page {page}")
            else:
                waiting.append(self._children(data, page)[::-1])

    def _page(self, number: int) -> Tuple[int, bytes]:
        """Return the kind (branch or leaf) and all bytes of a page."""
        size = self._meta.page_bytes
        if not 2 <= number < self._meta.pages:
            raise self._damage(f"page {number} is none of its {self._meta.pages}")
        self._file.seek(number * size)
        data = self._file.read(size)
        if len(data) < size:
            raise self._damage(f"the file ends before page {number}")
        id, kind, _, overflow = _PAGE_HEAD.unpack_from(data)
        if id != number or kind not in (_BRANCH, _LEAF) or overflow >= self._meta.pages:
            raise self._damage(f"page {number} is damaged")
        if overflow:
            data += self._file.read(size * overflow)
        return kind, data

    def _leaf(self, data: bytes, what: str) -> Iterator[Tuple[int, bytes, bytes]]:
        for at in self._places(data, _LEAF_ELEMENT.size, what):
            flags, position, key_bytes, value_bytes = _LEAF_ELEMENT.unpack_from(data, at)
            key = at + position
            end = key + key_bytes + value_bytes
            if end > len(data):
                raise self._damage(f"{what} is damaged")
            yield flags, data[key:key + key_bytes], data[key + key_bytes:end]

    def _children(self, data: bytes, page: int) -> List[int]:
        places = self._places(data, _BRANCH_ELEMENT.size, f"page {page}")
        return [_BRANCH_ELEMENT.unpack_from(data, at)[2] for at in places]

    def _places(self, data: bytes, size: int, what: str) -> Sequence[int]:
        """Return the offsets of the elements of a page."""
        if len(data) < _PAGE_HEAD.size:
            raise self._damage(f"{what} is cut")
        count = _PAGE_HEAD.unpack_from(data)[2]
        end = _PAGE_HEAD.size + count * size
        if end > len(data):
            raise self._damage(f"{what} is damaged")
        return range(_PAGE_HEAD.size, end, size)

    def _damage(self, what: str) -> BoltError:
        return BoltError(f"{self.path}: {what}")


# -- writing


def write_bolt(file: BinaryIO, buckets: Dict[bytes, Items]) -> None:
    """Write a database with these buckets into an empty file.  Raises OSError.

    buckets  name -> items in ascending order of keys; they are taken one by one, so a bucket of
             any size costs the memory of one page, and of one key for each page
    """
    writer = _BoltWriter(file)
    rows = [(name, writer.bucket(items)) for name, items in sorted(buckets.items())]
    root = writer.tree(((name, value) for name, value in rows), _BUCKET)
    writer.finish(root)


class _BoltWriter:
    """Pages 0 and 1 are the heads and page 2 the empty free list; trees grow behind them."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._next = 3                  # page
        file.write(bytes(3 * PAGE_BYTES))

    def bucket(self, items: Items) -> bytes:
        """Write a bucket; return its value in the tree of buckets."""
        source = iter(items)
        first: List[Tuple[bytes, bytes]] = []
        size = _PAGE_HEAD.size
        for key, value in source:
            first.append((key, value))
            size += _LEAF_ELEMENT.size + len(key) + len(value)
            if size > _INLINE_BYTES_MAX:
                return _BUCKET_HEAD.pack(self.tree(_chain(first, source), 0), 0)
        return _BUCKET_HEAD.pack(0, 0) + _leaf_page(0, first, 0)

    def tree(self, items: Items, flags: int) -> int:
        """Write the leaves, then each level of branches above them; return the root page."""
        level = [(chunk[0][0] if chunk else b"", self._write(_leaf_page(self._next, chunk, flags)))
                 for chunk in _chunks(items, _LEAF_ELEMENT.size)]
        while len(level) > 1:
            rows = ((key, page.to_bytes(8, "little")) for key, page in level)
            level = [(chunk[0][0], self._write(_branch_page(self._next, chunk)))
                     for chunk in _chunks(rows, _BRANCH_ELEMENT.size - 8)]
        return level[0][1]

    def finish(self, root: int) -> None:
        """Write the heads and the free list."""
        self._file.seek(0)
        for number in (0, 1):
            body = _META_BODY.pack(
                _BOLT_MAGIC, _BOLT_VERSION, PAGE_BYTES, 0, root, 0, 2, self._next, number)
            head = _PAGE_HEAD.pack(number, _META, 0, 0) + body
            self._file.write((head + _checksum(body).to_bytes(8, "little"))
                             .ljust(PAGE_BYTES, b"\0"))
        self._file.write(_PAGE_HEAD.pack(2, _FREELIST, 0, 0))
        self._file.seek(0, os.SEEK_END)

    def _write(self, page: bytes) -> int:
        number = self._next
        self._file.write(page.ljust(-(-len(page) // PAGE_BYTES) * PAGE_BYTES, b"\0"))
        self._next += -(-len(page) // PAGE_BYTES)
        return number


def _chain(first: List[Tuple[bytes, bytes]], rest: Iterator[Tuple[bytes, bytes]]) -> Items:
    yield from first
    yield from rest


def _chunks(items: Items, element_bytes: int) -> Iterator[List[Tuple[bytes, bytes]]]:
    """Yield the items of one page after the other; one empty page if there are none."""
    chunk: List[Tuple[bytes, bytes]] = []
    size = _PAGE_HEAD.size
    for key, value in items:
        item_bytes = element_bytes + len(key) + len(value)
        if chunk and size + item_bytes > PAGE_BYTES:
            yield chunk
            chunk, size = [], _PAGE_HEAD.size
        chunk.append((key, value))
        size += item_bytes
    yield chunk


def _head(number: int, kind: int, count: int, size: int) -> bytes:
    overflow = max(-(-size // PAGE_BYTES) - 1, 0) if number else 0
    return _PAGE_HEAD.pack(number, kind, count, overflow)


def _leaf_page(number: int, items: Sequence[Tuple[bytes, bytes]], flags: int) -> bytes:
    """Return a leaf; number 0: the page of an inline bucket."""
    table: List[bytes] = []
    data: List[bytes] = []
    at = len(items) * _LEAF_ELEMENT.size    # from the place of the present element
    for key, value in items:
        table.append(_LEAF_ELEMENT.pack(flags, at, len(key), len(value)))
        data += key, value
        at += len(key) + len(value) - _LEAF_ELEMENT.size
    body = b"".join(table + data)
    return _head(number, _LEAF, len(items), _PAGE_HEAD.size + len(body)) + body


def _branch_page(number: int, items: Sequence[Tuple[bytes, bytes]]) -> bytes:
    """Return a branch; the values are page numbers in 8 bytes."""
    table: List[bytes] = []
    data: List[bytes] = []
    at = len(items) * _BRANCH_ELEMENT.size
    for key, page in items:
        table.append(_BRANCH_ELEMENT.pack(at, len(key), int.from_bytes(page, "little")))
        data.append(key)
        at += len(key) - _BRANCH_ELEMENT.size
    body = b"".join(table + data)
    return _head(number, _BRANCH, len(items), _PAGE_HEAD.size + len(body)) + body


# ============================================================================
# disk/files -- File operations of the log and the snapshots.
# ============================================================================


_WAL_NAME = re.compile(r"([0-9a-f]{16})-([0-9a-f]{16})\.wal")
_SNAP_NAME = re.compile(r"([0-9a-f]{16})-([0-9a-f]{16})\.snap")

# Path as given -> real path, which a moved link or another working directory may change later.
# POSIX locks do not exclude other members of the same process.
_locked_paths: Dict[str, str] = {}


class OsDisk:
    """Every file operation of log and snapshots; the simulator has another one.

    Data are durable after fsync or fdatasync of the handle, names after fsync_dir of their
    directory.  Raises OSError.
    """

    read_only = False           # True: a log is read without repairs

    def makedirs(self, path: str) -> None:
        os.makedirs(path, mode=0o700, exist_ok=True)

    def listdir(self, path: str) -> List[str]:
        """Return the names in a directory, sorted; [] if there is none."""
        try:
            return sorted(os.listdir(path))
        except FileNotFoundError:
            return []

    def read(self, path: str) -> bytes:
        with open(path, "rb") as file:
            return file.read()

    def create(self, path: str, mode: int = 0o600) -> int:
        """Make an empty file, or empty the existing one; return a handle for appending."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, mode)

    def open_append(self, path: str) -> int:
        """Return a handle for reading and appending to an existing file."""
        return os.open(path, os.O_RDWR | os.O_APPEND)

    def read_open(self, handle: int) -> bytes:
        """Return the whole file of a handle; as no descriptor is closed, the lock stays."""
        with open(handle, "rb", closefd=False) as file:
            file.seek(0)
            return file.read()

    def write(self, handle: int, data: bytes) -> None:
        written = os.write(handle, data)
        while written < len(data):
            data = data[written:]
            written = os.write(handle, data)

    def fdatasync(self, handle: int) -> None:
        _fdatasync(handle)

    def fsync(self, handle: int) -> None:
        os.fsync(handle)

    def close(self, handle: int) -> None:
        os.close(handle)

    def truncate(self, handle: int, size: int) -> None:
        """Cut a file to `size` bytes, durably."""
        os.ftruncate(handle, size)
        os.fsync(handle)

    def rename(self, old: str, new: str) -> None:
        os.replace(old, new)

    def unlink(self, path: str) -> None:
        os.unlink(path)

    def fsync_dir(self, path: str) -> None:
        fsync_dir(path)

    def lock(self, path: str, handle: int) -> bool:
        """Lock a file against other processes and other members in this one; False if taken.

        A POSIX lock, as in etcd 2: it is lost when any descriptor of the file is closed in this
        process, so a locked file must not be opened again.
        """
        real = os.path.realpath(path)
        if real in _locked_paths.values():
            return False
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            raise
        _locked_paths[path] = real
        return True

    def unlock(self, path: str) -> None:
        """Forget a lock; closing the handle has released it for other processes."""
        _locked_paths.pop(path, None)

    def is_locked(self, path: str) -> bool:
        return os.path.realpath(path) in _locked_paths.values()


_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def disk_full_as_error(
    path: str, undo: Callable[[], None] = _nothing,
    codes: Tuple[int, ...] = (*_FULL, *NO_DESCRIPTOR),
) -> Iterator[None]:
    """Turn a full disk, or a lack of descriptors, into DiskFull after undo(): it can be repeated.

    Not for syncs: after one has failed the contents of the disk are unknown, for any reason.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in codes:
            raise
        undo()
        hint = "raise the limit of open files (ulimit -n): " * (error.errno in NO_DESCRIPTOR)
        raise DiskFull(f"{os.strerror(error.errno).lower()}: {hint}{path}") from error


_fdatasync: Callable[[int], None] = getattr(os, "fdatasync", os.fsync)
OS_DISK = OsDisk()


# ============================================================================
# disk/records -- Records of the write-ahead log, encoded and decoded.
# ============================================================================


_RECORD_START = re.compile(rb"\x08[\x01-\x05]\x10")
_PLAIN_RECORD = re.compile(             # the head of a normal entry with data, or a hard state
    rb"(?s:.{7})\0\x08(?:\x02\x10(%b)\x1a(%b)\x08\0\x10(%b)\x18(%b)\"(%b)|"
    rb"\x03\x10(%b)\x1a(%b)(\x08%b\x10%b\x18%b))".replace(
        b"%b", rb"[\x80-\xff]{0,9}[\x00-\x7f]")
)


class RecordType(IntEnum):
    """walpb.Record types."""

    METADATA = 1
    ENTRY = 2
    STATE = 3
    CRC = 4
    SNAPSHOT = 5


class WalContents(NamedTuple):
    """The contents of a log behind its snapshot: entries ascend and have no gap."""

    metadata: bytes
    hard_state: HardState
    entries: List[Entry]
    snapshots: List[EntryID]            # of every snapshot record, {0, 0} included


LONG_ENTRY_BYTES = 4_096            # longer entries are not copied
CRC_STEP_BYTES = 1 << 20            # summed in one step: 3 ms
_RECORD_HEADS: Dict[int, bytes] = {kind: b"\x08%b\x10" % _BYTE[kind] for kind in RecordType}
_STATE_HEAD = _RECORD_HEADS[RecordType.STATE]


class WalEncoder:
    """Frames in etcd 2.x form, and the running checksum through all of them."""

    __slots__ = ("crc",)

    def __init__(self, crc: int = 0) -> None:
        self.crc = crc

    def record(self, kind: int, data: bytes) -> bytes:
        """Return the frame of one record; the chain includes its data."""
        self.crc = crc32c(data, self.crc)
        return self._frame_head(kind, len(data)) + data

    def batch(self, entries: Sequence[bytes], state: bytes) -> bytes:
        """Return the frames of entries and, unless it is empty, a hard state."""
        pieces = [*entries, state] if state else entries
        kind = _RECORD_HEADS[RecordType.ENTRY]
        parts: List[bytes] = []
        crcs = crc32c_chain(pieces, self.crc)
        for data, crc in zip(pieces, crcs):     # a hot path
            size = len(data)
            head = b"%b%b\x1a%b" % (
                kind if data is not state else _STATE_HEAD, encode_varint(crc),
                _SMALL[size] if size < 1_024 else encode_varint(size),
            )
            parts += (len(head) + size).to_bytes(8, "little"), head, data
        self.crc = crcs[-1] if crcs else self.crc
        return b"".join(parts)

    def long_batch(
        self, entries: Sequence[Entry], state: bytes
    ) -> Generator[None, None, List[bytes]]:
        """Do batch() in pieces, without copies, in steps of CRC_STEP_BYTES.

        256 KB take 0.5 ms less than by batch().
        """
        parts: List[bytes] = []
        summed = 0                      # bytes in this step
        for entry in entries:
            head = encode_entry_head(entry)
            crc, view = crc32c(head, self.crc), memoryview(entry.data)
            for offset in range(0, len(view), CRC_STEP_BYTES):
                if summed >= CRC_STEP_BYTES:
                    summed = 0
                    yield
                block = view[offset:offset + CRC_STEP_BYTES]
                crc = crc32c(block, crc)
                summed += len(block)
            self.crc = crc
            start = self._frame_head(RecordType.ENTRY, len(head) + len(entry.data))
            parts += start, head, entry.data
        if state:
            parts.append(self.record(RecordType.STATE, state))
        return parts

    def _frame_head(self, kind: int, size: int) -> bytes:
        """Return the frame of a record up to its `size` bytes of data."""
        head = b"%b%b\x1a%b" % (_RECORD_HEADS[kind], encode_varint(self.crc), encode_varint(size))
        return (len(head) + size).to_bytes(8, "little") + head

    def chain(self) -> bytes:
        """Return the crc record that begins a file."""
        record = _RECORD_HEADS[RecordType.CRC] + encode_varint(self.crc)
        return len(record).to_bytes(8, "little") + record


class WalRecord(NamedTuple):
    """One record of a file: kind (RecordType), stored checksum, data, and its end."""

    kind: int
    crc: int
    data: bytes
    end: int


RunHandler = Callable[["WalDecoder", List[Entry], bytes], None]     # entries; hard state, or b""


class WalDecoder:
    """The records of one file, checked against the chain of checksums.

    Reads 2.x frames and the padded ones of 3.x, also mixed.  `end` is the offset behind the last
    record that its reader has handled.  Raises TornTail if the file ends as a crash during a write
    leaves it, CrcMismatch for any other damage.

    The checksum covers neither lengths nor types: a wrong length shows as the record is whole
    without it, a wrong type in the shape of the data (see _WalReader).
    """

    def __init__(
        self, path: str, data: bytes, crc: int, handle_run: Optional[RunHandler] = None
    ) -> None:
        self.path = path
        self.data = data
        self.crc = crc
        self.end = 0
        self._handle_run = handle_run   # gets each run of plain records that _run finds

    def __iter__(self) -> Iterator[WalRecord]:
        size = len(self.data)
        while self.end < size:
            if self._handle_run is not None and self._run(self._handle_run):
                continue
            record = self._record()
            if record is None:
                return
            self._check(record)
            yield record
            self.end = record.end

    def _run(self, handle: RunHandler) -> bool:
        """Decode normal entries in a row, and the last hard state between them; False: none.

        One checksum is compared: that of the last record continues all before.  3 us an entry
        instead of 15.  Any other form is left to _record().
        """
        data, offset = self.data, self.end
        stop = offset + CRC_BLOCK_BYTES
        entries: List[Entry] = []
        parts: List[bytes] = []
        crc = state = term_bytes = b""
        term = index = 0
        while offset < stop:
            match = _PLAIN_RECORD.match(data, offset)
            end = offset + 8 + int.from_bytes(data[offset:offset + 7], "little")
            if match is None or end > len(data):
                break
            if match.group(8):
                last_crc, size, new_state = match.group(6, 7, 8)
                start = match.start(8)
                if match.end() != end or encode_varint(end - start) != size:
                    break
                state = new_state
            else:
                last_crc, size, terms, indexes, body_size = match.group(1, 2, 3, 4, 5)
                start, body = match.end(2), match.end()
                if encode_varint(end - start) != size or encode_varint(end - body) != body_size:
                    break
                if terms != term_bytes:
                    term_bytes, term = terms, decode_varint(terms, 0)[0]
                before, index = index, decode_varint(indexes, 0)[0]
                if index != before + 1 and entries:
                    break
                entries.append(Entry(0, term, index, data[body:end]))
            parts.append(data[start:end])
            crc, offset = last_crc, end
        if not parts or crc32c(b"".join(parts), self.crc) != decode_varint(crc, 0)[0]:
            return False
        try:
            handle(self, entries, state)
        except CodecError as error:
            raise self.damage(str(error)) from None
        self.crc, self.end = decode_varint(crc, 0)[0], offset
        return True

    def damage(self, reason: str) -> CrcMismatch:
        """Return the error for a damaged record at `end`."""
        return CrcMismatch(
            f"read wal error ({reason}) and cannot be repaired: {self.path} is damaged at offset"
            f" {self.end}; {REPAIR_HINT}"
        )

    def _record(self) -> Optional[WalRecord]:
        """Return the record at `end`; None for the zeros of a preallocated tail."""
        data, offset = self.data, self.end
        if offset + 8 > len(data):
            raise self._torn("inside a length")
        length, padding = _wal_frame(data, offset)
        if padding < 0:
            raise self.damage("impossible length")
        end = offset + 8 + length + padding
        if not length or end > len(data):
            self._check_tail(length)
            return None
        try:
            return WalRecord(*_decode_record(data[offset + 8:offset + 8 + length]), end)
        except CodecError as error:
            raise self._bad_record(end, str(error)) from None

    def _check(self, record: WalRecord) -> None:
        if record.kind == RecordType.CRC:
            if record.data or (self.crc and record.crc != self.crc):
                raise self.damage("wal: crc mismatch")
            self.crc = record.crc
            return
        crc = crc32c(record.data, self.crc)
        if crc != record.crc:
            raise self._bad_record(record.end, "walpb: crc mismatch")
        self.crc = crc

    def _check_tail(self, length: int) -> None:
        """Tell the tail from damage, after a length that is 0 or points past the end.

        A cut before acknowledged records would lose them.
        """
        data, offset = self.data, self.end
        if not data[offset:].strip(b"\0"):
            return
        whole = _intact_length(data, offset + 8, self.crc)
        if (whole and whole != length) or _has_records(data, offset + 9, self.crc):
            raise self.damage("impossible length")
        raise self._torn("inside a record")

    def _bad_record(self, end: int, reason: str) -> WalError:
        """Return the error of a bad record: torn if it is the last and lacks a sector (3.4)."""
        if not self.data[end:].strip(b"\0"):
            for sector in range(-(-self.end // 512) * 512, end, 512):
                if not self.data[sector:min(sector + 512, end)].strip(b"\0"):
                    return self._torn("in a sector that was never written")
        return self.damage(reason)

    def _torn(self, where: str) -> TornTail:
        return TornTail(f"unexpected EOF: {self.path} ends {where} at offset {self.end}")


def _wal_frame(data: bytes, offset: int) -> Tuple[int, int]:
    """Return (length, padding) of the frame at `offset`; padding -1: impossible."""
    field = int.from_bytes(data[offset:offset + 8], "little")
    length, top = field & ((1 << 56) - 1), field >> 56
    if top == 0:
        return length, 0
    return length, top & 7 if top == 0x80 | -length % 8 else -1


_RECORD = {1: ("kind", 0, int), 2: ("crc", 0, int), 3: ("data", 2, bytes)}


def _decode_record(data: bytes) -> Tuple[int, int, bytes]:
    values = decode_known(data, _RECORD, "Record")
    kind = values.get("kind", 0)
    if not RecordType.METADATA <= kind <= RecordType.SNAPSHOT:
        raise CodecError(f"unknown record type {kind}")
    return kind, values.get("crc", 0), values.get("data", b"")


def _intact_length(data: bytes, start: int, crc: int) -> int:
    """Return the length of the record at `start` by its own fields, 0 if it is not intact."""
    try:
        stored, offset = decode_varint(data, start + 3)
        if data[start:start + 3] == b"\x08\x04\x10":
            return offset - start if stored == crc else 0
        size, offset = decode_varint(data, offset + 1)
    except CodecError:
        return 0
    end = offset + size
    if end > len(data) or crc32c(data[offset:end], crc) != stored:
        return 0
    return end - start


def _has_records(data: bytes, start: int, crc: int) -> bool:
    """Tell whether, behind `start`, a record continues the chain at `crc`, or another record."""
    for match in _RECORD_START.finditer(data, start):
        if _intact_length(data, match.start(), crc):
            return True
        record = _unchecked_record(data, match.start() - 8)
        following = record and _unchecked_record(data, record.end)
        if record and following and crc32c(following.data, record.crc) == following.crc:
            return True
    return False


def _unchecked_record(data: bytes, offset: int) -> Optional[WalRecord]:
    length, padding = _wal_frame(data, offset)
    end = offset + 8 + length
    if length < 4 or padding < 0 or end + padding > len(data):
        return None
    try:
        return WalRecord(*_decode_record(data[offset + 8:end]), end + padding)
    except CodecError:
        return None


# ============================================================================
# disk/snapshots -- Snapshot files and the data directory.
# ----------------------------------------------------------------------------
# Knows neither the store nor the rules of Raft.
# ============================================================================


class SnapshotFile(NamedTuple):
    """A raftpb.Snapshot in pieces: `size` bytes with the checksum `crc`."""

    id: EntryID
    pieces: Sequence[bytes]
    size: int
    crc: int

    @property
    def name(self) -> str:
        return f"{self.id.term:016x}-{self.id.index:016x}.snap"

    @property
    def head(self) -> bytes:
        """The bytes of the file before the pieces."""
        return b"\x08%b\x12%b" % (encode_varint(self.crc), encode_varint(self.size))


def _ignore_index(raft_index: int) -> None:
    pass


class Snapshotter:
    """The directory of snapshot files, `<term>-<index>.snap`.  Source: etcd 2.3 snap."""

    def __init__(self, directory: str, *, disk: OsDisk = OS_DISK) -> None:
        self.directory = directory
        self.disk = disk
        self.before_write: Callable[[int], None] = _ignore_index    # gets the index of each file

    def save(self, snapshot: Snapshot) -> None:
        """Write a snapshot durably.  Its WAL record must be durable before.

        Raises DiskFull, leaving nothing, and OSError.
        """
        data = encode_snapshot(snapshot)
        snapshot_id = EntryID(snapshot.term, snapshot.index)
        self.write(SnapshotFile(snapshot_id, (data,), len(data), crc32c(data)))

    def write(self, file: SnapshotFile) -> None:
        """Do save() for a snapshot with a known checksum.

        Differs from etcd: an incomplete file has another name, so load() on another thread never
        reads half of it.
        """
        self.before_write(file.id.index)
        path = os.path.join(self.directory, file.name)
        disk, temporary = self.disk, path + ".tmp"
        with disk_full_as_error(path):
            handle = disk.create(temporary)
        try:
            with disk_full_as_error(path, lambda: disk.unlink(temporary)):
                for piece in (file.head, *file.pieces):
                    disk.write(handle, piece)
            disk.fsync(handle)
        finally:
            disk.close(handle)
        disk.rename(temporary, path)
        with disk_full_as_error(path, codes=NO_DESCRIPTOR):
            disk.fsync_dir(self.directory)      # opens it

    def load(self, valid: Optional[Container[EntryID]] = None) -> Optional[Snapshot]:
        """Return the newest good snapshot, or None.  A bad file is renamed to `.broken`.

        valid  the snapshots in the log; other files are skipped
        """
        log = package_logger("snap")
        for name in reversed(self.disk.listdir(self.directory)):
            match = _SNAP_NAME.fullmatch(name)
            if match is None:
                if not name.endswith((".broken", ".tmp", ".snap.db")) and name != "db":
                    log.warning("skipped unexpected non snapshot file %s", name)
                continue
            term, index = (int(part, 16) for part in match.groups())
            if valid is not None and EntryID(term, index) not in valid:
                log.warning("skipped snapshot file %s: the log does not know it", name)
                continue
            snapshot = self._read(name)
            if snapshot is not None:
                return snapshot
        return None

    def check_log(self, wal_dir: str, known: Iterable[EntryID]) -> None:
        """Raise WalError if a file, intact or damaged, is newer than all snapshots in the log.

        Its record was durable before its file was begun, so the end of the log is lost, and with
        it votes and entries that other members count on.  Differs from etcd, which starts in the
        past.
        """
        newest = max((snapshot_id.index for snapshot_id in known), default=-1)
        for name in reversed(self.disk.listdir(self.directory)):
            match = _SNAP_NAME.fullmatch(name)
            path = os.path.join(self.directory, name)
            if match is None or int(match.group(2), 16) <= newest:
                continue
            state, way = "damaged", ""
            with contextlib.suppress(CodecError):
                decode_snapshot_file(self.disk.read(path))
                way = f", or by `pyetcd restore {path}`, without what came after it"
                state = "intact"
            segments = list(filter(_WAL_NAME.fullmatch, self.disk.listdir(wal_dir)))
            last = os.path.join(wal_dir, segments[-1]) if segments else "no file"
            raise WalError(
                f"wal: the end of the log is lost: {path} is {state}, but the log in {wal_dir}"
                f" (its last: {last}) ends before it; a later .wal file is missing, or the last"
                f" one was cut: put it back; or {REPAIR_HINT}{way}; or give the right -wal-dir"
            )

    def _read(self, name: str) -> Optional[Snapshot]:
        path = os.path.join(self.directory, name)
        try:
            return decode_snapshot_file(self.disk.read(path))
        except FileNotFoundError:
            return None                 # purged in the meantime
        except CodecError as error:
            package_logger("snap").error(
                "cannot read snapshot file %s (%s); renamed to %s.broken, using the one before",
                name, error, name,
            )
            self.disk.rename(path, path + ".broken")
            return None


def decode_snapshot_file(content: bytes) -> Snapshot:
    """Return the snapshot in a file.  Raises CodecError if it is damaged."""
    values = decode_known(content, {1: ("crc", 0, int), 2: ("data", 2, bytes)}, "snappb.Snapshot")
    data = values.get("data", b"")
    if not data:
        raise CodecError("unexpected empty snapshot")
    if crc32c(data) != values.get("crc", 0):
        raise CodecError("crc mismatch")
    return decode_snapshot(data)


def purge_files(
    directory: str, suffix: str, keep: int, *, disk: OsDisk = OS_DISK
) -> List[str]:
    """Remove the oldest files beyond `keep` (0: none), up to the first locked one.

    Also temporary files of a crash.  Returns the paths removed.  Raises OSError.
    """
    if not keep:
        return []
    listing = disk.listdir(directory)
    names = [name for name in listing if name.endswith(suffix)]
    removed: List[str] = []
    # A file that is being written now has a later name than the newest complete one.
    stale = [n for n in listing if n.endswith(suffix + ".tmp") and names and n < names[-1]]
    for name in stale + names[:-keep]:
        path = os.path.join(directory, name)
        if disk.is_locked(path):
            break
        disk.unlink(path)
        package_logger("etcdserver").info("purged file %s successfully", path)
        removed.append(path)
    return removed


class DataDir(NamedTuple):
    """Paths of a data directory."""

    root: str
    member: str
    wal: str
    snap: str
    proxy: str


def prepare_data_dir(data_dir: str, wal_dir: str = "") -> DataDir:
    """Make a data directory usable: layout, modes, a test write; migrate the layout of 2.0.0.

    Raises StartError if it is another program's, not a directory, or not writable.
    """
    member = os.path.join(data_dir, "member")
    paths = DataDir(
        data_dir, member, wal_dir or os.path.join(member, "wal"), os.path.join(member, "snap"),
        os.path.join(data_dir, "proxy"),
    )
    try:
        names = set(os.listdir(data_dir)) if os.path.exists(data_dir) else set()
    except OSError as error:
        raise StartError(
            f"error listing data dir: {data_dir} ({error.strerror}); -data-dir must name a"
            " directory that this user may read and write"
        ) from None
    check_layout(data_dir, names)
    kind = "member"
    try:
        make_dirs((member, data_dir))
        check_writable(data_dir)
        check_writable(member)
        _migrate(paths, names)
        make_dirs((paths.snap,))
        kind = "WAL"
        make_dirs((paths.wal,))
        check_writable(paths.wal)
    except OSError as error:
        raise StartError(
            f"cannot write to {kind} directory: {error}; give the directory to this user, or"
            " choose another -data-dir"
        ) from None
    return paths


def absent_dirs(*paths: str) -> List[str]:
    """Return the missing ones of `paths` and of the directories above, deepest first."""
    found: Set[str] = set()
    for path in paths:
        while path and not os.path.exists(path):
            found.add(path)
            path = os.path.dirname(path)
    return sorted(found, key=len, reverse=True)


def make_dirs(paths: Sequence[str]) -> None:
    """Make data directories, given deepest first as by absent_dirs().  Raises OSError."""
    for path in reversed(paths):
        os.makedirs(path, mode=0o700, exist_ok=True)
        with contextlib.suppress(PermissionError):  # a parent that we may not list
            fsync_dir(os.path.dirname(path) or ".")


def remove_dirs(paths: Iterable[str]) -> None:
    """Remove the empty ones of `paths`, given deepest first."""
    for path in paths:
        with contextlib.suppress(OSError):
            os.rmdir(path)


def check_layout(data_dir: str, names: Set[str]) -> None:
    if {"member", "proxy"} <= names:
        raise StartError(
            f"invalid datadir. Both member and proxy directories exist. Remove the one in"
            f" {data_dir} that is not wanted"
        )
    for name in sorted(names - {"member", "proxy", "wal", "snap"}):
        package_logger("etcd").warning(
            "found invalid file/dir %s under data dir %s (Ignore this if you are upgrading etcd)",
            name, data_dir,
        )


def check_writable(path: str) -> None:
    probe = os.path.join(path, ".touch")
    with open(probe, "wb"):
        pass
    os.unlink(probe)


def _migrate(paths: DataDir, names: Set[str]) -> None:
    """Move wal and snap from the top, their place in etcd 2.0.0, to member.

    The log moves last: as long as it is at the top, the next start continues after a crash.
    """
    old = os.path.join(paths.root, "wal")
    if "wal" not in names or not os.listdir(old):
        return
    for name in ("snap", "wal"):
        path = os.path.join(paths.root, name)
        target = os.path.join(paths.member, name)
        if os.path.isdir(path) and not (os.path.isdir(target) and os.listdir(target)):
            os.replace(path, target)
            fsync_dir(paths.member)
            fsync_dir(paths.root)


# ============================================================================
# disk/v3_data -- Data of etcd's v3 API, of which this member keeps none: databases without it, and a mark.
# ============================================================================


_MARK = "v3-data"                   # file in the member directory


class V3Mark:
    """Whether the cluster holds v3 data: then this member must not pass its empty database on.

    A file remembers it, since the entries that wrote the data are compacted in time.

    member_dir  with the file, and with snap/db; "": remember it in memory only
    """

    def __init__(self, member_dir: str = "") -> None:
        self.path = member_dir and os.path.join(member_dir, _MARK)
        self.database = member_dir and os.path.join(member_dir, "snap", "db")
        self.is_set = bool(member_dir) and os.path.exists(self.path)
        with contextlib.suppress(FileNotFoundError):
            if member_dir and holds_v3_data(open(self.database, "rb")):
                self.set(self.database)

    def set(self, where: str) -> None:
        """Remember v3 data; `where` it was found goes to the log."""
        if self.is_set:
            return
        self.is_set = True
        log = package_logger("etcdserver")
        log.warning(
            "%s holds data of etcd's v3 API, which this member does not keep: members of etcd 3"
            " can get it from one another only", where,
        )
        if self.path:
            try:
                _write_file(self.path, b"")
            except OSError as error:
                log.error("cannot write %s: %s", self.path, error)

    def write_database(self, raft_index: int) -> None:
        """Write the database with which etcd 3 starts on a snapshot up to raft_index.

        Thread: any.
        """
        if self.database and not self.is_set:
            try:
                _write_file(self.database, empty_database(raft_index))
            except OSError as error:
                package_logger("snap").error("cannot write %s: %s", self.database, error)

    def remove_database(self) -> None:
        """Remove the database, so that etcd 2.3 starts here, unless it holds data."""
        if self.database and not self.is_set:
            with contextlib.suppress(OSError):
                os.unlink(self.database)


def _write_file(path: str, data: bytes) -> None:
    temporary = path + ".tmp"
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.rename(temporary, path)
    fsync_dir(os.path.dirname(path))


def empty_database(raft_index: int) -> bytes:
    """Return the database without keys that etcd 3 needs beside a snapshot up to raft_index."""
    file = io.BytesIO()
    write_bolt(file, v3_buckets(raft_index))
    return file.getvalue()


def holds_v3_data(database: IO[bytes]) -> bool:
    """Return whether a database of etcd 3 holds keys or users.

    database  a file at the start of the database; it is closed

    A damaged one counts as one that does; none at all holds nothing.
    """
    with database:
        start = database.tell()
        if not database.read(1):
            return False
        database.seek(start)
        try:
            reader = BoltReader("database", cast(BinaryIO, _Tail(database)))
            return any(True for bucket in _DATA_BUCKETS for _ in reader.items(bucket))
        except (BoltError, OSError):
            return True


_DATA_BUCKETS = (b"key", b"lease", b"authUsers", b"authRoles")


class _Tail(io.RawIOBase):
    """A file from the present position of another one on."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._start = file.tell()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(self._start + offset) - self._start

    def read(self, size: int = -1) -> bytes:
        return self._file.read(size)


# ============================================================================
# disk/wal -- The write-ahead log: the files of etcd 2.x, read and written.
# ----------------------------------------------------------------------------
# Knows neither the store nor the rules of Raft.
# ============================================================================


_LOG_START = EntryID(0, 0)


class Cut(NamedTuple):
    """The next segment: its file name and the bytes it begins with."""

    name: str
    head: bytes


class Wal:
    """The write-ahead log: a directory of segments, each continuing the checksum of the last.

    encode, encode_snapshot, segment_full and encode_cut belong to the reactor's thread and touch
    no file; write, cut, release_to and close belong to the wal thread and touch only files.
    Source: etcd 2.3 wal/wal.go; file formats in wal/walpb.
    """

    def __init__(
        self, directory: str, metadata: bytes, *, disk: OsDisk, segment_bytes: int
    ) -> None:
        self.directory = directory
        self._metadata = metadata
        self._disk = disk
        self._segment_bytes = segment_bytes
        self._encoder = WalEncoder()
        self._hard_state = HardState()          # as last encoded
        self._last_index = -1                   # of the last entry encoded; -1: no segment yet
        self._sequence = -1                     # of the segment that encode() fills
        self._size = 0                          # bytes handed out for it
        self._held: List[Tuple[str, int]] = []  # locked segments, oldest first: name, handle
        self._end = 0                           # bytes written to the newest of them

    # -- opening -----------------------------------------------------------

    @classmethod
    def create(
        cls, directory: str, metadata: bytes, *, disk: OsDisk = OS_DISK,
        segment_bytes: int = SEGMENT_BYTES_MAX,
    ) -> Wal:
        """Begin a new log, durably.  Raises WalError if there is one, FileLocked, OSError."""
        if cls.exists(directory, disk=disk):
            raise WalError(f"wal: file already exists: {directory} holds a log")
        wal = cls(directory, metadata, disk=disk, segment_bytes=segment_bytes)
        disk.makedirs(directory)
        name, head = wal.encode_cut()
        wal.cut(Cut(name, head + wal.encode_snapshot(_LOG_START)))
        return wal

    @classmethod
    def open(
        cls, directory: str, start: EntryID = _LOG_START, *, disk: OsDisk = OS_DISK,
        segment_bytes: int = SEGMENT_BYTES_MAX,
    ) -> Tuple[Wal, WalContents]:
        """Read the log behind the snapshot `start`, and get ready to append.

        A torn tail is cut off, as no entry in it was ever acknowledged; a copy stays as
        `.broken`.  Raises CrcMismatch, FileLocked and WalError; the text names the remedy.
        """
        names = _segments_from(directory, start.index, disk)
        reader = _WalReader(directory, start, disk)
        size = 0
        with contextlib.ExitStack() as cleanup:
            held = cls._lock(directory, names, disk, cleanup)
            for name, handle in held:
                size = reader.read(name, handle, last=name == names[-1])
            contents = reader.contents()
            cleanup.pop_all()
        wal = cls(directory, contents.metadata, disk=disk, segment_bytes=segment_bytes)
        wal._encoder.crc = reader.crc
        wal._hard_state = contents.hard_state
        wal._last_index = contents.entries[-1].index if contents.entries else start.index
        wal._sequence, wal._size = _wal_position(names[-1])[0], size
        wal._held, wal._end = held, size
        return wal, contents

    @classmethod
    def _lock(
        cls, directory: str, names: List[str], disk: OsDisk, cleanup: contextlib.ExitStack
    ) -> List[Tuple[str, int]]:
        """Open and lock segments, which `cleanup` unlocks."""
        held: List[Tuple[str, int]] = []
        cleanup.callback(cls._unlock, directory, held, disk)
        for name in names:
            path = os.path.join(directory, name)
            # To close a descriptor frees the lock of a member in this process: do not open one.
            handle = None if disk.is_locked(path) else disk.open_append(path)
            if handle is None or not _lock_or_close(disk, path, handle):
                raise FileLocked(
                    f"open wal error: file already locked: {path} belongs to a running member;"
                    " stop it, or give this one another -data-dir"
                )
            held.append((name, handle))
        return held

    @staticmethod
    def _unlock(directory: str, held: List[Tuple[str, int]], disk: OsDisk) -> None:
        """Free each of the files, even if the close of one of them fails."""
        with contextlib.ExitStack() as each:
            for name, handle in held:
                each.callback(disk.unlock, os.path.join(directory, name))
                each.callback(disk.close, handle)

    @staticmethod
    def exists(directory: str, *, disk: OsDisk = OS_DISK) -> bool:
        return any(map(_WAL_NAME.fullmatch, disk.listdir(directory)))

    @staticmethod
    def snapshots(directory: str, *, disk: OsDisk = OS_DISK) -> List[EntryID]:
        """Return the snapshots in the log; only their files may be used.

        Reads frames without their checksums, which open() checks.  Raises FileLocked.
        """
        names = [name for name in disk.listdir(directory) if _WAL_NAME.fullmatch(name)]
        with contextlib.ExitStack() as cleanup:
            held = Wal._lock(directory, names, disk, cleanup)
            return [id for _, handle in held for id in _scan_snapshots(disk.read_open(handle))]

    @staticmethod
    def read_until_damage(
        directory: str, start: EntryID, *, disk: OsDisk
    ) -> Tuple[WalContents, str]:
        """Return what the log holds behind the snapshot `start` up to the first damage, and what
        the damage is; "" if all is well.  Raises FileLocked, OSError.
        """
        reader = _WalReader(directory, start, disk)
        try:
            names = _segments_from(directory, start.index, disk)
            with contextlib.ExitStack() as cleanup:
                for name, handle in Wal._lock(directory, names, disk, cleanup):
                    reader.read(name, handle, last=name == names[-1])
            return reader.contents(), ""
        except FileLocked:
            raise
        except WalError as error:
            return reader.contents_so_far(), str(error)

    @staticmethod
    def voters_recorded(directory: str, *, disk: OsDisk) -> Set[EntryID]:
        """Return the snapshots whose records in the log carry the voters, as etcd 3.5 writes."""
        found: Set[EntryID] = set()
        for name in filter(_WAL_NAME.fullmatch, disk.listdir(directory)):
            for data in _snapshot_records(disk.read(os.path.join(directory, name))):
                with contextlib.suppress(CodecError):
                    snapshot_id = _decode_walpb_snapshot(data)
                    if data != _encode_walpb_snapshot(snapshot_id):
                        found.add(snapshot_id)
        return found

    # -- reactor's side ----------------------------------------------------

    def encode(self, hard_state: Optional[HardState], entries: Sequence[Entry]) -> bytes:
        """Return the frames of entries, then of the hard state if it changed."""
        return b"".join(finish(self.encode_steps(hard_state, entries)))

    def encode_steps(
        self, hard_state: Optional[HardState], entries: Sequence[Entry]
    ) -> Generator[None, None, List[bytes]]:
        """Do encode() in steps of some ms, into pieces; no other encode may come between."""
        state = b""
        if entries:
            self._last_index = entries[-1].index
        if hard_state is not None and hard_state != self._hard_state:
            self._hard_state = hard_state
            state = encode_hard_state(hard_state)
        if max([len(entry.data) for entry in entries], default=0) < LONG_ENTRY_BYTES:
            data = [self._encoder.batch([e.encoded or encode_entry(e) for e in entries], state)]
        else:
            data = yield from self._encoder.long_batch(entries, state)
        for entry in entries:
            entry.encoded = None
        self._size += sum(map(len, data))
        return data

    def encode_snapshot(self, snapshot_id: EntryID) -> bytes:
        """Return the frame that makes a snapshot's file usable; it is synced before the file."""
        data = self._encoder.record(RecordType.SNAPSHOT, _encode_walpb_snapshot(snapshot_id))
        self._size += len(data)
        self._last_index = max(self._last_index, snapshot_id.index)
        return data

    def segment_full(self, *, after_snapshot: bool = False) -> bool:
        """Tell whether the next batch belongs into a new segment, in most cases after a snapshot.

        A start reads from the segment that holds the snapshot's index, some 3 us an entry.
        """
        return self._size >= self._segment_bytes // (SEGMENT_PARTS if after_snapshot else 1)

    def encode_cut(self) -> Cut:
        self._sequence += 1
        encoder = self._encoder
        head = encoder.chain() + encoder.record(RecordType.METADATA, self._metadata)
        if self._hard_state != HardState():
            head += encoder.record(RecordType.STATE, encode_hard_state(self._hard_state))
        self._size = len(head)
        return Cut(_wal_name(self._sequence, self._last_index + 1), head)

    # -- wal thread's side -------------------------------------------------

    def write(self, *data: bytes, sync: bool) -> None:
        """Append to the newest segment.

        Raises DiskFull, then try again later, or OSError, then never write again.
        """
        name, handle = self._held[-1]
        path = os.path.join(self.directory, name)
        with disk_full_as_error(path, lambda: self._disk.truncate(handle, self._end)):
            for piece in data:
                self._disk.write(handle, piece)
        self._end += sum(map(len, data))
        if sync:
            self._disk.fdatasync(handle)

    def cut(self, cut: Cut) -> None:
        """Sync the current segment and begin the next, which gets its name when it is durable.

        Raises as write() does.
        """
        disk, directory = self._disk, self.directory
        if self._held:
            disk.fsync(self._held[-1][1])
        path = os.path.join(directory, cut.name)
        with disk_full_as_error(path):
            handle = disk.create(path + ".tmp")
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(disk.close, handle)
            with disk_full_as_error(path):
                disk.write(handle, cut.head)
            disk.fsync(handle)
            disk.rename(path + ".tmp", path)
            with disk_full_as_error(path, codes=NO_DESCRIPTOR):
                disk.fsync_dir(directory)   # opens it
            if not disk.lock(path, handle):
                raise FileLocked(f"open wal error: file already locked: {path}")
            on_failure.pop_all()
        if self._held:
            package_logger("wal").info("segmented wal file %s is created", path)
        self._held.append((cut.name, handle))
        self._end = len(cut.head)

    def release_to(self, index: int) -> None:
        """Unlock the segments that a snapshot at `index` replaces, so that they can be purged."""
        earlier = sum(_wal_position(name)[1] < index for name, _ in self._held)
        keep_from = max(earlier - 1, 0)         # the last of them holds `index`
        self._unlock(self.directory, self._held[:keep_from], self._disk)
        del self._held[:keep_from]

    def close(self) -> None:
        """Release all files; has no effect a second time."""
        held, self._held = self._held, []
        self._unlock(self.directory, held, self._disk)


def _lock_or_close(disk: OsDisk, path: str, handle: int) -> bool:
    with contextlib.ExitStack() as on_failure:
        on_failure.callback(disk.close, handle)
        if disk.lock(path, handle):
            on_failure.pop_all()
            return True
    return False


def _scan_snapshots(data: bytes) -> Iterator[EntryID]:
    """Yield the ids in the snapshot records of a segment, up to the first impossible frame."""
    for record in _snapshot_records(data):
        with contextlib.suppress(CodecError):
            yield _decode_walpb_snapshot(record)


def _snapshot_records(data: bytes) -> Iterator[bytes]:
    offset = 0
    while offset + 8 <= len(data):
        length, padding = _wal_frame(data, offset)
        body = offset + 8
        offset = body + length + padding
        if not length or padding < 0 or offset > len(data):
            return
        if data[body:body + 2] == b"\x08\x05":
            with contextlib.suppress(CodecError):
                yield _decode_record(data[body:body + length])[2]


class _WalReader:
    """Collects the contents of the segments, in order."""

    def __init__(self, directory: str, start: EntryID, disk: OsDisk) -> None:
        self.crc = 0
        self._directory = directory
        self._start = start
        self._disk = disk
        self._metadata = b""
        self._headed = False                # the current file has its metadata
        self._hard_state = HardState()
        self._entries: List[Entry] = []
        self._snapshots: List[EntryID] = []
        self._start_term = start.term if not start.index else 0     # of our entry at start.index

    def read(self, name: str, handle: int, *, last: bool) -> int:
        """Read one segment; return its size after a repair."""
        path = os.path.join(self._directory, name)
        decoder = WalDecoder(path, self._disk.read_open(handle), self.crc, self._add_run)
        self._headed, torn = False, ""
        try:
            for record in decoder:
                self._add_record(decoder, record)
        except TornTail as error:
            torn = str(error)
        if not self._headed:
            raise decoder.damage("cut inside its head")     # no crash does that: it was renamed
        if torn and not last:
            raise CrcMismatch(
                f"read wal error ({torn}) and cannot be repaired: later segments exist;"
                f" {REPAIR_HINT}"
            )
        repairs = not self._disk.read_only
        if torn and repairs:
            self._keep_copy(decoder)
        self.crc = decoder.crc
        if last and repairs and decoder.end < len(decoder.data):
            self._disk.truncate(handle, decoder.end)    # zeros of preallocation, or torn bytes
        return decoder.end

    def contents_so_far(self) -> WalContents:
        """Return what was read before the damage."""
        return WalContents(self._metadata, self._hard_state, self._entries, self._snapshots)

    def contents(self) -> WalContents:
        """Return the log behind the snapshot.  Raises WalError if they do not fit.

        The state may be older than the snapshot: after a crash between the file of a received
        snapshot and the frames behind it.  Then this member has not voted in the snapshot's term.
        """
        start = self._start
        if start not in self._snapshots:
            raise WalError(
                f"wal: snapshot not found: {self._directory} has no record of the snapshot at"
                f" index {start.index}; {REPAIR_HINT}"
            )
        term, vote, commit = self._hard_state
        if start.index:
            vote = vote if term >= start.term else 0
            term, commit = max(term, start.term), max(commit, start.index)
        last = start.index + len(self._entries)
        if commit > last:
            raise WalError(
                f"wal: entries {last + 1} to {commit} are missing: {self._directory} and the"
                f" snapshot at index {start.index} do not fit, perhaps as a later snapshot file is"
                f" lost or damaged; {REPAIR_HINT}"
            )
        state = HardState(term, vote, commit)
        return WalContents(self._metadata, state, self._entries, self._snapshots)

    def _keep_copy(self, decoder: WalDecoder) -> None:
        path, log = decoder.path, package_logger("wal")
        log.warning("repairing %s", path)
        broken = self._disk.create(path + ".broken")
        self._disk.write(broken, decoder.data)
        self._disk.fsync(broken)
        self._disk.close(broken)
        log.warning("repaired WAL error (unexpected EOF): cut %s at offset %d", path, decoder.end)

    def _add_record(self, decoder: WalDecoder, record: WalRecord) -> None:
        data = record.data
        try:
            if record.kind == RecordType.ENTRY:
                self._add_entry(decoder, _wal_entry(data))
            elif record.kind == RecordType.STATE:
                self._set_state(data)
            elif record.kind == RecordType.METADATA:
                if not data or (self._metadata and self._metadata != data):
                    raise decoder.damage("wal: conflicting metadata found")
                self._metadata, self._headed = data, True
            elif record.kind == RecordType.SNAPSHOT:
                self._add_snapshot(_decode_walpb_snapshot(data))
        except CodecError as error:
            raise decoder.damage(str(error)) from None

    def _add_run(self, decoder: WalDecoder, entries: List[Entry], state: bytes) -> None:
        if entries and entries[0].index > self._start.index:    # the usual case
            self._add_entry(decoder, entries[0])
            self._entries += entries[1:]
        else:
            for entry in entries:
                self._add_entry(decoder, entry)
        if state:
            self._set_state(state)

    def _set_state(self, data: bytes) -> None:
        self._hard_state = decode_hard_state(data)
        if not self._hard_state.term or encode_hard_state(self._hard_state) != data:
            raise CodecError("not a hard state")

    def _add_entry(self, decoder: WalDecoder, entry: Entry) -> None:
        start = self._start.index
        if entry.index <= start:
            self._start_term = entry.term if entry.index == start else 0
            self._entries.clear()       # a rewritten suffix begins before the snapshot
            return
        position = entry.index - start - 1
        if position > len(self._entries):
            raise decoder.damage(
                f"entries {start + len(self._entries) + 1} to {entry.index - 1} are missing"
            )
        del self._entries[position:]
        self._entries.append(entry)

    def _add_snapshot(self, snapshot_id: EntryID) -> None:
        """Note a snapshot.  It replaces a log with another entry in its place: a leader sent it.

        Entries before the record of their snapshot come from a backup by etcdctl.
        """
        self._snapshots.append(snapshot_id)
        if snapshot_id == self._start and self._start_term not in (0, snapshot_id.term):
            self._entries.clear()
            self._start_term = snapshot_id.term


def _wal_entry(data: bytes) -> Entry:
    """Decode an entry.  Raises CodecError for the data of any other type of record."""
    entry = decode_entry(data)
    if not entry.index or entry.type > EntryType.CONF_CHANGE_V2 or (entry.type and not entry.data):
        raise CodecError("not an entry")
    return entry


def _wal_name(sequence: int, index: int) -> str:
    return f"{sequence:016x}-{index:016x}.wal"


def _wal_position(name: str) -> Tuple[int, int]:
    """Return (sequence, first index) of a segment's name."""
    return int(name[:16], 16), int(name[17:33], 16)


def _segments_from(directory: str, index: int, disk: OsDisk) -> List[str]:
    """Return the names of the segments that hold the entries behind `index`, in order."""
    names = []
    for name in disk.listdir(directory):
        if _WAL_NAME.fullmatch(name):
            names.append(name)
        elif not name.endswith((".tmp", ".broken")):
            package_logger("wal").warning("ignored file %s in wal", name)
    first = max((i for i, n in enumerate(names) if _wal_position(n)[1] <= index), default=-1)
    names = names[max(first, 0):]
    sequences = [_wal_position(name)[0] for name in names]
    if first < 0 or sequences != list(range(sequences[0], sequences[0] + len(names))):
        raise WalError(
            f"wal: file not found: {directory} lacks a segment behind index {index};"
            f" {REPAIR_HINT}"
        )
    return names


def _encode_walpb_snapshot(snapshot_id: EntryID) -> bytes:
    return b"\x08%b\x10%b" % (encode_varint(snapshot_id.index), encode_varint(snapshot_id.term))


def _decode_walpb_snapshot(data: bytes) -> EntryID:
    """Inverse of _encode_walpb_snapshot; etcd 3.5 adds the voters as field 3."""
    values = decode_known(data, {1: ("index", 0, int), 2: ("term", 0, int)}, "walpb.Snapshot")
    snapshot_id = EntryID(values.get("term", 0), values.get("index", 0))
    known = _encode_walpb_snapshot(snapshot_id)
    if data[:len(known)] != known or data[len(known):len(known) + 1] not in (b"", b"\x1a"):
        raise CodecError("not a snapshot record")
    return snapshot_id


# ============================================================================
# net/http_messages -- HTTP messages: heads and bodies, from any bytes.
# ============================================================================


class BadRequest(ValueError):
    """A message that is not HTTP; the answer has this status, and the text for its body."""

    def __init__(self, text: str = "400 Bad Request", status: int = 400) -> None:
        super().__init__(text)
        self.status = status


class Http2Preface(BadRequest):
    """The connection begins with the preface of HTTP/2: most likely a gRPC client."""


class HttpHead:
    """The parsed request line and headers, shared by all requests with the same head bytes.

    `parsed` holds the parameters that a handler has derived from them.
    """

    __slots__ = (
        "method", "target", "path", "query", "headers", "minor", "keep_alive", "body_size",
        "chunked", "expects", "is_simple", "takes_raw", "parsed",
    )

    def __init__(self, method: str, target: str, minor: int, headers: Dict[str, str]) -> None:
        self.method = method
        self.target = target
        self.minor = minor
        self.headers = headers
        raw_path, _, self.query = target.partition("?")
        try:
            self.path = text_of(unquote(raw_path.encode("latin-1")))
        except ValueError:
            raise BadRequest() from None
        connection = _list_header(headers, "connection")
        self.keep_alive = "close" not in connection and bool(minor or "keep-alive" in connection)
        self.chunked = _is_chunked(headers, minor)
        self.body_size = _content_length(headers)
        self.expects = headers.get("expect", "").lower() == "100-continue"
        self.is_simple = not (self.chunked or self.expects) and self.body_size < 1 << 16
        self.takes_raw = self.keep_alive and minor == 1 and method != "HEAD"
        self.parsed: Any = None


_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]"
_REQUEST_LINE = re.compile(rb"(%b+) ([^\x00-\x20\x7f]+) HTTP/(\d)\.(\d)" % _TOKEN)
_REQUEST_START = re.compile(rb"%b{1,32}( |\Z)" % _TOKEN)
_HEADER = re.compile(rb"(%b+):([^\x00\r\n]*)" % _TOKEN)


def _list_header(headers: Dict[str, str], name: str) -> List[str]:
    """Return the elements of a list header in lower case; [] without that header."""
    text = headers.get(name, "")
    if len(text) > SHORT_HEADER_BYTES_MAX:
        raise BadRequest("431 Request Header Fields Too Large", 431)
    return [part.strip().lower() for part in text.split(",")] if text else []


def _is_chunked(headers: Dict[str, str], minor: int) -> bool:
    coding = headers.get("transfer-encoding")
    if coding is None:
        return False
    if "content-length" in headers:     # two lengths: request smuggling (RFC 9112 §6.1)
        raise BadRequest()
    if coding.lower() != "chunked" or minor == 0:
        raise BadRequest("501 Not Implemented: unsupported transfer encoding", 501)
    return True


def _content_length(headers: Dict[str, str]) -> int:
    if "content-length" not in headers:
        return 0
    lengths = set(_list_header(headers, "content-length")) or {""}
    length = lengths.pop()
    if lengths or not (length.isascii() and length.isdigit()) or len(length) > 18:
        raise BadRequest()
    return int(length)


def parse_header_lines(lines: Iterable[bytes]) -> Dict[str, str]:
    """Return lower-case name -> value; repeated headers are joined by a comma.

    Raises BadRequest for a line that is not `token: value` (no folding, RFC 9112 §5), and for
    two Hosts: a proxy before this server may have routed by the other one (§3.2).
    """
    headers: Dict[str, str] = {}
    repeated: Dict[str, List[str]] = {}
    for line in lines:
        match = _HEADER.fullmatch(line)
        if match is None:
            raise BadRequest()
        name = match.group(1).decode("ascii").lower()
        value = match.group(2).strip(b" \t").decode("latin-1")
        if name in headers:
            repeated.setdefault(name, [headers[name]]).append(value)
        else:
            headers[name] = value
    if "host" in repeated:
        raise BadRequest("400 Bad Request: too many Host headers")
    for name, values in repeated.items():
        headers[name] = ",".join(values)
    return headers


def check_start(data: Union[bytes, bytearray]) -> None:
    """Raise BadRequest if no request line begins with `data`."""
    line = data[:64].lstrip(b"\r\n")
    if line and not _REQUEST_START.match(line):
        raise BadRequest()


class HeadFinder:
    """Finds the end of a head in a growing buffer, in linear time.

    Lines may end without CR, as those of simple health checks do (RFC 9112 §2.2).
    """

    __slots__ = ("_seen", "_has_line")

    def __init__(self) -> None:
        self._seen = 0                  # bytes in which no head ends
        self._has_line = False          # a request line that is not too long is among them

    def find(self, data: bytearray) -> Optional[Tuple[int, int]]:
        """Return the end of the head and the start of the body in `data`; None: not complete.

        Raises BadRequest if the head is too long.  After a result the search begins again.
        """
        start = max(self._seen - 2, 0)
        end, blank = data.find(b"\n\r\n", start), 3
        bare = data.find(b"\n\n", start, len(data) if end < 0 else end + 1)
        if bare >= 0:
            end, blank = bare, 2
        size = len(data) if end < 0 else end
        if size > REQUEST_LINE_BYTES_MAX and not self._has_line:
            self._has_line = data.find(b"\n", 2, REQUEST_LINE_BYTES_MAX + 2) >= 0
            if not self._has_line:
                raise BadRequest("414 Request-URI Too Long", 414)
        if size > REQUEST_HEAD_BYTES_MAX:
            raise BadRequest("431 Request Header Fields Too Large", 431)
        if end < 0:
            self._seen = size
            return None
        self._seen, self._has_line = 0, False
        return end - (data[end - 1:end] == b"\r"), end + blank


def _lines_of(raw: bytes) -> List[bytes]:
    """Return the lines of a head, whose line ends have a CR or not."""
    *lines, last = raw.split(b"\n")
    return [*(line[:-1] if line.endswith(b"\r") else line for line in lines), last]


def parse_head(raw: bytes) -> HttpHead:
    """Parse the head of a request, without its final empty line.  Raises BadRequest."""
    check_start(raw)
    if raw.count(b"\n") >= HEADER_LINES_MAX:
        raise BadRequest("431 Request Header Fields Too Large", 431)
    lines = _lines_of(raw)
    if len(lines[0]) > REQUEST_LINE_BYTES_MAX:
        raise BadRequest("414 Request-URI Too Long", 414)
    match = _REQUEST_LINE.fullmatch(lines[0])
    if match is None:
        raise BadRequest()
    method, target, major, minor = match.groups()
    if major != b"1" or minor not in (b"0", b"1"):
        if raw == b"PRI * HTTP/2.0":
            raise Http2Preface()
        raise BadRequest("505 HTTP Version Not Supported: unsupported protocol version", 505)
    headers = parse_header_lines(lines[1:])
    if minor == b"1" and "host" not in headers:
        raise BadRequest("400 Bad Request: missing required Host header")
    text = target.decode("latin-1")
    if text.startswith(("http://", "https://")):    # absolute-form, as sent to a proxy
        text = "/" + text.split("//", 1)[1].partition("/")[2]
    if not text.startswith("/") and text != "*":
        raise BadRequest()
    return HttpHead(method.decode("ascii"), text, int(minor), headers)


def parse_answer_head(raw: bytes) -> Tuple[int, Dict[str, str]]:
    """Return (status, headers) of the head of an answer, without its final empty line.

    Raises BadRequest.
    """
    if raw.count(b"\n") > HEADER_LINES_MAX:
        raise BadRequest("head too large")
    lines = _lines_of(raw)
    match = _STATUS_LINE.match(lines[0])
    if match is None:
        raise BadRequest("no status line")
    return int(match.group(1)), parse_header_lines(lines[1:])


_STATUS_LINE = re.compile(rb"HTTP/1\.[0-9] ([1-9][0-9]{2})(?: |\Z)")
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})(?:;[^\x00-\x08\x0a-\x1f\x7f]*)?\r\n")
_CHUNK_SIZE_BYTES_MAX = 4_096       # of a chunk's size line with its extensions; above: refused


class ChunkedDecoder:
    """Chunked transfer coding, fed piecewise (RFC 9112 §7.1)."""

    __slots__ = ("done", "chunks", "rest", "_left", "_trailers")

    def __init__(self) -> None:
        self.done = False
        self.chunks = 0                 # begun so far
        self.rest = bytearray()         # input not decoded yet; when done: behind the body
        self._left = 0                  # bytes left of the chunk and its CRLF; 0: size line next
        self._trailers: Optional[HeadFinder] = None     # looks for their end, after the last chunk

    def feed(self, data: bytes) -> bytes:
        """Return the next bytes of the body.  Raises BadRequest.

        After the last chunk and the trailers `done` is set, and `rest` is the input behind them.
        """
        buffer, body, at = self.rest, [], 0
        buffer += data
        while self._trailers is None and at < len(buffer):
            if not self._left:
                size_line = self._size_line(at)
                if not size_line:
                    break
                at += size_line
            if self._left > 2:
                piece = buffer[at:at + self._left - 2]
                body.append(piece)
                at += len(piece)
                self._left -= len(piece)
            if 0 < self._left <= 2:
                end = buffer[at:at + self._left]
                if end != b"\r\n"[2 - self._left:][:len(end)]:
                    raise BadRequest()
                at += len(end)
                self._left -= len(end)
        del buffer[:at]
        if self._trailers is not None and not self.done:
            self._skip_trailers(self._trailers)
        return b"".join(body)

    def _size_line(self, at: int) -> int:
        """Begin the chunk whose size line is at `at`; return the line's length, 0: incomplete."""
        line = _CHUNK_SIZE.match(self.rest, at, at + _CHUNK_SIZE_BYTES_MAX)
        if line is None:
            until = at + _CHUNK_SIZE_BYTES_MAX
            if self.rest.find(b"\n", at, until) >= 0 or len(self.rest) >= until:
                raise BadRequest()
            return 0
        size = int(line.group(1), 16)
        if not size:
            self._trailers = HeadFinder()
            return line.end() - at - 2      # its CRLF may be the first half of the end
        self._left = size + 2
        self.chunks += 1
        return line.end() - at

    def _skip_trailers(self, finder: HeadFinder) -> None:
        """Check the trailers and drop them."""
        found = finder.find(self.rest)
        if found is None:
            return
        end, stop = found
        trailers = bytes(self.rest[:end])
        if stop - end != 4 or trailers.count(b"\n") > HEADER_LINES_MAX:
            raise BadRequest()
        parse_header_lines(trailers.split(b"\r\n")[1:])
        del self.rest[:stop]
        self.done = True


class Http2Refusal:
    """As much HTTP/2 as it takes to answer one request of a gRPC client with a sentence.

    The answer is an error of gRPC, which the client shows to its user; then GOAWAY asks for
    HTTP/1.1.  GOAWAY alone would be a failed connection that the client retries in silence.
    Source: RFC 9113; RFC 7541 §6; the gRPC documents, "gRPC over HTTP2".
    """

    _PREFACE_END = b"SM\r\n\r\n"        # follows the empty line of `PRI * HTTP/2.0`
    _FRAME_BYTES_MAX = 1 << 14          # the protocol's default; above: GOAWAY
    _HEADERS, _SETTINGS, _PING, _GOAWAY = 1, 4, 6, 7

    __slots__ = ("done", "_buffer", "_greeted", "_sentence")

    def __init__(self, sentence: str) -> None:
        self.done = False               # the connection is to be closed
        self._buffer = b""
        self._greeted = False
        self._sentence = sentence.encode("ascii")

    def feed(self, data: bytes) -> bytes:
        """Return the bytes to send after `data` has arrived."""
        self._buffer += data
        answer = b""
        if not self._greeted and len(self._buffer) >= len(self._PREFACE_END):
            self._greeted = True
            answer = self._frame(self._SETTINGS, 0, 0)
            if not self._buffer.startswith(self._PREFACE_END):
                answer += self._goodbye(0)
            self._buffer = self._buffer[len(self._PREFACE_END):]
        while self._greeted and not self.done and len(self._buffer) >= 9:
            size = int.from_bytes(self._buffer[:3], "big")
            if size > self._FRAME_BYTES_MAX:
                return answer + self._goodbye(0)
            if len(self._buffer) < 9 + size:
                break
            frame, self._buffer = self._buffer[:9 + size], self._buffer[9 + size:]
            answer += self._answer(frame)
        return answer

    def _answer(self, frame: bytes) -> bytes:
        kind, flags, stream = struct.unpack_from(">BBI", frame, 3)
        if kind == self._HEADERS:       # the answer: `:status 200` and, as trailers, error 12
            return self._frame(kind, 0x4 | 0x1, stream & 0x7FFF_FFFF, (     # END_HEADERS | _STREAM
                b"\x88\0\x0ccontent-type\x10application/grpc\0\x0bgrpc-status\x0212"
                b"\0\x0cgrpc-message%c%b" % (len(self._sentence), self._sentence)
            )) + self._goodbye(stream & 0x7FFF_FFFF)
        if kind == self._GOAWAY:
            return self._goodbye(0)
        if kind in (self._SETTINGS, self._PING) and not flags & 1:      # 1: acknowledgement
            return self._frame(kind, 1, 0, frame[9:] if kind == self._PING else b"")
        return b""

    def _goodbye(self, last_stream: int) -> bytes:
        self.done = True
        http_1_1_required = 0xD
        return self._frame(self._GOAWAY, 0, 0, struct.pack(
            ">II", last_stream, http_1_1_required) + self._sentence)

    @staticmethod
    def _frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
        return struct.pack(">I", len(payload))[1:] + struct.pack(
            ">BBI", kind, flags, stream) + payload


# ============================================================================
# net/workers -- Clocks, timers, a throttled log, and threads for calls that block.
# ============================================================================


REPEAT_SECONDS = 30.0               # between two log lines about the same fault
TIMERS_SWEPT_MIN = 256              # waiting timers; above: cancelled ones are removed


class Clock(NamedTuple):
    """The source of time.  No other code reads a clock: a test can pass its own."""

    now: Callable[[], float]            # monotonic seconds, for deadlines and durations
    wall_ns: Callable[[], int]          # unix nanoseconds, for clients and for expiry


SYSTEM_CLOCK = Clock(time.monotonic, time.time_ns)


class Timer:
    """A call at a later time, unless it is cancelled before."""

    __slots__ = ("callback", "args")

    def __init__(self, callback: Callable[..., None], args: Tuple[Any, ...]) -> None:
        self.callback: Optional[Callable[..., None]] = callback
        self.args = args

    def cancel(self) -> None:
        self.callback = None
        self.args = ()


class ThrottledLog:
    """Logs the errors that every attempt would repeat, each at most once in 30 s."""

    def __init__(self, package: str, now: Callable[[], float]) -> None:
        self._log = package_logger(package)
        self._now = now
        self._logged: Dict[str, float] = {}     # fault -> monotonic time

    def error(self, text: str, fault: str = "") -> None:
        """Log `text`, unless an error with the same `fault` (default: text) is recent."""
        now, fault = self._now(), (fault or text)[:256]
        if now - self._logged.get(fault, -REPEAT_SECONDS) < REPEAT_SECONDS:
            return
        if len(self._logged) >= 1_000:
            self._logged.clear()
        self._logged[fault] = now
        self._log.error("%s", text)


class WorkKind(NamedTuple):
    """A kind of blocking calls with its own threads, so that a hanging kind delays no other."""

    name: str
    threads: int                        # at most
    waiting_max: int                    # calls that wait for a thread; above: WorkersBusy
    is_awaited: bool                    # stop() waits for the calls under way


FILE_WORK = WorkKind("files", 2, 16, True)              # snapshots, removal of old files
NAME_WORK = WorkKind("names", 16, 64, False)            # a name server may hang for a minute
PASSWORD_WORK = WorkKind("passwords", 2, 64, False)     # 0.1 s each, of another process
PEER_WORK = WorkKind("peers", 1, 1, False)              # a proxy's requests to the members


class WorkersBusy(OSError):
    """Too many calls of this kind wait."""


def outcome_of(work: Callable[..., Any], *args: Any) -> Tuple[Optional[Exception], Any]:
    """Return (None, result) of work(*args), or (its exception, None)."""
    try:
        return None, work(*args)
    except Exception as error:
        return error, None


class Workers:
    """The threads for one kind of calls that block.

    They are daemons: a hanging call ends with the process.  Thread: reactor.
    """

    def __init__(self, kind: WorkKind, post: Callable[..., None]) -> None:
        self._kind = kind
        self._post = post               # as Reactor.call_soon_threadsafe
        self._calls: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._threads: List[threading.Thread] = []
        self._unfinished = 0            # calls that wait, or are under way

    def submit(
        self, work: Callable[..., Any], args: Tuple[Any, ...],
        done: Callable[[Optional[BaseException], Any], None],
    ) -> None:
        """Call work(*args) on a thread; then done(error, result) on the reactor's."""
        kind = self._kind
        if self._unfinished >= kind.threads + kind.waiting_max:
            self._post(done, WorkersBusy(f"too many calls wait ({kind.name})"), None)
            return
        self._unfinished += 1
        self._calls.put((work, args, done))
        if len(self._threads) < min(self._unfinished, kind.threads):
            name = f"{kind.name}-{len(self._threads) + 1}"
            thread = threading.Thread(target=self._run, name=name, daemon=True)
            try:
                thread.start()
                self._threads.append(thread)
            except RuntimeError as error:       # the system has none left
                if not self._threads:
                    self._calls.get()
                    self._post(self._finish, done, WorkersBusy(f"{kind.name}: {error}"), None)

    def stop(self) -> None:
        """Take no more calls; wait for those under way if their kind is awaited."""
        for _ in self._threads:
            self._calls.put(None)
        for thread in self._threads if self._kind.is_awaited else ():
            thread.join()

    def _run(self) -> None:
        while self._serve(self._calls.get()):
            pass

    def _serve(self, call: Any) -> bool:
        """Make one call; False: stop().  In its own frame, which keeps nothing of the call."""
        if call is None:
            return False
        work, args, done = call
        self._post(self._finish, done, *outcome_of(work, *args))
        return True

    def _finish(
        self, done: Callable[[Optional[BaseException], Any], None],
        error: Optional[BaseException], result: Any,
    ) -> None:
        self._unfinished -= 1
        done(error, result)


# ============================================================================
# net/reactor -- The reactor: one thread, every socket.
# ============================================================================


QUICK_SECONDS = 0.000_200           # a short wait, falling asleep and waking included
QUICK_WAITS_MIN = 8                 # short ones in a row, after which waits begin awake
AWAKE_SECONDS = 0.000_120           # of one wait; without an event by then, asleep
CLIENTS_SECONDS = 0.005             # for clients in each of three parts of a turn: their sockets,
                                    # their queued calls, their replies; above: the next turn
CLOCK_STRIDE = 4                    # callbacks of clients between two looks at the clock


class HasFileno(Protocol):
    """A socket or a pipe."""

    def fileno(self) -> int: ...


_EPOLL_EVENTS = (0, select.EPOLLIN, select.EPOLLOUT, select.EPOLLIN | select.EPOLLOUT)
# What epoll says, in EVENT_READ and EVENT_WRITE: errors and hang-ups come up in either.
_READY = tuple(
    (selectors.EVENT_READ if mask & ~select.EPOLLOUT else 0)
    | (selectors.EVENT_WRITE if mask & ~select.EPOLLIN else 0)
    for mask in range(2 * select.EPOLLHUP)
)


class Reactor:
    """The loop whose thread owns all state, with its sockets, timers and posted calls.

    One turn: poll, serve ready sockets, run due timers, run posted calls, on_turn(), flush.
    Thread: the reactor's own, except for call_soon_threadsafe and stop.
    """

    PHASES = ("waiting", "sockets", "timers", "posted", "server", "flush")

    def __init__(self, clock: Clock = SYSTEM_CLOCK) -> None:
        self.now, self.wall_ns = clock
        self.on_turn: Callable[[], None] = lambda: None
        self.on_turned: Callable[[float], None] = lambda seconds: None
        self.turns = 0
        self.ready_sockets = 0          # in this turn
        self.slowest_turn_s = 0.0
        self.phase_seconds = dict.fromkeys(self.PHASES, 0.0)    # sums; waiting: for sockets
        self._turned_at = self.now()    # the end of the last turn
        self._quick_waits = 0           # so many in a row were short
        self._epoll = select.epoll()    # selectors would cost some 3 us more per event
        self._callbacks: Dict[int, Callable[[int], None]] = {}      # by descriptor
        self._gone: Set[int] = set()    # unregistered in this turn: their events are stale
        self._timers: List[Tuple[float, int, Timer]] = []
        self._timer_count = 0
        self._timers_max = TIMERS_SWEPT_MIN     # above: remove the cancelled ones
        self._posted: Deque[Tuple[Callable[..., None], Tuple[Any, ...]]] = collections.deque()
        self._polling = False           # True: a poster must write to the wake socket
        self._stopping = False
        self._flushes: List[Callable[[], None]] = []
        # Work for clients gets CLIENTS_SECONDS of each part of a turn; the rest has to wait.
        self._patient: Set[int] = set()         # descriptors
        self._urgent = select.epoll()           # all others: looked at while some are late
        self._late: OrderedDict[int, int] = collections.OrderedDict()   # of _patient -> event
        self._client_calls: Deque[Tuple[Callable[..., None], Tuple[Any, ...]]] = collections.deque()
        self._client_flushes: List[Callable[[], None]] = []
        # flush_soon(flush) calls it at the end of this turn; flush_in_turn(flush) then or at the
        # end of a later one, within the time for clients.
        self.flush_soon = self._flushes.append
        self.flush_in_turn = self._client_flushes.append
        wake_in, wake_out = os.pipe()
        os.set_blocking(wake_in, False)
        os.set_blocking(wake_out, False)
        self._wake_in = open(wake_in, "rb", buffering=0)
        self._wake_out = open(wake_out, "wb", buffering=0)
        self._wake_lock = threading.Lock()      # a leaf: _wake_out is open during a write
        self._workers: Dict[WorkKind, Workers] = {}
        self._look_ups: Dict[Tuple[str, int], List[Timer]] = {}     # (host, port) -> callbacks
        self._set_date(self._turned_at)
        self.register(self._wake_in, selectors.EVENT_READ, self._drain_wake)

    def call_later(self, delay_s: float, callback: Callable[..., None], *args: Any) -> Timer:
        """Call once, not before delay_s seconds have passed."""
        timer = Timer(callback, args)
        self._schedule(delay_s, timer)
        return timer

    def every(self, period_s: float, callback: Callable[[], None]) -> Timer:
        """Call once per period_s, first after one period, until the Timer is cancelled.

        A late call delays all later ones: calls missed in a stall are dropped.
        """
        def call() -> None:
            self._schedule(period_s, timer)
            callback()

        timer = Timer(call, ())
        self._schedule(period_s, timer)
        return timer

    def _schedule(self, delay_s: float, timer: Timer) -> None:
        self._timer_count += 1
        if len(self._timers) >= self._timers_max:
            self._timers = [entry for entry in self._timers if entry[2].callback is not None]
            heapq.heapify(self._timers)
            self._timers_max = max(2 * len(self._timers), TIMERS_SWEPT_MIN)
        heapq.heappush(self._timers, (self.now() + delay_s, self._timer_count, timer))

    def call_soon(self, callback: Callable[..., None], *args: Any) -> None:
        """Call in this turn, or in the next one."""
        self._posted.append((callback, args))

    def call_soon_threadsafe(self, callback: Callable[..., None], *args: Any) -> None:
        """Call on the reactor's thread.  Thread: any."""
        self._posted.append((callback, args))
        if self._polling:
            self._polling = False
            with self._wake_lock:
                if not self._wake_out.closed:
                    self._wake_out.write(b"\0")     # a full pipe wakes the reactor as well

    def run_blocking(
        self, work: Callable[..., Any], *args: Any, kind: WorkKind,
        done: Callable[[Optional[BaseException], Any], None],
    ) -> None:
        """Run `work(*args)` on a thread for its kind, then done(error, result) in the reactor."""
        if kind not in self._workers:
            self._workers[kind] = Workers(kind, self.call_soon_threadsafe)
        self._workers[kind].submit(work, args, done)

    def look_up(
        self, host: str, port: int, done: Callable[[Optional[BaseException], Any], None]
    ) -> Timer:
        """Call done(error, result of getaddrinfo), unless the returned Timer is cancelled.

        Simultaneous look-ups of a name share one thread, which a name server may keep waiting.
        """
        waiter = Timer(done, ())
        waiters = self._look_ups.get((host, port))
        if waiters is not None:
            waiters[:] = [other for other in waiters if other.callback is not None]
            waiters.append(waiter)
            return waiter
        self._look_ups[host, port] = [waiter]

        def found(error: Optional[BaseException], addresses: Any) -> None:
            for waiter in self._look_ups.pop((host, port)):
                if waiter.callback is not None:
                    waiter.callback(error, addresses)

        self.run_blocking(
            socket.getaddrinfo, host, port, 0, socket.SOCK_STREAM, kind=NAME_WORK, done=found
        )
        return waiter

    def register(
        self, sock: HasFileno, events: int, callback: Callable[[int], None], *,
        patient: bool = False,
    ) -> None:
        """Call callback(mask) whenever `sock` is ready for any of `events`, selectors.EVENT_*.

        A socket must be unregistered before it is closed.  patient: if many sockets are ready,
        this one may wait for a later turn, in the order in which they became ready.
        """
        descriptor = sock.fileno()
        self._epoll.register(descriptor, _EPOLL_EVENTS[events])
        self._callbacks[descriptor] = callback
        if patient:
            self._patient.add(descriptor)
        else:
            self._urgent.register(descriptor, _EPOLL_EVENTS[events])

    def modify(self, sock: HasFileno, events: int, callback: Callable[[int], None]) -> None:
        """Change the events and the callback of a registered socket."""
        descriptor = sock.fileno()
        self._epoll.modify(descriptor, _EPOLL_EVENTS[events])
        self._callbacks[descriptor] = callback
        if descriptor not in self._patient:
            self._urgent.modify(descriptor, _EPOLL_EVENTS[events])

    def unregister(self, sock: HasFileno) -> None:
        """Call back for `sock` no more."""
        descriptor = sock.fileno()
        del self._callbacks[descriptor]
        if descriptor in self._patient:
            self._patient.remove(descriptor)
            self._late.pop(descriptor, None)
        else:
            self._urgent.unregister(descriptor)
        self._gone.add(descriptor)
        self._epoll.unregister(descriptor)

    def call_in_turn(self, callback: Callable[..., None], *args: Any) -> None:
        """Call in this turn or a later one, in order, within the time for clients."""
        self._client_calls.append((callback, args))

    def run(self) -> None:
        """Turn until stop()."""
        self._turned_at = self.now()
        while not self._stopping:
            self._turn(self._poll())

    def close(self) -> None:
        """Release threads and pipes; all sockets are closed before."""
        for workers in self._workers.values():
            workers.stop()
        self._epoll.close()
        with self._wake_lock:
            self._wake_out.close()
        self._urgent.close()
        self._wake_in.close()

    def stop(self) -> None:
        """End run() after the current turn.  Thread: any."""
        self._stopping = True
        self.call_soon_threadsafe(lambda: None)

    def _poll(self) -> List[Tuple[int, int]]:
        wait_s: Optional[float] = None
        if self._timers:                # epoll rounds up to milliseconds; below 0 it never ends
            wait_s = self._timers[0][0] - self._turned_at
            if wait_s < 0.0:
                wait_s = 0.0
        self._polling = True            # set before _posted is read: no wake-up is lost
        if (self._posted or self._flushes or self._late or self._client_calls
                or self._client_flushes):
            wait_s = 0.0
        if self._late:
            events = self._urgent.poll(0.0)
        else:
            events = self._epoll.poll(wait_s) if wait_s == 0.0 else self._wait(wait_s)
        self._polling = False
        return events

    def _wait(self, wait_s: Optional[float]) -> List[Tuple[int, int]]:
        """Wait for a socket: awake for a short time if the last waits were short, then asleep.

        To fall asleep and be woken takes 50 us, about as long as a client on this machine takes
        for its next request: GETs on one connection are answered at 1.8 times the rate.
        """
        poll, clock, began = self._epoll.poll, self.now, self._turned_at
        while self._quick_waits >= QUICK_WAITS_MIN:
            events = poll(0)
            if events or self._posted:
                return events
            if clock() - began > AWAKE_SECONDS:
                self._quick_waits = 0
        events = poll(wait_s)
        self._quick_waits = self._quick_waits + 1 if clock() - began < QUICK_SECONDS else 0
        return events

    def _turn(self, events: List[Tuple[int, int]]) -> None:
        clock, phases = self.now, self.phase_seconds
        self.ready_sockets = len(events)
        started = clock()
        phases["waiting"] += started - self._turned_at
        if started >= self._date_until:
            self._set_date(started)
        callbacks, gone = self._callbacks, self._gone
        if gone:
            gone.clear()
        until, count, is_late = started + CLIENTS_SECONDS, 0, False
        for descriptor, mask in events:
            if is_late and descriptor in self._patient:
                self._late[descriptor] = mask
                continue
            callback = callbacks.get(descriptor)
            if callback is not None and not (gone and descriptor in gone):
                callback(_READY[mask])
                count += 1
                if not count % CLOCK_STRIDE:
                    is_late = clock() > until
        if self._late:
            self._serve_late(until)
        served = timed = called = clock()
        if self._timers and self._timers[0][0] <= served:
            self._run_timers(served)
            timed = called = clock()
        if self._posted or self._client_calls:
            for _ in range(len(self._posted)):
                posted, args = self._posted.popleft()
                posted(*args)
            if self._client_calls:
                self._run_client_calls(clock() + CLIENTS_SECONDS)
            called = clock()
        self.on_turn()
        done = clock()
        if self._flushes:
            for flush in self._flushes:     # and those added meanwhile
                flush()
            self._flushes.clear()
        if self._client_flushes:
            self._flush_clients(done + CLIENTS_SECONDS)
        self._turned_at = ended = clock()
        phases["sockets"] += served - started
        phases["timers"] += timed - served
        phases["posted"] += called - timed
        phases["server"] += done - called
        phases["flush"] += ended - done
        self.turns += 1
        if ended - started > self.slowest_turn_s:
            self.slowest_turn_s = ended - started
        self.on_turned(ended - started)

    def _serve_late(self, until: float) -> None:
        """Serve the sockets that the last turn had no time for."""
        late = self._late
        while late and self.now() <= until:
            descriptor, mask = late.popitem(last=False)
            self._callbacks[descriptor](_READY[mask])

    def _run_client_calls(self, until: float) -> None:
        calls = self._client_calls
        for _ in range(len(calls)):     # those added meanwhile belong to the next turn
            callback, args = calls.popleft()
            callback(*args)
            if self.now() > until:
                return

    def _flush_clients(self, until: float) -> None:
        flushes, count = self._client_flushes, 0
        for flush in flushes:           # and those added meanwhile
            flush()
            count += 1
            if not count % CLOCK_STRIDE and self.now() > until:
                break
        del flushes[:count]

    def _run_timers(self, now: float) -> None:
        while self._timers and self._timers[0][0] <= now:
            timer = heapq.heappop(self._timers)[2]
            if timer.callback is not None:
                timer.callback(*timer.args)

    def _set_date(self, now: float) -> None:
        """Make the value of the Date header for the rest of this second."""
        wall_ns = self.wall_ns()
        self.http_date = formatdate(wall_ns // NS, usegmt=True)
        self._date_until = now + 1.0 - wall_ns % NS / NS

    def _drain_wake(self, mask: int) -> None:
        self._wake_in.read(4096)        # the rest makes it ready again


# ============================================================================
# net/budgets -- Budgets: time for long work in a turn, and memory for the buffers of connections.
# ============================================================================


class SlicedWork:
    """Long work in steps: TURN_S of each turn in all, shared by round robin.

    Short work is done at once.  Thread: reactor.
    """

    TURN_S = 0.005

    def __init__(self, reactor: Reactor) -> None:
        self._reactor = reactor
        self._queue: Deque[Tuple[Iterator[None], Callable[[Any], None]]] = collections.deque()
        self._turn = -1                 # of the reactor
        self._spent_s = 0.0             # in that turn
        self._is_posted = False

    def add(self, steps: Generator[None, None, Any], done: Callable[[Any], None]) -> None:
        """Run the generator, then done(its result), perhaps before add() returns."""
        self._queue.append((steps, done))
        if not self._is_posted:
            self._go()

    def _go(self) -> None:
        self._is_posted = False
        reactor = self._reactor
        if self._turn != reactor.turns:
            self._turn, self._spent_s = reactor.turns, 0.0
        while self._queue and self._spent_s < self.TURN_S:
            steps, done = self._queue.popleft()
            started = reactor.now()
            try:
                next(steps)
                self._queue.append((steps, done))
            except StopIteration as stop:
                done(stop.value)
            self._spent_s += reactor.now() - started
        if self._queue and not self._is_posted:
            self._is_posted = True
            reactor.call_soon(self._go)


class BufferOwner(Protocol):
    """A connection with buffers in memory."""

    def pieces(self) -> Iterator[Union[bytes, bytearray]]: ...
    def close(self) -> None: ...


class BufferBudget:
    """A limit on the memory of all connections: unsent replies and incomplete requests.

    Connections may share buffers, and a shared one counts once, so only a walk over all of them
    finds the sum.  A walk begins when the connections have received as many bytes as there was
    room for after the last.  Above the limit it closes those with the longest time since their
    last progress.  Thread: reactor.
    """

    TURN_PIECES = 10_000                # of a walk in one turn: 3 ms

    def __init__(self, reactor: Reactor) -> None:
        self._reactor = reactor
        self._owners: Dict[BufferOwner, float] = {}     # and their last progress (monotonic)
        self._grown = 0                 # bytes since the begin of the last walk
        self._room = HELD_BYTES_MAX     # after the last walk
        self._walk: Iterator[None] = iter(())
        self._is_walking = False
        self._log = ThrottledLog("http", reactor.now)

    def grow(self, connection: BufferOwner, grown: int, *, moved: bool = False) -> None:
        """Count bytes that a connection keeps.  moved: its client has read some."""
        if moved or connection not in self._owners:
            self._owners[connection] = self._reactor.now()
        self._grown += grown
        if self._grown >= self._room and not self._is_walking:
            self._is_walking, self._grown = True, 0
            self._walk = self._close_excess()
            self._reactor.call_soon(self._go_on)

    def forget(self, connection: BufferOwner) -> None:
        self._owners.pop(connection, None)

    def _go_on(self) -> None:
        for _ in self._walk:
            self._reactor.call_soon(self._go_on)
            return
        self._is_walking = False

    def _close_excess(self) -> Iterator[None]:
        """Keep the connections with the latest progress, at least one; close the others."""
        kept = closed = walked = 0
        seen: Set[int] = set()
        for connection in sorted(self._owners, key=self._owners.__getitem__, reverse=True):
            pieces = {id(piece): len(piece) for piece in connection.pieces()}
            if not pieces:
                self._owners.pop(connection, None)
                continue
            size = sum(pieces[piece] for piece in pieces if piece not in seen)
            if kept and kept + size > HELD_BYTES_MAX:
                closed += 1
                connection.close()
            else:
                kept += size
                seen.update(pieces)
            walked += len(pieces)
            if walked > self.TURN_PIECES:
                walked = 0
                yield
        self._room = max(HELD_BYTES_MAX - kept, HELD_BYTES_MAX // 8)
        if closed:
            text = f"closed connections that held more than {HELD_BYTES_MAX >> 20} MB together"
            self._log.error(
                f"{text}: {closed}, whose clients did not read replies or finish requests", text
            )


# ============================================================================
# net/http_requests -- Requests, and the replies to them.
# ============================================================================


_STATUS_LINES = {
    int(status): f"HTTP/1.1 {int(status)} {phrases[0]}\r\n"
    for status, phrases in http.server.BaseHTTPRequestHandler.responses.items()
}


class Channel(Protocol):
    """The part of a connection that its requests and their replies use."""

    reactor: Reactor
    remote: str
    on_close: Optional[Callable[[], None]]
    on_drain: Optional[Callable[[], None]]
    streaming: bool
    pending: int
    busy: bool
    closed: bool

    @property
    def scheme(self) -> str: ...
    def send(self, data: bytes, more: Sequence[bytes] = ()) -> None: ...
    def finish(self, data: bytes, keep_alive: bool, more: Sequence[bytes] = ()) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


class HttpRequest:
    """One request, complete with its body, waiting for exactly one reply."""

    __slots__ = ("head", "body", "connection", "body_too_large", "body_file")

    def __init__(self, head: HttpHead, body: bytes, connection: Channel) -> None:
        self.head = head
        self.body = body
        self.connection = connection
        self.body_too_large = False
        self.body_file: Optional[IO[bytes]] = None      # with a body that is too large for memory

    # Attributes of the head and the connection, read in C: a GET reads four of them.
    method = cast(str, property(attrgetter("head.method")))
    target = cast(str, property(attrgetter("head.target")))     # as sent, latin-1
    path = cast(str, property(attrgetter("head.path")))         # percent-decoded (text_of)
    query = cast(str, property(attrgetter("head.query")))       # as sent, without `?`, latin-1
    headers = cast(Dict[str, str], property(attrgetter("head.headers")))    # lower-case names
    remote = cast(str, property(attrgetter("connection.remote")))       # client's `ip:port`
    scheme = cast(str, property(attrgetter("connection.scheme")))

    @property
    def on_close(self) -> Optional[Callable[[], None]]:
        """Called when the client closes the connection before the reply."""
        return self.connection.on_close

    @on_close.setter
    def on_close(self, callback: Optional[Callable[[], None]]) -> None:
        self.connection.on_close = callback

    def _head_bytes(
        self, status: int, content_type: Optional[str], headers: str, framing: str
    ) -> bytes:
        head = self.head
        kind = f"Content-Type: {content_type}\r\n" if content_type else ""
        status_line = _STATUS_LINES.get(status) or f"HTTP/1.1 {status} Status\r\n"
        if head.minor:
            closing = "" if head.keep_alive else "Connection: close\r\n"
        else:
            closing = "Connection: keep-alive\r\n" if head.keep_alive else ""
            status_line = "HTTP/1.0" + status_line[8:]
        date = f"Date: {self.connection.reactor.http_date}\r\n"
        return f"{status_line}{kind}{headers}{date}{framing}{closing}\r\n".encode("latin-1")

    def reply(
        self, status: int, body: bytes = b"", content_type: Optional[str] = "application/json",
        headers: str = "", more: Sequence[bytes] = (),
    ) -> None:
        """Send a reply; to HEAD without its body.

        headers  further raw lines, each with its CRLF
        more     pieces of the body that are never copied
        """
        size = len(body) + sum(map(len, more))
        framing = "" if status == 204 else f"Content-Length: {size}\r\n"
        data = self._head_bytes(status, content_type if size else None, headers, framing)
        if self.head.method == "HEAD":
            more = ()
        else:
            data += body
        self.connection.finish(data, self.head.keep_alive, more)

    def reply_raw(self, data: bytes, more: Sequence[bytes] = ()) -> None:
        """Send a ready-made head and body; only if the head takes_raw."""
        self.connection.finish(data, True, more)

    def start_stream(
        self, status: int, content_type: Optional[str] = "application/json", headers: str = "",
        *, length: Optional[int] = None,
    ) -> StreamReply:
        """Send the head now; the body follows in pieces, of `length` bytes if that is known.

        A reply without body (HEAD, 204, 304) is completed by end().
        """
        bodyless = self.head.method == "HEAD" or status in (204, 304)
        chunked = bool(self.head.minor) and length is None and not bodyless
        framing = "Transfer-Encoding: chunked\r\n" if chunked else ""
        if length is not None and status != 204:
            framing = f"Content-Length: {length}\r\n"
        if not (chunked or bodyless or length is not None):
            self.head = closing_head(self.head)        # the connection's end is the body's end
        reply = StreamReply(self, chunked=chunked)
        if not reply.closed:
            self.connection.send(self._head_bytes(status, content_type, headers, framing))
        return reply


Handler = Callable[[HttpRequest], None]


class StreamReply:
    """A reply whose body is written in pieces: chunked, of known length, or until close."""

    __slots__ = ("_connection", "_chunked", "_keep_alive", "closed", "on_close")

    def __init__(self, request: HttpRequest, *, chunked: bool) -> None:
        self._connection = request.connection
        self._chunked = chunked
        self._keep_alive = request.head.keep_alive
        self.closed = not request.connection.busy
        self.on_close: Optional[Callable[[], None]] = None
        if not self.closed:
            request.connection.streaming = True
            request.connection.on_close = self._client_gone

    @property
    def pending(self) -> int:
        """Bytes that the socket has not taken yet."""
        return self._connection.pending

    def when_read(self, callback: Callable[[], None]) -> None:
        """Call once, as soon as the socket has taken all pending bytes."""
        self._connection.on_drain = callback

    def write(self, data: bytes, more: Sequence[bytes] = ()) -> bool:
        """Queue one piece, of which `more` is never copied; False: the reply has ended."""
        if self.closed:
            return False
        size = len(data) + sum(map(len, more))
        if not self._chunked:
            self._connection.send(data, more)
        elif size < OUTPUT_SHARED_BYTES_MIN:
            self._connection.send(b"%x\r\n%b\r\n" % (size, b"".join((data, *more))))
        else:
            self._connection.send(b"%x\r\n" % size, (data, *more, b"\r\n"))
        return True

    def end(self) -> None:
        """Finish the body; the connection serves the next request."""
        if not self.closed:
            self.closed = True
            self.on_close = None
            self._connection.finish(b"0\r\n\r\n" if self._chunked else b"", self._keep_alive)

    def abort(self) -> None:
        """Drop the connection without finishing the body; on_close is not called."""
        self.on_close = None
        if not self.closed:
            self.closed = True
            self._connection.close()

    def _client_gone(self) -> None:
        self.closed = True
        on_close, self.on_close = self.on_close, None
        if on_close is not None:
            on_close()


def closing_head(head: HttpHead) -> HttpHead:
    """Return a copy of `head` for the last request of its connection."""
    closing = HttpHead(head.method, head.target, head.minor, head.headers)
    closing.keep_alive = closing.takes_raw = False
    closing.parsed = head.parsed
    return closing


# ============================================================================
# net/tls -- TLS: certificates that may change, and handshakes that do not block the reactor.
# ============================================================================


HANDSHAKE_SECONDS_MAX = 10.0        # to its first byte, and from there to its end; then closed
CERTIFICATE_CHECK_SECONDS = 1.0     # between two checks of the files for changes


class TlsSocket(ssl.SSLSocket):
    """A non-blocking TLS socket that raises BlockingIOError, as a plain one does."""

    def do_handshake(self, block: bool = False) -> None:
        """Add the names in a refused certificate to the error, as `names`."""
        try:
            super().do_handshake(block)
        except ssl.SSLCertVerificationError as error:
            # Python 3.9 does not tell them: names is None.
            chain: Any = getattr(self._sslobj, "get_unverified_chain", list)()   # type: ignore
            error.names = [str(name) for _, name in    # type: ignore[attr-defined]
                           chain[0].get_info().get("subjectAltName", ())] if chain else None
            raise

    def recv(self, size: int = 16_384, flags: int = 0) -> bytes:
        """Return up to about `size` received bytes; b"" at the end.

        This includes all bytes that OpenSSL has decrypted, as no selector reports those.
        """
        data = b""
        pieces: List[bytes] = []
        while size > 0 or self.pending():
            try:
                data = super().recv(16_384, flags)
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError, BlockingIOError):
                if not pieces:
                    raise BlockingIOError(errno.EAGAIN, "no data yet") from None
                break
            if not data:
                break
            pieces.append(data)
            size -= len(data)
        return b"".join(pieces)

    def send(self, data: Any, flags: int = 0) -> int:
        """Send without blocking; after BlockingIOError, repeat with at least the same bytes."""
        try:
            return super().send(data, flags)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise BlockingIOError(errno.EAGAIN, "cannot send yet") from None

    def shutdown(self, how: int) -> None:
        """End TLS first: without its close_notify a reply might have been cut off."""
        with contextlib.suppress(OSError, ValueError):
            self.unwrap()
        super().shutdown(how)


def _covers(kind: str, name: str, host: str) -> bool:
    """Tell whether a name of a certificate, perhaps a wildcard, covers `host`."""
    if kind == "IP Address":
        for family in (socket.AF_INET, socket.AF_INET6):
            with contextlib.suppress(OSError):
                return socket.inet_pton(family, name.strip()) == socket.inet_pton(family, host)
        return False
    name, host = name.lower().rstrip("."), host.lower().rstrip(".")
    first, _, parent = host.partition(".")
    return kind == "DNS" and (name == host or bool(first and parent) and name == f"*.{parent}")


class TlsContext:
    """The TLS settings of one side; certificates are read again when they change.

    server  True to accept connections, False to make them
    now     monotonic seconds

    Differs from etcd: TLS 1.2 and newer only (etcd 2.3: 1.0), and etcd reads its files once.
    Raises StartError for unusable files; later, the last usable ones stay in use.
    """

    def __init__(
        self, files: TlsFiles, *, server: bool, now: Callable[[], float] = SYSTEM_CLOCK.now
    ) -> None:
        self._files = files
        self._server = server
        self._now = now
        self._seen = self._signature()
        self._refused = self._seen          # the last that was logged as unusable
        self._checked = now()
        self._context = self._load()

    @property
    def current(self) -> ssl.SSLContext:
        """The context to use for the next connection."""
        now = self._now()
        if now - self._checked >= CERTIFICATE_CHECK_SECONDS:
            self._checked = now
            signature = self._signature()
            if signature != self._seen:
                self._reload(signature)
        return self._context

    def check_peer(self, sock: ssl.SSLSocket) -> None:
        """Raise ssl.SSLError unless the client's certificate has the name that is allowed."""
        cn, host = self._files.allowed_cn, self._files.allowed_name
        if not self._server or not (cn or host):
            return
        certificate: Dict[str, Any] = sock.getpeercert() or {}
        common = [value for group in certificate.get("subject", ()) for kind, value in group
                  if kind == "commonName"][-1:]             # Go, too, takes the last one
        if cn and common != [cn]:
            raise ssl.SSLError(0, f"the client certificate is for {common}, not for {cn}")
        names = certificate.get("subjectAltName") or [("DNS", name) for name in common]
        if host and not any(_covers(kind, name, host) for kind, name in names):
            shown = [name for _, name in names]
            raise ssl.SSLError(0, f"the client certificate is for {shown}, not for {host}")

    def _signature(self) -> List[Optional[Tuple[int, int, int]]]:
        """Return time, inode and size of each file, which change with it."""
        found: List[Optional[Tuple[int, int, int]]] = []
        for path in self._files:
            if isinstance(path, str) and path and path not in self._files[-2:]:
                with contextlib.suppress(OSError):
                    status = os.stat(path)
                    found.append((status.st_mtime_ns, status.st_ino, status.st_size))
                    continue
            found.append(None)
        return found

    def _reload(self, signature: List[Optional[Tuple[int, int, int]]]) -> None:
        """Use the changed files; retry unreadable ones later, as descriptors may be short."""
        log = package_logger("tls")
        try:
            self._context = self._load()
        except StartError as error:
            if signature != self._refused:
                log.error("certificates changed and cannot be used, the old ones stay: %s", error)
            self._refused = signature
        else:
            self._seen = signature
            log.info("certificates changed, new connections use them: %s", self._files.cert_file)

    def _load(self) -> ssl.SSLContext:
        files = self._files
        kind = ssl.PROTOCOL_TLS_SERVER if self._server else ssl.PROTOCOL_TLS_CLIENT
        context = ssl.SSLContext(kind)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.sslsocket_class = TlsSocket
        if self._server and (files.client_cert_auth or files.ca_file):
            context.verify_mode = ssl.CERT_REQUIRED
        if files.cert_file or self._server:
            load_pair(context, files.cert_file, files.key_file)
        authorities = [path for path in (files.trusted_ca_file, files.ca_file) if path]
        for path in authorities:
            load_pem(path, functools.partial(context.load_verify_locations, path))
        if not authorities and context.verify_mode != ssl.CERT_NONE:
            purpose = ssl.Purpose.CLIENT_AUTH if self._server else ssl.Purpose.SERVER_AUTH
            context.load_default_certs(purpose)
        if files.crl_file:
            context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
            load_pem(files.crl_file, lambda: context.load_verify_locations(files.crl_file), "crl")
        return context


_default_tls: List[TlsContext] = []


def default_tls() -> TlsContext:
    """Return the client settings for all other cases: the system's authorities decide."""
    if _default_tls:
        return _default_tls[0]
    context = TlsContext(TlsFiles(), server=False)
    with contextlib.suppress(OSError), open(os.devnull, "rb"):
        _default_tls.append(context)    # without a free descriptor it has no authorities: not kept
    return context


def check_readable(path: str) -> None:
    """Raise StartError, with etcd's words, unless the file can be read."""
    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        raise StartError(f"open {path}: {(error.strerror or str(error)).lower()}") from None


def load_pem(path: str, load: Callable[[], object], kind: str = "x509") -> None:
    """Run load(), which reads the PEM file `path`.  Raises StartError.

    kind  the command of openssl that shows such a file
    """
    check_readable(path)
    try:
        load()
    except (OSError, ValueError) as error:
        raise StartError(
            f"cannot use {path}: {_ssl_words(error)}; it must hold PEM text, look at it with"
            f" `openssl {kind} -noout -text -in {shlex.quote(path)}`"
        ) from None


def _ssl_words(error: Exception) -> str:
    return (getattr(error, "reason", None) or str(error)).lower().replace("_", " ")


def load_pair(context: ssl.SSLContext, cert_file: str, key_file: str) -> None:
    """Load a certificate and its key into `context`.  Raises StartError."""
    check_readable(cert_file)
    check_readable(key_file)
    asked: List[bool] = []

    def passphrase() -> str:
        asked.append(True)
        raise ValueError("the key is encrypted")

    try:
        context.load_cert_chain(cert_file, key_file, password=passphrase)
    except (OSError, ValueError) as error:
        fault = _pair_error(cert_file, key_file, error)
        if asked:
            plain = f"{os.path.splitext(key_file)[0]}-plain.pem"
            fault = (
                f"the key is encrypted, and nobody can be asked for the passphrase; write it"
                f" without one with `openssl pkey -in {shlex.quote(key_file)}"
                f" -out {shlex.quote(plain)}` and name {plain}"
            )
        raise StartError(f"cannot use {cert_file} and its key {key_file}: {fault}") from None


def _pair_error(cert_file: str, key_file: str, error: Exception) -> str:
    """Return why OpenSSL cannot load a certificate and its key, from their content."""
    for path, label, kind in (
        (cert_file, b"CERTIFICATE-----", "x509"), (key_file, b"PRIVATE KEY-----", "pkey"),
    ):
        with open(path, "rb") as file:
            content = file.read(PEM_BYTES_MAX)
        if b"-----BEGIN " not in content:
            shown = shlex.quote(path)
            return (
                f"it must hold PEM text, and {path} does not; if that is in DER, `openssl {kind}"
                f" -inform der -in {shown} -out {shlex.quote(path + '.pem')}` makes PEM of it"
            )
        if label not in content:
            found = "a private key" if b"PRIVATE KEY-----" in content else "a certificate"
            other = "a certificate" if kind == "x509" else "a private key"
            return f"{path} holds {found} and not {other}; perhaps the two files are exchanged"
    if getattr(error, "reason", "") in _MISMATCHES:
        return (
            f"the key does not belong to the certificate, whose public key is another; compare"
            f" `openssl x509 -noout -pubkey -in {shlex.quote(cert_file)}` with `openssl pkey"
            f" -pubout -in {shlex.quote(key_file)}`"
        )
    return f"{_ssl_words(error)}; the files must hold PEM text, whole and unchanged"


PEM_BYTES_MAX = 1 << 20             # of a file that are searched for labels
# OpenSSL's reasons for a key of another certificate; the last: they are of different kinds.
_MISMATCHES = ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED")


def tls_reason(error: Exception) -> str:
    """Return one line: why a TLS connection failed, and the remedy if it is known."""
    reason = str(getattr(error, "reason", None) or "")
    verify = getattr(error, "verify_message", "")
    if verify:
        hint = _VERIFY_HINTS.get(verify, "")
        if "mismatch" in verify:
            names: Optional[List[str]] = getattr(error, "names", None)
            shown = ", ".join(map(go_quote, (names or [])[:NAMES_SHOWN_MAX]))
            has = f" it has {shown or 'no names, and a CN does not count'};"
            hint = (f"{has if names is not None else ''} issue one whose subjectAltName has the"
                    " host of the URL that leads to it")
        return f"the other side's certificate cannot be verified: {verify}{hint}"
    if reason in _TLS_REASONS:
        return _TLS_REASONS[reason]
    return f"tls: {reason.lower().replace('_', ' ')}" if reason else f"tls: {error}"


NAMES_SHOWN_MAX = 10                # of a certificate, in a log line
_VERIFY_HINTS = {
    "certificate has expired": "; issue a new one, or set the clock right",
    "certificate is not yet valid": "; set the clock right",
    "unable to get local issuer certificate": "; -trusted-ca-file must name the authority that"
                                              " signed it",
    "self-signed certificate": "; -trusted-ca-file must name it",
    "certificate revoked": " by the revocation list",
}
_TLS_REASONS = {
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "client didn't provide a certificate, and client-cert-auth"
                                         " asks for one",
    "HTTP_REQUEST": "client sent an HTTP request to an HTTPS server; use an https:// URL",
    "WRONG_VERSION_NUMBER": "first record does not look like a TLS handshake; perhaps the other"
                            " side speaks plain HTTP",
    "UNSUPPORTED_PROTOCOL": "the other side offers no TLS 1.2 or newer",
    "TLSV1_ALERT_PROTOCOL_VERSION": "remote error: the other side refuses this version of TLS",
    "TLSV1_ALERT_UNKNOWN_CA": "remote error: unknown certificate authority; the other side's CA"
                              " file must name the authority that signed our certificate",
    "SSLV3_ALERT_BAD_CERTIFICATE": "remote error: bad certificate; the other side does not accept"
                                   " ours",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": "remote error: the other side does not accept our"
                                       " certificate",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "remote error: our certificate has expired; issue a new one",
    "SSLV3_ALERT_CERTIFICATE_REVOKED": "remote error: our certificate is revoked",
    "SSLV3_ALERT_HANDSHAKE_FAILURE": "remote error: handshake failure",
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "remote error: certificate required; give ours with"
                                         " -peer-cert-file and -peer-key-file",
}


class Handshake:
    """A TLS handshake under way; calls done(error) at its end, None: `sock` may be used.

    The socket is registered with the reactor only for this time.  Thread: reactor.
    """

    def __init__(
        self, reactor: Reactor, sock: ssl.SSLSocket, done: Callable[[Optional[OSError]], None],
        *, patient: bool = False,
    ) -> None:
        self.sock = sock
        self._reactor = reactor
        self._done = done
        late = TimeoutError("TLS handshake timeout")
        self._timer = reactor.call_later(HANDSHAKE_SECONDS_MAX, self._end, late)
        reactor.register(
            sock, selectors.EVENT_READ | selectors.EVENT_WRITE, self._step, patient=patient)

    def cancel(self) -> None:
        """Stop without a call of done(); the socket stays open.  Once only, before the end."""
        self._timer.cancel()
        self._reactor.unregister(self.sock)

    def _step(self, mask: int) -> None:
        try:
            self.sock.do_handshake()
        except ssl.SSLWantReadError:
            self._reactor.modify(self.sock, selectors.EVENT_READ, self._step)
        except ssl.SSLWantWriteError:
            self._reactor.modify(self.sock, selectors.EVENT_WRITE, self._step)
        except (OSError, ValueError) as error:  # ValueError: a host name that cannot be checked
            self._end(error if isinstance(error, OSError) else OSError(str(error)))
        else:
            self._end(None)

    def _end(self, error: Optional[OSError]) -> None:
        self.cancel()
        self._done(error)


# ============================================================================
# net/dns -- A DNS client for SRV records.
# ============================================================================


DNS_ANSWER_SECONDS = 5.0            # per name server and try; then the next one
DNS_TRIES = 2                       # rounds through the name servers
DNS_MESSAGE_BYTES_MAX = 65_535
RESOLV_CONF = "/etc/resolv.conf"


def _reason(error: Exception) -> str:
    """Return the text of an error without Python's decoration."""
    if isinstance(error, ssl.SSLError):
        return tls_reason(error)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return str(error) or type(error).__name__


class SrvRecord(NamedTuple):
    """One answer to a DNS SRV query (RFC 2782)."""

    priority: int
    weight: int
    port: int
    target: str                         # without the trailing dot


def name_servers(path: str = RESOLV_CONF) -> List[Tuple[str, int]]:
    """Return the addresses of the system's name servers; the local one if there are none."""
    found: List[Tuple[str, int]] = []
    with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
        for words in map(str.split, file):
            if len(words) > 1 and words[0] == "nameserver":
                found.append((words[1], 53))
    return found or [("127.0.0.1", 53)]


def lookup_srv(name: str, servers: Sequence[Tuple[str, int]]) -> List[SrvRecord]:
    """Return the SRV records of `name` from the first name server with a good answer.

    Sorted by priority, then by falling weight: the order numbers the unnamed members, so the
    random choice of RFC 2782 would be of no use.  Raises OSError.
    """
    fault = "no name server to ask"
    for address in list(servers) * DNS_TRIES:
        query_id = random.randrange(1 << 16)
        query = _srv_query(query_id, name)
        try:
            answer = _ask_udp(address, query)
            if answer[2] & 2:           # truncated: the whole answer needs TCP (RFC 1035 §4.2)
                answer = _ask_tcp(address, query)
            records = _srv_answer(answer)
        except socket.timeout:
            fault = f"lookup {name} on {address[0]}: i/o timeout"
        except OSError as error:
            fault = f"lookup {name} on {address[0]}: {_reason(error)}"
        except (IndexError, struct.error):
            fault = f"lookup {name} on {address[0]}: malformed answer"
        else:
            if not records:
                raise OSError(f"lookup {name}: no such host")
            return sorted(records, key=lambda r: (r.priority, -r.weight, r.target, r.port))
    raise OSError(fault)


def _srv_query(query_id: int, name: str) -> bytes:
    labels = [label.encode("idna") for label in name.rstrip(".").split(".")]
    question = b"".join(bytes((len(label),)) + label for label in labels) + b"\0"
    return struct.pack(">6H", query_id, 0x0100, 1, 0, 0, 0) + question + struct.pack(">2H", 33, 1)


def _ask_udp(address: Tuple[str, int], query: bytes) -> bytes:
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.connect(address)           # the kernel drops datagrams from other addresses
        sock.send(query)
        deadline = time.monotonic() + DNS_ANSWER_SECONDS
        while True:
            sock.settimeout(max(deadline - time.monotonic(), 0.001))
            answer = sock.recv(DNS_MESSAGE_BYTES_MAX)
            if len(answer) >= 12 and answer[:2] == query[:2] and answer[2] & 0x80:
                return answer


def _ask_tcp(address: Tuple[str, int], query: bytes) -> bytes:
    with socket.create_connection(address, DNS_ANSWER_SECONDS) as sock, sock.makefile("rb") as file:
        sock.sendall(struct.pack(">H", len(query)) + query)
        (size,) = struct.unpack(">H", file.read(2))
        return file.read(size)


def _srv_answer(message: bytes) -> List[SrvRecord]:
    """Return the SRV records of a DNS message; [] for a name that does not exist.

    Raises OSError, IndexError or struct.error.
    """
    code = message[3] & 15
    questions, answers = struct.unpack_from(">2H", message, 4)
    if code not in (0, 3):              # 3: the name does not exist
        words = {2: "server misbehaving", 5: "query refused"}
        raise OSError(words.get(code, f"DNS error {code}"))
    offset = 12
    for _ in range(questions):
        offset = _dns_name(message, offset)[1] + 4
    records: List[SrvRecord] = []
    for _ in range(answers):
        offset = _dns_name(message, offset)[1]
        kind, size = struct.unpack_from(">H6xH", message, offset)
        offset += 10
        if kind == 33:
            priority, weight, port = struct.unpack_from(">3H", message, offset)
            target = _dns_name(message, offset + 6)[0]
            records.append(SrvRecord(priority, weight, port, target))
        offset += size
    return records


def _dns_name(message: bytes, offset: int) -> Tuple[str, int]:
    """Return (name without the final dot, offset behind it); compressed names are followed."""
    labels: List[str] = []
    behind = 0
    for _ in range(128):                # more labels or pointers: a loop, not a name
        size = message[offset]
        if size >= 192:
            behind = behind or offset + 2
            offset = (size & 63) << 8 | message[offset + 1]
            continue
        if not size:
            return ".".join(labels), behind or offset + 1
        labels.append(message[offset + 1:offset + 1 + size].decode("latin-1"))
        offset += 1 + size
    raise IndexError(offset)


# ============================================================================
# net/http_calls -- HTTP calls: requests to other servers, without blocking.
# ============================================================================


DIAL_SECONDS = 0.25                 # for an address; then the next is tried beside it
DIAL_ADDRESSES_MAX = 16             # of one name; the others are not tried
ANSWER_BYTES_MAX = 4_096            # of the body of an answer, by default; above: cut


def dial_order(found: Sequence[Any]) -> List[Any]:
    """Order addresses of getaddrinfo: the families alternate, the first begins (RFC 8305 §4)."""
    first = [info for info in found if info[0] == found[0][0]]
    others = [info for info in found if info[0] != found[0][0]]
    turns = itertools.zip_longest(first, others)
    return [info for turn in turns for info in turn if info][:DIAL_ADDRESSES_MAX]


class Dial:
    """Connects to the first of several addresses that answers (RFC 8305 §5, without DNS).

    Calls done(socket, None) once, or done(None, error of the first address) when all have
    failed; never inside the constructor or after cancel().  The socket is not registered.
    """

    def __init__(
        self, reactor: Reactor, found: Sequence[Any],
        done: Callable[[Optional[socket.socket], Optional[OSError]], None],
    ) -> None:
        self._reactor = reactor
        self._left = collections.deque(dial_order(found))
        self._done = done
        self._error: Optional[OSError] = None       # of the first address that failed
        self._open: Set[socket.socket] = set()      # attempts under way
        self._timer = Timer(_nothing, ())
        self._next()

    def cancel(self) -> None:
        """Close the sockets of all attempts."""
        self._timer.cancel()
        self._left.clear()
        for sock in self._open:
            self._reactor.unregister(sock)
            sock.close()
        self._open.clear()

    def _next(self) -> None:
        """Try the next address, beside the attempts under way."""
        self._timer.cancel()
        if self._left:
            delay_s = DIAL_SECONDS if self._try(*self._left.popleft()) else 0.0
            if self._left or not self._open:
                self._timer = self._reactor.call_later(delay_s, self._next)
        elif not self._open:
            self._done(None, self._error)

    def _try(self, family: int, kind: int, protocol: int, _: str, address: Any) -> bool:
        """Begin to connect; False: it has failed already."""
        try:
            sock = socket.socket(family, kind, protocol)
        except OSError as error:            # no descriptor left, or no such family here
            self._error = self._error or error
            return False
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        code = sock.connect_ex(address)
        if code not in (0, errno.EINPROGRESS, errno.EWOULDBLOCK):
            self._note_failure(sock, code)
            return False
        self._open.add(sock)
        self._reactor.register(sock, selectors.EVENT_WRITE, lambda mask: self._answered(sock))
        return True

    def _note_failure(self, sock: socket.socket, code: int) -> None:
        sock.close()
        self._error = self._error or OSError(code, os.strerror(code))

    def _answered(self, sock: socket.socket) -> None:
        self._reactor.unregister(sock)
        self._open.discard(sock)
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self._note_failure(sock, code)
            self._next()
        else:
            self.cancel()
            self._done(sock, None)


class HttpCall:
    """One outgoing request on its own connection, without blocking.

    on_head            (status, headers) once
    on_data            (bytes) per piece of the body
    on_done            (error) once at the end, None for a complete body; not after cancel()
    headers            a Host here replaces that of the url
    more               further pieces of the body
    connect_timeout_s  for name look-up and connect
    idle_timeout_s     for each silence after that; None: no limit
    answer_max         received bytes of the body; above: cut, and complete
    """

    __slots__ = (
        "_reactor", "_on_head", "_on_data", "_on_done", "_idle_timeout_s", "_sock", "_bodyless",
        "_out", "_in", "_finder", "_interim", "_left", "_chunks", "_timer", "_heard", "ended",
        "connected", "_paused", "_events", "_tls", "_host", "_connecting", "_room",
    )

    def __init__(
        self, reactor: Reactor, url: str, method: str, target: str, headers: Dict[str, str],
        body: bytes = b"", more: Sequence[bytes] = (), *, connect_timeout_s: float = 5.0,
        idle_timeout_s: Optional[float] = None, answer_max: int = sys.maxsize,
        tls: Optional[TlsContext] = None,
        on_head: Callable[[int, Dict[str, str]], None] = lambda status, headers: None,
        on_data: Callable[[bytes], None] = lambda data: None,
        on_done: Callable[[Optional[Exception]], None] = lambda error: None,
    ) -> None:
        self._reactor = reactor
        self._on_head = on_head
        self._on_data = on_data
        self._on_done = on_done
        self._idle_timeout_s = idle_timeout_s
        self._sock: Optional[socket.socket] = None
        lines = [f"{method} {target} HTTP/1.1"]
        if "Host" not in headers:
            lines.append(f"Host: {urlsplit(url).netloc}")
        lines += [f"{name}: {value}" for name, value in headers.items()]
        if body or method in ("POST", "PUT"):
            lines.append(f"Content-Length: {len(body) + sum(map(len, more))}")
        head = "\r\n".join(lines + ["", ""]).encode("latin-1")
        self._out = [memoryview(piece) for piece in (head + body, *more) if piece]
        self._in = bytearray()
        self._finder = HeadFinder()
        self._interim = 0               # answers of status 1xx so far
        self._left: Optional[int] = None    # bytes of body to come; None: no head yet
        self._chunks: Optional[ChunkedDecoder] = None
        self._room = answer_max         # bytes of body until it is cut
        self._heard = 0.0
        self.ended = False              # True after on_done() or cancel()
        self._bodyless = method == "HEAD"
        self._paused = False
        self._events = 0                # that the reactor waits for
        self.connected = False          # from then on the other side may have seen the request
        self._tls = (tls or default_tls()) if is_https(url) else None
        self._host = urlsplit(url).hostname or ""
        self._connecting: Union[Timer, Dial, Handshake, None] = None    # the step under way
        late = TimeoutError(f"dial tcp {urlsplit(url).netloc}: i/o timeout")
        self._timer = reactor.call_later(connect_timeout_s, self._fail, late)
        self._resolve(*url_address(url))

    def cancel(self) -> None:
        """Close the connection; no callback comes any more."""
        self.ended = True
        # Owners refer to their call, and these to the owner: that cycle must end.
        self._on_head = self._on_data = self._on_done = _ignore
        self._out = []
        self._timer.cancel()
        if self._connecting is not None:
            self._connecting.cancel()
            self._connecting = None
        if self._sock is None:
            return
        if self._events:
            self._reactor.unregister(self._sock)
        self._sock.close()
        self._sock = None

    def flush(self) -> None:
        """Send the rest of the request, as much as the socket takes."""
        if self.ended or self._sock is None:
            return
        try:
            if self._out:
                self._out[0] = self._out[0][self._sock.send(self._out[0]):]
                if not self._out[0]:
                    del self._out[0]
        except BlockingIOError:
            pass
        except OSError as error:
            self._fail(error)
            return
        self._watch()

    def pause(self) -> None:
        """Read no more until resume(); the idle timeout is suspended."""
        if not self.ended and not self._paused:
            self._paused = True
            self._watch()

    def resume(self) -> None:
        if not self.ended and self._paused:
            self._paused = False
            self._heard = self._reactor.now()
            self._watch()

    def _watch(self) -> None:
        """Wait for room for the request, and for the answer."""
        assert self._sock is not None
        events = 0 if self._paused else selectors.EVENT_READ
        if self._out:
            events |= selectors.EVENT_WRITE
        if events and self._events:
            self._reactor.modify(self._sock, events, self._on_event)
        elif events:
            self._reactor.register(self._sock, events, self._on_event)
        elif self._events:
            self._reactor.unregister(self._sock)
        self._events = events

    def _resolve(self, host: str, port: int) -> None:
        """Dial a literal address at once; look a name up on a thread, as DNS may be slow."""
        hosts = ("127.0.0.1", "::1") if host == "localhost" else (host,)
        try:
            found = [info for host in hosts for info in socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)]
        except (socket.gaierror, UnicodeError):
            self._connecting = self._reactor.look_up(host, port, self._resolved)
        else:
            self._resolved(None, found)

    def _resolved(self, error: Optional[BaseException], found: Any) -> None:
        if error is not None:
            self._fail(error if isinstance(error, Exception) else OSError(str(error)))
        else:
            self._connecting = Dial(self._reactor, found, self._dialed)

    def _dialed(self, sock: Optional[socket.socket], error: Optional[OSError]) -> None:
        self._connecting, self._sock = None, sock
        if sock is None or self._tls is None:
            self._send_request(None if sock else error or OSError("no address"))
            return
        try:
            secured = self._tls.current.wrap_socket(
                sock, server_hostname=self._host, do_handshake_on_connect=False
            )
        except (OSError, ValueError) as fault:      # closed already, or an invalid name
            self._fail(OSError(f"cannot speak TLS to {self._host!r}: {fault}"))
            return
        self._sock = secured
        self._connecting = Handshake(self._reactor, secured, self._send_request)

    def _send_request(self, error: Optional[OSError]) -> None:
        self._connecting = None
        if error is not None:
            self._fail(error)
            return
        self.connected = True
        self._heard = self._reactor.now()
        self._timer.cancel()
        self._watch_idle()
        self.flush()

    def _on_event(self, mask: int) -> None:
        if mask & selectors.EVENT_WRITE:
            self.flush()
        if mask & selectors.EVENT_READ and not self.ended:
            self._receive()

    def _watch_idle(self) -> None:
        if self._idle_timeout_s is None:
            return
        if self._paused:
            self._heard = self._reactor.now()
        left_s = self._heard + self._idle_timeout_s - self._reactor.now()
        if left_s <= 0:
            self._fail(TimeoutError("i/o timeout"))
        else:
            self._timer = self._reactor.call_later(left_s, self._watch_idle)

    def _receive(self) -> None:
        assert self._sock is not None
        try:
            data = self._sock.recv(SLICE_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            self._fail(error)
            return
        self._heard = self._reactor.now()
        try:
            if not data:
                self._end_of_input()
            elif self._left is None:
                self._in += data
                self._take_head()
            else:
                self._take_body(data)
        except BadRequest as error:
            self._fail(OSError(f"malformed HTTP response: {error}"))

    def _take_head(self) -> None:
        """Parse the head of the answer, behind any interim answers."""
        while True:
            found = self._finder.find(self._in)
            if found is None:
                return
            end, stop = found
            status, headers = parse_answer_head(bytes(self._in[:end]))
            del self._in[:stop]
            if status >= 200:
                break
            self._interim += 1
            if status == 101 or self._interim > INTERIM_ANSWERS_MAX:
                raise BadRequest(f"{self._interim} interim answers, the last with status {status}")
        data = bytes(self._in)
        self._in.clear()
        length = _content_length(headers)
        if self._bodyless or status in (204, 304):
            self._left = 0
        elif headers.get("transfer-encoding", "").lower() == "chunked":
            self._chunks = ChunkedDecoder()
            self._left = sys.maxsize
        else:
            self._left = length if "content-length" in headers else sys.maxsize
        self._on_head(status, headers)
        if not self.ended:
            self._take_body(data)

    def _take_body(self, data: bytes) -> None:
        assert self._left is not None
        self._room -= len(data)
        if self._chunks is not None:
            data = self._chunks.feed(data)
        else:
            data = data[:self._left]
            self._left -= len(data)
        if data:
            self._on_data(data)
        is_whole = self._chunks.done if self._chunks else not self._left
        if not self.ended and (is_whole or self._room < 0):
            self._end(None)

    def _end_of_input(self) -> None:
        until_close = self._left is not None and self._left > sys.maxsize // 2
        self._end(None if until_close and self._chunks is None else EOFError("unexpected EOF"))

    def _fail(self, error: Exception) -> None:
        if not self.ended:
            self._end(OSError(tls_reason(error)) if isinstance(error, ssl.SSLError) else error)

    def _end(self, error: Optional[Exception]) -> None:
        on_done = self._on_done
        self.cancel()
        on_done(error)


def _ignore(*args: object) -> None:
    """The callback of a call that is over."""


class Answer:
    """The answer to a call: status, headers, and the first body_max bytes of the body."""

    __slots__ = ("status", "headers", "body", "_body_max")

    def __init__(self, body_max: int = ANSWER_BYTES_MAX) -> None:
        self._body_max = body_max
        self.status = 0                 # 0: none has arrived
        self.headers: Dict[str, str] = {}
        self.body = b""

    def take_head(self, status: int, headers: Dict[str, str]) -> None:
        self.status, self.headers = status, headers

    def take_data(self, data: bytes) -> None:
        if len(self.body) < self._body_max:
            self.body += data[:self._body_max - len(self.body)]


def fetch(
    reactor: Reactor, url: str, target: str, done: Callable[[Optional[Exception], Answer], None],
    *, method: str = "GET", headers: Optional[Dict[str, str]] = None, body: Sequence[bytes] = (),
    connect_timeout_s: float, idle_timeout_s: float, body_max: int = ANSWER_BYTES_MAX,
    tls: Optional[TlsContext] = None,
) -> HttpCall:
    """Make a call; done(error, answer) once at its end, unless it is cancelled."""
    answer = Answer(body_max)
    return HttpCall(
        reactor, url, method, target, headers or {}, body=b"".join(body[:1]), more=body[1:],
        connect_timeout_s=connect_timeout_s, idle_timeout_s=idle_timeout_s, answer_max=body_max,
        tls=tls, on_head=answer.take_head, on_data=answer.take_data,
        on_done=lambda error: done(error, answer),
    )


# ============================================================================
# net/http_connections -- Connections: bytes in, requests out, replies in order.
# ============================================================================


DRAIN_SECONDS = 2.0                 # until a client has closed its end too; above: closed


class Service:
    """The handler, the limits and the state that the connections of a listener share.

    handler     gets every complete request
    body_max    bytes of a body; a longer one arrives as body_too_large
    body_limit  (head) -> its own limit, body_max by default
    memory_max  bytes of a body in memory; a longer one goes to the file that
                open_spool(first bytes) returns, and is too large without one
    held_max    bytes of all incomplete bodies in memory
    patient     the connections are of clients, which share a part of each turn; members never
                wait for them
    """

    def __init__(
        self, reactor: Reactor, handler: Handler, body_max: int, tls: Optional[TlsContext],
        budget: Optional[BufferBudget], *, patient: bool,
    ) -> None:
        self.reactor = reactor
        self.handler = handler
        self.body_max = body_max
        self.tls = tls
        self.budget = budget or BufferBudget(reactor)
        self.patient = patient
        self.flush_soon = reactor.flush_in_turn if patient else reactor.flush_soon
        self.body_limit: Callable[[HttpHead], int] = lambda head: self.body_max
        self.memory_max: float = math.inf
        self.open_spool: Callable[[bytes], Optional[IO[bytes]]] = lambda first: None
        self.held_max: float = math.inf
        self.held_bytes = 0             # of bodies under way
        self.heads: Dict[bytes, HttpHead] = {}
        self.received_bytes = self.sent_bytes = 0   # of all connections so far
        self.unread: Dict[Connection, Tuple[float, int]] = {}   # since when; taken since then
        self.partial: Dict[Connection, float] = {}      # start of their incomplete requests
        self._connections: Set[Connection] = set()

    def serve(self, sock: socket.socket, remote: str) -> Connection:
        """Serve HTTP on an accepted socket, after its TLS handshake."""
        connection = Connection(self, sock, remote)
        self._connections.add(connection)
        return connection

    def dispatch(self, request: HttpRequest) -> None:
        """Hand a request to the handler; a bug there costs this request, not the member.

        Requests only read state or propose, so a failure leaves nothing half done.  Applying
        entries of the log has no such protection.
        """
        try:
            self.handler(request)
        except InvariantError:
            raise
        except Exception:
            package_logger("http").exception("bug: %s %s", request.method, request.target[:200])
            if request.connection.streaming:
                request.connection.close()      # its reply cannot be completed
                return
            request.head = closing_head(request.head)      # no second reply: see finish()
            request.reply(500, b'{"message":"Internal Server Error"}')

    def watch_partial(self, connection: Connection, partial: bool, *, begun: bool) -> None:
        """Note the start of an incomplete request.  begun: it is another than before."""
        if not partial:
            self.partial.pop(connection, None)
        elif begun or connection not in self.partial:
            self.partial[connection] = self.reactor.now()

    def watch_unread(self, connection: Connection, taken: int) -> None:
        """Note since when a client reads too slowly.  taken: bytes by this send."""
        since, before = self.unread.get(connection, (0.0, UNREAD_BYTES_MIN))
        taken += before
        is_enough = taken >= UNREAD_BYTES_MIN
        self.unread[connection] = (self.reactor.now(), 0) if is_enough else (since, taken)

    def forget(self, connection: Connection) -> None:
        """Drop all that is known of a closed connection."""
        self._connections.discard(connection)
        self.partial.pop(connection, None)
        self.unread.pop(connection, None)
        self.budget.forget(connection)

    def close_slow(self) -> None:
        """Close connections with a request or a reply that takes too long."""
        now = self.reactor.now()
        for connection, since in list(self.partial.items()):
            if since < now - REQUEST_SECONDS_MAX:
                connection.refuse(BadRequest("408 Request Timeout", 408))
        for connection, (since, _) in list(self.unread.items()):
            if since < now - UNREAD_SECONDS_MAX:
                connection.close()


class Connection:
    """One accepted socket: bytes in, requests out, one at a time and in order."""

    __slots__ = (
        "reactor", "remote", "on_close", "on_drain", "streaming", "pending", "busy", "closed",
        "_service", "_sock", "_in", "_finder", "_head", "_chunks", "_body", "_body_bytes",
        "_body_max", "_file", "_out", "_dirty", "_events", "_close_after", "_eof", "_draining",
        "_in_line", "_http2", "_drain_timer",
    )

    def __init__(self, service: Service, sock: socket.socket, remote: str) -> None:
        self.reactor = service.reactor
        self.remote = remote
        self.on_close: Optional[Callable[[], None]] = None
        self.on_drain: Optional[Callable[[], None]] = None      # once, when nothing is pending
        self.streaming = False
        self.pending = 0                # bytes in _out
        self.busy = False               # the reply to a request is not complete
        self.closed = False
        self._service = service
        self._sock = sock
        self._in = bytearray()          # received, not yet parsed
        self._finder = HeadFinder()     # of the next head in _in
        self._head: Optional[HttpHead] = None       # parsed, its body still incomplete
        self._chunks: Optional[ChunkedDecoder] = None
        self._body: List[bytes] = []    # pieces of a chunked or large body
        self._body_bytes = 0            # in them, or in _file
        self._body_max = 0              # limit for the request under way
        self._file: Optional[IO[bytes]] = None      # instead of _body
        self._out: List[Union[bytes, memoryview]] = []
        self._dirty = False
        self._events = selectors.EVENT_READ
        self._close_after = False       # close when _out is sent
        self._eof = False               # the client will send no more
        self._draining = False          # reply sent, input thrown away until the client closes
        self._in_line = False           # _resume() is queued behind other connections
        self._http2: Optional[Http2Refusal] = None
        self._drain_timer: Optional[Timer] = None
        self._register(selectors.EVENT_READ, self._receive)

    @property
    def scheme(self) -> str:
        return "https" if self._service.tls else "http"

    def _register(self, events: int, callback: Callable[[int], None]) -> None:
        self.reactor.register(self._sock, events, callback, patient=self._service.patient)

    def _on_event(self, mask: int) -> None:
        if mask & selectors.EVENT_WRITE:
            self.flush()
        if mask & selectors.EVENT_READ and not self.closed:
            self._receive(mask)

    def _receive(self, mask: int) -> None:
        try:
            data = self._sock.recv(SLICE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        if self._draining:
            if not data:
                self.close()
        elif not data:
            self._end_of_input()
        else:
            self._service.received_bytes += len(data)
            if not (self._in or self.busy or self.pending or self._head or self._close_after):
                request = self._whole_request(data)
                if request is not None:
                    self.busy = True
                    self._service.dispatch(request)
                    return
            self._in += data
            if not (self.busy or self._in_line) and self.pending <= OUTPUT_PAUSE_BYTES:
                self._process()
            elif len(self._in) > REQUEST_HEAD_BYTES_MAX:
                self._watch(self._events & ~selectors.EVENT_READ)   # until _resume()
            if (self._in or self._body_bytes) and not self.closed:
                self._service.budget.grow(self, len(data))

    def _end_of_input(self) -> None:
        """Serve the remaining requests of a client that sends no more; end its streams."""
        self._eof = True
        if self.busy and self.streaming:
            self.close()
        elif self.busy or self._in_line or self._out:
            self._watch(self._events & ~selectors.EVENT_READ)
            # Requests that wait for room in the output are served later.
            waits = self.busy or self._in_line or self.pending > OUTPUT_PAUSE_BYTES and self._in
            self._close_after = self._close_after or not waits
        else:
            self.close()

    def _process(self) -> None:
        """Serve the next request if it is complete; finish() goes on with those behind it."""
        served = False
        try:
            request = self._next_request() if self._in or self._head else None
            if request is not None:
                self.busy = served = True
                self._service.dispatch(request)
        except BadRequest as error:
            self.refuse(error)
        if self.closed:
            return
        partial = bool(self._in or self._head or self._http2) and not self.busy
        if partial or self._service.partial:
            self._service.watch_partial(self, partial, begun=served)
        if self._eof and not (self.busy or self._in_line or self._close_after):
            self._close_after = True        # the rest is an incomplete request
            self._flush_soon()

    def _line_up(self) -> None:
        """Parse the rest of _in after all other connections: one request of each in turn."""
        if not self._in_line:
            self._in_line = True
            self.reactor.call_in_turn(self._resume)

    def _whole_request(self, data: bytes) -> Optional[HttpRequest]:
        """Return the request if `data` is exactly one with a cached head.  A hot path."""
        end = data.find(b"\r\n\r\n")
        head = self._service.heads.get(data[:end]) if end >= 0 else None
        if head is not None and head.is_simple and len(data) == end + 4 + head.body_size:
            return HttpRequest(head, data[end + 4:], self)
        return None

    def _next_request(self) -> Optional[HttpRequest]:
        head = self._head or self._take_head()
        if head is None:
            return None
        if not head.body_size and not head.chunked:
            self._head = None
            return HttpRequest(head, b"", self)
        body = self._take_chunked(head) if head.chunked else self._take_sized(head)
        if body is None and self._head is not None:
            return None
        self._head = None
        request = HttpRequest(head, body or b"", self)
        request.body_file, self._file = self._file, None
        if body is None:
            request.body_too_large = True
            request.head = closing_head(head)
        return request

    def _take_head(self) -> Optional[HttpHead]:
        if self._http2 is not None:
            self._refuse_http2(self._http2)
            return None
        found = self._finder.find(self._in)
        if found is None:
            check_start(self._in)       # refuse at once instead of waiting for an end
            return None
        end, stop = found
        raw = bytes(self._in[:end])
        del self._in[:stop]
        heads = self._service.heads
        head = heads.get(raw)
        if head is None:
            head = parse_head(raw)
            if end <= 2048:
                if len(heads) >= HEAD_CACHE_MAX:
                    heads.clear()
                heads[raw] = head
        self._head = head
        if head.chunked or head.body_size:
            self._body_max = self._service.body_limit(head)
        if head.expects and (head.chunked or head.body_size > len(self._in)):
            if head.body_size <= self._body_max:
                self.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        return head

    def _take_sized(self, head: HttpHead) -> Optional[bytes]:
        """Return the body; None: incomplete, or too large and then _head is cleared."""
        size = head.body_size
        if size > self._body_max:
            self._refuse_body()
            return None
        if not self._body_bytes and len(self._in) >= size:
            body = bytes(self._in[:size])
            del self._in[:size]
            return body
        if size <= 1 << 16:
            return None
        left = size - self._body_bytes      # to a list: appending to bytes would copy them
        piece = bytes(self._in[:left])
        del self._in[:left]
        if piece and not self._keep(piece):
            self._refuse_body()
            return None
        return self._join() if self._body_bytes == size else None

    def _keep(self, piece: bytes) -> bool:
        """Keep a piece of a body in memory, or all of it in a file; False: there is no room."""
        service = self._service
        self._body.append(piece)
        self._body_bytes += len(piece)
        service.held_bytes += len(piece)
        if self._file is None:
            if self._body_bytes <= service.memory_max:
                return service.held_bytes <= service.held_max
            first = b"".join([piece[:16] for piece in self._body[:16]])
            self._file = service.open_spool(first[:16])
            if self._file is None:
                return False
        try:
            self._file.writelines(self._body)
        except OSError:
            return False
        service.held_bytes -= sum(map(len, self._body))
        self._body = []
        return True

    def _join(self) -> bytes:
        """Return the body that was kept in memory."""
        data = b"".join(self._body)
        self._service.held_bytes -= len(data)
        self._body, self._body_bytes = [], 0
        return data

    def _refuse_body(self) -> None:
        """Drop the body: its request is answered at once."""
        self._head = self._chunks = self._file = None
        self._join()

    def _take_chunked(self, head: HttpHead) -> Optional[bytes]:
        if self._chunks is None:
            self._chunks = ChunkedDecoder()
        decoder = self._chunks
        data = bytes(self._in[:CHUNKED_SLICE_BYTES])
        del self._in[:CHUNKED_SLICE_BYTES]
        piece = decoder.feed(data)
        has_room = self._keep(piece) if piece else True
        if not has_room or self._body_bytes > self._body_max or decoder.chunks > CHUNKS_MAX:
            self._refuse_body()
            return None
        if not decoder.done:
            if self._in:
                self._line_up()
            return None
        self._in[:0] = decoder.rest
        self._chunks = None
        return self._join()

    def refuse(self, error: BadRequest) -> None:
        """Answer a message that is not HTTP, and close."""
        if isinstance(error, Http2Preface):
            self._http2 = Http2Refusal(V3_REFUSAL)
            self._refuse_http2(self._http2)
            return
        text = str(error).encode("latin-1")
        status_line = _STATUS_LINES.get(error.status, _STATUS_LINES[400])
        self.send(
            f"{status_line}Content-Type: text/plain; charset=utf-8\r\n"
            f"Content-Length: {len(text)}\r\nConnection: close\r\n\r\n".encode("latin-1") + text
        )
        self._in.clear()
        self._close_after = True

    def _refuse_http2(self, refusal: Http2Refusal) -> None:
        data = bytes(self._in)
        self._in.clear()
        answer = refusal.feed(data)
        if answer:
            self.send(answer)
        self._close_after = refusal.done

    def send(self, data: bytes, more: Sequence[bytes] = ()) -> None:
        """Queue bytes for the end of this turn."""
        if self.closed:
            return
        if self.pending > OUTPUT_BYTES_MAX:
            self.close()
            return
        size = len(data)
        self._out.append(data)
        if more:
            self._out += more
            size += sum(map(len, more))
        self.pending += size
        if self._events & selectors.EVENT_WRITE:
            self._service.budget.grow(self, size)
        self._flush_soon()

    def _flush_soon(self) -> None:
        if not self._dirty:
            self._dirty = True
            self._service.flush_soon(self.flush)

    def finish(self, data: bytes, keep_alive: bool, more: Sequence[bytes] = ()) -> None:
        """Queue the end of a reply and go on with the next request, or close.

        Does nothing if no reply is due: dispatch() has replied for a handler that failed.
        """
        if self.closed or not self.busy:
            return
        self.busy = self.streaming = False
        self.on_close = self.on_drain = None
        if data and not self._out and not more:     # a hot path: what send() does
            self._out.append(data)
            self.pending = len(data)
            if not self._dirty:
                self._dirty = True
                self._service.flush_soon(self.flush)
        elif data:
            self.send(data, more)
        if not keep_alive or self._eof and not self._in:
            self._close_after = True
        elif self._in:
            self._line_up()
        elif not self._events & selectors.EVENT_READ and not self.closed:
            self._watch(self._events | selectors.EVENT_READ)

    def flush(self) -> None:
        """Send the queued bytes in one call; the rest waits until the socket takes more."""
        self._dirty = False
        if self.closed:
            return
        if self._out:
            try:
                sent = self._sock.send(self._out[0]) if len(self._out) == 1 else self._send_many()
            except BlockingIOError:
                sent = 0
            except OSError:
                self.close()
                return
            self._service.sent_bytes += sent
            self.pending -= sent
            if self.pending:
                self._drop_sent(sent)
                self._service.watch_unread(self, sent)
                grown = 0 if self._events & selectors.EVENT_WRITE else self.pending
                self._service.budget.grow(self, grown, moved=sent > 0)
            else:
                self._out = []
        if self._out:
            self._watch(self._events | selectors.EVENT_WRITE)
        elif self._close_after:
            self._drain()
        elif self._events & selectors.EVENT_WRITE:
            self._watch(self._events & ~selectors.EVENT_WRITE)
            self._service.unread.pop(self, None)
        if self._in and not self.busy and self.pending <= OUTPUT_PAUSE_BYTES:
            self._line_up()
        if self.on_drain is not None and not self._out:
            on_drain, self.on_drain = self.on_drain, None
            on_drain()

    def _send_many(self) -> int:
        """Send in one call; return how many bytes the socket took.  Large pieces are not copied:
        256 KB take 40 us less."""
        out = self._out
        # TLS has no sendmsg(), and a blocked send must be repeated with the same first bytes.
        if self._service.tls is not None:
            size, count = len(out[0]), 1
            while count < len(out) and size + len(out[count]) <= OUTPUT_JOIN_BYTES_MAX:
                size += len(out[count])
                count += 1
            if count > 1:
                out[:count] = [b"".join(out[:count])]
            return self._sock.send(out[0])
        if self.pending <= OUTPUT_JOIN_BYTES_MAX:
            return self._sock.send(b"".join(out))
        return self._sock.sendmsg(out[:OUTPUT_PIECES_MAX])

    def pieces(self) -> Iterator[Union[bytes, bytearray]]:
        """Yield the buffers in memory; several connections may share one."""
        for piece in (*self._out, self._in, *self._body):
            if piece:
                yield cast(bytes, piece.obj) if isinstance(piece, memoryview) else piece

    def _drop_sent(self, sent: int) -> None:
        """Remove the bytes that the socket has taken; more are left."""
        first = 0
        while sent >= len(self._out[first]):
            sent -= len(self._out[first])
            first += 1
        del self._out[:first]
        if sent:
            self._out[0] = memoryview(self._out[0])[sent:]      # no copy of the rest

    def _resume(self) -> None:
        """Go on with input that waited for other connections, or for room in the output."""
        self._in_line = False
        if self.closed or self.busy or self._close_after or self.pending > OUTPUT_PAUSE_BYTES:
            return
        if not self._eof:
            self._watch(self._events | selectors.EVENT_READ)
        self._process()

    def _drain(self) -> None:
        """End the output, then read until the client closes: a reset would destroy the reply."""
        if self._draining:
            return
        self._draining = True
        try:
            self._sock.shutdown(socket.SHUT_WR)
        except OSError:
            self.close()
            return
        self._in.clear()
        self._watch(selectors.EVENT_READ)
        self._drain_timer = self.reactor.call_later(DRAIN_SECONDS, self.close)

    def _watch(self, events: int) -> None:
        if events == self._events:
            return
        callback = self._receive if events == selectors.EVENT_READ else self._on_event
        if not self._events:
            self._register(events, callback)
        elif events:
            self.reactor.modify(self._sock, events, callback)
        else:
            self.reactor.unregister(self._sock)
        self._events = events

    def close(self) -> None:
        """Drop the socket; a waiting request's on_close is called."""
        if self.closed:
            return
        self.closed = True
        if self._events:
            self.reactor.unregister(self._sock)
        self._sock.close()
        self._out = []
        self._in.clear()
        self._refuse_body()
        self.on_drain = None
        if self._drain_timer is not None:
            self._drain_timer.cancel()
        self._service.forget(self)
        on_close, self.on_close = self.on_close, None
        if on_close is not None:
            on_close()


# ============================================================================
# net/http_server -- Listeners: sockets that accept connections, in plain HTTP or by TLS.
# ============================================================================


class PendingConnection:
    """An accepted connection until its TLS handshake is done, which may take its time."""

    def __init__(
        self, listener: Listener, tls: TlsContext, sock: socket.socket, remote: str
    ) -> None:
        self._listener = listener
        self._tls = tls
        self._sock = sock
        self._remote = remote
        self._handshake: Optional[Handshake] = None
        self._timer = listener.reactor.call_later(HANDSHAKE_SECONDS_MAX, self._expire)
        listener.reactor.register(
            sock, selectors.EVENT_READ, self._read_first_byte, patient=listener.patient)

    def close(self) -> None:
        self._detach()
        self._sock.close()

    def _detach(self) -> None:
        """Leave the socket to others."""
        self._timer.cancel()
        if self._handshake is not None:
            self._handshake.cancel()
            self._handshake = None
        else:
            self._listener.reactor.unregister(self._sock)
        self._listener.pending.discard(self)

    def _expire(self) -> None:
        self._detach()
        self._refuse("client sent nothing: TLS handshake timeout")

    def _refuse(self, why: str) -> None:
        self._listener.log_refusal(self._remote, why)
        self._sock.close()

    def _read_first_byte(self, mask: int) -> None:
        """Begin the handshake after a byte of 22; answer a request in plain HTTP as such."""
        try:
            first = self._sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return
        except OSError:
            first = b""
        self._detach()
        if first == b"\x16":
            self._shake_hands()
        elif first:
            self._listener.log_refusal(self._remote, _TLS_REASONS["HTTP_REQUEST"])
            connection = self._listener.serve(self._sock, self._remote)
            connection.refuse(BadRequest("Client sent an HTTP request to an HTTPS server.\n"))
        else:
            self._sock.close()

    def _shake_hands(self) -> None:
        try:
            sock = self._tls.current.wrap_socket(
                self._sock, server_side=True, do_handshake_on_connect=False
            )
        except OSError:                 # the client has closed the connection
            self._sock.close()
            return
        self._sock = sock
        self._listener.pending.add(self)
        self._handshake = Handshake(
            self._listener.reactor, sock, self._serve, patient=self._listener.patient)

    def _serve(self, error: Optional[OSError]) -> None:
        self._handshake = None
        self._listener.pending.discard(self)
        assert isinstance(self._sock, ssl.SSLSocket)
        try:
            if error is not None:
                raise error
            self._tls.check_peer(self._sock)
        except OSError as failure:
            is_tls = isinstance(failure, ssl.SSLError)
            self._refuse(tls_reason(failure) if is_tls else str(failure))
        else:
            self._listener.serve(self._sock, self._remote)


class Listener(Service, http.server.HTTPServer):
    """A listening socket whose connections the reactor serves.

    Bound at construction (OSError if the port is taken), accepting after start().

    tls   for an https URL; a request in plain HTTP is refused with a sentence
    kept  descriptors for other purposes: a number, or one part in so many of all, if that is less
    """

    allow_reuse_address = os.name == "posix"
    request_queue_size = 1024

    def __init__(
        self, url: str, reactor: Reactor, handler: Handler, *,
        body_max: int = REQUEST_BODY_BYTES_MAX, tls: Optional[TlsContext] = None,
        budget: Optional[BufferBudget] = None, kept: Tuple[int, int] = (DESCRIPTORS_KEPT, 4),
        patient: bool = True,
    ) -> None:
        self.url = url
        Service.__init__(self, reactor, handler, body_max, tls, budget, patient=patient)
        self.pending: Set[PendingConnection] = set()
        self._kept = kept
        self._log = ThrottledLog("http", reactor.now)
        self._sweep: Optional[Timer] = None
        self._started = False
        family, address = _listen_address(url)
        self.address_family = family
        http.server.HTTPServer.__init__(self, address, http.server.BaseHTTPRequestHandler)
        self.socket.setblocking(False)

    def server_bind(self) -> None:
        """Bind without HTTPServer's look-up of the own host name, which may ask a name server."""
        if self.address_family == socket.AF_INET6:
            with contextlib.suppress(OSError, AttributeError):
                self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        socketserver.TCPServer.server_bind(self)

    @property
    def bound_url(self) -> str:
        """The URL with the port that the system chose for port 0."""
        parts = urlsplit(self.url)
        host = parts.netloc.rpartition(":")[0]
        return f"{parts.scheme}://{host}:{self.server_address[1]}"

    def start(self) -> None:
        """Accept from now on.  Thread: reactor, or before it runs."""
        self._listen()
        self._sweep = self.reactor.every(SLOW_CHECK_SECONDS, self.close_slow)

    def _listen(self) -> None:
        self._started = True
        self.reactor.register(
            self.socket, selectors.EVENT_READ, self._accept, patient=self.patient)

    def stop(self) -> None:
        """Close the listening socket and every connection."""
        if self._started:
            self.reactor.unregister(self.socket)
        if self._sweep is not None:
            self._sweep.cancel()
        self._started = False
        self.server_close()
        for pending in list(self.pending):
            pending.close()
        for connection in list(self._connections):
            connection.flush()
            connection.close()

    def _accept(self, mask: int) -> None:
        for _ in range(64):
            try:
                sock, address = self.socket.accept()
            except BlockingIOError:
                return
            except OSError as error:
                self._pause(error)
                return
            try:
                self._admit(sock, f"{address[0]}:{address[1]}")
            except OSError:             # the client has left, or the system has no room for it
                sock.close()

    def _admit(self, sock: socket.socket, remote: str) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        room = CONNECTIONS_MAX - len(self._connections) - len(self.pending)
        # A new descriptor is the lowest that is free: its number tells how many are in use.
        descriptors = descriptors_max(*self._kept)
        free = descriptors - sock.fileno()
        if room <= 0:
            why = f"too many connections ({CONNECTIONS_MAX}) to {self.url}"
            self._turn_away(sock, remote, why, told=room > -REFUSALS_MAX)
        elif free <= 0:
            why = (
                f"too many open files ({descriptors}) for more connections to {self.url}; raise the"
                " limit (ulimit -n)"
            )
            self._turn_away(sock, remote, why, told=free > -REFUSALS_TOLD_MAX)
        elif self.tls is None:
            self.serve(sock, remote)
        else:
            self.pending.add(PendingConnection(self, self.tls, sock, remote))

    def _turn_away(self, sock: socket.socket, remote: str, why: str, *, told: bool) -> None:
        """Close one connection too many; `told`: after a 503, where that needs no handshake."""
        self._log.error(f"{why}: turned {remote.rpartition(':')[0]} away", why)
        if told and self.tls is None:
            self.serve(sock, remote).refuse(BadRequest(
                "503 Service Unavailable: too many connections; close some, or use another member",
                503,
            ))
        else:
            sock.close()

    def log_refusal(self, remote: str, why: str) -> None:
        """Log why a connection was refused, at most twice a minute per host and reason."""
        host = remote.rpartition(":")[0]
        self._log.error(
            f"rejected connection from {remote} to {self.url}: {why}", f"{host} {why}"
        )

    def _pause(self, error: OSError) -> None:
        """Accept again in a second if the system has no descriptor left."""
        if error.errno not in (*NO_DESCRIPTOR, errno.ENOBUFS, errno.ENOMEM):
            return                      # the client has left already
        package_logger("http").error(
            "cannot accept connections on %s: %s; raise the open files limit (ulimit -n)",
            self.url, error.strerror,
        )
        self.reactor.unregister(self.socket)
        self._started = False
        self.reactor.call_later(1.0, self._resume)

    def _resume(self) -> None:
        if self.socket.fileno() >= 0 and not self._started:
            self._listen()


def _listen_address(url: str) -> Tuple[int, Tuple[str, int]]:
    """Return the address family and the address to bind for `url`; without host: all."""
    host, port = url_address(url)
    if not host:
        return (socket.AF_INET6, ("::", port)) if socket.has_dualstack_ipv6() else (
            socket.AF_INET, ("0.0.0.0", port))
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    found.sort(key=lambda info: info[0] != socket.AF_INET)  # localhost: IPv4 first, as Go does
    family, _, _, _, address = found[0]
    return family, (str(address[0]), int(address[1]))


# ============================================================================
# peer/compatibility -- Peers as this member sees them: versions, ids, URLs, reachability.
# ============================================================================


CLOCK_DIFFERENCE_MAX_NS = NS        # between a peer's clock and ours; above: a warning


class StreamKind(NamedTuple):
    """One of the two streams that each member holds open to each peer."""

    path: str       # last but one element of the URL path
    title: str      # its name in the log
    channel: str    # its name in statistics


APP_STREAM = StreamKind("msgapp", "stream MsgApp v2", "msgappv2")
MESSAGE_STREAM = StreamKind("message", "stream Message", "message")
STREAM_KINDS = {kind.path: kind for kind in (APP_STREAM, MESSAGE_STREAM)}
_PIPELINE = "pipeline"

_OLDEST_STREAM_VERSION = (2, 1)     # etcd 2.0 has streams of another kind


def _parse_id(text: str) -> Optional[int]:
    """Return the member id of a hex number; None for any other text."""
    if not re.fullmatch("[0-9a-fA-F]{1,32}", text):
        return None
    value = int(text, 16)
    return value if value <= UINT64_MAX else None


class PeerStatus:
    """The result of the last attempt to reach a peer, and the version that it announced last."""

    def __init__(self, member_id: int, wall_ns: Callable[[], int]) -> None:
        self.version = ""               # "": none yet
        self.active = False
        self.active_since = 0.0         # unix seconds; 0: inactive
        self._id = f"{member_id:x}"
        self._wall_ns = wall_ns

    def activate(self) -> None:
        """Note that a message went through."""
        if not self.active:
            self.active = True
            self.active_since = self._wall_ns() / NS
            package_logger("rafthttp").info("the connection with %s became active", self._id)

    def deactivate(self, action: str, source: str, reason: object) -> None:
        """Note that an action (dial, read, write) on `source` failed; the first is an error."""
        if isinstance(reason, OSError) and reason.strerror:     # etcd's words: no `[Errno 111]`
            reason = reason.strerror.lower()
        log = package_logger("rafthttp")
        level = logging.ERROR if self.active else logging.DEBUG
        log.log(level, "failed to %s %s on %s (%s)", action, self._id, source, reason)
        if self.active:
            self.active = False
            self.active_since = 0.0
            log.info("the connection with %s became inactive", self._id)


class UrlPicker:
    """The URLs of a peer.  One is in use until it fails; then the next."""

    def __init__(self, urls: Iterable[str]) -> None:
        self.update(urls)

    def update(self, urls: Iterable[str]) -> None:
        """Replace the URLs and begin with the first in order.

        Invalid ones are left out: the log of a Go member may hold a port of 99999.
        """
        self.urls: List[str] = []               # sorted
        self._picked = 0
        for url in sorted(urls):
            try:
                self.urls.append(check_url(url))
            except ValueError as error:
                package_logger("rafthttp").error("ignored a peer URL: %s", error)
        if not self.urls:
            self.urls.append("http://127.0.0.1:0")      # every dial fails

    def pick(self) -> str:
        return self.urls[self._picked]

    def failed(self, url: str) -> None:
        """Go on to the next URL if `url` is in use."""
        if url == self.urls[self._picked]:
            self._picked = (self._picked + 1) % len(self.urls)


class Sent(NamedTuple):
    """The fate of one message to a peer."""

    to: int
    channel: str                        # msgappv2, message or pipeline
    message: Message
    size: int                           # bytes
    seconds: float                      # until the system took it; pipeline: until the answer
    ok: bool                            # False: lost, or dropped


class MessageInspector:
    """The check of messages that peers send, and of databases of 3.x; this one lets all pass."""

    def inspect(self, message: Message) -> Generator[None, None, str]:
        """Return, in steps, why `message` must not be delivered; "": it may."""
        yield from ()
        return ""

    def read_state(self, data: bytes) -> Any:
        """Return the store state in the data of a snapshot.  Raises ValueError.  Thread: any."""
        return None

    def has_v3_data(self, database: IO[bytes]) -> bool:
        """Return whether the database behind a snapshot of 3.x holds data.  Thread: any."""
        return False

    def note_v3_data(self) -> None:
        """Remember that the cluster holds data of the v3 API."""

    def needs_v3_data(self, member_id: int) -> bool:
        """Return whether an empty database beside a snapshot would harm that member."""
        return False

    def empty_database(self, raft_index: int) -> bytes:
        """Return the database for a member of 3.x beside a snapshot up to raft_index."""
        return b""


class LinkContext(NamedTuple):
    """The identity and the callbacks that all links of this member share."""

    reactor: Reactor
    member_id: int
    cluster_id: str                                 # hex, as in the header
    headers: Dict[str, str]                         # of every request to a peer
    dial_timeout_s: float
    log_error: Callable[[str], None]
    receive: Callable[[Message, int], Generator[None, None, object]]    # a message; its bytes
    unreachable: Callable[[int], None]
    snapshot_done: Callable[[int, bool], None]
    removed: Callable[[], None]
    sent: Callable[[Sent], None]
    round_trip: Callable[[int, float], None]        # of a probe to a peer, in seconds
    tls: Optional[TlsContext]                       # None: the defaults, for https peers
    decoding: SlicedWork
    inspector: MessageInspector = MessageInspector()
    identity: Identity = DEFAULT_IDENTITY


ID_IN_USE = "member ID in use"      # refusal of a second process with the id of a peer
FOREIGN_HINT = (
    "; two clusters use one peer URL: the member that does not belong there was started with the"
    " data directory of another one: stop it and correct its -data-dir"
)
DOUBLE_HINT = (
    ": one of the two was started with a copy of the other's data directory; stop it, move that"
    " directory away, and add it as a member of its own (POST /v2/members,"
    " -initial-cluster-state existing)"
)


# ============================================================================
# peer/frames -- Peer frames: messages as bytes on a stream.
# ----------------------------------------------------------------------------
# The bytes of a peer are never trusted: an invalid or too long frame is a CodecError.
# ============================================================================


_U64 = struct.Struct(">Q")
_pack_u64 = _U64.pack


class EntryListEncoder:
    """Encodes lists of entries for msgappv2: each as big-endian uint64 length, then its bytes.

    The result for the last list is cached: a leader sends one list to all of its followers.
    """

    __slots__ = ("_entries", "_data")

    def __init__(self) -> None:
        self._entries: Sequence[Entry] = ()
        self._data: List[bytes] = []

    def encode(self, entries: Sequence[Entry]) -> List[bytes]:
        """Return the bytes of `entries` in pieces; the list must not change until forget()."""
        if entries is not self._entries:
            parts: List[bytes] = []
            for entry in entries:
                if len(entry.data) > SHARED_DATA_BYTES:
                    head = encode_entry_head(entry)
                    parts += (_pack_u64(len(head) + len(entry.data)) + head, entry.data)
                    continue
                data = entry.encoded or encode_entry(entry)
                if entry.encoded is not None:       # the log will be written from it, too
                    entry.encoded = data
                parts += (_pack_u64(len(data)), data)
            self._entries, self._data = entries, joined_parts(parts)
        return self._data

    def forget(self) -> None:
        self._entries, self._data = (), []


class AppV2Encoder:
    """Frames of one msgappv2 stream: short where the fields follow from the last frame.

    Source: etcd 2.3 rafthttp/msgappv2.go.
    """

    __slots__ = ("_lists", "_term", "_index")

    heartbeat = b"\0"

    def __init__(self, lists: EntryListEncoder) -> None:
        self._lists = lists
        self._term = 0
        self._index = 0                 # of the last entry sent

    def encode(self, message: Message) -> List[bytes]:
        """Return the frame of a MsgApp in pieces, of which the long ones are not copied."""
        entries = message.entries
        if message.index == self._index and message.log_term == self._term == message.term:
            self._index += len(entries)
            return joined_parts((
                b"\1", _pack_u64(len(entries)), *self._lists.encode(entries),
                _pack_u64(message.commit),
            ))
        self._term = message.term
        self._index = entries[-1].index if entries else message.index
        data = encode_message_parts(message)
        return joined_parts((b"\2", _pack_u64(sum(map(len, data))), *data))


class MessageEncoder:
    """Frames of the message stream: big-endian uint64 length, then the Message."""

    __slots__ = ()

    heartbeat = _pack_u64(28) + encode_message(Message(MsgType.HEARTBEAT))

    @staticmethod
    def encode(message: Message) -> List[bytes]:
        """Return the frame in pieces, of which the long ones are not copied."""
        data = encode_message_parts(message)
        return joined_parts((_pack_u64(sum(map(len, data))), *data))


class FrameDecoder:
    """Cuts a stream, fed in any pieces, into frames."""

    __slots__ = ("_partial", "_need")

    def __init__(self) -> None:
        self._partial = bytearray()
        self._need = 0                  # bytes in _partial for the next step

    def feed(self, data: bytes) -> List[Message]:
        """Return the messages now complete.  Raises CodecError; then the stream is lost."""
        return [message for message in self.messages(data) if message is not None]

    def messages(self, data: bytes) -> Iterator[Optional[Message]]:
        """Do feed() in steps of 1 ms at most, or of one entry; exhaust it before the next data.

        Yields a message, or None between two steps of one.
        """
        if self._partial:
            self._partial += data
            if len(self._partial) < self._need:
                return
            data = bytes(self._partial)
        found: List[Message] = []
        offset, end, work = 0, len(data), 0
        while offset < end:
            size = yield from self._frame(data, offset, found)
            if offset + size > end:
                self._need = size
                break
            offset += size
            work += STEP_BYTES // STEP_ENTRIES + size
            if found or work > STEP_BYTES:
                work = 0
                yield found.pop() if found else None
        self._partial = bytearray(data[offset:])

    def _frame(self, data: bytes, offset: int, found: List[Message]) -> Generator[None, None, int]:
        """Consume one frame at `offset`; return its size, which may exceed the data."""
        raise NotImplementedError


def _frame_size(data: bytes, offset: int) -> int:
    """Return the length at `offset`; 0 if it is incomplete."""
    if len(data) < offset + 8:
        return 0
    size: int = _U64.unpack_from(data, offset)[0]
    if size > RAFT_BODY_BYTES_MAX:
        raise CodecError(f"frame of {size} bytes")
    return size


class MessageDecoder(FrameDecoder):
    """Decodes the message stream without its link heartbeats."""

    __slots__ = ()

    def _frame(self, data: bytes, offset: int, found: List[Message]) -> Generator[None, None, int]:
        start = offset + 8
        end = start + _frame_size(data, offset)
        if end <= len(data):
            message = yield from decode_message_steps(data[start:end])
            if message.type != MsgType.HEARTBEAT or message.sender or message.to:
                found.append(message)
        return end - offset


class AppV2Decoder(FrameDecoder):
    """Decodes a msgappv2 stream from member `remote_id` to `local_id` without its heartbeats."""

    __slots__ = ("_local_id", "_remote_id", "_term", "_index", "_entries", "_left", "_bytes")

    def __init__(self, local_id: int, remote_id: int) -> None:
        super().__init__()
        self._local_id = local_id
        self._remote_id = remote_id
        self._term = 0
        self._index = 0
        self._entries: List[Entry] = []     # of the short frame under way
        self._left = -1                     # its entries to come; -1: between frames
        self._bytes = 0                     # its bytes so far

    def _frame(self, data: bytes, offset: int, found: List[Message]) -> Generator[None, None, int]:
        if self._left > 0:
            return self._entry(data, offset)
        if self._left == 0:
            return self._commit(data, offset, found)
        kind = data[offset]
        if kind == 0:
            return 1
        if kind == 1:
            return self._short_head(data, offset)
        if kind == 2:
            return (yield from self._full(data, offset, found))
        raise CodecError(f"unknown frame {kind} on msgappv2")

    def _short_head(self, data: bytes, offset: int) -> int:
        if len(data) >= offset + 9:
            (count,) = _U64.unpack_from(data, offset + 1)
            if count > MESSAGE_ENTRIES_MAX:
                raise CodecError(f"frame of {count} entries")
            if not self._term:
                raise CodecError("a frame that continues none")
            self._entries, self._left, self._bytes = [], count, 0
        return 9

    def _entry(self, data: bytes, offset: int) -> int:
        start = offset + 8
        end = start + _frame_size(data, offset)
        self_bytes = self._bytes + end - offset
        if self_bytes > RAFT_BODY_BYTES_MAX:
            raise CodecError(f"frame of {self_bytes} bytes")
        if end <= len(data):
            self._entries.append(decode_entry(data[start:end]))
            self._left -= 1
            self._bytes = self_bytes
        return end - offset

    def _commit(self, data: bytes, offset: int, found: List[Message]) -> int:
        if len(data) >= offset + 8:
            found.append(Message(
                MsgType.APP, to=self._local_id, sender=self._remote_id, term=self._term,
                log_term=self._term, index=self._index, entries=self._entries,
                commit=_U64.unpack_from(data, offset)[0],
            ))
            self._index += len(self._entries)
            self._entries, self._left = [], -1
        return 8

    def _full(self, data: bytes, offset: int, found: List[Message]) -> Generator[None, None, int]:
        start = offset + 9
        end = start + _frame_size(data, offset + 1)
        if end <= len(data):
            message = yield from decode_message_steps(data[start:end])
            entries = message.entries
            self._term = message.term
            self._index = entries[-1].index if entries else message.index
            found.append(message)
        return end - offset


# ============================================================================
# peer/streams -- The streams between two members: the one that this member dials and the one that it answers.
# ----------------------------------------------------------------------------
# A link may lose, repeat and reorder messages: Raft tolerates it.
# ============================================================================


def refusal_of(answer: Answer, context: LinkContext, member_id: int) -> str:
    """Return why the peer refused a request; log the reasons that an operator must remove."""
    text = text_of(answer.body).strip()
    if answer.status == 404:
        return f"remote member {member_id:x} could not recognize local member"
    if answer.status == 412 and text == "incompatible version":
        fault = f"ignored by peer {member_id:x} (server version incompatible)"
    elif answer.status == 412 and text in ("cluster ID mismatch", "clusterID mismatch"):
        theirs = answer.headers.get("x-etcd-cluster-id", "")
        fault = (
            f"ignored (cluster ID mismatch: remote[{member_id:x}]={theirs},"
            f" local={context.cluster_id}){FOREIGN_HINT}"
        )
    elif answer.status == 412 and text == ID_IN_USE:
        fault = (
            f"refused by peer {member_id:x}: another process uses our member"
            f" id {context.member_id:x}{DOUBLE_HINT}"
        )
    else:
        return f"unhandled http status {answer.status}"
    context.log_error(f"request sent was {fault}")
    return text


class StreamReader:
    """A stream from a peer, dialed by this member, and dialed again whenever it ends."""

    def __init__(
        self, context: LinkContext, member_id: int, kind: StreamKind, picker: UrlPicker,
        status: PeerStatus,
    ) -> None:
        self._context = context
        self._member_id = member_id
        self._kind = kind
        self._picker = picker
        self._status = status
        self._target = f"/raft/stream/{kind.path}/{context.member_id:x}"
        self._headers = {**context.headers, "X-Raft-To": f"{member_id:x}"}
        self._call: Optional[HttpCall] = None
        self._url = ""                              # that _call dialed
        self._answer = Answer()
        self._decoder: Optional[FrameDecoder] = None    # set while the stream is open
        self._unread_bytes = 0                      # received, in no message yet
        self._backoff = Backoff(STREAM_RETRY_SECONDS, STREAM_RETRY_SECONDS_MAX)
        self._retry = context.reactor.call_later(0.0, self._dial)

    def retry_soon(self) -> None:
        """Dial again without back-off: the peer has dialed this member, and so can be reached."""
        if self._call is None and self._retry.callback is not None:
            self._retry.cancel()
            self._backoff.reset()
            self._retry = self._context.reactor.call_later(STREAM_RETRY_SECONDS, self._dial)

    def stop(self) -> None:
        """Close the stream and dial no more."""
        self._retry.cancel()
        if self._call is not None:
            self._call.cancel()
            self._call = None

    def _dial(self) -> None:
        context = self._context
        self._decoder = None
        self._unread_bytes = 0
        self._answer = Answer()
        self._url = self._picker.pick()
        self._call = HttpCall(
            context.reactor, self._url, "GET", self._target, self._headers,
            connect_timeout_s=context.dial_timeout_s, idle_timeout_s=LINK_TIMEOUT_SECONDS,
            tls=context.tls, on_head=self._on_head, on_data=self._on_data, on_done=self._on_done,
        )

    def _on_head(self, status: int, headers: Dict[str, str]) -> None:
        self._answer.take_head(status, headers)
        version = headers.get("x-server-version", UNKNOWN_VERSION)
        if "x-server-version" in headers:
            self._status.version = version
        if status == 200 and (major_minor(version) or (0, 0)) >= _OLDEST_STREAM_VERSION:
            self._decoder = MessageDecoder() if self._kind is not APP_STREAM else AppV2Decoder(
                self._context.member_id, self._member_id)
            self._status.activate()

    def _on_data(self, data: bytes) -> None:
        call = self._call
        assert call is not None
        if self._decoder is None:
            self._answer.take_data(data)
            if len(self._answer.body) >= ANSWER_BYTES_MAX:
                call.cancel()
                self._on_done(None)
            return
        self._status.activate()
        self._unread_bytes += len(data)
        is_decoded = False

        def decoded(error: Optional[CodecError]) -> None:
            nonlocal is_decoded
            is_decoded = True
            if call is not self._call:
                return                              # the stream was closed meanwhile
            if error is None:
                self._backoff.reset()
                call.resume()
            else:
                call.cancel()
                self._on_done(error)

        self._context.decoding.add(self._receive(call, self._decoder.messages(data)), decoded)
        if not is_decoded:
            call.pause()                            # back-pressure, until all of it is decoded

    def _receive(
        self, call: HttpCall, messages: Iterator[Optional[Message]]
    ) -> Generator[None, None, Optional[CodecError]]:
        """Hand the messages on; return the error that makes the rest of the stream useless."""
        try:
            for message in messages:
                if message is not None:
                    size, self._unread_bytes = self._unread_bytes, 0
                    yield from self._context.receive(message, size)
                else:
                    yield
                if self._call is not call:
                    return None                     # closed, perhaps because of the message
        except CodecError as error:
            return error
        return None

    def _on_done(self, error: Optional[Exception]) -> None:
        self._call = None
        self._retry = self._context.reactor.call_later(self._backoff.next(), self._dial)
        if self._decoder is not None:
            self._status.deactivate("read", self._kind.title, error or "EOF")
            return
        self._picker.failed(self._url)
        if self._answer.status == 410:
            self._context.removed()
        reason = error or ("unsupported stream type" if self._answer.status == 200 else
                           refusal_of(self._answer, self._context, self._member_id))
        self._status.deactivate("dial", self._kind.title, reason)


class StreamWriter:
    """A stream to a peer, attached while the peer has dialed it."""

    PENDING_BYTES_MAX = OUTPUT_BYTES_MAX    # unsent; above: messages are dropped

    def __init__(
        self, context: LinkContext, member_id: int, kind: StreamKind, status: PeerStatus
    ) -> None:
        self._context = context
        self._member_id = member_id
        self._kind = kind
        self._status = status
        self._reply: Optional[StreamReply] = None
        self._encoder: Union[AppV2Encoder, MessageEncoder] = MessageEncoder()
        self._frames: List[bytes] = []      # since the last flush
        self._frames_bytes = 0
        self._unsent: List[Tuple[Message, int, float]] = []     # size; since when: monotonic
        self._congested = False             # messages are dropped until the peer reads on
        self._queued_bytes = 0              # given to the connection so far
        self._taken_bytes = 0               # of these, taken by the socket at the last heartbeat
        self._taken_at = 0.0                # last heartbeat at which that number had grown
        self._heartbeat: Optional[Timer] = None

    @property
    def attached(self) -> bool:
        return self._reply is not None

    def attach(self, reply: StreamReply, encoder: Union[AppV2Encoder, MessageEncoder]) -> None:
        """Use the stream that the peer has opened; it replaces the one before."""
        self.close()
        self._reply = reply
        self._encoder = encoder
        self._queued_bytes, self._taken_bytes = reply.pending, 0    # so far the reply's head
        self._taken_at = self._context.reactor.now()
        reply.on_close = lambda: self._lost("closed by the peer")
        self._status.activate()
        self._heartbeat = self._context.reactor.every(LINK_HEARTBEAT_SECONDS, self._beat)
        self._beat()

    def close(self) -> None:
        reply, self._reply = self._reply, None
        self._frames, self._frames_bytes = [], 0
        self._congested = False
        self._report(ok=False)
        if self._heartbeat is not None:
            self._heartbeat.cancel()
        if reply is not None:
            reply.abort()

    def offer(self, message: Message) -> bool:
        """Queue a message until flush(); False: it is dropped, as the peer reads too slowly."""
        reply = self._reply
        if reply is None:
            return False
        if self._is_congested(reply):
            self._context.sent(Sent(self._member_id, self._kind.channel, message, 0, 0.0, False))
            return False
        parts = self._encoder.encode(message)
        size = sum(map(len, parts))
        self._frames += parts
        self._frames_bytes += size
        self._unsent.append((message, size, self._context.reactor.now()))
        return True

    def flush(self) -> None:
        """Write the frames queued since the last flush as one piece."""
        frames = self._frames
        if frames:
            self._frames, self._frames_bytes = [], 0
            self._write(*joined_parts(frames) if len(frames) > 1 else frames)
            if self._reply is not None:
                self._reply.when_read(self._report)

    def _report(self, *, ok: bool = True) -> None:
        """Report the messages as sent, since the socket has taken them; not ok: as lost."""
        unsent, self._unsent = self._unsent, []
        now = self._context.reactor.now()
        for message, size, since in unsent:
            self._context.sent(
                Sent(self._member_id, self._kind.channel, message, size, now - since, ok))

    def _is_congested(self, reply: StreamReply) -> bool:
        if reply.pending + self._frames_bytes <= self.PENDING_BYTES_MAX:
            self._congested = False
            return False
        if not self._congested:
            self._congested = True
            package_logger("rafthttp").warning(
                "dropped messages to %x: it reads too slowly from %s (overloaded network?)",
                self._member_id, self._kind.title,
            )
            self._context.unreachable(self._member_id)
        return True

    def _write(self, data: bytes, *more: bytes) -> None:
        reply = self._reply
        if reply is not None:
            before = reply.pending
            reply.write(data, more)
            self._queued_bytes += reply.pending - before

    def _beat(self) -> None:
        """Send a heartbeat, or give the stream up when the peer has taken nothing for 5 s."""
        reply = self._reply
        if reply is None:
            return
        now = self._context.reactor.now()
        taken = self._queued_bytes - reply.pending
        if taken != self._taken_bytes or not reply.pending:
            self._taken_bytes, self._taken_at = taken, now
        if now - self._taken_at > LINK_TIMEOUT_SECONDS:
            self._lost("i/o timeout")
        elif reply.pending <= self.PENDING_BYTES_MAX:
            self._write(self._encoder.heartbeat)

    def _lost(self, reason: str) -> None:
        self.close()
        self._status.deactivate("write", self._kind.title, reason)
        self._context.unreachable(self._member_id)


# ============================================================================
# peer/links -- A peer as the sum of its links: streams, pipeline, prober.
# ============================================================================


class PeerPost:
    """One message on its way by POST.

    database  of a snapshot in the form of 3.x: a length, the message, the database; None: /raft
    """

    def __init__(self, message: Message, database: Optional[bytes]) -> None:
        self.message = message
        self.body = encode_message_parts(message)       # in pieces
        self.target, self.content_type = "/raft", "application/protobuf"
        if database is not None:
            self.target, self.content_type = "/raft/snapshot", "application/octet-stream"
            self.body = [_U64.pack(sum(map(len, self.body))), *self.body, database]
        self.size = sum(map(len, self.body))
        self.url = ""
        self.started = 0.0
        self.call: Optional[HttpCall] = None
        self.is_snapshot = message.type == MsgType.SNAP     # its outcome is reported


class Pipeline:
    """Messages to a member by POST: of a peer without streams, and all snapshots."""

    def __init__(
        self, context: LinkContext, member_id: int, picker: UrlPicker, status: PeerStatus
    ) -> None:
        self.picker = picker
        self._context = context
        self._member_id = member_id
        self._status = status
        self._waiting: Deque[PeerPost] = collections.deque()
        self._under_way: Set[PeerPost] = set()
        self._congested = False

    def offer(self, message: Message) -> None:
        """Send, queue or drop a message; a drop is reported."""
        size = sum(post.size for post in self._waiting)
        if len(self._waiting) >= PIPELINE_QUEUE_MESSAGES_MAX or size > PIPELINE_QUEUE_BYTES_MAX:
            self._drop(message)
            return
        self._congested = False
        self._waiting.append(PeerPost(message, self._database_for(message)))
        self._send_waiting()

    def _database_for(self, message: Message) -> Optional[bytes]:
        """Return the database that a member of 3.x needs beside a snapshot; it exits without one.

        2.3 takes a snapshot in both forms.
        """
        version = self._status.version or self._context.identity.server
        if message.snapshot is None or (major_minor(version) or (0, 0)) < FIRST_V3_VERSION:
            return None
        return self._context.inspector.empty_database(message.snapshot.index)

    def stop(self) -> None:
        """Drop the waiting messages and cancel the calls; a snapshot counts as failed."""
        posts = [*self._under_way, *self._waiting]
        self._waiting.clear()
        self._under_way.clear()
        for post in posts:
            if post.call is not None:
                post.call.cancel()
            if post.is_snapshot:
                self._context.snapshot_done(self._member_id, False)

    def _drop(self, message: Message) -> None:
        self._context.sent(Sent(self._member_id, _PIPELINE, message, 0, 0.0, False))
        if not self._congested:
            self._congested = True
            package_logger("rafthttp").warning(
                "dropped messages to %x: too many wait for the pipeline", self._member_id
            )
            self._context.unreachable(self._member_id)
        if message.type == MsgType.SNAP:
            self._context.snapshot_done(self._member_id, False)

    def _send_waiting(self) -> None:
        while self._waiting and len(self._under_way) < PIPELINE_WORKERS:
            post = self._waiting.popleft()
            self._under_way.add(post)
            self._send(post)

    def _send(self, post: PeerPost) -> None:
        context = self._context
        post.url = self.picker.pick()
        post.started = context.reactor.now()

        def done(error: Optional[Exception], answer: Answer) -> None:
            self._answered(post, error, answer)

        post.call = fetch(
            context.reactor, post.url, post.target, done, method="POST", body=post.body,
            headers={**context.headers, "Content-Type": post.content_type}, tls=context.tls,
            connect_timeout_s=context.dial_timeout_s,
            # The answer to a snapshot comes after all of it was sent, over a slow line perhaps.
            idle_timeout_s=REQUEST_SECONDS_MAX if post.is_snapshot else LINK_TIMEOUT_SECONDS,
        )

    def _answered(self, post: PeerPost, error: Optional[Exception], answer: Answer) -> None:
        context = self._context
        self._under_way.discard(post)
        ok = error is None and answer.status == 204
        elapsed_s = context.reactor.now() - post.started
        context.sent(Sent(self._member_id, _PIPELINE, post.message, post.size, elapsed_s, ok))
        if ok:
            self._status.activate()
        else:
            if answer.status == 403:
                context.removed()
            reason = error or refusal_of(answer, context, self._member_id)
            self.picker.failed(post.url)
            self._status.deactivate("write", _PIPELINE, reason)
            context.unreachable(self._member_id)
        if post.is_snapshot:
            context.snapshot_done(self._member_id, ok)
        self._send_waiting()


class Prober:
    """Asks a peer for its time every 4 s, and warns every 30 s if something is wrong.

    Source: etcd 2.3 rafthttp/probing_status.go.
    """

    def __init__(self, context: LinkContext, member_id: int, picker: UrlPicker) -> None:
        self._context = context
        self._member_id = member_id
        self._picker = picker
        self._call: Optional[HttpCall] = None
        self._warn_at = context.reactor.now() + REPEAT_SECONDS
        self._timer = context.reactor.every(PROBE_SECONDS, self._probe)

    def stop(self) -> None:
        self._timer.cancel()
        if self._call is not None:
            self._call.cancel()

    def _probe(self) -> None:
        context, asked_at = self._context, self._context.reactor.now()
        if self._call is not None and not self._call.ended:
            return

        def done(error: Optional[Exception], answer: Answer) -> None:
            self._probed(asked_at, None if error else _probed_time(answer))

        self._call = fetch(
            context.reactor, self._picker.pick(), "/raft/probing", done, tls=context.tls,
            connect_timeout_s=PROBE_SECONDS, idle_timeout_s=PROBE_SECONDS,
        )

    def _probed(self, asked_at: float, theirs_ns: Optional[int]) -> None:
        reactor = self._context.reactor
        elapsed_s = reactor.now() - asked_at
        if theirs_ns is None:
            self._warn("the connection to peer %x is unhealthy", self._member_id)
            return
        self._context.round_trip(self._member_id, elapsed_s)
        difference_ns = reactor.wall_ns() - int(elapsed_s * NS) // 2 - theirs_ns
        if abs(difference_ns) > CLOCK_DIFFERENCE_MAX_NS:
            sign = "-" if difference_ns < 0 else ""
            self._warn(
                "the clock difference against peer %x is too high [%s > 1s]", self._member_id,
                sign + format_duration(abs(difference_ns) / NS),
            )

    def _warn(self, text: str, *args: object) -> None:
        now = self._context.reactor.now()
        if now >= self._warn_at:
            self._warn_at = now + REPEAT_SECONDS
            package_logger("rafthttp").warning(text, *args)


_PROBED_NOW = re.compile(rb'"Now"\s*:\s*"([0-9TZ:.+-]{1,64})"')


def _probed_time(answer: Answer) -> Optional[int]:
    """Return the peer's clock in unix ns; None: it is not the answer of a healthy peer."""
    match = _PROBED_NOW.search(answer.body)
    if answer.status != 200 or match is None:
        return None
    try:
        return parse_time(match.group(1).decode("ascii"))
    except ValueError:
        return None


class Peer:
    """Another member: two streams each way, the pipeline, and the prober."""

    def __init__(
        self, context: LinkContext, member_id: int, urls: Iterable[str], lists: EntryListEncoder
    ) -> None:
        self.picker = UrlPicker(urls)
        self.status = PeerStatus(member_id, context.reactor.wall_ns)
        self._id = member_id
        self._advertised = ""           # peer URLs, by the process that dialed the streams
        self._context = context
        self._lists = lists
        self._app_writer = StreamWriter(context, member_id, APP_STREAM, self.status)
        self._message_writer = StreamWriter(context, member_id, MESSAGE_STREAM, self.status)
        self._pipeline = Pipeline(context, member_id, self.picker, self.status)
        self._readers = [
            StreamReader(context, member_id, kind, self.picker, self.status)
            for kind in (APP_STREAM, MESSAGE_STREAM)
        ]
        self._prober = Prober(context, member_id, self.picker)

    def offer(self, message: Message) -> None:
        """Send by the channel that fits, or drop and report; complete with flush()."""
        if message.type == MsgType.SNAP:
            self._offer_snapshot(message)
        elif message.type == MsgType.APP and self._app_writer.attached:
            self._app_writer.offer(message)
        elif self._message_writer.attached:
            self._message_writer.offer(message)
        else:
            self._pipeline.offer(message)

    def flush(self) -> None:
        """Write the offered messages."""
        self._app_writer.flush()
        self._message_writer.flush()

    def other_process(self, advertised: str) -> str:
        """Return the peer URLs of another process that has this peer's streams, or "".

        advertised  the peer URLs of a process that sends as this peer

        Each of the two may hold entries that the other lacks, and each would count for both.  A
        process with the URLs that the cluster knows is accepted: the peer has moved, and the
        streams are those of its old place.  Differs from etcd, where streams of one process
        replace those of the other in turn.
        """
        is_attached = self._app_writer.attached or self._message_writer.attached
        is_right = sorted(advertised.split(",")) == self.picker.urls
        return "" if is_right or advertised == self._advertised or not is_attached else (
            self._advertised
        )

    def attach(self, kind: StreamKind, reply: StreamReply, advertised: str) -> None:
        """Use a stream that the peer has dialed."""
        self._advertised = advertised
        for reader in self._readers:
            reader.retry_soon()
        if kind is APP_STREAM:
            self._app_writer.attach(reply, AppV2Encoder(self._lists))
        else:
            self._message_writer.attach(reply, MessageEncoder())

    def stop(self) -> None:
        for reader in self._readers:
            reader.stop()
        self._app_writer.close()
        self._message_writer.close()
        self._pipeline.stop()
        self._prober.stop()

    def _offer_snapshot(self, message: Message) -> None:
        """Send a snapshot, unless the receiver would lose data by the empty database in it."""
        if not self._context.inspector.needs_v3_data(self._id):
            self._pipeline.offer(message)
            return
        self._context.log_error(
            f"cannot send a snapshot to {self._id:x}: the cluster holds data of etcd's v3 API,"
            " which this member does not keep; a member of etcd 3 must lead to send it: restart"
            " this member, and others of pyetcd, until one does"
        )
        self._context.unreachable(self._id)
        self._context.snapshot_done(self._id, False)


# ============================================================================
# peer/transport -- The transport: the links to all peers, and the paths below /raft of the peer listener.
# ============================================================================


REMOTES_MAX = 256                   # members remembered that are no peers; above: ignored


class Transport:
    """The links to all other members, and the paths below /raft of the peer listener.

    deliver        (message) of a peer; may call the transport
    unreachable    (member id) after the loss of messages to it
    snapshot_done  (member id, ok) of the receiver of a snapshot
    removed        () once, a second after a peer says that the cluster has removed this member
    sent           (Sent) for every message to a peer, when its fate is known
    received       (sender, message, bytes), before deliver
    round_trip     (member id, seconds) of every probe that a peer has answered
    inspector      looks at every message before it is delivered
    `drop`, if set, loses the messages, sent and received, for which it returns true.
    The reactor calls the first three, outside of offer().  Thread: reactor.
    """

    def __init__(
        self, reactor: Reactor, *, member_id: int, cluster_id: int, peer_urls: Sequence[str],
        is_removed: Callable[[int], bool], deliver: Callable[[Message], None],
        unreachable: Callable[[int], None], snapshot_done: Callable[[int, bool], None],
        removed: Callable[[], None], election_s: float,
        sent: Callable[[Sent], None] = _ignore,
        received: Callable[[int, Message, int], None] = _ignore,
        round_trip: Callable[[int, float], None] = _ignore,
        tls: Optional[TlsContext] = None, inspector: Optional[MessageInspector] = None,
        identity: Identity = DEFAULT_IDENTITY,
    ) -> None:
        self.drop: Optional[Callable[[Message], bool]] = None
        self._reactor = reactor
        self._member_id = member_id
        self._cluster_id = f"{cluster_id:x}"
        self._identity = identity
        self._is_removed = is_removed
        self._deliver = deliver
        self._removed: Optional[Callable[[], None]] = removed
        self._received = received
        self._inspector = inspector or MessageInspector()
        self._decoding = SlicedWork(reactor)
        self._is_reading_snapshot = False   # one after the other
        self._spools: weakref.WeakSet[IO[bytes]] = weakref.WeakSet()    # snapshots that arrive
        self._log = ThrottledLog("rafthttp", reactor.now)
        self._lists = EntryListEncoder()
        self._peers: Dict[int, Peer] = {}
        self._remotes: Dict[int, Pipeline] = {}     # to members that are no peers yet
        self._stopped = False
        self._routes: Dict[str, Tuple[str, Callable[[HttpRequest], None]]] = {
            "/raft": ("POST", self._handle_post), "/raft/snapshot": ("POST", self._handle_post),
            "/raft/stream/": ("GET", self._handle_stream),
            "/raft/stream": ("", self._redirect_stream),
            "/raft/probing": ("", self._handle_probing),
        }
        self._context = LinkContext(
            reactor, member_id, self._cluster_id, self._request_headers(peer_urls),
            1.0 + election_s / 5, self._log.error, self._receive,
            lambda to: self._report_soon(unreachable, to),
            lambda to, ok: self._report_soon(snapshot_done, to, ok), self._report_removal, sent,
            round_trip, tls, self._decoding, self._inspector, identity,
        )

    # -- members -----------------------------------------------------------

    def add_peer(self, member_id: int, urls: Iterable[str]) -> None:
        """Open the links to a member; a known one gets new URLs."""
        if member_id in self._peers:
            self.update_peer(member_id, urls)
        elif not self._stopped:
            self._peers[member_id] = Peer(self._context, member_id, urls, self._lists)

    def add_remote(self, member_id: int, urls: Iterable[str]) -> None:
        """Answer a member by POST while it is no peer yet: its addition is not applied here."""
        if member_id in (0, self._member_id) or member_id in self._peers or self._stopped:
            return
        if member_id in self._remotes:
            self._remotes[member_id].picker.update(urls)
        elif len(self._remotes) < REMOTES_MAX:
            status = PeerStatus(member_id, self._reactor.wall_ns)
            self._remotes[member_id] = Pipeline(
                self._context, member_id, UrlPicker(urls), status)

    def update_peer(self, member_id: int, urls: Iterable[str]) -> None:
        """Use other URLs for a member; unknown ids are ignored."""
        peer = self._peers.get(member_id)
        if peer is not None:
            peer.picker.update(urls)

    def remove_peer(self, member_id: int) -> None:
        """Close the links to a member; unknown ids are ignored."""
        for link in (self._peers.pop(member_id, None), self._remotes.pop(member_id, None)):
            if link is not None:
                link.stop()

    def remove_all(self) -> None:
        """Close the links to all peers; remotes stay."""
        while self._peers:
            self._peers.popitem()[1].stop()

    def active_since(self, member_id: int) -> float:
        """Return since when a peer can be reached, in unix seconds; 0: it cannot."""
        peer = self._peers.get(member_id)
        return peer.status.active_since if peer is not None else 0.0

    def stop(self) -> None:
        """Close all links; no callback comes any more."""
        self._stopped = True
        self.remove_all()
        while self._remotes:
            self._remotes.popitem()[1].stop()

    # -- sending -----------------------------------------------------------

    def offer(self, messages: Iterable[Message]) -> None:
        """Send messages, or drop them: to unknown ids silently, to slow peers with a report.

        Never blocks.  The messages are encoded before it returns.
        """
        for message in messages:
            to = message.to
            link = self._peers.get(to) or self._remotes.get(to)
            if link is None or self.drop is not None and self.drop(message):
                continue
            link.offer(message)
        for peer in self._peers.values():
            peer.flush()
        self._lists.forget()

    def _report_soon(self, report: Callable[..., None], *args: Any) -> None:
        """Report in this turn, but outside of the call, which may come from Raft itself."""
        self._reactor.call_soon(self._report, report, *args)

    def _report(self, report: Callable[..., None], *args: Any) -> None:
        if not self._stopped:
            report(*args)

    def _report_removal(self) -> None:
        """Wait before the report: the entry may be on its way to our disk, a reply to a client."""
        removed, self._removed = self._removed, None
        if removed is not None:
            self._reactor.call_later(REMOVED_SECONDS, self._report, removed)

    def _request_headers(self, peer_urls: Sequence[str]) -> Dict[str, str]:
        return {
            "X-Etcd-Cluster-Id": self._cluster_id,
            "X-Min-Cluster-Version": self._identity.min_cluster,
            "X-Peerurls": ",".join(peer_urls),
            "X-Server-From": f"{self._member_id:x}",
            "X-Server-Version": self._identity.server,
        }

    # -- receiving ---------------------------------------------------------

    def handle(self, request: HttpRequest) -> bool:
        """Answer a request of the peer listener; False: its path is not below /raft."""
        is_stream = request.path.startswith("/raft/stream/")
        route = self._routes.get("/raft/stream/" if is_stream else request.path)
        if route is None:
            return False
        method, handle = route
        if self._stopped:
            _reply_error(request, 503, "etcdserver: server stopped")
        elif method and request.method != method:
            _reply_error(request, 405, "Method Not Allowed", f"Allow: {method}\r\n")
        elif not method or self._is_compatible(request):
            handle(request)
        return True

    def guard(self, listener: Listener, directory: str) -> None:
        """Make a listener read only the bodies that members may send, up to the limits.

        directory  for snapshots until they are complete
        """
        listener.body_limit = self._body_max
        listener.memory_max = RAFT_BODY_BYTES_MAX
        listener.held_max = PEER_BODIES_BYTES_MAX
        listener.open_spool = functools.partial(self._open_spool, directory)

    def _open_spool(self, directory: str, first: bytes) -> Optional[IO[bytes]]:
        """Return a file for a large body that begins with `first`; None: refuse it.

        Only snapshots may be so large, and few at a time.
        """
        is_snapshot = _SNAPSHOT_START in (first[:2], first[8:10])
        if not is_snapshot or len(self._spools) >= _SPOOLS_MAX:
            return None
        try:
            file = tempfile.TemporaryFile(dir=directory)
        except OSError as error:
            self._log.error(f"cannot keep a snapshot that a peer sends: {error}")
            return None
        self._spools.add(file)
        return file

    def _body_max(self, head: HttpHead) -> int:
        """Return how long a body behind this head may be: members may send the most."""
        if head.method != "POST" or head.path not in ("/raft", "/raft/snapshot"):
            return 0
        sender = _parse_id(head.headers.get("x-server-from", "")) or 0
        theirs = head.headers.get("x-etcd-cluster-id", "")
        if (theirs != self._cluster_id or self._is_removed(sender) or self._stopped
                or self._identity.refusal(head.headers)):
            return 0
        is_known = sender in self._peers or sender in self._remotes
        return PEER_BODY_BYTES_MAX if is_known else _UNKNOWN_BODY_BYTES_MAX

    def _receive(self, message: Message, size: int) -> Generator[None, None, int]:
        """Check and deliver a message, in steps; return the HTTP status of the outcome.

        A removed member may not know it yet, and must not disturb the others.
        """
        if message.to != self._member_id or self._is_removed(message.sender):
            return 500
        if message.type == MsgType.SNAP and message.snapshot is None:
            return 500
        fault = yield from self._inspector.inspect(message)
        if fault:
            name = "Msg" + MsgType(message.type).name.title().replace("_", "")
            self._log.error(f"refused a {name} of {message.sender:x}: {fault}")
            return 400
        if not self._stopped and (self.drop is None or not self.drop(message)):
            self._received(message.sender, message, size)
            self._deliver(message)
        return 204

    def _handle_stream(self, request: HttpRequest) -> None:
        """GET /raft/stream/<kind>/<dialer>: answer with all messages to the dialer."""
        directory, _, name = request.path.rpartition("/")
        kind = STREAM_KINDS.get(directory[len("/raft/stream/"):])
        dialer = _parse_id(name)
        if kind is None or dialer is None:
            self._refuse(request, 404, "invalid path" if kind is None else "invalid from")
        elif self._is_removed(dialer):
            package_logger("rafthttp").warning(
                "rejected the stream from peer %x since it was removed", dialer
            )
            self._refuse(request, 410, "removed member")
        elif dialer not in self._peers:
            self._remember_sender(request, dialer)
            self._refuse(
                request, 404, "error sender not found",
                f"failed to find remote peer {dialer:x} in cluster {self._cluster_id}",
            )
        elif request.headers.get("x-raft-to", "") != f"{self._member_id:x}":
            self._refuse(
                request, 412, "to field mismatch",
                f"streaming request ignored (ID mismatch got {request.headers.get('x-raft-to')}"
                f" want {self._member_id:x}); our peer URL is that of another member: if it was not"
                " moved, this process was started with a wrong -data-dir",
            )
        else:
            advertised = request.headers.get("x-peerurls", "")
            stream = request.start_stream(200, None, self._headers_for(request))
            self._peers[dialer].attach(kind, stream, advertised)

    def _handle_post(self, request: HttpRequest) -> None:
        """POST /raft: one message.  POST /raft/snapshot: the form of 3.x for a snapshot."""
        self._remember_sender(request, _parse_id(request.headers.get("x-server-from", "")))
        is_framed = request.path == "/raft/snapshot"
        is_long = request.body_file is not None or request.body.startswith(_SNAPSHOT_START)
        if request.body_too_large:
            self._refuse(
                request, 413, "error reading raft message",
                f"refused a message from {request.remote}: its sender is not known here, or it is"
                " too large",
            )
        elif is_framed or is_long:
            self._read_snapshot(request, is_framed=is_framed)
        else:
            steps = self._receive_body(memoryview(request.body))
            self._decoding.add(steps, lambda status: self._answer(request, status))

    def _receive_body(self, body: memoryview) -> Generator[None, None, int]:
        """Decode and receive one message; return the status for its sender."""
        try:
            message = yield from decode_message_steps(body)
        except CodecError as error:
            self._log.error(f"failed to unmarshal raft message ({error})")
            return 422
        if self._is_removed(message.sender):
            return 403
        return (yield from self._receive(message, len(body)))

    def _answer(self, request: HttpRequest, status: int) -> None:
        if status == 204:
            request.reply(204, headers=self._headers_for(request))
        elif status == 403:
            text = b'{"message":"cannot process message from removed member"}'
            request.reply(403, text, headers=self._headers_for(request))
        elif status == 422:
            self._refuse(request, 400, "error unmarshaling raft message")
        else:
            self._refuse(request, status, "error processing raft message")

    def _headers_for(self, request: HttpRequest) -> str:
        is_stream = request.path.startswith("/raft/stream/")
        version = f"X-Server-Version: {self._identity.server}\r\n" if is_stream else ""
        return f"X-Etcd-Cluster-Id: {self._cluster_id}\r\n{version}"

    def _refuse(self, request: HttpRequest, status: int, text: str, why: str = "") -> None:
        """Answer with an error; log `why` for the operator."""
        if why:
            self._log.error(why)
        _reply_error(request, status, text, self._headers_for(request))

    def _read_snapshot(self, request: HttpRequest, *, is_framed: bool) -> None:
        """Read a posted snapshot on a thread: it is checked before any of it is written."""
        if self._is_reading_snapshot:
            self._refuse(request, 503, "another snapshot is being read")
            return
        self._is_reading_snapshot = True

        def done(error: Optional[BaseException], found: Any) -> None:
            self._is_reading_snapshot = False
            if error is not None:
                why = f"refused a snapshot from {request.remote}: {error}"
                self._refuse(request, 400, str(error), why)
                return
            message, has_v3_data = found
            if has_v3_data:
                self._inspector.note_v3_data()
            if self._is_removed(message.sender):
                self._answer(request, 403)
            else:
                steps = self._receive(message, size)
                self._decoding.add(steps, lambda status: self._answer(request, status))

        body, size = request.body_file or request.body, len(request.body)
        self._reactor.run_blocking(
            _posted_snapshot, body, self._inspector, is_framed, kind=FILE_WORK,
            done=done)

    def _handle_probing(self, request: HttpRequest) -> None:
        now = format_time(self._reactor.wall_ns())
        request.reply(200, b'{"OK":true,"Now":"%b"}\n' % now.encode(), "text/plain; charset=utf-8")

    @staticmethod
    def _redirect_stream(request: HttpRequest) -> None:
        request.reply(
            301, b'<a href="/raft/stream/">Moved Permanently</a>.\n\n',
            "text/html; charset=utf-8", "Location: /raft/stream/\r\n",
        )

    def _is_compatible(self, request: HttpRequest) -> bool:
        """Check versions, cluster and id, in this order; refuse at the first fault."""
        headers = request.headers
        fault = self._identity.refusal(headers)
        theirs, advertised = headers.get("x-etcd-cluster-id", ""), headers.get("x-peerurls", "")
        id = _parse_id(headers.get("x-server-from", "")) or 0
        other = self._other_process(id, advertised)
        if fault:
            self._refuse(
                request, 412, "incompatible version", f"request version incompatibility ({fault})")
        elif theirs != self._cluster_id:
            self._refuse(
                request, 412, "cluster ID mismatch",
                f"request cluster ID mismatch (got {theirs} want {self._cluster_id}){FOREIGN_HINT}",
            )
        elif other:
            self._refuse(
                request, 412, ID_IN_USE,
                f"two processes use member id {id:x}, with the peer URLs [{other}] and"
                f" [{advertised}]{DOUBLE_HINT}",
            )
        else:
            if id in self._peers:
                self._peers[id].status.version = headers.get("x-server-version", "")
            return True
        return False

    def _other_process(self, id: int, advertised: str) -> str:
        """Return the peer URLs of another process with this id, perhaps of this one, or ""."""
        if id in self._peers:
            return self._peers[id].other_process(advertised)
        return self._context.headers["X-Peerurls"] if id == self._member_id else ""

    def _remember_sender(self, request: HttpRequest, sender: Optional[int]) -> None:
        """Note the peer URLs of a member that is not known here yet, to answer it."""
        urls = request.headers.get("x-peerurls", "")
        if not urls or sender is None or sender in self._remotes or self._is_removed(sender):
            return
        with contextlib.suppress(ValueError):
            self.add_remote(sender, parse_urls(urls))


_SPOOLS_MAX = 2                     # snapshots that arrive at a time; above: 413
_UNKNOWN_BODY_BYTES_MAX = 1 << 16   # of a sender that is not known here; above: 413
_SNAPSHOT_START = b"\x08%c" % MsgType.SNAP      # of an encoded MsgSnap


def _posted_snapshot(
    body: Union[bytes, IO[bytes]], inspector: MessageInspector, is_framed: bool
) -> Tuple[Message, bool]:
    """Return the MsgSnap in a POST, with its store state, and whether it comes with v3 data.

    is_framed  the form of 3.x: a length, the message, and a database, which is not kept

    Raises CodecError, OSError.
    """
    with io.BytesIO(body) if isinstance(body, bytes) else body as file:
        file.seek(0)
        head, size = file.read(8) if is_framed else b"", PEER_BODY_BYTES_MAX
        if len(head) == 8:
            (size,) = _U64.unpack(head)
        try:
            if size > PEER_BODY_BYTES_MAX:
                raise CodecError(f"frame of {size} bytes")
            data = file.read(size)
            if is_framed and (len(head) < 8 or not size or len(data) < size):
                raise CodecError("unexpected EOF")
            message = decode_message(data)
        except CodecError as error:
            raise CodecError(f"failed to decode raft message ({error})") from None
        has_v3_data = is_framed and inspector.has_v3_data(file)
    if message.type != MsgType.SNAP:
        raise CodecError("wrong raft message type")
    snapshot = message.snapshot
    if snapshot is not None:
        try:
            message.snapshot = snapshot._replace(state=inspector.read_state(snapshot.data))
        except ValueError as error:
            raise CodecError(f"not a snapshot that this member can take: {error}") from None
    return message, has_v3_data


def _reply_error(request: HttpRequest, status: int, text: str, headers: str = "") -> None:
    """Answer as Go's http.Error does."""
    request.reply(
        status, text.encode("latin-1", "replace") + b"\n", "text/plain; charset=utf-8",
        headers + "X-Content-Type-Options: nosniff\r\n",
    )


# ============================================================================
# member/cluster -- The cluster: its members, which stand in the store below /0, as in etcd.
# ============================================================================


SERVER_LOG = package_logger("etcdserver")

_KNOWN_CHANGES = frozenset(map(int, ConfChangeType))
FEATURE_PRE_VOTE = "prevote"        # answers MsgPreVote (3.x)
FEATURE_READ_INDEX = "readindex"    # answers MsgReadIndex, returns the context of heartbeats
FEATURES = (FEATURE_PRE_VOTE, FEATURE_READ_INDEX)   # that this program publishes


class Member(NamedTuple):
    """One member as the cluster knows it; peer_urls are sorted."""

    id: int
    peer_urls: Tuple[str, ...]
    name: str = ""                      # "" until it has published itself
    client_urls: Tuple[str, ...] = ()
    features: Tuple[str, ...] = ()      # beyond etcd 2.3; published, and ignored by etcd
    is_learner: bool = False            # of etcd 3.4: gets the log, and has no vote yet

    @property
    def started(self) -> bool:
        """True once the member has published its name."""
        return bool(self.name)

    def context_json(self) -> str:
        """Return the JSON of conf changes and of the peers' /members: decimal id, no empty part."""
        fields: Dict[str, object] = {"id": self.id, "peerURLs": self.peer_urls}
        if self.name:
            fields["name"] = self.name
        if self.client_urls:
            fields["clientURLs"] = self.client_urls
        return json_text(fields)

    def client_json(self) -> str:
        """Return the JSON of /v2/members: hexadecimal id, all parts."""
        return json_text({
            "id": format_id(self.id), "name": self.name, "peerURLs": self.peer_urls,
            "clientURLs": self.client_urls,
        })

    def attributes_json(self) -> str:
        fields = {"name": self.name, "clientURLs": self.client_urls}
        if self.features:
            fields["features"] = self.features
        return json_text(fields)

    def raft_attributes_json(self) -> str:
        learner = {"isLearner": True} if self.is_learner else {}
        return json_text({"peerURLs": self.peer_urls, **learner})


def format_id(id: int) -> str:
    """Return the hexadecimal text of a member or cluster id, not padded, as in etcd."""
    return f"{id:x}"


def _hash_id(data: bytes) -> int:
    return int.from_bytes(hashlib.sha1(data).digest()[:8], "big")


def member_id(peer_urls: Iterable[str], token: str, unix_s: Optional[int] = None) -> int:
    """Return the id of a member: SHA-1 of its peer URLs and the cluster token.

    With `discovery` the token is the whole discovery URL.  unix_s: the time when a member is
    added at run time; the token is empty then.  Source: etcd 2.3 etcdserver/member.go.
    """
    time_text = "" if unix_s is None else str(unix_s)
    return _hash_id(utf8("".join(sorted(peer_urls)) + token + time_text))


def cluster_id(member_ids: Iterable[int]) -> int:
    """Return the id of a cluster: SHA-1 of its initial members' ids, ascending."""
    return _hash_id(b"".join(id.to_bytes(8, "big") for id in sorted(member_ids)))


def parse_initial_cluster(text: str, *, nameless: bool = False) -> Dict[str, Tuple[str, ...]]:
    """Return name -> sorted peer URLs of `name=url,name=url`; a name may repeat.

    nameless  take `=url` too: a member of a running cluster has no name before its first start.
              Each gets `=url` for a name, which no member can have

    Raises ValueError with etcd's words.
    """
    urls: Dict[str, List[str]] = {}
    for piece in filter(None, (part.strip() for part in text.split(","))):
        name, _, url = piece.partition("=")
        if not url:
            raise ValueError(f"Empty URL given for {go_quote(name)} in {piece!r}: write name=url")
        if not name and not nameless:
            raise ValueError(f"Empty name given for {url} in {piece!r}: write name=url; perhaps a"
                             f" variable was empty")
        urls.setdefault(name or piece, []).append(check_url(url))
    return {name: tuple(sorted(found)) for name, found in urls.items()}


def format_initial_cluster(initial: Mapping[str, Iterable[str]]) -> str:
    """Return the text form: all name=url pairs sorted, joined by commas."""
    return ",".join(sorted(
        f"{name.partition('=')[0]}={url}" for name, urls in initial.items() for url in urls
    ))


class Cluster:
    """The members, kept below /0 of the store, where every member has the same ones.

    Changed only by applied entries and by snapshots.  Until the first of them, the members are
    those of the flags.  Thread: reactor.  Source: etcd 2.3 etcdserver/cluster.go.
    """

    def __init__(self, token: str = "", store: Optional[Store] = None) -> None:
        self.token = token
        self.id = 0
        self.local_id = 0                           # the log calls it "local member"
        self.members: Dict[int, Member] = {}
        self.removed: Set[int] = set()              # ids that can never come back
        self.version: Optional[str] = None          # "2.3.0"; None: not decided yet
        self.identity = DEFAULT_IDENTITY            # of this member; set before it starts
        self.v3_mark = V3Mark()                     # of data that this member does not keep
        self.was_lowered = False                    # the version: snapshots must be newer
        self._store = store

    @classmethod
    def from_initial(cls, token: str, initial: Mapping[str, Iterable[str]]) -> Cluster:
        """Return a new cluster of the members in `initial`.  Raises ValueError if ids collide."""
        cluster = cls(token)
        for name, urls in initial.items():
            id = member_id(urls, token)
            if id in cluster.members or not id:
                raise ValueError(f"member exists with identical ID {format_id(id)}")
            cluster.members[id] = Member(id, tuple(sorted(urls)), name)
        cluster.id = cluster_id(cluster.members)
        return cluster

    def set_store(self, store: Store) -> None:
        """Let changes go to `store`."""
        self._store = store

    @property
    def store(self) -> Store:
        if self._store is None:
            raise InvariantError("a cluster without a store cannot change")
        return self._store

    def recover(self) -> None:
        """Read everything from the store again: a snapshot has replaced it."""
        store = self.store
        self.members = {}
        for name in self._ids("/0/members"):
            member = self._read_member(name)
            self.members[member.id] = member
        self.removed = {int(name, 16) for name in self._ids("/0/removed_members")}
        self.version = store.value("/0/version")
        if self.version:
            self._check_version(self.version)
        for member in sorted(self.members.values()):
            SERVER_LOG.info(
                "added %smember %s [%s] to cluster %s from store", self._local(member.id),
                format_id(member.id), " ".join(member.peer_urls), format_id(self.id),
            )
        if self.version:
            SERVER_LOG.info(
                "set the cluster version to %s from store", self.version.rpartition(".")[0]
            )

    def _ids(self, path: str) -> List[str]:
        """Return the names below `path` that are ids; no others belong there."""
        children = self.store.children(path)
        return [name for name, _ in children if re.fullmatch("[0-9a-f]{1,16}", name)]

    def _read_member(self, name: str) -> Member:
        path = f"/0/members/{name}"
        id = int(name, 16)
        parts = (self.store.value(path + "/raftAttributes"), self.store.value(path + "/attributes"))
        try:
            raft, attributes = (parse_member(utf8(part or "{}"), id) for part in parts)
        except CodecError as error:
            SERVER_LOG.error("member %s is damaged: %s", name, error)
            return Member(id, ())
        return attributes._replace(peer_urls=raft.peer_urls, is_learner=raft.is_learner)

    def all_have(self, feature: str) -> bool:
        """True if every member has published that it has `feature`."""
        return all(feature in member.features for member in self.members.values())

    def member_by_name(self, name: str) -> Optional[Member]:
        return next((m for m in self.members.values() if m.name == name), None)

    def is_removed(self, id: int) -> bool:
        return id in self.removed

    def is_known(self, id: int) -> bool:
        """True if the addition of this member is applied.

        The store decides, as it is the same everywhere; `members` also holds those of the flags.
        """
        return bool(self.store.children(f"/0/members/{format_id(id)}"))

    def client_urls(self) -> List[str]:
        return [url for member in self.members.values() for url in member.client_urls]

    def peer_urls(self) -> List[str]:
        return [url for member in self.members.values() for url in member.peer_urls]

    # -- changes -----------------------------------------------------------

    def validate_change(self, change: ConfChange) -> Optional[Member]:
        """Return the member in an add or update, None for a removal.  Raises MemberError.

        The applied state alone decides, so every member decides alike.
        """
        id = change.node_id
        if change.type not in _KNOWN_CHANGES:
            raise UnknownChange()       # of a newer etcd; 2.3 exits here
        if id in self.removed:
            raise MemberRemoved()
        known = self.is_known(id)
        adds = change.type in (ConfChangeType.ADD_NODE, ConfChangeType.ADD_LEARNER)
        context = change.context or b"{}"
        member = parse_member(context, id)
        if adds and load_json(context).get("isPromote"):
            learner = self._read_member(format_id(id))
            if not learner.is_learner:
                raise MemberNotFound()  # 3.4 has another error for one that votes already
            return learner._replace(is_learner=False)
        if adds and known:
            raise MemberExists()
        if not adds and not known:
            raise MemberNotFound()
        if change.type == ConfChangeType.REMOVE_NODE:
            return None
        for other in self._ids("/0/members"):
            if int(other, 16) != id:
                if set(self._read_member(other).peer_urls) & set(member.peer_urls):
                    raise PeerUrlExists()
        return member

    def add(self, member: Member, *, now_ns: int = 0) -> None:
        """Apply: a member joins.  One store index."""
        path = f"/0/members/{format_id(member.id)}/raftAttributes"
        self.store.create(path, value=member.raft_attributes_json(), now_ns=now_ns)
        if not member.name and member.id in self.members:
            member = self.members[member.id]._replace(peer_urls=member.peer_urls)
        self.members[member.id] = member
        self._log("added", member.id, " ".join(member.peer_urls), "to")

    def remove(self, id: int, *, now_ns: int = 0) -> None:
        """Apply: a member leaves, and its id can never come back.  Two store indexes."""
        path = f"/0/members/{format_id(id)}"
        self.store.delete(path, dir=True, recursive=True, now_ns=now_ns)
        self.store.create(f"/0/removed_members/{format_id(id)}", now_ns=now_ns)
        self.members.pop(id, None)
        self.removed.add(id)
        SERVER_LOG.info("removed member %s from cluster %s", format_id(id), format_id(self.id))

    def update_raft_attributes(self, changed: Member, *, now_ns: int = 0) -> None:
        """Apply: a member has new peer URLs, or a vote.  One store index."""
        id = changed.id
        member = self.members[id]._replace(
            peer_urls=changed.peer_urls, is_learner=changed.is_learner)
        path = f"/0/members/{format_id(id)}/raftAttributes"
        self.store.update(path, value=member.raft_attributes_json(), now_ns=now_ns)
        self.members[id] = member
        self._log("update", id, " ".join(member.peer_urls), "in")

    def update_attributes(self, published: Member) -> None:
        """Apply: a member has published itself (the store is written by the Applier)."""
        known = self.members.get(published.id) or published
        self.members[published.id] = published._replace(
            peer_urls=known.peer_urls, is_learner=known.is_learner)

    def set_version(self, version: str) -> None:
        """Apply: the cluster version (the store is written by the Applier).

        Raises InvariantError if this program is older than the cluster.
        """
        self._check_version(version)
        short = version.rpartition(".")[0]
        if self.version is None:
            SERVER_LOG.info("set the initial cluster version to %s", short)
        elif self.version != version:
            self.was_lowered = version_key(version) < version_key(self.version)
            SERVER_LOG.info(
                "updated the cluster version from %s to %s", self.version.rpartition(".")[0], short
            )
        self.version = version

    def _check_version(self, version: str) -> None:
        if not self.identity.bears(version):
            raise InvariantError(
                f"cluster cannot be downgraded (current version: {self.identity.server} is lower"
                f" than determined cluster version: {version.rpartition('.')[0]}). Run a program"
                f" that is at least as new as the cluster{self._identity_hint(version)}"
            )

    @staticmethod
    def _identity_hint(version: str) -> str:
        """Return the value of -compat-version that bears a cluster version, for the operator."""
        bearing = (name for name, identity in IDENTITIES.items() if identity.bears(version))
        name = next(bearing, "")
        return f", or start this one with -compat-version {name}" if name else ""

    # -- strict reconfiguration check ----------------------------------------

    def check_strict(self, change_type: ConfChangeType, id: int) -> None:
        """Raise NotEnoughStarted if a change could leave too few started members for a quorum."""
        members = self.members.values()
        if change_type == ConfChangeType.ADD_NODE:
            what, size = "add", len(members) + 1
            started = sum(member.started for member in members)
            if started == 1 and size == 2:      # a cluster of one must be able to grow
                return
        elif change_type == ConfChangeType.REMOVE_NODE:
            rest = [member for member in members if member.id != id]
            what, size, started = "remove", len(rest), sum(member.started for member in rest)
        else:
            return
        if started < size // 2 + 1:
            SERVER_LOG.warning(
                "Reject %s member request: the number of started member (%d) will be less than"
                " the quorum number of the cluster (%d)", what, started, size // 2 + 1,
            )
            raise NotEnoughStarted({"add": "adding", "remove": "removing"}[what], started, size)

    def check_active(
        self, change_type: ConfChangeType, id: int, active_since: Callable[[int], float]
    ) -> None:
        """Raise NotEnoughActive if a change leaves too few reachable members for a quorum.

        A member that is down may always be removed.  Source: etcd 3 server.go, mayRemoveMember.
        Differs from it: active now is enough, it needs no 5 s, and one more may be added while
        others are down if all that are up will be a quorum.
        """
        active = {each for each in self.members if each == self.local_id or active_since(each) > 0}
        if change_type == ConfChangeType.ADD_NODE:
            what, left, size = "adding", len(active), len(self.members) + 1
            is_risky = size > 2             # a cluster of one must be able to grow
        else:
            what, left, size = "removing", len(active) - 1, len(self.members) - 1
            is_risky = change_type == ConfChangeType.REMOVE_NODE and id in active
        if is_risky and left < size // 2 + 1:
            SERVER_LOG.warning(
                "not healthy for reconfigure: %s a member leaves %d of %d active", what, left, size
            )
            raise NotEnoughActive(what, left, size)

    def _local(self, id: int) -> str:
        return "local " if id == self.local_id else ""

    def _log(self, verb: str, id: int, urls: str, preposition: str) -> None:
        SERVER_LOG.info(
            "%s %smember %s [%s] %s cluster %s", verb, self._local(id), format_id(id), urls,
            preposition, format_id(self.id),
        )


def parse_member(context: bytes, id: int) -> Member:
    """Return the member in a conf change's context; parts that are missing are empty.

    Raises CodecError.
    """
    try:
        fields = load_json(context)
        urls, clients = fields.get("peerURLs") or (), fields.get("clientURLs") or ()
        name, features = fields.get("name") or "", fields.get("features") or ()
        texts = [as_unicode(str(text)) for text in (name, *urls, *clients, *features)]
        first_client = 1 + len(urls)
        first_feature = first_client + len(clients)
        return Member(
            id, tuple(sorted(texts[1:first_client])), texts[0],
            tuple(texts[first_client:first_feature]), tuple(texts[first_feature:]),
            fields.get("isLearner") is True,
        )
    except (ValueError, AttributeError, TypeError):
        raise CodecError(f"the context of a change is not a member: {context!r}") from None


# ============================================================================
# member/applier -- The applier: committed entries change store and cluster; peers' entries are inspected before.
# ----------------------------------------------------------------------------
# Deterministic: every member gets the same result from the same entry.  Only the shown ttl
# depends on the clock.
# ============================================================================


_ATTRIBUTES_PATH = re.compile(r"/0/members/([0-9a-fA-F]{1,16})/attributes")
_VERSION_VALUE = re.compile(r"[0-9]{1,9}\.[0-9]{1,9}\.[0-9]{1,9}")

_V3_FIELDS_WITHOUT_DATA = {1, 10, 100}  # of InternalRaftRequest: id, alarm, header

Applied = Union[Event, EtcdError, None]


class Applier:
    """Turns requests into changes of the store, and conf changes into changes of the cluster.

    clock  returns unix nanoseconds, for the ttl that is shown; never for what expires
    """

    def __init__(
        self, store: Store, cluster: Cluster, local_id: int, clock: Callable[[], int],
    ) -> None:
        self.clock = clock
        self.v3_entries = 0             # skipped so far
        self.auth_changes = 0           # times that something below /2 may have changed
        self._store = store
        self._cluster = cluster
        self._long: Optional[Entry] = None      # the entry that prepare() is decoding
        self._steps: Generator[None, None, Optional[Request]] = decode_long_request(b"")
        cluster.local_id = local_id

    def prepare(self, entry: Entry) -> bool:
        """Decode a slice of a long entry; True when it is decoded, or is not long.

        10 MB take 40 ms, or 0.5 s.
        """
        if len(entry.data) <= LONG_REQUEST_BYTES:
            return True
        if self._long is not entry:
            self._long, self._steps = entry, decode_long_request(entry.data)
        try:
            next(self._steps)
            return False
        except StopIteration as end:
            request: Optional[Request] = end.value
            if request is not None and request.path.startswith("/1/"):
                entry.request = _with_clean_path(request)
        except CodecError:              # apply_entry() logs it
            pass
        self._long = None
        return True

    def apply_entry(self, entry: Entry) -> Applied:
        """Apply a normal entry, and leave its request in entry.request.

        Returns None for entries without a result: a leader's first entry, operations of etcd 3's
        API, and garbage; they count as applied and do nothing here.
        """
        request = entry.request
        if request is None:
            if not entry.data:
                return None
            try:
                request = entry.request = read_command(entry.data)
            except CodecError as error:     # in a log from before check_entry(); etcd exits here
                SERVER_LOG.error("ignored entry %d: %s", entry.index, error)
                return None
            if request is None:
                self._skip_v3(entry)
                return None
        return self.apply_request(request)

    def _skip_v3(self, entry: Entry) -> None:
        self.v3_entries += 1
        if not {number for number, _, _ in decode_fields(entry.data)} <= _V3_FIELDS_WITHOUT_DATA:
            self._cluster.v3_mark.set(f"entry {entry.index} of the log")

    def apply_request(self, request: Request) -> Applied:
        """Execute one command; errors of the store are returned, not raised."""
        path = request.path
        handler = _METHODS.get(request.method)
        if path.startswith("/2"):
            # Only here etcd proposes paths that its store has to clean: `/2/users/`.
            request = request._replace(path=clean_path(path))
            self.auth_changes += 1
        if handler is None:
            return RaftInternal(f"etcdserver: unknown method {request.method}")
        try:
            return handler(self, request)
        except EtcdError as error:
            return error.with_traceback(None)       # its frames hold the request

    def _put(self, r: Request) -> Applied:
        store, now_ns = self._store, self.clock()
        if r.prev_exist is None:
            if not r.prev_index and not r.prev_value:
                if r.path.startswith("/0/") and not self._note_cluster(r):
                    return None
                return store.set(
                    r.path, dir=r.dir, value=r.val, expires_ns=r.expiration,
                    refresh=bool(r.refresh), now_ns=now_ns,
                )
        elif not r.prev_exist:
            return store.create(
                r.path, dir=r.dir, value=r.val, expires_ns=r.expiration, now_ns=now_ns
            )
        elif not r.prev_index and not r.prev_value:
            return store.update(
                r.path, value=r.val, expires_ns=r.expiration, refresh=bool(r.refresh),
                now_ns=now_ns,
            )
        return store.compare_and_swap(
            r.path, prev_value=r.prev_value, prev_index=r.prev_index, value=r.val,
            expires_ns=r.expiration, refresh=bool(r.refresh), now_ns=now_ns,
        )

    def _post(self, r: Request) -> Applied:
        return self._store.create(
            r.path, dir=r.dir, value=r.val, unique=True, expires_ns=r.expiration,
            now_ns=self.clock(),
        )

    def _delete(self, r: Request) -> Applied:
        if r.prev_index or r.prev_value:
            return self._store.compare_and_delete(
                r.path, prev_value=r.prev_value, prev_index=r.prev_index, now_ns=self.clock()
            )
        return self._store.delete(
            r.path, dir=r.dir, recursive=r.recursive, now_ns=self.clock()
        )

    def _get(self, r: Request) -> Applied:
        return self._store.get(r.path, recursive=r.recursive, now_ns=self.clock())

    def _sync(self, r: Request) -> Applied:
        self._store.delete_expired(r.time)
        return None

    def _note_cluster(self, r: Request) -> bool:
        """Note a member's attributes or the cluster version; False if the store stays as it is."""
        match = _ATTRIBUTES_PATH.fullmatch(r.path)
        if match is not None:
            return self._note_attributes(int(match.group(1), 16), r.val)
        if r.path == "/0/version":
            if not _VERSION_VALUE.fullmatch(r.val):
                SERVER_LOG.error("ignored a cluster version that is none: %s", r.val)
                return False            # etcd exits here
            self._cluster.set_version(r.val)
        return True

    def _note_attributes(self, id: int, value: str) -> bool:
        if not self._cluster.is_known(id):
            if not self._cluster.is_removed(id):    # etcd exits here; the store alone is harmless
                SERVER_LOG.warning("ignored the attributes of unknown member %s", format_id(id))
            return False
        try:
            member = parse_member(utf8(value), id)
        except CodecError as error:     # etcd exits here
            SERVER_LOG.error("ignored attributes: %s", error)
            return False
        self._cluster.update_attributes(member)
        return True

    def apply_conf_change(self, change: ConfChange) -> Optional[MemberError]:
        """Change the cluster, or return the reason against it; then Raft must not change either."""
        try:
            self._change_cluster(change)
        except MemberError as error:
            return error.with_traceback(None)       # its frames hold the request
        except (CodecError, EtcdError) as error:        # etcd exits here
            SERVER_LOG.error("ignored a change of members: %s", error)
            return UnknownChange()
        return None

    def _change_cluster(self, change: ConfChange) -> None:
        member = self._cluster.validate_change(change)
        now_ns = self.clock()
        if member is None:
            self._cluster.remove(change.node_id, now_ns=now_ns)
        elif self._cluster.is_known(change.node_id):    # new peer URLs, or a learner's vote
            self._cluster.update_raft_attributes(member, now_ns=now_ns)
        else:
            self._cluster.add(member, now_ns=now_ns)


_METHODS: Dict[str, Callable[[Applier, Request], Applied]] = {
    "PUT": Applier._put,
    "POST": Applier._post,
    "DELETE": Applier._delete,
    "QGET": Applier._get,
    "SYNC": Applier._sync,
}


# -- inspection of entries -----------------------------------------------------


def read_command(data: Buffer) -> Optional[Request]:
    """Return decode_request(data) as UTF-8, with a clean path as in etcd's store.

    Raises CodecError.
    """
    request = decode_request(data)
    return None if request is None else _with_clean_path(request.as_unicode())


def _with_clean_path(request: Request) -> Request:
    path = clean_path(request.path)
    return request if path == request.path else request._replace(path=path)


def read_change(entry: Entry) -> ConfChange:
    """Return the change in an entry; one of unknown type for garbage from before check_entry()."""
    try:
        return decode_conf_change(entry.data)
    except CodecError as error:         # etcd exits here
        SERVER_LOG.error("ignored entry %d: %s", entry.index, error)
        return ConfChange(type=-1)


def check_entry(entry: Entry, identity: Identity = DEFAULT_IDENTITY) -> None:
    """Raise CodecError for an entry whose application would fail here, or at the next start.

    The command of a normal entry stays in entry.request, so that it is decoded once.
    """
    if entry.type == EntryType.CONF_CHANGE:
        _check_change(entry.data)
    elif entry.type:
        raise CodecError(f"an entry of unknown type {entry.type}")
    elif entry.data:
        is_long = len(entry.data) > LONG_REQUEST_BYTES
        if is_long:                     # see Applier.prepare()
            request = decode_request_head(entry.data)
            request = request and _with_clean_path(request.as_unicode())
        else:
            request = entry.request = read_command(entry.data)
        if request is not None and not request.path.startswith("/1/"):
            if is_long and request.path.startswith("/0/"):
                raise CodecError(f"{len(entry.data)} bytes below /0")
            _check_own_path(request, identity)
        if request is not None and len(request.path) > _PATH_CHARS_CHEAP:
            if len(request.path) * request.path.count("/") > PATH_COST_MAX:
                raise CodecError(f"a key of {request.path.count('/')} path elements")


def check_proposal(entry: Entry) -> None:
    """Raise CodecError for a proposal that no API of a member lets in, after check_entry().

    An entry in a leader's log would have to be accepted: other members have it already.
    """
    if entry.type == EntryType.CONF_CHANGE:
        change = decode_conf_change(entry.data)
        if change.type in (ConfChangeType.ADD_NODE, ConfChangeType.UPDATE_NODE):
            member = parse_member(change.context or b"{}", change.node_id)
            try:
                if not list(map(check_advertised_url, member.peer_urls)):
                    raise ValueError("no peer URL")
            except ValueError as error:
                raise CodecError(f"a change of member {change.node_id:x}: {error}") from None


_PATH_CHARS_CHEAP = 4_096               # of a key; up to here no number of elements is costly


def _check_own_path(request: Request, identity: Identity) -> None:
    """Raise CodecError for a write below /0 other than members' attributes and the version."""
    path, value = request.path, request.val
    if request.method == "QGET" or not (path + "/").startswith("/0/"):
        return
    if request.method == "PUT" and _ATTRIBUTES_PATH.fullmatch(path):
        return
    if request.method != "PUT" or path != "/0/version":
        raise CodecError(f"a {request.method} of {path[:100]}, which belongs to the cluster")
    if _VERSION_VALUE.fullmatch(value) and not identity.bears(value):
        raise CodecError(f"cluster version {value} is newer than this program")


def _check_change(data: bytes) -> None:
    change = decode_conf_change(data)
    if not data or not change.node_id:
        raise CodecError("a change of no member")
    if change.type in (ConfChangeType.ADD_NODE, ConfChangeType.UPDATE_NODE):
        context = change.context or b"{}"
        parse_member(context, change.node_id)
        if load_json(context).get("id", change.node_id) != change.node_id:
            raise CodecError(f"a change of member {change.node_id:x} that speaks of another one")


class MemberInspector(MessageInspector):
    """Refuses messages that would be fatal when they are applied, or make our log unreadable."""

    def __init__(self, cluster: Cluster, fault: Callable[[Message], str]) -> None:
        self._cluster = cluster
        self._fault = fault             # by the rules of Raft alone

    def inspect(self, message: Message) -> Generator[None, None, str]:
        """Return, in steps, the reason against stepping `message`; "": none."""
        if message.type == MsgType.PROP and message.sender not in self._cluster.members:
            return "its sender is no member, and may propose nothing"
        if message.type == MsgType.SNAP and not (message.snapshot and message.snapshot.state):
            return "nobody has read the snapshot in it"
        fault, work = self._fault(message), 0
        if fault or message.type not in (MsgType.APP, MsgType.PROP):
            return fault
        for entry in message.entries:
            try:
                check_entry(entry, self._cluster.identity)
                if message.type == MsgType.PROP:
                    check_proposal(entry)
            except CodecError as error:
                return str(error)
            work += STEP_BYTES // STEP_ENTRIES + len(entry.data)
            if work > STEP_BYTES:
                work = 0
                yield
        return ""

    def read_state(self, data: bytes) -> StoreState:
        """Return the state in a snapshot.  Raises ValueError if the store cannot become it."""
        state = StoreState.read(data)
        if state.version and not self._cluster.identity.bears(state.version):
            raise ValueError(f"cluster version {state.version} is newer than this program")
        return state

    def has_v3_data(self, database: IO[bytes]) -> bool:
        return holds_v3_data(database)

    def note_v3_data(self) -> None:
        self._cluster.v3_mark.set("a snapshot of the leader")

    def needs_v3_data(self, member_id: int) -> bool:
        """Where there is v3 data, every member of etcd needs it: only pyetcd publishes features."""
        member = self._cluster.members.get(member_id)
        return self._cluster.v3_mark.is_set and not (member and member.features)

    def empty_database(self, raft_index: int) -> bytes:
        return empty_database(raft_index)


# ============================================================================
# member/configuration -- The settings of a member, and the state that it boots with.
# ============================================================================


class ServerConfig(NamedTuple):
    """All settings of a member; frozen after start.  URLs are checked; times in ms."""

    name: str = DEFAULT_NAME
    data_dir: str = ""                  # "": <name>.etcd in the working directory
    wal_dir: str = ""                   # "": <data_dir>/member/wal
    snapshot_count: int = DEFAULT_SNAPSHOT_COUNT
    heartbeat_ms: int = DEFAULT_HEARTBEAT_MS
    election_ms: int = DEFAULT_ELECTION_MS
    max_snapshots: int = DEFAULT_SNAPSHOTS_KEPT
    max_wals: int = DEFAULT_WALS_KEPT
    segment_bytes: int = SEGMENT_BYTES_MAX
    initial_cluster: str = ""           # "": this member alone
    initial_cluster_token: str = DEFAULT_CLUSTER_TOKEN
    initial_cluster_state: str = "new"
    force_new_cluster: bool = False
    listen_client_urls: Tuple[str, ...] = tuple(DEFAULT_CLIENT_URLS.split(","))
    listen_peer_urls: Tuple[str, ...] = tuple(DEFAULT_PEER_URLS.split(","))
    advertise_client_urls: Tuple[str, ...] = tuple(DEFAULT_CLIENT_URLS.split(","))
    initial_advertise_peer_urls: Tuple[str, ...] = tuple(DEFAULT_PEER_URLS.split(","))
    discovery: str = ""
    discovery_fallback: str = "proxy"
    discovery_proxy: str = ""
    discovery_srv: str = ""
    compat_version: str = "auto"        # or `2.3`, `3.4`, `bridge`: see base/versions.py
    strict_reconfig_check: bool = True
    history_events: int = HISTORY_EVENTS_MAX
    cors: Tuple[str, ...] = ()
    client_tls: TlsFiles = TlsFiles()
    peer_tls: TlsFiles = TlsFiles()
    proxy: str = "off"                  # `on` or `readonly`: no member, see life/proxy.py
    proxy_failure_wait_ms: int = 5000
    proxy_refresh_interval_ms: int = 30_000
    proxy_dial_timeout_ms: int = 1000   # this and the next two: 0 is no limit
    proxy_write_timeout_ms: int = 5000
    proxy_read_timeout_ms: int = 0
    debug: bool = False

    @property
    def request_timeout_s(self) -> float:
        """Time for a commit before a client gets an error: 5 s and two elections (etcd 2.3)."""
        return 5.0 + 2 * self.election_ms / 1000


if TYPE_CHECKING:
    class MemberSettings(TypedDict, total=False):
        """The fields of ServerConfig without the name, as keyword arguments."""

        data_dir: str
        wal_dir: str
        snapshot_count: int
        heartbeat_ms: int
        election_ms: int
        max_snapshots: int
        max_wals: int
        segment_bytes: int
        initial_cluster: str
        initial_cluster_token: str
        initial_cluster_state: str
        force_new_cluster: bool
        listen_client_urls: Sequence[str]
        listen_peer_urls: Sequence[str]
        advertise_client_urls: Sequence[str]
        initial_advertise_peer_urls: Sequence[str]
        discovery: str
        discovery_fallback: str
        discovery_proxy: str
        discovery_srv: str
        compat_version: str
        strict_reconfig_check: bool
        history_events: int
        cors: Sequence[str]
        client_tls: TlsFiles
        peer_tls: TlsFiles
        proxy: str
        proxy_failure_wait_ms: int
        proxy_refresh_interval_ms: int
        proxy_dial_timeout_ms: int
        proxy_write_timeout_ms: int
        proxy_read_timeout_ms: int
        debug: bool

    class ServerSettings(MemberSettings, total=False):
        """The fields of ServerConfig as keyword arguments."""

        name: str


class Bootstrap(NamedTuple):
    """The state that bootstrap found or made on disk, for the start of a member."""

    data_dir: DataDir
    member_id: int
    cluster: Cluster
    store: Store
    wal: Wal
    snapshotter: Snapshotter
    contents: WalContents               # empty hard state and entries for a new member
    snapshot: Optional[Snapshot]        # already recovered into store and cluster; data dropped
    bootstrap_entries: Sequence[Entry] = ()     # of a new cluster, not yet on disk
    remotes: Sequence[Member] = ()      # members of the existing cluster that we join
    peer_tls: Optional[TlsContext] = None       # as client of other members


# ============================================================================
# member/passwords -- Users, roles, permissions and passwords.
# ----------------------------------------------------------------------------
# Source: etcd 2.3 etcdserver/auth.
# ============================================================================


AUTH_LOG = package_logger("auth")
AUTH_PREFIX = "/2"                  # where users and roles lie in the store
ROOT, GUEST = "root", "guest"       # the user and role that may do all; requests without a name
PASSWORD_COST = 10                  # of bcrypt: 2**10 rounds, as etcd
PASSWORD_BYTES_MAX = 4_096          # above: a bad request; bcrypt reads the first 72
AUTH_NAME_BYTES_MAX = 1_024         # of a user or role; above: a bad request, and no such user
PASSWORD_CHECKS_MAX = 1_024         # waiting to be verified; above: 503 for the worst guesser
PASSWORDS_KNOWN_MAX = 10_000        # right ones, and as many wrong ones; above: forgotten
PASSWORD_SECONDS_MAX = 30.0         # for one check; above: given up, 503
WRONG_PASSWORD_PAUSE_SECONDS = 0.1  # before the next check of a sender with wrong ones lately
WRONG_PASSWORD_SECONDS = 60.0       # without a wrong one; then a sender counts as new
GUESSERS_MAX = 10_000               # remembered; above: the oldest is forgotten


class AuthError(Exception):
    """A refused request of the auth API, with etcd's text and the status of HTTP."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"auth: {text}")
        self.status = status


Names = Optional[Tuple[str, ...]]   # roles or patterns; None: null in JSON


class Permissions(NamedTuple):
    """The keys that a role may read and write: exact keys, or prefixes that end in `*`."""

    read: Names = None
    write: Names = None

    @property
    def is_empty(self) -> bool:
        return not self.read and not self.write

    def json(self) -> Dict[str, Dict[str, Names]]:
        return {"kv": {"read": self.read, "write": self.write}}

    def allow(self, key: str, *, write: bool, recursive: bool) -> bool:
        """True if a pattern covers `key`, and with `recursive` all keys below it, too."""
        for pattern in (self.write if write else self.read) or ():
            if pattern.endswith("*"):
                if key.startswith(pattern[:-1]):
                    return True
            elif pattern == key and not recursive:
                return True
        return False

    def grant(self, more: Permissions) -> Permissions:
        """Return both together, sorted.  Raises AuthError for a duplicate."""
        return Permissions(
            _granted(self.read, more.read, "Granting duplicate read permission {}"),
            _granted(self.write, more.write, "Granting duplicate write permission {}"),
        )

    def revoke(self, less: Permissions) -> Permissions:
        """Return the rest, sorted; permissions that were never granted are ignored."""
        return Permissions(*(
            tuple(sorted(set(ours or ()) - set(theirs or ())))
            for ours, theirs in zip(self, less)
        ))


def _granted(ours: Names, more: Names, complaint: str) -> Tuple[str, ...]:
    names = set(ours or ())
    for name in more or ():
        if name in names:
            raise AuthError(409, complaint.format(name))
        names.add(name)
    return tuple(sorted(names))


EVERYTHING = Permissions(("/*",), ("/*",))


class Role(NamedTuple):
    """A named set of permissions."""

    name: str
    permissions: Permissions = Permissions()

    def json(self) -> Dict[str, object]:
        return {"role": self.name, "permissions": self.permissions.json()}

    def allow(self, key: str, *, write: bool, recursive: bool) -> bool:
        """True if the role covers this access; root covers any."""
        return self.name == ROOT or self.permissions.allow(key, write=write, recursive=recursive)


class User(NamedTuple):
    """A user; password is its hash, or in a request the client's text ("": keep)."""

    name: str
    password: str = ""
    roles: Names = None

    def json(self, *, hide_password: bool = False) -> Dict[str, object]:
        fields: Dict[str, object] = {"user": self.name}
        if self.password and not hide_password:
            fields["password"] = self.password
        return {**fields, "roles": self.roles}

    def with_root(self) -> User:
        """Return the user, with the role root if its name is root."""
        if self.name != ROOT or ROOT in (self.roles or ()):
            return self
        return self._replace(roles=(*(self.roles or ()), ROOT))

    def change_roles(self, grant: Names, revoke: Names) -> User:
        """Return the user with other roles, sorted.  Raises AuthError."""
        roles = set(_granted(
            self.roles, grant, f"Granting duplicate role {{}} for user {self.name}"
        ))
        for name in revoke or ():
            if name not in roles:
                raise AuthError(409, f"Revoking ungranted role {name} for user {self.name}")
            roles.remove(name)
        return self._replace(roles=tuple(sorted(roles)))


_SURROGATES = re.compile("[\ud800-\udfff]")


def go_text(text: str) -> str:
    """Return `text` with U+FFFD for half a surrogate pair, as Go reads JSON."""
    return _SURROGATES.sub("\ufffd", text)


def string_list(value: object) -> Names:
    """Return a JSON list of strings, or null, as Names.  Raises ValueError."""
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError("not a list of strings")
    return tuple(map(go_text, value))


def make_permissions(read: object, write: object) -> Permissions:
    """Return permissions from lists of JSON; empty patterns are dropped.  Raises ValueError.

    Differs from etcd, whose requests crash on an empty pattern.
    """
    lists = (string_list(read), string_list(write))
    return Permissions(*(
        None if names is None else tuple(filter(None, names)) for names in lists
    ))


# A program of its own with low priority: a thread of this process would take Python's lock, or the
# processor, from the reactor (p99 of GET while guesses go on: 10 times its normal).
_BCRYPT_PROGRAM = """
import ctypes, os, sys
os.nice(10)
password, setting = sys.stdin.buffer.read().split(b"\\0")
for name in ("libcrypt.so.1", "libcrypt.so.2"):
    try:
        crypt = ctypes.CDLL(name).crypt_r
    except (OSError, AttributeError) as error:
        if "cannot open" in str(error) and "No such file" not in str(error):
            raise                       # it is there, but cannot be opened now
        continue
    crypt.restype = ctypes.c_char_p
    buffer = ctypes.create_string_buffer(1 << 18)       # larger than any struct crypt_data
    sys.stdout.buffer.write(crypt(password, setting, buffer) or b"*0")
    break
else:
    sys.stdout.buffer.write(b"*0")
"""


def _python() -> str:
    """Return the path of our Python; sys.executable can be a name from `exec -a`."""
    program = os.path.realpath("/proc/self/exe")
    return program if "python" in os.path.basename(program) else sys.executable or "python3"


class Passwords:
    """Hashing with bcrypt where the system's libcrypt has it, else with PBKDF2.  Slow on purpose.

    Thread: any; every call takes tens of milliseconds.
    """

    _ALPHABET = "./ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
    _ROUNDS = 200_000                   # of PBKDF2: about the time of bcrypt's 2**10
    _BCRYPT = re.compile(r"\$2[aby]\$(?:0[4-9]|[12]\d|3[01])\$[./A-Za-z0-9]{53}")

    def __init__(self, now: Callable[[], float]) -> None:
        self._log = ThrottledLog("auth", now)

    def hash(self, password: str) -> str:
        """Return a salted hash for the store.  Raises AuthError if it cannot be made now."""
        number = int.from_bytes(os.urandom(16), "big") << 4
        salt = "".join(self._ALPHABET[number >> shift & 63] for shift in range(126, -1, -6))
        made = self.bcrypt(password, f"$2a${PASSWORD_COST:02d}${salt}")
        if made is None:
            raise AuthError(503, f"passwords cannot be hashed now{_TRY_AGAIN}")
        if made:
            return made
        self._log.error(
            "passwords are hashed with PBKDF2, which etcd cannot verify: this system's libcrypt"
            " has no bcrypt; install libxcrypt (Debian: libcrypt1), and set the passwords again"
        )
        salt = os.urandom(16).hex()
        return f"$pbkdf2-sha256${self._ROUNDS}${salt}${self._pbkdf2(password, salt, self._ROUNDS)}"

    def verify(self, password: str, stored: str) -> Optional[bool]:
        """True if `stored` is a hash of `password`; None: it cannot be computed now."""
        try:
            if b"\0" in utf8(password):  # bcrypt would read only the part before it
                return False
        except UnicodeEncodeError:
            return False                # half a surrogate pair: no client can send it
        if stored.startswith("$pbkdf2-sha256$"):
            parts = stored.split("$")
            if len(parts) != 5 or re.fullmatch("[0-9]{1,8}", parts[2]) is None:
                return False
            made = self._pbkdf2(password, parts[3], int(parts[2]))
            return secrets.compare_digest(made.encode(), utf8(parts[4]))
        if self._BCRYPT.fullmatch(stored) is None:
            return False
        found = self.bcrypt(password, stored)
        if found == "":
            self._log.error(
                "a password hash made by etcd cannot be verified: this system's libcrypt has no"
                " bcrypt; install libxcrypt (Debian: libcrypt1), or set the password again here"
            )
        return secrets.compare_digest(found, stored) if found else None

    @staticmethod
    def decoy(stored: str) -> str:
        """Return a hash as slow as `stored` that no password has, for users that do not exist."""
        if stored.startswith("$pbkdf2-sha256$"):
            return stored.rpartition("$")[0] + "$" + 64 * "0"
        return (stored if stored.startswith("$2") else _DECOY)[:29] + 31 * "."

    @staticmethod
    def _pbkdf2(password: str, salt: str, rounds: int) -> str:
        return hashlib.pbkdf2_hmac("sha256", utf8(password), utf8(salt), max(rounds, 1)).hex()

    def bcrypt(self, password: str, setting: str) -> Optional[str]:
        """Return the hash by algorithm, cost and salt of `setting`.

        "": this system has no bcrypt; None: the program that computes it has failed.
        """
        try:
            import subprocess
            python = _python()
            done = subprocess.run(
                [python, "-I", "-S", "-c", _BCRYPT_PROGRAM],
                input=utf8(password) + b"\0" + setting.encode(),
                capture_output=True, timeout=PASSWORD_SECONDS_MAX, check=True,
            )
            made = done.stdout.decode("latin-1")
            if not made.startswith((setting[:4], "*")):
                raise ValueError(f"{python} is no Python")
        except (OSError, ImportError, ValueError, MemoryError, subprocess.SubprocessError) as error:
            self._log.error(
                f"passwords cannot be verified now, as the program for it has failed: {error}"
            )
            return None
        return made if len(made) == 60 and made.startswith(setting[:4]) else ""


_TRY_AGAIN = "; see the log of this member, and try again"
_DECOY = "$2a$10$" + 53 * "."       # where root has no hash to imitate


class Sender(NamedTuple):
    """The sender of a password: a user's name, and the address that it comes from."""

    user: str
    host: str


class PasswordCheck:
    """One password to verify, and the requests that wait for it.  Level 0 goes first."""

    __slots__ = ("stored", "password", "level", "askers")

    def __init__(self, stored: str, password: str, level: int) -> None:
        self.stored = stored
        self.password = password
        self.level = level
        self.askers: List[Tuple[Tuple[bytes, bytes], Callable[[bool], None]]] = []  # from; done


class PasswordChecks:
    """Verifies passwords one at a time, and remembers the results.

    The level of a check is the logarithm of the wrong passwords that its sender had lately and
    of its checks that wait.  Low levels go first, and a pause precedes each check above level 0.
    So guessing is slow, and no other sender waits for it.  Known passwords never wait.

    The wrong passwords of a host count as well, less strictly, as other users may share it.  Once
    a host has guessed under many names, every check from there waits for the pause, so that an
    answer takes as long for users that do not exist.  Existing users without a wrong password go
    before the others.  Thread: reactor.
    """

    LEVELS = 9
    HOST_LEVELS_FREE = 3            # of a host's levels that do not count: 7 wrong or waiting

    def __init__(self, reactor: Reactor) -> None:
        self.passwords = Passwords(reactor.now)
        self._reactor = reactor
        self._key = os.urandom(32)
        self._known: Dict[bool, Dict[bytes, None]] = {True: {}, False: {}}
        self._waiting: Dict[bytes, PasswordCheck] = {}      # by digest; also the one under way
        self._levels: List[Dict[bytes, None]] = [{} for _ in range(self.LEVELS)]    # digests
        self._under_way = b""           # the digest of the running check
        self._wrong: Dict[bytes, Tuple[int, float]] = {}    # sender or host -> number; last
        self._pending: Dict[bytes, int] = {}                # sender or host -> its checks
        self._guess_at = 0.0            # no check above level 0 starts before
        self._timer: Optional[Timer] = None

    def known(self, user: str, stored: str, password: str) -> Optional[bool]:
        """True: right; False: wrong; None: check() must find out."""
        if len(password) > PASSWORD_BYTES_MAX:
            return False
        digest = self._digest(user, stored, password)
        if digest in self._known[True]:
            return True
        return False if digest in self._known[False] else None

    def check(
        self, sender: Sender, stored: str, password: str, done: Callable[[bool], None]
    ) -> None:
        """Verify, then call done(True); done(False) if that fails now, or too many wait."""
        digest = self._digest(sender.user, stored, password)
        origin, host = self._digest(*sender), self._digest(sender.host)
        level = self._level(origin, host, exists=stored != self.passwords.decoy(stored))
        check = self._waiting.get(digest)
        if check is None:
            check = self._waiting[digest] = PasswordCheck(stored, password, level)
            self._levels[level][digest] = None
        elif level < check.level and digest != self._under_way:
            del self._levels[check.level][digest]
            check.level = level
            self._levels[level][digest] = None
        check.askers.append(((origin, host), done))
        for place in (origin, host):
            self._pending[place] = self._pending.get(place, 0) + 1
        if len(self._waiting) > PASSWORD_CHECKS_MAX:        # drop the last of the worst level
            worst = next(level for level in reversed(self._levels) if level)
            self._finish(worst.popitem()[0], known=False)
        self._start_next()

    def _digest(self, *texts: str) -> bytes:
        text = " ".join((*(str(len(text)) for text in texts), *texts))
        return hashlib.blake2b(
            text.encode("utf-8", "surrogatepass"), key=self._key, digest_size=16
        ).digest()

    def _level(self, origin: bytes, host: bytes, *, exists: bool) -> int:
        own = self._guesses(origin)
        shared = max(self._guesses(host) - self.HOST_LEVELS_FREE, 0)
        if own or shared and not exists:
            return min(max(own, shared) + 1, self.LEVELS - 1)
        return min(shared, 1)

    def _guesses(self, place: bytes) -> int:
        """Return the logarithm of the wrong and the waiting passwords of a sender or host."""
        count, last = self._wrong.get(place, (0, 0.0))
        if last < self._reactor.now() - WRONG_PASSWORD_SECONDS:
            count = 0
        return (count + self._pending.get(place, 0)).bit_length()

    def _start_next(self) -> None:
        """Start the next check, unless one is under way."""
        best = next((number for number, level in enumerate(self._levels) if level), None)
        if self._under_way or best is None:
            return
        wait_s = self._guess_at - self._reactor.now()
        if best and wait_s > 0:
            if self._timer is None:
                self._timer = self._reactor.call_later(wait_s, self._pause_over)
            return
        digest = self._under_way = next(iter(self._levels[best]))
        del self._levels[best][digest]
        check = self._waiting[digest]
        self._reactor.run_blocking(
            self.passwords.verify, check.password, check.stored, kind=PASSWORD_WORK,
            done=self._checked,
        )

    def _pause_over(self) -> None:
        self._timer = None
        self._start_next()

    def _checked(self, error: Optional[BaseException], right: Any) -> None:
        digest, self._under_way = self._under_way, b""
        is_known = error is None and right is not None
        if is_known:
            self._remember(digest, right=right)
        self._finish(digest, known=is_known)
        self._start_next()

    def _remember(self, digest: bytes, *, right: bool) -> None:
        known = self._known[right]
        if len(known) >= PASSWORDS_KNOWN_MAX:
            known.clear()
        known[digest] = None
        now = self._reactor.now()
        places = [places for places, _ in self._waiting[digest].askers]
        if right:
            for origin, _ in places:        # its host may guess other users' passwords
                self._wrong.pop(origin, None)
            return
        self._guess_at = now + WRONG_PASSWORD_PAUSE_SECONDS
        for place in {place for pair in places for place in pair}:
            count, _ = self._wrong.pop(place, (0, 0.0))
            if len(self._wrong) >= GUESSERS_MAX:
                del self._wrong[next(iter(self._wrong))]
            self._wrong[place] = count + 1, now

    def _finish(self, digest: bytes, *, known: bool) -> None:
        for places, done in self._waiting.pop(digest).askers:
            for place in places:
                self._pending[place] -= 1
                if not self._pending[place]:
                    del self._pending[place]
            done(known)


class Credential(NamedTuple):
    """User and password in a request."""

    user: str
    password: str


# ============================================================================
# member/auth -- Auth records in the store, their changes through consensus, and the guard before a request.
# ----------------------------------------------------------------------------
# Source: etcd 2.3 etcdserver/auth, etcdhttp/client_security.go.
# ============================================================================


class Auth:
    """Users and roles as the store has them, and the accesses that they allow.

    Decisions hold until `version` changes.  Thread: reactor.
    """

    def __init__(self, store: Store, applier: Applier, reactor: Reactor) -> None:
        self.checks = PasswordChecks(reactor)
        self._store = store
        self._applier = applier
        self._seen = -1
        self._enabled = False
        self._records: Dict[Tuple[str, str], Any] = {}      # kind and name -> User or Role

    @property
    def version(self) -> int:
        """A number that changes with every change of users, roles, or enabled."""
        return self._applier.auth_changes

    @property
    def enabled(self) -> bool:
        self._refresh()
        return self._enabled

    def user(self, name: str) -> Optional[User]:
        """Return a user, with the role root if it is root."""
        user: Optional[User] = self._record("users", name, parse_stored_user)
        return user

    def role(self, name: str) -> Optional[Role]:
        """Return a role; root exists without being stored."""
        role: Optional[Role] = Role(ROOT, EVERYTHING)
        return role if name == ROOT else self._record("roles", name, parse_stored_role)

    def _record(self, kind: str, name: str, parse: Callable[[str, str], Any]) -> Any:
        self._refresh()
        key = kind, name
        if key not in self._records:    # missing records are not remembered
            stored = self._store.value(f"{AUTH_PREFIX}/{kind}/{name}")
            if not stored:
                return None
            self._records[key] = parse(name, stored)
        return self._records[key]

    def _refresh(self) -> None:
        if self._seen != self._applier.auth_changes:
            self._seen = self._applier.auth_changes
            self._records = {}
            self._enabled = self._store.value(AUTH_PREFIX + "/enabled") == "true"

    def stored_hash(self, name: str) -> str:
        """Return the password's hash of a user.

        An unknown user gets one like root's, so that a refusal takes as long.
        """
        user = self.user(name)
        if user is not None:
            return user.password
        root = self.user(ROOT)
        return self.checks.passwords.decoy(root.password if root is not None else "")

    def names(self, kind: str) -> List[str]:
        """Return the sorted names of all `users` or `roles`, the built-in role included.

        Hidden ones, whose names begin with `_`, are left out, as the store of etcd does.
        """
        children = self._store.children(f"{AUTH_PREFIX}/{kind}")
        names = [name for name, is_dir in children if not is_dir and not name.startswith("_")]
        return sorted(names + [ROOT] if kind == "roles" else names)

    @property
    def has_users(self) -> bool:
        """True if there are users, hidden ones included; auth may be off."""
        return any(True for _ in self._store.children(AUTH_PREFIX + "/users"))

    def may_access(self, user: Optional[User], key: str, *, write: bool, recursive: bool) -> bool:
        """True if a verified user (None: a guest) may read or write `key`."""
        if user is None:
            role = self.role(GUEST)
            return role is not None and role.allow(key, write=write, recursive=False)
        for name in user.roles or ():
            role = self.role(name)
            if role is not None and role.allow(key, write=write, recursive=recursive):
                return True
        AUTH_LOG.warning("invalid access for user %s on key %s.", user.name, key)
        return False

    @staticmethod
    def is_root(user: Optional[User]) -> bool:
        """True if a verified user has the role root."""
        if user is not None and ROOT not in (user.roles or ()):
            AUTH_LOG.warning(
                "user %s does not have the %s role for this resource.", user.name, ROOT
            )
            return False
        return user is not None


def parse_stored_user(name: str, text: str) -> Optional[User]:
    """Return the user in a record of the store; None, with a log line, if it holds none."""
    try:
        value = load_json(text)
        password = go_text(str(value["password"]))
        return User(name, password, string_list(value.get("roles"))).with_root()
    except (ValueError, KeyError, TypeError, AttributeError):
        AUTH_LOG.error("ignored user %s: what is stored is no user", name)
        return None


def parse_stored_role(name: str, text: str) -> Optional[Role]:
    """Return the role in a record of the store; None, with a log line, if it holds none."""
    try:
        kv = load_json(text)["permissions"]["kv"]
        return Role(name, make_permissions(kv.get("read"), kv.get("write")))
    except (ValueError, KeyError, TypeError, AttributeError):
        AUTH_LOG.error("ignored role %s: what is stored is no role", name)
        return None


Step = Union[Request, Callable[[], Any]]
Steps = Generator[Step, Any, Any]


class StepsRunner(NamedTuple):
    """Runs a change that waits several times; then done(its result, or its exception).

    do     as EtcdServer.do
    steps  yields a Request, and gets its Event or EtcdError; or a callable, which runs on another
           thread, and gets its result
    """

    do: Callable[[Request, Callable[[Any], None]], None]
    reactor: Reactor
    steps: Steps
    done: Callable[[Any], None]

    def go_on(self, value: Any = None) -> None:
        """Take the next step, with the result of the one before."""
        try:
            step = self.steps.send(value)
        except StopIteration as stop:
            self.done(stop.value)
        except (AuthError, EtcdError) as error:
            self.done(error.with_traceback(None))
        else:
            if isinstance(step, Request):
                self.do(step, self.go_on)
            else:
                self.reactor.run_blocking(step, kind=PASSWORD_WORK, done=self._worked)

    def _worked(self, error: Optional[BaseException], result: Any) -> None:
        if error is None:
            self.go_on(result)
        elif isinstance(error, AuthError):
            self.done(error)
        else:
            self.done(AuthError(503, f"{error}{_TRY_AGAIN}"))


class AuthStore:
    """Changes of users and roles, through consensus; each method returns Steps for StepsRunner.

    A change reads its record through consensus, too, and is written only if the record is the
    same then; otherwise it begins again.  Differs from etcd, where of two changes of one user at
    the same time one is lost.  All methods raise AuthError.
    """

    def __init__(self, auth: Auth) -> None:
        self._auth = auth
        self._ensured = False

    def create_user(self, user: User) -> Steps:
        """Return the new user."""
        if not user.password:
            raise AuthError(400, f"Cannot create user {user.name} with an empty password")
        hashed = yield functools.partial(self._auth.checks.passwords.hash, user.password)
        user = user._replace(password=hashed).with_root()
        yield from self._create("user", user)
        AUTH_LOG.info("created user %s", user.name)
        return user

    def update_user(self, name: str, password: str, grant: Names, revoke: Names) -> Steps:
        """Return the changed user."""
        hashed = ""
        if password:
            hashed = yield functools.partial(self._auth.checks.passwords.hash, password)

        def change(old: User) -> User:
            new = old.change_roles(grant, revoke)
            return new._replace(password=hashed) if hashed else new

        return (
            yield from self._update(
                "user", name, parse_stored_user, change, "grant/revoke/password")
        )

    def delete_user(self, name: str) -> Steps:
        if name == ROOT and self._auth.enabled:
            raise AuthError(403, "Cannot delete root user while auth is enabled.")
        missing = AuthError(404, f"User {name} does not exist")
        yield from self._write(f"/users/{name}", KeyNotFound, missing, method="DELETE")
        AUTH_LOG.info("deleted user %s", name)

    def create_role(self, role: Role) -> Steps:
        """Return the new role."""
        self._check_role(role.name)
        yield from self._create("role", role)
        AUTH_LOG.info("created new role %s", role.name)
        return role

    def update_role(
        self, name: str, grant: Optional[Permissions], revoke: Optional[Permissions]
    ) -> Steps:
        """Return the changed role."""
        self._check_role(name)

        def change(old: Role) -> Role:
            permissions = old.permissions
            if grant is not None:
                permissions = permissions.grant(grant)
            if revoke is not None:
                permissions = permissions.revoke(revoke)
            return old._replace(permissions=permissions)

        return (
            yield from self._update("role", name, parse_stored_role, change, "grant/revoke")
        )

    def delete_role(self, name: str) -> Steps:
        self._check_role(name)
        missing = AuthError(404, f"Role {name} doesn't exist.")
        yield from self._write(f"/roles/{name}", KeyNotFound, missing, method="DELETE")
        AUTH_LOG.info("deleted role %s", name)

    def enable(self) -> Steps:
        """Check requests from now on; there must be a root."""
        if self._auth.enabled:
            raise AuthError(409, "already enabled")
        no_root = AuthError(409, "No root user available, please create one")
        yield from self._read(f"/users/{ROOT}", no_root)
        if self._auth.role(GUEST) is None:
            AUTH_LOG.info("no guest role access found, creating default")
            yield from self.create_role(Role(GUEST, EVERYTHING))
        yield from self._write("/enabled", val="true", prev_exist=True)
        AUTH_LOG.info("auth: enabled auth")

    def disable(self) -> Steps:
        if not self._auth.enabled:
            raise AuthError(409, "already disabled")
        yield from self._write("/enabled", val="false", prev_exist=True)
        AUTH_LOG.info("auth: disabled auth")

    @staticmethod
    def _check_role(name: str) -> None:
        if name == ROOT:
            raise AuthError(403, f"Cannot modify role {name}: is root role.")

    def _create(self, kind: str, record: Union[User, Role]) -> Steps:
        exists = AuthError(409, f"{kind.capitalize()} {record.name} already exists.")
        yield from self._write(
            f"/{kind}s/{record.name}", NodeExists, exists, val=json_text(record.json()),
            prev_exist=False,
        )

    def _update(
        self, kind: str, name: str, parse: Callable[[str, str], Any],
        change: Callable[[Any], Any], options: str,
    ) -> Steps:
        """Return the changed record; begins again if another change was faster."""
        path, what = f"/{kind}s/{name}", kind.capitalize()
        missing = AuthError(404, f"{what} {name} does not exist.")
        while True:
            text, index = yield from self._read(path, missing)
            old = parse(name, text)
            if old is None:
                raise missing
            new = change(old)
            if new == old:
                raise AuthError(400, f"{what} not updated. Use {options} to update the {kind}.")
            result = yield from self._do(Request(
                method="PUT", path=path, val=json_text(new.json()), prev_exist=True,
                prev_index=index,
            ))
            if not isinstance(result, EtcdError):
                AUTH_LOG.info("updated %s %s", kind, name)
                return new

    def _read(self, path: str, missing: AuthError) -> Steps:
        """Return (value, its index) as of now.  Raises `missing`."""
        result = yield from self._do(Request(method="QGET", path=path))
        if isinstance(result, EtcdError) or result.node.value is None:
            raise missing
        return result.node.value, result.node.modified_index

    def _write(
        self, path: str, error: Type[EtcdError] = EtcdError,
        refusal: Optional[AuthError] = None, method: str = "PUT", **fields: Any,
    ) -> Steps:
        """Write or delete a record.  Raises `refusal` for an `error`, and others as they are."""
        yield from self._ensure_directories()
        result = yield from self._do(Request(method=method, path=path, **fields))
        if isinstance(result, EtcdError):
            raise refusal if refusal is not None and isinstance(result, error) else result

    def _ensure_directories(self) -> Steps:
        """Make the places before the first change: four indexes of the store, as in etcd."""
        if not self._ensured:
            for path in ("", "/users", "/roles"):
                yield from self._do(Request(method="PUT", path=path, dir=True, prev_exist=False))
            yield from self._do(
                Request(method="PUT", path="/enabled", val="false", prev_exist=False)
            )
            self._ensured = True

    @staticmethod
    def _do(request: Request) -> Steps:
        """Return the event, or the error of the store; raises those of consensus."""
        result = yield request._replace(path=AUTH_PREFIX + request.path)
        if isinstance(result, RaftInternal):
            raise result
        return result


def parse_credential(header: str) -> Optional[Credential]:
    """Return the credential of a well-formed Basic Authorization header (RFC 7617), else None."""
    kind, _, encoded = header.partition(" ")
    if kind.lower() != "basic":
        return None
    try:
        user, colon, password = text_of(base64.b64decode(encoded, validate=True)).partition(":")
    except ValueError:
        return None
    return Credential(user, password) if colon else None


class Guard:
    """Decides from its head whether a request may pass.

    A decision is kept with the head until Auth.version changes: the requests of verified clients
    cost no more than without auth.  Thread: reactor.
    """

    def __init__(self, auth: Auth, reactor: Reactor) -> None:
        self._auth = auth
        self._log = ThrottledLog("auth", reactor.now)

    def key(
        self, head: HttpHead, key: str, *, write: bool, recursive: bool, passed: Handler,
        refused: Handler,
    ) -> Handler:
        """Return the handler for an access to `key`; without Authorization, that of a guest."""
        def may(user: Optional[User]) -> bool:
            return self._auth.may_access(user, key, write=write, recursive=recursive)

        return self._decide(head, may, passed, refused)

    def root(
        self, head: HttpHead, passed: Handler, refused: Handler, *, hashes: bool = False
    ) -> Handler:
        """Return the handler for a request that only the role root may make.

        hashes  the answer holds password hashes: needs root without auth, too, if there are users
        """
        always = hashes and self._auth.has_users
        return self._decide(head, self._auth.is_root, passed, refused, always=always)

    def _decide(
        self, head: HttpHead, may: Callable[[Optional[User]], bool], passed: Handler,
        refused: Handler, *, always: bool = False,
    ) -> Handler:
        if not (self._auth.enabled or always):
            return passed
        verdict = self._verdict(head, may)
        if verdict is None:
            return functools.partial(self._verify, head, may, passed, refused)
        return passed if verdict else refused

    def _verdict(
        self, head: HttpHead, may: Callable[[Optional[User]], bool]
    ) -> Optional[bool]:
        """True if the request may pass; None: the password has not been verified yet."""
        header = head.headers.get("authorization", "")
        if not header:
            return may(None)
        credential = parse_credential(header)
        if credential is None:
            self._log.error("malformed basic auth encoding")
            return False
        name = credential.user
        if len(utf8(name)) > AUTH_NAME_BYTES_MAX:
            return False
        right = self._auth.checks.known(name, self._auth.stored_hash(name), credential.password)
        if right is None:
            return None
        user = self._auth.user(name)
        if right and user is not None:
            return may(user)
        why = "no such user" if user is None else "incorrect password for user"
        self._log.error(f"{why}: {name[:64]}.")
        return False

    def _verify(
        self, head: HttpHead, may: Callable[[Optional[User]], bool], passed: Handler,
        refused: Handler, request: HttpRequest,
    ) -> None:
        """Answer as soon as the password is verified."""
        if request.connection.closed:
            return
        verdict = self._verdict(head, may)
        if verdict is not None:
            answer = passed if verdict else refused
            head.parsed = self._auth.version, answer
            answer(request)
            return
        credential = parse_credential(head.headers["authorization"])
        assert credential is not None   # without one there is a verdict

        def checked(known: bool) -> None:
            if known:
                self._verify(head, may, passed, refused, request)
            elif not request.connection.closed:
                text = json_string(f"the password could not be checked{_TRY_AGAIN}")
                request.reply(503, f'{{"message":{text}}}'.encode())

        sender = Sender(credential.user, request.remote.rpartition(":")[0])
        stored = self._auth.stored_hash(credential.user)
        self._auth.checks.check(sender, stored, credential.password, checked)


# ============================================================================
# member/statistics -- Statistics of /v2/stats and metrics of /metrics: counters, histograms, traffic.
# ============================================================================


RATE_SAMPLES_MAX = 200              # append messages behind the rates of /v2/stats/self
RATE_SECONDS_MAX = 1.0              # after this long without a message the rates are 0


class RateWindow:
    """The last messages and their sizes.  Source: etcd 2.3 etcdserver/stats/queue.go.

    Differs from etcd: a single message gives 0; there the rate is infinite, which JSON lacks.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._samples: Deque[Tuple[float, int]] = collections.deque(maxlen=RATE_SAMPLES_MAX)
        self.count = 0                  # of all messages

    def add(self, size: int) -> None:
        self.count += 1
        self._samples.append((self._now(), size))

    def rates(self) -> Tuple[float, float]:
        """Return messages and bytes per second; (0, 0) when nothing moves."""
        samples = self._samples
        if not samples or self._now() - samples[-1][0] > RATE_SECONDS_MAX:
            samples.clear()
            return 0.0, 0.0
        seconds = samples[-1][0] - samples[0][0]
        if seconds <= 0:
            return 0.0, 0.0
        return len(samples) / seconds, sum(size for _, size in samples) / seconds


def format_decimal(value: float) -> str:
    """Return `value` with at most six decimals and no exponent, as Go shows such numbers."""
    return f"{value:.6f}".rstrip("0").rstrip(".")


class ServerStats:
    """The statistics of /v2/stats/self; times in unix ns.  Source: etcd 2.3 etcdserver/stats."""

    def __init__(self, name: str, member_id: int, clock: Clock) -> None:
        self.name = name
        self.member_id = member_id
        self._wall_ns = clock.wall_ns
        self.started_ns = clock.wall_ns()
        self.lead = 0                   # id of the leader last known
        self.lead_since_ns = 0          # when it became leader
        self._received = RateWindow(clock.now)
        self._sent = RateWindow(clock.now)
        self.send_append = self._sent.add       # counts a MsgApp of some size to a follower

    def became(self, lead: int) -> None:
        """Count the member `lead` as leader from now on."""
        if lead != self.lead:
            self.lead = lead
            self.lead_since_ns = self._wall_ns()

    def recv_append(self, sender: int, size: int) -> None:
        """Count a MsgApp of `size` bytes from the leader `sender`."""
        self.became(sender)
        self._received.add(size)

    def json(self, state: str) -> str:
        """Return the object of /v2/stats/self.  state: StateFollower, -Candidate or -Leader.

        Differs from etcd: before the first leader the uptime is 0s, not 292 years.
        """
        uptime_s = (self._wall_ns() - self.lead_since_ns) / NS if self.lead else 0.0
        since = format_local_time(self.lead_since_ns) if self.lead else "0001-01-01T00:00:00Z"
        leader = format_id(self.lead) if self.lead else ""
        return (
            f'{{"name":{json_string(self.name)},"id":"{format_id(self.member_id)}"'
            f',"state":"{state}","startTime":"{format_local_time(self.started_ns)}"'
            f',"leaderInfo":{{"leader":"{leader}","uptime":"{format_duration(max(uptime_s, 0.0))}"'
            f',"startTime":"{since}"}}'
            f',"recvAppendRequestCnt":{self._received.count}{_rates("recv", self._received)}'
            f',"sendAppendRequestCnt":{self._sent.count}{_rates("send", self._sent)}}}'
        )


def _rates(prefix: str, window: RateWindow) -> str:
    """Return the two rates as JSON members, without those that are 0."""
    parts = zip(("Pkg", "Bandwidth"), window.rates())
    return "".join(f',"{prefix}{what}Rate":{format_decimal(rate)}' for what, rate in parts if rate)


class FollowerStats:
    """Latency of the MsgApps sent to one follower, in ms.  Source: etcd 2.3 stats/leader.go."""

    __slots__ = ("successes", "fails", "current", "total", "squares", "minimum", "maximum")

    def __init__(self) -> None:
        self.successes = self.fails = 0
        self.current = self.total = self.squares = self.maximum = 0.0
        self.minimum = float(1 << 63)   # as etcd before the first success

    def json(self) -> str:
        count = self.successes or 1
        average = self.total / count
        deviation = max(self.squares / count - average * average, 0.0) ** 0.5
        fields = {
            "current": self.current, "average": average, "standardDeviation": deviation,
            "minimum": self.minimum, "maximum": self.maximum,
        }
        latency = ",".join(f'"{name}":{format_decimal(ms)}' for name, ms in fields.items())
        return (
            f'{{"latency":{{{latency}}}'
            f',"counts":{{"fail":{self.fails},"success":{self.successes}}}}}'
        )


class LeaderStats:
    """The statistics of /v2/stats/leader: latency and losses of each follower."""

    def __init__(self, member_id: int) -> None:
        self.member_id = member_id
        self._followers: Dict[int, FollowerStats] = {}

    def success(self, member_id: int, seconds: float) -> None:
        """Count a MsgApp that this follower answered after `seconds`."""
        stats = self._followers.setdefault(member_id, FollowerStats())
        latency = seconds * 1e3
        stats.successes += 1
        stats.current = latency
        stats.total += latency
        stats.squares += latency * latency
        stats.minimum = min(stats.minimum, latency)
        stats.maximum = max(stats.maximum, latency)

    def fail(self, member_id: int) -> None:
        self._followers.setdefault(member_id, FollowerStats()).fails += 1

    def remove(self, member_id: int) -> None:
        self._followers.pop(member_id, None)

    def json(self, followers: Iterable[int]) -> str:
        """Return the object of /v2/stats/leader, with members that no message went to as well."""
        unknown = FollowerStats()
        parts = [
            f'"{name}":{self._followers.get(member_id, unknown).json()}'
            for name, member_id in sorted((format_id(each), each) for each in followers)
        ]
        return f'{{"leader":"{format_id(self.member_id)}","followers":{{{",".join(parts)}}}}}'


class ServerCounts:
    """Counters of a member that only /metrics shows."""

    SLOW_APPLY_SECONDS = 0.1            # etcd 3's limit

    def __init__(self, heartbeat_s: float) -> None:
        self.leader_changes = 0         # leaders that became known
        self.slow_applies = 0
        self.late_heartbeats = 0        # to each follower, a period late or more
        self.turn_durations = Histogram(exponential_bounds(0.0001, 14))     # of the reactor, s
        self._heartbeat_s = heartbeat_s
        self._ticked_at = 0.0

    def tick(self, now: float, followers: int) -> None:
        """Count late heartbeats: at each tick of Raft one leaves to each of `followers`."""
        if self._ticked_at and now - self._ticked_at > 2 * self._heartbeat_s:
            self.late_heartbeats += followers
        self._ticked_at = now

    def time_apply(self, apply: Callable[[], None], now: Callable[[], float]) -> None:
        """Call apply(), and count it if it is slow."""
        started = now()
        apply()
        self.slow_applies += now() - started > self.SLOW_APPLY_SECONDS


Labels = Tuple[str, ...]
Sample = Tuple[str, str, float]     # name suffix, labels as text, value


def _label_text(names: Labels, values: Labels) -> str:
    parts = (
        '{}="{}"'.format(name, value.replace("\\", r"\\").replace('"', r'\"').replace("\n", r"\n"))
        for name, value in zip(names, values)
    )
    return ",".join(parts)


class Reading:
    """A counter or gauge that is kept elsewhere, and read when Prometheus asks."""

    __slots__ = ("kind", "_labels", "_read")

    def __init__(
        self, kind: str, labels: Labels, read: Callable[[], Mapping[Labels, float]]
    ) -> None:
        self.kind = kind                # counter or gauge
        self._labels = labels
        self._read = read

    def samples(self) -> Iterator[Sample]:
        for values, value in self._read().items():
            yield "", _label_text(self._labels, values), value


class Counter(Reading):
    """The number of events, per combination of label values."""

    __slots__ = ("_values",)

    def __init__(self, labels: Labels = ()) -> None:
        self._values: Dict[Labels, int] = {} if labels else {(): 0}
        super().__init__("counter", labels, self._values.copy)

    def inc(self, *values: str) -> None:
        self._values[values] = self._values.get(values, 0) + 1


def exponential_bounds(start: float, count: int) -> List[float]:
    """Return the bounds start * 2**n of a histogram, n < count."""
    return [start * (1 << step) for step in range(count)]


class Histogram:
    """The distribution of values over buckets.  bounds: upper, inclusive, ascending.

    Thread: one observes; any may read.
    """

    kind = "histogram"
    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect.bisect_left(self._bounds, value)] += 1
        self._sum += value

    def observe_many(self, values: List[float]) -> None:
        """Count all values: 0.04 us each instead of 0.17."""
        values.sort()
        before = 0
        for position, bound in enumerate(self._bounds):
            below = bisect.bisect_right(values, bound)
            self._counts[position] += below - before
            before = below
        self._counts[-1] += len(values) - before
        self._sum += sum(values)

    @property
    def count(self) -> int:
        return sum(self._counts)

    @property
    def mean(self) -> float:
        return self._sum / (self.count or 1)

    def samples(self, labels: str = "") -> Iterator[Sample]:
        count = self.count
        comma, below = "," if labels else "", 0
        for bound, here in zip(self._bounds, self._counts):
            below += here
            yield "_bucket", f'{labels}{comma}le="{bound!r}"', below
        yield "_bucket", f'{labels}{comma}le="+Inf"', count
        yield "_sum", labels, self._sum
        yield "_count", labels, count


class Histograms:
    """One histogram per combination of label values, shown from its first value on."""

    kind = "histogram"
    __slots__ = ("_labels", "_bounds", "_children")

    def __init__(self, bounds: Sequence[float], labels: Labels) -> None:
        self._labels = labels
        self._bounds = bounds
        self._children: Dict[Labels, Histogram] = {}

    def child(self, *values: str) -> Histogram:
        if values not in self._children:
            self._children[values] = Histogram(self._bounds)
        return self._children[values]

    def samples(self) -> Iterator[Sample]:
        for values, child in self._children.items():
            if child.count:
                yield from child.samples(_label_text(self._labels, values))


Family = Union[Reading, Histogram, Histograms]


class Metrics:
    """Named counters, readings and histograms, and their text for Prometheus (version 0.0.4)."""

    def __init__(self) -> None:
        self.before_text: Callable[[], None] = _nothing     # makes the counts complete
        self._families: Dict[str, Tuple[str, Family]] = {}

    def add(self, name: str, help: str, family: Family) -> None:
        """Show a family under `name`; replaces an older one."""
        self._families[name] = help, family

    def counter(self, name: str, help: str, labels: Labels = ()) -> Counter:
        """Add and return a counter."""
        counter = Counter(labels)
        self.add(name, help, counter)
        return counter

    def gauge(self, name: str, help: str, read: Callable[[], float]) -> None:
        """Add a number that goes up and down."""
        self.add(name, help, Reading("gauge", (), lambda: {(): read()}))

    def fact(self, name: str, help: str, label: str, read: Callable[[], str]) -> None:
        """Add a text: the value of `label` of a sample that is always 1."""
        self.add(name, help, Reading("gauge", (label,), lambda: {(read(),): 1}))

    def total(
        self, name: str, help: str, read: Callable[[], Mapping[Labels, float]],
        labels: Labels = (),
    ) -> None:
        """Add counters that are kept elsewhere: label values -> count."""
        self.add(name, help, Reading("counter", labels, read))

    def text(self) -> str:
        """Return all families that have a value, by name."""
        self.before_text()
        lines: List[str] = []
        for name, (help, family) in sorted(self._families.items()):
            samples = list(family.samples())
            if not samples:
                continue
            lines += [f"# HELP {name} {help}", f"# TYPE {name} {family.kind}"]
            for suffix, labels, value in samples:
                shown = f"{{{labels}}}" if labels else ""
                lines.append(f"{name}{suffix}{shown} {value!r}")
        return "\n".join(lines) + "\n"


class Traffic:
    """Counts the messages that the transport sends and receives.

    sent_bytes, sent_failures, received_bytes are by member id.
    """

    def __init__(
        self, stats: ServerStats, leader_stats: LeaderStats, now: Callable[[], float]
    ) -> None:
        self.sent_bytes: Dict[int, int] = {}
        self.sent_failures: Dict[int, int] = {}
        self.received_bytes: Dict[int, int] = {}
        labels = ("sendingType", "remoteID", "msgType")
        self.latencies = Histograms(exponential_bounds(0.0005, 13), labels)
        self.failures = Counter(labels)
        self.round_trips = Histograms(exponential_bounds(0.0001, 16), ("To",))
        self._stats = stats
        self._leader_stats = leader_stats
        self._now = now
        self._sent_at: Dict[int, float] = {}    # follower -> when entries went to it
        self._labels: Dict[Tuple[str, int, int], Labels] = {}

    def sent(self, sent: Sent) -> None:
        """Count a message that has left, or could not leave."""
        to, message = sent.to, sent.message
        key = (sent.channel, to, message.type)
        labels = self._labels.get(key)
        if labels is None:
            name = "Msg" + MsgType(message.type).name.title().replace("_", "")
            labels = self._labels[key] = (sent.channel, format_id(to), name)
        if sent.ok:
            self.sent_bytes[to] = self.sent_bytes.get(to, 0) + sent.size
            self.latencies.child(*labels).observe(sent.seconds)
        else:
            self.sent_failures[to] = self.sent_failures.get(to, 0) + 1
            self.failures.inc(*labels)
        if message.type == MsgType.APP:
            self._sent_append(sent)

    def _sent_append(self, sent: Sent) -> None:
        self._stats.send_append(sent.size)
        if not sent.ok:
            self._leader_stats.fail(sent.to)
        elif sent.message.entries:
            self._sent_at.setdefault(sent.to, self._now() - sent.seconds)

    def received(self, sender: int, message: Message, size: int) -> None:
        """Count a message; the latency of a follower is from entries to its next answer."""
        if sender in self.received_bytes or len(self.received_bytes) < REMOTES_MAX:
            self.received_bytes[sender] = self.received_bytes.get(sender, 0) + size
        if message.type == MsgType.APP:
            self._stats.recv_append(sender, size)
        elif message.type == MsgType.APP_RESP and sender in self._sent_at:
            self._leader_stats.success(sender, self._now() - self._sent_at.pop(sender))

    def round_trip(self, member_id: int, seconds: float) -> None:
        """Count the answer of a peer to a probe."""
        self.round_trips.child(format_id(member_id)).observe(seconds)


# ============================================================================
# member/journal -- The journal: batches on their way to the disk, in order; threads `reactor` and `wal`.
# ============================================================================


class Batch:
    """The state and entries of one visit to the disk, and the messages held back until then."""

    __slots__ = ("hard_state", "entries", "snapshot", "must_sync", "held", "mark")

    def __init__(self) -> None:
        self.hard_state: Optional[HardState] = None
        self.entries: List[Entry] = []
        self.snapshot: Optional[Snapshot] = None    # received from the leader; before entries
        self.must_sync = False
        self.held: List[Message] = []
        self.mark: Optional[Mark] = None


class WalJob(NamedTuple):
    """One visit to the disk, in this order; empty parts are left out.

    A snapshot's file is complete before any entry behind it is written: after a crash between
    the two, the log fits the snapshot before.
    """

    record: bytes                       # of the snapshot
    snapshot: Optional[Snapshot]        # its file
    data: Sequence[bytes]               # frames to append
    cut: Optional[Cut]
    release_to: int                     # unlock segments before this index; 0: none
    done: Callable[[], None]            # called on the reactor when all of it is durable


class WalWriter:
    """The wal thread: one write and one fdatasync per job.

    A failure is final: nobody knows which bytes are on disk, so no later job is begun and no
    write is acknowledged any more.  A full disk is no failure: the step that met it has left
    nothing, and is repeated until there is space.
    """

    FULL_SECONDS = 0.25                 # between two tries while the disk is full
    # The reactor syncs a small write itself: a write through the thread costs two hops, about
    # as long as a short sync.  A slow sync ends that for the next QUICK_SYNCS_MIN syncs, so a
    # disk that stalls stops the reactor at most once.
    INLINE_BYTES_MAX = 1 << 14
    INLINE_MEAN_SECONDS = 0.0005        # above: readers would wait for the disk too often
    INLINE_SLOW_SECONDS = 0.005
    QUICK_SYNCS_MIN = 100

    def __init__(
        self, wal: Wal, snapshotter: Snapshotter, reactor: Reactor, *,
        failed: Callable[[BaseException], None], full: Callable[[str], None],
    ) -> None:
        self._wal = wal
        self._snapshotter = snapshotter
        self._reactor = reactor
        self._failed = failed
        self._full = full               # called on the reactor, with the reason, or "" when over
        self._is_full = False
        self._jobs: queue.SimpleQueue[Optional[WalJob]] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="wal", daemon=True)
        self.sync_durations = Histogram(exponential_bounds(0.001, 14))  # write and fdatasync, s
        self._queued = 0                # jobs that the thread was given; owner: the reactor
        self._finished = 0              # jobs that the thread has done; owner: the thread
        self._deferred: Optional[WalJob] = None     # the reactor syncs it in its next turn
        self._mean_s = self.INLINE_MEAN_SECONDS     # of a sync, over about the last 16
        self._quick_syncs = 0           # in a row
        self.inline_syncs = 0

    def start(self) -> None:
        self._thread.start()

    def submit(self, job: WalJob) -> None:
        """Queue one visit.  Thread: reactor."""
        self._queue_deferred()
        if self._may_sync_inline(job):
            # In the next turn: messages to followers leave at the end of this one.
            self._deferred = job
            self._reactor.call_soon(self._sync_inline)
        else:
            self._queue(job)

    def _queue(self, job: WalJob) -> None:
        self._queued += 1
        self._jobs.put(job)

    def _queue_deferred(self) -> None:
        job, self._deferred = self._deferred, None
        if job is not None:
            self._queue(job)

    def _may_sync_inline(self, job: WalJob) -> bool:
        return (
            self._quick_syncs >= self.QUICK_SYNCS_MIN
            and self._mean_s < self.INLINE_MEAN_SECONDS
            and self._queued == self._finished
            and not (job.record or job.snapshot or job.cut or job.release_to)
            and sum(map(len, job.data)) <= self.INLINE_BYTES_MAX
        )

    def _sync_inline(self) -> None:
        """Do the deferred job on the reactor's thread, unless a socket became ready meanwhile."""
        if self._deferred is None or self._reactor.ready_sockets:
            self._queue_deferred()
            return
        job = self._deferred
        try:
            self._write_frames(job.data)
        except DiskFull:
            self._queue_deferred()      # the thread repeats it until there is space
        except OSError as error:
            self._deferred = None
            self._fail(error)
        else:
            self._deferred = None
            self.inline_syncs += 1
            job.done()

    def stop(self) -> None:
        """Finish the queued jobs if there is space, close the files, end the thread.

        Blocks for the last sync.
        """
        self._queue_deferred()
        self._stopping.set()
        self._jobs.put(None)
        if self._thread.is_alive():
            self._thread.join()
        self._wal.close()               # if the thread never ran

    def _run(self) -> None:
        try:
            with contextlib.closing(self._wal):
                while True:
                    job = self._jobs.get()
                    if job is None or not self._do(job):
                        return
                    self._finished += 1
                    self._reactor.call_soon_threadsafe(job.done)
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        package_logger("wal").critical("the write-ahead log failed: %s", error, exc_info=True)
        self._reactor.call_soon_threadsafe(self._failed, error)

    def _do(self, job: WalJob) -> bool:
        """Do all of a job; False: given up by stop(), as the disk stayed full."""
        for step in self._steps(job):
            while not self._try(step):
                if self._stopping.wait(self.FULL_SECONDS):
                    return False
        return True

    def _steps(self, job: WalJob) -> List[Callable[[], None]]:
        """Return the steps of a job, in order; none leaves anything behind on a full disk."""
        steps: List[Callable[[], None]] = []
        if job.record:
            steps.append(functools.partial(self._wal.write, job.record, sync=True))
        if job.snapshot is not None:
            steps.append(functools.partial(self._snapshotter.save, job.snapshot))
        if job.data:
            steps.append(functools.partial(self._write_frames, job.data))
        if job.cut is not None:
            steps.append(functools.partial(self._wal.cut, job.cut))
        if job.release_to:
            steps.append(functools.partial(self._wal.release_to, job.release_to))
        return steps

    def _write_frames(self, data: Sequence[bytes]) -> None:
        now = self._reactor.now
        started = now()
        self._wal.write(*data, sync=True)
        seconds = now() - started
        self.sync_durations.observe(seconds)
        self._mean_s += (seconds - self._mean_s) / 16
        self._quick_syncs = self._quick_syncs + 1 if seconds < self.INLINE_SLOW_SECONDS else 0

    def _try(self, step: Callable[[], None]) -> bool:
        """Do a step; False if the disk is full.  Reports each change of that to the reactor."""
        try:
            step()
        except DiskFull as error:
            if not self._is_full:
                self._is_full = True
                self._reactor.call_soon_threadsafe(self._full, str(error))
            return False
        if self._is_full:
            self._is_full = False
            self._reactor.call_soon_threadsafe(self._full, "")
        return True


WORK_ENTRIES_MAX = 400              # of the log, applied in one turn: 10 ms
WORK_BYTES_MAX = 1 << 19            # of entries encoded, and of those applied, in one turn: 3 ms


def first_entries(entries: Sequence[Entry], bytes_max: int) -> int:
    """Return how many of `entries` have `bytes_max` of data together, or more with the last one."""
    sizes = [len(entry.data) for entry in entries]
    if sum(sizes) <= bytes_max:
        return len(entries)
    return bisect.bisect_left(list(itertools.accumulate(sizes)), bytes_max) + 1


def first_part(entries: Sequence[Entry]) -> int:
    """Return how many of `entries` are the work of one turn."""
    return min(first_entries(entries, WORK_BYTES_MAX), WORK_ENTRIES_MAX)


class Journal:
    """Readys on their way to the disk, in batches: while one is written the next one gathers.

    A batch becomes durable as a whole; then durable(batch) sends the messages held back, and
    counts the entries.  Thread: reactor.
    """

    def __init__(
        self, wal: Wal, writer: WalWriter, hard_state: HardState,
        durable: Callable[[Batch], None],
    ) -> None:
        self.writer = writer
        self.durable_commit = hard_state.commit     # commit index that a crash cannot take back
        self.busy = False                           # the writer has a job
        self.visits = 0                             # jobs given to the writer
        self.batch_entries = Histogram(exponential_bounds(1, 14))   # in one visit
        self._wal = wal
        self._durable = durable
        self._batch = Batch()
        self._waiting: Deque[Batch] = collections.deque()   # complete ones, before _batch
        self._steps: Optional[Generator[None, None, None]] = None   # the rest of a long batch
        self._release_to = 0
        self._record: Optional[Tuple[EntryID, Callable[[], None]]] = None   # waits for the writer

    @property
    def is_encoding(self) -> bool:
        """True if the rest of a long batch waits for submit() in the next turn."""
        return self._steps is not None

    def add(self, ready: Ready) -> None:
        """Add a Ready's state and entries, and the messages that it holds back."""
        batch = self._batch
        if ready.snapshot is not None:
            if batch.entries or batch.held or batch.snapshot:
                self._waiting.append(batch)
                self._batch = batch = Batch()
            batch.snapshot = ready.snapshot
        if ready.hard_state is not None:
            batch.hard_state = ready.hard_state
        batch.entries += ready.entries
        batch.must_sync = batch.must_sync or ready.must_sync
        batch.held += ready.held
        batch.mark = ready.mark

    def sync_commit(self, state: HardState) -> None:
        """Write this commit index soon; durable_commit tells when it is on disk."""
        self._batch.hard_state = state
        self._batch.must_sync = True
        if self._batch.mark is None:
            self._batch.mark = Mark(0, -1)          # stands for no entries
        self.submit()

    def submit(self) -> None:
        """Give the writer the next batch if it is idle; a commit index alone waits for company."""
        self._encode_on()
        if self._record is not None and not self.busy:
            self._write_record(*self._record)
        while not self.busy:
            batch = self._waiting.popleft() if self._waiting else self._batch
            if batch is self._batch:
                if batch.mark is None or not (batch.must_sync or batch.held):
                    return
                self._batch = Batch()
            if batch.must_sync:
                self._write_batch(batch)
                return
            if self._batch.hard_state is None:      # it travels with the next one that syncs
                self._batch.hard_state = batch.hard_state
            batch.hard_state = None
            self._durable(batch)

    def record_snapshot(self, snapshot_id: EntryID, done: Callable[[], None]) -> None:
        """Write the record of a snapshot file to come, before the next batch; then done()."""
        self._record = (snapshot_id, done)
        self.submit()

    def _write_record(self, snapshot_id: EntryID, done: Callable[[], None]) -> None:
        def written() -> None:
            self.busy = False
            done()

        self._record = None
        record = self._wal.encode_snapshot(snapshot_id)
        self._submit_job(WalJob(record, None, (), None, 0, written))

    def release(self, index: int) -> None:
        """Unlock the segments that only hold entries before `index`, with the next batch."""
        self._release_to = index

    def close(self) -> None:
        """Write all batches, and end the writer.  Blocks for the last sync."""
        while self._steps is not None:
            self._encode_on()
        for batch in (*self._waiting, self._batch):
            self.writer.submit(finish(self._encode_job(batch, _nothing)))
        self.writer.stop()

    def _write_batch(self, batch: Batch) -> None:
        """Write a batch; a long one in parts, which the next turns encode."""
        self.busy = True
        self._steps = self._write_steps(batch)
        self._encode_on()

    def _encode_on(self) -> None:
        if self._steps is not None and next(self._steps, self) is self:
            self._steps = None

    def _write_steps(self, batch: Batch) -> Generator[None, None, None]:
        entries = batch.entries
        count = first_part(entries)
        while count < len(entries) and batch.snapshot is None:
            self.batch_entries.observe(count)
            data = yield from self._wal.encode_steps(None, entries[:count])
            del entries[:count]
            self._submit_job(WalJob(b"", None, data, None, 0, _nothing))
            yield
            count = first_part(entries)

        def written() -> None:
            self.busy = False
            if batch.hard_state is not None:
                self.durable_commit = batch.hard_state.commit
            self._durable(batch)

        self.batch_entries.observe(count)
        self._submit_job((yield from self._encode_job(batch, written)))

    def _submit_job(self, job: WalJob) -> None:
        self.busy = True
        self.visits += 1
        self.writer.submit(job)

    def _encode_job(
        self, batch: Batch, done: Callable[[], None]
    ) -> Generator[None, None, WalJob]:
        record = b""
        if batch.snapshot is not None:
            record = self._wal.encode_snapshot(EntryID(batch.snapshot.term, batch.snapshot.index))
        data = yield from self._wal.encode_steps(batch.hard_state, batch.entries)
        release_to, self._release_to = self._release_to, 0
        is_full = self._wal.segment_full(after_snapshot=release_to > 0)
        cut = self._wal.encode_cut() if is_full else None
        return WalJob(record, batch.snapshot, data, cut, release_to, done)


# ============================================================================
# member/snapshots -- Snapshots of the store: written in slices, then the log behind them is compacted.
# ============================================================================


class SnapshotJob:
    """Encodes the store as a snapshot file, in slices between other work."""

    SLICE_S = 0.002

    def __init__(
        self, store: Store, snapshot_id: EntryID, voters: Tuple[int, ...],
        now: Callable[[], float],
    ) -> None:
        self.id = snapshot_id
        self.etcd_index = store.current_index
        self.done: Optional[SnapshotFile] = None
        self.started = now()            # monotonic
        self.work_seconds = 0.0         # of all slices
        self.walked_bytes = 0           # so far, of the store's JSON
        self._voters = voters
        self._now = now
        self._walk = store.snapshot_chunks()
        self._steps = self._run()

    def begin(self) -> None:
        """Take the first step, which fixes the state of the snapshot."""
        next(self._steps, None)

    def work(self) -> None:
        """Work for a few milliseconds; in the end `done` is the file to write."""
        started = self._now()
        for _ in self._steps:
            if self._now() >= started + self.SLICE_S:
                break
        self.work_seconds += self._now() - started

    def _run(self) -> Iterator[None]:
        """Walk, then sum: a thread for the checksum would hold Python's lock most of the time."""
        pieces: List[bytes] = []
        for chunk in self._walk:
            pieces.append(chunk)
            self.walked_bytes += len(chunk)
            yield
        before, after = encode_snapshot_around(sum(map(len, pieces)), self._voters, self.id)
        pieces = [before, *pieces, after]
        crc = 0
        for piece in pieces:
            for offset in range(0, len(piece), CRC_BLOCK_BYTES):
                crc = crc32c(memoryview(piece)[offset:offset + CRC_BLOCK_BYTES], crc)
                yield
        self.done = SnapshotFile(self.id, pieces, sum(map(len, pieces)), crc)

    def cancel(self) -> None:
        """Give the walk up."""
        self._walk.close()


SnapshotReceiver = Callable[[SnapshotFile, int], None]  # gets a snapshot, and its etcd index


SNAPSHOT_CHEAP_NODES = 10_000       # walked in 40 ms; more nodes: see is_due


class SnapshotKeeper:
    """Decides when to write a snapshot, writes it, and lends snapshots to followers and clients.

    Thread: reactor.
    """

    def __init__(
        self, reactor: Reactor, journal: Journal, snapshotter: Snapshotter, index: int,
        nodes: int, failed: Callable[[BaseException], None],
    ) -> None:
        self.index = index                          # of the newest snapshot file
        self.nodes = nodes                          # in it
        self.least_index = 0                        # an older file does not fit every follower
        self.snapshotter = snapshotter
        self.work_durations = Histogram(exponential_bounds(0.001, 14))  # of the reactor, s
        self.save_durations = Histogram(exponential_bounds(0.001, 14))  # from begin to file, s
        self._reactor = reactor
        self._journal = journal
        self._failed = failed
        self._job: Optional[SnapshotJob] = None     # a walk over the store
        self._receivers: List[SnapshotReceiver] = []    # that get it, instead of the disk
        self._waiting: List[SnapshotReceiver] = []      # that get the next one
        self._saving = False                        # the walk is over, the file not yet there
        self._compact_to = 0                        # entries up to here may be dropped
        self._not_before = 0.0                      # no new one while the disk is full (monotonic)
        self._cache: Optional[Snapshot] = None      # the newest file, while followers want it
        self._loading = False

    @property
    def busy(self) -> bool:
        return self._job is not None or self._saving

    def is_due(self, raft_index: int, nodes: int, count: int) -> bool:
        """True if a new file is needed, and the disk was not just full.

        The newest one is older than `count` entries, or than least_index.

        A walk takes 4 us per node.  That of a large store waits for as many entries as it has
        nodes, as it would cost more than the entries do; they take less memory than the nodes.
        The nodes of the last snapshot count: a store that only grows has one at each doubling.
        """
        behind = raft_index - self.index
        if not self.index < self.least_index <= raft_index and (
            behind <= count or behind <= min(nodes, self.nodes) - SNAPSHOT_CHEAP_NODES
        ):
            return False
        return self._reactor.now() >= self._not_before

    def begin(
        self, store: Store, applied: EntryID, voters: Tuple[int, ...], *, lent: bool
    ) -> None:
        """Begin to walk the store, which has applied entries up to `applied`; work() goes on.

        lent  for the receivers that wait, instead of the disk
        """
        if lent:
            self._receivers, self._waiting = self._waiting, []
        else:
            SERVER_LOG.info(
                "start to snapshot (applied: %d, lastsnap: %d)", applied.index, self.index
            )
            self.nodes = len(store)
        self._job = SnapshotJob(store, applied, voters, self._reactor.now)
        self._job.begin()               # now: the first step fixes the state

    @property
    def is_requested(self) -> bool:
        """True if a follower or a client waits for a snapshot, and none is in the making."""
        is_old = self.index < self.least_index and self._reactor.now() >= self._not_before
        return (bool(self._waiting) or is_old) and not self.busy

    def request(self, receiver: SnapshotReceiver) -> None:
        """Call receiver(file, etcd index) with the state of a later moment, without the disk."""
        self._waiting.append(receiver)

    def withdraw(self, receiver: SnapshotReceiver) -> None:
        """Forget a receiver; a walk without receivers ends."""
        if receiver in self._waiting:
            self._waiting.remove(receiver)
        elif receiver in self._receivers:
            self._receivers.remove(receiver)
            if self._job is not None and not self._receivers:
                self._job.cancel()
                self._job = None

    def work(self, compact: Callable[[int], bool]) -> None:
        """Do a slice of the walk; at its end write record and file.

        compact  drops a slice of the log up to an index; True when all of it is dropped
        """
        if self._compact_to:
            if compact(self._compact_to):
                self._compact_to = 0
            else:
                self._reactor.call_soon(_nothing)
        if self._job is None:
            return
        if self._job.done is None:
            self._job.work()
        file = self._job.done
        if file is None:
            self._reactor.call_soon(_nothing)   # the next slice: in the next turn, at once
            return
        if self._receivers:
            receivers, etcd_index = self._receivers, self._job.etcd_index
            self._receivers, self._job = [], None
            for receiver in receivers:
                receiver(file, etcd_index)
            return
        started = self._job.started
        self.work_durations.observe(self._job.work_seconds)
        self._job, self._saving = None, True
        self._journal.record_snapshot(file.id, lambda: self._write_file(file, started))

    def _write_file(self, file: SnapshotFile, started: float) -> None:
        """Write the file, after its record is in the log, on another thread: the log must go on."""
        def done(error: Optional[BaseException], _: Any) -> None:
            self._saving = False
            if isinstance(error, (DiskFull, WorkersBusy)):
                SERVER_LOG.error("no snapshot could be saved: %s", error)
                self._not_before = self._reactor.now() + PURGE_SECONDS
                return
            if error is not None:
                self._failed(error)
                return
            self.save_durations.observe(self._reactor.now() - started)
            index = file.id.index
            SERVER_LOG.info("saved snapshot at index %d", index)
            self._cache = None
            if index > self.index:
                self.index = index
                self._journal.release(index)
            self._compact_to = max(1, index - SNAPSHOT_CATCHUP_ENTRIES)

        self._reactor.run_blocking(self.snapshotter.write, file, kind=FILE_WORK, done=done)

    def received(self, index: int) -> None:
        """Give up a walk over the old store, which the leader's snapshot has replaced."""
        if self._job is not None:
            self._job.cancel()
            self._job = None
            self._waiting, self._receivers = self._receivers + self._waiting, []
        self.index, self.nodes = index, 0       # not counted: the next file comes sooner
        self._cache = None

    def newest(self, member_id: int, *, is_v3: bool) -> Optional[Snapshot]:
        """Return the newest snapshot for a follower that is too far behind; None: not ready.

        is_v3  the follower may be of etcd 3.x, which ignores a snapshot from before its addition:
               then a new one is due
        """
        if self._cache is None and self.index and not self._loading:
            self._loading = True
            self._reactor.run_blocking(self.snapshotter.load, kind=FILE_WORK, done=self._loaded)
        snapshot = self._cache
        if snapshot is None or self.index < self.least_index:
            return None
        if is_v3 and member_id not in snapshot.voters:
            self.least_index = snapshot.index + 1
            return None
        return snapshot

    def _loaded(self, error: Optional[BaseException], snapshot: Any) -> None:
        self._loading = False
        if error is not None:
            SERVER_LOG.error("cannot read the snapshot file: %s", error)
            return
        self._cache = snapshot
        # A damaged file was put aside: the one read is older, and the next one is due sooner.
        self.index = min(self.index, snapshot.index if snapshot is not None else 0)
        self._reactor.call_later(30.0, self._drop_cache)

    def _drop_cache(self) -> None:
        self._cache = None


# ============================================================================
# member/waiting -- Requests that wait for consensus: callbacks of proposals, late proposals, quorum reads.
# ============================================================================


Done = Callable[[Any], None]


class Proposals:
    """The callbacks of requests on their way through consensus, by request id."""

    def __init__(self, timeout_s: float) -> None:
        self.failed = 0                 # timed out, or refused as one too many
        self.timeout_s = timeout_s
        self._callbacks: Dict[int, Done] = {}
        self._deadlines: Deque[Tuple[float, int]] = collections.deque()

    def __len__(self) -> int:
        return len(self._callbacks)

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._callbacks

    def add(self, request_id: int, done: Done, now: float) -> bool:
        """Call done(result) when the entry with this id is applied, or fails; False: too many."""
        if len(self._callbacks) >= PROPOSALS_PENDING_MAX:
            self.failed += 1
            return False
        self._callbacks[request_id] = done
        self._deadlines.append((now + self.timeout_s, request_id))
        return True

    def pop(self, request_id: int) -> Optional[Done]:
        """Forget a request and return its callback; None if it is no request of this member."""
        return self._callbacks.pop(request_id, None)

    def expire(self, now: float, error: Callable[[float], EtcdError]) -> int:
        """Fail requests that waited too long with error(start time); return how many.

        WORK_ENTRIES_MAX at most: then call again.
        """
        deadlines, expired = self._deadlines, 0
        while expired < WORK_ENTRIES_MAX and deadlines and (
            deadlines[0][0] <= now or deadlines[0][1] not in self._callbacks
        ):
            deadline, request_id = deadlines.popleft()
            done = self._callbacks.pop(request_id, None)
            if done is not None:
                expired += 1
                self.failed += 1
                done(error(deadline - self.timeout_s))
        return expired

    def fail_all(self, error: EtcdError) -> None:
        self._deadlines.clear()
        while self._callbacks:
            self._callbacks.popitem()[1](error)


class LateProposals:
    """Proposals that peers forwarded while there was no leader, kept for the next one.

    After two election timeouts the clients have given up, and the proposals are dropped.
    """

    def __init__(self, keep_s: float) -> None:
        self._keep_s = keep_s
        self._entries: Deque[Tuple[float, Entry]] = collections.deque()     # with deadlines
        self._bytes = 0                 # of their data

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, entries: Sequence[Entry], now: float) -> None:
        """Keep copies, as far as there is room."""
        until = now + self._keep_s
        for entry in entries:
            if len(self._entries) < PROPOSALS_PENDING_MAX and self._bytes <= QUEUED_BYTES_MAX:
                self._entries.append((until, Entry(entry.type, data=entry.data)))
                self._bytes += len(entry.data)

    def expire(self, now: float) -> None:
        while self._entries and self._entries[0][0] < now:
            self._bytes -= len(self._entries.popleft()[1].data)

    def take(self, now: float) -> List[Entry]:
        """Return the entries that have not expired; none is kept any more."""
        self.expire(now)
        entries = [entry for _, entry in self._entries]
        self._entries.clear()
        self._bytes = 0
        return entries


class QuorumReads:
    """GET with quorum=true by MsgReadIndex: all that wait share one question to the leader.

    One question is under way at a time; requests that arrive meanwhile share the next.  A question
    without an answer is asked again after two ticks: its leader is gone, or not ready.
    Thread: reactor.  Source: Raft thesis §6.4.
    Differs from etcd 2.3, which writes each such read into its log.
    """

    def __init__(self, member_id: int, first_id: int) -> None:
        self.enabled = False            # every member can answer; else reads go through the log
        self._member_id = member_id
        self._question = first_id       # number of the last one, unique for this member
        self._waiting: List[Request] = []
        self._asked: List[Request] = []     # those of the question under way
        self._index = 0                 # its answer: the index to apply before; 0: not known
        self._ticks = 0                 # since it was asked

    def __len__(self) -> int:
        return len(self._waiting) + len(self._asked)

    def add(self, request: Request) -> None:
        """Serve `request` when the store is as far as the cluster is now."""
        self._waiting.append(request)

    def tick(self, proposals: Container[int]) -> None:
        """Give up an unanswered question, and requests that are not among `proposals` any more."""
        self._ticks += 1
        if self._asked and not self._index and self._ticks > 2:
            again, self._asked = self._asked + self._waiting, []
            self._waiting = [request for request in again if request.id in proposals]

    def take(self, node: RawNode, applied: int) -> List[Request]:
        """Ask the leader if requests wait; return the requests that can be served now."""
        served: List[Request] = []
        while True:
            if not self._asked and self._waiting:
                self._ask(node)
            for context, index in node.confirmed_reads():
                if context == self._context and self._asked:
                    self._index = index
            if not (self._index and applied >= self._index):
                return served
            served += self._asked
            self._asked, self._index = [], 0

    @property
    def _context(self) -> bytes:
        return struct.pack(">QQ", self._member_id, self._question)

    def _ask(self, node: RawNode) -> None:
        self._question = (self._question + 1) & UINT64_MAX
        self._asked, self._waiting = self._waiting, []
        self._ticks = self._index = 0
        node.read_index(self._context)


# ============================================================================
# member/leadership -- Leadership: which member leads, and how a leader gives leadership to another member.
# ============================================================================


class Leadership:
    """The leader as this member sees it, and the transfer of leadership from this member.

    active_since  member id -> unix seconds since when its links are up; 0: down

    Source: Raft thesis §3.10; etcd 3 server.go, TransferLeadership (2.3 has none).
    """

    COMMIT_DELAY_SECONDS = 0.001

    def __init__(
        self, node: RawNode, journal: Journal, reactor: Reactor, config: ServerConfig,
        active_since: Callable[[int], float],
    ) -> None:
        self._node = node
        self._journal = journal
        self._reactor = reactor
        self._active_since = active_since
        self._heartbeat_s = config.heartbeat_ms / 1000
        self._election_s = config.election_ms / 1000
        self._seen = 0                  # the leader at the last look
        self._since = 0.0               # when a leader became known (monotonic); 0: never
        self._removal_term = 0          # the term of the last transfer before a removal
        self._visit = 0                 # of the journal, at the last tick; 0: it was idle
        self._visit_ticks = 0           # that the visit has taken
        self._is_commit_scheduled = False

    def observe(self) -> bool:
        """Log a change of leader, in etcd's words; True if there was one since the last call."""
        raft, seen = self._node.raft, self._seen
        lead = raft.lead
        if lead == seen:
            return False
        log, me, old, new = package_logger("raft.node"), *map(format_id, (raft.id, seen, lead))
        if not lead:
            log.info("%s lost leader %s at term %d", me, old, raft.term)
        elif not seen:
            log.info("%s elected leader %s at term %d", me, new, raft.term)
        else:
            log.info("%s changed leader from %s to %s at term %d", me, old, new, raft.term)
        self._seen = lead
        if lead:
            self._since = self._reactor.now()
        return True

    def has_links(self, since_s: float = math.inf) -> bool:
        """Leader: True if links to a quorum are up; others: True if the one to the leader is.

        since_s  the links have been up since this time at the latest, unix seconds
        """
        raft = self._node.raft
        if raft.role is not RaftRole.LEADER:
            return 0 < self._active_since(raft.lead) <= since_s
        up = sum(v == raft.id or 0 < self._active_since(v) <= since_s for v in raft.voters)
        return up > len(raft.voters) // 2

    def explain_timeout(self, started: float) -> EtcdError:
        """Say why a request got no answer (etcd 2.3: the same three sentences).

        started  when the request came, monotonic
        """
        cause = "etcdserver: request timed out"
        started_s = self._reactor.wall_ns() / NS - (self._reactor.now() - started)
        if self._since and self._since - 2 * self._election_s < started < self._since:
            cause += ", possibly due to previous leader failure"
        elif self._node.raft.lead and not self.has_links(started_s):
            cause += ", possibly due to connection lost"
        return RequestTimeout(cause)

    def schedule_commit_broadcast(self) -> None:
        """Send the new commit index to followers if no entries follow within 1 ms to carry it."""
        if self._node.commit_unsent and not self._is_commit_scheduled:
            self._is_commit_scheduled = True
            self._reactor.call_later(self.COMMIT_DELAY_SECONDS, self._broadcast_commit)

    def _broadcast_commit(self) -> None:
        self._is_commit_scheduled = False
        self._node.broadcast_commit()

    # -- leadership transfer -------------------------------------------------

    def transfer(self, beyond: int = -1) -> int:
        """Leader: transfer leadership to the reachable member with the most of our log.

        Returns its id, 0 if there is none or we do not lead.  Proposals are refused until the
        transferee leads, or has not done so for an election timeout.

        beyond  the transferee must have more of our log on its disk than this index
        """
        raft = self._node.raft
        if raft.role is not RaftRole.LEADER:
            return 0
        transferee = max((
            (progress.match_index, id) for id, progress in raft.progress.items()
            if id != raft.id and progress.match_index > beyond and self._active_since(id) > 0
        ), default=(0, 0))[1]
        if transferee:
            SERVER_LOG.info(
                "leadership transfer %s -> %s", format_id(raft.id), format_id(transferee)
            )
            self._node.transfer_leader(transferee)
        return transferee

    def transfer_before_removal(self, changes: Iterable[ConfChange]) -> None:
        """Transfer leadership if one of `changes`, about to be proposed, removes us; once a term.

        A leader that removes itself may exit before its followers learn that the entry is
        committed.  Of two members the second one then waits for ever for the vote of the first
        (thesis §4.2.2).  If no other member takes over, this one proposes the change all the same.
        """
        raft = self._node.raft
        if raft.term != self._removal_term and any(
            change.type == ConfChangeType.REMOVE_NODE and change.node_id == raft.id
            for change in changes
        ) and self.transfer():
            self._removal_term = raft.term

    def transfer_before_entries(self, entries: Iterable[Entry]) -> None:
        """Do the same for the proposals of another member."""
        for entry in entries:
            if entry.type == EntryType.CONF_CHANGE:
                with contextlib.suppress(CodecError):
                    self.transfer_before_removal((decode_conf_change(entry.data),))

    def watch_disk(self) -> None:
        """Transfer leadership if our disk has not answered for an election timeout; every tick.

        Heartbeats do not need the disk, so no follower would notice.  The transferee must have
        more on its disk than we have on ours: where all members share one slow disk, a transfer
        would win nothing.
        """
        journal, raft = self._journal, self._node.raft
        visit = journal.visits if journal.busy else 0
        self._visit_ticks = self._visit_ticks + 1 if visit and visit == self._visit else 0
        self._visit = visit
        if self._visit_ticks >= raft.config.election_ticks and not raft.transferee:
            if self.transfer(beyond=raft.log.stable):
                SERVER_LOG.warning(
                    "stepped aside: the disk has not answered for %d ms",
                    round(self._visit_ticks * self._heartbeat_s * 1000),
                )

    def leave(self, proposals: Proposals, done: Callable[[], None]) -> None:
        """Transfer leadership and let `proposals` get their answer; then call done().

        Takes one election timeout at most.
        """
        deadline = self._reactor.now() + self._election_s
        self._wait_to_leave(proposals, self.transfer(), deadline, done)

    def _wait_to_leave(
        self, proposals: Proposals, transferee: int, deadline: float, done: Callable[[], None]
    ) -> None:
        raft, call_later = self._node.raft, self._reactor.call_later
        is_unled = raft.lead in (0, raft.id)
        is_waiting = is_unled if transferee else raft.lead and len(proposals)
        if is_waiting and self._reactor.now() < deadline:
            call_later(0.005, self._wait_to_leave, proposals, transferee, deadline, done)
        elif transferee and not is_unled:
            # Followers may forward proposals to us until they hear the new leader: pass them on.
            call_later(2 * self._heartbeat_s, self._wait_to_leave, proposals, 0, deadline, done)
        else:
            done()


# ============================================================================
# member/upkeep -- Upkeep: publication, cluster version, expiry of keys, removal of old files.
# ============================================================================


Propose = Callable[[Request, Done], None]       # as EtcdServer.do


def publish(
    config: ServerConfig, cluster: Cluster, member_id: int, reactor: Reactor, propose: Propose,
    done: Callable[[], None],
) -> None:
    """Publish this member's name and client URLs, again until it is applied; then call done()."""

    def applied(result: Any) -> None:
        if isinstance(result, ServerStopped):
            return
        if isinstance(result, EtcdError):
            SERVER_LOG.error("publish error: %s", result.cause)
            reactor.call_later(
                SYNC_SECONDS, publish, config, cluster, member_id, reactor, propose, done
            )
            return
        done()
        _check_peer_urls(config, cluster.members.get(member_id))
        SERVER_LOG.info(
            "published {Name:%s ClientURLs:[%s]} to cluster %s", config.name,
            " ".join(config.advertise_client_urls), format_id(cluster.id),
        )

    member = Member(
        member_id, config.initial_advertise_peer_urls, config.name, config.advertise_client_urls,
        FEATURES,
    )
    path = f"/0/members/{format_id(member_id)}/attributes"
    propose(Request(method="PUT", path=path, val=member.attributes_json()), applied)


def _check_peer_urls(config: ServerConfig, member: Optional[Member]) -> None:
    """Warn if the flags have other peer URLs than the cluster: only the first start uses them.

    Says nothing of default URLs, nor of those of a port that the system chose.
    """
    if member is None:                  # removed before its publication was applied
        return
    given = tuple(sorted(config.initial_advertise_peer_urls))
    is_chosen = given != tuple(DEFAULT_PEER_URLS.split(",")) and not any(
        url.endswith(":0") for url in config.listen_peer_urls
    )
    if given != member.peer_urls and is_chosen:
        SERVER_LOG.warning(
            "-initial-advertise-peer-urls %s does nothing: the other members know this one by"
            " %s; change that with PUT /v2/members/%s", ",".join(given),
            ",".join(member.peer_urls), format_id(member.id),
        )


class VersionMonitor:
    """Raises the cluster version to the lowest version of any member.  For a leader.

    Differs from etcd: a leader of identity `bridge` lowers it if no member reports a higher one.
    Source: etcd 2.3 etcdserver/cluster_util.go.
    """

    PERIOD_S = 4.0

    def __init__(
        self, reactor: Reactor, cluster: Cluster, member_id: int, propose: Propose,
        tls: Optional[TlsContext] = None,
    ) -> None:
        self._reactor = reactor
        self._cluster = cluster
        self._member_id = member_id
        self._propose = propose
        self._tls = tls
        self._calls: List[HttpCall] = []
        self._versions: Dict[int, str] = {}
        self._timer: Optional[Timer] = None

    def start(self) -> None:
        """Ask all members, now and every few seconds until the version is as high as ours."""
        self.stop()
        current, own = self._cluster.version, self._cluster.identity.reported
        if current and version_key(current) == version_key(own):
            return
        self._versions = {self._member_id: own}
        for member in list(self._cluster.members.values()):
            urls = usable_urls(member.peer_urls)
            if member.id != self._member_id and urls:
                self._ask(member, urls[0])
        self._timer = self._reactor.call_later(self.PERIOD_S, self.start)
        self._decide()

    def stop(self) -> None:
        for call in self._calls:
            call.cancel()
        self._calls = []
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _ask(self, member: Member, url: str) -> None:
        def done(error: Optional[Exception], answer: Answer) -> None:
            version = _server_version(answer.body)
            if error is None and version:
                self._versions[member.id] = version
            self._decide()

        self._calls.append(fetch(
            self._reactor, url, "/version", done, connect_timeout_s=1.0, idle_timeout_s=2.0,
            tls=self._tls,
        ))

    def _decide(self) -> None:
        """Propose the minimum when every member has answered; a first guess when one cannot."""
        current = self._cluster.version
        if self._versions.keys() >= self._cluster.members.keys():
            known = version_key(current) if current else (0, 0)
            keys = sorted(map(version_key, self._versions.values()))
            if keys[0] > known or keys[-1] < known:
                self._propose_version("%d.%d.0" % keys[0], current)
        elif not current and self._calls and all(call.ended for call in self._calls):
            self._propose_version(self._cluster.identity.min_cluster, current)

    def _propose_version(self, wanted: str, current: Optional[str]) -> None:
        short = wanted.rpartition(".")[0]
        if current:
            before = current.rpartition(".")[0]
            SERVER_LOG.info("updating the cluster version from %s to %s", before, short)
        else:
            SERVER_LOG.info("setting up the initial cluster version to %s", short)
        self.stop()
        self._propose(Request(method="PUT", path="/0/version", val=wanted), lambda result: None)
        self._timer = self._reactor.call_later(self.PERIOD_S, self.start)


def _server_version(body: bytes) -> str:
    """Return the `etcdserver` of a /version answer, or "" if it is not one."""
    try:
        version = str(load_json(body)["etcdserver"])
        version_key(version)
    except (ValueError, KeyError, TypeError):
        return ""
    return version


class ExpirySync:
    """Puts the leader's clock into the log, where every member expires keys alike.

    Differs from etcd: if many keys are over, the time in the log catches up with the clock in
    steps, each after the one before is applied, so that no other request waits for all of them.
    """

    def __init__(
        self, store: Store, wall_ns: Callable[[], int], propose: Propose,
        may_propose: Callable[[], bool],
    ) -> None:
        self._store = store
        self._wall_ns = wall_ns
        self._propose = propose
        self._may_propose = may_propose
        self._is_under_way = False

    def tick(self) -> None:
        """Propose the time if keys have a TTL; every SYNC_SECONDS."""
        if self._store.has_ttl and not self._is_under_way:
            self._propose_step()

    def _propose_step(self) -> None:
        if not self._may_propose():
            return
        now_ns = self._wall_ns()
        time_ns = self._store.expiry_step_ns(now_ns)
        self._is_under_way = True
        applied = functools.partial(self._step_applied, time_ns == now_ns)
        self._propose(Request(method="SYNC", time=time_ns), applied)

    def _step_applied(self, is_last: bool, result: Any) -> None:
        self._is_under_way = False
        if result is None and not is_last:      # a step that failed is repeated by tick()
            self._propose_step()


def purge_periodically(
    reactor: Reactor, disk: OsDisk, kept: Sequence[Tuple[str, str, int]]
) -> None:
    """Remove old files now, and again 30 s after each time.

    kept  (directory, suffix, number of its newest files to keep), ...
    """
    def purge() -> None:
        for directory, suffix, keep in kept:
            purge_files(directory, suffix, keep, disk=disk)

    def purged(error: Optional[BaseException], _: Any) -> None:
        reactor.call_later(PURGE_SECONDS, purge_periodically, reactor, disk, kept)
        if error is not None:
            SERVER_LOG.error("cannot remove old files: %s", error)

    reactor.run_blocking(purge, kind=FILE_WORK, done=purged)


# ============================================================================
# member/server -- The server: Raft, disk and store of one member, brought together.
# ----------------------------------------------------------------------------
# The way of a PUT, from HTTP to the log, to the disk, to the store, and back:
#
#     PUT /v2/keys/a
#       |
#     KeysApi._put                    reads the form: a Request
#     KeysApi._submit                 notes which HTTP request waits for the answer
#     EtcdServer.do                   registers the callback, queues an Entry
#       :
#       :  end of the turn            all entries of the turn together
#       :
#     EtcdServer._propose_queued
#     RawNode.propose                 one MsgProp
#     Raft.step  -- follower -->      Raft._forward_prop --> the leader's RawNode.step
#       | leader
#     Raft._leader_prop
#     Raft._append_own                gives each Entry its term and index
#     RaftLog.append
#       |
#     RawNode.ready  ------------->   Transport.offer --> MsgApp to the followers
#     Journal.add
#     Journal.submit                  one batch at a time
#       :
#       :  thread `wal`               WalWriter._run: one write, one fdatasync
#       :
#     EtcdServer._durable             followers: their answers may leave
#     RawNode.persisted
#     Raft._maybe_commit  <--------   Raft._leader_app_resp <-- answers of the followers
#       |
#     EtcdServer._apply
#     Applier.apply_entry
#     Store.set  ----------------->   WatcherHub.notify --> watchers
#       |
#     Proposals.pop                   the callback that EtcdServer.do registered
#     KeysApi._reply_applied
#       |
#     201 Created
#
# EtcdServer.on_turn makes the steps between the dotted lines, once per turn of the reactor.
# ============================================================================


class EtcdServer:
    """One member: its Raft node, its journal on disk, and the store that entries change.

    do() and change_member() are the ways in.  Every answer comes through the callback given,
    after the change is durable on a quorum and applied here.  Knows no HTTP.  Thread: reactor.

    failed     called when the disk has failed: what is durable is unknown from then on
    removed    called a while after the removal of this member is applied
    published  called when the cluster knows this member's name and client URLs
    transport_type, wal_writer_type, rng  seams of the simulator
    """

    def __init__(
        self, config: ServerConfig, boot: Bootstrap, reactor: Reactor, *,
        failed: Callable[[BaseException], None], removed: Callable[[], None],
        published: Callable[[], None], transport_type: Any = None, wal_writer_type: Any = None,
        rng: Optional[random.Random] = None,
    ) -> None:
        self.config = config
        self.reactor = reactor
        self.member_id = boot.member_id
        self.store = boot.store
        self.cluster = boot.cluster
        self.ids = IdGenerator(boot.member_id, reactor.wall_ns() // 1_000_000)
        self.raft_index = boot.snapshot.index if boot.snapshot else 0   # last applied
        self.raft_term = boot.snapshot.term if boot.snapshot else 0     # of that entry
        self.stats = ServerStats(config.name, self.member_id, Clock(reactor.now, reactor.wall_ns))
        self.leader_stats = LeaderStats(boot.member_id)
        self.metrics = Metrics()
        self.proposals = Proposals(config.request_timeout_s)
        self.reads = QuorumReads(boot.member_id, self.ids.next())
        self.stopping = False
        self.no_space = ""              # why the log cannot be written; "": it can
        self.applier = Applier(self.store, self.cluster, self.member_id, reactor.wall_ns)
        writer = (wal_writer_type or WalWriter)(
            boot.wal, boot.snapshotter, reactor, failed=failed, full=self._disk_full
        )
        self.journal = Journal(boot.wal, writer, boot.contents.hard_state, self._durable)
        self.snapshots = SnapshotKeeper(
            reactor, self.journal, boot.snapshotter, self.raft_index, len(self.store), failed
        )
        self.counts = ServerCounts(config.heartbeat_ms / 1000)
        self.traffic = traffic = Traffic(self.stats, self.leader_stats, reactor.now)
        self.node: RawNode = self._make_node(boot, rng or random.Random())
        self.transport: Transport = (transport_type or Transport)(
            reactor, member_id=boot.member_id, cluster_id=boot.cluster.id,
            peer_urls=config.initial_advertise_peer_urls, is_removed=boot.cluster.is_removed,
            deliver=self._deliver, removed=removed, round_trip=traffic.round_trip,
            unreachable=self.node.report_unreachable, snapshot_done=self.node.report_snapshot,
            election_s=config.election_ms / 1000, sent=traffic.sent, received=traffic.received,
            tls=boot.peer_tls, identity=self.cluster.identity,
            inspector=MemberInspector(self.cluster, self.node.protocol_violation),
        )
        self.versions = VersionMonitor(
            reactor, self.cluster, self.member_id, self.do, boot.peer_tls
        )
        self._leadership = Leadership(
            self.node, self.journal, reactor, config, self.transport.active_since
        )
        self._data_dir = boot.data_dir
        self._removed = removed
        self._published = published
        self._queue: List[Entry] = []           # proposals of this turn, or without a leader
        self._queued_bytes = 0                  # of their data
        self._changes: List[ConfChange] = []    # proposed changes of members, likewise
        self._late_proposals = LateProposals(2 * config.election_ms / 1000)
        self._timers: List[Timer] = []
        for member in boot.remotes:
            self.transport.add_remote(member.id, member.peer_urls)
        self._connect_others()

    def _make_node(self, boot: Bootstrap, rng: random.Random) -> RawNode:
        config = RaftConfig(
            id=boot.member_id, rng=rng, trace=package_logger("raft").info, defer_commit=True,
            election_ticks=max(self.config.election_ms // self.config.heartbeat_ms, 1),
        )
        if boot.bootstrap_entries:
            node = RawNode.bootstrap(config, boot.bootstrap_entries)
        else:
            node = RawNode(
                config, hard_state=boot.contents.hard_state, snapshot=boot.snapshot,
                entries=boot.contents.entries, applied=self.raft_index,
            )
        node.raft.replication.snapshot_source = functools.partial(
            self.snapshots.newest, is_v3=self.cluster.identity.bears("3.0.0"))
        return node

    # -- life --------------------------------------------------------------

    def start(self) -> None:
        """Begin to take part.  The reactor must call on_turn() from now on."""
        config, reactor = self.config, self.reactor
        reactor.on_turned = self.counts.turn_durations.observe
        self.journal.writer.start()
        if len(self.node.raft.voters) > 1:
            self.node.advance_ticks(self.node.raft.config.election_ticks - 1)
        expiry = ExpirySync(
            self.store, reactor.wall_ns, self.do, lambda: self.is_leader and not self.no_space
        )
        self._timers = [
            reactor.every(config.heartbeat_ms / 1000, self._tick),
            reactor.every(SYNC_SECONDS, expiry.tick),
        ]
        purge_periodically(reactor, self.snapshots.snapshotter.disk, (
            (self._data_dir.snap, ".snap", config.max_snapshots),
            (self._data_dir.wal, ".wal", config.max_wals),
        ))
        self.publish(self._published)

    def publish(self, done: Callable[[], None]) -> None:
        """Tell the cluster this member's name and client URLs; done() when it knows them."""
        publish(self.config, self.cluster, self.member_id, self.reactor, self.do, done)

    def leave(self, done: Callable[[], None]) -> None:
        """Prepare a planned stop: done() when another member leads, and no request waits here."""
        self._leadership.leave(self.proposals, done)

    def stop(self) -> None:
        """Reject waiting requests, write the last batch, close the log.  Blocks for one sync."""
        self.stopping = True
        self.proposals.fail_all(ServerStopped())
        if self.node.has_ready():
            self.journal.add(self.node.ready())
        self.journal.close()
        self.abandon()

    def abandon(self) -> None:
        """Free everything and send nothing more, as a crash would; harmless after stop()."""
        self.stopping = True
        for timer in self._timers:
            timer.cancel()
        with contextlib.ExitStack() as each:
            for free in (self.journal.writer.stop, self.transport.stop, self.versions.stop):
                each.callback(free)

    def _disk_full(self, why: str) -> None:
        """The log cannot grow (`why`), or can again (""): reads go on, nothing is lost."""
        self.no_space = why
        if not why:
            SERVER_LOG.warning("the log can be written again")
            return
        SERVER_LOG.error("%s; writes are refused until there is space again", why)
        cause = f"etcdserver: {why}; the change may still be made when there is space again"
        self.proposals.fail_all(RequestTimeout(cause))

    # -- ways in -----------------------------------------------------------

    @property
    def lead(self) -> int:
        """The known leader's id, 0 if none."""
        return self.node.raft.lead

    @property
    def is_leader(self) -> bool:
        return self.node.raft.role == RaftRole.LEADER

    @property
    def is_healthy(self) -> bool:
        """True if the disk has space, and this member leads a quorum or knows a leader."""
        if self.no_space:
            return False
        return self._leadership.has_links() if self.is_leader else self.lead != 0

    def do(self, request: Request, done: Done, encoded: bytes = b"") -> None:
        """Send a command through consensus; done(Event, or EtcdError) when it is applied here.

        The command may still be applied after a RequestTimeout.

        encoded  its encode_request, where that is known; then it has an id
        """
        if self.stopping or self.no_space and request.method != "QGET":
            done(ServerStopped() if self.stopping else NoSpace(self.no_space))
            return
        if not request.id:
            request = request._replace(id=self.ids.next())
        if self._queued_bytes > QUEUED_BYTES_MAX or not (
            self.proposals.add(request.id, done, self.reactor.now())
        ):
            done(TooManyRequests("etcdserver: too many requests"))
        elif request.method == "QGET" and self.reads.enabled:
            self.reads.add(request)
        else:
            data = encoded or encode_request(request := request.as_unicode())
            self._queue.append(Entry(0, 0, 0, data, request))
            self._queued_bytes += len(data)

    def change_member(
        self, change_type: ConfChangeType, member: Member,
        done: Callable[[Optional[Exception]], None],
    ) -> None:
        """Add, remove or update a member; done(None), or done(MemberError or EtcdError)."""
        if self.stopping or self.no_space:
            done(ServerStopped() if self.stopping else NoSpace(self.no_space))
            return
        if self.config.strict_reconfig_check:
            try:
                self.cluster.check_strict(change_type, member.id)
                self.cluster.check_active(change_type, member.id, self.transport.active_since)
            except ReconfigurationRefused as error:
                done(error)
                return
        context = None
        if change_type != ConfChangeType.REMOVE_NODE:
            context = utf8(member.context_json())
        change = ConfChange(self.ids.next(), change_type, member.id, context)
        if self.proposals.add(change.id, done, self.reactor.now()):
            self._changes.append(change)
        else:
            done(TooManyRequests("etcdserver: too many requests"))

    def _deliver(self, message: Message) -> None:
        """Step a peer's message into Raft; proposals without a leader wait for the next one.

        Differs from etcd, which drops them, so that the peer's client waits for its timeout.
        While the disk is full entries are dropped: they would fill the memory instead.
        """
        if self.no_space and message.type == MsgType.APP and message.entries:
            return
        if message.type == MsgType.PROP:
            self._leadership.transfer_before_entries(message.entries)
        try:
            self.node.step(message)
        except ProposalDropped:
            self._late_proposals.add(message.entries, self.reactor.now())

    # -- clock -------------------------------------------------------------

    def _tick(self) -> None:
        """One tick of Raft, however late: ticks missed in a stall are dropped, not replayed."""
        now = self.reactor.now()
        self.node.raft.pre_vote = self.cluster.all_have(FEATURE_PRE_VOTE)
        self.reads.enabled = self.cluster.all_have(FEATURE_READ_INDEX)
        self.reads.tick(self.proposals)
        self._late_proposals.expire(now)
        self.counts.tick(now, self.is_leader * (len(self.node.raft.voters) - 1))
        self.node.tick()
        self._leadership.watch_disk()
        self._expire_proposals()

    def _expire_proposals(self) -> None:
        explain = self._leadership.explain_timeout
        if self.proposals.expire(self.reactor.now(), explain) >= WORK_ENTRIES_MAX:
            self.reactor.call_soon(self._expire_proposals)

    # -- one turn ----------------------------------------------------------

    def on_turn(self) -> None:
        """Propose, hand out, write, apply.  Called once per turn of the reactor."""
        if self.stopping:
            return
        node, hub, refused = self.node, self.store.hub, False
        if self._late_proposals and self.lead and not node.raft.transferee:
            with contextlib.suppress(ProposalDropped):  # as if the network had lost them
                node.propose(*self._late_proposals.take(self.reactor.now()))
        if self.reads:
            self._serve_reads()
        if self._queue or self._changes:
            refused = not self._propose_queued()
        if node.has_ready():
            self._take(node.ready())
        self.journal.submit()
        self.store.begin_turn()
        self.counts.time_apply(self._apply, self.reactor.now)
        if self.reads:
            self._serve_reads()
        if self.snapshots.is_requested:
            self._maybe_snapshot()
        self.snapshots.work(self._compact)
        self._leadership.schedule_commit_broadcast()
        waiting = hub.backlog or not refused and (self._queue or self._changes)
        if waiting or self.store.has_garbage or self.journal.is_encoding or node.has_ready():
            self.reactor.call_soon(_nothing)    # turn again at once: there is more to do

    def _propose_queued(self) -> bool:
        """Propose the queued entries; False if they have to wait for a leader.

        Differs from etcd: proposals also wait while no link to the leader is up.  It may be dead,
        and a message to a dead leader is lost: its client would wait for the whole timeout.
        """
        if self.lead and not self.is_leader and not self.transport.active_since(self.lead):
            return False
        queue, self._queue, self._queued_bytes = self._queue, [], 0
        self._leadership.transfer_before_removal(self._changes)
        try:
            if queue:
                self.node.propose(*queue)
                queue = []
            while self._changes:
                self.node.propose_conf_change(self._changes[0])
                self.reactor.call_later(SYNC_SECONDS, self._repeat, self._changes.pop(0))
        except ProposalDropped:
            waiting = self.proposals
            self._queue += [e for e in queue if e.request and e.request.id in waiting]
            self._queued_bytes = sum(len(entry.data) for entry in self._queue)
            self._changes = [change for change in self._changes if change.id in waiting]
            return False
        return True

    def _repeat(self, change: ConfChange) -> None:
        """Propose a change again that was lost, or that met another pending one at the leader."""
        if change.id in self.proposals:     # a change that is applied already has no effect
            self._changes.append(change)

    def _serve_reads(self) -> None:
        for request in self.reads.take(self.node, self.raft_index):
            done = self.proposals.pop(request.id)
            if done is not None:
                done(self.applier.apply_request(request))

    def _take(self, ready: Ready) -> None:
        """Send the messages that may leave at once, and give the rest to the journal."""
        if self._leadership.observe():
            if self.lead:
                self.counts.leader_changes += 1
                self.stats.became(self.lead)
            if self.lead != self.member_id:
                self.versions.stop()
        if ready.messages:
            self.transport.offer(ready.messages)
        self.journal.add(ready)

    def _durable(self, batch: Batch) -> None:
        """A batch is on disk: count its entries, become its snapshot, send what it held back."""
        if self.stopping:
            return
        if batch.mark is not None:
            self.node.persisted(batch.mark)
        if batch.snapshot is not None:
            self._recover(batch.snapshot)
        if batch.held:
            self.transport.offer(batch.held)

    def _apply(self) -> None:
        entries = self.node.committed_entries(WORK_ENTRIES_MAX)
        if not entries:
            return
        del entries[first_part(entries):]
        log = self.node.raft.log
        for entry in entries:
            if not self.store.accepts_changes or not entry.type and not self.applier.prepare(entry):
                break
            if not entry.type:
                self._apply_normal(entry)
                continue
            log.applied_to(self.raft_index)
            if not self._apply_conf_change(entry):
                return
        log.applied_to(self.raft_index)
        if log.applied < log.commit:
            self.reactor.call_soon(_nothing)    # more work than for one turn: turn again at once
        self._maybe_campaign_alone()
        self._maybe_snapshot()

    def _apply_normal(self, entry: Entry) -> None:
        """Apply a command and answer it; _apply() tells the log.  A hot path."""
        result = self.applier.apply_entry(entry)
        self.raft_index, self.raft_term = entry.index, entry.term
        request = entry.request
        if request is None:
            if not entry.data and self.is_leader:
                self.versions.start()           # the first entry of our term is committed
            return
        entry.request = None                    # the log keeps the bytes only
        done = self.proposals.pop(request.id)
        if done is not None:
            done(result)

    def _apply_conf_change(self, entry: Entry) -> bool:
        """Apply a membership change; False if its commit must first be on disk.

        A crash could otherwise bring back a member that knows fewer voters than it had counted
        before, and let it commit alone an entry that the others never saw.
        """
        if self.journal.durable_commit < entry.index:
            raft = self.node.raft
            self.journal.sync_commit(HardState(raft.term, raft.vote, raft.log.commit))
            return False
        change = read_change(entry)
        error = self.applier.apply_conf_change(change)
        self.node.apply_conf_change(change if error is None else change._replace(node_id=0))
        self.raft_index, self.raft_term = entry.index, entry.term
        if error is None:
            self._adjust_peers(change)
        done = self.proposals.pop(change.id)
        if done is not None:
            done(error)
        return True

    def _adjust_peers(self, change: ConfChange) -> None:
        member = self.cluster.members.get(change.node_id)
        if change.type == ConfChangeType.REMOVE_NODE:
            if change.node_id == self.member_id:
                self.reactor.call_later(REMOVED_SECONDS, self._removed)
            else:
                self.transport.remove_peer(change.node_id)
                self.leader_stats.remove(change.node_id)
        elif member is not None and change.node_id != self.member_id:
            self.transport.add_peer(member.id, member.peer_urls)

    def _connect_others(self) -> None:
        for member in self.cluster.members.values():
            if member.id != self.member_id:
                self.transport.add_peer(member.id, member.peer_urls)

    def _maybe_campaign_alone(self) -> None:
        """Campaign at once in a cluster of one, where no other member can lead.

        All entries known to be committed must be applied: before that the voters are those of an
        earlier time.
        """
        raft = self.node.raft
        if raft.lead or raft.voters != (self.member_id,) or raft.role != RaftRole.FOLLOWER:
            return
        if raft.log.applied >= raft.log.commit:
            self.node.campaign()

    # -- snapshots ---------------------------------------------------------

    def _maybe_snapshot(self) -> None:
        if self.cluster.was_lowered:
            self.cluster.was_lowered, self.snapshots.least_index = False, self.raft_index
        count = self.config.snapshot_count
        is_due = self.snapshots.is_due(self.raft_index, len(self.store), count)
        if (is_due or self.snapshots.is_requested) and not self.snapshots.busy:
            applied = EntryID(self.raft_term, self.raft_index)
            self.snapshots.begin(self.store, applied, self.node.raft.voters, lent=not is_due)

    def _compact(self, index: int) -> bool:
        log = self.node.raft.log
        self.node.compact(min(index, log.offset + COMPACT_SLICE_ENTRIES))
        if log.offset == index:
            SERVER_LOG.info("compacted raft log at %d", index)
        return log.offset >= index

    def _recover(self, snapshot: Snapshot) -> None:
        """A snapshot of the leader is durable here: the store becomes its state."""
        self.snapshots.received(snapshot.index)
        self.store.install(snapshot.state or StoreState.read(snapshot.data))
        self.cluster.recover()
        self.applier.auth_changes += 1
        SERVER_LOG.info("recovered from incoming snapshot at index %d", snapshot.index)
        self.transport.remove_all()
        self._connect_others()
        self.raft_index, self.raft_term = snapshot.index, snapshot.term
        self.node.applied_to(snapshot.index)


# ============================================================================
# api/forms -- Forms, queries and plain replies.
# ============================================================================


FORM_FIELDS_MAX = 10_000            # fields of one body; above: error 210
QUERY_FIELDS_MAX = 1_000            # fields of one query; above: error 210
FORM_SLICE_BYTES = 512 << 10        # of one field of a form that are decoded in one turn
FORM_SLICE_FIELDS = 1_000           # of a form that are decoded in one turn
KEY_BYTES_MAX = 64 << 10            # of the path of a key that is written; above: error 210

_NOSNIFF = "X-Content-Type-Options: nosniff\r\n"


def write_text(request: HttpRequest, status: int, text: str, headers: str = "") -> None:
    """Answer with plain text; errors have `nosniff`, as those of Go's http.Error."""
    headers += _NOSNIFF if status >= 400 else ""
    request.reply(status, utf8(text), "text/plain; charset=utf-8", headers)


def refuse_method(allow: str, request: HttpRequest) -> None:
    """Answer 405.  allow: the methods of the path, `A,B`."""
    write_text(request, 405, "Method Not Allowed\n", f"Allow: {allow}\r\n")


def not_found(request: HttpRequest) -> None:
    write_text(request, 404, "404 page not found\n")


def write_message(request: HttpRequest, status: int, message: str, headers: str = "") -> None:
    """Answer with an error of any API but the keys API."""
    body = f'{{"message":{json_string(message)}}}'.encode()
    request.reply(status, body, "application/json", headers)


def parse_form(data: bytes, fields_max: int = FORM_FIELDS_MAX) -> Dict[str, str]:
    """Return name -> first value of a query, or of a body in the same form.

    Raises InvalidForm.  Source: Go url.ParseQuery, as etcd 2.3 built with Go 1.17 or newer.
    Differs from etcd: more than fields_max fields are refused, as they would stall all clients,
    and so is a part of more than FORM_SLICE_BYTES that is not UTF-8, as no reply could hold it.
    """
    return finish(form_steps(data, fields_max))


def form_steps(
    data: bytes, fields_max: int = FORM_FIELDS_MAX
) -> Generator[None, None, Dict[str, str]]:
    """Do the work of parse_form() with pauses, so that a large form does not stall the reactor."""
    fields: Dict[str, str] = {}
    if not data:
        return fields
    if b";" in data:
        raise InvalidForm("invalid semicolon separator in query")
    found = 0
    for start in range(0, len(data), FORM_SLICE_BYTES):
        if len(data) > FORM_SLICE_BYTES:
            yield                       # before the first slice too: the receipt took some ms
        found += data.count(b"&", start, start + FORM_SLICE_BYTES)
        if found >= fields_max:
            raise InvalidForm(f"more than {fields_max} fields")
    view, end = memoryview(data), -1
    for count in range(1, found + 2):
        start, end = end + 1, data.find(b"&", end + 1)
        end = end if end >= 0 else len(data)
        if end - start > FORM_SLICE_BYTES:
            middle = data.find(b"=", start, end)
            middle = middle if middle >= 0 else end
            name_text = yield from _unescape_steps(view[start:middle])
            value_text = yield from _unescape_steps(view[middle + 1:end])
        elif end > start:
            name, _, value = data[start:end].partition(b"=")
            name_text, value_text = text_of(_unescape(name)), text_of(_unescape(value))
        else:
            continue
        fields.setdefault(name_text, value_text)
        if not count % FORM_SLICE_FIELDS:
            yield
    return fields


def _unescape_steps(data: memoryview) -> Generator[None, None, str]:
    """Decode a long name or value, with pauses."""
    decode = codecs.getincrementaldecoder("utf-8")().decode
    pieces, start = [], 0
    try:
        while start < len(data):
            yield
            end = start + FORM_SLICE_BYTES
            last = bytes(data[end - 2:end])
            if end < len(data) and b"%" in last:
                end -= 2 - last.rfind(b"%")     # keep escapes whole
            pieces.append(decode(_unescape(bytes(data[start:end])), end >= len(data)))
            start = end
    except UnicodeDecodeError:
        raise InvalidForm(f"more than {FORM_SLICE_BYTES} bytes that are not UTF-8") from None
    return "".join(pieces)


def _unescape(data: bytes) -> bytes:
    try:
        return unquote(data, plus=True)
    except ValueError as error:
        raise InvalidForm(f"invalid URL escape {go_quote(str(error))}") from None


_MEDIA_TOKEN = r"[!#-'*+\-.0-9A-Z^-~]+"       # compiles 7 ms faster than the negated class
_MEDIA_TYPE = re.compile(f"({_MEDIA_TOKEN})?(/?)({_MEDIA_TOKEN})?(.*)", re.DOTALL)
_MEDIA_PARAM = re.compile(rf'\s*;\s*({_MEDIA_TOKEN})\s*=\s*({_MEDIA_TOKEN}|"(?:[^"\\\r\n]|\\.)*")')


def is_form_type(content_type: str) -> bool:
    """True if a body of this Content-Type is a form.

    Raises InvalidForm for a bad media type.  Source: Go mime.ParseMediaType.
    """
    if not content_type:
        return False
    if len(content_type) > SHORT_HEADER_BYTES_MAX:
        raise InvalidForm(f"mime: more than {SHORT_HEADER_BYTES_MAX} bytes")
    base = content_type.partition(";")[0]
    media_type = base.strip().lower()
    match = _MEDIA_TYPE.fullmatch(media_type)
    main, slash, sub, rest = match.groups() if match else (None, "", None, "")
    if not main:
        raise InvalidForm("mime: no media type")
    if not slash and (sub or rest):
        raise InvalidForm("mime: expected slash after first token")
    if slash and not sub:
        raise InvalidForm("mime: expected token after slash")
    if rest:
        raise InvalidForm("mime: unexpected content after media subtype")
    _check_media_params(content_type[len(base):])
    return media_type == "application/x-www-form-urlencoded"


def _check_media_params(text: str) -> None:
    params: Dict[str, str] = {}
    end = 0
    param = _MEDIA_PARAM.match(text)
    while param is not None:
        end = param.end()
        name, value = param.group(1).lower(), param.group(2)
        if params.setdefault(name, value) != value:
            raise InvalidForm("mime: duplicate parameter name")
        param = _MEDIA_PARAM.match(text, end)
    if text[end:].strip() not in ("", ";"):
        raise InvalidForm("mime: invalid media parameter")


GO_BOOLS = {
    **dict.fromkeys(("1", "t", "T", "TRUE", "true", "True"), True),
    **dict.fromkeys(("0", "f", "F", "FALSE", "false", "False"), False),
}


def _bool_field(fields: Mapping[str, str], name: str, shown: str = "") -> Optional[bool]:
    """Return the boolean `name`, None if absent.  Raises InvalidField."""
    text = fields.get(name)
    if text is None:
        return None
    value = GO_BOOLS.get(text)
    if value is None:
        raise InvalidField("invalid value for " + (shown or f'"{name}"'))
    return value


def _parse_uint64(text: str) -> Optional[int]:
    """Return the decimal number in `text`; None for another text, or for more than 64 bits."""
    if not (text.isascii() and text.isdigit()):
        return None
    digits = text.lstrip("0")
    value = int(digits or "0") if len(digits) <= 20 else UINT64_MAX + 1
    return value if value <= UINT64_MAX else None


def _index_field(fields: Mapping[str, str], name: str) -> int:
    """Return the index `name`, 0 if absent.  Raises IndexNotANumber."""
    text = fields.get(name)
    if text is None:
        return 0
    value = _parse_uint64(text)
    if value is None:
        raise IndexNotANumber(f'invalid value for "{name}"')
    return value


def _expiration_field(fields: Mapping[str, str], now_ns: int) -> Optional[int]:
    """Return the expiry time in unix ns; None without a ttl.  Raises TtlNotANumber."""
    text = fields.get("ttl")
    if not text:
        return None
    ttl_s = _parse_uint64(text)
    if ttl_s is None:
        raise TtlNotANumber('invalid value for "ttl"')
    return wrap_int64(now_ns + wrap_int64(ttl_s * NS))


def parse_key_request(
    method: str, path: str, fields: Mapping[str, str], now_ns: int
) -> Request:
    """Return the command, with id 0, that the merged fields of a request describe.

    path  internal, clean

    Raises EtcdError for the first bad parameter in etcd's order, also if the method ignores it.
    Source: etcd 2.3 etcdserver/etcdhttp/client.go, parseKeyRequest.
    """
    if not fields:
        return Request(0, method, path)
    prev_index = _index_field(fields, "prevIndex")
    since = _index_field(fields, "waitIndex")
    recursive = _bool_field(fields, "recursive")
    sort = _bool_field(fields, "sorted")
    wait = _bool_field(fields, "wait")
    dir = _bool_field(fields, "dir")
    quorum = _bool_field(fields, "quorum")
    stream = _bool_field(fields, "stream")
    if wait and method != "GET":
        raise InvalidField('"wait" can only be used with GET requests')
    prev_value = fields.get("prevValue")
    if prev_value == "":
        raise PrevValueRequired('"prevValue" cannot be empty')
    if prev_value and len(prev_value) <= FORM_SLICE_BYTES and not is_unicode(prev_value):
        raise InvalidForm('"prevValue" is not UTF-8: no value is')
    expiration = _expiration_field(fields, now_ns)
    prev_exist = _bool_field(fields, "prevExist", "prevExist")
    refresh = _bool_field(fields, "refresh", "refresh")
    value = fields.get("value", "")
    if refresh and value:
        raise RefreshValue("A value was provided on a refresh")
    if refresh and expiration is None:
        raise RefreshTtlRequired("No TTL value set")
    return Request(
        0, method, path, value, bool(dir), prev_value or "", prev_index, prev_exist,
        expiration or 0, bool(wait), since, bool(recursive), bool(sort), bool(quorum), 0,
        bool(stream), refresh,
    )


def key_path(url_path: str) -> str:
    """Return the store path of `/v2/keys...`: the keys of users lie below /1."""
    key = clean_path(url_path[len("/v2/keys"):])
    return "/1" if key == "/" else "/1" + key


def canonical_path(path: str) -> str:
    """Return `path` without `//`, `.` and `..`, but with its trailing slash (Go ServeMux)."""
    clean = clean_path(path)
    return clean + "/" if path.endswith("/") and clean != "/" else clean


def _bad_key(path: str) -> str:
    """Return why no key with this internal path may be written; "" if it may."""
    if not is_unicode(path):            # JSON cannot hold it, so snapshots would lose the key
        return "the key is not UTF-8"
    if path.count("/") > KEY_DEPTH_MAX + 1:     # the namespace
        return f"the key has more than {KEY_DEPTH_MAX} path elements"
    return f"the key has more than {KEY_BYTES_MAX} bytes" if len(path) > KEY_BYTES_MAX else ""


class KeyTarget:
    """The part of a key request that its head decides; kept with the head, which is cached.

    command  complete for GET, HEAD and DELETE, whose body is ignored; else a template
    encoded  method and path of the command
    error    the answer to every request with this head, or None
    fields   of the query, for PUT and POST
    is_form  True if the body holds fields
    plain    True if only the fields of the body remain to be read
    bad_key  why no such key may be written, or ""
    bad_type, bad_query  causes of error 210 that go before and after those of the body
    """

    __slots__ = (
        "command", "encoded", "error", "fields", "is_form", "plain", "bad_key", "bad_type",
        "bad_query",
    )

    def __init__(self, head: HttpHead) -> None:
        self.command = Request(0, head.method, key_path(head.path))
        self.encoded = encode_target(head.method, self.command.path)
        self.error: Optional[EtcdError] = None
        self.fields: Dict[str, str] = {}
        self.is_form = False
        self.bad_key = _bad_key(self.command.path)
        self.bad_type = self.bad_query = ""
        try:
            self.fields = parse_form(head.query.encode("latin-1"), QUERY_FIELDS_MAX)
        except InvalidForm as error:
            self.bad_query = error.cause
        if head.method in ("PUT", "POST"):
            self._read_type(head)
        else:
            self._read_command()
        self.plain = self.is_form and not (
            self.fields or self.bad_key or self.bad_type or self.bad_query
        )

    def request(
        self, request: HttpRequest, now_ns: int
    ) -> Generator[None, None, Request]:
        """Return the command of a PUT or POST, with pauses.  Raises EtcdError."""
        if self.is_form and request.body_too_large:
            raise InvalidForm("http: POST too large")
        if self.bad_type:
            raise InvalidForm(self.bad_type)
        fields = (yield from form_steps(request.body)) if self.is_form else {}
        if self.bad_query:
            raise InvalidForm(self.bad_query)
        if self.bad_key:
            raise InvalidForm(self.bad_key)
        if self.fields:
            fields = {**self.fields, **fields}
        return parse_key_request(self.command.method, self.command.path, fields, now_ns)

    def _read_type(self, head: HttpHead) -> None:
        content_type = head.headers.get("content-type", "")
        try:
            self.is_form = is_form_type(content_type)
        except InvalidForm as error:
            self.bad_type = error.cause
            form = "application/x-www-form-urlencoded"      # the limit of the body holds for it
            self.is_form = content_type.partition(";")[0].strip().lower() == form

    def _read_command(self) -> None:
        if self.bad_query:
            self.error = InvalidForm(self.bad_query)
            return
        command = self.command
        if self.bad_key and (command.method == "DELETE" or not is_unicode(command.path)):
            self.error = InvalidForm(self.bad_key)
            return
        try:
            self.command = parse_key_request(command.method, command.path, self.fields, 0)
        except EtcdError as error:
            self.error = error.with_traceback(None)


class KeyWatch:
    """A watch of one client: each event is a chunk of the reply; the first ends a watch without
    `stream`.

    Differs from etcd: a client that leaves more than WATCHER_QUEUE_EVENTS_MAX events unread is
    disconnected, so that it notices; etcd keeps the connection and sends nothing more.
    """

    __slots__ = ("_connection", "_stream", "_reply", "_early", "_unsent", "_watcher")

    def __init__(self, request: HttpRequest, *, stream: bool) -> None:
        self._connection = request.connection
        self._stream = stream
        self._reply: Optional[StreamReply] = None
        self._early: List[Event] = []       # events of the history, before the reply has started
        self._unsent: List[int] = []        # sizes of events, a superset of those not yet sent
        self._watcher: Optional[Watcher] = None

    def start(self, store: Store, command: Request, request: HttpRequest, headers: str) -> None:
        """Register, and send the head at once.  Raises EventIndexCleared before it sends."""
        watcher = store.watch(
            command.path, recursive=command.recursive, stream=self._stream, since=command.since,
            deliver=self._deliver, lost=self._lost,
        )
        self._watcher = watcher
        self._reply = request.start_stream(200, "application/json", headers)
        self._reply.on_close = self._unregister
        early, self._early = self._early, []
        for event in early:
            self._deliver(event)

    def _deliver(self, event: Event) -> None:
        reply = self._reply
        if reply is None:
            self._early.append(event)
            return
        data = event.client_pieces()
        if self._stream and not reply.pending:
            self._unsent.clear()
        if reply.write(data[0], data[1:]):
            if not self._stream:
                self._unregister()
                reply.end()
                return
            self._unsent.append(sum(map(len, data)))
            if len(self._unsent) > WATCHER_QUEUE_EVENTS_MAX:
                self._check_pace(reply)

    def _lost(self) -> None:
        """Disconnect the client, as events were lost: it asks again, and then learns of it."""
        self._unregister()
        if self._reply is not None:
            self._reply.abort()

    def _unregister(self) -> None:
        """Cancel the watcher, which refers to this object."""
        watcher, self._watcher = self._watcher, None
        if watcher is not None:
            watcher.cancel()

    def _check_pace(self, reply: StreamReply) -> None:
        """Disconnect a client that leaves too many events in the send buffer."""
        self._connection.flush()
        left, events = reply.pending, 0
        for size in reversed(self._unsent):
            if left <= 0:
                break
            left -= size
            events += 1
        del self._unsent[:len(self._unsent) - events]
        if events > WATCHER_QUEUE_EVENTS_MAX:
            package_logger("etcdhttp").warning(
                "closed the watch of %s: it left %d events unread", self._connection.remote, events
            )
            self._unregister()
            reply.abort()


def write_error(request: HttpRequest, error: EtcdError, headers: str) -> None:
    """Answer with an error of the keys API.  Source: etcd 2.3 error/error.go."""
    cause = f',"cause":{json_string(error.cause)}' if error.cause else ""
    body = (
        f'{{"errorCode":{error.code},"message":{json_string(error.message)}{cause}'
        f',"index":{error.index}}}\n'
    )
    request.reply(
        error.status, body.encode(), "application/json",
        f"{headers}X-Etcd-Index: {error.index}\r\n",
    )


# ============================================================================
# api/gojson -- JSON and raft states as etcd's Go code prints them.
# ============================================================================


JSON_BYTES_MAX = 1 << 20            # of a body; above: 400
JSON_VALUES_MAX = 10_000            # of a body, counted by commas; above: 400
JSON_BRACKETS_MAX = 500             # of a body, a bound of its depth; above: 400


class GoJson:
    """A decoder of JSON in requests, with the error texts of Go's.  Raises ValueError."""

    _CONTEXTS = (
        ("Expecting property name", "looking for beginning of object key string"),
        ("Expecting ':'", "after object key"),
        ("Expecting ','", "after object key:value pair"),
        ("Extra data", "after top-level value"),
        ("Invalid control character", "in string literal"),
        ("Invalid \\", "in string escape code"),
        ("Illegal trailing comma", "looking for beginning of value"),
    )
    _TYPES = ((bool, "bool"), (str, "string"), (float, "number"), (list, "array"), (dict, "object"))

    @classmethod
    def loads(cls, data: bytes, *, partial: bool = False) -> Any:
        """Return the value in `data`; partial: ignore text after the first value.

        Numbers become floats.  Raises ValueError.  Differs from Go: a body with too many values,
        or nested too deeply, is refused before it is parsed, as it would stall all clients.
        """
        if len(data) > JSON_BYTES_MAX or data.count(b",") > JSON_VALUES_MAX:
            raise ValueError(f"more than {JSON_BYTES_MAX} bytes or {JSON_VALUES_MAX} values")
        if data.count(b"[") + data.count(b"{") > JSON_BRACKETS_MAX:
            raise ValueError("exceeded max depth")
        text = data.decode("utf-8", "replace").lstrip(" \t\r\n")
        decoder = json.JSONDecoder(parse_int=float, parse_constant=cls._refuse_constant)
        try:
            value, end = decoder.raw_decode(text)
        except json.JSONDecodeError as error:
            raise ValueError(cls._reason(text, error)) from None
        rest = text[end:].lstrip(" \t\r\n")
        if rest and not partial:
            raise ValueError(f"invalid character {cls._quoted(rest[0])} after top-level value")
        return value

    @classmethod
    def type_name(cls, value: object) -> str:
        """Return Go's word for the type of a decoded value; "" for null."""
        return next((name for kind, name in cls._TYPES if isinstance(value, kind)), "")

    @classmethod
    def string_member(cls, value: object, name: str) -> str:
        """Return member `name`, in any case, of an object; "" if absent.  Raises ValueError."""
        member = cls.member(value, name)
        if member is not None and not isinstance(member, str):
            raise ValueError(f"cannot unmarshal {cls.type_name(member)} into a string")
        return go_text(member or "")

    @classmethod
    def member(cls, value: object, name: str) -> Any:
        """Return member `name`, in any case, of an object or null.  Raises ValueError."""
        if value is None:
            return None
        if not isinstance(value, dict):
            raise ValueError(f"cannot unmarshal {cls.type_name(value)} into an object")
        found = [item for key, item in value.items() if key.lower() == name.lower()]
        return found[-1] if found else None

    @staticmethod
    def _refuse_constant(name: str) -> float:
        raise ValueError(f"invalid character {name[0]!r} looking for beginning of value")

    @staticmethod
    def _quoted(char: str) -> str:
        return {"'": r"'\''", '"': "'\"'"}.get(char) or f"'{go_quote(char)[1:-1]}'"

    @classmethod
    def _reason(cls, text: str, error: json.JSONDecodeError) -> str:
        """Return the words of Go for an error of Python's decoder."""
        at = error.pos
        literal = {"n": "null", "t": "true", "f": "false"}.get(text[at:at + 1])
        if error.msg == "Expecting value" and literal:
            for step, char in enumerate(literal):
                found = text[at + step:at + step + 1]
                if found and found != char:
                    return (
                        f"invalid character {cls._quoted(found)} in literal {literal}"
                        f" (expecting {cls._quoted(char)})"
                    )
            at = len(text)
        if error.msg.startswith("Invalid \\"):
            at += 1
        if at >= len(text) or error.msg.startswith("Unterminated"):
            return "unexpected end of JSON input"
        context = "looking for beginning of value"
        for start, words in cls._CONTEXTS:
            if error.msg.startswith(start):
                context = words
        return f"invalid character {cls._quoted(text[at])} {context}"


_STATE_NAMES = {RaftRole.FOLLOWER: "StateFollower", RaftRole.LEADER: "StateLeader"}


def raft_state_name(role: RaftRole) -> str:
    """Return etcd's name of a role."""
    return _STATE_NAMES.get(role, "StateCandidate")


# ============================================================================
# api/auth -- The auth API: users and roles over HTTP.
# ----------------------------------------------------------------------------
# Source: etcd 2.3 API, auth; etcdhttp/client_auth.go.
# ============================================================================


_AUTH_VERSION = (2, 1)              # of a cluster in which all members know users
_ITEM_METHODS = ("GET", "PUT", "DELETE")
ITEMS_IN_SLICE = 100                # users or roles that one turn lists: 2 ms


def refuse_credentials(request: HttpRequest) -> None:
    write_message(request, 401, "Insufficient credentials")


class UserBody(NamedTuple):
    """The body of a PUT of a user."""

    name: str
    password: str
    roles: Names
    grant: Names
    revoke: Names

    @classmethod
    def parse(cls, body: bytes) -> UserBody:
        """Raises ValueError."""
        value = GoJson.loads(body, partial=True)
        return cls(
            GoJson.string_member(value, "user"), GoJson.string_member(value, "password"),
            *(string_list(GoJson.member(value, name)) for name in ("roles", "grant", "revoke")),
        )


class RoleBody(NamedTuple):
    """The body of a PUT of a role."""

    name: str
    permissions: Permissions
    grant: Optional[Permissions]
    revoke: Optional[Permissions]

    @classmethod
    def parse(cls, body: bytes) -> RoleBody:
        """Raises ValueError."""
        value = GoJson.loads(body, partial=True)
        name = GoJson.string_member(value, "role")
        found = [cls._permissions(value, part) for part in ("permissions", "grant", "revoke")]
        return cls(name, found[0] or Permissions(), *found[1:])

    @staticmethod
    def _permissions(value: object, name: str) -> Optional[Permissions]:
        kv = GoJson.member(GoJson.member(value, name), "kv")
        found = make_permissions(GoJson.member(kv, "read"), GoJson.member(kv, "write"))
        return found if found.read is not None or found.write is not None else None


class AuthApi:
    """/v2/auth/: users, roles, enable.  Thread: reactor."""

    def __init__(self, server: EtcdServer, auth: Auth, guard: Guard) -> None:
        self._server = server
        self._auth = auth
        self._guard = guard
        self._store = AuthStore(auth)
        self._cluster_line = f"X-Etcd-Cluster-Id: {format_id(server.cluster.id)}\r\n"

    def route(self, head: HttpHead) -> Handler:
        """Return the handler of a request below /v2/auth/."""
        if not self._is_capable:
            # The decision is kept with the head, but the cluster may learn its version at any time.
            return lambda request: self.route(head)(request) if self._is_capable else write_message(
                request, 500, "Not capable of accessing auth feature during rolling upgrades."
            )
        kind, _, name = head.path[len("/v2/auth/"):].partition("/")
        if head.path == "/v2/auth/enable":
            return self._allow(head, _ITEM_METHODS, self._enable, is_open=head.method == "GET")
        if kind not in ("users", "roles"):
            return not_found
        if not name:
            listing = self._list_users if kind == "users" else self._list_roles
            return self._allow(head, ("GET",), listing)
        if "/" in name or len(utf8(name)) > AUTH_NAME_BYTES_MAX:
            return lambda request: write_message(request, 400, "Invalid path")
        return self._allow(head, _ITEM_METHODS, functools.partial(self._item, kind, name))

    @property
    def _is_capable(self) -> bool:
        version = self._server.cluster.version
        return version is not None and version_key(version) >= _AUTH_VERSION

    def _allow(
        self, head: HttpHead, methods: Sequence[str], handler: Handler, *, is_open: bool = False
    ) -> Handler:
        """Return `handler` behind checks of the method and the credentials."""
        if head.method not in methods:
            return functools.partial(refuse_method, ",".join(methods))
        return handler if is_open else self._guard.root(head, handler, refuse_credentials)

    # -- enable ------------------------------------------------------------

    def _enable(self, request: HttpRequest) -> None:
        if request.method == "GET":
            self._reply(request, 200, {"enabled": self._auth.enabled})
        else:
            steps = self._store.enable() if request.method == "PUT" else self._store.disable()
            self._run(request, steps, lambda _: self._reply_empty(request))

    # -- users and roles ---------------------------------------------------

    def _item(self, kind: str, name: str, request: HttpRequest) -> None:
        """Answer a request for one user or role.  kind: `users` or `roles`."""
        is_user = kind == "users"
        if request.method == "GET":
            try:
                found = self._user(name) if is_user else self._role(name).json()
                self._reply(request, 200, found)
            except AuthError as error:
                self._fail(request, error)
        elif request.method == "DELETE":
            delete = self._store.delete_user if is_user else self._store.delete_role
            self._run(request, delete(name), lambda _: self._reply_empty(request))
        else:
            (self._put_user if is_user else self._put_role)(name, request)

    def _user(self, name: str) -> Dict[str, object]:
        user = self._auth.user(name)
        if user is None:
            raise AuthError(404, f"User {name} does not exist.")
        return self._with_roles(user, map(self._role, user.roles or ()))

    def _role(self, name: str) -> Role:
        role = self._auth.role(name)
        if role is None:
            raise AuthError(404, f"Role {name} does not exist.")
        return role

    def _list_users(self, request: HttpRequest) -> None:
        users = filter(None, map(self._auth.user, self._auth.names("users")))
        shown = (
            self._with_roles(user, filter(None, map(self._auth.role, user.roles or ())))
            for user in users
        )
        self._reply_list(request, "users", "null", shown, [])

    @staticmethod
    def _with_roles(user: User, roles: Iterator[Role]) -> Dict[str, object]:
        shown = [role.json() for role in roles]
        return {"user": user.name, **({"roles": shown} if shown else {})}

    def _put_user(self, name: str, request: HttpRequest) -> None:
        body = self._parse(request, UserBody.parse, name, "User")
        if body is None:
            return
        if body.roles and (body.grant or body.revoke):
            self._message(request, 400, "User JSON contains both roles and grant/revoke")
            return
        if len(utf8(body.password)) > PASSWORD_BYTES_MAX or "\0" in body.password:
            self._message(request, 400, "the password is too long, or has a NUL in it")
            return
        updates = bool(body.grant or body.revoke) or not body.roles and self._auth.user(name)
        if updates:
            steps = self._store.update_user(name, body.password, body.grant, body.revoke)
        else:
            steps = self._store.create_user(User(name, body.password, body.roles))
        status = 200 if updates or body.roles else 201
        self._run(request, steps,
                  lambda user: self._reply(request, status, user.json(hide_password=True)))

    # -- roles -------------------------------------------------------------

    def _list_roles(self, request: HttpRequest) -> None:
        roles = filter(None, map(self._auth.role, self._auth.names("roles")))
        self._reply_list(request, "roles", "[]", (role.json() for role in roles), [])

    def _put_role(self, name: str, request: HttpRequest) -> None:
        body = self._parse(request, RoleBody.parse, name, "Role")
        if body is None:
            return
        updates = any(part and not part.is_empty for part in (body.grant, body.revoke))
        if updates and not body.permissions.is_empty:
            self._message(request, 400, "Role JSON contains both permissions and grant/revoke")
            return
        if updates:
            steps = self._store.update_role(name, body.grant, body.revoke)
        else:
            steps = self._store.create_role(Role(name, body.permissions))
        self._run(request, steps,
                  lambda role: self._reply(request, 200 if updates else 201, role.json()))

    # -- answers -----------------------------------------------------------

    def _parse(
        self, request: HttpRequest, parse: Callable[[bytes], Any], name: str, what: str
    ) -> Any:
        """Return the parsed body; None after an error, which is answered."""
        if request.body_too_large:
            self._message(request, 413, "Request Entity Too Large")
            return None
        try:
            body = parse(request.body)
        except ValueError:
            self._message(request, 400, "Invalid JSON in request body.")
            return None
        if body.name != name:
            self._message(request, 400, f"{what} JSON name does not match the name in the URL")
            return None
        return body

    def _run(self, request: HttpRequest, steps: Steps, reply: Callable[[Any], None]) -> None:
        """Make a change; then call reply(its result), or answer with its error."""
        def done(result: Any) -> None:
            if isinstance(result, (AuthError, EtcdError)):
                self._fail(request, result)
            else:
                reply(result)

        StepsRunner(self._server.do, self._server.reactor, steps, done).go_on()

    def _fail(self, request: HttpRequest, error: Union[AuthError, EtcdError]) -> None:
        if isinstance(error, EtcdError):
            write_error(request, error, self._cluster_line)
        else:
            self._message(request, error.status, str(error))

    def _message(self, request: HttpRequest, status: int, message: str) -> None:
        write_message(request, status, message, self._cluster_line)

    def _reply(self, request: HttpRequest, status: int, value: object) -> None:
        request.reply(status, utf8(json_text(value) + "\n"), headers=self._cluster_line)

    def _reply_list(
        self, request: HttpRequest, name: str, empty: str, shown: Iterator[object],
        texts: List[str],
    ) -> None:
        """Answer with all of `shown`; one turn formats ITEMS_IN_SLICE of them."""
        some = [json_text(item) for item in itertools.islice(shown, ITEMS_IN_SLICE)]
        texts += some
        if request.connection.closed:
            return
        if len(some) == ITEMS_IN_SLICE:
            self._server.reactor.call_in_turn(
                self._reply_list, request, name, empty, shown, texts)
            return
        listing = f"[{','.join(texts)}]" if texts else empty
        request.reply(200, utf8(f'{{"{name}":{listing}}}\n'), headers=self._cluster_line)

    def _reply_empty(self, request: HttpRequest) -> None:
        request.reply(200, headers="Content-Type: application/json\r\n" + self._cluster_line)


# ============================================================================
# api/listings -- Listings of directories: written in slices, and shared by requests.
# ============================================================================


class ListingRequest(NamedTuple):
    """The options of a GET of a directory; path is internal."""

    path: str
    recursive: bool
    sorted: bool


class ListingWaiter:
    """A request that waits for a listing; done(Listing, or EtcdError) is called once."""

    __slots__ = ("done", "group")

    def __init__(self, done: Callable[[Any], None]) -> None:
        self.done = done
        self.group: Dict[ListingWaiter, None] = {}      # waits for the same listing


class Listings:
    """Makes listings as JSON: long ones in slices, one slice per turn, so that nothing stalls.

    One listing is made after the other, each of the state at its first slice.  Equal requests
    share a listing if they wait at the same time, or come before the store changes.
    Thread: reactor.
    """

    KEPT_BYTES_MAX = 16 << 20       # of complete listings, kept until the store changes
    KEPT_SECONDS = 5.0

    def __init__(self, store: Store, reactor: Reactor) -> None:
        self._store = store
        self._reactor = reactor
        self._current: Optional[Tuple[ListingRequest, Listing]] = None
        self._waiters: Dict[ListingWaiter, None] = {}           # for the current listing
        self._queue: Dict[ListingRequest, Dict[ListingWaiter, None]] = {}     # by arrival
        self._kept: Dict[ListingRequest, Listing] = {}
        self._kept_bytes = 0
        self._expiry: Optional[Timer] = None
        self._is_posted = False         # a slice is scheduled: never two in one turn
        self._turn = 0                  # of the reactor, to which _work_done belongs
        self._work_done = 0

    def ask(
        self, wanted: ListingRequest, request: HttpRequest, done: Callable[[Any], None]
    ) -> None:
        """Call done(Listing, or EtcdError): at once for a short listing, if the turn has time."""
        kept = self._kept.get(wanted)
        if kept is not None and kept.index == self._store.current_index:
            done(kept)
            return
        waiter = ListingWaiter(done)
        request.on_close = functools.partial(self._leave, waiter)
        if self._join(wanted, waiter):
            return
        if self._work_left() <= 0 or wanted in self._queue:
            self._enqueue(wanted, waiter)
            return
        try:
            listing = self._start_listing(wanted)
        except EtcdError as error:
            done(error)
            return
        if listing.done:
            done(listing)
        elif self._current is None:
            self._current, self._waiters = (wanted, listing), {}
            self._enter(waiter, self._waiters)
            self._schedule_slice()
        else:
            listing.end()
            self._enqueue(wanted, waiter)

    def _join(self, wanted: ListingRequest, waiter: ListingWaiter) -> bool:
        """Share the listing under way if a new one would be the same; return whether it is."""
        if self._current is None:
            return False
        its, listing = self._current
        if its != wanted or listing.index != self._store.current_index:
            return False
        self._enter(waiter, self._waiters)
        return True

    def _enqueue(self, wanted: ListingRequest, waiter: ListingWaiter) -> None:
        if self._current is None and not self._queue:
            self._schedule_slice()
        self._enter(waiter, self._queue.setdefault(wanted, {}))

    @staticmethod
    def _enter(waiter: ListingWaiter, group: Dict[ListingWaiter, None]) -> None:
        group[waiter] = None
        waiter.group = group

    def _leave(self, waiter: ListingWaiter) -> None:
        """Forget a waiter whose client is gone, and end a listing without waiters."""
        waiter.group.pop(waiter, None)
        if self._current is not None and not self._waiters:
            self._current[1].end()
            self._current = None

    def _work_left(self) -> int:
        """Return the number of nodes that this turn may still visit."""
        if self._turn != self._reactor.turns:
            self._turn, self._work_done = self._reactor.turns, 0
        return LISTING_SLICE_WORK - self._work_done

    def _start_listing(self, wanted: ListingRequest) -> Listing:
        listing = self._store.listing(
            wanted.path, recursive=wanted.recursive, sorted=wanted.sorted,
            now_ns=self._reactor.wall_ns(),
        )
        self._work(wanted, listing)
        return listing

    def _work(self, wanted: ListingRequest, listing: Listing) -> None:
        before = listing.work_done
        listing.work(max(self._work_left(), 1))
        self._work_done += listing.work_done - before
        size = sum(map(len, listing.chunks)) if listing.done and listing.cacheable else 0
        if size and self._kept_bytes + size <= self.KEPT_BYTES_MAX:
            self._keep(wanted, listing, size)

    def _keep(self, wanted: ListingRequest, listing: Listing, size: int) -> None:
        if wanted in self._kept or listing.index != self._store.current_index:
            self._forget()
        self._kept[wanted] = listing
        self._kept_bytes += size
        if self._expiry is None:
            self._expiry = self._reactor.call_later(self.KEPT_SECONDS, self._forget)

    def _forget(self) -> None:
        self._kept, self._kept_bytes = {}, 0
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None

    def _schedule_slice(self) -> None:
        if not self._is_posted:
            self._is_posted = True
            self._reactor.call_in_turn(self._make_slice)

    def _make_slice(self) -> None:
        """Make one slice of the listing under way, or of the next one."""
        self._is_posted = False
        if self._current is None:
            while self._queue and not self._waiters:
                wanted = next(iter(self._queue))
                self._waiters = self._queue.pop(wanted)
            if not self._waiters:
                return                  # all have left
            try:
                self._current = wanted, self._start_listing(wanted)
            except EtcdError as error:
                self._finish(error)
        else:
            self._work(*self._current)
        if self._current is not None and self._current[1].done:
            self._finish(self._current[1])
        if self._current is not None or self._queue:
            self._schedule_slice()

    def _finish(self, result: Union[Listing, EtcdError]) -> None:
        waiters, self._waiters, self._current = self._waiters, {}, None
        for waiter in waiters:
            self._reactor.call_in_turn(waiter.done, result)


# ============================================================================
# api/keys -- The keys API: turns HTTP requests into commands, and their results into replies.
# ============================================================================


class KeysApi:
    """/v2/keys: reads from the local store, writes through consensus, watches.

    Source: etcd 2.3 API, keys.
    """

    METHODS = ("HEAD", "GET", "PUT", "POST", "DELETE")

    def __init__(self, server: EtcdServer, guard: Guard) -> None:
        self._server = server
        self._guard = guard
        self._store = server.store
        self._reactor = server.reactor
        self._now, self._wall_ns = server.reactor.now, server.reactor.wall_ns
        self._listings = Listings(server.store, server.reactor)
        self._stats = server.store.stats
        self._cluster_line = f"X-Etcd-Cluster-Id: {format_id(server.cluster.id)}\r\n"
        self._heads = {
            status: f"HTTP/1.1 {phrase}\r\nContent-Type: application/json\r\n{self._cluster_line}"
            for status, phrase in ((200, "200 OK"), (201, "201 Created"))
        }
        metrics = server.metrics
        self._received = metrics.counter(
            "etcd_http_received_total", "Key requests that could be parsed.", ("method",))
        self._failed = metrics.counter(
            "etcd_http_failed_total", "Key requests answered with an error.", ("method", "code"))
        self._durations = Histograms(exponential_bounds(0.0005, 13), ("method",))
        metrics.add("etcd_http_successful_duration_second", "Time to answer a key request.",
                    self._durations)
        self._proposals = Histogram(exponential_bounds(0.001, 14))
        metrics.add("etcd_server_proposal_durations_seconds", "Time to commit and apply.",
                    self._proposals)
        self._watches = metrics.counter(
            "etcd_store_watch_requests_total", "Watches that were asked for.")
        self._get_durations = self._durations.child("GET")
        self._put_durations = self._durations.child("PUT")
        self._puts_s: List[float] = []      # durations of PUTs that _put_durations lacks
        metrics.before_text = self._count_puts

    def route(self, head: HttpHead) -> Handler:
        if head.method not in self.METHODS:
            return functools.partial(refuse_method, ",".join(self.METHODS))
        target = KeyTarget(head)
        command = target.command
        if target.error is not None:
            return functools.partial(self._refuse, target.error)
        return self._guard.key(
            head, head.path[len("/v2/keys"):], write=head.method not in ("GET", "HEAD"),
            recursive=command.recursive, passed=self._answer(head, target),
            refused=functools.partial(self._unauthorized, target),
        )

    def _answer(self, head: HttpHead, target: KeyTarget) -> Handler:
        command = target.command
        if head.method in ("PUT", "POST"):
            return functools.partial(self._put, target)
        if head.method == "DELETE":
            return functools.partial(self._submit, command)
        if head.method == "GET" and command.quorum:
            return functools.partial(self._submit, command._replace(method="QGET"))
        if command.wait:
            return functools.partial(self._watch, command)
        return functools.partial(self._get, command.path, command.recursive, command.sorted)

    def _refuse(self, error: EtcdError, request: HttpRequest) -> None:
        write_error(request, error, self._cluster_line)

    def _unauthorized(self, target: KeyTarget, request: HttpRequest) -> None:
        """Answer 401; errors in the form of a PUT or POST go before."""
        refuse = functools.partial(self._refuse, Unauthorized("Insufficient credentials"))
        if request.method in ("PUT", "POST"):
            self._parse_slice(self._read(target, request), request, refuse)
        else:
            refuse(request)

    def _get(self, path: str, recursive: bool, sorted: bool, request: HttpRequest) -> None:
        """GET and HEAD from the local store.  A hot path."""
        started = self._now()
        # etcd reads the key that enables auth at every key request, and counts the miss.
        self._stats.gets_fail += 1
        method = request.head.method
        self._received.inc(method)
        try:
            body = self._store.file_json(path, recursive=recursive, now_ns=self._wall_ns())
        except EtcdError as error:
            self._fail(request, method, error)
            return
        if not body:
            self._list(request, method, started, ListingRequest(path, recursive, sorted))
            return
        self._send(request, 200, self._store.current_index, body[0], body[1:])
        durations = self._get_durations if method == "GET" else self._durations.child(method)
        durations.observe(self._now() - started)

    def _list(
        self, request: HttpRequest, method: str, started: float, wanted: ListingRequest
    ) -> None:
        def done(result: Union[Listing, EtcdError]) -> None:
            if isinstance(result, EtcdError):
                self._fail(request, method, result)
                return
            first, *more = result.chunks
            self._send(request, 200, result.index, first, more)
            self._durations.child(method).observe(self._now() - started)

        self._listings.ask(wanted, request, done)

    def _put(self, target: KeyTarget, request: HttpRequest) -> None:
        """PUT and POST.  A hot path for bodies of the form `value=<nothing encoded>`."""
        body = request.body
        if target.plain and body.startswith(b"value=") and len(body) < FORM_SLICE_BYTES and not (
            b"%" in body or b"+" in body or b"&" in body or b";" in body
        ):
            value, known = body[6:], target.command
            text = text_of(value)
            if is_unicode(text):
                id = self._server.ids.next()
                command = Request(id, known.method, known.path, text)
                self._submit(command, request, encode_plain(id, target.encoded, value))
                return
        self._parse_slice(self._read(target, request), request)

    def _read(
        self, target: KeyTarget, request: HttpRequest
    ) -> Generator[None, None, Tuple[Request, bytes]]:
        """Return the command of a PUT or POST, and its encoding if it is long, with pauses."""
        command = yield from target.request(request, self._wall_ns())
        if len(request.body) < FORM_SLICE_BYTES:
            return command, b""
        # Longer texts are UTF-8, see form_steps(); another check would take 1 ms per MB.
        val, prev_value = (
            text if len(text) > FORM_SLICE_BYTES else as_unicode(text)
            for text in (command.val, command.prev_value)
        )
        command = command._replace(
            id=self._server.ids.next(), path=as_unicode(command.path), val=val,
            prev_value=prev_value,
        )
        return command, (yield from encode_request_steps(command))

    def _parse_slice(
        self, steps: Generator[None, None, Tuple[Request, bytes]], request: HttpRequest,
        refuse: Optional[Handler] = None,
    ) -> None:
        """Parse as much of a form as fits in a turn; at its end propose the command, or refuse."""
        try:
            next(steps)
        except StopIteration as end:
            if refuse is None:
                command, encoded = end.value
                self._submit(command, request, encoded)
            else:
                refuse(request)
        except EtcdError as error:
            self._refuse(error, request)
        else:
            if not request.connection.closed:
                self._reactor.call_in_turn(self._parse_slice, steps, request, refuse)

    def _submit(self, command: Request, request: HttpRequest, encoded: bytes = b"") -> None:
        method = command.method
        self._stats.gets_fail += 1              # as in _get
        self._received.inc(method)
        done = functools.partial(self._reply_applied, request, command, self._now())
        self._server.do(command, done, encoded)

    def _reply_applied(
        self, request: HttpRequest, command: Request, started: float, result: Any
    ) -> None:
        """Answer after the command is applied or has failed."""
        method = command.method
        if isinstance(result, EtcdError):
            self._fail(request, method, result)
            return
        if method == "QGET" and result.node.children is not None:
            self._proposals.observe(self._now() - started)
            wanted = ListingRequest(command.path, command.recursive, command.sorted)
            self._list(request, method, started, wanted)
            return
        body = result.client_pieces()
        status = 201 if result.is_created else 200
        self._send(request, status, result.index, body[0], body[1:])
        elapsed_s = self._now() - started
        if method == "PUT":
            self._puts_s.append(elapsed_s)
            if len(self._puts_s) >= 1_000:
                self._count_puts()
            return
        self._proposals.observe(elapsed_s)
        self._durations.child(method).observe(elapsed_s)

    def _count_puts(self) -> None:
        puts_s, self._puts_s = self._puts_s, []
        self._proposals.observe_many(puts_s)
        self._put_durations.observe_many(puts_s)

    def _watch(self, command: Request, request: HttpRequest) -> None:
        self._stats.gets_fail += 1              # as in _get
        if self._store.stats.watchers >= WATCHERS_MAX:
            write_message(
                request, 503, f"{WATCHERS_MAX} watchers wait already; use another member, or one"
                " recursive watch instead of many", self._cluster_line,
            )
            return
        if self._store.hub.watched_bytes + len(command.path) > WATCHED_BYTES_MAX:
            write_message(
                request, 503, "the watchers' paths take too much memory; use shorter keys, or"
                " another member", self._cluster_line,
            )
            return
        self._watches.inc()
        headers = self._cluster_line + self._index_lines(self._store.current_index)
        try:
            KeyWatch(request, stream=command.stream).start(self._store, command, request, headers)
        except EventIndexCleared as error:
            self._fail(request, "GET", error)

    def _fail(self, request: HttpRequest, method: str, error: EtcdError) -> None:
        self._failed.inc(method, str(error.status))
        write_error(request, error, self._cluster_line)

    def _index_lines(self, index: int) -> str:
        server = self._server
        return (
            f"X-Etcd-Index: {index}\r\nX-Raft-Index: {server.raft_index}\r\n"
            f"X-Raft-Term: {server.raft_term}\r\n"
        )

    def _send(
        self, request: HttpRequest, status: int, index: int, body: bytes,
        more: Sequence[bytes] = (),
    ) -> None:
        """Answer with an event; most requests take the short way, a ready-made head."""
        head, size = request.head, len(body)
        if not head.takes_raw:
            headers = self._cluster_line + self._index_lines(index)
            request.reply(status, body, "application/json", headers, more)
            return
        if more or size > OUTPUT_JOIN_BYTES_MAX:
            body, more = b"", (body, *more)
            size = sum(map(len, more))
        server = self._server
        request.reply_raw(
            f"{self._heads[status]}X-Etcd-Index: {index}\r\nX-Raft-Index: {server.raft_index}\r\n"
            f"X-Raft-Term: {server.raft_term}\r\nDate: {self._reactor.http_date}\r\n"
            f"Content-Length: {size}\r\n\r\n".encode("latin-1") + body, more
        )


# ============================================================================
# api/members -- The members API: the list of members, and its changes.
# ============================================================================


_PATH_SAFE = "/$&+,:;=@-_.~"        # characters that Go does not escape in a path


def redirect(request: HttpRequest) -> None:
    """Answer 301 with the canonical form of the path.  Source: Go http.ServeMux, Redirect."""
    if len(request.target) > KEY_BYTES_MAX:
        request.reply(414)
        return
    location = urllib.parse.quote(utf8(canonical_path(request.path)), safe=_PATH_SAFE)
    if request.query:
        location += "?" + request.query
    body = b""
    if request.method in ("GET", "HEAD"):
        shown = location.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        shown = shown.replace('"', "&#34;").replace("'", "&#39;")
        body = f'<a href="{shown}">Moved Permanently</a>.\n\n'.encode("latin-1")
    ascii_only = "".join(c if c < "\x80" else f"%{ord(c):x}" for c in location)
    request.reply(301, body, "text/html; charset=utf-8", f"Location: {ascii_only}\r\n")


PEER_URLS_MAX = 100                 # of one member; above: 400
_PEER_URLS_TYPE = r'struct { PeerURLs []string "json:\"peerURLs\"" }'


def parse_peer_urls(body: bytes) -> Tuple[str, ...]:
    """Return the sorted peer URLs in the body of a member request.

    Raises ValueError with etcd's words.  Source: etcd 2.3 etcdhttp/httptypes/member.go.
    """
    value = GoJson.loads(body)
    if value is not None and not isinstance(value, dict):
        kind = GoJson.type_name(value)
        raise ValueError(f"json: cannot unmarshal {kind} into Go value of type {_PEER_URLS_TYPE}")
    urls = GoJson.member(value, "peerURLs")
    into = "into Go struct field .peerURLs of type"
    if urls is not None and not isinstance(urls, list):
        raise ValueError(f"json: cannot unmarshal {GoJson.type_name(urls)} {into} []string")
    for url in urls or ():
        if url is not None and not isinstance(url, str):
            raise ValueError(f"json: cannot unmarshal {GoJson.type_name(url)} {into} string")
    if not urls:
        raise ValueError("no valid URLs given")
    if len(urls) > PEER_URLS_MAX:
        raise ValueError(f"more than {PEER_URLS_MAX} URLs given")
    return tuple(sorted(check_advertised_url(url or "") for url in urls))


class MembersApi:
    """/v2/members.  Source: etcd 2.3 API, members; etcdhttp/client.go."""

    METHODS = ("GET", "POST", "DELETE", "PUT")

    def __init__(self, server: EtcdServer) -> None:
        self._server = server
        self._cluster = server.cluster
        self._cluster_line = f"X-Etcd-Cluster-Id: {format_id(server.cluster.id)}\r\n"

    def handle(self, request: HttpRequest) -> None:
        rest = request.path[len("/v2/members"):]
        rest = rest[1:] if rest.startswith("/") else rest
        if request.method == "GET":
            self._get(request, rest)
        elif request.method == "POST":
            self._change_urls(request, ConfChangeType.ADD_NODE)
        elif not rest:
            write_text(request, 405, "Method Not Allowed\n", self._cluster_line)
        elif not re.fullmatch("[0-9A-Fa-f]+", rest) or len(rest.lstrip("0")) > 16:
            self._message(request, 404, f"No such member: {rest}")
        elif request.method == "DELETE":
            self._change(request, ConfChangeType.REMOVE_NODE, Member(int(rest, 16), ()))
        else:
            self._change_urls(request, ConfChangeType.UPDATE_NODE, int(rest, 16))

    def _get(self, request: HttpRequest, rest: str) -> None:
        if rest == "":
            members = sorted(self._cluster.members.values())
            listing = ",".join(member.client_json() for member in members)
            self._reply(request, 200, f'{{"members":[{listing}]}}\n')
        elif rest != "leader":
            self._message(request, 404, "Not found")
        else:
            leader = self._cluster.members.get(self._server.lead)
            if leader is None:
                self._message(request, 503, "During election")
            else:
                self._reply(request, 200, leader.client_json() + "\n")

    def _change_urls(self, request: HttpRequest, change: ConfChangeType, id: int = 0) -> None:
        """Add a member with the URLs in the body, or give them to member `id`."""
        urls = self._peer_urls(request)
        if urls:
            self._warn_of_local(urls)
            id = id or member_id(urls, "", self._server.reactor.wall_ns() // NS)
            self._change(request, change, Member(id, urls))

    def _warn_of_local(self, urls: Sequence[str]) -> None:
        """Warn of loopback URLs in a cluster of several machines."""
        known = usable_urls(self._cluster.peer_urls())
        near = [url for url in urls if is_local(url)]
        if near and not all(map(is_local, known)):
            package_logger("etcdhttp").warning(
                "a member is added at %s, which each member takes for its own machine; if it runs"
                " elsewhere, give its address with PUT /v2/members/<id>", ",".join(near),
            )

    def _peer_urls(self, request: HttpRequest) -> Tuple[str, ...]:
        """Return the URLs in the body; () after an error, which is answered."""
        content_type = request.headers.get("content-type", "")
        if content_type != "application/json":
            self._message(
                request, 415, f"Bad Content-Type {content_type}, accept application/json"
            )
            return ()
        if request.body_too_large:
            self._message(request, 413, "Request Entity Too Large")
            return ()
        try:
            return parse_peer_urls(request.body)
        except ValueError as error:
            self._message(request, 400, str(error))
            return ()

    def _change(self, request: HttpRequest, change: ConfChangeType, member: Member) -> None:
        done = functools.partial(self._reply_change, request, change, member)
        self._server.change_member(change, member, done)

    def _reply_change(
        self, request: HttpRequest, change: ConfChangeType, member: Member,
        error: Optional[Exception],
    ) -> None:
        if error is None and change == ConfChangeType.ADD_NODE:
            self._reply(request, 201, member.client_json() + "\n")
        elif error is None:
            request.reply(204, headers=self._cluster_line)
        elif isinstance(error, (PeerUrlExists, MemberExists)):
            self._message(request, 409, str(error))
        elif isinstance(error, MemberNotFound):
            self._message(request, 404, f"No such member: {format_id(member.id)}")
        elif isinstance(error, MemberRemoved) and change == ConfChangeType.REMOVE_NODE:
            text = f"Member permanently removed: {format_id(member.id)}"
            self._message(request, 410, text)
        else:
            cause = error.cause if isinstance(error, EtcdError) else str(error)
            package_logger("etcdhttp").error("got unexpected response error (%s)", cause)
            is_refused = isinstance(error, ReconfigurationRefused)  # etcd only logs the reason
            self._message(request, 500, str(error) if is_refused else "Internal Server Error")

    def _reply(self, request: HttpRequest, status: int, body: str) -> None:
        request.reply(status, utf8(body), "application/json", self._cluster_line)

    def _message(self, request: HttpRequest, status: int, message: str) -> None:
        write_message(request, status, message, self._cluster_line)


# ============================================================================
# api/metrics -- Metrics of one member, and the variables of /debug/vars.
# ============================================================================


_PROPOSALS_PENDING = "Proposals waiting for an answer."
_PROPOSALS_FAILED = "Proposals without an answer in time."
_SYNC = "Time to write a batch to the log and sync it."
_LOST = "Messages lost or dropped."

# Name, help, reading.  Names of etcd 2.3, and those that 3.x has for the same.
_GAUGES: Tuple[Tuple[str, str, Callable[[EtcdServer], float]], ...] = (
    ("etcd_server_pending_proposal_total", _PROPOSALS_PENDING, lambda s: len(s.proposals)),
    ("etcd_server_proposals_pending", _PROPOSALS_PENDING, lambda s: len(s.proposals)),
    ("etcd_server_has_leader", "1 if a leader is known, else 0.", lambda s: int(s.lead != 0)),
    ("etcd_server_is_leader", "1 if this member leads, else 0.", lambda s: int(s.is_leader)),
    ("etcd_server_proposals_committed_total", "Raft index that is committed.",
     lambda s: s.node.raft.log.commit),
    ("etcd_server_proposals_applied_total", "Raft index that is applied.",
     lambda s: s.raft_index),
    ("etcd_store_watchers", "Registered watchers.", lambda s: s.store.stats.watchers),
    ("etcd_wal_last_index_saved", "Last raft index on disk.", lambda s: s.node.raft.log.stable),
)
_COUNTERS: Tuple[Tuple[str, str, Callable[[EtcdServer], float]], ...] = (
    ("etcd_server_proposal_failed_total", _PROPOSALS_FAILED, lambda s: s.proposals.failed),
    ("etcd_server_proposals_failed_total", _PROPOSALS_FAILED, lambda s: s.proposals.failed),
    ("etcd_server_slow_apply_total", "Turns that applied for more than 100 ms.",
     lambda s: s.counts.slow_applies),
    ("etcd_server_leader_changes_seen_total", "Leaders that became known.",
     lambda s: s.counts.leader_changes),
    ("etcd_server_heartbeat_send_failures_total",
     "Heartbeats to followers that left a period late or more.",
     lambda s: s.counts.late_heartbeats),
    ("pyetcd_v3_entries_skipped_total", "Entries of etcd's v3 API, which are not applied.",
     lambda s: s.applier.v3_entries),
    ("etcd_store_expires_total", "Keys that expired.", lambda s: s.store.stats.expire_count),
)
# Name, help, label, its value: samples that are always 1.
_FACTS: Tuple[Tuple[str, str, str, Callable[[EtcdServer], str]], ...] = (
    ("etcd_server_id", "Id of this member, in hex.", "server_id",
     lambda s: format_id(s.member_id)),
    ("etcd_server_version", "The etcd version that this member acts as.", "server_version",
     lambda s: s.cluster.identity.reported),
    ("etcd_cluster_version", "The version that all members understand.", "cluster_version",
     lambda s: s.cluster.version or "not_decided"),
)
_HISTOGRAMS: Tuple[Tuple[str, str, Callable[[EtcdServer], Family]], ...] = (
    ("pyetcd_reactor_turn_seconds", "Time of one turn of the main loop.",
     lambda s: s.counts.turn_durations),
    ("etcd_wal_fsync_durations_seconds", _SYNC, lambda s: s.journal.writer.sync_durations),
    ("etcd_disk_wal_fsync_duration_seconds", _SYNC, lambda s: s.journal.writer.sync_durations),
    ("etcd_snapshot_save_total_durations_seconds",
     "Time from the decision to snapshot until the file is there.",
     lambda s: s.snapshots.save_durations),
    ("etcd_snapshot_save_marshalling_durations_seconds",
     "Time of the reactor to encode a snapshot.", lambda s: s.snapshots.work_durations),
    ("pyetcd_wal_batch_entries", "Entries that one write and sync made durable.",
     lambda s: s.journal.batch_entries),
    ("etcd_rafthttp_message_sent_latency_seconds",
     "Time until the system took a message; by pipeline: until it was answered.",
     lambda s: s.traffic.latencies),
    ("etcd_rafthttp_message_sent_failed_total", _LOST, lambda s: s.traffic.failures),
    ("etcd_network_peer_round_trip_time_seconds", "Time of a probe to a peer and back.",
     lambda s: s.traffic.round_trips),
)
# Name, help, label, counts by member id.
_BY_PEER: Tuple[Tuple[str, str, str, Callable[[EtcdServer], Mapping[int, int]]], ...] = (
    ("etcd_network_peer_sent_bytes_total", "Bytes of messages to a peer.", "To",
     lambda s: s.traffic.sent_bytes),
    ("etcd_network_peer_sent_failures_total", _LOST, "To", lambda s: s.traffic.sent_failures),
    ("etcd_network_peer_received_bytes_total", "Bytes of messages from a peer.", "From",
     lambda s: s.traffic.received_bytes),
)


def add_member_metrics(server: EtcdServer) -> None:
    metrics, store, partial = server.metrics, server.store, functools.partial
    for name, help, read in _GAUGES:
        metrics.gauge(name, help, partial(read, server))
    for name, help, read in _COUNTERS:
        metrics.total(name, help, partial(_unlabelled, read, server))
    for name, help, label, text in _FACTS:
        metrics.fact(name, help, label, partial(text, server))
    for name, help, family in _HISTOGRAMS:
        metrics.add(name, help, family(server))
    for name, help, label, counts in _BY_PEER:
        metrics.total(name, help, partial(_by_peer, counts(server)), (label,))
    for suffix, outcome, ended in (("", "success", "succeeded"), ("_failed", "fail", "failed")):
        metrics.total(f"etcd_store_reads{suffix}_total", f"Store reads that {ended}.",
                      partial(_read_counts, store, outcome), ("action",))
        metrics.total(f"etcd_store_writes{suffix}_total", f"Store writes that {ended}.",
                      partial(_write_counts, store, outcome), ("action",))
    metrics.total("pyetcd_reactor_seconds_total", "Where the time of the main loop goes.",
                  lambda: {(name,): s for name, s in server.reactor.phase_seconds.items()},
                  ("phase",))
    metrics.gauge("etcd_server_file_descriptors_used_total", "Open file descriptors.",
                  _open_descriptors(server.reactor.now))
    add_process_readings(metrics, server.stats.started_ns, server.reactor.now)


def _unlabelled(
    read: Callable[[EtcdServer], float], server: EtcdServer
) -> Dict[Labels, float]:
    return {(): read(server)}


def _by_peer(counts: Mapping[int, int]) -> Dict[Labels, float]:
    return {(format_id(peer),): count for peer, count in counts.items()}


_WRITE_ACTIONS = {
    "set": "sets", "create": "create", "update": "update", "delete": "delete",
    "compareAndSwap": "compare_and_swap", "compareAndDelete": "compare_and_delete",
}


def _write_counts(store: Store, outcome: str) -> Dict[Labels, float]:
    """Return the writes of the store's statistics by action, without actions at 0."""
    counts = (
        (action, getattr(store.stats, f"{name}_{outcome}"))
        for action, name in _WRITE_ACTIONS.items()
    )
    return {(action,): count for action, count in counts if count}


def _read_counts(store: Store, outcome: str) -> Dict[Labels, float]:
    """Return the reads likewise; the store counts recursive ones beside its statistics."""
    recursive = store.recursive_gets[outcome]
    single = getattr(store.stats, f"gets_{outcome}") - recursive
    counts = (("get", single), ("getRecursive", recursive))
    return {(action,): count for action, count in counts if count}


# -- the process -----------------------------------------------------------------


def add_process_readings(
    metrics: Metrics, started_ns: int, now: Callable[[], float]
) -> None:
    """Register readings of this process.  started_ns: unix nanoseconds."""
    metrics.total("process_cpu_seconds_total", "CPU time in seconds.",
                  lambda: {(): sum(os.times()[:2])})
    metrics.gauge("process_open_fds", "Open file descriptors.", _open_descriptors(now))
    metrics.gauge("process_max_fds", "Limit of open file descriptors.",
                  lambda: resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    metrics.gauge("process_resident_memory_bytes", "Resident memory.", _resident_bytes)
    metrics.gauge("process_virtual_memory_bytes", "Virtual memory.", _virtual_bytes)
    metrics.gauge("process_start_time_seconds", "Start of this member, unix seconds.",
                  lambda: started_ns / NS)


def _statm_bytes(field: int) -> int:
    """Return a field of /proc/self/statm in bytes; 0 where that file does not exist."""
    try:
        with open("/proc/self/statm", encoding="ascii", errors="replace") as file:
            return int(file.read().split()[field]) * resource.getpagesize()
    except (OSError, IndexError):
        return 0


def _virtual_bytes() -> int:
    return _statm_bytes(0)


def _resident_bytes() -> int:
    """Return the memory in use; without /proc, the most that was ever in use."""
    return _statm_bytes(1) or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _open_descriptors(now: Callable[[], float]) -> Callable[[], int]:
    """Return a reading that counts once a second: the count takes 0.3 us per descriptor."""
    return lambda: _count_descriptors(int(now()))


@functools.lru_cache(maxsize=1)
def _count_descriptors(second: int) -> int:
    for directory in ("/proc/self/fd", "/dev/fd"):
        with contextlib.suppress(OSError):
            return len(os.listdir(directory)) - 1       # less the one of listdir itself
    return 0


# -- /debug/vars -----------------------------------------------------------------


def debug_variables(server: EtcdServer) -> Dict[str, object]:
    """Return the variables of etcd, then those that show where time is spent and work waits."""
    reactor, journal, log = server.reactor, server.journal, server.node.raft.log
    return {
        "cmdline": [sys.executable, *sys.argv],
        "file_descriptor_limit": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "memstats": {
            "Alloc": _resident_bytes(), "Sys": _virtual_bytes(),
            "NumGC": sum(generation["collections"] for generation in gc.get_stats()),
        },
        "raft.status": _raft_status(server.node.status()),
        "reactor": {
            "turns": reactor.turns, "mean_turn_s": server.counts.turn_durations.mean,
            "slowest_turn_s": reactor.slowest_turn_s, "seconds": reactor.phase_seconds,
        },
        "journal": {
            "visits": journal.visits, "mean_batch_entries": journal.batch_entries.mean,
            "mean_sync_s": journal.writer.sync_durations.mean, "busy": journal.busy,
        },
        "queues": {
            "proposals_pending": len(server.proposals), "reads_pending": len(server.reads),
            "entries_not_durable": log.last_index - log.stable,
            "entries_not_applied": log.commit - log.applied,
            "watchers_to_tell": server.store.hub.backlog,
        },
    }


def _raft_status(status: Status) -> Dict[str, object]:
    return {
        "id": format_id(status.id), "term": status.term, "vote": format_id(status.vote),
        "commit": status.commit, "lead": format_id(status.lead),
        "raftState": raft_state_name(status.role),
        "progress": {
            format_id(each): {
                "match": match, "next": next_, "state": "ProgressState" + state.capitalize(),
            }
            for each, (match, next_, state) in status.progress.items()
        },
    }


# ============================================================================
# api/snapshot -- The snapshot API: the whole state, over HTTP.
# ============================================================================


DOWNLOADS_MAX = 4                   # at a time, with HELD_BYTES_MAX of snapshots; above: 503


class SnapshotApi:
    """/v2/snapshot: the state at one index, as the file that a member would write.

    Differs from etcd 2.3, which has no such path.  Thread: reactor.
    """

    METHODS = ("GET",)

    def __init__(self, server: EtcdServer) -> None:
        self._server = server
        self._downloads: Set[Download] = set()

    def handle(self, request: HttpRequest) -> None:
        if not self._server.raft_index:
            write_message(request, 503, "this member has no state yet; ask another one")
        elif len(self._downloads) >= DOWNLOADS_MAX or self._held_bytes() > HELD_BYTES_MAX:
            write_message(request, 503, "too many snapshots are being taken; try again later")
        else:
            self._downloads.add(Download(request, self._server, self._downloads.discard))

    def _held_bytes(self) -> int:
        """Return the memory of the snapshots under way; several downloads may share one."""
        files = {id(each.file): each.file.size for each in self._downloads if each.file}
        return sum(files.values())


class Download:
    """One answer: it waits for the snapshot, then sends its pieces as fast as the client reads."""

    def __init__(
        self, request: HttpRequest, server: EtcdServer, ended: Callable[[Download], None]
    ) -> None:
        self._request = request
        self._server = server
        self._ended = ended
        self.file: Optional[SnapshotFile] = None        # once the snapshot is complete
        self._reply: Optional[StreamReply] = None
        self._pieces: Iterator[bytes] = iter(())
        # Kept, as withdraw() needs the same object.
        self._receiver: Optional[SnapshotReceiver] = self._start
        request.on_close = self._client_gone
        server.snapshots.request(self._receiver)

    def _start(self, file: SnapshotFile, etcd_index: int) -> None:
        headers = (
            f"X-Etcd-Cluster-Id: {format_id(self._server.cluster.id)}\r\n"
            f"X-Etcd-Index: {etcd_index}\r\nX-Raft-Index: {file.id.index}\r\n"
            f"X-Raft-Term: {file.id.term}\r\n"
            f'Content-Disposition: attachment; filename="{file.name}"\r\n'
        )
        self.file = file
        self._pieces = iter((file.head, *file.pieces))
        self._reply = self._request.start_stream(
            200, "application/octet-stream", headers, length=len(file.head) + file.size
        )
        self._reply.on_close = self._client_gone
        self._send_piece()

    def _send_piece(self) -> None:
        """Send the next piece: one in a turn, so that other requests get theirs."""
        if self._reply is None or self._reply.closed:
            return
        piece = next(self._pieces, None)
        if piece is None:
            self._reply.end()
            self._receiver = None
            self._ended(self)
            return
        self._reply.when_read(functools.partial(self._server.reactor.call_soon, self._send_piece))
        self._reply.write(piece)

    def _client_gone(self) -> None:
        self._pieces = iter(())
        receiver, self._receiver = self._receiver, None
        if receiver is not None:
            self._server.snapshots.withdraw(receiver)
        self._ended(self)


# ============================================================================
# api/status -- The status API: version, health, statistics and log level of one member.
# ============================================================================


def version_json(server: EtcdServer) -> bytes:
    cluster = server.cluster
    version = cluster.version or "not_decided"
    return f'{{"etcdserver":"{cluster.identity.reported}","etcdcluster":"{version}"}}'.encode()


class StatusApi:
    """Version, machines, stats, health, metrics and log level of a member."""

    CHECKS = {
        "/livez": ("serializable_read",), "/readyz": ("serializable_read", "linearizable_read"),
    }

    def __init__(self, server: EtcdServer) -> None:
        self._server = server
        metrics = server.metrics
        self._healthy = metrics.counter(
            "etcd_server_health_success", "Probes answered with good news.")
        self._unhealthy = metrics.counter(
            "etcd_server_health_failures", "Probes answered with bad news.")
        add_member_metrics(server)

    def version(self, request: HttpRequest) -> None:
        request.reply(200, version_json(self._server))

    def machines(self, request: HttpRequest) -> None:
        write_text(request, 200, ", ".join(sorted(self._server.cluster.client_urls())))

    def health(self, request: HttpRequest) -> None:
        """Answer at once, from the known leader and the links to the other members.

        Differs from etcd, which waits up to 750 ms for the raft index to move.
        """
        healthy = self._server.is_healthy
        (self._healthy if healthy else self._unhealthy).inc()
        if healthy:
            write_text(request, 200, '{"health": "true"}')
        else:
            write_text(request, 503, '{"health": "false"}\n')

    def probe(self, request: HttpRequest) -> None:
        """Answer /livez, /readyz, or one check of them: `ok`, or 503 with the failed checks.

        ?verbose shows every check, ?exclude=NAME skips one.  A serializable read needs this
        member's store only; a linearizable one needs a leader and a quorum, as /health does.
        Source: etcd 3.5 etcdhttp/health.go; 2.3 has no such paths.
        """
        path, _, single = request.path[1:].partition("/")
        if len(request.query) > SHORT_HEADER_BYTES_MAX:
            request.reply(414)
            return
        query = urllib.parse.parse_qs(request.query, keep_blank_values=True)
        checks = (single,) if single else self.CHECKS["/" + path]
        failed, lines = False, ""
        for check in checks:
            if check in query.get("exclude", ()):
                continue
            problem = "" if check == "serializable_read" else self._problem()
            failed = failed or problem != ""
            lines += f"[-]{check} failed: {problem}\n" if problem else f"[+]{check} ok\n"
        (self._unhealthy if failed else self._healthy).inc()
        if failed:
            write_text(request, 503, lines)
        else:
            write_text(request, 200, (lines if "verbose" in query else "") + "ok\n", _NOSNIFF)

    def _problem(self) -> str:
        """Return why a linearizable read would fail; "" if it would not."""
        if self._server.is_healthy:
            return ""
        return "no quorum of members is connected" if self._server.lead else "etcdserver: no leader"

    def stats_self(self, request: HttpRequest) -> None:
        state = raft_state_name(self._server.node.raft.role)
        request.reply(200, utf8(self._server.stats.json(state)))

    def stats_leader(self, request: HttpRequest) -> None:
        server = self._server
        if not server.is_leader:
            write_message(request, 403, "not current leader")
            return
        followers = server.cluster.members.keys() - {server.member_id}
        request.reply(200, server.leader_stats.json(followers).encode())

    def stats_store(self, request: HttpRequest) -> None:
        request.reply(200, self._server.store.stats.json().encode())

    def metrics(self, request: HttpRequest) -> None:
        request.reply(200, utf8(self._server.metrics.text()), "text/plain; version=0.0.4")

    def debug_vars(self, request: HttpRequest) -> None:
        lines = ",\n".join(
            f"{json_string(name)}: {json_text(value)}"
            for name, value in debug_variables(self._server).items()
        )
        request.reply(200, utf8(f"{{\n{lines}\n}}\n"), "application/json; charset=utf-8")

    def log_level(self, request: HttpRequest) -> None:
        """Set the level of all loggers to that in the body, {"Level": "DEBUG"}."""
        if request.body_too_large:
            write_message(request, 413, "Request Entity Too Large")
            return
        try:
            name = GoJson.string_member(GoJson.loads(request.body, partial=True), "Level")
        except ValueError:
            write_message(request, 400, "Invalid json body")
            return
        level = _LEVELS.get(name.upper())
        if level is None:
            write_message(request, 400, f"Invalid log level {name}")
            return
        package_logger("etcdhttp").info('globalLogLevel set to "%s"', level[0])
        logging.getLogger("pyetcd").setLevel(level[1])
        request.reply(204)


_LEVELS = {
    word: (name, level) for name, number, level in (
        ("CRITICAL", "", logging.CRITICAL), ("ERROR", "0", logging.ERROR),
        ("WARNING", "1", logging.WARNING), ("NOTICE", "2", logging.INFO),
        ("INFO", "3", logging.INFO), ("DEBUG", "4", logging.DEBUG), ("TRACE", "5", logging.DEBUG),
    ) for word in (name, name[0], number) if word
}


# ============================================================================
# api/routes -- The tables of paths of the client port and the peer port.
# ============================================================================


class CorsRequest(HttpRequest):
    """A request whose reply has the headers of CORS."""

    __slots__ = ("_lines", "is_allowed")

    def __init__(self, request: HttpRequest, lines: str, *, is_allowed: bool) -> None:
        super().__init__(request.head, request.body, request.connection)
        self.body_too_large = request.body_too_large
        self.is_allowed = is_allowed    # scripts of its origin may use the API
        self._lines = lines

    def reply(
        self, status: int, body: bytes = b"", content_type: Optional[str] = "application/json",
        headers: str = "", more: Sequence[bytes] = (),
    ) -> None:
        super().reply(status, body, content_type, self._lines + headers, more)

    def reply_raw(self, data: bytes, more: Sequence[bytes] = ()) -> None:
        status_line, _, rest = data.partition(b"\r\n")
        lines = self._lines.encode("latin-1")
        super().reply_raw(b"%b\r\n%b%b" % (status_line, lines, rest), more)

    def start_stream(
        self, status: int, content_type: Optional[str] = "application/json", headers: str = "",
        *, length: Optional[int] = None,
    ) -> StreamReply:
        return super().start_stream(status, content_type, self._lines + headers, length=length)


def allow_origin(request: HttpRequest, origins: FrozenSet[str]) -> HttpRequest:
    """Return `request` so that its reply has the headers of CORS, if `origins` are configured.

    With a list of origins every reply has `Vary: Origin`, for caches on the way.
    """
    if not origins:
        return request
    lines, origin = "", "*"
    if "*" not in origins:
        lines, origin = "Vary: Origin\r\n", request.headers.get("origin", "")
    is_allowed = origin in origins
    if is_allowed:
        lines += (
            "Access-Control-Allow-Headers: accept, content-type, authorization\r\n"
            "Access-Control-Allow-Methods: POST, GET, OPTIONS, PUT, DELETE\r\n"
            f"Access-Control-Allow-Origin: {origin}\r\n"
        )
    return CorsRequest(request, lines, is_allowed=is_allowed)


class ClientApi:
    """The client port: a table from path to handler.

    fallback  handles paths that etcd does not have; returns True if it answered.  Set by the owner

    The handler for a head is kept in HttpHead.parsed, with the version of users and roles for which
    it was found: heads are cached, so most requests skip the search.  Thread: reactor.
    Source: etcd 2.3 etcdhttp/client.go, pkg/cors, Go http.ServeMux.
    """

    def __init__(self, server: EtcdServer) -> None:
        self.fallback: Callable[[HttpRequest], bool] = lambda request: False
        self._origins = frozenset(server.config.cors)
        self._log = package_logger("etcdhttp")
        self._applier = server.applier
        auth = Auth(server.store, server.applier, server.reactor)
        self._guard = Guard(auth, server.reactor)
        self._auth = AuthApi(server, auth, self._guard)
        self._keys = KeysApi(server, self._guard)
        self._members = MembersApi(server)
        status, snapshot = StatusApi(server), SnapshotApi(server)
        self._routes: Dict[str, Tuple[Tuple[str, ...], Handler]] = {
            "/v2/members": (MembersApi.METHODS, self._members.handle),
            "/v2/snapshot": (SnapshotApi.METHODS, snapshot.handle),
            "/v2/machines": (("GET", "HEAD"), status.machines),
            "/v2/stats/self": (("GET",), status.stats_self),
            "/v2/stats/leader": (("GET",), status.stats_leader),
            "/v2/stats/store": (("GET",), status.stats_store),
            "/version": (("GET",), status.version),
            "/health": (("GET",), status.health),
            "/metrics": ((), status.metrics),
            "/debug/vars": (("GET",), status.debug_vars),
            "/config/local/log": (("PUT",), status.log_level),
            **{path: (("GET",), status.probe) for root, checks in StatusApi.CHECKS.items()
               for path in (root, *(f"{root}/{check}" for check in checks))},
        }

    @property
    def handler(self) -> Handler:
        """The handler of client requests, with CORS only if that is configured."""
        return self._serve_with_cors if self._origins else self.serve

    def _serve_with_cors(self, request: HttpRequest) -> None:
        self.serve(allow_origin(request, self._origins))

    def serve(self, request: HttpRequest) -> None:
        """Answer a request, or one that was made from it, such as that of the registry."""
        if self._log.isEnabledFor(logging.DEBUG):
            self._log.debug("[%s] %s remote:%s", request.method, request.target, request.remote)
        head = request.head
        decided: Optional[Tuple[int, Handler]] = head.parsed
        version = self._applier.auth_changes
        if decided is None or decided[0] != version:
            decided = head.parsed = version, self._route(head)
        decided[1](request)

    def _route(self, head: HttpHead) -> Handler:
        """Return the handler of requests with this head.  The order of the checks is etcd's."""
        path = head.path
        if head.method == "OPTIONS":
            return _reply_empty
        if not path.startswith("/"):
            return _bad_request
        if not is_clean_path(path):
            return redirect
        if path == "/v2/keys" or path.startswith("/v2/keys/"):
            return self._keys.route(head)
        if path.startswith("/v2/auth/"):
            return self._auth.route(head)
        name = "/v2/members" if path.startswith("/v2/members/") else path
        if path == "/new":              # makes a discovery token, which is a write
            return self._guard.key(
                head, REGISTRY_KEY + "/", write=True, recursive=False, passed=self._unknown,
                refused=refuse_credentials,
            )
        if name.startswith(("/v3/", "/v3alpha/", "/v3beta/")):
            return _refuse_v3
        if name not in self._routes:
            return self._unknown
        methods, handler = self._routes[name]
        if methods and head.method not in methods:
            return functools.partial(refuse_method, ",".join(methods))
        if name == "/v2/snapshot":
            return self._guard.root(head, handler, _refuse_hashes, hashes=True)
        if name == "/config/local/log" or (name == "/v2/members" and head.method != "GET"):
            return self._guard.root(head, handler, refuse_credentials)
        return handler

    def _unknown(self, request: HttpRequest) -> None:
        if not self.fallback(request):
            not_found(request)


def _refuse_v3(request: HttpRequest) -> None:
    """Answer a client of etcd 3's JSON gateway with its 501 and gRPC's code 12, "unimplemented".

    Such a client takes a 404 for a missing key.
    """
    text = json_string(V3_REFUSAL)
    request.reply(501, f'{{"error":{text},"message":{text},"code":12}}'.encode())


def _reply_empty(request: HttpRequest) -> None:
    request.reply(200)


def _refuse_hashes(request: HttpRequest) -> None:
    text = "the snapshot holds password hashes: it is for users with the role root"
    request.reply(401, f'{{"message":"Insufficient credentials; {text}"}}'.encode())


def _bad_request(request: HttpRequest) -> None:
    request.reply(400)


class PeerApi:
    """The peer port.  Source: etcd 2.3 etcdhttp/peer.go.  Thread: reactor."""

    def __init__(self, server: EtcdServer) -> None:
        self._server = server

    def handle(self, request: HttpRequest) -> None:
        """Answer a request of a member, or of one that is about to join."""
        path = request.path
        if not path.startswith("/"):
            _bad_request(request)
        elif not is_clean_path(path):
            redirect(request)
        elif path in ("/members", "/version"):
            self._describe_cluster(request, path)
        elif not self._server.transport.handle(request):
            not_found(request)

    def _describe_cluster(self, request: HttpRequest, path: str) -> None:
        if request.method != "GET":
            refuse_method("GET", request)
        elif path == "/version":
            request.reply(200, version_json(self._server))
        else:
            cluster = self._server.cluster
            members = sorted(cluster.members.values())
            body = "[" + ",".join(member.context_json() for member in members) + "]\n"
            headers = f"X-Etcd-Cluster-Id: {format_id(cluster.id)}\r\n"
            request.reply(200, utf8(body), "application/json", headers)


# ============================================================================
# api/discovery -- The discovery service: tokens and registrations of clusters elsewhere.
# ============================================================================


DISCOVERY_DEFAULT_SIZE = 3          # of a cluster made by /new without size


class DiscoveryService:
    """The registry of other clusters on the client port of a member: `/new` and `/<token>`.

    do    EtcdServer.do
    keys  the handler of /v2/keys requests

    Thread: reactor.  Source: discovery.etcd.io.
    Differs from discovery.etcd.io: sizes below 1 are refused, as no cluster can have them.
    """

    def __init__(
        self, do: Callable[[Request, Callable[[Any], None]], None],
        keys: Callable[[HttpRequest], None],
    ) -> None:
        self._do = do
        self._keys = keys

    def handle(self, request: HttpRequest) -> bool:
        """Answer a request for the registry; return False for any other path."""
        path = request.path
        if path == "/new":
            self._new(request)
            return True
        match = _TOKEN_PATH.fullmatch(path)
        if match is None:
            return False
        if request.method in _TOKEN_METHODS.get(match.group(1), ("GET", "PUT", "DELETE")):
            self._forward(request)
        else:
            request.reply(405)
        return True

    def _new(self, request: HttpRequest) -> None:
        """Make a token; answer with its URL, below the host that the client asked."""
        host = request.headers.get("host", "")
        if is_from_browser(request.headers) and not (
            isinstance(request, CorsRequest) and request.is_allowed
        ):
            write_text(request, 403, _NOT_FOR_PAGES)
            return
        if request.body_too_large:
            write_text(request, 413, "413 Request Entity Too Large\n")
            return
        try:
            size = _wanted_size(request)
        except ValueError as error:
            write_text(request, 400, f"{error}\n")
            return
        if not host:
            write_text(request, 400, "missing Host header\n")
            return
        token = os.urandom(16).hex()

        def done(result: Any) -> None:
            if isinstance(result, EtcdError):
                write_text(request, 400, f"Unable to generate token: {result.cause}\n")
            else:
                write_text(request, 200, f"{request.scheme}://{host}/{token}")

        self._do(
            Request(
                method="PUT", path=f"/1{REGISTRY_KEY}/{token}/_config/size", val=str(size),
                prev_exist=False,
            ),
            done,
        )

    def _forward(self, request: HttpRequest) -> None:
        """Serve the request as one for the key below the registry."""
        old = request.head
        # All requests with the same bytes share a head, so this one needs a copy.
        head = HttpHead(
            old.method, f"/v2/keys{REGISTRY_KEY}{old.target}", old.minor, old.headers
        )
        head.keep_alive, head.takes_raw = old.keep_alive, old.takes_raw
        request.head = head
        self._keys(request)


_NOT_FOR_PAGES = (
    "a web page may have asked for this token, without its reader's knowledge: use curl, or name"
    " the page's origin in -cors\n"
)


def is_from_browser(headers: Mapping[str, str]) -> bool:
    """True for a request of a web page; False for programs, and for an address that a user typed.

    On secure and local connections browsers send Sec-Fetch-Site.  On others, and for a page whose
    own name resolves to this member (DNS rebinding), only headers that every browser sends tell
    it from a program.
    """
    site = headers.get("sec-fetch-site")
    if site is not None:
        return site != "none"
    agent, accept = headers.get("user-agent", ""), headers.get("accept", "")
    return (
        "origin" in headers or "referer" in headers or headers.get("accept-language", "*") != "*"
        or "text/html" in accept or "image/" in accept
        or "Mozilla/" in agent and "PowerShell" not in agent
    )


_TOKEN_PATH = re.compile("/[0-9a-f]{32}(/?|/_config/size|/[^/]+)")
_TOKEN_METHODS = {"": ("GET", "PUT"), "/": ("GET", "PUT"), "/_config/size": ("GET",)}


def _wanted_size(request: HttpRequest) -> int:
    """Return the cluster size in a /new request.  Raises ValueError."""
    query = request.query.encode("latin-1")
    body = request.body if request.method in ("POST", "PUT", "PATCH") else b""
    if len(query) + len(body) > SHORT_HEADER_BYTES_MAX:
        raise ValueError(f"more than {SHORT_HEADER_BYTES_MAX} bytes to say a size")
    try:
        fields = {**parse_form(query), **parse_form(body)}
    except InvalidForm as error:
        raise ValueError(error.cause) from None
    text = fields.get("size") or str(DISCOVERY_DEFAULT_SIZE)
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"strconv.Atoi: parsing {json_string(text)}: invalid syntax")
    size = int(text[:20])
    if not 1 <= size < 1 << 63:
        raise ValueError(f"size={text[:20]}: a cluster has at least one member")
    return size


# ============================================================================
# life/discovery -- The discovery client: new members find each other at a registry, or by SRV records.
# ----------------------------------------------------------------------------
# Blocks; runs before the reactor starts.
# ============================================================================


DISCOVERY_DIAL_SECONDS = 30.0       # connecting to the registry; above: unreachable, tried again
DISCOVERY_ANSWER_SECONDS = 5.0      # silence of the registry, watches excepted
DISCOVERY_RETRY_FIRST_SECONDS = 2.0
DISCOVERY_RETRY_SECONDS_MAX = 256.0  # longest wait between two tries
DISCOVERY_PAUSE_SECONDS = 0.25      # after a watch that the registry ended at once; then longer
DISCOVERY_PAUSE_SECONDS_MAX = 32.0
DISCOVERY_REDIRECTS_MAX = 10        # of one request; above: unreachable
_SIZE_EXAMPLE = f"size={DISCOVERY_DEFAULT_SIZE}"
_PUBLIC_REGISTRY = "discovery.etcd.io"


class DiscoveryUnreachable(DiscoveryError):
    """The registry did not answer, or answered 5xx: worth another try."""


class DiscoveryFull(DiscoveryError):
    """Enough other members have registered: there is no place for this one."""

    def __init__(self, members: List[Registration]) -> None:
        super().__init__("discovery: cluster is full")
        self.members = members


class DuplicateId(DiscoveryError):
    """The registry has this member id already, but the data directory is empty."""


class DuplicateName(DiscoveryError):
    """Two registered members have the same name."""


class Registration(NamedTuple):
    """One member in the registry."""

    id: str                             # hex: the last part of the key
    value: str                          # `name=url[,name=url]`
    created_index: int


class RegistryState(NamedTuple):
    """The registry at one moment."""

    members: List[Registration]         # the first `size`, oldest first
    size: int
    etcd_index: int                     # X-Etcd-Index of the listing


def blocking_get(
    url: str, timeout_s: float, target: str = "/", tls: Optional[TlsContext] = None
) -> Tuple[int, http.client.HTTPMessage, bytes]:
    """GET `target` from scheme://host:port; return (status, headers, body).

    Raises OSError or http.client.HTTPException.
    """
    return _exchange(_open_connection(url, timeout_s, tls), "GET", target, timeout_s)


def _exchange(
    connection: http.client.HTTPConnection, method: str, target: str, answer_s: Optional[float],
    form: str = "",
) -> Tuple[int, http.client.HTTPMessage, bytes]:
    """Connect, send one request and return (status, headers, body); answer_s: longest silence."""
    try:
        connection.connect()
        connection.sock.settimeout(answer_s)
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        headers = {"Content-Type": "application/x-www-form-urlencoded"} if form else {}
        connection.request(method, target, form or None, headers)
        response = connection.getresponse()
        return response.status, response.headers, response.read(CALL_BODY_BYTES_MAX)
    finally:
        connection.close()


def _open_connection(
    url: str, timeout_s: float, tls: Optional[TlsContext] = None
) -> http.client.HTTPConnection:
    parts = urlsplit(url)
    host = parts.hostname or "127.0.0.1"
    look_up(host, timeout_s)
    if parts.scheme != "https":
        return http.client.HTTPConnection(host, parts.port, timeout=timeout_s)
    context = tls.current if tls else None
    return http.client.HTTPSConnection(host, parts.port, timeout=timeout_s, context=context)


def look_up(host: str, timeout_s: float) -> None:
    """Resolve `host` on another thread, so that a connection then has the answer from a cache.

    Raises OSError, also after timeout_s: a lookup can block for minutes, and no signal ends it.
    """
    answers: queue.SimpleQueue[Optional[Exception]] = queue.SimpleQueue()

    def ask() -> None:
        answers.put(outcome_of(socket.getaddrinfo, host, None)[0])

    threading.Thread(target=ask, name="names", daemon=True).start()
    try:
        error = answers.get(timeout=timeout_s)
    except queue.Empty:
        error = OSError(f"lookup {host}: i/o timeout")
    if error is not None:
        raise error


class Discovery:
    """Registers a member at a discovery URL, and waits for the initial cluster.

    url         scheme://host[:port]/<token key>, on any etcd v2 or discovery service
    member_id   its hex text is the key of this member in the registry; 0 for a proxy
    pairs       `name=url[,name=url]` of this member, sorted
    proxy       URL of an HTTP proxy, or ""
    sleep       called with the seconds to wait before another try

    Raises DiscoveryError for a bad URL.
    Thread: one, and it blocks.  Source: etcd 2.3 discovery.
    Differs from etcd: only the registration of a new member ends the wait; etcd counts every
    event, so a changed or deleted key leads to a cluster with a member missing.
    """

    def __init__(
        self, url: str, member_id: int, pairs: str, *, proxy: str = "",
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        parts = urlsplit(check_discovery_url(url))
        self._endpoint = f"{parts.scheme}://{parts.netloc}"
        self._path = clean_path(parts.path)
        self._id = format_id(member_id)
        self._pairs = pairs
        self._proxy = check_proxy_url(proxy)
        self._sleep = sleep
        self._backoff = Backoff(DISCOVERY_RETRY_FIRST_SECONDS, DISCOVERY_RETRY_SECONDS_MAX)
        self._retries = 0               # of all steps; only the first one is logged with advice
        self.resumed = False            # join() found a registration of an earlier try
        self._log = package_logger("discovery")
        if self._proxy:
            self._log.info('using proxy "%s"', self._proxy)

    def join(self) -> str:
        """Register, wait for the other members, and return the initial cluster `name=url,...`.

        Waits without end for an unreachable registry.  Raises DiscoveryError.
        """
        self._read_registry()
        self._register()
        return self._initial_cluster(self._wait_until_complete())

    def find(self) -> str:
        """Wait for the members without registering; return the initial cluster.

        Waits without end for an unreachable registry.  Raises DiscoveryError.
        """
        try:
            return self._initial_cluster(self._wait_until_complete())
        except DiscoveryFull as full:
            return self._initial_cluster(full.members)

    @staticmethod
    def _initial_cluster(members: Sequence[Registration]) -> str:
        text = ",".join(member.value for member in members)
        try:
            found = parse_initial_cluster(text)
        except ValueError:
            raise DiscoveryError("discovery: invalid URL") from None
        if len(found) != len(members):
            raise DuplicateName("discovery: found duplicate name")
        return text

    def _read_registry(self) -> RegistryState:
        """Return the state of the registry, once it answers.  Raises DiscoveryFull."""
        while True:
            try:
                return self._get_state()
            except DiscoveryUnreachable as error:
                self._sleep_before_retry("cluster status check", error)

    def _get_state(self) -> RegistryState:
        options = "?quorum=false&recursive=false&sorted=false"
        size = self._size(self._get("/_config/size" + options)[1])
        index, body = self._get(options)
        node = self._node(body)
        members = sorted(map(_registration, node.get("nodes", [])), key=lambda m: m.created_index)
        members = [member for member in members if not member.id.startswith("_")]
        first = members[:size]
        if len(members) >= size and self._id not in (member.id for member in first):
            raise DiscoveryFull(first)
        seen = max((member.created_index for member in members), default=0)
        return RegistryState(first, size, index or seen)

    def _size(self, body: Any) -> int:
        if isinstance(body, dict) and body.get("errorCode") == KeyNotFound.code:
            raise DiscoveryError("discovery: size key not found")
        text = str(self._node(body).get("value", ""))
        if not text.isascii() or not text.isdigit() or int(text) < 1:
            raise DiscoveryError("discovery: size key is bad")
        return int(text)

    def _register(self) -> None:
        """Create the key of this member, and wait until the registry shows it."""
        created, tries = 0, 0
        while not created:
            tries += 1
            try:
                created = self._create(is_again=tries > 1)
            except DiscoveryUnreachable as error:
                self._sleep_before_retry("registration", error)
        with contextlib.suppress(DiscoveryUnreachable):     # the next step tries again
            self._request("GET", f"/{self._id}?recursive=false&wait=true&waitIndex={created}")

    def _create(self, *, is_again: bool) -> int:
        """Create the key of this member, or find it from an earlier try; return its index.

        A key with the same value is from an earlier try if this process tried before (is_again),
        or if no other host can have written it.  The second case is a member that was restarted
        while it waited.  Its peers report later whether it ran and lost its log since.
        Differs from etcd, which concludes from such a key that the log is lost.
        """
        form = urllib.parse.urlencode({"value": self._pairs})
        suffix = f"/{self._id}?prevExist=false"
        _, body = self._request("PUT", suffix, DISCOVERY_ANSWER_SECONDS, form)
        if not (isinstance(body, dict) and body.get("errorCode") == NodeExists.code):
            return int(self._node(body).get("createdIndex", 0)) or 1
        node = self._node(self._get(f"/{self._id}?quorum=true")[1])
        if node.get("value") != self._pairs or not (is_again or self._is_unique_registration()):
            raise DuplicateId("discovery: found duplicate id")
        self.resumed = True
        self._log.info("found the registration of this member, which an earlier try has made")
        return int(node.get("createdIndex", 0)) or 1

    def _is_unique_registration(self) -> bool:
        """True unless other hosts may register the same URLs: `localhost`, on a remote registry."""
        initial = parse_initial_cluster(self._pairs)
        urls = [url for urls in initial.values() for url in urls]
        return is_local(self._endpoint) or not all(map(is_local, urls))

    def _wait_until_complete(self) -> List[Registration]:
        """Return the first `size` members, once all have registered."""
        while True:
            state = self._read_registry()
            for member in state.members:
                self._log_found(member)
            try:
                members = self._watch_registrations(state)
            except DiscoveryUnreachable as error:
                self._sleep_before_retry("waiting for other nodes", error)
                continue
            self._log.info("found %d needed peer(s)", len(members))
            return members

    def _watch_registrations(self, state: RegistryState) -> List[Registration]:
        """Watch the registry until `size` members have registered.

        The pauses grow while the registry ends watches at once or repeats old events.  The first
        such watch has no pause: a proxy on the way may have ended it.
        """
        members, index = list(state.members), state.etcd_index
        announced, idle = -1, 0         # idle: watches in a row without a new event
        pause = Backoff(DISCOVERY_PAUSE_SECONDS, DISCOVERY_PAUSE_SECONDS_MAX)
        while len(members) < state.size:
            if announced != len(members):
                announced = len(members)
                missing = state.size - announced
                self._log.info("found %d peer(s), waiting for %d more", announced, missing)
            asked = time.monotonic()
            body = self._next_event(index + 1)
            node = self._node(body) if body is not None else {}
            before, index = index, max(index, int(node.get("modifiedIndex", index)))
            idle += 1
            if index > before or time.monotonic() - asked > DISCOVERY_ANSWER_SECONDS:
                idle = 0
                pause.reset()
            elif idle > 1:
                self._sleep(pause.next())
            if body is None:
                continue
            if self._is_registration(body.get("action"), str(node.get("key")), members):
                members.append(_registration(node))
                self._log_found(members[-1])
        return members

    def _is_registration(self, action: Any, key: str, members: Sequence[Registration]) -> bool:
        """True if the event registers a member that is not among `members`."""
        token, _, name = key.rpartition("/")
        return (
            action in ("create", "set") and token.endswith(self._path.rpartition("/")[2])
            and not name.startswith("_") and name not in (member.id for member in members)
        )

    def _next_event(self, index: int) -> Optional[Dict[str, Any]]:
        """Wait for the event at `index` or later; return None if the registry ends the watch."""
        _, body = self._request("GET", f"?recursive=true&wait=true&waitIndex={index}")
        if isinstance(body, dict) and body.get("errorCode") == EventIndexCleared.code:
            raise DiscoveryUnreachable(f"the registry has forgotten the events from {index} on")
        return body if body else None

    def _log_found(self, member: Registration) -> None:
        who = "self" if member.id == self._id else "peer"
        self._log.info("found %s %s in the cluster", who, member.id)

    def _node(self, body: Any) -> Dict[str, Any]:
        """Return the node in an answer of the keys API.  Raises DiscoveryError if it has none."""
        if isinstance(body, dict) and isinstance(body.get("node"), dict):
            node: Dict[str, Any] = body["node"]
            return node
        if isinstance(body, dict) and "errorCode" in body:
            cause = f" ({body['cause']})" if body.get("cause") else ""
            raise DiscoveryError(f"{body['errorCode']}: {body.get('message', '')}{cause}")
        raise DiscoveryError("discovery: bad discovery endpoint")

    def _sleep_before_retry(self, step: str, error: Exception) -> None:
        advice = "" if self._retries else "; " + _registry_advice(self._endpoint)
        self._retries += 1
        self._log.error("error #0: %s%s", error, advice)
        wait_s = self._backoff.next()
        self._log.info(
            "%s: error connecting to %s, retrying in %s", step, self._endpoint,
            format_duration(wait_s),
        )
        self._sleep(wait_s)

    def _get(self, suffix: str) -> Tuple[int, Any]:
        return self._request("GET", suffix, DISCOVERY_ANSWER_SECONDS)

    def _request(
        self, method: str, suffix: str, answer_s: Optional[float] = None, form: str = ""
    ) -> Tuple[int, Any]:
        """Follow redirects; return (X-Etcd-Index or 0, decoded JSON or None for an empty body).

        answer_s  longest silence of the registry; None: no limit, for watches

        Raises DiscoveryUnreachable, and DiscoveryError for a body that is not JSON.
        """
        url = self._endpoint + self._path + suffix
        for _ in range(DISCOVERY_REDIRECTS_MAX):
            status, headers, body = self._send(method, url, answer_s, form)
            if status >= 500:
                raise DiscoveryUnreachable(f"unexpected status code {status} from {self._endpoint}")
            location = headers.get("Location", "")
            if not (300 < status < 400 and location):
                break
            url = urllib.parse.urljoin(url, location)
        else:
            raise DiscoveryUnreachable(f"more than {DISCOVERY_REDIRECTS_MAX} redirects")
        try:
            index = headers.get("X-Etcd-Index", "")
            return int(index) if index.isdigit() else 0, load_json(body) if body.strip() else None
        except ValueError:
            raise DiscoveryError("discovery: bad discovery endpoint") from None

    def _send(
        self, method: str, url: str, answer_s: Optional[float], form: str
    ) -> Tuple[int, http.client.HTTPMessage, bytes]:
        """Send one request on a connection of its own.  Raises DiscoveryUnreachable."""
        parts = urlsplit(url)
        target = f"{parts.path}?{parts.query}" if parts.query else parts.path
        if self._proxy and parts.scheme == "http":
            target = url
        try:
            return _exchange(self._connection(parts), method, target, answer_s, form)
        except (OSError, http.client.HTTPException) as error:
            where = self._proxy or f"{parts.scheme}://{parts.netloc}"
            raise DiscoveryUnreachable(f"{method} {url}: {where}: {_reason(error)}") from None

    def _connection(self, parts: urllib.parse.SplitResult) -> http.client.HTTPConnection:
        if not self._proxy or parts.scheme == "http":
            url = self._proxy or f"{parts.scheme}://{parts.netloc}"
            return _open_connection(url, DISCOVERY_DIAL_SECONDS)
        proxy = urlsplit(self._proxy)
        tunnel = http.client.HTTPSConnection(
            proxy.hostname or "", proxy.port or 80, timeout=DISCOVERY_DIAL_SECONDS
        )
        tunnel.set_tunnel(parts.hostname or "", parts.port or 443)
        return tunnel


def check_discovery_url(url: str) -> str:
    """Return `url` with its scheme in lower case.

    Raises DiscoveryError for a bad URL, or for one that does not end with the token of a cluster.
    """
    why = ""
    try:
        scheme, authority, rest = split_url(url)
    except ValueError as error:
        scheme, authority, rest, why = "", "", "", f"{error}; "
    path, _, query = rest.partition("?")
    if not (_is_dialable(scheme, authority) and path.strip("/") and re.fullmatch("[!-~]+", url)):
        raise DiscoveryError(
            f"discovery: invalid URL {go_quote(url)}: {why}it must read"
            f" http://host:port/path/of/the/token"
        )
    if path.strip("/") == "new" and authority == _PUBLIC_REGISTRY:
        raise DiscoveryError(
            f"discovery: invalid URL {go_quote(url)}: {_registry_advice(authority)}"
        )
    if path.strip("/") == "new":
        new = shlex.quote(f"{scheme}://{authority}/new?{query or _SIZE_EXAMPLE}")
        raise DiscoveryError(
            f"discovery: invalid URL {go_quote(url)}: it makes a new cluster's URL at each request;"
            f" run `curl {new}` once and give all members what it prints"
        )
    if query or "#" in rest or path.rstrip("/").endswith("/_config/size"):
        token = path.rstrip("/").partition("/_config")[0].partition("#")[0]
        raise DiscoveryError(
            f"discovery: invalid URL {go_quote(url)}: it must end with the token; perhaps"
            f" {scheme}://{authority}{token}"
        )
    return f"{scheme}://{authority}{rest}"


def _is_dialable(scheme: str, authority: str) -> bool:
    """True if `authority` has a host, IPv6 addresses in brackets, and no port 0."""
    host, port = split_address(authority.rpartition("@")[2])
    is_host = bool(host) and (host.startswith("[") or ":" not in host)
    return scheme in ("http", "https") and is_host and int(port[1:] or 1) != 0


def check_proxy_url(proxy: str) -> str:
    """Return the URL of an HTTP proxy given as URL or `host:port`.  Raises DiscoveryError."""
    if not proxy:
        return ""
    url = proxy if "://" in proxy else "http://" + proxy
    try:
        scheme, authority, _ = split_url(url)
    except ValueError as error:
        raise DiscoveryError(str(error)) from None
    if not _is_dialable(scheme, authority):
        raise DiscoveryError(f"invalid proxy {go_quote(proxy)}: it must read http://host:port")
    return f"{scheme}://{authority}"


def _registry_advice(endpoint: str) -> str:
    """Return what to do about a registry that does not answer."""
    public = _PUBLIC_REGISTRY in endpoint
    what = "the public discovery service is out of use" if public else (
        f"no discovery service answers at {endpoint}, is it running there?"
    )
    return (
        f"{what}; any pyetcd that is not a member of this cluster is one: run `pyetcd` on a machine"
        f" that all members reach, and `curl 'http://MACHINE:2379/new?{_SIZE_EXAMPLE}'` for a new"
        f" -discovery URL"
    )


def _registration(node: Dict[str, Any]) -> Registration:
    key = str(node.get("key", ""))
    index = int(node.get("createdIndex", 0))    # some registries answer 780131509.0
    return Registration(key.rpartition("/")[2], str(node.get("value", "")), index)


def srv_cluster(
    domain: str, own_name: str, peer_urls: Sequence[str], servers: Sequence[Tuple[str, int]]
) -> str:
    """Return the initial cluster `name=url,...` that the SRV records of `domain` describe.

    own_name   name for the record that leads to one of peer_urls; the others are `0`, `1`...
    servers    (address, port) of the name servers

    Raises DiscoveryError.  Source: etcd 2.3 discovery/srv.go.
    """
    log = package_logger("discovery")
    own: Set[Tuple[str, int]] = set()
    for url in peer_urls:
        try:
            own |= _resolve(url)
        except OSError:
            host = url_address(url)[0]
            raise DiscoveryError(f"couldn't resolve host {host} during SRV discovery") from None
    pairs: List[str] = []
    errors = 0
    for service, scheme in (("etcd-server-ssl", "https"), ("etcd-server", "http")):
        try:
            records = lookup_srv(f"_{service}._tcp.{domain}", servers)
        except (OSError, UnicodeError) as error:
            log.warning("error querying DNS SRV records for _%s %s", service, error)
            errors += 1
            continue
        for record in records:
            url = f"{scheme}://{record.target}:{record.port}"
            try:
                is_own = bool(_resolve(url) & own)
            except OSError as error:
                log.warning("couldn't resolve host %s: %s", record.target, _reason(error))
                continue
            unnamed = sum(not pair.startswith(own_name + "=") for pair in pairs)
            pairs.append(f"{own_name if is_own else unnamed}={url}")
            log.info("got bootstrap from DNS for %s at %s", service, url)
    if errors == 2:
        raise DiscoveryError("SRV discovery failed: too many errors querying DNS SRV records")
    return ",".join(pairs)


def _resolve(url: str) -> Set[Tuple[str, int]]:
    """Return the (ip address, port) pairs of a URL's host.  Raises OSError."""
    host, port = url_address(url)
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return {(str(info[4][0]), port) for info in found}


# ============================================================================
# life/addresses -- Addresses of this host, and the lists of members that flags, peers and DNS give.
# ============================================================================


JOIN_ANSWER_SECONDS = 10.0          # for /members and /version of the cluster to join
PROBE_ANSWER_SECONDS = 1.0          # for /members of peers that may be down


def is_elsewhere(url: str) -> bool:
    """True if the address in `url` is certainly of another machine; False for any name."""
    host = url_address(url)[0]
    if not is_ip(host):
        return False
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.bind((host, 0))
    except OSError as error:
        return error.errno == errno.EADDRNOTAVAIL
    return False


def default_route_address() -> str:
    """Return the IPv4 address of the interface with the default route, or ""."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect(("192.0.2.1", 9))  # sends nothing: a datagram socket looks up the route
        return str(sock.getsockname()[0])
    return ""


def same_urls(ours: Sequence[str], theirs: Sequence[str]) -> bool:
    """True if each URL of one list shares an address with a URL of the other; names are resolved.

    `localhost` is compared as text, as in etcd: it means another machine everywhere.
    """
    def resolved(urls: Sequence[str]) -> List[Set[Tuple[str, str, int]]]:
        found = []
        for url in urls:
            addresses, scheme = {url_address(url)}, urlsplit(url).scheme
            with contextlib.suppress(OSError):
                if url_address(url)[0] != "localhost":
                    addresses = _resolve(url)
            found.append({(scheme, *address) for address in addresses})
        return found

    if sorted(ours) == sorted(theirs):
        return True
    some, others = resolved(ours), resolved(theirs)
    return len(some) == len(others) and all(
        any(one & other for other in each)
        for each, ones in ((others, some), (some, others)) for one in ones
    )


def fetch_members(
    url: str, timeout_s: float, tls: Optional[TlsContext]
) -> Tuple[int, List[Member]]:
    """Return (cluster id, members) as the peer at `url` sees them.

    Raises OSError, http.client.HTTPException or ValueError.
    """
    status, headers, body = blocking_get(url, timeout_s, "/members", tls)
    if status != 200:
        raise ValueError(f"unexpected status {status}")
    return int(headers.get("X-Etcd-Cluster-Id", ""), 16), parse_members(body)


def parse_members(body: bytes) -> List[Member]:
    """Return the members in an answer to GET /members.  Raises ValueError."""
    try:
        return [
            Member(
                int(member["id"]), tuple(sorted(map(str, member["peerURLs"]))),
                str(member.get("name", "")), tuple(map(str, member.get("clientURLs") or ())),
            )
            for member in load_json(body)
        ]
    except (KeyError, TypeError, AttributeError):
        raise ValueError("the answer is no list of members") from None


def fetch_cluster(
    urls: Sequence[str], timeout_s: float, tls: Optional[TlsContext], *, quiet: bool = False
) -> Optional[Tuple[int, List[Member]]]:
    """Return fetch_members() of the first of `urls` that answers; None if none does."""
    for url in urls:
        try:
            return fetch_members(url, timeout_s, tls)
        except (OSError, http.client.HTTPException, ValueError) as error:
            if not quiet:
                package_logger("etcdserver").warning(
                    "could not get cluster response from %s: %s", url, _reason(error)
                )
    return None


def _log_config(config: ServerConfig, data_dir: DataDir, initial: str = "") -> None:
    log = package_logger("etcdserver")
    log.info("name = %s", config.name)
    if config.force_new_cluster:
        log.info("force new cluster")
    log.info("data dir = %s", data_dir.root)
    log.info("member dir = %s", data_dir.member)
    if config.wal_dir:
        log.info("dedicated WAL dir = %s", data_dir.wal)
    log.info("heartbeat = %dms", config.heartbeat_ms)
    log.info("election = %dms", config.election_ms)
    log.info("snapshot count = %d", config.snapshot_count)
    if config.discovery:
        log.info("discovery URL= %s", config.discovery)
        if config.discovery_proxy:
            log.info("discovery proxy = %s", config.discovery_proxy)
    log.info("advertise client URLs = %s", ",".join(config.advertise_client_urls))
    if initial:
        urls = ",".join(config.initial_advertise_peer_urls)
        log.info("initial advertise peer URLs = %s", urls)
        log.info("initial cluster = %s", initial)


def default_initial_cluster(name: str) -> str:
    """Return the default of -initial-cluster: the member alone, on the default peer URLs."""
    return ",".join(f"{name}={url}" for url in DEFAULT_PEER_URLS.split(","))


def url_given_twice(initial: Mapping[str, Tuple[str, ...]]) -> str:
    """Return the first peer URL that `initial` holds twice; "" if there is none."""
    urls = [url for urls in initial.values() for url in urls]
    return next((url for url in urls if urls.count(url) > 1), "")


def _initial_members(config: ServerConfig) -> Dict[str, Tuple[str, ...]]:
    """Return name -> peer URLs of the cluster to form or join, checked.  Raises StartError."""
    own = {config.name: tuple(sorted(config.initial_advertise_peer_urls))}
    text = config.initial_cluster
    if config.discovery:
        return own
    if config.discovery_srv:
        text = srv_cluster(
            config.discovery_srv, config.name, config.initial_advertise_peer_urls, name_servers()
        )
    elif not text:
        return own
    try:
        nameless = config.initial_cluster_state == "existing"
        initial = parse_initial_cluster(text, nameless=nameless)
    except ValueError as error:
        raise StartError(f"error setting up initial cluster: {error}") from None
    if config.name not in initial:
        if config.discovery_srv:
            raise DiscoveryError(f'cannot find local etcd member "{config.name}" in SRV records')
        raise StartError(
            f'couldn\'t find local name "{config.name}" in the initial cluster configuration;'
            f" -initial-cluster is {text}: add {config.name}=<peer URL>, or use one of its names"
            f" with -name"
        )
    url = url_given_twice(initial)
    if url:
        raise StartError(
            f"initial cluster {format_initial_cluster(initial)} has duplicate url;"
            f" {url} is there more than once, and each member needs peer URLs of its own"
        )
    return initial


def _new_cluster(
    config: ServerConfig, token: str, initial: Mapping[str, Tuple[str, ...]]
) -> Tuple[Cluster, Member]:
    """Return the cluster of these members and this member in it.  Raises StartError."""
    try:
        cluster = Cluster.from_initial(token, dict(initial))
    except ValueError as error:
        raise StartError(f"error setting up initial cluster: {error}") from None
    member = cluster.member_by_name(config.name)
    if member is None:
        raise StartError(f'member "{config.name}" is not in the cluster that discovery found')
    cluster.local_id = member.id
    return cluster, member


def _bootstrap_entries(cluster: Cluster) -> List[Entry]:
    """Return a ConfChange per initial member, ascending by id: the same bytes on every member."""
    entries = []
    for index, member in enumerate(sorted(cluster.members.values(), key=lambda m: m.id), 1):
        context = utf8(member.context_json())
        change = ConfChange(0, ConfChangeType.ADD_NODE, member.id, context)
        entries.append(Entry(EntryType.CONF_CHANGE, 1, index, encode_conf_change(change)))
    return entries


# ============================================================================
# life/flags -- Flags: a row for each, with its parser, default, help and field of ServerConfig.
# ============================================================================


class FlagError(ValueError):
    """A flag or variable with a bad value.  The text is one line that begins with etcd's words."""


class Flag(NamedTuple):
    """One flag.

    parse      turns the text into the value; raises ValueError with the reason
    no_effect  why the flag does nothing here; logged when it is given
    field      the field of ServerConfig that the value fills, or `client_tls.<field>` and
               `peer_tls.<field>` of TlsFiles; "" if another function reads the flag
    """

    name: str
    parse: Callable[[str], Any]
    default: Any
    help: str
    no_effect: str = ""
    field: str = ""

    @property
    def is_bool(self) -> bool:
        """True if the flag may stand without a value: `-debug`."""
        return isinstance(self.default, bool)

    @property
    def variable(self) -> str:
        return "ETCD_" + self.name.upper().replace("-", "_")


def parse_bool(text: str) -> bool:
    """Return the value of a boolean, in the words of Go.  Raises ValueError."""
    if text not in GO_BOOLS:
        raise ValueError("parse error")
    return GO_BOOLS[text]


def parse_uint(text: str) -> int:
    """Return an unsigned integer; the prefixes 0x, 0o, 0b and 0 are those of Go."""
    plain = re.fullmatch("0([0-7]+)", text)
    try:
        if not re.fullmatch("[0-9a-zA-Z]+", text):
            raise ValueError
        value = int(plain.group(1), 8) if plain else int(text, 0)
    except ValueError:
        raise ValueError("parse error") from None
    if value > UINT64_MAX:
        raise ValueError("value out of range")
    return value


class UnsupportedFlag(ValueError):
    """A flag that is not supported with any value.  The text gives the reason and the remedy."""


def _parse_domain(text: str) -> str:
    try:
        authority = split_url(f"http://{text}")[1]
    except ValueError:
        authority = ""
    if text and (authority != text or re.search("[@:]", text)):
        raise ValueError("a domain is wanted whose SRV records name the members, like example.com")
    return text


def one_of(*choices: str, refusal: str = "") -> Callable[[str], str]:
    """Return the parser that accepts `choices`; refusal: its reason for any other text."""
    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(refusal or f"invalid value, use one of {', '.join(choices)}")
        return text

    return parse


def _parse_origins(text: str) -> Tuple[str, ...]:
    origins = tuple(origin.strip() for origin in text.split(",") if origin.strip())
    for origin in origins:
        if origin != "*" and not re.fullmatch(r"https?://[^\s/]+/?", origin):
            raise ValueError(f"Invalid CORS origin: {origin}")
    return origins


def _parse_levels(text: str) -> Dict[str, int]:
    """Return package -> level of the logging module for `package=LEVEL,*=LEVEL`; `*` is ""."""
    levels: Dict[str, int] = {}
    for part in filter(None, text.split(",")):
        package, _, level = part.partition("=")
        if level not in _LOG_LEVELS:
            levels_text = " ".join(_LOG_LEVELS)
            raise ValueError(f"{part} is not <package>=<level>, with one of {levels_text}")
        levels["" if package == "*" else package] = _LOG_LEVELS[level]
    return levels


LOG_PACKAGES = (
    "auth", "discovery", "etcd", "etcdhttp", "etcdserver", "flags", "http", "proxy", "raft",
    "rafthttp", "snap", "tls", "wal",
)
_LOG_LEVELS = {
    "CRITICAL": logging.CRITICAL, "ERROR": logging.ERROR, "WARNING": logging.WARNING,
    "NOTICE": logging.INFO, "INFO": logging.INFO, "DEBUG": logging.DEBUG, "TRACE": logging.DEBUG,
}


def _parse_address(text: str) -> str:
    """Return `ip:port` as the flags of etcd 0.4 have it, without a scheme.  Raises ValueError."""
    host, colon, port = text.rpartition(":")
    if not colon or (":" in host and not re.fullmatch(r"\[.*\]", host)):
        raise ValueError(f"address {text}: missing port in address")
    if not is_ip(host.strip("[]")):
        raise ValueError("bad IP in address specification")
    if not port.isdigit():
        raise ValueError("bad port in address specification")
    return text


def _parse_discovery(text: str) -> str:
    try:
        return check_discovery_url(text) if text else ""
    except DiscoveryError as error:
        raise ValueError(str(error)) from None


def _parse_proxy(text: str) -> str:
    try:
        check_proxy_url(text)
        return text
    except DiscoveryError as error:
        raise ValueError(str(error)) from None


def _parse_auto_tls(prefix: str) -> Callable[[str], bool]:
    """Return the parser of auto-tls or peer-auto-tls, which may only be false."""
    def parse(text: str) -> bool:
        if parse_bool(text):
            raise UnsupportedFlag(
                f"is not supported: pyetcd cannot make certificates; make one with `openssl req"
                f" -x509 -newkey rsa:2048 -nodes -days 365 -keyout key.pem -out cert.pem"
                f" -subj /CN=etcd -addext subjectAltName=IP:127.0.0.1,IP:"
                f"{default_route_address() or '10.0.0.5'}` and give it with"
                f" -{prefix}cert-file cert.pem -{prefix}key-file key.pem"
            )
        return False

    return parse


def flag_rows(table: str) -> Tuple[Flag, ...]:
    """Return the flags of a table with a row `name  kind  help` for each.

    kind  a key of _KINDS, or the accepted words with | between; then, if the field has another
          name than the flag, a colon and the field.  The default is that of the field.
    """
    flags = []
    for row in table.strip().split("\n"):
        name, kind, help = re.split(" {2,}", row, maxsplit=2)
        kind, _, field = kind.partition(":")
        field = field or name.replace("-", "_") + "_ms" * (kind == "ms")
        parse, default = _KINDS[kind] if kind in _KINDS else (one_of(*kind.split("|")), "")
        if hasattr(_DEFAULTS, field.partition(".")[0]):
            default = operator.attrgetter(field)(_DEFAULTS)
        else:
            field = ""
        flags.append(Flag(name, parse, default, help, field=field))
    return tuple(flags)


_DEFAULTS = ServerConfig()
_KINDS: Dict[str, Tuple[Callable[[str], Any], Any]] = {     # parser, default without a field
    "text": (str, ""), "bool": (parse_bool, False), "uint": (parse_uint, 0), "ms": (parse_uint, 0),
    "urls": (parse_urls, ()), "origins": (_parse_origins, ()), "levels": (_parse_levels, {}),
    "token": (_parse_discovery, ""), "http-proxy": (_parse_proxy, ""),
    "domain": (_parse_domain, ""), "address": (_parse_address, ""),
}

FLAGS: Dict[str, Tuple[Flag, ...]] = {
    "member": flag_rows("""
name  text  human-readable name for this member.
data-dir  text  path to the data directory (default: <name>.etcd).
wal-dir  text  path to the dedicated wal directory.
snapshot-count  uint  number of committed transactions to trigger a snapshot to disk.
heartbeat-interval  ms:heartbeat_ms  time (in milliseconds) of a heartbeat interval.
election-timeout  ms:election_ms  time (in milliseconds) for an election to timeout.
listen-peer-urls  urls  list of URLs to listen on for peer traffic.
listen-client-urls  urls  list of URLs to listen on for client traffic.
max-snapshots  uint  maximum number of snapshot files to retain (0 is unlimited).
max-wals  uint  maximum number of wal files to retain (0 is unlimited).
cors  origins  comma-separated whitelist of origins for cross-origin resource sharing.
"""),
    "clustering": (*flag_rows("""
initial-advertise-peer-urls  urls  list of this member's peer URLs to advertise to other members.
advertise-client-urls  urls  list of this member's client URLs to advertise to the cluster.
initial-cluster  text  initial cluster, `name=url` pairs (default: this member alone).
initial-cluster-state  new|existing  initial cluster state; `existing` joins a running cluster.
initial-cluster-token  text  token of the cluster: clusters with different tokens do not mix.
discovery  token  discovery URL used to bootstrap the cluster.
discovery-fallback  exit|proxy  behavior when the discovery cluster is full: `exit` or `proxy`.
discovery-proxy  http-proxy  HTTP proxy to use for traffic to discovery service.
discovery-srv  domain  dns srv domain used to bootstrap the cluster.
compat-version  auto|2.3|bridge|3.4  version of etcd to act as towards other members.
strict-reconfig-check  bool  reject reconfiguration requests that would cause quorum loss.
"""), Flag("discovery-srv-name", one_of("", refusal=(
        "a suffix of the SRV names is not supported; publish the records without it"
    )), "", "not supported: suffix of the SRV names.")),
    "proxy": flag_rows("""
proxy  off|readonly|on  proxy mode: `off`, `readonly` or `on`.
proxy-failure-wait  ms  time (in milliseconds) an endpoint is held in a failed state.
proxy-refresh-interval  ms  time (in milliseconds) between two refreshes of the endpoints.
proxy-dial-timeout  ms  time (in milliseconds) for a dial to timeout, 0 is unlimited.
proxy-write-timeout  ms  time (in milliseconds) for a write to timeout, 0 is unlimited.
proxy-read-timeout  ms  time (in milliseconds) for a read to timeout, 0 is unlimited.
"""),
    "security": (*flag_rows("""
ca-file  text:client_tls.ca_file  [DEPRECATED] -trusted-ca-file with -client-cert-auth.
cert-file  text:client_tls.cert_file  path to the client server TLS cert file.
key-file  text:client_tls.key_file  path to the client server TLS key file.
client-cert-auth  bool:client_tls.client_cert_auth  require client certificates.
trusted-ca-file  text:client_tls.trusted_ca_file  path to the client server TLS CA file.
client-crl-file  text:client_tls.crl_file  path to the client certificate revocation list.
client-cert-allowed-hostname  text:client_tls.allowed_name  host name in client certificates.
peer-ca-file  text:peer_tls.ca_file  [DEPRECATED] -peer-trusted-ca-file with -peer-client-cert-auth.
peer-cert-file  text:peer_tls.cert_file  path to the peer server TLS cert file.
peer-key-file  text:peer_tls.key_file  path to the peer server TLS key file.
peer-client-cert-auth  bool:peer_tls.client_cert_auth  require certificates of peers.
peer-trusted-ca-file  text:peer_tls.trusted_ca_file  path to the peer server TLS CA file.
peer-crl-file  text:peer_tls.crl_file  path to the peer certificate revocation list.
peer-cert-allowed-cn  text:peer_tls.allowed_cn  common name that peers' certificates must have.
peer-cert-allowed-hostname  text:peer_tls.allowed_name  host name in certificates of peers.
"""),
        *(Flag(prefix + "auto-tls", _parse_auto_tls(prefix), False,
               f"not supported: give -{prefix}cert-file, -{prefix}key-file.")
          for prefix in ("", "peer-")),
        *(Flag(f"peer-client-{file}", one_of("", refusal=(
            "peers are shown the certificate of -peer-cert-file; leave this out"
        )), "", f"not supported: -peer-{file} serves for both directions.")
          for file in ("cert-file", "key-file")),
        Flag("tls-min-version", one_of(
            "", "TLS1.2", refusal="TLS 1.2 and later are accepted; use TLS1.2"
        ), "", "only TLS1.2, which is what holds without it too."),
        Flag("host-whitelist", one_of("", "*", refusal=(
            "requests are answered whatever their Host; use * and protect the port by"
            " -client-cert-auth or a firewall"
        )), "*", "not supported: only `*`.")),
    "logging": flag_rows("""
debug  bool  enable debug-level logging.
log-package-levels  levels  levels per package, such as `etcdserver=WARNING,*=INFO`.
"""),
    "unsafe": flag_rows("""
force-new-cluster  bool  make this member the only one of its cluster: after the loss of the others.
"""),
    "other": flag_rows("""
version  bool  show the version and exit.
config-file  text  path to a configuration file, JSON or `flag: value` lines; it counts alone.
"""),
    "of etcd 0.4, still working": flag_rows("""
addr  address  [DEPRECATED] use -advertise-client-urls.
bind-addr  address  [DEPRECATED] use -listen-client-urls.
peer-addr  address  [DEPRECATED] use -initial-advertise-peer-urls.
peer-bind-addr  address  [DEPRECATED] use -listen-peer-urls.
"""),
    "of etcd 0.4, refused": tuple(
        Flag(name, one_of("", refusal=(
            f'flag "-{name}" is no longer supported; use -initial-cluster or -discovery'
        )), "", "no longer supported.")
        for name in ("peers", "peers-file")
    ),
}

# Booleans of etcd 0.4 that do nothing -> the flag to use instead.
IGNORED_BOOLS = {
    "cluster-active-size": "", "cluster-remove-delay": "", "cluster-sync-interval": "",
    "config": "a configuration file is given with -config-file FILE", "force": "",
    "max-result-buffer": "", "max-retry-attempts": "",
    "peer-heartbeat-interval": "use -heartbeat-interval",
    "peer-election-timeout": "use -election-timeout", "retry-interval": "",
    "snapshot": "snapshots are always made; -snapshot-count says how often",
    "v": "-version shows the version, -debug logs more", "vv": "-debug logs more",
}
# Of etcd 2.3's experiments and of etcd 3: accepted, so that units and scripts need no change.  The
# reason why a flag does nothing -> flag -> etcd's default.  A flag that protects data or access
# must not be listed: its user would rely on a protection that does not exist.
NO_EFFECT: Dict[str, Dict[str, Any]] = {
    "the v2 API is always on": {"enable-v2": True, "v2-deprecation": "not-yet"},
    "there is no v3 API": {
        "experimental-v3demo": False, "experimental-gRPC-addr": "127.0.0.1:2378",
        "experimental-auto-compaction-retention": "0", "auto-compaction-mode": "periodic",
        "auto-compaction-retention": "0", "max-txn-ops": "128", "max-concurrent-streams": "",
        "grpc-keepalive-min-time": "5s", "grpc-keepalive-interval": "2h",
        "grpc-keepalive-timeout": "20s", "enable-grpc-gateway": True, "auth-token": "simple",
        "auth-token-ttl": "300", "bcrypt-cost": "10", "client-cert-file": "",
        "client-key-file": "", "experimental-enable-v2v3": "",
        "experimental-enable-lease-checkpoint": False,
        "experimental-enable-lease-checkpoint-persist": False,
        "experimental-compaction-batch-limit": "1000",
        "experimental-compaction-sleep-interval": "10ms",
        "experimental-watch-progress-notify-interval": "10m",
        "experimental-txn-mode-write-with-shared-buffer": True,
        "experimental-stop-grpc-service-on-defrag": False,
    },
    "there is no v3 database file": {
        "quota-backend-bytes": "0", "backend-batch-limit": "0", "backend-batch-interval": "",
        "backend-bbolt-freelist-type": "map", "experimental-backend-bbolt-freelist-type": "array",
        "experimental-bootstrap-defrag-threshold-megabytes": "0",
        "experimental-initial-corrupt-check": False, "experimental-corrupt-check-time": "0s",
        "experimental-compact-hash-check-enabled": False,
        "experimental-compact-hash-check-time": "1m", "experimental-memory-mlock": False,
    },
    "a request may have 10 MiB": {"max-request-bytes": "1572864"},
    "every write is synced": {"unsafe-no-fsync": False},
    "members ask before they raise the term once all of them know how": {"pre-vote": False},
    "a member waits a whole election timeout for a leader": {
        "initial-election-tick-advance": True,
    },
    "there are no learners": {"experimental-max-learners": "1"},
    "there is no downgrade by etcd 3's rules": {"experimental-downgrade-check-time": "5s"},
    "Python is not profiled by pprof": {"enable-pprof": False},
    "/metrics and /health are on the client URLs": {
        "listen-metrics-urls": "", "metrics": "basic",
    },
    "there is no tracing": {
        "experimental-enable-distributed-tracing": False,
        "experimental-distributed-tracing-address": "",
        "experimental-distributed-tracing-service-name": "",
        "experimental-distributed-tracing-instance-id": "",
    },
    "the log goes to stderr; its level is set by -debug and -log-package-levels": {
        "logger": "capnslog", "log-output": "default", "log-outputs": "default",
        "log-level": "info", "log-format": "json", "enable-log-rotation": False,
        "log-rotation-config-json": "",
    },
    "the log has no such warnings": {
        "experimental-warning-apply-duration": "100ms",
        "experimental-warning-unary-request-duration": "300ms",
    },
    "addresses are never compared with certificates of clients": {
        "experimental-peer-skip-client-san-verification": False,
    },
    "Python's defaults with TLS 1.2 and later are used": {
        "cipher-suites": "", "tls-max-version": "",
    },
    "pyetcd makes no certificates": {"self-signed-cert-validity": "1"},
    "sockets have the usual options": {"socket-reuse-port": False, "socket-reuse-address": False},
    "how many entries stay in memory behind a snapshot is fixed": {
        "experimental-snapshot-catchup-entries": "5000",
    },
    "a member serves as soon as it can": {"experimental-wait-cluster-ready-timeout": "5s"},
}


def _all_flags() -> Dict[str, Flag]:
    flags = {flag.name: flag for group in FLAGS.values() for flag in group}
    for name in IGNORED_BOOLS:
        flags[name] = Flag(name, parse_bool, False, "")
    for reason, defaults in NO_EFFECT.items():
        for name, default in defaults.items():
            parse = parse_bool if isinstance(default, bool) else str
            flags[name] = Flag(name, parse, default, "", reason)
    return flags


# ============================================================================
# life/restart -- Bootstrap of a member that has a log: identity, log and snapshot come from the disk.
# ============================================================================


_FORCED_FILE = "forced-new-cluster"     # in the member directory, after -force-new-cluster


def _check_not_forced(marker: str) -> None:
    """Raise StartError if this data directory had a -force-new-cluster before.

    Differs from etcd, which removes the other members again at each restart with that flag.
    """
    if os.path.exists(marker):
        raise StartError(
            f"-force-new-cluster was already done on this data directory; done again it would"
            f" remove the members that have joined since. Take it out of the unit file or the"
            f" environment (ETCD_FORCE_NEW_CLUSTER) and start again; if the other members are lost"
            f" once more, remove {marker} first"
        )


def _mark_forced(marker: str) -> None:
    """Record a -force-new-cluster on the disk.  Raises OSError."""
    with open(marker, "wb") as file:
        os.fsync(file.fileno())
    fsync_dir(os.path.dirname(marker))
    package_logger("etcdserver").warning(
        "this member is the only one of its cluster now; take -force-new-cluster out before the"
        " next start, which is refused with it"
    )


def _log_void_flags(config: ServerConfig, data_dir: DataDir) -> None:
    """Log the flags that an existing log makes void; etcd does so for discovery only."""
    log = package_logger("etcdserver")
    if config.discovery:
        log.warning(
            "discovery token ignored since a cluster has already been initialized."
            ' Valid log found at "%s"', data_dir.wal,
        )
    alone = default_initial_cluster(config.name)
    void = [name for name, is_given in (
        ("initial-cluster", config.initial_cluster not in ("", alone)),
        ("initial-cluster-token", config.initial_cluster_token != DEFAULT_CLUSTER_TOKEN),
        ("initial-cluster-state", config.initial_cluster_state == "existing"),
        ("discovery-srv", bool(config.discovery_srv)), ("proxy", config.proxy != "off"),
    ) if is_given]
    if void:
        log.info(
            "the member in %s exists already, so its log counts and not -%s", data_dir.root,
            ", -".join(void),
        )


def _restart(config: ServerConfig, data_dir: DataDir) -> Bootstrap:
    log = package_logger("etcdserver")
    marker = os.path.join(data_dir.member, _FORCED_FILE)
    if config.force_new_cluster:
        _check_not_forced(marker)
    _log_void_flags(config, data_dir)
    _log_config(config, data_dir)
    store = Store(history_capacity=config.history_events)
    cluster = Cluster(config.initial_cluster_token, store)
    snapshotter = Snapshotter(data_dir.snap)
    known = set(Wal.snapshots(data_dir.wal))
    snapshotter.check_log(data_dir.wal, known)
    snapshot = snapshotter.load(known)
    start = EntryID(0, 0)
    if snapshot is not None:
        start = EntryID(snapshot.term, snapshot.index)
        _recover(store, snapshot)
    wal, contents = Wal.open(data_dir.wal, start)
    with contextlib.ExitStack() as on_failure:
        on_failure.callback(wal.close)
        member_id, cluster.id = decode_metadata(contents.metadata)
        cluster.local_id = member_id
        cluster.identity = choose_identity(
            config.compat_version, store.value("/0/version"), *_logged_versions(contents.entries)
        )
        if snapshot is not None:
            cluster.recover()
            snapshot = snapshot._replace(data=b"")
        if config.force_new_cluster:
            contents = _stand_alone(config, member_id, cluster.id, wal, contents, snapshot)
            _mark_forced(marker)
        else:
            log.info(
                "restart member %s in cluster %s at commit index %d", format_id(member_id),
                format_id(cluster.id), contents.hard_state.commit,
            )
        boot = Bootstrap(
            data_dir, member_id, cluster, store, wal, snapshotter, contents, snapshot
        )
        if _is_blank(boot):
            boot = _begin_again(config, boot)
        on_failure.pop_all()
    return boot


def _recover(store: Store, snapshot: Snapshot) -> None:
    try:
        store.recover(snapshot.data)
    except ValueError as error:
        raise SnapshotError(
            f"the snapshot at index {snapshot.index} does not hold a v2 store ({error});"
            f" move its file away to use the one before"
        ) from None
    package_logger("etcdserver").info("recovered store from snapshot at index %d", snapshot.index)


def _logged_versions(entries: Sequence[Entry]) -> Iterator[str]:
    """Yield the cluster versions that the entries set, for one that no snapshot holds yet."""
    for entry in entries:
        if b"/0/version" in entry.data and entry.type == EntryType.NORMAL:
            with contextlib.suppress(CodecError):
                request = read_command(entry.data)
                if request is not None and request.path == "/0/version":
                    yield request.val


def _is_blank(boot: Bootstrap) -> bool:
    """True if the member created its log, but ended before its first write."""
    contents = boot.contents
    return not contents.entries and boot.snapshot is None and contents.hard_state == HardState()


def _begin_again(config: ServerConfig, boot: Bootstrap) -> Bootstrap:
    """Give the first entries of a new cluster to a member that crashed before it wrote them.

    The flags must lead to the same ids.  Otherwise, and after discovery or joining, the other
    members have the log and send it.  Differs from etcd, where a single member then has no voter
    for ever.
    """
    if config.discovery or config.discovery_srv or config.initial_cluster_state == "existing":
        return boot
    initial = _initial_members(config)
    cluster, own = _new_cluster(config, config.initial_cluster_token, initial)
    if (own.id, cluster.id) != (boot.member_id, boot.cluster.id):
        return boot
    cluster.set_store(boot.store)
    return boot._replace(cluster=cluster, bootstrap_entries=_bootstrap_entries(cluster))


def _stand_alone(
    config: ServerConfig, member_id: int, cluster_id: int, wal: Wal, contents: WalContents,
    snapshot: Optional[Snapshot],
) -> WalContents:
    """Remove the lost members in the log of this one (-force-new-cluster); return its contents.

    The entries after the commit index are kept, up to the removal of this member: they may be
    committed, as the commit index on disk lags.  Committed entries that remove every other voter
    follow.  Source: etcd 2.3 etcdserver/raft.go restartAsStandaloneNode.  Differs from etcd, which
    drops all entries after the commit index, and with them the last acknowledged writes.
    """
    log = package_logger("etcdserver")
    state = contents.hard_state
    kept = list(itertools.takewhile(
        lambda entry: entry.index <= state.commit or not _removes(entry, member_id),
        contents.entries,
    ))
    if len(kept) < len(contents.entries):
        log.info("discarding %d uncommitted WAL entries ", len(contents.entries) - len(kept))
    if kept:
        state = state._replace(commit=max(state.commit, kept[-1].index))
    voters = _voters(snapshot.voters if snapshot else (), kept)
    changes = [
        ConfChange(0, ConfChangeType.REMOVE_NODE, voter) for voter in sorted(voters - {member_id})
    ]
    if member_id not in voters:
        own = Member(member_id, tuple(config.initial_advertise_peer_urls))
        context = utf8(own.context_json())
        changes.append(ConfChange(0, ConfChangeType.ADD_NODE, member_id, context))
    added = [
        Entry(EntryType.CONF_CHANGE, state.term, index, encode_conf_change(change))
        for index, change in enumerate(changes, state.commit + 1)
    ]
    state = state._replace(commit=state.commit + len(added))
    wal.write(wal.encode(state, added), sync=True)
    log.info(
        "forcing restart of member %s in cluster %s at commit index %d", format_id(member_id),
        format_id(cluster_id), state.commit,
    )
    return contents._replace(hard_state=state, entries=kept + added)


def _removes(entry: Entry, member_id: int) -> bool:
    if entry.type != EntryType.CONF_CHANGE:
        return False
    change = decode_conf_change(entry.data)
    return change.type == ConfChangeType.REMOVE_NODE and change.node_id == member_id


def _voters(voters: Sequence[int], entries: Sequence[Entry]) -> Set[int]:
    """Return `voters` after the conf changes among `entries`."""
    ids = set(voters)
    for entry in entries:
        if entry.type == EntryType.CONF_CHANGE:
            change = decode_conf_change(entry.data)
            if change.type == ConfChangeType.ADD_NODE:
                ids.add(change.node_id)
            elif change.type == ConfChangeType.REMOVE_NODE:
                ids.discard(change.node_id)
    return ids


# ============================================================================
# life/bootstrap -- Bootstrap: a member of a new cluster, a joining member, or a restart.
# ----------------------------------------------------------------------------
# Blocks; runs before the reactor starts.
# ============================================================================


def bootstrap(config: ServerConfig) -> Bootstrap:
    """Restart from the log on disk, or form or join a cluster; return the state to start with.

    A log on disk goes before every flag.  The log is open and locked afterwards.

    Raises StartError.  Thread: the caller's; blocks, with discovery until all members registered.
    Source: etcd 2.3 etcdserver/server.go NewServer.
    """
    root = config.data_dir or config.name + ".etcd"
    member = os.path.join(root, "member")
    fresh = absent_dirs(
        config.wal_dir or os.path.join(member, "wal"), os.path.join(member, "snap")
    )
    with contextlib.ExitStack() as on_failure:
        on_failure.callback(remove_dirs, fresh)
        boot = _bootstrap(config, prepare_data_dir(root, config.wal_dir), fresh)
        _prepare_database(boot)
        _log_identity(config.compat_version, boot.cluster.identity)
        on_failure.pop_all()
    return boot


def _bootstrap(config: ServerConfig, data_dir: DataDir, fresh: Sequence[str]) -> Bootstrap:
    """Do the work of bootstrap(), and turn the errors of all layers into StartError.

    fresh  the directories that this start has made
    """
    package_logger("etcdserver").info("datadir is valid for the %s format", ARTICLE_VERSION)
    try:
        tls = make_peer_tls(config)
        if Wal.exists(data_dir.wal):
            return _restart(config, data_dir)._replace(peer_tls=tls)
        _check_log_is_not_missing(data_dir)
        if config.force_new_cluster:
            package_logger("etcdserver").warning(
                "-force-new-cluster does nothing for a member without data; leave it out: at a"
                " later start it would remove all other members"
            )
        joins = config.initial_cluster_state == "existing"
        boot = _join(config, data_dir, tls) if joins else _form(config, data_dir, tls, fresh)
        return boot._replace(peer_tls=tls)
    except (WalError, SnapshotError, CodecError, InvariantError) as error:
        raise StartError(str(error)) from error     # nothing runs yet: no state to protect
    except DiscoveryFull as error:
        text = _discovery_failure(config, data_dir.root, error)
        if config.discovery_fallback != "proxy":
            raise StartError(text) from error
        # Empty directories of a member would stop the proxy that starts instead.
        remove_dirs((os.path.join(data_dir.member, "wal"), data_dir.snap, data_dir.member))
        raise ClusterFull(text) from error
    except DiscoveryError as error:
        raise StartError(_discovery_failure(config, data_dir.root, error)) from error
    except OSError as error:
        raise StartError(f"cannot use data directory {data_dir.root}: {error}") from error


def _prepare_database(boot: Bootstrap) -> None:
    """Let etcd 3.4 start on this data directory if this member acts as one, else etcd 2.3."""
    mark = boot.cluster.v3_mark = V3Mark(boot.data_dir.member)
    if boot.cluster.identity == IDENTITIES["3.4"]:
        boot.snapshotter.before_write = mark.write_database
        if boot.snapshot is not None:
            mark.write_database(boot.snapshot.index)
    else:
        mark.remove_database()


def _log_identity(compat_version: str, identity: Identity) -> None:
    if identity is not DEFAULT_IDENTITY:
        why = "the cluster version is 3.0 or higher" if compat_version == AUTO_IDENTITY else (
            f"-compat-version is {compat_version}")
        package_logger("etcdserver").info(
            "this member acts as etcd %s towards other members: %s", identity.server, why)


def make_peer_tls(config: ServerConfig) -> Optional[TlsContext]:
    """Return the TLS context for calls to other members; None if no flag speaks of TLS.

    Without a context, calls to https members that join later trust the system's authorities.
    Raises StartError.
    """
    urls = ",".join((*config.initial_advertise_peer_urls, config.initial_cluster))
    if any(config.peer_tls) or "https:" in urls:
        return TlsContext(config.peer_tls, server=False)
    return None


def _check_log_is_not_missing(data_dir: DataDir) -> None:
    """Raise StartError if a member without a log has other files here: it is not new."""
    usual = os.path.join(data_dir.member, "wal")
    if Wal.exists(usual):
        raise StartError(
            f"{usual} holds the log of this member, but -wal-dir names {data_dir.wal}, which holds"
            f" none; leave -wal-dir out, or stop the member and move the log there"
        )
    Snapshotter(data_dir.snap).check_log(data_dir.wal, ())


def _discovery_failure(config: ServerConfig, data_dir: str, error: DiscoveryError) -> str:
    """Return one line for the operator, in the words of etcd, which prints up to four lines."""
    url = config.discovery
    if isinstance(error, DuplicateId):
        return (
            f'member "{config.name}" has previously registered with discovery service token'
            f" ({url}). But etcd could not find valid cluster configuration in the given data dir"
            f" ({data_dir}). Please check the given data dir path if the previous bootstrap"
            f" succeeded or use a new discovery token if the previous bootstrap failed. If this"
            f" member never ran before, another one has registered with the same"
            f" -initial-advertise-peer-urls ({','.join(config.initial_advertise_peer_urls)})."
        )
    if isinstance(error, DuplicateName):
        return (
            f"member with duplicated name has registered with discovery service token({url})."
            " please check (cURL) the discovery token for more information."
            " please do not reuse the discovery token and generate a new one to bootstrap the"
            " cluster, with another -name for each member."
        )
    if isinstance(error, DiscoveryFull) and config.discovery_fallback == "proxy":
        return (
            f"discovery cluster is full ({url}): start a proxy of it, or add this member with POST"
            f" /v2/members on a running member and start it with -initial-cluster-state existing,"
            f" or generate a new discovery token"
        )
    if config.discovery_srv:
        return f"error setting up initial cluster: {error}"
    hint = ""
    if "size key" in str(error):
        hint = f"set it with `curl {url}/_config/size -XPUT -d value=3`, or "
    return (
        f"failed to join discovery cluster ({error}): discovery token {url} was used, but failed"
        f" to bootstrap the cluster; {hint}please generate a new discovery token and try to"
        f" bootstrap again."
    )


def _check_advertised(config: ServerConfig, initial: Mapping[str, Sequence[str]]) -> None:
    """Raise StartError unless `initial` has the advertised peer URLs under this member's name."""
    advertised = config.initial_advertise_peer_urls
    if same_urls(initial[config.name], advertised):
        return
    wanted = ",".join(f"{config.name}={url}" for url in advertised)
    hints = ""
    listed = set(initial[config.name])
    if listed > set(advertised):
        raise StartError(
            f"--initial-cluster has the name {config.name} more than once, for"
            f" {' and '.join(sorted(listed))}: give each member a name of its own; if all these are"
            f" URLs of {config.name}, set --initial-advertise-peer-urls={','.join(sorted(listed))}"
        )
    if config.initial_cluster == default_initial_cluster(config.name):
        hints += "; forgot to set --initial-cluster flag?"
        hints += " if you want to use discovery service, please set --discovery flag."
    if ",".join(advertised) == DEFAULT_PEER_URLS:
        hints += "; forgot to set --initial-advertise-peer-urls flag?"
    raise StartError(
        f"--initial-cluster must include {wanted} given"
        f" --initial-advertise-peer-urls={','.join(advertised)}{hints}"
    )


def _check_reachable(config: ServerConfig, initial: Mapping[str, Sequence[str]]) -> None:
    """Raise StartError if other members can never connect to this one; warn if they might not.

    Differs from etcd, which waits without end for members that talk to themselves.
    """
    log = package_logger("etcd")
    others = [url for name, urls in initial.items() if name != config.name for url in urls]
    far = [url for url in others if not is_local(url)]
    near = [url for url in others if is_local(url)]
    own, advice = initial[config.name], f"e.g. http://{default_route_address() or '10.0.0.5'}"
    if far and all(map(is_local, own)):
        port = url_address(own[0])[1]
        what = (
            f"the peer URL {','.join(own)} of {config.name} can be reached from this machine only,"
            f" but {far[0]} is another member's; write an address that all members can reach,"
            f" {advice}:{port}, in -initial-advertise-peer-urls and wherever the members are listed"
        )
        if any(map(is_elsewhere, far)):
            new = "; then take a new discovery URL" if config.discovery else ""
            raise StartError(what + new)
        log.warning("%s", what)
    elif near and not all(map(is_local, own)):
        log.warning(
            "%s is listed for another member, but means this machine here; write an address that"
            " all members can reach", near[0],
        )
    is_spread = others and not all(map(is_local, [*others, *own]))
    if is_spread and all(map(is_local, config.advertise_client_urls)):
        log.warning(
            "clients on other machines are told %s, which is their own machine; set"
            " -advertise-client-urls to an address of this one, %s:%d",
            ",".join(config.advertise_client_urls), advice,
            url_address(config.advertise_client_urls[0])[1],
        )


def _check_registration(config: ServerConfig) -> None:
    """Warn if a loopback URL is registered at a discovery service on another machine."""
    urls = config.initial_advertise_peer_urls
    if all(map(is_local, urls)) and not is_local(config.discovery):
        package_logger("etcd").warning(
            "registers %s, which other machines take for themselves; if members run elsewhere,"
            " stop, set -initial-advertise-peer-urls to an address of this machine, e.g."
            " http://%s:%d, and take a new discovery URL", ",".join(urls),
            default_route_address() or "10.0.0.5", url_address(urls[0])[1],
        )


def _form(
    config: ServerConfig, data_dir: DataDir, tls: Optional[TlsContext], fresh: Sequence[str]
) -> Bootstrap:
    """Form a new cluster: all members start with the same entries, which count as committed."""
    initial = _initial_members(config)
    _check_advertised(config, initial)
    _check_reachable(config, initial)
    token = check_discovery_url(config.discovery) if config.discovery else ""
    token = token or config.initial_cluster_token
    cluster, member = _new_cluster(config, token, initial)
    _check_no_past(member.id, cluster.members.values(), tls)
    if config.discovery:
        _check_registration(config)
        discovery = Discovery(
            config.discovery, member.id, format_initial_cluster(initial),
            proxy=config.discovery_proxy,
        )
        remove_dirs(fresh)              # a member that ends while it waits leaves no directory
        initial = parse_initial_cluster(discovery.join())
        make_dirs(fresh)
        url = url_given_twice(initial)
        if url:
            text = format_initial_cluster(initial)
            raise DiscoveryError(f"discovery cluster {text} has duplicate url: {url}")
        _check_reachable(config, initial)
        cluster, member = _new_cluster(config, token, initial)
        if discovery.resumed:
            _check_no_past(member.id, cluster.members.values(), tls)
    cluster.identity = choose_identity(config.compat_version)
    boot = _create_log(config, data_dir, cluster, initial)
    return boot._replace(bootstrap_entries=_bootstrap_entries(cluster))


def _create_log(
    config: ServerConfig, data_dir: DataDir, cluster: Cluster,
    initial: Mapping[str, Sequence[str]],
) -> Bootstrap:
    """Create the log of the new member cluster.local_id, whose cluster has `initial` members."""
    store = Store(history_capacity=config.history_events)
    cluster.set_store(store)
    _log_config(config, data_dir, format_initial_cluster(initial))
    metadata = encode_metadata(cluster.local_id, cluster.id)
    wal = Wal.create(data_dir.wal, metadata)
    package_logger("etcdserver").info(
        "start member %s in cluster %s", format_id(cluster.local_id), format_id(cluster.id)
    )
    return Bootstrap(
        data_dir, cluster.local_id, cluster, store, wal, Snapshotter(data_dir.snap),
        WalContents(metadata, HardState(), [], []), None,
    )


def _peer_urls_of_others(members: Iterable[Member], id: int) -> List[str]:
    return sorted(url for member in members if member.id != id for url in member.peer_urls)


def is_published(id: int, members: Sequence[Member]) -> bool:
    """True if a peer's list of members has client URLs for this member: it ran before."""
    return any(member.id == id and member.client_urls for member in members)


def data_lost(id: int) -> StartError:
    """Return the error for a member that ran before, but whose log is empty."""
    return StartError(
        f"member {format_id(id)} has already been bootstrapped; its data directory is"
        f" lost or -data-dir is wrong: restore it, or remove the member with DELETE"
        f" /v2/members/{format_id(id)} on another one, add it anew and start it with"
        f" -initial-cluster-state existing"
    )


def _check_no_past(id: int, members: Iterable[Member], tls: Optional[TlsContext]) -> None:
    """Raise StartError if a running peer knows that this member, whose log is empty, ran before.

    Such a member could vote a second time in a term, and lacks entries that a quorum counted it
    for.  All peers are asked: one may have missed its publication.
    """
    for url in _peer_urls_of_others(members, id):
        found = fetch_cluster([url], PROBE_ANSWER_SECONDS, tls, quiet=True)
        if found is not None and is_published(id, found[1]):
            raise data_lost(id)


def _join(config: ServerConfig, data_dir: DataDir, tls: Optional[TlsContext]) -> Bootstrap:
    """Join an existing cluster, which has these peer URLs already and will send the log."""
    if config.discovery:
        raise StartError(
            "discovery URL should not be set when joining existing initial cluster;"
            " remove -discovery (ETCD_DISCOVERY) and list the members in -initial-cluster"
        )
    initial = _initial_members(config)
    local, own = _new_cluster(config, config.initial_cluster_token, initial)
    urls = _peer_urls_of_others(local.members.values(), own.id)
    found = fetch_cluster(urls, JOIN_ANSWER_SECONDS, tls)
    if found is None:
        raise StartError(
            "cannot fetch cluster info from peer urls: could not retrieve cluster information from"
            " the given urls; -initial-cluster must name at least one running member"
        )
    cluster_id, existing = found
    members = _match_members(local, existing)
    own = next(member for member in members if member.name == config.name)
    _check_no_past(own.id, members, tls)
    _check_reachable(config, initial)
    others = [member for member in members if member.id != own.id]
    versions = list(filter(None, (_cluster_version(member, tls) for member in others)))
    local.identity = identity = choose_identity(config.compat_version, *versions)
    low = version_key(identity.min_cluster)
    if not versions or not all(low <= version_key(v) and identity.bears(v) for v in versions):
        hint = "" if identity.bears("3.4.0") else "; -compat-version 3.4 joins one of 3.x"
        raise StartError(
            f"incompatible with current running cluster: its version must lie between"
            f" {identity.min_cluster} and {identity.server}; look at GET /version of its"
            f" members{hint}"
        )
    local.id, local.local_id = cluster_id, own.id
    local.members = {member.id: member for member in members}
    return _create_log(config, data_dir, local, initial)._replace(remotes=others)


def _match_members(local: Cluster, existing: Sequence[Member]) -> List[Member]:
    """Return the local members with the ids that the existing cluster gave them."""
    what = "error validating peerURLs of -initial-cluster"
    urls = " ".join(",".join(member.peer_urls) for member in existing)
    hint = f"the members have [{urls}]; list exactly these, and add this member there first"
    ours = list(local.members.values())
    if len(ours) != len(existing):
        raise StartError(f"{what}: member count is unequal; {hint}")
    matched = []
    for member in ours:
        same = [other for other in existing if same_urls(member.peer_urls, other.peer_urls)]
        if len(same) != 1:
            raise StartError(f"{what}: unmatched member while checking PeerURLs; {hint}")
        name = member.name.partition("=")[0]        # "" before its first start
        matched.append(member._replace(id=same[0].id, name=name))
    return sorted(matched, key=lambda member: member.id)


def _cluster_version(member: Member, tls: Optional[TlsContext]) -> str:
    """Return the cluster version that `member` reports; "" without an answer or a version."""
    for url in member.peer_urls:
        try:
            _, _, body = blocking_get(url, JOIN_ANSWER_SECONDS, "/version", tls)
            version = str(load_json(body)["etcdcluster"])
            version_key(version)
            return version
        except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
            package_logger("etcdserver").warning(
                "cannot get the version of member %s from %s: %s", format_id(member.id), url,
                _reason(error),
            )
    return ""


# ============================================================================
# life/data_loss -- The check for lost data: a member without a log asks whether it ever had one.
# ============================================================================


ASK_AGAIN_SECONDS = 0.1             # after a round without news; doubles with each round
ASK_AGAIN_SECONDS_MAX = 1.6


class DataLossCheck:
    """Keeps a member whose log is empty from voting twice in a term.

    Bootstrap asks the members too, but perhaps none of them was up.  Ignores a peer's messages
    until that peer confirms that this member's client URLs were never published.  If a peer
    reports that they were, the data directory was lost and refuse() ends the member.  The check
    ends with the first leader: before, this member has published nothing.
    Thread: reactor.  Differs from etcd, whose member votes as if it were new.
    """

    def __init__(
        self, etcd: EtcdServer, refuse: Callable[[StartError], None], tls: Optional[TlsContext]
    ) -> None:
        self._reactor = etcd.reactor
        self._transport = etcd.transport
        self._cluster = etcd.cluster
        self._counts = etcd.counts
        self._member_id = etcd.member_id
        self._refuse = refuse
        self._tls = tls
        self._confirmed: Set[int] = {etcd.member_id}    # members that know no past of ours
        self._asked: Dict[int, HttpCall] = {}
        self._rounds = 0
        self._backoff = Backoff(ASK_AGAIN_SECONDS, ASK_AGAIN_SECONDS_MAX)
        self._transport.drop = self._drops
        self._timer: Timer = self._reactor.call_later(0.0, self._ask)

    @staticmethod
    def is_due(boot: Bootstrap) -> bool:
        """True if the log was never written to by a leader."""
        return boot.snapshot is None and all(entry.term <= 1 for entry in boot.contents.entries)

    def _drops(self, message: Message) -> bool:
        return message.sender not in self._confirmed and not self._is_over

    @property
    def _is_over(self) -> bool:
        return self._counts.leader_changes > 0

    def _ask(self) -> None:
        if self._is_over:
            self.end()
            return
        for member in self._cluster.members.values():
            urls = usable_urls(member.peer_urls)
            if urls and member.id not in self._confirmed and member.id not in self._asked:
                self._ask_one(member, urls[self._rounds % len(urls)])
        self._rounds += 1
        self._timer = self._reactor.call_later(self._backoff.next(), self._ask)

    def _ask_one(self, member: Member, url: str) -> None:
        def done(error: Optional[Exception], answer: Answer) -> None:
            del self._asked[member.id]
            if error is None:
                self._answered(member.id, answer.body)

        self._asked[member.id] = fetch(
            self._reactor, url, "/members", done, connect_timeout_s=PROBE_ANSWER_SECONDS,
            idle_timeout_s=JOIN_ANSWER_SECONDS, body_max=CALL_BODY_BYTES_MAX, tls=self._tls,
        )

    def _answered(self, peer_id: int, body: bytes) -> None:
        with contextlib.suppress(ValueError):       # a list without us: it is not up to date
            members = parse_members(body)
            if is_published(self._member_id, members) and not self._is_over:
                self._refuse(data_lost(self._member_id))
            elif any(member.id == self._member_id for member in members):
                self._confirmed.add(peer_id)
                self._backoff.reset()

    def end(self) -> None:
        """Ask no more, and accept the messages of all peers."""
        if self._transport.drop == self._drops:
            self._transport.drop = None
        self._timer.cancel()
        for call in self._asked.values():
            call.cancel()
        self._asked.clear()


# ============================================================================
# life/embedding -- Embedding: a member inside any program.
# ----------------------------------------------------------------------------
# Threads: the caller's, and the one it starts, `reactor`.
# ============================================================================


_Hosted = TypeVar("_Hosted", bound="ServerThread")


def checked_settings(settings: Mapping[str, Any]) -> Dict[str, Any]:
    """Return fields of ServerConfig, lists as tuples.  Raises TypeError, ValueError for a URL."""
    checked = dict(settings)
    for name, value in settings.items():
        if name not in ServerConfig._fields:
            near = difflib.get_close_matches(name, ServerConfig._fields, 1)
            meant = f"; did you mean {near[0]}?" if near else ""
            raise TypeError(f"there is no setting {name}{meant}")
        if type(ServerConfig._field_defaults[name]) is tuple:
            if isinstance(value, str):
                raise TypeError(f"{name} is a list, not one string")
            checked[name] = tuple(map(check_url, value)) if "urls" in name else tuple(value)
    return checked


class ServerThread:
    """The base of a member and a proxy: listeners, and a reactor on a thread of its own.

    settings are the fields of ServerConfig; URL lists may be any sequence.  Raises TypeError for
    an unknown setting, ValueError for a bad URL.  Thread: any.
    """

    def __init__(self, **settings: Unpack[ServerSettings]) -> None:
        free = ("http://127.0.0.1:0",)
        config = ServerConfig(
            listen_client_urls=free, listen_peer_urls=free, advertise_client_urls=(),
            initial_advertise_peer_urls=(),
        )
        self._init(config._replace(**checked_settings(settings)))

    @classmethod
    def from_config(cls: Type[_Hosted], config: ServerConfig) -> _Hosted:
        """Return a server with exactly this configuration."""
        server = cls.__new__(cls)
        server._init(config)
        return server

    def _init(self, config: ServerConfig) -> None:
        self.config = config
        self._reactor = Reactor()       # its sockets are closed by stop(), also without start()
        self._budget = BufferBudget(self._reactor)
        self._client_listeners: List[Listener] = []
        self._peer_listeners: List[Listener] = []
        self._thread: Optional[threading.Thread] = None
        self._error: Optional[BaseException] = None

    def __enter__(self: _Hosted) -> _Hosted:
        """Start; close everything after a failure."""
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(self.stop)
            self.start()
            on_failure.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def start(self) -> None:
        """Bind and serve."""
        raise NotImplementedError

    def stop(self) -> None:
        """Stop in order: waiting requests are rejected, the last batch is written, files closed."""
        if self._thread is None:
            self._close()
        elif self._thread.is_alive():
            self._reactor.call_soon_threadsafe(self._stop_in_order)
            self._thread.join()

    def wait(self) -> int:
        """Wait for the end of the server; return the exit code: 0, or 1 after a failure."""
        if self._thread is not None:
            self._thread.join()
        return 1 if self._error is not None else 0

    @property
    def client_urls(self) -> Tuple[str, ...]:
        """Bound client URLs, with the real ports."""
        return tuple(listener.bound_url for listener in self._client_listeners)

    def _listen(
        self, url: str, handler: Callable[[HttpRequest], None], body_max: int, files: TlsFiles,
        *, kept: Tuple[int, int] = (DESCRIPTORS_KEPT, 4), patient: bool = True,
    ) -> Listener:
        tls = None
        if is_https(url):
            if not files.cert_file or not files.key_file:
                raise StartError(
                    f"cannot listen on TLS for {url}: KeyFile and CertFile are not presented;"
                    f" give both, or use an http URL"
                )
            tls = TlsContext(files, server=True, now=self._reactor.now)
        try:
            return Listener(
                url, self._reactor, handler, body_max=body_max, tls=tls, budget=self._budget,
                kept=kept, patient=patient,
            )
        except OSError as error:
            host, port = url_address(url)
            what = f"listen tcp {host}:{port}: bind: {(error.strerror or str(error)).lower()}"
            raise StartError(f"{what}{_BIND_HINTS.get(error.errno or 0, '')}") from None
        except OverflowError:
            raise StartError(f"listen tcp {url}: invalid port; use 1 to 65535") from None

    def _start_thread(self) -> None:
        for listener in self._peer_listeners + self._client_listeners:
            listener.start()
        thread = threading.Thread(target=self._run, name="reactor", daemon=True)
        thread.start()
        self._thread = thread

    def _run(self) -> None:
        try:
            self._start_work()
            self._reactor.run()
        except Exception as error:
            self._error = error
            package_logger("etcd").critical("the member ends: %s", error, exc_info=True)
        finally:
            self._close()

    def _start_work(self) -> None:
        """Start the parts of a subclass, on the reactor's thread."""

    def _free(self) -> None:
        """Free the parts of a subclass, in any state: after a failed start too."""

    def _close(self) -> None:
        """Free everything, in any state: after a failed start too."""
        with contextlib.ExitStack() as each:
            each.callback(self._reactor.close)
            each.callback(self._close_listeners)
            self._free()

    def _stop_in_order(self) -> None:
        """Stop, on the reactor's thread."""
        self._close_listeners()
        self._reactor.stop()

    def _close_listeners(self) -> None:
        with contextlib.ExitStack() as each:
            for listener in self._client_listeners + self._peer_listeners:
                each.callback(listener.stop)
            self._client_listeners, self._peer_listeners = [], []


class Server(ServerThread):
    """A whole member in the caller's process, on a thread of its own.

        with pyetcd.Server(data_dir="/var/lib/x", listen_client_urls=["http://127.0.0.1:0"]) as s:
            print(s.client_urls[0])

    settings are the fields of ServerConfig; URL lists may be any sequence.  By default the member
    listens on free loopback ports and advertises the bound URLs.  Several members may live in one
    process.  Raises StartError from bind() and start().  Thread: any.
    """

    _transport_type: Type[Transport] = Transport

    def _init(self, config: ServerConfig) -> None:
        super()._init(config)
        self.etcd: Optional[EtcdServer] = None      # after start(); touch it through call() only
        self._peer_api: Optional[PeerApi] = None
        self._data_loss_check: Optional[DataLossCheck] = None
        self._ready = threading.Event()
        self._leaving = False           # stop() has begun

    def bind(self) -> None:
        """Open the listening sockets, so that the ports are known; serve nothing yet."""
        if self._client_listeners:
            return
        config, log = self.config, package_logger("etcd")
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(self._abandon_listeners)
            for url in config.listen_peer_urls:
                self._peer_listeners.append(self._listen(
                    url, self._serve_peer, PEER_BODY_BYTES_MAX, config.peer_tls,
                    kept=(DESCRIPTORS_KEPT // 2, 8), patient=False,
                ))
                log.info("listening for peers on %s", url)
            for url in config.listen_client_urls:
                self._client_listeners.append(
                    self._listen(url, _bad_request, REQUEST_BODY_BYTES_MAX, config.client_tls))
                log.info("listening for client requests on %s", url)
            on_failure.pop_all()
        if not config.advertise_client_urls:
            config = config._replace(advertise_client_urls=self.client_urls)
        if not config.initial_advertise_peer_urls:
            config = config._replace(initial_advertise_peer_urls=self.peer_urls)
        self.config = config

    def start(self, *, initial_cluster: str = "") -> None:
        """Bind, form or join the cluster, and serve.  Discovery waits for the other members.

        initial_cluster  replaces the configured one, if the caller binds all members first
        """
        self.bind()
        if initial_cluster:
            self.config = self.config._replace(initial_cluster=initial_cluster)
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(self._abandon_listeners)
            boot = bootstrap(self.config)
            on_failure.callback(boot.wal.close)
            on_failure.callback(self._free)
            self._assemble(boot)
            self._start_thread()
            on_failure.pop_all()

    def _assemble(self, boot: Bootstrap) -> None:
        self.etcd = EtcdServer(
            self.config, boot, self._reactor, failed=self._failed, removed=self._removed,
            published=self._ready.set, transport_type=self._transport_type,
        )
        if DataLossCheck.is_due(boot):
            self._data_loss_check = DataLossCheck(self.etcd, self._refuse, boot.peer_tls)
        api = ClientApi(self.etcd)
        self._count_client_bytes(self.etcd.metrics)
        api.fallback = DiscoveryService(self.etcd.do, api.serve).handle
        for listener in self._client_listeners:
            listener.handler = api.handler
        self._peer_api = PeerApi(self.etcd)
        for listener in self._peer_listeners:
            self.etcd.transport.guard(listener, boot.data_dir.snap)
        self._reactor.on_turn = self.etcd.on_turn

    def kill(self) -> None:
        """End at once, as `kill -9` does: write and send nothing more.  For tests."""
        if self._thread is not None and self.etcd is not None:
            self._reactor.call_soon_threadsafe(self._halt, ServerStopped("killed"))
            self._thread.join()

    def wait_ready(self, timeout_s: float = 10.0) -> bool:
        """Wait until this member has a leader and is published; return False after timeout_s."""
        return self._ready.wait(timeout_s)

    def call(self, work: Callable[[EtcdServer], Any], timeout_s: float = 10.0) -> Any:
        """Run work(etcd) on the reactor's thread and return its result.

        Raises TimeoutError, and ServerStopped if the member has ended or ends meanwhile.
        """
        if self.etcd is None or self._thread is None or not self._thread.is_alive():
            raise ServerStopped()
        answers: queue.SimpleQueue[Tuple[Optional[Exception], Any]] = queue.SimpleQueue()
        etcd = self.etcd

        self._reactor.call_soon_threadsafe(lambda: answers.put(outcome_of(work, etcd)))
        for _ in range(max(round(timeout_s / 0.1), 1)):     # the reactor may end meanwhile
            with contextlib.suppress(queue.Empty):
                error, result = answers.get(timeout=min(0.1, timeout_s))
                break
            if not self._thread.is_alive() and answers.empty():
                raise ServerStopped()
        else:
            raise TimeoutError(f"the member did not get to it within {timeout_s} s")
        if error is not None:
            raise error             # of the caller's code: it belongs to the caller
        return result

    @property
    def peer_urls(self) -> Tuple[str, ...]:
        """Bound peer URLs, with the real ports."""
        return tuple(listener.bound_url for listener in self._peer_listeners)

    def _count_client_bytes(self, metrics: Metrics) -> None:
        """Add the bytes of the client port, under the names of etcd 3.x, whose clients use gRPC."""
        listeners = self._client_listeners
        metrics.total("etcd_network_client_grpc_received_bytes_total",
                      "Bytes from clients, HTTP here, heads included.",
                      lambda: {(): sum(listener.received_bytes for listener in listeners)})
        metrics.total("etcd_network_client_grpc_sent_bytes_total",
                      "Bytes to clients, HTTP here, heads included.",
                      lambda: {(): sum(listener.sent_bytes for listener in listeners)})

    def _serve_peer(self, request: HttpRequest) -> None:
        assert self._peer_api is not None
        self._peer_api.handle(request)

    def _start_work(self) -> None:
        assert self.etcd is not None
        self.etcd.start()

    def _free(self) -> None:
        if self._data_loss_check is not None:
            self._data_loss_check.end()
        if self.etcd is not None:
            self.etcd.abandon()

    def _stop_in_order(self) -> None:
        assert self.etcd is not None
        if not self.etcd.stopping and not self._leaving:
            self._leaving = True
            self.etcd.leave(self._stop_member)

    def _stop_member(self) -> None:
        assert self.etcd is not None
        if not self.etcd.stopping:
            self.etcd.stop()
            super()._stop_in_order()

    def _failed(self, error: BaseException) -> None:
        """End the member, which sends nothing more: its data may no longer be durable."""
        hint = ""
        if isinstance(error, FileNotFoundError):
            hint = "; was the data directory renamed or removed while the member ran?"
        package_logger("etcd").critical("the member ends: %s%s", error, hint)
        self._halt(error)

    def _halt(self, error: BaseException) -> None:
        if not isinstance(error, ServerStopped):
            self._error = error
        if self.etcd is not None:
            self.etcd.abandon()
        self._reactor.stop()

    def _refuse(self, error: StartError) -> None:
        """End the member for a reason that bootstrap would have refused, had it known."""
        package_logger("etcd").critical("%s", error)
        self._halt(error)

    def _removed(self) -> None:
        if self.etcd is not None and not self.etcd.stopping:
            log = package_logger("etcdserver")
            log.error("the member has been permanently removed from the cluster")
            log.error("the data-dir used by this member must be removed.")
            self._stop_member()

    def _abandon_listeners(self) -> None:
        """Close the listeners after a failed start, and log the ports that are free again."""
        log = package_logger("etcd")
        for listener in self._client_listeners:
            log.info("stopping listening for client requests on %s", listener.url)
        for listener in self._peer_listeners:
            log.info("stopping listening for peers on %s", listener.url)
        self._close_listeners()


_BIND_HINTS = {
    errno.EADDRINUSE: ": another program, perhaps another etcd, uses it; stop it or choose"
                      " another port with -listen-client-urls and -listen-peer-urls",
    errno.EACCES: ": ports below 1024 need root; choose a higher one",
    errno.EADDRNOTAVAIL: ": this machine does not have that address; see `ip addr`",
}


# ============================================================================
# life/proxy_files -- The cluster file of a proxy: peer URLs of the members, and where they come from.
# ============================================================================


class ClusterFile(NamedTuple):
    """The contents of a cluster file."""

    peer_urls: Tuple[str, ...]
    client_urls: Tuple[str, ...] = ()   # that worked when the published ones did not; not of etcd


def find_cluster(config: ServerConfig, cluster_file: str) -> ClusterFile:
    """Return the URLs of the members, from the cluster file or else from bootstrap flags.

    Raises StartError.  Discovery waits for the members.  Source: etcd 2.3 startProxy.
    """
    log = package_logger("proxy")
    known = read_cluster_file(cluster_file)
    if known is not None:
        for what, given in (
            ("discovery token", config.discovery), ("DNS SRV discovery", config.discovery_srv),
        ):
            if given:
                log.warning(
                    "%s ignored since the proxy has already been initialized. Valid cluster file"
                    " found at %s", what, go_quote(cluster_file),
                )
        log.info("using peer urls [%s] from cluster file %s", " ".join(known.peer_urls),
                 go_quote(cluster_file))
        return known
    try:
        text = config.initial_cluster or default_initial_cluster(config.name)
        if config.discovery:
            text = Discovery(config.discovery, 0, "", proxy=config.discovery_proxy).find()
        elif config.discovery_srv:
            advertised = config.initial_advertise_peer_urls
            text = srv_cluster(config.discovery_srv, config.name, advertised, name_servers())
        initial = parse_initial_cluster(text)
    except DiscoveryError as error:
        raise StartError(_discovery_failure(config, config.data_dir, error)) from error
    except ValueError as error:
        raise StartError(f"error setting up initial cluster: {error}") from None
    urls = tuple(sorted(url for member in initial.values() for url in member))
    log.info("using peer urls [%s] ", " ".join(urls))
    return ClusterFile(urls)


def read_cluster_file(path: str) -> Optional[ClusterFile]:
    """Return the contents of a cluster file; None if it does not exist.  Raises StartError."""
    try:
        with open(path, "rb") as file:
            content = json.load(file)
        kept = content.get("ClientURLs")
        return ClusterFile(
            tuple(map(check_url, content["PeerURLs"])),
            tuple(usable_urls(map(str, kept if isinstance(kept, list) else ()))),
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StartError(
            f"cannot use the cluster file {path}: {_reason(error)}; remove it to begin again with"
            f" -initial-cluster or -discovery"
        ) from None


def write_cluster_file(path: str, cluster: ClusterFile) -> None:
    """Replace the cluster file atomically.  Raises OSError."""
    content = {"PeerURLs": cluster.peer_urls}
    if cluster.client_urls:
        content["ClientURLs"] = cluster.client_urls
    descriptor = os.open(path + ".bak", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(descriptor, "wb") as file:
        file.write(utf8(json_text(content)))
        file.flush()
        os.fsync(descriptor)
    os.replace(path + ".bak", path)
    fsync_dir(os.path.dirname(path))


def prepare_proxy_dir(config: ServerConfig) -> str:
    """Make <data dir>/proxy and return the path of the cluster file in it.  Raises StartError."""
    root = config.data_dir or config.name + ".etcd"
    path = os.path.join(root, "proxy")
    try:
        names = set(os.listdir(root)) if os.path.exists(root) else set()
        if "member" in names and "proxy" not in names:
            raise StartError(f"{root} belongs to a member; choose another -data-dir for a proxy")
        check_layout(root, names)
        os.makedirs(root, mode=0o700, exist_ok=True)
        os.makedirs(path, mode=0o700, exist_ok=True)
        check_writable(path)
        fsync_dir(root)
    except OSError as error:
        raise StartError(
            f"cannot write to proxy directory: {error}; give the directory to this user, or choose"
            f" another -data-dir"
        ) from None
    return os.path.join(path, "cluster")


# ============================================================================
# life/proxy -- The proxy: forwards requests of clients to the members of a cluster.
# ----------------------------------------------------------------------------
# Threads: as for embedding.  Blocking calls run before the reactor starts, or on its worker threads.
# ============================================================================


PROXY_PROBE_SECONDS = 2.0           # silence of a member with requests; above: it is probed
PROXY_RETRY_SECONDS = 1.0           # between refreshes while there is no endpoint
PROXY_REFRESH_SECONDS_MIN = 0.1     # between refreshes, whatever the flag says
PROXY_UNREAD_BYTES_MAX = 256 << 10  # reply bytes a client has not read; above: the call pauses
PROXY_CONNECT_SECONDS_MAX = 3600.0  # with dial timeout 0; the system times out long before
_DEFAULT_REFRESH_MS = ServerConfig().proxy_refresh_interval_ms

# Headers of one connection (RFC 2616 §13.5.1), and Content-Length, which each side computes.
_HOP_HEADERS = frozenset((
    "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailers",
    "transfer-encoding", "upgrade", "content-length",
))
_CORS_HEADERS = frozenset((
    "access-control-allow-headers", "access-control-allow-methods", "access-control-allow-origin",
))
_WAITS = frozenset(f"wait={word}" for word, value in GO_BOOLS.items() if value)


class ProxyDialer:
    """Makes every call of a proxy to a member, with the limits of the -proxy-* flags."""

    def __init__(self, config: ServerConfig, reactor: Reactor) -> None:
        self.now, self.wall_ns = reactor.now, reactor.wall_ns
        self._reactor = reactor
        self._connect_s = config.proxy_dial_timeout_ms / 1000 or PROXY_CONNECT_SECONDS_MAX
        self._read_s = config.proxy_read_timeout_ms / 1000 or None
        self._write_s = config.proxy_write_timeout_ms / 1000 or None
        self.tls = make_peer_tls(config)

    def call(
        self, url: str, request: HttpRequest, headers: Dict[str, str], forward: Forward
    ) -> HttpCall:
        return HttpCall(
            self._reactor, url, request.method, request.target, headers, request.body,
            connect_timeout_s=self._connect_s, idle_timeout_s=self._read_s, tls=self.tls,
            on_head=forward.on_head, on_data=forward.on_data, on_done=forward.on_done,
        )

    def probe(self, url: str, on_done: Callable[[Optional[Exception]], None]) -> HttpCall:
        """Send a request that a member answers at once; it fails after the write timeout."""
        return HttpCall(
            self._reactor, url, "GET", "/version", {}, connect_timeout_s=self._connect_s,
            idle_timeout_s=self._write_s, answer_max=ANSWER_BYTES_MAX, tls=self.tls,
            on_done=on_done,
        )


class Endpoint:
    """A client URL of a member, its state, and the requests that wait for its answers.

    A suspended member accepts connections and sends nothing, and -proxy-read-timeout would end
    watches too.  So an endpoint that is silent for PROXY_PROBE_SECONDS, while requests wait for
    it, gets a probe.  Without an answer to the probe the endpoint has failed for all requests that
    wait.  Differs from etcd, which waits for ever.
    """

    def __init__(
        self, url: str, reactor: Reactor, dialer: ProxyDialer, failure_wait_s: float,
        *, has_worked: bool = False,
    ) -> None:
        self.url = url
        self.available = True
        self.suspect = False            # failed, and has not answered since: tried last
        self._reactor = reactor
        self._dialer = dialer
        self._failure_wait_s = failure_wait_s
        self._waiting: Dict[Forward, None] = {}
        self._heard = 0.0               # time of the last answer, monotonic seconds
        self._has_worked = has_worked
        self._timer: Optional[Timer] = None
        self._probe: Optional[HttpCall] = None

    def add_waiting(self, forward: Forward) -> None:
        self._waiting[forward] = None
        self._start_timer()

    def remove_waiting(self, forward: Forward) -> None:
        self._waiting.pop(forward, None)
        if not self._waiting and self._probe is not None:
            self._probe.cancel()
            self._probe = None

    @property
    def works(self) -> bool:
        """True if the member answered the last request."""
        return self._has_worked and not self.suspect

    def answered(self) -> None:
        """Note that data came from the member: it lives."""
        self._heard = self._reactor.now()
        self._has_worked = True
        self.suspect = False

    def failed(self) -> None:
        """Send no requests to the member until the failure wait is over."""
        self.suspect = True
        if self.available:
            self.available = False
            package_logger("proxy").info("marked endpoint %s unavailable", self.url)
            self._reactor.call_later(self._failure_wait_s, self._retest)

    def _retest(self) -> None:
        self.available = True
        package_logger("proxy").info(
            "marked endpoint %s available, to retest connectivity", self.url
        )

    def _start_timer(self) -> None:
        if self._waiting and self._timer is None and self._probe is None:
            self._timer = self._reactor.call_later(PROXY_PROBE_SECONDS, self._probe_if_silent)

    def _probe_if_silent(self) -> None:
        self._timer = None
        asked = self._reactor.now()
        if self._waiting and asked - self._heard >= PROXY_PROBE_SECONDS:
            self._probe = self._dialer.probe(self.url, lambda error: self._probed(asked, error))
        self._start_timer()

    def _probed(self, asked: float, error: Optional[Exception]) -> None:
        self._probe = None
        if error is None:
            self.answered()
        elif isinstance(error, TimeoutError) and self._heard < asked:
            self.failed()
            for forward in list(self._waiting):
                forward.lost(error)
        # After any other error the connections of the waiting requests report errors of their own.
        self._start_timer()


class Endpoints:
    """The endpoints of a cluster, refreshed from a peer's list of members every interval.

    Source: etcd 2.3 proxy/director.go, etcdmain/etcd.go startProxy.
    """

    def __init__(
        self, config: ServerConfig, reactor: Reactor, dialer: ProxyDialer,
        cluster: ClusterFile, cluster_file: str,
    ) -> None:
        self._config = config
        self._reactor = reactor
        self._dialer = dialer
        self._peer_urls = cluster.peer_urls
        self._cluster_file = cluster_file
        self._retry = Backoff(PROXY_RETRY_SECONDS, _DEFAULT_REFRESH_MS / 1000)
        self._written: Optional[ClusterFile] = None     # the contents of the file, once written
        self._endpoints = [self._endpoint(url, has_worked=True) for url in cluster.client_urls]
        self._announced = False
        self._timer: Optional[Timer] = None
        self._log = package_logger("proxy")

    def available(self) -> List[Endpoint]:
        """Return the endpoints to try, in this order."""
        usable = [endpoint for endpoint in self._endpoints if endpoint.available]
        return sorted(usable, key=lambda endpoint: endpoint.suspect)

    def refresh(self) -> None:
        """Refresh now; blocks.  Thread: any, before the reactor runs."""
        self._update(self._fetch(self._peer_urls, self._working()))

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def schedule_refresh(self) -> None:
        """Refresh after the interval, and again and again.  Thread: reactor."""
        interval_ms = self._config.proxy_refresh_interval_ms
        wait_s = max(interval_ms / 1000, PROXY_REFRESH_SECONDS_MIN)
        usable = self.available()
        if usable:
            self._retry.reset()
        elif interval_ms >= _DEFAULT_REFRESH_MS:
            wait_s = self._retry.next()
        if usable and not self._announced:
            self._announced = True
            urls = " ".join(go_quote(endpoint.url) for endpoint in usable)
            self._log.info("endpoints found [%s]", urls)
        self._timer = self._reactor.call_later(wait_s, self._start_refresh)

    def _start_refresh(self) -> None:
        self._reactor.run_blocking(
            self._fetch, self._peer_urls, self._working(), kind=PEER_WORK, done=self._refreshed
        )

    def _refreshed(self, error: Optional[BaseException], found: Any) -> None:
        if error is None:
            self._update(found)
        else:
            self._log.warning("could not ask for the members: %s", error)
        self.schedule_refresh()

    def _working(self) -> Tuple[str, ...]:
        return tuple(sorted(endpoint.url for endpoint in self._endpoints if endpoint.works))

    def _fetch(
        self, peer_urls: Tuple[str, ...], working: Tuple[str, ...]
    ) -> Optional[ClusterFile]:
        """Return the URLs that the first peer to answer lists, and keep them in the file.

        Returns None if no peer answers.  Differs from etcd: the peer URL that answered stays, last
        in the list, and the `working` client URLs stay in the file if the peer lists none of them.
        Otherwise a list with URLs that are wrong on this machine, such as `localhost`, would end
        the service for good.

        Thread: any; blocks.
        """
        limit_s = max(self._config.proxy_dial_timeout_ms / 1000, PROBE_ANSWER_SECONDS)
        found, url = None, ""
        for url in peer_urls:
            found = fetch_cluster([url], limit_s, self._dialer.tls)
            if found is not None:
                break
        if found is None or not found[1]:
            return None
        urls = tuple(sorted(usable_urls(url for m in found[1] for url in m.peer_urls)))
        urls = urls if url in urls else (*urls, url)
        listed = tuple(sorted(set(usable_urls(url for m in found[1] for url in m.client_urls))))
        content = ClusterFile(urls, () if set(listed) & set(working) else working)
        if content != self._written:
            try:
                write_cluster_file(self._cluster_file, content)
                self._written = content
            except OSError as error:
                self._log.warning("error on writing urls %s", error)
        return ClusterFile(urls, listed)

    def _update(self, found: Optional[ClusterFile]) -> None:
        """Replace the endpoints by those in `found`; endpoints in both keep their state.

        Working endpoints stay, last in the list, until a new one works.  All stay if found is None.
        """
        if found is None:
            self._log.warning("could not retrieve cluster information from the given urls")
            return
        urls = found.peer_urls
        if urls != self._peer_urls:
            self._log.info(
                "updated peer urls in cluster file from [%s] to [%s]", " ".join(self._peer_urls),
                " ".join(urls),
            )
            self._peer_urls = urls
        known = {endpoint.url: endpoint for endpoint in self._endpoints}
        listed = [url for url in found.client_urls if not self._is_own(url)]
        random.shuffle(listed)
        endpoints = [known.get(url) or self._endpoint(url) for url in listed]
        if not any(endpoint.works for endpoint in endpoints):
            endpoints += [
                endpoint for endpoint in self._endpoints
                if endpoint.works and endpoint not in endpoints
            ]
        self._endpoints = endpoints

    def _is_own(self, url: str) -> bool:
        """True if `url` leads to this proxy: some members advertise `localhost`."""
        port = url_address(url)[1]
        return is_local(url) and any(
            is_local(own) and url_address(own)[1] == port
            for own in self._config.listen_client_urls
        )

    def _endpoint(self, url: str, *, has_worked: bool = False) -> Endpoint:
        wait_s = self._config.proxy_failure_wait_ms / 1000
        return Endpoint(url, self._reactor, self._dialer, wait_s, has_worked=has_worked)


class ProxyMetrics(Metrics):
    """The metrics of a proxy.  Source: etcd 2.3 proxy/metrics.go."""

    def __init__(self, started_ns: int, now: Callable[[], float]) -> None:
        super().__init__()
        add_process_readings(self, started_ns, now)
        self.requests = self.counter(
            "etcd_proxy_requests_total", "Requests that came in, by method.", ("method",))
        self.handled = self.counter(
            "etcd_proxy_handled_total", "Requests that a member answered.", ("method", "code"))
        self.dropped = self.counter(
            "etcd_proxy_dropped_total", "Requests, or tries of one, that failed in the proxy.",
            ("method", "proxying_error"))
        self.seconds = Histograms(exponential_bounds(0.0005, 13), ("method",))
        self.add("etcd_proxy_handling_duration_seconds",
                 "From a request to its answer, by method.", self.seconds)


def _method_label(request: HttpRequest) -> str:
    """Return the method as a label; unknown ones share `other`, so that labels stay few."""
    known = ("GET", "HEAD", "PUT", "POST", "DELETE", "PATCH")
    return request.method if request.method in known else "other"


class Forward:
    """One request: tries one endpoint after the other, and passes the answer to the client.

    After an endpoint that cannot be reached, or does not answer, the next one is tried.  Differs
    from etcd: a request that is not GET or HEAD goes to the next endpoint only if no connection
    was made, as the first member may have executed it.  Thread: reactor.
    """

    __slots__ = (
        "_request", "_left", "_tried", "_dialer", "_metrics", "_method", "_ended", "_started",
        "_endpoint", "_call", "_reply", "_is_empty", "_waits",
    )

    def __init__(
        self, request: HttpRequest, endpoints: Sequence[Endpoint], dialer: ProxyDialer,
        metrics: ProxyMetrics, ended: Callable[[Forward], None],
    ) -> None:
        self._request = request
        self._left = collections.deque(endpoints)
        self._tried = 0
        self._dialer = dialer
        self._metrics = metrics
        self._method = _method_label(request)
        self._ended = ended
        self._started = dialer.now()
        self._endpoint: Optional[Endpoint] = None
        self._call: Optional[HttpCall] = None
        self._reply: Optional[StreamReply] = None
        self._is_empty = True           # no byte of the answer's body has come
        self._waits = request.method == "GET" and not _WAITS.isdisjoint(
            request.query.split("&", FORM_FIELDS_MAX))

    def start(self) -> None:
        self._request.on_close = self._client_gone
        # A client that ends its side of the connection has ended its watch.
        self._request.connection.streaming = self._waits
        self._try_next()

    def cancel(self) -> None:
        """Drop the request without an answer."""
        self._request.on_close = None
        if self._call is not None:
            self._call.cancel()
        self._end()

    def lost(self, error: Exception) -> None:
        """Try the next endpoint, as this one has failed a probe."""
        if self._call is not None:
            self._call.cancel()
        self.on_done(error)

    def _try_next(self) -> None:
        while self._left:
            endpoint = self._left.popleft()
            if endpoint.available:      # another request may have marked it failed meanwhile
                self._tried += 1
                self._endpoint = endpoint
                endpoint.add_waiting(self)
                self._call = self._dialer.call(
                    endpoint.url, self._request, self._headers(), self)
                return
        self._give_up(502, f"unable to get response from {self._tried} endpoint(s)")

    def _headers(self) -> Dict[str, str]:
        """Return the headers of the client for the member, and X-Forwarded-For."""
        request = self._request
        named = _list_header(request.headers, "connection")
        dropped = _HOP_HEADERS.union(named, ("expect",))    # the proxy has answered Expect
        headers = {
            _header_name(name): value for name, value in request.headers.items()
            if name not in dropped
        }
        came_by = request.headers.get("x-forwarded-for", "")
        client = request.remote.rpartition(":")[0]
        headers["X-Forwarded-For"] = f"{came_by}, {client}" if came_by else client
        return headers

    def on_head(self, status: int, headers: Dict[str, str]) -> None:
        assert self._endpoint is not None
        request = self._request
        self._endpoint.answered()
        self._metrics.handled.inc(self._method, str(status))
        self._metrics.seconds.child(self._method).observe(self._dialer.now() - self._started)
        dropped = _HOP_HEADERS.union(("date",))
        if isinstance(request, CorsRequest):
            dropped = dropped.union(_CORS_HEADERS)      # the reply has those of the proxy
        lines = "".join(
            f"{_header_name(name)}: {value}\r\n" for name, value in headers.items()
            if name not in dropped
        )
        length = None
        if "transfer-encoding" not in headers and "content-length" in headers:
            length = _content_length(headers)
        request.on_close = None
        self._reply = request.start_stream(status, None, lines, length=length)
        self._reply.on_close = self._client_gone

    def on_data(self, data: bytes) -> None:
        assert self._reply is not None and self._call is not None and self._endpoint is not None
        self._endpoint.answered()
        self._is_empty = False
        self._reply.write(data)
        if self._reply.pending > PROXY_UNREAD_BYTES_MAX:
            self._call.pause()
            self._reply.when_read(self._call.resume)

    def on_done(self, error: Optional[Exception]) -> None:
        if self._reply is None:
            self._try_failed(error or EOFError("unexpected EOF"))
            return
        # A watch without events ends as if the member had ended it: clients start a new one.
        if error is None or self._waits and self._is_empty:
            self._reply.end()
        else:
            self._reply.abort()
        self._end()

    def _try_failed(self, error: Exception) -> None:
        """Try the next endpoint, as this one did not answer."""
        assert self._endpoint is not None and self._call is not None
        endpoint = self._endpoint
        endpoint.remove_waiting(self)
        if isinstance(error, OSError) and error.errno in NO_DESCRIPTOR:     # not the member's fault
            self._give_up(503, f"{_reason(error)}; raise the limit of open files (ulimit -n)")
            return
        self._metrics.dropped.inc(self._method, "failed_sending_request")
        why = _reason(error)
        if isinstance(error, OSError) and error.errno and not self._call.connected:
            why = f"dial tcp {urlsplit(endpoint.url).netloc}: connect: {why}"
        package_logger("proxy").info("failed to direct request to %s: %s", endpoint.url, why)
        endpoint.failed()
        if self._call.connected and self._method not in ("GET", "HEAD"):
            self._left.clear()          # the member may have executed it
        self._try_next()

    def _give_up(self, status: int, text: str) -> None:
        package_logger("proxy").info(text)
        self._metrics.dropped.inc(self._method, "failed_getting_response")
        self._end()
        write_message(self._request, status, f"proxy: {text}")

    def _client_gone(self) -> None:
        package_logger("proxy").info("client %s closed request prematurely", self._request.remote)
        self.cancel()

    def _end(self) -> None:
        if self._endpoint is not None:
            self._endpoint.remove_waiting(self)
        self._ended(self)


def _header_name(name: str) -> str:
    """Return `x-etcd-index` as Go servers spell it: `X-Etcd-Index`."""
    return "-".join(part.capitalize() for part in name.split("-"))


class ProxyApi:
    """The client port of a proxy: answers two paths, and forwards the others to a member.

    Thread: reactor.  Source: etcd 2.3 proxy/proxy.go, reverse.go.
    """

    def __init__(self, endpoints: Endpoints, dialer: ProxyDialer, config: ServerConfig) -> None:
        self._endpoints = endpoints
        self._dialer = dialer
        self._origins = frozenset(config.cors)
        self._is_readonly = config.proxy == "readonly"
        self._metrics = ProxyMetrics(dialer.wall_ns(), dialer.now)
        self._forwards: Dict[Forward, int] = {}     # bytes of their bodies
        self._body_bytes = 0                        # of all

    def handle(self, request: HttpRequest) -> None:
        path, request = request.path, allow_origin(request, self._origins)
        if not path.startswith("/"):
            request.reply(400)
        elif not is_clean_path(path):
            redirect(request)
        elif path == "/metrics":
            request.reply(200, utf8(self._metrics.text()), "text/plain; version=0.0.4")
        elif self._is_readonly and request.method != "GET":
            request.reply(501)
        elif request.method == "OPTIONS":
            request.reply(200)
        elif path != "/v2/config/local/proxy":
            self._forward(request)
        elif request.method != "GET":
            refuse_method("GET", request)
        else:
            urls = [endpoint.url for endpoint in self._endpoints.available()]
            write_text(request, 200, json_text({"endpoints": urls}) + "\n")

    def stop(self) -> None:
        for forward in list(self._forwards):
            forward.cancel()

    def _forward(self, request: HttpRequest) -> None:
        method = _method_label(request)
        self._metrics.requests.inc(method)
        if request.body_too_large:
            write_message(
                request, 500, "proxy: failed to read request body: http: request body too large"
            )
            return
        endpoints = self._endpoints.available()
        if not endpoints:
            text = "zero endpoints currently available"
            package_logger("proxy").info(text)
            self._metrics.dropped.inc(method, "zero_endpoints")
            write_message(request, 503, f"proxy: {text}")
            return
        if self._body_bytes > QUEUED_BYTES_MAX:
            self._metrics.dropped.inc(method, "failed_sending_request")
            write_message(request, 503, "proxy: too many large requests wait for the members")
            return
        forward = Forward(request, endpoints, self._dialer, self._metrics, self._forward_ended)
        self._forwards[forward] = len(request.body)
        self._body_bytes += len(request.body)
        forward.start()

    def _forward_ended(self, forward: Forward) -> None:
        self._body_bytes -= self._forwards.pop(forward)


class ProxyServer(ServerThread):
    """A proxy in the caller's process, on a thread of its own; settings as for Server.

        with pyetcd.ProxyServer(data_dir="p", initial_cluster="a=http://10.0.0.1:2380") as proxy:
            print(proxy.client_urls[0])

    Raises StartError from bind() and start().  Thread: any.
    """

    def _init(self, config: ServerConfig) -> None:
        super()._init(config)
        self._endpoints: Optional[Endpoints] = None
        self._api: Optional[ProxyApi] = None

    def bind(self) -> None:
        """Open the listening sockets, so that the ports are known; serve nothing yet."""
        if self._client_listeners:
            return
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(self._close_listeners)
            for url in self.config.listen_client_urls:
                self._client_listeners.append(self._listen(
                    url, self._serve, REQUEST_BODY_BYTES_MAX, self.config.client_tls,
                    kept=(CONNECTIONS_MAX, 2),  # a request needs a second one, to a member
                ))
                package_logger("proxy").info("listening for client requests on %s", url)
            on_failure.pop_all()

    def start(self) -> None:
        """Find the members and serve.  Discovery waits until all have registered."""
        config = self.config
        with contextlib.ExitStack() as cleanup:
            cleanup.callback(self._close_listeners)
            fresh = absent_dirs(os.path.join(config.data_dir or config.name + ".etcd", "proxy"))
            cleanup.callback(remove_dirs, fresh)
            cluster_file = prepare_proxy_dir(config)
            remove_dirs(fresh)          # a proxy that ends while it waits leaves no directory
            cluster = find_cluster(config, cluster_file)
            make_dirs(fresh)
            dialer = ProxyDialer(config, self._reactor)
            self._endpoints = Endpoints(config, self._reactor, dialer, cluster, cluster_file)
            self._endpoints.refresh()
            self._api = ProxyApi(self._endpoints, dialer, config)
            self.bind()
            self._start_thread()
            cleanup.pop_all()

    def _serve(self, request: HttpRequest) -> None:
        assert self._api is not None
        self._api.handle(request)

    def _start_work(self) -> None:
        assert self._endpoints is not None
        self._endpoints.schedule_refresh()

    def _free(self) -> None:
        if self._endpoints is not None:
            self._endpoints.stop()
        if self._api is not None:
            self._api.stop()


# ============================================================================
# life/settings -- Settings: the values of flags, from command line, environment or configuration file.
# ============================================================================


ENVIRONMENT_FILE = "/etc/environment"   # of CoreOS, with COREOS_PRIVATE_IPV4


class Settings:
    """Values of flags: from the command line and the environment, or from a configuration file.

    values   flag name -> parsed value, for the flags that were given
    sources  flag name -> `-name`, `ETCD_NAME` or `<file>:<line>`
    lines    (level, package, text) to be logged once logging is set up

    flags    the flags to accept; (): those of a member
    A flag on the command line goes before its variable.  Raises FlagError.
    Source: Go's package flag; etcd 2.3 pkg/flags; etcd 3.4 etcdmain/config.go for the file.
    """

    def __init__(
        self, argv: Sequence[str], environ: Mapping[str, str], flags: Sequence[Flag] = ()
    ) -> None:
        self.values: Dict[str, Any] = {}
        self.sources: Dict[str, str] = {}
        self.lines: List[Tuple[int, str, str]] = []
        self.help = False
        self._environ = environ
        self._flags = {flag.name: flag for flag in flags} or _all_flags()
        self._rest = list(argv)
        self._switch = ""               # the flag before the rest, if that is a bare boolean
        while not self.help and self._next_flag():
            pass

    def __getitem__(self, name: str) -> Any:
        return self.values.get(name, self._flags[name].default)

    def is_set(self, name: str) -> bool:
        return name in self.values

    def where(self, name: str) -> str:
        """Return the name of a setting for messages, with the place where it was set."""
        source = self.sources.get(name, f"-{name}")
        return source if source.startswith("-") else f"{name} (from {source})"

    def example(self, name: str, like: str, text: str) -> str:
        """Return the text that sets `name` to `text` in the place where `like` was set."""
        source = self.sources.get(like, "-")
        if source.startswith("-"):
            return f"-{name} {text}"
        is_file = ":" in source
        return f"{name}: {text}" if is_file else f"{self._flags[name].variable}={text}"

    def warn(self, text: str) -> None:
        self.lines.append((logging.WARNING, "etcd", text))

    def _next_flag(self) -> bool:
        """Take one flag off the command line; return False at the end of the flags."""
        if not self._rest or not self._rest[0].startswith("-") or self._rest[0] == "-":
            return False
        word = self._rest.pop(0)
        if word == "--":
            return False
        name, has_value, text = word[2 if word.startswith("--") else 1:].partition("=")
        if not name or name.startswith("-"):
            raise FlagError(f"bad flag syntax: {word}")
        if name in ("h", "help"):
            self.help = True
            return False
        flag = self._flags.get(name)
        if flag is None:
            raise FlagError(f"flag provided but not defined: -{name}{self._suggestion('-', name)}")
        self._switch = name if flag.is_bool and not has_value else ""
        if not has_value:
            if flag.is_bool:
                text = "true"
            elif self._rest:
                text = self._rest.pop(0)
            else:
                raise FlagError(f"flag needs an argument: -{name}; if there was a variable behind"
                                f" it, that is empty")
        self._set(flag, text, f"-{name}")
        return True

    def take_word(self) -> str:
        """Take the first word after the flags; return "" if there is none."""
        return self._rest.pop(0) if self._rest else ""

    def check_leftover(self) -> None:
        """Raise FlagError if a word follows the flags."""
        if self._rest:
            word = self._rest[0]
            raise FlagError(f"error verifying flags, '{word}' is not a valid flag"
                            f"{self._leftover_advice(word)}")

    def _leftover_advice(self, word: str) -> str:
        """Return what to write instead of a word that is no flag; "" if that is unknown."""
        bare = word.lstrip(_TYPOGRAPHIC_DASHES)
        switch, instead = self._switch, IGNORED_BOOLS.get(self._switch)
        if bare != word:
            return f"; it begins with a typographic dash, write -{bare.lstrip('-')}"
        if word.partition("=")[0] in self._flags or word in ("help", "h"):
            return f"; write -{word}"
        if instead:
            return f"; {instead}"
        value = _YAML_BOOLS.get(word.lower(), word)
        if switch and value in GO_BOOLS:
            return f"; -{switch} is a switch: write -{switch}, or -{switch}={value}"
        if "://" in word:
            return "; write a list as one word, its parts separated by commas without spaces"
        if word in ("backup", "restore", "check", "dump", "export", "import"):
            return f"; write `pyetcd {word}` first and its flags behind it"
        return f"; {word} stands behind the switch -{switch}" if switch else ""

    def _suggestion(self, prefix: str, name: str) -> str:
        """Return `; did you mean <flag>?` if a flag has a similar name, else ""."""
        known = [
            flag.name for flag in self._flags.values()
            if flag.name != name and not flag.no_effect and flag.name not in IGNORED_BOOLS
        ]
        wanted = name.lower().replace("_", "-")
        found = difflib.get_close_matches(wanted, known, 1, _LIKENESS_MIN)
        if not found:
            return ""
        shown = found[0] if prefix != "ETCD_" else found[0].upper().replace("-", "_")
        return f"; did you mean {prefix}{shown}?"

    def complete(self) -> None:
        """Read the environment; or, if a configuration file is named, that file instead."""
        path = self["config-file"] or self._environ.get(self._flags["config-file"].variable)
        if path:
            self.read_file(path)
        else:
            self.read_environment()

    def read_environment(self) -> None:
        """Read the ETCD_* variables; an empty variable counts as not set."""
        for name, flag in self._flags.items():
            text = self._environ.get(flag.variable, "")
            if not text:
                continue
            if name in self.values:
                self._log(f"recognized environment variable {flag.variable}, but unused: shadowed"
                          f" by corresponding flag ")
                continue
            self._log(f"recognized and used environment variable {flag.variable}={text}")
            self._set(flag, text, flag.variable)
        known = {flag.variable for flag in self._flags.values()}
        for variable in sorted(self._environ):
            if variable.startswith("ETCD_") and variable not in known:
                text = self._environ[variable]
                meant = self._suggestion("ETCD_", variable[len("ETCD_"):])
                self._log(f"unrecognized environment variable {variable}={text}{meant}",
                          logging.WARNING)

    def read_file(self, path: str) -> None:
        """Read a configuration file, and forget all other settings.

        Differs from etcd, which ignores an unknown setting in silence: here it is a warning.
        """
        self.values, self.sources = {}, {}
        self.lines = [(
            logging.INFO, "etcd", f'Loading server configuration from "{path}". Other'
            f" configuration command line flags and environment variables will be ignored if"
            f" provided."
        )]
        for line, name, text in read_config_file(path):
            source = f"{path}:{line}"
            flag = self._flags.get(name)
            if flag is None or name in ("config-file", "version"):
                self.warn(f'{source}: unknown setting "{name}" is ignored; `pyetcd -help` lists'
                          f" those that are known{self._suggestion('', name)}")
                continue
            if flag.is_bool:
                text = _YAML_BOOLS.get(text.lower(), text)
            self._set(flag, text, source)

    def _set(self, flag: Flag, text: str, source: str) -> None:
        name = flag.name
        if name in IGNORED_BOOLS:
            self._log(f'flag "-{name}" is no longer supported - ignoring.', logging.WARNING)
        elif flag.no_effect:
            self._log(f"flag -{name} has no effect: {flag.no_effect}", logging.WARNING)
        if name.endswith("-urls") or name.endswith("addr") or name == "initial-cluster":
            text = expand_addresses(text, self._environ, source)
        try:
            self.values[name] = flag.parse(text)
        except UnsupportedFlag as error:
            where = source if source in (f"-{name}", flag.variable) else f"{source}: {name}"
            raise FlagError(f"{where} {error}") from None
        except ValueError as error:
            advice = _advice(flag, text)
            raise FlagError(_invalid(flag, text, source, str(error)) + advice) from None
        self.sources[name] = source
        if _quoting_advice(text) and name != "initial-cluster":
            self.warn(f"the value of {source} is {text!r}{_quoting_advice(text)}")

    def _log(self, text: str, level: int = logging.INFO) -> None:
        self.lines.append((level, "flags", text))


_YAML_BOOLS = {"yes": "true", "on": "true", "no": "false", "off": "false"}
_TYPOGRAPHIC_DASHES = "\u2010\u2011\u2012\u2013\u2014\u2015\u2212"
_TYPOGRAPHIC_QUOTES = "\u201c\u201d\u201e\u2018\u2019"
_LIKENESS_MIN = 0.7                 # of a misspelt name to the flag that is suggested; 1.0: equal


def _quoting_advice(text: str) -> str:
    """Return what to do about quotes or a line end around a value; "" if there are none."""
    if text and (text[0] in _TYPOGRAPHIC_QUOTES or text[-1] in _TYPOGRAPHIC_QUOTES):
        return "; it has typographic quotes: write it without quotes"
    if len(text) > 1 and text[0] in "\"'" and text[-1] == text[0]:
        return (
            f"; the quotes are part of it, as docker's --env-file and lists in compose files leave"
            f" them there: write {text[1:-1]} without quotes"
        )
    if text.endswith("\r"):
        return "; it ends with a carriage return: save the file with Unix line ends"
    return ""


def _advice(flag: Flag, text: str) -> str:
    """Return what to write instead of a bad value; "" if that is unknown."""
    quoting = _quoting_advice(text)
    if quoting:
        return quoting
    if flag.is_bool:
        return f"; write {_YAML_BOOLS.get(text.lower(), 'true or false')}"
    if flag.parse is _parse_address:
        return f"; write {text.partition('://')[2]}" if "://" in text else "; write IP:PORT"
    if flag.parse is _parse_origins:
        return "; write origins as https://HOST, or * for all"
    if flag.parse is parse_uint:
        unit = ", in milliseconds and without a unit" if "milliseconds" in flag.help else ""
        return f"; write a whole number{unit}"
    return url_advice(text, flag.name) if flag.parse is parse_urls else ""


def url_advice(text: str, name: str) -> str:
    """Return what to write instead of the first bad URL of a list, or of `name=url,name=url`."""
    port = 2380 if "peer" in name or name == "initial-cluster" else 2379
    for item in text.split(","):
        pair, _, url = item.strip().rpartition("=")
        url = item.strip() if "://" in pair or name != "initial-cluster" else url
        if usable_urls([url]):
            continue
        if not url:
            return "; there is a comma too many" if len(text) > 1 else "; write http://HOST:PORT"
        if re.search("[${}<>%]", url):
            return "; a variable or placeholder was not filled in: write the address itself"
        if re.search(r"\s", url):
            return "; separate URLs by commas without spaces"
        return _repaired_url(url, port)
    return ""


def _repaired_url(url: str, port: int) -> str:
    """Return `; write <URL>` with the URL that was probably meant; "" if that is bad too."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        scheme, rest = "http", url
    authority = re.split("[/?#]", rest.lstrip("/"), maxsplit=1)[0]
    host, given = split_address(authority)
    if ":" in host and is_ip(host):         # an IPv6 address and a port, or all of it an address
        host = f"[{host}]"
    elif ":" in host and is_ip(authority):
        host, given = f"[{authority}]", ""
    meant = f"{scheme}://{host}{given if len(given) > 1 else f':{port}'}"
    with contextlib.suppress(ValueError):
        return f"; write {check_advertised_url(meant)}"
    return ""


def _invalid(flag: Flag, text: str, source: str, reason: str) -> str:
    """Return the sentence about a bad value; Go's flag package words it by kind and source."""
    if source == flag.variable:
        return f'invalid value "{text}" for {source}: {reason}'
    if not source.startswith("-"):
        return f'{source}: invalid value "{text}" for {flag.name}: {reason}'
    if flag.is_bool:
        return f'invalid boolean value "{text}" for {source}: {reason}'
    return f'invalid value "{text}" for flag {source}: {reason}'


# -- the configuration file ----------------------------------------------------


_SECTIONS = {"client-transport-security": "", "peer-transport-security": "peer-"}
_SECTION_KEYS = (
    "cert-file", "key-file", "client-cert-auth", "trusted-ca-file", "ca-file", "auto-tls",
)
_QUOTED = r'''"(?:[^"\\]|\\.)*"|'(?:[^']|'')*\''''
_PLAIN = r"(?![-?](?:\s|$))[^\s\[\]{}&*!|>%@`\"'#,](?:[^#]|(?<=\S)#)*?"
_CONFIG_KEY = re.compile(rf"(\s*)({_QUOTED}|[\w.-]+)\s*:(?=\s|$)\s*(.*)")
_CONFIG_VALUE = re.compile(rf"({_QUOTED}|{_PLAIN})?\s*(?:(?<=\s)#.*|^#.*)?")
_CONFIG_ITEM = re.compile(rf"\s*({_QUOTED}|[^\s,\[\]{{}}&*!|>%@`\"'#][^,\[\]{{}}\"']*)\s*(?:,|$)")
_CONFIG_FORM = "write `setting: value` on each line, lists as `a,b` or `[a, b]`, * in quotes"


def read_config_file(path: str) -> List[Tuple[int, str, str]]:
    """Return (line, flag, text) for the settings in a JSON object, or lines of `setting: value`.

    The names are those of the flags.  In the sections client-transport-security and
    peer-transport-security of etcd 3 the flags for TLS have no `peer-`.  An empty setting is
    skipped.  Of YAML a flat file may have comments, quotes and [a, b]; anything else is an error.
    Raises FlagError with file and line.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
    except OSError as error:
        raise FlagError(
            f"error verifying flags, open {path}: {(error.strerror or str(error)).lower()}"
        ) from None
    except UnicodeDecodeError:
        raise FlagError(f"{path} is not text in UTF-8") from None
    read = _json_settings if text.lstrip().startswith("{") else _yaml_settings
    found: Dict[str, Tuple[int, str, str]] = {}
    for line, section, key, value in read(path, text):
        if not value:
            continue
        if section and key not in _SECTION_KEYS:
            raise FlagError(f'{path}:{line}: unknown setting "{key}" in {section}; use one of'
                            f" {', '.join(_SECTION_KEYS)}, or the name of the flag outside of it")
        name = _SECTIONS.get(section, "") + key
        if name in found:
            raise FlagError(f"{path}:{line}: {name} is set a second time, after line"
                            f" {found[name][0]}")
        found[name] = line, name, value
    return list(found.values())


_Found = Tuple[int, str, str, str]      # line, section or "", key, text


def _json_settings(path: str, text: str) -> Iterator[_Found]:
    lines = text.split("\n")

    def line_of(key: str, first: int) -> int:
        quoted = json.dumps(key)
        return next((n for n in range(first, len(lines) + 1) if quoted in lines[n - 1]), first)

    def flat(key: str, value: Any, line: int) -> str:
        if isinstance(value, list):
            return ",".join(flat(key, item, line) for item in value)
        if isinstance(value, (tuple, float)):
            raise FlagError(f"{path}:{line}: the value of {key} is not understood; a setting is a"
                            f" string, an integer, true or false, or a list of these")
        return "" if value is None else value if isinstance(value, str) else json.dumps(value)

    try:
        pairs = json.loads(text, object_pairs_hook=tuple)
    except RecursionError:
        raise FlagError(f"{path}: nested too deeply for a configuration") from None
    except ValueError as error:
        line = error.lineno if isinstance(error, json.JSONDecodeError) else 1
        raise FlagError(f"{path}:{line}: not JSON: {error}") from None
    for key, value in pairs:
        line = line_of(key, 1)
        if key not in _SECTIONS:
            yield line, "", key, flat(key, value, line)
        elif isinstance(value, tuple):
            for name, item in value:
                at = line_of(name, line)
                yield at, key, name, flat(name, item, at)
        elif value is not None:
            raise FlagError(f"{path}:{line}: {key} is a section: an object with its settings")


def _yaml_settings(path: str, text: str) -> Iterator[_Found]:
    section = ""
    rows = enumerate(text.splitlines(), 1)
    for line, row in rows:
        if not row.strip() or row.lstrip().startswith("#") or row.rstrip() in ("---", "..."):
            continue
        match = _CONFIG_KEY.fullmatch(row.rstrip())
        if match is None:
            raise FlagError(f"{path}:{line}: {row.strip()!r} is not understood; {_CONFIG_FORM}")
        indent, key, value = match.groups()
        try:
            key = _unquote_yaml(key)
        except ValueError:
            raise FlagError(f"{path}:{line}: {key} is not understood; {_CONFIG_FORM}") from None
        if indent and not section:
            raise FlagError(f"{path}:{line}: {key} is indented, but stands in none of the sections"
                            f" {', '.join(_SECTIONS)}")
        if not indent:
            section = key if key in _SECTIONS else ""
        if value.startswith("["):
            while "]" not in value:
                _, more = next(rows, (0, None))
                if more is None:
                    break
                value += " " + re.sub(r"(^|\s)#.*", "", more.strip())
        try:
            found = _yaml_text(value)
        except ValueError:
            raise FlagError(f"{path}:{line}: the value of {key}, {value!r}, is not understood;"
                            f" {_CONFIG_FORM}") from None
        if indent or not section:
            yield line, section if indent else "", key, found
        elif found:
            raise FlagError(f"{path}:{line}: {key} is a section: its settings stand indented below")


def _yaml_text(value: str) -> str:
    """Return the text of a scalar, or of a list in brackets.  Raises ValueError."""
    listed = re.fullmatch(r"\[(.*)\]\s*(?:(?<=\s)#.*)?", value)
    if listed:
        items, rest = [], listed.group(1).strip()
        while rest:
            item = _CONFIG_ITEM.match(rest)
            if item is None:
                raise ValueError
            items.append(_unquote_yaml(item.group(1).strip()))
            rest = rest[item.end():]
        return ",".join(items)
    match = _CONFIG_VALUE.fullmatch(value)
    if match is None or re.search(r":(\s|$)", re.sub(_QUOTED, "", match.group(1) or "")):
        raise ValueError
    return _unquote_yaml(match.group(1) or "")


def _unquote_yaml(text: str) -> str:
    """Return the text of a scalar.  Raises ValueError for escapes that JSON does not have."""
    if text.startswith("'"):
        return text[1:-1].replace("''", "'")
    if text.startswith('"'):
        return str(load_json(text))
    return "" if text in ("~", "null", "Null", "NULL") else text


# -- addresses -----------------------------------------------------------------


_ADDRESS_NAME = re.compile(r"\$\{?(private|public)_ipv4\b\}?")


def expand_addresses(text: str, environ: Mapping[str, str], source: str) -> str:
    """Replace $private_ipv4 and $public_ipv4 by addresses, as cloud-config does on some clouds.

    The addresses are COREOS_PRIVATE_IPV4 and COREOS_PUBLIC_IPV4 in the environment, or in
    /etc/environment.  Without a private one, the interface with the default route has it.
    Raises FlagError, which names `source`, if an address is unknown.
    """
    def address(match: re.Match[str]) -> str:
        kind = match.group(1)
        variable = f"COREOS_{kind.upper()}_IPV4"
        known = environ.get(variable) or read_environment_file(ENVIRONMENT_FILE).get(variable)
        if not known and kind == "private":
            known = default_route_address()
        if not known:
            raise FlagError(
                f"{source} has ${kind}_ipv4 in {text}, but the {kind} address of this machine is"
                f" not known: write the address itself, or set {variable} in {ENVIRONMENT_FILE}"
            )
        return known

    return _ADDRESS_NAME.sub(address, text)


def read_environment_file(path: str) -> Dict[str, str]:
    """Return the `KEY=value` lines of a file; empty if it cannot be read."""
    found: Dict[str, str] = {}
    with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            match = re.fullmatch(r"(?:export\s+)?(\w+)=(.*)", line.strip(), re.DOTALL)
            if match:
                found[match.group(1)] = match.group(2).strip("\"'")
    return found


def _take_old_addresses(settings: Settings) -> None:
    """Turn the IP:port flags of etcd 0.4 into URLs.  Raises FlagError."""
    values, sources = settings.values, settings.sources
    for side, advertise, listen in (
        ("", "advertise-client-urls", "listen-client-urls"),
        ("peer-", "initial-advertise-peer-urls", "listen-peer-urls"),
    ):
        addr, bind_addr = side + "addr", side + "bind-addr"
        if addr in values and bind_addr not in values and listen not in values:
            values[bind_addr] = "[::]:" + values[addr].rpartition(":")[2]
            sources[bind_addr] = sources[addr]
        is_tls = settings[side + "cert-file"] or settings[side + "key-file"]
        for old, new in ((addr, advertise), (bind_addr, listen)):
            if old in values and new in values:
                raise FlagError(f"Set only one of flags -{new} and -{old}")
            if old in values:
                values[new] = (f"{'https' if is_tls else 'http'}://{values[old]}",)
                sources[new] = sources[old]


# ============================================================================
# life/checks -- Checks of settings that contradict each other, and the configuration that settings make.
# ============================================================================


# -- settings that contradict each other -----------------------------------------


def check_settings(settings: Settings) -> None:
    """Raise FlagError for settings that contradict each other.  Source: etcd 2.3 config.go."""
    ways = [
        name for name in ("initial-cluster", "discovery", "discovery-srv") if settings.is_set(name)
    ]
    if len(ways) > 1:
        raise FlagError(
            "multiple discovery or bootstrap flags are set. Choose one of "
            '"initial-cluster", "discovery" or "discovery-srv"'
        )
    _take_old_addresses(settings)
    for name, instead in IGNORED_BOOLS.items():
        if settings[name] and instead:
            settings.warn(f"{settings.where(name)} does nothing: {instead}")
    _check_name(settings)
    _check_log_packages(settings)
    _check_advertised_to_clients(settings)
    _check_advertised_to_peers(settings)
    _check_times(settings)
    _check_initial_cluster(settings)
    for name in ("initial-advertise-peer-urls", "advertise-client-urls"):
        for url in settings[name]:
            _check_host(settings, name, url)
    if settings["peer-cert-allowed-cn"] and settings["peer-cert-allowed-hostname"]:
        raise FlagError(
            f'AllowedCN and AllowedHostname are mutually exclusive'
            f' (cn="{settings["peer-cert-allowed-cn"]}",'
            f' hostname="{settings["peer-cert-allowed-hostname"]}"); set one of'
            f" -peer-cert-allowed-cn and -peer-cert-allowed-hostname"
        )


def _check_name(settings: Settings) -> None:
    """Raise FlagError for a name that -initial-cluster cannot hold."""
    name, where = settings["name"], settings.where("name")
    if not name:
        raise FlagError(
            f'couldn\'t find local name "" in the initial cluster configuration: {where} is empty;'
            f" give this member a name, or leave the flag out"
        )
    if re.search("[=,]", name):
        raise FlagError(
            f"{where} has {go_quote(name)}: in -initial-cluster, = and , separate names and URLs;"
            f" choose a name without them"
        )


def _check_log_packages(settings: Settings) -> None:
    """Warn of packages that never log; etcd accepts them without a word."""
    for package in settings["log-package-levels"]:
        if package and package.partition(".")[0] not in LOG_PACKAGES:
            near = difflib.get_close_matches(package, LOG_PACKAGES, 1)
            meant = f"; did you mean {near[0]}?" if near else ""
            settings.warn(
                f"{settings.where('log-package-levels')} has {package}, which logs nothing here;"
                f" the packages are {', '.join(LOG_PACKAGES)}, and * is all of them{meant}"
            )


def _check_advertised_to_clients(settings: Settings) -> None:
    """Raise FlagError if -listen-client-urls has no advertised URLs; a proxy needs none."""
    listen, advertise = "listen-client-urls", "advertise-client-urls"
    falls_back = settings["discovery"] and settings["discovery-fallback"] == "proxy"
    if not settings.is_set(listen) or settings.is_set(advertise):
        return
    if settings["proxy"] == "off" and not falls_back:
        example = ",".join(_reachable(url) for url in settings[listen])
        raise FlagError(
            "-advertise-client-urls is required when -listen-client-urls is set explicitly;"
            " When listening on specific address(es), this etcd process must advertise"
            " accessible url(s) to each connected client; for example"
            f" {settings.example(advertise, listen, example)}"
        )


def _check_advertised_to_peers(settings: Settings) -> None:
    """Warn if discovery would publish the default peer URLs of a member that listens elsewhere.

    With -initial-cluster this is an error later, as the URLs do not match.
    """
    listen, advertise = "listen-peer-urls", "initial-advertise-peer-urls"
    found = settings["discovery"] or settings["discovery-srv"]
    if found and settings.is_set(listen) and not settings.is_set(advertise):
        example = ",".join(_reachable(url) for url in settings[listen] if url_address(url)[0])
        settings.warn(
            f"{settings.where(listen)} is set, but the other members are told"
            f" {','.join(settings[advertise])}; set"
            f" {settings.example(advertise, listen, example or 'http://10.0.0.5:2380')}"
        )


def _reachable(url: str) -> str:
    """Return `url` with an address of this machine in place of a wildcard."""
    host, port = url_address(url)
    if host not in WILDCARD_HOSTS:
        return url
    return f"{urlsplit(url).scheme}://{default_route_address() or '10.0.0.5'}:{port}"


def _check_times(settings: Settings) -> None:
    heartbeat_ms, election_ms = settings["heartbeat-interval"], settings["election-timeout"]
    if heartbeat_ms < 1:
        raise FlagError("-heartbeat-interval[0ms] should be at least 1ms")
    if 5 * heartbeat_ms > election_ms:
        raise FlagError(
            f"-election-timeout[{election_ms}ms] should be at least as 5 times as"
            f" -heartbeat-interval[{heartbeat_ms}ms]"
        )
    if election_ms > ELECTION_MS_MAX:
        raise FlagError(
            f"-election-timeout[{election_ms}ms] is too long, and should be set less than"
            f" {ELECTION_MS_MAX}ms"
        )


def _check_initial_cluster(settings: Settings) -> None:
    where = settings.where("initial-cluster")
    if settings["initial-cluster"]:
        try:
            text = settings["initial-cluster"]
            nameless = settings.values.get("initial-cluster-state") == "existing"
            initial = parse_initial_cluster(text, nameless=nameless)
        except ValueError as error:
            advice = _quoting_advice(text) or url_advice(text, "initial-cluster")
            raise FlagError(
                f"error setting up initial cluster: {error} (in {where}){advice}"
            ) from None
        for urls in initial.values():
            for url in urls:
                _check_host(settings, "initial-cluster", url)
    elif settings.is_set("initial-cluster"):
        raise FlagError(
            f'couldn\'t find local name "{settings["name"]}" in the initial cluster configuration:'
            f" {where} is empty"
        )


def check_restore_settings(settings: Settings) -> None:
    """Raise FlagError for a bad name or bad peer URLs of a restored cluster."""
    _check_name(settings)
    _check_initial_cluster(settings)
    for url in settings["initial-advertise-peer-urls"]:
        _check_host(settings, "initial-advertise-peer-urls", url)


def _check_host(settings: Settings, name: str, url: str) -> None:
    """Raise FlagError for an advertised URL without host or port; warn of a wildcard address.

    Differs from etcd, which accepts such a URL, and whose members then never find each other.
    Many first attempts with cloud-config end so, because $private_ipv4 was empty.
    """
    host, port = url_address(url)
    if not port:
        raise FlagError(
            f"{settings.where(name)} has port 0 in {url}: nobody could connect to it; advertise the"
            f" port of the -listen flag, which must not be 0 then"
        )
    if not host:
        raise FlagError(
            f"{settings.where(name)} has no host in {url}: nobody could connect to it;"
            f" perhaps $private_ipv4 was empty: write the address of this machine, e.g."
            f" http://10.0.0.5:{port}, or set COREOS_PRIVATE_IPV4 in {ENVIRONMENT_FILE}"
        )
    if host in WILDCARD_HOSTS:
        settings.warn(
            f"{settings.where(name)} has {url}: that is for listening, from another machine nobody"
            f" can connect to it; advertise the address of this one, e.g. {_reachable(url)}"
        )


# -- TLS -------------------------------------------------------------------------


_TLS_PREFIX = {"client": "", "peer": "peer-"}


def check_tls(side: str, files: TlsFiles, urls: Sequence[str]) -> List[Tuple[int, str]]:
    """Return (level, text) of the lines to log about TLS on one side, `client` or `peer`.

    urls  the -listen URLs of that side

    Raises StartError for files that cannot work, or that protect less than their flags promise.
    Source: etcd 2.3 pkg/transport/listener.go, etcdmain/etcd.go.  Differs from etcd 3, which
    skips the checks of names and revocations if client certificates are not required.
    """
    prefix = _TLS_PREFIX[side]
    pair = f"-{prefix}cert-file and -{prefix}key-file"
    cert, key = files.cert_file, files.key_file
    if bool(cert) != bool(key):
        raise StartError(
            f"KeyFile and CertFile must both be present[key: {key}, cert: {cert}]; give both {pair}"
        )
    _check_readable(side, files)
    asks = files.client_cert_auth or files.ca_file
    if (files.crl_file or files.allowed_name or files.allowed_cn) and not asks:
        raise StartError(
            f"revocation lists and allowed names of {side} certificates need"
            f" -{prefix}client-cert-auth: without it no certificate is asked for"
        )
    lines = []
    if cert:
        lines.append((logging.INFO, (
            f"{side}TLS: cert = {cert}, key = {key}, ca = {files.ca_file}, trusted-ca ="
            f" {files.trusted_ca_file}, client-cert-auth = {str(files.client_cert_auth).lower()}"
        )))
    for url in urls:
        if url.startswith("https:") and not cert:
            what = "given listener" if side == "client" else url
            raise StartError(
                f"cannot listen on TLS for {what}: KeyFile and CertFile are not presented; give"
                f" {pair}, or use http in -listen-{side}-urls"
            )
        if url.startswith("http:") and cert:
            lines.append((logging.WARNING, (
                f"The scheme of {side} url {url} is http while {side} key/cert files are"
                f" presented. Ignored {side} key/cert files."
            )))
        elif url.startswith("http:") and asks:
            lines.append((logging.WARNING, (
                f"{side} certificates are not asked for on {url}: that needs https, with {pair}"
            )))
    return lines


def _check_readable(side: str, files: TlsFiles) -> None:
    prefix = _TLS_PREFIX[side]
    for flag, path in (
        (prefix + "cert-file", files.cert_file), (prefix + "key-file", files.key_file),
        (prefix + "ca-file", files.ca_file), (prefix + "trusted-ca-file", files.trusted_ca_file),
        (side + "-crl-file", files.crl_file),
    ):
        try:
            if path:
                open(path, "rb").close()
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise StartError(
                f"open {path}: {reason}; -{flag} must name a file that this user may read"
            ) from None


def make_config(settings: Settings) -> ServerConfig:
    """Return the configuration of the member: each flag fills its field.  Raises FlagError."""
    try:
        check_settings(settings)
    except FlagError as error:
        raise FlagError(f"error verifying flags, {error}") from None
    parts: Dict[str, Dict[str, Any]] = {"": {}, "client_tls": {}, "peer_tls": {}}
    for flag in itertools.chain.from_iterable(FLAGS.values()):
        part, _, field = flag.field.rpartition(".")
        if field:
            parts[part][field] = settings[flag.name]
    config = ServerConfig(
        **parts[""], client_tls=TlsFiles(**parts["client_tls"]),
        peer_tls=TlsFiles(**parts["peer_tls"]),
    )
    initial = config.initial_cluster
    if not initial and not config.discovery and not config.discovery_srv:
        initial = default_initial_cluster(config.name)
    count = config.snapshot_count or DEFAULT_SNAPSHOT_COUNT
    return config._replace(initial_cluster=initial, snapshot_count=count)


# ============================================================================
# life/sources -- Readers of the files of a member, which may be running; they change no file.
# ============================================================================


_STAGE = "member.tmp"               # where a member directory grows until it is complete
_ENTRIES_PER_WRITE = 1_000
_READ_RETRIES = 2                   # a running member may remove or finish a file meanwhile

OnProgress = Callable[[float, int], None]     # share that is done, keys so far (0: as before)


def _step_progress(progress: OnProgress, low: float, high: float) -> OnProgress:
    """Return the progress function of a step that takes the share from `low` to `high`."""
    return lambda share, keys: progress(low + share * (high - low), keys)


class BackupError(Exception):
    """A backup or restore failed.  The text is one line that says what to do."""


class DataSource(NamedTuple):
    """The contents of the files of a member."""

    path: str
    member_id: int                      # 0, as the next, for a snapshot file alone
    cluster_id: int
    snapshot: Optional[Snapshot]
    hard_state: HardState
    entries: List[Entry]                # after the snapshot
    committed: int                      # how many of them are known to be committed

    @property
    def last(self) -> EntryID:
        """The last entry that is known to be committed."""
        last = self.entries[self.committed - 1] if self.committed else self.snapshot or Snapshot()
        return EntryID(last.term, last.index)

    @property
    def voters(self) -> Set[int]:
        """The voters after the last committed entry."""
        before = self.snapshot.voters if self.snapshot else ()
        return _voters(before, self.entries[:self.committed])


class CopyReport(NamedTuple):
    """The result of backup() or restore(), or of their dry run."""

    source: DataSource
    etcd_index: int
    keys: int
    size_bytes: int                     # of the new snapshot file and entries
    member_id: int                      # the new ids
    cluster_id: int
    members: Tuple[Member, ...]         # of the new cluster, those of the source in a backup
    paths: Tuple[str, ...]              # data directory, dedicated wal directory

    def lines(self) -> List[str]:
        source, last = self.source, self.source.last
        left_out = len(source.entries) - source.committed
        identity = "a snapshot file, without ids"
        if source.member_id:
            identity = f"member {source.member_id:x} of cluster {source.cluster_id:x}"
        members = ", ".join(
            f"{member.name or '(unnamed)'}={','.join(member.peer_urls)} ({member.id:x})"
            for member in self.members
        )
        return [
            f"source:      {source.path}: {identity}",
            f"raft:        term {last.term}, index {last.index}",
            f"left out:    {left_out} entries that are not known to be committed",
            f"etcd index:  {self.etcd_index}",
            f"keys:        {self.keys:,} in {self.size_bytes:,} bytes",
            f"members:     {members or 'none'}",
            f"new ids:     member {self.member_id:x}, cluster {self.cluster_id:x}",
            f"target:      {', '.join(self.paths)}",
        ]

    def summary(self) -> str:
        left_out = len(self.source.entries) - self.source.committed
        return (
            f"{self.paths[0]}: member {self.member_id:x} of cluster {self.cluster_id:x},"
            f" {self.keys:,} keys, etcd index {self.etcd_index}, raft index"
            f" {self.source.last.index}, {left_out} uncommitted entries left out"
        )


class ReadOnlyDisk(OsDisk):
    """The files of a member that may be running: it takes no lock and changes no file.

    Files of a member in this process are refused (FileLocked), as closing one frees its lock.
    """

    read_only = True

    def open_append(self, path: str) -> int:
        return os.open(path, os.O_RDONLY)

    def lock(self, path: str, handle: int) -> bool:
        return True

    def unlock(self, path: str) -> None:
        pass


_READ_ONLY_DISK = ReadOnlyDisk()


class _AnyVersionCluster(Cluster):
    """Members of a cluster whose version may be newer than this program."""

    @staticmethod
    def _check_version(version: str) -> None:
        pass


# -- reading ---------------------------------------------------------------------


def read_source(path: str, wal_dir: str = "") -> DataSource:
    """Read a snapshot file, or the newest snapshot of a data directory and the log after it.

    Raises BackupError.
    """
    if os.path.isfile(path):
        try:
            return DataSource(path, 0, 0, _read_snapshot(path), HardState(), [], 0)
        except OSError as error:
            raise BackupError(f"cannot read {path}: {error}; check who may read it") from None
    if not os.path.isdir(path):
        raise BackupError(f"{path} does not exist; name a snapshot file or a data directory")
    member = os.path.join(path, "member")
    member = member if os.path.isdir(member) else path      # as etcd 2.0.0 has it
    wal_dir = wal_dir or os.path.join(member, "wal")
    snap_dir = os.path.join(member, "snap")
    try:
        for _ in range(_READ_RETRIES):
            with contextlib.suppress(WalError, CodecError, FileNotFoundError):
                return _read_member(path, wal_dir, snap_dir)
        return _read_member(path, wal_dir, snap_dir)
    except FileLocked:
        raise BackupError(
            f"{path} belongs to a member in this process; use GET /v2/snapshot"
        ) from None
    except (WalError, CodecError) as error:
        intact = _newest_intact(snap_dir)
        advice = f"; or restore {intact}, without what came after it" if intact else ""
        raise BackupError(f"{error}{advice}") from error
    except OSError as error:
        raise BackupError(f"cannot read {path}: {error}; run this as the member's user") from error


def _read_member(path: str, wal_dir: str, snap_dir: str) -> DataSource:
    if not Wal.exists(wal_dir, disk=_READ_ONLY_DISK):
        raise BackupError(
            f"{path} is no data directory of a member: {wal_dir} holds no log; if the log is"
            f" elsewhere, name its directory in `pyetcd backup -wal-dir`"
        )
    known = set(Wal.snapshots(wal_dir, disk=_READ_ONLY_DISK))
    Snapshotter(snap_dir, disk=_READ_ONLY_DISK).check_log(wal_dir, known)
    snapshot = _newest_snapshot(snap_dir, known)
    start = EntryID(snapshot.term, snapshot.index) if snapshot else EntryID(0, 0)
    wal, contents = Wal.open(wal_dir, start, disk=_READ_ONLY_DISK)
    wal.close()
    member_id, cluster_id = decode_metadata(contents.metadata)
    entries, state = contents.entries, contents.hard_state
    committed = sum(entry.index <= state.commit for entry in entries)
    return with_lone_commits(
        DataSource(path, member_id, cluster_id, snapshot, state, entries, committed))


def with_lone_commits(source: DataSource) -> DataSource:
    """Return `source` with the entries that a member alone has committed without writing so."""
    member_id, committed, entries = source.member_id, source.committed, source.entries
    if source.voters == {member_id}:
        # A single member commits each entry that is on its disk, and writes the commit index later.
        following = itertools.takewhile(
            lambda entry: entry.type == EntryType.NORMAL, entries[committed:]
        )
        source = source._replace(committed=committed + sum(1 for _ in following))
    return source


def _newest_snapshot(directory: str, known: Container[EntryID]) -> Optional[Snapshot]:
    """Return the newest snapshot in `known`.  Raises BackupError if it is damaged."""
    for name in reversed(_READ_ONLY_DISK.listdir(directory)):
        match = _SNAP_NAME.fullmatch(name)
        if match and EntryID(int(match.group(1), 16), int(match.group(2), 16)) in known:
            return _read_snapshot(os.path.join(directory, name))
    return None


def _read_snapshot(path: str) -> Snapshot:
    """Read a snapshot file.  Raises BackupError, which names an older good file, if any."""
    content = _READ_ONLY_DISK.read(path)
    try:
        return decode_snapshot_file(content)
    except CodecError as error:
        if not _SNAP_NAME.fullmatch(os.path.basename(path)):
            raise BackupError(
                f"{path} is damaged or no snapshot of etcd 2: {_file_kind_advice(path, content)}"
            ) from None
        older = _newest_intact(os.path.dirname(path))
        advice = f"{older} is intact: move the damaged one away, or restore from that"
        raise BackupError(
            f"{path} is damaged ({error}); {advice if older else 'take one of another member'}"
        ) from None


def _file_kind_advice(path: str, content: bytes) -> str:
    """Return the kind of a file that is no snapshot, and what to name instead."""
    advice = "take one with GET /v2/snapshot, or name a file of member/snap or a data directory"
    if content[16:20] in (b"\xed\xda\x0c\xed", b"\xed\x0c\xda\xed"):
        return f"it is a database of etcd 3, which holds no keys of v2; {advice}"
    if content[:2] == b"\x1f\x8b":
        return f"it is compressed; run `gunzip` on it first, or {advice}"
    if path.endswith(".wal"):
        return "it is a piece of a log; name its data directory, two directories above"
    if content[:1] in (b"{", b"["):
        return f"it is JSON; `pyetcdctl import` reads what export has written; or {advice}"
    if not content:
        return f"it is empty; {advice}"
    return advice


def _newest_intact(directory: str) -> str:
    """Return the path of the newest good snapshot in a directory, or ""."""
    for name in reversed(_READ_ONLY_DISK.listdir(directory or ".")):
        path = os.path.join(directory, name)
        if _SNAP_NAME.fullmatch(name):
            with contextlib.suppress(CodecError, OSError):
                decode_snapshot_file(_READ_ONLY_DISK.read(path))
                return path
    return ""


def load_state(source: DataSource, progress: OnProgress) -> Tuple[Store, Cluster]:
    """Return store and cluster as of source.last.  Raises BackupError."""
    store = Store()
    if not source.last.index:
        raise BackupError(f"{source.path} holds no data yet; name one of a member that has run")
    cluster = _AnyVersionCluster("", store)
    applier = Applier(store, cluster, source.member_id, SYSTEM_CLOCK.wall_ns)
    try:
        if source.snapshot is not None:
            store.recover(source.snapshot.data, _step_progress(progress, 0.0, 0.8))
            cluster.recover()
        for number, entry in enumerate(source.entries[:source.committed]):
            if entry.type == EntryType.NORMAL:
                applier.apply_entry(entry)
                entry.request = None
            else:
                applier.apply_conf_change(decode_conf_change(entry.data))
            if not number % _ENTRIES_PER_WRITE:
                progress(0.8 + 0.2 * number / source.committed, 0)
    except ValueError as error:         # CodecError is one
        raise BackupError(
            f"{source.path} does not hold the state of a v2 store ({error}); take a snapshot or"
            f" data directory of another member"
        ) from None
    return store, cluster


# ============================================================================
# life/backup -- Backup and restore: the data of a member as files, and a new cluster from them.
# ============================================================================


# -- writing ---------------------------------------------------------------------


class MemberFiles(NamedTuple):
    """The files that a member starts with."""

    member_id: int
    cluster_id: int
    snapshot: Optional[SnapshotFile]
    hard_state: HardState
    entries: Sequence[Entry]


def check_target(data_dir: str, wal_dir: str = "") -> None:
    """Raise BackupError unless both directories are empty or absent."""
    for path in filter(None, (data_dir, wal_dir)):
        try:
            found = set(os.listdir(path)) - {_STAGE}
        except FileNotFoundError:
            continue
        except OSError as error:
            raise BackupError(f"cannot use {path}: {error.strerror}; name another") from None
        if found:
            raise BackupError(f"{path} is not empty; name another directory, or move it away")


def write_member(data_dir: str, wal_dir: str, files: MemberFiles, progress: OnProgress) -> None:
    """Make a data directory, durably; `member` appears in it when all files are complete.

    Raises BackupError, and removes all new files then.
    """
    stage = os.path.join(data_dir, _STAGE)
    wal_stage = os.path.join(wal_dir or stage, _STAGE if wal_dir else "wal")
    begun = [path for path in (data_dir, wal_dir) if path and not os.path.exists(path)]
    with contextlib.ExitStack() as on_failure:
        for path in (stage, wal_stage, *begun):
            on_failure.callback(shutil.rmtree, path, ignore_errors=True)
        try:
            for path in (stage, wal_stage):
                shutil.rmtree(path, ignore_errors=True)
            _fill_stage(stage, wal_stage, files, progress)
            if wal_dir:
                # The log first: a start refuses a log without its snapshot, but would pass over a
                # snapshot that its log does not know.
                for name in os.listdir(wal_stage):
                    os.rename(os.path.join(wal_stage, name), os.path.join(wal_dir, name))
                os.rmdir(wal_stage)
                fsync_dir(wal_dir)
            os.rename(stage, os.path.join(data_dir, "member"))
            fsync_dir(data_dir)
            for path in begun:
                with contextlib.suppress(PermissionError):  # a parent that this user cannot read
                    fsync_dir(os.path.dirname(os.path.abspath(path)))
        except (OSError, DiskFull) as error:
            raise BackupError(
                f"cannot write {data_dir}: {error}; make room and check who may write there"
            ) from error
        on_failure.pop_all()


def _fill_stage(stage: str, wal_stage: str, files: MemberFiles, progress: OnProgress) -> None:
    """Write all files.  The entries come first in the log, as etcdctl writes it."""
    snap = os.path.join(stage, "snap")
    for path in (os.path.dirname(stage), stage, snap, os.path.dirname(wal_stage)):
        os.makedirs(path, mode=0o700, exist_ok=True)
    snapshot = files.snapshot
    if snapshot is not None:
        Snapshotter(snap).write(snapshot)
        _write_bolt(os.path.join(snap, "db"), snapshot.id.index)
    metadata = encode_metadata(files.member_id, files.cluster_id)
    wal = Wal.create(wal_stage, metadata, segment_bytes=UINT64_MAX)
    try:
        for first in range(0, len(files.entries), _ENTRIES_PER_WRITE):
            part = files.entries[first:first + _ENTRIES_PER_WRITE]
            wal.write(wal.encode(None, part), sync=False)
            progress(first / len(files.entries), 0)
        wal.write(wal.encode(files.hard_state, ()), sync=False)
        if snapshot is not None:
            wal.write(wal.encode_snapshot(snapshot.id), sync=False)
        wal.write(b"", sync=True)
    finally:
        wal.close()
    for path in (snap, wal_stage, stage):
        fsync_dir(path)


def _write_bolt(path: str, raft_index: int) -> None:
    """Write the database that etcd 3 wants beside a snapshot: without a key, up to raft_index."""
    with open(path, "w+b") as file:
        write_bolt(file, v3_buckets(raft_index))
        file.flush()
        OS_DISK.fsync(file.fileno())


# -- backup and restore ------------------------------------------------------------


def _no_progress(share: float, keys: int) -> None:
    pass


def backup(
    data_dir: str, backup_dir: str, *, wal_dir: str = "", backup_wal_dir: str = "",
    dry_run: bool = False, progress: OnProgress = _no_progress,
) -> CopyReport:
    """Copy the data of a member, which may be running, under new ids, as `etcdctl backup` does.

    The copy is for a start with -force-new-cluster.  It has the snapshot and log of the source,
    with all indexes and member changes, but without uncommitted entries.
    progress is called with the share that is done, 0.0 to 1.0, and a number of keys.
    Raises BackupError.  Source: etcd 2.3 etcdctl/command/backup_command.go.
    """
    if not os.path.isdir(data_dir):
        what = "is a file" if os.path.exists(data_dir) else "does not exist"
        raise BackupError(
            f"{data_dir} {what}; name the data directory of a member, which its log shows as `data"
            f" dir =`, with -data-dir; a snapshot file is for `pyetcd restore`"
        )
    backup_wal_dir = _dedicated_wal_dir(backup_dir, backup_wal_dir)
    check_target(backup_dir, backup_wal_dir)
    source = read_source(data_dir, wal_dir)
    store, cluster = load_state(source, _step_progress(progress, 0.0, 0.7))
    file: Optional[SnapshotFile] = None
    if source.snapshot is not None:
        data, start = encode_snapshot(source.snapshot), source.snapshot
        file = SnapshotFile(EntryID(start.term, start.index), (data,), len(data), crc32c(data))
    entries = source.entries[:source.committed]
    new_ids = secrets.randbits(63) + 1, secrets.randbits(63) + 1
    state = source.hard_state._replace(commit=source.last.index)
    report = CopyReport(
        source, store.current_index, store.count_files("/1"),
        (file.size if file else 0) + sum(len(entry.data or b"") for entry in entries), *new_ids,
        tuple(sorted(cluster.members.values())),
        tuple(filter(None, (backup_dir, backup_wal_dir))),
    )
    if not dry_run:
        files = MemberFiles(*new_ids, file, state, entries)
        write_member(backup_dir, backup_wal_dir, files, _step_progress(progress, 0.7, 1.0))
    return report


def restore(
    source: str, name: str = DEFAULT_NAME, *, initial_cluster: str = "",
    initial_cluster_token: str = DEFAULT_CLUSTER_TOKEN,
    initial_advertise_peer_urls: Sequence[str] = (), data_dir: str = "", wal_dir: str = "",
    dry_run: bool = False, progress: OnProgress = _no_progress,
) -> CopyReport:
    """Make the data directory of member `name` of a new cluster, which starts with old data.

    source  a snapshot file, or a data directory, of which the committed entries count

    Call it for each member, with the same source.  Keys keep their indexes and expiry times, and
    users and roles are kept.  The members are those given, with new ids; the new cluster knows no
    old id.  progress is called as by backup().  Raises BackupError.
    """
    data_dir = data_dir or name + ".etcd"
    wal_dir = _dedicated_wal_dir(data_dir, wal_dir)
    check_target(data_dir, wal_dir)
    cluster, own = _restored_cluster(ServerConfig(
        name=name, initial_cluster=initial_cluster, initial_cluster_token=initial_cluster_token,
        initial_advertise_peer_urls=tuple(initial_advertise_peer_urls),
    ))
    found = read_source(source)
    if found.voters & cluster.members.keys():
        raise BackupError(
            f"the new members would have ids of the old ones, and mix with them; name another"
            f" -initial-cluster-token than {initial_cluster_token}"
        )
    store, _ = load_state(found, _step_progress(progress, 0.0, 0.6))
    members = tuple(sorted(cluster.members.values()))
    _replace_members(store, members)
    job = SnapshotJob(store, found.last, tuple(member.id for member in members), SYSTEM_CLOCK.now)
    keys, expected = store.count_files("/1"), len(found.snapshot.data) if found.snapshot else 0
    while job.done is None:
        job.work()
        progress(0.6 + 0.3 * min(job.walked_bytes / (expected or job.walked_bytes), 1.0), keys)
    report = CopyReport(
        found, store.current_index, keys, job.done.size, own.id, cluster.id, members,
        tuple(filter(None, (data_dir, wal_dir))),
    )
    if not dry_run:
        state = HardState(found.last.term, 0, found.last.index)
        files = MemberFiles(own.id, cluster.id, job.done, state, ())
        write_member(data_dir, wal_dir, files, _step_progress(progress, 0.9, 1.0))
    return report


def _dedicated_wal_dir(data_dir: str, wal_dir: str) -> str:
    """Return wal_dir, or "" if it is the usual directory of the log."""
    usual = os.path.join(data_dir, "member", "wal")
    return "" if os.path.abspath(wal_dir) == os.path.abspath(usual) else wal_dir


def _restored_cluster(config: ServerConfig) -> Tuple[Cluster, Member]:
    """Return the new cluster and its member config.name.  Raises BackupError."""
    advertised = config.initial_advertise_peer_urls
    if not advertised and not config.initial_cluster:
        config = config._replace(initial_advertise_peer_urls=parse_urls(DEFAULT_PEER_URLS))
    try:
        initial = _initial_members(config)
        if advertised:
            _check_advertised(config, initial)
        return _new_cluster(config, config.initial_cluster_token, initial)
    except StartError as error:
        raise BackupError(str(error)) from None


def _replace_members(store: Store, members: Sequence[Member]) -> None:
    """Replace the members in the store, and drop a cluster version above this program's."""
    files = {
        f"/0/members/{format_id(member.id)}/raftAttributes": member.raft_attributes_json()
        for member in members
    }
    version = store.value("/0/version") or ""
    with contextlib.suppress(ValueError):
        if DEFAULT_IDENTITY.bears(version):
            files["/0/version"] = version
    store.replace_files("/0", files)


# ============================================================================
# life/inspection -- What a data directory holds, read offline and without a change to it.
# ----------------------------------------------------------------------------
# Reads directories of etcd 2.0 to 3.7 and of pyetcd.  A damaged directory is read as far as it goes.
# ============================================================================


_ENTRIES_PER_STEP = 1_000           # between two calls of progress


class Database(NamedTuple):
    """What the database of etcd 3 beside the snapshots says about itself."""

    path: str
    fault: str                      # why it cannot be read; ""
    consistent_index: int           # raft index up to which it holds what was applied
    storage_version: str            # "3.6.0"; "" before etcd 3.6
    members: int                    # so many in it; 0 before etcd 3.5
    keys: int                       # revisions of keys of v3


class CommandEntry(NamedTuple):
    """An entry behind the snapshot that holds a command of v2."""

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    committed: bool
    request: Request


class Inspection(NamedTuple):
    """A data directory, as far as it could be read."""

    source: DataSource
    snap_dir: str
    faults: Tuple[str, ...]         # what is damaged or missing, each with what it means
    segments: Tuple[Tuple[str, int], ...]   # name, bytes
    snapshot_files: Tuple[str, ...]
    snapshot_name: str              # of the file that counts; ""
    voters_recorded: bool           # the log names the voters of that snapshot
    commands: Tuple[CommandEntry, ...]
    v3_entries: int                 # behind the snapshot
    changes: int                    # of members, likewise
    database: Optional[Database]
    store: Store                    # after the last committed entry that could be applied
    snapshot_paths: Tuple[str, ...]     # files and empty directories in the snapshot, not hidden
    snapshot_etcd_index: int        # nodes with a higher index were written by the log
    cluster: Cluster
    applied_at: Tuple[Tuple[int, int], ...]     # (store index, raft index) of entries, ascending

    @property
    def cluster_version(self) -> str:
        """The version that all members had, "2.3.0"; "" if it was never decided."""
        return self.store.value("/0/version") or ""

    @property
    def received_database(self) -> bool:
        """True if a database that came with the snapshot waits to replace the present one."""
        snapshot, snap_dir = self.source.snapshot, self.snap_dir
        return snapshot is not None and os.path.exists(
            os.path.join(snap_dir, f"{snapshot.index:016x}.snap.db"))

    @property
    def is_v3(self) -> bool:
        """True if etcd 3 has written here."""
        return self.database is not None or self.v3_entries > 0

    def place(self, modified_index: int) -> int:
        """Return the raft index of the entry that wrote a node last; 0: it is in the snapshot."""
        if modified_index <= self.snapshot_etcd_index:
            return 0
        at = bisect.bisect_left(self.applied_at, (modified_index, 0))
        return self.applied_at[at][1] if at < len(self.applied_at) else 0


def inspect_dir(path: str, wal_dir: str, progress: OnProgress) -> Inspection:
    """Read a data directory.  Raises BackupError if it is none, or may not be read."""
    if not os.path.isdir(path):
        what = "is a file" if os.path.exists(path) else "does not exist"
        raise BackupError(f"{path} {what}; name the data directory of a member")
    member = os.path.join(path, "member")
    member = member if os.path.isdir(member) else path      # as etcd 2.0.0 has it
    wal_dir, snap_dir = wal_dir or os.path.join(member, "wal"), os.path.join(member, "snap")
    try:
        return _inspect(path, wal_dir, snap_dir, progress)
    except FileLocked:
        raise BackupError(f"{path} belongs to a member in this process; stop it first") from None
    except OSError as error:
        raise BackupError(f"cannot read {path}: {error}; run this as the member's user") from error


def _inspect(path: str, wal_dir: str, snap_dir: str, progress: OnProgress) -> Inspection:
    if not Wal.exists(wal_dir, disk=_READ_ONLY_DISK):
        raise BackupError(
            f"{path} is no data directory of a member: {wal_dir} holds no log; if the log is"
            f" elsewhere, name its directory with -wal-dir"
        )
    faults: List[str] = []
    known = set(Wal.snapshots(wal_dir, disk=_READ_ONLY_DISK))
    try:
        Snapshotter(snap_dir, disk=_READ_ONLY_DISK).check_log(wal_dir, known)
    except WalError as error:
        faults.append(str(error))
    snapshot, name = _newest_intact_snapshot(snap_dir, known, faults)
    start = EntryID(snapshot.term, snapshot.index) if snapshot else EntryID(0, 0)
    contents, damage = Wal.read_until_damage(wal_dir, start, disk=_READ_ONLY_DISK)
    if damage:
        last = contents.entries[-1].index if contents.entries else start.index
        faults.append(f"{damage}; the log is read up to entry {last}")
    source = _source(path, snapshot, contents, faults)
    state = _Replay(source, faults, progress)
    segments = [n for n in _READ_ONLY_DISK.listdir(wal_dir) if _WAL_NAME.fullmatch(n)]
    return Inspection(
        source, snap_dir, tuple(faults),
        tuple((n, os.path.getsize(os.path.join(wal_dir, n))) for n in segments),
        tuple(filter(_SNAP_NAME.fullmatch, _READ_ONLY_DISK.listdir(snap_dir))), name,
        start in Wal.voters_recorded(wal_dir, disk=_READ_ONLY_DISK),
        tuple(state.commands), state.v3_entries, state.changes,
        _read_database(os.path.join(snap_dir, "db")), state.store,
        state.snapshot_paths, state.snapshot_etcd_index, state.cluster, tuple(state.applied_at),
    )


def _newest_intact_snapshot(
    directory: str, known: Container[EntryID], faults: List[str]
) -> Tuple[Optional[Snapshot], str]:
    """Return the newest intact snapshot that the log knows, and the name of its file."""
    for name in reversed(_READ_ONLY_DISK.listdir(directory)):
        match = _SNAP_NAME.fullmatch(name)
        if not match or EntryID(int(match.group(1), 16), int(match.group(2), 16)) not in known:
            continue
        try:
            content = _READ_ONLY_DISK.read(os.path.join(directory, name))
            return decode_snapshot_file(content), name
        except CodecError as error:
            faults.append(f"{os.path.join(directory, name)} is damaged ({error}), so the one before"
                          " counts")
    return None, ""


def _source(
    path: str, snapshot: Optional[Snapshot], contents: WalContents, faults: List[str]
) -> DataSource:
    member_id = cluster_id = 0
    try:
        member_id, cluster_id = decode_metadata(contents.metadata)
    except CodecError as error:
        faults.append(f"the log does not say whose it is ({error})")
    commit = contents.hard_state.commit
    committed = sum(entry.index <= commit for entry in contents.entries)
    source = DataSource(path, member_id, cluster_id, snapshot, contents.hard_state,
                        contents.entries, committed)
    with contextlib.suppress(CodecError):
        source = with_lone_commits(source)
    return source


class _Replay:
    """Applies snapshot and entries, and notes which entry gave the store which index."""

    def __init__(self, source: DataSource, faults: List[str], progress: OnProgress) -> None:
        self.store = Store()
        self.cluster: Cluster = _AnyVersionCluster("", self.store)
        self.commands: List[CommandEntry] = []
        self.v3_entries = self.changes = 0
        self.applied_at: List[Tuple[int, int]] = []
        self._applier = Applier(self.store, self.cluster, source.member_id, SYSTEM_CLOCK.wall_ns)
        try:
            if source.snapshot is not None:
                self.store.recover(source.snapshot.data,
                                   lambda share, keys: progress(0.8 * share, keys))
                self.cluster.recover()
        except ValueError as error:
            faults.append(f"the snapshot at index {source.snapshot and source.snapshot.index}"
                          f" holds no state of a v2 store ({error})")
        self.snapshot_etcd_index = self.store.current_index
        self.snapshot_paths = tuple(
            path for space in ("/1", "/2") for path, node in self.store.nodes_below(space)
            if not node.children and "/_" not in path)
        for number, entry in enumerate(source.entries):
            if not number % _ENTRIES_PER_STEP:
                progress(0.8 + 0.2 * number / len(source.entries), 0)
            self._take(entry, number < source.committed, faults)

    def _take(self, entry: Entry, committed: bool, faults: List[str]) -> None:
        try:
            if entry.type != EntryType.NORMAL:
                self.changes += 1
                if committed:
                    self._applier.apply_conf_change(decode_conf_change(entry.data))
            elif entry.data:
                self._take_command(entry, committed)
        except ValueError as error:     # CodecError is one
            faults.append(f"entry {entry.index} cannot be applied: {error}")
        if committed:
            self.applied_at.append((self.store.current_index, entry.index))

    def _take_command(self, entry: Entry, committed: bool) -> None:
        request = read_command(entry.data)
        if request is None:
            self.v3_entries += 1
            return
        self.commands.append(CommandEntry(entry.index, committed, request))
        if committed:
            self._applier.apply_request(request)


def _read_database(path: str) -> Optional[Database]:
    """Return what the database says, or None if there is none."""
    if not os.path.exists(path):
        return None
    try:
        with BoltReader(path) as reader:
            meta = dict(reader.items(b"meta"))
            keys = sum(1 for _ in reader.items(b"key"))
            members = sum(1 for _ in reader.items(b"members"))
    except (BoltError, OSError) as error:
        return Database(path, str(error), 0, "", 0, 0)
    index = int.from_bytes(meta.get(b"consistent_index", b""), "big")
    version = meta.get(b"storageVersion", b"").decode("utf-8", "replace")
    return Database(path, "", index, version, members, keys)


# ============================================================================
# life/records -- Keys on their way between clusters: read from a directory, a cluster or a file; written to one.
# ----------------------------------------------------------------------------
# A file is what `pyetcdctl export` writes too, a record a line; a shell script for etcdctl of etcd 3;
# or a database that `etcdctl snapshot restore` of etcd 3 takes.  All is read and written record by
# record, so big data costs no more memory than its largest directory or what a member holds anyhow.
# ============================================================================


EXPORT_VERSION = 1                  # of the form with a record a line
COPY_BYTES = 1 << 20
ARGUMENT_BYTES_MAX = 1 << 16        # of a value on a command line; a longer one comes by a pipe
_LEASE_FIRST = 1 << 40              # ids of the leases that are made here
_REVISION_FIRST = 2                 # of the first key; 1 is that of an empty store


class Record(NamedTuple):
    """A node: value is None for a directory, expires_ns 0 for a permanent one."""

    key: str
    value: Optional[str]
    expires_ns: int

    def ttl_s(self, now_ns: int) -> int:
        """Return the seconds left, at least 1; 0 if permanent, -1 if it has expired."""
        if not self.expires_ns:
            return 0
        left = -((now_ns - self.expires_ns) // NS)
        return left if left > 0 else -1


Records = Iterable[Record]
KeyMap = List[Tuple[str, str]]      # prefix -> its replacement, the longest first


def parse_key_map(text: str) -> KeyMap:
    """Read `/old=/new,/other=`.  Raises ValueError."""
    pairs = []
    for part in filter(None, text.split(",")):
        old, separator, new = part.partition("=")
        if not separator or not old:
            raise ValueError(f"{part} is not OLD=NEW, a prefix of keys and what replaces it")
        pairs.append((old, new))
    return sorted(pairs, key=lambda pair: -len(pair[0]))


def mapped(key: str, key_map: KeyMap) -> str:
    """Return `key` with the longest prefix of the map that fits replaced: of whole parts only."""
    for old, new in key_map:
        if key == old or key.startswith(old if old.endswith("/") else old + "/"):
            return new + key[len(old):]
    return key


# -- sources


def records_of_store(store: Store) -> Iterator[Record]:
    """Yield the nodes of users' keys, parents first."""
    for path, node in store.nodes_below("/1"):
        yield Record(path[2:], node.value if node.children is None else None, node.expires_ns)


def records_of_file(file: TextIO, path: str) -> Iterator[Record]:
    """Yield the records of a JSON file, a line each.  Raises BackupError."""
    if not file.readline().startswith('{"pyetcd_export"'):
        raise BackupError(
            f"{path} does not begin as `pyetcd export` and `pyetcdctl export` write; other JSON,"
            " like an answer of the keys API, is read by `pyetcdctl import`"
        )
    for number, line in enumerate(file, 2):
        text = line.strip().rstrip(",")
        if text == "]}":
            return
        try:
            raw = load_json(text)
            expiration = raw.get("expiration")
            value = None if raw.get("dir") else raw["value"]
            if not isinstance(raw["key"], str) or not isinstance(value, (str, type(None))):
                raise ValueError("key and value are text")
            yield Record(raw["key"], value, parse_time(expiration) if expiration else 0)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BackupError(f"{path}, line {number}: no record of an export: {error}") from None
    raise BackupError(f"{path} is cut: its last line, ]}}, is missing")


def records_of_database(
    path: str, skipped: Callable[[bytes, str], None], now_ns: int
) -> Iterator[Record]:
    """Yield the present keys of a database of etcd 3: a snapshot, or member/snap/db.

    skipped is called with keys that v2 cannot hold, and why.  Takes 30 bytes and the key in
    memory for each key.  Raises BackupError.
    """
    try:
        with BoltReader(path) as reader:
            newest, expires = _newest_revisions(reader), _lease_ends(reader, now_ns)
            for revision, data in reader.items(b"key"):
                key, value, lease = _key_value(data)
                if newest.get(key) != revision:
                    continue
                try:
                    yield Record(_v2_key(key), value.decode("utf-8"), expires.get(lease, 0))
                except ValueError as error:
                    skipped(key, str(error))
    except (BoltError, CodecError) as error:
        raise BackupError(f"{path} cannot be read: {error}") from None
    except OSError as error:
        raise BackupError(f"cannot read {path}: {error}") from None


def _newest_revisions(reader: BoltReader) -> Dict[bytes, bytes]:
    """Return key -> its newest revision, of keys that are not deleted."""
    newest: Dict[bytes, bytes] = {}
    for revision, data in reader.items(b"key"):
        key = _key_value(data)[0]
        if len(revision) == 17:
            newest[key] = revision
        else:                           # a mark of deletion: 17 bytes and "t"
            newest.pop(key, None)
    return newest


def _lease_ends(reader: BoltReader, now_ns: int) -> Dict[int, int]:
    """Return lease -> unix nanoseconds: of the whole time, as after a restart of etcd 3."""
    ends: Dict[int, int] = {}
    for _, data in reader.items(b"lease"):
        fields = {number: value for number, _, value in decode_fields(data)}
        lease, ttl_s = fields.get(1), fields.get(2)
        if isinstance(lease, int) and isinstance(ttl_s, int):
            ends[lease] = now_ns + ttl_s * NS
    return ends


def _key_value(data: bytes) -> Tuple[bytes, bytes, int]:
    """Return key, value and lease of a mvccpb.KeyValue.  Raises CodecError."""
    fields: Dict[int, Any] = {number: value for number, _, value in decode_fields(data)}
    key, value, lease = fields.get(1, b""), fields.get(5, b""), fields.get(6, 0)
    if isinstance(key, int) or isinstance(value, int) or not isinstance(lease, int):
        raise CodecError("not a key of etcd 3")
    return bytes(key), bytes(value), lease


def _v2_key(key: bytes) -> str:
    text = key.decode("utf-8")
    if not text.strip("/") or "//" in text or text.endswith("/"):
        raise ValueError("v2 cannot hold a key with an empty part")
    if {".", ".."} & set(text.split("/")):
        raise ValueError("v2 cannot hold a key with the part . or ..")
    return text if text.startswith("/") else "/" + text


# -- targets


def write_json(records: Records, file: TextIO, etcd_index: int) -> int:
    """Write the form of `pyetcdctl export`; return the number of keys."""
    file.write(f'{{"pyetcd_export": {EXPORT_VERSION}, "key": "/", "etcdIndex": {etcd_index},'
               ' "nodes": [\n')
    keys, previous = 0, ""
    for record in records:
        if previous:
            file.write(previous + ",\n")
        content = '"dir": true' if record.value is None else f'"value": {json_string(record.value)}'
        expiration = (f', "expiration": "{format_time(record.expires_ns)}"'
                      if record.expires_ns else "")
        previous = f'{{"key": {json_string(record.key)}, {content}{expiration}}}'
        keys += record.value is not None
    file.write(previous + "\n" * bool(previous) + "]}\n")
    return keys


def write_script(records: Records, file: TextIO, *, leases: bool, now_ns: int) -> int:
    """Write a script of etcdctl commands for etcd 3; return the number of keys.

    leases  True: a key with a time to live gets a lease of what is left; False: it is permanent
    """
    file.write("#!/bin/sh\n# Keys of etcd v2, written by pyetcd export.  Endpoints and access come"
               " from ETCDCTL_... variables.\nset -e\nexport ETCDCTL_API=3\n")
    keys = 0
    for record in records:
        ttl_s = record.ttl_s(now_ns)
        if record.value is None or ttl_s < 0:
            continue
        option = ""
        if leases and ttl_s:
            file.write(f"lease=$(etcdctl lease grant {ttl_s} | cut -d' ' -f2)\n")
            option = '--lease="$lease" '
        key, value = shlex.quote(record.key), shlex.quote(record.value)
        if len(record.value) <= ARGUMENT_BYTES_MAX // 4:
            file.write(f"etcdctl put {option}-- {key} {value} >/dev/null\n")
        else:                           # printf is a part of the shell: no limit of arguments
            file.write(f"printf %s {value} | etcdctl put {option}-- {key} >/dev/null\n")
        keys += 1
    return keys


def write_database(records: Records, path: str, *, leases: bool, now_ns: int) -> int:
    """Write a snapshot of etcd 3 with these keys, each at a revision of its own; return how many.

    `etcdctl snapshot restore` checks the digest at its end.  Raises OSError.
    """
    counted = _V3Keys(records, leases, now_ns)
    buckets = {**v3_buckets(0), b"key": counted.keys(), b"lease": counted.lease_items()}
    with open(path, "w+b") as file:
        write_bolt(file, buckets)
        file.seek(0)
        _append_digest(file)
        file.flush()
        os.fsync(file.fileno())
    return counted.count


def _append_digest(file: BinaryIO) -> None:
    digest = hashlib.sha256()
    for block in iter(lambda: file.read(COPY_BYTES), b""):
        digest.update(block)
    file.write(digest.digest())


class _V3Keys:
    """Items of the buckets of keys and leases; the second is to be asked for after the first."""

    def __init__(self, records: Records, leases: bool, now_ns: int) -> None:
        self.count = 0
        self._records = records
        self._with_leases = leases
        self._now_ns = now_ns
        self._leases: List[int] = []    # seconds of each

    def keys(self) -> Iterator[Tuple[bytes, bytes]]:
        for record in self._records:
            ttl_s = record.ttl_s(self._now_ns)
            if record.value is None or ttl_s < 0:
                continue
            lease = 0
            if self._with_leases and ttl_s:
                lease = _LEASE_FIRST + len(self._leases)
                self._leases.append(ttl_s)
            revision = _REVISION_FIRST + self.count
            self.count += 1
            yield (revision.to_bytes(8, "big") + b"_" + bytes(8),
                   _encode_key_value(record.key.encode(), record.value.encode(), revision, lease))

    def lease_items(self) -> Iterator[Tuple[bytes, bytes]]:
        for number, ttl_s in enumerate(self._leases, _LEASE_FIRST):
            yield (number.to_bytes(8, "big"),
                   b"\x08" + encode_varint(number) + b"\x10" + encode_varint(ttl_s))


def _encode_key_value(key: bytes, value: bytes, revision: int, lease: int) -> bytes:
    """Return a mvccpb.KeyValue, created at `revision` and not changed since."""
    number = encode_varint(revision)
    data = b"\x0a%b%b\x10%b\x18%b\x20\x01\x2a%b%b" % (
        encode_varint(len(key)), key, number, number, encode_varint(len(value)), value)
    return data + b"\x30" + encode_varint(lease) if lease else data


# ============================================================================
# life/exchange -- Export and import: keys of v2 out of a directory or a cluster, and into a cluster.
# ============================================================================


CALL_SECONDS = 60.0                 # a member may list a large directory that long
FORMATS = ("json", "script", "db")
_PROGRESS_KEYS = 1_000              # keys between two calls of progress


class Access(NamedTuple):
    """How a cluster is reached."""

    urls: Tuple[str, ...]
    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""
    username: str = ""              # name:password


class KeysClient:
    """The keys API of a cluster: one connection to the first member that answers.

    Raises BackupError.  Thread: one.
    """

    def __init__(self, access: Access) -> None:
        self._urls = list(access.urls)
        self._context: Optional[ssl.SSLContext] = None
        self._headers = {}
        self._connection: Optional[http.client.HTTPConnection] = None
        self.etcd_index = 0             # of the last answer
        if access.username:
            token = base64.b64encode(access.username.encode()).decode()
            self._headers["Authorization"] = f"Basic {token}"
        if any(url.startswith("https:") for url in access.urls):
            try:
                self._context = ssl.create_default_context(cafile=access.ca_file or None)
                if access.cert_file:
                    self._context.load_cert_chain(access.cert_file, access.key_file or None)
            except OSError as error:
                raise BackupError(f"cannot read the certificates: {error}") from None

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()

    def walk(self, key: str = "/") -> Iterator[Record]:
        """Yield all nodes below `key`, parents first: one directory is listed at a time."""
        waiting = [key]
        while waiting:
            node = self._call("GET", waiting.pop(), {"quorum": "true", "sorted": "true"})["node"]
            directories = []
            for child in node.get("nodes", ()):
                expiration = child.get("expiration")
                yield Record(child["key"], None if child.get("dir") else child["value"],
                             parse_time(expiration) if expiration else 0)
                if child.get("dir"):
                    directories.append(child["key"])
            waiting += reversed(directories)

    def put(self, record: Record, *, ttl_s: int, keep: bool) -> bool:
        """Write a node; False if it exists: a directory, or with `keep` any.

        Raises ValueError with the cluster's words if it refuses the node.
        """
        form: Dict[str, str] = {"ttl": str(ttl_s)} if ttl_s else {}
        if record.value is None:
            form["dir"] = "true"
        else:
            form["value"] = record.value
        if keep or record.value is None:
            form["prevExist"] = "false"
        answer = self._call("PUT", record.key, {}, form)
        if answer.get("errorCode") == 105:
            return False
        if "errorCode" in answer:
            raise ValueError(f"{answer.get('message')} ({answer.get('cause')})")
        return True

    def _call(self, method: str, key: str, query: Dict[str, str],
              form: Optional[Dict[str, str]] = None) -> Dict[str, Any]:
        path = "/v2/keys" + urllib.parse.quote(key)
        target = path + ("?" + urllib.parse.urlencode(query) if query else "")
        body = urllib.parse.urlencode(form) if form is not None else None
        headers = dict(self._headers)
        if body is not None:
            headers["Content-Type"] = "application/x-www-form-urlencoded"
        status, data = self._exchange(method, target, body, headers)
        try:
            answer = load_json(data)
            if not isinstance(answer, dict):
                raise ValueError("no object")
        except ValueError:
            raise BackupError(f"{self._urls[0]} answered {status}, and not as etcd does:"
                              f" {data[:100]!r}") from None
        if status >= 400 and method == "GET" or status in (401, 403) or status >= 500:
            raise BackupError(f"{self._urls[0]} refuses {method} {key}: {answer.get('message')}")
        return answer

    def _exchange(self, method: str, target: str, body: Optional[str],
                  headers: Dict[str, str]) -> Tuple[int, bytes]:
        """Return status and body.  A write whose answer is lost is sent again: it may be."""
        failure: Optional[Exception] = None
        for _ in range(2 * len(self._urls)):
            try:
                connection = self._connection = self._connection or self._dial()
                connection.request(method, target, body, headers)
                answer = connection.getresponse()
                data = answer.read()
                self.etcd_index = int(answer.headers.get("X-Etcd-Index", "0"))
                return answer.status, data
            except (OSError, http.client.HTTPException, ValueError) as error:
                failure = error
                self.close()
                self._connection = None
                self._urls.append(self._urls.pop(0))
        raise BackupError(f"no answer from {', '.join(sorted(self._urls))}: {failure}")

    def _dial(self) -> http.client.HTTPConnection:
        scheme, authority = split_url(self._urls[0])[:2]
        if scheme == "https":
            return http.client.HTTPSConnection(
                authority, timeout=CALL_SECONDS, context=self._context)
        return http.client.HTTPConnection(authority, timeout=CALL_SECONDS)


# -- export


class ExportReport(NamedTuple):
    """What export_keys() has done."""

    keys: int
    etcd_index: int
    faults: Tuple[str, ...]         # of a directory that is damaged

    def summary(self) -> str:
        return f"{self.keys:,} keys, etcd index {self.etcd_index}"


def export_keys(
    source: str, access: Access, *, form: str, target: str, key_map: KeyMap, leases: bool,
    wal_dir: str, progress: OnProgress,
) -> ExportReport:
    """Write the keys of a data directory or a cluster to the file `target`, "" for stdout.

    source  a data directory; "": the cluster of `access`

    Raises BackupError; then the file is not there, or as it was.
    """
    if form == "db" and not target:
        raise BackupError("a database is no text: name a file with -output")
    with contextlib.ExitStack() as cleanup:
        faults: Tuple[str, ...] = ()
        if source:
            found = inspect_dir(source, wal_dir, progress)
            records, faults = records_of_store(found.store), found.faults
            index = found.store.current_index
        else:
            client = KeysClient(access)
            cleanup.callback(client.close)
            records = client.walk()
            first = next(records, None)
            index = client.etcd_index
            records = _with_first(first, records)
        shown = _with_progress(_moved(records, key_map), progress)
        try:
            keys = _write(shown, form, target, leases, index)
        except BrokenPipeError:         # a reader of stdout that has enough
            raise
        except OSError as error:
            raise BackupError(f"cannot write {target or 'stdout'}: {error}") from error
    return ExportReport(keys, index, faults)


def _with_first(first: Optional[Record], rest: Iterator[Record]) -> Iterator[Record]:
    if first is not None:
        yield first
        yield from rest


def _moved(records: Records, key_map: KeyMap) -> Iterator[Record]:
    for record in records:
        yield record._replace(key=mapped(record.key, key_map)) if key_map else record


def _with_progress(records: Records, progress: OnProgress) -> Iterator[Record]:
    for number, record in enumerate(records):
        if not number % _PROGRESS_KEYS:
            progress(1.0, number)
        yield record


def _write(records: Records, form: str, target: str, leases: bool, index: int) -> int:
    now_ns = SYSTEM_CLOCK.wall_ns()
    if not target:
        return _write_text(records, form, sys.stdout, leases, index)
    temporary = target + ".tmp"
    try:
        if form == "db":
            keys = write_database(records, temporary, leases=leases, now_ns=now_ns)
        else:
            with open(temporary, "w", encoding="utf-8") as file:
                keys = _write_text(records, form, file, leases, index)
        os.chmod(temporary, 0o700 if form == "script" else 0o600)
        os.replace(temporary, target)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
    return keys


def _write_text(records: Records, form: str, file: TextIO, leases: bool, index: int) -> int:
    if form == "json":
        return write_json(records, file, index)
    return write_script(records, file, leases=leases, now_ns=SYSTEM_CLOCK.wall_ns())


# -- import


class ImportReport(NamedTuple):
    """What import_keys() has done."""

    written: int
    kept: int                       # existed already
    expired: int
    refused: Tuple[str, ...]        # keys, each with the reason

    def summary(self) -> str:
        parts = [f"{self.written:,} keys written"]
        parts += [f"{count:,} {what}" for count, what in (
            (self.kept, "existed and were kept"), (self.expired, "had expired"),
            (len(self.refused), "refused")) if count]
        return ", ".join(parts)


def import_keys(
    source: str, access: Access, *, key_map: KeyMap, keep: bool, dry_run: bool,
    progress: OnProgress,
) -> ImportReport:
    """Write the keys of a file to a cluster.  Raises BackupError.

    source  JSON of export, a snapshot or database of etcd 3, or a data directory with one
    """
    refused: List[str] = []
    records = _read_source(source, refused)
    client = KeysClient(access)
    written = kept = expired = 0
    try:
        for record in _with_progress(_moved(records, key_map), progress):
            ttl_s = record.ttl_s(SYSTEM_CLOCK.wall_ns())
            if ttl_s < 0:
                expired += record.value is not None
                continue
            try:
                done = dry_run or client.put(record, ttl_s=ttl_s, keep=keep)
            except ValueError as error:
                refused.append(f"{record.key}: {error}")
                continue
            written += done and record.value is not None
            kept += not done and record.value is not None
    finally:
        client.close()
    return ImportReport(written, kept, expired, tuple(refused))


def _read_source(source: str, refused: List[str]) -> Iterator[Record]:
    def skipped(key: bytes, why: str) -> None:
        refused.append(f"{key.decode('utf-8', 'backslashreplace')}: {why}")

    for path in (source, os.path.join(source, "member", "snap", "db"),
                 os.path.join(source, "snap", "db")):
        if os.path.isfile(path):
            break
    else:
        raise BackupError(f"{source} is no file and holds no member/snap/db; name a file of export,"
                          " or a snapshot of etcd 3")
    try:
        with open(path, "rb") as head:
            is_text = head.read(1) == b"{"
        if not is_text:
            yield from records_of_database(path, skipped, SYSTEM_CLOCK.wall_ns())
            return
        with open(path, encoding="utf-8") as file:
            yield from records_of_file(file, path)
    except (OSError, UnicodeDecodeError) as error:
        raise BackupError(f"cannot read {path}: {error}") from None


# ============================================================================
# life/testkit -- The test kit: members that a test kills, freezes and cuts off.
# ----------------------------------------------------------------------------
# Threads: the test's, and those of the members.  Does not import pytest: pytest itself loads the
# fixtures.
# ============================================================================


# All members of a test share one process: a stall of the machine or of a debugger stops them
# together, and late ticks are dropped.  So even these short times cause no needless elections.
LOCAL_HEARTBEAT_MS = 20
LOCAL_ELECTION_MS = 200
LOCAL_READY_SECONDS = 10.0          # for a start to be complete; above: TimeoutError
LOCAL_POLL_SECONDS = 0.002
REPUBLISH_SECONDS = 0.5             # then publish once more: a change of leader may have lost it

_Polled = TypeVar("_Polled")
_Ids = FrozenSet[int]               # of members
_NO_CUTS: Tuple[_Ids, _Ids] = (frozenset(), frozenset())


def _poll(look: Callable[[], _Polled], timeout_s: float, failure: Callable[[], str]) -> _Polled:
    """Return the first true result of look().  Raises TimeoutError(failure()) after timeout_s."""
    deadline = SYSTEM_CLOCK.now() + timeout_s
    while True:
        found = look()
        if found:
            return found
        if SYSTEM_CLOCK.now() > deadline:
            raise TimeoutError(failure())
        time.sleep(LOCAL_POLL_SECONDS)


class _CutTransport(Transport):
    """A transport whose links to other members can be cut, in one direction or in both.

    Sender and receiver both drop the messages, so messages on their way are lost too.  A link
    that is cut in both directions is closed.  Requests for /members and /version, which members
    send at their first start, pass.
    """

    _mute: _Ids = frozenset()           # members to which nothing is sent
    _deaf: _Ids = frozenset()           # members from which nothing is received

    def cut(self, mute: _Ids, deaf: _Ids, members: Mapping[int, Member]) -> None:
        """Drop messages to `mute` and from `deaf` from now on, and no others."""
        before, closed = self._mute & self._deaf, mute & deaf
        self._mute, self._deaf = mute, deaf
        for id in (before ^ closed) & members.keys():
            self.remove_peer(id)
            self.add_peer(id, members[id].peer_urls)

    def add_peer(self, member_id: int, urls: Iterable[str]) -> None:
        super().add_peer(member_id, urls)
        if member_id in self._mute & self._deaf and member_id in self._peers:
            self._peers[member_id].stop()

    def offer(self, messages: Iterable[Message]) -> None:
        """Send messages; report those to cut members as lost, as if these members were down."""
        passed = []
        for message in messages:
            if message.to not in self._mute:
                passed.append(message)
                continue
            self._context.unreachable(message.to)
            if message.type == MsgType.SNAP:
                self._context.snapshot_done(message.to, False)
        super().offer(passed)

    def _receive(self, message: Message, size: int) -> Generator[None, None, int]:
        return 500 if message.sender in self._deaf else (yield from super()._receive(message, size))


class _LocalServer(Server):
    """The server of a LocalMember, which starts with its links cut."""

    _transport_type = _CutTransport
    cuts = _NO_CUTS                     # members to which it sends nothing, and hears nothing from

    @property
    def is_alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def hold(self, held: threading.Event, release: threading.Event) -> None:
        """Stop the reactor after its current turn: set `held`, then wait for `release`."""
        def wait() -> None:
            held.set()
            release.wait()

        self._reactor.call_soon_threadsafe(wait)

    def abandon(self) -> None:
        """End the member while its reactor is held, before it does anything else."""
        self._failed(ServerStopped("killed"))

    def cut_links(self, etcd: EtcdServer) -> None:
        assert isinstance(etcd.transport, _CutTransport)
        etcd.transport.cut(*self.cuts, etcd.cluster.members)

    def is_ready(self, etcd: EtcdServer) -> bool:
        """True if the member is published, and the cluster has agreed on its version."""
        return self._ready.is_set() and bool(etcd.cluster.version)

    def publish(self, etcd: EtcdServer) -> None:
        """Publish the member again, which is harmless."""
        etcd.publish(self._ready.set)

    def _start_work(self) -> None:
        assert self.etcd is not None
        threading.current_thread().name = f"reactor-{self.config.name}"
        self.cut_links(self.etcd)
        super()._start_work()
        raft = self.etcd.node.raft
        if raft.term <= 1 and len(raft.voters) > 1:
            raft.election_elapsed = 0       # LocalCluster has a member of a new cluster campaign


def _reserve_port() -> socket.socket:
    """Return a socket that reserves a free loopback port for a later listener in this process.

    While the member is down no other program and no outgoing connection gets the port, and
    connections to it are refused.
    """
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # not before: it must be free now
    return sock


class LocalMember:
    """A member in this process, for tests: it can be killed, frozen and started again.

        with pyetcd.LocalMember() as member:
            print(member.client_url)

    directory  the parent of its data directory; "": a temporary one, removed by close()
    settings   fields of ServerConfig; heartbeat and election are 20 and 200 ms unless given

    The member keeps its ports on 127.0.0.1, and its data, until close().  It logs to the loggers
    below `pyetcd`, on a thread called `reactor-<name>`.  Guarantee: after a kill it finds on its
    disk the same as a process after `kill -9`.  Limit: a power cut is not imitated.
    Thread: any, one at a time.
    """

    def __init__(
        self, name: str = "etcd1", directory: str = "", **settings: Unpack[MemberSettings]
    ) -> None:
        self.name = name
        self.client_url = ""            # of the first listener; the same after a restart
        self.peer_url = ""
        self.initial_cluster = ""       # as the flag; "": this member alone
        self._directory = directory
        self._data_dir = ""
        self._settings = checked_settings(settings)
        self._server: Optional[_LocalServer] = None
        self._cuts = _NO_CUTS
        self._release: Optional[threading.Event] = None     # the held reactor waits for it
        self._owned = contextlib.ExitStack()    # ports and temporary directory

    def __enter__(self) -> LocalMember:
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(self.close)
            self.start()
            on_failure.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{self.name} {self.client_url} {self._state()}>"

    # -- life --------------------------------------------------------------

    def start(self, timeout_s: float = LOCAL_READY_SECONDS) -> None:
        """Start the member unless it runs, and wait until it is ready.

        timeout_s  0: do not wait, as without a quorum it cannot become ready

        Raises TimeoutError, StartError.
        """
        if not self.is_running:
            self.reserve()
            settings = {
                "name": self.name, "data_dir": self._data_dir,
                "listen_client_urls": [self.client_url], "listen_peer_urls": [self.peer_url],
                "heartbeat_ms": LOCAL_HEARTBEAT_MS, "election_ms": LOCAL_ELECTION_MS,
                "initial_cluster": self.initial_cluster, **self._settings,
            }
            server = _LocalServer(**settings)
            server.cuts = self._cuts
            server.__enter__()
            self._server = server
        if timeout_s:
            self.wait_ready(timeout_s)

    def wait_ready(self, timeout_s: float = LOCAL_READY_SECONDS) -> None:
        """Wait until the member has a leader, its log, and has published its URLs to the others.

        Raises TimeoutError, and ServerStopped if the member does not run.
        """
        server = self._running()
        republish_at = SYSTEM_CLOCK.now() + REPUBLISH_SECONDS

        def is_ready() -> bool:
            nonlocal republish_at
            if self.is_paused or server.call(server.is_ready):
                return not self.is_paused
            if SYSTEM_CLOCK.now() > republish_at:
                republish_at += REPUBLISH_SECONDS
                server.call(server.publish)
            return False

        _poll(is_ready, timeout_s,
              lambda: f"{self.name} is not ready after {timeout_s} s: {self._state()}")

    def kill(self) -> None:
        """End the member at once, as `kill -9` does: it writes and sends nothing more.

        A write that was under way may or may not have reached the disk.
        """
        if self._server is not None:
            if self.is_paused:
                self._server.abandon()
            self.resume()
            self._server.kill()

    def stop(self) -> None:
        """Stop in order, as at SIGTERM: transfer the leadership, answer waiting requests."""
        self.resume()
        if self._server is not None:
            self._server.stop()

    def restart(self, timeout_s: float = LOCAL_READY_SECONDS) -> None:
        """Kill the member and start it with the same ports and data; see start()."""
        self.kill()
        self.start(timeout_s)

    def pause(self) -> None:
        """Stop all work until resume(), as at SIGSTOP; sockets stay open.

        Only the batch that the disk thread has already received is written.
        Raises ServerStopped if the member does not run.
        """
        if not self.is_paused:
            held, release = threading.Event(), threading.Event()
            self._running().hold(held, release)
            while not held.wait(LOCAL_POLL_SECONDS):
                self._running()
            self._release = release

    def resume(self) -> None:
        """Continue, as at SIGCONT; late clock ticks are dropped, as in any member."""
        release, self._release = self._release, None
        if release is not None:
            release.set()

    def close(self) -> None:
        """Kill the member, release its ports, and remove the temporary directory."""
        self.kill()
        self._owned.close()
        self.client_url = self.peer_url = ""

    # -- facts -------------------------------------------------------------

    @property
    def client_urls(self) -> Tuple[str, ...]:
        """The client URL, as Server has it; () before the first start."""
        return (self.client_url,) if self.client_url else ()

    @property
    def peer_urls(self) -> Tuple[str, ...]:
        """The peer URL, as Server has it; () before the first start."""
        return (self.peer_url,) if self.peer_url else ()

    @property
    def is_running(self) -> bool:
        """True from start() to the end of the member, also while it is paused."""
        return self._server is not None and self._server.is_alive

    @property
    def is_paused(self) -> bool:
        """True between pause() and resume()."""
        return self._release is not None

    @property
    def id(self) -> str:
        """The member id as the API and the log write it; "" before the first start."""
        return format_id(self.member_id) if self.member_id else ""

    def call(self, work: Callable[[EtcdServer], Any]) -> Any:
        """Run work(etcd_server) on the member's thread and return its result, also while paused.

        Raises ServerStopped if the member does not run, and any exception of work.
        """
        server = self._running()
        if self.is_paused and server.etcd is not None:
            return work(server.etcd)            # on this thread: the reactor is held
        return server.call(work)

    # -- inside ------------------------------------------------------------

    def reserve(self) -> None:
        """Reserve the two ports, unless that is done, so that the URLs are known."""
        if self.client_url:
            return
        directory = self._directory
        if not directory:
            import tempfile
            directory = self._owned.enter_context(tempfile.TemporaryDirectory("-pyetcd"))
        self._data_dir = os.path.join(directory, self.name)
        self.client_url, self.peer_url = (
            f"http://127.0.0.1:{self._owned.enter_context(_reserve_port()).getsockname()[1]}"
            for _ in range(2)
        )

    def cut(self, mute: _Ids, deaf: _Ids) -> None:
        self._cuts = mute, deaf
        if self._server is not None:
            self._server.cuts = self._cuts
            if self.is_running:
                self.call(self._server.cut_links)

    def leading_term(self) -> int:
        """Return the term in which the member leads and has committed; 0 if paused or no leader."""
        if self.is_paused:
            return 0
        try:
            return int(self.call(_leading_term))
        except ServerStopped:
            return 0

    @property
    def member_id(self) -> int:
        """The id as a number; 0 before the first start."""
        etcd = self._server.etcd if self._server is not None else None
        return etcd.member_id if etcd is not None else 0

    def _running(self) -> _LocalServer:
        if self._server is None or not self._server.is_alive:
            raise ServerStopped()
        return self._server

    def _state(self) -> str:
        """Return role and term for messages, or `down`."""
        if not self.is_running:
            return "down"
        raft = self.call(lambda etcd: etcd.node.raft)
        return f"{'paused, ' * self.is_paused}{raft.role.name.lower()} at term {raft.term}"


def _leading_term(etcd: EtcdServer) -> int:
    term = etcd.node.raft.term
    return term if etcd.is_leader and etcd.raft_term == term else 0


class LocalCluster:
    """Members in this process, for tests: their links can be cut, and each is a LocalMember.

        with pyetcd.LocalCluster(3) as cluster:
            cluster.wait_leader().kill()
            print(cluster.wait_leader().client_url)

    size, directory, settings: see LocalMember; the members are called etcd1, etcd2, …
    Thread: any, one at a time.
    """

    def __init__(
        self, size: int = 3, directory: str = "", **settings: Unpack[MemberSettings]
    ) -> None:
        self.members = [
            LocalMember(f"etcd{number}", directory, **settings) for number in range(1, size + 1)
        ]
        self._cuts: Set[Tuple[int, int]] = set()    # (sender, receiver), as indexes of members

    def __enter__(self) -> LocalCluster:
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(self.close)
            self.start()
            on_failure.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def start(self, timeout_s: float = LOCAL_READY_SECONDS) -> None:
        """Start the members that are down, and wait until all are ready; see LocalMember.start."""
        for member in self.members:
            member.reserve()
        initial = ",".join(f"{member.name}={member.peer_url}" for member in self.members)
        for member in self.members:
            member.initial_cluster = initial
            member.start(timeout_s=0)
        if timeout_s:
            deadline = SYSTEM_CLOCK.now() + timeout_s
            with contextlib.suppress(TimeoutError):
                _poll(self._campaign_in_new_cluster, timeout_s, str)
            for member in self.members:
                member.wait_ready(max(deadline - SYSTEM_CLOCK.now(), 0.0))

    def close(self) -> None:
        """Kill all members, release their ports, and remove the temporary directories."""
        for member in self.members:
            member.close()

    @property
    def client_urls(self) -> Tuple[str, ...]:
        """One client URL of each member, running or not."""
        return tuple(member.client_url for member in self.members)

    # -- the leader --------------------------------------------------------

    def leader(self) -> Optional[LocalMember]:
        """Return the running member that leads in the newest term; None if there is none.

        Paused members do not count.
        """
        return self._leader_of(self.members)

    def wait_leader(
        self, timeout_s: float = LOCAL_READY_SECONDS, among: Iterable[LocalMember] = ()
    ) -> LocalMember:
        """Wait for a leader that has committed an entry in its term, and return it.

        among  the members that count, such as one side of a partition; (): all

        Raises TimeoutError, which names the state of each member.
        """
        candidates = list(among) or self.members
        leader = _poll(lambda: self._leader_of(candidates), timeout_s,
                       lambda: f"no leader after {timeout_s} s: {candidates}")
        assert leader is not None
        return leader

    @staticmethod
    def _leader_of(members: Iterable[LocalMember]) -> Optional[LocalMember]:
        terms = [(member.leading_term(), member) for member in members]
        term, leader = max(terms, key=lambda pair: pair[0])
        return leader if term else None

    # -- the network between the members -----------------------------------

    def partition(self, *groups: Iterable[LocalMember]) -> None:
        """Divide the network between the members, in place of any earlier partition() and cut().

        Members of different groups cannot reach each other; members in no group form one more.
        Open connections between groups are closed.  Clients reach every member, and restart()
        keeps the cuts.  ValueError: a member is in two groups, or not of this cluster.
        """
        sides = [sorted(map(self.members.index, group)) for group in groups]
        named = [place for side in sides for place in side]
        if len(set(named)) < len(named):
            raise ValueError("a member is in two groups")
        sides.append([place for place in range(len(self.members)) if place not in named])
        self._set_cuts({
            (a, b) for ours in sides for theirs in sides if ours is not theirs
            for a in ours for b in theirs
        })

    def cut(self, source: LocalMember, target: LocalMember) -> None:
        """Lose all messages from `source` to `target`; the other direction is unchanged."""
        self._set_cuts(self._cuts | {(self.members.index(source), self.members.index(target))})

    def heal(self) -> None:
        """Undo every partition() and cut()."""
        self._set_cuts(set())

    def _set_cuts(self, cuts: Set[Tuple[int, int]]) -> None:
        self._cuts = cuts
        ids = [member.member_id for member in self.members]
        for place, member in enumerate(self.members):
            member.cut(
                frozenset(ids[target] for source, target in cuts if source == place),
                frozenset(ids[source] for source, target in cuts if target == place),
            )

    # -- the first election ------------------------------------------------

    def _campaign_in_new_cluster(self) -> bool:
        """Let the last member of a new cluster campaign as soon as the others accept its messages.

        So the first election starts without an election timeout, and without rivals.  Returns
        True when the campaign has begun, or if the cluster had an election before.
        """
        candidate = self.members[-1]
        if not candidate.call(_is_new) or all(
            _accepts(one, other) and _accepts(other, one)
            for one in [candidate] for other in self.members if other is not candidate
        ):
            candidate.call(lambda etcd: etcd.node.campaign() if _is_new(etcd) else None)
            return True
        return False


def _is_new(etcd: EtcdServer) -> bool:
    """True before the first election of a cluster; later ones need no help."""
    return etcd.node.raft.term <= 1


def _accepts(member: LocalMember, sender: LocalMember) -> bool:
    """True if `member` does not drop messages from `sender`: see DataLossCheck."""
    message = Message(MsgType.VOTE, sender=sender.member_id)

    def accepts(etcd: EtcdServer) -> bool:
        return etcd.transport.drop is None or not etcd.transport.drop(message)

    return bool(member.call(accepts))


# -- pytest: loaded through the entry point `pytest11` -----------------------


class PytestPlugin:
    """The fixtures `etcd_server`, `etcd_cluster` and `etcd_cluster_factory`."""

    @staticmethod
    def pytest_configure(config: Any) -> None:
        """Define the fixtures, with the pytest that has loaded this."""
        fixture = sys.modules["pytest"].fixture
        holder = types.ModuleType("pyetcd_fixtures")
        for function in (_etcd_server, _etcd_cluster_factory, _etcd_cluster):
            name = function.__name__[1:]
            setattr(holder, name, fixture(name=name)(function))
        config.pluginmanager.register(holder, "pyetcd_fixtures")


@contextlib.contextmanager
def _shown_logs() -> Iterator[None]:
    """Let pytest capture the members' lines, and show them if the test fails."""
    log = logging.getLogger("pyetcd")
    before = log.level
    if before == logging.NOTSET:
        log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.setLevel(before)


def _etcd_server(tmp_path_factory: Any) -> Iterator[LocalMember]:
    """A member alone, ready, in this process: pyetcd.LocalMember."""
    directory = str(tmp_path_factory.mktemp("etcd"))
    with _shown_logs(), LocalMember(directory=directory) as member:
        yield member


class ClusterFactory:
    """The fixture `etcd_cluster_factory`: each call starts a LocalCluster until the test ends."""

    def __init__(self, tmp_path_factory: Any, clusters: contextlib.ExitStack) -> None:
        self._tmp_path_factory = tmp_path_factory
        self._clusters = clusters

    def __call__(self, size: int = 3, **settings: Unpack[MemberSettings]) -> LocalCluster:
        directory = str(self._tmp_path_factory.mktemp("etcd"))
        return self._clusters.enter_context(LocalCluster(size, directory, **settings))


def _etcd_cluster_factory(tmp_path_factory: Any) -> Iterator[ClusterFactory]:
    """A function (size=3, **settings) that starts a pyetcd.LocalCluster: pyetcd.ClusterFactory."""
    with _shown_logs(), contextlib.ExitStack() as clusters:
        yield ClusterFactory(tmp_path_factory, clusters)


def _etcd_cluster(etcd_cluster_factory: ClusterFactory) -> LocalCluster:
    """Three members, ready, in this process: pyetcd.LocalCluster."""
    return etcd_cluster_factory()


# ============================================================================
# life/verdicts -- Which etcd starts on a data directory, and which keys or entries are to blame if one does not.
# ----------------------------------------------------------------------------
# Source: etcd 3.5 server/etcdserver/server.go, 3.6 and 3.7 server/etcdserver/bootstrap.go,
# storage/util.go, api/membership/storev2.go and apply_v2.go.
# ============================================================================


BLAMED_MAX = 10                     # keys or entries that a report for people names
VALUE_CHARS_MAX = 100               # of a value in dump for people
_VERSIONS = ("2.3", "3.4", "3.5", "3.6", "3.7")
_META_COMMAND = re.compile(r"/0/(members/[0-9a-fA-F]{1,16}/attributes|version)")
_CONTENT_ERROR = (
    "detected disallowed custom content in v2store for stage --v2-deprecation=write-only")
_ENTRY_ERROR = "detected disallowed v2 WAL for stage --v2-deprecation=write-only"


class Verdict(NamedTuple):
    """Whether a version of etcd starts on the directory."""

    version: str
    reasons: Tuple[str, ...]        # why it does not; (): it starts
    keys: Tuple[str, ...] = ()      # of v2 that are to blame: all that the snapshot holds
    entries: Tuple[CommandEntry, ...] = ()      # of the log that are to blame

    @property
    def starts(self) -> bool:
        return not self.reasons


def verdicts(found: Inspection) -> List[Verdict]:
    """Return a verdict for each version, in order."""
    return [_verdict(version, found) for version in _VERSIONS]


def _verdict(version: str, found: Inspection) -> Verdict:
    if version == "2.3":
        return Verdict(version, tuple(_reasons_of_2(found)))
    reasons = list(_reasons_of_3(version, found))
    keys = tuple(_custom_keys(found)) if version == "3.6" else ()
    entries = tuple(_custom_entries(version, found))
    if keys:
        reasons.append(f"{_CONTENT_ERROR}: {found.snapshot_name} holds {len(keys)} keys of v2")
    if entries and version == "3.6":
        reasons.append(f"{_ENTRY_ERROR}: {len(entries)} entries behind the snapshot are commands"
                       " of v2")
    elif entries:
        reasons.append(f"it reads no commands of v2, and {len(entries)} entries behind the"
                       " snapshot are some")
    return Verdict(version, tuple(reasons), keys, entries)


def _reasons_of_2(found: Inspection) -> Iterator[str]:
    if found.database is not None:
        yield f"{found.database.path} is a database of etcd 3"
    elif found.v3_entries:
        yield f"the log holds {found.v3_entries} entries of etcd 3"
    if found.cluster_version and version_key(found.cluster_version) > (2, 3):
        yield f"the cluster version is {found.cluster_version}"


def _reasons_of_3(version: str, found: Inspection) -> Iterator[str]:
    """What each etcd 3 wants: a database as new as the snapshot, and no newer cluster."""
    ours, cluster_version = version_key(version + ".0"), found.cluster_version
    if cluster_version and version_key(cluster_version) > ours:
        yield f"the cluster version is {cluster_version}, and etcd does not go back"
    database, snapshot = found.database, found.source.snapshot
    if database is not None and database.fault:
        yield f"the database is damaged: {database.fault}"
        return
    index = database.consistent_index if database is not None else 0
    if snapshot is not None and index < snapshot.index and not found.received_database:
        yield (f"failed to find database snapshot file: the snapshot is at index {snapshot.index},"
               f" {f'the database at {index}' if database else 'and there is no database'}")
    elif database is None and cluster_version and version_key(cluster_version) >= (3, 0):
        yield "database file of the backend is missing: member/snap/db"
    if database is not None and database.storage_version:
        if version_key(database.storage_version) > ours and ours >= (3, 6):
            yield f"the database has the schema of etcd {database.storage_version}"
    if version == "3.7" and snapshot is not None and not found.voters_recorded:
        yield ("the log does not name the voters at the snapshot: etcd 3.5 or 3.6 must write one"
               " first")


def _custom_keys(found: Inspection) -> Iterator[str]:
    """Yield what etcd 3.6 refuses in the snapshot: keys, and users and roles.

    The empty directories that the use of users leaves behind are refused by 3.6.0 only.
    """
    for path in found.snapshot_paths:
        if path.startswith("/1/") or re.match("/2/[^/]+/", path):
            yield _shown(path)


def _custom_entries(version: str, found: Inspection) -> Iterator[CommandEntry]:
    for entry in found.commands:
        request = entry.request
        is_meta = request.method == "PUT" and _META_COMMAND.fullmatch(request.path)
        if version == "3.7" or version == "3.6" and not is_meta:
            yield entry


# -- reports


def check_lines(found: Inspection) -> List[str]:
    """The report of `pyetcd check` for people."""
    lines = list(_facts(found))
    for verdict in verdicts(found):
        lines.append(f"etcd {verdict.version}:    {'starts' if verdict.starts else 'refuses'}")
        lines += [f"             {reason}" for reason in verdict.reasons]
        lines += [f"               {text}" for text in _blamed(verdict)]
    lines += [f"damage:      {fault}" for fault in found.faults]
    return [*lines, f"next:        {next_step(found)}"]


def _facts(found: Inspection) -> Iterator[str]:
    source, files = found.source, found.store.nodes_below("/1")
    keys = [node for _, node in files if node.children is None]
    in_log = sum(node.modified_index > found.snapshot_etcd_index for node in keys)
    left_out = len(source.entries) - source.committed
    yield f"directory:   {source.path}"
    yield f"identity:    member {source.member_id:x} of cluster {source.cluster_id:x}"
    yield (f"raft:        term {source.hard_state.term}, index {source.last.index};"
           f" {left_out} entries not known to be committed")
    yield (f"snapshot:    index {source.snapshot.index}, {found.snapshot_name}"
           if source.snapshot else "snapshot:    none")
    yield (f"log:         {len(found.segments)} segments; behind the snapshot"
           f" {len(found.commands)} commands of v2, {found.v3_entries} entries of v3,"
           f" {found.changes} changes of members")
    version = found.cluster_version
    yield f"cluster:     version {version or 'not decided'}, " + (", ".join(
        f"{member.name or '(unnamed)'}={','.join(member.peer_urls)} ({format_id(member.id)})"
        for member in sorted(found.cluster.members.values())) or "no members")
    yield (f"v2 keys:     {len(keys):,}: {len(keys) - in_log:,} in the snapshot, {in_log:,} in the"
           f" log; {sum(node.expires_ns > 0 for node in keys):,} with a time to live; etcd index"
           f" {found.store.current_index}")
    if found.database is not None:
        database = found.database
        yield (f"database:    consistent index {database.consistent_index}, {database.keys:,}"
               f" revisions of v3 keys, schema {database.storage_version or 'before 3.6'}")


def _blamed(verdict: Verdict) -> Iterator[str]:
    keys, entries = verdict.keys, verdict.entries
    yield from keys[:BLAMED_MAX]
    if len(keys) > BLAMED_MAX:
        yield f"... and {len(keys) - BLAMED_MAX:,} more: pyetcd dump names all"
    for entry in entries[:BLAMED_MAX]:
        yield entry_text(entry)
    if len(entries) > BLAMED_MAX:
        yield f"... and {len(entries) - BLAMED_MAX:,} more: pyetcd dump names all"


def _shown(path: str) -> str:
    """A path as users know it: `/foo` for `/1/foo`."""
    return path[2:] if path.startswith("/1/") else path


def entry_text(entry: CommandEntry) -> str:
    """An entry in a line."""
    return (f"entry {entry.index}: {entry.request.method} {_shown(entry.request.path)}"
            f"{'' if entry.committed else ' (not known to be committed)'}")


def next_step(found: Inspection) -> str:
    """Return what to do next: one command, or a few words."""
    path = found.source.path
    if found.faults:
        return (f"replace the member from an intact one, or `pyetcd export {path}` to save what"
                " could be read")
    by_version = {verdict.version: verdict for verdict in verdicts(found)}
    if by_version["3.6"].keys or by_version["3.6"].entries:
        return (f"`pyetcd export {path} -format script` saves the keys for v3; then remove them"
                " and make a snapshot: docs/moving.md, \"Free a directory that blocks etcd 3.6\"")
    if not by_version["3.5"].starts and found.database is None:
        return (f"`pyetcd restore {path} -name NAME -data-dir NEW` makes a directory that etcd 3.4"
                " takes")
    if not by_version["3.7"].starts and by_version["3.6"].starts:
        return "start etcd 3.6 on it, and let it write a snapshot (--snapshot-count) before 3.7"
    return "nothing is in the way"


def check_json(found: Inspection) -> Dict[str, Any]:
    """The report of `pyetcd check -json`."""
    source, database = found.source, found.database
    return {
        "directory": source.path,
        "memberID": f"{source.member_id:x}", "clusterID": f"{source.cluster_id:x}",
        "term": source.hard_state.term, "commit": source.hard_state.commit,
        "lastIndex": source.last.index, "etcdIndex": found.store.current_index,
        "uncommittedEntries": len(source.entries) - source.committed,
        "snapshot": {"index": source.snapshot.index, "term": source.snapshot.term,
                     "file": found.snapshot_name} if source.snapshot else None,
        "snapshots": list(found.snapshot_files),
        "segments": [{"name": name, "bytes": size} for name, size in found.segments],
        "v2Entries": len(found.commands), "v3Entries": found.v3_entries,
        "memberChanges": found.changes,
        "clusterVersion": found.cluster_version,
        "members": [
            {"id": format_id(member.id), "name": member.name, "peerURLs": member.peer_urls,
             "clientURLs": member.client_urls}
            for member in sorted(found.cluster.members.values())],
        "v2Keys": sum(n.children is None for _, n in found.store.nodes_below("/1")),
        "database": database and {
            "fault": database.fault, "consistentIndex": database.consistent_index,
            "storageVersion": database.storage_version, "revisions": database.keys},
        "verdicts": [
            {"version": verdict.version, "starts": verdict.starts, "reasons": verdict.reasons,
             "keys": verdict.keys, "entries": [_entry_json(entry) for entry in verdict.entries]}
            for verdict in verdicts(found)],
        "damage": list(found.faults), "next": next_step(found),
    }


def _entry_json(entry: CommandEntry) -> Dict[str, Any]:
    return {"index": entry.index, "method": entry.request.method, "path": entry.request.path,
            "committed": entry.committed}


def dump_json(found: Inspection) -> Iterator[Dict[str, Any]]:
    """Yield an object for each node of v2, users and roles too, then for each command of the log.

    No object holds a password.
    """
    for space in ("/1", "/2"):
        for path, node in found.store.nodes_below(space):
            entry = found.place(node.modified_index)
            row: Dict[str, Any] = {
                "key": _shown(path), "createdIndex": node.created_index,
                "modifiedIndex": node.modified_index, "place": "log" if entry else "snapshot",
            }
            if entry:
                row["entry"] = entry
            if node.expires_ns:
                row["expiration"] = format_time(node.expires_ns)
            if node.children is not None:
                row["dir"] = True
            elif not path.startswith("/2/users/"):
                row["value"] = node.value
            yield row
    for command in found.commands:
        yield {"entry": command.index, "method": command.request.method,
               "path": _shown(command.request.path), "committed": command.committed}


def dump_lines(found: Inspection) -> Iterator[str]:
    """Yield dump_json() for people, and for grep."""
    for row in dump_json(found):
        if "method" in row:
            note = "" if row["committed"] else " (not known to be committed)"
            yield f"entry {row['entry']}\t{row['method']} {row['path']}{note}"
            continue
        place = f"entry {row['entry']}" if "entry" in row else "snapshot"
        kind = "directory" if "dir" in row else json_text(_cut(row.get("value", "(hidden)")))
        expires = f"\texpires {row['expiration']}" if "expiration" in row else ""
        yield (f"{row['key']}\tindex {row['createdIndex']}/{row['modifiedIndex']}\t{place}"
               f"\t{kind}{expires}")


def _cut(value: str) -> str:
    return value if len(value) <= VALUE_CHARS_MAX else value[:VALUE_CHARS_MAX] + "..."


# ============================================================================
# life/tools -- The commands beside the server: backup, restore, check, dump, export, import.
# ============================================================================


EXIT_FAILED = 1
EXIT_REFUSED = 2                    # of `check`: a newer etcd does not start on the directory


def flag_lines(flags: Sequence[Flag]) -> Iterator[str]:
    for flag in flags:
        default = flag.default
        if isinstance(default, (tuple, dict)):
            default = ",".join(default)
        shown = str(default).lower() if flag.is_bool else f"'{default}'"
        yield f"\t--{flag.name} {shown}"
        yield f"\t\t{flag.help}"


class ProgressLine:
    """Shows `restore: 45% (123,456 keys)` on a terminal for work of more than a second."""

    def __init__(self, tool: str, now: Callable[[], float] = SYSTEM_CLOCK.now) -> None:
        self._tool = tool
        self._now = now
        self._next = now() + 1.0
        self._keys = 0
        self._text = ""                 # on the terminal now

    def show(self, share: float, keys: int) -> None:
        """Report progress.  share: done, 0.0 to 1.0; keys: read so far, 0 if unchanged."""
        self._keys = max(self._keys, keys)
        if sys.stderr.isatty() and self._now() >= self._next:
            self._next = self._now() + 0.1
            self._show(f"{self._tool}: {share:.0%} ({self._keys:,} keys)")

    def clear(self) -> None:
        if self._text:
            self._show("")
            sys.stderr.write("\r")

    def _show(self, text: str) -> None:
        sys.stderr.write("\r" + text.ljust(len(self._text)))
        sys.stderr.flush()
        self._text = text


class Tool(NamedTuple):
    """One command."""

    words: str                      # that follow its name in the usage
    brief: str
    text: Tuple[str, ...]           # of its help
    flags: Tuple[Flag, ...]
    run: Callable[[Sequence[str], Settings, ProgressLine], int]     # words, flags -> exit code


def run_tool(name: str, words: Sequence[str]) -> int:
    """Run a command with the words behind its name; return the exit code."""
    logging.getLogger("pyetcd").setLevel(logging.CRITICAL)  # the report has all that matters
    line, tool = ProgressLine(name), TOOLS[name]
    first = list(words)
    named: List[str] = []
    while first and not first[0].startswith("-"):
        named.append(first.pop(0))
    try:
        settings = Settings(first, os.environ, tool.flags)
        if settings.help:
            _print(f"usage: pyetcd {name} {tool.words} [flags]", "", *tool.text, "",
                   *flag_lines(tool.flags))
            return 0
        named += filter(None, [settings.take_word() if not named else ""])
        settings.check_leftover()
        settings.read_environment()
        return tool.run(named, settings, line)
    except FlagError as error:
        sys.stderr.write(f"{error}. See 'pyetcd {name} -help'.\n")
    except BackupError as error:
        line.clear()
        sys.stderr.write(f"{name}: {error}\n")
    except BrokenPipeError:             # of `| head`: nobody reads the rest
        sys.stdout = open(os.devnull, "w")
    return EXIT_FAILED


def _print(*lines: str) -> None:
    sys.stdout.write("".join(line + "\n" for line in lines))


def _one_word(words: Sequence[str], name: str, meaning: str) -> str:
    """Return the only word.  Raises FlagError."""
    if not words:
        raise FlagError(f"{name} is missing: {meaning}")
    if len(words) > 1:
        raise FlagError(f"'{words[1]}' is one word too many")
    return words[0]


def _options(settings: Settings, flags: Sequence[Flag]) -> Dict[str, Any]:
    return {flag.name.replace("-", "_"): settings[flag.name] for flag in flags}


# -- backup and restore


_BACKUP_FLAGS = flag_rows("""
data-dir  text  path to the data directory to copy; its member may run.
wal-dir  text  path to its dedicated wal directory, if it has one.
backup-dir  text  path to the copy; must be empty or absent.
backup-wal-dir  text  path to a dedicated wal directory of the copy.
dry-run  bool  say what would be done, and change nothing.
""")
_RESTORE_FLAGS = (*flag_rows("""
name  text  name of the member whose data directory is made.
initial-cluster  text  members of the new cluster, `name=url` pairs (default: this member alone).
initial-cluster-token  text  token of the new cluster: clusters with different tokens do not mix.
data-dir  text  path to the new data directory (default: <name>.etcd).
wal-dir  text  path to the new dedicated wal directory.
dry-run  bool  say what would be done, and change nothing.
"""), Flag("initial-advertise-peer-urls", parse_urls, (),
           "peer URLs of this member (default: those in -initial-cluster)."))


def _run_backup(words: Sequence[str], settings: Settings, line: ProgressLine) -> int:
    if words:
        raise FlagError(f"'{words[0]}' is no flag: name directories with -data-dir and -backup-dir")
    for name in ("data-dir", "backup-dir"):
        if not settings[name]:
            raise FlagError(f"-{name} is missing")
    report = backup(**_options(settings, _BACKUP_FLAGS), progress=line.show)
    line.clear()
    _print(*(report.lines() if settings["dry-run"] else [report.summary()]))
    return 0


def _run_restore(words: Sequence[str], settings: Settings, line: ProgressLine) -> int:
    check_restore_settings(settings)
    source = _one_word(words, "SOURCE", "a snapshot file, or a data directory")
    report = restore(source, **_options(settings, _RESTORE_FLAGS), progress=line.show)
    line.clear()
    _print(*(report.lines() if settings["dry-run"] else [report.summary()]))
    return 0


# -- check and dump


_READ_FLAGS = flag_rows("""
wal-dir  text  path to its dedicated wal directory, if it has one.
json  bool  print JSON: one object, or one for each line.
""")


def _run_check(words: Sequence[str], settings: Settings, line: ProgressLine) -> int:
    path = _one_word(words, "DIR", "a data directory")
    found = inspect_dir(path, settings["wal-dir"], line.show)
    line.clear()
    if settings["json"]:
        _print(json.dumps(check_json(found), indent=2, ensure_ascii=False))
    else:
        _print(*check_lines(found))
    if found.faults:
        return EXIT_FAILED
    newer = [verdict for verdict in verdicts(found) if verdict.version >= "3.5"]
    return 0 if all(verdict.starts for verdict in newer) else EXIT_REFUSED


def _run_dump(words: Sequence[str], settings: Settings, line: ProgressLine) -> int:
    path = _one_word(words, "DIR", "a data directory")
    found = inspect_dir(path, settings["wal-dir"], line.show)
    line.clear()
    if settings["json"]:
        for row in dump_json(found):
            _print(json.dumps(row, ensure_ascii=False))
    else:
        for text in dump_lines(found):
            _print(text)
    for fault in found.faults:
        sys.stderr.write(f"dump: {fault}\n")
    return EXIT_FAILED if found.faults else 0


# -- export and import


_CLUSTER_FLAGS = (
    Flag("endpoints", parse_urls, (), "client URLs of the cluster, comma between."),
    *flag_rows("""
ca-file  text  certificates of authorities to check the cluster with.
cert-file  text  client certificate.
key-file  text  key of that certificate.
username  text  name:password of a user.
"""), Flag("map", parse_key_map, [], "prefixes of keys to replace: /old=/new, comma between."),
)
_EXPORT_FLAGS = (
    Flag("format", one_of(*FORMATS), "json",
         "json, as pyetcdctl writes; script, of etcdctl for etcd 3; or db, a snapshot of etcd 3."),
    Flag("ttl", one_of("drop", "lease"), "drop",
         "what becomes of times to live in etcd 3: permanent keys, or leases of what is left."),
    *flag_rows("""
output  text  file to write (default: print it).
wal-dir  text  path to the dedicated wal directory of DIR, if it has one.
"""), *_CLUSTER_FLAGS,
)
_IMPORT_FLAGS = (*_CLUSTER_FLAGS, *flag_rows("""
keep  bool  leave keys that exist as they are.
dry-run  bool  read everything, count, and write nothing.
"""))


def _access(settings: Settings) -> Access:
    return Access(settings["endpoints"], settings["ca-file"], settings["cert-file"],
                  settings["key-file"], settings["username"])


def _run_export(words: Sequence[str], settings: Settings, line: ProgressLine) -> int:
    source = _one_word(words, "DIR", "") if words else ""
    access = _access(settings)
    if "://" in source:
        access, source = access._replace(urls=parse_urls(source)), ""
    if bool(source) == bool(access.urls):
        raise FlagError("name one source: a data directory, or a cluster with -endpoints")
    report = export_keys(
        source, access, form=settings["format"], target=settings["output"],
        key_map=settings["map"], leases=settings["ttl"] == "lease", wal_dir=settings["wal-dir"],
        progress=line.show,
    )
    line.clear()
    for fault in report.faults:
        sys.stderr.write(f"export: {fault}\n")
    if settings["output"]:
        _print(f"{settings['output']}: {report.summary()}")
    return EXIT_FAILED if report.faults else 0


def _run_import(words: Sequence[str], settings: Settings, line: ProgressLine) -> int:
    source = _one_word(words, "FILE", "what export or etcd 3 has written")
    access = _access(settings)
    if not access.urls:
        raise FlagError("-endpoints is missing: the cluster to write to")
    report = import_keys(source, access, key_map=settings["map"], keep=settings["keep"],
                         dry_run=settings["dry-run"], progress=line.show)
    line.clear()
    for key in report.refused:
        sys.stderr.write(f"import: {key}\n")
    _print(("would be: " if settings["dry-run"] else "") + report.summary())
    return EXIT_FAILED if report.refused else 0


TOOLS: Dict[str, Tool] = {
    "backup": Tool(
        "-data-dir DIR -backup-dir COPY", "copy the data of a member", (
            "Copy the data of a member, which may be running, as `etcdctl backup` does.  A member"
            " that", "is started from the copy with -force-new-cluster is a cluster of one with all"
            " keys."), _BACKUP_FLAGS, _run_backup),
    "restore": Tool(
        "SOURCE -name NAME", "make a new cluster out of a snapshot or a copy", (
            "Make the data directory of member NAME of a new cluster with keys, users and roles of",
            "SOURCE: a file of GET /v2/snapshot or of a member/snap directory, or a data"
            " directory.",
            "On each host, with the same SOURCE and flags but for -name; then start the members."),
        _RESTORE_FLAGS, _run_restore),
    "check": Tool(
        "DIR", "say what a data directory holds, and which etcd starts on it", (
            "Read the data directory of a stopped member of etcd 2.0 to 3.7 or pyetcd, and change"
            " no byte.", "Exit code: 0, 2 if etcd 3.5, 3.6 or 3.7 refuses it, 1 if it is damaged."),
        _READ_FLAGS, _run_check),
    "dump": Tool(
        "DIR", "print every key of a data directory, and where it stands", (
            "Print the keys, users and roles of v2 and the commands in the log, one a line, with"
            " the", "place of each: the snapshot, or an entry of the log."),
        _READ_FLAGS, _run_dump),
    "export": Tool(
        "DIR|URL", "write the keys of v2 to a file: for etcd 3, or to import", (
            "Write the keys of a data directory, whose member is stopped, or of a cluster."
            "  Hidden keys", "of a cluster are not listed by it, and so left out."),
        _EXPORT_FLAGS, _run_export),
    "import": Tool(
        "FILE -endpoints URL", "write the keys of a file to a cluster", (
            "FILE is what export or pyetcdctl has written, a snapshot of etcd 3, or the data"
            " directory of", "one.  Keys that v2 cannot hold are named, and left out."),
        _IMPORT_FLAGS, _run_import),
}


# ============================================================================
# life/command_line -- The command line: the one module that prints, and touches signals and process limits.
# ============================================================================


DESCRIPTORS_MIN = 150               # open files a member needs for itself; at or below: refused
_SEE_HELP = "See 'pyetcd -help'."


def usage() -> str:
    lines = [
        "usage: pyetcd [flags]", "       start a pyetcd member", "",
        *(line for name, tool in TOOLS.items() for line in (
            f"       pyetcd {name} {tool.words}",
            f"       {tool.brief}: see pyetcd {name} -help", "")),
        "       pyetcd -version", "       show the version", "",
        "       pyetcd -h | -help", "       show the help information about pyetcd", "",
        "Every flag may be written -flag value, -flag=value, --flag value or --flag=value; its",
        "environment variable is ETCD_ and its name, upper case, with _ for -.",
    ]
    for title, flags in FLAGS.items():
        lines += ["", f"{title} flags:", "", *flag_lines(flags)]
    lines += ["", "of etcd 0.4, without effect flags:", ""]
    lines += [f"\t--{name}" for name in IGNORED_BOOLS]
    lines += ["", "of etcd 3 or experimental, without effect flags:"]
    for reason, names in NO_EFFECT.items():
        lines += ["", f"\t({reason})", *(f"\t--{name}" for name in names)]
    return "\n".join(lines) + "\n"


def version_text() -> str:
    machine = platform.machine().lower()
    machine = {"x86_64": "amd64", "aarch64": "arm64", "i686": "386"}.get(machine, machine)
    python = f"{platform.python_implementation()} {platform.python_version()}"
    return (
        f"etcd Version: {SERVER_VERSION}\nGit SHA: pyetcd-{__version__}\nGo Version: {python}\n"
        f"Go OS/Arch: {sys.platform}/{machine}\n"
    )


class LogFormatter(logging.Formatter):
    """`2015/08/31 22:03:06 package: message`, in local time, as etcd 2.0 writes it."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(message)s", "%Y/%m/%d %H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return one line; the package stands behind `pyetcd.` in the name of the logger."""
        package = record.name.partition(".")[2]
        prefix = f"{package}: " if package else ""
        return f"{record.asctime} {prefix}{record.message}"

    def formatException(self, ei: Any) -> str:
        """Return the traceback, indented: no text in it looks like a line of the log."""
        lines = super().formatException(ei).split("\n")
        return "\n".join("    " + one_line(line) for line in lines)


def set_up_logging(settings: Settings) -> None:
    root = logging.getLogger("pyetcd")
    handler = logging.StreamHandler()
    handler.setFormatter(LogFormatter())
    root.handlers[:] = [handler]
    root.propagate = False
    root.setLevel(logging.DEBUG if settings["debug"] else logging.INFO)
    for package, level in settings["log-package-levels"].items():
        (package_logger(package) if package else root).setLevel(level)


def check_data_dir(config: ServerConfig) -> str:
    """Log the path of the data directory; return its kind: `member`, `proxy`, or "" if new.

    bootstrap() and prepare_proxy_dir() check later that the path can be a data directory.
    """
    log = package_logger("etcd")
    path = config.data_dir or config.name + ".etcd"
    if not config.data_dir:
        log.info("no data-dir provided, using default data-dir ./%s", path)
    for kind in ("member", "proxy"):
        if os.path.isdir(os.path.join(path, kind)):
            log.info("already initialized as %s before, starting as etcd %s...", kind, kind)
            return kind
    return ""


def raise_descriptor_limit() -> None:
    """Raise the limit of open files to the maximum.  Raises StartError if that is too few."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    if soft != resource.RLIM_INFINITY and soft <= DESCRIPTORS_MIN:
        raise StartError(
            f"file descriptor limit[{soft}] of etcd process is too low, and should be set higher"
            f" than {DESCRIPTORS_MIN} to ensure internal usage; raise it with ulimit -n"
        )


def notify_systemd(environ: Mapping[str, str]) -> None:
    """Report to systemd that the member is up, if NOTIFY_SOCKET is set (sd_notify protocol)."""
    path = environ.get("NOTIFY_SOCKET", "")
    if not path:
        # etcd logs this wherever systemd runs, from a terminal too.
        if os.getppid() == 1 and os.path.isdir("/run/systemd/system"):
            package_logger("etcd").error("forgot to set Type=notify in systemd service file?")
        return
    address = "\0" + path[1:] if path.startswith("@") else path
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"READY=1", address)
    except OSError as error:
        package_logger("etcd").error("failed to notify systemd for readiness: %s", error)


class SignalStop:
    """Stops the member in order at SIGINT or SIGTERM, and then ends the process by that signal.

    Before install() the signals end the process at once: the member serves nothing yet.
    """

    _SIGNALS = {signal.SIGINT: "interrupt", signal.SIGTERM: "terminated"}

    def __init__(self) -> None:
        self._received = 0
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    def install(self, stop: Callable[[], None]) -> None:
        """Call stop() on a thread of its own at the first signal; ignore later ones."""
        def received(number: int, frame: object) -> None:
            if self._received:
                return
            self._received = number
            name = self._SIGNALS[signal.Signals(number)]
            logging.getLogger("pyetcd").info("received %s signal, shutting down...", name)
            threading.Thread(target=stop, name="stop", daemon=True).start()

        for number in self._SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, received)

    def end(self) -> None:
        """Die of the received signal, so that the parent process sees it; not as pid 1."""
        if self._received and os.getpid() != 1:
            signal.signal(self._received, signal.SIG_DFL)
            os.kill(os.getpid(), self._received)


def log_tls_and_cors(config: ServerConfig) -> None:
    """Log the TLS settings of both ports and the CORS origins.  Raises StartError."""
    log = package_logger("etcd")
    peer_urls = config.listen_peer_urls if config.proxy == "off" else ()
    for level, text in (
        *check_tls("peer", config.peer_tls, peer_urls),
        *check_tls("client", config.client_tls, config.listen_client_urls),
    ):
        log.log(level, "%s", text)
    if config.cors:
        log.info("cors = %s", ",".join(config.cors))


def start_server(config: ServerConfig, kind: str) -> ServerThread:
    """Start a member or a proxy: the kind of the data directory decides, then the flags.

    kind  as from check_data_dir

    Raises StartError.
    """
    if kind == "member" or (config.proxy == "off" and kind != "proxy"):
        try:
            return Server.from_config(config).__enter__()
        except ClusterFull:
            package_logger("etcd").info("discovery cluster full, falling back to proxy")
    return ProxyServer.from_config(config).__enter__()


def run_member(config: ServerConfig, environ: Mapping[str, str]) -> int:
    """Run a member or a proxy until it ends; return the exit code.  Raises StartError."""
    signals = SignalStop()
    kind = check_data_dir(config)
    raise_descriptor_limit()
    server = start_server(config, kind)
    signals.install(server.stop)
    notify_systemd(environ)
    code = server.wait()
    signals.end()
    return code


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run `pyetcd` with these words after the command; return the exit code."""
    # The wal thread needs the GIL right after each sync: Python's default interval, 5 ms, would
    # delay every write by that much beside a busy reactor.
    sys.setswitchinterval(0.0005)
    # No full collection: with a million keys it takes 0.2 s and makes the p99 of writes 17 ms
    # instead of 5, and it frees nothing, as old objects of a member form no cycles.
    gc.set_threshold(2_000, 4, 1_000_000)   # the middle generation takes 4 ms; with 5,000, 5: 12
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in TOOLS:
        return run_tool(words[0], words[1:])
    try:
        settings = Settings(words, os.environ)
        if settings.help:
            sys.stdout.write(usage())
            return 0
        settings.check_leftover()
        if settings["version"]:
            sys.stdout.write(version_text())
            return 0
        settings.complete()
        config = make_config(settings)
    except FlagError as error:
        sys.stderr.write(f"{error}. {_SEE_HELP}\n")
        return 1
    set_up_logging(settings)
    for level, package, text in settings.lines:
        package_logger(package).log(level, "%s", text)
    if settings["snapshot-count"] == 0:
        package_logger("etcdserver").info(
            "set snapshot count to default %d", DEFAULT_SNAPSHOT_COUNT
        )
    try:
        log_tls_and_cors(config)
        return run_member(config, os.environ)
    except StartError as error:
        package_logger("etcd").critical("%s", error)
        return 1


if __name__ == "__main__":
    sys.exit(main())
