"""Taking and keeping leases on real stores: many hosts at once, loss, theft, reservations, renewal."""

import asyncio
import random

import msgspec
import pytest

from wincey.leasing.allocate import Identity
from wincey.leasing.holder import Renewal, acquire
from wincey.model.address import Subnet, parse_address
from wincey.model.config import NetworkConfig
from wincey.model.errors import OutOfSubnets
from wincey.model.lease import LeaseAttrs, LeaseKey
from wincey.store.open import StoreOptions, open_store
from wincey.store.registry import Registry

CONFIG = NetworkConfig.parse(b'{"Network": "10.3.0.0/16"}')
DUAL = NetworkConfig.parse(b'{"Network": "10.3.0.0/16", "EnableIPv6": true, "IPv6Network": "fd00:3::/48"}')


@pytest.fixture(
    params=["sqlite", pytest.param("v3", marks=pytest.mark.etcd), pytest.param("v2", marks=pytest.mark.etcd)]
)
async def make_registry(request, tmp_path):
    """Makes registries that share one network, each with a store client of its own, as on several hosts."""
    prefix = f"/net-{random.randrange(10**9)}"
    if request.param == "sqlite":
        options = StoreOptions(store=f"sqlite:{tmp_path / 'store'}")
    else:
        server = request.getfixturevalue("etcd34")
        options = StoreOptions(api=request.param, endpoints=[server.url])
    stores = []

    async def make():
        stores.append(await open_store(options, prefix))
        return Registry(stores[-1], prefix)

    yield make
    for store in stores:
        await store.close()


