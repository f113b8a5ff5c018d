"""The test kit: members that a test kills, freezes and cuts off.

Threads: the test's, and those of the members.
"""

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
)

from ..base.errors import ServerStopped
from ..base.messages import Message, MsgType
from ..member.cluster import Member, format_id
from ..member.configuration import ServerConfig
from ..member.server import EtcdServer, Publication
from ..net.workers import SYSTEM_CLOCK
from ..peer.transport import Transport
from .embedding import Server, checked_settings

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..member.configuration import MemberSettings

# Whatever stalls one of these members, a full machine or a debugger, stalls all others with it,
# and late ticks are dropped: such short times cause no elections that nobody wanted.
LOCAL_HEARTBEAT_MS = 20
LOCAL_ELECTION_MS = 200
LOCAL_READY_SECONDS = 10.0          # for a start to be complete; above: TimeoutError
LOCAL_POLL_SECONDS = 0.002
REPUBLISH_SECONDS = 0.5             # a change of leader may have lost the publication


class _CutTransport(Transport):
    """A transport whose links to other members can be cut, in one direction or in both.

    Both ends lose the messages, so that none arrives that was under way.  Links that are cut in
    both directions are closed, and opened no more.  What members ask each other besides, when
    they start for the first time (/members, /version), still passes.
    """

    _mute: FrozenSet[int] = frozenset()     # members that get nothing from us
    _deaf: FrozenSet[int] = frozenset()     # members from which we take nothing

    def cut(
        self, mute: FrozenSet[int], deaf: FrozenSet[int], members: Mapping[int, Member]
    ) -> None:
        """Lose what goes to `mute` and comes from `deaf`, and nothing else any more."""
        before, closed = self._mute & self._deaf, mute & deaf
        self._mute, self._deaf = mute, deaf
        for id in (before ^ closed) & members.keys():
            self.remove_peer(id)
            self.add_peer(id, members[id].peer_urls)

    def add_peer(self, member_id: int, urls: Iterable[str]) -> None:
        """Open the links to a member, unless they are cut."""
        super().add_peer(member_id, urls)
        if member_id in self._mute & self._deaf and member_id in self._peers:
            self._peers[member_id].stop()

    def offer(self, messages: Iterable[Message]) -> None:
        """Send messages, or lose them, as to members that are down."""
        passed = []
        for message in messages:
            if message.to not in self._mute:
                passed.append(message)
                continue
            self._context.unreachable(message.to)
            if message.type == MsgType.SNAP:
                self._context.snapshot_done(message.to, False)
        super().offer(passed)

    def _take(self, message: Message, size: int) -> Generator[None, None, int]:
        return 500 if message.sender in self._deaf else (yield from super()._take(message, size))


