"""A netlink socket for rtnetlink, and the framing of its messages (RFC 3549; kernel: Documentation/userspace-api/netlink).

The kernel carries out a request while it is being sent: when `send` returns, every acknowledgement is already in our
receive buffer, and each `recv` of a dump makes the kernel write the next part. So the socket never has to wait, is
non-blocking, and a reply that is missing is a reply that was lost for want of buffer space.

Changes travel in batches of up to 4,096 messages in one send. Only the last asks for an acknowledgement: the kernel
reports an error for any message without being asked, and tells the message by its sequence number. When replies were lost
the batch is sent again in halves, which is right because each of our changes may be repeated.
"""

from __future__ import annotations

import array
import errno
import os
import socket
import struct
from collections.abc import Iterable, Iterator, Sequence

import msgspec

NLM_F_REQUEST = 0x1
NLM_F_ACK = 0x4
NLM_F_DUMP_INTR = 0x10
NLM_F_DUMP = 0x300
NLM_F_REPLACE = 0x100
NLM_F_EXCL = 0x200
NLM_F_CREATE = 0x400

_NLM_F_CAPPED = 0x100
_NLM_F_ACK_TLVS = 0x200
_NLMSG_ERROR = 2
_NLMSG_DONE = 3
_NLMSGERR_ATTR_MSG = 1

_SOL_NETLINK = 270
_NETLINK_CAP_ACK = 10
_NETLINK_EXT_ACK = 11
_NETLINK_GET_STRICT_CHK = 12
_SO_ATTACH_FILTER = 26
_SO_SNDBUFFORCE = 32
_SO_RCVBUFFORCE = 33

_BUFFER = 8 << 20  # room for an error, with its bookkeeping, for each message of a batch
_DATAGRAM = 1 << 16  # dumps come in parts of at most 32 KiB
_DUMP_ATTEMPTS = 5

BATCH_MESSAGES = 4096
BATCH_BYTES = 512 << 10

HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence number, port id
_ATTRIBUTE = struct.Struct("=HH")
_SEQUENCE = struct.Struct("=I")
_FLAGS = struct.Struct("=H")
_CODE = struct.Struct("=i")

MALFORMED = (struct.error, LookupError, ValueError)
"""What the decoders of messages raise for one that is cut short or otherwise none of the kernel's."""

Message = tuple[int, bytes, int, int]
"""A received message: its type, the datagram, and where in it the body starts and ends."""


class Refusal(msgspec.Struct, frozen=True):
    """The kernel's answer to a message that it did not carry out. `words`: its extended acknowledgement, often ""."""

    errno: int
    words: str = ""

    def __str__(self) -> str:
        text = os.strerror(self.errno)
        return f"{text}: {self.words.rstrip('.')}" if self.words else text


