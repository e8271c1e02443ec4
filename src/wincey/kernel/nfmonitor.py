"""Who else changes packet filter rules: the notices of nftables, its generation number, the sizes of legacy tables.

nftables (and iptables-nft, which is nftables below) tells of each change on a netlink multicast group, and counts its
transactions: as long as the generation number stands still, nothing at all has changed, which one small message finds
out.

Other programs may change thousands of rules a second (kube-proxy does). So a buffer is searched for our names as
bytes before it is parsed, chains of others are left out by name, and after each reading the socket rests a little:
what the kernel can't keep meanwhile it drops and says so (ENOBUFS), which counts as a change of ours, and is followed
by a longer rest. That bounds the work: 60 transactions of 500 rules each within two seconds cost us 25 ms at most.

iptables-legacy has no notices. Asking it for number of rules and size of a table is one getsockopt and no process, so
that is done twice a second (0.1 % of a processor for two families), and only where the legacy tables exist already,
because asking would make them. A change that keeps both (a policy, one rule for another of the same size) is left to
the audit, which reads everything.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import logging
import socket
import struct
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import ctypes

logger = logging.getLogger(__name__)

NETLINK_NETFILTER = 12
NFNLGRP_NFTABLES = 7
_SOL_NETLINK = 270
_NETLINK_ADD_MEMBERSHIP = 1
_SO_RCVBUFFORCE = 33

_NFTABLES = 10 << 8  # NFNL_SUBSYS_NFTABLES in the high byte of the message type
_NEWCHAIN, _DELCHAIN, _NEWRULE, _DELRULE, _NEWGEN, _GETGEN = (_NFTABLES | number for number in (3, 5, 6, 8, 15, 16))

_HEADER = struct.Struct("=IHHII")  # nlmsghdr: length, type, flags, sequence, port
_GENMSG = struct.Struct("=BBH")  # nfgenmsg: family, version, resource id
_ATTRIBUTE = struct.Struct("=HH")  # nlattr: length, type
_BODY = _HEADER.size + _GENMSG.size

_FAMILY: dict[int, int] = {
    1: socket.AF_UNSPEC,
    2: socket.AF_INET,
    10: socket.AF_INET6,
}  # NFPROTO_* to AF_*; inet is both
_TABLE_ATTRIBUTE = 1  # NFTA_TABLE_NAME, NFTA_CHAIN_TABLE, NFTA_RULE_TABLE, NFTA_SET_TABLE, ...: always 1
_CHAIN_ATTRIBUTE = {_NEWCHAIN: 3, _DELCHAIN: 3, _NEWRULE: 2, _DELRULE: 2}  # NFTA_CHAIN_NAME, NFTA_RULE_CHAIN

_REST = 0.2
"""Seconds between two readings of the notices: soon enough to repair within a second, at most five a second."""

_LONG_REST = 0.8
"""The same after an overflow, when all that is known is that the rules should be looked at."""

_BUFFER = 2 * 1024 * 1024
"""Bytes of notices that the kernel may keep for us meanwhile; it takes the memory only when it does."""

_POLL = 0.5
"""Seconds between two looks at the legacy tables."""

_GET_INFO = 64  # IPT_SO_GET_INFO, and IP6T_SO_GET_INFO
_INFO_SIZE = 84  # struct ipt_getinfo: char name[32], hooks, 5 entry points, 5 underflows, number of entries, size
_NAMES: dict[int, str] = {
    socket.AF_INET: "/proc/self/net/ip_tables_names",
    socket.AF_INET6: "/proc/self/net/ip6_tables_names",
}

Interest = Callable[[int, str, str], bool]
"""Whether a change of (address family, table, chain) concerns us; AF_UNSPEC: a table of both IPv4 and IPv6. The chain is ""
for a change of the table itself."""


class GenerationCounter:
    """Reads the number of nftables transactions of this network namespace."""

    def __init__(self) -> None:
        self._socket: socket.socket | None = None

    def read(self) -> int | None:
        """The number, None when the kernel does not tell (no nf_tables, not privileged)."""
        try:
            if self._socket is None:
                self._socket = socket.socket(
                    socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER
                )
                self._socket.setblocking(False)  # the kernel answers within send(): there is nothing to wait for
            self._socket.send(_HEADER.pack(_BODY, _GETGEN, 1, 0, 0) + _GENMSG.pack(0, 0, 0))
            answer = self._socket.recv(4096)
        except OSError:
            self.close()
            return None
        if _HEADER.unpack_from(answer)[1] != _NEWGEN:
            return None
        for kind, value in attributes(answer, _BODY, len(answer)):
            if kind == 1:  # NFTA_GEN_ID
                return int.from_bytes(value, "big")
        return None

    def close(self) -> None:
        """Release the descriptor; a further read opens another one."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def attributes(data: bytes, start: int, end: int) -> Iterator[tuple[int, bytes]]:
    """The attributes (type without its flags, value) in a part of a buffer; ends quietly at one that is malformed."""
    while start + _ATTRIBUTE.size <= end:
        length, kind = _ATTRIBUTE.unpack_from(data, start)
        if length < _ATTRIBUTE.size or start + length > end:
            return
        yield kind & 0x3FFF, data[start + _ATTRIBUTE.size : start + length]
        start += (length + 3) & ~3


