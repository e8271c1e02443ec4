"""What the page shows: hosts, and who reaches whom, made of the answers of many hosts. Pure.

A host's state is `ok`, `warn` (it works, and somebody should look), `bad`, or `lease`: nothing is known but its lease. A link
is the way between two hosts, told by either end or by both; its state is the worse one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

from wincey.model.report import (
    ContainerReport,
    NetworkReport,
    PeerReport,
    PeerTrafficReport,
    StatusReport,
    TrafficReport,
    WayReport,
)

State = Literal["ok", "warn", "bad", "lease"]

FULL_MESH = 60
"""Up to so many hosts every link is told; of more only those that were asked about by --probe, or are in trouble."""


MOST_LINKS = 4000
"""No picture has more links: those in trouble come first, then the watched host's, then some of the others."""


class Known(msgspec.Struct, frozen=True):
    """A host by its lease. id: its subnets, as the lease has them. public: its addresses between hosts, IPv4 first."""

    id: str
    subnets: list[str]
    public: list[str]
    backend: str


class Look(msgspec.Struct):
    """What a host has told. trouble: why it did not, "" if it did. at: when, in seconds of a monotonic clock.

    peers, containers: of the latest deep look, which is older in large networks. rates: bytes a second by device, received
    and sent. repaired: in the last minute. counted, counted_at: what went to and came from each peer (--metrics-peers), as it
    last changed, and when; peer_rates: bytes a second by the peer's subnet, to it and from it.
    """

    trouble: str
    at: float = 0.0
    status: StatusReport | None = None
    network: NetworkReport | None = None
    peers: list[PeerReport] = []
    containers: list[ContainerReport] = []
    rates: dict[str, tuple[float, float]] = {}
    repaired: int = 0
    counted: list[PeerTrafficReport] = []
    counted_at: float = 0.0
    peer_rates: dict[str, tuple[float, float]] = {}


class Device(msgspec.Struct, frozen=True):
    """One of a host's devices. receive, send: bytes a second, None before the second look. errors, dropped: since it is there."""

    name: str
    receive: float | None
    send: float | None
    errors: int
    dropped: int


class HostPicture(msgspec.Struct, frozen=True):
    """A host. told: why nothing but its lease is known, "" otherwise. left: seconds until the lease ends, None for a reservation."""

    id: str
    name: str
    public: list[str]
    subnets: list[str]
    backend: str
    state: State
    told: str
    troubles: list[str]
    version: str = ""
    up: float = 0.0
    mtu: int = 0
    interface: str = ""
    reserved: bool = False
    left: float | None = None
    objects: int = 0
    repaired: int = 0
    repaired_lately: int = 0
    devices: list[Device] = []
    containers: list[ContainerReport] = []


class WayPicture(msgspec.Struct, frozen=True):
    """From one end of a link to the other, as its beginning tells. rtt: seconds. loss: 0 to 1. None: not known.

    through: whether packets were sent through the network, or only from host to host. send, receive: bytes a second between the
    two, as the beginning counts them with --metrics-peers.
    """

    start: str
    end: str
    rtt: float | None
    loss: float | None
    mtu: int | None
    promised: int | None
    through: bool
    objects: list[str]
    troubles: list[str]
    send: float | None = None
    receive: float | None = None


class LinkPicture(msgspec.Struct, frozen=True):
    """A pair of hosts."""

    a: str
    b: str
    state: State
    backend: str
    ways: list[WayPicture]


class Picture(msgspec.Struct, frozen=True):
    """All of it. every: seconds between two looks. source: where it comes from, for people. notes: what is missing, and why.

    untold: how many links without trouble are left out, see MOST_LINKS.
    """

    network: str
    networks: list[str]
    source: str
    every: float
    notes: list[str]
    hosts: list[HostPicture]
    links: list[LinkPicture]
    untold: int = 0


def draw(
    known: Sequence[Known],
    looks: Mapping[str, Look],
    *,
    source: str,
    every: float,
    notes: list[str],
    watched: str = "",
) -> Picture:
    """The picture of all hosts; looks: by the hosts' ids. watched: the host whose links are told before others."""
    links = _links(known, looks)
    told = sorted(links, key=lambda link: (link.state == "ok", watched not in {link.a, link.b}))[:MOST_LINKS]
    names = Counter(look.status.host for look in looks.values() if look.status)
    network = next((look.network for look in looks.values() if look.network), None)
    return Picture(
        network=network.name if network else "",
        networks=network.networks if network else [],
        source=source,
        every=every,
        notes=notes,
        hosts=[_host(each, looks.get(each.id), names) for each in known],
        links=told,
        untold=len(links) - len(told),
    )


def rates(
    before: Sequence[TrafficReport], after: Sequence[TrafficReport], seconds: float
) -> dict[str, tuple[float, float]]:
    """Bytes a second by device, received and sent. Counters that went back are a new device's: told at the next look."""
    old = {each.device: each for each in before}
    found = {}
    for each in after:
        first = old.get(each.device)
        if first is None or seconds <= 0:
            continue
        received, sent = each.receive_bytes - first.receive_bytes, each.transmit_bytes - first.transmit_bytes
        if received >= 0 and sent >= 0:
            found[each.device] = (received / seconds, sent / seconds)
    return found


