"""The messages of flannel 0.5's HTTP API between `--listen` and `--remote` (compatibility reference, section 5.2).

Both ends use this module: values in, bytes out, and back. The API knows IPv4 only. What IPv6 needs are further keys, which
are there only in networks that have it; what else is ours travels in headers, which the other kind never looks at.
"""

from __future__ import annotations

import calendar
import datetime
import re
from collections.abc import Collection, Iterable, Sequence

import msgspec

from wincey.model.address import UNSPECIFIED_V4, Address, Subnet, format_address
from wincey.model.config import NetworkConfig
from wincey.model.errors import UNREADABLE, BadAddress, BadLease
from wincey.model.lease import Lease, LeaseAttrs, LeaseKey

HOST = "wincey-host"
"""Request header: who asks, `NAME INSTANCE`, as its host claim has it."""
ADDRESS = "wincey-address"
"""Request header of a long poll: the public address that the host lives at, so that the server defends its claim."""
WISH = "wincey-wish"
"""Request header of POST leases: the lease key that the host would like."""
FORMERLY = "wincey-formerly"
"""Request header of PUT leases: the public address that the lease still has."""
CONFIG = "wincey-config"
"""Response header of a long poll: `changed` when the network config did."""
CLOUD, KEPT = "wincey-cloud-routes", "kept"
"""Response header of GET config: the server keeps the cloud's route tables for its clients."""
CLOUD_KEYS = ("AccessKeyID", "AccessKeySecret")
"""Keys of a config's Backend that open a cloud to who has them; such a server keeps them to itself."""
ERROR = "wincey-error"
"""Response header: the kind of failure, one of the following."""
DUPLICATE_HOST, OUT_OF_SUBNETS = "duplicate-host", "out-of-subnets"

ZERO_TIME = "0001-01-01T00:00:00Z"
"""The Expiration of what never expires."""

KEY_NOT_FOUND = "Key not found"
"""What flannel's servers pass on from etcd, within a text, when a key is not there."""

_TIME = re.compile(r"(\d{4}-\d\d-\d\d)T(\d\d:\d\d:\d\d)(\.\d+)?(Z|[+-]\d\d:\d\d)", re.ASCII)
_UNSPECIFIED = "0.0.0.0/0"


class _Lease(msgspec.Struct, omit_defaults=True):
    Subnet: str
    Attrs: msgspec.Raw
    Expiration: str
    IPv6Subnet: str = ""


class _Event(msgspec.Struct, omit_defaults=True):
    type: str
    lease: _Lease
    network: str = ""


class _Result(msgspec.Struct):
    events: list[_Event] | None
    snapshot: list[_Lease] | None
    cursor: str


class _Networks(msgspec.Struct):
    events: list[_Event] | None
    snapshot: list[str] | None
    cursor: str = ""


class Reservation(msgspec.Struct):
    """A subnet pinned to a host's address."""

    Subnet: str
    PublicIP: str


def format_time(nanoseconds: int) -> str:
    """Unix time as Go writes it (RFC 3339, UTC, fraction without trailing zeros)."""
    seconds, fraction = divmod(nanoseconds, 10**9)
    text = datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S")
    return text + (f".{fraction:09d}".rstrip("0") if fraction else "") + "Z"


def parse_time(text: str) -> float | None:
    """Seconds of Unix time, None for the zero time; raises ValueError."""
    match = _TIME.fullmatch(text)
    if not match:
        raise ValueError(f"{text[:60]!r} is not a time of RFC 3339")
    if match[1].startswith("0001-01-01"):
        return None
    zone = "+00:00" if match[4] == "Z" else match[4]
    moment = datetime.datetime.fromisoformat(f"{match[1]}T{match[2]}{zone}")
    return calendar.timegm(moment.utctimetuple()) + float(match[3] or 0)


