"""Which interface and which address a host joins with, and what happens when these change under a running daemon."""

import json
import re
import time
from contextlib import ExitStack

import pytest

from support.flanneld import flanneld, log_of, sh
from support.keys import get, lease_key, lease_keys, wait_until
from support.traffic import ContinuousPing
from wincey.lab.plan import PREFIX

BACKENDS = ["vxlan", "host-gw", "udp"]

# Flags, the address that peers are told, and what the log gives as the reason.
CHOICES = [
    (["--iface=eth0"], "10.99.0.1", "--iface=eth0 names it"),
    (["--iface=10.99.0.2"], "10.99.0.2", "has the address of --iface=10.99.0.2"),
    (["--iface=eth9", "-iface", "eth0"], "10.99.0.3", "--iface=eth0 names it"),
    ([r"--iface-regex=^10\.99\."], "10.99.0.4", r"--iface-regex=^10\.99\. matches its address 10.99.0.4"),
    (["--iface-regex=^et.0$"], "10.99.0.5", "--iface-regex=^et.0$ matches its name"),
    (["--iface-can-reach=10.99.0.254"], "10.99.0.6", "the route to 10.99.0.254 of --iface-can-reach leads through it"),
    (["--public-ip=10.99.0.7"], "10.99.0.7", "has the address of --public-ip=10.99.0.7"),
    ([], "10.99.0.8", "the IPv4 default route leads through it"),
    (["--public-ip=203.0.113.7"], "203.0.113.7", "leads through it; peers are told 203.0.113.7"),
    (["--public-ip=203.0.113.8", "--iface=eth0"], "203.0.113.8", "names it; peers are told 203.0.113.8"),
]


def test_the_interface_is_chosen_and_one_line_says_why(make_lab, tmp_path):
    lab = make_lab("vxlan", hosts=len(CHOICES), start=[])
    with ExitStack() as stack:
        daemons = []
        for host, (flags, _, _) in zip(lab.hosts, CHOICES, strict=True):
            sh(host, "ip link add br9 type bridge; ip addr add 192.168.50.1/24 dev br9; ip link set br9 up")
            sh(host, "ip route add default via 10.99.0.254")
            common = f"--store={lab.store.url}", f"--subnet-file={host.subnet_file}"
            daemons.append(stack.enter_context(flanneld(host, tmp_path / host.name, *common, *flags, bare=True)))
        for daemon, (flags, public, reason) in zip(daemons, CHOICES, strict=True):
            daemon.says("lease acquired")
            wait_until(daemon.host.subnet_file.exists)
            lines = [line for line in daemon.log.splitlines() if "using interface" in line]
            assert len(lines) == 1
            assert reason in lines[0], flags
            assert "eth0 with address 10.99.0." in lines[0]
            assert f'"PublicIP":"{public}"' in get(lab, lease_key(daemon.host))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_address_of_a_host_changes(make_lab, tmp_path, backend):
    lab = make_lab(backend, hosts=3)
    assert lab.ping(patience=5).unreachable == []
    before = lease_keys(lab)
    undisturbed = ContinuousPing(lab.containers[1], lab.containers[2], tmp_path)
    host, peer = lab.hosts[:2]
    own = lease_key(host)
    try:
        for old, new in (("10.99.0.1", "10.99.0.101"), ("10.99.0.101", "10.99.0.102")):
            sh(host, f"ip addr del {old}/24 dev eth0; ip addr add {new}/24 dev eth0")
            wait_until(lambda new=new: f'"PublicIP":"{new}"' in get(lab, own))
            assert lab.ping(patience=10).unreachable == []
        sent, lost = undisturbed.sent_and_lost()
        assert (sent > 50, lost) == (True, 0)
    finally:
        undisturbed.kill()
    assert lease_keys(lab) == before
    assert "10.99.0.1 " not in sh(peer, "ip route; bridge fdb show; ip -d link")
    assert "the subnet of this host changed" not in log_of(host)
    if backend == "vxlan":
        assert "local 10.99.0.102 " in sh(host, "ip -d link show flannel.1")
    # After a restart it is all the same.
    host.stop_daemon()
    host.start_daemon()
    assert lease_keys(lab) == before


