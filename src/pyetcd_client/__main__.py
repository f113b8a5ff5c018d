"""The last lines of the file: it runs as a program."""

from __future__ import annotations

from .ctl.program import _exit

if __name__ == "__main__":
    _exit()
