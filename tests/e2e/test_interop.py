"""Hosts with our flanneld and hosts with flannel (its stand-in) in one cluster, in every direction."""

import pytest

from support.interop import said, sh, standin
from support.keys import delete, lease_key, wait_until
from support.traffic import ping, transfer

pytestmark = [pytest.mark.root, pytest.mark.etcd]

KINDS = {"h2", "h3"}  # hosts with the stand-in: one of each kind is there before the others join


@pytest.fixture
def mixed(make_lab):
    """Two hosts of each kind. FORWARD drops what nobody accepts, as Docker has it."""

    def make(backend, store="etcd3", families=(4,), config=None):
        command = standin(store)
        lab = make_lab(
            backend,
            families=families,
            store=store,
            config=config,
            hosts=4,
            start=[],
            ip_masq=True,
            daemons=dict.fromkeys(KINDS, command),
        )
        for host in lab.hosts:
            sh(host, "iptables -P FORWARD DROP; ip6tables -P FORWARD DROP")
        lab.join(lab.hosts[:2])
        lab.join(lab.hosts[2:])
        return lab

    return make


def check(lab, families=(4,)):
    assert lab.ping(patience=10).unreachable == []
    ours, theirs = lab.container("h1c1"), lab.container("h3c1")
    for family in families:
        for source, target in ((ours, theirs), (theirs, ours)):
            sent, received = transfer(source, target, family, megabytes=20)
            assert sent == received
            # The IPv6 device of ours is smaller than flannel's, and than what subnet.env says: 70 bytes, not 50.
            size = source.host.mtu - (28 if family == 4 else 48 + 20 * (lab.hosts[0].mtu == 1450))
            code, output = ping(source, target.address(family), "-M", "do", "-s", str(size))
            assert code == 0, output
    for host in lab.hosts:
        text = said(host)
        if host.name in KINDS:
            assert "WIPED" not in text
        else:
            assert "repaired" not in text, text


@pytest.mark.parametrize("store", ["etcd3", "etcd2"])
@pytest.mark.parametrize("backend", ["vxlan", "host-gw", "udp"])
def test_mixed_cluster(mixed, backend, store):
    check(mixed(backend, store))


@pytest.mark.parametrize("backend", ["vxlan", "host-gw"])
def test_mixed_dual_stack_cluster(mixed, backend):
    """Over IPv6, 20 MB in full-sized packets: flannel takes 20 bytes too few off the MTU of its device."""
    check(mixed(backend, families=(4, 6)), (4, 6))


def test_direct_routing_and_other_keys(mixed):
    """Keys in any case, as Go reads them."""
    config = (
        '{"network": "10.5.0.0/16", "subnetLEN": 26, "SubnetMin": "10.5.4.0", "backend":'
        ' {"type": "VXLAN", "vni": 7, "port": 4789, "directrouting": true}}'
    )
    lab = mixed("vxlan", config=config)
    check(lab)
    assert {gateway.network.prefixlen for host in lab.hosts for gateway in host.gateways} == {26}
    assert "via 10.99.0.3 dev eth0" in sh(lab.hosts[0], "ip route")


def test_hosts_come_and_go(mixed):
    """A host that takes part anew, and one whose lease is removed, as each kind sees the other."""
    lab = mixed("vxlan")
    ours, theirs = lab.hosts[0], lab.hosts[1]
    assert lab.ping(patience=10).unreachable == []
    for gone, left in ((lab.hosts[3], theirs), (lab.hosts[2], ours)):
        subnet, key = gone.gateways[0].network, lease_key(gone)
        gone.stop_daemon()
        delete(lab, key)
        wait_until(lambda left=left, subnet=subnet: str(subnet) not in sh(left, "ip route; ip neigh"))
        gone.subnet_file.unlink()
        gone.join()
        wait_until(lambda left=left, gone=gone: str(gone.gateways[0].network) in sh(left, "ip route"))
    assert lab.ping(patience=10).unreachable == []
