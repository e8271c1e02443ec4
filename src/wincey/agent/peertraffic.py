"""--metrics-peers: what goes to and comes from each peer, added up for as long as the daemon runs.

The kernel keeps no such count, so the packet filter is made to (kernel.peercounters), which costs each packet a look-up. That
table is made anew when peers come or go; what it had counted is kept here.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable

from wincey.kernel.peercounters import Counted, PeerCounters
from wincey.model.address import Subnet
from wincey.model.errors import KernelError

log = logging.getLogger(__name__)

EVERY = 5.0
"""Seconds between two looks, each of which is two runs of nft."""


class PeerTraffic:
    """Counts for the subnets that `wanted()` names. `busiest(n)` is what is known."""

    def __init__(self, wanted: Callable[[], Iterable[Subnet]], every: float = EVERY) -> None:
        self._wanted, self._every = wanted, every
        self._totals: dict[Subnet, Counted] = {}
        self._seen: dict[Subnet, Counted] = {}

    async def run(self) -> None:
        """Until cancelled. Where the packet filter can't count, that is told once, and tried again."""
        told = ""
        while True:
            try:
                await self._count()
            except KernelError as error:
                if str(error) != told:
                    told = str(error)
                    log.warning("--metrics-peers: %s", error)
            await asyncio.sleep(self._every)

    def busiest(self, most: int) -> list[tuple[Subnet, Counted]]:
        """The peers with most bytes so far, both ways, the busiest first."""
        ranked = sorted(self._totals.items(), key=lambda item: (-item[1].bytes_to - item[1].bytes_from, item[0]))
        return ranked[:most]

    async def _count(self) -> None:
        """For as long as the peers stay the same."""
        subnets = set(self._wanted())
        self._totals = {subnet: self._totals.get(subnet, Counted()) for subnet in subnets}
        if not subnets:
            return
        counters = PeerCounters(subnets)
        try:
            await asyncio.to_thread(counters.__enter__)
            self._seen = {}
            while True:
                self._add(await asyncio.to_thread(counters.read))
                if set(self._wanted()) != subnets:
                    return
                await asyncio.sleep(self._every)
        finally:
            counters.__exit__()  # kills a child: nothing to wait for

    def _add(self, now: dict[Subnet, Counted]) -> None:
        for subnet, counted in now.items():
            total, before = self._totals[subnet], self._seen.get(subnet, Counted())
            total.packets_to += counted.packets_to - before.packets_to
            total.bytes_to += counted.bytes_to - before.bytes_to
            total.packets_from += counted.packets_from - before.packets_from
            total.bytes_from += counted.bytes_from - before.bytes_from
        self._seen = now
