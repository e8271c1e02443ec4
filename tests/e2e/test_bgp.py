"""The bgp backend between hosts with real routing daemons, and with routers that are not ours."""

import os
import signal
import time

import pytest

from support.bgp import bird_router, daemons, frr_router, pid, run_directory, sessions
from support.keys import delete, lease_key, wait_until
from support.mtu import mtu_is_right
from support.traffic import ContinuousPing, ping, transfer
from wincey.lab.node import own_flanneld
from wincey.lab.plan import network_config

PROTOCOL = {"bird": "bird", "frr": "bgp"}


def routes(host, family=4):
    return host.exec(["ip", f"-{family}", "route"], check=True).stdout


@pytest.mark.parametrize(
    ("kinds", "families", "options"),
    [
        (("bird", "bird"), (4, 6), {}),
        (("frr", "frr"), (4, 6), {}),
        (("bird", "frr", "bird"), (4,), {"Password": "s3cret-!#{}", "BFD": True, "Port": 1179, "ASN": 4200000001}),
    ],
    ids=["bird", "frr", "mixed"],
)
def test_whole_matrix(make_lab, kinds, families, options):
    lab = make_lab(
        families=families,
        config=network_config("bgp", families, **options),
        hosts=len(kinds),
        daemons=daemons(*kinds),
    )
    assert lab.ping(patience=20).unreachable == []
    first, second = lab.containers[0], lab.containers[1]
    for family in families:
        sent, received = transfer(first, second, family, megabytes=50)
        assert sent == received
        mtu_is_right(first, second, family)
    assert first.host.mtu == 1500
    for host, kind in zip(lab.hosts, kinds, strict=True):
        assert f"proto {PROTOCOL[kind]}" in routes(host)
        assert "s3cret" not in "\n".join(host.log())
        for path in run_directory(host).parent.rglob("*"):
            assert not path.is_file() or not path.stat().st_mode & 0o007 or b"s3cret" not in path.read_bytes(), path


@pytest.mark.parametrize("kind", ["bird", "frr"])
def test_nothing_is_lost_and_nothing_is_left(make_lab, tmp_path, kind):
    lab = make_lab(config=network_config("bgp"), hosts=3, daemons=daemons(kind, kind, kind))
    h1, h2, h3 = lab.hosts
    assert lab.ping(patience=20).unreachable == []
    begins = sessions(h1, kind)
    assert len(begins) == 2
    stream = ContinuousPing(lab.container("h1c1"), lab.container("h2c1"), tmp_path)
    try:
        for host in (h1, h2):
            host.kill_daemon()
            time.sleep(0.3)
            host.start_daemon()
        assert sessions(h1, kind) == begins, "the routing daemons go on without ours"

        h3.stop_daemon()
        gone = str(h3.gateways[0].network)
        delete(lab, lease_key(h3))
        wait_until(lambda: gone not in routes(h1) + routes(h2))
        name = "wincey_10_99_0_3"
        wait_until(lambda: name not in sessions(h1, kind))
        assert {name: begins[name], **sessions(h1, kind)} == begins, "the other session was not touched"

        for program in ["bird"] if kind == "bird" else ["bgpd", "zebra"]:
            before = pid(h1, program)
            os.kill(before, signal.SIGKILL)
            wait_until(lambda gone=before, name=program: pid(h1, name) not in (None, gone))
            wait_until(lambda: len(sessions(h1, kind)) == 1)
        time.sleep(1)
        total, lost = stream.sent_and_lost()
    finally:
        stream.kill()
    assert total > 200
    assert lost == 0, f"{lost} of {total} lost"

    subnet = str(h2.gateways[0].network)
    for host in (h2, h1):
        processes = [pid(host, program) for program in ("bird", "bgpd", "zebra")]
        host.stop_daemon()
        done = host.exec([*own_flanneld(), "--cleanup", f"--subnet-file={host.subnet_file}"])
        assert done.returncode == 0, done.stderr
        assert f"proto {PROTOCOL[kind]}" not in routes(host)
        assert not run_directory(host).parent.exists()
        assert not any(number and os.path.exists(f"/proc/{number}/exe") for number in processes)
        # It took leave: the other does not keep its routes for the time of a restart.
        wait_until(lambda: subnet not in routes(h1))


