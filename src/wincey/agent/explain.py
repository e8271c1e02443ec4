"""The way of a packet from this host to an address, hop by hop, and where it breaks. Pure: what is, is given.

Each step compares what should be with what is. The first one that is not all right is where to look.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import msgspec

from wincey.agent.peers import LOCAL
from wincey.agent.preparation import Prepared
from wincey.model.address import Address, Subnet, family_of, format_address
from wincey.model.lease import Lease, LeaseKey
from wincey.model.report import ExplainReport, StepReport
from wincey.model.state import FdbEntry, Key, Link, Neighbor, Object, Route, RuleSet, TunnelPeer


class Way(msgspec.Struct, frozen=True):
    """What the kernel answers when it is asked for the way to an address: a device of that MTU, and a gateway if it takes one.

    refusal: its words when there is no way.
    """

    device: str = ""
    mtu: int = 0
    gateway: Address | None = None
    refusal: str = ""

    def __str__(self) -> str:
        if self.refusal:
            return self.refusal
        return f"dev {self.device}" + (f" via {format_address(self.gateway)}" if self.gateway else "")


class Seen(msgspec.Struct):
    """What is on this host: objects by key, the kernel's way to the address, and to the host behind it once that is known."""

    objects: Mapping[Key, Object]
    way: Way
    outer_way: Way | None = None


class Host(msgspec.Struct, frozen=True):
    """What this host wants. wanted: objects by the owner that asks for them; leases: by their key in the store."""

    name: str
    prepared: Prepared
    own: LeaseKey
    leases: Mapping[str, Lease]
    wanted: Mapping[str, Sequence[Object]]

    def owner_of(self, address: Address) -> str | None:
        """The lease whose subnet an address is in, by its key in the store."""
        for key in self.wanted:
            if key != LOCAL and any(subnet.contains(address) for subnet in subnets_of(key)):
                return key
        return next(
            (
                key
                for key, lease in self.leases.items()
                if any(subnet.contains(address) for subnet in lease.key.subnets)
            ),
            None,
        )


def subnets_of(store_key: str) -> tuple[Subnet, ...]:
    """The subnets that a lease's key in the store names; raises BadLease."""
    return LeaseKey.parse(store_key.rpartition("/")[2]).subnets


def outer_address(host: Host, address: Address) -> Address | None:
    """The host that packets to an address are sent to, None when they are not sent to one."""
    owner = host.owner_of(address)
    for item in _order(host.wanted.get(owner or "", ())) if owner else ():
        if item.outer:
            return item.outer
    return None


def explain(host: Host, address: Address, seen: Seen) -> ExplainReport:
    """The steps, in a packet's order."""
    steps = list(_steps(host, address, seen))
    broken = next((step for step in steps if not step.ok), None)
    return ExplainReport(
        network=host.name,
        address=format_address(address),
        reaches=broken is None,
        breaks_at=f"{broken.what}: {broken.text}" if broken else "",
        steps=steps,
    )


def _steps(host: Host, address: Address, seen: Seen) -> Iterator[StepReport]:
    networks = host.prepared.config.networks
    if not any(network.contains(address) for network in networks):
        yield _fine("network", f"outside of {', '.join(map(str, networks))}: it is not for this network")
        yield _way("route", seen.way)
        yield from _rules(host, address, seen, inside=False)
        return
    yield _fine("network", f"inside {', '.join(str(each) for each in networks if each.contains(address))}")
    if any(subnet.contains(address) for subnet in host.own.subnets):
        yield _fine("lease", f"{host.own}: this host's own, a container here")
        yield _way("route", seen.way)
        yield from _rules(host, address, seen, inside=True)
        return
    owner = host.owner_of(address)
    if owner is None:
        yield _broken(
            "lease", f"no host has a lease on a subnet with {format_address(address)}: nobody has this address"
        )
        return
    yield _lease(host, owner)
    objects = _order(host.wanted.get(owner, ()))
    if not objects:
        yield _broken("way", "this host knows no way to it: wincey peers tells why")
        return
    yield from _objects(host, objects, seen)
    route = next((item for item in objects if isinstance(item, Route)), None) or _covering(host, address)
    yield _kernel(route, seen.way)
    if wraps := _wraps(host, objects):
        yield _fine("wrapped", wraps)
    if seen.outer_way:
        yield _underlay(host, objects, seen.outer_way)
    yield _mtu(host, seen)
    yield from _rules(host, address, seen, inside=True)


