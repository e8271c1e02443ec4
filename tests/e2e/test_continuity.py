"""Packets go on flowing whatever happens to daemons and stores: a ping 100 times a second loses nothing."""

import signal
import time

import pytest

from support.keys import delete, get, lease_key, put, wait_until
from support.traffic import ContinuousPing
from support.traffic import ping as reach
from wincey.lab.plan import PREFIX

BACKENDS = ["vxlan", "host-gw", "udp"]


@pytest.fixture
def pinging(tmp_path):
    pings = []

    def start(source, target):
        pings.append(ContinuousPing(source, target, tmp_path))
        return pings[-1]

    yield start
    for each in pings:
        each.kill()


def none_lost(ping, least):
    sent, lost = ping.sent_and_lost()
    assert sent > least
    assert lost == 0, f"{lost} of {sent} lost"


@pytest.mark.parametrize("backend", BACKENDS)
def test_daemons_killed_and_stopped_and_started(make_lab, pinging, backend):
    lab = make_lab(backend)
    h1, h2 = lab.hosts
    assert lab.ping(patience=5).unreachable == []
    ping = pinging(*lab.containers)
    before = [host.env for host in lab.hosts]
    for host in (h1, h2):
        host.kill_daemon()
        time.sleep(0.3)
        host.start_daemon()
        host.stop_daemon(signal.SIGTERM)
        time.sleep(0.3)
        host.start_daemon()
    time.sleep(0.5)
    none_lost(ping, 150)
    assert [host.env for host in lab.hosts] == before


@pytest.mark.etcd
@pytest.mark.timeout(240)
def test_store_down_for_a_minute(make_lab, pinging):
    """All backends at once, so that it takes one minute."""
    labs = [make_lab(backend, store="etcd3") for backend in BACKENDS]
    for lab in labs:
        assert lab.ping(patience=5).unreachable == []
    pings = [pinging(*lab.containers) for lab in labs]
    for lab in labs:
        lab.store.stop()
    time.sleep(30)
    # A daemon that starts while the store is down leaves what is there alone.
    for lab in labs:
        lab.hosts[0].kill_daemon()
        lab.hosts[0].start_daemon(wait=False)
    time.sleep(30)
    for lab in labs:
        lab.store.start()
    for lab in labs:
        lab.hosts[0].wait_ready(20)
    time.sleep(1)
    for ping in pings:
        none_lost(ping, 3000)  # a busy machine sends fewer than 100 a second
    for lab in labs:
        assert all(host.running for host in lab.hosts)
        assert lab.ping(patience=5).unreachable == []


@pytest.mark.parametrize("backend", ["vxlan", pytest.param("udp", marks=pytest.mark.etcd)])
def test_twenty_hosts_join_and_leave(make_lab, pinging, backend):
    """The others really start, stop and start on other subnets; their leases go and come."""
    store = "sqlite" if backend == "vxlan" else "etcd3"
    lab = make_lab(backend, store=store, hosts=22, containers=1, start=["h1", "h2"])
    first, second = lab.container("h1c1"), lab.container("h2c1")
    wait_until(lambda: reach(first, second.address(4))[0] == 0)
    ping = pinging(first, second)
    others = lab.hosts[2:]
    lab.join(others, timeout=60)
    assert lab.ping(patience=20).unreachable == []
    for host in others:
        host.stop_daemon()
    for host in others:
        delete(lab, lease_key(host))
    wait_until(
        lambda: all(str(host.gateways[0].network) not in lab.hosts[0].exec(["ip", "route"]).stdout for host in others)
    )
    time.sleep(0.5)
    none_lost(ping, 200)


@pytest.mark.parametrize(
    "store", ["sqlite", pytest.param("etcd3", marks=pytest.mark.etcd), pytest.param("etcd2", marks=pytest.mark.etcd)]
)
def test_garbage_beside_the_leases(make_lab, pinging, store):
    """With flannel one unparsable key empties the tables of every host."""
    lab = make_lab("vxlan", store=store)
    assert lab.ping(patience=5).unreachable == []
    ping = pinging(*lab.containers)
    put(lab, f"{PREFIX}/subnets/garbage", "garbage")
    put(lab, f"{PREFIX}/subnets/10.5.250.0-24", "{not json")
    put(lab, f"{PREFIX}/subnets/10.5.300.0-24", '{"PublicIP":"10.99.0.77"}')
    put(lab, f"{PREFIX}/subnets-other/foo", "x")
    h2 = lab.hosts[1]
    own = lease_key(h2)
    good = get(lab, own)
    put(lab, own, "overwritten")
    wait_until(lambda: get(lab, own) == good)
    time.sleep(0.5)
    none_lost(ping, 60)
    assert all(host.running for host in lab.hosts)
    text = "\n".join(lab.hosts[0].log())
    assert "garbage" in text
    assert "10.5.250.0-24" in text
