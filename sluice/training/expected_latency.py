"""The latency model as a differentiable function of soft widths, ranks and switches.

1. Latency is a staircase, flat between its jumps, and a flat step has no gradient. Training therefore uses the
   interpolation through the widths on offer (``LatencyModel.levels``) alone: it has the staircase's values at
   every width that the solver may choose, and the average slope of the steps in between.
2. A term counts times the sum of its switches. Switches of blocks are values like widths (their gates).
3. Whether a layer is dense or factorised is no parameter: it follows from the costs of its alternatives at the present
   widths and ranks (`LayerStates`). With costs ``c_k``, those of the terms that exist under alternative k, and ``d``
   the drops that contain the layer, it contributes

       prod (1 - d) * min_k c_k,       with the derivatives of       prod (1 - d) * sum_k p_k c_k

   at constant ``p_k ~ exp(-c_k / T)``, which are those of the softmin ``-T log sum_k exp(-c_k / T)``; T is a share of
   the dense cost. The value is that of the decision, so a budget on it is a budget on the engine that will be built.
   The derivative reaches the rank of a layer that is still dense, where the minimum's would be zero, and as all ``p_k``
   are positive a smaller rank or width never looks slower. (Were the ``p_k`` variable it would, wherever the factorised
   layer costs much more than the dense one: there a lower rank would first of all draw weight to the dearer form.)
   Costs are times alone: the cache penalty (`sluice.core.latency`, 5) decides no layer, but counts in the value.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from sluice.core.errors import SluiceError
from sluice.core.latency import Extent, LatencyModel, Term

__all__ = ["ExpectedLatency", "LayerStates", "alternatives", "configured", "through_levels"]

TEMPERATURE = 0.5  # of the softmin, relative to the dense cost


@dataclass(frozen=True, slots=True)
class LayerStates:
    """Switches of which exactly one is set: the cheapest of ``options``, the dense one first, unless a drop is."""

    options: tuple[str, ...]
    drops: tuple[str, ...] = ()


def alternatives(model: LatencyModel, given: Collection[str]) -> tuple[LayerStates, ...]:
    """For every rule of ``model``, the switches left to choose once the sites ``given`` have values of their own."""
    found = []
    for rule in model.rules:
        names = [name for name, _ in rule.coefs]
        if rule.total != 1 or any(coef != 1 for _, coef in rule.coefs):
            continue
        options = sorted((s for s in names if s not in given and 1 in model.levels[s]), key=lambda s: -model.dense[s])
        drops = tuple(s for s in names if s in given)
        if options and len(options) + len(drops) > 1:
            found.append(LayerStates(tuple(options), drops))
    return tuple(found)


def configured(
    model: LatencyModel, values: Mapping[str, float], layers: Sequence[LayerStates] = ()
) -> dict[str, float]:
    """A value for every site: those given, the cheapest option in ``layers``, dense elsewhere."""
    full: dict[str, float] = {**model.dense, **values}
    costs = {s: 0.0 for layer in layers for s in layer.options}
    for term in model.terms:
        for switch in costs.keys() & set(term.when):
            costs[switch] += model.slope * term.weight * term.at(full)
    for layer in layers:
        best = min(layer.options, key=lambda s: costs[s])
        full.update({s: float(s == best and not any(full[d] for d in layer.drops)) for s in layer.options})
    return full


def through_levels(model: LatencyModel) -> LatencyModel:
    """The model whose tables are known at the levels and interpolated in between.

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

        def on_grid(values: np.ndarray) -> np.ndarray:
            values = np.asarray(values, float)
            for axis, (at, known) in enumerate(zip(grid, term.knots, strict=True)):
                values = np.apply_along_axis(partial(np.interp, at, known), axis, values)
            return values

        reload = None if term.reload is None else on_grid(term.reload)
        return replace(term, knots=grid, ms=on_grid(term.ms), reload=reload, bound=None, measured=None)

    return replace(model, terms=tuple(resampled(t) for t in model.terms))


