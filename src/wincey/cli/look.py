"""`wincey status`, `peers`, `diff` and `explain`: what a running daemon knows. Exit code 1 where something is wrong."""

from __future__ import annotations

import sys
from typing import TypeVar

import click
from rich.table import Table
from rich.text import Text

from wincey.cli.localapi import ask, console, duration, looking_options, milliseconds, network_option, print_json
from wincey.model.report import (
    DifferenceReport,
    EngineReport,
    ExplainReport,
    NetworkReport,
    PeersReport,
    ProbeReport,
    StatusReport,
)

Item = TypeVar("Item")

_SHOWN = 5
"""How many of a kind are shown where more may be; --json and -o wide have all."""


@click.command()
@looking_options
@click.option(
    "-o", "--output", type=click.Choice(["short", "wide"]), default="short", help="wide: nothing is left out."
)
def status(socket: str | None, as_json: bool, output: str) -> None:
    """How this host is: its networks, lease, store, peers, and what had to be repaired.

    Exits with 0 when all is well, with 1 when something is not.

    \b
    Examples:
      wincey status
      wincey status --json | jq '.networks[].lease'
      wincey lab exec h1 -- wincey status
    """  # noqa: D301  # a real backspace: click keeps the lines after it as they are
    report, body = ask(socket, "status", StatusReport)
    if as_json:
        print_json(body)
    else:
        console().print(_heading(report))
        for network in report.networks:
            console().print(_network(network, wide=output == "wide"))
        if not report.networks:
            console().print(Text("no network is joined yet", style="yellow"))
    troubled = any(
        each.trouble or each.store.trouble or each.reconcile.failures or each.bad_keys or _unwell(each)
        for each in report.networks
    )
    sys.exit(1 if troubled or not report.networks else 0)


def _unwell(network: NetworkReport) -> bool:
    return network.probe is not None and network.probe.well < network.probe.asked


def _heading(report: StatusReport) -> Text:
    return Text(f"{report.host}: wincey {report.version}, up {duration(report.up)}, pid {report.pid}", style="bold")


