import asyncio
import contextlib
import os
import socket
import stat

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from wincey.http.server import HttpServer, Limits, Response

QUICK = Limits(header=1024, body=2048, connections=4, request=0.2, idle=0.2, response=0.2, half_closed=0.2)


@contextlib.asynccontextmanager
async def serving(handler, limits=None):
    server = HttpServer(handler, limits)
    port = await server.listen_tcp("127.0.0.1", 0)
    try:
        yield server, port
    finally:
        await server.close(0)


async def echo(request):
    return Response(200, f"{request.method} {request.path} {dict(request.query)} {len(request.body)}".encode())


@contextlib.asynccontextmanager
async def connected(opening):
    reader, writer = await opening
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


def client(port):
    return connected(asyncio.open_connection("127.0.0.1", port))


async def exchange(port, raw, *, end=True):
    """Send bytes, end our side (or not), and read all that comes until the server closes."""
    async with client(port) as (reader, writer):
        writer.write(raw)
        if end:
            writer.write_eof()
        return await reader.read()


def split(answer):
    head, _, body = answer.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    return int(lines[0].split()[1]), dict(line.lower().split(": ", 1) for line in lines[1:]), body


@pytest.mark.parametrize(
    ("target", "path", "query"),
    [
        ("/", "/", {}),
        ("/a%20b/c?x=1&y=&x=2", "/a b/c", {"x": "2", "y": ""}),
        ("/v1?config", "/v1", {"config": ""}),
        ("http://host/v1/x?y=z", "/v1/x", {"y": "z"}),
        ("//a//b", "//a//b", {}),
    ],
)
async def test_requests_are_taken_apart(target, path, query):
    async with serving(echo) as (_, port):
        raw = f"GET {target} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n".encode()
        status, headers, body = split(await exchange(port, raw))
        assert (status, body.decode()) == (200, f"GET {path} {query} 0")
        assert headers["content-length"] == str(len(body))
        assert headers["content-type"] == "text/plain; charset=utf-8"
        assert headers["date"].endswith("gmt")


async def test_headers_body_and_peer_reach_the_handler():
    seen = []

    async def handler(request):
        seen.append(request)
        return Response(204)

    async with serving(handler) as (_, port):
        raw = b"PUT /x HTTP/1.1\r\nHost: h\r\nX-A: 1\r\nx-a: 2\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello"
        status, headers, body = split(await exchange(port, raw))
    assert (status, body) == (204, b"")
    assert "content-length" not in headers
    assert (seen[0].headers["x-a"], seen[0].body, seen[0].peer) == ("1, 2", b"hello", "127.0.0.1")


async def test_keep_alive_and_pipelining_keep_the_order():
    async with serving(echo) as (_, port):
        raw = b"".join(f"GET /{number} HTTP/1.1\r\nHost: h\r\n\r\n".encode() for number in range(200))
        answer = await exchange(port, raw)
    assert [part.split()[1] for part in answer.split(b"GET ")[1:]]
    assert [int(part.split(b" ")[0]) for part in answer.split(b"GET /")[1:]] == list(range(200))


async def test_chunked_request_body():
    async with serving(echo) as (_, port):
        raw = b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
        assert split(await exchange(port, raw))[2] == b"POST / {} 5"


async def test_a_client_that_asks_before_it_sends_its_body():
    async with serving(echo) as (_, port), client(port) as (reader, writer):
        writer.write(b"PUT / HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n")
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 \r\n\r\n"
        writer.write(b"abc")
        writer.write_eof()
        assert split(await reader.read())[2] == b"PUT / {} 3"


async def test_head_has_no_body():
    async with serving(echo) as (_, port):
        status, headers, body = split(await exchange(port, b"HEAD /x HTTP/1.1\r\nHost: h\r\n\r\n"))
    assert (status, headers["content-length"], body) == (200, "12", b"")


