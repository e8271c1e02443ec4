"""vxlan: one device, and a neighbor, an FDB entry and a route for each peer (compatibility reference, section 6.2).

Config keys: VNI (1), Port (8472, the kernel's), GBP, Learning, DirectRouting (false), MTU, MacPrefix, TxChecksumOffload
(auto, on, off). IPv4 and IPv6 networks have a device each. What is sent to a peer carries the MAC address that the peer
published, so a device keeps its MAC over restarts: MacPrefix, then the one in our lease, then the device's present one.
"""

from __future__ import annotations

import socket
from typing import ClassVar

import msgspec

from wincey.backends.base import HostFacts, public_attrs
from wincey.model.address import Address, MacAddress, Subnet, format_mac, parse_mac, single
from wincey.model.config import NetworkConfig
from wincey.model.errors import UNREADABLE, BadAddress, BadConfig, BadLease
from wincey.model.lease import Lease, LeaseAttrs, LeaseKey
from wincey.model.state import FdbEntry, InterfaceAddress, Link, Neighbor, Object, Route, Sysctl, Vxlan

PORT = 8472  # what Linux uses since before IANA assigned 4789
OVERHEAD = 50  # outer IPv4 20, UDP 8, VXLAN 8, inner Ethernet 14
OVERHEAD_V6 = 70  # the outer header is IPv6: 40


class BackendData(msgspec.Struct):
    """The lease data of one family. `VNI` is absent in leases of flannel up to 0.13."""

    VtepMAC: str
    VNI: int | None = None


class _Published(msgspec.Struct):
    VNI: int
    VtepMAC: str


def device_name(vni: int, family: int) -> str:
    """`flannel.1` for IPv4, `flannel-v6.1` for IPv6."""
    return f"flannel.{vni}" if family == socket.AF_INET else f"flannel-v6.{vni}"


def published_macs(attrs: LeaseAttrs) -> dict[str, MacAddress]:
    """The MACs by device name that a lease tells peers: what our own device must keep."""
    macs = {}
    for data, family in ((attrs.backend_data, socket.AF_INET), (attrs.backend_v6_data, socket.AF_INET6)):
        if attrs.backend_type == VxlanBackend.type and data:
            try:
                macs[device_name(read_vni(attrs), family)] = parse_mac(read_data(data).VtepMAC)
            except (BadLease, BadAddress):
                continue
    return macs


def read_data(data: bytes) -> BackendData:
    """Read a lease's BackendData; raises BadLease."""
    try:
        return msgspec.json.decode(data, type=BackendData)
    except UNREADABLE as error:
        raise BadLease(f"vxlan lease data can't be read ({error}): {data[:200]!r}") from None


def read_vni(attrs: LeaseAttrs) -> int:
    """The VNI that a lease tells; raises BadLease. Flannel up to 0.13 tells none and means its default."""
    vni = read_data(attrs.backend_data or attrs.backend_v6_data).VNI
    return 1 if vni is None else vni


