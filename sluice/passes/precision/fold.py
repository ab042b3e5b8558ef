"""Batch norm folded into the layer in front of it; numpy and onnx only, so that a device without torch can fold.

In evaluation a batch norm is one affine map per channel, ``y = s x + t`` with

    s = gamma / sqrt(var + eps),    t = beta - s mean.

1. ``Conv``, ``ConvTranspose``, ``Gemm`` or a 2-D ``MatMul`` that feeds the norm alone takes the map into its own
   tensors: ``W' = s W`` along the output channels, ``b' = s b + t``. Computed in float64, stored in the type of W.
2. A weight or bias that others read as well is copied first.
3. A norm with no such layer in front becomes ``Mul`` and ``Add``; one whose tensors are not constant stays.
4. A weight behind a transpose (``MatMul(x, Transpose(W))``, which exporters write) is first stored transposed, and
   called after the weight (`sluice.passes.graph.onnx_file.named_transposes`).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper

from sluice.passes.graph.onnx_file import named_transposes
from sluice.passes.graph.onnx_graph import OnnxGraph, attributes, reads

__all__ = ["fold_batch_norms", "remove_unused"]


@dataclass(frozen=True, slots=True)
class _Affine:
    """``y = scale x + shift`` along the channels, in float64."""

    scale: np.ndarray
    shift: np.ndarray


def fold_batch_norms(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy without the batch norms of constant statistics; every other value keeps its name and its numbers."""
    done = onnx.ModelProto()
    done.CopyFrom(named_transposes(model))
    _store_transposed(done.graph)
    if any(node.op_type == "BatchNormalization" for node in done.graph.node):
        _Folder(done).fold()
    remove_unused(done.graph)
    return done


def remove_unused(graph: onnx.GraphProto) -> None:
    """Drop initialisers that nothing reads, and the types and shapes of values that are gone."""
    there = OnnxGraph(graph)
    initializers = [init for init in graph.initializer if there.uses(init.name)]
    infos = [info for info in graph.value_info if info.name in there.producers]
    del graph.initializer[:], graph.value_info[:]
    graph.initializer.extend(initializers)
    graph.value_info.extend(infos)


def _store_transposed(graph: onnx.GraphProto) -> None:
    there = OnnxGraph(graph)
    for node in list(graph.node):
        constant = node.op_type == "Transpose" and node.input[0] in there.initializers
        if constant and node.output[0] not in there.outputs:
            array = numpy_helper.to_array(there.initializers[node.input[0]]).transpose(attributes(node).get("perm"))
            graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array), node.output[0]))
            graph.node.remove(node)


