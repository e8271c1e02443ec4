"""One network in a store: what other programs see of it, what it makes of what they put there."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import msgspec
import pytest

from support.stores import Backend
from wincey.model.address import parse_address
from wincey.model.errors import BadLease, HistoryLost, KeyConflict, KeyExists
from wincey.model.lease import TTL, LeaseAttrs, LeaseKey
from wincey.store.kv import KeyValueStore
from wincey.store.registry import BadEntry, Registry, Update

KEY = LeaseKey.parse("10.3.1.0-24")
OTHER = LeaseKey.parse("10.3.2.0-24")
DUAL = LeaseKey.parse("10.12.13.0-24&fd00:12:13::-56")
UDP = LeaseAttrs(parse_address("10.99.0.2"))
VXLAN = LeaseAttrs(parse_address("10.99.0.2"), None, "vxlan", b'{"VNI":1,"VtepMAC":"ce:8b:74:a6:9d:80"}')
BOTH = LeaseAttrs(parse_address("10.99.0.2"), parse_address("fd00:99::2"), "host-gw")


@pytest.fixture
def registry(store: KeyValueStore, prefix: str) -> Registry:
    return Registry(store, prefix)


class Updates:
    """What a registry's watch tells."""

    def __init__(self, registry: Registry, after: int) -> None:
        self._watch = registry.watch(after)
        self._pending: list[Update] = []

    async def take(self, count: int) -> list[Update]:
        async with asyncio.timeout(60):
            while len(self._pending) < count:
                self._pending += await anext(self._watch)
        taken, self._pending = self._pending[:count], self._pending[count:]
        assert all(update.revision > 0 for update in taken)
        return [msgspec.structs.replace(update, revision=0) for update in taken]

    async def close(self) -> None:
        assert not self._pending, "more was told than asked for"
        await self._watch.aclose()  # type: ignore[attr-defined]  # it is a generator


@contextlib.asynccontextmanager
async def updates(registry: Registry, after: int | None = None) -> AsyncIterator[Updates]:
    watch = Updates(registry, (await registry.snapshot()).revision if after is None else after)
    try:
        yield watch
    except BaseException:
        watch._pending.clear()
        raise
    finally:
        await watch.close()


# What others see


@pytest.mark.parametrize(
    ("key", "attrs", "v3", "v2"),
    [
        (KEY, UDP, '{"PublicIP":"10.99.0.2","PublicIPv6":null}', '{"PublicIP":"10.99.0.2"}'),
        (
            KEY,
            VXLAN,
            '{"PublicIP":"10.99.0.2","PublicIPv6":null,"BackendType":"vxlan",'
            '"BackendData":{"VNI":1,"VtepMAC":"ce:8b:74:a6:9d:80"}}',
            '{"PublicIP":"10.99.0.2","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"ce:8b:74:a6:9d:80"}}',
        ),
        (DUAL, BOTH, '{"PublicIP":"10.99.0.2","PublicIPv6":"fd00:99::2","BackendType":"host-gw"}', None),
    ],
    ids=["udp", "vxlan", "dual"],
)
async def test_keys_and_values_are_flannels_byte_by_byte(
    backend: Backend, registry: Registry, key: LeaseKey, attrs: LeaseAttrs, v3: str, v2: str | None
) -> None:
    expected = (v2 or v3) if registry.store.values_v2 else v3
    lease = await registry.create(key, LeaseAttrs(parse_address("192.0.2.1")))
    lease = await registry.update(lease, attrs)
    assert await backend.keys(f"{registry.prefix}/") == [f"{registry.prefix}/subnets/{key}"]
    assert await backend.read(f"{registry.prefix}/subnets/{key}") == expected
    lease = await registry.renew(lease)
    assert await backend.read(f"{registry.prefix}/subnets/{key}") == expected, "renewing leaves the value alone"
    assert TTL - 60 < (await registry.time_left(lease) or 0) <= TTL


async def test_the_config_is_read_where_users_put_it(backend: Backend, registry: Registry) -> None:
    assert await registry.config() is None
    assert (await registry.snapshot()).config is None
    text = '{ "Network": "10.3.0.0/16",\n  "Backend": { "Type": "vxlan" } }'
    async with updates(registry) as watch:
        await backend.put(f"{registry.prefix}/config", text)
        assert await registry.config() == (await registry.snapshot()).config == text.encode()
        await registry.put_config(b"{}")
        assert await backend.read(registry.config_key) == "{}"
        await backend.remove(registry.config_key)
        assert [(update.what, update.config) for update in await watch.take(3)] == [
            ("config", text.encode()),
            ("config", b"{}"),
            ("config", None),
        ]
    await registry.put_config(b"[]")
    assert await backend.read(registry.config_key) == "[]"


# Leases


