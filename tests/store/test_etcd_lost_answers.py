"""Writes whose answer was lost on the way: what was done is not done twice, and our own write is no conflict."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from support.etcd import EtcdServer
from support.stores import fresh_prefix
from wincey.model.errors import KeyConflict, KeyExists
from wincey.store.etcd2 import Etcd2Store
from wincey.store.etcd3 import Etcd3Store
from wincey.store.kv import KeyValueStore

pytestmark = pytest.mark.etcd


class Proxy:
    """Passes bytes between clients and one server. `swallow` names requests whose next answer it keeps to itself: it lets
    the server answer, runs `meanwhile`, and closes the connection."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.swallow: bytes | None = None
        self.swallowed = 0
        self.meanwhile: asyncio.Future[object] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> str:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    async def _serve(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._tasks.add(task)
        server, to_server = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            while data := await client.read(65536):  # our requests come in one piece, one after the other
                to_server.write(data)
                answer = await server.read(65536)
                if self.swallow and self.swallow in data:
                    self.swallow = None
                    self.swallowed += 1
                    break
                to_client.write(answer)
        finally:
            self._tasks.discard(task)
            to_server.transport.abort()
            to_client.transport.abort()
            await asyncio.sleep(0)


@pytest.fixture
async def proxy(etcd34: EtcdServer) -> AsyncIterator[tuple[Proxy, str]]:
    made = Proxy(etcd34.port)
    yield made, await made.start()
    await made.stop()


@pytest.fixture(params=["v3", "v2"])
async def stores(
    request: pytest.FixtureRequest, etcd34: EtcdServer, proxy: tuple[Proxy, str]
) -> AsyncIterator[tuple[KeyValueStore, KeyValueStore]]:
    """One through the proxy, one directly."""
    kind = Etcd3Store if request.param == "v3" else Etcd2Store
    through, direct = kind([proxy[1]]), kind([etcd34.url])
    yield through, direct
    await through.close()
    await direct.close()


WRITES = {Etcd3Store: b"/v3/kv/txn", Etcd2Store: b"PUT /v2/keys"}


def lose_next_write(proxy: tuple[Proxy, str], store: KeyValueStore) -> Proxy:
    proxy[0].swallow = WRITES[type(store)]  # type: ignore[index]  # one of the two
    return proxy[0]


@pytest.mark.parametrize("ttl", [100.0, None])
async def test_our_own_creation_is_no_conflict(
    stores: tuple[KeyValueStore, KeyValueStore], proxy: tuple[Proxy, str], ttl: float | None
) -> None:
    store, direct = stores
    key = fresh_prefix() + "a"
    loser = lose_next_write(proxy, store)
    entry = await store.create(key, b"ours", ttl)
    assert loser.swallowed == 1
    assert await direct.get(key) == entry
    with pytest.raises(KeyExists):
        await store.create(key, b"ours", ttl)


async def test_somebody_elses_is_one(stores: tuple[KeyValueStore, KeyValueStore], proxy: tuple[Proxy, str]) -> None:
    store, direct = stores
    key = fresh_prefix() + "a"
    entry = await direct.create(key, b"theirs", 100.0)
    lose_next_write(proxy, store)
    with pytest.raises(KeyExists):
        await store.create(key, b"ours", 100.0)
    lose_next_write(proxy, store)
    changed = await direct.replace(entry, b"theirs again", 100.0)
    with pytest.raises(KeyConflict):
        await store.replace(entry, b"ours", 100.0)
    assert proxy[0].swallowed == 2
    assert await direct.get(key) == changed


@pytest.mark.parametrize("ttl", [100.0, None])
async def test_our_own_replacement_is_no_conflict(
    stores: tuple[KeyValueStore, KeyValueStore], proxy: tuple[Proxy, str], ttl: float | None
) -> None:
    store, direct = stores
    entry = await store.create(fresh_prefix() + "a", b"1", 100.0)
    loser = lose_next_write(proxy, store)
    changed = await store.replace(entry, b"2", ttl)
    assert loser.swallowed == 1
    assert changed.value == b"2"
    assert await direct.get(entry.key) == changed
    assert changed.revision == entry.revision + 1  # done once


async def test_our_own_renewal_is_no_conflict(
    stores: tuple[KeyValueStore, KeyValueStore], proxy: tuple[Proxy, str]
) -> None:
    store, direct = stores
    entry = await store.create(fresh_prefix() + "a", b"1", 100.0)
    proxy[0].swallow = b"/lease/keepalive" if isinstance(store, Etcd3Store) else b"refresh=true"
    fresh = await store.refresh(entry, 100.0)
    assert proxy[0].swallowed == 1
    assert await direct.get(entry.key) == fresh


async def test_our_own_deletion_counts(stores: tuple[KeyValueStore, KeyValueStore], proxy: tuple[Proxy, str]) -> None:
    store, direct = stores
    entry = await store.create(fresh_prefix() + "a", b"1", 100.0)
    proxy[0].swallow = b"/v3/kv/txn" if isinstance(store, Etcd3Store) else b"DELETE /v2"
    assert await store.delete(entry.key, entry.revision) is True
    assert proxy[0].swallowed == 1
    assert await direct.get(entry.key) is None


async def test_a_grant_made_twice_is_one_lease(proxy: tuple[Proxy, str], etcd34: EtcdServer) -> None:
    before = etcd34.ctl("lease", "list").count("\n")
    store = Etcd3Store([proxy[1]])
    proxy[0].swallow = b"/v3/lease/grant"
    await store.create(fresh_prefix() + "a", b"1", 100.0)
    assert proxy[0].swallowed == 1
    assert etcd34.ctl("lease", "list").count("\n") == before + 1
    await store.close()
