"""The Open vSwitch driver with a real database and a real ovs-vswitchd, in user space."""

import asyncio
import os
import secrets
import signal
from contextlib import asynccontextmanager

import msgspec
import pytest

from support.keys import wait_until
from wincey.kernel.diff import diff
from wincey.lab import ovs
from wincey.lab.lab import Lab
from wincey.lab.plan import LabSpec, network_config
from wincey.model.address import parse_address, parse_mac
from wincey.model.errors import NotJoinable
from wincey.model.ovs import OvsBridge, OvsDatabase, OvsFlow, OvsTunnel
from wincey.model.state import Scope
from wincey.programs.openvswitch import database as module
from wincey.programs.openvswitch import driver as driver_module
from wincey.programs.openvswitch import host as place
from wincey.programs.openvswitch.driver import OvsDriver

pytestmark = pytest.mark.root

BRIDGE = OvsBridge("wbr", "netdev", parse_mac("02:00:00:00:00:01"), 1450)
INWARD = OvsFlow("wbr", BRIDGE.mac, "")
LOCAL = parse_address("10.99.0.1")


def tunnel(number, kind="vxlan", **changes):
    remote = parse_address(f"10.99.{number >> 8}.{number & 255}")
    found = OvsTunnel("wbr", kind, 1, LOCAL, remote, 0 if kind == "gre" else 4789)
    return msgspec.structs.replace(found, **changes)


def peer(number, kind="vxlan", **changes):
    port = tunnel(number, kind, **changes)
    return [port, OvsFlow("wbr", b"\x02\0\0\0" + number.to_bytes(2), port.name)]


@pytest.fixture
def host(monkeypatch, tmp_path):
    """A host with Open vSwitch and no daemon of ours."""
    spec = LabSpec(name=f"ovs-{secrets.token_hex(3)}", config=network_config("ovs"), hosts=1, containers=0)
    lab = Lab(spec, root=tmp_path)
    with_short_name = lab.hosts[0]
    monkeypatch.setenv("OVS_RUNDIR", str(with_short_name.ovs_directory))
    try:
        lab.up(hosts=[])
        yield with_short_name
    finally:
        lab.down()


class Told(list):
    """What the watcher was told."""

    async def something(self):
        async with asyncio.timeout(20):
            while not self:
                await asyncio.sleep(0.02)


@asynccontextmanager
async def open_driver(owner="/run/one"):
    driver, told = OvsDriver(owner), Told()
    driver.watch(told.append)
    driver.told = told
    try:
        yield driver
    finally:
        await driver.close()


async def settle(driver, *desired):
    """What the reconciler does at an audit, and again until nothing is left to do: a port made anew has its number later."""
    wanted = {item.key: item for item in desired}
    failures = list(await driver.apply(diff(wanted, await driver.observe(wanted, Scope()))))
    async with asyncio.timeout(20):
        while not failures and (rest := diff(wanted, await driver.observe(wanted, Scope()))):
            failures = list(await driver.apply(rest))
    return failures


async def patiently(driver, *desired):
    """Likewise, until it succeeds: the driver may not know yet what another program has just changed."""
    async with asyncio.timeout(20):
        while await settle(driver, *desired):
            await asyncio.sleep(0.05)


def vsctl(host, *words):
    return host.exec(
        ["ovs-vsctl", f"--db=unix:{host.ovs_directory}/db.sock", "--timeout=10", *words], check=True
    ).stdout


def ofctl_dump(host):
    return host.exec(["ovs-ofctl", "dump-flows", f"unix:{host.ovs_directory}/wbr.mgmt"], check=True).stdout


def end(host, program):
    pid = int((host.ovs_directory / f"{program}.id").read_text())
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not os.path.exists(f"/proc/{pid}"))


async def test_many_peers_are_few_transactions_and_one_bundle(host, monkeypatch):
    transactions, programs = [], []
    transact, must = module.Database.transact, driver_module.must

    async def counted_transact(self, operations):
        transactions.append(len(operations))
        await transact(self, operations)

    async def counted_must(*command, text=""):
        programs.append(command)
        return await must(*command, text=text)

    monkeypatch.setattr(module.Database, "transact", counted_transact)
    monkeypatch.setattr(driver_module, "must", counted_must)
    peers = [peer(number) for number in range(2, 302)]
    flat = [item for each in peers for item in each]
    async with open_driver() as driver:
        assert await settle(driver, BRIDGE, INWARD, *flat) == []
        assert len(transactions) == 2, "the bridge, the ports"
        assert len(programs) == 2, "the flows, and a look at them"
        assert vsctl(host, "list-ports", "wbr").split() == sorted(each[0].name for each in peers)
        assert await settle(driver, BRIDGE, INWARD, *flat[20:]) == []
        assert len(transactions) == 3
        assert driver.told == [], "of its own doing nobody needs to be told"
    async with open_driver() as another:
        assert await settle(another) == []
        assert len(transactions) == 4
    assert vsctl(host, "list-br").split() == ["eth0"]


