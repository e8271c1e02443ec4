"""The desired-state vocabulary: what must exist on a host so that packets flow.

Each object is a frozen value with two parts: its `key` (what the kernel, or a tunnel, knows it by: at most one object of a
key can exist) and the rest (what must be true of it). A difference is then two dictionaries compared. Devices are named by
name, never by index: an index changes when a device is made anew, and what we want does not.

`key` starts with the class's tag so that objects of all kinds fit in one dictionary. What only one backend needs stands in a
module of its own beside this one (wireguard, ipsec, cloud ...).
"""

from __future__ import annotations

from typing import ClassVar, Literal, TypeAlias

import msgspec

from wincey.model.address import Address, MacAddress, Subnet, format_address, format_mac

Key: TypeAlias = tuple[object, ...]


class Object(msgspec.Struct, frozen=True, gc=False):
    """What all kinds have in common."""

    tag: ClassVar[str]
    essential: ClassVar[bool] = False
    """Containers can't be started without it."""
    watched: ClassVar[bool] = False
    """Another program makes it, and its driver tells when it is not as it should be: nothing of it is ever repaired."""
    to_peer: ClassVar[bool] = False
    """Packets for the containers of another host go by it."""

    @property
    def key(self) -> Key:
        """The tag, then what the kernel or whoever keeps the object knows it by."""
        raise NotImplementedError

    @property
    def makes(self) -> str:
        """The name of the device that exists by this object, "" for none: what is on that device comes after and goes along."""
        return ""

    @property
    def wraps(self) -> str:
        """How packets are wrapped on their way by it, in a few words; "" where they are not."""
        return ""

    @property
    def outer(self) -> Address | None:
        """The host that it sends packets to, None where it does not choose one."""
        return None


class Vxlan(msgspec.Struct, frozen=True, gc=False):
    """The attributes of a vxlan link (kernel: Documentation/networking/vxlan.rst)."""

    vni: int
    port: int  # UDP destination port, host byte order
    local: Address  # outer source address
    underlay: str  # the device that carries the outer packets
    learning: bool = False
    gbp: bool = False


class Ipip(msgspec.Struct, frozen=True, gc=False):
    """The attributes of an ipip link that sends to whatever gateway a route names (kernel: net/ipv4/ipip.c)."""

    local: Address  # outer source address
    port: int = 0  # UDP port of both ends, where a UDP header lies between the two of IP (FOU)


class Link(Object, frozen=True, gc=False):
    """A device of ours, up. `mac` None: any. `tx_checksum` None: leave the offload as it is.

    kinds "vxlan" and "ipip" are made and removed by the kernel layer; kinds "tun", "wireguard" and "ovs" are made by another
    driver (see Tunnel, WireguardDevice, OvsBridge) and the kernel layer only keeps their MTU and their being up.
    """

    tag: ClassVar[str] = "link"
    essential: ClassVar[bool] = True
    name: str
    kind: Literal["vxlan", "ipip", "tun", "wireguard", "ovs"]
    mtu: int
    mac: MacAddress | None = None
    vxlan: Vxlan | None = None
    ipip: Ipip | None = None
    tx_checksum: bool | None = None

    @property
    def key(self) -> Key:
        return (self.tag, self.name)

    @property
    def makes(self) -> str:
        return self.name

    @property
    def wraps(self) -> str:
        if self.ipip:
            how = f"UDP port {self.ipip.port}" if self.ipip.port else "IP (protocol 4)"
            return f"in {how}, from {format_address(self.ipip.local)}"
        if self.vxlan is None:
            return ""
        return f"in VXLAN, VNI {self.vxlan.vni}, from {format_address(self.vxlan.local)} to UDP port {self.vxlan.port}"

    def __str__(self) -> str:
        return f"{self.kind} device {self.name} (mtu {self.mtu})"


class InterfaceAddress(Object, frozen=True, gc=False):
    """An address on a device of ours: `subnet.address` with prefix length `subnet.length`, scope global."""

    tag: ClassVar[str] = "address"
    essential: ClassVar[bool] = True
    device: str
    subnet: Subnet

    @property
    def key(self) -> Key:
        return (self.tag, self.device, self.subnet)

    def __str__(self) -> str:
        return f"address {self.subnet} dev {self.device}"


class Route(Object, frozen=True, gc=False):
    """A route in the main table with our protocol number. `device` "" with kind "blackhole".

    link_scope: an IPv4 route without a gateway whose scope is link, not global.
    """

    tag: ClassVar[str] = "route"
    to_peer: ClassVar[bool] = True
    destination: Subnet
    device: str
    gateway: Address | None = None
    onlink: bool = False
    kind: Literal["unicast", "blackhole"] = "unicast"
    link_scope: bool = False

    @property
    def key(self) -> Key:
        return (self.tag, self.destination, self.kind)

    @property
    def outer(self) -> Address | None:
        # Through the base of the peer's own subnet it is a tunnel's next hop: there other objects tell the host.
        return None if self.gateway is None or self.destination.contains(self.gateway) else self.gateway

    def __str__(self) -> str:
        via = f" via {format_address(self.gateway)}" if self.gateway else ""
        kind = "" if self.kind == "unicast" else f"{self.kind} "
        return f"route {kind}{self.destination}{via}" + (f" dev {self.device}" if self.device else "")


