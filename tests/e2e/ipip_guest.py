"""ipip on a kernel that has it: one lab whose hosts are changed and put in order again. Run by test_ipip.py."""

import json
import re
import secrets
import signal

import pytest

from support.keys import delete, get, lease_key, wait_until
from support.mtu import mtu_is_right
from support.traffic import ContinuousPing, ping, transfer
from wincey.lab.lab import Lab
from wincey.lab.node import own_flanneld
from wincey.lab.plan import LabSpec, network_config


@pytest.fixture(scope="module")
def lab():
    made = Lab(LabSpec(name=f"ipip-{secrets.token_hex(2)}", config=network_config("ipip"), hosts=3))
    try:
        made.up(timeout=120)
        yield made
    finally:
        made.down()


@pytest.fixture
def pinging(lab, tmp_path):
    """A ping from the first host's container to the second's, under way; each test says how it ended."""
    running = ContinuousPing(*lab.containers[:2], tmp_path)
    yield running
    running.kill()


def none_lost(running):
    sent, lost = running.sent_and_lost()
    assert sent > 50
    assert lost == 0, f"{lost} of {sent} lost"


def sh(host, command):
    done = host.exec(["sh", "-c", command], timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def device(host):
    """The attributes of the device, None while there is none."""
    for link in json.loads(sh(host, "ip -d -j link")):
        if link["ifname"] == "flannel.ipip":
            return link
    return None


def state(host):
    link = device(host)
    if link is None:
        return None
    data = link["linkinfo"].get("info_data", {})
    shown = (link["linkinfo"]["info_kind"], data.get("local"), data.get("remote"), link["mtu"], "UP" in link["flags"])
    addresses = sh(host, "ip -4 -o address show dev flannel.ipip | sed 's/^[0-9]*: //; s/valid_lft.*//'")
    return shown, addresses, sh(host, "ip route show dev flannel.ipip | sort")


def test_every_pair_and_every_byte(lab):
    """The first daemon has the kernel load the module."""
    assert lab.ping(patience=30).unreachable == []
    sent, received = transfer(*lab.containers[:2], megabytes=50)
    assert sent == received


def test_device_address_routes_and_lease_are_as_flannels(lab):
    """Compatibility reference, sections 3.3, 4.2 and 6.4."""
    h1, h2, _ = lab.hosts
    link = device(h1)
    data = link["linkinfo"]["info_data"]
    assert (link["linkinfo"]["info_kind"], link["mtu"], link["operstate"]) == ("ipip", 1480, "UNKNOWN")
    assert (data["local"], data["remote"], data["pmtudisc"]) == ("10.99.0.1", "any", False)
    own = h1.gateways[0].network.network_address
    assert f"inet {own}/32 scope global flannel.ipip" in sh(h1, "ip address show dev flannel.ipip")
    assert re.search(rf"{h2.gateways[0].network} via 10\.99\.0\.2 .*onlink", sh(h1, "ip route show dev flannel.ipip"))
    assert "FLANNEL_MTU=1480\n" in h1.subnet_file.read_text()
    assert json.loads(get(lab, lease_key(h1))) == {"PublicIP": "10.99.0.1", "PublicIPv6": None, "BackendType": "ipip"}


def test_outside_it_is_protocol_4_to_the_peer(lab):
    h1 = lab.hosts[0]
    capture = h1.popen(["timeout", "30", "tcpdump", "-lni", "eth0", "-c", "2", "proto", "4"], stdout=-1, stderr=-1)
    first = capture.stderr.readline() + capture.stderr.readline()
    assert b"listening" in first, first
    assert ping(*[lab.containers[0], lab.containers[1].address(4)])[0] == 0
    seen, _ = capture.communicate(timeout=30)
    source, target = (each.address(4) for each in lab.containers[:2])
    assert f"10.99.0.1 > 10.99.0.2: IP {source} > {target}: ICMP echo request" in seen.decode()


def test_daemons_killed_and_started_lose_nothing(lab, pinging):
    before = [(state(host), device(host)["ifindex"], host.env) for host in lab.hosts[:2]]
    for host in lab.hosts[:2]:
        host.kill_daemon()
        host.start_daemon(timeout=120)
    none_lost(pinging)
    assert [(state(host), device(host)["ifindex"], host.env) for host in lab.hosts[:2]] == before


def test_another_local_address_is_put_right_in_place(lab, pinging):
    """As after a change of the host's address: the device stays, with its index and its routes."""
    h1, before = lab.hosts[0], device(lab.hosts[0])["ifindex"]
    h1.kill_daemon()
    sh(h1, "ip link add ipip9 type ipip local 10.99.0.9")  # of another address: nobody's concern
    sh(h1, "ip link set flannel.ipip type ipip local 10.99.0.77")
    h1.start_daemon(timeout=120)
    assert device(h1)["linkinfo"]["info_data"]["local"] == "10.99.0.1"
    assert device(h1)["ifindex"] == before
    assert ping(*[lab.containers[0], lab.containers[1].address(4)])[0] == 0
    sh(h1, "ip link del ipip9")


BY_HAND = {
    "route": "ip route del $(ip route show dev flannel.ipip | head -1 | cut -d' ' -f1)",
    "all routes": "ip route flush dev flannel.ipip",
    "stale route": "ip route add 10.5.253.0/24 via 10.99.0.53 dev flannel.ipip onlink",
    "route elsewhere": "ip route replace $(ip route show dev flannel.ipip | head -1 | cut -d' ' -f1) dev eth0",
    "address": "ip address flush dev flannel.ipip scope global",
    "MTU": "ip link set flannel.ipip mtu 1300",
    "down": "ip link set flannel.ipip down",
    "local address": "ip link set flannel.ipip type ipip local 10.99.0.77",
    "device": "ip link del flannel.ipip",
    "fixed remote address": "ip link del flannel.ipip;"
    " ip link add flannel.ipip type ipip local 10.99.0.1 remote 10.99.0.2; ip link set flannel.ipip up",
}


@pytest.mark.parametrize("what", BY_HAND)
def test_what_is_changed_by_hand_comes_back(lab, what):
    host = lab.hosts[0]
    before = state(host)
    assert before[2].count("onlink") == 2
    sh(host, BY_HAND[what])
    wait_until(lambda: state(host) == before)


def test_devices_of_others_are_told_and_left(lab):
    """One under our name and of another kind, and one that takes the kernel's only place for such a tunnel."""
    host = lab.hosts[0]
    before = state(host)
    host.stop_daemon(timeout=60)
    sh(host, "ip link del flannel.ipip; ip link add flannel.ipip type bridge")
    host.start_daemon(timeout=120, wait=False)
    wait_until(lambda: "device flannel.ipip is already there and of kind bridge, not ipip" in "\n".join(host.log()))
    assert device(host)["linkinfo"]["info_kind"] == "bridge"
    wait_until(lambda: not host.running)  # the reason is its last word
    assert "flannel.ipip is not there" not in "\n".join(host.log())

    sh(host, "ip link del flannel.ipip; ip link add mine type ipip local 10.99.0.1")
    host.start_daemon(timeout=120, wait=False)
    wait_until(lambda: "device mine is an ipip tunnel from 10.99.0.1 to any address already" in "\n".join(host.log()))
    wait_until(lambda: not host.running)
    sh(host, "ip link del mine")
    host.start_daemon(timeout=120)
    wait_until(lambda: state(host) == before)
    assert lab.ping(patience=30).unreachable == []


def test_direct_routing_goes_around_the_device_and_back(lab, pinging):
    h1 = lab.hosts[0]
    lab.store.put_config(network_config("ipip", DirectRouting=True))
    wait_until(lambda: sh(h1, "ip route show dev eth0").count("via 10.99.0.") == 2)
    wait_until(lambda: all("onlink" not in sh(host, "ip route show dev flannel.ipip") for host in lab.hosts))
    assert device(h1)["mtu"] == 1480
    assert lab.ping(patience=30).unreachable == []
    lab.store.put_config(network_config("ipip"))
    wait_until(lambda: all(sh(host, "ip route show dev flannel.ipip").count("onlink") == 2 for host in lab.hosts))
    none_lost(pinging)


def test_a_change_to_vxlan_and_back_with_one_host_late(lab, pinging):
    late, others = lab.hosts[2], lab.hosts[:2]
    for other, there, gone in (("vxlan", "flannel.1", "flannel.ipip"), ("ipip", "flannel.ipip", "flannel.1")):
        late.stop_daemon(timeout=60)
        lab.store.put_config(network_config(other))
        wait_until(lambda other=other: all(other in get(lab, lease_key(host)) for host in others), 120)
        assert lab.ping(patience=30).unreachable == []
        for host in others:  # the late one is still reached as it wants it
            assert gone in sh(host, f"ip route show {late.gateways[0].network}")
        late.start_daemon(timeout=120)
        wait_until(lambda there=there: all(there in sh(host, "ip -br link") for host in lab.hosts))
        wait_until(lambda gone=gone: all(gone not in sh(host, "ip -br link") for host in lab.hosts), 120)
    none_lost(pinging)
    assert lab.ping(patience=30).unreachable == []


def test_packets_of_the_right_size_pass_and_larger_are_answered(lab):
    mtu_is_right(*lab.containers[:2], 4)


def test_what_a_peer_left_behind_goes_with_it(lab):
    h1, h3 = lab.hosts[0], lab.hosts[2]
    subnet = str(h3.gateways[0].network)
    assert subnet in sh(h1, "ip route")
    h3.stop_daemon(signal.SIGTERM, timeout=60)
    delete(lab, lease_key(h3))
    wait_until(lambda: subnet not in sh(h1, "ip route"))


def test_cleanup_leaves_nothing_of_ours(lab):
    """The kernel's own tunl0, which comes with the module, is not ours."""
    host = lab.hosts[1]
    host.stop_daemon(timeout=60)
    done = host.exec([*own_flanneld(), "--cleanup", f"--subnet-file={host.subnet_file}"], timeout=120)
    assert done.returncode == 0, done.stderr
    assert device(host) is None
    assert "10.5." not in sh(host, "ip route show | grep -v cni0 || true")
    assert "tunl0" in sh(host, "ip -br link")
