"""Staircases as SVG: milliseconds of a convolution against its output channels.

One panel for every batch and precision, one line for every target. A line joins measured points straight; it claims
nothing between them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.svg import document, text

__all__ = ["staircase_plot", "ticks"]

WIDE, TALL, LEFT, LOW, HEAD, MARGIN = 400, 200, 58, 34, 30, 14
COLUMNS = 2
COLOURS = ("#1d4ed8", "#c2410c", "#047857", "#6b7280")
GREY = "#e5e7eb"

# By target: (output channels, ms), the widths increasing.
Lines = Mapping[str, Sequence[tuple[int, float]]]


def staircase_plot(title: str, panels: Mapping[str, Lines]) -> str:
    """The picture of ``panels[name][target]``."""
    across, down = LEFT + WIDE + MARGIN, HEAD + TALL + LOW
    width, tall = COLUMNS * across + MARGIN, 56 + -(-len(panels) // COLUMNS) * down
    targets = list(dict.fromkeys(target for lines in panels.values() for target in lines))
    colours = {target: COLOURS[k % len(COLOURS)] for k, target in enumerate(targets)}
    body = [text(MARGIN, 22, title, size=14, weight="bold")]
    for k, target in enumerate(targets):
        body.append(f'<circle cx="{MARGIN + 5 + 110 * k}" cy="38" r="4" fill="{colours[target]}"/>')
        body.append(text(MARGIN + 14 + 110 * k, 42, target))
    for k, (name, lines) in enumerate(panels.items()):
        body += _panel(MARGIN + k % COLUMNS * across, 50 + k // COLUMNS * down, name, lines, colours)
    return document(width, tall, body)


def ticks(most: float) -> list[float]:
    """Round numbers from 0 to ``most``, four to nine of them."""
    step = 1.0
    while most / step < 4:
        step /= 10
    while most / step >= 40:
        step *= 10
    step *= next(k for k in (1, 2, 5, 10) if most / (step * k) < 9)
    return [k * step for k in range(int(most / step) + 1)]


def _panel(left: int, top: int, name: str, lines: Lines, colours: Mapping[str, str]) -> list[str]:
    points = [point for line in lines.values() for point in line]
    widest, slowest = max(width for width, _ in points), max(ms for _, ms in points)
    base = top + HEAD + TALL

    def x(width: float) -> float:
        return left + LEFT + WIDE * width / widest

    def y(ms: float) -> float:
        return base - TALL * ms / slowest

    out = [text(left + LEFT, top + 18, name, weight="bold")]
    for ms in ticks(slowest):
        out.append(f'<line x1="{x(0):.1f}" x2="{x(widest):.1f}" y1="{y(ms):.1f}" y2="{y(ms):.1f}" stroke="{GREY}"/>')
        out.append(text(left + LEFT - 6, y(ms) + 4, f"{ms:g}", size=10, reference="end"))
    for width in ticks(widest):
        out.append(text(x(width), base + 14, f"{width:g}", size=10, reference="middle"))
    out.append(text(x(widest), base + 27, "output channels", size=10, reference="end"))
    out.append(text(left, base + 14, "ms", size=10))
    for target, line in lines.items():
        path = " ".join(f"{x(width):.1f},{y(ms):.1f}" for width, ms in line)
        out.append(f'<polyline points="{path}" fill="none" stroke="{colours[target]}" stroke-width="1.5"/>')
        out += [f'<circle cx="{x(w):.1f}" cy="{y(ms):.1f}" r="1.8" fill="{colours[target]}"/>' for w, ms in line]
    return out
