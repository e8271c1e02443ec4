"""The netconf key `network`: containers of named networks of one daemon, each with its own, and none with another."""

import secrets
import subprocess
from contextlib import ExitStack

import pytest

from support.cni import Plugin, require_plugins
from support.colours import BLUE, GREEN, Member, define
from support.netns import netns
from wincey.lab.lab import Lab
from wincey.lab.plan import LabSpec

pytestmark = [pytest.mark.root, pytest.mark.timeout(120)]
NETWORKS = ("blue", "green")


@pytest.fixture
def lab():
    require_plugins()
    lab = Lab(LabSpec(name=f"cni-{secrets.token_hex(3)}", config="{}", hosts=2, containers=0))
    try:
        lab.up(hosts=[])
        yield lab
    finally:
        lab.down()


def reaches(pod, address):
    argv = ["ip", "netns", "exec", pod.name, "ping", "-c2", "-i0.2", "-W2", address]
    return subprocess.run(argv, capture_output=True, timeout=30, check=False).returncode == 0


def test_blue_reaches_blue_and_never_green(lab, tmp_path):
    define(lab, blue=BLUE, green=GREEN)
    with ExitStack() as stack:
        pods, addresses, conf = {}, {}, {}
        for host in lab.hosts:
            member = stack.enter_context(Member(host, tmp_path, f"--networks={','.join(NETWORKS)}"))
            member.joins(*NETWORKS)
            plugin = Plugin(tmp_path / host.name, netns=host.netns)
            for network in NETWORKS:
                at = (host.name, network)
                pods[at] = stack.enter_context(netns())
                # What the directory of subnet.env files is by default belongs to the whole machine here.
                files = {"subnetFile": str(member.directory / f"{network}.env"), "dataDir": str(plugin.state / network)}
                conf[at] = plugin.conf(network, network=network, delegate={"isDefaultGateway": True}, **files)
                answer = plugin.call("ADD", conf[at], container="c1", netns=f"/run/netns/{pods[at].name}")
                assert answer.code == 0, answer
                addresses[at] = answer.json["ips"][0]["address"].partition("/")[0]
        assert reaches(pods["h1", "blue"], addresses["h2", "blue"])
        assert reaches(pods["h1", "green"], addresses["h2", "green"])
        for target in (("h1", "green"), ("h2", "green")):
            assert not reaches(pods["h1", "blue"], addresses[target])
