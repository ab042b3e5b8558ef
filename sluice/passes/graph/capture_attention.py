"""Scaled dot-product attention written out: products of matrices, a softmax, and a mask between them.

    softmax(scale q k^T + mask) v

A boolean mask says which positions are seen. Others get the least number before the softmax and 0 behind it, so that a
row that sees nothing is 0, as the operator has it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from sluice.passes.graph.aten_walk import arguments
from sluice.passes.graph.capture_forms import Writer

__all__ = ["SDPA", "can_be_written", "write_attention"]

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default


def can_be_written(node: fx.Node) -> bool:
    """Not where several heads of q share one of k and v, or where a causal mask has no size of its own."""
    a = arguments(node)
    q, k = (a[name].meta["val"].shape for name in ("query", "key"))
    shared = a["enable_gqa"] and q[-3] != k[-3]
    return not shared and not (a["is_causal"] and not (isinstance(q[-2], int) and isinstance(k[-2], int)))


def write_attention(node: fx.Node) -> None:
    """In place."""
    write, a = Writer(node), arguments(node)
    q, k, v = (a[name] for name in ("query", "key", "value"))
    value = q.meta["val"]
    scale = a["scale"] if a["scale"] is not None else 1.0 / math.sqrt(value.shape[-1])
    scores = write(aten.matmul.default, write(aten.mul.Tensor, q, scale), write(aten.transpose.int, k, -2, -1))
    mask, hidden = _mask(write, a), None
    if mask is not None and mask.meta["val"].dtype is torch.bool:
        hidden = write(aten.logical_not.default, mask)
        scores = write(aten.masked_fill.Scalar, scores, hidden, torch.finfo(value.dtype).min)
    elif mask is not None:
        scores = write(aten.add.Tensor, scores, mask)
    weights = write(aten.softmax.int, scores, -1)
    if hidden is not None:
        weights = write(aten.masked_fill.Scalar, weights, hidden, 0.0)
    write.done(write(aten.matmul.default, weights, v))


def _mask(write: Writer, a: Mapping[str, Any]) -> Any:
    if not a["is_causal"]:
        return a["attn_mask"]
    q = a["query"].meta["val"]
    sizes = [q.shape[-2], a["key"].meta["val"].shape[-2]]
    return write(aten.tril.default, write(aten.ones.default, sizes, dtype=torch.bool, device=q.device))
