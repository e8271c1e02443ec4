"""FOU ports by the driver: what it says on a kernel without, what it does on one that has it (e2e/fou_guest.py sees the rest)."""

import pytest

from support.netns import joined
from wincey.kernel.fou import FouDriver, missing
from wincey.model.state import Changes, Scope
from wincey.model.udp import FouPort

pytestmark = pytest.mark.root

PORT = FouPort(8285)


def test_a_port_is_added_known_again_and_deleted_or_it_is_said_why_not(tmp_path):
    async def cycle():
        driver = FouDriver(tmp_path)
        try:
            failures = await driver.apply(Changes([PORT]))
        finally:
            await driver.close()
        driver = FouDriver(tmp_path)  # of the next run
        try:
            found = await driver.observe({}, Scope())
            failures += await driver.apply(Changes(delete=[PORT]))
            return found, failures, await driver.observe({PORT.key: PORT}, Scope())
        finally:
            await driver.close()

    with joined() as (left, _):
        why = left.run_async(_missing)
        found, failures, after = left.run_async(cycle)
    assert after == {}
    if why:
        assert why.startswith("this kernel has no FOU: ")
        assert found == {}
        assert [failure.object for failure in failures] == [PORT]
        assert "or choose another --udp-engine" in failures[0].reason
    else:
        assert found == {PORT.key: PORT}
        assert failures == []
    assert not (tmp_path / "fou-ports").exists()


async def _missing():
    return missing()
