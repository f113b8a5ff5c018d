"""Limits and defaults; the comment of a limit says what happens when it is reached."""

from __future__ import annotations

__version__ = "0.5.0"

SERVER_VERSION = "2.3.8"            # shown to peers and by /version: the etcd to be compatible with
MIN_CLUSTER_VERSION = "2.2.0"       # oldest cluster version this member can live with
ARTICLE_VERSION = "2.0.1"           # data directory format named by etcd 2.0's start-up line

REGISTRY_KEY = "/_etcd/registry"    # tokens of the discovery service
V3_REFUSAL = "pyetcd has the v2 API only: set ETCDCTL_API=2, or use HTTP/1.1 below /v2/keys"

DEFAULT_NAME = "default"
DEFAULT_CLIENT_URLS = "http://localhost:2379,http://localhost:4001"
DEFAULT_PEER_URLS = "http://localhost:2380,http://localhost:7001"
DEFAULT_CLUSTER_TOKEN = "etcd-cluster"
DEFAULT_SNAPSHOT_COUNT = 10_000     # applied entries between snapshots
DEFAULT_HEARTBEAT_MS = 100
DEFAULT_ELECTION_MS = 1_000
ELECTION_MS_MAX = 50_000            # above: refused at start (etcd's own limit)
DEFAULT_SNAPSHOTS_KEPT = 5
DEFAULT_WALS_KEPT = 5

SEGMENT_BYTES_MAX = 64_000_000      # a WAL file at or above this size is closed and the next begun
SEGMENT_PARTS = 64                  # after a snapshot, one at or above this part of it is closed
COMPACT_SLICE_ENTRIES = 1_000       # dropped from memory in one turn: 1 ms
SNAPSHOT_CATCHUP_ENTRIES = 5_000    # entries kept in memory behind a snapshot for slow followers

ENTRIES_BYTES_MAX = 1 << 20         # entries in one MsgApp; always at least one entry
INFLIGHT_MSGAPP_MAX = 512           # unanswered MsgApp per follower; above: wait for an answer
READ_ROUNDS_MAX = 1_024             # read rounds of a leader; above: dropped, and tried again
UNCOMMITTED_BYTES_MAX = 256 << 20   # log tail not yet committed; above: proposals are refused
QUEUED_BYTES_MAX = 64 << 20         # of requests waiting for a leader (proxy: a member); above: 503
PROPOSALS_PENDING_MAX = 65_536      # requests waiting for apply; above: error 300 with 503

REQUEST_HEAD_BYTES_MAX = 1_052_672  # request line and headers (Go's limit); above: 431, close
REQUEST_LINE_BYTES_MAX = 512 << 10  # method, path and query; above: 414, close
HEADER_LINES_MAX = 1_000            # of one request; above: 431, close
SHORT_HEADER_BYTES_MAX = 4_096      # of a header that says how to read the rest; above: 431, close
REQUEST_BODY_BYTES_MAX = 10 << 20   # one byte more: error 210 if it is a form, else 413
CHUNKS_MAX = 65_536                 # of one request body; above: as if the body were too large
PEER_BODY_BYTES_MAX = 512 << 20     # a snapshot of a peer; above: 413, close
RAFT_BODY_BYTES_MAX = 16 << 20      # any other message of a peer; above: 413, close
CALL_BODY_BYTES_MAX = 4 << 20       # of an answer of a registry or member; above: cut
PEER_BODIES_BYTES_MAX = 64 << 20    # of all messages that peers are sending; above: 413, close
MESSAGE_ENTRIES_MAX = 1 << 15       # in one message of a peer; above: refused
FIELDS_MAX = 512                    # of a protobuf message, entries not counted; above: refused
VOTERS_MAX = 1_024                  # in a snapshot; above: refused
TERM_LEAP_MAX = 1 << 32             # of a message beyond our term, a century; above: refused
INDEX_MAX = 1 << 62                 # of an entry; above: refused
PATH_COST_MAX = 64 << 20            # characters of a peer's key and all above it; above: refused
INTERIM_ANSWERS_MAX = 100           # `100 Continue` and the like before an answer; above: an error
SLICE_BYTES = 64 << 10              # of input that one connection reads in one turn
CHUNKED_SLICE_BYTES = 16 << 10      # of it decoded, if it is chunked: 2,700 chunks take 3 ms
CONNECTIONS_MAX = 50_000            # open sockets per listener; above: 503, close
DESCRIPTORS_KEPT = 256              # below the system's limit, or a quarter of it: for files and
                                    # calls, half of it for peers too; above: as CONNECTIONS_MAX
