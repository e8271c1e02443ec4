"""The HTTP client against a server that plays one part per test."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from support.certs import Authority
from support.stores import eventually
from support.tls_listener import tls_listener
from wincey.http.client import ConnectFailed, HttpClient, Interrupted, Origin, TlsFailed
from wincey.store.endpoints import tls_context

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


class Peer:
    """One connection as the server sees it."""

    def __init__(self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.number = number  # 0 for the first connection
        self.reader = reader
        self.writer = writer

    async def request(self) -> bytes:
        """Head and body of the next request; b"" at the connection's end."""
        try:
            head = await self.reader.readuntil(b"\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError):
            return b""
        length = next((line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), b": 0")
        return head + await self.reader.readexactly(int(length.split(b":")[1]))

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()


class Server:
    """Plays `part` for each connection, and closes it when that returns."""

    def __init__(self, part: Callable[[Peer], Awaitable[None]]) -> None:
        self.connections = 0
        self.ended = 0
        self._part = part
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, *, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None, path: str = "") -> str:
        if path:
            self._server = await asyncio.start_unix_server(self._serve, path)
            return f"unix://{path}"
        self._server = await asyncio.start_server(self._serve, host, 0, ssl=tls)
        port = self._server.sockets[0].getsockname()[1]
        return f"{'https' if tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"

    async def stop(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._tasks.add(task)
        peer = Peer(self.connections, reader, writer)
        self.connections += 1
        try:
            await self._part(peer)
        except ConnectionError:
            pass  # the client is gone
        finally:
            self.ended += 1
            self._tasks.discard(task)
            writer.transport.abort()
            await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def serving(
    part: Callable[[Peer], Awaitable[None]],
    *,
    client_tls: ssl.SSLContext | None = None,
    server_tls: ssl.SSLContext | None = None,
    host: str = "127.0.0.1",
    path: str = "",
    **options: float,
) -> AsyncIterator[tuple[Server, HttpClient]]:
    server = Server(part)
    url = await server.start(host=host, tls=server_tls, path=path)
    client = HttpClient(url, client_tls, **options)  # type: ignore[arg-type]  # numbers of either kind
    try:
        yield server, client
    finally:
        await client.close()
        await server.stop()


async def always_ok(peer: Peer) -> None:
    while await peer.request():
        await peer.send(OK)


async def test_requests_follow_each_other_on_one_connection() -> None:
    seen = []

    async def part(peer: Peer) -> None:
        while request := await peer.request():
            seen.append(request)
            await peer.send(OK)

    async with serving(part) as (server, client):
        for _ in range(3):
            response = await client.request("POST", "/v3/kv/range?x=1", headers={"authorization": "t"}, body=b"hello")
            assert (response.status, response.body, response.headers["content-length"]) == (200, b"ok", "2")
        assert server.connections == 1
    lines = seen[0].split(b"\r\n")
    assert lines[0] == b"POST /v3/kv/range?x=1 HTTP/1.1"
    assert {b"authorization: t", b"content-length: 5", f"host: {client.origin.authority}".encode()} <= set(lines)
    assert lines[-1] == b"hello"


async def test_requests_at_the_same_time_have_a_connection_each_and_few_are_kept() -> None:
    gate = asyncio.Event()

    async def part(peer: Peer) -> None:
        while await peer.request():
            await gate.wait()
            await peer.send(OK)

    async with serving(part, keep=2) as (server, client):
        calls = [asyncio.create_task(client.request("GET", "/")) for _ in range(6)]
        await eventually(lambda: server.connections == 6, "six connections")
        gate.set()
        await asyncio.gather(*calls)
        await eventually(lambda: server.ended == 4, "all but two connections closed")
        await client.request("GET", "/")
        assert server.connections == 6


async def test_a_connection_that_is_not_used_is_closed_after_a_while() -> None:
    async with serving(always_ok, idle_limit=0.05) as (server, client):
        await client.request("GET", "/")
        await eventually(lambda: server.ended == 1, "the connection closed")
        await client.request("GET", "/")
        assert server.connections == 2


async def test_a_chunked_body_with_trailers_and_an_answer_before_the_answer() -> None:
    async def part(peer: Peer) -> None:
        while await peer.request():
            await peer.send(b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n")
            await peer.send(b"HTTP/1.1 404 Not Found\r\ntransfer-encoding: chunked\r\ntrailer: x\r\n\r\n3\r\nab")
            await peer.send(b"c\r\n5\r\ndefgh\r\n0\r\nx: y\r\n\r\n")

    async with serving(part) as (server, client):
        for _ in range(2):
            response = await client.request("GET", "/")
            assert (response.status, response.body) == (404, b"abcdefgh")
        assert server.connections == 1


@pytest.mark.parametrize("framing", ["length", "chunked", "end of connection"])
async def test_a_body_of_many_megabytes(framing: str) -> None:
    body = bytes(range(256)) * 32768  # 8 MiB

    async def part(peer: Peer) -> None:
        await peer.request()
        if framing == "length":
            await peer.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        elif framing == "chunked":
            await peer.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
            for start in range(0, len(body), 4096):
                await peer.send(b"1000\r\n" + body[start : start + 4096] + b"\r\n")
            await peer.send(b"0\r\n\r\n")
        else:
            await peer.send(b"HTTP/1.1 200 OK\r\n\r\n" + body)

    async with serving(part) as (_, client):
        assert (await client.request("GET", "/")).body == body


async def test_a_large_request_arrives_whole() -> None:
    seen = []

    async def part(peer: Peer) -> None:
        seen.append(await peer.request())
        await peer.send(OK)

    async with serving(part) as (_, client):
        await client.request("PUT", "/", body=b"x" * 3_000_000)
    assert seen[0].endswith(b"\r\n\r\n" + b"x" * 3_000_000)


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200",
        b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n9\r\nhalf",
        b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
    ],
)
async def test_an_answer_that_is_none_or_breaks_off(answer: bytes) -> None:
    async def part(peer: Peer) -> None:
        await peer.request()
        await peer.send(answer)
        peer.writer.write_eof()
        await peer.request()

    async with serving(part) as (server, client):
        with pytest.raises(Interrupted, match=r"^127\.0\.0\.1:\d+: "):
            await client.request("GET", "/")
        await eventually(lambda: server.ended == 1, "the connection closed")
        assert server.connections == 1


