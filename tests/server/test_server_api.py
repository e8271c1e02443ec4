"""flannel 0.5's HTTP API byte by byte, asked of a real server process."""

import asyncio
import json
import re
import socket
import threading
import time

import pytest

from support.keys import wait_until
from support.server import put_config, serving
from wincey.store.open import StoreOptions, open_store
from wincey.store.registry import Registry

PREFIX = "/coreos.com/network"
TIME = r'"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?Z"'
JSON = "application/json; charset=utf-8"
TEXT = "text/plain; charset=utf-8"
MAC = '{"VtepMAC":"aa:bb:cc:00:00:01"}'


@pytest.fixture(
    scope="module",
    params=["sqlite", pytest.param("v3", marks=pytest.mark.etcd), pytest.param("v2", marks=pytest.mark.etcd)],
)
def server(request, tmp_path_factory):
    """A server on each kind of store; each test has a network of its own."""
    scratch = tmp_path_factory.mktemp("server")
    if request.param == "sqlite":
        flags = [f"--store=sqlite:{scratch / 's.db'}"]
    else:
        etcd = request.getfixturevalue("etcd34")
        flags = [f"--etcd-endpoints={etcd.url}", f"--etcd-api={request.param}", f"--etcd-prefix=/s{time.time_ns()}"]
    with serving(scratch / "log", *flags) as made:
        made.flags = flags
        yield made


_count = iter(range(1000))


@pytest.fixture
def network(server):
    """The name of a network with a config."""
    name = f"net{next(_count)}"
    configure(
        server, name, '{"network": "10.5.0.0/16", "SubnetMax": "10.5.200.0", "Backend": {"Type": "vxlan", "VNI": 7}}'
    )
    return name


def in_store(server, network, act):
    """Await `act(registry)` with a registry of our own in the server's store."""
    given = dict(flag.removeprefix("--").split("=", 1) for flag in server.flags)
    prefix = f"{given.get('etcd-prefix', PREFIX)}/{network}"
    options = StoreOptions(
        store=given.get("store", ""), api=given.get("etcd-api", "auto"), endpoints=[given.get("etcd-endpoints", "")]
    )

    async def work():
        registry = Registry(await open_store(options, prefix), prefix)
        try:
            await act(registry)
        finally:
            await registry.close()

    asyncio.run(work())


def configure(server, network, text):
    in_store(server, network, lambda registry: registry.put_config(text.encode()))


def put_raw(server, network, key, value):
    in_store(server, network, lambda registry: registry.store.create(f"{registry.prefix}/{key}", value.encode(), 600))


class Poll:
    """A long poll in a thread."""

    def __init__(self, server, path, **headers):
        self._result = []
        self._thread = threading.Thread(
            target=lambda: self._result.append(server.ask("GET", path, **headers)), daemon=True
        )
        self._thread.start()

    @property
    def waiting(self):
        return self._thread.is_alive()

    def body(self):
        self._thread.join(20)
        status, kind, body = self._result[0]
        assert (status, kind) == (200, JSON)
        return body


def test_config(server, network):
    assert server.ask("GET", f"/v1/{network}/config") == (
        200, JSON,
        '{"Network":"10.5.0.0/16","SubnetMin":"10.5.1.0","SubnetMax":"10.5.200.0","SubnetLen":24,'
        '"Backend":{"Type":"vxlan","VNI":7}}\n',
    )  # fmt: skip


def test_no_config(server):
    status, kind, body = server.ask("GET", "/v1/none/config")
    assert (status, kind) == (500, TEXT)
    assert "100: Key not found (" in body
    assert body.endswith("/none/config)\n")


def test_a_config_that_is_wrong(server):
    name = f"net{next(_count)}"
    configure(server, name, '{"Network": "10.5.0.0/16"}')
    assert server.ask("GET", f"/v1/{name}/config")[2].endswith('"SubnetLen":24}\n')


