"""extension: the user's own commands connect the hosts (compatibility reference, section 6.11).

Config keys: PreStartupCommand, PostStartupCommand, SubnetAddCommand, SubnetRemoveCommand, ShutdownCommand, each a text or a
list of words; Shell (by the text), CommandTimeout (30 seconds), MTU (the interface's). What PreStartupCommand prints is
published in the lease, and is the standard input of what the other hosts run for this one.
"""

from __future__ import annotations

from typing import ClassVar

import msgspec

from wincey.backends.base import HostFacts, public_attrs
from wincey.model.address import Address, Subnet, format_address
from wincey.model.command import Command, CommandNetwork, CommandPeer, Environment
from wincey.model.config import NetworkConfig
from wincey.model.errors import UNREADABLE, BadLease
from wincey.model.lease import Lease, LeaseAttrs, LeaseKey
from wincey.model.state import Object

OUTPUT = "output"
"""HostFacts.found has under this name what PreStartupCommand printed."""


class ExtensionBackend:
    """Nothing but commands."""

    type: ClassVar[str] = "extension"
    keys: ClassVar[tuple[str, ...]] = (
        *("PreStartupCommand", "PostStartupCommand", "SubnetAddCommand", "SubnetRemoveCommand", "ShutdownCommand"),
        *("Shell", "CommandTimeout", "MTU"),
    )

    def __init__(self, config: NetworkConfig, host: HostFacts) -> None:
        self._config, self._host = config, host
        options = config.backend
        self.before = Command.read(options, "PreStartupCommand")
        self.timeout = float(options.integer("CommandTimeout", 30, minimum=1, maximum=3600))
        self._after = Command.read(options, "PostStartupCommand")
        self._add = Command.read(options, "SubnetAddCommand")
        self._remove = Command.read(options, "SubnetRemoveCommand")
        self._shutdown = Command.read(options, "ShutdownCommand")
        least = 1280 if config.enable_ipv6 else 68  # RFC 8200 section 5, RFC 791
        self._mtu = options.integer("MTU", host.mtu, minimum=least, maximum=65535)

    @property
    def mtu(self) -> int:
        return self._mtu

    def attrs(self) -> LeaseAttrs:
        attrs = public_attrs(self._host, self._config, self.type)
        output = self._host.found.get(OUTPUT)
        return attrs if output is None else msgspec.structs.replace(attrs, backend_data=msgspec.json.encode(output))

    def reaches(self, attrs: LeaseAttrs) -> bool:
        return attrs.backend_type == self.type

    def environment(self, own: LeaseKey | None) -> Environment:
        """What commands for the host itself are told; own: its lease, None before it has one."""
        host = self._host
        return (*self._tell(own, host.public, host.public_v6), ("IFACE", host.underlay), ("MTU", str(self.mtu)))

    def local(self, own: LeaseKey) -> list[Object]:
        return [
            CommandNetwork(
                self.environment(own),
                before=self.before,
                data=self._host.found.get(OUTPUT, ""),
                after=self._after,
                shutdown=self._shutdown,
                timeout=self.timeout,
            )
        ]

    def peer(self, own: LeaseKey, lease: Lease) -> list[Object]:
        key = LeaseKey(lease.key.v4 if own.v4 else None, lease.key.v6 if own.v6 else None)
        if not key.subnets:
            return []
        environment = (*self._tell(key, lease.attrs.public_ip, lease.attrs.public_ipv6), ("IFACE", self._host.underlay))
        subnet = " ".join(map(str, key.subnets))
        return [CommandPeer(subnet, environment, _data(lease), self._add, self._remove, self.timeout)]

    def _tell(self, key: LeaseKey | None, public: Address | None, public_v6: Address | None) -> Environment:
        config = self._config
        values: tuple[tuple[str, Subnet | Address | None], ...] = (
            ("NETWORK", config.network),
            ("SUBNET", key.v4 if key else None),
            ("PUBLIC_IP", public if config.enable_ipv4 else None),
            ("IPV6NETWORK", config.ipv6_network),
            ("IPV6SUBNET", key.v6 if key else None),
            ("PUBLIC_IPV6", public_v6 if config.enable_ipv6 else None),
        )
        return tuple(
            (name, format_address(value) if isinstance(value, bytes) else str(value))
            for name, value in values
            if value is not None
        )


def _data(lease: Lease) -> str:
    """What the peer's PreStartupCommand printed; "" when it has none."""
    if not lease.attrs.backend_data:
        return ""
    try:
        return msgspec.json.decode(lease.attrs.backend_data, type=str)
    except UNREADABLE as error:
        raise BadLease(f"extension data of lease {lease.key} is no text: {error}") from None
