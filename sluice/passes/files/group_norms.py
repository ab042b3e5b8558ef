"""Group norms of a file, written as operators whose shapes are inferred.

onnx infers no shape behind ``GroupNormalization``, and ONNX Runtime computes it by its definition, having no kernel for
it. So it is written as torch exports it: an ``InstanceNormalization`` over groups, between two changes of shape.

    x (N, C, ...) -> (N, groups, -1) -> InstanceNormalization -> (N, C, -1) * scale + bias -> shape of x

From opset 21 on scale and bias have an entry per channel. Before they have one per group, which the inner norm takes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from sluice.passes.files.opset import opset_of
from sluice.passes.files.plain import graphs_in
from sluice.passes.graph.onnx_graph import OnnxGraph, attributes

__all__ = ["write_out_group_norms"]

PER_CHANNEL = 21  # the first operator set of such scales


def write_out_group_norms(model: onnx.ModelProto) -> None:
    """In place; nothing where there are none."""
    names, per_channel = OnnxGraph(model), opset_of(model) >= PER_CHANNEL
    for graph in graphs_in(model.graph):
        if not any(_is_one(node) for node in graph.node):
            continue
        nodes: list[onnx.NodeProto] = []
        for node in graph.node:
            nodes += _written_out(node, names, graph, per_channel) if _is_one(node) else [node]
        del graph.node[:]
        graph.node.extend(nodes)


def _is_one(node: onnx.NodeProto) -> bool:
    return node.op_type == "GroupNormalization" and node.domain in ("", "ai.onnx")


def _written_out(
    node: onnx.NodeProto, names: OnnxGraph, graph: onnx.GraphProto, per_channel: bool
) -> list[onnx.NodeProto]:
    (x, scale, bias), out, a = node.input, node.output[0], attributes(node)
    groups, made = int(a["num_groups"]), list[onnx.NodeProto]()

    def put(kind: str, word: str, inputs: list[str], **given: Any) -> str:
        name = names.fresh(f"{out}.{word}")
        made.append(helper.make_node(kind, inputs, [name], name=f"{node.name or out}/{word}", **given))
        return name

    def constant(word: str, array: np.ndarray) -> str:
        name = names.fresh(f"{out}.{word}")
        graph.initializer.append(numpy_helper.from_array(array, name))
        return name

    grouped = put("Reshape", "grouped", [x, constant("groups", np.array([0, groups, -1]))])
    inner = [constant("ones", np.ones(groups, np.float32)), constant("zeros", np.zeros(groups, np.float32))]
    affine = inner if per_channel else [scale, bias]
    done = put("InstanceNormalization", "normed", [grouped, *affine], epsilon=a.get("epsilon", 1e-5))
    whole = put("Shape", "shape", [x])
    if per_channel:
        axis = constant("axis", np.array([1]))
        flat = put("Concat", "flat", [put("Shape", "channels", [x], end=2), constant("rest", np.array([-1]))], axis=0)
        done = put("Reshape", "apart", [done, flat])
        done = put("Mul", "scaled", [done, put("Unsqueeze", "scale", [scale, axis])])
        done = put("Add", "shifted", [done, put("Unsqueeze", "bias", [bias, axis])])
    made.append(helper.make_node("Reshape", [done, whole], [out], name=node.name or out))
    return made
