"""Bridge netfilter: whether what passes a bridge also passes the packet filter of IPv4 and IPv6. On only where needed.

With it (net.bridge.bridge-nf-call-iptables, which the kernel turns on by itself) every packet that a container sends is
given to the filter by the bridge already, before it is routed: that costs a tenth of a host's packets per second. Of use it
is to rules that concern containers on one bridge among each other: those of kube-proxy, Docker or a firewall. Our own rules
have nothing to say about these. So it is turned off where no rules but ours are in the network namespace, and on again as
soon as there are others, or when we end: then nobody would be there to see them come.

A table without chains, which costs no packet anything, says that it was us who turned it off. So a daemon that was killed
leaves word for the next one. Who turns it on while we run has a reason: it stays on.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Collection

from wincey.kernel import nft, sysctl
from wincey.kernel.nfmonitor import NftMonitor, legacy_tables
from wincey.model.state import RuleSet, Sysctl

log = logging.getLogger(__name__)

MARKER = "wincey-bridge-nf-off"
"""The table that says so, in the family whose setting it is about."""

_POLL = 0.5
"""Seconds between two looks at iptables-legacy's tables."""

_HARMLESS = (MARKER, "wincey-top-", "flannel-fast")  # ours too, with nothing in them for packets that stay on a bridge
_SETTINGS: dict[int, tuple[str, str]] = {
    socket.AF_INET: ("ip", "net/bridge/bridge-nf-call-iptables"),
    socket.AF_INET6: ("ip6", "net/bridge/bridge-nf-call-ip6tables"),
}


class BridgeNetfilter:
    """Keeps the settings of this network namespace. own: the tables (nft's word for the family, name) of our rules."""

    def __init__(self, own: Collection[tuple[str, str]]) -> None:
        self._own = frozenset(own)
        self._off: set[int] = set()
        self._asked: set[int] = set()  # somebody turned it on again
        self._monitor: NftMonitor | None = None
        self._timer: asyncio.TimerHandle | None = None

    async def settle(self, family: int, rules: RuleSet | None) -> None:
        """Turn it off or on. What can't be written stays as it is, told in the log. Raises ProgramFailed."""
        value = sysctl.read(_SETTINGS[family][1])
        if value is None:
            return  # a kernel without it, or it is not for us to see
        if value == "1" and family in self._off:
            self._asked.add(family)
        spare, marked = await self._look(family, rules)
        if not spare:
            self._off.discard(family)
            if marked:
                await turn_on(family)
        elif value == "1":
            await self._turn_off(family)
        elif marked:
            self._off.add(family)  # by an earlier run
        self._listen()

    async def close(self) -> None:
        """On again, where we turned it off: nobody looks any more. Raises ProgramFailed."""
        families, self._off = sorted(self._off), set()
        self._listen()
        for family in families:
            await turn_on(family)

    async def _look(self, family: int, rules: RuleSet | None) -> tuple[bool, bool]:
        """Whether nobody needs it, and whether one of us has turned it off."""
        word = _SETTINGS[family][0]
        listing = await nft.listing("tables") or ""
        tables = {(kind, name) for _, kind, name in (line.split() for line in listing.splitlines())}
        spare = (
            rules is not None
            and rules.isolation is None
            and family not in self._asked
            and not any(kind in (word, "inet") and self._foreign(kind, name) for kind, name in tables)
            and not legacy_tables(family)
        )
        return spare, (word, MARKER) in tables

    def _foreign(self, kind: str, name: str) -> bool:
        return (kind, name) not in self._own and not name.startswith(_HARMLESS)

    async def _turn_off(self, family: int) -> None:
        word, path = _SETTINGS[family]
        await nft.commit(f"add table {word} {MARKER}\n")
        if reason := sysctl.write(Sysctl(path, "0")):
            log.debug("bridge netfilter stays on: %s", reason)
            self._asked.add(family)
            await nft.delete_tables((word, MARKER))
            return
        self._off.add(family)
        log.info("%s turned off: no rules but ours are here to need it, and packets of containers travel faster", path)

    def _listen(self) -> None:
        """While it is off anywhere, wait for rules of others. The legacy tables are looked at, as they have no notices."""
        if self._off and self._monitor is None:
            self._monitor = NftMonitor(None, self._concerned, self._needed)
            self._timer = asyncio.get_running_loop().call_later(_POLL, self._poll)
        elif not self._off and self._monitor is not None:
            self._monitor.close()
            self._monitor = None
            if self._timer:
                self._timer.cancel()

    def _concerned(self, family: int, table: str, chain: str) -> bool:
        if family == socket.AF_UNSPEC:
            return self._foreign("inet", table)
        return family in self._off and self._foreign(_SETTINGS[family][0], table)

    def _poll(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(_POLL, self._poll)
        if found := [name for family in self._off for name in sorted(legacy_tables(family))]:
            self._needed(f"iptables-legacy: there is a table {found[0]}")

    def _needed(self, why: str) -> None:
        """On again, at once; the tables that say who turned it off go with the next change of rules."""
        for family in sorted(self._off):
            path = _SETTINGS[family][1]
            reason = sysctl.write(Sysctl(path, "1", optional=True))
            log.info("%s: %s", why, reason or f"{path} turned on again")
        self._off.clear()
        self._listen()


async def turn_on(family: int) -> None:
    """Undo what was turned off, whoever of us did it; nothing if nobody did. Raises ProgramFailed."""
    word, path = _SETTINGS[family]
    if await nft.listing("table", word, MARKER) is None:
        return
    if reason := sysctl.write(Sysctl(path, "1", optional=True)):
        log.warning("%s: bridge netfilter stays off", reason)
        return
    await nft.delete_tables((word, MARKER))
    log.info("%s turned on again", path)
