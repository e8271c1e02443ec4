"""The fast path as containers, daemons and releases come and go: nothing is lost, nothing goes astray, nothing stays behind."""

import json
import time

import msgspec
import pytest

from support.fastpath import DatagramPing, counted, directory, echo, pins, taken
from support.interop import said, sh
from support.keys import wait_until
from wincey.bpf.bpffs import alone
from wincey.bpf.fastpath import Places
from wincey.bpf.objects import Objects
from wincey.bpf.program import read_baked
from wincey.lab.namespace import call_in
from wincey.lab.plan import network_config

LIBERAL = "/proc/sys/net/netfilter/nf_conntrack_tcp_be_liberal"
FAST = ("--fast-path=on",)


@pytest.fixture
def datagrams():
    pings = []

    def start(source, address, interval=0.001):
        pings.append(DatagramPing(source, address, interval))
        return pings[-1]

    yield start
    for each in pings:
        each.close()


def replace_programs(host, number):
    """As another release would: other byte code, the same maps."""
    baked = read_baked("fastpath")
    other = dict(baked.programs)
    if number % 2:
        other["fast_probe_2"] = baked.programs["fast_probe"]
    release = msgspec.structs.replace(baked, programs=other)

    def swap():
        with Objects(directory(host), release) as objects, alone(directory(host)):
            objects.open()
            assert not objects.fresh
            objects.attach(Places(("eth0",), ("c1",)).attachments())
            objects.retire()

    call_in(host.netns, swap)


def test_nothing_is_lost_by_upgrades_restarts_and_crashes(make_lab, datagrams):
    lab = make_lab("vxlan", options=FAST)
    one, two = lab.containers
    with echo(one, two):
        ping = datagrams(one, two.address(4))
        with taken(*lab.hosts, least=5):  # the daemons have put their programs: from here on they are ours to replace
            time.sleep(0.05)
        for number in range(20):
            with taken(*lab.hosts, least=5):
                replace_programs(lab.hosts[number % 2], number // 2 + 1)
                time.sleep(0.05)
        for number in range(5):
            for host in lab.hosts:
                if number % 2:
                    host.kill_daemon()
                else:
                    host.stop_daemon()
            with taken(*lab.hosts, least=5):  # with no daemon there
                time.sleep(0.05)
            for host in lab.hosts:
                host.start_daemon(wait=False)
            for host in lab.hosts:
                host.wait_ready(60)
        sent, lost = ping.end()
    assert sent > 1000
    assert lost == 0, f"{lost} of {sent}"


def test_containers_come_and_go(make_lab, talk):
    """Also while no daemon is there to see it, and with the index of one that went."""
    lab = make_lab("vxlan", hosts=2, containers=2, options=FAST)
    h1, h2 = lab.hosts
    one, other = lab.container("h1c1"), lab.container("h2c1")
    with echo(lab.container("h2c1")):
        with taken(h1, h2):
            running = talk(one, other.address(4))
            running.goes_on(100)
        address = other.address(4)
        index = json.loads(sh(h2, "ip -j link show c1"))[0]["ifindex"]
        h2.kill_daemon()
        sh(h2, "ip link del c1")
        # Another container takes the number of the host's end of the cable at once: nothing of the flow may reach it.
        neighbour = lab.container("h2c2")
        sh(h2, f"ip link del c2; ip link add c3 index {index} type veth peer name eth0 netns {neighbour.netns}")
        sh(h2, "ip link set c3 master cni0 mtu 1450 up")
        sh(neighbour, f"ip addr add {neighbour.address(4)}/24 dev eth0; ip link set eth0 mtu 1450 up")
        sh(neighbour, f"ip route add default via {h2.gateways[0].ip}")
        before = counted(h2)["in"]
        time.sleep(1.1)
        settled = counted(h2)["in"]
        assert settled >= before
        strays = neighbour.popen(
            ["timeout", "2", "tcpdump", "-nli", "eth0", f"dst host {address} and tcp"], stdout=-1, stderr=-3, text=True
        )
        assert running.stands_still()
        output, _ = strays.communicate(timeout=10)
        assert output.strip() == ""
        assert counted(h2)["in"] == settled
        running.close()
        # The daemon comes back and finds the new one.
        h2.start_daemon()
        wait_until(lambda: any("_c3_" in pin for pin in pins(h2)))
        assert not any("_c1_" in pin or "_c2_" in pin for pin in pins(h2))
    with echo(neighbour), taken(h1, h2):
        talk(one, neighbour.address(4)).goes_on(100)
    # Gone while the daemon looks on.
    sh(h2, "ip link del c3")
    wait_until(lambda: not any("_c3_" in pin for pin in pins(h2)))
    assert "repaired" not in said(h2)


def test_detached_by_hand_switched_off_and_cleaned_up(make_lab, talk):
    lab = make_lab("vxlan", options=FAST)
    h1, h2 = lab.hosts
    one, two = lab.containers
    for host in lab.hosts:  # as kube-proxy has it
        sh(
            host,
            "nft 'add table ip strays; add chain ip strays f { type filter hook forward priority -5; };"
            " add rule ip strays f ct state invalid drop'",
        )
    with echo(two):
        # So large that conntrack, which sees a packet a second, soon knows nothing of the windows.
        running = talk(one, two.address(4), size=10000)
        with taken(h1, h2):
            running.goes_on(100)
        # By hand: a program, the table, the sysctl.
        (pin,) = directory(h1).glob("link_c1_ingress_*")
        pin.unlink()
        sh(h1, f"echo 0 >{LIBERAL}; nft delete table ip flannel-fast")
        wait_until(lambda: any("_c1_ingress_" in each for each in pins(h1)))
        wait_until(lambda: "repaired: fast path" in said(h1))
        wait_until(lambda: sh(h1, f"cat {LIBERAL}") == "1\n")
        assert "ct state established" in sh(h1, "nft list table ip flannel-fast")
        running.goes_on(30)
        with taken(h1, h2):
            running.goes_on(100)
        # Another backend: the same switch.
        lab.store.put_config(network_config("host-gw"))
        wait_until(
            lambda: "fast path for established flows without NAT: between containers and eth0\n" in said(h1) + "\n"
        )
        for host in lab.hosts:
            wait_until(lambda host=host: "flannel.1" not in sh(host, "ip link"))
        running.goes_on(30)
        with taken(h1, h2):
            running.goes_on(100)
        # Off, with the flow still running: by a start without the flag ...
        h1.stop_daemon()
        without = [word for word in h1.argv() if word != FAST[0]]
        h1.start_daemon(" ".join(without).replace("--iface=eth0", "--iface={iface}"))
        nothing_is_left(h1)
        running.goes_on(100)
        # ... and by --cleanup.
        h2.stop_daemon()
        assert h2.exec([*h2.argv(), "--cleanup"]).returncode == 0
        nothing_is_left(h2)


def nothing_is_left(host):
    assert not directory(host).exists()
    assert sh(host, f"cat {LIBERAL}") == "0\n"
    assert "flannel-fast" not in sh(host, "nft list tables")
    assert not (host.directory / "wincey" / "subnet" / "fast-path.json").exists()
