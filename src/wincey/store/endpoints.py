"""The servers of one store: their URLs, the TLS identity we show them, and failing over from one to the next.

The endpoint that answered last is asked first. A call goes round the endpoints until its deadline; a watch goes round them
for ever. Both treat an endpoint that can't serve now (no connection, no answer, no leader) in the same way: the next one.
Pauses grow and are jittered, so that a thousand hosts don't come back to a restarted store at the same moment.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from itertools import count
from typing import Protocol, TypeVar

from wincey.http.client import ConnectFailed, HttpClient, HttpError, TlsFailed
from wincey.model.errors import BadOption, HistoryLost, StoreDenied, StoreError, StoreUnavailable, UsageError
from wincey.store.kv import OutageCallback

T = TypeVar("T")

CALL_DEADLINE = 10.0
"""Seconds that a call to the store may take, failovers included."""

_STEADY = 5.0  # seconds after which a watch that ends is no sign that the next one will, too


class NoSuchApi(StoreError):
    """The server does not have the API that it was asked through."""


def jitter() -> float:
    """A random number of at least 0 and less than 1."""
    return int.from_bytes(os.urandom(4), "big") / 2**32


def pauses(random: Callable[[], float], first: float = 0.1, longest: float = 5.0) -> Iterator[float]:
    """Seconds to wait before the next try: doubling up to `longest`, each shortened by a random part of up to a half."""
    for exponent in count():
        yield min(first * 2 ** min(exponent, 16), longest) * (1 - random() / 2)


def parse_endpoints(text: str) -> list[str]:
    """Read --etcd-endpoints, a comma list of URLs; raises UsageError. Without a scheme it is http, as etcd's tools have it."""
    urls = [part.strip().rstrip("/") for part in text.split(",") if part.strip()]
    urls = [url if "://" in url else f"http://{url}" for url in urls]
    for url in urls:
        if "@" in url:
            raise UsageError("--etcd-endpoints: no user in the URL, please: use --etcd-username and --etcd-password")
        try:
            HttpClient(url)
        except ValueError as error:
            raise UsageError(f"--etcd-endpoints: {url!r} can't be used: {error}") from None
        if url.startswith("unix:"):
            raise UsageError(f"--etcd-endpoints: {url!r} can't be used: only http:// and https:// can")
    if not urls:
        raise UsageError("--etcd-endpoints is empty; give for example http://127.0.0.1:2379")
    return urls


def tls_context(
    keyfile: str = "", certfile: str = "", cafile: str = "", *, server: bool = False, flags: str = "--etcd"
) -> ssl.SSLContext:
    """What https endpoints are met with: TLS 1.2 or later; `cafile` (or else the system's roots) judges the server;
    certificate and key, always together, are our identity. Raises UsageError that names flag, file and reason.

    server: for the other end: with a `cafile` clients must show a certificate that it judges. flags: what the names of
    the flags begin with.
    """
    if bool(keyfile) != bool(certfile):
        given, missing = ("keyfile", "certfile") if keyfile else ("certfile", "keyfile")
        raise UsageError(f"{flags}-{given} needs {flags}-{missing} beside it")
    for flag, path in ((f"{flags}-cafile", cafile), (f"{flags}-certfile", certfile), (f"{flags}-keyfile", keyfile)):
        if path:
            _readable(flag, path)
    try:
        if server:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            if cafile:
                context.load_verify_locations(cafile)
                context.verify_mode = ssl.CERT_REQUIRED
        else:
            context = ssl.create_default_context(cafile=cafile or None)
    except (ssl.SSLError, ValueError):
        raise UsageError(f"{flags}-cafile {cafile}: it holds no certificate in PEM form") from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # Python 3.13 became strict, and would turn away the CAs of many a running cluster (no key usage extension).
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    if certfile:
        try:
            context.load_cert_chain(certfile, keyfile, password="")
        except ssl.SSLError as error:
            if error.reason == "KEY_VALUES_MISMATCH":
                raise UsageError(
                    f"{flags}-keyfile {keyfile}: it is not the key of {flags}-certfile {certfile}"
                ) from None
            text = (
                f"{flags}-certfile {certfile}, {flags}-keyfile {keyfile}: not a certificate and an open key in PEM form"
            )
            raise UsageError(text) from None
    return context


def _readable(flag: str, path: str) -> None:
    try:
        with open(path, "rb") as file:
            file.read(1)
    except OSError as error:
        raise UsageError(f"{flag} {path}: {error.strerror}") from None


def _client(url: str, tls: ssl.SSLContext | None, connect_timeout: float, flag: str, make: MakeClient) -> HttpClient:
    try:
        return make(url, tls, connect_timeout=connect_timeout)
    except ValueError as error:
        shown = re.sub(r"//[^/]*@", "//***@", url)  # perhaps with a password, which has flags of its own
        raise BadOption(f"{flag}: {shown}: {error}") from None


