"""bgp: hosts announce their subnet by BGP and learn the others', through BIRD or FRR on the host.

Config keys: ASN (64512), Port (179), Password, HoldTime (30 s), BFD (false), Daemon (auto, bird, frr), Instance (own,
host), Include and Control (of the host's BIRD), Peers (routers that each host peers with), PeerASN (that of the hosts),
PeerPort (179), Mesh (true unless there are Peers): whether hosts peer with one another.

A neighbour carries the routes of its own address's family, so a dual-stack host has two sessions with each. Nothing is
encapsulated: the routes are those of host-gw, and it is the routing daemon that puts them into the kernel.
"""

from __future__ import annotations

import re
import socket
from typing import Any, ClassVar, Literal

from wincey.backends.base import HostFacts, public_attrs, require_own_address
from wincey.backends.hostgw import HostGwBackend
from wincey.model.address import Address, family_of, format_address, parse_address
from wincey.model.bgp import Accepted, BgpPeer, BgpRoute, BgpSession, BgpSpeaker
from wincey.model.config import NetworkConfig
from wincey.model.errors import BadAddress, BadConfig, BadLease, NotJoinable
from wincey.model.lease import Lease, LeaseAttrs, LeaseKey
from wincey.model.secret import Secret
from wincey.model.state import Object

PORT = 179
ASN = 64512
"""The first of the AS numbers for private use (RFC 6996)."""

DAEMONS = ("auto", "bird", "frr")
ROUTING_DAEMON = "routing-daemon"
"""The name in HostFacts.found of the routing daemon that this host has."""

NEAR_ROUTERS = "near-routers"
"""The same of the routers that it reaches without a gateway, with blanks between."""

_PASSWORD = re.compile(r"[!#-&(->@-\[\]-~]{1,80}\Z")
"""What TCP has room for, without what either program's configuration reads as its own: blanks, quotes, ? and backslashes."""


class BgpBackend:
    """Routes by BGP."""

    type: ClassVar[str] = "bgp"
    keys: ClassVar[tuple[str, ...]] = (
        "ASN",
        "Port",
        "Password",
        "HoldTime",
        "BFD",
        "Daemon",
        "Instance",
        "Include",
        "Control",
        "Peers",
        "PeerASN",
        "PeerPort",
        "Mesh",
    )

    def __init__(self, config: NetworkConfig, host: HostFacts) -> None:
        options = config.backend
        self._config, self._host = config, host
        self._asn = options.integer("ASN", ASN, minimum=1, maximum=4_294_967_294)
        self._port = options.integer("Port", PORT, minimum=1, maximum=65535)
        self._password = Secret(_password(config))
        self._hold = options.integer("HoldTime", 30, minimum=3, maximum=65535)
        self._bfd = options.boolean("BFD", default=False)
        self._daemon, self._instance = _which(config, host.found.get(ROUTING_DAEMON, "bird"))
        self._include = options.text("Include", "/etc/bird/wincey.conf")
        self._control = options.text("Control", "/run/bird/bird.ctl")
        self._routers = routers(config)
        self._peer_asn = options.integer("PeerASN", self._asn, minimum=1, maximum=4_294_967_294, example=ASN + 1)
        self._peer_port = options.integer("PeerPort", PORT, minimum=1, maximum=65535)
        self._mesh = options.boolean("Mesh", default=not self._routers)
        if not self._mesh and not self._routers:
            raise BadConfig(
                "network config: Backend.Mesh is false and there are no Backend.Peers, so that no host would learn a route;"
                ' name a route reflector or router, as in "Peers": ["10.99.0.254"]'
            )
        require_own_address(config, host, self.type)

    @property
    def mtu(self) -> int:
        return self._host.mtu

    def attrs(self) -> LeaseAttrs:
        return public_attrs(self._host, self._config, self.type)

    def reaches(self, attrs: LeaseAttrs) -> bool:
        return attrs.backend_type == self.type

    def local(self, own: LeaseKey) -> list[Object]:
        config, host = self._config, self._host
        accepted = [
            Accepted(network, length)
            for network, length in ((config.network, config.subnet_len), (config.ipv6_network, config.ipv6_subnet_len))
            if network
        ]
        host_instance = self._instance == "host"
        speaker = BgpSpeaker(
            daemon=self._daemon,
            instance=self._instance,
            asn=self._asn,
            port=self._port,
            router_id=_router_id(host),
            local=host.local if config.enable_ipv4 else None,
            local_v6=host.local_v6 if config.enable_ipv6 else None,
            subnets=own.subnets,
            accepted=tuple(accepted),
            password=self._password,
            hold=self._hold,
            bfd=self._bfd,
            include=self._include if host_instance else "",
            control=self._control if host_instance else "",
        )
        near = self._near_routers()
        peers = [BgpPeer(address, self._peer_asn, self._peer_port) for address in near]
        return [speaker, *peers, *(BgpSession(address) for address in near)]

    def _near_routers(self) -> list[Address]:
        """The routers to peer with: those of another AS only where they are on our link, as those of other racks are not."""
        near = self._host.found.get(NEAR_ROUTERS, "").split()
        if self._peer_asn == self._asn or not near:
            return list(self._routers)
        return [address for address in self._routers if format_address(address) in near]

    def peer(self, own: LeaseKey, lease: Lease) -> list[Object]:
        objects: list[Object] = []
        public: dict[int, Address | None] = {
            socket.AF_INET: lease.attrs.public_ip,
            socket.AF_INET6: lease.attrs.public_ipv6,
        }
        for subnet in lease.key.subnets:
            address = public[subnet.family]
            if subnet.family not in {each.family for each in own.subnets}:
                continue
            if not address:
                name = "PublicIP" if subnet.family == socket.AF_INET else "PublicIPv6"
                raise BadLease(f"lease {lease.key} names no {name}")
            if self._mesh:
                objects.append(BgpPeer(address, self._asn, self._port, (subnet,)))
            # A reflector leaves the next hop as it is, a router of another AS may put itself in its place.
            told = self._mesh or self._peer_asn == self._asn
            objects.append(
                BgpRoute(subnet, gateway=address if told else None, neighbour=address if self._mesh else None)
            )
        return objects


