"""Config, leases and host claims of one network, read from and written to a key-value store.

One unparsable key or value is one `BadEntry` and nothing else: it is counted, told once, and every other lease stands.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

import msgspec

from wincey.model.errors import BadLease
from wincey.model.lease import TTL, Lease, LeaseAttrs, LeaseKey
from wincey.store.kv import Change, Entry, KeyValueStore, OutageCallback


class BadEntry(msgspec.Struct, frozen=True):
    """A key below subnets/ that is no lease, and why. revision: of its last change."""

    key: str
    reason: str
    revision: int = 0


class Snapshot(msgspec.Struct):
    """Everything of the network at one moment. `leases` and `bad` by their full store key."""

    config: bytes | None
    leases: dict[str, Lease]
    bad: dict[str, BadEntry]
    claims: dict[str, Entry]
    revision: int


class Update(msgspec.Struct, frozen=True):
    """One change: exactly one of the fields after `key` has meaning, by the kind of key.

    For a lease key `lease` None and `bad` None means removed. revision: the store's after the change.
    """

    key: str
    what: str  # "lease", "config" or "claim"
    lease: Lease | None = None
    bad: BadEntry | None = None
    config: bytes | None = None
    claim: Entry | None = None
    revision: int = 0


class LeaseStore(Protocol):
    """What a host needs for its life in one network: a Registry, or a server (store.remote)."""

    @property
    def claims(self) -> KeyValueStore | None:
        """Where hosts claim their addresses; None where a server does that for them."""

    @property
    def keeps_cloud(self) -> bool:
        """Whether the other side keeps the cloud's route tables for us, as a server may."""

    @property
    def config_key(self) -> str:
        """Where the config is, for messages."""

    def lease_key(self, key: LeaseKey) -> str:
        """What snapshots and updates call a lease."""

    def claim_key(self, identity: str) -> str:
        """The same for a host's claim on an address."""

    def on_outage(self, callback: OutageCallback) -> None:
        """See KeyValueStore.on_outage."""

    async def snapshot(self) -> Snapshot:
        """Read everything once; watch from its revision."""

    def watch(self, after: int) -> AsyncIterator[list[Update]]:
        """Changes after a snapshot's revision, batch by batch. Raises HistoryLost: take a new snapshot."""

    async def create(self, key: LeaseKey, attrs: LeaseAttrs) -> Lease:
        """Take a lease on a free subnet; a server may give another one. Raises KeyExists, OutOfSubnets, DuplicateHost."""

    async def update(self, lease: Lease, attrs: LeaseAttrs) -> Lease:
        """Publish new attributes; raises KeyConflict."""

    async def renew(self, lease: Lease) -> Lease:
        """Start its time limit anew; raises KeyConflict."""

    async def time_left(self, lease: Lease) -> float | None:
        """Seconds until it expires, None for a reservation; raises KeyConflict when it is lost."""

    async def release(self, lease: Lease) -> bool:
        """Give it back; raises KeyConflict."""

    async def close(self) -> None:
        """End all connections."""


