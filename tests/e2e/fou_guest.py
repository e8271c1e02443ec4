"""The udp backend by the kernel's own FOU, on a kernel that has it: beside keepers, and in their place. Run by test_fou.py."""

import json
import re
import secrets
import shlex
import subprocess

import pytest

from support.keys import wait_until
from support.traffic import ContinuousPing, ping, transfer
from wincey.lab.lab import Lab
from wincey.lab.node import own_flanneld
from wincey.lab.plan import LabSpec, network_config

FLAGS = "--iface={iface} --subnet-file={subnet_file} --store={store} --etcd-prefix={etcd_prefix}"
FOU = "--udp-engine=fou --udp-source-check=off"


def daemon(flags):
    return f"{shlex.join(own_flanneld())} {flags} {FLAGS}"


@pytest.fixture(scope="module")
def lab():
    tun = "modprobe tun; mkdir -p /dev/net; [ -e /dev/net/tun ] || mknod /dev/net/tun c 10 200"
    subprocess.run(["sh", "-euc", tun], check=True)
    engines = {"h1": daemon(FOU), "h2": daemon("--udp-engine=plain")}
    made = Lab(LabSpec(name=f"fou-{secrets.token_hex(2)}", config=network_config("udp"), hosts=2, daemons=engines))
    try:
        made.up(timeout=200)
        yield made
    finally:
        made.down()


def sh(host, command):
    done = host.exec(["sh", "-c", command], timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def device(host):
    found = [link for link in json.loads(sh(host, "ip -d -j link")) if link["ifname"] == "flannel0"]
    return found[0]["linkinfo"] if found else None


def ports(host):
    """The FOU ports, as `ip` tells them."""
    return re.findall(r"port (\d+) ipproto (\d+)", sh(host, "ip fou show"))


def test_every_pair_and_every_byte_both_ways(lab):
    assert lab.ping(patience=60).unreachable == []
    assert [device(host)["info_kind"] for host in lab.hosts] == ["ipip", "tun"]
    one, two = lab.containers
    for sender, receiver in ((one, two), (two, one)):
        sent, received = transfer(sender, receiver, megabytes=2)
        assert sent == received
    for size in (0, 1, 1444):
        assert ping(one, two.address(4), "-M", "do", "-s", str(size))[0] == 0
        assert ping(two, one.address(4), "-M", "do", "-s", str(size))[0] == 0
    assert ping(one, two.address(4), "-s", "3000")[0] == 0


def test_device_and_port_are_as_ip_would_make_them(lab):
    h1 = lab.hosts[0]
    data = device(h1)["info_data"]
    assert (data["local"], data["remote"]) == ("10.99.0.1", "any")
    assert data["encap"]["type"] == "fou"
    assert (data["encap"]["sport"], data["encap"]["dport"]) == (8285, 8285)
    assert ports(h1) == [("8285", "4")]
    assert ports(lab.hosts[1]) == []
    assert "mtu 1472" in sh(h1, "ip link show flannel0")


def test_a_port_and_a_device_that_someone_deletes_come_back(lab):
    h1 = lab.hosts[0]
    sh(h1, "ip fou del port 8285; ip link del flannel0")
    wait_until(lambda: device(h1) is not None and ports(h1) == [("8285", "4")], 120)
    assert lab.ping(patience=60).unreachable == []


@pytest.mark.parametrize(
    ("number", "flags", "kind", "known"),
    [(1, FOU, "ipip", [("8285", "4")]), (0, "--udp-engine=offload", "tun", [])],
)
def test_another_engine_takes_the_place(lab, number, flags, kind, known):
    """The device is another one then, of the same name."""
    host = lab.hosts[number]
    host.stop_daemon()
    host.start_daemon(daemon(flags), timeout=120)
    wait_until(lambda: (device(host) or {}).get("info_kind") == kind and ports(host) == known, 120)
    assert lab.ping(patience=60).unreachable == []
    sent, received = transfer(*lab.containers, megabytes=1)
    assert sent == received


def test_the_daemons_death_loses_nothing_and_cleanup_leaves_nothing(lab, tmp_path):
    host = lab.hosts[1]
    running = ContinuousPing(*lab.containers, tmp_path)
    host.kill_daemon()
    sent, received = transfer(*lab.containers, megabytes=1)
    assert sent == received
    assert running.sent_and_lost()[1] == 0
    done = host.exec([*own_flanneld(), "--cleanup", f"--subnet-file={host.subnet_file}"], timeout=120)
    assert done.returncode == 0, done.stderr
    assert device(host) is None
    assert ports(host) == []
