"""What each backend publishes and plans, against the tables of the compatibility reference (sections 3.3, 4.2 and 6)."""

import pytest

from wincey.agent.company import Others
from wincey.agent.planner import Planner, Policy
from wincey.backends.base import HostFacts
from wincey.backends.catalogue import make, towards
from wincey.leasing.allocate import Identity
from wincey.model.address import Subnet, parse_address, parse_mac
from wincey.model.config import BackendOptions, NetworkConfig
from wincey.model.errors import BadConfig, BadLease, NotJoinable, UnknownBackend
from wincey.model.lease import Lease, LeaseAttrs, LeaseKey
from wincey.model.state import (
    FdbEntry,
    InterfaceAddress,
    Ipip,
    Isolation,
    Link,
    Neighbor,
    Route,
    RuleSet,
    Sysctl,
    Tunnel,
    TunnelPeer,
    Vxlan,
)
from wincey.model.udp import BpfRoute, BpfTunnel, FouPort

MAC, MAC6 = parse_mac("ce:8b:74:a6:9d:80"), parse_mac("ce:8b:74:a6:9d:81")
PEER_MAC = "0e:00:00:00:00:02"


def ip(text):
    return parse_address(text)


def net(text):
    return Subnet.parse(text)


def facts(**changes):
    values = {
        "underlay": "eth0",
        "mtu": 1500,
        "local": ip("10.99.0.1"),
        "local_v6": ip("fd00:99::1"),
        "public": ip("10.99.0.1"),
        "public_v6": ip("fd00:99::1"),
        "macs": {"flannel.1": MAC, "flannel-v6.1": MAC6, "flannel.7": MAC},
    }
    return HostFacts(**(values | changes))


def config(backend, extra="", network='"Network": "10.3.0.0/16"'):
    return NetworkConfig.parse(f'{{{network}, "Backend": {{"Type": "{backend}"{extra}}}}}')


V6ONLY = '"EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "fd00:3::/48"'
DUAL = '"Network": "10.3.0.0/16", "EnableIPv6": true, "IPv6Network": "fd00:3::/48"'
OWN = LeaseKey.parse("10.3.1.0-24")
OWN_DUAL = LeaseKey.parse("10.3.1.0-24&fd00:3:0:1::-64")


def peer(kind="vxlan", key="10.3.2.0-24", data=None, address="10.99.0.2", v6=None, data6=b""):
    if data is None:
        data = b'{"VNI":1,"VtepMAC":"%s"}' % PEER_MAC.encode() if kind == "vxlan" else b""
    return Lease(LeaseKey.parse(key), LeaseAttrs(ip(address), ip(v6) if v6 else None, kind, data, data6))


@pytest.mark.parametrize(
    ("backend", "network", "mtu"),
    [
        ("vxlan", '"Network": "10.3.0.0/16"', 1450),
        ("vxlan", DUAL, 1450),
        ("vxlan", V6ONLY, 1430),  # an IPv6 header outside takes 20 bytes more (flannel reserves too little)
        ("udp", '"Network": "10.3.0.0/16"', 1472),
        ("host-gw", '"Network": "10.3.0.0/16"', 1500),
        ("alloc", '"Network": "10.3.0.0/16"', 1500),
    ],
)
def test_mtu(backend, network, mtu):
    assert make(config(backend, network=network), facts()).mtu == mtu


@pytest.mark.parametrize(
    ("backend", "value"),
    [
        (
            "vxlan",
            b'{"PublicIP":"10.99.0.1","PublicIPv6":null,"BackendType":"vxlan",'
            b'"BackendData":{"VNI":1,"VtepMAC":"ce:8b:74:a6:9d:80"}}',
        ),
        ("host-gw", b'{"PublicIP":"10.99.0.1","PublicIPv6":null,"BackendType":"host-gw"}'),
        ("udp", b'{"PublicIP":"10.99.0.1","PublicIPv6":null}'),
        ("alloc", b'{"PublicIP":"10.99.0.1","PublicIPv6":null}'),
    ],
)
def test_lease_values_are_flannels_byte_for_byte(backend, value):
    assert make(config(backend), facts()).attrs().encode() == value


def test_dual_stack_lease_value():
    attrs = make(config("vxlan", network=DUAL), facts()).attrs()
    assert attrs.encode() == (
        b'{"PublicIP":"10.99.0.1","PublicIPv6":"fd00:99::1","BackendType":"vxlan",'
        b'"BackendData":{"VNI":1,"VtepMAC":"ce:8b:74:a6:9d:80"},'
        b'"BackendV6Data":{"VNI":1,"VtepMAC":"ce:8b:74:a6:9d:81"}}'
    )


