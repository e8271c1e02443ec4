"""The reconciler's driver for Tunnel and TunnelPeer: what keepers do, compared with what they should.

There is one keeper for each device, found by the control socket in the state directory. The connection to it stays open:
its end is how a keeper's death, or its device's, is noticed at once. Nothing here is needed for packets to flow.

A keeper of another release is replaced when it is observed and still wanted: the new one takes over device, socket, peers
and counters, and nothing about the state of the host changes by it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import msgspec

from wincey.model.address import Subnet, format_address, parse_address
from wincey.model.state import Changes, Failure, Key, Object, Scope, Tunnel, TunnelPeer
from wincey.tunnel.client import KeeperConnection, TunnelError, launch
from wincey.tunnel.control import BUILD, PEER, Header, control_name
from wincey.tunnel.device import remove_leftover

log = logging.getLogger(__name__)

_REMOVED = bytes(4)
_ANYTHING = Subnet(bytes(4), 0)


class TunnelDriver:
    """Keeps the udp tunnels of this host's network namespace.

    directory: where control sockets lie, made if absent; the same one at every start, for that is how a running tunnel is
    found again. Only tunnels that are desired, or whose device is in the scope, are looked for. farewell: the command that a
    keeper runs, where its device outlives it, when it ends by itself.
    """

    handles: tuple[type[Object], ...] = (Tunnel, TunnelPeer)

    def __init__(self, directory: Path, farewell: Sequence[str] = ()) -> None:
        self._directory, self._farewell = directory, list(farewell)
        self._connections: dict[str, KeeperConnection] = {}
        self._shown: dict[str, Header] = {}
        self._asking: asyncio.Task[None] | None = None
        self._changed: Callable[[str], None] = lambda why: None
        self._lock = asyncio.Lock()

    async def observe(self, desired: Mapping[Key, Object], scope: Scope) -> dict[Key, Object]:
        """The running tunnels and their peers. A tunnel that is wanted but of no use as it is is not reported."""
        wanted = {thing.device for thing in desired.values() if isinstance(thing, Tunnel)}
        found: dict[Key, Object] = {}
        async with self._lock:
            for device in sorted(wanted | set(scope.devices)):
                try:
                    state = await self._state(device, wanted=device in wanted)
                except TunnelError as error:
                    log.warning("%s: %s", device, error)
                    continue
                if state:
                    for thing in _objects(device, *state):
                        found[thing.key] = thing
        return found

    async def apply(self, changes: Changes) -> Sequence[Failure]:
        """End tunnels to delete, start or change tunnels to put, and change the peers of each by one message."""
        unusable: dict[str, str] = {}
        gone = {thing.device for thing in changes.delete if isinstance(thing, Tunnel)}
        async with self._lock:
            failures = [
                Failure(thing, reason)
                for thing in changes.delete
                if isinstance(thing, Tunnel) and (reason := await _attempt(self._stop(thing.device)))
            ]
            for thing in changes.put:
                if isinstance(thing, Tunnel) and (reason := await _attempt(self._start(thing))):
                    failures.append(Failure(thing, reason))
                    unusable[thing.device] = reason
            failures += [
                Failure(thing, "the udp tunnel carries IPv4 over IPv4 only")
                for thing in changes.put
                if isinstance(thing, TunnelPeer) and not _is_ipv4(thing)
            ]
            for device, peers in _by_device(changes, gone).items():
                reason = unusable.get(device) or await _attempt(self._change_peers(device, peers))
                if reason:
                    failures += [Failure(peer, reason) for peer, _ in peers]
        return failures

    def watch(self, changed: Callable[[str], None]) -> None:
        """Call `changed` when a tunnel that was observed or applied has ended without our doing."""
        self._changed = changed

    async def close(self) -> None:
        """Leave the keepers to themselves: they go on."""
        if self._asking:
            self._asking.cancel()
            await asyncio.wait([self._asking])
        async with self._lock:
            connections, self._connections = self._connections, {}
            for connection in connections.values():
                await connection.close()

    def latest(self) -> Mapping[str, object]:
        """What a keeper has shown last (see control), of its engine and counters too; asks it anew for the next time."""
        if self._asking is None or self._asking.done():
            self._asking = asyncio.get_running_loop().create_task(self._ask_all())
        return next(iter(self._shown.values()), {})

    async def _ask_all(self) -> None:
        async with self._lock:
            for device, connection in self._connections.items():
                with suppress(TunnelError):
                    self._shown[device], _ = await connection.ask({"do": "show"})

    async def counters(self, device: str) -> dict[str, int] | None:
        """Packets, bytes and drops by direction and reason since the tunnel was first started; None when it is not there.

        Raises TunnelError when it does not answer.
        """
        async with self._lock:
            connection = await self._reach(device)
            if connection is None:
                return None
            counters = (await connection.ask({"do": "show"}))[0]["counters"]
            assert isinstance(counters, dict)
            return counters

    async def _reach(self, device: str) -> KeeperConnection | None:
        """The connection to a device's keeper, None when there is no keeper. Raises TunnelError."""
        connection = self._connections.get(device)
        if connection is None:
            path = self._path(device)
            connection = await KeeperConnection.open(path, partial(self._ended, device))
            if connection:
                self._connections[device] = connection
        return connection

    async def _leave(self, device: str) -> None:
        self._shown.pop(device, None)
        if connection := self._connections.pop(device, None):
            await connection.close()

    async def _state(self, device: str, *, wanted: bool) -> tuple[Header, bytes] | None:
        """What a keeper shows; None when there is none, or when it is wanted and must be started anew."""
        connection = await self._reach(device)
        if connection is None:
            if not wanted:
                self._path(device).unlink(missing_ok=True)  # of a keeper that was killed; nobody listens there any more
                remove_leftover(device)
            return None
        state, records = await connection.ask({"do": "show", "peers": True})
        if state.get("why") and state["why"] != self._shown.get(device, {}).get("why"):
            log.info("%s: engine %s %s of the udp tunnel (%s)", device, state["engine"], state["core"], state["why"])
        self._shown[device] = state
        if wanted and state["build"] != BUILD:
            log.info("%s: the udp tunnel of build %s hands over to build %s", device, state["build"], BUILD)
            await self._leave(device)
            await launch(self._path(device))
            return await self._state(device, wanted=False)
        # A device that was renamed or moved by hand is not the one that is wanted.
        return (state, records) if state["device"] == device or not wanted else None

    async def _start(self, tunnel: Tunnel) -> None:
        """Have a tunnel run as given, by changing the running one where that does."""
        local = format_address(tunnel.local)
        connection = await self._reach(tunnel.device)
        if connection:
            state, _ = await connection.ask({"do": "show"})
            if state["build"] == BUILD and state["device"] == tunnel.device:
                await connection.ask(_settings(tunnel, self._farewell))
                return
            await self._stop(tunnel.device)
        self._directory.mkdir(parents=True, exist_ok=True)
        await launch(self._path(tunnel.device), tunnel.device, tunnel.mtu, local, tunnel.port, tunnel.engine)
        if connection := await self._reach(tunnel.device):
            await connection.ask(_settings(tunnel, self._farewell))

    async def _stop(self, device: str) -> None:
        if connection := await self._reach(device):
            del self._connections[device]  # its end is our doing
            self._shown.pop(device, None)
            try:
                await connection.ask({"do": "stop"})
            finally:
                await connection.close()

    async def _change_peers(self, device: str, peers: list[tuple[TunnelPeer, bytes]]) -> None:
        connection = await self._reach(device)
        if connection:
            records = b"".join(
                [PEER.pack(peer.subnet.address, peer.subnet.length, endpoint) for peer, endpoint in peers]
            )
            await connection.ask({"do": "peers"}, records)
        elif any(endpoint != _REMOVED for _, endpoint in peers):
            raise TunnelError(f"the udp tunnel {device} does not run")

    def _ended(self, device: str, connection: KeeperConnection) -> None:
        if self._connections.get(device) is connection:
            del self._connections[device]
            self._changed(f"the udp tunnel {device} ended")

    def _path(self, device: str) -> Path:
        return self._directory / control_name(device)


