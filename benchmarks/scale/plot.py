"""Figures over the number of leases as an SVG: small pictures side by side, both axes logarithmic. No dependency. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from scale.growth import SHAPES

Points = Sequence[tuple[float, float]]
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 360, 240, 52, 24, 30, 34
COLOURS = ("#1f6f8b", "#c8553d", "#6a994e", "#7b5ea7")
_TEXT = 'font-family="sans-serif" font-size="11" fill="#333"'


def svg(panels: Mapping[str, Mapping[str, Points]]) -> str:
    """One picture for each title, one line for each name. Dashed: n and n² through the first line's largest point."""
    columns = 2
    rows = math.ceil(len(panels) / columns)
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    width, height = columns * WIDTH, rows * HEIGHT + 26
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    for index, (title, lines) in enumerate(panels.items()):
        x, y = index % columns * WIDTH, index // columns * HEIGHT
        parts.append(f'<g transform="translate({x},{y})">{_panel(title, lines, names)}</g>')
    for index, name in enumerate(names):
        x, y = LEFT + index * 110, rows * HEIGHT + 10
        parts.append(f'<rect x="{x}" y="{y}" width="14" height="4" fill="{COLOURS[index % len(COLOURS)]}"/>')
        parts.append(f'<text x="{x + 20}" y="{y + 6}" {_TEXT}>{name}</text>')
    x = LEFT + len(names) * 110
    parts.append(
        f'<text x="{x}" y="{rows * HEIGHT + 16}" {_TEXT}>dashed: as n; dotted: as n², through the largest</text>'
    )
    return "\n".join([*parts, "</svg>", ""])


def _panel(title: str, lines: Mapping[str, Points], names: Sequence[str]) -> str:
    points = [point for line in lines.values() for point in line if point[0] > 0 and point[1] > 0]
    parts = [f'<text x="{LEFT}" y="18" {_TEXT} font-weight="bold">{title}</text>']
    if not points:
        return parts[0]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    low, high = 10 ** math.floor(math.log10(min(ys))), 10 ** math.ceil(math.log10(max(ys) * 1.01))
    left, right = min(xs), max(*xs, min(xs) * 1.01)

    def across(x: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * math.log(x / left) / math.log(right / left)

    def up(y: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * math.log(y / low) / math.log(high / low)

    for exponent in range(round(math.log10(low)), round(math.log10(high)) + 1):
        y = up(10.0**exponent)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{y + 4:.1f}" {_TEXT} text-anchor="end">{10.0**exponent:g}</text>')
    below = f'y="{HEIGHT - 16}" {_TEXT} text-anchor="middle"'
    parts += [f'<text x="{across(x):.1f}" {below}>{x:,.0f}</text>' for x in sorted(set(xs))]
    last = max(next(iter(lines.values())))
    for shape, dash in (("n", "6 4"), ("n²", "1 4")):
        scale = last[1] / SHAPES[shape](last[0])
        guide = [(x, scale * SHAPES[shape](x)) for x in _between(left, right)]
        seen = [(x, y) for x, y in guide if low <= y <= high]
        parts.append(_line([(across(x), up(y)) for x, y in seen], "#999", f'stroke-dasharray="{dash}"'))
    for name, line in lines.items():
        colour = COLOURS[names.index(name) % len(COLOURS)]
        drawn = [(across(x), up(y)) for x, y in sorted(line) if x > 0 and y > 0]
        parts.append(_line(drawn, colour, 'stroke-width="2"'))
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in drawn]
    return "\n".join(parts)


def _between(left: float, right: float) -> list[float]:
    return [left * (right / left) ** (step / 40) for step in range(41)]


def _line(points: Points, colour: str, style: str) -> str:
    if not points:
        return ""
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return f'<path d="M{path}" fill="none" stroke="{colour}" {style}/>'
