"""The protocol of a key-value store, as narrow as leases need it.

Every call has a deadline of its own and raises one of: StoreUnavailable (no answer in time from any endpoint; safe to
repeat), StoreDenied (refused: certificate, user, permission), StoreError (anything else the server says). Keys are absolute
paths such as `/coreos.com/network/config`. Revisions are positive, grow with every change in the store and are comparable
within one store only.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

import msgspec


class Entry(msgspec.Struct, frozen=True, gc=False):
    """One key as it stands.

    revision: of the last change (v3 mod_revision, v2 modifiedIndex). created: of the creation. handle: what the store
    keeps the time limit by (v3: lease id in decimal; else ""). permanent: no time limit.
    """

    key: str
    value: bytes
    revision: int
    created: int
    handle: str = ""
    permanent: bool = False


class Listing(msgspec.Struct):
    """All entries below a prefix at one moment, and the revision to watch from."""

    entries: list[Entry]
    revision: int


class Change(msgspec.Struct, frozen=True):
    """A key was put (`entry`) or removed by delete or expiry (None). removed_at: the revision of a removal, else 0."""

    key: str
    entry: Entry | None
    removed_at: int = 0

    @property
    def revision(self) -> int:
        """The store's revision after this change."""
        return self.entry.revision if self.entry else self.removed_at


class KeyValueStore(Protocol):
    """etcd v3, etcd v2, SQLite. Prefixes end in `/` and match only keys below them."""

    @property
    def name(self) -> str:
        """What logs call it, without secrets: `etcd v3 at http://127.0.0.1:2379`."""

    @property
    def values_v2(self) -> bool:
        """Whether lease values are written in the shorter form of the etcd v2 eras."""

    async def get(self, key: str) -> Entry | None:
        """The entry, or None when there is no such key."""

    async def read_all(self, prefix: str) -> Listing:
        """Every entry below `prefix`, ordered by key, as of the listing's revision. An absent prefix is an empty list."""

    async def create(self, key: str, value: bytes, ttl: float | None) -> Entry:
        """Put if absent; raises KeyExists. ttl in seconds, None for no limit."""

    async def replace(self, entry: Entry, value: bytes, ttl: float | None) -> Entry:
        """Put a new value if the key is still at `entry.revision`; raises KeyConflict. A new time limit of ttl seconds
        (None for no limit) takes the place of the old one."""

    async def refresh(self, entry: Entry, ttl: float) -> Entry:
        """Start the time limit anew without a change that watchers see, where the store can; raises KeyConflict when the
        key is gone, expired or changed since. The entry returned has the revision that the next call needs."""

    async def time_left(self, entry: Entry) -> float | None:
        """Seconds until the key expires, None when it never does; raises KeyConflict when it is gone."""

    async def delete(self, key: str, revision: int | None = None) -> bool:
        """Delete the key (only at `revision` if given; raises KeyConflict). False when it was not there."""

    def watch(self, prefix: str, after: int) -> AsyncIterator[list[Change]]:
        """Changes below `prefix` with a revision above `after`, in order, for ever, over reconnects and failovers.

        Raises HistoryLost when the store no longer has them: list again and watch from there. Raises StoreDenied. An
        outage is waited out inside (with growing, jittered pauses of at most 5 s) and reported through `on_outage`.
        """

    def on_outage(self, callback: OutageCallback) -> None:
        """Have `callback(reason)` called when a watch loses the store, and `callback(None)` when it is back."""

    async def close(self) -> None:
        """End all connections. Calls under way end with StoreUnavailable."""


class OutageCallback(Protocol):
    """Told why a watch lost the store, or None when it is back."""

    def __call__(self, reason: str | None) -> None: ...
