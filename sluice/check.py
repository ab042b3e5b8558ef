"""Does a folder that `sluice.compress` wrote hold one network? Three ways to it must give the same outputs:

1. torch: the user's dense module, cut by the plan, filled with the saved weights;
2. the deployment file ``slim.onnx``;
3. the dense ONNX graph, cut by the plan with the other rewriter, filled with the saved weights.

For a dense network given as an ONNX file the first way falls away, and torch is not needed.

Weights are filled in by the names of the slim network. In torch these follow from rewriting the module, and must be all
that the file holds. In the cut graph every tensor of the user's, every factor and every merged bias must be found; what
an exporter made up keeps its value.
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

from sluice.errors import SluiceError
from sluice.onnx_file import finalize, load_onnx
from sluice.passes.factor import first_name, second_name
from sluice.passes.rewrite_onnx import rewrite_onnx
from sluice.passes.runs import bias_name
from sluice.plan import Plan
from sluice.runtime.compare import relative_error
from sluice.runtime.runner import make_runner

if TYPE_CHECKING:
    from torch import nn

__all__ = ["check"]


def check(dense: nn.Module | onnx.ModelProto, folder: str | os.PathLike[str]) -> dict[str, float]:
    """Relative error of every pair of ways, by name, on inputs drawn from a normal distribution.

    Args:
        dense: the network that was compressed (its weights do not matter), or its ONNX with parameter names.
        folder: with ``plan.json``, ``slim.safetensors`` and ``slim.onnx``.
    Raises:
        SluiceError: files are missing, or do not belong to each other or to ``dense``.
    """
    folder = Path(folder)
    plan = Plan.load(folder / "plan.json")
    arrays = _draw(plan)
    outputs = {"slim.onnx": _run(load_onnx(folder / "slim.onnx"), arrays)}
    exported = dense
    if not isinstance(exported, onnx.ModelProto):
        import torch
        from torch.utils import _pytree as pytree

        from sluice.passes.export import to_onnx
        from sluice.store import load

        inputs = tuple(torch.from_numpy(a) for a in arrays)
        slim = load(exported, plan, folder / "slim.safetensors", inputs)
        with torch.no_grad():
            outputs["torch"] = [t.numpy() for t in pytree.tree_leaves(slim(*inputs)) if isinstance(t, torch.Tensor)]
        exported = to_onnx(exported, inputs)
    cut = _filled(rewrite_onnx(exported, plan), plan, folder / "slim.safetensors")
    outputs["plan on dense ONNX"] = _run(finalize(cut), arrays)
    return {f"{a} and {b}": relative_error(outputs[a], outputs[b]) for a, b in itertools.combinations(outputs, 2)}


def _draw(plan: Plan) -> list[np.ndarray]:
    if not plan.inputs:
        raise SluiceError("the plan does not say what inputs the model takes; compress with plain tensors as inputs")
    rng = np.random.default_rng(0)
    drawn = []
    for spec in plan.inputs:
        dtype = np.dtype(spec.dtype)
        values = rng.standard_normal(spec.shape) if dtype.kind == "f" else np.ones(spec.shape)
        drawn.append(values.astype(dtype))
    return drawn


def _run(model: onnx.ModelProto, arrays: list[np.ndarray]) -> list[np.ndarray]:
    initial = {init.name for init in model.graph.initializer}
    names = [info.name for info in model.graph.input if info.name not in initial]
    if len(names) != len(arrays):
        raise SluiceError(f"the network takes {len(names)} inputs {names}, the plan knows {len(arrays)}; give its own")
    return list(make_runner("ort-cpu").build(model).run(dict(zip(names, arrays, strict=True))).values())


def _filled(model: onnx.ModelProto, plan: Plan, path: Path) -> onnx.ModelProto:
    """The cut model with its initialisers replaced by the tensors of a safetensors file, by name."""
    from safetensors import SafetensorError
    from safetensors.numpy import load as load_bytes

    try:
        tensors: Mapping[str, np.ndarray] = load_bytes(path.read_bytes())
    except (OSError, SafetensorError) as error:
        raise SluiceError(f"cannot read the weights {str(path)!r}: {error}; give a .safetensors file") from None
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
