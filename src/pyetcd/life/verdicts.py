"""Which etcd starts on a data directory, and which keys or entries are to blame if one does not.

Source: etcd 3.5 server/etcdserver/server.go, 3.6 and 3.7 server/etcdserver/bootstrap.go,
storage/util.go, api/membership/storev2.go and apply_v2.go.
"""

from __future__ import annotations

import re
from typing import Any, Dict, Iterator, List, NamedTuple, Tuple

from ..base.text import format_time, json_text
from ..base.versions import version_key
from ..member.cluster import format_id
from .inspection import CommandEntry, Inspection

BLAMED_MAX = 10                     # keys or entries that a report for people names
VALUE_CHARS_MAX = 100               # of a value in dump for people
_VERSIONS = ("2.3", "3.4", "3.5", "3.6", "3.7")
_META_COMMAND = re.compile(r"/0/(members/[0-9a-fA-F]{1,16}/attributes|version)")
_CONTENT_ERROR = (
    "detected disallowed custom content in v2store for stage --v2-deprecation=write-only")
_ENTRY_ERROR = "detected disallowed v2 WAL for stage --v2-deprecation=write-only"


class Verdict(NamedTuple):
    """Whether a version of etcd starts on the directory."""

    version: str
    reasons: Tuple[str, ...]        # why it does not; (): it starts
    keys: Tuple[str, ...] = ()      # of v2 that are to blame: all that the snapshot holds
    entries: Tuple[CommandEntry, ...] = ()      # of the log that are to blame

    @property
    def starts(self) -> bool:
        return not self.reasons


def verdicts(found: Inspection) -> List[Verdict]:
    return [_verdict(version, found) for version in _VERSIONS]


def _verdict(version: str, found: Inspection) -> Verdict:
    if version == "2.3":
        return Verdict(version, tuple(_reasons_of_2(found)))
    reasons = list(_reasons_of_3(version, found))
    keys = tuple(_custom_keys(found)) if version == "3.6" else ()
    entries = tuple(_custom_entries(version, found))
    if keys:
        reasons.append(f"{_CONTENT_ERROR}: {found.snapshot_name} holds {len(keys)} keys of v2")
    if entries and version == "3.6":
        reasons.append(f"{_ENTRY_ERROR}: {len(entries)} entries behind the snapshot are commands"
                       " of v2")
    elif entries:
        reasons.append(f"it reads no commands of v2, and {len(entries)} entries behind the"
                       " snapshot are some")
    return Verdict(version, tuple(reasons), keys, entries)


def _reasons_of_2(found: Inspection) -> Iterator[str]:
    if found.database is not None:
        yield f"{found.database.path} is a database of etcd 3"
    elif found.v3_entries:
        yield f"the log holds {found.v3_entries} entries of etcd 3"
    if found.cluster_version and version_key(found.cluster_version) > (2, 3):
        yield f"the cluster version is {found.cluster_version}"


def _reasons_of_3(version: str, found: Inspection) -> Iterator[str]:
    """What each etcd 3 wants: a database as new as the snapshot, and no newer cluster."""
    ours, cluster_version = version_key(version + ".0"), found.cluster_version
    if cluster_version and version_key(cluster_version) > ours:
        yield f"the cluster version is {cluster_version}, and etcd does not go back"
    database, snapshot = found.database, found.source.snapshot
    if database is not None and database.fault:
        yield f"the database is damaged: {database.fault}"
        return
    index = database.consistent_index if database is not None else 0
    if snapshot is not None and index < snapshot.index and not found.received_database:
        yield (f"failed to find database snapshot file: the snapshot is at index {snapshot.index},"
               f" {f'the database at {index}' if database else 'and there is no database'}")
    elif database is None and cluster_version and version_key(cluster_version) >= (3, 0):
        yield "database file of the backend is missing: member/snap/db"
    if database is not None and database.storage_version:
        if version_key(database.storage_version) > ours and ours >= (3, 6):
            yield f"the database has the schema of etcd {database.storage_version}"
    if version == "3.7" and snapshot is not None and not found.voters_recorded:
        yield ("the log does not name the voters at the snapshot: etcd 3.5 or 3.6 must write one"
               " first")


