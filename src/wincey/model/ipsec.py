"""What only the ipsec backend needs of the desired state (compatibility reference, section 6.6).

`IkeDaemon` is strongSwan's charon with what it proves itself by, `IpsecPeer` a connection to one peer, and `XfrmPolicy` the
kernel's word on what must be encrypted and what must not leave at all.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import msgspec

from wincey.model.address import Address, Subnet, format_address
from wincey.model.secret import Secret
from wincey.model.state import Key, Object

REQID = 11
"""Ties policies and security associations to each other; flannel's number."""

USER_DEVICE = "ipsec0"
"""The TUN that packets take to user-space ESP; charon makes and names it."""

Direction = Literal["in", "out", "fwd"]


class IkeDaemon(Object, frozen=True, gc=False):
    """charon runs, with these credentials. esp: whether the kernel or charon itself encrypts.

    psk: for `Auth` psk, else None and the three files count: PEM, of this host's certificate, its key and the authority.
    """

    tag: ClassVar[str] = "ike-daemon"
    essential: ClassVar[bool] = True
    esp: Literal["kernel", "user"]
    psk: Secret[str] | None = None
    cert_file: str = ""
    key_file: str = ""
    ca_file: str = ""

    @property
    def key(self) -> Key:
        return (self.tag,)

    @property
    def makes(self) -> str:
        return USER_DEVICE if self.esp == "user" else ""

    def __str__(self) -> str:
        return f"IKE daemon charon ({self.esp}-space ESP)" if self.esp == "user" else "IKE daemon charon (kernel ESP)"


class IpsecTerms(msgspec.Struct, frozen=True, gc=False):
    """What all connections of a host have in common. esp: as IkeDaemon. auth: of both sides."""

    local: Address  # the address that we send from
    auth: Literal["psk", "cert"]
    esp: Literal["kernel", "user"]
    proposal: str
    encap: bool


class IpsecPeer(Object, frozen=True, gc=False):
    """A connection: packets between `own` and `subnet` go encrypted to and from the host `remote`.

    identity, remote: the public addresses of both hosts, by which they know each other. terms None: of a connection that an
    earlier run left, and that is not as desired.
    """

    tag: ClassVar[str] = "ipsec-peer"
    own: Subnet
    subnet: Subnet
    identity: Address
    remote: Address
    terms: IpsecTerms | None

    @property
    def key(self) -> Key:
        return (self.tag, self.own, self.subnet)

    @property
    def wraps(self) -> str:
        if self.terms is None:
            return ""
        in_udp = self.terms.encap or self.terms.esp == "user"  # charon's own ESP knows no other way
        return "encrypted in ESP" + (", in UDP to port 4500" if in_udp else "")

    @property
    def outer(self) -> Address | None:
        return self.remote

    def __str__(self) -> str:
        return f"IPsec connection to {self.subnet} at {format_address(self.remote)}"


class XfrmPolicy(Object, frozen=True, gc=False):
    """A policy of the kernel. tunnel: the outer source and destination that packets must travel by, None to let none pass.

    It is found by direction and selectors; a kernel has one of each.
    """

    tag: ClassVar[str] = "xfrm-policy"
    direction: Direction
    source: Subnet
    destination: Subnet
    tunnel: tuple[Address, Address] | None

    @property
    def key(self) -> Key:
        return (self.tag, self.direction, self.source, self.destination)

    def __str__(self) -> str:
        way = f"esp {' to '.join(map(format_address, self.tunnel))}" if self.tunnel else "block"
        return f"xfrm policy {self.direction} {self.source} to {self.destination}: {way}"
