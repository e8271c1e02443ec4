"""The reconciler's driver for BpfTunnel and BpfRoute: the programs of c/udp.c, their maps, and the pairs that they send through.

Everything is read back from the kernel when it is observed: attachments by their pins, devices by their names, addresses and
indices of devices from the map that the programs read, peers from the trie. A program without its tunnel does no harm: what it does
not take goes to the keeper. So what is half done, because we were killed or something was refused, still carries packets.

Order. Setting up: pairs, peers, configuration, then attachments from the far end to the near one: a packet that is redirected
finds its way on. Taking down: the near ends first, then a moment for packets between the ends of a pair, then the rest.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path

import msgspec

from wincey.bpf import pairs
from wincey.bpf.attach import Attachment, device_index
from wincey.bpf.bpffs import alone, owner_directory, sweep
from wincey.bpf.objects import Objects
from wincey.bpf.pairs import Pair
from wincey.bpf.program import read_baked
from wincey.bpf.syscall import BpfError
from wincey.bpf.watch import LinkWatch
from wincey.kernel.netlink import Netlink, NetlinkError
from wincey.kernel.rtnl import get_link
from wincey.model.address import Address, Subnet
from wincey.model.state import Changes, Failure, Key, Object, Scope
from wincey.model.udp import BpfRoute, BpfTunnel

log = logging.getLogger(__name__)

CONFIG = struct.Struct("=4s4s4sIIII2sH6sBx")
"""struct config of c/udp.c: addresses and port in network byte order, the rest in the host's."""

ROUTE_KEY, ROUTE = struct.Struct("=I4s"), struct.Struct("=4sI")
PROCESS = 1
CHECKS = {"off": 0, "network": 1, "strict": 2}
COUNTERS = (
    "out.packets",
    "out.bytes",
    "in.packets",
    "in.bytes",
    "out.cut",
    "out.passed",
    "in.passed",
    "in.drop.source",
    "out.drop.error",
)
"""By index in the map. passed: to the keeper, which counts them again. cut: finished for a peer that is a process."""

_FIRST = bytes(4)
_ARPHRD_ETHER = 1
_DRAIN = 0.05  # seconds; a packet takes microseconds from one end of a pair to the other


def pairs_of(device: str) -> tuple[Pair, Pair]:
    """The pairs of a TUN device: for finishing, for merging. Names of devices have at most 15 characters."""
    stem = device[:12]
    return Pair(f"{stem}-f0", f"{stem}-f1", "finishing"), Pair(f"{stem}-m0", f"{stem}-m1", "merging")


def attachments_of(device: str, underlay: str) -> list[Attachment]:
    """Where the programs run, far ends first."""
    finishing, merging = pairs_of(device)
    return [
        Attachment("udp_merge_in", merging.out, "ingress"),
        Attachment("udp_cut_in", finishing.out, "ingress"),
        Attachment("udp_wire_in", underlay, "ingress"),
        Attachment("udp_tun_out", device, "egress"),
    ]


