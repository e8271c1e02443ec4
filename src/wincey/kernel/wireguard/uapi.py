"""wireguard-go's control protocol in text: lines of key=value, an empty line at the end (wireguard.com/xplatform).

Pure. Keys are hexadecimal here. A transaction is carried out line by line and ends at the first line that is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from wincey.kernel.wireguard.curve25519 import public_key
from wincey.kernel.wireguard.values import (
    NO_KEY,
    DeviceEdit,
    DeviceState,
    Endpoint,
    PeerEdit,
    PeerState,
    WireguardError,
)
from wincey.model.address import Subnet, format_address, parse_address
from wincey.model.errors import BadAddress
from wincey.model.secret import Secret

GET = b"get=1\n\n"

END = b"\n\n"
"""How every answer ends."""


def encode_change(edit: DeviceEdit) -> bytes:
    """The transaction that carries out a change."""
    lines = ["set=1"]
    if edit.private_key:
        lines.append(f"private_key={edit.private_key.value.hex()}")
    if edit.port is not None:
        lines.append(f"listen_port={edit.port}")
    for peer in edit.peers:
        lines += _encode_peer(peer)
    return ("\n".join(lines) + "\n\n").encode()


def decode_answer(answer: bytes) -> int:
    """The error number in an answer, 0 when all went well. Raises WireguardError for what is no answer."""
    for line in answer.split(b"\n"):
        if line.startswith(b"errno="):
            with contextlib.suppress(ValueError):
                return abs(int(line[6:]))
    raise WireguardError("wireguard-go gave an answer without errno: is something else listening at its socket?")


def decode_device(answer: bytes) -> DeviceState:
    """Read the answer to GET. Raises WireguardError for what is no answer."""
    state = DeviceState()
    try:
        for line in answer.decode().splitlines():
            key, _, value = line.partition("=")
            if key == "public_key":
                state.peers.append(PeerState(bytes.fromhex(value)))
            elif key == "private_key":
                state.public_key = public_key(bytes.fromhex(value))
            elif key == "listen_port":
                state.port = int(value)
            elif key in _PEER_KEYS:
                _PEER_KEYS[key](state.peers[-1], value)
    except (ValueError, IndexError, BadAddress) as error:
        # Without the answer's text: it has the private key.
        raise WireguardError(f"wireguard-go's answer can't be read ({type(error).__name__})") from None
    return state


def _encode_peer(edit: PeerEdit) -> list[str]:
    lines = [f"public_key={edit.public_key.hex()}"]
    if edit.remove:
        return [*lines, "remove=true"]
    if not edit.create:
        lines.append("update_only=true")
    if edit.psk is not None:
        lines.append(f"preshared_key={edit.psk.value.hex()}")
    if edit.endpoint is not None:
        lines.append(f"endpoint={_endpoint_text(edit.endpoint)}")
    if edit.replace:
        lines.append("replace_allowed_ips=true")
    lines += [f"allowed_ip={subnet}" for subnet in edit.subnets]
    if edit.keepalive is not None:  # last: turning it on sends a packet, which needs all the rest
        lines.append(f"persistent_keepalive_interval={edit.keepalive}")
    return lines


def _endpoint_text(endpoint: Endpoint) -> str:
    address, port = endpoint
    text = format_address(address)
    return f"[{text}]:{port}" if len(address) == 16 else f"{text}:{port}"


def _endpoint(peer: PeerState, value: str) -> None:
    address, _, port = value.rpartition(":")
    # A link-local address comes with its zone, which no lease can have.
    peer.endpoint = parse_address(address.strip("[]").partition("%")[0]), int(port)


def _psk(peer: PeerState, value: str) -> None:
    key = bytes.fromhex(value)
    peer.psk = None if key == NO_KEY else Secret(key)


def _seconds(peer: PeerState, value: str) -> None:
    peer.handshake += int(value)


def _nanoseconds(peer: PeerState, value: str) -> None:
    peer.handshake += int(value) / 1e9


def _keepalive(peer: PeerState, value: str) -> None:
    peer.keepalive = int(value)


def _subnet(peer: PeerState, value: str) -> None:
    peer.subnets.append(Subnet.parse(value))


_PEER_KEYS: dict[str, Callable[[PeerState, str], None]] = {
    "endpoint": _endpoint,
    "preshared_key": _psk,
    "last_handshake_time_sec": _seconds,
    "last_handshake_time_nsec": _nanoseconds,
    "persistent_keepalive_interval": _keepalive,
    "allowed_ip": _subnet,
}