async def test_every_value_is_changed_in_place_and_another_kind_is_made_anew(host):
    async with open_driver() as driver:
        assert await settle(driver, BRIDGE, INWARD, *peer(2)) == []
        bridge = OvsBridge("wbr", "netdev", parse_mac("02:00:00:00:00:07"), 1400)
        inward = OvsFlow("wbr", bridge.mac, "")
        assert await settle(driver, bridge, inward, *peer(2, port=8472, local=parse_address("10.99.0.3"))) == []
        assert "8472" in vsctl(host, "get", "interface", tunnel(2).name, "options")
        assert "02:00:00:00:00:07" in vsctl(host, "get", "interface", "wbr", "mac_in_use")
        assert vsctl(host, "get", "interface", "wbr", "mtu").strip() == "1400"
        other = peer(2, "gre", key_id=9)
        assert await settle(driver, bridge, inward, *other) == []
        assert vsctl(host, "list-ports", "wbr").split() == [other[0].name]
        # The name tells one kind and the port is of another: somebody changed it.
        vsctl(host, "set", "interface", other[0].name, "type=vxlan")
        await driver.told.something()
        assert await settle(driver, bridge, inward, *other) == []
        assert vsctl(host, "get", "interface", other[0].name, "type").strip() == "gre"


async def test_what_others_made_is_not_ours(host):
    async with open_driver() as driver:
        vsctl(host, "add-br", "wbr", "--", "set", "bridge", "wbr", "datapath_type=netdev")
        [failure] = [each for each in await settle(driver, BRIDGE, INWARD, *peer(2)) if each.object == BRIDGE]
        assert "a bridge wbr is there that Wincey did not make" in failure.reason
        assert vsctl(host, "list-ports", "wbr") == ""
        assert "cookie=0x77696e636579" not in ofctl_dump(host)
        vsctl(host, "del-br", "wbr")
        await patiently(driver, BRIDGE, INWARD)
        name = tunnel(2).name
        vsctl(host, "add-port", "eth0", name, "--", "set", "interface", name, "type=gre", "options:remote_ip=10.99.0.9")
        failures = {each.object: each.reason for each in await settle(driver, BRIDGE, INWARD, *peer(2), *peer(3))}
        assert "bridge eth0 has a port of this name" in failures[tunnel(2)]
        assert vsctl(host, "list-ports", "wbr").split() == [tunnel(3).name], (
            "one failing keeps no other from being made"
        )
        async with open_driver("/run/two") as another:
            assert await settle(another) == []
        assert sorted(vsctl(host, "list-br").split()) == ["eth0", "wbr"]


async def test_changes_by_others_are_noticed(host):
    objects = [BRIDGE, INWARD, *peer(2), *peer(3)]
    async with open_driver() as driver:
        assert await settle(driver, *objects) == []
        for words in (
            ("del-port", tunnel(2).name),
            ("set", "interface", tunnel(3).name, "options:key=77"),
            ("set", "bridge", "wbr", "fail_mode=standalone"),
            ("del-br", "wbr"),
        ):
            driver.told.clear()
            vsctl(host, *words)
            await driver.told.something()
            await patiently(driver, *objects)
        driver.told.clear()
        end(host, "ovs-vswitchd")
        ovs.start_switch(host, host.ovs_directory)
        async with asyncio.timeout(20):
            while "ovs-vswitchd has started anew" not in driver.told:
                await asyncio.sleep(0.02)
        await patiently(driver, *objects)


async def test_what_does_not_run_is_named(host, monkeypatch):
    monkeypatch.setattr(module, "DEADLINE", 0.5)
    async with open_driver() as driver:
        assert await settle(driver, BRIDGE, INWARD) == []
        end(host, "ovs-vswitchd")
        failures = {each.object: each.reason for each in await settle(driver, BRIDGE, INWARD, *peer(2))}
        assert "ovs-vswitchd did not follow" in failures[tunnel(2)]
        driver.told.clear()
        end(host, "ovsdb-server")
        await driver.told.something()
        failures = await settle(driver, BRIDGE)
        assert "does not answer" in failures[0].reason
        assert "openvswitch-switch" in failures[0].reason
    with pytest.raises(NotJoinable, match="does not answer"):
        await place.check()
    # To remove what may be left is not given up in silence, unless nothing can be left.
    async with open_driver() as driver:
        [failure] = await settle(driver)
        assert isinstance(failure.object, OvsDatabase)
        monkeypatch.setattr(place, "OFCTL", "no-such-ofctl")
        assert await settle(driver) == []
    with pytest.raises(NotJoinable, match=r"not installed \(package openvswitch-switch\)"):
        await place.check()
