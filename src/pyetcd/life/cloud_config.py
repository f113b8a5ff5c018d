"""The section for etcd2 in a cloud-config, which is YAML for several programs.

Source: coreos-cloudinit, config/etcd2.go: the names are those of the flags, with _ or -.
"""

from __future__ import annotations

import itertools
import re
from typing import List, NamedTuple, Sequence

from .flags import FlagError

_KEY = re.compile(r"""("[\w.-]+"|'[\w.-]+'|[\w.-]+)\s*:(?:\s+(.*))?""", re.DOTALL)
_PATH = ("coreos", "etcd2")


class _Row(NamedTuple):
    line: int                           # from 1
    indent: int                         # spaces before the text
    text: str


def etcd2_section(path: str, text: str) -> str:
    """Return `text` with the settings below coreos.etcd2 at the left, and other lines empty.

    Other sections may be any YAML: their indentation tells where they end.  Raises FlagError with
    the line and `path`.
    """
    rows = [
        _Row(line, len(row) - len(row.lstrip(" ")), row.strip(" "))
        for line, row in enumerate(text.splitlines(), 1)
        if row.strip() and not row.lstrip().startswith("#") and row.rstrip() not in ("---", "...")
    ]
    for depth, name in enumerate(_PATH):
        rows = _below(path, rows, name, ".".join(_PATH[:depth]))
    lines = [""] * len(text.splitlines())
    left = min((row.indent for row in rows), default=0)
    for row in rows:
        lines[row.line - 1] = " " * (row.indent - left) + row.text
    return "\n".join(lines)


def _below(path: str, rows: Sequence[_Row], name: str, parent: str) -> List[_Row]:
    """Return the rows of the value of `name`, one of the keys that begin at the left of `rows`."""
    found: List[List[_Row]] = []
    level = rows[0].indent if rows else 0
    for place, row in enumerate(rows):
        if row.indent > level or (place and row.text.startswith("- ") or row.text == "-"):
            continue                    # of the key before
        match = _KEY.fullmatch(row.text)
        if match is None or row.indent < level:
            form = "write `key:` or `key: value`, as far to the right as the keys beside it"
            advice = "it is indented by a tab: use spaces" if row.text.startswith("\t") else form
            raise FlagError(f"{path}:{row.line}: {row.text!r} is not understood; {advice}")
        if match.group(1).strip("\"'") != name:
            continue
        if found:
            raise FlagError(f"{path}:{row.line}: {name} is there a second time; keep one of them")
        if match.group(2) and not match.group(2).startswith("#"):
            raise FlagError(f"{path}:{row.line}: {name} is a section: its settings stand indented"
                            f" below, one on each line")
        found.append(list(itertools.takewhile(
            lambda below: below.indent > level, rows[place + 1:])))
    if not found:
        inside = f" below {parent}" if parent else ""
        raise FlagError(f"{path}: there is no section {name}{inside}; -cloud-config reads"
                        f" coreos.etcd2, as coreos-cloudinit does")
    return found[0]
