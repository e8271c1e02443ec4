"""The fast path's driver on a host with containers that come and go: what it sets up, sees, repairs and takes away."""

from __future__ import annotations

import asyncio
import time

import msgspec
import pytest

from support.netns import netns
from wincey.bpf import fastpathprograms
from wincey.bpf.fastpath import LIBERAL, Places, conf, table
from wincey.bpf.fastpathdriver import FastPathDriver
from wincey.kernel import flowtable, nft, sysctl
from wincey.kernel.ports import container_ports
from wincey.model.address import Subnet
from wincey.model.fastpath import FastPath
from wincey.model.state import Changes, Scope, Sysctl

pytestmark = pytest.mark.root

PATH = FastPath(
    Subnet.parse("10.5.0.0/16"),
    Subnet.parse("10.5.1.0/24"),
    "eth0",
    bytes([10, 99, 0, 1]),
    0x1000,
    "vxlan",
    "flannel.1",
    8472,
    1,
)


@pytest.fixture
def hosts():
    """A host, and the namespace that its containers are in."""
    with netns() as host, netns() as inside:
        host.ip("link add eth0 type bridge")
        host.ip("link add cni0 type bridge")
        host.ip("address add 10.5.1.1/24 dev cni0")
        host.ip("link set cni0 up")
        container(host, inside, "c1")
        yield host, inside


def container(host, inside, name):
    host.ip(f"link add {name} type veth peer name {name} netns {inside.name}")
    host.ip(f"link set {name} master cni0 up")


async def until(true):
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
        await asyncio.sleep(0.02)


def driving(hosts, tmp_path, story, **options):
    """Run a story with a driver, and remove all in the end, whose success is a part of every story."""
    host, _ = hosts

    async def run():
        driver = FastPathDriver(tmp_path / "subnet", **options)
        try:
            await story(driver)
            assert await driver.apply(Changes(delete=[PATH])) == []
            assert await driver.observe({}, Scope()) == {}
            assert not driver._programs._directory.exists()
            assert sysctl.read(LIBERAL) in ("0", None)
        finally:
            await driver.close()

    host.run_async(run)
    assert "flannel-fast" not in host.run("nft list tables")
    for device in ("eth0", "c1"):
        for way in ("ingress", "egress"):
            assert "fast_" not in host.run(f"tc filter show dev {device} {way}")


async def put(driver, path=PATH):
    assert await driver.apply(Changes(put=[path])) == []


async def as_desired(driver, path=PATH):
    return await driver.observe({path.key: path}, Scope()) == {path.key: path}


@pytest.mark.parametrize("tcx", [True, False], ids=["tcx", "tc"])
def test_containers_that_come_and_go(hosts, tmp_path, tcx):
    host, inside = hosts

    async def story(driver):
        assert await driver.observe({PATH.key: PATH}, Scope()) == {}
        await put(driver)
        assert await as_desired(driver)
        attached = set(driver._programs._attached)
        assert {each.device for each in attached} == {"eth0", "c1"}
        container(host, inside, "c2")
        await until(lambda: {each.device for each in driver._programs._attached} == {"eth0", "c1", "c2"})
        host.ip("link del c2")
        await until(lambda: set(driver._programs._attached) == attached)
        assert not list(driver._programs._directory.glob("link_c2_*"))
        host.ip("link del c1")
        container(host, inside, "c1")
        await until(lambda: set(driver._programs._attached) == attached)
        await until(lambda: len(driver._programs._objects.attached(attached)) == len(attached))
        assert await as_desired(driver)

    driving(hosts, tmp_path, story, tcx=tcx)


def test_what_others_change_is_seen(hosts, tmp_path):
    async def story(driver):
        await put(driver)
        attachment = Places(("eth0",), ()).attachments()[0]
        changes = (
            lambda: driver._programs._objects.detach([attachment]),
            lambda: driver._programs._objects.maps["conf"].put(bytes(4), conf(msgspec.structs.replace(PATH, vni=2))),
            lambda: sysctl.write(Sysctl(LIBERAL, "0")),
        )
        for change in changes:
            change()
            assert not await as_desired(driver)
            await put(driver)
            assert await as_desired(driver)
        told = []
        driver.watch(told.append)
        for script in ("delete table ip flannel-fast", table(PATH, "flannel-fast").replace("0x1000", "0x2000")):
            told.clear()
            await nft.commit(script)
            await until(lambda: told)
            assert not await as_desired(driver)
            await put(driver)
            assert await as_desired(driver)

    driving(hosts, tmp_path, story)


