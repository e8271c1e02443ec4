"""What is etcd v2's own: expirations, directories, long polls, its index, its users. On real servers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest

from support.etcd import EtcdServer
from support.stores import fresh_prefix, watching
from wincey.model.errors import HistoryLost, StoreDenied, StoreError, StoreUnavailable
from wincey.store import etcd2
from wincey.store.etcd2 import Etcd2Store
from wincey.store.kv import Change

pytestmark = pytest.mark.etcd

PREFIX = "/coreos.com/network/"


@pytest.fixture(params=["etcd34", "etcd35"])
def server(request: pytest.FixtureRequest) -> EtcdServer:
    made = request.getfixturevalue(request.param)
    assert isinstance(made, EtcdServer)
    return made


@pytest.fixture
async def store(server: EtcdServer) -> AsyncIterator[Etcd2Store]:
    made = Etcd2Store([server.url])
    yield made
    await made.close()


@pytest.fixture
def prefix() -> str:
    return fresh_prefix()


async def test_what_curl_and_flannel_see(store: Etcd2Store, server: EtcdServer, prefix: str) -> None:
    value = b'{"PublicIP":"10.99.0.2","BackendType":"vxlan","BackendData":{"VtepMAC":"aa:bb:cc:dd:ee:ff"}}'
    entry = await store.create(f"{prefix}subnets/10.3.1.0-24", value, 86400.0)
    node = server.http("GET", f"/v2/keys{entry.key}")["node"]
    assert node["value"].encode() == value
    assert 86390 < node["ttl"] <= 86400
    await store.replace(entry, value, None)
    assert "expiration" not in server.http("GET", f"/v2/keys{entry.key}")["node"]


async def test_refreshing_moves_the_index_and_tells_no_watcher(
    store: Etcd2Store, server: EtcdServer, prefix: str
) -> None:
    entry = await store.create(prefix + "a", b"1", 100.0)
    async with watching(store, prefix, entry.revision) as watch:
        fresh = await store.refresh(entry, 1000.0)
        assert fresh.revision > entry.revision
        assert (fresh.value, fresh.created) == (entry.value, entry.created)
        assert (await store.time_left(fresh) or 0) > 900
        await store.delete(entry.key, fresh.revision)
        assert await watch.until(1) == [Change(entry.key, None)]


async def test_a_server_that_knows_no_refresh_gets_the_value_again(store: Etcd2Store, prefix: str) -> None:
    store._can_refresh = False
    entry = await store.create(prefix + "a", b"1 & 2", 100.0)
    async with watching(store, prefix, entry.revision) as watch:
        fresh = await store.refresh(entry, 1000.0)
        assert await watch.until(1) == [Change(entry.key, fresh)]
    assert fresh.value == b"1 & 2"
    assert (await store.time_left(fresh) or 0) > 900


@pytest.mark.parametrize(
    ("version", "refreshes"),
    [
        (b'{"etcdserver":"3.5.16","etcdcluster":"3.5.0"}', True),
        (b'{"etcdserver":"2.3.8","etcdcluster":"2.3.0"}', True),
        (b'{"etcdserver":"2.3.8","etcdcluster":"2.2.0"}', False),  # one member is still older
        (b'{"releaseVersion":"2.0.13","internalVersion":"2"}', False),
        (b"etcd 0.4.9", False),
    ],
)
async def test_who_knows_refresh(version: bytes, refreshes: bool) -> None:
    left = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(version), version))
        await reader.read()  # until the client leaves
        writer.transport.abort()
        left.set()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    store = Etcd2Store([f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"])
    assert await store._refreshes() is refreshes
    await store.close()
    await left.wait()
    server.close()
    await server.wait_closed()


async def test_values_that_are_no_text_are_refused(store: Etcd2Store, prefix: str) -> None:
    with pytest.raises(StoreError, match="no UTF-8"):
        await store.create(prefix + "a", b"\xff", None)


@pytest.mark.parametrize("which", ["subnets", "", ".."])
async def test_a_directory_removed_as_a_whole_calls_for_a_new_listing(
    store: Etcd2Store, server: EtcdServer, which: str
) -> None:
    """etcd tells of the directory alone, and not of what was in it."""
    prefix = fresh_prefix() + "deep/network/"
    await store.create(prefix + "subnets/a", b"1", None)
    listing = await store.read_all(prefix)
    path = {"subnets": prefix + "subnets", "": prefix.rstrip("/"), "..": prefix.removesuffix("/network/")}[which]
    async with watching(store, prefix, listing.revision) as watch:
        server.http("DELETE", f"/v2/keys{path}?recursive=true")
        assert isinstance(await watch.end(), HistoryLost)


async def test_a_directory_made_by_hand_is_no_change(store: Etcd2Store, server: EtcdServer, prefix: str) -> None:
    listing = await store.read_all(prefix)
    async with watching(store, prefix, listing.revision) as watch:
        server.http("PUT", f"/v2/keys{prefix}subnets?dir=true")
        entry = await store.create(prefix + "subnets/a", b"1", None)
        assert await watch.until(1) == [Change(entry.key, entry)]
    assert await store.get(prefix + "subnets") is None
    assert not await store.holds(prefix + "subnets/a/")
    assert await store.holds(prefix)


async def test_an_idle_watch_keeps_up_with_a_busy_store(own_etcd: EtcdServer, prefix: str) -> None:
    """Each empty poll takes the cursor along, so more than 1000 events elsewhere don't leave it behind."""
    store = Etcd2Store([own_etcd.url], poll=0.1)
    other = Etcd2Store([own_etcd.url])
    listing = await store.read_all(prefix)
    async with watching(store, prefix, listing.revision) as watch:
        for n in range(1500):
            await other.replace(await other.create(f"/busy/{n}", b"", 100.0), b"", 100.0)
        entry = await other.create(prefix + "a", b"1", None)
        assert await watch.until(1) == [Change(entry.key, entry)]
    async with watching(store, prefix, listing.revision) as late:
        assert isinstance(await late.end(), HistoryLost)
    await other.close()
    await store.close()


