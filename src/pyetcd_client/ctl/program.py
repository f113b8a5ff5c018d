"""The program: options, clients of commands, help, errors and exit codes."""

from __future__ import annotations

import contextlib
import functools
import getpass
import math
import os
import random
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any, Callable, NamedTuple, Optional

from ..client.client import Client
from ..transport.calls import is_endpoint_failure
from ..transport.connections import ConnectionState
from ..transport.defaults import __version__
from ..transport.endpoints import Endpoints
from ..transport.errors import EtcdError
from ..transport.results import Result
from .output import Exit, _error_lines, _ExitError, _print, _print_error, _print_result

CLI_ENDPOINTS = "http://127.0.0.1:2379,http://127.0.0.1:4001"
CLI_VERSION = "2.3.8"                               # the etcdctl whose behaviour is reproduced
_NOT_TEXT = "pyetcdctl: {} is not UTF-8: etcd v2 stores text; encode bytes, as base64 does"
_BOOLEANS = {
    **dict.fromkeys(("1", "t", "T", "true", "TRUE", "True"), True),
    **dict.fromkeys(("0", "f", "F", "false", "FALSE", "False"), False),
}


class _MisuseError(Exception):
    """A command line that etcdctl 2.3 does not accept either; help is printed."""


# -- options


class _Flag(NamedTuple):
    names: tuple[str, ...]
    kind: type          # bool, int, str, float (a Go duration, in seconds), list (repeatable)
    help: str
    least: float | None = None   # the smallest number, or length of a text

    @property
    def dashed(self) -> str:
        return _dashed(self.names[0])


class _Options:
    """Values of the given flags; the others are False, 0, "" or empty."""

    def __init__(self) -> None:
        self._values: dict[str, Any] = {}
        self._forms: dict[str, str] = {}

    def put(self, flag: _Flag, text: str, form: str = "") -> None:
        name, value = flag.names[0], _flag_value(flag, text)
        if self._forms.setdefault(name, form) != form:
            raise _MisuseError(f"{_dashed(form)} and {_dashed(self._forms[name])} are the same")
        if flag.kind is list:
            value = [*self.texts(name), value]
        elif self._values.get(name, value) != value and flag not in _GLOBAL_FLAGS:
            # A global one behind that of an alias or a script overrides it on purpose.
            _print_error(f"pyetcdctl: {flag.dashed} is given twice: only the last counts")
        elif form and text == "":
            _print_error(f"pyetcdctl: {flag.dashed} is empty, as if it were not there")
        self._values[name] = value

    def on(self, name: str) -> bool:
        return bool(self._values.get(name, False))

    def number(self, name: str, default: int = 0) -> int:
        return int(self._values.get(name, default))

    def seconds(self, name: str, default: float) -> float:
        return float(self._values.get(name, default))

    def text(self, name: str, variable: str = "") -> str:
        return str(self._values.get(name, "")) or os.environ.get(variable, "")

    def texts(self, name: str) -> list[str]:
        return list(self._values.get(name, ()))

    def refuse(self, why: str, *names: str) -> None:
        for name in names:
            if name in self._values:
                raise _ExitError(f"pyetcdctl: {_dashed(name)} has no effect {why}")


def _flag_value(flag: _Flag, text: str) -> Any:
    """Return the value of a flag.  Raises _MisuseError; _ExitError if etcdctl accepts it."""
    parse, expected = _READERS.get(flag.kind, (str, ""))
    try:
        value = parse(text)
    except (KeyError, ValueError):
        repaired, hint = text[:-1] if text.endswith("s") else text + "s", ""
        with contextlib.suppress(KeyError, ValueError):
            parse(repaired)                         # 5s for 5, or 5 for 5s
            hint = f"; did you mean {repaired}?"
        raise _MisuseError(f'{flag.dashed} takes {expected}, not "{text}"{hint}') from None
    is_text = isinstance(value, str)
    if flag.least is not None and (len(text) if is_text else value) < flag.least:
        limit = "must not be empty" if is_text else f"is {flag.least} or more"
        raise _ExitError(f"pyetcdctl: {flag.dashed} {limit}")
    return value


