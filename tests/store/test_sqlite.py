"""What only the SQLite store promises: one file, many processes, its own clock, errors that say what to do."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from support.stores import Watching, eventually, open_files, watching
from wincey.model.errors import HistoryLost, KeyConflict, StoreError, StoreUnavailable
from wincey.store import sqlite, sqlite_tables
from wincey.store.kv import Change
from wincey.store.sqlite import SqliteStore


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


@pytest.fixture
async def store(path: Path) -> AsyncIterator[SqliteStore]:
    store = SqliteStore(str(path), deadline=0.5)
    yield store
    await store.close()


_HEAD = """
import asyncio, os, sys
from wincey.model.errors import *
from wincey.store.sqlite import SqliteStore
store = SqliteStore(sys.argv[1])
"""


def python(program: str, path: Path, stdin: int = subprocess.DEVNULL) -> subprocess.Popen[str]:
    """Another process, with `store` open on the same file."""
    return subprocess.Popen(
        [sys.executable, "-c", _HEAD + textwrap.dedent(program), str(path)],
        stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


async def finished(process: subprocess.Popen[str]) -> str:
    out, err = await asyncio.to_thread(process.communicate)
    assert process.returncode == 0, err
    return out


# The file


async def test_file_and_directories_are_made_for_the_user_alone(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "store.db"
    store = SqliteStore(str(path))
    await store.create("/a", b"1", None)
    assert {file.name: file.stat().st_mode & 0o777 for file in path.parent.iterdir()} == {
        "store.db": 0o600,
        "store.db-wal": 0o600,
        "store.db-shm": 0o600,
    }
    await store.close()
    assert [file.name for file in path.parent.iterdir()] == ["store.db"], "the last one to close tidies up"


async def test_nothing_is_lost_when_all_have_closed(path: Path) -> None:
    first = SqliteStore(str(path))
    entry = await first.create("/a", b"1", 100)
    await first.close()
    second = SqliteStore(str(path))
    assert await second.get("/a") == entry
    assert (await second.replace(entry, b"2", 100)).revision == entry.revision + 1
    await second.close()


async def test_it_is_a_store_in_wal_mode_that_other_programs_can_tell(store: SqliteStore, path: Path) -> None:
    await store.create("/a", b"1", None)
    db = sqlite3.connect(path)
    try:
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert db.execute("PRAGMA application_id").fetchone() == (int.from_bytes(b"winc", "big"),)
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert db.execute("SELECT key, value FROM keys").fetchall() == [("/a", b"1")]
    finally:
        db.close()


def foreign(path: Path, *statements: str) -> None:
    db = sqlite3.connect(path)
    for statement in statements:
        db.execute(statement)
    db.commit()
    db.close()


async def test_another_programs_database_is_refused_untouched(store: SqliteStore, path: Path) -> None:
    foreign(path, "CREATE TABLE theirs (x)")
    before = path.read_bytes()
    with pytest.raises(StoreError, match=rf"SQLite {path}: .*another program; name another file"):
        await store.get("/a")
    assert path.read_bytes() == before


async def test_a_later_versions_file_is_refused(store: SqliteStore, path: Path) -> None:
    await store.create("/a", b"1", None)
    await store.close()
    foreign(path, "PRAGMA user_version = 7")
    later = SqliteStore(str(path))
    with pytest.raises(StoreError, match="schema version 7 and this program knows 1; use the version of wincey"):
        await later.get("/a")
    await later.close()


async def test_what_is_no_database_is_refused(store: SqliteStore, path: Path) -> None:
    path.write_text("just a text\n" * 1000)
    with pytest.raises(StoreError, match="not a database; name another file"):
        await store.get("/a")
    with pytest.raises(StoreError, match="not a database; name another file"):
        await anext(store.watch("/", 1))
    path.unlink()
    await store.create("/a", b"1", None)  # and once it is out of the way all is well


async def test_a_damaged_file_is_said_to_be(store: SqliteStore, path: Path) -> None:
    for number in range(200):
        await store.create(f"/{number}", b"x" * 200, None)
    await store.close()
    content = bytearray(path.read_bytes())
    content[4096:] = b"\xff" * (len(content) - 4096)
    path.write_bytes(content)
    damaged = SqliteStore(str(path))
    with pytest.raises(StoreError, match="malformed; stop all daemons, move it away"):
        await damaged.read_all("/")
    await damaged.close()


async def test_paths_that_can_be_no_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "store.db"):
        store = SqliteStore(str(path))
        with pytest.raises(StoreError, match=f"SQLite {path}: .* directory"):
            await store.get("/a")
        await store.close()


@pytest.mark.root
@pytest.mark.parametrize("what", ["directory", "file"])
async def test_a_file_of_another_user_is_denied(what: str) -> None:
    program = """
        os.setuid(65534)
        try:
            asyncio.run(store.get("/a"))
        except StoreDenied as error:
            print(error)
    """
    with tempfile.TemporaryDirectory() as directory:  # pytest's own can't be entered by other users
        path = Path(directory) / "store.db"
        path.parent.chmod(0o755)
        if what == "file":
            store = SqliteStore(str(path))
            await store.create("/a", b"1", None)
            await store.close()
        said = await finished(python(program, path))
    assert said.startswith(f"SQLite {path}: ")
    assert "writ" in said


# Locks


async def test_a_locked_file_is_waited_for_while_others_run(path: Path) -> None:
    store = SqliteStore(str(path), deadline=60)
    await store.get("/a")
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("BEGIN IMMEDIATE")
    call = asyncio.create_task(store.create("/a", b"1", None))
    await asyncio.sleep(0.1)  # comes back, although the call can't get on
    assert not call.done()
    assert await store.get("/a") is None, "reading goes on"
    db.execute("ROLLBACK")
    db.close()
    assert (await call).value == b"1"
    await store.close()


async def test_a_file_locked_for_good_is_unavailable(store: SqliteStore, path: Path) -> None:
    await store.get("/a")
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("BEGIN IMMEDIATE")
    call = asyncio.create_task(store.create("/a", b"1", None))
    turns = 0
    while not call.done():
        await asyncio.sleep(0.01)
        turns += 1
    assert turns > 5, "the loop was kept from running"
    with pytest.raises(StoreUnavailable, match=f"locked for 0.5 s; `fuser -v {path}`"):
        await call
    db.execute("ROLLBACK")
    db.close()
    await store.create("/a", b"1", None)


async def test_a_writer_killed_amidst_its_transaction_leaves_no_trace(store: SqliteStore, path: Path) -> None:
    entry = await store.create("/a", b"1", None)
    program = """
        import sqlite3, time
        db = sqlite3.connect(sys.argv[1], isolation_level=None)
        db.execute("PRAGMA cache_size = 1")
        db.execute("BEGIN IMMEDIATE")
        for number in range(1000):
            db.execute("INSERT INTO keys VALUES (?, ?, 1, 1, NULL)", (f"/b/{number}", bytes(5000)))
        print("written", flush=True)
        time.sleep(600)
    """
    process = python(program, path)
    assert process.stdout
    assert await asyncio.to_thread(process.stdout.readline) == "written\n"
    process.send_signal(signal.SIGKILL)
    await asyncio.to_thread(process.communicate)
    assert (await store.read_all("/")).entries == [entry]
    await store.delete("/a")


async def test_twenty_processes_and_two_hundred_tasks_create_the_same_keys_at_once(
    store: SqliteStore, path: Path
) -> None:
    program = """
        async def create(number):
            try:
                await store.create(f"/{number}", str(os.getpid()).encode(), 100)
                return 1
            except KeyExists:
                return 0
        async def main():
            sys.stdin.readline()
            print(sum(await asyncio.gather(*map(create, range(200)))))
            await store.close()
        asyncio.run(main())
    """
    reader, writer = os.pipe()
    processes = [python(program, path, stdin=reader) for _ in range(20)]
    os.close(reader)
    os.close(writer)  # the end of their input is the starting gun
    won = [int(await finished(process)) for process in processes]
    assert sum(won) == 200
    entries = (await store.read_all("/")).entries
    assert len(entries) == 200
    assert len({entry.revision for entry in entries}) == 200


# Watches


async def test_another_processs_change_is_heard_of_without_polling(
    store: SqliteStore, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "_POLL", 3600.0)
    monkeypatch.setattr(sqlite, "_POLL_ALONE", 3600.0)
    revision = (await store.read_all("/")).revision
    async with watching(store, "/", revision) as watch:
        await finished(python("asyncio.run(store.create('/a', b'1', None))", path))
        await watch.until(1)
        await finished(python("asyncio.run(store.delete('/a'))", path))
        assert (await watch.until(2))[1] == Change("/a", None)


async def test_without_inotify_polling_hears_of_it(
    store: SqliteStore, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(sqlite, "FileWatch", refuse)
    revision = (await store.read_all("/")).revision
    async with watching(store, "/", revision) as watch:
        await finished(python("asyncio.run(store.create('/a', b'1', None))", path))
        await watch.until(1)


async def test_a_writer_killed_before_it_could_tell_is_heard_of(
    store: SqliteStore, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    revision = (await store.read_all("/")).revision
    async with watching(store, "/", revision) as watch:
        other = SqliteStore(str(path))
        monkeypatch.setattr(other, "_touch", lambda: None)
        await other.create("/a", b"1", None)
        await watch.until(1)
        await other.close()


async def test_all_watches_see_one_and_the_same_expiry(store: SqliteStore, path: Path) -> None:
    others = [SqliteStore(str(path)) for _ in range(5)]
    entry = await store.create("/a", b"1", 0.3)
    watches = [Watching(each, "/", entry.revision) for each in others]
    for watch in watches:
        assert await watch.until(1) == [Change("/a", None)]
    assert (await store.read_all("/")).revision == entry.revision + 1
    for watch, each in zip(watches, others, strict=True):
        await watch.cancel()
        await each.close()


async def test_keys_expire_in_the_order_of_their_limits(store: SqliteStore) -> None:
    start = (await store.read_all("/")).revision
    for name, ttl in (("/b", 0.02), ("/a", 0.04), ("/c", 0.01)):
        await store.create(name, b"1", ttl)
    await asyncio.sleep(0.1)
    async with watching(store, "/", start) as watch:
        assert [change.key for change in (await watch.until(6))[3:]] == ["/c", "/b", "/a"]


async def test_the_log_of_changes_stays_short(store: SqliteStore, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_tables, "HISTORY", 10)
    entry = await store.create("/a", b"0", None)
    for number in range(50):
        entry = await store.replace(entry, str(number).encode(), None)
    db = sqlite3.connect(path)
    assert db.execute("SELECT count(*) FROM events").fetchone() == (10,)
    db.close()
    async with watching(store, "/", entry.revision - 10) as watch:
        assert len(await watch.until(10)) == 10
    with pytest.raises(HistoryLost):
        await anext(store.watch("/", entry.revision - 11))
    with pytest.raises(HistoryLost):
        await anext(store.watch("/", entry.revision + 1))


# A replaced file


async def test_a_file_moved_over_ours_is_taken_up(store: SqliteStore, path: Path, tmp_path: Path) -> None:
    await store.create("/old", b"1", None)
    revision = (await store.read_all("/")).revision
    watch = Watching(store, "/", revision)
    await store.create("/older", b"1", None)
    await watch.until(1)
    new = SqliteStore(str(tmp_path / "new.db"))
    entry = await new.create("/new", b"1", None)
    await new.close()
    for companion in ("-wal", "-shm"):
        path.with_name(path.name + companion).unlink()
    (tmp_path / "new.db").rename(path)
    assert isinstance(await watch.end(), HistoryLost)
    assert (await store.read_all("/")).entries == [entry]


async def test_a_copy_that_went_another_way_is_not_taken_for_ours(
    store: SqliteStore, path: Path, tmp_path: Path
) -> None:
    """Its revisions pass the watch's cursor, but those before were other changes."""
    entry = await store.create("/a", b"1", None)
    await store.close()
    copy = tmp_path / "copy.db"
    copy.write_bytes(path.read_bytes())
    ours = SqliteStore(str(path))
    watch = Watching(ours, "/", entry.revision)
    await ours.create("/ours", b"1", None)
    await watch.until(1)
    theirs = SqliteStore(str(copy))
    await theirs.create("/theirs", b"1", None)
    await theirs.create("/theirs too", b"1", None)
    await theirs.close()
    for companion in ("-wal", "-shm"):
        path.with_name(path.name + companion).unlink()
    copy.rename(path)
    assert isinstance(await watch.end(), HistoryLost)
    assert [entry.key for entry in (await ours.read_all("/")).entries] == ["/a", "/theirs", "/theirs too"]
    await ours.close()


