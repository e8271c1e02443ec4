"""Traffic rules by nftables: one table per address family, replaced whole in one transaction.

After a transaction the table is listed once, and that text is what a later look has to find; it is never parsed. The
look itself is left out as long as the kernel's generation number says that nobody changed anything.

An accept in our table does not open iptables' FORWARD chain where that is closed: see forwardgate. Nor any other chain:
in a chain that accepts what its rules don't drop it does nothing at all but take time for every packet. So there are
no accepting rules here, which flannel's table has, and no chain for forwarded packets unless something is dropped. For
what else the path of a packet costs, and could be spared, see bridgenf.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from wincey.kernel import nft
from wincey.kernel.bridgenf import MARKER, BridgeNetfilter
from wincey.kernel.driver import Desired
from wincey.kernel.families import apply_families, observe_families
from wincey.kernel.forwardgate import ForwardGate
from wincey.kernel.iptables import clear_everything
from wincey.kernel.nfmonitor import GenerationCounter, LegacyPoll, NftMonitor, legacy_tables
from wincey.kernel.program import ProgramFailed
from wincey.kernel.rules import (
    FAMILIES,
    MARK,
    Match,
    Rule,
    check_suffix,
    ingress_rules,
    masquerade_rules,
    nft_tables,
    separation_rules,
    unknown,
)
from wincey.model.address import Subnet
from wincey.model.state import Changes, Failure, Key, Object, RuleSet, Scope

logger = logging.getLogger(__name__)

_CHAIN = """\
    chain {name} {{
        {comment}
        type {kind}; policy accept;
        {rules}
    }}
