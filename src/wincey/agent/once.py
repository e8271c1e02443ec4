"""Warnings that are worth one line each, however often their cause is met again."""

from __future__ import annotations

import logging

log = logging.getLogger(__name__)

_MOST = 1000  # what has been said is forgotten after so many: memory is bounded, and a reminder does no harm


class Once:
    """Says each thing about each subject once."""

    def __init__(self) -> None:
        self._told: set[tuple[str, str]] = set()

    def warn(self, about: str, what: str) -> None:
        """Log `about: what`, unless it was said before."""
        if (about, what) not in self._told:
            if len(self._told) >= _MOST:
                self._told.clear()
            self._told.add((about, what))
            log.warning("%s: %s", about, what, stacklevel=2)  # the line of whoever says it
