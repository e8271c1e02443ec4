"""Daemons with a real etcd behind TLS and passwords, with several members, and with the API that is in use found out."""

import json
from contextlib import ExitStack

import pytest

from support.certs import Authority
from support.etcd import EtcdCluster, EtcdServer, free_ports, require_etcd
from support.flanneld import flanneld
from support.keys import wait_until
from support.loopback import reachable
from support.stores import fresh_prefix
from support.traffic import ContinuousPing
from wincey.lab.plan import network_config

pytestmark = [pytest.mark.root, pytest.mark.etcd]

CONFIG = network_config("vxlan")


@pytest.fixture
def stack():
    with ExitStack() as stack:
        yield stack


def start(stack, tmp_path, host, url, *flags, env=None):
    log = tmp_path / f"{host.name}.log"
    return stack.enter_context(flanneld(host, log, "--store=", f"--etcd-endpoints={url}", *flags, env=env))


def joined(lab, hosts):
    for host in hosts:
        wait_until(host.subnet_file.exists)
        host.attach()
    assert lab.ping(patience=10).unreachable == []


def leases(server, prefix, api=3):
    if api == 3:
        lines = server.ctl("get", "--prefix", "--keys-only", f"{prefix}/subnets/")
    else:
        lines = server.ctl("ls", f"{prefix}/subnets", api=2)
    return lines.split()


def test_the_api_in_use_is_found_out(make_lab, etcd34, stack, tmp_path):
    """The daemons are there before the configs. `http://` stays plain text whatever certificates there are (13.1)."""
    lab = make_lab("vxlan", hosts=4, start=[])
    stack.enter_context(reachable(lab.hosts, [etcd34.port]))
    one, other = (f"{fresh_prefix()}network" for _ in range(2))
    client = Authority(tmp_path / "certs")
    certificate = client.issue("client")
    files = [f"--etcd-cafile={client.ca}", f"--etcd-certfile={certificate.cert}", f"--etcd-keyfile={certificate.key}"]
    for host, prefix, more in zip(lab.hosts, (one, one, other, other), ([], files, [], files), strict=True):
        host.directory.mkdir(parents=True, exist_ok=True)
        start(stack, tmp_path, host, etcd34.url, f"--etcd-prefix={prefix}", "-v", "10", *more).says(f"{prefix}/config")
    # The second network has other subnets, as both are on one underlay.
    etcd34.ctl("mk", f"{one}/config", CONFIG, api=2)
    etcd34.ctl("put", f"{other}/config", CONFIG.replace("10.5.", "10.6.").replace("vxlan", "host-gw"))
    for hosts in (lab.hosts[:2], lab.hosts[2:]):
        for host in hosts:
            wait_until(host.subnet_file.exists)
            host.attach()
    for pair in (lab.containers[:2], lab.containers[2:]):
        wait_until(lambda pair=pair: pair[0].exec(["ping", "-c1", "-W1", pair[1].address(4)]).returncode == 0)
    assert len(leases(etcd34, one, 2)) == 2
    assert leases(etcd34, one, 3) == []
    assert len(leases(etcd34, other, 3)) == 2


@pytest.mark.parametrize("api", [3, 2])
def test_tls_with_client_certificate_and_password(make_lab, stack, tmp_path, api):
    """The user may do no more than the network needs, and one host has the password from its environment."""
    authority = Authority(tmp_path / "certs")
    certificate = authority.issue("client", "/O=wincey")
    server = EtcdServer(tmp_path / "etcd", require_etcd(), authority=authority)
    stack.callback(server.kill)
    server.start()
    server.ctl("put" if api == 3 else "set", "/coreos.com/network/config", CONFIG, api=api)
    if api == 3:
        server.enable_auth("flannel", "pass word", "/coreos.com/network/")
    else:
        server.enable_auth_v2("flannel", "pass word", "/coreos.com/network/")
    lab = make_lab("vxlan", hosts=2, start=[])
    stack.enter_context(reachable(lab.hosts, [server.port]))
    flags = [
        f"--etcd-cafile={authority.ca}",
        f"--etcd-certfile={certificate.cert}",
        f"--etcd-keyfile={certificate.key}",
        "--etcd-username=flannel",
    ]
    start(stack, tmp_path, lab.hosts[0], server.url, *flags, "--etcd-password=pass word", f"--etcd-api=v{api}")
    start(stack, tmp_path, lab.hosts[1], server.url, *flags, env={"FLANNELD_ETCD_PASSWORD": "pass word"})
    joined(lab, lab.hosts)
    assert len(leases(server, "/coreos.com/network", api)) == 2


def test_a_cluster_loses_members(make_lab, stack, tmp_path):
    """The first endpoint is dead from the start, and the member that leads is killed later on."""
    authority = Authority(tmp_path / "certs")
    certificate = authority.issue("client")
    cluster = EtcdCluster(tmp_path / "etcd", require_etcd(), authority=authority)
    stack.callback(cluster.kill)
    cluster.start()
    cluster.members[0].ctl("put", "/coreos.com/network/config", CONFIG)
    lab = make_lab("vxlan", hosts=3, start=[])
    stack.enter_context(reachable(lab.hosts, [member.port for member in cluster.members]))
    urls = ",".join([f"https://127.0.0.1:{free_ports(1)[0]}", *cluster.urls])
    flags = [
        f"--etcd-cafile={authority.ca}",
        f"--etcd-certfile={certificate.cert}",
        f"--etcd-keyfile={certificate.key}",
    ]
    first, second, third = lab.hosts
    for host in (first, second):
        start(stack, tmp_path, host, urls, *flags)
    joined_pair = lab.containers[:2]
    for host in (first, second):
        wait_until(host.subnet_file.exists)
        host.attach()
    wait_until(lambda: joined_pair[0].exec(["ping", "-c1", "-W1", joined_pair[1].address(4)]).returncode == 0)
    ping = ContinuousPing(*joined_pair, tmp_path)
    stack.callback(ping.kill)

    leader = cluster.leader()
    leader.kill()
    left = next(member for member in cluster.members if member is not leader)
    wait_until(left.healthy)
    start(stack, tmp_path, third, urls, *flags)
    joined(lab, [third])

    # An administrator's shorter time limit is what makes it renew now, and not in 23 hours.
    for key in leases(left, "/coreos.com/network"):
        value = left.ctl("get", "--print-value-only", key).rstrip("\n")
        short = left.ctl("lease", "grant", "60").split()[1]
        left.ctl("put", f"--lease={short}", key, value)
        wait_until(lambda key=key: time_left(left, key) > 80_000)
    sent, lost = ping.sent_and_lost()
    assert sent > 50
    assert lost == 0


def time_left(server, key):
    entry = json.loads(server.ctl("get", key, "-w", "json"))["kvs"][0]
    return json.loads(server.ctl("lease", "timetolive", f"{entry['lease']:x}", "-w", "json"))["ttl"]
