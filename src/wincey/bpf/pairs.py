"""veth pairs that packets are sent through for what happens on the way: segmentation, checksums, merging.

A packet that is sent into the one end is received at the other a moment later by the same processor. `finishing`: the sending end
has no offloads, so the kernel cuts segments and fills in checksums first. `merging`: the receiving end does generic receive
offload, which it has a packet queue for (NAPI), and which veth uses where the sending end has no TCP segmentation offload.

The ends carry no addresses and take part in nothing: no ARP, no IPv6 addresses.
"""

from __future__ import annotations

import errno
import socket
import struct
from contextlib import closing
from typing import Literal

import msgspec

from wincey.bpf.maps import processors
from wincey.bpf.syscall import BpfError
from wincey.kernel import ethtool, rtnl
from wincey.kernel.netlink import NLM_F_CREATE, NLM_F_EXCL, Netlink, NetlinkError, attribute, message

_LINK = struct.Struct("=BxHiII")
_IFLA_IFNAME, _IFLA_MTU, _IFLA_LINKINFO, _IFLA_AF_SPEC = 3, 4, 18, 26
_IFLA_NUM_TX_QUEUES, _IFLA_NUM_RX_QUEUES = 31, 32
_IFLA_INFO_KIND, _IFLA_INFO_DATA, _VETH_INFO_PEER = 1, 2, 1
_IFLA_INET6_ADDR_GEN_MODE, _GEN_MODE_NONE = 8, 1
_NESTED = 0x8000
_IFF_UP, _IFF_NOARP = 0x1, 0x80
_MTU = 65535  # whatever the network's is
_QUEUES = 16  # at most


class Pair(msgspec.Struct, frozen=True):
    """A pair by the names of its ends: `into` is sent into, `out` receives."""

    into: str
    out: str
    kind: Literal["finishing", "merging"]


class Ends(msgspec.Struct, frozen=True):
    """A pair that is there and as it should be: the index of the sending end, the MAC address of the receiving one."""

    into: int
    mac: bytes


def look(pair: Pair) -> Ends | None:
    """The pair, None when it is not there as it should be. Raises BpfError."""
    with _netlink() as netlink:
        into, out = (_link(netlink, name) for name in (pair.into, pair.out))
    if not into or not out or {into.kind, out.kind} != {"veth"} or not (into.up and out.up):
        return None
    if min(into.mtu, out.mtu) < _MTU:
        return None
    try:
        if pair.kind == "finishing":
            fine = not ethtool.get_tx_checksum(pair.into)
        else:
            fine = not ethtool.get_segmentation(pair.into) and ethtool.get_merging(pair.out)
    except OSError:
        return None
    return Ends(into.index, out.mac) if fine else None


def make(pair: Pair, source: str = "") -> Ends:
    """Have it there; when it is made anew, with as many queues as the device `source` gives it packets by. Raises BpfError."""
    found = look(pair)
    if found:
        return found
    remove(pair)
    creation = message(rtnl.RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, _request(pair, _queues(source)))
    with _netlink() as netlink:
        if refusal := netlink.transact([creation]).get(0):
            raise BpfError(f"veth pair {pair.into}", refusal.errno, refusal.words)
        netlink.transact([_silence(name) for name in (pair.into, pair.out)])  # refused where there is no IPv6 at all
    try:
        if pair.kind == "finishing":
            ethtool.set_tx_checksum(pair.into, on=False)
        else:
            ethtool.set_segmentation(pair.into, on=False)
            ethtool.set_merging(pair.out, on=True)
    except OSError as error:
        raise BpfError(f"offloads of {pair.into}", error.errno or 0) from None
    with _netlink() as netlink:
        netlink.transact([_up(name) for name in (pair.into, pair.out)])
    made = look(pair)
    if made is None:
        raise BpfError(f"veth pair {pair.into}", errno.EAGAIN, "somebody else changed it at once")
    return made


def remove(pair: Pair) -> None:
    """Remove it, or what is left of it; what has its name and is no veth is left alone. Raises BpfError."""
    with _netlink() as netlink:
        for name in (pair.into, pair.out):
            found = _link(netlink, name)
            if not found or found.kind != "veth":
                continue
            refusal = netlink.transact([rtnl.encode_link(rtnl.RTM_DELLINK, 0, index=found.index)]).get(0)
            if refusal and refusal.errno != errno.ENODEV:
                raise BpfError(f"veth pair {name}", refusal.errno, refusal.words)


def there(pair: Pair) -> bool:
    """Whether anything of it is there. Raises BpfError."""
    with _netlink() as netlink:
        return any((found := _link(netlink, name)) and found.kind == "veth" for name in (pair.into, pair.out))


def _netlink() -> closing[Netlink]:
    return closing(Netlink())


def _link(netlink: Netlink, name: str) -> rtnl.LinkMessage | None:
    try:
        _, data, start, end = netlink.request(rtnl.get_link(name))
    except NetlinkError as error:
        if error.errno in (errno.ENODEV, errno.ERANGE):
            return None
        raise BpfError(f"device {name}", error.errno or 0) from None
    return rtnl.decode_link(data, start, end)


def _queues(source: str) -> int:
    """One for each processor that may send. But what a device has received stays in the queue of the same number, and choosing one
    where there is no choice would cost each segment 2 %."""
    try:
        received = ethtool.receive_queues(source) if source else 0
    except OSError:
        received = 0
    return min(received or _QUEUES, processors(), _QUEUES)


def _request(pair: Pair, queues: int) -> bytes:
    peer = attribute(_VETH_INFO_PEER | _NESTED, _end(pair.out, queues))
    info = attribute(_IFLA_INFO_KIND, b"veth\0") + attribute(_IFLA_INFO_DATA | _NESTED, peer)
    return _end(pair.into, queues) + attribute(_IFLA_LINKINFO | _NESTED, info)


def _end(name: str, queues: int) -> bytes:
    return (
        _LINK.pack(socket.AF_UNSPEC, 0, 0, _IFF_NOARP, _IFF_NOARP)
        + _name(name)
        + attribute(_IFLA_MTU, struct.pack("=I", _MTU))
        + attribute(_IFLA_NUM_TX_QUEUES, struct.pack("=I", queues))
        + attribute(_IFLA_NUM_RX_QUEUES, struct.pack("=I", queues))
    )


def _silence(name: str) -> bytes:
    """No IPv6 address of its own, and so none of its requests."""
    mode = attribute(_IFLA_INET6_ADDR_GEN_MODE, bytes([_GEN_MODE_NONE]))
    family = attribute(_IFLA_AF_SPEC | _NESTED, attribute(socket.AF_INET6 | _NESTED, mode))
    return message(rtnl.RTM_NEWLINK, 0, _LINK.pack(0, 0, 0, 0, 0) + _name(name) + family)


def _up(name: str) -> bytes:
    return message(rtnl.RTM_NEWLINK, 0, _LINK.pack(0, 0, 0, _IFF_UP, _IFF_UP) + _name(name))


def _name(name: str) -> bytes:
    return attribute(_IFLA_IFNAME, name.encode() + b"\0")
