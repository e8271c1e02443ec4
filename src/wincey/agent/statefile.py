"""What this daemon made on the host, remembered over restarts: `<dir of subnet.env>/wincey/<its stem>/state.json`.

After a restart with another config it tells which devices and networks of an earlier run are ours to clean up, and
`--cleanup` needs nothing else; so do the parts (agent.parts) that have made something here. It also keeps the MAC addresses of our devices, so that a device deleted while no daemon ran
comes back as the peers know it.

While containers can't be started, `not-ready` beside it has the reason in one line, for what asks on the host without a
health endpoint: the CNI plugin's STATUS.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import tempfile
from pathlib import Path

import msgspec

from wincey.model.address import MacAddress, Subnet, format_mac, parse_mac
from wincey.model.errors import UNREADABLE, BadAddress

log = logging.getLogger(__name__)


class Macs(dict[str, MacAddress]):
    """MAC addresses by device name; a name that is asked for first gets a random, locally administered unicast one.

    A device that differs in the VNI alone gets the same: a flannel that has not followed a change of the VNI yet sends to
    the MAC address that we publish with the new one, through its device of the old one.
    """

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self._rng = rng

    def __missing__(self, device: str) -> MacAddress:
        stem = device.rpartition(".")[0]
        self[device] = next((known for name, known in self.items() if name.rpartition(".")[0] == stem), self._random())
        return self[device]

    def change(self, mac: MacAddress) -> None:
        """Another host has this one: the devices that have it get another one."""
        new = self._random()
        self.update({device: new for device, known in self.items() if known == mac})

    def _random(self) -> MacAddress:
        mac = bytearray(self._rng.randbytes(6))
        mac[0] = (mac[0] & 0xFE) | 0x02
        return bytes(mac)


class _File(msgspec.Struct):
    devices: list[str] = []
    networks: list[str] = []
    macs: dict[str, str] = {}
    parts: list[str] = []


class State:
    """The remembered state of one daemon."""

    def __init__(self, subnet_file: str, rng: random.Random) -> None:
        path = Path(subnet_file)
        self.directory = path.parent / "wincey" / path.stem
        self.devices: set[str] = set()
        self.networks: set[Subnet] = set()
        self.macs = Macs(rng)
        self.parts: set[str] = set()
        self._path = self.directory / "state.json"
        self._written = b""
        self._load()

    def _load(self) -> None:
        try:
            read = msgspec.json.decode(self._path.read_bytes(), type=_File)
            self.networks = {Subnet.parse(text) for text in read.networks}
            self.macs.update({device: parse_mac(text) for device, text in read.macs.items()})
            self.devices, self.parts = set(read.devices), set(read.parts)
        except FileNotFoundError:
            pass
        except (OSError, *UNREADABLE, BadAddress) as error:
            log.warning("%s can't be read and is made anew: %s", self._path, error)

    def save(self) -> None:
        """Write what changed, atomically. A failure is told and costs no more than the memory of it."""
        content = msgspec.json.encode(
            _File(
                sorted(self.devices),
                sorted(map(str, self.networks)),
                {device: format_mac(mac) for device, mac in sorted(self.macs.items())},
                sorted(self.parts),
            )
        )
        if content == self._written:
            return
        try:
            self.directory.mkdir(mode=0o755, parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(dir=self.directory, prefix=".state")
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
            os.replace(name, self._path)
            self._written = content
        except OSError as error:
            log.warning(
                "%s can't be written: %s; objects of this run may be left behind after the next", self._path, error
            )

    def tell(self, reason: str | None) -> None:
        """Write why containers can't be started, None when they can. It is for information: a failure to write is logged."""
        path = self.directory / "not-ready"
        try:
            if reason is None:
                path.unlink(missing_ok=True)
                return
            self.directory.mkdir(mode=0o755, parents=True, exist_ok=True)
            path.write_text(reason + "\n")
        except OSError as error:
            log.warning("%s can't be kept: %s", path, error)

    def forget(self) -> None:
        """Remove the files: nothing of ours is left on the host."""
        self.tell(None)
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)
            self.directory.rmdir()
