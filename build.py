"""Join the rooms of src/ into the two files that users copy: pyetcd.py and pyetcd_client.py.

    python build.py            write both files
    python build.py --check    write nothing; exit 1 and name the module to change if a file differs

A room is a folder of src/<program>/ and a module is a file in it.  A module imports from its own
room and from rooms above it in ROOMS, never downwards and never in a circle.  The build refuses
everything else, so that the table cannot rot.

Three modules stand beside the rooms: __init__.py (the head of the file and its public names),
one of FIRST (what a script does before its other imports) and __main__.py (the last lines).
"""

from __future__ import annotations

import ast
import builtins
import gc
import re
import stat
import sys
import textwrap
from pathlib import Path
from typing import Dict, FrozenSet, Iterator, List, NamedTuple, Set, Tuple, Union

ROOT = Path(__file__).resolve().parent
SHEBANG = "#!/usr/bin/env python3"
NOTICE = "# Built from src/ by build.py: change it there."
PYTHON_MIN = (3, 9)                     # as in pyproject.toml
# What older Pythons say.  They compile the whole file first, so its syntax is that of SYNTAX_MAX:
# no walrus, no `/` among the parameters, no future import of annotations.
SYNTAX_MAX = (3, 6)
CHECK = """\
import sys

if sys.version_info < {minimum}:
    _why = "{program} needs Python {wanted} or later, and this is " + sys.version.split()[0]
    if __name__ == "__main__":
        sys.exit(_why)
    raise ImportError(_why) from None   # {program} needs Python {wanted} or later"""
RULE, THIN_RULE = "# " + "=" * 76, "# " + "-" * 76

# The rooms of each program, from the first in its file to the last, and what each holds.
ROOMS: Dict[str, Dict[str, str]] = {
    "pyetcd": {
        "base": "limits, errors, ids, paths, checksums, logging, the wire codec",
        "raft": "progress and quorum, log, replication, the core",
        "store": "events, watchers, history, the key tree, time to live",
        "disk": "write-ahead log, snapshot files, the data directory",
        "net": "reactor, TLS, HTTP messages, HTTP server, HTTP calls, DNS",
        "peer": "frames, links, transport",
        "member": "cluster, applier, journal, auth records, statistics, the server object",
        "api": "keys, members, status, auth, snapshot, discovery service, the table of paths",
        "life": "discovery, bootstrap, embedding, proxy, flags, tools, dev, test kit, command line",
    },
    "pyetcd_client": {
        "transport": "errors, results, endpoints, connections, calls",
        "client": "verbs, watching, users, the Client class",
        "recipes": "leases, locks, queues, caches, services",
        "ctl": "the command line: options, output, etcdctl's commands and more",
    },
}
# Rooms above that a room of the server must not know either.
UNKNOWN_ROOMS = {
    "store": {"raft"},
    "disk": {"raft", "store"},
    "net": {"raft", "store", "disk"},
    "peer": {"store", "disk"},
}
# Rooms that use of other rooms only what has no underscore.
OUTSIDERS = {"ctl"}
# What a program may import beside the standard library.
THIRD_PARTY: Dict[str, Set[str]] = {"pyetcd": set(), "pyetcd_client": {"requests", "urllib3"}}
FOR_TYPES = {"typing_extensions"}       # below `if TYPE_CHECKING:` too: every checker brings it
# What a room of the server must not import, by the first part of the name.
_CHANCE_AND_CLOCKS = frozenset({"datetime", "random", "secrets", "time"})
_NETWORK = frozenset({"asyncio", "http", "selectors", "socket", "socketserver", "ssl"})
_THREADS = frozenset({"concurrent", "multiprocessing", "queue", "threading"})
_SYSTEM = frozenset({"fcntl", "logging", "os", "shutil", "signal", "subprocess", "sys"})
UNKNOWN: Dict[str, FrozenSet[str]] = {
    "raft": _CHANCE_AND_CLOCKS | _NETWORK | _THREADS | _SYSTEM,
    "store": _CHANCE_AND_CLOCKS - {"datetime"} | _NETWORK | _THREADS | _SYSTEM,
    "disk": _CHANCE_AND_CLOCKS | _NETWORK | _THREADS,
}

