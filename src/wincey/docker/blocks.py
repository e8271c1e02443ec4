"""Blocks of addresses, leased from the store for docker networks.

A block is a lease like a host's own, with the same attributes, but longer than the hosts' subnets and without a time limit:
a docker network stays until it is removed, whatever runs meanwhile, and so do its addresses. Flanneld everywhere routes to
it as to any lease; flanneld on this host knows its own address in it and leaves it alone.

Beside it stands a key that says of which docker network it is a block, and whose: `<prefix>/wincey/docker/<block>`. By it
networks that overlap without being the same are refused, whichever engine has them. It is put before the lease and removed
after it, so that a lease of ours is always known as ours, also when we end in between.
"""

from __future__ import annotations

import contextlib
import logging
import random
import socket
from collections.abc import Awaitable, Callable, Iterable

import msgspec

from wincey.docker.errors import Refused
from wincey.docker.fabric import Local
from wincey.leasing.allocate import Identity, losers
from wincey.leasing.allocate import Pool as Places
from wincey.model.address import Subnet
from wincey.model.config import NetworkConfig
from wincey.model.errors import UNREADABLE, BadAddress, BadConfig, BadLease, KeyConflict, KeyExists
from wincey.model.lease import LeaseAttrs, LeaseKey
from wincey.store.kv import Entry, KeyValueStore
from wincey.store.registry import Registry, Snapshot

log = logging.getLogger(__name__)


class _Record(msgspec.Struct):
    """The value of the key beside a block. network: the docker network. host: for people. engine: whose it is."""

    network: str
    host: str
    engine: str


class Blocks:
    """The blocks of one engine. engine: an identifier that no other has. The store is opened when it is first needed."""

    def __init__(
        self, engine: str, prefix: str, open_store: Callable[[], Awaitable[KeyValueStore]], rng: random.Random
    ) -> None:
        self._engine, self._prefix = engine, "/" + prefix.strip("/")
        self._open, self._rng = open_store, rng
        self._store: KeyValueStore | None = None

    async def take(self, local: Local, network: Subnet, length: int | None, note: Callable[[Subnet], None]) -> Subnet:
        """Lease a block of a docker network for this engine; raises Refused, StoreError.

        length: the block's, None for two bits longer than the hosts' subnets, or than the network. note: told of a block
        before anything of it is in the store. Whatever happens later, `give_back` of the last one then leaves nothing.
        """
        registry = await self._registry(local.name)
        snapshot = await registry.snapshot()
        length = _block_length(snapshot, registry, local, network, length)
        attrs = await _own_attrs(registry, local)
        value = attrs.encode(etcd_v2=registry.store.values_v2)
        identity = Identity(attrs.public_ip, attrs.public_ipv6)
        await self._refuse_overlaps(registry, network)
        lost: list[Subnet] = []
        while True:
            block = _free(snapshot, lost, network, length, self._rng)
            note(block)
            if not await self._claim(registry, block, network):
                lost.append(block)
                continue
            try:
                await registry.store.create(registry.lease_key(LeaseKey(block)), value, None)
            except KeyExists:
                await registry.store.delete(_record_key(registry, block))
                lost.append(block)
                continue
            await self._refuse_overlaps(registry, network)  # those of engines that were as fast as we
            snapshot = await registry.snapshot()
            lease = snapshot.leases.get(registry.lease_key(LeaseKey(block)))
            if lease and not losers(lease, snapshot.leases.values(), identity):
                return block
            await self._remove(registry, block)

    async def give_back(self, fabric: str, block: Subnet) -> None:
        """Remove a block's lease and record, if they are ours; raises StoreError."""
        registry = await self._registry(fabric)
        record = _decode(await registry.store.get(_record_key(registry, block)))
        if record and record.engine == self._engine:
            await self._remove(registry, block)

    async def keep(self, local: Local, blocks: Iterable[tuple[Subnet, Subnet]]) -> list[str]:
        """See to it that leases (block, network) are there and say where this host is now; returns what is wrong.

        Raises StoreError and Refused.
        """
        registry = await self._registry(local.name)
        value = (await _own_attrs(registry, local)).encode(etcd_v2=registry.store.values_v2)
        wrong = []
        for block, network in blocks:
            key = registry.lease_key(LeaseKey(block))
            record = _decode(await registry.store.get(_record_key(registry, block)))
            if record and record.engine != self._engine:
                wrong.append(
                    f"block {block} of {network} belongs to host {record.host} now: make the network anew here"
                )
                continue
            if record is None and not await self._claim(registry, block, network):
                continue  # the next time will tell
            entry = await registry.store.get(key)
            with contextlib.suppress(KeyExists, KeyConflict):  # changed in between: likewise
                if entry is None:
                    log.warning("the lease of block %s was gone from the store; putting it back", block)
                    await registry.store.create(key, value, None)
                elif entry.value != value:
                    await registry.store.replace(entry, value, None)
        return wrong

    async def close(self) -> None:
        """End the connection to the store."""
        if self._store:
            await self._store.close()

    async def _registry(self, fabric: str) -> Registry:
        if self._store is None:
            self._store = await self._open()
        return Registry(self._store, f"{self._prefix}/{fabric}" if fabric else self._prefix)

    async def _claim(self, registry: Registry, block: Subnet, network: Subnet) -> bool:
        """Put the record, which engines are told apart by; False when another one has the block."""
        key = _record_key(registry, block)
        value = msgspec.json.encode(_Record(str(network), socket.gethostname(), self._engine))
        try:
            await registry.store.create(key, value, None)
        except KeyExists:
            record = _decode(await registry.store.get(key))
            return bool(record and record.engine == self._engine)
        return True

    async def _refuse_overlaps(self, registry: Registry, network: Subnet) -> None:
        for entry in (await registry.store.read_all(_records(registry))).entries:
            if not (record := _decode(entry)):
                continue
            with contextlib.suppress(BadAddress):
                other = Subnet.parse(record.network)
                if other != network and other.overlaps(network):
                    raise Refused(
                        f"--subnet {network} overlaps {other}, another docker network, which host {record.host} has:"
                        f" use {other} to be part of it, or a subnet apart from it"
                    )

    async def _remove(self, registry: Registry, block: Subnet) -> None:
        await registry.store.delete(registry.lease_key(LeaseKey(block)))
        await registry.store.delete(_record_key(registry, block))


