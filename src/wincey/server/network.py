"""What a server does for one network: leases taken, renewed, given back and watched; reservations."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Sequence

import msgspec

from wincey.leasing.allocate import Identity, losers
from wincey.leasing.claims import Host
from wincey.leasing.holder import acquire, leave
from wincey.model.address import Subnet, format_address
from wincey.model.config import NetworkConfig
from wincey.model.errors import BadConfig, BadLease, KeyConflict, KeyExists, StoreError
from wincey.model.lease import Lease, LeaseAttrs, LeaseKey
from wincey.model.remote_api import KEY_NOT_FOUND, owner
from wincey.server.feed import Feed
from wincey.server.tenants import Tenants
from wincey.store.registry import Registry, Snapshot, Update


class Network:
    """One network of the store. Its methods raise StoreError, and what they say."""

    def __init__(self, registry: Registry, rng: random.Random) -> None:
        self.registry, self._rng = registry, rng
        self.tenants = Tenants(registry)
        self.feed: Feed[Update] = Feed(self._watch, self.position, self.tenants.seen)

    def close(self) -> None:
        """End the watch and the defence of claims."""
        self.feed.close()
        self.tenants.close()

    async def position(self) -> int:
        """The store's revision now, by a listing of nothing."""
        return (await self.registry.store.read_all(f"{self.registry.prefix}/wincey/none/")).revision

    async def config(self) -> tuple[NetworkConfig, bytes]:
        """The config, read and as it is; raises BadConfig."""
        raw = await self.registry.config()
        if raw is None:
            raise StoreError(f"100: {KEY_NOT_FOUND} ({self.registry.config_key})")
        return NetworkConfig.parse(raw), raw

    async def snapshot(self) -> Snapshot:
        """Everything as it is now."""
        return await self.registry.snapshot()

    async def take(self, attrs: LeaseAttrs, wish: Sequence[Subnet], host: Host | None) -> Lease:
        """The lease of the host with that public address: the one it has, else the one it wishes, else a free one.

        Raises BadLease, BadConfig, DuplicateHost, OutOfSubnets.
        """
        config, _ = await self.config()
        identity = await self._admit(config, attrs, host)
        acquired = await acquire(
            self.registry, config=config, identity=identity, attrs=attrs, previous=wish, rng=self._rng
        )
        await leave(self.registry, acquired.rest)
        return acquired.lease

    async def renew(self, key: LeaseKey, attrs: LeaseAttrs, formerly: bytes | None, host: Host | None) -> Lease:
        """Renew and publish; a lease that is gone is taken again if its subnet is free.

        formerly: the public address that the lease still has, when the host's changed. Raises KeyConflict when the subnet
        is another host's by now, BadLease, BadConfig, DuplicateHost.
        """
        config, _ = await self.config()
        identity = await self._admit(config, attrs, host)
        try:
            held = await self.registry.read(key)
        except BadLease:
            # Somebody has overwritten it. Who believes to hold it is the best witness of whose it is.
            entry = await self.registry.store.get(self.registry.lease_key(key))
            return await self.registry.update(Lease(key, attrs, entry.revision if entry else 0), attrs)
        if held is None:
            return await self._retake(key, attrs, config, identity)
        if owner(key, held.attrs) not in {owner(key, attrs), formerly}:
            raise KeyConflict(f"the subnet {key} is leased to another host by now")
        if held.attrs != attrs:
            return await self.registry.update(held, attrs)
        return held if held.permanent else await self.registry.renew(held)

    async def read(self, key: LeaseKey) -> Lease:
        """A lease; raises BadLease."""
        lease = await self.registry.read(key)
        if lease is None:
            raise StoreError(f"100: {KEY_NOT_FOUND} ({self.registry.lease_key(key)})")
        return lease

    async def release(self, key: LeaseKey) -> None:
        """Delete a lease."""
        await self.registry.release(await self.read(key))

    async def reserve(self, subnet: Subnet, attrs: LeaseAttrs) -> None:
        """Pin a subnet to a public address, so that its lease does not expire (compatibility reference, section 3.9)."""
        config, _ = await self.config()
        if not config.network or subnet.length != config.subnet_len or not config.network.contains(subnet):
            raise BadConfig(f"reservation {subnet}: it is no /{config.subnet_len} within {config.network}")
        key = LeaseKey(subnet.masked())
        held = await self.registry.read(key)
        if held is None:
            await self.registry.create(key, attrs, permanent=True)
        elif held.attrs.public_ip != attrs.public_ip:
            raise KeyExists("lease already taken")
        elif not held.permanent:
            await self.registry.pin(held, permanent=True)

    async def unreserve(self, key: LeaseKey) -> None:
        """Let a reservation become a lease that expires."""
        lease = await self.read(key)
        if lease.permanent:
            await self.registry.pin(lease, permanent=False)

    async def _admit(self, config: NetworkConfig, attrs: LeaseAttrs, host: Host | None) -> Identity:
        if config.enable_ipv4 and not attrs.public_ip:
            raise BadLease("PublicIP is missing")
        if config.enable_ipv6 and not attrs.public_ipv6:
            raise BadLease("PublicIPv6 is missing: this network has IPv6, which clients older than it can't join")
        identity = Identity(
            attrs.public_ip if config.enable_ipv4 else None, attrs.public_ipv6 if config.enable_ipv6 else None
        )
        address = identity.public_ip or identity.public_ipv6
        if host and address:
            await self.tenants.stake(format_address(address), host)
        return identity

    async def _retake(self, key: LeaseKey, attrs: LeaseAttrs, config: NetworkConfig, identity: Identity) -> Lease:
        if not config.allows(key):
            raise KeyConflict(f"the lease {key} is gone, and does not fit the network config any more")
        lease = await self.registry.create(key, attrs)
        snapshot = await self.registry.snapshot()
        if older := losers(lease, snapshot.leases.values(), identity):
            await self.registry.release(lease)
            raise KeyConflict(f"the lease {key} is gone, and its subnet is part of {older[0].key} by now")
        return lease

    async def _watch(self, after: int) -> AsyncIterator[list[Update]]:
        async for updates in self.registry.watch(after):
            yield updates


def host_of(header: tuple[str, str] | None) -> Host | None:
    """The host that a client says it is."""
    return Host(*header) if header else None


def wished(text: str) -> list[Subnet]:
    """The subnets of a wish; one that can't be read is none."""
    try:
        return list(LeaseKey.parse(text).subnets) if text else []
    except BadLease:
        return []


class Answer(msgspec.Struct):
    """Updates of one network for one poll, and the cursor after them."""

    updates: list[Update]
    cursor: int


async def poll(
    network: Network, cursor: int, *, key: LeaseKey | None = None, all_at_once: bool = False, config: bool = False
) -> Answer | None:
    """Wait for leases that changed after a cursor (one of them: `key`); None when a snapshot must do.

    all_at_once: everything there is, else what belongs to the next revision: flannel's clients know one event an answer.
    config: whether a changed config is news, too.
    """
    only = network.registry.lease_key(key) if key else None

    def wanted(update: Update) -> bool:
        if update.what == "lease":
            # What can't be read concerns nobody: a host stays reachable by what it published before.
            return update.bad is None and (only is None or update.key == only)
        return config and update.what == "config"

    updates = await network.feed.after(cursor, wanted)
    if updates is None:
        return None
    if not all_at_once:
        updates = [update for update in updates if update.revision == updates[0].revision]
    return Answer(updates, updates[-1].revision)
