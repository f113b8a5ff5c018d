"""Raft by the paper: one test per rule."""

from __future__ import annotations

from typing import Any, List

import pytest

import pyetcd
from pyetcd import (
    ConfChange,
    ConfChangeType,
    Entry,
    EntryID,
    HardState,
    Message,
    MsgType,
    ProposalDropped,
    RaftRole,
    RawNode,
    Ready,
    Snapshot,
)
from tests.kit.raft_network import (
    _RAFT_PROBE,
    RaftNetwork,
    _raft_change,
    _raft_conf_entry,
    _raft_config,
    _raft_entries,
    _raft_node,
    _raft_terms,
)


def _raft_sync(node: RawNode) -> Ready:
    """One turn with an instant disk."""
    ready = node.ready()
    node.persisted(ready.mark)
    return ready


def _raft_say(node: RawNode, kind: MsgType, sender: int = 2, **fields: Any) -> List[Message]:
    """Let a message come in; return everything that goes out when the disk is done."""
    fields.setdefault("term", node.raft.term)
    node.step(Message(kind, to=node.raft.id, sender=sender, **fields))
    ready = _raft_sync(node)
    return ready.messages + ready.held


def _raft_lead(node: RawNode) -> RawNode:
    """Make `node` leader of its next term by the votes of all others."""
    node.campaign()
    _raft_sync(node)
    for voter in node.raft.voters:
        if voter != node.raft.id and node.raft.role is RaftRole.CANDIDATE:
            node.step(Message(MsgType.VOTE_RESP, to=node.raft.id, sender=voter,
                              term=node.raft.term))
    assert node.raft.role is RaftRole.LEADER
    return node


def _raft_network(voters: int, **options: Any) -> RaftNetwork:
    """A fresh cluster at rest."""
    net = RaftNetwork(voters, **options)
    net.settle()
    return net


_RAFT_ROLES = [RaftRole.FOLLOWER, RaftRole.CANDIDATE, RaftRole.LEADER]


def _raft_in_role(role: RaftRole) -> RawNode:
    """A member at term 5 with one entry of term 1."""
    node = _raft_node(terms=[1], term=5 if role is RaftRole.FOLLOWER else 4)
    if role is RaftRole.LEADER:
        _raft_lead(node)
    elif role is RaftRole.CANDIDATE:
        node.campaign()
    _raft_sync(node)
    return node


def test_raft_starts_as_follower():
    """§5.2: when servers start up, they begin as followers."""
    assert _raft_node().raft.role is RaftRole.FOLLOWER


@pytest.mark.parametrize("role", _RAFT_ROLES)
def test_raft_higher_term_makes_a_follower_without_vote(role):
    """§5.1: a server that sees a larger term updates its own and reverts to follower."""
    node = _raft_in_role(role)
    _raft_say(node, MsgType.APP, term=9)
    assert (node.raft.role, node.raft.term, node.raft.vote) == (RaftRole.FOLLOWER, 9, 0)
    assert node.raft.lead == 2


@pytest.mark.parametrize("kind", [MsgType.VOTE, MsgType.APP_RESP])
def test_raft_higher_term_of_others_names_no_leader(kind):
    """Only a leader sends MsgApp, MsgHeartbeat and MsgSnap; others tell nothing about the lead."""
    node = _raft_in_role(RaftRole.LEADER)
    _raft_say(node, kind, term=9)
    assert (node.raft.term, node.raft.lead) == (9, 0)


@pytest.mark.parametrize("role", _RAFT_ROLES)
@pytest.mark.parametrize("kind", [MsgType.APP, MsgType.HEARTBEAT])
def test_raft_stale_leader_is_told_the_term(role, kind):
    """§5.1: a request with a stale term is rejected; the answer deposes its sender (etcd 3.1)."""
    node = _raft_in_role(role)
    before = (node.raft.role, node.raft.lead, node.raft.log.last_id)
    (answer,) = _raft_say(node, kind, term=4, index=1, log_term=1, entries=_raft_entries([4], 2))
    assert (answer.type, answer.term, answer.index) == (MsgType.APP_RESP, 5, 0)
    assert before == (node.raft.role, node.raft.lead, node.raft.log.last_id)


def test_raft_stale_votes_are_ignored():
    """§5.1: a vote from an earlier candidacy does not count for this one."""
    node = _raft_in_role(RaftRole.CANDIDATE)
    node.campaign()
    assert _raft_say(node, MsgType.VOTE_RESP, term=node.raft.term - 1)[0].type == MsgType.VOTE
    assert node.raft.role is RaftRole.CANDIDATE


def test_raft_leader_sends_heartbeats_each_interval():
    """§5.2: leaders send periodic heartbeats to all followers to keep their authority."""
    node = _raft_lead(_raft_node(heartbeat_ticks=2))
    _raft_sync(node)
    node.tick()
    assert not node.has_ready()
    node.tick()
    assert [(m.type, m.to) for m in _raft_sync(node).messages] == [
        (MsgType.HEARTBEAT, 2), (MsgType.HEARTBEAT, 3)]


@pytest.mark.parametrize("role", [RaftRole.FOLLOWER, RaftRole.CANDIDATE])
def test_raft_election_starts_after_the_timeout(role):
    """§5.2: increment the term, vote for yourself, ask all others."""
    node = _raft_in_role(role)
    term = node.raft.term
    node.tick(19)
    ready = _raft_sync(node)
    assert (node.raft.term, node.raft.vote, node.raft.role) == (term + 1, 1, RaftRole.CANDIDATE)
    assert [(m.type, m.to, m.term) for m in ready.held] == [
        (MsgType.VOTE, 2, term + 1), (MsgType.VOTE, 3, term + 1)]
    assert ready.must_sync and not ready.messages


@pytest.mark.parametrize(
    ("voters", "answers", "role"),
    [
        (1, {}, RaftRole.LEADER),
        (3, {2: True, 3: True}, RaftRole.LEADER),
        (3, {2: True}, RaftRole.LEADER),
        (5, {2: True, 3: True}, RaftRole.LEADER),
        (5, {2: True, 3: False, 4: False, 5: True}, RaftRole.LEADER),
        (3, {2: False, 3: False}, RaftRole.FOLLOWER),
        (5, {2: False, 3: False, 4: False}, RaftRole.FOLLOWER),
        (3, {}, RaftRole.CANDIDATE),
        (5, {2: True}, RaftRole.CANDIDATE),
        (5, {2: False, 3: False}, RaftRole.CANDIDATE),
        (4, {2: True}, RaftRole.CANDIDATE),
    ],
)
def test_raft_candidate_wins_by_a_majority(voters, answers, role):
    """§5.2: a candidate wins with the votes of a majority of the full cluster."""
    node = _raft_node(voters=range(1, voters + 1))
    node.campaign()
    for voter, granted in answers.items():
        if node.raft.role is RaftRole.CANDIDATE:
            _raft_say(node, MsgType.VOTE_RESP, voter, reject=not granted)
    assert (node.raft.role, node.raft.term) == (role, 1)


