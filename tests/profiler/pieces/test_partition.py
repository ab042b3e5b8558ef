from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

from sluice.core.latency import Extent
from sluice.passes.cut.export import to_onnx
from sluice.passes.cut.rewrite_onnx import cut_graph
from sluice.passes.graph.exclusion import leave_out
from sluice.passes.graph.onnx_axes import analyze_onnx
from sluice.profiler.pieces.partition import (
    ANCHORS,
    Partition,
    Piece,
    build_piece,
    partition_graph,
    spread_widths,
)
from sluice.profiler.pieces.sources import add_sources, source_model
from sluice.runtime.base.compare import assert_close
from sluice.runtime.base.runner import PLAIN
from sluice.runtime.ort.cpu import OrtRunner
from tests.device import chain
from tests.exported import named
from tests.networks import NETWORKS, any_network

QUICK = ("splits", "concat", "grouped", "tokens", "squeeze_excite", "in_place", "resnet20")
SLOW = (*(n for n in NETWORKS if n not in (*QUICK, "sequence1d")), "mobilenet_v2", "densenet", "se_resnet")
ALL = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


@dataclass(frozen=True)
class Case:
    partition: Partition
    feeds: dict[str, np.ndarray]


@pytest.fixture(scope="session")
def case() -> Callable[[str], Case]:
    @functools.cache
    def make(name: str) -> Case:
        _, inputs = any_network(name)
        exported = named(name)
        feeds = {info.name: x.numpy() for info, x in zip(exported.graph.input, inputs, strict=True)}
        return Case(partition_graph(exported, len(inputs[0])), feeds)

    return make


