"""One reader of ONNX graphs, `OnnxGraph`, and every size at one batch.

Sizes are inferred from the operators. A shape that inference does not find stays as the exporter wrote it, if the batch
makes all its sizes known.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from sluice.core.errors import SluiceError

__all__ = [
    "INTEGERS",
    "LITERAL",
    "SIZES",
    "Observed",
    "OnnxGraph",
    "attributes",
    "hollow",
    "infer_checked",
    "infer_weightless",
    "is_hollow",
    "is_whole_shape",
    "reads",
    "rename_reads",
    "say_sizes",
    "sizes_of",
    "weightless",
    "with_batch",
]

INTEGERS = (onnx.TensorProto.INT64, onnx.TensorProto.INT32)
SIZES = "sluice.sizes"
Observed = tuple[int, list[tuple[int, int]]]  # element type, and by axis (a, b): a + b * batch entries
LITERAL = 1024  # elements; a shape, a scale or a list of axes has no more


def say_sizes(model: onnx.ModelProto, sizes: Mapping[str, int], shapes: Mapping[str, Observed] | None = None) -> None:
    """Say, in place, the sizes of open dimensions beside the batch, and shapes that inference does not find."""
    rest = [entry for entry in model.metadata_props if entry.key != SIZES]
    del model.metadata_props[:]
    model.metadata_props.extend(rest)
    if sizes or shapes:
        model.metadata_props.add(key=SIZES, value=json.dumps({"sizes": dict(sizes), "shapes": dict(shapes or {})}))


def hollow(model: onnx.ModelProto, which: Collection[str] | None = None) -> onnx.ModelProto:
    """A copy for questions of sizes: large tensors of floats have a type and a shape, and no numbers.

    Args:
        which: those that lose them; all of them by default.
    """
    done, graph = onnx.ModelProto(), model.graph
    for field, value in model.ListFields():
        if field.name == "graph":
            continue
        if isinstance(value, (int, str)):
            setattr(done, field.name, value)
        else:
            getattr(done, field.name).extend(value)
    done.graph.name = graph.name
    for name in ("node", "input", "output", "value_info"):
        getattr(done.graph, name).extend(getattr(graph, name))
    for init in graph.initializer:
        told = math.prod(init.dims) <= LITERAL or init.data_type in INTEGERS
        if told or (which is not None and init.name not in which):
            done.graph.initializer.append(init)
        else:
            done.graph.initializer.add(name=init.name, data_type=init.data_type, dims=init.dims)
    return done


def is_hollow(tensor: onnx.TensorProto) -> bool:
    """Whether only name, type and shape are set."""
    return not tensor.HasField("raw_data") and {f.name for f, _ in tensor.ListFields()} == {"name", "data_type", "dims"}


def sizes_of(model: onnx.ModelProto) -> tuple[dict[str, int], dict[str, Observed]]:
    """What `say_sizes` said."""
    for entry in model.metadata_props:
        if entry.key == SIZES:
            said = json.loads(entry.value)
            return said["sizes"], said["shapes"]
    return {}, {}


def with_batch(model: onnx.ModelProto, batch: int) -> onnx.ModelProto:
    """A copy at one static batch with every size inferred that can be."""
    known = {info.name: info for info in model.graph.value_info}
    sizes, shapes = sizes_of(model)
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for info in copy.graph.input:
        for dim in info.type.tensor_type.shape.dim:
            if not dim.HasField("dim_value"):
                dim.dim_value = sizes.get(dim.dim_param, batch)
    del copy.graph.value_info[:]
    for info in copy.graph.output:
        for dim in info.type.tensor_type.shape.dim:
            if not dim.HasField("dim_value"):
                dim.Clear()
    for name, (kind, dims) in shapes.items():
        known[name] = helper.make_tensor_value_info(name, kind, [a + b * batch for a, b in dims])
    try:
        _infer(copy)
    except onnx.shape_inference.InferenceError as error:
        raise SluiceError(f"the ONNX graph is not well typed: {error}; export it again") from None
    symbols = {d.dim_param for i in model.graph.input for d in i.type.tensor_type.shape.dim if d.dim_param}
    inferred = {info.name: info for info in (*copy.graph.value_info, *copy.graph.output)}
    for name, info in known.items():  # shapes that inference did not find, as the exporter wrote them
        found = inferred.get(name)
        if found is not None and _is_static(found):
            continue
        dims = info.type.tensor_type.shape.dim
        if info.type.tensor_type.HasField("shape") and all(
            d.HasField("dim_value") or d.dim_param in symbols for d in dims
        ):
            if found is None:
                found = copy.graph.value_info.add()
            found.CopyFrom(info)
            for dim in found.type.tensor_type.shape.dim:
                if not dim.HasField("dim_value"):
                    dim.dim_value = sizes.get(dim.dim_param, batch)
    return copy


def _is_static(info: onnx.ValueInfoProto) -> bool:
    tensor = info.type.tensor_type
    return tensor.HasField("shape") and all(dim.HasField("dim_value") for dim in tensor.shape.dim)


def _infer(model: onnx.ModelProto) -> None:
    """Infer all shapes, in place."""
    inferred = infer_weightless(model)
    model.graph.value_info.extend(inferred.value_info)
    del model.graph.output[:]
    model.graph.output.extend(inferred.output)


def infer_weightless(model: onnx.ModelProto) -> onnx.GraphProto:
    """The graph without its weights and with all shapes inferred."""
    return onnx.shape_inference.infer_shapes(weightless(model), strict_mode=True, data_prop=True).graph


def infer_checked(model: onnx.ModelProto) -> None:
    """Infer all shapes in place, strictly, and check what that gives; shapes that nothing infers stay as they were.

    Raises:
        onnx.shape_inference.InferenceError, onnx.checker.ValidationError: the graph is not well typed.
    """
    inferred = infer_weightless(model)
    found = {info.name for info in (*inferred.value_info, *inferred.output)}
    made = {name for node in model.graph.node for name in node.output} - found
    kept = [info for info in model.graph.value_info if info.name in made]
    for field, items in (("value_info", [*inferred.value_info, *kept]), ("output", inferred.output)):
        del getattr(model.graph, field)[:]
        getattr(model.graph, field).extend(items)
    onnx.checker.check_model(weightless(model), full_check=True)


def weightless(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with its weights as inputs, for inference and checks.

    Both serialise the whole model. Weights are nearly all of the bytes, and only their types and shapes count.
    """
    skeleton = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions)
    skeleton.graph.name = model.graph.name
    skeleton.graph.node.extend(model.graph.node)
    skeleton.graph.input.extend(model.graph.input)
    skeleton.graph.output.extend(model.graph.output)
    given = {info.name for info in model.graph.input}
    for init in model.graph.initializer:
        if math.prod(init.dims) <= LITERAL or init.name in given:
            skeleton.graph.initializer.append(init)
        else:
            skeleton.graph.input.append(helper.make_tensor_value_info(init.name, init.data_type, init.dims))
    return skeleton


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def is_whole_shape(node: onnx.NodeProto) -> bool:
    """Does the node tell all sizes of its input?"""
    a = attributes(node)
    return node.op_type == "Shape" and not a.get("start", 0) and "end" not in a


