"""Chains found in graphs, and the segments of the published networks counted."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sluice import models
from sluice.core.errors import SluiceError
from sluice.core.plan import Merge
from sluice.models.densenet import DenseLayer
from sluice.models.mobilenet import InvertedResidual
from sluice.models.resnet import BasicBlock
from sluice.models.vgg import VGG
from sluice.passes.graph.capture import capture
from sluice.passes.graph.chains import Chain, Layer, Span
from sluice.passes.graph.chains_torch import chains_torch
from sluice.passes.graph.segments import find_segments, folded_norms, is_valid


def conv_bn(c: int, n: int, kernel: int = 1, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(c, n, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(n), nn.ReLU6()]


class Network(nn.Module):
    """Layers in a row, mean, linear."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers, self.fc = nn.Sequential(*layers), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layers(x).mean((2, 3))[:, :3])


def resnet34() -> nn.Module:
    """The ImageNet network's graph at tiny widths."""
    layers: list[nn.Module] = [*conv_bn(3, 3, 7, 2), nn.MaxPool2d(3, 2, 1)]
    before = 3
    for stage, (count, width) in enumerate(((3, 3), (4, 4), (6, 5), (3, 6))):
        for block in range(count):
            layers.append(BasicBlock(before, width, 2 if stage and not block else 1))
            before = width
    return Network(*layers)


def mobilenet_v2() -> nn.Module:
    """The ImageNet network's graph at tiny widths."""
    layers: list[nn.Module] = [*conv_bn(3, 4, 3, 2)]
    before = 4
    stages = ((1, 3, 1, 1), (6, 4, 2, 2), (6, 5, 3, 2), (6, 6, 4, 2), (6, 7, 3, 1), (6, 8, 3, 2), (6, 9, 1, 1))
    for expansion, width, count, stride in stages:
        for block in range(count):
            layers.append(InvertedResidual(before, width, 1 if block else stride, expansion))
            before = width
    return Network(*layers, *conv_bn(before, 11))


def chains(model: nn.Module, *shape: int) -> tuple[tuple[Chain, ...], dict[str, np.ndarray]]:
    gm = capture(model.eval(), torch.randn(2, *shape))
    return chains_torch(gm), {name: t.numpy() for name, t in gm.state_dict().items()}


def test_published_counts_of_resnet34() -> None:
    found, tensors = chains(resnet34(), 3, 33, 35)
    stem, chain = found
    assert len(stem.layers) == 1 and stem.after == chain.before == "max_pool2d (max_pool2d)"
    segments = find_segments(chain, folded_norms(chain, tensors))
    projections = sum(s.shortcut is not None for s in chain.spans)
    assert (len(chain.layers), len(chain.spans), projections) == (32, 16, 3)
    assert len(segments) == 150 and len({s.key for s in segments}) == 150
    assert len({(s.start, s.end) for s in segments}) == 62
    assert max(s.end - s.start for s in segments) == 10
    assert max(s.kernel for s in segments) == (21, 21)


def test_published_counts_of_mobilenet_v2() -> None:
    (chain,), tensors = chains(mobilenet_v2(), 3, 33, 35)
    ends = (chain.layers[0].weight, chain.layers[-1].weight)
    segments = find_segments(chain, folded_norms(chain, tensors), exclude=ends)
    assert (len(chain.layers), len(chain.spans)) == (52, 10)
    assert len({(s.start, s.end, s.kernel) for s in segments}) == 391
    assert len({(s.start, s.end) for s in segments}) == 171
    assert max(s.end - s.start for s in segments) == 21
    assert max(s.kernel for s in segments) == (15, 15)
    assert not {name for s in segments for name in s.layers} & set(ends)
    lifted = find_segments(chain, folded_norms(chain, tensors), exclude=ends, across_strides=True)
    assert len(lifted) > len(segments) and {s.key for s in segments} < {s.key for s in lifted}