def encode_config(config: NetworkConfig, raw: bytes, secret: Collection[str] = ()) -> bytes:
    """The config with its defaults filled in. raw: as it is in the store. secret: keys of Backend to leave out."""
    fields: dict[str, object] = {}
    if config.network:
        fields |= {
            "Network": str(config.network),
            "SubnetMin": format_address(config.subnet_min),
            "SubnetMax": format_address(config.subnet_max),
            "SubnetLen": config.subnet_len,
        }
    if config.ipv6_network:
        fields |= {
            "EnableIPv4": config.enable_ipv4,
            "EnableIPv6": True,
            "IPv6Network": str(config.ipv6_network),
            "IPv6SubnetMin": format_address(config.ipv6_subnet_min),
            "IPv6SubnetMax": format_address(config.ipv6_subnet_max),
            "IPv6SubnetLen": config.ipv6_subnet_len,
        }
    if config.enable_nftables is not None:
        fields["EnableNFTables"] = config.enable_nftables
    for key, value in msgspec.json.decode(raw, type=dict[str, msgspec.Raw]).items():
        if key.lower() == "backend":
            fields["Backend"] = msgspec.Raw(_compact(bytes(value)))
            if secret and config.backend.values:
                hidden = {each.lower() for each in secret}
                fields["Backend"] = {
                    name: option for lower, (name, option) in config.backend.values.items() if lower not in hidden
                }
    return msgspec.json.encode(fields) + b"\n"


def encode_attrs(attrs: LeaseAttrs) -> bytes:
    """The body of POST leases."""
    return attrs.encode(etcd_v2=True)


def decode_attrs(body: bytes) -> LeaseAttrs:
    """Read the body of POST leases; raises BadLease."""
    try:
        return LeaseAttrs.decode(_compact(body))
    except (*UNREADABLE, BadLease) as error:
        raise BadLease(f"JSON decoding error: {error}") from None


def encode_lease(lease: Lease, expiration: str) -> bytes:
    """A lease, as the body of PUT leases and the answer to it."""
    return msgspec.json.encode(_lease(lease, expiration)) + b"\n"


def decode_lease(body: bytes) -> tuple[Lease, float | None]:
    """A lease, and when it expires (Unix time; None: never). Raises BadLease."""
    try:
        return _read_lease(msgspec.json.decode(_compact(body), type=_Lease))
    except UNREADABLE as error:
        raise BadLease(f"JSON decoding error: {error}") from None


class Change(msgspec.Struct, frozen=True):
    """A lease that was added or changed (`lease`), or that is gone (None)."""

    key: LeaseKey
    lease: Lease | None


class Watched(msgspec.Struct):
    """What a watch answered: changes, or everything anew (`snapshot`); bad: why leases among them can't be read."""

    changes: list[Change] | None
    snapshot: list[Lease]
    cursor: int
    bad: list[str]


def encode_snapshot(leases: Iterable[tuple[Lease, str]], cursor: int) -> bytes:
    """All leases with their expirations."""
    return _encode(_Result(None, [_lease(lease, expiration) for lease, expiration in leases], str(cursor)))


def encode_changes(changes: Sequence[Change], expiration: str, cursor: int) -> bytes:
    """Changes in order. expiration: of the leases that are there and are no reservations."""
    events = []
    for change in changes:
        if lease := change.lease:
            events.append(_Event("added", _lease(lease, ZERO_TIME if lease.permanent else expiration)))
        else:
            events.append(_Event("removed", _lease(Lease(change.key, LeaseAttrs()), ZERO_TIME)))
    return _encode(_Result(events, None, str(cursor)))


def decode_watched(body: bytes) -> Watched:
    """Read the answer of a watch; one unreadable lease is passed over. Raises ValueError."""
    try:
        result = msgspec.json.decode(body, type=_Result)
        cursor = int(result.cursor)
    except (*UNREADABLE, ValueError) as error:
        raise ValueError(f"the answer to a watch can't be read: {error}") from None
    # flannel writes an empty snapshot as null, too.
    watched = Watched(None if result.events is None else [], [], cursor, [])
    for lease in result.snapshot or []:
        try:
            watched.snapshot.append(_with_revision(_read_lease(lease)[0], 0))
        except BadLease as error:
            watched.bad.append(str(error))
    for event in result.events or ():
        try:
            key = _key(event.lease)
            found = _with_revision(_read_lease(event.lease)[0], cursor) if event.type == "added" else None
        except BadLease as error:
            watched.bad.append(str(error))
        else:
            assert watched.changes is not None
            watched.changes.append(Change(key, found))
    return watched


