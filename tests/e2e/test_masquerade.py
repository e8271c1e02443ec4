"""Who sees which address: containers keep theirs among each other, and take their host's towards the rest of the world."""

import socket

import pytest

from support.flanneld import sh
from wincey.lab.namespace import call_in
from wincey.lab.node import Node
from wincey.lab.plan import STORE

OUTSIDE = "10.99.0.254"


def seen_from(source, target, address):
    """The address that a TCP server on `target` sees when `source` connects to it at `address`."""

    def connect():
        with socket.create_connection((address, 5005), timeout=10):
            connection, peer = server.accept()
            connection.close()
            return peer[0]

    with call_in(target.netns, lambda: socket.create_server(("", 5005))) as server:
        server.settimeout(10)
        return call_in(source.netns, connect)


@pytest.fixture(params=[True, False], ids=["nftables", "iptables"])
def make_masquerading(request, make_lab):
    def make(*options, **spec):
        flavour = "true" if request.param else "false"
        text = f'{{"Network": "10.5.0.0/16", "EnableNFTables": {flavour}, "Backend": {{"Type": "vxlan"}}}}'
        lab = make_lab(config=text, options=options, **spec)
        assert lab.ping(patience=5).unreachable == []
        return lab, Node(lab.spec, STORE)

    return make


def test_masquerade(make_masquerading):
    lab, outside = make_masquerading(ip_masq=True)
    first, second = lab.containers
    assert seen_from(first, outside, OUTSIDE) == "10.99.0.1"
    assert seen_from(second, outside, OUTSIDE) == "10.99.0.2"
    assert seen_from(first, second, second.address(4)) == first.address(4)
    assert seen_from(second, first, first.address(4)) == second.address(4)
    # A host itself speaks from its address in the network, or is masqueraded to one; a container can answer it.
    assert seen_from(lab.hosts[1], first, first.address(4)).startswith("10.5.")
    # From outside a container on this host is met as it is, through its host.
    sh(outside, f"ip route add {lab.hosts[0].gateways[0].network} via 10.99.0.1")
    assert seen_from(outside, first, first.address(4)) == OUTSIDE


def test_excluded_destinations_and_no_masquerade_at_all(make_masquerading):
    for options in (["--ip-masq", "--ip-masq-exclude=10.99.0.0/24,192.0.2.0/24"], []):
        lab, outside = make_masquerading(*options)
        first, second = lab.containers
        sh(outside, "ip route add 10.5.0.0/16 via 10.99.0.1")
        assert seen_from(first, outside, OUTSIDE) == first.address(4)
        assert seen_from(first, second, second.address(4)) == first.address(4)


def test_forward_rules_open_a_closed_chain(make_masquerading):
    """As Docker leaves it: policy DROP. Without --iptables-forward-rules it stays closed."""
    lab, outside = make_masquerading(ip_masq=True)
    first = lab.containers[0]
    for host in lab.hosts:
        sh(host, "iptables -P FORWARD DROP")
    assert lab.ping(patience=5).unreachable == []
    assert seen_from(first, outside, OUTSIDE) == "10.99.0.1"
    closed, _ = make_masquerading("--iptables-forward-rules=false")
    sh(closed.hosts[0], "iptables -P FORWARD DROP")
    assert len(closed.ping().unreachable) == 2
