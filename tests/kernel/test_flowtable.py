"""The flowtable as the fast path: which flows, at which devices, and what is said where there is none. On a kernel: flowtable_guest.py."""

from __future__ import annotations

import asyncio
import time

import msgspec
import pytest

from support.netns import netns
from wincey.bpf import fastpath
from wincey.kernel import flowtable, nft
from wincey.kernel.flowtable import Flowtable, explained, script, unserved
from wincey.kernel.nfmonitor import GenerationCounter
from wincey.model.address import Subnet
from wincey.model.fastpath import FastPath

PATH = FastPath(
    Subnet.parse("10.5.0.0/16"), Subnet.parse("10.5.1.0/24"), "eth0", bytes(4), form="vxlan", tunnel="flannel.1"
)
TAKEN = " flow add @flows"


def ending(text, verdict):
    """The rules that end so, without it."""
    return [line.strip().removesuffix(verdict) for line in text.splitlines() if line.endswith(verdict)]


def test_the_table():
    text = script(PATH, "flannel-fast", ["flannel.1", "c1"])
    assert text.splitlines()[:2] == ["add table ip flannel-fast", "delete table ip flannel-fast"]
    assert 'devices = { "flannel.1", "c1" };' in text
    assert len(ending(text, TAKEN)) == 2


def test_the_same_flows_as_by_programs():
    """Once a packet each way was accepted."""
    text = script(PATH, "t", ["c1"])
    marked = ending(fastpath.table(PATH, "t"), " meta mark set meta mark | 0x1000")
    answered = "meta l4proto . ip saddr . ip daddr . th sport . th dport @answered"
    reverse = "meta l4proto . ip daddr . ip saddr . th dport . th sport"
    assert ending(text, f" ct direction original {answered}{TAKEN}") == marked
    assert ending(text, f" ct direction reply add @answered {{ {reverse} }}") == marked
    assert len(marked) == 2


def test_before_there_is_a_device():
    assert script(PATH, "t", []) == "add table ip t\ndelete table ip t\ntable ip t {\n}\n"


def test_what_it_does_not_serve():
    assert unserved(PATH) == ""
    assert unserved(FastPath(PATH.network, PATH.subnet, "eth0", bytes(4))) == ""
    assert "vxlan and host-gw" in unserved(msgspec.structs.replace(PATH, form="udp"))
    assert unserved(msgspec.structs.replace(PATH, limit="a mark")) == "a mark, which a flowtable would lose"


@pytest.mark.parametrize(
    ("said", "means"),
    [
        ("/dev/stdin:2:5-15: Error: syntax error, unexpected string", "this nft does not know flowtables"),
        ("/dev/stdin:2:15-15: Error: Could not process rule: No such file or directory", "nf_flow_table"),
        ("/dev/stdin:2:15-15: Error: Could not process rule: Operation not supported", "nft_flow_offload"),
        ("Error: Could not process rule: Operation not permitted (needs root or CAP_NET_ADMIN)", "needs root"),
    ],
)
def test_what_nft_says_about_the_probe(said, means):
    assert means in explained(said)


@pytest.mark.root
def test_the_probe_on_this_kernel():
    """It changes nothing, and says what a real try says."""

    async def story():
        said = await flowtable.complaint()
        tried = await flowtable.program.run("nft", "-f", "-", text=script(PATH, "t", ["lo"]))
        assert bool(said) == bool(tried.code), (said, tried)
        assert said in ("", explained(tried.err.splitlines()[0] if tried.err else ""))
        return await nft.listing("tables")

    with netns() as host:
        assert "flannel-probe" not in host.run_async(story)


# --- The keeper, on a kernel that need not have flowtables: with all but the flowtable itself ----------------------------


def without_flowtable(path, name, devices):
    """The same table, with a chain for each device in the place of the flowtable."""
    lines = script(path, name, devices).splitlines()
    if devices:
        start = lines.index("    flowtable flows {")
        lines[start : start + 3] = [f"    chain at-{device} {{ }}" for device in devices]
    return "".join(line.removesuffix(TAKEN) + "\n" for line in lines)


