"""Database files of etcd 3, read and written.  Source: bbolt's page.go, bucket.go, node.go."""

from __future__ import annotations

import contextlib
import itertools
import os
import struct
from typing import IO, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple

from ..base.limits import UINT64_MAX

PAGE_BYTES = 4_096                  # of the files that are written here
_PAGE_BYTES_MAX = 1 << 16
_DEPTH_MAX = 32                     # of a tree; one with 2^64 keys has less
_INLINE_BYTES_MAX = PAGE_BYTES // 4     # a bucket up to this size stands in its parent's page
_BRANCH, _LEAF, _META, _FREELIST = 1, 2, 4, 16      # kinds of pages
_BUCKET = 1                         # flag of a leaf element: its value is a bucket
_BOLT_MAGIC, _BOLT_VERSION = 0xED0CDAED, 2
_PAGE_HEAD = struct.Struct("<QHHI")         # id, kind, count of elements, overflow
_LEAF_ELEMENT = struct.Struct("<IIII")      # flags, position, key bytes, value bytes
_BRANCH_ELEMENT = struct.Struct("<IIQ")     # position, key bytes, page
_BUCKET_HEAD = struct.Struct("<QQ")         # root page (0: inline), sequence
_META_BODY = struct.Struct("<IIIIQQQQQ")    # magic, version, page size, flags, root page,
                                            # sequence, freelist page, pages, transaction
Items = Iterable[Tuple[bytes, bytes]]


class BoltError(Exception):
    """A file that is no intact database of etcd 3.  The text is one line."""


class _Meta(NamedTuple):
    page_bytes: int
    root: int
    pages: int
    transaction: int


def _checksum(data: bytes) -> int:
    """FNV-1a, 64 bits."""
    result = 0xCBF29CE484222325
    for byte in data:
        result = (result ^ byte) * 0x100000001B3 & UINT64_MAX
    return result


_BUCKET_NAMES = (                   # of etcd 3.0 to 3.4; later ones add theirs when they start
    b"alarm", b"auth", b"authRoles", b"authUsers", b"cluster", b"key", b"lease", b"members",
    b"members_removed", b"meta",
)


def v3_buckets(consistent_index: int) -> Dict[bytes, Items]:
    """Return the buckets of a member of etcd 3 without keys, up to date with a raft index."""
    return {
        **dict.fromkeys(_BUCKET_NAMES, ()),
        b"auth": [(b"authRevision", (1).to_bytes(8, "big"))],
        b"meta": [(b"consistent_index", consistent_index.to_bytes(8, "big"))],
    }


# -- reading


