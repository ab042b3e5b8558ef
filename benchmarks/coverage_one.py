"""What becomes of one architecture: captured, read twice, cut by a random plan, compared. Runs in a process by itself.

1. Everything that would hide a wrong cut is made alive: norms, biases, tensors of zeros, scales of nearly zero.
2. The share is of matrix parameters, numbers in tensors of two axes and more that `forward` reads: those that lie on a
   group of both readings, of all. A matrix on no group, that no reason names, is silent.
3. The plan keeps a random half of every group. In torch the slim network is compared with the closed one, which has
   masks in its weights and the dense shapes; the closed one must differ from the dense one. In ONNX the cut file is
   compared with the slim network at two batch sizes, if the network leaves its batch free.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from benchmarks.coverage_networks import Network
from benchmarks.coverage_row import Row
from sluice.commands.specs import inputs_of, model_of
from sluice.core.errors import SluiceError, first_line
from sluice.models import enliven
from sluice.passes.cut.export import to_onnx
from sluice.passes.cut.resolve import make_plan
from sluice.passes.cut.rewrite_onnx import rewrite_onnx
from sluice.passes.cut.rewrite_torch import rewrite_torch
from sluice.passes.gates.gating import bake
from sluice.passes.graph.capture import Inputs, capture
from sluice.passes.graph.groups import keep_masks, module_of
from sluice.passes.graph.placement_torch import place_gates
from sluice.passes.search_space import SearchSpace, agreed, find_search_space, read_onnx, read_torch
from sluice.runtime.base.compare import relative_error
from sluice.runtime.ort.cpu import OrtRunner

__all__ = ["TOLERANCE", "measure"]

BATCHES = (2, 3)
TOLERANCE = 1e-4  # relative, in single precision, of networks of up to hundreds of layers
CHANGED = 1e-3  # a plan that changes the output by less shows nothing


def measure(network: Network) -> Row:
    """Everything of one architecture; whatever it fails with is a row, too."""
    row = Row(network.spec, network.kind)
    clock = Clock(row)
    try:
        _measure(network, row, clock)
    except Exception as error:
        text = first_line(error) if str(error) else ""
        row.failed = row.failed or clock.stage
        row.reason = text if isinstance(error, SluiceError) else f"{type(error).__name__}: {text}"
    clock.begin("")
    return row


class Clock:
    """CPU seconds by stage."""

    def __init__(self, row: Row) -> None:
        self.row, self.stage, self.since = row, "", time.process_time()

    def begin(self, stage: str) -> None:
        now = time.process_time()
        if self.stage:
            self.row.seconds[self.stage] = round(now - self.since, 2)
        self.stage, self.since = stage, now


def _measure(network: Network, row: Row, clock: Clock) -> None:
    clock.begin("make")
    model = model_of(network.spec)
    inputs = inputs_of(network.spec, network.shape, BATCHES[0])
    longer = inputs_of(network.spec, network.shape, BATCHES[1])
    _liven(model, inputs)
    row.parameters = sum(p.numel() for p in model.parameters())
    clock.begin("capture")
    dense = capture(model, inputs, trained=False)
    dense.eval()
    row.captured = True
    clock.begin("analyse")
    reading = read_torch(dense)
    space = find_search_space(reading)
    row.share_torch = _tell(row, reading.tensors, space, dense)
    clock.begin("export")
    exported = to_onnx(dense, inputs)
    clock.begin("read")
    space = agreed(space, find_search_space(read_onnx(exported)))
    row.share = _tell(row, reading.tensors, space, dense)
    clock.begin("cut")
    analysis = space.analysis
    row.groups = len(analysis.groups)
    if not analysis.groups:
        raise SluiceError("no group of both readings")
    rng = np.random.default_rng(0)
    kept = {g.name: sorted(rng.choice(g.size, -(-g.size // 2), replace=False).tolist()) for g in analysis.groups}
    plan = make_plan(analysis, kept)
    with torch.no_grad():
        slim = rewrite_torch(dense, plan, inputs).eval()
        clock.begin("compare")
        closed = bake(dense, analysis, place_gates(dense, analysis), keep_masks(analysis, kept)).eval()
        wanted, before = _run(closed, inputs), _run(dense, inputs)
        row.torch_error = relative_error(_run(slim, inputs), wanted)
        changed = relative_error(wanted, before)
    if not changed > CHANGED:
        raise SluiceError(f"the plan changes the output by {changed:.1e} alone, so it shows nothing")
    if not row.torch_error <= TOLERANCE:
        raise SluiceError(f"slim and closed differ by {row.torch_error:.1e}")
    clock.begin("onnx")
    cut = rewrite_onnx(exported, plan)
    session = OrtRunner().build(cut)
    rows = [value.type.tensor_type.shape.dim for value in cut.graph.input]
    row.batch_free = not all(dims and dims[0].dim_value for dims in rows)
    names = [value.name for value in cut.graph.input]
    for given in (inputs, longer) if row.batch_free else (inputs,):
        found = session.run({name: x.numpy() for name, x in zip(names, _fed(given, names), strict=True)})
        with torch.no_grad():
            row.onnx_errors.append(relative_error(list(found.values()), [x.numpy() for x in _run(slim, given)]))
    if not max(row.onnx_errors) <= TOLERANCE:
        raise SluiceError(f"the cut file and the slim network differ by {max(row.onnx_errors):.1e}")


def _fed(inputs: Inputs, names: list[str]) -> list[Tensor]:
    if isinstance(inputs, Mapping):
        return [inputs[name] for name in names]
    return list(inputs) if isinstance(inputs, (tuple, list)) else [inputs]


def _run(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """All tensors of the output."""
    out = model(**inputs) if isinstance(inputs, Mapping) else model(*_fed(inputs, []))
    return [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)]


def _liven(model: nn.Module, inputs: Inputs) -> None:
    """Rule 1; the moments that `enliven` asks for come from the example inputs."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.is_floating_point() or name.endswith("bias"):
                continue
            if float(parameter.abs().max()) < 1e-2:  # zeros, and scales that begin near zero
                drawn = torch.rand(parameter.shape, generator=generator) + 0.5
                signs = torch.randn(parameter.shape, generator=generator) * 0.3
                parameter.copy_(drawn * 0.5 if parameter.squeeze().ndim < 2 else signs / parameter.shape[-1] ** 0.5)
    enliven(model, 0, inputs if isinstance(inputs, Mapping) else _fed(inputs, []))


def _tell(row: Row, tensors: Mapping[str, np.ndarray], space: SearchSpace, dense: fx.GraphModule) -> float:
    """The share, and in ``row`` what is silent, and what is left alone with the share that each reason holds."""
    read = {str(node.target) for node in dense.graph.find_nodes(op="get_attr")}
    matrices = {name: p.numel() for name, p in dense.named_parameters() if p.ndim > 1 and name in read}
    on_group = {ref.param for group in space.analysis.groups for ref in group.refs}
    told = space.left_alone
    row.silent = sorted(n for n in matrices.keys() - on_group if n not in told and module_of(n) not in told)
    total = sum(matrices.values()) or 1
    reasons: dict[str, list[Any]] = {}
    for name in sorted(matrices.keys() - on_group):
        why = told.get(name) or told.get(module_of(name)) or "silent"
        held = reasons.setdefault(why, [0.0, name])
        held[0] = round(held[0] + matrices[name] / total, 4)
    row.left_alone = dict(sorted(reasons.items(), key=lambda item: -item[1][0])[:6])
    return sum(matrices[name] for name in matrices.keys() & on_group) / total
