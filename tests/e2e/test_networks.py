"""Several networks in one daemon, on two real hosts: each works, none reaches another, and they come and go."""

import pytest

from support.colours import BLUE, GREEN, RED, Member, arrivals, define, enveloped, forget
from support.flanneld import ask
from support.keys import wait_until
from support.traffic import ping

STORES = ["sqlite", pytest.param("etcd3", marks=pytest.mark.etcd), pytest.param("etcd2", marks=pytest.mark.etcd)]
COLOURS = ("blue", "green", "red")
SPOOF = "192.0.2.9"


def reach_each_other(one, two, networks=COLOURS):
    """Attach a container of each host to each network, and ping across the hosts."""
    for number, network in enumerate(networks):
        one.attach(one.host.containers[number], network)
        assert ping(one.host.containers[number], two.attach(two.host.containers[number], network))


def test_three_networks_beside_each_other(make_lab, tmp_path):
    lab = make_lab(hosts=2, containers=3, start=[])
    define(lab, blue=BLUE, green=GREEN, red=RED)
    flags = ("--networks=blue,green,red", "--ip-masq", "--healthz-port=8080")
    with Member(lab.hosts[0], tmp_path, *flags) as one, Member(lab.hosts[1], tmp_path, *flags) as two:
        one.joins(*COLOURS)
        two.joins(*COLOURS)
        wait_until(lambda: ask(one.host, "/readyz", 8080)[0] == 200)
        reach_each_other(one, two)
        assert {"flannel.1", "flannel.2"} <= one.devices()
        assert all(one.table(network) for network in COLOURS)
        assert not one.host.subnet_file.exists()
        before = {network: one.env(network) for network in COLOURS}
        one.restart()
        wait_until(lambda: ask(one.host, "/readyz", 8080)[0] == 200)
        assert {network: one.env(network) for network in COLOURS} == before
        assert "repaired" not in one.daemon.log
        assert all(f"] {network}: " in one.daemon.log for network in COLOURS)


def attempts(one, two, target, victims):
    """Ways for blue's container on the first host to get a packet to a container of another network."""
    macs = {
        member: next(link["address"] for link in member.links() if link["ifname"] == "flannel.2")
        for member in (one, two)
    }
    own = one.gateway("blue").ip + 1
    tries = []
    for where, (member, address) in victims.items():
        tries += [
            [f"{where}-plain", str(own), address, 7, ""],
            [f"{where}-other-blue", str(two.gateway("blue").ip + 1), address, 7, ""],
            [f"{where}-as-neighbor", str(one.gateway(target).ip + 9), address, 7, ""],
            [f"{where}-as-far-neighbor", str(two.gateway(target).ip + 9), address, 7, ""],
            [f"{where}-as-stranger", SPOOF, address, 7, ""],
        ]
        inner = (2, macs[member], str((two if member is one else one).gateway("green").ip + 9), address)
        doors = [("underlay", member.host.underlay(4))] + [("gateway", str(one.gateway("blue").ip))] * (member is one)
        for door, host in doors if target == "green" else ():
            tries += [
                [f"{where}-enveloped-{door}", str(own), host, 8472, enveloped(*inner, f"{where}-enveloped-{door}")],
                [f"{where}-posted-{door}", SPOOF, host, 8472, enveloped(*inner, f"{where}-posted-{door}")],
            ]
    return tries


@pytest.mark.parametrize("nftables", [True, False], ids=["nftables", "iptables"])
@pytest.mark.parametrize("target", ["green", "red"])
def test_nothing_gets_from_blue_into_another_network(make_lab, tmp_path, target, nftables):
    """Whatever a container has in its routes and its packets. At last all of it arrives, when our rules are gone."""
    lab = make_lab(hosts=2, containers=2, start=[])
    blue, green, red = (config | {"EnableNFTables": nftables} for config in (BLUE, GREEN, RED))
    red |= {"Backend": {"Type": "host-gw"}}
    define(lab, blue=blue, green=green, red=red)
    flags = ("--networks=blue,green,red", "--ip-masq")
    with Member(lab.hosts[0], tmp_path, *flags) as one, Member(lab.hosts[1], tmp_path, *flags) as two:
        one.joins(*COLOURS)
        two.joins(*COLOURS)
        reach_each_other(one, two, ("blue", target))
        attacker, near = one.host.containers
        far = two.host.containers[1]
        victims = {"near": (one, str(one.gateway(target).ip + 1)), "far": (two, str(two.gateway(target).ip + 1))}
        tries = attempts(one, two, target, victims)
        labels = {label for label, *_ in tries}
        assert arrivals([near, far], attacker, tries) == set()
        # The other way round, and what is allowed still is.
        back = [["back", victims["near"][1], str(one.gateway("blue").ip + 1), 7, ""]]
        assert arrivals([attacker], near, back) == set()
        allowed = [["allowed", victims["near"][1], victims["far"][1], 7, ""]]
        assert arrivals([far], near, allowed) == {"allowed"}
        for member in (one, two):
            assert member.daemon.stop() == 0
            member.flush_rules()
        assert arrivals([near, far], attacker, tries) == labels
        assert arrivals([attacker], near, back) == {"back"}


