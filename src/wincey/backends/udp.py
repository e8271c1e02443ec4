"""udp: the inner IPv4 packet is the payload of a UDP datagram, nothing else (compatibility reference, section 6.1).

Config key: Port (8285), the same on every host. IPv4 only. The packets pass through a TUN device and a process of their own, the
keeper (see wincey.tunnel); the route of the whole network leads into the TUN, so that an unknown subnet is answered there with
"network unreachable" rather than sent to the host's default gateway.

Each host chooses its engine for itself (--udp-engine): the wire is the same for all. With `fou` the kernel does it alone: an ipip
device with a UDP header around its packets, a route for each peer, and a port that receives; there is no keeper. With `bpf`, programs in the kernel take the
packets before they reach the keeper, which stays for what they leave. Kernels pass on packets that are not finished yet, several
segments in one and without their checksums, as long as no real wire lies between two hosts: only a kernel at the other end can read
those. So a host whose kernel does says so in its lease: {"Engine": "bpf"} as BackendData, which flannel leaves out and does not read. A
host that says nothing gets finished packets.
"""

from __future__ import annotations

from typing import ClassVar, Literal, cast

import msgspec

from wincey.backends.base import HostFacts, public_attrs
from wincey.model.address import single
from wincey.model.config import NetworkConfig
from wincey.model.errors import BadConfig, BadLease, NotJoinable
from wincey.model.lease import Lease, LeaseAttrs, LeaseKey
from wincey.model.state import InterfaceAddress, Ipip, Link, Object, Route, Tunnel, TunnelPeer
from wincey.model.udp import BpfRoute, BpfTunnel, FouPort

PORT = 8285
OVERHEAD = 28  # outer IPv4 20, UDP 8

ENGINE, KEEPER, CHECK = "engine", "keeper", "check"
"""In HostFacts.found: the engine that was chosen; the keeper's own, where that is another one; which inner sources may enter."""

READS_WHOLE = frozenset({"bpf"})
"""The engines that take packets which a kernel has not finished."""


class UdpData(msgspec.Struct):
    """BackendData of a lease."""

    Engine: str = ""  # "" of a host that does not say


class UdpBackend:
    """The userspace tunnel."""

    type: ClassVar[str] = "udp"
    keys: ClassVar[tuple[str, ...]] = ("Port",)

    def __init__(self, config: NetworkConfig, host: HostFacts) -> None:
        if not config.enable_ipv4 or config.enable_ipv6:
            raise BadConfig(
                "the udp backend carries IPv4 only; for IPv6 or dual stack use the vxlan or host-gw backend"
            )
        if host.local is None:
            raise NotJoinable(f"the udp backend needs an IPv4 address on {host.underlay}")
        self._config, self._host, self._local = config, host, host.local
        self._engine = host.found.get(ENGINE, "offload")
        self._port = config.backend.integer("Port", PORT, minimum=1, maximum=65535)

    @property
    def mtu(self) -> int:
        return self._host.mtu - OVERHEAD

    def attrs(self) -> LeaseAttrs:
        attrs = public_attrs(self._host, self._config)
        if self._engine not in READS_WHOLE:
            return attrs
        return msgspec.structs.replace(attrs, backend_data=msgspec.json.encode(UdpData(self._engine)))

    def reaches(self, attrs: LeaseAttrs) -> bool:
        return not attrs.backend_type

    def local(self, own: LeaseKey) -> list[Object]:
        assert own.v4
        assert self._config.network
        device, network = self._host.tun, self._config.network
        if self._engine == "fou":
            # Whole packets would reach processes at other hosts where no real wire lies between, so each is finished here.
            ipip = Ipip(self._local, self._port)
            return [
                FouPort(self._port),
                Link(device, "ipip", self.mtu, ipip=ipip, tx_checksum=False),
                InterfaceAddress(device, single(own.v4.address)),
            ]
        by_kernel = self._engine == "bpf"
        keeper = cast("Literal['offload', 'plain']", self._host.found.get(KEEPER, "offload"))
        check = cast("Literal['off', 'network', 'strict']", self._host.found.get(CHECK, "network"))
        objects: list[Object] = [
            Tunnel(device, self.mtu, self._local, self._port, keeper, check, network, lasts=by_kernel),
            Link(device, "tun", self.mtu),
            InterfaceAddress(device, single(own.v4.address)),
            Route(network, device),
        ]
        if by_kernel:
            underlay = self._host.underlay
            objects.append(BpfTunnel(device, self.mtu, underlay, self._local, self._port, network, check))
        return objects

    def peer(self, own: LeaseKey, lease: Lease) -> list[Object]:
        if not lease.key.v4:
            return []
        attrs = lease.attrs
        if not attrs.public_ip:
            raise BadLease(f"lease {lease.key} names no PublicIP")
        if self._engine == "fou":
            return [Route(lease.key.v4, self._host.tun, gateway=attrs.public_ip, onlink=True)]
        objects: list[Object] = [TunnelPeer(self._host.tun, lease.key.v4, attrs.public_ip)]
        if self._engine == "bpf":
            whole = published_engine(attrs) in READS_WHOLE
            objects.append(BpfRoute(self._host.tun, lease.key.v4, attrs.public_ip, whole))
        return objects


def published_engine(attrs: LeaseAttrs) -> str:
    """The engine that a peer's lease names, "" for none, or when its BackendData is another's."""
    try:
        return msgspec.json.decode(attrs.backend_data or b"{}", type=UdpData).Engine
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return ""
