"""Defaults and limits of the client."""

from __future__ import annotations

import logging

__version__ = "0.4.0"

DEFAULT_ENDPOINT = "http://127.0.0.1:2379"
CONNECT_TIMEOUT_S = 2.0         # per address of an endpoint; then the next endpoint is tried
READ_TIMEOUT_S = 60.0           # silence of a server
TOTAL_TIMEOUT_S = 30.0          # one call: over all endpoints, attempts and pieces of an answer
SESSION_TIMEOUT_S = 10.0        # without an answer, until the connection counts as lost
SYNC_INTERVAL_S = 60.0          # age at which the member list is asked for again
SYNC_TIMEOUT_S = 2.0            # for asking; a call that waits for it goes on without after that
TRY_S = 1.5                     # for the requests of what must not wait (timeout=0)
WAIT_MAX_S = 1e6                # without a limit; sockets take no more than 24 days
IDLE_CLOSE_S = 3.0              # a connection that was idle for longer is not used again
WATCH_POLL_S = 60.0             # a silent watch is asked anew, in case a proxy has forgotten it
WATCH_PROBE_S = 5.0             # a silent watch sees whether the server still answers
WATCH_HEAD_S = 1.0              # wait for the head of a watch, then see; doubled after failures
WATCH_SETTLE_S = 1.0            # silent for so long after a head: nothing was in the history
WATCH_LOOK_S = 0.2              # with timeout=0: wait for what follows a head at once
HISTORY_EVENTS = 1000           # that etcd remembers
BACKOFF_MIN_S = 0.05            # wait after a round in which every endpoint failed; doubled,
BACKOFF_MAX_S = 1.0             # up to this
READ_BUFFER_BYTES = 16384       # read from a socket at once
HEADER_BYTES_MAX = 65536        # of one header
HEADERS_MAX = 100               # of one answer
DNS_ANSWER_S = 2.0              # wait for one name server; then the next is asked
DNS_SLICE_S = 0.02              # of it: nobody can wake who waits for a datagram
RESOLV_CONF = "/etc/resolv.conf"
REDIRECTS_MAX = 5               # of one read; more raise BadReply


_log = logging.getLogger("pyetcd_client")
