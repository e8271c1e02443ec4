"""What is peculiar to Compute Engine."""

import json
import subprocess
from urllib.parse import urlsplit

import pytest

from support.clouds import Gce
from support.fake_cloud import Answer
from support.fake_gce import NETWORK, PROJECT, ZONE, Instance, error_answer, network_url
from wincey.cloud import gce
from wincey.cloud.errors import (
    CloudConflict,
    CloudDenied,
    CloudError,
    CloudFull,
    CloudNotInstalled,
    CloudThrottled,
    CloudUnavailable,
)
from wincey.cloud.table import Step
from wincey.model.address import Subnet, parse_address
from wincey.model.cloud import CloudTable, HostRef
from wincey.model.errors import NotJoinable

SUBNET = Subnet.parse("10.5.34.0/24")
H1 = HostRef(f"{ZONE}/h1", parse_address("10.99.0.1"))
SETTINGS = (("network", NETWORK), ("project", PROJECT))


class Setting:
    """A dialect on a fake, with an instance h1."""

    def __init__(self, monkeypatch):
        self.cloud = Gce()
        self.fake = self.cloud.fake
        self.cloud.add("h1", "10.99.0.1")
        self.api = self.fake.listen()
        for variable, value in self.cloud.environment(self.fake.listen(instance="h1"), self.api).items():
            monkeypatch.setenv(variable, value)
        table = CloudTable(provider="gce", network=Subnet.parse("10.5.0.0/16"), settings=SETTINGS, own=H1)
        self.dialect = gce.GceDialect(table)

    async def put(self, host=H1, old=None):
        known = (await self.dialect.hosts([host]))[host]
        await self.dialect.put(Step(NETWORK, SUBNET, known, old))

    async def listed(self):
        [table] = await self.dialect.tables({})
        return {str(route.destination): route for route in table.routes}


@pytest.fixture
async def at(monkeypatch):
    made = Setting(monkeypatch)
    yield made
    await made.dialect.close()
    made.fake.close()


async def test_a_route_as_flannel_makes_it(at):
    await at.put()
    route = at.fake.table["flannel-10-5-34-0-24"]
    assert route["destRange"] == "10.5.34.0/24"
    assert route["priority"] == 1000
    assert route["network"] == network_url()
    assert route["nextHopInstance"].endswith(f"/projects/{PROJECT}/zones/{ZONE}/instances/h1")
    listed = (await at.listed())["10.5.34.0/24"]
    assert (listed.next_hop, listed.state, listed.marked) == ((f"{ZONE}/h1",), "active", True)


async def test_metadata(at):
    assert await gce.ask_host("10.99.0.1") == {"project": PROJECT, "network": NETWORK, "instance": f"{ZONE}/h1"}
    assert await gce.ask_server() == {"project": PROJECT, "network": NETWORK}


async def test_no_metadata_server(monkeypatch):
    monkeypatch.setenv("GCE_METADATA_HOST", "127.0.0.1:9")
    with pytest.raises(
        NotJoinable, match=r"no Compute Engine metadata server: .* on an instance of Compute Engine only"
    ):
        await gce.ask_host("10.99.0.1")


async def test_routes_that_are_none_of_our_business(at):
    instance = f"https://x/compute/v1/projects/{PROJECT}/zones/{ZONE}/instances/h1"
    at.fake.insert("loses", "10.5.34.0/24", nextHopInstance=instance, priority=2000)
    at.fake.insert("some", "10.5.35.0/24", nextHopInstance=instance, tags=["web"])
    at.fake.insert("other", "10.5.36.0/24", nextHopInstance=instance, network=network_url() + "2")
    at.fake.insert("v6", "fd00::/64", nextHopInstance=instance)
    at.fake.insert("peering", "10.5.37.0/24", nextHopPeering="p")
    listed = await at.listed()
    assert not {"10.5.34.0/24", "10.5.35.0/24", "10.5.36.0/24", "fd00::/64"} & set(listed)
    assert listed["10.5.37.0/24"].next_hop == ()


