"""What the wireguard backend publishes and plans, against the compatibility reference (sections 3.3, 4.2, 6.5 and 14 (34))."""

from base64 import b64encode

import msgspec
import pytest

from wincey.backends.base import HostFacts
from wincey.backends.catalogue import make
from wincey.model.address import Subnet, parse_address
from wincey.model.config import NetworkConfig
from wincey.model.errors import BadConfig, BadLease
from wincey.model.lease import Lease, LeaseAttrs, LeaseKey
from wincey.model.secret import Secret
from wincey.model.state import Failure, InterfaceAddress, Link, Route
from wincey.model.wireguard import WireguardDevice, WireguardPeer, WireguardSubnet

OWN_KEY, PEER_KEY, PSK = bytes(range(32)), bytes(range(32, 64)), bytes(range(64, 96))
V4 = '"Network": "10.3.0.0/16"'
V6 = '"EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "fd00:3::/48"'
DUAL = '"Network": "10.3.0.0/16", "EnableIPv6": true, "IPv6Network": "fd00:3::/48"'
KEYS = {V4: "10.3.1.0-24", V6: "0.0.0.0-0&fd00:3:0:1::-64", DUAL: "10.3.1.0-24&fd00:3:0:1::-64"}
PEER_KEYS = {V4: "10.3.2.0-24", V6: "0.0.0.0-0&fd00:3:0:2::-64", DUAL: "10.3.2.0-24&fd00:3:0:2::-64"}


def text(key):
    return b64encode(key).decode()


def ip(address):
    return parse_address(address)


def net(subnet):
    return Subnet.parse(subnet)


def facts(**changes):
    values = {
        "underlay": "eth0",
        "mtu": 1500,
        "local": ip("10.99.0.1"),
        "local_v6": ip("fd00:99::1"),
        "public": ip("10.99.0.1"),
        "public_v6": ip("fd00:99::1"),
        "found": {"public_key": text(OWN_KEY), "key_file": "/run/flannel/wgkey", "way": "kernel"},
    }
    return HostFacts(**(values | changes))


def backend(network=V4, extra="", **changes):
    if network == V4:
        changes = {"local_v6": None, "public_v6": None} | changes
    if network == V6:
        changes = {"local": None, "public": None} | changes
    config = NetworkConfig.parse(f'{{{network}, "Backend": {{"Type": "wireguard"{extra}}}}}')
    return make(config, facts(**changes))


def lease(network=V4, *, v4="10.99.0.2", v6="fd00:99::2", port=51820, port_v6=51821, key=PEER_KEY):
    data = b'{"PublicKey":"%s","Port":%d}' % (text(key).encode(), port)
    data_v6 = b'{"PublicKey":"%s","Port":%d}' % (text(key).encode(), port_v6)
    has_v4, has_v6 = network in (V4, DUAL), network in (V6, DUAL)
    attrs = LeaseAttrs(
        ip(v4) if has_v4 and v4 else None,
        ip(v6) if has_v6 and v6 else None,
        "wireguard",
        data if has_v4 else b"",
        data_v6 if has_v6 else b"",
    )
    return Lease(LeaseKey.parse(PEER_KEYS[network]), attrs)


def peers(objects):
    return [item for item in objects if isinstance(item, WireguardPeer)]


def own(network):
    return LeaseKey.parse(KEYS[network])


def test_lease_values_are_flannels_byte_for_byte():
    assert backend().attrs().encode() == (
        b'{"PublicIP":"10.99.0.1","PublicIPv6":null,"BackendType":"wireguard",'
        b'"BackendData":{"PublicKey":"%s","Port":51820}}' % text(OWN_KEY).encode()
    )
    assert backend(DUAL).attrs().encode() == (
        b'{"PublicIP":"10.99.0.1","PublicIPv6":"fd00:99::1","BackendType":"wireguard",'
        b'"BackendData":{"PublicKey":"%s","Port":51820},"BackendV6Data":{"PublicKey":"%s","Port":51821}}'
        % (text(OWN_KEY).encode(), text(OWN_KEY).encode())
    )


@pytest.mark.parametrize(
    ("network", "extra", "mtu", "underlay"),
    [(V4, "", 1420, 1500), (V6, "", 1420, 1500), (DUAL, ', "MTU": 1400', 1320, 1500), (V4, "", 8921, 9001)],
)
def test_mtu(network, extra, mtu, underlay):
    made = backend(network, extra, mtu=underlay)
    assert made.mtu == mtu
    assert {item.mtu for item in made.local(own(network)) if isinstance(item, Link)} == {mtu}