def test_another_process_finds_it_and_does_it_again(hosts, tmp_path):
    """As after a restart: all is there, and nothing of it is known to be right until it has been put once."""

    async def story(driver):
        await put(driver)
        other = FastPathDriver(tmp_path / "subnet")
        try:
            assert list(await other.observe({PATH.key: PATH}, Scope())) == [PATH.key]
            assert not await as_desired(other)
            assert list(await other.observe({}, Scope())) == [PATH.key]
            await put(other)
            assert await as_desired(other)
        finally:
            await other.close()

    driving(hosts, tmp_path, story)


def test_a_host_that_was_liberal_stays_so(hosts, tmp_path):
    async def story(driver):
        await put(driver)
        await driver.apply(Changes(delete=[PATH]))
        assert sysctl.write(Sysctl(LIBERAL, "1")) == ""
        await put(driver)
        await driver.apply(Changes(delete=[PATH]))
        assert sysctl.read(LIBERAL) == "1"
        assert sysctl.write(Sysctl(LIBERAL, "0")) == ""

    driving(hosts, tmp_path, story)


@pytest.mark.parametrize(
    ("path", "why"),
    [
        (FastPath(PATH.network, PATH.subnet, "", bytes(4), lacking="nobody wants it"), "nobody wants it"),
        (FastPath(PATH.network, PATH.subnet, "tun7", bytes(4), engine="bpf"), "tun7 is no Ethernet device"),
    ],
)
def test_none_is_no_failure(hosts, tmp_path, path, why):
    host, _ = hosts
    host.ip("tuntap add tun7 mode tun")

    async def story(driver):
        await put(driver)
        await put(driver, path)
        assert await as_desired(driver, path)
        assert driver.told == f"none: {why}"
        assert not driver._programs._directory.exists()
        await put(driver)
        assert await as_desired(driver)
        assert driver.told == "between containers and eth0, vxlan headers by the programs"

    driving(hosts, tmp_path, story)


@pytest.mark.parametrize(
    ("engine", "why"),
    [
        ("auto", "no programs today; and no flowtable: no modules today"),
        ("bpf", "no programs today"),
        ("flowtable", "no modules today"),
    ],
)
def test_each_engine_that_can_not_be_had_is_named(hosts, tmp_path, monkeypatch, engine, why):
    """And what was there before goes."""

    async def complaint():
        return "no modules today"

    async def story(driver):
        await put(driver)
        monkeypatch.setattr(fastpathprograms, "_reason_against", lambda path: "no programs today")
        monkeypatch.setattr(flowtable, "complaint", complaint)
        path = msgspec.structs.replace(PATH, engine=engine)
        await put(driver, path)
        assert await as_desired(driver, path)
        assert driver.told == f"none: {why}"
        assert not driver._programs._directory.exists()
        assert await nft.listing("table", "ip", "flannel-fast") is None

    driving(hosts, tmp_path, story)


@pytest.mark.parametrize(
    ("other", "why"),
    [
        ({"form": "udp"}, "a flowtable serves vxlan and host-gw"),
        ({"limit": "group policy (GBP)"}, "group policy (GBP), which a flowtable would lose"),
    ],
)
def test_what_a_flowtable_does_not_serve(hosts, tmp_path, other, why):
    async def story(driver):
        path = msgspec.structs.replace(PATH, engine="flowtable", **other)
        await put(driver, path)
        assert await as_desired(driver, path)
        assert driver.told == f"none: {why}"

    driving(hosts, tmp_path, story)


