"""The fast path as it follows from what a backend plans."""

import pytest

from wincey.agent.planner import Planner, Policy
from wincey.backends.base import HostFacts
from wincey.backends.catalogue import make
from wincey.backends.udp import ENGINE
from wincey.leasing.allocate import Identity
from wincey.model.address import Subnet, parse_address
from wincey.model.config import NetworkConfig
from wincey.model.fastpath import FastPath
from wincey.model.lease import LeaseKey

LOCAL, LOCAL_V6 = parse_address("10.99.0.1"), parse_address("fd00:99::1")
NETWORK, HERE = Subnet.parse("10.3.0.0/16"), Subnet.parse("10.3.1.0/24")
V4, DUAL, V6 = (
    ('"Network": "10.3.0.0/16"', "10.3.1.0-24"),
    ('"Network": "10.3.0.0/16", "EnableIPv6": true, "IPv6Network": "fd00:3::/48"', "10.3.1.0-24&fd00:3:0:1::-64"),
    ('"EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "fd00:3::/48"', "0.0.0.0-0&fd00:3:0:1::-64"),
)


def planned(backend, network=V4, *, mark=0x20, by="auto", **found):
    text, key = network
    config = NetworkConfig.parse(f'{{{text}, "Backend": {{"Type": {backend}}}}}')
    macs = dict.fromkeys(("flannel.7", "flannel-v6.7", "flannel.1", "flannel-v6.1"), bytes(6))
    host = HostFacts("eth0", 1500, LOCAL, LOCAL_V6, LOCAL, LOCAL_V6, macs=macs, found=found)
    own = LeaseKey.parse(key)
    if network is V6:
        own = LeaseKey(None, own.v6)
    planner = Planner(
        config=config,
        host=host,
        backend=make(config, host),
        identity=Identity(LOCAL, LOCAL_V6),
        own=own,
        policy=Policy(fast_path_mark=mark, fast_path_engine=by),
    )
    paths = [item for item in planner.local() if isinstance(item, FastPath)]
    return paths[0] if mark else paths


@pytest.mark.parametrize("network", [V4, DUAL], ids=["v4", "dual"])
def test_vxlan(network):
    wanted = FastPath(NETWORK, HERE, "eth0", LOCAL, 0x20, "vxlan", "flannel.7", port=4789, vni=7)
    assert planned('"vxlan", "VNI": 7, "Port": 4789', network) == wanted


def test_vxlan_whose_headers_say_more():
    path = planned('"vxlan", "GBP": true')
    assert "group policy" in path.limit
    assert (path.tunnel, path.lacking) == ("flannel.1", "")


@pytest.mark.parametrize("network", [V4, DUAL], ids=["v4", "dual"])
def test_host_gw(network):
    assert planned('"host-gw"', network) == FastPath(NETWORK, HERE, "eth0", LOCAL, 0x20)


@pytest.mark.parametrize("engine", ["auto", "bpf", "flowtable"])
def test_what_is_to_carry_it(engine):
    assert planned('"vxlan"', by=engine).engine == engine
    assert planned('"ipip"', by=engine).engine == engine


def test_udp():
    found = planned('"udp", "Port": 8300', **{ENGINE: "bpf"})
    assert found == FastPath(NETWORK, HERE, "eth0", LOCAL, 0x20, "udp", "flannel0", port=8300)


@pytest.mark.parametrize("engine", ["fou", "offload", "plain"])
def test_udp_by_another_engine(engine):
    assert "--udp-engine=bpf" in planned('"udp"', **{ENGINE: engine}).lacking


@pytest.mark.parametrize(
    ("backend", "network", "word"), [('"alloc"', V4, "alloc"), ('"ipip"', V4, "ipip"), ('"vxlan"', V6, "IPv4")]
)
def test_none_with_the_reason(backend, network, word):
    assert word in planned(backend, network).lacking


def test_not_asked_for():
    assert planned('"vxlan"', mark=0) == []
