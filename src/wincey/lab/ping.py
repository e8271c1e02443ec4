"""Who reaches whom: a ping from every container to every other one, in every family of the network."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import msgspec

from wincey.lab.node import Container
from wincey.lab.report import Report, silent

_AT_ONCE = 24
"""Pings under way: enough to hide the second that a lost one takes, few enough for a small machine."""

_RTT = re.compile(r"= [\d.]+/([\d.]+)/")
_RETRY = 0.25  # seconds between rounds


class PairResult(msgspec.Struct, frozen=True, rename={"source": "from", "target": "to"}):
    """One check. rtt_ms: mean round trip in milliseconds, None when there was no answer; why: what ping said then."""

    source: str
    target: str
    family: int
    rtt_ms: float | None = None
    why: str = ""

    @property
    def ok(self) -> bool:
        """Whether every echo request was answered."""
        return self.rtt_ms is not None

    def __str__(self) -> str:
        return f"{self.source} -> {self.target} (IPv{self.family})"


class Matrix(msgspec.Struct):
    """The results for all ordered pairs and families, by source, target, family."""

    results: list[PairResult]

    @property
    def unreachable(self) -> list[PairResult]:
        """The pairs that failed."""
        return [result for result in self.results if not result.ok]

    def summary(self) -> dict[str, object]:
        """For JSON: `pairs` (checks made: ordered pairs times families), `reachable` (how many), `unreachable` (which)."""
        return {
            "pairs": len(self.results),
            "reachable": len(self.results) - len(self.unreachable),
            "unreachable": [
                {"from": each.source, "to": each.target, "family": each.family, "why": each.why}
                for each in self.unreachable
            ],
        }


def pairs(containers: Sequence[Container], families: Sequence[int]) -> Iterator[tuple[Container, Container, int]]:
    """All ordered pairs of different containers, in each family."""
    for source in containers:
        for target in containers:
            if source is not target:
                for family in families:
                    yield source, target, family


def ping_matrix(
    containers: Sequence[Container],
    families: Sequence[int],
    *,
    count: int = 1,
    patience: float = 0,
    report: Report = silent,
) -> Matrix:
    """Ping all pairs, `count` echo requests each; those that fail again and again until `patience` seconds are over.

    Patience is for a network that has just come up: a daemon is ready before its peers have heard of it.
    """
    wanted = list(pairs(containers, families))
    done: dict[int, PairResult] = {}
    left = list(range(len(wanted)))
    deadline = time.monotonic() + patience
    while True:
        executor = ThreadPoolExecutor(_AT_ONCE)
        try:
            for index, result in zip(left, executor.map(lambda at: ping(*wanted[at], count=count), left), strict=True):
                done[index] = result
                reached = sum(each.ok for each in done.values())
                report("pairs reachable", reached, len(wanted))
        finally:
            executor.shutdown(cancel_futures=True)
        # A host without a subnet gets none while we ping: its pairs fail at once.
        left = [index for index in left if not done[index].ok and _addressed(*wanted[index])]
        if not left or time.monotonic() > deadline:
            return Matrix([done[index] for index in range(len(wanted))])
        time.sleep(_RETRY)


def ping(source: Container, target: Container, family: int, *, count: int = 1) -> PairResult:
    """Ping one container from another; an answer counts when it comes within a second."""
    address = target.address(family)
    if address is None or source.address(family) is None:
        host = (target if address is None else source).host.name
        return PairResult(source.name, target.name, family, why=f"{host} has no IPv{family} subnet")
    argv = ["ping", f"-{family}", "-n", "-q", "-c", str(count), "-i", "0.2", "-W", "1", address]
    try:
        done = source.exec(argv, timeout=count * 0.2 + 10)
    except subprocess.TimeoutExpired:
        return PairResult(source.name, target.name, family, why="ping did not end")
    rtt = _RTT.search(done.stdout)
    if done.returncode == 0 and rtt:
        return PairResult(source.name, target.name, family, rtt_ms=float(rtt[1]))
    return PairResult(source.name, target.name, family, why=_reason(done.stdout + done.stderr))


def _addressed(source: Container, target: Container, family: int) -> bool:
    return source.address(family) is not None and target.address(family) is not None


def _reason(output: str) -> str:
    """What ping said of a failure: its error, or the line with the losses."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    for line in lines:
        if line.startswith(("ping:", "From ")):
            return line
    return next((line for line in lines if "packet loss" in line), "no answer")
