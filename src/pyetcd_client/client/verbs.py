"""Verbs of the keys API, except for those that wait."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, overload

from ..transport.calls import _Call, _Caller, _encode_fields, _Field, _target, _text, clean_key
from ..transport.errors import EtcdValueError, KeyNotFound, NotFile
from ..transport.results import _T, EtcdResult, Node, _parse_result

_NOT_GIVEN = object()       # default of conditions; None may be a mistake and is refused


def _conditions(prev_value: object, prev_index: object, prev_exist: object = _NOT_GIVEN,
                ) -> dict[str, _Field]:
    fields: dict[str, _Field] = {}
    if prev_value is None or prev_index is None or prev_exist is None:
        raise EtcdValueError("a condition is None: leave it out, or say what to compare with")
    if prev_value is not _NOT_GIVEN:
        fields["prevValue"] = _text(prev_value)
    if prev_index is not _NOT_GIVEN:
        # The server ignores prevIndex=0: the write would be unconditional.
        if isinstance(prev_index, int) and prev_index < 1:
            raise EtcdValueError("prev_index is a modified index, 1 or more")
        fields["prevIndex"] = _text(prev_index)
    if prev_exist is not _NOT_GIVEN:
        fields["prevExist"] = bool(prev_exist)
    return fields


def _keys_target(key: str, query: Mapping[str, _Field], endpoint: str) -> str:
    return _target(endpoint + clean_key(key), query)


class _Keys(_Caller):
    """The verbs of the keys API, except for those that wait.

    ttl      seconds, 1 or more; None: the key is permanent
    timeout  seconds for the call over all endpoints; None: the client's `total_timeout`; math.inf:
             no limit; 0: one attempt for each endpoint, TRY_S in all
    value    text, a number, or bytes in UTF-8; EtcdValueError for other values.  For other bytes
             use base64.b64encode(data).decode(), for dicts json.dumps
    """

    # -- reading

    @overload
    def get(self, key: str, *, recursive: bool = False, sorted: bool = False,
            quorum: bool = False, timeout: float | None = None) -> EtcdResult: ...

    @overload
    def get(self, key: str, *, default: _T, recursive: bool = False, sorted: bool = False,
            quorum: bool = False, timeout: float | None = None) -> EtcdResult | _T: ...

    def get(self, key: str, *, default: Any = _NOT_GIVEN, recursive: bool = False,
            sorted: bool = False, quorum: bool = False, timeout: float | None = None) -> Any:
        """Return the node at `key`.  If it is missing, return `default` or raise KeyNotFound.

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

    def ls(self, key: str = "/", *, recursive: bool = False, quorum: bool = False,
           timeout: float | None = None) -> list[Node]:
        """Return the visible nodes of a directory ordered by key; for a file, the file itself.

        recursive  list all depths, parents before their children
        """
        node = self.get(key, recursive=recursive, sorted=True, quorum=quorum, timeout=timeout).node
        return list(node.walk()) if node.dir else [node]

    def __contains__(self, key: str) -> bool:
        """Return whether `key` exists, as a file or a directory."""
        try:
            self.get(key)
        except KeyNotFound:
            return False
        return True

    def __getitem__(self, key: str) -> str:
        """Return the value of a file.  Raises KeyNotFound (a KeyError), NotFile."""
        node = self.get(key).node
        if node.dir:
            raise NotFile("Not a file", cause=node.key)
        return node.value or ""

    __iter__ = None                                 # else Python would read the keys 0, 1, 2...

    # -- writing

    def set(self, key: str, value: object, ttl: int | None = None, *,
            timeout: float | None = None) -> EtcdResult:
        """Write a file and its parent directories; an earlier ttl is dropped.  Raises NotFile."""
        return self._put(key, {"value": _text(value), "ttl": ttl}, timeout)

    def create(self, key: str, value: object, ttl: int | None = None, *,
               timeout: float | None = None) -> EtcdResult:
        """Write a file that must not exist.  Raises NodeExists."""
        return self._put(key, {"value": _text(value), "ttl": ttl, "prevExist": False}, timeout)

    @overload
    def update(self, key: str, value: object, ttl: int | None = None, *,
               timeout: float | None = None) -> EtcdResult: ...

    @overload
    def update(self, key: EtcdResult, *, timeout: float | None = None) -> EtcdResult: ...

    def update(self, key: str | EtcdResult, value: object = None, ttl: int | None = None, *,
               timeout: float | None = None) -> EtcdResult:
        """Write a file that must exist.  Raises KeyNotFound.

        A result in place of key and value: write its `value` and `ttl`.  Raises CompareFailed if
        the key has changed since it was read, except for a directory, which etcd cannot compare.
        """
        if isinstance(key, str):
            return self._put(key, {"value": _text(value), "ttl": ttl, "prevExist": True}, timeout)
        if key.dir:
            return self.write(key.key, key.value, key.ttl, dir=True, prevExist=True,
                              timeout=timeout)
        return self.write(key.key, key.value, key.ttl, prevExist=True,
                          prevIndex=key.modifiedIndex, timeout=timeout)

    def append(self, key: str, value: object, ttl: int | None = None, *,
               timeout: float | None = None) -> EtcdResult:
        """Create a file with the next name in directory `key`; names sort in order of creation.

        After an error with maybe_applied=True, look for the value in the directory; this needs
        unique values.
        """
        return self._keys_call("POST", key, {"value": _text(value), "ttl": ttl}, timeout=timeout)

    def refresh(self, key: str, ttl: int, *, prevValue: object = _NOT_GIVEN,
                prevIndex: object = _NOT_GIVEN, timeout: float | None = None) -> EtcdResult:
        """Give an existing file a new ttl without a change of its value, and without an event.

        Needs etcd 2.3: earlier versions ignore `refresh` and empty the value.
        """
        conditions = _conditions(prevValue, prevIndex)
        fields: dict[str, _Field] = {"ttl": ttl, "refresh": True, "prevExist": True}
        return self._put(key, {**fields, **conditions}, timeout)

    def compare_and_swap(self, key: str, value: object, *, prev_value: object | None = None,
                         prev_index: int | None = None, ttl: int | None = None,
                         timeout: float | None = None) -> EtcdResult:
        """Write a file if it has the given value and modified index.  Raises CompareFailed.

        At least one condition is needed.  The API cannot compare with an empty value.
        """
        fields: dict[str, _Field] = {"value": _text(value), "ttl": ttl}
        return self._put(key, {**fields, **_needed(prev_value, prev_index)}, timeout)

    def test_and_set(self, key: str, value: object, prev_value: object, ttl: int | None = None, *,
                     timeout: float | None = None) -> EtcdResult:
        """Write a file if it has the value `prev_value`.  Raises CompareFailed."""
        return self.compare_and_swap(key, value, prev_value=prev_value, ttl=ttl, timeout=timeout)

    def write(self, key: str, value: object, ttl: int | None = None, dir: bool = False,
              append: bool = False, *, prevValue: object = _NOT_GIVEN,
              prevIndex: object = _NOT_GIVEN, prevExist: object = _NOT_GIVEN, refresh: bool = False,
              timeout: float | None = None) -> EtcdResult:
        """Write in any of the ways above, with python-etcd's options.

        value      None for a directory, a refresh or (as in python-etcd) an empty file
        dir        create a directory
        append     create a file with the next name in directory `key`
        prevValue  the required value, and
        prevIndex  the required modified index; else CompareFailed
        prevExist  False: create only, else NodeExists.  True: update only, else KeyNotFound
        refresh    change only the ttl, without an event

        Raises EtcdValueError for a condition that is None: leave it out instead.
        """
        if dir and value:
            raise EtcdValueError("a directory has no value")
        given = None if value is None else _text(value)
        fields: dict[str, _Field] = {"value": given, "ttl": ttl, "dir": bool(dir) or None,
                                     "refresh": bool(refresh) or None}
        conditions = _conditions(prevValue, prevIndex, prevExist)
        method = "POST" if append else "PUT"
        return self._keys_call(method, key, {**fields, **conditions}, timeout=timeout)

    # -- removing

    def delete(self, key: str, recursive: bool | None = None, dir: bool | None = None, *,
               prevValue: object = _NOT_GIVEN, prevIndex: object = _NOT_GIVEN,
               timeout: float | None = None) -> EtcdResult:
        """Remove a file; with `dir` also an empty directory, with `recursive` any directory.

        prevValue and prevIndex are conditions, as in `write`.  Raises CompareFailed.
        """
        query: dict[str, _Field] = {"recursive": bool(recursive) or None, "dir": bool(dir) or None}
        query.update(_conditions(prevValue, prevIndex))
        return self._keys_call("DELETE", key, query=query, timeout=timeout)

    def pop(self, key: str, recursive: bool | None = None, dir: bool | None = None, *,
            prevValue: object = _NOT_GIVEN, prevIndex: object = _NOT_GIVEN,
            timeout: float | None = None) -> EtcdResult:
        """Remove as `delete` does and return the removed node."""
        gone = self.delete(key, recursive, dir, prevValue=prevValue, prevIndex=prevIndex,
                           timeout=timeout)
        return EtcdResult(node=gone.prev_node or gone.node, etcd_index=gone.etcd_index)

    def compare_and_delete(self, key: str, *, prev_value: object | None = None,
                           prev_index: int | None = None,
                           timeout: float | None = None) -> EtcdResult:
        """Remove a file if it has the given value and modified index.  Raises CompareFailed."""
        return self._keys_call(
            "DELETE", key, query=_needed(prev_value, prev_index), timeout=timeout)

    # -- directories

    def mkdir(self, key: str, ttl: int | None = None, *,
              timeout: float | None = None) -> EtcdResult:
        """Create a directory that must not exist; with `ttl` it expires with its content."""
        return self._put(key, {"dir": True, "ttl": ttl, "prevExist": False}, timeout)

    def rmdir(self, key: str, *, timeout: float | None = None) -> EtcdResult:
        """Remove an empty directory or, as in etcd, a file.  Raises DirNotEmpty."""
        return self.delete(key, dir=True, timeout=timeout)

    def _put(self, key: str, form: Mapping[str, _Field],
             timeout: float | None = None) -> EtcdResult:
        return self._keys_call("PUT", key, form, timeout=timeout)

    def _keys_call(self, method: str, key: str, form: Mapping[str, _Field] | None = None, *,
                   query: Mapping[str, _Field] = MappingProxyType({}),
                   timeout: float | None = None) -> EtcdResult:
        if form is not None and form.get("ttl") == 0:
            raise EtcdValueError("a ttl is seconds, 1 or more; None for a key that stays")
        target = _keys_target(key, query, self.key_endpoint)
        body = None if form is None else _encode_fields(form).encode()
        return self._perform(_Call(method, target, _parse_result, body, timeout=timeout,
                                   waits="wait" in query))


def _needed(prev_value: object | None, prev_index: int | None) -> dict[str, _Field]:
    if prev_value is None and prev_index is None:
        raise EtcdValueError("prev_value or prev_index is needed")
    return _conditions(_NOT_GIVEN if prev_value is None else prev_value,
                       _NOT_GIVEN if prev_index is None else prev_index)
