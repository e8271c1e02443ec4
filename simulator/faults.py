"""What can go wrong: each fault a small value that a scenario names, with how it begins and how it ends.

`host` is a host's number from 1; a fault whose host is not there does nothing, so that a scenario can lose hosts and still be
run. `lasts`: seconds from its beginning to its end.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, ClassVar, Literal, TypeAlias

import msgspec

from simulator.wire import Cut
from wincey.leasing.claims import Host as Claimant
from wincey.model.address import format_address
from wincey.model.lease import LeaseAttrs
from wincey.model.state import FdbEntry, Link, Neighbor, Route

if TYPE_CHECKING:
    from simulator.world import World


What: TypeAlias = Literal[
    "delete lease", "garble lease", "change lease", "delete claim", "garble claim", "take claim", "reserve"
]
Kind: TypeAlias = Literal["routes", "neighbors", "fdb", "devices", "all"]


class Fault(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """What all have in common. harms: it may take packets of the hosts that it names, with no fault of the agents'."""

    harms: ClassVar[bool] = False
    lasts: float = 0.0

    @property
    def victim(self) -> int:
        """The host that it harms, 0 for all."""
        return getattr(self, "host", 0)

    def begin(self, world: World) -> None:
        """Let it happen."""

    def end(self, world: World) -> None:
        """Let it be over."""

    def __str__(self) -> str:
        fields = [f"{name}={value}" for name, value in msgspec.structs.asdict(self).items() if value not in {"", 0.0}]
        return f"{type(self).__name__}({', '.join(fields)})"


# Between a host and the store


class Partition(Fault, frozen=True):
    """A host can't reach the store, or one member of it. host 0: none can."""

    host: int
    member: int = 0
    cut: Cut = "silent"

    def begin(self, world: World) -> None:
        for host in world.chosen(self.host):
            names = [member.name for member in world.etcd.members]
            host.link.partition(dict.fromkeys(names[self.member - 1 : self.member] or names, self.cut))

    def end(self, world: World) -> None:
        for host in world.chosen(self.host):
            host.link.partition({})


class SlowAnswers(Fault, frozen=True):
    """Each way takes up to `seconds`."""

    host: int
    seconds: float

    def begin(self, world: World) -> None:
        for host in world.chosen(self.host):
            host.link.latency = (self.seconds / 4, self.seconds)

    def end(self, world: World) -> None:
        for host in world.chosen(self.host):
            host.link.latency = (0.0005, 0.004)


class LostMessages(Fault, frozen=True):
    """Requests do not arrive, or are carried out and their answers do not arrive."""

    host: int
    requests: float = 0.0
    answers: float = 0.0

    def begin(self, world: World) -> None:
        for host in world.chosen(self.host):
            host.link.lose_request, host.link.lose_answer = self.requests, self.answers

    def end(self, world: World) -> None:
        for host in world.chosen(self.host):
            host.link.lose_request = host.link.lose_answer = 0.0


class DisorderedEvents(Fault, frozen=True):
    """Lines of watches come twice, or after their successors."""

    host: int
    repeat: float = 0.0
    swap: float = 0.0

    def begin(self, world: World) -> None:
        for host in world.chosen(self.host):
            host.link.repeat, host.link.swap = self.repeat, self.swap

    def end(self, world: World) -> None:
        for host in world.chosen(self.host):
            host.link.repeat = host.link.swap = 0.0


# The store


class CompactWhileCut(Fault, frozen=True):
    """Watches break, the store changes, and forgets the change before they are back."""

    def begin(self, world: World) -> None:
        for member in world.etcd.members:
            member.cut("the server closed it")
        world.scribble()
        world.etcd.compact()
        world.scribble()


class CompactAfterRead(Fault, frozen=True):
    """Between a host's reading of everything and its watch the store changes and forgets, a few times."""

    host: int
    times: int = 1

    def begin(self, world: World) -> None:
        for host in world.chosen(self.host):
            world.compact_after[host.name] = self.times


class StaleMember(Fault, frozen=True):
    """A member is cut off from the majority: it accepts connections, keeps watches, and knows nothing new."""

    member: int

    def begin(self, world: World) -> None:
        if member := world.member(self.member):
            member.stale = True

    def end(self, world: World) -> None:
        if member := world.member(self.member):
            member.stale = False
            member.catch_up()


class LaggingMember(Fault, frozen=True):
    """A member is behind by some seconds."""

    member: int
    seconds: float

    def begin(self, world: World) -> None:
        if member := world.member(self.member):
            member.lag = self.seconds

    def end(self, world: World) -> None:
        if member := world.member(self.member):
            member.lag = 0.0
            member.catch_up()


