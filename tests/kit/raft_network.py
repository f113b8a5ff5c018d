"""The Raft network of all tests of the core: members, their disks, and messages between them."""

from __future__ import annotations

import contextlib
import random
from typing import Any, Dict, List, Sequence, Set, Tuple

import pyetcd
from pyetcd import (
    ConfChange,
    ConfChangeType,
    Entry,
    EntryType,
    HardState,
    Message,
    MsgType,
    ProgressState,
    ProposalDropped,
    RaftConfig,
    RaftLog,
    RaftRole,
    RawNode,
    Ready,
    Snapshot,
)

_RAFT_PROBE, _RAFT_REPLICATE = ProgressState.PROBE, ProgressState.REPLICATE


def _raft_entries(terms: Sequence[int], first: int = 1) -> List[Entry]:
    """Entries at first, first+1, ... of the given terms."""
    return [Entry(0, term, first + offset, b"%d" % (first + offset))
            for offset, term in enumerate(terms)]


def _raft_terms(log: RaftLog) -> List[int]:
    return [entry.term for entry in log.slice(log.offset + 1, log.last_index + 1)]


def _raft_config(member: int, **options: Any) -> RaftConfig:
    defaults = {"rng": random.Random(member), "trace": lambda line: None}
    return RaftConfig(id=member, **{**defaults, **options})


def _raft_node(
    member: int = 1, voters: Sequence[int] = (1, 2, 3), terms: Sequence[int] = (), *,
    term: int = 0, vote: int = 0, commit: int = 0, **options: Any,
) -> RawNode:
    """A restarted member whose log holds entries of `terms`, all durable."""
    return RawNode(
        _raft_config(member, **options),
        hard_state=HardState(term or max([0, *terms]), vote, commit),
        snapshot=Snapshot(voters=tuple(voters)), entries=_raft_entries(terms),
    )


def _raft_conf_entry(index: int, member: int) -> Entry:
    data = pyetcd.encode_conf_change(ConfChange(0, ConfChangeType.ADD_NODE, member, b"{}"))
    return Entry(EntryType.CONF_CHANGE, 1, index, data)


def _raft_change(kind: ConfChangeType, member: int) -> ConfChange:
    return ConfChange(1, kind, member, None)


class RaftDisk:
    """What survives a crash of one member."""

    def __init__(self, node: RawNode) -> None:
        raft, log = node.raft, node.raft.log
        self.hard_state = HardState(raft.term, raft.vote, log.commit)
        self.snapshot = Snapshot()
        self.entries = log.slice(1, log.stable + 1)

    @property
    def last_index(self) -> int:
        return self.snapshot.index + len(self.entries)

    def save_snapshot(self, snapshot: Snapshot) -> None:
        """Entries at or below it go; those behind stay only if they continue it."""
        kept = [entry for entry in self.entries if entry.index > snapshot.index]
        at = [entry.term for entry in self.entries if entry.index == snapshot.index]
        self.entries = kept if at == [snapshot.term] else []
        self.snapshot = snapshot

    def save(self, ready: Ready) -> None:
        if ready.snapshot is not None:
            self.save_snapshot(ready.snapshot)
        if ready.entries:
            first = ready.entries[0].index
            assert self.snapshot.index < first <= self.last_index + 1, "a gap in the WAL"
            self.entries = [*self.entries[:first - self.snapshot.index - 1], *ready.entries]
        if ready.hard_state is not None:
            assert ready.hard_state[::2] >= self.hard_state[::2], "term or commit went back"
            self.hard_state = ready.hard_state


class RaftMember:
    """A RawNode, its disk, the Readys that the disk does not hold yet, and the applied data."""

    def __init__(self, node: RawNode) -> None:
        self.id = node.raft.id
        self.disk = RaftDisk(node)
        self._start(node)

    def _start(self, node: RawNode) -> None:
        self.node = node
        self.unsynced: List[Ready] = []
        self.applied: List[bytes] = self.disk.snapshot.data.split()
        self.seen_commit = self.disk.snapshot.index
        node.raft.replication.snapshot_source = lambda peer: (
            self.disk.snapshot if self.disk.snapshot.index else None)

    def crash(self) -> None:
        """Start again with the content of the disk."""
        disk = self.disk
        self._start(RawNode(
            self.node.raft.config, hard_state=disk.hard_state, snapshot=disk.snapshot,
            entries=list(disk.entries),
        ))

    def apply(self, count: int = 4096) -> bool:
        entries = self.node.committed_entries(count)
        for entry in entries:
            assert entry.index <= self.disk.last_index, "applied before it was durable"
            if entry.type:
                self.node.apply_conf_change(pyetcd.decode_conf_change(entry.data))
            elif entry.data:
                self.applied.append(entry.data)
            self.node.applied_to(entry.index)
        return bool(entries)

    def compact(self, kept: int = 0) -> None:
        """Take a snapshot of all that is applied; keep that many entries in memory."""
        log = self.node.raft.log
        self.disk.save_snapshot(Snapshot(
            b" ".join(self.applied), self.node.raft.voters, log.applied, log.term(log.applied)))
        self.node.compact(log.applied - kept)


