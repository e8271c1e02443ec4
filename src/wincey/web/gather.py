"""Asks the hosts of a network for what the page shows. Nobody is asked while nobody looks at the page.

Who there is comes from the leases: of the store, or of the local daemon. Each host is then asked through its own API
(--api-listen), a bounded number at once; that of this host through its socket. Status is asked of all at each look, the longer
answers (peers, containers) of a number of hosts in turn and of the one that somebody has selected, so that a look stays cheap
in large networks. What was told stays for as long as the host goes on to answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeVar
from urllib.parse import urlencode

import msgspec

from wincey.http.client import HttpClient, HttpError
from wincey.model.address import format_address
from wincey.model.errors import UNREADABLE, WinceyError
from wincey.model.report import (
    API,
    ContainersReport,
    ErrorReport,
    ExplainReport,
    NetworkReport,
    PeersReport,
    StatusReport,
)
from wincey.store.kv import KeyValueStore
from wincey.store.registry import Registry
from wincey.web.picture import FULL_MESH, Known, Look, Picture, count_peers, draw, rates

T = TypeVar("T")

EVERY = 3.0
"""Seconds that a picture is given again before hosts are asked anew."""

_AT_ONCE = 48
_PATIENCE = 4.0
_LATELY = 60.0


class Missing(WinceyError):
    """A host does not tell; says why."""


class Leases(Protocol):
    """Who there is."""

    source: str

    async def known(self) -> list[Known]: ...

    async def close(self) -> None: ...


class Api:
    """One host's API. url: `https://10.0.0.1:8471`, or `unix:///...` of this one."""

    def __init__(self, url: str, tls: ssl.SSLContext | None = None, token: str = "") -> None:
        self._client = HttpClient(url, tls, keep=2)
        self._headers = {"authorization": f"Bearer {token}"} if token else {}

    async def ask(self, what: str, kind: type[T], **query: str | None) -> T:
        """An answer; raises Missing."""
        given = urlencode({name: value for name, value in query.items() if value})
        target = f"/{API}/{what}?{given}".rstrip("?")
        try:
            answer = await self._client.request("GET", target, headers=self._headers, timeout=_PATIENCE)
        except HttpError as error:
            raise Missing(str(error)) from None
        try:
            if answer.status == 200:
                return msgspec.json.decode(answer.body, type=kind)
            raise Missing(msgspec.json.decode(answer.body, type=ErrorReport).error)
        except UNREADABLE:
            raise Missing(
                f"{self._client.url} answers with HTTP status {answer.status}: is it a flanneld of this version?"
            ) from None

    async def close(self) -> None:
        """End its connections."""
        await self._client.close()


class DaemonLeases:
    """The leases as the local daemon knows them."""

    def __init__(self, api: Api, network: str | None, path: str) -> None:
        self._api, self._network, self.source = api, network, f"the daemon at {path}"

    async def known(self) -> list[Known]:
        """This host's and its peers'; raises Missing."""
        own = chosen(await self._api.ask("status", StatusReport), self._network)
        reports = await self._api.ask("peers", list[PeersReport], network=own.name)
        found = [
            Known(",".join(each.subnets), each.subnets, each.public, each.backend)
            for report in reports
            for each in report.peers
            if each.subnets
        ]
        if own.lease:
            public = own.interface.public if own.interface else []
            found.append(Known(",".join(own.lease.subnets), own.lease.subnets, public, own.backend))
        return found

    async def close(self) -> None:
        """The API is the gatherer's."""


class StoreLeases:
    """The leases in a store."""

    def __init__(self, store: KeyValueStore, prefix: str) -> None:
        self._store, self._registry, self.source = store, Registry(store, prefix), store.name

    async def known(self) -> list[Known]:
        """All that can be read; raises StoreError."""
        snapshot = await self._registry.snapshot()
        return [
            Known(",".join(subnets), subnets, public, lease.attrs.backend_type)
            for lease in snapshot.leases.values()
            for subnets in [[str(each) for each in lease.key.subnets]]
            for public in [[format_address(each) for each in (lease.attrs.public_ip, lease.attrs.public_ipv6) if each]]
        ]

    async def close(self) -> None:
        """Close the store."""
        await self._store.close()