async def test_an_instance_that_is_gone_is_a_blackhole(at):
    at.cloud.by_hand("10.5.40.0/24", "nobody")
    assert (await at.listed())["10.5.40.0/24"].state == "blackhole"


async def test_listings_come_in_pages(at, monkeypatch):
    monkeypatch.setattr(gce, "_PAGE", 3)
    for number in range(40, 50):
        at.cloud.by_hand(f"10.5.{number}.0/24", "h1")
    listed = await at.listed()
    assert {f"10.5.{number}.0/24" for number in range(40, 50)} <= set(listed)
    assert at.fake.actions.count("routes.list") == 5


async def test_hosts_are_who_they_say(at):
    at.cloud.add("h2", "10.99.0.2")
    by_address = HostRef("", parse_address("10.99.0.2"))
    liar = HostRef(f"{ZONE}/h1", parse_address("10.99.0.2"))
    nobody = HostRef(f"{ZONE}/h9", parse_address("10.99.0.9"))
    found = await at.dialect.hosts([H1, by_address, liar, nobody])
    assert {host: known.next_hop[0] for host, known in found.items()} == {H1: f"{ZONE}/h1", by_address: f"{ZONE}/h2"}
    assert await at.dialect.hosts([liar]) == {}
    assert await at.dialect.hosts([nobody]) == {}
    at.fake.instances["h1"].network = "other"
    assert await at.dialect.hosts([H1]) == {}


async def test_forwarding_has_to_be_allowed_by_hand(at):
    at.fake.instances["h1"] = Instance("10.99.0.1", can_ip_forward=False)
    host = (await at.dialect.hosts([H1]))[H1]
    assert not host.forwards
    with pytest.raises(CloudDenied, match="--can-ip-forward") as caught:
        await at.dialect.allow_forwarding(host)
    assert f"gcloud compute instances export h1 --project={PROJECT} --zone={ZONE}" in str(caught.value)


async def test_a_token_that_is_refused_is_renewed_once(at):
    await at.put()
    at.fake.tokens.clear()
    assert "10.5.34.0/24" in await at.listed()
    at.fake.faults["routes.list"] = [error_answer(401, "authError", "Invalid Credentials")] * 2
    with pytest.raises(CloudDenied, match="Invalid Credentials"):
        await at.listed()


async def test_scopes(at):
    at.fake.scopes = ["https://www.googleapis.com/auth/devstorage.read_only"]
    with pytest.raises(CloudDenied, match="set-service-account NAME --scopes=compute-rw"):
        await at.listed()


@pytest.mark.parametrize(
    ("status", "reason", "kind", "words"),
    [
        (403, "forbidden", CloudDenied, r"grant the service account compute.routes.list"),
        (403, "accessNotConfigured", CloudDenied, f"gcloud services enable compute --project={PROJECT}"),
        (403, "rateLimitExceeded", CloudThrottled, "refuses routes.list: Some words"),
        (429, "", CloudThrottled, "refuses routes.list: Some words"),
        (503, "backendError", CloudUnavailable, "backendError"),
        (400, "invalid", CloudError, "invalid"),
    ],
)
async def test_refusals(at, status, reason, kind, words):
    at.fake.faults["routes.list"] = [error_answer(status, reason, "Some\n words.")]
    with pytest.raises(kind, match=words) as caught:
        await at.listed()
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)


async def test_an_instance_without_a_service_account(at, monkeypatch):
    metadata = at.fake._metadata
    monkeypatch.setattr(at.fake, "_metadata", lambda call: Answer(404, b"") if "token" in call.path else metadata(call))
    with pytest.raises(CloudDenied, match="Give the instance a service account with the scope compute-rw"):
        await at.listed()