class BpfTunnelDriver:
    """Keeps the programs of one network's udp tunnel. directory: the network's run-time directory, which names the pins.

    tcx: see Objects.
    """

    handles: tuple[type[Object], ...] = (BpfTunnel, BpfRoute)

    def __init__(self, directory: Path, *, tcx: bool = True) -> None:
        self._pins = owner_directory("udp", directory)
        self._tcx = tcx
        self._objects: Objects | None = None
        self._watch = LinkWatch()

    async def observe(self, desired: Mapping[Key, Object], scope: Scope) -> dict[Key, Object]:
        """The tunnel as far as it works, and its peers. What is there but not as it should be is told with an MTU of 0."""
        wanted = next((thing for thing in desired.values() if isinstance(thing, BpfTunnel)), None)
        found: list[Object] = []
        if not self._pins.is_dir():
            self._close()  # what somebody unpinned has to be made anew
        try:
            if wanted and self._pins.is_dir():
                objects = self._opened()
                found = [self._compared(objects, wanted), *self._routes(objects, wanted.device)]
            elif not wanted:
                found = [_surplus(device) for device in self._left(scope)]
        except BpfError as error:
            log.warning("%s", error)
            self._close()
        return {thing.key: thing for thing in found}

    async def apply(self, changes: Changes) -> Sequence[Failure]:
        """Change peers, set up what is to put, take down what is to delete."""
        failures: list[Failure] = []
        gone = [thing for thing in changes.delete if isinstance(thing, BpfTunnel)]
        routes = [thing for thing in changes.put if isinstance(thing, BpfRoute)]
        former = [thing for thing in changes.delete if isinstance(thing, BpfRoute)]
        tunnels = [thing for thing in changes.put if isinstance(thing, BpfTunnel)]
        for thing in gone:
            try:
                await self._take_down(thing.device)
            except BpfError as error:
                failures.append(Failure(thing, str(error)))
        try:
            if (tunnels or routes or former) and not (gone and not tunnels):
                self._put_routes(self._opened(), former, routes)
        except BpfError as error:
            self._close()
            failures += [Failure(thing, str(error)) for thing in routes]
        for tunnel in tunnels:
            try:
                self._set_up(tunnel)
            except BpfError as error:
                self._close()
                failures.append(Failure(tunnel, str(error)))
        return failures

    def watch(self, changed: Callable[[str], None]) -> None:
        """See Driver. Devices that are changed are told at once, all else is found by audits."""
        self._watch.start(changed)

    async def close(self) -> None:
        """See Driver. The programs go on."""
        self._watch.stop()
        self._close()

    def counters(self) -> dict[str, int]:
        """Packets, bytes and drops since the programs were first loaded; nothing while they are not."""
        if self._objects is None:
            return {}
        counters = self._objects.maps["counters"]
        return {name: counters.total(index) for index, name in enumerate(COUNTERS)}

    def _opened(self) -> Objects:
        if self._objects is None:
            objects = Objects(self._pins, read_baked("udp"), tcx=self._tcx)
            try:
                objects.open()
            except BaseException:
                objects.close()
                raise
            self._objects = objects
        return self._objects

    def _close(self) -> None:
        objects, self._objects = self._objects, None
        if objects:
            objects.close()

    def _compared(self, objects: Objects, wanted: BpfTunnel) -> BpfTunnel:
        """As wanted, or with an MTU of 0."""
        places = attachments_of(wanted.device, wanted.underlay)
        right = (
            self._objects is objects
            and objects.maps["config"].get(_FIRST) == _config(wanted)
            and set(objects.maps["hosts"].items()) == _hosts(objects)
            and objects.attached(places) == places
            and objects.others(places) == []
        )
        self._watch.devices = _devices(wanted)
        return wanted if right else msgspec.structs.replace(wanted, mtu=0)

    def _routes(self, objects: Objects, device: str) -> Iterable[BpfRoute]:
        for key, value in objects.maps["routes"].items().items():
            length, address = ROUTE_KEY.unpack(key)
            endpoint, flags = ROUTE.unpack(value)
            yield BpfRoute(device, Subnet(address, length), endpoint, not flags & PROCESS)

    def _left(self, scope: Scope) -> list[str]:
        """Devices that something of a tunnel is there for."""
        left = {each for each in scope.devices if any(pairs.there(pair) for pair in pairs_of(each))}
        if self._pins.is_dir():
            recorded = Objects(self._pins, read_baked("udp")).others(())
            left |= {each.device for each in recorded if each.program == "udp_tun_out"} or {""}
        return sorted(left)

    def _put_routes(self, objects: Objects, former: list[BpfRoute], routes: list[BpfRoute]) -> None:
        """Make before break, and a host is known before its packets are judged."""
        trie, hosts = objects.maps["routes"], objects.maps["hosts"]
        hosts.update({route.endpoint: _FIRST for route in routes})
        trie.update(
            {_route_key(route.subnet): ROUTE.pack(route.endpoint, 0 if route.whole else PROCESS) for route in routes}
        )
        trie.remove(_route_key(route.subnet) for route in former)
        if former:
            hosts.remove(hosts.items().keys() - _hosts(objects))

    def _set_up(self, tunnel: BpfTunnel) -> None:
        with alone(self._pins):
            sweep()
            objects = self._opened()
            objects.open()  # again: what was opened to look at it may be unpinned by now
            self._attach(objects, tunnel)
        self._watch.devices = _devices(tunnel)
        log.info("udp tunnel %s: eBPF programs carry it from here on", tunnel.device)

    def _attach(self, objects: Objects, tunnel: BpfTunnel) -> None:
        finishing, merging = pairs_of(tunnel.device)
        pairs.make(finishing)
        pairs.make(merging, tunnel.underlay)
        hosts = _hosts(objects)
        objects.maps["hosts"].make_equal(dict.fromkeys(hosts, _FIRST))
        config = _config(tunnel)
        if config is None:
            missing = next((each for each in (tunnel.underlay, tunnel.device) if not device_index(each)), tunnel.device)
            raise BpfError(f"device {missing}", errno.ENODEV)
        objects.maps["config"].put(_FIRST, config)
        places = attachments_of(tunnel.device, tunnel.underlay)
        objects.attach(places)
        objects.detach_others(places)
        objects.retire()

    async def _take_down(self, device: str) -> None:
        self._watch.devices = frozenset()
        objects = self._objects or Objects(self._pins, read_baked("udp"))
        near = {"udp_tun_out", "udp_wire_in"}
        objects.detach(each for each in objects.others(()) if each.program in near)
        await asyncio.sleep(_DRAIN)
        objects.remove()
        self._close()
        if device:
            for pair in pairs_of(device):
                pairs.remove(pair)


