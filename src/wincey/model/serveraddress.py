"""Addresses of the client and server mode: where a server listens (--listen), which servers a client asks (--remote)."""

from __future__ import annotations

import re

import msgspec

FIRST_PASSED = 3
"""The first descriptor that systemd passes."""

_SERVER = re.compile(r"(?:https?://)?(?:[^\s/?#@:\[\]]+|\[[0-9a-fA-F:.%]+\]):\d{1,5}/?", re.ASCII)


class Where(msgspec.Struct, frozen=True):
    """An address (host "": every one), or a descriptor (fd, from 3 on)."""

    host: str = ""
    port: int = 0
    fd: int | None = None


_ADDRESS = re.compile(r"(?:tcp://)?(?:\[(?P<v6>[0-9a-fA-F:.%]+)\]|(?P<host>[^:/\[\]]*)):(?P<port>\d{1,5})", re.ASCII)


def parse_listen(text: str) -> Where:
    """Read `[tcp://]HOST:PORT`, `fd://` (the first one) or `fd://N`; raises ValueError."""
    if match := re.fullmatch(r"fd://(\d{0,6})", text, re.ASCII):
        number = int(match[1] or FIRST_PASSED)
        if number < FIRST_PASSED:
            raise ValueError(f"must name a descriptor from {FIRST_PASSED} on, as systemd passes them, like fd://3")
        return Where(fd=number)
    match = _ADDRESS.fullmatch(text)
    if not match or not 0 < int(match["port"]) < 65536:
        raise ValueError("must be HOST:PORT, tcp://HOST:PORT, fd:// or fd://N, like 0.0.0.0:8888")
    return Where(match["v6"] or match["host"], int(match["port"]))


def parse_servers(text: str) -> tuple[str, ...]:
    """Read --remote, a comma list of `HOST:PORT`, each with `http://` or `https://` before it if need be. Raises ValueError."""
    servers = tuple(part.strip() for part in text.split(",") if part.strip())
    for server in servers:
        if not _SERVER.fullmatch(server):
            raise ValueError("must be HOST:PORT[,HOST:PORT...], like 10.0.0.1:8888,10.0.0.2:8888")
    return servers
