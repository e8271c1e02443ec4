"""`wincey lab chaos`: bad days on purpose, and what came of them. See wincey.lab.chaos."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from pathlib import Path

import click
import msgspec
from rich import box
from rich.table import Table
from rich.text import Text

from wincey.cli import lab_output
from wincey.cli.localapi import console
from wincey.lab.chaos.catalogue import SCENARIOS, chosen
from wincey.lab.chaos.run import check_programs, run_scenario
from wincey.lab.chaos.scenario import Counted, Result, Scenario
from wincey.lab.plan import BACKENDS
from wincey.lab.shield import interruptible
from wincey.model.errors import UsageError

_VERDICT = {True: Text("pass", style="green"), False: Text("FAIL", style="bold red"), None: Text("left out", "yellow")}


@click.command()
@click.option("--list", "only_list", is_flag=True, help="Name the scenarios, and run none.")
@click.option(
    "--backend",
    type=click.Choice([each for each in BACKENDS if each != "alloc"]),  # which connects nothing
    default="vxlan",
    show_default=True,
    help="The backend of the hosts' network.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, in the last line of output.")
@click.argument("names", metavar="[NAME]...|all", nargs=-1)
@click.pass_obj
def chaos(root: Path, /, *, only_list: bool, backend: str, as_json: bool, names: tuple[str, ...]) -> None:
    """Put faults on real parts, and see what becomes of the packets.

    Each scenario makes a lab of its own: three hosts with a daemon and a container each, and three etcd servers. While the
    fault is put and taken away, every pair of containers exchanges packets. It passes when no packet between hosts whose own
    connection was whole is lost, no connection of theirs breaks, each host keeps its subnet, and all is as wanted again
    afterwards: each daemon says so, a new lease reaches each host, and every container reaches every other.

    Exits with 1 if a scenario failed. One that means nothing here (the machine or the backend lacks what it is about) is
    left out, and said so. Takes some 10 s a scenario; needs root and etcd-server, and for some etcd-client and nftables.

    \b
    Examples:
      wincey lab chaos --list
      wincey lab chaos etcd-leader-killed card-down
      wincey lab chaos all --backend host-gw --json
    """  # noqa: D301  # a real backspace: click keeps the lines after it as they are
    if only_list:
        _list(list(SCENARIOS.values()), as_json=as_json)
        return
    if not names:
        raise UsageError("which scenario? Name some, or all; wincey lab chaos --list tells which there are")
    scenarios = chosen(names)
    check_programs()
    begin = time.monotonic()
    results: list[Result] = []
    with interruptible(), lab_output.progress() as report:
        for number, scenario in enumerate(scenarios):
            results.append(run_scenario(scenario, backend=backend, root=root, report=report))
            report("scenarios done", number + 1, len(scenarios))
    failed = [result for result in results if result.passed is False]
    if as_json:
        summary = {
            "backend": backend,
            "kernel": platform.release(),
            "passed": sum(result.passed is True for result in results),
            "failed": len(failed),
            "left_out": sum(result.passed is None for result in results),
            "seconds": round(time.monotonic() - begin, 1),
        }
        lab_output.print_json(summary | {"scenarios": [msgspec.to_builtins(result) for result in results]})
    else:
        _show(results, backend, time.monotonic() - begin)
    if failed:
        raise SystemExit(1)


def _list(scenarios: Sequence[Scenario], *, as_json: bool) -> None:
    if as_json:
        rows = [{"name": each.name, "does": each.does, "expects": each.expects} for each in scenarios]
        lab_output.print_json({"scenarios": rows})
        return
    table = Table(box=box.SIMPLE, show_edge=False)
    for heading in ("scenario", "what is done", "what is expected"):
        table.add_column(heading, no_wrap=heading == "scenario")
    for each in scenarios:
        table.add_row(each.name, each.does, each.expects)
    console().print(table)


def _show(results: Sequence[Result], backend: str, seconds: float) -> None:
    table = Table(box=box.SIMPLE, show_edge=False)
    table.add_column("scenario", no_wrap=True)
    for heading in ("lost, whole", "lost, affected", "silence ms", "followed ms", "healed ms"):
        table.add_column(heading, justify="right")
    table.add_column("result")
    for result in results:
        table.add_row(
            result.name,
            _counted(result.whole),
            _counted(result.affected),
            str(result.silence_ms or ""),
            _number(result.followed_ms),
            _number(result.heal_ms),
            _VERDICT[result.passed] + Text(f" {result.reason}" if result.reason else ""),
        )
    console().print(table)
    passed = sum(result.passed is True for result in results)
    click.echo(f"{passed} of {len(results)} scenarios passed with {backend}, in {seconds:.0f} s")


def _counted(packets: Counted) -> str:
    return f"{packets.lost} of {packets.sent}" if packets.pairs else ""


def _number(value: int | None) -> str:
    return "" if value is None else str(value)
