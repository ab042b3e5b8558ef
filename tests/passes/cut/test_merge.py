"""Linear and unmerged, merged in torch, merged in ONNX: one function, up to the borders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from sluice.core.errors import SluiceError
from sluice.core.plan import Merge
from sluice.models import enliven
from sluice.models.mobilenet import InvertedResidual
from sluice.models.resnet import BasicBlock
from sluice.models.resnet1d import Block1d
from sluice.passes.cut.export import to_onnx
from sluice.passes.cut.merge_onnx import merge_onnx
from sluice.passes.cut.merge_region import Run, compose_run, find_region, merged_shape
from sluice.passes.cut.merge_torch import linearize_torch, merge_torch
from sluice.passes.cut.resolve import make_plan
from sluice.passes.cut.rewrite_onnx import rewrite_onnx
from sluice.passes.cut.rewrite_torch import rewrite_torch
from sluice.passes.graph.aten import analyze
from sluice.passes.graph.capture import capture, clone
from sluice.passes.graph.chains import NEUTRAL
from sluice.passes.graph.chains_onnx import chains_onnx
from sluice.passes.graph.chains_torch import chains_torch
from sluice.passes.graph.segments import find_segments, folded_norms
from sluice.passes.graph.static_shapes import static_graph
from sluice.runtime.base.compare import assert_close, relative_error
from sluice.runtime.ort.cpu import OrtRunner


class Plain(nn.Module):
    """Convolutions of all kinds in a row: with bias, without norm, strided, depthwise, not square."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.an = nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5, eps=1e-2)
        self.b, self.bn = nn.Conv2d(5, 5, (3, 5), padding=(1, 2), bias=False), nn.BatchNorm2d(5, affine=False)
        self.c = nn.Conv2d(5, 6, 3, 2, padding=1)
        self.d, self.dn = nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False), nn.BatchNorm2d(6)
        self.e, self.en = nn.Conv2d(6, 7, 1, bias=False), nn.BatchNorm2d(7)
        self.f = nn.Conv2d(7, 4, 3, stride=(2, 1))
        self.drop, self.fc = nn.Dropout(0.3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.an(self.a(x)))
        x = F.silu(self.bn(self.b(x)))
        x = self.drop(F.relu6(self.c(x)))
        x = F.hardswish(self.dn(self.d(x)))
        x = F.gelu(self.en(self.e(x)))
        return self.fc(torch.tanh(self.f(x)).mean((2, 3)))


