"""Runs a scenario in a world of its own, and judges.

world up ─ all well? ─ traffic begins ─ fault put ─ (a new lease reaches all) ─ fault taken away ─ all well again ─ judge
                                          └── followed_ms ──┘                        └── heal_ms ──┘
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from wincey.lab.chaos.healing import Healing
from wincey.lab.chaos.scenario import NotHere, Result, Scenario
from wincey.lab.chaos.traffic import Pair, Traffic, silent
from wincey.lab.chaos.world import World, world_spec
from wincey.lab.lab import ROOT, fresh_name
from wincey.lab.needs import check_needs
from wincey.lab.ping import ping_matrix
from wincey.lab.report import Report
from wincey.model.errors import WinceyError

_BEFORE, _AFTER = 0.5, 0.5  # seconds of traffic without a fault
_WELL = 30.0  # seconds for a new world to be well


def check_programs() -> None:
    """Raise LabError for what every scenario needs and the machine lacks, before any is run."""
    check_needs(world_spec("chaos", "vxlan"))


def run_scenario(scenario: Scenario, *, backend: str, root: Path = ROOT, report: Report) -> Result:
    """Run one; what goes wrong with it is in the result, and its world is gone afterwards."""
    begin = time.monotonic()
    world = World(world_spec(fresh_name(root), backend), root=root, report=report, late=scenario.late)
    try:
        world.up()
        try:
            scenario.prepare(world)
            report(f"{scenario.name}: {scenario.does}")
            result = _Run(scenario, world).go()
        finally:
            world.down()
    except NotHere as why:
        result = Result(name=scenario.name, passed=None, reason=str(why))
    except (WinceyError, OSError) as error:
        result = Result(name=scenario.name, passed=False, reason=f"could not be run: {error}")
    return msgspec.structs.replace(result, seconds=round(time.monotonic() - begin, 1))


class _Run:
    """One scenario in a world that is up."""

    def __init__(self, scenario: Scenario, world: World) -> None:
        self.scenario, self.world = scenario, world
        self.healing = Healing(world, self._tend)
        self.reasons: list[str] = []

    def go(self) -> Result:
        if why := self.healing.healthy(time.monotonic() + _WELL):
            raise WinceyError(f"the world was not well before the fault: {why}")
        first = ping_matrix(self.world.people, (4,), patience=_WELL)
        if first.unreachable:
            raise WinceyError(
                f"the world was not well before the fault: {first.unreachable[0]}: {first.unreachable[0].why}"
            )
        before = {host.name: host.gateways for host in self.world.machines}
        with Traffic(self.world.people) as traffic:
            time.sleep(_BEFORE)
            followed, end = self._suffer()
            why = self.healing.healed(end + self.scenario.patience)
            healed = time.monotonic()
            if why:
                self.reasons.append(f"not as wanted {self.scenario.patience:.0f} s after the fault: {why}")
            else:
                self._talk(traffic)
            time.sleep(_AFTER)
        self._judge(traffic, end)
        if changed := [host.name for host in self.world.machines if host.gateways != before[host.name]]:
            self.reasons.append(f"{', '.join(changed)} changed subnets")
        well = [way.well_since(end) for way in traffic.ways]
        seen = [each for each in well if each is not None]
        healthy = not why and len(seen) == len(well)
        return Result(
            name=self.scenario.name,
            passed=not self.reasons,
            reason="; ".join(self.reasons),
            whole=traffic.counted(self._whole),
            affected=traffic.counted(lambda pair: not self._whole(pair)),
            silence_ms=round(1000 * max((way.silence() for way in traffic.ways), default=0)),
            followed_ms=followed,
            heal_ms=round(1000 * (max(healed, *seen) - end)) if healthy else None,
        )

    def _suffer(self) -> tuple[int | None, float]:
        """Put the fault and take it away; how long a new lease took meanwhile, in ms, and when the fault ended."""
        followed = None
        start = time.monotonic()
        with self.scenario.fault(self.world):
            if self.scenario.follows:
                if why := self.healing.followed(start + self.scenario.patience):
                    self.reasons.append(f"no new lease reached all hosts during the fault: {why}")
                else:
                    followed = round(1000 * (time.monotonic() - start))
            while time.monotonic() < start + self.scenario.hold:
                self._tend()
                time.sleep(0.02)
        return followed, time.monotonic()

    def _tend(self) -> None:
        """Start daemons again that may end, as systemd would."""
        for host in self.world.machines:
            if host.name in self.scenario.restarts and not host.running:
                host.start_daemon(wait=False)

    def _talk(self, traffic: Traffic) -> None:
        """A new TCP connection has to work between every two hosts."""
        for way in traffic.ways:
            if way.pair[0] < way.pair[1] and not traffic.conversation_works(way.source, way.target):
                self.reasons.append(f"no TCP from {way.source.name} to {way.target.name} after the fault")

    def _judge(self, traffic: Traffic, end: float) -> None:
        """What must not be."""
        must_not_lose: Callable[[Pair], bool] = (lambda _pair: True) if self.scenario.lossless else self._whole
        for way in traffic.ways:
            if must_not_lose(way.pair) and (lost := way.lost()):
                self.reasons.append(f"{len(lost)} packets from {way.source.name} to {way.target.name} lost")
            elif way.well_since(end) is None:
                self.reasons.append(f"{way.source.name} does not reach {way.target.name}")
        for each in silent(each for each in traffic.conversations if self._whole(each.pair)):
            why = each.trouble or f"{each.said - each.heard} bytes did not come back"
            self.reasons.append(f"TCP between {' and '.join(each.pair)}: {why}")

    def _whole(self, pair: Pair) -> bool:
        """Whether the connection of these hosts was whole all the time."""
        cut = [host in self.scenario.affected for host in pair]
        return not (all(cut) if self.scenario.apart else any(cut))
