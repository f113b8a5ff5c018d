"""JSON and raft states as etcd's Go code prints them."""

from __future__ import annotations

import json
from typing import Any

from ..base.text import go_quote
from ..member.passwords import go_text
from ..raft.core import RaftRole

JSON_BYTES_MAX = 1 << 20            # of a body; above: 400
JSON_VALUES_MAX = 10_000            # of a body, counted by commas; above: 400
JSON_BRACKETS_MAX = 500             # of a body, a bound of its depth; above: 400


class GoJson:
    """A decoder of JSON in requests, with the error texts of Go's.  Raises ValueError."""

    _CONTEXTS = (
        ("Expecting property name", "looking for beginning of object key string"),
        ("Expecting ':'", "after object key"),
        ("Expecting ','", "after object key:value pair"),
        ("Extra data", "after top-level value"),
        ("Invalid control character", "in string literal"),
        ("Invalid \\", "in string escape code"),
        ("Illegal trailing comma", "looking for beginning of value"),
    )
    _TYPES = ((bool, "bool"), (str, "string"), (float, "number"), (list, "array"), (dict, "object"))

    @classmethod
    def loads(cls, data: bytes, *, partial: bool = False) -> Any:
        """Return the value in `data`; partial: ignore text after the first value.

        Numbers become floats.  Raises ValueError.  Differs from Go: a body with too many values,
        or nested too deeply, is refused before it is parsed, as it would stall all clients.
        """
        if len(data) > JSON_BYTES_MAX or data.count(b",") > JSON_VALUES_MAX:
            raise ValueError(f"more than {JSON_BYTES_MAX} bytes or {JSON_VALUES_MAX} values")
        if data.count(b"[") + data.count(b"{") > JSON_BRACKETS_MAX:
            raise ValueError("exceeded max depth")
        text = data.decode("utf-8", "replace").lstrip(" \t\r\n")
        decoder = json.JSONDecoder(parse_int=float, parse_constant=cls._refuse_constant)
        try:
            value, end = decoder.raw_decode(text)
        except json.JSONDecodeError as error:
            raise ValueError(cls._reason(text, error)) from None
        rest = text[end:].lstrip(" \t\r\n")
        if rest and not partial:
            raise ValueError(f"invalid character {cls._quoted(rest[0])} after top-level value")
        return value

    @classmethod
    def type_name(cls, value: object) -> str:
        """Return Go's word for the type of a decoded value; "" for null."""
        return next((name for kind, name in cls._TYPES if isinstance(value, kind)), "")

    @classmethod
    def string_member(cls, value: object, name: str) -> str:
        """Return member `name`, in any case, of an object; "" if absent.  Raises ValueError."""
        member = cls.member(value, name)
        if member is not None and not isinstance(member, str):
            raise ValueError(f"cannot unmarshal {cls.type_name(member)} into a string")
        return go_text(member or "")

    @classmethod
    def member(cls, value: object, name: str) -> Any:
        """Return member `name`, in any case, of an object or null.  Raises ValueError."""
        if value is None:
            return None
        if not isinstance(value, dict):
            raise ValueError(f"cannot unmarshal {cls.type_name(value)} into an object")
        found = [item for key, item in value.items() if key.lower() == name.lower()]
        return found[-1] if found else None

    @staticmethod
    def _refuse_constant(name: str) -> float:
        raise ValueError(f"invalid character {name[0]!r} looking for beginning of value")

    @staticmethod
    def _quoted(char: str) -> str:
        return {"'": r"'\''", '"': "'\"'"}.get(char) or f"'{go_quote(char)[1:-1]}'"

    @classmethod
    def _reason(cls, text: str, error: json.JSONDecodeError) -> str:
        """Return the words of Go for an error of Python's decoder."""
        at = error.pos
        literal = {"n": "null", "t": "true", "f": "false"}.get(text[at:at + 1])
        if error.msg == "Expecting value" and literal:
            for step, char in enumerate(literal):
                found = text[at + step:at + step + 1]
                if found and found != char:
                    return (
                        f"invalid character {cls._quoted(found)} in literal {literal}"
                        f" (expecting {cls._quoted(char)})"
                    )
            at = len(text)
        if error.msg.startswith("Invalid \\"):
            at += 1
        if at >= len(text) or error.msg.startswith("Unterminated"):
            return "unexpected end of JSON input"
        context = "looking for beginning of value"
        for start, words in cls._CONTEXTS:
            if error.msg.startswith(start):
                context = words
        return f"invalid character {cls._quoted(text[at])} {context}"


_STATE_NAMES = {RaftRole.FOLLOWER: "StateFollower", RaftRole.LEADER: "StateLeader"}


def raft_state_name(role: RaftRole) -> str:
    return _STATE_NAMES.get(role, "StateCandidate")
