"""The test kit: members that a test kills, freezes and cuts off, on threads of their own."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    FrozenSet,
    Generator,
    Iterable,
    Mapping,
    Optional,
    Set,
    Tuple,
    TypeVar,
)

from ..base.errors import ServerStopped
from ..base.messages import Message, MsgType
from ..member.cluster import Member, format_id
from ..member.server import EtcdServer
from ..net.workers import SYSTEM_CLOCK
from ..peer.transport import Transport
from ..raft.core import RaftRole
from .embedding import Server, checked_settings

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..member.configuration import MemberSettings

# All members of a test share one process: a stall of the machine or of a debugger stops them
# together, and late ticks are dropped.  So even these short times cause no needless elections.
LOCAL_HEARTBEAT_MS = 20
LOCAL_ELECTION_MS = 200
LOCAL_READY_SECONDS = 10.0          # for a start to be complete; above: TimeoutError
LOCAL_POLL_SECONDS = 0.002
REPUBLISH_SECONDS = 0.5             # then publish once more: a change of leader may have lost it

_Polled = TypeVar("_Polled")
_Ids = FrozenSet[int]               # of members
_NO_CUTS: Tuple[_Ids, _Ids] = (frozenset(), frozenset())


def _poll(look: Callable[[], _Polled], timeout_s: float, failure: Callable[[], str]) -> _Polled:
    """Return the first true result of look().  Raises TimeoutError(failure()) after timeout_s."""
    deadline = SYSTEM_CLOCK.now() + timeout_s
    while True:
        found = look()
        if found:
            return found
        if SYSTEM_CLOCK.now() > deadline:
            raise TimeoutError(failure())
        time.sleep(LOCAL_POLL_SECONDS)


class _CutTransport(Transport):
    """A transport whose links to other members can be cut, in one direction or in both.

    Sender and receiver drop the messages, also those on their way.  A link cut in both directions
    is closed.  Requests for /members and /version, as at a first start, pass.
    """

    _mute: _Ids = frozenset()           # members to which nothing is sent
    _deaf: _Ids = frozenset()           # members from which nothing is received

    def cut(self, mute: _Ids, deaf: _Ids, members: Mapping[int, Member]) -> None:
        """Drop messages to `mute` and from `deaf` from now on, and no others."""
        before, closed = self._mute & self._deaf, mute & deaf
        self._mute, self._deaf = mute, deaf
        for id in (before ^ closed) & members.keys():
            self.remove_peer(id)
            self.add_peer(id, members[id].peer_urls)

    def add_peer(self, member_id: int, urls: Iterable[str]) -> None:
        super().add_peer(member_id, urls)
        if member_id in self._mute & self._deaf and member_id in self._peers:
            self._peers[member_id].stop()

    def offer(self, messages: Iterable[Message]) -> None:
        """Send messages; report those to cut members as lost, as if these members were down."""
        passed = []
        for message in messages:
            if message.to not in self._mute:
                passed.append(message)
                continue
            self._context.unreachable(message.to)
            if message.type == MsgType.SNAP:
                self._context.snapshot_done(message.to, False)
        super().offer(passed)

    def _receive(self, message: Message, size: int) -> Generator[None, None, int]:
        return 500 if message.sender in self._deaf else (yield from super()._receive(message, size))


class _LocalServer(Server):
    """The server of a LocalMember, which starts with its links cut."""

    _transport_type = _CutTransport
    cuts = _NO_CUTS                     # members to which it sends nothing, and hears nothing from

    @property
    def is_alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def hold(self, held: threading.Event, release: threading.Event) -> None:
        """Stop the reactor after its current turn: set `held`, then wait for `release`."""
        def wait() -> None:
            held.set()
            release.wait()

        self._reactor.call_soon_threadsafe(wait)

    def abandon(self) -> None:
        """End the member while its reactor is held, before it does anything else."""
        self._failed(ServerStopped("killed"))

    def cut_links(self, etcd: EtcdServer) -> None:
        assert isinstance(etcd.transport, _CutTransport)
        etcd.transport.cut(*self.cuts, etcd.cluster.members)

    def is_ready(self, etcd: EtcdServer) -> bool:
        """True if the member is published, and the cluster has agreed on its version."""
        return self._ready.is_set() and bool(etcd.cluster.version)

    def _start_work(self) -> None:
        assert self.etcd is not None
        threading.current_thread().name = f"reactor-{self.config.name}"
        self.cut_links(self.etcd)
        super()._start_work()
        raft = self.etcd.node.raft
        if raft.term <= 1 and len(raft.voters) > 1:
            raft.election_elapsed = 0       # LocalCluster has a member of a new cluster campaign


def _reserve_url(owned: contextlib.ExitStack, host: str, port: int) -> str:
    """Return the URL of a port, 0: of a free one; a socket, closed with `owned`, reserves it.

    While the member is down, no program or outgoing connection gets the port, and connections to it
    are refused.  macOS allows one socket per port: there nothing keeps it.  Raises OSError.
    """
    sock = owned.enter_context(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET))
    if port:                            # despite old connections, but not beside a listener
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((host, port))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a free one must be free now
    address = sock.getsockname()
    try:
        socket.create_server(address[:2], family=sock.family).close()
    except OSError:
        sock.close()
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{address[1]}"


class LocalMember:
    """A member in this process, for tests: it can be killed, frozen and started again.

        with pyetcd.LocalMember() as member:
            print(member.client_url)

    directory  the parent of its data directory; "": a temporary one, removed by close()
    settings   fields of ServerConfig; heartbeat and election are 20 and 200 ms unless given

    The member keeps its ports on 127.0.0.1, and its data, until close().  It logs to the loggers
    below `pyetcd`, on a thread called `reactor-<name>`.  Guarantee: after a kill it finds on its
    disk the same as a process after `kill -9`.  Limit: a power cut is not imitated.
    Thread: any, one at a time.
    """

    def __init__(
        self, name: str = "etcd1", directory: str = "", **settings: Unpack[MemberSettings]
    ) -> None:
        self.name = name
        self.client_url = ""            # of the first listener; the same after a restart
        self.peer_url = ""
        self.initial_cluster = ""       # as the flag; "": this member alone
        self._directory = directory
        self._data_dir = ""
        self._settings = checked_settings(settings)
        self._server: Optional[_LocalServer] = None
        self._cuts = _NO_CUTS
        self._release: Optional[threading.Event] = None     # the held reactor waits for it
        self._owned = contextlib.ExitStack()    # ports and temporary directory

    def __enter__(self) -> LocalMember:
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(self.close)
            self.start()
            on_failure.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{self.name} {self.client_url} {self._state()}>"

    # -- life --------------------------------------------------------------

    def start(self, timeout_s: float = LOCAL_READY_SECONDS) -> None:
        """Start the member unless it runs, and wait until it is ready.

        timeout_s  0: do not wait, as without a quorum it cannot become ready
        Raises TimeoutError, StartError.
        """
        if not self.is_running:
            self.reserve()
            settings = {
                "name": self.name, "data_dir": self._data_dir,
                "listen_client_urls": [self.client_url], "listen_peer_urls": [self.peer_url],
                "heartbeat_ms": LOCAL_HEARTBEAT_MS, "election_ms": LOCAL_ELECTION_MS,
                "initial_cluster": self.initial_cluster, **self._settings,
            }
            server = _LocalServer(**settings)
            server.cuts = self._cuts
            server.__enter__()
            self._server = server
        if timeout_s:
            self.wait_ready(timeout_s)

    def wait_ready(self, timeout_s: float = LOCAL_READY_SECONDS) -> None:
        """Wait until the member has a leader, its log, and has published its URLs to the others.

        Raises TimeoutError, and ServerStopped if the member does not run.
        """
        server = self._running()
        republish_at = SYSTEM_CLOCK.now() + REPUBLISH_SECONDS

        def is_ready() -> bool:
            nonlocal republish_at
            if self.is_paused or server.call(server.is_ready):
                return not self.is_paused
            if SYSTEM_CLOCK.now() > republish_at:
                republish_at += REPUBLISH_SECONDS
                server.call(lambda etcd: etcd.publication.propose())     # which is harmless
            return False

        _poll(is_ready, timeout_s,
              lambda: f"{self.name} is not ready after {timeout_s} s: {self._state()}")

    def kill(self) -> None:
        """End the member at once, as `kill -9` does; an unfinished write may reach the disk."""
        if self._server is not None:
            if self.is_paused:
                self._server.abandon()
            self.resume()
            self._server.kill()

    def stop(self) -> None:
        """Stop in order, as at SIGTERM: transfer the leadership, answer waiting requests."""
        self.resume()
        if self._server is not None:
            self._server.stop()

    def restart(self, timeout_s: float = LOCAL_READY_SECONDS) -> None:
        """Kill the member and start it with the same ports and data; see start()."""
        self.kill()
        self.start(timeout_s)

    def pause(self) -> None:
        """Stop all work until resume(), as at SIGSTOP; sockets stay open.  Raises ServerStopped.

        Only the batch that the disk thread has already received is written.
        """
        if not self.is_paused:
            held, release = threading.Event(), threading.Event()
            self._running().hold(held, release)
            while not held.wait(LOCAL_POLL_SECONDS):
                self._running()
            self._release = release

    def resume(self) -> None:
        """Continue, as at SIGCONT; late clock ticks are dropped, as in any member."""
        release, self._release = self._release, None
        if release is not None:
            release.set()

    def close(self) -> None:
        """Kill the member, release its ports, and remove the temporary directory."""
        self.kill()
        self._owned.close()
        self.client_url = self.peer_url = ""

    # -- facts -------------------------------------------------------------

    @property
    def client_urls(self) -> Tuple[str, ...]:
        """The client URL, as Server has it; () before the first start."""
        return (self.client_url,) if self.client_url else ()

    @property
    def peer_urls(self) -> Tuple[str, ...]:
        """The peer URL, as Server has it; () before the first start."""
        return (self.peer_url,) if self.peer_url else ()

    @property
    def is_running(self) -> bool:
        """True from start() to the end of the member, also while it is paused."""
        return self._server is not None and self._server.is_alive

    @property
    def is_paused(self) -> bool:
        """True between pause() and resume()."""
        return self._release is not None

    @property
    def id(self) -> str:
        """The member id as the API and the log write it; "" before the first start."""
        return format_id(self.member_id) if self.member_id else ""

    def call(self, work: Callable[[EtcdServer], Any]) -> Any:
        """Run work(etcd_server) on the member's thread and return its result, also while paused.

        Raises ServerStopped if the member does not run, and any exception of work.
        """
        server = self._running()
        if self.is_paused and server.etcd is not None:
            return work(server.etcd)            # on this thread: the reactor is held
        return server.call(work)

    # -- inside ------------------------------------------------------------

    def reserve(self, host: str = "127.0.0.1", client_port: int = 0, peer_port: int = 0) -> None:
        """Reserve the two ports, if that is not yet done; 0: a free one.  Raises OSError."""
        if self.client_url:
            return
        directory = self._directory
        if not directory:
            import tempfile
            directory = self._owned.enter_context(tempfile.TemporaryDirectory("-pyetcd"))
        self._data_dir = os.path.join(directory, self.name)
        self.client_url, self.peer_url = (
            _reserve_url(self._owned, host, port) for port in (client_port, peer_port))

    def cut(self, mute: _Ids, deaf: _Ids) -> None:
        self._cuts = mute, deaf
        if self._server is not None:
            self._server.cuts = self._cuts
            if self.is_running:
                self.call(self._server.cut_links)

    def leading_term(self) -> int:
        """Return the term in which the member leads and has committed; 0 if paused or no leader."""
        if self.is_paused:
            return 0
        try:
            return int(self.call(_leading_term))
        except ServerStopped:
            return 0

    @property
    def member_id(self) -> int:
        """The id as a number; 0 before the first start."""
        etcd = self._server.etcd if self._server is not None else None
        return etcd.member_id if etcd is not None else 0

    def _running(self) -> _LocalServer:
        if self._server is None or not self._server.is_alive:
            raise ServerStopped()
        return self._server

    def _state(self) -> str:
        """Return role and term for messages, or `down`."""
        if not self.is_running:
            return "down"
        raft = self.call(lambda etcd: etcd.node.raft)
        return f"{'paused, ' * self.is_paused}{raft.role.name.lower()} at term {raft.term}"


def _leading_term(etcd: EtcdServer) -> int:
    term = etcd.node.raft.term
    return term if etcd.is_leader and etcd.raft_term == term else 0


class LocalCluster:
    """Members in this process, for tests: their links can be cut, and each is a LocalMember.

        with pyetcd.LocalCluster(3) as cluster:
            cluster.wait_leader().kill()
            print(cluster.wait_leader().client_url)

    size, directory, settings: see LocalMember; the members are called etcd1, etcd2, …
    Thread: any, one at a time.
    """

    def __init__(
        self, size: int = 3, directory: str = "", **settings: Unpack[MemberSettings]
    ) -> None:
        self.members = [
            LocalMember(f"etcd{number}", directory, **settings) for number in range(1, size + 1)
        ]
        self._cuts: Set[Tuple[int, int]] = set()    # (sender, receiver), as indexes of members

    def __enter__(self) -> LocalCluster:
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(self.close)
            self.start()
            on_failure.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def start(self, timeout_s: float = LOCAL_READY_SECONDS) -> None:
        """Start the members that are down, and wait until all are ready; see LocalMember.start."""
        for member in self.members:
            member.reserve()
        initial = ",".join(f"{member.name}={member.peer_url}" for member in self.members)
        for member in self.members:
            member.initial_cluster = initial
            member.start(timeout_s=0)
        if timeout_s:
            deadline = SYSTEM_CLOCK.now() + timeout_s
            with contextlib.suppress(TimeoutError):
                _poll(self._campaign_in_new_cluster, timeout_s, str)
            for member in self.members:
                member.wait_ready(max(deadline - SYSTEM_CLOCK.now(), 0.0))

    def close(self) -> None:
        """Kill all members, release their ports, and remove the temporary directories."""
        for member in self.members:
            member.close()

    @property
    def client_urls(self) -> Tuple[str, ...]:
        """One client URL of each member, running or not."""
        return tuple(member.client_url for member in self.members)

    # -- the leader --------------------------------------------------------

    def leader(self) -> Optional[LocalMember]:
        """Return the running member, not paused, that leads in the newest term, or None."""
        return self._leader_of(self.members)

    def wait_leader(
        self, timeout_s: float = LOCAL_READY_SECONDS, among: Iterable[LocalMember] = ()
    ) -> LocalMember:
        """Wait for a leader that has committed an entry in its term, and return it.

        among  the members that count, such as one side of a partition; (): all
        Raises TimeoutError, which names the state of each member.
        """
        candidates = list(among) or self.members
        leader = _poll(lambda: self._leader_of(candidates), timeout_s,
                       lambda: f"no leader after {timeout_s} s: {candidates}")
        assert leader is not None
        return leader

    @staticmethod
    def _leader_of(members: Iterable[LocalMember]) -> Optional[LocalMember]:
        terms = [(member.leading_term(), member) for member in members]
        term, leader = max(terms, key=lambda pair: pair[0])
        return leader if term else None

    # -- the network between the members -----------------------------------

    def partition(self, *groups: Iterable[LocalMember]) -> None:
        """Divide the network between the members, in place of any earlier partition() and cut().

        Members of different groups cannot reach each other; members in no group form one more.
        Open connections between groups are closed.  Clients reach every member, and restart()
        keeps the cuts.  ValueError: a member is in two groups, or not of this cluster.
        """
        sides = [sorted(map(self.members.index, group)) for group in groups]
        named = [place for side in sides for place in side]
        if len(set(named)) < len(named):
            raise ValueError("a member is in two groups")
        sides.append([place for place in range(len(self.members)) if place not in named])
        self._set_cuts({
            (a, b) for ours in sides for theirs in sides if ours is not theirs
            for a in ours for b in theirs
        })

    def cut(self, source: LocalMember, target: LocalMember) -> None:
        """Lose all messages from `source` to `target`; the other direction is unchanged."""
        self._set_cuts(self._cuts | {(self.members.index(source), self.members.index(target))})

    def heal(self) -> None:
        """Undo every partition() and cut()."""
        self._set_cuts(set())

    def _set_cuts(self, cuts: Set[Tuple[int, int]]) -> None:
        self._cuts = cuts
        ids = [member.member_id for member in self.members]
        for place, member in enumerate(self.members):
            member.cut(
                frozenset(ids[target] for source, target in cuts if source == place),
                frozenset(ids[source] for source, target in cuts if target == place),
            )

    # -- the first election ------------------------------------------------

    def _campaign_in_new_cluster(self) -> bool:
        """Let the last member campaign as soon as the others of a new cluster accept its messages.

        The first election then needs no timeout and has no rivals.  Returns True from then on.
        """
        candidate = self.members[-1]
        return bool(candidate.call(_has_begun)) or all(
            _accepts(candidate, other) and _accepts(other, candidate) for other in self.members[:-1]
        ) and bool(candidate.call(_begin_election))


def _begin_election(etcd: EtcdServer) -> bool:
    """Campaign; False as long as the member has not applied that it is a voter."""
    if not _has_begun(etcd):
        etcd.node.campaign()
    return _has_begun(etcd)


def _has_begun(etcd: EtcdServer) -> bool:
    """True from the first campaign of a cluster; later ones need no help."""
    return etcd.node.raft.term > 1 or etcd.node.raft.role is not RaftRole.FOLLOWER


def _accepts(member: LocalMember, sender: LocalMember) -> bool:
    """True if `member` does not drop messages from `sender`: see DataLossCheck."""
    message = Message(MsgType.VOTE, sender=sender.member_id)

    def accepts(etcd: EtcdServer) -> bool:
        return etcd.transport.drop is None or not etcd.transport.drop(message)

    return bool(member.call(accepts))


class ClusterFactory:
    """The fixture `etcd_cluster_factory`: each call starts a LocalCluster until the test ends."""

    def __init__(self, tmp_path_factory: Any, clusters: contextlib.ExitStack) -> None:
        self._tmp_path_factory = tmp_path_factory
        self._clusters = clusters

    def __call__(self, size: int = 3, **settings: Unpack[MemberSettings]) -> LocalCluster:
        directory = str(self._tmp_path_factory.mktemp("etcd"))
        return self._clusters.enter_context(LocalCluster(size, directory, **settings))


class PytestPlugin:
    """The fixtures of pyetcd_pytest, for installations that name this class as the plugin."""

    @staticmethod
    def pytest_configure(config: Any) -> None:
        """Load the file beside this one."""
        config.pluginmanager.import_plugin("pyetcd_pytest")
