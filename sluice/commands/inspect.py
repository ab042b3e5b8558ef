"""The search space of a model, printed: as JSON for programs, and as a summary with a line per site."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sluice.commands.input_options import NamedInput
from sluice.commands.specs import dense_in, inputs_of, is_onnx, model_of

if TYPE_CHECKING:
    from torch import nn

    from sluice.passes.search_space import Reading, SearchSpace

__all__ = ["inspection", "known_networks"]

BATCH = 2  # that a network from Python is captured with
WIDTH = 100


def inspection(
    spec: str,
    shape: tuple[int, ...] | None,
    exclude: Sequence[str],
    inputs: Sequence[NamedInput] = (),
    weights: str | None = None,
    verbose: bool = False,
    fixed: Mapping[str, float] | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """The search space of the model that ``spec`` names: for programs, and in lines (``verbose``: of any length)."""
    from sluice.artifacts.macs import count_macs
    from sluice.passes.graph.groups import check_cuttable
    from sluice.passes.search_space import find_search_space, read_onnx, read_torch

    if is_onnx(spec):
        dense = dense_in(spec, shape, inputs, weights, fixed)
        reading, macs = read_onnx(dense), count_macs(dense)
    else:
        from sluice import capture
        from sluice.passes.graph.exclusion_torch import named_by_type

        model = model_of(spec, weights)
        example = inputs_of(spec, shape, BATCH, inputs)
        exclude = named_by_type(model, exclude)
        reading, macs = read_torch(capture(model, example)), _macs(model.eval(), example)
    space = find_search_space(reading, exclude)
    if not space.has_sites:
        check_cuttable(space.analysis)
    data, summary = _summary(space, reading, macs)
    return {**data, **_data(space)}, [*summary, *_lines(space, verbose)]


def known_networks() -> tuple[dict[str, Any], list[str]]:
    """The reference networks with the shapes of their inputs, and the packages whose networks have names."""
    from sluice.commands.zoos import ZOOS
    from sluice.models import EXAMPLE_SHAPES

    lines = [f"sluice:{name}  {','.join(map(str, shape))}" for name, shape in EXAMPLE_SHAPES.items()]
    return {"sluice": EXAMPLE_SHAPES, "packages": ZOOS}, [*lines, *(f"{zoo}:NAME" for zoo in ZOOS)]


def _data(space: SearchSpace) -> dict[str, Any]:
    return {
        "groups": {
            group.name: {"size": group.size, "axes": [[ref.param, ref.axis] for ref in group.refs]}
            for group in space.analysis.groups
        },
        "weights": {name: {"shape": list(site.shape), "forms": dict(site.forms)} for name, site in space.ranks.items()},
        "blocks": [
            {"name": b.name, "layers": list(b.layers), "closes": b.closing is not None, "reason": b.reason}
            for b in space.blocks
        ],
        "runs": [{"layers": list(layers), "kernels": kernels} for layers, kernels in _runs(space).items()],
        "frozen": dict(space.left_alone),
        "dense": dict(space.unfactorised),
        "additions": dict(space.undropped),
        "alone": dict(space.unmerged),
    }


def _runs(space: SearchSpace) -> dict[tuple[str, ...], list[str]]:
    """The kernels that every segment could merge into, by its layers."""
    kernels: dict[tuple[str, ...], set[tuple[int, ...]]] = {}
    for site in space.merges:
        kernels.setdefault(site.segment.layers, set()).add(site.segment.kernel)
    return {
        layers: ["x".join(map(str, kernel)) for kernel in sorted(found, key=lambda k: (math.prod(k), k))]
        for layers, found in kernels.items()
    }


def _summary(space: SearchSpace, reading: Reading, macs: int) -> tuple[dict[str, Any], list[str]]:
    """Sizes of the network, and the share of its parameters that each method can take from."""
    sizes = {n: t.size for n, t in reading.tensors.items() if n not in reading.buffers and t.dtype.kind == "f"}
    total = sum(sizes.values())
    within = {
        "filter": {ref.param for group in space.analysis.groups for ref in group.refs},
        "rank": set(space.ranks),
        "block": {name for block in space.blocks for name in block.layers},
        "merge": {name for site in space.merges for name in site.segment.layers},
    }
    shares = {
        method: sum(sizes.get(name, 0) for name in names) / total if total else 0.0 for method, names in within.items()
    }
    channels = sum(group.size for group in space.analysis.groups)
    counts = {
        "filter": f"{len(space.analysis.groups)} groups, {channels:,} channels that can be cut",
        "rank": f"{len(space.ranks)} weights that can be factorised",
        "block": f"{len(space.blocks)} residual blocks that can be dropped",
        "merge": f"{len(_runs(space))} runs that can be merged",
    }
    lines = [f"{total:,} parameters, {macs:,} multiply-accumulates per example"]
    lines += [f"  {method:6} {text}, on {shares[method]:.1%} of the parameters" for method, text in counts.items()]
    return {"parameters": total, "macs": macs, "shares": shares}, lines


def _lines(space: SearchSpace, verbose: bool) -> list[str]:
    groups, runs = space.analysis.groups, _runs(space)
    lines = ["", "groups"]
    for group in groups:
        names = [f"{ref.param}[{ref.axis}]" for ref in group.refs]
        lines.append(_one_line(f"  {group.name}: {group.size} in ", names, verbose))
    lines += ["", "weights that can be factorised, with the rank at which nothing is lost"] if space.ranks else []
    for name, site in space.ranks.items():
        forms = [f"{form} {rank}" for form, rank in site.forms.items()]
        lines.append(_one_line(f"  {name} {'x'.join(map(str, site.shape))}: ", forms, verbose))
    lines += ["", "residual blocks"] if space.blocks else []
    for block in space.blocks:
        closes = f"; no gate can close it: {block.reason}" if block.closing is None else ""
        lines.append(_one_line(f"  {block.name}: ", [*block.layers], verbose) + closes)
    lines += ["", "runs, with the kernels that are possible"] if runs else []
    lines += [_one_line(f"  {a[0]} to {a[-1]}: ", kernels, verbose) for a, kernels in runs.items()]
    for title, reasons in (
        ("left alone", space.left_alone),
        ("not factorised", space.unfactorised),
        ("additions that are no residual block", space.undropped),
        ("not merged", space.unmerged),
    ):
        if reasons:
            lines += ["", f"{title}: {len(reasons)}", *(f"  {name}: {reason}" for name, reason in reasons.items())]
    return lines if verbose else [*lines, "", "-v has all tensors of every line, --json everything for programs"]


def _one_line(head: str, names: Sequence[str], verbose: bool) -> str:
    """The names behind ``head``, as many as fit on a line of `WIDTH`."""
    whole = head + ", ".join(names)
    if verbose or len(whole) <= WIDTH:
        return whole
    for shown in range(len(names) - 1, 0, -1):
        line = head + ", ".join(names[:shown]) + f" and {len(names) - shown} more"
        if len(line) <= WIDTH:
            return line
    return f"{head}{len(names)} of them"[:WIDTH]


def _macs(model: nn.Module, inputs: Any) -> int:
    """Multiply-accumulates of one example."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from sluice.passes.graph.capture import normalize_inputs

    args, kwargs = normalize_inputs(inputs)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*args, **kwargs)
    return int(counter.get_total_flops()) // (2 * BATCH)
