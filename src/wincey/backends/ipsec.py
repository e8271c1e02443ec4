"""ipsec: packets between subnets are encrypted by ESP, with keys that strongSwan negotiates (reference, section 6.6).

Config keys: PSK (96 characters or more), UDPEncap (false), ESPProposal, as flannel's; and Auth (psk or cert) with CertFile,
KeyFile and CAFile, and ESP (auto, kernel or user). IPv4 only.

What must be encrypted is never sent plain. Policies of our own, which outlive charon, say so in the kernel: packets of our
subnet to a peer's go through the tunnel or nowhere, those of anybody else nowhere. The blackhole route of the whole network
stops the rest: subnets that nobody has (any more), and all of them while user-space ESP has no device.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from wincey.backends.base import HostFacts, public_attrs
from wincey.model.address import Subnet
from wincey.model.config import NetworkConfig
from wincey.model.errors import BadConfig, BadLease, NotJoinable
from wincey.model.ipsec import USER_DEVICE, Direction, IkeDaemon, IpsecPeer, IpsecTerms, XfrmPolicy
from wincey.model.lease import Lease, LeaseAttrs, LeaseKey
from wincey.model.secret import Secret
from wincey.model.state import Link, Object, Route

PROPOSAL = "aes128gcm16-sha256-prfsha256-ecp256"
OVERHEAD = 77  # flannel's: outer IPv4 20, ESP 8, IV up to 16, padding up to 17, ICV up to 16
OVERHEAD_UDP = 8
SHORTEST_PSK = 96
USER_MTU = 1400
"""What charon reads at once from its device for user-space ESP, whatever MTU that has: longer packets it cuts off."""


_ANYWHERE = Subnet(bytes(4), 0)


class IpsecBackend:
    """IPsec tunnels, one for each pair of subnets."""

    type: ClassVar[str] = "ipsec"
    keys: ClassVar[tuple[str, ...]] = (
        "PSK",
        "UDPEncap",
        "ESPProposal",
        "Auth",
        "CertFile",
        "KeyFile",
        "CAFile",
        "ESP",
    )

    def __init__(self, config: NetworkConfig, host: HostFacts) -> None:
        if not config.enable_ipv4 or config.enable_ipv6:
            raise BadConfig(
                "the ipsec backend carries IPv4 only; for encrypted IPv6 or dual stack use the wireguard backend"
            )
        if host.local is None or host.public is None:
            raise NotJoinable(f"the ipsec backend needs an IPv4 address on {host.underlay}")
        options = config.backend
        self._config, self._host = config, host
        self._encap = options.boolean("UDPEncap", default=False)
        esp: Literal["kernel", "user"] = "user" if host.found.get("esp") == "user" else "kernel"
        auth: Literal["psk", "cert"] = "cert" if self._choice("Auth", "psk", "cert") == "cert" else "psk"
        self.esp_choice = self._choice("ESP", "auto", "kernel", "user")
        self._daemon = IkeDaemon(
            esp,
            self._psk() if auth == "psk" else None,
            *((self._file(key) for key in ("CertFile", "KeyFile", "CAFile")) if auth == "cert" else ()),
        )
        proposal = options.text("ESPProposal", PROPOSAL)
        self._terms = IpsecTerms(host.local, auth, esp, proposal, self._encap)
        self._identity = host.public
        if self.mtu < 68:
            raise BadConfig(
                f"ipsec needs an MTU of at least {68 + OVERHEAD + OVERHEAD_UDP} on {host.underlay},"
                f" which has {host.mtu}"
            )

    def _choice(self, key: str, *known: str) -> str:
        chosen = self._config.backend.text(key, known[0]).lower()
        if chosen not in known:
            self._config.backend.wrong(key, f"must be one of {', '.join(known)}", known[0])
        return chosen

    def _psk(self) -> Secret[str]:
        # Its value is no part of any message.
        psk = self._config.backend.raw("PSK")
        if not isinstance(psk, str) or len(psk) < SHORTEST_PSK:
            found = (
                "is missing"
                if psk is None
                else f"has {len(psk)} characters"
                if isinstance(psk, str)
                else "is not a text"
            )
            raise BadConfig(
                f"network config: Backend.PSK {found}, but the ipsec backend needs at least {SHORTEST_PSK}; make one with"
                ' `openssl rand -hex 48`, or use certificates ("Auth": "cert")'
            )
        return Secret(psk)

    def _file(self, key: str) -> str:
        path = self._config.backend.text(key, "")
        if not path.startswith("/"):
            rule = 'must be the absolute path of a PEM file on every host, as Auth is "cert"'
            self._config.backend.wrong(key, rule, f"/etc/wincey/ipsec/{key[:-4].lower()}.pem")
        return path

    @property
    def mtu(self) -> int:
        most = self._host.mtu - OVERHEAD - (OVERHEAD_UDP if self._encap else 0)
        return min(most, USER_MTU) if self._terms.esp == "user" else most

    def attrs(self) -> LeaseAttrs:
        return public_attrs(self._host, self._config, self.type)

    def reaches(self, attrs: LeaseAttrs) -> bool:
        return attrs.backend_type == self.type

    def local(self, own: LeaseKey) -> list[Object]:
        assert self._config.network
        objects: list[Object] = [self._daemon, Route(self._config.network, "", kind="blackhole")]
        if self._terms.esp == "user":
            objects.append(Link(USER_DEVICE, "tun", self.mtu))
        return objects

    def peer(self, own: LeaseKey, lease: Lease) -> list[Object]:
        mine, subnet, remote = own.v4, lease.key.v4, lease.attrs.public_ip
        if not mine or not subnet:
            return []
        if not remote:
            raise BadLease(f"lease {lease.key} names no PublicIP")
        peer = IpsecPeer(mine, subnet, self._identity, remote, self._terms)
        if self._terms.esp == "user":  # charon leads packets into its device, and only while it has keys for them
            return [peer]
        local = self._terms.local
        ways: tuple[tuple[Direction, Subnet, Subnet], ...] = (
            ("out", mine, subnet),
            ("in", subnet, mine),
            ("fwd", subnet, mine),
        )
        return [
            *(
                XfrmPolicy(way, source, destination, (local, remote) if way == "out" else (remote, local))
                for way, source, destination in ways
            ),
            XfrmPolicy("out", _ANYWHERE, subnet, None),
            # Leads past the blackhole and to the policies; what they let pass is routed by its outer header.
            Route(subnet, self._host.underlay),
            peer,
        ]
