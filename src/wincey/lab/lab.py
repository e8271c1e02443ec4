"""One lab, from up to down.

Its directory (/run/wincey-lab/NAME) holds the spec and each process's pid file, so that every command finds it; it is made
first and removed last. Whatever ends `up` before its time ends in `down`, and `down` needs nothing but the names.
"""

from __future__ import annotations

import secrets
import shutil
import signal
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import msgspec

from wincey.lab import namespace, ovs, plan
from wincey.lab.errors import LabError, UnknownName
from wincey.lab.needs import check_needs
from wincey.lab.node import READY_TIMEOUT, Container, Host, Node
from wincey.lab.ping import Matrix, ping_matrix
from wincey.lab.plan import STORE, SWITCH, LabSpec
from wincey.lab.process import Process, wait_for
from wincey.lab.report import Report, silent
from wincey.lab.shield import shielded
from wincey.lab.store import LabStore
from wincey.lab.suggest import suggestion
from wincey.model.errors import WinceyError

N = TypeVar("N", bound=Node)

ROOT = Path("/run/wincey-lab")

SEGMENTING = [
    *(
        "tso",
        "off",
        "tx-udp-segmentation",
        "off",
        "tx-udp_tnl-segmentation",
        "off",
        "tx-udp_tnl-csum-segmentation",
        "off",
    ),
    *("tx-gre-segmentation", "off", "tx-ipxip4-segmentation", "off", "tx-ipxip6-segmentation", "off", "gro", "on"),
]
"""What ethtool turns off, and on, on a card whose packets are cut to the MTU before they leave."""
_STOP_TIMEOUT = 5.0  # seconds that daemons have to end on SIGTERM when the lab goes down


