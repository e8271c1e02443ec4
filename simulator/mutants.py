"""Deliberately broken variants of the product. Each must be caught: that is what shows the simulator's worth.

A mutant replaces one function of the product while it is entered. Nothing in the product knows of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec

from simulator import scenario as scenarios
from simulator.world import World
from wincey.agent import network as agent_network
from wincey.agent import preparation
from wincey.agent.network import Network
from wincey.agent.peers import Peers
from wincey.agent.planner import Planner
from wincey.agent.preparation import Preparation
from wincey.agent.reconciler import Reconciler
from wincey.agent.statefile import State
from wincey.agent.territory import Territory
from wincey.kernel import diff as kernel_diff
from wincey.leasing import holder
from wincey.leasing.allocate import Pool
from wincey.leasing.holder import Renewal
from wincey.model.errors import BadLease, HistoryLost, KeyConflict
from wincey.model.state import Changes, Object, Route
from wincey.store.etcd3 import Etcd3Store
from wincey.store.kv import Change
from wincey.store.registry import BadEntry, Registry, Snapshot

Patch = tuple[object, str, Any]


class Mutant(msgspec.Struct, frozen=True):
    """what: it does wrong. patches: what is replaced, made anew for each run."""

    what: str
    patches: Callable[[], list[Patch]]

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Break the product while entered."""
        with contextlib.ExitStack() as stack:
            for target, name, new in self.patches():
                stack.enter_context(mock.patch.object(target, name, new))
            yield


class Caught(msgspec.Struct, frozen=True):
    """By which invariant, and what it took: the number of seeds, or a scenario that was kept."""

    invariant: str
    took: str


def hunt(name: str, start: int, most: int) -> Caught | None:
    """Run seeds, of HOSTS hosts each, and then the kept scenarios, until one catches the mutant; None when none does."""
    tries = [(str(place + 1), scenarios.generate(start + place, hosts=HOSTS)) for place in range(most)]
    tries += [(path.stem, scenarios.Scenario.decode(path.read_bytes())) for path in sorted(KEPT.glob("*.json"))]
    for took, scenario in tries:
        with MUTANTS[name].applied():
            violations = World(scenario).run().violations
        if violations:
            if any(error in violations[0].text for error in ("AttributeError", "TypeError")):
                raise RuntimeError(f"{name} does not fit the product any more: {violations[0].text}")
            return Caught(violations[0].invariant, took)
    return None


KEPT = Path(__file__).parents[1] / "tests" / "simulator" / "scenarios"
MUTANTS: dict[str, Mutant] = {}
HOSTS = 4


def mutant(what: str) -> Callable[[Callable[[], list[Patch]]], Callable[[], list[Patch]]]:
    """Enter a mutant into MUTANTS, under its function's name."""

    def enter(patches: Callable[[], list[Patch]]) -> Callable[[], list[Patch]]:
        MUTANTS[patches.__name__] = Mutant(what, patches)
        return patches

    return enter


# Leases


@mutant("a lease is created without asking whether the key is absent")
def create_regardless() -> list[Patch]:
    real = Etcd3Store._put

    async def put(self: Etcd3Store, compare: dict[str, object], value: bytes, ttl: float | None, lost: Any) -> Any:
        key = compare["key"]
        if compare["target"] != "VERSION":
            return await real(self, compare, value, ttl, lost)
        found = await self.get(str(bytes(key), "utf-8"))  # type: ignore[call-overload]  # always bytes
        if found:
            compare = {"key": key, "target": "MOD", "mod_revision": found.revision}
        return await real(self, compare, value, ttl, lost)

    return [(Etcd3Store, "_put", put)]


@mutant("the choice of a subnet overlooks leases that overlap under another key")
def ignore_taken() -> list[Patch]:
    def taken(self: Pool, leased: Any) -> list[tuple[int, int]]:
        return []

    return [(Pool, "taken", taken), (holder, "losers", lambda mine, leases, identity: [])]


@mutant("a lease is never renewed")
def forget_to_renew() -> list[Patch]:
    async def run(self: Renewal) -> None:
        await asyncio.Event().wait()

    return [(Renewal, "run", run)]


