"""How a figure grows with the number of leases: a + b·f(n) fitted for each f, by least squares of the relative error. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

SHAPES: Mapping[str, Callable[[float], float]] = {
    "n": lambda n: n,
    "n log n": lambda n: n * math.log2(max(n, 2)),
    "n²": lambda n: n * n,
}


class Fit(NamedTuple):
    """y ≈ base + slope·f(n). error: the root of the mean square of its relative deviations."""

    shape: str
    base: float
    slope: float
    error: float

    def at(self, n: float) -> float:
        """What it says for n."""
        return self.base + self.slope * SHAPES[self.shape](n)


def fits(points: Sequence[tuple[float, float]]) -> list[Fit]:
    """All shapes, the best one first. points: (leases, figure), figures above 0; at least three."""
    return sorted((_fit(name, shape, points) for name, shape in SHAPES.items()), key=lambda fit: fit.error)


def _fit(name: str, shape: Callable[[float], float], points: Sequence[tuple[float, float]]) -> Fit:
    """Weighted by 1/y², so that small figures count as much as large ones; neither base nor slope below 0."""
    rows = [(shape(n), y, 1 / y**2) for n, y in points]
    weight = sum(w for _, _, w in rows)
    mean_x = sum(w * x for x, _, w in rows) / weight
    mean_y = sum(w * y for _, y, w in rows) / weight
    spread = sum(w * (x - mean_x) ** 2 for x, _, w in rows)
    slope = max(0.0, sum(w * (x - mean_x) * (y - mean_y) for x, y, w in rows) / spread)
    base = mean_y - slope * mean_x
    if base < 0:
        base, slope = 0.0, sum(w * x * y for x, y, w in rows) / sum(w * x * x for x, _, w in rows)
    error = math.sqrt(sum(w * (base + slope * x - y) ** 2 for x, y, w in rows) / len(rows))
    return Fit(name, base, slope, error)


def say(points: Sequence[tuple[float, float]]) -> str:
    """One line: the errors of all shapes, and which one fits."""
    if len(points) < 3:
        return "too few sizes to say"
    found = fits(points)
    errors = ", ".join(
        f"{fit.shape} {fit.error * 100:.0f} %" for fit in sorted(found, key=lambda fit: list(SHAPES).index(fit.shape))
    )
    best = found[0]
    # The logarithm changes by a third over these sizes: what fits both equally well is not told apart, and need not be.
    close = [fit.shape for fit in found if fit.error < best.error + 0.02]
    return f"{' or '.join(close)}  (off by: {errors})"
