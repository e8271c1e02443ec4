"""One network's life on a kernel in memory and an SQLite store: what the agent decides, without root."""

import asyncio
import json
import random
from contextlib import asynccontextmanager

import msgspec
import pytest

from support.memory_kernel import MemoryKernel
from wincey.agent import network as network_module
from wincey.agent.desired import DesiredState
from wincey.agent.envfile import read_env_file
from wincey.agent.network import Network, Settings
from wincey.agent.reconciler import Reconciler
from wincey.agent.statefile import State
from wincey.backends.base import HostFacts
from wincey.leasing import claims
from wincey.leasing.claims import Host
from wincey.model.address import Subnet, parse_address
from wincey.model.errors import DuplicateHost, NotJoinable, OutOfSubnets, UnknownBackend
from wincey.model.lease import LeaseAttrs, LeaseKey
from wincey.model.state import InterfaceAddress, Link, Route, RuleSet, Vxlan
from wincey.store.registry import Registry
from wincey.store.sqlite import SqliteStore

PREFIX = "/coreos.com/network"


def config(**keys):
    return json.dumps({"Network": "10.3.0.0/16", "Backend": {"Type": "vxlan"}} | keys).encode()


class World:
    """A store, and the hosts on it."""

    def __init__(self, directory):
        self.directory = directory
        self.registry = Registry(SqliteStore(str(directory / "store")), PREFIX)

    async def put_config(self, **keys):
        await self.registry.put_config(config(**keys))

    async def put_peer(self, key, address="10.99.0.9", **attrs):
        fields = {"backend_type": "vxlan", "backend_data": b'{"VNI":1,"VtepMAC":"0e:00:00:00:00:09"}'} | attrs
        lease_attrs = LeaseAttrs(parse_address(address), **fields)
        return await self.registry.create(LeaseKey.parse(key), lease_attrs)

    async def leases(self):
        return {str(lease.key): lease for lease in (await self.registry.snapshot()).leases.values()}


class Agent:
    """One host: its facts can be changed, and everything that it tells is kept."""

    def __init__(self, world, number=1):
        directory = world.directory / f"h{number}"
        self.subnet_file = directory / "subnet.env"
        self.kernel = MemoryKernel()
        self.reconciler = Reconciler(DesiredState(), [self.kernel])
        self.rng = random.Random(number)
        self.state = State(str(self.subnet_file), self.rng)
        address = parse_address(f"10.99.0.{number}")
        self.facts = HostFacts("eth0", 1500, address, None, address, None, macs=self.state.macs)
        self.unusable = None
        self.no_rules = None
        self.ready = ["never asked"]
        self.store = SqliteStore(str(world.directory / "store"))
        self.looking = lambda: None
        self.network = Network(
            Settings(str(self.subnet_file), 3600),
            Registry(self.store, PREFIX),
            self.reconciler,
            state=self.state,
            host=Host(f"h{number}", f"{number:032x}"),
            look=self.look,
            choose_rules=self.choose_rules,
            on_ready=self.ready.append,
            rng=self.rng,
        )

    def look(self, config):
        self.looking()
        if self.unusable:
            raise NotJoinable(self.unusable)
        return self.facts

    async def choose_rules(self, config):
        if self.no_rules:
            raise NotJoinable(self.no_rules)

    def change(self, **facts):
        self.facts = msgspec.structs.replace(self.facts, **facts)
        self.network.host_changed()

    @property
    def is_ready(self):
        return self.ready[-1] is None

    @property
    def subnet(self):
        found = read_env_file(str(self.subnet_file)).subnets
        return str(found[0].masked()) if found else None

    @property
    def key(self):
        return self.subnet.replace("/", "-")

    def routes(self):
        return {str(item.destination): item for item in self.kernel.objects.values() if isinstance(item, Route)}

    def links(self):
        return {item.name: item for item in self.kernel.objects.values() if isinstance(item, Link)}

    @asynccontextmanager
    async def living(self):
        tasks = [asyncio.create_task(self.network.run()), asyncio.create_task(self.reconciler.run())]
        try:
            yield self
            ended = [task for task in tasks if task.done()]
            assert not ended, [task.exception() for task in ended]
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self.store.close()

    async def ends(self):
        """Live until the end; what it is."""
        try:
            await asyncio.wait_for(self.network.run(), 20)
        finally:
            await self.store.close()


