"""The ipsec driver with a real charon in a namespace: what it makes, finds again, leaves alone and removes."""

import asyncio
import os
import signal
import socket
import subprocess
from contextlib import suppress

import pytest

from support.netns import joined
from wincey.kernel.diff import diff
from wincey.model.address import Subnet, parse_address
from wincey.model.ipsec import IkeDaemon, IpsecPeer, IpsecTerms
from wincey.model.secret import Secret
from wincey.model.state import Changes, Scope
from wincey.programs.strongswan import charon
from wincey.programs.strongswan.client import Vici
from wincey.programs.strongswan.connections import connection_name
from wincey.programs.strongswan.driver import StrongswanDriver

pytestmark = pytest.mark.root

PSK = "fedcba9876543210" * 6
US = parse_address("10.99.0.1")
MINE = Subnet.parse("10.3.1.0/24")
DAEMON = IkeDaemon("user", Secret(PSK))
SCOPE = Scope((), (Subnet.parse("10.3.0.0/16"),))


def peer(number, **terms):
    values = {"local": US, "auth": "psk", "esp": "user", "proposal": "aes128gcm16-ecp256", "encap": False} | terms
    subnet, remote = Subnet.parse(f"10.3.{number}.0/24"), parse_address(f"10.99.0.{number}")
    return IpsecPeer(MINE, subnet, US, remote, IpsecTerms(**values))


@pytest.fixture
def host():
    with joined() as (left, _):
        try:
            yield left
        finally:
            for pid in inhabitants(left):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def inhabitants(host):
    listed = subprocess.run(["ip", "netns", "pids", host.name], capture_output=True, text=True, check=True)
    return [int(pid) for pid in listed.stdout.split()]


class Run:
    """One run of a daemon, as far as this driver goes."""

    def __init__(self, directory):
        self.driver, self.told = StrongswanDriver(directory), []
        self.driver.watch(self.told.append)

    async def differences(self, *desired):
        wanted = {item.key: item for item in desired}
        return diff(wanted, await self.driver.observe(wanted, SCOPE))

    async def become(self, *desired):
        changes = await self.differences(*desired)
        assert list(await self.driver.apply(changes)) == []
        assert not await self.differences(*desired)
        return changes


class Charon:
    """A second client of the same charon: what it says of itself."""

    def __init__(self, directory):
        self.directory = directory

    async def __aenter__(self):
        path = self.directory / charon.SOCKET
        self.vici = await Vici.open(path, event=lambda name, message: None, ended=lambda: None)
        assert self.vici
        return self

    async def __aexit__(self, *_):
        await self.vici.close()

    async def connections(self):
        return {name for event in await self.vici.stream("list-conns", "list-conn") for name in event}

    async def secrets(self):
        return (await self.vici.command("get-shared"))["keys"]


def test_one_run_after_another(host, tmp_path, caplog):
    caplog.set_level("DEBUG")
    directory = tmp_path / "wincey"

    async def runs():
        first = Run(directory)
        changes = await first.become(DAEMON, peer(2), peer(3))
        assert (len(changes.put), changes.delete) == (3, [])
        async with Charon(directory) as seen:
            pid = seen.vici.pid
            assert await seen.connections() == {connection_name(peer(2)), connection_name(peer(3))}
            assert await seen.secrets() == ["wincey"]
            foreign = {"version": "2", "local": {"auth": "psk"}, "remote": {"auth": "psk"}, "children": {}}
            await seen.vici.command("load-conn", {"somebody": foreign})

        # The daemon is gone; the next one finds all as it was, and gives the credentials that it can't ask for.
        await first.driver.close()
        second = Run(directory)
        assert await second.differences(DAEMON, peer(2), peer(3)) == Changes(put=[DAEMON])
        await second.become(DAEMON, peer(2), peer(3))
        async with Charon(directory) as seen:
            assert seen.vici.pid == pid

        # A peer leaves, one moves, one comes.
        moved = IpsecPeer(MINE, peer(2).subnet, US, parse_address("10.99.0.9"), peer(2).terms)
        await second.become(DAEMON, moved, peer(4))
        async with Charon(directory) as seen:
            assert await seen.connections() == {connection_name(moved), connection_name(peer(4)), "somebody"}
        await second.driver.close()

        # Terms that changed while no daemon ran.
        third, strong = Run(directory), peer(4, proposal="aes256gcm16-ecp384")
        assert strong in (await third.become(DAEMON, strong)).put
        async with Charon(directory) as seen:
            assert await seen.connections() == {connection_name(strong), "somebody"}
            assert seen.vici.pid == pid

        secret_is_nowhere(directory, caplog)
        assert await third.become() == Changes(delete=[DAEMON_FOUND, strong_as_left(strong)])
        assert list(directory.iterdir()) == []
        assert third.told == []
        await third.driver.close()

    host.run_async(runs)
    assert inhabitants(host) == []
    assert "ipsec0" not in host.run("ip link")


DAEMON_FOUND = IkeDaemon("user")


def strong_as_left(strong):
    return IpsecPeer(strong.own, strong.subnet, strong.identity, strong.remote, None)


