"""Tells when another program may have changed what is ours, from the kernel's notifications.

A notification concerns us only when it contradicts what should be: something desired is gone or different, or something
undesired has come to where only ours may be. That also passes over the echo of our own changes, which the kernel marks as
ours (by port id) for some kinds of object and not for others.

Foreign routes and neighbors may change ten thousand times a second on a busy host. A small classic BPF program on the
socket drops what is about another device or another destination before it is copied to us at all.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Callable, Mapping

from wincey.kernel import rtnl
from wincey.kernel.netlink import HEADER, MALFORMED, Netlink
from wincey.kernel.objects import Names, Networks, is_candidate, neighbor, routes
from wincey.model.address import Subnet
from wincey.model.state import Changes, FdbEntry, InterfaceAddress, Key, Link, Neighbor, Object, Route, Scope

_GROUPS = (1, 3, 5, 7, 9, 11)  # RTNLGRP_: LINK, NEIGH, IPV4_IFADDR, IPV4_ROUTE, IPV6_IFADDR, IPV6_ROUTE
_PER_WAKE_UP = 256
_OURS = (Link, InterfaceAddress, Route, Neighbor, FdbEntry)

Callback = Callable[[str], None]


class Expectation:
    """What should be there, and whether a notification contradicts it.

    objects: all of ours by key. devices: ours that are there, by index. carriers: the devices that our routes lead to and
    that our tunnels send through; when one goes down the kernel drops the routes and tells nobody. current(link): how a
    device of ours is now.
    """

    def __init__(self, names: Names, current: Callable[[Link], Link | None]) -> None:
        self.scope = Scope()
        self.networks = Networks(())
        self.devices: dict[int, str] = {}
        self._objects: dict[Key, Object] = {}
        self._carriers: set[str] = set()
        self._down: set[str] = set()
        self._names = names
        self._current = current

    def expect(self, objects: dict[Key, Object], scope: Scope, devices: Mapping[int, str]) -> None:
        """Replace everything. `objects` is kept and changed by `update`."""
        self.scope, self.networks = scope, Networks(scope.networks)
        self.devices = dict(devices)
        self._objects = objects
        self._carriers = set()
        for item in objects.values():
            self._carried(item)

    def update(self, changes: Changes) -> None:
        """Expect what these changes are about to make."""
        for item in changes.delete:
            if self._objects.get(item.key) == item:
                del self._objects[item.key]
        for item in changes.put:
            self._objects[item.key] = item
            self._carried(item)

    def device(self, index: int, name: str) -> None:
        """One of our devices has been made, maybe anew."""
        self.devices = {known: other for known, other in self.devices.items() if other != name}
        if index:
            self.devices[index] = name

    def _carried(self, item: Object) -> None:
        if isinstance(item, Route):
            self._carriers.add(item.device)
        elif isinstance(item, Link) and item.vxlan:
            self._carriers.add(item.vxlan.underlay)

    def contradicted(self, kind: int, data: bytes, start: int, end: int) -> str | None:
        """Why a notification concerns us, None when it does not."""
        if kind in (rtnl.RTM_NEWROUTE, rtnl.RTM_DELROUTE):
            return self._route(kind == rtnl.RTM_NEWROUTE, data, start, end)
        if kind in (rtnl.RTM_NEWNEIGH, rtnl.RTM_DELNEIGH):
            return self._neighbor(kind == rtnl.RTM_NEWNEIGH, data, start, end)
        if kind in (rtnl.RTM_NEWLINK, rtnl.RTM_DELLINK):
            return self._link(kind == rtnl.RTM_NEWLINK, data, start, end)
        if kind in (rtnl.RTM_NEWADDR, rtnl.RTM_DELADDR):
            return self._address(kind == rtnl.RTM_NEWADDR, data, start, end)
        return None

    def _judge(self, new: bool, item: Object, surplus_is_ours: bool) -> str | None:
        wanted = self._objects.get(item.key)
        if new and item != wanted and (wanted or surplus_is_ours):
            return f"{item} appeared"
        if not new and item == wanted:
            return f"{item} was deleted"
        return None

    def _route(self, new: bool, data: bytes, start: int, end: int) -> str | None:
        message = rtnl.decode_route(data, start, end)
        if (message.destination, message.length) not in self.networks or not is_candidate(message):
            return None
        own = message.protocol == rtnl.ROUTE_PROTOCOL
        for item in routes(message, self._names):
            if new and not own and item.key in self._objects:
                return f"another program put {item}"
            on_ours = item.device in self.scope.devices and message.protocol != rtnl.RTPROT_KERNEL
            if (own or new) and (why := self._judge(new, item, own or on_ours)):
                return why
        return None

    def _neighbor(self, new: bool, data: bytes, start: int, end: int) -> str | None:
        message = rtnl.decode_neighbor(data, start, end)
        device = self.devices.get(message.index)
        if device is None:
            return None
        if item := neighbor(message, device):
            return self._judge(new, item, surplus_is_ours=True)
        # No longer permanent, or failed and without its MAC as before it goes: what we want under its key is not there.
        key: Key = (Neighbor.tag, device, message.address)
        if message.family == rtnl.AF_BRIDGE:
            key = (FdbEntry.tag, device, message.mac)
        return f"{self._objects[key]} was deleted or changed" if key in self._objects else None

    def _link(self, new: bool, data: bytes, start: int, end: int) -> str | None:
        self._names.clear()
        message = rtnl.decode_link(data, start, end)
        wanted = self._objects.get((Link.tag, message.name))
        known = self.devices.get(message.index)
        if new and isinstance(wanted, Link):
            # Not by the message: making a device takes several steps, each of which is told as it was then.
            same = known == message.name and self._current(wanted) == wanted
            return None if same else f"device {message.name} changed"
        if known and (not new or known != message.name) and (Link.tag, known) in self._objects:
            return f"device {known} is gone"
        if message.name in self._carriers:
            return self._carrier(message.name, new and message.up)
        return None

    def _carrier(self, name: str, up: bool) -> str | None:
        was_up = name not in self._down
        if up:
            self._down.discard(name)
            return None if was_up else f"device {name} is up again"
        self._down.add(name)
        return f"device {name} went down"

    def _address(self, new: bool, data: bytes, start: int, end: int) -> str | None:
        message = rtnl.decode_address(data, start, end)
        device = self.devices.get(message.index)
        if device is None:
            name = self._names.name(message.index)
            return f"addresses of {name} changed" if not new and name in self._carriers else None
        if (
            message.scope != rtnl.RT_SCOPE_UNIVERSE
            or (message.subnet.address, message.subnet.bits) not in self.networks
        ):
            return None
        return self._judge(new, InterfaceAddress(device, message.subnet), surplus_is_ours=True)

    def about_host(self, kind: int, data: bytes, start: int, end: int) -> str | None:
        """Which device that is not ours a link or address notification is about."""
        if kind in (rtnl.RTM_NEWLINK, rtnl.RTM_DELLINK):
            name = rtnl.decode_link(data, start, end).name
            return None if name in self.scope.devices else f"device {name} changed"
        if kind in (rtnl.RTM_NEWADDR, rtnl.RTM_DELADDR):
            index = rtnl.decode_address(data, start, end).index
            return None if index in self.devices else f"addresses of {self._names.name(index) or 'a device'} changed"
        return None


class Monitor:
    """Reads notifications in the running event loop until closed. own_port: the port id of our changes."""

    def __init__(self, expectation: Expectation, own_port: int) -> None:
        self._expectation = expectation
        self._own_port = own_port
        self._changed: Callback | None = None
        self._host_changed: Callback | None = None
        self._filter: list[tuple[int, int, int, int]] = []
        self._loop = asyncio.get_running_loop()
        self._netlink = Netlink(_GROUPS)
        self._loop.add_reader(self._netlink.fileno(), self._read)

    def on_change(self, changed: Callback) -> None:
        """Call `changed(why)` when what is ours may have been changed."""
        self._changed = changed

    def on_host_change(self, changed: Callback) -> None:
        """Call `changed(why)` when devices that are not ours, or their addresses, changed."""
        self._host_changed = changed

    def refine(self) -> None:
        """Have the kernel drop what can't concern the expectation as it now is."""
        expectation = self._expectation
        program = irrelevant(self._own_port, expectation.devices, expectation.scope.networks)
        if program != self._filter:
            self._filter = program
            self._netlink.attach_filter(program)

    def close(self) -> None:
        """Stop reading."""
        self._loop.remove_reader(self._netlink.fileno())
        self._netlink.close()

    def _read(self) -> None:
        # What is left after so many is read at the next turn of the event loop.
        why = host = None
        try:
            for _ in range(_PER_WAKE_UP):
                data = self._netlink.receive()
                if data is None:
                    break
                length, kind, _, _, port = HEADER.unpack_from(data, 0)
                if self._host_changed and not host and kind < rtnl.RTM_NEWROUTE:
                    host = self._expectation.about_host(kind, data, 16, length)
                if not why and port != self._own_port:
                    why = self._expectation.contradicted(kind, data, 16, length)
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
            why = host = "notifications were lost"
        except MALFORMED as error:
            why = host = f"a notification can't be read ({type(error).__name__})"
        if why and self._changed:
            self._changed(why)
        if host and self._host_changed:
            self._host_changed(host)


