"""Two hosts with one public address, on a real store."""

import asyncio
import random

import pytest

from wincey.leasing import claims
from wincey.leasing.claims import Claim, Host
from wincey.model.errors import DuplicateHost
from wincey.store.sqlite import SqliteStore

KEY = "/net/wincey/hosts/10.99.0.1"
FIRST, SECOND = Host("first", "a" * 32), Host("second", "b" * 32)


@pytest.fixture
async def stores(tmp_path):
    pair = [SqliteStore(str(tmp_path / "store")) for _ in range(2)]
    yield pair
    for store in pair:
        await store.close()


async def follow(store, claim):
    """What an agent does for its claim."""
    listing = await store.read_all("/net/")
    await claim.seen(next((entry for entry in listing.entries if entry.key == KEY), None))
    async for changes in store.watch("/net/", listing.revision):
        for change in changes:
            await claim.seen(change.entry)


async def holder(store):
    claim = Claim(store, KEY, FIRST)
    await claim.stake()
    return claim, asyncio.create_task(follow(store, claim))


async def stop(task):
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_second_live_host_is_refused_and_both_are_named(stores):
    _, task = await holder(stores[0])
    with pytest.raises(DuplicateHost, match=r"second \(bbbbbbbb\) \(this one\) and first \(aaaaaaaa\).*10\.99\.0\.1"):
        await Claim(stores[1], KEY, SECOND).stake()
    await asyncio.sleep(0.3)
    entry = await stores[0].get(KEY)
    assert Host.decode(entry.value) == FIRST
    await stop(task)


async def test_the_holder_that_restarts_is_itself(stores, monkeypatch):
    monkeypatch.setattr(claims, "ANSWER_WITHIN", 3600.0)
    _, task = await holder(stores[0])
    await stop(task)
    await Claim(stores[1], KEY, FIRST).stake()


async def test_a_dead_holder_loses_the_address(stores, monkeypatch):
    monkeypatch.setattr(claims, "ANSWER_WITHIN", 0.6)
    _, task = await holder(stores[0])
    await stop(task)
    await Claim(stores[1], KEY, SECOND).stake()
    assert Host.decode((await stores[0].get(KEY)).value) == SECOND


async def test_of_two_that_start_at_once_at_most_one_goes_on(stores, monkeypatch):
    monkeypatch.setattr(claims, "ANSWER_WITHIN", 1.0)
    _, task = await holder(stores[0])
    await stop(task)
    third = Host("third", "c" * 32)
    results = await asyncio.gather(
        Claim(stores[0], KEY, SECOND).stake(), Claim(stores[1], KEY, third).stake(), return_exceptions=True
    )
    assert sum(isinstance(result, DuplicateHost) for result in results) >= 1
    assert sum(result is None for result in results) <= 1


async def test_a_deleted_claim_is_made_again(stores):
    _, task = await holder(stores[0])
    await stores[1].delete(KEY)
    for _ in range(100):
        if await stores[1].get(KEY):
            break
        await asyncio.sleep(0.02)
    assert Host.decode((await stores[1].get(KEY)).value) == FIRST
    await stop(task)


async def test_a_claim_that_cannot_be_read_is_nobody_known(stores):
    await stores[0].create(KEY, b"\xffgarbage", None)
    assert Host.decode((await stores[0].get(KEY)).value).name == "unknown host"


async def test_a_claim_is_defended_however_often_it_is_attacked(stores, monkeypatch):
    """A supervisor may start the second host again and again."""
    monkeypatch.setattr(claims, "ANSWER_WITHIN", 3.0)
    claim, task = await holder(stores[0])
    claim._defended = 1000
    with pytest.raises(DuplicateHost):
        await Claim(stores[1], KEY, SECOND).stake()
    await stop(task)


async def test_what_was_there_before_our_claim_is_no_attack(stores, caplog):
    """An agent's snapshot may be older than its claim."""
    before = await stores[0].create(KEY, SECOND.encode(), 3600)
    await stores[0].delete(KEY)
    claim = Claim(stores[0], KEY, FIRST)
    await claim.stake()
    await claim.seen(before)
    assert "tries to use" not in caplog.text
    assert Host.decode((await stores[0].get(KEY)).value) == FIRST


async def test_a_claim_that_is_kept_neither_ends_nor_wakes_anybody(stores, monkeypatch):
    """Through several of its lives, and a restart of its host."""
    monkeypatch.setattr(claims, "TTL", 1.0)
    claim, task = await holder(stores[0])
    listing = await stores[1].read_all("/net/")
    keeping = asyncio.create_task(claim.keep(0.5, random.Random(1)))
    await asyncio.sleep(3.5)
    await stop(keeping)
    await Claim(stores[1], KEY, FIRST).stake()
    assert (await stores[1].get(KEY)).revision >= listing.revision
    await stores[1].create("/net/other", b"x", None)
    seen = await anext(watching := stores[1].watch("/net/", listing.revision))
    assert [change.key for change in seen] == ["/net/other"]
    await watching.aclose()
    await stop(task)
