"""A small HTTP/1.1 server over TCP and Unix sockets: health endpoints, JSON APIs, long polls, streams.

h11 is the protocol's state machine, asyncio carries the bytes; what is ours is in between. Each connection is one task that
reads a request, awaits the handler and sends its response, so that a handler is plain code and back-pressure reaches it.
A client that goes away cancels its handler: abandoned long polls don't pile up.

Everything a client can make us hold is bounded: header and body size, connections, the time to send a request and the
time to take a response.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import os
import socket
import ssl
import stat
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from http import HTTPStatus
from typing import TypeAlias, cast
from urllib.parse import parse_qsl, unquote

import h11
import msgspec

log = logging.getLogger(__name__)


class Request(msgspec.Struct, frozen=True):
    """One request, read whole. path: decoded, without the query. query: the last value counts. headers: lower-case names,
    repeated ones joined by `, `. peer: the client's address, "" on a Unix socket. certificate: the common name in the
    client's certificate, which the TLS context has verified; None without one.
    """

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes
    peer: str
    certificate: str | None = None


class Response(msgspec.Struct, frozen=True):
    """What a handler answers. A body of bytes is sent with its length, an iterator's pieces as they come."""

    status: int = 200
    body: bytes | AsyncIterator[bytes] = b""
    content_type: str = "text/plain; charset=utf-8"
    headers: tuple[tuple[str, str], ...] = ()


Handler: TypeAlias = Callable[[Request], Awaitable[Response]]


class Limits(msgspec.Struct, frozen=True):
    """Bounds on what clients can make us hold. Sizes in bytes, times in seconds.

    request: from a request's first byte to its last. idle: between requests. response: for the client to take what is
    ready for it. half_closed: how long a handler may go on after the client ended its side of the connection; some simple
    clients do so at once and still wait for the answer.
    """

    header: int = 16 * 1024
    body: int = 1024 * 1024
    connections: int = 256
    request: float = 10.0
    idle: float = 60.0
    response: float = 30.0
    half_closed: float = 1.0


class HttpServer:
    """Serves one handler on any number of addresses."""

    def __init__(self, handler: Handler, limits: Limits | None = None) -> None:
        self.handler = handler
        self.limits = limits or Limits()
        self.closing = False
        self._servers: list[asyncio.Server] = []
        self._sockets: list[str] = []
        self._connections: set[_Connection] = set()
        self._quiet = asyncio.Event()
        self._quiet.set()

    async def listen_tcp(self, host: str, port: int, tls: ssl.SSLContext | None = None) -> int:
        """Listen on a TCP address; host "" is every address, port 0 a free port. Returns the port; raises OSError.

        tls: the server's side of TLS. A handshake that fails is logged with the client's address.
        """
        try:
            server = await asyncio.get_running_loop().create_server(lambda: self._protocol(tls), host or None, port)
        except OverflowError:
            raise OSError(None, f"Port {port} is not within 0 to 65535") from None
        self._servers.append(server)
        return int(server.sockets[0].getsockname()[1])

    async def listen_socket(self, listener: socket.socket, tls: ssl.SSLContext | None = None) -> None:
        """Listen on a TCP socket that somebody else, as systemd, has bound; it is closed with the server."""
        server = await asyncio.get_running_loop().create_server(lambda: self._protocol(tls), sock=listener)
        self._servers.append(server)

    def connection(self) -> asyncio.Protocol:
        """A connection's protocol, for who accepts connections himself."""
        return _Connection(self)

    async def listen_unix(self, path: str, mode: int = 0o600) -> None:
        """Listen on a Unix socket, in place of one that an earlier run left behind. Raises OSError."""
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISSOCK(os.stat(path).st_mode):
                os.unlink(path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            before = os.umask(0o777 & ~mode)  # from its first moment on, nobody else can connect
            try:
                listener.bind(path)
            finally:
                os.umask(before)
            server = await asyncio.get_running_loop().create_unix_server(lambda: _Connection(self), sock=listener)
        except BaseException:
            listener.close()
            raise
        self._servers.append(server)
        self._sockets.append(path)

    async def close(self, grace: float = 3.0) -> None:
        """Take no more requests, let those under way finish for `grace` seconds, then cancel them."""
        self.closing = True
        for server in self._servers:
            server.close()
        for connection in list(self._connections):
            if connection.idle:
                connection.cancel()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace):
                await self._quiet.wait()
        for connection in list(self._connections):
            connection.cancel()
        await self._quiet.wait()
        for path in self._sockets:
            with contextlib.suppress(FileNotFoundError):  # newer Pythons have removed it already
                os.unlink(path)

    def _protocol(self, tls: ssl.SSLContext | None) -> asyncio.Protocol:
        connection = _Connection(self)
        return _Handshake(connection, tls) if tls else connection

    def opened(self, connection: _Connection) -> bool:
        """Count a connection in; False when there are too many already."""
        if self.closing or len(self._connections) >= self.limits.connections:
            return False
        self._connections.add(connection)
        self._quiet.clear()
        return True

    def closed(self, connection: _Connection) -> None:
        """Count a connection out."""
        self._connections.discard(connection)
        if not self._connections:
            self._quiet.set()


