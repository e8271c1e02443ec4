"""wireguard with real daemons: by wireguard-go where the kernel has no WireGuard; test_stock_kernel.py runs some by one that has it.

The tests of one lab stand in their order.
"""

import json
import os
import re
import secrets
import shutil
import socket
import struct
import subprocess
import time
from base64 import b64encode
from pathlib import Path

import pytest

from support.keys import delete, get, lease_key, put, wait_until
from support.mtu import mtu_is_right
from support.traffic import ContinuousPing, ping, transfer
from wincey.kernel.wireguard.inkernel import kernel_has_wireguard
from wincey.lab.lab import Lab
from wincey.lab.namespace import call_in
from wincey.lab.node import own_flanneld
from wincey.lab.plan import PREFIX, LabSpec, network_config

PSK = b64encode(bytes(range(100, 132))).decode()
FOREIGN = b64encode(b"f" * 32).decode()
SLOW = 120  # seconds to get ready: a guest is slow
IN_KERNEL = os.geteuid() == 0 and kernel_has_wireguard()


@pytest.fixture(autouse=True)
def _needs():
    if not shutil.which("wg") or not (IN_KERNEL or shutil.which("wireguard-go")):
        pytest.skip("needs wireguard-go and wg (packages wireguard-go, wireguard-tools)")


@pytest.fixture(scope="module")
def lab():
    if os.geteuid() != 0:
        pytest.skip("needs root: network namespaces")
    config = network_config("wireguard", PSK=PSK)
    made = Lab(LabSpec(name=f"wg-{secrets.token_hex(3)}", config=config, hosts=2 if IN_KERNEL else 3))
    try:
        made.up(timeout=SLOW)
        yield made
    finally:
        made.down()


@pytest.fixture
def pinging(tmp_path):
    pings = []

    def start(source, target, family=4):
        # 100 a second leave a guest no time for anything else.
        pings.append(ContinuousPing(source, target, tmp_path, family, interval=0.1 if IN_KERNEL else 0.01))
        return pings[-1]

    yield start
    for each in pings:
        each.kill()


def wg(host, command):
    """Run a shell command of `wg` on a host of a lab, where wireguard-go's socket is the host's own."""
    if not IN_KERNEL:
        command = f"mount --bind {host.directory}/wireguard /var/run/wireguard && {command}"
    return host.exec(["unshare", "--mount", "sh", "-euc", command], check=True).stdout


def show(host, what, device="flannel-wg"):
    """`wg show DEVICE WHAT` by the first word of each line."""
    lines = [line.split() for line in wg(host, f"wg show {device} {what}").splitlines()]
    return {line[0]: line[1:] for line in lines}


def public_key(lab, host):
    return json.loads(get(lab, lease_key(host)))["BackendData"]["PublicKey"]


def index(host):
    return json.loads(host.exec(["ip", "-j", "link", "show", "flannel-wg"]).stdout)[0]["ifindex"]


def all_logs(lab):
    return "\n".join(line for host in lab.hosts for line in host.log())


def test_every_pair_and_every_byte(lab):
    assert lab.ping(patience=SLOW).unreachable == []
    sent, received = transfer(*lab.containers[:2], megabytes=5 if IN_KERNEL else 100)
    assert sent == received


def test_device_route_and_lease_are_as_flannels(lab):
    """Compatibility reference, sections 3.3, 4.2 and 6.5."""
    h1, *others = lab.hosts
    own = h1.gateways[0].network.network_address
    assert f"inet {own}/32 scope global flannel-wg" in h1.exec(["ip", "addr", "show", "flannel-wg"]).stdout
    [link] = json.loads(h1.exec(["ip", "-d", "-j", "link", "show", "flannel-wg"]).stdout)
    assert (link["mtu"], link["linkinfo"]["info_kind"]) == (1420, "wireguard" if IN_KERNEL else "tun")
    assert re.search(r"^10\.5\.0\.0/16 .*scope link", h1.exec(["ip", "route", "show", "dev", "flannel-wg"]).stdout)
    assert "FLANNEL_MTU=1420\n" in h1.subnet_file.read_text()
    value = json.loads(get(lab, lease_key(h1)))
    key = (h1.directory / "wgkey").read_text()
    public = subprocess.run(["wg", "pubkey"], input=key, capture_output=True, text=True, check=True).stdout.strip()
    assert value == {
        "PublicIP": "10.99.0.1",
        "PublicIPv6": None,
        "BackendType": "wireguard",
        "BackendData": {"PublicKey": public, "Port": 51820},
    }
    assert (h1.directory / "wgkey").stat().st_mode & 0o777 == 0o400
    peers = {public_key(lab, host): [str(host.gateways[0].network)] for host in others}
    assert show(h1, "allowed-ips") == peers
    assert show(h1, "preshared-keys") == {key: [PSK] for key in peers}
    assert show(h1, "persistent-keepalive") == {key: ["off"] for key in peers}
    assert show(h1, "endpoints") == {public_key(lab, h): [f"{h.underlay(4)}:51820"] for h in others}