class _LocalServer(Server):
    """The server of a LocalMember: it can be frozen, and comes up with its links cut."""

    _transport_type = _CutTransport

    def _init(self, config: ServerConfig) -> None:
        super()._init(config)
        self.cuts: Tuple[FrozenSet[int], FrozenSet[int]] = (frozenset(), frozenset())
        self._thaw: Optional[threading.Event] = None    # the reactor's thread waits for it

    @property
    def is_alive(self) -> bool:
        """True from start() until it has ended, in whichever way."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def is_frozen(self) -> bool:
        """True between freeze() and thaw()."""
        return self._thaw is not None

    def freeze(self) -> None:
        """Have the reactor do nothing until thaw(), from the end of this turn on."""
        frozen, thaw = threading.Event(), threading.Event()

        def wait() -> None:
            frozen.set()
            thaw.wait()

        self._reactor.call_soon_threadsafe(wait)
        while not frozen.wait(LOCAL_POLL_SECONDS):
            if not self.is_alive:
                raise ServerStopped()
        self._thaw = thaw

    def thaw(self) -> None:
        """Let the reactor go on."""
        thaw, self._thaw = self._thaw, None
        if thaw is not None:
            thaw.set()

    def call(self, work: Callable[[EtcdServer], Any], timeout_s: float = 10.0) -> Any:
        """Run work(etcd) on the reactor's thread, or in its place while that is frozen."""
        if self.is_frozen and self.etcd is not None:
            return work(self.etcd)
        return super().call(work, timeout_s)

    def kill(self) -> None:
        """End at once, also while frozen."""
        if self.is_frozen:
            self._failed(ServerStopped("killed"))       # before the thread does anything else
        self.thaw()
        super().kill()

    def stop(self) -> None:
        """Stop in order; a frozen one goes on for that."""
        self.thaw()
        super().stop()

    def cut(self, mute: FrozenSet[int], deaf: FrozenSet[int]) -> None:
        """Cut the links to other members, now or at the start; see _CutTransport."""
        self.cuts = mute, deaf
        if self.is_alive:
            self.call(self._cut)

    def _cut(self, etcd: EtcdServer) -> None:
        assert isinstance(etcd.transport, _CutTransport)
        etcd.transport.cut(*self.cuts, etcd.cluster.members)

    def is_ready(self, etcd: EtcdServer) -> bool:
        """True if the member is published, and the cluster has agreed on its version."""
        return self._ready.is_set() and bool(etcd.cluster.version)

    def publish(self, etcd: EtcdServer) -> None:
        """Publish the member once more, which does no harm."""
        Publication(etcd, self._ready.set)

    def _begin(self) -> None:
        assert self.etcd is not None
        threading.current_thread().name = f"reactor-{self.config.name}"
        self._cut(self.etcd)
        super()._begin()
        raft = self.etcd.node.raft
        if raft.term <= 1 and len(raft.voters) > 1:
            raft.election_elapsed = 0       # LocalCluster has a member of a new cluster campaign


def _reserve_url(owned: contextlib.ExitStack) -> str:
    """Return the URL of a free loopback port; a socket, closed with `owned`, keeps it free.

    No other process gets the port while the member is down, no outgoing connection either, and
    a client that dials it then is refused.  macOS allows one socket per port: nothing keeps it.
    """
    sock = owned.enter_context(socket.socket())
    sock.bind(("127.0.0.1", 0))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # not before: it must be free now
    address = sock.getsockname()
    try:
        socket.create_server(address).close()
    except OSError:
        sock.close()
    return f"http://127.0.0.1:{address[1]}"


