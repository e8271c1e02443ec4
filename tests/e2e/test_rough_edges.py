"""What flannel is known to do wrong and no other test here shows to be right: see docs/rough-edges.md."""

import json
import os
import signal

import pytest

from support.colours import BLUE, GREEN, Member, define
from support.interop import etcdctl, sh
from support.keys import lease_key, put, wait_until
from support.traffic import ContinuousPing
from wincey.lab.plan import PREFIX

PEER = f"{PREFIX}/subnets/10.5.240.0-24"


def lease(mac, address):
    return json.dumps(
        {"PublicIP": address, "PublicIPv6": None, "BackendType": "vxlan", "BackendData": {"VNI": 1, "VtepMAC": mac}}
    )


@pytest.mark.etcd
def test_what_changed_behind_a_compaction_is_taken_over(make_lab, tmp_path):
    """The daemon misses a change, and the store no longer has it: it lists anew, sees the change and keeps all the rest."""
    lab = make_lab(store="etcd3")
    host = lab.hosts[0]
    assert lab.ping(patience=5).unreachable == []
    put(lab, PEER, lease("0e:00:00:00:02:40", "10.99.0.240"))
    wait_until(lambda: "0e:00:00:00:02:40 dst 10.99.0.240" in sh(host, "bridge fdb show dev flannel.1"))
    ping = ContinuousPing(*lab.containers, tmp_path)
    try:
        os.kill(host.daemon.pid, signal.SIGSTOP)
        lab.store.stop()  # takes the watch's connection along
        lab.store.start()
        put(lab, PEER, lease("0e:00:00:00:02:41", "10.99.0.241"))
        for _ in range(3):
            put(lab, f"{PREFIX}/other", "x")
        revision = json.loads(etcdctl(lab, "get", f"{PREFIX}/other", "-w", "json"))["header"]["revision"]
        etcdctl(lab, "compaction", str(revision))
        os.kill(host.daemon.pid, signal.SIGCONT)
        wait_until(lambda: "0e:00:00:00:02:41 dst 10.99.0.241" in sh(host, "bridge fdb show dev flannel.1"))
        wait_until(lambda: "0e:00:00:00:02:40" not in sh(host, "bridge fdb show dev flannel.1; ip neigh"))
        sent, lost = ping.sent_and_lost()
        assert (sent > 50, lost) == (True, 0)
    finally:
        ping.kill()
    assert any("history was lost" in line for line in host.log())
    assert lease_key(host) in etcdctl(lab, "get", "--prefix", f"{PREFIX}/subnets/", "--keys-only")


def test_direct_routing_is_switched_on_and_off_without_a_trace(make_lab, tmp_path):
    """Peers are reached as they are or through the device, and nothing of the other way stays behind."""
    lab = make_lab("vxlan")
    network, host = json.loads(lab.spec.config)["Network"], lab.hosts[0]
    subnet = lab.hosts[1].gateways[0].network

    def through_the_device():
        entries = sh(host, "bridge fdb show dev flannel.1 | grep -c dst; ip neigh show dev flannel.1 nud permanent")
        return "dev flannel.1" in sh(host, f"ip route show {subnet}") and entries.startswith("1\n10.5.")

    def directly():
        entries = sh(host, "bridge fdb show dev flannel.1 | grep dst; ip neigh show dev flannel.1 nud permanent")
        return "dev eth0" in sh(host, f"ip route show {subnet}") and not entries

    assert lab.ping(patience=5).unreachable == []
    wait_until(through_the_device)
    ping = ContinuousPing(*lab.containers, tmp_path)
    try:
        for on, there in ((True, directly), (False, through_the_device), (True, directly)):
            lab.store.put_config(json.dumps({"Network": network, "Backend": {"Type": "vxlan", "DirectRouting": on}}))
            wait_until(there)
        assert lab.ping(patience=5).unreachable == []
        sent, lost = ping.sent_and_lost()
        assert (sent > 50, lost) == (True, 0)
    finally:
        ping.kill()


def test_the_first_network_after_an_empty_list_is_joined_and_the_end_is_prompt(make_lab, tmp_path):
    lab = make_lab(hosts=1, start=[])
    with Member(lab.hosts[0], tmp_path, "--watch-networks") as member:
        member.daemon.says("there is no network in the store yet")
        define(lab, blue=BLUE)
        member.joins("blue")
        define(lab, green=GREEN)
        member.joins("green")
        assert member.daemon.stop(timeout=10) == 0


def test_alloc_has_a_lease_where_there_is_ipv6_alone(make_lab):
    lab = make_lab("alloc", families=(6,), hosts=2)
    subnets = [host.gateways[0].network for host in lab.hosts]
    assert [subnet.version for subnet in subnets] == [6, 6]
    assert not subnets[0].overlaps(subnets[1])
