"""What is deleted or changed by hand comes back by itself; what is not ours is never touched; --cleanup takes all of ours."""

import difflib
import json
import signal
import time

import pytest

from support.keys import wait_until
from support.traffic import ping
from wincey.lab.node import own_flanneld


def sh(node, command):
    done = node.exec(["sh", "-c", command])
    assert done.returncode == 0, done.stderr
    return done.stdout


def state(host):
    """All that the daemon made, as text: devices, addresses, routes, neighbors, FDB, rules."""
    links = [
        (link["ifname"], link["mtu"], link.get("address"), "UP" in link["flags"])
        for link in json.loads(sh(host, "ip -j -d link show"))
        if link["ifname"].startswith("flannel")
    ]
    return "\n".join(
        [
            repr(sorted(links)),
            sh(host, "ip -4 -o addr show | grep flannel | sed 's/valid_lft.*//; s/^[0-9]*: //' || true"),
            sh(host, "ip route show | grep -v cni0 | sort"),
            sh(host, "ip neigh show nud permanent | sort"),
            sh(host, "bridge fdb show dev flannel.1 2>/dev/null | grep dst | sort || true"),
            sh(host, "nft list ruleset | grep -v counter || true"),
        ]
    )


BY_HAND = {
    "vxlan": {
        "route": "ip route del $(ip route show dev flannel.1 | grep -m1 onlink | cut -d' ' -f1)",
        "all routes": "ip route flush dev flannel.1",
        "neighbor": "ip neigh flush nud permanent dev flannel.1",
        "FDB entry": "bridge fdb del $(bridge fdb show dev flannel.1 | grep -m1 dst | cut -d' ' -f1) dev flannel.1 self",
        "address": "ip addr flush dev flannel.1 scope global",
        "MTU": "ip link set flannel.1 mtu 1300",
        "MAC": "ip link set flannel.1 address 0e:99:99:99:99:99",
        "down": "ip link set flannel.1 down",
        "device": "ip link del flannel.1",
        "route replaced": "ip route replace $(ip route show dev flannel.1 | grep -m1 onlink | cut -d' ' -f1) dev eth0",
        "wrong neighbor": "ip neigh replace $(ip neigh show dev flannel.1 | cut -d' ' -f1 | head -1)"
        " lladdr 0e:99:99:99:99:99 dev flannel.1 nud permanent",
        "nftables table": "nft delete table ip flannel-ipv4",
        "nftables chain": "nft flush chain ip flannel-ipv4 postrtg",
    },
    "host-gw": {
        "route": "ip route del $(ip route show | grep -m1 'via 10.99' | cut -d' ' -f1)",
        "all rules": "nft flush ruleset",
    },
    "udp": {
        "route": "ip route del 10.5.0.0/16",
        "device": "ip link del flannel0",
        "address": "ip addr flush dev flannel0",
        "MTU": "ip link set flannel0 mtu 1300",
    },
}


@pytest.mark.parametrize("backend", BY_HAND)
def test_what_is_changed_by_hand_comes_back(make_lab, backend):
    lab = make_lab(backend, hosts=3, ip_masq=True)
    assert lab.ping(patience=5).unreachable == []
    host = lab.hosts[0]
    wait_until(lambda: state(host).count("via") >= (0 if backend == "udp" else 2))
    before = state(host)
    for what, command in BY_HAND[backend].items():
        sh(host, command)
        comes_back(host, before, what)
    assert lab.ping(patience=5).unreachable == []
    assert "repaired" in "\n".join(host.log())


def comes_back(host, before, what):
    deadline = time.monotonic() + 5
    while (now := state(host)) != before and time.monotonic() < deadline:
        time.sleep(0.05)
    difference = "\n".join(difflib.unified_diff(before.splitlines(), now.splitlines(), lineterm="", n=0))
    assert not difference, f"{what}:\n{difference}"


