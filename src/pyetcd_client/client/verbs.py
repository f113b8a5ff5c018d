"""Verbs: the keys, members and status of a cluster."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any, Dict, List, Mapping, Optional, Union, overload

from ..transport.calls import (
    _NOT_GIVEN,
    _Call,
    _Caller,
    _conditions,
    _encode_fields,
    _Field,
    _keys_target,
    _text,
)
from ..transport.errors import EtcdValueError, KeyNotFound, NotFile
from ..transport.results import _T, EtcdResult, Node, _parse_result


class _Keys(_Caller):
    """The verbs of the keys API, but for those that wait.

    Everywhere `ttl` is in seconds, 1 or more, None for a key that stays; `timeout` is the deadline
    of this call, seconds over all endpoints: None for the client's `total_timeout`, math.inf for
    none, 0 to ask each endpoint once and wait for nothing but the answers (TRY_S in all).  A value
    is text, or a number, or bytes in UTF-8; EtcdValueError for what would not come back as
    it was given.  For other bytes there is base64.b64encode(data).decode(), for dicts json.dumps.
    """

    # -- reading

    @overload
    def get(self, key: str, *, recursive: bool = False, sorted: bool = False,
            quorum: bool = False, timeout: Optional[float] = None) -> EtcdResult: ...

    @overload
    def get(self, key: str, *, default: _T, recursive: bool = False, sorted: bool = False,
            quorum: bool = False, timeout: Optional[float] = None) -> Union[EtcdResult, _T]: ...

    def get(
        self, key: str, *, default: Any = _NOT_GIVEN, recursive: bool = False,
        sorted: bool = False, quorum: bool = False, timeout: Optional[float] = None,
    ) -> Any:
        """Return the node at `key`.  Raises KeyNotFound, unless there is a `default` to return.

        recursive  list a directory to all depths, not only its children
        sorted     order each level of a listing by key
        quorum     read through consensus: never stale, slower, fails without a quorum
        """
        query = {name: True for name, wanted in (
            ("recursive", recursive), ("sorted", sorted), ("quorum", quorum)) if wanted}
        try:
            return self._keys_call("GET", key, query=query, timeout=timeout)
        except KeyNotFound:
            if default is _NOT_GIVEN:
                raise
            return default

    def ls(
        self, key: str = "/", *, recursive: bool = False, quorum: bool = False,
        timeout: Optional[float] = None,
    ) -> List[Node]:
        """Return the visible nodes of a directory ordered by key; for a file, the file itself.

        recursive  every node below, parents before their children
        """
        node = self.get(
            key, recursive=recursive, sorted=True, quorum=quorum, timeout=timeout).node
        return list(node.walk()) if node.dir else [node]

    def __contains__(self, key: str) -> bool:
        """Whether `key` exists, as a file or a directory."""
        try:
            self.get(key)
        except KeyNotFound:
            return False
        return True

    def __getitem__(self, key: str) -> str:
        """The value of a file.  Raises KeyNotFound, a KeyError; NotFile for a directory."""
        node = self.get(key).node
        if node.dir:
            raise NotFile("Not a file", cause=node.key)
        return node.value or ""

    __iter__ = None                                 # else Python would ask for the keys 0, 1, 2

    # -- writing

    def set(
        self, key: str, value: object, ttl: Optional[int] = None, *,
        timeout: Optional[float] = None,
    ) -> EtcdResult:
        """Write a file, whether or not it exists; parents are created.

        A ttl that was set before does not last.  Raises NotFile for a directory.
        """
        return self._put(key, {"value": _text(value), "ttl": ttl}, timeout)

    def create(
        self, key: str, value: object, ttl: Optional[int] = None, *,
        timeout: Optional[float] = None,
    ) -> EtcdResult:
        """Write a file that must not exist yet.  Raises NodeExists."""
        return self._put(key, {"value": _text(value), "ttl": ttl, "prevExist": False}, timeout)

    @overload
    def update(self, key: str, value: object, ttl: Optional[int] = None, *,
               timeout: Optional[float] = None) -> EtcdResult: ...

    @overload
    def update(self, key: EtcdResult, *, timeout: Optional[float] = None) -> EtcdResult: ...

    def update(
        self, key: Union[str, EtcdResult], value: object = None, ttl: Optional[int] = None, *,
        timeout: Optional[float] = None,
    ) -> EtcdResult:
        """Write a file that must exist.  Raises KeyNotFound.

        Instead of key and value: a result, whose `value` and `ttl` you may have changed.  It is
        written if nobody else wrote the key since.  Raises CompareFailed.  A directory takes a
        new ttl; nothing is compared, as etcd cannot.
        """
        if isinstance(key, str):
            return self._put(key, {"value": _text(value), "ttl": ttl, "prevExist": True}, timeout)
        if key.dir:
            return self.write(key.key, key.value, key.ttl, dir=True, prevExist=True,
                              timeout=timeout)
        return self.write(key.key, key.value, key.ttl, prevExist=True,
                          prevIndex=key.modifiedIndex, timeout=timeout)

    def append(
        self, key: str, value: object, ttl: Optional[int] = None, *,
        timeout: Optional[float] = None,
    ) -> EtcdResult:
        """Create a file with the next name in directory `key`; names sort in order of creation.

        After an error with maybe_applied=True only a look at the directory tells whether the
        value is in: make values unique if that matters.
        """
        return self._keys_call("POST", key, {"value": _text(value), "ttl": ttl}, timeout=timeout)

    def refresh(
        self, key: str, ttl: int, *, prevValue: object = _NOT_GIVEN,
        prevIndex: object = _NOT_GIVEN, timeout: Optional[float] = None,
    ) -> EtcdResult:
        """Give an existing file a new ttl and leave its value; watchers are not told.

        Needs etcd 2.3: earlier ones do not know refresh and would empty the value.
        """
        conditions = _conditions(prevValue, prevIndex)
        fields: Dict[str, _Field] = {"ttl": ttl, "refresh": True, "prevExist": True}
        return self._put(key, {**fields, **conditions}, timeout)

    def compare_and_swap(
        self, key: str, value: object, *, prev_value: Optional[object] = None,
        prev_index: Optional[int] = None, ttl: Optional[int] = None,
        timeout: Optional[float] = None,
    ) -> EtcdResult:
        """Write a file if it has the given value and modified index.  Raises CompareFailed.

        At least one condition is needed.  The API cannot compare with an empty value.
        """
        fields: Dict[str, _Field] = {"value": _text(value), "ttl": ttl}
        return self._put(key, {**fields, **_needed(prev_value, prev_index)}, timeout)

    def test_and_set(
        self, key: str, value: object, prev_value: object, ttl: Optional[int] = None, *,
        timeout: Optional[float] = None,
    ) -> EtcdResult:
        """Write a file if it has the value `prev_value`.  Raises CompareFailed."""
        return self.compare_and_swap(
            key, value, prev_value=prev_value, ttl=ttl, timeout=timeout)

    def write(
        self, key: str, value: object, ttl: Optional[int] = None, dir: bool = False,
        append: bool = False, *, prevValue: object = _NOT_GIVEN, prevIndex: object = _NOT_GIVEN,
        prevExist: object = _NOT_GIVEN, refresh: bool = False, timeout: Optional[float] = None,
    ) -> EtcdResult:
        """Write in any of the ways above, chosen by python-etcd's options.

        value      None for none: of a directory, a refresh or, as for python-etcd, an empty file
        dir        make a directory; the value is None
        append     create a file with the next name in directory `key`
        prevValue  the value the file must have, and
        prevIndex  the modified index it must have; else CompareFailed
        prevExist  False: create only, else NodeExists.  True: update only, else KeyNotFound
        refresh    change only the ttl and tell no watcher; the value is None

        Raises EtcdValueError for a condition that is None: leave it out if there is none.
        """
        if dir and value:
            raise EtcdValueError("a directory has no value")
        given = None if value is None else _text(value)
        fields: Dict[str, _Field] = {
            "value": given, "ttl": ttl, "dir": bool(dir) or None,
            "refresh": bool(refresh) or None}
        conditions = _conditions(prevValue, prevIndex, prevExist)
        method = "POST" if append else "PUT"
        return self._keys_call(method, key, {**fields, **conditions}, timeout=timeout)

    # -- removing

    def delete(
        self, key: str, recursive: Optional[bool] = None, dir: Optional[bool] = None, *,
        prevValue: object = _NOT_GIVEN, prevIndex: object = _NOT_GIVEN,
        timeout: Optional[float] = None,
    ) -> EtcdResult:
        """Remove a file; with `dir` also an empty directory, with `recursive` also a full one.

        With prevValue or prevIndex: only a file that has them.  Raises CompareFailed.
        """
        query: Dict[str, _Field] = {"recursive": bool(recursive) or None, "dir": bool(dir) or None}
        query.update(_conditions(prevValue, prevIndex))
        return self._keys_call("DELETE", key, query=query, timeout=timeout)

    def pop(
        self, key: str, recursive: Optional[bool] = None, dir: Optional[bool] = None, *,
        prevValue: object = _NOT_GIVEN, prevIndex: object = _NOT_GIVEN,
        timeout: Optional[float] = None,
    ) -> EtcdResult:
        """Remove as `delete` does and return what was there."""
        gone = self.delete(key, recursive, dir, prevValue=prevValue, prevIndex=prevIndex,
                           timeout=timeout)
        return EtcdResult(node=gone.prev_node or gone.node, etcd_index=gone.etcd_index)

    def compare_and_delete(
        self, key: str, *, prev_value: Optional[object] = None,
        prev_index: Optional[int] = None, timeout: Optional[float] = None,
    ) -> EtcdResult:
        """Remove a file if it has the given value and modified index.  Raises CompareFailed."""
        return self._keys_call(
            "DELETE", key, query=_needed(prev_value, prev_index), timeout=timeout)

    # -- directories

    def mkdir(
        self, key: str, ttl: Optional[int] = None, *, timeout: Optional[float] = None,
    ) -> EtcdResult:
        """Create a directory that must not exist yet; with `ttl`, it expires with its content."""
        return self._put(key, {"dir": True, "ttl": ttl, "prevExist": False}, timeout)

    def rmdir(self, key: str, *, timeout: Optional[float] = None) -> EtcdResult:
        """Remove an empty directory (or a file, as etcd does).  Raises DirNotEmpty."""
        return self.delete(key, dir=True, timeout=timeout)

    # -- below: no public names

    def _put(
        self, key: str, form: Mapping[str, _Field], timeout: Optional[float] = None,
    ) -> EtcdResult:
        return self._keys_call("PUT", key, form, timeout=timeout)

    def _keys_call(
        self, method: str, key: str, form: Optional[Mapping[str, _Field]] = None, *,
        query: Mapping[str, _Field] = MappingProxyType({}), timeout: Optional[float] = None,
    ) -> EtcdResult:
        if form is not None and form.get("ttl") == 0:
            raise EtcdValueError("a ttl is seconds, 1 or more; None for a key that stays")
        target = _keys_target(key, query, self.key_endpoint)
        body = None if form is None else _encode_fields(form).encode()
        return self._perform(_Call(method, target, _parse_result, body, timeout=timeout,
                                   waits="wait" in query))


def _needed(prev_value: Optional[object], prev_index: Optional[int]) -> Dict[str, _Field]:
    """Return the conditions that are not None; raise EtcdValueError if both are."""
    if prev_value is None and prev_index is None:
        raise EtcdValueError("prev_value or prev_index is needed")
    return _conditions(_NOT_GIVEN if prev_value is None else prev_value,
                       _NOT_GIVEN if prev_index is None else prev_index)