FIRST = {"pyetcd": "fresh_image", "pyetcd_client": "without_requests"}

Key = Tuple[str, str]       # room ("" beside the rooms) and module


class BuildError(Exception):
    """The sources break a rule.  The text names file and line."""


class Module(NamedTuple):
    """One source file; `uses` maps a module to the line that imports it and the names taken."""

    key: Key
    path: Path
    title: str                              # first line of the docstring
    notes: str                              # the rest of it
    body: str                               # without docstring and imports
    defines: List[str]
    outside: Set[str]                       # imports of packages, one name each
    for_types: Set[str]                     # those below `if TYPE_CHECKING:`
    uses: Dict[Key, Tuple[int, List[str]]]


def error_at(path: Path, line: int, sentence: str) -> BuildError:
    """Return the error for a line of a source file."""
    return BuildError(f"{path.relative_to(ROOT).as_posix()}:{line}: {sentence}")


def read_module(program: str, path: Path) -> Module:
    """Read one source file, and refuse imports that its room must not have."""
    text = path.read_text(encoding="utf-8")
    try:
        tree = ast.parse(text, str(path), feature_version=SYNTAX_MAX)
    except SyntaxError as error:
        raise error_at(path, error.lineno or 1, str(error.msg)) from None
    room = "" if path.parent.name == program else path.parent.name
    title, _, notes = (ast.get_docstring(tree) or "").partition("\n")
    if not title:
        raise error_at(path, 1, "a module begins with a docstring that says what it holds")
    module = Module((room, path.stem), path, title, notes.strip("\n"), "", [], set(), set(), {})
    dropped: Set[int] = set(range(1, (tree.body[0].end_lineno or 1) + 1))
    at_top: Set[ast.stmt] = set()
    for node in tree.body[1:]:
        is_for_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        imports: List[ast.stmt] = node.body if isinstance(node, ast.If) and is_for_types else [node]
        if all(isinstance(statement, (ast.Import, ast.ImportFrom)) for statement in imports):
            dropped.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
            at_top.update(imports)
            for statement in imports:
                read_import(program, module, statement, for_types=is_for_types)
        else:                           # also what is defined for type checkers only
            module.defines.extend(bound_names(node))
    for inner in statements(tree):
        if isinstance(inner, ast.ImportFrom) and inner.level and inner not in at_top:
            raise error_at(path, inner.lineno, "an import from src/ stands at the top")
    lines = [line for number, line in enumerate(text.splitlines(), 1) if number not in dropped]
    return module._replace(body=put_files("\n".join(lines).strip("\n"), path))


def statements(node: ast.AST) -> Iterator[ast.stmt]:
    """Yield all statements below a node; expressions, most of a tree, are passed over."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.expr):
            if isinstance(child, ast.stmt):
                yield child
            yield from statements(child)


def put_files(body: str, path: Path) -> str:
    """Return a module's text with the files that it names in it: `NAME = ""   # folder/file`."""
    def put(match: re.Match[str]) -> str:
        text = (path.parent / match[2]).read_text(encoding="utf-8")
        if "'''" in text or text.endswith("\\"):
            raise error_at(path.parent / match[2], 1, "a file with ''' cannot be put in")
        return f"{match[1]} = r'''{text}'''"

    return re.sub(r'^([A-Z_]+) = ""\s+# (\w+/[\w.]+)$', put, body, flags=re.M)