def reads(node: onnx.NodeProto) -> Iterator[str]:
    """The values that a node reads, once for every use, bodies of control flow included."""
    yield from node.input
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            for inner in graph.node:
                yield from (name for name in reads(inner) if name)


def rename_reads(node: onnx.NodeProto, called: Callable[[str], str]) -> None:
    """Give the values that a node reads other names, in place; what a body of control flow makes itself keeps its."""
    node.input[:] = [called(name) for name in node.input]
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            made = {name for inner in graph.node for name in inner.output}
            own = made.union(*({item.name for item in items} for items in (graph.input, graph.initializer)))
            for inner in graph.node:
                rename_reads(inner, lambda name, own=own: name if name in own else called(name))  # type: ignore[misc]


class OnnxGraph:
    """Maps of a graph by the name of the value; each is made when it is first used.

    The maps hold the graph's own messages, and later additions are not in them. Only `fresh` remembers: it never gives
    a name twice. A rewriter keeps to the maps of before, or updates them.
    """

    def __init__(self, graph: onnx.ModelProto | onnx.GraphProto):
        self.graph = graph.graph if isinstance(graph, onnx.ModelProto) else graph

    @cached_property
    def initializers(self) -> dict[str, onnx.TensorProto]:
        return {init.name: init for init in self.graph.initializer}

    @cached_property
    def inputs(self) -> dict[str, onnx.ValueInfoProto]:
        """The inputs that must be fed, in order; old files list initialisers among their inputs too."""
        return {info.name: info for info in self.graph.input if info.name not in self.initializers}

    @cached_property
    def outputs(self) -> dict[str, onnx.ValueInfoProto]:
        return {info.name: info for info in self.graph.output}

    @cached_property
    def infos(self) -> dict[str, onnx.ValueInfoProto]:
        """Types and sizes of values, as far as the file tells them."""
        graph = self.graph
        return {info.name: info for info in [*graph.input, *graph.value_info, *graph.output]}

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of `infos` that are known; a value with an open size has none."""
        found: dict[str, tuple[int, ...]] = {}
        for name, info in self.infos.items():
            if _is_static(info):
                found[name] = tuple(dim.dim_value for dim in info.type.tensor_type.shape.dim)
        return found

    @cached_property
    def producers(self) -> dict[str, onnx.NodeProto]:
        """The node that makes a value."""
        return {name: node for node in self.graph.node for name in node.output if name}

    @cached_property
    def readers(self) -> dict[str, list[onnx.NodeProto]]:
        """The nodes that read a value in order, one entry per use, bodies of control flow included."""
        found: dict[str, list[onnx.NodeProto]] = {}
        for node in self.graph.node:
            for name in filter(None, reads(node)):
                found.setdefault(name, []).append(node)
        return found

    def uses(self, name: str) -> int:
        """How often a value is read; being an output of the graph counts."""
        return len(self.readers.get(name, ())) + (name in self.outputs)

    def is_constant(self, name: str) -> bool:
        """Is the value an initialiser, or made by a Constant node?"""
        return name in self.initializers or (name in self.producers and self.producers[name].op_type == "Constant")

    def array(self, name: str) -> np.ndarray | None:
        """The numbers of a constant, an initialiser or a Constant node's output; None for any other value."""
        if name in self.initializers:
            return numpy_helper.to_array(self.initializers[name])
        node = self.producers.get(name)
        if node is None or node.op_type != "Constant":
            return None
        value = next(iter(attributes(node).values()))
        return numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.asarray(value)

    def scalar(self, name: str) -> float | None:
        """The number that a constant of one entry is; None for any other value."""
        init = self.initializers.get(name)
        if init is not None and math.prod(init.dims) != 1:
            return None
        array = self.array(name)
        return None if array is None or array.size != 1 else float(array.reshape(-1)[0])

    @cached_property
    def literals(self) -> dict[str, np.ndarray]:
        """Constants that may describe shapes: integer initialisers, and all Constant nodes."""
        names = [name for name, init in self.initializers.items() if init.data_type in INTEGERS]
        names += [node.output[0] for node in self.graph.node if node.op_type == "Constant"]
        return {name: array for name in names if (array := self.array(name)) is not None}

    @cached_property
    def _taken(self) -> set[str]:
        return {*self.initializers, *self.infos, *self.producers}

    def is_taken(self, name: str) -> bool:
        return name in self._taken

    def fresh(self, stem: str) -> str:
        """A name that no value has, ``stem`` if it is free; it is taken from then on."""
        while stem in self._taken:
            stem += "_"
        self._taken.add(stem)
        return stem