def closes_on_second_request(parting: bytes) -> Callable[[Peer], Awaitable[None]]:
    async def part(peer: Peer) -> None:
        await peer.request()
        await peer.send(OK)
        if peer.number == 0:
            if await peer.request():
                await peer.send(parting)
                peer.writer.write_eof()
        else:
            await peer.request()

    return part


async def test_a_kept_connection_found_closed_is_replaced_once() -> None:
    async with serving(closes_on_second_request(b"")) as (server, client):
        await client.request("POST", "/", body=b"1")
        assert (await client.request("POST", "/", body=b"2")).body == b"ok"
        assert server.connections == 2


async def test_a_request_that_must_not_be_repeated_is_not() -> None:
    async with serving(closes_on_second_request(b"")) as (server, client):
        await client.request("POST", "/", body=b"1")
        with pytest.raises(Interrupted):
            await client.request("POST", "/", body=b"2", repeat=False)
        assert server.connections == 1


async def test_a_request_whose_answer_began_is_not_repeated() -> None:
    async with serving(closes_on_second_request(b"HTTP/1.1 2")) as (server, client):
        await client.request("GET", "/")
        with pytest.raises(Interrupted):
            await client.request("GET", "/")
        assert server.connections == 1


async def test_a_connection_that_the_server_has_closed_is_not_used_again() -> None:
    async def part(peer: Peer) -> None:
        await peer.request()
        await peer.send(OK)

    async with serving(part) as (server, client):
        await client.request("GET", "/")
        await eventually(lambda: not client._idle[0].alive(), "the end of the connection heard of")
        assert (await client.request("POST", "/", repeat=False)).body == b"ok"
        assert server.connections == 2


