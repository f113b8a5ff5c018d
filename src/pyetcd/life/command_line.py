"""The command line: the one module that prints, and touches signals and process limits."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import logging
import os
import signal
import socket
import sys
import threading
from typing import Callable, Mapping, Optional, Sequence

from ..base.errors import ClusterFull, StartError
from ..base.ids import package_logger
from ..base.limits import DEFAULT_SNAPSHOT_COUNT, SERVER_VERSION, __version__
from ..base.system import check_system, open_files_limit, raise_files_limit
from ..member.cluster import SERVER_LOG
from ..member.configuration import ServerConfig
from .addresses import ETCD_LOG
from .checks import check_tls, make_config
from .embedding import Server, ServerThread
from .flags import FLAGS, IGNORED_BOOLS, NO_EFFECT, FlagError
from .logs import set_up_logging
from .proxy import ProxyServer
from .settings import Settings
from .tools import TOOLS, flag_lines, run_tool

DESCRIPTORS_MIN = 150               # open files a member needs for itself; at or below: refused


def usage() -> str:
    lines = [
        "usage: pyetcd [flags]", "       start a pyetcd member", "",
        *(line for name, tool in TOOLS.items() for line in (
            f"       pyetcd {name} {tool.words}",
            f"       {tool.brief}: see pyetcd {name} -help", "")),
        "       pyetcd -version", "       show the version", "",
        "       pyetcd -h | -help", "       show the help information about pyetcd", "",
        "Every flag may be written -flag value, -flag=value, --flag value or --flag=value; its",
        "environment variable is ETCD_ and its name, upper case, with _ for -.",
    ]
    for title, flags in FLAGS.items():
        lines += ["", f"{title} flags:", "", *flag_lines(flags)]
    lines += ["", "of etcd 0.4, without effect flags:", ""]
    lines += [f"\t--{name}" for name in IGNORED_BOOLS]
    lines += ["", "of etcd 3 or experimental, without effect flags:"]
    for reason, words in NO_EFFECT.items():
        lines += ["", f"\t({reason})", *(f"\t--{word.rstrip('?')}" for word in words.split())]
    return "\n".join(lines) + "\n"


def version_text() -> str:
    import platform  # not at the top: 3 ms
    machine = platform.machine().lower()
    machine = {"x86_64": "amd64", "aarch64": "arm64", "i686": "386"}.get(machine, machine)
    python = f"{platform.python_implementation()} {platform.python_version()}"
    return (
        f"etcd Version: {SERVER_VERSION}\nGit SHA: pyetcd-{__version__}\nGo Version: {python}\n"
        f"Go OS/Arch: {sys.platform}/{machine}\n"
    )


def check_data_dir(config: ServerConfig) -> str:
    """Log the path of the data directory; return its kind: `member`, `proxy`, or "" if new."""
    path = config.data_dir or config.name + ".etcd"
    if not config.data_dir:
        ETCD_LOG.info("no data-dir provided, using default data-dir ./%s", path)
    for kind in ("member", "proxy"):
        if os.path.isdir(os.path.join(path, kind)):
            ETCD_LOG.info("already initialized as %s before, starting as etcd %s...", kind, kind)
            return kind
    return ""


def raise_descriptor_limit() -> None:
    """Raise the limit of open files to the maximum.  Raises StartError if that is too few."""
    raise_files_limit()
    limit = open_files_limit()
    if limit <= DESCRIPTORS_MIN:
        raise StartError(
            f"file descriptor limit[{limit}] of etcd process is too low, and should be set higher"
            f" than {DESCRIPTORS_MIN} to ensure internal usage; raise it with ulimit -n"
        )


def notify_systemd(environ: Mapping[str, str]) -> None:
    """Report to systemd that the member is up, if NOTIFY_SOCKET is set (sd_notify protocol)."""
    path = environ.get("NOTIFY_SOCKET", "")
    if not path:
        # etcd logs this wherever systemd runs, from a terminal too.
        if os.getppid() == 1 and os.path.isdir("/run/systemd/system"):
            ETCD_LOG.error("forgot to set Type=notify in systemd service file?")
        return
    address = "\0" + path[1:] if path.startswith("@") else path
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"READY=1", address)
    except OSError as error:
        ETCD_LOG.error("failed to notify systemd for readiness: %s", error)


class SignalStop:
    """Stops the member at SIGINT or SIGTERM, then ends the process by that signal.

    Before install() the signals end the process at once: the member serves nothing yet.
    """

    _SIGNALS = {signal.SIGINT: "interrupt", signal.SIGTERM: "terminated"}

    def __init__(self) -> None:
        self._received = 0
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    def install(self, stop: Callable[[], None]) -> None:
        """Call stop() on a thread of its own at the first signal; ignore later ones."""
        def received(number: int, frame: object) -> None:
            if self._received:
                return
            self._received = number
            name = self._SIGNALS[signal.Signals(number)]
            logging.getLogger("pyetcd").info("received %s signal, shutting down...", name)
            threading.Thread(target=stop, name="stop", daemon=True).start()

        for number in self._SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, received)

    def end(self) -> None:
        """Die of the received signal, so that the parent process sees it; not as pid 1."""
        if self._received and os.getpid() != 1:
            logging.shutdown()
            signal.signal(self._received, signal.SIG_DFL)
            os.kill(os.getpid(), self._received)


def log_tls_and_cors(config: ServerConfig) -> None:
    """Log the TLS settings of both ports and the CORS origins.  Raises StartError."""
    check_tls("peer", config.peer_tls, config.listen_peer_urls if config.proxy == "off" else ())
    check_tls("client", config.client_tls, config.listen_client_urls)
    if config.cors:
        ETCD_LOG.info("cors = %s", ",".join(config.cors))


def start_server(config: ServerConfig, kind: str) -> ServerThread:
    """Start what check_data_dir() has found, or else what the flags say.  Raises StartError."""
    if kind == "member" or (config.proxy == "off" and kind != "proxy"):
        try:
            return Server.from_config(config).__enter__()
        except ClusterFull:
            ETCD_LOG.info("discovery cluster full, falling back to proxy")
    return ProxyServer.from_config(config).__enter__()


def run_member(config: ServerConfig, environ: Mapping[str, str]) -> int:
    """Run a member or a proxy until it ends; return the exit code.  Raises StartError."""
    signals = SignalStop()
    with contextlib.suppress(OSError, RuntimeError):    # stderr is closed, or no file
        faulthandler.enable()           # a mapped file that cannot be read ends us: say where
    kind = check_data_dir(config)
    raise_descriptor_limit()
    server = start_server(config, kind)
    signals.install(server.stop)
    notify_systemd(environ)
    code = server.wait()
    signals.end()
    return code


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run `pyetcd` with these words after the command; return the exit code."""
    # The wal thread needs the GIL right after each sync: Python's default interval, 5 ms, would
    # delay every write by that much beside a busy reactor.
    sys.setswitchinterval(0.0005)
    # No full collection: with a million keys it takes 0.2 s and makes the p99 of writes 17 ms
    # instead of 5, and it frees nothing, as old objects of a member form no cycles.
    gc.set_threshold(2_000, 4, 1_000_000)   # the middle generation takes 4 ms; with 5,000, 5: 12
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        check_system()
    except StartError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    if words and words[0] in TOOLS:
        return run_tool(words[0], words[1:])
    try:
        settings = Settings(words, os.environ)
        if settings.help:
            sys.stdout.write(usage())
            return 0
        settings.check_leftover()
        if settings["version"]:
            sys.stdout.write(version_text())
            return 0
        settings.complete()
        config = make_config(settings)
    except FlagError as error:
        sys.stderr.write(error.line())
        return 1
    set_up_logging(settings)
    for level, package, text in settings.lines:
        package_logger(package).log(level, "%s", text)
    if settings["snapshot-count"] == 0:
        SERVER_LOG.info("set snapshot count to default %d", DEFAULT_SNAPSHOT_COUNT)
    try:
        log_tls_and_cors(config)
        return run_member(config, os.environ)
    except StartError as error:
        ETCD_LOG.critical("%s", error)
        return 1
