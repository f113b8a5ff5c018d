"""Flags: a row for each, with its parser, default, help and field of ServerConfig."""

from __future__ import annotations

import logging
import operator
import re
from typing import Any, Callable, Dict, NamedTuple, Tuple

from ..api.forms import GO_BOOLS
from ..base.limits import UINT64_MAX
from ..base.text import is_ip, split_url
from ..base.urls import parse_urls
from ..member.configuration import ServerConfig
from .addresses import default_route_address
from .discovery import check_discovery_url, check_proxy_url


class FlagError(ValueError):
    """A flag or variable with a bad value.  The text is one line that begins with etcd's words."""

    def line(self, command: str = "pyetcd") -> str:
        """Return the text as a sentence that names the help of `command`."""
        text = str(self)
        return f"{text}{'' if text.endswith('?') else '.'} See '{command} -help'.\n"


class Flag(NamedTuple):
    """One flag.

    parse      turns the text into the value; raises ValueError or DiscoveryError with the reason
    no_effect  why the flag does nothing here; logged when it is given
    field      the field of ServerConfig that the value fills, or `client_tls.<field>` and
               `peer_tls.<field>` of TlsFiles; "" if another function reads the flag
    """

    name: str
    parse: Callable[[str], Any]
    default: Any
    help: str
    no_effect: str = ""
    field: str = ""

    @property
    def is_bool(self) -> bool:
        """True if the flag may stand without a value: `-debug`."""
        return isinstance(self.default, bool)

    @property
    def variable(self) -> str:
        return "ETCD_" + self.name.upper().replace("-", "_")


def parse_bool(text: str) -> bool:
    """Return the value of a boolean, in the words of Go.  Raises ValueError."""
    if text not in GO_BOOLS:
        raise ValueError("parse error")
    return GO_BOOLS[text]


def parse_uint(text: str) -> int:
    """Return an unsigned integer; the prefixes 0x, 0o, 0b and 0 are those of Go."""
    plain = re.fullmatch("0([0-7]+)", text)
    try:
        if not re.fullmatch("[0-9a-zA-Z]+", text):
            raise ValueError
        value = int(plain.group(1), 8) if plain else int(text, 0)
    except ValueError:
        raise ValueError("parse error") from None
    if value > UINT64_MAX:
        raise ValueError("value out of range")
    return value


class UnsupportedFlag(ValueError):
    """A flag that is not supported with any value.  The text gives the reason and the remedy."""


def _parse_domain(text: str) -> str:
    try:
        authority = split_url(f"http://{text}")[1]
    except ValueError:
        authority = ""
    if text and (authority != text or re.search("[@:]", text)):
        raise ValueError("a domain is wanted whose SRV records name the members, like example.com")
    return text


def one_of(*choices: str, refusal: str = "") -> Callable[[str], str]:
    """Return the parser that accepts `choices`; refusal: its reason for any other text."""
    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(refusal or f"invalid value, use one of {', '.join(choices)}")
        return text

    return parse


def _parse_origins(text: str) -> Tuple[str, ...]:
    origins = tuple(origin.strip() for origin in text.split(",") if origin.strip())
    for origin in origins:
        if origin != "*" and not re.fullmatch(r"https?://[^\s/]+/?", origin):
            raise ValueError(f"Invalid CORS origin: {origin}")
    return origins


def _parse_levels(text: str) -> Dict[str, int]:
    """Return package -> level of the logging module for `package=LEVEL,*=LEVEL`; `*` is ""."""
    levels: Dict[str, int] = {}
    for part in filter(None, text.split(",")):
        package, _, level = part.partition("=")
        if level not in _LOG_LEVELS:
            levels_text = " ".join(_LOG_LEVELS)
            raise ValueError(f"{part} is not <package>=<level>, with one of {levels_text}")
        levels["" if package == "*" else package] = _LOG_LEVELS[level]
    return levels


_LOG_LEVELS = {
    "CRITICAL": logging.CRITICAL, "ERROR": logging.ERROR, "WARNING": logging.WARNING,
    "NOTICE": logging.INFO, "INFO": logging.INFO, "DEBUG": logging.DEBUG, "TRACE": logging.DEBUG,
}


