"""A host's kernel in memory, as far as forwarding depends on it, and the driver through which an agent changes it.

It keeps the rules by which the real one surprises programs: a device takes all that is on it along; what names a device that
is not there is refused; a vxlan device with another VNI, port or underlay is made anew and loses everything; a new MAC
address flushes its neighbors; of a VNI and port there is one device. What other programs have put there stands in `foreign`.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

from wincey.model.address import Address, MacAddress, Subnet
from wincey.model.state import (
    Changes,
    Failure,
    FdbEntry,
    InterfaceAddress,
    Key,
    Link,
    Neighbor,
    Object,
    Route,
    RuleSet,
    Scope,
    Sysctl,
    Tunnel,
    TunnelPeer,
)

UNDERLAY = "eth0"


class Kernel:
    """objects: what an agent of ours has put there. foreign: everything else. devices: names of those that are not ours."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self.objects: dict[Key, Object] = {}
        self.macs: dict[str, MacAddress] = {}
        self.lengths: Counter[int] = Counter()
        self.devices = {UNDERLAY, "cni0", "docker0", "vxlan.other"}
        self.foreign = self._others()
        self.driver: KernelDriver | None = None
        self.notices = True
        self.changes = 0

    @staticmethod
    def _others() -> dict[Key, Object]:
        """What other programs have on any host: also where ours would be, were it ours."""
        parse = Subnet.parse
        things: list[Object] = [
            Route(parse("0.0.0.0/0"), UNDERLAY, parse("10.99.255.254/32").address),
            Route(parse("172.17.0.0/16"), "docker0"),
            # Inside the cluster's network, and beside the containers that packets are followed to: it may lie in a host's subnet.
            Route(parse("10.3.255.160/28"), UNDERLAY, parse("10.99.255.253/32").address),
            Route(parse("10.3.255.16/28"), "docker0"),
            InterfaceAddress("docker0", parse("172.17.0.1/16")),
            Neighbor(UNDERLAY, parse("10.99.255.254/32").address, b"\x02\x00\x00\x00\x00\xfe"),
            FdbEntry("vxlan.other", b"\x02\x00\x00\x00\x00\x07", parse("10.99.255.7/32").address),
        ]
        return {thing.key: thing for thing in things}

    def reboot(self) -> None:
        """All that lived in memory is gone; other programs put theirs back."""
        self.objects.clear()
        self.macs.clear()
        self.lengths.clear()
        self.foreign = self._others()

    def links(self) -> list[Link]:
        """The devices of ours."""
        return [item for item in self.objects.values() if isinstance(item, Link)]

    def mac(self, link: Link) -> MacAddress:
        """The address that a device really has."""
        return link.mac or self.macs[link.name]

    def route(self, address: Address) -> Route | None:
        """The route that packets to an address take: the longest prefix of ours or of others."""
        for length in sorted(self.lengths, reverse=True):
            subnet = Subnet(address, length).masked()
            for kind in ("unicast", "blackhole"):
                if found := self.objects.get((Route.tag, subnet, kind)):
                    assert isinstance(found, Route)
                    return found
        matching = [thing for thing in self.foreign.values() if isinstance(thing, Route)]
        matching = [route for route in matching if route.destination.contains(address)]
        return max(matching, key=lambda route: route.destination.length, default=None)

    def put(self, item: Object) -> tuple[str, str]:
        """Why it is refused, "" if it is not; and what it cost, "" for nothing."""
        if isinstance(item, Link):
            return self._put_link(item)
        device = _device_of(item.path) if isinstance(item, Sysctl) else getattr(item, "device", "")
        made_by_itself = isinstance(item, Tunnel) or (isinstance(item, Route) and item.kind == "blackhole")
        if device and not made_by_itself and not self._there(device):
            return f"device {device} is not there", ""
        self._set(item)
        return "", ""

    def remove(self, key: Key) -> None:
        """Take an object away, and with a device or tunnel all that is on it."""
        gone = self.objects.pop(key, None)
        if gone is None:
            return
        if isinstance(gone, Route):
            self._count(gone, -1)
        if isinstance(gone, Tunnel):
            self.remove((Link.tag, gone.device))
        if isinstance(gone, Link):
            self._flush(gone.name, Object)

    def tamper(self, key: Key, *, notice: bool) -> None:
        """Another program removes something of ours. notice: the kernel tells, and the notice is not lost."""
        self.remove(key)
        if notice and self.driver:
            self.driver.changed("removed by another program")

    def _there(self, device: str) -> bool:
        return device in self.devices or (Link.tag, device) in self.objects or (Tunnel.tag, device) in self.objects

    def _put_link(self, link: Link) -> tuple[str, str]:
        before = self.objects.get(link.key)
        assert before is None or isinstance(before, Link)
        cost = ""
        if link.kind == "tun":
            if (Tunnel.tag, link.name) not in self.objects:
                return f"device {link.name} is not there (yet)", ""
        elif before is None:
            for other in self.links():
                same_vxlan = (
                    link.vxlan
                    and other.vxlan
                    and (other.vxlan.vni, other.vxlan.port) == (link.vxlan.vni, link.vxlan.port)
                )
                if same_vxlan or (link.ipip and other.ipip == link.ipip):
                    return f"taken by device {other.name}", ""
        elif link.vxlan and before.vxlan:
            now, then = link.vxlan, before.vxlan
            if (now.vni, now.port, now.gbp, now.underlay) != (then.vni, then.port, then.gbp, then.underlay):
                self.remove(link.key)
                cost = f"device {link.name} had to be made anew"
            elif link.mac and link.mac != self.mac(before):
                self._flush(link.name, Neighbor)
                cost = f"device {link.name} was given another MAC address"
        elif before.kind != link.kind:
            return f"device {link.name} is of kind {before.kind}", ""
        self.macs[link.name] = link.mac or self.macs.get(link.name) or b"\x02" + self._rng.randbytes(5)
        self._set(link)
        return "", cost

    def _flush(self, device: str, kind: type[Object]) -> None:
        for key, item in list(self.objects.items()):
            on_it = (_device_of(item.path) if isinstance(item, Sysctl) else getattr(item, "device", "")) == device
            if on_it and isinstance(item, kind) and not isinstance(item, Tunnel):
                self.remove(key)

    def _set(self, item: Object) -> None:
        before = self.objects.get(item.key)
        if isinstance(before, Route):
            self._count(before, -1)
        self.objects[item.key] = item
        if isinstance(item, Route):
            self._count(item, 1)

    def _count(self, route: Route, step: int) -> None:
        self.lengths[route.destination.length] += step
        if not self.lengths[route.destination.length]:
            del self.lengths[route.destination.length]


