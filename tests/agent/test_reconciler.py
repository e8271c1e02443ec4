"""The reconciler keeps a host as desired, whatever other programs do to it."""

import asyncio

import pytest

from support.memory_kernel import MemoryKernel
from wincey.agent.desired import DesiredState
from wincey.agent.reconciler import Reconciler, causes
from wincey.model.address import Subnet
from wincey.model.state import Failure, InterfaceAddress, Link, Route, Sysctl

A, B = Route(Subnet.parse("10.3.1.0/24"), "flannel.1"), Route(Subnet.parse("10.3.2.0/24"), "flannel.1")
FOREIGN = Route(Subnet.parse("10.3.9.0/24"), "flannel.1")


@pytest.fixture
async def running():
    kernel, desired = MemoryKernel(), DesiredState()
    reconciler = Reconciler(desired, [kernel])
    await reconciler.settle()
    task = asyncio.create_task(reconciler.run())
    yield reconciler, kernel, desired
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def until(true):
    async with asyncio.timeout(10):
        while not true():
            await asyncio.sleep(0.01)


async def test_a_change_is_applied_without_reading_the_kernel(running):
    reconciler, kernel, desired = running
    kernel.observe = None
    desired.put("a", [A])
    reconciler.apply_soon()
    await until(lambda: kernel.objects == {A.key: A})
    desired.put("a", [])
    reconciler.apply_soon()
    await until(lambda: not kernel.objects)


async def test_what_another_program_does_is_undone_and_counted(running):
    reconciler, kernel, desired = running
    desired.put("a", [A, B])
    reconciler.apply_soon()
    await until(lambda: len(kernel.objects) == 2)
    kernel.tamper(remove=A.key)
    await until(lambda: A.key in kernel.objects)
    kernel.tamper(put=FOREIGN)
    await until(lambda: FOREIGN.key not in kernel.objects)
    kernel.tamper(put=Route(B.destination, "eth0"))
    await until(lambda: kernel.objects == {A.key: A, B.key: B})
    assert reconciler.repaired == 3


async def test_a_failure_is_retried_until_it_works_and_holds_nothing_up(running, monkeypatch):
    monkeypatch.setattr("wincey.agent.reconciler.RETRY_FIRST", 0.02)
    reconciler, kernel, desired = running
    kernel.failing[Route] = "no such device"
    desired.put("a", [A])
    reconciler.apply_soon()
    await until(lambda: reconciler.failures)
    assert reconciler.failures[A.key].reason == "no such device"
    kernel.failing.clear()
    await until(lambda: kernel.objects == {A.key: A} and not reconciler.failures)
    assert reconciler.repaired == 0


async def test_settle_tells_what_failed():
    kernel, desired = MemoryKernel(), DesiredState()
    kernel.failing[Route] = "not permitted"
    desired.put("a", [A])
    failures = await Reconciler(desired, [kernel]).settle()
    assert [(failure.object, failure.reason) for failure in failures] == [(A, "not permitted")]


async def test_nothing_to_do_is_nothing_done(running):
    reconciler, kernel, desired = running
    desired.put("a", [A])
    await reconciler.settle()
    done = len(kernel.applied)
    for _ in range(3):
        await reconciler.settle()
    assert len(kernel.applied) == done


async def test_without_a_device_nothing_is_said_of_what_belongs_on_it():
    link = Link("flannel.1", "vxlan", 1450)
    address = InterfaceAddress("flannel.1", Subnet.parse("10.3.1.0/32"))
    loose = Sysctl("net/ipv4/conf/flannel.1/rp_filter", "2")
    other = Route(Subnet.parse("10.3.3.0/24"), "eth0")
    failures = [Failure(item, "no") for item in (address, A, loose, link, other)]
    assert [failure.object for failure in causes(failures)] == [link, other]
    assert causes(failures[:2]) == failures[:2]
