"""What only the wireguard backend needs in the desired state: devices, peers, and which peer each subnet belongs to.

Subnets are objects of their own because that is how WireGuard has it: on one device a subnet belongs to one peer at most
(cryptokey routing), and a peer that has two leases has the subnets of both.

Keys are 32 bytes. A public key says who a device or peer is; of private keys there is only the path of a file here, and a
preshared key is wrapped so that no text of an object shows it.
"""

from __future__ import annotations

from base64 import b64encode
from typing import ClassVar, Literal

from wincey.model.address import Address, Subnet, format_address
from wincey.model.secret import Secret
from wincey.model.state import Key, Object

KEY_SIZE = 32

DEVICE, DEVICE_V6 = "flannel-wg", "flannel-wg-v6"
"""The devices' names, which are flannel's."""

Way = Literal["kernel", "wireguard-go"]
"""Who runs a device: the kernel, or the program wireguard-go."""


class WireguardDevice(Object, frozen=True, gc=False):
    """A WireGuard device. port: the UDP port that it listens on, in both families.

    public_key: that of its private key, which is in the file `key_file`.
    """

    tag: ClassVar[str] = "wireguard"
    essential: ClassVar[bool] = True
    device: str
    way: Way
    port: int
    public_key: bytes
    key_file: str

    @property
    def key(self) -> Key:
        return (self.tag, self.device)

    @property
    def makes(self) -> str:
        return self.device

    def __str__(self) -> str:
        return f"WireGuard device {self.device} (UDP port {self.port}, by {self.way})"


class WireguardPeer(Object, frozen=True, gc=False):
    """A peer of a device. endpoint, port: where it is to be found as long as it has not been heard from elsewhere.

    keepalive: seconds between packets that keep a way through NAT open, 0 for none.
    """

    tag: ClassVar[str] = "wireguard-peer"
    to_peer: ClassVar[bool] = True
    device: str
    public_key: bytes
    endpoint: Address
    port: int
    keepalive: int = 0
    psk: Secret[bytes] | None = None

    @property
    def key(self) -> Key:
        return (self.tag, self.device, self.public_key)

    @property
    def wraps(self) -> str:
        return f"encrypted by WireGuard, to UDP port {self.port}"

    @property
    def outer(self) -> Address | None:
        return self.endpoint or None

    def __str__(self) -> str:
        where = f"{format_address(self.endpoint)} port {self.port}" if self.endpoint else "no address"
        return f"WireGuard peer {key_text(self.public_key)} at {where} dev {self.device}"


class WireguardSubnet(Object, frozen=True, gc=False):
    """Packets to and from `subnet` are those of the peer with this key ("allowed IPs")."""

    tag: ClassVar[str] = "wireguard-subnet"
    to_peer: ClassVar[bool] = True
    device: str
    subnet: Subnet
    public_key: bytes

    @property
    def key(self) -> Key:
        return (self.tag, self.device, self.subnet)

    def __str__(self) -> str:
        return f"WireGuard subnet {self.subnet} of peer {key_text(self.public_key)} dev {self.device}"


def key_text(key: bytes) -> str:
    """A key as `wg` and lease data write it."""
    return b64encode(key).decode()
