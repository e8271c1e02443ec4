"""Asks peers: a few echo requests each way, the path's MTU, and meanwhile a look at the wire."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

import msgspec

from wincey.agent.doctor.facts import Answered, Network, Peer
from wincey.agent.doctor.wire import ArpWatch, Sources
from wincey.kernel.echo import Echo, path_mtu
from wincey.kernel.interfaces import Interface, RouteLookup, route_to
from wincey.model.address import Address, family_of, format_address

_REQUESTS, _WAIT = 3, 0.5
_HEADERS = {"vxlan": 8 + 14, "udp": 0}
"""Bytes between the UDP header and the inner packet, by backend."""


async def ask_all(network: Network, chosen: Sequence[Peer], interfaces: Sequence[Interface]) -> Network:
    """The network with what its peers answered; those not chosen are not asked."""
    underlay = next((each for each in interfaces if each.name == network.underlay), None)
    local = next((each for each in network.local if len(each) == 4), None)
    inner = {peer.public: _inner(network, peer, interfaces) for peer in chosen}
    with contextlib.ExitStack() as stack:
        arp, sources = None, None
        with contextlib.suppress(OSError):
            if underlay and local and len(underlay.mac) == 6 and any(underlay.mac):
                arp = stack.enter_context(ArpWatch(underlay.name, underlay.mac))
                near = [peer.public for peer in chosen if len(peer.public) == 4 and _near(peer.public)]
                arp.ask(local, [local, *near[:64]])
            if underlay and network.port and (header := _HEADERS.get(network.backend)) is not None:
                wanted = [way[1] for way in inner.values() if way and len(way[1]) == 4]
                sources = stack.enter_context(Sources(underlay.name, network.port, header, wanted))
        gate = asyncio.Semaphore(16)
        asked = await asyncio.gather(*(_ask(gate, network, peer, inner[peer.public], interfaces) for peer in chosen))
        if arp:
            await asyncio.sleep(0.05)
    for at, peer in enumerate(asked):
        way = inner[peer.public]
        asked[at] = msgspec.structs.replace(
            peer,
            macs=sorted(arp.answers.get(peer.public, ())) if arp else (),
            seen_from=sorted(sources.found.get(way[1], ())) if sources and way else (),
        )
    by_public = {(peer.public, tuple(peer.subnets)): peer for peer in asked}
    return msgspec.structs.replace(
        network,
        peers=[by_public.get((peer.public, tuple(peer.subnets)), peer) for peer in network.peers],
        own_macs=sorted(arp.answers.get(local, ())) if arp and local else (),
    )


def _inner(network: Network, peer: Peer, interfaces: Sequence[Interface]) -> tuple[Address, Address] | None:
    """Own and the peer's address in the network, where both hosts have one: the bases of their subnets."""
    on_devices = {entry.address for each in interfaces if each.name in network.devices for entry in each.addresses}
    for own in network.own:
        theirs = next((each for each in peer.subnets if each.family == own.family), None)
        if theirs and own.masked().address in on_devices and peer.backend == network.backend:
            return own.masked().address, theirs.address
    return None


async def _ask(
    gate: asyncio.Semaphore,
    network: Network,
    peer: Peer,
    inner: tuple[Address, Address] | None,
    interfaces: Sequence[Interface],
) -> Peer:
    names = {each.index: each for each in interfaces}
    taken = []
    for subnet in peer.subnets:
        way = _way(subnet.host(1))
        if isinstance(way, str):
            taken.append(way)
        elif not _right(network, peer, names[way.index].name, way.gateway):
            via = f" via {format_address(way.gateway)}" if way.gateway else ""
            taken.append(f"{format_address(subnet.host(1))} by {names[way.index].name}{via}")
    outer_way = _way(peer.public)
    if isinstance(outer_way, str):
        return msgspec.structs.replace(peer, refusal=outer_way, taken=taken)
    device = names[outer_way.index]
    found = msgspec.structs.replace(peer, way=device.name, way_mtu=device.mtu, taken=taken)
    source = next((each for each in network.local if family_of(each) == family_of(peer.public)), None)
    if source is None:
        return found
    async with gate:
        outer, through = await asyncio.gather(_send(source, peer.public), _send(*inner) if inner else _nothing())
        found = msgspec.structs.replace(found, outer=outer, inner=through)
        path = inner if inner and through and not through.silent else (source, peer.public)
        if (inner and through and through.silent) or outer is None or (not inner and outer.silent):
            return found
        promised = network.mtu if inner else device.mtu
        with contextlib.suppress(OSError), Echo(path[0]) as echo:
            mtu = await path_mtu(echo, path[1], most=promised, timeout=0.4)
            return msgspec.structs.replace(found, mtu=mtu, promised=promised)
    return found


async def _nothing() -> None:
    return None


async def _send(source: Address, target: Address) -> Answered | None:
    """None where this host can't send from that address."""
    try:
        with Echo(source) as echo:
            answers = await asyncio.gather(*(echo.ask(target, timeout=_WAIT) for _ in range(_REQUESTS)))
    except OSError:
        return None
    refusal = next((each.refusal for each in answers if each.refusal), "")
    return Answered(_REQUESTS, sum(each.rtt is None for each in answers), refusal)


def _way(address: Address) -> RouteLookup | str:
    try:
        return route_to(address)
    except OSError as error:
        return f"{format_address(address)}: {(error.strerror or str(error)).lower()}"


def _near(address: Address) -> bool:
    way = _way(address)
    return not isinstance(way, str) and way.gateway is None


def _right(network: Network, peer: Peer, device: str, gateway: Address | None) -> bool:
    """Into a device of ours, or to the peer itself, or through a router where the network is the routers' affair."""
    return device in network.devices or gateway == peer.public or (not network.devices and device == network.underlay)
