"""The kernel's WireGuard in bytes: generic netlink family "wireguard" (kernel: include/uapi/linux/wireguard.h).

Pure. A message holds at most 64 KiB of peers, for the length of an attribute has 16 bits, so a change of many peers is
several messages; what the device itself gets is in the first. A dump is several messages too, and a peer with many subnets
may go on in the next one.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable, Iterator

from wincey.kernel.netlink import Message, attribute, attributes, message
from wincey.kernel.wireguard.values import NO_KEY, DeviceEdit, DeviceState, Endpoint, PeerEdit, PeerState
from wincey.model.address import Subnet
from wincey.model.secret import Secret

GENL_ID_CTRL = 16

_CTRL_CMD_GETFAMILY, _CTRL_ATTR_FAMILY_ID, _CTRL_ATTR_FAMILY_NAME = 3, 1, 2
_CMD_GET_DEVICE, _CMD_SET_DEVICE, _VERSION = 0, 1, 1
_DEVICE_IFNAME, _DEVICE_PRIVATE_KEY, _DEVICE_PUBLIC_KEY, _DEVICE_LISTEN_PORT, _DEVICE_PEERS = 2, 3, 4, 6, 8
_PEER_PUBLIC_KEY, _PEER_PRESHARED_KEY, _PEER_FLAGS, _PEER_ENDPOINT, _PEER_KEEPALIVE = 1, 2, 3, 4, 5
_PEER_LAST_HANDSHAKE, _PEER_ALLOWEDIPS = 6, 9
_REMOVE_ME, _REPLACE_ALLOWEDIPS, _UPDATE_ONLY = 1, 2, 4
_ALLOWEDIP_FAMILY, _ALLOWEDIP_IPADDR, _ALLOWEDIP_CIDR_MASK = 1, 2, 3
_NESTED = 0x8000

_HEADER = struct.Struct("=BBH")  # command, version, reserved
_ATTRIBUTE = struct.Struct("=HH")
_U16, _U32 = struct.Struct("=H"), struct.Struct("=I")
_TIME = struct.Struct("=qq")  # seconds, nanoseconds
_SOCKADDR_IN = struct.Struct("=H2s4s8x")  # family, port in network byte order, address
_SOCKADDR_IN6 = struct.Struct("=H2sI16sI")  # family, port, flow label, address, scope

_PEERS_SIZE = 32 << 10


def ask_family() -> bytes:
    """Ask for the number of the family, which makes the kernel load the module."""
    body = _HEADER.pack(_CTRL_CMD_GETFAMILY, 1, 0) + attribute(_CTRL_ATTR_FAMILY_NAME, b"wireguard\0")
    return message(GENL_ID_CTRL, 0, body)


def read_family(answer: Message) -> int:
    """The family's number in the answer to `ask_family`."""
    _, data, start, end = answer
    return int(_U16.unpack(attributes(data, start + _HEADER.size, end)[_CTRL_ATTR_FAMILY_ID])[0])


def dump_device(device: str) -> bytes:
    """The body of a dump of one device and its peers."""
    return _HEADER.pack(_CMD_GET_DEVICE, _VERSION, 0) + _name(device)


def encode_change(family: int, device: str, edit: DeviceEdit) -> list[bytes]:
    """The messages that carry out a change."""
    head = b""
    if edit.private_key:
        head += attribute(_DEVICE_PRIVATE_KEY, edit.private_key.value)
    if edit.port is not None:
        head += attribute(_DEVICE_LISTEN_PORT, _U16.pack(edit.port))
    requests = []
    for peers in _parcels(map(_encode_peer, edit.peers)):
        nest = attribute(_DEVICE_PEERS | _NESTED, peers) if peers else b""
        body = _HEADER.pack(_CMD_SET_DEVICE, _VERSION, 0) + _name(device) + head + nest
        requests.append(message(family, 0, body))
        head = b""
    return requests


def decode_device(parts: Iterable[Message], family: int) -> DeviceState:
    """Put the messages of a dump together."""
    state = DeviceState()
    peers: dict[bytes, PeerState] = {}
    for kind, data, start, end in parts:
        if kind != family:
            continue
        found = attributes(data, start + _HEADER.size, end)
        state.public_key = found.get(_DEVICE_PUBLIC_KEY, state.public_key)
        if _DEVICE_LISTEN_PORT in found:
            state.port = _U16.unpack(found[_DEVICE_LISTEN_PORT])[0]
        for nest in _nests(found.get(_DEVICE_PEERS, b"")):
            _decode_peer(nest, peers)
    state.peers = list(peers.values())
    return state


