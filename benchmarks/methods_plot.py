"""A dot plot of `benchmarks.methods` as SVG.

One panel for every job and budget, one row for every arm, at the change of accuracy against dense in points. The
axis ends at ``LEFT``; a worse arm stands at its end with its figure, and one that cannot reach the budget says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.svg import document, text

__all__ = ["dot_plot"]

LEFT, RIGHT = -6.0, 1.0
ROW, HEAD, FOOT, MARGIN = 19, 34, 30, 12
LABELS, AXIS, FIGURES = 112, 240, 80
PANEL = LABELS + AXIS + FIGURES
COLUMNS = 2
COLOURS = {"ours": "#c2410c", "torch-pruning": "#1d4ed8", "thin": "#1d4ed8"}
OWN = "#9ca3af"  # ours without a part


def dot_plot(title: str, panels: Mapping[str, Mapping[str, float | None]], arms: Sequence[str]) -> str:
    """The picture of ``panels[name][arm]``, points of accuracy or None where the budget is out of reach."""
    height = HEAD + ROW * len(arms) + FOOT
    rows = -(-len(panels) // COLUMNS)
    width, tall = COLUMNS * (PANEL + MARGIN) + MARGIN, rows * height + 40
    body = [text(MARGIN, 22, title, size=14, weight="bold")]
    for k, (name, found) in enumerate(panels.items()):
        left, top = MARGIN + k % COLUMNS * (PANEL + MARGIN), 34 + k // COLUMNS * height
        body += _panel(left, top, name, found, arms)
    return document(width, tall, body)


def _panel(left: int, top: int, name: str, found: Mapping[str, float | None], arms: Sequence[str]) -> list[str]:
    def x(points: float) -> float:
        return left + LABELS + AXIS * (min(max(points, LEFT), RIGHT) - LEFT) / (RIGHT - LEFT)

    low, bottom = top + HEAD - 12, top + HEAD + ROW * (len(arms) - 1) + 10
    out = [text(left, top + 14, name, weight="bold")]
    for tick in range(int(LEFT), int(RIGHT) + 1):
        colour = "#111827" if tick == 0 else "#e5e7eb"
        out.append(f'<line x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{low}" y2="{bottom}" stroke="{colour}"/>')
        out.append(text(x(tick), bottom + 13, f"{tick:+d}" if tick else "dense", size=10, reference="middle"))
    for row, arm in enumerate(arms):
        y = top + HEAD + ROW * row
        out.append(text(left, y + 4, arm))
        if arm not in found:
            continue
        points, colour = found[arm], COLOURS.get(arm, OWN)
        if points is None:
            out.append(text(left + LABELS + 4, y + 4, "cannot reach", colour="#6b7280"))
            continue
        out.append(f'<circle cx="{x(points):.1f}" cy="{y}" r="5" fill="{colour}"/>')
        out.append(text(left + LABELS + AXIS + 10, y + 4, f"{'◂ ' if points < LEFT else ''}{points:+.2f}"))
    return out
