"""The reconciler's driver for BGP: speaker and neighbours are kept as desired, sessions and routes are watched.

What the routing daemon was last told is remembered in a file, as its own state can't be read back whole. It counts only
while the daemon runs with that very configuration. Sessions and routes that are not as expected are logged here, once each,
and are failures for as long as they last.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from wincey.model.bgp import BgpPeer, BgpRoute, BgpSession, BgpSpeaker
from wincey.model.errors import WinceyError
from wincey.model.state import Changes, Failure, Key, Object, Scope
from wincey.programs.bgp.check import PATIENCE, Check, Finding
from wincey.programs.bgp.files import Applied, Room
from wincey.programs.bgp.instance import Bird, Frr, Instance
from wincey.programs.bgp.learned import Notices, learned_routes
from wincey.programs.bgp.md5 import rejected

log = logging.getLogger(__name__)

_SHOWN = 5
_SPEAKER: Key = (BgpSpeaker.tag,)


class BgpDriver:
    """Keeps one network's BGP speaker. directory: for its files; the same one at every start. patience: see Check."""

    handles: tuple[type[Object], ...] = (BgpSpeaker, BgpPeer, BgpSession, BgpRoute)

    def __init__(self, directory: Path, patience: float = PATIENCE) -> None:
        self._room = Room(directory)
        self._patience = patience
        self._check = Check(patience)
        self._findings: dict[Key, Finding] = {}
        self._told: dict[Key, Object] = {}
        self._instance: Instance | None = None
        self._kind: tuple[str, ...] = ()
        self._notices: Notices | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._changed: Callable[[str], None] = lambda why: None
        self._lock = asyncio.Lock()
        self._rejected = rejected()

    async def observe(self, desired: Mapping[Key, Object], scope: Scope) -> dict[Key, Object]:
        """See Driver. A speaker that does not run, or with another configuration, is not reported; one to end always is."""
        async with self._lock:
            applied, wanted = self._room.applied(), desired.get(_SPEAKER)
            found: dict[Key, Object] = {}
            if applied:
                try:
                    found = await self._running(applied, wanted)
                except (WinceyError, OSError) as error:
                    log.warning("%s: %s", applied.speaker, error)
                    if wanted is None:
                        found[_SPEAKER] = applied.speaker
            if isinstance(wanted, BgpSpeaker):
                expected = {key: item for key, item in desired.items() if isinstance(item, (BgpSession, BgpRoute))}
                await self._look(expected, applied, wanted)
                strays = {key: item.object for key, item in self._findings.items() if key not in expected}
                found |= {key: item for key, item in expected.items() if key not in self._findings} | strays
            return found

    async def apply(self, changes: Changes) -> Sequence[Failure]:
        """See Driver. One change of configuration, however many neighbours come and go."""
        put = [item for item in changes.put if isinstance(item, (BgpSpeaker, BgpPeer))]
        delete = [item for item in changes.delete if isinstance(item, (BgpSpeaker, BgpPeer))]
        failures: list[Failure] = []
        async with self._lock:
            if put or delete:
                try:
                    await self._become(put, delete)
                except (WinceyError, OSError) as error:
                    reason = str(error) if isinstance(error, WinceyError) else f"{error.strerror}: {error.filename}"
                    # Of a speaker that does not start its neighbours need not speak.
                    speakers = [item for item in put if isinstance(item, BgpSpeaker)]
                    failures = [Failure(item, reason) for item in speakers or put or delete]
            for item in (*changes.put, *changes.delete):
                if isinstance(item, (BgpSession, BgpRoute)) and (finding := self._findings.get(item.key)):
                    failures.append(Failure(item, finding.reason))
            if any(isinstance(item, (BgpSession, BgpRoute)) for item in changes.put):
                self._look_again()
        return failures

    def watch(self, changed: Callable[[str], None]) -> None:
        """Call `changed` when the routing daemon ends, and when sessions or routes are due for a look."""
        self._changed = changed

    async def close(self) -> None:
        """Leave the routing daemon to itself: it goes on."""
        if self._timer:
            self._timer.cancel()
        if self._notices:
            self._notices.close()
            self._notices = None
        async with self._lock:
            await self._leave()

    async def _running(self, applied: Applied, wanted: Object | None) -> dict[Key, Object]:
        """Speaker and neighbours as they are configured now."""
        instance, found = await self._for(applied.speaker), dict[Key, Object]()
        alive = await instance.alive()
        if wanted is None or (alive and await instance.current(applied)):
            found[_SPEAKER] = applied.speaker
        # Those of one that does not run are started with it.
        known = await instance.sessions(applied.peers) if alive and wanted else None
        for peer in applied.peers:
            if known is None or peer.address in known:
                found[peer.key] = peer
        return found

    async def _become(self, put: Sequence[BgpSpeaker | BgpPeer], delete: Sequence[BgpSpeaker | BgpPeer]) -> None:
        before = self._room.applied()
        speaker = before.speaker if before else None
        peers = {peer.address: peer for peer in before.peers} if before else {}
        for item in delete:
            if isinstance(item, BgpSpeaker):
                speaker = None
            else:
                peers.pop(item.address, None)
        for item in put:
            if isinstance(item, BgpSpeaker):
                speaker = item
            else:
                peers[item.address] = item
        if before and (speaker is None or _kind(speaker) != _kind(before.speaker)):
            await self._stop(before)
            before = None
        if speaker is None:
            return
        wanted = Applied(speaker, list(peers.values()))
        instance = await self._for(speaker)
        if await instance.alive():
            # A neighbour that is to be put is not there, whatever is remembered of it.
            there = Applied(before.speaker, [each for each in before.peers if each not in put]) if before else None
            await instance.configure(there, wanted)
            self._room.remember(wanted)
        else:
            # Before the start, so that a crash from here on leaves nothing that is not known as ours.
            self._room.remember(wanted)
            log.info("starting the %s", speaker)
            await instance.start(wanted, again=bool(learned_routes([rule.network for rule in speaker.accepted])))

    async def _stop(self, applied: Applied) -> None:
        await (await self._for(applied.speaker)).stop(applied)
        await self._leave()
        self._room.remove()

    async def _for(self, speaker: BgpSpeaker) -> Instance:
        """The instance that a speaker is for; one at a time."""
        kind = _kind(speaker)
        if self._instance is None or self._kind != kind:
            await self._leave()
            make = Bird if speaker.daemon == "bird" else Frr
            self._instance, self._kind = make(self._room, speaker, self._ended), kind
        return self._instance

    async def _leave(self) -> None:
        instance, self._instance = self._instance, None
        if instance:
            await instance.close()

    def _ended(self) -> None:
        self._changed("the routing daemon ended")

    async def _look(self, expected: Mapping[Key, Object], applied: Applied | None, speaker: BgpSpeaker) -> None:
        """Judge sessions and routes, and tell what is new."""
        networks = [rule.network for rule in speaker.accepted]
        if self._notices is None or self._notices.networks != networks:
            if self._notices:
                self._notices.close()
            self._notices = Notices(networks, self._look_again)
        try:
            instance = await self._for(applied.speaker) if applied else None
            alive = instance is not None and await instance.alive()
            sessions = await instance.sessions(applied.peers) if alive and instance and applied else {}
        except (WinceyError, OSError):
            sessions = {}  # said already
        now = time.monotonic()
        hint = partial(_hint, speaker, self._rejected)
        self._findings = self._check.judge(expected, learned_routes(networks), sessions, now, hint)
        pending = self._check.pending(now)
        if pending:
            self._look_again()
        new = [item for key, item in self._findings.items() if item.told and key not in self._told]
        for finding in new[:_SHOWN]:
            log.warning("%s: %s", finding.object, finding.reason)
        if len(new) > _SHOWN:
            log.warning("%d more BGP sessions and routes are not as expected", len(new) - _SHOWN)
        for key in [key for key in self._told if key not in self._findings]:
            item = self._told.pop(key)
            if key in expected:
                log.info("%s: in order now", item)
        self._told |= {finding.object.key: finding.object for finding in new}
        if not self._findings and not pending:
            self._rejected = rejected()

    def _look_again(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._patience / 3 + 0.1, self._due)

    def _due(self) -> None:
        self._timer = None
        self._changed("BGP has had some time")


def _kind(speaker: BgpSpeaker) -> tuple[str, ...]:
    """What can't be changed in a running daemon."""
    return (speaker.daemon, speaker.instance, speaker.control, speaker.include, str(speaker.port), str(speaker.bfd))


def _hint(speaker: BgpSpeaker, before: int) -> str:
    if rejected() > before:
        return (
            "; packets with a wrong or missing TCP MD5 password came in: Backend.Password must be the same at both ends"
        )
    return "; if it answers to pings, is Backend.Password the same at both ends?" if speaker.password.value else ""
