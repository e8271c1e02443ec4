"""What a lab consists of, without making one."""

import ipaddress
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wincey.lab import plan
from wincey.lab.errors import UnknownName
from wincey.lab.ping import Matrix, PairResult
from wincey.lab.plan import STORE, LabSpec, network_config
from wincey.lab.process import clean_environment
from wincey.model.config import NetworkConfig
from wincey.model.errors import UsageError

VXLAN = network_config("vxlan")
FACTS = {
    "iface": "eth0",
    "subnet_file": "/x/subnet.env",
    "store": "sqlite:/x/s",
    "etcd_endpoints": "http://10.99.0.254:2379",
}


def spec(**more):
    return LabSpec(**({"name": "t", "config": VXLAN} | more))


@pytest.mark.parametrize("families", [(4,), (6,), (4, 6)])
@pytest.mark.parametrize("backend", ["vxlan", "host-gw", "udp", "alloc"])
def test_network_config_is_valid_and_turns_on_its_families(backend, families):
    text = network_config(backend, families)
    config = NetworkConfig.parse(text)
    assert config.backend_type == backend
    assert (config.enable_ipv4, config.enable_ipv6) == (4 in families, 6 in families)
    assert plan.families(text) == families


def test_backend_options_reach_the_config():
    assert json.loads(network_config("vxlan", VNI=7))["Backend"] == {"Type": "vxlan", "VNI": 7}


@pytest.mark.parametrize(
    ("config", "families"),
    [
        ('{"network": "10.1.0.0/16"}', (4,)),
        ('{"ENABLEIPV6": true, "IPv6Network": "fc00::/48", "enableIPv4": false}', (6,)),
        ("[]", (4,)),  # the daemons will say what is wrong with it
    ],
)
def test_families_of_a_foreign_config(config, families):
    assert plan.families(config) == families


@given(hosts=st.integers(1, plan.MAX_HOSTS), data=st.data())
def test_underlay_addresses_are_distinct_usable_and_on_one_network(hosts, data):
    made = spec(hosts=hosts)
    one, other = (
        data.draw(st.sampled_from([STORE, *made.host_names])),
        data.draw(st.sampled_from([STORE, *made.host_names])),
    )
    for family in (4, 6):
        first, second = made.underlay(one, family), made.underlay(other, family)
        assert first.network == second.network
        assert (first == second) == (one == other)
        assert first.ip not in (first.network.network_address, first.network.broadcast_address)


def test_underlay_addresses_are_the_documented_ones():
    made = spec(hosts=20)
    assert [str(made.underlay(node, 4)) for node in ("h1", "h20", STORE)] == [
        "10.99.0.1/24",
        "10.99.0.20/24",
        "10.99.0.254/24",
    ]
    assert str(made.underlay("h20", 6)) == "fd00:99::14/64"
    assert made.etcd_endpoint == "http://10.99.0.254:2379"
    assert spec(config=network_config("vxlan", (6,))).etcd_endpoint == "http://[fd00:99::fe]:2379"


def test_every_namespace_bears_the_labs_name_and_every_link_is_made_inside_one():
    made = spec(name="mine", hosts=2, containers=2)
    namespaces = [line.split()[2] for line in plan.namespaces_batch(made)]
    assert namespaces == [f"mine-{node}" for node in ["switch", "store", "h1", "h2", "h1c1", "h1c2", "h2c1", "h2c2"]]
    links = list(plan.links_batch(made))
    assert len(links) == 3 + 2 + 4
    for line in links:
        words = line.split()
        assert [words[at + 1] in namespaces for at, word in enumerate(words) if word == "netns"] in (
            [True],
            [True, True],
        )


def test_no_link_name_is_too_long_for_the_kernel():
    made = spec(hosts=plan.MAX_HOSTS, containers=1)
    names = [
        word
        for line in plan.links_batch(made)
        for at, word in enumerate(line.split())
        if line.split()[at - 1] == "name"
    ]
    assert max(map(len, names)) <= 15


@given(hosts=st.integers(1, plan.MAX_HOSTS))
def test_bridge_macs_are_distinct_unicast_and_local(hosts):
    macs = [plan.bridge_mac(host) for host in spec(hosts=hosts).host_names]
    assert len(set(macs)) == hosts
    assert all(int(mac[:2], 16) & 3 == 2 for mac in macs)


