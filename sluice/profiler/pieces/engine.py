"""A whole engine in one configuration, for timing: every group keeps its first channels, factors have any values.

A narrowed weight has no more ranks than its smaller side. So an engine whose configuration promises a larger rank takes
less time than promised. `with_ranks_in_reach` gives the nearest configuration whose engine has the promised ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import onnx

from sluice.core.latency import LatencyModel
from sluice.passes.cut.factor import max_rank
from sluice.passes.cut.merge_ties import tie_removed
from sluice.passes.cut.resolve import tensor_masks
from sluice.passes.cut.rewrite_onnx import cut_graph, restructure
from sluice.profiler.pieces.partition import Partition
from sluice.profiler.pieces.weightless import with_weights
from sluice.solver.options import EditSpace, chosen_edits

__all__ = ["build_engine", "model_key", "with_ranks_in_reach"]


def build_engine(
    partition: Partition, configuration: Mapping[str, int], options: EditSpace | None = None
) -> onnx.ModelProto:
    """The engine of ``configuration``, a value per site of the latency model."""
    edits = chosen_edits(options or EditSpace(), configuration)
    keeps = tie_removed(partition.analysis, edits.merges, partition.masks(configuration))
    return restructure(with_weights(cut_graph(partition.model, partition.analysis, keeps)), edits, values=False)


def with_ranks_in_reach(
    partition: Partition, model: LatencyModel, configuration: Mapping[str, int], options: EditSpace
) -> dict[str, int]:
    """The configuration with every rank at the largest of its levels that the narrowed weight has, or the smallest."""
    lost = tensor_masks(partition.analysis, partition.masks(configuration))
    found = dict(configuration)
    for option in options.ranks:
        shape = partition.analysis.tensors[option.param]
        kept = [int(lost[option.param, d].sum()) if (option.param, d) in lost else n for d, n in enumerate(shape)]
        most = max_rank(kept, option.form)
        levels = model.levels[option.rank]
        found[option.rank] = max((v for v in levels if v <= min(most, found[option.rank])), default=levels[0])
    return found


def model_key(partition: Partition, dense: Mapping[str, int]) -> str:
    """Identity of a network in the table: its pieces in order, and all its sites with their dense values."""
    sites = [f"{n}={s}" for n, s in dense.items()]
    text = ";".join([*(p.key for p in partition.pieces), *sites])
    return hashlib.sha256(text.encode()).hexdigest()[:24]
