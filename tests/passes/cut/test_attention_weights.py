"""Attention whose weights are returned: averaged over the heads, or one matrix for every head.

The mean over heads is that of the heads that stay, in the closed network as in the slim one. Where every head has its
own place in an output, heads stay, and everything else is cut.
"""

from __future__ import annotations

import onnx
import pytest
import torch
from torch import Tensor, fx, nn

from sluice.models import enliven
from sluice.passes.cut.export import to_onnx
from sluice.passes.cut.resolve import make_plan
from sluice.passes.cut.rewrite_onnx import rewrite_onnx
from sluice.passes.cut.rewrite_torch import rewrite_torch
from sluice.passes.gates.gating import bake
from sluice.passes.graph.aten import analyze
from sluice.passes.graph.capture import capture
from sluice.passes.graph.groups import keep_masks
from sluice.passes.graph.onnx_axes import analyze_onnx
from sluice.passes.graph.placement_torch import place_gates
from sluice.runtime.base.compare import assert_close, relative_error
from sluice.runtime.ort.cpu import OrtRunner
from tests.networks import random_kept
from tests.passes.graph.test_readings_agree import groups

WHOLE = "is an output of the model"


class Seeing(nn.Module):
    """Three heads of four dimensions; ``read``: a layer reads the weights too."""

    def __init__(self, average: bool, cross: bool, read: bool):
        super().__init__()
        self.average, self.cross, self.read = average, cross, read
        self.embed, self.attention, self.norm = nn.Linear(5, 12), nn.MultiheadAttention(12, 3), nn.LayerNorm(12)
        self.up, self.down, self.head, self.reader = (
            nn.Linear(12, 9),
            nn.Linear(9, 12),
            nn.Linear(12, 3),
            nn.Linear(7, 4),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(x).transpose(0, 1)
        other = x.flip(0) if self.cross else x
        y, weights = self.attention(x, other, other, need_weights=True, average_attn_weights=self.average)
        x = self.norm(x + y)
        x = x + self.down(torch.relu(self.up(x)))
        return self.head(x).transpose(0, 1), self.reader(weights) if self.read else weights


def run(file: onnx.ModelProto, x: Tensor) -> list[Tensor]:
    (given,) = file.graph.input
    return [torch.from_numpy(found) for found in OrtRunner().build(file).run({given.name: x.numpy()}).values()]


@pytest.mark.parametrize(
    ("average", "cross", "read"), [(True, False, False), (True, True, True), (False, False, False), (False, True, True)]
)
def test_cut_with_the_weights(average: bool, cross: bool, read: bool) -> None:
    model, x = enliven(Seeing(average, cross, read), 0).eval(), torch.randn(2, 7, 5)
    exported, exact = to_onnx(model, x), capture(model.double(), x.double())
    analysis, theirs = analyze(exact), analyze_onnx(exported)
    assert groups(analysis, analysis.tensors) == groups(theirs, analysis.tensors)
    heads = {"attention": 3} if average else {}
    assert {group.name: group.size for group in analysis.groups} == {"embed": 12, "up": 9, **heads}
    for reading in (analysis, theirs):
        assert reading.frozen.get("attention") == (None if average else WHOLE)
    check_plans(exact, model, exported, x)


@torch.no_grad()
def check_plans(exact: fx.GraphModule, model: nn.Module, file: onnx.ModelProto, x: Tensor) -> None:
    analysis, longer = analyze(exact), torch.cat([x, x + 1])
    placement = place_gates(exact, analysis)
    for seed in range(2):
        kept = random_kept(analysis, seed)
        plan = make_plan(analysis, kept)
        closed = bake(exact, analysis, placement, keep_masks(analysis, kept))(x.double())
        slim = rewrite_torch(model, plan, x.double())
        for ours, wanted, dense in zip(slim(x.double()), closed, exact(x.double()), strict=True):
            assert_close(ours, wanted, 1e-10)
            assert relative_error(wanted, dense) > 1e-3
        cut = rewrite_onnx(file, plan)
        for batch in (x, longer):
            for ours, wanted in zip(run(cut, batch), slim(batch.double()), strict=True):
                assert_close(ours.double(), wanted)