def _parse_address(text: str) -> str:
    """Return `ip:port` as the flags of etcd 0.4 have it, without a scheme.  Raises ValueError."""
    host, colon, port = text.rpartition(":")
    if not colon or (":" in host and not re.fullmatch(r"\[.*\]", host)):
        raise ValueError(f"address {text}: missing port in address")
    if not is_ip(host.strip("[]")):
        raise ValueError("bad IP in address specification")
    if not port.isdigit():
        raise ValueError("bad port in address specification")
    return text


def _parse_auto_tls(prefix: str) -> Callable[[str], bool]:
    """Return the parser of auto-tls or peer-auto-tls, which may only be false."""
    def parse(text: str) -> bool:
        if parse_bool(text):
            raise UnsupportedFlag(
                f"is not supported: pyetcd cannot make certificates; make one with `openssl req"
                f" -x509 -newkey rsa:2048 -nodes -days 365 -keyout key.pem -out cert.pem"
                f" -subj /CN=etcd -addext subjectAltName=IP:127.0.0.1,IP:"
                f"{default_route_address() or '10.0.0.5'}` and give it with"
                f" -{prefix}cert-file cert.pem -{prefix}key-file key.pem"
            )
        return False

    return parse


def flag_rows(table: str) -> Tuple[Flag, ...]:
    """Return the flags of a table with a row `name  kind  help` for each.

    kind  a key of _KINDS, or the accepted words with | between; then, if the field has another
          name than the flag, a colon and the field.  The default is that of the field.
    """
    flags = []
    for row in table.strip().split("\n"):
        name, kind, help = re.split(" {2,}", row, maxsplit=2)
        kind, _, field = kind.partition(":")
        field = field or name.replace("-", "_") + "_ms" * (kind == "ms")
        parse, default = _KINDS[kind] if kind in _KINDS else (one_of(*kind.split("|")), "")
        if hasattr(_DEFAULTS, field.partition(".")[0]):
            default = operator.attrgetter(field)(_DEFAULTS)
        else:
            field = ""
        flags.append(Flag(name, parse, default, help, field=field))
    return tuple(flags)


_DEFAULTS = ServerConfig()
_KINDS: Dict[str, Tuple[Callable[[str], Any], Any]] = {     # parser, default without a field
    "text": (str, ""), "bool": (parse_bool, False), "uint": (parse_uint, 0), "ms": (parse_uint, 0),
    "urls": (parse_urls, ()), "origins": (_parse_origins, ()), "levels": (_parse_levels, {}),
    "token": (lambda text: text and check_discovery_url(text), ""),
    "http-proxy": (lambda text: check_proxy_url(text) and text, ""),
    "domain": (_parse_domain, ""), "address": (_parse_address, ""),
    "format": (one_of("text", "json", "console"), "text"),
}

