"""The rtnetlink part of the host's state: links, addresses, neighbors, FDB entries and routes of ours.

`observe` is a few dumps, `apply` a few sends, whatever the number of peers. What is ours: devices named in the scope (of a
kind that we make), with their addresses inside the cluster's networks, their permanent neighbors and FDB entries, and their
routes but the kernel's own; and, on devices that are not ours, routes with our protocol number inside the networks.

A route of another program at a destination that we desire does not count as there: putting ours replaces it, and if ours is
not desired it stays. Where something stands beside a desired object under the same key (a second remote, a second next
hop), it is returned under a key of its own, so that the difference deletes it alone.

Order of changes: an IPv4 address is deleted only after the new one is there, because a device that loses its last address
loses all its IPv4 routes. An IPv6 address is deleted first, because the kernel does not change the prefix length of one.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeGuard

from wincey.kernel import rtnl
from wincey.kernel.links import LinkRefused, as_wanted, put_link, read_link
from wincey.kernel.monitor import Expectation, Monitor
from wincey.kernel.netlink import NLM_F_CREATE, NLM_F_REPLACE, Netlink, NetlinkError, Refusal, batches, messages
from wincey.kernel.objects import Names, is_candidate, neighbor, routes
from wincey.kernel.reasons import GONE, explain
from wincey.model.state import Changes, Failure, FdbEntry, InterfaceAddress, Key, Link, Neighbor, Object, Route, Scope

_PUT = NLM_F_CREATE | NLM_F_REPLACE
_FAMILIES = (socket.AF_INET, socket.AF_INET6)
_DELETE_ORDER = (Route, FdbEntry, Neighbor, InterfaceAddress)
_PUT_ORDER = (Neighbor, FdbEntry, Route)
_KINDS: dict[type[Object], tuple[int, int]] = {
    Link: (rtnl.RTM_NEWLINK, rtnl.RTM_DELLINK),
    InterfaceAddress: (rtnl.RTM_NEWADDR, rtnl.RTM_DELADDR),
    Route: (rtnl.RTM_NEWROUTE, rtnl.RTM_DELROUTE),
    Neighbor: (rtnl.RTM_NEWNEIGH, rtnl.RTM_DELNEIGH),
    FdbEntry: (rtnl.RTM_NEWNEIGH, rtnl.RTM_DELNEIGH),
}


class RtnetlinkDriver:
    """Keeps links, addresses, neighbors, FDB entries and routes in the network namespace that it is made in.

    protocol: the rtnetlink protocol number of its routes, which tells them from others'. Only the default is watched.
    """

    handles: tuple[type[Object], ...] = (Link, InterfaceAddress, Route, Neighbor, FdbEntry)

    def __init__(self, protocol: int = rtnl.ROUTE_PROTOCOL) -> None:
        self._protocol = protocol
        self._netlink = Netlink()
        self._names = Names()
        self._expectation = Expectation(self._names, self._current)
        self._monitor: Monitor | None = None
        self._changed: Callable[[str], None] | None = None

    async def observe(self, desired: Mapping[Key, Object], scope: Scope) -> dict[Key, Object]:
        """See driver.Driver. Raises OSError when the kernel does not answer at all."""
        self._names.clear()
        found = _Findings(desired)
        devices: dict[int, str] = {}
        for name in scope.devices:
            message = read_link(self._netlink, name)
            wanted = desired.get(("link", name))
            link = as_wanted(message, self._names, wanted if isinstance(wanted, Link) else None) if message else None
            if message and link:
                devices[message.index] = name
                # A tunnel or a bridge makes and removes its device itself: one that is not desired is on its way out.
                if link.kind not in {"tun", "ovs"} or wanted:
                    found.add(link)
        self._expectation.expect(self._handled(desired), scope, devices)
        if self._monitor:
            self._monitor.refine()
        self._read_addresses(devices, found)
        for index, name in devices.items():
            self._read_neighbors(index, name, found)
            await asyncio.sleep(0)
        for family in _FAMILIES:
            self._read_routes(family, devices, found)
            await asyncio.sleep(0)
        return found.actual

    async def apply(self, changes: Changes) -> Sequence[Failure]:
        """See driver.Driver. When changing a device cost what was on it, the watcher is told why."""
        self._names.clear()
        self._expectation.update(changes)
        failures: list[Failure] = []
        going = {item.name for item in changes.delete if isinstance(item, Link)}
        delete, put = _by_class(changes.delete), _by_class(changes.put)
        deletions = [item for cls in _DELETE_ORDER for item in delete.get(cls, ())]
        # A device takes everything on it along.
        deletions = [item for item in deletions if _device(item) not in going] if going else deletions
        late = [item for item in deletions if isinstance(item, InterfaceAddress) and item.subnet.bits == 32]
        first = [item for item in deletions if item not in late] if late else deletions
        await self._send([(item, False) for item in [*first, *delete.get(Link, ())]], failures)
        self._put_links([item for item in put.get(Link, ()) if isinstance(item, Link)], failures)
        await self._send(
            [
                *((item, True) for item in put.get(InterfaceAddress, ())),
                *((item, False) for item in late),
                *((item, True) for cls in _PUT_ORDER for item in put.get(cls, ())),
            ],
            failures,
        )
        return failures

    def watch(self, changed: Callable[[str], None]) -> None:
        """See driver.Driver."""
        self._changed = changed
        self._monitoring().on_change(changed)

    def watch_hosts(self, changed: Callable[[str], None]) -> None:
        """Call `changed(why)` when a device that is not ours, or an address on one, came, went or changed.

        Containers that start and stop make many such calls: it is for the caller to limit their rate.
        """
        self._monitoring().on_host_change(changed)

    async def close(self) -> None:
        """See driver.Driver."""
        if self._monitor:
            self._monitor.close()
            self._monitor = None
        self._netlink.close()

    def _current(self, wanted: Link) -> Link | None:
        message = read_link(self._netlink, wanted.name)
        return as_wanted(message, self._names, wanted) if message else None

    def _monitoring(self) -> Monitor:
        if self._monitor is None:
            self._monitor = Monitor(self._expectation, own_port=self._netlink.port)
        return self._monitor

    def _handled(self, desired: Mapping[Key, Object]) -> dict[Key, Object]:
        kinds = {kind for kind in set(map(type, desired.values())) if issubclass(kind, self.handles)}
        return {key: item for key, item in desired.items() if type(item) in kinds}

    def _read_addresses(self, devices: Mapping[int, str], found: _Findings) -> None:
        networks = self._expectation.networks
        for index, name in devices.items():
            for kind, data, start, end in messages(self._dump_of_device(rtnl.RTM_GETADDR, rtnl.dump_addresses(index))):
                if kind != rtnl.RTM_NEWADDR:
                    continue
                message = rtnl.decode_address(data, start, end)
                usable = message.index == index and message.scope == rtnl.RT_SCOPE_UNIVERSE
                if usable and not message.flags & rtnl.IFA_F_DADFAILED:
                    subnet = message.subnet
                    if (subnet.address, subnet.bits) in networks:
                        found.add(InterfaceAddress(name, subnet))

    def _read_neighbors(self, index: int, name: str, found: _Findings) -> None:
        dumps = [rtnl.dump_neighbors(family, index) for family in _FAMILIES]
        for body in (*dumps, rtnl.dump_fdb(index)):
            for kind, data, start, end in messages(self._dump_of_device(rtnl.RTM_GETNEIGH, body)):
                if kind == rtnl.RTM_NEWNEIGH:
                    message = rtnl.decode_neighbor(data, start, end)
                    if message.index == index and (item := neighbor(message, name)):
                        found.add(item)

    def _read_routes(self, family: int, devices: Mapping[int, str], found: _Findings) -> None:
        networks, names, own = self._expectation.networks, self._names, set(devices.values())
        for message in self._dump_routes(rtnl.dump_routes(family, protocol=self._protocol), ours=True):
            for item in routes(message, names):
                if item.device in own or (message.destination, message.length) in networks:
                    found.add(item)
        for index in devices:  # what another program, or flannel before us, left on our devices
            for message in self._dump_routes(rtnl.dump_routes(family, oif=index), ours=False):
                on_device = any(hop.oif == index for hop in message.hops)
                inside = (message.destination, message.length) in networks
                if on_device and inside and message.protocol != rtnl.RTPROT_KERNEL:
                    for item in routes(message, names):
                        if item.key not in found.desired:
                            found.add(item)

    def _dump_of_device(self, kind: int, body: bytes) -> list[bytes]:
        """A dump about one device: nothing when the device has gone since, of which a notification tells."""
        try:
            return self._netlink.dump(kind, body)
        except NetlinkError as error:
            if error.errno != errno.ENODEV:
                raise
            return []

    def _dump_routes(self, body: bytes, *, ours: bool) -> Iterable[rtnl.RouteMessage]:
        try:
            datagrams = self._dump_of_device(rtnl.RTM_GETROUTE, body)
        except NetlinkError as error:
            if error.errno not in rtnl.NO_ROUTES:
                raise
            return
        for kind, data, start, end in messages(datagrams):
            if kind == rtnl.RTM_NEWROUTE and (rtnl.route_protocol(data, start) == self._protocol) is ours:
                message = rtnl.decode_route(data, start, end)
                if is_candidate(message):
                    yield message

    def _put_links(self, links: Sequence[Link], failures: list[Failure]) -> None:
        for link in links:
            try:
                loss = put_link(self._netlink, self._names, link)
            except LinkRefused as error:
                failures.append(Failure(link, str(error)))
                loss = ""
            if loss and self._changed:
                self._changed(loss)
            self._names.clear()
            self._expectation.device(self._names.index(link.name), link.name)
        if links and self._monitor:
            self._monitor.refine()

    async def _send(self, steps: Sequence[tuple[Object, bool]], failures: list[Failure]) -> None:
        """Put (True) or delete (False) objects in this order."""
        known: list[tuple[Object, bool]] = []
        requests: list[bytes] = []
        for item, put in steps:
            request = self._encode(item, put)
            if request:
                known.append((item, put))
                requests.append(request)
            elif put:
                failures.append(Failure(item, f"device {_device(item)} is not there"))
        for batch in batches(requests):
            for index, refusal in self._netlink.transact(requests[batch.start : batch.stop]).items():
                item, put = known[batch.start + index]
                final: Refusal | None = refusal
                if put and _replacement_refused(item, refusal):
                    final = self._replace(item, requests[batch.start + index])
                if final and (put or final.errno not in GONE):
                    failures.append(Failure(item, explain(item, final)))
            await asyncio.sleep(0)

    def _replace(self, route: Route, request: bytes) -> Refusal | None:
        """Delete whatever route stands where this one belongs, of any program, and put this one."""
        delete = rtnl.encode_route(rtnl.RTM_DELROUTE, 0, route.destination, protocol=0)
        return self._netlink.transact([delete, request]).get(1)

    def _encode(self, item: Object, put: bool) -> bytes | None:
        """None when the object's device is not there."""
        device = _device(item)
        index = self._names.index(device)
        if device and not index:
            return None
        new, gone = _KINDS[type(item)]
        kind, flags = (new, _PUT) if put else (gone, 0)
        if isinstance(item, Neighbor):
            return rtnl.encode_neighbor(kind, flags, index, item.address, item.mac)
        if isinstance(item, FdbEntry):
            return rtnl.encode_fdb(kind, flags, index, item.mac, item.remote)
        if isinstance(item, Route):
            return rtnl.encode_route(
                kind,
                flags,
                item.destination,
                oif=index,
                gateway=item.gateway,
                onlink=put and item.onlink,
                blackhole=item.kind == "blackhole",
                link_scope=item.link_scope,
                # Another program's leftovers on our own device go too; elsewhere never anything but our own.
                protocol=0 if not put and device in self._expectation.devices.values() else self._protocol,
            )
        if isinstance(item, InterfaceAddress):
            return rtnl.encode_address(kind, flags, index, item.subnet)
        return rtnl.encode_link(kind, flags, index=index)


