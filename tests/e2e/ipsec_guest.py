"""ipsec with ESP in the kernel: two hosts of ours, and a third one that does by hand what flannel does. Run by test_stock_kernel.py."""

import asyncio
import json
import os
import secrets
import signal
import subprocess
import time

import pytest

from support.ipsec import Capture, charon_pid, mark, nothing_plain, swanctl, vici_socket
from support.keys import delete, get, lease_key, put, wait_until
from support.traffic import ContinuousPing, ping, transfer
from wincey.lab.lab import Lab
from wincey.lab.namespace import call_in
from wincey.lab.plan import PREFIX, LabSpec, network_config
from wincey.programs.strongswan import charon
from wincey.programs.strongswan.client import Vici

PSK = secrets.token_hex(48)
FLANNEL_SUBNET = "10.5.77.0/24"


@pytest.fixture(scope="module")
def lab():
    made = Lab(LabSpec(name=f"ipsec-{secrets.token_hex(2)}", config=network_config("ipsec", PSK=PSK), hosts=3))
    try:
        made.up(hosts=["h1", "h2"], timeout=180)
        yield made
    finally:
        made.down()


def sh(host, command):
    done = host.exec(["sh", "-c", command], timeout=180)
    assert done.returncode == 0, done.stderr
    return done.stdout


def reached(source, target):
    wait_until(lambda: ping(source, target.address(4), count=1)[0] == 0, timeout=90)


def test_the_kernel_encrypts(lab, tmp_path):
    h1, h2 = lab.hosts[:2]
    one, two = lab.containers[:2]
    assert "ESP is done by the kernel" in "\n".join(h1.log())
    captured = Capture(lab, tmp_path)
    try:
        reached(one, two)
        assert mark(two, one)[0] == 0
        sent, received = transfer(one, two, megabytes=2)
        assert sent == received
        assert h1.mtu == 1423
        assert ping(one, two.address(4), "-M", "do", "-s", str(1423 - 28))[0] == 0
        code, output = ping(one, two.address(4), "-M", "do", "-s", str(1423 - 27))
        assert code != 0
        assert "mtu=1423" in output
        nothing_plain(captured.stop(), least=500)
    finally:
        captured.kill()
    states = sh(h1, "ip xfrm state")
    assert "rfc4106(gcm(aes))" in states
    assert "reqid 11" in states
    theirs = h2.gateways[0].network
    assert f"{theirs} dev eth0 proto 87" in sh(h1, "ip route")


def test_a_packet_that_charon_no_longer_fits_is_answered_by_the_host(lab):
    """Containers with the host's own MTU learn what the tunnel carries."""
    h1, one, two = lab.hosts[0], *lab.containers[:2]
    ports = json.loads(sh(h1, "ip -j link show master cni0"))
    for device in ("cni0", *(port["ifname"] for port in ports)):
        sh(h1, f"ip link set {device} mtu 1500")
    one.exec(["ip", "link", "set", "eth0", "mtu", "1500"], check=True)
    code, output = ping(one, two.address(4), "-M", "do", "-s", "1472")
    assert code != 0
    assert "Frag needed and DF set (mtu = 14" in output
    h1.attach()


@pytest.fixture
def continuous(lab, tmp_path):
    # 100 a second leave a guest little time for anything else.
    running = ContinuousPing(*lab.containers[:2], tmp_path, interval=0.03)
    yield running
    running.kill()


def none_lost(running):
    sent, lost = running.sent_and_lost()
    assert sent > 50
    assert lost == 0, f"{lost} of {sent} lost"


def test_a_daemon_dies_and_starts_and_packets_flow(lab, continuous):
    h1 = lab.hosts[0]
    before = charon_pid(h1)
    h1.kill_daemon()
    h1.start_daemon(timeout=180)
    assert charon_pid(h1) == before
    none_lost(continuous)


def test_without_charon_packets_flow_and_without_keys_nothing_goes_plain(lab, tmp_path, continuous):
    """The keys are the kernel's, which needs neither daemon nor charon until they expire."""
    h2, one, two = lab.hosts[1], *lab.containers[:2]
    h2.kill_daemon()
    os.kill(killed := charon_pid(h2), signal.SIGKILL)
    wait_until(lambda: not os.path.exists(f"/proc/{killed}/exe"))
    time.sleep(0.5)
    none_lost(continuous)
    sh(h2, "ip xfrm state flush")
    # Somebody's own policy, and one that flannel left for a subnet that is long gone.
    template = "tmpl src 10.99.0.2 dst 10.99.0.9 proto esp mode tunnel"
    sh(h2, f"ip xfrm policy add src 10.5.9.0/24 dst 10.6.0.0/24 dir out {template} reqid 7")
    sh(h2, f"ip xfrm policy add src {h2.gateways[0].network} dst 10.5.9.0/24 dir out {template} reqid 11")
    captured = Capture(lab, tmp_path)
    try:
        assert mark(two, one)[0] != 0
        assert ping(h2, one.address(4), "-I", "10.99.0.2", "-p", "ff", count=1)[0] != 0
        assert mark(one, two)[0] != 0
        h2.start_daemon(timeout=180)
        reached(two, one)
        nothing_plain(captured.stop(), least=2)
    finally:
        captured.kill()
    policies = sh(h2, "ip xfrm policy")
    assert "reqid 7 " in policies
    assert "dst 10.5.9.0/24" not in policies
    # What others delete comes back.
    theirs = lab.hosts[0].gateways[0].network
    sh(h2, f"ip xfrm policy delete src {h2.gateways[0].network} dst {theirs} dir out")
    wait_until(lambda: f"src {h2.gateways[0].network} dst {theirs}" in sh(h2, "ip xfrm policy"))


