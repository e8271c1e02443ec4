"""The parts of a host that only some backends need: drivers that are loaded when first needed, and questions to the host.

A daemon on vxlan neither imports nor runs anything of WireGuard, of a cloud or of a routing daemon. A part that has made
something is remembered in the state file, so that a later run, with whatever config, still finds and removes it.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import msgspec

from wincey.agent.statefile import State
from wincey.agent.udpengine import UdpEngines
from wincey.backends.alivpc import AliVpcBackend
from wincey.backends.awsvpc import AwsVpcBackend
from wincey.backends.base import HostFacts
from wincey.backends.bgp import NEAR_ROUTERS, ROUTING_DAEMON, BgpBackend, asked_for, routers
from wincey.backends.cloud import SERVED
from wincey.backends.extension import OUTPUT, ExtensionBackend
from wincey.backends.gce import GceBackend
from wincey.backends.ipsec import IpsecBackend
from wincey.backends.ovs import OvsBackend
from wincey.backends.tencentvpc import TencentVpcBackend
from wincey.backends.udp import UdpBackend
from wincey.backends.wireguard import WireguardBackend
from wincey.kernel.driver import Desired, Driver
from wincey.model.address import format_address
from wincey.model.bgp import BgpPeer, BgpRoute, BgpSession, BgpSpeaker
from wincey.model.cloud import CloudForwarding, CloudLease, CloudRoute, CloudTable
from wincey.model.command import CommandNetwork, CommandPeer
from wincey.model.config import NetworkConfig
from wincey.model.errors import NotJoinable
from wincey.model.fastpath import FastPath
from wincey.model.ipsec import IkeDaemon, IpsecPeer, XfrmPolicy
from wincey.model.ovs import OvsBridge, OvsDatabase, OvsFlow, OvsTunnel
from wincey.model.report import FastPathReport
from wincey.model.state import Changes, Failure, Key, Object, Scope
from wincey.model.udp import BpfRoute, BpfTunnel, FouPort
from wincey.model.wireguard import WireguardDevice, WireguardPeer, WireguardSubnet

log = logging.getLogger(__name__)


class Part(msgspec.Struct, frozen=True):
    """One driver on demand. handles: its classes. open: makes it, given the directory for the network's run-time files.

    late: it comes after the tunnel's driver, as it works on that one's device.
    """

    name: str
    handles: tuple[type[Object], ...]
    open: Callable[[Path], Driver]
    late: bool = False


def _command_driver(directory: Path) -> Driver:
    from wincey.programs.extension.driver import CommandDriver  # noqa: PLC0415  # only where the config asks for it

    return CommandDriver(directory)


async def _start_commands(config: NetworkConfig, facts: HostFacts, directory: Path) -> Mapping[str, str]:
    from wincey.programs.extension.start import start_up  # noqa: PLC0415  # likewise

    backend = ExtensionBackend(config, facts)
    if backend.before is None:
        return {}
    return {OUTPUT: await start_up(backend.before, backend.environment(None), directory, backend.timeout)}


def _cloud_driver(directory: Path) -> Driver:
    from wincey.cloud.driver import CloudDriver  # noqa: PLC0415  # likewise

    return CloudDriver(directory, rng=random.Random())  # noqa: S311  # jitter, no secrets


async def _aws_place(config: NetworkConfig, facts: HostFacts, directory: Path) -> Mapping[str, str]:
    from wincey.cloud.aws_metadata import ask_host  # noqa: PLC0415  # likewise

    return await ask_host()


async def _gce_place(config: NetworkConfig, facts: HostFacts, directory: Path) -> Mapping[str, str]:
    from wincey.cloud.gce import ask_host  # noqa: PLC0415  # likewise

    return await ask_host(format_address(facts.local) if facts.local else "")


async def _tencent_place(config: NetworkConfig, facts: HostFacts, directory: Path) -> Mapping[str, str]:
    from wincey.cloud.tencent import ask_host  # noqa: PLC0415  # likewise

    return await ask_host()


async def _ali_place(config: NetworkConfig, facts: HostFacts, directory: Path) -> Mapping[str, str]:
    from wincey.cloud.ali import ask_host  # noqa: PLC0415  # likewise

    return await ask_host()


def _bgp_driver(directory: Path) -> Driver:
    from wincey.programs.bgp.driver import BgpDriver  # noqa: PLC0415  # likewise

    return BgpDriver(directory)


async def _routing_daemon(config: NetworkConfig, facts: HostFacts, directory: Path) -> Mapping[str, str]:
    from wincey.programs.bgp.question import on_link, routing_daemon  # noqa: PLC0415  # likewise

    daemon, instance = asked_for(config)
    near = " ".join(format_address(router) for router in on_link(routers(config)))
    return {ROUTING_DAEMON: routing_daemon(daemon, own=instance == "own", directory=directory), NEAR_ROUTERS: near}


def _wireguard_driver(directory: Path) -> Driver:
    from wincey.kernel.wireguard.driver import WireguardDriver  # noqa: PLC0415  # likewise

    return WireguardDriver()


async def _wireguard_key(config: NetworkConfig, facts: HostFacts, directory: Path) -> Mapping[str, str]:
    from wincey.kernel.wireguard.ask import ask  # noqa: PLC0415  # likewise

    return await ask()


def _ipsec_driver(directory: Path) -> Driver:
    from wincey.programs.strongswan.driver import StrongswanDriver  # noqa: PLC0415  # likewise

    return StrongswanDriver(directory)


async def _ipsec_means(config: NetworkConfig, facts: HostFacts, directory: Path) -> Mapping[str, str]:
    from wincey.programs.strongswan.host import choose_esp  # noqa: PLC0415  # likewise

    return {"esp": choose_esp(IpsecBackend(config, facts).esp_choice)}


def _ovs_driver(directory: Path) -> Driver:
    from wincey.programs.openvswitch.driver import OvsDriver  # noqa: PLC0415  # likewise

    return OvsDriver(str(directory))


async def _ovs_answers(config: NetworkConfig, facts: HostFacts, directory: Path) -> Mapping[str, str]:
    from wincey.programs.openvswitch.host import check  # noqa: PLC0415  # likewise

    await check()
    return {}


def _fast_path_driver(directory: Path) -> Driver:
    from wincey.bpf.fastpathdriver import FastPathDriver  # noqa: PLC0415  # only with --fast-path

    return FastPathDriver(directory)


def _fou_driver(directory: Path) -> Driver:
    from wincey.kernel.fou import FouDriver  # noqa: PLC0415  # likewise

    return FouDriver(directory)


def _bpf_tunnel_driver(directory: Path) -> Driver:
    from wincey.bpf.udp import BpfTunnelDriver  # noqa: PLC0415  # only with that engine of the udp backend

    return BpfTunnelDriver(directory)


PARTS: tuple[Part, ...] = (
    Part("udp-bpf", (BpfTunnel, BpfRoute), _bpf_tunnel_driver, late=True),
    Part("udp-fou", (FouPort,), _fou_driver),
    Part("fast-path", (FastPath,), _fast_path_driver),
    Part("extension", (CommandNetwork, CommandPeer), _command_driver),
    Part("bgp", (BgpSpeaker, BgpPeer, BgpSession, BgpRoute), _bgp_driver),
    Part("wireguard", (WireguardDevice, WireguardPeer, WireguardSubnet), _wireguard_driver),
    Part("ipsec", (IkeDaemon, IpsecPeer, XfrmPolicy), _ipsec_driver),
    Part("ovs", (OvsDatabase, OvsBridge, OvsTunnel, OvsFlow), _ovs_driver),
    Part("cloud", (CloudTable, CloudForwarding, CloudLease, CloudRoute), _cloud_driver),
)
"""Every part. They come before the drivers that each host has, as some make the devices that those look after."""

QUESTIONS: Mapping[str, Callable[[NetworkConfig, HostFacts, Path], Awaitable[Mapping[str, str]]]] = {
    ExtensionBackend.type: _start_commands,
    WireguardBackend.type: _wireguard_key,
    BgpBackend.type: _routing_daemon,
    IpsecBackend.type: _ipsec_means,
    OvsBackend.type: _ovs_answers,
    AwsVpcBackend.type: _aws_place,
    GceBackend.type: _gce_place,
    TencentVpcBackend.type: _tencent_place,
    AliVpcBackend.type: _ali_place,
}
"""By backend type: what it has to know of the host (HostFacts.found), given the directory for the network's files."""


