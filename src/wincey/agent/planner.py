"""Config and leases in, objects out: what must exist on this host. Pure."""

from __future__ import annotations

from functools import cached_property

import msgspec

from wincey.agent.company import Others
from wincey.backends.base import Backend, HostFacts
from wincey.backends.catalogue import towards
from wincey.backends.fastpath import fast_path
from wincey.leasing.allocate import Identity
from wincey.model.address import Address, Subnet
from wincey.model.config import NetworkConfig
from wincey.model.errors import BadLease
from wincey.model.fastpath import Engine
from wincey.model.lease import Lease, LeaseAttrs, LeaseKey
from wincey.model.probe import Target
from wincey.model.state import InterfaceAddress, Isolation, Link, Object, Route, RuleSet, Sysctl, Tunnel


class Policy(msgspec.Struct, frozen=True):
    """What the command line says about rules and routes: --ip-masq, --iptables-forward-rules and their like.

    fast_path_mark: the bit of the packet mark that the fast path of containers uses, 0 for no fast path.
    fast_path_engine: what is to carry it.
    """

    masquerade: bool = False
    forward: bool = True
    random_fully: bool = True
    exclude: tuple[Subnet, ...] = ()
    blackhole: bool = False
    fast_path_mark: int = 0
    fast_path_engine: Engine = "auto"


class Planner:
    """The plan of one network on this host, for one config, one set of host facts and one lease.

    others: what the host's other networks have, None where this is the only one by design.
    """

    def __init__(
        self,
        *,
        config: NetworkConfig,
        host: HostFacts,
        backend: Backend,
        identity: Identity,
        own: LeaseKey,
        policy: Policy,
        others: Others | None = None,
    ) -> None:
        self.others = others
        self._config, self._host, self._backend = config, host, backend
        self._identity, self._own, self._policy = identity, own, policy
        self._helpers: list[Backend] = []

    def local(self) -> list[Object]:
        """What exists for the host itself: devices, addresses, rules."""
        objects = self._backend.local(self._own)
        isolation = self._isolation(objects)
        if mark := self._policy.fast_path_mark:
            path = fast_path(
                objects,
                backend=self._backend.type,
                network=self._config.network if self._config.enable_ipv4 else None,
                own=self._own,
                host=self._host,
                mark=mark,
            )
            objects.append(msgspec.structs.replace(path, engine=self._policy.fast_path_engine))
        for network in self._config.networks:
            subnet = next((subnet for subnet in self._own.subnets if subnet.family == network.family), None)
            if subnet is None:
                continue
            if self._policy.blackhole:
                objects.append(Route(subnet, "", kind="blackhole"))
            if self._policy.masquerade or self._policy.forward or isolation:
                objects.append(
                    RuleSet(
                        network=network,
                        subnet=subnet,
                        masquerade=self._policy.masquerade,
                        forward=self._policy.forward,
                        random_fully=self._policy.random_fully,
                        exclude=tuple(cidr for cidr in self._policy.exclude if cidr.family == network.family),
                        isolation=isolation,
                    )
                )
        return objects

    def _isolation(self, local: list[Object]) -> Isolation | None:
        if self.others is None:
            return None
        links = [item for item in local if isinstance(item, Link)]
        ports = [item.port for item in local if isinstance(item, Tunnel)]
        ports += [link.vxlan.port for link in links if link.vxlan]
        return Isolation(
            self.others.ranges, (*(link.name for link in links), self._host.underlay), ports[0] if ports else 0
        )

    def peer(self, lease: Lease) -> list[Object]:
        """What exists for one peer; nothing for our own leases. Raises BadLease when it can't be reached.

        A peer is reached by the backend that it publishes. Where that isn't ours, the helper's device and addresses are
        part of what the peer asks for, and so they go when the last such peer goes.
        """
        if lease.key == self._own or self._identity.owns(lease.attrs):
            return []
        if self._backend.reaches(lease.attrs):
            return self._backend.peer(self._own, lease)
        helper = self._helper(lease.attrs)
        local = helper.local(self._own)
        for link in local:
            if isinstance(link, Link) and self.others and link.name in self.others.devices:
                raise BadLease(f"a peer can only be reached by {link.name}, the device of another network on this host")
        # Each side sends as the other publishes, so packets from such a peer may come in by a device of ours that ours to it
        # do not go out by, which a strict reverse-path filter would drop. The underlay's filter is the administrator's.
        devices = [item.name for item in (*self._backend.local(self._own), *local) if isinstance(item, Link)]
        loose = [Sysctl(f"net/ipv4/conf/{device}/rp_filter", "2") for device in devices]
        return [*local, *loose, *helper.peer(self._own, lease)]

    @cached_property
    def _bases(self) -> frozenset[Address]:
        """Our own addresses in the network: the base of a subnet is one where the backend gives it to a device."""
        local = self._backend.local(self._own)
        return frozenset(each.subnet.address for each in local if isinstance(each, InterfaceAddress))

    def target(self, lease: Lease) -> Target | None:
        """Whom to ask whether a peer can be reached; None for our own leases, and where an address is missing."""
        if lease.key == self._own or self._identity.owns(lease.attrs):
            return None
        host = self._host
        for own, theirs, local, public in (
            (self._own.v4, lease.key.v4, host.local, lease.attrs.public_ip),
            (self._own.v6, lease.key.v6, host.local_v6, lease.attrs.public_ipv6),
        ):
            if own and theirs and local and public:
                inner = own.address in self._bases and self._backend.reaches(lease.attrs)
                return Target(
                    (own.address, theirs.address) if inner else None, (local, public), self._backend.mtu, host.mtu
                )
        return None

    def _helper(self, attrs: LeaseAttrs) -> Backend:
        helper = next((helper for helper in self._helpers if helper.reaches(attrs)), None)
        if helper is None:
            helper = towards(attrs, self._config, self._host)
            self._helpers.append(helper)
        return helper
