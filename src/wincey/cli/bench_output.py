"""What `wincey bench` prints: tables, and whether targets were met."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from wincey.lab.bench.load import METRICS
from wincey.lab.bench.page import figure
from wincey.lab.bench.results import Results, ratio, verdicts


def print_results(results: Results) -> None:
    """For each underlay the medians, and the ratios to the baseline; then each target."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    for underlay, measured in results.underlays.items():
        base = measured.variants.get(results.baseline)
        table = Table("variant", *METRICS, *([f"{each} ratio" for each in METRICS] if base else ()))
        for name, rounds in measured.variants.items():
            ratios = [str(ratio(rounds[each], base[each])) for each in METRICS] if base else []
            table.add_row(name, *(figure(each, rounds) for each in METRICS), *ratios)
        console.print(
            f"\n{underlay} underlay, medians of {results.rounds} rounds; ratios to {results.baseline} (lowest to highest)"
        )
        console.print(table)
        for name, why in measured.left_out.items():
            console.print(Text(f"{name} was left out: {why}", style="yellow"))
    for metric, meaning in METRICS.items():
        console.print(f"{metric:5} {meaning}")
    for verdict in verdicts(results):
        console.print(Text(str(verdict), style="green" if verdict.met else "red"))
