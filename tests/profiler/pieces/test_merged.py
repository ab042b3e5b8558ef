"""Pieces of merged runs are cut out of one graph that is never made with data; here the graph of every run is made and
dissected whole, and engines are built, and every piece must be the same."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Collection
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

from sluice import models
from sluice.models import enliven
from sluice.models.mobilenet import InvertedResidual
from sluice.models.resnet import BasicBlock
from sluice.passes import merge_sites
from sluice.passes.cut.export import to_onnx
from sluice.passes.cut.merge_onnx import merge_onnx
from sluice.passes.cut.merge_ties import groups_on
from sluice.passes.graph.exclusion import leave_out
from sluice.passes.graph.onnx_axes import analyze_onnx
from sluice.passes.graph.onnx_graph import OnnxGraph
from sluice.passes.graph.static_shapes import static_graph
from sluice.passes.merge_sites import MergeSite
from sluice.passes.search_space import find_search_space, read_onnx
from sluice.profiler.pieces import merged
from sluice.profiler.pieces.engine import build_engine
from sluice.profiler.pieces.joints import find_joints, joint_models, joint_widths
from sluice.profiler.pieces.merged import inner_names, merged_runs
from sluice.profiler.pieces.partition import (
    Partition,
    Piece,
    anchor_weight,
    build_piece,
    partition_graph,
)
from sluice.profiler.pieces.weightless import weightless, with_weights
from sluice.profiler.pieces.work import work_of
from sluice.solver.options import EditSpace
from tests.networks import Mixed

BATCH = 2


class Residual(nn.Module):
    """x + conv(relu(conv(x))), of any dimension and kernel."""

    def __init__(self, width: int, inner: int, conv: type[nn.Conv1d] | type[nn.Conv2d] = nn.Conv2d) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv(width, inner, 3, padding=1), conv(inner, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(x)))


class Bottlenecks(nn.Module):
    """Expansion, depthwise, projection; the second and third with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 3, padding=1)
        self.body = nn.Sequential(*(InvertedResidual(a, b, s, 2) for a, b, s in [(5, 7, 2), (7, 7, 1), (7, 7, 1)]))
        self.last, self.fc = nn.Conv2d(7, 9, 1), nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.last(self.body(F.relu(self.stem(x))))).mean((2, 3)))


class Row(nn.Module):
    """One spatial axis, a stride, a flatten of channels and positions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = nn.Conv1d(2, 6, 5, padding=2), nn.Conv1d(6, 8, 3, 2, 1)
        self.block1, self.block2 = Residual(6, 7, nn.Conv1d), Residual(8, 5, nn.Conv1d)
        self.last, self.fc = nn.Conv1d(8, 4, 3), nn.Linear(4 * 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block2(F.relu(self.down(self.block1(F.relu(self.stem(x))))))
        return self.fc(F.relu(self.last(F.relu(x))).flatten(1))


class Stream(nn.Module):
    """A residual stream that ends as the output: frozen, but not before a block that is folded."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, 7, 3, padding=1)
        self.block1, self.block2, self.block3 = Residual(7, 5), Residual(7, 6), Residual(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.block3(F.relu(self.block2(self.block1(self.head(x)))))


class Around(nn.Module):
    """Blocks around the network's input, whose size is fixed."""

    def __init__(self) -> None:
        super().__init__()
        self.block1, self.block2, self.last = Residual(3, 7), Residual(3, 5), nn.Conv2d(3, 6, 3)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.last(F.relu(self.block2(self.block1(x))))).mean((2, 3)))


class Removable(nn.Module):
    """Convolutions that change nothing in front of a block and behind it: removed, they tie their sides."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.block, self.d, self.fc = Residual(6, 5), nn.Conv2d(6, 4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.block(F.relu(self.b(F.relu(self.a(x))))))
        return self.fc(F.relu(self.d(F.relu(self.c(x)))).mean((2, 3)))


class Joined(nn.Module):
    """Behind folded blocks a concatenation, of two widths and of tied ones."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.side = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(3, 4, 1)
        self.block0, self.block1, self.block2 = Residual(6, 5), Residual(6, 7), Residual(16, 5)
        self.last, self.fc = nn.Conv2d(16, 5, 3), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        s, side = F.relu(self.a(x)), self.side(x)
        y = self.block1(self.block0(s))
        z = self.block2(torch.cat([y, s, side], 1))
        return self.fc(F.relu(self.last(F.relu(z))).mean((2, 3)))