HIJACKER = """
router id 10.99.0.4;
protocol static lies {{ ipv4;
  route 10.5.0.0/25 blackhole; route 10.5.0.0/16 blackhole; route 192.0.2.0/24 blackhole; route {own} blackhole;
  route {unknown} blackhole; }}
template bgp host {{ local 10.99.0.4 as 64512; direct; passive; password "right";
  ipv4 {{ import none; export all; next hop self; }}; }}
protocol bgp h1 from host {{ neighbor 10.99.0.1 as 64512; }}
protocol bgp h2 from host {{ neighbor 10.99.0.2 as 64512; ipv4 {{ export where net != {own}; }}; }}
"""
STRANGER = """
router id 10.99.0.5;
template bgp host { local 10.99.0.5 as 64512; direct; password "wrong"; ipv4; strict bind yes; }
protocol bgp h1 from host { neighbor 10.99.0.1 as 64512; }
protocol bgp h2 from host { neighbor 10.99.0.2 as 64512; }
"""
REFLECTOR = "router bgp 64512\n bgp router-id 10.99.0.3\n" + "".join(
    f" neighbor 10.99.0.{number} {words}\n"
    for number in (1, 2)
    for words in ("remote-as 64512", "password right", "route-reflector-client")
)


@pytest.mark.timeout(150)
def test_route_reflector_and_what_is_wrong_with_routers(make_lab):
    """Three routers: a route reflector, one that announces what is not its own, and one with another password."""
    routers = ["10.99.0.3", "10.99.0.4", "10.99.0.5"]
    lab = make_lab(
        config=network_config("bgp", Peers=routers, Password="right"), hosts=5, daemons=daemons("bird", "frr"), start=[]
    )
    h1, h2, reflector, hijacker, stranger = lab.hosts
    frr_router(reflector, lab.directory / "reflector", REFLECTOR)
    lab.join([h1, h2])
    subnets = [str(host.gateways[0].network) for host in (h1, h2)]
    unknown = next(net for number in range(7, 20) if (net := f"10.5.{number}.0/24") not in subnets)
    bird_router(hijacker, lab.directory / "hijacker", HIJACKER.format(own=subnets[0], unknown=unknown))
    bird_router(stranger, lab.directory / "stranger", STRANGER)
    first, second = lab.container("h1c1"), lab.container("h2c1")
    wait_until(lambda: ping(first, second.address(4), count=1)[0] == 0)

    def told(host, *words):
        return [line for line in host.log() if all(word in line for word in words)]

    for host, peer in ((h1, subnets[1]), (h2, subnets[0])):
        wait_until(lambda host=host: unknown in routes(host))
        wait_until(lambda host=host: told(host, unknown, "no lease knows"), timeout=60)
        wait_until(lambda host=host: told(host, "10.99.0.5", "TCP MD5 password"), timeout=60)
        assert len(told(host, "10.99.0.5")) == len(told(host, unknown)) == 1
        table = routes(host)
        assert not any(lie in table for lie in ("10.5.0.0/25", "10.5.0.0/16", "192.0.2.0/24"))
        assert peer in table
    assert f"{subnets[0]} via" not in routes(h1), "nobody takes our own subnet"


TOR = """
router id 10.99.0.254;
protocol kernel { ipv4 { import none; export where source = RTS_BGP; }; }
template bgp host4 { local 10.99.0.254 as 65000; graceful restart aware; ipv4 { import all; export all; }; }
protocol bgp h1 from host4 { neighbor 10.99.0.1 as 64512; }
protocol bgp h2 from host4 { neighbor 10.99.0.2 as 64512; }
"""


def test_containers_are_reached_from_a_router_outside(make_lab):
    """By eBGP, and the hosts learn from one another through it alone."""
    config = network_config("bgp", Peers=["10.99.0.254"], PeerASN=65000)
    lab = make_lab(config=config, hosts=2, daemons=daemons("bird", "frr"), start=[])
    node = lab.node("store")
    bird_router(node, lab.directory / "router", TOR)
    lab.join(lab.hosts)
    assert lab.ping(patience=20).unreachable == []
    for container in lab.containers:
        wait_until(lambda container=container: ping(node, container.address(4), count=1)[0] == 0)
        code, output = ping(container, "10.99.0.254", count=1)
        assert code == 0, output
    second = lab.hosts[1]
    subnet = str(second.gateways[0].network)
    second.stop_daemon()
    second.exec([*own_flanneld(), "--cleanup", f"--subnet-file={second.subnet_file}"], check=True)
    wait_until(lambda: subnet not in routes(node) + routes(lab.hosts[0]))
