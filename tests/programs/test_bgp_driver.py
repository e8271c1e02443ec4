"""The BGP driver with a real BIRD and a real FRR: what is changed by hand, what is in the way, and whose BIRD it is."""

import asyncio
import errno
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest

from support.bgp import needs_bird_and_frr
from support.netns import joined
from wincey.kernel.diff import diff
from wincey.model.address import Subnet, parse_address
from wincey.model.bgp import Accepted, BgpPeer, BgpRoute, BgpSpeaker
from wincey.model.errors import NotJoinable
from wincey.model.secret import Secret
from wincey.model.state import Scope
from wincey.programs.bgp import launch, question
from wincey.programs.bgp.driver import BgpDriver
from wincey.programs.bgp.files import Applied, Room

pytestmark = [pytest.mark.root, needs_bird_and_frr]

KINDS = pytest.mark.parametrize("kind", ["bird", "frr"])


def ip(text):
    return parse_address(text)


def net(text):
    return Subnet.parse(text)


def speaker(kind, **changes):
    values = {
        "daemon": kind,
        "instance": "own",
        "asn": 64512,
        "port": 1179,
        "router_id": ip("10.99.0.1"),
        "local": ip("10.99.0.1"),
        "local_v6": None,
        "subnets": (net("10.3.1.0/24"),),
        "accepted": (Accepted(net("10.3.0.0/16"), 24),),
    }
    return BgpSpeaker(**(values | changes))


PEER = BgpPeer(ip("10.99.0.2"), 64512, 1179, (net("10.3.2.0/24"),))
OTHER = BgpPeer(ip("10.99.0.3"), 64512, 1179, (net("10.3.3.0/24"),))
ROUTE = BgpRoute(net("10.3.2.0/24"), ip("10.99.0.2"), ip("10.99.0.2"))
FAR = """
router id 10.99.0.2; protocol device { }
protocol static { ipv4; route 10.3.2.0/24 blackhole; route 10.3.9.0/24 blackhole; }
protocol bgp near { local 10.99.0.2 port 1179 as 64512; neighbor 10.99.0.1 port 1179 as 64512; direct; connect delay time 1;
  ipv4 { import all; export all; next hop self; }; }
"""


@pytest.fixture
def hosts():
    """Two joined namespaces."""
    with joined() as pair:
        yield pair


@pytest.fixture
def directory():
    """A directory that users without rights may pass through; what runs from it is ended."""
    path = Path(tempfile.mkdtemp(prefix="wincey-bgp-", dir="/run"))
    path.chmod(0o755)
    yield path
    for pidfile in path.rglob("*.pid"):
        if pid := launch.running(pidfile, str(path)):
            os.kill(pid, signal.SIGKILL)
    shutil.rmtree(path)


def bird(netns, directory, name, config):
    """Start a BIRD that is not ours."""
    path, control, pidfile = (directory / f"{name}.{end}" for end in ("conf", "ctl", "pid"))
    path.write_text(config)
    netns.run(f"bird -c {path} -s {control} -P {pidfile}")
    return control


async def audit(driver, *desired):
    """What an audit does; the differences that it found, and what could not be made so."""
    wanted = {item.key: item for item in desired}
    changes = diff(wanted, await driver.observe(wanted, Scope()))
    return changes, [failure.reason for failure in await driver.apply(changes)]


async def settled(driver, *desired):
    """Audit until nothing differs any more."""
    for _ in range(100):
        changes, _ = await audit(driver, *desired)
        if not changes:
            return
        await asyncio.sleep(0.2)
    pytest.fail(f"never settled: {changes}")


@KINDS
def test_changes_by_hand_are_undone(hosts, directory, kind):
    desired = (speaker(kind), PEER, OTHER)

    async def work():
        driver = BgpDriver(directory)
        changes, failures = await audit(driver, *desired)
        assert (len(changes.put), failures) == (3, [])
        await settled(driver, *desired)
        run = directory / "bgp" / "run"
        if kind == "frr":
            hand = [
                "vtysh",
                "--vty_socket",
                str(run),
                "-c",
                "conf t",
                "-c",
                "router bgp",
                "-c",
                "no neighbor 10.99.0.3",
            ]
            subprocess.run(hand, check=True, capture_output=True)
            changes, failures = await audit(driver, *desired)
            assert (changes.put, failures) == ([OTHER], [])
            await settled(driver, *desired)
        path = directory / "bgp" / ("bird.conf" if kind == "bird" else "bgpd.conf")
        text = path.read_text()
        path.write_text(text + "# by hand\n" if kind == "bird" else text + "! by hand\n")
        changes, failures = await audit(driver, *desired)
        assert (changes.put, failures) == ([desired[0]], [])
        assert path.read_text() == text
        await settled(driver, *desired)
        await driver.close()

        driver = BgpDriver(directory)  # a daemon that starts anew finds all of it
        assert not (await audit(driver, *desired))[0]
        await driver.close()

        driver = BgpDriver(directory)
        changes, failures = await audit(driver)
        assert (len(changes.delete), failures) == (3, [])
        assert not (await audit(driver))[0]
        assert not (directory / "bgp").exists()
        await driver.close()

    hosts[0].run_async(work)


