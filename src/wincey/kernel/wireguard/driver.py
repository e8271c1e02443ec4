"""The reconciler's driver for WireGuard devices, peers and subnets: one read, one difference, one transaction per device.

Nobody tells when another program changes a peer, so a change by hand is found by the slow audit; that a device is gone, or its
process ended, the monitor of links notices at once. The private key is read from its file when a device gets it, and nothing
of it stays here.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from wincey.kernel.links import read_link
from wincey.kernel.netlink import Netlink
from wincey.kernel.wireguard.curve25519 import public_key
from wincey.kernel.wireguard.edits import Known, compose, learned, moved, read_peers, wake
from wincey.kernel.wireguard.inkernel import InKernel
from wincey.kernel.wireguard.keyfile import read_key
from wincey.kernel.wireguard.userspace import Userspace
from wincey.kernel.wireguard.values import DeviceEdit, PeerEdit, Running, WireguardError
from wincey.model.errors import NotJoinable
from wincey.model.state import Changes, Failure, Key, Object, Scope
from wincey.model.wireguard import DEVICE, DEVICE_V6, Way, WireguardDevice, WireguardPeer, WireguardSubnet

log = logging.getLogger(__name__)

_NAMES = (DEVICE, DEVICE_V6)
_OF_KIND: dict[str, Way] = {"wireguard": "kernel", "tun": "wireguard-go"}


class WireguardDriver:
    """Keeps the WireGuard devices of this host's network namespace, with their peers. All peers of a device are ours."""

    handles: tuple[type[Object], ...] = (WireguardDevice, WireguardPeer, WireguardSubnet)

    def __init__(self) -> None:
        self._links = Netlink()
        self._open: dict[Way, Running] = {}
        self._known: dict[str, Known] = {}

    async def observe(self, desired: Mapping[Key, Object], scope: Scope) -> dict[Key, Object]:
        """See driver.Driver."""
        found: dict[Key, Object] = {}
        peers = _peers_by_device(desired)
        for device in _NAMES:
            wanted = desired.get((WireguardDevice.tag, device))
            self._known.pop(device, None)
            way = self._way(device) if wanted or device in scope.devices else None
            if way is None:
                continue
            try:
                state = await self._running(way).read(device)
            except WireguardError as error:
                log.warning("%s: %s", device, error)
                continue
            if state is None:
                continue
            key_file = wanted.key_file if isinstance(wanted, WireguardDevice) else ""
            item = WireguardDevice(device, way, state.port, state.public_key, key_file)
            objects, self._known[device] = read_peers(device, state, peers.get(device, {}), time.time())
            found.update({each.key: each for each in (item, *objects)})
        return found

    async def apply(self, changes: Changes) -> Sequence[Failure]:
        """See driver.Driver."""
        failures: list[Failure] = []
        gone: set[str] = set()
        for item in changes.delete:
            if isinstance(item, WireguardDevice):
                gone.add(item.device)
                if reason := await self._remove(item):
                    failures.append(Failure(item, reason))
        put = {item.device: item for item in changes.put if isinstance(item, WireguardDevice)}
        unusable: dict[str, str] = {}
        for device in _NAMES:
            if device in put and (reason := await self._put_device(put[device])):
                failures.append(Failure(put[device], reason))
                unusable[device] = reason
            peers = [item for item in changes.put if _on(item, device)]
            leaving = [item for item in changes.delete if _on(item, device) and device not in gone]
            if device in unusable:
                failures += [Failure(item, unusable[device]) for item in peers]
            elif peers or leaving:
                failures += await self._change_peers(device, peers, leaving)
        return failures

    def watch(self, changed: Callable[[str], None]) -> None:
        """See driver.Driver. Devices are watched by the driver of links, and of peers nobody tells."""

    async def close(self) -> None:
        """See driver.Driver."""
        self._links.close()
        for running in self._open.values():
            running.close()
        self._open.clear()

    def _running(self, way: Way) -> Running:
        if way not in self._open:
            self._open[way] = InKernel() if way == "kernel" else Userspace()
        return self._open[way]

    def _way(self, device: str) -> Way | None:
        """Who runs a device that is there."""
        link = read_link(self._links, device)
        return _OF_KIND.get(link.kind) if link else None

    async def _remove(self, item: WireguardDevice) -> str:
        self._known.pop(item.device, None)
        try:
            await self._running(item.way).remove(item.device)
        except WireguardError as error:
            return str(error)
        return ""

    async def _put_device(self, item: WireguardDevice) -> str:
        """Have a device as wanted; returns why that failed, "" if it did not."""
        device, running = item.device, self._running(item.way)
        try:
            private_key = read_key(Path(item.key_file))
            if public_key(private_key.value) != item.public_key:
                return f"the key file {item.key_file} has another key by now: restart the daemon to change over to it"
            way = self._way(device)
            if way and way != item.way:
                await self._running(way).remove(device)
                way = None
            state = await running.read(device) if way else None
            await running.make(device)
            known = self._known.setdefault(device, Known())
            woken: list[PeerEdit] = []
            if state and state.public_key != item.public_key:  # sessions can't be used for sending from now on
                woken = [edit for key in sorted(known.live) for edit in wake(key, known.keepalives.get(key, 0))]
            port = item.port if state is None or state.port != item.port else None
            await running.change(device, DeviceEdit(private_key, port, tuple(woken)))
        except (WireguardError, NotJoinable) as error:
            return str(error)
        return ""

    async def _change_peers(self, device: str, put: list[Object], delete: list[Object]) -> list[Failure]:
        known = self._known.setdefault(device, Known())
        way = self._way(device)
        if way is None:
            return [Failure(item, f"device {device} is not there") for item in put]
        running = self._running(way)
        keep: frozenset[bytes] = frozenset()
        try:
            if (others := moved(put, known)) and (state := await running.read(device)):
                keep = frozenset(others & learned(state, known, time.time()))
        except WireguardError as error:
            return [Failure(item, str(error)) for item in put]
        edits = compose(put, delete, known, keep)
        refused = await self._transact(running, device, edits)
        known.note_all([edit for edit in edits if edit.public_key not in refused])
        for item in put:
            if isinstance(item, WireguardPeer) and item.public_key in keep:
                known.given[item.public_key] = item.endpoint, item.port
        return [Failure(item, refused[key]) for item in (*put, *delete) if (key := _peer_of(item)) in refused]

    async def _transact(self, running: Running, device: str, edits: Sequence[PeerEdit]) -> dict[bytes, str]:
        """Carry out changes; one that is refused is found by halving, and keeps none of the others back."""
        try:
            await running.change(device, DeviceEdit(peers=tuple(edits)))
        except WireguardError as error:
            keys = list(dict.fromkeys(edit.public_key for edit in edits))
            if len(keys) == 1:
                return {keys[0]: str(error)}
            first = set(keys[: len(keys) // 2])
            halves = ([e for e in edits if e.public_key in first], [e for e in edits if e.public_key not in first])
            return await self._transact(running, device, halves[0]) | await self._transact(running, device, halves[1])
        return {}


def _peers_by_device(desired: Mapping[Key, Object]) -> dict[str, dict[bytes, WireguardPeer]]:
    peers: dict[str, dict[bytes, WireguardPeer]] = {}
    for item in desired.values():
        if isinstance(item, WireguardPeer):
            peers.setdefault(item.device, {})[item.public_key] = item
    return peers


def _on(item: Object, device: str) -> bool:
    return isinstance(item, (WireguardPeer, WireguardSubnet)) and item.device == device


def _peer_of(item: Object) -> bytes:
    return item.public_key if isinstance(item, (WireguardPeer, WireguardSubnet)) else b""
