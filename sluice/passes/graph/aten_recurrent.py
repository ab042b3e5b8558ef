"""ATen rules of recurrent layers.

A hidden unit j owns row j of every gate (4 in an LSTM, 3 in a GRU, 1 in a plain one), column j of the recurrent weight,
and entry j of the states. An operator has one initial state for all layers and directions, so all of them have one
width: unit j of one goes with unit j of the others. The outputs of both directions stand one behind the other.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import fx

from sluice.passes.graph.aten_walk import Args, Walk, operator_name, unknown, where
from sluice.passes.graph.coupling import FIXED, Layers, Value

__all__ = ["GATES", "cell", "lstm"]

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1, "lstm_cell": 4, "gru_cell": 3, "rnn_tanh_cell": 1, "rnn_relu_cell": 1}  # noqa: E501 # fmt: skip


def _unit(w: Walk, n: fx.Node, x: Layers, size: int, weights: list[Any], gates: int) -> Layers:
    """Couples one layer in one direction; returns its hidden units."""
    c, name = w.coupling, where(n, weights[0])
    w_ih, w_hh, *biases = weights
    hidden = w.of(w_hh)[1]
    rows = tuple(np.tile(layer, gates) for layer in hidden)
    c.match([(x, size), (w.of(w_ih)[1], size)], name, "reads a value whose size is fixed")
    for tensor in (w_ih, w_hh, *biases):
        c.produce(w.of(tensor)[0])
        c.unite(rows, w.of(tensor)[0], name)
    return hidden


def lstm(w: Walk, n: fx.Node, a: Args) -> Value:
    """``out, h, c`` of an LSTM, ``out, h`` of the others; axis 2 of all of them is the hidden width."""
    name, c = operator_name(n), w.coupling
    gates, params, states = GATES[name], list(a.get("params") or ()), a["hx"]
    states = list(states) if isinstance(states, (list, tuple)) else [states]
    sides, each = 2 if a["bidirectional"] else 1, 4 if a["has_biases"] else 2
    if len(params) != a["num_layers"] * sides * each or len(w.size(a["input"])) != 3:
        return unknown(w, n, a)
    (x, size), out = w.operand(a["input"]), FIXED
    into, width = x[2], size[2]
    for start in range(0, len(params), sides * each):
        weights = [params[start + k * each : start + (k + 1) * each] for k in range(sides)]
        units = [_unit(w, n, into, width, own, gates) for own in weights]
        for state in states:
            c.match([(w.of(state)[2], len(units[0][0])), *((u, len(u[0])) for u in units)], where(n, params[0]))
        into = tuple(np.concatenate(parts) for parts in zip(*units, strict=True)) if sides == 2 else units[0]
        width = sides * len(units[0][0])
        out = units[0]
    for d in (0, 1):
        c.freeze(x[d], f"{where(n)} runs along the labelled axis")
    state = (FIXED, FIXED, out)
    w.parts[n.name] = [(FIXED, FIXED, into), *([state] * len(states))]
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
