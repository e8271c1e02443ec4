"""Keeps the fast path of containers by whichever way the host has: programs of ours, or the kernel's own flowtable.

Each way has a table of nftables by the same name, which lets flows in and takes the place of the other's. A host that can have
neither is no failure: packets then take the ordinary path, and `told` has why.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from wincey.bpf import fastpath
from wincey.bpf.fastpathprograms import Programs
from wincey.bpf.syscall import BpfError
from wincey.kernel import nft
from wincey.kernel.driver import Desired
from wincey.kernel.flowtable import Flowtable
from wincey.kernel.program import ProgramFailed, find
from wincey.model.address import Subnet
from wincey.model.fastpath import Engine, FastPath
from wincey.model.state import Changes, Failure, Key, Object, Scope

log = logging.getLogger(__name__)

_OTHERWISE = FastPath(Subnet(bytes(4), 0), Subnet(bytes(4), 0), "", bytes(4))
"""What is reported of a fast path that is not as desired: equal to none that anybody desires."""


class Way(Protocol):
    """What carries the fast path. Each call may raise BpfError, ProgramFailed and OSError."""

    told: str
    """Between which devices packets go, and by what, in a line, once it was put."""

    @property
    def exists(self) -> bool:
        """Whether something of it is on the host, of this process or a former one, besides the table."""

    async def put(self, path: FastPath) -> str:
        """Put it in place, its table last and in that of any other; why this host can't have it, "" when it was done."""

    async def as_put(self) -> bool:
        """Whether all is there as it was put, apart from devices that came or went meanwhile."""

    async def remove(self) -> None:
        """Take everything away, there or not, and the table first."""

    async def close(self) -> None:
        """Stop watching and release descriptors. What was put stays."""


class FastPathDriver:
    """Keeps the FastPath of one network (a kernel.driver.Driver). directory: the network's run-time directory. tcx: see Objects."""

    handles: tuple[type[Object], ...] = (FastPath,)

    def __init__(self, directory: Path, *, tcx: bool = True) -> None:
        self.told = ""
        """How packets go, and why not better, in a line; "" before the first is made."""
        self._table = fastpath.table_name(directory.name)
        self._changed: Callable[[str], None] = lambda why: None
        self._programs = Programs(directory, self._table, self._look_again, tcx=tcx)
        self._ways: Mapping[Engine, Way] = {
            "bpf": self._programs,
            "flowtable": Flowtable(self._table, self._look_again),
        }
        self._in_use: tuple[FastPath, Way] | None = None  # what was put, and how
        self._refused: tuple[FastPath, str] | None = None  # and what was not, and why

    async def observe(self, desired: Desired, scope: Scope) -> dict[Key, Object]:
        """See Driver."""
        wanted = next((item for item in desired.values() if isinstance(item, FastPath)), None)
        if wanted and self._refused and self._refused[0] == wanted:
            return {wanted.key: wanted}
        if wanted and self._in_use and self._in_use[0] == wanted:
            return {wanted.key: wanted if await self._in_use[1].as_put() else _OTHERWISE}
        return {_OTHERWISE.key: _OTHERWISE} if await self._exists() else {}

    async def apply(self, changes: Changes) -> Sequence[Failure]:
        """See Driver."""
        failures: list[Failure] = []
        for item in changes.delete:
            try:
                await self._remove()
            except (BpfError, ProgramFailed, OSError) as error:
                failures.append(Failure(item, str(error)))
        for item in changes.put:
            assert isinstance(item, FastPath)
            try:
                await self._put(item)
            except (BpfError, ProgramFailed, OSError) as error:
                failures.append(Failure(item, str(error)))
        return failures

    def watch(self, changed: Callable[[str], None]) -> None:
        """See Driver."""
        self._changed = changed

    async def close(self) -> None:
        """See Driver."""
        for way in self._ways.values():
            await way.close()

    def counters(self) -> dict[str, int]:
        """Packets by what became of them; none but of programs."""
        return self._programs.counters()

    async def _put(self, path: FastPath) -> None:
        reasons = [path.lacking] if path.lacking else []
        for engine, way in self._ways.items():
            if path.lacking or path.engine not in ("auto", engine):
                continue
            for other in self._ways.values():
                if other is not way and other.exists:
                    await other.remove()
            self._in_use = None
            reason = await way.put(path)
            if not reason:
                self._in_use, self._refused = (path, way), None
                self._say(f"{way.told}, as programs can't be had: {reasons[0]}" if reasons else way.told)
                return
            reasons.append(f"and no {engine}: {reason}" if reasons else reason)
        await self._do_without(path, "; ".join(reasons))

    async def _do_without(self, path: FastPath, reason: str) -> None:
        if self._refused != (path, reason):
            log.warning("no fast path for containers, their packets take the ordinary path: %s", reason)
        if await self._exists():
            await self._remove()
        self.told, self._in_use, self._refused = f"none: {reason}", None, (path, reason)

    def _say(self, told: str) -> None:
        if told != self.told:
            log.info("fast path for established flows without NAT: %s", told)
        self.told = told

    async def _exists(self) -> bool:
        if any(way.exists for way in self._ways.values()):
            return True
        return find("nft") is not None and await nft.listing("table", "ip", self._table, elements=False) is not None

    async def _remove(self) -> None:
        for way in self._ways.values():
            await way.remove()
        self.told, self._in_use = "", None

    def _look_again(self, why: str) -> None:
        self._changed(why)
