import contextlib
import re

import pytest

from wincey.http.client import HttpClient
from wincey.model.errors import CannotListen
from wincey.observe.health import Health, serve_health


@contextlib.asynccontextmanager
async def served(health, unused_tcp_port):
    server = await serve_health(health, "127.0.0.1", unused_tcp_port)
    client = HttpClient(f"http://127.0.0.1:{unused_tcp_port}")
    try:
        yield lambda path: _get(client, path)
    finally:
        await client.close()
        await server.close()


async def _get(client, path):
    response = await client.request("GET", path, timeout=10)
    return response.status, response.body.decode()


async def test_ready_not_ready_and_ready_again(unused_tcp_port):
    health = Health()
    async with served(health, unused_tcp_port) as get:
        assert await get("/healthz") == (200, "flanneld is running")
        assert await get("/readyz") == (503, "flanneld is not ready yet: starting")
        health.set_not_ready("etcd at http://10.0.0.1:2379 does not answer")
        assert await get("/readyz") == (503, "flanneld is not ready yet: etcd at http://10.0.0.1:2379 does not answer")
        health.set_ready()
        assert await get("/readyz") == (200, "flanneld is ready")
        assert await get("/readyz?verbose") == (200, "flanneld is ready")
        health.set_not_ready("the lease was lost")
        assert (await get("/readyz"))[0] == 503
        assert await get("/healthz") == (200, "flanneld is running")


@pytest.mark.parametrize("path", ["/", "/healthz/", "/metrics", "/readyz/x"])
async def test_other_paths_are_not_found(unused_tcp_port, path):
    async with served(Health(), unused_tcp_port) as get:
        assert (await get(path))[0] == 404


async def test_a_taken_port_is_one_clear_line(unused_tcp_port):
    async with served(Health(), unused_tcp_port):
        with pytest.raises(CannotListen) as caught:
            await serve_health(Health(), "127.0.0.1", unused_tcp_port)
    assert caught.value.exit_code == 1
    text = str(caught.value)
    assert re.match(
        rf"--healthz-ip and --healthz-port: can't listen on 127\.0\.0\.1:{unused_tcp_port}: Address already in use; ",
        text,
    )
    assert "\n" not in text


@pytest.mark.parametrize(("host", "port"), [("192.0.2.1", 0), ("not an address", 0), ("127.0.0.1", 70000)])
async def test_an_impossible_address_is_one_clear_line(host, port):
    with pytest.raises(CannotListen, match=r"--healthz-port: can't listen on .*: [A-Z0-9]"):
        await serve_health(Health(), host, port)