FLAGS: Dict[str, Tuple[Flag, ...]] = {
    "member": flag_rows("""
name  text  human-readable name for this member.
data-dir  text  path to the data directory (default: <name>.etcd).
wal-dir  text  path to the dedicated wal directory.
snapshot-count  uint  number of committed transactions to trigger a snapshot to disk.
heartbeat-interval  ms:heartbeat_ms  time (in milliseconds) of a heartbeat interval.
election-timeout  ms:election_ms  time (in milliseconds) for an election to timeout.
listen-peer-urls  urls  list of URLs to listen on for peer traffic.
listen-client-urls  urls  list of URLs to listen on for client traffic.
max-snapshots  uint  maximum number of snapshot files to retain (0 is unlimited).
max-wals  uint  maximum number of wal files to retain (0 is unlimited).
cors  origins  comma-separated whitelist of origins for cross-origin resource sharing.
ui  true|false|readonly  the page at /ui: `true`, `false`, or `readonly`.
"""),
    "clustering": (*flag_rows("""
initial-advertise-peer-urls  urls  list of this member's peer URLs to advertise to other members.
advertise-client-urls  urls  list of this member's client URLs to advertise to the cluster.
initial-cluster  text  initial cluster, `name=url` pairs (default: this member alone).
initial-cluster-state  new|existing  initial cluster state; `existing` joins a running cluster.
initial-cluster-token  text  token of the cluster: clusters with different tokens do not mix.
discovery  token  discovery URL used to bootstrap the cluster.
discovery-fallback  exit|proxy  behavior when the discovery cluster is full: `exit` or `proxy`.
discovery-proxy  http-proxy  HTTP proxy to use for traffic to discovery service.
discovery-srv  domain  dns srv domain used to bootstrap the cluster.
compat-version  auto|2.3|bridge|3.4  version of etcd to act as towards other members.
strict-reconfig-check  bool  reject reconfiguration requests that would cause quorum loss.
"""), Flag("discovery-srv-name", one_of("", refusal=(
        "a suffix of the SRV names is not supported; publish the records without it"
    )), "", "not supported: suffix of the SRV names.")),
    "proxy": flag_rows("""
proxy  off|readonly|on  proxy mode: `off`, `readonly` or `on`.
proxy-failure-wait  ms  time (in milliseconds) an endpoint is held in a failed state.
proxy-refresh-interval  ms  time (in milliseconds) between two refreshes of the endpoints.
proxy-dial-timeout  ms  time (in milliseconds) for a dial to timeout, 0 is unlimited.
proxy-write-timeout  ms  time (in milliseconds) for a write to timeout, 0 is unlimited.
proxy-read-timeout  ms  time (in milliseconds) for a read to timeout, 0 is unlimited.
"""),
    "security": (*flag_rows("""
ca-file  text:client_tls.ca_file  [DEPRECATED] -trusted-ca-file with -client-cert-auth.
cert-file  text:client_tls.cert_file  path to the client server TLS cert file.
key-file  text:client_tls.key_file  path to the client server TLS key file.
client-cert-auth  bool:client_tls.client_cert_auth  require client certificates.
trusted-ca-file  text:client_tls.trusted_ca_file  path to the client server TLS CA file.
client-crl-file  text:client_tls.crl_file  path to the client certificate revocation list.
client-cert-allowed-hostname  text:client_tls.allowed_name  host name in client certificates.
peer-ca-file  text:peer_tls.ca_file  [DEPRECATED] -peer-trusted-ca-file with -peer-client-cert-auth.
peer-cert-file  text:peer_tls.cert_file  path to the peer server TLS cert file.
peer-key-file  text:peer_tls.key_file  path to the peer server TLS key file.
peer-client-cert-auth  bool:peer_tls.client_cert_auth  require certificates of peers.
peer-trusted-ca-file  text:peer_tls.trusted_ca_file  path to the peer server TLS CA file.
peer-crl-file  text:peer_tls.crl_file  path to the peer certificate revocation list.
peer-cert-allowed-cn  text:peer_tls.allowed_cn  common name that peers' certificates must have.
peer-cert-allowed-hostname  text:peer_tls.allowed_name  host name in certificates of peers.
"""),
        *(Flag(prefix + "auto-tls", _parse_auto_tls(prefix), False,
               f"not supported: give -{prefix}cert-file, -{prefix}key-file.")
          for prefix in ("", "peer-")),
        *(Flag(f"peer-client-{file}", one_of("", refusal=(
            "peers are shown the certificate of -peer-cert-file; leave this out"
        )), "", f"not supported: -peer-{file} serves for both directions.")
          for file in ("cert-file", "key-file")),
        Flag("tls-min-version", one_of(
            "", "TLS1.2", refusal="TLS 1.2 and later are accepted; use TLS1.2"
        ), "", "only TLS1.2, which is what holds without it too."),
        Flag("host-whitelist", one_of("", "*", refusal=(
            "requests are answered whatever their Host; use * and protect the port by"
            " -client-cert-auth or a firewall"
        )), "*", "not supported: only `*`.")),
    "logging": flag_rows("""
debug  bool  enable debug-level logging.
log-package-levels  levels  levels per package, such as `etcdserver=WARNING,*=INFO`.
log-format  format  `text` (or `console`), as etcd 2.3 writes it, or `json`: an object a line.
"""),
    "unsafe": flag_rows("""
force-new-cluster  bool  make this member the only one of its cluster: after the loss of the others.
"""),
    "other": flag_rows("""
version  bool  show the version and exit.
config-file  text  path to a configuration file, JSON or `flag: value` lines; it counts alone.
cloud-config  text  path to a cloud-config: flags and variables go before its section coreos.etcd2.
"""),
    "of etcd 0.4, still working": flag_rows("""
addr  address  [DEPRECATED] use -advertise-client-urls.
bind-addr  address  [DEPRECATED] use -listen-client-urls.
peer-addr  address  [DEPRECATED] use -initial-advertise-peer-urls.
peer-bind-addr  address  [DEPRECATED] use -listen-peer-urls.
"""),
    "of etcd 0.4, refused": tuple(
        Flag(name, one_of("", refusal=(
            f'flag "-{name}" is no longer supported; use -initial-cluster or -discovery'
        )), "", "no longer supported.")
        for name in ("peers", "peers-file")
    ),
}