class Halves(nn.Module):
    """Convolutions on halves of a value, and a value that is split behind."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 10, 3), nn.Conv2d(5, 7, 3), nn.Conv2d(7, 8, 3, padding=1)
        self.d, self.e, self.fc = nn.Conv2d(8, 10, 1), nn.Conv2d(3, 6, 1), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        left, right = F.relu(self.a(x)).chunk(2, 1)
        y = F.relu(self.d(F.relu(self.c(F.relu(self.b(left))))))
        one, two, three = y.split([3, 3, 4], 1)
        return self.fc(F.relu(self.e(one * two)).mean((2, 3))) + right.mean() + three.mean()


class Padded(nn.Module):
    """Paddings in front of a run, and of a block, whose addition reads them as well."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.block = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 3), Residual(5, 7)
        self.c, self.fc = nn.Conv2d(5, 4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.b(F.relu(self.a(F.pad(x, (1, 0, 2, 1))))))
        x = self.block(F.pad(x, (1, 1, 0, 1)))
        return self.fc(F.relu(self.c(F.relu(x))).mean((2, 3)))


class Narrow(nn.Module):
    """A single channel, depthwise convolutions in a row, a kernel of one tap and one channel."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 1, 3), nn.Conv2d(1, 1, 1), nn.Conv2d(1, 6, 1)
        self.dw1, self.dw2 = nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.d, self.fc = nn.Conv2d(6, 5, 1), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.c(F.relu(self.b(F.relu(self.a(x))))))
        return self.fc(F.relu(self.d(F.relu(self.dw2(F.relu(self.dw1(x)))))).mean((2, 3)))


class Late(nn.Module):
    """Another branch is computed between a block's convolutions and its addition."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.conv1, self.conv2 = (
            nn.Conv2d(3, 6, 3),
            nn.Conv2d(6, 7, 3, padding=1),
            nn.Conv2d(7, 6, 3, padding=1),
        )
        self.side, self.b, self.fc = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 3), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        branch, side = self.conv2(F.relu(self.conv1(h))), self.side(x)
        return self.fc(F.relu(self.b(F.relu(F.relu(h + branch) + side))).mean((2, 3)))


class Deep(nn.Module):
    """Basic blocks of three widths, projections among them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        widths = [(4, 4, 1), (4, 4, 1), (4, 6, 2), (6, 6, 1), (6, 9, 2), (9, 9, 1)]
        self.body, self.fc = nn.Sequential(*(BasicBlock(*w) for w in widths)), nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(F.relu(self.bn(self.stem(x)))).mean((2, 3)))


class Shared(nn.Module):
    """Two convolutions with one bias, of which one is merged: their widths are tied by it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 3), nn.Conv2d(5, 6, 3)
        self.pool, self.d, self.fc = nn.MaxPool2d(2), nn.Conv2d(6, 6, 1), nn.Linear(6, 3)
        self.d.bias = self.a.bias

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.c(F.relu(self.b(F.relu(self.a(x))))))
        return self.fc(F.relu(self.d(self.pool(x))).mean((2, 3)))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mixed": (Mixed, (3, 9, 7)),
    "deep": (Deep, (3, 9, 7)),
    "bottlenecks": (Bottlenecks, (3, 9, 7)),
    "row": (Row, (2, 13)),
    "stream": (Stream, (3, 8, 6)),
    "around": (Around, (3, 8, 6)),
    "removable": (Removable, (3, 8, 6)),
    "joined": (Joined, (3, 8, 6)),
    "halves": (Halves, (3, 8, 6)),
    "padded": (Padded, (3, 8, 7)),
    "narrow": (Narrow, (3, 8, 6)),
    "late": (Late, (3, 8, 6)),
    "shared": (Shared, (3, 9, 8)),
}


@functools.cache
def exported(name: str) -> onnx.ModelProto:
    factory, shape = NETWORKS[name]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model, x = factory(), torch.randn(BATCH, *shape)
    return to_onnx(enliven(model, 0, (x,)), x)


def whole(base: Partition, site: MergeSite) -> Partition:
    """The graph with this run merged: made, checked, read and dissected."""
    on = groups_on(base.analysis)
    done = merge_onnx(base.model, [site.merge], values=False)
    names = {key: name for key, name in on.items() if key[0] not in site.merge.layers}
    return partition_graph(done, BATCH, names=names | inner_names(base, site, on))


def plain(text: str) -> str:
    """A name of a branch without its prefix."""
    return re.sub(r"^.*\|merge [x\d]+( apart)?/", "", text)


def described(cut: Partition, piece: Piece) -> dict[str, object]:
    """All that anybody asks of a piece, but for the names of branches."""
    graph = piece.model.graph
    nodes = []
    for node in graph.node:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.input[:], copy.output[:] = map(plain, node.input), map(plain, node.output)
        nodes.append(copy.SerializeToString(deterministic=True))
    infos = [(plain(i.name), i.type.SerializeToString(), i.doc_string) for i in (*graph.input, *graph.output)]
    return {
        "name": piece.name,
        "key": piece.key,
        "description": piece.description,
        "extents": piece.extents,
        "sizes": {group: cut.dense[group] for group in piece.groups},
        "borders": [list(map(plain, names)) for names in (piece.inputs, piece.outputs, piece.bare)],
        "nodes": nodes,
        "infos": infos,
        "inner": sorted((plain(i.name), i.type.SerializeToString()) for i in graph.value_info),
        "tensors": [(plain(t.name), tuple(t.dims), t.data_type) for t in graph.initializer],
        "shapes": {plain(n): cut.analysis.shapes[n] for node in graph.node for n in (*node.input, *node.output) if n},
    }


