"""The store of a lab: one SQLite file that all daemons share, or a real etcd server in a namespace of its own."""

from __future__ import annotations

import asyncio
import http.client
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

from wincey.lab.errors import LabError, NotReady
from wincey.lab.namespace import call_in
from wincey.lab.plan import STORE, LabSpec
from wincey.lab.process import Process, tail, wait_for
from wincey.store.open import StoreOptions, open_store
from wincey.store.registry import Registry

T = TypeVar("T")

_LOG_LINES = 8


class LabStore:
    """Starts, stops and writes to a lab's store."""

    def __init__(self, spec: LabSpec, directory: Path) -> None:
        self.spec = spec
        self.directory = directory
        self.netns = spec.netns(STORE)
        self.log_path = directory / "store.log"
        self._pidfile = directory / "store.pid"
        self._process = Process.find(self._pidfile)

    @property
    def sqlite_path(self) -> Path:
        """The file of an SQLite store."""
        return self.directory / "store.sqlite"

    @property
    def url(self) -> str:
        """What `--store` and `wincey config --store` call it; hosts of the lab reach it there."""
        return f"sqlite:{self.sqlite_path}" if self.spec.store == "sqlite" else self.spec.etcd_endpoint

    @property
    def running(self) -> bool:
        """Whether it can be reached; a file always can."""
        return self.spec.store == "sqlite" or bool(self._process and self._process.alive)

    def start(self, *, timeout: float = 20) -> None:
        """Start the server (again, with what it held) and wait until it answers; raises NotReady."""
        if self.running:
            return
        self._process = Process.spawn(self._argv(), netns=self.netns, log=self.log_path, pidfile=self._pidfile)
        if not wait_for(lambda: not self.running or self._healthy(), timeout) or not self.running:
            why = f"did not answer within {timeout:.0f} s" if self.running else "ended"
            raise NotReady("\n  ".join([f"etcd at {self.spec.etcd_endpoint} {why}:", *tail(self.log_path, _LOG_LINES)]))

    def stop(self) -> None:
        """Stop the server, as an outage; its data stays. An SQLite file can't be stopped (raises LabError)."""
        if self.spec.store == "sqlite":
            raise LabError("an SQLite store has no server to stop: use --store etcd3 to see an outage")
        if self._process:
            self._process.stop()

    def reap(self) -> None:
        """Leave no zombie behind after the namespaces were removed."""
        if self._process:
            self._process.reap()

    def put_config(self, text: str) -> None:
        """Write the network config, whatever was there; raises StoreError."""
        self.run(lambda registry: registry.put_config(text.encode()))

    def run(self, action: Callable[[Registry], Awaitable[T]]) -> T:
        """Run `await action(registry)` from where the store can be reached, and give its result; raises StoreError."""

        async def work() -> T:
            store = await open_store(self._options(), self.spec.prefix)
            try:
                return await action(Registry(store, self.spec.prefix))
            finally:
                await store.close()

        # In a thread of its own, as the caller may have an event loop, and in the store's namespace, as etcd is there.
        return call_in(self.netns, lambda: asyncio.run(work()))

    def _options(self) -> StoreOptions:
        if self.spec.store == "sqlite":
            return StoreOptions(store=self.url)
        return StoreOptions(endpoints=[self.url], api="v2" if self.spec.store == "etcd2" else "v3")

    def _argv(self) -> list[str]:
        url = self.spec.etcd_endpoint
        peer = "http://127.0.0.1:2380"
        return [
            "etcd",
            f"--name={self.netns}",
            f"--data-dir={self.directory / 'etcd'}",
            f"--listen-client-urls={url}",
            f"--advertise-client-urls={url}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster={self.netns}={peer}",
            "--log-level=warn",
            "--logger=zap",
            "--unsafe-no-fsync",  # the data need not survive a power cut
            *(["--enable-v2"] if self.spec.store == "etcd2" else []),
        ]

    def _healthy(self) -> bool:
        def ask() -> bool:
            connection = http.client.HTTPConnection(self.spec.etcd_endpoint.removeprefix("http://"), timeout=1)
            try:
                connection.request("GET", "/health")
                return b"true" in connection.getresponse().read(200)
            except OSError:
                return False
            finally:
                connection.close()

        return call_in(self.netns, ask)
