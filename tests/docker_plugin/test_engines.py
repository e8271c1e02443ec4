"""Docker networks over two real engines: the same network is one, others are apart, and nothing is left behind.

The engines are shared by all tests of this file; each test removes what it made, and the last look is at what is left.
"""

import contextlib
import signal
import socket

import pytest

from support.engine import until
from wincey.lab.namespace import call_in
from wincey.store.sqlite import SqliteStore

WEB = "10.5.200.0/22"
OTHER = "10.5.208.0/22"


@pytest.fixture
def clean(engines):
    """The test's containers and networks go at its end, and with them all that the plugin made."""
    yield engines
    for engine in engines:
        engine.sh(
            "docker ps -aq | xargs -r docker rm -f; docker network ls -qf driver=wincey | xargs -r docker network rm"
        )
        assert engine.left_behind() == []


@contextlib.asynccontextmanager
async def opened(engine):
    store = SqliteStore(engine.store.removeprefix("sqlite:"))
    try:
        yield store
    finally:
        await store.close()


async def blocks(engine):
    """The keys that the plugin has in the store: leases longer than the hosts', and the records beside them."""
    async with opened(engine) as store:
        keys = [entry.key for entry in (await store.read_all("/coreos.com/network/")).entries]
    return [key for key in keys if "/wincey/docker/" in key or ("/subnets/" in key and not key.endswith("-24"))]


async def test_one_network_on_two_engines(clean):
    h1, h2 = clean
    for engine in clean:
        engine.network("web", "--subnet", WEB)
    here, there = h1.start("c1", "web"), h2.start("c2", "web")
    assert here != there
    until(lambda: h1.reaches("c1", there), "a container on the other host answers")
    assert h2.reaches("c2", here)
    assert h1.fetches("c1", there)
    assert h2.fetches("c2", here)
    # Addresses are kept, though flanneld masquerades what it does not know.
    h2.sh("docker exec -d c2 sh -c 'nc -l -p 7000 </dev/null >/dev/null'")
    script = f"(sleep 3) | nc {there} 7000 & sleep 1; wait"
    h1.sh(f"docker exec -d c1 sh -c '{script}'")
    until(lambda: here in h2.sh("docker exec c2 netstat -tn"), "the other host sees the container's own address")
    mtu = h1.sh("sed -n s/^FLANNEL_MTU=//p /run/flannel/subnet.env").strip()
    assert f"mtu {mtu} " in h1.docker("exec", "c1", "ip", "link", "show", "eth0")
    assert len(await blocks(h1)) == 4  # a lease and a record of each engine
    assert h1.reaches("c1", "10.99.0.2")  # the outside, masqueraded: there is no route back to the container
    for engine, name in zip(clean, ("c1", "c2"), strict=True):
        engine.docker("rm", "-f", name)
        engine.docker("network", "rm", "web")
    assert await blocks(h1) == []


def test_networks_are_apart(clean):
    h1, h2 = clean
    for engine in clean:
        engine.network("web", "--subnet", WEB)
        engine.network("other", "--subnet", OTHER)
        engine.network("own")
    web, other = h1.start("web1", "web"), h1.start("other1", "other")
    web2, other2 = h2.start("web2", "web", "--cap-add", "NET_ADMIN"), h2.start("other2", "other")
    own, own2 = h1.start("own1", "own"), h2.start("own2", "own")
    until(lambda: h2.reaches("web2", web), "the network works")
    everyone = [web, web2, other, other2, own, own2]
    assert h2.reached("web2", everyone) == {web, web2}
    assert h1.reached("web1", everyone) == {web, web2}
    assert h2.reached("other2", everyone) == {other, other2}
    assert h2.reached("own2", everyone) == {own, own2}
    assert h1.reached("own1", everyone) == {own, own2}
    # Nor with an address of the other network, nor by a route past the gateway.
    stolen = other2.rpartition(".")[0] + "." + str(int(other2.rpartition(".")[2]) + 5)
    h2.docker("exec", "web2", "ip", "address", "add", f"{stolen}/32", "dev", "eth0")
    for address in (other, other2):
        spoofed = h2.run("docker", "exec", "web2", "ping", "-c", "1", "-W", "1", "-I", stolen, address)
        assert spoofed.returncode != 0
    h2.docker("exec", "web2", "ip", "route", "add", other2, "dev", "eth0")
    assert not h2.reaches("web2", other2)
    assert h2.reaches("web2", web)


