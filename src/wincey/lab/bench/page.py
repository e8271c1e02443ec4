"""The results for people: a page in Markdown, and a plot as SVG. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from html import escape

from wincey.lab.bench.load import LOWER_IS_BETTER, METRICS
from wincey.lab.bench.results import Results, Rounds, ratio, verdicts

_DIGITS = {"tcp1": 2, "tcp4": 2, "udp": 0, "udp2": 0, "rr": 0, "p50": 1, "cpu": 2}
_PLOTTED = ("tcp1", "tcp4", "udp", "rr")
_COLOURS = {"offloading": "#2a7f78", "segmenting": "#c2792b"}
_BAR, _GAP, _PANEL, _LABEL, _TOP = 9, 8, 230, 130, 46


def figure(metric: str, rounds: Rounds) -> str:
    """The median of a metric, as it is shown."""
    return f"{statistics.median(rounds[metric]):,.{_DIGITS[metric]}f}"


def page(results: Results, picture: str) -> str:
    """The page; `picture` is where the plot is, seen from the page."""
    return "\n".join([*_head(results, picture), *_verdicts(results), *_tables(results)])


def _head(results: Results, picture: str) -> Iterator[str]:
    yield "# The data path, measured"
    yield ""
    yield (
        f"Wincey {results.version}, {results.date}. Linux {results.kernel} ({results.machine}), {results.cores} cores."
        f" {results.rounds} rounds, {results.seconds:g} s for each load. Made by `wincey bench data --write`;"
        " [performance](../performance.md) tells how it measures, and how to read it."
    )
    yield ""
    yield f"![Medians of every variant, with the lowest and the highest of the rounds]({picture})"
    yield ""


def _verdicts(results: Results) -> Iterator[str]:
    found = list(verdicts(results))
    if not found:
        return
    yield "## What was to be reached"
    yield ""
    yield f"{sum(verdict.met for verdict in found)} of {len(found)} targets met."
    yield ""
    yield "| underlay | variant | against | metric | ratio (lowest to highest) | wanted | |"
    yield "|---|---|---|---|---|---|---|"
    for verdict in found:
        target = verdict.target
        bound = "≤" if target.metric in LOWER_IS_BETTER else "≥"
        about = ", within the spread" if target.about else ""
        yield (
            f"| {verdict.underlay} | {target.variant} | {target.against} | {target.metric} | {verdict.measured} |"
            f" {bound} {target.ratio:g}{about} | {'met' if verdict.met else '**missed**'} |"
        )
    yield ""


def _tables(results: Results) -> Iterator[str]:
    for underlay, measured in results.underlays.items():
        yield f"## {underlay.capitalize()} underlay"
        yield ""
        yield f"| variant | what | {' | '.join(METRICS.values())} |"
        yield f"|---|---|{'---|' * len(METRICS)}"
        for name, rounds in measured.variants.items():
            figures = " | ".join(figure(metric, rounds) for metric in METRICS)
            yield f"| {name} | {results.what[name]} | {figures} |"
        yield ""
        base = measured.variants.get(results.baseline)
        if base:
            yield f"Against {results.baseline}, medians of the ratios of each round (lowest to highest):"
            yield ""
            yield f"| variant | {' | '.join(METRICS)} |"
            yield f"|---|{'---|' * len(METRICS)}"
            for name, rounds in measured.variants.items():
                yield f"| {name} | {' | '.join(str(ratio(rounds[each], base[each])) for each in METRICS)} |"
            yield ""
        for name, why in measured.left_out.items():
            yield f"- {name} was left out: {' '.join(why.split())}"
        if measured.left_out:
            yield ""


def plot(results: Results) -> str:
    """The medians as bars with their spread: a panel for each metric, a bar for each underlay."""
    names = list(dict.fromkeys(name for one in results.underlays.values() for name in one.variants))
    step = _BAR * len(results.underlays) + _GAP
    width, height = _LABEL + len(_PLOTTED) * (_PANEL + 20), _TOP + len(names) * step + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    for at, underlay in enumerate(results.underlays):
        parts.append(f'<rect x="{_LABEL + at * 120}" y="6" width="10" height="10" fill="{_COLOURS[underlay]}"/>')
        parts.append(f'<text x="{_LABEL + 15 + at * 120}" y="15">{underlay}</text>')
    for row, name in enumerate(names):
        y = _TOP + row * step + step / 2
        parts.append(f'<text x="{_LABEL - 8}" y="{y:.0f}" text-anchor="end">{escape(name)}</text>')
    for column, metric in enumerate(_PLOTTED):
        left = _LABEL + column * (_PANEL + 20)
        parts.append(f'<text x="{left}" y="{_TOP - 8}" font-weight="bold">{escape(METRICS[metric])}</text>')
        parts += _panel(results, names, metric, left, step)
    return "\n".join([*parts, "</svg>", ""])


def _panel(results: Results, names: list[str], metric: str, left: float, step: float) -> Iterator[str]:
    found = {
        (name, underlay): measured.variants[name][metric]
        for underlay, measured in results.underlays.items()
        for name in names
        if name in measured.variants
    }
    scale = (_PANEL - 45) / max((max(values) for values in found.values()), default=1)
    for row, name in enumerate(names):
        for at, underlay in enumerate(results.underlays):
            if (name, underlay) not in found:
                continue
            values = found[name, underlay]
            middle, y = statistics.median(values) * scale, _TOP + row * step + at * _BAR
            yield f'<rect x="{left}" y="{y}" width="{middle:.1f}" height="{_BAR - 1}" fill="{_COLOURS[underlay]}"/>'
            yield (
                f'<path d="M{left + min(values) * scale:.1f} {y + 4}H{left + max(values) * scale:.1f}"'
                ' stroke="#000" stroke-opacity=".55"/>'
            )
            text = f"{statistics.median(values):,.{_DIGITS[metric]}f}"
            yield f'<text x="{left + max(values) * scale + 4:.1f}" y="{y + 8}" font-size="9">{text}</text>'
