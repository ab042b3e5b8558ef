"""fp16 and bf16: an fp32 network rewritten so that it is strongly typed in 16 bits. numpy and onnx only.

*Strongly typed*: the graph says the type of every value, as TensorRT 11 demands.

1. Batch norms are folded first, in float64, since 16 bits hold their statistics worst of all tensors.
2. Then every float32 tensor is stored in 16 bits, and so is every result of an operator.
3. The operators' own schemas say which operands stay float32 (the scales of ``Resize``, all of ``Range``). A constant
   is kept as it is, a computed value gets a ``Cast`` in front of the operator, and another behind it where 16 bits are
   read. Operators that runtimes lack get the same casts.
4. A network keeps float32 inputs and outputs, with a ``Cast`` next to them: the file takes the place of the fp32 one
   under the same code, and numpy knows no bfloat16. A *part* of a network has 16-bit borders, since no cast stands
   there inside the network.
5. Constants that 16 bits cannot hold: infinities and, where they are masks, limits or epsilons, numbers beyond the
   largest (-3.4e38) become the largest, so that a row masked as a whole does not give NaN; a scalar that would vanish
   (an epsilon) becomes the smallest number above zero. A weight beyond the largest number is refused. Any other
   operator that reads such a constant stays float32 (rule 7).
6. bfloat16 convolutions exist from opset 22 on, so such networks are converted to it.
7. Arithmetic on integers, on constants that 16 bits cannot hold and on sums of squares stays float32
   (`sluice.passes.precision.keep_float32`). Where such a value meets the rest of the network, it is rounded like a
   mask: beyond the largest number it becomes the largest.
8. An initialiser that is an output of the network stays float32 under its name.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper, version_converter

from sluice.core.errors import SluiceError
from sluice.passes.graph.onnx_graph import OnnxGraph, attributes
from sluice.passes.graph.operators import onnx_with
from sluice.passes.precision.fold import fold_batch_norms
from sluice.passes.precision.keep_float32 import stays_float32
from sluice.passes.precision.qdq_placement import WEIGHTED

__all__ = ["LEAST_OPSET", "at_opset", "to_half"]

LEAST_OPSET = 13  # before, operators say less about their types, and there are no scales per channel


@dataclass(frozen=True, slots=True)
class _Half:
    """A 16-bit type: its number in ONNX, its name in schemas, its numpy type, the least opset with its layers, and the
    operators that runtimes lack in it although the schema allows them."""

    code: int
    text: str
    dtype: np.dtype
    opset: int
    missing: frozenset[str] = frozenset()


_HALVES = {
    "fp16": _Half(TensorProto.FLOAT16, "tensor(float16)", np.dtype(np.float16), LEAST_OPSET),
    # TensorRT parses a bfloat16 deconvolution and then has no kernel for it; the activations it does not parse.
    "bf16": _Half(
        TensorProto.BFLOAT16,
        "tensor(bfloat16)",
        np.dtype(ml_dtypes.bfloat16),
        22,
        onnx_with("no_bf16"),
    ),
}


def to_half(model: onnx.ModelProto, precision: str, *, part: bool = False) -> onnx.ModelProto:
    """An fp32 network in ``fp16`` or ``bf16``; arguments as of `sluice.passes.precision.to_precision.to_precision`.

    Raises:
        SluiceError: an operator's types are not known, it holds a graph, or a weight is too large.
    """
    half = _HALVES[precision]
    done = at_opset(fold_batch_norms(model), half.opset)
    _Narrower(done, precision, half).narrow(part)
    onnx.checker.check_model(done, full_check=True)
    return done


def at_opset(model: onnx.ModelProto, least: int) -> onnx.ModelProto:
    """The model in an opset not below ``least``.

    Raises:
        onnx.version_converter.ConvertError: an operator cannot be converted.
    """
    version = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    if version >= least:
        return model
    try:
        done = version_converter.convert_version(model, least)
    except RuntimeError as error:  # raised by its adapters
        raise version_converter.ConvertError(str(error)) from error
    del done.metadata_props[:]
    done.metadata_props.extend(model.metadata_props)
    return done


class _Narrower:
    """Rewrites a graph in place. A value keeps its name if it has one type only."""

    def __init__(self, model: onnx.ModelProto, precision: str, half: _Half):
        self.graph, self.precision, self.half = model.graph, precision, half
        self.opsets = {o.domain or "ai.onnx": o.version for o in model.opset_import}
        _store_constants(self.graph)
        self.initial = OnnxGraph(self.graph).initializers
        inferred = OnnxGraph(onnx.shape_inference.infer_shapes(model))
        kinds = {name: info.type.tensor_type.elem_type for name, info in inferred.infos.items()}
        kinds.update({name: init.data_type for name, init in self.initial.items()})
        self.floats = {name for name, kind in kinds.items() if kind == TensorProto.FLOAT}
        self.narrow_name: dict[str, str] = {}
        self.wide_name: dict[str, str] = {}
        self.unrounded: set[str] = set()  # made in float32 and not in 16 bits yet
        self.kept = stays_float32(self.graph, kinds, half.dtype)

    def narrow(self, part: bool) -> None:
        nodes: list[onnx.NodeProto] = []
        for info in self.graph.input:
            if info.name in self.floats and info.name not in self.initial:
                if part:
                    info.type.tensor_type.elem_type = self.half.code
                else:
                    self.wide_name[info.name] = info.name
                    self.narrow_name[info.name] = f"{info.name}:{self.precision}"
                    nodes.append(self.cast(info.name, self.narrow_name[info.name], self.half.code))
        made = OnnxGraph(self.graph).producers.keys()
        for info in self.graph.output:
            if info.name in self.floats and part and info.name not in self.initial:
                info.type.tensor_type.elem_type = self.half.code
            elif info.name in self.floats:
                self.narrow_name[info.name] = f"{info.name}:{self.precision}"
                if info.name in self.initial:
                    self.wide_name[info.name] = info.name
        finals = [info.name for info in self.graph.output if info.name in self.floats & made]
        for node in self.graph.node:
            self.rewrite(node, nodes, () if part else finals)
        for name in finals:
            if part:
                self.narrow_value(name, nodes)
            elif self.wide_name.get(name) != name:
                nodes.append(self.cast(self.narrow_name[name], name, TensorProto.FLOAT))
        read = {name for node in nodes for name in node.input} | {info.name for info in self.graph.output}
        initializers = [tensor for init in self.graph.initializer for tensor in self.stored(init, read)]
        renamed = self.narrow_name.keys() | self.wide_name.keys()
        infos = [info for info in self.graph.value_info if info.name not in renamed]
        for info in infos:
            if info.name in self.floats:
                info.type.tensor_type.elem_type = self.half.code
        del self.graph.node[:], self.graph.value_info[:], self.graph.initializer[:]
        self.graph.initializer.extend(initializers)
        self.graph.node.extend(nodes)
        self.graph.value_info.extend(infos)

    def rewrite(self, node: onnx.NodeProto, nodes: list[onnx.NodeProto], finals: Collection[str]) -> None:
        """Append ``node`` with operands of the types that its schema allows, and casts around it where needed."""
        schema = self.schema(node)
        kept = node.output[0] in self.kept
        for attribute in () if kept else node.attribute:
            if attribute.name in ("to", "dtype") and attribute.i == TensorProto.FLOAT:
                attribute.i = self.half.code
            elif attribute.name == "value" and attribute.t.data_type == TensorProto.FLOAT:
                attribute.t.CopyFrom(numpy_helper.from_array(self.rounded(numpy_helper.to_array(attribute.t)), ""))
        for index, name in enumerate(node.input):
            if name not in self.floats:
                continue
            if not kept and self.allowed(schema, schema.inputs, index):
                if node.op_type in WEIGHTED and index:
                    self.check_weight(name)
                node.input[index] = self.narrow_value(name, nodes)
            else:
                node.input[index] = self.wide(name, nodes)
        nodes.append(node)
        for index, name in enumerate(node.output):
            if name not in self.floats:
                continue
            if not kept and self.allowed(schema, schema.outputs, index):
                node.output[index] = self.narrow_name.get(name, name)
            else:
                node.output[index] = self.wide_name[name] = name if name in finals else f"{name}:fp32"
                self.unrounded.add(name)

    def schema(self, node: onnx.NodeProto) -> onnx.defs.OpSchema:
        domain = node.domain or "ai.onnx"
        if any(a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for a in node.attribute):
            raise SluiceError(
                f"{node.op_type} ({node.output[0]}) holds a graph of its own, which cannot be written in "
                f"{self.precision}; export the model without data-dependent control flow"
            )
        try:
            return onnx.defs.get_schema(node.op_type, self.opsets.get(domain, 1), "" if domain == "ai.onnx" else domain)
        except onnx.defs.SchemaError as error:
            raise SluiceError(
                f"the types of operator {domain}.{node.op_type} ({node.output[0]}) are not known, so it cannot be "
                f"written in {self.precision}; replace that operator in the model"
            ) from error

    def allowed(
        self, schema: onnx.defs.OpSchema, slots: Sequence[onnx.defs.OpSchema.FormalParameter], index: int
    ) -> bool:
        """Whether the schema takes 16 bits in the slot; a last variadic slot stands for all that follow."""
        if schema.name in self.half.missing:
            return False
        kind = slots[min(index, len(slots) - 1)].type_str
        constraint = next((c for c in schema.type_constraints if c.type_param_str == kind), None)
        return constraint is not None and self.half.text in constraint.allowed_type_strs

    def wide(self, name: str, nodes: list[onnx.NodeProto]) -> str:
        """The name of a value in float32, made where there is none yet."""
        if name not in self.wide_name:
            self.wide_name[name] = f"{name}:fp32"
            if name not in self.initial:
                nodes.append(self.cast(self.narrow_name.get(name, name), f"{name}:fp32", TensorProto.FLOAT))
        return self.wide_name[name]

    def narrow_value(self, name: str, nodes: list[onnx.NodeProto]) -> str:
        """The name of a value in 16 bits, made where there is none yet."""
        narrow = self.narrow_name.get(name, name)
        if name in self.unrounded:
            self.unrounded.remove(name)
            source = self.wide_name[name]
            if name in self.kept:
                nodes.append(helper.make_node("Clip", [source, *self.bounds()], [f"{name}:clipped"]))
                source = f"{name}:clipped"
            nodes.append(self.cast(source, narrow, self.half.code))
        return narrow

    def bounds(self) -> list[str]:
        """Initialisers of the least and the largest number, in float32."""
        info = ml_dtypes.finfo(self.half.dtype)
        names = [f"{self.precision}:min", f"{self.precision}:max"]
        there = OnnxGraph(self.graph).initializers
        for name, value in zip(names, (info.min, info.max), strict=True):
            if name not in there:
                self.graph.initializer.append(numpy_helper.from_array(np.asarray(value, np.float32), name))
        return names

    def cast(self, source: str, target: str, code: int) -> onnx.NodeProto:
        return helper.make_node("Cast", [source], [target], to=code)

    def stored(self, init: onnx.TensorProto, read: set[str]) -> list[onnx.TensorProto]:
        """An initialiser in the types that are read (rules 3 and 8)."""
        if init.name not in self.initial.keys() & self.floats:
            return [init]
        array = numpy_helper.to_array(init)
        kept = []
        wide, narrow = self.wide_name.get(init.name), self.narrow_name.get(init.name, init.name)
        if wide in read:
            kept.append(numpy_helper.from_array(array, wide))
        if narrow in read:
            kept.append(numpy_helper.from_array(self.rounded(array), narrow))
        return kept

    def rounded(self, array: np.ndarray) -> np.ndarray:
        """Rule 5."""
        info = ml_dtypes.finfo(self.half.dtype)
        narrow = np.clip(array, float(info.min), float(info.max)).astype(self.half.dtype)
        if array.size == 1 and np.any(array) and not np.any(narrow.astype(np.float32)):
            narrow = np.copysign(np.asarray(info.smallest_subnormal, np.float32), array).astype(self.half.dtype)
        return narrow

    def check_weight(self, name: str) -> None:
        if name in self.initial:
            largest = float(np.abs(numpy_helper.to_array(self.initial[name])).max(initial=0))
            if largest > float(ml_dtypes.finfo(self.half.dtype).max):
                raise SluiceError(
                    f"weight {name!r} holds values of up to {largest:.3g}, more than {self.precision} can; "
                    f"choose bf16 or fp32"
                )


def _store_constants(graph: onnx.GraphProto) -> None:
    """Constant nodes as initialisers: a cast behind a constant would hide from runtimes that it is one."""
    for node in list(graph.node):
        if node.op_type != "Constant" or "sparse_value" in attributes(node):
            continue
        ((kind, value),) = attributes(node).items()
        if kind != "value":
            dtype = {
                "value_float": np.float32,
                "value_floats": np.float32,
                "value_int": np.int64,
                "value_ints": np.int64,
            }
            value = numpy_helper.from_array(np.array(value, dtype.get(kind, object)))
        tensor = graph.initializer.add()
        tensor.CopyFrom(value)
        tensor.name = node.output[0]
        graph.node.remove(node)
