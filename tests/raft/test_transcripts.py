"""Raft transcripts: script -> golden text."""

from __future__ import annotations

import contextlib
import random
from typing import Any, Callable, List

import pytest

from pyetcd import ConfChangeType, Entry, Message, MsgType, ProposalDropped, Raft, RaftRole, RawNode
from tests.kit.raft_network import RaftMember, RaftNetwork, _raft_change, _raft_config, _raft_node


class _RaftStage(RaftNetwork):
    """Plays a script, one command per line, and writes what the members do.

    members N | campaign I | propose I DATA | step (deliver all once) | ready I |
    sync I (oldest Ready becomes durable) | apply I | lose I (messages to I)
    """

    def play(self, script: str) -> str:
        self.lines: List[str] = []
        for line in script.strip().splitlines():
            command, *words = line.split()
            self.lines.append("> " + " ".join((command, *words)))
            getattr(self, "do_" + command)(*words)
        return "\n".join(self.lines)

    def note(self, text: str) -> None:
        self.lines.append("  " + text)

    def do_members(self, count: str) -> None:
        for id in range(1, int(count) + 1):
            self.add(_raft_node(id, range(1, int(count) + 1), trace=self.note))
        self.lines[1:] = []             # the lines of the start

    def do_campaign(self, id: str) -> None:
        self.nodes[int(id)].campaign()

    def do_propose(self, id: str, data: str) -> None:
        self.nodes[int(id)].propose(Entry(data=data.encode()))

    def do_step(self) -> None:
        wire, self.wire = self.wire, []
        for message in wire:
            self.note(self.show(message))
            self.hand(message)

    def do_lose(self, id: str) -> None:
        self.wire = [message for message in self.wire if message.to != int(id)]

    def do_ready(self, id: str) -> None:
        member = self.members[int(id)]
        self.ready(member)
        ready = member.unsynced[-1]
        if ready.hard_state:
            self.note("hard state term %d vote %d commit %d" % ready.hard_state)
        if ready.entries:
            self.note("write " + " ".join(f"{e.term}/{e.index}" for e in ready.entries))
        for verb, messages in (("send", ready.messages), ("hold", ready.held)):
            for message in messages:
                self.note(f"{verb} {self.show(message)}")

    def do_sync(self, id: str) -> None:
        self.sync(self.members[int(id)])

    def do_apply(self, id: str) -> None:
        for entry in self.nodes[int(id)].committed_entries():
            self.note(f"apply {entry.term}/{entry.index} {entry.data.decode() or '-'}")
        self.members[int(id)].apply()

    @staticmethod
    def show(message: Message) -> str:
        text = f"{message.sender}->{message.to} {MsgType(message.type).name} term {message.term}"
        if message.type in (MsgType.APP, MsgType.VOTE, MsgType.APP_RESP):
            text += f" at {message.log_term}/{message.index}"
        if message.entries:
            text += " with " + " ".join(f"{e.term}/{e.index}" for e in message.entries)
        if message.type in (MsgType.APP, MsgType.HEARTBEAT):
            text += f" commit {message.commit}"
        return text + (f" reject hint {message.reject_hint}" if message.reject else "")


