"""The fast path of containers (--fast-path) beside a backend: derived from what the backend itself plans. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from wincey.backends.base import HostFacts
from wincey.backends.hostgw import HostGwBackend
from wincey.backends.udp import UdpBackend
from wincey.model.address import Subnet
from wincey.model.fastpath import FastPath
from wincey.model.lease import LeaseKey
from wincey.model.state import Link, Object
from wincey.model.udp import BpfTunnel

_UNKNOWN = Subnet(bytes(4), 0)


def fast_path(
    objects: Iterable[Object], *, backend: str, network: Subnet | None, own: LeaseKey, host: HostFacts, mark: int
) -> FastPath:
    """What exists for the fast path of a host whose backend has planned `objects` for it. network: the IPv4 one."""
    if network is None or own.v4 is None or host.local is None:
        return _none("it carries IPv4, which this network has not")
    planned = list(objects)
    for item in planned:
        if isinstance(item, BpfTunnel):
            return FastPath(
                network, own.v4.masked(), item.underlay, item.local, mark, "udp", item.device, port=item.port
            )
        if isinstance(item, Link) and item.vxlan and len(item.vxlan.local) == 4:
            vxlan = item.vxlan
            limit = "group policy (GBP) puts the packet mark into the headers" if vxlan.gbp else ""
            return FastPath(
                network,
                own.v4.masked(),
                vxlan.underlay,
                vxlan.local,
                mark,
                "vxlan",
                item.name,
                port=vxlan.port,
                vni=vxlan.vni,
                limit=limit,
            )
    if backend == HostGwBackend.type:
        return FastPath(network, own.v4.masked(), host.underlay, host.local, mark)
    if backend == UdpBackend.type:
        # What leaves a process, or a device that finishes packets for one, is not what the programs could make.
        return _none("with the udp backend it needs --udp-engine=bpf, which is not what this host has")
    return _none(f"there is none for the backend {backend}: it serves vxlan, host-gw and udp")


def _none(reason: str) -> FastPath:
    return FastPath(_UNKNOWN, _UNKNOWN, "", bytes(4), lacking=reason)
