"""TLS: certificates that may change, and handshakes that do not block the reactor."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import selectors
import shlex
import socket
import ssl
from typing import Any, Callable, Dict, List, Optional, Tuple

from ..base.basics import TlsFiles
from ..base.errors import StartError
from ..base.ids import package_logger
from ..base.text import go_quote
from .reactor import Reactor
from .workers import SYSTEM_CLOCK

HANDSHAKE_SECONDS_MAX = 10.0        # to its first byte, and from there to its end; then closed
CERTIFICATE_CHECK_SECONDS = 1.0     # between two checks of the files for changes


class TlsSocket(ssl.SSLSocket):
    """A non-blocking TLS socket that raises BlockingIOError, as a plain one does."""

    def do_handshake(self, block: bool = False) -> None:
        """Add the names in a refused certificate to the error, as `names`."""
        try:
            super().do_handshake(block)
        except ssl.SSLCertVerificationError as error:
            # Python 3.9 does not tell them: names is None.
            chain: Any = getattr(self._sslobj, "get_unverified_chain", list)()   # type: ignore
            error.names = [str(name) for _, name in    # type: ignore[attr-defined]
                           chain[0].get_info().get("subjectAltName", ())] if chain else None
            raise

    def recv(self, size: int = 16_384, flags: int = 0) -> bytes:
        """Return up to about `size` received bytes; b"" at the end.

        This includes all bytes that OpenSSL has decrypted, as no selector reports those.
        """
        pieces: List[bytes] = []
        while size > 0 or self.pending():
            try:
                data = super().recv(16_384, flags)
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError, BlockingIOError):
                if not pieces:
                    raise BlockingIOError(errno.EAGAIN, "no data yet") from None
                break
            if not data:
                break
            pieces.append(data)
            size -= len(data)
        return b"".join(pieces)

    def send(self, data: Any, flags: int = 0) -> int:
        """Send without blocking; after BlockingIOError, repeat with at least the same bytes."""
        try:
            return super().send(data, flags)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise BlockingIOError(errno.EAGAIN, "cannot send yet") from None

    def shutdown(self, how: int) -> None:
        """End TLS first: without its close_notify a reply might have been cut off."""
        with contextlib.suppress(OSError, ValueError):
            self.unwrap()
        super().shutdown(how)


def _covers(kind: str, name: str, host: str) -> bool:
    """Tell whether a name of a certificate, perhaps a wildcard, covers `host`."""
    if kind == "IP Address":
        for family in (socket.AF_INET, socket.AF_INET6):
            with contextlib.suppress(OSError):
                return socket.inet_pton(family, name.strip()) == socket.inet_pton(family, host)
        return False
    name, host = name.lower().rstrip("."), host.lower().rstrip(".")
    first, _, parent = host.partition(".")
    return kind == "DNS" and (name == host or bool(first and parent) and name == f"*.{parent}")


class TlsContext:
    """The TLS settings of one side; certificates are read again when they change.

    server  True to accept connections, False to make them
    now     monotonic seconds

    Differs from etcd: TLS 1.2 and newer only (etcd 2.3: 1.0), and etcd reads its files once.
    Raises StartError for unusable files; later, the last usable ones stay in use.
    """

    def __init__(
        self, files: TlsFiles, *, server: bool, now: Callable[[], float] = SYSTEM_CLOCK.now
    ) -> None:
        self._files = files
        self._server = server
        self._now = now
        self._seen = self._signature()
        self._refused = self._seen          # the last that was logged as unusable
        self._checked = now()
        self._context = self._load()

    @property
    def current(self) -> ssl.SSLContext:
        """The context to use for the next connection."""
        now = self._now()
        if now - self._checked >= CERTIFICATE_CHECK_SECONDS:
            self._checked = now
            signature = self._signature()
            if signature != self._seen:
                self._reload(signature)
        return self._context

    def check_peer(self, sock: ssl.SSLSocket) -> None:
        """Raise ssl.SSLError unless the client's certificate has the name that is allowed."""
        cn, host = self._files.allowed_cn, self._files.allowed_name
        if not self._server or not (cn or host):
            return
        certificate: Dict[str, Any] = sock.getpeercert() or {}
        common = [value for group in certificate.get("subject", ()) for kind, value in group
                  if kind == "commonName"][-1:]             # Go, too, takes the last one
        if cn and common != [cn]:
            raise ssl.SSLError(0, f"the client certificate is for {common}, not for {cn}")
        names = certificate.get("subjectAltName") or [("DNS", name) for name in common]
        if host and not any(_covers(kind, name, host) for kind, name in names):
            shown = [name for _, name in names]
            raise ssl.SSLError(0, f"the client certificate is for {shown}, not for {host}")

    def _signature(self) -> List[Optional[Tuple[int, int, int]]]:
        """Return time, inode and size of each file, which change with it."""
        files = self._files
        found: List[Optional[Tuple[int, int, int]]] = []
        for path in (files.cert_file, files.key_file, files.trusted_ca_file, files.ca_file,
                     files.crl_file):
            try:
                status = os.stat(path)
                found.append((status.st_mtime_ns, status.st_ino, status.st_size))
            except OSError:             # unreadable, or ""
                found.append(None)
        return found

    def _reload(self, signature: List[Optional[Tuple[int, int, int]]]) -> None:
        """Use the changed files; retry unreadable ones later, as descriptors may be short."""
        log = package_logger("tls")
        try:
            self._context = self._load()
        except StartError as error:
            if signature != self._refused:
                log.error("certificates changed and cannot be used, the old ones stay: %s", error)
            self._refused = signature
        else:
            self._seen = signature
            log.info("certificates changed, new connections use them: %s", self._files.cert_file)

    def _load(self) -> ssl.SSLContext:
        files = self._files
        kind = ssl.PROTOCOL_TLS_SERVER if self._server else ssl.PROTOCOL_TLS_CLIENT
        context = ssl.SSLContext(kind)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.sslsocket_class = TlsSocket
        if self._server and (files.client_cert_auth or files.ca_file):
            context.verify_mode = ssl.CERT_REQUIRED
        if files.cert_file or self._server:
            load_pair(context, files.cert_file, files.key_file)
        authorities = [path for path in (files.trusted_ca_file, files.ca_file) if path]
        for path in authorities:
            load_pem(path, functools.partial(context.load_verify_locations, path))
        if not authorities and context.verify_mode != ssl.CERT_NONE:
            purpose = ssl.Purpose.CLIENT_AUTH if self._server else ssl.Purpose.SERVER_AUTH
            context.load_default_certs(purpose)
        if files.crl_file:
            context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
            load_pem(files.crl_file, lambda: context.load_verify_locations(files.crl_file), "crl")
        return context


