"""What the bgp backend plans, and which configs it refuses."""

import pytest

from wincey.backends.base import HostFacts
from wincey.backends.catalogue import make, towards
from wincey.model.address import Subnet, parse_address
from wincey.model.bgp import Accepted, BgpPeer, BgpRoute, BgpSession, BgpSpeaker
from wincey.model.config import NetworkConfig
from wincey.model.errors import BadConfig, BadLease, NotJoinable
from wincey.model.lease import Lease, LeaseAttrs, LeaseKey
from wincey.model.secret import Secret
from wincey.model.state import Route

OWN, DUAL = LeaseKey.parse("10.3.1.0-24"), LeaseKey.parse("10.3.1.0-24&fd00:3:0:1::-64")


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
        "found": {"routing-daemon": "frr"},
    }
    return HostFacts(**(values | changes))


def config(extra="", dual=False, backend="bgp"):
    v6 = ', "EnableIPv6": true, "IPv6Network": "fd00:3::/48"' if dual else ""
    return NetworkConfig.parse(f'{{"Network": "10.3.0.0/16"{v6}, "Backend": {{"Type": "{backend}"{extra}}}}}')


def peer(key="10.3.2.0-24", address="10.99.0.2", v6=None):
    return Lease(LeaseKey.parse(key), LeaseAttrs(ip(address) if address else None, ip(v6) if v6 else None, "bgp"))


def test_defaults():
    backend = make(config(), facts())
    assert backend.mtu == 1500
    assert backend.attrs().encode() == b'{"PublicIP":"10.99.0.1","PublicIPv6":null,"BackendType":"bgp"}'
    assert backend.local(OWN) == [
        BgpSpeaker(
            daemon="frr",
            instance="own",
            asn=64512,
            port=179,
            router_id=ip("10.99.0.1"),
            local=ip("10.99.0.1"),
            local_v6=None,
            subnets=(net("10.3.1.0/24"),),
            accepted=(Accepted(net("10.3.0.0/16"), 24),),
        )
    ]
    assert backend.peer(OWN, peer()) == [
        BgpPeer(ip("10.99.0.2"), 64512, 179, (net("10.3.2.0/24"),)),
        BgpRoute(net("10.3.2.0/24"), gateway=ip("10.99.0.2"), neighbour=ip("10.99.0.2")),
    ]


def test_each_family_has_its_session():
    backend = make(config(dual=True), facts())
    [speaker] = backend.local(DUAL)
    assert speaker.local_v6 == ip("fd00:99::1")
    assert [rule.length for rule in speaker.accepted] == [24, 64]
    objects = backend.peer(DUAL, peer("10.3.2.0-24&fd00:3:0:2::-64", v6="fd00:99::2"))
    assert [item.address for item in objects if isinstance(item, BgpPeer)] == [ip("10.99.0.2"), ip("fd00:99::2")]
    assert [str(item) for item in objects if isinstance(item, BgpRoute)] == [
        "BGP route 10.3.2.0/24 via 10.99.0.2",
        "BGP route fd00:3:0:2::/64 via fd00:99::2",
    ]


def test_routers_take_the_place_of_the_mesh():
    backend = make(config(', "Peers": ["10.99.0.254"], "PeerPort": 1790'), facts())
    assert backend.local(OWN)[1:] == [BgpPeer(ip("10.99.0.254"), 64512, 1790), BgpSession(ip("10.99.0.254"))]
    assert backend.peer(OWN, peer()) == [BgpRoute(net("10.3.2.0/24"), gateway=ip("10.99.0.2"))]


def test_a_router_of_another_as_may_put_itself_into_the_way():
    backend = make(config(', "Peers": ["10.99.0.254"], "PeerASN": 65000'), facts())
    assert backend.peer(OWN, peer()) == [BgpRoute(net("10.3.2.0/24"))]
    both = make(config(', "Peers": ["10.99.0.254"], "PeerASN": 65000, "Mesh": true'), facts())
    assert [type(item) for item in both.peer(OWN, peer())] == [BgpPeer, BgpRoute]


def test_of_the_routers_of_all_racks_a_host_takes_its_own():
    extra = ', "Peers": ["10.99.0.254", "10.98.0.254"], "PeerASN": 65000'
    found = {"routing-daemon": "bird", "near-routers": "10.99.0.254"}

    def addresses(extra, **found):
        return [
            item.address for item in make(config(extra), facts(found=found)).local(OWN) if isinstance(item, BgpPeer)
        ]

    assert addresses(extra, **found) == [ip("10.99.0.254")]
    assert addresses(extra) == [ip("10.99.0.254"), ip("10.98.0.254")], "their sessions say what is wrong"
    reflectors = extra.replace("65000", "64512")
    assert addresses(reflectors, **found) == [ip("10.99.0.254"), ip("10.98.0.254")], "these may stand elsewhere"


def test_the_config_comes_before_what_was_found():
    [speaker] = make(config(', "Daemon": "BIRD"'), facts()).local(OWN)
    assert (speaker.daemon, speaker.include, speaker.control) == ("bird", "", "")
    [speaker] = make(config(', "Instance": "host", "Control": "/x.ctl"'), facts()).local(OWN)
    assert (speaker.daemon, speaker.instance) == ("bird", "host")
    assert (speaker.include, speaker.control) == ("/etc/bird/wincey.conf", "/x.ctl")


def test_the_password_shows_nowhere():
    [speaker] = make(config(', "Password": "hunter-2!"'), facts()).local(OWN)
    assert speaker.password == Secret("hunter-2!")
    assert "hunter" not in f"{speaker} {speaker!r} {speaker.password} {[speaker]}"
    with pytest.raises(BadConfig, match="Password") as error:
        make(config(', "Password": "hunter 2"'), facts())
    assert "hunter" not in str(error.value)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (', "ASN": 0', "ASN"),
        (', "Port": 70000', "Port"),
        (', "HoldTime": 1', "HoldTime"),
        (', "Daemon": "quagga"', "auto, bird or frr"),
        (', "Instance": "mine"', "own or host"),
        (', "Daemon": "frr", "Instance": "host"', "BIRD only"),
        (', "Peers": "10.99.0.254"', "list"),
        (', "Peers": ["10.99.0"]', "list"),
        (', "Peers": ["fd00::1"]', "family"),
        (', "Mesh": false', "no host would learn"),
        (f', "Password": "{"x" * 81}"', "1 to 80"),
    ],
)
def test_wrong_keys_are_explained(extra, words):
    with pytest.raises(BadConfig, match=words):
        make(config(extra), facts())


def test_a_translated_address_is_refused():
    with pytest.raises(NotJoinable, match=r"203\.0\.113\.9"):
        make(config(), facts(public=ip("203.0.113.9")))


def test_a_lease_without_an_address_is_one_bad_lease():
    with pytest.raises(BadLease, match="PublicIP"):
        make(config(), facts()).peer(OWN, peer(address=None))
    with pytest.raises(BadLease, match="PublicIPv6"):
        make(config(dual=True), facts()).peer(DUAL, peer("10.3.2.0-24&fd00:3:0:2::-64"))


def test_hosts_of_other_backends_reach_it_by_plain_routes():
    """Also behind NAT: what a BGP speaker demands of its own address is for being reached."""
    way = towards(peer().attrs, config(backend="vxlan"), facts(public=ip("203.0.113.9")))
    assert way.reaches(peer().attrs)
    assert way.peer(OWN, peer()) == [Route(net("10.3.2.0/24"), "eth0", gateway=ip("10.99.0.2"))]
