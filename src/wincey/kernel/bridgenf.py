"""Bridge netfilter: whether what passes a bridge also passes the packet filter of IPv4 and IPv6. On only where needed.

With it (net.bridge.bridge-nf-call-iptables, which the kernel turns on by itself) every packet that a container sends is
given to the filter by the bridge already, before it is routed: that takes a twentieth of what a packet costs. Of use it
is to rules that concern containers on one bridge among each other: those of kube-proxy, Docker or a firewall. Our own rules
have nothing to say about these. So it is turned off where no rules but ours are in the network namespace, and on again as
soon as there are others, or when we end: then nobody would be there to see them come.

A chain without rules, which nothing leads to, says in our own table that it was us who turned it off. So a daemon that was
killed leaves word for the next one. Who turns it on while we run has a reason: it stays on.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Mapping
from typing import Literal, TypeAlias

from wincey.kernel import nft, sysctl
from wincey.kernel.nfmonitor import NftMonitor, legacy_tables
from wincey.model.state import RuleSet, Sysctl

log = logging.getLogger(__name__)

Setting: TypeAlias = Literal["off", "on", "leave"]

MARKER = "bridge-nf-off"
"""The chain that says so, in the table of the family whose setting it is about."""

_POLL = 0.5
"""Seconds between two looks at iptables-legacy's tables."""

_HARMLESS = ("wincey-top-", "flannel-fast")
"""Beginnings of the names of tables of ours that have nothing to say about packets that stay on a bridge either."""

_SETTINGS: dict[int, tuple[str, str]] = {
    socket.AF_INET: ("ip", "net/bridge/bridge-nf-call-iptables"),
    socket.AF_INET6: ("ip6", "net/bridge/bridge-nf-call-ip6tables"),
}


class BridgeNetfilter:
    """Keeps the settings of this network namespace. own: the table (nft's word for the family, name) of each family."""

    def __init__(self, own: Mapping[int, tuple[str, str]]) -> None:
        self._own = dict(own)
        self._off: set[int] = set()
        self._asked: set[int] = set()  # somebody turned it on again
        self._marked: set[int] = set()
        self._monitor: NftMonitor | None = None
        self._timer: asyncio.TimerHandle | None = None

    async def decide(self, family: int, rules: RuleSet | None) -> Setting:
        """What to do with the setting when these rules of ours (None: none) get in force; to be asked before they do."""
        value = sysctl.read(_SETTINGS[family][1])
        if value is None:
            return "leave"  # a kernel without it, or it is not for us to see
        if value == "1" and family in self._off:
            self._asked.add(family)
        ours = family in self._off or await nft.listing("chain", *self._own[family], MARKER) is not None
        if await self._spare(family, rules):
            return "off" if ours or value == "1" else "leave"
        return "on" if ours else "leave"

    def carry_out(self, family: int, setting: Setting) -> None:
        """Do so, when the rules are in force. What can't be written stays as it is, told in the log."""
        path = _SETTINGS[family][1]
        self._off.discard(family)
        if setting == "off":
            self._marked.add(family)
            if sysctl.read(path) == "0":  # by an earlier run, or by ourselves for earlier rules
                self._off.add(family)
            elif reason := sysctl.write(Sysctl(path, "0")):
                log.info("%s: bridge netfilter stays on", reason)
                self._asked.add(family)
            else:
                self._off.add(family)
                log.info(
                    "%s turned off: no rules but ours are here to need it; containers' packets travel faster", path
                )
        elif setting == "on":
            _turn_on(family)
        self._listen()

    async def close(self) -> None:
        """On again, where we turned it off: nobody looks any more. Raises ProgramFailed."""
        off, marked, self._off, self._marked = self._off, self._marked, set(), set()
        self._listen()
        for family in sorted(marked):
            if family in off and not _turn_on(family):
                continue
            table = self._own[family]
            if await nft.listing("chain", *table, MARKER) is not None:
                await nft.commit(f"delete chain {' '.join(table)} {MARKER}\n")

    async def _spare(self, family: int, rules: RuleSet | None) -> bool:
        """Whether nobody needs it."""
        word = _SETTINGS[family][0]
        if rules is None or rules.isolation is not None or family in self._asked or legacy_tables(family):
            return False
        tables = (line.split() for line in (await nft.listing("tables") or "").splitlines())
        return not any(kind in (word, "inet") and self._foreign(kind, name) for _, kind, name in tables)

    def _foreign(self, kind: str, name: str) -> bool:
        return (kind, name) not in self._own.values() and not name.startswith(_HARMLESS)

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
        """On again, at once; our table says otherwise until it is made anew, or we end."""
        log.info("%s: bridge netfilter may be needed", why)
        for family in sorted(self._off):
            _turn_on(family)
        self._off.clear()
        self._listen()


async def turn_on_again(family: int, table: tuple[str, str]) -> None:
    """Undo what the table of an earlier run says was turned off, before that table goes."""
    if await nft.listing("chain", *table, MARKER) is not None:
        _turn_on(family)


def _turn_on(family: int) -> bool:
    path = _SETTINGS[family][1]
    if reason := sysctl.write(Sysctl(path, "1", optional=True)):
        log.warning("%s: bridge netfilter stays off", reason)
        return False
    log.info("%s turned on again", path)
    return True
