"""A device that outlives its keeper: where programs in the kernel forward for it, until somebody says that it shall go."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from pathlib import Path

import msgspec
import pytest

from wincey.model.state import Changes
from wincey.tunnel.driver import TunnelDriver

pytestmark = pytest.mark.root


def index(host):
    found = host.run("ip", "-o", "link", "show", "flannel0", check=False).stdout
    return found.partition(":")[0]


async def gone(pid):
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        while " Z " not in Path(f"/proc/{pid}/stat").read_text():
            await asyncio.sleep(0.05)


async def lasting(host, farewell=()):
    tunnel, peer = host.objects()
    tunnel = msgspec.structs.replace(tunnel, lasts=True)
    with host.inside():
        driver = TunnelDriver(host.directory, farewell)
        assert await driver.apply(Changes([tunnel, peer])) == []
        await driver.close()
    host.bring_up()
    return tunnel, peer


async def test_it_stays_as_it_is_when_its_keeper_is_killed_and_the_next_one_goes_on(host):
    tunnel, peer = await lasting(host)
    before = index(host)
    (pid,) = host.pids()
    os.kill(pid, signal.SIGKILL)
    await gone(pid)
    assert index(host) == before
    assert "10.3.0.0/16" in host.ip("route", "show", "dev", "flannel0").stdout
    assert await host.observe([tunnel, peer]) == {}
    assert await host.apply([tunnel, peer]) == []
    assert await host.observe([tunnel, peer]) == {tunnel.key: tunnel, peer.key: peer}
    assert index(host) == before


async def test_what_is_left_of_one_that_nobody_wants_any_more_is_removed(host):
    await lasting(host)
    (pid,) = host.pids()
    os.kill(pid, signal.SIGKILL)
    await gone(pid)
    assert await host.observe() == {}
    assert index(host) == ""


async def test_a_device_of_somebody_else_is_no_leftover(host):
    host.ip("link", "add", "flannel0", "type", "bridge")
    before = index(host)
    assert await host.observe() == {}
    assert index(host) == before


async def test_it_goes_when_it_is_deleted(host):
    tunnel, _ = await lasting(host)
    assert await host.apply(delete=[tunnel]) == []
    assert index(host) == ""


async def test_it_does_not_last_any_longer_when_it_need_not(host):
    tunnel, peer = await lasting(host)
    plain = msgspec.structs.replace(tunnel, lasts=False)
    assert await host.apply([plain]) == []
    assert await host.observe([plain, peer]) == {plain.key: plain, peer.key: peer}
    (pid,) = host.pids()
    os.kill(pid, signal.SIGKILL)
    await gone(pid)
    assert index(host) == ""


async def test_a_keeper_that_ends_by_itself_takes_all_with_it(host, tmp_path):
    """The farewell is how the programs go that work on the device."""
    said = tmp_path / "said"
    await lasting(host, ["/bin/sh", "-c", f"echo goodbye > {said}"])
    (pid,) = host.pids()
    os.kill(pid, signal.SIGTERM)
    await gone(pid)
    assert said.read_text() == "goodbye\n"
    assert index(host) == ""
