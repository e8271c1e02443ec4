"""HTTP requests to everything that we serve: framing, then the API of each server. The network is pretended, the rest is ours."""

from __future__ import annotations

import asyncio
import random
import tempfile
from pathlib import Path
from typing import Any

from fuzz.target import Cut, chosen, pieces, play, target
from wincey.docker.blocks import Blocks
from wincey.docker.driver import Driver
from wincey.docker.fabric import Fabrics
from wincey.docker.state import StateFile
from wincey.http.server import HttpServer, Limits, Request, Response
from wincey.model.errors import StoreUnavailable, WinceyError
from wincey.model.report import PeersReport, StatusReport
from wincey.observe.health import Health
from wincey.observe.localapi import LocalApi, UnknownNetwork
from wincey.server.access import Access
from wincey.server.api import Api
from wincey.store.sqlite import SqliteStore

_TOKEN = "fuzz-token-0123456789"  # it opens nothing


class Wire(asyncio.Transport):
    """A transport that keeps what is written, and tells its protocol when it is closed."""

    def __init__(self, protocol: asyncio.Protocol) -> None:
        super().__init__()
        self.written = bytearray()
        self.closed = False
        self._protocol = protocol

    def write(self, data: Any) -> None:
        assert not self.closed, "written after the end"
        self.written += data

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("192.0.2.9", 40000) if name == "peername" else default

    def pause_reading(self) -> None:
        return

    def resume_reading(self) -> None:
        return

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        return

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.abort()

    def abort(self) -> None:
        if not self.closed:
            self.closed = True
            asyncio.get_running_loop().call_soon(self._protocol.connection_lost, None)


async def converse(server: HttpServer, parts: list[bytes]) -> bytes:
    """Send parts with a pause between them, then the end; what was answered until the server closed."""
    protocol = server.connection()
    wire = Wire(protocol)
    protocol.connection_made(wire)
    for part in parts:
        if not wire.closed:
            protocol.data_received(part)
            await asyncio.sleep(0.01)
    if not wire.closed:
        protocol.eof_received()
    for _ in range(200):
        if wire.closed:
            break
        await asyncio.sleep(1)
    assert wire.closed, "the connection is never closed"
    await asyncio.sleep(0)
    return bytes(wire.written)


_REQUESTS = (
    b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n",
    b"POST /v1/_/leases HTTP/1.1\r\nHost: x\r\nContent-Length: 20\r\n\r\n{\"PublicIP\":\"1.2.3.4\"}",
    b"GET http://a/v1/_/leases?next=5&x=%zz HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n\r\n",
    b"PUT / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\nGET / HTTP/1.0\r\n\r\n",
    b"HEAD / HTTP/1.1\r\nHost: x\r\n\r\nHEAD / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03",
)  # fmt: skip


@target("http-server", seeds=[bytes([size]) + request for request in _REQUESTS for size in (0, 7)])
def http_server(data: bytes) -> None:
    """Bytes in pieces of any size: every answer is HTTP, bodies are within the limit, the connection ends."""
    cut = Cut(data)
    size = cut.number(256) or LARGE
    rest = cut.rest()

    async def handle(request: Request) -> Response:
        assert len(request.body) <= 2000
        assert request.path
        return Response(200, request.body + repr(sorted(request.query)).encode())

    async def scene() -> None:
        server = HttpServer(handle, Limits(header=1024, body=2000))
        said = await converse(server, [rest[at : at + size] for at in range(0, len(rest), size)])
        assert not said or said.startswith(b"HTTP/1.1 ")
        assert b" 500 " not in said.partition(b"\r\n")[0]
        await server.close()

    play(scene)


LARGE = 1 << 20


def _request(method: str, path: str, body: bytes, headers: dict[str, str]) -> Request:
    target_path, _, query = path.partition("?")
    pairs = dict(part.partition("=")[::2] for part in query.split("&") if part)
    return Request(method, target_path, pairs, headers, body, "192.0.2.9")


