"""vici, strongSwan's control protocol, as bytes (strongSwan: src/libcharon/plugins/vici/README.md). Pure.

A packet is its length (4 bytes, network byte order), its type, for some types a name, and a message. A message is a tree:
texts, lists of texts, and sections of the same by name, in order. A value may be any bytes; texts come back as texts where
they are UTF-8 and with surrogates where they are not.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias, Union

REQUEST, RESPONSE, UNKNOWN, REGISTER, UNREGISTER, CONFIRM, EVENT_UNKNOWN, EVENT = range(8)
"""Packet types."""

_NAMED = frozenset({REQUEST, REGISTER, UNREGISTER, EVENT})
_SECTION_START, _SECTION_END, _KEY_VALUE, _LIST_START, _LIST_ITEM, _LIST_END = range(1, 7)
_LENGTH = struct.Struct("!I")
_VALUE = struct.Struct("!H")
LIMIT = 512 << 10
"""Bytes of a packet, as charon has it."""

Value: TypeAlias = Union[str, Sequence[str], "Message"]
Message: TypeAlias = Mapping[str, Value]


def packet(kind: int, name: str = "", message: Message | None = None) -> bytes:
    """One packet, with its length."""
    head = bytes([kind]) + (_name(name) if kind in _NAMED else b"")
    body = head + b"".join(_encode(message or {}))
    return _LENGTH.pack(len(body)) + body


def take(buffer: bytearray) -> tuple[int, str, dict[str, Value]] | None:
    """Take the first packet out of `buffer`: type, name and message; None while it is not whole. Raises ValueError."""
    if len(buffer) < 4:
        return None
    (length,) = _LENGTH.unpack_from(buffer)
    if not 0 < length <= LIMIT:
        raise ValueError(f"a vici packet of {length} bytes")
    if len(buffer) < 4 + length:
        return None
    data = bytes(buffer[4 : 4 + length])
    del buffer[: 4 + length]
    try:
        name, offset = _read_name(data, 1) if data[0] in _NAMED else ("", 1)
        message, end = _decode(data, offset, nested=False)
    except (IndexError, struct.error):
        raise ValueError("a vici packet that ends too soon") from None
    if end != len(data):
        raise ValueError("a vici packet with something after its end")
    return data[0], name, message


def _name(name: str) -> bytes:
    data = _bytes(name)
    return bytes([len(data)]) + data


def _value(value: str) -> bytes:
    data = _bytes(value)
    return _VALUE.pack(len(data)) + data


def _bytes(text: str) -> bytes:
    return text.encode(errors="surrogateescape")


def _text(data: bytes) -> str:
    return data.decode(errors="surrogateescape")


def _encode(message: Message) -> Iterator[bytes]:
    for name, value in message.items():
        if isinstance(value, str):
            yield bytes([_KEY_VALUE]) + _name(name) + _value(value)
        elif isinstance(value, Mapping):
            yield bytes([_SECTION_START]) + _name(name)
            yield from _encode(value)
            yield bytes([_SECTION_END])
        else:
            yield bytes([_LIST_START]) + _name(name)
            for item in value:
                yield bytes([_LIST_ITEM]) + _value(item)
            yield bytes([_LIST_END])


def _read_name(data: bytes, offset: int) -> tuple[str, int]:
    end = offset + 1 + data[offset]
    if end > len(data):
        raise IndexError
    return _text(data[offset + 1 : end]), end


def _read_value(data: bytes, offset: int) -> tuple[str, int]:
    end = offset + 2 + _VALUE.unpack_from(data, offset)[0]
    if end > len(data):
        raise IndexError
    return _text(data[offset + 2 : end]), end


def _decode(data: bytes, offset: int, *, nested: bool) -> tuple[dict[str, Value], int]:
    message: dict[str, Value] = {}
    while nested or offset < len(data):
        kind = data[offset]
        if kind == _SECTION_END and nested:
            return message, offset + 1
        if kind not in {_SECTION_START, _KEY_VALUE, _LIST_START}:
            raise ValueError(f"a vici element of type {kind}")
        name, offset = _read_name(data, offset + 1)
        if kind == _SECTION_START:
            message[name], offset = _decode(data, offset, nested=True)
        elif kind == _KEY_VALUE:
            message[name], offset = _read_value(data, offset)
        else:
            message[name], offset = _read_list(data, offset)
    return message, offset


def _read_list(data: bytes, offset: int) -> tuple[list[str], int]:
    items = []
    while data[offset] == _LIST_ITEM:
        item, offset = _read_value(data, offset + 1)
        items.append(item)
    if data[offset] != _LIST_END:
        raise ValueError(f"a vici element of type {data[offset]} in a list")
    return items, offset + 1
