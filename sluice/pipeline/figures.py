"""The figures of a finished compression that need the network: parity of its forms, and its size."""

from __future__ import annotations

from typing import Any

import onnx
import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from sluice.passes.graph.capture import MARK, Inputs, normalize_inputs
from sluice.runtime.base.compare import relative_error
from sluice.runtime.targets import make_runner

__all__ = ["captured_inputs", "count_parameters", "example_outputs", "parity"]


def captured_inputs(gm: fx.GraphModule) -> Inputs:
    """The example inputs a graph was captured with."""
    mark = gm.meta[MARK]
    return mark["kwargs"] if mark["kwargs"] else mark["args"]


def example_outputs(module: nn.Module, captured: fx.GraphModule) -> Any:
    """What ``module`` returns for the inputs that a graph was captured with."""
    args, kwargs = normalize_inputs(captured_inputs(captured))
    with torch.no_grad():
        return module(*args, **kwargs)


def count_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def parity(closed: nn.Module, slim: nn.Module, engine: onnx.ModelProto, captured: fx.GraphModule) -> float:
    """Largest relative difference between closed, slim torch and slim ONNX on the example inputs.

    ONNX runs in ONNX Runtime on the CPU for every target, since the rewrites are compared in full precision.
    """
    args, kwargs = normalize_inputs(captured_inputs(captured))
    with torch.no_grad():
        want = [t.cpu().numpy() for t in pytree.tree_leaves(closed(*args, **kwargs)) if isinstance(t, torch.Tensor)]
        have = [t.cpu().numpy() for t in pytree.tree_leaves(slim(*args, **kwargs)) if isinstance(t, torch.Tensor)]
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    feeds = {info.name: t.cpu().numpy() for info, t in zip(engine.graph.input, tensors, strict=True)}
    outputs = list(make_runner("ort-cpu").build(engine).run(feeds).values())
    return max(max(relative_error(h, w), relative_error(o, w)) for h, o, w in zip(have, outputs, want, strict=True))
