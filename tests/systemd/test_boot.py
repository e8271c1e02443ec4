"""The unit and Docker's drop-in under a real systemd: order, readiness, restarts, and the sandbox with every backend.

One boot serves all tests of this file; a second host of the lab runs flanneld as it is, to be its peer.
"""

import json
import re
import secrets
import subprocess
from pathlib import Path

import pytest

from support.flanneld import Flanneld
from support.keys import wait_until
from support.machine import PROGRAMS
from support.nspawn import Booted, require_nspawn
from wincey.lab.lab import Lab
from wincey.lab.plan import LabSpec, network_config

UNITS = Path(__file__).parents[2] / "packaging" / "systemd"

# Docker's unit by name and kind; what it would start says which options it got, and when.
DOCKER = """
[Service]
Type=notify
NotifyAccess=all
ExecStart=/usr/sbin/dockerd -H fd://
Restart=on-failure
"""
DOCKERD = "#!/bin/sh\necho started with: $*\nsystemd-notify --ready\nexec sleep infinity\n"


def put_config(store, **backend):
    text = json.dumps({"Network": "10.5.0.0/16"} | backend)
    argv = [PROGRAMS / "wincey", "config", "set", "--store", store, "-"]
    subprocess.run(argv, input=text, capture_output=True, text=True, check=True)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The booted host, its peer and the store's directory, without a network config yet."""
    require_nspawn()
    directory = tmp_path_factory.mktemp("boot")
    shared = directory / "shared"
    shared.mkdir()
    store = f"sqlite:{shared / 'store.db'}"
    lab = Lab(LabSpec(name=f"boot-{secrets.token_hex(3)}", config=network_config("vxlan"), hosts=2, containers=0))
    booted = peer = None
    try:
        lab.up(hosts=[])
        drop_in = (UNITS / "docker.service.d/50-flannel.conf").read_text()
        booted = Booted(
            lab.hosts[0],
            directory / "h1",
            files={
                "/etc/systemd/system/flanneld.service": (UNITS / "flanneld.service").read_text(),
                "/etc/systemd/system/docker.service": DOCKER,
                "/etc/systemd/system/docker.service.d/50-flannel.conf": drop_in,
                "/etc/default/flanneld": "FLANNELD_STORE=sqlite:/var/lib/wincey/store.db\nFLANNELD_IFACE=eth0\n"
                "FLANNELD_IP_MASQ=true\n",
                "/usr/local/sbin/dockerd": DOCKERD,
                "/etc/systemd/system/wrong.service": (UNITS / "flanneld.service")
                .read_text()
                .replace("bin/flanneld\n", "bin/flanneld --no-such-flag\n"),
            },
            wants=["flanneld.service", "docker.service"],
            shared={shared: "/var/lib/wincey"},
        )
        peer = Flanneld(
            lab.hosts[1],
            directory / "peer.log",
            *("--iface=eth0", "--ip-masq", f"--store={store}", f"--subnet-file={directory / 'peer.env'}"),
            bare=True,
        )
        yield World(booted, lab.hosts[1], store, directory / "peer.env")
    finally:
        if peer:
            peer.kill()
        if booted:
            booted.close()
        lab.down()


def env_of(text):
    return dict(line.split("=", 1) for line in text.splitlines())


class World:
    """h1, booted, and h2, with a flanneld of its own."""

    def __init__(self, h1, h2, store, peer_env):
        self.h1, self.h2, self.store, self._peer_env = h1, h2, store, peer_env

    @property
    def env(self):
        return env_of(self.h1.run("cat", "/run/flannel/subnet.env").stdout)

    @property
    def peer_env(self):
        return env_of(self._peer_env.read_text()) if self._peer_env.exists() else {}

    def addresses(self):
        """Each host has its subnet's first address, as a bridge of containers would."""
        for host, env in ((self.h1.host, self.env), (self.h2, self.peer_env)):
            host.exec(["ip", "address", "replace", env["FLANNEL_SUBNET"], "dev", "cni0"], check=True)

    def ping(self):
        here, there = (env["FLANNEL_SUBNET"].partition("/")[0] for env in (self.env, self.peer_env))
        return self.h1.host.exec(["ping", "-c", "1", "-W", "1", "-I", here, there]).returncode == 0


def test_docker_waits_for_flanneld_which_waits_for_a_network_config(world):
    wait_until(lambda: "there is no network config" in world.h1.journal("flanneld"))
    assert world.h1.show("flanneld", "ActiveState") == "activating"
    assert world.h1.show("docker", "ActiveState") == "inactive"
    assert "docker.service" in world.h1.run("systemctl", "list-jobs").stdout