class Neighbor(Object, frozen=True, gc=False):
    """A permanent ARP or ND entry on a device of ours."""

    tag: ClassVar[str] = "neighbor"
    to_peer: ClassVar[bool] = True
    device: str
    address: Address
    mac: MacAddress

    @property
    def key(self) -> Key:
        return (self.tag, self.device, self.address)

    def __str__(self) -> str:
        return f"neighbor {format_address(self.address)} lladdr {format_mac(self.mac)} dev {self.device}"


class FdbEntry(Object, frozen=True, gc=False):
    """A permanent entry of a vxlan device's forwarding database: frames to `mac` go to the host `remote`."""

    tag: ClassVar[str] = "fdb"
    to_peer: ClassVar[bool] = True
    device: str
    mac: MacAddress
    remote: Address

    @property
    def key(self) -> Key:
        return (self.tag, self.device, self.mac)

    @property
    def outer(self) -> Address | None:
        return self.remote

    def __str__(self) -> str:
        return f"FDB entry {format_mac(self.mac)} dst {format_address(self.remote)} dev {self.device}"


class Sysctl(Object, frozen=True, gc=False):
    """A kernel setting below /proc/sys, as `net/ipv6/conf/flannel.1/accept_ra`. `optional`: its file may be absent."""

    tag: ClassVar[str] = "sysctl"
    path: str
    value: str
    optional: bool = False

    @property
    def key(self) -> Key:
        return (self.tag, self.path)

    def __str__(self) -> str:
        return f"sysctl {self.path} = {self.value}"


class Tunnel(Object, frozen=True, gc=False):
    """The userspace udp tunnel of one network: a TUN device and the UDP socket its packets travel through.

    engine: what moves them. check: which inner sources may come from a peer (wincey.tunnel.sources), network: the cluster's, for
    that. lasts: the device stays when its keeper ends otherwise than told, as something else than the keeper carries packets
    through it.
    """

    tag: ClassVar[str] = "tunnel"
    essential: ClassVar[bool] = True
    device: str  # the TUN's name
    mtu: int
    local: Address  # the address the UDP socket is bound to
    port: int  # UDP port, own and every peer's
    engine: Literal["offload", "plain"] = "offload"
    check: Literal["off", "network", "strict"] = "off"
    network: Subnet | None = None
    lasts: bool = False

    @property
    def key(self) -> Key:
        return (self.tag, self.device)

    @property
    def makes(self) -> str:
        return self.device

    @property
    def wraps(self) -> str:
        return f"in UDP, from {format_address(self.local)} to port {self.port}"

    def __str__(self) -> str:
        return f"udp tunnel {self.device} at {format_address(self.local)}:{self.port}"


class TunnelPeer(Object, frozen=True, gc=False):
    """Inner packets to `subnet` go to the host `endpoint`, at the tunnel's own port."""

    tag: ClassVar[str] = "tunnel-peer"
    to_peer: ClassVar[bool] = True
    device: str
    subnet: Subnet
    endpoint: Address

    @property
    def key(self) -> Key:
        return (self.tag, self.device, self.subnet)

    @property
    def outer(self) -> Address | None:
        return self.endpoint

    def __str__(self) -> str:
        return f"udp tunnel {self.device} peer {self.subnet} at {format_address(self.endpoint)}"


class Isolation(msgspec.Struct, frozen=True, gc=False):
    """What keeps a network apart from the others of its host.

    others: their ranges. devices: those that bring the network's packets from other hosts. port: the UDP port that packets
    between hosts travel to, 0 for none.
    """

    others: tuple[Subnet, ...] = ()
    devices: tuple[str, ...] = ()
    port: int = 0


class RuleSet(Object, frozen=True, gc=False):
    """The packet filter's part of one network and one address family (reference section 7).

    network: the cluster network C. subnet: this host's subnet S. masquerade: --ip-masq. forward: accept what is forwarded
    from and to C. exclude: destinations outside C that are not masqueraded either. isolation: None for a host's only
    network.
    """

    tag: ClassVar[str] = "rules"
    essential: ClassVar[bool] = True
    network: Subnet
    subnet: Subnet
    masquerade: bool
    forward: bool
    random_fully: bool = True
    exclude: tuple[Subnet, ...] = ()
    isolation: Isolation | None = None

    @property
    def key(self) -> Key:
        return (self.tag, self.network.family)

    def __str__(self) -> str:
        return f"packet filter rules of {self.network}"


class Scope(msgspec.Struct, frozen=True):
    """What on this host is ours to remove: the only thing that decides what is stale and what is foreign.

    devices: names of devices we made. networks: the cluster networks; on a device that is not ours only routes with our
    protocol number inside them are ours. current: the leases are known as the store has them; without it, what is shared
    with other hosts is not judged.
    """

    devices: tuple[str, ...] = ()
    networks: tuple[Subnet, ...] = ()
    current: bool = True


class Changes(msgspec.Struct):
    """A difference: `put` must exist as given (created, or replacing what has its key), `delete` must go."""

    put: list[Object] = msgspec.field(default_factory=list)
    delete: list[Object] = msgspec.field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.put or self.delete)


class Failure(msgspec.Struct, frozen=True):
    """One object that could not be put or deleted, and why in one line."""

    object: Object
    reason: str
