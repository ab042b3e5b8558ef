"""The files in a folder of `sluice.compress` must belong to one network: three ways to it give the same outputs.

1. torch: the user's dense module, cut by the plan, filled with the saved weights;
2. the deployment file ``slim.onnx``;
3. the dense ONNX graph, cut by the plan with the other rewriter, filled with the saved weights.

For a dense network given as an ONNX file the first way falls away, and torch is not needed.

A file in another precision, ``slim.int8.onnx``, cannot give the same numbers; `sluice.artifacts.rounding_check` judges
whether it is the same network as ``slim.onnx``.

Weights are filled in by the names of the slim network. In torch these follow from rewriting the module, and the file
must hold no others. In the cut graph every tensor of the user's, every factor and every merged bias must be found;
an exporter's own constants keep their values.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import numpy_helper

from sluice.artifacts.folder import held
from sluice.artifacts.rounding_check import RoundingCheck, compare_precisions, drawn, outputs_of
from sluice.core.deployment import PRECISIONS
from sluice.core.errors import SluiceError
from sluice.core.plan import InputSpec, Plan
from sluice.passes.cut.factor import first_name, second_name
from sluice.passes.cut.merge_region import bias_name
from sluice.passes.cut.rewrite_onnx import rewrite_onnx
from sluice.passes.graph.onnx_file import finalize, load_onnx
from sluice.runtime.base.compare import relative_error
from sluice.training.refit_onnx import with_biases

if TYPE_CHECKING:
    from torch import nn

__all__ = ["check", "check_deployed"]


def check(dense: nn.Module | onnx.ModelProto, folder: str | os.PathLike[str]) -> dict[str, float]:
    """Relative error of every pair of ways, by name, on inputs drawn from a normal distribution.

    Args:
        dense: the network that was compressed (its weights do not matter), or its ONNX with parameter names.
        folder: with ``plan.json``, ``slim.safetensors`` and ``slim.onnx``.
    Raises:
        SluiceError: files are missing, do not belong to each other or to ``dense``, or the inputs are empty.
    """
    folder = Path(folder)
    plan = Plan.load(held(folder / "plan.json"))
    arrays = drawn(_inputs(plan))
    outputs = {"slim.onnx": _run(load_onnx(held(folder / "slim.onnx")), arrays)}
    exported = dense
    if not isinstance(exported, onnx.ModelProto):
        import torch
        from torch.utils import _pytree as pytree

        from sluice.artifacts.store import load
        from sluice.passes.cut.export import to_onnx
        from sluice.passes.graph.capture import capture, named_inputs, normalize_inputs

        inputs = named_inputs(_inputs(plan), [torch.from_numpy(a) for a in arrays])
        args, kwargs = normalize_inputs(inputs)
        exported = capture(exported, inputs)
        slim = load(exported, plan, folder / "slim.safetensors", inputs)
        with torch.no_grad():
            outputs["torch"] = [
                t.numpy() for t in pytree.tree_leaves(slim(*args, **kwargs)) if isinstance(t, torch.Tensor)
            ]
        exported = to_onnx(exported, inputs)
    cut = _filled(rewrite_onnx(exported, plan), plan, held(folder / "slim.safetensors"))
    outputs["plan on dense ONNX"] = _run(finalize(cut), arrays)
    return {f"{a} and {b}": relative_error(outputs[a], outputs[b]) for a, b in itertools.combinations(outputs, 2)}


def check_deployed(folder: str | os.PathLike[str]) -> dict[str, RoundingCheck]:
    """The comparison of files in other precisions with ``slim.onnx``, by file name; empty where there are none.

    Raises:
        SluiceError: files are missing, are no networks, or do not take the same inputs and return the same shapes.
    """
    folder = Path(folder)
    specs = _inputs(Plan.load(held(folder / "plan.json")))
    names = {p: f"slim.{p}.onnx" for p in PRECISIONS if p != "fp32"}
    return {
        name: compare_precisions(
            load_onnx(held(folder / name)), load_onnx(held(folder / "slim.onnx")), precision, specs
        )
        for precision, name in names.items()
        if (folder / name).exists()
    }


def _inputs(plan: Plan) -> tuple[InputSpec, ...]:
    if not plan.inputs:
        raise SluiceError("the plan does not say what inputs the model takes; compress with plain tensors as inputs")
    for spec in plan.inputs:
        if 0 in spec.shape:
            raise SluiceError(
                f"the plan's input has shape {spec.shape}, on which all networks agree; give the plan that was saved"
            )
    return plan.inputs


def _run(model: onnx.ModelProto, arrays: list[np.ndarray]) -> list[np.ndarray]:
    return next(outputs_of(model, [arrays]))


def _filled(model: onnx.ModelProto, plan: Plan, path: Path) -> onnx.ModelProto:
    """The cut model with its initialisers replaced by the tensors of a safetensors file, by name."""
    from safetensors import SafetensorError
    from safetensors.numpy import load as load_bytes

    try:
        tensors: Mapping[str, np.ndarray] = load_bytes(path.read_bytes())
    except (OSError, SafetensorError) as error:
        raise SluiceError(f"cannot read the weights {str(path)!r}: {error}; give a .safetensors file") from None
    with_biases(model, tensors)
    own = {*plan.fingerprint, *(bias_name(run[-1]) for merge in plan.merges for run in merge.runs)}
    own |= {name(f.param) for f in plan.factorizations for name in (first_name, second_name)}
    for init in model.graph.initializer:
        found = tensors.get(init.name)
        if found is None and init.name in own:
            raise SluiceError(
                f"{str(path)!r} does not belong to this plan: it lacks {init.name!r} {tuple(init.dims)}; give the "
                "weights saved beside the plan"
            )
        if found is None:
            continue
        if found.shape != tuple(init.dims):
            raise SluiceError(
                f"{str(path)!r} does not belong to this plan: {init.name!r} is {found.shape} instead of "
                f"{tuple(init.dims)}; give the weights saved beside the plan"
            )
        init.CopyFrom(numpy_helper.from_array(found, init.name))
    return model
