"""What was measured, and what it says: medians, ratios round by round, and whether targets were met. Pure.

Absolute figures move from run to run with whatever else the machine does; two variants measured a few seconds apart move
together. So what is compared is the ratio within each round, and told is the median of these ratios with the lowest and
the highest.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator

import msgspec

from wincey.lab.bench.load import LOWER_IS_BETTER
from wincey.lab.bench.variants import FLANNEL_VXLAN, PROXY, PROXY_HOSTS

Rounds = dict[str, list[float]]
"""By metric: a figure for each round."""


class Ratio(msgspec.Struct, frozen=True):
    """The median of per-round ratios, the lowest and the highest."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


class Underlay(msgspec.Struct):
    """One kind of wire: figures by variant, and why others were left out."""

    variants: dict[str, Rounds] = {}
    left_out: dict[str, str] = {}


class Results(msgspec.Struct, kw_only=True):
    """All of a run. seconds: of each load. realtime: whether requests ran with real-time priority."""

    version: str
    kernel: str
    machine: str
    cores: int
    date: str
    realtime: bool
    rounds: int
    seconds: float
    baseline: str
    what: dict[str, str] = {}
    underlays: dict[str, Underlay] = {}


class Target(msgspec.Struct, frozen=True):
    """What a metric of a variant has to reach against another's, as a ratio: at least, or at most where less is better.

    underlay: on this one only. about: a median beyond it will do if the spread reaches it ("no worse").
    """

    variant: str
    against: str
    metric: str
    ratio: float
    underlay: str = ""
    about: bool = False


class Verdict(msgspec.Struct, frozen=True):
    """A target on one underlay, the ratio measured, and whether that met it."""

    underlay: str
    target: Target
    measured: Ratio
    met: bool

    def __str__(self) -> str:
        target = self.target
        bound = "at most" if target.metric in LOWER_IS_BETTER else "at least"
        return (
            f"{'met   ' if self.met else 'MISSED'} {self.underlay}: {target.variant} / {target.against}, {target.metric}:"
            f" {self.measured}, wanted {bound} {target.ratio:g}{' within the spread' if target.about else ''}"
        )


def _targets(variant: str, against: str, underlay: str = "", **ratios: float) -> tuple[Target, ...]:
    return tuple(Target(variant, against, metric, ratio, underlay) for metric, ratio in ratios.items())


TARGETS = (
    *_targets("udp-bpf", PROXY, "segmenting", tcp1=6, tcp4=7, udp=3, rr=2),
    *_targets("udp-bpf", FLANNEL_VXLAN, "segmenting", tcp1=0.85, tcp4=0.85, udp=1, rr=1),
    *_targets("udp-offload", PROXY, tcp1=4, tcp4=4, udp2=4, cpu=0.25),
    *_targets("udp-offload-hosts", PROXY_HOSTS, udp2=4),
    Target("udp-offload", PROXY, "p50", 1, about=True),
    *_targets("udp-offload-python", PROXY, tcp1=0.6),
    *_targets("vxlan", FLANNEL_VXLAN, udp=1.1),
    *_targets("vxlan-fast-tunnel", "vxlan", udp=1.4, rr=1.2),
    *_targets("vxlan-fast-tunnel", FLANNEL_VXLAN, udp=1.4, rr=1.2),
    *_targets("vxlan-fast", "vxlan", udp=1.8, rr=1.4),
    *(
        Target(variant, "vxlan", metric, 1, about=True)
        for variant in ("vxlan-fast-tunnel", "vxlan-fast")
        for metric in ("tcp1", "tcp4")
    ),
    *_targets("vxlan-fast", "host-gw", rr=1),
)
"""What the data path is to reach."""


def ratio(of: list[float], to: list[float]) -> Ratio:
    """Round by round; rounds that one of them lacks don't count."""
    ratios = [one / other for one, other in zip(of, to, strict=False)]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))


def verdicts(results: Results) -> Iterator[Verdict]:
    """Each target whose two variants were measured, on each underlay that it is for."""
    for underlay, measured in results.underlays.items():
        for target in TARGETS:
            variant, against = (measured.variants.get(name) for name in (target.variant, target.against))
            if not variant or not against or target.underlay not in ("", underlay):
                continue
            found = ratio(variant[target.metric], against[target.metric])
            if target.metric in LOWER_IS_BETTER:
                met = (found.low if target.about else found.median) <= target.ratio
            else:
                met = (found.high if target.about else found.median) >= target.ratio
            yield Verdict(underlay, target, found, met)