@mutant("a lease is renewed when it has run out already")
def renew_too_late() -> list[Patch]:
    return [(holder, "renew_in", lambda left, margin, rng: left + 60.0)]


@mutant("the loss of the own lease goes unnoticed")
def ignore_own_removal() -> list[Patch]:
    async def take_in_own(self: Network, update: Any, attrs: Any) -> None:
        return None

    return [(Network, "_take_in_own", take_in_own)]


@mutant("a new round looks for any free subnet")
def move_at_will() -> list[Patch]:
    real = holder.acquire

    async def acquire(registry: Any, **given: Any) -> Any:
        held = given["held"]
        if held and (held.revision % 2):
            with contextlib.suppress(KeyConflict):
                await registry.release(held)
            given |= {"held": None, "previous": [], "snapshot": None}
        return await real(registry, **given)

    return [(agent_network, "acquire", acquire)]


@mutant("two hosts with one address are not told apart")
def no_claims() -> list[Patch]:
    async def stake(self: Network, prepared: Any) -> None:
        return None

    return [(Network, "_stake", stake)]


# What is seen of the store


@mutant("one change of a hundred that a watch tells is dropped")
def drop_one_event() -> list[Patch]:
    real, rng = Etcd3Store._changes, random.Random(1)

    def changes(self: Etcd3Store, *given: Any) -> list[Change]:
        return [change for change in real(self, *given) if rng.random() > 0.01]

    return [(Etcd3Store, "_changes", changes)]


@mutant("the removal of leases is overlooked")
def ignore_removals() -> list[Patch]:
    return [(Peers, "remove", lambda self, key, patience: None)]


@mutant("a lost history is ignored: the watch goes on from now")
def ignore_history_lost() -> list[Patch]:
    real = Registry.watch

    async def watch(self: Registry, after: int) -> AsyncIterator[Any]:
        while True:
            try:
                async for updates in real(self, after):
                    yield updates
            except HistoryLost:
                after = (await self.store.read_all(self.prefix + "/")).revision

    return [(Registry, "watch", watch)]


@mutant("a watch that connects again begins with what comes from now on")
def resume_from_now() -> list[Patch]:
    real = Etcd3Store._follow

    async def follow(self: Etcd3Store, prefix: str, cursor: Any, client: Any) -> AsyncIterator[list[Change]]:
        cursor.revision, cursor.newest, cursor.leased = (await self.read_all(prefix)).revision, None, None
        async for batch in real(self, prefix, cursor, client):
            yield batch

    return [(Etcd3Store, "_follow", follow)]


@mutant("whether a store was restored is not checked when a watch connects again")
def trust_the_past() -> list[Patch]:
    async def check(self: Etcd3Store, *given: Any) -> None:
        return None

    return [(Etcd3Store, "_check_past", check)]


@mutant("it is not checked where the last change was a deletion")
def trust_deletions() -> list[Patch]:
    real = Etcd3Store._check_past

    async def check(self: Etcd3Store, client: Any, prefix: str, cursor: Any) -> None:
        if cursor.newest and cursor.newest.gone:
            cursor = msgspec.structs.replace(cursor, newest=None, leased=None)
        await real(self, client, prefix, cursor)

    return [(Etcd3Store, "_check_past", check)]


@mutant("a watch that hears nothing never asks whether its member is alive")
def never_probe() -> list[Patch]:
    real = Etcd3Store.__init__

    def init(self: Etcd3Store, *given: Any, **named: Any) -> None:
        real(self, *given, **{**named, "probe_interval": 1e9})

    return [(Etcd3Store, "__init__", init)]


@mutant("one bad key makes the whole snapshot an empty one")
def bad_key_empties() -> list[Patch]:
    real = Registry.snapshot

    async def snapshot(self: Registry) -> Snapshot:
        found = await real(self)
        if found.bad:
            found.leases.clear()
        return found

    return [(Registry, "snapshot", snapshot)]