def run(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return OrtRunner().build(model).run({info.name: feeds[info.name] for info in model.graph.input})


def random_feeds(model: onnx.ModelProto, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes_of(model.graph.input).items()}


def shapes_of(infos: object) -> dict[str, tuple[int, ...]]:
    return {i.name: tuple(d.dim_value for d in i.type.tensor_type.shape.dim) for i in infos}  # type: ignore[attr-defined]


def random_widths(partition: Partition, seed: int) -> dict[str, int]:
    rng = np.random.default_rng(seed)
    return {g: int(rng.integers(1, size + 1)) for g, size in partition.dense.items()}


@pytest.mark.parametrize("name", ALL)
def test_every_operator_is_in_one_piece_and_pieces_are_ordered(name: str, case: Callable[[str], Case]) -> None:
    partition = case(name).partition
    graph = partition.model.graph
    live = {info.name for info in graph.input}
    active = []
    for node in graph.node:
        if live.intersection(node.input):
            live.update(node.output)
            active.append(node.output[0])
    placed = [n.output[0] for p in partition.pieces for n in p.model.graph.node if n.output[0] in live]
    assert sorted(placed) == sorted(active)
    ready = {info.name for info in graph.input}
    for piece in partition.pieces:
        assert set(piece.inputs) <= ready
        assert not set(piece.outputs) & ready
        assert set(piece.bare) <= set(piece.inputs)
        anchors = [n for n in piece.model.graph.node if n.op_type in ANCHORS and n.output[0] in live]
        assert len(anchors) <= 1 or all(live.issuperset(n.input) for n in anchors)  # or a core
        ready |= set(piece.outputs)
    assert {info.name for info in graph.output} <= ready


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("seed", [None, 1])
def test_pieces_run_in_order_compute_the_network(name: str, seed: int | None, case: Callable[[str], Case]) -> None:
    partition, known = case(name).partition, dict(case(name).feeds)
    widths = partition.dense if seed is None else random_widths(partition, seed)
    whole = cut_graph(partition.model, partition.analysis, partition.masks(widths))
    reference = run(whole, known)
    for piece in partition.pieces:
        known.update(run(build_piece(partition, piece, widths), known))
    assert_close({out: known[out] for out in reference}, reference)


@pytest.mark.parametrize("name", ALL)
def test_a_piece_has_the_extents_it_is_asked_for(name: str, case: Callable[[str], Case]) -> None:
    partition = case(name).partition
    for index, piece in enumerate(partition.pieces):
        rng = np.random.default_rng(index)
        sizes = [sum(partition.dense[g] for g, _ in e.coefs) for e in piece.extents]
        asked = [int(rng.integers(len(e.coefs), n + 1)) for e, n in zip(piece.extents, sizes, strict=True)]
        widths = spread_widths(piece, asked, partition.dense)
        assert set(widths) == set(piece.groups)
        assert [int(e.at(widths)) for e in piece.extents] == asked
        model = build_piece(partition, piece, widths)
        masks = partition.masks(widths)
        expected = {}
        for value in (*piece.inputs, *piece.outputs):
            shape = list(partition.analysis.shapes[value])
            for axis in partition.analysis.values.get(value, ()):
                shape[axis.dim] = int(axis.mask(masks).sum())
            expected[value] = tuple(shape)
        assert shapes_of([*model.graph.input, *model.graph.output]) == expected
        found = run(model, random_feeds(model, index))
        assert {n: v.shape for n, v in found.items()} == {n: expected[n] for n in piece.outputs}


class Padded(nn.Module):
    """One padding with one reader, one with two."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 7, 3), nn.Conv2d(7, 5, (5, 1))
        self.c, self.d = nn.Conv2d(7, 5, 3), nn.Conv2d(7, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(F.pad(x, (0, 0, 1, 2))))
        shared = F.pad(y, (1, 2, 3, 0))
        ends = [self.b(F.pad(y, (0, 0, 3, 1))), self.c(shared), self.d(shared)]
        return torch.cat([end.mean((2, 3)) for end in ends], 1)


def test_padding_belongs_to_the_convolution_behind_it() -> None:
    found = partition_graph(to_onnx(Padded(), torch.randn(2, 3, 9, 8)), 2)
    pieces = {piece.name: piece for piece in found.pieces}
    operators = {name: [node.op_type for node in piece.model.graph.node] for name, piece in pieces.items()}
    assert operators["a"][:2] == ["Pad", "Conv"] and operators["b"][:2] == ["Pad", "Conv"]
    assert operators["a"].count("Pad") == 2 and operators["c"][0] == operators["d"][0] == "Conv"
    assert pieces["b"].bare == () and pieces["b"].inputs == ("relu",)


@pytest.mark.parametrize("name", ALL)
def test_sources_make_the_inputs_that_meet_no_anchor(name: str, case: Callable[[str], Case]) -> None:
    partition = case(name).partition
    makers = {out: node for node in partition.model.graph.node for out in node.output}

    def concatenated(tensor: str) -> bool:
        maker = makers.get(tensor)
        if maker is None or maker.op_type in ANCHORS:
            return False
        return maker.op_type == "Concat" or any(map(concatenated, maker.input))

    def laid(tensor: str) -> bool:
        maker = makers.get(tensor)
        if maker is None or maker.op_type in ("Reshape", "Transpose", "Squeeze", "Flatten", "LayerNormalization"):
            return False
        return "Conv" in maker.op_type if maker.op_type in ANCHORS else any(map(laid, maker.input))

    for piece in partition.pieces:
        anchored = {node.input[0] for node in piece.model.graph.node if node.op_type in ANCHORS}
        loose = [n for n in piece.model.graph.node if n.op_type not in ANCHORS and n.output[0] not in anchored]
        meets = {name for node in loose for name in node.input}
        assert set(piece.bare) == {n for n in meets & set(piece.inputs) if laid(n) and not concatenated(n)}
        plain = build_piece(partition, piece, partition.dense)
        sourced, shapes = add_sources(plain, piece.bare)
        before, after = shapes_of(plain.graph.input), shapes_of(sourced.graph.input)
        made = [n for n in piece.bare if len(before[n]) >= 3]
        assert sorted(shapes) == sorted(before[n] for n in made)
        assert after == {
            **{n: s for n, s in before.items() if n not in made},
            **{f"{n}:seed": (before[n][0], 1, *before[n][2:]) for n in made},
        }
        if not made:
            continue
        feeds = random_feeds(sourced, 0)
        weights = {w.name: numpy_helper.to_array(w) for w in sourced.graph.initializer}
        filled = {n: feeds[f"{n}:seed"] * weights[f"{n}:source"][:, 0] for n in made}
        assert_close(run(sourced, feeds), run(plain, {**feeds, **filled}))


class Grown(nn.Module):
    """Every layer's result is put beside all that came before it; only the first of these was not concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 5, 1)
        self.more = nn.ModuleList([nn.Conv2d(5, 4, 1), nn.Conv2d(9, 4, 1), nn.Conv2d(13, 4, 1)])
        self.last = nn.Conv2d(17, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        for conv in self.more:
            y = torch.cat([y, conv(F.relu(y))], 1)
        return self.last(F.relu(y))


def test_what_was_concatenated_has_no_source_and_another_key() -> None:
    found = partition_graph(to_onnx(Grown().eval(), torch.randn(2, 3, 9, 8)), 2)
    pieces = {p.name: p for p in found.pieces}
    made, joined, again = (pieces[f"more.{k}"] for k in range(3))
    assert [len(p.inputs) for p in (made, joined)] == [2, 2]
    assert made.bare == made.inputs[1:] and joined.bare == ()
    assert made.key != joined.key
    assert not pieces["last"].bare and not again.bare
    for piece in (joined, pieces["last"]):
        for model in (piece.model, build_piece(found, piece, {"first": 3})):
            assert {i.doc_string for i in model.graph.input} == {PLAIN}
    assert {i.doc_string for i in build_piece(found, made, {}).graph.input} == {""}


@pytest.mark.parametrize("name", ALL)
def test_pieces_have_names_of_their_own(name: str, case: Callable[[str], Case]) -> None:
    """Also where one weight is used twice."""
    names = [p.name for p in case(name).partition.pieces]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(("threads", "taps"), [(1, (1, 1, 1)), (2, (25, 25, 27))])
def test_a_source_alone(threads: int, taps: tuple[int, ...]) -> None:
    for shape, count in zip(((2, 7, 5, 4), (3, 6, 11), (2, 4, 3, 5, 3)), taps, strict=True):
        model = source_model(shape, threads)
        onnx.checker.check_model(model, full_check=True)
        assert math.prod(model.graph.initializer[0].dims) == shape[1] * count
        assert run(model, random_feeds(model, 0))["x"].shape == shape


def keys(model: onnx.ModelProto, batch: int = 2) -> list[str]:
    return [p.key for p in partition_graph(model, batch).pieces]


def test_names_and_widths_are_not_in_the_key() -> None:
    reference = keys(chain([10, 7, 10]))
    assert keys(chain([10, 7, 10], prefix="other.")) == reference
    assert keys(chain([6, 9, 11])) == reference
    assert keys(chain([10, 7, 10], batch="N")) == reference
    assert len(set(reference)) == 4  # the second convolution has no pooling behind it, the third has


def test_equal_layers_of_one_network_share_a_key() -> None:
    first, second, third, last, head = keys(chain([10, 7, 9, 5]))
    assert second == third
    assert len({first, second, last, head}) == 4


@pytest.mark.parametrize(
    "changed",
    [
        {"size": 11},
        {"kernel": 5, "pads": 2},
        {"pads": 0},
        {"stride": 2},
        {"activation": "Sigmoid"},
        {"activation": "LeakyRelu"},
        {"batch": 3},
    ],
    ids=str,
)
def test_everything_else_is_in_the_key(changed: dict[str, int | str]) -> None:
    batch = int(changed.get("batch", 2))
    reference, other = keys(chain([10, 7, 9])), keys(chain([10, 7, 9], **changed), batch)  # type: ignore[arg-type]
    assert reference[1] != other[1]
    assert reference[2] != other[2]


def test_attributes_and_bounds_are_in_the_key() -> None:
    def with_bound(top: float) -> onnx.ModelProto:
        model = chain([10, 7])
        model.graph.initializer.append(numpy_helper.from_array(np.array(0.0, np.float32), "low"))
        model.graph.initializer.append(numpy_helper.from_array(np.array(top, np.float32), "high"))
        for node in model.graph.node:
            if node.op_type == "Relu":
                node.op_type = "Clip"
                node.input.extend(["low", "high"])
        return model

    def with_slope(alpha: float) -> onnx.ModelProto:
        model = chain([10, 7], activation="LeakyRelu")
        for node in model.graph.node:
            if node.op_type == "LeakyRelu":
                node.attribute.append(helper.make_attribute("alpha", alpha))
        return model

    for make in (with_bound, with_slope):
        assert keys(make(0.5)) == keys(make(0.5))
        assert keys(make(0.5))[0] != keys(make(0.25))[0]


def test_a_concatenation_is_one_extent(case: Callable[[str], Case]) -> None:
    partition = case("concat").partition
    several = [e for p in partition.pieces for e in p.extents if len(e.coefs) > 1]
    assert several
    assert all(coef == 1 for e in several for _, coef in e.coefs)


def test_excluded_layers_stay_whole() -> None:
    model = chain([10, 7])
    partition = partition_graph(model, 2, like=leave_out(analyze_onnx(model), ["conv0"]))
    assert partition.dense == {"conv1": 7}
    assert partition.pieces[0].extents == ()


@given(
    st.lists(st.integers(1, 90), min_size=1, max_size=6),
    st.lists(st.integers(1, 90), min_size=1, max_size=3),
    st.data(),
)
@settings(max_examples=200, deadline=None)
def test_spread_widths_add_up(first: list[int], second: list[int], data: st.DataObject) -> None:
    sizes = {f"a{k}": n for k, n in enumerate(first)} | {f"b{k}": n for k, n in enumerate(second)}
    extents = tuple(Extent(tuple((g, 1) for g in sizes if g[0] == side)) for side in "ab")
    piece = Piece("p", "k", "", onnx.ModelProto(), extents, (), ())
    values = [data.draw(st.integers(len(part), sum(part))) for part in (first, second)]
    widths = spread_widths(piece, values, sizes)
    assert [e.at(widths) for e in extents] == values
    assert all(1 <= widths[g] <= n for g, n in sizes.items())
    assert spread_widths(piece, [sum(first), sum(second)], sizes) == sizes


def test_spread_widths_refuses_what_cannot_be() -> None:
    piece = Piece("p", "k", "", onnx.ModelProto(), (Extent((("a", 1), ("b", 1))),), (), ())
    with pytest.raises(AssertionError, match="cannot be 12"):
        spread_widths(piece, [12], {"a": 4, "b": 7})
    with pytest.raises(AssertionError, match="cannot be 1 "):
        spread_widths(piece, [1], {"a": 4, "b": 7})