def test_raft_repeated_and_foreign_votes_count_once_or_not():
    """A duplicated answer is one vote, and one of a non-member none."""
    node = _raft_node(voters=range(1, 6))
    node.campaign()
    for voter in (2, 2, 2, 9, 1):
        _raft_say(node, MsgType.VOTE_RESP, voter)
    assert node.raft.role is RaftRole.CANDIDATE


@pytest.mark.parametrize(
    ("vote", "candidate", "granted"),
    [(0, 2, True), (0, 3, True), (2, 2, True), (3, 3, True), (2, 3, False), (1, 3, False)],
)
def test_raft_votes_first_come_first_served(vote, candidate, granted):
    """§5.2: at most one candidate per term gets the vote; asking again gets it again."""
    node = _raft_node(term=1, vote=vote)
    (answer,) = _raft_say(node, MsgType.VOTE, candidate)
    assert (answer.type, answer.reject) == (MsgType.VOTE_RESP, not granted)
    assert node.raft.vote == (candidate if granted else vote)


@pytest.mark.parametrize("term", [5, 6])
@pytest.mark.parametrize("kind", [MsgType.APP, MsgType.HEARTBEAT])
def test_raft_candidate_yields_to_a_leader(kind, term):
    """§5.2: a leader of the same or a later term ends the candidacy."""
    node = _raft_in_role(RaftRole.CANDIDATE)
    _raft_say(node, kind, term=term)
    assert (node.raft.role, node.raft.term, node.raft.lead) == (RaftRole.FOLLOWER, term, 2)


def test_raft_election_timeout_is_random_between_e_and_2e():
    """§5.2: drawn anew for each wait; every value of [E, 2E-1] turns up."""
    node = _raft_node()
    seen = set()
    for term in range(1, 300):
        _raft_say(node, MsgType.VOTE, term=term)
        seen.add(node.raft.election_timeout)
    assert seen == set(range(10, 20))


@pytest.mark.parametrize("kind", [MsgType.APP, MsgType.HEARTBEAT, MsgType.SNAP])
def test_raft_hearing_the_leader_restarts_the_timer(kind):
    """§5.2: a follower stays one as long as it hears a valid leader."""
    node = _raft_node(term=1)
    for _ in range(10):
        node.tick(9)
        _raft_say(node, kind)
    assert (node.raft.role, node.raft.lead) == (RaftRole.FOLLOWER, 2)


def test_raft_refused_vote_does_not_restart_the_timer():
    """Thesis §3.4: only granting a vote does, lest a hopeless candidate silence all others."""
    node = _raft_node(terms=[1], term=1)
    node.tick(9)
    _raft_say(node, MsgType.VOTE, index=0, log_term=0)
    assert node.raft.election_elapsed == 9
    _raft_say(node, MsgType.VOTE, index=1, log_term=1)
    assert node.raft.election_elapsed == 0


def test_raft_leader_appends_then_replicates():
    """§5.3: the leader appends the command and sends it with the entry before."""
    node = _raft_lead(_raft_node(terms=[1]))
    _raft_sync(node)
    _raft_say(node, MsgType.APP_RESP, index=2)
    node.propose(Entry(data=b"x"))
    ready = node.ready()
    (message,) = [m for m in ready.messages if m.to == 2]
    assert (message.type, message.index, message.log_term) == (MsgType.APP, 2, 2)
    assert [(e.term, e.index, e.data) for e in message.entries] == [(2, 3, b"x")]
    assert message.entries == ready.entries and ready.must_sync


@pytest.mark.parametrize(
    ("voters", "acks", "committed"),
    [(1, [], True), (3, [], False), (3, [2], True), (3, [2, 3], True), (5, [2], False),
     (5, [2, 3], True), (4, [2], False), (2, [], False), (2, [2], True)],
)
def test_raft_leader_commits_on_a_majority(voters, acks, committed):
    """§5.3: an entry is committed once the leader has replicated it on a majority."""
    node = _raft_lead(_raft_node(voters=range(1, voters + 1)))
    node.propose(Entry(data=b"x"))
    _raft_sync(node)
    for peer in acks:
        _raft_say(node, MsgType.APP_RESP, peer, index=2)
    assert node.raft.log.commit == (2 if committed else 0)
    assert len(node.committed_entries()) == (2 if committed else 0)


def test_raft_leader_counts_itself_only_when_its_disk_is_done():
    """Thesis §10.2.1: the leader may send before its own write, but not count it."""
    node = _raft_lead(_raft_node())
    ready = node.ready()
    assert [m.type for m in ready.messages] == [MsgType.APP, MsgType.APP] and not ready.held
    node.propose(Entry(data=b"x"))
    node.ready()
    node.step(Message(MsgType.APP_RESP, to=1, sender=2, term=1, index=2))
    assert node.raft.log.commit == 0
    node.persisted(ready.mark)
    assert node.raft.log.commit == 1


def test_raft_majority_without_the_leader_commits_but_it_does_not_apply():
    """Followers alone may commit; the leader applies what its own disk has."""
    node = _raft_lead(_raft_node())
    ready = node.ready()
    for peer in (2, 3):
        node.step(Message(MsgType.APP_RESP, to=1, sender=peer, term=1, index=1))
    assert node.raft.log.commit == 1 and node.committed_entries() == []
    node.persisted(ready.mark)
    assert [entry.index for entry in node.committed_entries()] == [1]


def test_raft_commit_reaches_followers_with_the_next_message():
    """§5.3: the leader includes the highest index it knows to be committed."""
    node = _raft_lead(_raft_node())
    _raft_sync(node)
    answers = _raft_say(node, MsgType.APP_RESP, 2, index=1)
    assert [(m.to, m.commit, len(m.entries)) for m in answers] == [(2, 1, 0)]
    answers = _raft_say(node, MsgType.APP_RESP, 3, index=1)
    assert [(m.to, m.commit) for m in answers] == [(3, 1)]


def test_raft_patient_leader_tells_of_a_commit_with_entries_or_when_told_to():
    """Whoever has clients of its own that wait for it hears at once."""
    def told(messages):
        return [(m.to, m.commit, len(m.entries)) for m in messages]

    node = _raft_lead(_raft_node(defer_commit=True))
    _raft_sync(node)
    for follower in (2, 3):
        _raft_say(node, MsgType.APP_RESP, follower, index=1)
    node.propose(Entry(data=b"a"))
    _raft_sync(node)
    assert told(_raft_say(node, MsgType.APP_RESP, 2, index=2)) == [] and node.commit_unsent
    node.propose(Entry(data=b"b"))
    assert told(_raft_sync(node).messages) == [(2, 2, 1), (3, 2, 1)] and not node.commit_unsent
    assert told(_raft_say(node, MsgType.APP_RESP, 2, index=3)) == []
    node.broadcast_commit()
    assert told(_raft_sync(node).messages) == [(2, 3, 0), (3, 3, 0)] and not node.commit_unsent
    _raft_say(node, MsgType.PROP, 3, term=0, entries=[Entry(data=b"c")])
    assert told(_raft_say(node, MsgType.APP_RESP, 2, index=4)) == [(3, 4, 0)]
    assert node.commit_unsent


