"""Joints: what neighbouring pieces save when they run together.

A piece alone pays for a call and for its borders. Where the runtime cannot time it without changes of layout there
(`sluice.runtime.base.runner`, 6), its output is laid out for the caller and its input for its kernels. And where
neighbours want different layouts, the layout changes between them. For a tensor t between its producer p and its
consumers c_1 ... c_k the joint is

    J(t) = T(p) + sum_i T(c_i) - T(p and all c_i joined at t)

with all widths other than t's small, so that the difference is not lost in large numbers. Only t is connected. Other
tensors that the pieces share stay borders; they have joints of their own. Inputs that need a source have one, in the
parts and in the whole (`sluice.profiler.pieces.sources`), so the two sides differ in t alone. The sum over pieces minus
the sum over joints is the cluster expansion of the latency up to its second term. Calls are not in it: neighbours in a
ring, as those of a residual block, would save one call too many, so calls are taken out of pieces and joints before
(`sluice.profiler.fit.assemble`, 4).

1. A tensor with one consumer makes a *pair*. Both pieces are timed alone, as the sum counts them, and joined, so

       J(t) = T(p) + T(c) - T(p and c joined at t) - T(sources of t)

2. With several consumers the joined engine has more inputs and outputs than any layer of the network. It outgrows the
   cache in which layers run one after the other, and all of it takes longer. Its parts are therefore timed beside each
   other in one engine, which outgrows the cache as well and is one call instead of 1 + k,

       J(t) = T(p | c_1 | ... | c_k) - T(p and all c_i joined at t) - T(sources of t) + k * T(call)

Where the batch is free and one thread computes, they are timed at a quarter of the batch: the saving beside the calls
is work on t, hence in proportion to the batch. The time that several threads take to share an operator is not. Nor is
what a kernel takes to start, and four times over that was 10% of a small 1-D ResNet in OpenVINO. Joints whose pieces
have at most `FITS` elements in all their tensors outgrow no cache, and are timed at the whole batch.

3. Where the runtime tells that the joined pieces run the very kernels that they run apart (less the sources of t), they
   save their calls, and nothing is timed. That is the usual case where borders are free. The rest is timed: pieces
   between which the layout changes, or an addition that is fused into another convolution. Where several threads
   compute, joints of equal kernels are timed, too, because a joined piece reads from the cache of another core half of
   the tensor that its neighbour's threads made. Within the accuracy of timing (`sluice.profiler.sweep.bench.DOUBT` of
   the time of the joined pieces) they still save their calls.

4. Where pieces follow the kernels of engines, a consumer that depends on another one, or on the producer by way of
   another piece, has no part in a joint with those that do not. The tensor stays an output then.

5. Joined without what lies between them, two pieces may be fused as no engine can fuse them: the additions and norms of
   a transformer of 12 layers, each joined with the next *around* a block, seemed to save 118 us of 870, and its engine
   took what its pieces take. What engines do fuse is a piece already. So a joint around other pieces saves its calls
   alone where a kernel of it computes operators of both sides. Where none does, it tells what changes of layout cost:
   without such joints plans for an SE-ResNet in half precision were off by 0.7%, and by 2.7% at the 95th percentile.

Chains of three convolutions at batch 8, with changes of layout at all borders (one core with 2 MB of its own). The
figures are the part of the difference between the three alone and the chain that the joints of both tensors leave over,
in percent of the chain:

                                    1x1, depthwise 3x3, 1x1    1x1, ..., 1x1    3x3, 3x3, 3x3
                                    96 channels, 28x28         192, 14x14       16, 28x28    64, 28x28
    beside each other, batch 2      +29 to +50                 +22 to +37       +1 to +3     +2 to +3
    beside each other, batch 8      -10 to +8                  -12 to +4        -10 to -8    0 to +1
    alone, batch 8                  +5                         +15              +1           -1
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper

from sluice.core.latency import Extent
from sluice.passes.graph.onnx_graph import rename_reads
from sluice.profiler.pieces.fused import name_of
from sluice.profiler.pieces.partition import Partition, Piece, build_piece
from sluice.profiler.pieces.sources import add_sources, has_source

__all__ = ["Joint", "call_models", "crosses", "find_joints", "joint_models", "joint_widths"]

SMALL = 16
FITS = 2**18  # elements: a megabyte in fp32


@dataclass(frozen=True, slots=True, eq=False)
class Joint:
    """One tensor between pieces; ``extent`` is its labelled size (None if nothing in it can be cut).

    ``calls`` is the number of engine calls that it saves: one per consumer, less the calls of its own sources.
    ``kept``: other pieces read the tensor as well. ``around``: the consumers also depend on the producer by way of
    other pieces (rules 4 and 5). ``batch`` is that of the graph it was found in, ``fits``: it outgrows no cache there
    (rule 2).
    """

    tensor: str
    key: str
    description: str
    extent: Extent | None
    producer: Piece
    consumers: tuple[Piece, ...]
    calls: int
    batch: int
    fits: bool
    kept: bool = False
    around: bool = False

    @property
    def pair(self) -> bool:
        """Rule 1."""
        return len(self.consumers) == 1


def find_joints(partition: Partition) -> tuple[Joint, ...]:
    readers: dict[str, list[Piece]] = {}
    for piece in partition.pieces:
        for tensor in dict.fromkeys(piece.inputs):
            readers.setdefault(tensor, []).append(piece)
    behind = _behind(partition) if partition.by_kernels else {}
    joints = []
    for producer in partition.pieces:
        for tensor in producer.outputs:
            everyone = tuple(readers.get(tensor, ()))
            first = tuple(p for p in everyone if not behind.get(p.name, set()) & {q.name for q in everyone})
            direct = tuple(p for p in first if not any(producer.name in behind[q] for q in behind.get(p.name, ())))
            consumers = direct or first
            if not consumers:
                continue
            groups = _groups(partition, tensor)
            extent = Extent(tuple((g, 1) for g in groups)) if groups else None
            own = [
                f"{p.key}:{p.outputs.index(tensor) if p is producer else p.inputs.index(tensor)}:"
                + ",".join(str(k) for k, e in enumerate(p.extents) if set(groups) & {g for g, _ in e.coefs})
                for p in (producer, *consumers)
            ]
            key = hashlib.sha256(";".join(own).encode()).hexdigest()[:24]
            text = f"joint of {producer.description.split(' ->')[0]} with {len(consumers)} consumer(s)"
            sourced = has_source(partition.analysis.shapes[tensor]) * sum(tensor in p.bare for p in consumers)
            kept = len(consumers) < len(everyone)
            around = not direct
            calls = len(consumers) - sourced
            kind = ("jp" if len(consumers) == 1 else "j") + "k" * kept + "a" * around
            batch, fits = partition.batch, _elements(partition, (producer, *consumers)) <= FITS
            joints.append(
                Joint(tensor, kind + key, text, extent, producer, consumers, calls, batch, fits, kept, around)
            )
    return tuple(joints)


def _elements(partition: Partition, pieces: Iterable[Piece]) -> int:
    """In all tensors at the borders of these pieces, at dense widths."""
    borders = {name for piece in pieces for name in (*piece.inputs, *piece.outputs)}
    return sum(math.prod(partition.analysis.shapes[name]) for name in borders)


def _behind(partition: Partition) -> dict[str, set[str]]:
    """By piece, those that it depends on."""
    makers = {tensor: piece.name for piece in partition.pieces for tensor in piece.outputs}
    found: dict[str, set[str]] = {}
    for piece in partition.pieces:
        direct = {makers[tensor] for tensor in piece.inputs if tensor in makers}
        found[piece.name] = direct.union(*(found[name] for name in direct))
    return found


def crosses(kernels: Iterable[Iterable[str]]) -> bool:
    """Whether one of these kernels of the pieces joined computes operators of several of them (rule 5).

    Args:
        kernels: the names of the operators of each, in a model of `joint_models`.
    """
    return any(len({before for name in own if (before := name.partition("/")[0]).isdigit()}) > 1 for own in kernels)


def _groups(partition: Partition, tensor: str) -> list[str]:
    return sorted(partition.analysis.groups[i].name for i in partition.analysis.groups_on(tensor))


def joint_widths(partition: Partition, joint: Joint, own: Mapping[str, int]) -> dict[str, int]:
    """The tensor's groups at ``own``, every other group of the pieces small."""
    widths = {g: min(SMALL, size) for g, size in partition.dense.items()}
    return {**widths, **own}


