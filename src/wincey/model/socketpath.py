"""Where the daemon's local API is found: beside the files that it keeps for itself, so that each daemon has its own."""

from __future__ import annotations

from pathlib import PurePath

SOCKET = "api.sock"

SOCKET_VARIABLE = "WINCEY_SOCKET"
"""The environment variable by which programs are told of one."""


def of_subnet_file(subnet_file: str) -> str:
    """That of a daemon with one network; subnet_file: as --subnet-file."""
    path = PurePath(subnet_file)
    return str(path.parent / "wincey" / path.stem / SOCKET)


def of_networks(directory: str) -> str:
    """That of a daemon with several; directory: as --subnet-dir."""
    return str(PurePath(directory) / "wincey" / SOCKET)