def test_raft_patient_leader_tells_a_member_of_its_removal_at_once():
    """A millisecond later it would be no voter any more, and get no messages."""
    node = _raft_lead(_raft_node(defer_commit=True))
    _raft_sync(node)
    for follower in (2, 3):
        _raft_say(node, MsgType.APP_RESP, follower, index=1)
    node.propose_conf_change(ConfChange(7, ConfChangeType.REMOVE_NODE, 3))
    _raft_sync(node)
    told = _raft_say(node, MsgType.APP_RESP, 2, index=2)
    assert [(m.to, m.commit) for m in told] == [(2, 2), (3, 2)]


def test_raft_patient_leader_alone_has_nobody_to_tell():
    node = _raft_lead(_raft_node(voters=(1,), defer_commit=True))
    _raft_sync(node)
    assert node.raft.log.commit == 1 and not node.commit_unsent


@pytest.mark.parametrize("terms", [[], [2], [1, 2], [1]])
def test_raft_leader_commits_preceding_entries(terms):
    """§5.3: committing an entry commits all before it, earlier leaders' included."""
    node = _raft_lead(_raft_node(terms=terms, term=2))
    node.propose(Entry(data=b"x"))
    _raft_sync(node)
    last = len(terms) + 2
    _raft_say(node, MsgType.APP_RESP, 2, index=last)
    assert [entry.term for entry in node.committed_entries()] == [*terms, 3, 3]


@pytest.mark.parametrize(("commit", "expected"), [(1, 1), (2, 2), (3, 3), (9, 3)])
def test_raft_follower_applies_what_the_leader_committed(commit, expected):
    """§5.3: once a follower learns that an entry is committed, it applies it, in order."""
    node = _raft_node(term=1)
    _raft_say(node, MsgType.APP, entries=_raft_entries([1, 1, 1]), commit=commit)
    assert [entry.index for entry in node.committed_entries()] == list(range(1, expected + 1))


@pytest.mark.parametrize(
    ("log_term", "index", "answer"),
    [(0, 0, (1, False, 0)), (1, 1, (1, False, 0)), (2, 2, (2, False, 0)),
     (1, 2, (2, True, 2)), (2, 3, (3, True, 2)), (3, 3, (3, True, 2))],
    ids=["at-zero", "at-commit", "at-last", "wrong-term", "after-last", "after-last-term"],
)
def test_raft_follower_checks_the_previous_entry(log_term, index, answer):
    """§5.3: without an entry of that index and term the message is refused, with a hint."""
    node = _raft_node(terms=[1, 2], commit=1)
    (message,) = _raft_say(node, MsgType.APP, log_term=log_term, index=index)
    assert (message.index, message.reject, message.reject_hint) == answer


@pytest.mark.parametrize(
    ("previous", "terms", "expected"),
    [(EntryID(2, 2), [3], [1, 2, 3]), (EntryID(1, 1), [3, 4], [1, 3, 4]),
     (EntryID(0, 0), [1], [1, 2]), (EntryID(0, 0), [3], [3])],
)
def test_raft_follower_replaces_conflicts_only(previous, terms, expected):
    """§5.3: delete the existing entry and all after it on conflict, append what is missing."""
    node = _raft_node(terms=[1, 2], term=4)
    _raft_say(node, MsgType.APP, log_term=previous.term, index=previous.index,
              entries=_raft_entries(terms, previous.index + 1))
    assert _raft_terms(node.raft.log) == expected


_RAFT_FIGURE_7 = [
    [1, 1, 1, 4, 4, 5, 5, 6, 6],
    [1, 1, 1, 4],
    [1, 1, 1, 4, 4, 5, 5, 6, 6, 6, 6],
    [1, 1, 1, 4, 4, 5, 5, 6, 6, 6, 7, 7],
    [1, 1, 1, 4, 4, 4, 4],
    [1, 1, 1, 2, 2, 2, 3, 3, 3, 3, 3],
]


@pytest.mark.parametrize("terms", _RAFT_FIGURE_7, ids="abcdef")
def test_raft_leader_brings_any_follower_into_line(terms):
    """§5.3 figure 7: missing, extra, and both; the follower ends with the leader's log."""
    net = RaftNetwork()
    lead_terms = [1, 1, 1, 4, 4, 5, 5, 6, 6, 6]
    net.add(_raft_node(1, terms=lead_terms, term=7, commit=3))
    net.add(_raft_node(2, terms=terms, term=7, commit=3))
    net.add(_raft_node(3, terms=[1, 1, 1], term=7, commit=3))
    net.elect(1)
    net.propose(1, b"x")
    assert _raft_terms(net.nodes[2].raft.log) == [*lead_terms, 8, 8]
    assert net.applied[1] == net.applied[2] == net.applied[3]


def test_raft_vote_request_tells_the_last_entry():
    """§5.4.1: the request includes information about the candidate's log."""
    node = _raft_node(terms=[1, 3])
    node.campaign()
    votes = _raft_sync(node).held
    assert [(m.to, m.log_term, m.index) for m in votes] == [(2, 3, 2), (3, 3, 2)]


@pytest.mark.parametrize(
    ("terms", "log_term", "index", "granted"),
    [([1], 1, 1, True), ([1], 1, 2, True), ([1, 1], 1, 1, False), ([1], 2, 1, True),
     ([1], 2, 2, True), ([1, 1], 2, 1, True), ([2], 1, 1, False), ([2], 1, 2, False),
     ([2, 1], 1, 1, False)],
)
def test_raft_voter_denies_a_less_complete_log(terms, log_term, index, granted):
    """§5.4.1: the voter denies its vote if its own log is more up-to-date."""
    node = _raft_node(terms=terms, term=3)
    (answer,) = _raft_say(node, MsgType.VOTE, term=4, log_term=log_term, index=index)
    assert answer.reject is not granted


@pytest.mark.parametrize(("index", "commit"), [(1, 0), (2, 0), (3, 3)])
def test_raft_leader_commits_only_own_term_by_counting(index, commit):
    """§5.4.2: entries of earlier terms are committed only indirectly."""
    node = _raft_lead(_raft_node(terms=[1, 2]))
    _raft_sync(node)
    _raft_say(node, MsgType.APP_RESP, 2, index=index)
    assert node.raft.log.commit == commit


def test_raft_deposed_leader_loses_its_uncommitted_tail():
    """§5.3: what only the isolated leader holds is overwritten by the newer term."""
    net = _raft_network(5)
    net.elect(1)
    net.isolate(1)
    net.propose(1, b"lost")
    net.elect(3)
    net.propose(3, b"kept")
    net.recover()
    net.tick(3)
    assert all(applied == [b"kept"] for applied in net.applied.values())
    assert net.nodes[1].raft.role is RaftRole.FOLLOWER


