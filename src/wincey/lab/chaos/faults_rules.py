"""Other programs on the host: a firewall that flushes all rules, routes that are flushed, a device that is taken away."""

from __future__ import annotations

import functools
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager

from wincey.lab.chaos.scenario import NotHere, Scenario
from wincey.lab.chaos.world import World

_THEIR_VNI = 77
_AGAIN = 5  # times that another program takes our device


@contextmanager
def _flushed(world: World, program: str, script: str) -> Iterator[None]:
    if not shutil.which(program):
        raise NotHere(f"there is no {program} on this machine")
    world.sh("h1", script)
    yield


@contextmanager
def _routes_flushed(world: World) -> Iterator[None]:
    """The kernel's own routes go along, which only who has set up the addresses puts back."""
    found = world.host("h1").exec(["ip", "-j", "route", "show", "table", "main", "proto", "kernel"], check=True).stdout
    world.sh("h1", "ip route flush table main")
    yield
    for route in json.loads(found):
        words = f"{route['dst']} dev {route['dev']} proto kernel scope link src {route['prefsrc']}"
        world.sh("h1", f"ip route replace {words}")


@contextmanager
def _overlay_routes_flushed(world: World) -> Iterator[None]:
    own = str(world.host("h1").gateways[0].network)
    found = world.host("h1").exec(["ip", "-j", "route", "show", "root", "10.5.0.0/16"], check=True).stdout
    theirs = [route["dst"] for route in json.loads(found) if route["dst"] != own]
    world.sh("h1", "; ".join(f"ip route flush exact {network}" for network in theirs))
    yield


@contextmanager
def _device_taken(world: World) -> Iterator[None]:
    devices = world.devices("h1")
    if not devices:
        raise NotHere("this backend has no device of its own")
    own = f"ip link add {devices[0]} type vxlan id {_THEIR_VNI} dstport 4789 dev eth0"
    for _ in range(_AGAIN):
        world.sh("h1", f"ip link del {devices[0]} || :; {own} || :")  # it may be away, or back
        time.sleep(0.2)
    yield
    # One of another kind than ours is not the daemon's to delete: it goes with who made it.
    world.sh("h1", f"! ip -d link show {devices[0]} | grep -q 'vxlan id {_THEIR_VNI} ' || ip link del {devices[0]}")


SCENARIOS = [
    Scenario(
        name="rules-nft-flush",
        does="a firewall program on h1: nft flush ruleset",
        expects="nothing is lost; the rules are back",
        fault=functools.partial(_flushed, program="nft", script="nft flush ruleset"),
        hold=0,
    ),
    Scenario(
        name="rules-iptables-flush",
        does="a firewall program on h1: iptables -F and -X in the tables filter and nat",
        expects="nothing is lost; the rules are back",
        fault=functools.partial(
            _flushed,
            program="iptables",
            script="for table in filter nat; do iptables -t $table -F; iptables -t $table -X; done",
        ),
        hold=0,
    ),
    Scenario(
        name="routes-flushed",
        does="on h1: ip route flush table main; 1 s later somebody puts back the routes of the host's own addresses",
        expects="the others lose nothing; all other routes are back",
        fault=_routes_flushed,
        affected=("h1",),
        hold=1,
    ),
    Scenario(
        name="routes-overlay-flushed",
        does="on h1: ip route flush of all routes to other hosts' subnets",
        expects="the others lose nothing; the routes are back at once",
        fault=_overlay_routes_flushed,
        affected=("h1",),
        hold=0,
    ),
    Scenario(
        name="device-taken",
        does=f"another daemon on h1 deletes our device and makes its own by that name, {_AGAIN} times in a second, and leaves",
        expects="the others lose nothing; the device is ours again",
        fault=_device_taken,
        affected=("h1",),
        hold=0,
    ),
]
