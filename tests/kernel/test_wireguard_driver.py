"""The WireGuard driver against real devices: wireguard-go where the kernel has no WireGuard, else the kernel's."""

from __future__ import annotations

import re
import socket
import subprocess
import time
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.keys import wait_until
from support.netns import Netns, joined, netns
from wincey.kernel.diff import diff
from wincey.kernel.wireguard import driver as module
from wincey.kernel.wireguard.ask import ask, choose_way
from wincey.kernel.wireguard.curve25519 import public_key
from wincey.kernel.wireguard.driver import WireguardDriver
from wincey.kernel.wireguard.keyfile import read_or_make_key
from wincey.kernel.wireguard.userspace import find_program
from wincey.model.address import Subnet, parse_address
from wincey.model.secret import Secret
from wincey.model.state import Changes, Failure, Object, Scope
from wincey.model.wireguard import WireguardDevice, WireguardPeer, WireguardSubnet

pytestmark = pytest.mark.root

DEVICE = "flannel-wg"
SCOPE = Scope((DEVICE,))
PSK = Secret(bytes(range(32)))


class Host:
    """A namespace with keys and a driver of its own."""

    def __init__(self, ns: Netns, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ns, self.directory, self._monkeypatch = ns, directory, monkeypatch
        directory.mkdir()
        self.way = ns.call(choose_way)
        self.device = self.with_key(directory / "wgkey")
        self.key = self.device.public_key

    def with_key(self, path: Path) -> WireguardDevice:
        key = public_key(read_or_make_key(path).value)
        return WireguardDevice(DEVICE, self.way, 51820, key, str(path))

    def settle(self, *desired: Object, scope: Scope = SCOPE) -> list[Failure]:
        """What a daemon does at its start, and then once more: nothing must be left to do."""
        wanted = {item.key: item for item in desired}

        async def work() -> list[Failure]:
            driver = self.driver()
            failures = list(await driver.apply(diff(wanted, await driver.observe(wanted, scope))))
            if not failures:
                assert diff(wanted, await driver.observe(wanted, scope)) == Changes()
            await driver.close()
            return failures

        return self.ns.run_async(work)

    def driver(self) -> WireguardDriver:
        self._monkeypatch.setenv("WIREGUARD_SOCKET_DIR", str(self.directory / "sockets"))
        return WireguardDriver()

    def show(self, what: str) -> dict[str, list[str]]:
        """`wg show flannel-wg WHAT` by peer."""
        script = f"exec wg show {DEVICE} {what}"
        if self.way == "wireguard-go":
            script = f"mount --bind {self.directory}/sockets /var/run/wireguard && {script}"
        argv = ["ip", "netns", "exec", self.ns.name, "unshare", "--mount", "sh", "-c", script]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=True)
        return {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()}

    def index(self) -> int:
        return int(self.ns.json(f"ip -j link show {DEVICE}")[0]["ifindex"])


@pytest.fixture(autouse=True)
def _needs_wireguard() -> None:
    if find_program() is None:
        pytest.skip("needs wireguard-go")


@contextmanager
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    with netns() as ns:
        host = Host(ns, tmp_path / "one", monkeypatch)
        try:
            yield host
        finally:
            host.settle()


def net(number: int) -> Subnet:
    return Subnet.parse(f"10.3.{number}.0/24")


def peer(key: bytes, address: str = "10.99.0.2", **rest: object) -> WireguardPeer:
    return WireguardPeer(DEVICE, key, parse_address(address), 51820, **rest)  # type: ignore[arg-type]  # the fields' own


def owned(key: bytes, subnet: Subnet) -> WireguardSubnet:
    return WireguardSubnet(DEVICE, subnet, key)


def some(number: int) -> bytes:
    return number.to_bytes(32, "little")


def text(key: bytes) -> str:
    return b64encode(key).decode()