def _parse_integer(text: str) -> int:
    """Parse a number by the rules of Go's flag package: also hexadecimal, and octal after a 0."""
    match = re.fullmatch(r"([+-]?)(0[xX][0-9a-fA-F]+|0[0-7]*|[1-9][0-9]*)", text, re.ASCII)
    if match is None or len(text) > 30:
        raise ValueError(text)
    digits = match[2]
    value = int(digits, 16 if digits[:2] in ("0x", "0X") else 8 if digits[0] == "0" else 10)
    if value >= (1 << 63) + (match[1] == "-"):
        raise ValueError(text)
    return -value if match[1] == "-" else value


def _parse_duration(text: str) -> float:
    """Parse a Go duration such as 500ms or 1m30s; return seconds."""
    text = text.replace("\u03bc", "\u00b5")          # the Greek letter, and the sign on keyboards
    units = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
    part = r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(h|ms|us|µs|ns|m|s)"
    if text in ("0", "+0", "-0"):
        return 0.0
    if not re.fullmatch(f"\\+?(?:{part})+", text, re.ASCII):
        raise ValueError(text)
    return sum(float(count) * units[unit] for count, unit in re.findall(part, text))


_READERS: dict[type, tuple[Callable[[str], Any], str]] = {
    bool: (_BOOLEANS.__getitem__, "true or false"), int: (_parse_integer, "a whole number"),
    float: (_parse_duration, "a time such as 500ms or 1m30s"),
}


def _parse_flags(argv: Sequence[str], flags: Sequence[_Flag], *,
                 mixed: bool = False) -> tuple[_Options, list[str]]:
    """Split `argv` into options and arguments by the rules of Go's flag package.

    An option has one or two dashes; its value follows `=` or, except for booleans, is the next
    word.  The options end at the first argument, or at `--`.  With `mixed` they end at `--` only,
    and a negative number is an argument.
    """
    known = {name: flag for flag in flags for name in flag.names}
    options, words, args = _Options(), list(argv), []
    while words:
        word = words.pop(0)
        if not word.startswith("-") or word == "-" or (mixed and word[1:2].isdecimal()):
            args.append(word)
            if not mixed:
                break
            continue
        if word == "--":
            break
        name, separator, text = word[2 if word.startswith("--") else 1:].partition("=")
        flag = known.get(name)
        if flag is None:
            raise _MisuseError(_about_unknown(word, name, list(known), args))
        if not separator and flag.kind is bool:
            text = "true"
        elif not separator:
            if not words:
                raise _MisuseError(f"{_dashed(name)} needs a value behind it")
            text = words.pop(0)
        options.put(flag, text, name)
    return options, args + words


def _about_unknown(word: str, name: str, known: Sequence[str], args: Sequence[str]) -> str:
    text = f'there is no option "{word}"'
    if any(name in flag.names for flag in _GLOBAL_FLAGS):
        return f"{text} here: {_dashed(name)} stands before the command"
    if any(name in flag.names for command in _COMMANDS.values() for flag in command.flags):
        if "endpoints" in known:
            return f"{text} here: {_dashed(name)} stands behind the command"
    hint = "; put -- in front of a value that begins with a dash" if args else ""
    return text + (_did_you_mean(name, known, _dashed) or hint)


def _did_you_mean(word: str, known: Iterable[str], show: Callable[[str], str] = str) -> str:
    import difflib

    found = difflib.get_close_matches(word, list(known), 1)
    return f"; did you mean {show(found[0])}?" if found else ""


# -- the client of a command


def _show_request(method: str, url: str, form: bytes | None) -> None:
    """Print a request on stderr as a curl command (--debug)."""
    data = f' -d "{form.decode()}"' if form else ""
    _print_error(f"cURL Command: curl -X {method} {url}{data}")


def _ask_password(prompt: str) -> str:
    if sys.stdin.isatty():
        return getpass.getpass(prompt)
    _print(prompt)
    return sys.stdin.readline().rstrip("\n")


def _split_user(text: str, prompt: str) -> tuple[str, str]:
    name, separator, password = text.partition(":")
    return name, password if separator else _ask_password(prompt)


