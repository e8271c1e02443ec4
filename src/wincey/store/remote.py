"""A network's leases through servers that speak flannel 0.5's HTTP API: ours, or flannel's 0.5 to 0.7.

The servers serve one store, so a cursor of one is good at the next, and every call and the watch go to whichever answers.
A flannel server tells changes one at a time, gives no revisions, chooses the subnet by itself and knows nothing of claims;
what ours does more it learns from headers (model.remote_api), so there is one client for both.

Neither kind lets a config be watched. Ours marks the answer to a poll; besides, it is read again each minute.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator

import msgspec

from wincey.http.client import HttpClient, Response
from wincey.model import remote_api as wire
from wincey.model.address import format_address
from wincey.model.errors import (
    BadLease,
    HistoryLost,
    KeyConflict,
    StoreError,
    StoreUnavailable,
)
from wincey.model.lease import Lease, LeaseAttrs, LeaseKey
from wincey.model.networkname import UNNAMED
from wincey.store.endpoints import NoSuchApi
from wincey.store.kv import KeyValueStore, OutageCallback
from wincey.store.registry import Snapshot, Update
from wincey.store.servers import Missing, Servers

log = logging.getLogger(__name__)

_POLL = 86_400.0  # seconds: a poll waits for as long as nothing happens


class RemoteRegistry:
    """One network behind servers. network: its name, `_` without one. look: seconds between looks at the config."""

    claims: KeyValueStore | None = None  # the server sees to them

    def __init__(self, servers: Servers, network: str = UNNAMED, *, look: float = 60.0) -> None:
        self._servers, self._endpoints, self._look = servers, servers.endpoints, look
        self._base = f"/v1/{network}"
        self._address = ""
        self._config: bytes | None = None
        self._keeps_cloud = False

    @property
    def keeps_cloud(self) -> bool:
        """Whether the server keeps the cloud's route tables for its clients; known once the config was read."""
        return self._keeps_cloud

    @property
    def name(self) -> str:
        """What logs call it."""
        return f"server {self._endpoints}"

    @property
    def config_key(self) -> str:
        """Where the config is read."""
        return f"{self._base}/config of {self._endpoints}"

    def lease_key(self, key: LeaseKey) -> str:
        """The path of a lease."""
        return f"{self._base}/leases/{key}"

    def claim_key(self, identity: str) -> str:
        """A name for a host's claim, which the server keeps."""
        return f"{self._base}/hosts/{identity}"

    def on_outage(self, callback: OutageCallback) -> None:
        """Have it called when the watch loses all servers, and when one is back."""
        self._endpoints.outage = callback

    async def close(self) -> None:
        """End all connections."""
        await self._servers.close()

    async def config(self) -> bytes | None:
        """The config with its defaults filled in, None when nobody has put one."""
        return await self._endpoints.call(lambda client, _: self._read_config(client))

    async def snapshot(self) -> Snapshot:
        """Everything as it is now; watch from its revision."""

        async def attempt(client: HttpClient, _uncertain: bool) -> Snapshot:
            config = await self._read_config(client)
            watched = await self._read_leases(client, "/leases")
            leases = {self.lease_key(lease.key): lease for lease in watched.snapshot}
            return Snapshot(config, leases, {}, {}, watched.cursor)

        snapshot = await self._endpoints.call(attempt)
        self._config = snapshot.config
        return snapshot

    async def watch(self, after: int) -> AsyncIterator[list[Update]]:
        """Changes after a snapshot's revision, over failovers, for ever. Raises HistoryLost: take a new snapshot."""
        cursor = [after]
        async for updates in self._endpoints.follow(lambda client: self._follow(client, cursor)):
            yield updates

    async def create(self, key: LeaseKey, attrs: LeaseAttrs) -> Lease:
        """Take a lease, on that subnet if the server can and will; raises OutOfSubnets, DuplicateHost."""
        self._live_at(key, attrs)
        body = wire.encode_attrs(attrs)
        return await self._send("POST", "/leases", body, {wire.WISH: str(key)}, attrs)

    async def update(self, lease: Lease, attrs: LeaseAttrs) -> Lease:
        """Renew it and publish new attributes. Raises KeyConflict when it is another host's by now, DuplicateHost."""
        self._live_at(lease.key, attrs)
        formerly = wire.owner(lease.key, lease.attrs)
        headers = {wire.FORMERLY: format_address(formerly)} if formerly else {}
        body = wire.encode_lease(msgspec.structs.replace(lease, attrs=attrs), wire.ZERO_TIME)
        renewed = await self._send("PUT", f"/leases/{lease.key}", body, headers, attrs)
        return msgspec.structs.replace(renewed, revision=lease.revision)

    async def renew(self, lease: Lease) -> Lease:
        """Start its time limit anew; raises as update."""
        return await self.update(lease, lease.attrs)

    async def time_left(self, lease: Lease) -> float | None:
        """Seconds until it expires by this host's clock; None for a reservation. Raises KeyConflict when it is gone, or
        another host's: a flannel server would let us overwrite that."""

        async def attempt(client: HttpClient, _uncertain: bool) -> tuple[Lease, float | None]:
            return await self._read_lease(client, lease.key)

        found, expiration = await self._endpoints.call(attempt)
        if wire.owner(found.key, found.attrs) != wire.owner(lease.key, lease.attrs):
            raise KeyConflict(f"the lease {lease.key} is another host's by now")
        return None if expiration is None else expiration - time.time()

    async def release(self, lease: Lease) -> bool:
        """Give it back; False when it was gone, or the server (flannel before 0.5.6) can't."""
        try:
            await self._servers.call("DELETE", f"{self._base}/leases/{lease.key}")
        except (Missing, NoSuchApi):
            return False
        return True

    def _live_at(self, key: LeaseKey, attrs: LeaseAttrs) -> None:
        address = wire.owner(key, attrs)
        self._address = format_address(address) if address else ""

    async def _send(self, method: str, path: str, body: bytes, headers: dict[str, str], attrs: LeaseAttrs) -> Lease:
        response = await self._servers.call(
            method, self._base + path, body, {"content-type": "application/json", **headers}
        )
        try:
            lease, _ = wire.decode_lease(response.body)
        except BadLease as error:
            raise StoreError(f"{method} {self._base}{path}: {error}") from None
        # A flannel server answers with what it has stored, which may be written otherwise than what we sent.
        return msgspec.structs.replace(lease, attrs=attrs)

    async def _read_config(self, client: HttpClient) -> bytes | None:
        try:
            response = await self._servers.exchange(client, "GET", f"{self._base}/config")
            self._keeps_cloud = response.headers.get(wire.CLOUD) == wire.KEPT
            return response.body
        except Missing:
            return None

    async def _read_leases(self, client: HttpClient, path: str) -> wire.Watched:
        return _watched(client, await self._servers.exchange(client, "GET", self._base + path))

    async def _read_lease(self, client: HttpClient, key: LeaseKey) -> tuple[Lease, float | None]:
        try:
            response = await self._servers.exchange(client, "GET", f"{self._base}/leases/{key}")
        except NoSuchApi:  # flannel before 0.5.6
            response = await self._servers.exchange(client, "GET", f"{self._base}/leases")
        for lease, expiration in wire.decode_expirations(response.body):
            if lease.key == key:
                return lease, expiration
        raise Missing(f"{client.url}: the lease {key} is gone")

    async def _follow(self, client: HttpClient, cursor: list[int]) -> AsyncGenerator[list[Update], None]:
        yield await self._look_at_config(client)  # that it answers shows that we are connected
        while True:
            headers = {wire.ADDRESS: self._address} if self._address else None
            poll = asyncio.create_task(
                self._servers.exchange(
                    client, "GET", f"{self._base}/leases?next={cursor[0]}", headers=headers, timeout=_POLL
                )
            )
            try:
                # The poll is never given up for a look: flannel's server would keep it.
                while not (await asyncio.wait({poll}, timeout=self._look * (0.75 + self._endpoints.random() / 2)))[0]:
                    if updates := await self._look_at_config(client):
                        yield updates
                response = poll.result()
            finally:
                poll.cancel()
                await asyncio.gather(poll, return_exceptions=True)
            watched = _watched(client, response)
            if watched.changes is None:
                raise HistoryLost(f"{client.url} has no record of what came after {cursor[0]}")
            cursor[0] = watched.cursor
            updates = [
                Update(self.lease_key(change.key), "lease", lease=change.lease, revision=watched.cursor)
                for change in watched.changes
            ]
            if response.headers.get(wire.CONFIG):
                updates += await self._look_at_config(client)
            if updates:
                yield updates

    async def _look_at_config(self, client: HttpClient) -> list[Update]:
        config = await self._read_config(client)
        if config == self._config:
            return []
        self._config = config
        return [Update(self.config_key, "config", config=config)]


def _watched(client: HttpClient, response: Response) -> wire.Watched:
    try:
        watched = wire.decode_watched(response.body)
    except ValueError as error:
        raise StoreUnavailable(f"{client.url}: {error}") from None
    for reason in watched.bad:
        log.warning("%s: a lease can't be read, and is passed over: %s", client.url, reason)
    return watched
