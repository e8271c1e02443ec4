"""The embedded store: one SQLite file in WAL mode, shared by the daemons of one machine.

It is a small etcd: a table of keys, a revision that grows by one with each change, and a log of the last few thousand
changes that watches read from. There is no server: each process does what is due when it comes by.

- **Calls** are transactions of some 0.1 ms, made on the event loop. A file locked by another process is tried again after
  short random pauses, never waited for inside SQLite, so the loop stays free. Commits are not synced one by one: a power
  cut may lose the last seconds of changes, never the file.
- **Watches** hear of a commit in about a millisecond: a writer touches the file after each commit, and inotify tells the
  others. A slow poll is the fallback (a writer killed between the two, no inotify instance left).
- **Expiry**: whoever next touches the store turns expired keys into delete events, and each watch wakes when one is due.
- **Time** is CLOCK_BOOTTIME plus an offset kept in the file, one for each boot. Steps of the wall clock in either
  direction therefore expire nothing and prolong nothing. A boot sets the store's clock to the wall clock, but never back.
  Time that the machine slept does count: what expired meanwhile is gone, and its holder claims it again.
- **A replaced file** is noticed by its inode and opened anew; watches on the old one end with HistoryLost. A new file's
  revisions begin at the Unix time, so that a cursor of an older file is out of range.

The file must be on a local file system: WAL mode needs shared memory. Who puts a copy in its place removes PATH-wal and
PATH-shm first: SQLite would apply what they hold to the copy.
"""

from __future__ import annotations

import asyncio
import os
import random
import sqlite3
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import TypeVar

from wincey.model.errors import HistoryLost, KeyConflict, KeyExists, StoreDenied, StoreError, StoreUnavailable
from wincey.store import sqlite_tables as tables
from wincey.store.inotify import FileWatch
from wincey.store.kv import Change, Entry, Listing, OutageCallback

T = TypeVar("T")

DEADLINE = 5.0
"""Seconds that a call has."""

_POLL = 1.0  # seconds between looks of a watch, when inotify works
_POLL_ALONE = 0.25  # seconds, when it does not
_LONGEST_PAUSE = 5.0  # seconds between attempts of a watch to reach the file