_RAFT_ELECTION = """
> members 3
> campaign 1
  1 is starting a new election at term 0
  1 became candidate at term 1
  1 received vote from 1 at term 1
  1 [logterm: 0, index: 0] sent vote request to 2 at term 1
  1 [logterm: 0, index: 0] sent vote request to 3 at term 1
> ready 1
  hard state term 1 vote 1 commit 0
  hold 1->2 VOTE term 1 at 0/0
  hold 1->3 VOTE term 1 at 0/0
> step
> sync 1
> lose 3
> step
  1->2 VOTE term 1 at 0/0
  2 [term: 0] received a MsgVote message with higher term from 1 [term: 1]
  2 became follower at term 1
  2 [logterm: 0, index: 0, vote: 0] voted for 1 [logterm: 0, index: 0] at term 1
> ready 2
  hard state term 1 vote 1 commit 0
  hold 2->1 VOTE_RESP term 1
> sync 2
> step
  2->1 VOTE_RESP term 1
  1 received vote from 2 at term 1
  1 [quorum:2] has received 2 votes and 0 vote rejections
  1 became leader at term 1
"""
_RAFT_REPLICATION = _RAFT_ELECTION + """
> ready 1
  write 1/1
  send 1->2 APP term 1 at 0/0 with 1/1 commit 0
  send 1->3 APP term 1 at 0/0 with 1/1 commit 0
> propose 1 x
> ready 1
  write 1/2
> lose 3
> step
  1->2 APP term 1 at 0/0 with 1/1 commit 0
> ready 2
  write 1/1
  hold 2->1 APP_RESP term 1 at 0/1
> sync 2
> step
  2->1 APP_RESP term 1 at 0/1
> ready 1
  send 1->2 APP term 1 at 1/1 with 1/2 commit 0
> apply 1
> sync 1
> apply 1
  apply 1/1 -
> ready 1
  hard state term 1 vote 1 commit 1
  send 1->2 APP term 1 at 1/2 commit 1
> step
  1->2 APP term 1 at 1/1 with 1/2 commit 0
  1->2 APP term 1 at 1/2 commit 1
> ready 2
  hard state term 1 vote 1 commit 1
  write 1/2
  hold 2->1 APP_RESP term 1 at 0/2
> apply 2
  apply 1/1 -
"""
_RAFT_OVERWRITE = _RAFT_ELECTION + """
> propose 1 lost
> ready 1
  write 1/1 1/2
  send 1->2 APP term 1 at 0/0 with 1/1 1/2 commit 0
  send 1->3 APP term 1 at 0/0 with 1/1 1/2 commit 0
> lose 2
> lose 3
> campaign 3
  3 is starting a new election at term 0
  3 became candidate at term 1
  3 received vote from 3 at term 1
  3 [logterm: 0, index: 0] sent vote request to 1 at term 1
  3 [logterm: 0, index: 0] sent vote request to 2 at term 1
> campaign 3
  3 is starting a new election at term 1
  3 became candidate at term 2
  3 received vote from 3 at term 2
  3 [logterm: 0, index: 0] sent vote request to 1 at term 2
  3 [logterm: 0, index: 0] sent vote request to 2 at term 2
> ready 3
  hard state term 2 vote 3 commit 0
  hold 3->1 VOTE term 1 at 0/0
  hold 3->2 VOTE term 1 at 0/0
  hold 3->1 VOTE term 2 at 0/0
  hold 3->2 VOTE term 2 at 0/0
> sync 3
> lose 1
> step
  3->2 VOTE term 1 at 0/0
  2 [logterm: 0, index: 0, vote: 1] rejected vote from 3 [logterm: 0, index: 0] at term 1
  3->2 VOTE term 2 at 0/0
  2 [term: 1] received a MsgVote message with higher term from 3 [term: 2]
  2 became follower at term 2
  2 [logterm: 0, index: 0, vote: 0] voted for 3 [logterm: 0, index: 0] at term 2
> ready 2
  hard state term 2 vote 3 commit 0
  hold 2->3 VOTE_RESP term 1 reject hint 0
  hold 2->3 VOTE_RESP term 2
> sync 2
> step
  2->3 VOTE_RESP term 1 reject hint 0
  2->3 VOTE_RESP term 2
  3 received vote from 2 at term 2
  3 [quorum:2] has received 2 votes and 0 vote rejections
  3 became leader at term 2
> ready 3
  write 2/1
  send 3->1 APP term 2 at 0/0 with 2/1 commit 0
  send 3->2 APP term 2 at 0/0 with 2/1 commit 0
> sync 3
> step
  3->1 APP term 2 at 0/0 with 2/1 commit 0
  1 [term: 1] received a MsgApp message with higher term from 3 [term: 2]
  1 became follower at term 2
  3->2 APP term 2 at 0/0 with 2/1 commit 0
> ready 1
  hard state term 2 vote 0 commit 0
  write 2/1
  hold 1->3 APP_RESP term 2 at 0/1
> sync 1
> sync 1
> step
  1->3 APP_RESP term 2 at 0/1
> ready 3
  hard state term 2 vote 3 commit 1
  send 3->1 APP term 2 at 2/1 commit 1
> apply 3
  apply 2/1 -
> step
  3->1 APP term 2 at 2/1 commit 1
> apply 1
  apply 2/1 -
"""