class BoltReader:
    """The buckets of a database file, as of its last complete transaction.

    Reads one page at a time, so a file of any size costs little memory.  The file may belong to
    a running member: its pages are replaced, never changed, until the next transactions.
    All methods raise BoltError and OSError.
    """

    def __init__(self, path: str, file: Optional[IO[bytes]] = None, start: int = 0) -> None:
        """Read `file`, if given, from `start` on; `path` names it in errors."""
        self.path = path
        self._file = file or open(path, "rb")
        self._start = start
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(self.close)
            self._meta = self._newest_meta()
            # What the file has: its head may name any number of 64 bits.
            self._whole_pages = (self._file.seek(0, os.SEEK_END) - start) // self._meta.page_bytes
            top = self._walk(self._meta.root)
            self._buckets = {name: value for flags, name, value in top if flags & _BUCKET}
            on_failure.pop_all()

    def __enter__(self) -> BoltReader:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def items(self, bucket: bytes) -> Iterator[Tuple[bytes, bytes]]:
        """Yield the keys and values of a bucket in the order of keys; nothing if it is absent."""
        value = self._buckets.get(bucket)
        if value is None:
            return
        if len(value) < _BUCKET_HEAD.size:
            raise self._damage(f"bucket {bucket!r} is cut")
        root, page = _BUCKET_HEAD.unpack_from(value)[0], value[_BUCKET_HEAD.size:]
        for _, key, content in self._walk(root) if root else self._leaf(page, "an inline bucket"):
            yield key, content

    def _newest_meta(self) -> _Meta:
        found = []
        sizes = (PAGE_BYTES, 1 << 13, 1 << 14, 1 << 15, _PAGE_BYTES_MAX)
        for offset in (0, *sizes):      # the second one stands one page behind the first
            self._file.seek(self._start + offset)
            data = self._file.read(_PAGE_HEAD.size + _META_BODY.size + 8)[_PAGE_HEAD.size:]
            if len(data) < _META_BODY.size + 8:
                continue
            body = data[:_META_BODY.size]
            magic, version, page, _, root, _, _, pages, number = _META_BODY.unpack(body)
            intact = _checksum(body) == int.from_bytes(data[_META_BODY.size:], "little")
            if magic == _BOLT_MAGIC and version == _BOLT_VERSION and intact and offset in (0, page):
                found.append(_Meta(page, root, pages, number))
        if not found or not 512 <= found[0].page_bytes <= _PAGE_BYTES_MAX:
            raise self._damage("it has no intact head: no database of etcd 3, or a damaged one")
        return max(found, key=lambda meta: meta.transaction)

    def _walk(self, root: int) -> Iterator[Tuple[int, bytes, bytes]]:
        """Yield (flags, key, value) of all leaves below a page."""
        waiting = [[root]]              # pages to come, of each level
        seen = 0
        while waiting:
            if not waiting[-1]:
                waiting.pop()
                continue
            page = waiting[-1].pop()
            kind, data = self._page(page)
            seen += 1
            if seen > self._whole_pages or len(waiting) > _DEPTH_MAX:
                raise self._damage("its pages form a circle")
            if kind == _LEAF:
                yield from self._leaf(data, f"page {page}")
            else:
                places = self._places(data, _BRANCH_ELEMENT.size, f"page {page}")
                elements = [_BRANCH_ELEMENT.unpack_from(data, at) for at in reversed(places)]
                waiting.append([child for _, _, child in elements])

    def _page(self, number: int) -> Tuple[int, bytes]:
        """Return the kind (branch or leaf) and all bytes of a page."""
        size = self._meta.page_bytes
        if not 2 <= number < self._meta.pages:
            raise self._damage(f"page {number} is none of its {self._meta.pages}")
        if number >= self._whole_pages:
            raise self._damage(f"the file ends before page {number}")
        self._file.seek(self._start + number * size)
        data = self._file.read(size)
        id, kind, _, overflow = _PAGE_HEAD.unpack_from(data)
        if id != number or kind not in (_BRANCH, _LEAF) or overflow >= self._whole_pages:
            raise self._damage(f"page {number} is damaged")
        if overflow:
            data += self._file.read(size * overflow)
        return kind, data

    def _leaf(self, data: bytes, what: str) -> Iterator[Tuple[int, bytes, bytes]]:
        for at in self._places(data, _LEAF_ELEMENT.size, what):
            flags, position, key_bytes, value_bytes = _LEAF_ELEMENT.unpack_from(data, at)
            key = at + position
            end = key + key_bytes + value_bytes
            if end > len(data):
                raise self._damage(f"{what} is damaged")
            yield flags, data[key:key + key_bytes], data[key + key_bytes:end]

    def _places(self, data: bytes, size: int, what: str) -> Sequence[int]:
        """Return the offsets of the elements of a page."""
        if len(data) < _PAGE_HEAD.size:
            raise self._damage(f"{what} is cut")
        count = _PAGE_HEAD.unpack_from(data)[2]
        end = _PAGE_HEAD.size + count * size
        if end > len(data):
            raise self._damage(f"{what} is damaged")
        return range(_PAGE_HEAD.size, end, size)

    def _damage(self, what: str) -> BoltError:
        return BoltError(f"{self.path}: {what}")


# -- writing


def write_bolt(file: IO[bytes], buckets: Dict[bytes, Items]) -> None:
    """Write a database with these buckets into an empty file.  Raises OSError.

    buckets  name -> items in ascending order of keys; they are taken one by one, so a bucket of
             any size costs the memory of one page, and of one key for each page
    """
    writer = _BoltWriter(file)
    rows = [(name, writer.bucket(items)) for name, items in sorted(buckets.items())]
    writer.finish(writer.tree(rows, _BUCKET))