def test_one_device_for_ipv4():
    assert backend().local(own(V4)) == [
        WireguardDevice("flannel-wg", "kernel", 51820, OWN_KEY, "/run/flannel/wgkey"),
        Link("flannel-wg", "wireguard", 1420),
        InterfaceAddress("flannel-wg", net("10.3.1.0/32")),
        Route(net("10.3.0.0/16"), "flannel-wg", link_scope=True),
    ]
    assert backend().peer(own(V4), lease()) == [
        WireguardPeer("flannel-wg", PEER_KEY, ip("10.99.0.2"), 51820),
        WireguardSubnet("flannel-wg", net("10.3.2.0/24"), PEER_KEY),
    ]


def test_separate_devices_for_both_families():
    made = backend(DUAL, ', "ListenPort": 1000, "ListenPortV6": 1001')
    devices = [item for item in made.local(own(DUAL)) if isinstance(item, WireguardDevice)]
    assert [(item.device, item.port) for item in devices] == [("flannel-wg", 1000), ("flannel-wg-v6", 1001)]
    assert Route(net("fd00:3::/48"), "flannel-wg-v6") in made.local(own(DUAL))
    assert made.peer(own(DUAL), lease(DUAL)) == [
        WireguardPeer("flannel-wg", PEER_KEY, ip("10.99.0.2"), 51820),
        WireguardSubnet("flannel-wg", net("10.3.2.0/24"), PEER_KEY),
        WireguardPeer("flannel-wg-v6", PEER_KEY, ip("fd00:99::2"), 51821),
        WireguardSubnet("flannel-wg-v6", net("fd00:3:0:2::/64"), PEER_KEY),
    ]


def test_ipv6_alone_has_the_ipv6_device():
    assert [item.device for item in backend(V6).local(own(V6)) if isinstance(item, WireguardDevice)] == [
        "flannel-wg-v6"
    ]


@pytest.mark.parametrize(
    ("mode", "v4", "v6", "own_v6", "endpoint"),
    [
        ("ipv4", "10.99.0.2", "fd00:99::2", "fd00:99::1", "10.99.0.2"),
        ("ipv6", "10.99.0.2", "fd00:99::2", "fd00:99::1", "fd00:99::2"),
        ("auto", "203.0.113.2", "2001:db8::2", "2001:db8::1", "203.0.113.2"),
        ("auto", "10.99.0.2", "2001:db8::2", "2001:db8::1", "2001:db8::2"),
        ("auto", "192.168.9.2", "2001:db8::2", "fd00:99::1", "192.168.9.2"),
        ("auto", "10.99.0.2", "fd00:99::2", "2001:db8::1", "10.99.0.2"),
        ("auto", "10.99.0.2", None, "2001:db8::1", "10.99.0.2"),
        ("auto", None, "fd00:99::2", "fd00:99::1", "fd00:99::2"),
    ],
)
def test_one_device_for_both_families(mode, v4, v6, own_v6, endpoint):
    made = backend(DUAL, f', "Mode": "{mode}"', public_v6=ip(own_v6), local_v6=ip(own_v6))
    local = made.local(own(DUAL))
    assert [item.device for item in local if isinstance(item, WireguardDevice)] == ["flannel-wg"]
    assert {item.destination for item in local if isinstance(item, Route)} == {net("10.3.0.0/16"), net("fd00:3::/48")}
    # All listen on the one port, and say so for both families.
    assert {
        msgspec.json.decode(data)["Port"] for data in (made.attrs().backend_data, made.attrs().backend_v6_data)
    } == {51820}
    objects = made.peer(own(DUAL), lease(DUAL, v4=v4, v6=v6, port_v6=51820))
    assert peers(objects) == [WireguardPeer("flannel-wg", PEER_KEY, ip(endpoint), 51820)]
    assert [item.subnet for item in objects if isinstance(item, WireguardSubnet)] == [
        net("10.3.2.0/24"),
        net("fd00:3:0:2::/64"),
    ]


@pytest.mark.parametrize(
    ("network", "mode"), [(V4, "auto"), (V4, "ipv4"), (V6, "auto"), (V6, "ipv6"), (V4, "separate"), (V6, "separate")]
)
def test_every_mode_works_with_one_family(network, mode):
    """Flannel ends with a nil dereference here."""
    made = backend(network, f', "Mode": "{mode}"')
    assert len([item for item in made.local(own(network)) if isinstance(item, Route)]) == 1
    assert len(made.peer(own(network), lease(network, port_v6=51820))) == 2


