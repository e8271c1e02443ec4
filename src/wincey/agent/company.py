"""What several networks on one host have to agree on: address ranges, devices, ports. Pure.

A network takes what its config needs before anything is made of it; what another network has taken is refused, with both
named. Whoever was there first keeps it, and the other waits: for another config of its own, or for the first to leave.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Iterable

import msgspec

from wincey.backends.ipip import DEVICE as IPIP_DEVICE
from wincey.backends.ipip import IpipBackend
from wincey.backends.udp import PORT as UDP_PORT
from wincey.backends.udp import UdpBackend
from wincey.backends.vxlan import PORT as VXLAN_PORT
from wincey.backends.vxlan import VxlanBackend, device_name
from wincey.model.address import Subnet
from wincey.model.config import NetworkConfig
from wincey.model.errors import BadConfig

SINGLE = frozenset({"wireguard", "ipip", "ipsec", "bgp", "ovs"})
"""Backends whose device, socket or program has one fixed name or port on a host."""

_FAMILIES = (socket.AF_INET, socket.AF_INET6)


class NetworkConflict(BadConfig):
    """A network needs what another one on this host has; both are named."""


class Taken(msgspec.Struct, frozen=True):
    """What a config needs for itself. vni, udp_port: None where the backend has none."""

    ranges: tuple[Subnet, ...]
    backend: str
    vni: int | None = None
    udp_port: int | None = None

    @classmethod
    def by(cls, config: NetworkConfig) -> Taken:
        """Raises BadConfig for a backend's key that can't be read."""
        options, kind = config.backend, config.backend_type
        if kind == VxlanBackend.type:
            port = options.integer("Port", 0, minimum=0, maximum=65535) or VXLAN_PORT
            return cls(config.networks, kind, options.integer("VNI", 1, minimum=0, maximum=0xFFFFFF), port)
        if kind == UdpBackend.type:
            return cls(config.networks, kind, None, options.integer("Port", UDP_PORT, minimum=1, maximum=65535))
        return cls(config.networks, kind)

    def conflict(self, other: Taken) -> str:
        """What both need, and what to do; "" if nothing."""
        for mine in self.ranges:
            for theirs in other.ranges:
                if mine.overlaps(theirs):
                    return f"their address ranges overlap ({mine} and {theirs}): give one of them another range"
        if self.backend == other.backend and self.backend in SINGLE:
            return (
                f"both have the backend {self.backend}, of which a host can have one: give one of them another backend"
            )
        if self.vni is not None and self.vni == other.vni:
            return f'both have the VNI {self.vni}: give one of them another, like {{"Type": "vxlan", "VNI": 42}}'
        # Any number of vxlan devices share a port; a udp tunnel shares it with nobody.
        if self.udp_port and self.udp_port == other.udp_port and UdpBackend.type in {self.backend, other.backend}:
            return f"both use the UDP port {self.udp_port}: give one of them another Port in its Backend"
        return ""


class Others(msgspec.Struct, frozen=True):
    """What the other networks of a host have: their ranges, in order, and their devices that a peer might ask for too."""

    ranges: tuple[Subnet, ...] = ()
    devices: frozenset[str] = frozenset()


class Company:
    """The networks of one host."""

    def __init__(self) -> None:
        self._taken: dict[str, Taken] = {}
        self._tuns: dict[str, str] = {}
        self._listeners: dict[str, Callable[[], None]] = {}

    def seat(self, name: str) -> Seat:
        """A network's place among the others."""
        return Seat(self, name)

    def take(self, name: str, config: NetworkConfig) -> None:
        """Take what a config needs, in place of what the network had before; raises NetworkConflict, BadConfig."""
        wanted = Taken.by(config)
        for other, taken in self._taken.items():
            if other != name and (reason := wanted.conflict(taken)):
                raise NetworkConflict(f"network {name} can't be joined beside network {other}: {reason}")
        if wanted != self._taken.get(name):
            self._taken[name] = wanted
            self._tell(name)

    def release(self, name: str) -> None:
        """The network has left."""
        self._tuns.pop(name, None)
        if self._taken.pop(name, None):
            self._tell(name)

    def others(self, name: str) -> Others:
        """What all other networks have."""
        others = [taken for other, taken in self._taken.items() if other != name]
        ranges = sorted((each for taken in others for each in taken.ranges), key=lambda one: (one.bits, one.first))
        vnis = [taken.vni for taken in others if taken.vni is not None]
        devices = {device_name(vni, family) for vni in vnis for family in _FAMILIES}
        if any(taken.backend == IpipBackend.type for taken in others):
            devices.add(IPIP_DEVICE)
        return Others(tuple(ranges), frozenset(devices))

    def tun(self, name: str, remembered: Iterable[str]) -> str:
        """A name for a TUN device that no other network has: the one that it had before, else the first free one."""
        used = {tun for other, tun in self._tuns.items() if other != name}
        before = sorted(device for device in remembered if re.fullmatch(r"flannel\d+", device))
        numbers = (f"flannel{number}" for number in range(len(used) + 1))
        self._tuns[name] = next(device for device in (*before, *numbers) if device not in used)
        return self._tuns[name]

    def listen(self, name: str, changed: Callable[[], None] | None) -> None:
        """Have `changed` called when the others' ranges change or something gets free; None: no more."""
        if changed:
            self._listeners[name] = changed
        else:
            self._listeners.pop(name, None)

    def _tell(self, name: str) -> None:
        for other, changed in list(self._listeners.items()):
            if other != name:
                changed()


class Seat:
    """One network's view of its company."""

    def __init__(self, company: Company, name: str) -> None:
        self.name = name
        self._company = company

    def take(self, config: NetworkConfig) -> None:
        """See Company.take."""
        self._company.take(self.name, config)

    def others(self) -> Others:
        """See Company.others."""
        return self._company.others(self.name)

    def tun(self, remembered: Iterable[str]) -> str:
        """See Company.tun."""
        return self._company.tun(self.name, remembered)

    def listen(self, changed: Callable[[], None] | None) -> None:
        """See Company.listen."""
        self._company.listen(self.name, changed)