@pytest.fixture
async def world(tmp_path, monkeypatch):
    monkeypatch.setattr(network_module, "COMES_BACK", 0.05)
    monkeypatch.setattr(network_module, "AGAIN", 0.1)
    monkeypatch.setattr(claims, "ANSWER_WITHIN", 0.6)
    made = World(tmp_path)
    await made.put_config()
    yield made
    await made.registry.store.close()


async def until(true):
    async with asyncio.timeout(20):
        while True:
            found = true()
            if asyncio.iscoroutine(found):
                found = await found
            if found:
                return
            await asyncio.sleep(0.01)


async def test_it_joins(world):
    async with Agent(world).living() as agent:
        await until(lambda: agent.is_ready)
        lease = (await world.leases())[agent.key]
        assert lease.attrs.public_ip == agent.facts.public
        mac = agent.state.macs["flannel.1"]
        link = agent.links()["flannel.1"]
        assert (link.mtu, link.mac) == (1450, mac)
        assert link.vxlan == Vxlan(1, 8472, agent.facts.local, "eth0")
        subnet = Subnet.parse(agent.subnet)
        assert InterfaceAddress("flannel.1", Subnet(subnet.address, 32)).key in agent.kernel.objects
        assert any(isinstance(item, RuleSet) and item.forward for item in agent.kernel.objects.values())
        claim = (await world.registry.snapshot()).claims[f"{PREFIX}/wincey/hosts/10.99.0.1"]
        assert Host.decode(claim.value).name == "h1"


async def test_peers_come_change_and_go(world):
    async with Agent(world).living() as agent:
        await until(lambda: agent.is_ready)
        lease = await world.put_peer("10.3.200.0-24")
        await until(lambda: "10.3.200.0/24" in agent.routes())
        await world.registry.update(lease, msgspec.structs.replace(lease.attrs, public_ip=parse_address("10.99.0.10")))
        await until(lambda: "10.99.0.10" in " ".join(map(str, agent.kernel.objects.values())))
        await world.registry.release(await world.registry.read(lease.key))
        await until(lambda: "10.3.200.0/24" not in agent.routes())
        assert "10.99.0." not in " ".join(map(str, agent.kernel.objects.values()))


async def test_a_lease_that_comes_back_at_once_has_never_been_away(world, monkeypatch):
    monkeypatch.setattr(network_module, "COMES_BACK", 3600.0)
    async with Agent(world).living() as agent:
        await until(lambda: agent.is_ready)
        lease = await world.put_peer("10.3.200.0-24")
        await until(lambda: "10.3.200.0/24" in agent.routes())
        applied = len(agent.kernel.applied)
        await world.registry.release(lease)
        await world.put_peer("10.3.200.0-24")
        await world.put_peer("10.3.201.0-24", "10.99.0.8")
        await until(lambda: "10.3.201.0/24" in agent.routes())
        assert all(not changes.delete for changes in agent.kernel.applied[applied:])


async def test_what_a_host_published_stays_while_its_value_is_garbage(world):
    async with Agent(world).living() as agent:
        await until(lambda: agent.is_ready)
        lease = await world.put_peer("10.3.200.0-24")
        await until(lambda: "10.3.200.0/24" in agent.routes())
        store, key = world.registry.store, world.registry.lease_key(lease.key)
        garbage = await store.replace(await store.get(key), b"garbage", None)
        await world.put_peer("10.3.201.0-24", "10.99.0.8")
        await until(lambda: "10.3.201.0/24" in agent.routes())
        assert "10.3.200.0/24" in agent.routes()
        await store.delete(garbage.key)
        await until(lambda: "10.3.200.0/24" not in agent.routes())


