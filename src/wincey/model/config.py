"""The network config: the JSON that an operator puts under `<prefix>/config`, read, checked and completed.

The rules are the compatibility reference's, sections 2 and 2.1. Reading follows Go's JSON decoder, which flannel's users have
come to depend on: keys match in any case, a repeated key's last value counts, `null` leaves the default, and a number must
be written as a whole number. An unknown key is no error, but there is a warning for it, as most often it is a misspelt one.

`parse` either returns a config in which everything holds, or raises BadConfig with one line that says key, value, rule and
an example of a right value.
"""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, NoReturn, Self

import msgspec

from wincey.model.address import UNSPECIFIED_V4, Address, Subnet, family_of, format_address, parse_address
from wincey.model.errors import BadAddress, BadConfig, UnknownBackend
from wincey.model.lease import LeaseKey

UNSPECIFIED_V6: Address = bytes(16)

DEFAULT_BACKEND = "udp"
"""What a config without a Backend means: flannel's documentation says vxlan, its code udp."""

_EXAMPLE = '{"Network": "10.3.0.0/16", "Backend": {"Type": "vxlan"}}'

_KEYS_V4 = ("Network", "SubnetLen", "SubnetMin", "SubnetMax")
_KEYS_V6 = ("IPv6Network", "IPv6SubnetLen", "IPv6SubnetMin", "IPv6SubnetMax")
_KEYS = (*_KEYS_V4, *_KEYS_V6, "EnableIPv4", "EnableIPv6", "EnableNFTables", "Backend")


