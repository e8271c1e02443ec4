"""Plans of gce, tencent-vpc and ali-vpc: what of the config and of the host reaches the table's keeper."""

import pytest

from wincey.agent.parts import QUESTIONS
from wincey.backends.base import HostFacts
from wincey.backends.catalogue import make
from wincey.backends.cloud import CloudBackend
from wincey.model.address import Subnet, parse_address
from wincey.model.cloud import CloudForwarding, CloudLease, CloudRoute, CloudTable, HostRef
from wincey.model.config import NetworkConfig
from wincey.model.errors import BadConfig
from wincey.model.lease import Lease, LeaseAttrs, LeaseKey

OWN = LeaseKey(Subnet.parse("10.5.1.0/24"))
ADDRESS = parse_address("10.99.0.1")
FOUND = {
    "gce": {"project": "p", "network": "default", "instance": "europe-west1-b/h1"},
    "tencent-vpc": {"region": "ap-guangzhou", "vpc": "vpc-1"},
    "ali-vpc": {"region": "cn-hangzhou", "vpc": "vpc-1", "instance": "i-1"},
}
KEYED = ("tencent-vpc", "ali-vpc")


def backend(kind, options=""):
    text = f'{{"Network": "10.5.0.0/16", "Backend": {{"Type": "{kind}"{options}}}}}'
    facts = HostFacts("eth0", 1460, ADDRESS, None, ADDRESS, None, found=FOUND[kind])
    made = make(NetworkConfig.parse(text), facts)
    assert isinstance(made, CloudBackend)
    return made


@pytest.mark.parametrize("kind", FOUND)
def test_a_host_asks_for_its_own_route(kind):
    made = backend(kind)
    me = HostRef(FOUND[kind].get("instance", ""), ADDRESS)
    settings = tuple(sorted((key, value) for key, value in FOUND[kind].items() if key != "instance"))
    assert made.local(OWN) == [
        CloudTable(provider=kind, network=Subnet.parse("10.5.0.0/16"), settings=settings, own=me),
        CloudForwarding(me),
        CloudRoute(OWN.v4, me),
    ]
    assert made.mtu == 1460
    assert made.attrs().backend_type == kind
    assert kind in QUESTIONS


@pytest.mark.parametrize("kind", FOUND)
def test_a_peer_is_known(kind):
    lease = Lease(LeaseKey(Subnet.parse("10.5.2.0/24")), LeaseAttrs(public_ip=parse_address("10.99.0.2")))
    made = backend(kind)
    assert made.reaches(lease.attrs)  # flannel's says no type
    assert made.peer(OWN, lease) == [CloudLease(lease.key.v4, HostRef("", lease.attrs.public_ip))]


@pytest.mark.parametrize("kind", KEYED)
def test_keys_reach_the_table_and_nobody_else(kind):
    made = backend(kind, ', "AccessKeyID": "LTAI1", "accesskeysecret": "s3cr3t"')
    table = made.local(OWN)[0]
    assert dict(table.secrets) == {"AccessKeyID": "LTAI1", "AccessKeySecret": "s3cr3t"}
    assert "s3cr3t" not in f"{table} {table!r} {made.attrs()!r}"


@pytest.mark.parametrize("kind", KEYED)
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (', "AccessKeyID": "LTAI1"', "Backend.AccessKeySecret is missing: give both"),
        (', "AccessKeySecret": "s3cr3t"', "Backend.AccessKeyID is missing: give both"),
        (', "AccessKeyID": "LTAI1", "AccessKeySecret": ["s3cr3t"]', "Backend.AccessKeySecret is no text"),
        (', "RouteTableID": 7', "Backend.RouteTableID is 7, but must be the id of a route table"),
        (', "RouteTableID": ["rtb-1", ""]', "must be the id of a route table, or a list of ids"),
    ],
)
def test_wrong_keys(kind, options, words):
    with pytest.raises(BadConfig, match=words) as caught:
        backend(kind, options)
    assert "s3cr3t" not in str(caught.value)


@pytest.mark.parametrize("kind", KEYED)
def test_tables_of_the_config(kind):
    assert backend(kind, ', "RouteTableID": "rtb-1"').local(OWN)[0].tables == ("rtb-1",)
    assert backend(kind, ', "RouteTableID": ["rtb-1", "rtb-2", "rtb-1"]').local(OWN)[0].tables == ("rtb-1", "rtb-2")


@pytest.mark.parametrize("kind", FOUND)
def test_ipv4_alone(kind):
    both = f'{{"Network": "10.5.0.0/16", "EnableIPv6": true, "IPv6Network": "fd00:5::/48", "Backend": {{"Type": "{kind}"}}}}'
    with pytest.raises(BadConfig, match=f"{kind} is for IPv4 alone"):
        make(NetworkConfig.parse(both), HostFacts("eth0", 1460, ADDRESS, None, ADDRESS, None))