def read_import(program: str, module: Module, node: ast.stmt, *, for_types: bool) -> None:
    """Note one import statement of a module, or refuse it."""
    outside = module.for_types if for_types else module.outside
    if isinstance(node, ast.Import):
        for alias in node.names:
            check_outside(program, module, node.lineno, alias.name, for_types)
            outside.add(f"import {alias.name}" + (f" as {alias.asname}" if alias.asname else ""))
        return
    assert isinstance(node, ast.ImportFrom)
    source = node.module or ""
    if not node.level:
        check_outside(program, module, node.lineno, source, for_types)
        outside.update(
            f"from {source} import {alias.name}" + (f" as {alias.asname}" if alias.asname else "")
            for alias in node.names)
        return
    room = module.key[0]
    parts = [room] * (node.level == 1 and bool(room)) + source.split(".")
    if len(parts) != 2 or node.level != (2 if room and parts[0] != room else 1):
        raise error_at(module.path, node.lineno,
                       "name the module, as in `from ..raft.log import RaftLog`")
    if any(alias.asname for alias in node.names):
        raise error_at(module.path, node.lineno, "an import from src/ has no `as`")
    rooms = list(ROOMS[program])
    if (parts[0] not in rooms or (room and rooms.index(parts[0]) > rooms.index(room))
            or parts[0] in UNKNOWN_ROOMS.get(room, ())):
        raise error_at(module.path, node.lineno, f"the room {room} must not know {parts[0]}")
    private = [alias.name for alias in node.names if alias.name.startswith("_")
               and not alias.name.startswith("__")]
    if private and room in OUTSIDERS and parts[0] != room:
        raise error_at(module.path, node.lineno,
                       f"the room {room} must not know {private[0]} of {parts[0]}")
    names = module.uses.setdefault((parts[0], parts[1]), (node.lineno, []))[1]
    names.extend(alias.name for alias in node.names)


def check_outside(program: str, module: Module, line: int, name: str, for_types: bool) -> None:
    """Refuse a package that the program or the room must not know."""
    top = name.split(".")[0]
    if top in UNKNOWN.get(module.key[0], ()) and program == "pyetcd":
        raise error_at(module.path, line, f"the room {module.key[0]} must not know {top}")
    standard = getattr(sys, "stdlib_module_names", None)        # since Python 3.10
    known = THIRD_PARTY[program] | (FOR_TYPES if for_types else set())
    if standard is not None and top not in standard and top not in known:
        raise error_at(module.path, line, f"{program}.py must not need {top}")


