"""Giving memory back: what a join or an audit of 10,000 peers needs for a moment should not stay resident."""

from __future__ import annotations

import contextlib
import ctypes
import gc


def settle() -> None:
    """After start-up: what lives on from here is not looked at by each collection any more."""
    gc.collect()
    gc.freeze()
    give_back()


def give_back() -> None:
    """Return free pages to the system (malloc_trim(3)); about a millisecond."""
    with contextlib.suppress(OSError, AttributeError):  # a libc without it
        ctypes.CDLL(None).malloc_trim(0)
