"""The fast path by nftables' flowtable, on a kernel that has it: demanded on one host, for want of programs on the other. Run by test_fou.py."""

import json
import secrets
import shlex
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from support.fastpath import DatagramPing, Talk, echo
from support.interop import said
from support.keys import wait_until
from support.traffic import transfer
from wincey.lab.lab import Lab
from wincey.lab.node import own_flanneld
from wincey.lab.plan import LabSpec, network_config

FLAGS = "--iface={iface} --subnet-file={subnet_file} --store={store} --etcd-prefix={etcd_prefix}"
NO_PROGRAMS = "setpriv --bounding-set=-bpf,-perfmon,-sys_admin"
COUNT = (
    "add table ip seen; add chain ip seen f { type filter hook forward priority 0; };"
    " add rule ip seen f tcp dport 7 counter"
)
STRAYS = (
    "add table ip seen; add chain ip seen f { type filter hook forward priority 0; };"
    " add rule ip seen f ct state invalid counter"
)
DROP = "add table ip test; add chain ip test f { type filter hook forward priority 0; }; add rule ip test f tcp dport 7 drop"


def daemon(flag, before=""):
    return f"{before} {shlex.join(own_flanneld())} {flag} {FLAGS}".strip()


@pytest.fixture(scope="module")
def lab():
    subprocess.run(["modprobe", "-a", "nft_flow_offload", "nf_flow_table_inet", "br_netfilter"], check=True)
    daemons = {"h1": daemon("--fast-path=flowtable"), "h2": daemon("--fast-path=on", NO_PROGRAMS)}
    made = Lab(LabSpec(name=f"flow-{secrets.token_hex(2)}", config=network_config("vxlan"), hosts=2, daemons=daemons))
    try:
        made.up(timeout=200)
        assert made.ping(patience=60).unreachable == []
        yield made
    finally:
        made.down()


@pytest.fixture
def talk(lab, tmp_path):
    """A conversation from the first host's container to the second's, that both hosts have taken to their flowtable."""
    one, two = lab.containers
    with echo(two):
        running = Talk(one, two.address(4), tmp_path, seconds=400)
        try:
            running.goes_on(timeout=60)
            for host in lab.hosts:
                wait_until(lambda host=host: offloaded(host), 60)
            yield running
        finally:
            running.close()


