"""One network's life on this host: read the config, find the interface, take a lease, make the host so, follow the leases.

The life is one loop. Each round reads the store anew, prepares, makes sure of the lease, and then follows changes until
something needs a new round: the config or the host's address changed, the lease was lost, the store lost its history. So
start, change and recovery are one path. Whatever fails in a later round leaves the state of the earlier one in force, and
packets flow on it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import TypeVar

import msgspec

from wincey.agent.company import NetworkConflict, Seat
from wincey.agent.envfile import EnvFile, EnvPublisher
from wincey.agent.once import Once
from wincey.agent.peers import COME_BACK_AFTER_LOSS, COMES_BACK, LOCAL, Peers
from wincey.agent.planner import Planner, Policy
from wincey.agent.preparation import Ask, Look, Preparation, Prepared, ask_nothing
from wincey.agent.reconciler import Reconciler, causes
from wincey.agent.statefile import State
from wincey.agent.territory import Territory
from wincey.leasing.claims import Claim, Host
from wincey.leasing.holder import Acquired, Renewal, acquire, leave
from wincey.leasing.timing import retry_in
from wincey.model.address import Subnet, format_address
from wincey.model.config import NetworkConfig
from wincey.model.errors import (
    BadConfig,
    DuplicateHost,
    HistoryLost,
    NotJoinable,
    OutOfSubnets,
    StoreDenied,
    StoreError,
    UnknownBackend,
)
from wincey.model.lease import Lease, LeaseAttrs
from wincey.model.probe import Target
from wincey.model.state import RuleSet
from wincey.store.registry import BadEntry, LeaseStore, Snapshot, Update

log = logging.getLogger(__name__)

T = TypeVar("T")


class _OutOfDate(Exception):
    """What was prepared is not what the store says by now: prepare again."""


AGAIN = 8.0
"""Seconds, with jitter, after which a running host tries again what was not possible; twice as many each time it is not again."""

AT_THE_LATEST = 300.0
"""What these grow to: thousands of hosts that can't have what they should must not wear the store out."""


class Settings(msgspec.Struct, frozen=True):
    """What the command line says. margin: seconds before the end of a lease by which it must be renewed."""

    subnet_file: str
    margin: float
    policy: Policy = Policy()