class SqliteStore:
    """A KeyValueStore in the file `path`. It, and the directory it is in, are made at the first use (mode 0600).

    deadline: seconds until a call gives up on a file that others keep locked.
    """

    values_v2 = False

    def __init__(self, path: str, *, deadline: float = DEADLINE) -> None:
        self.path = os.path.abspath(path)
        self._deadline = deadline
        self._db: sqlite3.Connection | None = None
        self._file: tuple[int, int] | None = None  # device and inode
        self._generation = 0  # of the file: grows when it is found replaced
        self._offset = 0.0  # seconds from CLOCK_BOOTTIME to the store's clock
        self._closed = False
        self._watches = 0
        self._notifier: FileWatch | None = None
        self._waiting: set[asyncio.Future[None]] = set()
        self._outage_callbacks: list[OutageCallback] = []

    @property
    def name(self) -> str:
        return f"SQLite {self.path}"

    async def get(self, key: str) -> Entry | None:
        return await self._call(lambda db, _: tables.find(db, key))

    async def read_all(self, prefix: str) -> Listing:
        return await self._call(lambda db, _: Listing(tables.find_below(db, prefix), tables.last_revision(db)))

    async def create(self, key: str, value: bytes, ttl: float | None) -> Entry:
        def work(db: sqlite3.Connection, now: float) -> Entry:
            if tables.find(db, key):
                raise KeyExists(f"{self.name}: {key} exists")
            return tables.put(db, now, key, value, ttl=ttl)

        return await self._call(work, write=True)

    async def replace(self, entry: Entry, value: bytes, ttl: float | None) -> Entry:
        def work(db: sqlite3.Connection, now: float) -> Entry:
            found = self._unchanged(db, entry.key, entry.revision)
            return tables.put(db, now, entry.key, value, ttl=ttl, created=found.created)

        return await self._call(work, write=True)

    async def refresh(self, entry: Entry, ttl: float) -> Entry:
        def work(db: sqlite3.Connection, now: float) -> Entry:
            found = self._unchanged(db, entry.key, entry.revision)
            if found.permanent:
                raise KeyConflict(f"{self.name}: {entry.key} has no time limit that could start anew")
            tables.set_expiry(db, entry.key, now + ttl)
            return found

        return await self._call(work, write=True)

    async def time_left(self, entry: Entry) -> float | None:
        def work(db: sqlite3.Connection, now: float) -> float | None:
            found = tables.expiry(db, entry.key, entry.created)
            if found is None:
                raise KeyConflict(f"{self.name}: {entry.key} is gone")
            return None if found[0] is None else found[0] - now

        return await self._call(work)

    async def delete(self, key: str, revision: int | None = None) -> bool:
        def work(db: sqlite3.Connection, now: float) -> bool:
            if not tables.find(db, key):
                return False
            if revision is not None:
                self._unchanged(db, key, revision)
            tables.remove(db, now, key)
            return True

        return await self._call(work, write=True)

    async def watch(self, prefix: str, after: int) -> AsyncIterator[list[Change]]:
        generation: int | None = None

        def work(db: sqlite3.Connection, now: float) -> tuple[int, list[Change], float | None]:
            if generation not in {None, self._generation}:
                raise HistoryLost(f"{self.name}: the file was replaced by another")
            last = tables.last_revision(db)
            changes = tables.changes_below(db, prefix, after)
            if changes is None:
                raise HistoryLost(f"{self.name}: at revision {last}, has no complete record of what came after {after}")
            due = tables.next_expiry(db)
            return last, changes, None if due is None else due - now

        self._watches += 1
        try:
            while True:
                after, changes, due = await self._reach(work)
                generation = self._generation
                if changes:
                    yield changes
                else:
                    await self._changed_within(due)
        finally:
            self._watches -= 1
            if not self._watches:
                self._stop_notifier()

    def on_outage(self, callback: OutageCallback) -> None:
        self._outage_callbacks.append(callback)

    async def close(self) -> None:
        self._closed = True
        self._wake()
        self._disconnect()

    def _unchanged(self, db: sqlite3.Connection, key: str, revision: int) -> Entry:
        entry = tables.find(db, key)
        if entry is None:
            raise KeyConflict(f"{self.name}: {key} is gone")
        if entry.revision != revision:
            raise KeyConflict(f"{self.name}: {key} is at revision {entry.revision}, not {revision}")
        return entry

    # How a call is made.

    async def _call(self, work: Callable[[sqlite3.Connection, float], T], *, write: bool = False) -> T:
        """Run `work(db, now)` in one transaction, over again while the file is locked, until the deadline."""
        await asyncio.sleep(0)  # or a burst of calls, none of which waits for anything, would keep others from running
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._deadline
        pause = 0.002
        while True:
            try:
                return self._attempt(work, write)
            except sqlite3.Error as error:
                if not self._passes(error):
                    self._disconnect()
                    raise self._explained(error) from None
            except OSError as error:
                kind = StoreDenied if isinstance(error, PermissionError) else StoreUnavailable
                raise kind(f"{self.name}: {error.strerror}; it must be a file in a writable directory") from None
            if loop.time() > deadline:
                raise StoreUnavailable(
                    f"{self.name}: locked for {self._deadline:g} s; `fuser -v {self.path}` names who has it open"
                )
            await asyncio.sleep(random.uniform(0, pause))  # noqa: S311  # to spread, not to hide
            pause = min(pause * 1.5, 0.05)

    def _attempt(self, work: Callable[[sqlite3.Connection, float], T], write: bool) -> T:
        db = self._connect()
        now = time.clock_gettime(time.CLOCK_BOOTTIME) + self._offset
        due = tables.next_expiry(db)
        if due is not None and due <= now:
            with tables.transaction(db, "IMMEDIATE"):
                tables.expire(db, now)
            self._touch()
        with tables.transaction(db, "IMMEDIATE" if write else "DEFERRED"):
            result = work(db, now)
        if write:
            self._touch()
        return result

    def _connect(self) -> sqlite3.Connection:
        if self._closed:
            raise StoreUnavailable(f"{self.name}: closed")
        if self._db and self._file == _identity(self.path):
            return self._db
        self._disconnect()
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        # SQLite has no way to say a new file's mode; its companions (-wal, -shm) take theirs from it. Opening a file
        # that exists would be wrong: closing it again would drop this process's locks on it (POSIX).
        with suppress(FileExistsError):
            os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600))
        file = _identity(self.path)
        db = sqlite3.connect(self.path, timeout=0, isolation_level=None)
        try:
            self._offset = self._prepare(db)
        except BaseException:
            db.close()
            raise
        if self._file not in {None, file}:
            self._generation += 1
        self._db, self._file = db, file
        return db

    def _prepare(self, db: sqlite3.Connection) -> float:
        """Check that the file is ours, make its tables when it is empty; returns the offset of the store's clock."""
        try:
            with tables.transaction(db, "DEFERRED"):
                tables.check_schema(db)  # before anything is written to a file that may not be ours
        except StoreError as error:
            raise StoreError(f"{self.name}: {error}") from None
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")
        with tables.transaction(db, "IMMEDIATE"):
            wall = time.time()
            if not tables.check_schema(db):
                tables.make_schema(db, int(wall))
            return tables.set_clock(db, _boot_id(), time.clock_gettime(time.CLOCK_BOOTTIME), wall)

    def _disconnect(self) -> None:
        self._stop_notifier()
        if self._db:
            self._db.close()
        self._db = None

    def _passes(self, error: sqlite3.Error) -> bool:
        """Whether to try again at once: the file is locked, or was replaced while we were at it."""
        replaced = self._db is not None and self._file != _identity(self.path)
        return replaced or _code(error) in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL}

    def _explained(self, error: sqlite3.Error) -> StoreError:
        kind, advice = _ADVICE.get(_code(error), (StoreError, "stop what else writes to it, and try again"))
        return kind(f"{self.name}: {error}; {advice}")

    # How a watch waits.

    async def _reach(self, work: Callable[[sqlite3.Connection, float], T]) -> T:
        """As _call, but an outage is waited out and told."""
        pause = 0.1
        told = False
        while True:
            try:
                result = await self._call(work)
            except StoreUnavailable as error:
                if self._closed:
                    raise
                if not told:
                    self._tell(str(error))
                told = True
                await self._wait(random.uniform(pause / 2, pause))  # noqa: S311  # to spread, not to hide
                pause = min(pause * 2, _LONGEST_PAUSE)
            else:
                if told:
                    self._tell(None)
                return result

    async def _changed_within(self, seconds: float | None) -> None:
        """Wait for a change by any process, `seconds`, or the poll's turn, whichever is first."""
        poll = _POLL if self._notified() else _POLL_ALONE
        await self._wait(poll if seconds is None else min(poll, seconds))

    async def _wait(self, seconds: float) -> None:
        """Until woken, at most `seconds`."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiting.add(waiter)
        try:
            async with asyncio.timeout(seconds):
                await waiter
        except TimeoutError:
            pass
        finally:
            self._waiting.discard(waiter)

    def _notified(self) -> bool:
        if self._db and not self._notifier:
            with suppress(OSError):
                self._notifier = FileWatch(self.path, self._wake)
        return self._notifier is not None

    def _stop_notifier(self) -> None:
        if self._notifier:
            self._notifier.close()
        self._notifier = None

    def _touch(self) -> None:
        """Tell the watches of every process to look. Where inotify can't, ours need not wait for the poll."""
        self._wake()
        with suppress(OSError):
            os.utime(self.path)

    def _wake(self) -> None:
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_result(None)

    def _tell(self, reason: str | None) -> None:
        for callback in self._outage_callbacks:
            callback(reason)


_ADVICE: dict[int, tuple[type[StoreError], str]] = {
    sqlite3.SQLITE_CANTOPEN: (StoreDenied, "it must be a file in a directory that this user may write to"),
    sqlite3.SQLITE_READONLY: (StoreDenied, "make the file and its directory writable for this user"),
    sqlite3.SQLITE_PERM: (StoreDenied, "make the file and its directory writable for this user"),
    sqlite3.SQLITE_NOTADB: (StoreError, "name another file, or move this one away to begin anew"),
    sqlite3.SQLITE_CORRUPT: (StoreError, "stop all daemons, move it away and start them: each claims its lease again"),
    sqlite3.SQLITE_FULL: (StoreUnavailable, "free some space"),
    sqlite3.SQLITE_IOERR: (StoreUnavailable, "see the kernel's log for errors of the disk"),
}


def _code(error: sqlite3.Error) -> int:
    """The primary result code; errors of the Python module itself have none."""
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF


def _identity(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def _boot_id() -> str:
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()