def sh(host, command):
    done = host.exec(["sh", "-c", command], timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def offloaded(host, port=7):
    """The connections to a port that conntrack says are carried by the flowtable."""
    return [
        line
        for line in sh(host, "cat /proc/net/nf_conntrack").splitlines()
        if "[OFFLOAD]" in line and f"dport={port} " in line
    ]


def table(host):
    """The flowtable's table, "" for none."""
    return sh(host, "nft --stateless list table ip flannel-fast 2>/dev/null || true")


def counted(host):
    listed = json.loads(sh(host, "nft -j list table ip seen"))["nftables"]
    return next(
        e["counter"]["packets"] for item in listed if "rule" in item for e in item["rule"]["expr"] if "counter" in e
    )


def test_what_is_told(lab):
    h1, h2 = lab.hosts
    assert "between containers and flannel.1, by nftables' flowtable\n" in said(h1) + "\n"
    assert "by nftables' flowtable, as programs can't be had: this process lacks the capabilities CAP_BPF" in said(h2)
    for host in lab.hosts:
        assert "devices = { c1, flannel.1 }" in table(host)


def test_every_byte_both_ways(lab):
    one, two = lab.containers
    for sender, receiver in ((one, two), (two, one)):
        sent, received = transfer(sender, receiver, megabytes=4)
        assert sent == received


def test_flows_go_past_the_rules(lab, talk):
    """But for the few packets after which a flow is taken again."""
    for host in lab.hosts:
        sh(host, f"nft '{COUNT}'")
        try:
            wait_until(lambda host=host: offloaded(host), 60)
            before = talk.count, counted(host)
            talk.goes_on(400, timeout=120)
            seen, went = counted(host) - before[1], talk.count - before[0]
            assert seen < went / 4, (host.name, seen, went)
        finally:
            sh(host, "nft delete table ip seen")


def test_no_packet_is_taken_for_a_stray(lab):
    """However often flows begin anew on their way: rules often drop what conntrack calls INVALID."""
    (one, two), hosts = lab.containers, lab.hosts
    for host in hosts:
        sh(host, f"nft '{STRAYS}'")
    try:
        with ThreadPoolExecutor(1) as pool:
            transferring = pool.submit(transfer, one, two, megabytes=16)
            renewals = 0
            while not transferring.done():
                for host in hosts:
                    sh(host, "nft 'add table ip other; delete table ip other'")
                renewals += 1
                time.sleep(0.7)
            sent, received = transferring.result()
        assert sent == received
        assert renewals > 2
        assert [counted(host) for host in hosts] == [0, 0]
    finally:
        for host in hosts:
            sh(host, "nft delete table ip seen")


@pytest.mark.parametrize("number", [0, 1], ids=["sender", "receiver"])
def test_a_new_rule_ends_a_running_flow(lab, talk, number):
    host = lab.hosts[number]
    sh(host, f"nft '{DROP}'")
    try:
        wait_until(lambda: talk.stands_still(3), 60)
    finally:
        sh(host, "nft delete table ip test")
    talk.goes_on(timeout=60)


def test_flows_with_nat_stay_on_the_ordinary_path(lab, talk, tmp_path):
    """At the host that translates them; it is a matter of each host."""
    (one, two), (h1, h2) = lab.containers, lab.hosts
    nat = "add table ip svc; add chain ip svc p { type nat hook prerouting priority -100; }"
    sh(h1, f"nft '{nat}; add rule ip svc p ip daddr 10.200.0.1 tcp dport 70 dnat to {two.address(4)}:7'")
    service = Talk(one, "10.200.0.1", tmp_path, port=70, seconds=300)
    try:
        service.goes_on(300, timeout=100)
        known = [line for line in sh(h1, "cat /proc/net/nf_conntrack").splitlines() if "dst=10.200.0.1 " in line]
        assert len(known) == 1
        assert "ESTABLISHED" in known[0]
        port = next(word for word in known[0].split() if word.startswith("sport="))
        assert not [line for line in offloaded(h1) if f" {port} " in line]
        wait_until(lambda: [line for line in offloaded(h2) if f" {port} " in line], 60)
    finally:
        service.close()
        sh(h1, "nft delete table ip svc")


def test_no_packet_is_lost_when_the_daemon_is_killed(lab, talk):
    (one, two), h1 = lab.containers, lab.hosts[0]
    ping = DatagramPing(one, two.address(4), 0.02)
    try:
        wait_until(lambda: [line for line in offloaded(h1) if " udp " in line], 30)
        h1.kill_daemon()
        talk.goes_on(200, timeout=60)
        assert [line for line in offloaded(h1) if " udp " in line]
        h1.start_daemon(timeout=120)
        talk.goes_on(100, timeout=60)
        sent, lost = ping.end()
    finally:
        ping.close()
    assert sent > 200
    assert lost == 0, sent


def established(host):
    known = sh(host, "cat /proc/net/nf_conntrack").splitlines()
    return [line for line in known if " tcp " in line and " dport=7 " in line and " ESTABLISHED " in line]


def test_the_end_of_a_connection_is_seen(lab, talk):
    """By conntrack, which else would keep it for days."""
    talk.close()
    for host in lab.hosts:
        wait_until(lambda host=host: not offloaded(host), 60)
        wait_until(lambda host=host: not established(host), 60)


def test_a_table_that_someone_deletes_comes_back(lab, talk):
    h1 = lab.hosts[0]
    sh(h1, "nft delete table ip flannel-fast")
    wait_until(lambda: "flow add @flows" in table(h1), 120)
    wait_until(lambda: offloaded(h1), 60)
    talk.goes_on(timeout=60)


def test_containers_come_and_go(lab, talk):
    h2, container = lab.hosts[1], lab.containers[1]
    address = container.address(4)
    sh(h2, f"ip link add c2 type veth peer name eth2 netns {container.netns}; ip link set c2 master cni0 up")
    wait_until(lambda: "devices = { c1, c2, flannel.1 }" in table(h2), 60)
    sh(h2, "ip link del c2; ip link del c1")
    wait_until(lambda: "devices = { flannel.1 }" in table(h2), 60)
    wait_until(lambda: not offloaded(h2), 60)
    assert talk.stands_still(3)
    # Another cable to the same container, as a new one would have.
    sh(h2, f"ip link add c3 type veth peer name eth0 netns {container.netns}; ip link set c3 master cni0 mtu 1450 up")
    sh(container, f"ip addr add {address}/24 dev eth0; ip link set eth0 mtu 1450 up")
    sh(container, f"ip route add default via {h2.gateways[0].ip}")
    wait_until(lambda: "devices = { c3, flannel.1 }" in table(h2), 60)
    talk.goes_on(timeout=100)
    wait_until(lambda: offloaded(h2), 60)
    assert "repaired" not in said(h2)


def test_off_and_cleaned_up(lab, talk):
    """With the flow still running, and no rule that lets it in any more."""
    h1, h2 = lab.hosts
    h1.stop_daemon()
    assert "flow add" in table(h1)
    talk.goes_on(timeout=60)
    h1.start_daemon(daemon("--fast-path=off"), timeout=120)
    wait_until(lambda: table(h1) == "", 60)
    h2.stop_daemon()
    done = h2.exec([*own_flanneld(), "--cleanup", f"--subnet-file={h2.subnet_file}"], timeout=120)
    assert done.returncode == 0, done.stderr
    assert table(h2) == ""
    wait_until(lambda: not offloaded(h1) and not offloaded(h2), 60)
    assert subprocess.run(["ls", "/sys/fs/bpf/wincey"], capture_output=True, text=True, check=False).stdout == ""
