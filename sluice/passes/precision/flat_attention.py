"""Attention written as one operator on flat queries, keys and values, for ONNX Runtime on the CPU with one thread.

1. As exported, the heads are laid out by reshapes and transposes before and behind two products and a softmax. The
   operator Attention, of opset 23, takes q, k and v with their heads side by side and needs none of these
   (`sluice.passes.graph.onnx_flat_cores`). It computes the same to rounding.
2. Where scores are small it is faster. ONNX Runtime 1.31.1, one thread, microseconds of a core with what lays it out,
   its q, k and v in one value, by batch x positions x heads x dimensions, beside other jobs:

                     1x49x4x16   16x49x4x16   1x128x12x32   1x197x6x64   1x197x12x64   4x197x6x64
       written out   33.3        393          399           800          2112          4250
       in one        22.9        293          337           723          2131          8444

   Scores of more than `MOST` numbers stay as they are.
3. A file keeps its opset, so this is for models of opset 23 in which a core is marked. `with_marked_cores` marks them:
   the operators between opsets 20 and 23 have one meaning, but for `CHANGED`, so the higher number is written over
   the lower one. The mark is that the softmax counts its axis from the front. Pieces of a marked core have another key
   in the latency table than those of one that is not, whose time is another.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import helper, numpy_helper

from sluice.passes.graph.onnx_flat_cores import FlatCore, find_flat_cores
from sluice.passes.graph.onnx_flat_operands import BATCH_FIRST
from sluice.passes.graph.onnx_graph import OnnxGraph, reads

__all__ = ["MOST", "has_marked_cores", "with_flat_attention", "with_marked_cores"]

MOST = 1 << 18  # numbers
SAME = 20  # from this opset to `ATTENTION` operators have one meaning
ATTENTION = 23  # the first opset that has the operator
STANDARD = ("", "ai.onnx")
CHANGED = frozenset(["DequantizeLinear", "GroupNormalization", "QuantizeLinear"])


def with_marked_cores(model: onnx.ModelProto, batch: int) -> onnx.ModelProto:
    """The model at the opset of Attention with its small flat cores marked (rule 3); itself if there are none."""
    if not SAME <= _opset(model) < ATTENTION or any(node.op_type in CHANGED for node in model.graph.node):
        return model
    marked = {core.weights: core for core in find_flat_cores(model) if batch * core.scores <= MOST}
    if not marked:
        return model
    done = onnx.ModelProto()
    done.CopyFrom(model)
    for entry in done.opset_import:
        if entry.domain in STANDARD:
            entry.version = ATTENTION
    for node in done.graph.node:
        core = marked.get(node.output[0])
        if core is not None:
            del node.attribute[:]
            node.attribute.append(helper.make_attribute("axis", core.rank - 1))
    return done


def has_marked_cores(model: onnx.ModelProto) -> bool:
    """Whether the model may have come from `with_marked_cores`."""
    softmaxes = [node for node in model.graph.node if node.op_type == "Softmax"]
    return _opset(model) >= ATTENTION and any(a.name == "axis" and a.i > 0 for n in softmaxes for a in n.attribute)


def _opset(model: onnx.ModelProto) -> int:
    return max((one.version for one in model.opset_import if one.domain in STANDARD), default=0)


def with_flat_attention(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with Attention for its marked cores; itself if it has none, or weights that are read elsewhere."""
    cores = find_flat_cores(model) if has_marked_cores(model) else []
    cores = [core for core in cores if core.axis > 0 and core.scores <= MOST]
    if not cores:
        return model
    read, made = OnnxGraph(model), {core.out: core for core in cores}
    done, nodes, constants = onnx.ModelProto(), list[onnx.NodeProto](), list[onnx.TensorProto]()
    done.CopyFrom(model)
    for node in model.graph.node:
        core = made.get(node.output[0])
        nodes += [node] if core is None else _written(core, read, constants)
    done.graph.initializer.extend(constants)
    _keep(done, nodes)
    left = {name for node in done.graph.node for name in node.output}
    return model if any(core.weights in left for core in cores) else done


def _written(core: FlatCore, read: OnnxGraph, constants: list[onnx.TensorProto]) -> Iterator[onnx.NodeProto]:
    """The operators that make ``core.out``."""

    def held(stem: str, numbers: list[int]) -> str:
        name = read.fresh(stem)
        constants.append(numpy_helper.from_array(np.array(numbers, np.int64), name))
        return name

    flat: dict[tuple[str, int], str] = {}
    operands = (core.q, core.k, core.v)
    for value in dict.fromkeys(one.value for one in operands):
        parts = sorted((one for one in operands if one.value == value), key=lambda one: one.first)
        source = value
        if parts[0].order != BATCH_FIRST:
            source = read.fresh(f"{core.out}.batch_first")
            yield helper.make_node("Transpose", [value], [source], name=source, perm=[1, 0, 2])
        names = [read.fresh(f"{core.out}.flat") for _ in parts] if len(parts) > 1 else [source]
        if len(parts) > 1:
            sizes = held(f"{core.out}.sizes", [one.heads * one.dims for one in parts])
            yield helper.make_node("Split", [source, sizes], names, name=names[0], axis=2)
        flat.update({(value, one.first): name for one, name in zip(parts, names, strict=True)})
    given = [flat[one.value, one.first] for one in operands]
    out = core.out if core.order == BATCH_FIRST and not core.rows else read.fresh(f"{core.out}.attention")
    yield helper.make_node(
        "Attention", [*given, core.mask] if core.mask else given, [out], name=out, scale=core.scale,
        q_num_heads=core.q.heads, kv_num_heads=core.k.heads,
    )  # fmt: skip
    if core.order != BATCH_FIRST:
        before, out = out, core.out if not core.rows else read.fresh(f"{core.out}.batch_second")
        yield helper.make_node("Transpose", [before], [out], name=out, perm=[1, 0, 2])
    if core.rows:
        shape = held(f"{core.out}.rows", [-1, core.q.heads * core.v.dims])
        yield helper.make_node("Reshape", [out, shape], [core.out], name=core.out)


def _keep(done: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> None:
    """Give the model these operators, without those that nothing reads any more and their constants."""
    before = {name for node in done.graph.node for name in reads(node)}
    needed, kept = {info.name for info in done.graph.output}, list[onnx.NodeProto]()
    for node in reversed(nodes):
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(reads(node))
    made = {name for node in kept for name in node.output}
    del done.graph.node[:]
    done.graph.node.extend(reversed(kept))
    for entries, stays in (
        (done.graph.initializer, lambda name: name in needed or name not in before),
        (done.graph.value_info, lambda name: name in made or name in needed),
    ):
        left = [entry for entry in entries if stays(entry.name)]
        del entries[:]
        entries.extend(left)
