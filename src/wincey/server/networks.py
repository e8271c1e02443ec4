"""The networks of a store: each `<prefix>/NAME/config` is one, and `<prefix>/config` the one without a name."""

from __future__ import annotations

from collections.abc import AsyncIterator

import msgspec

from wincey.model.networkname import UNNAMED
from wincey.store.kv import Change, KeyValueStore


class NetworkChange(msgspec.Struct, frozen=True):
    """A network came (`there`) or went, at a revision of the store."""

    name: str
    there: bool
    revision: int


def network_prefix(prefix: str, network: str) -> str:
    """Where a network is kept. prefix: without a `/` at its end."""
    return prefix if network == UNNAMED else f"{prefix}/{network}"


def network_of(prefix: str, key: str) -> str | None:
    """The named network whose config a key is."""
    name, slash, rest = key.removeprefix(f"{prefix}/").partition("/")
    return name if slash and rest == "config" else None


async def list_networks(store: KeyValueStore, prefix: str) -> tuple[list[str], int]:
    """The named networks, and the revision to watch from."""
    listing = await store.read_all(f"{prefix}/")
    return [name for entry in listing.entries if (name := network_of(prefix, entry.key))], listing.revision


async def watch_networks(store: KeyValueStore, prefix: str, after: int) -> AsyncIterator[list[NetworkChange]]:
    """Networks that come and go after a revision; a changed config is no such change."""
    async for changes in store.watch(f"{prefix}/", after):
        if found := [change for each in changes if (change := _read(prefix, each))]:
            yield found


def _read(prefix: str, change: Change) -> NetworkChange | None:
    name = network_of(prefix, change.key)
    if name is None or (change.entry and change.entry.created != change.entry.revision):
        return None
    return NetworkChange(name, change.entry is not None, change.revision)
