"""`wincey docker-plugin`: Docker's network and address driver, as a daemon."""

from __future__ import annotations

import asyncio
from typing import Any

import click

from wincey.cli.config import options_of_store, store_options
from wincey.docker.daemon import PluginOptions, serve
from wincey.docker.fabric import default_directory
from wincey.observe.log import set_up_logging


@click.command("docker-plugin")
@store_options
@click.option(
    "--socket",
    default="/run/docker/plugins/wincey.sock",
    show_default=True,
    help="Where Docker finds the plugin; the file's name is the driver's.",
)
@click.option(
    "--state",
    default="/var/lib/wincey/docker-plugin.json",
    show_default=True,
    help="What the plugin remembers; it must outlast a boot, as Docker's networks do.",
)
@click.option("--subnet-file", default="/run/flannel/subnet.env", show_default=True, help="As flanneld's.")
@click.option(
    "--subnet-dir",
    default="",
    help="As flanneld's: the files of several networks.  [default: networks beside the file]",
)
@click.option("--log-format", type=click.Choice(["klog", "json"]), default="klog", show_default=True)
@click.option("-v", "--verbosity", type=click.IntRange(0, 10), default=0, help="1 shows each call of Docker.")
def docker_plugin(
    *, socket: str, state: str, subnet_file: str, subnet_dir: str, log_format: str, verbosity: int, **store: Any
) -> None:
    """Let Docker make networks that reach over all hosts, without a restart of Docker.

    Runs beside flanneld on each host, as root, with the same store.

    \b
    Examples:
      wincey docker-plugin --store http://10.0.0.1:2379
      docker network create -d wincey --ipam-driver wincey --subnet 10.3.200.0/22 web
      docker run --network web ...
    """  # noqa: D301  # a real backspace: click keeps the lines after it as they are
    set_up_logging(log_format, verbosity)
    asyncio.run(
        serve(
            PluginOptions(
                store=options_of_store(store),
                prefix=store["etcd_prefix"],
                socket=socket,
                state=state,
                subnet_file=subnet_file,
                networks=subnet_dir or default_directory(subnet_file),
            )
        )
    )
