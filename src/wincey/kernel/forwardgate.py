"""The way through iptables' FORWARD chain, for hosts whose traffic rules are nftables'.

An accept in a chain of our own ends that chain only: a packet still has to pass every other base chain of the hook.
Docker, for one, sets the policy of iptables' FORWARD chain to DROP. Where that chain lets nothing through by itself,
the chain FLANNEL-FWD of the iptables flavour is kept in it, and taken away when it is not needed: behind Docker's own
rules, which stop only what goes between its bridges.

Trouble with iptables is told in the log and is no failure: the nftables rules stand all the same.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Sequence

from wincey.kernel import nft
from wincey.kernel.iptables import Iptables, in_use, programs
from wincey.kernel.iptables_text import absent, blocks, historical, placed, places, rendered
from wincey.kernel.program import ProgramFailed
from wincey.model.address import Subnet
from wincey.model.state import RuleSet

logger = logging.getLogger(__name__)


class ForwardGate:
    """Keeps the accepting chain where it is needed, for each kind of iptables whose tables exist."""

    def __init__(self, suffix: str, previous: Sequence[tuple[Subnet, Subnet]]) -> None:
        self._masquerade, self._forward = places(suffix)
        self._previous = tuple(previous)
        self._programs: dict[int, list[Iptables]] = {}
        self._applied: dict[tuple[int, bool], tuple[RuleSet | None, tuple[str, ...] | None]] = {}
        self._said: set[str] = set()

    @property
    def table(self) -> str:
        """The iptables table that the gate is in."""
        return self._forward.table

    @property
    def chains(self) -> tuple[str, str]:
        """The chains whose change concerns it."""
        return self._forward.hook, self._forward.chain

    async def intact(self, family: int, rules: RuleSet | None) -> bool:
        """Whether the gate is as these rules (None: none at all) need it, as far as can be seen."""
        for one in await self._in_use(family):
            try:
                seen = await one.look(self._forward)
            except ProgramFailed:
                continue
            if not (rules and rules.forward and blocks(seen.hook)):
                if not absent(self._forward, seen):
                    return False
            elif not placed(self._forward, seen) or self._applied.get((family, one.version.legacy)) != (
                rules,
                seen.own,
            ):
                return False
        return True

    async def put(self, family: int, rules: RuleSet | None, *, first: bool) -> None:
        """Open the gate where it is needed, and take it away elsewhere.

        first: nothing is known of what earlier runs left, so rules that the iptables flavour, or a flannel, made go too.
        """
        readable = False
        for one in await self._in_use(family):
            try:
                await self._put(one, rules, first)
                readable |= not one.version.legacy
            except ProgramFailed as error:
                self._say(f"iptables' FORWARD chain can't be looked after: {error}")
        if rules and rules.forward and not readable:
            await self._warn_if_closed(rules)

    async def _put(self, one: Iptables, rules: RuleSet | None, first: bool) -> None:
        seen = await one.look(self._forward)
        needed = rules is not None and rules.forward and blocks(seen.hook)
        accept = rendered(rules, random_fully=False)[1] if rules and needed else ()
        pairs = list(self._previous) + ([(rules.network, rules.subnet)] if rules else []) if first else []
        pairs = [pair for pair in pairs if pair[0].family == one.family]
        stale = frozenset(text for pair in pairs for text in historical(*pair))
        wanted = [(self._forward, accept), *(((self._masquerade, ()),) if first else ())]
        self._applied[one.family, one.version.legacy] = (rules, (await one.put(wanted, stale))[0].own)
        await one.remove_ancient(pairs)
        if needed:
            self._say(f"{one.program}: FORWARD drops what no rule accepts, so {self._forward.chain} is kept there too")

    async def _in_use(self, family: int) -> list[Iptables]:
        if family not in self._programs:
            self._programs[family] = await programs(family)
        return in_use(self._programs[family])

    async def _warn_if_closed(self, rules: RuleSet) -> None:
        """Without iptables, nft itself shows whether iptables' chain is closed; its owner has to open it then."""
        family = "ip" if rules.network.family == socket.AF_INET else "ip6"
        chain = await nft.listing("chain", family, self._forward.table, self._forward.hook)
        if chain and "policy drop" in chain:
            self._say(
                f"the chain FORWARD of the nftables table '{family} {self._forward.table}' has policy drop, which stops"
                f" container traffic; install iptables, or accept {rules.network} there:"
                f" nft add rule {family} {self._forward.table} {self._forward.hook} {family} saddr {rules.network} accept,"
                " and the same with daddr"
            )

    def _say(self, what: str) -> None:
        """Log a line once."""
        if what not in self._said:
            self._said.add(what)
            logger.warning("%s", what)
