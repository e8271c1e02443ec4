"""ipip with real daemons: on Debian's kernel, in a virtual machine, as many a kernel is built without it."""

from pathlib import Path

import pytest

from support.vm import pytest_in_guest

TESTS = Path(__file__).parents[1]


@pytest.mark.timeout(600)
@pytest.mark.vm
def test_ipip_on_a_kernel_that_has_it():
    """Both files in one boot: the device by the driver alone, then a lab."""
    pytest_in_guest(TESTS / "kernel" / "ipip_device_guest.py", TESTS / "e2e" / "ipip_guest.py", timeout=500)