async def test_a_member_that_lost_its_cluster_is_noticed_by_a_silent_watch(
    own_etcd: EtcdServer, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on answering polls; only a read that needs the others fails."""
    store = Etcd2Store([own_etcd.url], poll=0.1)
    told: list[str | None] = []
    outage = asyncio.Event()

    def tell(reason: str | None) -> None:
        told.append(reason)
        outage.set()

    store.on_outage(tell)
    listing = await store.read_all(prefix)
    whole = store._request

    async def request(client: object, method: str, target: str, form: bytes = b"") -> object:
        if "quorum" in target and not told:
            raise StoreUnavailable("etcdserver: request timed out")
        return await whole(client, method, target, form)  # type: ignore[arg-type]  # passed on as it came

    monkeypatch.setattr(store, "_request", request)
    async with watching(store, prefix, listing.revision) as watch:
        async with asyncio.timeout(60):
            await outage.wait()
        entry = await store.create(prefix + "a", b"1", None)
        assert await watch.until(1) == [Change(entry.key, entry)]
    assert told == ["etcdserver: request timed out", None]
    await store.close()


async def test_users(own_etcd: EtcdServer) -> None:
    own_etcd.enable_auth_v2("overlay", "s3cret", PREFIX)
    store = Etcd2Store([own_etcd.url], username="overlay", password="s3cret")
    entry = await store.create(PREFIX + "subnets/a", b"1", 100.0)
    async with watching(store, PREFIX, entry.revision) as watch:
        entry = await store.replace(await store.refresh(entry, 100.0), b"2", 100.0)
        assert await watch.until(1) == [Change(entry.key, entry)]
    assert (await store.read_all(PREFIX)).entries == [entry]
    with pytest.raises(StoreDenied):
        await store.get("/elsewhere")
    await store.close()
    for username, password, advice in [("overlay", "wr0ng", "user 'overlay'"), ("", "", "--etcd-username")]:
        refused = Etcd2Store([own_etcd.url], username=username, password=password)
        with pytest.raises(StoreDenied, match=advice) as caught:
            await refused.get(PREFIX + "subnets/a")
        with pytest.raises(StoreDenied):
            await anext(aiter(refused.watch(PREFIX, 1)))
        assert "wr0ng" not in str(caught.value)
        await refused.close()


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (500, {"errorCode": 300, "message": "Raft Internal Error", "cause": "request timed out"}, StoreUnavailable),
        (500, {"errorCode": 301, "message": "During leader election"}, StoreUnavailable),
        (400, {"errorCode": 105, "message": "Key already exists", "index": 7}, etcd2.Failure),
        (401, {"errorCode": 110, "message": "The request requires user authentication"}, StoreDenied),
        (401, {"message": "Insufficient credentials"}, StoreDenied),
        (503, "upstream is down", StoreUnavailable),
        (404, "404 page not found", etcd2.NoSuchApi),
        (400, "what?", StoreError),
        (200, "<html>", StoreError),
    ],
)
async def test_errors_by_kind(status: int, body: object, error: type[Exception]) -> None:
    store = Etcd2Store(["http://127.0.0.1:1"])
    text = body.encode() if isinstance(body, str) else json.dumps(body).encode()
    with pytest.raises(error, match=r"127\.0\.0\.1:1") as caught:
        store._read(store._endpoints.current, status, {}, text)
    assert type(caught.value) is error
    await store.close()
