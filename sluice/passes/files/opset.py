"""Old operator sets in the form of opset 13, and back.

1. Up: what was an attribute becomes an input where the rules read inputs; Upsample becomes Resize; a softmax over all
   axes behind one becomes one over the last axis of a matrix.
2. Back: an input that is a constant becomes the attribute again. A graph in which one of them is computed, or with an
   operator that the old set lacks, stays at opset 13.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from sluice.core.errors import SluiceError
from sluice.passes.files.plain import graphs_in
from sluice.passes.graph.onnx_graph import OnnxGraph, attributes, hollow, infer_weightless

__all__ = ["OLDEST", "PLAIN", "as_opset", "at_plain_opset", "opset_of"]

PLAIN, OLDEST = 13, 7
NEGATIVE = 11  # the first set in which an axis may be counted from the end

# By operator the first set in which each of these attributes is an input: attribute, place, type.
MOVED: dict[str, tuple[int, tuple[tuple[str, int, type], ...]]] = {
    "Slice": (10, (("starts", 1, np.int64), ("ends", 2, np.int64), ("axes", 3, np.int64))),
    "Pad": (11, (("pads", 1, np.int64), ("value", 2, np.float32))),
    "Clip": (11, (("min", 1, np.float32), ("max", 2, np.float32))),
    "TopK": (10, (("k", 1, np.int64),)),
    "Squeeze": (13, (("axes", 1, np.int64),)),
    "Unsqueeze": (13, (("axes", 1, np.int64),)),
    "ReduceSum": (13, (("axes", 1, np.int64),)),
    "Split": (13, (("split", 1, np.int64),)),
}
SCALARS = ("value", "min", "max")
SOFTMAX = ("Softmax", "LogSoftmax", "Hardmax")


def opset_of(model: onnx.ModelProto) -> int:
    return next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), PLAIN)


def at_plain_opset(model: onnx.ModelProto) -> None:
    """Up (rule 1), in place.

    Raises:
        SluiceError: the set is older than 7, in which operators broadcast by attributes.
    """
    old = opset_of(model)
    if old >= PLAIN:
        return
    if old < OLDEST:
        raise SluiceError(f"the file is of ONNX opset {old}; export it again with opset {OLDEST} or later")
    ranks = _ranks(model)
    names = OnnxGraph(model)
    for graph in graphs_in(model.graph):
        nodes: list[onnx.NodeProto] = []
        for node in graph.node:
            nodes += _up(node, old, names, graph, ranks)
        del graph.node[:]
        graph.node.extend(nodes)
    _say(model, PLAIN)


def _say(model: onnx.ModelProto, version: int) -> None:
    for entry in model.opset_import:
        if entry.domain in ("", "ai.onnx"):
            entry.version = version


def _ranks(model: onnx.ModelProto) -> dict[str, int]:
    """Of the values whose rank the old set tells; declared ranks of inner values are not believed."""
    copy = hollow(model)
    del copy.graph.value_info[:]
    for info in copy.graph.output:
        info.type.tensor_type.ClearField("shape")
    graph = onnx.shape_inference.infer_shapes(copy, data_prop=True).graph
    infos = (*graph.input, *graph.value_info, *graph.output)
    return {i.name: len(i.type.tensor_type.shape.dim) for i in infos if i.type.tensor_type.HasField("shape")}


def _up(
    node: onnx.NodeProto, old: int, names: OnnxGraph, graph: onnx.GraphProto, ranks: dict[str, int]
) -> list[onnx.NodeProto]:
    if node.domain not in ("", "ai.onnx"):
        return [node]
    if node.op_type in MOVED and old < MOVED[node.op_type][0]:
        _to_inputs(node, names, graph)
    elif node.op_type == "Upsample" or (node.op_type == "Resize" and old < 11):
        _resized(node, names, graph)
    elif node.op_type == "BatchNormalization":
        _drop(node, "spatial")
    elif node.op_type == "Dropout":
        node.op_type, node.attribute[:] = "Identity", []
        del node.output[1:]
    elif node.op_type == "Scatter":
        node.op_type = "ScatterElements"
    elif node.op_type in SOFTMAX:
        return _softmax(node, names, graph, ranks)
    return [node]


def _held(names: OnnxGraph, graph: onnx.GraphProto, stem: str, array: np.ndarray) -> str:
    """A new initialiser with that array; its name."""
    name = names.fresh(stem)
    graph.initializer.append(numpy_helper.from_array(array, name))
    return name


def _drop(node: onnx.NodeProto, *gone: str) -> None:
    kept = [attribute for attribute in node.attribute if attribute.name not in gone]
    del node.attribute[:]
    node.attribute.extend(kept)


def _to_inputs(node: onnx.NodeProto, names: OnnxGraph, graph: onnx.GraphProto) -> None:
    given = attributes(node)
    moved = MOVED[node.op_type][1]
    for attribute, place, dtype in moved:
        if attribute not in given:
            continue
        array: np.ndarray = np.array(given[attribute], dtype=dtype)
        array = array if attribute in SCALARS else array.reshape(-1)
        while len(node.input) <= place:
            node.input.append("")
        node.input[place] = _held(names, graph, f"{node.output[0]}.{attribute}", array)
    _drop(node, *(attribute for attribute, _, _ in moved))


def _resized(node: onnx.NodeProto, names: OnnxGraph, graph: onnx.GraphProto) -> None:
    """Upsample, and Resize as it was before opset 11."""
    given = attributes(node)
    scales = node.input[1] if len(node.input) > 1 else ""
    if not scales:
        scales = _held(names, graph, f"{node.output[0]}.scales", np.array(given["scales"], dtype=np.float32))
    mode = given.get("mode", b"nearest")
    node.op_type, node.input[:] = "Resize", [node.input[0], "", scales]
    del node.attribute[:]
    settings = {"mode": mode, "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    node.attribute.extend(helper.make_attribute(key, value) for key, value in settings.items())


def _softmax(
    node: onnx.NodeProto, names: OnnxGraph, graph: onnx.GraphProto, ranks: dict[str, int]
) -> list[onnx.NodeProto]:
    """Before opset 13 the axes from ``axis`` on are one."""
    axis, rank = attributes(node).get("axis", 1), ranks.get(node.input[0])
    _drop(node, "axis")
    node.attribute.append(helper.make_attribute("axis", -1))
    if axis == -1 or (rank is not None and axis % rank == rank - 1):
        return [node]
    out, flat, soft, shape = node.output[0], *(names.fresh(f"{node.output[0]}.{w}") for w in ("flat", "soft", "shape"))
    before = helper.make_node("Flatten", [node.input[0]], [flat], axis=axis)
    sizes = helper.make_node("Shape", [node.input[0]], [shape])
    after = helper.make_node("Reshape", [soft, shape], [out])
    node.input[0], node.output[0] = flat, soft
    return [before, node, sizes, after]


def as_opset(model: onnx.ModelProto, old: int) -> onnx.ModelProto:
    """Back (rule 2): a copy at the old set, or the model itself where it needs a newer one."""
    if opset_of(model) != PLAIN or old >= PLAIN:
        return model
    done = onnx.ModelProto()
    done.CopyFrom(model)
    read, ranks = OnnxGraph(done), _ranks(done)
    for graph in graphs_in(done.graph):
        for node in graph.node:
            if node.domain in ("", "ai.onnx") and not _down(node, old, read, ranks):
                return model
    used = {name for part in graphs_in(done.graph) for n in part.node for name in n.input}
    used |= {info.name for info in done.graph.output}
    kept = [init for init in done.graph.initializer if init.name in used]
    del done.graph.initializer[:]
    done.graph.initializer.extend(kept)
    _say(done, old)
    try:
        infer_weightless(done)
    except Exception:  # of several kinds, where an operator is not of that set
        return model
    return done


def _down(node: onnx.NodeProto, old: int, read: OnnxGraph, ranks: dict[str, int]) -> bool:
    """Can the node be written in the old set? If so, it is, in place."""
    if node.op_type == "Resize" and old < 11:
        scales = node.input[2] if len(node.input) > 2 else ""
        given = attributes(node)
        plain = given.get("coordinate_transformation_mode") == b"asymmetric" and given.get("nearest_mode") == b"floor"
        if not scales or not plain or (old < 9 and read.array(scales) is None):
            return False
        _drop(node, "coordinate_transformation_mode", "nearest_mode")
        node.op_type, node.input[:] = "Resize" if old == 10 else "Upsample", [node.input[0], scales]
        if old < 9:
            node.attribute.append(helper.make_attribute("scales", [float(v) for v in np.asarray(read.array(scales))]))
            del node.input[1:]
        return True
    if node.op_type in SOFTMAX:
        axis, rank = attributes(node).get("axis", -1), ranks.get(node.input[0])
        if axis == -1 and old >= NEGATIVE:
            return True
        if rank is None or axis % rank != rank - 1:
            return False
        _drop(node, "axis")
        node.attribute.append(helper.make_attribute("axis", rank - 1))
        return True
    if node.op_type not in MOVED or old >= MOVED[node.op_type][0]:
        return True
    found: dict[str, Any] = {}
    for attribute, place, _ in MOVED[node.op_type][1]:
        if place < len(node.input) and node.input[place]:
            array = read.array(node.input[place])
            if array is None:
                return False
            found[attribute] = array.reshape(-1).tolist()
            if attribute in SCALARS or attribute == "k":
                (found[attribute],) = found[attribute]
    del node.input[1:]
    node.attribute.extend(helper.make_attribute(name, value) for name, value in found.items())
    return True
