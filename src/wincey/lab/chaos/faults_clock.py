"""The wall clock jumps, for the daemons or for etcd; what the kernel measures by the monotonic clock goes on."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from wincey.lab.chaos.clock import check_clock, move_clock
from wincey.lab.chaos.scenario import Scenario
from wincey.lab.chaos.world import World
from wincey.lab.process import Process

_AHEAD = 25 * 3600
"""Seconds: more than a lease lasts."""


def _daemons(world: World) -> list[Process]:
    return [host.daemon for host in world.machines if host.daemon]


def _members(world: World) -> list[Process]:
    return [member.process for member in world.cluster.members]


@contextmanager
def _moved(world: World, whose: Callable[[World], list[Process]], seconds: int) -> Iterator[None]:
    check_clock()
    processes = whose(world)
    for process in processes:
        move_clock(process, seconds)
    yield
    for process in processes:
        move_clock(process, 0)


SCENARIOS = [
    Scenario(
        name="clock-daemons-ahead",
        does="the wall clock of all daemons jumps 25 h ahead, past the end of their leases, and back",
        expects="nothing is lost, nothing is given up",
        fault=functools.partial(_moved, whose=_daemons, seconds=_AHEAD),
        follows=True,
    ),
    Scenario(
        name="clock-daemons-behind",
        does="the wall clock of all daemons jumps 25 h back, and ahead again",
        expects="nothing is lost",
        fault=functools.partial(_moved, whose=_daemons, seconds=-_AHEAD),
        follows=True,
    ),
    Scenario(
        name="clock-etcd-ahead",
        does="the wall clock of all etcd servers jumps 25 h ahead, past the end of all leases, and back",
        expects="nothing is lost, no lease expires",
        fault=functools.partial(_moved, whose=_members, seconds=_AHEAD),
        follows=True,
    ),
    Scenario(
        name="clock-etcd-behind",
        does="the wall clock of all etcd servers jumps 25 h back, and ahead again",
        expects="nothing is lost",
        fault=functools.partial(_moved, whose=_members, seconds=-_AHEAD),
        follows=True,
    ),
]
