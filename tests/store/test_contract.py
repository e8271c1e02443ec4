"""What every store promises (wincey.store.kv), held against each of them, on the real server."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from support.stores import (
    Backend,
    Watching,
    eventually,
    fresh_prefix,
    open_files,
    watching,
)
from wincey.model.errors import HistoryLost, KeyConflict, KeyExists, StoreUnavailable
from wincey.store.kv import Change, Entry, KeyValueStore

EXPIRES = 1.0  # seconds: the shortest time limit that all stores can keep
LONG = 100.0


@pytest.fixture
async def other(backend: Backend) -> AsyncIterator[KeyValueStore]:
    """A second daemon's store on the same backend."""
    store = backend.open()
    yield store
    await store.close()


@pytest.fixture
async def own_store(own_backend: Backend) -> AsyncIterator[KeyValueStore]:
    store = own_backend.open()
    yield store
    await store.close()


@pytest.fixture
async def impatient(own_backend: Backend) -> AsyncIterator[KeyValueStore]:
    """A store whose calls soon give up."""
    store = own_backend.open(deadline=2.0)
    yield store
    await store.close()


async def gone(store: KeyValueStore, key: str) -> None:
    """Wait until the key has expired."""
    async with asyncio.timeout(60):
        while await store.get(key):
            await asyncio.sleep(0.05)


# Reading


async def test_an_absent_key_is_none(store: KeyValueStore, prefix: str) -> None:
    assert await store.get(prefix + "config") is None


async def test_an_absent_prefix_is_an_empty_listing_to_watch_from(store: KeyValueStore, prefix: str) -> None:
    listing = await store.read_all(prefix)
    assert listing.entries == []
    assert listing.revision > 0
    async with watching(store, prefix, listing.revision) as watch:
        entry = await store.create(prefix + "a", b"1", None)
        assert await watch.until(1) == [Change(prefix + "a", entry)]


async def test_a_listing_has_all_keys_below_the_prefix_in_order(store: KeyValueStore, prefix: str) -> None:
    names = ["b", "a/b", "10.3.10.0-24", "10.3.1.0-24", "a-", "a/a", "é", "B", "a0"]
    made = [await store.create(f"{prefix}subnets/{name}", name.encode(), None) for name in names]
    for sibling in ["subnets-other/foo", "subnets0/foo", "subnet/foo", "subnets.", "config"]:
        await store.create(prefix + sibling, b"not below it", None)
    listing = await store.read_all(prefix + "subnets/")
    assert listing.entries == sorted(made, key=lambda entry: entry.key)
    assert len((await store.read_all(prefix)).entries) == 14


async def test_a_listing_of_many(store: KeyValueStore, prefix: str) -> None:
    made = await asyncio.gather(*(store.create(f"{prefix}{n:04}", b"x" * 200, LONG) for n in range(300)))
    assert (await store.read_all(prefix)).entries == made


async def test_deleted_and_expired_keys_are_in_no_listing(store: KeyValueStore, prefix: str) -> None:
    await store.create(prefix + "dir/deleted", b"1", None)
    await store.create(prefix + "dir/expired", b"1", EXPIRES)
    await store.delete(prefix + "dir/deleted")
    await gone(store, prefix + "dir/expired")
    assert (await store.read_all(prefix)).entries == []


async def test_a_listings_revision_separates_before_from_after(
    store: KeyValueStore, other: KeyValueStore, prefix: str
) -> None:
    """Listings and watches made while others write fit together without gap or overlap."""

    async def write() -> None:
        for number in range(60):
            await other.create(f"{prefix}{number:03}", b"1", None)

    writer = asyncio.create_task(write())
    for _ in range(5):
        listing = await store.read_all(prefix)
        async with watching(store, prefix, listing.revision) as watch:
            changes = await watch.until(60 - len(listing.entries)) if writer.done() else await watch.until(1)
        known = [entry.key for entry in listing.entries] + [change.key for change in changes]
        assert known == [f"{prefix}{number:03}" for number in range(len(known))]
        if len(known) == 60:
            break
    await writer


