"""The engine check: what runs on the device computes the fp32 network, as nearly as the precision explains.

`sluice.artifacts.rounding_check` judges files. A runtime may still compute something else than the file says: a wrong
kernel, a type that it changes by itself, a sum in fp16. So the outputs of the engine are compared, on the same inputs.

1. In fp32 and 16 bits the reference is the fp32 network in ONNX Runtime on the CPU. The tolerance is that of the
   rounding check. For fp32 ``eps`` is 2^-20, since sums come in any order and Winograd's transforms lose three bits. On
   a GPU it is 2^-10, since TensorRT and cuDNN may take TF32 products. A network of another number of operators cannot
   pass by it: an error above half of that by chance never passes.
2. For int8 no bound to fp32 holds for all inputs. The reference is the int8 file itself, computed operator by operator
   in floating point, as its quantizers say. A runtime may be off by a step at any of them.
3. Where an engine fails, the file is judged as well, since either may be at fault and the remedy is another one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper

from sluice.artifacts.rounding_check import (
    DRAWS,
    EPS,
    compare_precisions,
    drawn,
    input_ranges,
    largest_error,
    outputs_of,
    specs_at,
)  # fmt: skip
from sluice.core.address import split_target
from sluice.core.deployment import ON_CPU
from sluice.core.errors import SluiceError
from sluice.passes.graph.onnx_graph import OnnxGraph
from sluice.runtime.base.compare import relative_error
from sluice.runtime.base.runner import Session

__all__ = ["EngineCheck", "check_engine"]

EPS_FP32, EPS_TF32 = 2.0**-20, 2.0**-10


@dataclass(frozen=True, slots=True)
class EngineCheck:
    """Relative errors: of the engine's outputs, and the largest that its precision explains.

    Where the engine fails and the file passes, the fault is the ``runtime``'s.
    """

    error: float
    tolerance: float
    runtime: bool = False

    @property
    def same(self) -> bool:
        return self.error <= self.tolerance

    def refusal(self, engine: str) -> SluiceError:
        """What to say of an engine that is not the same network."""
        remedy = (
            "its file computes the right one, so take another version of the runtime, or another precision"
            if self.runtime
            else "its file does so too, so choose another precision"
        )
        return SluiceError(
            f"{engine} computes another network than the one in fp32: the relative error of its outputs is "
            f"{self.error:.1e}, of which the precision explains {self.tolerance:.1e}; {remedy}"
        )


def check_engine(
    session: Session, made: onnx.ModelProto, wide: onnx.ModelProto, precision: str, *, target: str, batch: int
) -> EngineCheck:
    """Compare the outputs of an engine.

    Args:
        session: the engine of ``made`` at ``batch`` inputs.
        made: the file in ``precision``.
        wide: the same network in fp32; inputs and outputs are matched by their order.
    Raises:
        SluiceError: the engine or a file cannot be computed on these inputs, or shapes differ.
    """
    specs = specs_at(wide, batch)
    ranges = input_ranges(made) if precision == "int8" else ()
    feeds = [_rounded(drawn(specs, seed, ranges), made) for seed in range(DRAWS)]
    have = [list(session.run(dict(zip(OnnxGraph(made).inputs, arrays, strict=True))).values()) for arrays in feeds]
    plain = [[x.astype(spec.dtype) for x, spec in zip(arrays, specs, strict=True)] for arrays in feeds]
    exact = list(outputs_of(wide, plain))
    want = list(outputs_of(made, feeds)) if precision == "int8" else exact
    eps = EPS.get(precision, EPS_FP32 if split_target(target)[0] in ON_CPU else EPS_TF32)
    found = EngineCheck(relative_error(have, want), largest_error(wide, eps, plain, exact)[0])
    if found.same:
        return found
    return EngineCheck(
        found.error, found.tolerance, precision == "fp32" or compare_precisions(made, wide, precision, specs).same
    )


def _rounded(arrays: Sequence[np.ndarray], model: onnx.ModelProto) -> list[np.ndarray]:
    """The numbers in the types that the file takes."""
    kinds = [info.type.tensor_type.elem_type for info in OnnxGraph(model).inputs.values()]
    return [x.astype(helper.tensor_dtype_to_np_dtype(kind)) for x, kind in zip(arrays, kinds, strict=True)]