async def test_a_cursor_of_an_older_file_is_out_of_range(
    store: SqliteStore, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store.create("/old", b"1", None)
    revision = (await store.read_all("/")).revision
    await store.close()
    path.unlink()
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 60)
    new = SqliteStore(str(path))
    await new.create("/new", b"1", None)
    with pytest.raises(HistoryLost):
        await anext(new.watch("/", revision))
    await new.close()


# Time


class Clocks:
    """The machine's clocks as this process sees them: real, and moved."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wall = self.boottime = 0.0
        self.boot = "first"
        wall, boottime = time.time, time.clock_gettime
        monkeypatch.setattr(time, "time", lambda: wall() + self.wall)
        monkeypatch.setattr(time, "clock_gettime", lambda clock: boottime(clock) + self.boottime)
        monkeypatch.setattr(sqlite, "_boot_id", lambda: self.boot)

    def reboot(self, wall: float) -> None:
        """Another boot, whose wall clock is moved by so many seconds."""
        self.boot += "+"
        self.wall = wall
        self.boottime = -time.clock_gettime(time.CLOCK_BOOTTIME) + self.boottime + 10


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Clocks:
    return Clocks(monkeypatch)


async def left(path: Path, entry: object) -> float | None:
    """The time left as a daemon sees it that starts now."""
    store = SqliteStore(str(path))
    try:
        return await store.time_left(entry)  # type: ignore[arg-type]  # an entry
    except KeyConflict:
        return None
    finally:
        await store.close()


@pytest.mark.parametrize("step", [-10 * 365 * 86_400, -7200, 7200, 10 * 365 * 86_400])
async def test_steps_of_the_wall_clock_change_nothing(
    store: SqliteStore, path: Path, clocks: Clocks, step: float
) -> None:
    entry = await store.create("/a", b"1", 3600)
    clocks.wall = step
    for seen in (await store.time_left(entry), await left(path, entry)):
        assert seen is not None
        assert 3000 < seen <= 3600
    later = await store.create("/b", b"1", 3600)
    clocks.wall = 0
    assert 3000 < (await left(path, later) or 0) <= 3600


async def test_time_that_the_machine_slept_counts(store: SqliteStore, clocks: Clocks) -> None:
    brief = await store.create("/brief", b"1", 3600)
    long = await store.create("/long", b"1", 86_400)
    async with watching(store, "/", long.revision) as watch:
        clocks.boottime = clocks.wall = 7200
        assert await watch.until(1) == [Change("/brief", None)]
    assert await store.get(brief.key) is None
    assert 70_000 < (await store.time_left(long) or 0) < 80_000


async def test_time_that_the_machine_was_off_counts(store: SqliteStore, path: Path, clocks: Clocks) -> None:
    brief = await store.create("/brief", b"1", 3600)
    long = await store.create("/long", b"1", 86_400)
    await store.close()
    clocks.reboot(wall=7200)
    assert await left(path, brief) is None
    assert 70_000 < (await left(path, long) or 0) < 80_000


async def test_a_boot_with_a_wall_clock_of_long_ago_expires_and_prolongs_nothing(
    store: SqliteStore, path: Path, clocks: Clocks
) -> None:
    entry = await store.create("/a", b"1", 3600)
    await store.close()
    clocks.reboot(wall=-50 * 365 * 86_400)
    assert 3000 < (await left(path, entry) or 0) <= 3600
    clocks.wall = 0  # the time server is reached
    assert 3000 < (await left(path, entry) or 0) <= 3600


# Disturbances


async def test_a_full_disk_is_said_to_be_and_got_over(store: SqliteStore) -> None:
    entry = await store.create("/a", b"1", 0.2)
    assert store._db
    pages = store._db.execute("PRAGMA page_count").fetchone()[0]
    store._db.execute(f"PRAGMA max_page_count = {pages}")  # what a full disk looks like to one process
    with pytest.raises(StoreUnavailable, match="full; free some space"):
        await store.create("/big", bytes(100_000), None)
    async with watching(store, "/", entry.revision) as watch:
        assert (await watch.until(1))[0] == Change("/a", None)
    await store.create("/big", bytes(100_000), None)


async def test_closing_ends_a_quiet_watch(store: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "_POLL", 3600.0)
    watch = Watching(store, "/", (await store.read_all("/")).revision)
    await asyncio.sleep(0.05)
    await store.close()
    assert isinstance(await watch.end(), StoreUnavailable)


async def test_the_last_watch_to_end_gives_back_the_inotify_instance(store: SqliteStore) -> None:
    entry = await store.create("/a", b"1", None)
    files = open_files()
    async with watching(store, "/", entry.revision - 1) as first, watching(store, "/", entry.revision - 1) as second:
        await first.until(1)
        await second.until(1)
        await asyncio.sleep(0.05)
        assert open_files() == files + 1, "one for both"
    assert open_files() == files


async def test_closing_twice_is_no_fault_and_wakes_a_watch_in_an_outage(store: SqliteStore, path: Path) -> None:
    told: list[str | None] = []
    store.on_outage(told.append)
    entry = await store.create("/a", b"1", 0.2)
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("BEGIN IMMEDIATE")  # so that nobody can expire it
    watch = Watching(store, "/", entry.revision)
    await eventually(lambda: told, "the outage is told")
    await store.close()
    assert isinstance(await watch.end(), StoreUnavailable)
    await store.close()
    db.close()