def test_foreign_objects_stay(make_lab):
    lab = make_lab("vxlan", hosts=2)
    host = lab.hosts[0]
    foreign = (
        "ip route add 192.168.77.0/24 via 10.99.0.2;"
        "ip route add 10.5.254.0/24 via 10.99.0.2 proto static;"
        "ip neigh add 10.99.0.77 lladdr 0e:00:00:00:00:77 dev eth0 nud permanent;"
        "ip link add vxlan77 type vxlan id 77 dev eth0 dstport 4789;"
        "ip addr add 192.168.78.1/24 dev eth0;"
        "nft add table ip mine; nft add chain ip mine c; nft add rule ip mine c counter"
    )
    sh(host, foreign)
    host.kill_daemon()
    host.start_daemon()
    sh(host, "ip route flush dev flannel.1")
    wait_until(lambda: "onlink" in sh(host, "ip route show dev flannel.1"))
    host.stop_daemon(signal.SIGTERM)
    clean_up(host)
    routes = sh(host, "ip route show")
    assert "192.168.77.0/24 via 10.99.0.2" in routes
    assert "10.5.254.0/24 via 10.99.0.2" in routes
    assert "10.99.0.77" in sh(host, "ip neigh show nud permanent")
    assert "vxlan77" in sh(host, "ip link show")
    assert "192.168.78.1" in sh(host, "ip addr show eth0")
    assert "table ip mine" in sh(host, "nft list ruleset")


def clean_up(host):
    done = host.exec([*own_flanneld(), "--cleanup", f"--subnet-file={host.subnet_file}"])
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("backend", ["vxlan", "host-gw", "udp"])
def test_cleanup_and_only_that_leaves_nothing(make_lab, backend):
    lab = make_lab(backend, hosts=2, ip_masq=True)
    host = lab.hosts[0]
    assert lab.ping(patience=5).unreachable == []
    host.stop_daemon()
    assert ping(lab.containers[0], lab.containers[1].address(4))[0] == 0
    clean_up(host)
    assert "flannel" not in sh(host, "ip link show")
    assert "10.5." not in sh(host, "ip route show | grep -v cni0 || true")
    assert "flannel" not in sh(host, "nft list ruleset")
    assert not host.subnet_file.exists()
    assert not list(host.directory.glob("wincey/**/*.json"))
    clean_up(host)  # once more with nothing there


def test_stale_objects_of_an_earlier_run_go_at_the_start(make_lab):
    """Flannel never reconciles at its start: routes of hosts that left meanwhile stay for ever."""
    lab = make_lab("vxlan", hosts=2)
    assert lab.ping(patience=5).unreachable == []
    host = lab.hosts[0]
    host.kill_daemon()
    # As flannel leaves them: protocol boot, on its device.
    sh(
        host,
        "ip route add 10.5.253.0/24 via 10.5.253.0 dev flannel.1 onlink;"
        "ip neigh add 10.5.253.0 lladdr 0e:00:00:00:00:53 dev flannel.1 nud permanent;"
        "bridge fdb add 0e:00:00:00:00:53 dst 10.99.0.53 dev flannel.1 self permanent;"
        "ip addr add 10.5.253.9/32 dev flannel.1",
    )
    host.start_daemon()
    wait_until(
        lambda: (
            "10.5.253" not in sh(host, "ip route; ip neigh; ip addr")
            and "0e:00:00:00:00:53" not in sh(host, "bridge fdb")
        )
    )


@pytest.mark.parametrize("program", ["iptables-nft", "iptables-legacy"])
def test_iptables_chain_deleted_by_hand_comes_back(make_lab, program):
    config = '{"Network": "10.5.0.0/16", "EnableNFTables": false, "Backend": {"Type": "vxlan"}}'
    lab = make_lab(config=config, hosts=2, ip_masq=True, daemons={"*": with_iptables(program)})
    host = lab.hosts[0]
    before = sh(host, f"{program} -t nat -S; {program} -S")
    assert "FLANNEL-POSTRTG" in before
    assert "FLANNEL-FWD" in before
    for command in (
        f"{program} -t nat -F FLANNEL-POSTRTG",
        f"{program} -D FORWARD -m comment --comment 'flanneld forward' -j FLANNEL-FWD",
        # More than once, as the daemon may be quicker than the next command.
        f"for n in 1 2 3 4 5; do {program} -F FORWARD; {program} -F FLANNEL-FWD; {program} -X FLANNEL-FWD && break; done",
    ):
        sh(host, command)
        wait_until(lambda: sh(host, f"{program} -t nat -S; {program} -S") == before, timeout=5)
    host.stop_daemon()
    clean_up(host)
    assert "FLANNEL" not in sh(host, f"{program} -t nat -S; {program} -S")


def with_iptables(program):
    """Our flanneld where `iptables` is that program: a directory before all others on PATH."""
    links = "; ".join(
        f"ln -sf $(command -v {program.replace('iptables', name)}{end}) $d/{name}{end}"
        for name in ("iptables", "ip6tables")
        for end in ("", "-save", "-restore")
    )
    return f"sh -c 'd=$(mktemp -d); {links}; PATH=$d:$PATH exec {' '.join(own_flanneld())} \"$@\"' sh"
