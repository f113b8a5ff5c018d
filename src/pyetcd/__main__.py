"""The last lines of the file: it runs as a program."""

from __future__ import annotations

import sys

from .life.command_line import main

if __name__ == "__main__":
    sys.exit(main())
