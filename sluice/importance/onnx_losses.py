"""The price of every level of every site of an ONNX file: the distance of the file with this one change.

    loss(site, value) = distance of the rewritten file's outputs from the file's own

1. The distance is that of `sluice.importance.output_distance`.
2. Widths, dropped blocks and merged runs are cut and rewritten as the plan will be; a rank is priced by the weight that
   the two factors make together, all ranks of a weight from one decomposition.
3. Levels between those that were measured are interpolated (`sluice.importance.curves`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx
from onnx import numpy_helper

from sluice.core.errors import SluiceError
from sluice.core.latency import LatencyModel
from sluice.core.plan import Edits
from sluice.importance.curves import curve, floored
from sluice.importance.output_distance import BROKEN, OutputDistance
from sluice.passes.cut.factor import truncations
from sluice.passes.cut.rewrite_onnx import cut_graph, restructure
from sluice.passes.graph.groups import Analysis, keep_masks
from sluice.passes.graph.onnx_graph import OnnxGraph
from sluice.solver.amplitude_losses import by_importance
from sluice.solver.options import EditSpace, RankOption

__all__ = ["onnx_losses"]


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
    groups = [group.name for group in analysis.groups if len(levels.get(group.name, ())) > 1]
    ranks = [option for option in options.ranks if len(levels.get(option.switch, ())) > 1]
    edits = {name: Edits(drops=(drop,)) for name, drop in options.drops.items() if len(levels.get(name, ())) > 1}
    edits |= {name: Edits(merges=(run,)) for name, run in options.merges.items() if len(levels.get(name, ())) > 1}
    total, done, found = len(groups) + len(ranks) + len(edits), 0, dict[str, np.ndarray]()
    for name in groups:
        order = by_importance(scores[name])

        def cut(width: int, name: str = name, order: np.ndarray = order) -> float:
            keeps = keep_masks(analysis, {name: order[:width].tolist()})
            return distance.of(cut_graph(model, analysis, keeps))

        found[name] = curve(levels[name], cut, dense=levels[name][-1])
        advance(done := done + 1, total)
    for option in ranks:
        losses = curve(levels[option.rank], _truncated(model, option, distance), dense=None)
        # Even the largest rank is a truncation; its loss is that of the switch.
        found[option.switch], found[option.rank] = np.array([0.0, losses[-1]]), losses - losses[-1]
        advance(done := done + 1, total)
    for name, edit in edits.items():
        found[name] = np.array([0.0, _restructured(model, edit, distance)])
        advance(done := done + 1, total)
    return floored(found, latency)


def _truncated(model: onnx.ModelProto, option: RankOption, distance: OutputDistance) -> Callable[[int], float]:
    at = truncations(numpy_helper.to_array(OnnxGraph(model).initializers[option.param]), option.form)

    def loss(rank: int) -> float:
        changed = onnx.ModelProto()
        changed.CopyFrom(model)
        OnnxGraph(changed).initializers[option.param].CopyFrom(numpy_helper.from_array(at(rank), option.param))
        return distance.of(changed)

    return loss


def _restructured(model: onnx.ModelProto, edits: Edits, distance: OutputDistance) -> float:
    try:
        return distance.of(restructure(model, edits))
    except SluiceError:
        return BROKEN