class Written(nn.Module):
    """Activations of several operators, as people write them and as exporters do, and what does nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d, self.e, self.f = (nn.Conv2d(3, 3, 3, padding=1) for _ in ABCDEF)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = self.b(x * torch.sigmoid(x))
        x = self.c(torch.sigmoid(x) * x)
        x = self.d(x * torch.tanh(F.softplus(x)))
        x = F.elu(x).contiguous().to(torch.float32) * 1.0
        x = x + self.e(x)
        return self.f(F.softplus(x.mul_(x.sigmoid()))).mean((2, 3))


class Scaled(nn.Module):
    """What looks like an activation of several operators, and is none."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(3, 3, 3, padding=1) for _ in "abcd")
        self.scale = nn.Parameter(torch.rand(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = self.b(x * torch.sigmoid(x * self.scale))
        x = self.c(x * (1.0 - x))
        gate = torch.sigmoid(x)
        return (self.d(gate * x) + gate).mean((2, 3))


class Blocks(nn.Module):
    """A stem, then blocks, then a mean: ``make`` gives the blocks."""

    def __init__(self, stem: nn.Module, *blocks: nn.Module) -> None:
        super().__init__()
        self.stem, self.blocks = stem, nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(F.relu(self.stem(x))).flatten(2).amax(-1)


class Nested(nn.Module):
    """A residual block inside of a residual block; the outer one has a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.an = nn.Conv2d(5, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.b, self.c = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 7, 1)
        self.side, self.last = nn.Conv2d(5, 7, 1), nn.Conv2d(7, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.an(self.a(x)))
        y = F.relu(y + self.b(y))
        return F.relu(self.last(F.relu(self.side(x) + self.c(y))))


def stem(channels: int) -> nn.Module:
    return nn.Conv2d(3, channels, 3, padding=1)


def vgg() -> nn.Module:
    layers: list[nn.Module] = []
    for i, (c, n) in enumerate([(5, 6), (6, 6), (6, 6), (6, 7)]):
        layers += [nn.Conv2d(c, n, 3, padding=1), nn.BatchNorm2d(n), nn.ReLU()]
        layers += [nn.MaxPool2d(2, ceil_mode=True)] if i == 1 else []
    return Blocks(stem(5), *layers)


def names(prefix: str, *parts: str) -> tuple[str, ...]:
    return tuple(f"{prefix}{part}.weight" for part in parts)


Runs = Sequence[Sequence[str]]
Build = Callable[[], nn.Module]
TWO = [f"blocks.{i}.conv{j}.weight" for i in (0, 1) for j in (1, 2)]
IR = [f"blocks.0.conv.{i}.weight" for i in (0, 3, 6)]
ABCDEF = [f"{c}.weight" for c in "abcdef"]
VGG = [f"blocks.{i}.weight" for i in (0, 3, 7, 10)]


def identity2() -> nn.Module:
    return Blocks(stem(5), BasicBlock(5, 5), BasicBlock(5, 5))


def projection() -> nn.Module:
    return Blocks(stem(5), BasicBlock(5, 7, 2), BasicBlock(7, 7))


def widening() -> nn.Module:
    return Blocks(stem(5), BasicBlock(5, 7), BasicBlock(7, 7), nn.Conv2d(7, 4, 3))


def mobile() -> nn.Module:
    return Blocks(stem(5), InvertedResidual(5, 5, 1, 3), InvertedResidual(5, 7, 2, 3))


def nested() -> nn.Module:
    return Blocks(stem(5), Nested())


def series() -> nn.Module:
    return Blocks(nn.Conv1d(3, 5, 3, padding=1), Block1d(5, 7, 2), Block1d(7, 7, 1))


# network, merges as (layers, runs), what is left of the merged layers' tensors
CASES: dict[str, tuple[Build, list[tuple[Sequence[str], Runs]]]] = {
    "row": (Plain, [(ABCDEF, [ABCDEF])]),
    "row, layers removed": (Plain, [(ABCDEF, [["a.weight", "c.weight", "e.weight", "f.weight"]])]),
    "written activations": (Written, [(ABCDEF, [ABCDEF])]),
    "written activations, layers removed": (Written, [(ABCDEF[:4], [ABCDEF[1:4:2]])]),
    "written activations, a block removed": (Written, [(ABCDEF, [[ABCDEF[0], ABCDEF[5]]])]),
    "written activations in runs": (Written, [(ABCDEF, [ABCDEF[:2], ABCDEF[2:3], ABCDEF[3:]])]),
    "row in runs": (Plain, [(ABCDEF, [ABCDEF[:1], ABCDEF[2:4], ABCDEF[4:]])]),
    "depthwise stays": (Plain, [(["d.weight"], [["d.weight"]])]),
    "two merges": (Plain, [(ABCDEF[:2], [ABCDEF[:2]]), (ABCDEF[2:5], [ABCDEF[2:5]])]),
    "last of a row removed": (Plain, [(ABCDEF[:2], [ABCDEF[:1]])]),
    "between pools": (vgg, [(VGG[:2], [VGG[:2]]), (VGG[2:], [VGG[3:]])]),
    "block": (identity2, [(TWO[:2], [TWO[:2]])]),
    "second of a block": (identity2, [(TWO[:2], [TWO[1:2]])]),
    "blocks": (identity2, [(TWO, [TWO])]),
    "blocks, first of each": (identity2, [(TWO, [TWO[::2]])]),
    "a whole block removed": (identity2, [(TWO, [TWO[2:]])]),
    "the last block removed": (identity2, [(TWO, [TWO[:1]])]),
    "blocks in runs": (identity2, [(TWO, [TWO[:2], TWO[2:]])]),
    "a block in runs": (identity2, [(TWO, [TWO[:1], TWO[1:2], TWO[2:]])]),
    "two merges of blocks": (identity2, [(TWO[:2], [TWO[:2]]), (TWO[2:], [TWO[2:3]])]),
    "projection": (projection, [(TWO[:2], [TWO[:2]])]),
    "projection, layer removed": (projection, [(TWO[:2], [TWO[:1]])]),
    "projection and block": (projection, [(TWO, [TWO])]),
    "widening": (widening, [(TWO, [TWO])]),
    "projection in runs": (projection, [(TWO[:2], [TWO[:1], TWO[1:2]])]),
    "inverted residual": (mobile, [(IR, [IR])]),
    "inverted residual without depthwise": (mobile, [(IR, [IR[::2]])]),
    "inside a block": (mobile, [(IR[:2], [IR[:2]])]),
    "strided": (mobile, [([w.replace("0.conv", "1.conv") for w in IR], [[w.replace("0.conv", "1.conv") for w in IR]])]),
    "one axis": (series, [(TWO, [TWO])]),
    "one axis, projection": (series, [(TWO[:2], [TWO[:2]])]),
    "nested": (nested, [(names("blocks.0.", *"abc"), [names("blocks.0.", *"abc")])]),
    "nested and on": (
        nested,
        [(names("blocks.0.", *"abc", "last"), [names("blocks.0.", *"abc", "last")])],
    ),
    "nested in runs": (
        nested,
        [(names("blocks.0.", *"abc"), [names("blocks.0.", *"ab"), names("blocks.0.", "c")])],
    ),
}


def build(make: Build, shape: tuple[int, ...] = (3, 11, 9)) -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = make()
        x = torch.randn(2, *shape)
    return enliven(model, 1, (x,)), x


def edits(spec: list[tuple[Sequence[str], Runs]]) -> list[Merge]:
    return [Merge(tuple(layers), tuple(tuple(run) for run in runs)) for layers, runs in spec]


@cache
def exported(make: Build) -> tuple[nn.Module, Tensor, fx.GraphModule, bytes]:
    """Model, input, captured graph (not to be changed) and ONNX file of a network."""
    model, x = build(make, (3, 23) if make is series else (3, 11, 9))
    dense = capture(model, x)
    return model, x, dense, to_onnx(dense, x).SerializeToString()


def run_onnx(model: onnx.ModelProto, x: Tensor) -> np.ndarray:
    return next(iter(OrtRunner().build(model).run({model.graph.input[0].name: x.numpy()}).values()))


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in module.state_dict().items() if "num_batches" not in name}


def linear(dense: fx.GraphModule, merges: list[Merge]) -> fx.GraphModule:
    gm = clone(dense)
    linearize_torch(gm, merges)
    return gm


def merged(gm: fx.GraphModule, merges: list[Merge]) -> fx.GraphModule:
    gm = clone(gm)
    merge_torch(gm, merges)
    return gm


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_the_three_agree(case: str) -> None:
    make, spec = CASES[case]
    model, x, dense, data = exported(make)
    merges = edits(spec)
    trained = linear(dense, merges)
    file = onnx.load_from_string(data)
    slim = merge_onnx(file, merges)
    assert file.SerializeToString() == data
    reference = trained(x)
    assert_close(merged(trained, merges)(x), reference)
    assert_close(merged(dense, merges)(x), reference)
    assert_close(run_onnx(slim, x), reference)
    assert_close(linear(trained, merges)(x), reference, tol=0.0)
    after = shapes(merged(trained, merges))
    assert after == shapes(merged(dense, merges))
    floats = {i.name: tuple(i.dims) for i in slim.graph.initializer if i.name in shapes(dense) or i.name in after}
    assert floats == after
    for merge in merges:
        last = {run[-1] for run in merge.runs}
        assert not (set(merge.layers) - last) & after.keys() and last <= after.keys()
        assert all(name.replace("weight", "bias") in after for name in last)
    if case != "depthwise stays":
        assert relative_error(reference, model(x)) > 1e-3


def test_shapes_alone_have_the_same_shapes() -> None:
    for case in (
        "row, layers removed",
        "depthwise stays",
        "projection and block",
        "inverted residual without depthwise",
    ):
        make, spec = CASES[case]
        _, x, _, data = exported(make)
        file = onnx.load_from_string(data)
        quick, whole = (merge_onnx(file, edits(spec), values=v) for v in (False, True))
        assert [(i.name, list(i.dims)) for i in quick.graph.initializer] == [
            (i.name, list(i.dims)) for i in whole.graph.initializer
        ]
        assert list(quick.graph.node) == list(whole.graph.node)
        run_onnx(quick, x)


def test_linear_is_the_network_with_its_padding_in_front() -> None:
    """By hand: a pair of convolutions, and a block whose shortcut sees the zeros of the layers behind it."""
    model, x = build(identity2)
    dense = capture(model, x)
    with torch.no_grad():
        first = F.relu(model.stem(x))

        def conv(block: int, index: int, x: Tensor) -> Tensor:
            owner = model.blocks[block]
            return getattr(owner, f"bn{index}")(F.conv2d(x, getattr(owner, f"conv{index}").weight))

        wide = F.pad(first, (4,) * 4)
        y = wide[:, :, 2:-2, 2:-2] + conv(0, 2, conv(0, 1, wide))
        y = F.relu(y[:, :, 2:-2, 2:-2] + conv(1, 2, conv(1, 1, y)))
        assert_close(linear(dense, edits(CASES["blocks"][1]))(x), y.flatten(2).amax(-1))


def test_linear_network_trains() -> None:
    model, x = build(projection)
    gm = linear(capture(model, x), edits(CASES["projection and block"][1])).train()
    gm(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in gm.parameters())
    gm.eval()
    with torch.no_grad():
        assert_close(merged(gm, edits(CASES["projection and block"][1]))(x), gm(x))


@torch.no_grad()
def test_merged_and_linear_networks_can_be_exported() -> None:
    model, x = build(projection)
    merges = edits(CASES["projection and block"][1])
    trained = linear(capture(model, x), merges)
    for gm in (trained, merged(trained, merges)):
        assert_close(run_onnx(to_onnx(gm, x), x), gm(x))
        again = capture(nn.Sequential(gm).eval(), x)
        assert_close(again(x), gm(x))
    assert len(chains_torch(capture(nn.Sequential(trained).eval(), x))) == len(chains_torch(trained))


@pytest.mark.parametrize(
    ("make", "layers", "runs", "message"),
    [
        (Plain, ABCDEF[:3], [ABCDEF[:2]], r"'c\.weight' changes channels or size"),
        (Plain, [*ABCDEF[:1], "no.weight"], [["no.weight"]], r"'no\.weight' is in no chain"),
        (Plain, ABCDEF[:3:2], [ABCDEF[:3:2]], r"'b\.weight' lies between its layers"),
        (identity2, TWO[1:3], [TWO[1:3]], r"residual block of 'blocks\.0\.conv1\.weight' cannot be taken in"),
        (identity2, TWO, [TWO[:3], TWO[3:]], r"reaches across the border of a residual block"),
        (vgg, VGG, [VGG], r"is in no chain of convolutions with the others"),
    ],
)
def test_what_cannot_be_merged_is_refused(make: Build, layers: list[str], runs: Runs, message: str) -> None:
    _, _, dense, data = exported(make)
    merges = edits([(layers, runs)])
    with pytest.raises(SluiceError, match=message):
        merge_torch(clone(dense), merges)
    with pytest.raises(SluiceError, match=message):
        linearize_torch(clone(dense), merges)
    with pytest.raises(SluiceError, match=message):
        merge_onnx(onnx.load_from_string(data), merges)


def test_both_front_ends_read_the_same_chains() -> None:
    for make in (Plain, Written, Scaled, vgg, identity2, projection, mobile, series, nested):
        _, _, gm, data = exported(make)

        def outline(chains: tuple) -> list:
            return [
                (
                    [(v.weight, v.shape, v.stride, v.pad, v.groups, bool(v.acts), v.norm is None) for v in c.layers],
                    [(s.start, s.end, s.shortcut and s.shortcut.weight, s.barrier, len(s.acts)) for s in c.spans],
                )
                for c in chains
            ]

        assert outline(chains_torch(gm)) == outline(chains_onnx(onnx.load_from_string(data)))


def test_torch_can_do_what_the_onnx_reader_offers() -> None:
    """Merges are offered by what the file shows, and carried out on the captured graph first."""
    for make in (Plain, Written, projection):
        _, _, gm, data = exported(make)
        file = onnx.load_from_string(data)
        tensors = {init.name: onnx.numpy_helper.to_array(init) for init in file.graph.initializer}
        for chain in chains_onnx(file):
            for segment in find_segments(chain, folded_norms(chain, tensors)):
                assert find_region(chains_torch(gm), segment.merge()).layers


def test_what_is_no_activation_ends_a_chain() -> None:
    chains = chains_torch(exported(Scaled)[2])
    assert [[layer.weight for layer in chain.layers] for chain in chains] == [[f"{c}.weight"] for c in "abcd"]


@torch.no_grad()
def test_merges_come_after_slices() -> None:
    model, x, dense, data = exported(projection)
    analysis = analyze(dense)
    kept = {group.name: list(range(0, group.size, 2)) for group in analysis.groups}
    plan = make_plan(analysis, kept)
    merges = edits(CASES["projection and block"][1])
    slim = rewrite_torch(model, plan, x)
    linearize_torch(slim, merges)
    done = merged(slim, merges)
    assert shapes(done)[TWO[-1]] == (7, 3, 15, 15)
    assert_close(done(x), slim(x))
    assert_close(run_onnx(merge_onnx(rewrite_onnx(onnx.load_from_string(data), plan), merges), x), slim(x))


@pytest.mark.parametrize("runs", [[TWO], [TWO[1:]], [TWO[:2], TWO[2:]], [TWO[1:2]]])
@torch.no_grad()
def test_a_width_may_leave_a_projection_nothing_to_change(runs: Runs) -> None:
    """Narrowed from 7 to as many channels as come in, 3: then no layer of the first block changes channels."""
    model, x, dense, data = exported(widening)
    analysis = analyze(dense)
    plan = make_plan(analysis, {group.name: [0, 2, group.size - 1] for group in analysis.groups})
    slim = rewrite_torch(model, plan, x)
    chain = next(c for c in chains_torch(slim) if any(v.weight == TWO[0] for v in c.layers))
    assert chain.spans[0].barrier == NEUTRAL
    merges = edits([(TWO, runs)])
    linearize_torch(slim, merges)
    assert_close(merged(slim, merges)(x), slim(x))
    assert_close(run_onnx(merge_onnx(rewrite_onnx(onnx.load_from_string(data), plan), merges), x), slim(x))


@torch.no_grad()
def test_a_block_with_a_projection_is_not_emptied() -> None:
    model, x, dense, _ = exported(widening)
    analysis = analyze(dense)
    slim = rewrite_torch(model, make_plan(analysis, {g.name: [0, 2, g.size - 1] for g in analysis.groups}), x)
    with pytest.raises(SluiceError, match=f"cannot be taken in: {NEUTRAL}"):
        linearize_torch(slim, edits([(TWO, [TWO[2:]])]))


@torch.no_grad()
def test_static_graphs() -> None:
    _, x, dense, data = exported(projection)
    merges = edits(CASES["projection and block"][1])
    static = merge_onnx(static_graph(onnx.load_from_string(data), len(x)), merges)
    assert_close(run_onnx(static, x), linear(dense, merges)(x))


class InPlace(nn.Module):
    """A block as torchvision writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.an = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.b, self.bn = nn.Conv2d(3, 3, 3, padding="same"), nn.BatchNorm2d(3)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.b(self.relu(self.an(self.a(x)))))
        y += x
        return self.relu(y).mean((2, 3))


@torch.no_grad()
def test_operators_in_place() -> None:
    _, x, dense, data = exported(InPlace)
    for runs in ([["a.weight", "b.weight"]], [["b.weight"]], [["a.weight"], ["b.weight"]]):
        merges = edits([(["a.weight", "b.weight"], runs)])
        trained = linear(dense, merges)
        assert_close(merged(trained, merges)(x), trained(x))
        assert_close(run_onnx(merge_onnx(onnx.load_from_string(data), merges), x), trained(x))


def test_every_segment_can_be_merged() -> None:
    """What `find_segments` offers, `find_region` takes, with the kernel that was announced."""
    for make in (Plain, vgg, identity2, projection, mobile, series, nested):
        gm = exported(make)[2]
        tensors = {name: t.numpy() for name, t in gm.state_dict().items()}
        chains = chains_torch(gm)
        for chain in chains:
            for segment in find_segments(chain, folded_norms(chain, tensors), across_strides=True):
                (run,) = find_region(chains, segment.merge()).units
                assert isinstance(run, Run)
                conv = compose_run(run, tensors)
                assert (conv.kernel, conv.stride, conv.depthwise) == (segment.kernel, segment.stride, segment.depthwise)
                assert merged_shape(run) == (conv.weight.shape, conv.stride, conv.pad, conv.groups)
