"""With the fast path on, everything that a user relies on still holds, and flows that may take it do: one lab for all."""

import secrets
import subprocess
import sys
import time

import pytest

from support.fastpath import DatagramPing, counted, echo, not_taken, taken
from support.interop import sh
from support.keys import wait_until
from support.traffic import transfer
from wincey.lab.lab import Lab
from wincey.lab.plan import STORE, LabSpec, network_config

SERVICE = "10.96.0.10"

WHO = """
import socket
with socket.create_server(("", 8)) as server:
    print("listening", flush=True)
    while True:
        connection, peer = server.accept()
        with connection:
            connection.sendall(peer[0].encode())
"""


@pytest.fixture(scope="module")
def lab():
    """As on Kubernetes: bridged packets pass iptables, strays are dropped, containers are masqueraded."""
    spec = LabSpec(
        name=f"e2e-{secrets.token_hex(3)}",
        config=network_config("vxlan"),
        hosts=2,
        containers=2,
        ip_masq=True,
        options=("--fast-path=on", "--api-socket=auto"),
    )
    made = Lab(spec)
    try:
        made.up(timeout=120)
        assert made.ping(patience=10).unreachable == []
        for host in made.hosts:
            sh(
                host,
                "nft 'add table ip strays; add chain ip strays f { type filter hook forward priority -5; };"
                " add rule ip strays f ct state invalid drop'",
            )
        with echo(*made.containers):
            yield made
    finally:
        made.down()


@pytest.fixture
def rules(lab):
    """Tables of rules for one test: `rules(host, "...")`."""
    made = []

    def add(host, text):
        made.append(host)
        sh(host, f"nft '{text}'")

    yield add
    for host in made:
        sh(host, "nft 'add table ip test; delete table ip test'")


def dnat(destination, port, to):
    return (
        "add table ip test; add chain ip test p { type nat hook prerouting priority -100; };"
        f" add rule ip test p ip daddr {destination} tcp dport {port} dnat to {to.address(4)}:7"
    )


def works(conversation, *, more=100):
    conversation.goes_on(more)
    conversation.close()


def test_between_containers(lab, talk):
    one, two = lab.container("h1c1"), lab.container("h2c1")
    with taken(*lab.hosts):
        works(talk(one, two.address(4)))
    with taken(*lab.hosts, least=100):
        ping = DatagramPing(one, two.address(4))
        time.sleep(1.5)
        sent, lost = ping.end()
        assert (sent > 100, lost) == (True, 0)


@pytest.mark.parametrize("way", [(0, 2), (2, 0)])
def test_bulk_and_the_end_of_a_flow(lab, way):
    """Closed at both ends, though conntrack saw next to nothing of it and strays are dropped."""
    source, target = (lab.containers[number] for number in way)
    with taken(*lab.hosts, least=100):
        sent, received = transfer(source, target, megabytes=100)
    assert sent == received


def test_containers_of_one_host_are_the_bridges_business(lab, talk):
    with not_taken(*lab.hosts):
        works(talk(lab.container("h1c1"), lab.container("h1c2").address(4)))


def test_service_on_another_host(lab, rules, talk):
    """The reply comes from the container, and has to be turned back into one of the service."""
    rules(lab.hosts[0], dnat(SERVICE, 80, lab.container("h2c1")))
    with not_taken(lab.hosts[0]):  # to the other host it is a flow between containers, without NAT
        works(talk(lab.container("h1c1"), SERVICE, port=80))


def test_service_and_its_container_at_once(lab, rules, talk):
    rules(lab.hosts[0], dnat(SERVICE, 80, lab.container("h2c1")))
    direct = talk(lab.container("h1c1"), lab.container("h2c1").address(4))
    with taken(*lab.hosts):
        works(talk(lab.container("h1c1"), SERVICE, port=80))
        works(direct)


def test_node_port_through_the_network(lab, rules, talk):
    """At the address that the other host has in the network: its container's reply must pass its NAT."""
    h2 = lab.hosts[1]
    address = str(h2.gateways[0].network.network_address)
    rules(h2, dnat(address, 30080, lab.container("h2c1")))
    with not_taken(h2):
        works(talk(lab.container("h1c1"), address, port=30080))


def test_published_port(lab, rules, talk):
    """From outside, to a container here and to one on another host."""
    h1, outside = lab.hosts[0], lab.node(STORE)
    address = h1.underlay(4)
    rules(h1, dnat(address, 8080, lab.container("h1c1")))
    rules(h1, dnat(address, 8081, lab.container("h2c1")))
    with not_taken(h1):
        works(talk(outside, address, port=8080))
        works(talk(outside, address, port=8081))


def test_masquerade_to_the_outside(lab):
    outside = lab.node(STORE)
    server = outside.popen([sys.executable, "-c", WHO], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout.readline() == "listening\n"
        ask = f"import socket; print(socket.create_connection(('{lab.spec.underlay(STORE, 4).ip}', 8), 5).recv(99).decode())"
        for container in lab.containers:
            said = container.exec([sys.executable, "-c", ask], check=True).stdout.strip()
            assert said == container.host.underlay(4)
    finally:
        server.kill()
        server.wait()
        server.stdout.close()


@pytest.mark.parametrize("number", [0, 1], ids=["sender", "receiver"])
def test_drop_rule(lab, rules, talk, number):
    """New flows end at once, those that run within a second."""
    one, two = lab.container("h1c1"), lab.container("h2c1")
    running = talk(one, two.address(4))
    with taken(*lab.hosts):
        running.goes_on(100)
    rules(
        lab.hosts[number],
        "add table ip test; add chain ip test f { type filter hook forward priority 0; };"
        " add rule ip test f tcp dport 7 drop; add rule ip test f tcp sport 7 drop",
    )
    new = talk(one, two.address(4))
    time.sleep(1.1)
    assert running.stands_still()
    assert new.count == 0
    sh(lab.hosts[number], "nft delete table ip test")
    running.goes_on()
    new.goes_on()


def test_path_with_a_smaller_mtu(lab, talk):
    """The way to the other host takes smaller packets from now on: containers are told, and what they send fits."""
    h1, one, two = lab.hosts[0], lab.container("h1c1"), lab.container("h2c1")
    running = talk(one, two.address(4), size=4000)
    with taken(*lab.hosts):
        running.goes_on(100)
    peer, use_pmtu = lab.hosts[1].underlay(4), "/proc/sys/net/ipv4/ip_forward_use_pmtu"
    sh(h1, f"echo 1 >{use_pmtu}; ip route add {peer}/32 dev eth0 mtu 1300")
    try:
        wait_until(lambda: "mtu 1250" in sh(one, f"ip route get {two.address(4)}"), timeout=10)
        with taken(*lab.hosts):
            running.goes_on(100)
    finally:
        sh(h1, f"echo 0 >{use_pmtu}; ip route del {peer}/32 dev eth0; ip route flush cache")
        sh(one, "ip route flush cache")


def test_what_is_told(lab):
    h1 = lab.hosts[0]
    assert any("fast path for established flows" in line and "vxlan headers" in line for line in h1.log())
    assert sh(h1, "cat /proc/sys/net/netfilter/nf_conntrack_tcp_be_liberal").strip() == "1"
    assert not any("repaired: fast path" in line for line in h1.log())
    assert counted(h1)["wrong-source"] == 0