REFUSALS_MAX = 256                  # 503 answers being sent at a time; above: closed without one
REFUSALS_TOLD_MAX = 16              # likewise, of descriptors
OUTPUT_BYTES_MAX = 64 << 20         # unsent reply bytes of one connection; above: it is closed
HELD_BYTES_MAX = 256 << 20          # unsent and unread, in all; above: the most idle are closed
OUTPUT_PAUSE_BYTES = 1 << 20        # above: its next requests wait until the client has read
OUTPUT_JOIN_BYTES_MAX = 1 << 16     # unsent bytes that are joined, if they are in pieces
OUTPUT_SHARED_BYTES_MIN = 1 << 10   # of a piece; above: shared with other replies, not copied
OUTPUT_PIECES_MAX = 16              # handed to the system in one call
REQUEST_SECONDS_MAX = 300.0         # from a request's first byte to its last; above: 408, close
UNREAD_SECONDS_MAX = 60.0           # in which a client reads UNREAD_BYTES_MIN of a reply, or the
UNREAD_BYTES_MIN = 64 << 10         # rest; above: closed
SLOW_CHECK_SECONDS = 10.0           # between two searches for such clients
HEAD_CACHE_BYTES_MAX = 2_048        # of a head that is remembered
HEAD_CACHE_MAX = 4_096              # parsed request heads remembered; full: forgotten all at once

PIPELINE_QUEUE_MESSAGES_MAX = 64    # messages waiting for a POST; above: dropped, peer unreachable
PIPELINE_QUEUE_BYTES_MAX = 16 << 20 # likewise
PIPELINE_WORKERS = 4                # concurrent POSTs to one peer
LINK_HEARTBEAT_SECONDS = 5 / 3      # between link heartbeats on a stream
LINK_TIMEOUT_SECONDS = 5.0          # silence after which a stream is given up
STREAM_RETRY_SECONDS = 0.1          # between two dials of a stream, then twice as long, ...
STREAM_RETRY_SECONDS_MAX = 1.6
PROBE_SECONDS = 4.0                 # between two health probes of a peer

HISTORY_EVENTS_MAX = 1_000          # events kept for waitIndex; older ones answer 401
WATCHERS_MAX = 100_000              # of one member, some 3 KB each; above: 503
WATCHED_BYTES_MAX = 64 << 20        # of the paths of all watchers; above: 503
WATCHERS_NOTIFIED_MAX = 400         # notified in one turn, 4 ms; the others: in the next turns
WATCHER_QUEUE_EVENTS_MAX = 100      # backlog of one slow watcher (etcd's limit); above: closed
KEY_DEPTH_MAX = 1_024               # path elements of a key; above: error 210
PURGE_SECONDS = 30.0                # between two removals of old files
SYNC_SECONDS = 0.5                  # between two searches of the leader for expired keys
REMOVED_NODES_MAX = 2_000           # of the key tree in one turn, 5 ms; above: in the next ones
EXPIRED_KEYS_MAX = 200              # that one entry of the log expires, 4 ms; above: several
REMOVED_SECONDS = 1.0               # from the removal of a member, as it learns of it, to its end

LOG_LINE_CHARS_MAX = 16_384         # above: cut off; journald would make several lines of it
RECENT_LINES_MAX = 500              # of the log, kept for /ui; above: the oldest is forgotten
RECENT_LINE_CHARS_MAX = 1_000       # of such a line; above: cut off

NS = 1_000_000_000                  # nanoseconds in a second
UINT64_MAX = (1 << 64) - 1
REPAIR_HINT = (
    "remove this member from the cluster, delete its data directory and add it again;"
    " a cluster of one is restored from a backup"
)
