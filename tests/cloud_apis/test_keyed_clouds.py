"""What is peculiar to Tencent Cloud and to Alibaba Cloud."""

import ssl

import pytest

from support import fake_ali, fake_tencent
from support.certs import Authority
from support.clouds import Ali, Tencent
from wincey.cloud import ali, tencent
from wincey.cloud.errors import CloudDenied, CloudError, CloudFull, CloudThrottled, CloudUnavailable
from wincey.cloud.rest import Rest
from wincey.cloud.table import CloudHost, Step, by_destination, steps
from wincey.model.address import Subnet, parse_address
from wincey.model.cloud import CloudTable, HostRef
from wincey.model.errors import NotJoinable

SUBNET = Subnet.parse("10.5.34.0/24")
H1 = HostRef("h1", parse_address("10.99.0.1"))


@pytest.fixture
async def open_on(monkeypatch):
    """Makes a fake with an instance h1, and opens a dialect on it."""
    opened = []

    def make(cloud, dialect, settings, tables=(), secrets=(), own=H1, api=None):
        cloud.add("h1", "10.99.0.1")
        metadata, api = cloud.fake.listen(instance="h1"), api or cloud.fake.listen()
        for variable, value in cloud.environment(metadata, api).items():
            monkeypatch.setenv(variable, value)
        table = CloudTable(
            provider=dialect.provider,
            network=Subnet.parse("10.5.0.0/16"),
            tables=tables,
            settings=settings,
            secrets=secrets,
            own=own,
        )
        opened.append((cloud, dialect(table)))
        return opened[-1]

    yield make
    for cloud, dialect in opened:
        await dialect.close()
        cloud.fake.close()


@pytest.fixture
def on_tencent(open_on):
    def make(**more):
        settings = (("region", fake_tencent.REGION), ("vpc", fake_tencent.VPC))
        return open_on(Tencent(), tencent.TencentDialect, settings, **more)

    return make


@pytest.fixture
def on_ali(open_on):
    def make(**more):
        settings = (("region", fake_ali.REGION), ("vpc", fake_ali.VPC))
        return open_on(Ali(), ali.AliDialect, settings, **more)

    return make


async def listed(dialect, destination=SUBNET):
    [table] = await dialect.tables({})
    return next((route for route in table.routes if route.destination == destination), None)


async def test_tencent_metadata(on_tencent):
    on_tencent()
    assert await tencent.ask_host() == {"region": fake_tencent.REGION, "vpc": fake_tencent.VPC}


async def test_tencent_of_two_routes_the_one_that_is_on_counts(on_tencent):
    cloud, dialect = on_tencent()
    cloud.by_hand(str(SUBNET), "h1")
    cloud.fake.insert(fake_tencent.TABLE, str(SUBNET), "NORMAL_CVM", "10.99.0.9", Enabled=False)
    tables = await dialect.tables({})
    found = by_destination(tables)[SUBNET]
    assert steps(tables, found, SUBNET, CloudHost(("10.99.0.1",), forwards=True)) == []


async def test_tencent_a_route_that_was_switched_off_is_made_anew(on_tencent):
    cloud, dialect = on_tencent()
    cloud.fake.insert(fake_tencent.TABLE, str(SUBNET), "NORMAL_CVM", "10.99.0.1", Enabled=False)
    old = await listed(dialect)
    assert old.state == "disabled"
    host = CloudHost(("10.99.0.1",), forwards=True)
    [step] = steps(await dialect.tables({}), {old.table: old}, SUBNET, host)
    await dialect.put(step)
    assert cloud.routes() == {str(SUBNET): "10.99.0.1"}
    assert [each for each in cloud.fake.actions if each in cloud.writes] == ["DeleteRoutes", "CreateRoutes"]


async def test_tencent_replaces_in_place(on_tencent):
    cloud, dialect = on_tencent()
    cloud.by_hand(str(SUBNET), "bystander")
    await dialect.put(Step(fake_tencent.TABLE, SUBNET, CloudHost(("10.99.0.1",), forwards=True), await listed(dialect)))
    assert cloud.routes() == {str(SUBNET): "10.99.0.1"}
    assert "DeleteRoutes" not in cloud.fake.actions
    assert (await listed(dialect)).marked


async def test_tencent_system_routes_and_gateways_are_no_hosts(on_tencent):
    cloud, dialect = on_tencent()
    cloud.fake.insert(fake_tencent.TABLE, "10.5.60.0/24", "NAT", "nat-1")
    assert (await listed(dialect, Subnet.parse("10.5.60.0/24"))).next_hop == ()
    assert (await listed(dialect, Subnet.parse("10.99.0.0/24"))).next_hop == ()


async def test_tencent_tables_of_the_config(on_tencent, monkeypatch):
    cloud, dialect = on_tencent(tables=("rtb-second", "rtb-third"))
    for number in range(30):
        cloud.fake.tables[f"rtb-{number}"] = []
    cloud.fake.tables |= {"rtb-second": [], "rtb-third": []}
    assert [table.name for table in await dialect.tables({})] == ["rtb-second", "rtb-third"]
    del cloud.fake.tables["rtb-third"]
    with pytest.raises(CloudError, match=r"no route table rtb-third: correct Backend.RouteTableID"):
        await dialect.tables({})


