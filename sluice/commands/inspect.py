"""What a model can become: what can be cut, factorised, dropped and merged, and what is left alone and why."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sluice.commands.specs import dense_in, inputs_of, is_onnx, model_of

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

    from sluice.passes.graph.chains import Chain
    from sluice.passes.graph.groups import Analysis
    from sluice.passes.graph.view import GraphView

    Readings = tuple[Analysis, GraphView, tuple[Chain, ...], dict[str, np.ndarray]]

__all__ = ["inspection"]


def inspection(spec: str, shape: tuple[int, ...] | None, exclude: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """What `sluice inspect` finds in the model that ``spec`` names: for programs, and in lines."""
    if is_onnx(spec):
        found, view, chains, tensors = _read_onnx(spec, shape, exclude)
    else:
        model = model_of(spec)
        found, view, chains, tensors = _read_module(model, inputs_of(spec, shape, 2), exclude)
    weights, dense = _factorable_in(view, tensors, exclude)
    blocks, additions = _blocks_in(view)
    runs, alone = _runs_in(chains, tensors, exclude)
    groups = {g.name: {"size": g.size, "axes": [[r.param, r.axis] for r in g.refs]} for g in found.groups}
    lines = [f"{len(found.groups)} groups, {sum(g.size for g in found.groups)} channels that can be cut"]
    for g in found.groups:
        lines.append(f"  {g.name}: {g.size} in {', '.join(f'{r.param}[{r.axis}]' for r in g.refs)}")
    lines.append(f"{len(weights)} weights that can be factorised, with the rank at which nothing is lost")
    for name, w in weights.items():
        forms = ", ".join(f"{form} {rank}" for form, rank in w["forms"].items())
        lines.append(f"  {name} {'x'.join(map(str, w['shape']))}: {forms}")
    lines.append(f"{len(blocks)} residual blocks that can be dropped")
    for b in blocks:
        lines.append(f"  {b['name']}: {', '.join(b['layers'])}; {_closes(b)}")
    lines.append(f"{len(runs)} runs that can be merged, with the kernels that are possible")
    lines += [f"  {r['layers'][0]}..{r['layers'][-1]}: {' '.join(r['kernels'])}" for r in runs]
    data: dict[str, Any] = {"groups": groups, "weights": weights, "blocks": blocks, "runs": runs}
    for key, title, why in (
        ("frozen", "left alone", dict(found.frozen)),
        ("dense", "not factorised", dense),
        ("additions", "additions that are no residual block", additions),
        ("alone", "not merged", alone),
    ):
        data[key] = why
        if why or key == "frozen":
            lines += [f"{title}: {len(why)}", *(f"  {name}: {reason}" for name, reason in why.items())]
    return data, lines


def _read_onnx(path: str, shape: tuple[int, ...] | None, exclude: Sequence[str]) -> Readings:
    """Axis groups, operators, chains of convolutions and tensors of an ONNX file."""
    from onnx import numpy_helper

    from sluice.passes.graph.chains_onnx import chains_onnx
    from sluice.passes.graph.onnx_axes import analyze_onnx
    from sluice.passes.graph.view_onnx import view_onnx

    model = dense_in(path, shape)
    tensors = {init.name: numpy_helper.to_array(init) for init in model.graph.initializer}
    return analyze_onnx(model, exclude), view_onnx(model), chains_onnx(model), tensors


def _read_module(model: nn.Module, inputs: torch.Tensor, exclude: Sequence[str]) -> Readings:
    """The same of a torch module."""
    from sluice import analyze, capture
    from sluice.passes.graph.chains_torch import chains_torch
    from sluice.passes.graph.view_torch import view_torch

    gm = capture(model, inputs)
    tensors = {name: tensor.detach().cpu().numpy() for name, tensor in gm.state_dict().items()}
    return analyze(gm, exclude), view_torch(gm), chains_torch(gm), tensors


def _blocks_in(view: GraphView) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Residual blocks (name, layers, whether a gate can close them and why not), and why other additions are none."""
    from sluice.passes.graph.blocks import find_blocks

    found, refused = find_blocks(view)
    blocks = [
        {"name": b.name, "layers": list(b.layers), "closes": b.closing is not None, "reason": b.reason} for b in found
    ]
    return blocks, dict(refused)


