"""Parts of a network as OpenVINO holds them inside the network: no changes of layout at their borders.

1. On the CPU OpenVINO lays activations out with the channels last where the processor has AVX-512, in blocks of
   channels elsewhere. The borders of a model are plain. So a part on its own begins with nodes that change the layout
   of its inputs, and ends with nodes that change that of its outputs. In the network these nodes are only where the
   layout does change.
2. So an input of a part has its channels last, and a ``Transpose`` behind it says so. OpenVINO takes it together with
   the change of layout, and nothing is left to move. Where a reader wants an input plain, as matrix products and norms
   over the last axis do, the ``Transpose`` is computed, or the layout changes behind it. Then the part is built with
   such inputs as they were, and with all inputs so, and the engine that moves the fewest tensors counts. Inputs of one
   channel or of one position have the same bytes in both layouts and stay. Concatenations are computed with the
   channels last as well, so the mark `PLAIN` of an input (`sluice.runtime.base.runner`, 6) does not hold here.
3. A part gives out one number of each output. The output itself then lies where the network has it, in its layout. A
   ``Transpose`` in front of an output would be computed where a convolution has taken an addition in. OpenVINO computes
   in integers only if something is quantised in the model, so a part in int8 quantises such a number if it is none yet.
4. A convolution takes in an addition of its result, by preference the one that makes the first operand, unless that has
   other readers. A source, which is a convolution of one input channel, has no other readers, while a shortcut of the
   network has. So a source makes the second operand if another convolution makes one. If none does, a source is an
   output too, and takes nothing in.
5. The *kernels* of a part are the nodes that are left: kind, implementation, types, layouts and sizes. What is computed
   from constants alone, when the engine is built, is none. Nor are the nodes of rules 2 and 3.
6. A change of layout that is left at a border is one of the kernels: of inputs with one position, and on processors
   whose kernels want blocks. Joined neighbours then have other kernels than apart, and are timed.
7. OpenVINO 2026.4 crashes, and the process with it, on some int8 parts with a concatenation, as one whose batch norm
   gives an output in int8. So parts that concatenate in int8 are refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from collections.abc import Set as AbstractSet
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from sluice.core.errors import SluiceError

__all__ = ["build_inside", "inside", "kernels", "products_in", "with_sources_apart"]

FIRST = ":channels-first"  # behind the name of an input
NUMBER = ":number"  # behind the name of an output
MERGED = "_fake"  # ends the name of a change of layout that has taken up a Transpose, and moves nothing
# Operators with which a convolution stays the one that an addition can go into.
SCALES = frozenset({"BatchNormalization", "QuantizeLinear", "DequantizeLinear", "Cast"})
PRODUCTS = ("Convolution", "FullyConnected", "MatMul")  # transposed ones stay float32 in bf16


def build_inside(
    part: onnx.ModelProto, build: Callable[[onnx.ModelProto], Any]
) -> tuple[Any, onnx.ModelProto, Counter[Hashable]]:
    """The ``CompiledModel`` of a part (static shapes) for timing, its model, its kernels; ``build`` compiles a model.

    Raises:
        SluiceError: OpenVINO would crash (rule 7).
    """
    _check_concatenations(part)
    apart = with_sources_apart(part)
    model = inside(apart)
    best = build(model)
    found, names = kernels(best), {info.name for info in apart.graph.input}
    for plain in (_computed(best), names):
        if plain and _moves(found):
            other = build(again := inside(apart, plain))
            if _moves(there := kernels(other)) < _moves(found):
                best, model, found = other, again, there
    return best, model, found


def inside(model: onnx.ModelProto, plain: AbstractSet[str] = frozenset()) -> onnx.ModelProto:
    """The part with its borders as inside the network (rules 2 and 3), but for the inputs in ``plain``."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    quantised = any(node.op_type == "DequantizeLinear" for node in graph.node)
    for info in graph.input:
        shape = [dim.dim_value for dim in info.type.tensor_type.shape.dim]
        if info.name not in plain and len(shape) > 2 and shape[1] > 1 and max(shape[2:]) > 1:
            _channels_last(graph, info, shape)
    for info in graph.output:
        if rank := len(info.type.tensor_type.shape.dim):
            _one_number(graph, info, rank, quantised)
    return result


def _channels_last(graph: onnx.GraphProto, info: onnx.ValueInfoProto, shape: list[int]) -> None:
    """Let the input have its channels last; behind it, or behind its ``DequantizeLinear``, it is as before."""
    info.CopyFrom(
        helper.make_tensor_value_info(info.name, info.type.tensor_type.elem_type, [shape[0], *shape[2:], shape[1]])
    )
    name = info.name
    readers = [node for node in graph.node if name in node.input]
    if len(readers) == 1 and readers[0].op_type == "DequantizeLinear":
        name = readers[0].output[0]
    first = f"{name}{FIRST}"
    for node in graph.node:
        node.input[:] = [first if source == name else source for source in node.input]
    back = [0, len(shape) - 1, *range(1, len(shape) - 1)]
    index = next((k for k, node in enumerate(graph.node) if name in node.output), -1) + 1
    graph.node.insert(index, helper.make_node("Transpose", [name], [first], perm=back))


