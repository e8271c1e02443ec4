"""What a scenario is, and what came of one. Values, without I/O."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from wincey.lab.chaos.world import World

HOLD = 2.0
"""Seconds that a fault lasts, unless its scenario says otherwise."""


def nothing(world: World) -> None:
    """What is done before most faults."""


class Scenario(msgspec.Struct, frozen=True, kw_only=True):
    """One kind of bad day.

    does, expects: a sentence each, for people. fault: puts the fault on entering, and takes it away on leaving, without
    waiting for what comes of it. affected: the hosts whose own connection the fault cuts; pairs between the others may not
    lose a packet. apart: it cuts the affected hosts from each other alone. lossless: nor may they lose any. hold: seconds that it lasts. follows: whether a new lease has to reach all hosts
    while it lasts; then it lasts at least until one does. prepare: done before, in a healthy world. late: hosts whose
    daemons are not started with the others. restarts: hosts whose daemon may end by it; they are started again, as systemd
    would. patience: seconds to follow, and to heal.
    """

    name: str
    does: str
    expects: str
    fault: Callable[[World], AbstractContextManager[None]]
    affected: tuple[str, ...] = ()
    apart: bool = False
    lossless: bool = False
    hold: float = HOLD
    follows: bool = False
    prepare: Callable[[World], None] = nothing
    late: tuple[str, ...] = ()
    restarts: tuple[str, ...] = ()
    patience: float = 40.0


class Counted(msgspec.Struct, frozen=True):
    """Echo requests between some pairs: how many pairs (a pair counts once in each direction), sent, and never answered."""

    pairs: int
    sent: int
    lost: int


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a scenario.

    whole, affected: packets between pairs whose connection was whole, and between the others. silence_ms: the longest time
    without an answer between two affected containers. followed_ms: from the fault's start until a new lease had reached
    all hosts, while it lasted; None where that was not asked for. heal_ms: from the fault's end until all was as wanted
    again; None when it never was. passed: None when it could not be run here; `reason` says why, or why it failed.
    """

    name: str
    passed: bool | None
    reason: str = ""
    whole: Counted = Counted(0, 0, 0)
    affected: Counted = Counted(0, 0, 0)
    silence_ms: int = 0
    followed_ms: int | None = None
    heal_ms: int | None = None
    seconds: float = 0.0


class NotHere(Exception):
    """This scenario means nothing here: the backend or the machine lacks what it is about. Says what."""