def test_a_container_can_not_send_what_only_hosts_send(clean):
    """A packet in an envelope of the overlay would come out on the other host as from any network its sender likes."""
    h1, h2 = clean
    h1.network("web", "--subnet", WEB)
    h1.start("c1", "web")
    with contextlib.ExitStack() as stack:
        listeners = [
            stack.enter_context(call_in(h2.host.netns, lambda: socket.socket(type=socket.SOCK_DGRAM))) for _ in "ab"
        ]
        for listener, port in zip(listeners, (8285, 9000), strict=True):
            listener.bind(("10.99.0.2", port))
            listener.settimeout(30)
            h1.run("docker", "exec", "c1", "timeout", "2", "tftp", "-g", "-r", "hello", "10.99.0.2", str(port))
        assert b"hello" in listeners[1].recv(100)  # any other packet arrives
        listeners[0].setblocking(False)
        with pytest.raises(BlockingIOError):
            listeners[0].recv(100)


def test_an_internal_network_does_not_reach_the_outside(clean):
    h1, h2 = clean
    for engine in clean:
        engine.network("back", "--internal", "--subnet", WEB)
    there = h2.start("c2", "back")
    h1.start("c1", "back")
    until(lambda: h1.reaches("c1", there), "the network works")
    assert not h1.reaches("c1", "10.99.0.2")
    h1.docker("network", "rm", "back", refused="active endpoints")


def test_ports_are_published(clean):
    h1, h2 = clean
    h1.network("web", "--subnet", WEB)
    h1.start("c1", "web", "-p", "8080:80")
    assert h1.fetches_itself("10.99.0.1:8080")
    assert h1.fetches_itself("127.0.0.1:8080")
    assert h2.fetches_itself("10.99.0.1:8080")
    assert h1.fetches("c1", "10.99.0.1:8080")
    h1.docker(
        *("run", "--name", "c3", "--network", "web", "-p", "8080:80", "busybox", "true"),
        refused="port 0.0.0.0:8080/tcp is in use on this host already",
    )
    h1.docker("rm", "-f", "c1")
    assert not h2.fetches_itself("10.99.0.1:8080")


def test_wrong_wishes_are_explained(clean):
    h1, h2 = clean
    h1.network(
        "bad", "--subnet", "10.9.0.0/24", refused="is not a part of the container network of this cluster (10.5.0.0/16)"
    )
    h1.network("bad", "--subnet", "10.5.3.0/24", refused="lies among the subnets that hosts lease")
    h1.network("bad", "--subnet", WEB, "--ipam-opt", "block=20", refused="say how long by --ipam-opt block=LENGTH")
    h1.network("bad", "--subnet", WEB, "--ipam-opt", "blok=26", refused="unknown --ipam-opt blok")
    h1.network("bad", "--subnet", WEB, "--opt", "color=blue", refused="unknown --opt color")
    h1.network("bad", "--subnet", WEB, "--opt", "mtu=9000", refused="--opt mtu=9000: it must be 576 to")
    h1.network("bad", "--ipam-opt", "network=blue", refused="this host is in no container network 'blue'")
    h1.network("bad", "--subnet", WEB, "--opt", "network=blue", refused="say --ipam-opt network=blue as well")
    h1.network("bad", "--subnet", WEB, "--ip-range", "10.5.200.0/24", refused="leave out --ip-range")
    h1.network("bad", "--subnet", WEB, "--gateway", "10.5.200.1", refused="--gateway 10.5.200.1: leave it out")
    h1.docker("network", "create", "-d", "wincey", "bad", refused="say --ipam-driver wincey as well")
    h1.network("web", "--subnet", WEB)
    h1.network("bad", "--subnet", WEB, refused="this engine has a docker network already with --subnet 10.5.200.0/22")
    h2.network("bad", "--subnet", "10.5.200.0/23", refused="overlaps 10.5.200.0/22, another docker network")
    h1.docker(
        *("run", "--network", "web", "--ip", "10.5.1.9", "busybox", "true"),
        refused="does not belong to any of this network's subnets",
    )
    h1.docker("ps", "-aq")


