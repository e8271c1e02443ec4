"""Whether figures stay flat over time: a slope that single outliers don't move, and a bound for what it may add up to. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Bound(NamedTuple):
    """What a figure may grow by over the whole span after warm-up: a fixed amount plus a part of its median."""

    fixed: float
    part: float = 0.0


class Verdict(NamedTuple):
    """Of one figure: its median, the growth over the span by its slope, and what was allowed."""

    name: str
    median: float
    growth: float
    allowed: float

    @property
    def flat(self) -> bool:
        """Whether it did not grow by more."""
        return self.growth <= self.allowed


BOUNDS = {
    "rss_mb": Bound(1.0, 0.02),
    "fds": Bound(3),
    "threads": Bound(0.5),
    "tasks": Bound(1),
    "blocks": Bound(3000, 0.01),
}
"""What has to stay flat. Resident memory may move as malloc's pages do, descriptors by the idle connections that are kept for
90 seconds; a leak at each restart of etcd, at each renewal or at each lease replaced comes to more than these in half an hour."""


def slope(times: Sequence[float], values: Sequence[float]) -> float:
    """The median of the slopes between all pairs of points (Theil and Sen): up to 29 % of wild points don't matter."""
    pairs = [
        (values[j] - values[i]) / (times[j] - times[i])
        for i in range(len(times))
        for j in range(i + 1, len(times))
        if times[j] > times[i]
    ]
    return statistics.median(pairs) if pairs else 0.0


def judge(samples: Sequence[Mapping[str, float]], warm_up: float) -> list[Verdict]:
    """A verdict on each figure of BOUNDS. samples: with "seconds" since the start; those before warm_up don't count."""
    later = [sample for sample in samples if sample["seconds"] >= warm_up]
    if len(later) < 2:
        return []
    step = len(later) // 400 + 1  # pairs grow with the square
    later = later[::step]
    times = [sample["seconds"] for sample in later]
    verdicts = []
    for name, bound in BOUNDS.items():
        values = [sample[name] for sample in later]
        median = statistics.median(values)
        growth = slope(times, values) * (times[-1] - times[0])
        verdicts.append(Verdict(name, median, growth, bound.fixed + bound.part * median))
    return verdicts
