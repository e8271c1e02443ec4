"""Messages of etcd's v3 JSON gateway, as far as we read them (etcd's rpc.proto and kv.proto).

msgspec reads base64 into `bytes` by itself; strict=False is for 64-bit numbers, which the gateway writes as strings.
"""

from __future__ import annotations

import msgspec

from wincey.store.kv import Entry


class StreamFault(msgspec.Struct, frozen=True):
    """The error within a streamed answer; servers differ in the field's name."""

    grpc_code: int = 0
    code: int = 0
    message: str = ""


class Header(msgspec.Struct, frozen=True):
    """Of every answer: the revision that the store was at."""

    revision: int = 0


class KeyValue(msgspec.Struct, frozen=True, gc=False):
    """A key as it stands, or (without a value) where only its name and revision were asked for. lease: "0" for none."""

    key: bytes
    value: bytes = b""
    create_revision: int = 0
    mod_revision: int = 0
    lease: str = "0"

    def entry(self) -> Entry:
        """The same in our words."""
        permanent = self.lease == "0"
        handle = "" if permanent else self.lease
        return Entry(key_text(self.key), self.value, self.mod_revision, self.create_revision, handle, permanent)


class RangeAnswer(msgspec.Struct, frozen=True):
    """To kv/range. more: `limit` cut it short."""

    header: Header = Header()
    kvs: list[KeyValue] = []
    more: bool = False


class DeleteAnswer(msgspec.Struct, frozen=True):
    """To a delete within a transaction, with what was deleted."""

    deleted: int = 0
    prev_kvs: list[KeyValue] = []


class Result(msgspec.Struct, frozen=True):
    """Of one request within a transaction."""

    response_range: RangeAnswer | None = None
    response_delete_range: DeleteAnswer | None = None


class TxnAnswer(msgspec.Struct, frozen=True):
    """To kv/txn. succeeded: the compares held."""

    header: Header
    succeeded: bool = False
    responses: list[Result] = []


class LeaseStatus(msgspec.Struct, frozen=True):
    """Of one lease: the seconds left (0 or less: there is no such lease) and the keys that hang on it."""

    TTL: int = 0
    keys: list[bytes] = []


class KeepAliveLine(msgspec.Struct, frozen=True):
    """To lease/keepalive."""

    result: LeaseStatus = LeaseStatus()
    error: StreamFault | None = None


class Event(msgspec.Struct, frozen=True):
    """One change. A deleted key has its name and the revision of its end, nothing more."""

    kv: KeyValue
    type: str = "PUT"


class WatchAnswer(msgspec.Struct, frozen=True):
    """One message of a watch: its creation, its end, events, or (with none of these) progress."""

    header: Header = Header()
    created: bool = False
    canceled: bool = False
    compact_revision: int = 0
    cancel_reason: str = ""
    events: list[Event] = []


class WatchLine(msgspec.Struct, frozen=True):
    """One line of the stream that a watch is."""

    result: WatchAnswer = WatchAnswer()
    error: StreamFault | None = None


RANGE = msgspec.json.Decoder(RangeAnswer, strict=False)
TXN = msgspec.json.Decoder(TxnAnswer, strict=False)
LEASE = msgspec.json.Decoder(LeaseStatus, strict=False)
KEEP_ALIVE = msgspec.json.Decoder(KeepAliveLine, strict=False)
WATCH = msgspec.json.Decoder(WatchLine, strict=False)


class Lines:
    """Cuts pieces of a stream into lines, without going twice over a long one."""

    def __init__(self) -> None:
        self._begun: list[bytes] = []

    def feed(self, piece: bytes) -> list[bytes]:
        """The lines that the piece completes."""
        *lines, rest = piece.split(b"\n")
        if lines:
            lines[0] = b"".join((*self._begun, lines[0]))
            self._begun.clear()
        self._begun.append(rest)
        return [line for line in lines if line]


def key_text(key: bytes) -> str:
    """The key as text; one that is no UTF-8 is foreign, and must not hide the others."""
    return key.decode("utf-8", "backslashreplace")
