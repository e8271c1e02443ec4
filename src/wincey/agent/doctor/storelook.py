"""What the store says, and with it what a host should have: the daemon's own plan, made again without the daemon.

It reads, and changes nothing. Backends that have to ask the host for more (keys, clouds) are not planned here; for these
only the daemon's own answer counts.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise

import msgspec

from wincey.agent.desired import DesiredState
from wincey.agent.doctor.facts import Store
from wincey.agent.envfile import read_env_file
from wincey.agent.hostfacts import HostLook
from wincey.agent.identity import this_host
from wincey.agent.life import DaemonOptions
from wincey.agent.peers import LOCAL
from wincey.agent.planner import Planner
from wincey.agent.preparation import Prepared
from wincey.agent.reconciler import Reconciler
from wincey.agent.statefile import State
from wincey.backends.base import HostFacts
from wincey.backends.catalogue import make
from wincey.backends.vxlan import published_macs
from wincey.kernel.rtnetlink import RtnetlinkDriver
from wincey.kernel.sysctl import SysctlDriver
from wincey.leasing.allocate import Identity
from wincey.leasing.claims import Host
from wincey.model.address import format_address
from wincey.model.config import NetworkConfig
from wincey.model.errors import BadConfig, BadLease, KeyConflict, NotJoinable, StoreError
from wincey.model.lease import Lease, LeaseAttrs, LeaseKey
from wincey.model.networkname import UNNAMED
from wincey.model.state import Scope
from wincey.store.open import open_remote, open_store
from wincey.store.registry import LeaseStore, Registry, Snapshot

PATIENCE = 4.0
"""Seconds for the store to answer."""

_TIMES = 200
"""How many leases are asked for their time at most."""

_PLANNED = {"vxlan", "host-gw", "udp", "ipip", "alloc"}


class Difference(msgspec.Struct, frozen=True):
    """What is against what should be, as text."""

    missing: Sequence[str]
    changed: Sequence[str]
    surplus: Sequence[str]


class StoreLook(msgspec.Struct):
    """What was read. raw: the config's bytes. left: seconds by store key. own: this host's lease. trouble: why this host could not join."""

    facts: Store = Store()
    leases: dict[str, Lease] = {}
    left: dict[str, float | None] = {}
    raw: bytes = b""
    config: NetworkConfig | None = None
    host: HostFacts | None = None
    prepared: Prepared | None = None
    own: LeaseKey | None = None
    own_key: str = ""
    leased: bool | None = None
    difference: Difference | None = None
    trouble: str = ""


async def look(options: DaemonOptions, *, compare: bool) -> StoreLook:
    """Read it. compare: also find out what differs from the plan, as no daemon tells it."""
    if options.several:
        return StoreLook()
    name, started = options.store.described, time.monotonic()
    try:
        async with asyncio.timeout(PATIENCE):
            registry = await _open(options)
            try:
                found = await _read(options, registry, name)
            finally:
                await registry.close()
    except (StoreError, TimeoutError, OSError) as error:
        why = str(error) or f"it does not answer within {PATIENCE:.0f} s"
        return StoreLook(Store(asked=True, name=name, trouble=why))
    found.facts = msgspec.structs.replace(found.facts, took=time.monotonic() - started)
    if compare and found.prepared and found.own:
        found.difference = await _difference(options, found, found.prepared, found.own)
    return found


async def _open(options: DaemonOptions) -> LeaseStore:
    if options.store.remote:
        me = this_host()
        return open_remote(options.store.remote, UNNAMED, f"{me.name} {me.instance}")
    return Registry(await open_store(options.store, options.prefix), options.prefix)


async def _read(options: DaemonOptions, registry: LeaseStore, name: str) -> StoreLook:
    snapshot = await registry.snapshot()
    found = StoreLook(leases=snapshot.leases, raw=snapshot.config or b"")
    config_trouble = ""
    try:
        if snapshot.config is None:
            raise BadConfig(f"there is no network config at {registry.config_key}")
        found.config = NetworkConfig.parse(snapshot.config)
        found.host = _host(options, found.config, snapshot)
        if found.config.backend_type in _PLANNED:
            backend = make(found.config, found.host)
            found.prepared = Prepared(snapshot.config, found.config, found.host, backend)
    except BadConfig as error:
        config_trouble = str(error)
    except NotJoinable as error:
        found.trouble = str(error)
    identity = _identity(found.config, found.host) if found.config and found.host else None
    mine = [(key, lease) for key, lease in snapshot.leases.items() if identity and identity.owns(lease.attrs)]
    env = read_env_file(options.settings.subnet_file)
    if identity:
        had = {subnet.masked() for subnet in env.subnets}
        mine.sort(key=lambda item: not had & set(item[1].key.subnets))
        found.leased = bool(mine) and (not had or bool(had & set(mine[0][1].key.subnets)))
        v4, v6 = (next((each for each in had if each.bits == bits), None) for bits in (32, 128))
        if found.leased:
            found.own_key, found.own = mine[0][0], mine[0][1].key
        elif had:
            found.own = LeaseKey(v4, v6)
    asked = list(snapshot.leases.items())[:_TIMES] + mine[:1]
    for key, left in await asyncio.gather(*(_left(registry, key, lease) for key, lease in dict(asked).items())):
        found.left[key] = left
    found.facts = Store(
        asked=True,
        name=name,
        config_trouble=config_trouble,
        same_host=list(_same_host(snapshot)),
        overlapping=[
            f"{one.key} of {_who(one.attrs)} and {other.key} of {_who(other.attrs)}"
            for one, other in _neighbors(snapshot)
            if one.key.overlaps(other.key)
        ],
        stranger=_stranger(snapshot, registry, identity),
        bad_keys=[f"{bad.key}: {bad.reason}" for bad in snapshot.bad.values()],
    )
    return found


def _host(options: DaemonOptions, config: NetworkConfig, snapshot: Snapshot) -> HostFacts:
    """The host's facts, with the MAC addresses that its lease tells."""
    macs = State(options.settings.subnet_file, random.Random()).macs  # noqa: S311  # it chooses nothing that lasts
    facts = HostLook(options.wishes, macs)(config)
    for lease in snapshot.leases.values():
        if _identity(config, facts).owns(lease.attrs):
            macs.update(published_macs(lease.attrs))
    return facts


