"""The reconciler keeps a host as desired, whatever other programs do to it."""

import asyncio

import pytest

from support.memory_kernel import MemoryKernel
from wincey.agent.desired import DesiredState
from wincey.agent.reconciler import Reconciler, causes
from wincey.model.address import Subnet
from wincey.model.bgp import BgpRoute
from wincey.model.state import Changes, Failure, InterfaceAddress, Link, Route, Sysctl

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


async def test_what_nobody_notices_is_found_by_and_by_however_much_there_is_to_do():
    kernel, desired = MemoryKernel(), DesiredState()
    desired.put("a", [A])
    reconciler = Reconciler(desired, [kernel], 0.3)
    await reconciler.settle()
    task = asyncio.create_task(reconciler.run())
    del kernel.objects[A.key]
    async with asyncio.timeout(10):
        while A.key not in kernel.objects:
            desired.put("b", [B] if B.key not in kernel.objects else [])
            reconciler.apply_soon()
            await asyncio.sleep(0.05)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_what_leads_to_other_hosts_is_spared_for_a_while_and_no_repair_then():
    address = InterfaceAddress("flannel.1", Subnet.parse("10.3.9.0/32"))
    kernel, desired = MemoryKernel(), DesiredState()
    kernel.tamper(put=FOREIGN)
    kernel.tamper(put=B)
    kernel.tamper(put=address)
    reconciler = Reconciler(desired, [kernel])
    desired.put("a", [A])
    reconciler.spare(0.3)
    await reconciler.settle()
    assert kernel.objects.keys() == {A.key, B.key, FOREIGN.key}
    task = asyncio.create_task(reconciler.run())
    desired.put("b", [B])
    reconciler.apply_soon()
    desired.put("a", [])  # of what we made ourselves we know whose it was
    reconciler.apply_soon()
    await until(lambda: A.key not in kernel.objects)
    assert FOREIGN.key in kernel.objects
    await until(lambda: kernel.objects.keys() == {B.key})
    assert reconciler.repaired == 0
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


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


async def test_what_another_program_makes_is_never_repaired_and_told_by_its_driver(running, monkeypatch, caplog):
    monkeypatch.setattr("wincey.agent.reconciler.RETRY_FIRST", 0.02)
    reconciler, kernel, desired = running
    learned = BgpRoute(A.destination)
    desired.put("a", [learned])
    reconciler.apply_soon()
    await until(lambda: learned.key in kernel.objects)
    kernel.failing[BgpRoute] = "nobody announces it"
    kernel.tamper(remove=learned.key)
    await until(lambda: reconciler.failures)
    assert reconciler.repaired == 0
    assert caplog.messages == []
    # It hides no failure of another object.
    kernel.failing[Route] = "no such device"
    desired.put("b", [B])
    reconciler.apply_soon()
    await until(lambda: B.key in reconciler.failures)
    assert any("no such device" in record.message and record.levelname == "ERROR" for record in caplog.records)
    kernel.failing.clear()
    await until(lambda: not reconciler.failures)


async def test_what_failed_for_want_of_room_is_put_once_the_old_is_gone():
    """A device that a driver makes has the name of one that another driver only then removes."""

    kernel, desired = MemoryKernel(), DesiredState()
    kernel.objects = {FOREIGN.key: FOREIGN}
    free = kernel.apply

    async def narrow(changes):
        if kernel.objects and changes.put:
            await free(Changes(delete=changes.delete))
            return [Failure(thing, "taken") for thing in changes.put]
        return await free(changes)

    kernel.apply = narrow
    desired.put("a", [A])
    assert await Reconciler(desired, [kernel]).settle() == []
    assert kernel.objects == {A.key: A}


async def test_a_host_that_can_not_be_looked_at_is_looked_at_again(running, monkeypatch, caplog):
    monkeypatch.setattr("wincey.agent.reconciler.RETRY_FIRST", 0.01)
    reconciler, kernel, desired = running
    look, refused = kernel.observe, []

    async def observe(*arguments):
        refused.append(arguments)
        raise OSError(24, "Too many open files")

    kernel.observe = observe
    desired.put("a", [A])
    reconciler.suspect("a test")
    await until(lambda: len(refused) >= 3)
    kernel.observe = look
    await until(lambda: kernel.objects == {A.key: A})
    assert caplog.text.count("the host can't be looked at or changed, which is tried again") == 1
