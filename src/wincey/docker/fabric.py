"""The container networks that flanneld has joined on this host, as their subnet.env files tell."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import msgspec

from wincey.docker.errors import Refused
from wincey.model.address import Subnet
from wincey.model.errors import BadAddress
from wincey.model.lease import LeaseKey

DEFAULT = ""
"""The name of the one network of a flanneld without --networks."""


class Local(msgspec.Struct, frozen=True):
    """One container network on this host. network: the cluster's. lease: this host's key in the store. mtu: bytes."""

    name: str
    network: Subnet
    lease: LeaseKey
    mtu: int

    @property
    def subnet(self) -> Subnet:
        """This host's IPv4 subnet."""
        assert self.lease.v4
        return self.lease.v4

    def __str__(self) -> str:
        return f"network {self.name} ({self.network})" if self.name else f"the cluster network {self.network}"


class Fabrics:
    """All of them. subnet_file: that of a flanneld with one network; directory: of the files of a flanneld with several."""

    def __init__(self, subnet_file: str, directory: str) -> None:
        self._subnet_file, self._directory = subnet_file, directory

    def all(self) -> dict[str, Local]:
        """The networks by name, read anew."""
        paths = sorted(Path(self._directory).glob("*.env"))
        files = [(DEFAULT, Path(self._subnet_file)), *((path.stem, path) for path in paths)]
        return {name: local for name, path in files if (local := _read(name, path))}

    def named(self, name: str) -> Local:
        """One of them; raises Refused with what there is."""
        networks = self.all()
        if name in networks:
            return networks[name]
        if name == DEFAULT and not networks:
            raise Refused(
                f"{self._subnet_file} is missing or names no IPv4 subnet: is flanneld running on this host, and ready?"
            )
        there = ", ".join(each for each in networks if each)
        if name == DEFAULT:
            raise Refused(
                f"this host is in several container networks: choose one of {there} by --ipam-opt network=NAME"
            )
        raise Refused(
            f"this host is in no container network {name!r}: there is {there or 'none besides the default one'}"
        )

    def containing(self, subnet: Subnet) -> Local:
        """The network that a docker network's subnet lies in; raises Refused."""
        networks = self.all() or {DEFAULT: self.named(DEFAULT)}
        for local in networks.values():
            if local.network.contains(subnet) and local.network != subnet:
                return local
        there = ", ".join(str(local.network) for local in networks.values())
        raise Refused(f"--subnet {subnet} is not a part of the container network of this cluster ({there})")


def _read(name: str, path: Path) -> Local | None:
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return None
    values = {key.strip(): value.strip() for key, sign, value in (line.partition("=") for line in lines) if sign}
    try:
        # More than one network in a line is Kubernetes' business; a host's leases are of the first.
        network = Subnet.parse(values.get("FLANNEL_NETWORK", "").partition(",")[0]).masked()
        subnet = Subnet.parse(values.get("FLANNEL_SUBNET", "").partition(",")[0]).masked()
        v6 = values.get("FLANNEL_IPV6_SUBNET", "").partition(",")[0]
        lease = LeaseKey(subnet, Subnet.parse(v6).masked() if v6 else None)
        mtu = int(values.get("FLANNEL_MTU", ""))
    except (BadAddress, ValueError):
        return None
    return Local(name, network, lease, mtu) if network.family == subnet.family == socket.AF_INET else None


def default_directory(subnet_file: str) -> str:
    """Where a flanneld with several networks puts their files, beside the usual file."""
    return os.path.join(os.path.dirname(subnet_file) or ".", "networks")
