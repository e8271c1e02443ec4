"""Where Open vSwitch is on this host, and whether it is there at all."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from wincey.kernel.program import find
from wincey.model.errors import NotJoinable, WinceyError
from wincey.model.ovs import PACKAGE

OFCTL = "ovs-ofctl"


class OvsError(WinceyError):
    """Open vSwitch is not there, does not answer or refuses; the text says which, and what to do."""


def run_directory() -> Path:
    """The directory of its sockets, as its own programs find it."""
    return Path(os.environ.get("OVS_RUNDIR") or "/var/run/openvswitch")


def database_socket() -> str:
    """The socket of ovsdb-server."""
    return str(run_directory() / "db.sock")


def management_socket(bridge: str) -> str:
    """The socket at which ovs-vswitchd speaks OpenFlow for a bridge."""
    return str(run_directory() / f"{bridge}.mgmt")


def is_installed() -> bool:
    """Whether the programs are there."""
    return find(OFCTL) is not None


def unreachable(why: str) -> str:
    """What to say when the database does not answer."""
    if not is_installed():
        return f"the ovs backend needs Open vSwitch, which is not installed (package {PACKAGE}): {OFCTL} is missing"
    return (
        f"Open vSwitch's database does not answer at {database_socket()} ({why}): start its service ({PACKAGE}), or set"
        " OVS_RUNDIR where its sockets are in another directory"
    )


async def check() -> None:
    """Raise NotJoinable unless the database can be connected to."""
    try:
        _, writer = await asyncio.open_unix_connection(database_socket())
    except OSError as error:
        raise NotJoinable(unreachable(error.strerror or str(error))) from None
    writer.close()
    if not is_installed():
        raise NotJoinable(unreachable(""))
