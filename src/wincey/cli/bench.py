"""`wincey bench`: measure. See wincey.lab.bench for what is compared and how."""

from __future__ import annotations

import secrets
import time
from pathlib import Path

import click
import msgspec

from wincey.cli import lab_output
from wincey.cli.bench_output import print_results
from wincey.lab.bench import page
from wincey.lab.bench.results import Results
from wincey.lab.bench.run import UNDERLAYS, Plan, run
from wincey.lab.bench.variants import FLANNEL_VXLAN, VARIANTS, chosen, parse_peers
from wincey.lab.needs import check_root, extend_path
from wincey.lab.shield import interruptible
from wincey.model.errors import UsageError

_QUICK_ROUNDS, _ROUNDS = 2, 5
_QUICK_SECONDS, _SECONDS = 0.5, 0.8


@click.group()
def bench() -> None:
    """Measure how fast packets travel, in a lab on this machine alone. Needs root."""
    extend_path()


@bench.command()
@click.option("--quick", is_flag=True, help="Fewer variants, two short rounds, the segmenting underlay: some minutes.")
@click.option("--rounds", type=click.IntRange(1, 100), help="How often each variant is measured.  [default: 5]")
@click.option("--seconds", type=click.FloatRange(0.2, 10), help="Length of each load.  [default: 0.8]")
@click.option("--variants", metavar="A,B,...", default="", help="Only these; --list names all.")
@click.option(
    "--underlay",
    type=click.Choice([*UNDERLAYS, "both"]),
    help="Whether large packets travel whole between hosts, or are cut to the MTU first.  [default: both]",
)
@click.option(
    "--peer",
    "peers",
    metavar="NAME=COMMAND",
    multiple=True,
    help="Another daemon to compare with; it gets flannel's flags appended, and a real etcd. Repeatable.",
)
@click.option("--baseline", metavar="VARIANT", default=FLANNEL_VXLAN, show_default=True, help="What ratios are to.")
@click.option("--json", "json_file", metavar="FILE", help="Write every figure there as JSON; - for stdout.")
@click.option(
    "--write",
    type=click.Path(file_okay=False, path_type=Path),
    is_flag=False,
    flag_value=Path("docs/benchmarks"),
    help="Write a page, a plot and all figures into this directory.  [without a value: docs/benchmarks]",
)
@click.option("--list", "only_list", is_flag=True, help="Name the variants and end.")
def data(
    *,
    quick: bool,
    rounds: int | None,
    seconds: float | None,
    variants: str,
    underlay: str | None,
    peers: tuple[str, ...],
    baseline: str,
    json_file: str | None,
    write: Path | None,
    only_list: bool,
) -> None:
    """Compare data paths: two hosts, a container on each, every variant in turn, round after round.

    Measured are TCP with one stream and with four, datagrams of 64 bytes, requests of one byte each way, and the processor
    time that a gigabyte takes. What counts are the ratios within a round, to the baseline and to the targets.

    \b
    Examples:
      wincey bench data --quick
      wincey bench data --variants vxlan-flannel-rules,vxlan,vxlan-fast --rounds 7
      wincey bench data --peer flannel=/opt/flannel/flanneld --json figures.json
      wincey bench data --write                     the page and the plot in docs/benchmarks
    """  # noqa: D301  # a real backspace: click keeps the lines after it as they are
    if only_list:
        for variant in VARIANTS:
            click.echo(f"{variant.name:18} {variant.what}")
        return
    wanted = chosen([name for name in variants.split(",") if name], parse_peers(peers), quick=quick)
    if baseline not in {variant.name for variant in wanted}:
        raise UsageError(f"--baseline {baseline}: it is not among the variants of this run; add it to --variants")
    check_root()
    plan = Plan(
        tuple(wanted),
        ("segmenting",) if quick and underlay is None else UNDERLAYS if underlay in (None, "both") else (underlay,),
        rounds or (_QUICK_ROUNDS if quick else _ROUNDS),
        seconds or (_QUICK_SECONDS if quick else _SECONDS),
        baseline,
        f"bench-{secrets.token_hex(2)}",
    )
    click.echo(
        f"{len(plan.variants)} variants, {len(plan.underlays)} underlays, {plan.rounds} rounds: about"
        f" {max(plan.estimate / 60, 1):.0f} min; the hosts' names begin with {plan.name}-",
        err=True,
    )
    begin = time.monotonic()
    with interruptible(), lab_output.progress() as report:
        results = run(plan, report)
    click.echo(f"took {(time.monotonic() - begin) / 60:.1f} minutes", err=True)
    if json_file != "-":
        print_results(results)
    _save(results, json_file, write)


def _save(results: Results, json_file: str | None, write: Path | None) -> None:
    text = msgspec.json.format(msgspec.json.encode(results), indent=1) + b"\n"
    if json_file == "-":
        click.echo(text, nl=False)
    elif json_file:
        Path(json_file).write_bytes(text)
    if write:
        write.mkdir(parents=True, exist_ok=True)
        (write / "data-path.json").write_bytes(text)
        (write / "data-path.svg").write_text(page.plot(results))
        (write / "data-path.md").write_text(page.page(results, "data-path.svg"))
        click.echo(f"written: {write}/data-path.md, .svg and .json", err=True)