def test_vxlan_device_and_peer():
    backend = make(config("vxlan"), facts())
    assert backend.local(OWN) == [
        Link("flannel.1", "vxlan", 1450, mac=MAC, vxlan=Vxlan(1, 8472, ip("10.99.0.1"), "eth0")),
        Sysctl("net/ipv6/conf/flannel.1/accept_ra", "0", optional=True),
        InterfaceAddress("flannel.1", net("10.3.1.0/32")),
    ]
    assert backend.peer(OWN, peer()) == [
        Neighbor("flannel.1", ip("10.3.2.0"), parse_mac(PEER_MAC)),
        FdbEntry("flannel.1", parse_mac(PEER_MAC), ip("10.99.0.2")),
        Route(net("10.3.2.0/24"), "flannel.1", gateway=ip("10.3.2.0"), onlink=True),
    ]


def test_vxlan_dual_stack_has_two_devices():
    backend = make(config("vxlan", network=DUAL), facts())
    links = [item for item in backend.local(OWN_DUAL) if isinstance(item, Link)]
    assert [(link.name, link.mtu, link.mac) for link in links] == [
        ("flannel.1", 1450, MAC),
        ("flannel-v6.1", 1430, MAC6),
    ]
    data6 = b'{"VNI":1,"VtepMAC":"0e:00:00:00:00:03"}'
    objects = backend.peer(OWN_DUAL, peer(key="10.3.2.0-24&fd00:3:0:2::-64", v6="fd00:99::2", data6=data6))
    assert len(objects) == 6
    assert Route(net("fd00:3:0:2::/64"), "flannel-v6.1", gateway=ip("fd00:3:0:2::"), onlink=True) in objects


def test_vxlan_keys():
    backend = make(config("vxlan", ', "VNI": 7, "Port": 4789, "GBP": true, "Learning": true, "MTU": 1400'), facts())
    link = backend.local(OWN)[0]
    assert (link.name, link.mtu, backend.mtu) == ("flannel.7", 1350, 1350)
    assert link.vxlan == Vxlan(7, 4789, ip("10.99.0.1"), "eth0", learning=True, gbp=True)


def test_vxlan_behind_nat_sends_from_the_interfaces_address():
    backend = make(config("vxlan"), facts(public=ip("203.0.113.9")))
    assert backend.attrs().public_ip == ip("203.0.113.9")
    assert backend.local(OWN)[0].vxlan.local == ip("10.99.0.1")


def test_vxlan_mac_prefix_makes_the_mac_from_the_public_address():
    assert make(config("vxlan", ', "MacPrefix": "0E-2A"'), facts()).local(OWN)[0].mac == parse_mac("0e:2a:0a:63:00:01")
    dual = make(config("vxlan", ', "MacPrefix": "0E-2A"', network=DUAL), facts()).local(OWN_DUAL)
    assert len({link.mac for link in dual if isinstance(link, Link)}) == 2


@pytest.mark.parametrize(
    ("value", "kernel", "wanted"),
    [("on", (6, 1), True), ("off", (6, 1), False), ("auto", (6, 1), None), ("auto", (5, 4), False)],
)
def test_vxlan_checksum_offload(value, kernel, wanted):
    backend = make(config("vxlan", f', "TxChecksumOffload": "{value}"'), facts(kernel=kernel))
    assert backend.local(OWN)[0].tx_checksum is wanted


def test_direct_routing_uses_the_peer_itself_where_it_is_adjacent():
    backend = make(config("vxlan", ', "DirectRouting": true'), facts(connected=[(net("10.99.0.0/24"), "eth0")]))
    assert backend.peer(OWN, peer()) == [Route(net("10.3.2.0/24"), "eth0", gateway=ip("10.99.0.2"))]
    far = backend.peer(OWN, peer(address="10.98.0.2"))
    assert Route(net("10.3.2.0/24"), "flannel.1", gateway=ip("10.3.2.0"), onlink=True) in far


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (', "MacPrefix": "0E"', "MacPrefix"),
        (', "MacPrefix": "0F-2A"', "unicast"),
        (', "TxChecksumOffload": "maybe"', "auto, on or off"),
        (', "VNI": 16777216', "VNI"),
        (', "Port": 70000', "Port"),
        (', "MTU": 80', "at least"),
    ],
)
def test_wrong_vxlan_keys_are_explained(extra, words):
    with pytest.raises(BadConfig, match=words):
        make(config("vxlan", extra), facts())


@pytest.mark.parametrize("data", [b"", b"[]", b'{"VNI":1}', b'{"VtepMAC":"nonsense"}', b'{"VtepMAC":"ce:8b:74:a6:9d"}'])
def test_a_vxlan_peer_with_unusable_data_is_one_bad_lease(data):
    with pytest.raises(BadLease):
        make(config("vxlan"), facts()).peer(OWN, peer(data=data))