def _cluster_asked(settings: _Options) -> dict[str, Any]:
    """Return the endpoints as arguments of Client, by the precedence of etcdctl 2.3."""
    chosen, source, where = CLI_ENDPOINTS, "", "endpoints"
    for flag in ("discovery-srv", "endpoints", "endpoint", "peers"):
        variable = "ETCDCTL_" + flag.upper().replace("-", "_")
        for name, text in (
                (_dashed(flag), settings.text(flag)), (variable, os.environ.get(variable, ""))):
            if text and not source:
                chosen, source = text, name
                where = "srv_domain" if flag == "discovery-srv" else "endpoints"
            elif text and text != chosen and name != variable:
                _print_error(f"pyetcdctl: {name} is not used: {source} is stronger")
    return {where: chosen if where == "srv_domain" else chosen.split(",")}


class _Access(NamedTuple):
    """Credentials and time limits for the members of a cluster."""

    options: dict[str, Any]                         # keywords of Client
    debug: bool = False

    @classmethod
    def from_settings(cls, settings: _Options, *, environment: bool = True) -> _Access:
        """Return the access from flags and ETCDCTL_* variables; ask for a missing password."""
        user, certificate, key, authorities = (
            settings.text(flag, "ETCDCTL_" + flag.upper().replace("-", "_") if environment else "")
            for flag in ("username", "cert-file", "key-file", "ca-file"))
        if environment and user and ":" not in user and os.environ.get("ETCDCTL_PASSWORD"):
            user += ":" + os.environ["ETCDCTL_PASSWORD"]
        if key and not certificate:
            flag = "--cert-file" if environment else "--dest-cert"
            raise _ExitError(f"pyetcdctl: the key {key} is of no use without {flag}")
        for path in filter(None, (certificate, key, authorities)):
            try:                                    # also for http, which would not read it
                open(path, "rb").close()
            except OSError as error:
                raise _ExitError(f"open {path}: {str(error.strerror).lower()}") from error
        name, password = _split_user(user, "Password: ") if user else (None, None)
        request_s = settings.seconds("timeout", 1.0)
        return cls({
            "connect_timeout": request_s or math.inf, "read_timeout": request_s, "retry": False,
            "total_timeout": settings.seconds("total-timeout", 5.0) or None,
            "cert": (certificate, key) if key else certificate or None,
            "ca_cert": authorities or None, "username": name, "password": password,
        }, settings.on("debug"))

    def client(self, **where: Any) -> Client:
        try:
            client = Client(**where, **self.options)
        except (ValueError, OSError) as error:      # an endpoint, a certificate, a DNS server
            raise _ExitError(str(error)) from error
        if self.debug:
            client.on_request = _show_request
        return client


def _given_client(settings: _Options, access: _Access) -> Client:
    where = _cluster_asked(settings)
    client = access.client(**where)

    # An endpoint behind the first may belong to another cluster, or to the discovery service.
    def report(state: ConnectionState) -> bool:
        first, current = client.endpoints.urls[0], client.endpoints.current
        if state is ConnectionState.CONNECTED and current != first:
            _print_error(f"pyetcdctl: answered by {current}, not by {first}")
        return state is ConnectionState.CONNECTED   # then the listener is removed

    if len(where.get("endpoints", ())) > 1:
        client.add_listener(report)
    return client


def _synced_client(settings: _Options, access: _Access) -> Client:
    """Return a client for the client URLs that the members publish, in random order."""
    client, debug = _given_client(settings, access), settings.on("debug")
    if settings.on("no-sync"):
        return client
    given = ",".join(client.endpoints.urls)
    if debug:
        _print_error(f"start to sync cluster using endpoints({given})")
    try:
        urls = [url for member in client.member_list() for url in member.client_urls]
    except EtcdError as error:
        code = Exit.BAD_CONNECTION if is_endpoint_failure(error) else Exit.SERVER_ERROR
        raise _ExitError(_error_lines(error), code) from error
    if all(url.startswith("https:") for url in client.endpoints.urls):
        urls = [url for url in urls if url.startswith("https:")]    # no passwords in clear
    if not urls:
        raise _ExitError(
            "etcd cluster has no published client endpoints.\nTry '--no-sync' if you want to "
            f"access non-published client endpoints({given}).\nError:  client: no endpoints "
            "available", Exit.SERVER_ERROR)
    random.shuffle(urls)
    client.endpoints = Endpoints(urls)
    if debug:
        _print_error(f"got endpoints({','.join(urls)}) after sync")
    return client