@pytest.mark.parametrize(
    "golden", [_RAFT_ELECTION, _RAFT_REPLICATION, _RAFT_OVERWRITE],
    ids=["election", "replication", "overwrite"],
)
def test_raft_transcript(golden: str):
    """The lines that begin with > are the script; the others are what must happen."""
    lines = [line for line in golden.splitlines() if line]
    script = "\n".join(line[2:] for line in lines if line.startswith(">"))
    assert _RaftStage().play(script).splitlines() == lines


# --- a seeded storm: loss, delay, duplicates, disorder, crashes -------------------


class _RaftStorm(RaftNetwork):
    """Random events from one seed."""

    def __init__(self, seed: int, voters: int, joiners: int = 0) -> None:
        self.rng = random.Random(seed)
        options = {
            "rng": self.rng, "election_ticks": 5, "max_entries_bytes": 130, "max_inflight": 3}
        super().__init__(voters, **options)
        for id in range(voters + 1, voters + joiners + 1):
            self.add(RawNode(_raft_config(id, **options)))
        self.changing = joiners > 0
        self.proposed = 0
        self.events: List[Callable[[RaftMember], Any]] = []
        for weight, event in (
            (90, lambda member: member.node.tick()), (80, self.ready), (80, self.sync_some),
            (120, self.deliver), (30, self.propose_some), (30, self.apply_some),
            (1, RaftMember.crash), (1, self.compact), (1, self.cut_some), (20, self.change),
            (1, self.transfer),
        ):
            self.events += [event] * weight

    def run(self, steps: int) -> None:
        members = list(self.members.values())
        for _ in range(steps):
            member = self.rng.choice(members)
            self.rng.choice(self.events)(member)
            self.check(member)
        self.check_logs()

    # events

    def sync_some(self, member: RaftMember) -> None:
        self.sync(member, self.rng.randint(1, 3))

    def deliver(self, member: RaftMember) -> None:
        for _ in range(min(len(self.wire), 4)):
            self.deliver_one(self.rng.randrange(len(self.wire)))

    def deliver_one(self, position: int) -> None:
        """A message on the wire arrives, is lost, or arrives and stays to come again."""
        message = self.wire[position]
        fate = self.rng.random()
        if fate > 0.05:
            self.wire[position] = self.wire[-1]
            self.wire.pop()
        sender = self.members[message.sender].node
        lost = fate > 0.95 or (message.sender, message.to) in self.cuts
        if message.type == MsgType.SNAP:
            sender.report_snapshot(message.to, not lost)
        if not lost:
            self.hand(message)
        elif self.rng.random() < 0.5:
            sender.report_unreachable(message.to)

    def propose_some(self, member: RaftMember) -> None:
        entries = []
        for _ in range(self.rng.randint(1, 3)):
            self.proposed += 1
            entries.append(Entry(data=b"%d" % self.proposed))
        with contextlib.suppress(ProposalDropped):
            member.node.propose(*entries)

    def apply_some(self, member: RaftMember) -> None:
        member.apply(self.rng.randint(1, 5))

    def compact(self, member: RaftMember) -> None:
        log = member.node.raft.log
        if log.applied > max(member.disk.snapshot.index, log.offset):
            member.compact(kept=self.rng.randint(0, 5))

    def cut_some(self, member: RaftMember) -> None:
        """All is well, or one way is cut as well, or one member is alone."""
        fate = self.rng.random()
        if fate < 0.4:
            self.cuts.clear()
        elif fate < 0.7:
            self.cuts |= {(member.id, self.rng.choice(list(self.members)))}
        else:
            self.cuts.clear()
            self.isolate(member.id)

    def change(self, member: RaftMember) -> None:
        """Only a leader asks: it knows the voters, and must not remove the last but one, which
        could leave the last one waiting for ever for the vote of the removed (thesis §4.2.2)."""
        if self.changing and member.node.raft.role is RaftRole.LEADER:
            kind = self.rng.choice([ConfChangeType.ADD_NODE, ConfChangeType.REMOVE_NODE])
            target = self.rng.choice(list(self.members))
            if kind == ConfChangeType.REMOVE_NODE and len(member.node.raft.voters) < 3:
                kind = ConfChangeType.ADD_NODE
            with contextlib.suppress(ProposalDropped):
                member.node.propose_conf_change(_raft_change(kind, target))

    def transfer(self, member: RaftMember) -> None:
        member.node.transfer_leader(self.rng.choice(list(self.members)))

    # and in the end all is well

    def heal(self) -> None:
        """A good network again: within some elections a new entry is applied everywhere."""
        self.cuts.clear()
        for message in self.wire:
            if message.type == MsgType.SNAP:
                self.members[message.sender].node.report_snapshot(message.to, False)
        self.wire.clear()
        for _ in range(3000):
            self.calm_turn()
            lead = max(self.leading(), key=lambda raft: raft.term, default=None)
            if lead is not None and lead.log.commit == lead.log.last_index:
                voters = [self.members[voter].node.raft for voter in lead.voters]
                if {raft.log.applied for raft in voters} == {lead.log.last_index}:
                    return
        raise AssertionError("no progress on a good network")

    def leading(self) -> List[Raft]:
        rafts = [node.raft for node in self.nodes.values()]
        return [raft for raft in rafts if raft.role is RaftRole.LEADER]

    def calm_turn(self) -> None:
        for member in self.members.values():
            if self.rng.random() < 0.5:
                member.node.tick()
            for _ in range(3):
                self.ready(member)
                while member.unsynced:
                    self.sync_some(member)
                self.apply_some(member)
            self.check(member)
        wire, self.wire = self.wire, []
        leaders = self.leading()
        voters = max(leaders, key=lambda raft: raft.term).voters if leaders else self.members
        for message in wire:
            # A transport refuses removed members; they could campaign for ever.
            if message.sender in voters or not self.changing:
                self.hand(message)
                if message.type == MsgType.SNAP:
                    self.members[message.sender].node.report_snapshot(message.to, True)


