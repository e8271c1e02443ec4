"""wireguard: encrypted; one device (or one for each family), and a peer for each lease (compatibility reference, section 6.5).

Config keys: PSK, ListenPort (51820), ListenPortV6 (51821), MTU, PersistentKeepaliveInterval, Mode. With Mode separate IPv4
travels in IPv4 and IPv6 in IPv6, by two devices; with auto, ipv4 or ipv6 one device carries both families, in packets of the
family that is named or, with auto, chosen for each peer.

Beyond flannel: a host whose public address is not its own interface's is behind NAT, and keeps its way open by itself unless
PersistentKeepaliveInterval says otherwise.
"""

from __future__ import annotations

import socket
from base64 import b64decode
from typing import ClassVar

import msgspec

from wincey.backends.base import HostFacts, public_attrs
from wincey.model.address import Address, Subnet, single
from wincey.model.config import BackendOptions, NetworkConfig
from wincey.model.errors import UNREADABLE, BadConfig, BadLease
from wincey.model.lease import Lease, LeaseAttrs, LeaseKey
from wincey.model.secret import Secret
from wincey.model.state import InterfaceAddress, Link, Object, Route
from wincey.model.wireguard import (
    DEVICE,
    DEVICE_V6,
    KEY_SIZE,
    WireguardDevice,
    WireguardPeer,
    WireguardSubnet,
    key_text,
)

PORT, PORT_V6 = 51820, 51821
OVERHEAD = (
    80  # outer IPv6 40, UDP 8, WireGuard's header 16, its authentication tag 16: flannel reserves it for IPv4 too
)
KEEPALIVE = 25  # seconds: what WireGuard's authors suggest for any NAT

_MODES = ("separate", "auto", "ipv4", "ipv6")
_PRIVATE_V4 = (Subnet.parse("10.0.0.0/8"), Subnet.parse("172.16.0.0/12"), Subnet.parse("192.168.0.0/16"))
_PRIVATE_V6 = Subnet.parse("fc00::/7")


class BackendData(msgspec.Struct):
    """The lease data of one family. Port: absent in leases of flannel up to 0.26.5."""

    PublicKey: str
    Port: int = 0


