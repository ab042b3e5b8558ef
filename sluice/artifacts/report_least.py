"""The curve of a search for the least latency: what was tried, what it gave, and what was settled on.

A figure of merit is higher the better. It is *kept* where it is no more than the allowed drop below the dense
network's. Only networks that were fine-tuned to the end count; short trainings have a forecast of their end.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

__all__ = ["CurveRow", "LeastRow"]

ROUNDING = 1e-9  # of the dense figure: 0.28 - 0.18 is more than 0.1 in floating point


@dataclass(frozen=True, slots=True)
class CurveRow:
    """One budget that was tried.

    ``budget``, ``promised`` and ``measured`` are shares of the dense latency, the latter two None where no engine is
    within the budget. ``metric`` is the figure after ``epochs`` of training, trials and rehearsal not counted. With
    ``forecast`` the figure is told that is expected after the whole fine-tune; ``full`` rows had that, and need none.
    ``reason`` says why a budget that cannot be met has no figure. Figures that are no numbers are None.
    """

    budget: float
    promised: float | None = None
    measured: float | None = None
    metric: float | None = None
    forecast: float | None = None
    epochs: float = 0.0
    full: bool = False
    reason: str = ""


@dataclass(frozen=True, slots=True)
class LeastRow:
    """A search for the least latency at which the figure drops by at most ``drop`` from ``dense``; all it tried."""

    drop: float
    dense: float
    tried: tuple[CurveRow, ...] = ()

    def lost(self, metric: float | None) -> float:
        """What a figure is below the dense network's; infinite where there is none."""
        return math.inf if metric is None or not math.isfinite(metric) else self.dense - metric

    def keeps(self, metric: float | None) -> bool:
        """Whether a figure is within the drop."""
        return self.lost(metric) <= self.drop + ROUNDING * max(1.0, abs(self.dense))

    def settled(self) -> CurveRow | None:
        """Of the networks that were fine-tuned the fastest that keeps the figure; if none does, the one nearest to it.

        None where none was.
        """
        full = [row for row in self.tried if row.full and not row.reason]
        kept = [row for row in full if self.keeps(row.metric)]
        if kept:
            return min(kept, key=_share)
        return min(full, key=lambda row: self.lost(row.metric), default=None)

    def met(self) -> bool:
        """Whether the network that was settled on keeps the figure."""
        settled = self.settled()
        return settled is not None and self.keeps(settled.metric)

    def lines(self) -> Iterator[str]:
        """What the report says below the curve."""
        settled = self.settled()
        if settled is not None:
            share, metric = f"{_share(settled):.1%} of the dense latency", _figure(settled.metric, ".4f")
            if self.met():
                yield f"{share} at a metric of {metric}, at most {self.drop:g} below the dense {self.dense:.4f}"
            else:
                yield (
                    f"NO NETWORK FOUND that is at most {self.drop:g} below the dense {self.dense:.4f}: the nearest has "
                    f"{metric} at {share}; allow a larger drop, or give more epochs"
                )
        short, full = ([row for row in self.tried if row.full is whole] for whole in (False, True))
        told = (
            f"{sum(row.epochs for row in rows):.3g} epochs in {len(rows)} {name}{'s' * (len(rows) != 1)}"
            for rows, name in ((short, "short training"), (full, "fine-tune"))
        )
        yield f"{', '.join(told)}; trials and rehearsals come on top"
        for row in self.tried:
            if row.reason:
                yield f"  at {row.budget:.1%}: {row.reason}"

    def table(self) -> Any:
        """The curve, the largest budget first, for a ``rich`` console."""
        from rich.table import Table

        heads = ("budget", "promised", "measured", "epochs", "metric", "below dense", "forecast")
        table = Table(*heads, box=None, pad_edge=False)
        for column in table.columns:
            column.justify = "right"
        for row in sorted(self.tried, key=lambda row: (-row.budget, row.full)):
            below = None if row.metric is None else self.dense - row.metric
            shares = (_figure(share, ".1%") for share in (row.budget, row.promised, row.measured))
            forecast = "fine-tuned" if row.full else _figure(row.forecast, ".4f")
            table.add_row(*shares, f"{row.epochs:.3g}", _figure(row.metric, ".4f"), _figure(below, ".4g"), forecast)
        return table


def _share(row: CurveRow) -> float:
    return next(share for share in (row.measured, row.promised, row.budget) if share is not None)


def _figure(value: float | None, style: str) -> str:
    return "-" if value is None else format(value, style)