def count_peers(look: Look, before: Look | None, counted: list[PeerTrafficReport]) -> None:
    """Take in what a host has counted by peer. It counts now and then: between, the rates stay as they were."""
    if before is None or not before.counted:
        look.counted, look.counted_at = counted, look.at
        return
    if counted == before.counted:
        look.counted, look.counted_at, look.peer_rates = before.counted, before.counted_at, before.peer_rates
        return
    look.counted, look.counted_at = counted, look.at
    old, seconds = {each.subnet: each for each in before.counted}, look.at - before.counted_at
    for each in counted:
        first = old.get(each.subnet)
        if first and seconds > 0 and each.bytes_to >= first.bytes_to and each.bytes_from >= first.bytes_from:
            rate = ((each.bytes_to - first.bytes_to) / seconds, (each.bytes_from - first.bytes_from) / seconds)
            look.peer_rates[each.subnet] = rate


def _host(known: Known, look: Look | None, names: Mapping[str, int]) -> HostPicture:
    """names: how many hosts have each; one that several have names none of them."""
    address = known.public[0] if known.public else known.id
    if look is None or look.status is None or look.network is None:
        return HostPicture(
            id=known.id,
            name=address,
            public=known.public,
            subnets=known.subnets,
            backend=known.backend,
            state="lease",
            told=look.trouble if look else "it has not been asked",
            troubles=[],
        )
    network = look.network
    broken = [network.trouble] if network.trouble else []
    broken += [f"{each.what}: {each.reason}" for each in network.reconcile.failures]
    odd = [f"the store does not answer: {network.store.trouble}"] if network.store.trouble else []
    odd += [f"bad key {each.key}: {each.reason}" for each in network.bad_keys]
    odd += (
        [f"{look.repaired} objects repaired in the last minute: another program changes them"] if look.repaired else []
    )
    return HostPicture(
        id=known.id,
        name=look.status.host if names[look.status.host] == 1 else address,
        public=known.public or (network.interface.public if network.interface else []),
        subnets=known.subnets,
        backend=network.backend or known.backend,
        state="bad" if broken else "warn" if odd else "ok",
        told="",
        troubles=broken + odd,
        version=look.status.version,
        up=look.status.up,
        mtu=network.mtu,
        interface=f"{network.interface.name}, MTU {network.interface.mtu}" if network.interface else "",
        reserved=bool(network.lease and network.lease.reservation),
        left=network.lease.left if network.lease else None,
        objects=network.reconcile.objects,
        repaired=network.reconcile.repaired,
        repaired_lately=look.repaired,
        devices=[_device(each, look.rates.get(each.device)) for each in network.traffic],
        containers=look.containers,
    )


def _device(traffic: TrafficReport, rate: tuple[float, float] | None) -> Device:
    return Device(
        name=traffic.device,
        receive=rate[0] if rate else None,
        send=rate[1] if rate else None,
        errors=traffic.receive_errors + traffic.transmit_errors,
        dropped=traffic.receive_dropped + traffic.transmit_dropped,
    )


def _links(known: Sequence[Known], looks: Mapping[str, Look]) -> list[LinkPicture]:
    backends = {each.id: each.backend for each in known}
    every = len(known) <= FULL_MESH
    pairs: dict[tuple[str, str], list[WayPicture]] = {}
    for start in backends:
        look = looks.get(start)
        for peer in look.peers if look else ():
            end = ",".join(peer.subnets)
            if look and end in backends and end != start and (every or peer.probe or peer.troubles):
                pairs.setdefault((min(start, end), max(start, end)), []).append(_way(start, end, peer, look))
    return [
        LinkPicture(a=a, b=b, state=_worst(ways), backend=backends[b] or backends[a], ways=ways)
        for (a, b), ways in pairs.items()
    ]


def _way(start: str, end: str, peer: PeerReport, look: Look) -> WayPicture:
    probe = peer.probe
    asked: WayReport | None = (probe.inner or probe.outer) if probe else None
    counted = [rate for subnet in peer.subnets if (rate := look.peer_rates.get(subnet))]
    return WayPicture(
        start=start,
        end=end,
        rtt=asked.rtt if asked else None,
        loss=asked.loss if asked and asked.asked else None,
        mtu=probe.mtu if probe else None,
        promised=probe.promised if probe else None,
        through=bool(probe and probe.inner),
        objects=peer.objects,
        troubles=peer.troubles,
        send=sum(rate[0] for rate in counted) if counted else None,
        receive=sum(rate[1] for rate in counted) if counted else None,
    )


def _worst(ways: Sequence[WayPicture]) -> State:
    """Nothing gets through and "we could not make it" is bad; what gets through with faults is to be looked at."""
    troubled = [way for way in ways if way.troubles]
    if not troubled:
        return "ok"
    return "warn" if all(way.rtt is not None and (way.loss or 0.0) < 0.9 for way in troubled) else "bad"
