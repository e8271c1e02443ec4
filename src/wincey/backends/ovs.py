"""ovs: a bridge of Open vSwitch with a GRE, VXLAN or Geneve port for each peer.

Between hosts packets are routed, as with vxlan: the bridge's local port carries the subnet's base address, each peer has a
route, a neighbor, a port and a flow that sends its MAC address out of that port. All else is dropped by the bridge, so that
a full mesh of tunnels has no loops and nothing is flooded.

Config keys: Tunnel (vxlan, gre, geneve), VNI (1; GRE's key), Port (UDP, 4789 or 6081), Bridge (flannel-ovs), Datapath
(system, netdev), MTU. Both families share one bridge; the tunnels run over IPv4 where the network has it.
"""

from __future__ import annotations

import re
import socket
from typing import ClassVar

import msgspec

from wincey.backends.base import HostFacts, public_attrs
from wincey.model.address import MacAddress, format_mac, parse_mac, single
from wincey.model.config import BackendOptions, NetworkConfig
from wincey.model.errors import UNREADABLE, BadAddress, BadConfig, BadLease
from wincey.model.lease import Lease, LeaseAttrs, LeaseKey
from wincey.model.ovs import Datapath, Encapsulation, OvsBridge, OvsFlow, OvsTunnel
from wincey.model.state import InterfaceAddress, Link, Neighbor, Object, Route, Sysctl

BRIDGE = "flannel-ovs"
PORTS: dict[Encapsulation, int] = {"vxlan": 4789, "geneve": 6081, "gre": 0}
_SHIM = {"vxlan": 16, "geneve": 16, "gre": 8}  # UDP 8 and VXLAN or Geneve 8; GRE 4 and its key 4
_ETHERNET = 14  # the inner header
_OUTER = {socket.AF_INET: 20, socket.AF_INET6: 40}


class BackendData(msgspec.Struct):
    """The lease data: the same in both families."""

    VNI: int
    VtepMAC: str
    Tunnel: Encapsulation


