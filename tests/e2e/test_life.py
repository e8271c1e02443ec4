"""A network's config and leases change while daemons run, by hand and by accident; packets flow on, nothing is restarted."""

import json
import re
import shutil
import signal
import time
from contextlib import ExitStack

import pytest

from support.flanneld import ask, flanneld, log_of, sh
from support.keys import delete, get, lease_key, lease_keys, put, wait_until
from support.traffic import ContinuousPing
from wincey.lab.node import Node
from wincey.lab.plan import PREFIX, STORE, network_config

STORES = ["sqlite", pytest.param("etcd3", marks=pytest.mark.etcd), pytest.param("etcd2", marks=pytest.mark.etcd)]
CONFIG = f"{PREFIX}/config"


@pytest.fixture
def pinging(tmp_path):
    pings = []

    def start(lab):
        pings.append(ContinuousPing(*lab.containers[:2], tmp_path))
        return pings[-1]

    yield start
    for each in pings:
        each.kill()


def config(**keys):
    return json.dumps({"Network": "10.5.0.0/16", "Backend": {"Type": "vxlan"}} | keys)


def reachable(lab):
    return lab.ping(patience=10).unreachable == []


def entry(lab, key):
    return lab.store.run(lambda registry: registry.store.get(key))


# The config.


def test_no_config_yet(make_lab, tmp_path):
    lab = make_lab("vxlan", hosts=1, start=[])
    delete(lab, CONFIG)
    with flanneld(lab.hosts[0], tmp_path / "log") as daemon:
        daemon.says(f"there is no network config at {CONFIG}; put one there")
        lab.store.put_config(network_config("vxlan"))
        daemon.says("lease acquired")
        assert daemon.log.count("there is no network config") == 1


INVALID = {
    "{ network: 10.5.0.0/16 }": ["JSON"],
    config(SubnetLen=31): ["SubnetLen", "31", "30"],
    config(Network="10.5.0.0/29"): ["Network", "10.5.0.0/29", "/28"],
    config(SubnetMin="10.6.0.0"): ["SubnetMin", "10.6.0.0", "10.5.0.0/16"],
    config(Network=5): ["Network"],
    config(Backend={"Type": "vxlan", "VNI": "one"}): ["VNI", "one"],
}


def test_an_invalid_config_is_explained_once_and_its_correction_found(make_lab, tmp_path):
    """A host for each, with a network of its own."""
    lab = make_lab("vxlan", hosts=len(INVALID), start=[])
    with ExitStack() as stack:
        daemons = []
        for host, bad in zip(lab.hosts, INVALID, strict=True):
            put(lab, f"/{host.name}/config", bad, None)
            flags = f"--etcd-prefix=/{host.name}", "--healthz-port=8400"
            daemons.append(stack.enter_context(flanneld(host, tmp_path / host.name, *flags)))
        for daemon in daemons:
            daemon.says("waiting for a config that works")
        time.sleep(2.5)  # they look again each second
        for daemon, words in zip(daemons, INVALID.values(), strict=True):
            complaints = [line for line in daemon.log.splitlines() if line.startswith("E")]
            assert len(complaints) == 1
            assert all(word in complaints[0] for word in words), complaints
            status, body = ask(daemon.host, "/readyz", 8400)
            assert status == 503
            assert all(word in body for word in words), body
            put(lab, f"/{daemon.host.name}/config", config(), None)
        for daemon in daemons:
            daemon.says("lease acquired")


def test_keys_in_lower_case(make_lab):
    lab = make_lab(
        config='{"network": "10.5.0.0/16", "subnetlen": 26, "SUBNETMIN": "10.5.9.0", "backend": {"type": "VXLAN"}}'
    )
    assert reachable(lab)
    assert {host.gateways[0].network.prefixlen for host in lab.hosts} == {26}
    assert all(int(str(host.gateways[0].ip).split(".")[2]) >= 9 for host in lab.hosts)
    assert '"BackendType":"vxlan"' in get(lab, lease_key(lab.hosts[0]))


