"""An HTTP/1.1 client for one origin: a keep-alive pool, TLS, a deadline on every call, streamed answers.

The errors say what a caller needs to know before it repeats a request that changes something. `ConnectFailed`: the server
never saw it. `Interrupted`: it may have acted on it. A request that went out on a kept connection which the server had
closed meanwhile is repeated once by itself on a new connection, unless the caller says that it must not be.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import re
import socket
import ssl
from collections.abc import AsyncIterator, Mapping

import h11
import msgspec

from wincey.model.errors import WinceyError

_READ = 256 * 1024
_URL = re.compile(
    r"(?P<scheme>https?)://(?:\[(?P<v6>[0-9a-fA-F:.%]+)\]|(?P<host>[^/?#@:\[\]]+))(?::(?P<port>\d{1,5}))?(?P<base>/[^?#]*)?",
    re.ASCII,
)

# A server that vanished without a word is noticed within half a minute, whether we wait for it or write to it.
_KEEPALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 25_000),
)


class HttpError(WinceyError):
    """The exchange failed below HTTP; an answer with an error status is no such failure."""


class ConnectFailed(HttpError):
    """No connection: nothing was sent."""


class TlsFailed(ConnectFailed):
    """One side refused the other's certificate, or the other side does not speak TLS; trying again won't help."""


class Interrupted(HttpError):
    """No whole answer: the deadline passed, or the connection broke. The server may have acted on the request."""


class Origin(msgspec.Struct, frozen=True):
    """Where requests go. `path` is the Unix socket's (then host is only a name); `base` precedes every target."""

    host: str
    port: int = 0
    tls: bool = False
    base: str = ""
    path: str = ""

    @classmethod
    def parse(cls, url: str) -> Origin:
        """Read `http://10.0.0.1:2379`, `https://[fd00::1]/base` or `unix:///run/x.sock`; raises ValueError."""
        if url.startswith("unix:///"):
            return cls("localhost", path=url.removeprefix("unix://"))
        match = _URL.fullmatch(url)
        if not match or int(match["port"] or 0) > 65535:
            raise ValueError("it is not of the form http://HOST:PORT or https://HOST:PORT")
        tls = match["scheme"] == "https"
        port = int(match["port"] or (443 if tls else 80))
        return cls(match["v6"] or match["host"], port, tls, (match["base"] or "").rstrip("/"))

    @property
    def authority(self) -> str:
        """The Host header's value."""
        if self.path:
            return self.host
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Response(msgspec.Struct):
    """A whole answer. Header names are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes


class _Connection:
    """One connection and its protocol state."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._protocol = h11.Connection(h11.CLIENT)
        self.answered = False  # whether a byte of the present answer was read
        self.expiry: asyncio.TimerHandle | None = None

    async def exchange(self, request: h11.Request, body: bytes) -> h11.Response:
        """Send a request and read the answer's head."""
        self.answered = False
        send = self._protocol.send
        data = [send(request), send(h11.Data(data=body)) if body else b"", send(h11.EndOfMessage())]
        self._writer.write(b"".join(part for part in data if part))
        await self._writer.drain()
        while not isinstance(event := await self.next_event(), h11.Response):
            pass  # 1xx: the answer is still to come
        return event

    async def next_event(self) -> h11.Event | type[h11.PAUSED]:
        """The protocol's next event. Cancelling this loses nothing."""
        while True:
            event = self._protocol.next_event()
            if event is not h11.NEED_DATA:
                return event  # type: ignore[return-value]  # h11 types its sentinels as classes of their own metaclass
            data = await self._reader.read(_READ)
            if not data and not self.answered:
                raise ConnectionError("the server closed it without an answer")
            self.answered = True
            self._protocol.receive_data(data)

    def ready_again(self) -> bool:
        """Whether another request can follow on this connection."""
        if self._protocol.our_state is not h11.DONE or self._protocol.their_state is not h11.DONE:
            return False
        self._protocol.start_next_cycle()
        return True

    def alive(self) -> bool:
        """Whether the other side has not closed it, as far as we have heard."""
        return not self._reader.at_eof() and not self._writer.is_closing() and self._reader.exception() is None

    def abort(self) -> None:
        """Close it now, whatever is under way."""
        if self.expiry:
            self.expiry.cancel()
        self._writer.transport.abort()


