"""The search space of a model, printed: as JSON for programs, and in lines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sluice.commands.specs import NamedInput, dense_in, inputs_of, is_onnx, model_of

if TYPE_CHECKING:
    from sluice.passes.search_space import SearchSpace

__all__ = ["inspection", "known_networks"]


def inspection(
    spec: str,
    shape: tuple[int, ...] | None,
    exclude: Sequence[str],
    inputs: Sequence[NamedInput] = (),
    weights: str | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """The search space of the model that ``spec`` names: for programs, and in lines."""
    from sluice.passes.graph.groups import check_cuttable
    from sluice.passes.search_space import find_search_space, read_onnx, read_torch

    if is_onnx(spec):
        reading = read_onnx(dense_in(spec, shape, inputs, weights))
    else:
        from sluice import capture

        model = model_of(spec, weights)
        reading = read_torch(capture(model, inputs_of(spec, shape, 2, inputs)))
    space = find_search_space(reading, exclude)
    if not space.has_sites:
        check_cuttable(space.analysis)
    return _data(space), _lines(space)


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


def _lines(space: SearchSpace) -> list[str]:
    groups, runs = space.analysis.groups, _runs(space)
    lines = [f"{len(groups)} groups, {sum(g.size for g in groups)} channels that can be cut"]
    lines += [f"  {g.name}: {g.size} in {', '.join(f'{r.param}[{r.axis}]' for r in g.refs)}" for g in groups]
    lines.append(f"{len(space.ranks)} weights that can be factorised, with the rank at which nothing is lost")
    for name, site in space.ranks.items():
        forms = ", ".join(f"{form} {rank}" for form, rank in site.forms.items())
        lines.append(f"  {name} {'x'.join(map(str, site.shape))}: {forms}")
    lines.append(f"{len(space.blocks)} residual blocks that can be dropped")
    for block in space.blocks:
        closes = f"no gate can close it: {block.reason}" if block.closing is None else "a gate can close it"
        lines.append(f"  {block.name}: {', '.join(block.layers)}; {closes}")
    lines.append(f"{len(runs)} runs that can be merged, with the kernels that are possible")
    lines += [f"  {layers[0]}..{layers[-1]}: {' '.join(kernels)}" for layers, kernels in runs.items()]
    for title, reasons in (
        ("left alone", space.left_alone),
        ("not factorised", space.unfactorised),
        ("additions that are no residual block", space.undropped),
        ("not merged", space.unmerged),
    ):
        if reasons or title == "left alone":
            lines += [f"{title}: {len(reasons)}", *(f"  {name}: {reason}" for name, reason in reasons.items())]
    return lines
