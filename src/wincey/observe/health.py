"""/healthz and /readyz (compatibility reference, section 11): whether the daemon runs, and whether the host has joined; and
/metrics, on the same port or one of its own (--metrics-listen).

Not ready comes with the reason in the body, for who asks why their pods don't start.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from wincey.model.errors import CannotListen
from wincey.model.report import StatusReport

if TYPE_CHECKING:
    from wincey.http.server import HttpServer, Request, Response


class Health:
    """How this daemon is. Not ready until it is told otherwise."""

    def __init__(self) -> None:
        self._reason: str | None = "starting"

    def set_ready(self) -> None:
        """This host has its lease, its devices and its subnet.env."""
        self._reason = None

    def set_not_ready(self, reason: str) -> None:
        """It lacks one of them; `reason` is one line."""
        self._reason = reason

    def answer(self, path: str) -> tuple[int, str]:
        """Status and body for a path."""
        if path == "/healthz":
            return 200, "flanneld is running"
        if path != "/readyz":
            return 404, "404 page not found\n"
        if self._reason is None:
            return 200, "flanneld is ready"
        return 503, f"flanneld is not ready yet: {self._reason}"


async def serve_health(
    health: Health,
    host: str,
    port: int,
    *,
    status: Callable[[], StatusReport] | None = None,
    flags: str = "--healthz-ip and --healthz-port",
) -> HttpServer:
    """Serve it until the server returned is closed; raises CannotListen. status: what /metrics is made of, None for no such
    path. flags: what says where to listen."""
    from wincey.http.server import HttpServer, Response  # noqa: PLC0415  # 2 MB that a daemon without healthz does not need

    async def handle(request: Request) -> Response:
        if status and request.path == "/metrics":
            from wincey.observe.metrics import CONTENT_TYPE, render  # noqa: PLC0415  # for who is asked

            return Response(200, render(status()).encode(), headers=(("Content-Type", CONTENT_TYPE),))
        code, body = health.answer(request.path)
        return Response(code, body.encode())

    server = HttpServer(handle)
    try:
        await server.listen_tcp(host, port)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        raise CannotListen(
            f"{flags}: can't listen on {host}:{port}: {reason}; choose a free port and an address of this host"
        ) from None
    return server