async def _aws_server_place() -> Mapping[str, str]:
    from wincey.cloud.aws_metadata import ask_server  # noqa: PLC0415  # likewise

    return await ask_server()


async def _gce_server_place() -> Mapping[str, str]:
    from wincey.cloud.gce import ask_host  # noqa: PLC0415  # likewise

    return await ask_host("")


async def _tencent_server_place() -> Mapping[str, str]:
    from wincey.cloud.tencent import ask_host  # noqa: PLC0415  # likewise

    return await ask_host()


async def _ali_server_place() -> Mapping[str, str]:
    from wincey.cloud.ali import ask_host  # noqa: PLC0415  # likewise

    return await ask_host()


SERVER_QUESTIONS: Mapping[str, Callable[[], Awaitable[Mapping[str, str]]]] = {
    AwsVpcBackend.type: _aws_server_place,
    GceBackend.type: _gce_server_place,
    TencentVpcBackend.type: _tencent_server_place,
    AliVpcBackend.type: _ali_server_place,
}
"""By backend type: what a server has to know that keeps the cloud's route tables for its clients."""


@runtime_checkable
class Counting(Protocol):
    """A driver whose objects count."""

    def counters(self) -> Mapping[str, int]:
        """By name."""


@runtime_checkable
class Telling(Protocol):
    """A driver with something to say."""

    told: str
    """In a line, "" for nothing."""


