"""udp: the inner IPv4 packet is the payload of a UDP datagram, nothing else (compatibility reference, section 6.1).

Config key: Port (8285), the same on every host. IPv4 only. The packets pass through a TUN device and a process of their own
(see wincey.tunnel); the route of the whole network leads into the TUN, so that an unknown subnet is answered there with
"network unreachable" rather than sent to the host's default gateway.
"""

from __future__ import annotations

from typing import ClassVar

from wincey.backends.base import HostFacts, public_attrs
from wincey.model.address import single
from wincey.model.config import NetworkConfig
from wincey.model.errors import BadConfig, BadLease, NotJoinable
from wincey.model.lease import Lease, LeaseAttrs, LeaseKey
from wincey.model.state import InterfaceAddress, Link, Object, Route, Tunnel, TunnelPeer

PORT = 8285
OVERHEAD = 28  # outer IPv4 20, UDP 8


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
        self._port = config.backend.integer("Port", PORT, minimum=1, maximum=65535)

    @property
    def mtu(self) -> int:
        return self._host.mtu - OVERHEAD

    def attrs(self) -> LeaseAttrs:
        return public_attrs(self._host, self._config)

    def reaches(self, attrs: LeaseAttrs) -> bool:
        return not attrs.backend_type

    def local(self, own: LeaseKey) -> list[Object]:
        assert own.v4
        assert self._config.network
        device = self._host.tun
        return [
            Tunnel(device, self.mtu, self._local, self._port),
            Link(device, "tun", self.mtu),
            InterfaceAddress(device, single(own.v4.address)),
            Route(self._config.network, device),
        ]

    def peer(self, own: LeaseKey, lease: Lease) -> list[Object]:
        if not lease.key.v4:
            return []
        if not lease.attrs.public_ip:
            raise BadLease(f"lease {lease.key} names no PublicIP")
        return [TunnelPeer(self._host.tun, lease.key.v4, lease.attrs.public_ip)]