# Values and keys


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"0",
        bytes(range(32, 127)),
        b"line\nline\r\n\ttab",
        'ä ö ü 漢字 😀 \u2028 "quoted" \\u0000'.encode(),
        b"%41+%2B&value=x&ttl=1;#?",
        b"x" * 10_240,
        '"\\é'.encode() * 3000,
    ],
    ids=["empty", "0", "printable", "blanks", "utf8", "form", "10kB", "escaped"],
)
async def test_values_come_back_byte_by_byte(store: KeyValueStore, prefix: str, value: bytes) -> None:
    revision = (await store.read_all(prefix)).revision
    async with watching(store, prefix, revision) as watch:
        entry = await store.create(prefix + "key", value, None)
        entry = await store.replace(entry, value + b"!", None)
        assert [change.entry and change.entry.value for change in await watch.until(2)] == [value, value + b"!"]
    assert (await store.get(prefix + "key")) == entry
    assert [entry.value for entry in (await store.read_all(prefix)).entries] == [value + b"!"]


@pytest.mark.parametrize(
    "name",
    ["10.3.1.0-24&fd00:1::-64", "a b", "100%", "%41", "a+b", "a=b;c", "a?b#c", "é漢", "[x]", "a,b", "~", '"', "a\\b"],
)
async def test_keys_come_back_as_they_were(store: KeyValueStore, prefix: str, name: str) -> None:
    key = f"{prefix}dir/{name}"
    revision = (await store.read_all(prefix)).revision
    async with watching(store, prefix, revision) as watch:
        entry = await store.create(key, b"1", LONG)
        assert entry.key == key
        assert await store.get(key) == entry
        assert (await store.read_all(prefix)).entries == [entry]
        with pytest.raises(KeyExists):
            await store.create(key, b"2", LONG)
        assert await store.delete(key)
        assert await watch.until(2) == [Change(key, entry), Change(key, None)]


# Creating


@pytest.mark.parametrize("ttl", [None, LONG])
async def test_a_created_entry_is_as_it_reads(store: KeyValueStore, prefix: str, ttl: float | None) -> None:
    before = (await store.read_all(prefix)).revision
    entry = await store.create(prefix + "a", b"1", ttl)
    assert (entry.key, entry.value, entry.permanent) == (prefix + "a", b"1", ttl is None)
    assert entry.revision == entry.created > before
    assert await store.get(prefix + "a") == entry
    assert (await store.read_all(prefix)).revision >= entry.revision


async def test_a_key_that_exists_is_not_created(store: KeyValueStore, other: KeyValueStore, prefix: str) -> None:
    entry = await store.create(prefix + "a", b"1", None)
    with pytest.raises(KeyExists, match="a"):
        await other.create(prefix + "a", b"2", LONG)
    assert await store.get(prefix + "a") == entry


async def test_of_fifty_who_create_a_key_at_once_one_wins(backend: Backend, prefix: str) -> None:
    stores = [backend.open() for _ in range(5)]

    async def create(number: int) -> Entry | None:
        try:
            return await stores[number % 5].create(prefix + "a", str(number).encode(), LONG)
        except KeyExists:
            return None

    try:
        winners = [entry for entry in await asyncio.gather(*map(create, range(50))) if entry]
        assert winners == [await stores[0].get(prefix + "a")]
    finally:
        for store in stores:
            await store.close()


async def test_creating_again_after_a_delete_makes_another_entry(store: KeyValueStore, prefix: str) -> None:
    first = await store.create(prefix + "a", b"1", LONG)
    await store.delete(prefix + "a")
    second = await store.create(prefix + "a", b"1", LONG)
    assert second.created == second.revision > first.revision
    with pytest.raises(KeyConflict):
        await store.replace(first, b"2", LONG)
    with pytest.raises(KeyConflict):
        await store.refresh(first, LONG)
    with pytest.raises(KeyConflict):
        await store.delete(prefix + "a", first.revision)
    assert await store.get(prefix + "a") == second


# Replacing


async def test_replacing_keeps_the_creation_and_moves_the_revision(store: KeyValueStore, prefix: str) -> None:
    old = await store.create(prefix + "a", b"1", LONG)
    new = await store.replace(old, b"2", LONG)
    assert (new.value, new.created, new.permanent) == (b"2", old.created, False)
    assert new.revision > old.revision
    assert await store.get(prefix + "a") == new
    newer = await store.replace(new, b"2", LONG)
    assert newer.revision > new.revision, "the same value is a change too"


