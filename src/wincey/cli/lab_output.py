"""What `wincey lab` shows: progress on stderr; tables, or with --json one object in one line, on stdout."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from wincey.lab.ping import Matrix, PairResult
from wincey.lab.report import Report
from wincey.lab.traffic import Throughput

_WIDE = 12  # columns of round trip times that a terminal holds
_WIDEST = 60  # columns of single marks
_FAILURES = 20  # lines
_PLAIN_PAUSE = 2.0  # seconds between two lines about one thing


@contextmanager
def progress() -> Iterator[Report]:
    """A Report that shows itself on stderr: a spinner on a terminal, now and then a line elsewhere."""
    console = Console(stderr=True)
    if console.is_terminal:
        with console.status("") as status:
            yield lambda what, done=0, total=0: status.update(_progress_text(what, done, total))
    else:
        yield _PlainReport()


class _PlainReport:
    """Lines for logs: each new thing at once, one that is counted at its end and every few seconds until then."""

    def __init__(self) -> None:
        self._last = 0.0

    def __call__(self, what: str, done: int = 0, total: int = 0) -> None:
        now = time.monotonic()
        if done == total or now - self._last > _PLAIN_PAUSE:
            self._last = now
            click.echo(_progress_text(what, done, total), err=True)


def _progress_text(what: str, done: int, total: int) -> str:
    return f"{what}: {done} of {total}" if total else what


def print_json(document: dict[str, Any]) -> None:
    """One object in one line, the last one of the output."""
    click.echo(json.dumps(document))


def print_matrix(matrix: Matrix) -> None:
    """A table per family, rows from, columns to, and a line for each pair that failed."""
    console = _console()
    for family in sorted({result.family for result in matrix.results}):
        results = {(each.source, each.target): each for each in matrix.results if each.family == family}
        names = list(dict.fromkeys(source for source, _ in results))
        if len(names) <= _WIDEST:
            wide = len(names) > _WIDE
            console.print(f"IPv{family}: from (row) to (column){'' if wide else ', round trip in ms'}")
            console.print(_matrix_table(names, results, wide=wide))
    for failed in matrix.unreachable[:_FAILURES]:
        console.print(Text(f"{failed}: {failed.why}", style="red"))
    if len(matrix.unreachable) > _FAILURES:
        console.print(f"and {len(matrix.unreachable) - _FAILURES} more pairs")
    reached = len(matrix.results) - len(matrix.unreachable)
    console.print(
        Text(f"{reached} of {len(matrix.results)} pairs reachable", style="red" if matrix.unreachable else "green")
    )


def _matrix_table(names: list[str], results: dict[tuple[str, str], PairResult], *, wide: bool) -> Table:
    table = Table()
    table.add_column("", style="bold", no_wrap=True)
    for name in names:
        # A column of marks is as narrow as can be: the name goes downwards.
        table.add_column("\n".join(name) if wide else name, justify="center", no_wrap=True)
    for source in names:
        table.add_row(source, *(_cell(results.get((source, target)), wide=wide) for target in names))
    return table


def _cell(result: PairResult | None, *, wide: bool) -> Text:
    if result is None:
        return Text("")
    if result.rtt_ms is None:
        return Text("X" if wide else "FAIL", style="bold red")
    return Text("+" if wide else f"ok {result.rtt_ms:.2f}", style="green")


def print_failures(failures: dict[str, str]) -> None:
    """The hosts that did not come up, and why."""
    for reason in failures.values():
        click.echo(reason)


def print_throughput(sample: Throughput | None) -> None:
    """One line about the sample."""
    if sample:
        speed = f"{sample.bits_per_second / 1e9:.2f} Gbit/s"
        click.echo(f"TCP from {sample.source} to {sample.target}: {speed} ({sample.program}, {sample.seconds:.0f} s)")


def print_status(status: dict[str, Any]) -> None:
    """The hosts and containers of a lab as a table."""
    store = status["store"]
    click.echo(f"lab {status['name']} in {status['directory']}")
    click.echo(f"store {store['url']}, {'running' if store['running'] else 'stopped'}")
    click.echo(f"config {status['config']}")
    table = Table()
    for heading in ("host", "underlay", "subnet", "MTU", "daemon", "containers"):
        table.add_column(heading, overflow="fold")
    for host in status["hosts"]:
        table.add_row(
            host["name"],
            "\n".join(host["underlay"]),
            "\n".join(host["subnets"]) or Text("none", style="red"),
            str(host["mtu"] or ""),
            f"pid {host['pid']}" if host["pid"] else Text("not running", style="red"),
            "\n".join(f"{each['name']} {' '.join(each['addresses'])}" for each in host["containers"]),
        )
    _console().print(table)


def _console() -> Console:
    """Standard output, as wide as a table needs where no terminal sets the width."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 200
    return console
