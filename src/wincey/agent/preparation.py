"""From a config to everything that follows from it on this host, before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import msgspec

from wincey.agent.company import Seat
from wincey.agent.once import Once
from wincey.agent.statefile import State
from wincey.backends.base import Backend, HostFacts
from wincey.backends.catalogue import make
from wincey.backends.vxlan import published_macs
from wincey.leasing.allocate import Identity
from wincey.model.address import format_mac
from wincey.model.config import NetworkConfig
from wincey.model.errors import BadConfig
from wincey.model.lease import Lease
from wincey.store.registry import LeaseStore, Snapshot


class Look(Protocol):
    """Finds the interface and the addresses for a config; raises NotJoinable."""

    def __call__(self, config: NetworkConfig) -> HostFacts: ...


class Ask(Protocol):
    """Finds what one backend alone has to know of the host; raises BadConfig and NotJoinable."""

    async def __call__(self, config: NetworkConfig, facts: HostFacts) -> Mapping[str, str]: ...


async def ask_nothing(config: NetworkConfig, facts: HostFacts) -> Mapping[str, str]:
    """For backends that need no more than every one gets."""
    return {}


class Prepared(msgspec.Struct):
    """A config that works on this host. raw: its bytes, or those of a later one that was refused.

    awaits_host: that one was refused for what this host lacks, and may work once the host has changed.
    """

    raw: bytes
    config: NetworkConfig
    facts: HostFacts
    backend: Backend
    awaits_host: bool = False

    @property
    def identity(self) -> Identity:
        """Who we are in the families of the network."""
        facts, config = self.facts, self.config
        return Identity(facts.public if config.enable_ipv4 else None, facts.public_v6 if config.enable_ipv6 else None)


class Preparation:
    """Considers configs. seat: the network's place among the host's networks, None where it is the only one."""

    def __init__(
        self, registry: LeaseStore, look: Look, state: State, once: Once, *, ask: Ask, seat: Seat | None = None
    ) -> None:
        self._ask, self._seat = ask, seat
        self._key, self._look, self._state, self._once = registry.config_key, look, state, once

    async def consider(self, snapshot: Snapshot, held: Lease | None = None) -> Prepared:
        """Raises BadConfig, UnknownBackend, NotJoinable, NetworkConflict. held: the lease that this host has, if any."""
        if snapshot.config is None:
            raise BadConfig(no_config(self._key))
        config = NetworkConfig.parse(snapshot.config)
        for warning in config.warnings:
            self._once.warn(self._key, warning)
        facts = self._look(config)
        facts = msgspec.structs.replace(facts, found=await self._ask(config, facts))
        prepared = Prepared(snapshot.config, config, facts, make(config, facts))
        if self._seat:
            self._seat.take(config)
        for warning in config.backend.unknown_keys(("Type", *prepared.backend.keys)):
            self._once.warn(self._key, warning)

        def is_own(lease: Lease) -> bool:
            same = held is not None and (lease.key, lease.attrs) == (
                held.key,
                held.attrs,
            )  # our address may have changed
            return same or prepared.identity.owns(lease.attrs)

        own = [lease for lease in snapshot.leases.values() if is_own(lease)]
        for lease in own:
            macs = published_macs(lease.attrs)
            # Peers know our devices by what our lease says, whoever wrote it: an earlier Wincey or flannel.
            self._state.macs.update(macs)
            self._state.devices.update(macs)
        since = min((lease.created for lease in own), default=None)
        for lease in snapshot.leases.values():
            if (since is None or lease.created < since) and self.is_double(lease) and not is_own(lease):
                for mac in published_macs(lease.attrs).values():
                    self._state.macs.change(mac)
                self._once.warn(
                    str(lease.key),
                    "its MAC address was that of this host, which has another one now (a copied machine?)",
                )
        return prepared

    def is_double(self, lease: Lease) -> bool:
        """Whether a lease publishes a MAC address of ours. Peers know one host only by each, so the later one must yield."""
        data = (lease.attrs.backend_data + lease.attrs.backend_v6_data).lower()
        return any(format_mac(mac).encode() in data for mac in self._state.macs.values())


def no_config(key: str) -> str:
    """What is said while there is none."""
    return (
        f"there is no network config at {key}; put one there, such as"
        ' {"Network": "10.3.0.0/16", "Backend": {"Type": "vxlan"}}'
    )
