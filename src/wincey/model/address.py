"""Addresses and subnets as small, fast values.

An address is its packed form in network byte order: 4 bytes for IPv4, 16 for IPv6. That is what the kernel wants, it
compares and hashes at C speed, and 10,000 leases of them cost little memory, which the objects of `ipaddress` do not.
Text is made and read at the edges only.
"""

from __future__ import annotations

import socket
from typing import TypeAlias

import msgspec

from wincey.model.errors import BadAddress

Address: TypeAlias = bytes
"""A packed IP address in network byte order: 4 bytes are IPv4, 16 bytes are IPv6."""

MacAddress: TypeAlias = bytes
"""A packed Ethernet address, 6 bytes."""

UNSPECIFIED_V4: Address = bytes(4)


def parse_address(text: str) -> Address:
    """Read an IPv4 or IPv6 address; raises BadAddress. IPv4 must be four decimal numbers, as Go's parser wants."""
    try:
        return socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text)
    except (OSError, ValueError):
        raise BadAddress(f"{text!r} is not an IPv4 or IPv6 address; write it like 10.3.1.0 or fd00:3::1") from None


def format_address(address: Address) -> str:
    """Write an address as text; IPv6 compressed as RFC 5952 has it."""
    return socket.inet_ntop(family_of(address), address)


def family_of(address: Address) -> int:
    """AF_INET or AF_INET6."""
    return socket.AF_INET if len(address) == 4 else socket.AF_INET6


def parse_mac(text: str) -> MacAddress:
    """Read `aa:bb:cc:dd:ee:ff` (either case, `-` allowed too); raises BadAddress."""
    parts = text.replace("-", ":").split(":")
    try:
        if [len(part) for part in parts] == [2] * 6 and len(mac := bytes.fromhex("".join(parts))) == 6:
            return mac
    except ValueError:
        pass
    raise BadAddress(f"{text!r} is not a MAC address; write it like 0e:2a:0a:63:00:02")


def format_mac(mac: MacAddress) -> str:
    """Write a MAC address in lower case with colons, as lease data has it."""
    return mac.hex(":")


class Subnet(msgspec.Struct, frozen=True, order=True, gc=False):
    """An IP prefix, host bits allowed (an interface address with its length is one too)."""

    address: Address
    length: int

    @classmethod
    def parse(cls, text: str) -> Subnet:
        """Read `10.3.0.0/16` or `fd00::/48`; raises BadAddress. Host bits are kept: see `masked`."""
        address, slash, length = text.partition("/")
        if slash and length.isascii() and length.isdigit() and len(length) <= 3:
            packed = parse_address(address)
            if int(length) <= len(packed) * 8:
                return cls(packed, int(length))
        raise BadAddress(f"{text!r} is not a subnet; write it like 10.3.0.0/16 or fd00:3::/48")

    @property
    def family(self) -> int:
        """AF_INET or AF_INET6."""
        return family_of(self.address)

    @property
    def bits(self) -> int:
        """Bits of an address of this family: 32 or 128."""
        return len(self.address) * 8

    @property
    def size(self) -> int:
        """How many addresses it spans."""
        return 1 << (self.bits - self.length)

    @property
    def first(self) -> int:
        """The first address as a number."""
        return int.from_bytes(self.address, "big") & ~(self.size - 1)

    @property
    def last(self) -> int:
        """The last address as a number."""
        return self.first | (self.size - 1)

    def masked(self) -> Subnet:
        """The same prefix with its host bits zero."""
        return Subnet(self.first.to_bytes(len(self.address), "big"), self.length)

    def host(self, number: int) -> Address:
        """The address `number` places after the first one, as `subnet.host(1)` for a gateway."""
        return (self.first + number).to_bytes(len(self.address), "big")

    def contains(self, other: Subnet | Address) -> bool:
        """Whether an address, or the whole of another subnet, lies inside. Another family never does."""
        if isinstance(other, bytes):
            other = Subnet(other, len(other) * 8)
        return self.bits == other.bits and self.first <= other.first and other.last <= self.last

    def overlaps(self, other: Subnet) -> bool:
        """Whether the two share an address. Different families never do."""
        return self.bits == other.bits and self.first <= other.last and other.first <= self.last

    def __str__(self) -> str:
        return f"{format_address(self.address)}/{self.length}"


def single(address: Address) -> Subnet:
    """The /32 or /128 of one address."""
    return Subnet(address, len(address) * 8)
