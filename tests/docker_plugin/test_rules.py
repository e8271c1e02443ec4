"""The rules as text, accepted by nft, and which ports are chosen."""

import socket
import subprocess

import pytest

from support.netns import netns
from wincey.docker.errors import Refused
from wincey.docker.ports import choose
from wincey.docker.rules import Rules, remove, render
from wincey.docker.state import Port
from wincey.model.address import Subnet

CLUSTER = Subnet.parse("10.3.0.0/16")
WEB = Rules("wb-web", Subnet.parse("10.3.200.0/22"), Subnet.parse("10.3.200.64/26"), internal=False, masquerade=True)
BACK = Rules("wb-back", Subnet.parse("10.3.204.0/22"), Subnet.parse("10.3.204.64/26"), internal=True, masquerade=True)
OWN = Rules("wb-own", CLUSTER, Subnet.parse("10.3.1.0/24"), internal=False, masquerade=False)
PUBLISHED = Rules(
    *("wb-pub", Subnet.parse("10.3.208.0/22"), Subnet.parse("10.3.208.0/26"), False, True),
    (("10.3.208.2", Port("tcp", "", 8080, 80)), ("10.3.208.2", Port("udp", "10.99.0.1", 53, 53))),
)


@pytest.mark.root
def test_nft_takes_them_again_and_again_and_removes_them():
    with netns() as place:
        for networks in ([WEB], [WEB, BACK, OWN, PUBLISHED], [], [OWN]):
            script = render(networks, [CLUSTER, Subnet.parse("10.77.0.0/16")], [8472, 8285, 8472])
            subprocess.run(
                ["nsenter", f"--net=/run/netns/{place.name}", "nft", "-f", "-"], input=script, text=True, check=True
            )
            listed = place.run("nft list ruleset")
            for network in networks:
                assert network.bridge in listed
            assert bool(networks) == ("wincey-docker" in listed)


def test_without_networks_there_is_no_table():
    assert render([], [CLUSTER], []) == remove()


def test_a_network_outside_of_all_clusters_is_in_the_set_once():
    text = render([WEB, OWN], [CLUSTER], [8472])
    assert "ip daddr { 10.3.0.0/16 } ip daddr != 10.3.200.0/22" in text


def test_ports_are_chosen_and_conflicts_told():
    web = {"Proto": 6, "Port": 80, "HostPort": 18080, "HostPortEnd": 18080, "HostIP": "", "IP": ""}
    assert choose([web], []) == [Port("tcp", "", 18080, 80)]
    assert choose([web | {"HostIP": "0.0.0.0"}], []) == [Port("tcp", "", 18080, 80)]
    assert choose([web | {"HostIP": "::"}], []) == []
    assert choose([web | {"Proto": 17}], [Port("tcp", "", 18080, 80)]) == [Port("udp", "", 18080, 80)]
    with pytest.raises(Refused, match=r"port 0\.0\.0\.0:18080/tcp is in use"):
        choose([web], [Port("tcp", "127.0.0.1", 18080, 80)])
    with pytest.raises(Refused, match="in use"):
        choose([web, web], [])
    with pytest.raises(Refused, match="protocol 1 can't be published"):
        choose([web | {"Proto": 1}], [])
    with pytest.raises(Refused, match="can't be read"):
        choose([{"Proto": "tcp"}], [])
    [chosen] = choose([web | {"HostPort": 0, "HostPortEnd": 0}], [])
    assert chosen.host_port >= 32768
    ranged = choose([web | {"HostPort": 18080, "HostPortEnd": 18085}], [Port("tcp", "", 18080, 80)])
    assert ranged == [Port("tcp", "", 18081, 80)]


def test_a_port_that_a_program_listens_on_is_not_taken_from_it():
    with socket.socket() as program:
        program.bind(("127.0.0.1", 0))
        program.listen()
        number = program.getsockname()[1]
        with pytest.raises(Refused, match="in use"):
            choose([{"Proto": 6, "Port": 80, "HostPort": number, "HostIP": "127.0.0.1"}], [])