async def test_a_leases_life_as_told_to_others(registry: Registry) -> None:
    async with updates(registry) as watch:
        made = await registry.create(KEY, UDP)
        changed = await registry.update(made, VXLAN)
        renewed = await registry.renew(changed)
        assert (renewed.key, renewed.attrs, renewed.created) == (KEY, VXLAN, made.created)
        assert await registry.read(KEY) == renewed
        snapshot = await registry.snapshot()
        assert (snapshot.leases, snapshot.bad) == ({registry.lease_key(KEY): renewed}, {})
        assert await registry.release(renewed)
        key = registry.lease_key(KEY)
        assert await watch.take(3) == [
            Update(key, "lease", lease=made),
            Update(key, "lease", lease=changed),
            Update(key, "lease"),
        ]
    assert await registry.read(KEY) is None
    assert (await registry.snapshot()).leases == {}


async def test_a_lease_is_changed_only_by_who_saw_it_last(registry: Registry) -> None:
    seen = await registry.create(KEY, UDP)
    with pytest.raises(KeyExists):
        await registry.create(KEY, VXLAN)
    changed = await registry.update(seen, VXLAN)
    with pytest.raises(KeyConflict):
        await registry.update(seen, UDP)
    with pytest.raises(KeyConflict):
        await registry.renew(seen)
    with pytest.raises(KeyConflict):
        await registry.release(seen)
    assert await registry.read(KEY) == changed


@pytest.mark.parametrize(
    ("value", "attrs"),
    [
        ('{"PublicIP":"10.99.0.2"}', UDP),
        (
            '{"PublicIP":"10.99.0.2","BackendType":"vxlan","BackendData":{"VtepMAC":"aa:bb:cc:dd:ee:ff"}}',
            LeaseAttrs(UDP.public_ip, None, "vxlan", b'{"VtepMAC":"aa:bb:cc:dd:ee:ff"}'),
        ),
        ('{"PublicIP":"10.99.0.2","PublicIPv6":null,"Unknown":[1,{"x":null}]}', UDP),
    ],
)
async def test_values_of_any_era_are_read(backend: Backend, registry: Registry, value: str, attrs: LeaseAttrs) -> None:
    async with updates(registry) as watch:
        await backend.put(registry.lease_key(KEY), value)
        lease = await registry.read(KEY)
        assert lease
        assert lease.attrs == attrs
        assert (await registry.snapshot()).leases == {registry.lease_key(KEY): lease}
        assert await watch.take(1) == [Update(registry.lease_key(KEY), "lease", lease=lease)]


# Reservations


async def test_a_lease_put_by_hand_without_a_limit_is_a_reservation_that_holds(
    backend: Backend, registry: Registry
) -> None:
    await backend.put(registry.lease_key(KEY), '{"PublicIP":"10.99.0.2"}')
    reserved = await registry.read(KEY)
    assert reserved
    assert reserved.permanent
    assert await registry.time_left(reserved) is None
    with pytest.raises(KeyConflict):
        await registry.renew(reserved)
    published = await registry.update(reserved, VXLAN)
    assert published.permanent
    assert await registry.read(KEY) == published
    assert await registry.time_left(published) is None


async def test_a_lease_in_use_is_made_a_reservation_by_hand(backend: Backend, registry: Registry) -> None:
    lease = await registry.create(KEY, VXLAN)
    async with updates(registry) as watch:
        await backend.put(registry.lease_key(KEY), await backend.read(registry.lease_key(KEY)))
        (update,) = await watch.take(1)
    assert update.lease
    assert update.lease.permanent
    assert update.lease.attrs == VXLAN
    with pytest.raises(KeyConflict):
        await registry.renew(lease)
    assert await registry.read(KEY) == update.lease, "its holder, renewing, does not undo it"


# What does not belong there


GARBAGE = {
    "garbage": "x",
    "10.3.7.0": UDP.encode().decode(),
    "10.3.8.0-33": UDP.encode().decode(),
    "10.3.9.0-24": "not JSON",
    "10.3.10.0-24": "[]",
    "10.3.11.0-24": '{"PublicIP":"nowhere"}',
    "10.3.12.0-24": '{"PublicIP":"10.99.0.2","BackendData":' + "[" * 5000,
    "é 漢 %41": UDP.encode().decode(),
    "deeper/still": "x",
}


