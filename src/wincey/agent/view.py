"""What can be seen of the daemon: its networks as reports (model.report). Reads, and changes nothing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from statistics import fmean, median
from typing import Protocol

import msgspec

from wincey import __version__
from wincey.agent.explain import Host, Seen, Way, explain, outer_address
from wincey.agent.network import Network
from wincey.agent.peers import LOCAL
from wincey.agent.probing import Prober
from wincey.agent.reconciler import Reconciler
from wincey.kernel.containers import spoken_with
from wincey.kernel.interfaces import read_interfaces, route_to
from wincey.kernel.peercounters import Counted
from wincey.kernel.statistics import device_traffic
from wincey.model.address import Address, Subnet, format_address, format_mac, parse_address
from wincey.model.config import NetworkConfig
from wincey.model.errors import BadAddress, BadLease, StoreError
from wincey.model.lease import Lease, LeaseKey
from wincey.model.probe import Probed, Target, Window
from wincey.model.report import (
    BadKeyReport,
    ContainerReport,
    ContainersReport,
    DifferenceReport,
    EngineReport,
    ExplainReport,
    FailureReport,
    FastPathReport,
    InterfaceReport,
    LeaseReport,
    NetworkReport,
    PeerReport,
    PeersReport,
    PeerTrafficReport,
    ProbeReport,
    ProbesReport,
    ReconcileReport,
    RequestsReport,
    StatusReport,
    StepReport,
    StoreReport,
    TrafficReport,
    WayReport,
)
from wincey.model.state import Link
from wincey.observe.localapi import BadQuestion, UnknownNetwork
from wincey.store.measured import BUCKETS, Requests

PATIENCE = 3.0
"""Seconds to wait for a store that is only asked to show more."""


class View(Protocol):
    """One network, as far as it can be seen."""

    def report(self) -> NetworkReport: ...

    async def peers(self) -> PeersReport: ...

    def containers(self) -> ContainersReport: ...

    async def difference(self) -> DifferenceReport: ...

    async def explain(self, address: Address) -> ExplainReport: ...


class WaitingView:
    """A network whose store could not be opened yet, or whose config nobody has put."""

    def __init__(self, name: str, subnet_file: str, store: str) -> None:
        self.reason: str | None = "starting"
        self._name, self._subnet_file, self._store = name, subnet_file, store

    def report(self) -> NetworkReport:
        """Little more than the reason."""
        return NetworkReport(
            name=self._name,
            trouble=self.reason,
            config_key="",
            networks=[],
            backend="",
            mtu=0,
            interface=None,
            devices=[],
            traffic=[],
            lease=None,
            store=StoreReport(name=self._store, trouble=self.reason, requests=[]),
            subnet_file=self._subnet_file,
            peers=0,
            peer_traffic=[],
            probe=None,
            bad_keys=[],
            reconcile=ReconcileReport(
                objects=0, ago=None, took=0.0, audits=0, cpu=0.0, changes=0, repaired=0, failures=[]
            ),
        )

    async def peers(self) -> PeersReport:
        """None are known."""
        return PeersReport(network=self._name, peers=[], note=self.reason or "")

    def containers(self) -> ContainersReport:
        """None are known."""
        return ContainersReport(network=self._name, containers=[])

    async def difference(self) -> DifferenceReport:
        """Nothing is wanted."""
        return DifferenceReport(network=self._name, wanted=0, missing=[], changed=[], surplus=[])

    async def explain(self, address: Address) -> ExplainReport:
        """There is no way yet."""
        why = StepReport(what="ready", text=self.reason or "", ok=False)
        return ExplainReport(
            network=self._name, address=format_address(address), reaches=False, breaks_at=why.text, steps=[why]
        )


class NetworkView:
    """A network that has been opened. reason: why it is not ready; see Network's on_ready. requests: to its store, by operation.

    engine: what carries its packets. fast_path: of its containers.
    """

    def __init__(
        self,
        name: str,
        store: str,
        network: Network,
        reconciler: Reconciler,
        *,
        requests: Mapping[str, Requests],
        prober: Prober | None,
        engine: Callable[[NetworkConfig], EngineReport | None],
        fast_path: Callable[[], FastPathReport | None],
    ) -> None:
        self.reason: str | None = "starting"
        self._name, self._store, self._requests, self._prober = name, store, requests, prober
        self._network, self._reconciler = network, reconciler
        self._engine, self._fast_path = engine, fast_path
        self.busiest: Callable[[], Sequence[tuple[Subnet, Counted]]] = tuple
        """The peers whose traffic is told (--metrics-peers), and what was counted."""

    def report(self) -> NetworkReport:
        """All of it at a glance."""
        network, prepared, lease = self._network, self._network.prepared, self._network.lease
        desired = self._reconciler.desired
        facts = prepared.facts if prepared else None
        devices = sorted(item.makes for item in desired.objects.values() if isinstance(item, Link))
        engine = self._engine(prepared.config) if prepared else None
        programs = engine.counters.get("kernel", {}) if engine else {}
        return NetworkReport(
            name=self._name,
            trouble=self.reason,
            config_key=network.registry.config_key,
            networks=[str(each) for each in prepared.config.networks] if prepared else [],
            backend=prepared.config.backend_type if prepared else "",
            mtu=prepared.backend.mtu if prepared else 0,
            interface=InterfaceReport(
                name=facts.underlay,
                mtu=facts.mtu,
                addresses=_texts(facts.local, facts.local_v6),
                public=_texts(facts.public, facts.public_v6),
            )
            if facts
            else None,
            devices=devices,
            traffic=_traffic(devices, facts.tun if facts else "", programs),
            lease=LeaseReport(
                subnets=[str(each) for each in lease.key.subnets],
                reservation=lease.permanent,
                left=network.lease_left(),
            )
            if lease
            else None,
            store=StoreReport(name=self._store, trouble=network.outage, requests=_requests(self._requests)),
            subnet_file=network.subnet_file,
            peers=sum(owner != LOCAL for owner in desired.owners),
            peer_traffic=[
                PeerTrafficReport(subnet=str(subnet), **msgspec.structs.asdict(counted))
                for subnet, counted in self.busiest()
            ],
            probe=self._probes(),
            bad_keys=[BadKeyReport(key=bad.key, reason=bad.reason) for bad in network.bad.values()],
            reconcile=self._reconcile(),
            engine=engine,
            fast_path=self._fast_path(),
        )

    def _reconcile(self) -> ReconcileReport:
        reconciler = self._reconciler
        return ReconcileReport(
            objects=len(reconciler.desired.objects),
            ago=None if reconciler.audited is None else time.monotonic() - reconciler.audited,
            took=reconciler.audit_cost,
            audits=reconciler.audits,
            cpu=reconciler.audits_cost,
            changes=reconciler.changed,
            repaired=reconciler.repaired,
            failures=[
                FailureReport(what=str(failure.object), reason=failure.reason)
                for failure in reconciler.failures.values()
            ],
        )

    async def peers(self) -> PeersReport:
        """The peers, with what only the store knows where it answers."""
        leases, trouble = await self._leases()
        note = f"addresses and backends are not shown, as the store does not answer: {trouble}" if trouble else ""
        own = self._network.lease
        own_key = self._network.registry.lease_key(own.key) if own else None
        keys = {*leases, *self._network.bad, *self._reconciler.desired.owners} - {LOCAL, own_key}
        peers = [self._peer(key, leases.get(key)) for key in sorted(keys, key=_order)]
        return PeersReport(network=self._name, peers=peers, note=note)

    async def _leases(self) -> tuple[dict[str, Lease], str]:
        """All leases by their key in the store, or none and why."""
        try:
            async with asyncio.timeout(PATIENCE):
                return (await self._network.registry.snapshot()).leases, ""
        except (StoreError, TimeoutError) as error:
            return {}, str(error) or "too slow"

    async def explain(self, address: Address) -> ExplainReport:
        """The way of a packet to an address."""
        prepared, own = self._network.prepared, self._network.lease
        if prepared is None or own is None:
            waiting = WaitingView(self._name, self._network.subnet_file, self._store)
            waiting.reason = self.reason
            return await waiting.explain(address)
        leases, _ = await self._leases()
        leases.pop(self._network.registry.lease_key(own.key), None)
        desired = self._reconciler.desired
        wanted = {owner: desired.of(owner) for owner in desired.owners}
        host = Host(self._name, prepared, own.key, leases, wanted)
        _, actual = await self._reconciler.difference()
        outer = outer_address(host, address)
        return explain(host, address, Seen(actual, way_to(address), way_to(outer) if outer else None))

    def _troubles(self, key: str) -> list[str]:
        """What asking a peer has shown to be wrong."""
        probed, target = self._probed(key)
        wraps = next((item.wraps for item in self._reconciler.desired.of(LOCAL) if item.wraps), "")
        return probed.troubles(target, wraps) if probed and target else []

    def _probed(self, key: str) -> tuple[Probed | None, Target | None]:
        prober = self._prober
        return (prober.results.get(key), prober.targets.get(key)) if prober else (None, None)

    def _probe(self, key: str) -> ProbeReport | None:
        probed, target = self._probed(key)
        if probed is None or target is None:
            return None
        return ProbeReport(
            ago=time.monotonic() - probed.asked_at,
            inner=_way(probed.inner) if target.inner else None,
            outer=_way(probed.outer),
            mtu=probed.mtu,
            promised=target.mtu if target.inner else target.outer_mtu,
        )

    def _probes(self) -> ProbesReport | None:
        if self._prober is None:
            return None
        known = [
            (window, key)
            for key, probed in self._prober.results.items()
            if (target := self._prober.targets.get(key))
            and (window := probed.inner if target.inner else probed.outer).asked
        ]
        times = [window.rtt for window, _ in known if window.rtt is not None]
        return ProbesReport(
            asked=len(known),
            well=sum(not self._troubles(key) for _, key in known),
            loss=fmean(window.loss for window, _ in known) if known else 0.0,
            rtt=median(times) if times else None,
        )

    def _peer(self, key: str, lease: Lease | None) -> PeerReport:
        objects = self._reconciler.desired.of(key)
        troubles = [
            f"{item}: {failure.reason}" for item in objects if (failure := self._reconciler.failures.get(item.key))
        ]
        if bad := self._network.bad.get(key):
            troubles.append(bad.reason)
        if lease and (planner := self._network.planner):
            try:
                planner.peer(lease)
            except BadLease as error:
                troubles.append(str(error))
        troubles += self._troubles(key)
        text = key.rpartition("/")[2]
        try:
            subnets = LeaseKey.parse(text).subnets
        except BadLease:
            subnets = ()
        return PeerReport(
            lease=text,
            subnets=[str(each) for each in subnets],
            public=_texts(lease.attrs.public_ip, lease.attrs.public_ipv6) if lease else [],
            backend=lease.attrs.backend_type if lease else "",
            objects=[str(item) for item in objects],
            troubles=troubles,
            probe=self._probe(key),
        )

    def containers(self) -> ContainersReport:
        """Whom this host spoke with lately in its own subnets."""
        lease = self._network.lease
        found = spoken_with(lease.key.subnets) if lease else []
        return ContainersReport(
            network=self._name,
            containers=[
                ContainerReport(address=format_address(each.address), device=each.device, mac=format_mac(each.mac))
                for each in found
            ],
        )

    async def difference(self) -> DifferenceReport:
        """What is, read now, against what should be."""
        changes, actual = await self._reconciler.difference()
        return DifferenceReport(
            network=self._name,
            wanted=len(self._reconciler.desired.objects),
            missing=[str(item) for item in changes.put if item.key not in actual],
            changed=[f"{item}, instead: {actual[item.key]}" for item in changes.put if item.key in actual],
            surplus=[str(item) for item in changes.delete],
        )


class Views:
    """The networks of this daemon, by name, as they come and go. The source of the local API."""

    def __init__(self, host: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._host, self._clock = host, clock
        self._started = clock()
        self._views: dict[str, View] = {}

    def put(self, name: str, view: View) -> None:
        """A network is there."""
        self._views[name] = view

    def remove(self, name: str) -> None:
        """It is gone."""
        self._views.pop(name, None)

    def status(self) -> StatusReport:
        """See localapi.Source."""
        return StatusReport(
            version=__version__,
            host=self._host,
            pid=os.getpid(),
            up=self._clock() - self._started,
            networks=[view.report() for _, view in sorted(self._views.items())],
        )

    async def peers(self, network: str | None) -> Sequence[PeersReport]:
        """See localapi.Source."""
        return [await view.peers() for view in self._chosen(network)]

    async def containers(self, network: str | None) -> Sequence[ContainersReport]:
        """See localapi.Source."""
        return [view.containers() for view in self._chosen(network)]

    async def difference(self, network: str | None) -> Sequence[DifferenceReport]:
        """See localapi.Source."""
        return [await view.difference() for view in self._chosen(network)]

    async def explain(self, network: str | None, address: str) -> Sequence[ExplainReport]:
        """See localapi.Source."""
        try:
            wanted = parse_address(address)
        except BadAddress as error:
            raise BadQuestion(str(error)) from None
        return [await view.explain(wanted) for view in self._chosen(network)]

    def _chosen(self, network: str | None) -> list[View]:
        if network is None:
            return [view for _, view in sorted(self._views.items())]
        if network not in self._views:
            known = ", ".join(sorted(filter(None, self._views)))
            raise UnknownNetwork(
                f"this host is in no network {network!r}: "
                + (f"there are {known}" if known else "its daemon joins a single one, without a name")
            )
        return [self._views[network]]


def way_to(address: Address) -> Way:
    """What the kernel says of the way to an address."""
    try:
        found = route_to(address)
    except OSError as error:
        return Way(refusal=error.strerror or str(error))
    interface = next((each for each in read_interfaces() if each.index == found.index), None)
    return Way(interface.name if interface else "?", interface.mtu if interface else 0, found.gateway)


def _way(window: Window) -> WayReport:
    return WayReport(asked=window.asked, loss=window.loss, rtt=window.rtt)


def _traffic(devices: Iterable[str], tun: str, programs: Mapping[str, int]) -> list[TrafficReport]:
    """What went through our devices. programs: what these carried past the counters of the device `tun`."""
    reports = []
    for device in devices:
        if found := device_traffic(device):
            counted = msgspec.structs.asdict(found)
            for way, name in (("receive", "in"), ("transmit", "out")) if device == tun else ():
                for unit in ("packets", "bytes"):
                    counted[f"{way}_{unit}"] += programs.get(f"{name}.{unit}", 0)
            reports.append(TrafficReport(device=device, **counted))
    return reports


def _requests(requests: Mapping[str, Requests]) -> list[RequestsReport]:
    return [
        RequestsReport(
            operation=operation,
            count=each.count,
            failures=each.failures,
            seconds=each.seconds,
            bounds=list(BUCKETS),
            cumulated=list(accumulate(each.buckets)),
        )
        for operation, each in sorted(requests.items())
    ]


def peer_subnets(owners: Iterable[str]) -> Iterator[Subnet]:
    """The subnets of the peers among the owners of the desired state."""
    for key in owners:
        with contextlib.suppress(BadLease):  # the host's own objects, or a key that is no lease's
            yield from LeaseKey.parse(key.rpartition("/")[2]).subnets


def _texts(*addresses: Address | None) -> list[str]:
    return [format_address(address) for address in addresses if address]


def _order(key: str) -> tuple[bool, object]:
    """Leases by their subnets, then whatever can't be read."""
    try:
        return False, LeaseKey.parse(key.rpartition("/")[2]).subnets[0]
    except BadLease:
        return True, key