def test_raft_member_with_a_higher_term_comes_back():
    """It was cut off and campaigned in vain: its answer deposes the leader, and all go on."""
    net = _raft_network(3)
    net.elect(1)
    net.isolate(3)
    net.tick(3, 60)
    net.propose(1, b"a")
    net.recover()
    net.tick(1)
    assert net.nodes[1].raft.term == net.nodes[3].raft.term
    net.elect(1)
    net.propose(1, b"b")
    assert net.applied[3] == [b"a", b"b"]


def test_raft_lost_appends_are_found_by_heartbeats():
    """The leader sent ahead and nothing arrived: the next heartbeat answer repairs it."""
    net = _raft_network(3)
    net.elect(1)
    net.drop(MsgType.APP)
    net.propose(1, b"a")
    net.recover()
    assert net.applied[2] == []
    net.tick(1)
    net.tick(1)
    assert net.applied[2] == net.applied[3] == [b"a"]


# --- promises and the disk ----------------------------------------------------


def test_raft_answers_wait_for_the_disk_and_heartbeats_do_not():
    """A promise must not leave before the disk has what it promises."""
    node = _raft_node(term=1)
    node.step(Message(MsgType.APP, to=1, sender=2, term=1, entries=_raft_entries([1, 1])))
    node.step(Message(MsgType.HEARTBEAT, to=1, sender=2, term=1, context=b"ctx"))
    ready = node.ready()
    assert [(m.type, m.context) for m in ready.messages] == [(MsgType.HEARTBEAT_RESP, b"ctx")]
    assert [(m.type, m.index) for m in ready.held] == [(MsgType.APP_RESP, 2)]
    assert ready.must_sync and len(ready.entries) == 2


def test_raft_one_answer_stands_for_a_burst():
    """Answers to one leader merge into the highest; a stale duplicate does not lower it."""
    node = _raft_node(term=1)
    entries = _raft_entries([1, 1, 1])
    for count in (1, 2, 3, 1):
        node.step(Message(MsgType.APP, to=1, sender=2, term=1, entries=entries[:count]))
    assert [m.index for m in node.ready().held] == [3]


def test_raft_answer_for_entries_replaced_in_the_same_turn_is_dropped():
    """The old leader must not hear of entries that the disk will never hold."""
    node = _raft_node(term=1)
    node.step(Message(MsgType.APP, to=1, sender=2, term=1, entries=_raft_entries([1, 1, 1])))
    node.step(Message(MsgType.APP, to=1, sender=3, term=2, entries=_raft_entries([2])))
    ready = node.ready()
    assert [(m.to, m.term, m.index) for m in ready.held] == [(3, 2, 1)]
    assert [(entry.term, entry.index) for entry in ready.entries] == [EntryID(2, 1)]


def test_raft_hard_state_is_handed_out_once_and_syncs_for_term_and_vote():
    """A new commit index alone needs no sync."""
    node = _raft_node(term=1)
    _raft_say(node, MsgType.APP, entries=_raft_entries([1]))
    assert not node.has_ready()
    node.step(Message(MsgType.HEARTBEAT, to=1, sender=2, term=1, commit=1))
    ready = node.ready()
    assert (ready.hard_state, ready.must_sync) == (HardState(1, 0, 1), False)
    node.step(Message(MsgType.VOTE, to=1, sender=2, term=2, index=1, log_term=1))
    ready = node.ready()
    assert (ready.hard_state, ready.must_sync) == (HardState(2, 2, 1), True)
    assert node.ready().hard_state is None


def test_raft_readys_overlap_on_their_way_to_the_disk():
    """ready() moves on at once; one later mark makes all before it stable."""
    node = _raft_node(voters=[1])
    node.campaign()
    first = node.ready()
    node.propose(Entry(data=b"x"))
    second = node.ready()
    assert [[e.index for e in ready.entries] for ready in (first, second)] == [[1], [2]]
    node.persisted(second.mark)
    node.persisted(first.mark)
    assert [entry.index for entry in node.committed_entries()] == [1, 2]


def test_raft_single_member_applies_after_its_own_write():
    """Alone: elected at once, commits with its own disk, sends nothing."""
    net = _raft_network(1)
    net.elect(1)
    node = net.nodes[1]
    node.propose(Entry(data=b"x"))
    ready = node.ready()
    assert node.committed_entries() == [] and not ready.messages and not ready.held
    node.persisted(ready.mark)
    assert [entry.data for entry in node.committed_entries()] == [b"x"]


# --- start --------------------------------------------------------------------


def test_raft_bootstrap_hands_out_its_first_entries_as_committed():
    """Spec §9.3: HardState {1, 0, n} and n ConfChange entries, without any message."""
    trace: List[str] = []
    entries = [_raft_conf_entry(index, index) for index in (1, 2, 3)]
    node = RawNode.bootstrap(_raft_config(1, trace=trace.append), entries)
    assert node.raft.voters == (1, 2, 3)
    ready = node.ready()
    assert (ready.hard_state, ready.entries) == (HardState(1, 0, 3), entries)
    assert node.committed_entries() == []
    node.persisted(ready.mark)
    assert [entry.index for entry in node.committed_entries()] == [1, 2, 3]
    state = "term: 0, commit: 0, applied: 0, lastindex: 0, lastterm: 0"
    assert f"newRaft 1 [peers: [], {state}]" in trace


def test_raft_restart_begins_behind_the_snapshot():
    """applied is the snapshot's index; committed entries behind it are applied again."""
    node = RawNode(
        _raft_config(1), hard_state=HardState(3, 2, 12),
        snapshot=Snapshot(b"", (1, 2), 10, 2), entries=_raft_entries([2, 3, 3], 11),
    )
    raft = node.raft
    assert (raft.term, raft.vote, raft.log.commit, raft.log.applied) == (3, 2, 12, 10)
    assert (raft.role, raft.lead) == (RaftRole.FOLLOWER, 0)
    assert [entry.index for entry in node.committed_entries()] == [11, 12]
    assert not node.has_ready() and node.raft.voters == (1, 2)


def test_raft_restart_drops_a_tail_that_the_snapshot_replaced():
    """A crash right after saving a snapshot leaves the old tail in the WAL: older terms."""
    node = RawNode(
        _raft_config(1), hard_state=HardState(5, 0, 4),
        snapshot=Snapshot(b"", (1, 2), 10, 5), entries=_raft_entries([3, 3], 11),
    )
    assert (node.raft.log.last_id, node.raft.log.commit) == (EntryID(5, 10), 10)