def test_take_renew_and_give_back(server, network):
    leases = f"/v1/{network}/leases"
    status, kind, body = server.ask(
        "POST", leases, f'{{"PublicIP":"10.0.0.1","BackendType":"vxlan","BackendData":{MAC}}}'
    )
    assert (status, kind) == (200, JSON)
    found = re.fullmatch(
        r'\{"Subnet":"(10\.5\.\d+\.0/24)","Attrs":\{"PublicIP":"10\.0\.0\.1","BackendType":"vxlan","BackendData":'
        + re.escape(MAC) + r'\},"Expiration":' + TIME + r"\}\n", body,
    )  # fmt: skip
    assert found
    key = found[1].replace("/", "-")
    assert server.take("10.0.0.1")["Subnet"] if network == "_" else True
    assert server.take("10.0.0.1", network)["Subnet"] == found[1]  # the same host has the same lease
    assert server.take("10.0.0.2", network)["Subnet"] != found[1]
    lease = json.loads(body)
    lease["Attrs"]["BackendData"] = {"VtepMAC": "aa:bb:cc:00:00:02"}
    status, kind, body = server.ask("PUT", f"{leases}/{key}", json.dumps(lease))
    assert (status, kind) == (200, JSON)
    assert json.loads(body)["Attrs"]["BackendData"] == {"VtepMAC": "aa:bb:cc:00:00:02"}
    assert server.ask("DELETE", f"{leases}/{key}") == (200, TEXT, "")
    status, kind, body = server.ask("DELETE", f"{leases}/{key}")
    assert (status, kind) == (500, TEXT)
    assert "Key not found" in body


def test_a_host_without_backend_data(server, network):
    status, _, body = server.ask("POST", f"/v1/{network}/leases", '{"PublicIP":"10.0.0.9"}')
    assert status == 200
    assert '"Attrs":{"PublicIP":"10.0.0.9"},"Expiration":"' in body


def test_the_wished_subnet(server, network):
    assert server.take("10.0.0.1", network, wincey_wish="10.5.77.0-24")["Subnet"] == "10.5.77.0/24"
    assert server.take("10.0.0.2", network, wincey_wish="10.5.77.0-24")["Subnet"] != "10.5.77.0/24"
    assert server.take("10.0.0.3", network, wincey_wish="nonsense")["Subnet"]


def test_a_lost_lease_comes_back_unless_it_is_another_hosts(server, network):
    lease = server.take("10.0.0.1", network, wincey_wish="10.5.77.0-24")
    path = f"/v1/{network}/leases/10.5.77.0-24"
    server.ask("DELETE", path)
    assert server.ask("PUT", path, json.dumps(lease))[0] == 200
    server.ask("DELETE", path)
    server.take("10.0.0.2", network, wincey_wish="10.5.77.0-24")
    status, kind, body = server.ask("PUT", path, json.dumps(lease))
    assert (status, kind) == (409, TEXT)
    assert body == "the subnet 10.5.77.0-24 is leased to another host by now\n"
    # A host whose address changed says which one it had.
    moved = lease | {"Attrs": {"PublicIP": "10.0.0.22"}}
    assert server.ask("PUT", path, json.dumps(moved))[0] == 409
    assert server.ask("PUT", path, json.dumps(moved), wincey_formerly="10.0.0.2")[0] == 200


def test_watch_all(server, network):
    leases = f"/v1/{network}/leases"
    status, kind, body = server.ask("GET", leases)
    assert (status, kind) == (200, JSON)
    empty = re.fullmatch(r'\{"events":null,"snapshot":\[\],"cursor":"(\d+)"\}\n', body)
    assert empty
    poll = Poll(server, f"{leases}?next={empty[1]}")
    time.sleep(0.3)
    assert poll.waiting
    lease = server.take("10.0.0.1", network)
    added = re.fullmatch(
        r'\{"events":\[\{"type":"added","lease":\{"Subnet":"([0-9./]+)","Attrs":\{"PublicIP":"10\.0\.0\.1","BackendType":"vxlan",'
        r'"BackendData":' + re.escape(MAC) + r'\},"Expiration":' + TIME + r'\}\}\],"snapshot":null,"cursor":"(\d+)"\}\n',
        poll.body(),
    )  # fmt: skip
    assert added
    assert added[1] == lease["Subnet"]
    server.ask("DELETE", f"{leases}/{lease['Subnet'].replace('/', '-')}")
    removed = re.fullmatch(
        r'\{"events":\[\{"type":"removed","lease":\{"Subnet":"([0-9./]+)","Attrs":\{"PublicIP":"0\.0\.0\.0"\},'
        r'"Expiration":"0001-01-01T00:00:00Z"\}\}\],"snapshot":null,"cursor":"(\d+)"\}\n',
        Poll(server, f"{leases}?next={added[3]}").body(),
    )
    assert removed
    assert removed[1] == lease["Subnet"]
    # From the same cursor one event an answer, to one of ours all there is.
    assert len(server.get(f"{leases}?next={empty[1]}")["events"]) == 1
    assert len(server.get(f"{leases}?next={empty[1]}", wincey_host="h 1")["events"]) == 2


