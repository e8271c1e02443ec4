"""Taking a lease and keeping it: the I/O around `allocate` and `timing`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Sequence

import msgspec

from wincey.leasing.allocate import Identity, decide, losers
from wincey.leasing.timing import renew_in, retry_in
from wincey.model.address import Subnet
from wincey.model.config import NetworkConfig
from wincey.model.errors import BadLease, KeyConflict, KeyExists, StoreError
from wincey.model.lease import TTL, Lease, LeaseAttrs, LeaseKey
from wincey.store.registry import LeaseStore, Snapshot

log = logging.getLogger(__name__)


class Acquired(msgspec.Struct):
    """A lease that is ours, everything else as of just after we got it, and how many rounds it took.

    rest: leases of ours that do not fit the config any more, to `leave` once the host lives by the new one: until then nobody else may
    have their subnets.
    """

    lease: Lease
    snapshot: Snapshot
    rounds: int
    rest: tuple[Lease, ...] = ()


async def acquire(
    registry: LeaseStore,
    *,
    config: NetworkConfig,
    identity: Identity,
    attrs: LeaseAttrs,
    previous: Sequence[Subnet],
    held: Lease | None = None,
    rng: random.Random,
    snapshot: Snapshot | None = None,
) -> Acquired:
    """Get a lease that nobody else has, however many hosts want one at once.

    held: the lease that this host has, if any. snapshot: a recent one, to begin with. An unchanged lease of ours is only
    renewed, which wakes no watcher of the cluster. Raises OutOfSubnets, StoreError.
    """
    rounds = 0
    while True:
        rounds += 1
        snapshot = snapshot or await registry.snapshot()
        garbled = _garbled(snapshot)
        mine = next(
            (bad for key, bad in garbled.items() if set(key.subnets) <= set(previous) and config.allows(key)), None
        )
        decision = decide(
            config,
            list(snapshot.leases.values()),
            identity,
            previous=previous,
            blocked=[subnet for key in garbled for subnet in key.subnets],
            held=held,
            rng=rng,
        )
        try:
            if mine and not decision.reuse:
                log.warning("the lease %s that this host had is unreadable in the store; putting it back", mine.key)
                lease = await registry.update(mine, attrs)
            elif decision.take:
                lease = await registry.create(decision.take, attrs)
            else:
                assert decision.reuse
                lease = await _take_over(registry, decision.reuse, attrs)
        except (KeyExists, KeyConflict):
            # Another host was faster. The pause grows with the rounds, so that a stampede thins out.
            await asyncio.sleep(rng.uniform(0, min(1.0, 0.02 * rounds)))
            snapshot = None
            continue
        if decision.take:
            snapshot = None  # two of 10,000 leases at once are many megabytes
            snapshot = await registry.snapshot()  # who else created what at the same time
            if registry.lease_key(lease.key) not in snapshot.leases:
                log.warning("our new lease %s is not in the store any more; getting one again", lease.key)
                await asyncio.sleep(rng.uniform(0, min(1.0, 0.02 * rounds)))
                snapshot = None
                continue
        if older := losers(lease, snapshot.leases.values(), identity):
            log.warning("subnet %s overlaps the older lease %s; taking another", lease.key, older[0].key)
            await _release(registry, lease)
            snapshot = None
            continue
        for stale in decision.drop:
            snapshot.leases.pop(registry.lease_key(stale.key), None)
        return Acquired(lease, snapshot, rounds, decision.drop)


async def leave(registry: LeaseStore, rest: Sequence[Lease]) -> None:
    """Release leases that a new one has taken the place of. Raises StoreError."""
    for stale in rest:
        log.info("releasing our lease %s, which does not fit the network config any more", stale.key)
        await _release(registry, stale)


def _garbled(snapshot: Snapshot) -> dict[LeaseKey, Lease]:
    """Leases with a good key and an unreadable value, without attributes."""
    garbled = {}
    for bad in snapshot.bad.values():
        with contextlib.suppress(BadLease):
            key = LeaseKey.parse(bad.key.rpartition("/")[2])
            garbled[key] = Lease(key, LeaseAttrs(), bad.revision)
    return garbled


async def _take_over(registry: LeaseStore, lease: Lease, attrs: LeaseAttrs) -> Lease:
    if lease.attrs != attrs:
        return await registry.update(lease, attrs)
    return lease if lease.permanent else await registry.renew(lease)


async def _release(registry: LeaseStore, lease: Lease) -> None:
    with contextlib.suppress(KeyConflict):  # changed since we read it: the watch will tell
        await registry.release(lease)


class Renewal:
    """Renews a lease for as long as it is ours. `lease` is the latest state of it; `seen` takes what the watch saw.

    ends: when it expires, by the event loop's clock; None for one just taken or renewed, and for a reservation.
    """

    def __init__(
        self, registry: LeaseStore, lease: Lease, margin: float, rng: random.Random, ends: float | None = None
    ) -> None:
        self.lease = lease
        self._registry, self._margin, self._rng = registry, margin, rng
        self._kick = asyncio.Event()
        self.ends = ends

    def left(self) -> float | None:
        """Seconds until it expires unless it is renewed; None for a reservation, and before the store was asked."""
        return None if self.ends is None else self.ends - asyncio.get_running_loop().time()

    def _lasts(self, left: float | None) -> None:
        self.ends = None if left is None else asyncio.get_running_loop().time() + left

    def seen(self, lease: Lease) -> None:
        """Our key changed in the store (by us or by an administrator): look at its time limit again."""
        if lease.revision > self.lease.revision:
            self.lease = lease
            self._kick.set()

    def soon(self) -> None:
        """Renew now, as after an outage of the store."""
        self._kick.set()

    async def run(self) -> None:
        """Renew until the lease is lost; then return."""
        known = self.left()
        left: float | None = None if self.lease.permanent else TTL if known is None else max(0.0, known)
        failures = 0
        self._lasts(left)
        while True:
            pause = None if left is None else renew_in(left, self._margin, self._rng)
            if failures:
                pause = retry_in(failures, self._rng)
            due = False
            try:
                async with asyncio.timeout(pause):
                    await self._kick.wait()
                self._kick.clear()
            except TimeoutError:
                due = True
            lease = self.lease
            try:
                left = await self._registry.time_left(lease)
                if left is not None and (due or left < TTL * 0.9):
                    lease = await self._registry.renew(lease)
                    left = TTL
            except KeyConflict:
                if self.lease.revision > lease.revision:
                    self._kick.set()  # our own newer state, seen while the call was under way
                    continue
                return
            except StoreError as error:
                failures += 1
                level = logging.WARNING if failures in {1, 10} or failures % 60 == 0 else logging.DEBUG
                log.log(level, "the lease %s could not be renewed (attempt %d): %s", lease.key, failures, error)
                continue
            failures = 0
            self._lasts(left)
            if lease.revision >= self.lease.revision:
                self.lease = lease
