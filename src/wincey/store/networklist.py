"""Which networks there are in a store: each name below the prefix that has a config (compatibility reference, 5.4)."""

from __future__ import annotations

from collections.abc import AsyncIterator

from wincey.model.networkname import is_network_name
from wincey.store.kv import Entry, KeyValueStore


class NetworkList:
    """The networks below one prefix, by name, each with the entry of its config."""

    def __init__(self, store: KeyValueStore, prefix: str) -> None:
        self.store = store
        self._prefix = "/" + prefix.strip("/") + "/"

    async def read(self) -> tuple[dict[str, Entry], int]:
        """All there are, and the revision to watch from."""
        listing = await self.store.read_all(self._prefix)
        found = {name: entry for entry in listing.entries if (name := self._name(entry.key))}
        return found, listing.revision

    async def watch(self, after: int) -> AsyncIterator[list[tuple[str, Entry | None]]]:
        """Configs put (with the entry) and deleted (None). Raises HistoryLost: read again."""
        async for changes in self.store.watch(self._prefix, after):
            found = [(name, change.entry) for change in changes if (name := self._name(change.key))]
            if found:
                yield found

    async def close(self) -> None:
        """Close the store."""
        await self.store.close()

    def _name(self, key: str) -> str:
        """The network whose config a key is, "" if it is none."""
        name, slash, last = key.removeprefix(self._prefix).rpartition("/")
        return name if slash and last == "config" and is_network_name(name) else ""
