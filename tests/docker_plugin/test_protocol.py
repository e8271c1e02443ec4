"""The plugin as Docker speaks to it: requests over its socket, against a store with a host's lease in it."""

import asyncio
import contextlib
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys

import pytest

from support.engine import until
from support.netns import netns
from support.stores import SqliteBackend
from wincey.docker.blocks import Blocks
from wincey.docker.driver import Driver
from wincey.docker.errors import Refused
from wincey.docker.fabric import Fabrics
from wincey.docker.state import StateFile
from wincey.model.address import Subnet
from wincey.model.errors import WinceyError

PREFIX = "/coreos.com/network"
CONFIG = '{"Network": "10.3.0.0/16", "SubnetMax": "10.3.127.0", "Backend": {"Type": "vxlan"}}'
WEB = "10.3.200.0/22"


def lease(number):
    return json.dumps({"PublicIP": f"10.99.0.{number}", "BackendType": "vxlan", "BackendData": {"VNI": 1}})


class Host:
    """What a plugin finds on a host, and the plugin without its socket."""

    def __init__(self, directory, store, number):
        self.directory, self.store, self.number = directory / f"h{number}", store, number
        self.directory.mkdir()
        self.env = self.directory / "subnet.env"
        self.write_env()
        self.restart()

    def write_env(self, path=None, network="10.3.0.0/16", subnet=None):
        path = path or self.env
        path.parent.mkdir(exist_ok=True)
        subnet = subnet or f"10.3.{self.number}.1/24"
        path.write_text(f"FLANNEL_NETWORK={network}\nFLANNEL_SUBNET={subnet}\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n")

    def restart(self):
        self.file = StateFile(str(self.directory / "state.json"))
        self.file.save()

        async def opened():
            return self.store.open()

        fabrics = Fabrics(str(self.env), str(self.directory / "networks"))
        self.blocks = Blocks(self.file.contents.engine, PREFIX, opened, random.Random(self.number))
        self.driver = Driver(self.file, fabrics, self.blocks)

    async def call(self, method, **request):
        return await self.driver.call(method, json.dumps(request).encode())

    async def pool(self, subnet=WEB, **options):
        return await self.call("IpamDriver.RequestPool", Pool=subnet, Options=options)


@pytest.fixture
async def store(tmp_path):
    store = SqliteBackend(tmp_path / "store.db")
    await store.put(f"{PREFIX}/config", CONFIG)
    for number in (1, 2, 3):
        await store.put(f"{PREFIX}/subnets/10.3.{number}.0-24", lease(number))
    return store


@pytest.fixture
async def hosts(tmp_path, store):
    hosts = [Host(tmp_path, store, number) for number in (1, 2, 3)]
    yield hosts
    for host in hosts:
        await host.blocks.close()


async def keys(store):
    return [key for key in await store.keys(f"{PREFIX}/") if not key.endswith(("-24", "/config"))]


async def test_a_block_is_a_lease_with_the_hosts_attributes(hosts, store):
    answer = await hosts[0].pool()
    assert answer["Pool"] == WEB
    [pool] = hosts[0].file.contents.pools.values()
    key = f"{PREFIX}/subnets/{pool.block.replace('/', '-')}"
    assert json.loads(await store.read(key)) == json.loads(lease(1)) | {"PublicIPv6": None}
    record = json.loads(await store.read(f"{PREFIX}/wincey/docker/{pool.block.replace('/', '-')}"))
    assert record["network"] == WEB
    await hosts[0].call("IpamDriver.ReleasePool", PoolID=answer["PoolID"])
    assert await keys(store) == []


async def test_engines_at_once_get_different_blocks(hosts, store):
    await asyncio.gather(*(host.pool(block="25") for host in hosts))
    taken = [Subnet.parse(pool.block) for host in hosts for pool in host.file.contents.pools.values()]
    assert len(taken) == 3
    assert all(Subnet.parse(WEB).contains(each) and each.length == 25 for each in taken)
    assert not any(one.overlaps(other) for one in taken for other in taken if one is not other)


