"""`wincey leases`: the leases in a store, with or without a daemon: list, reserve, release, move."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import click
import msgspec
from rich.table import Table
from rich.text import Text

from wincey.cli.config import store_options, with_registry
from wincey.cli.localapi import console, duration, print_json
from wincey.model.address import Subnet, format_address, parse_address
from wincey.model.config import NetworkConfig
from wincey.model.errors import BadAddress, BadLease, KeyConflict, KeyExists, StoreError, UsageError
from wincey.model.lease import Lease, LeaseAttrs, LeaseKey
from wincey.store.registry import Registry, Snapshot

T = TypeVar("T")

_AT_ONCE = 32
"""How many leases are asked for their time limit at once."""


def _key(ctx: click.Context, param: click.Parameter, value: str) -> LeaseKey:
    """10.5.3.0/24, 10.5.3.0-24, or both families as in the store."""
    try:
        if "/" not in value:
            return LeaseKey.parse(value)
        parts = [Subnet.parse(part).masked() for part in value.split("&")]
        text = "&".join(f"{format_address(part.address)}-{part.length}" for part in parts)
        return LeaseKey.parse(text if parts[0].bits == 32 else f"0.0.0.0-0&{text}")
    except (BadAddress, BadLease) as error:
        raise click.BadParameter(f"{error}; write it like 10.5.3.0/24, or 10.5.3.0/24&fd00:5:0:3::/64") from None


@click.group()
def leases() -> None:
    """The leases of all hosts, in the store; no daemon is needed."""


@leases.command("list")
@store_options
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def list_(as_json: bool, **options: Any) -> None:
    """Every lease: its subnets, its host, its backend and the time left. Exits with 1 where some can't be read.

    Example: wincey leases list --store http://10.0.0.1:2379
    """
    snapshot, left = with_registry(options, _read)
    if as_json:
        print_json(msgspec.json.encode(_document(snapshot, left)))
    else:
        _print(snapshot, left)
    sys.exit(1 if snapshot.bad else 0)


async def _read(registry: Registry) -> tuple[Snapshot, dict[str, float | None]]:
    snapshot = await registry.snapshot()
    gate = asyncio.Semaphore(_AT_ONCE)

    async def ask(key: str, lease: Lease) -> tuple[str, float | None] | None:
        async with gate:
            try:
                return key, await registry.time_left(lease)
            except KeyConflict:  # gone or changed since
                return None

    found = await asyncio.gather(*(ask(key, lease) for key, lease in snapshot.leases.items()))
    left = dict(filter(None, found))
    snapshot.leases = {key: lease for key, lease in snapshot.leases.items() if key in left}
    return snapshot, left


def _sorted(snapshot: Snapshot) -> list[tuple[str, Lease]]:
    return sorted(
        snapshot.leases.items(),
        key=lambda item: str(item[1].key.subnets[0].family) + str(item[1].key.subnets[0].address.hex()),
    )


def _public(attrs: LeaseAttrs) -> list[str]:
    return [format_address(address) for address in (attrs.public_ip, attrs.public_ipv6) if address]


def _document(snapshot: Snapshot, left: dict[str, float | None]) -> dict[str, Any]:
    return {
        "leases": [
            {
                "subnets": [str(subnet) for subnet in lease.key.subnets],
                "public": _public(lease.attrs),
                "backend": lease.attrs.backend_type,
                "reservation": left[key] is None,
                "left": left[key],
            }
            for key, lease in _sorted(snapshot)
        ],
        "bad_keys": [{"key": bad.key, "reason": bad.reason} for bad in snapshot.bad.values()],
    }


def _print(snapshot: Snapshot, left: dict[str, float | None]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("subnet", "host", "backend", "left"):
        table.add_column(heading, overflow="fold")
    for key, lease in _sorted(snapshot):
        rest = left[key]
        table.add_row(
            "\n".join(map(str, lease.key.subnets)),
            "\n".join(_public(lease.attrs)) or "-",
            lease.attrs.backend_type or "-",
            "reserved" if rest is None else duration(rest),
        )
    screen = console()
    screen.print(table if snapshot.leases else "no host has a lease")
    for bad in snapshot.bad.values():
        screen.print(Text(f"{bad.key}: {bad.reason}", style="red"))


@leases.command()
@store_options
@click.option(
    "--for", "host", metavar="ADDRESS", help="The host's public address. Its lease is given to it when it joins."
)
@click.option(
    "--undo",
    is_flag=True,
    help="Make an ordinary lease of a reservation: it ends in 24 hours unless its host renews it.",
)
@click.argument("subnet", callback=_key)
def reserve(subnet: LeaseKey, host: str | None, undo: bool, **options: Any) -> None:
    """Reserve SUBNET: the lease on it never expires. One that a host has becomes a reservation; a free one needs --for.

    \b
    Examples:
      wincey leases reserve 10.5.3.0/24 --store http://10.0.0.1:2379
      wincey leases reserve 10.5.9.0/24 --for 192.0.2.7 --store http://10.0.0.1:2379
    """  # noqa: D301  # a real backspace: click keeps the lines after it as they are
    if undo and host:
        raise UsageError("--undo and --for exclude each other")
    attrs = _attrs(host)

    async def work(registry: Registry) -> str:
        lease = await registry.read(subnet)
        if lease:
            if attrs and _public(attrs)[0] not in _public(lease.attrs):
                owner = ", ".join(_public(lease.attrs))
                raise StoreError(f"{subnet} is the lease of {owner}: release it first, or choose another subnet")
            await registry.pin(lease, permanent=not undo)
            return (
                f"{subnet} is {'an ordinary lease again' if undo else 'reserved'} for {', '.join(_public(lease.attrs))}"
            )
        if undo:
            raise StoreError(f"there is no lease {subnet}")
        if attrs is None:
            raise UsageError(f"no host has {subnet}: say whose it is to be, with --for ADDRESS")
        await _fits(registry, subnet)
        await registry.create(subnet, attrs, permanent=True)
        return f"{subnet} is reserved for {host}"

    click.echo(_change(options, work))


@leases.command()
@store_options
@click.option("--yes", is_flag=True, help="Although its host may be alive.")
@click.argument("subnet", callback=_key)
def release(subnet: LeaseKey, yes: bool, **options: Any) -> None:
    """Delete the lease on SUBNET, so that it can be had by another host.

    A host that is alive claims it again at once, so this is for hosts that are gone; --yes says that you know.

    Example: wincey leases release 10.5.3.0/24 --yes --store http://10.0.0.1:2379
    """

    async def work(registry: Registry) -> str:
        lease = await _existing(registry, subnet)
        owner = ", ".join(_public(lease.attrs)) or "a host without an address"
        if not yes:
            raise UsageError(f"{subnet} is the lease of {owner}; packets to it end when it goes: say so with --yes")
        await registry.release(lease)
        return f"{subnet} of {owner} is free"

    click.echo(_change(options, work))


@leases.command()
@store_options
@click.option(
    "--yes", is_flag=True, help="Although the containers of that host lose their network until they are restarted."
)
@click.argument("old", callback=_key)
@click.argument("new", callback=_key)
def move(old: LeaseKey, new: LeaseKey, yes: bool, **options: Any) -> None:
    """Give the host that has the lease on OLD the subnet NEW instead.

    Its daemon follows within seconds and writes its subnet file anew. Containers keep their old addresses, and with these no
    network, until their runtime is restarted.

    Example: wincey leases move 10.5.3.0/24 10.5.40.0/24 --yes --store http://10.0.0.1:2379
    """

    async def work(registry: Registry) -> str:
        lease = await _existing(registry, old)
        owner = ", ".join(_public(lease.attrs))
        if not yes:
            raise UsageError(
                f"the containers of {owner} lose their network until they are restarted: say so with --yes"
            )
        await _fits(registry, new, besides=old)
        permanent = lease.permanent or await registry.time_left(lease) is None
        await registry.create(new, lease.attrs, permanent=permanent)
        await registry.release(lease)
        return f"{owner} moves from {old} to {new}"

    click.echo(_change(options, work))


def _attrs(host: str | None) -> LeaseAttrs | None:
    if host is None:
        return None
    try:
        address = parse_address(host)
    except BadAddress as error:
        raise UsageError(f"--for: {error}") from None
    return LeaseAttrs(public_ip=address) if len(address) == 4 else LeaseAttrs(public_ipv6=address)


async def _existing(registry: Registry, key: LeaseKey) -> Lease:
    lease = await registry.read(key)
    if lease is None:
        raise StoreError(
            f"there is no lease {key} below {registry.prefix}: wincey leases list shows those that there are"
        )
    return lease


async def _fits(registry: Registry, key: LeaseKey, besides: LeaseKey | None = None) -> None:
    """Raises StoreError unless a host could have it: the config allows it, and it overlaps no other lease."""
    snapshot = await registry.snapshot()
    if snapshot.config is None:
        raise StoreError(f"there is no network config at {registry.config_key}")
    if not NetworkConfig.parse(snapshot.config).allows(key):
        raise StoreError(
            f"{key} is none of the subnets that the network config gives out: see its SubnetLen, Min and Max"
        )
    for lease in snapshot.leases.values():
        if lease.key != besides and lease.key.overlaps(key):
            raise StoreError(f"{key} overlaps {lease.key}, the lease of {', '.join(_public(lease.attrs))}")


def _change(options: dict[str, Any], work: Callable[[Registry], Awaitable[T]]) -> T:
    try:
        return with_registry(options, work)
    except (KeyConflict, KeyExists):
        raise StoreError("a host changed the lease at the same time: look at it, then try again") from None
