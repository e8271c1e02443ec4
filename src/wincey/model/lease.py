"""Leases and their byte-compatible keys and values (reference sections 3.2 and 3.3)."""

from __future__ import annotations

import re

import msgspec

from wincey.model.address import UNSPECIFIED_V4, Address, Subnet, format_address, parse_address
from wincey.model.errors import UNREADABLE, BadAddress, BadLease

TTL = 86_400.0
"""Seconds a lease lives unless renewed."""

# The text before the IPv4 part may be anything, as flannel's parser has it; what follows must be exact.
_KEY = re.compile(r"(\d+\.\d+\.\d+\.\d+)-(\d+)(?:&([0-9a-fA-F:]+)-(\d+))?\Z", re.ASCII)

_NO_V4 = Subnet(UNSPECIFIED_V4, 0)


class LeaseKey(msgspec.Struct, frozen=True, order=True, gc=False):
    """The subnets that a lease is for; at least one of them is given."""

    v4: Subnet | None
    v6: Subnet | None = None

    @classmethod
    def parse(cls, text: str) -> LeaseKey:
        """Read `10.3.1.0-24` or `10.3.1.0-24&fd00:1::-64`; raises BadLease. Lengths: IPv4 1 to 31, IPv6 1 to 127;
        `0.0.0.0-0` before an IPv6 part stands for no IPv4."""
        match = _KEY.search(text)
        text = text[:200]  # of a key this long only the errors below speak
        if not match:
            raise BadLease(f"lease key {text!r} is not of the form 10.3.1.0-24 or 10.3.1.0-24&fd00:1::-64")
        try:
            v4 = Subnet(parse_address(match[1]), int(match[2]))
            v6 = Subnet(parse_address(match[3]), int(match[4])) if match[3] else None
        except ValueError as error:  # BadAddress, or a number with thousands of digits
            raise BadLease(f"lease key {text!r}: {error}") from None
        if v4.length > 31 or (v6 and v6.length > 127):
            raise BadLease(f"lease key {text!r} has a prefix that is too long (IPv4 at most 31, IPv6 at most 127)")
        # A length of 0 is the whole of a family, which is nobody's lease: 0.0.0.0-0 stands for "no IPv4".
        if (not v4.length and v6 is None) or (v6 and not v6.length):
            raise BadLease(f"lease key {text!r} names no subnet")
        return cls(v4.masked() if v4.length else None, v6.masked() if v6 else None)

    @property
    def subnets(self) -> tuple[Subnet, ...]:
        """The subnets present, IPv4 first."""
        return tuple(subnet for subnet in (self.v4, self.v6) if subnet)

    def overlaps(self, other: LeaseKey) -> bool:
        """Whether the two share an address in either family."""
        return bool(
            (self.v4 and other.v4 and self.v4.overlaps(other.v4))
            or (self.v6 and other.v6 and self.v6.overlaps(other.v6))
        )

    def __str__(self) -> str:
        v4 = self.v4 or _NO_V4
        text = f"{format_address(v4.address)}-{v4.length}"
        return f"{text}&{format_address(self.v6.address)}-{self.v6.length}" if self.v6 else text


class _Value(msgspec.Struct):
    """The JSON of a lease value. The order of the fields is the contract's."""

    PublicIP: str
    PublicIPv6: str | None = None
    BackendType: str | msgspec.UnsetType = msgspec.UNSET
    BackendData: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    BackendV6Data: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


class _ValueV2(msgspec.Struct):
    """The same as flannel up to 0.14 wrote it to etcd v2: no IPv6 fields."""

    PublicIP: str
    BackendType: str | msgspec.UnsetType = msgspec.UNSET
    BackendData: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


class LeaseAttrs(msgspec.Struct, frozen=True, gc=False):
    """How the owner of a lease is reached. `backend_data` and `backend_v6_data` are JSON text, empty when absent."""

    public_ip: Address | None = None
    public_ipv6: Address | None = None
    backend_type: str = ""
    backend_data: bytes = b""
    backend_v6_data: bytes = b""

    @classmethod
    def decode(cls, value: bytes) -> LeaseAttrs:
        """Read a lease value; unknown fields are ignored. Raises BadLease."""
        try:
            fields = _decoder.decode(value.decode())  # as text: the decoder does not look into what it skips
            v4 = parse_address(fields.PublicIP) if fields.PublicIP else None
            v6 = parse_address(fields.PublicIPv6) if fields.PublicIPv6 else None
            if (v4 and len(v4) != 4) or (v6 and len(v6) != 16):
                raise BadLease(f"lease value has an address of the wrong family: {value[:200]!r}")
        except (*UNREADABLE, BadAddress) as error:
            raise BadLease(f"lease value can't be read ({error}): {value[:200]!r}") from None
        return cls(
            public_ip=None if v4 == UNSPECIFIED_V4 else v4,
            public_ipv6=v6,
            backend_type=fields.BackendType or "",
            backend_data=_raw(fields.BackendData),
            backend_v6_data=_raw(fields.BackendV6Data),
        )

    def encode(self, *, etcd_v2: bool = False) -> bytes:
        """Write the value as flannel does: today's form, or (etcd_v2) that of the eras that used etcd v2.

        A lease with an IPv6 address is written in today's form in any store.
        """
        fields = {
            "PublicIP": format_address(self.public_ip or UNSPECIFIED_V4),
            "BackendType": self.backend_type or msgspec.UNSET,
            "BackendData": msgspec.Raw(self.backend_data) if self.backend_data else msgspec.UNSET,
        }
        if etcd_v2 and not self.public_ipv6 and not self.backend_v6_data:
            return msgspec.json.encode(_ValueV2(**fields))  # type: ignore[arg-type]  # the fields' types are the struct's
        fields["PublicIPv6"] = format_address(self.public_ipv6) if self.public_ipv6 else None  # type: ignore[assignment]  # likewise
        fields["BackendV6Data"] = msgspec.Raw(self.backend_v6_data) if self.backend_v6_data else msgspec.UNSET
        return msgspec.json.encode(_Value(**fields))  # type: ignore[arg-type]  # likewise


class _ReadValue(msgspec.Struct):
    PublicIP: str | None = None
    PublicIPv6: str | None = None
    BackendType: str | None = None
    BackendData: msgspec.Raw = msgspec.Raw()
    BackendV6Data: msgspec.Raw = msgspec.Raw()


_decoder = msgspec.json.Decoder(_ReadValue)


def _raw(value: msgspec.Raw) -> bytes:
    text = bytes(value)
    return b"" if text == b"null" else text


class Lease(msgspec.Struct, frozen=True, gc=False):
    """A lease as the store holds it.

    revision: the store's number of its last change, what compare-and-swap compares. created: that of its creation: of two
    overlapping leases the older one stands. handle: the store's own word for the time limit (an etcd v3 lease id), "" if
    none: with `permanent` the lease is a reservation and never expires.
    """

    key: LeaseKey
    attrs: LeaseAttrs
    revision: int = 0
    created: int = 0
    handle: str = ""
    permanent: bool = False
