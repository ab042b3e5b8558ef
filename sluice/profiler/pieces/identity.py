"""What makes two pieces the same: their extents, and a key without names and widths.

1. A piece depends on the widths of the groups that lie on its values. Groups that occur only in sums, always together
   (concatenation), count as one *extent*: their total.
2. The *key* is a hash of the structure with extents as symbols: operators, attributes, fixed sizes, batch. Equal
   pieces, in one network or in several, have equal keys.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import numpy_helper

from sluice.core.latency import Extent
from sluice.passes.graph.groups import Analysis
from sluice.passes.graph.onnx_graph import OnnxGraph, attributes
from sluice.profiler.pieces.split import ANCHORS, RECURRENT
from sluice.runtime.base.runner import PLAIN

__all__ = ["Composition", "Identity", "compositions_of", "free_extents", "identify", "weights_only"]

SCHEME = 5  # version of how a piece is timed; keys of two schemes never meet
Size = Callable[[str], list[object]]


@dataclass(frozen=True, slots=True)
class Identity:
    """A piece's key, the same in words, and its extents."""

    key: str
    description: str
    extents: tuple[Extent, ...]


@dataclass(frozen=True, slots=True)
class Composition:
    """A labelled ``axis`` of a value: ``fixed`` positions, and those that groups keep.

    ``coefs`` holds positions per channel of a group, or of several groups that lie on the same positions, as heads and
    their dimensions do: the axis has ``fixed + sum coef * width * width ...`` positions.
    """

    axis: int
    coefs: Mapping[tuple[str, ...], int]
    fixed: int


def identify(
    graph: onnx.GraphProto,
    analysis: Analysis,
    inputs: Sequence[str],
    outputs: Sequence[str],
    joined: Collection[str],
    unlaid: Collection[str] = (),
    ends: Collection[str] = (),
) -> Identity:
    """The identity of a piece's graph with these activations; a concatenation made the ``joined`` ones.

    The ``unlaid`` ones have no source, although they meet another operator than an anchor. ``ends`` of the network are
    as plain as what was concatenated.
    """
    joined_only = {n for n in inputs if all(node.op_type == "Concat" for node in graph.node if n in node.input)}
    values = [*inputs, *(name for node in graph.node for name in node.output if name)]
    compositions = {v: c for v in values if (c := compositions_of(analysis, v))}
    classes = _classes(compositions, joined_only)
    symbol = {g: f"e{k}" for k, names in enumerate(classes) for g in names}

    def size(value: str) -> list[object]:
        dims: list[object] = list(analysis.shapes[value])
        for found in compositions.get(value, ()):
            terms = sorted({"*".join([str(c), *(symbol[g] for g in names)]) for names, c in found.coefs.items()})
            dims[found.axis] = "+".join([*terms, str(found.fixed)])
        return dims

    lines = _structure(graph, analysis, inputs, outputs, compositions, size)
    plain = [f"i{k}" for k, name in enumerate(inputs) if name in joined or name in ends]
    if plain := [*plain, *(f"o{k}" for k, name in enumerate(outputs) if name in ends)]:
        lines.append([PLAIN, *plain])
    normed = {node.input[0] for node in graph.node if node.op_type == "LayerNormalization"}
    if any(node.op_type == "Add" and node.output[0] in normed for node in graph.node):
        lines.append(["plain sums"])  # which is how ONNX Runtime's files have them
    if bare := [f"i{k}" for k, name in enumerate(inputs) if name in unlaid]:
        lines.append(["unlaid", *bare])
    key = hashlib.sha256(json.dumps(lines, sort_keys=True).encode()).hexdigest()[:24]
    extents = tuple(Extent(tuple((g, 1) for g in sorted(names))) for names in classes)
    return Identity(key, _words(graph, inputs, outputs, size), extents)


def compositions_of(analysis: Analysis, value: str) -> tuple[Composition, ...]:
    """The labelled axes of a value, in order."""
    found = []
    for axis in analysis.values.get(value, ()):
        if len(axis.layers) == 1:  # by far the most: one group or none at every position
            found.append(_alone(analysis, axis.dim, *axis.layers[0]))
            continue
        groups, channels = (np.stack(each) for each in zip(*axis.layers, strict=True))
        coefs: dict[tuple[str, ...], int] = {}
        for column in np.unique(groups, axis=1).T:
            here = (groups == column[:, None]).all(0)
            if names := tuple(sorted({analysis.groups[int(g)].name for g in column if g >= 0})):
                own = channels[:, here][column >= 0]
                coefs[names] = coefs.get(names, 0) + own.shape[1] // len(np.unique(own, axis=1).T)
        found.append(Composition(axis.dim, coefs, int((groups < 0).all(0).sum())))
    return tuple(found)


