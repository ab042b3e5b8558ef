"""The price of every level of every site of an ONNX file: the distance of the file with this one change.

    loss(site, value) = distance of the rewritten file's outputs from the file's own

1. The distance is that of `sluice.importance.output_distance`.
2. Widths, dropped blocks and merged runs are cut and rewritten as the plan will be; a rank is priced by the weight that
   the two factors make together, all ranks of a weight from one decomposition.
3. Levels between those that were measured are interpolated (`sluice.importance.curves`).
4. Changes are priced in the order of the graph, so that what lies before a change is not computed again for each
   (`sluice.importance.resumed`).
5. All prices together run the file on about `MACS` multiply-accumulates, so a slow file is priced on fewer examples:
   on `FEWEST` at least, and on `MOST` at most (`examples_for`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import itemgetter

import numpy as np
import onnx
from onnx import numpy_helper

from sluice.core.errors import SluiceError
from sluice.core.heap import give_back_holes, own_circles
from sluice.core.latency import LatencyModel
from sluice.core.plan import Edits
from sluice.importance.curves import LEVELS, curve, floored
from sluice.importance.output_distance import BROKEN, OutputDistance
from sluice.passes.cut.factor import truncations
from sluice.passes.cut.rewrite_onnx import cut_graph, restructure
from sluice.passes.graph.groups import Analysis, AxisGroup, keep_masks
from sluice.passes.graph.onnx_graph import OnnxGraph, hollow
from sluice.solver.amplitude_losses import by_importance
from sluice.solver.options import EditSpace, RankOption

__all__ = ["examples_for", "onnx_losses"]

MACS = 5e12
FEWEST, MOST = 8, 64


def examples_for(macs: int, latency: LatencyModel) -> int:
    """Rule 5, for a file of ``macs`` multiply-accumulates an example."""
    prices = sum(min(LEVELS, len(levels) - 1) for levels in latency.levels.values())
    return int(np.clip(MACS / max(1, macs * prices), FEWEST, MOST))


def onnx_losses(
    model: onnx.ModelProto,
    analysis: Analysis,
    latency: LatencyModel,
    options: EditSpace,
    scores: Mapping[str, np.ndarray],
    distance: OutputDistance,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, np.ndarray]:
    """Loss of every value of every site, shape ``(len(latency.levels[site]),)``; zero at the dense value."""
    levels = latency.levels
    asked: list[tuple[int, Callable[[], dict[str, np.ndarray]]]] = []
    for group in analysis.groups:
        if len(levels.get(group.name, ())) > 1:
            at = distance.position(ref.param for ref in group.refs)
            asked.append(
                (at, partial(_widths, levels[group.name], model, analysis, group, scores[group.name], distance))
            )
    for option in options.ranks:
        if len(levels.get(option.switch, ())) > 1:
            priced = partial(_ranks, option, levels[option.rank], model, distance)
            asked.append((distance.position((option.param,)), priced))
    edits = {name: Edits(drops=(drop,)) for name, drop in options.drops.items() if len(levels.get(name, ())) > 1}
    edits |= {name: Edits(merges=(run,)) for name, run in options.merges.items() if len(levels.get(name, ())) > 1}
    asked += [(0, partial(_edit, name, model, edit, distance)) for name, edit in edits.items()]
    found = dict[str, np.ndarray]()
    for done, (_, losses) in enumerate(sorted(asked, key=itemgetter(0)), 1):
        found |= losses()
        give_back_holes(circles=False)  # hundreds of changed files went through the heap
        advance(done, len(asked))
    return floored(found, latency)


def _widths(
    levels: Sequence[int], model: onnx.ModelProto, analysis: Analysis, group: AxisGroup, scores: np.ndarray,
    distance: OutputDistance,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Of the file nothing but the numbers of the group are copied, and those of one group at a time."""
    order = by_importance(scores)
    bare = hollow(model, OnnxGraph(model).initializers.keys() - {ref.param for ref in group.refs})

    def cut(width: int) -> float:
        with own_circles():
            return distance.of(cut_graph(bare, analysis, keep_masks(analysis, {group.name: order[:width].tolist()})))

    return {group.name: curve(levels, cut, dense=levels[-1])}


def _ranks(
    option: RankOption, levels: Sequence[int], model: onnx.ModelProto, distance: OutputDistance
) -> dict[str, np.ndarray]:
    """Even the largest rank is a truncation; its loss is that of the switch. One decomposition lives at a time."""
    truncated = truncations(numpy_helper.to_array(OnnxGraph(model).initializers[option.param]), option.form)

    def loss(rank: int) -> float:
        return distance.of_weight(option.param, np.ascontiguousarray(truncated(rank), np.float32))

    losses = curve(levels, loss, dense=None)
    return {option.switch: np.array([0.0, losses[-1]]), option.rank: losses - losses[-1]}


def _edit(name: str, model: onnx.ModelProto, edits: Edits, distance: OutputDistance) -> dict[str, np.ndarray]:
    try:
        with own_circles():
            loss = distance.of(restructure(model, edits))
    except SluiceError:
        loss = BROKEN
    return {name: np.array([0.0, loss])}
