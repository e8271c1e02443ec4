"""How a lab tells what goes on."""

from __future__ import annotations

from typing import Protocol


class Report(Protocol):
    """Told what is being done and, where it can be counted, how far it is: `done` of `total`."""

    def __call__(self, what: str, done: int = 0, total: int = 0) -> None: ...


def silent(what: str, done: int = 0, total: int = 0) -> None:
    """A Report that keeps it to itself."""