class PartDriver:
    """The driver of a part, which is opened once something of its kinds is desired, or an earlier run has left some."""

    def __init__(self, part: Part, state: State, failed: Callable[[Failure], None]) -> None:
        self.handles = part.handles
        self._failed = failed
        self._part, self._state = part, state
        self._driver: Driver | None = None
        self._changed: Callable[[str], None] = lambda why: None

    async def observe(self, desired: Desired, scope: Scope) -> dict[Key, Object]:
        """See Driver. A part that has nothing, and of which nothing is desired, is given up."""
        # By the few kinds, not by the 30,000 objects, which each part would look through at every audit.
        wanted = any(issubclass(kind, self.handles) for kind in set(map(type, desired.values())))
        if not wanted and self._driver is None and self._part.name not in self._state.parts:
            return {}
        found = await self._opened().observe(desired, scope)
        if not wanted and not found:
            await self.close()
            self._state.parts.discard(self._part.name)
            self._state.save()
        return found

    async def apply(self, changes: Changes) -> Sequence[Failure]:
        """See Driver. What it is about to make is remembered before."""
        if self._part.name not in self._state.parts:
            self._state.parts.add(self._part.name)
            self._state.save()
        failures = await self._opened().apply(changes)
        for failure in failures:
            self._failed(failure)
        return failures

    def counters(self) -> Mapping[str, int]:
        """What it has counted since it made something here; nothing while it has not, and of one that does not count."""
        return self._driver.counters() if isinstance(self._driver, Counting) else {}

    @property
    def told(self) -> str:
        """What its driver has to say, "" for nothing and while there is none."""
        return self._driver.told if isinstance(self._driver, Telling) else ""

    def watch(self, changed: Callable[[str], None]) -> None:
        """See Driver."""
        self._changed = changed
        if self._driver:
            self._driver.watch(changed)

    async def close(self) -> None:
        """See Driver."""
        driver, self._driver = self._driver, None
        if driver:
            await driver.close()

    def _opened(self) -> Driver:
        if self._driver is None:
            self._driver = self._part.open(self._state.directory)
            self._driver.watch(self._changed)
        return self._driver


def part_drivers(
    state: State, *, late: bool = False, failed: Callable[[Failure], None] = lambda failure: None
) -> list[PartDriver]:
    """All parts, none of them open: those that are late, or the others. failed: told of all that could not be applied."""
    return [PartDriver(part, state, failed) for part in PARTS if part.late == late]


def fast_path_report(drivers: Iterable[Driver]) -> FastPathReport | None:
    """What is told of the fast path by its driver; None where there is to be none."""
    for driver in drivers:
        if isinstance(driver, PartDriver) and FastPath in driver.handles and driver.told:
            return FastPathReport(way=driver.told, counters=dict(driver.counters()))
    return None


class HostAsk:
    """Asks the question of the config's backend; see preparation.Ask. served: whether our server keeps the cloud's tables.

    engines: chooses the udp backend's engine.
    """

    def __init__(
        self, directory: Path, served: Callable[[], bool] = lambda: False, engines: UdpEngines | None = None
    ) -> None:
        self._directory, self._served, self._engines = directory, served, engines

    async def __call__(self, config: NetworkConfig, facts: HostFacts) -> Mapping[str, str]:
        """Raises BadConfig and NotJoinable."""
        if config.backend_type == UdpBackend.type and self._engines:
            return self._engines.choose(facts)
        question = QUESTIONS.get(config.backend_type)
        if config.backend_type not in SERVER_QUESTIONS or not self._served():
            return await question(config, facts, self._directory) if question else {}
        assert question
        try:
            return {**await question(config, facts, self._directory), SERVED: "yes"}
        except NotJoinable as error:
            log.info("the server has to find this host by its address: %s", error)
            return {SERVED: "yes"}
