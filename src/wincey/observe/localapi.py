"""The daemon's local API: JSON over HTTP on a Unix socket, read by `wincey status` and its like, and by whoever wants to.

    GET /v1/status                    StatusReport
    GET /v1/peers[?network=NAME]      list of PeersReport, one a network
    GET /v1/containers[?network=NAME] list of ContainersReport, likewise
    GET /v1/diff[?network=NAME]       list of DifferenceReport
    GET /v1/explain?address=ADDRESS   list of ExplainReport, likewise
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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from wincey import __version__
from wincey.model.errors import CannotListen, WinceyError
from wincey.model.report import (
    API,
    ContainersReport,
    DifferenceReport,
    ErrorReport,
    ExplainReport,
    PeersReport,
    StatusReport,
)

if TYPE_CHECKING:
    from wincey.http.server import HttpServer, Request, Response


class Source(Protocol):
    """Who knows. network: a name, None for all; raises UnknownNetwork."""

    def status(self) -> StatusReport: ...

    async def peers(self, network: str | None) -> Sequence[PeersReport]: ...

    async def containers(self, network: str | None) -> Sequence[ContainersReport]: ...

    async def difference(self, network: str | None) -> Sequence[DifferenceReport]: ...

    async def explain(self, network: str | None, address: str) -> Sequence[ExplainReport]: ...


class BadQuestion(WinceyError):
    """The request asks for something that can't be: says what."""


class UnknownNetwork(WinceyError):
    """The daemon is in no network of that name; says in which ones it is."""


class NoSuchPath(WinceyError):
    """The API has no such path; says which ones it has."""


_STATUS: Mapping[type[Exception], int] = {BadQuestion: 400, UnknownNetwork: 404, NoSuchPath: 404}
"""What a failure is as a status of HTTP; 503 for all others."""


class _Endpoint(msgspec.Struct, frozen=True):
    summary: str
    answer: Any
    asks: tuple[str, ...] = ()


_PARAMETERS = {
    "network": ("One network, where the daemon is in several", False),
    "address": ("An address of a container, of either family", True),
}
"""What a request may say: what it means, and whether it has to."""


ENDPOINTS: Mapping[str, _Endpoint] = {
    "status": _Endpoint("The daemon and its networks", StatusReport),
    "peers": _Endpoint("The other hosts, as this one sees them", list[PeersReport], ("network",)),
    "containers": _Endpoint("Addresses of our subnet that the kernel knows", list[ContainersReport], ("network",)),
    "diff": _Endpoint("What should be against what is, read now", list[DifferenceReport], ("network",)),
    "explain": _Endpoint("The way of a packet to an address", list[ExplainReport], ("network", "address")),
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
        if method not in {"GET", "HEAD"}:
            return _error(405, f"{method} is not for this API, which only reads: use GET")
        if path == f"/{API}/openapi.json":
            return 200, msgspec.json.encode(openapi())
        try:
            return 200, msgspec.json.encode(await self._ask(path, query))
        except (WinceyError, OSError) as error:
            status = next((status for kind, status in _STATUS.items() if isinstance(error, kind)), 503)
            return _error(status, str(error))

    async def _ask(self, path: str, query: Mapping[str, str]) -> object:
        name = path.removeprefix(f"/{API}/")
        if name not in ENDPOINTS or name == path:
            known = ", ".join(f"/{API}/{each}" for each in (*ENDPOINTS, "openapi.json"))
            raise NoSuchPath(f"no {path}: there are {known}")
        for parameter in ENDPOINTS[name].asks:
            meaning, needed = _PARAMETERS[parameter]
            if needed and parameter not in query:
                raise BadQuestion(f"{path} needs ?{parameter}=: {meaning.lower()}")
        network, address = query.get("network"), query.get("address", "")
        match name:
            case "status":
                return self._source.status()
            case "peers":
                return await self._source.peers(network)
            case "containers":
                return await self._source.containers(network)
            case "diff":
                return await self._source.difference(network)
            case _:
                return await self._source.explain(network, address)

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
    parameters = {
        name: {"name": name, "in": "query", "required": needed, "description": text, "schema": {"type": "string"}}
        for name, (text, needed) in _PARAMETERS.items()
    }
    paths = {
        f"/{API}/{name}": {
            "get": {
                "summary": endpoint.summary,
                "operationId": name,
                "parameters": [parameters[each] for each in endpoint.asks],
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