def test_from_programs_to_a_flowtable_and_back(hosts, tmp_path, monkeypatch):
    """On a kernel that need not have flowtables: their table with a chain alone."""

    async def complaint():
        return ""

    def chain(path, name, devices):
        return f"add table ip {name}\ndelete table ip {name}\ntable ip {name} {{\n chain forth {{\n }}\n}}\n"

    async def story(driver):
        monkeypatch.setattr(flowtable, "complaint", complaint)
        monkeypatch.setattr(flowtable, "script", chain)
        path = msgspec.structs.replace(PATH, engine="flowtable")
        for _ in range(2):
            await put(driver)
            assert await as_desired(driver)
            assert driver.told == "between containers and eth0, vxlan headers by the programs"
            assert "mark set" in await nft.listing("table", "ip", "flannel-fast")
            await put(driver, path)
            assert await as_desired(driver, path)
            assert not await as_desired(driver)
            assert driver.told == "between containers and flannel.1, by nftables' flowtable"
            assert not driver._programs.exists
            assert sysctl.read(LIBERAL) == "0"
            assert "chain forth" in await nft.listing("table", "ip", "flannel-fast")
        await nft.commit("delete table ip flannel-fast")
        assert not await as_desired(driver, path)

    driving(hosts, tmp_path, story)


def test_programs_take_the_place_of_a_flowtable(hosts, tmp_path):
    """Of a former run's, on a host that had no more: the table is another one, and nothing else is left of it."""

    async def story(driver):
        await nft.commit("table ip flannel-fast {\n chain x {\n }\n}\n")
        assert not await as_desired(driver)
        await put(driver)
        assert await as_desired(driver)
        assert "chain x" not in (await nft.listing("table", "ip", "flannel-fast") or "")

    driving(hosts, tmp_path, story)


def test_the_tunnels_device_where_its_headers_are_not_ours(hosts, tmp_path):
    """And it may come later than the fast path."""
    host, _ = hosts

    async def story(driver):
        path = FastPath(**{name: getattr(PATH, name) for name in PATH.__struct_fields__} | {"limit": "because"})
        await put(driver, path)
        assert driver.told == "between containers and flannel.1, which encapsulates: because"
        host.ip("link add flannel.1 type bridge")
        await until(lambda: {each.device for each in driver._programs._attached} == {"eth0", "c1", "flannel.1"})
        assert await as_desired(driver, path)

    driving(hosts, tmp_path, story)


def test_which_cables_are_containers(hosts):
    """At the subnet's bridge or with an address of it, and the other end elsewhere."""
    host, inside = hosts
    host.ip("link add br9 type bridge")
    host.ip(f"link add other type veth peer name other netns {inside.name}")
    host.ip("link set other master br9")
    host.ip("link add near type veth peer name far")
    host.ip("link set near master cni0")
    host.ip(f"link add ptp type veth peer name ptp netns {inside.name}")
    assert host.call(lambda: container_ports(PATH.subnet)) == ["c1"]
    host.ip("address add 10.5.1.1/32 dev ptp")
    assert host.call(lambda: container_ports(PATH.subnet)) == ["c1", "ptp"]


def test_what_a_host_lacks_is_told(hosts, tmp_path, monkeypatch):
    for what, answer, word in (
        ("probe.missing_capabilities", "this process lacks the capability CAP_BPF", "CAP_BPF"),
        ("find", None, "nft is not installed"),
        ("_NEEDS", (99, 0), "too old: it needs 99.0"),
    ):

        async def story(driver, word=word):
            await put(driver)
            assert word in driver.told
            assert await as_desired(driver)

        with monkeypatch.context() as patch:
            patch.setattr(
                f"wincey.bpf.fastpathprograms.{what}",
                (lambda *_, answer=answer: answer) if what != "_NEEDS" else answer,
            )
            driving(hosts, tmp_path, story)


def test_programs_that_the_kernel_refuses(hosts, tmp_path):
    """As one does that lacks a helper: here, byte code that ends nowhere."""

    async def story(driver):
        broken = msgspec.structs.replace(driver._programs._baked.programs["fast_in"], code=bytes(8), maps=[])
        driver._programs._baked.programs["fast_in"] = broken
        await put(driver)
        assert driver.told.startswith("none: BPF program fast_in: ")
        assert not driver._programs._directory.exists()
        assert await as_desired(driver)

    driving(hosts, tmp_path, story)