async def test_an_entry_changed_or_gone_meanwhile_is_not_replaced(
    store: KeyValueStore, other: KeyValueStore, prefix: str
) -> None:
    old = await store.create(prefix + "a", b"1", LONG)
    new = await other.replace(old, b"2", LONG)
    with pytest.raises(KeyConflict, match="a"):
        await store.replace(old, b"3", LONG)
    assert await store.get(prefix + "a") == new
    await other.delete(prefix + "a")
    with pytest.raises(KeyConflict, match="a"):
        await store.replace(new, b"3", LONG)
    assert await store.get(prefix + "a") is None


async def test_of_many_who_replace_an_entry_at_once_one_wins(store: KeyValueStore, prefix: str) -> None:
    old = await store.create(prefix + "a", b"1", None)

    async def replace(number: int) -> Entry | None:
        with contextlib.suppress(KeyConflict):
            return await store.replace(old, str(number).encode(), LONG)
        return None

    winners = [entry for entry in await asyncio.gather(*map(replace, range(20))) if entry]
    assert winners == [await store.get(prefix + "a")]


async def test_replacing_gives_and_takes_the_time_limit(store: KeyValueStore, prefix: str) -> None:
    reserved = await store.create(prefix + "reserved", b"1", None)
    leased = await store.create(prefix + "leased", b"1", EXPIRES)
    prolonged = await store.create(prefix + "prolonged", b"1", EXPIRES)
    reserved = await store.replace(reserved, b"1", EXPIRES)
    leased = await store.replace(leased, b"1", None)
    prolonged = await store.replace(prolonged, b"1", LONG)
    assert [reserved.permanent, leased.permanent, prolonged.permanent] == [False, True, False]
    await gone(store, prefix + "reserved")
    assert await store.time_left(leased) is None
    assert (await store.time_left(prolonged) or 0) > EXPIRES
    # One made later with the first limit of these two is gone: theirs would have been reached as well.
    await store.create(prefix + "later", b"1", EXPIRES)
    await gone(store, prefix + "later")
    assert (await store.read_all(prefix)).entries == [leased, prolonged]


# Refreshing and time limits


async def test_refreshing_starts_the_limit_anew_unseen_by_watches(store: KeyValueStore, prefix: str) -> None:
    entry = await store.create(prefix + "a", b"1", LONG)
    async with watching(store, prefix, entry.revision) as watch:
        await asyncio.sleep(2.5)
        before = await store.time_left(entry)
        entry = await store.refresh(entry, LONG)
        after = await store.time_left(entry)
        assert before is not None
        assert after is not None
        assert before < after <= LONG
        entry = await store.refresh(entry, LONG)
        assert await store.get(prefix + "a") == entry
        marker = await store.create(prefix + "b", b"1", None)
        assert await watch.until(1) == [Change(prefix + "b", marker)]
    await store.replace(entry, b"2", LONG)


async def test_refreshed_again_and_again_a_key_outlives_its_limit(store: KeyValueStore, prefix: str) -> None:
    entry = await store.create(prefix + "a", b"1", 3.0)
    await store.create(prefix + "unrefreshed", b"1", 3.0)
    while await store.get(prefix + "unrefreshed"):
        entry = await store.refresh(entry, 3.0)
        await asyncio.sleep(0.2)
    assert await store.get(prefix + "a") == entry


async def test_an_entry_changed_or_gone_meanwhile_is_not_refreshed(store: KeyValueStore, prefix: str) -> None:
    old = await store.create(prefix + "a", b"1", LONG)
    new = await store.replace(old, b"2", LONG)
    with pytest.raises(KeyConflict):
        await store.refresh(old, LONG)
    assert await store.get(prefix + "a") == new
    await store.delete(prefix + "a")
    with pytest.raises(KeyConflict):
        await store.refresh(new, LONG)
    brief = await store.create(prefix + "a", b"1", EXPIRES)
    await gone(store, prefix + "a")
    with pytest.raises(KeyConflict):
        await store.refresh(brief, LONG)
    with pytest.raises(KeyConflict):
        await store.replace(brief, b"2", LONG)
    assert await store.get(prefix + "a") is None


