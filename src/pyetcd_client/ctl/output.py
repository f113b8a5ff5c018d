"""Output of the command line in the formats of etcdctl 2.3."""

from __future__ import annotations

import enum
import http.client
import itertools
import json
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from re import Match
from typing import Any
from urllib.parse import urlsplit

from ..transport.calls import is_endpoint_failure
from ..transport.errors import ConnectionFailed, EtcdError, RequestTimeout, TransportError
from ..transport.results import Node, Result

_LINES_PER_WRITE = 1_000        # of a listing to standard output
_PROGRESS_EVERY_S = 0.1         # interval between two updates of the progress line
_UNAVAILABLE = "client: etcd cluster is unavailable or misconfigured"
_HTML_ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}     # as Go's encoder does


class Exit(enum.IntEnum):
    """Exit codes; see `main`."""

    OK = 0
    BAD_ARGS = 1
    BAD_CONNECTION = 2
    SERVER_ERROR = 4
    UNHEALTHY = 5
    INTERRUPTED = 130                               # 128 + SIGINT
    BROKEN_PIPE = 141                               # 128 + SIGPIPE
    MISUSE = OK         # unknown command or option: etcdctl 2.3 prints help, exits with 0


class _ExitError(Exception):
    """Ends a command with a line on stderr and an exit code."""

    def __init__(self, line: str, code: int = Exit.BAD_ARGS) -> None:
        super().__init__(line)
        self.line = line
        self.code = code


# -- output


_BLUE, _GREEN, _RED = "1;34", "32", "31"
_UNESCAPED = re.compile("[\\\\\x00-\x1f\x7f-\x9f\u2028\u2029]")    # not possible in a line
_ESCAPES = {"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"}
_UNESCAPES = {escape[1]: character for character, escape in _ESCAPES.items()}


def _escape(text: str) -> str:
    """Return `text` as one line without tabs; the inverse of `_unescape`."""
    return _UNESCAPED.sub(lambda m: _ESCAPES.get(m[0]) or f"\\u{ord(m[0]):04x}", text)


def _unescape(text: str) -> str:
    def original(match: Match[str]) -> str:
        code = match[1]
        if len(code) == 5:
            return chr(int(code[1:], 16))
        if code not in _UNESCAPES:
            raise ValueError(f"\\{code} is no escape")
        return _UNESCAPES[code]
    return re.sub(r"\\(u[0-9a-fA-F]{4}|.?)", original, text, flags=re.DOTALL)


def _coloured(text: str, colour: str) -> str:
    if not colour or not sys.stdout.isatty() or (
            os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"):
        return text
    return f"\x1b[{colour}m{text}\x1b[0m"


def _table_lines(rows: Sequence[Sequence[str]], colours: Sequence[str]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in itertools.zip_longest(*rows, fillvalue="")]
    for row, colour in zip(rows, colours):
        if sys.stdout.isatty():
            row = [text.ljust(width) for text, width in zip(row, widths)]
        yield _coloured(" ".join(filter(None, row)).rstrip(), colour)


def _print(text: str) -> None:
    """Print a line at once, as UTF-8 in any locale: keys and values are bytes to a terminal."""
    sys.stdout.flush()
    sys.stdout.buffer.write(text.encode("utf-8", "surrogateescape") + b"\n")
    sys.stdout.buffer.flush()


def _print_lines(lines: Iterable[str]) -> None:
    rest = iter(lines)
    for batch in iter(lambda: list(itertools.islice(rest, _LINES_PER_WRITE)), []):
        _print("\n".join(batch))


def _print_error(text: str) -> None:
    line = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    print(line, file=sys.stderr)


class _Progress:
    """A line on stderr with the progress of long work; only on a terminal."""

    def __init__(self, work: str, total: int = 0) -> None:
        self._work = work
        self._total = total                         # 0: unknown
        self._visible = sys.stderr.isatty()
        self._drawn_at = 0.0

    def __enter__(self) -> _Progress:
        self.show(0)
        return self

    def __exit__(self, *_: object) -> None:
        if self._visible:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def show(self, done: int) -> None:
        if not self._visible or time.monotonic() - self._drawn_at < _PROGRESS_EVERY_S:
            return
        self._drawn_at = time.monotonic()
        share = f"/{self._total:,} ({100 * done // self._total} %)" if self._total else ""
        print(f"\r\x1b[K{self._work}: {done:,}{share}", end="", file=sys.stderr, flush=True)


def _value_text(node: Node | None) -> str:
    return (node.value or "") if node is not None else ""


def _result_extended(result: Result) -> str:
    node = result.node
    lines = [f"Key: {'' if node.key == '/' else node.key}",
             f"Created-Index: {node.created_index}", f"Modified-Index: {node.modified_index}"]
    if result.prev_node is not None:
        lines.append(f"PrevNode.Value: {_value_text(result.prev_node)}")
    lines += [f"TTL: {node.ttl or 0}", f"Index: {result.etcd_index}"]
    if result.action != "delete":
        lines += ["", _value_text(node)]
    return "\n".join(lines)


def _node_json(node: Node | None) -> dict[str, Any] | None:
    if node is None:
        return None
    shown: dict[str, Any] = {"key": "" if node.key == "/" else node.key}
    if node.dir:
        shown["dir"] = True
    shown["value"] = node.value or ""
    shown["nodes"] = [_node_json(child) for child in node.nodes] or None
    shown["createdIndex"] = node.created_index
    shown["modifiedIndex"] = node.modified_index
    if node.expiration is not None:
        shown["expiration"] = node.expiration
    if node.ttl:
        shown["ttl"] = node.ttl
    return shown


def _result_json(result: Result) -> str:
    shown = {"action": result.action, "node": _node_json(result.node),
             "prevNode": _node_json(result.prev_node)}
    return json.dumps(shown, ensure_ascii=False, separators=(",", ":")).translate(_HTML_ESCAPES)


def _print_result(result: Result, form: str) -> None:
    if form == "json":
        _print(_result_json(result))
    elif form == "extended":
        _print(_result_extended(result))
    elif form != "simple":
        _print_error(f"Unsupported output format: {form}")
    elif result.action == "delete":
        _print(f"PrevNode.Value: {_value_text(result.prev_node)}")
    else:
        _print(_value_text(result.node))


# -- errors


def _failure_line(error: EtcdError) -> str:
    """Return the failure of one endpoint in etcdctl's words."""
    if isinstance(error, RequestTimeout):
        return f"client: endpoint {error.endpoint} exceeded header timeout"
    if isinstance(error, TransportError) and error.endpoint:
        address = urlsplit(error.endpoint).netloc
        never_sent = isinstance(error, ConnectionFailed) and not error.maybe_applied
        return f"dial tcp {address}: connect: {error.message}" if never_sent else error.describe()
    if not error.status:                            # of a DNS lookup
        return error.describe()
    if error.status in (500, 503):
        return f"client: etcd member {error.endpoint} has no leader"
    phrase = http.client.responses.get(error.status, "")
    return f"client: etcd member {error.endpoint} returns server error [{phrase}]"


def _error_lines(error: EtcdError) -> str:
    if not is_endpoint_failure(error):
        return f"Error:  {error}"
    lines = [f"error #{number}: {_failure_line(failure)}"
             for number, failure in enumerate(error.failures)]
    if error.maybe_applied:
        lines.append("the write may have been applied: it was not sent again")
    return "\n".join([f"Error:  {_UNAVAILABLE}", *lines, ""])
