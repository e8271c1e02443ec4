"""With the real bridge and host-local, in namespaces: containers get what they should, and nothing of them is left."""

import json
import random
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from support.cni import ENV, Plugin, require_plugins
from support.netns import netns

pytestmark = pytest.mark.root

V6 = "FLANNEL_IPV6_NETWORK=fd00:1::/48\nFLANNEL_IPV6_SUBNET=fd00:1:0:17::1/64\n"


@pytest.fixture
def spaces():
    """Make namespaces that go at the test's end."""
    require_plugins()
    with ExitStack() as stack:
        yield lambda: stack.enter_context(netns())


@pytest.fixture
def host(spaces):
    return spaces()


@pytest.fixture
def plugin(tmp_path, host):
    plugin = Plugin(tmp_path, netns=host.name)
    plugin.write_env()
    return plugin


def path(pod):
    return f"/run/netns/{pod.name}"


def add(plugin, pod, **more):
    answer = plugin.call("ADD", plugin.conf(**more.pop("conf", {})), netns=path(pod), **more)
    assert answer.code == 0, answer
    return answer.json


def delete(plugin, pod=None, **more):
    conf = plugin.conf(**more.pop("conf", {}))
    answer = plugin.call("DEL", conf, netns=path(pod) if pod else "", **more)
    assert answer.code == 0, answer


def veths(host):
    return [link["ifname"] for link in host.json("ip -j link show type veth")]


def nothing_is_left(plugin, host):
    assert plugin.addresses() == []
    assert veths(host) == []
    assert not [each for each in plugin.state.rglob("*") if each.is_file()]


def test_dual_stack(plugin, host, spaces):
    plugin.write_env(V6 + ENV)
    pod = spaces()
    result = add(plugin, pod)
    assert [ip["address"] for ip in result["ips"]] == ["10.1.17.2/24", "fd00:1:0:17::2/64"]
    [link] = pod.json("ip -j addr show dev eth0")
    assert link["mtu"] == 1472
    [route] = pod.json("ip -j route show 10.1.0.0/16")
    assert route["gateway"] == "10.1.17.1"
    pod.run("ping -c1 -W2 10.1.17.1")
    delete(plugin, pod)
    nothing_is_left(plugin, host)


class TestCheck:
    def check(self, plugin, pod, result):
        return plugin.call("CHECK", plugin.conf(prevResult=result), netns=path(pod))

    def test_a_healthy_container(self, plugin, spaces):
        pod = spaces()
        plugin.write_env(V6 + ENV)
        result = add(plugin, pod)
        answer = self.check(plugin, pod, result)
        assert answer.code == 0, answer

    @pytest.mark.parametrize(
        ("damage", "words"),
        [
            ("addr flush dev eth0", "eth0"),
            ("route del 10.1.0.0/16", "not found in routing table"),
            ("link del eth0", "eth0"),
        ],
    )
    def test_damage_in_the_container(self, plugin, spaces, damage, words):
        pod = spaces()
        result = add(plugin, pod)
        pod.ip(damage)
        answer = self.check(plugin, pod, result)
        assert answer.code == 1
        assert words in answer.json["msg"]

    def test_a_lost_address(self, plugin, spaces):
        pod = spaces()
        result = add(plugin, pod)
        (plugin.leases / "cni-flannel" / "10.1.17.2").unlink()
        assert "Failed to find address" in self.check(plugin, pod, result).json["msg"]


