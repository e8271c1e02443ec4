"""What the reconciler asks of each part that keeps a piece of the host's state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from wincey.model.state import Changes, Failure, Key, Object, Scope

Desired = Mapping[Key, Object]


class Driver(Protocol):
    """Keeps the objects of some classes of wincey.model.state. Calls never raise for one object's sake: see Failure."""

    handles: tuple[type[Object], ...]

    async def observe(self, desired: Desired, scope: Scope) -> dict[Key, Object]:
        """What is there now and is ours (by `scope`): of the kinds this driver handles, and no others.

        An object that is there exactly as desired is returned equal to the desired one. `desired` holds objects of every
        kind; a driver that can't read its state back whole (rules) compares against it.
        """

    async def apply(self, changes: Changes) -> Sequence[Failure]:
        """Delete, then put, in the order that the kernel needs, in as few calls as it takes. An object to delete that is
        already gone is no failure. One failing object never keeps the others from being applied."""

    def watch(self, changed: Callable[[str], None]) -> None:
        """Call `changed(why)` from the event loop when something of ours may have been changed by another program."""

    async def close(self) -> None:
        """Stop watching and release descriptors. What was applied stays."""
