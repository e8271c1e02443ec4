"""The client's side: against servers of ours, which are killed and started again, and against those of flannel 0.5."""

import asyncio
import contextlib
import random

import pytest

from support.flannel05 import OldClient, old_server
from support.keys import wait_until
from support.server import free_port, put_config, serving
from wincey.leasing.allocate import Identity
from wincey.leasing.holder import Renewal, acquire
from wincey.model.address import parse_address
from wincey.model.config import NetworkConfig
from wincey.model.errors import DuplicateHost, HistoryLost, KeyConflict, OutOfSubnets, StoreDenied, StoreUnavailable
from wincey.model.lease import LeaseAttrs, LeaseKey
from wincey.store.remote import RemoteRegistry
from wincey.store.servers import Servers


def attrs(number, mac=1):
    return LeaseAttrs(parse_address(f"10.0.0.{number}"), None, "vxlan", b'{"VtepMAC":"aa:bb:cc:00:00:%02x"}' % mac)


@contextlib.asynccontextmanager
async def remote(*urls, **options):
    look = options.pop("look", 60.0)
    registry = RemoteRegistry(Servers(urls, **options), look=look)
    try:
        yield registry
    finally:
        await registry.close()


async def join(registry, number, previous=(), held=None):
    snapshot = await registry.snapshot()
    return await acquire(
        registry, config=NetworkConfig.parse(snapshot.config),
        identity=Identity(parse_address(f"10.0.0.{number}"), None), attrs=attrs(number),
        previous=[LeaseKey.parse(each).v4 for each in previous], held=held, rng=random.Random(number),
    )  # fmt: skip


class Watch:
    """What a watch of a registry tells, in a task."""

    def __init__(self, registry, after):
        self.updates, self._news = [], asyncio.Condition()
        self.task = asyncio.create_task(self._run(registry, after))

    async def _run(self, registry, after):
        try:
            async for batch in registry.watch(after):
                async with self._news:
                    self.updates += batch
                    self._news.notify_all()
        finally:
            async with self._news:
                self._news.notify_all()

    async def until(self, true):
        async with asyncio.timeout(40), self._news:
            await self._news.wait_for(lambda: true(self.updates) or self.task.done())
        if self.task.done():
            await self.task
        return self.updates

    async def close(self):
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


@contextlib.asynccontextmanager
async def watching(registry, after):
    watch = Watch(registry, after)
    try:
        yield watch
    finally:
        await watch.close()


@pytest.fixture
def store(tmp_path):
    return put_config(tmp_path / "s.db")


@pytest.fixture
def server(tmp_path, store):
    with serving(tmp_path / "log", f"--store={store}") as made:
        yield made


async def test_a_lease_from_beginning_to_end(server):
    async with remote(f"http://{server.address}") as registry:
        acquired = await join(registry, 1, previous=["10.5.77.0-24"])
        lease = acquired.lease
        assert str(lease.key) == "10.5.77.0-24"
        assert registry.lease_key(lease.key) in acquired.snapshot.leases
        async with watching(registry, acquired.snapshot.revision) as watch:
            left = await registry.time_left(lease)
            assert 86_000 < left <= 86_400
            lease = await registry.update(lease, attrs(1, mac=2))
            await registry.renew(lease)
            async with remote(f"http://{server.address}") as other:
                theirs = (await join(other, 2)).lease
                assert await other.release(theirs)
                assert not await other.release(theirs)
                with pytest.raises(KeyConflict):
                    await other.time_left(theirs)
            told = await watch.until(lambda updates: len(updates) >= 3)
        assert [update.lease and update.lease.attrs for update in told] == [attrs(1, mac=2), attrs(2), None]
        moved = (await join(registry, 3, held=lease)).lease  # the host's address changed
        assert (moved.key, moved.attrs) == (lease.key, attrs(3))


async def test_a_subnet_of_another_host_is_never_taken(server):
    async with remote(f"http://{server.address}") as mine, remote(f"http://{server.address}") as theirs:
        lease = (await join(mine, 1, previous=["10.5.77.0-24"])).lease
        await theirs.release(lease)  # as if it had expired while we were cut off
        assert str((await join(theirs, 2, previous=["10.5.77.0-24"])).lease.key) == "10.5.77.0-24"
        with pytest.raises(KeyConflict):
            await mine.renew(lease)
        with pytest.raises(KeyConflict):
            await mine.time_left(lease)
        again = (await join(mine, 1, previous=["10.5.77.0-24"], held=lease)).lease
        assert str(again.key) != "10.5.77.0-24"


