"""What only the ovs backend needs in the desired state: a bridge of Open vSwitch, its tunnel ports and its flows.

A port's name tells its encapsulation, key and remote address, so that a tunnel of another kind is another port: Open vSwitch
does not take a change of kind of a live port well.
"""

from __future__ import annotations

import hashlib
from typing import ClassVar, Literal

from wincey.model.address import Address, MacAddress, format_address, format_mac
from wincey.model.state import Key, Object

Datapath = Literal["system", "netdev"]
"""Who forwards: the kernel's module, or ovs-vswitchd itself."""

Encapsulation = Literal["vxlan", "gre", "geneve"]

_LETTERS = {"vxlan": "v", "gre": "g", "geneve": "n"}

PACKAGE = "openvswitch-switch"
"""Debian's package of all programs that the backend needs."""


class OvsDatabase(Object, frozen=True, gc=False):
    """Whatever an earlier run has left in a database that does not answer now."""

    tag: ClassVar[str] = "ovs-database"
    socket: str

    @property
    def key(self) -> Key:
        return (self.tag,)

    def __str__(self) -> str:
        return f"what is left in the Open vSwitch database at {self.socket}"


class OvsBridge(Object, frozen=True, gc=False):
    """A bridge that forwards by our flows alone, with its local port of the same name. mtu: of the local port, in bytes."""

    tag: ClassVar[str] = "ovs-bridge"
    essential: ClassVar[bool] = True
    name: str
    datapath: Datapath
    mac: MacAddress
    mtu: int

    @property
    def key(self) -> Key:
        return (self.tag, self.name)

    @property
    def makes(self) -> str:
        return self.name

    def __str__(self) -> str:
        return f"Open vSwitch bridge {self.name} ({self.datapath} datapath)"


class OvsTunnel(Object, frozen=True, gc=False):
    """A tunnel port to one host. key_id: VNI, or GRE's key. port: UDP destination port, 0 for GRE."""

    tag: ClassVar[str] = "ovs-tunnel"
    device: str  # the bridge
    encapsulation: Encapsulation
    key_id: int
    local: Address  # outer source address
    remote: Address
    port: int

    @property
    def name(self) -> str:
        """The port's name: 15 characters, as many as a device's may have."""
        return tunnel_name(self.encapsulation, self.key_id, self.remote)

    @property
    def key(self) -> Key:
        return (self.tag, self.name)

    @property
    def wraps(self) -> str:
        to = f" to UDP port {self.port}" if self.port else ""
        number = "key" if self.encapsulation == "gre" else "VNI"
        return f"in {self.encapsulation.upper()}, {number} {self.key_id}, from {format_address(self.local)}{to}"

    @property
    def outer(self) -> Address | None:
        return self.remote

    def __str__(self) -> str:
        return f"{self.encapsulation} port {self.name} to {format_address(self.remote)} on bridge {self.device}"


class OvsFlow(Object, frozen=True, gc=False):
    """Frames to `mac`: from the host out of the tunnel port `port`, or with port "" from any tunnel to the host."""

    tag: ClassVar[str] = "ovs-flow"
    to_peer: ClassVar[bool] = True
    device: str  # the bridge
    mac: MacAddress
    port: str

    @property
    def key(self) -> Key:
        return (self.tag, self.device, self.mac)

    def __str__(self) -> str:
        return f"flow to {format_mac(self.mac)} on bridge {self.device}"


def tunnel_name(encapsulation: Encapsulation, key_id: int, remote: Address) -> str:
    """A letter for the kind, six hexadecimal digits of the key, eight of the address (IPv6: of its digest)."""
    address = remote if len(remote) == 4 else hashlib.sha256(remote).digest()[:4]
    return f"{_LETTERS[encapsulation]}{key_id:06x}{address.hex()}"