def test_raft_non_voter_never_campaigns_but_votes():
    """A joiner knows no voters, yet its vote may be needed (thesis §4.2.1)."""
    node = RawNode(_raft_config(4))
    node.tick(100)
    node.campaign()
    _raft_say(node, MsgType.TIMEOUT_NOW, term=1)
    assert node.raft.role is RaftRole.FOLLOWER
    (answer,) = _raft_say(node, MsgType.VOTE, term=7)
    assert (answer.type, answer.reject, node.raft.vote) == (MsgType.VOTE_RESP, False, 2)


def test_raft_advanced_ticks_shorten_the_first_wait_only():
    """Spec §9.2: nothing fires while advancing; then one tick may do."""
    node = _raft_node(voters=[1])
    node.advance_ticks(19)
    assert node.raft.role is RaftRole.FOLLOWER
    node.tick()
    assert node.raft.role is RaftRole.LEADER


@pytest.mark.parametrize(
    "message",
    [
        Message(MsgType.HUP, to=1, sender=2),
        Message(MsgType.UNREACHABLE, to=1, sender=2, term=9),
        Message(MsgType.HEARTBEAT),
        Message(MsgType.HEARTBEAT, to=1, sender=2),
        Message(MsgType.APP, to=7, sender=2, term=9),
        Message(MsgType.APP, to=1, sender=1, term=9),
        Message(MsgType.APP_RESP, to=1, sender=9, term=9),
        Message(MsgType.PRE_VOTE_RESP, to=1, sender=9, term=9, reject=True),
        Message(MsgType.APP, to=1, sender=2, term=1, entries=_raft_entries([1], 5)),
        Message(MsgType.READ_INDEX, to=1, sender=2),
    ],
    ids=repr,
)
def test_raft_nonsense_from_the_network_is_dropped(message):
    """Local types, other addressees, strangers' answers and gaps leave no trace."""
    node = _raft_node(terms=[1], term=1)
    node.step(message)
    assert not node.has_ready() and node.raft.term == 1


# --- proposals ----------------------------------------------------------------


def test_raft_follower_forwards_proposals_of_a_turn_together():
    """One MsgProp of term 0 to the leader; the entries keep their order."""
    node = _raft_node(term=1)
    _raft_say(node, MsgType.HEARTBEAT)
    node.propose(Entry(data=b"a"))
    node.propose(Entry(data=b"b"), Entry(data=b"c"))
    (message,) = node.ready().messages
    assert (message.type, message.to, message.sender, message.term) == (MsgType.PROP, 2, 1, 0)
    assert [entry.data for entry in message.entries] == [b"a", b"b", b"c"]


def test_raft_forwarded_proposals_are_split_by_size():
    """Each MsgProp stays near the limit of a message; the next turn begins a new one."""
    node = _raft_node(term=1, max_entries_bytes=100)
    _raft_say(node, MsgType.HEARTBEAT)
    for data in (b"a", b"b", b"c"):
        node.propose(Entry(data=data))
    assert [len(m.entries) for m in node.ready().messages] == [2, 1]
    node.propose(Entry(data=b"d"))
    assert [len(m.entries) for m in node.ready().messages] == [1]


def test_raft_forwarded_proposal_goes_on_but_never_back():
    """A follower passes a stray MsgProp to its leader, not to the sender."""
    node = _raft_node(term=1)
    _raft_say(node, MsgType.HEARTBEAT)
    node.step(Message(MsgType.PROP, to=1, sender=3, entries=[Entry(data=b"x")]))
    assert [m.to for m in node.ready().messages] == [2]
    with pytest.raises(ProposalDropped):
        node.step(Message(MsgType.PROP, to=1, sender=2, entries=[Entry(data=b"x")]))


def test_raft_duplicated_msgprop_does_not_share_entries():
    """The leader numbers copies: two deliveries of one message are two entries."""
    node = _raft_lead(_raft_node())
    message = Message(MsgType.PROP, to=1, sender=2, entries=[Entry(data=b"x")])
    node.step(message)
    node.step(message)
    assert [(entry.term, entry.index) for entry in node.ready().entries] == [(1, 1), (1, 2), (1, 3)]


@pytest.mark.parametrize("role", [RaftRole.FOLLOWER, RaftRole.CANDIDATE])
def test_raft_proposal_without_leader_is_dropped(role):
    """Nobody could append it."""
    with pytest.raises(ProposalDropped):
        _raft_in_role(role).propose(Entry(data=b"x"))


def test_raft_proposed_entry_is_the_one_that_comes_back():
    """On the leader the very object is appended, so what is cached on it survives."""
    net = _raft_network(1)
    net.elect(1)
    request = pyetcd.Request(id=7)
    entry = Entry(data=b"x", request=request)
    net.nodes[1].propose(entry)
    _raft_sync(net.nodes[1])
    (committed,) = net.nodes[1].committed_entries()
    assert committed is entry and committed.request is request


def test_raft_too_many_uncommitted_bytes_refuse_proposals():
    """The tail of a leader without quorum is bounded; committing frees it."""
    node = _raft_lead(_raft_node(max_uncommitted_bytes=10))
    node.propose(Entry(data=b"x" * 50))
    with pytest.raises(ProposalDropped):
        node.propose(Entry(data=b"x"))
    node.propose(Entry())
    _raft_sync(node)
    _raft_say(node, MsgType.APP_RESP, 2, index=3)
    node.propose(Entry(data=b"x"))
    assert node.raft.uncommitted_bytes == 1


# --- replication in batches -----------------------------------------------------


def test_raft_proposals_of_a_turn_leave_in_one_message_per_peer():
    """Peers at the same point share the very list, which a transport may encode once."""
    net = _raft_network(3)
    node = net.elect(1)
    for number in range(100):
        node.propose(Entry(data=b"%d" % number))
    messages = node.ready().messages
    assert [(m.type, m.to, len(m.entries)) for m in messages] == [
        (MsgType.APP, 2, 100), (MsgType.APP, 3, 100)]
    assert messages[0].entries is messages[1].entries


def test_raft_messages_are_cut_by_size_and_acks_pull_the_rest():
    """One MsgApp per turn; a backlog follows as fast as it is answered."""
    net = _raft_network(3, max_entries_bytes=100)
    node = net.elect(1)
    node.propose(*[Entry(data=b"x") for _ in range(6)])
    net.ready(net.members[1])
    assert [len(m.entries) for m in net.wire] == [2, 2]
    net.settle()
    assert [len(applied) for applied in net.applied.values()] == [6, 6, 6]


def test_raft_full_window_pauses_until_an_answer():
    """No more than max_inflight unanswered MsgApp; a heartbeat answer frees one."""
    node = _raft_lead(_raft_node(max_inflight=2))
    _raft_sync(node)
    _raft_say(node, MsgType.APP_RESP, 2, index=1)
    sent = 0
    for _ in range(5):
        node.propose(Entry(data=b"x"))
        sent += len([m for m in _raft_sync(node).messages if m.to == 2])
    assert sent == 2
    assert [m.to for m in _raft_say(node, MsgType.HEARTBEAT_RESP, 2)] == [2]


