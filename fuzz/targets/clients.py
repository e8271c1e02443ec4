"""Answers of servers to our clients: HTTP framing, etcd v3's gateway and its watches, etcd v2, flanneld's server."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import msgspec

from fuzz.target import Cut, chosen, pieces, play, target
from wincey.http import client as http
from wincey.http.client import HttpClient, HttpError, Interrupted
from wincey.model import remote_api as wire
from wincey.model.address import parse_address
from wincey.model.errors import BadLease, StoreError, WinceyError
from wincey.model.lease import LeaseAttrs, LeaseKey
from wincey.store.etcd2 import Etcd2Store
from wincey.store.etcd3 import Etcd3Store
from wincey.store.kv import Entry
from wincey.store.remote import RemoteRegistry
from wincey.store.remotelist import RemoteNetworkList
from wincey.store.servers import Servers

_ANSWERS = (
    b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 No Content\r\nX-Etcd-Index: 7\r\n\r\n",
    b"HTTP/1.0 500 x\r\n\r\nbody until the end",
    b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\n\r\n",
)


@target("http-client", HttpError, seeds=_ANSWERS)
def http_client(data: bytes) -> None:
    """Bytes in answer to a request: a whole answer or an HttpError, and no connection is left."""

    async def scene() -> None:
        loop = asyncio.get_running_loop()
        client = HttpClient("http://192.0.2.1:1")

        async def connect() -> Any:
            reader = asyncio.StreamReader(loop=loop)
            reader.feed_data(data)
            reader.feed_eof()
            writer = SimpleNamespace(
                write=lambda _: None,
                drain=_nothing,
                is_closing=lambda: False,
                transport=SimpleNamespace(abort=lambda: None),
            )
            return http._Connection(reader, writer)  # type: ignore[arg-type]  # what is asked of it, it has

        client._connect = connect  # type: ignore[method-assign]  # the network is pretended
        try:
            answer = await client.request("GET", "/", timeout=5)
            assert 100 <= answer.status < 1000
        finally:
            await client.close()
        assert not client._busy

    play(scene)


async def _nothing() -> None:
    return


class Server:
    """Stands for an HttpClient: each request gets the next status, headers and body of the input, in pieces."""

    url = "http://192.0.2.1:2379"

    def __init__(self, cut: Cut) -> None:
        self._cut, self._left = cut, 25

    async def request(self, *arguments: Any, **named: Any) -> http.Response:
        async with self.stream(*arguments, **named) as stream:
            return http.Response(stream.status, stream.headers, await stream.read_all())

    @contextlib.asynccontextmanager
    async def stream(self, *arguments: Any, **named: Any) -> AsyncIterator[Any]:
        await asyncio.sleep(0.001)
        self._left -= 1
        if not self._cut.left or self._left < 0:
            raise Interrupted("the input is used up")
        status = chosen(self._cut, (200, 200, 200, 201, 400, 401, 403, 404, 409, 412, 500, 503))
        headers = {"x-etcd-index": self._cut.bytes(self._cut.number(4)).decode("latin-1"), wire.CLOUD: wire.KEPT}
        if self._cut.number(4) == 3:
            headers |= {wire.ERROR: wire.DUPLICATE_HOST, wire.CONFIG: "changed"}
        yield _Body(status, headers, self._cut.piece())

    async def close(self) -> None:
        return


class _Body:
    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status, self.headers = status, headers
        self._pieces = [body[at : at + 50] for at in range(0, len(body), 50)]

    async def read(self) -> bytes:
        return self._pieces.pop(0) if self._pieces else b""

    async def read_all(self) -> bytes:
        return b"".join(self._pieces)


def _answer(body: str, status: int = 0, index: str = "7") -> bytes:
    return bytes([status, len(index)]) + index.encode() + b"\0" + pieces(body)


async def _tried(act: Callable[[], Any]) -> Any:
    """One call: a result, or one of our errors with a text."""
    try:
        return await act()
    except WinceyError as error:
        assert str(error)  # noqa: PT017  # this is no test of pytest's
        return None


async def _followed(watch: AsyncIterator[list[Any]]) -> None:
    """A watch for a while, as it goes on for ever over failures."""
    try:
        async with asyncio.timeout(120):
            async for batch in watch:
                assert batch
    except (TimeoutError, WinceyError):
        pass
    finally:
        await watch.aclose()  # type: ignore[attr-defined]  # every watch is a generator


_KV = '{"key":"L24vc3VibmV0cy8xMC4zLjUuMC0yNA==","value":"e30=","create_revision":"5","mod_revision":"5","lease":"7"}'
_RANGE = '{"header":{"revision":"9"},"kvs":[%s],"more":false,"count":"1"}' % _KV
_WATCH = (
    '{"result":{"header":{"revision":"9"},"created":true}}\n{"result":{"header":{"revision":"10"},"events":[{"kv":%s},{"type":"DELETE","kv":{"key":"L24vYQ==","mod_revision":"11"}}]}}\n'
    % _KV
)
_TXN = (
    '{"header":{"revision":"9"},"succeeded":true,"responses":[{"response_delete_range":{"deleted":"1","prev_kvs":[%s]}}]}'
    % _KV
)


@target("etcd-v3", seeds=(
    bytes([0]) + _answer(_RANGE), bytes([1]) + _answer(_RANGE), bytes([2]) + _answer(_RANGE) + _answer(_WATCH),
    bytes([2]) + _answer(_RANGE) + _answer('{"result":{"canceled":true,"compact_revision":"8","cancel_reason":"x"}}'),
    bytes([3]) + _answer('{"ID":"7","TTL":"60"}') + _answer(_TXN), bytes([4]) + _answer(_TXN), bytes([5]) + _answer('{"result":{"TTL":"60"}}') + _answer(_RANGE),
    bytes([6]) + _answer('{"TTL":"60","keys":["L24vYQ=="]}'), bytes([0]) + _answer('{"error":"x","code":16,"message":"etcdserver: invalid auth token"}', 5),
    bytes([0]) + _answer("404 page not found", 7) * 3, bytes([7]) + _answer('{"token":"t"}') + _answer(_RANGE),
))  # fmt: skip
def etcd_v3(data: bytes) -> None:
    """Every call of the store on any answers: a result of its type, or an error of ours."""
    cut = Cut(data)
    what = cut.number(8)

    async def scene() -> None:
        user = {"username": "u", "password": "p"} if what == 7 else {}
        store = Etcd3Store(["http://192.0.2.1:2379"], deadline=0.3, probe_interval=5, random=lambda: 0.5, **user)
        store._endpoints._clients = [Server(cut)]  # type: ignore[list-item]  # the network is pretended
        await _use(store, what % 7)
        await store.close()

    play(scene)


@target("etcd-v2", seeds=(
    bytes([0]) + _answer('{"action":"get","node":{"key":"/n/config","value":"{}","modifiedIndex":5,"createdIndex":5,"expiration":"x","ttl":9}}'),
    bytes([1]) + _answer('{"action":"get","node":{"key":"/n","dir":true,"nodes":[{"key":"/n/a","value":"b","modifiedIndex":5,"createdIndex":5}]}}'),
    bytes([2]) + _answer('{"action":"set","node":{"key":"/n/a","value":"b","modifiedIndex":9,"createdIndex":9}}'),
    bytes([2]) + _answer('{"errorCode":401,"message":"The event in requested index is outdated and cleared","cause":"x","index":99}', 4),
    bytes([3]) + _answer('{"action":"create","node":{"key":"/n/a","value":"v","modifiedIndex":9,"createdIndex":9}}', 3),
    bytes([4]) + _answer('{"errorCode":100,"message":"Key not found","index":9}', 7),
    bytes([2]) + _answer('{"action":"get","node":{"key":"/n/config"}}', 0, "3"),
))  # fmt: skip
def etcd_v2(data: bytes) -> None:
    """The same of the v2 API."""
    cut = Cut(data)
    what = cut.number(7)

    async def scene() -> None:
        store = Etcd2Store(["http://192.0.2.1:2379"], deadline=0.3, poll=5, random=lambda: 0.5)
        store._endpoints._clients = [Server(cut)]  # type: ignore[list-item]  # likewise
        await _use(store, what)
        await store.close()

    play(scene)


async def _use(store: Etcd2Store | Etcd3Store, what: int) -> None:
    entry = Entry("/n/a", b"v", 5, 5, "7" if isinstance(store, Etcd3Store) else "")
    match what:
        case 0:
            found = await _tried(lambda: store.get("/n/config"))
            assert found is None or isinstance(found, Entry)
        case 1:
            if listing := await _tried(lambda: store.read_all("/n/")):
                assert all(isinstance(each.key, str) for each in listing.entries)
        case 2:
            await _followed(store.watch("/n/", 5))
        case 3:
            await _tried(lambda: store.create("/n/a", b"v", 60))
        case 4:
            await _tried(lambda: store.delete("/n/a", 5))
        case 5:
            await _tried(lambda: store.refresh(entry, 60))
            await _tried(lambda: store.holds("/n/"))
        case _:
            await _tried(lambda: store.time_left(entry))
            await _tried(lambda: store.replace(entry, b"w", 60))


_LEASE = '{"Subnet":"10.3.7.0/24","Attrs":{"PublicIP":"192.0.2.7"},"Expiration":"2030-01-01T00:00:00.5+01:00"}'
_SNAPSHOT = '{"events":null,"snapshot":[%s],"cursor":"5"}' % _LEASE
_EVENTS = '{"events":[{"type":"added","lease":%s},{"type":"removed","lease":%s}],"snapshot":null,"cursor":"6"}' % (
    _LEASE,
    _LEASE,
)


@target("remote-client", seeds=(
    bytes([0]) + _answer('{"Network":"10.3.0.0/16"}') + _answer(_SNAPSHOT), bytes([1]) + _answer("{}") + _answer(_EVENTS),
    bytes([2]) + _answer(_LEASE), bytes([3]) + _answer(_LEASE), bytes([4]) + _answer(_SNAPSHOT), bytes([5]) + _answer("", 8),
    bytes([6]) + _answer('{"events":null,"snapshot":["blue","red"],"cursor":"5"}') + _answer("{}") * 2,
    bytes([7]) + _answer("") + _answer('{"events":[{"type":"added","lease":%s,"network":"blue"}],"snapshot":null,"cursor":"6"}' % _LEASE) + _answer("{}"),
))  # fmt: skip
def remote_client(data: bytes) -> None:
    """Answers of a flanneld server."""
    cut = Cut(data)
    what = cut.number(8)

    async def scene() -> None:
        servers = Servers(["http://192.0.2.1:8888"], host="h i")
        servers.endpoints.random = lambda: 0.5
        servers.endpoints._clients = [Server(cut)]  # type: ignore[list-item]  # likewise
        registry, networks = RemoteRegistry(servers, look=3), RemoteNetworkList(servers, ["blue"])
        key, attrs = LeaseKey.parse("10.3.7.0-24"), LeaseAttrs(parse_address("192.0.2.7"))
        lease = wire.decode_lease(_LEASE.encode())[0]
        match what:
            case 0:
                await _tried(registry.snapshot)
            case 1:
                await _followed(registry.watch(5))
            case 2:
                await _tried(lambda: registry.create(key, attrs))
            case 3:
                await _tried(lambda: registry.renew(lease))
            case 4:
                await _tried(lambda: registry.time_left(lease))
            case 5:
                await _tried(lambda: registry.release(lease))
            case 6:
                await _tried(networks.read)
            case _:
                await _followed(networks.watch(5))
        await registry.close()

    play(scene)


@target(
    "remote-wire",
    BadLease,
    ValueError,
    StoreError,
    seeds=(_LEASE, _SNAPSHOT, _EVENTS, '{"events":null,"snapshot":["a"],"cursor":""}'),
)
def remote_wire(data: bytes) -> None:
    """The codec of that API alone; one bad lease of a snapshot is passed over, and the good one beside it stands."""
    for read in (
        wire.decode_attrs,
        wire.decode_lease,
        wire.decode_networks,
        wire.decode_network_changes,
        wire.decode_expirations,
    ):
        try:
            read(data)
        except (BadLease, ValueError):
            continue
    with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raw = msgspec.json.decode(data, type=dict[str, Any])
        if isinstance(raw.get("snapshot"), list) and isinstance(raw.get("cursor"), str):
            raw["snapshot"].append(msgspec.json.decode(_LEASE))
            with contextlib.suppress(ValueError):
                watched = wire.decode_watched(msgspec.json.encode(raw))
                assert watched.snapshot[-1].key == LeaseKey.parse("10.3.7.0-24")
    wire.decode_watched(data)