async def test_http_1_0_closes_by_itself():
    async with serving(echo) as (_, port):
        status, _, body = split(await exchange(port, b"GET / HTTP/1.0\r\n\r\n", end=False))
    assert (status, body) == (200, b"GET / {} 0")


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),  # no Host
        (b"GET / HTTP/1.1\r\nHost: h\r\nContent-Length: x\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nabc", 400),  # ends too early
        (b"GET / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: gzip\r\n\r\n", 501),
        (b"GET / HTTP/1.1\r\nHost: h\r\nX: " + b"x" * 5000 + b"\r\n\r\n", 431),
        (b"PUT / HTTP/1.1\r\nHost: h\r\nContent-Length: 2049\r\n\r\n" + b"x" * 2049, 413),
        (b"PUT / HTTP/1.1\r\nHost: h\r\nContent-Length: 99999999999\r\n\r\n", 413),
        (
            b"PUT / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n"
            + (b"400\r\n" + b"x" * 1024 + b"\r\n") * 3,
            413,
        ),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),  # TLS
    ],
)
async def test_bad_requests_are_refused_and_the_connection_closed(raw, status):
    async with serving(echo, QUICK) as (_, port):
        got, headers, body = split(await exchange(port, raw))
    assert got == status
    assert headers["connection"] == "close"
    assert body.endswith(b"\n")