class VxlanBackend:
    """vxlan in the kernel."""

    type: ClassVar[str] = "vxlan"
    keys: ClassVar[tuple[str, ...]] = (
        "VNI",
        "Port",
        "GBP",
        "Learning",
        "DirectRouting",
        "MTU",
        "MacPrefix",
        "TxChecksumOffload",
    )

    def __init__(self, config: NetworkConfig, host: HostFacts) -> None:
        options = config.backend
        self._config, self._host = config, host
        # The wire has room for 24 bits, a device's name for 15 characters.
        self.vni = options.integer("VNI", 1, minimum=0, maximum=9_999 if config.enable_ipv6 else 9_999_999)
        self.port = options.integer("Port", 0, minimum=0, maximum=65535) or PORT
        self._gbp = options.boolean("GBP", default=False)
        self._learning = options.boolean("Learning", default=False)
        self._direct = options.boolean("DirectRouting", default=False)
        self._base_mtu = options.integer("MTU", 0, minimum=0, maximum=65535) or host.mtu
        self._mac_prefix = _mac_prefix(options.text("MacPrefix", ""))
        self._tx_checksum = _tx_checksum(options.text("TxChecksumOffload", "auto"), host)
        smallest = 1280 + OVERHEAD_V6 if config.enable_ipv6 else 68 + OVERHEAD
        if self._base_mtu < smallest:
            raise BadConfig(f"vxlan needs an MTU of at least {smallest} on {host.underlay}, which has {self._base_mtu}")

    @property
    def mtu(self) -> int:
        # With both families flannel reserves the IPv4 overhead, and containers depend on that number. The IPv6 device has
        # its own, smaller MTU, and path MTU discovery tells senders.
        return self._base_mtu - (OVERHEAD if self._config.enable_ipv4 else OVERHEAD_V6)

    def attrs(self) -> LeaseAttrs:
        return msgspec.structs.replace(
            public_attrs(self._host, self._config, self.type),
            backend_data=self._data(socket.AF_INET) if self._config.enable_ipv4 else b"",
            backend_v6_data=self._data(socket.AF_INET6) if self._config.enable_ipv6 else b"",
        )

    def _data(self, family: int) -> bytes:
        return msgspec.json.encode(_Published(self.vni, format_mac(self._mac(family))))

    def _mac(self, family: int) -> MacAddress:
        if self._mac_prefix:
            address = self._host.public or self._host.public_v6 or bytes(4)
            # The second device of a dual-stack host needs a MAC of its own.
            last = address[-1] if family == socket.AF_INET or not self._config.enable_ipv4 else address[-1] ^ 0x80
            return self._mac_prefix + address[-4:-1] + bytes([last])
        return self._host.macs[device_name(self.vni, family)]

    def reaches(self, attrs: LeaseAttrs) -> bool:
        if attrs.backend_type != self.type:
            return False
        vni = read_data(attrs.backend_data or attrs.backend_v6_data).VNI
        return vni is None or vni == self.vni

    def local(self, own: LeaseKey) -> list[Object]:
        objects: list[Object] = []
        for subnet in own.subnets:
            v4 = subnet.family == socket.AF_INET
            # The interface's own address, not the public one: behind NAT the kernel could not send from that.
            local = self._host.local if v4 else self._host.local_v6
            if local is None:
                continue
            device = device_name(self.vni, subnet.family)
            link = Vxlan(
                vni=self.vni,
                port=self.port,
                local=local,
                underlay=self._host.underlay,
                learning=self._learning,
                gbp=self._gbp,
            )
            mtu = self._base_mtu - (OVERHEAD if v4 else OVERHEAD_V6)
            mac = self._mac(subnet.family)
            objects += [
                Link(device, "vxlan", mtu, mac=mac, vxlan=link, tx_checksum=self._tx_checksum),
                Sysctl(f"net/ipv6/conf/{device}/accept_ra", "0", optional=True),
                InterfaceAddress(device, single(subnet.address)),
            ]
        return objects

    def peer(self, own: LeaseKey, lease: Lease) -> list[Object]:
        objects: list[Object] = []
        attrs = lease.attrs
        if own.v4 and lease.key.v4:
            if not attrs.public_ip:
                raise BadLease(f"lease {lease.key} names no PublicIP")
            objects += self._towards(lease.key.v4, attrs.public_ip, attrs.backend_data)
        if own.v6 and lease.key.v6 and attrs.public_ipv6:
            objects += self._towards(lease.key.v6, attrs.public_ipv6, attrs.backend_v6_data)
        return objects

    def _towards(self, subnet: Subnet, public: Address, data: bytes) -> list[Object]:
        if self._direct and (through := self._host.device_towards(public)):
            return [Route(subnet, through, gateway=public)]
        try:
            mac = parse_mac(read_data(data).VtepMAC)
        except BadAddress as error:
            raise BadLease(f"lease of {subnet}: VtepMAC {error}") from None
        device = device_name(self.vni, subnet.family)
        return [
            Neighbor(device, subnet.address, mac),
            FdbEntry(device, mac, public),
            Route(subnet, device, gateway=subnet.address, onlink=True),
        ]


def _mac_prefix(text: str) -> bytes:
    if not text:
        return b""
    try:
        prefix = bytes.fromhex(text.replace("-", "").replace(":", ""))
    except ValueError:
        prefix = b""
    if len(prefix) != 2 or prefix[0] & 1:
        raise BadConfig(
            f"Backend.MacPrefix is {text!r}; it must be two bytes of a unicast MAC address, such as 0E-2A"
            " (the other four are the public address)"
        )
    return prefix


def _tx_checksum(text: str, host: HostFacts) -> bool | None:
    match text.lower():
        case "on":
            return True
        case "off":
            return False
        case "auto":
            # Before Linux 5.7 a packet that was NATed twice left vxlan with a wrong checksum when it was left to the card.
            return False if (0, 0) < host.kernel < (5, 7) else None
    raise BadConfig(f"Backend.TxChecksumOffload is {text!r}; it must be auto, on or off")