def test_an_ipv6_address_changes(make_lab):
    lab = make_lab("vxlan", families=(4, 6))
    assert lab.ping(patience=5).unreachable == []
    before = lease_keys(lab)
    host = lab.hosts[0]
    sh(host, "ip addr del fd00:99::1/64 dev eth0; ip addr add fd00:99::aa/64 dev eth0 nodad")
    wait_until(lambda: '"PublicIPv6":"fd00:99::aa"' in get(lab, lease_key(host)))
    assert lab.ping(patience=10).unreachable == []
    assert lease_keys(lab) == before


def test_the_address_becomes_that_of_another_host(make_lab):
    """Refused at the start; a host that runs goes on as it is, and never takes over the other's lease."""
    lab = make_lab("vxlan", start=["h1", "h2"])
    h1, h2 = lab.hosts
    values = {key: get(lab, key) for key in lease_keys(lab)}
    sh(h2, "ip addr add 10.99.0.1/32 dev lo; ip addr del 10.99.0.2/24 dev eth0; ip addr add 10.99.0.1/24 dev eth0")
    wait_until(lambda: "going on as before" in log_of(h2))
    assert "10.99.0.1" in log_of(h2)
    assert "tries to use our public address 10.99.0.1" in log_of(h1)
    assert {key: get(lab, key) for key in lease_keys(lab)} == values
    assert h1.running
    assert h2.running


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_network_card_goes_down_and_up_and_its_mtu_changes(make_lab, backend):
    lab = make_lab(backend)
    assert lab.ping(patience=5).unreachable == []
    host = lab.hosts[0]
    before, subnet = host.mtu, host.gateways
    for _ in range(2):
        sh(host, "ip link set eth0 down")
        time.sleep(0.7)
        sh(host, "ip link set eth0 up")
        assert lab.ping(patience=10).unreachable == []
    sh(host, "ip link set eth0 mtu 1400")
    wait_until(lambda: host.mtu == before - 100)
    device = {"vxlan": "flannel.1", "udp": "flannel0"}.get(backend)
    if device:
        assert f"mtu {before - 100} " in sh(host, f"ip link show {device}")
    assert lab.ping(patience=10).unreachable == []
    sh(host, "ip link set eth0 mtu 1500")
    wait_until(lambda: host.mtu == before)
    assert host.gateways == subnet
    assert host.running


@pytest.mark.parametrize("backend", ["vxlan", "host-gw"])
def test_the_network_card_gets_another_name(make_lab, tmp_path, backend):
    lab = make_lab(backend, start=["h2"])
    host = lab.hosts[0]
    flags = f"--store={lab.store.url}", f"--subnet-file={host.subnet_file}", "--iface=10.99.0.1"
    with flanneld(host, tmp_path / "log", *flags, bare=True) as daemon:
        wait_until(host.subnet_file.exists)
        host.attach()
        assert lab.ping(patience=5).unreachable == []
        sh(host, "ip link set eth0 down; ip link set eth0 name uplink; ip link set uplink up")
        daemon.says("using interface uplink")
        assert lab.ping(patience=10).unreachable == []
        assert re.search(
            "dev uplink" if backend == "vxlan" else r"via 10.99.0.2 dev uplink", sh(host, "ip -d link; ip route")
        )


# Two networks on one host, each with a daemon of its own (compatibility reference, section 13.1, case 8).


def local_address(host, bridge, subnet):
    """A device with an address in the host's subnet, as flannel's functional tests have a dummy device."""
    sh(host, f"ip link add {bridge} type bridge; ip addr add {subnet} dev {bridge}; ip link set {bridge} up")
    return subnet.partition("/")[0]


def pings(host, *arguments):
    return host.exec(["ping", "-n", "-c", "3", "-i", "0.2", "-W", "1", *arguments], timeout=30).returncode == 0


def subnet_in(path):
    return re.search(r"FLANNEL_SUBNET=(\S+)", path.read_text())[1]


