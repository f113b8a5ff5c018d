"""Checks of settings that contradict each other, and the configuration that settings make."""

from __future__ import annotations

import itertools
import re
from typing import Any, Dict, Sequence
from urllib.parse import urlsplit

from ..base.basics import TlsFiles
from ..base.errors import StartError
from ..base.ids import LOG_PACKAGES
from ..base.limits import DEFAULT_SNAPSHOT_COUNT, ELECTION_MS_MAX
from ..base.text import go_quote, most_like
from ..base.urls import WILDCARD_HOSTS, url_address
from ..member.cluster import parse_initial_cluster
from ..member.configuration import ServerConfig
from ..net.tls import check_readable
from .addresses import ETCD_LOG, default_initial_cluster, default_route_address
from .flags import FLAGS, IGNORED_BOOLS, FlagError
from .settings import ENVIRONMENT_FILE, Settings, _quoting_advice, _take_old_addresses, url_advice

# -- settings that contradict each other -----------------------------------------


def check_settings(settings: Settings) -> None:
    """Raise FlagError for settings that contradict each other.  Source: etcd 2.3 config.go."""
    ways = [
        name for name in ("initial-cluster", "discovery", "discovery-srv") if settings.is_set(name)
    ]
    if len(ways) > 1:
        raise FlagError(
            "multiple discovery or bootstrap flags are set. Choose one of "
            '"initial-cluster", "discovery" or "discovery-srv"'
        )
    _take_old_addresses(settings)
    for name, instead in IGNORED_BOOLS.items():
        if settings[name] and instead:
            settings.warn(f"{settings.where(name)} does nothing: {instead}")
    _check_name(settings)
    _check_log_packages(settings)
    _check_advertised_to_clients(settings)
    _check_advertised_to_peers(settings)
    _check_times(settings)
    _check_initial_cluster(settings)
    for name in ("initial-advertise-peer-urls", "advertise-client-urls"):
        for url in settings[name]:
            _check_host(settings, name, url)
    if settings["peer-cert-allowed-cn"] and settings["peer-cert-allowed-hostname"]:
        raise FlagError(
            f'AllowedCN and AllowedHostname are mutually exclusive'
            f' (cn="{settings["peer-cert-allowed-cn"]}",'
            f' hostname="{settings["peer-cert-allowed-hostname"]}"); set one of'
            f" -peer-cert-allowed-cn and -peer-cert-allowed-hostname"
        )


def _check_name(settings: Settings) -> None:
    """Raise FlagError for a name that -initial-cluster cannot hold."""
    name, where = settings["name"], settings.where("name")
    if not name:
        raise FlagError(
            f'couldn\'t find local name "" in the initial cluster configuration: {where} is empty;'
            f" give this member a name, or leave the flag out"
        )
    if re.search("[=,]", name):
        raise FlagError(
            f"{where} has {go_quote(name)}: in -initial-cluster, = and , separate names and URLs;"
            f" choose a name without them"
        )


def _check_log_packages(settings: Settings) -> None:
    """Warn of packages that never log; etcd accepts them without a word."""
    for package in settings["log-package-levels"]:
        if package and package.partition(".")[0] not in LOG_PACKAGES:
            near = most_like(package, LOG_PACKAGES)
            meant = f"; did you mean {near}?" if near else ""
            settings.warn(
                f"{settings.where('log-package-levels')} has {package}, which logs nothing here;"
                f" the packages are {', '.join(LOG_PACKAGES)}, and * is all of them{meant}"
            )