class WireguardBackend:
    """WireGuard, by the kernel or by wireguard-go.

    Of the host it has to know (HostFacts.found) `public_key` in base64, `key_file`, the file with the private key, and `way`.
    """

    type: ClassVar[str] = "wireguard"
    keys: ClassVar[tuple[str, ...]] = (
        "PSK",
        "ListenPort",
        "ListenPortV6",
        "MTU",
        "PersistentKeepaliveInterval",
        "Mode",
    )

    def __init__(self, config: NetworkConfig, host: HostFacts) -> None:
        options = config.backend
        self._config, self._host = config, host
        self._mode = _mode(options, config)
        self._port = options.integer("ListenPort", PORT, minimum=1, maximum=65535)
        self._port_v6 = options.integer("ListenPortV6", PORT_V6, minimum=1, maximum=65535)
        if self._mode == "separate" and config.enable_ipv4 and config.enable_ipv6 and self._port == self._port_v6:
            options.wrong(
                "ListenPortV6", f"must not be ListenPort ({self._port}): two devices can't share a port", PORT_V6
            )
        base = options.integer("MTU", 0, minimum=0, maximum=65535) or host.mtu
        smallest = (1280 if config.enable_ipv6 else 68) + OVERHEAD
        if base < smallest:
            raise BadConfig(f"wireguard needs an MTU of at least {smallest} on {host.underlay}, which has {base}")
        self._mtu = base - OVERHEAD
        self._psk = _psk(options)
        self._keepalive = options.integer("PersistentKeepaliveInterval", 0, minimum=0, maximum=65535, example=KEEPALIVE)
        self._keepalive_given = options.raw("PersistentKeepaliveInterval") is not None
        self._public_key = _read_key(host.found["public_key"])

    @property
    def mtu(self) -> int:
        return self._mtu

    def attrs(self) -> LeaseAttrs:
        return msgspec.structs.replace(
            public_attrs(self._host, self._config, self.type),
            backend_data=self._data(socket.AF_INET) if self._config.enable_ipv4 else b"",
            backend_v6_data=self._data(socket.AF_INET6) if self._config.enable_ipv6 else b"",
        )

    def _data(self, family: int) -> bytes:
        return msgspec.json.encode(BackendData(key_text(self._public_key), self._listen_port(family)))

    def _device(self, family: int) -> str:
        return DEVICE_V6 if self._mode == "separate" and family == socket.AF_INET6 else DEVICE

    def _listen_port(self, family: int) -> int:
        return self._port_v6 if self._device(family) == DEVICE_V6 else self._port

    def reaches(self, attrs: LeaseAttrs) -> bool:
        return attrs.backend_type == self.type

    def local(self, own: LeaseKey) -> list[Object]:
        found, objects, made = self._host.found, list[Object](), set[str]()
        by_kernel = found["way"] == "kernel"
        for subnet, network in zip(own.subnets, self._config.networks, strict=True):
            device = self._device(subnet.family)
            if device not in made:
                made.add(device)
                objects += [
                    WireguardDevice(
                        device,
                        "kernel" if by_kernel else "wireguard-go",
                        self._listen_port(subnet.family),
                        self._public_key,
                        found["key_file"],
                    ),
                    Link(device, "wireguard" if by_kernel else "tun", self._mtu),
                ]
            objects += [
                InterfaceAddress(device, single(subnet.address)),
                Route(network, device, link_scope=subnet.family == socket.AF_INET),
            ]
        return objects

    def peer(self, own: LeaseKey, lease: Lease) -> list[Object]:
        theirs = [subnet for subnet in lease.key.subnets if any(mine.family == subnet.family for mine in own.subnets)]
        if not theirs:
            return []
        if self._mode != "separate":
            return self._towards(lease, self._family_to(lease.attrs), theirs)
        objects: list[Object] = []
        for subnet in theirs:
            # An IPv4 address is always published; an IPv6 one may follow, as with flannel.
            if subnet.family == socket.AF_INET or lease.attrs.public_ipv6:
                objects += self._towards(lease, subnet.family, [subnet])
        return objects

    def _towards(self, lease: Lease, family: int, subnets: list[Subnet]) -> list[Object]:
        attrs, v4 = lease.attrs, family == socket.AF_INET
        endpoint = attrs.public_ip if v4 else attrs.public_ipv6
        if not endpoint:
            raise BadLease(f"lease {lease.key} names no {'PublicIP' if v4 else 'PublicIPv6'}")
        data = read_data(
            (attrs.backend_data if v4 else attrs.backend_v6_data) or attrs.backend_data or attrs.backend_v6_data
        )
        public_key = _read_key(data.PublicKey)
        if public_key == self._public_key:
            raise BadLease(
                f"lease {lease.key} has the public key of this host: two hosts share one private key"
                f" ({self._host.found['key_file']}); delete the file on one of them and restart its daemon"
            )
        device = self._device(family)
        port = data.Port or self._listen_port(family)
        peer = WireguardPeer(device, public_key, endpoint, port, self._keep_alive(family), self._psk)
        return [peer, *(WireguardSubnet(device, subnet, public_key) for subnet in subnets)]

    def _keep_alive(self, family: int) -> int:
        host = self._host
        public, local = (host.public, host.local) if family == socket.AF_INET else (host.public_v6, host.local_v6)
        behind_nat = public is not None and public != local
        return KEEPALIVE if behind_nat and not self._keepalive_given else self._keepalive

    def _family_to(self, attrs: LeaseAttrs) -> int:
        """The family of the packets to a peer, with one device for both (reference, section 6.5)."""
        if self._mode != "auto":
            return socket.AF_INET if self._mode == "ipv4" else socket.AF_INET6
        if attrs.public_ipv6 is None:
            return socket.AF_INET
        if attrs.public_ip is None:
            return socket.AF_INET6
        if not _is_private(attrs.public_ip) and self._host.public:
            return socket.AF_INET
        own = self._host.public_v6
        if own and not _is_private(own) and not _is_private(attrs.public_ipv6):
            return socket.AF_INET6
        return socket.AF_INET


def read_data(data: bytes) -> BackendData:
    """Read a lease's BackendData; raises BadLease."""
    try:
        found = msgspec.json.decode(data, type=BackendData)
    except UNREADABLE as error:
        raise BadLease(f"wireguard lease data can't be read ({error}): {data[:200]!r}") from None
    if not 0 <= found.Port <= 65535:
        raise BadLease(f"wireguard lease data has the Port {found.Port}; it must be 1 to 65535")
    return found


def _read_key(text: str) -> bytes:
    """A public key from its base64 text; raises BadLease."""
    key = _decode_key(text)
    if key is None:
        raise BadLease(f"wireguard lease data has the PublicKey {text[:60]!r}; it must be 32 bytes in base64")
    return key


def _decode_key(text: str) -> bytes | None:
    try:
        key = b64decode(text, validate=True)
    except ValueError:
        return None
    return key if len(key) == KEY_SIZE else None


def _mode(options: BackendOptions, config: NetworkConfig) -> str:
    mode = options.text("Mode", "separate").lower()
    if mode not in _MODES:
        options.wrong("Mode", f"must be one of {', '.join(_MODES)}", "separate")
    if (mode == "ipv4" and not config.enable_ipv4) or (mode == "ipv6" and not config.enable_ipv6):
        options.wrong("Mode", "hosts publish no address of that family, as the network does not have it", "auto")
    return mode


def _psk(options: BackendOptions) -> Secret[bytes] | None:
    # Without BackendOptions.wrong, which shows the value.
    value = options.raw("PSK")
    if value is None or value == "":
        return None
    key = _decode_key(value) if isinstance(value, str) else None
    if key is None:
        raise BadConfig("network config: Backend.PSK must be 32 bytes in base64, as `wg genpsk` makes them")
    return Secret(key)


def _is_private(address: Address) -> bool:
    return any(subnet.contains(address) for subnet in (*_PRIVATE_V4, _PRIVATE_V6))
