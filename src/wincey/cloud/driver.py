"""The reconciler's driver for route tables in a cloud: few calls, patience with an API that throttles, one line a failure.

The reconciler audits each minute and whenever something may have changed; the API must not see that. So the tables are read

- when the daemon starts, and before anything is put or deleted,
- a minute after something was put, to see whether it lasted (rule 5 of wincey.cloud.table),
- when a stale route has been stale for long enough,
- and slowly for ever: each 5 minutes, or 3 seconds for each lease where that is longer, a quarter more or less by chance. So
  a cluster of any size makes about one look in 3 seconds, or fewer: a small part of what the clouds allow an account.

In between an audit is answered out of the last look. A look is two calls, tables and hosts; nothing is called per peer.

After a failure that kind of call rests for a while (wincey.cloud.backoff), after throttling or without an answer every kind.
The reconciler is told the same reason meanwhile, once for all objects that have it.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import msgspec

from wincey.cloud.backoff import Backoff
from wincey.cloud.dialects import Opens, open_dialect
from wincey.cloud.errors import CloudConflict, CloudError, CloudForeign, CloudThrottled, CloudUnavailable
from wincey.cloud.memory import Memory
from wincey.cloud.table import (
    GRACE,
    CloudHost,
    Dialect,
    Held,
    Hosts,
    Patience,
    Routes,
    Table,
    TableRoute,
    by_destination,
    check_room,
    nearly_full,
    put_into,
    stale,
    steps,
    without,
)
from wincey.model.address import Subnet, format_address
from wincey.model.cloud import CloudForwarding, CloudLease, CloudRoute, CloudTable, HostRef
from wincey.model.state import Changes, Failure, Key, Object, Scope

log = logging.getLogger(__name__)

LOOK_EVERY, LOOK_PER_LEASE = 300.0, 3.0
"""Seconds between looks without a cause: the greater of the first, and the second for each lease."""

LOOK_AGAIN = 60.0  # seconds after a change
FRESH = 2.0  # seconds for which a look is good enough to act on
_WRITES = ("create", "replace", "delete")
DEADLINE = 15.0
"""Seconds that a call may take: the rest of the host is not looked after meanwhile."""


class CloudDriver:
    """Keeps the routes of one network. directory: where to remember which tables were used, None to remember nothing.

    now: a clock in seconds that only goes forward. grace: see wincey.cloud.table.
    """

    handles: tuple[type[Object], ...] = (CloudTable, CloudForwarding, CloudLease, CloudRoute)

    def __init__(
        self,
        directory: Path | None,
        *,
        rng: random.Random,
        now: Callable[[], float] = time.monotonic,
        opens: Opens = open_dialect,
        grace: float = GRACE,
    ) -> None:
        self._memory, self._rng, self._now, self._opens = Memory(directory), rng, now, opens
        self._grace = grace * rng.uniform(1, 2)  # of many hosts one deletes a stale route before the others look
        self._patience = Patience(self._grace)
        self._table: CloudTable | None = None
        self._dialect: Dialect | None = None
        self._backoffs: dict[Key, Backoff] = defaultdict(lambda: Backoff(rng))  # by kind of call, or by object
        self._hosts: Hosts = {}
        self._known: dict[HostRef, CloudHost] = {}
        self._asked: set[HostRef] = set()
        self._tables: Sequence[Table] = ()
        self._routes: Routes = {}
        self._looked: float | None = None
        self._next_look = 0.0
        self._current = True
        self._ripe: list[TableRoute] = []
        self._wanted: dict[Key, HostRef] = {}  # routes and forwarding
        self._leased: dict[Key, Subnet] = {}  # routes and leases
        self._ours: set[str] = set()
        self._networks: tuple[Subnet, ...] = ()
        self._at_once = False
        self._left: float | None = None  # when it was first seen that no table is wanted any more
        self._told: set[str] = set()
        self._lock = asyncio.Lock()

    async def observe(self, desired: Mapping[Key, Object], scope: Scope) -> dict[Key, Object]:
        """See kernel.driver.Driver. Without a cause to look, what was there at the last look."""
        async with self._lock:
            self._networks, self._current = tuple(scope.networks), scope.current
            table = desired.get((CloudTable.tag,))
            if not isinstance(table, CloudTable):
                self._at_once = not desired  # nothing of any kind is wanted: the host is cleaned up
                return self._leftovers()
            await self._take_in(table, desired)
            if self._wanted and (self._looked is None or self._now() >= self._next_look):
                await self._attempt("look", self._look)
            self._judge()
            return self._found(desired)

    async def apply(self, changes: Changes) -> Sequence[Failure]:
        """See kernel.driver.Driver. One failure for each reason, however many objects have it."""
        async with self._lock:
            leaving = next((item for item in changes.delete if isinstance(item, CloudTable)), None)
            if leaving:
                return await self._leave(leaving)
            for item in changes.delete:
                self._forget(item)
            for item in changes.put:
                self._note(item)
            self._judge()
            failures: dict[str, list[Object]] = {}
            for item, work in [
                *((item, self._delete) for item in changes.delete),
                *((item, self._put) for item in changes.put),
            ]:
                if reason := await work(item):
                    failures.setdefault(reason, []).append(item)
        return [
            Failure(items[0], reason if len(items) == 1 else f"{reason} ({len(items) - 1} more like it)")
            for reason, items in failures.items()
        ]

    def watch(self, changed: Callable[[str], None]) -> None:
        """A cloud tells nothing: the tables are looked at now and then."""

    async def close(self) -> None:
        """End connections. The routes stay."""
        async with self._lock:
            await self._drop_dialect()

    # What is wanted and known.

    async def _take_in(self, table: CloudTable, desired: Mapping[Key, Object]) -> None:
        if table != self._table:
            await self._drop_dialect()
            before = self._table or self._memory.load()
            if before and (dropped := set(before.tables).difference(table.tables) if table.tables else ()):
                log.warning(
                    "the config names %s no more: routes to this host may be left there, delete them by hand",
                    ", ".join(sorted(dropped)),
                )
            if table.own is None:
                self._memory.forget()  # the routes are the server's to keep
            self._table, self._looked = table, None
            self._backoffs.clear()
        self._left = None
        if table.network not in self._networks:
            self._networks = (*self._networks, table.network)
        self._wanted, self._leased = {}, {}
        for item in desired.values():
            self._note(item)

    def _note(self, item: Object) -> None:
        if isinstance(item, CloudRoute | CloudLease):
            self._leased[item.key] = item.destination
            self._ours.update(_names(item.host))
        if isinstance(item, CloudRoute | CloudForwarding):
            self._wanted[item.key] = item.host

    def _forget(self, item: Object) -> None:
        self._leased.pop(item.key, None)
        self._wanted.pop(item.key, None)
        self._backoffs.pop(item.key, None)

    def _judge(self) -> None:
        """See what is stale, by the last look and what is known of leases by now."""
        if not self._current:  # there may be leases that we don't know of
            self._patience.forget()
        found = stale(self._tables, Held(self._leased.values(), self._ours, self._networks)) if self._current else []
        self._ripe = self._patience.ripe(found, self._now())

    def _found(self, desired: Mapping[Key, Object]) -> dict[Key, Object]:
        found: dict[Key, Object] = {}
        for key, item in desired.items():
            if isinstance(item, CloudTable | CloudLease):
                found[key] = item
            elif self._looked is not None and isinstance(item, CloudForwarding):
                if (host := self._hosts.get(item.host)) and host.forwards:
                    found[key] = item
            elif self._looked is not None and isinstance(item, CloudRoute):
                routes = self._routes.get(item.destination, {})
                if self._is_there(item, routes):
                    found[key] = item
                elif routes:
                    found[key] = _as_object(next(iter(routes.values())))
        for route in self._ripe:
            found[(CloudRoute.tag, route.destination)] = _as_object(route)
        return found

    def _is_there(self, item: CloudRoute, routes: Mapping[str, TableRoute]) -> bool:
        host = self._hosts.get(item.host)
        try:
            return host is not None and not steps(self._tables, routes, item.destination, host)
        except CloudForeign:
            return False

    # Calls.

    async def _attempt(self, kind: str, call: Callable[[], Awaitable[None]]) -> str:
        """Do it unless that kind of call rests; returns why it is not done, "" if it is. Raises CloudConflict."""
        everything, own = self._backoffs[("all",)], self._backoffs[(kind,)]
        for backoff in (everything, own):
            if backoff.waiting(self._now()):
                return backoff.reason
        try:
            # A call that takes longer ends by itself, in a thread perhaps.
            async with asyncio.timeout(DEADLINE):
                await call()
        except (CloudThrottled, CloudUnavailable) as error:
            return everything.failed(str(error), self._now())
        except CloudError as error:
            if isinstance(error, CloudConflict) and kind in _WRITES:
                raise
            return own.failed(str(error), self._now())
        except TimeoutError:
            return everything.failed(f"{self._table}: no answer in {DEADLINE:.0f} s", self._now())
        if everything.worked() or own.worked():
            log.info("%s: works again (%s)", self._table, kind)
        return ""

    async def _look(self) -> None:
        assert self._table
        if self._dialect is None:
            self._dialect = self._opens(self._table)
        asked = set(self._wanted.values())
        hosts = await self._dialect.hosts(sorted(asked, key=str))
        # Those that are gone have left routes in the tables that theirs were.
        self._known.update(hosts)
        tables = await self._dialect.tables(self._known)
        self._hosts, self._asked, self._tables, self._routes = hosts, asked, tables, by_destination(tables)
        self._looked = self._now()
        self._ours.update(name for host in self._hosts.values() for name in host.next_hop)
        pause = max(LOOK_EVERY, LOOK_PER_LEASE * len(self._leased)) * self._rng.uniform(0.75, 1.25)
        if any(route.state == "pending" for routes in self._routes.values() for route in routes.values()):
            pause = LOOK_AGAIN
        self._next_look = self._looked + pause
        warnings = {warning for table in tables if (warning := nearly_full(table))}
        for warning in sorted(warnings - self._told):
            log.warning("%s", warning)
        self._told = warnings

    async def _look_now(self) -> str:
        """Have a look that is good enough to act on; returns why there is none."""
        fresh = self._looked is not None and self._now() - self._looked <= FRESH
        if fresh and self._asked.issuperset(self._wanted.values()):
            return ""
        reason = await self._attempt("look", self._look)
        self._judge()
        return reason

    async def _put(self, item: Object) -> str:
        """Returns why it can't be done, "" if it is. What concerns this object alone holds up no other."""
        if not isinstance(item, CloudRoute | CloudForwarding):
            return ""
        own = self._backoffs[item.key]
        if own.waiting(self._now()):
            return own.reason
        try:
            try:
                reason = await self._make(item)
            except CloudConflict:  # by another host, or by hand, a moment ago
                self._looked = None
                reason = await self._make(item)
        except CloudError as error:
            return own.failed(str(error), self._now())
        if not reason:
            own.worked()
        return reason

    async def _make(self, item: CloudRoute | CloudForwarding) -> str:
        assert self._table
        if reason := await self._look_now():
            return reason
        assert self._dialect
        dialect, host = self._dialect, self._hosts.get(item.host)
        if host is None:
            raise CloudError(
                f"{self._table.provider} has no instance {item.host} in the network of the tables, or the address that the"
                " host's lease publishes is not that instance's"
            )
        if isinstance(item, CloudForwarding):
            if host.forwards:
                return ""
            reason = await self._attempt("forward", partial(dialect.allow_forwarding, host))
            if not reason:
                self._hosts = {**self._hosts, item.host: msgspec.structs.replace(host, forwards=True)}
            return reason
        for step in steps(self._tables, self._routes.get(item.destination, {}), item.destination, host):
            check_room(self._tables, step)
            self._memory.save(self._table)
            kind = "create" if step.old is None else "replace"
            if reason := await self._attempt(kind, partial(dialect.put, step)):
                return reason
            self._tables = put_into(self._tables, step)
            self._routes = by_destination(self._tables)
            self._next_look = min(self._next_look, self._now() + LOOK_AGAIN)
        return ""

    async def _delete(self, item: Object) -> str:
        """Only what is ripe: a route that is not wanted any more goes when it has been stale for long enough."""
        if not isinstance(item, CloudRoute) or not any(r.destination == item.destination for r in self._ripe):
            return ""
        if reason := await self._look_now():
            return reason
        for route in [route for route in self._ripe if route.destination == item.destination]:
            if reason := await self._remove(route):
                return reason
        return ""

    async def _remove(self, route: TableRoute) -> str:
        assert self._dialect
        try:
            reason = await self._attempt("delete", partial(self._dialect.delete, route))
        except CloudConflict:  # it is not as it was listed: another host has put it
            self._looked = None
            return ""
        if not reason:
            log.info("deleted: %s", route)
            self._tables = without(self._tables, route)
            self._routes = by_destination(self._tables)
        return reason

    # The end: another backend, or no network any more.

    def _leftovers(self) -> dict[Key, Object]:
        """Where our route may be left; a server has none of its own."""
        table = self._table or self._memory.load()
        if table is None or (table.own is None and self._looked is None):
            return {}
        if self._left is None:
            self._left = self._now()
        return {table.key: table}

    async def _leave(self, table: CloudTable) -> Sequence[Failure]:
        """Delete what leads to this host. In a running network only after a while: peers have to learn of another way first."""
        if self._left is None:
            self._left = self._now()
        if not self._at_once and self._now() - self._left < self._grace:
            return []
        if self._table is None:
            self._table = table
        self._leased = {}
        if table.own:
            self._wanted = {table.key: table.own}
        reason = await self._look_now()
        if not reason:
            names = self._ours
            if table.own:
                names = {*_names(table.own), *(name for host in self._hosts.values() for name in host.next_hop)}
            networks = (*self._networks, table.network)
            for route in stale(self._tables, Held((), names, networks), blackholes=False):
                reason = reason or await self._remove(route)
        if reason:
            return [Failure(table, reason)]
        self._memory.forget()
        self._table = self._left = None
        await self._drop_dialect()
        return []

    async def _drop_dialect(self) -> None:
        dialect, self._dialect, self._looked = self._dialect, None, None
        if dialect:
            await dialect.close()


def _names(host: HostRef) -> set[str]:
    return {name for name in (host.instance, format_address(host.address) if host.address else "") if name}


def _as_object(route: TableRoute) -> CloudRoute:
    return CloudRoute(route.destination, HostRef(route.next_hop[0] if route.next_hop else "what is no host"))