_default_tls: List[TlsContext] = []


def default_tls() -> TlsContext:
    """Return the client settings for all other cases: the system's authorities decide."""
    if _default_tls:
        return _default_tls[0]
    context = TlsContext(TlsFiles(), server=False)
    with contextlib.suppress(OSError), open(os.devnull, "rb"):
        _default_tls.append(context)    # without a free descriptor it has no authorities: not kept
    return context


def check_readable(path: str) -> None:
    """Raise StartError, with etcd's words, unless the file can be read."""
    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        raise StartError(f"open {path}: {(error.strerror or str(error)).lower()}") from None


def load_pem(path: str, load: Callable[[], object], kind: str = "x509") -> None:
    """Run load(), which reads PEM file `path`; `openssl {kind}` shows it.  Raises StartError."""
    check_readable(path)
    try:
        load()
    except (OSError, ValueError) as error:
        raise StartError(
            f"cannot use {path}: {_ssl_words(error)}; it must hold PEM text, look at it with"
            f" `openssl {kind} -noout -text -in {shlex.quote(path)}`"
        ) from None


def _ssl_words(error: Exception) -> str:
    return (getattr(error, "reason", None) or str(error)).lower().replace("_", " ")


def load_pair(context: ssl.SSLContext, cert_file: str, key_file: str) -> None:
    """Load a certificate and its key into `context`.  Raises StartError."""
    check_readable(cert_file)
    check_readable(key_file)
    asked: List[bool] = []

    def passphrase() -> str:
        asked.append(True)
        raise ValueError("the key is encrypted")

    try:
        context.load_cert_chain(cert_file, key_file, password=passphrase)
    except (OSError, ValueError) as error:
        fault = _pair_error(cert_file, key_file, error)
        if asked:
            plain = f"{os.path.splitext(key_file)[0]}-plain.pem"
            fault = (
                f"the key is encrypted, and nobody can be asked for the passphrase; write it"
                f" without one with `openssl pkey -in {shlex.quote(key_file)}"
                f" -out {shlex.quote(plain)}` and name {plain}"
            )
        raise StartError(f"cannot use {cert_file} and its key {key_file}: {fault}") from None


def _pair_error(cert_file: str, key_file: str, error: Exception) -> str:
    """Return why OpenSSL cannot load a certificate and its key, from their content."""
    for path, label, kind in (
        (cert_file, b"CERTIFICATE-----", "x509"), (key_file, b"PRIVATE KEY-----", "pkey"),
    ):
        with open(path, "rb") as file:
            content = file.read(PEM_BYTES_MAX)
        if b"-----BEGIN " not in content:
            shown = shlex.quote(path)
            return (
                f"it must hold PEM text, and {path} does not; if that is in DER, `openssl {kind}"
                f" -inform der -in {shown} -out {shlex.quote(path + '.pem')}` makes PEM of it"
            )
        if label not in content:
            found = "a private key" if b"PRIVATE KEY-----" in content else "a certificate"
            other = "a certificate" if kind == "x509" else "a private key"
            return f"{path} holds {found} and not {other}; perhaps the two files are exchanged"
    if getattr(error, "reason", "") in _MISMATCHES:
        return (
            f"the key does not belong to the certificate, whose public key is another; compare"
            f" `openssl x509 -noout -pubkey -in {shlex.quote(cert_file)}` with `openssl pkey"
            f" -pubout -in {shlex.quote(key_file)}`"
        )
    return f"{_ssl_words(error)}; the files must hold PEM text, whole and unchanged"