def _name(device: str) -> bytes:
    return attribute(_DEVICE_IFNAME, device.encode() + b"\0")


def _parcels(encoded: Iterable[bytes]) -> Iterator[bytes]:
    """Join peers as far as they fit into one message; one empty parcel when there are none."""
    parcel, size, any_before = list[bytes](), 0, False
    for peer in encoded:
        if parcel and size + len(peer) > _PEERS_SIZE:
            yield b"".join(parcel)
            parcel, size, any_before = [], 0, True
        parcel.append(peer)
        size += len(peer)
    if parcel or not any_before:
        yield b"".join(parcel)


def _encode_peer(edit: PeerEdit) -> bytes:
    flags = (
        (_REMOVE_ME if edit.remove else 0)
        | (_REPLACE_ALLOWEDIPS if edit.replace else 0)
        | (0 if edit.create else _UPDATE_ONLY)
    )
    data = attribute(_PEER_PUBLIC_KEY, edit.public_key) + attribute(_PEER_FLAGS, _U32.pack(flags))
    if edit.psk is not None:
        data += attribute(_PEER_PRESHARED_KEY, edit.psk.value)
    if edit.endpoint is not None:
        data += attribute(_PEER_ENDPOINT, _encode_endpoint(edit.endpoint))
    if edit.keepalive is not None:
        data += attribute(_PEER_KEEPALIVE, _U16.pack(edit.keepalive))
    if edit.subnets:
        data += attribute(_PEER_ALLOWEDIPS | _NESTED, b"".join(map(_encode_subnet, edit.subnets)))
    return attribute(_NESTED, data)


def _encode_subnet(subnet: Subnet) -> bytes:
    data = attribute(_ALLOWEDIP_FAMILY, _U16.pack(subnet.family))
    data += attribute(_ALLOWEDIP_IPADDR, subnet.address) + attribute(_ALLOWEDIP_CIDR_MASK, bytes([subnet.length]))
    return attribute(_NESTED, data)


def _encode_endpoint(endpoint: Endpoint) -> bytes:
    address, port = endpoint
    if len(address) == 4:
        return _SOCKADDR_IN.pack(socket.AF_INET, port.to_bytes(2, "big"), address)
    return _SOCKADDR_IN6.pack(socket.AF_INET6, port.to_bytes(2, "big"), 0, address, 0)


def _decode_endpoint(data: bytes) -> Endpoint | None:
    family = _U16.unpack_from(data)[0]
    if family == socket.AF_INET:
        _, port, address = _SOCKADDR_IN.unpack_from(data)
    elif family == socket.AF_INET6:
        _, port, _, address, _ = _SOCKADDR_IN6.unpack_from(data)
    else:
        return None
    return address, int.from_bytes(port, "big")


def _decode_peer(nest: bytes, peers: dict[bytes, PeerState]) -> None:
    found = attributes(nest, 0, len(nest))
    public_key = found[_PEER_PUBLIC_KEY]
    peer = peers.setdefault(public_key, PeerState(public_key))
    if _PEER_ENDPOINT in found:
        peer.endpoint = _decode_endpoint(found[_PEER_ENDPOINT])
    if _PEER_LAST_HANDSHAKE in found:
        seconds, nanoseconds = _TIME.unpack(found[_PEER_LAST_HANDSHAKE])
        peer.handshake = seconds + nanoseconds / 1e9
    if _PEER_KEEPALIVE in found:
        peer.keepalive = _U16.unpack(found[_PEER_KEEPALIVE])[0]
    psk = found.get(_PEER_PRESHARED_KEY, NO_KEY)
    if psk != NO_KEY:
        peer.psk = Secret(psk)
    for inner in _nests(found.get(_PEER_ALLOWEDIPS, b"")):
        subnet = attributes(inner, 0, len(inner))
        peer.subnets.append(Subnet(subnet[_ALLOWEDIP_IPADDR], subnet[_ALLOWEDIP_CIDR_MASK][0]))


def _nests(data: bytes) -> Iterator[bytes]:
    """The members of an array of nested attributes, whose types say nothing."""
    offset = 0
    while offset + 4 <= len(data):
        length, _ = _ATTRIBUTE.unpack_from(data, offset)
        if length < 4:
            return
        yield data[offset + 4 : offset + length]
        offset += (length + 3) & ~3
