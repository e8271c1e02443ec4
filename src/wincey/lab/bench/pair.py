"""Two hosts for one variant, with a cable between them and a container on each.

The cable is a veth pair, not a bridge: a wire costs no processor, and a bridge's cost would be in every figure and thin out
every ratio. The store stands on cables of its own. Every variant of a run has its own pair, so that nothing is started or
stopped between two measurements.
"""

from __future__ import annotations

import ipaddress
import shlex
import shutil
from pathlib import Path

import wincey
from wincey.lab import namespace, plan
from wincey.lab.bench.rules import flannel_rules
from wincey.lab.bench.variants import Variant
from wincey.lab.errors import LabError
from wincey.lab.lab import SEGMENTING, Lab
from wincey.lab.node import Host, Node, own_flanneld
from wincey.lab.ping import ping_matrix
from wincey.lab.plan import STORE, LabSpec
from wincey.lab.process import Process

_MTU = {"routes": 1500, "host-gw": 1500, "vxlan": 1450, "proxy": 1472}
_PORT = 8285
_PATIENCE = 10.0  # seconds until the containers reach each other


class Pair(Lab):
    """A lab of two hosts for a variant; raises LabError when it can't be, UsageError as LabSpec does.

    name: the lab's, shortened where it must be. segmenting: whether packets are cut to the MTU before they reach the wire.
    programs: where the compiled helpers are.
    """

    def __init__(self, variant: Variant, name: str, *, segmenting: bool, programs: Path, root: Path) -> None:
        self.variant = variant
        self._programs = programs
        daemon = variant.kind == "daemon"
        super().__init__(
            LabSpec(
                name=name[:31].rstrip("-"),
                config=plan.network_config(variant.backend or "alloc", (4,), **variant.config),
                hosts=2,
                store="etcd3" if variant.command else "sqlite",
                segmenting=segmenting,
                # The last one counts: a variant may turn masquerading off.
                options=("--ip-masq", *variant.flags) if daemon else (),
                daemons={"*": command} if (command := _command(variant, programs)) else {},
            ),
            root=root,
        )

    @property
    def ends(self) -> tuple[Node, Node, str]:
        """Who sends, who receives, and the receiver's address."""
        sender, receiver = self.hosts
        if self.variant.kind == "underlay":
            return sender, receiver, receiver.underlay(4)
        if self.variant.hosts:
            return sender, receiver, str(receiver.gateways[0].network.network_address)  # the tunnel device's own
        target = receiver.containers[0]
        address = target.address(4)
        if address is None:
            raise LabError(f"{target.name} of {self.spec.name} has no address")
        return sender.containers[0], target, address

    def start(self) -> None:
        """Make it, and see that the containers reach each other. Takes it down again and raises LabError when not."""
        daemon = self.variant.kind == "daemon"
        self.up(hosts=None if daemon else ())
        try:
            if not daemon and self.variant.kind != "underlay":
                self._by_hand()
            if self.variant.kind != "underlay":
                matrix = ping_matrix(self.containers, (4,), patience=_PATIENCE, report=self.report)
                for failed in matrix.unreachable:
                    raise LabError(f"{failed}: {failed.why}")
        except BaseException:
            self.down()
            raise

    def processes(self) -> list[int]:
        """The pids of all that runs on the two hosts: daemons and what they started."""
        return namespace.inhabitants(self.spec.netns(host) for host in self.spec.host_names)

    def _build(self) -> None:
        spec = self.spec
        one, other = spec.host_names
        wire = f"mtu {spec.mtu} type veth peer name eth0 netns {spec.netns(other)} mtu {spec.mtu}"
        lines = [
            *plan.namespaces_batch(spec),
            f"link add eth0 netns {spec.netns(one)} {wire}",
            *plan.host_links_batch(spec),
        ]
        lines += [
            f"link add store netns {spec.netns(host)} type veth peer name {host} netns {spec.netns(STORE)}"
            for host in spec.host_names
        ]
        namespace.ip_batch(lines)
        for node in (*spec.host_names, *(each.name for each in self.containers)):
            namespace.set_sysctls(spec.netns(node), plan.sysctls(spec, node))
            namespace.ip_batch(plan.node_batch(spec, node), spec.netns(node))
        self._connect_store()
        if spec.segmenting:
            for host in self.hosts:
                host.exec(["ethtool", "-K", "eth0", *SEGMENTING], check=True)

    def _connect_store(self) -> None:
        spec = self.spec
        own = spec.underlay(STORE, 4)
        lines = ["link set lo up", "link add br0 type bridge", f"addr add {own} dev br0", "link set br0 up"]
        lines += [f"link set {host} master br0 up" for host in spec.host_names]
        namespace.ip_batch(lines, spec.netns(STORE))
        for host in self.hosts:
            lines = ["link set store up", f"route add {own.ip} dev store src {host.underlay(4)}"]
            namespace.ip_batch(lines, host.netns)

    def _by_hand(self) -> None:
        kind = self.variant.kind
        for number, host in enumerate(self.hosts, 1):
            subnet = ipaddress.IPv4Network(f"10.5.{number}.0/24")
            host.directory.mkdir(parents=True)
            host.subnet_file.write_text(
                f"FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET={subnet[1]}/24\nFLANNEL_MTU={_MTU[kind]}\nFLANNEL_IPMASQ=true\n"
            )
            host.attach()
            other = self.hosts[2 - number]
            if kind in ("routes", "host-gw"):
                namespace.ip_batch([f"route add 10.5.{3 - number}.0/24 via {other.underlay(4)}"], host.netns)
            elif kind == "vxlan":
                namespace.ip_batch(_vxlan(number, host), host.netns)
                entry = [_mac(3 - number), "dev", "flannel.1", "dst", other.underlay(4), "self", "permanent"]
                host.exec(["bridge", "fdb", "append", *entry], check=True)
            else:
                self._start_proxy(number, host, other)
            if kind in ("vxlan", "host-gw", "proxy"):
                flannel_rules(host, ipaddress.IPv4Network("10.5.0.0/16"), subnet)

    def _start_proxy(self, number: int, host: Host, other: Host) -> None:
        namespace.ip_batch(
            [
                "tuntap add dev flannel0 mode tun",
                "link set flannel0 mtu 1472 up",
                f"addr add 10.5.{number}.0/16 dev flannel0",
            ],
            host.netns,
        )
        argv = [
            str(self._programs / "one_packet_proxy"),
            "flannel0",
            str(_PORT),
            f"10.5.{3 - number}.0/24={other.underlay(4)}",
        ]
        Process.spawn(argv, netns=host.netns, log=host.log_path, pidfile=host.directory / "proxy.pid")


