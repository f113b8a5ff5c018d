"""The commands beside the server: dev, backup, restore, check, dump, export, import."""

from __future__ import annotations

import json
import logging
import os
import sys
from typing import Any, Callable, Dict, Iterator, NamedTuple, Sequence, Tuple

from ..base.basics import TlsFiles
from ..base.errors import StartError
from ..base.urls import parse_urls
from ..net.workers import SYSTEM_CLOCK
from .backup import backup, restore
from .checks import check_restore_settings
from .dev import DEV_FLAGS, dev_size, run_dev
from .exchange import FORMATS, Access, export_keys, import_keys
from .flags import Flag, FlagError, flag_rows, one_of
from .inspection import Inspection, inspect_dir
from .logs import set_up_logging
from .records import parse_key_map
from .settings import Settings, url_advice
from .sources import BackupError
from .verdicts import check_json, check_lines, dump_json, dump_lines, verdicts

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
    try:
        # The variables of a member are not for `dev`: ETCD_DATA_DIR may hold real data.
        settings = Settings(words, {} if name == "dev" else os.environ, tool.flags)
        named = settings.take_words()
        if settings.help:
            _print(f"usage: pyetcd {name} {tool.words} [flags]", "", *tool.text, "",
                   *flag_lines(tool.flags))
            return 0
        settings.read_environment()
        try:
            return tool.run(named, settings, line)
        finally:
            write_warnings(settings, name)
    except FlagError as error:
        sys.stderr.write(error.line(f"pyetcd {name}"))
    except (BackupError, StartError) as error:
        line.clear()
        sys.stderr.write(f"{name}: {error}\n")
    except BrokenPipeError:             # of `| head`: nobody reads the rest
        sys.stdout = open(os.devnull, "w")
    return EXIT_FAILED


def write_warnings(settings: Settings, name: str) -> None:
    """Write the warnings about flags of a command, not about the variables of a member."""
    for level, package, text in settings.lines:
        if level >= logging.WARNING and package == "etcd":
            sys.stderr.write(f"{name}: {text}\n")
    settings.lines.clear()


def _print(*lines: str) -> None:
    sys.stdout.write("".join(line + "\n" for line in lines))


def _one_word(words: Sequence[str], name: str, meaning: str) -> str:
    if not words or not words[0]:
        raise FlagError(f"{name} is missing: {meaning}")
    if len(words) > 1:
        raise FlagError(f"'{words[1]}' is one word too many")
    return words[0]


def _options(settings: Settings, flags: Sequence[Flag]) -> Dict[str, Any]:
    return {flag.name.replace("-", "_"): settings[flag.name] for flag in flags}


# -- dev


def _run_dev(words: Sequence[str], settings: Settings, line: ProgressLine) -> int:
    size = dev_size(words[0]) if words else 0
    if words[1:]:
        raise FlagError(f"'{words[1]}' is one word too many")
    write_warnings(settings, "dev")
    set_up_logging(settings)
    if not settings["debug"] and not settings["log-package-levels"]:
        logging.getLogger("pyetcd").setLevel(logging.WARNING)
    return run_dev(settings, size)


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


def _inspected(words: Sequence[str], settings: Settings, line: ProgressLine) -> Inspection:
    path = _one_word(words, "DIR", "a data directory")
    found = inspect_dir(path, settings["wal-dir"], line.show)
    line.clear()
    return found


def _run_check(words: Sequence[str], settings: Settings, line: ProgressLine) -> int:
    found = _inspected(words, settings, line)
    if settings["json"]:
        _print(json.dumps(check_json(found), indent=2, ensure_ascii=False))
    else:
        _print(*check_lines(found))
    if found.faults:
        return EXIT_FAILED
    newer = [verdict for verdict in verdicts(found) if verdict.version >= "3.5"]
    return 0 if all(verdict.starts for verdict in newer) else EXIT_REFUSED


def _run_dump(words: Sequence[str], settings: Settings, line: ProgressLine) -> int:
    found = _inspected(words, settings, line)
    rows = (json.dumps(row, ensure_ascii=False) for row in dump_json(found))
    for text in rows if settings["json"] else dump_lines(found):
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
    if settings["username"] and ":" not in settings["username"]:
        raise FlagError(f"{settings.where('username')} has no password: write NAME:PASSWORD")
    if settings["key-file"] and not settings["cert-file"]:
        raise FlagError(f"{settings.where('key-file')} is of no use without -cert-file")
    cert, key = settings["cert-file"], settings["key-file"]
    files = TlsFiles(cert, key or cert, trusted_ca_file=settings["ca-file"])
    return Access(settings["endpoints"], files, settings["username"])


def _refuse(settings: Settings, why: str, *names: str) -> None:
    """Raise FlagError for flags without effect; a variable may be there for something else."""
    for name in names:
        if settings.is_set(name) and settings.where(name).startswith("-"):
            raise FlagError(f"-{name} has no effect {why}; leave it out")


def _run_export(words: Sequence[str], settings: Settings, line: ProgressLine) -> int:
    source = _one_word(words, "DIR", "a data directory, or a URL of a cluster") if words else ""
    access = _access(settings)
    if "://" in source:
        if access.urls:
            raise FlagError(f"'{source}' and -endpoints: name one source")
        try:
            access, source = access._replace(urls=parse_urls(source)), ""
        except ValueError as error:
            raise FlagError(f"{error}{url_advice(source, 'endpoints')}") from None
    if bool(source) == bool(access.urls):
        raise FlagError("name one source: a data directory, or a cluster with -endpoints")
    if source:
        _refuse(settings, "with a data directory", "ca-file", "cert-file", "username")
    else:
        _refuse(settings, "with a cluster", "wal-dir")
    if settings["format"] == "json":
        _refuse(settings, "with -format json, which keeps times to live", "ttl")
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
    "dev": Tool(
        "[N]", "start a cluster of N members to try things on", (
            "Start a cluster of N members, 1 unless N is given, in this process, to try things on."
            "  It", "prints where it serves.  Ctrl-C ends it and removes its data, unless"
            " -data-dir is given."), DEV_FLAGS, _run_dev),
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
