"""The ONNX file that a word of the command line names, as `sluice.passes.files.read` reads it.

A file that says every shape by itself is taken as it is. Any other is read by running it on inputs of the sizes that
``--input`` gives, with the numbers that ``--fix`` gives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np

from sluice.commands.input_options import NamedInput
from sluice.core.errors import SluiceError

if TYPE_CHECKING:
    import onnx

    from sluice.core.plan import Plan
    from sluice.passes.files.read import OnnxFile

__all__ = ["applied", "model_in", "onnx_input"]


def onnx_input(path: str, inputs: Sequence[NamedInput] = (), fixed: Mapping[str, float] | None = None) -> OnnxFile:
    """The file at ``path``.

    Raises:
        SluiceError: it cannot be read, or ONNX Runtime does not run it.
    """
    from sluice.passes.files.read import as_it_is, read_onnx_file, says_all
    from sluice.passes.graph.onnx_file import load_onnx

    if not inputs and not fixed:
        try:
            model = load_onnx(path)
        except SluiceError:
            if find_spec("onnxruntime") is None:
                raise
        else:
            if says_all(model) or find_spec("onnxruntime") is None:
                return as_it_is(model)
    rng = np.random.default_rng(0)
    drawn = {
        name: rng.standard_normal(sizes).astype(kind) if kind == "float32" else np.ones(sizes, kind)
        for name, sizes, kind in inputs
    }
    return read_onnx_file(path, drawn, fixed)


def applied(
    path: str, plan: Plan, inputs: Sequence[NamedInput] = (), fixed: Mapping[str, float] | None = None
) -> onnx.ModelProto:
    """The file cut by a plan: folded for deployment where it says all by itself, else in the form that it had."""
    from sluice.passes.cut.rewrite_onnx import rewrite_onnx
    from sluice.passes.files.read import written_back
    from sluice.passes.graph.onnx_file import finalize
    from sluice.passes.precision.to_precision import to_precision

    file = onnx_input(path, inputs, fixed)
    slim = rewrite_onnx(file.model, plan)
    return to_precision(finalize(slim), "fp32") if file.says_all else written_back(file, slim)


def model_in(path: str, inputs: Sequence[NamedInput] = (), fixed: Mapping[str, float] | None = None) -> onnx.ModelProto:
    """The model of `onnx_input`."""
    return onnx_input(path, inputs, fixed).model
