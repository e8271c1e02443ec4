"""The store: members of the etcd cluster killed, paused, cut off, without disk, wiped and restored."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

from wincey.lab.chaos.etcd import Member
from wincey.lab.chaos.scenario import Scenario
from wincey.lab.chaos.world import World
from wincey.lab.errors import LabError

_JUNK = 64 * 1024  # bytes of a value that nobody needs


@contextmanager
def _leader_killed(world: World) -> Iterator[None]:
    leader = world.cluster.leader()
    leader.kill()
    yield
    leader.start()


@contextmanager
def _leader_paused(world: World) -> Iterator[None]:
    process = world.cluster.leader().process
    process.send(signal.SIGSTOP)
    try:
        yield
    finally:
        process.send(signal.SIGCONT)


@contextmanager
def _leader_cut_off(world: World) -> Iterator[None]:
    leader = world.cluster.leader()
    world.pull(leader.name)
    yield
    world.plug(leader.name)


@contextmanager
def _killed(world: World, count: int) -> Iterator[None]:
    members = world.cluster.members[:count]
    for member in members:
        member.kill()
    yield
    for member in members:
        member.start()


def _majority_killed(world: World) -> contextlib.AbstractContextManager[None]:
    return _killed(world, 2)


def _cluster_killed(world: World) -> contextlib.AbstractContextManager[None]:
    return _killed(world, 3)


def _own_disks(world: World) -> None:
    """Move the data of all members to small file systems, one after the other, while the cluster goes on."""
    world.cluster.stop()
    for member in world.cluster.members:
        member.give_disk()
        member.start()
    world.cluster.wait(world.cluster.members)
    world.store.put_config(world.spec.config)


@contextmanager
def _disks_full(world: World) -> Iterator[None]:
    """Fill each disk, and write until the members give up."""
    fillers = [member.data.parent / "filler" for member in world.cluster.members]
    for filler in fillers:
        with contextlib.suppress(OSError), filler.open("wb") as file:
            while True:
                file.write(bytes(1 << 20))
                file.flush()
    deadline = time.monotonic() + 30
    while all(member.running for member in world.cluster.members):
        if time.monotonic() > deadline:
            raise LabError("etcd goes on for 30 s with a full disk")
        _write(world.cluster.members)
    yield
    for filler in fillers:
        filler.unlink()
    for member in world.cluster.members:
        if not member.running:
            member.start()


def _write(members: list[Member]) -> None:
    """A value that nobody needs, by whoever takes it."""
    for member in members:
        member.ask("/v3/kv/put", {"key": "anVuaw==", "value": "A" * _JUNK})


@contextmanager
def _wiped(world: World) -> Iterator[None]:
    world.cluster.stop()
    for member in world.cluster.members:
        member.wipe()
    yield
    world.cluster.start()
    world.store.put_config(world.spec.config)


def _snapshot_before_h3(world: World) -> None:
    """What an administrator has from yesterday: h3 was not there yet."""
    world.cluster.snapshot()
    world.join([world.host("h3")])


@contextmanager
def _restored(world: World) -> Iterator[None]:
    world.cluster.stop()
    for member in world.cluster.members:
        member.wipe()
    yield
    for member in world.cluster.members:
        member.restore(world.directory / "snapshot.db")
        member.start()


SCENARIOS = [
    Scenario(
        name="etcd-leader-killed",
        does="SIGKILL to the leader of three etcd servers; started again after a new lease went round",
        expects="nothing is lost; new leases go round without it",
        fault=_leader_killed,
        follows=True,
    ),
    Scenario(
        name="etcd-leader-paused",
        does="SIGSTOP to the leader: its connections stay, and nothing answers",
        expects="nothing is lost; who follows it asks for a sign of life within 80 s, and follows another",
        fault=_leader_paused,
        follows=True,
        patience=100,
    ),
    Scenario(
        name="etcd-leader-cut-off",
        does="the leader's cable is out",
        expects="as when it is paused",
        fault=_leader_cut_off,
        follows=True,
        patience=100,
    ),
    Scenario(
        name="etcd-majority-killed",
        does="SIGKILL to two of three etcd servers for 4 s: the third answers, and serves nothing",
        expects="nothing is lost",
        fault=_majority_killed,
        hold=4,
    ),
    Scenario(
        name="etcd-killed",
        does="SIGKILL to all three etcd servers for 4 s",
        expects="nothing is lost",
        fault=_cluster_killed,
        hold=4,
    ),
    Scenario(
        name="etcd-disks-full",
        does="the disks of all three etcd servers are filled and written to, until a server gives up",
        expects="nothing is lost",
        prepare=_own_disks,
        fault=_disks_full,
    ),
    Scenario(
        name="etcd-wiped",
        does="all three etcd servers lose all data and begin anew; the config is put again",
        expects="nothing is lost, and each host keeps its subnet",
        fault=_wiped,
    ),
    Scenario(
        name="etcd-restored",
        does="all three etcd servers lose all data and are restored from a snapshot that does not know h3",
        expects="nothing is lost, and each host keeps its subnet",
        late=("h3",),
        prepare=_snapshot_before_h3,
        fault=_restored,
    ),
]