# Classic BPF, as far as needed (linux/filter.h). The program loads words in network byte order.
_LOAD_WORD, _LOAD_HALF, _LOAD_BYTE = 0x20, 0x28, 0x30
_AND, _JUMP, _JUMP_EQUAL, _RETURN = 0x54, 0x05, 0x15, 0x06
_KIND, _PORT, _FAMILY, _NEIGHBOR_INDEX, _ATTRIBUTE, _DESTINATION = 4, 12, 16, 20, 36, 40
_RTA_DST = 1


def irrelevant(
    own_port: int, devices: Mapping[int, str], networks: tuple[Subnet, ...]
) -> list[tuple[int, int, int, int]]:
    """A program that drops what we did ourselves, neighbors of other devices, and routes to outside the networks.

    A notification is one message. A route's starts with its table (8 bytes) and goes on with its destination; one that is
    laid out otherwise is kept.
    """
    drop, keep = (_RETURN, 0, 0, 0), (_RETURN, 0, 0, 0xFFFFFFFF)

    def unless(value: int, skip: int) -> tuple[int, int, int, int]:
        return (_JUMP_EQUAL, 0, skip, value)

    neighbors = [(_LOAD_WORD, 0, 0, _NEIGHBOR_INDEX)]
    for index in devices:
        neighbors += [unless(socket.htonl(index), 1), keep]
    neighbors.append(drop)

    destinations: list[tuple[int, int, int, int]] = [
        (_LOAD_HALF, 0, 0, _ATTRIBUTE + 2),
        unless(socket.htons(_RTA_DST), 1),
    ]
    destinations += [(_JUMP, 0, 0, 1), keep]
    for network in networks:
        # The first 32 bits decide; what passes is looked at again.
        mask = (0xFFFFFFFF << (32 - min(network.length, 32))) & 0xFFFFFFFF
        first = int.from_bytes(network.address[:4], "big") & mask
        destinations += [(_LOAD_BYTE, 0, 0, _FAMILY), unless(network.family, 4)]
        destinations += [(_LOAD_WORD, 0, 0, _DESTINATION), (_AND, 0, 0, mask), unless(first, 1), keep]
    destinations.append(drop)

    program = [(_LOAD_WORD, 0, 0, _PORT), unless(socket.htonl(own_port), 1), drop, (_LOAD_HALF, 0, 0, _KIND)]
    for kinds, part in (
        ((rtnl.RTM_NEWNEIGH, rtnl.RTM_DELNEIGH), neighbors),
        ((rtnl.RTM_NEWROUTE, rtnl.RTM_DELROUTE), destinations),
    ):
        program += [(_JUMP_EQUAL, 2, 0, socket.htons(kinds[0])), (_JUMP_EQUAL, 1, 0, socket.htons(kinds[1]))]
        program += [(_JUMP, 0, 0, len(part)), *part]
    return [*program, keep]
