"""When to call again after a failure, and what to say of it: with time and chance passed in."""

from __future__ import annotations

import logging
import random

log = logging.getLogger(__name__)

FIRST, MOST = 2.0, 300.0
"""Seconds: the first pause, and the longest one."""


class Backoff:
    """One kind of call. The pause doubles with each failure in a row; by chance it is down to half as long, so that hosts
    which were throttled together come back apart. A failure is logged when it is another one than the last."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._failures, self._until, self._told = 0, 0.0, ""
        self.reason = ""

    def failed(self, why: str, now: float) -> str:
        """Note a failure; returns it with the time of the next attempt."""
        pause = min(MOST, FIRST * 2 ** min(self._failures, 16)) * self._rng.uniform(0.5, 1)
        self._failures += 1
        self._until = now + pause
        self.reason = f"{why}; next attempt in {pause:.0f} s"
        if why != self._told:
            self._told = why
            log.error("%s", self.reason)
        return self.reason

    def waiting(self, now: float) -> bool:
        """Whether it is too early to call again."""
        return now < self._until

    def worked(self, what: str) -> None:
        """Note a success, and log it when it comes after a failure."""
        if self._failures:
            log.info("%s works again", what)
            self._failures, self._until, self._told, self.reason = 0, 0.0, "", ""
