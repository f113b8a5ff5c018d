"""Settings: the values of flags, from command line, environment or configuration file."""

from __future__ import annotations

import contextlib
import json
import logging
import re
from typing import Any, Dict, Iterable, Iterator, List, Mapping, Sequence, Tuple

from ..api.forms import GO_BOOLS
from ..base.errors import DiscoveryError
from ..base.text import is_ip, load_json, most_like, split_address
from ..base.urls import check_advertised_url, parse_urls, usable_urls
from .addresses import default_route_address
from .cloud_config import etcd2_section
from .flags import (
    IGNORED_BOOLS,
    Flag,
    FlagError,
    UnsupportedFlag,
    _all_flags,
    _parse_address,
    _parse_origins,
    parse_uint,
)

ENVIRONMENT_FILE = "/etc/environment"   # of CoreOS, with COREOS_PRIVATE_IPV4


class Settings:
    """Values of flags: from the command line and the environment, or from a configuration file.

    values   flag name -> parsed value, for the flags that were given
    sources  flag name -> `-name`, `ETCD_NAME` or `<file>:<line>`
    lines    (level, package, text) to be logged once logging is set up
    flags    the flags to accept; (): those of a member

    A flag on the command line takes precedence over its variable.  Raises FlagError.
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
        self._flags_end = False         # -- has come: the rest are words
        self._take_flags()

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

    def _take_flags(self) -> None:
        while not self.help and self._next_flag():
            pass

    def _next_flag(self) -> bool:
        rest = self._rest
        if self._flags_end or not rest or not rest[0].startswith("-") or rest[0] == "-":
            return False
        word = rest.pop(0)
        if word == "--":
            self._flags_end = True
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
        before = self.values.get(name)
        self._set(flag, text, f"-{name}")
        if before is not None and before != self.values[name]:
            self.warn(f"-{name} is given more than once: only the last, {text}, counts")
        return True

    def take_words(self) -> List[str]:
        """Take all words that are no flags; flags may stand before, between and behind them."""
        words: List[str] = []
        self._take_flags()
        while self._rest and not self.help:
            word = self._rest[0]
            is_value = self._switch and (word in ("true", "false") or word in _YAML_BOOLS)
            if is_value or word[:1] in tuple(_TYPOGRAPHIC_DASHES):
                self.check_leftover()
            words.append(self._rest.pop(0))
            self._switch = ""
            self._take_flags()
        return words

    def check_leftover(self) -> None:
        if self._rest:
            word = self._rest[0]
            raise FlagError(f"error verifying flags, '{word}' is not a valid flag"
                            f"{self._leftover_advice(word)}")

    def _leftover_advice(self, word: str) -> str:
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
        if word in COMMANDS:
            return f"; write `pyetcd {word}` first and its flags behind it"
        meant = most_like(word.lower(), COMMANDS, _LIKENESS_MIN)
        if meant and not switch:
            return f"; did you mean the command `pyetcd {meant}`?"
        return f"; {word} stands behind the switch -{switch}" if switch else ""

    def _suggestion(self, prefix: str, name: str) -> str:
        """Return `; did you mean <flag>?` if a flag has a similar name, else ""."""
        known = [
            flag.name for flag in self._flags.values()
            if flag.name != name and not flag.no_effect and flag.name not in IGNORED_BOOLS
        ]
        wanted = name.lower().replace("_", "-")
        found = most_like(wanted, known, _LIKENESS_MIN)
        if not found:
            return ""
        shown = found if prefix != "ETCD_" else found.upper().replace("-", "_")
        return f"; did you mean {prefix}{shown}?"

    def complete(self) -> None:
        """Read the environment; or, if a configuration file is named, that file instead."""
        path = self["config-file"] or self._environ.get(self._flags["config-file"].variable)
        if path:
            self.read_file(path)
        else:
            self.read_environment()
            if self["cloud-config"]:
                self.read_cloud_config(self["cloud-config"])

    def read_cloud_config(self, path: str) -> None:
        """Read coreos.etcd2 of a cloud-config; flags and variables go before its settings."""
        self.lines.append((logging.INFO, "etcd", f'reading coreos.etcd2 from "{path}"'))
        given = set(self.values)
        for line, name, text in read_cloud_config(path):
            source = f"{path}:{line}"
            if name in given:
                self._log(f"{source}: {name} is unused: {self.sources[name]} goes before it")
            else:           # coreos-cloudinit replaces addresses in the whole file
                text = expand_addresses(text, self._environ, source)
                self._set_from_file(name, text, source)

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
            self._set_from_file(name, text, f"{path}:{line}")

    def _set_from_file(self, name: str, text: str, source: str) -> None:
        flag = self._flags.get(name)
        if flag is None or name in ("config-file", "cloud-config", "version"):
            self.warn(f'{source}: unknown setting "{name}" is ignored; `pyetcd -help` lists'
                      f" those that are known{self._suggestion('', name)}")
            return
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
        except (ValueError, DiscoveryError) as error:
            advice = _advice(flag, text)
            raise FlagError(_invalid(flag, text, source, str(error)) + advice) from None
        self.sources[name] = source
        if _quoting_advice(text) and name != "initial-cluster":
            self.warn(f"the value of {source} is {text!r}{_quoting_advice(text)}")

    def _log(self, text: str, level: int = logging.INFO) -> None:
        self.lines.append((level, "flags", text))


COMMANDS = ("dev", "backup", "restore", "check", "dump", "export", "import")
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
            is_gap = not item.strip() and len(text) > 1
            return "; there is a comma too many" if is_gap else "; write http://HOST:PORT"
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

    The names are those of the flags; in etcd 3's sections client-transport-security and
    peer-transport-security without `peer-`.  Empty settings are skipped.  Of YAML a flat file may
    have comments, quotes and [a, b].  Anything else raises FlagError, with file and line.
    """
    text = _read_text(path)
    read = _json_settings if text.lstrip().startswith("{") else _yaml_settings
    return _checked_settings(path, read(path, text))


def read_cloud_config(path: str) -> List[Tuple[int, str, str]]:
    """Return (line, flag, text) below coreos.etcd2; a name may have _ for -.  Raises FlagError."""
    section = _yaml_settings(path, etcd2_section(path, _read_text(path)))
    return _checked_settings(path, (
        (line, inside, key.replace("_", "-"), value) for line, inside, key, value in section
    ))


def _read_text(path: str) -> str:
    try:
        with open(path, encoding="utf-8-sig") as file:
            return file.read()
    except OSError as error:
        raise FlagError(
            f"error verifying flags, open {path}: {(error.strerror or str(error)).lower()}"
        ) from None
    except UnicodeDecodeError:
        raise FlagError(f"{path} is not text in UTF-8") from None


_Found = Tuple[int, str, str, str]      # line, section or "", key, text


def _checked_settings(path: str, settings: Iterable[_Found]) -> List[Tuple[int, str, str]]:
    """Return the settings that are not empty.  Raises FlagError for a setting given twice."""
    found: Dict[str, Tuple[int, str, str]] = {}
    for line, section, key, value in settings:
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

    They are COREOS_PRIVATE_IPV4 and COREOS_PUBLIC_IPV4 in the environment or /etc/environment; the
    default private one is that of the default route.  Raises FlagError for an unknown address.
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
