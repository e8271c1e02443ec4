"""What is to be reached, and whether it was. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple


class Target(NamedTuple):
    """A figure with so many leases (None: with any) must be at most this."""

    figure: str
    leases: int | None
    most: float
    text: str


TARGETS = (
    Target("ready_s", 5_000, 1.0, "5,000 leases in place within 1 s of the start"),
    Target("ready_s", 10_000, 2.0, "10,000 leases in place within 2 s of the start"),
    Target("diff_cpu_ms", 10_000, 150, "a look at 10,000 leases with nothing to do: under 150 ms of CPU"),
    Target("lease_to_route_ms", None, 5, "lease to route within 5 ms"),
    Target("rest_percent", None, 0.2, "CPU at rest under 0.2 %, audits included"),
    Target("resident_mb", 5_000, 40, "under 40 MB resident with 5,000 leases"),
    Target("resident_mb", 0, 32, "under 32 MB resident with none"),
)


def judge(figures: Mapping[int, Mapping[str, float]]) -> Iterator[tuple[str, float, bool]]:
    """Each target of which there is a figure: its text, the worst figure, whether it was met. figures: by leases."""
    for target in TARGETS:
        values = [
            found[target.figure]
            for leases, found in figures.items()
            if target.figure in found and target.leases in {None, leases}
        ]
        if values:
            yield target.text, max(values), max(values) <= target.most