async def test_garbage_concerns_itself_alone(backend: Backend, registry: Registry) -> None:
    good = await registry.create(KEY, VXLAN)
    async with updates(registry) as watch:
        for name, value in GARBAGE.items():
            await backend.put(f"{registry.prefix}/subnets/{name}", value)
        await backend.put(f"{registry.prefix}/subnets-other/foo", "x")
        await backend.put(f"{registry.prefix}/subnetsfoo", "x")
        also_good = await registry.create(OTHER, UDP)
        told = await watch.take(len(GARBAGE) + 1)
        bad = [update.bad for update in told[:-1] if update.bad]
        assert [entry.key for entry in bad] == [f"{registry.prefix}/subnets/{name}" for name in GARBAGE]
        assert all(entry.reason for entry in bad)
        assert told[-1].lease == also_good

        snapshot = await registry.snapshot()
        assert snapshot.leases == {registry.lease_key(KEY): good, registry.lease_key(OTHER): also_good}
        assert snapshot.bad == {entry.key: entry for entry in bad}
        with pytest.raises(BadLease):
            await registry.read(LeaseKey.parse("10.3.9.0-24"))

        await backend.remove(f"{registry.prefix}/subnets/garbage")
        await backend.put(registry.lease_key(LeaseKey.parse("10.3.9.0-24")), '{"PublicIP":"10.99.0.9"}')
        gone, mended = await watch.take(2)
        assert gone == Update(f"{registry.prefix}/subnets/garbage", "lease")
        assert mended.lease
        assert mended.lease.attrs.public_ip == parse_address("10.99.0.9")


async def test_a_good_lease_turned_bad_is_told_as_bad(backend: Backend, registry: Registry) -> None:
    lease = await registry.create(KEY, VXLAN)
    async with updates(registry) as watch:
        await backend.put(registry.lease_key(KEY), "{")
        (update,) = await watch.take(1)
    assert update.lease is None
    assert isinstance(update.bad, BadEntry)
    assert update.bad.revision > lease.revision


@pytest.mark.parametrize("backend", [pytest.param("etcd34 v3", marks=pytest.mark.etcd)], indirect=True)
async def test_a_key_that_is_no_text_concerns_itself_alone(backend: Backend, registry: Registry) -> None:
    good = await registry.create(KEY, VXLAN)
    async with updates(registry) as watch:
        await backend.put(f"{registry.prefix}/subnets/\udcff\udc80", "x")  # the bytes ff 80 on a command line
        also_good = await registry.create(OTHER, UDP)
        bad, lease = await watch.take(2)
        assert bad.bad
        assert lease.lease == also_good
    snapshot = await registry.snapshot()
    assert list(snapshot.leases.values()) == [good, also_good]
    assert len(snapshot.bad) == 1


async def test_networks_below_a_prefix_do_not_mix(store: KeyValueStore, registry: Registry) -> None:
    named = Registry(store, f"{registry.prefix}/blue/")
    async with updates(registry) as watch, updates(named) as watch_named:
        await named.put_config(b"{}")
        blue = await named.create(KEY, UDP)
        lease = await registry.create(KEY, VXLAN)
        assert await watch.take(1) == [Update(registry.lease_key(KEY), "lease", lease=lease)]
        assert [update.what for update in await watch_named.take(2)] == ["config", "lease"]
    assert (await registry.snapshot()).leases == {registry.lease_key(KEY): lease}
    assert (await named.snapshot()).leases == {named.lease_key(KEY): blue}
    assert await registry.config() is None


async def test_host_claims_are_told_and_are_no_leases(store: KeyValueStore, registry: Registry) -> None:
    key = registry.claim_key("10.99.0.2")
    async with updates(registry) as watch:
        entry = await store.create(key, b'{"host":"a"}', 100)
        await store.delete(key)
        assert await watch.take(2) == [Update(key, "claim", claim=entry), Update(key, "claim")]
        entry = await store.create(key, b'{"host":"b"}', 100)
        snapshot = await registry.snapshot()
        assert (snapshot.claims, snapshot.leases, snapshot.bad) == ({key: entry}, {}, {})
        await watch.take(1)


async def test_all_leases_removed_by_hand_at_once(backend: Backend, registry: Registry) -> None:
    for number in range(1, 4):
        await registry.create(LeaseKey.parse(f"10.3.{number}.0-24"), UDP)
    start = (await registry.snapshot()).revision
    watch = Updates(registry, start)
    await backend.remove(f"{registry.prefix}/subnets/")
    try:
        told = await watch.take(3)
        assert [(update.what, update.lease, update.bad) for update in told] == [("lease", None, None)] * 3
    except HistoryLost:
        assert registry.store.values_v2, "only etcd v2 tells it in one event for all"
    assert (await registry.snapshot()).leases == {}
    await watch.close()


@pytest.mark.parametrize("prefix", ["/coreos.com/network", "coreos.com/network/", "//coreos.com/network"])
def test_prefixes_as_people_write_them(store: KeyValueStore, prefix: str) -> None:
    registry = Registry(store, prefix)
    assert registry.config_key == "/coreos.com/network/config"
    assert registry.lease_key(KEY) == "/coreos.com/network/subnets/10.3.1.0-24"