DEVICES = {"vxlan": ("flannel.1", 1450), "udp": ("flannel0", 1472), "host-gw": (None, 1500)}


def test_the_backend_changes_while_packets_flow(make_lab, pinging):
    """Hosts change one after the other; a peer that has not yet is reached by what it publishes."""
    lab = make_lab("vxlan")
    assert reachable(lab)
    ping = pinging(lab)
    subnets = [host.gateways for host in lab.hosts]
    for backend in ("host-gw", "udp", "vxlan", "udp", "host-gw", "vxlan"):
        device, mtu = DEVICES[backend]
        lab.store.put_config(network_config(backend))
        wait_until(lambda mtu=mtu: all(host.mtu == mtu for host in lab.hosts))
        wait_until(lambda device=device: all(our_devices(host) == {device} - {None} for host in lab.hosts))
        assert reachable(lab)
        time.sleep(0.3)
    sent, lost = ping.sent_and_lost()
    # What is under way in a tunnel that goes is lost, and what comes while two hosts differ for some milliseconds.
    print(f"six changes: {lost} of {sent} lost")
    assert lost < sent / 4, f"{lost} of {sent} lost"
    assert [host.gateways for host in lab.hosts] == subnets
    for host in lab.hosts:
        routes = sh(host, "ip -4 route show")
        assert routes.count("flannel.1") == 1
        assert "via 10.99" not in routes
        assert "repaired" not in log_of(host)


def our_devices(host):
    """Without the pairs of udp's programs, which come and go with them."""
    return {
        name
        for name in re.findall(r"^\d+: ([^:@]+)", sh(host, "ip -o link show"), re.M)
        if "flannel" in name and "-" not in name
    }


def test_the_network_changes(make_lab):
    lab = make_lab(config=config(), ip_masq=True)
    assert reachable(lab)
    for changed, network, length in (
        (config(SubnetLen=26), "10.5.0.0/16", 26),
        (config(Network="10.6.0.0/16", SubnetLen=20), "10.6.0.0/16", 20),
    ):
        lab.store.put_config(changed)
        wait_until(
            lambda network=network, length=length: all(
                str(host.env.networks[0]) == network and host.gateways[0].network.prefixlen == length
                for host in lab.hosts
            )
        )
        for host in lab.hosts:
            host.attach()
        assert reachable(lab)
        wait_until(lambda: lease_keys(lab) == sorted(map(lease_key, lab.hosts)))
    for host in lab.hosts:
        wait_until(
            lambda host=host: (
                "10.5." not in sh(host, "ip -4 route; ip -4 addr; ip neigh show nud permanent; nft list ruleset")
            )
        )
        assert "10.6.0.0/16" in sh(host, "nft list ruleset")
        assert our_devices(host) == {"flannel.1"}
        advice = [line for line in host.log() if "restart the container runtime" in line]
        assert len(advice) == 2
        assert "repaired" not in log_of(host)


def test_the_vni_changes(make_lab):
    lab = make_lab(config=config())
    assert reachable(lab)
    lab.store.put_config(config(Backend={"Type": "vxlan", "VNI": 42, "Port": 4789}))
    wait_until(lambda: all(our_devices(host) == {"flannel.42"} for host in lab.hosts))
    assert reachable(lab)
    assert "dstport 4789" in sh(lab.hosts[0], "ip -d link show flannel.42")
    assert '"VNI":42' in get(lab, lease_key(lab.hosts[0]))


