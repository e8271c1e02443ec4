"""What the ovs backend publishes and plans."""

import json

import msgspec
import pytest

from wincey.backends.base import HostFacts
from wincey.backends.catalogue import make
from wincey.model.address import Subnet, parse_address, parse_mac
from wincey.model.config import NetworkConfig
from wincey.model.errors import BadConfig, BadLease
from wincey.model.lease import Lease, LeaseAttrs, LeaseKey
from wincey.model.ovs import OvsBridge, OvsFlow, OvsTunnel
from wincey.model.state import InterfaceAddress, Link, Neighbor, Route

MAC, PEER_MAC = parse_mac("02:00:00:00:00:01"), parse_mac("02:00:00:00:00:02")
V4 = '"Network": "10.3.0.0/16"'
V6 = '"EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "fd00:3::/48"'
DUAL = '"Network": "10.3.0.0/16", "EnableIPv6": true, "IPv6Network": "fd00:3::/48"'
OWN = {V4: "10.3.1.0-24", V6: "0.0.0.0-0&fd00:3:0:1::-64", DUAL: "10.3.1.0-24&fd00:3:0:1::-64"}
PEER = {V4: "10.3.2.0-24", V6: "0.0.0.0-0&fd00:3:0:2::-64", DUAL: "10.3.2.0-24&fd00:3:0:2::-64"}


def ip(text):
    return parse_address(text)


def net(text):
    return Subnet.parse(text)


def backend(extra="", network=V4, mtu=1500):
    host = HostFacts(
        underlay="eth0",
        mtu=mtu,
        local=ip("10.99.0.1"),
        local_v6=ip("fd00:99::1"),
        public=ip("192.0.2.1"),
        public_v6=ip("2001:db8::1"),
        macs={"flannel-ovs": MAC, "br7": MAC},
    )
    return make(NetworkConfig.parse(f'{{{network}, "Backend": {{"Type": "ovs"{extra}}}}}'), host)


def lease(network=V4, data=None, **changes):
    values = {"VNI": 1, "VtepMAC": "02:00:00:00:00:02", "Tunnel": "vxlan"} | changes
    text = json.dumps(values).encode() if data is None else data
    attrs = LeaseAttrs(
        None if network == V6 else ip("10.99.0.2"),
        None if network == V4 else ip("fd00:99::2"),
        "ovs",
        b"" if network == V6 else text,
        b"" if network == V4 else text,
    )
    return Lease(LeaseKey.parse(PEER[network]), attrs)


def test_the_host_itself():
    found = backend()
    assert found.local(LeaseKey.parse(OWN[V4]))[:3] == [
        OvsBridge("flannel-ovs", "system", MAC, 1450),
        OvsFlow("flannel-ovs", MAC, ""),
        Link("flannel-ovs", "ovs", 1450),
    ]
    assert InterfaceAddress("flannel-ovs", net("10.3.1.0/32")) in found.local(LeaseKey.parse(OWN[V4]))
    attrs = found.attrs()
    assert (attrs.backend_type, attrs.public_ip) == ("ovs", ip("192.0.2.1"))
    assert json.loads(attrs.backend_data) == {"VNI": 1, "VtepMAC": "02:00:00:00:00:01", "Tunnel": "vxlan"}
    assert attrs.backend_v6_data == b""


def test_in_user_space_checksums_are_not_left_to_a_card():
    local = backend(', "Datapath": "netdev", "Bridge": "br7"').local(LeaseKey.parse(OWN[V4]))
    assert OvsBridge("br7", "netdev", MAC, 1450) in local
    assert Link("br7", "ovs", 1450, tx_checksum=False) in local


