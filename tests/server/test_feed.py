"""One watch for many polls: what each of them gets, and when a snapshot must do."""

import asyncio
from typing import NamedTuple

import pytest

from wincey.model.errors import HistoryLost, StoreDenied
from wincey.server.feed import Feed


class Change(NamedTuple):
    revision: int
    name: str


class Source:
    """A store's watch, and its revision."""

    def __init__(self, position=100):
        self.position, self.begun, self.asked = position, [], 0
        self.queue = asyncio.Queue()
        self.told = []
        self.feed = Feed(self.watch, self.where, self.told.append)

    async def watch(self, after):
        self.begun.append(after)
        while True:
            batch = await self.queue.get()
            if isinstance(batch, Exception):
                raise batch
            yield batch

    async def where(self):
        self.asked += 1
        return self.position

    def put(self, *changes):
        self.queue.put_nowait([Change(*change) for change in changes])

    def poll(self, cursor, wanted=lambda _: True):
        return asyncio.create_task(self.feed.after(cursor, wanted))


async def settle():
    for _ in range(10):
        await asyncio.sleep(0)


async def names(poll):
    async with asyncio.timeout(20):
        found = await poll
    return None if found is None else [change.name for change in found]


async def test_many_polls_share_one_watch():
    source = Source()
    polls = [source.poll(100) for _ in range(50)]
    only_b = source.poll(100, lambda change: change.name == "b")
    await settle()
    assert source.begun == [100]
    assert source.feed.waiting == 51
    source.put((101, "a"))
    assert [await names(poll) for poll in polls] == [["a"]] * 50
    assert not only_b.done()
    source.put((102, "b"), (103, "c"))
    assert await names(only_b) == ["b"]
    assert await names(source.poll(101)) == ["b", "c"]
    assert [change.name for change in source.told] == ["a", "b", "c"]
    assert source.begun == [100]
    assert source.feed.waiting == 0
    source.feed.close()


async def test_cursors_of_other_servers():
    source = Source(position=200)
    first = source.poll(150)
    await settle()
    assert await names(source.poll(149)) is None  # from before our time
    ahead = source.poll(180)  # what happened up to then was of no interest to us, or is on its way
    beyond = source.poll(201)  # of another store, or of this one before it lost its data
    assert await names(beyond) is None
    source.put((170, "a"))
    assert await names(first) == ["a"]
    assert not ahead.done()
    source.put((181, "b"))
    assert await names(ahead) == ["b"]
    asked = source.asked
    waiting = source.poll(190)
    await settle()
    assert source.asked == asked  # known by now
    waiting.cancel()
    source.feed.close()


async def test_a_lost_history_is_a_snapshot_for_all_who_wait():
    source = Source()
    polls = [source.poll(100), source.poll(100)]
    await settle()
    source.queue.put_nowait(HistoryLost("compacted"))
    assert [await names(poll) for poll in polls] == [None, None]
    again = source.poll(100)
    await settle()
    assert source.begun == [100, 100]
    source.put((101, "a"))
    assert await names(again) == ["a"]
    source.feed.close()


async def test_a_store_that_refuses():
    source = Source()
    poll = source.poll(100)
    await settle()
    source.queue.put_nowait(StoreDenied("no permission"))
    with pytest.raises(StoreDenied):
        await names(poll)
    source.feed.close()


async def test_memory_is_bounded():
    source = Source(position=10_000)
    waiting = source.poll(0, lambda change: change.name == "last")
    await settle()
    for number in range(1, 5001, 2):  # two changes to a revision
        source.put((number, "x"), (number, "y"))
        await settle()
    source.put((6000, "last"))
    assert await names(waiting) == ["last"]
    assert await names(source.poll(1)) is None  # too long ago
    latest = await names(source.poll(4997))
    assert latest == ["x", "y", "last"]  # of a revision all or nothing
    source.feed.close()


async def test_the_end_of_a_feed_ends_its_polls():
    source = Source()
    poll = source.poll(100)
    await settle()
    source.feed.close()
    assert await names(poll) is None