async def _attempt(step: Awaitable[None]) -> str:
    """Why a step failed, "" if it did not."""
    try:
        await step
    except TunnelError as error:
        return str(error)
    except OSError as error:
        return f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")
    return ""


def _by_device(changes: Changes, gone: set[str]) -> dict[str, list[tuple[TunnelPeer, bytes]]]:
    """The peers of each device with the endpoint to give to each, deletions first. Those of ended tunnels went with them."""
    peers: dict[str, list[tuple[TunnelPeer, bytes]]] = defaultdict(list)
    for thing in changes.delete:
        if isinstance(thing, TunnelPeer) and thing.device not in gone:
            peers[thing.device].append((thing, _REMOVED))
    for thing in changes.put:
        if isinstance(thing, TunnelPeer) and _is_ipv4(thing):
            peers[thing.device].append((thing, thing.endpoint))
    return peers


def _is_ipv4(peer: TunnelPeer) -> bool:
    return len(peer.subnet.address) == len(peer.endpoint) == 4


def _settings(tunnel: Tunnel, farewell: list[str]) -> Header:
    """The request that makes a keeper's tunnel like that."""
    return {
        "do": "configure",
        "mtu": tunnel.mtu,
        "local": format_address(tunnel.local),
        "port": tunnel.port,
        "engine": tunnel.engine,
        "check": tunnel.check,
        "network": str(tunnel.network or _ANYTHING),
        "lasts": tunnel.lasts,
        "farewell": farewell if tunnel.lasts else [],
    }


def _objects(device: str, state: Header, records: bytes) -> list[Tunnel | TunnelPeer]:
    network = Subnet.parse(str(state.get("network", _ANYTHING)))
    fields = {
        "device": device,
        "mtu": state["mtu"],
        "local": parse_address(str(state["local"])),
        "port": state["port"],
        "engine": state.get("wanted", "plain"),  # of a keeper that has not told, as all of earlier releases
        "check": state.get("check", "off"),
        "network": None if network == _ANYTHING else network,
        "lasts": state.get("lasts", False),
    }
    return [
        msgspec.convert(fields, Tunnel),
        *(
            TunnelPeer(device, Subnet(address, length), endpoint)
            for address, length, endpoint in PEER.iter_unpack(records)
        ),
    ]
