"""From a scenario that fails to a smaller one that fails in the same way: fewer faults, fewer hosts, less of everything."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import msgspec

from simulator.scenario import Scenario
from simulator.world import World

replace = msgspec.structs.replace


def broken(scenario: Scenario) -> set[str]:
    """The invariants that it breaks."""
    return {violation.invariant for violation in World(scenario).run().violations}


def shrink(scenario: Scenario, fails: Callable[[Scenario], bool], most: int = 300) -> Scenario:
    """The smallest scenario found, of at most `most` that are tried, for which `fails` is still true."""
    tried = 0
    smaller = True
    while smaller:
        smaller = False
        for candidate in _candidates(scenario):
            tried += 1
            if tried > most:
                return scenario
            if fails(candidate):
                scenario, smaller = candidate, True
                break
    return scenario


def _candidates(scenario: Scenario) -> Iterator[Scenario]:
    """Scenarios that are a little less, the greatest steps first."""
    faults = scenario.faults
    size = len(faults) // 2
    while size:
        for start in range(0, len(faults), size):
            yield replace(scenario, faults=faults[:start] + faults[start + size :])
        size //= 2
    named = max((getattr(timed.fault, "host", 0) for timed in faults), default=0)
    for hosts in (2, max(2, named), scenario.hosts - 1):
        if 2 <= hosts < scenario.hosts:
            yield replace(scenario, hosts=hosts, spare=scenario.spare + scenario.hosts - hosts)
    if scenario.members > 1:
        yield replace(scenario, members=1)
    if scenario.rest:
        yield replace(scenario, rest=0.0)
    if scenario.spread:
        yield replace(scenario, spread=0.0)
    for place, timed in enumerate(faults):
        if timed.fault.lasts > 1.0:
            fault = replace(timed.fault, lasts=round(timed.fault.lasts / 2, 1))  # 0 would be a fault that never ends
            yield replace(scenario, faults=(*faults[:place], replace(timed, fault=fault), *faults[place + 1 :]))