class MakeClient(Protocol):
    """Makes the client of one endpoint; raises ValueError for a URL that can't be used."""

    def __call__(self, url: str, tls: ssl.SSLContext | None, *, connect_timeout: float) -> HttpClient: ...


class Endpoints:
    """The clients of a store's endpoints, the one to ask first in front.

    connect_timeout: seconds for a connection with its TLS handshake. random: numbers of at least 0 and less than 1. what,
    flag: what errors call an endpoint, and the flag that names it. make: what speaks HTTP.
    """

    def __init__(
        self,
        urls: Sequence[str],
        tls: ssl.SSLContext | None = None,
        *,
        connect_timeout: float = 2.0,
        random: Callable[[], float] = jitter,
        what: str = "etcd endpoint",
        flag: str = "--etcd-endpoints",
        make: MakeClient = HttpClient,
    ) -> None:
        self.random = random
        self._what = what
        self.outage: OutageCallback = lambda _reason: None
        self._clients = [_client(url, tls, connect_timeout, flag, make) for url in urls]
        self._closed = False

    def __str__(self) -> str:
        return ",".join(sorted(client.url for client in self._clients))

    @property
    def current(self) -> HttpClient:
        """The endpoint to ask."""
        return self._clients[0]

    def failed(self, client: HttpClient) -> None:
        """Ask another one next, unless somebody saw to that already."""
        if client is self._clients[0]:
            self._clients.append(self._clients.pop(0))

    async def call(self, attempt: Callable[[HttpClient, bool], Awaitable[T]], deadline: float = CALL_DEADLINE) -> T:
        """What `attempt(client, uncertain)` returns at the first endpoint that can serve it within `deadline` seconds.

        attempt raises HttpError or StoreUnavailable to be tried elsewhere. `uncertain`: an earlier attempt may have been
        carried out although its answer never came. Raises StoreUnavailable, StoreDenied.
        """
        now = asyncio.get_running_loop().time
        end = now() + deadline
        waits = pauses(self.random)
        uncertain = False
        reasons: dict[str, str] = {}
        while True:
            reached = False
            refusals = 0
            for _ in self._clients:
                client = self.current
                left = max(end - now(), 0.0)
                try:
                    # A hung endpoint must leave time for the next.
                    async with asyncio.timeout(left if len(self._clients) == 1 else left / 2):
                        return await attempt(client, uncertain)
                except (HttpError, StoreUnavailable, TimeoutError) as error:
                    reasons[client.url] = _reason(error, client)
                    reached = reached or not isinstance(error, ConnectFailed)
                    refusals += isinstance(error, TlsFailed)
                uncertain = uncertain or reached
                self.failed(client)
            if refusals == len(self._clients):
                raise StoreDenied("; ".join(reasons.values()))
            wait = next(waits)
            # Where nobody listens the caller shall know at once; a store that elects a leader deserves patience.
            if self._closed or not reached or now() + wait >= end:
                raise StoreUnavailable(f"no {self._what} could serve us: " + "; ".join(reasons.values()))
            await asyncio.sleep(wait)

    async def follow(self, attempt: Callable[[HttpClient], AsyncGenerator[list[T], None]]) -> AsyncIterator[list[T]]:
        """What `attempt(client)` yields, tried again at the next endpoint whenever it ends or fails, for ever.

        attempt yields an empty list as soon as it is connected; those are not passed on. Raises HistoryLost, StoreDenied;
        `outage` is called with the reason when no endpoint serves, and with None when one does again.
        """
        now = asyncio.get_running_loop().time
        waits = pauses(self.random)
        failures = refusals = 0
        while not self._closed:
            client = self.current
            begun = now()
            try:
                async with contextlib.aclosing(attempt(client)) as batches:
                    async for batch in batches:
                        if failures >= len(self._clients):
                            self.outage(None)
                        failures = refusals = 0
                        if batch:
                            yield batch
            except (HistoryLost, StoreDenied):
                raise
            except (HttpError, StoreError, TimeoutError) as error:
                reason = _reason(error, client)
                refusals += isinstance(error, TlsFailed)
            else:
                reason = f"{client.url} ended the watch"
            failures += 1
            self.failed(client)
            if refusals >= len(self._clients):
                raise StoreDenied(reason)
            if failures == len(self._clients) and not self._closed:
                self.outage(reason)
            if now() - begun > _STEADY:
                waits = pauses(self.random)
            await asyncio.sleep(next(waits))
        raise StoreUnavailable("the store is closed")

    async def close(self) -> None:
        """End all connections. Calls and watches under way end with StoreUnavailable."""
        self._closed = True
        for client in self._clients:
            await client.close()


def _reason(error: Exception, client: HttpClient) -> str:
    return str(error) or f"{client.url}: no answer in time"
