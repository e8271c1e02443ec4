"""Several networks in one daemon: joined as their configs appear, and left when these are deleted.

Each network is a whole of its own, with its store connection, drivers, state and files, exactly as the only one is: so
nothing that goes wrong in one touches another. What they must agree on is in company.py, and who may reach whom is for the
packet filter (see kernel.rules). A network that can't be joined is tried again for as long as it exists.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from wincey.agent.company import Company
from wincey.agent.identity import this_host
from wincey.agent.life import DaemonOptions, Several, clean_up, live
from wincey.agent.view import Views
from wincey.model.config import NetworkConfig
from wincey.model.errors import BadConfig, HistoryLost, StoreError, WinceyError
from wincey.observe.log import NETWORK
from wincey.store.kv import Entry
from wincey.store.networklist import NetworkList
from wincey.store.open import open_remote_list, open_store

if TYPE_CHECKING:
    from wincey.store.remotelist import RemoteNetworkList

log = logging.getLogger(__name__)


class Networks:
    """The networks of this daemon. `tell(reason)`: None when all that there are can be used, or why not (yet)."""

    def __init__(
        self, options: DaemonOptions, several: Several, tell: Callable[[str | None], None], views: Views
    ) -> None:
        self._options, self._several, self._tell_all, self._views = options, several, tell, views
        self._rng = random.Random()  # noqa: S311  # jitter, no secrets
        self._company = Company()
        self._there: dict[str, Entry] = {}  # the networks in the store that are for us
        self._leave: dict[str, asyncio.Event] = {}  # those we are in, and what makes us leave
        self._reasons: dict[str, str | None] = {}

    async def run(self) -> None:
        """Live until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            networks = await self._open()
            try:
                await self._follow(networks, tasks)
            finally:
                await networks.close()

    async def _open(self) -> NetworkList | RemoteNetworkList:
        """Open the store when it shows which one it is: there is a network in it."""
        if remote := self._options.store.remote:
            me = this_host()
            return open_remote_list(remote, self._several.names, f"{me.name} {me.instance}")
        told = ""
        while True:
            try:
                store = await open_store(self._options.store, self._options.prefix)
                networks = NetworkList(store, self._options.prefix)
                if self._options.store.api != "auto" or self._options.store.store.startswith("sqlite:"):
                    return networks
                found, _ = await networks.read()
                if found:
                    return networks
                await store.close()
                self._tell()
                reason = self._nothing()
            except StoreError as error:
                reason = str(error)
                self._tell_all(reason)
            if reason != told:
                told = reason
                log.warning("%s", reason)
            await asyncio.sleep(self._rng.uniform(0.8, 1.2))

    async def _follow(self, networks: NetworkList | RemoteNetworkList, tasks: asyncio.TaskGroup) -> None:
        first = True
        while True:
            try:
                found, revision = await networks.read()
                if first:
                    first = False
                    await self._clean_up_left(found)
                self._take_all(found, tasks)
                async for changes in networks.watch(revision):
                    for name, entry in changes:
                        self._take(name, entry, tasks)
            except HistoryLost:
                continue
            except StoreError as error:
                log.warning("the list of networks: %s; trying on", error)
                if first:
                    self._tell_all(str(error))
            await asyncio.sleep(self._rng.uniform(0.8, 1.2))

    def _take_all(self, found: dict[str, Entry], tasks: asyncio.TaskGroup) -> None:
        # The config that was written first comes first, so that of two that can't be joined together all hosts choose the
        # same one. Nobody is asked to wait for one that can't be read.
        names = sorted(found, key=lambda name: (found[name].revision, name))
        for name in names:
            if self._is_ours(name) and name not in self._leave:
                with contextlib.suppress(BadConfig):  # its own life tells
                    self._company.take(name, NetworkConfig.parse(found[name].value))
        for name in names:
            self._take(name, found[name], tasks)
        # A store that lost all its keys is no reason to tear down what works.
        for name in [name for name in self._there if name not in found] if found else ():
            self._take(name, None, tasks)
        self._tell()
        if not self._there:
            log.warning("%s", self._nothing())

    def _take(self, name: str, entry: Entry | None, tasks: asyncio.TaskGroup) -> None:
        """A network is there (entry: its config), or its config is gone."""
        if not self._is_ours(name):
            return
        if entry:
            self._there[name] = entry
            if name not in self._leave:
                self._start(name, tasks)
        elif self._several.watch and self._there.pop(name, None) is not None and name in self._leave:
            self._leave[name].set()

    def _is_ours(self, name: str) -> bool:
        return not self._several.names or name in self._several.names

    def _start(self, name: str, tasks: asyncio.TaskGroup) -> None:
        self._leave[name] = asyncio.Event()
        self._reasons[name] = "it is being joined"
        self._tell()
        tasks.create_task(self._belong(name, tasks), name=f"network {name}")

    async def _belong(self, name: str, tasks: asyncio.TaskGroup) -> None:
        """One network from joining to leaving."""
        NETWORK.set(name)
        log.info("joining")
        life = asyncio.create_task(self._live(name))
        leave = asyncio.create_task(self._leave[name].wait())
        try:
            await asyncio.wait({life, leave}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (life, leave):
                task.cancel()
            ended, _ = await asyncio.gather(life, leave, return_exceptions=True)
        if isinstance(ended, Exception):
            raise ended
        log.info("the network's config was deleted: leaving")
        await clean_up(self._subnet_file(name), name)
        self._company.release(name)
        del self._leave[name], self._reasons[name]
        self._tell()
        if name in self._there:  # it came back meanwhile
            self._start(name, tasks)

    async def _live(self, name: str) -> None:
        options = msgspec.structs.replace(
            self._options,
            prefix=f"{self._options.prefix.rstrip('/')}/{name}",
            settings=msgspec.structs.replace(self._options.settings, subnet_file=self._subnet_file(name)),
        )

        def tell(reason: str | None) -> None:
            self._reasons[name] = reason
            self._tell()

        while True:
            try:
                await live(options, tell, self._views, self._company.seat(name))
            except WinceyError as error:
                # The other networks go on, and this one may be joined when something has been put right.
                if str(error) != self._reasons[name]:
                    log.error("%s; trying on", error)
                tell(str(error))
            await asyncio.sleep(self._rng.uniform(4, 6))

    def _subnet_file(self, name: str) -> str:
        return subnet_file(self._several.directory, name)

    def _tell(self) -> None:
        if not self._there and not self._several.watch:
            self._tell_all(self._nothing())
            return
        waiting = [f"network {name}: {reason}" for name, reason in sorted(self._reasons.items()) if reason is not None]
        self._tell_all("; ".join(waiting) or None)

    def _nothing(self) -> str:
        names = ", ".join(self._several.names)
        return (
            f"there is no network{f' of {names}' if names else ''} in the store yet; put a config at"
            f" {self._options.prefix.rstrip('/')}/{self._several.names[0] if names else 'NETWORK'}/config, such as"
            ' {"Network": "10.3.0.0/16", "Backend": {"Type": "vxlan"}}'
        )

    async def _clean_up_left(self, found: dict[str, Entry]) -> None:
        """Remove what earlier runs left of networks that are not for us any more, before others take what these had."""
        for name in states(self._several.directory):
            if not self._is_ours(name) or (found and name not in found and self._several.watch):
                log.info("network %s was left while no daemon ran: cleaning up", name)
                await clean_up(self._subnet_file(name), name)


def subnet_file(directory: str, name: str) -> str:
    """A network's env file."""
    return str(Path(directory) / f"{name}.env")


def states(directory: str) -> list[str]:
    """The networks that there is state of (see statefile), whether they are in the store or not."""
    return sorted(path.parent.name for path in Path(directory).glob("wincey/*/state.json"))


async def clean_up_all(directory: str) -> None:
    """Remove everything of ours of all networks from this host."""
    for name in states(directory):
        await clean_up(subnet_file(directory, name), name)
