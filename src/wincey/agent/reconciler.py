"""Makes the host as desired, and keeps it so: the one code path for start, join, leave, repair, change and clean-up.

Two ways lead to the same result. A change of the desired state is applied as its difference, without reading the kernel. An
audit reads what is there, compares all of it, and applies that difference: at the start, when a notification says that
another program may have touched what is ours, after a failure, and slowly for ever. Nothing else changes the host.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence

from wincey.agent import memory
from wincey.agent.desired import DesiredState
from wincey.kernel.diff import diff
from wincey.kernel.driver import Driver
from wincey.model.state import Changes, Failure, Key, Object, Scope, Sysctl

log = logging.getLogger(__name__)

AUDIT_EVERY = 60.0
"""Seconds between audits without a cause: notifications find a change sooner, this finds what they can't."""

DEBOUNCE = 0.03  # a program that changes one thing mostly changes several
RETRY_FIRST, RETRY_MOST = 1.0, 30.0


class Reconciler:
    """Applies a DesiredState through drivers, in their order. cpu_time: seconds of CPU time used so far."""

    def __init__(
        self,
        desired: DesiredState,
        drivers: Sequence[Driver],
        audit_every: float = AUDIT_EVERY,
        *,
        cpu_time: Callable[[], float] = time.process_time,
    ) -> None:
        self.desired = desired
        self.scope = Scope()
        self.failures: dict[Key, Failure] = {}
        self.repaired = 0
        self.audited: float | None = None
        """When the last audit was, in seconds of the monotonic clock; None before the first."""
        self.audit_cost = 0.0
        """Its CPU time, in seconds; `audits` and `audits_cost` are the number and the CPU time of all of them."""
        self.audits, self.audits_cost = 0, 0.0
        self.changed = 0
        """Objects made, changed or removed so far."""
        self.drivers, self._cpu_time = drivers, cpu_time
        self._audit_every = audit_every
        self._wake = asyncio.Event()
        self._lock = asyncio.Lock()
        self._why: str | None = None
        self._settled = asyncio.Event()
        self._failed_audits = 0
        self._told = False  # the last audit's failures are known
        self._blind = False  # the host could not be looked at, the last time
        self._looked = 0.0  # when the last audit was, or something first failed, by the event loop's clock
        self._spares_until = 0.0  # by the same
        self._spared: set[Key] = set()
        for driver in drivers:
            driver.watch(self.suspect)

    def suspect(self, why: str) -> None:
        """Something of ours may have been changed by another program: audit soon."""
        self._why = self._why or why
        self._wake.set()

    def spare(self, seconds: float) -> None:
        """For that long leave what is there and leads to other hosts, though it be nobody's: these may not have said so yet."""
        loop = asyncio.get_running_loop()
        self._spares_until = loop.time() + seconds
        loop.call_later(seconds, self.suspect, "hosts that have not come back")

    @property
    def sparing(self) -> bool:
        """Whether something may be left that will go yet."""
        return asyncio.get_running_loop().time() < self._spares_until

    def apply_soon(self) -> None:
        """The desired state has changed: apply the difference as soon as the event loop is free."""
        self._wake.set()

    async def settle(self) -> list[Failure]:
        """Audit now; returns what could not be made as desired."""
        async with self._lock:
            await self._audit(None)
            return list(self.failures.values())

    async def difference(self) -> tuple[Changes, dict[Key, Object]]:
        """What an audit would change now, and what is there. Nothing is changed."""
        async with self._lock:
            actual = await self._observe()
            return diff(self.desired.objects, actual), actual

    async def run(self) -> None:
        """Keep the host as desired, for ever, from the first `settle` on.

        Before it nobody has said what is desired, and what an earlier run left behind carries packets.
        """
        await self._settled.wait()
        loop = asyncio.get_running_loop()
        while True:
            failed = bool(self.failures) or self._blind
            retry = min(RETRY_MOST, RETRY_FIRST * 2 ** min(self._failed_audits, 16)) if failed else self._pause()
            due = self._looked + retry  # whatever else there is to do meanwhile, and however often
            try:
                # Not wait_for, here and elsewhere: up to Python 3.11 it may swallow the cancellation that ends us.
                async with asyncio.timeout_at(due):
                    await self._wake.wait()
                overdue = loop.time() >= due
            except TimeoutError:
                overdue = True
            if overdue:
                self._why = self._why or ""
            if self._why:
                # Bounds the share of a processor that audits can take however often another program changes things.
                await asyncio.sleep(max(DEBOUNCE, 5 * self.audit_cost))
            self._wake.clear()
            why, self._why = self._why, None
            async with self._lock:
                try:
                    if why is not None or self._blind:
                        await self._audit(why)
                        memory.give_back()
                    else:
                        await self._apply(self.desired.take_changes())
                        if self.failures and not failed:
                            self._looked = loop.time()
                    self._blind = False
                except (
                    OSError
                ) as error:  # no free descriptor, no memory, a device that went away: what is there carries on
                    if not self._blind:
                        log.error("the host can't be looked at or changed, which is tried again: %s", error)
                    self._blind, self._failed_audits, self._looked = True, self._failed_audits + 1, loop.time()

    def _pause(self) -> float:
        # With many peers an audit costs tens of milliseconds: at most a thousandth of a processor goes into slow audits.
        return max(self._audit_every, 1000 * self.audit_cost)

    async def close(self) -> None:
        """Stop watching. What was applied stays: the data path outlives the daemon."""
        for driver in self.drivers:
            await driver.close()

    async def _audit(self, why: str | None) -> None:
        started = self._cpu_time()
        actual = await self._observe()
        # Only now, as the plan may have changed while the drivers looked; the difference below covers it.
        planned = self.desired.take_changes()
        expected = {item.key for item in (*planned.put, *planned.delete)} | self.failures.keys() | self._spared
        changes = diff(self.desired.objects, actual)
        self._spared.clear()
        if self.sparing:
            gone = {item.key for item in planned.delete}
            self._spared = {item.key for item in changes.delete if item.to_peer and item.key not in gone}
            changes.delete = [item for item in changes.delete if item.key not in self._spared]
        if changes and self._settled.is_set():
            self._tell(changes, expected, actual, why)
        self.audit_cost = self._cpu_time() - started
        self.audited, self._looked = time.monotonic(), asyncio.get_running_loop().time()
        self.audits += 1
        self.audits_cost += self.audit_cost
        self.failures.clear()
        await self._apply(changes)
        self._settled.set()
        self._failed_audits = self._failed_audits + 1 if self.failures else 0
        self._told = any(not failure.object.watched for failure in self.failures.values())

    async def _observe(self) -> dict[Key, Object]:
        actual: dict[Key, Object] = {}
        for driver in self.drivers:
            actual.update(await driver.observe(self.desired.objects, self.scope))
        return actual

    def _tell(self, changes: Changes, expected: set[Key], actual: dict[Key, Object], why: str | None) -> None:
        # What the plan has just changed, and retries of what failed before, are no repairs.
        repaired = [item for item in (*changes.put, *changes.delete) if item.key not in expected and not item.watched]
        self.repaired += len(repaired)
        for item in repaired[:5]:
            state = "was missing" if item.key not in actual else "was changed" if item in changes.put else "was stale"
            log.warning("repaired: %s %s%s", item, state, f" ({why})" if why else "")
        if len(repaired) > 5:
            log.warning("repaired: %d more objects", len(repaired) - 5)

    async def _apply(self, changes: Changes) -> None:
        if not changes:
            return
        self.changed += len(changes.put) + len(changes.delete)
        for item in (*changes.put, *changes.delete):
            self.failures.pop(item.key, None)
        for step in _steps(changes):
            await self._take(step)
        again = [item for item in changes.put if item.key in self.failures] if changes.delete else []
        if again:  # what was in their way may be gone only now: another device of the name, a port that was taken
            for item in again:
                del self.failures[item.key]
            await self._take(Changes(again))
        if self.failures:
            self._tell_failures()

    async def _take(self, step: Changes) -> None:
        for driver in self.drivers:
            share = Changes(_only(step.put, driver), _only(step.delete, driver))
            if share:
                for failure in await driver.apply(share):
                    self.failures[failure.object.key] = failure

    def _tell_failures(self) -> None:
        level = logging.DEBUG if self._told else logging.ERROR
        failures = [failure for failure in causes(self.failures.values()) if not failure.object.watched]
        for failure in failures[:5]:
            log.log(level, "%s: %s", failure.object, failure.reason)
        if len(failures) > 5:
            log.log(level, "%d more objects could not be put in place", len(failures) - 5)


def causes(failures: Iterable[Failure]) -> list[Failure]:
    """Those that are not just the consequence of another: without its device nothing on it can be."""
    found = list(failures)
    missing = {failure.object.makes for failure in found if failure.object.makes}
    return [failure for failure in found if not missing.intersection(_devices(failure.object))]


def _devices(item: Object) -> list[str]:
    """The names of devices that an object depends on, maybe among other words; none for a device itself."""
    if item.makes:
        return []
    return item.path.split("/") if isinstance(item, Sysctl) else [getattr(item, "device", "")]


def _steps(changes: Changes) -> list[Changes]:
    """Make before break: devices go, with all that is on them, once what takes their place is there."""
    devices = {item.makes for item in changes.delete if item.makes}
    if not devices:
        return [changes]
    first, last = Changes(changes.put), Changes()
    for item in changes.delete:
        goes_along = item.makes or getattr(item, "device", "") in devices
        (last if goes_along else first).delete.append(item)
    return [first, last]


def _only(objects: Iterable[Object], driver: Driver) -> list[Object]:
    return [item for item in objects if isinstance(item, driver.handles)]
