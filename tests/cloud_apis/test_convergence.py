"""Drivers on gce, tencent-vpc and ali-vpc against fakes of their APIs: whatever happens, the table comes to equal the leases,
what somebody made by hand stays as it is, and there is one clear line about what is wrong."""

import asyncio
import random

import pytest

from support.clouds import CLOUDS
from wincey.backends.base import HostFacts
from wincey.cloud.driver import CloudDriver
from wincey.kernel.diff import diff
from wincey.model.address import Subnet, parse_address
from wincey.model.config import NetworkConfig
from wincey.model.lease import Lease, LeaseKey
from wincey.model.state import Scope


class Clock:
    now = 1000.0


class Site:
    """A host with one lease: its plan by its backend, and its driver."""

    def __init__(self, place, name, number):
        self.place, self.name = place, name
        self.subnet = Subnet.parse(f"10.5.{number}.0/24")
        self.key = LeaseKey(self.subnet)
        self.address = f"10.99.0.{number}"
        self.shown = place.cloud.add(name, self.address)
        self.metadata = place.cloud.fake.listen(instance=name)

    async def start(self):
        """A daemon's start, or its start after a crash."""
        for variable, value in self.place.cloud.environment(self.metadata, self.place.api).items():
            self.place.monkeypatch.setenv(variable, value)
        address = parse_address(self.address)
        facts = HostFacts("eth0", 1500, address, None, address, None)
        found = await self.place.cloud.look_around(self.address)
        config = self.place.config
        self.backend = self.place.cloud.backend(config, HostFacts(**{**_fields(facts), "found": found}))
        self.lease = Lease(self.key, self.backend.attrs())
        self.driver = CloudDriver(None, rng=random.Random(self.name), now=lambda: self.place.clock.now)
        return self

    async def round(self, leases):
        """What the reconciler does at an audit; returns the failures."""
        peers = [item for lease in leases if lease != self.lease for item in self.backend.peer(self.key, lease)]
        desired = {item.key: item for item in (*self.backend.local(self.key), *peers)}
        actual = await self.driver.observe(desired, Scope((), self.place.config.networks))
        return await self.driver.apply(diff(desired, actual))


class Place:
    """A cloud, its API's address, a clock that tests turn, and the sites."""

    def __init__(self, cloud, monkeypatch):
        self.cloud, self.monkeypatch, self.clock = cloud, monkeypatch, Clock()
        self.api = cloud.fake.listen()
        text = f'{{"Network": "10.5.0.0/16", "Backend": {{"Type": "{cloud.backend.type}"}}}}'
        self.config = NetworkConfig.parse(text)
        self.foreign = cloud.foreign()
        self.sites = []

    async def site(self, number):
        site = await Site(self, f"h{number}", number).start()
        self.sites.append(site)
        return site

    async def rounds(self, sites, *, times=40, step=20.0):
        """Audits until the table equals the leases; returns what was said meanwhile."""
        said = []
        leases = [site.lease for site in sites]
        for _ in range(times):
            for site in sites:
                said += [failure.reason for failure in await site.round(leases)]
            if self.cloud.routes() == {str(site.subnet): site.shown for site in sites}:
                break
            self.clock.now += step
            await asyncio.sleep(self.cloud.settling)
        self.check(sites, said)
        return said

    def check(self, sites, said=()):
        assert self.cloud.routes() == {str(site.subnet): site.shown for site in sites}, said
        assert self.cloud.foreign() == self.foreign

    def writes(self):
        return [action for action in self.cloud.fake.actions if action in (*self.cloud.writes, "ReplaceRoutes")]


def _fields(struct):
    return {name: getattr(struct, name) for name in struct.__struct_fields__}


@pytest.fixture(params=CLOUDS)
async def place(request, monkeypatch):
    made = Place(CLOUDS[request.param](), monkeypatch)
    yield made
    for site in made.sites:
        await site.driver.close()
    made.cloud.fake.close()


async def test_hosts_join_and_leave(place):
    joined = []
    for number in (1, 2, 3):
        joined.append(await place.site(number))
        assert await place.rounds(joined) == []
    while len(joined) > 1:
        left = joined.pop(0)
        await left.driver.close()
        assert await place.rounds(joined) == []


async def test_what_is_right_is_left_alone(place):
    sites = [await place.site(number) for number in (1, 2)]
    await place.rounds(sites)
    writes = place.writes()
    for site in sites:  # as after a start
        await site.driver.close()
        await site.start()
    for _ in range(10):
        place.clock.now += 400
        await place.rounds(sites)
    assert place.writes() == writes


