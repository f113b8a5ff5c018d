"""The log of a program: lines of text or of JSON; lines that repeat are counted."""

from __future__ import annotations

import copy
import json
import logging
import re
from collections import OrderedDict
from datetime import datetime
from typing import Any, Callable, Tuple

from ..base.ids import RECENT_LINES, one_line, package_logger
from ..net.workers import SYSTEM_CLOCK
from .settings import Settings

LOG_REPEAT_SECONDS = 10.0               # a line is logged again after this time, with its count
LOG_REPEATS_MAX = 256                   # lines that are remembered; above: the oldest is forgotten

_Key = Tuple[int, str, str]         # level, logger, text


class LogFormatter(logging.Formatter):
    """`2015/08/31 22:03:06 package: message`, in local time, as etcd 2.0 writes it."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(message)s", "%Y/%m/%d %H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return one line; the package stands behind `pyetcd.` in the name of the logger."""
        package = record.name.partition(".")[2]
        prefix = f"{package}: " if package else ""
        repeated = getattr(record, "repeated", 0)
        often = "once" if repeated == 1 else f"{repeated} times"
        count = f" (repeated {often} in {LOG_REPEAT_SECONDS:.0f} s)" if repeated else ""
        return f"{record.asctime} {prefix}{record.message}{count}"

    def formatException(self, ei: Any) -> str:
        """Return the traceback, indented: no text in it looks like a line of the log."""
        lines = super().formatException(ei).split("\n")
        return "\n".join("    " + one_line(line) for line in lines)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, package, message, and the fields of the record."""

    def format(self, record: logging.LogRecord) -> str:
        """The time is local, with microseconds and zone (RFC 3339)."""
        time = datetime.fromtimestamp(record.created).astimezone()
        shown = {
            "time": time.isoformat(timespec="microseconds"), "level": record.levelname.lower(),
            "package": record.name.partition(".")[2] or "pyetcd", "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if getattr(record, "repeated", 0):
            shown["repeated"] = record.repeated  # type: ignore[attr-defined]
        if record.exc_info:
            shown["exception"] = self.formatException(record.exc_info)
        return json.dumps(shown)


class _Repeats:
    """A line that was logged, and how often it has come since."""

    __slots__ = ("since", "count", "last")

    def __init__(self, since: float, last: logging.LogRecord) -> None:
        self.since = since
        self.count = 0
        self.last = last


class RepeatHandler(logging.Handler):
    """Passes records to another handler; counts those that repeat within LOG_REPEAT_SECONDS.

    A line that goes on repeating is logged every LOG_REPEAT_SECONDS, with its count.  Without a
    timer: the next line of the log, of any kind, brings the counts that are due, and close() all
    others.  Lines of raft that differ only in the term are the same line.
    """

    def __init__(self, target: logging.Handler, now: Callable[[], float]) -> None:
        super().__init__()
        self._target = target
        self._now = now
        self._logged: OrderedDict[_Key, _Repeats] = OrderedDict()       # the oldest first

    def emit(self, record: logging.LogRecord) -> None:
        """Pass on or count a record; those of DEBUG or with a traceback are never counted."""
        now = self._now()
        while self._logged and now - next(iter(self._logged.values())).since >= LOG_REPEAT_SECONDS:
            key, repeats = self._logged.popitem(last=False)
            if self._tell(repeats):
                self._logged[key] = _Repeats(now, repeats.last)
        if record.levelno >= logging.CRITICAL:      # the reason of an end stays the last line
            self._tell_all()
        if record.exc_info or record.levelno <= logging.DEBUG:
            self._target.handle(record)
            return
        text = record.getMessage()
        if record.name == "pyetcd.raft":
            text = re.sub(r"term \d+", "term", text)
        key = record.levelno, record.name, text
        if key in self._logged:
            self._logged[key].count += 1
            self._logged[key].last = record
            return
        if len(self._logged) >= LOG_REPEATS_MAX:
            self._tell(self._logged.popitem(last=False)[1])
        self._logged[key] = _Repeats(now, record)
        self._target.handle(record)

    def _tell(self, repeats: _Repeats) -> bool:
        """Log the last line with its count; False if it has not come again."""
        if repeats.count:
            record = copy.copy(repeats.last)
            record.repeated = repeats.count
            self._target.handle(record)
        return repeats.count > 0

    def _tell_all(self) -> None:
        while self._logged:
            self._tell(self._logged.popitem(last=False)[1])

    def close(self) -> None:
        self._tell_all()
        super().close()


def set_up_logging(settings: Settings) -> None:
    root = logging.getLogger("pyetcd")
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if settings["log-format"] == "json" else LogFormatter())
    root.handlers[:] = [RepeatHandler(handler, SYSTEM_CLOCK.now), RECENT_LINES]
    root.propagate = False
    root.setLevel(logging.DEBUG if settings["debug"] else logging.INFO)
    for package, level in settings["log-package-levels"].items():
        (package_logger(package) if package else root).setLevel(level)
