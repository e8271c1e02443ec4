"""What the backends on a cloud's route table have in common (compatibility reference, sections 6.7 to 6.9).

The cloud's own network delivers a host's subnet to the host: nothing is encapsulated, and there is no device of ours. A host
asks for the route to itself; peers are known so that what is leased is never taken for stale. Where a server keeps the table
for its clients, the host asks for nothing and publishes what the server finds it by.

flannel's leases of these backends say neither type nor data; flannel never reads those of others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import msgspec

from wincey.backends.alloc import AllocBackend
from wincey.backends.base import HostFacts, public_attrs
from wincey.model.cloud import CloudForwarding, CloudLease, CloudRoute, CloudTable, HostRef
from wincey.model.config import NetworkConfig
from wincey.model.errors import UNREADABLE, BadConfig, BadLease
from wincey.model.lease import Lease, LeaseAttrs, LeaseKey
from wincey.model.state import Object

TABLES = "RouteTableID"
"""The config's key for route tables, where a cloud has several."""
INSTANCE = "instance"
"""In HostFacts.found: the host's id or name in the cloud."""
SERVED = "served"
"""In HostFacts.found: "yes" when our server keeps the table."""


class _Data(msgspec.Struct):
    InstanceID: str = ""


class Unaided(AllocBackend):
    """The way to peers of another backend than this host's that the cloud's own network delivers to. kind: that backend."""

    def __init__(self, config: NetworkConfig, host: HostFacts, kind: str) -> None:
        super().__init__(config, host)
        self._kind = kind

    def reaches(self, attrs: LeaseAttrs) -> bool:
        return attrs.backend_type == self._kind


class CloudBackend:
    """Base of them all. A cloud's own class says `type` and `keys`, and overrides `tables`, `settings` and `secrets`."""

    type: ClassVar[str]
    keys: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: NetworkConfig, host: HostFacts) -> None:
        if config.network is None or config.enable_ipv6:
            raise BadConfig(
                f"network config: the backend {self.type} is for IPv4 alone; leave out EnableIPv4 and EnableIPv6, or use"
                " another backend, such as vxlan"
            )
        self._config, self._host, self._network = config, host, config.network

    @property
    def mtu(self) -> int:
        return self._host.mtu

    def attrs(self) -> LeaseAttrs:
        instance = self._host.found.get(INSTANCE, "")
        data = msgspec.json.encode(_Data(instance)) if instance else b""
        return msgspec.structs.replace(public_attrs(self._host, self._config, self.type), backend_data=data)

    def reaches(self, attrs: LeaseAttrs) -> bool:
        return attrs.backend_type in {"", self.type}

    def local(self, own: LeaseKey) -> list[Object]:
        if own.v4 is None:
            return []
        if self._host.found.get(SERVED):
            return [self.table(None)]
        me = HostRef(self._host.found.get(INSTANCE, ""), self._host.local)
        return [self.table(me), CloudForwarding(me), CloudRoute(own.v4, me)]

    def peer(self, own: LeaseKey, lease: Lease) -> list[Object]:
        if self._host.found.get(SERVED) or lease.key.v4 is None:
            return []
        return [CloudLease(lease.key.v4, host_of(lease))]

    def table(self, own: HostRef | None) -> CloudTable:
        """Which tables. own: this host, None for a server, and for a host whose server keeps them."""
        return CloudTable(
            provider=self.type,
            network=self._network,
            tables=self.tables(),
            settings=tuple(sorted(self.settings().items())),
            secrets=tuple(sorted(self.secrets().items())),
            own=own,
        )

    def tables(self) -> tuple[str, ...]:
        """The tables that the config names."""
        return ()

    def settings(self) -> Mapping[str, str]:
        """What else the dialect has to know: all that was found but the instance."""
        return {key: value for key, value in self._host.found.items() if key not in {INSTANCE, SERVED}}

    def secrets(self) -> Mapping[str, str]:
        """Keys out of the config."""
        return {}

    def client(self, lease: Lease) -> list[Object]:
        """What a server asks for on behalf of who holds a lease: of this backend, or of a flannel, whose leases don't say.
        Raises BadLease."""
        if lease.key.v4 is None or not self.reaches(lease.attrs):
            return []
        host = host_of(lease)
        return [CloudForwarding(host), CloudRoute(lease.key.v4, host)]


def named_tables(config: NetworkConfig, example: str) -> tuple[str, ...]:
    """The tables of the config's `RouteTableID`: one, a list, or none; raises BadConfig."""
    given = config.backend.raw(TABLES)
    names = [given] if isinstance(given, str) else given or []
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        config.backend.wrong(TABLES, "must be the id of a route table, or a list of ids", example)
    return tuple(dict.fromkeys(names))


def host_of(lease: Lease) -> HostRef:
    """The host that a lease names; raises BadLease."""
    try:
        data = msgspec.json.decode(lease.attrs.backend_data, type=_Data) if lease.attrs.backend_data else _Data()
    except UNREADABLE as error:
        raise BadLease(f"lease {lease.key}: its BackendData can't be read ({error})") from None
    return HostRef(data.InstanceID, lease.attrs.public_ip)
