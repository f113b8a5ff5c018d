"""What pyproject.toml cannot say: both modules reach type checkers too.

A single module has no place for `py.typed`.  So the wheel holds two packages of stubs (PEP 561),
copies of the built files, which checkers read in their place and programs never load.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithStubs(build_py):
    """Add pyetcd-stubs and pyetcd_client-stubs: copies, or in an editable install links."""

    def run(self) -> None:
        """Build as setuptools does, then write the stubs."""
        super().run()
        for program in self.py_modules:
            root = "." if self.editable_mode else self.build_lib
            stub = Path(root, f"{program}-stubs", "__init__.pyi")
            stub.parent.mkdir(parents=True, exist_ok=True)
            stub.unlink(missing_ok=True)
            if self.editable_mode:
                stub.symlink_to(f"../{program}.py")     # what is read is what is edited
            else:
                shutil.copyfile(f"{program}.py", stub)


setup(cmdclass={"build_py": BuildWithStubs})