async def test_what_has_no_limit_gets_none_by_being_refreshed(store: KeyValueStore, prefix: str) -> None:
    entry = await store.create(prefix + "a", b"1", None)
    with pytest.raises(KeyConflict):
        await store.refresh(entry, LONG)
    assert await store.time_left(entry) is None
    assert await store.get(prefix + "a") == entry


async def test_the_time_left(store: KeyValueStore, prefix: str) -> None:
    reserved = await store.create(prefix + "reserved", b"1", None)
    leased = await store.create(prefix + "leased", b"1", LONG)
    assert await store.time_left(reserved) is None
    left = await store.time_left(leased)
    assert left is not None
    assert 0 < left <= LONG
    for entry in (reserved, leased):
        await store.delete(entry.key)
        with pytest.raises(KeyConflict):
            await store.time_left(entry)


async def test_an_expired_key_is_gone_and_free(store: KeyValueStore, prefix: str) -> None:
    entry = await store.create(prefix + "a", b"1", EXPIRES)
    async with watching(store, prefix, entry.revision) as watch:
        assert await watch.until(1) == [Change(prefix + "a", None)]
        assert await store.get(prefix + "a") is None
        again = await store.create(prefix + "a", b"2", None)
        assert (await watch.until(2))[1:] == [Change(prefix + "a", again)]
        assert len(watch.removals) == 1
        assert entry.revision < watch.removals[0] < again.revision  # its own place in the order of changes


# Deleting


async def test_deleting(store: KeyValueStore, prefix: str) -> None:
    assert await store.delete(prefix + "a") is False
    assert await store.delete(prefix + "a", 1) is False
    await store.create(prefix + "a", b"1", LONG)
    assert await store.delete(prefix + "a") is True
    assert await store.get(prefix + "a") is None
    assert await store.delete(prefix + "a") is False


async def test_deleting_only_what_one_has_seen(store: KeyValueStore, prefix: str) -> None:
    old = await store.create(prefix + "a", b"1", LONG)
    new = await store.replace(old, b"2", LONG)
    with pytest.raises(KeyConflict, match="a"):
        await store.delete(prefix + "a", old.revision)
    assert await store.get(prefix + "a") == new
    assert await store.delete(prefix + "a", new.revision) is True


async def test_deleting_one_key_spares_its_neighbours(store: KeyValueStore, prefix: str) -> None:
    kept = [await store.create(prefix + name, b"1", None) for name in ("a-", "a0", "aa")]
    await store.create(prefix + "a", b"1", None)
    await store.delete(prefix + "a")
    assert (await store.read_all(prefix)).entries == kept


# Watching


async def test_a_watch_tells_each_change_once_in_order(store: KeyValueStore, other: KeyValueStore, prefix: str) -> None:
    start = (await store.read_all(prefix)).revision
    async with watching(store, prefix, start) as watch:
        expected = []
        for number in range(10):
            entry = await other.create(f"{prefix}{number}", b"1", LONG if number % 2 else None)
            expected.append(Change(entry.key, entry))
        for change in expected[:5]:
            assert change.entry
            entry = await other.replace(change.entry, b"2", None)
            expected.append(Change(entry.key, entry))
        for number in range(3):
            await other.delete(f"{prefix}{number}")
            expected.append(Change(f"{prefix}{number}", None))
        assert await watch.until(len(expected)) == expected


async def test_a_watch_resumes_after_any_revision_without_loss_or_repetition(store: KeyValueStore, prefix: str) -> None:
    start = (await store.read_all(prefix)).revision
    expected: list[tuple[int, Change]] = []
    entry = await store.create(prefix + "a", b"0", LONG)
    expected.append((entry.revision, Change(prefix + "a", entry)))
    for number in range(6):
        entry = await store.replace(entry, str(number).encode(), LONG)
        expected.append((entry.revision, Change(prefix + "a", entry)))
    for after in [start, *(revision for revision, _ in expected[:-1])]:
        wanted = [change for revision, change in expected if revision > after]
        async with watching(store, prefix, after) as watch:
            assert await watch.until(len(wanted)) == wanted


