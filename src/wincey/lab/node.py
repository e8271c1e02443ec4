"""The machines of a lab: hosts with their daemon, and the containers on them."""

from __future__ import annotations

import ipaddress
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wincey.agent.envfile import EnvFile, read_env_file
from wincey.lab import plan
from wincey.lab.errors import LabError, NotReady
from wincey.lab.namespace import enter_argv, ip_batch
from wincey.lab.plan import Interface, LabSpec
from wincey.lab.process import Process, tail, wait_for
from wincey.model.socketpath import SOCKET_VARIABLE, of_subnet_file

READY_TIMEOUT = 30.0
"""Seconds a daemon has to write its subnet.env."""

_LOG_LINES = 8


class Node:
    """A namespace of a lab and what can be run in it."""

    def __init__(self, spec: LabSpec, name: str) -> None:
        self.spec = spec
        self.name = name
        self.netns = spec.netns(name)
        self.environment: dict[str, str] = {}
        """What programs on it find in their environment besides ours."""

    def exec(
        self, argv: Sequence[str], *, timeout: float = 30, check: bool = False, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run a program to its end and capture its output as text. Raises TimeoutExpired, with check CalledProcessError.

        `options` go to subprocess.run.
        """
        options = {"capture_output": True, "text": True} | options
        options.setdefault("env", {**os.environ, **self.environment})
        return subprocess.run(enter_argv(self.netns, argv), timeout=timeout, check=check, **options)

    def popen(self, argv: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Start a program; the caller ends it. `options` go to subprocess.Popen. Its pid is the program's own."""
        options.setdefault("env", {**os.environ, **self.environment})
        return subprocess.Popen(enter_argv(self.netns, argv), **options)


class Container(Node):
    """A container namespace. It has addresses once its host has a subnet."""

    def __init__(self, host: Host, name: str, number: int) -> None:
        super().__init__(host.spec, name)
        self.host = host
        self.number = number  # on its host, from 1

    def address(self, family: int) -> str | None:
        """Its address of family 4 or 6, None while its host has no subnet of that family."""
        for gateway in self.host.gateways:
            if gateway.version == family:
                return str(plan.container_address(gateway, self.number).ip)
        return None


class Host(Node):
    """A host: its underlay address, its daemon and its containers. `directory` holds the daemon's files."""

    def __init__(self, spec: LabSpec, name: str, directory: Path, store_url: str) -> None:
        super().__init__(spec, name)
        self.directory = directory
        self.ovs_directory = directory / "ovs"
        self.log_path = directory / "daemon.log"
        self.subnet_file = directory / "subnet.env"
        self.containers = [Container(self, each, at) for at, each in enumerate(spec.container_names(name), 1)]
        self.environment = {SOCKET_VARIABLE: of_subnet_file(str(self.subnet_file))}
        self._store_url = store_url
        self._pidfile = directory / "daemon.pid"
        self._daemon = Process.find(self._pidfile)
        self._before: tuple[int, int] | None = None  # which subnet.env there was before the daemon's start

    def underlay(self, family: int) -> str:
        """Its address on the underlay, of family 4 or 6."""
        return str(self.spec.underlay(self.name, family).ip)

    @property
    def daemon(self) -> Process | None:
        """The daemon last started here."""
        return self._daemon

    @property
    def running(self) -> bool:
        """Whether a daemon runs."""
        return bool(self._daemon and self._daemon.alive)

    @property
    def env(self) -> EnvFile:
        """What subnet.env says; empty when there is none."""
        return read_env_file(str(self.subnet_file))

    @property
    def gateways(self) -> list[Interface]:
        """The addresses that subnet.env gives the host in its subnets, IPv4 first."""
        return [ipaddress.ip_interface(str(subnet)) for subnet in self.env.subnets]

    @property
    def mtu(self) -> int:
        """The MTU of containers as subnet.env has it, 0 when there is none."""
        return self.env.mtu

    def argv(self, command: str | None = None) -> list[str]:
        """The daemon's command line. command: as in `--daemon`, default the lab's for this host, else our own flanneld."""
        command = command or self.spec.daemons.get(self.name) or self.spec.daemons.get("*")
        facts = {
            "host": self.name,
            "netns": self.netns,
            "dir": str(self.directory),
            "iface": "eth0",
            "subnet_file": str(self.subnet_file),
            "etcd_endpoints": "" if self.spec.store == "sqlite" else self.spec.etcd_endpoint,
            "etcd_prefix": self.spec.prefix,
            "store": self._store_url,
        } | {
            name: self.underlay(family)
            for name, family in (("public_ip", 4), ("public_ipv6", 6))
            if family in self.spec.families
        }
        flags = plan.daemon_flags(self.spec, facts, own=command is None)
        return plan.daemon_argv(command, flags, facts) if command else [*own_flanneld(), *flags]

    @property
    def variables(self) -> dict[str, str]:
        """What the daemon finds in its environment: places of its own for what hosts on one machine must not share."""
        return {
            "WIREGUARD_KEY_FILE": str(self.directory / "wgkey"),
            "WIREGUARD_SOCKET_DIR": str(self.directory / "wireguard"),
            "OVS_RUNDIR": str(self.ovs_directory),
        }

    def start_daemon(self, command: str | None = None, *, wait: bool = True, timeout: float = READY_TIMEOUT) -> Process:
        """Start the daemon (command: as in `--daemon`) and wait for its subnet.env; raises LabError, NotReady."""
        if self.running:
            raise LabError(f"{self.name} has a daemon already: stop it first")
        self.directory.mkdir(parents=True, exist_ok=True)
        self._before = self._env_identity()
        self._daemon = Process.spawn(
            self.argv(command),
            netns=self.netns,
            log=self.log_path,
            pidfile=self._pidfile,
            variables=self.variables,
        )
        if wait:
            self.wait_ready(timeout)
        return self._daemon

    @property
    def ready(self) -> bool:
        """Whether the daemon has written its subnet.env since its start."""
        return self._env_identity() != self._before and bool(self.mtu and self.gateways)

    def wait_ready(self, timeout: float = READY_TIMEOUT, *, waited: float = 0) -> None:
        """Wait until the daemon is ready; raises NotReady with the end of its log. waited: seconds it had before."""
        if wait_for(lambda: self.ready or not self.running, timeout) and self.ready:
            return
        if self.running:
            why = f"its daemon wrote no subnet.env within {waited + timeout:.0f} s"
        else:
            code = self._daemon.exit_code if self._daemon else None
            why = "its daemon ended" + (f" with exit code {code}" if code is not None else "")
        log = tail(self.log_path, _LOG_LINES)
        raise NotReady("\n  ".join([f"{self.name}: {why}; its log ends with:" if log else f"{self.name}: {why}", *log]))

    def stop_daemon(self, number: int = signal.SIGTERM, *, timeout: float = 10) -> None:
        """Stop the daemon with a signal and wait for its end; raises LabError when it took SIGKILL to end it."""
        if self._daemon and not self._daemon.stop(number, timeout=timeout):
            raise LabError(f"{self.name}: its daemon did not end {timeout:.0f} s after {signal.Signals(number).name}")

    def reap(self) -> None:
        """Leave no zombie behind after the namespaces were removed."""
        if self._daemon:
            self._daemon.reap()

    def kill_daemon(self) -> None:
        """End the daemon with SIGKILL, as a crash."""
        self.stop_daemon(signal.SIGKILL)

    def attach(self) -> None:
        """Give cni0 and the containers the addresses, MTU and routes that subnet.env asks for, as a runtime would.

        May be called again after the subnet has changed. Raises UsageError when the subnet is too small.
        """
        gateways, mtu = self.gateways, self.mtu
        plans = [
            (each, [plan.container_address(gateway, each.number) for gateway in gateways]) for each in self.containers
        ]
        ports = [each.name.removeprefix(self.name) for each in self.containers]
        ip_batch([*plan.port_batch(ports, mtu), *plan.gateway_batch(gateways, mtu)], self.netns)
        for container, addresses in plans:
            ip_batch(plan.container_batch(gateways, addresses, mtu), container.netns)

    def join(self, *, timeout: float = READY_TIMEOUT) -> None:
        """Start the daemon, wait until it is ready and attach the containers."""
        self.start_daemon(timeout=timeout)
        self.attach()

    def log(self, lines: int | None = None) -> list[str]:
        """The last lines of the daemon's log, or all."""
        return tail(self.log_path, sys.maxsize if lines is None else lines)

    def _env_identity(self) -> tuple[int, int] | None:
        try:
            status = self.subnet_file.stat()
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns


def own_flanneld() -> list[str]:
    """The command of our own flanneld: the one installed beside this Python, so that no other on PATH is taken."""
    script = shutil.which("flanneld", path=os.path.dirname(sys.executable))
    return [script] if script else [sys.executable, "-m", "wincey.cli.flanneld"]