def test_a_host_that_does_as_flannel_does(lab):
    """Its lease, policies, secrets and connections are those of the compatibility reference, section 6.6."""
    h1, h2, h3 = lab.hosts
    put(lab, f"{PREFIX}/subnets/10.5.77.0-24", '{"PublicIP":"10.99.0.3","PublicIPv6":null,"BackendType":"ipsec"}')
    directory = h3.directory
    directory.mkdir(parents=True)
    h3.subnet_file.write_text("FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=10.5.77.1/24\nFLANNEL_MTU=1423\n")
    h3.attach()
    sh(h3, "ip route add default dev eth0")
    peers = [(host.underlay(4), str(host.gateways[0].network)) for host in (h1, h2)]
    for public, subnet in peers:
        for way, source, destination, outer in (
            ("out", FLANNEL_SUBNET, subnet, ("10.99.0.3", public)),
            ("in", subnet, FLANNEL_SUBNET, (public, "10.99.0.3")),
            ("fwd", subnet, FLANNEL_SUBNET, (public, "10.99.0.3")),
        ):
            template = f"tmpl src {outer[0]} dst {outer[1]} proto esp reqid 11 mode tunnel"
            sh(h3, f"ip xfrm policy add src {source} dst {destination} dir {way} {template}")

    async def as_flannel():
        await charon.start(directory, "kernel")
        vici = await Vici.open(directory / charon.SOCKET, event=lambda name, message: None, ended=lambda: None)
        for public, subnet in (("10.99.0.3", None), *peers):
            await vici.command("load-shared", {"type": "IKE", "data": PSK, "owners": [public]})
            if subnet:
                await vici.command("load-conn", flannels(public, subnet))
        await vici.close()

    call_in(h3.netns, lambda: asyncio.run(as_flannel()))
    one, two, three = lab.containers
    for source, target in ((three, one), (two, three), (one, two)):
        reached(source, target)


def flannels(public, subnet):
    child = {
        "local_ts": [FLANNEL_SUBNET],
        "remote_ts": [subnet],
        "updown": "",
        "esp_proposals": ["aes128gcm16-sha256-prfsha256-ecp256"],
        "start_action": "start",
        "close_action": "trap",
        "dpd_action": "restart",
        "mode": "tunnel",
        "reqid": "11",
        "rekey_time": "1h",
        "policies": "no",
    }
    return {
        f"10.99.0.3-{FLANNEL_SUBNET}-{subnet}-{public}": {
            "local_addrs": ["10.99.0.3"],
            "remote_addrs": [public],
            "proposals": ["aes256-sha256-modp4096"],
            "version": "2",
            "keyingtries": "0",
            "local": {"auth": "psk"},
            "remote": {"auth": "psk"},
            "encap": "no",
            "children": {f"{FLANNEL_SUBNET}-{subnet}": child},
        }
    }


def test_udp_encapsulation(lab):
    """Asked for by the config while all runs: containers that start from now on get a smaller MTU."""
    one, two = lab.containers[:2]
    put(lab, f"{PREFIX}/config", network_config("ipsec", PSK=PSK, UDPEncap=True))
    for host in lab.hosts[:2]:
        wait_until(lambda host=host: host.mtu == 1415 and "TUNNEL-in-UDP" in swanctl(host, "--list-sas"), timeout=90)
    reached(one, two)
    assert "encap type espinudp" in sh(lab.hosts[0], "ip xfrm state")


def test_peers_leave_and_all_is_removed(lab):
    h1, h2, _ = lab.hosts
    theirs = str(h2.gateways[0].network)
    h2.stop_daemon()
    assert get(lab, lease_key(h2))
    delete(lab, lease_key(h2))
    delete(lab, f"{PREFIX}/subnets/10.5.77.0-24")
    for command in ("ip xfrm policy", "ip route"):
        wait_until(lambda command=command: theirs not in sh(h1, command) and FLANNEL_SUBNET not in sh(h1, command))
    wait_until(lambda: "proto esp" not in sh(h1, "ip xfrm state"))
    assert swanctl(h1, "--list-conns") == ""
    # One host leaves the other's tunnels behind and cleans up: keys, policies, routes, charon and its files.
    reachable = sh(h2, "ip xfrm policy")
    assert "reqid 11" in reachable
    done = h2.exec([*h2.argv(), "--cleanup"], timeout=180)
    assert done.returncode == 0, done.stderr
    left = sh(h2, "ip xfrm state; ip xfrm policy; ip route")
    for trace in ("reqid 11", "block", "blackhole", "proto 87"):
        assert trace not in left, left
    assert "reqid 7 " in left
    assert not vici_socket(h2).parent.exists()
    found = subprocess.run(["ip", "netns", "pids", h2.netns], capture_output=True, text=True, check=True)
    assert found.stdout == ""
