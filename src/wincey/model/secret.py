"""A key or a password that nobody reads by accident."""

from __future__ import annotations

from typing import Generic, TypeVar

import msgspec

T = TypeVar("T", bytes, str)


class Secret(msgspec.Struct, Generic[T], frozen=True, gc=False):
    """It compares, and shows in no log and no traceback: neither as text nor as representation."""

    value: T

    def __repr__(self) -> str:
        return "Secret(...)"

    __str__ = __repr__