def test_made_kept_and_removed(tmp_path, monkeypatch):
    with alone(tmp_path, monkeypatch) as host:
        both = [peer(some(2), keepalive=25, psk=PSK), owned(some(2), net(2)), peer(some(3)), owned(some(3), net(3))]
        assert host.settle(host.device, *both) == []
        assert host.show("endpoints") == {text(some(2)): ["10.99.0.2:51820"], text(some(3)): ["10.99.0.2:51820"]}
        assert host.show("preshared-keys")[text(some(2))] == [text(PSK.value)]
        assert host.show("persistent-keepalive")[text(some(2))] == ["25"]
        assert host.show("public-key") == {text(host.key): []}
        index = host.index()
        # What another daemon, started later, finds is the same device; what has changed meanwhile is changed.
        assert host.settle(host.device, *both[:2], peer(some(4)), owned(some(4), net(3))) == []
        assert host.show("allowed-ips") == {text(some(2)): ["10.3.2.0/24"], text(some(4)): ["10.3.3.0/24"]}
        assert host.settle(host.device, peer(some(2)), owned(some(2), net(7))) == []
        assert host.show("allowed-ips") == {text(some(2)): ["10.3.7.0/24"]}
        assert host.show("preshared-keys")[text(some(2))] == ["(none)"]
        assert host.index() == index
        assert host.settle() == []
        assert DEVICE not in host.ns.run("ip link show")
        if host.way == "wireguard-go":
            assert list((host.directory / "sockets").iterdir()) == []
        # And from nothing again, at once.
        assert host.settle(host.device, *both) == []


def test_a_thousand_peers_are_one_transaction(tmp_path, monkeypatch):
    calls = []
    with alone(tmp_path, monkeypatch) as host:
        running = module.InKernel if host.way == "kernel" else module.Userspace
        change = running.change

        async def counted(self, device, edit):
            calls.append(len(edit.peers))
            await change(self, device, edit)

        monkeypatch.setattr(running, "change", counted)
        subnets = [Subnet((0x0A400000 + (number << 8)).to_bytes(4, "big"), 24) for number in range(1000)]
        objects = [
            item
            for number, subnet in enumerate(subnets, 2)
            for item in (peer(some(number), keepalive=25), owned(some(number), subnet))
        ]
        assert host.settle(host.device, *objects) == []
        assert calls == [0, 1000]
        changed = [peer(some(2), keepalive=5), *objects[1:-2]]
        assert host.settle(host.device, *changed) == []
        assert calls[2:] == [2], "one changed, one removed; the others are not mentioned"


def test_what_is_refused_keeps_nothing_else_back(tmp_path, monkeypatch):
    with alone(tmp_path, monkeypatch) as host:
        bad = owned(some(3), Subnet(parse_address("10.3.3.0"), 77))
        good = [item for number in (2, 4, 5) for item in (peer(some(number)), owned(some(number), net(number)))]
        failures = host.settle(host.device, *good, peer(some(3)), bad)
        assert {failure.object for failure in failures} == {peer(some(3)), bad}
        assert "Invalid argument" in failures[0].reason or "Protocol" in failures[0].reason
        for number in (2, 4, 5):
            assert host.show("allowed-ips")[text(some(number))] == [f"10.3.{number}.0/24"]