def test_old_flannels_lease_without_vni_is_usable():
    assert make(config("vxlan"), facts()).peer(OWN, peer(data=b'{"VtepMAC":"%s"}' % PEER_MAC.encode()))


def test_host_gw():
    backend = make(config("host-gw", network=DUAL), facts())
    assert backend.local(OWN_DUAL) == []
    assert backend.peer(OWN_DUAL, peer("host-gw", "10.3.2.0-24&fd00:3:0:2::-64", v6="fd00:99::2")) == [
        Route(net("10.3.2.0/24"), "eth0", gateway=ip("10.99.0.2")),
        Route(net("fd00:3:0:2::/64"), "eth0", gateway=ip("fd00:99::2")),
    ]
    with pytest.raises(NotJoinable, match=r"203\.0\.113\.9"):
        make(config("host-gw"), facts(public=ip("203.0.113.9")))


def test_udp():
    backend = make(config("udp", ', "Port": 9000'), facts())
    assert backend.local(OWN) == [
        Tunnel("flannel0", 1472, ip("10.99.0.1"), 9000, "offload", "network", net("10.3.0.0/16")),
        Link("flannel0", "tun", 1472),
        InterfaceAddress("flannel0", net("10.3.1.0/32")),
        Route(net("10.3.0.0/16"), "flannel0"),
    ]
    assert backend.peer(OWN, peer("")) == [TunnelPeer("flannel0", net("10.3.2.0/24"), ip("10.99.0.2"))]
    with pytest.raises(BadConfig, match="IPv4 only"):
        make(config("udp", network=DUAL), facts())
    assert backend.attrs().backend_data == b""  # as flannel's
    other = make(config("udp"), facts(tun="flannel3"))
    assert {item.device for item in [*other.local(OWN), *other.peer(OWN, peer(""))] if not isinstance(item, Link)} == {
        "flannel3"
    }


def test_udp_by_programs_in_the_kernel():
    backend = make(config("udp"), facts(found={"engine": "bpf", "check": "strict"}))
    network = net("10.3.0.0/16")
    tunnel, *_, programs = backend.local(OWN)
    assert tunnel == Tunnel("flannel0", 1472, ip("10.99.0.1"), 8285, "offload", "strict", network, lasts=True)
    assert programs == BpfTunnel("flannel0", 1472, "eth0", ip("10.99.0.1"), 8285, network, "strict")
    assert backend.attrs().backend_data == b'{"Engine":"bpf"}'
    subnet, host = net("10.3.2.0/24"), ip("10.99.0.2")
    for data, whole in (
        (b'{"Engine":"bpf"}', True),
        (b'{"Engine":"bpf","More":1}', True),
        (b'{"Engine":"something"}', False),
        (b"", False),  # flannel's
        (b"null", False),
        (b'{"Engine":7}', False),
        (b"[1", False),
    ):
        assert backend.peer(OWN, peer("", data=data)) == [
            TunnelPeer("flannel0", subnet, host),
            BpfRoute("flannel0", subnet, host, whole),
        ]


def test_udp_by_fou():
    """What leaves is finished here, as the other end may be a process; nothing is said in the lease."""
    host = facts(found={"engine": "fou"})
    backend = make(config("udp", ', "Port": 9000'), host)
    assert backend.local(OWN) == [
        FouPort(9000),
        Link("flannel0", "ipip", 1472, ipip=Ipip(ip("10.99.0.1"), 9000), tx_checksum=False),
        InterfaceAddress("flannel0", net("10.3.1.0/32")),
    ]
    assert backend.peer(OWN, peer("")) == [Route(net("10.3.2.0/24"), "flannel0", gateway=ip("10.99.0.2"), onlink=True)]
    assert backend.attrs().backend_data == b""


def test_unknown_backend():
    with pytest.raises(UnknownBackend, match="'vxlna' is unknown; use one of ali-vpc"):
        make(config("vxlna"), facts())


def planner(backend, own=OWN, policy=None, others=None, **changes):
    parsed = config(backend, **changes)
    host = facts()
    identity = Identity(host.public, host.public_v6)
    return Planner(
        config=parsed,
        host=host,
        backend=make(parsed, host),
        identity=identity,
        own=own,
        policy=policy or Policy(),
        others=others,
    )


def test_own_leases_are_no_peers():
    assert planner("vxlan").peer(peer(key=str(OWN))) == []
    assert planner("vxlan").peer(peer(address="10.99.0.1")) == []