def _custom_keys(found: Inspection) -> Iterator[str]:
    """Yield what etcd 3.6 refuses in the snapshot: keys, and users and roles.

    The empty directories that the use of users leaves behind are refused by 3.6.0 only.
    """
    for path in found.snapshot_paths:
        if path.startswith("/1/") or re.match("/2/[^/]+/", path):
            yield _shown(path)


def _custom_entries(version: str, found: Inspection) -> Iterator[CommandEntry]:
    for entry in found.commands:
        request = entry.request
        is_meta = request.method == "PUT" and _META_COMMAND.fullmatch(request.path)
        if version == "3.7" or version == "3.6" and not is_meta:
            yield entry


# -- reports


def check_lines(found: Inspection) -> List[str]:
    """The report of `pyetcd check` for people."""
    lines = list(_facts(found))
    for verdict in verdicts(found):
        lines.append(f"etcd {verdict.version}:    {'starts' if verdict.starts else 'refuses'}")
        lines += [f"             {reason}" for reason in verdict.reasons]
        lines += [f"               {text}" for text in _blamed(verdict)]
    lines += [f"damage:      {fault}" for fault in found.faults]
    return [*lines, f"next:        {next_step(found)}"]


def _facts(found: Inspection) -> Iterator[str]:
    source, files = found.source, found.store.nodes_below("/1")
    keys = [node for _, node in files if node.children is None]
    in_log = sum(node.modified_index > found.snapshot_etcd_index for node in keys)
    left_out = len(source.entries) - source.committed
    yield f"directory:   {source.path}"
    yield f"identity:    member {source.member_id:x} of cluster {source.cluster_id:x}"
    yield (f"raft:        term {source.hard_state.term}, index {source.last.index};"
           f" {left_out} entries not known to be committed")
    yield (f"snapshot:    index {source.snapshot.index}, {found.snapshot_name}"
           if source.snapshot else "snapshot:    none")
    yield (f"log:         {len(found.segments)} segments; behind the snapshot"
           f" {len(found.commands)} commands of v2, {found.v3_entries} entries of v3,"
           f" {found.changes} changes of members")
    version = found.cluster_version
    yield f"cluster:     version {version or 'not decided'}, " + (", ".join(
        f"{member.name or '(unnamed)'}={','.join(member.peer_urls)} ({format_id(member.id)})"
        for member in sorted(found.cluster.members.values())) or "no members")
    yield (f"v2 keys:     {len(keys):,}: {len(keys) - in_log:,} in the snapshot, {in_log:,} in the"
           f" log; {sum(node.expires_ns > 0 for node in keys):,} with a time to live; etcd index"
           f" {found.store.current_index}")
    if found.database is not None:
        database = found.database
        yield (f"database:    consistent index {database.consistent_index}, {database.keys:,}"
               f" revisions of v3 keys, schema {database.storage_version or 'before 3.6'}")


def _blamed(verdict: Verdict) -> Iterator[str]:
    for blamed in (verdict.keys, list(map(entry_text, verdict.entries))):
        yield from blamed[:BLAMED_MAX]
        if len(blamed) > BLAMED_MAX:
            yield f"... and {len(blamed) - BLAMED_MAX:,} more: pyetcd dump names all"


def _shown(path: str) -> str:
    """A path as users know it: `/foo` for `/1/foo`."""
    return path[2:] if path.startswith("/1/") else path


def entry_text(entry: CommandEntry) -> str:
    return (f"entry {entry.index}: {entry.request.method} {_shown(entry.request.path)}"
            f"{'' if entry.committed else ' (not known to be committed)'}")


