"""Backends by what many a kernel is built without: on Debian's, in one virtual machine for all, as its start costs much."""

from pathlib import Path

import pytest

from support.vm import pytest_in_guest

HERE = Path(__file__).parent

WIREGUARD = (
    "every_pair_and_every_byte",
    "device_route_and_lease_are_as_flannels",
    "between_hosts_nothing_is_plain",
    "packets_of_the_right_size_pass_and_larger_are_answered",
    "daemons_killed_and_started_lose_nothing",
    "what_a_peer_left_behind_goes_with_it",
    "cleanup_leaves_nothing_of_ours",
    "a_peer_made_by_hand_with_wg",
)


@pytest.mark.timeout(600)
@pytest.mark.vm
def test_ipip_ipsec_and_wireguard_by_a_kernel_that_has_them():
    """ipip's device by the driver alone, then a lab for each backend."""
    pytest_in_guest(
        HERE.parent / "kernel" / "ipip_device_guest.py",
        HERE / "ipip_guest.py",
        HERE / "ipsec_guest.py",
        *(f"{HERE / 'test_wireguard.py'}::test_{name}" for name in WIREGUARD),
        timeout=570,
    )
