"""The last lines of the file: it is a program, too."""

from __future__ import annotations

from .ctl.program import _exit

if __name__ == "__main__":
    _exit()
