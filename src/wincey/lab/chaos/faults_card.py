"""The network card of a host: down and up, renamed, with another address."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from wincey.lab.chaos.scenario import Scenario
from wincey.lab.chaos.world import World


@contextmanager
def _down(world: World) -> Iterator[None]:
    world.sh("h1", "ip link set eth0 down")
    yield
    world.sh("h1", "ip link set eth0 up")


def _by_address(world: World) -> None:
    world.restart_daemon(world.host("h1"), {"--iface=eth0": "--iface={public_ip}"})


@contextmanager
def _renamed(world: World) -> Iterator[None]:
    world.sh("h1", "ip link set eth0 down; ip link set eth0 name ens7; ip link set ens7 up")
    yield


@contextmanager
def _other_address(world: World) -> Iterator[None]:
    world.sh("h1", "ip address del 10.99.0.1/24 dev eth0; ip address add 10.99.0.101/24 dev eth0")
    yield


SCENARIOS = [
    Scenario(
        name="card-down",
        does="h1's network card is down for 2 s",
        expects="the others lose nothing; h1 is back with its card",
        fault=_down,
        affected=("h1",),
    ),
    Scenario(
        name="card-renamed",
        does="h1's network card goes down, becomes ens7 and comes up; the daemon knows it by its address",
        expects="the others lose nothing; h1 goes on by the new name",
        prepare=_by_address,
        fault=_renamed,
        affected=("h1",),
        hold=0,
    ),
    Scenario(
        name="card-readdressed",
        does="h1's network card loses its address and gets another",
        expects="the others lose nothing; all hosts follow h1 to its new address, and it keeps its subnet",
        fault=_other_address,
        affected=("h1",),
        hold=0,
    ),
]
