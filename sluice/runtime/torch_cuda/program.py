"""An ONNX graph as a torch program: work that depends on sizes alone is done once, when the program is built.

1. The graph is walked once with data of the static shapes. A value is *known* if it follows from constants and sizes
   (initialisers, ``Shape`` of anything, and values computed from those): it is computed on the host, once. All other
   nodes become *steps*, with the known values that they need bound to them, on the device. So a captured program holds
   tensor work only.
2. A batch norm that alone reads a convolution is folded into its weights, as deployment runtimes do:
   ``w * s / sqrt(v + eps)`` and ``(b - m) * s / sqrt(v + eps) + shift``.
3. Images and convolution weights are laid out with channels last: tensor cores compute in that layout, so a
   deployment in torch would choose it. It is a property of the deployment that is timed, as the precision is. torch
   reads a layout from the strides, so the strides are set, also where one channel leaves the data as they are.
4. A value lives until its last reader has run, so the memory of a program is that of its widest moment.
5. Quantised graphs are refused: torch has no int8 convolution for a GPU, and the time of an emulation in floating point
   is the time of another network.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from sluice.core.errors import SluiceError, first_line
from sluice.runtime.torch_cuda.ops import OPS, Op

if TYPE_CHECKING:
    import onnx
    import torch
    from torch import Tensor

__all__ = [
    "SIZES",
    "Step",
    "TorchProgram",
    "attributes_of",
    "build_program",
    "check_operators",
    "size_of",
    "to_numpy",
    "to_tensor",
]

OLDEST = 13  # before, softmax flattened its operand and axes were attributes
STANDARD = ("", "ai.onnx")
SIZES = ("Shape", "Size")
QUANTISED = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul")


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One operator. ``bound``: known operands by position; ``drop``: values that nobody reads after this step."""

    op: Op
    attributes: Mapping[str, Any]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    bound: Mapping[int, Tensor | None]
    drop: tuple[str, ...] = ()

    def run(self, values: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        operands = [self.bound[k] if k in self.bound else values[name] for k, name in enumerate(self.inputs)]
        found = self.op.run(operands, self.attributes)
        return found if isinstance(found, tuple) else (found,)


@dataclass(frozen=True, slots=True, eq=False)
class TorchProgram:
    """Steps in order; ``known`` are outputs that do not depend on the inputs."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    steps: tuple[Step, ...]
    known: Mapping[str, Tensor]

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Outputs in order for inputs in order, with the layout that `laid_out` gives."""
        values = {**self.known, **dict(zip(self.inputs, inputs, strict=True))}
        for step in self.steps:
            for name, value in zip(step.outputs, step.run(values), strict=False):
                values[name] = value
            for name in step.drop:
                del values[name]
        return [values[name] for name in self.outputs]


def check_operators(model: onnx.ModelProto, where: str) -> None:
    """`SluiceError` that names operator and node where torch cannot do the model."""
    version = next((o.version for o in model.opset_import if o.domain in STANDARD), 0)
    if version < OLDEST:
        raise SluiceError(f"{where} is of ONNX opset {version}; export it with opset {OLDEST} or later")
    for node in model.graph.node:
        if node.op_type in QUANTISED:
            raise SluiceError(
                f"torch has no int8 kernels for {_called(node)} of {where}; deploy int8 with TensorRT, or choose fp16"
            )
        if (node.op_type not in OPS and node.op_type not in SIZES) or node.domain not in STANDARD:
            raise SluiceError(
                f"{_called(node)} of {where} has no counterpart in torch; use another target, or replace that operator"
            )


def build_program(
    model: onnx.ModelProto, inputs: Mapping[str, Tensor], device: torch.device, where: str = "the model"
) -> TorchProgram:
    """The program of ``model`` for inputs of these shapes and types, which are on ``device``.

    Raises:
        SluiceError: an operator has no counterpart, cannot run as its attributes say, or takes sizes from data.
    """
    import torch

    check_operators(model, where)
    known = {init.name: _tensor(init) for init in model.graph.initializer}
    finals = {output.name for output in model.graph.output}
    placed: dict[str, Tensor] = {}
    values: dict[str, Tensor] = dict(inputs)
    shapes = {name: value.shape for name, value in inputs.items()}
    steps = []
    with torch.no_grad():
        nodes = _fold_norms(model.graph, known)
        last = {name: k for k, node in enumerate(nodes) if node.op_type not in SIZES for name in node.input}
        for k, node in enumerate(nodes):
            if node.op_type in SIZES:
                shape = known[node.input[0]].shape if node.input[0] in known else shapes[node.input[0]]
                known[node.output[0]] = size_of(node, shape)
                continue
            step = _step(node, known, placed, device, where)
            found = _first(step, node, values, where)
            if len(step.bound) == len(step.inputs):
                known.update(zip(step.outputs, found, strict=False))
                continue
            values.update(zip(step.outputs, found, strict=False))
            shapes.update({name: values[name].shape for name in step.outputs if name})
            read = {name for name in (*step.inputs, *step.outputs) if name in values}
            drop = tuple(sorted(name for name in read - finals if last.get(name, -1) <= k))
            steps.append(replace(step, drop=drop))
            for name in drop:
                del values[name]
        fixed = {name: laid_out(known[name].to(device)) for name in finals if name in known}
    outputs = tuple(output.name for output in model.graph.output)
    return TorchProgram(tuple(inputs), outputs, tuple(steps), fixed)


def size_of(node: onnx.NodeProto, shape: Sequence[int]) -> Tensor:
    """What a Shape or a Size gives of a value of this shape, on the host."""
    import torch

    if node.op_type == "Size":
        return torch.tensor(math.prod(shape), dtype=torch.int64)
    a = attributes_of(node)
    return torch.tensor(list(shape)[slice(a.get("start"), a.get("end"))], dtype=torch.int64)


def laid_out(value: Tensor) -> Tensor:
    """Rule 3."""
    import torch

    # Not contiguous(memory_format=...), which leaves the strides where a size of 1 lets them pass for either layout.
    return value.to(memory_format=torch.channels_last) if value.dim() == 4 else value.contiguous()


def to_tensor(array: np.ndarray) -> Tensor:
    """A tensor on the host with the array's values, bfloat16 included."""
    import torch

    if array.dtype.name == "bfloat16":
        return torch.from_numpy(np.array(array).view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))


