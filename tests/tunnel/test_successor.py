"""A tunnel without a daemon makes room for flannel, and for nothing else."""

import asyncio

import pytest

from wincey.tunnel.driver import TunnelDriver

pytestmark = pytest.mark.root


def come_and_go(host, name, address):
    host.run("ip", "tuntap", "add", "dev", name, "mode", "tun")
    host.ip("addr", "add", address, "dev", name)
    host.ip("link", "set", name, "up")
    host.ip("link", "del", name)


async def gone(host):
    for _ in range(100):
        if not host.pids():
            return True
        await asyncio.sleep(0.05)
    return False


@pytest.fixture
async def alone(host):
    """A host with a tunnel and without a daemon."""
    assert await host.apply(host.objects()) == []
    host.bring_up()
    return host


async def test_it_ends_when_flannel_has_tried(alone):
    come_and_go(alone, "flannel1", "10.3.1.0/32")
    assert await gone(alone)
    assert "flannel0" not in alone.ip("-br", "link").stdout


async def test_other_devices_come_and_go(alone):
    [pid] = alone.pids()
    come_and_go(alone, "flannel1", "10.3.7.0/32")
    come_and_go(alone, "tun7", "10.3.7.0/32")
    alone.ip("link", "add", "veth7", "type", "veth", "peer", "name", "veth8")
    alone.ip("link", "del", "veth7")
    assert await alone.observe() != {}  # it has looked at what came before this question
    assert alone.pids() == [pid]


async def test_it_stays_while_a_daemon_is_there(alone):
    [pid] = alone.pids()
    with alone.inside():
        driver = TunnelDriver(alone.directory)
        try:
            assert await driver.counters("flannel0") is not None
            come_and_go(alone, "flannel1", "10.3.1.0/32")
            assert await driver.counters("flannel0") is not None
        finally:
            await driver.close()
    assert await alone.observe() != {}
    assert alone.pids() == [pid]
