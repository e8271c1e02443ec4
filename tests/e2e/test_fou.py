"""The udp backend by FOU with real daemons: on Debian's kernel, in a virtual machine, as many a kernel is built without it."""

from pathlib import Path

import pytest

from support.vm import pytest_in_guest


@pytest.mark.timeout(600)
@pytest.mark.vm
def test_fou_on_a_kernel_that_has_it():
    pytest_in_guest(Path(__file__).with_name("fou_guest.py"), timeout=500)
