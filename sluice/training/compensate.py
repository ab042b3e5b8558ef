"""The slim network's weights refitted to what the dense network computes, without labels and without training.

Layer after layer in the order of the graph, on unlabelled inputs:

1. The input of a layer is that of the slim network *as it is by then*; its target is the output of the same layer of
   the dense network, before the activation, on the channels that stay. The weight is that of least squares
   (`sluice.training.least_squares`); the bias, where there is one, is the mean of what is missed.
2. Of a factorised layer the first factor is made of the input's covariance ``H``: with the sliced weight as the matrix
   ``M`` of its form (`sluice.passes.cut.factor`), ``M H^(1/2) = U S V^T``, and the first factor is
   ``V_r^T H^(-1/2)``, the best of rank r for these inputs. The second factor is a layer as in rule 1.
3. Batch norm behind them gets statistics anew: the mean moves by what the slim network's differs from the dense one's
   on the same inputs, the variance is multiplied by the ratio of both.
4. In a run that is to be merged all padding stands in front, so layers inside make other positions than the dense
   network's: they stay as they are, and the last one is refitted.
5. Layers that several operators read, transposed convolutions, recurrent layers and layers with more than `COLUMNS`
   inputs per output stay as they are.

It lifts a network that was cut and is not trained. Before a fine-tune of several epochs at a good rate it costs
accuracy more often than it gains, so it is no default there.

Sources: channel pruning by least squares (He et al., ICCV 2017); data-aware low rank as in DRONE (Chen et al., NeurIPS
2021). The order and the targets are a reconstruction.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from sluice.core.plan import Factorize, Plan
from sluice.passes.cut.factor import factor_shapes, first_name, matrix, second_name
from sluice.passes.graph.aten_walk import arguments, each_axis, operator_name
from sluice.passes.graph.capture_modes import BatchNorm
from sluice.training.graph_walk import GraphWalk
from sluice.training.least_squares import Geometry, Misfit, NormalEquations, ridged
from sluice.training.train import Data, count_rows, in_order, on_device, split_batch

__all__ = ["INPUTS", "compensate"]

INPUTS = 1024
COLUMNS = 6000
_LAYERS = frozenset(["conv1d", "conv2d", "conv3d", "linear"])


@torch.no_grad()
def compensate(slim: fx.GraphModule, dense: fx.GraphModule, plan: Plan, data: Data, *, inputs: int = INPUTS) -> int:
    """Refit ``slim`` in place; how many layers were refitted.

    Args:
        slim: ``dense`` cut by ``plan``, its runs not merged yet (`rewrite_captured` with ``merged=False``).
        dense: the captured dense network; not changed.
        data: batches, of which the inputs of the first ``inputs`` examples count; labels are not looked at.
    """
    slim.eval(), dense.eval()
    batches = list(_inputs(data, slim, inputs))
    kept = {cut.param: torch.tensor(cut.keep) for cut in plan.slices if cut.axis == 0}
    edits = {first_name(edit.param): edit for edit in plan.factorizations}
    seconds = {second_name(edit.param): edit.param for edit in plan.factorizations}
    targets = {node.name: node for node in dense.graph.nodes}
    ours, theirs = GraphWalk(slim, batches), GraphWalk(dense, batches)
    done = 0
    for node in list(slim.graph.nodes):
        twin = targets.get(node.name)
        if node.op == "call_module" and isinstance(slim.get_submodule(str(node.target)), BatchNorm):
            if twin is not None:
                _renorm(slim, dense, node, twin, (ours, theirs), kept)
            continue
        name = _weight_of(slim, node)
        if name is None:
            continue
        if name in edits:
            done += _first_factor(slim, dense, node, edits[name], plan, ours)
        elif twin is not None and operator_name(twin) == operator_name(node):
            done += _refit(slim, node, twin, kept.get(seconds.get(name, name)), (ours, theirs))
    return done


def _inputs(data: Data, module: nn.Module, count: int) -> Iterable[tuple[Any, ...]]:
    for batch in data:
        inputs = on_device(split_batch(batch)[0], module)
        yield tuple(pytree.tree_leaves(in_order(module, inputs)))
        count -= count_rows(inputs)
        if count <= 0:
            return


def _weight_of(gm: fx.GraphModule, node: fx.Node) -> str | None:
    """The name of the weight of a layer that rule 5 lets refit; None for every other node."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    weight = arguments(node)["weight"] if operator_name(node) in _LAYERS else None
    if not isinstance(weight, fx.Node) or weight.op != "get_attr" or len(weight.users) != 1:
        return None
    tensor = gm.state_dict(keep_vars=True)[str(weight.target)]
    shared = sum(other.op == "get_attr" and other.target == weight.target for other in gm.graph.nodes) > 1
    return None if shared or tensor[0].numel() > COLUMNS else str(weight.target)