def joint_models(
    partition: Partition, joint: Joint, widths: Mapping[str, int], threads: int = 1, *, sourced: bool = True
) -> tuple[tuple[onnx.ModelProto, ...], onnx.ModelProto, list[tuple[int, ...]]]:
    """The parts (rule 1), or one model of them side by side (2); the pieces joined; shapes of the tensor's sources.

    Without ``sourced`` the models have no sources.
    """
    pieces = (joint.producer, *joint.consumers)
    bare = [build_piece(partition, p, widths) for p in pieces]
    others = [[n for n in p.bare if n != joint.tensor] for p in pieces]
    own = [shape for m, p in zip(bare, pieces, strict=True) if joint.tensor in p.bare
           for shape in add_sources(m, [joint.tensor], threads)[1]]  # fmt: skip
    if not sourced:
        return tuple(bare) if joint.pair else (_join(bare),), _join(bare, joint.tensor, joint.kept), own
    inner = [add_sources(m, names, threads)[0] for m, names in zip(bare, others, strict=True)]
    whole = _join(inner, joint.tensor, joint.kept)
    parts = tuple(add_sources(m, p.bare, threads)[0] for m, p in zip(bare, pieces, strict=True))
    return parts if joint.pair else (_join(parts),), whole, own


def call_models() -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """A small engine, and two of them in a row, which save a call and an output.

    Its tensor has a kilobyte. With one number the call came out at 1.72 us for 1.9 to 2.0 with anything else, and a
    small transformer of 25 pieces 4 us too slow.
    """
    return _in_a_row(1), _in_a_row(2)


