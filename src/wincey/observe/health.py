"""/healthz and /readyz (compatibility reference, section 11): whether the daemon runs, and whether the host has joined.

Not ready comes with the reason in the body, for who asks why their pods don't start.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from wincey.model.errors import CannotListen

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


async def serve_health(health: Health, host: str, port: int) -> HttpServer:
    """Serve it until the server returned is closed; raises CannotListen."""
    from wincey.http.server import HttpServer, Response  # noqa: PLC0415  # 2 MB that a daemon without healthz does not need

    async def handle(request: Request) -> Response:
        status, body = health.answer(request.path)
        return Response(status, body.encode())

    server = HttpServer(handle)
    try:
        await server.listen_tcp(host, port)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        raise CannotListen(
            f"--healthz-ip and --healthz-port: can't listen on {host}:{port}: {reason}; choose a free port and an address of"
            " this host"
        ) from None
    return server