class _Refused(Exception):
    """A request that is answered by us, and the connection then closed."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class _Handshake(asyncio.Protocol):
    """What comes before a connection over TLS. asyncio's own way tells nobody whom it turned away, and why."""

    def __init__(self, connection: _Connection, tls: ssl.SSLContext) -> None:
        self._connection, self._tls = connection, tls
        self._task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        _notice_dead_clients(transport)
        self._task = asyncio.get_running_loop().create_task(self._run(cast("asyncio.Transport", transport)))

    async def _run(self, transport: asyncio.Transport) -> None:
        peer = transport.get_extra_info("peername")
        try:
            secure = await asyncio.get_running_loop().start_tls(
                transport, self._connection, self._tls, server_side=True, ssl_handshake_timeout=_HANDSHAKE
            )
        except OSError as error:  # of which ssl.SSLError is one
            if not isinstance(error, ConnectionError):
                reason = getattr(error, "verify_message", "") or getattr(error, "reason", None) or str(error)
                log.warning("TLS with %s failed: %s", peer[0], reason.replace("_", " ").lower())
            transport.abort()
        else:
            if secure:
                self._connection.connection_made(secure)


def _notice_dead_clients(transport: asyncio.BaseTransport) -> None:
    """A client that vanished without a word is noticed within half a minute, and its long polls end."""
    raw = transport.get_extra_info("socket")
    if raw is not None and raw.family != socket.AF_UNIX:
        for level, name, value in (
            (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
            (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10),
            (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
            (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
        ):
            raw.setsockopt(level, name, value)


class _Connection(asyncio.Protocol):
    def __init__(self, server: HttpServer) -> None:
        self._server, self._limits = server, server.limits
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=self._limits.header)
        self._arrived, self._writable = asyncio.Event(), asyncio.Event()
        self._writable.set()
        self._ended = False
        self._task: asyncio.Task[None] | None = None
        self._transport: asyncio.Transport
        self._timers: list[asyncio.TimerHandle] = []
        self.idle = True

    def cancel(self) -> None:
        """End the connection now, with the handler that runs for it."""
        if self._task is None or self._task.done():
            self._transport.abort()
        else:
            self._task.cancel()

    # What the event loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        _notice_dead_clients(transport)
        if self._server.opened(self):
            self._task = asyncio.get_running_loop().create_task(self._run())
        else:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._refusing:
            return
        self._http.receive_data(data)
        self._arrived.set()
        # What a client sends on while a handler runs waits here, and beyond a bound in the client.
        # (Over TLS some may come before connection_made does.)
        if self._waiting > self._limits.header and self._task:
            self._transport.pause_reading()

    def eof_received(self) -> bool:
        self._ended = True
        if not self._refusing:
            self._http.receive_data(b"")
        self._arrived.set()
        if self._task:
            self._later(self._limits.half_closed, self._task.cancel)
        # The response still goes out; over TLS there is no half-closed connection.
        return self._transport.get_extra_info("sslcontext") is None

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._task is None:
            return  # one too many, or a TLS handshake that failed: it was never made
        for timer in self._timers:
            timer.cancel()
        self._server.closed(self)
        self.cancel()

    def _later(self, delay: float, act: Callable[[], object]) -> None:
        self._timers.append(asyncio.get_running_loop().call_later(delay, act))

    @property
    def _refusing(self) -> bool:
        """Whether we only wait for the client to end, after it was refused."""
        return self._http.our_state in {h11.MUST_CLOSE, h11.CLOSED, h11.ERROR}

    @property
    def _waiting(self) -> int:
        """Bytes that arrived and are not read yet."""
        return len(self._http.trailing_data[0])

    # The conversation.

    async def _run(self) -> None:
        try:
            await self._converse()
            self._transport.close()
            # Closing waits for the client to take what is left: not for ever.
            self._later(self._limits.response, self._transport.abort)
        except (TimeoutError, asyncio.CancelledError):
            self._transport.abort()
        except Exception:
            log.exception("an HTTP connection failed")
            self._transport.abort()

    async def _converse(self) -> None:
        while True:
            try:
                request = await self._read()
            except (h11.RemoteProtocolError, _Refused) as error:
                await self._refuse(error)
                return
            if request is None:
                return
            await self._respond(request)
            if self._server.closing or self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
                return
            self._http.start_next_cycle()

    async def _read(self) -> Request | None:
        """The next request, None when the client has no more. Raises _Refused, RemoteProtocolError."""
        try:
            async with asyncio.timeout(self._limits.idle):
                while not self._waiting and not self._ended:
                    self.idle = True
                    await self._more()
        except TimeoutError:
            return None
        self.idle = False
        try:
            async with asyncio.timeout(self._limits.request):
                return await self._read_whole()
        except TimeoutError:
            raise _Refused(408, f"the request did not arrive within {self._limits.request:g} s") from None

    async def _read_whole(self) -> Request | None:
        head = await self._event()
        if not isinstance(head, h11.Request):
            return None
        # h11 bounds a head that is not complete yet; one that came whole is measured here.
        if sum(len(name) + len(value) for name, value in head.headers) + len(head.target) > self._limits.header:
            raise _Refused(431, f"the request's head is larger than {self._limits.header} bytes")
        headers: dict[str, str] = {}
        for raw_name, raw_value in head.headers:
            name, value = raw_name.decode("latin-1"), raw_value.decode("latin-1")
            headers[name] = f"{headers[name]}, {value}" if name in headers else value
        too_big = _Refused(413, f"the body is larger than {self._limits.body} bytes")
        if int(headers.get("content-length", "0")) > self._limits.body:
            raise too_big
        if self._http.they_are_waiting_for_100_continue:
            self._send(h11.InformationalResponse(status_code=100, headers=[]))
        body = bytearray()
        while isinstance(event := await self._event(), h11.Data):
            body += event.data
            if len(body) > self._limits.body:
                raise too_big
        path, _, query = head.target.decode("latin-1").partition("?")
        if "://" in path:  # a proxy's form, which every server accepts
            path = "/" + path.partition("://")[2].partition("/")[2]
        peer = self._transport.get_extra_info("peername")
        return Request(
            head.method.decode(),
            unquote(path),
            dict(parse_qsl(query, keep_blank_values=True)),
            headers,
            bytes(body),
            str(peer[0]) if isinstance(peer, tuple) else "",
            _common_name(self._transport.get_extra_info("peercert")),
        )

    async def _event(self) -> h11.Event | type[h11.PAUSED]:
        while (event := self._http.next_event()) is h11.NEED_DATA:
            await self._more()
        return cast("h11.Event | type[h11.PAUSED]", event)

    async def _more(self) -> None:
        """Wait until the client has sent something, or ended."""
        self._arrived.clear()
        self._transport.resume_reading()
        await self._arrived.wait()

    async def _respond(self, request: Request) -> None:
        try:
            response = await self._server.handler(request)
        except Exception:
            log.exception("%s %s failed", request.method, request.path)
            response = Response(500, b"internal error\n")
        body = response.body
        try:
            self._send_head(response)
            if isinstance(body, bytes):
                if request.method != "HEAD" and body:
                    self._send(h11.Data(data=body))
            elif request.method != "HEAD":
                async for piece in body:
                    self._send(h11.Data(data=piece))
                    await self._drained()
            self._send(h11.EndOfMessage())
            await self._drained()
        finally:
            if inspect.isasyncgen(body):
                await body.aclose()

    async def _refuse(self, error: h11.RemoteProtocolError | _Refused) -> None:
        status = error.status if isinstance(error, _Refused) else error.error_status_hint
        if self._http.our_state not in {h11.IDLE, h11.SEND_RESPONSE}:
            return
        body = f"{error}\n".encode()
        self._send_head(Response(status, body, headers=(("Connection", "close"),)))
        self._send(h11.Data(data=body))
        self._send(h11.EndOfMessage())
        # A client that is still sending would lose our answer to a reset if we closed now.
        if self._transport.can_write_eof():
            self._transport.write_eof()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._limits.half_closed):
                while not self._ended:
                    await self._more()

    def _send_head(self, response: Response) -> None:
        headers = [
            ("Date", time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime())),
            ("Content-Type", response.content_type),
            *response.headers,
        ]
        if isinstance(response.body, bytes) and response.status not in {204, 304}:
            headers.append(("Content-Length", str(len(response.body))))
        if self._server.closing:
            headers.append(("Connection", "close"))
        reason = HTTPStatus(response.status).phrase if response.status in _STATUSES else ""
        self._send(h11.Response(status_code=response.status, headers=headers, reason=reason.encode()))

    def _send(self, event: h11.Event) -> None:
        data = self._http.send(event)
        if data:
            self._transport.write(data)

    async def _drained(self) -> None:
        async with asyncio.timeout(self._limits.response):
            await self._writable.wait()


def _common_name(certificate: Mapping[str, tuple[tuple[tuple[str, str], ...], ...]] | None) -> str | None:
    """Of a client's certificate as the ssl module tells it; "" when it has none."""
    if not certificate:
        return None
    return next((value for part in certificate["subject"] for name, value in part if name == "commonName"), "")


_HANDSHAKE = 10.0  # seconds

_STATUSES = frozenset(status.value for status in HTTPStatus)