def test_a_lease_of_the_other_family_asks_for_nothing():
    assert backend(V4).peer(own(V4), lease(V6)) == []


def test_ports():
    assert peers(backend().peer(own(V4), lease(port=4444)))[0].port == 4444
    old = msgspec.structs.replace(lease().attrs, backend_data=b'{"PublicKey":"%s"}' % text(PEER_KEY).encode())
    made = backend(extra=', "ListenPort": 5555')
    assert peers(made.peer(own(V4), Lease(lease().key, old)))[0].port == 5555


def test_wireguard_go_runs_a_tun():
    made = backend(found=facts().found | {"way": "wireguard-go"})
    device, link = made.local(own(V4))[:2]
    assert (device.way, link.kind) == ("wireguard-go", "tun")


@pytest.mark.parametrize(
    ("extra", "public", "keepalive"),
    [
        ("", "10.99.0.1", 0),
        ("", "203.0.113.9", 25),  # behind NAT
        (', "PersistentKeepaliveInterval": 0', "203.0.113.9", 0),
        (', "PersistentKeepaliveInterval": 7', "203.0.113.9", 7),
        (', "PersistentKeepaliveInterval": 7', "10.99.0.1", 7),
    ],
)
def test_keepalive(extra, public, keepalive):
    made = backend(extra=extra, public=ip(public))
    assert peers(made.peer(own(V4), lease()))[0].keepalive == keepalive


def test_preshared_key_is_nowhere_to_be_read():
    made = backend(extra=f', "PSK": "{text(PSK)}"')
    (peer,) = peers(made.peer(own(V4), lease()))
    assert peer.psk == Secret(PSK)
    for shown in (str(peer), repr(peer), repr(Failure(peer, "why")), made.attrs().encode().decode()):
        assert text(PSK) not in shown
        assert repr(PSK)[2:-1] not in shown
        assert PSK.hex() not in shown


@pytest.mark.parametrize("psk", ['"short"', '"c2hvcnQ="', "7", '"not base64 at all, and long enough to be one!"'])
def test_a_wrong_preshared_key_is_refused_without_being_shown(psk):
    with pytest.raises(BadConfig, match=r"Backend\.PSK must be 32 bytes in base64") as caught:
        backend(extra=f', "PSK": {psk}')
    assert psk.strip('"') not in str(caught.value)


@pytest.mark.parametrize(
    ("network", "extra", "words"),
    [
        (V4, ', "Mode": "both"', "must be one of separate, auto, ipv4, ipv6"),
        (V4, ', "Mode": "ipv6"', "no address of that family"),
        (V6, ', "Mode": "ipv4"', "no address of that family"),
        (V4, ', "ListenPort": 0', "ListenPort"),
        (V4, ', "ListenPort": 65536', "ListenPort"),
        (DUAL, ', "ListenPort": 51821', "can't share a port"),
        (V4, ', "PersistentKeepaliveInterval": "25s"', "PersistentKeepaliveInterval"),
        (V6, ', "MTU": 1300', "at least 1360"),
    ],
)
def test_wrong_keys_are_explained(network, extra, words):
    with pytest.raises(BadConfig, match=words):
        backend(network, extra)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"{}",
        b'{"PublicKey":"short"}',
        b'{"PublicKey":7}',
        b'{"PublicKey":"%s","Port":70000}' % text(PEER_KEY).encode(),
    ],
)
def test_a_peer_with_unusable_data_is_one_bad_lease(data):
    attrs = msgspec.structs.replace(lease().attrs, backend_data=data)
    with pytest.raises(BadLease):
        backend().peer(own(V4), Lease(lease().key, attrs))


def test_a_peer_with_our_own_key_is_named():
    with pytest.raises(BadLease, match=r"two hosts share one private key \(/run/flannel/wgkey\)"):
        backend().peer(own(V4), lease(key=OWN_KEY))


def test_two_leases_of_one_host_share_its_peer():
    """A host that moved to another subnet: its old lease lives on for a day, and the new subnet has to work at once."""
    made = backend()
    first = made.peer(own(V4), lease())
    second = made.peer(own(V4), Lease(LeaseKey.parse("10.3.9.0-24"), lease().attrs))
    assert {item.key for item in first} & {item.key for item in second} == {first[0].key}
    assert first[0] == second[0]
