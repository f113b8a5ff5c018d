"""What the shipped files promise to whoever copies them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pyetcd


def test_shipped_file_alone_starts_and_tells_its_version(tmp_path: Path) -> None:
    """Copied into an empty directory, the server needs nothing else."""
    shutil.copy(pyetcd.__file__, tmp_path / "pyetcd.py")
    done = subprocess.run([sys.executable, "pyetcd.py", "-version"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert pyetcd.__version__ in done.stdout