class NetlinkError(OSError):
    """A single request or a dump was refused; has `errno` and, as its text, the kernel's own words."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.errno, str(refusal))
        self.refusal = refusal


class _RepliesLost(Exception):
    """The receive buffer was too small for the answers."""


def attribute(kind: int, value: bytes) -> bytes:
    """One attribute, padded to 4 bytes."""
    return _ATTRIBUTE.pack(len(value) + 4, kind) + value + bytes(-len(value) % 4)


def attributes(data: bytes, offset: int, end: int) -> dict[int, bytes]:
    """All attributes between two offsets by their type (nesting and byte order flags removed); the last of a type wins."""
    found = {}
    while offset + 4 <= end:
        length, kind = _ATTRIBUTE.unpack_from(data, offset)
        if length < 4:
            break
        found[kind & 0x3FFF] = data[offset + 4 : offset + length]
        offset += (length + 3) & ~3
    return found


def message(kind: int, flags: int, body: bytes) -> bytes:
    """A request; `Netlink` fills in the sequence number."""
    return HEADER.pack(len(body) + 16, kind, flags | NLM_F_REQUEST, 0, 0) + body


def messages(datagrams: Iterable[bytes]) -> Iterator[Message]:
    """Every message of some datagrams."""
    unpack = HEADER.unpack_from
    for data in datagrams:
        offset, size = 0, len(data)
        while offset + 16 <= size:
            length, kind, _, _, _ = unpack(data, offset)
            if length < 16:
                break
            yield kind, data, offset + 16, offset + length
            offset += (length + 3) & ~3


def batches(requests: Sequence[bytes]) -> Iterator[range]:
    """Cut requests into runs of indices, each of which goes into one send."""
    start = size = 0
    for index, request in enumerate(requests):
        if index - start == BATCH_MESSAGES or size + len(request) > BATCH_BYTES:
            yield range(start, index)
            start, size = index, 0
        size += len(request)
    if start < len(requests):
        yield range(start, len(requests))


class Netlink:
    """A netlink socket, of NETLINK_ROUTE unless told otherwise. strict: let the kernel filter dumps by what the request's
    body says (Linux 5.0)."""

    def __init__(
        self, groups: Sequence[int] = (), *, strict: bool = True, protocol: int = socket.NETLINK_ROUTE
    ) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        try:
            self._socket.setblocking(False)
            self._grow(_SO_SNDBUFFORCE, socket.SO_SNDBUF)
            self._grow(_SO_RCVBUFFORCE, socket.SO_RCVBUF)
            for option in (_NETLINK_CAP_ACK, _NETLINK_EXT_ACK, *([_NETLINK_GET_STRICT_CHK] if strict else ())):
                self._set(option, 1)
            mask = sum(1 << (group - 1) for group in groups)
            self._socket.bind((0, mask))
        except BaseException:
            self._socket.close()
            raise
        self.port: int = self._socket.getsockname()[0]
        self._sequence = 0

    def _grow(self, force: int, plain: int) -> None:
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, force, _BUFFER)
        except PermissionError:  # inside a user namespace: what net.core.rmem_max and wmem_max allow
            self._socket.setsockopt(socket.SOL_SOCKET, plain, _BUFFER)

    def _set(self, option: int, value: int) -> None:
        try:
            self._socket.setsockopt(_SOL_NETLINK, option, value)
        except OSError as error:
            if error.errno != errno.ENOPROTOOPT:  # an older kernel: we then get less text, or more to filter ourselves
                raise

    def fileno(self) -> int:
        """The descriptor, for an event loop."""
        return self._socket.fileno()

    def close(self) -> None:
        """Release the descriptor."""
        self._socket.close()

    def receive(self) -> bytes | None:
        """The next datagram of a subscribed group, None when there is none yet; OSError ENOBUFS when some were lost."""
        try:
            return self._socket.recv(_DATAGRAM)
        except BlockingIOError:
            return None

    def attach_filter(self, program: Sequence[tuple[int, int, int, int]]) -> None:
        """Have the kernel run a classic BPF program over each datagram and drop those it returns 0 for."""
        code = b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
        buffer = array.array("B", code)  # struct sock_fprog points at it
        self._socket.setsockopt(
            socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HP", len(program), buffer.buffer_info()[0])
        )

    def request(self, request: bytes) -> Message:
        """Send a request that is answered by one message; raises NetlinkError."""
        first = self._send([request])
        for data in self._replies():
            for kind, flags, sequence, start, end in _frames(data):
                if sequence != first:
                    continue
                if kind == _NLMSG_ERROR:
                    raise NetlinkError(
                        _refusal(data, flags, start, end) or Refusal(errno.EPROTO, "no answer but success")
                    )
                return kind, data, start, end
        raise NetlinkError(Refusal(errno.ENOBUFS))

    def dump(self, kind: int, body: bytes) -> list[bytes]:
        """All datagrams of a dump. One that the kernel marks as interrupted by a change is repeated a few times.

        Older kernels ignore what the body says beyond the family, so what comes back must be filtered again.
        """
        request = message(kind, NLM_F_DUMP, body)
        for _ in range(_DUMP_ATTEMPTS):
            try:
                datagrams, whole = self._dump(request)
            except NetlinkError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._set(_NETLINK_GET_STRICT_CHK, 0)  # a kernel that knows the option but not this filter
                datagrams, whole = self._dump(request)
            if whole:
                break
        return datagrams

    def transact(self, requests: Sequence[bytes]) -> dict[int, Refusal]:
        """Send changes, all in one send, and return the refused ones by their index."""
        last = len(requests) - 1
        try:
            first = self._send(requests)
            refused: dict[int, Refusal] = {}
            for data in self._replies():
                for kind, flags, sequence, start, end in _frames(data):
                    index = (sequence - first) & 0xFFFFFFFF
                    if kind != _NLMSG_ERROR or index > last:
                        continue
                    if refusal := _refusal(data, flags, start, end):
                        refused[index] = refusal
                    if index == last:
                        return refused
        except _RepliesLost:
            pass
        if not last:
            return {0: Refusal(errno.ENOBUFS)}
        middle = len(requests) // 2
        rest = {index + middle: refusal for index, refusal in self.transact(requests[middle:]).items()}
        return self.transact(requests[:middle]) | rest

    def _send(self, requests: Sequence[bytes]) -> int:
        """Send requests with fresh sequence numbers and return the first of these; the last is to be acknowledged."""
        buffer = bytearray(b"".join(requests))
        first = self._sequence = (self._sequence + 1) & 0xFFFFFFFF
        offset = last = 0
        for sequence, request in enumerate(requests, first):
            _SEQUENCE.pack_into(buffer, offset + 8, sequence & 0xFFFFFFFF)
            last, offset = offset, offset + len(request)
        self._sequence += len(requests)
        flags = _FLAGS.unpack_from(buffer, last + 6)[0]
        if flags & NLM_F_DUMP != NLM_F_DUMP:
            _FLAGS.pack_into(buffer, last + 6, flags | NLM_F_ACK)
        self._socket.sendmsg([buffer])
        return first

    def _replies(self) -> Iterator[bytes]:
        """What has been answered by now; raises _RepliesLost when there was no room for some of it."""
        while True:
            try:
                yield self._socket.recv(_DATAGRAM)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                self._drain()
                raise _RepliesLost from None

    def _drain(self) -> None:
        while True:
            try:
                self._socket.recv(_DATAGRAM)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise

    def _dump(self, request: bytes) -> tuple[list[bytes], bool]:
        first = self._send([request])
        datagrams = [data for data in self._replies() if HEADER.unpack_from(data, 0)[3] == first]
        # A change during the dump is told in the first message of the part after it, or in the message that ends all.
        interrupted = any(HEADER.unpack_from(data, 0)[2] & NLM_F_DUMP_INTR for data in datagrams)
        for kind, flags, _, start, end in _frames(datagrams[-1] if datagrams else b""):
            if kind in (_NLMSG_ERROR, _NLMSG_DONE):
                code = _CODE.unpack_from(datagrams[-1], start)[0]
                if code < 0:
                    words = _words(datagrams[-1], flags, start, end) if kind == _NLMSG_ERROR else ""
                    raise NetlinkError(Refusal(-code, words))
                return datagrams, not (interrupted or flags & NLM_F_DUMP_INTR)
        raise NetlinkError(Refusal(errno.ENOBUFS))


def _frames(data: bytes) -> Iterator[tuple[int, int, int, int, int]]:
    offset = 0
    while offset + 16 <= len(data):
        length, kind, flags, sequence, _ = HEADER.unpack_from(data, offset)
        if length < 16:
            return
        yield kind, flags, sequence, offset + 16, offset + length
        offset += (length + 3) & ~3


def _refusal(data: bytes, flags: int, start: int, end: int) -> Refusal | None:
    """Read an NLMSG_ERROR's body; None for a plain acknowledgement."""
    code = _CODE.unpack_from(data, start)[0]
    return Refusal(-code, _words(data, flags, start, end)) if code else None


def _words(data: bytes, flags: int, start: int, end: int) -> str:
    """The text of an extended acknowledgement."""
    if not flags & _NLM_F_ACK_TLVS:
        return ""
    # After the error comes the request's header, and its body too unless the kernel says that it left it out.
    length = HEADER.unpack_from(data, start + 4)[0]
    offset = start + 4 + (16 if flags & _NLM_F_CAPPED else (length + 3) & ~3)
    return attributes(data, offset, end).get(_NLMSGERR_ATTR_MSG, b"").rstrip(b"\0").decode(errors="replace")
