"""Stacked recurrent layers of a captured graph, one operator per layer, so that each may have a width of its own.

1. An operator of L layers has one initial state for all of them, so all have one width. As L operators in a row they
   are the same function, weights and names included.
2. Dropout between layers is an operator between two of them, which works in training as any other does. The operators
   themselves drop nothing, so that they may be told that they train: a GPU refuses a gradient otherwise.
3. States that start as a constant start as one constant per layer. States that the network computes are sliced, which
   ties the widths again, and so does whoever reads the last states of all layers at once.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from sluice.passes.graph.aten_recurrent import layer_weights
from sluice.passes.graph.aten_walk import arguments
from sluice.passes.graph.capture_forms import Writer

__all__ = ["split_layers"]

aten = torch.ops.aten
_STACKED = (aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input)
_CONSTANT = (aten.zeros.default, aten.ones.default, aten.full.default)
_CONSTANT_LIKE = (aten.new_zeros.default, aten.new_ones.default, aten.new_full.default)


def split_layers(gm: fx.GraphModule) -> None:
    """In place."""
    for node in list(gm.graph.nodes):
        if node.op == "call_function" and node.target in _STACKED:
            a = arguments(node)
            if node.args[0].meta["val"].ndim != 3 or len(layer_weights(a)[0][0]) % 2:
                continue  # without a batch, or with a projection: it stays as it is
            if a["num_layers"] > 1 and all(reader.target is operator.getitem for reader in node.users):
                _split(node, a)
            else:
                node.args = (*node.args[:5], 0.0, True, *node.args[7:])
    gm.graph.eliminate_dead_code()


def _split(node: fx.Node, a: dict[str, Any]) -> None:
    write, layers = Writer(node), layer_weights(a)
    sides, pair = len(layers[0]), isinstance(a["hx"], (list, tuple))
    x, ends = a["input"], list[Sequence[fx.Node]]()
    for index, layer in enumerate(layers):
        if index and a["dropout"]:
            x = write(aten.dropout.default, x, a["dropout"], False)
        start = [_part(write, state, index * sides, sides) for state in (a["hx"] if pair else [a["hx"]])]
        weights = [weight for side in layer for weight in side]
        rest = (a["has_biases"], 1, 0.0, True, a["bidirectional"], a["batch_first"])
        made = write(node.target, x, start if pair else start[0], weights, *rest)
        x = write(operator.getitem, made, 0)
        ends.append([write(operator.getitem, made, k + 1) for k in range(len(start))])
    for reader in list(node.users):
        which = reader.args[1]
        assert isinstance(which, int)
        if which == 0:
            reader.replace_all_uses_with(x)
        for user in list(reader.users) if which else ():
            if user.target is aten.select.int and user.args[1] == 0:
                place = user.args[2]
                assert isinstance(place, int)
                index, side = divmod(place % (len(layers) * sides), sides)
                user.args = (ends[index][which - 1], 0, side)
        if reader.users:
            reader.replace_all_uses_with(write(aten.cat.default, [states[which - 1] for states in ends], 0))
        node.graph.erase_node(reader)
    node.graph.erase_node(node)


def _part(write: Writer, state: fx.Node, start: int, count: int) -> fx.Node:
    """The initial state of one layer."""
    place = 0 if state.target in _CONSTANT else 1 if state.target in _CONSTANT_LIKE else None
    if place is None:
        return write(aten.slice.Tensor, state, 0, start, start + count)
    args = list(state.args)
    args[place] = [count, *args[place][1:]]  # type: ignore[index,misc]
    return write(state.target, *args, **state.kwargs)