async def test_blocks_of_different_lengths_do_not_overlap(hosts):
    for host, length in zip(hosts, ("25", "28", "29"), strict=True):
        await host.pool("10.3.200.0/24", block=length)
    taken = [Subnet.parse(pool.block) for host in hosts for pool in host.file.contents.pools.values()]
    assert not any(one.overlaps(other) for one in taken for other in taken if one is not other)


async def test_addresses_go_round_and_are_not_given_twice(hosts):
    host = hosts[0]
    pool = (await host.pool("10.3.200.0/28", block="29"))["PoolID"]
    [state] = host.file.contents.pools.values()
    gateway = {"RequestAddressType": "com.docker.network.gateway"}
    answer = await host.call("IpamDriver.RequestAddress", PoolID=pool, Options=gateway)
    assert Subnet.parse(answer["Address"]).address == state.own.host(1)
    given = [(await host.call("IpamDriver.RequestAddress", PoolID=pool))["Address"] for _ in range(5)]
    assert {Subnet.parse(each).address for each in given} == {state.own.host(number) for number in range(2, 7)}
    with pytest.raises(Refused, match="all 5 addresses"):
        await host.call("IpamDriver.RequestAddress", PoolID=pool)
    for each in (given[3], given[1]):
        await host.call("IpamDriver.ReleaseAddress", PoolID=pool, Address=each.partition("/")[0])
    # The one that was free for longer comes first, seen from the last one given.
    assert (await host.call("IpamDriver.RequestAddress", PoolID=pool))["Address"] == given[1]
    with pytest.raises(Refused, match="in use on this engine already"):
        await host.call("IpamDriver.RequestAddress", PoolID=pool, Address=given[0].partition("/")[0])


async def test_addresses_that_no_container_came_for_are_free_again_when_they_are_short(hosts):
    host = hosts[0]
    pool = (await host.pool("10.3.200.0/28", block="29"))["PoolID"]
    for _ in range(5):
        await host.call("IpamDriver.RequestAddress", PoolID=pool)
    [state] = host.file.contents.pools.values()
    forgotten = next(iter(state.addresses))
    state.addresses[forgotten] -= 3600
    answer = await host.call("IpamDriver.RequestAddress", PoolID=pool)
    assert answer["Address"] == f"{forgotten}/29"


async def test_what_is_known_survives_a_restart(hosts):
    host = hosts[0]
    pool = (await host.pool())["PoolID"]
    first = (await host.call("IpamDriver.RequestAddress", PoolID=pool))["Address"]
    engine = host.file.contents.engine
    await host.blocks.close()
    host.restart()
    assert host.file.contents.engine == engine
    assert (await host.call("IpamDriver.RequestAddress", PoolID=pool))["Address"] != first


async def test_leases_that_are_lost_or_out_of_date_are_put_right(hosts, store):
    host = hosts[0]
    await host.pool()
    [state] = host.file.contents.pools.values()
    key = f"{PREFIX}/subnets/{state.block.replace('/', '-')}"
    moved = lease(1).replace("10.99.0.1", "10.99.0.77")
    await store.put(f"{PREFIX}/subnets/10.3.1.0-24", moved)
    await host.driver.keep()
    assert "10.99.0.77" in await store.read(key)
    await store.remove(key)
    await host.driver.keep()
    assert "10.99.0.77" in await store.read(key)


async def test_a_block_that_another_engine_has_by_now_is_left_to_it(hosts, store, caplog):
    host = hosts[0]
    await host.pool()
    [state] = host.file.contents.pools.values()
    record = f"{PREFIX}/wincey/docker/{state.block.replace('/', '-')}"
    key = f"{PREFIX}/subnets/{state.block.replace('/', '-')}"
    await store.put(record, json.dumps({"network": WEB, "host": "mars", "engine": "another"}))
    await store.put(key, lease(9))
    await host.driver.keep()
    assert "belongs to host mars now" in caplog.text
    assert "10.99.0.9" in await store.read(key)
    await host.call("IpamDriver.ReleasePool", PoolID=next(iter(host.file.contents.pools)))
    assert "10.99.0.9" in await store.read(key)


async def test_removal_without_a_store_is_made_up_for(hosts, store, monkeypatch):
    host = hosts[0]
    pool = (await host.pool())["PoolID"]

    async def fail(*arguments):
        raise WinceyError("no store")

    with monkeypatch.context() as context:
        context.setattr(host.blocks, "give_back", fail)
        assert await host.call("IpamDriver.ReleasePool", PoolID=pool) == {}
    assert len(await keys(store)) == 2
    await host.blocks.close()
    host.restart()
    await host.driver.keep()
    assert await keys(store) == []


