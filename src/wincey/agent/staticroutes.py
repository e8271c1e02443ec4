"""Puts the static routes of a list of hosts in place: on this host by netlink, on others by their own `ip`.

They carry a protocol number of their own, so that what is stale of an earlier list is known without any record, and what
flanneld or anybody else has put is told apart. Both ways read what is there and apply the difference.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from wincey.backends.static import Behind
from wincey.kernel.diff import diff
from wincey.kernel.program import ProgramFailed, must, run
from wincey.kernel.rtnetlink import RtnetlinkDriver
from wincey.model.address import Subnet, single
from wincey.model.errors import KernelError
from wincey.model.state import Route, Scope

PROTOCOL = 88
"""The rtnetlink protocol number of static routes; flanneld's has the one before. `ip route show proto 88` shows them."""

_EVERYWHERE = (Subnet(bytes(4), 0), Subnet(bytes(16), 0))


class Applied(msgspec.Struct):
    """How many routes were put and removed, and how many were right already; failures: a line for each that was not put."""

    put: int = 0
    removed: int = 0
    kept: int = 0
    failures: list[str] = []

    def __str__(self) -> str:
        return f"{self.put} put, {self.removed} removed, {self.kept} kept"


async def apply_here(routes: Sequence[Route]) -> Applied:
    """Have just these static routes on this host. Raises OSError when the kernel does not answer."""
    driver = RtnetlinkDriver(PROTOCOL)
    try:
        desired = {route.key: route for route in routes}
        actual = await driver.observe(desired, Scope(networks=_EVERYWHERE))
        changes = diff(desired, actual)
        failures = await driver.apply(changes)
    finally:
        await driver.close()
    failed = {failure.object.key for failure in failures}
    return Applied(
        sum(item.key not in failed for item in changes.put),
        sum(item.key not in failed for item in changes.delete),
        len(desired) - len(changes.put),
        [f"{failure.object}: {failure.reason}" for failure in failures],
    )


class _Shown(msgspec.Struct):
    dst: str
    gateway: str = ""


async def apply_over(command: Sequence[str], wanted: Sequence[Behind]) -> Applied:
    """The same on another host, through a command that runs its arguments there. Raises KernelError, ProgramFailed.

    Three programs a host: two listings and one batch.
    """
    actual = set(await _listed(command, "-4"))
    try:
        actual.update(await _listed(command, "-6"))
    except ProgramFailed:
        if any(each.subnet.bits == 128 for each in wanted):
            raise
    desired = {(each.subnet, each.gateway) for each in wanted}
    put = [route for route in ((each.subnet, each.gateway) for each in wanted) if route not in actual]
    there = {subnet for subnet, _ in desired}
    # One with another gateway is replaced by what takes its place.
    delete = sorted(route for route in actual - desired if route[0] not in there)
    lines = [
        *(f"route del {subnet} via {gateway} proto {PROTOCOL}" for subnet, gateway in delete),
        *(f"route replace {subnet} via {gateway} proto {PROTOCOL}" for subnet, gateway in put),
    ]
    failures = await _batch(command, lines) if lines else []
    failed = {line for line, _ in failures}
    deleted = sum(line not in failed for line in lines[: len(delete)])
    return Applied(
        sum(line not in failed for line in lines[len(delete) :]),
        deleted,
        len(desired) - len(put),
        [f"ip {line}: {reason}" for line, reason in failures],
    )


async def _listed(command: Sequence[str], family: str) -> list[tuple[Subnet, str]]:
    text = await must(*command, "ip", "-json", family, "route", "show", "table", "main", "proto", str(PROTOCOL))
    try:
        shown = msgspec.json.decode(text.strip() or "[]", type=list[_Shown])
        return [(_subnet(each.dst, family), each.gateway) for each in shown]
    except ValueError as error:
        raise KernelError(f"{command[0]} said something else than ip's routes ({error}): {text[:120]!r}") from None


def _subnet(text: str, family: str) -> Subnet:
    if text == "default":
        return _EVERYWHERE[family == "-6"]
    if "/" in text:
        return Subnet.parse(text)
    whole = Subnet.parse(f"{text}/0")
    return single(whole.address)


async def _batch(command: Sequence[str], lines: Sequence[str]) -> list[tuple[str, str]]:
    """Run lines of `ip` in one process; returns those that failed, and why."""
    result = await run(*command, "ip", "-force", "-batch", "-", text="\n".join(lines) + "\n")
    failures, said = [], ""
    for line in result.err.splitlines():
        # The reason comes in a line before the one with the number.
        _, found, number = line.partition("Command failed -:")
        if found and number.isdigit() and int(number) <= len(lines):
            failures.append((lines[int(number) - 1], said or "it failed"))
            said = ""
        else:
            said = line.strip()
    if result.code and not failures:
        raise ProgramFailed(f"{command[0]}: {said or f'exit code {result.code}'}")
    return failures
