"""The list of networks behind servers, ours and flannel's."""

import asyncio

import pytest

from support.flannel05 import old_server
from support.server import CONFIG, put_config, serving
from wincey.model.errors import HistoryLost
from wincey.store.open import StoreOptions, open_store
from wincey.store.remotelist import RemoteNetworkList
from wincey.store.servers import Servers


async def test_networks_come_and_go(tmp_path):
    path = tmp_path / "s.db"
    store = await asyncio.to_thread(put_config, path, CONFIG, "blue")
    with serving(tmp_path / "log", f"--store={store}") as server:
        listed = RemoteNetworkList(Servers([f"http://{server.address}"]), ())
        found, cursor = await listed.read()
        assert list(found) == ["blue"]
        assert b'"Network":"10.5.0.0/16"' in found["blue"].value
        watch = listed.watch(cursor)
        async with asyncio.timeout(40):
            await asyncio.to_thread(put_config, path, '{"Network":"10.6.0.0/16"}', "green")
            [(name, entry)] = await anext(watch)
            assert name == "green"
            assert b"10.6.0.0/16" in entry.value
            own = await open_store(StoreOptions(store=store), "/coreos.com/network")
            await own.delete("/coreos.com/network/blue/config")
            await own.close()
            assert await anext(watch) == [("blue", None)]
        await watch.aclose()
        await listed.close()


async def test_a_flannel_server_that_can_not_list(monkeypatch):
    monkeypatch.setattr("wincey.store.remotelist._AGAIN", 0.1)
    async with old_server(version="0.5.3") as server:
        listed = RemoteNetworkList(Servers([server.url]), ("blue", "_"))
        found, cursor = await listed.read()
        assert list(found) == ["_"]
        with pytest.raises(HistoryLost):
            await anext(listed.watch(cursor))
        await listed.close()