async def test_other_prefixes_are_invisible(store: KeyValueStore, prefix: str) -> None:
    start = (await store.read_all(prefix)).revision
    async with watching(store, prefix + "subnets/", start) as watch:
        for name in ("subnets-other/foo", "subnets0/foo", "subnet/foo", "config"):
            await store.create(prefix + name, b"1", None)
            await store.delete(prefix + name)
        entry = await store.create(prefix + "subnets/a/b", b"1", None)
        assert await watch.until(1) == [Change(entry.key, entry)]


async def test_watches_of_one_store_do_not_disturb_each_other(store: KeyValueStore, prefix: str) -> None:
    start = (await store.read_all(prefix)).revision
    async with (
        watching(store, prefix, start) as whole,
        watching(store, prefix + "a/", start) as first,
        watching(store, prefix + "b/", start) as second,
    ):
        one = await store.create(prefix + "a/x", b"1", None)
        two = await store.create(prefix + "b/x", b"1", None)
        assert await whole.until(2) == [Change(one.key, one), Change(two.key, two)]
        assert await first.until(1) == [Change(one.key, one)]
        assert await second.until(1) == [Change(two.key, two)]
        await first.cancel()
        three = await store.create(prefix + "b/y", b"1", None)
        assert (await second.until(2))[1:] == [Change(three.key, three)]


async def test_a_slow_reader_loses_nothing(store: KeyValueStore, other: KeyValueStore, prefix: str) -> None:
    start = (await store.read_all(prefix)).revision
    watch = store.watch(prefix, start)
    first = await other.create(prefix + "first", b"1", None)
    changes = await anext(watch)
    made = [await other.create(f"{prefix}{number:03}", b"x" * 1000, None) for number in range(100)]
    while len(changes) < 101:
        changes += await anext(watch)
    await watch.aclose()  # type: ignore[attr-defined]  # the stores' watches are generators
    assert changes == [Change(entry.key, entry) for entry in [first, *made]]


async def test_a_cancelled_watch_leaves_nothing_behind(backend: Backend, prefix: str) -> None:
    async def watch_a_while(store: KeyValueStore) -> None:
        entry = await store.create(prefix + "a", b"1", None)
        async with watching(store, prefix, entry.revision - 1) as watch:
            await watch.until(1)
        await store.delete(prefix + "a")

    files = open_files()
    tasks = len(asyncio.all_tasks())
    store = backend.open()
    await watch_a_while(store)
    kept = open_files()  # a connection for calls may be kept
    for _ in range(5):
        await watch_a_while(store)
    assert len(asyncio.all_tasks()) == tasks
    await eventually(lambda: open_files() <= kept, "watches' connections are closed")
    await store.close()
    await eventually(lambda: open_files() <= files, "all connections are closed")


async def test_history_that_is_lost_is_said_to_be(own_backend: Backend, own_store: KeyValueStore, prefix: str) -> None:
    start = (await own_store.read_all(prefix)).revision
    kept = await own_store.create(prefix + "kept", b"1", LONG)
    deleted = await own_store.create(prefix + "deleted", b"1", LONG)
    await own_store.delete(deleted.key)
    await own_backend.forget()
    async with watching(own_store, prefix, start) as watch:
        assert isinstance(await watch.end(), HistoryLost)
    listing = await own_store.read_all(prefix)
    assert listing.entries == [kept]
    async with watching(own_store, prefix, listing.revision) as watch:
        entry = await own_store.create(prefix + "a", b"1", None)
        assert await watch.until(1) == [Change(entry.key, entry)]


async def test_a_watch_that_keeps_up_is_not_hurt_by_others_writing_a_lot(
    own_backend: Backend, own_store: KeyValueStore, prefix: str
) -> None:
    entry = await own_store.create(prefix + "a", b"1", None)
    async with watching(own_store, prefix, entry.revision - 1) as watch:
        await watch.until(1)
        await own_backend.forget()
        entry = await own_store.create(prefix + "b", b"1", None)
        assert (await watch.until(2))[1:] == [Change(entry.key, entry)]