def test_between_hosts_nothing_is_plain(lab, tmp_path):
    first, second = lab.containers[:2]
    outside, inside = tmp_path / "outside.pcap", tmp_path / "inside.pcap"
    captures = [
        first.host.popen(["tcpdump", "-Uni", device, "-s0", "-w", str(path)], stderr=subprocess.PIPE)
        for device, path in (("eth0", outside), ("cni0", inside))
    ]
    try:
        for capture in captures:
            assert b"listening" in capture.stderr.readline()
        word = b"wincey in the clear"[:16]
        code, output = ping(first, second.address(4), "-s", "1000", "-p", word.hex(), count=5)
        assert code == 0, output
        wait_until(lambda: inside.read_bytes().count(word) > 100)
        wait_until(lambda: outside.stat().st_size > 5 * 2 * 1000)
    finally:
        for capture in captures:
            capture.terminate()
            capture.communicate(timeout=30)
    seen = outside.read_bytes()
    assert word[:4] not in seen
    addresses = [bytes(map(int, each.address(4).split("."))) for each in (first, second)]
    assert b"".join(addresses) in inside.read_bytes()
    assert b"".join(addresses) not in seen
    text = subprocess.run(["tcpdump", "-nr", str(outside)], capture_output=True, text=True, check=True).stdout
    assert all("10.99.0.1.51820" in line or "ARP" in line or "IP6" in line for line in text.splitlines()), text


def test_packets_of_the_right_size_pass_and_larger_are_answered(lab):
    mtu_is_right(lab.containers[0], lab.containers[-1], 4)


def test_daemons_killed_and_started_lose_nothing(lab, pinging):
    h1, h2 = lab.hosts[:2]
    pings = pinging(lab.containers[0], lab.containers[1]), pinging(lab.containers[1], lab.containers[0])
    before = [(index(host), show(host, "latest-handshakes").keys(), host.env) for host in (h1, h2)]
    for host in (h1,) if IN_KERNEL else (h1, h2):
        host.kill_daemon()
        host.start_daemon(timeout=SLOW)
        if not IN_KERNEL:
            host.stop_daemon(timeout=60)
            host.start_daemon(timeout=SLOW)
    for each in pings:
        sent, lost = each.sent_and_lost()
        assert sent > 20
        assert lost == 0, f"{lost} of {sent} lost"
    assert [(index(host), show(host, "latest-handshakes").keys(), host.env) for host in (h1, h2)] == before


def test_a_new_key_interrupts_for_a_moment(lab, pinging):
    """From when a peer knows the new key until the restarted daemon uses it: some hundredths of a second on an idle machine."""
    h1, h2 = lab.hosts[:2]
    old, before = public_key(lab, h2), index(h2)
    pings = pinging(lab.containers[0], lab.containers[1]), pinging(lab.containers[1], lab.containers[0])
    h2.stop_daemon(timeout=60)
    (h2.directory / "wgkey").unlink()
    h2.start_daemon(timeout=SLOW)
    wait_until(lambda: public_key(lab, h2) in show(h1, "peers"))
    assert old not in show(h1, "peers")
    assert old != public_key(lab, h2)
    time.sleep(1)
    losses = [each.sent_and_lost() for each in pings]
    assert all(lost < 100 < sent for sent, lost in losses), losses
    assert index(h2) == before
    assert lab.ping(patience=SLOW).unreachable == []