@pytest.mark.parametrize("loss", ["deleted", "garbage", "other data"])
async def test_our_lease_is_put_back(world, loss):
    async with Agent(world).living() as agent:
        await until(lambda: agent.is_ready)
        before = (await world.leases())[agent.key]
        store, key = world.registry.store, world.registry.lease_key(before.key)
        entry = await store.get(key)
        if loss == "deleted":
            await store.delete(key)
        else:
            value = b"garbage" if loss == "garbage" else b'{"PublicIP":"10.99.0.1","BackendType":"host-gw"}'
            await store.replace(entry, value, 3600)

        async def as_before():
            lease = (await world.leases()).get(str(before.key))
            return lease and lease.attrs == before.attrs and lease.revision > before.revision

        await until(as_before)
        assert list(await world.leases()) == [str(before.key)]


async def test_our_lease_is_taken_and_another_one_published(world):
    async with Agent(world).living() as agent:
        await until(lambda: agent.is_ready)
        old = agent.key
        lease = (await world.leases())[old]
        await world.registry.update(lease, msgspec.structs.replace(lease.attrs, public_ip=parse_address("10.99.0.77")))
        await until(lambda: agent.key != old and agent.is_ready)
        leases = await world.leases()
        assert leases[old].attrs.public_ip == parse_address("10.99.0.77")
        assert leases[agent.key].attrs.public_ip == agent.facts.public


async def test_another_address_keeps_the_subnet_and_the_mac(world):
    async with Agent(world).living() as agent:
        await until(lambda: agent.is_ready)
        before = (await world.leases())[agent.key]
        new = parse_address("10.99.0.101")
        agent.change(local=new, public=new)

        async def published():
            return (await world.leases())[str(before.key)].attrs.public_ip == new

        await until(published)
        leases = await world.leases()
        assert list(leases) == [str(before.key)]
        assert leases[agent.key].attrs.backend_data == before.attrs.backend_data
        assert agent.links()["flannel.1"].vxlan.local == new


async def test_the_way_works_before_it_is_published(world):
    """Who reads the new lease sends in the new way at once."""
    async with Agent(world).living() as agent:
        await until(lambda: agent.is_ready)
        seen = []
        update = agent.network.registry.update

        async def watched(lease, attrs):
            seen.append((attrs.backend_data, set(agent.links())))
            return await update(lease, attrs)

        agent.network.registry.update = watched
        await world.put_config(Backend={"Type": "vxlan", "VNI": 7})
        await until(lambda: seen)
        assert [(b'"VNI":7' in data, "flannel.7" in links) for data, links in seen] == [(True, True)]
        await until(lambda: set(agent.links()) == {"flannel.7"})


async def test_a_config_that_changes_while_we_join(world):
    """It changed before the watch begins: nothing would ever tell."""
    agent = Agent(world)
    puts = []

    def change_once():
        if not puts:
            puts.append(asyncio.get_running_loop().create_task(world.put_config(Network="10.4.0.0/16")))

    agent.looking = change_once
    stake = agent.network._stake

    async def slow_stake(prepared):
        await puts[0]
        await stake(prepared)

    agent.network._stake = slow_stake
    async with agent.living():
        await until(lambda: agent.is_ready and agent.subnet.startswith("10.4."))
        assert all(key.startswith("10.4.") for key in await world.leases())


