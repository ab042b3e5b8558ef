"""ATen rules of recurrent layers.

A hidden unit j owns row j of every gate (4 in an LSTM, 3 in a GRU, 1 in a plain one), column j of the recurrent weight,
and entry j of the states. An operator has one initial state for all layers and directions, so all of them have one
width: unit j of one goes with unit j of the others. The outputs of both directions stand one behind the other. An LSTM
that projects its hidden units stays whole: torch knows it by states of two sizes, which a cut may make equal.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import fx

from sluice.passes.graph.aten_walk import Args, Walk, operator_name, unknown, where
from sluice.passes.graph.coupling import FIXED, Layers, Value

__all__ = ["GATES", "cell", "layer_weights", "lstm"]

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1, "lstm_cell": 4, "gru_cell": 3, "rnn_tanh_cell": 1, "rnn_relu_cell": 1}  # noqa: E501 # fmt: skip


def layer_weights(a: Args) -> list[list[list[Any]]]:
    """By layer and direction: input weight, recurrent weight, biases."""
    params, sides = list(a["params"]), 2 if a["bidirectional"] else 1
    each = len(params) // (a["num_layers"] * sides)
    sets = [params[start : start + each] for start in range(0, len(params), each)]
    return [sets[start : start + sides] for start in range(0, len(sets), sides)]


def _unit(w: Walk, n: fx.Node, x: Layers, size: int, weights: list[Any], gates: int) -> Layers:
    """Couples one layer in one direction; returns its hidden units."""
    c, name = w.coupling, where(n, weights[0])
    hidden = w.of(weights[1])[1]
    rows = tuple(np.tile(layer, gates) for layer in hidden)
    c.match([(x, size), (w.of(weights[0])[1], size)], name, "reads a value whose size is fixed")
    for tensor in weights:
        c.produce(w.of(tensor)[0])
        c.unite(rows, w.of(tensor)[0], name)
    return hidden


def lstm(w: Walk, n: fx.Node, a: Args) -> Value:
    """``out, h, c`` of an LSTM, ``out, h`` of the others; axis 2 of all of them is the hidden width."""
    gates, states = GATES[operator_name(n)], a["hx"]
    states = list(states) if isinstance(states, (list, tuple)) else [states]
    if "params" not in a or len(w.size(a["input"])) != 3:  # a packed sequence has another form
        return unknown(w, n, a)
    weights = layer_weights(a)
    if len(weights[0][0]) % 2:
        w.coupling.unknown([w.of(v) for v in n.all_input_nodes], f"{where(n)} projects its hidden units")
        return unknown(w, n, a)
    (x, size), hidden = w.operand(a["input"]), w.size(states[0])[2]
    into, width, units = x[2], size[2], [FIXED]
    for layer in weights:
        units = [_unit(w, n, into, width, each, gates) for each in layer]
        for state in states:
            w.coupling.match([(layers, hidden) for layers in (w.of(state)[2], *units)], where(n, layer[0][0]))
        into, width = w.coupling.side_by_side([(unit, hidden) for unit in units], where(n)), len(units) * hidden
    for d in (0, 1):
        w.coupling.freeze(x[d], f"{where(n)} runs along the labelled axis")
    w.parts[n.name] = [(FIXED, FIXED, into), *[(FIXED, FIXED, units[0])] * len(states)]
    return ()


def cell(w: Walk, n: fx.Node, a: Args) -> Value:
    """One step: the new states of an LSTM, the new state of the others."""
    (x, size), states = w.operand(a["input"]), a["hx"]
    states = list(states) if isinstance(states, (list, tuple)) else [states]
    weights = [a["w_ih"], a["w_hh"], *(a[key] for key in ("b_ih", "b_hh") if a.get(key) is not None)]
    unit = _unit(w, n, x[-1], size[-1], weights, GATES[operator_name(n)])
    for state in states:
        w.coupling.match([(w.of(state)[-1], len(unit[0])), (unit, len(unit[0]))], where(n, weights[0]))
    value = (*x[:-1], unit)
    if len(states) > 1:
        w.parts[n.name] = [value] * len(states)
        return ()
    return value
