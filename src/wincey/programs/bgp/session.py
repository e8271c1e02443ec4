"""A BGP session as a routing daemon tells of it."""

from __future__ import annotations

import msgspec


class Session(msgspec.Struct, frozen=True):
    """state: the daemon's own word, such as Established or Active. error: what it last failed with, "" if nothing."""

    state: str
    error: str = ""

    @property
    def up(self) -> bool:
        """Whether routes pass."""
        return self.state == "Established"

    def __str__(self) -> str:
        return self.state + (f" ({self.error})" if self.error else "")