async def test_refused_configs_change_nothing_and_corrections_are_found(world, caplog):
    async with Agent(world).living() as agent:
        await until(lambda: agent.is_ready)
        before = dict(agent.kernel.objects)
        for number, bad in enumerate((config(SubnetLen=31), b"{", config(Backend={"Type": "nonsense"})), 1):
            await world.registry.put_config(bad)
            await until(lambda number=number: caplog.text.count("going on with what was in force") == number)
        await world.registry.store.delete(world.registry.config_key)
        await until(lambda: caplog.text.count("going on with what was in force") == 4)
        assert agent.kernel.objects == before
        assert agent.is_ready
        await world.put_config(Backend={"Type": "host-gw"})
        await until(lambda: not agent.links())


async def test_a_config_that_this_host_can_follow_only_later(world):
    async with Agent(world).living() as agent:
        await until(lambda: agent.is_ready)
        agent.unusable = "no interface"
        await world.put_config(Backend={"Type": "host-gw"})
        await asyncio.sleep(0.3)
        assert agent.links()
        agent.unusable = None
        agent.network.host_changed()  # as it was before, and yet there is something to do
        await until(lambda: not agent.links())


async def test_at_the_start_what_cannot_be_is_the_end(world):
    agent = Agent(world)
    agent.unusable = "no interface"
    with pytest.raises(NotJoinable, match="no interface"):
        await agent.ends()
    agent = Agent(world, 2)
    agent.no_rules = "no nft"
    with pytest.raises(NotJoinable, match="no nft"):
        await agent.ends()
    agent = Agent(world, 3)
    agent.kernel.failing[Link] = "not permitted"
    with pytest.raises(NotJoinable, match=r"flannel\.1.*not permitted"):
        await agent.ends()
    await world.put_config(Backend={"Type": "nonsense"})
    with pytest.raises(UnknownBackend):
        await Agent(world, 4).ends()


async def test_what_only_a_peer_would_need_is_no_reason_to_stay_outside(world, caplog):
    """A kernel without ipip, and a peer that is late with the change from it."""
    await world.put_config(Backend={"Type": "host-gw"})
    await world.put_peer("10.3.200.0-24", backend_type="ipip", backend_data=b"")
    await world.put_peer("10.3.201.0-24", "10.99.0.8", backend_type="host-gw", backend_data=b"")
    agent = Agent(world)
    agent.kernel.failing |= {Link: "no ipip here", InterfaceAddress: "not there"}
    async with agent.living():
        await until(lambda: agent.is_ready)
        assert "10.3.201.0/24" in agent.routes()
    assert "no ipip here" in caplog.text
    assert "not there" not in caplog.text


async def test_without_the_program_for_the_rules_a_running_host_goes_on(world, caplog):
    async with Agent(world).living() as agent:
        await until(lambda: agent.is_ready)
        agent.no_rules = "no iptables"
        await world.put_config(EnableNFTables=False, Backend={"Type": "host-gw"})
        await until(lambda: not agent.links())
        assert "no iptables; the traffic rules stay" in caplog.text


async def test_a_start_after_the_store_lost_all_data_leaves_the_way_to_peers_until_they_are_back(world):
    async with Agent(world).living() as agent:
        lease = await world.put_peer("10.3.200.0-24")
        await until(lambda: "10.3.200.0/24" in agent.routes())
        before = agent.network.lease.key
    for key in (lease.key, before):
        await world.registry.release(await world.registry.read(key))
    again = Agent(world)
    again.kernel.objects.update(agent.kernel.objects)
    async with again.living():
        await until(lambda: again.is_ready)
        assert again.network.lease.key == before
        assert "10.3.200.0/24" in again.routes()
        await world.put_peer("10.3.200.0-24")
        await until(lambda: again.network.planner and "10.3.200.0-24" in str(again.reconciler.desired.owners))
        assert "10.3.200.0/24" in again.routes()
    # Where the store has our lease it has the others' too: what they have not is gone.
    third = Agent(world)
    third.kernel.objects.update(agent.kernel.objects)
    await world.registry.release(await world.registry.read(lease.key))
    async with third.living():
        await until(lambda: third.is_ready)
        assert "10.3.200.0/24" not in third.routes()