def test_with_a_config_both_start_in_order_and_docker_has_the_subnet(world):
    put_config(world.store, Backend={"Type": "vxlan"})
    world.h1.wait_state("flanneld")
    world.h1.wait_state("docker")
    ready = int(world.h1.show("flanneld", "ActiveEnterTimestampMonotonic"))
    assert ready <= int(world.h1.show("docker", "ExecMainStartTimestampMonotonic"))
    env = world.env
    wanted = f"--bip={env['FLANNEL_SUBNET']} --ip-masq=false --mtu={env['FLANNEL_MTU']}"
    assert f"started with: -H fd:// --containerd=/run/containerd/containerd.sock {wanted}\n" in world.h1.journal(
        "docker"
    )
    assert world.h1.run("cat", "/run/flannel/flannel_docker_opts.env").stdout.splitlines() == [
        f'DOCKER_OPT_BIP="--bip={env["FLANNEL_SUBNET"]}"',
        'DOCKER_OPT_IPMASQ="--ip-masq=false"',
        f'DOCKER_OPT_MTU="--mtu={env["FLANNEL_MTU"]}"',
    ]


def test_the_daemon_has_two_capabilities_and_no_more(world):
    status = world.h1.run("cat", f"/proc/{world.h1.show('flanneld', 'MainPID')}/status").stdout
    assert set(re.findall(r"Cap(?:Eff|Prm|Bnd):\s+(\w+)", status)) == {f"{1 << 12 | 1 << 13:016x}"}


def test_killed_it_comes_back_with_its_subnet_and_docker_notices_nothing(world):
    docker, before = world.h1.show("docker", "MainPID"), world.env
    killed = world.h1.show("flanneld", "MainPID")
    world.h1.run("systemctl", "kill", "--kill-whom=main", "--signal=KILL", "flanneld")
    wait_until(lambda: world.h1.show("flanneld", "NRestarts") == "1" and world.h1.show("flanneld", "MainPID") != killed)
    world.h1.wait_state("flanneld")
    assert world.env == before
    assert world.h1.show("docker", "MainPID") == docker


def test_restarted_by_hand_docker_notices_nothing(world):
    docker, before = world.h1.show("docker", "MainPID"), world.env
    assert world.h1.run("systemctl", "restart", "flanneld").returncode == 0
    assert world.h1.show("flanneld", "ActiveState") == "active"
    assert world.env == before
    assert world.h1.show("docker", "MainPID") == docker


@pytest.mark.parametrize(
    ("backend", "nftables"), [("vxlan", True), ("vxlan", False), ("host-gw", True), ("udp", True), ("udp", False)]
)
def test_every_backend_works_in_the_sandbox(world, backend, nftables):
    put_config(world.store, EnableNFTables=nftables, Backend={"Type": backend})
    assert world.h1.run("systemctl", "restart", "flanneld").returncode == 0
    mtu = {"vxlan": "1450", "host-gw": "1500", "udp": "1472"}[backend]
    wait_until(lambda: world.peer_env.get("FLANNEL_MTU") == mtu)
    world.addresses()
    wait_until(world.ping)
    rules = (
        ("nft list table ip flannel-ipv4",)
        if nftables
        else ("iptables -S FLANNEL-FWD", "iptables -t nat -S FLANNEL-POSTRTG")
    )
    for command in rules:
        assert "10.5.0.0/16" in world.h1.run(*command.split()).stdout
    invocation = world.h1.show("flanneld", "InvocationID")
    said = world.h1.run("journalctl", "--no-pager", "-o", "cat", f"_SYSTEMD_INVOCATION_ID={invocation}").stdout
    assert "lease" in said or "wincey" in said
    assert not re.findall(r"^[EF]\d{4} .*|.*(?:not permitted|Permission denied|Traceback).*", said, re.MULTILINE)


def test_the_udp_tunnel_outlives_a_stop(world):
    """It is of the unit's control group, and must not be ended with the daemon."""
    put_config(world.store, Backend={"Type": "udp"})
    wait_until(lambda: world.peer_env.get("FLANNEL_MTU") == "1472" and world.env["FLANNEL_MTU"] == "1472")
    world.addresses()
    wait_until(world.ping)
    assert world.h1.run("systemctl", "stop", "flanneld").returncode == 0
    assert world.h1.show("flanneld", "MainPID") == "0"
    assert all(world.ping() for _ in range(3))
    assert world.h1.run("systemctl", "start", "flanneld").returncode == 0
    assert world.ping()


def test_docker_rather_waits_than_start_on_another_subnet(world):
    world.h1.run("systemctl", "stop", "docker", "flanneld")
    world.h1.run("rm", "/run/flannel/subnet.env")
    world.h1.sh("sed -i s/eth0/no-such-interface/ /etc/default/flanneld")
    world.h1.run("systemctl", "start", "--no-block", "docker")
    wait_until(lambda: "subnet.env is not there: does flanneld run" in world.h1.journal("docker"))
    assert world.h1.show("docker", "ActiveState") != "active"
    world.h1.sh("sed -i s/no-such-interface/eth0/ /etc/default/flanneld")
    world.h1.wait_state("flanneld")
    world.h1.wait_state("docker")
    assert f"--bip={world.env['FLANNEL_SUBNET']} " in world.h1.journal("docker").rpartition("started with")[2]


def test_a_wrong_command_line_is_not_tried_again(world):
    assert world.h1.run("systemctl", "start", "wrong").returncode == 1
    assert world.h1.show("wrong", "ActiveState") == "failed"
    assert world.h1.show("wrong", "ExecMainStatus") == "2"
    assert world.h1.show("wrong", "NRestarts") == "0"