class ExpectedLatency:
    """``LatencyModel.ms`` as a differentiable function of a vector of values in the order of ``groups``, all sites.

    Terms are stacked by their number of extents (none to two together) and padded, so that a call costs a fixed
    number of tensor operations. Computed in double precision, returned in the dtype of the values, in milliseconds.
    The switches in ``layers`` follow from the other sites (rule 3); values given for them are ignored.
    """

    def __init__(self, model: LatencyModel, *, smooth: bool = True, layers: Sequence[LayerStates] = ()) -> None:
        if smooth:
            model = through_levels(model)
        self.groups = tuple(model.dense)
        self.dense = tuple(float(n) for n in model.dense.values())
        self._again = any(term.reload is not None for term in model.terms)
        always = [_tables(t, model.slope, self._again) for t in model.terms if not t.extents and not t.when]
        offsets = np.asarray([model.intercept, -model.slope * model.cached_ms][: 1 + self._again])
        stacks: dict[int, list[Term]] = {}
        for term in model.terms:
            if term.extents or term.when:
                stacks.setdefault(max(len(term.extents), 2), []).append(term)
        self._constant = torch.from_numpy(np.sum([offsets, *always], axis=0))
        self._stacks = [
            _stack(terms, rank, self.groups, [_tables(t, model.slope, self._again) for t in terms])
            for rank, terms in sorted(stacks.items())
        ]
        self._layers = _indices(layers, self.groups)
        self._moved: dict[torch.device, tuple[list[tuple[Tensor, ...]], tuple[Tensor, ...], Tensor]] = {}

    def __call__(self, widths: Tensor | Mapping[str, Tensor]) -> Tensor:
        """Milliseconds, a scalar; sites absent from a mapping are dense."""
        if isinstance(widths, Mapping):
            like = next(iter(widths.values()))
            dense = zip(self.groups, self.dense, strict=True)
            widths = torch.stack([widths[g] if g in widths else like.new_tensor(n) for g, n in dense])
        if widths.shape != (len(self.groups),):
            raise SluiceError(f"widths have shape {tuple(widths.shape)}; give one each of {len(self.groups)} groups")
        if widths.device not in self._moved:
            stacks = [tuple(t.to(widths.device) for t in stack) for stack in self._stacks]
            layers = tuple(t.to(widths.device) for t in self._layers)
            self._moved[widths.device] = stacks, layers, self._constant.to(widths.device)
        stacks, layers, constant = self._moved[widths.device]
        w = widths.to(torch.float64)
        found = [(on, always, _interpolate(w, *tables)) for on, always, *tables in stacks]

        def total(values: Tensor) -> Tensor:
            parts = [((on @ values + always) * ms).sum(1) for on, always, ms in found]
            return torch.stack([constant, *parts]).sum(0)

        if not layers:
            sums = total(w)
            return (sums[0] + sums[1:].clamp(min=0.0).sum()).to(widths.dtype)
        cost = torch.stack([ms[0].detach() @ on for on, _, ms in found]).sum(0)
        soft, hard = _settled(w, cost, *layers)
        built, smooth = total(hard).detach(), total(soft)
        again = (built[1:] > 0).to(smooth)  # of the network that would be built, not of the mixture
        value = built[0] + built[1:].clamp(min=0.0).sum()
        smooth = smooth[0] + (again * smooth[1:]).sum()
        return (smooth + (value - smooth).detach()).to(widths.dtype)


def _indices(layers: Sequence[LayerStates], groups: tuple[str, ...]) -> tuple[Tensor, ...]:
    """(options (L, K), whether they exist (L, K), drops (L, D), whether they exist (L, D)) as positions; or nothing."""
    if not layers:
        return ()
    index = {g: i for i, g in enumerate(groups)}
    arrays: list[Tensor] = []
    for rows in ([layer.options for layer in layers], [layer.drops for layer in layers]):
        length = max(len(row) for row in rows)
        arrays.append(torch.tensor([[index[s] for s in row] + [0] * (length - len(row)) for row in rows]))
        arrays.append(torch.tensor([[k < len(row) for k in range(length)] for row in rows]))
    return tuple(arrays)