def test_one_program_takes_the_place_of_the_other(hosts, directory):
    async def work():
        driver = BgpDriver(directory)
        for kind, other in (("bird", "frr"), ("frr", "bird"), ("bird", "frr")):
            await settled(driver, speaker(kind), PEER)
            there = {path.name for path in directory.rglob("*.pid")}
            assert there == ({"bird.pid"} if kind == "bird" else {"zebra.pid", "bgpd.pid"}), other
        changed = msgspec.structs.replace(speaker("bird"), password=Secret("new"), bfd=True, port=1180)
        await settled(driver, changed, PEER)
        await audit(driver)
        await driver.close()

    hosts[0].run_async(work)


@KINDS
def test_a_taken_port(hosts, directory, kind):
    async def work():
        with socket.create_server(("10.99.0.1", 1179)):
            driver = BgpDriver(directory)
            _, failures = await audit(driver, speaker(kind))
            await driver.close()
        return failures

    [reason] = hosts[0].run_async(work)
    assert "TCP port 1179 of 10.99.0.1" in reason
    assert "Backend.Port" in reason


@KINDS
def test_a_directory_that_its_user_may_not_pass(hosts, directory, kind):
    directory.chmod(0o700)

    async def work():
        driver = BgpDriver(directory / "inner")
        _, failures = await audit(driver, speaker(kind))
        await driver.close()
        return failures

    [reason] = hosts[0].run_async(work)
    assert f"user {kind}, which may not pass through {directory}" in reason


@KINDS
def test_beside_the_hosts_own_program_none_is_started(hosts, directory, kind):
    if kind == "bird":
        bird(hosts[0], directory, "host", "router id 1.1.1.1; protocol device { }")
    else:
        run = directory / "host"
        run.mkdir()
        shutil.chown(run, "frr", "frr")
        hosts[0].run(f"/usr/lib/frr/zebra -d -P 0 --vty_socket {run} -z {run}/zserv -i {run}/zebra.pid -f /dev/null")

    async def work():
        driver = BgpDriver(directory)
        _, failures = await audit(driver, speaker(kind))
        await driver.close()
        return failures

    [reason] = hosts[0].run_async(work)
    assert "would delete each other's routes" in reason
    program = "bird" if kind == "bird" else "zebra"
    assert hosts[1].call(lambda: launch.rival(program, "")) is None, "that of another namespace is in nobody's way"


def test_the_hosts_own_bird(hosts, directory):
    near, far = hosts
    include = directory / "wincey.conf"
    include.write_text("")
    kernel = "protocol kernel { ipv4 { import none; export where source = RTS_BGP; }; }"
    control = bird(
        near, directory, "host", f'router id 10.99.0.1; protocol device {{ }} {kernel}\ninclude "{include}";\n'
    )
    bird(far, directory, "far", FAR)
    ours = speaker("bird", instance="host", include=str(include), control=str(control))

    async def work():
        driver = BgpDriver(directory, patience=0.0)
        await settled(driver, ours, PEER, ROUTE)
        assert near.json("ip -j route show 10.3.2.0/24")[0]["gateway"] == "10.99.0.2"
        assert near.json("ip -j route show 10.3.9.0/24") == [], "not the subnet of that host"
        assert far.run(f"birdc -s {directory}/far.ctl show route 10.3.1.0/24").count("10.3.1.0/24") == 1
        _, failures = await audit(driver)
        assert failures == []
        await driver.close()

    near.run_async(work)
    assert "wincey" not in near.run(f"birdc -s {control} show protocols")
    assert launch.running(directory / "host.pid", str(directory)), "the host's own goes on"