def rule_tables(host):
    """The tables of a ruleset, whichever was made first: after a flush, two daemons put theirs back in either order.

    Without the note about bridge netfilter, which the one that was first makes, as it is alone then.
    """
    ruleset = re.sub(r"\tchain bridge-nf-off \{.*?\t\}\n\n?", "", sh(host, "nft list ruleset"), flags=re.DOTALL)
    return sorted(re.sub(r"\n\n+", "\n", table) for table in re.split(r"^(?=table )", ruleset, flags=re.MULTILINE))


def test_two_daemons_for_two_networks(make_lab, tmp_path):
    lab = make_lab("vxlan", start=[])
    networks = {"vxlan": "10.11.0.0/16", "hostgw": "10.12.0.0/16"}
    for name, network in networks.items():
        kind = {"vxlan": "vxlan", "hostgw": "host-gw"}[name]
        text = json.dumps({"Network": network, "Backend": {"Type": kind}})
        lab.store.run(lambda registry, n=name, t=text: registry.store.create(f"/{n}/network/config", t.encode(), None))
    with ExitStack() as stack:
        files, daemons, own = {}, {}, {}
        for host in lab.hosts:
            sh(host, "ip route add default via 10.99.0.254")  # or `ping -I eth0` takes every address for a neighbor's
            for name in networks:
                files[host, name] = path = tmp_path / host.name / f"{name}.env"
                flags = f"-etcd-prefix=/{name}/network", "-subnet-file", str(path), "--ip-masq", "--iface=eth0"
                daemons[host, name] = stack.enter_context(
                    flanneld(host, tmp_path / f"{host.name}-{name}.log", f"--store={lab.store.url}", *flags, bare=True)
                )
        for (host, name), path in files.items():
            wait_until(path.exists)
            own[host, name] = local_address(host, f"dummy-{name}", subnet_in(path))
        h1, h2 = lab.hosts
        wait_until(lambda: all(pings(h2, own[h1, name]) for name in networks))
        assert not pings(h2, "-I", "flannel.1", own[h1, "hostgw"])
        assert not pings(h2, "-I", "eth0", own[h1, "vxlan"])
        tables = rule_tables(h1)
        assert all(any(network in table for table in tables) for network in networks.values())
        # A repair by one, and the end of the other, leave each other's things alone.
        sh(h1, "nft flush ruleset")
        wait_until(lambda: rule_tables(h1) == tables)
        assert daemons[h1, "vxlan"].stop() == 0
        with flanneld(
            h1, tmp_path / "cleanup.log", "--cleanup", f"--subnet-file={files[h1, 'vxlan']}", bare=True
        ) as done:
            assert done.end() == 0
        assert "flannel.1" not in sh(h1, "ip link show; ip route show")
        rules = sh(h1, "nft list ruleset")
        assert "10.11.0.0" not in rules
        assert "10.12.0.0/16" in rules
        assert pings(h2, own[h1, "hostgw"])
        assert not files[h1, "vxlan"].exists()
        assert files[h1, "hostgw"].exists()
        assert daemons[h1, "hostgw"].running
        time.sleep(0.5)
        assert "repaired: route" not in daemons[h1, "hostgw"].log


@pytest.mark.parametrize("backend", BACKENDS)
def test_addresses_of_the_subnets_reach_each_other(make_lab, backend):
    """Compatibility reference, section 13.1, cases 1 to 3: no container, an address of the subnet on the host itself."""
    lab = make_lab(backend, start=[])
    for host in lab.hosts:
        host.start_daemon()
    first, second = (local_address(host, "dummy0", str(host.gateways[0])) for host in lab.hosts)
    h1, h2 = lab.hosts
    wait_until(lambda: pings(h1, "-I", first, second))
    assert pings(h2, "-I", second, first)


def test_a_lease_by_hand_for_a_prefix_beside_ours_is_not_ours(make_lab):
    """`subnets-other` begins like `subnets`: with flannel such a key empties the tables."""
    lab = make_lab("vxlan")
    lab.store.run(lambda r: r.store.create(f"{PREFIX}/subnets-other/10.5.200.0-24", b'{"PublicIP":"10.99.0.9"}', None))
    assert lab.ping(patience=5).unreachable == []
    assert "10.5.200.0" not in sh(lab.hosts[0], "ip route")
