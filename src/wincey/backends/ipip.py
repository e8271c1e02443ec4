"""ipip: the inner IPv4 packet is the payload of an IPv4 packet of protocol 4 (compatibility reference, section 6.4; RFC 2003).

Config key: DirectRouting (false). IPv4 only. One device reaches every peer: each route names the peer's address as its
gateway, and that is where the tunnel sends to.
"""

from __future__ import annotations

from typing import ClassVar

from wincey.backends.base import HostFacts, public_attrs
from wincey.model.address import single
from wincey.model.config import NetworkConfig
from wincey.model.errors import BadConfig, BadLease, NotJoinable
from wincey.model.lease import Lease, LeaseAttrs, LeaseKey
from wincey.model.state import InterfaceAddress, Ipip, Link, Object, Route

DEVICE = "flannel.ipip"
OVERHEAD = 20  # the outer IPv4 header
SMALLEST = 68 + OVERHEAD  # every IPv4 link carries 68 bytes (RFC 791)


class IpipBackend:
    """IP in IP by the kernel."""

    type: ClassVar[str] = "ipip"
    keys: ClassVar[tuple[str, ...]] = ("DirectRouting",)

    def __init__(self, config: NetworkConfig, host: HostFacts) -> None:
        if not config.enable_ipv4 or config.enable_ipv6:
            raise BadConfig(
                "the ipip backend carries IPv4 only; for IPv6 or dual stack use the vxlan or host-gw backend"
            )
        if host.local is None:
            raise NotJoinable(f"the ipip backend needs an IPv4 address on {host.underlay}")
        if host.mtu < SMALLEST:
            raise NotJoinable(f"ipip needs an MTU of at least {SMALLEST} on {host.underlay}, which has {host.mtu}")
        self._config, self._host, self._local = config, host, host.local
        self._direct = config.backend.boolean("DirectRouting", default=False)

    @property
    def mtu(self) -> int:
        return self._host.mtu - OVERHEAD

    def attrs(self) -> LeaseAttrs:
        return public_attrs(self._host, self._config, self.type)

    def reaches(self, attrs: LeaseAttrs) -> bool:
        return attrs.backend_type == self.type

    def local(self, own: LeaseKey) -> list[Object]:
        assert own.v4
        # The interface's own address, not the public one: behind NAT the kernel could not send from that.
        return [
            Link(DEVICE, "ipip", self.mtu, ipip=Ipip(self._local)),
            InterfaceAddress(DEVICE, single(own.v4.address)),
        ]

    def peer(self, own: LeaseKey, lease: Lease) -> list[Object]:
        if not lease.key.v4:
            return []
        public = lease.attrs.public_ip
        if not public:
            raise BadLease(f"lease {lease.key} names no PublicIP")
        if self._direct and (through := self._host.device_towards(public)):
            return [Route(lease.key.v4, through, gateway=public)]
        return [Route(lease.key.v4, DEVICE, gateway=public, onlink=True)]