def test_a_route_that_is_missing_and_one_that_is_too_many(hosts, directory, caplog):
    near, far = hosts
    bird(far, directory, "far", FAR)
    router = msgspec.structs.replace(PEER, subnets=())
    missing = BgpRoute(net("10.3.4.0/24"), ip("10.99.0.2"))

    async def work():
        driver = BgpDriver(directory, patience=0.0)
        notices = []
        driver.watch(notices.append)
        for _ in range(100):
            _, failures = await audit(driver, speaker("bird"), router, ROUTE, missing)
            if len(failures) == 2 and "unknown" not in str(failures) and "no lease" in str(failures):
                break
            await asyncio.sleep(0.2)
        assert "the routers have not announced it" in str(failures)
        assert "and no lease knows this subnet" in str(failures)
        stray = BgpRoute(net("10.3.9.0/24"), ip("10.99.0.2"))
        await settled(driver, speaker("bird"), router, ROUTE, stray)
        moved = msgspec.structs.replace(ROUTE, gateway=ip("10.99.0.77"))
        _, failures = await audit(driver, speaker("bird"), router, moved, stray)
        assert failures == ["was taught with another next hop: 10.99.0.2"]
        await settled(driver, speaker("bird"), router, ROUTE, stray)
        await asyncio.sleep(0.5)  # what the audits before have asked for
        notices.clear()
        far.run(f"birdc -s {directory}/far.ctl disable near")
        async with asyncio.timeout(20):
            while not notices:
                await asyncio.sleep(0.05)
        far.run(f"birdc -s {directory}/far.ctl enable near")
        await settled(driver, speaker("bird"), router, ROUTE, stray)
        os.kill(int((directory / "bgp" / "run" / "bird.pid").read_text()), signal.SIGKILL)
        async with asyncio.timeout(20):
            while "the routing daemon ended" not in notices:
                await asyncio.sleep(0.05)
        await settled(driver, speaker("bird"), router, ROUTE, stray)
        await audit(driver)
        await driver.close()

    near.run_async(work)
    assert near.json("ip -j route show proto bird") == []
    lines = [record.getMessage() for record in caplog.records]
    assert sum("10.3.4.0/24" in line and "not announced" in line for line in lines) == 1


class TestQuestion:
    """Which routing daemon the host has."""

    @pytest.fixture
    def installed(self, monkeypatch):
        def have(*programs):
            monkeypatch.setattr(question, "find_bird", lambda: "bird" in programs or None)
            monkeypatch.setattr(question, "find_frr", lambda program: "frr" in programs or None)

        return have

    @pytest.mark.parametrize(
        ("programs", "wanted", "environment", "answer"),
        [
            (("bird", "frr"), "auto", "", "bird"),
            (("frr",), "auto", "", "frr"),
            (("bird", "frr"), "auto", "frr", "frr"),
            (("bird", "frr"), "bird", "frr", "bird"),
        ],
    )
    def test_choice(self, installed, tmp_path, programs, wanted, environment, answer):
        installed(*programs)
        found = question.routing_daemon(
            wanted, own=True, directory=tmp_path, environment={"WINCEY_BGP_DAEMON": environment}
        )
        assert found == answer

    def test_the_one_that_runs_already_is_kept(self, installed, tmp_path):
        installed("bird", "frr")
        Room(tmp_path).remember(Applied(speaker("frr")))
        assert question.routing_daemon("auto", own=True, directory=tmp_path, environment={}) == "frr"

    @pytest.mark.parametrize(
        ("programs", "wanted", "environment", "words"),
        [
            ((), "auto", "", "bird2.* or FRR .*install one"),
            (("bird",), "frr", "", "FRR .*not installed"),
            (("frr",), "auto", "bird", "BIRD 2 .*not installed"),
            (("frr",), "auto", "quagga", "must be bird or frr"),
        ],
    )
    def test_what_is_missing_is_named(self, installed, tmp_path, programs, wanted, environment, words):
        installed(*programs)
        with pytest.raises(NotJoinable, match=words):
            question.routing_daemon(
                wanted, own=True, directory=tmp_path, environment={"WINCEY_BGP_DAEMON": environment}
            )


def test_routers_on_the_link(hosts):
    routers = [ip("10.99.0.254"), ip("10.98.0.254"), ip("fd99::7"), ip("fd98::7")]
    assert hosts[0].call(lambda: question.on_link(routers)) == [routers[0], routers[2]]


def test_a_port_that_is_not_for_us():
    """A service without CAP_NET_BIND_SERVICE."""
    code = "import sys; from wincey.programs.bgp.launch import *; print(refused([bytes([127, 0, 0, 1])], 179), may_change_user())"
    command = ["setpriv", "--bounding-set", "-all,+net_admin", "--no-new-privs", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"({bytes([127, 0, 0, 1])!r}, {errno.EACCES}) False\n"
    assert launch.may_change_user()


def test_the_state_with_the_password_is_roots_alone(tmp_path):
    room = Room(tmp_path)
    applied = Applied(speaker("bird", password=Secret("x")), [PEER])
    room.remember(applied)
    assert room.applied() == applied
    assert (tmp_path / "bgp" / "state.json").stat().st_mode & 0o777 == 0o600
    path = room.write("bird.conf", "x", "bird")
    assert (path.stat().st_mode & 0o777, path.group()) == (0o640, "bird")
    with suppress(OSError):
        (tmp_path / "bgp" / "state.json").write_text("{")
    assert room.applied() is None
