"""Open the store that the command line names; nothing but the chosen one is imported."""

from __future__ import annotations

from wincey.model.errors import UsageError
from wincey.store.kv import KeyValueStore
from wincey.store.options import StoreOptions

__all__ = ["StoreOptions", "open_store"]


async def open_store(options: StoreOptions, prefix: str) -> KeyValueStore:
    """The store to keep the network under `prefix` in; raises UsageError, StoreUnavailable, StoreDenied.

    With api `auto` the choice stands as soon as there is any key below the prefix. While there is none (the store's answer
    for the config is None) whoever waits for the config closes the store and calls this again each second, so that a config
    put later through either API is found.
    """
    kind, _, path = options.store.partition(":")
    if kind == "sqlite" and path:
        from wincey.store.sqlite import SqliteStore  # noqa: PLC0415  # only the chosen store costs memory

        return SqliteStore(path)
    if options.store not in {"", "etcd"}:
        raise UsageError(f"--store={options.store}: it can be etcd or sqlite:PATH")
    from wincey.store.etcd import open_etcd  # noqa: PLC0415  # as above

    return await open_etcd(options, "/" + prefix.strip("/") + "/")
