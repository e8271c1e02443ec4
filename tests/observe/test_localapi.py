"""The local API by itself: what it answers, to whom, and how it describes itself. Whole daemons: tests/e2e/test_look.py."""

import asyncio
import grp
import json
import os
import stat
import subprocess
import sys

import msgspec
import pytest

from wincey.agent.view import Views, WaitingView
from wincey.http.client import HttpClient
from wincey.model import report
from wincey.model.errors import CannotListen, StoreError
from wincey.observe.localapi import ENDPOINTS, LocalApi, openapi


@pytest.fixture
def views():
    views = Views("h1")
    views.put("blue", WaitingView("blue", "/run/blue.env", "etcd at http://127.0.0.1:1"))
    return views


@pytest.fixture
async def socket(views, tmp_path):
    api = LocalApi(views)
    path = str(tmp_path / "deep" / "api.sock")
    await api.listen(path)
    yield path
    await api.close()
    assert not os.path.exists(path)


async def get(path, target, method="GET"):
    client = HttpClient(f"unix://{path}")
    try:
        answer = await client.request(method, target)
    finally:
        await client.close()
    return answer.status, json.loads(answer.body)


async def test_it_answers_over_its_socket(socket):
    status, body = await get(socket, "/v1/status")
    assert status == 200
    read = msgspec.convert(body, report.StatusReport)
    assert (read.host, read.pid, read.api) == ("h1", os.getpid(), "v1")
    assert [(each.name, each.trouble, each.lease) for each in read.networks] == [("blue", "starting", None)]
    assert (await get(socket, "/v1/peers?network=blue"))[1] == [{"network": "blue", "peers": [], "note": "starting"}]
    assert (await get(socket, "/v1/diff"))[1][0]["wanted"] == 0


@pytest.mark.parametrize(
    ("target", "method", "status", "words"),
    [
        ("/v1/nonsense", "GET", 404, "/v1/status, /v1/peers"),
        ("/status", "GET", 404, "no /status"),
        ("/v2/status", "GET", 404, "no /v2/status"),
        ("/v1/status", "POST", 405, "only reads"),
        ("/v1/explain", "GET", 400, "needs ?address="),
        ("/v1/explain?address=10.5.1", "GET", 400, "'10.5.1' is not an IPv4"),
        ("/v1/peers?network=red", "GET", 404, "no network 'red': there are blue"),
    ],
)
async def test_it_says_what_it_can_t_answer(socket, target, method, status, words):
    answer, body = await get(socket, target, method)
    assert answer == status
    assert words in body["error"]


async def test_a_source_that_fails_is_no_internal_error(views, monkeypatch):
    async def fails(network):
        raise StoreError("etcd has gone fishing")

    monkeypatch.setattr(views, "difference", fails)
    status, body = await LocalApi(views).answer("GET", "/v1/diff", {})
    assert (status, json.loads(body)) == (503, {"error": "etcd has gone fishing"})


async def test_the_socket_is_root_s_or_a_group_s(views, tmp_path):
    for group, mode in (("", 0o600), (grp.getgrgid(os.getgid()).gr_name, 0o660)):
        api = LocalApi(views)
        path = tmp_path / f"api{mode}.sock"
        await api.listen(str(path), group)
        assert stat.S_IMODE(path.stat().st_mode) == mode
        await api.close()
    with pytest.raises(CannotListen, match=r"--api-group=no-such-group.*groupadd"):
        await LocalApi(views).listen(str(tmp_path / "x"), "no-such-group")
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotListen, match="file: "):  # somebody's file is not removed
        await LocalApi(views).listen(str(tmp_path / "file"))
    assert (tmp_path / "file").exists()


async def test_a_socket_left_behind_is_replaced(views, tmp_path):
    path = str(tmp_path / "api.sock")
    left = await asyncio.start_unix_server(lambda reader, writer: None, path)
    left.close()
    api = LocalApi(views)
    await api.listen(path)
    assert (await get(path, "/v1/status"))[0] == 200
    await api.close()


async def test_the_description_has_each_answer_and_no_loose_end(socket):
    status, served = await get(socket, "/v1/openapi.json")
    assert status == 200
    described = openapi()
    assert served == json.loads(json.dumps(described))
    assert described["paths"].keys() == {f"/v1/{name}" for name in ENDPOINTS}
    names = described["components"]["schemas"].keys()
    wanted = {text.rpartition("/")[2] for text in _references(described)}
    assert wanted <= names
    assert {"StatusReport", "PeerReport", "DifferenceReport", "ErrorReport"} <= names
    assert "left" in described["components"]["schemas"]["LeaseReport"]["required"]


def _references(node):
    if isinstance(node, dict):
        return [value for key, value in node.items() if key == "$ref"] + [
            each for value in node.values() for each in _references(value)
        ]
    return [each for item in node for each in _references(item)] if isinstance(node, list) else []


def test_nobody_asks_nobody_pays():
    """A daemon that nobody asks has imported neither HTTP nor what describes the API."""
    script = """
import asyncio, sys
from wincey.agent.view import Views
from wincey.observe.localapi import LocalApi

async def main(path):
    api = LocalApi(Views("h1"))
    await api.listen(path)
    print(sorted(set(sys.modules) & {"h11", "wincey.http.server"}))
    await api.close()

asyncio.run(main(sys.argv[1]))
"""
    path = f"/tmp/wincey-api-{os.getpid()}.sock"
    done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "[]\n"
