"""When to renew a lease: pure arithmetic in seconds."""

from __future__ import annotations

import random

RETRY_FIRST, RETRY_MOST = 1.0, 60.0


def renew_in(time_left: float, margin: float, rng: random.Random) -> float:
    """Seconds until the next renewal of a lease that has `time_left` seconds to live.

    At about half of its life, so that an outage of many hours costs no lease, and never later than `margin` before its
    end. The jitter of a quarter spreads a cluster that was started at once.
    """
    half = time_left * 0.5 * rng.uniform(0.75, 1.0)
    return max(0.0, min(half, time_left - margin))


def retry_in(failures: int, rng: random.Random) -> float:
    """Seconds until the next attempt after that many failures in a row (1 or more)."""
    return min(RETRY_MOST, RETRY_FIRST * 2.0 ** min(failures - 1, 16)) * rng.uniform(0.5, 1.0)
