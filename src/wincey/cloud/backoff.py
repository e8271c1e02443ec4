"""When to call again after a failure: pure, with time and chance passed in."""

from __future__ import annotations

import random

FIRST, MOST = 2.0, 300.0
"""Seconds: the first pause, and the longest one."""


class Backoff:
    """Doubles the pause with each failure in a row. By chance a pause is down to half as long, so that hosts which were
    throttled together come back apart."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._failures, self._until = 0, 0.0
        self.reason = ""

    def failed(self, reason: str, now: float) -> str:
        """Note a failure; returns the reason with the time of the next attempt."""
        pause = min(MOST, FIRST * 2 ** min(self._failures, 16)) * self._rng.uniform(0.5, 1)
        self._failures += 1
        self._until = now + pause
        self.reason = f"{reason}; next attempt in {pause:.0f} s"
        return self.reason

    def waiting(self, now: float) -> bool:
        """Whether it is too early to call again."""
        return now < self._until

    def worked(self) -> bool:
        """Note a success; whether there was a failure before it."""
        failed, self._failures, self._until, self.reason = bool(self._failures), 0, 0.0, ""
        return failed