def _check_advertised_to_clients(settings: Settings) -> None:
    """Raise FlagError if -listen-client-urls has no advertised URLs; a proxy needs none."""
    listen, advertise = "listen-client-urls", "advertise-client-urls"
    falls_back = settings["discovery"] and settings["discovery-fallback"] == "proxy"
    if not settings.is_set(listen) or settings.is_set(advertise):
        return
    if settings["proxy"] == "off" and not falls_back:
        example = ",".join(_reachable(url) for url in settings[listen])
        raise FlagError(
            "-advertise-client-urls is required when -listen-client-urls is set explicitly;"
            " When listening on specific address(es), this etcd process must advertise"
            " accessible url(s) to each connected client; for example"
            f" {settings.example(advertise, listen, example)}"
        )


def _check_advertised_to_peers(settings: Settings) -> None:
    """Warn if discovery would publish the default peer URLs of a member that listens elsewhere.

    With -initial-cluster this is an error later, as the URLs do not match.
    """
    listen, advertise = "listen-peer-urls", "initial-advertise-peer-urls"
    found = settings["discovery"] or settings["discovery-srv"]
    if found and settings.is_set(listen) and not settings.is_set(advertise):
        example = ",".join(_reachable(url) for url in settings[listen] if url_address(url)[0])
        settings.warn(
            f"{settings.where(listen)} is set, but the other members are told"
            f" {','.join(settings[advertise])}; set"
            f" {settings.example(advertise, listen, example or 'http://10.0.0.5:2380')}"
        )


def _reachable(url: str) -> str:
    """Return `url` with an address of this machine in place of a wildcard."""
    host, port = url_address(url)
    if host not in WILDCARD_HOSTS:
        return url
    return f"{urlsplit(url).scheme}://{default_route_address() or '10.0.0.5'}:{port}"


def _check_times(settings: Settings) -> None:
    heartbeat_ms, election_ms = settings["heartbeat-interval"], settings["election-timeout"]
    if heartbeat_ms < 1:
        raise FlagError("-heartbeat-interval[0ms] should be at least 1ms")
    if 5 * heartbeat_ms > election_ms:
        raise FlagError(
            f"-election-timeout[{election_ms}ms] should be at least as 5 times as"
            f" -heartbeat-interval[{heartbeat_ms}ms]"
        )
    if election_ms > ELECTION_MS_MAX:
        raise FlagError(
            f"-election-timeout[{election_ms}ms] is too long, and should be set less than"
            f" {ELECTION_MS_MAX}ms"
        )


def _check_initial_cluster(settings: Settings) -> None:
    where = settings.where("initial-cluster")
    if settings["initial-cluster"]:
        try:
            text = settings["initial-cluster"]
            nameless = settings.values.get("initial-cluster-state") == "existing"
            initial = parse_initial_cluster(text, nameless=nameless)
        except ValueError as error:
            advice = _quoting_advice(text) or url_advice(text, "initial-cluster")
            raise FlagError(
                f"error setting up initial cluster: {error} (in {where}){advice}"
            ) from None
        for urls in initial.values():
            for url in urls:
                _check_host(settings, "initial-cluster", url)
    elif settings.is_set("initial-cluster"):
        raise FlagError(
            f'couldn\'t find local name "{settings["name"]}" in the initial cluster configuration:'
            f" {where} is empty"
        )


def check_restore_settings(settings: Settings) -> None:
    _check_name(settings)
    _check_initial_cluster(settings)
    for url in settings["initial-advertise-peer-urls"]:
        _check_host(settings, "initial-advertise-peer-urls", url)


def _check_host(settings: Settings, name: str, url: str) -> None:
    """Raise FlagError for an advertised URL without host or port; warn of a wildcard address.

    Differs from etcd, whose members then never find each other: often $private_ipv4 was empty.
    """
    host, port = url_address(url)
    if not port:
        raise FlagError(
            f"{settings.where(name)} has port 0 in {url}: nobody could connect to it; advertise the"
            f" port of the -listen flag, which must not be 0 then"
        )
    if not host:
        raise FlagError(
            f"{settings.where(name)} has no host in {url}: nobody could connect to it;"
            f" perhaps $private_ipv4 was empty: write the address of this machine, e.g."
            f" http://10.0.0.5:{port}, or set COREOS_PRIVATE_IPV4 in {ENVIRONMENT_FILE}"
        )
    if host in WILDCARD_HOSTS:
        settings.warn(
            f"{settings.where(name)} has {url}: that is for listening, from another machine nobody"
            f" can connect to it; advertise the address of this one, e.g. {_reachable(url)}"
        )


