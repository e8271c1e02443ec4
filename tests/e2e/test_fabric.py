"""Containers on several hosts reach each other, as through routers: each backend over each store and family."""

import json
import re
import time

import pytest

from support.mtu import mtu_is_right
from support.traffic import ping, transfer

STORES = ["sqlite", pytest.param("etcd3", marks=pytest.mark.etcd), pytest.param("etcd2", marks=pytest.mark.etcd)]


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("backend", ["vxlan", "host-gw", "udp"])
def test_ipv4(make_lab, backend, store):
    lab = make_lab(backend, store=store, hosts=3)
    check(lab, 4)
    first, second = lab.containers[0], lab.containers[1]
    hops_are_as_with_routers(first, second)
    unknown_subnet_is_unreachable(lab, first)


@pytest.mark.parametrize("families", [(6,), (4, 6)], ids=["ipv6", "dual"])
@pytest.mark.parametrize("backend", ["vxlan", "host-gw"])
def test_ipv6_and_dual_stack(make_lab, backend, families):
    lab = make_lab(backend, families=families)
    for family in families:
        check(lab, family)


@pytest.mark.etcd
def test_ipv6_only_over_etcd3(make_lab):
    """With flannel every host adopts the first host's lease."""
    lab = make_lab("vxlan", families=(6,), store="etcd3", hosts=3)
    assert lab.ping(count=1, patience=5).unreachable == []
    assert len({str(host.gateways) for host in lab.hosts}) == 3


def check(lab, family):
    matrix = lab.ping(count=1, patience=5)
    assert matrix.unreachable == []
    first, second = lab.containers[0], lab.containers[1]
    sent, received = transfer(first, second, family)
    assert sent == received
    mtu_is_right(first, second, family)


def hops_are_as_with_routers(source, target):
    """The tunnel is a link, not a hop: two hosts are two hops, each answers when the TTL ends there."""
    code, output = ping(source, target.address(4))
    assert code == 0
    assert "ttl=62" in output
    gateway = str(source.host.gateways[0].ip)
    _, output = ping(source, target.address(4), "-t", "1", count=1)
    assert re.search(rf"From {re.escape(gateway)} .*Time to live exceeded", output), output
    _, output = ping(source, target.address(4), "-t", "2", count=1)
    assert "Time to live exceeded" in output
    assert gateway not in output


def unknown_subnet_is_unreachable(lab, source):
    taken = {int(str(host.gateways[0].ip).split(".")[2]) for host in lab.hosts}
    free = next(number for number in range(1, 255) if number not in taken)
    # The kernel limits such answers to one host by two buckets (ip_error and icmp_send): after the errors of the tests
    # before this one they have to fill up, which they do only in silence.
    for _ in range(5):
        _, output = ping(source, f"10.5.{free}.7", count=1)
        if "Destination Net Unreachable" in output:
            return
        time.sleep(3)
    pytest.fail(output)


def test_vxlan_device_is_as_flannels(make_lab):
    """Attributes, ARP, FDB and route as compatibility reference, section 6.2."""
    lab = make_lab("vxlan")
    assert lab.ping(patience=5).unreachable == []
    h1, h2 = lab.hosts
    [link] = json.loads(h1.exec(["ip", "-d", "-j", "link", "show", "flannel.1"]).stdout)
    data = link["linkinfo"]["info_data"]
    assert (link["mtu"], data["id"], data["port"], data["learning"]) == (1450, 1, 8472, False)
    assert (data["local"], data["link"]) == ("10.99.0.1", "eth0")
    mac = json.loads(h2.exec(["ip", "-j", "link", "show", "flannel.1"]).stdout)[0]["address"]
    base = str(h2.gateways[0].network.network_address)
    assert f"{base} lladdr {mac} PERMANENT" in h1.exec(["ip", "neigh", "show", "dev", "flannel.1"]).stdout
    assert f"{mac} dst 10.99.0.2 self permanent" in h1.exec(["bridge", "fdb", "show", "dev", "flannel.1"]).stdout
    assert re.search(
        rf"{h2.gateways[0].network} via {base} .*onlink", h1.exec(["ip", "route", "show", "dev", "flannel.1"]).stdout
    )
    own = str(h1.gateways[0].network.network_address)
    assert f"inet {own}/32 scope global flannel.1" in h1.exec(["ip", "addr", "show", "flannel.1"]).stdout


def test_subnet_env_is_byte_for_byte_flannels(make_lab):
    lab = make_lab("vxlan", families=(4, 6), ip_masq=True)
    v4, v6 = lab.hosts[0].gateways
    assert lab.hosts[0].subnet_file.read_text() == (
        f"FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET={v4}\nFLANNEL_IPV6_NETWORK=fd00:5::/48\nFLANNEL_IPV6_SUBNET={v6}\n"
        "FLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n"
    )
    assert str(v4.ip) == str(v4.network.network_address + 1)
