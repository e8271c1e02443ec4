"""What `wincey status`, `peers`, `diff` and `leases` say of real daemons, in good times and in bad ones."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest

from support.interop import sh
from support.keys import wait_until

WINCEY = os.path.join(os.path.dirname(sys.executable), "wincey")


def wincey(host, *arguments):
    done = host.exec([WINCEY, *arguments])
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, done.stderr


def as_json(host, *arguments):
    code, out, err = wincey(host, *arguments, "--json")
    assert out, err
    return code, json.loads(out)


@pytest.fixture
def lab(make_lab):
    return make_lab("vxlan", hosts=3)


def test_all_is_well(lab):
    host, peer = lab.hosts[:2]
    wait_until(lambda: len(as_json(host, "peers")[1][0]["peers"]) == 2)
    code, out, _ = wincey(host, "status")
    assert code == 0, out
    for words in (
        "ready  yes",
        "by vxlan, flannel.1, MTU 1450",
        "eth0, 10.99.0.1",
        "23 h 59 min left",
        "peers  2",
        "none failed",
    ):
        assert words in out
    assert len(out.splitlines()) <= 10
    assert str(host.gateways[0].network) in out

    _, report = as_json(host, "status")
    assert report["networks"][0]["lease"]["subnets"] == [str(host.gateways[0].network)]

    code, out, _ = wincey(host, "peers", "-o", "wide")
    assert code == 0
    network = peer.gateways[0].network
    assert re.search(rf"{network} +10\.99\.0\.2 +vxlan +ok +neighbor {network.network_address}", out)
    assert f"route {network} via {network.network_address} dev flannel.1" in out

    code, out, _ = wincey(host, "diff")
    assert (code, out.strip()) == (0, "all 10 objects are as they should be")


def test_what_another_program_did_shows_and_is_repaired(lab):
    host, peer = lab.hosts[:2]
    network = str(peer.gateways[0].network)
    wait_until(lambda: network in sh(host, "ip route"))
    # The daemon sleeps while the route goes, or it would be back before anybody could ask.
    host.daemon.send(signal.SIGSTOP)
    try:
        sh(host, f"ip route del {network}; ip route add 10.5.250.0/24 dev flannel.1")
    finally:
        host.daemon.send(signal.SIGCONT)
    wait_until(lambda: as_json(host, "status")[1]["networks"][0]["reconcile"]["repaired"] >= 2)
    assert as_json(host, "diff")[1] == [{"network": "", "wanted": 10, "missing": [], "changed": [], "surplus": []}]
    assert "2 repaired since the start" in wincey(host, "status")[1]


def test_a_bad_key_and_a_store_that_is_gone(make_lab):
    lab = make_lab("vxlan", store="etcd3", hosts=2)
    host = lab.hosts[0]
    lab.store.run(lambda registry: registry.store.create(f"{lab.spec.prefix}/subnets/nonsense", b"{", None))
    wait_until(lambda: as_json(host, "status")[1]["networks"][0]["bad_keys"])
    code, out, _ = wincey(host, "status")
    assert code == 1
    assert "bad key" in out
    assert "subnets/nonsense" in out
    code, out, _ = wincey(host, "peers")
    assert code == 1
    assert "nonsense" in out

    lab.store.stop()
    wait_until(lambda: as_json(host, "status")[1]["networks"][0]["store"]["trouble"])
    code, out, _ = wincey(host, "status")
    assert code == 1
    assert "ready    yes" in out  # packets flow on
    code, report = as_json(host, "peers")
    assert "the store does not answer" in report[0]["note"]
    assert any(peer["subnets"] == [str(lab.hosts[1].gateways[0].network)] for peer in report[0]["peers"])


def captured(host, expression, address, source, *options):
    """One packet of a ping, as tcpdump on the underlay tells it."""
    dump = host.popen(
        [
            "tcpdump",
            "-i",
            "eth0",
            "-n",
            "-e",
            "-v",
            "-c",
            "1",
            "-Q",
            "out",
            "--immediate-mode",
            "-l",
            *options,
            expression,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while "listening on" not in dump.stderr.readline():
            assert dump.poll() is None
        assert source.exec(["ping", "-n", "-c", "3", "-i", "0.2", "-W", "1", address]).returncode == 0
        return dump.communicate(timeout=20)[0]
    finally:
        dump.kill()
        dump.wait()
        dump.stdout.close()
        dump.stderr.close()


@pytest.mark.parametrize("backend", ["vxlan", "host-gw", "udp", "wireguard", "ipsec", "bgp"])
def test_explain_tells_the_way_that_packets_take(make_lab, backend):
    lab = make_lab(backend, hosts=2)
    host, source, target = lab.hosts[0], lab.containers[0], lab.containers[1]
    address = target.address(4)
    wait_until(lambda: as_json(host, "explain", address)[0] == 0)
    assert lab.ping(patience=30).unreachable == []  # keys may still have to be agreed upon
    _, (report,) = as_json(host, "explain", address)
    steps = {step["what"]: step["text"] for step in report["steps"]}
    assert report["reaches"]
    assert str(lab.hosts[1].gateways[0].network).replace("/", "-") in steps["lease"]
    assert "10.99.0.2" in steps["lease"]
    outer = re.search(r"to the host (\S+): dev (\S+)", steps["underlay"])
    port = re.search(r"(?:from (\S+))?.* port (\d+)", steps.get("wrapped", ""))

    expression = f"udp and dst host {outer[1]} and dst port {port[2]}" if port else f"icmp and dst host {address}"
    packet = captured(host, expression, address, source, *(("-T", "vxlan") if backend == "vxlan" else ()))
    assert outer[2] == "eth0"
    if backend in {"host-gw", "bgp"}:
        assert port is None
        assert f"> {address}: ICMP echo request" in packet
        mac = json.loads(sh(lab.hosts[1], "ip -j link show eth0"))[0]["address"]
        assert f"> {mac}" in packet
        return
    assert re.search(rf"{re.escape(port[1] or '10.99.0.1')}\.\d+ > {re.escape(outer[1])}\.{port[2]}:", packet), packet
    if backend == "vxlan":
        vni = re.search(r"VNI (\d+)", steps["wrapped"])[1]
        mac = re.search(r"lladdr (\S+)", steps["neighbor"])[1]
        assert f"vni {vni}" in packet
        assert f"> {mac}" in packet
        assert mac in steps["fdb"]


def test_explain_finds_where_it_breaks(lab):
    host, target = lab.hosts[0], lab.containers[1]
    address = target.address(4)
    wait_until(lambda: as_json(host, "explain", address)[0] == 0)
    for put, undo, words in (
        (f"ip route add {address}/32 dev lo", f"ip route del {address}/32 dev lo", "kernel: it takes dev lo instead"),
        (
            "ip route add 10.99.0.2/32 dev flannel.1",
            "ip route del 10.99.0.2/32 dev flannel.1",
            "leads back into the network",
        ),
    ):
        sh(host, put)
        code, out, _ = wincey(host, "explain", address)
        assert code == 1
        assert words in out.splitlines()[-1], out
        sh(host, undo)
        wait_until(lambda: as_json(host, "explain", address)[0] == 0)
    code, out, _ = wincey(host, "explain", "10.5.0.7")
    assert code == 1
    assert "nobody has this address" in out
    assert "this host's own" in wincey(host, "explain", lab.containers[0].address(4))[1]
    assert "outside of 10.5.0.0/16" in wincey(host, "explain", "192.0.2.1")[1]
    assert wincey(host, "explain", "nonsense")[0] == 2


def test_no_daemon_is_one_line(lab, tmp_path):
    host = lab.hosts[0]
    host.stop_daemon()
    code, _, err = wincey(host, "status")
    assert code == 1
    assert re.fullmatch(r"wincey: no daemon answers at \S+api.sock \(.*\); see whether flanneld runs\n", err)
    assert wincey(host, "peers", f"--socket={tmp_path}/none")[0] == 1


def test_leases_are_listed_reserved_moved_and_released_without_a_daemon(make_lab):
    lab = make_lab("vxlan", hosts=2)
    host, other = lab.hosts
    store = f"--store={lab.store.url}"
    first, second = (str(each.gateways[0].network) for each in lab.hosts)
    _, listed = as_json(host, "leases", "list", store)
    assert {each["subnets"][0]: each["public"] for each in listed["leases"]} == {
        first: ["10.99.0.1"],
        second: ["10.99.0.2"],
    }
    assert all(86_000 < each["left"] <= 86_400 for each in listed["leases"])

    code, out, _ = wincey(host, "leases", "reserve", store, first)
    assert (code, "reserved for 10.99.0.1" in out) == (0, True)
    wait_until(lambda: as_json(host, "status")[1]["networks"][0]["lease"]["reservation"])
    assert "reserved" in wincey(host, "leases", "list", store)[1]
    assert wincey(host, "leases", "reserve", store, "--undo", first)[0] == 0
    wait_until(lambda: not as_json(host, "status")[1]["networks"][0]["lease"]["reservation"])

    taken = {first, second}
    free = next(f"10.5.{number}.0/24" for number in range(1, 255) if f"10.5.{number}.0/24" not in taken)
    for arguments, words in (
        (("reserve", free), "--for ADDRESS"),
        (("reserve", "10.6.1.0/24", "--for", "192.0.2.9"), "none of the subnets"),
        (("reserve", second, "--for", "192.0.2.9"), "is the lease of 10.99.0.2"),
        (("release", first), "--yes"),
        (("release", free, "--yes"), "there is no lease"),
        (("move", second, first, "--yes"), "overlaps"),
        (("release", "nonsense"), "10.5.3.0/24"),
    ):
        code, _, err = wincey(host, "leases", arguments[0], store, *arguments[1:])
        assert code != 0
        assert words in err

    assert wincey(host, "leases", "move", store, second, free, "--yes")[0] == 0
    wait_until(lambda: str(other.gateways[0].network) == free)
    wait_until(lambda: free in sh(host, "ip route") and second not in sh(host, "ip route"))
    other.stop_daemon()
    assert wincey(host, "leases", "release", store, free, "--yes")[0] == 0
    wait_until(lambda: free not in sh(host, "ip route"))
    code, _, _ = wincey(host, "leases", "reserve", store, free, "--for", "192.0.2.9")
    assert code == 0
    _, listed = as_json(host, "leases", "list", store)
    assert any(each["public"] == ["192.0.2.9"] and each["reservation"] for each in listed["leases"])