class LocalMember:
    """A member in this process, for tests: it can be killed, frozen and started again.

        with pyetcd.LocalMember() as member:
            print(member.client_url)

    directory  where its data directory is made; "": a temporary one, removed by close()
    settings   fields of ServerConfig; heartbeat and election are 20 and 200 ms unless given

    It keeps its ports on 127.0.0.1, and its data, until close().  Its lines go to the loggers
    below `pyetcd`, on a thread called `reactor-<name>`.  Guarantee: after a kill it finds on its
    disk what a process would find after `kill -9`.  Limit: a power cut is not imitated.
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
        self._cuts: Tuple[FrozenSet[int], FrozenSet[int]] = (frozenset(), frozenset())
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
        """Start, or start again, and wait until it is ready; nothing if it runs.

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
            server.cut(*self._cuts)
            with contextlib.ExitStack() as on_failure:
                on_failure.callback(server.stop)
                server.start()
                on_failure.pop_all()
            self._server = server
        if timeout_s:
            self.wait_ready(timeout_s)

    def wait_ready(self, timeout_s: float = LOCAL_READY_SECONDS) -> None:
        """Wait until it has a leader and the log of before, and the others know its URLs.

        Raises TimeoutError, and ServerStopped if it does not run.
        """
        deadline = SYSTEM_CLOCK.now() + timeout_s
        republish_at = SYSTEM_CLOCK.now() + REPUBLISH_SECONDS
        server = self._running()
        while self.is_paused or not server.call(server.is_ready):
            now = SYSTEM_CLOCK.now()
            if now > deadline:
                raise TimeoutError(f"{self.name} is not ready after {timeout_s} s: {self._state()}")
            if now > republish_at and not self.is_paused:
                republish_at = now + REPUBLISH_SECONDS
                server.call(server.publish)
            time.sleep(LOCAL_POLL_SECONDS)

    def kill(self) -> None:
        """End at once, as by `kill -9`: nothing more is written or said.

        Of what was on its way to the disk just then, nobody knows whether it got there.
        """
        if self._server is not None:
            self._server.kill()

    def stop(self) -> None:
        """End in order, as by SIGTERM: a leader hands over, what waits is answered."""
        if self._server is not None:
            self._server.stop()

    def restart(self, timeout_s: float = LOCAL_READY_SECONDS) -> None:
        """Kill it if it runs, and start it with the same ports and data; see start()."""
        self.kill()
        self.start(timeout_s)

    def pause(self) -> None:
        """Have it do nothing until resume(), as by SIGSTOP; its sockets stay open.

        Only what its disk thread was given just before is still written.

        Raises ServerStopped if it does not run.
        """
        if not self.is_paused:
            self._running().freeze()

    def resume(self) -> None:
        """Let it go on, as by SIGCONT; late clock ticks are dropped, as in any member."""
        if self._server is not None:
            self._server.thaw()

    def close(self) -> None:
        """Kill it, give its ports back, and remove the temporary directory."""
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
        """True if it was started and has not ended; also while it is paused."""
        return self._server is not None and self._server.is_alive

    @property
    def is_paused(self) -> bool:
        """True between pause() and resume()."""
        return self._server is not None and self._server.is_frozen

    @property
    def id(self) -> str:
        """The member id as the API and the log write it; "" before the first start."""
        return format_id(self.member_id) if self.member_id else ""

    def call(self, work: Callable[[EtcdServer], Any]) -> Any:
        """Run work(etcd_server) on the member's thread and return its result, also while paused.

        Raises ServerStopped if it does not run, and what work raises.
        """
        return self._running().call(work)

    # -- inside ------------------------------------------------------------

    def reserve(self) -> None:
        """Take the ports, so that the URLs are known; nothing if it has them."""
        if self.client_url:
            return
        directory = self._directory
        if not directory:
            import tempfile
            directory = self._owned.enter_context(tempfile.TemporaryDirectory("-pyetcd"))
        self._data_dir = os.path.join(directory, self.name)
        self.client_url, self.peer_url = (_reserve_url(self._owned) for _ in range(2))

    def cut(self, mute: FrozenSet[int], deaf: FrozenSet[int]) -> None:
        """Lose what it sends to the members with these ids, and what comes from those."""
        self._cuts = mute, deaf
        if self._server is not None:
            self._server.cut(mute, deaf)

    def leading_term(self) -> int:
        """Return the term in which it leads and has committed; 0 if it does not, or is paused."""
        if self._server is None or self.is_paused:
            return 0
        try:
            return int(self._server.call(_leading_term))
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
        """One word or a few, for messages."""
        if not self.is_running:
            return "down"
        state = str(self.call(_role))
        return "paused, " + state if self.is_paused else state


def _leading_term(etcd: EtcdServer) -> int:
    term = etcd.node.raft.term
    return term if etcd.is_leader and etcd.raft_term == term else 0


