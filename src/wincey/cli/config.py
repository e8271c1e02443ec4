"""`wincey config`: the network config in a store, checked before it is put there."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TextIO, TypeVar

import click

from wincey.model.config import NetworkConfig
from wincey.model.errors import KeyConflict, KeyExists, StoreError
from wincey.store.endpoints import parse_endpoints
from wincey.store.open import StoreOptions, open_store
from wincey.store.registry import Registry

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

_SQLITE = "sqlite:"


def store_options(command: F) -> F:
    """The options that say which store; `etcd` options are named as flanneld's flags."""
    for option in reversed(
        [
            click.option(
                "--store",
                required=True,
                metavar="sqlite:PATH|URL[,URL]...",
                help="An SQLite file, or etcd's endpoints, as http://10.0.0.1:2379.",
            ),
            click.option("--etcd-prefix", default="/coreos.com/network", show_default=True, help="As flanneld's."),
            click.option(
                "--etcd-api",
                type=click.Choice(["auto", "v3", "v2"]),
                default="auto",
                show_default=True,
                help="As flanneld's.",
            ),
            click.option("--etcd-cafile", default="", help="As flanneld's."),
            click.option("--etcd-certfile", default="", help="As flanneld's."),
            click.option("--etcd-keyfile", default="", help="As flanneld's."),
            click.option("--etcd-username", default="", help="As flanneld's."),
            click.option("--etcd-password", default="", envvar="FLANNELD_ETCD_PASSWORD", help="As flanneld's."),
        ]
    ):
        command = option(command)
    return command


@click.group()
def config() -> None:
    """Write or read the network config that all hosts share."""


@config.command("set")
@store_options
@click.argument("file", type=click.File("r", encoding="utf-8"))
def set_(file: TextIO, **options: Any) -> None:
    r"""Check the network config in FILE (- for standard input) and put it into the store.

    A config that flanneld would refuse is refused here, with the key, the rule and an example.

    Example: echo '{"Network": "10.3.0.0/16", "Backend": {"Type": "vxlan"}}' | wincey config set --store sqlite:/run/net.db -
    """
    text = file.read()
    for warning in NetworkConfig.parse(text).warnings:
        click.echo(f"wincey: {warning}", err=True)
    try:
        key = with_registry(options, lambda registry: _put(registry, text))
    except (KeyConflict, KeyExists):
        raise StoreError("another program changed the config at the same time: look at it, then try again") from None
    click.echo(f"put into {key}")


@config.command("get")
@store_options
def get(**options: Any) -> None:
    """Print the network config as it stands in the store."""

    async def read(registry: Registry) -> tuple[str, bytes | None]:
        return registry.config_key, await registry.config()

    key, value = with_registry(options, read)
    if value is None:
        raise StoreError(f"there is no {key} in {options['store']}: put one with wincey config set")
    click.echo(value.decode(errors="replace"))


async def _put(registry: Registry, text: str) -> str:
    await registry.put_config(text.encode())
    return registry.config_key


def with_registry(options: dict[str, Any], action: Callable[[Registry], Awaitable[T]]) -> T:
    """Do something with the registry that the options of `store_options` name."""
    prefix = options["etcd_prefix"]

    async def work() -> T:
        store = await open_store(options_of_store(options), prefix)
        try:
            return await action(Registry(store, prefix))
        finally:
            await store.close()

    return asyncio.run(work())


def options_of_store(options: dict[str, Any]) -> StoreOptions:
    """What the options of `store_options` say."""
    if options["store"].startswith(_SQLITE):
        return StoreOptions(store=options["store"])
    etcd = {name.removeprefix("etcd_"): value for name, value in options.items() if name.startswith("etcd_")}
    del etcd["prefix"]
    return StoreOptions(endpoints=parse_endpoints(options["store"]), **etcd)