class KernelDriver:
    """One agent's hand on the kernel; its rules of what is ours are those of the real drivers.

    on_apply: told of each batch that was applied. failing: why objects of a class are refused.
    """

    handles: tuple[type[Object], ...] = (Object,)

    def __init__(self, kernel: Kernel, on_apply: Callable[[Changes], None]) -> None:
        self._kernel, self._on_apply = kernel, on_apply
        self._devices: frozenset[str] = frozenset()
        self.changed: Callable[[str], None] = lambda why: None
        self.closed = False
        kernel.driver = self

    async def observe(self, desired: Mapping[Key, Object], scope: Scope) -> dict[Key, Object]:
        """See Driver."""
        kernel = self._kernel
        self._devices = frozenset(scope.devices)
        found: dict[Key, Object] = {}
        for key, item in kernel.objects.items():
            wanted = desired.get(key)
            if wanted is item:  # most are: nothing of the rest applies to them
                found[key] = item
            elif self._ours(item, scope, foreign=False) and not (
                wanted is None and (isinstance(item, Sysctl) or (isinstance(item, Link) and item.kind == "tun"))
            ):
                found[key] = wanted if wanted and _same(item, wanted) else item
        for key, item in kernel.foreign.items():
            if key not in found and self._ours(item, scope, foreign=True):
                found[key] = item
        for key, item in desired.items():
            if isinstance(item, Sysctl) and item.optional and key not in found:
                found[key] = item
        return found

    async def apply(self, changes: Changes) -> Sequence[Failure]:
        """See Driver."""
        if self.closed:
            return []
        kernel = self._kernel
        failures = []
        for item in changes.delete:
            if isinstance(item, Sysctl):
                continue  # what is not wanted any more stays as it is, as with the real driver
            if item.key in kernel.foreign and item.key not in kernel.objects:
                if not isinstance(item, Route) or item.device in self._devices:
                    del kernel.foreign[item.key]
                continue
            kernel.remove(item.key)
        for item in sorted(changes.put, key=_order):
            refusal, cost = kernel.put(item)
            if refusal:
                failures.append(Failure(item, refusal))
            if cost:
                self.changed(cost)
        kernel.changes += len(changes.put) + len(changes.delete)
        self._on_apply(changes)
        return failures

    def watch(self, changed: Callable[[str], None]) -> None:
        """See Driver."""
        self.changed = changed

    async def close(self) -> None:
        """See Driver."""
        self.closed = True

    def _ours(self, item: Object, scope: Scope, *, foreign: bool) -> bool:
        if isinstance(item, (RuleSet, Sysctl, Tunnel, TunnelPeer)):
            return not foreign
        if isinstance(item, Link):
            return item.name in scope.devices
        own = getattr(item, "device", "") in scope.devices
        if isinstance(item, Route):
            inside = _inside(scope.networks, item.destination)
            return own and inside if foreign else own or inside
        if isinstance(item, InterfaceAddress):
            return own and _inside(scope.networks, item.subnet)
        return own


@lru_cache(maxsize=4096)
def _inside(networks: tuple[Subnet, ...], subnet: Subnet) -> bool:
    return any(network.contains(subnet) for network in networks)


_ORDER = (Tunnel, Link, InterfaceAddress, Neighbor, FdbEntry, Route)


def _order(item: Object) -> int:
    return next((place for place, kind in enumerate(_ORDER) if isinstance(item, kind)), len(_ORDER))


def _device_of(path: str) -> str:
    """The device that a setting is of, "" for none."""
    parts = path.split("/")
    return parts[3] if len(parts) == 5 and parts[2] == "conf" else ""


def _same(item: Object, wanted: Object) -> bool:
    """Whether a device is as wanted, where any MAC address is."""
    if not isinstance(wanted, Link) or not isinstance(item, Link) or wanted.mac:
        return False
    return all(getattr(item, field) == getattr(wanted, field) for field in ("kind", "mtu", "vxlan", "ipip"))