class BgpByPlainRoutes(HostGwBackend):
    """How a host of another backend reaches a host of this one during a change: as the learned route would have it."""

    type: ClassVar[str] = BgpBackend.type


def asked_for(config: NetworkConfig) -> tuple[str, str]:
    """Daemon (auto, bird, frr) and Instance (own, host) as the config has them; raises BadConfig."""
    options = config.backend
    daemon, instance = options.text("Daemon", "auto").lower(), options.text("Instance", "own").lower()
    if daemon not in DAEMONS:
        options.wrong("Daemon", "must be auto, bird or frr", "bird")
    if instance not in {"own", "host"}:
        options.wrong("Instance", "must be own or host", "own")
    if instance == "host" and daemon == "frr":
        options.wrong("Instance", "can be host with BIRD only, as FRR's configuration includes no other file", "own")
    return daemon, instance


def _which(config: NetworkConfig, found: str) -> tuple[Literal["bird", "frr"], Literal["own", "host"]]:
    daemon, instance = asked_for(config)
    if instance == "host":
        return "bird", "host"
    return "frr" if (found if daemon == "auto" else daemon) == "frr" else "bird", "own"


def _password(config: NetworkConfig) -> str:
    password = config.backend.text("Password", "")
    if password and not _PASSWORD.match(password):
        # BackendOptions.wrong would show it.
        raise BadConfig(
            "network config: Backend.Password can't be used: it must be 1 to 80 ASCII letters, digits and signs without"
            " blanks, quotes, question marks and backslashes"
        )
    return password


def routers(config: NetworkConfig) -> tuple[Address, ...]:
    """The Peers of the config; raises BadConfig."""
    given: Any = config.backend.raw("Peers")
    rule = "must be a list of the addresses of routers, of a family that the network has"
    if given is None:
        return ()
    if not isinstance(given, list) or not all(isinstance(each, str) for each in given):
        config.backend.wrong("Peers", rule, ["10.99.0.254"])
    families = {network.family for network in config.networks}
    try:
        found = [parse_address(each) for each in given]
    except BadAddress:
        found = [b""]
    if any(len(each) not in (4, 16) or family_of(each) not in families for each in found):
        config.backend.wrong("Peers", rule, ["10.99.0.254"])
    return tuple(dict.fromkeys(found))


def _router_id(host: HostFacts) -> Address:
    """Four bytes that no other speaker has (RFC 6286): the IPv4 address, or the tail of the IPv6 one."""
    if host.local:
        return host.local
    if host.local_v6 and any(host.local_v6[-4:]):
        return host.local_v6[-4:]
    raise NotJoinable(f"the bgp backend needs an address on {host.underlay}")
