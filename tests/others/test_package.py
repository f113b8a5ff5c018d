"""What pip installs: the programs, and for type checkers the types of both modules."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import Callable, Dict

import pytest

import pyetcd
from tests.kit.basics import ROOT

_TOOLS = {"basedpyright": 1, "mypy": 1, "pip": 23, "requests": 2, "setuptools": 77}
_PARTS = ["pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "build.py",
          "pyetcd.py", "pyetcd_client.py", "pyetcd_pytest.py", "test_pyetcd.py", "src", "testdata",
          "tests", "docs"]

# What users write.  Checkers must refuse the lines that are marked, for that reason, and no other.
_SAMPLE = '''
from __future__ import annotations

from typing import List, Optional, Tuple

from typing_extensions import assert_type

import pyetcd
import pyetcd_client
from pyetcd_client import Client, CompareFailed, Election, KeyNotFound, Lock, ServiceRegistry


def test_fixtures(
    etcd_server: pyetcd.LocalMember, etcd_cluster: pyetcd.LocalCluster,
    etcd_cluster_factory: pyetcd.ClusterFactory,
) -> None:
    etcd_server.restart()
    etcd_server.restrat()                                           # wrong: restrat
    etcd_cluster.wait_leader().kill()
    assert_type(etcd_cluster.wait_leader().client_url, str)
    assert_type(etcd_cluster_factory(5, history_events=100), pyetcd.LocalCluster)
    etcd_cluster_factory(5, history_event=100)                      # wrong: history_event


def servers() -> None:
    pyetcd.Server(nosuch=1)                                         # wrong: nosuch
    pyetcd.Server(snapshot_count="many")                            # wrong: snapshot_count
    pyetcd.ProxyServer(nosuch=1)                                    # wrong: nosuch
    pyetcd.LocalMember("a", nosuch=1)                               # wrong: nosuch
    pyetcd.LocalCluster(3, nosuch=1)                                # wrong: nosuch
    pyetcd.restore("x.snap", "a", nosuch=1)                         # wrong: nosuch
    with pyetcd.LocalCluster(3, election_ms=500) as cluster:
        assert_type(cluster.client_urls, Tuple[str, ...])
    with pyetcd.Server(name="a", listen_client_urls=["http://127.0.0.1:0"]) as server:
        assert_type(server.wait_ready(), bool)
        use(Client(server.client_urls))


def use(client: Client) -> None:
    client.set("x")                                                 # wrong: value
    Client.from_env(nosuch=1)                                       # wrong: nosuch
    with Client.from_env(total_timeout=5) as other:
        other.delete("x")
    assert_type(client.set("x", "y", ttl=60).modified_index, int)
    found = client.get("x")
    assert_type(found.value, Optional[str])
    found.valeu                                                     # wrong: valeu
    try:
        client.compare_and_swap("x", "new", prev_value="y")
    except (CompareFailed, KeyNotFound) as error:
        error.idnex                                                 # wrong: idnex
    for event in client.watch("/config", recursive=True):
        print(event.action, event.key, event.value)
    with Lock(client, "job", ttl=5) as lock:
        lock.acquire(timeout="soon")                                # wrong: timeout
    Election(client, "job").run(use, client)
    assert_type(ServiceRegistry(client).resolve("web"), List[pyetcd_client.Instance])
'''


def _run(*words: object, cwd: Path, code: int = 0) -> str:
    """Run a command; return what it prints."""
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(list(map(str, words)), cwd=cwd, env=environ, capture_output=True,
                          text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def _python(*words: object, cwd: Path, code: int = 0) -> str:
    """Run a tool of this environment."""
    return _run(sys.executable, *words, cwd=cwd, code=code)


def _built(kind: str, tree: Path) -> Path:
    """Build as pip and others do: sdist, wheel or editable."""
    call = f"import setuptools.build_meta as made; print(made.build_{kind}(os.path.abspath('..')))"
    return tree.parent / _python("-c", f"import os; {call}", cwd=tree).splitlines()[-1]


def _install(home: Path, wheel: Path) -> None:
    _python("-m", "pip", "--python", home / "bin/python", "install", "-q", "--no-index",
            "--no-deps", "--force-reinstall", wheel, cwd=home)


def _mypy(home: Path) -> str:
    return _python("-m", "mypy", "--strict", "--cache-dir", "mypy", "--python-executable",
                   "bin/python", "sample.py", cwd=home, code=1)


def _pyright(home: Path) -> str:
    (home / "pyrightconfig.json").write_text(json.dumps({"typeCheckingMode": "strict"}))
    return _python("-m", "basedpyright", "--pythonpath", "bin/python", "sample.py",
                   cwd=home, code=1)


def _check_types(home: Path, *checkers: Callable[[Path], str]) -> None:
    """Each checker, at its strictest, refuses exactly the marked lines."""
    lines = _SAMPLE.splitlines()
    marked = {number: line.rpartition("# wrong: ")[2]
              for number, line in enumerate(lines, 1) if "# wrong: " in line}
    assert len(marked) == 13
    (home / "sample.py").write_text(_SAMPLE, encoding="utf-8")
    for check in checkers:
        output = check(home)
        said: Dict[int, str] = {}
        for line, text in re.findall(r":(\d+)(?::\d+ -|:) error: (.*)", output):
            said[int(line)] = said.get(int(line), "") + text
        assert said.keys() == marked.keys(), output
        assert all(word in said[line] for line, word in marked.items()), output


def _unpacked(archive: Path, tree: Path) -> Path:
    """Unpack a source distribution; nothing of the tree it was made of is missing."""
    home = archive.parent / "unpacked"
    home.mkdir()
    _run("tar", "-xzf", archive, cwd=home)
    (top,) = home.iterdir()
    missing = [path for path in tree.rglob("*")
               if path.is_file() and not (top / path.relative_to(tree)).exists()]
    assert not missing
    return top


def test_package_brings_programs_and_types(tmp_path: Path) -> None:
    """A wheel, out of the source distribution, in a fresh environment; then an editable install."""
    for tool, least in _TOOLS.items():
        try:
            version = importlib.metadata.version(tool)
        except importlib.metadata.PackageNotFoundError:
            version = "0"
        if int(version.partition(".")[0]) < least:
            pytest.skip(f"{tool} {least} or later is not installed: pip install '.[test]'")
    home, tree = tmp_path / "home", tmp_path / "tree"
    venv.create(home)
    tree.mkdir()
    for part in _PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, tree / part,
                            ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        elif (ROOT / part).exists():
            shutil.copy(ROOT / part, tree / part)
    _install(home, _built("wheel", _unpacked(_built("sdist", tree), tree)))
    assert pyetcd.__version__ in _run("bin/pyetcd", "-version", cwd=home)
    _check_types(home, _mypy, _pyright)
    _install(home, _built("editable", tree))
    where = _run("bin/python", "-c", "import pyetcd; print(pyetcd.__file__)", cwd=home)
    assert where.strip() == str(tree / "pyetcd.py")
    _check_types(home, _mypy)
