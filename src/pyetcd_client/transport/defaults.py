"""Defaults and limits of the client."""

from __future__ import annotations

import logging

__version__ = "0.5.0"

CONNECT_TIMEOUT_S = 2.0         # for each address of an endpoint; then the next endpoint is tried
READ_TIMEOUT_S = 60.0           # silence of a server
TOTAL_TIMEOUT_S = 30.0          # one call: all endpoints, attempts and parts of the reply
SESSION_TIMEOUT_S = 10.0        # without a reply, until the connection counts as lost
SYNC_INTERVAL_S = 60.0          # age at which the member list is read again
SYNC_TIMEOUT_S = 2.0            # for reading it; then the waiting call goes on without it
TRY_S = 1.5                     # for the requests of a call that must not wait (timeout=0)
WAIT_MAX_S = 1e6                # stands for "no limit"; sockets accept no more than 24 days
IDLE_CLOSE_S = 3.0              # a connection that was idle for longer is replaced
WATCH_POLL_S = 60.0             # a silent watch is sent again, in case a proxy has forgotten it
WATCH_PROBE_S = 5.0             # a silent watch probes whether the server is alive
WATCH_HEAD_S = 1.0              # wait for the head of a watch, then probe; doubled after failures
WATCH_SETTLE_S = 1.0            # silence after a head that proves an empty history
WATCH_LOOK_S = 0.2              # with timeout=0: wait for an event right after the head
HISTORY_EVENTS = 1000           # events that etcd remembers
BACKOFF_MIN_S = 0.05            # wait after a round in which every endpoint failed; doubled,
BACKOFF_MAX_S = 1.0             # up to this
READ_BUFFER_BYTES = 16384       # read from a socket at once
HEADER_BYTES_MAX = 65536        # of one header; a longer one breaks the connection
HEADERS_MAX = 100               # of one reply; more break the connection
REDIRECTS_MAX = 5               # of one read; more raise BadReply


_log = logging.getLogger("pyetcd_client")
