"""The little of SVG that the benchmarks' plots need, written by hand: no plotting package is needed to make them."""

from __future__ import annotations

from collections.abc import Sequence
from xml.sax.saxutils import escape

__all__ = ["document", "text"]


def document(width: int, height: int, body: Sequence[str]) -> str:
    """A picture on white."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif">'
    )
    return "\n".join([head, f'<rect width="{width}" height="{height}" fill="#ffffff"/>', *body, "</svg>", ""])


def text(
    x: float,
    y: float,
    content: str,
    *,
    size: int = 12,
    reference: str = "start",
    weight: str = "normal",
    colour: str = "#111827",
) -> str:
    style = f'font-size="{size}" text-reference="{reference}" font-weight="{weight}" fill="{colour}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(content)}</text>'
