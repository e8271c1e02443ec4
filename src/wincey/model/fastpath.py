"""What only the fast path of containers needs in the desired state: that there is one, and what its packets look like.

Which containers there are and where their packets go is not said here: its programs learn that from what the host itself does
with them (bpf/c/fastpath.c).
"""

from __future__ import annotations

from typing import ClassVar, Literal

from wincey.model.address import Address, Subnet
from wincey.model.state import Key, Object

Form = Literal["plain", "vxlan", "udp"]
"""What stands in front of a container's packet at the underlay device, besides the Ethernet header."""

Engine = Literal["auto", "bpf", "flowtable"]
"""What carries it: programs of ours, nftables' flowtable, or whichever of them, in this order, the host has."""

MARK = 0x1000
"""The usual bit of the packet mark: neither kube-proxy's (0x4000, 0x8000) nor the port mapping plugin's (0x2000) nor that of what
else is common on hosts of containers (Calico: 0xffff0000; Cilium: 0x0f00; Tailscale: 0xff0000; AWS's plugin: 0x80)."""


class FastPath(Object, frozen=True, gc=False):
    """Established flows without NAT between containers of `subnet` and the rest of `network` skip most of the host's stack.

    underlay, tunnel: the devices that they leave and come by, tunnel "" for none. local: our address in outer headers; port, vni:
    theirs. mark: the bit of the packet mark by which netfilter tells which packets it has accepted. limit: why the programs leave
    encapsulation to the tunnel device although the form is known, "" if they need not. lacking: why there can be no fast path at all, "" if
    there can. engine: by what.
    """

    tag: ClassVar[str] = "fast-path"
    network: Subnet
    subnet: Subnet
    underlay: str
    local: Address
    mark: int = MARK
    form: Form = "plain"
    tunnel: str = ""
    port: int = 0
    vni: int = 0
    limit: str = ""
    lacking: str = ""
    engine: Engine = "auto"

    @property
    def key(self) -> Key:
        return (self.tag,)

    def __str__(self) -> str:
        return f"fast path of {self.subnet}"