class RaftNetwork:
    """Members of a fresh cluster, without loss until told otherwise.

    After each step it checks what Raft promises (fig. 3.2). A test either lets all messages flow
    (`settle` and what calls it), or moves those on `wire` in its own way.
    """

    def __init__(self, voters: int = 0, **options: Any) -> None:
        self.members: Dict[int, RaftMember] = {}
        self.wire: List[Message] = []
        self.cuts: Set[Tuple[int, int]] = set()                 # (sender, receiver)
        self.ignored: Set[MsgType] = set()
        self.leaders: Dict[int, int] = {}                       # term -> leader
        self.votes: Dict[Tuple[int, int], int] = {}             # (term, voter) -> candidate
        self.committed: Dict[int, Entry] = {}                   # index -> entry
        for id in range(1, voters + 1):
            entries = [_raft_conf_entry(index, index) for index in range(1, voters + 1)]
            member = self.add(RawNode.bootstrap(_raft_config(id, **options), entries))
            self.ready(member)      # a member without these would start anew, not restart
            self.sync(member)

    @property
    def nodes(self) -> Dict[int, RawNode]:
        return {id: member.node for id, member in self.members.items()}

    @property
    def applied(self) -> Dict[int, List[bytes]]:
        return {id: member.applied for id, member in self.members.items()}

    def add(self, node: RawNode) -> RaftMember:
        self.members[node.raft.id] = member = RaftMember(node)
        return member

    # faults

    def cut(self, one: int, other: int) -> None:
        self.cuts |= {(one, other), (other, one)}

    def isolate(self, member: int) -> None:
        for other in self.members:
            self.cut(member, other)

    def drop(self, kind: MsgType) -> None:
        self.ignored.add(kind)

    def recover(self) -> None:
        self.cuts.clear()
        self.ignored.clear()

    # one step

    def ready(self, member: RaftMember) -> bool:
        """Take a Ready: its messages leave, the rest waits for the disk."""
        if not member.node.has_ready():
            return False
        ready = member.node.ready()
        member.unsynced.append(ready)
        self.wire += ready.messages
        return True

    def sync(self, member: RaftMember, count: int = 1) -> None:
        """The oldest Readys become durable at once; what they held back leaves."""
        batch, member.unsynced = member.unsynced[:count], member.unsynced[count:]
        for ready in batch:
            member.disk.save(ready)
            for message in ready.held:
                self._check_promise(member, message)
        for ready in batch:
            member.node.persisted(ready.mark)
            self.wire += ready.held
            if ready.snapshot is not None and member.node.raft.log.applied < ready.snapshot.index:
                member.applied = ready.snapshot.data.split()
                member.node.applied_to(ready.snapshot.index)

    def hand(self, message: Message) -> None:
        target = self.members[message.to]
        with contextlib.suppress(ProposalDropped):
            target.node.step(message)
        self.check(target)

    # many steps

    def settle(self) -> None:
        """Exchange messages until there are none."""
        while sum(self._turn(member) for member in list(self.members.values())):
            pass

    def _turn(self, member: RaftMember) -> bool:
        busy = self.ready(member)
        self.sync(member)
        busy = member.apply() or busy
        self.check(member)
        wire, self.wire = self.wire, []
        for message in wire:
            passes = (message.sender, message.to) not in self.cuts
            if message.to in self.members and passes and message.type not in self.ignored:
                self.hand(pyetcd.decode_message(pyetcd.encode_message(message)))
        return busy or bool(wire)

    def elect(self, id: int) -> RawNode:
        node = self.members[id].node
        node.campaign()
        self.settle()
        assert node.raft.role is RaftRole.LEADER
        return node

    def propose(self, id: int, data: bytes) -> None:
        self.members[id].node.propose(Entry(data=data))
        self.settle()

    def tick(self, id: int, count: int = 1) -> None:
        for _ in range(count):
            self.members[id].node.tick()
            self.settle()

    # what must always hold

    def check(self, member: RaftMember) -> None:
        raft = member.node.raft
        if raft.role is RaftRole.LEADER:
            assert self.leaders.setdefault(raft.term, raft.id) == raft.id, "two leaders in a term"
        log = raft.log
        if log.commit > member.seen_commit:
            start = max(member.seen_commit, log.offset)
            if start == log.offset and start in self.committed:
                assert self.committed[start].term == log.term(start), "snapshot differs"
            for entry in log.slice(start + 1, log.commit + 1):
                known = self.committed.setdefault(entry.index, entry)
                assert known is entry or known == entry, f"committed {known} became {entry}"
            member.seen_commit = log.commit

    def _check_promise(self, member: RaftMember, message: Message) -> None:
        if message.type == MsgType.APP_RESP and not message.reject:
            assert message.index <= member.disk.last_index, "answer for what is not on disk"
        if message.type == MsgType.VOTE_RESP and not message.reject:
            vote = self.votes.setdefault((message.term, member.id), message.to)
            assert vote == message.to, "two votes in a term"
            assert member.disk.hard_state.term >= message.term

    def check_logs(self) -> None:
        """Log matching: equal (index, term) means that all before is equal."""
        logs = [member.node.raft.log for member in self.members.values()]
        for position, one in enumerate(logs):
            for other in logs[:position]:
                low, high = max(one.offset, other.offset), min(one.last_index, other.last_index)
                while high > low and one.term(high) != other.term(high):
                    high -= 1
                if high > low:
                    assert one.slice(low + 1, high + 1) == other.slice(low + 1, high + 1)
