"""Whether all is as wanted again: the daemons' own word for it, and a new lease that reaches each of them.

A daemon is asked over its local API: nothing is in its way, the store answers, nothing failed, and what should be does not
differ from what is (`wincey diff`). A host that has stopped to follow the store would pass all of these. So a lease is put
into the store as a host would that joins; each daemon has to know it.
"""

from __future__ import annotations

import asyncio
import base64
import secrets
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import msgspec

from wincey.http.client import HttpClient, HttpError
from wincey.lab.chaos.world import World
from wincey.lab.namespace import call_in
from wincey.lab.node import Host
from wincey.model.errors import StoreError
from wincey.model.lease import LeaseAttrs, LeaseKey
from wincey.model.report import API, DifferenceReport, StatusReport
from wincey.model.socketpath import of_subnet_file
from wincey.store.registry import Registry

T = TypeVar("T")

_PATIENCE = 2.0  # seconds for a daemon's answer
_PAUSE = 0.03


class Healing:
    """Looks at a world. `expected`: how many peers each host has to know. tend: called now and then while waiting."""

    def __init__(self, world: World, tend: Callable[[], None]) -> None:
        self.world = world
        self.expected = len(world.machines) - 1
        self._tend = tend

    def healthy(self, end: float) -> str:
        """Until all is as wanted, at most until `end` of the monotonic clock: why it is not, "" when it is."""
        return self._until(end, thorough=True)

    def healed(self, end: float) -> str:
        """The same, and a new lease has reached every host besides."""
        return self._new_lease(end) or self._until(end, thorough=True)

    def followed(self, end: float) -> str:
        """Until a new lease has reached every host, whatever else is wrong."""
        return self._new_lease(end) or self._until(end, thorough=False)

    def _until(self, end: float, *, thorough: bool) -> str:
        while True:
            self._tend()
            # In a thread of its own, as an interruption of the main one would end the event loop in the middle of a task.
            why = call_in(self.world.store.netns, partial(self._look, thorough=thorough))
            if not why or time.monotonic() > end:
                return why
            time.sleep(_PAUSE)

    def _new_lease(self, end: float) -> str:
        """Put a lease as of a new host into the store; why that could not be done until `end`, "" when it was."""
        while True:
            self._tend()
            try:
                self.world.store.run(self._join)
                self.expected += 1
                return ""
            except StoreError as error:
                if time.monotonic() > end:
                    return f"the store takes no lease: {error}"
                time.sleep(_PAUSE)

    async def _join(self, registry: Registry) -> None:
        """One like the first host's, but for its address and what only one host may publish."""
        snapshot = await registry.snapshot()
        taken = {str(lease.key) for lease in snapshot.leases.values()}
        number = next(each for each in range(200, 250) if f"10.5.{each}.0-24" not in taken)
        key = LeaseKey.parse(f"10.5.{number}.0-24")
        model = next(iter(snapshot.leases.values())).attrs
        attrs = LeaseAttrs.decode(_like(model.encode(etcd_v2=False), number))
        await registry.create(key, attrs)

    def _look(self, *, thorough: bool) -> str:
        """What is not as wanted, of the first host where something is not; "" if all is."""

        async def ask() -> list[str]:
            return await asyncio.gather(*(self._wrong_of(host, thorough=thorough) for host in self.world.machines))

        return next((why for why in asyncio.run(ask()) if why), "")

    async def _wrong_of(self, host: Host, *, thorough: bool) -> str:
        if not host.running:
            said = "".join(host.log(1)) or "nothing"
            return f"the daemon of {host.name} does not run; it said at last: {said}"
        client = HttpClient(f"unix://{of_subnet_file(str(host.subnet_file))}")
        try:
            why = await self._asked(client, thorough=thorough)
        except (HttpError, TimeoutError) as error:
            why = f"does not answer: {error or 'silence'}"
        except msgspec.MsgspecError as error:
            why = f"answers with something else: {error}"
        finally:
            await client.close()
        return why and f"{host.name} {why}"

    async def _asked(self, client: HttpClient, *, thorough: bool) -> str:
        status = await _get(client, "status", StatusReport)
        network = status.networks[0]
        if network.peers != self.expected:
            return f"knows {network.peers} peers, not {self.expected}"
        if not thorough:
            return ""
        if why := network.trouble or network.store.trouble:
            return f"says: {why}"
        if network.reconcile.failures:
            failure = network.reconcile.failures[0]
            return f"could not make {failure.what}: {failure.reason}"
        for each in await _get(client, "diff", list[DifferenceReport]):
            if different := [*each.missing, *each.changed, *each.surplus]:
                return f"differs in {len(different)} objects: {different[0]}"
        return ""


async def _get(client: HttpClient, what: str, kind: type[T]) -> T:
    answer = await client.request("GET", f"/{API}/{what}", timeout=_PATIENCE)
    return msgspec.json.decode(answer.body, type=kind)


def _like(value: bytes, number: int) -> bytes:
    """A lease's value with another address, and another MAC address or key where it has one."""
    document = msgspec.json.decode(value)
    document["PublicIP"] = f"10.99.0.{number}"
    data = document.get("BackendData") or {}
    if "VtepMAC" in data:
        data["VtepMAC"] = f"02:00:00:00:01:{number:02x}"
    if "PublicKey" in data:
        data["PublicKey"] = base64.b64encode(secrets.token_bytes(32)).decode()
    return msgspec.json.encode(document)