class _Findings:
    """What an observation has found so far."""

    def __init__(self, desired: Mapping[Key, Object]) -> None:
        self.desired = desired
        self.actual: dict[Key, Object] = {}

    def add(self, item: Object) -> None:
        """Add an object; of two with one key, the desired one stands under it and the other beside it."""
        key = item.key
        wanted = self.desired.get(key)
        if item == wanted:
            item = wanted  # one copy in memory, and the difference is found by identity
        other = self.actual.setdefault(key, item)
        if other is not item and other != item:
            if item is wanted:
                self.actual[key], item = item, other
            self.actual[(*key, item)] = item


def _device(item: Object) -> str:
    return item.name if isinstance(item, Link) else getattr(item, "device", "")


def _replacement_refused(item: Object, refusal: Refusal) -> TypeGuard[Route]:
    """Whether the kernel refused an onlink IPv6 gateway because another device's route covers it.

    The route that is to be replaced counts as well, which makes its replacement impossible (ip6_route_check_nh_onlink).
    """
    return isinstance(item, Route) and item.onlink and item.destination.bits == 128 and refusal.errno == errno.EINVAL


def _by_class(items: Iterable[Object]) -> dict[type[Object], list[Object]]:
    found: dict[type[Object], list[Object]] = {}
    for item in items:
        found.setdefault(type(item), []).append(item)
    return found