def test_raft_unreachable_follower_is_probed():
    """After a lost message: one MsgApp from the match on, then wait."""
    node = _raft_lead(_raft_node())
    _raft_sync(node)
    _raft_say(node, MsgType.APP_RESP, 2, index=1)
    node.propose(Entry(data=b"a"))
    _raft_sync(node)
    node.report_unreachable(2)
    node.report_unreachable(9)
    node.propose(Entry(data=b"b"))
    (message,) = [m for m in _raft_sync(node).messages if m.to == 2]
    assert (message.index, len(message.entries)) == (1, 2)
    node.propose(Entry(data=b"c"))
    assert [m for m in _raft_sync(node).messages if m.to == 2] == []


def test_raft_heartbeat_commit_is_bounded_by_the_match():
    """A follower that lacks entries must not commit what it has in their place."""
    node = _raft_lead(_raft_node())
    _raft_sync(node)
    _raft_say(node, MsgType.APP_RESP, 2, index=1)
    node.tick()
    assert [(m.to, m.commit) for m in _raft_sync(node).messages] == [(2, 1), (3, 0)]


def test_raft_answer_beyond_the_leaders_log_is_ignored():
    """Nobody holds more than its leader; garbage must not commit."""
    node = _raft_lead(_raft_node())
    _raft_sync(node)
    _raft_say(node, MsgType.APP_RESP, 2, index=99)
    progress = node.raft.progress[2]
    assert (node.raft.log.commit, progress.match_index, progress.next_index) == (0, 0, 1)
    assert progress.state == pyetcd.ProgressState.PROBE


# --- snapshots ----------------------------------------------------------------


def _raft_lagging() -> RaftNetwork:
    """Member 3 missed entries that the others have compacted."""
    net = _raft_network(3)
    net.elect(1)
    net.isolate(3)
    for data in (b"a", b"b", b"c"):
        net.propose(1, data)
    net.members[1].compact()
    net.recover()
    return net


def test_raft_lagging_follower_gets_a_snapshot_then_entries():
    """Thesis §5: what is compacted is replaced by the state; then the log goes on."""
    net = _raft_lagging()
    net.tick(1, 2)
    net.propose(1, b"d")
    assert net.applied[3] == [b"a", b"b", b"c", b"d"]
    assert net.nodes[1].raft.progress[3].state == pyetcd.ProgressState.REPLICATE
    assert net.nodes[3].raft.voters == (1, 2, 3)


def test_raft_snapshot_waits_until_there_is_one_and_the_peer_answers():
    """No source, or a silent peer: nothing is sent, and nothing is lost."""
    net = _raft_lagging()
    disk = net.members[1].disk
    kept, disk.snapshot = disk.snapshot, Snapshot()
    net.tick(1, 2)
    assert net.applied[3] == []
    disk.snapshot = kept
    net.nodes[1].report_unreachable(3)
    net.drop(MsgType.HEARTBEAT_RESP)
    net.propose(1, b"d")
    assert net.applied[3] == []
    net.recover()
    net.tick(1, 2)
    assert net.applied[3] == [b"a", b"b", b"c", b"d"]


@pytest.mark.parametrize(("ok", "following"), [(True, 8), (False, 1)])
def test_raft_snapshot_report_leads_to_a_probe(ok, following):
    """Sent: probe behind it.  Failed: again from the match.  Not before the next heartbeat."""
    net = _raft_lagging()
    net.drop(MsgType.APP_RESP)
    node = net.nodes[1]
    node.raft.progress[3].recent_active = True
    node.raft.progress[3].become_snapshot(7)
    node.report_snapshot(3, ok)
    progress = node.raft.progress[3]
    assert (progress.state, progress.is_paused) == (_RAFT_PROBE, True)
    assert progress.next_index == (following if ok else progress.match_index + 1)
    node.report_snapshot(3, ok)
    node.tick()
    assert not progress.paused


@pytest.mark.parametrize(
    ("index", "term", "ack", "commit"),
    [(2, 1, 2, 2), (3, 2, 3, 3), (1, 1, 2, 2), (9, 2, 9, 9), (3, 9, 3, 3)],
    ids=["at-commit", "matches", "behind", "ahead", "conflict"],
)
def test_raft_snapshot_is_taken_only_if_it_helps(index, term, ack, commit):
    """Behind the commit: ignored.  In our log: only the commit moves.  Else it replaces the log."""
    node = _raft_node(terms=[1, 1, 2, 2], commit=2)
    replaced = (index, term) in ((9, 2), (3, 9))
    (answer,) = _raft_say(
        node, MsgType.SNAP, term=9, snapshot=Snapshot(b"s", (1, 2, 3, 4), index, term))
    assert (answer.type, answer.index, node.raft.log.commit) == (MsgType.APP_RESP, ack, commit)
    assert node.raft.log.last_index == (index if replaced else 4)
    assert node.raft.voters == ((1, 2, 3, 4) if replaced else (1, 2, 3))


def test_raft_snapshot_and_entries_behind_it_in_one_ready():
    """The server saves the snapshot first; nothing is applied before it took it."""
    node = _raft_node(term=2)
    node.step(Message(MsgType.SNAP, to=1, sender=2, term=2,
                      snapshot=Snapshot(b"s", (1, 2), 10, 1)))
    node.step(Message(MsgType.APP, to=1, sender=2, term=2, index=10, log_term=1, commit=11,
                      entries=_raft_entries([2], 11)))
    ready = node.ready()
    assert ready.snapshot is not None and ready.must_sync
    assert [entry.index for entry in ready.entries] == [11]
    assert (ready.hard_state, [m.index for m in ready.held]) == (HardState(2, 0, 11), [11])
    node.persisted(ready.mark)
    assert node.committed_entries() == []
    node.applied_to(10)
    assert [entry.index for entry in node.committed_entries()] == [11]


def test_raft_one_membership_change_at_a_time():
    """§4.1: while one is pending, the next becomes an empty entry; applied, the way is free."""
    node = _raft_lead(_raft_node(voters=[1]))
    add = _raft_change(ConfChangeType.ADD_NODE, 2)
    node.propose_conf_change(add)
    node.propose_conf_change(add)
    entries = _raft_sync(node).entries
    assert [(entry.type, bool(entry.data)) for entry in entries] == [(1, True), (0, False)]
    assert node.apply_conf_change(add) == (1, 2)
    node.propose_conf_change(_raft_change(ConfChangeType.ADD_NODE, 3))
    assert [entry.type for entry in node.ready().entries] == [1]


def test_raft_refused_change_only_ends_its_pending_time():
    """The state machine said no: node_id 0."""
    node = _raft_lead(_raft_node(voters=[1]))
    change = _raft_change(ConfChangeType.ADD_NODE, 2)
    node.propose_conf_change(change)
    _raft_sync(node)
    assert node.apply_conf_change(change._replace(node_id=0)) == (1,)
    node.propose_conf_change(change)
    assert [entry.type for entry in node.ready().entries] == [1]


