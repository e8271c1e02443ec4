"""Compares what BGP has taught with what was expected of it. Pure: time comes as an argument.

Sessions and routes come and go by themselves: what is wrong counts only once it has been so for a while.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec

from wincey.model.address import Address, Subnet, format_address
from wincey.model.bgp import BgpRoute, BgpSession
from wincey.model.state import Key, Object
from wincey.programs.bgp.learned import is_link_local
from wincey.programs.bgp.session import Session

PATIENCE = 15.0
"""Seconds that a session has for coming up, and a route for coming or going."""

_UNKNOWN = Session("not known to the routing daemon")


class Finding(msgspec.Struct, frozen=True):
    """Something that is not as expected. told: whether it is for the log, or follows from another finding that is."""

    object: BgpSession | BgpRoute
    reason: str
    told: bool = True


class Check:
    """Remembers since when something has been wrong."""

    def __init__(self, patience: float = PATIENCE) -> None:
        self._patience = patience
        self._since: dict[Key, float] = {}

    def judge(
        self,
        expected: Mapping[Key, Object],
        learned: Mapping[Subnet, frozenset[Address]],
        sessions: Mapping[Address, Session],
        now: float,
        hint: Callable[[], str] = lambda: "",
    ) -> dict[Key, Finding]:
        """What has been wrong for longer than the patience. expected: sessions and routes; hint: words on why none is up."""
        wrong = {item.object.key: item for item in self._wrong(expected, learned, sessions, hint)}
        self._since = {key: self._since.get(key, now) for key in wrong}
        return {key: item for key, item in wrong.items() if now - self._since[key] >= self._patience}

    def pending(self, now: float) -> bool:
        """Whether something is wrong that does not count yet."""
        return any(now - since < self._patience for since in self._since.values())

    def _wrong(
        self,
        expected: Mapping[Key, Object],
        learned: Mapping[Subnet, frozenset[Address]],
        sessions: Mapping[Address, Session],
        hint: Callable[[], str],
    ) -> list[Finding]:
        found: list[Finding] = []
        routes: dict[Subnet, BgpRoute] = {}
        routers = []
        for item in expected.values():
            if isinstance(item, BgpRoute):
                routes[item.subnet] = item
            elif isinstance(item, BgpSession):
                session = sessions.get(item.address, _UNKNOWN)
                routers.append(session)
                if not session.up:
                    found.append(Finding(item, f"not up: {session}{hint()}"))
        cut_off = bool(routers) and not any(session.up for session in routers)
        for route in routes.values():
            reason, told = _route(route, learned.get(route.subnet), sessions, hint, cut_off=cut_off)
            if reason:
                found.append(Finding(route, reason, told=told))
        for subnet, hops in learned.items():
            if subnet not in routes:
                stray = BgpRoute(subnet, gateway=min(hops, default=None) or None)
                found.append(Finding(stray, "was taught by BGP, and no lease knows this subnet; a router announces it"))
        return found


def _route(
    route: BgpRoute,
    hops: frozenset[Address] | None,
    sessions: Mapping[Address, Session],
    hint: Callable[[], str],
    *,
    cut_off: bool,
) -> tuple[str, bool]:
    """Why a route is not as expected, "" if it is; and whether that is worth a line of its own."""
    if hops is None:
        if route.neighbour is None:
            return "the routers have not announced it", not cut_off
        session = sessions.get(route.neighbour, _UNKNOWN)
        who = format_address(route.neighbour)
        if session.up:
            return f"{who} has not announced it", True
        return f"the session with {who} is not up: {session}{hint()}", True
    # A link-local next hop can't be compared with an address of a lease.
    if route.gateway and not all(hop == route.gateway or is_link_local(hop) for hop in hops):
        others = ", ".join(sorted(format_address(hop) if hop else "no next hop" for hop in hops))
        return f"was taught with another next hop: {others}", True
    return "", False
