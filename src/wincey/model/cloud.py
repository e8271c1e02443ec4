"""What backends on a cloud's route table want, in the vocabulary of the desired state (see wincey.cloud).

A host wants one route, to itself. What it knows of the other hosts' leases is part of the desired state too, as CloudLease:
nothing has to be made for it, but a destination that is leased is never stale, and a lease that goes may leave a route
behind. Compatibility reference, sections 6.7 to 6.9.
"""

from __future__ import annotations

from typing import ClassVar

import msgspec

from wincey.model.address import Address, Subnet, format_address
from wincey.model.state import Key, Object


class HostRef(msgspec.Struct, frozen=True, gc=False):
    """A host as a lease names it. instance: its id or name in the cloud, "" when the lease has none (flannel's leases).

    address: the IPv4 address that the lease publishes.
    """

    instance: str
    address: Address | None = None

    def __str__(self) -> str:
        address = format_address(self.address) if self.address else ""
        return f"{self.instance} ({address})" if self.instance and address else self.instance or address


class CloudTable(Object, frozen=True):
    """Which tables, by which cloud's API. own: this host; None on a server, and on a host whose server keeps the tables.

    provider: the backend type. network: the cluster network. tables: as the config names them, () to have them found.
    settings: what else the dialect has to know, such as the region. secrets: keys out of the config: neither shown nor
    written anywhere.
    """

    tag: ClassVar[str] = "cloud-table"
    provider: str
    network: Subnet
    tables: tuple[str, ...] = ()
    settings: tuple[tuple[str, str], ...] = ()
    secrets: tuple[tuple[str, str], ...] = ()
    own: HostRef | None = None

    @property
    def key(self) -> Key:
        return (self.tag,)

    def __str__(self) -> str:
        return f"{self.provider} route table{'s' * (len(self.tables) > 1)} {', '.join(self.tables)}".rstrip()

    __repr__ = __str__


class CloudRoute(Object, frozen=True, gc=False):
    """In each of the tables: what is for `destination` goes to `host`."""

    tag: ClassVar[str] = "cloud-route"
    destination: Subnet
    host: HostRef

    @property
    def key(self) -> Key:
        return (self.tag, self.destination)

    def __str__(self) -> str:
        return f"cloud route {self.destination} to {self.host}"


class CloudForwarding(Object, frozen=True, gc=False):
    """The cloud lets `host` forward packets that are not from or to the host's own addresses."""

    tag: ClassVar[str] = "cloud-forwarding"
    host: HostRef

    @property
    def key(self) -> Key:
        return (self.tag, self.host)

    def __str__(self) -> str:
        return f"IP forwarding of {self.host} in the cloud"


class CloudLease(Object, frozen=True, gc=False):
    """`destination` is leased to `host`, whose own daemon sees to the route."""

    tag: ClassVar[str] = "cloud-lease"
    destination: Subnet
    host: HostRef

    @property
    def key(self) -> Key:
        return (self.tag, self.destination)

    def __str__(self) -> str:
        return f"lease of {self.destination} by {self.host}"