def decode_expirations(body: bytes) -> list[tuple[Lease, float | None]]:
    """The leases of a snapshot, each with when it expires (Unix time; None: never). Raises BadLease."""
    try:
        return [_read_lease(lease) for lease in msgspec.json.decode(body, type=_Result).snapshot or []]
    except UNREADABLE as error:
        raise BadLease(f"JSON decoding error: {error}") from None


def encode_networks(names: Sequence[str], cursor: int) -> bytes:
    """The names of all networks."""
    return _encode(_Networks(None, list(names), str(cursor)))


def encode_network_changes(changes: Iterable[tuple[str, bool]], cursor: int) -> bytes:
    """Networks that came (True) or went (False)."""
    dummy = _Lease(_UNSPECIFIED, msgspec.Raw(encode_attrs(LeaseAttrs())), ZERO_TIME)
    events = [_Event("added" if there else "removed", dummy, name) for name, there in changes]
    return _encode(_Networks(events, None, str(cursor)))


def decode_networks(body: bytes) -> tuple[list[str], int]:
    """The names of all networks, and the cursor. Raises ValueError."""
    message = _read_networks(body)
    return message.snapshot or [], int(message.cursor or 0)


def decode_network_changes(body: bytes) -> tuple[list[tuple[str, bool]] | None, int]:
    """Networks that came (True) or went (False), None when all have to be read anew; the cursor. Raises ValueError."""
    message = _read_networks(body)
    if message.events is None:
        return None, int(message.cursor or 0)
    return [(event.network, event.type == "added") for event in message.events], int(message.cursor or 0)


def encode_reservations(leases: Iterable[Lease]) -> bytes:
    """The leases that never expire."""
    return _encode(
        [
            Reservation(str(lease.key.v4), format_address(lease.attrs.public_ip or UNSPECIFIED_V4))
            for lease in leases
            if lease.permanent and lease.key.v4
        ]
    )


def parse_key(text: str) -> LeaseKey:
    """A lease key of a path, which must be one from its first character on; raises BadLease."""
    key = LeaseKey.parse(text)
    if str(key) != text:
        raise BadLease(f"bad subnet key {text[:200]!r}: write it like {key}")
    return key


def split_host(header: str) -> tuple[str, str] | None:
    """Name and instance of a HOST header; None when it has not got both."""
    name, _, instance = header.strip().rpartition(" ")
    return (name, instance) if name and instance else None


def owner(key: LeaseKey, attrs: LeaseAttrs) -> Address | None:
    """The address that tells whose a lease is."""
    return attrs.public_ip if key.v4 else attrs.public_ipv6


def _read_networks(body: bytes) -> _Networks:
    try:
        return msgspec.json.decode(body, type=_Networks)
    except UNREADABLE as error:
        raise ValueError(f"the list of networks can't be read: {error}") from None


def _encode(message: object) -> bytes:
    return msgspec.json.encode(message) + b"\n"


def _compact(body: bytes) -> bytes:
    """JSON without the blanks that mean nothing, as Go writes what it was given."""
    return msgspec.json.format(body, indent=-1)


def _lease(lease: Lease, expiration: str) -> _Lease:
    key = lease.key
    v6 = str(key.v6) if key.v6 else ""
    return _Lease(str(key.v4 or _UNSPECIFIED), msgspec.Raw(_compact(encode_attrs(lease.attrs))), expiration, v6)


def _read_lease(lease: _Lease) -> tuple[Lease, float | None]:
    try:
        expiration = parse_time(lease.Expiration)
    except ValueError as error:
        raise BadLease(f"lease {lease.Subnet[:60]}: {error}") from None
    raw = bytes(lease.Attrs)
    attrs = LeaseAttrs() if raw == b"null" else LeaseAttrs.decode(raw)
    return Lease(_key(lease), attrs, permanent=expiration is None), expiration


def _key(lease: _Lease) -> LeaseKey:
    try:
        v4 = Subnet.parse(lease.Subnet).masked()
        v6 = Subnet.parse(lease.IPv6Subnet).masked() if lease.IPv6Subnet else None
    except BadAddress as error:
        raise BadLease(f"lease: {error}") from None
    return LeaseKey.parse(str(LeaseKey(v4 if v4.length else None, v6)))


def _with_revision(lease: Lease, revision: int) -> Lease:
    return msgspec.structs.replace(lease, revision=revision)
