"""What a lab consists of: names, addresses, the commands that make it. Pure: nothing here touches the machine.

    NAME-h1c1        NAME-h2c1          containers: eth0, address and MTU from their host's subnet.env
       |                |
    NAME-h1  cni0    NAME-h2  cni0      hosts: eth0 on the underlay, ip_forward on, no default route, a daemon
       |eth0            |eth0
    NAME-switch ---- br0 ---- NAME-store   the store's host; it is also the world outside the container network

Every namespace carries the lab's name, and every link lives in one of them from its first moment, so that several labs can
stand side by side and deleting the namespaces deletes all.
"""

from __future__ import annotations

import ipaddress
import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import msgspec

from wincey.lab.errors import UnknownName
from wincey.lab.suggest import suggestion
from wincey.model.errors import UsageError

Interface: TypeAlias = ipaddress.IPv4Interface | ipaddress.IPv6Interface
"""An address with the length of its network."""

PREFIX = "/coreos.com/network"
SWITCH = "switch"
STORE = "store"
STORES = ("sqlite", "etcd3", "etcd2")
BACKENDS = ("vxlan", "host-gw", "udp", "ipip", "wireguard", "ipsec", "alloc", "bgp", "extension", "ovs")
MAX_HOSTS = 1000
"""A Linux bridge has at most 1023 ports."""

_NETWORKS = {4: "10.5.0.0/16", 6: "fd00:5::/48"}
_NEEDED: dict[str, dict[str, Any]] = {
    "extension": {  # which by itself connects nothing: routes through the other hosts, as host-gw
        "SubnetAddCommand": '[ -z "$SUBNET" ] || ip route replace "$SUBNET" via "$PUBLIC_IP" || exit;'
        ' [ -z "$IPV6SUBNET" ] || ip route replace "$IPV6SUBNET" via "$PUBLIC_IPV6"',
        "SubnetRemoveCommand": 'for subnet in $SUBNET $IPV6SUBNET; do ip route del "$subnet"; done',
    },
    "ovs": {"Datapath": "netdev"},  # which any kernel can
    "ipsec": {"PSK": "known-to-everybody-and-good-for-a-lab-alone." * 3},
}
"""Keys without which a backend does not connect the hosts."""
_NAME = re.compile(r"[a-z][a-z0-9-]{0,30}\Z")
# `${x}` is the shell's and stays; braces around anything but a word (JSON) stay too.
_PLACEHOLDER = re.compile(r"(?<!\$)\{(\w+)\}")


class LabSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What the user asked for; all else follows from it. Raises UsageError for what can't be made.

    config: the network config (JSON text) put into the store. mtu: of the underlay, in bytes. segmenting: whether packets
    are cut to the MTU before they reach the wire, as on a card without offloads. daemons: commands by host, `*` for all
    others; without one a host runs our own flanneld. options: flags that every daemon gets besides.
    """

    name: str
    config: str
    hosts: int = 3
    containers: int = 1
    store: str = "sqlite"
    mtu: int = 1500
    segmenting: bool = False
    ip_masq: bool = False
    daemons: dict[str, str] = {}
    options: tuple[str, ...] = ()
    prefix: str = PREFIX

    def __post_init__(self) -> None:
        if not _NAME.match(self.name):
            raise UsageError(f"lab name {self.name!r}: use up to 31 of a-z, 0-9 and -, beginning with a letter")
        if not 1 <= self.hosts <= MAX_HOSTS:
            raise UsageError(f"{self.hosts} hosts: a lab has 1 to {MAX_HOSTS}")
        if not 0 <= self.containers <= 200:
            raise UsageError(f"{self.containers} containers on a host: a lab has 0 to 200")
        if not 576 <= self.mtu <= 65535 or (6 in self.families and self.mtu < 1280):
            raise UsageError(f"MTU {self.mtu}: it must be 576 to 65535, for IPv6 at least 1280")
        if self.store not in STORES:
            raise UsageError(f"store {self.store!r}: use one of {', '.join(STORES)}{suggestion(self.store, STORES)}")
        for host in self.daemons:
            if host != "*" and host not in self.host_names:
                raise UnknownName(
                    f"--daemon for {host!r}: hosts are {self.host_names[0]} to {self.host_names[-1]}, or * for all"
                    f"{suggestion(host, self.host_names)}"
                )

    @property
    def families(self) -> tuple[int, ...]:
        """The families (4, 6) of the container network, and with them of the underlay."""
        return families(self.config)

    @property
    def host_names(self) -> list[str]:
        """`h1`, `h2` and so on."""
        return [f"h{number}" for number in range(1, self.hosts + 1)]

    def container_names(self, host: str) -> list[str]:
        """`h1c1`, `h1c2` and so on."""
        return [f"{host}c{number}" for number in range(1, self.containers + 1)]

    @property
    def node_names(self) -> list[str]:
        """Everything with a namespace of its own, in the order of the drawing from bottom to top."""
        return [
            SWITCH,
            STORE,
            *self.host_names,
            *(name for host in self.host_names for name in self.container_names(host)),
        ]

    def netns(self, node: str) -> str:
        """The namespace of a node."""
        return f"{self.name}-{node}"

    def underlay(self, node: str, family: int) -> Interface:
        """The underlay address of a host or of the store: 10.99.0.N and fd00:99::N (hexadecimal) for host N."""
        network = ipaddress.ip_network(
            ("10.99.0.0/24" if self.hosts < 254 else "10.99.0.0/16") if family == 4 else "fd00:99::/64"
        )
        # The store stands at the end of the IPv4 network, and at the same number in IPv6.
        number = (254 if self.hosts < 254 else 0xFFFE) if node == STORE else int(node[1:])
        return ipaddress.ip_interface(f"{network[number]}/{network.prefixlen}")

    @property
    def etcd_endpoint(self) -> str:
        """The URL that hosts reach etcd at."""
        address = self.underlay(STORE, self.families[0]).ip
        return f"http://{f'[{address}]' if address.version == 6 else address}:2379"


def network_config(backend: str, families: Sequence[int] = (4,), **backend_options: Any) -> str:
    """A network config for the families (4, 6) given; `backend_options` join Type in the Backend object."""
    config: dict[str, Any] = {}
    if 4 in families:
        config["Network"] = _NETWORKS[4]
    else:
        config["EnableIPv4"] = False
    if 6 in families:
        config |= {"EnableIPv6": True, "IPv6Network": _NETWORKS[6]}
    return json.dumps(config | {"Backend": {"Type": backend, **_NEEDED.get(backend, {}), **backend_options}})


def families(config: str) -> tuple[int, ...]:
    """The families that a network config turns on. One that no daemon will accept counts as IPv4: the daemons say why."""
    try:
        document = json.loads(config)
    except ValueError as error:
        raise UsageError(f"--config is not JSON ({error}); write it like {network_config('vxlan')}") from None
    keys = {key.lower(): value for key, value in document.items()} if isinstance(document, dict) else {}
    found = [4] if keys.get("enableipv4", True) else []
    return tuple([*found, 6] if keys.get("enableipv6", False) else found) or (4,)


def namespaces_batch(spec: LabSpec) -> Iterator[str]:
    """Lines for `ip -batch` that make the namespaces."""
    for node in spec.node_names:
        yield f"netns add {spec.netns(node)}"


def links_batch(spec: LabSpec) -> Iterator[str]:
    """Lines for `ip -batch` that make every cable and bridge; all ends are made in place."""
    for node in (STORE, *spec.host_names):
        yield (
            f"link add eth0 netns {spec.netns(node)} mtu {spec.mtu} type veth"
            f" peer name {node} netns {spec.netns(SWITCH)} mtu {spec.mtu}"
        )
    yield from host_links_batch(spec)


def host_links_batch(spec: LabSpec) -> Iterator[str]:
    """Those of the lines that concern a host and its containers alone: its bridge, and their cables."""
    for host in spec.host_names:
        # A bridge without an address of its own changes its MAC with its ports, and the containers' ARP entries go stale.
        yield f"link add cni0 netns {spec.netns(host)} address {bridge_mac(host)} type bridge mcast_snooping 0"
        for container in spec.container_names(host):
            port = container.removeprefix(host)
            yield f"link add eth0 netns {spec.netns(container)} type veth peer name {port} netns {spec.netns(host)}"


def sysctls(spec: LabSpec, node: str) -> dict[str, str]:
    """Sysctls of a namespace, to be written before its links go up.

    Addresses are unique by plan. With duplicate detection a link-local address is not usable for a second or two, until then
    a router can't ask for the neighbor it forwards to, and a ping would measure that. Devices that a daemon makes keep it.
    """
    host = node in spec.host_names
    settings = {"net/ipv4/ip_forward": "1"} if host else {}
    # A kernel without IPv6 has none of these.
    if 6 in spec.families and node != SWITCH:
        settings |= {"net/ipv6/conf/all/forwarding": "1"} if host else {}
        settings |= {f"net/ipv6/conf/{device}/accept_dad": "0" for device in (["eth0", "cni0"] if host else ["eth0"])}
    return settings


def node_batch(spec: LabSpec, node: str) -> Iterator[str]:
    """Lines for `ip -n NETNS -batch` that set up one namespace, before any daemon runs."""
    yield "link set lo up"
    if node == SWITCH:
        # Without snooping the bridge floods multicast, on which neighbor discovery depends.
        yield f"link add br0 mtu {spec.mtu} type bridge stp_state 0 mcast_snooping 0"
        yield "link set br0 up"
        for port in (STORE, *spec.host_names):
            yield f"link set {port} master br0 up"
        return
    if node == STORE or node in spec.host_names:
        yield "link set eth0 up"
        for family in spec.families:
            yield f"addr add {spec.underlay(node, family)} dev eth0"
    if node in spec.host_names:
        yield "link set cni0 up"
        for container in spec.container_names(node):
            yield f"link set {container.removeprefix(node)} master cni0 up"


def bridge_mac(host: str) -> str:
    """A locally administered MAC address for a host's cni0."""
    number = int(host[1:])
    return f"02:c0:00:00:{number >> 8:02x}:{number & 255:02x}"