def _lease(host: Host, owner: str) -> StepReport:
    lease = host.leases.get(owner)
    if lease is None:
        text = f"{owner.rpartition('/')[2]}, whose host the store does not tell now"
        return _fine("lease", text)
    public = [format_address(each) for each in (lease.attrs.public_ip, lease.attrs.public_ipv6) if each]
    return _fine("lease", f"{lease.key} of {', '.join(public)}, by {lease.attrs.backend_type or 'udp'}")


def _order(objects: Sequence[Object]) -> list[Object]:
    """As a packet meets them: the route, the next hop's MAC address, the host behind that."""
    ranks: dict[type[Object], int] = {Route: 0, Neighbor: 1, FdbEntry: 2, TunnelPeer: 2}
    return sorted(objects, key=lambda item: ranks.get(type(item), 3))


def _objects(host: Host, objects: Sequence[Object], seen: Seen) -> Iterator[StepReport]:
    devices = {device for item in objects if (device := getattr(item, "device", ""))}
    local = [item for item in host.wanted.get(LOCAL, ()) if isinstance(item, Link) and item.name in devices]
    for item in [*local, *objects]:
        found = seen.objects.get(item.key)
        if found == item:
            yield _fine(item.tag, str(item))
        else:
            why = f"there is {found} instead" if found else "it is missing"
            yield _broken(item.tag, f"{item}: {why}; the daemon repairs that at its next look, unless it fails")


def _covering(host: Host, address: Address) -> Route | None:
    """The route of the host's own that leads to an address where its peer has none of its own."""
    found = [
        item
        for item in host.wanted.get(LOCAL, ())
        if isinstance(item, Route) and item.kind == "unicast" and item.destination.contains(address)
    ]
    return max(found, key=lambda route: route.destination.length, default=None)


def _way(what: str, way: Way) -> StepReport:
    return (
        _broken(what, f"the kernel has no way to it: {way}") if way.refusal else _fine(what, f"the kernel takes {way}")
    )


def _kernel(route: Route | None, way: Way) -> StepReport:
    if way.refusal or route is None:
        return _way("kernel", way)
    if (way.device, way.gateway) != (route.device, route.gateway):
        return _broken(
            "kernel", f"it takes {way} instead: a narrower route or a policy rule (ip rule) comes before ours"
        )
    return _fine("kernel", f"it takes {way}")


def _wraps(host: Host, objects: Sequence[Object]) -> str:
    devices = {device for item in objects if (device := getattr(item, "device", ""))}
    around = [item for item in host.wanted.get(LOCAL, ()) if item.wraps and item.makes in devices]
    return next((item.wraps for item in (*objects, *around) if item.wraps), "")


def _underlay(host: Host, objects: Sequence[Object], way: Way) -> StepReport:
    outer = next(item.outer for item in objects if item.outer)
    assert outer
    if way.refusal:
        return _broken("underlay", f"there is no way to the host {format_address(outer)}: {way}")
    ours = {item.makes for item in host.wanted.get(LOCAL, ()) if item.makes}
    if way.device in ours:
        return _broken("underlay", f"the way to the host {format_address(outer)} leads back into the network: {way}")
    return _fine("underlay", f"to the host {format_address(outer)}: {way}")


def _mtu(host: Host, seen: Seen) -> StepReport:
    promised, wire = host.prepared.facts.mtu, seen.outer_way.mtu if seen.outer_way else 0
    text = f"containers {host.prepared.backend.mtu}, {host.prepared.facts.underlay} {promised}"
    if wire and wire < promised:
        return _broken("mtu", f"{text}, but the way to the host has {wire}: large packets are lost")
    return _fine("mtu", text)


def _rules(host: Host, address: Address, seen: Seen, *, inside: bool) -> Iterator[StepReport]:
    rules = next(
        (
            item
            for item in host.wanted.get(LOCAL, ())
            if isinstance(item, RuleSet) and item.network.family == family_of(address)
        ),
        None,
    )
    if rules is None:
        return
    forwarded = "forwarding is accepted" if rules.forward else "forwarding is as the host's own rules have it"
    masked = "masqueraded" if rules.masquerade and not inside else "not masqueraded"
    if seen.objects.get(rules.key) == rules:
        yield _fine("rules", f"{forwarded}, {masked}")
    else:
        yield _broken(
            "rules", f"{rules}: not as they should be; the daemon repairs that at its next look, unless it fails"
        )


def _fine(what: str, text: str) -> StepReport:
    return StepReport(what=what, text=text, ok=True)


def _broken(what: str, text: str) -> StepReport:
    return StepReport(what=what, text=text, ok=False)