def test_a_port_that_is_taken_is_named(tmp_path, monkeypatch):
    with alone(tmp_path, monkeypatch) as host:
        other = host.ns.call(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        with other:
            other.bind(("", 51820))
            (failure,) = host.settle(host.device)
            assert "UDP port 51820 is taken by another program: choose another ListenPort" in failure.reason
        assert host.settle(host.device) == []


def test_a_device_that_is_not_ours_stays(tmp_path, monkeypatch):
    with alone(tmp_path, monkeypatch) as host:
        host.ns.ip(f"link add {DEVICE} type bridge")
        (failure, orphan) = host.settle(host.device, peer(some(2)))
        assert failure.object == host.device
        assert f"device {DEVICE} is already there" in failure.reason
        assert orphan.reason == failure.reason
        host.ns.ip(f"link delete {DEVICE}")


def test_a_key_file_that_changed_since_is_not_used_unasked(tmp_path, monkeypatch):
    with alone(tmp_path, monkeypatch) as host:
        other = read_or_make_key(tmp_path / "other")
        path = Path(host.device.key_file)
        path.chmod(0o600)
        path.write_text(text(other.value))
        path.chmod(0o400)
        (failure,) = host.settle(host.device)
        assert "has another key by now: restart the daemon" in failure.reason
        assert text(other.value) not in failure.reason


def test_a_socket_of_another_namespace_is_not_ours(tmp_path, monkeypatch):
    with alone(tmp_path, monkeypatch) as host, netns() as ns:
        if host.way == "kernel":
            return  # which has no sockets
        assert host.settle(host.device) == []
        other = Host(ns, tmp_path / "two", monkeypatch)
        other.directory = host.directory
        ns.ip(f"tuntap add {DEVICE} mode tun")
        (failure,) = other.settle(other.device)
        assert "belongs to a wireguard-go in another network namespace; set WIREGUARD_SOCKET_DIR" in failure.reason
        assert host.show("public-key") == {text(host.key): []}


@pytest.fixture
def pair(tmp_path, monkeypatch):
    """Two hosts with a session, addresses inside and a ping that answers. Each knows the other by what a lease would say."""
    with joined() as (left, right):
        hosts = [Host(left, tmp_path / "left", monkeypatch), Host(right, tmp_path / "right", monkeypatch)]
        try:
            for number, (host, other) in enumerate(((hosts[0], hosts[1]), (hosts[1], hosts[0])), 1):
                assert host.settle(host.device, *facing(host, other, 3 - number)) == []
                host.ns.ip(f"address add 10.3.{number}.1/16 dev {DEVICE}")
            wait_until(lambda: answers(left))
            yield hosts
        finally:
            for host in hosts:
                host.settle()


def facing(host: Host, other: Host, number: int, key: bytes = b"") -> tuple[Object, ...]:
    key = key or other.key
    return peer(key, f"10.99.0.{number}", psk=PSK), owned(key, net(number))


def answers(ns: Netns) -> bool:
    argv = ["ip", "netns", "exec", ns.name, "ping", "-n", "-c1", "-W1", "10.3.2.1"]
    return subprocess.run(argv, capture_output=True, timeout=30, check=False).returncode == 0


def test_changing_one_peer_resets_no_other(pair):
    left, right = pair
    before = left.show("latest-handshakes"), left.show("transfer")
    assert before[0][text(right.key)] != ["0"]
    more = [item for number in range(3, 53) for item in (peer(some(number)), owned(some(number), net(number)))]
    assert left.settle(left.device, *facing(left, right, 2), *more) == []
    assert left.settle(left.device, *facing(left, right, 2), *more[:20]) == []
    left.settle(left.device, *facing(left, right, 2), peer(some(3), keepalive=9, psk=PSK), owned(some(3), net(9)))
    after = left.show("latest-handshakes"), left.show("transfer")
    assert after[0][text(right.key)] == before[0][text(right.key)]
    assert all(int(a) >= int(b) > 0 for a, b in zip(after[1][text(right.key)], before[1][text(right.key)], strict=True))


def test_a_live_peer_stays_where_it_was_heard_from(pair):
    """It moves to another address without its lease saying so; then the lease does, with a wrong one."""
    left, right = pair
    right.ns.ip("address delete 10.99.0.2/24 dev eth0")
    right.ns.ip("address add 10.99.0.77/24 dev eth0")
    back = ["ip", "netns", "exec", right.ns.name, "ping", "-n", "-c1", "-W1", "10.3.1.1"]
    wait_until(lambda: subprocess.run(back, capture_output=True, timeout=30, check=False).returncode == 0)
    assert left.show("endpoints")[text(right.key)] == ["10.99.0.77:51820"]
    assert left.settle(left.device, *facing(left, right, 2)) == []
    assert left.show("endpoints")[text(right.key)] == ["10.99.0.77:51820"], "an audit leaves it"
    old, new = facing(left, right, 2), facing(left, right, 9)

    async def lease_changes() -> None:
        driver = left.driver()
        wanted = {item.key: item for item in (left.device, *old)}
        assert diff(wanted, await driver.observe(wanted, SCOPE)) == Changes()
        assert await driver.apply(Changes([new[0]])) == []
        await driver.close()

    left.ns.run_async(lease_changes)
    assert left.show("endpoints")[text(right.key)] == ["10.99.0.77:51820"]
    assert answers(left.ns)


def test_a_lease_that_names_another_address_counts_where_nothing_else_was_learned(pair):
    left, right = pair
    assert left.show("endpoints")[text(right.key)] == ["10.99.0.2:51820"]

    async def lease_changes() -> None:
        driver = left.driver()
        wanted = {item.key: item for item in (left.device, *facing(left, right, 2))}
        await driver.observe(wanted, SCOPE)
        assert await driver.apply(Changes([facing(left, right, 9)[0]])) == []
        await driver.close()

    left.ns.run_async(lease_changes)
    assert left.show("endpoints")[text(right.key)] == ["10.99.0.9:51820"]


@pytest.mark.parametrize("told_first", [False, True])
def test_a_new_key_interrupts_nothing(pair, tmp_path, told_first):
    """One side changes over to a new key, the other learns of it a moment later, or earlier. Only one side sends."""
    left, right = pair
    fresh = right.with_key(tmp_path / "fresh")
    argv = ["ip", "netns", "exec", left.ns.name, "ping", "-n", "-i0.02", "-c80", "-W10", "10.3.2.1"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as ping:
        time.sleep(0.5)
        changes = [
            lambda: right.settle(fresh, *facing(right, left, 1)),
            lambda: left.settle(left.device, *facing(left, right, 2, fresh.public_key)),
        ]
        for change in reversed(changes) if told_first else changes:
            assert change() == []
            time.sleep(0.2)
        output, _ = ping.communicate(timeout=60)
    assert left.show("allowed-ips") == {text(fresh.public_key): ["10.3.2.0/24"]}
    # What is under way at the very moment when the session is given up may be lost: nothing, or a packet on a slow machine.
    lost = 80 - int(re.search(r"(\d+) received", output)[1])
    assert lost <= 2, output[-300:]


def test_a_device_that_was_lost_comes_back_with_its_sessions(pair):
    """Although nobody sends anything."""
    left, right = pair
    wanted = {item.key: item for item in (right.device, *facing(right, left, 1))}

    async def lost_and_found() -> None:
        driver = right.driver()
        assert diff(wanted, await driver.observe(wanted, SCOPE)) == Changes()
        right.ns.ip(f"link delete {DEVICE}")
        assert await driver.apply(diff(wanted, await driver.observe(wanted, SCOPE))) == []
        await driver.close()

    before = int(left.show("latest-handshakes")[text(right.key)][0])
    time.sleep(1.1)  # handshakes are told in seconds
    right.ns.run_async(lost_and_found)
    wait_until(lambda: int(left.show("latest-handshakes")[text(right.key)][0]) > before, 10)


def test_the_choice_and_the_question(tmp_path, monkeypatch):
    with netns() as ns:
        monkeypatch.setenv("WIREGUARD_KEY_FILE", str(tmp_path / "key"))
        answer = ns.run_async(ask)
        assert answer == ns.run_async(ask)
        key = public_key(read_or_make_key(tmp_path / "key").value)
        assert (answer["public_key"], answer["key_file"]) == (text(key), str(tmp_path / "key"))
        assert answer["way"] in {"kernel", "wireguard-go"}
        if not Path("/dev/net/tun").exists():
            subprocess.run(["modprobe", "tun"], check=True, timeout=30)
        ns.ip(f"tuntap add {DEVICE} mode tun")
        assert ns.call(choose_way) == "wireguard-go", "what wireguard-go runs stays with it"
