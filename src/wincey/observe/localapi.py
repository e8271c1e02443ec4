"""The daemon's local API: JSON over HTTP on a Unix socket, read by `wincey status` and its like, and by whoever wants to.

    GET /v1/status                    StatusReport
    GET /v1/peers[?network=NAME]      list of PeersReport, one a network
    GET /v1/diff[?network=NAME]       list of DifferenceReport
    GET /v1/openapi.json              this, as OpenAPI 3.1

It only reads. The socket is root's, and a group's where one is given (--api-group): who may connect may see all of it. HTTP
is imported when the first client comes, so that a daemon nobody asks pays a file descriptor for it and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import grp
import os
import socket
import stat
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from wincey import __version__
from wincey.model.errors import CannotListen, WinceyError
from wincey.model.report import (
    API,
    DifferenceReport,
    ErrorReport,
    PeersReport,
    StatusReport,
)

if TYPE_CHECKING:
    from wincey.http.server import HttpServer, Request, Response


class Source(Protocol):
    """Who knows. network: a name, None for all; raises UnknownNetwork."""

    def status(self) -> StatusReport: ...

    async def peers(self, network: str | None) -> Sequence[PeersReport]: ...

    async def difference(self, network: str | None) -> Sequence[DifferenceReport]: ...


class UnknownNetwork(WinceyError):
    """The daemon is in no network of that name; says in which ones it is."""


class _Endpoint(msgspec.Struct, frozen=True):
    summary: str
    answer: Any
    by_network: bool


ENDPOINTS: Mapping[str, _Endpoint] = {
    "status": _Endpoint("The daemon and its networks", StatusReport, by_network=False),
    "peers": _Endpoint("The other hosts, as this one sees them", list[PeersReport], by_network=True),
    "diff": _Endpoint("What should be against what is, read now", list[DifferenceReport], by_network=True),
}


class LocalApi:
    """Answers out of a source."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._server: asyncio.Server | None = None
        self._http: HttpServer | None = None
        self._path = ""

    async def listen(self, path: str, group: str = "") -> None:
        """Listen on a Unix socket, in place of one that an earlier run left behind. Raises CannotListen."""
        try:
            gid = grp.getgrnam(group).gr_gid if group else None
        except KeyError:
            raise CannotListen(
                f"--api-group={group}: this host has no such group; make it with groupadd, or leave it out"
            ) from None
        try:
            self._server = await asyncio.get_running_loop().create_unix_server(self._connection, sock=_bound(path, gid))
        except OSError as error:
            raise CannotListen(f"--api-socket: can't listen on {path}: {error.strerror or error}") from None
        self._path = path

    async def close(self) -> None:
        """Answer no more, and remove the socket."""
        if self._server:
            self._server.close()
            with contextlib.suppress(OSError):
                os.unlink(self._path)
        if self._http:
            await self._http.close(grace=0.5)

    async def handle(self, request: Request) -> Response:
        """Answer one request."""
        from wincey.http.server import Response  # noqa: PLC0415  # see the module

        status, body = await self.answer(request.method, request.path, request.query)
        return Response(status, body + b"\n", headers=(("Content-Type", "application/json"),))

    async def answer(self, method: str, path: str, query: Mapping[str, str]) -> tuple[int, bytes]:
        """Status and body for a request."""
        name = path.removeprefix(f"/{API}/")
        if method not in {"GET", "HEAD"}:
            return _error(405, f"{method} is not for this API, which only reads: use GET")
        if path == f"/{API}/openapi.json":
            return 200, msgspec.json.encode(openapi())
        if name not in ENDPOINTS or name == path:
            known = ", ".join(f"/{API}/{each}" for each in (*ENDPOINTS, "openapi.json"))
            return _error(404, f"no {path}: there are {known}")
        answers: dict[str, Callable[[str | None], Awaitable[object]]] = {
            "status": self._status,
            "peers": self._source.peers,
            "diff": self._source.difference,
        }
        try:
            return 200, msgspec.json.encode(await answers[name](query.get("network")))
        except UnknownNetwork as error:
            return _error(404, str(error))
        except (WinceyError, OSError) as error:
            return _error(503, str(error))

    async def _status(self, network: str | None) -> StatusReport:
        return self._source.status()

    def _connection(self) -> asyncio.BaseProtocol:
        if self._http is None:
            from wincey.http.server import HttpServer, Limits  # noqa: PLC0415  # see the module

            self._http = HttpServer(self.handle, Limits(connections=32))
        return self._http.connection()


def openapi() -> dict[str, Any]:
    """The description of the API, made from the types of its answers."""
    types = [endpoint.answer for endpoint in ENDPOINTS.values()]
    schemas, components = msgspec.json.schema_components(
        [*types, ErrorReport], ref_template="#/components/schemas/{name}"
    )
    failure = {"description": "Why not", "content": {"application/json": {"schema": schemas[-1]}}}
    network = {
        "name": "network",
        "in": "query",
        "required": False,
        "description": "One network, where the daemon is in several",
        "schema": {"type": "string"},
    }
    paths = {
        f"/{API}/{name}": {
            "get": {
                "summary": endpoint.summary,
                "operationId": name,
                "parameters": [network] if endpoint.by_network else [],
                "responses": {
                    "200": {"description": "As asked", "content": {"application/json": {"schema": schema}}},
                    "default": failure,
                },
            }
        }
        for (name, endpoint), schema in zip(ENDPOINTS.items(), schemas[:-1], strict=True)
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "Wincey's local API", "version": f"{API} ({__version__})"},
        "paths": paths,
        "components": {"schemas": components},
    }


def _bound(path: str, gid: int | None) -> socket.socket:
    """A socket at `path` that nobody but root, and the group, can connect to from its first moment on."""
    Path(path).parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISSOCK(os.stat(path).st_mode):
            os.unlink(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        before = os.umask(0o177)
        try:
            listener.bind(path)
        finally:
            os.umask(before)
        if gid is not None:
            os.chown(path, -1, gid)
            os.chmod(path, 0o660)  # the group was chosen by who runs the daemon
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener


def _error(status: int, text: str) -> tuple[int, bytes]:
    return status, msgspec.json.encode(ErrorReport(error=text))