class _Run:
    """One invocation: the argument of a command function."""

    def __init__(self, settings: _Options, options: _Options, args: list[str],
                 behind: list[str] | None = None) -> None:
        self.settings = settings                    # the global options
        self.options = options                      # of the command
        self.args = args                            # all arguments
        self.behind = behind                        # the arguments behind `--`, if there is one
        self.output = settings.text("output") or "simple"
        self._client: Client | None = None      # created on first use

    @functools.cached_property
    def access(self) -> _Access:
        return _Access.from_settings(self.settings)

    @property
    def client(self) -> Client:
        return self.connect()

    def connect(self, make: Callable[[_Options, _Access], Client] = _synced_client) -> Client:
        if self._client is None:
            self._client = make(self.settings, self.access)
            if self.settings.on("debug"):
                _print_error(f"Cluster-Endpoints: {', '.join(self._client.endpoints.urls)}")
        return self._client

    def close(self) -> None:
        if self._client is not None:
            self._client.close()

    def key(self) -> str:
        if not self.args:
            raise _ExitError("Error:  key required")
        return self.args[0]

    def value(self) -> str:
        if len(self.args) > 1:
            return self.args[1]
        data = sys.stdin.buffer.read()
        if not data:
            raise _ExitError("Error:  value required")
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise _ExitError(_NOT_TEXT.format("the value on stdin")) from error

    def ttl(self) -> int | None:
        """Return --ttl; 0 and less mean no ttl, as in etcdctl."""
        return max(0, self.options.number("ttl")) or None

    def conditions(self, value_flag: str, index_flag: str) -> dict[str, Any]:
        given = {"prevValue": self.options.text(value_flag),
                 "prevIndex": self.options.number(index_flag)}
        return {name: value for name, value in given.items() if value}

    def print_result(self, result: Result) -> None:
        _print_result(result, self.output)

    def print_unless_silent(self, result: Result) -> None:
        if not result.node.dir or self.output != "simple":
            self.print_result(result)


# -- the table of commands, and the way into it


_CommandFunction = Callable[[_Run], Optional[int]]      # None: Exit.OK
_FORMATS = ("simple", "extended", "json")


class _Command(NamedTuple):
    usage: str
    help: str
    flags: tuple[_Flag, ...]
    run: _CommandFunction
    formats: tuple[str, ...]    # accepted for --output
    wrong: str                  # etcdctl's message for a wrong number of arguments
    own: bool                   # not in etcdctl 2.3, or not with these options
    mixed: bool                 # options may follow arguments

    def words(self) -> tuple[int, float]:
        """Return the least and the greatest number of arguments."""
        words = [word for word in self.usage.split() if word[0] in "<[" and word != "[options]"]
        return (sum(word[0] == "<" for word in words),
                len(words) if self.mixed and "..." not in self.usage else math.inf)


_COMMANDS: dict[str, _Command] = {}                 # by name: "get", "member list"; help's order

_HELP = _Flag(("help", "h"), bool, "show help")

_GROUPS = {
    "member": "list, add, remove and update members", "user": "users and their roles",
    "role": "roles and what they permit", "auth": "turn authentication on and off",
}

_GLOBAL_FLAGS = (
    _Flag(("debug",), bool, "show endpoints, and requests as curl commands, on stderr"),
    _Flag(("no-sync",), bool, "use the endpoints given, not those that the members publish"),
    _Flag(("output", "o"), str, f"how to print results: {', '.join(_FORMATS)}"),
    _Flag(("discovery-srv", "D"), str, "domain whose SRV records name the endpoints"),
    _Flag(("peers", "C"), str, "older name of --endpoints"),
    _Flag(("endpoint",), str, "older name of --endpoints"),
    _Flag(("endpoints",), str, f"addresses of members, comma between (default: {CLI_ENDPOINTS})"),
    _Flag(("cert-file",), str, "client certificate for https"),
    _Flag(("key-file",), str, "key of the client certificate"),
    _Flag(("ca-file",), str, "certificates of authorities that servers are checked with"),
    _Flag(("username", "u"), str, "user[:password]; a password that is not given is asked for"),
    _Flag(("timeout",), float, "time for a member to answer (default: 1s; 60s for long work)"),
    _Flag(("total-timeout",), float, "time for a call over all (default: 5s; 60s for long work)"),
    _HELP,
    _Flag(("version", "v"), bool, "print the version"),
)


