"""ONNX rules of attention and of recurrent layers; what they couple is told in the rules of the ATen front end.

An LSTM, GRU or RNN node is one layer in one direction or both. Its weights have the directions in front, so that unit j
of one direction goes with unit j of the other.
"""

from __future__ import annotations

import numpy as np

from sluice.passes.graph.coupling import FIXED, Value
from sluice.passes.graph.onnx_walk import Attributes, Node, OnnxWalk, entry, unknown

__all__ = ["GATES", "attention", "recurrent"]

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


def attention(w: OnnxWalk, n: Node, a: Attributes) -> Value:
    """Of four axes: batch, heads, positions, dimensions. Heads of k and v may serve several of q."""
    if len(w.shape[n.input[0]]) != 4 or any(n.input[4:]) or any(n.output[1:]):
        return unknown(w, n, a)
    mask = w.operand(n.input[3]) if entry(n, 3) else None
    q, k, v = (w.operand(n.input[i]) for i in range(3))
    return w.coupling.attend(q, k, v, mask, n.name)


def recurrent(w: OnnxWalk, n: Node, a: Attributes) -> Value:
    """``Y, Y_h, Y_c``: positions, directions, batch, hidden units; without the positions for the states."""
    c, name, gates = w.coupling, n.name, GATES[n.op_type]
    (x, size), (weight, _), (again, _) = (w.operand(n.input[i]) for i in range(3))
    if a.get("layout", 0) or a.get("clip") is not None or entry(n, 7) or entry(n, 4):
        return unknown(w, n, a)
    hidden, width = again[2], w.shape[n.input[2]][2]
    rows = tuple(np.tile(layer, gates) for layer in hidden)
    c.match([(x[2], size[2]), (weight[2], size[2])], name, "reads a value whose size is fixed")
    for value in (weight, again):
        c.produce(value[1])
        c.match([(rows, gates * width), (value[1], gates * width)], name)
    if entry(n, 3):
        bias = w.of(n.input[3])[1]
        c.produce(bias)
        c.match([(tuple(np.tile(row, 2) for row in rows), 2 * gates * width), (bias, 2 * gates * width)], name)
    for index in (5, 6):
        if state := entry(n, index):
            c.match([(w.of(state)[2], width), (hidden, width)], name)
    for d in (0, 1):
        c.freeze(x[d], f"{name} runs along the labelled axis")
    for index, out in enumerate(n.output):
        w.value[out] = (*(FIXED for _ in range(2 if index else 3)), hidden)
    return w.value[n.output[0]] if n.output[0] else ()