async def test_a_start_that_fails_in_the_middle_leaves_nothing(hosts, store, monkeypatch):
    host = hosts[0]
    refuse_overlaps, calls = host.blocks._refuse_overlaps, []

    async def fail_once(*arguments):
        calls.append(arguments)
        if len(calls) == 2:  # the lease is there by now
            assert len(await keys(store)) == 2
            raise WinceyError("no store")
        await refuse_overlaps(*arguments)

    async def fail(*arguments):
        raise WinceyError("no store either")

    monkeypatch.setattr(host.blocks, "_refuse_overlaps", fail_once)
    with monkeypatch.context() as context:
        context.setattr(host.blocks, "give_back", fail)
        with pytest.raises(WinceyError, match=r"no store$"):
            await host.pool()
    assert len(await keys(store)) == 2
    await host.driver.keep()
    assert await keys(store) == []


async def test_a_block_whose_record_another_engine_left_is_not_taken(hosts, store):
    record = json.dumps({"network": "10.3.200.0/29", "host": "mars", "engine": "another"})
    await store.put(f"{PREFIX}/wincey/docker/10.3.200.0-29", record)
    with pytest.raises(Refused, match="all 1 blocks"):
        await hosts[0].pool("10.3.200.0/29", block="29")
    assert hosts[0].file.contents.giving_back == []
    assert await store.read(f"{PREFIX}/wincey/docker/10.3.200.0-29") == record


async def test_a_network_among_several_is_found_by_its_subnet_or_named(hosts, store):
    host = hosts[0]
    host.write_env(host.directory / "networks" / "blue.env", "10.77.0.0/16", "10.77.5.1/24")
    await store.put(f"{PREFIX}/blue/config", CONFIG.replace("10.3.", "10.77."))
    await store.put(f"{PREFIX}/blue/subnets/10.77.5.0-24", lease(1))
    await host.pool("10.77.200.0/24")
    [state] = host.file.contents.pools.values()
    assert state.fabric == "blue"
    assert await store.read(f"{PREFIX}/blue/subnets/{state.block.replace('/', '-')}")
    with pytest.raises(Refused, match="is not a part of network blue"):
        await host.pool("10.3.200.0/24", network="blue")
    with pytest.raises(Refused, match="no container network 'green': there is blue"):
        await host.pool("", network="green")
    host.env.unlink()
    with pytest.raises(Refused, match="choose one of blue by --ipam-opt network=NAME"):
        await host.pool("")


async def test_a_host_with_both_families(hosts, store):
    host = hosts[0]
    host.env.write_text(
        host.env.read_text() + "FLANNEL_IPV6_NETWORK=fd00:3::/48\nFLANNEL_IPV6_SUBNET=fd00:3:0:1::1/64\n"
    )
    await store.remove(f"{PREFIX}/subnets/10.3.1.0-24")
    await store.put(f"{PREFIX}/subnets/10.3.1.0-24&fd00:3:0:1::-64", lease(1))
    assert (await host.pool())["Pool"] == WEB


@pytest.mark.parametrize(
    ("method", "request_", "answer"),
    [
        ("Plugin.Activate", {}, {"Implements": ["NetworkDriver", "IpamDriver"]}),
        ("NetworkDriver.GetCapabilities", {}, {"Scope": "local", "ConnectivityScope": "global"}),
        ("NetworkDriver.DiscoverNew", {"DiscoveryType": 1, "DiscoveryData": {}}, {}),
        ("NetworkDriver.DeleteEndpoint", {"NetworkID": "n", "EndpointID": "e"}, {}),
        ("NetworkDriver.Leave", {"NetworkID": "n", "EndpointID": "e"}, {}),
        ("NetworkDriver.RevokeExternalConnectivity", {"NetworkID": "n", "EndpointID": "e"}, {}),
        ("IpamDriver.ReleasePool", {"PoolID": "unknown"}, {}),
        ("IpamDriver.ReleaseAddress", {"PoolID": "unknown", "Address": "10.3.1.2"}, {}),
    ],
)
async def test_calls_that_are_always_answered(hosts, method, request_, answer):
    assert await hosts[0].call(method, **request_) == answer


