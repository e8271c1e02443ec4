"""gce, tencent-vpc and ali-vpc by real daemons: each host knows the cloud by its metadata server and writes its own route.

The cloud is a fake that listens on the lab's store host, which is the VPC's router too: it forwards by what the fake's table
says and by nothing else.
"""

import os
import signal

import pytest

from support.clouds import CLOUDS
from support.keys import wait_until
from support.mtu import mtu_is_right
from support.traffic import ContinuousPing, transfer
from wincey.lab.namespace import call_in, ip_batch, set_sysctls
from wincey.lab.node import own_flanneld
from wincey.lab.plan import STORE

ROUTER = "10.99.0.254"


class Vpc:
    """A lab in a cloud. Its daemons inherit where the cloud is."""

    def __init__(self, cloud, lab, monkeypatch):
        self.cloud, self.lab = cloud, lab
        self.netns = lab.spec.netns(STORE)
        self.metadata = call_in(self.netns, lambda: cloud.fake.listen(ROUTER, 80))
        for variable, value in cloud.environment(self.metadata, self.metadata).items():
            monkeypatch.setenv(variable, value)
        # A router that told hosts of a shorter way would make them need no router.
        set_sysctls(self.netns, {f"net/ipv4/conf/{name}/send_redirects": "0" for name in ("all", "eth0")})
        set_sysctls(self.netns, {"net/ipv4/ip_forward": "1"})
        self.shown = {host.name: cloud.add(f"vm-{host.name}", host.underlay(4)) for host in lab.hosts}
        for host in lab.hosts:
            ip_batch([f"route replace default via {ROUTER} dev eth0"], host.netns)
        self.foreign = cloud.foreign()

    def leased(self, *hosts):
        """What the table has to hold for these hosts."""
        return {str(host.gateways[0].network): self.shown[host.name] for host in hosts}

    def wait_for(self, *hosts):
        wait_until(lambda: self.cloud.routes() == self.leased(*hosts), 60)
        assert self.cloud.foreign() == self.foreign

    def take_up(self):
        """The VPC's router forwards by the table as it is now."""
        places = {self.shown[host.name]: host.underlay(4) for host in self.lab.hosts}
        ip_batch(["route flush proto 99"], self.netns, force=True)
        ip_batch(
            [f"route replace {to} via {places[by]} dev eth0 proto 99" for to, by in self.cloud.routes().items()],
            self.netns,
        )

    def writes(self):
        return [each for each in self.cloud.fake.actions if each in self.cloud.writes]


@pytest.fixture
def make_vpc(make_lab, monkeypatch):
    made = []

    def make(kind):
        cloud = CLOUDS[kind]()
        made.append(cloud)
        return Vpc(cloud, make_lab(kind, hosts=3, start=[]), monkeypatch)

    yield make
    for cloud in made:
        cloud.fake.close()


@pytest.mark.parametrize("kind", CLOUDS)
def test_hosts_join_work_and_leave(make_vpc, kind, tmp_path):
    vpc = make_vpc(kind)
    h1, h2, h3 = hosts = vpc.lab.hosts
    for number, host in enumerate(hosts, 1):
        host.join()
        vpc.wait_for(*hosts[:number])
    vpc.take_up()
    assert vpc.lab.ping(patience=5).unreachable == []
    first, second = vpc.lab.containers[:2]
    sent, received = transfer(first, second, megabytes=20)
    assert sent == received
    mtu_is_right(first, second, 4)

    writes = vpc.writes()
    ping = ContinuousPing(first, second, tmp_path)
    try:
        for host in (h1, h2):
            host.kill_daemon()
            host.start_daemon()
        sent, lost = ping.sent_and_lost()
    finally:
        ping.kill()
    assert sent > 100
    assert lost == 0, f"{lost} of {sent} lost"
    assert vpc.writes() == writes  # what was right was left as it was

    h3.stop_daemon()
    h3.exec([*own_flanneld(), "--cleanup", f"--subnet-file={h3.subnet_file}"], check=True, env=dict(os.environ))
    vpc.wait_for(h1, h2)
    for host in hosts:
        log = host.log_path.read_text()
        assert "Traceback" not in log
        assert not vpc.cloud.secret or vpc.cloud.secret not in log


@pytest.mark.parametrize("kind", CLOUDS)
def test_killed_at_its_first_write_then_denied(make_vpc, kind):
    vpc = make_vpc(kind)
    h1, h2, _ = vpc.lab.hosts
    killed = []

    def kill(action):
        if action in vpc.cloud.writes and not killed:
            killed.append(action)
            os.kill(h1.daemon.pid, signal.SIGKILL)

    vpc.cloud.fake.after = kill
    h1.start_daemon(wait=False)
    wait_until(lambda: not h1.running, 30)
    assert killed
    h1.start_daemon()
    vpc.wait_for(h1)

    vpc.cloud.deny(vpc.cloud.writes[0])
    h2.start_daemon()
    wait_until(lambda: vpc.cloud.denial in h2.log_path.read_text(), 30)
    vpc.wait_for(h1)
    vpc.cloud.deny()
    vpc.wait_for(h1, h2)  # by itself
    assert len([line for line in h2.log() if vpc.cloud.denial in line]) == 1


@pytest.mark.parametrize("kind", CLOUDS)
def test_a_host_that_is_in_no_cloud(make_lab, kind, monkeypatch):
    nowhere = "http://127.0.0.1:9"
    for variable, value in CLOUDS[kind]().environment(nowhere, nowhere).items():
        monkeypatch.setenv(variable, value)
    host = make_lab(kind, hosts=1, start=[]).hosts[0]
    host.start_daemon(wait=False)
    wait_until(lambda: not host.running, 30)
    assert host.daemon.exit_code == 1
    assert "metadata server: 127.0.0.1:9: Connection refused; the backend works on an instance of" in host.log()[-1]
    assert not host.subnet_file.exists()