# Outages


async def test_calls_end_in_bounded_time_when_nothing_answers(
    own_backend: Backend, impatient: KeyValueStore, prefix: str
) -> None:
    entry = await impatient.create(prefix + "a", b"1", LONG)
    own_backend.pause()
    calls = [
        impatient.get(prefix + "a"),
        impatient.read_all(prefix),
        impatient.replace(entry, b"2", LONG),
        impatient.refresh(entry, LONG),
        impatient.time_left(entry),
        impatient.create(prefix + "b", b"1", LONG),
        impatient.delete(prefix + "c"),
    ]
    async with asyncio.timeout(60):
        results = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(result) for result in results] == [StoreUnavailable] * len(calls)
    own_backend.resume()
    async with asyncio.timeout(60):
        await eventually_works(impatient, prefix)


async def eventually_works(store: KeyValueStore, prefix: str) -> None:
    while True:
        try:
            return await use(store, prefix)
        except StoreUnavailable:
            await asyncio.sleep(0.1)


async def use(store: KeyValueStore, prefix: str) -> None:
    try:
        entry = await store.create(prefix + "works", b"1", LONG)
    except KeyExists:
        await store.delete(prefix + "works")
        entry = await store.create(prefix + "works", b"1", LONG)
    assert await store.get(prefix + "works") == entry


async def test_a_watch_outlives_an_outage_and_misses_nothing(
    own_backend: Backend, impatient: KeyValueStore, prefix: str
) -> None:
    told: list[str | None] = []
    impatient.on_outage(told.append)
    first = await impatient.create(prefix + "first", b"1", None)
    async with watching(impatient, prefix, first.revision - 1) as watch:
        await watch.until(1)
        await asyncio.to_thread(own_backend.crash)
        await eventually(lambda: told, "the outage is told")
        assert told[0], "with its reason"
        await asyncio.to_thread(own_backend.restart)
        second_store = own_backend.open()
        try:
            await eventually_works(second_store, fresh_prefix())
            second = await second_store.create(prefix + "second", b"1", None)
            await second_store.delete(prefix + "first")
        finally:
            await second_store.close()
        changes = await watch.until(3)
        assert changes[1:] == [Change(prefix + "second", second), Change(prefix + "first", None)]
        await eventually(lambda: told[-1] is None, "the end of the outage is told")
        assert all(told[:-1]), "each outage is told once, and its end last"
    assert [entry.key for entry in (await impatient.read_all(prefix)).entries] == [prefix + "second"]


async def test_a_store_that_lost_everything_is_noticed_by_watches(
    own_backend: Backend, own_store: KeyValueStore, prefix: str
) -> None:
    for number in range(5):
        entry = await own_store.create(f"{prefix}{number}", b"1", None)
    async with watching(own_store, prefix, entry.revision - 1) as watch:
        await watch.until(1)
        await asyncio.to_thread(own_backend.replace)
        assert isinstance(await watch.end(), HistoryLost)
    assert (await own_store.read_all(prefix)).entries == []
    await eventually_works(own_store, prefix)


# Closing


async def test_closing_ends_what_is_under_way(own_backend: Backend, prefix: str) -> None:
    store = own_backend.open()
    entry = await store.create(prefix + "a", b"1", None)
    watch = Watching(store, prefix, entry.revision - 1)
    await watch.until(1)
    own_backend.pause()
    call = asyncio.create_task(store.get(prefix + "a"))
    await asyncio.sleep(0.05)
    await store.close()
    assert isinstance(await watch.end(), StoreUnavailable)
    with pytest.raises(StoreUnavailable):
        async with asyncio.timeout(60):
            await call
    own_backend.resume()
    with pytest.raises(StoreUnavailable):
        await store.get(prefix + "a")
    await store.close()


async def test_the_name_tells_what_it_is(store: KeyValueStore) -> None:
    assert any(
        kind in store.name for kind in ("SQLite /", "etcd v3 at http://127.0.0.1:", "etcd v2 at http://127.0.0.1:")
    )
    assert store.values_v2 == ("v2" in store.name)
