"""ipip on a kernel that has it: one lab whose hosts are changed and put in order again. Run by test_stock_kernel.py."""

import json
import re
import secrets

import pytest

from support.keys import delete, get, lease_key, wait_until
from support.mtu import mtu_is_right
from support.traffic import ContinuousPing, ping, transfer
from wincey.lab.lab import Lab
from wincey.lab.node import own_flanneld
from wincey.lab.plan import LabSpec, network_config


@pytest.fixture(scope="module")
def lab():
    made = Lab(LabSpec(name=f"ipip-{secrets.token_hex(2)}", config=network_config("ipip"), hosts=2))
    try:
        made.up(timeout=120)
        yield made
    finally:
        made.down()


@pytest.fixture
def pinging(lab, tmp_path):
    """A ping from the first host's container to the second's, under way; each test says how it ended."""
    # 100 a second leave a guest little time for anything else.
    running = ContinuousPing(*lab.containers[:2], tmp_path, interval=0.03)
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
    sent, received = transfer(*lab.containers[:2], megabytes=10)
    assert sent == received


def test_device_address_routes_and_lease_are_as_flannels(lab):
    """Compatibility reference, sections 3.3, 4.2 and 6.4."""
    h1, h2 = lab.hosts
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


def test_a_daemon_killed_and_started_loses_nothing(lab, pinging):
    host = lab.hosts[0]
    before = state(host), device(host)["ifindex"], host.env
    host.kill_daemon()
    host.start_daemon(timeout=120)
    none_lost(pinging)
    assert (state(host), device(host)["ifindex"], host.env) == before


BY_HAND = {
    "route": "ip route del $(ip route show dev flannel.ipip | head -1 | cut -d' ' -f1)",
    "stale route": "ip route add 10.5.253.0/24 via 10.99.0.53 dev flannel.ipip onlink",
    "route elsewhere": "ip route replace $(ip route show dev flannel.ipip | head -1 | cut -d' ' -f1) dev eth0",
    "down": "ip link set flannel.ipip down",
    "local address": "ip link set flannel.ipip type ipip local 10.99.0.77",
    "device": "ip link del flannel.ipip",
}


@pytest.mark.parametrize("what", BY_HAND)
def test_what_is_changed_by_hand_comes_back(lab, what):
    host = lab.hosts[0]
    before = state(host)
    assert before[2].count("onlink") == 1
    sh(host, BY_HAND[what])
    wait_until(lambda: state(host) == before)


def test_direct_routing_goes_around_the_device_and_back(lab, pinging):
    h1 = lab.hosts[0]
    lab.store.put_config(network_config("ipip", DirectRouting=True))
    wait_until(lambda: sh(h1, "ip route show dev eth0").count("via 10.99.0.") == 1)
    wait_until(lambda: all("onlink" not in sh(host, "ip route show dev flannel.ipip") for host in lab.hosts))
    assert device(h1)["mtu"] == 1480
    assert lab.ping(patience=30).unreachable == []
    lab.store.put_config(network_config("ipip"))
    wait_until(lambda: all(sh(host, "ip route show dev flannel.ipip").count("onlink") == 1 for host in lab.hosts))
    none_lost(pinging)


def test_packets_of_the_right_size_pass_and_larger_are_answered(lab):
    mtu_is_right(*lab.containers[:2], 4)
    lab.hosts[0].attach()


def test_one_host_changes_to_vxlan_and_the_late_one_stays_reachable_until_it_leaves(lab, pinging):
    """What is there for the sake of one peer goes with it: its route and, here, the device."""
    changed, late = lab.hosts
    subnet, key = str(late.gateways[0].network), lease_key(late)
    late.kill_daemon()
    lab.store.put_config(network_config("vxlan"))
    wait_until(lambda: "vxlan" in get(lab, lease_key(changed)), 120)
    assert lab.ping(patience=30).unreachable == []
    assert "dev flannel.ipip" in sh(changed, f"ip route show {subnet}")
    none_lost(pinging)
    delete(lab, key)
    wait_until(lambda: device(changed) is None and subnet not in sh(changed, "ip route"), 120)


def test_cleanup_leaves_nothing_of_ours(lab):
    """The kernel's own tunl0, which comes with the module, is not ours."""
    late = lab.hosts[1]
    assert device(late)
    done = late.exec([*own_flanneld(), "--cleanup", f"--subnet-file={late.subnet_file}"], timeout=120)
    assert done.returncode == 0, done.stderr
    assert device(late) is None
    assert "10.5." not in sh(late, "ip route show | grep -v cni0 || true")
    assert "tunl0" in sh(late, "ip -br link")