class OvsBackend:
    """Open vSwitch, by its database and OpenFlow."""

    type: ClassVar[str] = "ovs"
    keys: ClassVar[tuple[str, ...]] = ("Tunnel", "VNI", "Port", "Bridge", "Datapath", "MTU")

    def __init__(self, config: NetworkConfig, host: HostFacts) -> None:
        options = config.backend
        self._config, self._host = config, host
        self._tunnel = _tunnel(options)
        self._vni = options.integer(
            "VNI", 1, minimum=0, maximum=0xFFFFFF
        )  # GRE's key has room for more, a name has not
        self._port = options.integer("Port", 0, minimum=0, maximum=65535)
        if self._port and self._tunnel == "gre":
            options.wrong("Port", "GRE has no ports: leave it out", 0)
        self._bridge = options.text("Bridge", BRIDGE)
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,14}", self._bridge):
            options.wrong("Bridge", "must be a device name of at most 15 letters, digits, dots, - and _", BRIDGE)
        self._datapath = _datapath(options)
        self._family = socket.AF_INET if config.enable_ipv4 else socket.AF_INET6
        base = options.integer("MTU", 0, minimum=0, maximum=65535) or host.mtu
        overhead = _OUTER[self._family] + _SHIM[self._tunnel] + _ETHERNET
        smallest = (1280 if config.enable_ipv6 else 68) + overhead
        if base < smallest:
            raise BadConfig(
                f"ovs with {self._tunnel} needs an MTU of at least {smallest} on {host.underlay}, which has {base}"
            )
        self._mtu = base - overhead

    @property
    def mtu(self) -> int:
        return self._mtu

    @property
    def _mac(self) -> MacAddress:
        return self._host.macs[self._bridge]

    def attrs(self) -> LeaseAttrs:
        data = msgspec.json.encode(BackendData(self._vni, format_mac(self._mac), self._tunnel))
        return msgspec.structs.replace(
            public_attrs(self._host, self._config, self.type),
            backend_data=data if self._config.enable_ipv4 else b"",
            backend_v6_data=data if self._config.enable_ipv6 else b"",
        )

    def reaches(self, attrs: LeaseAttrs) -> bool:
        return attrs.backend_type == self.type

    def local(self, own: LeaseKey) -> list[Object]:
        bridge = self._bridge
        # ovs-vswitchd takes packets as they come from a local port, and nobody would fill in their checksums.
        checksum = False if self._datapath == "netdev" else None
        return [
            OvsBridge(bridge, self._datapath, self._mac, self._mtu),
            OvsFlow(bridge, self._mac, ""),
            Link(bridge, "ovs", self._mtu, tx_checksum=checksum),
            Sysctl(f"net/ipv6/conf/{bridge}/accept_ra", "0", optional=True),
            *(InterfaceAddress(bridge, single(subnet.address)) for subnet in own.subnets),
        ]

    def peer(self, own: LeaseKey, lease: Lease) -> list[Object]:
        attrs, bridge, v4 = lease.attrs, self._bridge, self._family == socket.AF_INET
        remote, local = (attrs.public_ip, self._host.local) if v4 else (attrs.public_ipv6, self._host.local_v6)
        theirs = [subnet for subnet in lease.key.subnets if any(mine.family == subnet.family for mine in own.subnets)]
        if not theirs:
            return []
        if not remote or not local:
            raise BadLease(f"lease {lease.key} names no {'PublicIP' if v4 else 'PublicIPv6'}")
        data = read_data(attrs.backend_data or attrs.backend_v6_data)
        mac = _peer_mac(data, lease)
        if mac == self._mac:
            raise BadLease(
                f"lease {lease.key} has the MAC address of this host's bridge {bridge}: stop that host's daemon,"
                " delete the state.json beside its subnet.env and start it again"
            )
        # Each sends as the other publishes. Where that isn't the same, as during a change of the config, what comes in needs
        # a port of our own kind beside the one for what goes out.
        kinds = dict.fromkeys([(data.Tunnel, data.VNI), (self._tunnel, self._vni)])
        ports = [
            OvsTunnel(
                bridge,
                kind,
                vni,
                local,
                remote,
                self._port if kind == self._tunnel and self._port else PORTS[kind],
            )
            for kind, vni in kinds
        ]
        objects: list[Object] = [*ports, OvsFlow(bridge, mac, ports[0].name)]
        for subnet in theirs:
            objects += [
                Neighbor(bridge, subnet.address, mac),
                Route(subnet, bridge, gateway=subnet.address, onlink=True),
            ]
        return objects


def read_data(data: bytes) -> BackendData:
    """Read a lease's BackendData; raises BadLease."""
    try:
        found = msgspec.json.decode(data, type=BackendData)
    except UNREADABLE as error:
        raise BadLease(f"ovs lease data can't be read ({error}): {data[:200]!r}") from None
    if not 0 <= found.VNI <= 0xFFFFFF:
        raise BadLease(f"ovs lease data has the VNI {found.VNI}; it must be 0 to {0xFFFFFF}")
    return found


def _peer_mac(data: BackendData, lease: Lease) -> MacAddress:
    try:
        return parse_mac(data.VtepMAC)
    except BadAddress as error:
        raise BadLease(f"lease {lease.key}: VtepMAC {error}") from None


def _tunnel(options: BackendOptions) -> Encapsulation:
    names: dict[str, Encapsulation] = {name: name for name in PORTS}
    found = names.get(options.text("Tunnel", "vxlan").lower())
    if found is None:
        options.wrong("Tunnel", f"must be one of {', '.join(PORTS)}", "vxlan")
    return found


def _datapath(options: BackendOptions) -> Datapath:
    datapaths: dict[str, Datapath] = {"system": "system", "netdev": "netdev"}
    found = datapaths.get(options.text("Datapath", "system").lower())
    if found is None:
        options.wrong("Datapath", "must be system (the kernel's) or netdev (in user space)", "system")
    return found