def _command(variant: Variant, scratch: Path) -> str:
    """The daemon's command where it is not just our own; what a variant has to do without is left out of a copy of us."""
    environment = dict(variant.environment)
    if variant.without:
        copy = scratch / variant.name
        if not copy.exists():
            package = Path(wincey.__file__).parent
            left_out = {str(package / name) for name in variant.without}

            def ignored(directory: str, names: list[str]) -> list[str]:
                return [name for name in names if name == "__pycache__" or f"{directory}/{name}" in left_out]

            shutil.copytree(package, copy / package.name, ignore=ignored)
        environment["PYTHONPATH"] = str(copy)
    if not variant.command and not environment:
        return ""
    settings = [f"{name}={value}" for name, value in environment.items()]
    return " ".join([shlex.join(["env", *settings]), variant.command or shlex.join(own_flanneld())])


def _mac(number: int) -> str:
    return f"02:f1:00:00:00:{number:02x}"


def _vxlan(number: int, host: Host) -> list[str]:
    """The device and its entries as flannel makes them, without the one in the forwarding table."""
    there = 3 - number
    return [
        f"link add flannel.1 address {_mac(number)} mtu 1450 type vxlan id 1 local {host.underlay(4)} dev eth0"
        " dstport 8472 nolearning",
        f"addr add 10.5.{number}.0/32 dev flannel.1",
        "link set flannel.1 up",
        f"neigh add 10.5.{there}.0 lladdr {_mac(there)} dev flannel.1 nud permanent",
        f"route add 10.5.{there}.0/24 via 10.5.{there}.0 dev flannel.1 onlink",
    ]
