"""The weights of a cut ONNX file refitted to what the file computed before, without labels and without training.

Layer after layer in the order of the graph, as `sluice.training.compensate` does it with modules:

1. The input of a layer is that of the cut file *as it is by then*. Its target is the output of the same layer in the
   file as it was, before the activation, on the channels that stay. The weight is that of least squares
   (`sluice.training.least_squares`), and the bias takes the mean of what is missed. A convolution without a bias gets
   one; a matrix product has none.
2. Of a factorised layer the second factor is refitted.
3. Layers whose input the cut has not changed, those whose weight or bias is not theirs alone, and those with more than
   `COLUMNS` inputs per output stay as they are.

Both files run as far as the layer, for all examples, batch by batch: what is kept is the sums of one layer, and its
targets where they take little room beside the weights, so that one file's session goes before the other's comes. Numpy
and ONNX Runtime alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain

import numpy as np
import onnx
from onnx import helper, numpy_helper

from sluice.core.plan import Plan
from sluice.passes.cut.factor import first_name, second_name
from sluice.passes.files.room import room_of
from sluice.passes.files.rows import Rows
from sluice.passes.graph.onnx_graph import OnnxGraph, attributes, hollow
from sluice.runtime.base.runner import Session
from sluice.runtime.targets import untimed_session
from sluice.training.least_squares import Geometry, Misfit, NormalEquations

__all__ = ["refit_onnx", "with_biases"]

COLUMNS = 4096
SHARE = 2
BIAS = ".refit_bias"


@dataclass(frozen=True, slots=True)
class _Layer:
    """A layer that may be refitted; ``turned`` weights are stored as (in, out)."""

    node: onnx.NodeProto
    weight: str
    geometry: Geometry
    turned: bool


def refit_onnx(slim: onnx.ModelProto, dense: onnx.ModelProto, plan: Plan, rows: Rows) -> tuple[onnx.ModelProto, int]:
    """A refitted copy of ``slim``, and how many layers were refitted.

    Args:
        slim: ``dense`` cut by ``plan``, with the names of its tensors.
    """
    tensors = dict(OnnxGraph(slim).initializers)
    done = hollow(slim, tensors.keys())  # a message keeps what it held before, so new numbers come in at the end
    twins = {layer.weight: layer for layer in _layers(dense)}
    kept = {(cut.param, cut.axis): np.array(cut.keep) for cut in plan.slices}
    firsts = {first_name(edit.param) for edit in plan.factorizations}
    seconds = {second_name(edit.param): edit.param for edit in plan.factorizations}
    changed, count = _changed_values(done, dense), 0
    for layer in _layers(done):
        param = seconds.get(layer.weight, layer.weight)
        twin = twins.get(param)
        if twin is None or layer.weight in firsts or layer.node.input[0] not in changed:
            continue
        stays = kept.get((param, 1 if twin.turned else 0))
        count += _refit(done, tensors, dense, layer, twin, stays, rows)
    names = [init.name for init in done.graph.initializer]
    del done.graph.initializer[:]
    done.graph.initializer.extend(tensors.pop(name) for name in names)
    return done, count


def _layers(model: onnx.ModelProto) -> list[_Layer]:
    """In the order of the graph, which is topological."""
    graph, found = OnnxGraph(model), []
    reads = Counter(name for node in model.graph.node for name in node.input)
    for node in model.graph.node:
        if len(node.input) < 2 or node.input[1] not in graph.initializers or reads[node.input[1]] != 1:
            continue
        dims, a = graph.initializers[node.input[1]].dims, attributes(node)
        if node.op_type == "Conv" and a.get("auto_pad", b"NOTSET") in (b"NOTSET", b"VALID"):
            n = len(dims) - 2
            pads = a.get("pads", [0] * 2 * n)
            geometry = Geometry(
                tuple(dims[2:]), tuple(a.get("strides", [1] * n)), tuple(zip(pads[:n], pads[n:], strict=True)),
                tuple(a.get("dilations", [1] * n)), a.get("group", 1),
            )  # fmt: skip
            found.append(_Layer(node, node.input[1], geometry, False))
        elif node.op_type == "Gemm" and not a.get("transA") and a.get("alpha", 1.0) == a.get("beta", 1.0) == 1.0:
            found.append(_Layer(node, node.input[1], Geometry(), not a.get("transB")))
        elif node.op_type == "MatMul" and len(dims) == 2:
            found.append(_Layer(node, node.input[1], Geometry(), True))
    return [layer for layer in found if _columns(graph, layer) <= COLUMNS and _own_bias(graph, layer, reads)]


def _columns(graph: OnnxGraph, layer: _Layer) -> int:
    dims = graph.initializers[layer.weight].dims
    return int(dims[0]) if layer.turned else int(np.prod(dims[1:]))


def _own_bias(graph: OnnxGraph, layer: _Layer, reads: Mapping[str, int]) -> bool:
    """Whether the layer has no bias, or a vector that it alone reads; what it is given else is no target of its own."""
    name = layer.node.input[2] if len(layer.node.input) > 2 else ""
    return not name or (name in graph.initializers and len(graph.initializers[name].dims) == 1 and reads[name] == 1)


def _changed_values(slim: onnx.ModelProto, dense: onnx.ModelProto) -> set[str]:
    """Values of ``slim`` that are not those of the same name in ``dense``."""
    known = {init.name: init for init in dense.graph.initializer}
    makers = {name: node for node in dense.graph.node for name in node.output}
    changed = {
        init.name
        for init in slim.graph.initializer
        if (init.name in known and init.dims != known[init.name].dims) or init.name not in known
    }
    for node in slim.graph.node:
        twin = makers.get(node.output[0])
        if twin is None or twin.op_type != node.op_type or changed & set(node.input):
            changed |= set(node.output)
    return changed


def _refit(
    slim: onnx.ModelProto, tensors: dict[str, onnx.TensorProto], dense: onnx.ModelProto, layer: _Layer, twin: _Layer,
    stays: np.ndarray | None, rows: Rows,
) -> int:  # fmt: skip
    """Rule 1, in ``tensors``, which are those of ``slim``; 1 if the layer was refitted."""
    graph = OnnxGraph(slim)
    stored = numpy_helper.to_array(tensors[layer.weight])
    if stored.dtype != np.float32:
        return 0
    bias = _bias_of(slim, graph, layer)
    if bias is not None:
        tensors.setdefault(bias.name, bias)
    equations = NormalEquations(layer.geometry, centred=bias is not None)
    targets = _targets(dense, twin, stays, rows)
    mine = _until(slim, tensors.values(), layer.node.input[0])
    try:
        for feeds, y in zip(rows.batches(), targets, strict=True):
            equations.add(mine.value(feeds), y)
    except Misfit:
        return 0
    del mine, targets  # solving takes room as well
    values, constant = equations.solve(stored.T if layer.turned else stored)
    if not np.isfinite(values).all():
        return 0
    values = np.ascontiguousarray(values.T if layer.turned else values)
    tensors[layer.weight] = numpy_helper.from_array(values, layer.weight)
    if bias is not None:
        tensors[bias.name] = numpy_helper.from_array(constant.astype(np.float32), bias.name)
    return 1


def _targets(dense: onnx.ModelProto, twin: _Layer, stays: np.ndarray | None, rows: Rows) -> Iterator[np.ndarray]:
    """Targets by batch; all of them are there already where they take at most one part in `SHARE` of the room."""
    theirs, axis = _until(dense, dense.graph.initializer, twin.node.output[0]), -1 if not twin.geometry.kernel else 1
    made = (y if stays is None else np.take(y, stays, axis) for y in map(theirs.value, rows.batches()))
    early, size = list[np.ndarray](), 0
    for y in made:
        early.append(y)
        size += y.nbytes
        if size > room_of(dense) // SHARE:
            return chain(early, made)
    return iter(early)


def _bias_of(model: onnx.ModelProto, graph: OnnxGraph, layer: _Layer) -> onnx.TensorProto | None:
    """The bias that the layer alone reads, made where it has none; None for a matrix product."""
    node = layer.node
    if node.op_type == "MatMul":
        return None
    if len(node.input) > 2 and node.input[2]:
        return graph.initializers[node.input[2]]
    out = graph.initializers[layer.weight].dims[1 if layer.turned else 0]
    return _with_bias(model, node, np.zeros(out, np.float32))


def with_biases(model: onnx.ModelProto, tensors: Mapping[str, np.ndarray]) -> None:
    """Give layers, in place, the biases among ``tensors`` that a refit made."""
    for node in model.graph.node:
        made = f"{node.input[1]}{BIAS}" if len(node.input) == 2 else ""
        if made in tensors:
            _with_bias(model, node, tensors[made])


def _with_bias(model: onnx.ModelProto, node: onnx.NodeProto, value: np.ndarray) -> onnx.TensorProto:
    name = f"{node.input[1]}{BIAS}"
    del node.input[2:]
    node.input.append(name)
    model.graph.initializer.append(numpy_helper.from_array(value, name))
    return model.graph.initializer[-1]


@dataclass(frozen=True, slots=True)
class _Prefix:
    """A file run as far as one value."""

    session: Session
    inputs: frozenset[str]
    output: str

    def value(self, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
        return self.session.run({name: x for name, x in feeds.items() if name in self.inputs})[self.output]


def _until(model: onnx.ModelProto, tensors: Iterable[onnx.TensorProto], value: str) -> _Prefix:
    makers = {name: node for node in model.graph.node for name in node.output}
    needed, open_values = set[str](), [value]
    while open_values:
        name = open_values.pop()
        if name not in needed:
            needed.add(name)
            open_values += makers[name].input if name in makers else []
    part = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    part.graph.name = "prefix"
    part.graph.node.extend(node for node in model.graph.node if needed & set(node.output))
    part.graph.input.extend(info for info in OnnxGraph(model).inputs.values() if info.name in needed)
    part.graph.output.append(helper.make_tensor_value_info(value, onnx.TensorProto.FLOAT, None))
    session = untimed_session(part, [init for init in tensors if init.name in needed])
    return _Prefix(session, frozenset(i.name for i in part.graph.input), value)