def test_the_largest_norm_is_kept() -> None:
    """Sorting against all subsets, with kernels, kinds and a stride mixed."""
    rng = np.random.default_rng(0)

    def layer(i: int, kernel: int, stride: int = 1, depthwise: bool = False) -> Layer:
        shape = (6, 1 if depthwise else 6, kernel, kernel)
        pad = (kernel // 2,) * 2
        return Layer(f"w{i}", None, shape, (stride,) * 2, pad, 6 if depthwise else 1, f"v{i}", f"v{i + 1}")

    kinds = [(3,), (5,), (3, 1, True), (3,), (1,), (3, 2), (3,), (5, 1, True), (3,)]
    chain = Chain(tuple(layer(i, *kind) for i, kind in enumerate(kinds)), (), "", "")
    norms = {v.weight: float(rng.uniform(1, 2)) for v in chain.layers}
    best: dict[tuple[int, bool], float] = {}
    optional = [v for v in chain.layers if v.reducible and v.kernel != (1, 1)]
    assert len(optional) == 7
    for chosen in itertools.product((False, True), repeat=len(optional)):
        gone = {v.weight for v, keep in zip(optional, chosen, strict=True) if not keep}
        kept = [v for v in chain.layers if v.weight not in gone]
        size, stride = 1, 1
        for v in kept:
            size, stride = size + stride * (v.kernel[0] - 1), stride * v.stride[0]
        key = (size, all(v.depthwise for v in kept))
        best[key] = max(best.get(key, 0.0), sum(norms[v.weight] for v in kept))
    segments = [s for s in find_segments(chain, norms, across_strides=True) if (s.start, s.end) == (0, 9)]
    assert {(s.kernel[0], s.depthwise) for s in segments} == set(best)
    for s in segments:
        assert sum(norms[name] for name in s.kept) == pytest.approx(best[(s.kernel[0], s.depthwise)])
        assert s.stride == (2, 2) and list(s.kept) == [n for n in s.layers if n in s.kept]


def test_segments_are_merges() -> None:
    (chain,), tensors = chains(Network(*conv_bn(3, 4), BasicBlock(4, 4)), 3, 9, 7)
    segments = find_segments(chain, folded_norms(chain, tensors))
    whole = next(s for s in segments if (s.start, s.end, s.kernel) == (1, 3, (5, 5)))
    assert whole.spans == ((1, 3),) and whole.stride == (1, 1) and not whole.depthwise
    first, second = whole.layers
    assert whole.merge() == Merge((first, second), ((first, second),))
    assert whole.merge(((first,), (second,))).runs == ((first,), (second,))
    with pytest.raises(SluiceError, match="together they must be its kept convolutions"):
        whole.merge(((second,), (first,)))
    assert {s.kept for s in segments if (s.start, s.end, s.kernel) == (1, 3, (3, 3))} <= {(first,), (second,)}


def test_norms_are_those_of_the_folded_weights() -> None:
    (chain,), tensors = chains(models.enliven(Network(*conv_bn(3, 4, 3)), 0), 3, 9, 7)
    scale = tensors["layers.1.weight"] / np.sqrt(tensors["layers.1.running_var"] + 1e-5)
    folded = tensors["layers.0.weight"] * scale[:, None, None, None]
    assert folded_norms(chain, tensors)["layers.0.weight"] == pytest.approx(np.abs(folded).sum())


def test_rules_of_blocks() -> None:
    def layer(i: int) -> Layer:
        return Layer(f"w{i}", None, (4, 4, 3, 3), (1, 1), (1, 1), 1, f"v{i}", f"v{i + 1}")

    for barrier, swallow in ((None, True), ("even", False)):
        spans = (Span(1, 3, "v1", "s", None, (0, 0), barrier),)
        chain = Chain(tuple(layer(i) for i in range(5)), spans, "", "")
        valid = {(i, j) for i in range(5) for j in range(i + 1, 6) if is_valid(chain, i, j)}
        single = {(i, i + 1) for i in range(5)}
        over = {(0, 3), (0, 4), (0, 5), (1, 4), (1, 5)}
        assert valid == single | {(1, 3), (3, 5)} | (over if swallow else set())


class Barriers(nn.Module):
    """One barrier after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.down, self.up = nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)
        self.dilated, self.grouped = nn.Conv2d(4, 4, 3, padding=2, dilation=2), nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.twice, self.norm = nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4)
        self.c, self.d, self.e = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.after, self.p, self.q = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.Conv2d(8, 4, 1)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.b(F.relu(self.a(x))))
        x = x * torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))
        x = self.grouped(F.relu(self.dilated(x)))
        x = self.twice(F.relu(self.twice(x)))
        x = self.d(F.relu(self.norm(self.c(x))))
        x = self.e(F.relu(self.after(F.max_pool2d(x, 2))))
        x = self.q(torch.cat([self.p(x), x], 1))
        return self.fc(x.mean((2, 3)))


def test_barriers_have_reasons() -> None:
    found, _ = chains(Barriers(), 3, 9, 7)
    outline = [([v.weight.removesuffix(".weight") for v in c.layers], c.before, c.after) for c in found]
    se = "2 readers that are no residual block"
    assert outline == [
        (["a", "b"], "input 'x'", se),
        (["down", "up"], "mean (mean)", "mul (mul)"),
        (["c"], "convolution 'twice.weight', which is shared", "group_norm (group_norm)"),
        (["d"], "group_norm (group_norm)", "max_pool2d (max_pool2d)"),
        (["e"], "after (after)", se),
        (["p"], se, "cat (cat)"),
        (["q"], "cat (cat)", "mean (mean_1)"),
    ]


def test_unlike_networks() -> None:
    found, _ = chains(VGG(widths=(3, 4, 5, 6, 7), hidden=4), 1, 17, 17)
    assert [len(c.layers) for c in found] == [2, 2, 3, 3, 3]
    found, _ = chains(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), DenseLayer(8, 3), DenseLayer(11, 3)), 3, 9, 7)
    assert [len(c.layers) for c in found] == [1, 2, 2]
    found, _ = chains(models.se_resnet(widths=(8, 12, 16)), 1, 28, 28)
    assert all(not c.spans for c in found) and sum(len(c.layers) for c in found) == 19 + 18 + 2
    (chain,), _ = chains(models.resnet1d(widths=(4, 5, 6)), 2, 64)
    assert (len(chain.layers), len(chain.spans)) == (13, 6) and not any(s.barrier for s in chain.spans)


class Odd(nn.Module):
    def __init__(self, make: str) -> None:
        super().__init__()
        kernel, pad = (2, 0) if make == "even" else (3, 1)
        self.a, self.b, self.make = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, kernel, padding=pad), make
        self.side = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(F.pad(F.relu(self.a(x)), (0, 1, 0, 1)) if self.make == "even" else F.relu(self.a(x)))
        if self.make == "act":
            y = F.relu(y)
        return (y + (self.side(x) if self.make == "side" else x)).mean((2, 3))


def test_blocks_that_cannot_be_folded() -> None:
    (chain,), tensors = chains(Odd("act"), 4, 7, 5)
    assert chain.spans[0].barrier == "an activation lies between the branch and its addition"
    segments = find_segments(chain, folded_norms(chain, tensors))
    assert {(s.start, s.end, s.spans) for s in segments} == {(0, 1, ()), (1, 2, ()), (0, 2, ())}
    (chain,), _ = chains(Odd("side"), 4, 7, 5)
    assert chain.spans[0].barrier == "the shortcut is a convolution that changes neither channels nor size"
    found, _ = chains(Odd("even"), 4, 7, 5)
    assert not any(c.spans for c in found)