async def test_a_changed_config_is_told_at_once(server, tmp_path):
    async with remote(f"http://{server.address}", host="h1 1") as registry:
        acquired = await join(registry, 1)
        async with watching(registry, acquired.snapshot.revision) as watch:
            await asyncio.sleep(0.3)
            await asyncio.to_thread(put_config, tmp_path / "s.db", '{"Network":"10.6.0.0/16"}')
            updates = await watch.until(lambda updates: any(update.what == "config" for update in updates))
    assert b"10.6.0.0/16" in next(update.config for update in updates if update.what == "config")


async def test_two_live_hosts_with_one_address(server):
    url = f"http://{server.address}"
    async with remote(url, host="first 1111") as first, remote(url, host="second 2222") as second:
        held = await join(first, 1)
        async with watching(first, held.snapshot.revision):
            await asyncio.sleep(0.3)
            with pytest.raises(DuplicateHost, match=r"second \(2222\).*first \(1111\)"):
                await join(second, 1)
        # The first one is gone: its address can be had.
        wait_until(lambda: "leases?next" in server.log and " - 0" in server.log)
        assert (await join(second, 1)).lease.key == held.lease.key
    assert "tries to use our public address 10.0.0.1" in server.log


async def test_a_host_that_restarts_is_itself(server):
    url = f"http://{server.address}"
    async with remote(url, host="first 1111") as before:
        held = await join(before, 1)
        async with watching(before, held.snapshot.revision), remote(url, host="first 1111") as after:
            assert (await join(after, 1)).lease.key == held.lease.key


async def test_a_full_pool(tmp_path):
    config = '{"Network":"10.5.0.0/16","SubnetMin":"10.5.1.0","SubnetMax":"10.5.2.0","Backend":{"Type":"vxlan"}}'
    with serving(tmp_path / "log", f"--store={put_config(tmp_path / 's.db', config)}") as server:
        async with remote(f"http://{server.address}") as registry:
            keys = {(await join(registry, number)).lease.key for number in (1, 2)}
            assert len(keys) == 2
            with pytest.raises(OutOfSubnets, match="all 2 subnets"):
                await registry.create(keys.pop(), attrs(3))


async def test_refused(tmp_path, store):
    tokens = tmp_path / "tokens"
    tokens.write_text("token-0123456789abcdef blue\n")
    with serving(tmp_path / "log", f"--store={store}", f"--remote-token-file={tokens}") as server:
        for token in ("", "token-0123456789abcdef"):
            async with remote(f"http://{server.address}", token=token) as registry:
                with pytest.raises(StoreDenied, match="remote-token-file"):
                    await registry.snapshot()


async def test_nobody_there():
    async with remote(f"http://127.0.0.1:{free_port()}") as registry:
        with pytest.raises(StoreUnavailable, match="no server could serve us"):
            await registry.snapshot()


async def test_server_killed_while_twenty_clients_run(tmp_path, store):
    """They go on at the other server where they were, renew there, and nobody gets what another one has."""
    with (
        serving(tmp_path / "log1", f"--store={store}") as first,
        serving(tmp_path / "log2", f"--store={store}") as second,
    ):
        urls = (f"http://{first.address}", f"http://{second.address}")
        async with contextlib.AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(remote(*urls, host=f"h{n} {n}")) for n in range(1, 21)]
            held = await asyncio.gather(*(join(client, n) for n, client in enumerate(clients, 1)))
            assert len({each.lease.key for each in held}) == 20
            outages = [[] for _ in clients]
            for client, told in zip(clients, outages, strict=True):
                client.on_outage(told.append)
            revision = max(each.snapshot.revision for each in held)
            watches = [await stack.enter_async_context(watching(client, revision)) for client in clients]
            await asyncio.sleep(0.5)
            first.kill()
            # Renewal resumes on the other server.
            renewals = [Renewal(c, each.lease, 3600, random.Random(1)) for c, each in zip(clients, held, strict=True)]
            renewed = await asyncio.gather(
                *(client.renew(each.lease) for client, each in zip(clients, held, strict=True))
            )
            assert [lease.key for lease in renewed] == [each.lease.key for each in held]
            assert all(renewal.lease.key == lease.key for renewal, lease in zip(renewals, renewed, strict=True))
            # News arrive over the other server, with nothing lost in between.
            async with remote(urls[1]) as late:
                new = (await join(late, 99)).lease
            for watch in watches:
                updates = await watch.until(lambda updates: any(u.lease and u.lease.key == new.key for u in updates))
                assert all(update.what == "lease" for update in updates)
            assert not any(outages)  # one server was always there
            # Both gone, then one back: an outage is told, and its end.
            second.kill()
            async with asyncio.timeout(40):
                while not all(told and told[-1] for told in outages):
                    await asyncio.sleep(0.05)
            await asyncio.to_thread(first.start)
            async with asyncio.timeout(60):
                while not all(told[-1] is None for told in outages):
                    await asyncio.sleep(0.05)
            snapshot = await clients[0].snapshot()
            assert len(snapshot.leases) == 21
            assert all(
                lease.attrs == attrs(int(n)) for lease in snapshot.leases.values() for n in [lease.attrs.public_ip[3]]
            )


