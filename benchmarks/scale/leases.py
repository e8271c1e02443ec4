"""Leases of peers that don't exist: as flannel writes them, and as a kernel must show them."""

from __future__ import annotations

import json
from typing import NamedTuple

PREFIX = "/coreos.com/network"
NETWORK = "10.0.0.0/8"
LAST_OF_PEERS = 50_000
"""Numbers up to here are peers' subnets; the daemon under measurement leases one from 10.200.0.0 on."""


class Peer(NamedTuple):
    """The number-th peer. turn: how often it has changed its address and MAC."""

    number: int
    turn: int = 0

    @property
    def subnet(self) -> str:
        """Its /24 of the network, from 10.1.0.0 on."""
        return f"10.{1 + self.number // 256}.{self.number % 256}.0"

    @property
    def key(self) -> str:
        """Its store key."""
        return f"{PREFIX}/subnets/{self.subnet}-24"

    @property
    def public_ip(self) -> str:
        """An address on the namespace's underlay, 172.16.0.0/12."""
        value = (172 << 24 | 16 << 16) + 10 + self.number + self.turn % 16 * 60_000
        return ".".join(str(byte) for byte in value.to_bytes(4, "big"))

    @property
    def mac(self) -> str:
        """Its VTEP MAC."""
        return f"0e:{self.turn % 256:02x}:" + ":".join(
            f"{byte:02x}" for byte in (0x42000000 + self.number).to_bytes(4, "big")
        )

    def value(self, backend: str) -> str:
        """Its lease's value."""
        value: dict[str, object] = {"PublicIP": self.public_ip, "PublicIPv6": None, "BackendType": backend}
        if backend == "vxlan":
            value["BackendData"] = {"VNI": 1, "VtepMAC": self.mac}
        return json.dumps(value, separators=(",", ":"))

    def objects(self, backend: str) -> set[str]:
        """What a kernel has for it, as `table` words it."""
        if backend == "host-gw":
            return {f"route {self.subnet}/24 {self.public_ip}"}
        return {
            f"route {self.subnet}/24 {self.subnet}",
            f"neighbor {self.subnet} {self.mac}",
            f"fdb {self.mac} {self.public_ip}",
        }


def config(backend: str) -> str:
    """The network config: peers fit below the daemon's own subnet."""
    return json.dumps({"Network": NETWORK, "SubnetLen": 24, "SubnetMin": "10.200.0.0", "Backend": {"Type": backend}})
