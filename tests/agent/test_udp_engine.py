"""Which engine is chosen for the udp backend, when it is given up, and what is told of it."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from wincey.agent import udpengine
from wincey.agent.udpengine import UdpEngines, UdpWishes
from wincey.backends.base import HostFacts
from wincey.backends.udp import CHECK, ENGINE, KEEPER
from wincey.model.address import Subnet
from wincey.model.config import NetworkConfig
from wincey.model.errors import NotJoinable
from wincey.model.state import Failure, Tunnel
from wincey.model.udp import BpfTunnel

FACTS = HostFacts(underlay="eth0", mtu=1500, local=bytes(4), local_v6=None, public=bytes(4), public_v6=None)
PROGRAMS = BpfTunnel("flannel0", 1472, "eth0", bytes(4), 8285, Subnet(bytes(4), 16), "network")
CONFIG = NetworkConfig.parse(b'{"Network": "10.5.0.0/16", "Backend": {"Type": "udp"}}')


@pytest.fixture
def host(monkeypatch):
    """Why this host can't run an engine, by engine; what is not there can be run."""
    reasons = {}

    def ask(engine):
        return lambda facts: (reasons.get(engine, ""), "")

    monkeypatch.setattr(udpengine, "ENGINES", {engine: ask(engine) for engine in ("bpf", "offload", "plain")})
    return reasons


def test_the_best_that_the_host_can_run(host):
    chosen = UdpEngines(UdpWishes()).choose(FACTS)
    assert (chosen[ENGINE], chosen[CHECK], chosen["why"]) == ("bpf", "network", "")
    host["bpf"] = "no bpffs"
    chosen = UdpEngines(UdpWishes(check="strict")).choose(FACTS)
    assert (chosen[ENGINE], chosen[KEEPER], chosen[CHECK]) == ("offload", "offload", "strict")
    assert chosen["why"] == "bpf: no bpffs"


def test_one_that_is_demanded(host):
    chosen = UdpEngines(UdpWishes("plain")).choose(FACTS)
    assert (chosen[ENGINE], chosen[KEEPER], chosen["why"]) == ("plain", "plain", "")
    host["bpf"] = "no bpffs"
    with pytest.raises(NotJoinable, match="--udp-engine=bpf can't be had: no bpffs"):
        UdpEngines(UdpWishes("bpf")).choose(FACTS)


async def test_one_that_is_refused_twice_gives_way_and_is_tried_again(host, monkeypatch):
    monkeypatch.setattr(udpengine, "AGAIN", 0.05)
    engines, asked = UdpEngines(UdpWishes()), []
    engines.reconsider = lambda: asked.append(engines.choose(FACTS)[ENGINE])
    engines.failed(Failure(PROGRAMS, "changed under our hands"))
    assert asked == []
    engines.failed(Failure(PROGRAMS, "not permitted"))
    assert asked == ["offload"]
    assert engines.choose(FACTS)["why"] == "bpf: not permitted"
    for _ in range(200):
        if len(asked) > 1:
            break
        await asyncio.sleep(0.05)
    assert asked == ["offload", "bpf"]


async def test_failures_that_are_rare_or_of_others_change_nothing(host, monkeypatch):
    engines = UdpEngines(UdpWishes())
    engines.reconsider = pytest.fail
    clock = iter([1000.0, 2000.0, 3000.0])
    monkeypatch.setattr(udpengine, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    for _ in range(3):
        engines.failed(Failure(PROGRAMS, "busy"))
    tunnel = Tunnel("flannel0", 1472, bytes(4), 8285)
    for _ in range(2):
        engines.failed(Failure(tunnel, "no /dev/net/tun"))


def test_the_report(host):
    engines = UdpEngines(UdpWishes())
    assert engines.report(CONFIG) is None  # nothing chosen yet
    host["bpf"] = "no bpffs"
    engines.choose(FACTS)
    shown = {"engine": "offload", "core": "python", "why": "no compiled core: none", "counters": {"in.packets": 3}}
    engines.watch(lambda: shown, dict)
    report = engines.report(CONFIG)
    assert report
    assert (report.name, report.keeper) == ("offload", "offload python")
    assert report.why == "bpf: no bpffs; no compiled core: none"
    assert report.counters == {"keeper": {"in.packets": 3}}
    assert engines.report(NetworkConfig.parse(b'{"Network": "10.5.0.0/16", "Backend": {"Type": "vxlan"}}')) is None
