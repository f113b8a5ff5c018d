"""Codec, WAL, snapshots: recorded bytes, and every way to damage them."""

from __future__ import annotations

import contextlib
import os

import pytest

import pyetcd
from pyetcd import EntryID, Wal
from tests.kit.files import _wal_open, _wal_unpack

# -- snapshots ---------------------------------------------------------------------


def _snap_make(directory, *indexes):
    directory.mkdir(exist_ok=True)
    snapshotter = pyetcd.Snapshotter(str(directory))
    for index in indexes:
        snapshotter.save(pyetcd.Snapshot(b'{"at":%d}' % index, (1, 2), index, 2))
    return snapshotter


def test_snap_save_and_load(tmp_path):
    """The name is term and index; nothing temporary stays."""
    snapshot = _snap_make(tmp_path / "snap", 9, 10, 255).load()
    assert snapshot == pyetcd.Snapshot(b'{"at":255}', (1, 2), 255, 2)
    names = sorted(os.listdir(tmp_path / "snap"))
    assert names[-1] == "0000000000000002-00000000000000ff.snap" and len(names) == 3


@pytest.mark.parametrize("damage", [
    lambda data: data[:-1] + bytes([data[-1] ^ 1]), lambda data: data[:-5],
    lambda data: b"", lambda data: bytes(len(data)), lambda data: b"\x08\x00" + data[6:],
], ids=["flip", "cut", "empty", "zeros", "no crc"])
def test_snap_bad_file_is_set_aside_for_the_one_before(damage, tmp_path, wal_log):
    """Wrong checksum: renamed .broken, logged, and the older snapshot is used."""
    snapshotter = _snap_make(tmp_path / "snap", 5, 9)
    newest = tmp_path / "snap" / "0000000000000002-0000000000000009.snap"
    newest.write_bytes(damage(newest.read_bytes()))
    assert snapshotter.load().index == 5
    assert not newest.exists() and os.path.exists(f"{newest}.broken")
    assert f"renamed to {newest.name}.broken" in wal_log.text
    assert snapshotter.load().index == 5, "and it is not tried again"


def test_snap_every_flipped_byte_is_noticed(tmp_path):
    """The checksum covers all but the frame around it, and that is noticed too."""
    data = b"".join(pyetcd.encode_snapshot_parts(
        pyetcd.Snapshot(b'{"a":1}', (1, 2), 9, 2)))
    content = b"\x08%b\x12%b" % (
        pyetcd.encode_varint(pyetcd.crc32c(data)), pyetcd.encode_varint(len(data))) + data
    good = pyetcd.decode_snapshot_file(content)
    for offset in range(len(content)):
        for flip in (1, 2, 4, 8, 16, 32, 64, 128):
            damaged = bytearray(content)
            damaged[offset] ^= flip
            with contextlib.suppress(pyetcd.CodecError):
                assert pyetcd.decode_snapshot_file(bytes(damaged)) == good


def test_snap_file_unknown_to_the_log_is_passed_over(tmp_path, wal_log):
    """A file without its record in the log cannot be combined with it."""
    snapshotter = _snap_make(tmp_path / "snap", 5, 9)
    assert snapshotter.load({EntryID(2, 5)}).index == 5
    assert snapshotter.load(set()) is None
    assert "the log does not know it" in wal_log.text
    assert len(os.listdir(tmp_path / "snap")) == 2, "it is left alone"


def test_snap_foreign_and_half_written_files_do_not_matter(tmp_path, wal_log):
    """A crash during save leaves only a temporary name; purge removes it, an older one's."""
    snapshotter = _snap_make(tmp_path / "snap", 5)
    stale, growing = (
        tmp_path / "snap" / f"0000000000000002-000000000000000{index}.snap.tmp" for index in (4, 9)
    )
    stale.write_bytes(b"half"), growing.write_bytes(b"half")
    (tmp_path / "snap" / "note.txt").write_text("x")
    assert snapshotter.load().index == 5
    assert "skipped unexpected non snapshot file note.txt" in wal_log.text
    assert pyetcd.purge_files(str(tmp_path / "snap"), ".snap", 5) == [str(stale)]
    assert growing.exists()


