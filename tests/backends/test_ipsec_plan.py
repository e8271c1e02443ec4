"""What the ipsec backend publishes and plans (compatibility reference, sections 4.2 and 6.6), and that it keeps its secret."""

import json
import traceback

import msgspec
import pytest

from wincey.backends.base import HostFacts
from wincey.backends.catalogue import make
from wincey.backends.ipsec import PROPOSAL
from wincey.model.address import Subnet, parse_address
from wincey.model.config import NetworkConfig
from wincey.model.errors import BadConfig, BadLease, NotJoinable
from wincey.model.ipsec import IkeDaemon, IpsecPeer, IpsecTerms, XfrmPolicy
from wincey.model.lease import Lease, LeaseAttrs, LeaseKey
from wincey.model.secret import Secret
from wincey.model.state import Link, Route

PSK = "0123456789abcdef" * 6
OWN, PEER = LeaseKey.parse("10.3.1.0-24"), LeaseKey.parse("10.3.2.0-24")
MINE, ITS = Subnet.parse("10.3.1.0/24"), Subnet.parse("10.3.2.0/24")
US, IT = parse_address("10.99.0.1"), parse_address("10.99.0.2")
BLACKHOLE = Route(Subnet.parse("10.3.0.0/16"), "", kind="blackhole")
FILES = {"CertFile": "/etc/c.pem", "KeyFile": "/etc/k.pem", "CAFile": "/etc/a.pem"}


def backend(options=None, esp="kernel", **changes):
    config = {"Network": "10.3.0.0/16", "Backend": {"Type": "ipsec", **({"PSK": PSK} if options is None else options)}}
    values = {"underlay": "eth0", "mtu": 1500, "local": US, "local_v6": None, "public": US, "public_v6": None}
    facts = HostFacts(**(values | {"found": {"esp": esp}} | changes))
    return make(NetworkConfig.parse(json.dumps(config)), facts)


def lease(**changes):
    return Lease(PEER, LeaseAttrs(**({"public_ip": IT, "backend_type": "ipsec"} | changes)))


@pytest.mark.parametrize(("encap", "mtu"), [(False, 1423), (True, 1415)])
def test_mtu_is_flannels(encap, mtu):
    assert backend({"PSK": PSK, "UDPEncap": encap}).mtu == mtu
    assert backend({"PSK": PSK, "UDPEncap": encap}, "user").mtu == 1400, "charon reads no longer packets"
    assert backend({"PSK": PSK, "UDPEncap": encap}, "user", mtu=1400).mtu == mtu - 100


def test_the_lease_is_flannels_byte_for_byte():
    assert backend().attrs().encode() == b'{"PublicIP":"10.99.0.1","PublicIPv6":null,"BackendType":"ipsec"}'


def test_plan_with_esp_in_the_kernel():
    made = backend()
    assert made.local(OWN) == [IkeDaemon("kernel", Secret(PSK)), BLACKHOLE]
    assert made.peer(OWN, lease()) == [
        XfrmPolicy("out", MINE, ITS, (US, IT)),
        XfrmPolicy("in", ITS, MINE, (IT, US)),
        XfrmPolicy("fwd", ITS, MINE, (IT, US)),
        XfrmPolicy("out", Subnet.parse("0.0.0.0/0"), ITS, None),
        Route(ITS, "eth0"),
        IpsecPeer(MINE, ITS, US, IT, IpsecTerms(US, "psk", "kernel", PROPOSAL, False)),
    ]


def test_plan_with_esp_in_user_space():
    """Nothing leads to a peer but what charon itself makes; the blackhole has the rest."""
    made = backend(esp="user")
    assert made.local(OWN) == [IkeDaemon("user", Secret(PSK)), BLACKHOLE, Link("ipsec0", "tun", 1400)]
    assert made.peer(OWN, lease()) == [IpsecPeer(MINE, ITS, US, IT, IpsecTerms(US, "psk", "user", PROPOSAL, False))]


def test_behind_nat_we_send_from_our_own_address_and_are_known_by_the_public_one():
    public = parse_address("203.0.113.7")
    *policies, _, _, peer = backend(public=public).peer(OWN, lease())
    assert policies[0].tunnel == (US, IT)
    assert (peer.identity, peer.terms.local) == (public, US)


def test_certificates_need_no_psk():
    made = backend({"Auth": "cert", **FILES})
    assert made.local(OWN)[0] == IkeDaemon("kernel", None, "/etc/c.pem", "/etc/k.pem", "/etc/a.pem")
    assert made.peer(OWN, lease())[-1].terms.auth == "cert"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, r"PSK is missing, .*at least 96; make one with `openssl rand -hex 48`, or use certificates"),
        ({"PSK": PSK[:95]}, "PSK has 95 characters, .*at least 96"),
        ({"PSK": 4711}, "PSK is not a text"),
        ({"Auth": "rsa", "PSK": PSK}, 'Auth is "rsa", but must be one of psk, cert'),
        (
            {"Auth": "cert", **FILES, "KeyFile": "k.pem"},
            r'KeyFile is "k.pem", but must be the absolute path .*key.pem"',
        ),
        ({"ESP": "hardware", "PSK": PSK}, "ESP is .*one of auto, kernel, user"),
        ({"UDPEncap": "yes", "PSK": PSK}, "UDPEncap is .*true or false"),
    ],
)
def test_wrong_keys_are_told_in_one_line_without_the_secret(options, words):
    with pytest.raises(BadConfig, match=words) as caught:
        backend(options)
    assert "\n" not in str(caught.value)
    for secret in (PSK[:95], "4711"):
        assert secret not in "".join(traceback.format_exception(caught.value))


def test_ipv4_alone():
    config = (
        '{"Network": "10.3.0.0/16", "EnableIPv6": true, "IPv6Network": "fd00:3::/48", "Backend": {"Type": "ipsec"}}'
    )
    with pytest.raises(BadConfig, match=r"IPv4 only; .*wireguard"):
        make(NetworkConfig.parse(config), HostFacts("eth0", 1500, US, None, US, None))
    with pytest.raises(NotJoinable, match="IPv4 address on eth0"):
        backend(local=None, public=None)
    with pytest.raises(BadLease, match="names no PublicIP"):
        backend().peer(OWN, lease(public_ip=None))


def test_small_mtu():
    with pytest.raises(BadConfig, match="MTU of at least 153 on eth0, which has 140"):
        backend(mtu=140)


def test_the_secret_is_printed_nowhere():
    daemon = backend().local(OWN)[0]
    assert daemon.psk.value == PSK
    shown = f"{daemon} {daemon!r} {daemon.psk} {daemon.psk!r} {[daemon]} {daemon.key}"
    assert PSK not in shown
    assert PSK not in str(msgspec.structs.astuple(daemon))
    assert PSK not in repr(backend().peer(OWN, lease()))


@pytest.mark.parametrize(
    "text",
    [
        '{"Network": "10.3.0.0/16", "Backend": {"Type": "ipsec", "psk" : "%s"}',
        '{"Backend": {"PSK": "%s',
        '[{"PSK": "%s"}]',
        '{"Network": "10.3.0.0/16", "Backend": [{"PSK": "%s"}]}',
        '{"Network": {"PSK": "a\\"%s"}}',
    ],
)
def test_a_config_that_cannot_be_read_is_shown_without_its_secret(text):
    secret = "0123456789" * 3
    with pytest.raises(BadConfig) as caught:
        NetworkConfig.parse(text % secret)
    assert secret[:8] not in str(caught.value)
    assert "..." in str(caught.value)