def _geometry(node: fx.Node, weight: Tensor) -> Geometry:
    a, dims = arguments(node), weight.ndim - 2
    if operator_name(node) == "linear":
        return Geometry()

    kernel, dilation = tuple(weight.shape[2:]), each_axis(a["dilation"], dims)
    if isinstance(a["padding"], str):  # in words; "same" puts the odd one behind
        total = [d * (k - 1) if a["padding"] == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
        padding = tuple((size // 2, size - size // 2) for size in total)
    else:
        padding = tuple((size, size) for size in each_axis(a["padding"], dims))
    return Geometry(kernel, each_axis(a["stride"], dims), padding, dilation, a["groups"])


def _source(node: fx.Node) -> fx.Node:
    source = arguments(node)["input"]
    assert isinstance(source, fx.Node)
    return source


def _along(twin_value: Tensor, kept: Tensor | None, linear: bool) -> Tensor:
    """The channels of the dense layer's output that stay."""
    return twin_value if kept is None else twin_value.index_select(-1 if linear else 1, kept.to(twin_value.device))


def _refit(
    slim: fx.GraphModule, node: fx.Node, twin: fx.Node, kept: Tensor | None, walks: tuple[GraphWalk, GraphWalk]
) -> int:
    """Rule 1; 1 if the layer was refitted."""
    a = arguments(node)
    weight = _tensor(slim, a["weight"])
    bias = None if a["bias"] is None else _tensor(slim, a["bias"])
    geometry, linear = _geometry(node, weight), operator_name(node) == "linear"
    equations = NormalEquations(geometry, centred=bias is not None or _is_normed(slim, node))
    try:
        for x, y in zip(walks[0].values(_source(node), moving=True), walks[1].values(twin, moving=True), strict=True):
            equations.add(_numbers(x), _numbers(_along(y, kept, linear)))
    except Misfit:  # rule 4
        return 0
    values, constant = equations.solve(_numbers(weight))
    if not np.isfinite(values).all():
        return 0
    weight.copy_(torch.from_numpy(values))
    if bias is not None:
        bias.copy_(torch.from_numpy(constant))
    return 1


def _first_factor(
    slim: fx.GraphModule, dense: fx.GraphModule, node: fx.Node, edit: Factorize, plan: Plan, walk: GraphWalk
) -> int:
    """Rule 2: both factors, of which the second is refitted when its turn comes; 1 if they were made."""
    a = arguments(node)
    first = _tensor(slim, a["weight"])
    second = slim.state_dict(keep_vars=True)[second_name(edit.param)]
    weight = dense.state_dict()[edit.param]
    for cut in (cut for cut in plan.slices if cut.param == edit.param):
        weight = weight.index_select(cut.axis, torch.tensor(cut.keep, device=weight.device))
    equations = NormalEquations(_geometry(node, first), centred=False)
    for x in walk.values(_source(node), moving=True):
        equations.add(_numbers(x), None)
    values, vectors = np.linalg.eigh(ridged(equations.covariance())[0])
    roots = np.sqrt(np.maximum(values, 1e-12 * float(values.max())))
    half, inverse = (vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T
    rows = matrix(_numbers(weight).astype(np.float64), edit.form)
    u, s, vt = np.linalg.svd(rows @ half, full_matrices=False)
    (r, *kernel), (n, _, *other) = factor_shapes(tuple(weight.shape), edit.form, edit.rank)
    root = np.sqrt(s[:r])
    right, left = root[:, None] * (vt[:r] @ inverse), u[:, :r] * root
    if not np.isfinite(right).all():
        return 0
    first.copy_(torch.from_numpy(right.reshape(r, *kernel)))
    second.copy_(torch.from_numpy(np.moveaxis(left.reshape(n, *other, r), -1, 1)))
    return 1


def _renorm(
    slim: fx.GraphModule, dense: fx.GraphModule, node: fx.Node, twin: fx.Node, walks: tuple[GraphWalk, GraphWalk],
    kept: Mapping[str, Tensor],
) -> None:  # fmt: skip
    """Rule 3."""
    own, known = slim.get_submodule(str(node.target)), dense.get_submodule(str(twin.target))
    assert isinstance(own, BatchNorm) and isinstance(known, BatchNorm)
    if own.running_mean is None or own.running_var is None or known.running_mean is None or known.running_var is None:
        return
    mine, others = _Moments(), _Moments()
    for x, y in zip(walks[0].values(node.args[0]), walks[1].values(twin.args[0]), strict=True):  # type: ignore[arg-type]
        mine.add(x)
        others.add(y)
    stays = kept.get(f"{twin.target}.running_mean")
    mean, variance = others.mean, others.variance
    if stays is not None:
        mean, variance = mean[stays], variance[stays]
    own.running_mean += (mine.mean - mean).to(own.running_mean)
    ratio = mine.variance / variance.clamp(min=1e-12)
    own.running_var *= torch.where(variance > 1e-12, ratio, torch.ones_like(ratio)).to(own.running_var)


class _Moments:
    """Mean and variance by channel, axis 1, streamed."""

    def __init__(self) -> None:
        self._count, self._sum, self._squares = 0, torch.zeros(()), torch.zeros(())

    def add(self, x: Tensor) -> None:
        rows = x.double().transpose(0, 1).reshape(x.shape[1], -1)
        self._count += rows.shape[1]
        self._sum = self._sum + rows.sum(1)
        self._squares = self._squares + (rows * rows).sum(1)

    @property
    def mean(self) -> Tensor:
        return self._sum / self._count

    @property
    def variance(self) -> Tensor:
        return (self._squares / self._count - self.mean**2).clamp(min=0.0)


def _is_normed(slim: fx.GraphModule, node: fx.Node) -> bool:
    """Whether batch norm, which takes a constant away, is the only reader."""
    readers = list(itertools.islice(node.users, 2))
    return (
        len(readers) == 1
        and readers[0].op == "call_module"
        and isinstance(slim.get_submodule(str(readers[0].target)), BatchNorm)
    )


def _numbers(tensor: Tensor) -> np.ndarray:
    return np.asarray(tensor.detach().cpu())


def _tensor(gm: fx.GraphModule, node: Any) -> Tensor:
    return gm.state_dict(keep_vars=True)[str(node.target)]
