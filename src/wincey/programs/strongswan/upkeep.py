"""Sees to it that every connection has its security associations: a loaded connection is only a permission.

When both hosts of a pair initiate at the same moment each may take the other's attempt for the sign of a restart and drop
its own, and nothing is left. So the host with the lower address begins, and the other one only after a moment without
success. A round looks at all associations with one command. Rounds come quickly while some tunnel is missing, then ever more
slowly, and when charon tells that one has gone; while all are there, none come.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping

from wincey.model.address import format_address
from wincey.model.ipsec import IpsecPeer
from wincey.programs.strongswan.client import Vici, ViciError
from wincey.programs.strongswan.connections import child_name, has_tunnel
from wincey.programs.strongswan.vici import Message

log = logging.getLogger(__name__)

EVENTS = ("ike-updown", "child-updown")
PASSIVE = 2.0  # seconds that the host with the higher address waits for the other
_FIRST, _MOST, _GROWTH = 0.5, 15.0, 1.4  # seconds between rounds while something is missing
_SETTLE = 0.2  # seconds; what ends, ends in several steps
_TELL_AFTER = 30.0  # seconds


class Upkeep:
    """Runs in the event loop from `start` to `close`. peers: the loaded connections by name, as they are at each round."""

    def __init__(self, peers: Mapping[str, IpsecPeer], charon: Callable[[], Vici | None], log_path: str) -> None:
        self._peers, self._charon, self._log_path = peers, charon, log_path
        self._missing: dict[str, float] = {}
        self._told: set[str] = set()
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
            self.look()

    async def close(self) -> None:
        """Stop looking."""
        if self._task:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _run(self) -> None:
        pause = _FIRST
        while True:
            if self._wake.is_set():
                self._wake.clear()
                pause = _FIRST
                await asyncio.sleep(_SETTLE)
            try:
                await self._round()
            except ViciError as error:
                log.debug("%s", error)
            try:
                async with asyncio.timeout(pause if self._missing else None):
                    await self._wake.wait()
            except TimeoutError:
                pause = min(_MOST, pause * _GROWTH)

    async def _round(self) -> None:
        charon = self._charon()
        if charon is None:
            self._missing.clear()
            return
        up, pending = await _associations(charon)
        now = asyncio.get_running_loop().time()
        self._missing = {name: self._missing.get(name, now) for name in self._peers if name not in up}
        for name, since in self._missing.items():
            peer = self._peers.get(name)
            if peer is None:  # unloaded meanwhile
                continue
            if now - since >= _TELL_AFTER and name not in self._told:
                self._told.add(name)
                log.warning(
                    "no IPsec tunnel to %s (%s) since %.0f s, packets to it are dropped: charon's log is %s",
                    format_address(peer.remote),
                    peer.subnet,
                    now - since,
                    self._log_path,
                )
            if name not in pending and (peer.identity < peer.remote or now - since >= PASSIVE):
                await charon.command("initiate", {"ike": name, "child": child_name(peer), "timeout": "-1"})
        for name in self._told.difference(self._missing):
            self._told.discard(name)
            if peer := self._peers.get(name):
                log.info("the IPsec tunnel to %s (%s) is there now", format_address(peer.remote), peer.subnet)


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