def concerns(data: bytes, interest: Interest) -> str:
    """The first change in a buffer of notices that concerns us, in words, or "". Pure."""
    position = 0
    while position + _BODY <= len(data):
        length, kind, *_ = _HEADER.unpack_from(data, position)
        if length < _BODY:
            break
        family = _FAMILY.get(data[position + _HEADER.size])
        if family is not None and kind >> 8 == _NFTABLES >> 8 and kind != _NEWGEN:
            wanted = _CHAIN_ATTRIBUTE.get(kind)
            table = chain = ""
            for attribute, value in attributes(data, position + _BODY, min(position + length, len(data))):
                if attribute == _TABLE_ATTRIBUTE:
                    table = value.rstrip(b"\0").decode(errors="replace")
                elif attribute == wanted:
                    chain = value.rstrip(b"\0").decode(errors="replace")
                if table and (chain or wanted is None):
                    break
            if interest(family, table, chain):
                return f"nftables: {f'chain {chain} of ' if chain else ''}table {table} changed"
        position += (length + 3) & ~3
    return ""


class NftMonitor:
    """Calls `changed(why)` after changes of interest.

    names: at least one of these is in any such notice; None: any may be of interest.
    """

    def __init__(self, names: Collection[str] | None, interest: Interest, changed: Callable[[str], None]) -> None:
        """Needs a running event loop. Without the privilege, or nf_tables, it says so in the log and stays silent."""
        self._names = None if names is None else tuple(name.encode() + b"\0" for name in names)
        self._interest, self._changed = interest, changed
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._socket: socket.socket | None = None
        try:
            self._socket = socket.socket(
                socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, NETLINK_NETFILTER
            )
            self._socket.bind((0, 0))
            self._socket.setsockopt(_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP, NFNLGRP_NFTABLES)
        except OSError as error:
            logger.warning(
                "the kernel does not tell of changed nftables rules (%s): only the periodic audit finds them",
                error.strerror,
            )
            self.close()
            return
        with contextlib.suppress(OSError):  # in a user namespace the size is what the host allows
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER // 2)  # the kernel doubles it
        self._listen()

    def close(self) -> None:
        """Stop listening."""
        if self._timer is not None:
            self._timer.cancel()
        if self._socket is not None:
            self._loop.remove_reader(self._socket)
            self._socket.close()
            self._socket = None

    def _listen(self) -> None:
        assert self._socket is not None
        self._loop.add_reader(self._socket, self._read)

    def _read(self) -> None:
        assert self._socket is not None
        self._loop.remove_reader(self._socket)
        why, read, rest = "", 0, _REST
        while read < _BUFFER:  # not for ever: others may write faster than we read
            try:
                data = self._socket.recv(65536)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    logger.warning("the notices of changed nftables rules have ended: %s", error.strerror)
                    self.close()
                    return
                why, rest = "nftables: more changed than the kernel could tell", _LONG_REST
                continue
            read += len(data)
            if not why and (self._names is None or any(name in data for name in self._names)):
                why = concerns(data, self._interest)
        self._timer = self._loop.call_later(rest, self._listen)
        if why:
            self._changed(why)


def legacy_tables(family: int) -> frozenset[str]:
    """The iptables-legacy tables that exist in this network namespace; looking doesn't make any."""
    try:
        return frozenset(Path(_NAMES[family]).read_text(encoding="ascii").split())
    except OSError:
        return frozenset()  # no such module loaded, or not privileged


class LegacyPoll:
    """Calls `changed(why)` when the layout of a watched iptables-legacy table changes."""

    def __init__(self, changed: Callable[[str], None]) -> None:
        """Needs a running event loop."""
        self._changed = changed
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._seen: dict[tuple[int, str], bytes] = {}

    def watch(self, tables: Collection[tuple[int, str]]) -> None:
        """Look at these tables (address family, name) from now on, at nothing if there are none.

        They must exist: the kernel would make the ones that don't.
        """
        self._seen = {table: self._seen.get(table) or _layout(*table) for table in tables}
        if self._seen and self._timer is None:
            self._timer = self._loop.call_later(_POLL, self._look)

    def close(self) -> None:
        """Stop looking."""
        self._seen = {}
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer = self._loop.call_later(_POLL, self._look) if self._seen else None
        now = {table: _layout(*table) for table in self._seen}
        changed = [name for (family, name), layout in now.items() if layout != self._seen[family, name]]
        self._seen = now
        if changed:
            self._changed(f"iptables-legacy: table {changed[0]} changed")


@functools.cache
def _libc() -> ctypes.CDLL:
    import ctypes  # noqa: PLC0415  (1 MB and some milliseconds that most hosts never need)

    return ctypes.CDLL(None)


def _layout(family: int, table: str) -> bytes:
    """What IPT_SO_GET_INFO says of a table: entry points, number of rules, size; b"" if it says nothing.

    Python's getsockopt can't hand the table's name in, hence ctypes, which only hosts with legacy tables load.
    """
    import ctypes  # noqa: PLC0415  (see _libc)

    level = socket.IPPROTO_IP if family == socket.AF_INET else socket.IPPROTO_IPV6
    info = ctypes.create_string_buffer(table.encode(), _INFO_SIZE)
    size = ctypes.c_uint32(_INFO_SIZE)
    try:
        # Any socket of the family will do; a datagram socket needs no further privilege.
        with socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as handle:
            failed = _libc().getsockopt(handle.fileno(), level, _GET_INFO, info, ctypes.byref(size))
    except OSError:
        return b""  # no IPv6 on this host
    return b"" if failed else info.raw
