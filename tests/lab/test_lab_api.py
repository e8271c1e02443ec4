"""The lab as the end-to-end tests and the benchmarks use it, on a real kernel and etcd, with the stand-in daemon."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from wincey.lab import Lab, network_config
from wincey.lab.errors import LabError, NotReady, UnknownName
from wincey.lab.traffic import _tcp, measure

pytestmark = [pytest.mark.root, pytest.mark.etcd]


@pytest.mark.parametrize(("backend", "mtu"), [("vxlan", 1450), ("host-gw", 1500)])
def test_containers_on_all_hosts_reach_each_other(sandbox, backend, mtu):
    with sandbox.lab(backend=backend, hosts=3, containers=2) as lab:
        matrix = lab.ping(patience=10)
        assert len(matrix.results) == 6 * 5
        assert matrix.unreachable == []
        for host in lab.hosts:
            assert host.mtu == mtu
            assert f"mtu {mtu}" in host.containers[0].exec(["ip", "link", "show", "eth0"], check=True).stdout
        one, other = lab.container("h1c1"), lab.container("h3c2")
        # A packet as large as the containers' MTU passes whole; the kernel refuses a larger one at once.
        ping = ["ping", "-M", "do", "-c1", "-W2", other.address(4), "-s"]
        assert one.exec([*ping, str(mtu - 28)]).returncode == 0
        assert "message too long" in one.exec([*ping, str(mtu - 27)]).stderr.lower()
        # Two hosts are routers on the way.
        assert "ttl=62" in one.exec(["ping", "-c1", "-W2", other.address(4)]).stdout
    assert sandbox.leftovers() == []


@pytest.mark.parametrize(("families", "store"), [((4,), "sqlite"), ((4, 6), "etcd2"), ((6,), "etcd3")])
def test_every_family_of_the_network_is_set_up_and_pinged(sandbox, families, store):
    script = Path(__file__).parents[1] / "support" / "static_daemon.sh"
    daemon = f"sh {script} {{subnet_file}} {{host}} 3 {' '.join(map(str, families))}"
    spec = sandbox.spec(hosts=3, store=store, config=network_config("host-gw", families), daemons={"*": daemon})
    with Lab(spec, root=sandbox.root) as lab:
        matrix = lab.ping()
        assert [each.family for each in matrix.results] == [*families] * 6
        assert matrix.unreachable == []
        assert lab.store.run(lambda registry: registry.config()) == spec.config.encode()
        for node in ("h1", "store"):
            shown = lab.node(node).exec(["ip", "-br", "addr", "show", "eth0", "scope", "global"], check=True).stdout
            assert len(shown.split()) == 2 + len(families)
    assert sandbox.leftovers() == []


def test_hosts_have_no_way_out_but_the_stores_machine_is_their_neighbor(sandbox):
    script = Path(__file__).parents[1] / "support" / "static_daemon.sh"
    daemon = f"sh {script} {{subnet_file}} {{host}} 3 4 6"
    spec = sandbox.spec(store="sqlite", config=network_config("host-gw", (4, 6)), daemons={"*": daemon})
    with Lab(spec, root=sandbox.root) as lab:
        host = lab.host("h1")
        for family in ("-4", "-6"):
            assert host.exec(["ip", family, "route", "show", "default"], check=True).stdout == ""
        assert host.exec(["ping", "-c1", "-W2", "10.99.0.254"]).returncode == 0
        assert host.exec(["cat", "/proc/sys/net/ipv4/ip_forward"]).stdout == "1\n"
        assert host.exec(["cat", "/proc/sys/net/ipv6/conf/all/forwarding"]).stdout == "1\n"
        assert host.exec(["ip", "-br", "link", "show", "lo"]).stdout.split()[1] == "UNKNOWN"  # up, as loopback shows it


def test_two_labs_side_by_side_do_not_meet(sandbox):
    with sandbox.lab(name=sandbox.name("a")) as first, sandbox.lab(name=sandbox.name("b")) as second:
        assert first.ping(patience=10).unreachable == []
        assert second.ping(patience=10).unreachable == []
        first.down()
        assert second.ping().unreachable == []
        assert [each for each in sandbox.leftovers() if sandbox.name("a") in each] == []
    assert sandbox.leftovers() == []


def test_daemon_is_stopped_killed_and_started_again_while_traffic_flows(sandbox):
    with sandbox.lab() as lab:
        assert lab.ping(patience=10).unreachable == []
        host = lab.host("h1")
        subnet = host.gateways
        first = host.daemon.pid
        host.kill_daemon()
        assert not host.running
        assert host.daemon.exit_code == -signal.SIGKILL
        assert lab.ping().unreachable == []
        host.start_daemon()
        assert host.daemon.pid != first
        assert host.gateways == subnet
        with pytest.raises(LabError, match="has a daemon already"):
            host.start_daemon()
        host.stop_daemon()
        assert host.daemon.exit_code == 0  # as flannel, and so its stand-in, ends on SIGTERM


def test_store_outage_is_one_and_what_it_held_comes_back(sandbox):
    with sandbox.lab() as lab:
        assert lab.ping(patience=10).unreachable == []
        before = lab.store.run(lambda registry: registry.snapshot())
        assert len(before.leases) == 2
        lab.store.stop()
        assert not lab.store.running
        refused = lab.host("h1").exec(["etcdctl", "--endpoints", lab.store.url, "--command-timeout=1s", "get", "x"])
        assert refused.returncode != 0
        assert lab.ping().unreachable == []
        lab.store.start()
        after = lab.store.run(lambda registry: registry.snapshot())
        assert after.leases.keys() == before.leases.keys()


def test_hosts_join_later(sandbox):
    lab = sandbox.lab(hosts=3)
    lab.up(hosts=["h1"])
    try:
        matrix = lab.ping()
        assert {str(each): each.why for each in matrix.unreachable}["h1c1 -> h2c1 (IPv4)"] == "h2 has no IPv4 subnet"
        lab.join([lab.host("h2"), lab.host("h3")])
        assert lab.ping(patience=10).unreachable == []
    finally:
        lab.down()


def test_a_lab_is_found_again_by_name_and_knows_its_processes(sandbox):
    with sandbox.lab() as lab:
        again = Lab.open(lab.spec.name, root=sandbox.root)
        assert again.spec == lab.spec
        assert again.host("h2").daemon.pid == lab.host("h2").daemon.pid
        assert again.host("h2").running
        assert again.status() == lab.status()
        with pytest.raises(LabError, match="is up already"):
            sandbox.lab().up()
        assert lab.ping(patience=10).unreachable == []
        with pytest.raises(UnknownName, match=f"did you mean {lab.spec.name}"):
            Lab.open(lab.spec.name + "x", root=sandbox.root)
        with pytest.raises(UnknownName, match="did you mean h2c1"):
            lab.container("h2c2")


def test_a_daemon_that_ends_is_named_with_its_last_words_and_nothing_stays(sandbox):
    lab = sandbox.lab(daemons={"*": "sh -c 'sleep 1000; true'", "h2": "sh -c 'echo no luck today; exit 3'"})
    with pytest.raises(NotReady, match=r"(?s)h2: its daemon ended with exit code 3.*no luck today"):
        lab.up()
    assert sandbox.leftovers() == []


def test_a_daemon_that_is_not_ready_in_time_is_named_and_nothing_stays(sandbox):
    lab = sandbox.lab(daemons={"*": "sh -c 'echo waiting; sleep 1000; true'"})
    with pytest.raises(NotReady, match=r"(?s)h1: its daemon wrote no subnet.env within 1 s.*waiting"):
        lab.up(timeout=1)
    assert sandbox.leftovers() == []


def test_a_store_that_does_not_start_is_explained_and_nothing_stays(sandbox, monkeypatch):
    lab = sandbox.lab()
    monkeypatch.setattr(lab.store, "_argv", lambda: ["etcd", "--data-dir=/proc/none"])
    with pytest.raises(NotReady, match=r"(?s)etcd at http://10.99.0.254:2379 ended:.*/proc/none"):
        lab.up()
    assert sandbox.leftovers() == []


def test_what_was_started_by_hand_ends_with_the_lab(sandbox):
    with sandbox.lab(hosts=1) as lab:
        by_hand = lab.container("h1c1").popen(["sh", "-c", "trap '' TERM INT; while :; do sleep 1; done"])
    assert by_hand.wait(timeout=5) == -signal.SIGKILL
    assert sandbox.leftovers() == []


def test_foreign_namespaces_are_left_alone(sandbox):
    foreign = f"{sandbox.name()}-h1"
    subprocess.run(["ip", "netns", "add", foreign], check=True)
    try:
        with pytest.raises(LabError, match=f"{foreign} exists and is not a lab's"):
            sandbox.lab().up()
        assert os.path.exists(f"/run/netns/{foreign}")
    finally:
        subprocess.run(["ip", "netns", "del", foreign], check=True)


def test_throughput_with_and_without_iperf3(sandbox):
    with sandbox.lab(backend="host-gw") as lab:
        assert lab.ping(patience=10).unreachable == []
        one, other = lab.container("h1c1"), lab.container("h2c1")
        sample = measure(one, other, 4, seconds=1)
        assert sample.bits_per_second > 1e6
        assert _tcp(one, other, other.address(4), 0.5) > 1e6
        other.exec(["ip", "link", "set", "eth0", "down"], check=True)
        with pytest.raises(LabError, match="from h1c1 to h2c1"):
            measure(one, other, 4, seconds=1)


def test_segmenting_underlay_cuts_packets_before_the_wire(sandbox):
    with sandbox.lab(segmenting=True, hosts=1) as lab:
        features = lab.host("h1").exec(["ethtool", "-k", "eth0"], check=True).stdout
        for feature in ("tcp-segmentation-offload", "tx-udp_tnl-segmentation", "tx-udp-segmentation"):
            assert f"{feature}: off" in features
        assert "generic-receive-offload: on" in features
