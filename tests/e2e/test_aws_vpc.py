"""aws-vpc by real daemons, each on a host of a lab that AWS (moto behind support.aws) knows as an instance. The lab's
underlay does not route by AWS's table; what the table does for packets is tested with the other clouds."""

import contextlib
import os
import signal

import pytest

from support.aws import aws_stage
from support.flanneld import flanneld
from support.keys import wait_until
from support.loopback import reachable
from support.server import serving
from wincey.lab.node import own_flanneld

CHANGES = {"CreateRoute", "ReplaceRoute", "DeleteRoute", "ModifyNetworkInterfaceAttribute"}


@pytest.fixture
def aws(tmp_path):
    with aws_stage(tmp_path) as stage:
        yield stage


def in_vpc(aws, lab):
    """An instance for each host, by the host's name."""
    network = aws.network(hosts=0)
    return network, {host.name: network.add(host.underlay(4)) for host in lab.hosts}


def table(lab, instances):
    return {str(host.gateways[0].network): instances[host.name] for host in lab.hosts if host.gateways}


CONFIG = '{"Network": "10.5.0.0/16", "Backend": {"Type": "aws-vpc"}}'


def test_three_hosts_join_are_killed_and_leave(make_lab, aws, tmp_path):
    lab = make_lab(config=CONFIG, hosts=3, start=[])
    network, instances = in_vpc(aws, lab)
    with reachable(lab.hosts, [aws.port]), contextlib.ExitStack() as stack:
        environments = {host.name: aws.environment(instances[host.name]) for host in lab.hosts}
        daemons = {}

        def start(host):
            log = tmp_path / f"{host.name}-{len(daemons)}.log"
            daemons[host.name] = stack.enter_context(flanneld(host, log, env=environments[host.name]))

        for host in lab.hosts:
            start(host)
            wait_until(lambda host=host: host.gateways and len(network.hosts()) == len(daemons))
            assert network.hosts() == table(lab, instances)
        assert all(network.forwards(each) for each in instances.values())
        assert lab.hosts[0].mtu == 1500

        aws.calls.clear()
        first, second, third = lab.hosts
        daemons[first.name].stop(signal.SIGKILL)
        assert network.hosts() == table(lab, instances), "the data path outlives the daemon"
        start(first)
        wait_until(lambda: "DescribeRouteTables" in aws.calls)
        daemons[first.name].says("lease acquired")
        assert not CHANGES & set(aws.calls)

        daemons[third.name].stop()
        cleaned = third.exec(
            [*own_flanneld(), "--cleanup", f"--subnet-file={third.subnet_file}"],
            env=dict(os.environ) | environments[third.name],
        )
        assert cleaned.returncode == 0, cleaned.stderr
        assert network.hosts() == {to: hop for to, hop in table(lab, instances).items() if hop != instances[third.name]}
        for daemon in (daemons[first.name], daemons[second.name]):
            assert "test-secret-never-shown" not in daemon.log
            assert not [line for line in daemon.log.splitlines() if line[0] in "EF"], daemon.log


def test_clients_without_credentials_of_a_server_that_keeps_the_table(make_lab, aws, tmp_path, monkeypatch):
    lab = make_lab(config=CONFIG, hosts=2, start=[])
    network, instances = in_vpc(aws, lab)
    flannel = network.add("10.99.0.99")
    for name, value in aws.environment().items():
        monkeypatch.setenv(name, value)
    server = serving(
        tmp_path / "server.log", f"--store={lab.store.url}", f"--etcd-prefix={lab.spec.prefix}", "--cloud-routes"
    )
    with server as server, reachable(lab.hosts, [aws.port, server.port]), contextlib.ExitStack() as stack:
        for host in lab.hosts:
            stack.enter_context(
                flanneld(
                    host,
                    tmp_path / f"{host.name}.log",
                    f"--remote={server.address}",
                    "--iface=eth0",
                    f"--subnet-file={host.subnet_file}",
                    bare=True,
                    env={
                        **aws.environment(instances[host.name], keys=False),
                        "AWS_ACCESS_KEY_ID": "",
                        "AWS_SECRET_ACCESS_KEY": "",
                    },
                )
            )
        wait_until(lambda: all(host.gateways for host in lab.hosts))
        wait_until(lambda: network.hosts() == table(lab, instances))
        # A flannel 0.5 says nothing but its address.
        status, _, body = server.ask("POST", "/v1/_/leases", '{"PublicIP": "10.99.0.99"}')
        assert status == 200, body
        wait_until(lambda: flannel in network.hosts().values())
        wait_until(lambda: all(network.forwards(each) for each in (*instances.values(), flannel)))
        for host in lab.hosts:
            assert " E" not in (tmp_path / f"{host.name}.log").read_text()


def test_a_daemon_outside_of_ec2_says_so(make_lab, aws, tmp_path):
    lab = make_lab(config=CONFIG, hosts=2, start=[])
    host = lab.hosts[0]
    env = {"AWS_EC2_METADATA_SERVICE_ENDPOINT": "http://127.0.0.1:1"}
    with flanneld(host, tmp_path / "log", env=env) as daemon:
        assert daemon.end() == 1
    assert "the backend aws-vpc needs the instance metadata service at http://127.0.0.1:1" in daemon.log
