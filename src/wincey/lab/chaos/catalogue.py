"""All scenarios, in the order of their families."""

from __future__ import annotations

from collections.abc import Sequence

from wincey.lab.chaos import (
    faults_card,
    faults_clock,
    faults_daemon,
    faults_limits,
    faults_rules,
    faults_store,
    faults_underlay,
)
from wincey.lab.chaos.scenario import Scenario
from wincey.lab.errors import UnknownName
from wincey.lab.suggest import suggestion

_FAMILIES = (faults_store, faults_clock, faults_underlay, faults_card, faults_limits, faults_rules, faults_daemon)

SCENARIOS: dict[str, Scenario] = {scenario.name: scenario for family in _FAMILIES for scenario in family.SCENARIOS}
"""By name."""


def chosen(names: Sequence[str]) -> list[Scenario]:
    """The scenarios of these names, `all` for each; raises UnknownName."""
    if "all" in names:
        return list(SCENARIOS.values())
    for name in names:
        if name not in SCENARIOS:
            known = ", ".join(SCENARIOS)
            raise UnknownName(f"no scenario {name!r}: there are {known}{suggestion(name, list(SCENARIOS))}")
    return [SCENARIOS[name] for name in dict.fromkeys(names)]