def test_a_config_that_does_not_work_changes_nothing(make_lab, pinging):
    lab = make_lab(config=config())
    assert reachable(lab)
    ping = pinging(lab)
    host = lab.hosts[0]
    for bad, words in (
        ("{", "JSON"),
        (config(SubnetLen=31), "SubnetLen"),
        (config(Backend={"Type": "nonsense"}), "nonsense"),
        (config(Backend={"Type": "udp"}, EnableIPv6=True, IPv6Network="fd00:5::/48"), "IPv6"),
    ):
        put(lab, CONFIG, bad, None)
        told = re.compile(f"{words}.*going on with what was in force")
        wait_until(lambda told=told: all(told.search(log_of(each)) for each in lab.hosts))
    delete(lab, CONFIG)
    wait_until(lambda: all("there is no network config" in log_of(each) for each in lab.hosts))
    host.kill_daemon()  # and one that starts now waits, and leaves alone what is there
    host.start_daemon(wait=False)
    time.sleep(1.5)
    sent, lost = ping.sent_and_lost()
    assert (sent > 100, lost) == (True, 0)
    errors = [line for line in lab.hosts[1].log() if line.startswith("E")]
    assert len(errors) == 5, errors
    put(lab, CONFIG, config(Backend={"Type": "host-gw"}), None)
    wait_until(lambda: all(host.mtu == 1500 for host in lab.hosts))
    assert reachable(lab)


def test_traffic_rules_change_hands(make_lab):
    lab = make_lab(config=config(), hosts=1, ip_masq=True)
    host = lab.hosts[0]

    def nftables():
        return "table ip flannel-ipv4" in sh(host, "nft list tables")

    def iptables():
        return "FLANNEL" in sh(host, "iptables -t nat -S; iptables -S")

    assert (nftables(), iptables()) == (True, False)
    for enabled in (False, True, False):
        lab.store.put_config(config(EnableNFTables=enabled))
        wait_until(lambda enabled=enabled: (nftables(), iptables()) == (enabled, not enabled))
    assert host.running


# The lease.


@pytest.mark.parametrize("store", STORES)
def test_our_lease_is_deleted_and_shortened(make_lab, pinging, store):
    """A peer keeps its routes for the moment that it takes, so nothing at all is lost."""
    lab = make_lab("vxlan", store=store)
    assert reachable(lab)
    before = lease_keys(lab)
    ping = pinging(lab)
    host = lab.hosts[1]
    own = lease_key(host)
    for _ in range(3):
        delete(lab, own)
        wait_until(lambda: lease_keys(lab) == before)
    lab.store.run(lambda registry: shorten(registry.store, own, 2))
    wait_until(lambda: lab.store.run(lambda registry: left(registry.store, own)) > 80_000)
    time.sleep(2.5)
    assert lease_keys(lab) == before
    sent, lost = ping.sent_and_lost()
    assert (sent > 100, lost) == (True, 0), f"{lost} of {sent} lost"
    assert log_of(host).count("was removed from the store") == 3


async def shorten(store, key, ttl):
    found = await store.get(key)
    await store.replace(found, found.value, ttl)


async def left(store, key):
    return await store.time_left(await store.get(key)) or 0


def test_our_lease_has_expired_while_we_were_away(make_lab):
    lab = make_lab("vxlan")
    assert reachable(lab)
    host, peer = lab.hosts
    own, subnet = lease_key(host), str(host.gateways[0].network)
    host.daemon.send(signal.SIGSTOP)
    lab.store.run(lambda registry: shorten(registry.store, own, 1))
    wait_until(lambda: own not in lease_keys(lab))
    wait_until(lambda: subnet not in sh(peer, "ip route"))
    assert sh(host, "ip route").count("flannel.1") == 1, "nobody is there to change it"
    host.daemon.send(signal.SIGCONT)
    wait_until(lambda: own in lease_keys(lab))
    assert reachable(lab)


@pytest.mark.parametrize("store", STORES)
def test_our_lease_was_taken_by_another_host(make_lab, store):
    lab = make_lab("vxlan", store=store)
    assert reachable(lab)
    host, peer = lab.hosts
    own, before = lease_key(host), host.env
    value = json.loads(get(lab, own))
    put(
        lab,
        own,
        json.dumps(value | {"PublicIP": "10.99.0.77", "BackendData": {"VNI": 1, "VtepMAC": "0e:00:00:00:00:77"}}),
    )
    wait_until(lambda: host.env != before)
    assert lease_key(host) in lease_keys(lab)
    assert get(lab, own).count("10.99.0.77") == 1, "another host's lease is never touched"
    host.attach()
    assert reachable(lab)
    assert "dst 10.99.0.77" in sh(peer, "bridge fdb show dev flannel.1")
    assert "dst 10.99.0.77" in sh(host, "bridge fdb show dev flannel.1")
    assert "restart the container runtime" in log_of(host)
    old, new = own.rpartition("/")[2], lease_key(host).rpartition("/")[2]
    assert old != new
    host.stop_daemon()
    host.start_daemon()
    assert lease_key(host).endswith(new)


