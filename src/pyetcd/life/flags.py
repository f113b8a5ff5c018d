"""Flags: what can be set, and how its text is read."""

from __future__ import annotations

import logging
import re
from typing import Any, Callable, Dict, NamedTuple, Tuple

from ..base.errors import DiscoveryError
from ..base.limits import (
    DEFAULT_CLIENT_URLS,
    DEFAULT_CLUSTER_TOKEN,
    DEFAULT_ELECTION_MS,
    DEFAULT_HEARTBEAT_MS,
    DEFAULT_NAME,
    DEFAULT_PEER_URLS,
    DEFAULT_SNAPSHOT_COUNT,
    DEFAULT_SNAPSHOTS_KEPT,
    DEFAULT_WALS_KEPT,
    UINT64_MAX,
)
from ..base.text import is_ip, split_url
from ..base.urls import parse_urls
from .addresses import default_route_address
from .discovery import check_discovery_url, check_proxy_url


class FlagError(ValueError):
    """A flag or variable that cannot be used.  The text is one line; etcd's words come first."""


class Flag(NamedTuple):
    """One flag.  parse turns its text into the value, or raises ValueError with the reason."""

    name: str
    parse: Callable[[str], Any]
    default: Any
    help: str
    no_effect: str = ""                 # why it does nothing here; told when it is given

    @property
    def is_bool(self) -> bool:
        """True if the flag may stand alone: `-debug`."""
        return isinstance(self.default, bool)

    @property
    def variable(self) -> str:
        """Name of the environment variable."""
        return "ETCD_" + self.name.upper().replace("-", "_")


def parse_bool(text: str) -> bool:
    """The boolean words of Go."""
    if text in ("1", "t", "T", "true", "TRUE", "True"):
        return True
    if text in ("0", "f", "F", "false", "FALSE", "False"):
        return False
    raise ValueError("parse error")


def parse_uint(text: str) -> int:
    """An unsigned integer; 0x, 0o, 0b and 0 prefixes as in Go."""
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


class Refusal(ValueError):
    """Why a flag cannot be had at all, whatever its value, and what to do instead."""


def _parse_domain(text: str) -> str:
    """The domain of -discovery-srv."""
    try:
        authority = split_url(f"http://{text}")[1]
    except ValueError:
        authority = ""
    if text and (authority != text or re.search("[@:]", text)):
        raise ValueError("a domain is wanted whose SRV records name the members, like example.com")
    return text