def test_snap_purge_keeps_the_newest(tmp_path):
    """Oldest first, as many as there are too many."""
    _snap_make(tmp_path / "snap", 1, 2, 3, 4)
    removed = pyetcd.purge_files(str(tmp_path / "snap"), ".snap", 3)
    assert removed == [str(tmp_path / "snap" / "0000000000000002-0000000000000001.snap")]
    assert pyetcd.purge_files(str(tmp_path / "snap"), ".snap", 3) == []


# -- data directory ----------------------------------------------------------------


def test_datadir_fresh_has_layout_and_modes(tmp_path):
    """<data-dir>/member/{wal,snap}, all 0700, no probe file left."""
    paths = pyetcd.prepare_data_dir(str(tmp_path / "a" / "m.etcd"))
    assert paths.wal == str(tmp_path / "a/m.etcd/member/wal")
    for path in (paths.root, paths.member, paths.snap, paths.wal):
        assert os.stat(path).st_mode & 0o777 == 0o700
    assert sorted(os.listdir(paths.member)) == ["snap", "wal"] and os.listdir(paths.wal) == []
    assert not Wal.exists(paths.wal)
    assert pyetcd.prepare_data_dir(str(tmp_path / "a" / "m.etcd")) == paths


def test_datadir_separate_wal_directory(tmp_path):
    """-wal-dir moves the log only."""
    paths = pyetcd.prepare_data_dir(str(tmp_path / "m"), str(tmp_path / "fast" / "wal"))
    assert paths.wal == str(tmp_path / "fast" / "wal") and os.path.isdir(paths.wal)
    assert os.listdir(paths.member) == ["snap"]


@pytest.mark.parametrize("done", [0, 1, 2], ids=["untouched", "member made", "snap moved"])
def test_datadir_of_etcd_200_is_migrated_even_after_a_crash(done, tmp_path):
    """2.0.0 kept wal and snap at the top; half a migration must not look like a new member."""
    member = _wal_unpack("2.0.13", tmp_path)
    root = member.parent
    for name in ("wal", "snap"):
        os.rename(member / name, root / name)
    if done == 0:
        member.rmdir()
    elif done == 2:
        os.rename(root / "snap", member / "snap")
    paths = pyetcd.prepare_data_dir(str(root))
    assert sorted(os.listdir(root)) == ["member"]
    assert len(os.listdir(paths.snap)) == 2
    assert len(_wal_open(paths.wal).entries) == 124


@pytest.mark.parametrize(("make", "words"), [
    (lambda root: [os.makedirs(root / n) for n in ("member", "proxy")], "invalid datadir. Both"),
    (lambda root: root.write_bytes(b""), "error listing data dir"),
    (lambda root: (root.mkdir(), (root / "member").write_bytes(b"")), "cannot write to member"),
], ids=["both", "file", "member is a file"])
def test_datadir_unusable_is_one_line_that_says_what_to_do(make, words, tmp_path):
    """etcd's words, the path, and the way out."""
    root = tmp_path / "m.etcd"
    make(root)
    with pytest.raises(pyetcd.StartError) as caught:
        pyetcd.prepare_data_dir(str(root))
    assert words in str(caught.value) and str(root) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize(("name", "words"), [("member", "member"), ("member/wal", "WAL")])
def test_datadir_without_write_permission(name, words, tmp_path):
    """Which of the directories it is, is said."""
    paths = pyetcd.prepare_data_dir(str(tmp_path / "m"))
    target = os.path.join(paths.root, name)
    os.chmod(target, 0o500)
    try:
        with pytest.raises(pyetcd.StartError, match=f"cannot write to {words} directory"):
            pyetcd.prepare_data_dir(paths.root)
    finally:
        os.chmod(target, 0o700)


def test_datadir_wal_dir_that_is_a_file_is_named(tmp_path):
    """-wal-dir is meant, not the data directory."""
    (tmp_path / "wal").write_bytes(b"")
    with pytest.raises(pyetcd.StartError, match=r"cannot write to WAL directory.*wal"):
        pyetcd.prepare_data_dir(str(tmp_path / "m"), str(tmp_path / "wal"))


def test_datadir_foreign_files_are_named(tmp_path, wal_log):
    """A warning, as in etcd: perhaps an upgrade, perhaps the wrong directory."""
    (tmp_path / "lost").write_bytes(b"")
    pyetcd.prepare_data_dir(str(tmp_path))
    assert f"found invalid file/dir lost under data dir {tmp_path}" in wal_log.text
