"""One network's life on this host: read the config, find the interface, take a lease, make the host so, follow the leases.

The life is one loop. Each round reads the store anew, prepares, makes sure of the lease, and then follows changes until
something needs a new round: the config or the host's address changed, the lease was lost, the store lost its history. So
start, change and recovery are one path. Whatever fails in a later round leaves the state of the earlier one in force, and
packets flow on it.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Coroutine
from typing import Protocol, TypeVar

import msgspec

from wincey.agent.envfile import EnvFile, read_env_file, write_env_file
from wincey.agent.planner import Planner, Policy
from wincey.agent.reconciler import Reconciler
from wincey.agent.statefile import State
from wincey.backends.base import Backend, HostFacts
from wincey.backends.catalogue import make
from wincey.backends.vxlan import published_macs
from wincey.leasing.allocate import Identity
from wincey.leasing.claims import Claim, Host
from wincey.leasing.holder import Renewal, acquire
from wincey.leasing.timing import retry_in
from wincey.model.address import Subnet, format_address
from wincey.model.config import NetworkConfig
from wincey.model.errors import (
    BadConfig,
    BadLease,
    HistoryLost,
    NotJoinable,
    OutOfSubnets,
    StoreDenied,
    StoreError,
    UnknownBackend,
)
from wincey.model.lease import Lease, LeaseAttrs
from wincey.model.state import InterfaceAddress, Link, RuleSet, Scope, Tunnel
from wincey.store.registry import BadEntry, Registry, Snapshot, Update

log = logging.getLogger(__name__)

LOCAL = ""
"""The owner, in the desired state, of what exists for the host itself."""

T = TypeVar("T")


class Settings(msgspec.Struct, frozen=True):
    """What the command line says. margin: seconds before the end of a lease by which it must be renewed."""

    subnet_file: str
    margin: float
    policy: Policy = Policy()


class Look(Protocol):
    """Finds the interface and the addresses for a config; raises NotJoinable."""

    def __call__(self, config: NetworkConfig) -> HostFacts: ...


class _Prepared(msgspec.Struct):
    """A config that works on this host."""

    raw: bytes
    config: NetworkConfig
    facts: HostFacts
    backend: Backend

    @property
    def identity(self) -> Identity:
        facts, config = self.facts, self.config
        return Identity(facts.public if config.enable_ipv4 else None, facts.public_v6 if config.enable_ipv6 else None)


class Network:
    """The life of one network. `on_ready(reason)` is told None when containers can be started, or why not (yet)."""

    def __init__(
        self,
        settings: Settings,
        registry: Registry,
        reconciler: Reconciler,
        *,
        state: State,
        host: Host,
        look: Look,
        choose_rules: Callable[[NetworkConfig], Awaitable[None]],
        on_ready: Callable[[str | None], None],
        rng: random.Random,
    ) -> None:
        self._settings, self._registry, self._reconciler = settings, registry, reconciler
        self._state, self._host, self._look, self._on_ready, self._rng = state, host, look, on_ready, rng
        self._choose_rules = choose_rules
        self._previous = read_env_file(settings.subnet_file)
        self._prepared: _Prepared | None = None
        self._planner: Planner | None = None
        self._lease: Lease | None = None
        self._claim: Claim | None = None
        self._renewal: Renewal | None = None
        self._written: EnvFile | None = None
        self._host_changed = asyncio.Event()
        self._told: set[tuple[str, str]] = set()
        self.bad: dict[str, BadEntry] = {}
        registry.store.on_outage(self._on_outage)

    def host_changed(self) -> None:
        """An address or link of the host changed: look again."""
        self._host_changed.set()

    async def run(self) -> None:
        """Live until cancelled. Raises WinceyError when the host can't join; later failures are waited out."""
        while True:
            reason = await self._follow(*await self._join())
            log.info("looking at everything anew: %s", reason)

    async def _join(self) -> tuple[int, LeaseAttrs]:
        """Get ready, get a lease, become what it says; returns the revision to follow from, and what we published.

        The snapshots end here: 10,000 leases that nobody needs any more are many megabytes.
        """
        prepared, snapshot = await self._prepare()
        await self._stake(prepared)
        attrs = prepared.backend.attrs()
        previous = [*self._held(), *(subnet.masked() for subnet in self._previous.subnets)]
        acquired = await self._patiently(
            lambda: acquire(
                self._registry,
                config=prepared.config,
                identity=prepared.identity,
                attrs=attrs,
                previous=previous,
                rng=self._rng,
                snapshot=snapshot,
            )
        )
        if self._lease is None or acquired.lease.key != self._lease.key:
            rounds = f" after {acquired.rounds} rounds" if acquired.rounds > 1 else ""
            log.info("lease acquired: %s%s", acquired.lease.key, rounds)
        self._lease = acquired.lease
        if claim := self._claim:  # what happened to it before the watch begins
            await self._patiently(lambda: claim.seen(acquired.snapshot.claims.get(claim.key)))
        await self._become(prepared, acquired.snapshot)
        return acquired.snapshot.revision, attrs

    def _held(self) -> tuple[Subnet, ...]:
        return self._lease.key.subnets if self._lease else ()

    async def _patiently(self, call: Callable[[], Awaitable[T]]) -> T:
        """Do it until the store answers. Without a lease there is nothing to keep alive, and OutOfSubnets is raised."""
        failures = 0
        while True:
            try:
                return await call()
            except (StoreError, OutOfSubnets) as error:
                if isinstance(error, OutOfSubnets) and self._lease is None:
                    raise
                failures += 1
                level = logging.ERROR if failures in {1, 10} or failures % 60 == 0 else logging.DEBUG
                log.log(level, "%s (attempt %d; trying on)", error, failures)
                if self._lease is None:
                    self._on_ready(str(error))
                await asyncio.sleep(min(5.0, retry_in(failures, self._rng)))

    async def _prepare(self) -> tuple[_Prepared, Snapshot]:
        """Wait for a config that works; one that doesn't is passed over where an earlier one is in force."""
        told = ""
        while True:
            snapshot = await self._patiently(self._registry.snapshot)
            raw = snapshot.config
            try:
                if raw is None:
                    raise BadConfig(
                        f"there is no network config at {self._registry.config_key}; put one there, such as"
                        ' {"Network": "10.3.0.0/16", "Backend": {"Type": "vxlan"}}'
                    )
                self._prepared = self._consider(raw, snapshot)
                return self._prepared, snapshot
            except (BadConfig, NotJoinable) as error:
                if self._prepared:
                    log.error("%s; going on with what was in force before", error)
                    # Remember what was refused, or its presence would look like a change for ever.
                    self._prepared.raw = raw or b""
                    return self._prepared, snapshot
                if isinstance(error, (UnknownBackend, NotJoinable)):
                    raise
                if str(error) != told:
                    told = str(error)
                    log.error("%s; waiting for a config that works", error)
                    self._on_ready(told)
            await asyncio.sleep(self._rng.uniform(0.8, 1.2))

    def _consider(self, raw: bytes, snapshot: Snapshot) -> _Prepared:
        config = NetworkConfig.parse(raw)
        for warning in config.warnings:
            self._tell_once(self._registry.config_key, warning)
        facts = self._look(config)
        identity = Identity(
            facts.public if config.enable_ipv4 else None, facts.public_v6 if config.enable_ipv6 else None
        )
        for lease in snapshot.leases.values():
            if identity.owns(lease.attrs):
                macs = published_macs(lease.attrs)
                # Peers know our devices by what our lease says, whoever wrote it: an earlier Wincey or flannel.
                self._state.macs.update(macs)
                self._state.devices.update(macs)
        return _Prepared(raw, config, facts, make(config, facts))

    async def _stake(self, prepared: _Prepared) -> None:
        address = prepared.identity.public_ip or prepared.identity.public_ipv6
        assert address
        key = self._registry.claim_key(format_address(address))
        if self._claim and self._claim.key == key:
            return
        claim = Claim(self._registry.store, key, self._host)

        async def stake() -> None:
            try:
                await claim.stake()
            except StoreDenied as error:
                log.warning(
                    "no protection against a second host with our address: %s may not be written: %s", key, error
                )

        await self._patiently(stake)
        self._claim = claim

    async def _become(self, prepared: _Prepared, snapshot: Snapshot) -> None:
        """Make the host as config and leases say, then tell the world."""
        assert self._lease
        self._planner = Planner(
            config=prepared.config,
            host=prepared.facts,
            backend=prepared.backend,
            identity=prepared.identity,
            own=self._lease.key,
            policy=self._settings.policy,
        )
        desired = self._reconciler.desired
        desired.put(LOCAL, self._planner.local())
        for owner in [owner for owner in desired.owners if owner not in snapshot.leases and owner not in snapshot.bad]:
            if owner != LOCAL:
                desired.put(owner, ())
        for key, lease in sorted(snapshot.leases.items(), key=lambda item: item[1].created):
            self._put_peer(key, lease)
        for bad in snapshot.bad.values():
            self._put_bad(bad)
        self._remember(prepared)
        if any(isinstance(item, RuleSet) for item in desired.objects.values()):
            await self._choose_rules(prepared.config)
        failures = await self._reconciler.settle()
        essential = [f for f in failures if isinstance(f.object, (Link, InterfaceAddress, Tunnel, RuleSet))]
        if essential and self._written is None:
            raise NotJoinable("; ".join(f"{failure.object}: {failure.reason}" for failure in essential[:3]))
        if not failures:
            self._forget_stale(prepared)
        self._publish(prepared)

    def _remember(self, prepared: _Prepared) -> None:
        """Before anything is made, so that a crash leaves nothing that a later run does not know as ours."""
        self._state.devices.update(self._devices())
        self._state.networks.update(prepared.config.networks, self._previous.networks)
        self._state.save()
        self._reconciler.scope = Scope(tuple(sorted(self._state.devices)), tuple(sorted(self._state.networks)))

    def _forget_stale(self, prepared: _Prepared) -> None:
        self._state.devices = self._devices()
        self._state.networks = set(prepared.config.networks)
        self._state.save()
        self._reconciler.scope = Scope(tuple(sorted(self._state.devices)), tuple(sorted(self._state.networks)))

    def _devices(self) -> set[str]:
        return {item.name for item in self._reconciler.desired.objects.values() if isinstance(item, Link)}

    def _publish(self, prepared: _Prepared) -> None:
        assert self._lease
        env = EnvFile.of(
            prepared.config, self._lease.key, mtu=prepared.backend.mtu, ip_masq=self._settings.policy.masquerade
        )
        if env != self._written:
            try:
                write_env_file(self._settings.subnet_file, env)
            except OSError as error:
                reason = f"{self._settings.subnet_file} can't be written: {error}"
                log.error("%s", reason)
                self._on_ready(reason)
                return
            if self._written and self._written.subnets != env.subnets:
                log.warning(
                    "the subnet of this host changed from %s to %s: restart the container runtime so that it follows",
                    ", ".join(map(str, self._written.subnets)), ", ".join(map(str, env.subnets)),
                )  # fmt: skip
            self._written = env
        self._on_ready(None)

    async def _follow(self, revision: int, attrs: LeaseAttrs) -> str:
        """Take in changes until a new round is needed; returns why."""
        assert self._lease
        self._renewal = Renewal(self._registry, self._lease, self._settings.margin, self._rng)
        coroutines: list[Coroutine[None, None, str]] = [
            self._watch_store(revision, attrs),
            self._watch_lease(self._renewal),
            self._watch_host(),
        ]
        tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            return done.pop().result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._lease, self._renewal = self._renewal.lease, None

    async def _watch_lease(self, renewal: Renewal) -> str:
        await renewal.run()
        return f"our lease {renewal.lease.key} was lost"

    async def _watch_host(self) -> str:
        assert self._prepared
        while True:
            await self._host_changed.wait()
            await asyncio.sleep(0.5)  # addresses mostly change in several steps
            self._host_changed.clear()
            try:
                facts = self._look(self._prepared.config)
            except NotJoinable as error:
                self._tell_once("host", f"{error}; going on with what was in force before")
                continue
            if facts != self._prepared.facts:
                return f"the interface or address of this host changed ({facts.underlay})"

    async def _watch_store(self, revision: int, attrs: LeaseAttrs) -> str:
        try:
            async for updates in self._registry.watch(revision):
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
        assert self._prepared
        if update.what == "config":
            return "the network config changed" if update.config != self._prepared.raw else None
        if update.what == "claim":
            if self._claim and update.key == self._claim.key:
                await self._claim.seen(update.claim)
            return None
        if update.key == self._registry.lease_key(self._lease.key):
            return await self._take_in_own(update, attrs)
        if update.bad:
            self._put_bad(update.bad)
        elif update.lease:
            self.bad.pop(update.key, None)
            self._put_peer(update.key, update.lease)
        else:
            self.bad.pop(update.key, None)
            self._reconciler.desired.put(update.key, ())
        return None

    async def _take_in_own(self, update: Update, attrs: LeaseAttrs) -> str | None:
        """Our own lease was changed: by us, by an administrator, or by somebody who should not have."""
        assert self._renewal
        mine, identity = self._renewal.lease, self._identity()
        if update.bad:
            if update.bad.revision > mine.revision:
                log.warning("our lease %s was overwritten with something unreadable; putting it back", mine.key)
                mended = msgspec.structs.replace(mine, revision=update.bad.revision)
                self._renewal.seen(await self._registry.update(mended, attrs))
            return None
        if update.lease is None:
            return f"our lease {mine.key} was removed from the store"
        if update.lease.revision <= mine.revision:
            return None
        if not identity.owns(update.lease.attrs):
            return f"our lease {mine.key} was taken by another host"
        if update.lease.attrs != attrs:
            log.warning("the data of our lease %s was changed by somebody else; publishing ours again", mine.key)
            self._renewal.seen(await self._registry.update(update.lease, attrs))
            return None
        if update.lease.permanent and not mine.permanent:
            log.info("our lease %s is a reservation now and does not expire", mine.key)
        self._renewal.seen(update.lease)
        return None

    def _identity(self) -> Identity:
        assert self._prepared
        return self._prepared.identity

    def _put_peer(self, key: str, lease: Lease) -> None:
        assert self._planner
        try:
            objects = self._planner.peer(lease)
        except BadLease as error:
            self._tell_once(key, str(error))
            objects = []
        self._reconciler.desired.put(key, objects)

    def _put_bad(self, bad: BadEntry) -> None:
        # What a host had published before its value became unreadable stays in force: it is the best that we know.
        self.bad[bad.key] = bad
        self._tell_once(bad.key, bad.reason)

    def _tell_once(self, about: str, what: str) -> None:
        if (about, what) not in self._told:
            if len(self._told) > 1000:
                self._told.clear()
            self._told.add((about, what))
            log.warning("%s: %s", about, what)

    def _on_outage(self, reason: str | None) -> None:
        if reason:
            log.warning("the store can't be reached: %s; forwarding goes on with what is known", reason)
        else:
            log.info("the store is back")
            if self._renewal:
                self._renewal.soon()
