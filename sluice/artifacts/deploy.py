"""The file that is deployed, in any precision, and its evaluation before it is deployed.

1. `export`: module -> ONNX in its precision, written whole or not at all. `deploy_onnx` is the same for a graph that
   was exported before (`sluice.artifacts.in_precision`).
2. `as_module`: a deployment file as ``nn.Module``, so that the code that evaluates the model gives the accuracy in
   every precision, as the file says it (`sluice.artifacts.in_precision.reference_session`). With a ``runner`` the
   engine itself runs, at the batch that it has.
3. `rounding_error`: the relative error of a precision on a few inputs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import torch
from onnx import helper
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sluice.artifacts.in_precision import deploy_onnx, reference_session, rounding_error
from sluice.artifacts.labels import labelled, provenance
from sluice.artifacts.rounding_check import refuse_another
from sluice.core.deployment import check_precision
from sluice.core.errors import SluiceError
from sluice.passes.cut.export import OPSET, check_opset, to_onnx
from sluice.passes.graph.capture import Inputs
from sluice.passes.graph.onnx_file import finalize, save_onnx
from sluice.passes.graph.onnx_graph import OnnxGraph

if TYPE_CHECKING:
    from sluice.runtime.base.runner import Runner

__all__ = ["as_module", "deploy_onnx", "export", "rounding_error"]


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Inputs,
    *,
    precision: str = "fp32",
    calibration: Iterable[Any] | None = None,
    target: str = "ort-cpu",
    threads: int = 1,
    exclude: Collection[str] = (),
    reduce_range: bool | None = None,
    opset: int = OPSET,
    input_names: Sequence[str] = (),
    output_names: Sequence[str] = (),
) -> onnx.ModelProto:
    """Write the network as deployment-ready ONNX and return it.

    Args:
        precision: one of `sluice.core.deployment.PRECISIONS`.
        calibration, target, threads, exclude, reduce_range: as for `deploy_onnx`.
        input_names, output_names: in the order of the file; by default those of ``forward()``.
    Raises:
        SluiceError: the model cannot be exported, or not in this precision, the file cannot be written,
            or it computes another network than in fp32, which is told when it is written.
    """
    check_precision(precision)
    check_opset(opset)
    fp32 = finalize(to_onnx(model, example_inputs, opset=opset))
    done = deploy_onnx(
        fp32, precision, calibration, target=target, exclude=exclude, threads=threads, reduce_range=reduce_range
    )
    done = labelled(done, provenance(), input_names, output_names)
    save_onnx(done, path)
    if precision != "fp32":
        refuse_another(path, done, fp32, precision)
    return done


def as_module(model: onnx.ModelProto, like: Any = None, *, runner: Runner | None = None, batch: int = 1) -> nn.Module:
    """The network of a deployment file as a module, without gradients; by default it computes on the CPU.

    It takes tensors in the order of the file's inputs, nested as the exported model's were. Keyword arguments with the
    names of inputs may come in any order. Arguments that are no tensors are ignored, since the file holds their values.
    The results are on the device of the first tensor.

    Args:
        like: how the results are nested: outputs of the exported model, whose tensors are replaced and whose other
            leaves (None, flags) stay, or a ``TreeSpec`` with tensors alone. Without it, the output, or a tuple of them
            if there are several.
        runner: runs the file's engine, as it is deployed (`sluice.runtime.targets.make_runner`).
        batch: that of the engine. Where the file leaves the batch free, inputs are given in slices of that many, the
            last one filled up with its last input, so that any number of inputs can be evaluated.
    Raises:
        SluiceError: ``like`` has another number of tensors than the file has outputs.
    """
    outputs = [info.name for info in model.graph.output]
    if isinstance(like, pytree.TreeSpec):
        like = pytree.tree_unflatten([torch.empty(0)] * like.num_leaves, like)
    count = sum(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(like))
    if like is not None and count != len(outputs):
        raise SluiceError(
            f"the file has {len(outputs)} outputs ({', '.join(outputs)}), but like= holds {count} tensors; give "
            f"outputs of the model that was exported"
        )
    inputs = tuple(OnnxGraph(model).inputs)
    if runner is None:
        return _Deployed(reference_session(model).run, inputs, like)
    return _Deployed(_in_slices(runner.build(model, batch=batch).run, model, batch), inputs, like)


Run = Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]


def _in_slices(run: Run, model: onnx.ModelProto, size: int) -> Run:
    """Inputs of any number for an engine of ``size``; of another network as they come."""
    graph = OnnxGraph(model)
    types = {n: helper.tensor_dtype_to_np_dtype(i.type.tensor_type.elem_type) for n, i in graph.inputs.items()}
    infos = [*graph.inputs.values(), *model.graph.output]
    axes = {next((dim.dim_param for dim in info.type.tensor_type.shape.dim), "") for info in infos}
    free = len(axes) == 1 and "" not in axes

    def called(feeds: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        given = {name: x.astype(types[name]) for name, x in feeds.items()}
        counts = {len(x) for x in given.values()} if free else {size}
        if len(counts) != 1:
            raise SluiceError(f"the inputs have batches of {sorted(counts)}; give one batch to all")
        count = counts.pop()
        if count == size:
            return _plain(run(given))
        parts = []
        for start in range(0, count, size):
            part = {name: x[start : start + size] for name, x in given.items()}
            missing = size - len(next(iter(part.values())))
            parts.append(run({n: np.concatenate([x, x[-1:].repeat(missing, 0)]) for n, x in part.items()}))
        return _plain({n: np.concatenate([np.asarray(part[n]) for part in parts])[:count] for n in parts[0]})

    return called


def _plain(outputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """16 bits as float32, as the emulation gives them; torch knows no bfloat16 of numpy."""
    return {n: x.astype("float32") if x.dtype.name in ("float16", "bfloat16") else x for n, x in outputs.items()}


class _Deployed(nn.Module):
    def __init__(self, run: Run, inputs: tuple[str, ...], like: Any):
        super().__init__()
        self.run, self.inputs = run, inputs
        self.like = pytree.tree_map_only(Tensor, lambda _: torch.empty(0), like)
        # Code that evaluates a model moves data to the device of its parameters.
        self.placeholder = nn.Parameter(torch.empty(0), requires_grad=False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = {name: x for name, x in kwargs.items() if name in self.inputs and isinstance(x, Tensor)}
        others = {name: x for name, x in kwargs.items() if name not in given}
        leaves = [x for x in pytree.tree_leaves((args, others)) if isinstance(x, Tensor)]
        if len(leaves) + len(given) != len(self.inputs):
            raise SluiceError(
                f"the network takes {len(self.inputs)} inputs ({', '.join(self.inputs)}), not "
                f"{len(leaves) + len(given)}; give one tensor for each"
            )
        given.update(zip([name for name in self.inputs if name not in given], leaves, strict=True))
        feeds = {name: x.detach().cpu().numpy() for name, x in given.items()}
        device = next((given[name].device for name in self.inputs), self.placeholder.device)
        found = [torch.from_numpy(array).to(device) for array in self.run(feeds).values()]
        if self.like is not None:
            results = iter(found)
            return pytree.tree_map_only(Tensor, lambda _: next(results), self.like)
        return found[0] if len(found) == 1 else tuple(found)