def test_a_peer_with_another_backend_is_reached_by_its_own():
    assert planner("vxlan").peer(peer("host-gw")) == [
        Sysctl("net/ipv4/conf/flannel.1/rp_filter", "2"),  # what comes in there may not go out there
        Route(net("10.3.2.0/24"), "eth0", gateway=ip("10.99.0.2")),
    ]
    objects = planner("host-gw").peer(peer("vxlan"))
    assert Route(net("10.3.2.0/24"), "flannel.1", gateway=ip("10.3.2.0"), onlink=True) in objects
    assert Link("flannel.1", "vxlan", 1450, mac=MAC, vxlan=Vxlan(1, 8472, ip("10.99.0.1"), "eth0")) in objects
    assert Sysctl("net/ipv4/conf/flannel.1/rp_filter", "2") in objects
    assert TunnelPeer("flannel0", net("10.3.2.0/24"), ip("10.99.0.2")) in planner("vxlan").peer(peer(""))


def test_a_peer_of_another_vni_gets_a_device_of_that_vni():
    objects = planner("vxlan").peer(peer(data=b'{"VNI":7,"VtepMAC":"%s"}' % PEER_MAC.encode()))
    assert "flannel.7" in {item.name for item in objects if isinstance(item, Link)}


def test_a_late_peer_has_the_options_of_an_earlier_config():
    known = [
        ("vxlan", BackendOptions.of({"Type": "vxlan", "VNI": 2, "Port": 4790})),
        ("vxlan", BackendOptions.of({"Type": "vxlan", "Port": 99999})),  # was refused
        ("vxlan", BackendOptions.of({"Type": "vxlan", "Port": 4789, "MTU": 1400})),
    ]
    host = facts(known=known)
    helper = towards(peer("vxlan").attrs, config("host-gw"), host)
    assert [(link.mtu, link.vxlan.vni, link.vxlan.port) for link in helper.local(OWN) if isinstance(link, Link)] == [
        (1350, 1, 4789)
    ]
    unknown = towards(peer("vxlan").attrs, config("host-gw"), facts())
    assert [(link.mtu, link.vxlan.port) for link in unknown.local(OWN) if isinstance(link, Link)] == [(1450, 8472)]


def test_a_translated_address_is_no_obstacle_to_reaching_host_gw_peers():
    host = facts(public=ip("203.0.113.7"))
    [route] = towards(peer("host-gw").attrs, config("vxlan"), host).peer(OWN, peer("host-gw"))
    assert route == Route(net("10.3.2.0/24"), "eth0", gateway=ip("10.99.0.2"))


def test_a_peer_that_cannot_be_reached_is_one_bad_lease():
    with pytest.raises(BadLease, match="wireguard"):
        planner("vxlan").peer(peer("wireguard", data=b"{}"))


def test_a_peer_does_not_get_the_device_of_another_network():
    others = Others((net("10.7.0.0/16"),), frozenset({"flannel.7"}))
    seven = peer(data=b'{"VNI":7,"VtepMAC":"%s"}' % PEER_MAC.encode())
    assert planner("vxlan", others=Others()).peer(seven)
    with pytest.raises(BadLease, match=r"flannel\.7, the device of another network"):
        planner("vxlan", others=others).peer(seven)


@pytest.mark.parametrize(
    ("backend", "devices", "port"),
    [("vxlan", ("flannel.1", "eth0"), 8472), ("udp", ("flannel0", "eth0"), 8285), ("host-gw", ("eth0",), 0)],
)
def test_one_of_several_networks_is_kept_apart(backend, devices, port):
    """Also where it asks for no other rules."""
    others = Others((net("10.7.0.0/16"), net("fd00:7::/48")))
    (rules,) = (
        item
        for item in planner(backend, policy=Policy(forward=False), others=others).local()
        if isinstance(item, RuleSet)
    )
    assert rules.isolation == Isolation(others.ranges, devices, port)
    assert not any(isinstance(item, RuleSet) for item in planner(backend, policy=Policy(forward=False)).local())


def test_rules_and_blackhole_for_each_family():
    policy = Policy(masquerade=True, exclude=(net("192.168.0.0/16"),), blackhole=True)
    objects = planner("host-gw", own=OWN_DUAL, policy=policy, network=DUAL).local()
    assert objects == [
        Route(net("10.3.1.0/24"), "", kind="blackhole"),
        RuleSet(net("10.3.0.0/16"), net("10.3.1.0/24"), True, True, exclude=(net("192.168.0.0/16"),)),
        Route(net("fd00:3:0:1::/64"), "", kind="blackhole"),
        RuleSet(net("fd00:3::/48"), net("fd00:3:0:1::/64"), True, True),
    ]
    assert planner("host-gw", policy=Policy(forward=False)).local() == []
