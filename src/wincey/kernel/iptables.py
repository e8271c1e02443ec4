"""Traffic rules by iptables, for hosts (or configs) where nftables is not wanted; and what nftables needs of iptables.

One restore per family does the whole change; the kernel takes each table over in one step. What was put is read back
once, as iptables prints it, and that text is what a later look has to find: so no version's way of printing matters.

A look costs four short processes per family. With iptables-nft it is left out as long as the kernel's generation
number says that nobody changed anything; legacy tables have no such number (see nfmonitor) and are looked at each
time.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Sequence

import msgspec

from wincey.kernel import nft
from wincey.kernel.bridgenf import turn_on_again
from wincey.kernel.driver import Desired
from wincey.kernel.families import apply_families, observe_families
from wincey.kernel.iptables_text import (
    ANCIENT,
    Place,
    Seen,
    Version,
    absent,
    historical,
    is_ancient,
    isolation_places,
    placed,
    places,
    rendered,
    rendered_isolation,
    restore_text,
)
from wincey.kernel.nfmonitor import GenerationCounter, LegacyPoll, NftMonitor, legacy_tables
from wincey.kernel.program import ProgramFailed, complaint, must, run
from wincey.kernel.rules import FAMILIES, check_suffix, nft_tables, unknown
from wincey.model.address import Subnet
from wincey.model.state import Changes, Failure, Key, Object, RuleSet, Scope

logger = logging.getLogger(__name__)

_LOCK_WAIT = "5"  # seconds to wait for another program that holds the xtables lock


class Iptables(msgspec.Struct, frozen=True):
    """One iptables program for one address family."""

    program: str
    family: int
    version: Version

    @classmethod
    async def find(cls, program: str, family: int) -> Iptables:
        """Ask a program for its version; `program` is the IPv4 one's name. Raises ProgramFailed if it is not there."""
        if family == socket.AF_INET6:
            program = program.replace("iptables", "ip6tables", 1)
        return cls(program, family, Version.parse(await must(program, "--version")))

    async def look(self, place: Place) -> Seen:
        """What is at a place now; raises ProgramFailed."""
        # One after the other: they would only wait for each other's lock, older versions a whole second at a time.
        hook = await must(self.program, "-w", _LOCK_WAIT, "-t", place.table, "-S", place.hook)
        own = await run(self.program, "-w", _LOCK_WAIT, "-t", place.table, "-S", place.chain)
        if own.code not in (0, 1):  # 1: no such chain
            raise ProgramFailed(f"{self.program}: {complaint(own)}")
        rules = tuple(line for line in own.out.splitlines() if line.startswith("-A "))
        return Seen(tuple(hook.splitlines()), None if own.code else rules)

    async def restore(self, text: str) -> None:
        """Carry out a restore text, each table in one step; raises ProgramFailed."""
        wait = ("--wait", _LOCK_WAIT) if self.version.modern else ()
        await must(f"{self.program}-restore", "--noflush", *wait, text=text)

    async def put(self, wanted: Sequence[tuple[Place, Sequence[str]]], stale: frozenset[str]) -> list[Seen]:
        """Make places hold these rules (none: be gone) and return what they then are; raises ProgramFailed.

        Tried twice, as another program may have changed a table between our look and our restore.
        """
        for last in (False, True):
            seen = [await self.look(place) for place, _ in wanted]
            text = "".join(
                restore_text(place, found, rules, stale) for (place, rules), found in zip(wanted, seen, strict=True)
            )
            if not text:
                return seen
            try:
                await self.restore(text)
            except ProgramFailed:
                if last:
                    raise
                continue
            seen = [await self.look(place) for place, _ in wanted]
            if _hold(wanted, seen):
                return seen
        raise ProgramFailed(f"{self.program}: another program keeps changing the same chains")

    async def remove(self, own: Sequence[Place], pairs: Sequence[tuple[Subnet, Subnet]] = ()) -> None:
        """Remove our chains at these places, their jumps, and flannel's older rules.

        Those are written for a network and a subnet: known ones are given as pairs. Raises ProgramFailed.
        """
        pairs = [pair for pair in pairs if pair[0].family == self.family]
        stale = frozenset(text for pair in pairs for text in historical(*pair))
        await self.put([(place, ()) for place in own], stale)
        await self.remove_ancient(pairs)

    async def remove_ancient(self, pairs: Sequence[tuple[Subnet, Subnet]]) -> None:
        """Remove the chain of flannel up to 0.5.5, if there is one for these networks; raises ProgramFailed."""
        seen = await self.look(ANCIENT) if pairs else Seen((), None)
        if any(is_ancient(network, seen.own or ()) for network, _ in pairs):
            await self.restore(restore_text(ANCIENT, seen, ()))


