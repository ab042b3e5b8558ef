"""The rounding check: a file in a narrow precision is the same network as one in fp32 if rounding explains its error.

The figure is the relative error of the narrow file's outputs (`sluice.runtime.base.compare`), the largest over a few
inputs.

1. *By rounding.* A rounded number is off by at most ``eps / 2`` of its size: ``eps`` is 2^-10 for fp16, 2^-7 for bf16,
   and for int8 1/127 of the largest weight of a channel, 1/64 where weights have 7 bits. Independent errors of n
   operators add up like a random walk. The error is the largest of many elements, behind layers that may amplify; a
   factor of 16 allows for both:

       error <= 16 sqrt(n) eps / 2

   In 25 networks of 5 to 142 operators, each in three precisions, the least sufficient factor was 0.8 in the median,
   5.4 in all but one, and 12 in that one, which ends with exp(2 x).
2. *By chance.* The fp32 network with the entries of every weight in random order has the same layers, sizes, biases and
   amplitudes, and is another network. The error by chance is the lesser of its error and 1, the error of outputs that
   are all zero. A file with an error above half of it never passes, whatever rule 1 allows. Where no order of entries
   makes a difference there is no such error, and rule 1 alone counts.
3. The ranges of int8 activations depend on data, and so does the error of rounding them; no bound holds for all inputs.
   So an int8 file is judged by its weights: each pair of ``QuantizeLinear`` and ``DequantizeLinear`` around an
   activation is taken out. The error of the file as it runs is stated as well, and decides nothing. An evaluation on
   data (`sluice.artifacts.deploy.as_module`) shows the accuracy that int8 costs.
4. Inputs are normal random numbers. For an int8 file as it runs, their deviation is a third of the largest number that
   the pair of its input holds, and they are cut off where the pair saturates.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from sluice.artifacts.in_precision import reference_session
from sluice.core.errors import SluiceError
from sluice.core.plan import InputSpec
from sluice.core.weight_bytes import Parked, parked
from sluice.passes.graph.onnx_graph import OnnxGraph, hollow
from sluice.passes.precision.emulation import emulated
from sluice.passes.precision.quantize import REDUCED_STEPS, STEPS
from sluice.runtime.base.compare import relative_error
from sluice.runtime.base.inputs import parsed

__all__ = [
    "RoundingCheck",
    "compare_precisions",
    "drawn",
    "input_ranges",
    "largest_error",
    "outputs_of",
    "refuse_another",
    "specs_at",
]

EPS = {"fp16": 2.0**-10, "bf16": 2.0**-7, "int8": 1 / STEPS}
REDUCED_EPS = 1 / REDUCED_STEPS
ROUNDINGS = 16.0
DRAWS = 2


@dataclass(frozen=True, slots=True)
class RoundingCheck:
    """Relative errors: of the narrow file, the largest of the same network, that by chance, and that as the file runs.

    The last differs from the first for int8 (rule 3).
    """

    error: float
    tolerance: float
    by_chance: float
    as_run: float

    @property
    def same(self) -> bool:
        return self.error <= self.tolerance

    def refusal(self, path: str | os.PathLike[str]) -> SluiceError:
        """What to say of a file that is another network."""
        return SluiceError(
            f"{os.fspath(path)} computes another network than the one in fp32: by its weights the relative error is "
            f"{self.error:.1e}, of which rounding explains {self.tolerance:.1e}; choose another precision"
        )


def refuse_another(
    path: str | os.PathLike[str], narrow: onnx.ModelProto, wide: onnx.ModelProto, precision: str, batch: int = 1
) -> None:
    """Raises `SluiceError` where the file at ``path`` is another network; one that cannot run here is let pass."""
    try:
        found = compare_precisions(narrow, wide, precision, specs_at(wide, batch))
    except SluiceError:
        return
    if not found.same:
        raise found.refusal(path)


def compare_precisions(
    narrow: onnx.ModelProto, wide: onnx.ModelProto, precision: str, specs: Sequence[InputSpec]
) -> RoundingCheck:
    """The rounding check of a file in ``precision`` against the one in fp32.

    Args:
        specs: shapes (batch included) and types of the inputs that both take, in order.
    Raises:
        SluiceError: one of them does not take these inputs, or they return tensors of other numbers or shapes.
    """
    feeds = [drawn(specs, seed) for seed in range(DRAWS)]
    want = list(outputs_of(wide, feeds))
    error = relative_error(list(outputs_of(emulated(_with_float_activations(narrow)), feeds)), want)
    eps = REDUCED_EPS if precision == "int8" and _has_reduced_range(narrow) else EPS[precision]
    tolerance, by_chance = largest_error(wide, eps, feeds, want)
    as_run = error
    if precision == "int8":
        within = [drawn(specs, seed, input_ranges(narrow)) for seed in range(DRAWS)]
        as_run = relative_error(list(outputs_of(narrow, within)), list(outputs_of(wide, within)))
    return RoundingCheck(error, tolerance, by_chance, as_run)


def largest_error(
    wide: onnx.ModelProto, eps: float, feeds: Sequence[Sequence[np.ndarray]], want: Sequence[Sequence[np.ndarray]]
) -> tuple[float, float]:
    """Rules 1 and 2: the largest relative error that still is the same network, and the error by chance.

    Args:
        want: outputs of ``wide`` for ``feeds``.
    """
    by_chance = min(relative_error(list(outputs_of(parked(shuffled(wide)), feeds)), want), 1.0)
    rounded = ROUNDINGS * math.sqrt(len(wide.graph.node)) * eps / 2
    return min(rounded, by_chance / 2) if by_chance else rounded, by_chance


def specs_at(model: onnx.ModelProto, batch: int) -> list[InputSpec]:
    """Shape and type of every input of a file, its batch and other free sizes being ``batch``."""
    found = []
    for name, info in OnnxGraph(model).inputs.items():
        kind = info.type.tensor_type
        shape = tuple(d.dim_value if d.HasField("dim_value") else batch for d in kind.shape.dim)
        found.append(InputSpec(shape, str(helper.tensor_dtype_to_np_dtype(kind.elem_type)), name))
    return found


def drawn(
    specs: Sequence[InputSpec], seed: int = 0, ranges: Sequence[tuple[float, float] | None] = ()
) -> list[np.ndarray]:
    """Normal numbers for every input, ones where it takes integers; with a range, rule 4."""
    rng = np.random.default_rng(seed)
    found = []
    for index, spec in enumerate(specs):
        dtype = np.dtype(spec.dtype)
        values = rng.standard_normal(spec.shape) if dtype.kind == "f" else np.ones(spec.shape)
        within = ranges[index] if index < len(ranges) else None
        if within is not None and dtype.kind == "f":
            values = np.clip(values * max(map(abs, within)) / 3, *within)
        found.append(values.astype(dtype))
    return found


def outputs_of(model: onnx.ModelProto | Parked, feeds: Sequence[Sequence[np.ndarray]]) -> Iterator[list[np.ndarray]]:
    """The outputs of a network as its file says, in order, for the inputs in order."""
    names = list(OnnxGraph(parsed(model)).inputs)
    session = reference_session(model)
    for arrays in feeds:
        if len(names) != len(arrays):
            raise SluiceError(
                f"the network takes {len(names)} inputs {names}, the plan knows {len(arrays)}; give its own"
            )
        yield list(session.run(dict(zip(names, arrays, strict=True))).values())


def input_ranges(model: onnx.ModelProto) -> list[tuple[float, float] | None]:
    """For every input the numbers that its pair can hold, if it has one."""
    graph = OnnxGraph(model)
    found: dict[str, tuple[float, float]] = {}
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear" and all(name in graph.initializers for name in node.input[1:]):
            scale, zero = (numpy_helper.to_array(graph.initializers[name]) for name in node.input[1:3])
            if scale.size == 1:
                ends = np.iinfo(zero.dtype)
                low, high = ((end - int(zero.item())) * float(scale.item()) for end in (ends.min, ends.max))
                found[node.input[0]] = low, high
    return [found.get(name) for name in graph.inputs]


def _has_reduced_range(model: onnx.ModelProto) -> bool:
    weights = [numpy_helper.to_array(w) for w in model.graph.initializer if w.data_type == TensorProto.INT8 and w.dims]
    return all((np.abs(w.astype(np.int16)) <= REDUCED_STEPS).all() for w in weights)


def _with_float_activations(model: onnx.ModelProto) -> onnx.ModelProto:
    """Rule 3: the network without the pairs around activations; itself where it has none."""
    sources = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    if not sources:
        return model
    done = onnx.ModelProto()
    done.CopyFrom(model)
    del done.graph.node[:], done.graph.value_info[:]
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in sources:
            node = helper.make_node("Identity", [sources[node.input[0]]], node.output)
        if node.op_type != "QuantizeLinear":
            done.graph.node.append(node)
    return done


def shuffled(model: onnx.ModelProto) -> onnx.ModelProto:
    """Rule 2: the entries of every weight in random order."""
    rng = np.random.default_rng(0)
    weights = {i.name for i in model.graph.initializer if i.data_type == TensorProto.FLOAT and len(i.dims) > 1}
    done = hollow(model, weights)  # a message keeps what it held before
    for init, full in zip(done.graph.initializer, model.graph.initializer, strict=True):
        if init.name in weights:
            array = numpy_helper.to_array(full)
            init.CopyFrom(numpy_helper.from_array(rng.permutation(array.ravel()).reshape(array.shape), init.name))
    return done
