"""Which networks there are, in every store."""

from __future__ import annotations

import asyncio

import pytest

from support.stores import Backend
from wincey.store.kv import KeyValueStore
from wincey.store.networklist import NetworkList

NO_NETWORKS = (
    "config",
    "subnets/10.3.1.0-24",
    "wincey/config",
    "subnets/config",
    "_x/config",
    "a/b/config",
    "blue/other",
)


@pytest.fixture
def networks(store: KeyValueStore, prefix: str) -> NetworkList:
    return NetworkList(store, prefix)


async def test_a_network_is_a_name_with_a_config(backend: Backend, networks: NetworkList, prefix: str) -> None:
    assert (await networks.read())[0] == {}
    for key in (*NO_NETWORKS, "blue/subnets/10.3.1.0-24"):
        await backend.put(f"{prefix}{key}", "{}")
    assert (await networks.read())[0] == {}
    await backend.put(f"{prefix}green/config", "second")
    await backend.put(f"{prefix}blue/config", "third")
    found, revision = await networks.read()
    assert {name: entry.value for name, entry in found.items()} == {"green": b"second", "blue": b"third"}
    assert 0 < found["green"].revision < found["blue"].revision <= revision


async def test_they_are_watched(backend: Backend, networks: NetworkList, prefix: str) -> None:
    await backend.put(f"{prefix}blue/config", "{}")
    _, revision = await networks.read()
    watch = networks.watch(revision)
    seen: list[tuple[str, bytes | None]] = []
    async with asyncio.timeout(20):
        await backend.put(f"{prefix}subnets/config", "{}")
        await backend.put(f"{prefix}green/config", "new")
        await backend.remove(f"{prefix}blue/config")
        while len(seen) < 2:
            seen += [(name, entry.value if entry else None) for name, entry in await anext(watch)]
    assert seen == [("green", b"new"), ("blue", None)]
    await watch.aclose()  # type: ignore[attr-defined]  # an async generator behind its protocol