def bound_names(node: ast.stmt) -> Iterator[str]:
    """Yield the names that a top-level statement binds, inside `if`, `for` and `try` too."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        yield node.name
    elif isinstance(node, (ast.Import, ast.ImportFrom)):
        yield from (alias.asname or alias.name for alias in node.names)
    elif isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        for part in (part for target in targets for part in ast.walk(target)):
            if isinstance(part, ast.Name):
                yield part.id
    else:
        for field in ("body", "handlers", "orelse", "finalbody"):
            for inner in getattr(node, field, []):
                yield from bound_names(inner)


def read_program(program: str) -> Dict[Key, Module]:
    """Read all modules of a program; check that what they import from each other exists, once."""
    top = ROOT / "src" / program
    paths = [path for path in sorted(top.rglob("*.py"))
             if path.parent == top or path.name != "__init__.py"]
    modules = [read_module(program, path) for path in paths]
    found = {module.key: module for module in modules}
    owner: Dict[str, Key] = {}
    for module in modules:
        for name in dict.fromkeys(module.defines):
            if owner.setdefault(name, module.key) != module.key:
                other = found[owner[name]].path.relative_to(ROOT).as_posix()
                raise error_at(module.path, 1, f"{name} is defined in {other} too")
        for key, (line, names) in module.uses.items():
            missing = [name for name in names if key not in found or name not in found[key].defines]
            if missing:
                where = "/".join(key)
                raise error_at(module.path, line, f"{where}.py does not define {missing[0]}")
    return found


def in_order(program: str, modules: Dict[Key, Module]) -> List[Module]:
    """Return the modules of all rooms so that each follows what it imports."""
    ordered: Dict[Key, Module] = {}
    for room in ROOMS[program]:
        waiting = [module for key, module in sorted(modules.items()) if key[0] == room]
        while waiting:
            ready = next((module for module in waiting if not any(
                key not in ordered for key in module.uses)), None)
            if ready is None:
                circle = ", ".join(module.path.relative_to(ROOT).as_posix() for module in waiting)
                raise BuildError(f"these modules import each other in a circle: {circle}")
            ordered[ready.key] = ready
            waiting.remove(ready)
    return list(ordered.values())


def write_imports(statements: Set[str]) -> str:
    """Return import statements, `import x` before `from x import y`, each as short as it can be."""
    plain = sorted(line for line in statements if line.startswith("import "))
    taken: Dict[str, List[str]] = {}
    for line in sorted(statements.difference(plain)):
        source, _, name = line[len("from "):].partition(" import ")
        taken.setdefault(source, []).append(name)
    lines = list(plain)
    for source, names in taken.items():
        line = f"from {source} import {', '.join(names)}"
        lines += [line] if len(line) <= 100 else [
            f"from {source} import (", *(f"    {name}," for name in names), ")"]
    return "\n".join(lines)


def banner(program: str, module: Module) -> str:
    """Return the lines that stand above a module in the built file."""
    lines = [RULE, f"# {'/'.join(module.key)} -- {module.title}"]
    if module.notes:
        lines += [THIN_RULE, *(f"# {line}".rstrip() for line in module.notes.splitlines())]
    return "\n".join([*lines, RULE])


def index(program: str, modules: List[Module]) -> str:
    """Return the list of rooms and modules for the head of the file."""
    lines = ["Rooms and their modules, bottom up; each uses only names defined above it:", ""]
    for room in ROOMS[program]:
        names = ", ".join(module.key[1] for module in modules if module.key[0] == room)
        lines += textwrap.wrap(f"{room + ':':<{max(map(len, ROOMS[program])) + 1}} {names}", 96,
                               initial_indent="  ", subsequent_indent=" " * 12)
    return "\n".join(lines)


def build(program: str) -> str:
    """Return the text of a program's one file."""
    modules = read_program(program)
    ordered = in_order(program, modules)
    head, last = modules.pop(("", "__init__")), modules.pop(("", "__main__"))
    first = modules.pop(("", FIRST[program]))
    beside = [key for key in modules if not key[0]]
    if beside:
        raise error_at(modules[beside[0]].path, 1, "a module stands in a room")
    outside: Set[str] = set().union(*(module.outside for module in [head, *ordered, last]))
    for_types: Set[str] = set().union(*(module.for_types for module in ordered))
    dropped = {"from __future__ import annotations", "import sys"}
    notes = head.notes.replace("@INDEX@", index(program, ordered))
    check = CHECK.format(minimum=PYTHON_MIN, wanted=".".join(map(str, PYTHON_MIN)),
                         program=program)
    parts = [f'{SHEBANG}\n"""{head.title}\n{notes}\n"""\n\n{NOTICE}', check]
    own = first.outside - dropped
    parts += [write_imports(own), first.body, write_imports(outside - own - dropped)]
    if for_types:
        parts.append("if TYPE_CHECKING:\n" + textwrap.indent(write_imports(for_types), "    "))
    parts.append(head.body)
    text = "\n\n".join(part for part in parts if part)
    for module in ordered:
        text += f"\n\n\n{banner(program, module)}\n\n\n{module.body}"
    return quote_annotations(f"{text}\n\n\n{last.body}\n")


