"""What the commands that look at a running daemon share: finding its socket, asking, and how they print."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlencode

import click
import msgspec
from rich.console import Console

from wincey.http.client import HttpClient, HttpError
from wincey.model.errors import UNREADABLE, UsageError, WinceyError
from wincey.model.report import API, ErrorReport
from wincey.model.socketpath import SOCKET_VARIABLE, of_networks, of_subnet_file

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

USUAL = (of_subnet_file("/run/flannel/subnet.env"), of_networks("/run/flannel/networks"))
"""Where the socket of a daemon with usual flags is: with one network, and with several."""


class NoDaemon(WinceyError):
    """No daemon answers; says where one was looked for, and what to do."""


def looking_options(command: F) -> F:
    """--socket and --json."""
    command = click.option("--json", "as_json", is_flag=True, help="Print what the daemon says, as JSON.")(command)
    return click.option(
        "--socket",
        envvar=SOCKET_VARIABLE,
        metavar="PATH",
        help=f"The daemon's socket, as its --api-socket; otherwise ${SOCKET_VARIABLE}, else {' or '.join(USUAL)}.",
    )(command)


def network_option(command: F) -> F:
    """--network, for daemons with several."""
    return click.option("--network", metavar="NAME", help="One network, where the daemon is in several.")(command)


def ask(socket: str | None, what: str, kind: type[T], **query: str | None) -> tuple[T, bytes]:
    """The daemon's answer, and its JSON; raises NoDaemon, UsageError for what it does not know, WinceyError otherwise."""
    path = socket or next((usual for usual in USUAL if Path(usual).exists()), None)
    if path is None:
        raise NoDaemon(
            f"no daemon is found: there is neither {' nor '.join(USUAL)}; start flanneld, or name its socket with --socket"
        )
    given = urlencode({name: value for name, value in query.items() if value is not None})
    status, body = asyncio.run(_get(os.path.abspath(path), f"/{API}/{what}?{given}".rstrip("?")))
    if status == 200:
        return msgspec.json.decode(body, type=kind), body
    try:
        reason = msgspec.json.decode(body, type=ErrorReport).error
    except UNREADABLE:
        reason = f"{path} answers with HTTP status {status}: it is not a daemon's of this version"
    raise (UsageError if status in {400, 404} else WinceyError)(reason)


async def _get(path: str, target: str) -> tuple[int, bytes]:
    client = HttpClient(f"unix://{path}")
    try:
        answer = await client.request("GET", target, timeout=30)
    except HttpError as error:
        reason = "you may not: only root, and the group of its --api-group"
        if not isinstance(error.__cause__, PermissionError):
            reason = str(error)
        raise NoDaemon(f"no daemon answers at {path} ({reason}); see whether flanneld runs") from None
    finally:
        await client.close()
    return answer.status, answer.body


def print_json(body: bytes) -> None:
    """JSON for people as well as for programs."""
    click.echo(json.dumps(json.loads(body), indent=2, ensure_ascii=False))


def console() -> Console:
    """Standard output: colours and width as the terminal has them; elsewhere plain, and as wide as it takes."""
    found = Console(highlight=False, soft_wrap=False)
    if not found.is_terminal:
        found = Console(highlight=False, width=500, no_color=True)
    return found


def duration(seconds: float) -> str:
    """Two units at most: `23 h 12 min`, `5 s`."""
    whole = max(0, int(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min"
    if whole < 86_400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86_400} d {whole % 86_400 // 3600} h"


def milliseconds(seconds: float) -> str:
    """As ping prints it."""
    return f"{seconds * 1000:.2f} ms" if seconds < 0.01 else f"{seconds * 1000:.0f} ms"