def _identity(config: NetworkConfig, facts: HostFacts) -> Identity:
    return Identity(facts.public if config.enable_ipv4 else None, facts.public_v6 if config.enable_ipv6 else None)


async def _left(registry: LeaseStore, key: str, lease: Lease) -> tuple[str, float | None]:
    try:
        return key, await registry.time_left(lease)
    except KeyConflict:
        return key, None


def _same_host(snapshot: Snapshot) -> Iterator[str]:
    """Public addresses with several leases."""
    owners: dict[str, list[str]] = {}
    for lease in snapshot.leases.values():
        owners.setdefault(_who(lease.attrs), []).append(str(lease.key))
    for who, keys in owners.items():
        if len(keys) > 1:
            yield f"{who} has {' and '.join(sorted(keys))}"


def _neighbors(snapshot: Snapshot) -> Iterator[tuple[Lease, Lease]]:
    """Pairs that may overlap: in a list sorted by the first address, each with the few before it."""
    leases = list(snapshot.leases.values())
    if len(leases) <= 300:
        yield from combinations(leases, 2)
        return
    leases.sort(key=lambda lease: (str(lease.key.subnets[0].family), lease.key.subnets[0].first))
    yield from pairwise(leases)


def _stranger(snapshot: Snapshot, registry: LeaseStore, identity: Identity | None) -> str:
    """Another host that claims our public address."""
    address = (identity.public_ip or identity.public_ipv6) if identity else None
    if registry.claims is None or address is None:
        return ""
    claim = snapshot.claims.get(registry.claim_key(format_address(address)))
    holder = Host.decode(claim.value) if claim else None
    if holder is None or holder.instance == this_host().instance:
        return ""
    return f"host {holder} claims the public address {format_address(address)} of this one"


def _who(attrs: LeaseAttrs) -> str:
    return ", ".join(format_address(each) for each in (attrs.public_ip, attrs.public_ipv6) if each) or "nobody"


async def _difference(options: DaemonOptions, found: StoreLook, prepared: Prepared, own: LeaseKey) -> Difference:
    planner = Planner(
        config=prepared.config,
        host=prepared.facts,
        backend=prepared.backend,
        identity=prepared.identity,
        own=own,
        policy=options.settings.policy,
    )
    drivers = (RtnetlinkDriver(), SysctlDriver())
    handled = tuple(kind for driver in drivers for kind in driver.handles)
    reconciler = Reconciler(DesiredState(), drivers)
    local = [item for item in planner.local() if isinstance(item, handled)]
    reconciler.desired.put(LOCAL, local)
    for key, lease in found.leases.items():
        try:
            reconciler.desired.put(key, [item for item in planner.peer(lease) if isinstance(item, handled)])
        except BadLease:
            continue  # told where it is counted
    reconciler.scope = Scope(tuple(item.makes for item in local if item.makes), tuple(prepared.config.networks))
    try:
        changes, actual = await reconciler.difference()
    finally:
        await reconciler.close()
    return Difference(
        missing=[str(item) for item in changes.put if item.key not in actual],
        changed=[f"{item}, instead: {actual[item.key]}" for item in changes.put if item.key in actual],
        surplus=[str(item) for item in changes.delete],
    )
