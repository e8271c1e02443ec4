"""ICMP echo (RFC 792, RFC 4443): whether an address answers, how soon, and how large a packet gets there whole.

A raw socket for each family and source address; a request is told from others by its identifier, its number and a random
token in its data. Packets are sent with DF and without regard to what the kernel believes of the path's MTU
(IP_PMTUDISC_PROBE), so that the path itself answers. Who drops a packet in the path may say so (ICMP unreachable, too big);
that counts, but is not needed: silence is an answer as well.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
import time

import msgspec

from wincey.model.address import Address, family_of, format_address
from wincey.model.checksum import checksum

IP_MTU_DISCOVER, IP_PMTUDISC_PROBE = 10, 3
IPV6_MTU_DISCOVER, IPV6_PMTUDISC_PROBE = 23, 3

_HEADER = struct.Struct("!BBHHH")  # type, code, checksum, identifier, number
_TOKEN = 8
_AT_ONCE = 16
SMALL = 56
"""Bytes of data in an ordinary request, as ping sends it."""


class Answer(msgspec.Struct, frozen=True):
    """What became of a request. rtt: seconds, None without an echo reply.

    refusal: what somebody in the path (or the kernel) said instead, "" for silence. mtu: that of the hop which found the
    packet too big, if it says so. by: who answered.
    """

    rtt: float | None = None
    refusal: str = ""
    mtu: int | None = None
    by: Address | None = None


class Family(msgspec.Struct, frozen=True):
    """What differs between ICMP and ICMPv6. header: bytes of the IP header; refusals: (type, code) and their meaning."""

    protocol: int
    request: int
    reply: int
    too_big: tuple[int, int]
    unreachable: int
    header: int


_V4 = Family(socket.IPPROTO_ICMP, 8, 0, (3, 4), 3, 20)
_V6 = Family(socket.IPPROTO_ICMPV6, 128, 129, (2, 0), 1, 40)

_CODES_V4 = {0: "network unreachable", 1: "host unreachable", 9: "prohibited", 10: "prohibited", 13: "prohibited"}
_CODES_V6 = {0: "no route", 1: "prohibited", 3: "address unreachable"}


def smallest(family: int) -> int:
    """The smallest packet with a token in it, in bytes with its IP header."""
    return (_V4 if family == socket.AF_INET else _V6).header + _HEADER.size + _TOKEN


class Echo:
    """Sends requests from one address. Use it as a context manager; raises OSError when the host lacks that address, and
    PermissionError without CAP_NET_RAW. device: where packets leave, "" for wherever the routes say."""

    def __init__(self, source: Address, device: str = "") -> None:
        self.family = family_of(source)
        self._icmp = _V4 if self.family == socket.AF_INET else _V6
        self._identifier = int.from_bytes(os.urandom(2), "big")
        self._number = 0
        self._waiting: dict[tuple[int, bytes], tuple[float, asyncio.Future[Answer]]] = {}
        self._socket = socket.socket(self.family, socket.SOCK_RAW | socket.SOCK_NONBLOCK, self._icmp.protocol)
        try:
            if self.family == socket.AF_INET:
                self._socket.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_PROBE)
            else:
                self._socket.setsockopt(socket.IPPROTO_IPV6, IPV6_MTU_DISCOVER, IPV6_PMTUDISC_PROBE)
            if device:
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode())
            self._socket.bind((format_address(source), 0))
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Echo:
        asyncio.get_running_loop().add_reader(self._socket, self._read)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.get_running_loop().remove_reader(self._socket)
        self._socket.close()

    async def ask(self, target: Address, *, size: int = 0, timeout: float = 1.0) -> Answer:
        """Send one request and wait for what becomes of it, at most `timeout` seconds. size: bytes of the whole IP packet."""
        token = os.urandom(_TOKEN)
        self._number = (self._number + 1) & 0xFFFF
        length = max(size - self._icmp.header - _HEADER.size, _TOKEN) if size else SMALL
        data = token + bytes(length - _TOKEN)
        head = _HEADER.pack(self._icmp.request, 0, 0, self._identifier, self._number)
        if self.family == socket.AF_INET:  # the kernel sums up ICMPv6 itself
            head = _HEADER.pack(self._icmp.request, 0, checksum(head + data), self._identifier, self._number)
        key = (self._number, token)
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting[key] = (time.monotonic(), answer)
        try:
            self._socket.sendto(head + data, (format_address(target), 0))
            async with asyncio.timeout(timeout):
                return await answer
        except TimeoutError:
            return Answer()
        except OSError as error:  # no route, or larger than the device's MTU
            return Answer(refusal=(error.strerror or str(error)).lower())
        finally:
            del self._waiting[key]

    def _read(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                packet, sender = self._socket.recvfrom(65536)
                now = time.monotonic()
                start = (packet[0] & 0x0F) * 4 if self.family == socket.AF_INET else 0
                self._take(packet[start:], socket.inet_pton(self.family, sender[0].partition("%")[0]), now)

    def _take(self, message: bytes, sender: Address, now: float) -> None:
        """One ICMP message: a reply to one of ours, a complaint about one, or somebody else's."""
        if len(message) < _HEADER.size:
            return
        kind, code, _, identifier, number = _HEADER.unpack_from(message)
        if kind == self._icmp.reply:
            if identifier == self._identifier:
                waiting = self._waiting.get((number, message[_HEADER.size : _HEADER.size + _TOKEN]))
                if waiting:
                    _settle(waiting[1], Answer(rtt=now - waiting[0], by=sender))
            return
        if kind == self._icmp.unreachable or (kind, code) == self._icmp.too_big:
            self._complain(message, kind, code, sender)

    def _complain(self, message: bytes, kind: int, code: int, sender: Address) -> None:
        inner = message[_HEADER.size :]
        header = (inner[0] & 0x0F) * 4 if self.family == socket.AF_INET and inner else self._icmp.header
        if len(inner) < header + _HEADER.size:
            return
        asked, _, _, identifier, number = _HEADER.unpack_from(inner, header)
        if asked != self._icmp.request or identifier != self._identifier:
            return
        # A complaint need not quote our token, so the number has to do.
        for (sent, _), (_, answer) in self._waiting.items():
            if sent == number:
                if (kind, code) == self._icmp.too_big:
                    offset, size = (6, "!H") if self.family == socket.AF_INET else (4, "!I")
                    mtu = struct.unpack_from(size, message, offset)[0]
                    _settle(answer, Answer(refusal="too big", mtu=mtu or None, by=sender))
                else:
                    words = (_CODES_V4 if self.family == socket.AF_INET else _CODES_V6).get(code, "unreachable")
                    _settle(answer, Answer(refusal=words, by=sender))


def _settle(answer: asyncio.Future[Answer], value: Answer) -> None:
    if not answer.done():
        answer.set_result(value)


async def path_mtu(
    echo: Echo, target: Address, *, most: int, least: int = 0, timeout: float = 0.5, tries: int = 2
) -> int:
    """The largest IP packet that is answered, in bytes: `most` if it can be, 0 when not even a small one is.

    A size counts as too big once `tries` requests of it were not answered, so that a lost packet is no smaller path.
    """

    async def arrives(size: int) -> bool:
        for _ in range(tries):
            answer = await echo.ask(target, size=size, timeout=timeout)
            if answer.rtt is not None:
                return True
            if answer.refusal:
                return False
        return False

    low = max(least, smallest(echo.family))
    if not await arrives(low):
        return 0
    if await arrives(most):
        return most
    high = most
    while high - low > 1:  # many sizes at once: silence takes its time, and each step would wait for it
        step = max(1, (high - low) // _AT_ONCE)
        sizes = range(low + step, high, step)
        answered = await asyncio.gather(*map(arrives, sizes))
        low = max([size for size, fits in zip(sizes, answered, strict=True) if fits], default=low)
        high = min([size for size, fits in zip(sizes, answered, strict=True) if not fits and size > low], default=high)
    return low
