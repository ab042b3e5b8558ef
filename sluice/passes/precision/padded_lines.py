"""Paddings in front of convolutions along one line, written where ONNX Runtime's CPU kernels run faster with them.

1. The kernel of convolutions in blocks of channels computes up to six neighbours of an output row at once, and each of
   them reads the weights only once. Outputs that read padding it computes one by one. A map of one column has rows of
   one output, so all of its outputs are computed one by one. It is taken for one row only if the kernel is as wide as
   the map, strides and dilations are 1, and nothing is padded.
2. So a convolution along a line, a column or a row, is up to five times as fast if its input was padded before. What it
   costs: the multiplications by zeros that the kernel leaves out otherwise, a copy, and two changes of the layout.
3. The padding is written where one half of the taps or more fall on the map, a quarter of the outputs or more are
   computed one by one otherwise, and the line has at least `LINE` outputs. Maps with more rows and columns keep it in
   the convolution: their rows stay rows, and they have few outputs at the border.
4. ONNX Runtime puts a padding by a constant back into the convolution. It does not if the operator's value is left
   empty, which stands for zero as well.
5. One line is one task of a thread, so this is for one thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper

from sluice.core.errors import SluiceError
from sluice.passes.graph.onnx_graph import OnnxGraph, attributes, with_batch

__all__ = ["with_padded_lines"]

LINE = 16
VALID, ALONE = 0.5, 0.25
LEAST_OPSET = 11  # from here on paddings are an input of the operator


@dataclass(frozen=True, slots=True, eq=False)
class Padded:
    """A padded convolution: what is padded, the operator that pads it, if any, and its settings for rows and columns.

    ``pads`` are all zeros in front of rows and columns, then those behind them.
    """

    source: str
    before: onnx.NodeProto | None
    kernel: Sequence[int]
    strides: Sequence[int]
    dilations: Sequence[int]
    pads: Sequence[int]


def with_padded_lines(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with the paddings of rule 3 as operators; itself if there are none.

    The sizes of maps are those that follow from the model's inputs. Outputs stay the same but for rounding.
    """
    opset = max((one.version for one in model.opset_import if one.domain in ("", "ai.onnx")), default=0)
    read = OnnxGraph(model)
    found = {k: padded for k, node in enumerate(model.graph.node) if (padded := _padded(read, node)) is not None}
    if not found or opset < LEAST_OPSET:
        return model
    try:
        shapes = OnnxGraph(with_batch(model, 1)).shapes
    except SluiceError:  # the runtime may know more of the graph than inference does
        return model
    chosen = {k: one for k, one in found.items() if one.source in shapes and _pays(shapes[one.source][2:], one)}
    return _written(model, read, chosen) if chosen else model


def _pays(size: Sequence[int], conv: Padded) -> bool:
    """Rules 1 and 3, for a map of so many rows and columns."""
    axes = zip(size, conv.kernel, conv.strides, conv.dilations, conv.pads[:2], conv.pads[2:], strict=True)
    taps = [
        np.arange(0, n + front + back - d * (k - 1), s)[:, None] + d * np.arange(k) - front
        for n, k, s, d, front, back in axes
    ]
    rows, columns = ((at >= 0) & (at < n) for at, n in zip(taps, size, strict=True))
    outputs = len(rows) * len(columns)
    if outputs < LINE or rows.mean() * columns.mean() < VALID:
        return False
    if conv.kernel[1] == size[1] and not (conv.pads[1] or conv.pads[3]):
        return {*conv.strides, *conv.dilations} == {1}
    if conv.kernel[0] == size[0] == 1 and not (conv.pads[0] or conv.pads[2]):
        return bool(columns.all(axis=1).mean() <= 1.0 - ALONE)
    return False


def _padded(read: OnnxGraph, node: onnx.NodeProto) -> Padded | None:
    """A convolution of two axes, one of them padded, by the convolution or by an operator before it."""
    weight = read.initializers.get(node.input[1]) if node.op_type == "Conv" else None
    given = attributes(node)
    if weight is None or len(weight.dims) != 4 or given.get("group", 1) != 1:
        return None
    if given.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        return None
    pads, before = list(given.get("pads", [0] * 4)), _padding(read, node)
    if before is not None and before.input[2:] == [""] and not any(pads):
        return None  # written before
    if before is not None:
        more = np.asarray(read.array(before.input[1])).reshape(-1).tolist()
        if len(more) != 8 or any(more[k] for k in (0, 1, 4, 5)) or min(more) < 0:
            return None
        pads = [own + other for own, other in zip(pads, more[2:4] + more[6:], strict=True)]
    if bool(pads[0] or pads[2]) == bool(pads[1] or pads[3]):
        return None
    source, kernel = (node if before is None else before).input[0], list(weight.dims[2:])
    strides, dilations = (list(given.get(key, [1, 1])) for key in ("strides", "dilations"))
    return Padded(source, before, kernel, strides, dilations, pads)


def _padding(read: OnnxGraph, node: onnx.NodeProto) -> onnx.NodeProto | None:
    """The padding by constant zeros that only this convolution reads."""
    before = read.producers.get(node.input[0])
    if before is None or before.op_type != "Pad" or read.uses(node.input[0]) != 1 or len(before.input) < 2:
        return None
    value = read.array(before.input[2]) if any(before.input[2:3]) else np.zeros(1)
    constant = attributes(before).get("mode", b"constant") == b"constant" and not any(before.input[3:])
    known = read.array(before.input[1]) is not None and value is not None and not np.any(value)
    return before if constant and known else None


def _written(model: onnx.ModelProto, read: OnnxGraph, chosen: dict[int, Padded]) -> onnx.ModelProto:
    """A copy in which these convolutions, by index, read a padded input (rule 4)."""
    gone = {one.before.output[0]: one.before.input[1:] for one in chosen.values() if one.before is not None}
    done, nodes = onnx.ModelProto(), onnx.GraphProto().node
    done.CopyFrom(model)
    for k, node in enumerate(model.graph.node):
        if gone.keys() & set(node.output):
            continue
        if k not in chosen:
            nodes.append(node)
            continue
        pads = chosen[k].pads
        sizes, padded = (read.fresh(f"{node.output[0]}.{stem}") for stem in ("pads", "padded"))
        values = np.array([0, 0, *pads[:2], 0, 0, *pads[2:]], np.int64)
        done.graph.initializer.append(numpy_helper.from_array(values, sizes))
        nodes.append(helper.make_node("Pad", [chosen[k].source, sizes, ""], [padded], name=padded))
        conv = nodes.add()
        conv.CopyFrom(node)
        conv.input[0] = padded
        del conv.attribute[:]
        conv.attribute.extend(one for one in node.attribute if one.name not in ("pads", "auto_pad"))
    del done.graph.node[:]
    done.graph.node.extend(nodes)
    unread = {name for names in gone.values() for name in names} - {name for node in nodes for name in node.input}
    for init in [init for init in done.graph.initializer if init.name in unread]:
        done.graph.initializer.remove(init)
    return done