def host(number):
    address = bytes([10, 99, number // 256, number % 256])
    return Identity(address, None), LeaseAttrs(address, backend_type="host-gw")


async def join(registry, number, config=CONFIG, previous=()):
    identity, attrs = host(number)
    if config.enable_ipv6:
        attrs = msgspec.structs.replace(attrs, public_ipv6=parse_address(f"fd00:99::{number:x}"))
    return await acquire(
        registry, config=config, identity=identity, attrs=attrs, previous=previous, rng=random.Random(number)
    )


async def test_200_hosts_join_at_once(make_registry, record_property):
    """Flannel's hosts exit on the first collision. The rounds that it took are part of the report."""
    registries = [await make_registry() for _ in range(20)]
    results = await asyncio.gather(*(join(registries[number % 20], number) for number in range(1, 201)))
    rounds = [result.rounds for result in results]
    figures = f"rounds: median {sorted(rounds)[100]}, most {max(rounds)}, sum {sum(rounds)}"
    record_property("figure", f"200 hosts join at once, 255 subnets, {registries[0].store.name}: {figures}")
    keys = [result.lease.key for result in results]
    assert len(set(keys)) == 200
    snapshot = await registries[0].snapshot()
    assert {lease.key for lease in snapshot.leases.values()} == set(keys)


async def test_dual_stack_hosts_that_join_at_once_share_neither_half(make_registry):
    """Create-if-absent guards the pair; each half has to be unique as well."""
    config = NetworkConfig.parse(
        b'{"Network": "10.3.0.0/16", "SubnetMax": "10.3.24.0", "EnableIPv6": true, "IPv6Network": "fd00:3::/48"}'
    )
    registries = [await make_registry() for _ in range(5)]
    results = await asyncio.gather(*(join(registries[number % 5], number, config) for number in range(1, 21)))
    assert len({result.lease.key.v4 for result in results}) == 20
    assert len({result.lease.key.v6 for result in results}) == 20


async def test_a_full_pool_serves_each_subnet_once_and_then_says_so(make_registry):
    config = NetworkConfig.parse(b'{"Network": "10.3.0.0/24", "SubnetLen": 28}')
    registry = await make_registry()
    results = await asyncio.gather(*(join(registry, number, config) for number in range(1, 16)))
    assert len({result.lease.key for result in results}) == 15
    with pytest.raises(OutOfSubnets, match="all 15 subnets"):
        await join(registry, 99, config)


async def test_the_same_host_gets_the_same_lease_and_watchers_see_nothing(make_registry):
    registry = await make_registry()
    first = await join(registry, 1)
    again = await join(registry, 1)
    assert again.lease.key == first.lease.key
    watch = registry.watch(first.snapshot.revision)
    await join(registry, 2)
    updates = await asyncio.wait_for(anext(watch), 10)
    await watch.aclose()
    assert {update.lease.attrs.public_ip for update in updates} == {host(2)[0].public_ip}


async def test_a_new_address_or_backend_is_published_on_the_same_lease(make_registry):
    registry = await make_registry()
    first = await join(registry, 1)
    identity, attrs = host(1)
    changed = msgspec.structs.replace(
        attrs, backend_type="vxlan", backend_data=b'{"VNI":1,"VtepMAC":"0e:00:00:00:00:01"}'
    )
    again = await acquire(registry, config=CONFIG, identity=identity, attrs=changed, previous=[], rng=random.Random(1))
    assert again.lease.key == first.lease.key
    assert (await registry.read(first.lease.key)).attrs == changed


async def test_previous_subnet_is_kept_after_the_lease_was_deleted(make_registry):
    registry = await make_registry()
    previous = [Subnet.parse("10.3.77.0/24")]
    assert (await join(registry, 1, previous=previous)).lease.key == LeaseKey.parse("10.3.77.0-24")
    assert (await join(registry, 2, previous=previous)).lease.key != LeaseKey.parse("10.3.77.0-24")


async def test_our_own_lease_with_garbage_in_it_is_put_back(make_registry):
    registry = await make_registry()
    first = await join(registry, 1)
    key = registry.lease_key(first.lease.key)
    await registry.store.replace(await registry.store.get(key), b"garbage", None)
    again = await join(registry, 1, previous=first.lease.key.subnets)
    assert again.lease.key == first.lease.key
    assert (await registry.read(first.lease.key)).attrs == host(1)[1]


async def test_a_reservation_holds(make_registry):
    """On etcd v3 flannel turns every reservation into an ordinary lease."""
    registry = await make_registry()
    _, attrs = host(1)
    reserved = LeaseKey.parse("10.3.50.0-24")
    await registry.store.create(registry.lease_key(reserved), attrs.encode(), None)
    first = await join(registry, 1)
    assert first.lease.key == reserved
    assert first.lease.permanent
    assert await registry.time_left(first.lease) is None
    again = await join(registry, 1)
    assert again.lease.permanent
    assert await registry.time_left(again.lease) is None


async def test_going_dual_stack_keeps_the_ipv4_subnet(make_registry):
    registry = await make_registry()
    old = await join(registry, 1)
    new = await join(registry, 1, DUAL)
    assert new.lease.key.v4 == old.lease.key.v4
    assert list(new.snapshot.leases) == [registry.lease_key(new.lease.key)]


async def test_renewal_ends_when_the_lease_is_gone_or_anothers(make_registry):
    registry = await make_registry()
    for change in (
        lambda entry: registry.store.delete(entry.key),
        lambda entry: registry.store.replace(entry, host(9)[1].encode(), 3600),
    ):
        lease = (await join(registry, 1)).lease
        renewal = Renewal(registry, lease, 3600, random.Random(1))
        task = asyncio.create_task(renewal.run())
        await change(await registry.store.get(registry.lease_key(lease.key)))
        renewal.soon()
        await asyncio.wait_for(task, 10)


async def test_renewal_after_an_administrator_shortened_the_lease(make_registry):
    registry = await make_registry()
    lease = (await join(registry, 1)).lease
    key = registry.lease_key(lease.key)
    renewal = Renewal(registry, lease, 3600, random.Random(1))
    task = asyncio.create_task(renewal.run())
    shortened = await registry.store.replace(await registry.store.get(key), lease.attrs.encode(), 600)
    renewal.seen(msgspec.structs.replace(lease, revision=shortened.revision, handle=shortened.handle))
    for _ in range(200):
        await asyncio.sleep(0.02)
        if (await registry.store.time_left(await registry.store.get(key)) or 0) > 80_000:
            break
    assert await registry.store.time_left(await registry.store.get(key)) > 80_000
    assert not task.done()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_lease_that_is_near_its_end_is_renewed_at_once(make_registry):
    """As after rounds in which its host could not have what it should, and went on with what it had."""
    registry = await make_registry()
    lease = (await join(registry, 1)).lease
    key = registry.lease_key(lease.key)
    shortened = await registry.store.replace(await registry.store.get(key), lease.attrs.encode(), 600)
    lease = msgspec.structs.replace(lease, revision=shortened.revision, handle=shortened.handle)
    ends = asyncio.get_running_loop().time() + 600
    renewal = Renewal(registry, lease, 3600, random.Random(1), ends)
    task = asyncio.create_task(renewal.run())
    async with asyncio.timeout(10):
        while renewal.left() < 80_000:
            await asyncio.sleep(0.02)
    assert await registry.store.time_left(await registry.store.get(key)) > 80_000
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_margin_of_almost_a_day_renews_each_time_it_is_due(make_registry):
    """A renewal that is due is done, however much time is left; else it would be due again at once, and again."""
    registry = await make_registry()
    lease = (await join(registry, 1)).lease
    margin, calls = 86_400 - 0.2, []

    class Counting:
        async def time_left(self, lease):
            calls.append("time left")
            return 86_399.9

        async def renew(self, lease):
            calls.append("renew")
            return lease

    task = asyncio.create_task(Renewal(Counting(), lease, margin, random.Random(1)).run())
    await asyncio.sleep(0.7)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert 2 <= len(calls) <= 8
    assert calls.count("renew") == calls.count("time left")


async def test_a_new_address_keeps_the_lease_that_is_held(make_registry):
    registry = await make_registry()
    held = (await join(registry, 1)).lease
    identity, attrs = host(2)
    again = await acquire(
        registry, config=CONFIG, identity=identity, attrs=attrs, previous=[], held=held, rng=random.Random(1)
    )
    assert again.lease.key == held.key
    assert (await registry.read(held.key)).attrs == attrs