async def test_tencent_quota(on_tencent):
    cloud, dialect = on_tencent()
    [table] = await dialect.tables({})
    assert (table.used, table.limit) == (2, 50)
    cloud.set_quota(0)
    with pytest.raises(CloudFull, match=r"LimitExceeded.* quota of 50 is reached"):
        await dialect.put(Step(table.name, SUBNET, CloudHost(("10.99.0.1",), forwards=True), None))


async def test_tencent_quota_that_may_not_be_seen(on_tencent):
    cloud, dialect = on_tencent()
    cloud.deny("DescribeVpcLimits")
    for _ in range(2):
        [table] = await dialect.tables({})
        assert table.limit is None
    assert cloud.fake.actions.count("DescribeVpcLimits") == 1


@pytest.mark.parametrize(
    ("code", "kind", "words"),
    [
        ("AuthFailure.SignatureExpire", CloudDenied, "set the host's clock"),
        ("AuthFailure.SecretIdNotFound", CloudDenied, "check AccessKeyID"),
        ("UnauthorizedOperation.CamNoAuth", CloudDenied, "grant the key's user vpc:DescribeRouteTables"),
        ("RequestLimitExceeded.UinLimitExceeded", CloudThrottled, "refuses DescribeRouteTables"),
        ("InternalError.ModuleError", CloudUnavailable, "refuses DescribeRouteTables"),
        ("UnsupportedRegion", CloudError, "UnsupportedRegion"),
    ],
)
async def test_tencent_refusals(on_tencent, code, kind, words):
    cloud, dialect = on_tencent()
    cloud.fake.faults["DescribeRouteTables"] = [fake_tencent.error_answer(code, "Some words.")]
    with pytest.raises(kind, match=words) as caught:
        await dialect.tables({})
    assert type(caught.value) is kind


async def test_keys_of_the_config_come_before_those_of_the_environment(on_tencent):
    with pytest.raises(CloudDenied, match="SecretIdNotFound"):
        await on_tencent(secrets=(("AccessKeyID", "other"), ("AccessKeySecret", "s3cr3t")))[1].tables({})


def test_no_keys(monkeypatch):
    for name in ("ACCESS_KEY_ID", "ACCESS_KEY_SECRET"):
        monkeypatch.delenv(name, raising=False)
    for dialect in (tencent.TencentDialect, ali.AliDialect):
        with pytest.raises(CloudDenied, match="set ACCESS_KEY_ID and ACCESS_KEY_SECRET"):
            dialect(CloudTable(provider=dialect.provider, network=SUBNET))


def test_a_table_shows_no_secret():
    table = CloudTable(provider="ali-vpc", network=SUBNET, secrets=(("AccessKeySecret", "s3cr3t"),))
    assert "s3cr3t" not in f"{table} {table!r} {[table]}"


@pytest.mark.parametrize("hardened", [True, False])
async def test_ali_metadata(on_ali, hardened):
    cloud, _ = on_ali()
    cloud.fake.hardened = hardened
    assert await ali.ask_host() == {"region": fake_ali.REGION, "vpc": fake_ali.VPC, "instance": "h1"}
    assert await ali.ask_server() == {"region": fake_ali.REGION, "vpc": fake_ali.VPC}


async def test_ali_metadata_that_is_another_clouds(on_ali):
    cloud, _ = on_ali()
    del cloud.fake.instances["h1"]
    with pytest.raises(NotJoinable, match="metadata server answers 404 for /latest/meta-data/region-id"):
        await ali.ask_host()


async def test_ali_waits_for_the_changes_of_others(on_ali):
    cloud, dialect = on_ali()
    busy = fake_ali.error_answer(
        400, "TaskConflict", "The operation is too frequent, please wait a moment and try again."
    )
    cloud.fake.faults["CreateRouteEntry"] = [busy] * 2
    await dialect.put(Step(fake_ali.TABLE, SUBNET, CloudHost(("h1",), forwards=True), None))
    entry = await listed(dialect)
    assert (entry.next_hop, entry.state, entry.marked) == (("h1",), "active", True)


async def test_ali_waits_in_vain(on_ali, monkeypatch):
    monkeypatch.setattr(ali, "_PATIENCE", 0.0)
    cloud, dialect = on_ali()
    cloud.fake.settling = 3600
    step = Step(fake_ali.TABLE, SUBNET, CloudHost(("h1",), forwards=True), None)
    await dialect.put(step)
    assert (await listed(dialect)).state == "pending"
    other = Step(fake_ali.TABLE, Subnet.parse("10.5.35.0/24"), step.host, None)
    with pytest.raises(CloudThrottled, match="IncorrectRouteEntryStatus"):
        await dialect.put(other)


async def test_ali_an_entry_that_takes_long_to_go(on_ali, monkeypatch):
    monkeypatch.setattr(ali, "_PATIENCE", 0.0)
    cloud, dialect = on_ali()
    cloud.by_hand(str(SUBNET), "bystander")
    cloud.fake.settling = 3600
    step = Step(fake_ali.TABLE, SUBNET, CloudHost(("h1",), forwards=True), await listed(dialect))
    with pytest.raises(CloudThrottled, match=r"still deleting the route 10.5.34.0/24 to bystander"):
        await dialect.put(step)