class Registry:
    """One network in a store. prefix: as --etcd-prefix, with `/NETWORK` appended for a named network."""

    def __init__(self, store: KeyValueStore, prefix: str) -> None:
        self.store = store
        self.prefix = "/" + prefix.strip("/")
        self._config_key = f"{self.prefix}/config"
        self._subnets = f"{self.prefix}/subnets/"
        self._claims = f"{self.prefix}/wincey/hosts/"

    @property
    def keeps_cloud(self) -> bool:
        """A store keeps nothing but keys."""
        return False

    @property
    def claims(self) -> KeyValueStore | None:
        """Where hosts claim their addresses."""
        return self.store

    def on_outage(self, callback: OutageCallback) -> None:
        """See KeyValueStore.on_outage."""
        self.store.on_outage(callback)

    @property
    def config_key(self) -> str:
        """The key that users put the network config under."""
        return self._config_key

    async def config(self) -> bytes | None:
        """The config as it stands, None when nobody has put one."""
        entry = await self.store.get(self._config_key)
        return entry.value if entry else None

    async def put_config(self, value: bytes) -> None:
        """Write the config, over the one there is. Raises KeyConflict or KeyExists when another writes at the same time."""
        entry = await self.store.get(self._config_key)
        if entry:
            await self.store.replace(entry, value, None)
        else:
            await self.store.create(self._config_key, value, None)

    async def snapshot(self) -> Snapshot:
        """Read everything once; watch from its revision."""
        listing = await self.store.read_all(self.prefix + "/")
        snapshot = Snapshot(None, {}, {}, {}, listing.revision)
        listing.entries.reverse()
        # Each goes as soon as it is read: both forms of 10,000 leases at once are many megabytes.
        while listing.entries:
            entry = listing.entries.pop()
            update = self._read(entry.key, entry)
            if update is None:
                continue
            if update.what == "config":
                snapshot.config = update.config
            elif update.what == "claim":
                snapshot.claims[entry.key] = entry
            elif update.bad:
                snapshot.bad[entry.key] = update.bad
            elif update.lease:
                snapshot.leases[entry.key] = update.lease
        return snapshot

    async def watch(self, after: int) -> AsyncIterator[list[Update]]:
        """Changes after a snapshot's revision, batch by batch. Raises HistoryLost: take a new snapshot."""
        async for changes in self.store.watch(self.prefix + "/", after):
            updates = [update for change in changes if (update := self._read_change(change))]
            if updates:
                yield updates

    async def create(self, key: LeaseKey, attrs: LeaseAttrs, *, permanent: bool = False) -> Lease:
        """Take a lease on a free subnet; raises KeyExists. permanent: as a reservation."""
        ttl = None if permanent else TTL
        return self._lease(await self.store.create(self.lease_key(key), self._value(attrs), ttl))

    async def update(self, lease: Lease, attrs: LeaseAttrs) -> Lease:
        """Publish new attributes; a reservation stays one. Raises KeyConflict when it was lost or changed meanwhile."""
        ttl = None if lease.permanent else TTL
        return self._lease(await self.store.replace(self._entry(lease), self._value(attrs), ttl))

    async def pin(self, lease: Lease, *, permanent: bool) -> Lease:
        """Make a reservation of a lease, or the reverse. Raises KeyConflict when it was lost or changed meanwhile."""
        return self._lease(
            await self.store.replace(self._entry(lease), self._value(lease.attrs), None if permanent else TTL)
        )

    async def renew(self, lease: Lease) -> Lease:
        """Start its TTL anew. Raises KeyConflict when it was lost or changed meanwhile."""
        return self._lease(await self.store.refresh(self._entry(lease), TTL))

    async def time_left(self, lease: Lease) -> float | None:
        """Seconds until it expires; None for a reservation. Raises KeyConflict when it is gone."""
        return await self.store.time_left(self._entry(lease))

    async def read(self, key: LeaseKey) -> Lease | None:
        """The lease as it stands, None when there is none; raises BadLease when its value can't be read."""
        entry = await self.store.get(self.lease_key(key))
        return self._lease(entry) if entry else None

    async def release(self, lease: Lease) -> bool:
        """Give a lease back, unless it changed since it was read (raises KeyConflict)."""
        return await self.store.delete(self.lease_key(lease.key), lease.revision)

    async def close(self) -> None:
        """Close the store."""
        await self.store.close()

    def lease_key(self, key: LeaseKey) -> str:
        """The store key of a lease."""
        return f"{self._subnets}{key}"

    def claim_key(self, identity: str) -> str:
        """The store key under which a host says that it lives at a public address. Flannel never looks there."""
        return f"{self._claims}{identity}"

    def _value(self, attrs: LeaseAttrs) -> bytes:
        return attrs.encode(etcd_v2=self.store.values_v2)

    def _read_change(self, change: Change) -> Update | None:
        update = self._read(change.key, change.entry)
        return msgspec.structs.replace(update, revision=change.revision) if update else None

    def _read(self, key: str, entry: Entry | None) -> Update | None:
        if key == self._config_key:
            return Update(key, "config", config=entry.value if entry else None)
        if key.startswith(self._claims):
            return Update(key, "claim", claim=entry)
        if not key.startswith(self._subnets):
            return None
        if entry is None:
            return Update(key, "lease")
        try:
            return Update(key, "lease", lease=self._lease(entry))
        except BadLease as error:
            return Update(key, "lease", bad=BadEntry(key, str(error), entry.revision))

    def _lease(self, entry: Entry) -> Lease:
        return Lease(
            LeaseKey.parse(entry.key.removeprefix(self._subnets)),
            LeaseAttrs.decode(entry.value),
            entry.revision,
            entry.created,
            entry.handle,
            entry.permanent,
        )

    def _entry(self, lease: Lease) -> Entry:
        value = self._value(lease.attrs)
        return Entry(self.lease_key(lease.key), value, lease.revision, lease.created, lease.handle, lease.permanent)
