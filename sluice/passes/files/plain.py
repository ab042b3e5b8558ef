"""A file as one flat graph: what is written in several ways is written in one.

1. Local functions are written out where they are called.
2. What a Constant node holds is an initialiser, unless it is an output of the graph. What control flow holds inside,
   the graph around it holds, so that every weight has one place.
3. An initialiser is no input: nobody may feed another value for it.
4. An input whose value is fixed stays an input, so that callers need no change, and nothing reads it.
5. A size that is no size (0 or below) is open, and every open size of an input has a name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

import numpy as np
import onnx
import onnx.inliner
from onnx import numpy_helper

from sluice.core.errors import SluiceError
from sluice.passes.graph.onnx_file import without_defaults
from sluice.passes.graph.onnx_graph import OnnxGraph, reads

__all__ = ["constants_to_initializers", "graphs_in", "names_in", "plain", "with_fixed", "without_unread"]


def plain(model: onnx.ModelProto, *, keep: bool) -> onnx.ModelProto:
    """The model after the rules 1, 2, 3 and 5.

    Args:
        keep: leave the model as it is, and change a copy.
    """
    done = onnx.inliner.inline_local_functions(model) if model.functions else model
    if keep and done is model:
        done = onnx.ModelProto()
        done.CopyFrom(model)
    constants_to_initializers(done.graph)
    lift_initializers(done.graph)
    done = without_defaults(done)
    name_open_sizes(done)
    return done


def constants_to_initializers(graph: onnx.GraphProto) -> None:
    """Rule 2, in place."""
    read, outputs, kept = OnnxGraph(graph), {info.name for info in graph.output}, []
    for node in graph.node:
        array = read.array(node.output[0]) if node.op_type == "Constant" and node.output[0] not in outputs else None
        if array is None or array.dtype == object:
            kept.append(node)
            continue
        graph.initializer.append(numpy_helper.from_array(array, node.output[0]))
    del graph.node[:]
    graph.node.extend(kept)


def lift_initializers(graph: onnx.GraphProto) -> None:
    """Move what control flow holds inside to the graph around it, in place; names that stand twice stay."""
    inner = [part for part in graphs_in(graph) if part is not graph]
    names = Counter(name for part in (graph, *inner) for name in names_in(part))
    for part in reversed(inner):  # innermost first, as a graph around it is written anew
        alone = onnx.GraphProto(output=part.output, initializer=part.initializer)
        alone.node.extend(node for node in part.node if node.op_type == "Constant" and names[node.output[0]] == 1)
        constants_to_initializers(alone)
        outputs = {info.name for info in part.output}
        lifted = {init.name for init in alone.initializer if names[init.name] == 1 and init.name not in outputs}
        graph.initializer.extend(init for init in alone.initializer if init.name in lifted)
        kept = [init for init in part.initializer if init.name not in lifted]
        nodes = [node for node in part.node if node.output[0] not in lifted]
        del part.initializer[:], part.node[:]
        part.initializer.extend(kept)
        part.node.extend(nodes)


def names_in(graph: onnx.GraphProto) -> Iterator[str]:
    """The values that a graph makes or holds."""
    yield from (init.name for init in graph.initializer)
    yield from (name for node in graph.node for name in node.output if name)


def without_unread(graph: onnx.GraphProto) -> None:
    """Drop initialisers that nothing reads, in place."""
    used = {name for node in graph.node for name in reads(node)} | {info.name for info in graph.output}
    for place, init in reversed(list(enumerate(graph.initializer))):  # what stays is not copied
        if init.name not in used:
            del graph.initializer[place]


def name_open_sizes(model: onnx.ModelProto) -> None:
    """Rule 5, in place; first axes without a name are taken for the same batch."""
    for name, info in OnnxGraph(model).inputs.items():
        for axis, dim in enumerate(info.type.tensor_type.shape.dim):
            if dim.HasField("dim_value") and dim.dim_value <= 0:
                dim.Clear()
            if not dim.HasField("dim_value") and dim.dim_param in ("", "?"):
                dim.dim_param = f"{name}.{axis}" if axis else "batch.0"


def with_fixed(model: onnx.ModelProto, fixed: Mapping[str, float]) -> None:
    """Fix inputs of one number, or open sizes by their name, in place (rule 4).

    Raises:
        SluiceError: no input and no open size has that name, or the input takes more than one number.
    """
    inputs = OnnxGraph(model).inputs
    for name, value in fixed.items():
        if name in inputs:
            _fix_input(model, inputs[name], value)
            continue
        dims = [d for info in inputs.values() for d in info.type.tensor_type.shape.dim if d.dim_param == name]
        if not dims or value != int(value):
            sizes = sorted({d.dim_param for i in inputs.values() for d in i.type.tensor_type.shape.dim if d.dim_param})
            raise SluiceError(
                f"nothing called {name!r} can be fixed at {value}; the inputs are {sorted(inputs)}, the open sizes "
                f"{sizes}"
            )
        for dim in dims:
            dim.dim_value = int(value)


def _fix_input(model: onnx.ModelProto, info: onnx.ValueInfoProto, value: float) -> None:
    tensor = info.type.tensor_type
    sizes = [dim.dim_value if dim.HasField("dim_value") else 1 for dim in tensor.shape.dim]
    if any(size != 1 for size in sizes):
        raise SluiceError(f"input {info.name!r} has shape {sizes}, so no one number fixes it; feed it instead")
    name = OnnxGraph(model).fresh(f"{info.name}.fixed")
    array = np.full(sizes, value, dtype=onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))
    model.graph.initializer.append(numpy_helper.from_array(array, name))
    for graph in graphs_in(model.graph):
        for node in graph.node:
            for index, read in enumerate(node.input):
                if read == info.name:
                    node.input[index] = name


def graphs_in(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph, and all that lie inside its control flow."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from graphs_in(inner)