def _raft_storm(seed: int, voters: int, joiners: int = 0, steps: int = 3000) -> _RaftStorm:
    storm = _RaftStorm(seed, voters, joiners)
    try:
        storm.run(steps)
        storm.heal()
        storm.check_logs()
    except Exception:
        print(f"failing storm: seed={seed} voters={voters} joiners={joiners} steps={steps}")
        raise
    return storm


@pytest.mark.parametrize("block", range(10))
@pytest.mark.parametrize(("voters", "joiners"), [(3, 0), (5, 0), (3, 2)], ids=str)
def test_raft_storm_keeps_every_promise(voters: int, joiners: int, block: int):
    """Election safety, log matching, leader completeness, durable promises: 10 seeds a block."""
    for seed in range(block * 10, block * 10 + 10):
        _raft_storm(seed, voters, joiners)


def test_raft_storm_is_no_calm():
    """The storm does reach what it is for: commits, leader changes, snapshots, members."""
    storms = [_raft_storm(seed, 3, 2) for seed in range(20)]
    assert sum(len(storm.committed) for storm in storms) > 500
    assert sum(len(storm.leaders) for storm in storms) > 60
    assert sum(entry.type for storm in storms for entry in storm.committed.values()) > 80
    offsets = [member.node.raft.log.offset for storm in storms for member in storm.members.values()]
    assert sum(offset > 0 for offset in offsets) > 40
