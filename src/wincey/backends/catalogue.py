"""Every backend by the name in the config, and which ways exist to reach a peer that uses another one."""

from __future__ import annotations

import msgspec

from wincey.backends.alloc import AllocBackend
from wincey.backends.base import Backend, HostFacts
from wincey.backends.hostgw import HostGwBackend
from wincey.backends.udp import UdpBackend
from wincey.backends.vxlan import VxlanBackend, read_data
from wincey.model.config import BackendOptions, NetworkConfig
from wincey.model.errors import BadLease, UnknownBackend, WinceyError
from wincey.model.lease import LeaseAttrs

BACKENDS: dict[str, type[Backend]] = {
    backend.type: backend for backend in (VxlanBackend, HostGwBackend, UdpBackend, AllocBackend)
}

NOT_YET = ("wireguard", "ipsec", "ipip", "aws-vpc", "gce", "ali-vpc", "tencent-vpc", "extension")


def make(config: NetworkConfig, host: HostFacts) -> Backend:
    """The backend that the config asks for; raises UnknownBackend, BadConfig, NotJoinable."""
    backend = BACKENDS.get(config.backend_type)
    if backend is None:
        known = ", ".join(sorted(BACKENDS))
        why = "is not built yet" if config.backend_type in NOT_YET else "is unknown"
        raise UnknownBackend(f"Backend.Type {config.backend_type!r} {why}; use one of {known}")
    return backend(config, host)


def towards(attrs: LeaseAttrs, config: NetworkConfig, host: HostFacts) -> Backend:
    """The way to a peer that uses another backend than ours, with what its lease tells and defaults for the rest.

    Raises BadLease when this host has no such way. A lease without a type is one of udp (or of a backend that needs no
    help from us).
    """
    kind = attrs.backend_type or UdpBackend.type
    options: dict[str, object] = {"Type": kind}
    if kind == VxlanBackend.type:
        data = read_data(attrs.backend_data or attrs.backend_v6_data)
        options["VNI"] = 1 if data.VNI is None else data.VNI
    elif kind not in {HostGwBackend.type, UdpBackend.type}:
        raise BadLease(f"a peer uses the backend {kind!r}, which this host has no way to reach")
    theirs = msgspec.structs.replace(config, backend_type=kind, backend=BackendOptions.of(options))
    try:
        return BACKENDS[kind](theirs, host)
    except WinceyError as error:
        raise BadLease(f"a peer uses the backend {kind!r}, which this host can't reach: {error}") from None
