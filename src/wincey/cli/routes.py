"""`wincey routes`: static routes between the hosts of a list, printed or put in place, without a store."""

from __future__ import annotations

import asyncio
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from wincey.agent.staticroutes import Applied, apply_here, apply_over
from wincey.backends.static import FORMATS, StaticHost, find, find_self, others, plan, read_hosts
from wincey.kernel.interfaces import connected_subnets, read_interfaces
from wincey.model.address import format_address
from wincey.model.errors import UsageError, WinceyError

_PLACEHOLDER = re.compile(r"\{(\w*)\}")


@click.command()
@click.option("--hosts", "file", metavar="FILE", help="The list of hosts; - is standard input.")
@click.option("--host", "name", metavar="NAME", help="Only this host; with --apply, which one this is.")
@click.option(
    "--format",
    "form",
    type=click.Choice(list(FORMATS)),
    default="ip",
    show_default=True,
    help="What is printed: commands, sections for systemd-networkd, or JSON.",
)
@click.option(
    "--apply", "do_apply", is_flag=True, help="Put this host's routes in place, and remove those of an earlier list."
)
@click.option("--remove", "do_remove", is_flag=True, help="Remove all static routes of ours.")
@click.option(
    "--ssh",
    "command",
    metavar="COMMAND",
    help="Apply or remove on all hosts of the list, one after the other: a command that runs its arguments there, with {name}"
    " and {address} for the host's. There it needs ip, and nothing of ours.",
)
def routes(
    *, file: str | None, name: str | None, form: str, do_apply: bool, do_remove: bool, command: str | None
) -> None:
    """Direct routing over a list of hosts, all on one layer-2 network.

    Each line of the list is a host's address, a subnet behind it and, if wanted, a name; `#` begins a comment. Every host
    gets routes to the other hosts' subnets through their addresses. They last until the next boot.

    \b
    Examples:
      wincey routes --hosts hosts                                     print what to run where
      wincey routes --hosts hosts --host web2 --format networkd
      wincey routes --hosts hosts --apply                             on this host
      wincey routes --hosts hosts --apply --ssh 'ssh root@{address}'  on all of them
      wincey routes --remove
    """  # noqa: D301  # a real backspace: click keeps the lines after it as they are
    if do_apply and do_remove:
        raise UsageError("--apply and --remove are opposites: use one of them")
    if command and not (do_apply or do_remove):
        raise UsageError("--ssh says where to --apply or --remove: add one of them")
    if file is None and not (do_remove and not command):
        raise UsageError("which hosts? As in: wincey routes --hosts FILE")
    hosts, source = _read(file) if file is not None else ([], "")
    shown = [find(hosts, name, source)] if name and file is not None else hosts
    good = True
    if command:
        good = _over_hosts(hosts, shown, command, remove=do_remove)
    elif do_remove:
        good = _tell("this host", asyncio.run(apply_here([])))
    elif do_apply:
        own = [each.address for interface in read_interfaces() for each in interface.addresses]
        me = shown[0] if name else find_self(hosts, own, source)
        good = _tell(me.name, asyncio.run(apply_here(plan(others(hosts, me), connected_subnets()))))
    else:
        click.echo(FORMATS[form](hosts, shown))
    if not good:
        sys.exit(1)


def _read(file: str) -> tuple[list[StaticHost], str]:
    source = "standard input" if file == "-" else file
    try:
        raw = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        return read_hosts(raw.decode(), source), source
    except OSError as error:
        raise UsageError(f"--hosts {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"--hosts {file}: it is no text") from None


def _over_hosts(hosts: Sequence[StaticHost], shown: Sequence[StaticHost], command: str, *, remove: bool) -> bool:
    """One host after the other; one that fails does not keep the rest."""
    commands = [_fill(command, host) for host in shown]
    done = []
    for host, argv in zip(shown, commands, strict=True):
        try:
            applied = asyncio.run(apply_over(argv, [] if remove else others(hosts, host)))
        except WinceyError as error:
            applied = Applied(failures=[str(error)])
        done.append(_tell(host.name, applied))
    return all(done)


def _tell(host: str, applied: Applied) -> bool:
    """Whether all went well."""
    if not applied.failures or applied.put or applied.removed or applied.kept:
        click.echo(f"{host}: {applied}")
    for failure in applied.failures:
        click.echo(f"wincey: {host}: {failure}", err=True)
    return not applied.failures


def _fill(command: str, host: StaticHost) -> list[str]:
    facts = {"name": host.name, "address": format_address(host.addresses[0])}
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UsageError(f"--ssh {command!r}: {error}") from None
    wrong = [match[0] for match in map(_PLACEHOLDER.search, words) if match and match[1] not in facts]
    if wrong or not words:
        raise UsageError(f"--ssh {command!r}: use {{name}} and {{address}}, as in 'ssh root@{{address}}'")
    return [_PLACEHOLDER.sub(lambda match: facts[match[1]], word) for word in words]
