"""What a daemon may have comes to its end: memory, file descriptors, the kernel's buffer for notifications."""

from __future__ import annotations

import os
import resource
import shlex
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from wincey.lab.chaos.scenario import NotHere, Scenario
from wincey.lab.chaos.world import World
from wincey.lab.errors import LabError
from wincey.lab.namespace import call_in, ip_batch
from wincey.lab.process import Process, wait_for
from wincey.model.lease import LeaseAttrs, LeaseKey
from wincey.store.registry import Registry

_CGROUP = Path("/sys/fs/cgroup")
_LITTLE = 8 << 20  # bytes: a third of what a daemon needs
_ROUTES = 40_000
_TABLE = 7777
_PEERS = 120


def _daemon(world: World) -> Process:
    daemon = world.host("h1").daemon
    assert daemon
    return daemon


@contextmanager
def _no_more_memory(world: World) -> Iterator[None]:
    """No page more than it has, and each allocation that needs one fails; and the leases of many new hosts come."""
    pid = _daemon(world).pid
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
    before = resource.prlimit(pid, resource.RLIMIT_AS)
    resource.prlimit(pid, resource.RLIMIT_AS, (pages * resource.getpagesize(), before[1]))
    keys = [LeaseKey.parse(f"10.5.0.{2 * number}-31") for number in range(_PEERS)]  # where no host gets its subnet
    try:
        world.store.run(partial(_crowd, keys=keys))
        yield
    finally:
        with suppress(ProcessLookupError):  # it may have ended
            resource.prlimit(pid, resource.RLIMIT_AS, before)
        world.store.run(partial(_disperse, keys=keys))


async def _crowd(registry: Registry, keys: Sequence[LeaseKey]) -> None:
    """Leases of hosts that are not there."""
    for number, key in enumerate(keys):
        mac = f"02:00:00:00:02:{number:02x}"
        text = f'{{"PublicIP":"10.99.0.199","BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"{mac}"}}}}'
        await registry.create(key, LeaseAttrs.decode(text.encode()), permanent=True)


async def _disperse(registry: Registry, keys: Sequence[LeaseKey]) -> None:
    for key in keys:
        await registry.store.delete(registry.lease_key(key))


@contextmanager
def _memory_limited(world: World) -> Iterator[None]:
    """A control group with too little; the daemon is killed whenever it starts there."""
    host = world.host("h1")
    with _control_group(world.spec.name) as (group, limit):
        enter = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(group / "cgroup.procs")]
        command = shlex.join([*enter, *host.argv(), "--public-ip={public_ip}"])
        host.stop_daemon()
        for _ in range(3):
            host.start_daemon(command, wait=False)
            if not wait_for(lambda: not host.running, 10):
                raise LabError(f"a daemon lives with {_LITTLE >> 20} MiB: nothing is limited here")
        (group / limit).write_text("-1" if limit == "memory.limit_in_bytes" else "max")
        yield
        host.start_daemon(wait=False)


@contextmanager
def _control_group(name: str) -> Iterator[tuple[Path, str]]:
    """A control group with little memory, of either version; raises NotHere. Gives it and its file with the limit."""
    for base, limit in ((_CGROUP / "memory", "memory.limit_in_bytes"), (_CGROUP, "memory.max")):
        group = base / f"wincey-{name}"
        with suppress(OSError):
            group.mkdir()
            try:
                (group / limit).write_text(str(_LITTLE))
                break
            except OSError:
                group.rmdir()
    else:
        raise NotHere("no control group can be made for memory here")
    try:
        yield group, limit
    finally:
        wait_for(lambda: not (group / "cgroup.procs").read_text(), 5)
        with suppress(OSError):
            group.rmdir()


@contextmanager
def _no_descriptors(world: World) -> Iterator[None]:
    """No file, socket or pipe more; and the daemon needs some, as etcd's leader ends and a route of ours goes."""
    host, pid = world.host("h1"), _daemon(world).pid
    open_now = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
    lowest_free = next(number for number in range(len(open_now) + 1) if number not in open_now)
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (lowest_free, before[1]))
    leader = world.cluster.leader()
    leader.kill()
    try:
        host.exec(["nft", "flush", "ruleset"])
        yield
    finally:
        with suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
        leader.start()


@contextmanager
def _overrun(world: World) -> Iterator[None]:
    """More notifications than the daemon's socket holds, and then one that it needs and never gets."""
    host, daemon = world.host("h1"), _daemon(world)
    peer = world.host("h2").gateways[0].network
    daemon.send(signal.SIGSTOP)
    try:
        dropped = _dropped(world, daemon.pid)
        # Within the network: the kernel tells the daemon of no others (kernel.monitor). In a table that nothing looks at.
        addresses = (f"10.5.{number // 256}.{number % 256}" for number in range(_ROUTES))
        ip_batch((f"route add {address}/32 dev lo table {_TABLE}" for address in addresses), host.netns)
        if _dropped(world, daemon.pid) == dropped:
            raise LabError(f"{_ROUTES} changes of routes did not overrun the daemon's socket")
        world.sh("h1", f"ip route flush exact {peer}")
        yield
        world.sh("h1", f"ip route flush table {_TABLE}")
    finally:
        daemon.send(signal.SIGCONT)


def _dropped(world: World, pid: int) -> int:
    """How many notifications the kernel could not give to a process: column Drops, see net/netlink/af_netlink.c."""

    def read() -> str:
        return Path("/proc/thread-self/net/netlink").read_text()

    inodes = {link.partition("[")[2].rstrip("]") for link in _links(pid) if link.startswith("socket:")}
    lines = [line.split() for line in call_in(world.host("h1").netns, read).splitlines()[1:]]
    return sum(int(words[8]) for words in lines if words[9] in inodes)


def _links(pid: int) -> Iterator[str]:
    for name in os.listdir(f"/proc/{pid}/fd"):
        with suppress(OSError):
            yield os.readlink(f"/proc/{pid}/fd/{name}")


SCENARIOS = [
    Scenario(
        name="memory-exhausted",
        does=f"the daemon of h1 gets no page of memory more (RLIMIT_AS), and {_PEERS} hosts join and leave",
        expects="nothing is lost; the daemon goes on, or ends and is started again",
        fault=_no_more_memory,
        restarts=("h1",),
    ),
    Scenario(
        name="memory-limit",
        does=f"the daemon of h1 starts with {_LITTLE >> 20} MiB (control group) and is killed for it, three times",
        expects="nothing is lost",
        fault=_memory_limited,
        hold=0,
    ),
    Scenario(
        name="descriptors-exhausted",
        does="the daemon of h1 can open no descriptor more, as etcd's leader ends and all rules are flushed",
        expects="nothing is lost",
        fault=_no_descriptors,
        hold=4,
    ),
    Scenario(
        name="netlink-overrun",
        does=f"{_ROUTES} routes come at once while the daemon of h1 sleeps: the kernel drops notifications, then its route to h2 goes",
        expects="the others lose nothing; the daemon looks at everything and finds the route missing",
        fault=_overrun,
        affected=("h1",),
        hold=0,
    ),
]
