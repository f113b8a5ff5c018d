"""One of three nodes of a PySyncObj cluster; the one that leads writes, and prints what it took.

    python pysyncobj_peer.py OUTSTANDING WARM_UP_SECONDS SECONDS JOURNAL OWN_ADDRESS OTHER...
"""

from __future__ import annotations

import json
import resource
import sys
import time
from typing import Any, List

from pysyncobj import SyncObj, SyncObjConf
from pysyncobj.batteries import ReplDict

VALUE = "x" * 64
KEY_COUNT = 1_000


def main(argv: List[str]) -> None:
    """Take part for ever; as the leader, measure once."""
    outstanding, warm_up_s, seconds = int(argv[0]), float(argv[1]), float(argv[2])
    journal, own, others = argv[3], argv[4], argv[5:]
    keys = ReplDict()
    node = SyncObj(own, others, consumers=[keys], conf=SyncObjConf(journalFile=journal))
    while not (node.isReady() and node._getLeader() is not None):
        time.sleep(0.05)
    time.sleep(1.0)
    if str(node._getLeader()) == own:
        writer = Writer(keys, outstanding, warm_up_s, seconds)
        while not writer.ended:
            time.sleep(0.05)
        print(json.dumps(writer.result()), flush=True)
    time.sleep(3600)


class Writer:
    """Keeps so many writes outstanding; each that is acknowledged begins the next."""

    def __init__(self, keys: Any, outstanding: int, warm_up_s: float, seconds: float) -> None:
        self.ended = False
        self._keys = keys
        self._begin = time.perf_counter() + warm_up_s
        self._end = self._begin + seconds
        self._seconds = seconds
        self._latencies: List[float] = []
        self._at = 0
        self._cpu_s = 0.0
        for _ in range(outstanding):
            self._write()

    def result(self) -> dict[str, float]:
        """Rate, p99 in ms, processor time of this node in us per write."""
        count = len(self._latencies)
        return {
            "rate": count / self._seconds,
            "p99": sorted(self._latencies)[count * 99 // 100] * 1000,
            "cpu": (cpu_seconds() - self._cpu_s) / count * 1e6,
        }

    def _write(self) -> None:
        started = time.perf_counter()
        self._at += 1

        def done(result: Any, error: Any) -> None:
            now = time.perf_counter()
            if now >= self._end:
                self.ended = True
                return
            if now >= self._begin:
                self._cpu_s = self._cpu_s or cpu_seconds()
                self._latencies.append(now - started)
            self._write()

        self._keys.set(f"key-{self._at % KEY_COUNT:06d}", VALUE, callback=done)


def cpu_seconds() -> float:
    """User and system time of this process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main(sys.argv[1:])