def test_raft_new_leader_respects_the_change_in_its_log():
    """§4.1: it was not applied here yet, so it still may count."""
    node = _raft_node(term=1)
    entry = _raft_conf_entry(1, 4)
    _raft_say(node, MsgType.APP, entries=[entry])
    _raft_lead(node)
    node.propose_conf_change(_raft_change(ConfChangeType.ADD_NODE, 5))
    assert [entry.type for entry in node.ready().entries] == [0, 0]


def test_raft_committed_change_must_be_applied_before_campaigning():
    """Counting by voters of two changes ago could elect a second leader; it retries each tick."""
    node = _raft_node(term=1)
    _raft_say(node, MsgType.APP, entries=[_raft_conf_entry(1, 4)], commit=1)
    node.tick(30)
    assert node.raft.role is RaftRole.FOLLOWER
    node.apply_conf_change(_raft_change(ConfChangeType.ADD_NODE, 4))
    node.applied_to(1)
    node.tick()
    assert node.raft.role is RaftRole.CANDIDATE


def test_raft_member_joins_by_log():
    """Added while empty: it is brought up to date and counts."""
    net = _raft_network(1)
    net.elect(1)
    net.propose(1, b"a")
    net.add(RawNode(_raft_config(2)))
    net.nodes[1].propose_conf_change(_raft_change(ConfChangeType.ADD_NODE, 2))
    net.settle()
    net.tick(1, 2)
    net.propose(1, b"b")
    assert net.applied[2] == [b"a", b"b"] and net.nodes[2].raft.voters == (1, 2)


def test_raft_removal_shrinks_the_quorum_and_commits():
    """Entries that waited for the removed member's answer are committed at once."""
    net = _raft_network(2)
    node = net.elect(1)
    node.propose_conf_change(_raft_change(ConfChangeType.REMOVE_NODE, 2))
    node.propose(Entry(data=b"x"))
    ready = _raft_sync(node)
    assert ready.entries
    last = node.raft.log.last_index
    _raft_say(node, MsgType.APP_RESP, 2, index=last - 1)
    assert node.raft.log.commit == last - 1
    assert node.apply_conf_change(_raft_change(ConfChangeType.REMOVE_NODE, 2)) == (1,)
    assert node.raft.log.commit == last


def test_raft_removed_member_proposes_no_more():
    """Its own removal was applied; forwarded proposals are dropped as well."""
    net = _raft_network(3)
    node = net.elect(1)
    node.propose_conf_change(_raft_change(ConfChangeType.REMOVE_NODE, 1))
    net.settle()
    assert node.raft.voters == (2, 3)
    with pytest.raises(ProposalDropped, match="removed"):
        node.propose(Entry(data=b"x"))
    with pytest.raises(ProposalDropped, match="removed"):
        node.step(Message(MsgType.PROP, to=1, sender=2, entries=[Entry(data=b"x")]))


def test_raft_update_and_learner_leave_the_voters():
    """Only additions and removals change who votes; a repeated addition is none."""
    node = _raft_node()
    for kind in (ConfChangeType.UPDATE_NODE, ConfChangeType.ADD_LEARNER):
        assert node.apply_conf_change(_raft_change(kind, 4)) == (1, 2, 3)
    assert node.apply_conf_change(_raft_change(ConfChangeType.ADD_NODE, 3)) == (1, 2, 3)
    assert node.apply_conf_change(_raft_change(ConfChangeType.REMOVE_NODE, 9)) == (1, 2, 3)


# --- leader transfer and 3.x members --------------------------------------------


def test_raft_transfer_goes_to_a_complete_follower_at_once():
    """Thesis §3.10: TimeoutNow, then an election with the transfer's context."""
    net = _raft_network(3)
    net.elect(1)
    net.nodes[1].transfer_leader(3)
    with pytest.raises(ProposalDropped):
        net.nodes[1].propose(Entry(data=b"x"))
    net.settle()
    assert net.nodes[3].raft.role is RaftRole.LEADER
    assert net.nodes[1].raft.lead == 3


def test_raft_transfer_waits_for_the_log_and_gives_up_in_time():
    """First the missing entries; without success the leader serves on after E ticks."""
    net = _raft_network(3)
    net.elect(1)
    net.isolate(3)
    net.propose(1, b"a")
    net.nodes[1].transfer_leader(3)
    net.tick(1, 10)
    net.propose(1, b"b")
    net.nodes[1].transfer_leader(3)
    net.recover()
    net.tick(1, 2)
    assert net.nodes[3].raft.role is RaftRole.LEADER and net.applied[3] == [b"a", b"b"]


def test_raft_leader_without_a_majority_steps_down():
    """Thesis §6.2: cut off from the majority it serves nobody; with one answer it stays."""
    net = _raft_network(5)
    leader = net.elect(1)
    net.cut(1, 2), net.cut(1, 3)
    net.tick(1, 40)
    assert leader.raft.role is RaftRole.LEADER
    net.cut(1, 4)
    net.tick(1, 20)
    assert leader.raft.role is RaftRole.FOLLOWER and leader.raft.lead == 0
    with pytest.raises(ProposalDropped):
        leader.propose(Entry(data=b"x"))


def _raft_pre_voting(**options: Any) -> RaftNetwork:
    net = _raft_network(3, **options)
    net.elect(1)
    for node in net.nodes.values():
        node.raft.pre_vote = True
    return net


def test_raft_pre_vote_keeps_the_term_of_a_member_that_was_away():
    """Thesis §9.6: whoever cannot win asks in vain, and disturbs nobody when it is back."""
    net = _raft_pre_voting()
    net.isolate(3)
    for _ in range(30):
        net.tick(1), net.tick(3, 2)
    assert net.nodes[3].raft.role is RaftRole.PRE_CANDIDATE
    assert net.nodes[3].raft.term == net.nodes[1].raft.term
    net.recover()
    net.propose(1, b"a")
    net.tick(3, 25), net.tick(1, 1)
    assert net.nodes[1].raft.role is RaftRole.LEADER and net.nodes[3].raft.lead == 1
    assert net.applied[3] == [b"a"]


def test_raft_pre_vote_elects_when_the_leader_is_gone():
    """A majority that hears no leader grants, and the real election follows at once."""
    trace: List[str] = []
    net = _raft_pre_voting(trace=trace.append)
    net.propose(1, b"a")
    net.isolate(1)
    for node in net.nodes.values():
        node.raft.election_elapsed = 10
    net.nodes[2].campaign()
    net.settle()
    assert net.nodes[2].raft.role is RaftRole.LEADER
    assert net.nodes[3].raft.lead == 2
    assert any("became pre-candidate" in line for line in trace)


