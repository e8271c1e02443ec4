"""A run: for each kind of wire all variants are brought up side by side, and then loaded in turn, round after round."""

from __future__ import annotations

import datetime
import os
import platform
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import msgspec

from wincey import __version__
from wincey.lab.bench.load import LOADS, METRICS, Loader, Machine, important, unthrottled
from wincey.lab.bench.pair import Pair
from wincey.lab.bench.programs import compile_programs
from wincey.lab.bench.results import Results, Underlay
from wincey.lab.bench.variants import FLANNEL_VXLAN, Variant
from wincey.lab.lab import ROOT
from wincey.lab.report import Report
from wincey.model.errors import WinceyError

UNDERLAYS = ("offloading", "segmenting")

_AROUND = 0.35  # seconds around each load: warming up, starting programs
_START = 2.5  # seconds that a variant takes to come up


class Plan(msgspec.Struct, frozen=True):
    """What to measure: variants on underlays, how many rounds, and for how many seconds each load runs.

    name: what the names of its labs begin with.
    """

    variants: tuple[Variant, ...]
    underlays: tuple[str, ...] = UNDERLAYS
    rounds: int = 5
    seconds: float = 1.0
    baseline: str = FLANNEL_VXLAN
    name: str = "bench"

    @property
    def estimate(self) -> float:
        """Seconds that it will take, about."""
        one = _START + self.rounds * len(LOADS) * (self.seconds + _AROUND)
        return len(self.variants) * len(self.underlays) * one


def run(plan: Plan, report: Report, root: Path = ROOT) -> Results:
    """Measure; raises LabError for what no variant can do without. Nothing of it stays, however it ends."""
    machine = Machine.find()
    results = Results(
        version=__version__,
        kernel=platform.release(),
        machine=platform.machine(),
        cores=os.cpu_count() or 1,
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        realtime=machine.realtime,
        rounds=plan.rounds,
        seconds=plan.seconds,
        baseline=plan.baseline,
        what={variant.name: variant.what for variant in plan.variants},
    )
    with tempfile.TemporaryDirectory(prefix="wincey-bench-") as scratch, important(), unthrottled():
        programs = Path(scratch)
        compile_programs(programs)
        loader = Loader(programs, machine, plan.seconds)
        for underlay in plan.underlays:
            part = _Part(plan, underlay, report)
            results.underlays[underlay] = part.found
            with ExitStack() as standing:
                part.start(programs, root, standing)
                part.measure(loader)
    return results


class _Part:
    """What is measured on one kind of wire."""

    def __init__(self, plan: Plan, underlay: str, report: Report) -> None:
        self._plan, self._underlay, self._report = plan, underlay, report
        self._pairs: dict[str, Pair] = {}
        self.found = Underlay()

    def start(self, programs: Path, root: Path, standing: ExitStack) -> None:
        """Bring every variant up; what can't be is left out."""
        for number, variant in enumerate(self._plan.variants, 1):
            self._report(f"{self._underlay}: starting {variant.name}", number, len(self._plan.variants))
            try:
                name = f"{self._plan.name}-{variant.name}"
                pair = Pair(variant, name, segmenting=self._underlay == "segmenting", programs=programs, root=root)
                pair.start()
            except WinceyError as error:
                self._leave_out(variant.name, error)
            else:
                standing.callback(pair.down)
                self._pairs[variant.name] = pair

    def measure(self, loader: Loader) -> None:
        """Every round: each load on every variant that came up, so that what is compared is measured within seconds."""
        begin, done = time.monotonic(), 0
        for number in range(self._plan.rounds):
            for load in LOADS:
                left = (self._plan.rounds * len(LOADS) - done) * (time.monotonic() - begin) / max(done, 1)
                about = f", about {left / 60:.1f} min left here" if done else ""
                for name in [*self._pairs]:
                    self._report(f"{self._underlay}: round {number + 1} of {self._plan.rounds}, {load}, {name}{about}")
                    self._measure(loader, load, name)
                done += 1

    def _measure(self, loader: Loader, load: str, name: str) -> None:
        try:
            figures = loader.measure(load, self._pairs[name])
        except WinceyError as error:
            self._pairs.pop(name)  # once it fails it is not asked again: a ratio needs every round
            self.found.variants.pop(name, None)
            self._leave_out(name, error)
            return
        rounds = self.found.variants.setdefault(name, {metric: [] for metric in METRICS})
        for metric, figure in figures.items():
            rounds[metric].append(figure)

    def _leave_out(self, name: str, error: WinceyError) -> None:
        self.found.left_out[name] = str(error)
        self._report(f"{self._underlay}: {name} is left out: {error}")
