"""The network between hosts: packets lost, late and doubled, and hosts cut off, each at the switch."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from wincey.lab.chaos.scenario import Scenario
from wincey.lab.chaos.world import HOSTS, World
from wincey.lab.errors import LabError
from wincey.lab.plan import SWITCH
from wincey.lab.process import wait_for

_TAP = "bent"


@contextmanager
def _bent(world: World, *, delay_ms: int = 0, loss: float = 0, duplicate: float = 0) -> Iterator[None]:
    """h1's cable goes through a program that treats it badly."""
    argv = [sys.executable, "-m", "wincey.lab.chaos.cable", "h1", _TAP, str(delay_ms), str(loss), str(duplicate)]
    cable = world.run_on(SWITCH, argv)
    log = world.log_of(cable)
    if not wait_for(lambda: "ready" in log.read_text() or not cable.alive, 10) or not cable.alive:
        raise LabError(f"no bad cable can be made: {log.read_text().strip()}")
    world.sh(SWITCH, f"ip link set {_TAP} mtu {world.spec.mtu} up")
    world.sh(SWITCH, f"ip link set h1 nomaster; ip link set {_TAP} master br0")
    yield
    world.sh(SWITCH, f"ip link set {_TAP} nomaster; ip link set h1 master br0")
    cable.stop()


@contextmanager
def _cut_off(world: World) -> Iterator[None]:
    world.pull("h1")
    yield
    world.plug("h1")


@contextmanager
def _apart(world: World) -> Iterator[None]:
    """An isolated port of a bridge reaches all but the isolated."""
    world.sh(SWITCH, "bridge link set dev h1 isolated on; bridge link set dev h2 isolated on")
    yield
    world.sh(SWITCH, "bridge link set dev h1 isolated off; bridge link set dev h2 isolated off")


@contextmanager
def _no_store(world: World) -> Iterator[None]:
    members = [host.underlay(4) for host in world.hosts[HOSTS:]]
    world.sh("h1", "; ".join(f"ip route add blackhole {address}" for address in members))
    yield
    world.sh("h1", "; ".join(f"ip route del blackhole {address}" for address in members))


SCENARIOS = [
    Scenario(
        name="underlay-loss",
        does="a fifth of the frames from and to h1 is lost",
        expects="the others lose nothing; h1 stays as it is and follows the store",
        fault=functools.partial(_bent, loss=0.2),
        affected=("h1",),
        follows=True,
        hold=3,
    ),
    Scenario(
        name="underlay-delay",
        does="frames from and to h1 take 150 ms more each way",
        expects="the others lose nothing; h1 loses no more than is under way when its cable is changed",
        fault=functools.partial(_bent, delay_ms=150),
        affected=("h1",),
        follows=True,
        hold=3,
    ),
    Scenario(
        name="underlay-duplication",
        does="half of the frames from and to h1 come twice",
        expects="the others lose nothing; h1 loses no more than is under way when its cable is changed",
        fault=functools.partial(_bent, duplicate=0.5),
        affected=("h1",),
        follows=True,
        hold=3,
    ),
    Scenario(
        name="underlay-partition",
        does="h1's cable is out at the switch for 4 s",
        expects="the others lose nothing; h1 is back with its cable",
        fault=_cut_off,
        affected=("h1",),
        hold=4,
    ),
    Scenario(
        name="underlay-pair-apart",
        does="h1 and h2 do not reach each other for 3 s, and all else",
        expects="only these two lose packets; new leases go round",
        fault=_apart,
        affected=("h1", "h2"),
        apart=True,
        follows=True,
        hold=3,
    ),
    Scenario(
        name="store-out-of-reach",
        does="h1 reaches the other hosts, but no etcd server, for 4 s",
        expects="nothing is lost",
        fault=_no_store,
        hold=4,
    ),
]