def next_step(found: Inspection) -> str:
    path = found.source.path
    if found.faults:
        return (f"replace the member from an intact one, or `pyetcd export {path}` to save what"
                " could be read")
    by_version = {verdict.version: verdict for verdict in verdicts(found)}
    if by_version["3.6"].keys or by_version["3.6"].entries:
        return (f"`pyetcd export {path} -format script` saves the keys for v3; then remove them"
                " and make a snapshot: docs/moving.md, \"Free a directory that blocks etcd 3.6\"")
    if not by_version["3.5"].starts and found.database is None:
        return (f"`pyetcd restore {path} -name NAME -data-dir NEW` makes a directory that etcd 3.4"
                " takes")
    if not by_version["3.7"].starts and by_version["3.6"].starts:
        return "start etcd 3.6 on it, and let it write a snapshot (--snapshot-count) before 3.7"
    return "nothing is in the way"


def check_json(found: Inspection) -> Dict[str, Any]:
    source, database = found.source, found.database
    return {
        "directory": source.path,
        "memberID": f"{source.member_id:x}", "clusterID": f"{source.cluster_id:x}",
        "term": source.hard_state.term, "commit": source.hard_state.commit,
        "lastIndex": source.last.index, "etcdIndex": found.store.current_index,
        "uncommittedEntries": len(source.entries) - source.committed,
        "snapshot": {"index": source.snapshot.index, "term": source.snapshot.term,
                     "file": found.snapshot_name} if source.snapshot else None,
        "snapshots": list(found.snapshot_files),
        "segments": [{"name": name, "bytes": size} for name, size in found.segments],
        "v2Entries": len(found.commands), "v3Entries": found.v3_entries,
        "memberChanges": found.changes,
        "clusterVersion": found.cluster_version,
        "members": [
            {"id": format_id(member.id), "name": member.name, "peerURLs": member.peer_urls,
             "clientURLs": member.client_urls}
            for member in sorted(found.cluster.members.values())],
        "v2Keys": sum(n.children is None for _, n in found.store.nodes_below("/1")),
        "database": database and {
            "fault": database.fault, "consistentIndex": database.consistent_index,
            "storageVersion": database.storage_version, "revisions": database.keys},
        "verdicts": [
            {"version": verdict.version, "starts": verdict.starts, "reasons": verdict.reasons,
             "keys": verdict.keys, "entries": [_entry_json(entry) for entry in verdict.entries]}
            for verdict in verdicts(found)],
        "damage": list(found.faults), "next": next_step(found),
    }


def _entry_json(entry: CommandEntry) -> Dict[str, Any]:
    return {"index": entry.index, "method": entry.request.method, "path": entry.request.path,
            "committed": entry.committed}


def dump_json(found: Inspection) -> Iterator[Dict[str, Any]]:
    """Yield an object per node of v2, users and roles too, then per command; no password."""
    for space in ("/1", "/2"):
        for path, node in found.store.nodes_below(space):
            entry = found.place(node.modified_index)
            row: Dict[str, Any] = {
                "key": _shown(path), "createdIndex": node.created_index,
                "modifiedIndex": node.modified_index, "place": "log" if entry else "snapshot",
            }
            if entry:
                row["entry"] = entry
            if node.expires_ns:
                row["expiration"] = format_time(node.expires_ns)
            if node.children is not None:
                row["dir"] = True
            elif not path.startswith("/2/users/"):
                row["value"] = node.value
            yield row
    for command in found.commands:
        yield {"entry": command.index, "method": command.request.method,
               "path": _shown(command.request.path), "committed": command.committed}


def dump_lines(found: Inspection) -> Iterator[str]:
    """Yield dump_json() for people, and for grep."""
    for row in dump_json(found):
        if "method" in row:
            note = "" if row["committed"] else " (not known to be committed)"
            yield f"entry {row['entry']}\t{row['method']} {row['path']}{note}"
            continue
        place = f"entry {row['entry']}" if "entry" in row else "snapshot"
        kind = "directory" if "dir" in row else json_text(_cut(row.get("value", "(hidden)")))
        expires = f"\texpires {row['expiration']}" if "expiration" in row else ""
        yield (f"{row['key']}\tindex {row['createdIndex']}/{row['modifiedIndex']}\t{place}"
               f"\t{kind}{expires}")


def _cut(value: str) -> str:
    return value if len(value) <= VALUE_CHARS_MAX else value[:VALUE_CHARS_MAX] + "..."