def _settled(
    w: Tensor, cost: Tensor, options: Tensor, exist: Tensor, drops: Tensor, dropped: Tensor
) -> tuple[Tensor, Tensor]:
    """Values of all sites with the options' switches by softmin weights, and by decision (rule 3)."""
    own = torch.where(exist, cost[options], torch.inf)
    temperature = (TEMPERATURE * own[:, :1].abs()).clamp(min=1e-12)
    share = torch.softmax(-own / temperature, dim=1)
    best = torch.zeros_like(share).scatter_(1, own.argmin(dim=1, keepdim=True), 1.0)
    on = torch.where(dropped, 1.0 - w[drops], 1.0).prod(dim=1, keepdim=True) if drops.shape[1] else 1.0
    where = options[exist]
    return w.index_put((where,), (on * share)[exist]), w.index_put((where,), (on * best)[exist])


def _tables(term: Term, slope: float, again: bool) -> np.ndarray:
    """The term's times, and where ``again`` its reloads behind them: shape ``(1 or 2, *knots)``, in milliseconds."""
    known = [term.ms]
    if again:
        known.append(np.zeros(np.shape(term.ms)) if term.reload is None else term.reload)
    return slope * term.weight * np.stack([np.asarray(values, float) for values in known])


def _stack(terms: list[Term], rank: int, groups: tuple[str, ...], costs: list[np.ndarray]) -> tuple[Tensor, ...]:
    """Arrays of R extents of T terms, their C ``costs`` as `_tables` gives them.

    (switches (T, G), 1 without any (T,), coefs (R, T, G), const (R, T), knots (R, T, K), first, last (R, T),
    tables (C, T, K**R)).
    """
    # A knot more than measured: a single measurement is a constant, and lo < hi always exist.
    size = 1 + max((len(k) for t in terms for k in t.knots), default=1)
    shape = (rank, len(terms))
    coefs, const = np.zeros((*shape, len(groups))), np.zeros(shape)
    knots, first, last = np.tile(np.arange(size, dtype=float), (*shape, 1)), np.zeros(shape), np.zeros(shape)
    tables = np.zeros((len(costs[0]), len(terms), *[size] * rank))
    on, always = np.zeros((len(terms), len(groups))), np.zeros(len(terms))
    index = {g: i for i, g in enumerate(groups)}
    for t, term in enumerate(terms):
        always[t] = float(not term.when)
        for switch in term.when:
            on[t, index[switch]] += 1.0
        for r, (extent, known) in enumerate(zip(term.extents, term.knots, strict=True)):
            const[r, t] = extent.const
            for group, coef in extent.coefs:
                coefs[r, t, index[group]] += coef
            n = len(known)
            knots[r, t] = np.concatenate([known, known[-1] + 1.0 + np.arange(size - n)])
            first[r, t], last[r, t] = known[0], known[-1]
        table = costs[t].reshape([*costs[t].shape, *[1] * (rank - len(term.extents))])
        padded = np.pad(table, [(0, 0), *((0, size - length) for length in table.shape[1:])], mode="edge")
        tables[:, t] = padded
    arrays = (on, always, coefs, const, knots, first, last, tables.reshape(*tables.shape[:2], -1))
    return tuple(torch.from_numpy(np.ascontiguousarray(a)) for a in arrays)


def _interpolate(
    w: Tensor, coefs: Tensor, const: Tensor, knots: Tensor, first: Tensor, last: Tensor, tables: Tensor
) -> Tensor:
    """Multilinear interpolation of every term of a stack, shape (C, T)."""
    rank, size = knots.shape[0], knots.shape[2]
    x = torch.clamp(coefs @ w + const, first, last)  # the ends themselves have a gradient
    hi = torch.searchsorted(knots, x.detach().unsqueeze(-1)).clamp(1, size - 1)
    ends = knots.gather(2, torch.cat([hi - 1, hi], dim=2))
    t = (x - ends[..., 0]) / (ends[..., 1] - ends[..., 0])
    corner = torch.zeros_like(hi[0])  # (T, 2**r): flat index of every corner of the cell, first extent slowest
    for r in range(rank):
        corner = (corner * size).unsqueeze(-1) + torch.cat([hi[r] - 1, hi[r]], dim=1).unsqueeze(1)
        corner = corner.flatten(1)
    value = tables.gather(2, corner.expand(len(tables), *corner.shape))
    for r in reversed(range(rank)):
        pairs = value.unflatten(2, (-1, 2))
        value = torch.lerp(pairs[..., 0], pairs[..., 1], t[r].unsqueeze(-1))
    return value.squeeze(2)