def _parse_choice(*choices: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(f"invalid value, use one of {', '.join(choices)}")
        return text

    return parse


def _parse_origins(text: str) -> Tuple[str, ...]:
    """Origins for CORS: `*`, or URLs."""
    origins = tuple(origin.strip() for origin in text.split(",") if origin.strip())
    for origin in origins:
        if origin != "*" and not re.fullmatch(r"https?://[^\s/]+/?", origin):
            raise ValueError(f"Invalid CORS origin: {origin}")
    return origins


def _parse_levels(text: str) -> Dict[str, int]:
    """`package=LEVEL,*=LEVEL` -> package -> level of the logging module; `*` is "" ."""
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
    """`ip:port` of the flags of etcd 0.4, without a scheme."""
    host, colon, port = text.rpartition(":")
    if not colon or (":" in host and not re.fullmatch(r"\[.*\]", host)):
        raise ValueError(f"address {text}: missing port in address")
    if not is_ip(host.strip("[]")):
        raise ValueError("bad IP in address specification")
    if not port.isdigit():
        raise ValueError("bad port in address specification")
    return text


def _parse_discovery(text: str) -> str:
    try:
        return check_discovery_url(text) if text else ""
    except DiscoveryError as error:
        raise ValueError(str(error)) from None


def _parse_proxy(text: str) -> str:
    try:
        check_proxy_url(text)
        return text
    except DiscoveryError as error:
        raise ValueError(str(error)) from None


def _refusing(reason: str, *harmless: str) -> Callable[[str], str]:
    """A parser that takes "" and the `harmless` values, and raises ValueError for any other."""
    def parse(text: str) -> str:
        if text and text not in harmless:
            raise ValueError(reason)
        return text

    return parse


def _parse_auto_tls(prefix: str) -> Callable[[str], bool]:
    """The parser of auto-tls or peer-auto-tls, which may only be false."""
    def parse(text: str) -> bool:
        if parse_bool(text):
            raise Refusal(
                f"is not supported: pyetcd cannot make certificates; make one with `openssl req"
                f" -x509 -newkey rsa:2048 -nodes -days 365 -keyout key.pem -out cert.pem"
                f" -subj /CN=etcd -addext subjectAltName=IP:127.0.0.1,IP:"
                f"{default_route_address() or '10.0.0.5'}` and give it with"
                f" -{prefix}cert-file cert.pem -{prefix}key-file key.pem"
            )
        return False

    return parse


FLAGS: Dict[str, Tuple[Flag, ...]] = {
    "member": (
        Flag("name", str, DEFAULT_NAME, "human-readable name for this member."),
        Flag("data-dir", str, "", "path to the data directory (default: <name>.etcd)."),
        Flag("wal-dir", str, "", "path to the dedicated wal directory."),
        Flag("snapshot-count", parse_uint, DEFAULT_SNAPSHOT_COUNT,
             "number of committed transactions to trigger a snapshot to disk."),
        Flag("heartbeat-interval", parse_uint, DEFAULT_HEARTBEAT_MS,
             "time (in milliseconds) of a heartbeat interval."),
        Flag("election-timeout", parse_uint, DEFAULT_ELECTION_MS,
             "time (in milliseconds) for an election to timeout."),
        Flag("listen-peer-urls", parse_urls, parse_urls(DEFAULT_PEER_URLS),
             "list of URLs to listen on for peer traffic."),
        Flag("listen-client-urls", parse_urls, parse_urls(DEFAULT_CLIENT_URLS),
             "list of URLs to listen on for client traffic."),
        Flag("max-snapshots", parse_uint, DEFAULT_SNAPSHOTS_KEPT,
             "maximum number of snapshot files to retain (0 is unlimited)."),
        Flag("max-wals", parse_uint, DEFAULT_WALS_KEPT,
             "maximum number of wal files to retain (0 is unlimited)."),
        Flag("cors", _parse_origins, (),
             "comma-separated whitelist of origins for cross-origin resource sharing."),
    ),
    "clustering": (
        Flag("initial-advertise-peer-urls", parse_urls, parse_urls(DEFAULT_PEER_URLS),
             "list of this member's peer URLs to advertise to the rest of the cluster."),
        Flag("advertise-client-urls", parse_urls, parse_urls(DEFAULT_CLIENT_URLS),
             "list of this member's client URLs to advertise to the rest of the cluster."),
        Flag("initial-cluster", str, "",
             "initial cluster, `name=url` pairs (default: this member alone)."),
        Flag("initial-cluster-state", _parse_choice("new", "existing"), "new",
             "initial cluster state: `new`, or `existing` to join a running cluster."),
        Flag("initial-cluster-token", str, DEFAULT_CLUSTER_TOKEN,
             "token of the cluster: clusters with different tokens do not mix."),
        Flag("discovery", _parse_discovery, "", "discovery URL used to bootstrap the cluster."),
        Flag("discovery-fallback", _parse_choice("exit", "proxy"), "proxy",
             "behavior when the discovery cluster is full: `exit` or `proxy`."),
        Flag("discovery-proxy", _parse_proxy, "",
             "HTTP proxy to use for traffic to discovery service."),
        Flag("discovery-srv", _parse_domain, "", "dns srv domain used to bootstrap the cluster."),
        Flag("discovery-srv-name", _refusing(
            "a suffix of the SRV names is not supported; publish the records without it"
        ), "", "not supported: suffix of the SRV names."),
        Flag("strict-reconfig-check", parse_bool, True,
             "reject reconfiguration requests that would cause quorum loss."),
    ),
    "proxy": (
        Flag("proxy", _parse_choice("off", "readonly", "on"), "off",
             "proxy mode: `off`, `readonly` or `on`."),
        Flag("proxy-failure-wait", parse_uint, 5000,
             "time (in milliseconds) an endpoint is held in a failed state."),
        Flag("proxy-refresh-interval", parse_uint, 30000,
             "time (in milliseconds) between two refreshes of the endpoints."),
        Flag("proxy-dial-timeout", parse_uint, 1000,
             "time (in milliseconds) for a dial to timeout, 0 is unlimited."),
        Flag("proxy-write-timeout", parse_uint, 5000,
             "time (in milliseconds) for a write to timeout, 0 is unlimited."),
        Flag("proxy-read-timeout", parse_uint, 0,
             "time (in milliseconds) for a read to timeout, 0 is unlimited."),
    ),
    "security": (
        Flag("ca-file", str, "", "[DEPRECATED] -trusted-ca-file with -client-cert-auth."),
        Flag("cert-file", str, "", "path to the client server TLS cert file."),
        Flag("key-file", str, "", "path to the client server TLS key file."),
        Flag("client-cert-auth", parse_bool, False, "require client certificates."),
        Flag("trusted-ca-file", str, "", "path to the client server TLS CA file."),
        Flag("client-crl-file", str, "", "path to the client certificate revocation list."),
        Flag("client-cert-allowed-hostname", str, "", "name that client certificates must have."),
        Flag("auto-tls", _parse_auto_tls(""), False, "not supported: give -cert-file, -key-file."),
        Flag("peer-ca-file", str, "",
             "[DEPRECATED] -peer-trusted-ca-file with -peer-client-cert-auth."),
        Flag("peer-cert-file", str, "", "path to the peer server TLS cert file."),
        Flag("peer-key-file", str, "", "path to the peer server TLS key file."),
        Flag("peer-client-cert-auth", parse_bool, False, "require certificates of peers."),
        Flag("peer-trusted-ca-file", str, "", "path to the peer server TLS CA file."),
        Flag("peer-crl-file", str, "", "path to the peer certificate revocation list."),
        Flag("peer-cert-allowed-cn", str, "", "common name that peers' certificates must have."),
        Flag("peer-cert-allowed-hostname", str, "",
             "host name that peers' certificates must have."),
        Flag("peer-auto-tls", _parse_auto_tls("peer-"), False,
             "not supported: give -peer-cert-file, -peer-key-file."),
        Flag("peer-client-cert-file", _refusing(
            "peers are shown the certificate of -peer-cert-file; leave this out"
        ), "", "not supported: -peer-cert-file serves for both directions."),
        Flag("peer-client-key-file", _refusing(
            "peers are shown the certificate of -peer-cert-file; leave this out"
        ), "", "not supported: -peer-key-file serves for both directions."),
        Flag("tls-min-version", _refusing("TLS 1.2 and later are accepted; use TLS1.2", "TLS1.2"),
             "", "only TLS1.2, which is what holds without it too."),
        Flag("host-whitelist", _refusing(
            "requests are answered whatever their Host; use * and protect the port by"
            " -client-cert-auth or a firewall", "*"
        ), "*", "not supported: only `*`."),
    ),
    "logging": (
        Flag("debug", parse_bool, False, "enable debug-level logging."),
        Flag("log-package-levels", _parse_levels, {},
             "levels per package, such as `etcdserver=WARNING,*=INFO`."),
        Flag("log-format", _parse_choice("text", "json", "console"), "text",
             "`text`, as etcd 2.3 writes it (`console` is the same), or `json`: an object a line."),
    ),
    "unsafe": (
        Flag("force-new-cluster", parse_bool, False,
             "make this member the only one of its cluster: after the loss of the others."),
    ),
    "other": (
        Flag("version", parse_bool, False, "show the version and exit."),
        Flag("config-file", str, "",
             "path to a configuration file, JSON or `flag: value` lines; it counts alone."),
    ),
    "of etcd 0.4, still working": (
        Flag("addr", _parse_address, "", "[DEPRECATED] use -advertise-client-urls."),
        Flag("bind-addr", _parse_address, "", "[DEPRECATED] use -listen-client-urls."),
        Flag("peer-addr", _parse_address, "", "[DEPRECATED] use -initial-advertise-peer-urls."),
        Flag("peer-bind-addr", _parse_address, "", "[DEPRECATED] use -listen-peer-urls."),
    ),
    "of etcd 0.4, refused": (
        Flag("peers", _refusing(
            'flag "-peers" is no longer supported; use -initial-cluster or -discovery'
        ), "", "no longer supported."),
        Flag("peers-file", _refusing(
            'flag "-peers-file" is no longer supported; use -initial-cluster or -discovery'
        ), "", "no longer supported."),
    ),
}

# Of etcd 0.4: booleans that do nothing -> what to use instead.
IGNORED_BOOLS = {
    "cluster-active-size": "", "cluster-remove-delay": "", "cluster-sync-interval": "",
    "config": "a configuration file is given with -config-file FILE", "force": "",
    "max-result-buffer": "", "max-retry-attempts": "",
    "peer-heartbeat-interval": "use -heartbeat-interval",
    "peer-election-timeout": "use -election-timeout", "retry-interval": "",
    "snapshot": "snapshots are always made; -snapshot-count says how often",
    "v": "-version shows the version, -debug logs more", "vv": "-debug logs more",
}
# Of etcd 2.3's experiments and of etcd 3: accepted, so that units and scripts need no change.  Why
# each does nothing -> etcd's default of each.  Nothing that protects something may stand here.
NO_EFFECT: Dict[str, Dict[str, Any]] = {
    "the v2 API is always on": {"enable-v2": True, "v2-deprecation": "not-yet"},
    "there is no v3 API": {
        "experimental-v3demo": False, "experimental-gRPC-addr": "127.0.0.1:2378",
        "experimental-auto-compaction-retention": "0", "auto-compaction-mode": "periodic",
        "auto-compaction-retention": "0", "max-txn-ops": "128", "max-concurrent-streams": "",
        "grpc-keepalive-min-time": "5s", "grpc-keepalive-interval": "2h",
        "grpc-keepalive-timeout": "20s", "enable-grpc-gateway": True, "auth-token": "simple",
        "auth-token-ttl": "300", "bcrypt-cost": "10", "client-cert-file": "",
        "client-key-file": "", "experimental-enable-v2v3": "",
        "experimental-enable-lease-checkpoint": False,
        "experimental-enable-lease-checkpoint-persist": False,
        "experimental-compaction-batch-limit": "1000",
        "experimental-compaction-sleep-interval": "10ms",
        "experimental-watch-progress-notify-interval": "10m",
        "experimental-txn-mode-write-with-shared-buffer": True,
        "experimental-stop-grpc-service-on-defrag": False,
    },
    "there is no v3 database file": {
        "quota-backend-bytes": "0", "backend-batch-limit": "0", "backend-batch-interval": "",
        "backend-bbolt-freelist-type": "map", "experimental-backend-bbolt-freelist-type": "array",
        "experimental-bootstrap-defrag-threshold-megabytes": "0",
        "experimental-initial-corrupt-check": False, "experimental-corrupt-check-time": "0s",
        "experimental-compact-hash-check-enabled": False,
        "experimental-compact-hash-check-time": "1m", "experimental-memory-mlock": False,
    },
    "a request may have 10 MiB": {"max-request-bytes": "1572864"},
    "every write is synced": {"unsafe-no-fsync": False},
    "members ask before they raise the term once all of them know how": {"pre-vote": False},
    "a member waits a whole election timeout for a leader": {
        "initial-election-tick-advance": True,
    },
    "there are no learners": {"experimental-max-learners": "1"},
    "there is no downgrade by etcd 3's rules": {"experimental-downgrade-check-time": "5s"},
    "Python is not profiled by pprof": {"enable-pprof": False},
    "/metrics and /health are on the client URLs": {
        "listen-metrics-urls": "", "metrics": "basic",
    },
    "there is no tracing": {
        "experimental-enable-distributed-tracing": False,
        "experimental-distributed-tracing-address": "",
        "experimental-distributed-tracing-service-name": "",
        "experimental-distributed-tracing-instance-id": "",
    },
    "the log goes to stderr; its level is set by -debug and -log-package-levels": {
        "logger": "capnslog", "log-output": "default", "log-outputs": "default",
        "log-level": "info", "enable-log-rotation": False,
        "log-rotation-config-json": "",
    },
    "the log has no such warnings": {
        "experimental-warning-apply-duration": "100ms",
        "experimental-warning-unary-request-duration": "300ms",
    },
    "addresses are never compared with certificates of clients": {
        "experimental-peer-skip-client-san-verification": False,
    },
    "Python's defaults with TLS 1.2 and later are used": {
        "cipher-suites": "", "tls-max-version": "",
    },
    "pyetcd makes no certificates": {"self-signed-cert-validity": "1"},
    "sockets have the usual options": {"socket-reuse-port": False, "socket-reuse-address": False},
    "how many entries stay in memory behind a snapshot is fixed": {
        "experimental-snapshot-catchup-entries": "5000",
    },
    "a member serves as soon as it can": {"experimental-wait-cluster-ready-timeout": "5s"},
}


def _all_flags() -> Dict[str, Flag]:
    flags = {flag.name: flag for group in FLAGS.values() for flag in group}
    for name in IGNORED_BOOLS:
        flags[name] = Flag(name, parse_bool, False, "")
    for reason, defaults in NO_EFFECT.items():
        for name, default in defaults.items():
            parse = parse_bool if isinstance(default, bool) else str
            flags[name] = Flag(name, parse, default, "", reason)
    return flags
