"""Which networks there are behind servers, as networklist tells it of a store (compatibility reference, 5.2 and 5.4)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence

from wincey.http.client import HttpClient
from wincey.model import remote_api as wire
from wincey.model.errors import HistoryLost, StoreUnavailable
from wincey.store.endpoints import NoSuchApi, jitter
from wincey.store.kv import Entry
from wincey.store.servers import Missing, Servers

_POLL = 86_400.0  # seconds
_AGAIN = 30.0  # seconds between looks at a server that can't be watched


class RemoteNetworkList:
    """names: those to look for where a server (flannel before 0.5.6) can't list them."""

    def __init__(self, servers: Servers, names: Sequence[str]) -> None:
        self._servers, self._names = servers, names
        self._watchable = True

    async def read(self) -> tuple[dict[str, Entry], int]:
        """All there are, each with its config, and the cursor to watch from."""
        try:
            response = await self._servers.call("GET", "/v1/")
            names, cursor = wire.decode_networks(response.body)
            self._watchable = True
        except NoSuchApi:
            names, cursor = list(self._names), 0
            self._watchable = False
        except ValueError as error:
            raise StoreUnavailable(f"{self._servers}: {error}") from None
        entries = {name: await self._entry(name) for name in names}
        return {name: entry for name, entry in entries.items() if entry}, cursor

    async def watch(self, after: int) -> AsyncIterator[list[tuple[str, Entry | None]]]:
        """Networks that came (with their config) and went (None). Raises HistoryLost: read again."""
        if self._watchable:
            cursor = [after]
            async for changes in self._servers.endpoints.follow(lambda client: self._follow(client, cursor)):
                yield changes
        await asyncio.sleep(_AGAIN * (0.75 + jitter() / 2))
        raise HistoryLost("a server that can't tell of networks is asked again")

    async def close(self) -> None:
        """End all connections."""
        await self._servers.close()

    async def _follow(
        self, client: HttpClient, cursor: list[int]
    ) -> AsyncGenerator[list[tuple[str, Entry | None]], None]:
        await self._servers.exchange(client, "GET", "/v1/")
        yield []  # it answers: we are connected
        while True:
            response = await self._servers.exchange(client, "GET", f"/v1/?next={cursor[0]}", timeout=_POLL)
            try:
                changes, cursor[0] = wire.decode_network_changes(response.body)
            except ValueError as error:
                raise StoreUnavailable(f"{client.url}: {error}") from None
            if changes is None:
                raise HistoryLost("the servers' list of networks has to be read again")
            yield [(name, await self._entry(name) if there else None) for name, there in changes]

    async def _entry(self, name: str) -> Entry | None:
        try:
            response = await self._servers.call("GET", f"/v1/{name}/config")
        except Missing:
            return None
        return Entry(f"/v1/{name}/config", response.body, 0, 0, permanent=True)