# -- TLS -------------------------------------------------------------------------


def check_tls(side: str, files: TlsFiles, urls: Sequence[str]) -> None:
    """Check and log the settings of TLS on one side, `client` or `peer`; urls: its -listen URLs.

    Raises StartError for files that cannot work, or that protect less than their flags promise.
    Source: etcd 2.3 pkg/transport/listener.go, etcdmain/etcd.go.  Differs from etcd 3, which
    skips the checks of names and revocations if client certificates are not required.
    """
    prefix = "peer-" if side == "peer" else ""
    pair = f"-{prefix}cert-file and -{prefix}key-file"
    cert, key = files.cert_file, files.key_file
    if bool(cert) != bool(key):
        raise StartError(
            f"KeyFile and CertFile must both be present[key: {key}, cert: {cert}]; give both {pair}"
        )
    _check_files(side, files)
    asks = files.client_cert_auth or files.ca_file
    if (files.crl_file or files.allowed_name or files.allowed_cn) and not asks:
        raise StartError(
            f"revocation lists and allowed names of {side} certificates need"
            f" -{prefix}client-cert-auth: without it no certificate is asked for"
        )
    if cert:
        ETCD_LOG.info(
            "%sTLS: cert = %s, key = %s, ca = %s, trusted-ca = %s, client-cert-auth = %s", side,
            cert, key, files.ca_file, files.trusted_ca_file, str(files.client_cert_auth).lower(),
        )
    for url in urls:
        if url.startswith("https:") and not cert:
            what = "given listener" if side == "client" else url
            raise StartError(
                f"cannot listen on TLS for {what}: KeyFile and CertFile are not presented; give"
                f" {pair}, or use http in -listen-{side}-urls"
            )
        if url.startswith("http:") and cert:
            ETCD_LOG.warning(
                "The scheme of %s url %s is http while %s key/cert files are presented. Ignored %s"
                " key/cert files.", side, url, side, side,
            )
        elif url.startswith("http:") and asks:
            ETCD_LOG.warning("%s certificates are not asked for on %s: that needs https, with %s",
                        side, url, pair)


def _check_files(side: str, files: TlsFiles) -> None:
    for flag in FLAGS["security"]:
        part, _, field = flag.field.rpartition(".")
        if part == f"{side}_tls" and field.endswith("_file") and getattr(files, field):
            try:
                check_readable(getattr(files, field))
            except StartError as error:
                raise StartError(
                    f"{error}; -{flag.name} must name a file that this user may read"
                ) from None


def make_config(settings: Settings) -> ServerConfig:
    """Return the configuration of the member: each flag fills its field.  Raises FlagError."""
    try:
        check_settings(settings)
    except FlagError as error:
        raise FlagError(f"error verifying flags, {error}") from None
    parts: Dict[str, Dict[str, Any]] = {"": {}, "client_tls": {}, "peer_tls": {}}
    for flag in itertools.chain.from_iterable(FLAGS.values()):
        part, _, field = flag.field.rpartition(".")
        if field:
            parts[part][field] = settings[flag.name]
    config = ServerConfig(
        **parts[""], client_tls=TlsFiles(**parts["client_tls"]),
        peer_tls=TlsFiles(**parts["peer_tls"]),
    )
    initial = config.initial_cluster
    if not initial and not config.discovery and not config.discovery_srv:
        initial = default_initial_cluster(config)
    count = config.snapshot_count or DEFAULT_SNAPSHOT_COUNT
    return config._replace(initial_cluster=initial, snapshot_count=count)
