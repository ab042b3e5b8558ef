"""Parts of a network as ONNX Runtime holds them inside the network: no changes of layout at their borders.

1. On the CPU ONNX Runtime computes convolutions, and the operators between them, in blocks of channels. The borders of
   a model are plain. So a part on its own begins with nodes that lay its inputs out in blocks, and ends with nodes that
   lay its outputs out plainly; in the network these nodes are only where the layout does change. Dense, at batch 8, the
   parts of MobileNetV2 add up to 19.5 ms with these nodes and to 11.1 without, those of ResNet-20 to 4.29 and 3.91; the
   networks took 11.2 and 3.90 ms in the same run.
2. So the part is optimised and saved, the nodes at its borders are taken off, and the rest is loaded as it stands. An
   input that was laid out in blocks then is one of whole blocks. An input that is read plainly too stays as it is, and
   so does one that needs no change of layout, or that is plain inside the network (`sluice.runtime.base.runner.PLAIN`).
3. The network's own inputs and outputs lose these nodes as well. Their time is the same for every plan, and is part of
   the time that the calibration adds to every engine.
4. An output of a model has memory of its own. Inside the network a convolution that adds to its sum writes over one
   operand. In a part that ends with such a convolution, one thread copied that operand first: 14 of 303 us, on two
   threads 27 of 178. So a part gives out only the shapes of its outputs, and the outputs then lie where the network has
   them. A convolution also writes over an operand only if nobody needs it any more. Inside the network all other
   readers come before, since the addition waits for them. Joined neighbours know of no such order, and ONNX Runtime
   first runs the nodes that lead to the last output. So additions lead to the first ones.
5. The *kernels* of a part are the remaining nodes, with their operation and the sizes of their weights. Neighbours that
   run together in the kernels that they run alone save a call and nothing else.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Hashable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx
from onnx import TensorProto, helper

from sluice.runtime.base.inputs import Shapes
from sluice.runtime.base.runner import PLAIN
from sluice.runtime.ort.session import load_session

__all__ = ["block_size", "kernels", "optimized", "outputs_inside", "part_session", "without_reorders"]

PROVIDER = "CPUExecutionProvider"
BLOCKED = "com.microsoft.nchwc"
ADDED = 3  # the index of the input that a convolution in blocks adds to its sum


def part_session(model: onnx.ModelProto, threads: int, entries: Mapping[str, str]) -> tuple[Any, Counter[Hashable]]:
    """An ``onnxruntime.InferenceSession`` of ``model`` (static shapes) for timing (rules 2 and 4); its kernels."""
    bare = without_reorders(model)
    inside = outputs_inside(bare)
    return load_session(inside, Shapes(), PROVIDER, threads=threads, entries=entries, optimize=False), kernels(bare)


def kernels(optimized: onnx.ModelProto) -> Counter[Hashable]:
    """The operations of the nodes of an optimised model, without the names (rule 5)."""
    sizes = {init.name: tuple(init.dims) for init in optimized.graph.initializer}
    return Counter(
        (
            node.domain,
            node.op_type,
            tuple(sorted(attribute.SerializeToString(deterministic=True) for attribute in node.attribute)),
            tuple(sizes.get(name, bool(name)) for name in node.input),
        )
        for node in optimized.graph.node
    )


def without_reorders(model: onnx.ModelProto) -> onnx.ModelProto:
    """The optimised model without the reorders of its inputs and outputs (rule 2)."""
    result, plain = optimized(model), {info.name for info in model.graph.input if info.doc_string == PLAIN}
    graph = result.graph
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    inputs = {info.name: info for info in graph.input}
    outputs = {info.name: info for info in graph.output}
    border: list[onnx.NodeProto] = []
    renamed: dict[str, str] = {}
    for node in graph.node:
        if node.domain != BLOCKED or node.op_type not in ("ReorderInput", "ReorderOutput"):
            continue
        if any(a.name == "channels_last" and a.i for a in node.attribute):  # a transpose that the network has as well
            continue
        (source,), (target,) = node.input, node.output
        if source in inputs and source not in plain and len(readers[source]) == 1:
            channels = inputs[source].type.tensor_type.shape.dim[1]
            channels.dim_value = -(-channels.dim_value // block_size()) * block_size()
            renamed[target] = source
            border.append(node)
        elif target in outputs and target not in readers:
            outputs[target].type.tensor_type.ClearField("shape")
            renamed[source] = target
            border.append(node)
    for node in border:
        graph.node.remove(node)
    for node in graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [renamed.get(name, name) for name in node.output]
    return result


def outputs_inside(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with the shape of every output in its place (rule 4)."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    added = {node.output[0] for node in model.graph.node if node.domain == BLOCKED and any(node.input[ADDED:])}
    for info in sorted(result.graph.output, key=lambda info: info.name not in added):
        shape = f"{info.name}:shape"
        result.graph.node.append(helper.make_node("Shape", [info.name], [shape]))
        info.CopyFrom(helper.make_tensor_value_info(shape, TensorProto.INT64, None))
    return result


@functools.cache
def block_size() -> int:
    """Channels of a block on this processor; 1 where there are no blocks."""
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1, 1, 1]) for name in "xy"]
    weight = helper.make_tensor("w", TensorProto.FLOAT, [1, 1, 1, 1], [1.0])
    graph = helper.make_graph([helper.make_node("Conv", ["x", "w"], ["y"])], "block", info[:1], info[1:], [weight])
    found = optimized(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    return int(found.graph.initializer[0].dims[0])


def optimized(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph that ONNX Runtime runs."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        load_session(model, Shapes(), PROVIDER, save=path)
        return onnx.load(path)