async def test_out_of_subnets(world, caplog):
    one = {"SubnetMin": "10.3.1.0", "SubnetMax": "10.3.1.0"}
    await world.put_config(**one)
    first, second = Agent(world, 1), Agent(world, 2)
    async with first.living():
        await until(lambda: first.is_ready)
        with pytest.raises(OutOfSubnets, match="all 1 subnets"):
            await Agent(world, 3).ends()
        await world.put_config(SubnetMax="10.3.2.0")
        async with second.living():
            await until(lambda: second.is_ready)
            before = dict(second.kernel.objects)
            await world.put_config(**one)
            await until(lambda: "out of subnets" in str(second.ready[-1]))
            await world.put_peer("10.3.200.0-24")
            await until(lambda: "10.3.200.0/24" in second.routes())
            assert before.items() <= second.kernel.objects.items()
            await world.put_config(SubnetMax="10.3.2.0")
            await until(lambda: second.is_ready)
            assert second.key == "10.3.2.0-24"
        assert caplog.text.count("going on as before") == 1


@pytest.mark.parametrize(("first_pause", "later"), [(0.01, 0.08), (3600.0, 3600.0)])
async def test_a_host_without_a_subnet_asks_ever_less_and_at_once_when_one_may_be_free(
    world, monkeypatch, first_pause, later
):
    monkeypatch.setattr(network_module, "AGAIN", first_pause)
    monkeypatch.setattr(network_module, "AT_THE_LATEST", later)
    first, second = Agent(world, 1), Agent(world, 2)
    async with second.living():
        async with first.living():
            await until(lambda: first.is_ready and second.is_ready)
            kept = first.network.lease
            await world.put_config(SubnetMin=first.key[:-3], SubnetMax=first.key[:-3])
            await until(lambda: "out of subnets" in str(second.ready[-1]) and second.network._again_in == later)
        await world.registry.release(await world.registry.read(kept.key))
        await until(lambda: second.is_ready)
        assert second.network.lease.key == kept.key


async def test_the_address_of_another_live_host(world):
    first, second = Agent(world, 1), Agent(world, 2)
    async with first.living():
        await until(lambda: first.is_ready)
        double = Agent(world, 3)
        double.facts = first.facts
        with pytest.raises(DuplicateHost, match=r"h3.*h1"):
            await double.ends()
        async with second.living():
            await until(lambda: second.is_ready)
            before = await world.leases()
            second.change(local=first.facts.local, public=first.facts.public)
            await until(lambda: second.network._again_in is not None)
            assert await world.leases() == before


async def test_a_peer_may_need_a_device_that_nobody_needed_before(world):
    """It is ours from the moment that it is wanted: audited, remembered, removed by a clean-up."""
    await world.put_config(Backend={"Type": "host-gw"})
    async with Agent(world).living() as agent:
        await until(lambda: agent.is_ready)
        assert agent.reconciler.scope.devices == ()
        lease = await world.put_peer("10.3.200.0-24")
        await until(lambda: "flannel.1" in agent.links())
        assert agent.reconciler.scope.devices == ("flannel.1",)
        assert State(str(agent.subnet_file), agent.rng).devices == {"flannel.1"}
        await world.registry.release(lease)
        await until(lambda: not agent.links())


async def test_peers_in_a_network_that_we_left_are_still_ours_to_keep(world):
    async with Agent(world).living() as agent:
        await until(lambda: agent.is_ready)
        lease = await world.put_peer("10.3.200.0-24")
        await until(lambda: "10.3.200.0/24" in agent.routes())
        await world.put_config(Network="10.4.0.0/16")
        await until(lambda: agent.subnet.startswith("10.4.") and agent.is_ready)
        assert "10.3.200.0/24" in agent.routes()
        assert {str(network) for network in agent.reconciler.scope.networks} == {"10.3.0.0/16", "10.4.0.0/16"}
        await world.registry.release(lease)
        await until(lambda: "10.3.200.0/24" not in agent.routes())