def reserve(lab, subnet, address):
    """As an administrator does, with the tools at hand."""
    key, value = f"{PREFIX}/subnets/{subnet}", json.dumps({"PublicIP": address})
    if lab.spec.store == "sqlite":
        put(lab, key, value, None)
        return
    command = {"etcd3": ["put", key, value], "etcd2": ["set", key, value]}[lab.spec.store]
    etcdctl(lab, *command)


def etcdctl(lab, *arguments):
    v3 = lab.spec.store == "etcd3"
    flags = [f"--endpoints={lab.spec.etcd_endpoint}"]
    done = Node(lab.spec, STORE).exec(
        ["env", f"ETCDCTL_API={3 if v3 else 2}", "etcdctl", *flags, *arguments], check=True
    )
    return done.stdout


@pytest.mark.parametrize("store", STORES)
def test_a_reservation_made_by_hand_holds(make_lab, store):
    """On etcd v3 flannel turns it into an ordinary lease at once."""
    lab = make_lab("vxlan", store=store, start=[])
    reserve(lab, "10.5.77.0-24", "10.99.0.1")
    key = f"{PREFIX}/subnets/10.5.77.0-24"
    lab.join(lab.hosts)
    host = lab.hosts[0]
    assert str(host.gateways[0]) == "10.5.77.1/24"
    assert reachable(lab)
    for end in (signal.SIGTERM, signal.SIGKILL):
        assert entry(lab, key).permanent
        assert "VtepMAC" in get(lab, key)
        host.stop_daemon(end)
        host.start_daemon()
        assert str(host.gateways[0]) == "10.5.77.1/24"
    # One that comes while the daemon runs, for the subnet it has, holds as well.
    other = lab.hosts[1]
    reserve(lab, lease_key(other).rpartition("/")[2], "10.99.0.2")
    wait_until(lambda: "VtepMAC" in get(lab, lease_key(other)) and entry(lab, lease_key(other)).permanent)
    assert reachable(lab)


def test_etcdctl_shows_what_flannel_would_write(make_lab):
    for store, command in (("etcd3", ["get", "--print-value-only"]), ("etcd2", ["get"])):
        lab = make_lab("vxlan", store=store, hosts=1)
        value = etcdctl(lab, *command, lease_key(lab.hosts[0])).strip()
        mac = json.loads(sh(lab.hosts[0], "ip -j link show flannel.1"))[0]["address"]
        v6 = '"PublicIPv6":null,' if store == "etcd3" else ""
        assert value == (
            f'{{"PublicIP":"10.99.0.1",{v6}"BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"{mac}"}}}}'
        )


def test_out_of_subnets(make_lab, tmp_path):
    """At the start it is the end; a running host goes on as it is and says that it would be refused now."""
    one = config(SubnetMin="10.5.1.0", SubnetMax="10.5.1.0")
    lab = make_lab(config=one, start=["h1"])
    h2 = lab.hosts[1]
    with flanneld(h2, tmp_path / "log") as refused:
        assert refused.end() == 1
    assert "out of subnets: all 1 subnets from 10.5.1.0/24 to 10.5.1.0/24 are leased" in refused.log.splitlines()[-1]

    lab.store.put_config(config(SubnetMin="10.5.1.0", SubnetMax="10.5.2.0"))
    with flanneld(h2, tmp_path / "log2", "--healthz-port=8400") as daemon:
        wait_until(lambda: bool(h2.env.subnets))
        h2.attach()
        assert reachable(lab)
        assert str(h2.gateways[0]) == "10.5.2.1/24"
        lab.store.put_config(one)  # it is h1's
        wait_until(lambda: ask(h2, "/readyz", 8400)[0] == 503)
        assert "out of subnets" in ask(h2, "/readyz", 8400)[1]
        assert reachable(lab)
        assert str(h2.gateways[0]) == "10.5.2.1/24"
        # It still follows the others, and finds a correction.
        put(
            lab,
            f"{PREFIX}/subnets/10.5.9.0-24",
            '{"PublicIP":"10.99.0.9","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"0e:00:00:00:00:09"}}',
        )
        wait_until(lambda: "10.5.9.0/24" in sh(h2, "ip route"))
        lab.store.put_config(config(SubnetMin="10.5.1.0", SubnetMax="10.5.3.0"))
        wait_until(lambda: ask(h2, "/readyz", 8400)[0] == 200)
        assert str(h2.gateways[0]) == "10.5.2.1/24"
        assert daemon.log.count("going on as before") == 1


