"""The database's stream of JSON texts, one after another without anything between, and the notation of its values (RFC 7047)."""

from __future__ import annotations

import re
from typing import Any, TypeAlias

import msgspec

Row: TypeAlias = dict[str, Any]

_MARK = re.compile(rb'[{}"\\]')


class Splitter:
    """Cuts a stream of bytes into JSON objects."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._at = self._depth = 0
        self._text = False  # inside a string

    def feed(self, data: bytes) -> list[Any]:
        """The objects that are whole by now, decoded; raises msgspec.DecodeError for what is no JSON."""
        self._buffer += data
        found: list[Any] = []
        begin, at = 0, self._at
        while match := _MARK.search(self._buffer, at):
            at = match.end()
            mark = match[0]
            if mark == b"\\":
                if at == len(self._buffer):  # what it escapes has not come yet
                    at -= 1
                    break
                at += 1
            elif mark == b'"':
                self._text = not self._text
            elif not self._text:
                self._depth += 1 if mark == b"{" else -1
                if self._depth == 0:
                    found.append(msgspec.json.decode(self._buffer[begin:at]))
                    begin = at
        else:
            at = len(self._buffer)
        del self._buffer[:begin]
        self._at = at - begin
        return found


def as_map(value: Any) -> dict[Any, Any]:
    """A map column's value."""
    return dict(value[1]) if isinstance(value, list) and value[:1] == ["map"] else {}


def as_list(value: Any) -> list[Any]:
    """A set column's value; a set of one is written as that one."""
    if isinstance(value, list) and value[:1] == ["set"]:
        return list(value[1])
    return [value]


def uuids(value: Any) -> list[str]:
    """The rows that a column refers to."""
    return [each[1] for each in as_list(value)]


def to_map(values: dict[str, str]) -> list[Any]:
    """A map as the database reads it."""
    return ["map", [[key, value] for key, value in values.items()]]