class TestFailures:
    def test_del_twice_and_without_netns(self, plugin, host, spaces):
        pod = spaces()
        add(plugin, pod)
        delete(plugin, pod)
        delete(plugin, pod)
        delete(plugin)
        nothing_is_left(plugin, host)

    def test_add_twice(self, plugin, host, spaces):
        """The second is refused and the first stays in order."""
        pod = spaces()
        result = add(plugin, pod)
        answer = plugin.call("ADD", plugin.conf(), netns=path(pod))
        assert answer.code == 1
        assert "eth0" in answer.json["msg"]
        assert plugin.addresses() == ["10.1.17.2"]
        assert plugin.call("CHECK", plugin.conf(prevResult=result), netns=path(pod)).code == 0
        delete(plugin, pod)
        nothing_is_left(plugin, host)

    @pytest.mark.parametrize("content", ["", '{"type": "bri'])
    def test_corrupt_state(self, plugin, host, spaces, content):
        pod = spaces()
        add(plugin, pod)
        (plugin.state / "c1").write_text(content)
        delete(plugin, pod)
        nothing_is_left(plugin, host)

    def test_lost_state_and_lost_env(self, plugin, host, spaces):
        """The interface goes with its namespace; the address would be taken for ever."""
        pod = spaces()
        add(plugin, pod)
        (plugin.state / "c1").unlink()
        plugin.subnet_file.unlink()
        delete(plugin)
        assert plugin.addresses() == []

    def test_a_full_pool(self, plugin, host, spaces):
        plugin.write_env(ENV.replace("10.1.17.1/24", "10.1.17.1/29"))
        pods = [spaces() for _ in range(6)]
        for number, pod in enumerate(pods[:5]):
            add(plugin, pod, container=f"c{number}")
        answer = plugin.call("ADD", plugin.conf(), container="c5", netns=path(pods[5]))
        assert "no IP addresses available" in answer.json["msg"]
        delete(plugin, pods[5], container="c5")
        delete(plugin, pods[0], container="c0")
        add(plugin, pods[5], container="c5")
        for number, pod in enumerate(pods):
            delete(plugin, pod, container=f"c{number}")
        nothing_is_left(plugin, host)

    def test_killed_adds(self, plugin, host, spaces):
        pod = spaces()
        randomness = random.Random(7)
        for number in range(15):
            process = subprocess.Popen(
                plugin.argv(),
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=plugin.environment("ADD", f"k{number}", path(pod), "eth0"),
            )
            process.stdin.write(json.dumps(plugin.conf()).encode())
            process.stdin.close()
            time.sleep(randomness.uniform(0, 0.08))  # wherever it is by then
            process.kill()
            process.wait(10)
            delete(plugin, pod, container=f"k{number}")
        # host-local, which the killed bridge had started, may still be at work; the runtime's GC comes later.
        answer = plugin.call("GC", plugin.conf(version="1.1.0", **{"cni.dev/valid-attachments": []}))
        assert answer.code == 0, answer
        nothing_is_left(plugin, host)

    def test_200_times_leaves_nothing(self, plugin, host, spaces):
        pods = [spaces() for _ in range(8)]

        def cycle(number):
            for turn in range(25):
                container = f"c{number}-{turn}"
                add(plugin, pods[number], container=container)
                # Runtimes call DEL as they like: with or without the namespace, once or twice.
                if turn % 3 == 0:
                    delete(plugin, container=container)
                delete(plugin, pods[number], container=container)

        with ThreadPoolExecutor(len(pods)) as pool:
            list(pool.map(cycle, range(len(pods))))
        nothing_is_left(plugin, host)


class TestGc:
    def test_addresses_and_interfaces_of_what_is_gone(self, plugin, host, spaces):
        pods = [spaces() for _ in range(3)]
        for number, pod in enumerate(pods):
            add(plugin, pod, container=f"c{number}")
        (plugin.state / "c2").unlink()
        valid = [{"containerID": "c1", "ifname": "eth0"}]
        answer = plugin.call("GC", plugin.conf(version="1.1.0", **{"cni.dev/valid-attachments": valid}))
        assert answer.code == 0, answer
        assert plugin.addresses() == ["10.1.17.3"]
        assert [len(pod.json("ip -j link show type veth")) for pod in pods[:2]] == [0, 1]
        assert sorted(each.name for each in plugin.state.rglob("*") if each.is_file()) == ["c1", "c1:eth0"]
        pods[1].run("ping -c1 -W2 10.1.17.1")


class TestNamedNetworks:
    def test_each_has_its_bridge(self, plugin, host, spaces):
        for number, color in enumerate(("blue", "green")):
            subnet = plugin.directory / f"{color}.env"
            subnet.write_text(ENV.replace("10.1.", f"10.{number + 2}."))
            conf = {"name": color, "network": color, "subnetFile": str(subnet)}
            add(plugin, spaces(), conf=conf, container=color)
        bridges = host.json("ip -j addr show type bridge")
        assert {link["ifname"]: link["addr_info"][0]["local"] for link in bridges} == {
            "cni-blue": "10.2.17.1",
            "cni-green": "10.3.17.1",
        }
