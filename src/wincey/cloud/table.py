"""A cloud's route tables: what an API has to be able to do (Dialect), and what has to be done (pure).

## How a dialect is written
One class with the methods of `Dialect`, in a module of its own, and a line for it in wincey.cloud.dialects. It speaks one API
and decides nothing: it lists, puts and deletes as it is told. It

- keeps no state but connections, and lists tables whole: one listing (paged, if the API pages) for all hosts and routes;
- raises the classes of wincey.cloud.errors alone, and raises them at once: the driver waits and tries again, so libraries'
  own retries are off, and a call ends within about 10 seconds;
- blocks nothing: a library that blocks runs in a thread;
- awaits operations of the API (an "operation" that is pending) for 10 seconds at most, then lists its route as `pending`;
- never deletes what is listed with other next hops by now, where the API can make that a condition.

`next_hop` is a tuple of all names that the listing gives of one next hop (interface, instance, address), as the API writes
them; a next hop that is no host (gateway, peering, NAT) is `()`, and such a route is never touched.

## Who writes and who deletes
Each host (or a server on behalf of its clients) writes the route of its own lease, and nobody else's. Any host may delete a
stale route, and none must delete one that a host has just put. What makes that hold:

1. A destination that overlaps a lease is never deleted, whatever the route's state: its owner replaces it in place. So
   nothing is ever deleted before it is created, and there is no moment without a route.
2. A host puts its route only when it has its lease. Who sees the store sees the lease first.
3. Deleting takes patience: the same route (table, next hop, state) must have been stale in each look for GRACE and longer,
   while the store could be reached. A host that is cut off from the store, and so may miss a lease, deletes nothing.
4. Right before deleting the tables are listed again, and a route is spared that is not as it was.
5. What is left is the moment between that listing and the deletion, for an API that deletes by destination alone. Whoever has
   put a route looks again a minute later, and then at each slow look.

## What is stale
Routes to a destination inside the cluster network that overlaps no lease, and that are ours: whose next hop is a host of ours
(it holds a lease, or did while we ran), or is no more (state `blackhole`), or that carry a mark of ours. All others are
foreign. A leased destination whose route leads to what is no host is refused with a clear line: it was put by hand.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import ClassVar, Literal, Protocol, TypeAlias

import msgspec

from wincey.cloud.errors import CloudForeign, CloudFull
from wincey.model.address import Subnet
from wincey.model.cloud import CloudTable, HostRef

GRACE = 30.0
"""Seconds that a route has to be stale before it is deleted."""

NEARLY_FULL = 0.9
"""The part of a quota from which on there is a warning."""


class TableRoute(msgspec.Struct, frozen=True):
    """A route of one table. handle: the API's name for it, where it has one. marked: it carries a mark of ours (a name or a
    description). state: blackhole when the next hop is no more, disabled when somebody has switched the route off."""

    table: str
    destination: Subnet
    next_hop: tuple[str, ...]
    state: Literal["active", "blackhole", "disabled", "pending"] = "active"
    handle: str = ""
    marked: bool = False

    def __str__(self) -> str:
        via = self.next_hop[0] if self.next_hop else "what is no host"
        return f"route {self.destination} to {via} in {self.table}" + f" ({self.state})" * (self.state != "active")


class Table(msgspec.Struct, frozen=True):
    """A table and its routes with an IPv4 destination, those outside the cluster network included or not.

    used: how many routes count towards the quota. limit: the quota, None when it is not known; then usual: what it is where
    nobody had it changed, for a warning only.
    """

    name: str
    routes: tuple[TableRoute, ...]
    used: int = 0
    limit: int | None = None
    usual: int | None = None


class CloudHost(msgspec.Struct, frozen=True):
    """A host as the API knows it. next_hop: its names as routes list them, the one to put a route with first.

    forwards: whether it may forward others' packets. place: by what its table is found, where the config names none.
    """

    next_hop: tuple[str, ...]
    forwards: bool
    place: tuple[str, ...] = ()


class Step(msgspec.Struct, frozen=True):
    """A route to put into a table. old: what it replaces."""

    table: str
    destination: Subnet
    host: CloudHost
    old: TableRoute | None


Routes: TypeAlias = Mapping[Subnet, Mapping[str, TableRoute]]
Hosts: TypeAlias = Mapping[HostRef, CloudHost]


class Dialect(Protocol):
    """One cloud's API, for the tables of one network. All methods raise CloudError's kinds."""

    provider: ClassVar[str]

    def __init__(self, table: CloudTable) -> None:
        """No call is made here. Raises CloudNotInstalled, CloudDenied (no credentials)."""

    async def hosts(self, wanted: Sequence[HostRef]) -> Hosts:
        """Find hosts, in few calls; one that is not there is left out. Only hosts in the network (VPC) of the tables, and
        only when the address that the lease publishes is the host's: a lease must not lead packets to another host."""

    async def tables(self, hosts: Hosts) -> Sequence[Table]:
        """All tables to keep, whole: those that the config names, or those that the cloud has for these hosts."""

    async def put(self, step: Step) -> None:
        """Create a route, or replace the old one, in place where the API can. Raises CloudConflict when the table was
        changed meanwhile, CloudFull."""

    async def delete(self, route: TableRoute) -> None:
        """Delete a route; one that is gone is no failure. Raises CloudConflict when it is known not to be as listed."""

    async def allow_forwarding(self, host: CloudHost) -> None:
        """Let a host forward. Raises CloudDenied with the permission, or what to do by hand where no API can do it."""

    async def close(self) -> None:
        """End connections."""