def test_a_cursor_that_the_store_does_not_know(server, network):
    server.take("10.0.0.1", network)
    answer = server.get(f"/v1/{network}/leases?next=99999999999")
    assert answer["events"] is None
    assert len(answer["snapshot"]) == 1
    assert server.ask("GET", f"/v1/{network}/leases?next=x")[:2] == (400, TEXT)


def test_watch_one(server, network):
    one = server.take("10.0.0.1", network)
    path = f"/v1/{network}/leases/{one['Subnet'].replace('/', '-')}"
    answer = server.get(path)
    assert [lease["Subnet"] for lease in answer["snapshot"]] == [one["Subnet"]]
    poll = Poll(server, f"{path}?next={answer['cursor']}")
    server.take("10.0.0.2", network)
    server.ask("DELETE", path)
    assert [event["lease"]["Subnet"] for event in json.loads(poll.body())["events"]] == [one["Subnet"]]
    assert server.ask("GET", path)[:2] == (500, TEXT)


def test_what_can_not_be_read_is_nobodys_event(server, network):
    """flannel 0.5 answers such an event with the same error each second, for ever."""
    lease = server.take("10.0.0.1", network)
    before = server.get(f"/v1/{network}/leases")["cursor"]
    put_raw(server, network, "subnets/garbage", "x")
    put_raw(server, network, "subnets/10.5.250.0-24", "{not json")
    server.take("10.0.0.2", network)
    event = server.get(f"/v1/{network}/leases?next={before}")["events"]
    assert [each["lease"]["Attrs"]["PublicIP"] for each in event] == ["10.0.0.2"]
    snapshot = server.get(f"/v1/{network}/leases")["snapshot"]
    assert lease["Subnet"] in [each["Subnet"] for each in snapshot]
    assert len(snapshot) == 2
    # Nor is that subnet given to anybody.
    assert server.take("10.0.0.3", network, wincey_wish="10.5.250.0-24")["Subnet"] != "10.5.250.0/24"


def test_reservations(server, network):
    path = f"/v1/{network}/reservations"
    assert server.ask("GET", path) == (200, JSON, "[]\n")
    assert server.ask("POST", path, '{"Subnet":"10.5.9.0/24","PublicIP":"10.0.0.9"}') == (200, TEXT, "")
    assert server.ask("GET", path) == (200, JSON, '[{"Subnet":"10.5.9.0/24","PublicIP":"10.0.0.9"}]\n')
    status, kind, body = server.ask("POST", path, '{"Subnet":"10.5.9.0/24","PublicIP":"10.0.0.8"}')
    assert (status, kind, body) == (409, TEXT, "lease already taken\n")
    assert server.ask("POST", path, '{"Subnet":"10.5.9.0/25","PublicIP":"10.0.0.8"}')[0] == 500
    assert server.ask("POST", path, '{"Subnet":"10.6.9.0/24","PublicIP":"10.0.0.8"}')[0] == 500
    assert server.ask("POST", path, "{x")[:2] == (400, TEXT)
    lease = server.take("10.0.0.9", network)
    assert (lease["Subnet"], lease["Expiration"]) == ("10.5.9.0/24", "0001-01-01T00:00:00Z")
    # An ordinary lease becomes one when its own host is named.
    other = server.take("10.0.0.7", network)
    assert server.ask("POST", path, json.dumps({"Subnet": other["Subnet"], "PublicIP": "10.0.0.7"}))[0] == 200
    assert len(json.loads(server.ask("GET", path)[2])) == 2
    assert server.ask("DELETE", f"{path}/10.5.9.0-24") == (200, TEXT, "")
    assert len(json.loads(server.ask("GET", path)[2])) == 1
    assert server.take("10.0.0.9", network)["Subnet"] == "10.5.9.0/24"


