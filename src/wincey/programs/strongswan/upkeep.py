"""Sees to it that every connection has its security associations: a loaded connection is only a permission.

When both hosts of a pair initiate at the same moment each may take the other's attempt for the sign of a restart and drop
its own, and nothing is left. So the host with the lower address begins, and the other one only after a moment without
success. A round looks at all associations with one command. Each missing tunnel is tried again soon, then ever more slowly;
charon's events make for a round when one has gone; while all are there, none come.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress

import msgspec

from wincey.model.address import format_address
from wincey.model.ipsec import IpsecPeer
from wincey.programs.strongswan.client import Vici, ViciError
from wincey.programs.strongswan.connections import child_name, has_tunnel
from wincey.programs.strongswan.vici import Message

log = logging.getLogger(__name__)

EVENTS = ("ike-updown", "child-updown")
PASSIVE = 2.0  # seconds that the host with the higher address waits for the other
_FIRST, _MOST, _GROWTH = 0.5, 15.0, 1.4  # seconds between attempts for one tunnel
_SETTLE = 0.2  # seconds; what ends, ends in several steps
_TELL_AFTER = 30.0  # seconds


class _Missing(msgspec.Struct):
    """A tunnel that is not there. since, due: when that was seen first, and when to try next (loop time, seconds)."""

    since: float
    due: float
    pause: float = _FIRST
    told: bool = False


class Upkeep:
    """Runs in the event loop from the first `look` to `close`. peers: the loaded connections by name, as they are then."""

    def __init__(self, peers: Mapping[str, IpsecPeer], charon: Callable[[], Vici | None], log_path: str) -> None:
        self._peers, self._charon, self._log_path = peers, charon, log_path
        self._missing: dict[str, _Missing] = {}
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def look(self) -> None:
        """Have a round soon."""
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run(), name="ipsec upkeep")
        self._wake.set()

    def on_event(self, _: str, message: Message) -> None:
        """Take note: charon tells that an association came or went."""
        if message.get("up") != "yes":
            self._wake.set()

    async def close(self) -> None:
        """Stop looking."""
        if self._task:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            next_round = min((each.due for each in self._missing.values()), default=None)
            with suppress(TimeoutError):
                async with asyncio.timeout_at(next_round):
                    await self._wake.wait()
            if self._wake.is_set():
                self._wake.clear()
                await asyncio.sleep(_SETTLE)
            try:
                await self._round(loop.time())
            except ViciError as error:
                log.debug("%s", error)
                for each in self._missing.values():
                    each.due = max(each.due, loop.time() + _FIRST)

    async def _round(self, now: float) -> None:
        charon = self._charon()
        if charon is None or not self._peers:
            self._missing.clear()
            return
        up, pending = await _associations(charon)
        before, self._missing = self._missing, {}
        for name, peer in self._peers.items():
            if name not in up:
                wait = 0.0 if peer.identity < peer.remote else PASSIVE
                self._missing[name] = before.pop(name) if name in before else _Missing(now, now + wait)
        for name, was in before.items():
            if was.told and (back := self._peers.get(name)):
                log.info("the IPsec tunnel to %s (%s) is there now", format_address(back.remote), back.subnet)
        for name, each in list(self._missing.items()):
            missed = self._peers.get(name)  # it may be unloaded while charon is asked about others
            if missed and now >= each.due:
                self._tell(missed, each, now)
                each.due, each.pause = now + each.pause, min(_MOST, each.pause * _GROWTH)
                if name not in pending:
                    attempt = {"ike": name, "child": child_name(missed), "timeout": "-1"}
                    await charon.command("initiate", attempt)

    def _tell(self, peer: IpsecPeer, missing: _Missing, now: float) -> None:
        if not missing.told and now - missing.since >= _TELL_AFTER:
            missing.told = True
            log.warning(
                "no IPsec tunnel to %s (%s) for %.0f s, and packets to it are dropped; charon's log tells why: %s",
                format_address(peer.remote),
                peer.subnet,
                now - missing.since,
                self._log_path,
            )


async def _associations(charon: Vici) -> tuple[set[str], set[str]]:
    """The names of connections with a tunnel, and of those that are getting one."""
    up, pending = set(), set()
    for event in await charon.stream("list-sas", "list-sa"):
        for name, association in event.items():
            if isinstance(association, dict):
                has, getting = has_tunnel(association)
                up |= {name} if has else set()
                pending |= {name} if getting else set()
    return up, pending
