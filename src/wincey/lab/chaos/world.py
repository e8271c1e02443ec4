"""The lab that a scenario happens to: hosts with a daemon and a container each, and etcd on hosts of its own.

    h1  h2  h3      daemons and containers
      |   |   |
      switch        every host's cable can be pulled out here, and bent
      |   |   |
    h4  h5  h6      etcd

It is an ordinary lab in all else, so that `wincey lab down` ends one that was left behind.
"""

from __future__ import annotations

import itertools
import json
import shlex
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from wincey.lab import plan
from wincey.lab.chaos.etcd import Cluster
from wincey.lab.errors import LabError
from wincey.lab.lab import ROOT, Lab
from wincey.lab.namespace import enter_argv
from wincey.lab.node import READY_TIMEOUT, Container, Host
from wincey.lab.plan import SWITCH, LabSpec
from wincey.lab.process import Process
from wincey.lab.report import Report, silent

HOSTS, MEMBERS = 3, 3


class WorldSpec(LabSpec, frozen=True, kw_only=True):
    """A lab whose last hosts are etcd's."""

    @property
    def etcd_endpoint(self) -> str:
        """All of them, as --etcd-endpoints takes it."""
        hosts = self.host_names[HOSTS:]
        return ",".join(f"http://{self.underlay(host, self.families[0]).ip}:2379" for host in hosts)


def world_spec(name: str, backend: str) -> WorldSpec:
    """The world with a backend, as in the lab's --backend."""
    config = plan.network_config(backend)
    return WorldSpec(name=name, config=config, hosts=HOSTS + MEMBERS, store="etcd3", ip_masq=True)


class World(Lab):
    """A lab for one scenario. `late`: hosts whose daemons wait for `join`."""

    spec: WorldSpec

    def __init__(
        self, spec: WorldSpec, *, root: Path = ROOT, report: Report = silent, late: Sequence[str] = ()
    ) -> None:
        super().__init__(spec, root=root, report=report)
        self.machines = self.hosts[:HOSTS]
        self.cluster = Cluster(spec, self.directory, self.hosts[HOSTS:])
        self.store = self.cluster
        self._late = late
        self._others: list[Process] = []
        self._numbers = itertools.count(1)

    def up(self, *, hosts: Iterable[str] | None = None, timeout: float = READY_TIMEOUT, tolerant: bool = False) -> None:
        """As a lab's; etcd's hosts get no daemon."""
        names = [host.name for host in self.machines if host.name not in self._late]
        super().up(hosts=hosts or names, timeout=timeout, tolerant=tolerant)

    def down(self) -> None:
        """As a lab's, without waiting for etcd to hand over its leadership."""
        self.cluster.stop()
        super().down()
        for process in self._others:
            process.reap()

    @property
    def people(self) -> list[Container]:
        """The containers that talk with each other: one on each host with a daemon."""
        return [host.containers[0] for host in self.machines if host.gateways]

    def sh(self, node: str, script: str) -> None:
        """Run a shell script on a host, in a container or on the switch; raises LabError with what it says."""
        argv = enter_argv(self.spec.netns(node), ["sh", "-ec", script])
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
        if done.returncode:
            raise LabError(f"{script} (on {node}): {(done.stderr or done.stdout).strip()}")

    def run_on(self, node: str, argv: Sequence[str]) -> Process:
        """Start a program there that runs until it is stopped, at the latest with the lab."""
        name = f"other{next(self._numbers)}"
        process = Process.spawn(
            argv,
            netns=self.spec.netns(node),
            log=self.directory / f"{name}.log",
            pidfile=self.directory / f"{name}.pid",
        )
        self._others.append(process)
        return process

    def log_of(self, process: Process) -> Path:
        """What a program started by `run_on` says."""
        return self.directory / f"other{self._others.index(process) + 1}.log"

    def devices(self, host: str) -> list[str]:
        """The names of the devices that a host's daemon has made."""
        state = json.loads((self.host(host).subnet_file.parent / "wincey" / "subnet" / "state.json").read_bytes())
        return list(state["devices"])

    def pull(self, host: str) -> None:
        """Take a host's cable out of the switch; the host itself sees nothing of it."""
        self.sh(SWITCH, f"ip link set {host} nomaster")

    def plug(self, host: str) -> None:
        """Put it back."""
        self.sh(SWITCH, f"ip link set {host} master br0")

    def restart_daemon(self, host: Host, instead: Mapping[str, str]) -> None:
        """Stop a daemon and start it with other words in its command line, one of which has a placeholder; raises NotReady."""
        words = [instead.get(word, word) for word in host.argv()]
        host.stop_daemon()
        host.start_daemon(shlex.join(words))