def test_a_peer():
    tunnel = OvsTunnel("flannel-ovs", "vxlan", 1, ip("10.99.0.1"), ip("10.99.0.2"), 4789)
    assert tunnel.name == "v0000010a630002"
    assert backend().peer(LeaseKey.parse(OWN[V4]), lease()) == [
        tunnel,
        OvsFlow("flannel-ovs", PEER_MAC, tunnel.name),
        Neighbor("flannel-ovs", ip("10.3.2.0"), PEER_MAC),
        Route(net("10.3.2.0/24"), "flannel-ovs", gateway=ip("10.3.2.0"), onlink=True),
    ]


def test_both_families_go_through_one_tunnel():
    objects = backend(network=DUAL).peer(LeaseKey.parse(OWN[DUAL]), lease(DUAL))
    assert [item.remote for item in objects if isinstance(item, OvsTunnel)] == [ip("10.99.0.2")]
    assert {item.destination for item in objects if isinstance(item, Route)} == {
        net("10.3.2.0/24"),
        net("fd00:3:0:2::/64"),
    }
    objects = backend(network=V6).peer(LeaseKey.parse(OWN[V6]), lease(V6))
    [tunnel] = [item for item in objects if isinstance(item, OvsTunnel)]
    assert (tunnel.local, tunnel.remote, len(tunnel.name)) == (ip("fd00:99::1"), ip("fd00:99::2"), 15)


@pytest.mark.parametrize(
    ("tunnel", "network", "mtu"),
    [
        ("vxlan", V4, 1450),
        ("geneve", DUAL, 1450),
        ("gre", V4, 1458),
        ("vxlan", V6, 1430),
        ("gre", V6, 1438),
    ],
)
def test_mtu(tunnel, network, mtu):
    assert backend(f', "Tunnel": "{tunnel}"', network).mtu == mtu
    assert backend(f', "Tunnel": "{tunnel}", "MTU": 2000', network).mtu == mtu + 500


@pytest.mark.parametrize("theirs", [{"Tunnel": "gre"}, {"VNI": 7}])
def test_during_a_change_of_the_config_it_sends_as_the_peer_publishes(theirs):
    """And has a port of its own kind for what the peer sends."""
    objects = backend(', "Port": 8472').peer(LeaseKey.parse(OWN[V4]), lease(**theirs))
    first, second = [item for item in objects if isinstance(item, OvsTunnel)]
    assert (first.encapsulation, first.key_id) == (theirs.get("Tunnel", "vxlan"), theirs.get("VNI", 1))
    assert (second.encapsulation, second.key_id, second.port) == ("vxlan", 1, 8472)
    assert first.port == (0 if "Tunnel" in theirs else 8472)
    [flow] = [item for item in objects if isinstance(item, OvsFlow)]
    assert flow.port == first.name != second.name


@pytest.mark.parametrize(
    ("extra", "part"),
    [
        (', "Tunnel": "stt"', "Backend.Tunnel"),
        (', "Datapath": "dpdk"', "Backend.Datapath"),
        (', "VNI": 16777216', "Backend.VNI"),
        (', "Tunnel": "gre", "Port": 4789', "GRE has no ports"),
        (', "Bridge": "a name too long for it"', "Backend.Bridge"),
        (', "MTU": 100', "an MTU of at least 118"),
    ],
)
def test_wrong_keys(extra, part):
    with pytest.raises(BadConfig, match=part):
        backend(extra)


@pytest.mark.parametrize(
    ("bad", "part"),
    [
        (lease(data=b"{"), "can't be read"),
        (lease(VNI=-1), "VNI -1"),
        (lease(Tunnel="stt"), "can't be read"),
        (lease(VtepMAC="x"), "VtepMAC"),
        (lease(VtepMAC="02:00:00:00:00:01"), "MAC address of this host"),
        (msgspec.structs.replace(lease(), attrs=msgspec.structs.replace(lease().attrs, public_ip=None)), "PublicIP"),
    ],
)
def test_wrong_leases(bad, part):
    with pytest.raises(BadLease, match=part):
        backend().peer(LeaseKey.parse(OWN[V4]), bad)
