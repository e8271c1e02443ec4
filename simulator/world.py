"""One run of a scenario: a store, hosts, faults at their times, and the invariants asked at every step.

After each fault the world waits for a bounded time and then asks for everything: who is up is ready, has its lease, reaches
everybody else and has nothing astray in its kernel. What must never be, not even for a moment, is asked whenever a host tells
its containers a subnet, changes its kernel, or the store loses a lease. `_excused` and its kind say which fault excuses what.
"""

from __future__ import annotations

import gc
import json
import logging
import random
import shutil
import tempfile
from itertools import pairwise, permutations
from pathlib import Path
from typing import Any

import msgspec

from simulator import invariants
from simulator.etcd import Etcd, Member, Picture, Version
from simulator.faults import Clone, ConfigChange, Fault, StaleMember
from simulator.forwarding import Station, obstacle
from simulator.history import Recorder
from simulator.host import RESTART, Events, Host, Machines, Tempo
from simulator.invariants import Violation, Work
from simulator.kernel import Kernel
from simulator.loop import Endless, VirtualLoop, running
from simulator.scenario import Scenario, Timed
from wincey.leasing.allocate import Pool
from wincey.model.address import Address, Subnet
from wincey.model.config import NetworkConfig
from wincey.model.errors import BadConfig, BadLease, OutOfSubnets, WinceyError
from wincey.model.lease import LeaseAttrs, LeaseKey
from wincey.model.state import Changes

PREFIX = "/coreos.com/network"
STARTS = 30.0
"""Seconds in which the hosts of a scenario are to be there before its first fault counts as over."""

KEEPS_LEASE = 10 * 3600.0
"""Seconds for which a host that can't reach the store keeps its lease at least: it renews at half of a day or before."""

MOST_VIOLATIONS = 20
EVERY_PAIR = 40
"""Hosts up to which every pair is looked at."""

INTERRUPTION = 2.0
"""Seconds for which packets between two hosts may be lost without a fault that takes them: for a change of backend, where each
host hears of the others' changes after a moment of its own. Where that moment is made long by another fault, it is excused."""


class Result(msgspec.Struct):
    """What came of a run. digest: of its history, where one was kept."""

    scenario: Scenario
    violations: list[Violation]
    steps: int
    requests: int
    virtual: float
    hosts: int
    changes: int


