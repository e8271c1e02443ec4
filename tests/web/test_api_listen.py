"""The API off its host, by real daemons in a lab: who gets an answer over TLS, who does not, and what it knows."""

import asyncio
import json
import ssl
import sys

import pytest

from support.certs import Authority
from support.interop import sh
from support.keys import wait_until
from wincey.http.client import HttpClient, TlsFailed
from wincey.lab.namespace import call_in

pytestmark = pytest.mark.root
TOKEN = "0123456789abcdef0123"


@pytest.fixture
def authority(tmp_path):
    return Authority(tmp_path / "tls", addresses=["10.99.0.1", "10.99.0.2", "10.99.0.3"])


@pytest.fixture
def flags(authority, tmp_path):
    made = authority.issue("host")
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    return (
        "--api-listen=:8471",
        f"--api-certfile={made.cert}",
        f"--api-keyfile={made.key}",
        f"--api-token-file={tmp_path / 'token'}",
    )


def get(lab, url, target, token=TOKEN, ca=None):
    """An answer's status and JSON, asked for in the store's namespace."""

    async def ask():
        client = HttpClient(url, ssl.create_default_context(cafile=ca))
        headers = {"authorization": f"Bearer {token}"} if token else {}
        try:
            answer = await client.request("GET", target, headers=headers)
        finally:
            await client.close()
        return answer.status, json.loads(answer.body)

    return call_in(lab.node("store").netns, lambda: asyncio.run(ask()))


def test_whoever_has_the_token_reads_it_over_tls(make_lab, flags, authority, tmp_path):
    lab = make_lab("vxlan", hosts=2, options=flags)
    url = "https://10.99.0.1:8471"
    status, answer = get(lab, url, "/v1/status", ca=authority.ca)
    assert (status, answer["networks"][0]["lease"]["subnets"]) == (200, [str(lab.hosts[0].gateways[0].network)])
    for token in (None, "", TOKEN[:-1], TOKEN + "0"):
        status, answer = get(lab, url, "/v1/status", token, ca=authority.ca)
        assert (status, "--api-token-file" in answer["error"]) == (401, True)
    with pytest.raises(TlsFailed):
        get(lab, url, "/v1/status")  # nobody has told us whom to trust
    # The token is replaced while the daemon runs.
    (tmp_path / "token").write_text("another-token-of-this-cluster # since today\n")
    wait_until(lambda: get(lab, url, "/v1/status", ca=authority.ca)[0] == 401)
    assert get(lab, url, "/v1/status", "another-token-of-this-cluster", ca=authority.ca)[0] == 200


def test_the_containers_of_a_host(make_lab, flags, authority):
    lab = make_lab("vxlan", hosts=2, containers=2, options=flags)
    host = lab.hosts[0]
    addresses = [each.address(4) for each in host.containers]
    for address in addresses:
        assert host.exec(["ping", "-c", "1", "-W", "2", address]).returncode == 0
    status, answer = get(lab, "https://10.99.0.1:8471", "/v1/containers", ca=authority.ca)
    assert status == 200
    assert [each["address"] for each in answer[0]["containers"]] == addresses
    assert {each["device"] for each in answer[0]["containers"]} == {"cni0"}
    macs = [json.loads(sh(each, "ip -j link show eth0"))[0]["address"] for each in host.containers]
    assert [each["mac"] for each in answer[0]["containers"]] == macs


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--api-listen=0.0.0.0:8471"], "needs --api-token-file"),
        (["--api-listen=10.99.0.1:8471", "--api-token-file=TOKEN"], "needs --api-certfile and --api-keyfile"),
        (["--api-listen=:8471", "--api-token-file=TOKEN"], "needs --api-certfile and --api-keyfile"),
        (["--api-listen=127.0.0.1:8471", "--api-token-file=SHORT"], "at least 16 characters"),
        (["--api-listen=127.0.0.1:8471", "--api-token-file=/nonsense"], "--api-token-file /nonsense: No such file"),
        (["--api-listen=192.0.2.1:8471", "--api-token-file=TOKEN", "--api-certfile=CERT"], "--api-keyfile"),
    ],
)
async def test_it_refuses_to_be_read_by_anybody(given, words, tmp_path):
    (tmp_path / "TOKEN").write_text(TOKEN)
    (tmp_path / "SHORT").write_text("abc")
    arguments = [each.replace("=TOKEN", f"={tmp_path}/TOKEN").replace("=SHORT", f"={tmp_path}/SHORT") for each in given]
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "wincey.cli.flanneld",
        f"--store=sqlite:{tmp_path}/store",
        f"--subnet-file={tmp_path}/subnet.env",
        *arguments,
        stderr=asyncio.subprocess.PIPE,
    )
    _, err = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode in {1, 2}
    assert words in err.decode().splitlines()[-1]
    assert "Traceback" not in err.decode()
