"""The driver of the extension backend: runs commands one at a time, in order, and knows what they have added.

What commands do can't be read back, so what is there is what was added and not removed since, remembered over restarts. The
start commands run once in each run of the daemon and may make everything anew (a device, a key), so after them each peer is
added again; without them a restart adds and removes only those that came and went meanwhile.

A changed peer is removed with its old data, then added with its new. An add that failed is tried again by the reconciler,
and what it may have left is removed before. A removal that fails three times is given up: mostly it fails because what it
removes is gone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path

from wincey.model.command import Command, CommandFailed, CommandNetwork, CommandPeer
from wincey.model.state import Changes, Failure, Key, Object, Scope
from wincey.programs.extension.memory import Added, Memory
from wincey.programs.extension.running import run
from wincey.programs.extension.start import forget_start, place

log = logging.getLogger(__name__)

REMOVALS = 3
"""How often a removal is tried."""


class CommandDriver:
    """Keeps what commands make for one network. directory: the network's own."""

    handles: tuple[type[Object], ...] = (CommandNetwork, CommandPeer)

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._memory = Memory(directory)
        self._started: CommandNetwork | None = None  # by this run of the daemon
        self._waiting = ""  # why peers can't be added yet
        self._lock = asyncio.Lock()

    async def observe(self, desired: Mapping[Key, Object], scope: Scope) -> dict[Key, Object]:
        """What was added. A peer that has to be added again is not reported while it is desired."""
        memory, found = self._memory, dict[Key, Object]()
        wanted = next((item for item in desired.values() if isinstance(item, CommandNetwork)), None)
        async with self._lock:
            network = self._started if wanted else memory.network
            if network:
                found[network.key] = network
            if wanted and wanted.starts and not wanted.starts_like(self._started):
                memory.doubt()
            for added in memory.peers.values():
                if added.there or added.peer.key not in desired:
                    found[added.peer.key] = added.peer
        return found

    async def apply(self, changes: Changes) -> Sequence[Failure]:
        """Remove peers, shut down, start, add peers; each command after the end of the one before."""
        memory = self._memory
        async with self._lock:
            leaving = [memory.peers[item.subnet] for item in _peers(changes.delete) if item.subnet in memory.peers]
            coming = [item for item in _peers(changes.put) if not self._is_there(item)]
            for added in leaving:
                added.there, added.unclear = False, True
            for peer in coming:
                self._begin(peer)
            for item in changes.put:
                if isinstance(item, CommandNetwork):
                    memory.network, memory.shutdowns = item, 0
            memory.save()
            try:
                return [failure async for failure in self._work(changes, leaving, coming)]
            finally:
                memory.save()

    def watch(self, changed: Callable[[str], None]) -> None:
        """What other programs do to the work of commands can't be noticed."""

    async def close(self) -> None:
        """Nothing is held open."""

    async def _work(
        self, changes: Changes, leaving: Sequence[Added], coming: Sequence[CommandPeer]
    ) -> AsyncIterator[Failure]:
        memory = self._memory
        for added in leaving:
            if reason := await self._remove(added):
                yield Failure(added.peer, reason)
            memory.save(soon=True)
        for item in changes.delete:
            if isinstance(item, CommandNetwork) and (reason := await self._shut_down()):
                yield Failure(item, reason)
        for item in changes.put:
            if isinstance(item, CommandNetwork):
                self._waiting = await self._start(item)
                if self._waiting:
                    yield Failure(item, self._waiting)
        for peer in coming:
            if reason := "it waits for PostStartupCommand" if self._waiting else await self._add(peer):
                yield Failure(peer, reason)
            memory.save(soon=True)

    def _is_there(self, peer: CommandPeer) -> bool:
        """Whether it needs no command. What its removal needs may be other than before."""
        added = self._memory.peers.get(peer.subnet)
        if added is None or not added.there or not peer.adds_like(added.peer):
            return False
        added.peer = peer
        return True

    def _begin(self, peer: CommandPeer) -> None:
        """Remember that it is about to be there."""
        added = self._memory.peers.setdefault(peer.subnet, Added(peer))
        added.there = False
        if peer.adds_like(added.peer):
            added.peer = peer
        else:
            added.unclear = True

    async def _add(self, peer: CommandPeer) -> str:
        """Why it failed, "" if it did not."""
        added = self._memory.peers[peer.subnet]
        old = added.peer
        if added.unclear and (reason := await self._run("SubnetRemoveCommand", old.remove, old)):
            log.info("%s: %s; adding it all the same", old, reason)
        added.peer, added.unclear, added.removals = peer, True, 0
        reason = await self._run("SubnetAddCommand", peer.add, peer)
        added.there, added.unclear = not reason, bool(reason)
        return reason

    async def _remove(self, added: Added) -> str:
        reason = await self._run("SubnetRemoveCommand", added.peer.remove, added.peer)
        added.removals += 1
        if reason and added.removals < REMOVALS:
            return reason
        if reason:
            log.warning("%s: %s; given up after %d attempts", added.peer, reason, REMOVALS)
        del self._memory.peers[added.peer.subnet]
        return ""

    async def _start(self, network: CommandNetwork) -> str:
        if not network.starts_like(self._started):
            self._started = None
            reason = await self._run("PostStartupCommand", network.after, network)
            if reason:
                return reason
        self._started = network
        return ""

    async def _shut_down(self) -> str:
        memory = self._memory
        if memory.network is None:
            return ""
        reason = await self._run("ShutdownCommand", memory.network.shutdown, memory.network)
        memory.shutdowns += 1
        if reason and memory.shutdowns < REMOVALS:
            return reason
        if reason:
            log.warning("%s: %s; given up after %d attempts", memory.network, reason, REMOVALS)
        memory.network = self._started = None
        memory.shutdowns = 0
        forget_start(self._directory)
        return ""

    async def _run(self, name: str, command: Command | None, item: CommandNetwork | CommandPeer) -> str:
        if command is None:
            return ""
        data, whom = (item.data, item.subnet) if isinstance(item, CommandPeer) else ("", "")
        try:
            where = place(self._directory)
            await run(name, command, item.environment, where, timeout=item.timeout, text=data, whom=whom)
        except CommandFailed as error:
            return str(error)
        except OSError as error:
            return f"{name} can't be run: {error}"
        return ""


def _peers(items: Sequence[Object]) -> list[CommandPeer]:
    return [item for item in items if isinstance(item, CommandPeer)]
