"""Tree, top, bench and completion."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Callable, NamedTuple

from ..client.client import Client
from ..transport.calls import clean_key
from ..transport.errors import DirNotEmpty, EtcdError, KeyNotFound
from ..transport.results import Member, Node
from .etcdctl import _QUORUM, _run_parallel
from .output import _BLUE, Exit, _coloured, _escape, _ExitError, _print, _print_error, _print_lines
from .program import (
    _COMMANDS,
    _GLOBAL_FLAGS,
    _GROUPS,
    _Access,
    _command,
    _command_names,
    _dashed,
    _Flag,
    _given_client,
    _MisuseError,
    _Options,
    _parse_flags,
    _Run,
)
from .transfer import _with_long_timeouts

_TOP_EVERY_S = 2.0
_TREE_VALUE_MAX = 60            # characters of a value that `tree --values` prints
_BENCH_TOTAL = 10_000
_BENCH_PREFIX = "/pyetcd-bench"
_BENCH_SIZE_BYTES = 64
_BENCH_KEYS = 1_000             # distinct keys that bench writes and reads

# -- tree


@_command("tree", "[key]", "print a directory as a tree",
          _Flag(("values",), bool, "with the values of keys"),
          _Flag(("ascii",), bool, "without box characters"), _QUORUM, own=True)
def _cmd_tree(run: _Run) -> None:
    options = run.options
    node = _with_long_timeouts(run.client, run.settings).get(
        (run.args or ["/"])[0], recursive=True, sorted=True, quorum=options.on("quorum")).node
    strokes = ("|-- ", "`-- ", "|   ") if options.on("ascii") else ("├── ", "└── ", "│   ")
    _print(_escape(node.key) + (_tree_tail(node, options) if node.key != "/" else ""))
    _print_lines(_tree_lines(node, options, strokes))
    below = list(node.walk()) if node.dir else [node]
    dirs = sum(child.dir for child in below)
    _print(f"\n{dirs} directories, {len(below) - dirs} keys")


def _tree_lines(node: Node, options: _Options, strokes: tuple[str, str, str]) -> Iterator[str]:
    fork, end, along = strokes
    for child in node.nodes:
        last = child is node.nodes[-1]
        name = _coloured(_escape(child.key.rpartition("/")[2]), _BLUE if child.dir else "")
        yield (end if last else fork) + name + _tree_tail(child, options)
        for line in _tree_lines(child, options, strokes):
            yield ("    " if last else along) + line


def _tree_tail(node: Node, options: _Options) -> str:
    text = "/" if node.dir else ""
    if options.on("values") and not node.dir:
        value = _escape(node.value or "")
        cut = value if len(value) <= _TREE_VALUE_MAX else value[:_TREE_VALUE_MAX - 1] + "…"
        text += f" = {cut}"
    return text if node.ttl is None else f"{text}  ({node.ttl} s left)"


# -- top

_TOP_WRITES = tuple(f"{verb}Success" for verb in (
    "sets", "delete", "update", "create", "compareAndSwap", "compareAndDelete"))
_TOP_COLUMNS = ("NAME", "STATE", "GET/S", "WRITE/S", "FAIL/S", "EXPIRE/S", "WATCH", "SINCE",
                "ADDRESS")


class _Sample(NamedTuple):
    taken_at: float                                 # monotonic seconds
    self_stats: Mapping[str, Any]
    store: Mapping[str, int]

    def count(self, *names: str) -> int:
        return sum(self.store.get(name, 0) for name in names)


class _Top:
    """Samples all members; prints a table of the rates since the last sample."""

    def __init__(self, run: _Run) -> None:
        self._client = run.client
        self._access = run.access
        self._members = self._client.member_list()
        self._clients: dict[str, Client] = {}       # by member id
        self._samples: dict[str, _Sample] = {}

    def lines(self) -> list[str]:
        """Take a sample of every member; return the table."""
        with contextlib.suppress(EtcdError):        # no reply: use the known list
            self._members = self._client.member_list()
        members = self._members
        with concurrent.futures.ThreadPoolExecutor(max(1, len(members)), "pyetcdctl-top") as pool:
            samples = list(pool.map(self._sample, members))
        rows = [_TOP_COLUMNS, *map(self._row, members, samples)]
        self._samples = {member.id: sample for member, sample in zip(members, samples)
                         if sample is not None}
        widths = [max(map(len, column)) for column in zip(*rows)]
        up = len(self._samples)
        return [f"pyetcdctl top, {time.strftime('%H:%M:%S')}: {up} of {len(members)} members "
                f"answer", "",
                *("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)]

    def _sample(self, member: Member) -> _Sample | None:
        if not member.client_urls:
            return None
        client = self._clients.get(member.id)
        if client is None:
            client = self._clients[member.id] = self._access.client(endpoints=member.client_urls)
        try:
            with client:                            # closes its connections
                return _Sample(time.monotonic(), client.statistics("self"),
                               client.statistics("store"))
        except EtcdError:
            return None

    def _row(self, member: Member, sample: _Sample | None) -> tuple[str, ...]:
        name, address = member.name or member.id, ",".join(member.client_urls)
        if sample is None:
            return (name, "silent" if member.name else "unstarted", *"-" * 6, address)
        before = self._samples.get(member.id, sample)
        elapsed_s = sample.taken_at - before.taken_at

        def rate(*names: str) -> str:
            return f"{(sample.count(*names) - before.count(*names)) / elapsed_s:.1f}" \
                if elapsed_s > 0 else "-"

        state = str(sample.self_stats.get("state", "")).replace("State", "").lower()
        failures = [name for name in sample.store if name.endswith("Fail")]
        return (name, state, rate("getsSuccess"), rate(*_TOP_WRITES), rate(*failures),
                rate("expireCount"), str(sample.count("watchers")),
                str(sample.self_stats.get("startTime", ""))[:16], address)


@contextlib.contextmanager
def _screen() -> Iterator[Callable[[float], bool]]:
    """Take over the terminal; yield a function that waits and returns whether q was pressed.

    The terminal is restored afterwards, also after Ctrl-C and SIGTERM.
    """
    import select
    import termios
    import tty

    def wait(seconds: float) -> bool:
        return (bool(select.select([sys.stdin], [], [], seconds)[0])
                and os.read(sys.stdin.fileno(), 16)[:1] in (b"q", b"Q", b""))

    saved = termios.tcgetattr(sys.stdin)
    handler = signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        tty.setcbreak(sys.stdin)
        print("\x1b[?1049h\x1b[?25l", end="", flush=True)   # other screen, no cursor
        yield wait
    finally:
        print("\x1b[?25h\x1b[?1049l", end="", flush=True)
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, saved)
        signal.signal(signal.SIGTERM, handler)


@_command("top", "", "show the activity of every member, until q or Ctrl-C",
          _Flag(("interval",), float, "time between two samples (default: 2s)", 0.001),
          _Flag(("once",), bool, "print the rates of one interval as text, then end"), own=True)
def _cmd_top(run: _Run) -> None:
    top, every_s = _Top(run), run.options.seconds("interval", _TOP_EVERY_S)
    if run.options.on("once"):
        top.lines()
        time.sleep(every_s)
        _print_lines(top.lines())
        return
    if not (sys.stdout.isatty() and sys.stdin.isatty()):
        while True:
            _print_lines([*top.lines(), ""])
            time.sleep(every_s)
    with _screen() as quit_pressed:
        while True:
            columns, rows = shutil.get_terminal_size()
            shown = [line[:columns] for line in (*top.lines(), "", "q: quit")]
            print("\x1b[H\x1b[J" + "\r\n".join(shown[:rows]), end="", flush=True)
            if quit_pressed(every_s):
                return


# -- bench


class _Bench:
    """Sends requests on many connections; records their latencies."""

    def __init__(self, client: Client, options: _Options, kind: str) -> None:
        self._client = client
        self.connections = options.number("connections", 8)
        self.total = options.number("total", _BENCH_TOTAL)
        self.value = "x" * options.number("size", _BENCH_SIZE_BYTES)
        self._reads_percent = {"put": 0, "get": 100}.get(kind, options.number("reads", 90))
        prefix = clean_key(options.text("prefix") or _BENCH_PREFIX).rstrip("/")
        self.directory = f"{prefix}/{random.getrandbits(32):08x}"
        self._made = list(self._missing(prefix))
        self.latencies_s: list[float] = []          # append is atomic
        self.failures: list[EtcdError] = []

    def prepare(self) -> None:
        if self._reads_percent:
            keys = [self._key(number) for number in range(min(_BENCH_KEYS, self.total))]
            _run_parallel(keys, self.connections, self._put, "bench: preparing")

    def run(self) -> float:
        """Send all requests; return the duration in seconds."""
        started_at = time.monotonic()
        _run_parallel(range(self.total), self.connections, self._one, "bench")
        return time.monotonic() - started_at

    def clean_up(self) -> None:
        try:
            with contextlib.suppress(KeyNotFound):
                self._client.delete(self.directory, recursive=True)
            for directory in self._made:
                with contextlib.suppress(KeyNotFound, DirNotEmpty):     # in use by another run
                    self._client.rmdir(directory)
        except EtcdError as error:
            _print_error(f"pyetcdctl bench: {self.directory} is still there: {error}")

    def _missing(self, directory: str) -> Iterator[str]:
        """Yield the missing directories, the inner ones first."""
        while directory:
            try:
                self._client.get(directory)
            except KeyNotFound:
                yield directory
            except EtcdError:                       # later requests report it
                return
            else:
                if directory == _BENCH_PREFIX:      # left by a run that was killed
                    yield directory
                return
            directory = directory.rpartition("/")[0]

    def percentile_ms(self, share: float) -> float:
        ordered = sorted(self.latencies_s)
        return 1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    def _key(self, number: int) -> str:
        return f"{self.directory}/{number % _BENCH_KEYS:04}"

    def _put(self, key: str) -> None:
        self._client.set(key, self.value)

    def _one(self, number: int) -> None:
        # 37 and 100 are coprime: reads and writes mix evenly.
        is_read = number * 37 % 100 < self._reads_percent
        begun_at = time.perf_counter()
        try:
            (self._client.get if is_read else self._put)(self._key(number))
        except EtcdError as error:
            self.failures.append(error)
        else:
            self.latencies_s.append(time.perf_counter() - begun_at)


@_command("bench", "[put|get|mixed]", "put load on a cluster; print rate and latencies",
          _Flag(("connections",), int, "concurrent requests (default: 8)", 1),
          _Flag(("total",), int, f"requests to send (default: {_BENCH_TOTAL})", 1),
          _Flag(("size",), int, f"bytes of a value (default: {_BENCH_SIZE_BYTES})", 0),
          _Flag(("reads",), int, "with mixed: percentage of reads (default: 90)", 0),
          _Flag(("prefix",), str, f"directory to work in (default: {_BENCH_PREFIX})"),
          own=True)
def _cmd_bench(run: _Run) -> int:
    kind = (run.args or ["put"])[0]
    if kind not in ("put", "get", "mixed") or run.options.number("reads") > 100:
        raise _ExitError("bench is put, get or mixed, with --reads from 0 to 100")
    if kind != "mixed":
        run.options.refuse(f"with {kind}", "reads")
    bench = _Bench(_with_long_timeouts(run.client, run.settings), run.options, kind)
    try:
        bench.prepare()
        elapsed_s = bench.run()
    finally:
        bench.clean_up()
    done = len(bench.latencies_s)
    _print(f"{kind}: {done:,} requests, values of {len(bench.value):,} bytes, {bench.connections} "
          f"connections, {elapsed_s:.2f} s: {done / elapsed_s:,.0f} per second")
    if done:
        _print("milliseconds: " + ", ".join(
            f"{name} {bench.percentile_ms(share):.2f}" for name, share in (
                ("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p99.9", 0.999), ("max", 1.0))))
    if bench.failures:
        _print(f"{len(bench.failures):,} requests failed, the first: {bench.failures[0]}")
    return Exit.SERVER_ERROR if bench.failures else Exit.OK


# -- completion

_COMPLETIONS = {
    "bash": """\