def test_what_is_changed_by_hand_comes_back(lab):
    h1, h2 = lab.hosts[:2]
    before = show(h1, "allowed-ips")
    wg(h1, f"wg set flannel-wg peer {public_key(lab, h2)} remove")
    wg(h1, f"wg set flannel-wg peer {FOREIGN} allowed-ips 10.5.254.0/24")
    h1.exec(["ip", "route", "flush", "dev", "flannel-wg"], check=True)  # is told, and everything is looked at then
    wait_until(lambda: show(h1, "allowed-ips") == before)
    gone = index(h1)
    h1.exec(["ip", "link", "delete", "flannel-wg"], check=True)
    wait_until(lambda: "flannel-wg" in h1.exec(["ip", "route"]).stdout)
    wait_until(lambda: show(h1, "allowed-ips") == before)
    assert index(h1) != gone
    assert lab.ping(patience=SLOW).unreachable == []


def test_secrets_stay_secret(lab):
    """Not in logs, not in files that others read, not on command lines, not in the lease."""
    private = [(host.directory / "wgkey").read_text() for host in lab.hosts]
    shown = [all_logs(lab)]
    for host in lab.hosts:
        shown.append(get(lab, lease_key(host)))
        files = [path for path in host.directory.rglob("*") if path.is_file() and path.name != "wgkey"]
        shown += [path.read_text(errors="replace") for path in files]
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            shown.append(path.read_text(errors="replace"))
        except OSError:
            continue
    for secret in (PSK, *private):
        assert not any(secret in text for text in shown)


def test_what_a_peer_left_behind_goes_with_it(lab):
    h1, last = lab.hosts[0], lab.hosts[-1]
    key = public_key(lab, last)
    assert key in show(h1, "peers")
    last.stop_daemon(timeout=60)
    delete(lab, lease_key(last))
    wait_until(lambda: key not in show(h1, "peers"))
    assert "flannel-wg" in last.exec(["ip", "link"]).stdout, "the device outlives its daemon"


def test_cleanup_leaves_nothing_of_ours(lab):
    host = lab.hosts[-1]
    argv = ["env", *(f"{name}={value}" for name, value in host.variables.items()), *own_flanneld()]
    done = host.exec([*argv, "--cleanup", f"--subnet-file={host.subnet_file}"], timeout=120)
    assert done.returncode == 0, done.stderr
    assert "flannel-wg" not in host.exec(["ip", "link"]).stdout
    if not IN_KERNEL:
        assert list((host.directory / "wireguard").iterdir()) == []
    assert (host.directory / "wgkey").exists(), "the key says who this host is"


def test_a_peer_made_by_hand_with_wg(lab):
    """On the host that nothing of ours is on any more, from the lease that a daemon wrote, and with one as flannel writes it."""
    h1, last = lab.hosts[0], lab.hosts[-1]
    value, key_file, psk_file = json.loads(get(lab, lease_key(h1))), last.directory / "key", last.directory / "psk"
    subnet = h1.gateways[0].network
    psk_file.write_text(PSK)
    script = f"""umask 077; wg genkey > {key_file}
      {"ip link add wg0 type wireguard" if IN_KERNEL else "wireguard-go wg0"}
      wg set wg0 private-key {key_file} listen-port 4444 peer {value["BackendData"]["PublicKey"]} preshared-key {psk_file} \
        endpoint {value["PublicIP"]}:{value["BackendData"]["Port"]} allowed-ips {subnet}
      ip address add 10.5.200.1/32 dev wg0; ip link set wg0 mtu 1420 up; ip route add {subnet} dev wg0 src 10.5.200.1
      wg pubkey < {key_file}"""
    public = wg(last, script).strip()
    lease = {"PublicIP": last.underlay(4), "PublicIPv6": None, "BackendType": "wireguard"}
    lease["BackendData"] = {"PublicKey": public, "Port": 4444}
    put(lab, f"{PREFIX}/subnets/10.5.200.0-24", json.dumps(lease))
    wait_until(lambda: ping(lab.containers[0], "10.5.200.1", count=1)[0] == 0)
    assert show(h1, "allowed-ips")[public] == ["10.5.200.0/24"]
    assert show(h1, "endpoints")[public] == [f"{last.underlay(4)}:4444"]
    wait_until(lambda: ping(last, lab.containers[0].address(4))[0] == 0)


