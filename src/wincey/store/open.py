"""Open the store that the command line names; nothing but the chosen one is imported."""

from __future__ import annotations

from typing import Literal

import msgspec

from wincey.model.errors import UsageError
from wincey.store.kv import KeyValueStore


class StoreOptions(msgspec.Struct):
    """What the command line says about the store. store: "" or `etcd`, or `sqlite:PATH`; the rest is for etcd."""

    store: str = ""
    api: Literal["auto", "v3", "v2"] = "auto"
    endpoints: list[str] = msgspec.field(default_factory=lambda: ["http://127.0.0.1:4001", "http://127.0.0.1:2379"])
    keyfile: str = ""
    certfile: str = ""
    cafile: str = ""
    username: str = ""
    password: str = ""

    def __repr__(self) -> str:
        return f"StoreOptions(store={self.store!r}, api={self.api!r}, endpoints={self.endpoints!r})"  # no secrets


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
