"""A simulated machine: its address, identity, files, clock and kernel, and one run of the real agent after the other on it.

What is real: `agent.network.Network` with all that it is made of (config, allocation, renewal, claims, planner, peers,
reconciler, state file, subnet.env), etcd's client, and the choice of the interface. What is not: the kernel, the connection to
the store, time and chance. A supervisor starts an agent that ended again, as systemd does.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import random
import shutil
import ssl
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import msgspec

from simulator.etcd import Etcd
from simulator.forwarding import Station
from simulator.kernel import UNDERLAY, Kernel, KernelDriver
from simulator.loop import OWNER, Process, VirtualLoop
from simulator.wire import Link, WireClient
from wincey.agent import hostfacts, memory
from wincey.agent.desired import DesiredState
from wincey.agent.envfile import read_env_file
from wincey.agent.hostfacts import HostLook, Wishes
from wincey.agent.network import Network, Settings
from wincey.agent.planner import Policy
from wincey.agent.reconciler import Reconciler
from wincey.agent.statefile import State
from wincey.kernel.interfaces import Interface, LocalAddress, RouteLookup
from wincey.leasing.claims import Host as Claimant
from wincey.model.address import Address, Subnet
from wincey.model.config import NetworkConfig
from wincey.model.errors import WinceyError
from wincey.model.state import Changes
from wincey.store.etcd3 import Etcd3Store
from wincey.store.registry import Registry

RESTART, RESTART_MOST = 5.0, 100.0
"""Seconds after which the supervisor starts an agent that ended: twice as many each time, up to the latter."""


class Tempo(msgspec.Struct, frozen=True):
    """How often agents look without a cause: seconds between audits, and of silence of a watch before it asks."""

    audit: float = 60.0
    probe: float = 60.0


class Events(msgspec.Struct):
    """Whom a host tells what happens on it."""

    published: Callable[[Host], None]
    applied: Callable[[Host, Changes], None]
    ended: Callable[[Host, BaseException], None]
    crashed: Callable[[Host], None]
    note: Callable[[str, str, str], None]


class Host:
    """One machine. number: from 1. files: its directory, kept over crashes."""

    def __init__(
        self,
        number: int,
        *,
        loop: VirtualLoop,
        etcd: Etcd,
        prefix: str,
        files: Path,
        tempo: Tempo,
        seed: str,
        events: Events,
        address: Address,
    ) -> None:
        self.number, self.hostname, self.address = number, f"h{number}", address
        self.machine_id, self.boots = f"machine{number}", 1
        self.prefix, self.files, self.events = prefix, files, events
        self.rng = random.Random(f"{seed}/{number}")
        self.link = Link(random.Random(f"{seed}/{number}/wire"), f"h{number}")
        self.kernel = Kernel(random.Random(f"{seed}/{number}/kernel"))
        self.up = True  # the machine runs
        self.gone = False  # it was taken away for good
        self.held: Subnet | None = None  # what its containers were told
        self.bereft = False  # a fault took its lease from the store, and it is not back
        self.bereft_at = -1e9  # when that last was
        self.outdated = False  # a restored store says of it what was so before, and it has not put that right yet
        self.renumbered = False  # its address changed while no agent ran
        self.ready: str | None = "not started"
        self.network: Network | None = None
        self.reconciler: Reconciler | None = None
        self.process: Process | None = None
        self.starts = self.steps_before = 0
        self._failures = 0  # in a row
        self.ended_by: BaseException | None = None  # what ended the latest agent, None for a crash
        self.down_until = 0.0  # nobody starts an agent before
        self.wall = 0.0
        self._loop, self._etcd, self._tempo = loop, etcd, tempo

    @property
    def name(self) -> str:
        """What histories call it, whatever it calls itself."""
        return f"h{self.number}"

    @property
    def subnet_file(self) -> Path:
        return self.files / "subnet.env"

    @property
    def running(self) -> bool:
        """An agent lives here, and is not stopped."""
        return self.up and self.process is not None and self.process.alive and not self.process.stopped

    @property
    def station(self) -> Station:
        return Station(self.name, self.address, self.kernel, self.held)

    @property
    def claimant(self) -> Claimant:
        """As agent.identity.this_host makes it."""
        parts = [self.hostname, self.machine_id, f"{self.machine_id}/boot{self.boots}", "4026531840"]
        return Claimant(self.hostname, hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32])

    def start(self) -> None:
        """Start an agent, on whatever is there."""
        if not self.up or self.gone or self.process or self._loop.now < self.down_until:
            return
        self.starts += 1
        self.ready = "starting"
        self.events.note(self.name, "", "the agent starts")
        self.process = Process(f"{self.name}.{self.starts}", self._crashed)
        self.process.wall = self.wall
        self._loop.spawn(self._live(), self.process)

    def crash(self) -> None:
        """The agent dies, now, without a word."""
        if self.process and self.process.alive:
            self.process.crash()

    def look_again(self) -> None:
        """The kernel tells of a changed address."""
        if self.network:
            self.network.host_changed()

    def interfaces(self) -> list[Interface]:
        """What the machine has."""
        addresses = (LocalAddress(self.address, 16),)
        return [
            Interface("lo", 1, 65536, addresses=(LocalAddress(b"\x7f\0\0\x01", 8, scope=254),)),
            Interface(UNDERLAY, 2, 1500, b"\x02\x01\x00\x00\x00\x01", addresses=addresses),
            *(
                Interface(link.name, 10 + place, link.mtu, self.kernel.mac(link), kind=link.kind)
                for place, link in enumerate(self.kernel.links())
            ),
        ]

    def copy_files(self, other: Host) -> None:
        """As a clone of that machine has them."""
        shutil.rmtree(self.files, ignore_errors=True)
        if other.files.exists():
            shutil.copytree(other.files, self.files)

    def _crashed(self) -> None:
        self._let_go()
        self.ended_by = None
        self.events.crashed(self)
        self._loop.call_later(RESTART, self.start, context=self.link.world)

    def _let_go(self) -> None:
        """No agent lives here any more."""
        assert self.process
        self.steps_before += self.process.steps
        self.link.forget()
        self.network = self.reconciler = self.kernel.driver = self.process = None

    def _tell(self, reason: str | None) -> None:
        self.ready = reason
        if reason is None:
            self._failures, self.ended_by = 0, None
            found = read_env_file(str(self.subnet_file)).subnets
            self.held = found[0].masked() if found else None
            self.events.published(self)

    async def _live(self) -> None:
        """What agent.life.live does, with this machine's parts."""
        process = self.process
        assert process
        state = State(str(self.subnet_file), self.rng)
        driver = KernelDriver(self.kernel, lambda changes: self.events.applied(self, changes))
        reconciler = Reconciler(DesiredState(), [driver], audit_every=self._tempo.audit, cpu_time=lambda: 0.0)
        registry = Registry(self._store(), self.prefix)
        network = Network(
            Settings(str(self.subnet_file), 3600.0, Policy(masquerade=True)),
            registry,
            reconciler,
            state=state,
            host=self.claimant,
            look=HostLook(Wishes(), state.macs),
            choose_rules=_choose_rules,
            on_ready=self._tell,
            rng=self.rng,
        )
        self.network, self.reconciler = network, reconciler
        tasks = [asyncio.create_task(work) for work in (network.run(), reconciler.run())]
        ending: BaseException | None = None
        try:
            await asyncio.gather(*tasks)
        except WinceyError as error:
            ending = error
        except Exception as error:  # whatever else it is, an agent may never end by it
            ending = error
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await reconciler.close()
            await registry.close()
        process.alive = False
        self._let_go()
        self.ended_by = ending or RuntimeError("it ended by itself")
        self.events.ended(self, self.ended_by)
        self._failures += 1
        pause = min(RESTART_MOST, RESTART * 2 ** min(self._failures - 1, 10))
        self._loop.call_later(pause, self.start, context=self.link.world)

    def _store(self) -> Etcd3Store:
        members = {f"http://127.0.0.1:{2379 + place}": member for place, member in enumerate(self._etcd.members)}

        def make(url: str, tls: ssl.SSLContext | None, *, connect_timeout: float) -> WireClient:
            return self.link.client(members[url])

        urls = list(members)
        self.link.rng.shuffle(urls)
        return Etcd3Store(urls, probe_interval=self._tempo.probe, random=self.link.rng.random, make=make)


async def _choose_rules(config: NetworkConfig) -> None:
    """Any will do here."""


class Machines:
    """Has HostLook read the interfaces of whichever machine asks, while it is entered; and memory is the real machine's."""

    def __init__(self) -> None:
        self.hosts: dict[str, Host] = {}
        self._patches = contextlib.ExitStack()

    def __enter__(self) -> Machines:
        for target, name, new in (
            (hostfacts, "read_interfaces", self._interfaces),
            (hostfacts, "default_route_interface", lambda family: 2),
            (hostfacts, "route_to", lambda address: RouteLookup(2, None, None)),
            (hostfacts, "kernel_release", lambda: (6, 1)),
            (memory, "give_back", lambda: None),
        ):
            self._patches.enter_context(mock.patch.object(target, name, new))
        return self

    def __exit__(self, *details: object) -> None:
        self._patches.close()

    def _interfaces(self) -> list[Interface]:
        owner = OWNER.get()
        assert owner
        return self.hosts[owner.name.partition(".")[0]].interfaces()