async def test_a_refusal_survives_a_client_that_goes_on_sending():
    async with serving(echo, QUICK) as (_, port), client(port) as (reader, writer):
        writer.write(b"PUT / HTTP/1.1\r\nHost: h\r\nContent-Length: 8388608\r\n\r\n" + bytes(8 << 20))
        assert (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 413")
        writer.transport.abort()


async def test_an_unfinished_request_times_out():
    async with serving(echo, QUICK) as (_, port):
        assert split(await exchange(port, b"GET / HTTP/1.1\r\nHo", end=False))[0] == 408
        assert (
            split(await exchange(port, b"PUT / HTTP/1.1\r\nHost: h\r\nContent-Length: 9\r\n\r\n", end=False))[0] == 408
        )


async def test_an_idle_connection_is_closed():
    async with serving(echo, QUICK) as (_, port):
        assert await exchange(port, b"", end=False) == b""
        answer = await exchange(port, b"GET / HTTP/1.1\r\nHost: h\r\n\r\n", end=False)
        assert split(answer)[0] == 200


async def test_too_many_connections_are_dropped():
    async with serving(echo, Limits(connections=2)) as (_, port), client(port) as one:
        async with client(port) as two:
            for reader, writer in (one, two):
                writer.write(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
                assert b"200" in await reader.readuntil(b"\r\n")
            with contextlib.suppress(ConnectionError):
                assert await exchange(port, b"GET / HTTP/1.0\r\n\r\n", end=False) == b""
        while True:  # until the server has seen the second one go
            with contextlib.suppress(ConnectionError):
                if await exchange(port, b"GET / HTTP/1.0\r\n\r\n", end=False):
                    break


async def test_a_failing_handler_is_a_500_and_the_connection_goes_on(caplog):
    async def handler(request):
        if request.path == "/bad":
            raise RuntimeError("secret")
        return Response()

    async with serving(handler) as (_, port):
        raw = b"GET /bad HTTP/1.1\r\nHost: h\r\n\r\nGET / HTTP/1.1\r\nHost: h\r\n\r\n"
        answer = await exchange(port, raw)
    assert answer.startswith(b"HTTP/1.1 500 ")
    assert b"HTTP/1.1 200 " in answer
    assert b"secret" not in answer
    assert "GET /bad failed" in caplog.text


async def test_streams_come_piece_by_piece():
    step = asyncio.Event()

    async def pieces():
        yield b"one"
        await step.wait()
        yield b"two"

    async def handler(request):
        return Response(200, pieces(), "application/json")

    async with serving(handler) as (_, port), client(port) as (reader, writer):
        writer.write(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"transfer-encoding: chunked" in head.lower()
        assert await reader.readuntil(b"one\r\n") == b"3\r\none\r\n"
        step.set()
        assert await reader.readuntil(b"0\r\n\r\n") == b"3\r\ntwo\r\n0\r\n\r\n"


async def test_a_stream_that_breaks_is_not_taken_for_whole(caplog):
    async def pieces():
        yield b"one"
        raise RuntimeError("broken")

    async def handler(request):
        return Response(200, pieces())

    async with serving(handler) as (_, port):
        with contextlib.suppress(ConnectionError):
            answer = await exchange(port, b"GET / HTTP/1.1\r\nHost: h\r\n\r\n", end=False)
            assert not answer.endswith(b"0\r\n\r\n")
    assert "broken" in caplog.text


@pytest.mark.parametrize("how", ["close", "half-close", "abort"])
async def test_a_client_that_goes_away_cancels_its_handler(how):
    started, cancelled = asyncio.Event(), asyncio.Event()

    async def handler(request):
        started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise
        raise AssertionError

    async with serving(handler, QUICK) as (_, port), client(port) as (_, writer):
        writer.write(b"GET /watch HTTP/1.1\r\nHost: h\r\n\r\n")
        await started.wait()
        {"close": writer.close, "half-close": writer.write_eof, "abort": writer.transport.abort}[how]()
        await cancelled.wait()


async def test_a_stream_nobody_reads_is_ended_and_its_source_closed():
    closed = asyncio.Event()
    produced = 0

    async def pieces():
        nonlocal produced
        try:
            while True:
                yield bytes(1 << 16)
                produced += 1
        finally:
            closed.set()

    async def handler(request):
        return Response(200, pieces())

    async with serving(handler, QUICK) as (_, port):
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.send(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
            await closed.wait()
    assert 0 < produced < 10_000  # back-pressure reached the source


async def test_what_is_under_way_ends_before_the_server_does():
    started, go = asyncio.Event(), asyncio.Event()

    async def handler(request):
        started.set()
        await go.wait()
        return Response(200, b"done")

    async with serving(handler) as (server, port):
        async with client(port) as (idle_reader, _):
            busy = asyncio.create_task(exchange(port, b"GET / HTTP/1.1\r\nHost: h\r\n\r\n", end=False))
            await started.wait()
            closing = asyncio.create_task(server.close(30))
            assert await idle_reader.read() == b""
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", port)
        assert not closing.done()
        go.set()
        status, headers, body = split(await busy)
        assert (status, headers["connection"], body) == (200, "close", b"done")
        await closing


async def test_what_takes_longer_than_the_grace_is_cancelled():
    cancelled = asyncio.Event()
    started = asyncio.Event()

    async def handler(request):
        try:
            started.set()
            await asyncio.Event().wait()
        finally:
            cancelled.set()
        raise AssertionError

    async with serving(handler) as (server, port):
        busy = asyncio.create_task(exchange(port, b"GET / HTTP/1.1\r\nHost: h\r\n\r\n", end=False))
        await started.wait()
        await server.close(0.05)
        assert cancelled.is_set()
        assert await busy == b""


async def test_unix_socket(tmp_path):
    path = str(tmp_path / "api.sock")
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(path)  # as a killed daemon leaves it
    server = HttpServer(echo)
    await server.listen_unix(path)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    async with connected(asyncio.open_unix_connection(path)) as (reader, writer):
        writer.write(b"GET / HTTP/1.0\r\n\r\n")
        assert split(await reader.read())[2] == b"GET / {} 0"
        await server.close()
        assert not os.path.exists(path)


async def test_a_file_is_not_replaced_by_a_socket(tmp_path):
    (tmp_path / "precious").write_text("data")
    with pytest.raises(OSError, match="in use"):
        await HttpServer(echo).listen_unix(str(tmp_path / "precious"))
    assert (tmp_path / "precious").read_text() == "data"


async def test_a_taken_port_and_an_impossible_one():
    async with serving(echo) as (_, port):
        with pytest.raises(OSError, match="in use"):
            await HttpServer(echo).listen_tcp("127.0.0.1", port)
        with pytest.raises(OSError, match="65535"):
            await HttpServer(echo).listen_tcp("127.0.0.1", 65536)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None)
@given(
    st.lists(
        st.sampled_from([b"GET / HTTP/1.1\r\n", b"Host: h\r\n", b"\r\n", b"Content-Length: 3\r\n", b"abc", b"0\r\n"])
        | st.binary(max_size=20),
        max_size=12,
    )
)
def test_any_bytes_are_answered_or_refused(caplog, parts):
    async def talk():
        async with serving(echo, QUICK) as (_, port):
            answer = await exchange(port, b"".join(parts))
            assert answer == b"" or answer.startswith(b"HTTP/1.1 ")

    caplog.clear()
    asyncio.run(talk())
    assert caplog.text == ""
