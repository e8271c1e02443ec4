"""--probe between real hosts: what is well, and four ways of being unwell."""

import os
import sys

import pytest

from support.interop import sh
from support.keys import wait_until

WINCEY = os.path.join(os.path.dirname(sys.executable), "wincey")
OPTIONS = ("--probe", "--probe-interval=1")


def peers(host, *options):
    done = host.exec([WINCEY, "peers", *options])
    assert "Traceback" not in done.stderr
    return done.stdout


def drop(host, rule):
    sh(
        host,
        f"nft 'add table ip f; add chain ip f i {{ type filter hook input priority -300; }}; add rule ip f i {rule} drop'",
    )


@pytest.mark.parametrize("backend", ["vxlan", "host-gw", "udp"])
def test_peers_that_are_well(make_lab, backend):
    lab = make_lab(backend, hosts=3, options=OPTIONS)
    host = lab.hosts[0]
    mtu = {"vxlan": 1450, "host-gw": 1500, "udp": 1472}[backend]
    wait_until(lambda: peers(host).count(f" {mtu} ") == 2)
    out = peers(host)
    assert out.count(" ms ") == 2
    assert out.count("ok") == 2
    status = host.exec([WINCEY, "status"])
    assert "2; of 2 asked, all answer well, round trip" in status.stdout
    assert status.returncode == 0


def test_a_firewall_is_told_from_a_host_that_is_down(make_lab):
    lab = make_lab("vxlan", hosts=3, options=OPTIONS)
    host, walled, down = lab.hosts
    wait_until(lambda: peers(host).count("ok") == 2)
    drop(walled, "udp dport 8472")
    sh(down, "ip link set eth0 down")
    wait_until(lambda: "not through the network: is a firewall between? (packets go in VXLAN, VNI 1" in peers(host))
    wait_until(lambda: "it does not answer" in peers(host))
    assert host.exec([WINCEY, "status"]).returncode == 1
    sh(walled, "nft delete table ip f")
    sh(down, "ip link set eth0 up")
    wait_until(lambda: peers(host).count("ok") == 2)


def test_a_path_with_a_smaller_mtu_is_named(make_lab):
    lab = make_lab("vxlan", hosts=2, start=[], options=OPTIONS)
    sh(lab.node("switch"), "ip link set h2 mtu 1400")  # what is larger vanishes there, and nobody says so
    for host in lab.hosts:
        host.join()
    # A veth takes 4 bytes more than its MTU, for a VLAN tag.
    words = "packets larger than 1354 bytes don't get there, and containers may send 1450"
    wait_until(lambda: all(words in peers(host) for host in lab.hosts))