def _network(network: NetworkReport, *, wide: bool) -> Table:
    table = Table.grid(padding=(0, 2), pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    if network.name:
        table.add_row("network", Text(network.name, style="bold"))
    table.add_row(
        "ready", Text("yes", style="green") if network.trouble is None else Text(network.trouble, style="red")
    )
    for label, text in (("range", _range(network)), ("host", _host(network)), ("lease", _lease(network))):
        if text:
            table.add_row(label, text)
    if network.engine:
        table.add_row("engine", _engine(network.engine))
        for who, counters in network.engine.counters.items() if wide else ():
            table.add_row(who, ", ".join(f"{name} {count}" for name, count in counters.items()))
    if network.fast_path:
        table.add_row("fast path", network.fast_path.way)
        if wide and network.fast_path.counters:
            table.add_row("", ", ".join(f"{name} {count}" for name, count in network.fast_path.counters.items()))
    trouble = network.store.trouble
    store = Text(f"{network.store.name}: ") + (
        Text(trouble, style="red") if trouble else Text("answers", style="green")
    )
    table.add_row("store", store)
    if network.backend:
        table.add_row("peers", _known(network))
        table.add_row("state", _state(network))
    for failure in _some(network.reconcile.failures, wide=wide):
        table.add_row("failed", Text(f"{failure.what}: {failure.reason}", style="red"))
    for bad in _some(network.bad_keys, wide=wide):
        table.add_row("bad key", Text(f"{bad.key}: {bad.reason}", style="yellow"))
    if wide:
        table.add_row("config", network.config_key)
        table.add_row("file", network.subnet_file)
    return table


def _range(network: NetworkReport) -> str:
    devices = f", {', '.join(network.devices)}" if network.devices else ""
    return f"{', '.join(network.networks)} by {network.backend}{devices}, MTU {network.mtu}" if network.backend else ""


def _engine(engine: EngineReport) -> str:
    keeper = f"; the keeper's: {engine.keeper}" if engine.keeper and engine.keeper.split()[0] != engine.name else ""
    return engine.name + keeper + (f" ({engine.why})" if engine.why else "")


def _host(network: NetworkReport) -> str:
    interface = network.interface
    if interface is None:
        return ""
    told = f", peers are told {', '.join(interface.public)}" if interface.public != interface.addresses else ""
    return f"{interface.name}, {', '.join(interface.addresses)}{told}, MTU {interface.mtu}"


def _lease(network: NetworkReport) -> str:
    lease = network.lease
    if lease is None:
        return ""
    left = f", {duration(lease.left)} left unless renewed" if lease.left is not None else ""
    return f"{', '.join(lease.subnets)}{', a reservation' if lease.reservation else left}"


def _known(network: NetworkReport) -> Text:
    text = Text(str(network.peers))
    if probe := network.probe:
        bad = probe.asked - probe.well
        text.append(f"; of {probe.asked} asked, ")
        text.append(f"{bad} in trouble (wincey peers)" if bad else "all answer well", style="red" if bad else "green")
        if probe.rtt is not None:
            text.append(f", round trip {milliseconds(probe.rtt)}, {probe.loss:.1%} lost")
    return text


def _state(network: NetworkReport) -> Text:
    state = network.reconcile
    failed = len(state.failures)
    text = Text(f"{state.objects} objects, ")
    text.append(f"{failed} failed" if failed else "none failed", style="red" if failed else "green")
    text.append(f", {state.repaired} repaired since the start")
    if state.ago is not None:
        text.append(f", all looked at {duration(state.ago)} ago")
    return text


def _some(items: list[Item], *, wide: bool) -> list[Item]:
    return items if wide else items[:_SHOWN]


@click.command()
@looking_options
@network_option
@click.option(
    "-o", "--output", type=click.Choice(["short", "wide"]), default="short", help="wide: all objects of each."
)
def peers(socket: str | None, as_json: bool, network: str | None, output: str) -> None:
    """The other hosts, as this one sees them: subnets, addresses, backend, and what is wrong with each.

    Exits with 0 when nothing is wrong with any, with 1 otherwise.

    \b
    Examples:
      wincey peers
      wincey peers -o wide      with the routes, neighbors and other objects that exist here for each
    """  # noqa: D301  # a real backspace: click keeps the lines after it as they are
    reports, body = ask(socket, "peers", list[PeersReport], network=network)
    if as_json:
        print_json(body)
    else:
        for report in reports:
            _print_peers(report, wide=output == "wide", several=len(reports) > 1)
    sys.exit(1 if any(report.note or any(peer.troubles for peer in report.peers) for report in reports) else 0)


def _print_peers(report: PeersReport, *, wide: bool, several: bool) -> None:
    screen = console()
    if several:
        screen.print(Text(f"network {report.network}", style="bold"))
    if report.note:
        screen.print(Text(report.note, style="yellow"))
    table = Table(box=None, pad_edge=False, header_style="bold")
    probed = any(peer.probe for peer in report.peers)
    asked = ("round trip", "lost", "MTU") if probed else ()
    for heading in ("subnet", "host", "backend", *asked, "state", *(("objects",) if wide else ())):
        table.add_column(heading, overflow="fold")
    for peer in report.peers:
        table.add_row(
            "\n".join(peer.subnets) or peer.lease,
            "\n".join(peer.public) or "-",
            peer.backend or "-",
            *(_asked(peer.probe) if probed else ()),
            Text("\n".join(peer.troubles), style="red") if peer.troubles else Text("ok", style="green"),
            *(("\n".join(peer.objects),) if wide else ()),
        )
    screen.print(table if report.peers else "no other host has a lease")


def _asked(probe: ProbeReport | None) -> tuple[str, str, str]:
    if probe is None:
        return "-", "-", "-"
    way = probe.inner or probe.outer
    rtt = "-" if way.rtt is None else milliseconds(way.rtt)
    return rtt, f"{way.loss:.0%}", str(probe.mtu or "-")


@click.command()
@looking_options
@network_option
def diff(socket: str | None, as_json: bool, network: str | None) -> None:
    """What should exist on this host against what does, read now. Nothing is changed.

    The daemon repairs what it finds by itself, within a moment of most changes and within a minute of any. Exits with 0 when
    there is no difference, with 1 when there is one.

    \b
    Example:
      wincey diff
    """  # noqa: D301  # a real backspace: click keeps the lines after it as they are
    reports, body = ask(socket, "diff", list[DifferenceReport], network=network)
    if as_json:
        print_json(body)
    else:
        for report in reports:
            _print_difference(report, several=len(reports) > 1)
    sys.exit(1 if any(report.missing or report.changed or report.surplus for report in reports) else 0)


def _print_difference(report: DifferenceReport, *, several: bool) -> None:
    screen = console()
    if several:
        screen.print(Text(f"network {report.network}", style="bold"))
    for mark, style, items in (
        ("-", "red", report.missing),
        ("~", "yellow", report.changed),
        ("+", "cyan", report.surplus),
    ):
        for item in items:
            screen.print(Text(f"{mark} {item}", style=style))
    if report.missing or report.changed or report.surplus:
        screen.print(
            f"{len(report.missing)} missing (-), {len(report.changed)} changed (~), {len(report.surplus)} surplus (+) of"
            f" {report.wanted}"
        )
    else:
        screen.print(Text(f"all {report.wanted} objects are as they should be", style="green"))


@click.command()
@looking_options
@network_option
@click.argument("address")
def explain(socket: str | None, as_json: bool, network: str | None, address: str) -> None:
    """The way of a packet from this host to ADDRESS, hop by hop, and where it breaks.

    It asks the kernel and the store, and sends nothing. Exits with 0 when no step is wrong, with 1 otherwise.

    \b
    Example:
      wincey explain 10.5.9.2
    """  # noqa: D301  # a real backspace: click keeps the lines after it as they are
    reports, body = ask(socket, "explain", list[ExplainReport], network=network, address=address)
    if as_json:
        print_json(body)
    else:
        for report in reports:
            _print_way(report, several=len(reports) > 1)
    sys.exit(0 if all(report.reaches for report in reports) else 1)


def _print_way(report: ExplainReport, *, several: bool) -> None:
    screen = console()
    if several:
        screen.print(Text(f"network {report.network}", style="bold"))
    table = Table.grid(padding=(0, 2), pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for step in report.steps:
        table.add_row(
            Text("ok", style="green") if step.ok else Text("NO", style="bold red"),
            step.what,
            Text(step.text, style="" if step.ok else "red"),
        )
    screen.print(table)
    if report.breaks_at:
        screen.print(Text(f"packets to {report.address} break at {report.breaks_at}", style="red"))
    else:
        screen.print(Text(f"nothing on this host keeps packets from {report.address}", style="green"))
