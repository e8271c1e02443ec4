"""The udp backend's part of the desired state that lies in the kernel: eBPF programs beside the keeper (wincey.bpf.udp)."""

from __future__ import annotations

from typing import ClassVar, Literal

from wincey.model.address import Address, Subnet, format_address
from wincey.model.state import Key, Object


class BpfTunnel(Object, frozen=True, gc=False):
    """Programs that wrap what leaves by a TUN device and unwrap what comes in by the underlay. See Tunnel for the fields.

    It is not essential: without it the keeper carries everything.
    """

    tag: ClassVar[str] = "bpf-tunnel"
    device: str  # the TUN's name
    mtu: int
    underlay: str  # the device that carries the outer packets
    local: Address
    port: int
    network: Subnet
    check: Literal["off", "network", "strict"]

    @property
    def key(self) -> Key:
        return (self.tag, self.device)

    def __str__(self) -> str:
        return f"eBPF programs of udp tunnel {self.device} at {self.underlay}"


class FouPort(Object, frozen=True, gc=False):
    """Datagrams that arrive at this UDP port are IPv4 packets to the kernel (FOU); what sends is an ipip device, see state.Ipip."""

    tag: ClassVar[str] = "fou-port"
    essential: ClassVar[bool] = True
    port: int  # host byte order

    @property
    def key(self) -> Key:
        return (self.tag, self.port)

    def __str__(self) -> str:
        return f"FOU port {self.port}"


class BpfRoute(Object, frozen=True, gc=False):
    """Inner packets to `subnet` go to the host `endpoint`. whole: it takes packets that the kernel left unfinished."""

    tag: ClassVar[str] = "bpf-route"
    to_peer: ClassVar[bool] = True
    device: str
    subnet: Subnet
    endpoint: Address
    whole: bool

    @property
    def key(self) -> Key:
        return (self.tag, self.device, self.subnet)

    @property
    def outer(self) -> Address | None:
        return self.endpoint

    def __str__(self) -> str:
        how = "whole packets" if self.whole else "finished packets"
        return f"eBPF route {self.subnet} dev {self.device} to {format_address(self.endpoint)}, {how}"