def gateway_batch(gateways: Iterable[Interface], mtu: int) -> Iterator[str]:
    """Lines that give a host's cni0 its subnet's gateway addresses and MTU, whatever it had before."""
    yield "addr flush dev cni0 scope global"
    yield f"link set cni0 mtu {mtu}"
    for gateway in gateways:
        yield f"addr add {gateway} dev cni0"


def port_batch(ports: Iterable[str], mtu: int) -> Iterator[str]:
    """Lines that give the host's ends of its containers' cables the MTU."""
    for port in ports:
        yield f"link set {port} mtu {mtu}"


def container_batch(gateways: Sequence[Interface], addresses: Sequence[Interface], mtu: int) -> Iterator[str]:
    """Lines that give a container its addresses, its MTU and its default routes, whatever it had before."""
    yield "addr flush dev eth0 scope global"
    yield f"link set eth0 mtu {mtu} up"
    for address in addresses:
        yield f"addr add {address} dev eth0"
    for gateway in gateways:
        everywhere = "0.0.0.0/0" if gateway.version == 4 else "::/0"
        yield f"route replace {everywhere} via {gateway.ip} dev eth0"


def container_address(gateway: Interface, number: int) -> Interface:
    """The address of a host's container `number` (from 1): those after the gateway. Raises UsageError when full."""
    address = gateway.ip + number
    if address not in gateway.network or address == gateway.network.broadcast_address:
        raise UsageError(
            f"subnet {gateway.network} has no room for {number} containers: use fewer, or a larger SubnetLen"
        )
    return ipaddress.ip_interface(f"{address}/{gateway.network.prefixlen}")


def daemon_flags(spec: LabSpec, facts: Mapping[str, str], *, own: bool) -> list[str]:
    """The flags of a daemon: those that flannel has too, and for our own flanneld the API of etcd to speak.

    With SQLite `--store` is given to any program: there is nothing else that could join.
    """
    flags = [f"--iface={facts['iface']}", f"--subnet-file={facts['subnet_file']}", f"--etcd-prefix={spec.prefix}"]
    if spec.store == "sqlite":
        flags.append(f"--store={facts['store']}")
    else:
        flags.append(f"--etcd-endpoints={facts['etcd_endpoints']}")
        if own:
            # One server may speak both, and a lab with v2 in its name must not quietly use v3.
            flags.append(f"--etcd-api={'v2' if spec.store == 'etcd2' else 'v3'}")
    return [*flags, *(["--ip-masq"] if spec.ip_masq else []), *spec.options]


def daemon_argv(command: str, flags: Sequence[str], facts: Mapping[str, str]) -> list[str]:
    """The words of a `--daemon` command: placeholders such as {subnet_file} filled in, or without any the flags appended.

    Raises UsageError for a placeholder that does not exist and for a command that can't be split into words.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UsageError(f"--daemon command {command!r}: {error}") from None
    if not words:
        raise UsageError("--daemon needs a command, as in --daemon h2=/opt/flannel/flanneld")
    if not any(_PLACEHOLDER.search(word) for word in words):
        return [*words, *flags]

    def fill(match: re.Match[str]) -> str:
        try:
            return facts[match[1]]
        except KeyError:
            known = ", ".join("{" + name + "}" for name in facts)
            raise UnknownName(
                f"--daemon: no placeholder {match[0]}; there are {known}{suggestion(match[1], list(facts))}"
            ) from None

    return [_PLACEHOLDER.sub(fill, word) for word in words]