class StoreDown(Fault, frozen=True):
    """A member dies and comes back with its data. member 0: all of them. frozen: it stops as by SIGSTOP instead."""

    member: int = 0
    frozen: bool = False

    def begin(self, world: World) -> None:
        for member in world.members(self.member):
            if self.frozen:
                member.paused = True
            else:
                member.up = False
                member.cut("the server went away")

    def end(self, world: World) -> None:
        for member in world.members(self.member):
            member.up, member.paused = True, False
            member.catch_up()


class DataLoss(Fault, frozen=True):
    """The store loses everything; the administrator puts the config back after `lasts` seconds."""

    def begin(self, world: World) -> None:
        world.restore(None)

    def end(self, world: World) -> None:
        world.put_config()


class Restore(Fault, frozen=True):
    """The store is restored from a backup made `age` seconds ago. busy: keys that others write before anybody is back."""

    age: float
    busy: int = 0

    def begin(self, world: World) -> None:
        world.restore(self.age)
        for _ in range(self.busy):
            world.scribble()
        world.put_config()


# Agents and machines


class Crash(Fault, frozen=True):
    """The agent dies at one of its next steps, and is started again `lasts` seconds later. steps 0: at once."""

    host: int
    steps: int = 0

    def begin(self, world: World) -> None:
        for host in world.chosen(self.host):
            host.down_until = world.loop.now + self.lasts
            if host.process and self.steps:
                host.process.crash_at = host.process.steps + self.steps
            else:
                host.crash()

    def end(self, world: World) -> None:
        for host in world.chosen(self.host):
            if host.process:
                host.process.crash_at = None
            host.start()


class CrashWhileStarting(Fault, frozen=True):
    """The agent is killed and dies again at some step of its next start, and is started once more `lasts` seconds later."""

    host: int
    steps: int

    def begin(self, world: World) -> None:
        for host in world.chosen(self.host):
            host.crash()
            host.start()
            host.down_until = world.loop.now + self.lasts
            if host.process:
                host.process.crash_at = self.steps

    def end(self, world: World) -> None:
        for host in world.chosen(self.host):
            if host.process:
                host.process.crash_at = None
            host.start()


class Reboot(Fault, frozen=True):
    """The machine is off for `lasts` seconds; its kernel begins anew. forgets: subnet.env was in memory too."""

    harms = True
    host: int
    forgets: bool = True

    def begin(self, world: World) -> None:
        for host in world.chosen(self.host):
            world.power_off(host, forgets=self.forgets)

    def end(self, world: World) -> None:
        for host in world.chosen(self.host):
            world.power_on(host)


class Joins(Fault, frozen=True):
    """New hosts come."""

    count: int = 1

    def begin(self, world: World) -> None:
        for _ in range(self.count):
            world.add_host().start()


class Leaves(Fault, frozen=True):
    """A host is taken away for good."""

    harms = True
    host: int

    def begin(self, world: World) -> None:
        for host in world.chosen(self.host):
            world.power_off(host, forgets=True)
            host.gone = True


class Stopped(Fault, frozen=True):
    """The agent stands still, as by SIGSTOP: its clock goes on."""

    host: int

    def begin(self, world: World) -> None:
        for host in world.chosen(self.host):
            if host.process and host.process.alive:
                host.process.stopped = True

    def end(self, world: World) -> None:
        for host in world.chosen(self.host):
            if host.process and host.process.stopped:
                world.loop.resume(host.process)


class Suspended(Fault, frozen=True):
    """The machine sleeps, and its monotonic clock with it."""

    host: int

    def begin(self, world: World) -> None:
        for host in world.chosen(self.host):
            if host.process and host.process.alive:
                host.process.stopped = True
            host.link.partition({member.name: "silent" for member in world.etcd.members})

    def end(self, world: World) -> None:
        for host in world.chosen(self.host):
            host.link.partition({})
            if host.process and host.process.stopped:
                world.loop.resume(host.process, slept=self.lasts)


class ClockJump(Fault, frozen=True):
    """The wall clock jumps, forward or back."""

    host: int
    seconds: float

    def begin(self, world: World) -> None:
        for host in world.chosen(self.host):
            host.wall += self.seconds
            if host.process:
                host.process.wall = host.wall


class Clone(Fault, frozen=True):
    """A copy of a host's machine is started: with its files and machine id, and its address or one of its own.

    A copy with the same address is taken away again after `lasts` seconds. same_boot: not even its boot tells it apart, as a
    virtual machine resumed twice from one image.
    """

    harms = True
    host: int
    own_address: bool = False
    same_boot: bool = False

    def begin(self, world: World) -> None:
        for host in world.chosen(self.host):
            world.clone(host, self)

    def end(self, world: World) -> None:
        world.remove_clones(self)


class Rename(Fault, frozen=True):
    """The host gets another name, and its agent is restarted."""

    host: int

    def begin(self, world: World) -> None:
        for host in world.chosen(self.host):
            host.hostname += "x"
            host.crash()
            host.start()


