"""The message of pyetcdctl if the package requests is missing."""

from __future__ import annotations

import os
import sys

try:
    import requests  # noqa: F401
except ImportError:
    if __name__ == "__main__" or os.path.basename("".join(sys.argv[:1])) == "pyetcdctl":
        sys.exit("pyetcdctl needs the package requests: pip install requests (or, from Debian: "
                 "apt install python3-requests)")
    raise
