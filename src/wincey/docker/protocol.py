"""The requests of libnetwork's remote network and IPAM drivers, decoded, and the answers to them.

Names and meaning are Docker's (moby, libnetwork/docs/remote.md and ipam.md). A call is a POST to /METHOD with a JSON
object; the answer is one too, with the reason when the call was refused, which Docker shows to its user.
"""

from __future__ import annotations

from typing import Any

import msgspec

CONTENT_TYPE = "application/vnd.docker.plugins.v1.2+json"

GATEWAY_TYPE = "com.docker.network.gateway"
"""The value of the option RequestAddressType for a gateway's address."""

GENERIC = "com.docker.network.generic"
INTERNAL = "com.docker.network.internal"
ENABLE_IPV6 = "com.docker.network.enable_ipv6"
MTU = "com.docker.network.driver.mtu"
PORT_MAP = "com.docker.network.portmap"


class PoolRequest(msgspec.Struct):
    """IpamDriver.RequestPool. Pool: `--subnet`. SubPool: `--ip-range`. Options: `--ipam-opt`."""

    Pool: str = ""
    SubPool: str = ""
    Options: dict[str, str] | None = None
    V6: bool = False


class PoolId(msgspec.Struct):
    """IpamDriver.ReleasePool."""

    PoolID: str


class AddressRequest(msgspec.Struct):
    """IpamDriver.RequestAddress. Address: what the user wants, if anything in particular."""

    PoolID: str
    Address: str = ""
    Options: dict[str, str] | None = None


class AddressId(msgspec.Struct):
    """IpamDriver.ReleaseAddress."""

    PoolID: str
    Address: str


class IpamData(msgspec.Struct):
    """What the IPAM driver said about a network."""

    AddressSpace: str = ""
    Pool: str = ""
    Gateway: str = ""


class NetworkRequest(msgspec.Struct):
    """NetworkDriver.CreateNetwork. Options: `--opt` below GENERIC, and Docker's own."""

    NetworkID: str
    Options: dict[str, Any] | None = None
    IPv4Data: list[IpamData] | None = None
    IPv6Data: list[IpamData] | None = None


class NetworkId(msgspec.Struct):
    """NetworkDriver.DeleteNetwork."""

    NetworkID: str


class Interface(msgspec.Struct):
    """A container's interface as Docker knows it. Address has a length."""

    Address: str = ""
    AddressIPv6: str = ""
    MacAddress: str = ""


class EndpointRequest(msgspec.Struct):
    """NetworkDriver.CreateEndpoint."""

    NetworkID: str
    EndpointID: str
    Interface: Interface | None = None


class EndpointId(msgspec.Struct):
    """NetworkDriver.Join, Leave, DeleteEndpoint, EndpointOperInfo, RevokeExternalConnectivity."""

    NetworkID: str
    EndpointID: str


class ConnectivityRequest(msgspec.Struct):
    """NetworkDriver.ProgramExternalConnectivity."""

    NetworkID: str
    EndpointID: str
    Options: dict[str, Any] | None = None


class PortBinding(msgspec.Struct):
    """One of `-p`. Proto: the IP protocol's number. HostPort 0: any. HostPortEnd: of a range to choose from."""

    Proto: int
    Port: int
    HostIP: str | None = None
    HostPort: int = 0
    HostPortEnd: int = 0


class Nothing(msgspec.Struct):
    """A call whose arguments don't matter."""
