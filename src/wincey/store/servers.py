"""The servers of --remote: requests to whichever answers, with who we are in them, and what their errors mean."""

from __future__ import annotations

import ssl
from collections.abc import Mapping, Sequence

from wincey.http.client import HttpClient, Response
from wincey.model import remote_api as wire
from wincey.model.errors import (
    BadOption,
    DuplicateHost,
    KeyConflict,
    OutOfSubnets,
    StoreDenied,
    StoreError,
    StoreUnavailable,
)
from wincey.store.endpoints import Endpoints, NoSuchApi


class Missing(KeyConflict):
    """The store behind the server has no such key."""


class Servers:
    """urls: the servers'. host: `NAME INSTANCE`, to be told apart from others with our address. token: "" for none."""

    def __init__(
        self, urls: Sequence[str], tls: ssl.SSLContext | None = None, *, host: str = "", token: str = ""
    ) -> None:
        self.endpoints = Endpoints(urls, tls, what="server", flag="--remote")
        self._headers = {"authorization": f"Bearer {token}"} if token else {}
        if host:
            self._headers[wire.HOST] = host

    def __str__(self) -> str:
        return str(self.endpoints)

    async def call(
        self, method: str, target: str, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> Response:
        """An exchange with whichever server answers; raises StoreError and what `exchange` raises."""

        async def attempt(client: HttpClient, _uncertain: bool) -> Response:
            return await self.exchange(client, method, target, body, headers=headers)

        return await self.endpoints.call(attempt)

    async def exchange(
        self,
        client: HttpClient,
        method: str,
        target: str,
        body: bytes = b"",
        *,
        headers: Mapping[str, str] | None = None,
        timeout: float = 10.0,
    ) -> Response:
        """An exchange with one server, which has `timeout` seconds. Raises HttpError, StoreUnavailable, StoreDenied,
        Missing, NoSuchApi, KeyConflict, DuplicateHost, OutOfSubnets."""
        fields = self._headers | dict(headers or {})
        response = await client.request(method, target, headers=fields, body=body, timeout=timeout)
        _check(client, target, response)
        return response

    async def close(self) -> None:
        """End all connections."""
        await self.endpoints.close()


def read_token(path: str, flag: str = "--remote-token-file") -> str:
    """A client's token: the first word of its file, which may be a server's with one line. flag: what names the file. Raises
    BadOption."""
    try:
        with open(path, encoding="utf-8") as file:
            words = [words[0] for line in file if (words := line.partition("#")[0].split())]
    except (OSError, UnicodeDecodeError) as error:
        raise BadOption(f"{flag} {path}: {getattr(error, 'strerror', None) or error}") from None
    if len(words) != 1 or not words[0].isascii() or words[0].startswith("cert:"):
        raise BadOption(f"{flag} {path}: a client's has one line, the token")
    return words[0]


def _check(client: HttpClient, target: str, response: Response) -> None:
    if response.status < 300:
        return
    reason = response.body[:500].decode("utf-8", "replace").strip()
    text = f"{client.url}: {reason or f'HTTP status {response.status}'}"
    kind = response.headers.get(wire.ERROR, "")
    if response.status in {401, 403}:
        raise StoreDenied(f"{text} (--remote-token-file, --remote-certfile)")
    if kind == wire.DUPLICATE_HOST:
        raise DuplicateHost(reason or text)
    if kind == wire.OUT_OF_SUBNETS or "out of subnets" in reason:
        raise OutOfSubnets(reason or text)
    if response.status == 409:
        raise KeyConflict(text)
    if wire.KEY_NOT_FOUND in reason:
        raise Missing(text)
    if response.status in {404, 405}:
        raise NoSuchApi(f"{client.url} has no {target}: is it a flanneld with --listen?")
    if response.status < 500:
        raise StoreError(text)
    raise StoreUnavailable(text)