def narrowed(cut: Partition, piece: Piece, seed: int) -> dict[str, int]:
    rng = np.random.default_rng(seed)
    return {group: int(rng.integers(1, cut.dense[group] + 1)) for group in piece.groups}


def work(cut: Partition, piece: Piece, widths: dict[str, int]) -> list[float]:
    """Multiply-accumulates, elements moved and of weights."""
    found, point = work_of(piece, cut), np.array([[float(extent.at(widths)) for extent in piece.extents]])
    return [float(value[0]) for value in (*found.at(point), found.weights_at(point))]


def sites_of(base: Partition, exclude: Collection[str] = (), *, widths_vary: bool = True) -> list[MergeSite]:
    space = find_search_space(read_onnx(base.model), tuple(exclude))
    return [site for site in space.merges if not (site.ties and widths_vary)]


def check(base: Partition, exclude: Collection[str] = (), *, widths_vary: bool = True, every: int = 1) -> int:
    """Every site, or some; how many."""
    places = 0
    sites = sites_of(base, exclude, widths_vary=widths_vary)
    for offered, site in itertools.islice(zip(merged_runs(base, sites), sites, strict=True), 0, None, every):
        own, cut, place = offered.partition, whole(base, site), offered.place
        by_weight = {anchor_weight(piece): piece for piece in cut.pieces}
        expected = [by_weight[run[-1]] for run in site.merge.runs]
        assert (place.switch, place.layers) == (site.switch, site.gone)
        assert [described(own, p) for p in place.pieces] == [described(cut, p) for p in expected]
        assert [plain(n) for n in place.inner] == [tensor for piece in expected[:-1] for tensor in piece.outputs]
        assert place.ends == expected[-1].outputs
        for seed, (piece, other) in enumerate(zip(place.pieces, expected, strict=True)):
            widths = narrowed(cut, other, places + seed)
            assert work(own, piece, widths) == work(cut, other, widths)
            if places % 5 == 0:
                assert computed(build_piece(own, piece, widths)) == computed(build_piece(cut, other, widths))
        assert joints(own, place.inner, places) == joints(cut, tuple(map(plain, place.inner)), places)
        places += 1
    return places


def check_engines(base: Partition, exclude: Collection[str] = (), *, widths_vary: bool = True, every: int = 1) -> int:
    """The pieces of every site at random widths have the shapes that they have in an engine of these; how many."""
    sites = sites_of(base, exclude, widths_vary=widths_vary)
    chosen = list(zip(sites, merged_runs(base, sites), strict=True))[::every]
    for k, (site, offered) in enumerate(chosen):
        rng = np.random.default_rng(k)
        widths = {group: int(rng.integers(1, n + 1)) if widths_vary else n for group, n in base.dense.items()}
        options = EditSpace((), {}, {site.switch: site.merge})
        engine = static_graph(build_engine(base, {**widths, site.switch: 1}, options), BATCH)
        there = {name: tuple(init.dims) for name, init in OnnxGraph(engine).initializers.items()}
        there |= OnnxGraph(engine).shapes
        for piece in offered.place.pieces:
            built = OnnxGraph(build_piece(offered.partition, piece, {**offered.partition.dense, **widths}))
            here = {plain(name): tuple(init.dims) for name, init in built.initializers.items()}
            here |= {plain(name): shape for name, shape in built.shapes.items()}
            assert here == {name: there[name] for name in here}
    return len(chosen)


def computed(model: onnx.ModelProto) -> list[object]:
    """What a model computes, whatever its values are called; of weights, which are drawn for an engine, the shapes."""
    graph, order = model.graph, {}
    for name in (n for ends in (graph.input, graph.initializer, graph.node) for each in ends for n in _made(each)):
        order.setdefault(name, len(order))
    return [
        *((n.op_type, n.attribute, [order.get(i) for i in n.input], [order[o] for o in n.output]) for n in graph.node),
        *((order[info.name], info.type, info.doc_string) for info in (*graph.input, *graph.output)),
        *((t.data_type, tuple(t.dims), _integers(t)) for t in graph.initializer),
    ]


def _integers(tensor: onnx.TensorProto) -> list[int] | None:
    array = numpy_helper.to_array(tensor)
    return array.tolist() if array.dtype.kind in "bi" else None


