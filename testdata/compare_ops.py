#!/usr/bin/env python3
"""Replay the requests to everything but the keys, and tell how the answers differ from the recording.

usage: compare_ops.py [--only ID,...] CLIENT_HOST:PORT/PEER_HOST:PORT...

Names one member or several; the first is target 0 of the cases.  Exit status 0 when every answer matches.

The cases of ops-cases.jsonl stand in groups: each environment (`single`, `cors`, `three`) and each case
marked `fresh` begins one, and wants servers of its own.  A case's `{C0}`, `{P0}`, `{ID0}` stand for client
address, peer address and id of member 0, `{CLUSTER}` for the cluster id; `capture` defines more.
"""
import contextlib
import http.client
import json
import os
import re
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
NAMES = {"single": ["node1"], "cors": ["node1"], "three": ["n1", "n2", "n3"]}   # members of an environment
CORS = "http://a.example,http://b.example"              # the -cors of the environment of that name
HEADERS = {
    "content-type", "allow", "location", "x-etcd-cluster-id", "x-etcd-index",
    "access-control-allow-methods", "access-control-allow-origin", "access-control-allow-headers",
    "x-content-type-options",
}
CHANGE_SECONDS = 5      # that a change takes at most to reach a member, where a case sleeps


def load(name):
    with open(os.path.join(HERE, name), encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def groups():
    """[(environment, cases)]: each group has servers of its own."""
    found = []
    for case in load("ops-cases.jsonl"):
        if not found or case["env"] != found[-1][0] or case.get("fresh"):
            found.append((case["env"], []))
        found[-1][1].append(case)
    return found


def key_tree(value):
    """The shape of a JSON value: names and types."""
    if isinstance(value, dict):
        return {name: key_tree(item) for name, item in value.items()}
    if isinstance(value, list):
        return [key_tree(value[0])] if value else []
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return "number"
    return type(value).__name__


class Replay:
    """A formed cluster that is asked, and what its addresses and ids are called.

    members  [(client host:port, peer host:port)], member 0 first
    """

    def __init__(self, members):
        self.clients = [client for client, _ in members]
        status, headers, body = self.call(self.clients[0], "GET", "/v2/members")
        assert status == 200, body
        ids = {url: member["id"] for member in json.loads(body)["members"]
               for url in member["peerURLs"]}
        self.names = {"CLUSTER": dict(headers)["X-Etcd-Cluster-Id"]}
        for number, (client, peer) in enumerate(members):
            self.names.update({f"C{number}": client, f"P{number}": peer,
                               f"ID{number}": ids[f"http://{peer}"]})

    @staticmethod
    def call(address, method, path, body=None, headers=None):
        """Return (status, headers as pairs, body as text)."""
        connection = http.client.HTTPConnection(address, timeout=20)
        with contextlib.closing(connection):
            connection.request(method, path, body=body, headers=headers or {})
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read().decode("utf-8", "replace")

    def address(self, target):
        """host:port of a case's target."""
        if target in ("leader", "follower"):
            wanted = "StateLeader" if target == "leader" else "StateFollower"
            return next(address for address in self.clients if
                        json.loads(self.call(address, "GET", "/v2/stats/self")[2])["state"] == wanted)
        return self.names[f"P{target[4:]}" if target.startswith("peer") else f"C{target}"]

    def fill_in(self, text):
        """Replace the names in a case by what they stand for."""
        return re.sub(r"\{([A-Z][A-Z0-9_]*)\}", lambda name: self.names[name[1]], text)

    def take_out(self, text):
        """Replace what the names stand for by the names, as the recording has it."""
        for name, value in sorted(self.names.items(), key=lambda item: -len(item[1])):
            text = text.replace(value, f"{{{name}}}")
        return text

    def ask(self, case):
        """Send a case's request; return (status, kept headers, body), with names in them."""
        body = case.get("body")
        status, headers, text = self.call(
            self.address(case.get("target", "0")), case["method"], self.fill_in(case["path"]),
            None if body is None else self.fill_in(body).encode(),
            {k: self.fill_in(v) for k, v in (case.get("headers") or {}).items()})
        for name, path in (case.get("capture") or {}).items():
            self.names[name] = json.loads(text)[path]
        kept = {name.lower(): self.take_out(value) for name, value in headers
                if name.lower() in HEADERS}
        if case.get("drop_index"):
            kept.pop("x-etcd-index", None)
        return status, kept, self.take_out(text)

    def difference(self, case, recorded):
        """What the answer has else than the recorded one, as text; "" if they are equal."""
        status, headers, body = self.ask(case)
        wanted = recorded["response"]
        found = []
        if (status, headers) != (wanted["status"], wanted["headers"]):
            found.append(f"{status} {headers} instead of {wanted['status']} {wanted['headers']}")
        kind = case.get("compare", "exact")
        if kind == "exact" and body != wanted["body"]:
            found.append(f"{body!r} instead of {wanted['body']!r}")
        if kind == "keys" and key_tree(json.loads(body)) != wanted["keytree"]:
            found.append(f"members of {body}")
        found += [f"{text!r} missing" for text in case.get("must_contain", ())
                  if text not in self.fill_in(body)]
        return "; ".join(found)

    def run(self, cases):
        """Return {case id: difference} of the cases that differ, asked in their order."""
        recorded = {row["id"]: row for row in load("ops-etcd-2.3.8.jsonl")}
        different = {}
        for case in cases:
            row = recorded[case["id"]]
            found = self.difference(case, row)
            deadline = time.monotonic() + CHANGE_SECONDS
            while found and "sleep" in case and time.monotonic() < deadline:
                time.sleep(0.02)
                found = self.difference(case, row)
            if found:
                different[case["id"]] = found
        return different


def main(argv):
    only = None
    if argv[:1] == ["--only"]:
        only, argv = set(argv[1].split(",")), argv[2:]
    if not argv:
        sys.stderr.write(__doc__)
        return 2
    replay = Replay([tuple(arg.split("/")) for arg in argv])
    environment = "three" if len(argv) == 3 else "single"
    cases = next(cases for name, cases in groups() if name == environment)
    different = replay.run([case for case in cases if only is None or case["id"] in only])
    for name, text in different.items():
        print(f"{name}: {text}")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
