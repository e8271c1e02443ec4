"""Calls to one cloud's API with a deadline, and the rest after failures."""

from __future__ import annotations

import asyncio
import logging
import random
from collections import defaultdict
from collections.abc import Awaitable, Callable

from wincey.cloud.backoff import Backoff
from wincey.cloud.dialects import Opens
from wincey.cloud.errors import CloudConflict, CloudError, CloudThrottled, CloudUnavailable
from wincey.cloud.table import Dialect
from wincey.model.cloud import CloudTable
from wincey.model.state import Key

DEADLINE = 15.0
"""Seconds that a call may take: the rest of the host is not looked after meanwhile."""

_NOT_THE_APIS = (LookupError, TypeError, ValueError, AttributeError)
"""What reading an answer raises that is JSON, and has not the form that the API's documents promise."""

log = logging.getLogger(__name__)

_WRITES = ("create", "replace", "delete")


class Calls:
    """What is called by kinds ("look", "create", "replace", "delete", "forward"), and each kind by table.

    A kind that failed rests for a while; after throttling, or without an answer, all do. What fails without a call (a host that
    is not found) rests too, by a key of its own.
    """

    def __init__(self, rng: random.Random, now: Callable[[], float], opens: Opens) -> None:
        self._now, self._opens = now, opens
        self._table: CloudTable | None = None
        self._dialect: Dialect | None = None
        self._backoffs: dict[Key, Backoff] = defaultdict(lambda: Backoff(rng))
        self._rest: Backoff | None = None  # the one that all wait for

    @property
    def dialect(self) -> Dialect:
        """The dialect of the table in use; raises CloudError's kinds when it can't be opened."""
        if self._dialect is None:
            assert self._table
            self._dialect = self._opens(self._table)
        return self._dialect

    async def use(self, table: CloudTable | None) -> None:
        """Speak to another table's cloud from now on, or to none."""
        await self.close()
        self._table, self._rest = table, None
        self._backoffs.clear()

    async def close(self) -> None:
        """End connections; the next call opens new ones."""
        dialect, self._dialect = self._dialect, None
        if dialect:
            await dialect.close()

    async def attempt(self, kind: str, call: Callable[[], Awaitable[None]], table: str = "") -> str:
        """Do it unless it rests; returns why it is not done, "" if it is. Raises CloudConflict of a kind that writes."""
        own = self._backoffs[(kind, table)]
        for backoff in (self._rest or own, own):
            if backoff.waiting(self._now()):
                return backoff.reason
        self._rest = None
        try:
            # A call that takes longer ends by itself, in a thread perhaps.
            async with asyncio.timeout(DEADLINE):
                await call()
        except (CloudThrottled, CloudUnavailable) as error:
            self._rest = own
            return own.failed(str(error), self._now())
        except CloudError as error:
            if isinstance(error, CloudConflict) and kind in _WRITES:
                raise
            return own.failed(str(error), self._now())
        except TimeoutError:
            self._rest = own
            return own.failed(f"{self._table}: no answer in {DEADLINE:.0f} s", self._now())
        except _NOT_THE_APIS as error:
            self._rest = own
            log.debug("an answer about the %s can't be read", self._table, exc_info=True)
            why = f"{self._table}: the API's answer has not the form that it should have ({type(error).__name__}: {error})"
            return own.failed(why[:300], self._now())
        own.worked(f"{self._table}: {kind}")
        return ""

    def resting(self, *keys: Key) -> str:
        """Why all of these rest, "" if one does not (or there is none)."""
        backoffs = [self._backoffs[key] for key in keys]
        return backoffs[0].reason if backoffs and all(each.waiting(self._now()) for each in backoffs) else ""

    def failed(self, key: Key, why: str) -> str:
        """Note a failure of something else than a call; returns why with the time of the next attempt."""
        return self._backoffs[key].failed(why, self._now())

    def worked(self, key: Key) -> None:
        """Note that it went well."""
        if key in self._backoffs:
            self._backoffs.pop(key).worked(f"{self._table}: {' '.join(map(str, key))}")