async def test_a_route_to_another_instance_is_replaced(place):
    """Somebody's, or that of a host which is gone and whose lease was given to another."""
    site = await place.site(1)
    place.cloud.by_hand(str(site.subnet), "bystander")
    place.foreign = None
    for _ in range(5):
        await site.round([site.lease])
        place.clock.now += 20
    assert place.cloud.routes() == {str(site.subnet): site.shown}


@pytest.mark.parametrize("wrong", [False, True], ids=["create", "replace"])
async def test_killed_between_two_calls(place, wrong):
    site = await place.site(1)
    if wrong:
        place.cloud.by_hand(str(site.subnet), "bystander")
    loop, running, killed = asyncio.get_running_loop(), [], []

    def kill(action):
        if action not in (place.cloud.look, *killed) and not action.startswith(("Describe", "instances", "projects")):
            killed.append(action)
            loop.call_soon_threadsafe(running[-1].cancel)

    place.cloud.fake.after = kill
    for _ in range(8):  # each start gets one call further
        running.append(asyncio.create_task(site.round([site.lease])))
        try:
            await running[-1]
        except asyncio.CancelledError:
            await site.driver.close()
            await site.start()
        place.clock.now += 20
        await asyncio.sleep(place.cloud.settling)
    assert killed
    assert place.cloud.routes() == {str(site.subnet): site.shown}


async def test_throttled(place):
    sites = [await place.site(number) for number in (1, 2)]
    place.cloud.throttle(place.cloud.look, 2)
    place.cloud.throttle(place.cloud.writes[0], 3)
    said = await place.rounds(sites, step=5.0)
    assert said
    assert all("next attempt in" in line and "\n" not in line for line in said)
    assert place.cloud.fake.actions.count(place.cloud.writes[0]) == 5  # three that were refused, two that were not


async def test_denied(place):
    site = await place.site(1)
    place.cloud.deny(place.cloud.writes[0])
    said = [failure.reason for failure in await site.round([site.lease])]
    assert len(said) == 1
    assert place.cloud.denial in said[0]
    assert "\n" not in said[0]
    assert place.cloud.foreign() == place.foreign
    for _ in range(20):  # audits in the next minute: the API hears little of them
        place.clock.now += 3
        await site.round([site.lease])
    assert place.cloud.fake.actions.count(place.cloud.writes[0]) < 8
    place.cloud.deny()
    await place.rounds([site], step=60)


async def test_full(place):
    sites = [await place.site(number) for number in (1, 2)]
    place.cloud.set_quota(1)
    leases = [site.lease for site in sites]
    assert await sites[0].round(leases) == []
    said = [failure.reason for failure in await sites[1].round(leases)]
    assert len(said) == 1
    assert "quota" in said[0].lower()
    assert place.cloud.routes() == {str(sites[0].subnet): sites[0].shown}
    assert place.cloud.foreign() == place.foreign
    place.cloud.set_quota(None)
    for site in sites:  # the quota may be remembered while a daemon runs
        await site.driver.close()
        await site.start()
    await place.rounds(sites, step=60)


async def test_an_instance_that_is_gone_leaves_no_route(place):
    sites = [await place.site(number) for number in (1, 2)]
    await place.rounds(sites)
    place.cloud.remove(sites[1].name)
    await place.rounds(sites[:1])


async def test_a_server_keeps_the_table_for_its_clients(place):
    sites = [await place.site(number) for number in (1, 2, 3)]
    server = sites[0].backend
    wanted = {item.key: item for item in server.for_clients(site.lease for site in sites)}
    driver = sites[0].driver
    for _ in range(10):
        actual = await driver.observe(wanted, Scope((), place.config.networks))
        failures = await driver.apply(diff(wanted, actual))
        place.clock.now += 10
    assert failures == []
    place.check(sites)


async def test_secrets_are_told_to_nobody(place, caplog):
    caplog.set_level("DEBUG")
    site = await place.site(1)
    if not place.cloud.secret:
        return
    place.monkeypatch.setenv("ACCESS_KEY_SECRET", "wrong-secret-key")
    said = [failure.reason for failure in await site.round([site.lease])]
    assert len(said) == 1
    assert "check AccessKeyID and AccessKeySecret" in said[0]
    assert "secret-key" not in said[0] + caplog.text
