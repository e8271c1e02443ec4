"""What many a kernel is built without, with real daemons: on Debian's kernel, in a virtual machine, in one boot.

The udp backend by FOU, and the fast path of containers by nftables' flowtable.
"""

from pathlib import Path

import pytest

from support.vm import pytest_in_guest


@pytest.mark.timeout(900)
@pytest.mark.vm
def test_on_a_kernel_that_has_them():
    here = Path(__file__)
    pytest_in_guest(here.with_name("fou_guest.py"), here.with_name("flowtable_guest.py"), timeout=800)
