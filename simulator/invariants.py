"""What must hold, as plain functions over what the world shows; each returns what is wrong, nothing being right.

Which of them is asked when, and which fault excuses what, is for `world.py` to say.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence

import msgspec

from simulator.forwarding import Station, obstacle
from wincey.model.address import Address, Subnet
from wincey.model.config import NetworkConfig
from wincey.model.errors import BadLease
from wincey.model.lease import LeaseAttrs, LeaseKey
from wincey.model.state import Key, Object, Sysctl


class Violation(msgspec.Struct, frozen=True):
    """An invariant that did not hold. at: seconds of virtual time."""

    invariant: str
    at: float
    text: str

    def __str__(self) -> str:
        return f"{self.invariant} at {self.at:.3f} s: {self.text}"


def overlapping(name: str, subnet: Subnet, others: Iterable[tuple[str, Subnet]]) -> list[str]:
    """No two live hosts hold overlapping subnets: whoever has part of this host's."""
    return [
        f"{name} has {subnet} and {other} has {theirs}"
        for other, theirs in others
        if other != name and subnet.overlaps(theirs)
    ]


def moved(name: str, before: Subnet | None, now: Subnet | None, config: NetworkConfig | None) -> list[str]:
    """A host that keeps running keeps its subnet, unless the config excludes it."""
    if before is None or now is None or before == now:
        return []
    if config is not None and not config.allows(LeaseKey(before)):
        return []
    return [f"{name} left {before} for {now}, although the config allows it"]


def unpublished(name: str, address: Address, held: Subnet | None, value: bytes | None) -> list[str]:
    """A live host's lease is in the store, and names it. value: what stands at the key of the subnet that it holds."""
    if held is None:
        return [f"{name} has no subnet"]
    if value is None:
        return [f"the lease of {name} on {held} is not in the store"]
    try:
        attrs = LeaseAttrs.decode(value)
    except BadLease as error:
        return [f"the lease of {name} on {held} can't be read: {error}"]
    return [] if attrs.public_ip == address else [f"the lease on {held}, which {name} has, names another host"]


def unreachable(pairs: Iterable[tuple[Station, Station]], underlay: Mapping[Address, Station]) -> list[str]:
    """Every connected pair reaches each other."""
    return [
        f"{one.name} can't reach {other.name}: {why}" for one, other in pairs if (why := obstacle(one, other, underlay))
    ]


def tampered(name: str, foreign: Mapping[Key, Object], expected: Mapping[Key, Object]) -> list[str]:
    """Nothing foreign is touched."""
    lost = [item for key, item in expected.items() if foreign.get(key) != item]
    return [f"{name} lost what is not ours: {', '.join(map(str, lost))}"] if lost else []


def astray(name: str, objects: Mapping[Key, Object], desired: Mapping[Key, Object]) -> list[str]:
    """What is ours in the kernel is exactly what is wanted there."""
    stale = [str(item) for key, item in objects.items() if key not in desired and not isinstance(item, Sysctl)]
    missing = [
        str(item) for key, item in desired.items() if key not in objects and not getattr(item, "optional", False)
    ]
    return [
        f"{name} has {kind} {', '.join(found[:3])}" for kind, found in (("stale", stale), ("not", missing)) if found
    ]


def leftover(name: str, owners: Iterable[str], keys: Container[str]) -> list[str]:
    """Nothing is kept for a lease that is gone. owners: the store keys for which a host keeps something, "" for itself."""
    return [f"{name} keeps what was for {owner}, which is gone" for owner in owners if owner and owner not in keys]


class Work(msgspec.Struct, frozen=True):
    """What a host has done so far: requests to the store, objects changed in the kernel, steps of its agent."""

    requests: int = 0
    changes: int = 0
    steps: int = 0

    def since(self, earlier: Work) -> Work:
        return Work(self.requests - earlier.requests, self.changes - earlier.changes, self.steps - earlier.steps)


def overworked(name: str, done: Work, most: Work) -> list[str]:
    """Work is bounded: no more than `most`."""
    found: Sequence[tuple[str, int, int]] = (
        ("requests to the store", done.requests, most.requests),
        ("changes in the kernel", done.changes, most.changes),
        ("steps", done.steps, most.steps),
    )
    return [f"{name} made {count} {what}, more than {limit}" for what, count, limit in found if count > limit]
