"""The last lines of the file: it is a program, too."""

from __future__ import annotations

import sys

from .ctl.program import main

if __name__ == "__main__":
    sys.exit(main())
