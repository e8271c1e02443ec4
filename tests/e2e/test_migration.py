"""From flannel to Wincey and back, host by host and in place; and from one backend to another, host by host.

The way back needs nothing but to stop our flanneld and to start flannel: no `flanneld --cleanup`. Flannel keeps a vxlan device
that fits, replaces routes and entries, empties and refills its chains, and (since 0.25, with iptables) deletes our nftables
tables. Older flannels leave those: their rules mean the same as long as network and subnet are the same; `--cleanup` takes
them away. The packets that are lost on the way back are flannel's: its chains are empty for a moment when it starts.
"""

import json
import signal

import pytest

from support.interop import Probe, ours, raw_lease, said, sh, standin, with_iptables
from support.keys import get, lease_key, wait_until
from support.traffic import none_lost
from wincey.lab.errors import NotReady
from wincey.lab.plan import network_config

pytestmark = [pytest.mark.root, pytest.mark.etcd]


@pytest.fixture
def probing():
    probes = []

    def start(lab, source):
        probes.append(Probe(lab, source))
        return probes[-1]

    yield start
    for each in probes:
        each.end()


def facts(host):
    """What must be the same before and after: the device and its MAC address, subnet.env."""
    links = json.loads(sh(host, "ip -j link"))
    device = [(link["ifindex"], link["address"]) for link in links if link["ifname"] == "flannel.1"]
    return device, host.subnet_file.read_text()


def rules(host):
    return sh(
        host, "iptables-nft -S; iptables-nft -t nat -S; iptables-legacy -S; iptables-legacy -t nat -S; nft list ruleset"
    )