class Gatherer:
    """Makes pictures. api_of: the API of a host by its public address, None where hosts are not to be asked. local: this
    host's own API."""

    def __init__(
        self,
        leases: Leases,
        api_of: Callable[[str], Api] | None,
        local: Api | None,
        *,
        network: str | None = None,
        every: float = EVERY,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._leases, self._api_of, self._local = leases, api_of, local
        self._network, self._every, self._clock = network, every, clock
        self._apis: dict[str, Api] = {}
        self._looks: dict[str, Look] = {}
        self._repairs: dict[str, deque[tuple[float, int]]] = {}
        self._known: list[Known] = []
        self._own = ""
        self._turn = 0
        self._lock = asyncio.Lock()
        self._latest: tuple[float, str, Picture] | None = None

    async def picture(self, watched: str = "") -> Picture:
        """The network as it is now, or was up to EVERY seconds ago. watched: the host that is looked at most closely."""
        async with self._lock:
            now = self._clock()
            if self._latest and now - self._latest[0] < self._every and self._latest[1] in {watched, ""}:
                return self._latest[2]
            notes = []
            try:
                self._known = sorted(await self._leases.known(), key=lambda each: _numeric(each.id))
            except WinceyError as error:
                notes.append(f"who there is can't be read now: {error}")
            await self._look(watched)
            made = draw(
                self._known, self._looks, source=self._leases.source, every=self._every, notes=notes, watched=watched
            )
            self._latest = (self._clock(), watched, made)
            return made

    async def explain(self, start: str, address: str) -> ExplainReport:
        """The way of a packet from a host to an address, as that host tells; raises Missing."""
        known = next((each for each in self._known if each.id == start), None)
        if known is None:
            raise Missing(f"there is no host {start}")
        api = self._api(known)
        look = self._looks.get(start)
        network = look.network.name if look and look.network else self._network
        found = await api.ask("explain", list[ExplainReport], address=address, network=network)
        if not found:
            raise Missing("that host is in no network yet")
        return found[0]

    async def close(self) -> None:
        """End all connections."""
        for api in (*self._apis.values(), self._local):
            if api:
                await api.close()
        await self._leases.close()

    def _api(self, known: Known) -> Api:
        if self._local and known.id == self._own:
            return self._local
        if self._api_of is None:
            raise Missing("hosts are not asked: give wincey web --token-file and --cafile, and flanneld --api-listen")
        if not known.public:
            raise Missing("its lease tells no address")
        address = known.public[0]
        if address not in self._apis:
            self._apis[address] = self._api_of(address)
        return self._apis[address]

    async def _look(self, watched: str) -> None:
        if self._local and not self._own:
            with contextlib.suppress(Missing):
                own = chosen(await self._local.ask("status", StatusReport), self._network)
                self._own = ",".join(own.lease.subnets) if own.lease else ""
        there = {each.id for each in self._known}
        self._looks = {id_: look for id_, look in self._looks.items() if id_ in there}
        in_turn = {each.id for each in (self._known * 2)[self._turn : self._turn + FULL_MESH]}
        self._turn = (self._turn + FULL_MESH) % max(1, len(self._known))
        gate = asyncio.Semaphore(_AT_ONCE)

        async def one(known: Known) -> None:
            async with gate:
                self._looks[known.id] = await self._ask(known, deep=known.id in in_turn or known.id == watched)

        await asyncio.gather(*(one(each) for each in self._known))

    async def _ask(self, known: Known, *, deep: bool) -> Look:
        before = self._looks.get(known.id)
        try:
            api = self._api(known)
            status = await api.ask("status", StatusReport)
            network = chosen(status, self._network)
            at = self._clock()
            look = Look("", at, status, network)
            if before and before.network:
                look.peers, look.containers = before.peers, before.containers
                look.rates = rates(before.network.traffic, network.traffic, at - before.at)
            count_peers(look, before, network.peer_traffic)
            look.repaired = self._lately(known.id, at, network.reconcile.repaired)
            if deep:
                asked: tuple[Awaitable[Any], Awaitable[Any]] = (
                    api.ask("peers", list[PeersReport], network=network.name),
                    api.ask("containers", list[ContainersReport], network=network.name),
                )
                peers, containers = await asyncio.gather(*asked)
                look.peers = [each for report in peers for each in report.peers]
                look.containers = [each for report in containers for each in report.containers]
        except Missing as error:
            return Look(str(error))
        return look

    def _lately(self, id_: str, at: float, repaired: int) -> int:
        """How many more were repaired than a minute ago, or since we look."""
        seen = self._repairs.setdefault(id_, deque())
        if seen and repaired < seen[-1][1]:
            seen.clear()  # its daemon began anew
        seen.append((at, repaired))
        while at - seen[0][0] > _LATELY:
            seen.popleft()
        return repaired - seen[0][1]


def chosen(status: StatusReport, name: str | None) -> NetworkReport:
    """The network of that name, or the first; raises Missing."""
    if found := next((each for each in status.networks if name is None or each.name == name), None):
        return found
    raise Missing(f"{status.host} is in no network{f' {name}' if name else ' yet'}")


def _numeric(text: str) -> list[tuple[int, str]]:
    """Subnets in the order of their addresses."""
    return [(len(part), part) for part in text.replace("/", ".").replace(":", ".").split(".")]
