"""Parts that follow kernels: moves, joins, what is refused, and that nothing is lost on the way."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import onnx
import pytest
import torch
from torch import Tensor, nn

from sluice.passes.cut.export import to_onnx
from sluice.passes.graph.onnx_graph import reads
from sluice.passes.search_space import find_search_space, read_onnx
from sluice.profiler.pieces.fused import name_of, regroup, states_of
from sluice.profiler.pieces.joints import find_joints, joint_models
from sluice.profiler.pieces.partition import Partition, build_piece, of_parts, partition_static, parts_of, static_at
from sluice.profiler.sweep.fusion import regrouped
from sluice.runtime.base.runner import PLAIN
from tests.sequences import sequence
from tests.tiny import TinyResidual

BATCH = 2


class Slim(nn.Module):
    """Two convolutions with an addition behind the first of them, and a change of shape in front."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(3, 6, 1)
        self.last = nn.Conv2d(6, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(1, (3, 5))
        return self.last(torch.relu(self.first(x) + self.second(x)))


class Stream(nn.Module):
    """A residual stream, with a norm in front of two layers, and both its ends as images."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 6, 1), nn.LayerNorm(6)
        self.up, self.down, self.last = nn.Linear(6, 9), nn.Linear(9, 6), nn.Conv2d(6, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x)).permute(0, 2, 3, 1)
        x = x + self.down(torch.relu(self.up(self.norm(x))))
        return self.last(x.permute(0, 3, 1, 2))


@functools.cache
def cut(name: str) -> Partition:
    torch.manual_seed(0)
    if name == "slim":
        model: nn.Module = Slim()
        inputs: tuple[Tensor, ...] = (torch.randn(BATCH, 15, 7),)
    elif name == "residual":
        model, inputs = TinyResidual(), (torch.randn(BATCH, 3, 9, 9),)
    elif name == "stream":
        model, inputs = Stream(), (torch.randn(BATCH, 3, 4, 4),)
    else:
        model, inputs = sequence(name)
    static = static_at(to_onnx(model.eval(), inputs), BATCH)
    return partition_static(static, find_search_space(read_onnx(static), ()).analysis, BATCH)


def nodes(partition: Partition, *kinds: str) -> list[str]:
    return [name_of(node) for node in partition.model.graph.node if node.op_type in kinds]


def holders(partition: Partition, names: Sequence[str]) -> list[str]:
    """The piece of each operator."""
    return [next(p.name for p in partition.pieces if n in {name_of(o) for o in p.model.graph.node}) for n in names]


def follow(partition: Partition, *kernels: Sequence[str], states: Sequence[object] | None = None) -> Partition:
    """The partition after these kernels, and one for every other operator."""
    told = [frozenset(kernel) for kernel in kernels]
    told += [frozenset([name_of(node)]) for node in partition.model.graph.node]
    return after(partition, told, states)


def after(partition: Partition, told: Sequence[frozenset[str]], states: Sequence[object] | None = None) -> Partition:
    parts, static = parts_of(partition.model), partition.model
    leaving = {info.name for info in static.graph.output}
    found = regroup(parts, static.graph.node, leaving, partition.analysis, told, states or [()] * len(parts))
    return of_parts(found, static, partition.analysis, BATCH)


def check(before: Partition, found: Partition) -> None:
    """Every operator is there once, and every piece reads what earlier pieces make."""
    made = [name for p in found.pieces for node in p.model.graph.node for name in node.output if name in p.outputs]
    assert len(made) == len(set(made))
    held = (
        [{name_of(n) for n in p.model.graph.node} for p in before.pieces],
        [{name_of(n) for n in p.model.graph.node} for p in found.pieces],
    )
    assert set().union(*held[0]) == set().union(*held[1])
    known = {info.name for info in before.model.graph.input}
    for piece in found.pieces:
        onnx.checker.check_model(piece.model, full_check=True)
        assert known.issuperset(piece.inputs)
        known.update(piece.outputs)
    assert {info.name for info in before.model.graph.output} <= known


def test_an_addition_goes_to_the_convolution_that_computes_it() -> None:
    before = cut("slim")
    (add,), (relu,) = nodes(before, "Add"), nodes(before, "Relu")
    first = nodes(before, "Conv")[0]
    assert holders(before, [add, relu]) == ["second", "second"]
    found = follow(before, [first, add, relu])
    check(before, found)
    assert holders(found, [add, relu]) == ["first", "first"]
    assert [p.name for p in found.pieces if "first" in p.name or "second" in p.name] == ["second", "first"]


def test_a_part_without_a_kernel_goes_to_its_reader_and_one_with_several_stays() -> None:
    before = cut("slim")
    (shape,) = nodes(before, "Reshape")
    assert holders(before, [shape]) == [shape]
    computed = [frozenset([name]) for name in nodes(before, "Conv", "Add", "Relu")]
    assert [p.key for p in after(before, computed).pieces] == [p.key for p in before.pieces]  # two read it
    joined = frozenset(nodes(before, "Conv")[:2])
    found = after(before, [joined, *computed])
    check(before, found)
    assert len(found.pieces) == len(before.pieces) - 2 and holders(found, [shape]) == ["first"]


def test_attention_is_one_piece_where_one_kernel_holds_its_projections() -> None:
    before = cut("sdpa")
    products = [n for n in before.model.graph.node if n.op_type in ("MatMul", "Gemm")]
    held = {info.name for info in before.model.graph.initializer}
    made = {name for n in before.model.graph.node if held.issuperset(n.input) for name in n.output}
    weighted = [name_of(n) for n in products if n.input[1] in held | made]
    core = next(p for p in before.pieces if any(n.op_type == "Softmax" for n in p.model.graph.node))
    (softmax,) = [name_of(n) for n in core.model.graph.node if n.op_type == "Softmax"]
    behind = [name for name in weighted if set(before_outputs(before, name)) & set(core.inputs)]
    found = follow(before, [*behind, softmax])
    check(before, found)
    joined = {holder for holder in holders(found, [*behind, softmax])}
    assert len(joined) == 1 and len(found.pieces) == len(before.pieces) - len(set(holders(before, behind)))
    (piece,) = [p for p in found.pieces if p.name in joined]
    assert len(piece.extents) <= 3


def before_outputs(partition: Partition, name: str) -> tuple[str, ...]:
    return next(p.outputs for p in partition.pieces if name in {name_of(n) for n in p.model.graph.node})


def test_what_would_depend_on_itself_is_not_joined() -> None:
    """Both ends of a block, of which one depends on the other by what lies between."""
    before = cut("residual")
    adds = nodes(before, "Add")
    assert len(set(holders(before, adds))) == len(adds) == 2
    found = follow(before, adds)
    assert [p.key for p in found.pieces] == [p.key for p in before.pieces]


def test_parts_of_other_states_are_not_joined() -> None:
    before = cut("slim")
    kernel = [*nodes(before, "Conv")[:2]]
    assert len(follow(before, kernel).pieces) == len(before.pieces) - 1
    count = len(parts_of(before.model))
    for states in ([None] * count, [(str(k),) for k in range(count)]):
        assert len(follow(before, kernel, states=states).pieces) == len(before.pieces)


def test_weights_that_ranks_may_replace_stay_apart() -> None:
    before = cut("residual")
    static = before.model
    space = find_search_space(read_onnx(static), ())
    parts = parts_of(static)
    assert set(states_of(parts, space, ("filter",))) == {()}
    own = states_of(parts, space, ("filter", "rank"))
    used = [{name for node in part.nodes for name in reads(node)} for part in parts]
    assert [state is None for state in own] == [bool(names & space.ranks.keys()) for names in used]
    blocks = states_of(parts, space, ("filter", "block"))
    named = {name for state in blocks if isinstance(state, tuple) for name in state}
    assert named == {block.name for block in space.blocks}


def test_more_widths_than_a_grid_can_have_are_not_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sluice.profiler.pieces.fused.MOST", 1)
    before = cut("residual")
    convolutions = nodes(before, "Conv")
    found = follow(before, convolutions[1:4])
    assert [p.key for p in found.pieces] == [p.key for p in before.pieces]


def test_consumers_that_depend_on_each_other_have_no_joint_together() -> None:
    before = cut("residual")
    found = replace(after(before, []), by_kernels=True)
    assert [p.key for p in found.pieces] == [p.key for p in before.pieces]
    several = [joint for joint in find_joints(before) if not joint.pair]
    assert several
    for joint in several:
        (own,) = [j for j in find_joints(found) if j.tensor == joint.tensor]
        assert own.kept and own.pair and own.key.startswith("jpk") and own.key != joint.key
        _, whole, _ = joint_models(found, own, found.dense)
        assert joint.tensor in {info.name for info in whole.graph.output}
    plain = {j.tensor: j.key for j in find_joints(before) if j.pair}
    assert {j.tensor: j.key for j in find_joints(found) if not j.kept} == plain


def test_a_consumer_behind_other_pieces_has_a_joint_of_its_own_kind() -> None:
    """Its engine could not fuse the two, as the two joined might be."""
    before = cut("stream")
    norm, up = nodes(before, "LayerNormalization")[0], nodes(before, "MatMul")[0]
    found = replace(follow(before, [nodes(before, "Conv")[0], norm]), by_kernels=True)
    first = next(p for p in found.pieces if norm in p.outputs)
    (stream,) = set(first.outputs) - {norm}
    readers = [p.name for p in found.pieces if stream in p.inputs]
    assert readers == holders(found, nodes(before, "MatMul")[1:])
    assert stream in {j.tensor for j in find_joints(replace(found, by_kernels=False))}
    joints = {j.tensor: j for j in find_joints(found)}
    assert joints[stream].around and joints[stream].key.startswith("jpa") and not joints[stream].kept
    assert [p.name for p in joints[stream].consumers] == readers
    assert [p.name for p in joints[norm].consumers] == holders(found, [up]) and not joints[norm].kept
    assert [tensor for tensor, joint in joints.items() if joint.around] == [stream]
    assert not any(joint.around for joint in find_joints(before))


def test_images_at_the_ends_of_the_network_are_marked_as_plain() -> None:
    before = cut("stream")
    found = regrouped(before, [])
    names = {info.name for info in (*before.model.graph.input, *before.model.graph.output)}
    marked = []
    for old, piece in zip(before.pieces, found.pieces, strict=True):
        built = build_piece(found, piece, {name: size - 1 for name, size in found.dense.items()})
        ends = [*built.graph.input, *built.graph.output]
        assert [info.name for info in ends if info.doc_string == PLAIN] == [i.name for i in ends if i.name in names]
        marked.append(old.key != piece.key)
        assert marked[-1] == bool(names & {*piece.inputs, *piece.outputs}), "a piece at an end is another one"
    assert marked[0] and marked[-1] and not all(marked)
    lines = cut("slim")  # its input has three axes
    assert regrouped(lines, []).pieces[0].key == lines.pieces[0].key


def test_a_kernel_that_stays_in_several_parts_is_told() -> None:
    before = cut("residual")
    apart, within = frozenset(nodes(before, "Add")), frozenset(nodes(before, "Conv")[:1])
    found = regrouped(before, [apart, within])
    assert len(found.pieces) == len(before.pieces) and found.in_several == (apart,), "they depend on each other"
    slim = cut("slim")
    assert regrouped(slim, [frozenset(nodes(slim, "Conv")[:2])]).in_several == (), "joined"
