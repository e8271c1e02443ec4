"""The options of `wincey lab up` and `run` that say what a lab consists of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from wincey.lab import plan
from wincey.lab.lab import fresh_name
from wincey.lab.node import READY_TIMEOUT
from wincey.lab.plan import LabSpec
from wincey.model.config import NetworkConfig
from wincey.model.errors import UsageError

F = TypeVar("F", bound=Callable[..., Any])


def spec_options(command: F) -> F:
    """The options of `up` and `run` that say what the lab consists of."""
    for option in reversed(
        [
            click.option("--name", help="The lab's name; several may be up side by side.  [default: a free one]"),
            click.option("--hosts", type=int, default=3, show_default=True, help="How many hosts."),
            click.option("--containers", type=int, default=1, show_default=True, help="Containers on each host."),
            click.option(
                "--backend",
                type=click.Choice(plan.BACKENDS, case_sensitive=False),
                default="vxlan",
                show_default=True,
                help="How packets travel between hosts.",
            ),
            click.option("--ipv6", "ipv6", is_flag=True, help="IPv6 only, hosts too."),
            click.option("--dual", is_flag=True, help="IPv4 and IPv6."),
            click.option(
                "--config", metavar="JSON", help="The whole network config instead of --backend, --ipv6, --dual."
            ),
            click.option(
                "--store",
                type=click.Choice(plan.STORES),
                default="sqlite",
                show_default=True,
                help="Where leases live.",
            ),
            click.option("--mtu", type=int, default=1500, show_default=True, help="MTU between the hosts, in bytes."),
            click.option(
                "--underlay",
                type=click.Choice(["offload", "segmenting"]),
                default="offload",
                show_default=True,
                help="Whether hosts may send packets larger than the MTU for a card to cut, or cut them themselves.",
            ),
            click.option(
                "--daemon",
                "daemons",
                metavar="HOST=COMMAND",
                multiple=True,
                help="Run another flanneld on a host (* for all). It gets flannel's flags for interface, store and subnet "
                "file, unless the command has placeholders: {iface} {subnet_file} {public_ip} {public_ipv6} "
                "{etcd_endpoints} {etcd_prefix} {store} {host} {netns} {dir}. Repeatable.",
            ),
            click.option(
                "--flanneld-option",
                "options",
                metavar="FLAG",
                multiple=True,
                help="A flag for all daemons. Repeatable.",
            ),
            click.option("--ip-masq", is_flag=True, help="Have the daemons masquerade what leaves the network."),
            click.option(
                "--timeout",
                type=float,
                default=READY_TIMEOUT,
                show_default=True,
                help="Seconds for the daemons to get ready.",
            ),
        ]
    ):
        command = option(command)
    return command


def make_spec(
    root: Path,
    *,
    name: str | None,
    backend: str,
    ipv6: bool,
    dual: bool,
    config: str | None,
    underlay: str,
    daemons: tuple[str, ...],
    **same: Any,
) -> LabSpec:
    """The LabSpec that the options ask for; raises UsageError, and BadConfig for a config that flanneld would refuse."""
    if ipv6 and dual:
        raise UsageError("use either --ipv6 (IPv6 only) or --dual (IPv4 and IPv6)")
    commands = {}
    for text in daemons:
        host, equals, command = text.partition("=")
        if not equals:
            raise UsageError(f"--daemon {text!r}: write it as HOST=COMMAND, as in h2=/opt/flannel/flanneld")
        commands[host] = command
    families = (4, 6) if dual else (6,) if ipv6 else (4,)
    text = config or plan.network_config(backend, families)
    NetworkConfig.parse(text)
    return LabSpec(
        name=name or fresh_name(root),
        config=text,
        segmenting=underlay == "segmenting",
        daemons=commands,
        **same,
    )
