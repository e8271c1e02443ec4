"""Which routing daemon this host has: what the bgp backend has to know before it can plan."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from wincey.model.errors import NotJoinable
from wincey.programs.bgp.files import Room
from wincey.programs.bgp.launch import find_bird, find_frr

VARIABLE = "WINCEY_BGP_DAEMON"
"""Chooses on a host that has both, where the config leaves it open."""

_MISSING = {
    "bird": "BIRD 2 (program bird, Debian package bird2)",
    "frr": "FRR (programs zebra and bgpd, Debian package frr)",
}


def routing_daemon(wanted: str, *, own: bool, directory: Path, environment: Mapping[str, str] = os.environ) -> str:
    """`bird` or `frr`. wanted: what the config says, `auto` for any. own: whether it is to be started by us.

    Of two, `auto` takes the one that the environment names, then the one that runs for us already, then BIRD. Raises
    NotJoinable when it is not installed.
    """
    if not own:
        return "bird"
    installed = [
        name for name, there in (("bird", find_bird()), ("frr", find_frr("zebra") and find_frr("bgpd"))) if there
    ]
    if wanted == "auto":
        chosen = environment.get(VARIABLE, "")
        if chosen and chosen not in _MISSING:
            raise NotJoinable(f"{VARIABLE} is {chosen!r}; it must be bird or frr")
        if not chosen:
            applied = Room(directory).applied()
            before = applied.speaker.daemon if applied else ""
            chosen = next((name for name in (before, *installed) if name in installed), "")
        if not chosen:
            raise NotJoinable(f"the bgp backend needs {_MISSING['bird']} or {_MISSING['frr']}; install one of them")
        wanted = chosen
    if wanted not in installed:
        raise NotJoinable(f"the bgp backend needs {_MISSING[wanted]}, which is not installed")
    return wanted