@pytest.mark.parametrize("late", [False, True], ids=["at once", "by the operation"])
async def test_quota(at, late):
    at.fake.late_quota = late
    at.cloud.set_quota(0)
    with pytest.raises(CloudFull, match=r"Quota 'ROUTES' exceeded. Limit: .* or have the quota raised"):
        await at.put()
    [table] = await at.dialect.tables({})
    assert (table.used, table.limit) == (at.fake.quota, at.fake.quota)


async def test_the_quota_may_be_hidden(at):
    at.fake.denied = {"compute.projects.get"}
    [table] = await at.dialect.tables({})
    assert (table.used, table.limit) == (len(at.fake.table), None)


async def test_an_operation_that_takes_long(at, monkeypatch):
    monkeypatch.setattr(gce, "_PATIENCE", 0.0)
    at.fake.operation_time = 3600
    await at.put()
    assert (await at.listed())["10.5.34.0/24"].state == "pending"
    with pytest.raises(CloudConflict):  # as after a restart, while it still goes on
        await at.put()
    for operation in at.fake.operations.values():
        operation.due = 0
    assert (await at.listed())["10.5.34.0/24"].state == "active"
    at.fake.operation_time = 3600
    with pytest.raises(CloudUnavailable, match="still deleting the route flannel-10-5-34-0-24"):
        await at.put(old=(await at.listed())["10.5.34.0/24"])


async def test_an_operation_that_failed_after_all(at, monkeypatch):
    monkeypatch.setattr(gce, "_PATIENCE", 0.0)
    at.fake.operation_time, at.fake.late_quota = 3600, True
    await at.put()
    at.cloud.set_quota(0)
    for operation in at.fake.operations.values():
        operation.due = 0
    assert "10.5.34.0/24" not in await at.listed()


async def test_what_is_no_api(at, monkeypatch):
    await at.listed()  # the token is there
    monkeypatch.setattr(at.fake, "answer", lambda call: Answer(200, b"<html>Log in to the hotel's network</html>"))
    with pytest.raises(CloudUnavailable, match=r"127.0.0.1:\d+ answers with status 200 and no JSON; is it the API\?"):
        await at.listed()


@pytest.fixture
def key_file(at, tmp_path, monkeypatch):
    """A service account's key, whose certificate the fake knows."""
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-keyout",
            key,
            "-out",
            certificate,
            "-subj",
            "/CN=a",
        ],
        check=True,
        capture_output=True,
    )
    at.fake.account, at.fake.token_uri = f"net@{PROJECT}.iam.gserviceaccount.com", f"{at.api}/token"
    at.fake.account_certificate = certificate.read_text()
    document = {
        "type": "service_account",
        "client_email": at.fake.account,
        "private_key_id": "abc",
        "private_key": key.read_text(),
        "token_uri": at.fake.token_uri,
    }
    path = tmp_path / "account.json"
    path.write_text(json.dumps(document))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(path))
    monkeypatch.setenv("GCE_METADATA_HOST", "127.0.0.1:9")  # is not asked
    return path


async def test_service_account_key(at, key_file):
    assert "0.0.0.0/0" in await at.listed()


async def test_service_account_key_of_another(at, key_file):
    at.fake.account = "other@example.org"
    with pytest.raises(CloudDenied, match=f"{urlsplit(at.api).netloc} gives no access token for net@.* still valid"):
        await at.listed()


async def test_service_account_key_without_the_library(at, key_file, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "google.auth", None)
    with pytest.raises(CloudNotInstalled, match=r"pip install 'wincey\[gce\]'"):
        await at.listed()


@pytest.mark.parametrize("content", ["no JSON at all, s3cr3t", '{"private_key": "s3cr3t"}', None])
async def test_service_account_key_that_is_none(at, key_file, content):
    if content is None:
        key_file.unlink()
    else:
        key_file.write_text(content)
    with pytest.raises(CloudDenied, match=r"GOOGLE_APPLICATION_CREDENTIALS=.* can't be used") as caught:
        await at.listed()
    assert "s3cr3t" not in str(caught.value)