class World:
    """The run. record: keep a history, which costs time."""

    def __init__(self, scenario: Scenario, *, record: bool = False) -> None:
        self.scenario, self.prefix = scenario, PREFIX
        self.config_key = f"{PREFIX}/config"
        self.loop = VirtualLoop()  # type: ignore[abstract]  # files, sockets and processes are not simulated
        self.recorder = Recorder(self.loop) if record else None
        self.violations: list[Violation] = []
        self.hosts: list[Host] = []
        self.compact_after: dict[str, int] = {}
        self._rng = random.Random(f"{scenario.seed}/world")
        self._config: dict[str, Any] = self._first_config()
        self._config_before: dict[str, Any] = self._config
        self._backups: list[tuple[float, Picture]] = []
        self._clones: dict[Clone, list[Host]] = {}
        self._copies: list[tuple[Host, Host]] = []  # each with its original
        self._originals: dict[str, Host] = {}  # by the names of copies with their address
        self._disturbed_until = STARTS
        self._harmed: set[int] = set()  # hosts, 0 for all, of which a fault may take packets until all is well again
        self._well_at = 0.0  # when all was last found to be well
        self._connected: dict[tuple[str, str], None] = {}
        self._broken: dict[tuple[str, str], tuple[float, str]] = {}
        self._holds: dict[str, Subnet] = {}
        self._holders: dict[bytes, Host] = {}
        self._foreign = Kernel(self._rng).foreign
        self._hours: dict[str, Work] = {}
        self._config_at = (
            self._trouble_until
        ) = -1e9  # the latest change of the config, the end of the latest other fault
        self._fault_count = 0
        self._over = False
        self._scribbled = 0

    # For faults

    @property
    def bound(self) -> float:
        """Seconds after the last fault within which all has to be well."""
        return 130.0 + 1.1 * self.scenario.audit + 1.4 * self.scenario.probe

    def chosen(self, number: int) -> list[Host]:
        """The host of a number, all for 0; those that are gone are not there."""
        return [host for host in list(self.hosts) if number in {0, host.number} and not host.gone]

    def member(self, number: int) -> Member | None:
        """A member by its number, from 1."""
        return self.etcd.members[number - 1] if number <= len(self.etcd.members) else None

    def members(self, number: int) -> list[Member]:
        """One, or all for 0."""
        member = self.member(number) if number else None
        return [member] if member else [] if number else list(self.etcd.members)

    def lease_key(self, subnet: Subnet) -> str:
        """Its store key."""
        return f"{PREFIX}/subnets/{LeaseKey(subnet)}"

    def scribble(self) -> None:
        """Somebody else changes a key of no concern."""
        self._scribbled += 1
        self.etcd.put(f"{PREFIX}/scribble", b"%d" % self._scribbled)

    def put_config(self) -> None:
        """The administrator writes the config as it should be."""
        self.etcd.put(self.config_key, json.dumps(self._config).encode())

    def change_config(self, keys: dict[str, Any]) -> None:
        """The administrator changes some keys; those that no longer fit the network go."""
        self._config_before = self._config
        config = {**self._config, **keys}
        if "Network" in keys or "SubnetLen" in keys:
            for key in ("SubnetMin", "SubnetMax"):
                config.pop(key, None)
        if config["Network"] != "10.3.0.0/16":
            config.pop("SubnetMin", None)
        self._config = config
        self.put_config()

    def change_config_back(self) -> None:
        """Undo the last change."""
        self._config = self._config_before
        self.put_config()

    def restore(self, age: float | None) -> None:
        """The store has what it had `age` seconds ago (the first backup if there is none as old), or (None) nothing.

        Whose lease is gone is excused until it is back; who is reached by what it was before, until it has said what it is.
        """
        held = [(host, self.lease_key(host.held)) for host in self.hosts if host.held]
        former = {key: self.etcd.get(key) for _, key in held}
        if age is None:
            self.etcd.wipe()
        else:
            old = [picture for at, picture in self._backups if at <= self.loop.now - age]
            self.etcd.restore(old[-1] if old else self._backups[0][1])
        for host, key in held:
            if not self._owns(host, self.etcd.get(key)):
                host.bereft, host.bereft_at = True, self.loop.now
            host.outdated = self.etcd.get(key) != former[key]

    def add_host(self, address: Address | None = None) -> Host:
        """Another machine."""
        number = len(self.hosts) + 1
        host = Host(
            number,
            loop=self.loop,
            etcd=self.etcd,
            prefix=PREFIX,
            files=self._directory / f"h{number}",
            tempo=Tempo(self.scenario.audit, self.scenario.probe),
            seed=str(self.scenario.seed),
            events=Events(self._published, self._applied, self._ended, self._crashed, self.note),
            address=address or self._address(number),
        )
        if self.recorder:
            host.link.told = self.recorder.wire(host.name)
        self.hosts.append(host)
        self._machines.hosts[host.name] = host
        return host

    def power_off(self, host: Host, *, forgets: bool) -> None:
        """The machine stops, and its kernel's state is gone; forgets: its files too."""
        host.crash()
        host.up = False
        host.kernel.reboot()
        host.boots += 1
        if forgets:
            shutil.rmtree(host.files, ignore_errors=True)
            self._lets_go(host)
        self._look_at(host)

    def power_on(self, host: Host) -> None:
        """It starts again."""
        if not host.gone:
            host.up = True
            host.start()

    def clone(self, original: Host, fault: Clone) -> None:
        """A copy of a machine starts."""
        copy = self.add_host(None if fault.own_address else original.address)
        copy.copy_files(original)
        copy.hostname, copy.machine_id = original.hostname, original.machine_id
        copy.boots = original.boots if fault.same_boot else original.boots + 1000
        if not fault.own_address:
            self._clones.setdefault(fault, []).append(copy)
            self._copies.append((copy, original))
            if not fault.same_boot:
                self._originals[copy.name] = original
        copy.start()

    def remove_clones(self, fault: Clone) -> None:
        """Copies with another's address are taken away."""
        for copy in self._clones.pop(fault, []):
            self.power_off(copy, forgets=True)
            copy.gone = True

    def renumber(self, host: Host, *, restart: bool) -> None:
        """A host gets another address."""
        if restart:
            host.crash()
        if host.process is None or host.ready is not None or self._read_config() is None:
            host.renumbered = True  # or it can't say so: without a config nobody publishes anything
        host.address = self._address(host.number + 100 * (1 + host.address[2] % 2))
        host.start()
        host.look_again()

    # The run

    def run(self) -> Result:
        """Live it."""
        collects = gc.isenabled()
        gc.disable()  # when memory is collected must not matter
        level = logging.root.manager.disable
        logging.disable(logging.NOTSET if self.recorder else logging.CRITICAL)
        self._directory = Path(tempfile.mkdtemp(prefix="wincey-sim", dir="/dev/shm"))  # memory, for speed
        try:
            with running(self.loop), Machines() as self._machines:
                if self.recorder:
                    self.recorder.directory = str(self._directory)
                    with self.recorder:
                        self._run()
                else:
                    self._run()
                return Result(
                    self.scenario,
                    self.violations,
                    self.loop.steps,
                    sum(host.link.requests for host in self.hosts),
                    self.loop.now,
                    len(self.hosts),
                    sum(host.kernel.changes for host in self.hosts),
                )
        finally:
            shutil.rmtree(self._directory, ignore_errors=True)
            logging.disable(level)
            if collects:
                gc.enable()

    def _run(self) -> None:
        scenario, loop = self.scenario, self.loop
        self.etcd = Etcd(loop, scenario.members)
        self.etcd.on_change, self.etcd.on_expiry, self.etcd.on_read = self._changed, self._expired, self._was_read
        self.put_config()
        self._back_up()
        for _ in range(scenario.hosts):
            self.add_host()
        for host in list(self.hosts):
            loop.call_later(self._rng.uniform(0, scenario.spread), host.start)
        for timed in scenario.faults:
            loop.call_at(timed.at, self._begin, timed)
        loop.call_later(3600.0, self._hour)
        loop.call_at(self._disturbed_until + self.bound, self._settled)
        end = max([STARTS, *(timed.at + timed.fault.lasts for timed in scenario.faults)]) + self.bound + scenario.rest
        try:
            loop.run_until(end + 1.0)
            self._all_is_well()
        except Endless as error:
            self._violate("bounded work", str(error))
        self._check_faults()
        self._over = True
        for host in self.hosts:
            host.link.forget()
        loop.bury()

    def note(self, source: str, target: str, text: str) -> None:
        """One line for the history: what `source` did, or did to `target`."""
        if self.recorder:
            self.recorder.add(source, target, text)

    def _first_config(self) -> dict[str, Any]:
        scenario = self.scenario
        last = min(254, scenario.hosts + scenario.spare) if scenario.hosts < 200 else 254
        config: dict[str, Any] = {"Network": "10.3.0.0/16", "Backend": {"Type": scenario.backend}}
        if scenario.hosts < 200:
            return {**config, "SubnetMin": "10.3.1.0", "SubnetMax": f"10.3.{last}.0"}
        return {**config, "Network": "10.0.0.0/8", "SubnetMin": "10.128.0.0", "SubnetMax": "10.255.0.0"}

    def _address(self, number: int) -> Address:
        return (
            bytes((10, 99, number // 250, 1 + number % 250))
            if self.scenario.hosts < 200
            else bytes((172, 16 + number // 62500, number // 250 % 250, 1 + number % 250))
        )

    def _begin(self, timed: Timed) -> None:
        fault: Fault = timed.fault
        self.note("", "", f"FAULT {fault}")
        self._fault_count += 1
        self._back_up()
        self._disturb(fault)
        fault.begin(self)
        if fault.lasts:
            self.loop.call_later(fault.lasts, self._finish, fault)
        else:
            self.loop.call_later(self.bound, self._settled)

    def _finish(self, fault: Fault) -> None:
        self.note("", "", f"over: {fault}")
        fault.end(self)
        self._disturb(fault)
        self.loop.call_later(self.bound, self._settled)

    def _disturb(self, fault: Fault) -> None:
        now = self.loop.now
        found_out = isinstance(fault, StaleMember) and len(self.etcd.members) > 1
        # A stale member is found out by its clients: all has to be well while it still is one.
        self._disturbed_until = max(self._disturbed_until, now + (0 if found_out else fault.lasts))
        if found_out:
            self.loop.call_later(self.bound, self._settled)
        if isinstance(fault, ConfigChange):
            self._config_at = now
        elif not isinstance(fault, Clone):
            self._trouble_until = max(self._trouble_until, now + fault.lasts)
        if fault.harms:
            self._harmed.add(fault.victim)

    def _back_up(self) -> None:
        if not self._backups or self.loop.now > self._backups[-1][0]:
            self._backups.append((self.loop.now, self.etcd.picture()))

    # Asked at every step

    def _published(self, host: Host) -> None:
        """A host has told its containers a subnet."""
        before, now = self._holds.get(host.name), host.held
        if now == before or now is None or self._over:
            return
        self.note(host.name, "", f"containers get {now}")
        original = self._originals.get(host.name)
        if original and original.ready is None and original.running and self.loop.now > self._trouble_until + STARTS:
            self._violate("an address is one host's", f"{host.name} joined with that of {original.name}, which lives")
        config = self._read_config()
        # With one in its place that nobody can follow, or that it hears of late, the one before may be followed still.
        recent = self.loop.now - self.bound
        unsure = self._config_at > recent and (config is None or self._trouble_until > recent)
        if not (host.bereft or host.renumbered or unsure or self._is_double(host)):
            for text in invariants.moved(host.name, before, now, config):
                self._violate("a host keeps its subnet", text)
        self._lets_go(host)
        host.renumbered = host.bereft = False
        self._holds[host.name] = now
        self._holders[self.lease_key(now).encode()] = host
        if not self._excused(host):
            others = [(name, subnet) for name, subnet in self._holds.items() if not self._excused(self._named(name))]
            for text in invariants.overlapping(host.name, now, others):
                self._violate("no overlap", text)
        self._look_at(host)

    def _lets_go(self, host: Host) -> None:
        """Its containers are told of no subnet any more."""
        subnet = self._holds.pop(host.name, None)
        if subnet and self._holders.get(self.lease_key(subnet).encode()) is host:
            del self._holders[self.lease_key(subnet).encode()]

    def _excused(self, host: Host) -> bool:
        """Whether what it holds is not its own fault: the store lost it, or somebody has its identity."""
        return not host.up or host.gone or host.bereft or self._is_double(host)

    def _is_double(self, host: Host) -> bool:
        """Whether a machine with its address and perhaps its identity is up besides, or was till a moment ago."""
        return any(host is copy or host is original for copy, original in self._copies if copy.up)

    def _changed(self, version: Version) -> None:
        """A key of the store has changed."""
        host = self._holders.get(version.key)
        actor = self.etcd.actor
        if self.recorder:
            self.recorder.changed(actor, version)
        if host is None or host.gone:
            return
        if version.value is not None and self._owns(host, version.value):
            host.bereft = host.outdated = False
        elif actor == "":
            host.bereft, host.bereft_at = True, self.loop.now
        elif host.up and not host.bereft and not self._is_double(host) and not host.renumbered:
            config, did = self._read_config(), "deleted" if version.value is None else "overwrote"
            excluded = config is None or not config.allows(LeaseKey.parse(version.key.decode().rpartition("/")[2]))
            if not excluded and self._config_at < self.loop.now - self.bound:  # it may follow the one before still
                self._violate("a lease is kept", f"{actor} {did} the lease of {host.name}, {version.key.decode()}")

    def _expired(self, keys: list[bytes]) -> None:
        """A lease of the store has run out."""
        for key in keys:
            host = self._holders.get(key)
            since = self.loop.now - host.link.reached_at if host else 0.0
            if host and host.running and not host.bereft and since < KEEPS_LEASE:
                text = f"that of {host.name} ran out, although it reached the store {since:.0f} s ago"
                self._violate("a lease is kept", text)

    def _was_read(self, actor: str, key: bytes) -> None:
        """A host has read; key: from where on."""
        left = self.compact_after.get(actor, 0)
        if left and key == f"{PREFIX}/".encode():
            self.compact_after[actor] = left - 1
            self.loop.call_soon(self._forget_all)

    def _forget_all(self) -> None:
        self.scribble()
        self.etcd.compact()
        self.scribble()

    def _applied(self, host: Host, changes: Changes) -> None:
        """A host's kernel was changed."""
        if self._over:
            return
        if self.recorder:
            for item in changes.delete:
                self.recorder.add(host.name, "", f"removes {item}")
            for item in changes.put:
                self.recorder.add(host.name, "", f"puts {item}")
        for text in invariants.tampered(host.name, host.kernel.foreign, self._foreign):
            self._violate("nothing foreign is touched", text)
            host.kernel.foreign = dict(self._foreign)
        self._look_at(host)

    def _ended(self, host: Host, error: BaseException) -> None:
        """An agent has ended by itself."""
        if self._over:
            return
        self.note(host.name, "", f"the agent ends: {error}")
        if not isinstance(error, WinceyError):
            self._violate("agents end by errors of theirs alone", f"{host.name}: {type(error).__name__}: {error}")

    def _crashed(self, host: Host) -> None:
        """An agent died: at a step that a fault chose, which may be long after that fault."""
        self.note(host.name, "", "the agent dies")
        if host.held and not self._owns(host, self.etcd.get(self.lease_key(host.held))):
            host.renumbered = True  # its lease has not been told of its address, or is lost
        self._disturbed_until = max(self._disturbed_until, self.loop.now + RESTART)
        self.loop.call_later(RESTART + self.bound, self._settled, context=host.link.world)

    # Packets that flowed go on flowing

    def _look_at(self, host: Host) -> None:
        if self._over or len(self.hosts) > EVERY_PAIR:
            return
        stations, underlay = self._stations()
        here = stations.get(host.name)
        for name, there in stations.items():
            if name != host.name and here:
                self._follow_pair((host.name, name), here, there, underlay)
                self._follow_pair((name, host.name), there, here, underlay)

    def _follow_pair(
        self, pair: tuple[str, str], sender: Station, receiver: Station, underlay: dict[Address, Station]
    ) -> None:
        why = obstacle(sender, receiver, underlay)
        if not why:
            self._connected[pair] = None
            self._broken.pop(pair, None)
        elif pair not in self._connected:
            return
        elif pair not in self._broken:
            self._broken[pair] = (self.loop.now, why)
            self.note(sender.name, receiver.name, f"packets are lost: {why}")
            self.loop.call_later(INTERRUPTION, self._still_broken, pair, self.loop.now, context=self.etcd.context)

    def _still_broken(self, pair: tuple[str, str], since: float) -> None:
        found = self._broken.get(pair)
        if not found or found[0] != since or self._over:
            return
        one, other = self._named(pair[0]), self._named(pair[1])
        harmed = not self._harmed.isdisjoint((0, one.number, other.number))
        before = min(since - self.bound, self._well_at)
        # Who is late to hear that another host has changed its way sends to where nobody listens any more.
        late = self._config_at > before and self._trouble_until > before
        # Who hears that a lease is gone, and not that it is back.
        late |= self._trouble_until > before and max(one.bereft_at, other.bereft_at) > before
        late |= other.outdated
        if not harmed and not late and not self._excused(one) and not self._excused(other):
            text = f"{pair[0]} to {pair[1]} for {INTERRUPTION} s, since {since:.3f} s: {found[1]}"
            self._violate("packets go on flowing", text)
        self._connected.pop(pair, None)

    # Asked when all has to be well

    def _settled(self) -> None:
        if not self._over and self.loop.now >= self._disturbed_until + self.bound - 0.001:
            self._all_is_well()

    def _all_is_well(self) -> None:
        self.note("", "", "all has to be well now")
        self._harmed.clear()
        self._well_at = self.loop.now
        live = [host for host in self.hosts if host.up and not host.gone and not self._is_double(host)]
        joined, keys = [], {key.decode("utf-8", "backslashreplace") for key in self.etcd.keys}
        for host in live:
            if not host.running or host.ready is not None:
                full = isinstance(host.ended_by, OutOfSubnets) or str(host.ready).startswith("out of subnets")
                if not (full and self._exhausted()):
                    self._violate("every host joins", f"{host.name}: {host.ready}; {host.ended_by}")
                continue
            joined.append(host)
            key = self.lease_key(host.held) if host.held else ""
            for text in invariants.unpublished(host.name, host.address, host.held, self.etcd.get(key)):
                self._violate("a lease is kept", text)
            assert host.reconciler
            for text in invariants.astray(host.name, host.kernel.objects, host.reconciler.desired.objects):
                self._violate("the kernel is as wanted", text)
            for text in invariants.leftover(host.name, host.reconciler.desired.owners, keys):
                self._violate("the kernel is as wanted", text)
            for text in invariants.tampered(host.name, host.kernel.foreign, self._foreign):
                self._violate("nothing foreign is touched", text)
        held = sorted(((host.name, host.held) for host in joined if host.held), key=lambda pair: pair[1])
        for (name, subnet), following in pairwise(held):
            for text in invariants.overlapping(name, subnet, [following]):
                self._violate("no overlap", text)
        stations, underlay = self._stations()
        names = [host.name for host in joined]
        pairs = list(permutations(names, 2)) if len(names) <= EVERY_PAIR else self._some_pairs(names)
        for text in invariants.unreachable(((stations[a], stations[b]) for a, b in pairs), underlay):
            self._violate("every pair reaches each other", text)

    def _some_pairs(self, names: list[str]) -> list[tuple[str, str]]:
        """Of many hosts, some thousand pairs."""
        found = (tuple(self._rng.sample(names, 2)) for _ in range(3000))
        return [(one, other) for one, other in found]

    def _stations(self) -> tuple[dict[str, Station], dict[Address, Station]]:
        stations = {host.name: host.station for host in self.hosts if host.up and not host.gone}
        underlay: dict[Address, Station] = {}
        for station in stations.values():
            underlay.setdefault(station.address, station)  # the original before its copies
        return stations, underlay

    def _exhausted(self) -> bool:
        """Whether the pool has no subnet left."""
        config = self._read_config()
        if config is None:
            return False
        taken: list[Subnet] = []
        for key in self.etcd.keys:
            try:
                taken += LeaseKey.parse(key.decode("utf-8", "replace").rpartition("/")[2]).subnets
            except BadLease:
                continue
        pool = Pool.of_v4(config)
        full: bool = sum(high - low + 1 for low, high in pool.taken(taken)) >= pool.count
        return full

    def _hour(self) -> None:
        """Work is bounded: so much in an hour, and more with each fault."""
        faults, self._fault_count = self._fault_count, 0
        size = len(self.hosts)
        most = Work(
            requests=200 + round(3600 * 2 / self.scenario.probe) + faults * 800,
            changes=(50 + faults * 60) * (size + 2),
            steps=(30_000 + faults * 20_000) * (1 + size // 20),
        )
        for host in self.hosts:
            process_steps = host.process.steps if host.process else 0
            now = Work(host.link.requests, host.kernel.changes, process_steps + host.steps_before)
            before, self._hours[host.name] = self._hours.get(host.name, Work()), now
            if host.ended_by:  # the supervisor starts it again and again
                continue
            for text in invariants.overworked(host.name, now.since(before), most):
                self._violate("bounded work", f"{text}, in an hour with {faults} faults")
        self.loop.call_later(3600.0, self._hour)

    def _check_faults(self) -> None:
        for context in self.loop.faults:
            self._violate(
                "agents end by errors of theirs alone", f"{context.get('message')}: {context.get('exception')!r}"
            )

    def _violate(self, invariant: str, text: str) -> None:
        violation = Violation(invariant, round(self.loop.now, 3), text)
        self.note("", "", f"VIOLATION {violation}")
        if len(self.violations) < MOST_VIOLATIONS:
            self.violations.append(violation)

    def _named(self, name: str) -> Host:
        return self._machines.hosts[name]

    def _read_config(self) -> NetworkConfig | None:
        """The config in the store, None where nobody could follow it."""
        try:
            return NetworkConfig.parse(self.etcd.get(self.config_key) or b"")
        except BadConfig:
            return None

    @staticmethod
    def _owns(host: Host, value: bytes | None) -> bool:
        try:
            return value is not None and LeaseAttrs.decode(value).public_ip == host.address
        except BadLease:
            return False