def _records(registry: Registry) -> str:
    return f"{registry.prefix}/wincey/docker/"


def _record_key(registry: Registry, block: Subnet) -> str:
    return f"{_records(registry)}{LeaseKey(block)}"


def _decode(entry: Entry | None) -> _Record | None:
    with contextlib.suppress(*UNREADABLE):
        return msgspec.json.decode(entry.value, type=_Record) if entry else None
    return None


async def _own_attrs(registry: Registry, local: Local) -> LeaseAttrs:
    key = local.lease
    try:
        lease = await registry.read(key)
    except BadLease as error:
        raise Refused(f"this host's lease {key} can't be read: {error}") from None
    if lease is None:
        raise Refused(
            f"the store has no lease {registry.lease_key(key)} for this host: is flanneld running, and do it and this"
            " plugin use the same store and prefix?"
        )
    return lease.attrs


def _block_length(snapshot: Snapshot, registry: Registry, local: Local, network: Subnet, length: int | None) -> int:
    """How long the blocks of a docker network are; raises Refused for a subnet or a length that will not do."""
    if snapshot.config is None:
        raise Refused(f"there is no network config at {registry.config_key} in the store")
    try:
        config = NetworkConfig.parse(snapshot.config)
    except BadConfig as error:
        raise Refused(str(error)) from None
    hosts = config.subnet_len
    lowest, highest = Subnet(config.subnet_min, hosts), Subnet(config.subnet_max, hosts)
    if network.first <= highest.last and lowest.first <= network.last:
        raise Refused(
            f"--subnet {network} lies among the subnets that hosts lease, {lowest} to {highest}: choose one of"
            f' {local} outside of these, or end them earlier in the network config ("SubnetMax")'
        )
    if length is None:
        length = min(29, max(hosts, network.length) + 2)
    if not max(hosts + 1, network.length) <= length <= 29:
        raise Refused(
            f"--subnet {network} with blocks of /{length}: each engine's block must be inside the subnet, smaller than a"
            f" host's subnet (/{hosts}) and no smaller than a /29; say how long by --ipam-opt block=LENGTH"
        )
    return length


def _free(snapshot: Snapshot, lost: Iterable[Subnet], network: Subnet, length: int, rng: random.Random) -> Subnet:
    places = Places(network.first, 1 << (length - network.length), length, network.bits)
    keys = [lease.key for lease in snapshot.leases.values()]
    for bad in snapshot.bad.values():  # somebody may live there
        with contextlib.suppress(BadLease):
            keys.append(LeaseKey.parse(bad.key.rpartition("/")[2]))
    taken = places.taken([*lost, *(key.v4 for key in keys if key.v4)])
    free = [index for index in range(places.count) if not any(first <= index <= last for first, last in taken)]
    if not free:
        raise Refused(
            f"all {places.count} blocks (/{length}) of {network} are taken by engines: remove the network where it is not"
            " needed, or make it anew everywhere with a wider --subnet or smaller blocks (--ipam-opt block=LENGTH)"
        )
    return places.at(rng.choice(free))
