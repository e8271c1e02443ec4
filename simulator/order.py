"""One run that is asked for, and running it: a module of its own, as a process that is spawned has to find it by name."""

from __future__ import annotations

import msgspec

from simulator.scenario import Scenario, generate
from simulator.world import Result, World


class Order(msgspec.Struct, frozen=True):
    """One run that is asked for. hosts, faults: None as the seed has it."""

    seed: int
    hosts: int | None = None
    faults: int | None = None

    def scenario(self) -> Scenario:
        return generate(self.seed, hosts=self.hosts, faults=self.faults)

    @property
    def command(self) -> str:
        """What runs it again."""
        fields = (("--seed", self.seed), ("--hosts", self.hosts), ("--faults", self.faults))
        return 'make sim ARGS="' + " ".join(f"{flag} {value}" for flag, value in fields if value is not None) + '"'


def run(order: Order) -> tuple[Order, Result]:
    """One run, in whatever process."""
    return order, World(order.scenario()).run()
