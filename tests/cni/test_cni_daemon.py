"""STATUS beside the real daemon: its reason until it is ready, and why it ended."""

import secrets

import pytest

from support.cni import Plugin, require_plugins
from support.flanneld import flanneld
from support.keys import wait_until
from wincey.lab.lab import Lab
from wincey.lab.plan import LabSpec, network_config

pytestmark = pytest.mark.root


@pytest.fixture
def lab():
    require_plugins()
    lab = Lab(LabSpec(name=f"cni-{secrets.token_hex(3)}", config="{}", hosts=1, containers=0))
    try:
        lab.up(hosts=[])
        yield lab
    finally:
        lab.down()


def test_status_gives_the_daemons_reason(lab, tmp_path):
    host = lab.hosts[0]
    plugin = Plugin(tmp_path / "cni", netns=host.netns)

    def status():
        answer = plugin.call("STATUS", plugin.conf(version="1.1.0", subnetFile=str(host.subnet_file)))
        return answer.json if answer.code else None

    assert (status()["code"], "flanneld writes this file" in status()["details"]) == (50, True)
    with flanneld(host, tmp_path / "log"):
        wait_until(lambda: "Network" in status()["details"])  # what is wrong with the config
        assert status()["code"] == 50
        lab.store.put_config(network_config("vxlan"))
        wait_until(lambda: status() is None)
    assert status() is None  # a daemon that stopped leaves a host that works
    lab.store.put_config(network_config("nonsense"))
    with flanneld(host, tmp_path / "log") as daemon:
        assert daemon.end() == 1
    assert status()["msg"] == "flanneld is not ready"
    assert "nonsense" in status()["details"]