def _command(name: str, arguments: str, help: str, *flags: _Flag,
             formats: tuple[str, ...] = _FORMATS[:1], wrong: str = "", own: bool = False,
             mixed: bool = True) -> Callable[[_CommandFunction], _CommandFunction]:
    def enter(function: _CommandFunction) -> _CommandFunction:
        usage = " ".join(filter(None, (name, "[options]" if flags else "", arguments)))
        accepted = tuple(flag._replace(least=1) if own and flag.kind in (str, list) else flag
                         for flag in flags)
        _COMMANDS[name] = _Command(usage, help, accepted, function, formats, wrong, own, mixed)
        return function
    return enter


_keys_command = functools.partial(_command, formats=_FORMATS)    # prints replies of the keys API


def _aligned(rows: Sequence[tuple[str, str]]) -> list[str]:
    width = max((len(left) for left, _ in rows), default=0)
    return [f"   {left:{width}}  {right}" for left, right in rows]


def _dashed(name: str) -> str:
    return ("-" if len(name) == 1 else "--") + name


def _flag_lines(flags: Sequence[_Flag]) -> list[str]:
    return _aligned([(", ".join(map(_dashed, flag.names))
                      + ("" if flag.kind is bool else " value"), flag.help) for flag in flags])


def _command_names(group: str = "") -> list[tuple[str, str]]:
    """Return (name, help) of all commands, a group as one; or of those in a group."""
    if group:
        return [(name[len(group) + 1:], command.help) for name, command in _COMMANDS.items()
                if name.startswith(group + " ")]
    firsts = dict.fromkeys(name.split()[0] for name in _COMMANDS)
    return [(name, _GROUPS[name] if name in _GROUPS else _COMMANDS[name].help) for name in firsts]


def _print_help(group: str = "") -> None:
    name = f"pyetcdctl {group}".strip()
    lines = ["NAME:", f"   {name} - {_GROUPS.get(group, 'A command line client of etcd v2.')}", "",
             "USAGE:", f"   {name} [options] command [command options] [arguments...]", "",
             "COMMANDS:", *_aligned(_command_names(group)), ""]
    _print("\n".join([*lines, "GLOBAL OPTIONS:", *_flag_lines(_GLOBAL_FLAGS)]))


def _print_command_help(name: str) -> None:
    command = _COMMANDS[name]
    lines = ["NAME:", f"   pyetcdctl {name} - {command.help}", "", "USAGE:",
             f"   pyetcdctl {command.usage}", "", "OPTIONS:", *_flag_lines((*command.flags, _HELP))]
    _print("\n".join(lines))


def _run_command(name: str, words: Sequence[str], settings: _Options) -> int:
    command, behind = _COMMANDS[name], None
    for word in words if name not in _WITH_PATHS else ():
        if word.encode("utf-8", "replace").decode() != word:    # bytes of sys.argv
            raise _ExitError(_NOT_TEXT.format(f'"{word}"'))
    if command.mixed and "--" in words:
        at = words.index("--")
        words, behind = words[:at], list(words[at + 1:])
    try:
        options, args = _parse_flags(words, (*command.flags, _HELP), mixed=command.mixed)
    except _MisuseError as error:
        _print("Incorrect Usage.\n")
        _print_command_help(name)
        _print_error(f"pyetcdctl {name}: {error}")
        return Exit.BAD_ARGS if command.own else Exit.MISUSE
    if options.on("help"):
        _print_command_help(name)
        return Exit.OK
    run = _Run(settings, options, args + (behind or []), behind)
    _check_line(name, command, run)
    with contextlib.closing(run):
        return command.run(run) or Exit.OK


