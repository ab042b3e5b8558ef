"""An ONNX file as a module that can be trained: its parameters are the file's weights, by name.

1. Operators run one after another as `sluice.runtime.torch_cuda.ops` has them, on the CPU; sizes are computed anew in
   every run, so what is open in the file is open in the module.
2. Trained are the initializers of 32-bit floats with several entries, but for numbers that say how to compute and the
   statistics of batch norms, which stay as they are. So a norm is the affine map that it is in the file.
3. `weights` puts the values back into a file by the names of its initializers.

Of the 41 files of `benchmarks.wild` in fp32 the operators compute 35 as ONNX Runtime does, all but those with control
flow, lengths of sequences or outputs that are hardly more than rounding. onnx2torch 1.5.15 computes 10: it has no
recurrent layers, and several operators in older versions alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx
from onnx import numpy_helper
from torch import Tensor, nn

from sluice.core.errors import SluiceError, first_line
from sluice.runtime.torch_cuda.ops import OPS
from sluice.runtime.torch_cuda.program import SIZES, Step, attributes_of, check_operators, size_of, to_tensor

__all__ = ["FileModule"]

STATISTICS = {"BatchNormalization": (3, 4)}


@dataclass(frozen=True, slots=True, eq=False)
class _Size:
    """A Shape or a Size."""

    node: onnx.NodeProto
    outputs: tuple[str, ...]
    drop: tuple[str, ...] = ()


class FileModule(nn.Module):
    """The module of a model as `sluice.passes.files.read` reads it.

    Raises:
        SluiceError: an operator has no counterpart in torch.
    """

    def __init__(self, model: onnx.ModelProto, where: str = "the file") -> None:
        super().__init__()
        check_operators(model, where)
        arrays = {init.name: numpy_helper.to_array(init) for init in model.graph.initializer}
        trained = _trained(model, arrays)
        self._constants = {name: to_tensor(value) for name, value in arrays.items() if name not in trained}
        self._trained = {name: nn.Parameter(to_tensor(arrays[name])) for name in trained}
        for k, parameter in enumerate(self._trained.values()):  # names of tensors may have dots
            self.register_parameter(f"weight{k}", parameter)
        self._outputs, self._where = tuple(info.name for info in model.graph.output), where
        self._steps = _steps(model, {*arrays, *self._outputs})

    def forward(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs by name for inputs by name."""
        values: dict[str, Tensor] = {**self._constants, **self._trained, **feeds}
        for step in self._steps:
            if isinstance(step, _Size):
                values[step.outputs[0]] = size_of(step.node, values[step.node.input[0]].shape)
            else:
                for name, value in zip(step.outputs, self._run(step, values), strict=False):
                    values[name] = value
            for name in step.drop:
                values.pop(name, None)
        return {name: values[name] for name in self._outputs}

    def _run(self, step: Step, values: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        try:
            return step.run(values)
        except (SluiceError, RuntimeError, ValueError, IndexError, KeyError) as error:
            raise SluiceError(
                f"{step.outputs[0]!r} of {self._where} cannot be computed in torch: {first_line(error)}; "
                "leave out steps"
            ) from error

    def weights(self) -> dict[str, np.ndarray]:
        """The trained tensors by the names of the initializers."""
        return {name: parameter.detach().numpy().copy() for name, parameter in self._trained.items()}


def _trained(model: onnx.ModelProto, arrays: Mapping[str, np.ndarray]) -> list[str]:
    """Rule 2."""
    found = {name for name, value in arrays.items() if value.dtype == np.float32 and value.size > 1}
    for node in model.graph.node:
        fixed = {*STATISTICS.get(node.op_type, ()), *(OPS[node.op_type].numbers if node.op_type in OPS else ())}
        found -= {name for k, name in enumerate(node.input) if k in fixed}
    return sorted(found)


def _steps(model: onnx.ModelProto, kept: set[str]) -> list[Step | _Size]:
    """Every operator, and what nobody reads behind it; ``kept`` stays."""
    steps, left = list[Step | _Size](), Counter(name for node in model.graph.node for name in node.input)
    for node in model.graph.node:
        step: Step | _Size
        if node.op_type in SIZES:
            step = _Size(node, tuple(node.output))
        else:
            bound = {k: None for k, name in enumerate(node.input) if not name}
            step = Step(OPS[node.op_type], attributes_of(node), tuple(node.input), tuple(node.output), bound)
        left.subtract(node.input)
        gone = {*node.input, *node.output} - kept
        steps.append(replace(step, drop=tuple(sorted(name for name in gone if name and not left[name]))))
    return steps
