"""Loggers and request ids."""

from __future__ import annotations

import collections
import logging
import re
from typing import Deque, Dict, Tuple

from .limits import LOG_LINE_CHARS_MAX, RECENT_LINE_CHARS_MAX, RECENT_LINES_MAX


class RecentLines(logging.Handler):
    """Keeps the last lines of the log as (unix seconds, level, package, text), oldest first.

    Members that share a process share its log.  Thread: any may log; any may copy `lines`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lines: Deque[Tuple[float, str, str, str]] = collections.deque(maxlen=RECENT_LINES_MAX)

    def emit(self, record: logging.LogRecord) -> None:
        package, text = record.name.partition(".")[2], record.getMessage()
        self.lines.append((record.created, record.levelname, package, text[:RECENT_LINE_CHARS_MAX]))


RECENT_LINES = RecentLines()
# A handler from the start: without one the log would go to stderr, unasked.
logging.getLogger("pyetcd").addHandler(RECENT_LINES)


# Characters that end a line, move the cursor or reverse the text, and surrogates.
_UNPRINTABLE = re.compile(
    "[\\x00-\\x1f\\x7f-\\x9f\\u061c\\u200e\\u200f\\u2028-\\u202e\\u2066-\\u2069\\ud800-\\udfff]")


def one_line(text: str) -> str:
    """Escape `text` so that it cannot pass for two lines, or for another line."""
    text = _UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], text)
    return text if len(text) <= LOG_LINE_CHARS_MAX else text[:LOG_LINE_CHARS_MAX] + "..."


def _make_one_line(record: logging.LogRecord) -> bool:
    """Filter a record: names, keys, headers and texts of peers may hold any character."""
    record.fields = _fields(record)
    record.msg, record.args = one_line(record.getMessage()), None
    return True


LOG_PACKAGES = (
    "auth", "discovery", "etcd", "etcdhttp", "etcdserver", "flags", "http", "proxy", "raft",
    "rafthttp", "snap", "tls", "wal",
)
_PLACE = re.compile(r"%[.\d]*([a-z])")
_RAFT_FIELD = re.compile(r"(?:^|\b(term|index|to|from) )([0-9a-f]+)\b")
_FIELDS = {                             # what is named so in front of a value is this field
    "cluster": "cluster", "duration": "duration_ms", "index": "index", "leader": "leader",
    "member": "member", "peer": "peer", "remote": "remote", "status": "status", "term": "term",
}


def _fields(record: logging.LogRecord) -> Dict[str, object]:
    """Return the fields of a line of a JSON log: `member %s` gives the field member.

    The names come from our own texts, never from their arguments.
    """
    fields: Dict[str, object] = {}
    if record.args and isinstance(record.args, tuple):
        text = str(record.msg)
        for place, value in zip(_PLACE.finditer(text), record.args):
            before = text[:place.start()].rstrip(" :")
            is_peer = before.endswith("connection with")
            name = "peer" if is_peer else _FIELDS.get(before.rpartition(" ")[2], "")
            if record.name == "pyetcd.raft.node" and not place.start():
                name = "member"
            if name:
                fields[name] = f"{value:x}" if place[1] == "x" else value
    elif record.name == "pyetcd.raft":  # whose texts hold nothing but ids and numbers
        for found in _RAFT_FIELD.finditer(str(record.msg)):
            name, is_number = found[1] or "member", found[1] in ("term", "index")
            fields["peer" if name in ("to", "from") else name] = (
                int(found[2]) if is_number else found[2])
    return fields


def package_logger(package: str) -> logging.Logger:
    """Return the logger whose lines read `<package>: message` in etcd's format."""
    logger = logging.getLogger("pyetcd." + package)
    logger.addFilter(_make_one_line)            # no effect if it has it
    return logger


class IdGenerator:
    """Request ids, unique per start: member 16 bits | unix ms 40 | counter 8 (etcd 2.3 idutil)."""

    __slots__ = ("_high", "_low")

    def __init__(self, member_id: int, now_ms: int) -> None:
        self._high = (member_id & 0xFFFF) << 48
        self._low = (now_ms & ((1 << 40) - 1)) << 8

    def next(self) -> int:
        self._low = (self._low + 1) & ((1 << 48) - 1)
        return self._high | self._low
