"""The keeper's life: it outlives daemons, hands over without loss, ends with its device, and is found and mended."""

import asyncio
import contextlib
import os
import re
import signal
import socket
import sys
from pathlib import Path

import pytest

from wincey.model.address import Subnet, parse_address
from wincey.model.state import Changes, Scope, Tunnel, TunnelPeer
from wincey.tunnel.control import BUILD, connect, control_name, decode, encode
from wincey.tunnel.driver import TunnelDriver

pytestmark = pytest.mark.root

SCOPE = Scope(("flannel0",))

DAEMON = """
import asyncio, sys
from pathlib import Path
from wincey.model.address import Subnet, parse_address
from wincey.model.state import Changes, Tunnel, TunnelPeer
from wincey.tunnel.driver import TunnelDriver

async def main():
    driver = TunnelDriver(Path(sys.argv[1]))
    tunnel = Tunnel("flannel0", 1472, parse_address("10.99.0.1"), 8285)
    peer = TunnelPeer("flannel0", Subnet.parse("10.3.2.0/24"), parse_address("10.99.0.2"))
    assert await driver.apply(Changes([tunnel, peer])) == []
    print("ready", flush=True)
    await asyncio.sleep(3600)

asyncio.run(main())
"""

OLD = """
import sys
from wincey.tunnel import __main__, keeper
keeper.BUILD = "0/0.0.1"
sys.exit(__main__.main(sys.argv[1:]))
"""


def lost(output):
    sent, received = map(int, re.search(r"(\d+) packets transmitted, (\d+) received", output).groups())
    assert sent > 100
    return sent - received


def start_old(host):
    """A keeper of an earlier release, with its peer."""
    host.directory.mkdir(exist_ok=True)
    with host.inside():
        path = str(host.directory / control_name("flannel0"))
    host.python(OLD, path, "flannel0", "1472", host.local, "8285")


def ask(path, header, body=b""):
    with connect(str(path), blocking=True) as sock:
        sock.settimeout(10)
        sock.sendall(encode(header, body))
        buffer = bytearray()
        while (frame := decode(buffer)) is None:
            data = sock.recv(65536)
            assert data
            buffer += data
        return frame


def control(host):
    with host.inside():
        return host.directory / control_name("flannel0")