def _made(each: onnx.NodeProto | onnx.ValueInfoProto | onnx.TensorProto) -> list[str]:
    return list(each.output) if isinstance(each, onnx.NodeProto) else [each.name]


def joints(cut: Partition, inner: Collection[str], seed: int) -> list[object]:
    found: list[object] = []
    for joint in find_joints(cut):
        if joint.tensor in inner:
            own = joint.extent.coefs if joint.extent else ()
            widths = joint_widths(cut, joint, {g: 1 + seed % cut.dense[g] for g, _ in own})
            found.append((plain(joint.tensor), joint.key, joint.description, joint.extent, joint.calls))
            if seed % 7 == 0:
                parts, together, sources = joint_models(cut, joint, widths)
                found += [computed(model) for model in (*parts, together)] + [sources]
    return found


@pytest.fixture(autouse=True)
def _any_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are shown that nobody would time."""
    monkeypatch.setattr(merge_sites, "MORE", 1e9)


# In the others a merge unties what the dense graph ties, which its engines are cut by.
PLAIN = [name for name in NETWORKS if name not in ("stream", "around", "joined")]


@pytest.mark.parametrize("widths_vary", [True, False])
@pytest.mark.parametrize("name", PLAIN)
def test_pieces_are_those_of_the_whole_graph(name: str, widths_vary: bool) -> None:
    if widths_vary or name != "removable":
        assert check(partition_graph(exported(name), BATCH), widths_vary=widths_vary) > 1


@pytest.mark.parametrize("widths_vary", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_pieces_are_those_of_engines(name: str, widths_vary: bool) -> None:
    assert check_engines(partition_graph(exported(name), BATCH), widths_vary=widths_vary) > 1


@pytest.mark.parametrize("exclude", ["block1.conv1", "block2", "stem", "tail1"])
def test_an_excluded_layer_is_no_matter_for_the_others(exclude: str) -> None:
    model = exported("mixed")
    base = partition_graph(model, BATCH, like=leave_out(analyze_onnx(model), [exclude]))
    assert check_engines(base, [exclude]) > 2
    if exclude in ("block1.conv1", "tail1"):
        assert check(base, [exclude]) > 2


def test_faults_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the tie a run's output is a group of its own."""
    base = partition_graph(exported("joined"), BATCH)
    assert check_engines(base) > 1
    whole_graph = merged._with_branches

    def untied(dense: onnx.ModelProto, branches: list[merged._Branch]) -> onnx.ModelProto:
        ties = [helper.make_node("Identity", b.tie.input[:1], b.tie.output) for b in branches]
        return whole_graph(dense, [replace(b, tie=tie) for b, tie in zip(branches, ties, strict=True)])

    monkeypatch.setattr(merged, "_with_branches", untied)
    with pytest.raises(AssertionError):
        check_engines(base)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "every"), [("resnet20", 3), ("mobilenet_v2", 9)])
def test_pieces_of_reference_networks(name: str, every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    model = models.resnet20(widths=(4, 6, 9)) if name == "resnet20" else models.mobilenet_v2(width=0.1)
    x = torch.randn(BATCH, 1, 14, 12, generator=torch.Generator().manual_seed(0))
    base = partition_graph(to_onnx(enliven(model, 0, (x,)), x), BATCH)
    assert check(base, every=every) > 20
    assert check_engines(base, every=every) > 20


def test_hollow_weights_are_filled_when_a_piece_is_built() -> None:
    base = partition_graph(exported("mixed"), BATCH)
    site = sites_of(base)[0]
    piece = merged_runs(base, [site])[0].place.pieces[0]
    empty = [t.name for t in piece.model.graph.initializer if not t.HasField("raw_data")]
    before = piece.model.SerializeToString()
    done = with_weights(piece.model)
    assert set(map(plain, empty)) == {f"{piece.name}.weight", f"{piece.name}.bias"}
    assert piece.model.SerializeToString() == before
    whole_piece = next(p for p in whole(base, site).pieces if p.name == piece.name)
    assert computed(done) == computed(whole_piece.model)
    assert with_weights(done) is done


def test_what_has_data_of_any_kind_is_not_hollow() -> None:
    given = helper.make_tensor("given", TensorProto.FLOAT, [3], [1.0, 2.0, 3.0])
    assert not given.HasField("raw_data")
    nothing, half = numpy_helper.from_array(np.zeros((0, 3)), "no"), weightless("half", TensorProto.FLOAT16, (3, 2))
    single = weightless("single", TensorProto.FLOAT, (1, 1, 1))
    assert single.HasField("raw_data")
    model = helper.make_model(helper.make_graph([], "g", [], [], [given, nothing, half, single]))
    *same, made, one = with_weights(model).graph.initializer
    assert same == [given, nothing] and one == single
    assert made.data_type == TensorProto.FLOAT16 and numpy_helper.to_array(made).std() > 0