WAYS = {
    "vxlan": ("vxlan", "etcd3", None, None),
    "vxlan, iptables kept": ("vxlan", "etcd3", False, None),
    "vxlan, flannel 0.14 over etcd v2": ("vxlan", "etcd2", None, None),
    "host-gw, legacy iptables": ("host-gw", "etcd3", None, "iptables-legacy"),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_host_is_switched_in_place_and_back(make_lab, measuring, probing, way):
    backend, store, nftables, program = WAYS[way]
    config = json.loads(network_config(backend)) | ({} if nftables is None else {"EnableNFTables": nftables})
    flannel = standin(store, program)
    lab = make_lab(config=json.dumps(config), store=store, ip_masq=True, hosts=3, daemons={"*": flannel})
    host, key = lab.hosts[1], lease_key(lab.hosts[1])
    iptables = program or "iptables"
    sh(host, f"{iptables} -P FORWARD DROP")
    assert lab.ping(patience=10).unreachable == []
    if backend == "vxlan":  # of a host that left while flannel was down: flannel keeps that for ever
        sh(
            host,
            "ip route add 10.5.253.0/24 via 10.5.253.0 dev flannel.1 onlink;"
            "ip neigh add 10.5.253.0 lladdr 0e:00:00:00:00:53 dev flannel.1 nud permanent;"
            "bridge fdb add 0e:00:00:00:00:53 dst 10.99.0.53 dev flannel.1 self permanent",
        )
    before, lease = facts(host), raw_lease(lab, key)
    first, second, third = lab.containers
    pings = measuring((first, second), (second, third))
    probe = probing(lab, second)

    host.stop_daemon()
    host.start_daemon(our_command(lab, nftables, program))
    # subnet.env is there before the old flavour's last rules go.
    wait_until(
        lambda: "flanneld masq" not in rules(host) if nftables is None else "10.5.253" not in sh(host, "ip route")
    )

    asked, lost = probe.asked_and_lost()
    assert asked > 10
    assert lost == 0, f"{lost} of {asked} new connections not masqueraded"
    none_lost(pings)
    assert facts(host) == before
    assert raw_lease(lab, key)[0] == lease[0]
    if backend == "vxlan":
        assert "10.5.253" not in sh(host, "ip route; ip neigh")
        assert "0e:00:00:00:00:53" not in sh(host, "bridge fdb")
    routes = [line for line in sh(host, "ip route show").splitlines() if "via" in line]
    assert len(routes) == 2
    assert not [line for line in routes if "proto" not in line], routes
    text = rules(host)
    if nftables is None:
        assert "table ip flannel-ipv4" in text
        assert "-A POSTROUTING -s 10.5" not in text
        assert "-A FORWARD -s 10.5" not in text
    else:
        assert text.count("-j FLANNEL-POSTRTG") == 1
        assert "flannel-ipv4" not in text

    sh(host, f"{iptables} -P FORWARD ACCEPT")
    pings = measuring((first, second), (second, third))
    host.stop_daemon(signal.SIGTERM)
    host.start_daemon(flannel)
    assert lab.ping(patience=5).unreachable == []
    none_lost(pings)
    assert facts(host) == before
    assert raw_lease(lab, key)[0] == lease[0]
    assert "WIPED" not in "".join(said(host) for host in lab.hosts)
    if store == "etcd3":
        assert "flannel-ipv4" not in rules(host)
    asked, lost = probing(lab, second).asked_and_lost()
    assert lost == 0


@pytest.mark.parametrize("store", ["etcd3", "etcd2"])
def test_a_host_with_udp_is_switched_and_back(make_lab, measuring, store):
    """Flannel's device goes with flannel, so what comes in between is lost. Ours stays when our flanneld ends.

    On the way back flannel finds its port taken, and ends; our tunnel sees that and ends as well, so that the start by
    flannel's supervisor that follows finds device and port free.
    """
    flannel = standin(store)
    lab = make_lab("udp", store=store, hosts=3, daemons={"*": flannel})
    host, key = lab.hosts[1], lease_key(lab.hosts[1])
    assert lab.ping(patience=10).unreachable == []
    env, lease = host.subnet_file.read_text(), raw_lease(lab, key)[0]

    host.stop_daemon()
    host.start_daemon(ours(lab))
    assert lab.ping(patience=5).unreachable == []
    assert host.subnet_file.read_text() == env
    # That is the one thing it says besides, and flannel does not read it (docs/backends/udp.md).
    assert raw_lease(lab, key)[0].replace(',"BackendData":{"Engine":"bpf"}', "") == lease

    pings = measuring(lab.containers[:2])
    host.stop_daemon()
    none_lost(pings, 10)
    with pytest.raises(NotReady, match="exit code 1"):
        host.start_daemon(flannel)
    assert "failed to start listening on UDP socket" in said(host)
    wait_until(lambda: devices([host]) == [set()])
    host.start_daemon(flannel)
    assert lab.ping(patience=5).unreachable == []
    assert devices([host]) == [{"flannel0"}]
    assert host.subnet_file.read_text() == env
    assert raw_lease(lab, key)[0] == lease


def our_command(lab, nftables, program):
    return with_iptables(program, ours(lab)) if program else ours(lab)


VXLAN, HOST_GW, UDP = {"Type": "vxlan"}, {"Type": "host-gw"}, {"Type": "udp"}
CHANGES = {
    "vxlan to host-gw": (VXLAN, HOST_GW),
    "host-gw to vxlan": (HOST_GW, VXLAN),
    "vxlan to udp": (VXLAN, UDP),
    "udp to vxlan": (UDP, VXLAN),
    "udp to host-gw": (UDP, HOST_GW),
    "VNI 1 to 2": (VXLAN, VXLAN | {"VNI": 2}),
    "VNI 1 to 2, port 4789": (VXLAN | {"Port": 4789}, VXLAN | {"VNI": 2, "Port": 4789}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_backend_changes_host_by_host(make_lab, measuring, change):
    """Three stages: all the old, one late (its daemon does not run), all the new. Reverse-path filters are strict."""
    old, new = CHANGES[change]
    lab = make_lab(config=config_of(old), hosts=3, start=[])
    for host in lab.hosts:
        strict(host)
    lab.join(lab.hosts)
    assert lab.ping(patience=5).unreachable == []
    late = lab.hosts[2]
    others = lab.hosts[:2]
    late.stop_daemon()
    pings = measuring(lab.containers[:2])
    lab.store.put_config(config_of(new))
    wait_until(lambda: all(published(lab, host) == without_port(new) for host in others))
    assert lab.ping(patience=5).unreachable == []
    assert published(lab, late) == without_port(old)
    late.start_daemon()
    wait_until(lambda: published(lab, late) == without_port(new))
    assert lab.ping(patience=5).unreachable == []
    none_lost(pings)
    wait_until(lambda: devices(lab.hosts) == [DEVICES[new["Type"], new.get("VNI", 1)]] * 3)
    for host in lab.hosts:
        assert "10.5." not in sh(host, "ip route show proto boot")


@pytest.mark.parametrize("change", ["vxlan to host-gw", "host-gw to vxlan", "VNI 1 to 2"])
def test_flannel_is_late(make_lab, measuring, change):
    """Flannel follows a change when it is restarted, and until then ignores leases of another type: what it knew stays.

    (To udp it can't go this way: it leaves its routes through the vxlan device, which win over that of the whole network.)
    """
    old, new = CHANGES[change]
    lab = make_lab(config=config_of(old), store="etcd3", hosts=3, start=[], daemons={"h3": standin()})
    for host in lab.hosts:
        strict(host)
    lab.join(lab.hosts)
    assert lab.ping(patience=5).unreachable == []
    late = lab.hosts[2]
    pings = measuring((lab.containers[0], lab.containers[2]))
    lab.store.put_config(config_of(new))
    wait_until(lambda: all(published(lab, host) == new for host in lab.hosts[:2]))
    assert lab.ping(patience=5).unreachable == []
    none_lost(pings, 10)
    assert published(lab, late) == old
    late.stop_daemon()
    late.start_daemon()
    assert published(lab, late) == new
    assert lab.ping(patience=5).unreachable == []


def test_a_host_that_can_not_follow(make_lab):
    """Behind NAT there is no host-gw: that host stays with vxlan, and each side sends as the other wants it.

    So packets come in by another device than answers go out by. Strict filters on devices that come into being, which ours
    are, must not matter. A strict filter on the underlay would drop what comes from the late host: that is not ours to change.
    """
    lab = make_lab(config=config_of(VXLAN), hosts=3, start=["h1", "h2"])
    for host in lab.hosts:
        sh(host, "sysctl -qw net.ipv4.conf.default.rp_filter=1")
    natted = lab.hosts[2]
    sh(natted, "ip addr add 10.99.0.33/32 dev lo")
    natted.start_daemon(f"{ours(lab)} --public-ip=10.99.0.33")
    natted.attach()
    assert lab.ping(patience=5).unreachable == []
    lab.store.put_config(config_of(HOST_GW))
    wait_until(lambda: [published(lab, host)["Type"] for host in lab.hosts] == ["host-gw", "host-gw", "vxlan"])
    wait_until(lambda: "via 10.99.0.1 dev eth0" in sh(natted, "ip route"))
    assert "going on with what was in force before" in said(natted)
    assert "dev flannel.1" in sh(lab.hosts[0], f"ip route show {natted.gateways[0].network}")
    assert lab.ping(patience=5).unreachable == []


def strict(host):
    """Let the kernel drop what comes in by another way than answers would go out by."""
    names = ("all", "default", "eth0")
    sh(host, "sysctl -qw " + " ".join(f"net.ipv4.conf.{name}.rp_filter=1" for name in names))


DEVICES = {("vxlan", 1): {"flannel.1"}, ("vxlan", 2): {"flannel.2"}, ("host-gw", 1): set(), ("udp", 1): {"flannel0"}}


def devices(hosts):
    """Those of the backends; the pairs beside a TUN device (docs/backends/udp.md) go without saying, without it they don't."""
    links = [json.loads(sh(host, "ip -j link")) for host in hosts]
    names = [{link["ifname"] for link in each if link["ifname"].startswith("flannel")} for each in links]
    return [{name for name in each if name.partition("-")[0] not in each - {name}} for each in names]


def config_of(backend):
    return json.dumps({"Network": "10.5.0.0/16", "Backend": backend})


def published(lab, host):
    """The backend that a host's lease tells, as its config would be."""
    value = json.loads(get(lab, lease_key(host)))
    found = {"Type": value.get("BackendType", "udp")}
    if (vni := value.get("BackendData", {}).get("VNI", 1)) != 1:
        found["VNI"] = vni
    return found


def without_port(backend):
    return {name: value for name, value in backend.items() if name != "Port"}
