"""A server's keeper of tables over a real store: networks with and without a name, that come, change and fail."""

import asyncio
import contextlib
import random

from wincey.agent.cloudtables import CloudTables
from wincey.model.address import parse_address
from wincey.model.lease import LeaseAttrs, LeaseKey
from wincey.store.open import StoreOptions, open_store
from wincey.store.registry import Registry

PREFIX = "/coreos.com/network"


async def eventually(true, timeout=40.0):
    async with asyncio.timeout(timeout):
        while not await asyncio.to_thread(true):
            await asyncio.sleep(0.1)


async def test_networks_of_a_store(aws, tmp_path, caplog):
    network = await asyncio.to_thread(aws.network)
    text = '{{"Network": "{}", "Backend": {{"Type": "{}", "RouteTableID": "{}"}}}}'
    store = await open_store(StoreOptions(store=f"sqlite:{tmp_path / 's.db'}"), PREFIX)
    unnamed, blue = Registry(store, PREFIX), Registry(store, f"{PREFIX}/blue")

    async def take(registry, key, number):
        attrs = LeaseAttrs(parse_address(network.addresses[number]), backend_type="aws-vpc")
        await registry.create(LeaseKey.parse(key), attrs)

    keeping = asyncio.create_task(CloudTables(store, PREFIX, random.Random(1)).run())
    try:
        await unnamed.put_config(text.format("10.3.0.0/16", "aws-vpc", network.main).encode())
        await take(unnamed, "10.3.1.0-24", 0)
        await eventually(lambda: network.hosts() == {"10.3.1.0/24": network.instances[0]})
        # A network that comes later, whose config is wrong at first.
        await blue.put_config(
            text.format("10.4.0.0/16", "aws-vpc", network.main).replace(f'"{network.main}"', "7").encode()
        )
        await take(blue, "10.4.1.0-24", 1)
        await eventually(lambda: "RouteTableID is 7" in caplog.text)
        await blue.put_config(text.format("10.4.0.0/16", "aws-vpc", network.main).encode())
        both = {"10.3.1.0/24": network.instances[0], "10.4.1.0/24": network.instances[1]}
        await eventually(lambda: network.hosts() == both)
        # One bad lease is that lease's matter.
        await store.create(f"{PREFIX}/subnets/10.3.9.0-24", b"{", 60.0)
        await take(unnamed, "10.3.2.0-24", 2)
        await eventually(lambda: network.hosts() == {**both, "10.3.2.0/24": network.instances[2]})
        # A backend without a cloud is none of a keeper's business.
        calls = len(aws.calls)
        await blue.put_config(b'{"Network": "10.4.0.0/16", "Backend": {"Type": "vxlan"}}')
        await take(unnamed, "10.3.3.0-24", 0)
        await eventually(lambda: network.hosts().keys() >= {"10.3.3.0/24", "10.4.1.0/24"})
        assert len(aws.calls) > calls
        assert not keeping.done()
    finally:
        keeping.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await keeping
        await store.close()
