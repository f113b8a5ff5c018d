#!/usr/bin/env python3
"""Run a fuzz target of tests/test_fuzz.py under atheris, guided by coverage.

Usage: fuzz.py TARGET [options of libFuzzer, such as -max_total_time=300]

Needs the package atheris beside those of the tests.  What makes a target raise is written to
`crash-...` in the working directory; it belongs into _FUZZ_FOUND of tests/test_fuzz.py.
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import atheris  # noqa: E402

with atheris.instrument_imports(include=["pyetcd"]):
    import pyetcd  # noqa: F401
from tests import test_fuzz  # noqa: E402


def main() -> None:
    """Write the seeds where libFuzzer finds them, and run."""
    name = sys.argv[1]
    with tempfile.TemporaryDirectory() as corpus:
        for number, seed in enumerate(test_fuzz.fuzz_seeds(name)):
            (Path(corpus) / str(number)).write_bytes(seed)
        atheris.Setup([sys.argv[0], *sys.argv[2:], corpus], test_fuzz.FUZZ_TARGETS[name])
        atheris.Fuzz()


if __name__ == "__main__":
    main()