def _factorable_in(
    view: GraphView, tensors: Mapping[str, np.ndarray], exclude: Sequence[str]
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Weights with their shape and, by form, the rank at which nothing is lost; and why other weights have no form."""
    from sluice.passes.cut.factor import forms_of, max_rank

    reads = [name for node in view.nodes for name in node.tensors]
    found: dict[str, dict[str, Any]] = {}
    left: dict[str, str] = {}
    for node in view.nodes:
        weight = next((t for t in node.tensors if tensors[t].ndim > 1), None) if node.kind == "weighted" else None
        if weight is None:
            continue
        shape = tensors[weight].shape
        into = next((view.shapes[v] for v in node.inputs if v in view.shapes and v not in view.derived), None)
        forms = {form: max_rank(shape, form) for form in forms_of(shape)}
        if (pattern := _excluded(weight, exclude)) is not None:
            left[weight] = f"excluded by {pattern!r}"
        elif reads.count(weight) > 1:
            left[weight] = f"is read {reads.count(weight)} times"
        elif "transpose" in node.op.lower():
            left[weight] = f"is the weight of {node.op}"
        elif len(shape) > 2 and into is not None and into[1] != shape[1]:
            left[weight] = f"is the weight of {into[1] // shape[1]} groups"
        elif max(forms.values()) < 2:
            left[weight] = f"has rank 1 as it is, shape {shape}"
        else:
            found[weight] = {"shape": list(shape), "forms": forms}
    return found, left


def _runs_in(
    chains: Sequence[Chain], tensors: Mapping[str, np.ndarray], exclude: Sequence[str]
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Runs of convolutions with the kernels that they could merge into; and why other layers are in no run."""
    from sluice.passes.graph.segments import find_segments, folded_norms

    runs: list[dict[str, Any]] = []
    left: dict[str, str] = {}
    for chain in chains:
        patterns = {layer.weight: _excluded(layer.weight, exclude) for layer in chain.layers}
        banned = {weight for weight, pattern in patterns.items() if pattern is not None}
        kernels: dict[tuple[str, ...], list[str]] = {}
        for segment in find_segments(chain, folded_norms(chain, tensors), banned):
            if len(segment.layers) > 1:
                kernels.setdefault(segment.layers, []).append("x".join(map(str, segment.kernel)))
        runs += [
            {"layers": list(layers), "kernels": sorted(set(found), key=_area)} for layers, found in kernels.items()
        ]
        merged = {name for layers in kernels for name in layers}
        for layer in chain.layers:
            if patterns[layer.weight] is not None:
                left[layer.weight] = f"excluded by {patterns[layer.weight]!r}"
            elif len(chain.layers) == 1:
                left[layer.weight] = f"between {chain.before} and {chain.after}"
            elif layer.weight not in merged:
                left[layer.weight] = "no run crosses a stride or part of a residual block"
        left |= {f"{chain.layers[s.start].weight}..": s.barrier for s in chain.spans if s.barrier is not None}
    return runs, left


def _area(kernel: str) -> tuple[int, str]:
    return math.prod(map(int, kernel.split("x"))), kernel


def _excluded(weight: str, exclude: Sequence[str]) -> str | None:
    from sluice.passes.graph.groups import module_of

    names = (weight, module_of(weight))
    return next((p for p in exclude if any(fnmatch.fnmatchcase(name, p) for name in names)), None)


def _closes(block: dict[str, Any]) -> str:
    return "a gate can close it" if block["closes"] else f"no gate can close it: {block['reason']}"