@pytest.mark.parametrize("store", STORES)
def test_networks_come_and_go(make_lab, tmp_path, store):
    lab = make_lab(store=store, hosts=2, containers=3, start=[])
    define(lab, blue=BLUE)
    flags = ("--watch-networks", "--healthz-port=8080")
    with Member(lab.hosts[0], tmp_path, *flags) as one, Member(lab.hosts[1], tmp_path, *flags) as two:
        one.joins("blue")
        two.joins("blue")
        define(lab, green=GREEN, red=RED)
        one.joins("green", "red")
        two.joins("green", "red")
        reach_each_other(one, two)
        # What was there before keeps them apart from what came later.
        assert "10.2.0.0" in one.table("blue")
        victim = str(one.gateway("green").ip + 1)
        plain = [["plain", str(one.gateway("blue").ip + 1), victim, 7, ""]]
        assert arrivals([one.host.containers[1]], one.host.containers[0], plain) == set()
        for network, device, within in (("green", "flannel.2", "10.2.0.0/16"), ("red", "flannel0", "10.3.0.0/16")):
            forget(lab, network)
            wait_until(lambda network=network: not one.env_path(network).exists() and not one.table(network))
            assert not one.routes(within), one.routes(within)
            assert network == "red" or device not in one.devices()
        assert not any(name.startswith("flannel") and name != "flannel.1" for name in one.devices())
        wait_until(lambda: "10.2.0.0" not in one.table("blue") and "10.3.0.0" not in one.table("blue"))
        assert ping(one.host.containers[0], str(two.gateway("blue").ip + 1))
        assert ask(one.host, "/readyz", 8080)[0] == 200
        # It comes back, and the host gets what it had: the lease stays until it expires.
        define(lab, green=GREEN)
        one.joins("green")
        assert str(one.gateway("green").ip + 1) == victim


def test_overlapping_networks_are_refused_until_they_no_longer_are(make_lab, tmp_path):
    lab = make_lab(hosts=1, start=[])
    define(lab, blue=BLUE, green=GREEN | {"Network": "10.1.128.0/17"})
    flags = ("--networks=blue,green,red", "--watch-networks", "--healthz-port=8080")
    with Member(lab.hosts[0], tmp_path, *flags) as one:
        one.joins("blue")
        one.daemon.says("network green can't be joined beside network blue: their address ranges overlap")
        status, reason = ask(one.host, "/readyz", 8080)
        assert status == 503
        assert all(word in reason for word in ("network green", "blue", "10.1.0.0/16", "10.1.128.0/17"))
        assert not one.env_path("green").exists()
        define(lab, green=GREEN)
        one.joins("green")
        wait_until(lambda: ask(one.host, "/readyz", 8080)[0] == 200)
        # A listed network that comes later is joined then, and a VNI can't be had twice.
        define(lab, red=RED | {"Backend": {"Type": "vxlan", "VNI": 2}})
        one.daemon.says("network red can't be joined beside network green: both have the VNI 2")
        define(lab, red=RED)
        one.joins("red")
        # What is in force stays so when its new config can't be had, and the other goes on.
        define(lab, green=BLUE)
        one.daemon.says("going on with what was in force before")
        assert {"flannel.1", "flannel.2", "flannel2"} <= one.devices()
        assert one.daemon.log.count("can't be joined beside network green") == 1
        # Until the first one leaves: then its range and its device are free.
        forget(lab, "blue")
        wait_until(lambda: [str(network) for network in one.env("green").networks] == ["10.1.0.0/16"])
        wait_until(
            lambda: (
                {"flannel.1", "flannel2"}
                == {each for each in one.devices() if each.startswith("flannel") and "-" not in each}
            )
        )


def test_without_watching_a_deleted_config_changes_nothing(make_lab, tmp_path):
    lab = make_lab(hosts=1, start=[])
    with Member(lab.hosts[0], tmp_path, "--networks=blue,green", "--healthz-port=8080") as one:
        one.daemon.says("there is no network of blue, green in the store yet")
        assert ask(one.host, "/readyz", 8080)[0] == 503
        define(lab, blue=BLUE, other=GREEN)
        one.joins("blue")
        wait_until(lambda: ask(one.host, "/readyz", 8080)[0] == 200)
        forget(lab, "blue")
        one.daemon.says("going on with what was in force before")
        assert one.table("blue")
        assert not one.env_path("other").exists()
        assert ask(one.host, "/readyz", 8080)[0] == 200


def test_what_is_left_while_no_daemon_ran_is_cleaned_up(make_lab, tmp_path):
    lab = make_lab(hosts=1, start=[])
    define(lab, blue=BLUE, green=GREEN, red=RED)
    with Member(lab.hosts[0], tmp_path, "--watch-networks", "--ip-masq") as one:
        one.joins(*COLOURS)
        assert one.daemon.stop() == 0
        assert all(one.table(network) for network in COLOURS), "the data path outlives the daemon"
        forget(lab, "green")
        one.start("--networks=blue,green")
        wait_until(lambda: not one.table("green") and not one.table("red"))
        one.daemon.says("red was left while no daemon ran")
        wait_until(lambda: not one.env_path("red").exists())
        assert one.env_path("blue").exists()
        assert {name for name in one.devices() if name.startswith("flannel")} == {"flannel.1"}
        assert one.daemon.stop() == 0
        one.start("--cleanup")
        assert one.daemon.end() == 0
        assert not one.table("blue")
        assert not any(name.startswith("flannel") for name in one.devices())
        assert list(one.directory.rglob("*.*")) == []