def to_numpy(value: Tensor) -> np.ndarray:
    """An array with the tensor's values; bfloat16, which numpy does not have, as float32."""
    import torch

    host = value.detach().cpu()
    array: np.ndarray = (host.float() if host.dtype == torch.bfloat16 else host).numpy()
    return np.array(array, order="C")


def _step(
    node: onnx.NodeProto, known: Mapping[str, Tensor], placed: dict[str, Tensor], device: torch.device, where: str
) -> Step:
    """The node with its known operands bound: all of them on the host if there are no others.

    Else numbers stay on the host, and single values where the operator takes them from there; ``placed`` holds what has
    gone to the device.
    """
    op = OPS[node.op_type]
    bound: dict[int, Tensor | None] = {}
    on_host = all(name in known or not name for name in node.input)
    for i, name in enumerate(node.input):
        if not name:
            bound[i] = None
        elif name in known and (on_host or i in op.numbers or (op.scalars and known[name].dim() == 0)):
            bound[i] = known[name]
        elif name in known:
            if name not in placed:
                placed[name] = laid_out(known[name].to(device))
            bound[i] = placed[name]
        elif i in op.numbers:
            raise SluiceError(
                f"operand {i} ({name!r}) of {_called(node)} of {where} depends on the data; sizes must be fixed when "
                f"the network is built"
            )
    return Step(op, attributes_of(node), tuple(node.input), tuple(node.output), bound)


def _first(step: Step, node: onnx.NodeProto, values: Mapping[str, Tensor], where: str) -> tuple[Tensor, ...]:
    """The step's outputs on the data at hand."""
    import torch

    try:
        found = step.run(values)
    except torch.OutOfMemoryError:
        raise
    except (SluiceError, RuntimeError, ValueError, IndexError, KeyError) as error:
        reason = first_line(error)
        raise SluiceError(f"{_called(node)} of {where} cannot run in torch: {reason}; use another target") from error
    surplus = [name for name in node.output[len(found) :] if name]
    if surplus:
        raise SluiceError(f"output {surplus[0]!r} of {_called(node)} of {where} is not supported; use another target")
    return found


def _fold_norms(graph: onnx.GraphProto, known: dict[str, Tensor]) -> list[onnx.NodeProto]:
    """The nodes with batch norms folded (rule 2); the folded weights join ``known`` under names of their own."""
    import onnx
    import torch

    readers = Counter(name for node in graph.node for name in node.input)
    readers.update(output.name for output in graph.output)
    convs = {node.output[0]: k for k, node in enumerate(graph.node) if node.op_type == "Conv"}
    nodes: list[onnx.NodeProto | None] = list(graph.node)
    for k, node in enumerate(graph.node):
        at = convs.get(node.input[0]) if node.op_type == "BatchNormalization" else None
        if at is None or readers[node.input[0]] > 1:
            continue
        conv = graph.node[at]
        if any(name not in known for name in (*conv.input[1:], *node.input[1:]) if name):
            continue
        weight, bias = known[conv.input[1]], known.get(conv.input[2]) if len(conv.input) > 2 else None
        scale, shift, mean, var = (known[name].double() for name in node.input[1:])
        ratio = scale / torch.sqrt(var + attributes_of(node).get("epsilon", 1e-5))
        names = [f"{node.output[0]}:weight", f"{node.output[0]}:bias"]
        known[names[0]] = (weight.double() * ratio.reshape(-1, *[1] * (weight.dim() - 1))).to(weight.dtype)
        known[names[1]] = (((0 if bias is None else bias.double()) - mean) * ratio + shift).to(weight.dtype)
        merged = onnx.NodeProto()
        merged.CopyFrom(conv)
        merged.input[:] = [conv.input[0], *names]
        merged.output[:] = node.output[:1]
        nodes[at], nodes[k] = merged, None
    return [node for node in nodes if node is not None]


def _tensor(init: onnx.TensorProto) -> Tensor:
    from onnx import numpy_helper

    return to_tensor(numpy_helper.to_array(init))


def attributes_of(node: onnx.NodeProto) -> dict[str, Any]:
    """Attributes by name, tensors and words as Python has them."""
    import onnx

    found: dict[str, Any] = {"outputs": len(node.output)} if node.op_type == "Split" else {}
    for attribute in node.attribute:
        value = onnx.helper.get_attribute_value(attribute)
        if isinstance(value, onnx.TensorProto):
            value = _tensor(value)
        found[attribute.name] = value.decode() if isinstance(value, bytes) else value
    return found


def _called(node: onnx.NodeProto) -> str:
    return f"{node.op_type} {node.name or node.output[0]!r}"
