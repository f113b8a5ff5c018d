"""What a member waits for before it serves, said in the log."""

from __future__ import annotations

import threading

from ..base.ids import package_logger
from ..net.workers import SYSTEM_CLOCK

WAIT_REPORT_SECONDS = 10.0


class WaitReport:
    """Logs every ten seconds what the block of a `with` waits for, and for how long.

    what  of it now; "": nothing worth a line.  Thread: one, beside that of the block.
    """

    def __init__(self, package: str) -> None:
        self.what = ""
        self._log = package_logger(package)
        self._ended = threading.Event()

    def __enter__(self) -> WaitReport:
        threading.Thread(target=self._run, name="wait-report", daemon=True).start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._ended.set()

    def _run(self) -> None:
        since = SYSTEM_CLOCK.now()
        while not self._ended.wait(WAIT_REPORT_SECONDS):
            if self.what:
                self._log.info("waiting for %s, %.0f s", self.what, SYSTEM_CLOCK.now() - since)