def test_hosts_have_no_default_route_and_containers_one_per_family():
    made = spec(config=network_config("vxlan", (4, 6)))
    assert not [line for line in plan.node_batch(made, "h1") if "route" in line]
    gateways = [ipaddress.ip_interface("10.5.7.1/24"), ipaddress.ip_interface("fd00:5:0:7::1/64")]
    addresses = [plan.container_address(gateway, 2) for gateway in gateways]
    assert list(plan.container_batch(gateways, addresses, 1450)) == [
        "addr flush dev eth0 scope global",
        "link set eth0 mtu 1450 up",
        "addr add 10.5.7.3/24 dev eth0",
        "addr add fd00:5:0:7::3/64 dev eth0",
        "route replace 0.0.0.0/0 via 10.5.7.1 dev eth0",
        "route replace ::/0 via fd00:5:0:7::1 dev eth0",
    ]


def test_a_small_subnet_says_how_many_containers_it_lacks_room_for():
    gateway = ipaddress.ip_interface("10.5.7.5/30")
    assert str(plan.container_address(gateway, 1)) == "10.5.7.6/30"
    with pytest.raises(UsageError, match=r"10\.5\.7\.4/30 has no room for 2 containers"):
        plan.container_address(gateway, 2)


@pytest.mark.parametrize(
    ("store", "own", "flags"),
    [
        ("sqlite", True, ["--store=sqlite:/x/s"]),
        ("sqlite", False, ["--store=sqlite:/x/s"]),
        ("etcd3", True, ["--etcd-endpoints=http://10.99.0.254:2379", "--etcd-api=v3"]),
        ("etcd2", True, ["--etcd-endpoints=http://10.99.0.254:2379", "--etcd-api=v2"]),
        # A real flannel knows no --etcd-api and must not be given one.
        ("etcd2", False, ["--etcd-endpoints=http://10.99.0.254:2379"]),
    ],
)
def test_daemon_flags(store, own, flags):
    made = spec(store=store, ip_masq=True, options=("-v=2",))
    common = ["--iface=eth0", "--subnet-file=/x/subnet.env", "--etcd-prefix=/coreos.com/network"]
    assert plan.daemon_flags(made, FACTS, own=own) == [*common, *flags, "--ip-masq", "-v=2"]


def test_a_plain_daemon_command_gets_the_flags_and_one_with_placeholders_does_not():
    assert plan.daemon_argv("/opt/flanneld -v=3", ["--iface=eth0"], FACTS) == ["/opt/flanneld", "-v=3", "--iface=eth0"]
    assert plan.daemon_argv("'my daemon' --out {subnet_file}", ["--iface=eth0"], FACTS) == [
        "my daemon",
        "--out",
        "/x/subnet.env",
    ]
    # What is the shell's or JSON's stays.
    assert (
        plan.daemon_argv("""sh -c 'echo ${iface} {"a":1} {iface}'""", [], FACTS)[2] == """echo ${iface} {"a":1} eth0"""
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"name": "Lab"}, "lab name 'Lab'"),
        ({"name": "x" * 32}, "lab name"),
        ({"hosts": 0}, "1 to 1000"),
        ({"containers": 201}, "0 to 200"),
        ({"mtu": 100}, "MTU 100"),
        ({"mtu": 1279, "config": network_config("vxlan", (6,))}, "at least 1280"),
        ({"store": "etcd"}, "did you mean etcd"),
        ({"daemons": {"h4": "x"}}, "hosts are h1 to h3.*did you mean h3"),
        ({"config": "{"}, "not JSON"),
    ],
)
def test_wrong_specs_are_explained(wrong, message):
    with pytest.raises(UsageError, match=message):
        spec(**wrong)


@pytest.mark.parametrize(
    ("command", "kind", "message"),
    [
        ("x {subnetfile}", UnknownName, "no placeholder {subnetfile}.*did you mean subnet_file"),
        ("x 'y", UsageError, "quotation"),
        ("", UsageError, "needs a command"),
    ],
)
def test_wrong_daemon_commands_are_explained(command, kind, message):
    with pytest.raises(kind, match=message):
        plan.daemon_argv(command, [], FACTS)


def test_summary_of_a_matrix():
    matrix = Matrix([PairResult("h1c1", "h2c1", 4, rtt_ms=0.1), PairResult("h2c1", "h1c1", 4, why="100% packet loss")])
    assert matrix.summary() == {
        "pairs": 2,
        "reachable": 1,
        "unreachable": [{"from": "h2c1", "to": "h1c1", "family": 4, "why": "100% packet loss"}],
    }


def test_daemons_do_not_inherit_what_would_change_them():
    kept = {"PATH": "/bin", "HOME": "/root"}
    dropped = {"FLANNELD_IFACE": "x", "ETCD_NAME": "y", "http_proxy": "z", "HTTPS_PROXY": "z", "NOTIFY_SOCKET": "/n"}
    assert clean_environment(kept | dropped) == kept
