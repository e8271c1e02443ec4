"""Where a host is, as it learns it from the instance metadata service, and what it publishes of it."""

import pytest

from support.aws import REGION
from wincey.agent.parts import HostAsk
from wincey.backends.base import HostFacts
from wincey.backends.catalogue import make, towards
from wincey.cloud.aws_metadata import ask_host, ask_server
from wincey.model.address import parse_address
from wincey.model.cloud import CloudForwarding, CloudLease, CloudRoute, CloudTable, HostRef
from wincey.model.config import NetworkConfig
from wincey.model.errors import BadConfig, BadLease, NotJoinable
from wincey.model.lease import Lease, LeaseAttrs, LeaseKey

IP = parse_address("10.99.0.1")
OWN = LeaseKey.parse("10.3.1.0-24")


def config(extra="", network='"Network": "10.3.0.0/16"', kind="aws-vpc"):
    return NetworkConfig.parse(f'{{{network}, "Backend": {{"Type": "{kind}"{extra}}}}}')


def facts(**found):
    return HostFacts(
        underlay="eth0", mtu=9001, local=IP, local_v6=None, public=IP, public_v6=None, found={"region": REGION, **found}
    )


@pytest.mark.parametrize("v2", [True, False])
async def test_both_versions_of_the_service(aws, monkeypatch, v2):
    aws.imds_v2 = v2
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"{aws.url}/imds/i-42")
    assert await ask_host() == {"instance": "i-42", "region": REGION}
    assert await ask_server() == {"region": REGION}


async def test_outside_of_ec2(aws, monkeypatch):
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(NotJoinable, match=r"needs the instance metadata service at http://127.0.0.1:1"):
        await ask_host()
    assert await ask_server() == {}
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"{aws.url}/imds/")
    with pytest.raises(NotJoinable, match=r"does not tell them: see that instance metadata is enabled"):
        await ask_host()


def test_what_a_host_publishes_and_wants():
    backend = make(config(), facts(instance="i-1"))
    assert backend.mtu == 9001
    assert backend.attrs().encode(etcd_v2=True) == (
        b'{"PublicIP":"10.99.0.1","BackendType":"aws-vpc","BackendData":{"InstanceID":"i-1"}}'
    )
    me = HostRef("i-1", IP)
    assert backend.local(OWN) == [
        CloudTable("aws-vpc", config().network, settings=(("region", REGION),), own=me),
        CloudForwarding(me),
        CloudRoute(OWN.v4, me),
    ]
    other = Lease(LeaseKey.parse("10.3.2.0-24"), LeaseAttrs(parse_address("10.99.0.2")))
    assert backend.peer(OWN, other) == [CloudLease(other.key.v4, HostRef("", parse_address("10.99.0.2")))]


def test_behind_a_keeping_server_it_wants_nothing():
    backend = make(config(), facts(instance="i-1", served="yes"))
    (table,) = backend.local(OWN)
    assert table.own is None
    assert backend.peer(OWN, Lease(LeaseKey.parse("10.3.2.0-24"), LeaseAttrs(IP))) == []
    assert b"i-1" in backend.attrs().backend_data


@pytest.mark.parametrize(
    ("given", "tables"),
    [
        ("", ()),
        (', "routetableid": "rtb-1"', ("rtb-1",)),
        (', "RouteTableID": ["rtb-1", "rtb-2", "rtb-1"]', ("rtb-1", "rtb-2")),
    ],
)
def test_route_table_ids(given, tables):
    assert make(config(given), facts()).tables() == tables


@pytest.mark.parametrize("given", ["7", '["rtb-1", 7]', '{"a": 1}', '[""]'])
def test_wrong_route_table_ids(given):
    with pytest.raises(BadConfig, match=r'RouteTableID is .* write it like "RouteTableID": "rtb-'):
        make(config(f', "RouteTableID": {given}'), facts())


def test_ipv4_alone():
    dual = '"Network": "10.3.0.0/16", "EnableIPv6": true, "IPv6Network": "fd00:3::/48"'
    with pytest.raises(BadConfig, match="is for IPv4 alone"):
        make(config(network=dual), facts())


def test_a_lease_with_strange_data_concerns_itself_alone():
    backend = make(config(), facts())
    lease = Lease(OWN, LeaseAttrs(IP, backend_type="aws-vpc", backend_data=b'{"InstanceID": 7}'))
    with pytest.raises(BadLease, match="BackendData can't be read"):
        backend.peer(OWN, lease)


def test_hosts_of_another_backend_reach_such_a_host_by_the_cloud():
    """During a change of the backend; the route is in the cloud's table, and none is needed here."""
    attrs = LeaseAttrs(IP, backend_type="aws-vpc", backend_data=b'{"InstanceID":"i-1"}')
    way = towards(attrs, config(kind="vxlan"), facts())
    assert way.reaches(attrs)
    assert not way.reaches(LeaseAttrs(IP, backend_type="vxlan"))
    assert way.peer(OWN, Lease(OWN, attrs)) == []


async def test_who_knows_nothing_of_itself_is_found_by_its_address_where_a_server_keeps_the_table(
    monkeypatch, tmp_path
):
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://127.0.0.1:1")
    assert await HostAsk(tmp_path, served=lambda: True)(config(), facts()) == {"served": "yes"}
    with pytest.raises(NotJoinable):
        await HostAsk(tmp_path)(config(), facts())
    assert await HostAsk(tmp_path, served=lambda: True)(config(kind="vxlan"), facts()) == {}
    assert (
        make(config(), HostFacts("eth0", 9001, IP, None, IP, None, found={"served": "yes"})).attrs().backend_data == b""
    )