async def test_a_connection_that_is_to_be_closed_is_not_kept() -> None:
    async def part(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok")
        await peer.request()

    async with serving(part) as (server, client):
        await client.request("GET", "/")
        await client.request("GET", "/")
        assert server.connections == 2


async def endless(peer: Peer) -> None:
    await peer.request()
    await peer.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
    number = 0
    while True:
        await peer.send(b"2\r\n%d\n\r\n" % number)
        number = (number + 1) % 10
        await asyncio.sleep(0.001)


async def test_a_stream_comes_piece_by_piece_and_ends_when_left() -> None:
    async with serving(endless) as (server, client):
        body = b""
        async with client.stream("POST", "/v3/watch", body=b"{}") as stream:
            assert stream.status == 200
            async for piece in stream:
                body += piece
                if len(body) >= 20:
                    break
        assert body.startswith(b"0\n1\n2\n3\n4\n5\n6\n7\n8\n9\n")
        await eventually(lambda: server.ended == 1, "the connection closed")


async def test_a_read_given_up_loses_nothing() -> None:
    more = asyncio.Event()

    async def part(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nabc")
        await more.wait()
        await peer.send(b"def")
        await peer.request()

    async with serving(part) as (_, client), client.stream("GET", "/") as stream:
        assert await stream.read() == b"abc"
        for _ in range(3):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await stream.read()
        more.set()
        assert await stream.read_all() == b"def"
        assert await stream.read() == b""


async def test_cancelling_closes_the_connection() -> None:
    async def part(peer: Peer) -> None:
        while await peer.request():
            pass

    async with serving(part) as (server, client):
        call = asyncio.create_task(client.request("GET", "/"))
        await eventually(lambda: server.connections == 1, "a connection")
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await eventually(lambda: server.ended == 1, "the connection closed")


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf"])
async def test_the_deadline_covers_the_whole_exchange(answer: bytes) -> None:
    async def part(peer: Peer) -> None:
        await peer.request()
        await peer.send(answer)
        await peer.request()

    async with serving(part) as (server, client):
        with pytest.raises(Interrupted, match=r"no answer within 0\.1 s"):
            await client.request("GET", "/", timeout=0.1)
        await eventually(lambda: server.ended == 1, "the connection closed")


async def test_closing_ends_what_is_under_way() -> None:
    async with serving(endless) as (server, client):
        call = asyncio.create_task(client.request("GET", "/"))
        await eventually(lambda: server.connections == 1, "a connection")
        await client.close()
        with pytest.raises(Interrupted):
            await call
        with pytest.raises(ConnectFailed, match="closed"):
            await client.request("GET", "/")


async def test_nobody_listens() -> None:
    async with serving(always_ok) as (server, client):
        await server.stop()
        with pytest.raises(ConnectFailed, match=rf"{client.origin.authority}: .*refused"):
            await client.request("GET", "/")


async def test_a_unix_socket(tmp_path: Path) -> None:
    async with serving(always_ok, path=str(tmp_path / "s")) as (_, client):
        assert (await client.request("GET", "/_ping")).body == b"ok"
    missing = HttpClient(f"unix://{tmp_path}/none")
    with pytest.raises(ConnectFailed, match=r"/none: No such file"):
        await missing.request("GET", "/")


async def test_ipv6() -> None:
    async with serving(always_ok, host="::1") as (_, client):
        assert client.origin.authority.startswith("[::1]:")
        assert (await client.request("GET", "/")).body == b"ok"


def test_urls() -> None:
    assert Origin.parse("http://10.0.0.1:2379") == Origin("10.0.0.1", 2379)
    assert Origin.parse("https://etcd.example/base/") == Origin("etcd.example", 443, True, "/base")
    assert Origin.parse("http://[fd00::1]:80").authority == "[fd00::1]:80"
    assert Origin.parse("unix:///run/x.sock") == Origin("localhost", path="/run/x.sock")
    for url in ["", "10.0.0.1:2379", "ftp://x", "http://", "http://x:99999", "http://u:p@x", "http://x?q", "unix://x"]:
        with pytest.raises(ValueError, match="not of the form"):
            Origin.parse(url)


# TLS


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "ca")


def server_context(authority: Authority, *, client_certificates: bool) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(authority.ca))
    context.load_cert_chain(*authority.issue("server"))
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT  # as wincey.store.endpoints has it
    context.verify_mode = ssl.CERT_REQUIRED if client_certificates else ssl.CERT_NONE
    return context


async def test_tls_with_a_client_certificate(authority: Authority) -> None:
    subjects = []

    async def part(peer: Peer) -> None:
        subjects.append(peer.writer.get_extra_info("peercert")["subject"])
        await always_ok(peer)

    one = authority.issue("client", "/O=overlay")
    ours = tls_context(str(one.key), str(one.cert), str(authority.ca))
    context = server_context(authority, client_certificates=True)
    async with serving(part, client_tls=ours, server_tls=context) as (_, client):
        assert (await client.request("GET", "/")).body == b"ok"
    assert subjects == [((("organizationName", "overlay"),),)]


async def test_a_server_that_our_ca_does_not_vouch_for(authority: Authority, tmp_path: Path) -> None:
    stranger = ssl.create_default_context(cafile=str(Authority(tmp_path / "other").ca))
    with tls_listener(server_context(authority, client_certificates=False)) as url:
        client = HttpClient(url, stranger)
        with pytest.raises(TlsFailed, match="the server's certificate is not accepted"):
            await client.request("GET", "/")
        await client.close()


async def test_tls_to_a_server_that_speaks_none(authority: Authority) -> None:
    async def part(peer: Peer) -> None:
        await peer.reader.read(100)
        await peer.send(b"HTTP/1.0 400 Bad Request\r\n\r\nClient sent an HTTPS request?\n")

    async with serving(part) as (_, plain):
        client = HttpClient(plain.url.replace("http:", "https:"), ssl.create_default_context())
        with pytest.raises(TlsFailed, match="wrong version number"):
            await client.request("GET", "/")
        await client.close()
