"""The stores that must all behave alike, each with what a test can do to it from outside."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Protocol

from support.etcd import EtcdServer
from wincey.store import sqlite_tables
from wincey.store.etcd2 import Etcd2Store
from wincey.store.etcd3 import Etcd3Store
from wincey.store.kv import Change, KeyValueStore
from wincey.store.sqlite import SqliteStore


class Backend(Protocol):
    """Something that stores of one kind are opened on."""

    def open(self, *, deadline: float = 10.0) -> KeyValueStore:
        """Another store on it, as another daemon would have. deadline: seconds that each call has."""

    def pause(self) -> None:
        """Make it answer nothing, without an end to connections."""

    def resume(self) -> None:
        """Undo `pause`."""

    def crash(self) -> None:
        """Take it away at once."""

    def restart(self) -> None:
        """Bring it back with all data."""

    def replace(self) -> None:
        """Put one without any data in its place."""

    async def forget(self) -> None:
        """Make it lose the changes of the past, not the keys."""

    async def put(self, key: str, value: str) -> None:
        """Put a key as a user does by hand, without a time limit."""

    async def remove(self, key: str) -> None:
        """Delete a key, or with a `/` at its end all below it, as a user does."""

    async def read(self, key: str) -> str:
        """The value as a user sees it."""

    async def keys(self, prefix: str) -> list[str]:
        """The keys below a prefix as a user sees them."""


class EtcdBackend:
    """An etcd server, spoken to through one of its two interfaces."""

    def __init__(self, server: EtcdServer, api: int) -> None:
        self.server = server
        self._api = api
        self.pause = server.pause
        self.resume = server.resume
        self.crash = server.kill
        self.restart = server.start

    def open(self, *, deadline: float = 10.0) -> KeyValueStore:
        kind = Etcd3Store if self._api == 3 else Etcd2Store
        return kind([self.server.url], deadline=deadline)

    def replace(self) -> None:
        self.server.kill()
        self.server.wipe()
        self.server.start()

    async def forget(self) -> None:
        if self._api == 3:
            store = self.open()
            revision = (await store.read_all("/")).revision
            await store.close()
            await asyncio.to_thread(self.server.ctl, "compact", str(revision))
        else:
            await asyncio.to_thread(self._overflow)

    async def put(self, key: str, value: str) -> None:
        await self._ctl("put" if self._api == 3 else "set", key, value)

    async def remove(self, key: str) -> None:
        command, all_below = ("del", "--prefix") if self._api == 3 else ("rm", "--recursive")
        await self._ctl(command, *([all_below] if key.endswith("/") else []), key)

    async def read(self, key: str) -> str:
        only_value = ["--print-value-only"] if self._api == 3 else []
        return (await self._ctl("get", *only_value, key)).removesuffix("\n")

    async def keys(self, prefix: str) -> list[str]:
        command = ["get", "--prefix", "--keys-only"] if self._api == 3 else ["ls", "--recursive", "-p"]
        lines = (await self._ctl(*command, prefix)).splitlines()
        return [line for line in lines if line and not line.endswith("/")]

    async def _ctl(self, *arguments: str) -> str:
        return await asyncio.to_thread(functools.partial(self.server.ctl, *arguments, api=self._api))

    def _overflow(self) -> None:
        for _ in range(1050):  # etcd v2 keeps 1000 events
            self.server.http("PUT", "/v2/keys/overflow?value=x")


class SqliteBackend:
    """A file. It has no server, so what takes it away is another process that has it locked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._locker: subprocess.Popen[bytes] | None = None

    def open(self, *, deadline: float = 10.0) -> KeyValueStore:
        return SqliteStore(str(self.path), deadline=deadline)

    def pause(self) -> None:
        # As a process stopped amidst the recovery of the WAL: its index begun anew, all eight of its locks held
        # (https://sqlite.org/walformat.html). Who reads or writes has to wait until that process ends.
        program = (
            "import fcntl, sys, time\n"
            "file = open(sys.argv[1], 'r+b', buffering=0)\n"
            "fcntl.lockf(file, fcntl.LOCK_EX, 8, 120)\n"
            "file.write(bytes(136))\n"
            "print('locked', flush=True)\n"
            "time.sleep(600)\n"
        )
        self._locker = subprocess.Popen([sys.executable, "-c", program, f"{self.path}-shm"], stdout=subprocess.PIPE)
        assert self._locker.stdout
        assert self._locker.stdout.readline() == b"locked\n"

    def resume(self) -> None:
        if self._locker:
            self._locker.kill()
            self._locker.communicate()
            self._locker = None

    crash = pause
    restart = resume

    def replace(self) -> None:
        self.resume()
        for companion in ("", "-wal", "-shm"):
            self.path.with_name(self.path.name + companion).unlink(missing_ok=True)

    async def forget(self) -> None:
        async with self._opened() as store:
            for number in range(sqlite_tables.HISTORY + 1):
                await (store.create("/overflow", b"", None) if number % 2 == 0 else store.delete("/overflow"))

    async def put(self, key: str, value: str) -> None:
        async with self._opened() as store:
            entry = await store.get(key)
            await (store.replace(entry, value.encode(), None) if entry else store.create(key, value.encode(), None))

    async def remove(self, key: str) -> None:
        async with self._opened() as store:
            for each in await self.keys(key) if key.endswith("/") else [key]:
                await store.delete(each)

    async def read(self, key: str) -> str:
        async with self._opened() as store:
            entry = await store.get(key)
            assert entry
            return entry.value.decode()

    async def keys(self, prefix: str) -> list[str]:
        async with self._opened() as store:
            return [entry.key for entry in (await store.read_all(prefix)).entries]

    @contextlib.asynccontextmanager
    async def _opened(self) -> AsyncIterator[KeyValueStore]:
        store = self.open()
        try:
            yield store
        finally:
            await store.close()


