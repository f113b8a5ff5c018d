"""The version, the log, and limits that several modules know."""

from __future__ import annotations

import logging

__version__ = "0.5.0"

TRY_S = 1.5                     # for the requests of a call that must not wait (timeout=0)
WAIT_MAX_S = 1e6                # stands for "no limit"; sockets accept no more than 24 days

_log = logging.getLogger("pyetcd_client")
