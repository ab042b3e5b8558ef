"""How the slim network was trained: what was tried, what was chosen, and whether more training would help.

With ``a`` and ``b`` the held-out losses of the chosen setting after trials of ``s`` and ``2 s`` steps, each with a
whole schedule of its own, the loss fell by ``1 - b / a`` with a doubling of the steps. The power law through both,

    L(n) = b (b / a)^log2(n / 2s)

is read at the end of the fine-tune. It is far off, by up to a factor of three and a half either way where it was tried.
So the report tells what was measured, and where even by the law the network is far from recovered, that more epochs may
help. Losses of the fine-tune itself say less: its data are those it is trained on, and a cosine ends flat in any case.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

__all__ = ["RecoveryRow", "TrialRow"]

FALLS = 0.05  # with a doubling; less is not worth one
NEAR = 2.0  # times the dense network's loss: recovered
LEFT = 0.05  # of the loss right after the cut: recovered


@dataclass(frozen=True, slots=True)
class TrialRow:
    """One run of the trial; ``held_out`` is None where a loss was not finite."""

    lr: float
    loss: str
    parametrisation: str
    steps: int
    held_out: float | None


@dataclass(frozen=True, slots=True)
class RecoveryRow:
    """The training of the slim network for ``steps`` steps (0: not known), and the runs that chose its setting.

    ``measure`` names the loss that all runs were judged by on held-out batches; ``before`` is that of the slim network
    before training, ``dense`` the dense network's. Without a trial there are none. ``refitted`` layers got weights by
    least squares before; ``loss`` is empty where nothing was trained. A rehearsal of the plan had ``foreseen`` a loss
    for the end of the fine-tune; ``ended`` is what it is on the first batches of the data, trained on by then.
    """

    lr: float
    loss: str
    parametrisation: str
    steps: int
    trials: tuple[TrialRow, ...] = ()
    measure: str = ""
    before: float | None = None
    dense: float | None = None
    refitted: int = 0
    foreseen: float | None = None
    ended: float | None = None

    def share(self) -> float:
        """Steps of the trial, by those of the fine-tune."""
        return sum(row.steps for row in self.trials) / self.steps if self.steps else 0.0

    def chosen(self) -> dict[int, float]:
        """Held-out losses of the chosen setting, by the steps of a run."""
        own = (self.lr, self.loss, self.parametrisation)
        rows = [row for row in self.trials if (row.lr, row.loss, row.parametrisation) == own]
        return {row.steps: row.held_out for row in rows if row.held_out is not None}

    def fall(self) -> float | None:
        """By what share the loss fell with the last doubling of the trial's steps; None where that was not seen."""
        found = self.chosen()
        last = max(found, default=0)
        half = found.get(last // 2) if last and last % 2 == 0 else None
        return None if half is None or half <= 0 else 1 - found[last] / half

    def at_end(self) -> float | None:
        """The power law, read at the end of the fine-tune."""
        fall, found = self.fall(), self.chosen()
        if fall is None or found[max(found)] <= 0 or not self.steps:
            return None
        return found[max(found)] * (1 - fall) ** math.log2(self.steps / max(found))

    def may_want_epochs(self) -> bool:
        """Whether the fine-tune ends far from recovered, by the power law, and the trial still gained by more steps."""
        fall, end = self.fall(), self.at_end()
        if fall is None or end is None or fall < FALLS:
            return False
        return end > max(NEAR * (self.dense or 0.0), LEFT * (self.before or 0.0))

    def lines(self) -> Iterator[str]:
        """What the report says below the table of the runs."""
        if self.refitted:
            yield f"{self.refitted} layers refitted by least squares on unlabelled inputs"
        if not self.loss:
            return
        how = f"fine-tuned at a learning rate of {self.lr:.4g} on {self.loss}, {self.parametrisation} weights"
        if self.foreseen is not None and self.ended is not None:
            yield (
                f"the rehearsal foresaw a loss of {self.foreseen:.3g} at the end of the fine-tune, and it is "
                f"{self.ended:.3g}, on batches that were trained on by then"
            )
        if not self.trials:
            yield how
            return
        yield f"{how}, as tried in {self.share():.0%} of the steps of the fine-tune"
        fall, end, last = self.fall(), self.at_end(), max(self.chosen(), default=0)
        if fall is None or end is None:
            return
        told = (
            f"held-out loss fell {fall:.1%} when the steps of a trial doubled to {last:,} (fine-tune: {self.steps:,})"
        )
        if self.may_want_epochs():
            yield (
                f"{told}; going on like that it ends at {end:.3g}, the dense network has {self.dense or 0.0:.3g}: "
                "training may limit the result more than the plan, and more epochs may help"
            )
        else:
            yield told

    def table(self) -> Any:
        """The runs by setting, for a ``rich`` console."""
        from rich.table import Table

        steps = sorted({row.steps for row in self.trials})
        heads = [f"after {count:,} steps" for count in steps]
        table = Table("tried rate", "loss", "weights", *heads, box=None, pad_edge=False)
        for column in (table.columns[0], *table.columns[3:]):
            column.justify = "right"
        for lr, loss, form in dict.fromkeys((row.lr, row.loss, row.parametrisation) for row in self.trials):
            found = {r.steps: r.held_out for r in self.trials if (r.lr, r.loss, r.parametrisation) == (lr, loss, form)}
            cells = ["" if n not in found else _figure(found[n]) for n in steps]
            table.add_row(f"{lr:.4g}", loss, form, *cells)
        return table


def _figure(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"
