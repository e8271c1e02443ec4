"""The cloud's route tables kept by a server, for clients without credentials (`--listen` with `--cloud-routes`).

The same reconciler and driver as on a host (wincey.cloud), with the union of the leases as what is desired: each network's
leases are followed, each asks for its route and for its host's right to forward. Who holds a lease does not matter: hosts with
a store of their own put the same route. Several servers may do the same for one store, and agree.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Awaitable, Callable, Mapping

import msgspec

from wincey.agent.desired import DesiredState
from wincey.agent.once import Once
from wincey.agent.parts import SERVER_QUESTIONS
from wincey.agent.reconciler import Reconciler
from wincey.backends.base import HostFacts
from wincey.backends.catalogue import make
from wincey.backends.cloud import CloudBackend
from wincey.cloud.driver import CloudDriver
from wincey.model.config import NetworkConfig
from wincey.model.errors import BadConfig, BadLease, HistoryLost, NotJoinable, StoreError
from wincey.model.lease import Lease
from wincey.model.networkname import UNNAMED
from wincey.model.state import Scope
from wincey.server.networks import list_networks, network_prefix, watch_networks
from wincey.store.kv import KeyValueStore
from wincey.store.registry import Registry, Snapshot

log = logging.getLogger(__name__)

_SETTINGS = ""  # the owner, in the desired state, of what is no lease's
_NO_HOST = HostFacts(underlay="", mtu=0, local=None, local_v6=None, public=None, public_v6=None)


class CloudTables:
    """Those of all networks of a store. prefix: without a `/` at its end."""

    def __init__(self, store: KeyValueStore, prefix: str, rng: random.Random) -> None:
        self._store, self._prefix, self._rng = store, prefix, rng
        self._keepers: dict[str, _Keeper] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        store.on_outage(self._on_outage)

    async def run(self) -> None:
        """Until cancelled."""
        try:
            self._begin(UNNAMED)
            while True:
                with contextlib.suppress(HistoryLost):
                    try:
                        names, revision = await list_networks(self._store, self._prefix)
                        for name in names:
                            self._begin(name)
                        async for changes in watch_networks(self._store, self._prefix, revision):
                            for change in changes:
                                self._begin(change.name)
                    except StoreError as error:
                        log.debug("the networks can't be listed: %s", error)
                await asyncio.sleep(self._rng.uniform(0.8, 1.2))
        finally:
            for task in self._tasks.values():
                task.cancel()
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def _begin(self, name: str) -> None:
        if name not in self._keepers:
            registry = Registry(self._store, network_prefix(self._prefix, name))
            self._keepers[name] = _Keeper(registry, self._rng)
            self._tasks[name] = asyncio.create_task(self._keepers[name].run())

    def _on_outage(self, reason: str | None) -> None:
        if reason:
            log.warning("the store can't be reached: %s; the cloud's routes stay as they are", reason)
        for keeper in self._keepers.values():
            keeper.follow(current=reason is None)


class _Keeper:
    """The tables of one network, while its config names a backend on a cloud's tables."""

    def __init__(self, registry: Registry, rng: random.Random) -> None:
        self._registry, self._rng, self._once = registry, rng, Once()
        self._backend: CloudBackend | None = None
        self._reconciler = Reconciler(DesiredState(), [CloudDriver(None, rng=rng)])

    def follow(self, *, current: bool) -> None:
        """Whether the leases are known as the store has them."""
        self._reconciler.scope = msgspec.structs.replace(self._reconciler.scope, current=current)

    async def run(self) -> None:
        """Until cancelled."""
        tasks = [asyncio.create_task(self._reconciler.run()), asyncio.create_task(self._follow())]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._reconciler.close()

    async def _follow(self) -> None:
        while True:
            try:
                snapshot = await self._registry.snapshot()
                await self._take_over(snapshot)
                await self._watch(snapshot)
            except HistoryLost:
                continue
            except StoreError as error:
                self._once.warn("store", str(error))
            await asyncio.sleep(self._rng.uniform(0.8, 1.2))

    async def _take_over(self, snapshot: Snapshot) -> None:
        desired = self._reconciler.desired
        try:
            self._backend = await _backend_of(snapshot.config)
        except (BadConfig, NotJoinable) as error:
            self._once.warn(self._registry.config_key, f"{error}; the cloud's routes stay as they are")
            return
        if self._backend is None:
            for owner in list(desired.owners):
                desired.put(owner, ())
        else:
            networks = NetworkConfig.parse(snapshot.config or b"").networks
            self._reconciler.scope = Scope(networks=networks, current=self._reconciler.scope.current)
            for owner in [owner for owner in desired.owners if owner not in snapshot.leases | snapshot.bad]:
                desired.put(owner, ())
            desired.put(_SETTINGS, [self._backend.table(None)])
            for key, lease in snapshot.leases.items():
                self._put(key, lease)
        await self._reconciler.settle()

    async def _watch(self, snapshot: Snapshot) -> None:
        """Take in changes until the config is another one."""
        async for updates in self._registry.watch(snapshot.revision):
            for update in updates:
                if update.what == "config" and update.config != snapshot.config:
                    return
                if update.what != "lease" or update.bad or self._backend is None:
                    continue  # a host whose lease can't be read keeps what it had
                if update.lease:
                    self._put(update.key, update.lease)
                else:
                    self._reconciler.desired.put(update.key, ())
            self._reconciler.apply_soon()

    def _put(self, key: str, lease: Lease) -> None:
        assert self._backend
        try:
            objects = self._backend.client(lease)
        except BadLease as error:
            self._once.warn(key, str(error))
            return
        self._reconciler.desired.put(key, objects)


async def _backend_of(raw: bytes | None) -> CloudBackend | None:
    """The backend that a config names if it is one on a cloud's tables; raises BadConfig, NotJoinable."""
    if raw is None:
        return None
    config = NetworkConfig.parse(raw)
    question: Callable[[], Awaitable[Mapping[str, str]]] | None = SERVER_QUESTIONS.get(config.backend_type)
    if question is None:
        return None
    backend = make(config, msgspec.structs.replace(_NO_HOST, found=await question()))
    return backend if isinstance(backend, CloudBackend) else None
