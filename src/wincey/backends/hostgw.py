"""host-gw: plain routes through the peers' own addresses, for hosts on one layer-2 network (reference, section 6.3)."""

from __future__ import annotations

from typing import ClassVar

from wincey.backends.base import HostFacts, public_attrs, require_own_address
from wincey.model.config import NetworkConfig
from wincey.model.errors import BadLease
from wincey.model.lease import Lease, LeaseAttrs, LeaseKey
from wincey.model.state import Object, Route


class HostGwBackend:
    """Routes only; nothing is encapsulated and there is no device of ours."""

    type: ClassVar[str] = "host-gw"
    keys: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: NetworkConfig, host: HostFacts) -> None:
        self._config, self._host = config, host
        require_own_address(config, host, self.type)

    @property
    def mtu(self) -> int:
        return self._host.mtu

    def attrs(self) -> LeaseAttrs:
        return public_attrs(self._host, self._config, self.type)

    def reaches(self, attrs: LeaseAttrs) -> bool:
        return attrs.backend_type == self.type

    def local(self, own: LeaseKey) -> list[Object]:
        return []

    def peer(self, own: LeaseKey, lease: Lease) -> list[Object]:
        objects: list[Object] = []
        if own.v4 and lease.key.v4:
            if not lease.attrs.public_ip:
                raise BadLease(f"lease {lease.key} names no PublicIP")
            objects.append(Route(lease.key.v4, self._host.underlay, gateway=lease.attrs.public_ip))
        if own.v6 and lease.key.v6 and lease.attrs.public_ipv6:
            objects.append(Route(lease.key.v6, self._host.underlay, gateway=lease.attrs.public_ipv6))
        return objects