def _hold(wanted: Sequence[tuple[Place, Sequence[str]]], seen: Sequence[Seen]) -> bool:
    """Whether places have as many rules as were put: all that can be said without knowing how this version prints."""
    return all(
        placed(place, found) and len(found.own or ()) == len(rules) if rules else absent(place, found)
        for (place, rules), found in zip(wanted, seen, strict=True)
    )


async def programs(family: int, first: str = "iptables-nft") -> list[Iptables]:
    """The iptables programs on this host: at most one for nf_tables and one for the legacy tables."""
    found: dict[bool, Iptables] = {}
    for program in dict.fromkeys((first, "iptables-nft", "iptables-legacy", "iptables")):
        try:
            one = await Iptables.find(program, family)
        except ProgramFailed:
            continue
        found.setdefault(one.version.legacy, one)
    return list(found.values())


def in_use(candidates: Sequence[Iptables]) -> list[Iptables]:
    """Those whose tables may hold something: legacy ones only if they exist, as asking would make them."""
    return [one for one in candidates if not one.version.legacy or legacy_tables(one.family)]


def all_places(suffix: str, *, isolating: bool) -> tuple[Place, ...]:
    """Every place that the rules of a daemon, or with isolating those of one of several networks, can have."""
    return (*places(suffix), *(isolation_places(suffix) if isolating else ()))


async def clear(candidates: Sequence[Iptables], own: Sequence[Place], pairs: Sequence[tuple[Subnet, Subnet]]) -> None:
    """Remove our chains, and flannel's older rules for these pairs, from these programs' tables; trouble is logged."""
    for one in in_use(candidates):
        try:
            await one.remove(own, pairs)
        except ProgramFailed as error:
            logger.warning("rules of an earlier run may be left: %s", error)


async def clear_tables(suffix: str) -> None:
    """Delete our nftables tables if there are any; a host without nftables has none."""
    try:
        for family, table in nft_tables(suffix).items():
            await turn_on_again(family, table)
        await nft.delete_tables(*nft_tables(suffix).values())
    except ProgramFailed as error:
        logger.debug("no nftables tables deleted: %s", error)


async def clear_everything(
    suffix: str, pairs: Sequence[tuple[Subnet, Subnet]], program: str = "iptables-nft", *, isolating: bool = False
) -> None:
    """Remove all rules of ours, whichever flavour or version made them, and nothing else."""
    await clear_tables(suffix)
    for family in FAMILIES:
        await clear(await programs(family, program), all_places(suffix, isolating=isolating), pairs)