# Booleans of etcd 0.4 that do nothing -> the flag to use instead.
IGNORED_BOOLS = {
    "cluster-active-size": "", "cluster-remove-delay": "", "cluster-sync-interval": "",
    "config": "a configuration file is given with -config-file FILE", "force": "",
    "max-result-buffer": "", "max-retry-attempts": "",
    "peer-heartbeat-interval": "use -heartbeat-interval",
    "peer-election-timeout": "use -election-timeout", "retry-interval": "",
    "snapshot": "snapshots are always made; -snapshot-count says how often",
    "v": "-version shows the version, -debug logs more", "vv": "-debug logs more",
}
# Of etcd 2.3's experiments and of etcd 3: accepted, so that units and scripts need no change.  The
# reason why a flag does nothing -> flags, switches with a `?`.  A flag that protects data or access
# must not be listed: its user would rely on a protection that does not exist.
NO_EFFECT = {
    "the v2 API is always on": "enable-v2? v2-deprecation",
    "there is no v3 API": """
        experimental-v3demo? experimental-gRPC-addr experimental-auto-compaction-retention
        auto-compaction-mode auto-compaction-retention max-txn-ops max-concurrent-streams
        grpc-keepalive-min-time grpc-keepalive-interval grpc-keepalive-timeout enable-grpc-gateway?
        auth-token auth-token-ttl bcrypt-cost client-cert-file client-key-file
        experimental-enable-v2v3 experimental-enable-lease-checkpoint?
        experimental-enable-lease-checkpoint-persist? experimental-compaction-batch-limit
        experimental-compaction-sleep-interval experimental-watch-progress-notify-interval
        experimental-txn-mode-write-with-shared-buffer? experimental-stop-grpc-service-on-defrag?
    """,
    "there is no v3 database file": """
        quota-backend-bytes backend-batch-limit backend-batch-interval backend-bbolt-freelist-type
        experimental-backend-bbolt-freelist-type experimental-bootstrap-defrag-threshold-megabytes
        experimental-initial-corrupt-check? experimental-corrupt-check-time
        experimental-compact-hash-check-enabled? experimental-compact-hash-check-time
        experimental-memory-mlock?
    """,
    "a request may have 10 MiB": "max-request-bytes",
    "every write is synced": "unsafe-no-fsync?",
    "members ask before they raise the term once all of them know how": "pre-vote?",
    "a member waits a whole election timeout for a leader": "initial-election-tick-advance?",
    "there are no learners": "experimental-max-learners",
    "there is no downgrade by etcd 3's rules": "experimental-downgrade-check-time",
    "Python is not profiled by pprof": "enable-pprof?",
    "/metrics and /health are on the client URLs": "listen-metrics-urls metrics",
    "there is no tracing": """
        experimental-enable-distributed-tracing? experimental-distributed-tracing-address
        experimental-distributed-tracing-service-name experimental-distributed-tracing-instance-id
    """,
    "the log goes to stderr; its level is set by -debug and -log-package-levels": """
        logger log-output log-outputs log-level enable-log-rotation? log-rotation-config-json
    """,
    "the log has no such warnings": """
        experimental-warning-apply-duration experimental-warning-unary-request-duration
    """,
    "addresses are never compared with certificates of clients":
        "experimental-peer-skip-client-san-verification?",
    "Python's defaults with TLS 1.2 and later are used": "cipher-suites tls-max-version",
    "pyetcd makes no certificates": "self-signed-cert-validity",
    "sockets have the usual options": "socket-reuse-port? socket-reuse-address?",
    "how many entries stay in memory behind a snapshot is fixed":
        "experimental-snapshot-catchup-entries",
    "a member serves as soon as it can": "experimental-wait-cluster-ready-timeout",
}


def _all_flags() -> Dict[str, Flag]:
    flags = {flag.name: flag for group in FLAGS.values() for flag in group}
    for name in IGNORED_BOOLS:
        flags[name] = Flag(name, parse_bool, False, "")
    for reason, words in NO_EFFECT.items():
        for word in words.split():
            name = word.rstrip("?")
            switch = Flag(name, parse_bool, False, "", reason)
            flags[name] = switch if word != name else switch._replace(parse=str, default="")
    return flags
