"""Offloads of a device, by ioctl as `ethtool -K DEVICE tx|tso|gro on|off` (linux/ethtool.h).

ioctl and not the netlink family of ethtool: that one is missing before Linux 5.6 and where the kernel is built without it.
"""

from __future__ import annotations

import array
import fcntl
import socket
import struct

_SIOCETHTOOL = 0x8946
_GET_TX_CHECKSUM = 0x16
_SET_TX_CHECKSUM = 0x17
_GET_SEGMENTATION, _SET_SEGMENTATION = 0x1E, 0x1F  # TCP's
_GET_MERGING, _SET_MERGING = 0x2B, 0x2C  # generic receive offload
_GET_CHANNELS = 0x3C
_CHANNELS = 9  # words of struct ethtool_channels
_RECEIVE, _COMBINED = 5, 8


def get_tx_checksum(device: str) -> bool:
    """Whether outgoing packets leave the device with the checksum still to be filled in; raises OSError."""
    return bool(_call(device, _GET_TX_CHECKSUM, 0))


def set_tx_checksum(device: str, on: bool) -> None:
    """Turn the offload on or off; raises OSError."""
    _call(device, _SET_TX_CHECKSUM, int(on))


def get_segmentation(device: str) -> bool:
    """Whether TCP segments leave the device uncut; raises OSError."""
    return bool(_call(device, _GET_SEGMENTATION, 0))


def set_segmentation(device: str, on: bool) -> None:
    """Turn the offload on or off; raises OSError."""
    _call(device, _SET_SEGMENTATION, int(on))


def get_merging(device: str) -> bool:
    """Whether segments that come in are put together; raises OSError."""
    return bool(_call(device, _GET_MERGING, 0))


def set_merging(device: str, on: bool) -> None:
    """Turn generic receive offload on or off; raises OSError."""
    _call(device, _SET_MERGING, int(on))


def receive_queues(device: str) -> int:
    """How many queues the device receives by; raises OSError, also where the driver does not say."""
    channels = _ask(device, array.array("I", [_GET_CHANNELS, *bytes(_CHANNELS - 1)]))
    return channels[_RECEIVE] + channels[_COMBINED]


def _call(device: str, command: int, value: int) -> int:
    return _ask(device, array.array("I", [command, value]))[1]  # struct ethtool_value


def _ask(device: str, argument: array.array[int]) -> array.array[int]:
    """The argument as the kernel left it; struct ifreq tells the kernel its address."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("16sP16x", device.encode(), argument.buffer_info()[0])
        fcntl.ioctl(any_socket, _SIOCETHTOOL, request)
    return argument
