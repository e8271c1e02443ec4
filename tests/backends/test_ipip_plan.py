"""What ipip publishes and plans, against the compatibility reference (sections 4.2 and 6.4)."""

import pytest

from wincey.agent.planner import Planner, Policy
from wincey.backends.base import HostFacts
from wincey.backends.catalogue import make, towards
from wincey.leasing.allocate import Identity
from wincey.model.address import Subnet, parse_address
from wincey.model.config import NetworkConfig
from wincey.model.errors import BadConfig, BadLease, NotJoinable
from wincey.model.lease import Lease, LeaseAttrs, LeaseKey
from wincey.model.state import InterfaceAddress, Ipip, Link, Route, Sysctl

HERE, THERE, OUTSIDE = (parse_address(f"10.99.0.{number}") for number in (1, 2, 200))
NEAR, FAR = Subnet.parse("10.3.2.0/24"), Subnet.parse("10.3.3.0/24")
OWN = LeaseKey.parse("10.3.1.0-24")
DEVICE = Link("flannel.ipip", "ipip", 1480, ipip=Ipip(HERE))
ADDRESS = InterfaceAddress("flannel.ipip", Subnet.parse("10.3.1.0/32"))


def facts(mtu=1500, local=HERE, public=HERE):
    connected = [(Subnet.parse("10.99.0.0/24"), "eth0")]
    return HostFacts("eth0", mtu, local, None, public, None, connected=connected)


def config(kind="ipip", extra="", network='"Network": "10.3.0.0/16"'):
    return NetworkConfig.parse(f'{{{network}, "Backend": {{"Type": "{kind}"{extra}}}}}')


def lease(kind="ipip", subnet="10.3.2.0-24", address=THERE):
    return Lease(LeaseKey.parse(subnet), LeaseAttrs(address, None, kind))


def planner(kind, host):
    chosen = config(kind)
    return Planner(
        config=chosen,
        host=host,
        backend=make(chosen, host),
        identity=Identity(host.public, None),
        own=OWN,
        policy=Policy(forward=False),
    )


def test_the_lease_has_the_type_and_no_data():
    assert make(config(), facts()).attrs() == LeaseAttrs(HERE, None, "ipip")


def test_mtu_is_less_by_the_outer_header():
    assert make(config(), facts(mtu=9000)).mtu == 8980
    assert make(config(), facts(mtu=88)).mtu == 68
    with pytest.raises(NotJoinable, match="at least 88 on eth0, which has 87"):
        make(config(), facts(mtu=87))


def test_device_and_address_of_the_host():
    assert make(config(), facts()).local(OWN) == [DEVICE, ADDRESS]


def test_behind_nat_the_device_sends_from_the_interface():
    backend = make(config(), facts(public=OUTSIDE))
    assert backend.attrs().public_ip == OUTSIDE
    assert backend.local(OWN)[0] == DEVICE


def test_a_peer_is_one_route():
    assert make(config(), facts()).peer(OWN, lease()) == [Route(NEAR, "flannel.ipip", gateway=THERE, onlink=True)]


def test_direct_routing_goes_without_the_device_where_no_router_is_between():
    backend = make(config(extra=', "directrouting": true'), facts())
    assert backend.peer(OWN, lease()) == [Route(NEAR, "eth0", gateway=THERE)]
    behind = lease(subnet="10.3.3.0-24", address=parse_address("192.0.2.9"))
    assert backend.peer(OWN, behind) == [Route(FAR, "flannel.ipip", gateway=parse_address("192.0.2.9"), onlink=True)]


def test_a_lease_without_a_public_address_is_one_bad_lease():
    with pytest.raises(BadLease, match="names no PublicIP"):
        make(config(), facts()).peer(OWN, lease(address=None))


@pytest.mark.parametrize(
    "network",
    [
        '"EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "fd00:3::/48"',
        '"Network": "10.3.0.0/16", "EnableIPv6": true, "IPv6Network": "fd00:3::/48"',
    ],
)
def test_it_carries_ipv4_only(network):
    with pytest.raises(BadConfig, match=r"ipip backend carries IPv4 only; .* vxlan or host-gw"):
        make(config(network=network), facts())


def test_an_interface_without_an_ipv4_address():
    with pytest.raises(NotJoinable, match="IPv4 address on eth0"):
        make(config(), facts(local=None))


@pytest.mark.parametrize("kind", ["vxlan", "host-gw", "udp"])
def test_hosts_of_other_backends_reach_its_peers_during_a_change(kind):
    host = HostFacts("eth0", 1500, HERE, None, HERE, None, macs={"flannel.1": b"\x0e\0\0\0\0\1"})
    objects = planner(kind, host).peer(lease())
    assert objects[:2] == [DEVICE, ADDRESS]
    assert objects[-1] == Route(NEAR, "flannel.ipip", gateway=THERE, onlink=True)
    assert Sysctl("net/ipv4/conf/flannel.ipip/rp_filter", "2") in objects


def test_it_reaches_peers_of_host_gw():
    assert planner("ipip", facts()).peer(lease("host-gw"))[-1] == Route(NEAR, "eth0", gateway=THERE)


@pytest.mark.parametrize("kind", ["ipip", ""])
def test_a_dual_stack_host_reaches_what_its_late_peers_have(kind):
    dual = config("host-gw", network='"Network": "10.3.0.0/16", "EnableIPv6": true, "IPv6Network": "fd00:3::/48"')
    helper = towards(lease(kind).attrs, dual, facts())
    assert helper.peer(LeaseKey.parse("10.3.1.0-24&fd00:3:0:1::-64"), lease(kind))


def test_a_host_without_ipv4_has_no_way_to_an_ipip_peer():
    six = config("host-gw", network='"EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "fd00:3::/48"')
    with pytest.raises(BadLease, match=r"'ipip', which this host can't reach: .*IPv4 only"):
        towards(lease().attrs, six, facts())
