"""What every backend is given and what it answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Protocol

import msgspec

from wincey.model.address import Address, MacAddress, Subnet, format_address
from wincey.model.config import BackendOptions, NetworkConfig
from wincey.model.errors import NotJoinable
from wincey.model.lease import Lease, LeaseAttrs, LeaseKey
from wincey.model.state import Object


class HostFacts(msgspec.Struct, frozen=True):
    """All that a backend may know of the host.

    underlay: name of the chosen interface. mtu: its MTU. local, local_v6: its own addresses. public, public_v6: what peers
    reach it by (another one behind NAT). connected: subnets that are reached without a gateway, and by which device.
    macs: MAC addresses for devices of ours that must stay as they were, by device name. kernel: release as (major, minor).
    known: the type and options of every backend that the config has asked for while we run, the latest first.
    tun: the name for a TUN device, which no other network of this host has. found: what only the backend of the config asks of
    a host, such as its public key (agent.parts has the questions).
    """

    underlay: str
    mtu: int
    local: Address | None
    local_v6: Address | None
    public: Address | None
    public_v6: Address | None
    connected: Sequence[tuple[Subnet, str]] = ()
    macs: Mapping[str, MacAddress] = {}
    kernel: tuple[int, int] = (0, 0)
    known: Sequence[tuple[str, BackendOptions]] = ()
    tun: str = "flannel0"
    found: Mapping[str, str] = {}

    def device_towards(self, address: Address) -> str | None:
        """The device that an address is directly connected to, None if it takes a gateway. The longest prefix counts."""
        found = [(subnet.length, device) for subnet, device in self.connected if subnet.contains(address)]
        return max(found)[1] if found else None


class Backend(Protocol):
    """One way to reach peers, configured for one network on one host."""

    type: ClassVar[str]
    """The name in config and leases."""

    keys: ClassVar[tuple[str, ...]]
    """The keys that it reads from the config's Backend, besides Type."""

    def __init__(self, config: NetworkConfig, host: HostFacts) -> None:
        """Raises BadConfig for a wrong key of the backend's, NotJoinable for what this host lacks."""

    @property
    def mtu(self) -> int:
        """FLANNEL_MTU: the MTU that containers get."""

    def attrs(self) -> LeaseAttrs:
        """What the lease publishes."""

    def reaches(self, attrs: LeaseAttrs) -> bool:
        """Whether `peer` serves peers that publish these attributes; raises BadLease when they can't be read."""

    def local(self, own: LeaseKey) -> list[Object]:
        """What exists for the host itself."""

    def peer(self, own: LeaseKey, lease: Lease) -> list[Object]:
        """What exists for one peer. Raises BadLease when its data can't be used."""


def public_attrs(host: HostFacts, config: NetworkConfig, backend_type: str = "") -> LeaseAttrs:
    """The attributes that every backend publishes: addresses of the families in use, and the type."""
    return LeaseAttrs(
        public_ip=host.public if config.enable_ipv4 else None,
        public_ipv6=host.public_v6 if config.enable_ipv6 else None,
        backend_type=backend_type,
    )


def require_own_address(config: NetworkConfig, host: HostFacts, backend_type: str) -> None:
    """For backends whose peers route through this host directly; raises NotJoinable where they are told another address."""
    for used, public, local in (
        (config.enable_ipv4, host.public, host.local),
        (config.enable_ipv6, host.public_v6, host.local_v6),
    ):
        if used and public and local and public != local:
            raise NotJoinable(
                f"{backend_type} can't work with the public address {format_address(public)}, which is not the address of"
                f" {host.underlay} ({format_address(local)}): peers route through it directly. Drop --public-ip, or"
                " use the vxlan backend"
            )