_LEASE = '{"PublicIP":"192.0.2.7","BackendType":"vxlan","BackendData":{"VtepMAC":"0e:2a:00:00:00:07"}}'
_FULL = '{"Subnet":"10.3.7.0/24","Attrs":%s,"Expiration":"2030-01-01T00:00:00Z"}' % _LEASE
_CALLS = (
    (0, "/v1/_/config", "", ""), (0, "/v1/_/leases", "", ""), (0, "/v1/_/leases?next=1", "", "host a b"),
    (1, "/v1/_/leases", _LEASE, "10.3.7.0-24"), (2, "/v1/_/leases/10.3.7.0-24", _FULL, "192.0.2.7"),
    (3, "/v1/_/leases/10.3.7.0-24", "", ""), (0, "/v1/_/leases/10.3.7.0-24", "", ""), (0, "/v1/", "", ""),
    (1, "/v1/_/reservations", '{"Subnet":"10.3.8.0/24","PublicIP":"192.0.2.8"}', ""), (0, "/v1/_/reservations", "", ""),
    (3, "/v1/_/reservations/10.3.8.0-24", "", ""), (0, "/v1/?next=2", "", ""), (0, "/v1/blue/config", "", ""),
)  # fmt: skip


@target("remote-api", seeds=[bytes([number]) + pieces(path, body, header) for number, path, body, header in _CALLS]
        + [b"".join(bytes([number]) + pieces(path, body, header) for number, path, body, header in _CALLS[3:7])])  # fmt: skip
def remote_api(data: bytes) -> None:
    """Calls of a client of flanneld's server, on a real store: answers with a status, and never by an unexpected error. Nobody
    else's lease goes by what one client says about its own."""
    cut = Cut(data)

    async def scene() -> None:
        with tempfile.TemporaryDirectory(prefix="wincey-fuzz-", dir="/dev/shm") as directory:  # in memory
            store = SqliteStore(f"{directory}/store")
            await store.create("/n/config", b'{"Network": "10.3.0.0/16", "Backend": {"Type": "vxlan"}}', None)
            await store.create("/n/subnets/10.3.77.0-24", _LEASE.replace("0.2.7", "0.2.77").encode(), 3600)
            api = Api("/n", Access(), random.Random(1))
            api.store = store
            try:
                for _ in range(4):
                    if not cut.left:
                        break
                    await _ask(api, cut)
                assert await store.get("/n/config") is not None
            finally:
                api.close()
                await store.close()

    asyncio.run(scene())


async def _ask(api: Api, cut: Cut) -> None:
    method = chosen(cut, ("GET", "POST", "PUT", "DELETE", "PATCH"))
    path, body, header = cut.piece().decode("latin-1"), cut.piece(), cut.piece().decode("latin-1")
    fields = dict.fromkeys(("wincey-wish", "wincey-formerly", "wincey-address"), header)
    if header.startswith("host "):
        fields["wincey-host"] = header[5:]
    try:
        async with asyncio.timeout(0.02):  # a poll that waits for what will not happen
            response = await api.handle(_request(method, path, body, fields))
    except TimeoutError:
        return
    assert isinstance(response.body, bytes)
    assert 200 <= response.status < 600
    assert b"Traceback" not in response.body


class _Source:
    """A daemon that is in one network."""

    def status(self) -> StatusReport:
        raise WinceyError("not now")

    async def peers(self, network: str | None) -> list[PeersReport]:
        if network not in {None, "blue"}:
            raise UnknownNetwork(f"no network {network!r}")
        return []

    containers = difference = peers

    async def explain(self, network: str | None, address: str) -> list[Any]:
        return [] if network is None else await self.peers(network)


@target(
    "local-api",
    seeds=[
        pieces("GET", "/v1/" + path)
        for path in ("status", "peers?network=blue", "explain?address=10.3.1.1", "openapi.json", "x")
    ],
)
def local_api(data: bytes) -> None:
    """The local API and the health endpoints: JSON or text for any request."""
    cut = Cut(data)
    method, path = cut.piece().decode("latin-1"), cut.piece().decode("latin-1")
    api = LocalApi(_Source())  # type: ignore[arg-type]  # answers as one

    async def scene() -> None:
        answer = await api.handle(_request(method, path, b"", {}))
        assert isinstance(answer.body, bytes)
        assert answer.body.startswith((b"{", b"["))
        code, text = Health().answer(path)
        assert code in {200, 404, 503}
        assert text

    play(scene)