class Held(msgspec.Struct, frozen=True):
    """What is known of the leases. leased: all destinations that are leased.

    ours: names (instances, interfaces, addresses) of hosts that have, or had, a lease. networks: the cluster networks.
    """

    leased: Iterable[Subnet]
    ours: Set[str]
    networks: Sequence[Subnet]


def by_destination(tables: Iterable[Table]) -> Routes:
    """The routes of all tables by destination, then table."""
    found: dict[Subnet, dict[str, TableRoute]] = defaultdict(dict)
    for table in tables:
        for route in table.routes:
            found[route.destination][route.table] = route
    return found


def steps(tables: Sequence[Table], found: Mapping[str, TableRoute], destination: Subnet, host: CloudHost) -> list[Step]:
    """What it takes to have the route in each table; nothing when all is well (pending counts as there).

    found: the routes to that destination, by table. Raises CloudForeign when one of them leads to what is no host.
    """
    needed = []
    for table in tables:
        old = found.get(table.name)
        if old and not old.next_hop:
            raise CloudForeign(
                f"{old.table} has a route {destination} to what is no host (a gateway, a peering), which is not ours to"
                f" replace: delete it, or keep {destination} out of SubnetMin to SubnetMax"
            )
        if old is None or old.state in {"blackhole", "disabled"} or set(old.next_hop).isdisjoint(host.next_hop):
            needed.append(Step(table.name, destination, host, old))
    return needed


def check_room(tables: Iterable[Table], step: Step) -> None:
    """Raises CloudFull when a step would go beyond the quota of its table."""
    table = next(table for table in tables if table.name == step.table)
    if step.old is None and table.limit is not None and table.used >= table.limit:
        raise CloudFull(
            f"{table.name} holds {table.used} routes, which is its quota ({table.limit}): no route for"
            f" {step.destination} until the quota is raised, or routes that are not needed are deleted"
        )


def put_into(tables: Iterable[Table], step: Step) -> tuple[Table, ...]:
    """The tables after a step."""
    new = TableRoute(step.table, step.destination, step.host.next_hop)
    return tuple(
        msgspec.structs.replace(
            table,
            routes=(*(route for route in table.routes if route != step.old), new),
            used=table.used + (step.old is None),
        )
        if table.name == step.table
        else table
        for table in tables
    )


def without(tables: Iterable[Table], gone: TableRoute) -> tuple[Table, ...]:
    """The tables after a route was deleted."""
    return tuple(
        msgspec.structs.replace(
            table, routes=tuple(route for route in table.routes if route != gone), used=table.used - 1
        )
        if table.name == gone.table
        else table
        for table in tables
    )


def stale(tables: Iterable[Table], held: Held, *, blackholes: bool = True) -> list[TableRoute]:
    """The routes that are ours by the rules above and that no lease needs. blackholes: those of any host, too."""
    leased = _Ranges(held.leased)
    return [
        route
        for table in tables
        for route in table.routes
        if route.next_hop
        and route.state != "pending"
        and any(network.contains(route.destination) for network in held.networks)
        and ((blackholes and (route.state == "blackhole" or route.marked)) or not held.ours.isdisjoint(route.next_hop))
        and not leased.overlap(route.destination)
    ]


class Patience:
    """Remembers since when routes are stale; only an unbroken time counts."""

    def __init__(self, grace: float = GRACE) -> None:
        self._grace = grace
        self._since: dict[TableRoute, float] = {}

    def ripe(self, found: Iterable[TableRoute], now: float) -> list[TableRoute]:
        """Of all the routes that are stale in this look, those that have been for long enough."""
        self._since = {route: self._since.get(route, now) for route in found}
        return [route for route, since in self._since.items() if now - since >= self._grace]

    def forget(self) -> None:
        """Begin anew: for a while it could not be known what is stale."""
        self._since.clear()


def nearly_full(table: Table) -> str:
    """A warning for a table that is close to its quota, "" for one that is not."""
    limit = table.limit or table.usual
    if limit is None or table.used < NEARLY_FULL * limit:
        return ""
    whose = "its quota is" if table.limit else "its own quota can't be seen, the usual one is"
    return f"{table.name} holds {table.used} routes and {whose} {limit}: have it raised before more hosts join"


class _Ranges:
    """Tells quickly whether a subnet overlaps any of many subnets, which may overlap each other."""

    def __init__(self, subnets: Iterable[Subnet]) -> None:
        self._exact: set[tuple[int, int]] = set()  # (first address, length)
        self._lengths: set[int] = set()
        self._firsts: list[int] = []
        for subnet in subnets:
            if subnet.bits == 32:
                self._exact.add((subnet.first, subnet.length))
                self._lengths.add(subnet.length)
                self._firsts.append(subnet.first)
        self._firsts.sort()

    def overlap(self, subnet: Subnet) -> bool:
        # One of them holds it (then its first address is ours, masked), or begins inside it.
        if any((subnet.first >> 32 - length << 32 - length, length) in self._exact for length in self._lengths):
            return True
        place = bisect_left(self._firsts, subnet.first)
        return place < len(self._firsts) and self._firsts[place] <= subnet.last