@pytest.fixture
def keeping(monkeypatch):
    """Run a story with a flowtable that is kept, in a namespace with a tunnel's device and a container."""

    async def none():
        return ""

    monkeypatch.setattr(flowtable, "script", without_flowtable)
    monkeypatch.setattr(flowtable, "complaint", none)

    def run(story):
        with netns() as host, netns() as inside:
            host.ip("link add flannel.1 type bridge")
            host.ip("link add cni0 type bridge")
            host.ip("address add 10.5.1.1/24 dev cni0")
            container(host, inside, "c1")

            async def whole():
                told = []
                kept = Flowtable("flannel-fast", told.append)
                try:
                    assert await kept.put(PATH) == ""
                    await story(kept, told, host, inside)
                    await kept.remove()
                    assert not kept.exists
                    assert await nft.listing("tables") == ""
                finally:
                    await kept.close()

            host.run_async(whole)

    return run


def container(host, inside, name):
    host.ip(f"link add {name} type veth peer name {name} netns {inside.name}")
    host.ip(f"link set {name} master cni0 up")


async def until(true):
    end = time.monotonic() + 20
    while not await true():
        assert time.monotonic() < end
        await asyncio.sleep(0.05)


async def are(found, expected):
    return await found() == expected


async def found(told):
    return bool(told)


async def places():
    listed = await nft.listing("table", "ip", "flannel-fast") or ""
    return [line.split()[1].removeprefix("at-") for line in listed.splitlines() if "chain at-" in line]


@pytest.mark.root
def test_devices_come_and_go(keeping):
    """Which is nobody's change."""

    async def story(kept, told, host, inside):
        async def at(*names):
            await until(lambda: are(places, list(names)))
            assert await kept.as_put()

        await at("flannel.1", "c1")
        container(host, inside, "c2")
        await at("flannel.1", "c1", "c2")
        host.ip("link del c1")
        await at("flannel.1", "c2")
        host.ip("link del flannel.1")
        await at("c2")
        host.ip("link del c2")
        await at()
        assert told == []

    keeping(story)


@pytest.mark.root
def test_the_underlay_where_nothing_is_wrapped(keeping):
    async def story(kept, told, host, inside):
        host.ip("link add eth0 type bridge")
        assert await kept.put(msgspec.structs.replace(PATH, form="plain", tunnel="")) == ""
        assert await places() == ["eth0", "c1"]
        assert kept.told == "between containers and eth0, by nftables' flowtable"

    keeping(story)


async def elements():
    return "10.5.2.2" in (await nft.listing("table", "ip", "flannel-fast") or "")


@pytest.mark.root
def test_flows_begin_anew_when_rules_change(keeping):
    """Seen by the set of answered flows, which is empty then. What rules add to it is nobody's change, and no reason."""

    async def story(kept, told, host, inside):
        for change in ("add table ip others; add chain ip others c", "delete table ip others"):
            await nft.commit("add element ip flannel-fast answered { tcp . 10.5.1.2 . 10.5.2.2 . 1000 . 7 }")
            assert await elements()
            assert await kept.as_put()
            await nft.commit(change)
            await until(lambda: are(elements, False))
            assert await kept.as_put()
        assert await places() == ["flannel.1", "c1"]

    keeping(story)


@pytest.mark.root
def test_and_in_any_case_after_a_while(keeping, monkeypatch):
    monkeypatch.setattr(flowtable, "RENEWAL", 0.2)

    async def story(kept, told, host, inside):
        counter = GenerationCounter()
        try:
            end, before = time.monotonic() + 20, counter.read()
            while counter.read() < before + 3:
                assert time.monotonic() < end
                await asyncio.sleep(0.05)
        finally:
            counter.close()
        assert await kept.as_put()
        assert told == []

    keeping(story)


@pytest.mark.root
@pytest.mark.parametrize("change", ["delete table ip flannel-fast", "add chain ip flannel-fast other"])
def test_what_others_do_to_it_is_told(keeping, change):
    async def story(kept, told, host, inside):
        await nft.commit(change)
        await until(lambda: found(told))
        assert not await kept.as_put()
        assert await kept.put(PATH) == ""
        assert await kept.as_put()

    keeping(story)


@pytest.mark.root
def test_other_networks_flowtables_are_no_reason(keeping, monkeypatch):
    """Else two of them would have each other begin anew without end."""
    monkeypatch.setattr(flowtable, "RENEWAL", 1000)

    async def story(kept, told, host, inside):
        other = Flowtable("flannel-fast-other", told.append)
        counter = GenerationCounter()
        try:
            assert await other.put(PATH) == ""
            await asyncio.sleep(1.5)
            before = counter.read()
            await asyncio.sleep(2)
            assert counter.read() == before
            await other.remove()
        finally:
            await other.close()
            counter.close()

    keeping(story)