def _role(etcd: EtcdServer) -> str:
    raft = etcd.node.raft
    return f"{raft.role.name.lower()} at term {raft.term}"


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
        self._cuts: Set[Tuple[int, int]] = set()    # (from, to): places in `members`

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
            self._elect(deadline)
            for member in self.members:
                member.wait_ready(max(deadline - SYSTEM_CLOCK.now(), 0.0))

    def close(self) -> None:
        """Kill all members, give their ports back, and remove the temporary directories."""
        for member in self.members:
            member.close()

    @property
    def client_urls(self) -> Tuple[str, ...]:
        """One client URL of each member, also of those that are down."""
        return tuple(member.client_url for member in self.members)

    # -- who leads ---------------------------------------------------------

    def leader(self) -> Optional[LocalMember]:
        """Return the member that leads, in the newest term if several believe it; None: none.

        Paused members and those that are down do not count.
        """
        return self._leader_of(self.members)

    def wait_leader(
        self, timeout_s: float = LOCAL_READY_SECONDS, among: Iterable[LocalMember] = ()
    ) -> LocalMember:
        """Wait for a leader that has committed something in its term, and return it.

        among  only these count, as those on one side of a partition; (): all

        Raises TimeoutError, which says what each member does.
        """
        deadline = SYSTEM_CLOCK.now() + timeout_s
        candidates = list(among) or self.members
        while True:
            leader = self._leader_of(candidates)
            if leader is not None:
                return leader
            if SYSTEM_CLOCK.now() > deadline:
                raise TimeoutError(f"no leader after {timeout_s} s: {candidates}")
            time.sleep(LOCAL_POLL_SECONDS)

    @staticmethod
    def _leader_of(members: Iterable[LocalMember]) -> Optional[LocalMember]:
        terms = [(member.leading_term(), member) for member in members]
        term, leader = max(terms, key=lambda pair: pair[0])
        return leader if term else None

    # -- the network between the members -----------------------------------

    def partition(self, *groups: Iterable[LocalMember]) -> None:
        """Divide the network between the members, in place of any cut of before.

        Members of different groups hear nothing of each other; those that no group names form one
        more.  Connections that were open are closed.  Clients still reach every member, and so
        does restart(): the cut stays.  ValueError: a member is in two groups, or not of this
        cluster.
        """
        places = [sorted(map(self._place, group)) for group in groups]
        named = [place for group in places for place in group]
        if len(set(named)) < len(named):
            raise ValueError("a member is in two groups")
        places.append([p for p in range(len(self.members)) if p not in named])
        self._set_cuts({
            (a, b) for ours in places for theirs in places if ours is not theirs
            for a in ours for b in theirs
        })

    def cut(self, source: LocalMember, target: LocalMember) -> None:
        """Lose from now on what `source` sends to `target`; the other direction stays as it is."""
        self._set_cuts(self._cuts | {(self._place(source), self._place(target))})

    def heal(self) -> None:
        """Undo every partition() and cut()."""
        self._set_cuts(set())

    def _place(self, member: LocalMember) -> int:
        return self.members.index(member)

    def _set_cuts(self, cuts: Set[Tuple[int, int]]) -> None:
        self._cuts = cuts
        ids = [member.member_id for member in self.members]
        for place, member in enumerate(self.members):
            member.cut(
                frozenset(ids[target] for source, target in cuts if source == place),
                frozenset(ids[source] for source, target in cuts if target == place),
            )

    # -- the first election ------------------------------------------------

    def _elect(self, deadline: float) -> None:
        """Have the last member of a new cluster campaign as soon as the others listen to it.

        Nobody has to wait for an election timeout, and nobody else campaigns at the same time.
        """
        candidate = self.members[-1]
        while not candidate.call(_has_past):
            voters = [m for m in self.members if m is not candidate]
            if all(_hear_each_other(candidate, voter) for voter in voters):
                candidate.call(_campaign)
                return
            if SYSTEM_CLOCK.now() > deadline:
                return
            time.sleep(LOCAL_POLL_SECONDS)


def _has_past(etcd: EtcdServer) -> bool:
    """True if it has heard of an election; after it they come by themselves."""
    return etcd.node.raft.term > 1


def _campaign(etcd: EtcdServer) -> None:
    if not _has_past(etcd):
        etcd.node.campaign()


def _hear_each_other(one: LocalMember, other: LocalMember) -> bool:
    """True if neither drops the other's messages: see DataLossCheck."""
    def hears(member: LocalMember, sender: LocalMember) -> bool:
        message = Message(MsgType.VOTE, sender=sender.member_id)

        def takes(etcd: EtcdServer) -> bool:
            return etcd.transport.drop is None or not etcd.transport.drop(message)

        return bool(member.call(takes))

    return hears(one, other) and hears(other, one)


class ClusterFactory:
    """What `etcd_cluster_factory` is: each call starts a LocalCluster, ended after the test."""

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