class Lab:
    """Many hosts on one machine. Use it as a context manager (up, down), or call `up` and `down`.

    root: the directory that labs keep their state in. report: told what goes on. `failures`: the hosts that
    did not come up, and why, after `up(tolerant=True)`.
    """

    def __init__(self, spec: LabSpec, *, root: Path = ROOT, report: Report = silent) -> None:
        self.spec = spec
        self.root = root
        self.directory = root / spec.name
        self.report = report
        self.store = LabStore(spec, self.directory)
        self.hosts = [Host(spec, name, self.directory / "hosts" / name, self.store.url) for name in spec.host_names]
        self.failures: dict[str, str] = {}

    @classmethod
    def open(cls, name: str, *, root: Path = ROOT, report: Report = silent) -> Lab:
        """A lab that is up, by name; raises UnknownName."""
        try:
            text = (root / name / "lab.json").read_bytes()
        except OSError:
            names = lab_names(root)
            there = f"there are {', '.join(names)}{suggestion(name, names)}" if names else "none is up"
            raise UnknownName(f"no lab {name!r}: {there}") from None
        return cls(msgspec.json.decode(text, type=LabSpec), root=root, report=report)

    def __enter__(self) -> Lab:
        self.up()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.down()

    @property
    def containers(self) -> list[Container]:
        """All containers, host by host."""
        return [container for host in self.hosts for container in host.containers]

    def host(self, name: str) -> Host:
        """A host by name; raises UnknownName."""
        return _find(self.hosts, name)

    def container(self, name: str) -> Container:
        """A container by name; raises UnknownName."""
        return _find(self.containers, name)

    def node(self, name: str) -> Node:
        """A host, a container, `store` or `switch`; raises UnknownName."""
        others = [Node(self.spec, STORE), Node(self.spec, SWITCH)]
        return _find([*self.hosts, *self.containers, *others], name)

    def up(self, *, hosts: Iterable[str] | None = None, timeout: float = READY_TIMEOUT, tolerant: bool = False) -> None:
        """Make the lab, start the store and the daemons, attach the containers. Takes it down again when that fails.

        hosts: those to start a daemon on (default all); the others wait for `Host.join`. timeout: seconds for all daemons
        to get ready. tolerant: hosts that do not get ready go to `failures` instead of ending it all. Raises LabError,
        NotReady and StoreError.
        """
        check_needs(self.spec)
        starting = self.hosts if hosts is None else [self.host(name) for name in hosts]
        for host in starting:
            host.argv()  # a wrong --daemon shows before anything is made
        self._claim_directory()
        try:
            self._build()
            self.report(f"starting the {self.spec.store} store")
            self.store.start()
            self.store.put_config(self.spec.config)
            self.join(starting, timeout=timeout, tolerant=tolerant)
        except BaseException:
            self.down()
            raise

    def join(self, hosts: Iterable[Host], *, timeout: float = READY_TIMEOUT, tolerant: bool = False) -> None:
        """Start daemons side by side, wait for each and attach its containers; raises as `up` does."""
        waiting = list(hosts)
        self.report("starting the daemons")
        for host in waiting:
            host.start_daemon(wait=False)
        deadline = time.monotonic() + timeout
        total = len(waiting)
        while waiting:
            late = time.monotonic() > deadline
            for host in [each for each in waiting if late or each.ready or not each.running]:
                waiting.remove(host)
                try:
                    host.wait_ready(0, waited=timeout)
                    host.attach()
                except WinceyError as error:
                    if not tolerant:
                        raise
                    self.failures[host.name] = str(error)
                self.report("hosts ready", total - len(waiting), total)
            time.sleep(0.01)

    def ping(self, *, count: int = 1, patience: float = 0) -> Matrix:
        """Ping every container from every other one in every family; see ping_matrix."""
        return ping_matrix(self.containers, self.spec.families, count=count, patience=patience, report=self.report)

    def status(self) -> dict[str, Any]:
        """The lab as it is now, for JSON."""
        return {
            "name": self.spec.name,
            "directory": str(self.directory),
            "store": {"type": self.spec.store, "url": self.store.url, "running": self.store.running},
            "config": self.spec.config,
            "hosts": [self._host_status(host) for host in self.hosts],
        }

    def down(self) -> None:
        """Stop everything and remove every trace. Never fails because something is not there; may be called twice."""
        with shielded():
            self.report(f"taking {self.spec.name} down")
            # Programs get their chance to clean up outside the namespaces; what stays ends with the namespaces.
            pidfiles = self.directory.glob("**/*.pid")
            processes = [each for path in pidfiles if (each := Process.find(path)) and each.alive]
            for process in processes:
                process.send(signal.SIGTERM)
            wait_for(lambda: not any(process.alive for process in processes), _STOP_TIMEOUT)
            namespace.remove(self.spec.netns(node) for node in self.spec.node_names)
            self.store.reap()
            for host in self.hosts:
                host.reap()
            shutil.rmtree(self.directory, ignore_errors=True)
            with suppress(OSError):  # other labs live there
                self.root.rmdir()

    def _claim_directory(self) -> None:
        name = self.spec.name
        taken = [node for node in self.spec.node_names if namespace.exists(self.spec.netns(node))]
        if taken and not self.directory.exists():
            raise LabError(
                f"a network namespace {self.spec.netns(taken[0])} exists and is not a lab's: use another --name"
            )
        self.root.mkdir(mode=0o755, parents=True, exist_ok=True)
        try:
            self.directory.mkdir()
        except FileExistsError:
            raise LabError(f"lab {name} is up already: end it with wincey lab down --name {name}") from None
        (self.directory / "lab.json").write_bytes(msgspec.json.encode(self.spec))

    def _build(self) -> None:
        spec = self.spec
        self.report(f"making {spec.name}: {spec.hosts} hosts, {len(self.containers)} containers")
        _make_room_for_neighbors(spec)
        namespace.ip_batch(plan.namespaces_batch(spec))
        namespace.ip_batch(plan.links_batch(spec))
        for node in spec.node_names:
            namespace.set_sysctls(spec.netns(node), plan.sysctls(spec, node))
            namespace.ip_batch(plan.node_batch(spec, node), spec.netns(node))
        if ovs.uses_ovs(spec):
            self.report("starting Open vSwitch on the hosts")
            for host in self.hosts:
                ovs.start(host, host.ovs_directory)
        if spec.segmenting:
            for host in self.hosts:
                host.exec(["ethtool", "-K", "eth0", *SEGMENTING], check=True)

    def _host_status(self, host: Host) -> dict[str, Any]:
        return {
            "name": host.name,
            "netns": host.netns,
            "underlay": [host.underlay(family) for family in self.spec.families],
            "subnets": [str(gateway.network) for gateway in host.gateways],
            "mtu": host.mtu or None,
            "pid": host.daemon.pid if host.daemon and host.running else None,
            "log": str(host.log_path),
            "containers": [
                {
                    "name": container.name,
                    "netns": container.netns,
                    "addresses": [text for family in self.spec.families if (text := container.address(family))],
                }
                for container in host.containers
            ],
        }


def lab_names(root: Path = ROOT) -> list[str]:
    """The labs that are up, by name."""
    return sorted(path.parent.name for path in root.glob("*/lab.json"))


def fresh_name(root: Path = ROOT) -> str:
    """A name that no lab has yet."""
    while (root / (name := f"lab-{secrets.token_hex(2)}")).exists():
        pass
    return name


def _find(nodes: Sequence[N], name: str) -> N:
    names = [node.name for node in nodes]
    if name not in names:
        shown = ", ".join(names if len(names) <= 12 else [*names[:5], "...", *names[-3:]])
        raise UnknownName(f"no {name!r} in the lab: there are {shown}{suggestion(name, names)}")
    return nodes[names.index(name)]


def _make_room_for_neighbors(spec: LabSpec) -> None:
    """Raise the limits of the neighbor tables, which all namespaces share, when every host will know every other.

    They are only ever raised, and stay so: another lab may count on them by the time this one ends.
    """
    wanted = 1024 + 4 * (spec.hosts + spec.hosts * spec.containers) * (spec.hosts + spec.containers)
    for family in ("ipv4", "ipv6"):
        for number, share in ((3, 1.0), (2, 0.5), (1, 0.125)):
            path = Path(f"/proc/sys/net/{family}/neigh/default/gc_thresh{number}")
            if path.exists() and int(path.read_text()) < wanted * share:
                path.write_text(str(int(wanted * share)))