@pytest.mark.parametrize(
    ("method", "request_", "error"),
    [
        ("NetworkDriver.Dance", {}, "has no NetworkDriver.Dance"),
        ("IpamDriver.ReleasePool", {}, "can't be read"),
        ("IpamDriver.RequestPool", {"V6": True}, "leave out --ipv6"),
        ("IpamDriver.RequestPool", {"Pool": "10.3.200.0"}, "is not a subnet"),
        ("IpamDriver.RequestPool", {"Pool": "fd00::/64"}, "no IPv6 addresses"),
        ("IpamDriver.RequestPool", {"Pool": "10.3.0.0/16"}, "is not a part of"),
        ("IpamDriver.RequestPool", {"Pool": "10.3.64.0/22"}, "lies among the subnets that hosts lease"),
        ("IpamDriver.RequestPool", {"Pool": WEB, "Options": {"block": "x"}}, "it is a prefix length, such as 26"),
        ("IpamDriver.RequestPool", {"Options": {"block": "26"}}, "goes with --subnet"),
        ("IpamDriver.RequestAddress", {"PoolID": "unknown"}, "does not know the addresses unknown"),
        ("NetworkDriver.CreateEndpoint", {"NetworkID": "n", "EndpointID": "e"}, "does not know the network n"),
        ("NetworkDriver.Join", {"NetworkID": "n", "EndpointID": "e"}, "does not know the network n"),
        ("NetworkDriver.CreateNetwork", {"NetworkID": "n"}, "a wincey network has one subnet"),
    ],
)
async def test_calls_that_are_refused(hosts, method, request_, error):
    with pytest.raises(Refused, match=error):
        await hosts[0].call(method, **request_)


def test_a_state_file_that_can_not_be_read_is_not_overwritten(tmp_path):
    path = tmp_path / "state.json"
    path.write_text("{")
    with pytest.raises(WinceyError, match="mend it, or move it away"):
        StateFile(str(path))
    assert path.read_text() == "{"


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path):
        super().__init__("plugin", timeout=10)
        self.path = path

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(10)
        self.sock.connect(self.path)


@pytest.mark.root
def test_the_process_on_its_socket(tmp_path, store):
    """As Docker calls it: content type, refusals in the words of both drivers, the end."""
    if os.geteuid() != 0:
        pytest.skip("needs root: network namespaces")
    path = str(tmp_path / "plugins" / "wincey.sock")
    arguments = [
        *("docker-plugin", "--store", f"sqlite:{tmp_path / 'store.db'}", "--socket", path),
        *("--state", str(tmp_path / "s" / "state.json"), "--subnet-file", str(tmp_path / "none.env")),
    ]
    with netns() as place, (tmp_path / "log").open("wb") as log:
        plugin = subprocess.Popen(
            ["nsenter", f"--net=/run/netns/{place.name}", sys.executable, "-m", "wincey.cli.wincey", *arguments],
            stdout=log,
            stderr=log,
        )
        try:
            until(lambda: os.path.exists(path) or plugin.poll() is not None, path)
            connection = UnixConnection(path)
            with contextlib.closing(connection):
                connection.request("POST", "/Plugin.Activate")
                answer = connection.getresponse()
                assert answer.getheader("Content-Type").startswith("application/vnd.docker.plugins.v1")
                assert json.loads(answer.read()) == {"Implements": ["NetworkDriver", "IpamDriver"]}
                connection.request("POST", "/IpamDriver.RequestPool", json.dumps({"Pool": ""}))
                answer = json.loads(connection.getresponse().read())
                assert "is flanneld running on this host" in answer["Err"]
                assert answer["Error"] == answer["Err"]
                connection.request("GET", "/Plugin.Activate")
                answer = connection.getresponse()
                assert answer.status == 405
                answer.read()
            assert os.stat(path).st_mode & 0o077 == 0
            plugin.send_signal(signal.SIGTERM)
            assert plugin.wait(30) == 0
            assert not os.path.exists(path)
        finally:
            plugin.kill()
            plugin.wait()