class AddressChange(Fault, frozen=True):
    """The host gets another address, while its agent runs or (restart) while it does not."""

    harms = True
    host: int
    restart: bool = False

    def begin(self, world: World) -> None:
        for host in world.chosen(self.host):
            world.renumber(host, restart=self.restart)


# What is in the store


class ConfigChange(Fault, frozen=True):
    """The administrator changes the config: keys of it as JSON. `lasts` above 0: and back."""

    keys: str

    @property
    def harms(self) -> bool:  # type: ignore[override]  # of this one its fields tell
        """A change of the backend alone may take no packet."""
        return not json.loads(self.keys).keys() <= {"Backend"}

    def begin(self, world: World) -> None:
        world.change_config(json.loads(self.keys))

    def end(self, world: World) -> None:
        if self.lasts:
            world.change_config_back()


class BadConfig(Fault, frozen=True):
    """The config is one that nobody can follow, for a while. text "": there is none."""

    text: str = ""

    def begin(self, world: World) -> None:
        if self.text:
            world.etcd.put(world.config_key, self.text.encode())
        else:
            world.etcd.delete(world.config_key)

    def end(self, world: World) -> None:
        world.put_config()


GARBAGE = (
    b"",
    b"garbage",
    b"{",
    b"null",
    b"[]",
    b'{"PublicIP":"999.0.0.1"}',
    b'{"PublicIP":7}',
    b"\xff\xfe",
    b'{"PublicIP":""}',
)
NAMES = ("garbage", "10.3.7.0", "10.3.300.0-24", "10.3.7.0-99", "a/b", "10.3.7.0-24x", "0.0.0.0-0", "-", "é")


class BadKey(Fault, frozen=True):
    """Somebody writes a key below subnets/ that is no lease; it is taken away after `lasts` seconds."""

    name: int = 0
    value: int = 0

    def begin(self, world: World) -> None:
        world.etcd.put(self._key(world), GARBAGE[self.value % len(GARBAGE)])

    def end(self, world: World) -> None:
        world.etcd.delete(self._key(world))

    def _key(self, world: World) -> str:
        return f"{world.prefix}/subnets/{NAMES[self.name % len(NAMES)]}"


class Meddling(Fault, frozen=True):
    """Somebody deletes a host's lease, overwrites it with garbage or other data, or does so to its claim."""

    host: int
    what: Literal[
        "delete lease", "garble lease", "change lease", "delete claim", "garble claim", "take claim", "reserve"
    ]

    def begin(self, world: World) -> None:
        for host in world.chosen(self.host):
            self._meddle(world, host.number)

    def _meddle(self, world: World, number: int) -> None:
        host, etcd = world.hosts[number - 1], world.etcd
        if not host.held:
            return
        lease = world.lease_key(host.held)
        claim = f"{world.prefix}/wincey/hosts/{format_address(host.address)}"
        match self.what:
            case "delete lease":
                etcd.delete(lease)
            case "garble lease":
                etcd.put(lease, GARBAGE[number % len(GARBAGE)])
            case "change lease":
                etcd.put(lease, LeaseAttrs(public_ip=host.address, backend_type="host-gw").encode())
            case "reserve":
                if value := etcd.get(lease):
                    etcd.put(lease, value)
            case "delete claim":
                etcd.delete(claim)
            case "garble claim":
                etcd.put(claim, b"garbage")
            case "take claim":
                etcd.put(claim, Claimant("stranger", "0" * 32).encode())


# What other programs do to the kernel


class Flush(Fault, frozen=True):
    """Another program removes objects of ours of some kind. seen: the kernel's notices of it reach the agent."""

    harms = True
    host: int
    kind: Kind = "routes"
    seen: bool = True

    def begin(self, world: World) -> None:
        kinds = {"routes": Route, "neighbors": Neighbor, "fdb": FdbEntry, "devices": Link, "all": object}
        for host in world.chosen(self.host):
            for key, item in list(host.kernel.objects.items()):
                if isinstance(item, kinds[self.kind]):
                    host.kernel.tamper(key, notice=self.seen)


AnyFault: TypeAlias = (
    Partition
    | SlowAnswers
    | LostMessages
    | DisorderedEvents
    | CompactWhileCut
    | CompactAfterRead
    | StaleMember
    | LaggingMember
    | StoreDown
    | DataLoss
    | Restore
    | Crash
    | CrashWhileStarting
    | Reboot
    | Joins
    | Leaves
    | Stopped
    | Suspended
    | ClockJump
    | Clone
    | Rename
    | AddressChange
    | ConfigChange
    | BadConfig
    | BadKey
    | Meddling
    | Flush
)
"""Every kind that there is, told apart by its name."""
