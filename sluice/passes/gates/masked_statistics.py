"""Norms, means and sums whose statistics are weighted by a mask over the channels that they run over.

With a mask m of zeros and ones they are those of the kept channels, as the network that is cut computes them:

    mean = sum(m x) / sum(m),   var = sum(m (x - mean)^2) / (sum(m) - correction),   |x|_p = sum(m |x|^p)^(1/p).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from sluice.passes.graph.aten_walk import arguments, correction_of, operator_name, reduced

__all__ = ["TAG", "mask_norm", "masked_norm", "masked_statistic", "unmask_norm"]

TAG = "sluice_gate"
_LEAST = 1e-6  # of a sum of masks that divides


def masked_norm(
    x: Tensor,
    mask: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    dims: list[int],
    groups: int,
    eps: float,
    centred: bool = True,
) -> Tensor:
    """Layer norm (``groups == 0``), group norm, or RMS norm (not ``centred``) of statistics over ``dims``.

    ``mask`` broadcasts against x.
    """
    shape, dtype = x.shape, x.dtype
    mask = mask.to(torch.promote_types(dtype, torch.float32))  # half precision would lose the statistics
    if groups:
        x = x.reshape(shape[0], groups, -1, *shape[2:])
        mask = mask.reshape(1, groups, -1, *[1] * (len(shape) - 2))
    m = mask.expand(x.shape)
    total = m.sum(dims, keepdim=True).clamp(min=_LEAST)
    mean = (m * x).sum(dims, keepdim=True) / total if centred else 0.0
    var = (m * (x - mean) ** 2).sum(dims, keepdim=True) / total
    x = ((x - mean) * torch.rsqrt(var + eps)).reshape(shape)
    tail = [1] * (len(shape) - 2) if groups else []
    x = x if weight is None else x * weight.reshape(*weight.shape, *tail)
    x = x if bias is None else x + bias.reshape(*bias.shape, *tail)
    return x.to(dtype)


def masked_statistic(
    x: Tensor, mask: Tensor, kind: str, dims: list[int], keepdim: bool, correction: float, order: float
) -> Tensor:
    """``kind`` is mean, sum, var, std or norm; ``mask`` broadcasts against x."""
    dtype = x.dtype
    m = mask.to(torch.promote_types(dtype, torch.float32)).expand(x.shape)
    if kind == "norm":
        return (m * x.abs() ** order).sum(dims, keepdim=keepdim).pow(1.0 / order).to(dtype)
    total = m.sum(dims, keepdim=True)
    found = (m * x).sum(dims, keepdim=True)
    if kind != "sum":
        found = found / total.clamp(min=_LEAST)
    if kind in ("var", "std"):
        found = (m * (x - found) ** 2).sum(dims, keepdim=True) / (total - correction).clamp(min=_LEAST)
        found = found.sqrt() if kind == "std" else found
    return (found if keepdim else found.squeeze(dims)).to(dtype)


def mask_norm(gm: fx.GraphModule, node: fx.Node, vectors: Mapping[int, fx.Node], rank: int) -> fx.Node:
    """Replace a node by one with masked statistics.

    Args:
        vectors: by axis of the operand that the statistics are taken of its mask.
        rank: of that operand.
    """
    a, kind = arguments(node), operator_name(node)
    with gm.graph.inserting_before(node):
        masks = [
            gm.graph.call_function(torch.ops.aten.view.default, (v, [-1 if i == dim else 1 for i in range(rank)]))
            for dim, v in vectors.items()
        ]
        mask = masks[0]
        for other in masks[1:]:
            mask = gm.graph.call_function(torch.ops.aten.mul.Tensor, (mask, other))
            masks.append(mask)
        new = gm.graph.call_function(*_masked(kind, a, mask, rank))
    for own in masks:
        own.meta = {TAG: "mask"}
    new.meta = {"val": node.meta["val"], TAG: "norm", "original": a, "operator": node.target, "name": node.name}
    node.replace_all_uses_with(new)
    gm.graph.erase_node(node)
    return new


def _masked(kind: str, a: Mapping[str, Any], mask: fx.Node, rank: int) -> tuple[Any, tuple[Any, ...]]:
    """The function that stands for an operator, and its arguments."""
    if "self" in a:
        dims, order = reduced(a, rank), a.get("ord", a.get("p", 2))
        kind = "norm" if "norm" in kind else kind
        keepdim, order = bool(a.get("keepdim")), 2.0 if order is None else float(order)
        return masked_statistic, (a["self"], mask, kind, dims, keepdim, correction_of(a), order)
    grouped, rms = kind == "group_norm", kind == "rms_norm"
    dims = list(range(2, rank + 1)) if grouped else list(range(rank - len(a["normalized_shape"]), rank))
    eps = torch.finfo(a["input"].meta["val"].dtype).eps if a["eps"] is None else a["eps"]
    affine = (a["weight"], a.get("bias"))
    return masked_norm, (a["input"], mask, *affine, dims, a["num_groups"] if grouped else 0, eps, not rms)


def unmask_norm(gm: fx.GraphModule, node: fx.Node) -> None:
    """Put the operator back that `mask_norm` replaced, with the operands that ``node`` has by now."""
    a, target = dict(node.meta["original"]), node.meta["operator"]
    if node.target is masked_statistic:
        a["self"] = node.args[0]
    else:
        now = {"input": node.args[0], "weight": node.args[2], "bias": node.args[3]}
        a |= {name: value for name, value in now.items() if name in a}
    named = {arg.name for arg in target._schema.arguments if arg.kwarg_only}
    given = {name: a[name] for name in named if a[name] is not None}
    with gm.graph.inserting_before(node):
        new = gm.graph.call_function(target, tuple(v for name, v in a.items() if name not in named), given)
    new.meta = {"val": node.meta["val"]}
    new._rename(node.meta["name"])
    node.replace_all_uses_with(new)
    gm.graph.erase_node(node)
