"""Networks over one axis written as maps of one row, since ONNX Runtime has blocked CPU kernels for maps alone.

1. ONNX Runtime lays tensors (N, C, H, W) out in blocks of channels and computes convolutions, pools and what is between
   them in these blocks. It does so for no tensor (N, C, L): there it unrolls every window and multiplies matrices.
2. (N, C, L) and (N, C, 1, L) hold the same numbers in the same order. So a weight (O, I, K) becomes (O, I, 1, K), and
   strides, dilations and paddings get those of one row: 1, 1 and none. Operators element by element stay as they are.
3. It is a row, not a column: the kernels compute up to six neighbours of a row at once, and the outputs of a column one
   by one.
4. A *region* is a largest connected set of operators on (N, C, L) with such a form. One ``Unsqueeze`` at each of its
   entries and one ``Squeeze`` at each of its exits change the shape. A region stays if it has no convolution, or one
   alone of one tap, or of groups of several channels: the kernels gain next to nothing there, and the changes of shape
   and layout cost a microsecond.
5. Weights keep their names. An operator is left out if another one that is left out reads a constant of it, since that
   one wants the old shape.
6. The border of a piece inside a region is a row, as it is in the network: nothing is added there. A piece cannot see
   how large its region is, so one convolution is enough. The sources of a piece (one channel, one tap) are none, unless
   there is nothing else: an addition between matrix products is no part of a region because its operand has a source.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, MutableSequence, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper

from sluice.passes.graph.onnx_graph import OnnxGraph, attributes

__all__ = ["with_lines_as_rows"]

LEAST_OPSET = 13  # from here on axes are an input of Squeeze and Unsqueeze
AXIS = 2
WINDOWS = frozenset({"Conv", "MaxPool", "AveragePool"})
OVER_CHANNELS = frozenset({"BatchNormalization", "GlobalAveragePool", "GlobalMaxPool"})
UNARY = frozenset({"Relu", "Clip", "LeakyRelu", "Elu", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish", "Erf", "Gelu"})
KEEPING = UNARY | OVER_CHANNELS | {"Pad", "Concat"}  # the rank of their first input
BINARY = frozenset({"Add", "Sub", "Mul", "Div"})
PER_AXIS = ("kernel_shape", "strides", "dilations")


def with_lines_as_rows(model: onnx.ModelProto, *, part: bool = False) -> onnx.ModelProto:
    """The model with its regions (rule 4) as maps of one row; itself if there are none. Lengths may be open.

    Args:
        part: the model is a piece. An input or output at which a region begins or ends is (N, C, 1, L) then (rule 6).
    """
    opset = max((one.version for one in model.opset_import if one.domain in ("", "ai.onnx")), default=0)
    if opset < LEAST_OPSET:
        return model
    read = OnnxGraph(model)
    lines = _lines(read)
    members = _members(read, lines, part)
    return _written(model, read, members, _borders(read, lines, members, part)) if members else model


def _lines(read: OnnxGraph) -> set[str]:
    """Activations (N, C, L), as far as the file tells and operators show."""
    lines = {name for name, info in read.infos.items() if len(info.type.tensor_type.shape.dim) == 3}
    lines -= read.initializers.keys()
    for node in read.graph.node:
        first, kind = set(node.input[:1]), node.op_type
        if kind in WINDOWS and _window(read, node):
            lines |= {*first, node.output[0]}
        elif _operands(read, node, lines) if kind in BINARY else kind in KEEPING and first <= lines:
            lines.add(node.output[0])
    return lines


def _window(read: OnnxGraph, node: onnx.NodeProto) -> bool:
    """A convolution with a constant weight, or a pool, along one axis."""
    if node.op_type == "Conv":
        weight = read.initializers.get(node.input[1])
        return weight is not None and len(weight.dims) == 3
    return len(attributes(node).get("kernel_shape", ())) == 1 and len(node.output) == 1


def _operands(read: OnnxGraph, node: onnx.NodeProto, lines: Collection[str]) -> bool:
    """Every operand is a line, or a constant that spreads over one; one of them is a line."""
    for name in node.input:
        array = None if name in lines else read.array(name)
        if name not in lines and (array is None or array.ndim > 3):
            return False
        if array is not None and array.ndim > 1 and name not in read.initializers:
            return False
    return any(name in lines for name in node.input)


def _has_form(read: OnnxGraph, node: onnx.NodeProto, lines: Collection[str]) -> bool:
    """Does the operator have a form on a row (rule 2)?"""
    kind, given = node.op_type, attributes(node)
    if node.domain not in ("", "ai.onnx") or not node.input or (node.input[0] not in lines and kind not in BINARY):
        return False
    if kind in WINDOWS:
        return _window(read, node)
    if kind == "BatchNormalization":
        return len(node.output) == 1 and not given.get("training_mode", 0)
    if kind == "Concat":
        return all(name in lines for name in node.input)
    if kind == "Pad":
        sizes = read.array(node.input[1])
        return sizes is not None and sizes.size == 6 and not any(node.input[3:])
    return kind in UNARY or kind in OVER_CHANNELS or (kind in BINARY and _operands(read, node, lines))


def _shaped(read: OnnxGraph, node: onnx.NodeProto) -> list[str]:
    """The constants that an operator of a region has with one more axis."""
    if node.op_type == "Conv":
        return [node.input[1]]
    given = node.input if node.op_type in BINARY else ()
    return [name for name in given if name in read.initializers and len(read.initializers[name].dims) > 1]


def _members(read: OnnxGraph, lines: Collection[str], part: bool) -> dict[str, onnx.NodeProto]:
    """The operators of all regions, by their first output (rules 4 and 5)."""
    found = {node.output[0]: node for node in read.graph.node if _has_form(read, node, lines)}
    while True:
        kept = {name: node for region in _regions(read, found, lines, part) for name, node in region.items()}
        for name, node in list(kept.items()):
            for constant in _shaped(read, node):
                if constant in read.outputs or any(r.output[0] not in kept for r in read.readers[constant]):
                    kept.pop(name, None)
        if len(kept) == len(found):
            return found
        found = kept


def _regions(
    read: OnnxGraph, found: Mapping[str, onnx.NodeProto], lines: Collection[str], part: bool
) -> Iterator[dict[str, onnx.NodeProto]]:
    """The connected sets of operators that pay (rule 4)."""
    touching: dict[str, list[str]] = {}
    for name, node in found.items():
        for value in (*node.input, name):
            if value in lines:
                touching.setdefault(value, []).append(name)
    left = set(found)
    while left:
        region, reached = set(), {min(left)}
        while reached:
            region |= reached
            values = {value for name in reached for value in (*found[name].input, name) if value in touching}
            reached = {name for value in values for name in touching[value]} - region
        left -= region
        convs = [found[name] for name in region if found[name].op_type == "Conv"]
        whole = len(region) == len(read.graph.node)
        if _is_layered(read, convs, whole) if part else _pays(read, convs):
            yield {name: found[name] for name in region}


def _pays(read: OnnxGraph, convs: Sequence[onnx.NodeProto]) -> bool:
    """Rule 4, for the convolutions of a region."""
    if len(convs) != 1:
        return len(convs) > 1
    weight, groups = read.initializers[convs[0].input[1]].dims, attributes(convs[0]).get("group", 1)
    return bool(weight[2] > 1 and (groups == 1 or weight[1] == 1))


def _is_layered(read: OnnxGraph, convs: Sequence[onnx.NodeProto], whole: bool) -> bool:
    """Rule 6: a piece has a convolution of more than one channel and tap, or is a ``whole`` region."""
    weights = [read.initializers[conv.input[1]].dims for conv in convs]
    return any(whole or weight[1] * weight[2] > 1 for weight in weights)


@dataclass(frozen=True, slots=True)
class _Borders:
    """The values of regions: all, those that others write, those that others read, and borders that are rows."""

    inside: Collection[str]
    entries: Collection[str]
    exits: Collection[str]
    bare: Collection[str]


def _borders(read: OnnxGraph, lines: Collection[str], members: Mapping[str, onnx.NodeProto], part: bool) -> _Borders:
    inside = {value for node in members.values() for value in (*node.input, *node.output) if value in lines}
    shared = {v for v in inside if any(reader.output[0] not in members for reader in read.readers.get(v, ()))}
    made = {v for v in inside if v in members}
    bare = {v for v in inside - shared if part and (v in read.outputs) == (v in made)}
    bare = {v for v in bare if v in read.outputs or v in read.inputs}
    exits = {v for v in made - bare if v in shared or v in read.outputs}
    return _Borders(inside, inside - made - bare, exits, bare)


def _written(
    model: onnx.ModelProto, read: OnnxGraph, members: Mapping[str, onnx.NodeProto], borders: _Borders
) -> onnx.ModelProto:
    """A copy in which the members compute on rows; values keep their names, at borders the lines do."""
    done, nodes, weights = onnx.ModelProto(), onnx.GraphProto().node, onnx.GraphProto().initializer
    done.CopyFrom(model)
    rows = {v: read.fresh(f"{v}.row") for v in sorted({*borders.entries, *borders.exits})}
    axes = read.fresh("row.axes")
    weights.append(numpy_helper.from_array(np.array([AXIS], np.int64), axes))
    entered: set[str] = set()
    for node in model.graph.node:
        if node.output[0] not in members:
            nodes.append(node)
            continue
        for value in node.input:
            if value in borders.entries and value not in entered:
                entered.add(value)
                nodes.append(helper.make_node("Unsqueeze", [value, axes], [rows[value]], name=rows[value]))
        own = nodes.add()
        own.CopyFrom(_on_row(read, node, weights))
        own.input[:] = [rows.get(value, value) for value in own.input]
        own.output[:] = [rows.get(value, value) for value in own.output]
        for value in node.output:
            if value in borders.exits:
                nodes.append(helper.make_node("Squeeze", [rows[value], axes], [value], name=f"{rows[value]}.squeeze"))
    del done.graph.node[:]
    done.graph.node.extend(nodes)
    shaped = {name for node in members.values() for name in _shaped(read, node)}
    for init in done.graph.initializer:
        if init.name in shaped:
            init.dims[:] = _with_row(init.dims)
    done.graph.initializer.extend(weights)
    changed = (shaped | set(borders.inside)) - rows.keys()
    for info in (*done.graph.input, *done.graph.output, *done.graph.value_info):
        if info.name in changed and info.type.tensor_type.HasField("shape"):
            dims = info.type.tensor_type.shape.dim
            dims.insert(len(dims) - 1, onnx.TensorShapeProto.Dimension(dim_value=1))
    _drop_unread(done, read, members)
    return done


def _on_row(read: OnnxGraph, node: onnx.NodeProto, weights: MutableSequence[onnx.TensorProto]) -> onnx.NodeProto:
    """The operator in its form on a row (rule 2); ``weights`` gets the new sizes of a padding."""
    done = onnx.NodeProto()
    done.CopyFrom(node)
    for attribute in done.attribute:
        if node.op_type in WINDOWS and attribute.name in PER_AXIS:
            attribute.ints[:] = [1, *attribute.ints]
        elif node.op_type in WINDOWS and attribute.name == "pads":
            attribute.ints[:] = [0, attribute.ints[0], 0, attribute.ints[1]]
        elif node.op_type == "Concat":
            attribute.i = (0, 1, AXIS + 1)[attribute.i]
    if node.op_type == "Pad":
        sizes = np.asarray(read.array(node.input[1])).reshape(2, 3)
        done.input[1] = read.fresh(f"{node.output[0]}.pads")
        weights.append(numpy_helper.from_array(np.insert(sizes, AXIS, 0, axis=1).reshape(-1), done.input[1]))
    return done


def _with_row(dims: Sequence[int]) -> list[int]:
    return [*dims[:-1], 1, dims[-1]]


def _drop_unread(done: onnx.ModelProto, read: OnnxGraph, members: Mapping[str, onnx.NodeProto]) -> None:
    """Take out the sizes of paddings that nobody reads any more."""
    old = {node.input[1] for node in members.values() if node.op_type == "Pad"} - read.outputs.keys()
    old -= OnnxGraph(done).readers.keys()
    for init in [init for init in done.graph.initializer if init.name in old]:
        done.graph.initializer.remove(init)