class IptablesDriver:
    """Keeps RuleSets by one iptables program: `iptables`, `iptables-legacy` or `iptables-nft` (a kernel.driver.Driver).

    previous: pairs of network and subnet that an earlier run, or an earlier flannel, may have left rules for. isolating:
    whether the RuleSets may ask for isolation; then the mangle table is looked at too.
    """

    handles: tuple[type[Object], ...] = (RuleSet,)

    def __init__(
        self,
        program: str = "iptables",
        suffix: str = "",
        previous: Sequence[tuple[Subnet, Subnet]] = (),
        *,
        isolating: bool = False,
    ) -> None:
        """Raises UsageError for a suffix that can't be part of a chain's name."""
        self._program, self._suffix, self._previous = program, check_suffix(suffix), tuple(previous)
        self._isolating = isolating
        self._places = all_places(suffix, isolating=isolating)
        self._found: dict[int, Iptables] = {}
        self._applied: dict[int, tuple[RuleSet, list[tuple[str, ...] | None]]] = {}
        self._verified: dict[int, tuple[int, RuleSet | None]] = {}
        self._generation = GenerationCounter()
        self._changed: Callable[[str], None] | None = None
        self._monitor: NftMonitor | None = None
        self._poll: LegacyPoll | None = None

    async def observe(self, desired: Desired, scope: Scope) -> dict[Key, Object]:
        """See kernel.driver.Driver."""
        return await observe_families(desired, self._observe)

    async def apply(self, changes: Changes) -> Sequence[Failure]:
        """See kernel.driver.Driver. Each family is one restore."""
        return await apply_families(changes, self._put, self._remove)

    def watch(self, changed: Callable[[str], None]) -> None:
        """See kernel.driver.Driver. Begins with the first rules put, when it is known which iptables it is."""
        self._changed = changed
        self._listen()

    async def close(self) -> None:
        """See kernel.driver.Driver."""
        self._changed = None
        if self._monitor:
            self._monitor.close()
        if self._poll:
            self._poll.close()
        self._monitor = self._poll = None
        self._generation.close()

    async def remove_all(self) -> None:
        """Remove all of ours, whichever flavour or version made it, and only that; what can't be is logged."""
        self._applied.clear()
        self._verified.clear()
        await clear_everything(self._suffix, self._previous, self._program, isolating=self._isolating)

    async def _observe(self, family: int, wanted: RuleSet | None) -> RuleSet | None:
        one = await self._iptables(family)
        generation = None if one.version.legacy else self._generation.read()
        if generation is not None and self._verified.get(family) == (generation, wanted):
            return wanted
        if wanted is None and one.version.legacy and not legacy_tables(family):
            return None
        seen = [await one.look(place) for place in self._places]
        state: RuleSet | None = unknown(family)
        if wanted is not None and self._applied.get(family) == (wanted, [found.own for found in seen]):
            if _hold(self._rules(one, wanted), seen):
                state = wanted
        elif _hold([(place, ()) for place in self._places], seen):
            state = None
        if generation is not None and state == wanted:
            self._verified[family] = (generation, wanted)
        return state

    async def _put(self, rules: RuleSet) -> None:
        family = rules.network.family
        one = await self._iptables(family)
        first = family not in self._applied
        pairs = [(rules.network, rules.subnet), *(pair for pair in self._previous if pair[0].family == family)]
        stale = frozenset(text for pair in pairs for text in historical(*pair)) if first else frozenset()
        self._forget(family)
        seen = await one.put(self._rules(one, rules), stale)
        self._applied[family] = (rules, [found.own for found in seen])
        if first:  # ours is in place: what others hold of it can go without a gap
            await one.remove_ancient(pairs)
            await clear_tables(self._suffix)
            others = await programs(family, self._program)
            await clear([other for other in others if other.version.legacy != one.version.legacy], self._places, pairs)
        self._listen()

    async def _remove(self, family: int) -> None:
        one = await self._iptables(family)
        self._forget(family)
        await one.remove(self._places)

    def _rules(self, one: Iptables, rules: RuleSet) -> list[tuple[Place, tuple[str, ...]]]:
        texts = rendered(rules, random_fully=rules.random_fully and one.version.modern)
        apart = rendered_isolation(rules) if self._isolating else ()
        return list(zip(self._places, (*texts, *apart), strict=True))

    async def _iptables(self, family: int) -> Iptables:
        if family not in self._found:
            self._found[family] = await Iptables.find(self._program, family)
        return self._found[family]

    def _forget(self, family: int) -> None:
        self._applied.pop(family, None)
        self._verified.pop(family, None)

    def _listen(self) -> None:
        """Listen in the way that fits what has been put."""
        if self._changed is None or not self._applied:
            return
        if any(self._found[family].version.legacy for family in self._applied):
            self._poll = self._poll or LegacyPoll(self._changed)
            self._poll.watch([(family, place.table) for family in self._applied for place in self._places])
        elif self._monitor is None:
            chains = {(place.table, chain) for place in self._places for chain in (place.hook, place.chain)}
            self._monitor = NftMonitor(
                {chain for _, chain in chains},
                lambda family, table, chain: family in self._applied and (table, chain) in chains,
                self._changed,
            )
