"""Which tensors of a network are int8, for each runtime. numpy and onnx only.

A tensor that is int8 has one pair of ``QuantizeLinear`` and ``DequantizeLinear``, which all its readers share, behind
the activation that runtimes fuse into the layer (``Conv -> Relu -> Q``), never before it. Which tensors have a pair
follows from the operators that a runtime computes in integers, and runtimes differ in these.

*TensorRT* wants int8 with zero point 0 (its recommendations on placing Q/DQ layers, in "Explicit Quantization").

1. Every layer with a constant weight reads int8; its output is not quantised for its own sake.
2. An ``Add`` is fused into the convolution that makes one operand, and would be torn off it by a pair in between; the
   other operand, the shortcut, reads int8.
3. Pooling, and operators that only move numbers, compute in int8 if their result is int8.

*ONNX Runtime* on a CPU (seen in its optimised graphs) wants uint8. On x86 it turns int8 activations into uint8 itself,
but not where a tensor has two readers, and then none of the layers around it is computed in integers.

4. The zero point is 128, and 0 for values that cannot be negative. A pair with 0 cuts off at 0 as ``Relu`` and ``Clip``
   from 0 do, so those vanish into the layer; with another zero point they keep it in fp32.
5. Rule 1, but the output of a convolution is quantised as well: without, it is computed in fp32. Transposed
   convolutions are so in any case, and have no pairs.
6. A matrix product gives floating-point numbers, and is computed in fp32 if a bias is part of it; see
   `sluice.passes.precision.quantize`.
7. Operators with an integer kernel (`CARRIERS`) or that only move numbers compute in int8 if their result is int8.

A *part* of a network has int8 borders where the network does, as far as the part shows it. A graph input is int8 if
these rules give it a pair. A graph output is int8, as if a layer read it, unless it is a sum or another arrangement of
the results of a matrix product or a softmax. In transformers such an output is the residual stream, or goes into
attention, and neither is int8.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto

from sluice.core.errors import SluiceError
from sluice.passes.graph.exclusion import excluded_by
from sluice.passes.graph.onnx_file import TRANSPOSED
from sluice.passes.graph.onnx_graph import OnnxGraph, attributes
from sluice.passes.graph.operators import ONNX, onnx_with

__all__ = ["WEIGHTED", "Dialect", "Pairs", "dialect_of"]

WEIGHTED = frozenset(name for name, row in ONNX.items() if row.weights)
POOLS = onnx_with("average")
CARRIERS = onnx_with("integer")
# The result has the numbers of the first operand, so it has its scale as well.
MOVERS = onnx_with("moves")
NONNEGATIVE = onnx_with("nonnegative")


@dataclass(frozen=True, slots=True)
class Dialect:
    """The operators that a runtime computes in integers, and the form in which it wants the pairs."""

    unsigned: bool
    weighted: frozenset[str]
    carriers: frozenset[str]
    fused_addition: bool = False  # rule 2
    quantised_outputs: bool = False  # of convolutions, rule 5
    separate_bias: bool = False  # rule 6


TENSORRT = Dialect(False, WEIGHTED, POOLS, fused_addition=True)
ONNXRUNTIME = Dialect(True, WEIGHTED - {"ConvTranspose"}, CARRIERS, quantised_outputs=True, separate_bias=True)


def dialect_of(target: str) -> Dialect:
    """TensorRT's for its target, ONNX Runtime's for every other."""
    return TENSORRT if target == "tensorrt" else ONNXRUNTIME


class Pairs:
    """A folded fp32 network, read for its pairs; ``exclude`` are names or patterns of layers that stay float."""

    def __init__(self, model: onnx.ModelProto, dialect: Dialect, exclude: Collection[str] = ()):
        self.there = there = OnnxGraph(model)
        self.graph, self.dialect = model.graph, dialect
        self.initial, self.made, self.readers = there.initializers, there.producers, there.readers
        self.exclude = self._excluded(tuple(exclude))
        self.finals = set(there.outputs)
        inferred = OnnxGraph(onnx.shape_inference.infer_shapes(model))
        self.floats = {
            name
            for name, info in inferred.infos.items()
            if info.type.tensor_type.elem_type == TensorProto.FLOAT and name not in self.initial
        }
        self.nonnegative = self._find_nonnegative()

    def tensors(self, *, part: bool = False) -> set[str]:
        """The tensors that have a pair."""
        found = self.finals - self._products() if part else set()
        for node in reversed(self.graph.node):
            made = {*node.output, self.behind(node)}
            if self.is_quantised(node):
                found.add(node.input[0])
                if self.dialect.quantised_outputs and node.op_type == "Conv":
                    found.add(self.behind(node))
            elif node.op_type == "Add" and self.dialect.fused_addition:
                found.update(self._shortcuts(node))
            elif node.op_type in self.dialect.carriers and made & found and self._is_active(node):
                found.update(node.input)
            elif _moves(node) and made & found:
                found.update((node.input[0], *node.output))
        return found & self.floats

    def is_quantised(self, node: onnx.NodeProto) -> bool:
        """Whether ``node`` is a layer that computes in integers."""
        if node.op_type not in self.dialect.weighted or node.input[1] not in self.initial:
            return False
        weight, a = self.initial[node.input[1]], attributes(node)
        return (
            weight.data_type == TensorProto.FLOAT
            and node.input[0] in self.floats
            and node.input[1] not in self.exclude
            and not a.get("transA")
            and not (node.op_type == "MatMul" and len(weight.dims) != 2)
            # Its output channels lie on two axes of the weight, and scales lie along one.
            and not (node.op_type == "ConvTranspose" and a.get("group", 1) > 1)
        )

    def behind(self, node: onnx.NodeProto) -> str:
        """The output of ``node``, or of the activation behind it that becomes part of its kernel."""
        name = node.output[0]
        users = self.readers.get(name, [])
        if len(users) == 1 and name not in self.finals and self._clips_at_zero(users[0]):
            return users[0].output[0]
        return name

    def origin(self, name: str) -> str:
        """The tensor whose numbers a value has."""
        while name in self.made and _moves(self.made[name]):
            name = self.made[name].input[0]
        return name

    def bound(self, name: str) -> float:
        """The largest absolute value that the operator behind the tensor allows; infinite where it sets no limit."""
        node = self.made.get(name)
        if node is None or node.op_type != "Clip":
            return np.inf
        low, high = self._bounds(node)
        if node.input[0] in self.nonnegative:
            low = max(low, 0.0)
        return max(abs(low), abs(high))

    def _excluded(self, patterns: tuple[str, ...]) -> frozenset[str]:
        """The weights that the patterns mean (`sluice.passes.graph.exclusion`, 1).

        Raises:
            SluiceError: a pattern means none.
        """
        layers = [node for node in self.graph.node if node.op_type in WEIGHTED and node.input[1] in self.initial]
        weights = {node.input[1]: node.input[1].removesuffix(TRANSPOSED) for node in layers}
        for pattern in patterns:
            if not any(excluded_by(name, [pattern]) for name in weights.values()):
                told = ", ".join(sorted(weights.values())[:5])
                raise SluiceError(
                    f"exclude names {pattern!r}, which is no layer of the network; its weights are {told}"
                )
        return frozenset(own for own, name in weights.items() if excluded_by(name, patterns))

    def _products(self) -> set[str]:
        """The results of matrix products and softmaxes, and values that are only arrangements of them."""
        found: set[str] = set()
        convolved: set[str] = set()
        for node in self.graph.node:
            arranges = node.op_type in CARRIERS or _moves(node)
            if node.op_type == "Conv" or (arranges and convolved.intersection(node.input)):
                convolved.update((*node.output, self.behind(node)))
            elif (
                node.op_type in ("Gemm", "Softmax")
                or (node.op_type == "MatMul" and self.is_quantised(node))
                or (arranges and found.intersection(node.input))
            ):
                found.update(node.output)
        return found

    def _shortcuts(self, add: onnx.NodeProto) -> list[str]:
        """Rule 2: the operands of an addition but for the one whose convolution takes the addition in."""
        fused = [name for name in add.input if self._is_fused(name)] if self._is_active(add) else []
        order = {name: index for index, node in enumerate(self.graph.node) for name in node.output}
        last = max(fused, key=lambda name: order[name], default=None)
        return [name for name in add.input if last is not None and name != last]

    def _is_fused(self, name: str) -> bool:
        node = self.made.get(name)
        private = len(self.readers[name]) == 1 and name not in self.finals
        return node is not None and node.op_type == "Conv" and self.is_quantised(node) and private

    def _is_active(self, node: onnx.NodeProto) -> bool:
        """Whether no operand is a constant."""
        return self.floats.issuperset(node.input)

    def _clips_at_zero(self, node: onnx.NodeProto) -> bool:
        return node.op_type == "Relu" or (node.op_type == "Clip" and self._bounds(node)[0] == 0)

    def _bounds(self, clip: onnx.NodeProto) -> tuple[float, float]:
        found = [-np.inf, np.inf]
        for index, name in enumerate(clip.input[1:3]):
            if (array := self.there.array(name)) is not None:
                found[index] = float(array)
        return found[0], found[1]

    def _find_nonnegative(self) -> set[str]:
        """Values that are not negative for any input."""
        found: set[str] = set()
        for node in self.graph.node:
            inherits = node.op_type in CARRIERS | {"ReduceMean"} or _moves(node)
            operands = node.input[:1] if node.op_type == "ReduceMean" or _moves(node) else node.input
            if (
                node.op_type in NONNEGATIVE
                or (node.op_type == "Clip" and self._bounds(node)[0] >= 0)
                or (inherits and found.issuperset(operands))
            ):
                found.update(node.output)
        return found


def _moves(node: onnx.NodeProto) -> bool:
    return node.op_type in MOVERS and (
        node.op_type != "Resize" or attributes(node).get("mode", b"nearest") == b"nearest"
    )