async def test_ali_deletes_only_what_leads_where_it_was_seen_to(on_ali):
    cloud, dialect = on_ali()
    cloud.by_hand(str(SUBNET), "bystander")
    seen = await listed(dialect)
    cloud.fake.entries[-1]["InstanceId"] = "h1"
    await dialect.delete(seen)
    assert cloud.routes() == {str(SUBNET): "h1"}


async def test_ali_hosts_are_who_they_say_to_a_server(on_ali):
    cloud, dialect = on_ali(own=None)
    cloud.add("h2", "10.99.0.2")
    by_address, liar = HostRef("", parse_address("10.99.0.2")), HostRef("h1", parse_address("10.99.0.3"))
    found = await dialect.hosts([H1, by_address, liar])
    assert {host: known.next_hop for host, known in found.items()} == {H1: ("h1",), by_address: ("h2",)}


async def test_ali_a_host_asks_for_no_more_than_its_own_rights_allow(on_ali):
    cloud, dialect = on_ali()
    found = await dialect.hosts(
        [H1, HostRef("h2", parse_address("10.99.0.2")), HostRef("", parse_address("10.99.0.3"))]
    )
    assert {host.instance: known.next_hop for host, known in found.items()} == {"h1": ("h1",), "h2": ("h2",)}
    assert cloud.fake.actions == []


async def test_ali_an_entry_to_several_instances_is_not_ours(on_ali):
    cloud, dialect = on_ali()
    cloud.fake.insert(str(SUBNET), "")
    assert (await listed(dialect)).next_hop == ()


async def test_ali_tables(on_ali):
    _, dialect = on_ali(tables=("vtb-none",))
    with pytest.raises(CloudError, match="no route table vtb-none"):
        await dialect.tables({})


@pytest.mark.parametrize(
    ("status", "code", "kind", "words"),
    [
        (400, "Throttling.Api", CloudThrottled, "refuses DescribeVpcs"),
        (404, "InvalidAccessKeyId.NotFound", CloudDenied, "check AccessKeyID"),
        (400, "InvalidTimeStamp.Expired", CloudDenied, "set the host's clock"),
        (403, "Forbidden.RAM", CloudDenied, "grant the key's RAM user vpc:DescribeVpcs"),
        (503, "ServiceUnavailable", CloudUnavailable, "ServiceUnavailable"),
        (500, "", CloudUnavailable, "status 500"),
        (400, "InvalidParameter", CloudError, "InvalidParameter"),
    ],
)
async def test_ali_refusals(on_ali, status, code, kind, words):
    cloud, dialect = on_ali()
    cloud.fake.faults["DescribeVpcs"] = [fake_ali.error_answer(status, code, "Some words.")]
    with pytest.raises(kind, match=words) as caught:
        await dialect.tables({})
    assert type(caught.value) is kind


async def test_an_api_that_does_not_answer(on_ali, monkeypatch):
    cloud, dialect = on_ali()
    cloud.fake.close()
    with pytest.raises(CloudUnavailable, match=r"Alibaba Cloud does not answer: 127.0.0.1"):
        await dialect.tables({})


def test_an_endpoint_that_is_none(monkeypatch):
    monkeypatch.setenv("WINCEY_ALI_ENDPOINT", "vpc.example.org")
    monkeypatch.setenv("ACCESS_KEY_ID", "a")
    monkeypatch.setenv("ACCESS_KEY_SECRET", "b")
    with pytest.raises(CloudUnavailable, match=r"WINCEY_ALI_ENDPOINT is 'vpc.example.org'"):
        ali.AliDialect(CloudTable(provider="ali-vpc", network=SUBNET))


@pytest.mark.parametrize("kind", [Tencent, Ali])
async def test_by_tls(open_on, kind, monkeypatch, tmp_path):
    """As the clouds are spoken to: what is signed is the host as it is sent, and certificates are checked."""
    authority = Authority(tmp_path / "ca")
    certificate = authority.issue("api")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate.cert, certificate.key)
    cloud = kind()
    dialect = {Tencent: tencent.TencentDialect, Ali: ali.AliDialect}[kind]
    fake = {Tencent: fake_tencent, Ali: fake_ali}[kind]
    url = cloud.fake.listen(tls=context)
    cloud, opened = open_on(cloud, dialect, (("region", fake.REGION), ("vpc", fake.VPC)), api=url)
    with pytest.raises(CloudUnavailable, match="certificate is not accepted"):
        await opened.tables({})
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.ca))
    assert len(await opened.tables({})) == 1


def test_a_usual_port_is_no_part_of_the_host():
    assert Rest("WINCEY_NONE", "https://vpc.tencentcloudapi.com", "x").host == "vpc.tencentcloudapi.com"
    assert Rest("WINCEY_NONE", "http://127.0.0.1:8080/", "x").host == "127.0.0.1:8080"
