"""What is known of the way to a peer by asking it: a window of echo requests, and what they tell. Pure."""

from __future__ import annotations

from collections import deque
from statistics import median

import msgspec

WINDOW = 20
"""How many requests the loss is told of."""

LOSSY = 0.1
"""A part of lost requests from which on a way is called bad; fewer may be chance."""


class Target(msgspec.Struct, frozen=True):
    """Whom to ask. inner: the addresses, own and the peer's, that packets through the network use; None where this host has
    none of its own there. outer: those of the hosts. mtu: what containers are promised; outer_mtu: the interface's."""

    inner: tuple[bytes, bytes] | None
    outer: tuple[bytes, bytes]
    mtu: int
    outer_mtu: int


class Window:
    """The latest requests along one way: round trips in seconds, None for those without an answer."""

    def __init__(self) -> None:
        self._asked: deque[float | None] = deque(maxlen=WINDOW)
        self.refusal = ""

    def add(self, rtt: float | None, refusal: str = "") -> None:
        """One more. refusal: what somebody in the path said in place of an answer."""
        self._asked.append(rtt)
        self.refusal = refusal

    @property
    def asked(self) -> int:
        """How many there are."""
        return len(self._asked)

    @property
    def loss(self) -> float:
        """The part that was lost, 0 to 1."""
        return sum(each is None for each in self._asked) / len(self._asked) if self._asked else 0.0

    @property
    def rtt(self) -> float | None:
        """The median round trip in seconds, None while there is none."""
        known = [each for each in self._asked if each is not None]
        return median(known) if known else None

    @property
    def silent(self) -> bool:
        """Whether the last three were all lost."""
        return len(self._asked) >= 3 and all(each is None for each in list(self._asked)[-3:])


class Probed:
    """All that is known of one peer. mtu: the largest packet that gets there whole, None before that was tried."""

    def __init__(self) -> None:
        self.inner, self.outer = Window(), Window()
        self.mtu: int | None = None
        self.asked_at = 0.0

    def troubles(self, target: Target, wraps: str) -> list[str]:
        """What is wrong, in words. wraps: how packets to it are wrapped, "" for plain ones."""
        way = self.inner if target.inner else self.outer
        if way.silent and way is self.inner and self.outer.rtt is not None and not self.outer.silent:
            hint = f" (packets go {wraps})" if wraps else ""
            return [f"its host answers, but not through the network: is a firewall between?{hint}"]
        if way.silent:
            said = f" ({way.refusal})" if way.refusal else ""
            return [f"it does not answer{said}: its host is down, or the way to it is"]
        found = []
        if way.loss >= LOSSY and way.asked >= 10:
            found.append(f"{way.loss:.0%} of the last {way.asked} requests were lost")
        promised = target.mtu if target.inner else target.outer_mtu
        if self.mtu is not None and 0 < self.mtu < promised:
            found.append(
                f"packets larger than {self.mtu} bytes don't get there, and containers may send {promised}: the way between"
                " the hosts has a smaller MTU; set MTU in the network config's Backend, or mend the path"
            )
        return found
