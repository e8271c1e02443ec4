"""The local API off its host (--api-listen): the same answers over TCP, for who shows the token of --api-token-file.

Off loopback it takes TLS as well, so that neither the token nor what is told can be read on the way. The token file is read
again when it changed, so that a token can be replaced at any time.
"""

from __future__ import annotations

import ipaddress
import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

import msgspec

from wincey.model.errors import BadOption, CannotListen, UsageError

if TYPE_CHECKING:
    from wincey.http.server import HttpServer, Request, Response
    from wincey.observe.localapi import LocalApi

log = logging.getLogger(__name__)

_SHORTEST = 16
_BEARER = "bearer "


class ApiListen(msgspec.Struct, frozen=True):
    """Where the API listens besides its socket, and with what. host "": every address. certfile, keyfile: "" for no TLS."""

    host: str
    port: int
    certfile: str = ""
    keyfile: str = ""
    token_file: str = ""


class Token:
    """The token of a file, which clients have to show. flag: what names the file; raises BadOption when it can't be used."""

    def __init__(self, path: str, flag: str) -> None:
        self._path, self._flag = path, flag
        self._seen = _identity(path)
        self._token = self._read()

    def shown_by(self, headers: Mapping[str, str]) -> bool:
        """Whether a request's headers hold it. How long that takes tells nothing about it."""
        import hmac  # noqa: PLC0415  # a daemon that nobody asks does without it

        self._refresh()
        given = headers.get("authorization", "")
        if given[: len(_BEARER)].lower() != _BEARER:
            return False
        return hmac.compare_digest(given[len(_BEARER) :].strip().encode(), self._token)

    def _read(self) -> bytes:
        from wincey.store.servers import read_token  # noqa: PLC0415  # brings HTTP, for who listens only

        token = read_token(self._path, self._flag)
        if len(token) < _SHORTEST:
            raise BadOption(
                f"{self._flag} {self._path}: a token has at least {_SHORTEST} characters; make one with openssl rand -hex 16"
            )
        return token.encode()

    def _refresh(self) -> None:
        if (identity := _identity(self._path)) == self._seen:
            return
        self._seen = identity
        try:
            self._token = self._read()
        except BadOption as error:
            log.error("%s; going on with the token from before", error)


async def serve_api(api: LocalApi, options: ApiListen) -> HttpServer:
    """Serve it until the server returned is closed; raises UsageError, BadOption, CannotListen."""
    from wincey.http.server import HttpServer, Limits, Response  # noqa: PLC0415  # for who listens only
    from wincey.store.endpoints import tls_context  # noqa: PLC0415  # likewise

    where = f"[{options.host}]:{options.port}" if ":" in options.host else f"{options.host}:{options.port}"
    if not options.token_file:
        raise UsageError(f"--api-listen={where} needs --api-token-file: whoever reads the API sees all of this host")
    if not (options.certfile or options.keyfile or is_loopback(options.host)):
        raise UsageError(
            f"--api-listen={where} needs --api-certfile and --api-keyfile: off loopback, others could read the token"
        )
    token = Token(options.token_file, "--api-token-file")
    encrypted = options.certfile or options.keyfile
    tls = tls_context(options.keyfile, options.certfile, server=True, flags="--api") if encrypted else None

    async def handle(request: Request) -> Response:
        if token.shown_by(request.headers):
            return await api.handle(request)
        return Response(
            401,
            b'{"error":"this API takes the token of --api-token-file, as Authorization: Bearer TOKEN"}\n',
            headers=(("Content-Type", "application/json"), ("WWW-Authenticate", "Bearer")),
        )

    server = HttpServer(handle, Limits(body=4096, connections=64))
    try:
        await server.listen_tcp(options.host, options.port, tls)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        raise CannotListen(f"--api-listen={where}: {reason}; choose a free port and an address of this host") from None
    return server


def is_loopback(host: str) -> bool:
    """Whether only this host reaches an address; "" is every address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _identity(path: str) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size
