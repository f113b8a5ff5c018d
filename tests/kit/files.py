"""Codec, WAL, snapshots: recorded bytes, and every way to damage them."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tarfile

import pytest

import pyetcd
from pyetcd import EntryID, Wal
from tests.kit.basics import TESTDATA

_WAL_FIRST = "0000000000000000-0000000000000000.wal"
_WAL_RECORDED = ["2.3.8", "2.0.13"]
_WAL_START = EntryID(0, 0)
_WAL_34 = "wal-3.4.23-single-member"
_REQUEST_FIELDS = {
    "ID": "id", "Method": "method", "Path": "path", "Val": "val", "Dir": "dir",
    "PrevValue": "prev_value", "PrevIndex": "prev_index", "PrevExist": "prev_exist",
    "Expiration": "expiration", "Wait": "wait", "Since": "since", "Recursive": "recursive",
    "Sorted": "sorted", "Quorum": "quorum", "Time": "time", "Stream": "stream",
    "Refresh": "refresh",
}


# -- helpers -----------------------------------------------------------------


def _wal_unpack(version, directory):
    """Unpack a recorded data directory; return its member directory."""
    with tarfile.open(TESTDATA / f"datadir-{version}.tar.gz") as archive:
        for member in archive.getmembers():
            if member.isfile():
                path = directory / member.name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(archive.extractfile(member).read())
    return directory / "fixture.etcd" / "member"


def _wal_lines(name):
    return [json.loads(line) for line in (TESTDATA / name).read_text().splitlines()]


def _wal_decode(name, data, crc=0):
    """Return [(offset, record)] of one file."""
    decoder = pyetcd.WalDecoder(name, data, crc)
    return [(decoder.end, record) for record in decoder]


def _codec_check_entry(entry, line):
    """Compare an entry with its line, and its payload both ways."""
    assert (entry.type, entry.term, entry.index) == (line["Type"], line["Term"], line["Index"])
    if line.get("Request"):
        request = pyetcd.decode_request(entry.data)
        shown = {key: getattr(request, name) for key, name in _REQUEST_FIELDS.items()}
        assert {key: value for key, value in shown.items() if value is not None} == line["Request"]
        assert pyetcd.encode_request(request) == entry.data
    elif line.get("ConfChange"):
        change = pyetcd.decode_conf_change(entry.data)
        wanted = line["ConfChange"]
        assert (change.id, change.type, change.node_id, change.context.decode()) == (
            wanted["ID"], wanted["Type"], wanted["NodeID"], wanted["Context"])
        assert pyetcd.encode_conf_change(change) == entry.data
    else:
        assert entry.data == b""


def _wal_request(index):
    request = pyetcd.Request(id=index, method="PUT", path="/1/key", val=f"value {index}")
    return pyetcd.encode_request(request)


def _wal_open(directory, start=_WAL_START):
    """Open, close, and return the contents."""
    wal, contents = Wal.open(str(directory), start)
    wal.close()
    return contents


def _wal_other_process_gets(path):
    """Tell whether another process can lock the file."""
    script = (
        "import fcntl, sys\n"
        "with open(sys.argv[1], 'r+b') as file:\n"
        "    try: fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
        "    except OSError: sys.exit(9)\n"
    )
    code = subprocess.run([sys.executable, "-c", script, str(path)], check=False).returncode
    assert code in (0, 9)
    return code == 0


@pytest.fixture
def wal_log(caplog):
    caplog.set_level(logging.INFO)
    return caplog
