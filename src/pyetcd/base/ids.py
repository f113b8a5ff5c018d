"""Loggers and request ids."""

from __future__ import annotations

import logging
import re

from .limits import LOG_LINE_CHARS_MAX

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