def _surplus(device: str) -> BpfTunnel:
    return BpfTunnel(device, 0, "", bytes(4), 0, Subnet(bytes(4), 0), "off")


def _config(tunnel: BpfTunnel) -> bytes | None:
    """The map's value; None when one of the devices is not there as it should be. Raises BpfError."""
    finishing, merging = (pairs.look(pair) for pair in pairs_of(tunnel.device))
    underlay, tun = device_index(tunnel.underlay), device_index(tunnel.device)
    if not (finishing and merging and underlay and tun):
        return None
    network = tunnel.network
    bits = (0xFFFFFFFF << (32 - network.length)) & 0xFFFFFFFF
    return CONFIG.pack(
        tunnel.local,
        network.masked().address,
        bits.to_bytes(4, "big"),
        *(underlay, tun, finishing.into, merging.into),
        tunnel.port.to_bytes(2, "big"),
        tunnel.mtu,
        merging.mac,
        CHECKS[tunnel.check],
    )


def _route_key(subnet: Subnet) -> bytes:
    return ROUTE_KEY.pack(subnet.length, subnet.masked().address)


def _hosts(objects: Objects) -> set[Address]:
    """The hosts that the trie leads to."""
    return {ROUTE.unpack(value)[0] for value in objects.maps["routes"].items().values()}


def _devices(tunnel: BpfTunnel) -> frozenset[str]:
    finishing, merging = pairs_of(tunnel.device)
    names = (tunnel.device, tunnel.underlay, finishing.into, finishing.out, merging.into, merging.out)
    return frozenset(names)


def unfit(underlay: str) -> str:
    """Why the programs can't work at this underlay device, "" if they can."""
    with closing(Netlink()) as netlink:
        try:
            _, data, start, _ = netlink.request(get_link(underlay))
        except NetlinkError as error:
            return f"device {underlay}: {error}"
    kind = int(struct.unpack_from("=H", data, start + 2)[0])
    return "" if kind == _ARPHRD_ETHER else f"packets on {underlay} have no Ethernet header (device type {kind})"


async def remove(directory: Path) -> list[Failure]:
    """Remove what is there of the tunnel of that run-time directory."""
    driver = BpfTunnelDriver(directory)
    found = await driver.observe({}, Scope())
    failures = await driver.apply(Changes(delete=list(found.values())))
    await driver.close()
    return list(failures)