class _BoltWriter:
    """Pages 0 and 1 are the heads and page 2 the empty free list; trees grow behind them."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._next = 3                  # page
        file.write(bytes(3 * PAGE_BYTES))

    def bucket(self, items: Items) -> bytes:
        """Write a bucket; return its value in the tree of buckets."""
        source = iter(items)
        first: List[Tuple[bytes, bytes]] = []
        size = _PAGE_HEAD.size
        for key, value in source:
            first.append((key, value))
            size += _LEAF_ELEMENT.size + len(key) + len(value)
            if size > _INLINE_BYTES_MAX:
                return _BUCKET_HEAD.pack(self.tree(itertools.chain(first, source), 0), 0)
        return _BUCKET_HEAD.pack(0, 0) + _leaf_page(0, first, 0)

    def tree(self, items: Items, flags: int) -> int:
        """Write the leaves, then each level of branches above them; return the root page."""
        level = [(chunk[0][0] if chunk else b"", self._write(_leaf_page(self._next, chunk, flags)))
                 for chunk in _chunks(items, _LEAF_ELEMENT.size)]
        while len(level) > 1:
            rows = ((key, page.to_bytes(8, "little")) for key, page in level)
            level = [(chunk[0][0], self._write(_branch_page(self._next, chunk)))
                     for chunk in _chunks(rows, _BRANCH_ELEMENT.size - 8)]
        return level[0][1]

    def finish(self, root: int) -> None:
        """Write the heads and the free list."""
        self._file.seek(0)
        for number in (0, 1):
            body = _META_BODY.pack(
                _BOLT_MAGIC, _BOLT_VERSION, PAGE_BYTES, 0, root, 0, 2, self._next, number)
            head = _PAGE_HEAD.pack(number, _META, 0, 0) + body
            self._file.write((head + _checksum(body).to_bytes(8, "little"))
                             .ljust(PAGE_BYTES, b"\0"))
        self._file.write(_PAGE_HEAD.pack(2, _FREELIST, 0, 0))
        self._file.seek(0, os.SEEK_END)

    def _write(self, page: bytes) -> int:
        number = self._next
        self._file.write(page.ljust(-(-len(page) // PAGE_BYTES) * PAGE_BYTES, b"\0"))
        self._next += -(-len(page) // PAGE_BYTES)
        return number


def _chunks(items: Items, element_bytes: int) -> Iterator[List[Tuple[bytes, bytes]]]:
    """Yield the items of each page in turn; one empty page if there are none."""
    chunk: List[Tuple[bytes, bytes]] = []
    size = _PAGE_HEAD.size
    for key, value in items:
        item_bytes = element_bytes + len(key) + len(value)
        if chunk and size + item_bytes > PAGE_BYTES:
            yield chunk
            chunk, size = [], _PAGE_HEAD.size
        chunk.append((key, value))
        size += item_bytes
    yield chunk


def _leaf_page(number: int, items: Sequence[Tuple[bytes, bytes]], flags: int) -> bytes:
    """Return a leaf; number 0: the page of an inline bucket."""
    rows = [((flags,), (len(key), len(value)), key + value) for key, value in items]
    return _page_of(number, _LEAF, _LEAF_ELEMENT, rows)


def _branch_page(number: int, items: Sequence[Tuple[bytes, bytes]]) -> bytes:
    """Return a branch; the values are page numbers in 8 bytes."""
    rows = [((), (len(key), int.from_bytes(page, "little")), key) for key, page in items]
    return _page_of(number, _BRANCH, _BRANCH_ELEMENT, rows)


def _page_of(
    number: int, kind: int, element: struct.Struct,
    rows: Sequence[Tuple[Tuple[int, ...], Tuple[int, ...], bytes]],
) -> bytes:
    """Return a page.

    rows  for each element its numbers before the position, its numbers behind that, its data
    """
    table: List[bytes] = []
    at = len(rows) * element.size       # from the place of the present element
    for before, behind, data in rows:
        table.append(element.pack(*before, at, *behind))
        at += len(data) - element.size
    body = b"".join(table + [data for _, _, data in rows])
    pages = -(-(_PAGE_HEAD.size + len(body)) // PAGE_BYTES) if number else 1
    return _PAGE_HEAD.pack(number, kind, len(rows), pages - 1) + body
