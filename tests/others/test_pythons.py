"""Older Pythons: both files say in one sentence which Python they need."""

from __future__ import annotations

import glob
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.kit.basics import ROOT

_OLD = ("3.6", "3.7", "3.8")


def _interpreter(version: str) -> str:
    """A Python of this version, of the system or of pyenv, or skip."""
    home = os.environ.get("PYENV_ROOT", os.path.expanduser("~/.pyenv"))
    for program in (*glob.glob(f"{home}/versions/{version}.*/bin/python"),
                    shutil.which(f"python{version}") or ""):
        if program and subprocess.run([program, "-c", ""], capture_output=True).returncode == 0:
            return program
    pytest.skip(f"there is no Python {version}")


def _said(program: str, *words: str) -> str:
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([program, *words], env=environ, capture_output=True, text=True)
    assert done.returncode == 1 and not done.stdout
    return done.stderr


@pytest.mark.parametrize("name", ["pyetcd", "pyetcd_client"])
@pytest.mark.parametrize("version", _OLD)
def test_pythons_that_are_too_old_get_one_sentence(version: str, name: str) -> None:
    """As a script it is all that is said; an import raises ImportError with it."""
    program = _interpreter(version)
    sentence = rf"{name} needs Python 3\.9 or later, and this is {re.escape(version)}\.\d+\n"
    assert re.fullmatch(sentence, _said(program, str(ROOT / f"{name}.py"), "-version"))
    raised = _said(program, "-c", f"import {name}").splitlines(keepends=True)[-1]
    assert re.fullmatch("ImportError: " + sentence, raised)


@pytest.mark.parametrize("name", ["pyetcd", "pyetcd_client"])
def test_pythons_without_annotations_show_the_line_that_says_so(name: str) -> None:
    """Python 2 cannot read the file, and shows the first line that it cannot read."""
    program = _interpreter("2.7")
    assert f"# {name} needs Python 3.9 or later" in _said(program, str(ROOT / f"{name}.py"))


def test_pythons_of_package_and_build_are_the_same(tmp_path: Path) -> None:
    """requires-python of the package is what the check in the files wants."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    least = re.search(r'^requires-python = ">=(\d+)\.(\d+)"', project, re.M)
    assert least
    for name in ("pyetcd", "pyetcd_client"):
        text = (ROOT / f"{name}.py").read_text(encoding="utf-8")
        assert f"if sys.version_info < ({least[1]}, {least[2]}):" in text