_pyetcdctl() {
    local IFS=$'\\n' words=("${COMP_WORDS[@]:1:COMP_CWORD}")
    if declare -F _get_comp_words_by_ref >/dev/null; then
        local cur cword; _get_comp_words_by_ref -n : -w words -i cword cur
        words=("${words[@]:1:cword}")
    fi
    COMPREPLY=($("${COMP_WORDS[0]}" completion words "${words[@]}" 2>/dev/null | cut -f 1))
    [[ ${COMPREPLY[0]} == */ ]] && compopt -o nospace
    declare -F __ltrim_colon_completions >/dev/null && __ltrim_colon_completions "$cur"
}
complete -o default -F _pyetcdctl pyetcdctl
""",
    "zsh": """\
#compdef pyetcdctl
_pyetcdctl() {
    local -a lines words_found notes
    lines=("${(@f)$("${words[1]}" completion words "${(@)words[2,CURRENT]}" 2>/dev/null)}")
    local line
    for line in $lines; do
        words_found+=("${line%%$'\\t'*}")
        notes+=("${line/$'\\t'/  -- }")
    done
    (( $#words_found )) || { _files; return }
    if [[ ${words_found[1]} == */ ]]; then
        compadd -S '' -a words_found
    else
        compadd -l -d notes -a words_found
    fi
}
if [[ $funcstack[1] == _pyetcdctl ]]; then _pyetcdctl; else compdef _pyetcdctl pyetcdctl; fi
""",
    "fish": """\
function __pyetcdctl_words
    set -l before (commandline -opc)
    $before[1] completion words $before[2..-1] (commandline -ct) 2>/dev/null
end
complete -c pyetcdctl -a '(__pyetcdctl_words)'
""",
}


@_command("completion", "bash|zsh|fish", "print a script that completes words in a shell",
          own=True, mixed=False)
def _cmd_completion(run: _Run) -> None:
    if run.args[:1] == ["words"]:
        _print_lines("\t".join(pair).rstrip("\t") for pair in _candidates(run.args[1:] or [""]))
        return
    if len(run.args) != 1 or run.args[0] not in _COMPLETIONS:
        raise _ExitError("Provide the name of a shell: bash, zsh or fish")
    _print(_COMPLETIONS[run.args[0]].rstrip("\n"))


def _split_command(words: Sequence[str]) -> tuple[str, list[str]]:
    """Return the name of the command (one or two words, "" for none), and the rest."""
    for size in (2, 1):
        name = " ".join(words[:size])
        if len(words) >= size and name in _COMMANDS:
            return name, list(words[size:])
    return "", list(words)


def _candidates(words: Sequence[str]) -> list[tuple[str, str]]:
    """Return (word, note) for each completion of the last of `words`."""
    *before, current = words
    settings, rest, awaited = _scan(before, _GLOBAL_FLAGS, mixed=False)
    name, args = _split_command(rest)
    flags: Sequence[_Flag] = _GLOBAL_FLAGS
    if name:
        _, args, awaited = _scan(args, _COMMANDS[name].flags, mixed=_COMMANDS[name].mixed)
        flags = _COMMANDS[name].flags
    found: list[tuple[str, str]] = []
    if awaited is not None:
        values = ("simple", "extended", "json") if awaited.names[0] == "output" else ()
        found = [(value, "") for value in values]
    elif current.startswith("-"):
        found = [(_dashed(flag.names[0]), flag.help) for flag in flags]
    elif not name:
        group = rest[0] if rest and rest[0] in _GROUPS else ""
        found = _command_names(group) if group or not rest else []
    elif name == "completion":
        found = [(shell, "") for shell in _COMPLETIONS]
    elif not args and re.search(r"[<[]key[]>]", _COMMANDS[name].usage):
        found = _keys_like(settings, current)
    return [pair for pair in found if pair[0].startswith(current)]


def _scan(words: Sequence[str], flags: Sequence[_Flag], *,
          mixed: bool) -> tuple[_Options, list[str], _Flag | None]:
    """Return options, arguments, and the last flag if its value is missing."""
    for flag in flags:
        if flag.kind is not bool and words and words[-1].lstrip("-") in flag.names:
            with contextlib.suppress(_MisuseError, _ExitError):
                options, rest = _parse_flags(words[:-1], flags, mixed=mixed)
                if mixed or not rest:
                    return options, rest, flag
    try:
        return (*_parse_flags(words, flags, mixed=mixed), None)
    except (_MisuseError, _ExitError):
        return _Options(), [], None


def _keys_like(settings: _Options, current: str) -> list[tuple[str, str]]:
    """Return the keys in the directory of `current`; none without a reply."""
    directory = current.rpartition("/")[0]
    user = settings.text("username", "ETCDCTL_USERNAME")
    if user and ":" not in user and not os.environ.get("ETCDCTL_PASSWORD"):
        return []                                   # a completion must not ask for it
    try:
        with _given_client(settings, _Access.from_settings(settings)) as client:
            nodes = client.get(directory, sorted=True).node.nodes
    except (EtcdError, _ExitError):
        return []
    slash = "/" if current.startswith("/") or not current else ""
    keys = (slash + node.key.lstrip("/") for node in nodes)
    return [(key + "/" if node.dir else key, "") for key, node in zip(keys, nodes)]
