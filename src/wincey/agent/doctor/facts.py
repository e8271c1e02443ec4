"""What doctor knows of a host: values without I/O, so that every check can be tried on made-up hosts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

from wincey.agent.doctor.rules import Chain
from wincey.kernel.interfaces import Interface
from wincey.model.address import Address, Subnet
from wincey.model.report import StatusReport


class Answered(msgspec.Struct, frozen=True):
    """What became of echo requests along one way. refusal: what was said instead, "" for silence."""

    asked: int
    lost: int
    refusal: str = ""

    @property
    def silent(self) -> bool:
        """Whether none was answered."""
        return self.lost == self.asked


class Peer(msgspec.Struct, frozen=True, kw_only=True):
    """Another host, and what asking it has shown.

    left: seconds its lease has, None where that is not known or never ends. way: the device that packets to the host take,
    and its MTU; refusal: why there is none. inner, outer: echo requests through the network and from host to host, None
    where none was sent. mtu: the largest packet that gets there whole, 0 where that was not tried; promised: how large it may
    be. seen_from: the addresses its encapsulated packets came from. macs: who answers to its address on the wire.
    taken: the ways that packets to its containers take, where these are not ours.
    """

    subnets: Sequence[Subnet]
    public: Address
    backend: str
    left: float | None = None
    way: str = ""
    way_mtu: int = 0
    refusal: str = ""
    inner: Answered | None = None
    outer: Answered | None = None
    mtu: int = 0
    promised: int = 0
    seen_from: Sequence[Address] = ()
    macs: Sequence[str] = ()
    taken: Sequence[str] = ()


class Network(msgspec.Struct, frozen=True, kw_only=True):
    """One network on this host, by the daemon or, where that doesn't answer, by the store and the same plan.

    public, local: what peers are told, and the own address, of each family in use. own: this host's subnets. left: seconds
    its lease has. leased: whether the lease is in the store, None where the store was not asked. port: the UDP port of
    encapsulated packets, 0 for none. missing, changed, surplus: against what should be. failures: what could not be made.
    own_macs: who else answers to our address on the wire.
    """

    name: str = ""
    ranges: Sequence[Subnet] = ()
    backend: str = ""
    mtu: int = 0
    underlay: str = ""
    local: Sequence[Address] = ()
    public: Sequence[Address] = ()
    own: Sequence[Subnet] = ()
    left: float | None = None
    leased: bool | None = None
    devices: Sequence[str] = ()
    port: int = 0
    peers: Sequence[Peer] = ()
    missing: Sequence[str] = ()
    changed: Sequence[str] = ()
    surplus: Sequence[str] = ()
    failures: Sequence[str] = ()
    bad_keys: Sequence[str] = ()
    repaired: int = 0
    trouble: str = ""
    own_macs: Sequence[str] = ()


class Daemon(msgspec.Struct, frozen=True, kw_only=True):
    """Our own. state: `none` runs, it `hangs`, it `answers`. process: its state as ps tells it. trouble: why it is not asked.

    log: the end of it, where it is a file. status: its answer.
    """

    state: Literal["none", "hangs", "answers"]
    socket: str = ""
    pid: int = 0
    process: str = ""
    trouble: str = ""
    log: Sequence[str] = ()
    status: StatusReport | None = None


class Store(msgspec.Struct, frozen=True, kw_only=True):
    """The store as doctor itself found it. asked: False where nobody says which one. took: seconds for all leases.

    config_trouble: what is wrong with the network config. same_host: public addresses with several leases. overlapping:
    leases that overlap, two and two. stranger: another host that claims our public address.
    """

    asked: bool = False
    name: str = ""
    trouble: str = ""
    took: float = 0.0
    config_trouble: str = ""
    same_host: Sequence[str] = ()
    overlapping: Sequence[str] = ()
    stranger: str = ""
    bad_keys: Sequence[str] = ()


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """All of it. sysctls: by path below /proc/sys. routes: of the main table that are not ours: subnet and device.

    chains: those of the packet filters on hooks, by program. counters: how much counters of the kernel grew while doctor
    looked, and under `total.` what they are. features: what backends need of the kernel, and whether it is there.
    """

    host: str = ""
    daemon: Daemon
    store: Store = Store()
    networks: Sequence[Network] = ()
    interfaces: Sequence[Interface] = ()
    sysctls: Mapping[str, str] = {}
    routes: Sequence[tuple[Subnet, str]] = ()
    chains: Sequence[Chain] = ()
    counters: Mapping[str, int] = {}
    features: Mapping[str, bool] = {}
    notes: Sequence[str] = ()
