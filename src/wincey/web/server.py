"""Gives browsers the page and what it shows. The page's own files tell nothing, and so anybody may have them; the rest takes
the token where there is one.

    GET /, /NAME                          the page's files
    GET /v1/picture[?watch=HOST]          Picture
    GET /v1/explain?from=HOST&to=ADDRESS  ExplainReport, of that host

A page that only loopback can reach may do without a token. Then a request has to name this host as its own (Host), or any web
site could have a browser on this host read it by a name of its own that leads to 127.0.0.1 (DNS rebinding).
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from importlib import resources
from typing import Protocol

import msgspec

from wincey.http.server import HttpServer, Limits, Request, Response
from wincey.model.errors import CannotListen, WinceyError
from wincey.model.report import ErrorReport, ExplainReport
from wincey.observe.apilisten import Token, is_loopback
from wincey.web.picture import Picture

_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}

_HEADERS = (
    (
        "Content-Security-Policy",
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self';"
        " base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
    ("Cache-Control", "no-store"),
)


class Shown(Protocol):
    """Who knows the network: a Gatherer, or a recording."""

    async def picture(self, watched: str = "") -> Picture: ...

    async def explain(self, start: str, address: str) -> ExplainReport: ...


class Page:
    """The web server. token: what browsers have to show, None for nothing."""

    def __init__(self, shown: Shown, token: Token | None = None) -> None:
        self._shown, self._token = shown, token
        self._files = {
            each.name: each.read_bytes()
            for each in resources.files("wincey.web").joinpath("assets").iterdir()
            if each.name.rpartition(".")[2] in _TYPES
        }
        self._server = HttpServer(self._handle, Limits(body=4096))

    async def listen(self, host: str, port: int, tls: ssl.SSLContext | None = None) -> int:
        """Listen there; returns the port. Raises CannotListen."""
        try:
            return await self._server.listen_tcp(host, port, tls)
        except OSError as error:
            raise CannotListen(
                f"--listen={host}:{port}: {error.strerror or error}; choose a free port and an address of this host"
            ) from None

    async def close(self) -> None:
        """Answer no more."""
        await self._server.close(grace=0.5)

    async def _handle(self, request: Request) -> Response:
        if request.method not in {"GET", "HEAD"}:
            return _json(405, ErrorReport(error="the page only reads: use GET"))
        if self._token is None and not is_loopback(_host(request.headers.get("host", ""))):
            return _json(421, ErrorReport(error="ask for this page as 127.0.0.1 or localhost"))
        name = request.path.removeprefix("/") or "index.html"
        if name in self._files:
            kind = _TYPES[name.rpartition(".")[2]]
            return Response(200, self._files[name], headers=(("Content-Type", kind), *_HEADERS))
        if self._token and not self._token.shown_by(request.headers):
            return _json(401, ErrorReport(error="this page takes the token of its --page-token-file"))
        return await self._answer(name, request.query)

    async def _answer(self, name: str, query: Mapping[str, str]) -> Response:
        try:
            if name == "v1/picture":
                return _json(200, await self._shown.picture(query.get("watch", "")))
            if name == "v1/explain":
                return _json(200, await self._shown.explain(query.get("from", ""), query.get("to", "")))
        except WinceyError as error:
            return _json(503, ErrorReport(error=str(error)))
        return _json(404, ErrorReport(error=f"there is no /{name}"))


def _json(status: int, content: object) -> Response:
    return Response(status, msgspec.json.encode(content), headers=(("Content-Type", "application/json"), *_HEADERS))


def _host(header: str) -> str:
    """A Host header without its port."""
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0].lower()