async def gone(pid):
    """Until a process has ended (a zombie has)."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        while " Z " not in Path(f"/proc/{pid}/stat").read_text():
            await asyncio.sleep(0.05)


async def ended(calls, count=1):
    """Until a driver has called `count` times, or 10 s."""
    for _ in range(200):
        if len(calls) >= count:
            break
        await asyncio.sleep(0.05)
    return calls


async def test_what_is_applied_is_observed(host):
    objects = host.objects()
    assert await host.observe(objects) == {}
    assert await host.apply(objects) == []
    assert await host.observe(objects) == {thing.key: thing for thing in objects}
    assert await host.observe(objects, Scope()) == {thing.key: thing for thing in objects}
    assert await host.observe() == {thing.key: thing for thing in objects}
    assert await host.observe(scope=Scope()) == {}


async def test_deleting_the_tunnel_leaves_nothing(host):
    objects = host.objects()
    assert await host.apply(objects) == []
    (keeper,) = host.pids()
    assert await host.apply(delete=objects) == []
    assert "flannel0" not in host.ip("-br", "link").stdout
    assert list(host.directory.iterdir()) == []
    await gone(keeper)
    assert await host.apply(delete=objects) == []


async def test_the_keeper_is_small_and_has_nothing_of_the_daemon(host, monkeypatch):
    monkeypatch.setenv("FLANNELD_ETCD_PASSWORD", "secret")
    tunnel = host.objects()[0]
    peers = [
        TunnelPeer("flannel0", Subnet(bytes((10, 64 + (i >> 8), i & 255, 0)), 24), bytes((10, 99, i >> 8, i & 255)))
        for i in range(256, 10_256)
    ]
    assert await host.apply([tunnel, *peers]) == []
    assert await host.observe() == {thing.key: thing for thing in (tunnel, *peers)}
    assert await host.apply(delete=peers[:5000]) == []
    assert len(await host.observe()) == 5001
    (keeper,) = host.pids()
    status = Path(f"/proc/{keeper}/status").read_text()
    assert int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) < 16_000
    assert b"secret" not in Path(f"/proc/{keeper}/environ").read_bytes()
    assert os.readlink(f"/proc/{keeper}/cwd") == "/"
    assert {os.readlink(f"/proc/{keeper}/fd/{number}") for number in range(3)} == {"/dev/null"}
    assert os.getsid(keeper) != os.getsid(0)
    assert control(host).stat().st_mode & 0o777 == 0o600


async def test_the_daemons_death_loses_no_packet(hosts):
    a, b = hosts
    assert await b.apply(b.objects()) == []
    b.bring_up()
    with a.started(sys.executable, "-c", DAEMON, str(a.directory)) as daemon:
        assert daemon.stdout.readline() == "ready\n"
        a.bring_up()
        before = a.pids()
        with a.container.started("ping", "-n", "-q", "-i", "0.01", "-c", "200", "10.3.2.2") as ping:
            await asyncio.sleep(0.5)
            os.kill(daemon.pid, signal.SIGKILL)
            daemon.wait()
            await asyncio.sleep(0.2)
            assert await a.apply(a.objects()) == []  # the next daemon
            output, _ = ping.communicate(timeout=60)
    assert lost(output) == 0
    assert a.pids() == before


async def test_another_release_takes_over_and_loses_no_packet(hosts):
    a, b = hosts
    start_old(a)
    assert await b.apply(b.objects()) == []
    tunnel, peer = a.objects()
    ask(control(a), {"do": "peers"}, peer.subnet.address + bytes([24]) + peer.endpoint)
    a.bring_up()
    b.bring_up()
    (old,) = a.pids()
    index = a.ip("-o", "link", "show", "flannel0").stdout.partition(":")[0]
    with a.container.started("ping", "-n", "-q", "-i", "0.01", "-c", "200", "10.3.2.2") as ping:
        await asyncio.sleep(0.5)
        before = ask(control(a), {"do": "show"})[0]
        assert await a.observe(a.objects()) == {thing.key: thing for thing in (tunnel, peer)}
        output, _ = ping.communicate(timeout=60)
    assert lost(output) == 0
    after = ask(control(a), {"do": "show"})[0]
    assert (before["build"], after["build"]) == ("0/0.0.1", BUILD)
    await gone(old)
    assert [pid for pid in a.pids() if pid != old] == [after["pid"]]
    assert a.ip("-o", "link", "show", "flannel0").stdout.partition(":")[0] == index
    assert after["counters"]["in.packets"] >= 200  # counted on


async def test_a_keeper_that_is_not_wanted_is_not_replaced_but_ended(host):
    start_old(host)
    (old,) = host.pids()
    found = await host.observe()
    assert host.pids() == [old]
    assert await host.apply(delete=found.values()) == []
    await gone(old)


async def test_a_keeper_that_can_not_hand_over_is_replaced(host):
    host.directory.mkdir(exist_ok=True)
    with host.inside():
        path = str(host.directory / control_name("flannel0"))
    crippled = OLD.replace("sys.exit", "keeper.Keeper._handover = keeper.Keeper._peers\nsys.exit")
    host.python(crippled, path, "flannel0", "1472", host.local, "8285")
    (old,) = host.pids()
    objects = host.objects()
    assert await host.observe(objects) == {}
    assert host.pids() == [old]
    assert await host.apply(objects) == []
    await gone(old)
    assert await host.observe(objects) == {thing.key: thing for thing in objects}


async def test_a_deleted_device_is_noticed_and_repaired(hosts):
    a, b = hosts
    assert await b.apply(b.objects()) == []
    b.bring_up()
    objects = a.objects()
    calls = []
    with a.inside():
        driver = TunnelDriver(a.directory)
        driver.watch(calls.append)
        assert await driver.apply(Changes(objects)) == []
        a.bring_up()
        a.ip("link", "del", "flannel0")
        assert await ended(calls) == ["the udp tunnel flannel0 ended"]
        assert await driver.observe({thing.key: thing for thing in objects}, SCOPE) == {}
        assert await driver.apply(Changes(objects)) == []
        a.bring_up()
        assert ", 0% packet loss" in a.container.ping("10.3.2.2")
        await driver.close()
    assert len(calls) == 1


async def test_a_killed_keeper_is_noticed_and_repaired(host):
    objects = host.objects()
    calls = []
    with host.inside():
        driver = TunnelDriver(host.directory)
        driver.watch(calls.append)
        assert await driver.apply(Changes(objects)) == []
        (keeper,) = host.pids()
        os.kill(keeper, signal.SIGKILL)
        assert len(await ended(calls)) == 1
        assert "flannel0" not in host.ip("-br", "link").stdout
        assert await driver.observe({thing.key: thing for thing in objects}, SCOPE) == {}
        failures = await driver.apply(Changes(objects[1:]))
        assert [(failure.object, failure.reason) for failure in failures] == [
            (objects[1], "the udp tunnel flannel0 does not run")
        ]
        assert await driver.apply(Changes(objects)) == []
        assert await driver.observe({}, SCOPE) == {thing.key: thing for thing in objects}
        os.kill(ask(control(host), {"do": "show"})[0]["pid"], signal.SIGKILL)
        assert len(await ended(calls, 2)) == 2
        assert await driver.observe({}, SCOPE) == {}
        assert list(host.directory.iterdir()) == []  # where it is not wanted, not even its dead socket stays
        await driver.close()


@pytest.mark.parametrize("words", [("name", "other0"), ("netns", "CONTAINER")])
async def test_a_device_renamed_or_moved_is_made_anew(host, words):
    objects = host.objects()
    assert await host.apply(objects) == []
    (old,) = host.pids()
    host.ip("link", "set", "flannel0", *(host.container.name if word == "CONTAINER" else word for word in words))
    assert await host.observe(objects) == {}
    assert await host.apply(objects) == []
    assert await host.observe(objects) == {thing.key: thing for thing in objects}
    assert "flannel0" in host.ip("-br", "link").stdout
    assert "other0" not in host.ip("-br", "link").stdout
    await gone(old)


async def test_ending_does_not_count_as_an_accident(host):
    calls = []
    with host.inside():
        driver = TunnelDriver(host.directory)
        driver.watch(calls.append)
        objects = host.objects()
        assert await driver.apply(Changes(objects)) == []
        assert await driver.apply(Changes(delete=objects)) == []
        assert await driver.apply(Changes(objects)) == []
        await driver.close()
    assert calls == []


async def test_another_port_address_and_mtu_keep_the_device(joined):
    a, b = joined
    index = a.ip("-o", "link", "show", "flannel0").stdout.partition(":")[0]
    for host in joined:
        assert await host.apply(host.objects(port=9999, mtu=1400)) == []
    assert a.ip("-o", "link", "show", "flannel0").stdout.partition(":")[0] == index
    assert "mtu 1400 " in a.ip("link", "show", "flannel0").stdout
    assert ", 0% packet loss" in a.container.ping("10.3.2.2")
    assert await a.observe() == {thing.key: thing for thing in a.objects(port=9999, mtu=1400)}

    a.ip("addr", "add", "10.99.0.11/24", "dev", "eth0")
    moved = Tunnel("flannel0", 1400, parse_address("10.99.0.11"), 9999)
    assert await a.apply([moved]) == []
    peer = TunnelPeer("flannel0", Subnet.parse("10.3.1.0/24"), moved.local)
    assert await b.apply([peer]) == []
    assert ", 0% packet loss" in a.container.ping("10.3.2.2")

    absent = Tunnel("flannel0", 1400, parse_address("10.99.0.12"), 9999)
    (failure,) = await a.apply([absent])
    assert failure.object == absent
    assert "10.99.0.12:9999: Cannot assign requested address" in failure.reason
    assert ", 0% packet loss" in a.container.ping("10.3.2.2")  # as before


async def test_failures_say_why(host):
    objects = host.objects()
    host.ip("link", "add", "flannel0", "type", "bridge")
    failures = await host.apply(objects)
    assert [failure.object for failure in failures] == objects
    assert "flannel0" in failures[0].reason
    host.ip("link", "del", "flannel0")

    with host.inside():
        taken = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with taken:
        taken.bind((host.local, 8285))
        failures = await host.apply(objects)
    assert "UDP 10.99.0.1:8285: Address already in use" in failures[0].reason
    assert host.pids() == []
    assert "flannel0" not in host.ip("-br", "link").stdout


async def test_a_device_in_other_hands_is_told(host):
    proxy = Path(__file__).parents[1] / "support" / "flannel_proxy.py"
    with host.started(sys.executable, str(proxy), "flannel0", host.local, "8285") as process:
        assert process.stdout.readline() == "ready\n"
        failures = await host.apply(host.objects())
    assert "another program holds the device flannel0" in failures[0].reason


async def test_ipv6_peers_fail_alone(host):
    tunnel, peer = host.objects()
    wrong = TunnelPeer("flannel0", Subnet.parse("fd00:3::/64"), peer.endpoint)
    assert [failure.object for failure in await host.apply([tunnel, wrong, peer])] == [wrong]
    assert await host.observe() == {thing.key: thing for thing in (tunnel, peer)}


async def test_the_control_socket_is_served_under_load(joined):
    a, b = joined
    flood = "import socket\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\nprint('ready', flush=True)\n"
    flood += "while True:\n    s.sendto(bytes(64), ('10.3.2.2', 9))"
    with a.container.started(sys.executable, "-c", flood) as sender:
        assert sender.stdout.readline() == "ready\n"
        seen = []
        for _ in range(20):
            seen.append((await a.counters())["out.packets"])
            assert await b.observe() == {thing.key: thing for thing in b.objects()}
    assert seen[-1] > seen[0]


async def test_two_daemons_that_start_at_once_share_one_keeper(host):
    objects = host.objects()
    with host.inside():
        drivers = [TunnelDriver(host.directory) for _ in range(3)]
        assert await asyncio.gather(*(driver.apply(Changes(objects)) for driver in drivers)) == [[], [], []]
        for driver in drivers:
            assert await driver.observe({}, SCOPE) == {thing.key: thing for thing in objects}
            await driver.close()
    assert len(host.pids()) == 1


async def test_a_prepared_persistent_device_becomes_the_keepers(host):
    host.ip("tuntap", "add", "flannel0", "mode", "tun")
    objects = host.objects()
    assert await host.apply(objects) == []
    assert await host.apply(delete=objects) == []
    assert "flannel0" not in host.ip("-br", "link").stdout


async def test_nonsense_on_the_control_socket_harms_nothing(host):
    objects = host.objects()
    assert await host.apply(objects) == []
    path = control(host)
    for junk in (b"\xff" * 64, b"GET / HTTP/1.1\r\n\r\n", encode({})[:6]):
        with connect(str(path), blocking=True) as sock:
            sock.sendall(junk)
    assert "knows no request" in ask(path, {"do": "dance"})[0]["error"]
    assert "malformed" in ask(path, {"do": "peers"}, b"junk")[0]["error"]
    assert "error" in ask(path, {"do": "configure", "mtu": 99999999, "local": host.local, "port": 8285})[0]
    assert "error" in ask(path, {"do": "configure", "mtu": "x"})[0]
    assert "error" in ask(path, {"do": "configure", "mtu": 1400, "local": host.local, "port": 99999})[0]
    assert await host.observe() == {thing.key: thing for thing in objects}
