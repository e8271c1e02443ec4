"""What this engine has, remembered over restarts of the plugin, of Docker and of the machine.

Docker keeps its networks for ever and tells a plugin about each only once, so a plugin that forgets makes networks that
can't be used. The file is written before a call is answered, as a whole.
"""

from __future__ import annotations

import contextlib
import os
import uuid

import msgspec

from wincey.model.address import Subnet
from wincey.model.errors import UNREADABLE, WinceyError


class Port(msgspec.Struct, frozen=True):
    """A published port. proto: tcp, udp or sctp. host_ip: "" is every address of the host."""

    proto: str
    host_ip: str
    host_port: int
    port: int


class Endpoint(msgspec.Struct):
    """A container's place in a network. address: without a length. joined: its interface was made."""

    address: str
    mac: str
    joined: bool = False
    ports: list[Port] = []


class Pool(msgspec.Struct):
    """A network's addresses as far as this engine is concerned.

    network: of the docker network, `10.3.200.0/22`; for an engine's own subnet the cluster network. block: the part that
    this engine gives out. leased: the block is a lease of the plugin's own, not the host's subnet. addresses: those given
    out, each with the time (Unix) of that. last: the latest, so that addresses are not used again at once. since: when the
    pool was asked for (Unix).
    """

    fabric: str
    network: str
    block: str
    leased: bool
    since: float = 0.0
    addresses: dict[str, float] = {}
    last: str = ""

    @property
    def subnet(self) -> Subnet:
        """The docker network's subnet."""
        return Subnet.parse(self.network)

    @property
    def own(self) -> Subnet:
        """This engine's block."""
        return Subnet.parse(self.block)


class Network(msgspec.Struct):
    """A docker network on this engine. mtu: in bytes, 0 for the fabric's own."""

    pool: str
    bridge: str
    internal: bool = False
    masquerade: bool = True
    mtu: int = 0
    endpoints: dict[str, Endpoint] = {}


class Contents(msgspec.Struct):
    """The file: pools and networks by Docker's ids. engine: an identifier of our own, by which the store knows our blocks.
    giving_back: blocks whose leases are still to be removed.
    """

    engine: str = msgspec.field(default_factory=lambda: uuid.uuid4().hex)
    pools: dict[str, Pool] = {}
    networks: dict[str, Network] = {}
    giving_back: list[Pool] = []


class StateFile:
    """Contents in a file; raises WinceyError when it is there and can't be read, as starting anew would lose networks."""

    def __init__(self, path: str) -> None:
        self._path = path
        try:
            with open(path, "rb") as file:
                self.contents = msgspec.json.decode(file.read(), type=Contents)
        except FileNotFoundError:
            self.contents = Contents()
        except (OSError, *UNREADABLE) as error:
            raise WinceyError(
                f"the state file {path} can't be read: {error}; mend it, or move it away and make the docker networks anew"
            ) from None

    def save(self) -> None:
        """Replace the file; raises WinceyError."""
        draft = f"{self._path}.new"
        try:
            os.makedirs(os.path.dirname(os.path.abspath(self._path)), mode=0o755, exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
            with open(os.open(draft, flags, 0o600), "wb") as file:
                file.write(msgspec.json.format(msgspec.json.encode(self.contents)) + b"\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, self._path)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(draft)
            raise WinceyError(f"the state file {self._path} can't be written: {error}") from None
