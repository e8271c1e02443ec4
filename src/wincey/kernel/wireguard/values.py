"""What the two ways have in common: how a device is, and what is to be changed of its peers."""

from __future__ import annotations

from typing import Protocol

import msgspec

from wincey.model.address import Address, Subnet
from wincey.model.errors import KernelError
from wincey.model.secret import Secret

Endpoint = tuple[Address, int]
"""Address and UDP port."""

NO_KEY = bytes(32)
"""What a preshared key is set to so that there is none."""


class WireguardError(KernelError):
    """A WireGuard device can't be made, read or changed; says which and why."""


class PeerState(msgspec.Struct):
    """A peer as it is. handshake: Unix time of the latest one, 0.0 for none yet."""

    public_key: bytes
    endpoint: Endpoint | None = None
    handshake: float = 0.0
    keepalive: int = 0
    psk: Secret[bytes] | None = None
    subnets: list[Subnet] = msgspec.field(default_factory=list)


class DeviceState(msgspec.Struct):
    """A device as it is. public_key: empty when it has no private key yet."""

    public_key: bytes = b""
    port: int = 0
    peers: list[PeerState] = msgspec.field(default_factory=list)


class PeerEdit(msgspec.Struct, frozen=True):
    """A change of one peer: what is None stays as it is.

    create: make the peer when it is not there. replace: `subnets` are all that it has, not some more.
    """

    public_key: bytes
    remove: bool = False
    create: bool = False
    psk: Secret[bytes] | None = None
    endpoint: Endpoint | None = None
    keepalive: int | None = None
    replace: bool = False
    subnets: tuple[Subnet, ...] = ()


class DeviceEdit(msgspec.Struct, frozen=True):
    """A change of a device and its peers, in this order; an edit of a peer may follow another one of the same."""

    private_key: Secret[bytes] | None = None
    port: int | None = None
    peers: tuple[PeerEdit, ...] = ()


class Running(Protocol):
    """One way to run devices in this network namespace."""

    async def make(self, device: str) -> None:
        """Have the device there, and up. Raises WireguardError."""

    async def remove(self, device: str) -> None:
        """Have it gone. Raises WireguardError."""

    async def read(self, device: str) -> DeviceState | None:
        """The device as it is; None when nobody answers for it. Raises WireguardError."""

    async def change(self, device: str, edit: DeviceEdit) -> None:
        """Carry out one transaction; raises WireguardError when any of it was refused."""

    def close(self) -> None:
        """Release descriptors."""