PEM_BYTES_MAX = 1 << 20             # of a file that are searched for labels
# OpenSSL's reasons for a key of another certificate; the last: they are of different kinds.
_MISMATCHES = ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED")


def tls_reason(error: Exception) -> str:
    """Return one line: why a TLS connection failed, and the remedy if it is known."""
    reason = str(getattr(error, "reason", None) or "")
    verify = getattr(error, "verify_message", "")
    if verify:
        hint = _VERIFY_HINTS.get(verify, "")
        if "mismatch" in verify:
            names: Optional[List[str]] = getattr(error, "names", None)
            shown = ", ".join(map(go_quote, (names or [])[:NAMES_SHOWN_MAX]))
            has = f" it has {shown or 'no names, and a CN does not count'};"
            hint = (f"{has if names is not None else ''} issue one whose subjectAltName has the"
                    " host of the URL that leads to it")
        return f"the other side's certificate cannot be verified: {verify}{hint}"
    if reason in _TLS_REASONS:
        return _TLS_REASONS[reason]
    return f"tls: {reason.lower().replace('_', ' ')}" if reason else f"tls: {error}"


NAMES_SHOWN_MAX = 10                # of a certificate, in a log line
_VERIFY_HINTS = {
    "certificate has expired": "; issue a new one, or set the clock right",
    "certificate is not yet valid": "; set the clock right",
    "unable to get local issuer certificate": "; -trusted-ca-file must name the authority that"
                                              " signed it",
    "self-signed certificate": "; -trusted-ca-file must name it",
    "certificate revoked": " by the revocation list",
}
_TLS_REASONS = {
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "client didn't provide a certificate, and client-cert-auth"
                                         " asks for one",
    "HTTP_REQUEST": "client sent an HTTP request to an HTTPS server; use an https:// URL",
    "WRONG_VERSION_NUMBER": "first record does not look like a TLS handshake; perhaps the other"
                            " side speaks plain HTTP",
    "UNSUPPORTED_PROTOCOL": "the other side offers no TLS 1.2 or newer",
    "TLSV1_ALERT_PROTOCOL_VERSION": "remote error: the other side refuses this version of TLS",
    "TLSV1_ALERT_UNKNOWN_CA": "remote error: unknown certificate authority; the other side's CA"
                              " file must name the authority that signed our certificate",
    "SSLV3_ALERT_BAD_CERTIFICATE": "remote error: bad certificate; the other side does not accept"
                                   " ours",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": "remote error: the other side does not accept our"
                                       " certificate",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "remote error: our certificate has expired; issue a new one",
    "SSLV3_ALERT_CERTIFICATE_REVOKED": "remote error: our certificate is revoked",
    "SSLV3_ALERT_HANDSHAKE_FAILURE": "remote error: handshake failure",
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "remote error: certificate required; give ours with"
                                         " -peer-cert-file and -peer-key-file",
}


class Handshake:
    """A TLS handshake under way; calls done(error) at its end, None: `sock` may be used.

    The socket is registered with the reactor only for this time.  Thread: reactor.
    """

    def __init__(
        self, reactor: Reactor, sock: ssl.SSLSocket, done: Callable[[Optional[OSError]], None],
        *, patient: bool = False,
    ) -> None:
        self.sock = sock
        self._reactor = reactor
        self._done = done
        late = TimeoutError("TLS handshake timeout")
        self._timer = reactor.call_later(HANDSHAKE_SECONDS_MAX, self._end, late)
        reactor.register(
            sock, selectors.EVENT_READ | selectors.EVENT_WRITE, self._step, patient=patient)

    def cancel(self) -> None:
        """Stop without a call of done(); the socket stays open.  Once only, before the end."""
        self._timer.cancel()
        self._reactor.unregister(self.sock)

    def _step(self, mask: int) -> None:
        try:
            self.sock.do_handshake()
        except ssl.SSLWantReadError:
            self._reactor.modify(self.sock, selectors.EVENT_READ, self._step)
        except ssl.SSLWantWriteError:
            self._reactor.modify(self.sock, selectors.EVENT_WRITE, self._step)
        except (OSError, ValueError) as error:  # ValueError: a host name that cannot be checked
            self._end(error if isinstance(error, OSError) else OSError(str(error)))
        else:
            self._end(None)

    def _end(self, error: Optional[OSError]) -> None:
        self.cancel()
        self._done(error)