class Network:
    """The life of one network. `on_ready(reason)` is told None when containers can be started, or why not (yet).

    ask: what the backend has to know of this host besides (see HostFacts.found). seat: its place among the host's networks,
    None where it is the only one. targets: kept as the peers that can be asked whether they answer.
    """

    def __init__(
        self,
        settings: Settings,
        registry: LeaseStore,
        reconciler: Reconciler,
        *,
        state: State,
        host: Host,
        look: Look,
        choose_rules: Callable[[NetworkConfig], Awaitable[None]],
        on_ready: Callable[[str | None], None],
        rng: random.Random,
        ask: Ask = ask_nothing,
        seat: Seat | None = None,
        targets: dict[str, Target] | None = None,
    ) -> None:
        self._seat = seat
        self._settings, self.registry, self._reconciler = settings, registry, reconciler
        self._host, self._look, self._on_ready, self._rng = host, look, on_ready, rng
        self._choose_rules = choose_rules
        self._env = EnvPublisher(settings.subnet_file)
        self._territory = Territory(state, reconciler)
        self.prepared: Prepared | None = None
        self._lease: Lease | None = None
        self._lease_ends: float | None = None  # see Renewal
        self._claim: Claim | None = None
        self._renewal: Renewal | None = None
        self._again_in: float | None = None  # seconds after which to try again what was not possible as wanted
        self._crowded = False  # it was not possible as no subnet was free
        self._host_changed = asyncio.Event()
        self._once = Once()
        self._preparation = Preparation(registry, look, state, self._once, ask=ask, seat=seat)
        self._peers = Peers(reconciler, self._territory, self._once, targets)
        self.outage: str | None = None
        """Why the store can't be reached, None while it can."""
        registry.on_outage(self._on_outage)

    @property
    def subnet_file(self) -> str:
        """Where the subnet and the MTU are told to runtimes."""
        return self._settings.subnet_file

    @property
    def planner(self) -> Planner | None:
        """What plans for the peers, None before there is a lease."""
        return self._peers.planner

    @property
    def bad(self) -> Mapping[str, BadEntry]:
        """The leases that can't be read, by key."""
        return self._peers.bad

    @property
    def lease(self) -> Lease | None:
        """Ours, as last seen in the store; None before there is one."""
        return self._renewal.lease if self._renewal else self._lease

    def lease_left(self) -> float | None:
        """Seconds until our lease expires unless it is renewed; None for a reservation, and while it is not known."""
        return self._renewal.left() if self._renewal else None

    def host_changed(self) -> None:
        """An address or link of the host changed: look again."""
        self._host_changed.set()

    def reconsider(self) -> None:
        """What the backend asks of this host may have another answer by now."""
        if self.prepared:
            self.prepared.awaits_host = True
        self.host_changed()

    def company_changed(self) -> None:
        """The host's other networks have something else by now: keep apart from that at once, then look at all anew."""
        planner = self._peers.planner
        if planner and self._seat:
            planner.others = self._seat.others()
            self._reconciler.desired.put(LOCAL, planner.local())
            self._reconciler.apply_soon()
        self.reconsider()

    async def run(self) -> None:
        """Live until cancelled. Raises WinceyError when the host can't join; later failures are waited out."""
        while True:
            try:
                reason = await self._follow(*await self._join())
            except _OutOfDate as out_of_date:
                reason = str(out_of_date)
            level = logging.INFO if self._again_in is None else logging.DEBUG
            log.log(level, "looking at everything anew: %s", reason)

    async def _join(self) -> tuple[int, LeaseAttrs]:
        """Get ready, get a lease, become what it says; returns the revision to follow from, and what we published.

        The snapshots end here: 10,000 leases that nobody needs any more are many megabytes.
        """
        prepared, snapshot = await self._prepare()
        # The data of all hosts were lost, not those of some who left: ours went with them.
        if self._claim:
            lost = self._claim.key not in snapshot.claims
        else:
            lost = self._lease is not None and self.registry.lease_key(self._lease.key) not in snapshot.leases
        patience = COME_BACK_AFTER_LOSS if lost else COMES_BACK
        attrs = prepared.backend.attrs()
        # Until this host is what a lease says, it has nothing to go on with where a round fails.
        known = snapshot if self._peers.planner else None
        early = known is not None and self._keeps_its_lease(prepared.config, snapshot)
        if self._lease is None and self._was_robbed(prepared.config.networks, snapshot):
            self._reconciler.spare(COME_BACK_AFTER_LOSS)
        # Then nothing but the first attempt needs the snapshot: it must not stand in memory beside the next one.
        recent = [snapshot]
        del snapshot
        try:
            await self._stake(prepared)
            if early and known:
                # Peers send in the new way as soon as it is published: by then it has to work.
                await self._become(prepared, known, patience)
            acquired = await self._acquire(prepared, attrs, recent)
        except (DuplicateHost, OutOfSubnets) as error:
            if known is None:
                raise
            return self._stay(error, known)
        moved = self._lease is None or acquired.lease.key != self._lease.key
        if moved:
            rounds = f" after {acquired.rounds} rounds" if acquired.rounds > 1 else ""
            log.info("lease acquired: %s%s", acquired.lease.key, rounds)
        self._lease, self._lease_ends = acquired.lease, None
        if (acquired.snapshot.config or b"") != prepared.raw:
            raise _OutOfDate("the network config changed meanwhile")
        if any(map(self._must_yield_to, acquired.snapshot.leases.values())):
            raise _OutOfDate("another host came meanwhile and has the MAC address of this one")
        if claim := self._claim:  # what happened to it before the watch begins
            await self._patiently(lambda: claim.seen(acquired.snapshot.claims.get(claim.key)))
        if moved or not early:
            await self._become(prepared, acquired.snapshot, patience)
        elif acquired.snapshot is not known:
            # It took a second reading: the watch begins after that one, and never tells what came between the two.
            self._peers.put_all(acquired.snapshot, patience)
            self._reconciler.apply_soon()
        await self._patiently(lambda: leave(self.registry, acquired.rest))
        return acquired.snapshot.revision, attrs

    def _was_robbed(self, networks: Sequence[Subnet], snapshot: Snapshot) -> bool:
        """Whether this host had a subnet in its networks, and nobody has it now: the store may have lost the data of all hosts."""
        previous = {subnet.masked() for subnet in self._env.previous.subnets}
        return (
            bool(previous)
            and set(networks) == {network.masked() for network in self._env.previous.networks}
            and not any(previous.intersection(lease.key.subnets) for lease in snapshot.leases.values())
        )

    def _must_yield_to(self, lease: Lease) -> bool:
        assert self._lease
        assert self.prepared
        older = lease.created < self._lease.created and not self.prepared.identity.owns(lease.attrs)
        return older and self._preparation.is_double(lease)

    def _keeps_its_lease(self, config: NetworkConfig, snapshot: Snapshot) -> bool:
        if self._lease is None or not config.allows(self._lease.key):
            return False
        found = snapshot.leases.get(self.registry.lease_key(self._lease.key))
        return found is not None and found.attrs == self._lease.attrs

    async def _acquire(self, prepared: Prepared, attrs: LeaseAttrs, recent: list[Snapshot]) -> Acquired:
        """recent: for the first attempt: the later ones begin with what the earlier ones may have done."""
        held = self._lease
        previous = [
            *(held.key.subnets if held else ()),
            *(subnet.masked() for subnet in self._env.previous.subnets),
        ]
        return await self._patiently(
            lambda: acquire(
                self.registry,
                config=prepared.config,
                identity=prepared.identity,
                attrs=attrs,
                previous=previous,
                held=held,
                rng=self._rng,
                snapshot=recent.pop() if recent else None,
            )
        )

    def _stay(self, error: DuplicateHost | OutOfSubnets, snapshot: Snapshot) -> tuple[int, LeaseAttrs]:
        """Go on as we are, among the peers that there are, where a running host can't have what it should by now."""
        assert self._lease
        self._once.warn("joining", f"{error}; going on as before with {self._lease.key}, and trying again")
        crowded = isinstance(error, OutOfSubnets)
        if crowded:
            self._on_ready(str(error))
        # Each attempt at another host's address is one line in that host's log.
        self._try_again(AGAIN if crowded else 10 * AGAIN)
        self._crowded = crowded
        self._peers.put_all(snapshot, COMES_BACK)
        self._reconciler.apply_soon()
        return snapshot.revision, self._lease.attrs

    def _try_again(self, least: float) -> None:
        self._again_in = min(AT_THE_LATEST, max(least, 2 * (self._again_in or 0)))

    async def _patiently(self, call: Callable[[], Awaitable[T]]) -> T:
        """Do it until the store answers."""
        failures = 0
        while True:
            try:
                answer = await call()
            except StoreError as error:
                failures += 1
                self.outage = str(error)
                level = logging.ERROR if failures in {1, 10} or failures % 60 == 0 else logging.DEBUG
                log.log(level, "%s (attempt %d; trying on)", error, failures)
                if self._lease is None:
                    self._on_ready(str(error))
                await asyncio.sleep(min(5.0, retry_in(failures, self._rng)))
            else:
                self.outage = None
                return answer

    async def _prepare(self) -> tuple[Prepared, Snapshot]:
        """Wait for a config that works; one that doesn't is passed over where an earlier one is in force."""
        told = ""
        while True:
            snapshot = await self._patiently(self.registry.snapshot)
            try:
                self.prepared = await self._preparation.consider(snapshot, self._lease)
                return self.prepared, snapshot
            except (BadConfig, NotJoinable) as error:
                if self.prepared:
                    log.error("%s; going on with what was in force before", error)
                    # Remember what was refused, or its presence would look like a change for ever.
                    self.prepared.raw = snapshot.config or b""
                    # With the config it can be had again at the next change; with the host, at that of the host.
                    self.prepared.awaits_host = isinstance(error, (NotJoinable, NetworkConflict))
                    return self.prepared, snapshot
                if isinstance(error, (UnknownBackend, NotJoinable)):
                    raise
                if str(error) != told:
                    told = str(error)
                    log.error("%s; waiting for a config that works", error)
                    self._on_ready(told)
            await asyncio.sleep(self._rng.uniform(0.8, 1.2))

    async def _stake(self, prepared: Prepared) -> None:
        claims = self.registry.claims
        if claims is None:
            return
        address = prepared.identity.public_ip or prepared.identity.public_ipv6
        assert address
        key = self.registry.claim_key(format_address(address))
        if self._claim and self._claim.key == key:
            return
        claim = Claim(claims, key, self._host)

        async def stake() -> None:
            try:
                await claim.stake()
            except StoreDenied as error:
                log.warning(
                    "no protection against a second host with our address: %s may not be written: %s", key, error
                )

        await self._patiently(stake)
        self._claim = claim

    async def _become(self, prepared: Prepared, snapshot: Snapshot, patience: float) -> None:
        """Make the host as config and leases say, then tell the world. patience: see Peers.put_all."""
        assert self._lease
        self._peers.planner = Planner(
            config=prepared.config,
            host=prepared.facts,
            backend=prepared.backend,
            identity=prepared.identity,
            own=self._lease.key,
            policy=self._settings.policy,
            others=self._seat.others() if self._seat else None,
        )
        desired, networks, local = self._reconciler.desired, prepared.config.networks, self._peers.planner.local()
        self._territory.claim([*networks, *self._env.previous.networks], local)
        desired.put(LOCAL, local)
        self._peers.put_all(snapshot, patience)
        if any(isinstance(item, RuleSet) for item in desired.objects.values()):
            try:
                await self._choose_rules(prepared.config)
            except NotJoinable as error:
                if not self._env.written:
                    raise
                log.error("%s; the traffic rules stay in the hands of the program that keeps them now", error)
        failures = await self._reconciler.settle()
        # What a peer with another backend would need is no reason to stay outside.
        own = {item.key for item in local}
        essential = [each for each in causes(failures) if each.object.essential and each.object.key in own]
        if essential and not self._env.written:
            raise NotJoinable("; ".join(f"{failure.object}: {failure.reason}" for failure in essential[:3]))
        if not failures and not self._reconciler.sparing:
            self._territory.settle(networks)
        env = EnvFile.of(
            prepared.config, self._lease.key, mtu=prepared.backend.mtu, ip_masq=self._settings.policy.masquerade
        )
        reason = self._env.publish(env)
        self._on_ready(reason)
        self._crowded = False
        if reason:
            self._try_again(AGAIN)
        else:
            self._again_in = None

    async def _follow(self, revision: int, attrs: LeaseAttrs) -> str:
        """Take in changes until a new round is needed; returns why."""
        assert self._lease
        self._renewal = Renewal(self.registry, self._lease, self._settings.margin, self._rng, self._lease_ends)
        coroutines: list[Coroutine[None, None, str]] = [
            self._watch_store(revision, attrs),
            self._watch_lease(self._renewal),
            self._watch_host(),
        ]
        if self._claim:
            coroutines.append(self._claim.keep(self._settings.margin, self._rng))
        if self._again_in is not None:
            coroutines.append(self._wait(self._again_in * self._rng.uniform(0.75, 1.25)))
        tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            return next(task for task in tasks if task.done()).result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._lease, self._lease_ends, self._renewal = self._renewal.lease, self._renewal.ends, None

    async def _wait(self, seconds: float) -> str:
        await asyncio.sleep(seconds)
        return "it may be possible now"

    async def _watch_lease(self, renewal: Renewal) -> str:
        await renewal.run()
        renewal.ends = None
        return f"our lease {renewal.lease.key} was lost"

    async def _watch_host(self) -> str:
        assert self.prepared
        told = ""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(AGAIN if told else None):  # nothing tells when what was in the way is gone
                    await self._host_changed.wait()
            await asyncio.sleep(0.5)  # addresses mostly change in several steps
            self._host_changed.clear()
            try:
                facts = self._look(self.prepared.config)
            except NotJoinable as error:
                if str(error) != told:
                    told = str(error)
                    log.warning("%s; going on with what was in force before", told)
                continue
            told = ""
            if msgspec.structs.replace(facts, found=self.prepared.facts.found) != self.prepared.facts:
                return f"the interface or address of this host changed ({facts.underlay})"
            if self.prepared.awaits_host:
                return "what kept this host from following its config, or its other networks, may have changed"

    async def _watch_store(self, revision: int, attrs: LeaseAttrs) -> str:
        try:
            async for updates in self.registry.watch(revision):
                for update in updates:
                    if reason := await self._take_in(update, attrs):
                        return reason
                self._reconciler.apply_soon()
        except HistoryLost as error:
            return f"the store's history was lost: {error}"
        except StoreError as error:
            await asyncio.sleep(self._rng.uniform(0.5, 2.0))
            return f"the watch failed: {error}"
        return "the watch ended"

    async def _take_in(self, update: Update, attrs: LeaseAttrs) -> str | None:
        assert self._lease
        assert self.prepared
        if update.what == "config":
            return "the network config changed" if (update.config or b"") != self.prepared.raw else None
        if update.what == "claim":
            if self._claim and update.key == self._claim.key:
                await self._claim.seen(update.claim)
            return None
        if update.key == self.registry.lease_key(self._lease.key):
            return await self._take_in_own(update, attrs)
        if update.bad:
            self._peers.put_bad(update.bad)
        elif update.lease:
            if self._must_yield_to(update.lease):
                return f"the lease {update.lease.key} has the MAC address of this host"
            self._peers.put(update.key, update.lease)
        else:
            self._peers.remove(update.key, COMES_BACK)
            if self._crowded:
                return "a lease is gone: a subnet may be free now"
        return None

    async def _take_in_own(self, update: Update, attrs: LeaseAttrs) -> str | None:
        """Our own lease was changed: by us, by an administrator, or by somebody who should not have."""
        assert self._renewal
        assert self.prepared
        mine, identity = self._renewal.lease, self.prepared.identity
        if update.bad:
            if update.bad.revision > mine.revision:
                log.warning("our lease %s was overwritten with something unreadable; putting it back", mine.key)
                mended = msgspec.structs.replace(mine, revision=update.bad.revision)
                self._renewal.seen(await self.registry.update(mended, attrs))
            return None
        if update.lease is None:
            return f"our lease {mine.key} was removed from the store"
        if update.lease.revision <= mine.revision:
            return None
        if not identity.owns(update.lease.attrs):
            return f"our lease {mine.key} was taken by another host"
        if update.lease.attrs != attrs:
            log.warning("the data of our lease %s was changed by somebody else; publishing ours again", mine.key)
            self._renewal.seen(await self.registry.update(update.lease, attrs))
            return None
        if update.lease.permanent and not mine.permanent:
            log.info("our lease %s is a reservation now and does not expire", mine.key)
        self._renewal.seen(update.lease)
        return None

    def _on_outage(self, reason: str | None) -> None:
        self.outage = reason
        self._territory.follow(current=reason is None)
        if reason:
            log.warning("the store can't be reached: %s; forwarding goes on with what is known", reason)
        else:
            log.info("the store is back")
            if self._renewal:
                self._renewal.soon()
