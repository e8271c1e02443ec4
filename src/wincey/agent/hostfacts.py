"""What backends may know of this host, read from the kernel and chosen as the command line wishes."""

from __future__ import annotations

import logging

import msgspec

from wincey.agent.interface import choose
from wincey.backends.base import HostFacts
from wincey.kernel.interfaces import connected_subnets, default_route_interface, read_interfaces, route_to
from wincey.kernel.release import kernel_release
from wincey.model.address import Address, MacAddress, Subnet
from wincey.model.config import BackendOptions, NetworkConfig
from wincey.model.errors import NotJoinable

log = logging.getLogger(__name__)

_REMEMBERED = 8
"""Backends of earlier configs to keep in mind: more than a cluster is ever between."""


class Wishes(msgspec.Struct, frozen=True):
    """The flags about interface and addresses, named as they are."""

    iface: tuple[str, ...] = ()
    iface_regex: tuple[str, ...] = ()
    iface_can_reach: Address | None = None
    public_ip: Address | None = None
    public_ipv6: Address | None = None


class HostLook:
    """Reads the host's facts, again and again; says why that interface and address whenever the answer is new."""

    def __init__(self, wishes: Wishes, macs: dict[str, MacAddress], tun: str = "flannel0") -> None:
        self._wishes, self._macs, self._tun = wishes, macs, tun
        self._known: list[tuple[str, BackendOptions]] = []
        self._told = ""

    def __call__(self, config: NetworkConfig) -> HostFacts:
        """Raises NotJoinable when no interface will do, and when the host can't be looked at."""
        try:
            interfaces = read_interfaces()
            choice = choose(
                interfaces,
                ipv4=config.enable_ipv4,
                ipv6=config.enable_ipv6,
                default_route=default_route_interface,
                route_to=route_to,
                **msgspec.structs.asdict(self._wishes),
            )
            connected = self._connected(config)
        except OSError as error:
            reason = error.strerror or error
            raise NotJoinable(f"the network interfaces of this host can't be read: {reason}") from error
        if choice.reason != self._told:
            log.info("%s", choice.reason)
            self._told = choice.reason
        for interface in interfaces:  # a device of ours that is there keeps its MAC, unless we know better
            if interface.kind == "vxlan" and interface.name not in self._macs:
                self._macs[interface.name] = interface.mac
        backend = (config.backend_type, config.backend)
        if backend not in self._known[:1]:
            self._known.insert(0, backend)
            del self._known[_REMEMBERED:]
        return HostFacts(
            underlay=choice.interface,
            mtu=choice.mtu,
            local=choice.local,
            local_v6=choice.local_v6,
            public=choice.public,
            public_v6=choice.public_v6,
            connected=connected,
            macs=self._macs,
            kernel=kernel_release(),
            known=self._known,
            tun=self._tun,
        )

    def _connected(self, config: NetworkConfig) -> tuple[tuple[Subnet, str], ...]:
        # Only direct routing asks; without it, bridges that come and go are none of a backend's business.
        if not config.backend.boolean("DirectRouting", default=False):
            return ()
        return tuple(
            (subnet, device)
            for subnet, device in connected_subnets()
            if not any(subnet.overlaps(network) for network in config.networks)
        )