@pytest.mark.etcd
def test_the_store_loses_everything(make_lab, pinging):
    """Hosts find it again one after the other, and keep each other's routes until then; also before there is a config."""
    labs = [make_lab("vxlan", store="etcd3") for _ in range(2)]
    assert all(reachable(lab) for lab in labs)
    before = [lease_keys(lab) for lab in labs]
    pings = [pinging(lab) for lab in labs]
    for lab in labs:
        for host in lab.hosts:
            host.daemon.send(signal.SIGSTOP)  # they will be back in an order of our choice
        lab.store.stop()
        shutil.rmtree(lab.store.directory / "etcd")
        lab.store.start()
    labs[0].store.put_config(network_config("vxlan"))
    for hosts in zip(*(lab.hosts for lab in labs), strict=True):
        for host in hosts:
            host.daemon.send(signal.SIGCONT)
        for lab, host in zip(labs, hosts, strict=True):
            wait_until(lambda lab=lab, host=host: lease_key(host) in lease_keys(lab), timeout=30)
        time.sleep(2)  # longer than a peer whose lease alone was removed is waited for
    assert [lease_keys(lab) for lab in labs] == before
    for lab, ping in zip(labs, pings, strict=True):
        sent, lost = ping.sent_and_lost()
        assert (sent > 100, lost) == (True, 0), f"{lost} of {sent} lost"
        assert len(lab.store.run(lambda registry: registry.snapshot()).claims) == 2
        assert reachable(lab)


def test_the_subnet_of_subnet_env_is_asked_for_again(make_lab):
    """The store is new, and so is the state of the daemon; only subnet.env is there."""
    lab = make_lab("vxlan")
    before = [host.gateways for host in lab.hosts]
    for host in lab.hosts:
        host.stop_daemon()
        shutil.rmtree(host.directory / "wincey")
    for key in lease_keys(lab):
        delete(lab, key)
    for host in reversed(lab.hosts):
        host.start_daemon()
    assert [host.gateways for host in lab.hosts] == before
    assert reachable(lab)


# Two hosts with one address.


@pytest.mark.etcd
def test_a_second_live_host_with_our_address_is_refused(make_lab, pinging, tmp_path):
    lab = make_lab("vxlan", store="etcd3", hosts=3, start=["h1", "h2"])
    assert lab.ping().results
    first, third = lab.hosts[0], lab.hosts[2]
    ping = pinging(lab)
    value = get(lab, lease_key(first))
    for attempt in range(2):
        with flanneld(third, tmp_path / f"log{attempt}", "--public-ip=10.99.0.1") as second:
            assert second.end() == 1
        last = second.log.splitlines()[-1]
        assert "10.99.0.1" in last
        assert len(set(re.findall(r"\(([0-9a-f]{8})\)", last))) == 2, last
        assert not third.subnet_file.exists()
    assert get(lab, lease_key(first)) == value
    sent, lost = ping.sent_and_lost()
    assert (sent > 50, lost) == (True, 0)
    assert log_of(first).count("tries to use our public address 10.99.0.1") == 2
    first.stop_daemon()
    with flanneld(third, tmp_path / "log9", "--public-ip=10.99.0.1") as second:
        second.says("waiting up to")
        second.says("lease acquired")
        wait_until(third.subnet_file.exists)
        assert third.gateways == first.gateways
