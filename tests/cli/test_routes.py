"""`wincey routes` on real hosts: namespaces on one network, each with a container's subnet behind it."""

import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from support.netns import netns

pytestmark = pytest.mark.root
WINCEY = str(Path(sys.executable).parent / "wincey")
FOREIGN = "10.77.0.0/16 via 10.96.0.99 dev eth0 proto static"


@pytest.fixture
def hosts():
    """Three hosts, each with a container behind a bridge; the third one is IPv6 too, as the first."""
    with ExitStack() as stack:
        switch = stack.enter_context(netns())
        switch.ip("link add br0 type bridge mcast_snooping 0")
        switch.ip("link set br0 up")
        made = []
        for number in (1, 2, 3):
            host, container = stack.enter_context(netns()), stack.enter_context(netns())
            switch.ip(f"link add p{number} type veth peer name eth0 netns {host.name}")
            switch.ip(f"link set p{number} master br0 up")
            host.ip(f"address add 10.96.0.{number}/24 dev eth0")
            host.ip(f"address add fd96::{number}/64 dev eth0 nodad")
            host.ip("link set eth0 up")
            host.ip(f"link add c0 type veth peer name eth0 netns {container.name}")
            for end, last in ((host, 1), (container, 2)):
                device = "c0" if end is host else "eth0"
                end.ip(f"address add 10.3.{number}.{last}/24 dev {device}")
                end.ip(f"address add fd03:{number}::{last}/64 dev {device} nodad")
                end.ip(f"link set {device} up")
            host.run("sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1")
            container.ip(f"route add default via 10.3.{number}.1")
            container.ip(f"route add default via fd03:{number}::1")
            host.ip(f"route add {FOREIGN}")
            made.append((host, container))
        yield made


@pytest.fixture
def listed(hosts, tmp_path):
    def write(*numbers, v6=()):
        path = tmp_path / "hosts"
        names = {number: host.name for number, (host, _) in enumerate(hosts, 1)}
        lines = [f"10.96.0.{number} 10.3.{number}.0/24 {names[number]}" for number in numbers]
        lines += [f"fd96::{number} fd03:{number}::/64 {names[number]}" for number in v6]
        path.write_text("\n".join(lines) + "\n")
        return str(path)

    return write


def wincey(*arguments, host=None, text=None):
    inside = ["ip", "netns", "exec", host.name] if host else []
    return subprocess.run(
        [*inside, WINCEY, "routes", *arguments], input=text, capture_output=True, text=True, timeout=60, check=False
    )


def good(*arguments, **options):
    done = wincey(*arguments, **options)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def reach(source, number, *, v6=False):
    address = f"fd03:{number}::2" if v6 else f"10.3.{number}.2"
    argv = ["ip", "netns", "exec", source.name, "ping", "-n", "-c1", "-W3", address]
    return subprocess.run(argv, capture_output=True, timeout=30, check=False).returncode == 0


def gateways(host, family=4):
    shown = host.json(f"ip -{family} -j route show table main")
    return {route["dst"]: route["gateway"] for route in shown if "gateway" in route}


def test_each_host_applies_its_share(hosts, listed):
    file = listed(1, 2, 3, v6=(1, 3))
    for number, (host, _) in enumerate(hosts, 1):
        count = 4 - len([each for each in (1, 3) if each == number])
        assert good("--hosts", file, "--apply", host=host) == f"{host.name}: {count} put, 0 removed, 0 kept\n"
    (first, a), (_, b), (third, c) = hosts
    assert all(reach(source, number) for source in (a, b, c) for number in (1, 2, 3))
    assert reach(a, 3, v6=True)
    assert reach(c, 1, v6=True)
    assert not reach(a, 2, v6=True)

    # Again: nothing to do. A route that somebody took away: put again.
    assert good("--hosts", file, "--apply", host=first) == f"{first.name}: 0 put, 0 removed, 3 kept\n"
    first.ip("route del 10.3.2.0/24")
    assert good("--hosts", file, "--apply", host=first) == f"{first.name}: 1 put, 0 removed, 2 kept\n"

    # The third host is dropped from the list.
    assert good("--hosts", listed(1, 2), "--apply", host=first) == f"{first.name}: 0 put, 2 removed, 1 kept\n"
    assert gateways(first) == {"10.77.0.0/16": "10.96.0.99", "10.3.2.0/24": "10.96.0.2"}
    assert gateways(first, 6) == {}
    assert reach(a, 2)
    assert not reach(a, 3)

    assert good("--remove", host=first) == "this host: 0 put, 1 removed, 0 kept\n"
    assert gateways(first) == {"10.77.0.0/16": "10.96.0.99"}
    assert not reach(a, 2)
    assert gateways(third)["10.3.1.0/24"] == "10.96.0.1"


