"""The kernel's IPsec policies and states over netlink (kernel: include/uapi/linux/xfrm.h), in batches.

A policy is ours if its template is a tunnel of flannel's request number, or if it blocks with our priority, and its
destination or source lies in one of our networks. Those of other programs are neither reported nor touched. Of a policy
only what makes it what it is gets compared: limits, counters and the kernel's own index are left out.

States (the keys) are charon's business; here they are only looked for when charon has been killed and can't remove them, and
made once, with a key that encrypts nothing, to find out whether this kernel has ESP at all.
"""

from __future__ import annotations

import asyncio
import errno
import secrets
import socket
import struct
from collections.abc import Callable, Container, Iterator, Sequence

from wincey.kernel.netlink import HEADER, Netlink, Refusal, attribute, attributes, batches, message, messages
from wincey.model.address import Address, Subnet
from wincey.model.ipsec import REQID, Direction, XfrmPolicy

NETLINK_XFRM = 6
NEWSA, DELSA, GETSA, NEWPOLICY, DELPOLICY, GETPOLICY, UPDPOLICY = 0x10, 0x11, 0x12, 0x13, 0x14, 0x15, 0x19
_FLUSHPOLICY = 0x1D
_GROUP_POLICY = 4
_TMPL, _AEAD = 5, 18
_TUNNEL, _ESP, _AF_INET = 1, 50, 2
_ALLOW, _BLOCK = 0, 1
_EVERY_ALGORITHM = 0xFFFFFFFF

PRIORITY_BLOCK = 11_011
"""Marks policies of ours that let nothing pass; those with a tunnel have 0, as flannel's, and go first."""

_SELECTOR = struct.Struct("=16s16s8xHBBB3xiI")  # destination, source, (ports), family, lengths, protocol, device, user
_POLICY = struct.Struct(
    "=56s32s64xIIBBBB4x"
)  # selector, limits (half of them), priority, index, direction, action, ...
_POLICY_ID = struct.Struct("=56sIB3x")
_TEMPLATE = struct.Struct("=16sIB3xH2x16sIBBBxIII")  # destination, SPI, protocol, family, source, reqid, mode, ...
_STATE = struct.Struct("=56s16sIB3x16s32s64x12xIIHBBB7x")  # selector, id, source, limits, seq, reqid, family, mode, ...
_STATE_ID = struct.Struct("=16sIHBx")
_NO_LIMITS = b"\xff" * 32
_GONE = frozenset({errno.ENOENT, errno.ESRCH})
_DIRECTIONS: tuple[Direction, ...] = ("in", "out", "fwd")


def encode_put(policy: XfrmPolicy) -> bytes:
    """Make the policy, or change the one of its direction and selectors into it."""
    priority, action = (0, _ALLOW) if policy.tunnel else (PRIORITY_BLOCK, _BLOCK)
    body = _POLICY.pack(_selector(policy), _NO_LIMITS, priority, 0, _DIRECTIONS.index(policy.direction), action, 0, 0)
    if policy.tunnel:
        source, destination = policy.tunnel
        template = _TEMPLATE.pack(destination, 0, _ESP, _AF_INET, source, REQID, _TUNNEL, 0, 0, *[_EVERY_ALGORITHM] * 3)
        body += attribute(_TMPL, template)
    return message(UPDPOLICY, 0, body)


def encode_delete(policy: XfrmPolicy) -> bytes:
    """Delete the policy of this direction and selectors."""
    return message(DELPOLICY, 0, _POLICY_ID.pack(_selector(policy), 0, _DIRECTIONS.index(policy.direction)))


def decode(data: bytes, offset: int, end: int) -> XfrmPolicy | None:
    """Read the body of a policy; None for one that is not of the kinds that we make."""
    selector, _, priority, _, direction, action, _, _ = _POLICY.unpack_from(data, offset)
    to, come_from, family, to_length, from_length, protocol, device, _ = _SELECTOR.unpack(selector)
    if family != _AF_INET or protocol or device or direction >= len(_DIRECTIONS):
        return None
    tunnel = None
    if action == _BLOCK:
        if priority != PRIORITY_BLOCK:
            return None
    else:
        template = attributes(data, offset + _POLICY.size, end).get(_TMPL, b"")
        if len(template) != _TEMPLATE.size:
            return None
        outer_to, _, outer_protocol, _, outer_from, reqid, mode, _, _, _, _, _ = _TEMPLATE.unpack(template)
        if (outer_protocol, mode, reqid) != (_ESP, _TUNNEL, REQID):
            return None
        tunnel = (outer_from[:4], outer_to[:4])
    source, destination = Subnet(come_from[:4], from_length), Subnet(to[:4], to_length)
    return XfrmPolicy(_DIRECTIONS[direction], source, destination, tunnel)