def _check_line(name: str, command: _Command, run: _Run) -> None:
    """Raise _ExitError for words that the command would ignore."""
    least, most = command.words()
    surplus = run.args[int(most):] if most < math.inf else []
    given = run.args[:least]
    if name.split()[0] in ("user", "role") and given:
        given = [text for text in given if text.partition(":")[0] not in ("", ".", "..")]
    if command.wrong and (surplus or len(list(filter(None, given))) < least):
        too_many = f'; "{surplus[0]}" is one word too many' if surplus and least else ""
        raise _ExitError(command.wrong + too_many)
    if surplus:
        quoting = " (a value with spaces needs quotes)" if "value" in command.usage else ""
        if surplus[0] in _BOOLEANS and any(run.options.on(flag.names[0]) for flag in command.flags
                                           if flag.kind is bool):
            quoting = f" (a switch takes {surplus[0]} behind =)"
        raise _ExitError(f'pyetcdctl {name}: "{surplus[0]}" is one word too many{quoting}; '
                         f"usage: pyetcdctl {command.usage}")
    # etcdctl reports an unknown format, but only after the request.
    if run.output not in command.formats and (
            run.output in _FORMATS or command.formats != _FORMATS):
        raise _ExitError(f"pyetcdctl {name}: --output {run.output} is not possible here, only "
                         f"{' and '.join(command.formats)}")


_WITH_PATHS = ("backup", "import", "mirror", "exec-watch", "completion")    # paths: any bytes
_OTHER_NAMES = {"put": "set", "del": "rm", "delete": "rm", "remove": "rm", "list": "ls",
                "endpoint": "cluster-health", "health": "cluster-health"}


def _dispatch(argv: Sequence[str]) -> int:
    settings, words = _parse_flags(argv, _GLOBAL_FLAGS)
    if settings.on("version"):
        _print(f"pyetcdctl version {__version__}\nBehaves as etcdctl {CLI_VERSION}")
        return Exit.OK
    asks_help, group = settings.on("help"), ""
    while words and words[0] in ("help", "h", *([] if group else _GROUPS)):
        word, *words = words
        if word in _GROUPS:
            group = word
            options, words = _parse_flags(words, (_HELP,))
        asks_help = asks_help or word not in _GROUPS or options.on("help")
    name = " ".join([group, *words[:1]]).strip()
    if not words:
        _print_help(group)
    elif name not in _COMMANDS:
        return _unknown_command(group, words[0])
    elif not asks_help:
        return _run_command(name, words[1:], settings)
    elif words[1:]:
        raise _ExitError(f'pyetcdctl help: "{words[1]}" is one word too many')
    else:
        _print_command_help(name)
    return Exit.OK


def _unknown_command(group: str, word: str) -> int:
    _print(f"No help topic for '{word}'")
    names = [name for name, _ in _command_names(group)]
    other = _OTHER_NAMES.get(word.lower(), word.lower())
    hint = f"; did you mean {other}?" if other in names else _did_you_mean(other, names)
    if word in ("true", "false"):
        hint = f"; a switch takes {word} behind ="
    _print_error(f'pyetcdctl: there is no command "{f"{group} {word}".strip()}"{hint}')
    return Exit.MISUSE


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code.

    0 success · 1 bad arguments, or a command for members, users, roles or files failed · 2 no
    server can be reached · 4 the server refused, or the request failed · 5 the cluster is
    unhealthy · 130 interrupted · 141 the output was closed

    Source: etcdctl 2.3.8.
    """
    try:
        return _dispatch(sys.argv[1:] if argv is None else argv)
    except _MisuseError as error:
        _print("Incorrect Usage.\n")
        _print_help()
        _print_error(f"pyetcdctl: {error}")
        return Exit.MISUSE
    except _ExitError as error:
        _print_error(error.line)
        return error.code
    except EtcdError as error:
        _print_error(_error_lines(error))
        return Exit.SERVER_ERROR
    except KeyboardInterrupt:
        return Exit.INTERRUPTED
    except BrokenPipeError:                         # `ls | head`: the reader has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.BROKEN_PIPE
