"""`wincey top`: live traffic, peer by peer, with round trips where the daemon asks its peers (--probe)."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import nullcontext

import click
import msgspec
from rich.live import Live
from rich.table import Table
from rich.text import Text

from wincey.cli.localapi import ask, console, looking_options, milliseconds, network_option, print_json
from wincey.kernel.peercounters import Counted, PeerCounters
from wincey.model.address import Subnet
from wincey.model.errors import UsageError
from wincey.model.report import PeerReport, PeersReport, StatusReport, TrafficReport


class Rates(msgspec.Struct, frozen=True):
    """Per second, to and from a peer."""

    bytes_to: float
    packets_to: float
    bytes_from: float
    packets_from: float

    @property
    def total(self) -> float:
        """Bytes a second, both ways."""
        return self.bytes_to + self.bytes_from


def rates(before: Counted, now: Counted, seconds: float) -> Rates:
    """What went between two looks."""
    return Rates(
        (now.bytes_to - before.bytes_to) / seconds,
        (now.packets_to - before.packets_to) / seconds,
        (now.bytes_from - before.bytes_from) / seconds,
        (now.packets_from - before.packets_from) / seconds,
    )


@click.command()
@looking_options
@network_option
@click.option(
    "--interval", type=click.FloatRange(0.2, 60), default=2.0, show_default=True, help="Seconds between two looks."
)
@click.option("-n", "--count", type=click.IntRange(1), help="End after so many looks; otherwise it ends with Ctrl-C.")
def top(socket: str | None, as_json: bool, network: str | None, interval: float, count: int | None) -> None:
    """Live traffic of each peer: bytes, packets, and with flanneld --probe the round trip and the loss.

    The packet filter counts for as long as this runs, in a table that goes when it ends; nothing is counted otherwise. It needs
    root. Errors and drops are those of our devices.

    \b
    Examples:
      wincey top
      wincey top -n 1 --json
    """  # noqa: D301  # a real backspace: click keeps the lines after it as they are
    reports, _ = ask(socket, "peers", list[PeersReport], network=network)
    subnets = [Subnet.parse(text) for report in reports for peer in report.peers for text in peer.subnets]
    if not subnets:
        raise UsageError("no other host has a lease: there is nothing to look at")
    screen = console()
    live = Live(console=screen, auto_refresh=False, screen=True) if screen.is_terminal and not as_json else None
    with PeerCounters(subnets) as counters, live or nullcontext():
        before, since, looks = counters.read(), time.monotonic(), 0
        while count is None or looks < count:
            time.sleep(interval)
            now, looks = counters.read(), looks + 1
            seconds, since = time.monotonic() - since, time.monotonic()
            reports, _ = ask(socket, "peers", list[PeersReport], network=network)
            status, _ = ask(socket, "status", StatusReport)
            found = {subnet: rates(before[subnet], now[subnet], seconds) for subnet in now}
            before = now
            if as_json:
                print_json(_document(reports, found, status))
            elif live:
                live.update(_screen(reports, found, status), refresh=True)
            else:
                screen.print(_screen(reports, found, status))
                screen.file.flush()  # who reads a pipe wants it now


def _of(peer: PeerReport, found: Mapping[Subnet, Rates]) -> Rates:
    """All its subnets together; one that came since the start counts nothing yet."""
    known = [found[subnet] for text in peer.subnets if (subnet := Subnet.parse(text)) in found]
    return Rates(*(sum(getattr(each, field) for each in known) for field in Rates.__struct_fields__))


def _devices(status: StatusReport) -> list[TrafficReport]:
    return [device for network in status.networks for device in network.traffic]


def _document(reports: list[PeersReport], found: Mapping[Subnet, Rates], status: StatusReport) -> bytes:
    peers = [
        {
            "network": report.network,
            "subnets": peer.subnets,
            "public": peer.public,
            "rates": _of(peer, found),
            "probe": peer.probe,
        }
        for report in reports
        for peer in report.peers
    ]
    return msgspec.json.encode({"peers": peers, "devices": _devices(status)})


def _screen(reports: list[PeersReport], found: Mapping[Subnet, Rates], status: StatusReport) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("subnet")
    table.add_column("host")
    for heading in ("out bit/s", "pkt/s", "in bit/s", "pkt/s", "round trip", "lost"):
        table.add_column(heading, justify="right")
    peers = [(peer, _of(peer, found)) for report in reports for peer in report.peers]
    for peer, rate in sorted(peers, key=lambda each: (-each[1].total, each[0].lease)):
        way = (peer.probe.inner or peer.probe.outer) if peer.probe else None
        table.add_row(
            "\n".join(peer.subnets) or peer.lease,
            "\n".join(peer.public) or "-",
            _scaled(rate.bytes_to * 8),
            _scaled(rate.packets_to),
            _scaled(rate.bytes_from * 8),
            _scaled(rate.packets_from),
            milliseconds(way.rtt) if way and way.rtt is not None else "-",
            Text(f"{way.loss:.0%}", style="red" if way.loss else "") if way else Text("-"),
        )
    table.caption = "; ".join(
        f"{each.device}: {each.receive_dropped + each.transmit_dropped} packets dropped,"
        f" {each.receive_errors + each.transmit_errors} errors since it was made"
        for each in _devices(status)
    )
    table.caption_justify = "left"
    return table


def _scaled(number: float) -> str:
    """Three digits or so, and a unit."""
    for unit in ("", "k", "M"):
        if number < 1000:
            return f"{number:.0f}{unit}" if number >= 100 or not unit else f"{number:.1f}{unit}"
        number /= 1000
    return f"{number:.1f}G"
