"""An event loop in virtual time: its clock jumps to the next timer, and nothing in it depends on the real machine.

Callbacks run in the order in which they were asked for, timers in the order of their times; so one seed is one history. Each
agent is a Process: all that it ever starts runs in a context that names it, by which the loop knows whose step it is. That
lets a process be crashed at any of its steps (which are its awaits), stopped for a while, or suspended together with its
clock, without the agent's code knowing anything of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import heapq
import sys
import time
from asyncio import events
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from contextvars import Context, ContextVar, copy_context
from itertools import count
from typing import Any, TypeVar

T = TypeVar("T")

EPOCH = 1_800_000_000.0
"""Seconds since 1970 at which every simulated world begins."""


_COLLECT = 50_000  # steps after which memory is collected: at the same ones in each run of a seed


class Process:
    """One run of an agent, from its start to its end or crash.

    steps: how many it has made. crash_at: the number of the step instead of which it dies, None for never.
    slept: seconds that its monotonic clock has lost while it was suspended. wall: how far its wall clock is off, in seconds.
    """

    def __init__(self, name: str, on_crash: Callable[[], None] = lambda: None) -> None:
        self.name, self._on_crash = name, on_crash
        self.alive, self.stopped = True, False
        self.steps = 0
        self.crash_at: int | None = None
        self.slept = 0.0
        self.wall = 0.0
        self.waiting: list[asyncio.Handle] = []

    def crash(self) -> None:
        """End without a word: none of its steps runs any more."""
        self.alive = False
        self._on_crash()


OWNER: ContextVar[Process | None] = ContextVar("owner", default=None)
"""Whose step it is; None for the world's own."""


class Endless(Exception):
    """So many steps at one moment, or in one run, that nobody would live to see the end."""


class VirtualLoop(asyncio.AbstractEventLoop):
    """See the module. most: steps that may be made at one moment of virtual time."""

    def __init__(self, most: int = 2_000_000) -> None:
        self.now = 0.0
        self.steps = 0
        self.processes: list[Process] = []
        self.faults: list[dict[str, Any]] = []
        """What nobody has caught, as contexts of asyncio's exception handler."""
        self._most = most
        self._ready: deque[asyncio.Handle] = deque()
        self._timers: list[tuple[float, int, asyncio.TimerHandle, float]] = []
        self._numbers = count()

    # What asyncio asks of a loop

    def time(self) -> float:
        """Seconds of the monotonic clock of whoever asks."""
        owner = OWNER.get()
        return self.now - owner.slept if owner else self.now

    def call_soon(  # type: ignore[override]  # typeshed ties callback and arguments together
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    def call_soon_threadsafe(  # type: ignore[override]  # typeshed ties callback and arguments together
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        return self.call_soon(callback, *args, context=context)

    def call_later(  # type: ignore[override]  # likewise
        self, delay: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self.time() + delay, callback, *args, context=context)

    def call_at(  # type: ignore[override]  # likewise
        self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        owner = OWNER.get()
        slept = owner.slept if owner else 0.0
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        heapq.heappush(self._timers, (when + slept, next(self._numbers), handle, slept))
        return handle

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(self, coro: Any, **keys: Any) -> asyncio.Task[Any]:
        return asyncio.Task(coro, loop=self, **keys)

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return False

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        self.faults.append(context)

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """A cancelled timer is passed over when its time comes."""

    # What the world asks of it

    def spawn(self, coroutine: Coroutine[Any, Any, object], process: Process | None = None) -> asyncio.Task[Any]:
        """Start a task of a process, None: of the world itself."""
        context = copy_context()
        context.run(OWNER.set, process)
        if process is not None and process not in self.processes:
            self.processes.append(process)
        return context.run(self.create_task, coroutine)

    def resume(self, process: Process, slept: float = 0.0) -> None:
        """Let a stopped process go on. slept: seconds by which its monotonic clock stood still meanwhile."""
        process.stopped = False
        process.slept += slept
        waiting, process.waiting = process.waiting, []
        for handle in waiting:
            if isinstance(handle, asyncio.TimerHandle) and slept:
                heapq.heappush(
                    self._timers, (handle.when() + process.slept, next(self._numbers), handle, process.slept)
                )
            else:
                self._ready.append(handle)

    def run_until(self, end: float) -> None:
        """Go on until the virtual time `end`, in seconds; raises Endless."""
        ready, timers = self._ready, self._timers
        at_once = 0
        while True:
            while ready:
                self._step(ready.popleft())
                at_once += 1
                if at_once > self._most:
                    raise Endless(f"more than {self._most} steps at {self.now:.3f} s")
            if not timers or timers[0][0] > end:
                self.now = max(self.now, end)
                return
            when, _, timer, slept = heapq.heappop(timers)
            if timer.cancelled():
                continue
            owner: Process | None = _context_of(timer).get(OWNER)
            if owner is not None and owner.slept != slept:  # its clock stood still meanwhile
                heapq.heappush(timers, (when + owner.slept - slept, next(self._numbers), timer, owner.slept))
                continue
            if when > self.now:
                self.now, at_once = when, 0
            ready.append(timer)

    def run(self, coroutine: Coroutine[Any, Any, T], within: float) -> T:
        """Run a coroutine of the world's own; raises TimeoutError when it takes longer in virtual time."""
        task = self.spawn(coroutine)
        end = self.now + within
        while not task.done() and self.now < end:
            self.run_until(min(end, max(self.now, self._timers[0][0]) if self._timers else end))
        if not task.done():
            raise TimeoutError(f"not within {within} s of virtual time")
        result: T = task.result()
        return result

    def bury(self) -> None:
        """End every task that there is, so that nothing is left when the loop goes."""
        for _ in range(20):
            tasks = asyncio.all_tasks(self)
            if not tasks:
                break
            for task in tasks:
                task.cancel()
            for process in self.processes:
                process.alive, process.crash_at = True, None
                self.resume(process)
            self.run_until(self.now + 0.001)
        self._timers.clear()
        self._ready.clear()

    def _step(self, handle: asyncio.Handle) -> None:
        owner: Process | None = _context_of(handle).get(OWNER)
        self.steps += 1
        if not self.steps % _COLLECT:
            gc.collect()
        if owner is not None:
            if not owner.alive or owner.stopped:
                owner.waiting.append(handle)
                return
            owner.steps += 1
            if owner.steps == owner.crash_at:
                owner.waiting.append(handle)
                owner.crash()
                return
        if not handle.cancelled():
            handle._run()


def _context_of(handle: asyncio.Handle) -> Context:
    return handle._context  # type: ignore[attr-defined, no-any-return]  # the only way to tell whose step it is


@contextlib.contextmanager
def running(loop: VirtualLoop) -> Iterator[VirtualLoop]:
    """Make it the running loop, and its clock the one that programs read; undone at the end."""
    real = time.time, time.monotonic

    def wall() -> float:
        owner = OWNER.get()
        return EPOCH + loop.now + (owner.wall if owner else 0.0)

    def finalize(generator: Any) -> None:
        loop.call_soon(loop.create_task, generator.aclose())

    hooks = sys.get_asyncgen_hooks()
    events._set_running_loop(loop)
    sys.set_asyncgen_hooks(finalizer=finalize)
    time.time, time.monotonic = wall, loop.time
    try:
        yield loop
    finally:
        time.time, time.monotonic = real
        sys.set_asyncgen_hooks(*hooks)
        events._set_running_loop(None)
