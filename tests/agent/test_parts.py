"""Parts of a host that only some backends need are opened when first needed, and found again by a later run."""

import random
from typing import ClassVar

import pytest

from wincey.agent import parts
from wincey.agent.parts import HostAsk, Part, PartDriver
from wincey.agent.statefile import State
from wincey.model.config import NetworkConfig
from wincey.model.state import Changes, Object, Scope


class Thing(Object, frozen=True, gc=False):
    tag: ClassVar[str] = "thing"
    name: str

    @property
    def key(self):
        return (self.tag, self.name)


class Keeper:
    """Keeps things in a set that outlives it, as a kernel would."""

    def __init__(self, things):
        self.things, self.changed, self.closed = things, None, False

    async def observe(self, desired, scope):
        return {thing.key: thing for thing in self.things}

    async def apply(self, changes):
        self.things.difference_update(changes.delete)
        self.things.update(changes.put)
        return []

    def watch(self, changed):
        self.changed = changed

    async def close(self):
        self.closed = True


@pytest.fixture
def host(tmp_path):
    things, opened = set(), []

    def open_keeper(directory):
        opened.append(Keeper(things))
        return opened[-1]

    def run():
        state = State(str(tmp_path / "subnet.env"), random.Random(0))
        return PartDriver(Part("things", (Thing,), open_keeper), state, lambda failure: None)

    return things, opened, run


async def test_a_part_that_nobody_needs_stays_shut(host):
    _, opened, run = host
    driver = run()
    assert await driver.observe({}, Scope()) == {}
    await driver.close()
    assert opened == []


async def test_a_later_run_finds_what_an_earlier_one_left_and_gives_the_part_up(host):
    things, opened, run = host
    first, thing = run(), Thing("x")
    assert await first.observe({thing.key: thing}, Scope()) == {}
    await first.apply(Changes(put=[thing]))
    await first.close()
    assert things == {thing}

    second = run()
    assert await second.observe({}, Scope()) == {thing.key: thing}
    await second.apply(Changes(delete=[thing]))
    assert await second.observe({}, Scope()) == {}
    assert opened[-1].closed

    count = len(opened)
    assert await run().observe({}, Scope()) == {}
    assert len(opened) == count, "nothing is left to look for"


async def test_who_watches_is_told_whenever_the_part_is_opened(host):
    _, opened, run = host
    driver, told, thing = run(), [], Thing("x")
    driver.watch(told.append)
    await driver.apply(Changes(put=[thing]))
    opened[-1].changed("somebody else")
    assert told == ["somebody else"]


async def test_a_backend_without_questions_asks_none(tmp_path, monkeypatch):
    config = NetworkConfig.parse('{"Network": "10.3.0.0/16", "Backend": {"Type": "host-gw"}}')
    ask = HostAsk(tmp_path)
    assert await ask(config, None) == {}

    async def question(config, facts, directory):
        return {"directory": str(directory)}

    monkeypatch.setattr(parts, "QUESTIONS", {"host-gw": question})
    assert await ask(config, None) == {"directory": str(tmp_path)}