def _alone(analysis: Analysis, dim: int, groups: np.ndarray, channels: np.ndarray) -> Composition:
    """One axis with a single layer: what `compositions_of` finds of several, in a fraction of the time."""
    coefs: dict[tuple[str, ...], int] = {}
    for group in np.unique(groups[groups >= 0]).tolist():
        own = channels[groups == group]
        coefs[(analysis.groups[group].name,)] = len(own) // len(np.unique(own))
    return Composition(dim, coefs, int(np.count_nonzero(groups < 0)))


def free_extents(analysis: Analysis, values: Collection[str]) -> int:
    """On how many extents a piece with these values depends."""
    return len(_classes({v: found for v in sorted(values) if (found := compositions_of(analysis, v))}, ()))


def _classes(compositions: Mapping[str, Sequence[Composition]], joined_only: Collection[str]) -> list[list[str]]:
    """Groups that occur together (rule 1), in the order in which the values show them."""
    different = sorted(
        {tuple(sorted(c.coefs.items())) for v, each in compositions.items() if v not in joined_only for c in each}
    )
    incidence: dict[str, list[tuple[int, int, tuple[str, ...]]]] = {}
    for position, coefs in enumerate(different):
        for names, coef in coefs:
            for group in names:
                others = tuple(n for n in names if n != group)
                incidence.setdefault(group, []).append((position, coef, others))
    classes: dict[tuple[tuple[int, int, tuple[str, ...]], ...], list[str]] = {}
    for group in incidence:
        classes.setdefault(tuple(incidence[group]), []).append(group)
    shown = [g for each in compositions.values() for c in each for names in c.coefs for g in names]
    first_seen = {g: i for i, g in reversed(list(enumerate(shown)))}
    return sorted(classes.values(), key=lambda names: min(first_seen[g] for g in names))


def _structure(
    graph: onnx.GraphProto,
    analysis: Analysis,
    inputs: Sequence[str],
    outputs: Sequence[str],
    compositions: Collection[str],
    size: Size,
) -> list[object]:
    """The text behind the key: a line per operator, between the lines of the inputs and of the outputs."""
    rename = {name: f"i{k}" for k, name in enumerate(inputs)}
    initial = OnnxGraph(graph).initializers
    lines: list[object] = [SCHEME, [size(name) for name in inputs]]
    for index, node in enumerate(graph.node):
        operands = [rename.get(n) or _constant_text(initial, n) for n in node.input]
        own = {k: repr(v) for k, v in sorted(attributes(node).items())}
        if own.get("group", "1") != "1" and node.input[0] in compositions:
            own["group"] = "depthwise" if initial[node.input[1]].dims[1] == 1 else own["group"]
        weight = initial.get(node.input[1]) if node.op_type in ANCHORS and len(node.input) > 1 else None
        kernel = list(weight.dims[2:]) if weight is not None and node.op_type not in RECURRENT else []
        if node.op_type in RECURRENT:
            own.pop("hidden_size", None)  # a width, which the extents tell
        for k, out in enumerate(node.output):
            rename[out] = f"n{index}.{k}"
        shapes = [size(out) for out in node.output if out in analysis.shapes]
        lines.append([node.op_type, own, operands, kernel, shapes])
    lines.append([rename[name] for name in outputs])
    return lines


def _words(graph: onnx.GraphProto, inputs: Sequence[str], outputs: Sequence[str], size: Size) -> str:
    """The anchor operator, its kernel, the sizes of its input and output, and the operators behind it."""
    initial = OnnxGraph(graph).initializers
    anchor = next((n for n in graph.node if n.op_type in ANCHORS), graph.node[0])
    prepared = weights_only(graph, inputs)
    epilogue = " + ".join(n.op_type for n in graph.node if n is not anchor and n.output[0] not in prepared)
    weight = initial.get(anchor.input[1]) if anchor.input[1:] else None
    kernel = "x".join(map(str, weight.dims[2:])) if weight is not None else ""
    into = "x".join(map(str, size(inputs[0]))) if inputs else ""
    out = "x".join(map(str, size(outputs[-1]))) if outputs else ""
    text = f"{anchor.op_type} {kernel} {into} -> {out}" + (f" + {epilogue}" if epilogue else "")
    return " ".join(text.split())


def weights_only(graph: onnx.GraphProto, inputs: Sequence[str]) -> set[str]:
    """Outputs of operators that depend on weights only."""
    active = set(inputs)
    prepared: set[str] = set()
    for node in graph.node:
        (active if active.intersection(node.input) else prepared).update(node.output)
    return prepared


def _constant_text(initial: Mapping[str, onnx.TensorProto], name: str) -> str:
    """Small float constants matter (clip bounds); weights and sizes do not."""
    init = initial.get(name)
    if init is None:
        return "-" if not name else "w"
    small = int(np.prod(init.dims)) <= 1 and init.data_type == onnx.TensorProto.FLOAT
    return repr(numpy_helper.to_array(init).tolist()) if small else f"w{len(init.dims)}"