def test_networks(server, network):
    answer = server.get("/v1/")
    assert answer["events"] is None
    assert network in answer["snapshot"]
    poll = Poll(server, f"/v1/?next={answer['cursor']}")
    time.sleep(0.2)
    name = f"net{next(_count)}"
    configure(server, name, '{"Network":"10.7.0.0/16"}')
    body = poll.body()
    assert body.startswith(
        '{"events":[{"type":"added","lease":{"Subnet":"0.0.0.0/0","Attrs":{"PublicIP":"0.0.0.0"},'
        f'"Expiration":"0001-01-01T00:00:00Z"}},"network":"{name}"}}],"snapshot":null,"cursor":"'
    )


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "start"),
    [
        ("GET", "/", None, 404, "404 page not found"),
        ("GET", "/v1", None, 404, "404 page not found"),
        ("POST", "/v1/", None, 404, "404 page not found"),
        ("GET", "/v1/a/b", None, 404, "404 page not found"),
        ("GET", "/v1/../config", None, 404, "404 page not found"),
        ("GET", "/v1/a/leases/10.5.1.0-24/x", None, 404, "404 page not found"),
        ("POST", "/v1/NET/leases", "{x", 400, "JSON decoding error: "),
        ("POST", "/v1/NET/leases", "{}", 400, "PublicIP is missing"),
        ("PUT", "/v1/NET/leases/10.5.1.0-24", "{x", 400, "JSON decoding error: "),
        ("GET", "/v1/NET/leases/nonsense", None, 400, "lease key 'nonsense'"),
        ("DELETE", "/v1/NET/leases/x10.5.1.0-24", None, 400, "bad subnet key"),
    ],
)
def test_refusals(server, network, method, path, body, status, start):
    found = server.ask(method, path.replace("NET", network), body)
    assert found[:2] == (status, TEXT)
    assert found[2].startswith(start)
    assert found[2].endswith("\n")


def test_each_request_is_logged(server, network):
    server.ask("GET", f"/v1/{network}/leases/nonsense?next=7")
    wait_until(lambda: f"GET /v1/{network}/leases/nonsense?next=7 - 400" in server.log)


def test_abandoned_polls_end_with_their_clients(server, network):
    """flannel 0.5 keeps each of them until something happens."""
    cursor = server.get(f"/v1/{network}/leases")["cursor"]
    line = f"GET /v1/{network}/leases?next={cursor} - 0"
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", server.port)) as sock:
            sock.sendall(f"GET /v1/{network}/leases?next={cursor} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            time.sleep(0.01)
    wait_until(lambda: server.log.count(line) == 20)


def test_networks_with_ipv6(tmp_path):
    config = '{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:5::/48","Backend":{"Type":"vxlan"}}'
    store = put_config(tmp_path / "s.db", config)
    with serving(tmp_path / "log", f"--store={store}") as made:
        assert made.get("/v1/_/config")["IPv6Network"] == "fd00:5::/48"
        status, _, body = made.ask("POST", "/v1/_/leases", '{"PublicIP":"10.0.0.1","PublicIPv6":"fd99::1"}')
        assert status == 200
        lease = json.loads(body)
        assert lease["IPv6Subnet"].startswith("fd00:5:")
        assert made.get("/v1/_/leases")["snapshot"][0]["IPv6Subnet"] == lease["IPv6Subnet"]
        assert made.ask("POST", "/v1/_/leases", '{"PublicIP":"10.0.0.2"}')[0] == 400