class Watching:
    """A watch that runs in a task and keeps what it was told; the revisions of removals in `removals`, not in the changes."""

    def __init__(self, store: KeyValueStore, prefix: str, after: int) -> None:
        self.changes: list[Change] = []
        self.removals: list[int] = []
        self.batches = 0
        self._news = asyncio.Condition()
        self._task = asyncio.create_task(self._run(store.watch(prefix, after)))

    async def until(self, count: int) -> list[Change]:
        """At least `count` changes; raises what the watch raised."""

        def reached() -> bool:
            return len(self.changes) >= count or self._task.done()

        async with asyncio.timeout(60), self._news:
            await self._news.wait_for(reached)
        if len(self.changes) < count:
            await self._task
        return self.changes

    async def end(self) -> BaseException | None:
        """What the watch raises."""
        async with asyncio.timeout(60):
            await asyncio.wait([self._task])
        return self._task.exception()

    async def cancel(self) -> None:
        """End it from outside."""
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _run(self, watch: AsyncIterator[list[Change]]) -> None:
        try:
            async for batch in watch:
                assert batch, "an empty batch tells nothing"
                async with self._news:
                    self.batches += 1
                    self.removals += [change.revision for change in batch if change.entry is None]
                    self.changes += [Change(change.key, change.entry) for change in batch]
                    self._news.notify_all()
        finally:
            async with self._news:
                self._news.notify_all()


@contextlib.asynccontextmanager
async def watching(store: KeyValueStore, prefix: str, after: int) -> AsyncIterator[Watching]:
    """A Watching that is cancelled at the end."""
    watch = Watching(store, prefix, after)
    try:
        yield watch
    finally:
        await watch.cancel()


async def eventually(check: Callable[[], object], what: str) -> None:
    """Wait for something that no call of ours reports; 60 s at most."""
    for _ in range(1200):
        if check():
            return
        await asyncio.sleep(0.05)
    raise AssertionError(f"it did not come about in a minute: {what}")


def open_files() -> int:
    """How many file descriptors this process has."""
    return len(os.listdir("/proc/self/fd"))


_numbers = itertools.count()


def fresh_prefix() -> str:
    """A prefix that no other test of this run has; no store allows all characters, and none loses these."""
    return f"/wincey.test-{os.getpid()}/{next(_numbers)}/"
