"""Images of a part that are written with their channels last, where nothing in the part needs them otherwise.

1. A residual addition on (N, C, H, W) between two transpositions, as in ConvNeXt, is one on rows to the compiler: it
   moves transpositions through elementwise operators, to kernels that do not care. Across the border of a part it moves
   none. Then the addition and the norm behind it are two kernels in place of one where the image is large.
2. So a *component* is written as (N, H, W, C), without its transpositions: values that elementwise operators connect,
   one of them at a border, all made and read by these operators, transpositions and borders alone. One of the
   transpositions leads to or from a norm or a product over the last axis.
3. In memory its inputs and outputs are what they were (`sluice.runtime.trt.borders`, 1). Those that are plain in the
   network stay as they are, and so does their component.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import numpy_helper

from sluice.runtime.base.runner import PLAIN
from sluice.runtime.trt.borders import BINARY, IMAGE, UNARY, held_in, over_last_axis, resize, shapes_of

__all__ = ["channels_last"]

TO_FIRST, TO_LAST = (0, 3, 1, 2), (0, 2, 3, 1)
Shape = tuple[int, ...]


@dataclass(slots=True, eq=False)
class _Component:
    """Connected values (N, C, H, W), the elementwise operators between them, and the transpositions at its ends."""

    values: set[str]
    operators: list[onnx.NodeProto]
    entering: list[onnx.NodeProto] = field(default_factory=list)
    leaving: list[onnx.NodeProto] = field(default_factory=list)


def channels_last(model: onnx.ModelProto) -> tuple[onnx.ModelProto, set[str]]:
    """The model with its components as (N, H, W, C) (rule 2), and the inputs and outputs that are written so.

    The model itself if there are none. Names stay; sizes are fixed.
    """
    shapes, held = shapes_of(model), held_in(model)
    weights = {init.name: init for init in model.graph.initializer}
    ends = {info.name: info for info in (*model.graph.input, *model.graph.output)}
    last = over_last_axis(model)
    chosen = [
        found
        for found in _components(model.graph.node, shapes, held, weights)
        if _fits(found, model.graph.node, ends, last)
    ]
    if not chosen:
        return model, set()
    result = onnx.ModelProto()
    result.CopyFrom(model)
    gone = {id(node) for found in chosen for node in (*found.entering, *found.leaving)}
    own = {id(node) for found in chosen for node in found.operators}
    names = _names(chosen, ends)
    turned = set().union(*(found.values for found in chosen)) & ends.keys()
    del result.graph.node[:], result.graph.value_info[:]
    for info in (*result.graph.input, *result.graph.output):
        if info.name in turned:
            resize(info, tuple(shapes[info.name][axis] for axis in TO_LAST))
    flat: dict[str, str] = {}
    for node in model.graph.node:
        if id(node) in gone:
            continue
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.input[:] = [names.get(name, name) for name in node.input]
        copy.output[:] = [names.get(name, name) for name in node.output]
        if id(node) in own:
            copy.input[:] = [_line(name, weights, flat, result.graph) for name in copy.input]
        result.graph.node.append(copy)
    return result, turned


def _components(
    nodes: Iterable[onnx.NodeProto], shapes: Mapping[str, Shape], held: Collection[str], weights: Collection[str]
) -> list[_Component]:
    """All that are connected by elementwise operators, with the transpositions that they meet."""
    found: list[_Component] = []
    nodes = list(nodes)
    for node in nodes:
        if _is_elementwise(node, shapes, held, weights):
            names = {name for name in (*node.input, *node.output) if name and name not in held}
            meets = [one for one in found if one.values & names]
            found = [one for one in found if not one.values & names]
            operators = [*(own for one in meets for own in one.operators), node]
            found.append(_Component(names.union(*(one.values for one in meets)), operators))
    for node in nodes:
        for one in found:
            if _turns(node) == TO_FIRST and node.output[0] in one.values:
                one.entering.append(node)
            if _turns(node) == TO_LAST and node.input[0] in one.values:
                one.leaving.append(node)
    return found


def _is_elementwise(
    node: onnx.NodeProto, shapes: Mapping[str, Shape], held: Collection[str], weights: Collection[str]
) -> bool:
    shape = shapes.get(node.output[0], ())
    if len(shape) != IMAGE or node.op_type not in UNARY | BINARY or len(node.output) != 1:
        return False
    if any(shapes.get(name) != shape for name in node.input if name not in held):
        return False
    constants = [name for name in node.input if name and name in held]
    if len(constants) == len([name for name in node.input if name]):
        return False
    return all(
        math.prod(shapes.get(name, (0,))) == 1
        or (node.op_type in BINARY and name in weights and _by_channel(shapes[name], shape[1]))
        for name in constants
    )


def _by_channel(shape: Shape, channels: int) -> bool:
    return shape in ((channels, 1, 1), (1, channels, 1, 1))


def _turns(node: onnx.NodeProto) -> Shape:
    if node.op_type != "Transpose":
        return ()
    return next((tuple(attribute.ints) for attribute in node.attribute if attribute.name == "perm"), ())


def _fits(
    found: _Component,
    nodes: Iterable[onnx.NodeProto],
    ends: Mapping[str, onnx.ValueInfoProto],
    last: set[str],
) -> bool:
    """Rule 2, and 3."""
    borders = found.values & ends.keys()
    if not borders or any(ends[name].doc_string == PLAIN for name in borders):
        return False
    if not last & {*(node.input[0] for node in found.entering), *(node.output[0] for node in found.leaving)}:
        return False
    if any(node.output[0] in ends for node in (*found.entering, *found.leaving)):
        return False  # it gives a border both forms, or one that is not its own
    known = {id(node) for node in (*found.operators, *found.entering, *found.leaving)}
    return not any(found.values & {*node.input, *node.output} for node in nodes if id(node) not in known)


def _names(chosen: Iterable[_Component], ends: Collection[str]) -> dict[str, str]:
    """By name what a value is called without the transpositions."""
    direct: dict[str, str] = {}
    for found in chosen:
        direct.update({node.output[0]: node.input[0] for node in (*found.entering, *found.leaving)})
    names = {}
    for name in direct:
        end = direct[name]
        while end in direct:
            end = direct[end]
        names[name] = end
    return names


def _line(name: str, weights: Mapping[str, onnx.TensorProto], flat: dict[str, str], graph: onnx.GraphProto) -> str:
    """A constant by channel as one of the last axis."""
    if name not in weights or math.prod(weights[name].dims) == 1:
        return name
    if name not in flat:
        flat[name] = f"{name}:last"
        values = np.ascontiguousarray(numpy_helper.to_array(weights[name]).reshape(-1))
        graph.initializer.append(numpy_helper.from_array(values, flat[name]))
    return flat[name]