async def test_addresses_run_out_and_come_back(clean):
    h1, _ = clean
    h1.network("tiny", "--subnet", "10.5.200.0/28", "--ipam-opt", "block=29")
    for number in range(5):
        h1.docker(
            "create", "--name", f"c{number}", "--network", "tiny", "--stop-signal", "KILL", "busybox", "sleep", "600"
        )
        h1.docker("start", f"c{number}")
    h1.docker(
        "run", "--name", "c9", "--network", "tiny", "busybox", "true", refused="all 5 addresses of this engine's block"
    )
    gone = h1.address("c3")
    h1.docker("rm", "-f", "c3")
    assert h1.start("c5", "tiny") == gone
    assert len(await blocks(h1)) == 2


def test_blocks_run_out(clean):
    h1, h2 = clean
    h1.network("tiny", "--subnet", "10.5.200.0/29", "--ipam-opt", "block=29")
    h2.network(
        "tiny", "--subnet", "10.5.200.0/29", "--ipam-opt", "block=29", refused="all 1 blocks (/29) of 10.5.200.0/29"
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_plugin_restarts(clean, number):
    h1, h2 = clean
    for engine in clean:
        engine.network("web", "--subnet", WEB)
    here, there = h1.start("c1", "web"), h2.start("c2", "web")
    until(lambda: h1.reaches("c1", there), "the network works")
    h1.stop_plugin(number)
    assert h1.reaches("c1", there)
    if number == signal.SIGKILL:  # and what only a boot does
        h1.sh(
            "nft delete table ip wincey-docker; ip -o link show type bridge | cut -d: -f2 | grep wb- | xargs -rn1 ip link del"
        )
    h1.start_plugin()
    until(lambda: "wincey-docker" in h1.sh("nft list tables"), "the rules are back")
    fresh = h1.start("c3", "web")
    assert fresh not in {here, there}
    until(lambda: h1.reaches("c3", there), "new containers work")
    assert h1.docker("restart", "-t", "0", "c1") == "c1"
    until(lambda: h2.reaches("c2", h1.address("c1")), "and so do old ones")


@pytest.mark.parametrize("number", ["TERM", "KILL"])
def test_docker_restarts(clean, number):
    h1, h2 = clean
    for engine in clean:
        engine.network("web", "--subnet", WEB)
    h1.start("c1", "web", "--restart", "always")
    there = h2.start("c2", "web")
    until(lambda: h1.reaches("c1", there), "the network works")
    pid = h1.sh("cat /run/docker.pid").strip()
    h1.sh(f"kill -{number} {pid}")
    until(
        lambda: h1.run("test", "-d", f"/proc/{pid}/fd").returncode != 0 or h1.run("ls", f"/proc/{pid}/fd").stdout == "",
        "end",
    )
    h1.sh("rm -f /run/docker.pid /run/docker/containerd/containerd.pid")  # nobody may have reaped them yet
    h1.start_docker()
    until(lambda: h1.reaches("c1", there), "the container is back in its network")
    assert h2.reaches("c2", h1.address("c1"))
    veths = [line for line in h1.sh("ip -o link show type veth").splitlines() if "wv-" in line]
    assert len(veths) == 1


async def test_nothing_leaks(clean):
    h1, _ = clean
    before = len(h1.sh("ip -o link").splitlines())
    for _ in range(3):
        h1.network("web", "--subnet", WEB)
        for name in ("c1", "c2"):
            h1.docker("run", "--rm", "--name", name, "--network", "web", "busybox", "true")
        h1.docker("run", "--rm", "--network", "web", "busybox", "/no/such/program", refused="no such file")
        h1.docker("network", "rm", "web")
    assert len(h1.sh("ip -o link").splitlines()) == before
    assert h1.left_behind() == []
    assert await blocks(h1) == []
    state = h1.read("/var/lib/wincey/docker-plugin.json")
    assert '"networks": {}' in state
    assert '"pools": {}' in state


async def test_flanneld_leaves_the_blocks_alone(clean):
    """A block has this host's public address in it; a restart of flanneld must neither take nor release it."""
    h1, h2 = clean
    for engine in clean:
        engine.network("web", "--subnet", WEB)
    before = await blocks(h1)
    h1.start("c1", "web")
    there = h2.start("c2", "web")
    until(lambda: h1.reaches("c1", there), "the network works")
    h1.stop_flanneld()
    h1.start_flanneld()
    assert await blocks(h1) == before
    assert h1.reaches("c1", there)
