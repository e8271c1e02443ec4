"""Every backend by the name in the config, and which ways exist to reach a peer that uses another one."""

from __future__ import annotations

import msgspec

from wincey.backends.alivpc import AliVpcBackend
from wincey.backends.alloc import AllocBackend
from wincey.backends.awsvpc import AwsVpcBackend
from wincey.backends.base import Backend, HostFacts
from wincey.backends.bgp import BgpBackend, BgpByPlainRoutes
from wincey.backends.cloud import CloudBackend, Unaided
from wincey.backends.extension import ExtensionBackend
from wincey.backends.gce import GceBackend
from wincey.backends.hostgw import HostGwBackend
from wincey.backends.ipip import IpipBackend
from wincey.backends.ipsec import IpsecBackend
from wincey.backends.ovs import OvsBackend
from wincey.backends.tencentvpc import TencentVpcBackend
from wincey.backends.udp import UdpBackend
from wincey.backends.vxlan import VxlanBackend, read_vni
from wincey.backends.wireguard import WireguardBackend
from wincey.model.config import BackendOptions, NetworkConfig
from wincey.model.errors import BadLease, UnknownBackend, WinceyError
from wincey.model.lease import LeaseAttrs

BACKENDS: dict[str, type[Backend]] = {
    backend.type: backend
    for backend in (
        VxlanBackend,
        HostGwBackend,
        UdpBackend,
        AllocBackend,
        BgpBackend,
        ExtensionBackend,
        AwsVpcBackend,
        GceBackend,
        TencentVpcBackend,
        AliVpcBackend,
        IpipBackend,
        IpsecBackend,
        WireguardBackend,
        OvsBackend,
    )
}


def make(config: NetworkConfig, host: HostFacts) -> Backend:
    """The backend that the config asks for; raises UnknownBackend, BadConfig, NotJoinable."""
    backend = BACKENDS.get(config.backend_type)
    if backend is None:
        known = ", ".join(sorted(BACKENDS))
        raise UnknownBackend(f"Backend.Type {config.backend_type!r} is unknown; use one of {known}")
    return backend(config, host)


def towards(attrs: LeaseAttrs, config: NetworkConfig, host: HostFacts) -> Backend:
    """The way to a peer that uses another backend than ours. Raises BadLease when this host has no such way.

    A lease tells neither port nor MTU. Who is late with a change of the config still has what an earlier config said, so
    those that this host has seen count first, then defaults. A lease without a type is one of udp (or of a backend that
    needs no help from us).
    """
    kind = attrs.backend_type or UdpBackend.type
    if issubclass(BACKENDS.get(kind, object), CloudBackend):  # the cloud's own network sees to it
        return Unaided(config, host, kind)
    if kind == BgpBackend.type:
        return BgpByPlainRoutes(config, msgspec.structs.replace(host, public=host.local, public_v6=host.local_v6))
    if kind not in {VxlanBackend.type, HostGwBackend.type, UdpBackend.type, IpipBackend.type}:
        raise BadLease(f"a peer uses the backend {kind!r}, which this host has no way to reach")
    if kind == HostGwBackend.type:  # what it demands of our public address is for being reached, not for reaching
        host = msgspec.structs.replace(host, public=host.local, public_v6=host.local_v6)
    vni = read_vni(attrs) if kind == VxlanBackend.type else None
    seen = [options for known, options in host.known if known == kind]
    seen.sort(key=lambda options: options.raw("VNI") not in (vni, None if vni == 1 else vni))  # that device's own first
    for options in [*seen, BackendOptions({})]:
        try:
            return BACKENDS[kind](_with(config, kind, options, vni), host)
        except WinceyError as error:  # a config that was refused was seen too
            reason = error
    raise BadLease(f"a peer uses the backend {kind!r}, which this host can't reach: {reason}")


def _with(config: NetworkConfig, kind: str, options: BackendOptions, vni: int | None) -> NetworkConfig:
    values = options.values if vni is None else options.values | {"vni": ("VNI", vni)}
    # One that carries IPv4 only is still the way to the IPv4 part of a peer that is late with a change to dual stack.
    v4_only = config.enable_ipv4 and kind in {UdpBackend.type, IpipBackend.type}
    return msgspec.structs.replace(
        config,
        backend_type=kind,
        backend=BackendOptions(values),
        enable_ipv6=config.enable_ipv6 and not v4_only,
    )
