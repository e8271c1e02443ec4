"""Which subnet to lease: a pure decision over the config, the leases that exist and what this host had before.

The order is flannel's (compatibility reference, section 3.6): the lease that already names this host, then the subnet that
this host had before, then any free one. What differs is what flannel's users suffer from: every free subnet is a candidate
(not the first 100), an overlap of any length counts as taken, a reservation wins over an ordinary lease, and a network
that becomes dual-stack keeps the IPv4 subnets its hosts have.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

import msgspec

from wincey.model.address import Address, Subnet
from wincey.model.config import NetworkConfig
from wincey.model.errors import OutOfSubnets
from wincey.model.lease import Lease, LeaseAttrs, LeaseKey


class Identity(msgspec.Struct, frozen=True):
    """Who a lease belongs to: the public IPv4 address, or the IPv6 one where the network has no IPv4."""

    public_ip: Address | None
    public_ipv6: Address | None

    def owns(self, attrs: LeaseAttrs) -> bool:
        """Whether a lease with these attributes is this host's."""
        if self.public_ip:
            return attrs.public_ip == self.public_ip
        return attrs.public_ip is None and attrs.public_ipv6 == self.public_ipv6


class Decision(msgspec.Struct, frozen=True):
    """What to do: go on with `reuse`, or create a lease on `take`; and release `drop` after that has worked."""

    reuse: Lease | None
    take: LeaseKey | None
    drop: tuple[Lease, ...] = ()


def decide(
    config: NetworkConfig,
    leases: Sequence[Lease],
    identity: Identity,
    *,
    previous: Sequence[Subnet],
    blocked: Sequence[Subnet] = (),
    held: Lease | None = None,
    rng: random.Random,
) -> Decision:
    """Decide which lease to hold; raises OutOfSubnets.

    previous: the subnets this host had (an earlier subnet.env). blocked: subnets whose key is there with a value that
    nobody can read: somebody may live there. held: the lease that this host has; it stays ours when our address changes, whatever
    else of it somebody has changed.
    """

    def is_own(lease: Lease) -> bool:
        if held and lease.key == held.key and Identity(held.attrs.public_ip, held.attrs.public_ipv6).owns(lease.attrs):
            return True
        return identity.owns(lease.attrs)

    own = [lease for lease in leases if is_own(lease)]
    usable = [lease for lease in own if config.allows(lease.key)]
    # A reservation that does not fit the config is an administrator's mistake to mend, not ours to delete.
    unusable = tuple(lease for lease in own if not config.allows(lease.key) and not lease.permanent)
    if usable:
        best = min(
            usable,
            key=lambda lease: (
                held is None or lease.key != held.key,  # who runs stays where it is, also beside a reservation
                not lease.permanent,
                not set(lease.key.subnets) & set(previous),
                lease.created,
            ),
        )
        return Decision(best, None, unusable)

    others = [lease for lease in leases if not is_own(lease)]
    wanted = [subnet for lease in own for subnet in lease.key.subnets] + list(previous)
    v4 = v6 = None
    if config.enable_ipv4:
        v4 = _pick(Pool.of_v4(config), [*blocked, *(lease.key.v4 for lease in others if lease.key.v4)], wanted, rng)
    if config.enable_ipv6:
        v6 = _pick(Pool.of_v6(config), [*blocked, *(lease.key.v6 for lease in others if lease.key.v6)], wanted, rng)
    return Decision(None, LeaseKey(v4, v6), unusable)


def losers(mine: Lease, leases: Iterable[Lease], identity: Identity) -> list[Lease]:
    """Leases of other hosts that overlap mine and are older: if there is any, mine has to go.

    Create-if-absent guards one key. Two hosts that took different keys with a common part (another SubnetLen, another
    IPv6 half) are told apart here, by what the store says was created first.
    """
    return [
        other
        for other in leases
        if other.key.overlaps(mine.key) and not identity.owns(other.attrs) and other.created < mine.created
    ]


class Pool(msgspec.Struct, frozen=True):
    """The subnets that may be leased, one family: `count` of them with prefix `length`, from the number `first` on."""

    first: int
    count: int
    length: int
    bits: int

    @classmethod
    def of_v4(cls, config: NetworkConfig) -> Pool:
        """The IPv4 pool, SubnetMin to SubnetMax."""
        return cls._between(config.subnet_min, config.subnet_max, config.subnet_len)

    @classmethod
    def of_v6(cls, config: NetworkConfig) -> Pool:
        """The IPv6 pool, IPv6SubnetMin to IPv6SubnetMax."""
        return cls._between(config.ipv6_subnet_min, config.ipv6_subnet_max, config.ipv6_subnet_len)

    @classmethod
    def _between(cls, low: Address, high: Address, length: int) -> Pool:
        bits = len(low) * 8
        first, last = int.from_bytes(low, "big"), int.from_bytes(high, "big")
        return cls(first, max(0, ((last - first) >> (bits - length)) + 1), length, bits)

    def at(self, index: int) -> Subnet:
        """The subnet at a place, 0 the lowest."""
        number = self.first + (index << (self.bits - self.length))
        return Subnet(number.to_bytes(self.bits // 8, "big"), self.length)

    def index(self, subnet: Subnet) -> int | None:
        """The place of a subnet, None if it is none of the pool's."""
        if subnet.bits != self.bits or subnet.length != self.length:
            return None
        index = (subnet.first - self.first) >> (self.bits - self.length)
        return index if 0 <= index < self.count else None

    def taken(self, leased: Iterable[Subnet]) -> list[tuple[int, int]]:
        """Places that overlap a leased subnet, as sorted, disjoint ranges (first, last)."""
        shift = self.bits - self.length
        ranges = sorted(
            (max(0, (subnet.first - self.first) >> shift), min(self.count - 1, (subnet.last - self.first) >> shift))
            for subnet in leased
            if subnet.bits == self.bits
        )
        merged: list[tuple[int, int]] = []
        for low, high in ranges:
            if high < low:
                continue  # wholly outside of the pool
            if merged and low <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
            else:
                merged.append((low, high))
        return merged


def _pick(pool: Pool, leased: Sequence[Subnet], wanted: Sequence[Subnet], rng: random.Random) -> Subnet:
    taken = pool.taken(leased)
    for subnet in wanted:
        index = pool.index(subnet)
        if index is not None and not any(low <= index <= high for low, high in taken):
            return subnet
    free = pool.count - sum(high - low + 1 for low, high in taken)
    if free <= 0:
        raise OutOfSubnets(_exhausted(pool, len(leased)))
    # The place among the free ones, moved past each taken range below it: no list of 16 million candidates is ever made.
    place = rng.randrange(free)
    for low, high in taken:
        if place < low:
            break
        place += high - low + 1
    return pool.at(place)


def _exhausted(pool: Pool, leased: int) -> str:
    if pool.count <= 0:
        return "out of subnets: SubnetMin is above SubnetMax, so the pool is empty; correct them in the network config"
    return (
        f"out of subnets: all {pool.count} subnets from {pool.at(0)} to {pool.at(pool.count - 1)} are leased"
        f" ({leased} leases); free leases of hosts that are gone, or widen SubnetMin..SubnetMax or Network"
    )
