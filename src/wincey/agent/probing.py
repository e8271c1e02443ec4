"""--probe: asks the peers, a few packets a minute, whether they answer, how soon, and how large a packet gets there.

Echo requests need nothing of the peer: a host with flannel answers as well. Each round asks a bounded number of peers, so that
a large cluster is sampled in turn and never flooded: at SAMPLE peers and 3 + 1 requests each, a host sends some 4 packets a
second at most, and gets as many.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time

from wincey.kernel.echo import Echo, path_mtu
from wincey.model.address import Address
from wincey.model.probe import Probed, Target, Window

log = logging.getLogger(__name__)

EVERY = 60.0
"""Seconds for a round, jittered."""

SAMPLE = 60
"""Peers in a round; of more, those that were asked longest ago."""

REQUESTS = 3
"""Through the network, a round; one to the host itself besides."""

MTU_EVERY = 600.0
"""Seconds between two looks at the MTU of one way."""

_AT_ONCE = 8


class Prober:
    """Asks the `targets`, which others keep by peer, for ever. `results`: what is known; who leaves is forgotten."""

    def __init__(self, rng: random.Random, every: float = EVERY) -> None:
        self.targets: dict[str, Target] = {}
        self.results: dict[str, Probed] = {}
        self._rng, self._every = rng, every
        self._mtu_at: dict[str, float] = {}

    async def run(self) -> None:
        """Until cancelled."""
        told = ""
        while True:
            try:
                await self.round()
                told = ""
            except OSError as error:
                if str(error) != told:
                    told = str(error)
                    log.warning("--probe: can't ask the peers: %s", error)
            await asyncio.sleep(self._every * self._rng.uniform(0.8, 1.2))

    async def round(self) -> None:
        """Ask once around; raises OSError when this host may not send requests at all."""
        targets = dict(self.targets)
        for peer in self.results.keys() - targets.keys():
            del self.results[peer]
            self._mtu_at.pop(peer, None)
        known = self.results
        chosen = sorted(targets, key=lambda peer: known[peer].asked_at if peer in known else 0.0)[:SAMPLE]
        gate = asyncio.Semaphore(_AT_ONCE)

        async def ask(peer: str) -> None:
            async with gate:
                await self._ask(peer, targets[peer])

        await asyncio.gather(*map(ask, chosen))

    async def _ask(self, peer: str, target: Target) -> None:
        result = self.results.setdefault(peer, Probed())
        result.asked_at = time.monotonic()
        await _send(target.outer, 1, result.outer)
        if target.inner:
            await _send(target.inner, REQUESTS, result.inner)
        way = target.inner or target.outer
        window = result.inner if target.inner else result.outer
        if window.rtt is not None and not window.silent and time.monotonic() >= self._mtu_at.get(peer, 0.0):
            self._mtu_at[peer] = time.monotonic() + MTU_EVERY * self._rng.uniform(0.8, 1.2)
            with Echo(way[0]) as echo:
                found = await path_mtu(echo, way[1], most=target.mtu if target.inner else target.outer_mtu)
            result.mtu = found or result.mtu


async def _send(way: tuple[Address, Address], count: int, window: Window) -> None:
    source, address = way
    with Echo(source) as echo:
        for _ in range(count):
            answer = await echo.ask(address)
            window.add(answer.rtt, answer.refusal)
