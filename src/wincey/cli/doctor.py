"""`wincey doctor`: what is wrong with this host's network, why, and what to do. The work is agent.doctor's."""

from __future__ import annotations

import asyncio
import os
import shlex
import socket as sockets
import sys
from pathlib import Path

import click
import msgspec
from rich.table import Table
from rich.text import Text

from wincey.agent.doctor.bundle import config_secrets, write_bundle
from wincey.agent.doctor.checks import diagnose
from wincey.agent.doctor.facts import Daemon, Facts
from wincey.agent.doctor.finding import Finding, exit_code
from wincey.agent.doctor.gather import ask_daemon, command_line, gather, unknown_names
from wincey.agent.doctor.storelook import StoreLook, look
from wincey.agent.life import DaemonOptions
from wincey.cli.flanneld import daemon_options
from wincey.cli.localapi import USUAL, console, print_json
from wincey.cli.options import load
from wincey.model.errors import UsageError, WinceyError
from wincey.model.socketpath import SOCKET_VARIABLE

_STYLES = {"error": "bold red", "warning": "yellow", "note": "cyan", "ok": "green"}


class _Report(msgspec.Struct, frozen=True):
    host: str
    findings: list[Finding]


@click.command()
@click.option("--socket", envvar=SOCKET_VARIABLE, metavar="PATH", help="The daemon's socket, as its --api-socket.")
@click.option(
    "--daemon-flags",
    default="",
    metavar="TEXT",
    help="The flags of flanneld, where it does not run; of a running one they are known.",
)
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.option("--bundle", metavar="FILE", help="Also write an archive (tar.gz) for a bug report, without secrets.")
@click.argument("peers", nargs=-1, metavar="[PEER]...")
def doctor(socket: str | None, daemon_flags: str, as_json: bool, bundle: str | None, peers: tuple[str, ...]) -> None:
    """What is wrong with the network on this host, the cause first, with evidence and remedy.

    It asks the daemon, the store, the kernel and the packet filters, and sends a few packets to the peers: to those named (by
    name, address or subnet), else to up to 32. It needs root, and no running daemon. It changes nothing. Exits with 0 when
    nothing is wrong, with 1 for warnings, with 2 for errors.

    \b
    Examples:
      wincey doctor
      wincey doctor 192.0.2.7
      wincey doctor --bundle report.tar.gz
    """  # noqa: D301  # a real backspace: click keeps the lines after it as they are
    if os.geteuid() != 0:
        raise WinceyError("doctor needs root: it reads packet filters and sends echo requests; use sudo")
    path = os.path.abspath(socket or next((usual for usual in USUAL if Path(usual).exists()), USUAL[0]))
    _daemon, options, store, facts = asyncio.run(_look(path, daemon_flags, peers))
    if unknown := unknown_names(facts, peers):
        raise UsageError(f"no peer {', '.join(unknown)} is known: see wincey peers, or wincey leases list")
    findings = diagnose(facts)
    document = msgspec.json.encode(_Report(facts.host, findings))
    if bundle:
        _bundle(bundle, facts, document, options, store)
    if as_json:
        print_json(document)
    else:
        _print(facts, findings)
        if bundle:
            click.echo(f"written: {bundle}")
    sys.exit(exit_code(findings))


async def _look(path: str, flags: str, peers: tuple[str, ...]) -> tuple[Daemon, DaemonOptions | None, StoreLook, Facts]:
    daemon = await ask_daemon(path)
    options = _options(daemon, flags)
    store = await look(options, compare=daemon.state != "answers") if options else StoreLook()
    subnet_file = (
        options.settings.subnet_file if options else f"{Path(path).parent.parent.parent}/{Path(path).parent.name}.env"
    )
    return daemon, options, store, await gather(daemon, store, subnet_file, peers, sockets.gethostname())


def _options(daemon: Daemon, flags: str) -> DaemonOptions | None:
    """The daemon's own flags: those it runs with, or those given; None where nobody tells."""
    if daemon.pid:
        try:
            arguments, environ = command_line(daemon.pid)
        except OSError:
            return None
        at = next((number for number, each in enumerate(arguments) if "flanneld" in each), 0)
        arguments = arguments[at + 1 :]
    elif flags:
        arguments, environ = shlex.split(flags), os.environ
    else:
        return None
    options = load(arguments, environ)
    return None if isinstance(options, str) or options.listen else daemon_options(options)


def _bundle(path: str, facts: Facts, document: bytes, options: DaemonOptions | None, store: StoreLook) -> None:
    texts = {
        "findings.json": msgspec.json.format(document).decode(),
        "facts.txt": "\n".join(f"{name}: {getattr(facts, name)!r}" for name in Facts.__struct_fields__),
        "daemon.log": "\n".join(facts.daemon.log),
    }
    if facts.daemon.status:
        texts["status.json"] = msgspec.json.format(msgspec.json.encode(facts.daemon.status)).decode()
    if store.raw:
        texts["config.json"] = store.raw.decode(errors="replace")
    try:
        write_bundle(path, texts, [*config_secrets(store.raw), *([options.store.password] if options else [])])
    except FileExistsError:
        raise UsageError(f"{path} is there already: name a file that is not") from None
    except OSError as error:
        raise WinceyError(f"can't write {path}: {error.strerror}") from None


def _print(facts: Facts, findings: list[Finding]) -> None:
    screen = console()
    for finding in findings:
        table = Table.grid(padding=(0, 2), pad_edge=False)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        table.add_row(
            Text(finding.severity, style=_STYLES[finding.severity]), Text(f"{finding.name}: {finding.evidence}")
        )
        if finding.remedy:
            table.add_row("", Text(f"-> {finding.remedy}", style="dim"))
        screen.print(table)
    if not exit_code(findings):
        peers = sum(1 for network in facts.networks for peer in network.peers if peer.outer)
        screen.print(Text(f"no fault found; {peers} peers were asked, and answer", style="green"))