@pytest.mark.parametrize(("families", "mode"), [((6,), "auto"), ((4, 6), "separate"), ((4, 6), "ipv6")])
def test_modes(make_lab, families, mode):
    lab = make_lab("wireguard", config=network_config("wireguard", families, Mode=mode), families=families)
    assert lab.ping(patience=SLOW).unreachable == []
    outer = {"flannel-wg": "10.99.0.2:51820", "flannel-wg-v6": "[fd00:99::2]:51821"}
    if mode != "separate":
        outer = {"flannel-wg": "[fd00:99::2]:51820"}
    links = json.loads(lab.hosts[0].exec(["ip", "-j", "link"]).stdout)
    assert {link["ifname"] for link in links} & {"flannel-wg", "flannel-wg-v6"} == outer.keys()
    for device, endpoint in outer.items():
        assert list(show(lab.hosts[0], "endpoints", device).values()) == [[endpoint]]
    for family in families:
        mtu_is_right(*lab.containers, family)


def test_a_peer_behind_nat(make_lab, pinging):
    """h3 translates for h2, and lets nothing in that was not asked for: h2 keeps its way open by itself.

    Its lease names h3's address with a port where nobody answers; h1 learns the right one, keeps it over a restart, and
    follows when the translation changes.
    """
    lab = make_lab("wireguard", hosts=3, start=["h1"], containers=1)
    h1, h2, nat = lab.hosts
    script = """ip address add 192.168.77.1/24 dev eth0
      nft 'table ip t { chain post { type nat hook postrouting priority 100; ip saddr 192.168.77.0/24 udp sport 51820 masquerade to :20000-20999; };
                        chain in { type filter hook input priority 0; udp dport 51820 drop; }; }'"""
    nat.exec(["sh", "-euc", script], check=True)
    # Its neighbor is the translator alone, not the other hosts on the same wire.
    h2.exec(
        [
            "sh",
            "-euc",
            "ip address flush dev eth0; ip address add 192.168.77.2/24 dev eth0; ip route add default via 192.168.77.1",
        ],
        check=True,
    )
    h2.start_daemon(" ".join([*own_flanneld(), "--public-ip=10.99.0.3"]), timeout=SLOW)
    h2.attach()
    # Only the one outside sends: what it sends to has to be open already.
    wait_until(lambda: next(iter(show(h1, "endpoints").values()))[0].startswith("10.99.0.3:20"))
    assert list(show(h2, "persistent-keepalive").values()) == [["25"]]
    first, second = (each.containers[0] for each in (h1, h2))
    assert lab.host("h1").env.subnets
    wait_until(lambda: ping(first, second.address(4), count=1)[0] == 0)
    assert json.loads(get(lab, lease_key(h2)))["PublicIP"] == "10.99.0.3"
    learned = show(h1, "endpoints")

    running = pinging(first, second)
    h1.kill_daemon()
    h1.start_daemon(timeout=SLOW)
    sent, lost = running.sent_and_lost()
    assert (lost, sent > 20) == (0, True)
    assert show(h1, "endpoints") == learned

    # Another translation, as after the translator's restart. Whoever is inside sends first.
    script = """nft flush chain ip t post
      nft add rule ip t post ip saddr 192.168.77.0/24 udp sport 51820 masquerade to :30000-30999"""
    nat.exec(["sh", "-euc", script], check=True)
    forget(nat)
    wait_until(lambda: ping(second, first.address(4), count=1)[0] == 0)
    wait_until(lambda: next(iter(show(h1, "endpoints").values()))[0].startswith("10.99.0.3:30"))
    assert ping(first, second.address(4), count=1)[0] == 0


def forget(host):
    """Drop the translations that a host has under way: ctnetlink's delete with no filter (conntrack -F)."""

    def flush():
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12) as netlink:  # NETLINK_NETFILTER
            netlink.send(struct.pack("=IHHII", 20, 1 << 8 | 2, 1 | 4, 1, 0) + bytes(4))
            code = struct.unpack_from("=i", netlink.recv(4096), 16)[0]
            assert code == 0, os.strerror(-code)

    call_in(host.netns, flush)