def _selector(policy: XfrmPolicy) -> bytes:
    to, come_from = policy.destination, policy.source
    return _SELECTOR.pack(to.address, come_from.address, _AF_INET, to.length, come_from.length, 0, 0, 0)


class Xfrm:
    """Reads and changes policies in the network namespace that it is made in. Raises OSError where XFRM is missing."""

    def __init__(self) -> None:
        self._netlink = Netlink(protocol=NETLINK_XFRM, strict=False)

    def close(self) -> None:
        """Release the descriptor."""
        self._netlink.close()

    @property
    def port(self) -> int:
        """What the kernel marks notifications of our own changes with."""
        return self._netlink.port

    def policies(self, networks: Sequence[Subnet]) -> list[XfrmPolicy]:
        """Ours, of these networks."""
        found = []
        for kind, data, start, end in messages(self._netlink.dump(GETPOLICY, _POLICY_ID.pack(bytes(56), 0, 0))):
            policy = decode(data, start, end) if kind == NEWPOLICY else None
            if policy and any(
                network.contains(policy.source.address) or network.contains(policy.destination.address)
                for network in networks
            ):
                found.append(policy)
        return found

    def change(self, put: Sequence[XfrmPolicy], delete: Sequence[XfrmPolicy]) -> Iterator[tuple[XfrmPolicy, Refusal]]:
        """Delete, then put; what the kernel refused. Deleting what is not there is no failure."""
        items = [*delete, *put]
        # XFRM marks notifications with the port that the request itself names.
        mark = struct.pack("=I", self._netlink.port)
        requests = [each[:12] + mark + each[16:] for each in (*map(encode_delete, delete), *map(encode_put, put))]
        for batch in batches(requests):
            for index, refusal in self._netlink.transact(requests[batch.start : batch.stop]).items():
                at = batch.start + index
                if at >= len(delete) or refusal.errno not in _GONE:
                    yield items[at], refusal

    def remove_states(self, remotes: Container[Address]) -> None:
        """Delete what a killed charon left: tunnel states of ours to and from these hosts."""
        requests = []
        for kind, data, start, _ in messages(self._netlink.dump(GETSA, bytes(_STATE_ID.size))):
            if kind != NEWSA:
                continue
            _, to, spi, protocol, come_from, _, _, reqid, family, mode, _, _ = _STATE.unpack_from(data, start)
            ours = (family, protocol, mode, reqid) == (_AF_INET, _ESP, _TUNNEL, REQID)
            if ours and (come_from[:4] in remotes or to[:4] in remotes):
                requests.append(message(DELSA, 0, _STATE_ID.pack(to, spi, family, protocol)))
        for batch in batches(requests):
            self._netlink.transact(requests[batch.start : batch.stop])


class PolicyWatch:
    """Calls `changed` from the running event loop when another program changed policies. own: port ids of our changes."""

    def __init__(self, own: int, changed: Callable[[str], None]) -> None:
        self._own, self._changed = own, changed
        self._netlink = Netlink((_GROUP_POLICY,), protocol=NETLINK_XFRM, strict=False)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._netlink.fileno(), self._read)

    def close(self) -> None:
        """Stop watching."""
        self._loop.remove_reader(self._netlink.fileno())
        self._netlink.close()

    def _read(self) -> None:
        try:
            while data := self._netlink.receive():
                _, kind, _, _, port = HEADER.unpack_from(data, 0)
                if port != self._own and kind in {DELPOLICY, UPDPOLICY, _FLUSHPOLICY}:
                    self._changed("IPsec policies of the kernel were changed")
        except OSError:  # ENOBUFS: some were lost
            self._changed("notifications of IPsec policies were lost")


def kernel_has_esp() -> bool:
    """Whether this kernel can do ESP with AES-GCM: a state is made, on the loopback address, and removed."""
    try:
        xfrm = Netlink(protocol=NETLINK_XFRM, strict=False)
    except OSError:
        return False
    try:
        loopback, spi = socket.inet_aton("127.0.0.1"), 0x100 + secrets.randbits(24)
        selector = _SELECTOR.pack(b"", b"", _AF_INET, 0, 0, 0, 0, 0)
        wire_spi = socket.htonl(spi)
        state = _STATE.pack(selector, loopback, wire_spi, _ESP, loopback, _NO_LIMITS, 0, 0, _AF_INET, _TUNNEL, 0, 0)
        # 16 bytes of key and 4 of salt; an ICV of 16 bytes
        aead = struct.pack("=64sII", b"rfc4106(gcm(aes))", 160, 128) + secrets.token_bytes(20)
        refused = xfrm.transact([message(NEWSA, 0, state + attribute(_AEAD, aead))])
        if not refused:
            xfrm.transact([message(DELSA, 0, _STATE_ID.pack(loopback, wire_spi, _AF_INET, _ESP))])
        return not refused
    finally:
        xfrm.close()