class Stream:
    """An answer whose body is read piece by piece, as it comes: `async for piece in stream`."""

    def __init__(self, connection: _Connection, head: h11.Response, origin: Origin) -> None:
        self._connection = connection
        self._origin = origin
        self.status = head.status_code
        self.headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in head.headers}
        self.complete = False

    async def read(self) -> bytes:
        """The next piece of the body, b"" at its end; raises Interrupted when the body ends too early.

        Waits for ever: the limit is the caller's. Cancelling it loses nothing, and it can be called again.
        """
        if self.complete:
            return b""
        try:
            event = await self._connection.next_event()
        except (OSError, h11.RemoteProtocolError) as error:
            raise Interrupted(f"{self._origin.authority}: the answer broke off: {error}") from error
        if isinstance(event, h11.Data):
            return bytes(event.data)
        self.complete = True
        return b""

    async def read_all(self) -> bytes:
        """What is left of the body."""
        body = io.BytesIO()
        while piece := await self.read():
            body.write(piece)
        return body.getvalue()  # shares its buffer: a large body exists once

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> bytes:
        if piece := await self.read():
            return piece
        raise StopAsyncIteration


class HttpClient:
    """Requests to one origin: `http://HOST:PORT[/BASE]`, `https://...` or `unix:///PATH`; raises ValueError for another URL.

    tls: for https, None for the system's roots. connect_timeout: seconds for a connection with its TLS handshake.
    keep, idle_limit: how many unused connections are kept, and for how many seconds.
    """

    def __init__(
        self,
        url: str,
        tls: ssl.SSLContext | None = None,
        *,
        connect_timeout: float = 2.0,
        keep: int = 4,
        idle_limit: float = 90.0,
    ) -> None:
        self.url = url
        self.origin = Origin.parse(url)
        self._tls = tls
        self._connect_timeout = connect_timeout
        self._keep = keep
        self._idle_limit = idle_limit
        self._idle: list[_Connection] = []
        self._busy: set[_Connection] = set()
        self._closed = False

    async def request(
        self,
        method: str,
        target: str,
        *,
        headers: Mapping[str, str] | None = None,
        body: bytes = b"",
        timeout: float = 10.0,
        repeat: bool = True,
    ) -> Response:
        """One exchange with the whole body, within `timeout` seconds; raises ConnectFailed, Interrupted.

        repeat: whether it may be sent again when a kept connection turns out to be closed.
        """
        try:
            async with (
                asyncio.timeout(timeout),
                self.stream(method, target, headers=headers, body=body, timeout=timeout, repeat=repeat) as stream,
            ):
                return Response(stream.status, stream.headers, await stream.read_all())
        except TimeoutError:
            raise Interrupted(f"{self.origin.authority}: no answer within {timeout:g} s") from None

    @contextlib.asynccontextmanager
    async def stream(
        self,
        method: str,
        target: str,
        *,
        headers: Mapping[str, str] | None = None,
        body: bytes = b"",
        timeout: float = 10.0,
        repeat: bool = True,
    ) -> AsyncIterator[Stream]:
        """An exchange whose answer's head has to come within `timeout` seconds; raises as `request` does.

        Leaving the context before the body's end, also by an exception or by cancellation, closes the connection.
        """
        fields = {"host": self.origin.authority, **(headers or {})}
        if body or method in {"POST", "PUT"}:
            fields["content-length"] = str(len(body))
        request = h11.Request(method=method, target=self.origin.base + target, headers=list(fields.items()))
        try:
            async with asyncio.timeout(timeout):
                stream, connection = await self._open(request, body, repeat)
        except TimeoutError:
            raise Interrupted(f"{self.origin.authority}: no answer within {timeout:g} s") from None
        try:
            yield stream
        finally:
            self._release(connection, stream.complete)

    async def close(self) -> None:
        """Close every connection. Exchanges under way end with Interrupted."""
        self._closed = True
        for connection in (*self._idle, *self._busy):
            connection.abort()
        self._idle.clear()
        await asyncio.sleep(0)  # lets the event loop close the sockets

    async def _open(self, request: h11.Request, body: bytes, repeat: bool) -> tuple[Stream, _Connection]:
        connection = self._take_idle()
        while True:
            kept = connection is not None
            connection = connection or await self._connect()
            self._busy.add(connection)
            try:
                head = await connection.exchange(request, body)
            except (OSError, h11.RemoteProtocolError) as error:
                self._release(connection, reusable=False)
                if not kept or not repeat or connection.answered:
                    raise self._broken(error) from error
                connection = None
            except BaseException:
                self._release(connection, reusable=False)
                raise
            else:
                return Stream(connection, head, self.origin), connection

    def _take_idle(self) -> _Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.expiry:
                connection.expiry.cancel()
            if connection.alive():
                return connection
            connection.abort()
        return None

    async def _connect(self) -> _Connection:
        origin = self.origin
        try:
            async with asyncio.timeout(self._connect_timeout):
                if origin.path:
                    reader, writer = await asyncio.open_unix_connection(origin.path, limit=_READ)
                else:
                    tls = (self._tls or True) if origin.tls else None
                    # A host name may stand for a dead IPv6 and a live IPv4 address: don't wait for the first to fail.
                    reader, writer = await asyncio.open_connection(
                        origin.host, origin.port, ssl=tls, limit=_READ, happy_eyeballs_delay=0.25
                    )
        except TimeoutError:
            raise ConnectFailed(f"{self._where}: no connection within {self._connect_timeout:g} s") from None
        except OSError as error:
            raise self._unconnected(error) from error
        connection = _Connection(reader, writer)
        if self._closed:
            connection.abort()
            raise ConnectFailed(f"{self._where}: the client is closed")
        if not origin.path:
            raw = writer.get_extra_info("socket")
            for option in _KEEPALIVE:
                raw.setsockopt(*option)
        return connection

    def _release(self, connection: _Connection, reusable: bool) -> None:
        self._busy.discard(connection)
        if reusable and not self._closed and len(self._idle) < self._keep and connection.ready_again():
            self._idle.append(connection)
            loop = asyncio.get_running_loop()
            connection.expiry = loop.call_later(self._idle_limit, self._expire, connection)
        else:
            connection.abort()

    def _expire(self, connection: _Connection) -> None:
        self._idle.remove(connection)
        connection.abort()

    @property
    def _where(self) -> str:
        return self.origin.path or self.origin.authority

    def _unconnected(self, error: OSError) -> ConnectFailed:
        if _refuses_tls(error):
            return TlsFailed(f"{self._where}: TLS: {_tls_reason(error)}")
        if isinstance(error, socket.gaierror):
            return ConnectFailed(f"{self._where}: {error.strerror}")
        # asyncio puts words of its own into strerror, and has no errno when several addresses failed.
        return ConnectFailed(f"{self._where}: {os.strerror(error.errno) if error.errno else error}")

    def _broken(self, error: Exception) -> HttpError:
        # With TLS 1.3 a server judges our certificate after the handshake: its refusal is the first thing that we read.
        if _refuses_tls(error):
            return TlsFailed(f"{self._where}: TLS: {_tls_reason(error)}")
        return Interrupted(f"{self._where}: the connection broke: {str(error) or type(error).__name__}")


def _refuses_tls(error: Exception) -> bool:
    transient = (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError)
    return isinstance(error, ssl.SSLError) and not isinstance(error, transient)


def _tls_reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the server's certificate is not accepted: {error.verify_message}"
    return (getattr(error, "reason", None) or str(error)).replace("_", " ").lower()