def _one_number(graph: onnx.GraphProto, info: onnx.ValueInfoProto, rank: int, quantised: bool) -> None:
    """Give out the first number of an output."""
    name, kind = info.name, info.type.tensor_type.elem_type
    operands = [f"{name}{NUMBER}:{bound}" for bound in ("start", "end")]
    for operand, value in zip(operands, (0, 1), strict=True):
        graph.initializer.append(numpy_helper.from_array(np.full(rank, value, np.int64), operand))
    number = f"{name}{NUMBER}"
    graph.node.append(helper.make_node("Slice", [name, *operands], [number], name=number))
    if quantised and kind == TensorProto.FLOAT:
        scale, zero = f"{number}:scale", f"{number}:zero"
        graph.initializer.append(numpy_helper.from_array(np.array(1, np.float32), scale))
        graph.initializer.append(numpy_helper.from_array(np.array(0, np.uint8), zero))
        graph.node.append(helper.make_node("QuantizeLinear", [number, scale, zero], [f"{number}:quantized"]))
        number, kind = f"{number}:quantized", TensorProto.UINT8
    info.CopyFrom(helper.make_tensor_value_info(number, kind, [1] * rank))


def with_sources_apart(model: onnx.ModelProto) -> onnx.ModelProto:
    """The part, in which no source takes an addition in (rule 4)."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    made = {name: node for node in graph.node for name in node.output}
    seeds = {info.name: info for info in graph.input if _channels(info) == 1}
    outputs = {info.name for info in graph.output}
    for node in graph.node:
        if node.op_type != "Add":
            continue
        makers = [_convolution(name, made) for name in node.input]
        sources = [maker is not None and _origin(maker.input[0], made) in seeds for maker in makers]
        if any(sources) and (all(sources) or None in makers):
            names = [name for name, source in zip(node.input, sources, strict=True) if source and name not in outputs]
            graph.output.extend(_info(name, seeds, made) for name in names)
            outputs.update(names)
        elif sources[0]:
            node.input[:] = reversed(node.input)
    return result


def kernels(compiled: Any) -> Counter[Hashable]:
    """The nodes of an engine that compute, without their names (rule 5)."""
    found: Counter[Hashable] = Counter()
    constant: set[str] = set()
    outside: set[str] = set()
    for node in compiled.get_runtime_model().get_ordered_ops():
        name, kind, sources = node.get_friendly_name(), _said(node, "layerType"), _sources(node)
        if kind == "Const" or (sources and constant.issuperset(sources)):
            constant.add(name)
        elif NUMBER in _said(node, "originalLayersNames") or not outside.isdisjoint(sources):
            outside.add(name)
        elif kind not in ("Input", "Output") and not name.endswith(MERGED):
            told = ("primitiveType", "runtimePrecision", "outputPrecisions", "outputLayouts")
            taken = tuple(tuple(port.get_shape()) for port in node.inputs())
            found[(kind, *(_said(node, key) for key in told), taken)] += 1
    return found


def products_in(compiled: Any) -> set[str]:
    """The types in which an engine takes its products, as ``bf16``."""
    nodes = compiled.get_runtime_model().get_ordered_ops()
    return {_said(node, "runtimePrecision") for node in nodes if _said(node, "layerType") in PRODUCTS}


def _check_concatenations(part: onnx.ModelProto) -> None:
    """Rule 7."""
    dequantised = {node.output[0] for node in part.graph.node if node.op_type == "DequantizeLinear"}
    for node in part.graph.node:
        if node.op_type == "Concat" and not dequantised.isdisjoint(node.input):
            raise SluiceError(
                f"OpenVINO crashes on parts of networks that concatenate in int8, as at {node.output[0]!r}; choose "
                f"another precision or target"
            )


def _moves(found: Counter[Hashable]) -> int:
    """How many tensors of more than one channel are only laid out anew."""
    told = [(kernel, count) for kernel, count in found.items() if isinstance(kernel, tuple)]
    return sum(n for (kind, *_, taken), n in told if kind in ("Reorder", "Transpose") and taken[0][1:2] != (1,))


def _computed(compiled: Any) -> set[str]:
    """Inputs whose channels come last and whose ``Transpose`` is computed (rule 2)."""
    found = set()
    for node in compiled.get_runtime_model().get_ordered_ops():
        if _said(node, "layerType") == "Transpose":
            maker = node.inputs()[0].get_source_output().get_node()
            if _said(maker, "layerType") == "Input":
                found.add(maker.get_friendly_name())
    return found


def _convolution(name: str, made: Mapping[str, onnx.NodeProto]) -> onnx.NodeProto | None:
    """The convolution whose result, scaled, is the tensor; None where there is none."""
    node = made.get(_origin(name, made))
    return node if node is not None and node.op_type == "Conv" else None


def _origin(name: str, made: Mapping[str, onnx.NodeProto]) -> str:
    """The tensor that is scaled to give ``name``."""
    while (node := made.get(name)) is not None and node.op_type in SCALES:
        name = node.input[0]
    return name


def _channels(info: onnx.ValueInfoProto) -> int:
    dims = info.type.tensor_type.shape.dim
    return dims[1].dim_value if len(dims) > 2 else 0


def _info(
    name: str, seeds: Mapping[str, onnx.ValueInfoProto], made: Mapping[str, onnx.NodeProto]
) -> onnx.ValueInfoProto:
    """The source ``name`` as an output; its rank is that of its seed, its sizes do not matter."""
    maker = _convolution(name, made)
    assert maker is not None
    seed = seeds[_origin(maker.input[0], made)].type.tensor_type
    kind = TensorProto.FLOAT if made[name].op_type == "DequantizeLinear" else seed.elem_type
    return helper.make_tensor_value_info(name, kind, [None] * len(seed.shape.dim))


def _sources(node: Any) -> list[str]:
    return [port.get_source_output().get_node().get_friendly_name() for port in node.inputs()]


def _said(node: Any, key: str) -> str:
    return str(node.get_rt_info()[key].astype(str))