async def test_a_lease_outside_of_the_network_takes_no_traffic(world, caplog):
    """Half of all addresses, or the cloud's metadata server: whoever may write leases could have them otherwise."""
    async with Agent(world).living() as agent:
        await until(lambda: agent.is_ready)
        for key in ("0.0.0.0-1", "128.0.0.0-1", "169.254.169.254-31", "10.2.0.0-15", "10.4.1.0-24"):
            await world.put_peer(key)
        await world.put_peer("10.3.200.0-24&2001:db8::-64")  # of a family that is off here
        await until(lambda: "10.3.200.0/24" in agent.routes())
        assert all(each.startswith("10.3.") for each in agent.routes())
        assert "lease 128.0.0.0-1 is passed over: it lies outside of the network" in caplog.text


async def test_subnet_env_that_cannot_be_written_is_tried_again(world):
    agent = Agent(world)
    agent.subnet_file.parent.write_text("a file where a directory should be")
    async with agent.living():
        await until(lambda: "can't be written" in str(agent.ready[-1]))
        assert agent.links(), "packets flow nevertheless"
        agent.subnet_file.parent.unlink()
        await until(lambda: agent.is_ready)
        assert agent.subnet


async def test_before_a_config_is_known_nothing_is_touched(world):
    """What an earlier run left behind carries packets while the store is away."""
    await world.registry.store.delete(world.registry.config_key)
    agent = Agent(world)
    stale = Route(Subnet.parse("10.3.9.0/24"), "flannel.1")
    agent.kernel.objects[stale.key] = stale
    async with agent.living():
        await until(lambda: "no network config" in str(agent.ready[-1]))
        agent.reconciler.suspect("something happened")
        await asyncio.sleep(0.2)
        assert agent.kernel.applied == []
        await world.put_config()
        await until(lambda: agent.is_ready)
        assert stale.key not in agent.kernel.objects


async def test_the_store_lost_everything(world):
    """All leases and claims at once: peers are given time to come back, and we do at once."""
    async with Agent(world).living() as agent:
        await until(lambda: agent.is_ready)
        await world.put_peer("10.3.200.0-24")
        await until(lambda: "10.3.200.0/24" in agent.routes())
        key = agent.key
        await world.registry.store.close()
        for name in ("store", "store-wal", "store-shm"):
            (world.directory / name).unlink(missing_ok=True)
        world.registry = Registry(SqliteStore(str(world.directory / "store")), PREFIX)

        async def back():
            return key in await world.leases()

        await until(back)
        await asyncio.sleep(0.3)  # longer than the patience with a single peer
        assert "10.3.200.0/24" in agent.routes()


async def test_a_copied_machine_gets_a_mac_address_of_its_own(world):
    """Its state file is that of the original, and peers know one host only by each MAC address."""
    copy = Agent(world, 2)
    copy.state.macs["flannel.1"] = bytes.fromhex("0e0000000009")
    await world.put_peer("10.3.200.0-24")
    async with copy.living():
        await until(lambda: copy.is_ready)
        mac = copy.links()["flannel.1"].mac
        assert mac != bytes.fromhex("0e0000000009")
        assert (await world.leases())[copy.key].attrs.backend_data.endswith(b'"%s"}' % mac.hex(":").encode())


async def test_of_two_copies_that_join_at_once_the_later_one_changes_its_mac_address(world):
    first, second = Agent(world, 1), Agent(world, 2)
    for agent in (first, second):
        agent.state.macs["flannel.1"] = bytes.fromhex("0e0000000009")
    async with first.living(), second.living():
        await until(lambda: first.is_ready and second.is_ready)
        await until(lambda: first.links()["flannel.1"].mac != second.links()["flannel.1"].mac)
        older = min((await world.leases()).values(), key=lambda lease: lease.created)
        assert b"0e:00:00:00:00:09" in older.attrs.backend_data
