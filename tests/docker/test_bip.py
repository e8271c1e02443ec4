"""Docker gets its subnet by --bip, from mk-docker-opts.sh: two hosts, a real engine on each, a change of the subnet.

The engines are shared by all tests of this file. They stand in the order of an operator's day: start, use, change.
"""

import json
import subprocess

import pytest

from support.keys import wait_until
from support.machine import PROGRAMS
from wincey.lab.namespace import set_sysctls

OPTIONS = "mk-docker-opts.sh -i -d /run/flannel/flannel_docker_opts.env && cat /run/flannel/flannel_docker_opts.env"
START = """. /run/flannel/flannel_docker_opts.env
setsid dockerd $DOCKER_OPT_BIP $DOCKER_OPT_IPMASQ $DOCKER_OPT_MTU >>/var/log/dockerd.log 2>&1 </dev/null &"""


def config(store, network):
    text = json.dumps({"Network": network, "Backend": {"Type": "vxlan"}})
    done = subprocess.run(
        [PROGRAMS / "wincey", "config", "set", "--store", store, "-"],
        input=text,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def ping(machine, container, address):
    machine.sh(f"docker exec {container} ping -c 2 -W 5 {address}")


def in_network(machine, start):
    done = machine.run("sed", "-n", "s/^FLANNEL_SUBNET=//p", "/run/flannel/subnet.env")
    return done.stdout.startswith(start)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    url = f"sqlite:{tmp_path_factory.mktemp('store') / 'store.db'}"
    config(url, "10.5.0.0/16")
    return url


@pytest.fixture(scope="module")
def engines(machines, store):
    """h1 forwards nothing when its engine starts, so that Docker turns that on itself; h2 does."""
    for machine, forward in zip(machines, "01", strict=True):
        machine.sh(f"setsid flanneld --store={store} --iface=eth0 --ip-masq >>/var/log/flanneld.log 2>&1 </dev/null &")
        wait_until(lambda machine=machine: in_network(machine, "10.5."))
        machine.sh(OPTIONS)
        set_sysctls(machine.host.netns, {"net/ipv4/ip_forward": forward})
        machine.sh(START)
        machine.wait_docker()
        machine.import_busybox()
        machine.container("c1")
    return machines


def test_docker_sets_the_forward_policy_only_where_it_turned_forwarding_on(engines):
    """The two cases that the other tests go through."""
    h1, h2 = engines
    assert "-P FORWARD DROP" in h1.sh("iptables -S FORWARD")
    assert "-P FORWARD ACCEPT" in h2.sh("iptables -S FORWARD")


def test_the_bridge_and_containers_are_as_flanneld_says(engines):
    for machine in engines:
        env = dict(line.split("=", 1) for line in machine.read("/run/flannel/subnet.env").splitlines())
        assert f"inet {env['FLANNEL_SUBNET']} " in machine.sh("ip -4 address show dev docker0")
        assert f" mtu {env['FLANNEL_MTU']} " in machine.sh("docker exec c1 ip link show dev eth0")
        assert machine.container_address("c1").startswith(env["FLANNEL_SUBNET"].rpartition(".")[0])
        # Exactly one of the two masquerades, and flanneld does.
        assert "--ip-masq=false" in machine.read("/run/flannel/flannel_docker_opts.env")


def test_containers_reach_containers_and_hosts_of_the_other_side(engines):
    h1, h2 = engines
    for here, there in ((h1, h2), (h2, h1)):
        wait_until(lambda here=here: here.sh("ip route show dev flannel.1"))
        ping(here, "c1", there.container_address("c1"))
        ping(here, "c1", there.host.underlay(4))
        here.sh(f"ping -c 2 -W 5 {there.container_address('c1')}")


def test_a_container_sees_the_other_containers_address(engines):
    """Masquerading is for what leaves the network, not for what stays in it."""
    h1, h2 = engines
    h2.sh("docker exec -d c1 nc -l -p 5000 -e netstat -tn")
    seen = h1.sh(f"docker exec c1 nc -w 5 {h2.container_address('c1')} 5000 </dev/null")
    assert f"{h1.container_address('c1')}:" in seen


def test_a_changed_subnet_is_told_and_docker_follows_after_a_restart(engines, store):
    h1, h2 = engines
    old = {machine: machine.sh("sed -n s/^FLANNEL_SUBNET=//p /run/flannel/subnet.env").strip() for machine in engines}
    # Docker replaces one address of its bridge, and leaves others: such as one that was set by hand.
    h1.sh("ip address add 10.7.3.1/24 dev docker0")
    config(store, "10.6.0.0/16")
    for machine in engines:
        wait_until(lambda machine=machine: in_network(machine, "10.6."))
        new = machine.sh("sed -n s/^FLANNEL_SUBNET=//p /run/flannel/subnet.env").strip()
        told = f"the subnet of this host changed from {old[machine]} to {new}: restart the container runtime"
        wait_until(lambda machine=machine, told=told: told in machine.read("/var/log/flanneld.log"))
    for machine in engines:
        machine.stop_docker()
        said = machine.run("docker-bridge.sh").stderr
        assert f"removed {old[machine]} from docker0" in said
        assert ("removed 10.7.3.1/24 from docker0" in said) == (machine is h1)
        machine.sh(OPTIONS)
        machine.sh(START)
        machine.wait_docker()
        machine.sh("docker start c1")
    addresses = h1.sh("ip -4 -oneline address show dev docker0").splitlines()
    assert len(addresses) == 1
    assert "inet 10.6." in addresses[0]
    for here, there in ((h1, h2), (h2, h1)):
        wait_until(lambda here=here: "10.6." in here.sh("ip route show dev flannel.1"))
        ping(here, "c1", there.container_address("c1"))


def test_the_bridge_script_leaves_a_bridge_alone_that_is_as_it_should_be(engines):
    before = engines[0].sh("ip -4 -oneline address show dev docker0")
    done = engines[0].run("docker-bridge.sh")
    assert (done.returncode, done.stderr) == (0, "")
    assert engines[0].sh("ip -4 -oneline address show dev docker0") == before


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["-f", "/nowhere/subnet.env"], 1, "/nowhere/subnet.env is not there: does flanneld run"),
        (["-f", "/dev/null/x"], 1, "is not there"),
        (["-x"], 1, "usage:"),
        (["stray"], 1, "usage:"),
        (["-b", "no-such-bridge"], 0, ""),
    ],
)
def test_the_bridge_script_says_what_is_wrong(engines, arguments, code, words):
    done = engines[0].run("docker-bridge.sh", *arguments)
    assert done.returncode == code
    assert words in done.stderr


def test_the_bridge_script_wants_an_ipv4_subnet(engines):
    engines[0].write("/run/only6.env", "FLANNEL_IPV6_SUBNET=fd00:5::1/64\nFLANNEL_MTU=1450\n")
    done = engines[0].run("docker-bridge.sh", "-f", "/run/only6.env")
    assert done.returncode == 1
    assert "/run/only6.env has no FLANNEL_SUBNET" in done.stderr
