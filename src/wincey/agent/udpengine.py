"""Which engine carries the udp backend's packets on this host (--udp-engine), and why no better one.

Each host chooses for itself, each time that it looks at its config: the wire is the same for all. `auto` takes the first of ENGINES
that this host can run. One that is refused later, when it is to be put in place, gives way to the next and is tried again after a
while; meanwhile the keeper, which is there with every engine, carries the packets.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping

import msgspec

from wincey.backends.base import HostFacts
from wincey.backends.udp import CHECK, ENGINE, KEEPER, UdpBackend
from wincey.model.config import NetworkConfig
from wincey.model.errors import NotJoinable
from wincey.model.report import EngineReport
from wincey.model.state import Failure
from wincey.model.udp import BpfTunnel

log = logging.getLogger(__name__)

WHY = "why"
"""In HostFacts.found: why it is no better engine, and what else is to be known of it."""

TWICE = 60.0
"""Seconds within which an engine has to be refused a second time: what was changed under our hands once is no reason."""

AGAIN = 300.0
"""Seconds after which an engine is tried again that was refused while we ran."""


class UdpWishes(msgspec.Struct, frozen=True):
    """The flags --udp-engine and --udp-source-check."""

    engine: str = "auto"
    check: str = "network"


class UdpEngines:
    """The choice of one network. `reconsider` is called when another answer may be had."""

    def __init__(self, wishes: UdpWishes) -> None:
        self.reconsider: Callable[[], None] = lambda: None
        self._wishes = wishes
        self._refused: dict[str, str] = {}
        self._told = ""
        self._failed_at = -TWICE
        self._chosen: Mapping[str, str] = {}
        self._keeper: Callable[[], Mapping[str, object]] = dict
        self._programs: Callable[[], Mapping[str, int]] = dict

    def choose(self, facts: HostFacts) -> Mapping[str, str]:
        """What is found of this host. Raises NotJoinable when the one engine that may be had can't."""
        wanted = self._wishes.engine
        reasons: list[str] = []
        for engine, ask in ENGINES.items():
            if wanted not in ("auto", engine):
                continue
            refused = self._refused.get(engine)
            if engine == "fou" and self._wishes.check != "off":
                refused = "it checks no inner sources; --udp-source-check=off does without"
            reason, note = (refused, "") if refused else ask(facts)
            if not reason:
                return self._found(engine, "; ".join([*reasons, *filter(None, [note])]))
            reasons.append(f"{engine}: {reason}")
        raise NotJoinable(
            f"--udp-engine={wanted} can't be had: {reasons[0].partition(': ')[2]}. Give this host what is missing, or use auto"
        )

    def watch(self, keeper: Callable[[], Mapping[str, object]], programs: Callable[[], Mapping[str, int]]) -> None:
        """Where the report gets what they have counted. keeper: what it shows (wincey.tunnel.control)."""
        self._keeper, self._programs = keeper, programs

    def report(self, config: NetworkConfig) -> EngineReport | None:
        """What carries the packets; None where it is not the udp backend."""
        if config.backend_type != UdpBackend.type or not self._chosen:
            return None
        shown = self._keeper()
        name = " ".join(str(shown[key]) for key in ("engine", "core") if shown.get(key))
        counted = {"kernel": dict(self._programs()), "keeper": _numbers(shown.get("counters"))}
        reasons = [self._chosen[WHY], str(shown.get("why", ""))]
        return EngineReport(
            name=self._chosen[ENGINE],
            why="; ".join(filter(None, reasons)),
            keeper=name,
            counters={who: counters for who, counters in counted.items() if counters},
        )

    def failed(self, failure: Failure) -> None:
        """Something of a part could not be put in place."""
        if not isinstance(failure.object, BpfTunnel) or self._wishes.engine != "auto" or "bpf" in self._refused:
            return
        before, self._failed_at = self._failed_at, time.monotonic()
        if self._failed_at - before < TWICE:
            self._refused["bpf"] = failure.reason
            log.warning("%s: %s; another engine takes its place", failure.object, failure.reason)
            asyncio.get_running_loop().call_later(AGAIN, self._forgive, "bpf")
            self.reconsider()

    def _forgive(self, engine: str) -> None:
        del self._refused[engine]
        self.reconsider()

    def _found(self, engine: str, why: str) -> Mapping[str, str]:
        told = f"udp engine: {engine}" + (f" ({why})" if why else "")
        if told != self._told:
            log.info("%s", told)
            self._told = told
        keeper = "plain" if engine == "plain" else "offload"
        self._chosen = {ENGINE: engine, KEEPER: keeper, CHECK: self._wishes.check, WHY: why}
        return self._chosen


def _numbers(found: object) -> dict[str, int]:
    return {str(name): int(value) for name, value in found.items()} if isinstance(found, dict) else {}


def _bpf(facts: HostFacts) -> tuple[str, str]:
    from wincey.bpf import probe  # noqa: PLC0415  # 2 MB, for this backend alone
    from wincey.bpf.program import read_baked  # noqa: PLC0415  # likewise
    from wincey.bpf.udp import unfit  # noqa: PLC0415  # likewise

    answer = probe.ask(read_baked("udp"), facts.kernel)
    return answer.reason or unfit(facts.underlay), "; ".join(answer.notes)


def _fou(facts: HostFacts) -> tuple[str, str]:
    from wincey.kernel.fou import missing  # noqa: PLC0415  # for this engine alone

    return missing(), ""


def _keeper(facts: HostFacts) -> tuple[str, str]:
    """The keeper finds out by itself what it can use."""
    return "", ""


ENGINES: Mapping[str, Callable[[HostFacts], tuple[str, str]]] = {
    "bpf": _bpf,
    "fou": _fou,
    "offload": _keeper,
    "plain": _keeper,
}
"""By name, the best first: why not, "" if it can; and what is to be known of it."""