"""


def rendered_table(rules: RuleSet, features: nft.Features, suffix: str = "", *, marker: str = "") -> str:
    """The script that replaces a family's table by one with these rules (compatibility reference, section 7.5).

    It is deleted and made within one transaction, so that nothing that was added to it by others stays. `add` makes
    the delete succeed on the first time. marker: an empty chain to have besides (see bridgenf).
    """
    family, table = nft_tables(suffix)[rules.network.family]
    fully_random = rules.random_fully and features.fully_random
    chains = "".join(
        _CHAIN.format(
            name=name,
            comment=f'comment "{comment}"' if features.comments else "",
            kind=kind,
            rules="\n        ".join(_rule(rule, family, fully_random) for rule in chain),
        )
        for name, comment, kind, chain in (
            (
                "postrtg",
                "chain to manage traffic masquerading by flannel",
                "nat hook postrouting priority 100",  # srcnat, a word that older versions of nft don't know
                masquerade_rules(rules),
            ),
            (
                "forward",
                "chain to keep forwarded packets of networks apart",
                "filter hook forward priority 0",
                separation_rules(rules),
            ),
            (
                "ingress",
                "chain to keep networks apart",
                "filter hook prerouting priority -300",  # raw: before any NAT
                ingress_rules(rules),
            ),
        )
        if chain
    )
    if marker:
        chains += f"    chain {marker} {{\n    }}\n"
    comment = f'    comment "rules for {table}"\n' if features.comments else ""
    return (
        f"add table {family} {table}\ndelete table {family} {table}\ntable {family} {table} {{\n{comment}{chains}}}\n"
    )


def _rule(rule: Rule, family: str, fully_random: bool) -> str:
    words = [
        f"meta mark & {MARK:#x} == {MARK:#x}" if rule.marked else "",
        f'iifname "{rule.device}"' if rule.device else "",
        _match(f"{family} saddr", rule.source),
        _match(f"{family} daddr", rule.destination),
        f"udp dport {rule.udp_port}" if rule.udp_port else "",
        "fib daddr type local" if rule.local else "",
        "fib saddr . iif oif missing" if rule.strayed else "",
        rule.verdict,
        "fully-random" if fully_random and rule.verdict == "masquerade" else "",
    ]
    return " ".join(word for word in words if word)


def _match(field: str, match: Match | None) -> str:
    if match is None:
        return ""
    texts = [str(subnet.masked()) for subnet in match.subnets]
    value = texts[0] if len(texts) == 1 else f"{{ {', '.join(texts)} }}"
    return f"{field} {'' if match.inside else '!= '}{value}"


class NftablesDriver:
    """Keeps RuleSets by nftables (a kernel.driver.Driver).

    suffix: keeps the tables of several daemons or networks on one host apart. previous: pairs of network and subnet that
    an earlier flannel may have left iptables rules for. isolating: whether the iptables flavour may have left rules that
    keep networks apart.
    """

    handles: tuple[type[Object], ...] = (RuleSet,)

    def __init__(
        self, suffix: str = "", previous: Sequence[tuple[Subnet, Subnet]] = (), *, isolating: bool = False
    ) -> None:
        """Raises UsageError for a suffix that can't be part of a chain's name."""
        self._suffix, self._previous, self._isolating = check_suffix(suffix), tuple(previous), isolating
        self._tables = nft_tables(suffix)
        self._gate = ForwardGate(suffix, previous)
        self._bridge = BridgeNetfilter(self._tables)
        self._features: nft.Features | None = None
        self._applied: dict[int, tuple[RuleSet, str]] = {}  # with the listing that belongs to it
        self._verified: dict[int, tuple[int, RuleSet | None]] = {}  # at this generation, exactly this was there
        self._generation = GenerationCounter()
        self._monitor: NftMonitor | None = None
        self._poll: LegacyPoll | None = None

    async def observe(self, desired: Desired, scope: Scope) -> dict[Key, Object]:
        """See kernel.driver.Driver."""
        found = await observe_families(desired, self._observe)
        if self._poll:
            self._poll.watch([(family, "filter") for family in FAMILIES if "filter" in legacy_tables(family)])
        return found

    async def apply(self, changes: Changes) -> Sequence[Failure]:
        """See kernel.driver.Driver. Each family is one transaction."""
        return await apply_families(changes, self._put, self._remove)

    def watch(self, changed: Callable[[str], None]) -> None:
        """See kernel.driver.Driver."""
        tables = {family: name for family, (_, name) in self._tables.items()}
        gate, chains = self._gate.table, self._gate.chains
        self._monitor = NftMonitor(
            {*tables.values(), *chains},
            lambda family, table, chain: table == tables.get(family) or (table == gate and chain in chains),
            changed,
        )
        self._poll = LegacyPoll(changed)

    async def close(self) -> None:
        """See kernel.driver.Driver."""
        if self._monitor:
            self._monitor.close()
        if self._poll:
            self._poll.close()
        self._monitor = self._poll = None
        self._generation.close()
        try:
            await self._bridge.close()
        except ProgramFailed as error:
            logger.warning("bridge netfilter: %s", error)

    async def remove_all(self) -> None:
        """Remove all of ours, whichever flavour or version made it, and only that; what can't be is logged."""
        self._applied.clear()
        self._verified.clear()
        await clear_everything(self._suffix, self._previous, isolating=self._isolating)

    async def _observe(self, family: int, wanted: RuleSet | None) -> RuleSet | None:
        # The legacy tables have no generation number: where they exist they are looked at each time.
        generation = None if legacy_tables(family) else self._generation.read()
        if generation is not None and self._verified.get(family) == (generation, wanted):
            return wanted
        listing = await nft.listing("table", *self._tables[family])
        state: RuleSet | None
        if wanted is not None and self._applied.get(family) == (wanted, listing):
            state = wanted if await self._gate.intact(family, wanted) else unknown(family)
        elif listing is None and await self._gate.intact(family, None):
            state = None
        else:
            state = unknown(family)
        if generation is not None and state == wanted:
            self._verified[family] = (generation, wanted)
        return state

    async def _put(self, rules: RuleSet) -> None:
        family = rules.network.family
        first = family not in self._applied
        self._forget(family)
        if self._features is None:
            self._features = await nft.features()
        bridge = await self._bridge.decide(family, rules)
        script = rendered_table(rules, self._features, self._suffix, marker=MARKER if bridge == "off" else "")
        # The listing is taken as ours if no other transaction came in between; where others write all the time, at last
        # it is taken as it is: the next look at another one's change would tell, and the window is some milliseconds.
        for _ in range(3):
            before = self._generation.read()
            await nft.commit(script)
            listing = await nft.listing("table", *self._tables[family])
            if before is None or self._generation.read() == before + 1:
                break
        if listing is None:
            raise ProgramFailed("nft: another program deletes our table")
        self._bridge.carry_out(family, bridge)
        await self._gate.put(family, rules, first=first)
        self._applied[family] = (rules, listing)

    async def _remove(self, family: int) -> None:
        self._forget(family)
        bridge = await self._bridge.decide(family, None)
        await nft.delete_tables(self._tables[family])
        self._bridge.carry_out(family, bridge)
        await self._gate.put(family, None, first=False)

    def _forget(self, family: int) -> None:
        self._applied.pop(family, None)
        self._verified.pop(family, None)