def test_over_all_hosts_by_a_command(hosts, listed):
    over = ("--ssh", "ip netns exec {name}")
    file = listed(1, 2, 3, v6=(1, 3))
    assert good("--hosts", file, "--apply", *over).splitlines() == [
        f"{host.name}: {count} put, 0 removed, 0 kept" for (host, _), count in zip(hosts, (3, 4, 3), strict=True)
    ]
    assert all(reach(source, number) for _, source in hosts for number in (1, 2, 3))
    assert reach(hosts[0][1], 3, v6=True)
    # What one way has put the other knows.
    first = hosts[0][0]
    assert good("--hosts", file, "--apply", host=first) == f"{first.name}: 0 put, 0 removed, 3 kept\n"
    assert good("--hosts", file, "--apply", *over, "--host", first.name) == f"{first.name}: 0 put, 0 removed, 3 kept\n"

    first.ip("route replace 10.3.2.0/24 via 10.96.0.3 proto 88")
    assert good("--hosts", listed(1, 2), "--apply", *over).splitlines() == [
        f"{hosts[0][0].name}: 1 put, 2 removed, 0 kept",
        f"{hosts[1][0].name}: 0 put, 3 removed, 1 kept",
    ]
    assert gateways(first) == {"10.77.0.0/16": "10.96.0.99", "10.3.2.0/24": "10.96.0.2"}

    good("--hosts", listed(1, 2, 3), "--remove", *over)
    for host, _ in hosts:
        assert gateways(host) == {"10.77.0.0/16": "10.96.0.99"}
        assert gateways(host, 6) == {}


def test_one_host_that_fails_does_not_keep_the_others(hosts, listed):
    file = Path(listed(1, 3))
    file.write_text(file.read_text() + "10.96.0.9 10.3.9.0/24 nobody\n192.168.77.1 10.3.8.0/24 far\n")
    done = wincey("--hosts", str(file), "--apply", "--ssh", "ip netns exec {name}")
    assert done.returncode == 1
    first, third = hosts[0][0].name, hosts[2][0].name
    assert done.stdout.splitlines() == [f"{first}: 2 put, 0 removed, 0 kept", f"{third}: 2 put, 0 removed, 0 kept"]
    assert f"wincey: {first}: ip route replace 10.3.8.0/24 via 192.168.77.1 proto 88: " in done.stderr
    assert 'wincey: nobody: ip: Cannot open network namespace "nobody"' in done.stderr


def test_what_flanneld_has_put_is_not_touched(hosts, listed):
    first = hosts[0][0]
    first.ip("route add 10.88.0.0/24 via 10.96.0.2 proto 87")
    good("--hosts", listed(1, 2), "--apply", host=first)
    good("--remove", host=first)
    assert gateways(first) == {"10.77.0.0/16": "10.96.0.99", "10.88.0.0/24": "10.96.0.2"}


def test_printed_commands_do_what_they_say(hosts, listed):
    file = listed(1, 2, 3, v6=(1, 2, 3))
    for host, _ in hosts:
        commands = good("--hosts", file, "--host", host.name)
        for line in commands.splitlines()[1:]:
            host.run(line)
    assert all(reach(source, number, v6=v6) for _, source in hosts for number in (1, 2, 3) for v6 in (False, True))


@pytest.mark.parametrize(
    ("arguments", "text", "words"),
    [
        ((), None, "which hosts?"),
        (("--hosts", "/nowhere"), None, "--hosts /nowhere: No such file"),
        (("--hosts", "-"), "10.0.0.1 10.3.1.0/24\n10.0.0.2 10.3.1.0/24\n", "standard input:2: 10.3.1.0/24 is there already"),
        (("--hosts", "-", "--host", "c"), "10.0.0.1 10.3.1.0/24 a\n", "there is no host 'c' in it; there are a"),
        (("--hosts", "-", "--apply", "--remove"), "", "are opposites"),
        (("--hosts", "-", "--ssh", "x"), "", "add one of them"),
        (("--hosts", "-", "--apply", "--ssh", "ssh {host}"), "10.0.0.1 10.3.1.0/24\n", "use {name} and {address}"),
        (("--hosts", "-", "--apply", "--ssh", "'"), "10.0.0.1 10.3.1.0/24\n", "No closing quotation"),
        (("--hosts", "-", "--apply"), "203.0.113.1 10.3.1.0/24\n", "no address in it is one of this host's"),
        (("--hosts", "-", "--apply", "--ssh", "no-such-ssh"), "203.0.113.1 10.3.1.0/24\n", "no-such-ssh is not installed"),
        (("--hosts", "-", "--apply", "--ssh", "echo"), "203.0.113.1 10.3.1.0/24\n", "echo said something else than ip's routes"),
    ],
)  # fmt: skip
def test_mistakes_are_one_clear_line(arguments, text, words):
    done = wincey(*arguments, text=text)
    assert done.returncode in {1, 2}
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
