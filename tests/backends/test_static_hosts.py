"""A list of hosts for static routes: read, checked, planned and printed."""

import json

import pytest

from wincey.backends.static import BadHosts, as_ip, as_json, as_networkd, find, find_self, others, plan, read_hosts
from wincey.model.address import Subnet, parse_address
from wincey.model.state import Route

LIST = """\
# the rack in the cellar
192.168.0.1 10.3.1.0/24 web1
192.168.0.2 10.3.2.0/24 web2   # the new one
fd00::2     fd00:3:2::/64 web2

192.168.0.3\t10.3.3.0/24
192.168.0.3 10.3.7.0/24
"""


def net(text):
    return Subnet.parse(text)


def test_a_list():
    hosts = read_hosts(LIST, "hosts")
    assert [(host.name, [str(each.subnet) for each in host.behind]) for host in hosts] == [
        ("web1", ["10.3.1.0/24"]),
        ("web2", ["10.3.2.0/24", "fd00:3:2::/64"]),
        ("192.168.0.3", ["10.3.3.0/24", "10.3.7.0/24"]),
    ]
    assert find(hosts, "fd00::2", "hosts") is hosts[1]
    assert find_self(hosts, [parse_address("127.0.0.1"), parse_address("192.168.0.3")], "hosts") is hosts[2]


def test_a_name_given_once_is_the_names_of_all_lines_of_its_address():
    hosts = read_hosts("10.0.0.1 10.3.1.0/24\n10.0.0.1 10.3.2.0/24 a", "f")
    assert [(host.name, len(host.behind)) for host in hosts] == [("a", 2)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"^f: there is no host in it; write each line as ADDRESS SUBNET"),
        ("# none\n", r"^f: there is no host in it"),
        ("10.0.0.1", r"^f:1: '10\.0\.0\.1' has 1 words; write each line as ADDRESS SUBNET"),
        ("10.0.0.1 10.3.1.0/24 a b", r"^f:1: .* has 4 words"),
        ("\n10.0.0.300 10.3.1.0/24", r"^f:2: '10\.0\.0\.300' is not an IPv4 or IPv6 address"),
        ("10.0.0.1 10.3.1.0", r"^f:1: '10\.3\.1\.0' is not a subnet"),
        ("10.0.0.1 10.3.1.1/24", r"^f:1: 10\.3\.1\.1/24 is no subnet of a host; is it 10\.3\.1\.0/24\?"),
        ("10.0.0.1 0.0.0.0/0", r"^f:1: 0\.0\.0\.0/0 is no subnet of a host"),
        ("10.0.0.1 fd00::/64", r"^f:1: 10\.0\.0\.1 is IPv4 and fd00::/64 is IPv6"),
        ("10.0.0.1 10.3.1.0/24 -x", r"^f:1: a host can't have the name '-x'"),
        ("127.0.0.1 10.3.1.0/24", r"^f:1: 127\.0\.0\.1 is no address that other hosts can route through"),
        ("fe80::1 fd00::/64", r"^f:1: fe80::1 is no address"),
        (
            "10.0.0.1 10.3.1.0/24\n10.0.0.2 10.3.1.0/24",
            r"^f:2: 10\.3\.1\.0/24 is there already, at f:1; each subnet belongs to one host",
        ),
        ("10.0.0.2 10.3.1.0/24\n10.0.0.1 10.3.0.0/16", r"^f:2: 10\.3\.0\.0/16 overlaps 10\.3\.1\.0/24, at f:1"),
        ("10.0.0.1 10.3.1.0/24 a\n10.0.0.1 10.3.2.0/24 b", r"^f:1: 10\.0\.0\.1 is 'b' elsewhere and 'a' here"),
        (
            "10.0.0.1 10.3.1.0/24 a\n10.0.0.2 10.3.2.0/24 a",
            r"^f:2: 'a' has the address 10\.0\.0\.2 here and 10\.0\.0\.1 at f:1",
        ),
        (
            "10.3.2.7 10.3.1.0/24\n10.0.0.2 10.3.2.0/24",
            r"^f:1: the address 10\.3\.2\.7 lies in 10\.3\.2\.0/24, a subnet of the list \(f:2\)",
        ),
    ],
)
def test_faults_are_one_line_with_their_place(text, message):
    with pytest.raises(BadHosts, match=message) as caught:
        read_hosts(text, "f")
    assert "\n" not in str(caught.value)


def test_plan():
    hosts = read_hosts(LIST, "hosts")
    connected = [(net("192.168.0.0/16"), "eth0"), (net("192.168.0.2/31"), "eth1"), (net("fd00::/64"), "eth0")]
    assert plan(others(hosts, hosts[0]), connected) == [
        Route(net("10.3.2.0/24"), "eth1", gateway=parse_address("192.168.0.2")),
        Route(net("fd00:3:2::/64"), "eth0", gateway=parse_address("fd00::2")),
        Route(net("10.3.3.0/24"), "eth1", gateway=parse_address("192.168.0.3")),
        Route(net("10.3.7.0/24"), "eth1", gateway=parse_address("192.168.0.3")),
    ]
    with pytest.raises(BadHosts, match=r"^hosts:4: fd00::2 is on no network of this host"):
        plan(others(hosts, hosts[0]), connected[:2])
    with pytest.raises(BadHosts, match=r"^hosts:3: 10\.3\.2\.0/24 covers 10\.3\.2\.0/25, which this host has on cni0"):
        plan(others(hosts, hosts[0]), [*connected, (net("10.3.2.0/25"), "cni0")])


def test_who_is_this():
    hosts = read_hosts(LIST, "hosts")
    with pytest.raises(BadHosts, match=r"^hosts: no address in it is one of this host's; say which"):
        find_self(hosts, [parse_address("10.0.0.1")], "hosts")
    with pytest.raises(BadHosts, match=r"^hosts: web1, web2 all have addresses of this host"):
        find_self(hosts, [parse_address("192.168.0.1"), parse_address("fd00::2")], "hosts")
    with pytest.raises(BadHosts, match=r"^hosts: there is no host 'web3' in it; there are web1, web2, 192\.168\.0\.3"):
        find(hosts, "web3", "hosts")


def test_printed():
    hosts = read_hosts("10.0.0.1 10.3.1.0/24 a\n10.0.0.2 10.3.2.0/24\nfd00::1 fd00:3::/64 a", "hosts")
    assert as_ip(hosts, hosts) == (
        "# on a (10.0.0.1, fd00::1)\nip route replace 10.3.2.0/24 via 10.0.0.2\n"
        "# on 10.0.0.2\nip route replace 10.3.1.0/24 via 10.0.0.1\nip -6 route replace fd00:3::/64 via fd00::1"
    )
    assert as_networkd(hosts, hosts[:1]).splitlines()[1:] == ["[Route]", "Destination=10.3.2.0/24", "Gateway=10.0.0.2"]
    assert json.loads(as_json(hosts, hosts[:1])) == {
        "hosts": [
            {
                "name": "a",
                "addresses": ["10.0.0.1", "fd00::1"],
                "subnets": ["10.3.1.0/24", "fd00:3::/64"],
                "routes": [{"destination": "10.3.2.0/24", "gateway": "10.0.0.2"}],
            }
        ]
    }


def test_a_long_list_takes_no_time_to_speak_of():
    text = "\n".join(f"192.168.{n >> 8}.{n & 255} 10.{n >> 8}.{n & 255}.0/24" for n in range(1, 5000))
    assert len(read_hosts(text, "hosts")) == 4999
