"""The simulator's etcd as one of the stores that must all behave alike."""

from __future__ import annotations

import asyncio
import random
import ssl
import sys
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # the simulator is for developers, and in no wheel

from simulator.etcd import Etcd
from simulator.wire import Link, WireClient

from wincey.store.etcd3 import Etcd3Store
from wincey.store.kv import KeyValueStore


class SimulatedEtcdBackend:
    """One member in the test's own event loop."""

    def __init__(self) -> None:
        self._etcd: Etcd | None = None

    @property
    def etcd(self) -> Etcd:
        if self._etcd is None:
            self._loop = asyncio.get_running_loop()
            self._etcd = Etcd(self._loop)
        return self._etcd

    def open(self, *, deadline: float = 10.0) -> KeyValueStore:
        link, member = Link(random.Random(1)), self.etcd.members[0]

        def make(url: str, tls: ssl.SSLContext | None, *, connect_timeout: float) -> WireClient:
            return link.client(member)

        return Etcd3Store(["http://127.0.0.1:2379"], deadline=deadline, make=make)

    def pause(self) -> None:
        self.etcd.members[0].paused = True

    def resume(self) -> None:
        self.etcd.members[0].paused = False

    def crash(self) -> None:
        self._in_loop(self._crash)

    def restart(self) -> None:
        self._in_loop(self._restart)

    def replace(self) -> None:
        self._in_loop(self.etcd.wipe)

    async def forget(self) -> None:
        self.etcd.compact()

    async def put(self, key: str, value: str) -> None:
        self.etcd.put(key, value.encode())

    async def remove(self, key: str) -> None:
        for each in await self.keys(key) if key.endswith("/") else [key]:
            self.etcd.delete(each)

    async def read(self, key: str) -> str:
        return (self.etcd.get(key) or b"").decode()

    async def keys(self, prefix: str) -> list[str]:
        return [key.decode() for key in self.etcd.keys if key.decode().startswith(prefix)]

    def _crash(self) -> None:
        member = self.etcd.members[0]
        member.up = False
        member.cut("the server went away")

    def _restart(self) -> None:
        self.etcd.members[0].up = True
        self.etcd.members[0].catch_up()

    def _in_loop(self, call: Callable[[], None]) -> None:
        """From another thread."""
        done: Future[None] = Future()

        def run() -> None:
            call()
            done.set_result(None)

        self._loop.call_soon_threadsafe(run)
        done.result(10)