class Annotations(ast.NodeVisitor):
    """Finds the annotations of a program that must be quoted where Python evaluates them.

    That is when the `def` runs.  At the top of the file and in classes there, an annotation stays
    as it is if all its names are defined above and only names of typing have brackets.  Functions
    in functions are defined again and again: all their annotations are quoted, which costs nothing.

    known  names that can be used now; grows with the program
    """

    def __init__(self) -> None:
        self.known = set(dir(builtins))
        self.typing: Set[str] = set()   # those of the module typing
        self.late: List[ast.expr] = []
        self._own: Set[str] = set()     # names of the class around: they hide others
        self._depth = 0                 # functions around

    def generic_visit(self, node: ast.AST) -> None:
        """Look into all but expressions, which have no annotations."""
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, ast.expr):
                self.visit(child)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        """Look into a class."""
        around, self._own = self._own, {name for each in node.body for name in bound_names(each)}
        self.generic_visit(node)
        self._own = around

    def visit_FunctionDef(self, node: Union[ast.FunctionDef, ast.AsyncFunctionDef]) -> None:
        """Look at parameters and result, then into the body."""
        parameters = node.args
        for each in (*parameters.args, *parameters.kwonlyargs, parameters.vararg,
                     parameters.kwarg):
            self._look(each.annotation if each is not None else None)
        self._look(node.returns)
        self._depth += 1
        for statement in node.body:
            self.visit(statement)
        self._depth -= 1

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        """Annotations of variables are not evaluated inside functions."""
        if not self._depth:
            self._look(node.annotation)

    def _look(self, annotation: Union[ast.expr, None]) -> None:
        if annotation is None or isinstance(annotation, ast.Constant):
            return
        parts = list(ast.walk(annotation))
        names = {part.id for part in parts if isinstance(part, ast.Name)}
        generic = {ast.unparse(part.value) for part in parts if isinstance(part, ast.Subscript)}
        if (self._depth or names - self.known or names & self._own or generic - self.typing
                or any(isinstance(part, ast.BinOp) for part in parts)):
            self.late.append(annotation)


def quote_annotations(text: str) -> str:
    """Return a program that needs no future import: annotations that name what is defined below
    them, or for type checkers only, are put into quotes."""
    found = Annotations()
    for node in ast.parse(text).body:
        found.visit(node)
        if isinstance(node, ast.ImportFrom) and node.module == "typing":
            found.typing.update(bound_names(node))
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            found.known.update(name.split(".")[0] for name in bound_names(node))
    lines = text.encode("utf-8").split(b"\n")
    for late in sorted(found.late, key=lambda late: (late.lineno, late.col_offset), reverse=True):
        first, last = late.lineno - 1, (late.end_lineno or late.lineno) - 1
        quoted = '"' + ast.unparse(late).replace('"', "'") + '"'
        tail = lines[last][late.end_col_offset or 0:]
        lines[first:last + 1] = [lines[first][:late.col_offset] + quoted.encode("utf-8") + tail]
    return b"\n".join(lines).decode("utf-8")


def first_difference(program: str, built: str, found: str) -> str:
    """Return one sentence that names the module to change."""
    built_lines, found_lines = built.splitlines(), found.splitlines()
    at = next((number for number, pair in enumerate(zip(built_lines, found_lines))
               if pair[0] != pair[1]), min(len(built_lines), len(found_lines)))
    source = f"src/{program}/__init__.py"
    for above, line in zip(built_lines, built_lines[1:at + 1]):
        title = re.match(r"# (\w+/\w+) -- ", line)
        if title and above == RULE:
            source = f"src/{program}/{title[1]}.py"
    return f"{program}.py:{at + 1} is not what src/ builds: change {source} and run build.py"


def main(words: List[str]) -> int:
    """Build or check both files; return the exit code."""
    if words not in ([], ["--check"]):
        sys.stderr.write(__doc__ or "")
        return 2
    status = 0
    for program in ROOMS:
        target = ROOT / f"{program}.py"
        try:
            text = build(program)
        except BuildError as error:
            sys.stderr.write(f"{error}\n")
            return 1
        if not words:
            target.write_bytes(text.encode("utf-8"))
            target.chmod(0o755)
        elif not target.exists() or target.read_text(encoding="utf-8") != text:
            found = target.read_text(encoding="utf-8") if target.exists() else ""
            sys.stderr.write(first_difference(program, text, found) + "\n")
            status = 1
        elif not target.stat().st_mode & stat.S_IXUSR:
            sys.stderr.write(f"{program}.py is not executable: run build.py\n")
            status = 1
    return status


if __name__ == "__main__":
    gc.disable()                        # the trees live to the end: a third of the time
    sys.exit(main(sys.argv[1:]))
