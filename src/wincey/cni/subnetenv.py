"""subnet.env as the plugin reads it (compatibility reference, sections 4.1 and 10): every line counts, or the file is refused.

The daemon reads its own file with more forbearance (wincey.agent.envfile): it can do without. A container can't: one with a
wrong address is worse than one that has to be started again.
"""

from __future__ import annotations

# `socket` itself takes 5 ms to import.
from _socket import AF_INET, AF_INET6, inet_ntop, inet_pton

from wincey.cni.protocol import INTERNAL, CniError


class SubnetEnv:
    """What the daemon tells about this host. Networks and subnets are masked CIDRs, IPv4 first; mtu in bytes."""

    __slots__ = ("ip_masq", "mtu", "networks", "subnets")

    def __init__(self, networks: list[str], subnets: list[str], mtu: int, ip_masq: bool) -> None:
        self.networks = networks
        self.subnets = subnets
        self.mtu = mtu
        self.ip_masq = ip_masq


def read_subnet_env(path: str) -> SubnetEnv:
    """Read the file; raises CniError, with the name of the file in it."""
    try:
        with open(path, "rb") as file:
            text = file.read().decode()
    except OSError as error:
        raise CniError(
            INTERNAL,
            f"loadFlannelSubnetEnv failed: open {path}: {(error.strerror or str(error)).lower()}",
            "flanneld writes this file when the host has joined the network: see whether it runs, and what its log says",
        ) from None
    except UnicodeDecodeError:
        raise CniError(INTERNAL, f"{path} is no text") from None
    return parse_subnet_env(text, path)


def parse_subnet_env(text: str, path: str) -> SubnetEnv:
    """Read the file's text. `path` is for the errors alone; raises CniError."""
    variables = {}
    for line in text.splitlines():
        name, equals, value = line.partition("=")
        if equals:
            variables[name.strip()] = value.strip().strip("\"'")
    families = ((AF_INET, "FLANNEL"), (AF_INET6, "FLANNEL_IPV6"))
    try:
        networks = [
            _masked(part, family)
            for family, prefix in families
            for part in dict.fromkeys(variables.get(f"{prefix}_NETWORK", "").split(","))
            if part
        ]
        subnets = [
            _masked(text, family) for family, prefix in families if (text := variables.get(f"{prefix}_SUBNET", ""))
        ]
        mtu = _number(variables["FLANNEL_MTU"]) if variables.get("FLANNEL_MTU") else None
    except ValueError as error:
        raise CniError(INTERNAL, f"loadFlannelSubnetEnv failed: {path}: {error}") from None
    missing = []
    if not networks:
        missing += ["FLANNEL_NETWORK", "FLANNEL_IPV6_NETWORK"]
    if not subnets:
        missing += ["FLANNEL_SUBNET", "FLANNEL_IPV6_SUBNET"]
    if mtu is None:
        missing.append("FLANNEL_MTU")
    if "FLANNEL_IPMASQ" not in variables:
        missing.append("FLANNEL_IPMASQ")
    if missing or mtu is None:
        raise CniError(INTERNAL, f"loadFlannelSubnetEnv failed: {path} is missing {', '.join(missing)}")
    return SubnetEnv(list(dict.fromkeys(networks)), subnets, mtu, variables["FLANNEL_IPMASQ"] == "true")


def _number(text: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise ValueError(f"invalid FLANNEL_MTU: {text}")
    return int(text)


def _masked(text: str, family: int) -> str:
    """`10.1.17.1/24` as `10.1.17.0/24`; raises ValueError."""
    address, _, length = text.strip().partition("/")
    try:
        packed = inet_pton(family, address)
        bits = int(length) if length.isdecimal() else -1
    except OSError:
        bits = -1
    if not 0 <= bits <= (32 if family == AF_INET else 128):
        raise ValueError(f"invalid CIDR address: {text}")
    spare = 8 * len(packed) - bits
    masked = int.from_bytes(packed, "big") >> spare << spare
    return f"{inet_ntop(family, masked.to_bytes(len(packed), 'big'))}/{bits}"


def is_cidr(text: object) -> bool:
    """Whether a value is the text of an IPv4 or IPv6 network."""
    if not isinstance(text, str):
        return False
    try:
        _masked(text, AF_INET6 if ":" in text else AF_INET)
    except ValueError:
        return False
    return True
