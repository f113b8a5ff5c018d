"""Cluster, apply: who the members are, and what entries do."""

from __future__ import annotations

import json
import logging

import pytest

import pyetcd
from pyetcd import Applier, Cluster, ConfChange, ConfChangeType, Request

_CLUSTER_NOW_NS = 1_700_000_000 * 10**9


# -- helpers -----------------------------------------------------------------


def _cluster_url(number):
    return f"http://10.0.0.{number}:2380"


def _cluster_of(*ids, removed=()):
    """A cluster with its members applied, its store and its applier."""
    store = pyetcd.Store()
    cluster = Cluster(store)
    cluster.id = 0xC1
    applier = Applier(store, cluster, 1, clock=lambda: _CLUSTER_NOW_NS)
    for id in (*ids, *removed):
        assert applier.apply_conf_change(_cluster_add(id)) is None
    for id in removed:
        assert applier.apply_conf_change(_cluster_change("remove", id)) is None
    return cluster, store, applier


def _cluster_change(kind, id, *urls):
    context = None if kind == "remove" else json.dumps({"id": id, "peerURLs": urls}).encode()
    types = {"add": ConfChangeType.ADD_NODE, "remove": ConfChangeType.REMOVE_NODE,
             "update": ConfChangeType.UPDATE_NODE}
    return ConfChange(1, types[kind], id, context)


def _cluster_add(id):
    return _cluster_change("add", id, _cluster_url(id))


def _cluster_state(cluster, store):
    """Everything that an invalid change must leave alone."""
    return store.save(), dict(cluster.members), set(cluster.removed)


def _apply_put(applier, path, value="v", **fields):
    return applier.apply_request(Request(id=9, method="PUT", path=path, val=value, **fields))


def _apply_publish(applier, id, name="m"):
    return _apply_put(
        applier, f"/0/members/{id:x}/attributes",
        json.dumps({"name": name, "clientURLs": [f"http://10.0.0.{id}:2379"]}),
    )


@pytest.fixture
def cluster_log(caplog):
    caplog.set_level(logging.INFO)
    return caplog
