"""The rows of a report: what became of pieces, groups and layers, and what each method saved."""

from __future__ import annotations

from dataclasses import dataclass

from sluice.core.plan import Plan

__all__ = ["JOINT", "EditRow", "GroupRow", "MethodRow", "PieceRow", "edit_rows"]

JOINT = "joint"  # describes the time that neighbouring pieces save together


@dataclass(frozen=True, slots=True)
class PieceRow:
    """One measured piece of the graph; ``ms`` of one occurrence, ``count`` occurrences.

    ``layer`` is the layer or the run of layers that the piece is, or takes the place of; empty where the piece was
    neither replaced nor replaces one.
    """

    name: str
    description: str
    count: int
    ms_before: float
    ms_after: float
    extents_before: tuple[int, ...]
    extents_after: tuple[int, ...]
    layer: str = ""

    def saved_ms(self) -> float:
        return self.count * (self.ms_before - self.ms_after)


@dataclass(frozen=True, slots=True)
class GroupRow:
    """Channels of one axis group."""

    name: str
    dense: int
    kept: int


@dataclass(frozen=True, slots=True)
class MethodRow:
    """The contribution of a method (filter, rank, block, merge), of `sluice.pipeline.report_figures.contributions`.

    ``sites`` is the number of sites that it changed. The plan would promise ``saved_ms`` more without it. ``loss`` is
    the increase of the loss that its levels were priced at (None: not known).
    """

    name: str
    sites: int
    saved_ms: float
    loss: float | None = None


@dataclass(frozen=True, slots=True)
class EditRow:
    """One structural edit: the method, the edited tensors or block, and the details."""

    method: str
    name: str
    detail: str


def edit_rows(plan: Plan) -> tuple[EditRow, ...]:
    """The plan's factorizations, drops and merges; slices are reported as widths."""
    return (
        *(EditRow("rank", f.param, f"{f.form}, rank {f.rank}") for f in plan.factorizations),
        *(EditRow("block", d.name, f"dropped, {len(d.params)} tensors") for d in plan.drops),
        *(
            EditRow("merge", m.name, f"{len(m.layers)} layers, of {' | '.join(' '.join(run) for run in m.runs)}")
            for m in plan.merges
        ),
    )
