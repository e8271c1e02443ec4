"""Calls to etcd's v3 JSON gateway: paths, authentication, and its errors as ours.

Bytes travel as base64 and 64-bit numbers as strings; msgspec reads and writes both by the type of the field. etcd 3.4 and
later serve /v3, 3.3 /v3beta, earlier ones /v3alpha: the one that exists is found by the first call. A token that the server
no longer likes (expired, restarted server, changed permissions) is renewed behind the caller's back.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import TypeVar

import msgspec

from wincey.http.client import HttpClient, Stream
from wincey.model.errors import UNREADABLE, StoreDenied, StoreError, StoreUnavailable
from wincey.store.endpoints import NoSuchApi
from wincey.store.etcd3_wire import Result, StreamFault, TxnAnswer

T = TypeVar("T")

_ROOTS = ("v3", "v3beta", "v3alpha")

# gRPC's codes, as in google.rpc.Code
_CANCELLED, _UNKNOWN, _INVALID, _DEADLINE, _DENIED, _EXHAUSTED = 1, 2, 3, 4, 7, 8
_PRECONDITION, _UNAVAILABLE, _UNAUTHENTICATED = 9, 14, 16
_TRANSIENT = frozenset({_CANCELLED, _DEADLINE, _UNAVAILABLE})
_LOGINS = 2  # within one call: permissions may change once more between our login and our call
_STALE_TOKEN = ("invalid auth token", "revision of auth store is old", "user name is empty")

_ADVICE = {
    "CommonName": "with authentication on, its JSON gateway takes no client certificate that has a CommonName; use one"
    " without (subject /O=... instead of /CN=...) together with --etcd-username and --etcd-password, or --etcd-api=v2",
    "user name is empty": "it wants a user: give --etcd-username and --etcd-password",
    "authentication failed": "it does not accept user {user!r} with this password",
}


class GatewayError(StoreError):
    """What etcd answered instead of a result. code: gRPC's."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


class StaleToken(StoreDenied):
    """The server does not know our token any more."""


class _Fault(msgspec.Struct):
    code: int = _UNKNOWN
    message: str = ""
    error: str | StreamFault = ""


class _Token(msgspec.Struct):
    token: str


_fault = msgspec.json.Decoder(_Fault, strict=False)
_token = msgspec.json.Decoder(_Token)


class Gateway:
    """The v3 JSON API of one cluster, for one user. Its calls take the client of the endpoint to ask."""

    def __init__(self, username: str = "", password: str = "") -> None:
        self._username = username
        self._password = password
        self._token: str | None = None
        self._login_lock = asyncio.Lock()
        self._root = 0

    async def call(
        self, client: HttpClient, method: str, body: object, answer: msgspec.json.Decoder[T], *, repeat: bool = True
    ) -> T:
        """POST `body` to `method` (such as `kv/range`); raises HttpError, StoreUnavailable, StoreDenied, GatewayError.

        repeat: whether it may be carried out twice.
        """
        async with self._open(client, method, body, repeat) as stream:
            return decode(answer, await stream.read_all(), client)

    @contextlib.asynccontextmanager
    async def stream(self, client: HttpClient, method: str, body: object) -> AsyncIterator[Stream]:
        """The same for an answer that goes on: JSON objects, one in a line."""
        async with self._open(client, method, body, repeat=True) as stream:
            yield stream

    def error(self, fault: StreamFault, client: HttpClient) -> StoreError:
        """Our error for one that came in the midst of a stream."""
        return self._error(fault.grpc_code or fault.code or _UNKNOWN, fault.message, client)

    @contextlib.asynccontextmanager
    async def _open(
        self, client: HttpClient, method: str, body: object, repeat: bool, *, anonymous: bool = False
    ) -> AsyncIterator[Stream]:
        data = msgspec.json.encode(body)
        logins = 0
        if self._username and self._token is None and not anonymous:
            await self._login(client, None)
        while True:
            token = "" if anonymous else self._token
            headers = {"content-type": "application/json"} | ({"authorization": token} if token else {})
            target = f"/{_ROOTS[self._root]}/{method}"
            async with client.stream("POST", target, headers=headers, body=data, repeat=repeat) as stream:
                if stream.status == 200:
                    yield stream
                    return
                refusal = await stream.read_all()
            if stream.status == 404 and not refusal.startswith(b"{"):
                self._next_root(client)
                continue
            error = self._refusal(stream.status, refusal, client)
            if not isinstance(error, StaleToken) or anonymous or not self._username or logins == _LOGINS:
                raise error
            await self._login(client, token)
            logins += 1

    def _next_root(self, client: HttpClient) -> None:
        self._root += 1
        if self._root == len(_ROOTS):
            self._root = 0
            raise NoSuchApi(f"{client.url} has no etcd v3 JSON API")

    async def _login(self, client: HttpClient, refused: str | None) -> None:
        """Get a token in place of `refused`, unless another call did so meanwhile."""
        async with self._login_lock:
            if self._token != refused:
                return
            body = {"name": self._username, "password": self._password}
            try:
                async with self._open(client, "auth/authenticate", body, repeat=True, anonymous=True) as stream:
                    self._token = decode(_token, await stream.read_all(), client).token
            except GatewayError as error:
                if error.code != _PRECONDITION:
                    raise
                self._token = ""  # authentication is off: everybody may do everything

    def _refusal(self, status: int, body: bytes, client: HttpClient) -> StoreError:
        try:
            fault = _fault.decode(body)
        except UNREADABLE:
            text = body.decode("utf-8", "replace").strip()[:300] or f"HTTP status {status}"
            code = {401: _UNAUTHENTICATED, 403: _DENIED}.get(status, _UNAVAILABLE if status >= 500 else _UNKNOWN)
            return self._error(code, text, client)
        if isinstance(fault.error, StreamFault):
            return self.error(fault.error, client)
        return self._error(fault.code, fault.message or fault.error, client)

    def _error(self, code: int, message: str, client: HttpClient) -> StoreError:
        where = f"etcd at {client.url}"
        if self._username and any(text in message for text in _STALE_TOKEN):
            return StaleToken(f"{where}: {message}")
        for text, advice in _ADVICE.items():
            if text in message:
                return StoreDenied(f"{where}: {advice.format(user=self._username)} ({message})")
        if code in {_DENIED, _UNAUTHENTICATED} or "permission denied" in message:
            advice = f"user {self._username!r} needs a role with readwrite permission below --etcd-prefix"
            return StoreDenied(f"{where}: {message}: {advice}")
        if code in _TRANSIENT or (code == _EXHAUSTED and "too many requests" in message):
            return StoreUnavailable(f"{where}: {message}")
        return GatewayError(code, f"{where}: {message} (code {code})")


def decode(decoder: msgspec.json.Decoder[T], answer: bytes, client: HttpClient) -> T:
    """Read what etcd answered; raises GatewayError when something else answered in its place."""
    try:
        return decoder.decode(answer)
    except UNREADABLE as error:
        text = f"{client.url}: this is no answer of etcd v3 ({error}): {answer[:200]!r}"
        raise GatewayError(_UNKNOWN, text) from None


def first_result(answer: TxnAnswer, client: HttpClient) -> Result:
    """Of a transaction, whose branches each have one request; raises GatewayError when it is not there."""
    if not answer.responses:
        raise GatewayError(_UNKNOWN, f"{client.url}: this is no answer of etcd v3: a transaction without a result")
    return answer.responses[0]