class _Section(msgspec.Struct, frozen=True):
    """The keys of one JSON object in any case, with typed readers. An absent key and null both read as the default.

    values: by lower-case key, the key as written and its value.
    """

    place: ClassVar[str] = ""
    values: dict[str, tuple[str, Any]]

    @classmethod
    def of(cls, keys: Mapping[str, Any]) -> Self:
        """Make one from plain JSON values; of two keys that differ in case only, the later counts."""
        return cls({key.lower(): (key, value) for key, value in keys.items()})

    def raw(self, key: str) -> Any:
        """The JSON value as it is (dict, list, str, int, float, bool), None when absent or null."""
        return self.values.get(key.lower(), (key, None))[1]

    def integer(self, key: str, default: int, *, minimum: int, maximum: int, example: int | None = None) -> int:
        """A whole number within limits; raises BadConfig, with the default as the example unless one is given."""
        value = self.raw(key)
        if value is None:
            return default
        if type(value) is not int or not minimum <= value <= maximum:
            rule = f"must be a whole number from {minimum} to {maximum}, without quotes"
            self.wrong(key, rule, default if example is None else example)
        return value

    def boolean(self, key: str, *, default: bool) -> bool:
        """`true` or `false`; raises BadConfig."""
        value = self.raw(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.wrong(key, "must be true or false, without quotes", not default)
        return value

    def text(self, key: str, default: str) -> str:
        """A string; raises BadConfig."""
        value = self.raw(key)
        if value is None:
            return default
        if not isinstance(value, str):
            self.wrong(key, "must be a text in quotes", default or "text")
        return value

    def wrong(self, key: str, rule: str, example: object) -> NoReturn:
        """Raise BadConfig: the key, the value that it has, the rule that it breaks, and a value that would be right."""
        value = self.raw(key)
        found = "is missing" if value is None else f"is {_shorten(_hide(json.dumps(value)))}"
        raise BadConfig(
            f"network config: {self.place}{key} {found}, but {rule}; write it like {json.dumps(key)}: {json.dumps(example)}"
        )

    def unknown_keys(self, known: Iterable[str]) -> list[str]:
        """A warning for each key that is none of `known`, with the one that was probably meant."""
        names = {name.lower(): name for name in known}
        return [self._unknown(key, names) for lower, (key, _) in self.values.items() if lower not in names]

    def _unknown(self, key: str, names: Mapping[str, str]) -> str:
        import difflib  # noqa: PLC0415  # most configs have no unknown key, and it costs 3 ms

        close = difflib.get_close_matches(key.lower(), names, n=1)
        hint = f"did you mean {names[close[0]]}?" if close else f"known are {', '.join(names.values())}"
        return f"unknown key {self.place}{_shorten(json.dumps(key)[1:-1])} is ignored; {hint}"


class BackendOptions(_Section, frozen=True):
    """The keys of `Backend`, which each backend reads for itself."""

    place: ClassVar[str] = "Backend."


class _Network(_Section, frozen=True):
    """The top-level keys."""

    def subnet(self, key: str, example: str) -> Subnet | None:
        """A prefix of the example's family with its host bits masked off."""
        value, wanted = self.raw(key), Subnet.parse(example).family
        if value is None:
            return None
        try:
            subnet = Subnet.parse(value).masked() if isinstance(value, str) else None
        except BadAddress:
            subnet = None
        if subnet is None or subnet.family != wanted:
            self.wrong(key, f"must be an {_FAMILY[wanted]} subnet with its prefix length", example)
        return subnet

    def address(self, key: str, default: Address) -> Address:
        """An address of the default's family; the unspecified address means the default too."""
        value = self.raw(key)
        if value is None:
            return default
        try:
            address = parse_address(value) if isinstance(value, str) else b""
        except BadAddress:
            address = b""
        if len(address) != len(default):
            family = _FAMILY[family_of(default)]
            self.wrong(key, f"must be an {family} address without a prefix length", format_address(default))
        return address if any(address) else default


class _Pool(msgspec.Struct, frozen=True):
    network: Subnet | None
    length: int
    low: Address
    high: Address


class NetworkConfig(msgspec.Struct, frozen=True, kw_only=True):
    """A valid config with its defaults filled in.

    network, subnet_len, subnet_min and subnet_max have meaning with enable_ipv4 only (else None, 0 and the unspecified
    address); likewise for IPv6. subnet_min above subnet_max is allowed and means an empty pool.
    enable_nftables: None when the config doesn't say. backend_type: lower case. warnings: what should be logged.
    """

    enable_ipv4: bool
    network: Subnet | None
    subnet_len: int
    subnet_min: Address
    subnet_max: Address
    enable_ipv6: bool
    ipv6_network: Subnet | None
    ipv6_subnet_len: int
    ipv6_subnet_min: Address
    ipv6_subnet_max: Address
    enable_nftables: bool | None
    backend_type: str
    backend: BackendOptions
    warnings: tuple[str, ...] = ()

    @classmethod
    def parse(cls, raw: bytes | str) -> NetworkConfig:
        """Read, check and complete a config. Raises UnknownBackend when all but the empty backend type is right, BadConfig
        for anything else."""
        keys = _Network.of(_decode(raw))
        enable_ipv4 = keys.boolean("EnableIPv4", default=True)
        enable_ipv6 = keys.boolean("EnableIPv6", default=False)
        if not enable_ipv4 and not enable_ipv6:
            keys.wrong("EnableIPv4", "must be true unless EnableIPv6 is", example=True)
        v4 = _pool_v4(keys) if enable_ipv4 else _Pool(None, 0, UNSPECIFIED_V4, UNSPECIFIED_V4)
        v6 = _pool_v6(keys) if enable_ipv6 else _Pool(None, 0, UNSPECIFIED_V6, UNSPECIFIED_V6)
        nftables = None if keys.raw("EnableNFTables") is None else keys.boolean("EnableNFTables", default=False)
        backend_type, backend = _backend(keys)
        return cls(
            enable_ipv4=enable_ipv4,
            network=v4.network,
            subnet_len=v4.length,
            subnet_min=v4.low,
            subnet_max=v4.high,
            enable_ipv6=enable_ipv6,
            ipv6_network=v6.network,
            ipv6_subnet_len=v6.length,
            ipv6_subnet_min=v6.low,
            ipv6_subnet_max=v6.high,
            enable_nftables=nftables,
            backend_type=backend_type,
            backend=backend,
            warnings=(*keys.unknown_keys(_KEYS), *_idle_keys(keys, enable_ipv4=enable_ipv4, enable_ipv6=enable_ipv6)),
        )

    @property
    def networks(self) -> tuple[Subnet, ...]:
        """The cluster networks in use, IPv4 first."""
        return tuple(network for network in (self.network, self.ipv6_network) if network)

    def allows(self, key: LeaseKey) -> bool:
        """Whether a lease fits: each family in use within Min and Max and of the right length, the other one absent."""
        return _fits(key.v4, self.network, self.subnet_len, self.subnet_min, self.subnet_max) and _fits(
            key.v6, self.ipv6_network, self.ipv6_subnet_len, self.ipv6_subnet_min, self.ipv6_subnet_max
        )

    def capacity(self, family: int) -> int:
        """How many subnets of AF_INET or AF_INET6 can be leased; 0 when the family is off."""
        if family == socket.AF_INET:
            network, length, low, high = self.network, self.subnet_len, self.subnet_min, self.subnet_max
        else:
            network, length = self.ipv6_network, self.ipv6_subnet_len
            low, high = self.ipv6_subnet_min, self.ipv6_subnet_max
        if network is None:
            return 0
        return max(0, ((int.from_bytes(high, "big") - int.from_bytes(low, "big")) >> (network.bits - length)) + 1)


_FAMILY: dict[int, str] = {socket.AF_INET: "IPv4", socket.AF_INET6: "IPv6"}


def _decode(raw: bytes | str) -> dict[str, Any]:
    text = raw.decode(errors="replace") if isinstance(raw, bytes) else raw
    shown = _shorten(_hide(text))
    try:
        keys = json.loads(text, object_pairs_hook=_last_wins, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise BadConfig(f"network config is not valid JSON ({error}): {shown!r}; write it like {_EXAMPLE}") from None
    if keys is None:
        return {}
    if not isinstance(keys, dict):
        raise BadConfig(f"network config is not a JSON object: {shown!r}; write it like {_EXAMPLE}")
    return keys


def _last_wins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A dict in the order of each key's last occurrence, which decides between keys that differ in case."""
    keys: dict[str, Any] = {}
    for key, value in pairs:
        keys.pop(key, None)
        keys[key] = value
    return keys


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON value")


_SECRET = re.compile(r'("[^"]*(?:psk|secret|password)[^"]*"\s*:\s*)"(?:[^"\\]|\\.)*("|\Z)', re.IGNORECASE)


def _hide(text: str) -> str:
    """A config as it may be logged: without the values of secret keys, even where it is no valid JSON."""
    return _SECRET.sub(r'\1"..."', text)


def _shorten(text: str) -> str:
    return text if len(text) <= 120 else text[:117] + "..."


def _pool_v4(keys: _Network) -> _Pool:
    return _pool(keys, _KEYS_V4, "10.3.0.0/16", usual=24)


def _pool_v6(keys: _Network) -> _Pool:
    return _pool(keys, _KEYS_V6, "fd00:3::/48", usual=64)


def _pool(keys: _Network, names: tuple[str, ...], example: str, usual: int) -> _Pool:
    network_key, length_key, low_key, high_key = names
    network = keys.subnet(network_key, example)
    if network is None or (network.length == 0 and network.first == 0):
        family = _FAMILY[Subnet.parse(example).family]
        hints = "".join(f" ({warning})" for warning in keys.unknown_keys(_KEYS))
        keys.wrong(network_key, f"must be the {family} network of the cluster{hints}", example)
    bits, prefix = network.bits, network.length
    if prefix > bits - 4:
        rule = f"must be /{bits - 4} or wider to hold four subnets or more (network is too small)"
        keys.wrong(network_key, rule, example)
    default_length = usual if prefix <= usual - 2 else prefix + 2
    length = keys.integer(length_key, 0, minimum=0, maximum=bits - 2, example=default_length) or default_length
    if length < prefix + 2:
        rule = f"must be at least {prefix + 2}: the network {network} must be able to accommodate at least four subnets"
        keys.wrong(length_key, rule, default_length)
    size = 1 << (bits - length)
    second, final = network.host(size), network.host(network.size - size)
    low = _boundary(keys, low_key, network, length, second)
    high = _boundary(keys, high_key, network, length, final)
    return _Pool(network, length, low, high)


def _boundary(keys: _Network, key: str, network: Subnet, length: int, default: Address) -> Address:
    address = keys.address(key, default)
    example = format_address(default)
    if not network.contains(address):
        keys.wrong(key, f"must be in the range of the network {network}", example)
    if Subnet(address, length).masked().address != address:
        keys.wrong(key, f"is not on a SubnetLen boundary: it must be the first address of a /{length}", example)
    return address


def _backend(keys: _Network) -> tuple[str, BackendOptions]:
    if "backend" not in keys.values:
        return DEFAULT_BACKEND, BackendOptions({})
    given = keys.raw("Backend")
    if given is not None and not isinstance(given, dict):
        keys.wrong("Backend", "must be an object", {"Type": "vxlan"})
    options: BackendOptions = BackendOptions.of(given or {})
    backend_type = options.text("Type", "").lower()
    if not backend_type:
        raise UnknownBackend(
            'network config: unknown backend type "": Backend has no Type; write it like "Backend": {"Type": "vxlan"}'
        )
    return backend_type, options


def _idle_keys(keys: _Network, *, enable_ipv4: bool, enable_ipv6: bool) -> list[str]:
    switches = ((enable_ipv4, "EnableIPv4", _KEYS_V4), (enable_ipv6, "EnableIPv6", _KEYS_V6))
    return [
        f"{key} is ignored because {switch} is not true"
        for enabled, switch, names in switches
        for key in names
        if not enabled and keys.raw(key) is not None
    ]


def _fits(subnet: Subnet | None, network: Subnet | None, length: int, low: Address, high: Address) -> bool:
    if subnet is None or network is None:
        return subnet is network
    return subnet.length == length and low <= subnet.address <= high