def _in_a_row(count: int) -> onnx.ModelProto:
    """So many convolutions of 16 channels on 4 x 4 pixels."""
    names = ["x", *(f"y{k}" for k in range(count))]
    weights = [numpy_helper.from_array(np.full((16, 16, 1, 1), 0.1, np.float32), f"w{k}") for k in range(count)]
    nodes = [helper.make_node("Conv", [names[k], f"w{k}"], [names[k + 1]]) for k in range(count)]
    ends = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, (1, 16, 4, 4)) for name in (names[0], names[-1])
    ]
    graph = helper.make_graph(nodes, "call", ends[:1], ends[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def _join(parts: Sequence[onnx.ModelProto], tensor: str | None = None, kept: bool = False) -> onnx.ModelProto:
    """One model in which ``tensor``, if any, runs from the first part to the others; other names are kept apart.

    A tensor that is ``kept`` is an output, too. Names of operators begin with the index of their part (`crosses`).
    """
    nodes: list[onnx.NodeProto] = []
    inputs: list[onnx.ValueInfoProto] = []
    outputs: list[onnx.ValueInfoProto] = []
    weights: list[onnx.TensorProto] = []
    for index, part in enumerate(parts):

        def rename(name: str, index: int = index) -> str:
            return name if name in ("", tensor) else f"{index}/{name}"

        for node in part.graph.node:
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            copy.name = f"{index}/{node.name or name_of(node)}"
            rename_reads(copy, rename)
            copy.output[:] = [rename(n) for n in node.output]
            nodes.append(copy)
        for source, target in ((part.graph.input, inputs), (part.graph.output, outputs)):
            for info in source:
                if info.name != tensor or (kept and target is outputs):
                    renamed = onnx.ValueInfoProto()
                    renamed.CopyFrom(info)
                    renamed.name = rename(info.name)
                    target.append(renamed)
        for init in part.graph.initializer:
            own = onnx.TensorProto()
            own.CopyFrom(init)
            own.name = rename(init.name)
            weights.append(own)
    graph = helper.make_graph(nodes, "joint", inputs, outputs, weights)
    return helper.make_model(graph, opset_imports=parts[0].opset_import, ir_version=parts[0].ir_version)