@mutant("one bad lease ends the agent")
def bad_key_raises() -> list[Patch]:
    def put_bad(self: Peers, bad: BadEntry) -> None:
        raise BadLease(bad.reason)

    return [(Peers, "put_bad", put_bad)]


@mutant("a change of the config is not followed")
def ignore_config() -> list[Patch]:
    real = Network._take_in

    async def take_in(self: Network, update: Any, attrs: Any) -> str | None:
        return None if update.what == "config" else await real(self, update, attrs)

    return [(Network, "_take_in", take_in)]


@mutant("the first refusal of a config is for ever")
def never_again() -> list[Patch]:
    async def consider(self: Preparation, snapshot: Snapshot, held: Any = None) -> Any:
        if getattr(self, "_mutant", None) is None:
            self._mutant = await real(self, snapshot, held)  # type: ignore[attr-defined]  # the mutant's own
        return self._mutant  # type: ignore[attr-defined]  # likewise

    real = Preparation.consider
    return [(Preparation, "consider", consider)]


# The host


@mutant("routes of other programs are deleted with ours")
def delete_foreign() -> list[Patch]:
    real = Territory._apply

    def apply(self: Territory) -> None:
        real(self)
        scope = self._reconciler.scope
        self._reconciler.scope = msgspec.structs.replace(scope, devices=(*scope.devices, "docker0"))

    return [(Territory, "_apply", apply)]


@mutant("what is there and not wanted is left")
def delete_nothing() -> list[Patch]:
    real = Reconciler._apply

    async def apply(self: Reconciler, changes: Changes) -> None:
        await real(self, Changes(changes.put))

    return [(Reconciler, "_apply", apply)]


@mutant("a failed change is not tried again, and audits find nothing")
def never_audit() -> list[Patch]:
    from wincey.agent import reconciler  # noqa: PLC0415  # only its name for `diff` is replaced

    real, first = kernel_diff.diff, set[int]()

    def diff(desired: Any, actual: Any) -> Changes:
        if id(desired) in first:
            return Changes()
        first.add(id(desired))
        return real(desired, actual)

    return [(reconciler, "diff", diff)]


@mutant("notices of the kernel and slow audits are both ignored")
def ignore_kernel() -> list[Patch]:
    return [(Reconciler, "suspect", lambda self, why: None), (Reconciler, "_pause", lambda self: 1e9)]


@mutant("what this host made is not remembered over a restart")
def forget_state() -> list[Patch]:
    return [(State, "_load", lambda self: None), (preparation, "published_macs", lambda attrs: {})]


@mutant("a changed address of the host is overlooked")
def ignore_address() -> list[Patch]:
    return [(Network, "host_changed", lambda self: None)]


@mutant("a copied machine keeps the MAC address of the original")
def keep_double_mac() -> list[Patch]:
    return [(Preparation, "is_double", lambda self, lease: False)]


@mutant("peers with another backend than ours are left out")
def no_helpers() -> list[Patch]:
    real = Planner.peer

    def peer(self: Planner, lease: Any) -> Any:
        return real(self, lease) if self._backend.reaches(lease.attrs) else []

    return [(Planner, "peer", peer)]


@mutant("routes are deleted before what takes their place is there")
def break_before_make() -> list[Patch]:
    real = Reconciler._apply

    async def apply(self: Reconciler, changes: Changes) -> None:
        routes: list[Object] = [item for item in self.desired.objects.values() if isinstance(item, Route)]
        if any(isinstance(item, Route) for item in changes.delete):
            await real(self, Changes(delete=routes))
            await asyncio.sleep(20.0)
            await real(self, Changes(put=routes))
        await real(self, changes)

    return [(Reconciler, "_apply", apply)]


@mutant("an outage of the store empties the table")
def outage_empties() -> list[Patch]:
    real = Network._on_outage

    def on_outage(self: Network, reason: str | None) -> None:
        if reason:
            for owner in list(self._reconciler.desired.owners):
                if owner:
                    self._reconciler.desired.put(owner, ())
            self._reconciler.apply_soon()
        real(self, reason)

    return [(Network, "_on_outage", on_outage)]
