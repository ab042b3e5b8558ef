"""Outputs of changed files on examples, computed from the first change on.

1. Of a changed file only those operators run that are not the file's own, or that read from such. What they read of the
   rest, the *border*, is what the file itself computes. It is kept for all examples.
2. The border of one change is where the way to the next one sets out, so changes should come in the order of the graph.
   A border of more bytes than the file's weights (`sluice.passes.files.room`), or than `LIMIT`, is not kept: then the
   changed file runs as a whole. Memory is bounded, time is not.
3. A weight that takes other values of the same shape is an input of its session, which is built once for all of them.
4. A tensor of a changed file that has no numbers (`sluice.passes.graph.onnx_graph.hollow`) is the file's own. No model
   is copied for a run: a session reads the tensors that it needs where they lie.

Outputs are those of the whole file, but for rounding: a runtime does not fuse operators across a border.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import onnx
from onnx import helper

from sluice.passes.files.room import room_of
from sluice.passes.files.rows import Rows
from sluice.passes.graph.onnx_graph import OnnxGraph, is_hollow, reads
from sluice.runtime.base.runner import Session
from sluice.runtime.targets import untimed_runner, untimed_session

__all__ = ["Resumed", "joined"]

LIMIT = 2**27
Values = dict[str, np.ndarray]


class Resumed:
    """A file and examples, to run other files that differ from it in places.

    Attributes:
        reference: the file's own outputs for all examples.
    """

    def __init__(self, model: onnx.ModelProto, rows: Rows) -> None:
        self._model, self._graph = model, OnnxGraph(model)
        self._feeds = list(rows.batches())
        self._kept: list[Values] = [{} for _ in self._feeds]
        self._limit = min(LIMIT, room_of(model))
        self._weight: tuple[str, Callable[[np.ndarray], Values]] | None = None
        session = untimed_runner().build(model)
        self._own = [session.run(feeds) for feeds in self._feeds]
        self.reference = joined(self._own)

    def position(self, params: Iterable[str]) -> int:
        """The place of the first operator that reads one of these tensors (rule 2)."""
        wanted, nodes = set(params), self._model.graph.node
        return next((k for k, node in enumerate(nodes) if wanted.intersection(reads(node))), len(nodes))

    def outputs(self, changed: onnx.ModelProto) -> Values:
        """Outputs by name for all examples, along axis 0 where they have the examples there."""
        known, makers = self._graph.initializers, self._graph.producers
        others = {i.name for i in changed.graph.initializer if i.name not in known or not _same(i, known[i.name])}
        tensors = known | {init.name: init for init in changed.graph.initializer if init.name in others}
        others |= {n for node in changed.graph.node for n in node.output if not _alike(node, makers.get(n))}
        return self._from(changed, tensors, others)({})

    def outputs_with(self, param: str, value: np.ndarray) -> Values:
        """`outputs` of the file with another weight, of the shape of the initializer ``param`` (rule 3)."""
        if self._weight is None or self._weight[0] != param:
            self._weight = (param, self._with(param))
        return self._weight[1](value)

    def _with(self, param: str) -> Callable[[np.ndarray], Values]:
        tensors = dict(self._graph.initializers)
        init = tensors.pop(param)
        bare = _bare(self._model)
        bare.graph.node.extend(self._model.graph.node)
        bare.graph.output.extend(self._model.graph.output)
        bare.graph.input.extend(self._graph.inputs.values())
        bare.graph.input.append(helper.make_tensor_value_info(param, init.data_type, list(init.dims)))
        run = self._from(bare, tensors, {param})
        return lambda value: run({param: value})

    def _from(
        self, changed: onnx.ModelProto, tensors: Mapping[str, onnx.TensorProto], others: set[str]
    ) -> Callable[[Values], Values]:
        """A run of what hangs on the values and tensors ``others``, given those of them that are inputs."""
        stale = set(others)
        for node in changed.graph.node:
            if stale.intersection(node.output) or stale.intersection(reads(node)):
                stale.update(node.output)
        wanted = [info.name for info in changed.graph.output if info.name in stale]
        nodes, border = _needed(changed, wanted, lambda name: name not in stale)
        border -= others
        if not wanted:
            return lambda more: self.reference
        if self._hold(border):
            feeds = self._kept
        else:
            feeds = self._feeds
            nodes, border = _needed(changed, wanted, lambda name: False)
            border -= others
        session = _session(changed, tensors, nodes, wanted, feeds, border)
        return lambda more: joined(self._ran(session, feeds, more))

    def _ran(self, session: Session, feeds: Sequence[Values], more: Values) -> list[Mapping[str, np.ndarray]]:
        return [{**own, **session.run({**fed, **more})} for own, fed in zip(self._own, feeds, strict=True)]

    def _hold(self, border: set[str]) -> bool:
        """Keep the values of the border and no others (rule 2); False where they are too many."""
        lacking = sorted(border - self._kept[0].keys())
        if lacking:
            have = [{**feeds, **kept} for feeds, kept in zip(self._feeds, self._kept, strict=True)]
            inner = [name for name in lacking if name not in have[0]]
            nodes, sources = _needed(self._model, inner, have[0].__contains__)
            session, found, size = None, list[Values](), 0
            if inner:
                session = _session(self._model, self._graph.initializers, nodes, inner, have, sources)
            for values in have:
                made = session.run({name: values[name] for name in sources}) if session else {}
                found.append({name: made[name] if name in made else values[name] for name in border})
                size += sum(value.nbytes for value in found[-1].values())
                if size > self._limit:
                    return False
            self._kept = found
        self._kept = [{name: kept[name] for name in border} for kept in self._kept]
        return True


def joined(parts: Sequence[Mapping[str, np.ndarray]]) -> Values:
    """The outputs of batches as one: along axis 0, flat where their shapes differ elsewhere."""
    return {name: _joined([part[name] for part in parts]) for name in parts[0]}


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    same = all(part.ndim and part.shape[1:] == parts[0].shape[1:] for part in parts)
    return np.concatenate(parts) if same else np.concatenate([part.reshape(-1) for part in parts])


def _same(one: onnx.TensorProto, other: onnx.TensorProto) -> bool:
    if one.dims != other.dims or one.data_type != other.data_type:
        return False
    if is_hollow(one):
        return True
    if one.HasField("raw_data") and other.HasField("raw_data"):
        return bool(one.raw_data == other.raw_data)
    return np.array_equal(onnx.numpy_helper.to_array(one), onnx.numpy_helper.to_array(other))


def _alike(node: onnx.NodeProto, twin: onnx.NodeProto | None) -> bool:
    """Do both compute the same of what they read?"""
    if twin is None or (node.op_type, node.domain) != (twin.op_type, twin.domain):
        return False
    if node.input != twin.input or node.output != twin.output or len(node.attribute) != len(twin.attribute):
        return False
    known = {attribute.name: attribute for attribute in twin.attribute}
    return all(attribute.name in known and attribute == known[attribute.name] for attribute in node.attribute)


def _needed(
    model: onnx.ModelProto, wanted: Iterable[str], is_given: Callable[[str], bool]
) -> tuple[list[onnx.NodeProto], set[str]]:
    """The operators that make values of what is given, in order; the values that they read and do not make."""
    nodes = list(model.graph.node)
    makers = {name: k for k, node in enumerate(nodes) for name in node.output if name}
    values = makers.keys() | OnnxGraph(model).inputs.keys()
    used, border, ahead = set[int](), set[str](), list(wanted)
    seen = set(ahead)
    while ahead:
        name = ahead.pop()
        if is_given(name) or name not in makers:
            border.add(name)
        elif makers[name] not in used:
            used.add(makers[name])
            fresh = set(reads(nodes[makers[name]])) & values - seen
            seen |= fresh
            ahead.extend(fresh)
    return [nodes[k] for k in sorted(used)], border


def _bare(model: onnx.ModelProto) -> onnx.ModelProto:
    part = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    part.graph.name = "from the border"
    return part


def _session(
    model: onnx.ModelProto, tensors: Mapping[str, onnx.TensorProto], nodes: Sequence[onnx.NodeProto],
    outputs: Sequence[str], values: Sequence[Values], border: set[str],
) -> Session:  # fmt: skip
    """Of these operators, whose inputs are the values of the border, and whatever the model is fed besides."""
    part = _bare(model)
    read = {name for node in nodes for name in reads(node)}
    part.graph.node.extend(nodes)
    given = {info.name: info for info in model.graph.input}
    for name in sorted(border):
        shapes = [batch[name].shape for batch in values]
        dims = [each[0] if len(set(each)) == 1 else f"{name}.{k}" for k, each in enumerate(zip(*shapes, strict=True))]
        dtype = helper.np_dtype_to_tensor_dtype(values[0][name].dtype)
        part.graph.input.append(helper.make_tensor_value_info(name, dtype, dims))
    part.graph.input.extend(given[name] for name in sorted(read & given.keys() - border))
    known = OnnxGraph(model).outputs
    part.graph.output.extend(known.get(name) or onnx.ValueInfoProto(name=name) for name in outputs)
    return untimed_session(part, [init for name, init in tensors.items() if name in read])
