"""What the bgp backend wants to exist: a BGP speaker, its neighbours, and what BGP is expected to teach this host.

Speaker and neighbours are configured; sessions and routes are only watched, for the routing daemon makes them. A watched
object that is not as expected is a failure that is told, and nothing that anybody could repair.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import msgspec

from wincey.model.address import Address, Subnet, format_address
from wincey.model.secret import Secret
from wincey.model.state import Key, Object


class Accepted(msgspec.Struct, frozen=True, gc=False):
    """What may be learned at all: subnets of exactly this length inside the cluster network, of one family."""

    network: Subnet
    length: int


class BgpSpeaker(Object, frozen=True, gc=False):
    """The BGP speaker of this host.

    daemon: the program. instance: one of our own, or the host's. port: the TCP port to listen at. local, local_v6: the
    source addresses of sessions, by family. subnets: what is announced. hold: seconds without a word after which a
    neighbour is given up. include, control: for the host's BIRD, the file to write and the socket to speak to.
    """

    tag: ClassVar[str] = "bgp"
    essential: ClassVar[bool] = True
    daemon: Literal["bird", "frr"]
    instance: Literal["own", "host"]
    asn: int
    port: int
    router_id: Address
    local: Address | None
    local_v6: Address | None
    subnets: tuple[Subnet, ...]
    accepted: tuple[Accepted, ...]
    password: Secret[str] = Secret("")
    hold: int = 30
    bfd: bool = False
    include: str = ""
    control: str = ""

    @property
    def key(self) -> Key:
        return (self.tag,)

    def __str__(self) -> str:
        return f"BGP speaker of AS {self.asn} ({'BIRD' if self.daemon == 'bird' else 'FRR'})"


class BgpPeer(Object, frozen=True, gc=False):
    """A neighbour. It carries the routes of its address's family.

    subnets: all that it may announce; empty for a router, which may announce whatever the speaker accepts.
    """

    tag: ClassVar[str] = "bgp-peer"
    address: Address
    asn: int
    port: int
    subnets: tuple[Subnet, ...] = ()

    @property
    def key(self) -> Key:
        return (self.tag, self.address)

    def __str__(self) -> str:
        return f"BGP neighbour {format_address(self.address)}"


class BgpSession(Object, frozen=True, gc=False):
    """A session with a router, through which the routes of many peers come: it should be up."""

    tag: ClassVar[str] = "bgp-session"
    watched: ClassVar[bool] = True
    address: Address

    @property
    def key(self) -> Key:
        return (self.tag, self.address)

    def __str__(self) -> str:
        return f"BGP session with {format_address(self.address)}"


class BgpRoute(Object, frozen=True, gc=False):
    """A route that BGP should have taught this host.

    gateway: its next hop, None where routers decide that. neighbour: who teaches it, None for the routers.
    """

    tag: ClassVar[str] = "bgp-route"
    watched: ClassVar[bool] = True
    subnet: Subnet
    gateway: Address | None = None
    neighbour: Address | None = None

    @property
    def key(self) -> Key:
        return (self.tag, self.subnet)

    @property
    def outer(self) -> Address | None:
        return self.gateway

    def __str__(self) -> str:
        via = f" via {format_address(self.gateway)}" if self.gateway else ""
        return f"BGP route {self.subnet}{via}"
