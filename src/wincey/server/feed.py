"""One watch on the store for any number of long polls.

flannel's server starts a watch for each poll and leaves it behind when the client goes. Here one watch fills a short list
of the latest updates, and a poll is a wait for that list to grow, which ends with its client. A feed begins at the cursor
of whoever asks first, so that clients that come over from another server go on where they were.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Generic, Protocol, TypeVar

from wincey.model.errors import HistoryLost, StoreError


class Revised(Protocol):
    """Something that happened at a revision of the store."""

    @property
    def revision(self) -> int: ...


U = TypeVar("U", bound=Revised)

_KEPT = 1000  # updates
_IDLE = 600.0  # seconds without a poll until the watch ends


class _Run(Generic[U]):
    """A watch under way: all updates after `base`, and why it ended."""

    def __init__(self, base: int) -> None:
        self.base = self.known = base
        self.updates: list[U] = []
        self.ended: StoreError | None = None
        self.news = asyncio.Event()
        self.task: asyncio.Task[None] | None = None

    def wake(self) -> None:
        self.news.set()
        self.news = asyncio.Event()


class Feed(Generic[U]):
    """watch: a store's watch after a revision. position: the store's revision now. told: called with each update."""

    def __init__(
        self,
        watch: Callable[[int], AsyncIterator[list[U]]],
        position: Callable[[], Awaitable[int]],
        told: Callable[[U], None] = lambda _: None,
    ) -> None:
        self._watch, self._position, self._told = watch, position, told
        self._run: _Run[U] | None = None
        self._waiting = 0
        self._timer: asyncio.TimerHandle | None = None

    @property
    def waiting(self) -> int:
        """How many polls wait at present."""
        return self._waiting

    async def after(self, cursor: int, wanted: Callable[[U], bool]) -> list[U] | None:
        """Wait for updates after a cursor that are wanted; None when the store or we no longer have them all.

        Raises StoreError when the store refuses.
        """
        run = self._run
        if run is None or run.ended:
            run = self._start(cursor)
        self._waiting += 1
        if self._timer:
            self._timer.cancel()
        try:
            # A cursor ahead of us: from another server, from a change elsewhere in the store, or from an older store?
            if cursor > run.known:
                position = await self._position()
                if cursor > position:
                    return None
                run.known = max(run.known, position)
            while True:
                if cursor < run.base or isinstance(run.ended, HistoryLost):
                    return None
                if run.ended:
                    raise run.ended
                begin = bisect_right(run.updates, cursor, key=lambda update: update.revision)
                if found := [update for update in run.updates[begin:] if wanted(update)]:
                    return found
                if run.updates:  # looked at, and of no interest: they may be dropped while we wait
                    cursor = max(cursor, run.updates[-1].revision)
                await run.news.wait()
        finally:
            self._waiting -= 1
            if not self._waiting:
                self._timer = asyncio.get_running_loop().call_later(_IDLE, self.close)

    def close(self) -> None:
        """End the watch; polls under way end with HistoryLost's answer."""
        if self._timer:
            self._timer.cancel()
        if self._run and self._run.task:
            self._run.task.cancel()

    def _start(self, cursor: int) -> _Run[U]:
        self._run = run = _Run[U](cursor)
        run.task = asyncio.create_task(self._fill(run))
        return run

    async def _fill(self, run: _Run[U]) -> None:
        try:
            async for batch in self._watch(run.base):
                for update in batch:
                    self._told(update)
                run.updates += batch
                run.known = max(run.known, run.updates[-1].revision)
                if len(run.updates) > 2 * _KEPT:
                    run.base = run.updates[-_KEPT - 1].revision
                    # Of one revision either all updates are kept or none.
                    run.updates = run.updates[bisect_right(run.updates, run.base, key=lambda each: each.revision) :]
                run.wake()
            run.ended = StoreError("the store's watch ended")
        except StoreError as error:
            run.ended = error
        finally:
            run.ended = run.ended or HistoryLost("the watch was ended")
            run.wake()
