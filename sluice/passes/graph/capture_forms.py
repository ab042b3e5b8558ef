"""Operators of a captured graph in simpler ones, so that fewer rules read them.

1. A pool to one position, of an input that lies channels last, is a mean. An exporter restores the strides of such a
   pool with a Gather by computed positions, which computes nothing, and which no reader could follow.
2. Variance and mean of one operator are two operators.
3. A batch norm of the statistics of its input alone, as some networks standardise their weights, is written out.
4. What is computed without gradients, or without mixed precision, stands in a graph of its own. It joins the graph
   around it; results without gradients are detached.
5. A normed weight is ``g / |v| * v``: it is zero where ``g`` is, and |v| a norm like any other.
6. Entries that are repeated one by one are expanded along an axis of their own, which then joins theirs.
7. Of real numbers ``mT``, ``mH`` and the adjoint of a matrix are its transpose.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode

from sluice.passes.graph.aten_walk import arguments, correction_of

__all__ = ["Writer", "inline", "write_out"]

aten = torch.ops.aten
_POOLS = {aten.adaptive_avg_pool1d.default: [-1], aten.adaptive_avg_pool2d.default: [-2, -1]}


class Writer:
    """Adds operators in front of a node, each with the example value that the analysis reads."""

    def __init__(self, node: fx.Node):
        self.node, self.graph = node, node.graph
        self.mode = detect_fake_mode([n.meta.get("val") for n in node.graph.nodes])

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        with self.graph.inserting_before(self.node):
            name = str(target).split(".")[1] if isinstance(target, torch._ops.OpOverload) else target.__name__
            new = self.graph.create_node("call_function", target, args, kwargs, name=name)
        values = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        with self.mode or nullcontext(), enable_python_dispatcher():
            new.meta = {**self.node.meta, "val": target(*values[0], **values[1])}
        return new

    def done(self, result: fx.Node) -> None:
        """``result`` takes the place of the node."""
        self.node.replace_all_uses_with(result)
        self.graph.erase_node(self.node)


def write_out(gm: fx.GraphModule) -> None:
    """In place."""
    for node in list(gm.graph.nodes):
        rule = _RULES.get(node.target) if node.op == "call_function" else None
        if rule is not None:
            rule(node)


def inline(gm: fx.GraphModule) -> None:
    """Rule 4, in place."""
    order = torch.ops.higher_order
    places = {order.wrap_with_set_grad_enabled: 1, order.wrap_with_autocast: 4}
    while node := next((n for n in gm.graph.nodes if n.target in places and _is_off(n)), None):
        place = places[node.target]
        holder, inputs = node.args[place], iter(node.args[place + 1 :])
        path = str(holder.target)
        env: dict[fx.Node, fx.Node] = {}
        with gm.graph.inserting_before(node):
            for inner in gm.get_submodule(path).graph.nodes:  # type: ignore[union-attr]
                if inner.op == "placeholder":
                    env[inner] = next(inputs)
                elif inner.op != "output":
                    env[inner] = gm.graph.node_copy(inner, env.__getitem__)
                    if inner.op in ("get_attr", "call_module"):
                        env[inner].target = f"{path}.{inner.target}"
        write = Writer(node)
        results = [env[result] if isinstance(result, fx.Node) else result for result in inner.args[0]]
        for reader in list(node.users):
            result = results[reader.args[1]]
            reader.replace_all_uses_with(write(aten.detach.default, result) if place == 1 else result)
            gm.graph.erase_node(reader)
        gm.graph.erase_node(node)
        if not holder.users:
            gm.graph.erase_node(holder)


def _is_off(node: fx.Node) -> bool:
    """Of gradients or mixed precision."""
    first = node.args[0] if node.target is torch.ops.higher_order.wrap_with_set_grad_enabled else node.args[2]
    return first is False and all(reader.target is operator.getitem for reader in node.users)


def _pool(node: fx.Node) -> None:
    if all(size == 1 for size in node.args[1]) and not node.args[0].meta["val"].is_contiguous():  # type: ignore[union-attr]
        node.target, node.args = aten.mean.dim, (node.args[0], _POOLS[node.target], True)


def _var_mean(node: fx.Node) -> None:
    a = arguments(node)
    if a["dim"] is None:
        return
    write = Writer(node)
    var = partial(write, aten.var.correction, a["self"], a["dim"], correction=correction_of(a), keepdim=a["keepdim"])
    mean = partial(write, aten.mean.dim, a["self"], a["dim"], a["keepdim"])
    for reader in list(node.users):  # one of the two parts
        reader.replace_all_uses_with((var, mean)[reader.args[1]]())  # type: ignore[index]
        node.graph.erase_node(reader)
    node.graph.erase_node(node)


def _batch_norm(node: fx.Node) -> None:
    x, weight, bias, mean, _, training, _, eps, _ = node.args
    if mean is not None or not training or not isinstance(x, fx.Node):
        return
    write, rank = Writer(node), x.meta["val"].ndim
    dims = [d for d in range(rank) if d != 1]
    centred = write(aten.sub.Tensor, x, write(aten.mean.dim, x, dims, True))
    spread = write(aten.var.correction, x, dims, correction=0, keepdim=True)
    result = write(aten.mul.Tensor, centred, write(aten.rsqrt.default, write(aten.add.Tensor, spread, eps)))
    shape = [-1 if d == 1 else 1 for d in range(1, rank)]
    if weight is not None:
        result = write(aten.mul.Tensor, result, write(aten.view.default, weight, shape))
    if bias is not None:
        result = write(aten.add.Tensor, result, write(aten.view.default, bias, shape))
    write.done(result)


def _weight_norm(node: fx.Node) -> None:
    v, g, dim = (*node.args, 0)[:3]
    write, rank = Writer(node), v.meta["val"].ndim  # type: ignore[union-attr]
    dims = [d for d in range(rank) if dim == -1 or d != dim % rank]
    size = write(aten.linalg_vector_norm.default, v, 2, dims, True)
    write.done(write(aten.mul.Tensor, write(aten.div.Tensor, g, size), v))


def _repeat(node: fx.Node) -> None:
    a = arguments(node)
    x, dim = a["self"], a["dim"]
    if dim is None or not isinstance(a["repeats"], int):
        return
    write, rank = Writer(node), x.meta["val"].ndim
    dim %= rank
    sizes = [a["repeats"] if d == dim + 1 else -1 for d in range(rank + 1)]
    expanded = write(aten.expand.default, write(aten.unsqueeze.default, x, dim + 1), sizes)
    write.done(write(aten.flatten.using_ints, expanded, dim, dim + 1))


def _transposed(node: fx.Node) -> None:
    x = node.args[0]
    if not x.meta["val"].is_complex():  # type: ignore[union-attr]
        node.target, node.args = aten.transpose.int, (x, -2, -1)


_RULES: dict[Any, Callable[[fx.Node], None]] = {
    **dict.fromkeys(_POOLS, _pool),
    aten.var_mean.correction: _var_mean,
    aten.var_mean.dim: _var_mean,
    aten.batch_norm.default: _batch_norm,
    aten._weight_norm.default: _weight_norm,
    aten.repeat_interleave.self_int: _repeat,
    **dict.fromkeys((aten.mT.default, aten.mH.default, aten.adjoint.default, aten.matrix_H.default), _transposed),
}