def secret_is_nowhere(directory, caplog):
    names = {path.name for path in directory.iterdir()}
    assert names == {"charon.vici", "charon.conf", "charon.log", "charon.json"}
    for name in names - {"charon.vici"}:
        assert (directory / name).stat().st_mode & 0o077 == 0, name
        assert PSK not in (directory / name).read_text(), name
    assert (directory / "charon.vici").stat().st_mode & 0o007 == 0
    assert PSK not in caplog.text


def test_the_end_of_charon_is_told_and_mended(host, tmp_path):
    async def run():
        run = Run(tmp_path)
        await run.become(DAEMON, peer(2))
        async with Charon(tmp_path) as seen:
            pid = seen.vici.pid
        os.kill(pid, signal.SIGKILL)
        async with asyncio.timeout(20):
            while not run.told:
                await asyncio.sleep(0.05)
        assert run.told == ["charon has ended"]
        await run.become(DAEMON, peer(2))
        async with Charon(tmp_path) as seen:
            assert seen.vici.pid != pid
            assert await seen.connections() == {connection_name(peer(2))}
        # Another kind of ESP is another charon.
        await run.become(IkeDaemon("kernel", Secret(PSK)), peer(2, esp="kernel"))
        async with Charon(tmp_path) as seen:
            assert await seen.connections() == {connection_name(peer(2))}
        assert "ipsec0" not in await asyncio.to_thread(host.run, "ip link")
        await run.become()
        await run.driver.close()

    host.run_async(run)


def test_new_secrets_and_new_certificates_take_the_place_of_the_old(host, tmp_path):
    files = make_certificate(tmp_path, "10.99.0.1")
    by_certificate = IkeDaemon("user", None, *files)

    async def run():
        run = Run(tmp_path / "w")
        await run.become(DAEMON)
        await run.become(IkeDaemon("user", Secret(PSK[::-1])))
        assert (await run.become(by_certificate)).put == [by_certificate]
        async with Charon(tmp_path / "w") as seen:
            assert await seen.secrets() == []
            certificates = await seen.vici.stream("list-certs", "list-cert", {"type": "X509"})
            assert sorted(each.get("has_privkey", "no") for each in certificates) == ["no", "yes"]
        assert not await run.differences(by_certificate)
        make_certificate(tmp_path, "10.99.0.1")  # renewed in place
        assert (await run.become(by_certificate)).put == [by_certificate]
        await run.become()
        await run.driver.close()

    host.run_async(run)


def make_certificate(directory, address):
    ca, ca_key, cert, key, request, extension = (
        directory / name for name in ("ca.pem", "ca.key", "cert.pem", "key.pem", "req", "ext")
    )
    new = ["-nodes", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    extension.write_text(f"subjectAltName=IP:{address}\n")
    for command in (
        ["req", "-x509", *new, "-days", "2", "-subj", "/CN=authority", "-keyout", ca_key, "-out", ca],
        ["req", *new, "-subj", f"/CN={address}", "-keyout", key, "-out", request],
        [
            "x509",
            "-req",
            "-in",
            request,
            "-CA",
            ca,
            "-CAkey",
            ca_key,
            "-days",
            "2",
            "-extfile",
            extension,
            "-out",
            cert,
        ],
    ):
        subprocess.run(["openssl", *map(str, command)], check=True, capture_output=True)
    return str(cert), str(key), str(ca)


async def reason_of(run, *desired):
    changes = await run.differences(*desired)
    failures = await run.driver.apply(changes)
    await run.driver.close()
    return {str(failure.object): failure.reason for failure in failures}


def test_what_is_missing_is_told_in_one_line(host, tmp_path, monkeypatch):
    lost = IkeDaemon("user", None, "/nowhere/cert.pem", "/nowhere/key.pem", "/nowhere/ca.pem")

    async def run():
        reasons = await reason_of(Run(tmp_path / "a"), lost, peer(2))
        assert reasons[str(lost)] == "No such file or directory: /nowhere/cert.pem"
        assert len(reasons) == 2

        deep = tmp_path / ("d" * 80)
        assert "too long a path" in (await reason_of(Run(deep), DAEMON))[str(DAEMON)]

        # The charon of the first one still runs, as a daemon that waits for its certificates would find it.
        assert (
            "UDP port 500 is in use, perhaps by another IKE daemon"
            in (await reason_of(Run(tmp_path / "b"), DAEMON))[str(DAEMON)]
        )
        again = Run(tmp_path / "a")
        await again.become()
        await again.driver.close()

        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "charon").symlink_to("/bin/false")
        with monkeypatch.context() as other:
            other.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
            assert "charon ended at once: see" in (await reason_of(Run(tmp_path / "e"), DAEMON))[str(DAEMON)]

        monkeypatch.setattr(charon, "DIRECTORIES", ())
        monkeypatch.setenv("PATH", "/nowhere")
        missing = (await reason_of(Run(tmp_path / "c"), DAEMON))[str(DAEMON)]
        assert "charon, which is not installed" in missing
        assert "strongswan-charon" in missing

    host.run_async(run)


def test_a_socket_without_a_listener_is_no_charon(host, tmp_path):
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / charon.SOCKET))

    async def run():
        run = Run(tmp_path)
        assert (await run.become(DAEMON)).put == [DAEMON]
        await run.become()
        await run.driver.close()

    host.run_async(run)