@target("access", seeds=(f"Bearer {_TOKEN}", "Bearer x", "Basic eDp5", "bearer\t"))
def access(data: bytes) -> None:
    """No header but the right one is let in."""
    judge = _judge()
    given = data.decode("latin-1")
    grant = judge.judge(given, None)
    right = given[:7].lower() == "bearer " and given[7:].strip() == _TOKEN
    assert (grant is not None) == right
    assert judge.judge("", given or None) is None


_access: list[Access] = []


def _judge() -> Access:
    if not _access:
        with tempfile.TemporaryDirectory(prefix="wincey-fuzz-") as directory:
            path = Path(directory) / "tokens"
            path.write_text(f"{_TOKEN} *\n")
            judge = Access(str(path))
            judge._refresh = lambda: None  # type: ignore[method-assign]  # the file goes with its directory
            _access.append(judge)
    return _access[0]


_DOCKER = (
    ("Plugin.Activate", ""), ("IpamDriver.RequestPool", '{"Pool":"","Options":{"network":"blue"},"V6":false}'),
    ("IpamDriver.RequestPool", '{"Pool":"10.3.200.0/22"}'), ("IpamDriver.ReleasePool", '{"PoolID":"a"}'),
    ("IpamDriver.RequestAddress", '{"PoolID":"p","Address":"10.3.1.5","Options":{"RequestAddressType":"com.docker.network.gateway"}}'),
    ("IpamDriver.ReleaseAddress", '{"PoolID":"p","Address":"10.3.1.5"}'),
    ("NetworkDriver.CreateNetwork", '{"NetworkID":"n1","Options":{"com.docker.network.generic":{"mtu":"1400"}},"IPv4Data":[{"AddressSpace":"wincey","Pool":"10.3.1.0/24","Gateway":"10.3.1.1/24"}]}'),
    ("NetworkDriver.CreateEndpoint", '{"NetworkID":"n","EndpointID":"e","Interface":{"Address":"10.3.1.5/24"}}'),
    ("NetworkDriver.Join", '{"NetworkID":"n","EndpointID":"e"}'),
    ("NetworkDriver.ProgramExternalConnectivity", '{"NetworkID":"n","EndpointID":"e","Options":{"com.docker.network.portmap":[{"Proto":6,"Port":80,"HostPort":8080}]}}'),
)  # fmt: skip


@target("docker-plugin", WinceyError, seeds=[pieces(*call) for call in _DOCKER])
def docker_plugin(data: bytes) -> None:
    """Docker's calls, without Docker, a store or a kernel: refused in words, or answered."""
    cut = Cut(data)
    method, body = cut.piece().decode("latin-1"), cut.piece()
    if method in {"NetworkDriver.DeleteNetwork", "NetworkDriver.DeleteEndpoint"}:
        return  # they go on to the kernel whatever they are told

    async def opened() -> Any:
        raise StoreUnavailable("there is none")

    async def call() -> None:
        with tempfile.TemporaryDirectory(prefix="wincey-fuzz-", dir="/dev/shm") as directory:  # in memory
            env = Path(directory) / "subnet.env"
            env.write_text(
                "FLANNEL_NETWORK=10.3.0.0/16\nFLANNEL_SUBNET=10.3.1.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n"
            )
            file = StateFile(f"{directory}/state.json")
            blocks = Blocks("engine", "/n", opened, random.Random(1))
            driver = Driver(file, Fabrics(str(env), f"{directory}/networks"), blocks)
            try:
                answer = await driver.call(method, body)
                assert isinstance(answer, dict)
            finally:
                await blocks.close()

    asyncio.run(call())