# flannel 0.5 at the other end


@pytest.mark.parametrize("version", ["0.5.3", "0.5.6"])
async def test_a_flannel_server(version):
    async with old_server(version=version) as server, remote(server.url, host="h 1", look=0.2) as registry:
        acquired = await join(registry, 1, previous=["10.5.77.0-24"])
        lease = acquired.lease
        assert str(lease.key) == "10.5.40.0-24"  # a flannel server chooses by itself
        # Renewing takes a server that says whose it is: flannel's would overwrite another host's.
        assert 86_000 < await registry.time_left(lease) <= 86_400
        await registry.renew(lease)
        async with watching(registry, acquired.snapshot.revision) as watch:
            await server.put("10.5.50.0-24", {"PublicIP": "10.0.0.2"})
            await server.put(
                "10.5.51.0-24", {"PublicIP": "10.0.0.3", "BackendType": "vxlan", "BackendData": {"VNI": 1}}
            )
            await server.remove("10.5.50.0-24")
            updates = await watch.until(lambda updates: len(updates) >= 4)
            assert [(update.key.rpartition("/")[2], bool(update.lease)) for update in updates[-3:]] == [
                ("10.5.50.0-24", True), ("10.5.51.0-24", True), ("10.5.50.0-24", False),
            ]  # fmt: skip
            assert not updates[-2].lease.permanent
            # One poll at a time, however long it takes: flannel's server would keep those that are given up.
            await asyncio.sleep(1)
            polls = [query["next"] for _, path, query, _ in server.requests if "next" in query]
            assert len(polls) == len(set(polls))
            # The config is looked at besides.
            server.config = {
                "Network": "10.6.0.0/16",
                "SubnetMin": "10.6.1.0",
                "SubnetMax": "10.6.9.0",
                "SubnetLen": 24,
            }
            await watch.until(lambda updates: any(update.what == "config" for update in updates))
            # The history is gone: everything has to be read anew, also when there is nothing left.
            server.leases.clear()
            await server.forget()
            with pytest.raises(HistoryLost):
                await watch.until(lambda _: False)
        assert (await registry.snapshot()).leases == {}
        with pytest.raises(KeyConflict):
            await registry.time_left(lease)
        assert await registry.release(lease) is False if version == "0.5.3" else True


async def test_two_flannel_servers_and_no_config_yet():
    async with old_server() as first, old_server(twin=first) as second, remote(first.url, second.url) as registry:
        acquired = await join(registry, 1)
        async with watching(registry, acquired.snapshot.revision) as watch:
            await asyncio.sleep(0.2)
            await first.stop()
            await second.put("10.5.50.0-24", {"PublicIP": "10.0.0.2"})
            await watch.until(lambda updates: len(updates) >= 1)
        second.config = None
        assert (await registry.snapshot()).config is None


@pytest.mark.parametrize("version", ["0.5.3", "0.5.6"])
def test_a_flannel_client(server, version):
    client = OldClient(server.port, version=version)
    assert client.config() == {
        "Network": "10.5.0.0/16", "SubnetMin": "10.5.1.0", "SubnetMax": "10.5.255.0", "SubnetLen": 24,
        "Backend": {"Type": "vxlan"},
    }  # fmt: skip
    lease = client.acquire("10.0.0.1")
    assert client.acquire("10.0.0.1")["Subnet"] == lease["Subnet"]
    assert client.renew(lease)["Subnet"] == lease["Subnet"]
    assert client.watch() == {lease["Subnet"]}
    peer = OldClient(server.port).acquire("10.0.0.2", "aa:bb:cc:00:00:02")
    assert client.watch() == {lease["Subnet"], peer["Subnet"]}
    client.ask("DELETE", f"/leases/{peer['Subnet'].replace('/', '-')}")
    assert client.watch() == {lease["Subnet"]}


def test_a_flannel_client_without_permission(tmp_path, store):
    tokens = tmp_path / "tokens"
    tokens.write_text("token-0123456789abcdef *\n")
    with (
        serving(tmp_path / "log", f"--store={store}", f"--remote-token-file={tokens}") as server,
        pytest.raises(RuntimeError, match="401"),
    ):
        OldClient(server.port).acquire("10.0.0.1")
