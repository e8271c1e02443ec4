"""The traffic rules by whichever program the network config asks for, or works here: the flavour may change at run time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from wincey.kernel.driver import Desired
from wincey.kernel.iptables import IptablesDriver
from wincey.kernel.nftables import NftablesDriver
from wincey.kernel.rules import choose_flavour
from wincey.model.address import Subnet
from wincey.model.state import Changes, Failure, Key, Object, RuleSet, Scope

log = logging.getLogger(__name__)


class TrafficRulesDriver:
    """Keeps RuleSets (a kernel.driver.Driver) by nftables or iptables.

    suffix: keeps the tables of several daemons or networks on one host apart. previous: pairs of network and subnet that an
    earlier run, or flannel, may have left rules for. isolating: whether the RuleSets may ask for isolation.
    """

    handles: tuple[type[Object], ...] = (RuleSet,)

    def __init__(
        self, suffix: str = "", previous: Sequence[tuple[Subnet, Subnet]] = (), *, isolating: bool = False
    ) -> None:
        """Raises UsageError for a suffix that can't be part of a chain's name."""
        self._suffix, self._previous, self._isolating = suffix, previous, isolating
        self._driver: NftablesDriver | IptablesDriver = NftablesDriver(suffix, previous, isolating=isolating)
        self._flavour = "nftables"
        self._told = False
        self._changed: Callable[[str], None] | None = None

    async def choose(self, enable_nftables: bool | None) -> None:
        """Take the flavour that the config asks for (None: what works here); raises NotJoinable.

        What the other flavour had made goes when the new one makes its own: see `apply` of each.
        """
        flavour = await choose_flavour(enable_nftables)
        if not self._told or flavour.name != self._flavour:
            log.info("traffic rules by %s: %s", flavour.name, flavour.reason)
            self._told = True
        if flavour.name == self._flavour:
            return
        await self._driver.close()
        self._flavour = flavour.name
        if flavour.name == "nftables":
            self._driver = NftablesDriver(self._suffix, self._previous, isolating=self._isolating)
        else:
            self._driver = IptablesDriver(suffix=self._suffix, previous=self._previous, isolating=self._isolating)
        if self._changed:
            self._driver.watch(self._changed)

    async def observe(self, desired: Desired, scope: Scope) -> dict[Key, Object]:
        """See kernel.driver.Driver."""
        return await self._driver.observe(desired, scope)

    async def apply(self, changes: Changes) -> Sequence[Failure]:
        """See kernel.driver.Driver."""
        return await self._driver.apply(changes)

    def watch(self, changed: Callable[[str], None]) -> None:
        """See kernel.driver.Driver."""
        self._changed = changed
        self._driver.watch(changed)

    async def close(self) -> None:
        """See kernel.driver.Driver."""
        await self._driver.close()

    async def remove_all(self) -> None:
        """Remove all of ours, whichever flavour made it, and only that."""
        await self._driver.remove_all()
