"""The latency model as a differentiable function of soft widths.

Latency is a staircase, flat between its jumps, and a flat step has no gradient. Training therefore uses the
interpolation through the widths worth having (``LatencyModel.levels``) alone: it has the staircase's values at every
width that the solver may choose, and the average slope of the steps in between.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from sluice.errors import SluiceError
from sluice.latency import Extent, LatencyModel, Term

__all__ = ["ExpectedLatency", "through_levels"]


def through_levels(model: LatencyModel) -> LatencyModel:
    """The model whose tables are known at the levels worth having and interpolated in between.

    Where an extent concatenates groups its knots are those at which all groups stand at the same share of their
    levels, the least and the dense width included.
    """

    def knots(extent: Extent) -> np.ndarray:
        groups = list(dict.fromkeys(g for g, _ in extent.coefs))
        most = max((len(model.levels[g]) for g in groups), default=1)
        shares = np.linspace(0.0, 1.0, most)
        picked = [{g: model.levels[g][round(float(s) * (len(model.levels[g]) - 1))] for g in groups} for s in shares]
        return np.unique([extent.at(widths) for widths in picked])

    def resampled(term: Term) -> Term:
        grid = tuple(knots(e) for e in term.extents)
        ms = np.asarray(term.ms, float)
        for axis, (at, known) in enumerate(zip(grid, term.knots, strict=True)):
            ms = np.apply_along_axis(partial(np.interp, at, known), axis, ms)
        return replace(term, knots=grid, ms=ms)

    return replace(model, terms=tuple(resampled(t) for t in model.terms))


class ExpectedLatency:
    """``LatencyModel.ms`` as a differentiable function of a vector of widths in the order of ``groups``.

    Terms are stacked by their number of extents (none to two together) and padded, so that a call costs a fixed
    number of tensor operations. Computed in double precision, returned in the dtype of the widths, in milliseconds.
    """

    def __init__(self, model: LatencyModel, *, smooth: bool = True) -> None:
        if smooth:
            model = through_levels(model)
        self.groups = tuple(model.dense)
        self.dense = tuple(float(n) for n in model.dense.values())
        constant = sum(t.weight * float(t.ms) for t in model.terms if not t.extents)
        self._constant = model.intercept + model.slope * constant
        stacks: dict[int, list[Term]] = {}
        for term in model.terms:
            if term.extents:
                stacks.setdefault(max(len(term.extents), 2), []).append(term)
        self._stacks = [_stack(terms, rank, self.groups, model.slope) for rank, terms in sorted(stacks.items())]
        self._moved: dict[torch.device, list[tuple[Tensor, ...]]] = {torch.device("cpu"): self._stacks}

    def __call__(self, widths: Tensor | Mapping[str, Tensor]) -> Tensor:
        """Milliseconds, a scalar; groups absent from a mapping are dense."""
        if isinstance(widths, Mapping):
            like = next(iter(widths.values()))
            dense = zip(self.groups, self.dense, strict=True)
            widths = torch.stack([widths[g] if g in widths else like.new_tensor(n) for g, n in dense])
        if widths.shape != (len(self.groups),):
            raise SluiceError(f"widths have shape {tuple(widths.shape)}; give one each of {len(self.groups)} groups")
        if widths.device not in self._moved:
            self._moved[widths.device] = [tuple(t.to(widths.device) for t in stack) for stack in self._stacks]
        w = widths.to(torch.float64)
        total = w.new_tensor(self._constant)
        for stack in self._moved[widths.device]:
            total = total + _interpolate(w, *stack)
        return total.to(widths.dtype)


def _stack(terms: list[Term], rank: int, groups: tuple[str, ...], slope: float) -> tuple[Tensor, ...]:
    """(coefs (R, T, G), const (R, T), knots (R, T, K), first, last (R, T), tables (T, K**R)), weights included."""
    # A knot more than measured: a single measurement is a constant, and lo < hi always exist.
    size = 1 + max((len(k) for t in terms for k in t.knots), default=1)
    shape = (rank, len(terms))
    coefs, const = np.zeros((*shape, len(groups))), np.zeros(shape)
    knots, first, last = np.tile(np.arange(size, dtype=float), (*shape, 1)), np.zeros(shape), np.zeros(shape)
    tables = np.zeros((len(terms), *[size] * rank))
    index = {g: i for i, g in enumerate(groups)}
    for t, term in enumerate(terms):
        for r, (extent, known) in enumerate(zip(term.extents, term.knots, strict=True)):
            const[r, t] = extent.const
            for group, coef in extent.coefs:
                coefs[r, t, index[group]] += coef
            n = len(known)
            knots[r, t] = np.concatenate([known, known[-1] + 1.0 + np.arange(size - n)])
            first[r, t], last[r, t] = known[0], known[-1]
        table = np.asarray(term.ms, float)
        table = np.reshape(table, [*table.shape, *[1] * (rank - table.ndim)])
        padded = np.pad(table, [(0, size - length) for length in table.shape], mode="edge")
        tables[t] = slope * term.weight * padded
    arrays = (coefs, const, knots, first, last, tables.reshape(len(terms), -1))
    return tuple(torch.from_numpy(np.ascontiguousarray(a)) for a in arrays)


def _interpolate(
    w: Tensor, coefs: Tensor, const: Tensor, knots: Tensor, first: Tensor, last: Tensor, tables: Tensor
) -> Tensor:
    """Multilinear interpolation of all terms of a stack, summed."""
    rank, size = knots.shape[0], knots.shape[2]
    x = torch.clamp(coefs @ w + const, first, last)  # the ends themselves have a gradient
    hi = torch.searchsorted(knots, x.detach().unsqueeze(-1)).clamp(1, size - 1)
    ends = knots.gather(2, torch.cat([hi - 1, hi], dim=2))
    t = (x - ends[..., 0]) / (ends[..., 1] - ends[..., 0])
    corner = torch.zeros_like(hi[0])  # (T, 2**r): flat index of every corner of the cell, first extent slowest
    for r in range(rank):
        corner = (corner * size).unsqueeze(-1) + torch.cat([hi[r] - 1, hi[r]], dim=1).unsqueeze(1)
        corner = corner.flatten(1)
    value = tables.gather(1, corner)
    for r in reversed(range(rank)):
        pairs = value.unflatten(1, (-1, 2))
        value = torch.lerp(pairs[..., 0], pairs[..., 1], t[r].unsqueeze(-1))
    return value.sum()