def test_raft_pre_vote_is_refused_for_an_older_log_and_ends_the_asking():
    """A majority of refusals: follower again, at the same term, with another timeout."""
    net = _raft_pre_voting()
    net.isolate(3)
    net.propose(1, b"a")
    net.recover()
    net.isolate(1)
    net.nodes[2].raft.election_elapsed = net.nodes[2].raft.election_timeout - 1
    term = net.nodes[3].raft.term
    net.nodes[3].campaign()
    net.settle()
    assert net.nodes[3].raft.term == term and net.nodes[3].raft.role is not RaftRole.LEADER


@pytest.mark.parametrize(("term", "reject", "role", "after"), [
    (6, False, RaftRole.CANDIDATE, 6),      # the grant that was missing: now the real election
    (5, True, RaftRole.PRE_CANDIDATE, 5),
    (9, True, RaftRole.FOLLOWER, 9),        # somebody is further: follow, and try again later
    (7, False, RaftRole.PRE_CANDIDATE, 5),  # granted for another term than we ask for
])
def test_raft_pre_vote_answers(term, reject, role, after):
    """Only grants of the term asked for count; a refusal may carry a higher term."""
    node = _raft_node(term=5)
    node.raft.pre_vote = True
    node.campaign()
    _raft_say(node, MsgType.PRE_VOTE_RESP, 2, term=term, reject=reject)
    assert (node.raft.role, node.raft.term) == (role, after)


@pytest.mark.parametrize("reader", [1, 3])
def test_raft_read_index_is_the_commit_index_of_a_confirmed_leader(reader):
    """Thesis §6.4: asked of the leader or through a follower, answered after a round."""
    net = _raft_network(3)
    leader = net.elect(1)
    net.propose(1, b"a")
    net.nodes[reader].read_index(b"one")
    net.settle()
    assert net.nodes[reader].confirmed_reads() == [(b"one", leader.raft.log.commit)]
    assert net.nodes[reader].confirmed_reads() == []


def test_raft_read_index_of_a_deposed_leader_is_never_confirmed():
    """It does not know that it was deposed, but nobody confirms; not even when it is back."""
    net = _raft_network(3)
    old = net.elect(1)
    net.isolate(1)
    net.elect(2)
    net.propose(2, b"new")
    old.read_index(b"stale")
    net.settle()
    assert old.raft.role is RaftRole.LEADER and old.confirmed_reads() == []
    net.recover()
    net.tick(1), net.tick(2)
    assert old.raft.lead == 2 and old.confirmed_reads() == []


def test_raft_read_index_waits_for_the_first_commit_of_the_term():
    """Before it, the leader may not know all that its predecessor has acknowledged."""
    node = _raft_node(terms=[1], term=1)
    node.campaign()
    _raft_say(node, MsgType.VOTE_RESP, 2)
    assert node.raft.role is RaftRole.LEADER
    node.read_index(b"early")
    _raft_say(node, MsgType.HEARTBEAT_RESP, 2, context=b"early")
    assert node.confirmed_reads() == []


def test_raft_read_index_counts_answers_to_its_own_question_only():
    """A late answer to an earlier heartbeat proves nothing; a later question answers earlier."""
    net = _raft_network(3)
    node = net.elect(1)
    net.isolate(1)
    node.read_index(b"1"), node.read_index(b"2")
    _raft_say(node, MsgType.HEARTBEAT_RESP, 2)
    _raft_say(node, MsgType.HEARTBEAT_RESP, 2, context=b"0")
    assert node.confirmed_reads() == []
    _raft_say(node, MsgType.HEARTBEAT_RESP, 2, context=b"2")
    assert [context for context, _ in node.confirmed_reads()] == [b"1", b"2"]


def test_raft_timeout_now_makes_a_candidate_with_context():
    """A 3.x voter ignores its lease for this context."""
    node = _raft_node(term=1)
    votes = _raft_say(node, MsgType.TIMEOUT_NOW)
    assert {(m.type, m.context) for m in votes} == {(MsgType.VOTE, b"CampaignTransfer")}


@pytest.mark.parametrize(
    ("term", "heard", "index", "granted"),
    [(6, False, 1, True), (5, False, 1, True), (6, True, 1, False), (6, False, 0, False)],
)
def test_raft_pre_vote_is_answered_and_changes_nothing(term, heard, index, granted):
    """§9.6: no while a leader is heard or the log is behind; a grant carries the asked term."""
    node = _raft_node(terms=[5])
    if heard:
        _raft_say(node, MsgType.HEARTBEAT)
    (answer,) = _raft_say(node, MsgType.PRE_VOTE, 3, term=term, index=index, log_term=5 * index)
    assert (answer.type, answer.reject) == (MsgType.PRE_VOTE_RESP, not granted)
    assert answer.term == (term if granted else 5)
    assert (node.raft.term, node.raft.vote) == (5, 0)


def test_raft_pre_vote_of_an_earlier_term_is_rejected_with_ours():
    """So the 3.x member learns the term."""
    node = _raft_node(terms=[5])
    (answer,) = _raft_say(node, MsgType.PRE_VOTE, 3, term=4, index=9, log_term=4)
    assert (answer.type, answer.reject, answer.term) == (MsgType.PRE_VOTE_RESP, True, 5)


def test_raft_read_index_is_believed_from_the_leader_only():
    """Another could give a follower an index of the past, and it would read stale values."""
    node = _raft_node(2, terms=(1,), commit=1)
    node.step(pyetcd.Message(pyetcd.MsgType.HEARTBEAT, to=2, sender=1, term=1, commit=1))
    answer = {"to": 2, "term": 1, "index": 1, "entries": [Entry(data=b"question")]}
    for sender in (3, 9):
        node.step(pyetcd.Message(pyetcd.MsgType.READ_INDEX_RESP, sender=sender, **answer))
        assert not node.raft.reads.confirmed
    node.step(pyetcd.Message(pyetcd.MsgType.READ_INDEX_RESP, sender=1, **answer))
    assert node.raft.reads.confirmed == [(b"question", 1)]


@pytest.mark.parametrize(("index", "term"), [(6, 2), (1_000, 2), (2, 1), (3, 9)])
def test_raft_no_snapshot_leaves_that_is_not_of_the_leaders_log(index, term):
    """Beyond its commit index, older than its log, or of another term at its place."""
    node = pyetcd.RawNode(
        _raft_config(1), hard_state=HardState(2, 0, 5), snapshot=Snapshot(b"", (1, 2, 3), 3, 2),
        entries=[Entry(0, 2, 4, b""), Entry(0, 2, 5, b"")])
    raft, sent = node.raft, []
    progress = pyetcd.Progress(1, 8)
    progress.recent_active = True
    raft.replication._mail.send = lambda kind, peer, **fields: sent.append(kind)
    for snapshot in (Snapshot(b"", (1, 2, 3), index, term), Snapshot(b"", (1, 2, 3), 3, 2)):
        assert not sent
        raft.replication.snapshot_source = lambda peer, snapshot=snapshot: snapshot
        raft.replication._send_snapshot(2, progress)
    assert sent == [pyetcd.MsgType.SNAP]
