"""Daemons that are killed and paused, alone and together with the store."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

from wincey.lab.chaos.scenario import Scenario
from wincey.lab.chaos.world import World


@contextmanager
def _killed(world: World) -> Iterator[None]:
    host = world.host("h1")
    host.kill_daemon()
    yield
    host.start_daemon(wait=False)


@contextmanager
def _paused(world: World) -> Iterator[None]:
    daemon = world.host("h1").daemon
    assert daemon
    daemon.send(signal.SIGSTOP)
    try:
        yield
    finally:
        daemon.send(signal.SIGCONT)


@contextmanager
def _all_killed(world: World) -> Iterator[None]:
    for host in world.machines:
        host.kill_daemon()
    yield
    for host in world.machines:
        host.start_daemon(wait=False)


@contextmanager
def _all_gone(world: World) -> Iterator[None]:
    world.cluster.stop()
    with _all_killed(world):
        yield
        for host in world.machines:  # as after a power cut of the store: they begin, and nobody answers
            host.start_daemon(wait=False)
        time.sleep(1)
        for host in world.machines:
            host.kill_daemon()
        for member in world.cluster.members:
            member.start()


SCENARIOS = [
    Scenario(
        name="daemon-killed",
        does="SIGKILL to the daemon of h1, which is started again 2 s later",
        expects="nothing is lost: the data path outlives the daemon",
        fault=_killed,
    ),
    Scenario(
        name="daemon-paused",
        does="SIGSTOP to the daemon of h1 for 4 s",
        expects="nothing is lost",
        fault=_paused,
        hold=4,
    ),
    Scenario(
        name="daemons-killed",
        does="SIGKILL to all daemons at once, which are started again 2 s later",
        expects="nothing is lost, and each host keeps its subnet",
        fault=_all_killed,
    ),
    Scenario(
        name="store-and-daemons-gone",
        does="SIGKILL to all daemons and the whole store at once; daemons start without a store and are killed again; then all start",
        expects="nothing is lost, and each host keeps its subnet",
        fault=_all_gone,
    ),
]
