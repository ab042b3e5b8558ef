"""A slim weight that is trained as the dense one seen through two matrices, and merged exactly afterwards.

    Ws = B + E W D

``W`` is the dense weight ``(o, i, *k)``. ``E`` ``(o', o)`` and ``D`` ``(i, i')`` begin as the selections of the kept
channels, ``B`` ``(o', i', *k)`` as what is missing to the slim weight: zero after a plain cut. All four are trained.
The layer runs at slim size; only the product of weights is extra. So channels that were cut still take part in
training, as directions, and a smaller rate does what plain weights need a large one for.

1. Only weights of two and more axes that the plan has narrowed have this form. Factors of factorised layers, weights
   that the model uses under two names, and weights that are not trained stay plain.
2. An axis of length 1 has no matrix: depthwise weights have ``E`` alone. Weights of grouped convolutions have the same
   ``D`` for all groups. That is sound, since ``Ws`` is evaluated as a whole, whatever the layer makes of it.
3. Whatever ``E`` and ``D`` select, ``B`` makes the start exact. Where a plan does not say what was kept, they select
   the first channels.

Source: Equivalent Pruning of Optimal Brain Connection (Chen et al. 2025, arXiv 2508.05521) and ExpandNets (Guo et al.
2020).
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from sluice.core.plan import Plan
from sluice.passes.graph.capture import clone

__all__ = ["merge_dense", "narrowed", "widened"]


class DenseProduct(nn.Module):
    """The parametrisation ``B -> B + E W D`` of one weight."""

    def __init__(self, dense: Tensor, rows: Tensor | None, columns: Tensor | None) -> None:
        super().__init__()
        self.dense = nn.Parameter(dense.detach().clone())
        self.rows = None if rows is None else nn.Parameter(rows)
        self.columns = None if columns is None else nn.Parameter(columns)

    def product(self) -> Tensor:
        """``E W D``, of the slim weight's shape."""
        weight: Tensor = self.dense
        if self.rows is not None:
            weight = torch.tensordot(self.rows, weight, dims=1)
        if self.columns is not None:
            weight = torch.tensordot(weight, self.columns, dims=([1], [0])).movedim(-1, 1)
        return weight

    def forward(self, rest: Tensor) -> Tensor:
        return rest + self.product()

    def right_inverse(self, slim: Tensor) -> Tensor:
        return slim - self.product()


def narrowed(slim: nn.Module, dense: nn.Module) -> list[str]:
    """Names of the weights that have the form, rule 1."""
    wide, names = dict(dense.named_parameters(remove_duplicate=False)), []
    own = dict(slim.named_parameters(remove_duplicate=False))
    uses = Counter(id(tensor) for tensor in own.values())
    for name, tensor in own.items():
        full = wide.get(name)
        if full is None or full.ndim != tensor.ndim or tensor.ndim < 2 or full.shape[2:] != tensor.shape[2:]:
            continue
        fewer = [a < b for a, b in zip(tensor.shape[:2], full.shape[:2], strict=True)]
        wider = [a > b for a, b in zip(tensor.shape[:2], full.shape[:2], strict=True)]
        if any(fewer) and not any(wider) and tensor.requires_grad and uses[id(tensor)] == 1:
            names.append(name)
    return names


def widened(slim: fx.GraphModule, dense: nn.Module, plan: Plan) -> fx.GraphModule:
    """A copy of ``slim`` whose narrowed weights have the form; the same function, and the slim network is untouched.

    Args:
        slim: cut by ``plan``, its runs unmerged.
        dense: the network that was cut, with the weights it was cut with.
    """
    kept = {(cut.param, cut.axis): cut.keep for cut in plan.slices}
    wide, made = dict(dense.named_parameters(remove_duplicate=False)), clone(slim)
    for name in narrowed(slim, dense):
        path, _, leaf = name.rpartition(".")
        owner = made.get_submodule(path)
        weight, full = getattr(owner, leaf), wide[name].detach()
        rows, columns = (_selection(kept.get((name, axis)), full, weight, axis) for axis in (0, 1))
        form = DenseProduct(full.to(weight), None if rows is None else rows.T.contiguous(), columns)
        with torch.no_grad():
            parametrize.register_parametrization(owner, leaf, form)
    return made


def merge_dense(wide: fx.GraphModule, slim: fx.GraphModule) -> None:
    """Copy parameters and buffers of a trained copy into ``slim``, in place, every form evaluated once."""
    with torch.no_grad():
        for name, tensor in slim.state_dict(keep_vars=True).items():
            tensor.copy_(operator.attrgetter(name)(wide))


def _selection(keep: Sequence[int] | None, full: Tensor, slim: Tensor, axis: int) -> Tensor | None:
    """(dense length, slim length) of one axis; None where the axis has length 1."""
    before, after = full.shape[axis], slim.shape[axis]
    if before == 1:
        return None
    chosen = keep if keep is not None and len(keep) == after else range(after)
    return torch.eye(before, device=slim.device, dtype=slim.dtype)[:, list(chosen)].contiguous()