class _Folder:
    def __init__(self, model: onnx.ModelProto):
        there = OnnxGraph(model)
        self.graph, self.initial, self.made, self.unused = there.graph, there.initializers, there.producers, there.fresh
        self.readers = Counter(name for node in self.graph.node for name in reads(node))
        self.readers.update(list(there.outputs))
        inferred = OnnxGraph(onnx.shape_inference.infer_shapes(model))
        self.ranks = {
            name: len(info.type.tensor_type.shape.dim)
            for name, info in inferred.infos.items()
            if info.type.tensor_type.HasField("shape")
        }

    def fold(self) -> None:
        kept: list[onnx.NodeProto] = []
        for node in self.graph.node:
            affine = self.affine(node) if node.op_type == "BatchNormalization" else None
            if affine is None:
                kept.append(node)
                continue
            layer = self.made.get(node.input[0])
            if layer is None or self.readers[node.input[0]] != 1 or not self.into(layer, affine):
                kept += self.apart(node, affine)
            elif layer.op_type == "MatMul":
                shift = self.add(f"{node.output[0]}:shift", affine.shift, layer)
                kept.append(helper.make_node("Add", [node.input[0], shift], [node.output[0]]))
                self.made[node.output[0]] = kept[-1]
            else:
                # ``layer`` stands in ``kept`` already, and the readers of the norm read it from here on.
                layer.output[0] = node.output[0]
                self.made[node.output[0]] = layer
        del self.graph.node[:]
        self.graph.node.extend(kept)

    def affine(self, norm: onnx.NodeProto) -> _Affine | None:
        if any(name not in self.initial for name in norm.input[1:]) or attributes(norm).get("training_mode"):
            return None
        gamma, beta, mean, var = (self.array(name) for name in norm.input[1:])
        scale = gamma / np.sqrt(var + attributes(norm).get("epsilon", 1e-5))
        return _Affine(scale, beta - scale * mean)

    def array(self, name: str) -> np.ndarray:
        return numpy_helper.to_array(self.initial[name]).astype(np.float64)

    def into(self, layer: onnx.NodeProto, affine: _Affine) -> bool:
        """Rule 1: whether ``layer`` could take the map."""
        a = attributes(layer)
        if layer.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul") or layer.input[1] not in self.initial:
            return False
        bias = layer.input[2] if len(layer.input) > 2 else ""
        if bias and bias not in self.initial:
            return False
        weight = self.array(layer.input[1])
        if layer.op_type == "ConvTranspose":
            groups = a.get("group", 1)
            grouped = weight.reshape(groups, -1, *weight.shape[1:])  # (groups, inputs / groups, outputs / groups, ...)
            scale = affine.scale.reshape(groups, 1, -1, *[1] * (weight.ndim - 2))
            weight = (grouped * scale).reshape(weight.shape)
        else:
            # Only the second axis of a 2-D product is the axis that the norm counts as channels.
            if layer.op_type == "MatMul" and (weight.ndim != 2 or self.ranks.get(layer.output[0]) != 2):
                return False
            first = layer.op_type == "Conv" or (layer.op_type == "Gemm" and a.get("transB"))
            axis = 0 if first else 1
            weight = weight * affine.scale.reshape([-1 if d == axis else 1 for d in range(weight.ndim)])
        if layer.op_type != "MatMul":
            old = self.array(bias) * a.get("beta", 1.0) if bias else 0.0
            self.put(layer, 2, bias or f"{layer.input[1]}:bias", old * affine.scale + affine.shift)
            for attribute in [x for x in layer.attribute if x.name == "beta"]:
                layer.attribute.remove(attribute)
        self.put(layer, 1, layer.input[1], weight)
        return True

    def put(self, layer: onnx.NodeProto, index: int, name: str, array: np.ndarray) -> None:
        """Give ``layer`` another value of an initialiser, which is copied if others read it (rule 2)."""
        dtype = numpy_helper.to_array(self.initial[layer.input[1]]).dtype
        if name not in layer.input or self.readers[name] > 1:
            name = self.unused(name)
            self.initial[name] = self.graph.initializer.add()
        self.initial[name].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array, dtype=dtype), name))
        if len(layer.input) > index:
            self.readers[layer.input[index]] -= 1
            layer.input[index] = name
        else:
            layer.input.append(name)
        self.readers[name] += 1

    def apart(self, norm: onnx.NodeProto, affine: _Affine) -> list[onnx.NodeProto]:
        """Rule 3."""
        x, y = norm.input[0], norm.output[0]
        if x not in self.ranks:
            return [norm]
        shape = [-1] + [1] * (self.ranks[x] - 2)
        scale = self.add(f"{y}:factor", affine.scale.reshape(shape), norm)
        shift = self.add(f"{y}:shift", affine.shift.reshape(shape), norm)
        scaled = self.unused(f"{y}:scaled")
        nodes = [helper.make_node("Mul", [x, scale], [scaled]), helper.make_node("Add", [scaled, shift], [y])]
        self.made[y] = nodes[-1]
        return nodes

    def add(self, name: str, array: np.ndarray, like: onnx.NodeProto) -> str:
        """A new initialiser in the type of the second tensor that ``like`` reads; its name."""
        name = self.unused(name)
        dtype = numpy_helper.to_array(self.initial[like.input[1]]).dtype
        self.initial[name] = self.graph.initializer.add()
        self.initial[name].CopyFrom(numpy_helper.from_array(array.astype(dtype), name))
        return name
