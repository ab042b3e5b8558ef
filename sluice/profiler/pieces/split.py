"""Which operators of a graph are timed together: lists of nodes, nothing is copied.

1. An *anchor operator* (convolution, matrix product, recurrent layer) opens a part; every other operator joins the
   latest part that feeds it. So operators that a runtime fuses (batch norm, activation, residual addition, pooling
   behind a layer) stay together, and parts depend only on earlier parts.
2. A padding in front of an anchor belongs to the anchor. Runtimes fold it into the convolution, which then runs other
   code, several times slower for some shapes, than on an input that was padded before.
3. Operators that depend on weights only go along with the operators that need them.
4. A *core* is one part: products of two activations that follow each other, in attention the scores and the context,
   with the softmax between them. Runtimes may compute it by one kernel, and fold scalings and transposes in front of a
   product into it. So the operators that only change the shape or the scale of what a core reads, and that nothing else
   reads, belong to it. The borders of an attention core are then what the projections make and read.
5. A mean over the positions of a sequence is a part. Nothing is fused with it, and where it follows the last block it
   would be gone with the block. Of a small vision transformer it takes a twentieth of the time.
6. What the bodies of a branch or a loop read of the graph around it, the branch reads.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import onnx

from sluice.passes.graph.onnx_graph import reads

__all__ = ["ANCHORS", "RECURRENT", "Part", "anchored_pads", "part_of", "split"]

RECURRENT = frozenset(["GRU", "LSTM", "RNN"])
ANCHORS = frozenset(["Attention", "Conv", "ConvTranspose", "Gemm", "MatMul"]) | RECURRENT
SHAPES = frozenset(["Cast", "Expand", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose",
                    "Unsqueeze"])  # fmt: skip
SCALES = frozenset(["Div", "Mul"])


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """The nodes of one part in order, the activations they make, and those shared with other parts or the outside."""

    nodes: tuple[onnx.NodeProto, ...]
    made: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def split(
    nodes: Sequence[onnx.NodeProto], entering: Collection[str], leaving: Collection[str], apart: Collection[str] = ()
) -> list[Part]:
    """All parts of a graph between the activations ``entering`` and ``leaving``, in execution order.

    The operators that make ``apart`` open parts as anchors do (rule 5).
    """
    activations = set(entering)
    owner: dict[str, int] = {}  # activation -> index of the part that makes it
    members: list[list[onnx.NodeProto]] = []
    cores: set[int] = set()
    prepared: dict[str, onnx.NodeProto] = {}  # results that depend on weights only
    waiting = anchored_pads(nodes, leaving)  # rule 2
    for node in nodes:
        if not activations.intersection(reads(node)):
            prepared.update(dict.fromkeys(node.output, node))
            continue
        if node.op_type == "Pad" and node.output[0] in waiting:
            activations.update(node.output)
            continue
        feeding = [owner[name] for name in reads(node) if name in owner]
        product = node.op_type == "MatMul" and activations.issuperset(node.input)
        opens = node.op_type in ANCHORS or node.output[0] in apart
        if not feeding or (opens and not (product and max(feeding) in cores)):
            members.append([])
            index = len(members) - 1
        else:
            index = max(feeding)
        if product:
            cores.add(index)
        pads = [waiting[name] for name in node.input if name in waiting]
        members[index] += [*pads, node]
        owner.update(dict.fromkeys([name for n in (*pads, node) for name in n.output], index))
        activations.update(node.output)
    members = _with_fronts(members, cores, activations, leaving)
    readers: dict[str, set[int]] = {}
    for index, own in enumerate(members):
        for node in own:
            for name in reads(node):
                readers.setdefault(name, set()).add(index)
    return [part_of(own, index, readers, activations, prepared, leaving) for index, own in enumerate(members)]


def part_of(
    own: Sequence[onnx.NodeProto],
    index: int,
    readers: Mapping[str, Collection[int]],
    activations: Collection[str],
    prepared: Mapping[str, onnx.NodeProto],
    leaving: Collection[str],
) -> Part:
    """A part of the nodes ``own``, behind what they need of ``prepared``.

    Args:
        index: of the part among all of them.
        readers: by activation, the parts that read it.
        activations: what does not depend on weights only.
        prepared: by value, the operator that makes it of weights.
    """
    made = tuple(name for node in own for name in node.output if name)
    outputs = tuple(n for n in made if n in leaving or set(readers.get(n, ())) - {index})
    inputs = tuple(
        dict.fromkeys(n for node in own for n in filter(None, reads(node)) if n in activations and n not in made)
    )
    return Part((*_preparation(own, prepared), *own), made, inputs, outputs)


def anchored_pads(nodes: Sequence[onnx.NodeProto], leaving: Collection[str]) -> dict[str, onnx.NodeProto]:
    """Paddings, by their output, whose one reader is an anchor that reads them as its input."""
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in nodes:
        for name in reads(node):
            readers.setdefault(name, []).append(node)
    found = {}
    for node in nodes:
        if node.op_type == "Pad" and node.output[0] not in leaving:
            users = readers.get(node.output[0], [])
            if len(users) == 1 and users[0].op_type in ANCHORS and users[0].input[0] == node.output[0]:
                found[node.output[0]] = node
    return found


def _with_fronts(
    members: Sequence[Sequence[onnx.NodeProto]],
    cores: Collection[int],
    activations: Collection[str],
    leaving: Collection[str],
) -> list[list[onnx.NodeProto]]:
    """The parts with what goes in front of a core in it (rule 4); a part that is left empty is gone."""
    found = [list(own) for own in members]
    readers: dict[str, set[int]] = {}
    for index, own in reversed(list(enumerate(members))):
        kept: list[onnx.NodeProto] = []
        for node in reversed(own):
            targets = set().union(*(readers.get(name, set()) for name in node.output))
            into = next(iter(targets)) if len(targets) == 1 else index
            if into not in cores or set(node.output) & set(leaving) or not _only_shapes(node, activations):
                into = index
            (kept if into == index else found[into]).insert(0, node)
            for name in reads(node):
                readers.setdefault(name, set()).add(into)
        found[index] = kept
    return [own for own in found if own]


def _only_shapes(node: onnx.NodeProto, activations: Collection[str]) -> bool:
    """Whether an operator of one activation only changes its shape or its scale."""
    known = [name for name in node.input if name in activations]
    return len(known) == 1 and (node.op_type in SCALES or (node.op_type in SHAPES and node.input[0] in known))


def _preparation(nodes: Sequence[onnx.NodeProto], prepared: Mapping[str, onnx.NodeProto]) -> list[onnx.NodeProto]:
    """The weight-only operators that these nodes need, in order."""
    found: list[onnx.NodeProto] = []

    def visit(node: onnx.NodeProto) -> None:
        for name in reads(node):
            if name in prepared and prepared[name] not in found:
                visit(prepared[name])
                found.append(prepared[name])

    for node in nodes:
        visit(node)
    return found
