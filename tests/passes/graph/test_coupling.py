"""Every operator of the ATen table is cut in a small network, or freezes it with a reason.

Cut means: the gated network under hard masks, the closed one and the slim one compute the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from sluice.core.errors import SluiceError
from sluice.models import enliven
from sluice.passes.cut.export import to_onnx
from sluice.passes.cut.resolve import make_plan
from sluice.passes.cut.rewrite_onnx import rewrite_onnx
from sluice.passes.cut.rewrite_torch import rewrite_torch
from sluice.passes.gates.gating import close_gates, insert_gates, strip_gates
from sluice.passes.graph.aten import RULES, analyze
from sluice.passes.graph.aten_walk import operator_name
from sluice.passes.graph.capture import capture
from sluice.passes.graph.coupling import Coupling
from sluice.passes.graph.operators import ATEN
from sluice.runtime.base.compare import assert_close, relative_error
from sluice.runtime.ort.cpu import OrtRunner

aten = torch.ops.aten


class Between(nn.Module):
    """``after(f(before(x)))``; f may use the parameters of ``extra``."""

    def __init__(
        self, before: nn.Module, function: Callable[..., Any], after: nn.Module, extra: dict[str, Any]
    ) -> None:
        super().__init__()
        self.before, self.after, self.function, self.with_extra = before, after, function, bool(extra)
        self.extra = nn.ParameterDict({k: nn.Parameter(v) for k, v in extra.items() if isinstance(v, Tensor)})
        for name, module in extra.items():
            if isinstance(module, nn.Module):
                self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(x)
        return self.after(self.function(y, self) if self.with_extra else self.function(y))


@dataclass(frozen=True)
class Case:
    """``function`` between two layers; ``frozen``: a part of the reason why the first must stay whole."""

    name: str
    function: Callable[..., Any]
    shape: tuple[int, ...] = (3, 6, 5)
    before: Callable[[], nn.Module] = lambda: nn.Conv2d(3, 6, 3, padding=1)
    after: Callable[[], nn.Module] = lambda: nn.Conv2d(6, 4, 1)
    extra: dict[str, Any] = field(default_factory=dict)
    frozen: str = ""
    group: str = "before"

    def build(self) -> tuple[nn.Module, tuple[Tensor]]:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            model = Between(self.before(), self.function, self.after(), self.extra)
            return enliven(model, 0), (torch.randn(3, *self.shape),)


def line(name: str, function: Callable[..., Any], **more: Any) -> Case:
    """Channels first, one spatial axis."""
    layers = {"before": lambda: nn.Conv1d(2, 6, 3, padding=1), "after": lambda: nn.Conv1d(6, 4, 1)}
    return Case(name, function, **{"shape": (2, 9), **layers, **more})


def cube(name: str, function: Callable[..., Any]) -> Case:
    layers = {"before": lambda: nn.Conv3d(2, 6, 3, padding=1), "after": lambda: nn.Conv3d(6, 4, 1)}
    return Case(name, function, shape=(2, 6, 5, 4), **layers)


def rows(name: str, function: Callable[..., Any], **more: Any) -> Case:
    """(batch, features)."""
    layers = {"before": lambda: nn.Linear(5, 6), "after": lambda: nn.Linear(6, 4)}
    return Case(name, function, **{"shape": (5,), **layers, **more})


def places(name: str, function: Callable[..., Any], **more: Any) -> Case:
    """(batch, positions, features)."""
    return rows(name, function, **{"shape": (4, 5), **more})


def attended(y: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(y, y * 0.3, y)


def wide(n: int) -> Callable[[], nn.Module]:
    return lambda: nn.Conv2d(n, 4, 1)


def positive(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda y: function(y.abs() + 0.5)


UNARY = [
    "relu",
    "relu6",
    "hardtanh",
    "silu",
    "hardswish",
    "hardsigmoid",
    "gelu",
    "sigmoid",
    "tanh",
    "leaky_relu",
    "elu",
    "selu",
    "celu",
    "softplus",
    "mish",
    "log_sigmoid",
    "hardshrink",
    "softshrink",
    "neg",
    "abs",
    "exp",
    "square",
    "sign",
    "erf",
    "sin",
    "cos",
    "clone",
    "detach",
    "alias",
    "lift_fresh_copy",
    "floor",
    "ceil",
    "round",
    "positive",
    "rrelu",
    "ones_like",
    "expm1",
    "exp2",
    "erfc",
    "trunc",
    "frac",
    "sgn",
]
POSITIVE = ["log", "log1p", "log2", "log10", "sqrt", "rsqrt", "reciprocal"]
MEAN = {"dim": (2, 3), "keepdim": True}
CASES = [
    *(Case(name, getattr(aten, name)) for name in UNARY),
    *(Case(name, positive(getattr(aten, name))) for name in POSITIVE),
    Case("relu in place", lambda y: y.relu_()),
    Case("hardtanh off zero", lambda y: F.hardtanh(y, 0.25, 2.0)),
    Case("threshold", lambda y: F.threshold(y, 0.1, -0.3)),
    Case("clamp", lambda y: y.clamp(-0.4, 0.4)),
    Case("clip", lambda y: torch.clip(y, -0.4, 0.4)),
    Case("special_expit", lambda y: torch.special.expit(y)),
    Case("negative", lambda y: torch.negative(y)),
    Case("absolute", lambda y: torch.absolute(y)),
    Case("subtract", lambda y: torch.subtract(y, 0.3)),
    Case("multiply", lambda y: torch.multiply(y, y.sigmoid())),
    Case("divide", lambda y: torch.divide(y, 1.7)),
    Case("clamp off zero", lambda y: y.clamp(0.2, 0.9)),
    Case("clamp_min", lambda y: aten.clamp_min(y, 0.2)),
    Case("clamp_max", lambda y: aten.clamp_max(y, -0.2)),
    Case("contiguous", lambda y: y.permute(0, 1, 3, 2).contiguous()),
    Case("to", lambda y: y.to(torch.float64).to(torch.float32)),
    Case("_to_copy", lambda y: aten._to_copy(y, dtype=torch.float32)),
    Case("type_as", lambda y: y.double().type_as(y)),
    Case("zeros_like", lambda y: torch.zeros_like(y) + y),
    Case("full_like", lambda y: torch.full_like(y, 0.3) * y),
    Case("dropout", lambda y: aten.dropout(y, 0.4, False)),
    Case("feature_dropout", lambda y: F.dropout2d(y, 0.4, False)),
    Case("alpha_dropout", lambda y: F.alpha_dropout(y, 0.4, False)),
    Case("feature_alpha_dropout", lambda y: F.feature_alpha_dropout(y, 0.4, False)),
    # element-wise with scalars, values and parameters
    Case("add scalar", lambda y: y + 0.7),
    Case("add in place", lambda y: y.add_(y.sigmoid())),
    Case("sub", lambda y: y - y.sigmoid()),
    Case("rsub", lambda y: 1.0 - y),
    Case("mul scalar", lambda y: 0.3 * y),
    Case("mul by a (B, C, 1, 1) gate", lambda y: y * y.mean((2, 3), keepdim=True).sigmoid()),
    Case("mul by a (B, 1, H, W) input", lambda y, m: y * m.extra["w"], extra={"w": torch.rand(1, 1, 6, 5)}),
    Case("mul by (C, 1, 1)", lambda y, m: m.extra["w"] * y, extra={"w": torch.rand(6, 1, 1)}),
    Case("add (1, C, 1, 1)", lambda y, m: m.extra["w"] + y, extra={"w": torch.rand(1, 6, 1, 1)}),
    Case("add (C, H, W)", lambda y, m: y + m.extra["w"], extra={"w": torch.rand(6, 6, 5)}),
    Case("add (H, 1)", lambda y, m: m.extra["w"] + y, extra={"w": torch.rand(6, 1)}),
    Case("div by a value", lambda y: y / (1.0 + y.abs())),
    Case("div a scalar", lambda y: y / 3.0),
    Case("true_divide", lambda y: torch.true_divide(y, 3.0)),
    Case("maximum", lambda y: torch.maximum(y, y.neg())),
    Case("minimum", lambda y: torch.minimum(y, y.sigmoid())),
    Case("max of two", lambda y: torch.max(y, y.neg())),
    Case("min of two, broadcast", lambda y: torch.min(y.mean((2, 3), keepdim=True), y)),
    Case("max of two and (C, 1, 1)", lambda y, m: torch.max(m.extra["w"], y), extra={"w": torch.rand(6, 1, 1)}),
    Case("max of two halves", lambda y: torch.max(*y.chunk(2, 1)), after=wide(3)),
    Case("max of two, of one channel", lambda y, m: torch.max(y, m.layer(y)), extra={"layer": nn.Conv2d(6, 1, 1)}),
    Case("clamp by values", lambda y: y.clamp(y.sigmoid() - 1.0, y.sigmoid())),
    Case("clamp by (C, 1, 1)", lambda y, m: y.clamp(max=m.extra["w"]), extra={"w": torch.rand(6, 1, 1)}),
    Case("clip by values", lambda y: torch.clip(y, min=y.neg())),
    Case("clamp_min by values", lambda y: y.clamp_min(y.neg())),
    Case("clamp_max by values", lambda y: y.clamp_max(y.sigmoid())),
    Case("masked_fill", lambda y: y.masked_fill(y > 0.3, 0.0)),
    Case("masked_fill off zero", lambda y: y.masked_fill(y.mean(**MEAN) > 0.1, -0.6)),
    Case("floor_divide", lambda y: torch.floor_divide(y, 0.3)),
    Case("logit", lambda y: torch.logit(y.sigmoid())),
    Case("addcdiv", lambda y: torch.addcdiv(y, y, y.abs() + 0.5)),
    Case("logaddexp", lambda y: torch.logaddexp(y, y.neg())),
    Case("where", lambda y: torch.where(torch.ones(1, dtype=torch.bool), y, y * 2.0)),
    Case("pow", lambda y: y**2),
    Case("pow, negative", lambda y: (y.abs() + 0.5) ** -1.5),
    Case("ne", lambda y: torch.where(y.round().ne(0.0), y, 0.3)),
    Case("eq", lambda y: torch.where(y.round().eq(0.0), y, y.neg())),
    Case("gt", lambda y: torch.where(y.gt(0.2), y, 0.4)),
    Case("ge", lambda y: torch.where(y.ge(0.2), y, y * 0.4)),
    Case("lt", lambda y: torch.where(y.lt(0.2), y, y.exp())),
    Case("le", lambda y: torch.where(y.le(0.2), y, y.neg())),
    Case("logical_not", lambda y: torch.where((y > 0.2).logical_not(), y, y.exp())),
    Case("add a (B, 1, H, W) layer", lambda y, m: y + m.layer(y), extra={"layer": nn.Conv2d(6, 1, 1)}),
    Case("fmod", lambda y: torch.fmod(y, 0.5)),
    Case("remainder", lambda y: torch.remainder(y, 0.5)),
    Case("lerp", lambda y: torch.lerp(y, y.relu(), 0.3)),
    Case("addcmul", lambda y: torch.addcmul(y, y, y.sigmoid())),
    Case("add a fixed value", lambda y: y + torch.arange(6.0)[:, None, None].expand(6, 6, 5), frozen="fixed"),
    # shapes
    Case("view", lambda y: y.view(y.shape[0], 6, 30).view(y.shape[0], 6, 6, 5)),
    Case("reshape", lambda y: y.reshape(-1, 6, 30).reshape(-1, 6, 5, 6)),
    Case("reshape into groups", lambda y: y.reshape(-1, 2, 3, 6, 5).transpose(1, 2).reshape(-1, 6, 6, 5)),
    Case("reshape folds the batch", lambda y: y.permute(0, 2, 3, 1).reshape(-1, 6).relu().reshape(-1, 6, 5, 6)
         .permute(0, 3, 1, 2)),
    Case("_unsafe_view", lambda y: aten._unsafe_view(y, (y.shape[0], 6, 30, 1))),
    Case("flatten", lambda y: y.flatten(2).unsqueeze(3)),
    Case("flatten C*H*W", lambda y: y.flatten(1), after=lambda: nn.Linear(180, 4)),
    Case("unflatten", lambda y: y.unflatten(1, (2, 3)).flatten(1, 2)),
    Case("unflatten beside", lambda y: y.unflatten(2, (3, 2)).flatten(2, 3)),
    Case("squeeze", lambda y: y.mean((2, 3), keepdim=True).squeeze(), after=lambda: nn.Linear(6, 4)),
    Case("squeeze the channels", lambda y: y.squeeze(1)),
    Case("squeeze dims", lambda y: y.unsqueeze(2).squeeze((1, 2))),
    Case("unsqueeze", lambda y: y.unsqueeze(1).squeeze(1)),
    Case("view_as", lambda y: y.flatten(2).view_as(y)),
    Case("reshape_as", lambda y: y.flatten(2).reshape_as(y)),
    Case("reshape_as a fixed value", lambda y: y.flatten(2).reshape_as(torch.arange(540).view(3, 6, 6, 5)), frozen="takes its shape"),  # noqa: E501
    Case("permute", lambda y: y.permute(0, 2, 3, 1).relu().permute(0, 3, 1, 2)),
    Case("transpose", lambda y: y.transpose(1, 3).relu().transpose(-1, -3)),
    Case("swapaxes", lambda y: y.swapaxes(1, 2).swapaxes(1, 2)),
    Case("swapaxes and transpose", lambda y: y.swapaxes(1, -1).relu().transpose(1, 3)),
    Case("swapdims and transpose", lambda y: torch.swapdims(y, 1, 3).relu().transpose(1, 3)),
    Case("movedim", lambda y: y.movedim(1, -1).relu().movedim(-1, 1)),
    Case("movedim of two", lambda y: torch.movedim(y, (1, 2), (3, 1)).relu().permute(0, 3, 1, 2)),
    Case("moveaxis", lambda y: torch.moveaxis(y, 1, 2).relu().transpose(1, 2)),
    rows("t", lambda y: y.t().relu().t()),
    rows("numpy_T", lambda y, m: (y @ m.extra["w"].T).relu(), extra={"w": torch.rand(6, 6)}),
    Case("expand", lambda y: y.mean(**MEAN).expand(-1, 6, 6, 5)),
    Case("expand_as", lambda y: y.mean(**MEAN).expand_as(y)),
    Case("expand_as another", lambda y, m: y.mean(**MEAN).expand_as(m.other(y.relu())), extra={"other": nn.Conv2d(6, 6, 1)}),  # noqa: E501
    Case("broadcast_to", lambda y: y.mean(**MEAN).broadcast_to(y.shape[0], 6, 6, 5)),
    Case("cat", lambda y: torch.cat([y, y.neg()], 1), after=wide(12)),
    Case("cat with a fixed part", lambda y: torch.cat([torch.ones(y.shape[0], 2, 6, 5), y], 1), after=wide(8)),
    Case("cat beside", lambda y: torch.cat([y, y.neg()], 2)),
    Case("concat", lambda y: torch.concat([y, y.neg()], -3), after=wide(12)),
    Case("concatenate", lambda y: torch.concatenate([y, y.neg()], 1), after=wide(12)),
    Case("stack", lambda y: torch.stack([y, y.neg()], 2).flatten(2, 3)),
    Case("unbind", lambda y: sum(y.unbind(3))[..., None]),
    Case("unbind channels", lambda y: sum(y.unbind(1))[:, None], after=wide(1), frozen="reduces over the channels"),
    Case("chunk", lambda y: y.chunk(2, 1)[1], after=wide(3)),
    Case("chunk unequal", lambda y: torch.cat(y.chunk(4, 1)[::-1], 1)),
    Case("split", lambda y: y.split(4, 1)[1], after=wide(2)),
    Case("split_with_sizes", lambda y: aten.split_with_sizes(y, [1, 3, 2], 1)[1], after=wide(3)),
    Case("split beside", lambda y: y.split([2, 4], 2)[1]),
    Case("slice", lambda y: y[:, 1:-2], after=wide(3)),
    Case("slice beside", lambda y: y[:, :, 1:-2]),
    Case("slice with steps", lambda y: y[:, ::2], after=wide(3)),
    Case("slice with steps, from a place to a place", lambda y: y[:, 3:8:2], before=lambda: nn.Conv2d(3, 9, 1), after=wide(3)),  # noqa: E501
    Case("slices with steps", lambda y: torch.cat([y[:, 1::3], y[:, ::3], y], 1), after=wide(10)),
    Case("slice with steps of two layers", lambda y: torch.cat([y, y[:, :3].neg()], 1)[:, ::2], after=wide(5)),
    Case("glu", lambda y: aten.glu(y, 1), after=wide(3)),
    Case("narrow", lambda y: aten.narrow(y, 1, 2, 3), after=wide(3)),
    Case("narrow from the end", lambda y: aten.narrow(y, 1, -4, 3), after=wide(3)),
    Case("select", lambda y: y.select(3, 2)[..., None]),
    Case("select a channel", lambda y: y.select(1, 2)[:, None], after=wide(1), frozen="reduces over the channels"),
    Case("index_select", lambda y: y.index_select(3, torch.arange(0, 4, 3))),
    Case("index_select of channels", lambda y: y.index_select(1, torch.arange(0, 4, 3)), after=wide(2), frozen="picks channels"),  # noqa: E501
    Case("index beside", lambda y: y[:, :, [4, 3, 1]]),
    Case("channel_shuffle", lambda y: F.channel_shuffle(y, 3)),
    Case("pixel_shuffle", lambda y: F.pixel_shuffle(y, 2), before=lambda: nn.Conv2d(3, 12, 1), after=wide(3)),
    Case("pixel_unshuffle", lambda y: F.pixel_unshuffle(y[:, :, :, :4], 2), after=wide(24)),
    Case("roll", lambda y: y.roll(2, 1)),
    Case("roll twice, and beside", lambda y: y.roll((1, 2, -3), (1, 2, -3))),
    Case("roll all axes as one", lambda y: y.roll(2), frozen="unknown operator roll"),
    Case("flip", lambda y: y.flip(1), frozen="reverses the channels"),
    Case("flip beside", lambda y: y.flip(2, -1)),
    # beside the channels
    *(Case(n, lambda y, n=n: getattr(aten, n)(y, [2, 2])) for n in ("max_pool2d", "avg_pool2d")),
    places("pooling over positions", lambda y: aten.avg_pool2d(y.unsqueeze(1), [2, 1]).squeeze(1)),
    places("pooling with padding", lambda y: aten.max_pool2d(y.unsqueeze(1), [2, 1], [2, 1], [1, 0]).squeeze(1)),
    places("pooling of every other channel", lambda y: aten.avg_pool2d(y.unsqueeze(1), [2, 1], [2, 2]).squeeze(1),
           after=lambda: nn.Linear(3, 4), frozen="works along the labelled axis"),
    *(Case(n, lambda y, n=n: getattr(aten, n)(y, [2, 3])) for n in ("adaptive_avg_pool2d",)),
    *(line(n, lambda y, n=n: getattr(aten, n)(y, [2])) for n in ("max_pool1d", "avg_pool1d", "adaptive_avg_pool1d")),
    *(cube(n, lambda y, n=n: getattr(aten, n)(y, [2, 2, 1])) for n in ("max_pool3d", "avg_pool3d", "adaptive_avg_pool3d")),  # noqa: E501
    Case("adaptive_max_pool2d", lambda y: F.adaptive_max_pool2d(y, (2, 3))),
    line("adaptive_max_pool1d", lambda y: F.adaptive_max_pool1d(y, 2)),
    cube("adaptive_max_pool3d", lambda y: F.adaptive_max_pool3d(y, 2)),
    Case("max_pool2d_with_indices", lambda y: F.max_pool2d(y, 2, return_indices=True)[0]),
    line("max_pool1d_with_indices", lambda y: F.max_pool1d(y, 2, return_indices=True)[0]),
    cube("max_pool3d_with_indices", lambda y: F.max_pool3d(y, 2, return_indices=True)[0]),
    line("max_pool2d over the channels", lambda y: F.max_pool2d(y, (2, 1)), after=lambda: nn.Conv1d(3, 4, 1),
         frozen="works along the labelled axis"),
    line("max_pool2d beside the channels", lambda y: F.max_pool2d(y, (1, 2))),
    *(
        Case(f"upsample {mode}", lambda y, mode=mode: F.interpolate(y, scale_factor=2, mode=mode))
        for mode in ("nearest", "bilinear", "bicubic", "nearest-exact")
    ),
    *(
        line(f"upsample1d {mode}", lambda y, mode=mode: F.interpolate(y, scale_factor=2, mode=mode))
        for mode in ("nearest", "linear", "nearest-exact")
    ),
    *(
        cube(f"upsample3d {mode}", lambda y, mode=mode: F.interpolate(y, scale_factor=2, mode=mode))
        for mode in ("nearest", "trilinear")
    ),
    Case("pad", lambda y: F.pad(y, (1, 0, 2, 1))),
    Case("pad with a value", lambda y: F.pad(y, (1, 0, 2, 1), value=0.6)),
    Case("pad the channels", lambda y: F.pad(y, (0, 0, 0, 0, 1, 1)), after=wide(8)),
    Case("pad the channels with a value", lambda y: F.pad(y, (0, 0, 0, 0, 1, 1), value=0.6), after=wide(8)),
    Case("pad some channels away", lambda y: F.pad(y, (0, 0, 0, 0, 1, -1)), frozen="labelled axis"),
    Case("pad reflect", lambda y: F.pad(y, (1, 0, 2, 1), mode="reflect")),
    Case("constant_pad_nd", lambda y: aten.constant_pad_nd(y, [1, 2])),
    Case("reflection_pad2d", lambda y: aten.reflection_pad2d(y, [1, 0, 2, 1])),
    line("reflection_pad1d", lambda y: aten.reflection_pad1d(y, [1, 2])),
    Case("replication_pad2d", lambda y: aten.replication_pad2d(y, [1, 0, 2, 1])),
    *(Case(n, lambda y, n=n: getattr(y, n)(dim=(2, 3), keepdim=True)) for n in ["mean", "sum", "amax", "amin", "std", "var"]),  # noqa: E501
    *(Case(n, lambda y, n=n: getattr(y, n)(3, keepdim=True)) for n in ("prod", "logsumexp")),
    *(Case(n, lambda y, n=n: getattr(y, n)(3, keepdim=True)[0]) for n in ("max", "min")),
    Case("max over the channels", lambda y: y.max(1, keepdim=True)[0], after=wide(1), frozen="over the channels"),
    Case("norm", lambda y: aten.norm(y, 2, [3], True)),
    Case("linalg_vector_norm", lambda y: torch.linalg.vector_norm(y, dim=(2, 3), keepdim=True)),
    *(Case(f"{n} over the channels", lambda y, n=n: getattr(y, n)(1, keepdim=True), after=wide(1)) for n in ("mean", "sum")),  # noqa: E501
    Case("var over the channels", lambda y: y.var(1, keepdim=True), after=wide(1), frozen="unbiased variance"),
    Case("std over the channels", lambda y: y.std(1, keepdim=True, correction=0), after=wide(1)),
    Case("var over channels and places", lambda y: y / y.var((1, 2, 3), keepdim=True)),
    Case("norm of the channels", lambda y: y / (aten.norm(y, 2, [1], True) + 0.1)),
    Case("mean over channels and places", lambda y: y - y.mean((1, 2, 3), keepdim=True)),
    Case("mean over everything", lambda y: y - y.mean()),
    Case("repeat", lambda y: y.repeat(1, 2, 1, 1), after=wide(12)),
    Case("isnan", lambda y: y.masked_fill(y.sqrt().isnan(), 0.3)),
    Case("rms_norm", lambda y: F.rms_norm(y.transpose(1, 3), (6,)).transpose(1, 3)),
    *(Case(n, lambda y, n=n: getattr(y, n)(2)) for n in ("softmax", "log_softmax", "cumsum")),
    Case("_softmax", lambda y: aten._softmax(y, 2, False)),
    Case("softmax over the channels", lambda y: y.softmax(1), frozen="mixes the channels"),
    # values of fixed size
    Case("zeros", lambda y: y + torch.zeros(1, 1, 5)),
    Case("new_zeros", lambda y: torch.cat([y, y.new_zeros(y.shape[0], 6, 6, 2)], 3)),
    Case("new_ones", lambda y: y * y.new_ones(6, 1, 1)),
    Case("new_full", lambda y: y + y.new_full((6, 1, 1), 0.3)),
    Case("new_empty", lambda y: y + y.new_empty(0, 2).sum()),
    Case("ones", lambda y: y + torch.ones(6, 1)),
    Case("full", lambda y: y + torch.full((1,), 0.4)),
    Case("arange", lambda y: y + torch.arange(5.0)),
    Case("empty", lambda y: y + torch.empty(0, 2).sum()),
    Case("scalar_tensor", lambda y: y * torch.scalar_tensor(1.7)),
    # layers with weights
    Case("batch_norm", lambda y, m: m.norm(y), extra={"norm": nn.BatchNorm2d(6)}),
    Case("batch_norm without affine", lambda y, m: m.norm(y), extra={"norm": nn.BatchNorm2d(6, affine=False)}),
    Case("instance_norm", lambda y, m: m.norm(y), extra={"norm": nn.InstanceNorm2d(6, affine=True)}),
    Case("instance_norm, computed scale", lambda y, m: F.instance_norm(y, weight=m.extra["w"] * 2), extra={"w": torch.rand(6)},  # noqa: E501
         ),
    Case("group_norm", lambda y, m: m.norm(y), extra={"norm": nn.GroupNorm(3, 6)}),
    Case("group_norm without affine", lambda y: F.group_norm(y, 2)),
    Case("group_norm of every channel", lambda y, m: m.norm(y), extra={"norm": nn.GroupNorm(6, 6)}),
    rows("layer_norm", lambda y, m: m.norm(y), extra={"norm": nn.LayerNorm(6)}),
    rows("layer_norm without affine", lambda y: F.layer_norm(y, (6,))),
    Case("layer_norm C x H x W", lambda y, m: m.norm(y), extra={"norm": nn.LayerNorm((6, 6, 5))}),
    Case("layer_norm beside", lambda y, m: m.norm(y), extra={"norm": nn.LayerNorm((6, 5))}),
    Case("prelu", lambda y, m: m.act(y), extra={"act": nn.PReLU(6)}),
    Case("prelu, one slope", lambda y, m: m.act(y), extra={"act": nn.PReLU()}),
    *(line(f"{n}1d", lambda y, m: m.layer(y).relu(), extra={"layer": c(6, 6, 3)})
      for n, c in (("conv", nn.Conv1d), ("conv_transpose", nn.ConvTranspose1d))),
    *(Case(f"conv2d {k}", lambda y, m: m.layer(y).relu(), extra={"layer": c}) for k, c in {
        "depthwise": nn.Conv2d(6, 6, 3, groups=6), "grouped": nn.Conv2d(6, 6, 3, groups=2),
        "transposed": nn.ConvTranspose2d(6, 6, 3, bias=False), "transposed grouped": nn.ConvTranspose2d(6, 6, 2, groups=3),  # noqa: E501
        "transposed depthwise": nn.ConvTranspose2d(6, 6, 2, groups=6)}.items()),
    Case("depthwise with a multiplier", lambda y, m: m.layer(y).relu(), extra={"layer": nn.Conv2d(6, 18, 3, groups=6)},
         after=wide(18)),
    Case("transposed depthwise with a multiplier", lambda y, m: m.layer(y).relu(), after=wide(12),
         extra={"layer": nn.ConvTranspose2d(6, 12, 3, groups=6)}, group="layer"),
    Case("computed weight", lambda y, m: F.conv2d(y, m.extra["w"] * 2.0).relu(), extra={"w": torch.rand(6, 6, 1, 1)}),
    rows("parts of one weight", lambda y, m: sum(F.linear(y, w) for w in m.extra["w"].chunk(3)), extra={"w": torch.rand(18, 6)}),  # noqa: E501
    Case("conv3d", lambda y, m: m.layer(y), (2, 6, 5, 4), lambda: nn.Conv3d(2, 6, 3), lambda: nn.ConvTranspose3d(5, 4, 2),  # noqa: E501
         {"layer": nn.Conv3d(6, 5, 1)}),
    rows("linear", lambda y, m: m.layer(y).relu(), extra={"layer": nn.Linear(6, 6, bias=False)}),
    rows("addmm", lambda y, m: torch.addmm(m.extra["b"], y, m.extra["w"]), extra={"b": torch.rand(6), "w": torch.rand(6, 6)}),  # noqa: E501
    rows("matmul", lambda y, m: (y @ m.extra["w"]).relu(), extra={"w": torch.rand(6, 6)}),
    rows("mm", lambda y, m: torch.mm(y, m.extra["w"]).relu(), extra={"w": torch.rand(6, 6)}),
    rows("matmul of values", lambda y: y @ y.t() @ y),
    rows("bmm", lambda y: y * torch.bmm(y[:, None], y[:, :, None])[:, 0]),
    rows("baddbmm", lambda y: y * torch.baddbmm(y[:, None, :1], y[:, None], y[:, :, None], alpha=0.3)[:, 0]),
    rows("einsum", lambda y, m: torch.einsum("bi,oi->bo", y, m.extra["w"]), extra={"w": torch.rand(6, 6)}),
    rows("baddbmm of values", lambda y: torch.baddbmm(y[:, None], y[:, None], y[:, :, None] * y[:, None, :])[:, 0]),
    rows("einsum of values", lambda y: torch.einsum("bi,bi->b", y, y)[:, None] * y),
    rows("einsum of a diagonal", lambda y: y + torch.einsum("ii->i", y.t() @ y), frozen="unknown operator einsum"),
    places("scaled_dot_product_attention", lambda y: attended(y[:, None])[:, 0]),
    rows("embedding", lambda y, m: y + m.layer(torch.ones(1, dtype=torch.long)), extra={"layer": nn.Embedding(2, 6)}),
    *(places(n, lambda y, m: m.layer(y)[0], extra={"layer": layer}) for n, layer in {
        "lstm": nn.LSTM(6, 6, batch_first=True), "gru": nn.GRU(6, 6), "rnn_tanh": nn.RNN(6, 6),
        "rnn_relu": nn.RNN(6, 6, nonlinearity="relu", bias=False)}.items()),
    rows("lstm_cell", lambda y, m: m.layer(y)[0], extra={"layer": nn.LSTMCell(6, 6)}),
    *(rows(n, lambda y, m: m.layer(y), extra={"layer": layer}) for n, layer in {
        "gru_cell": nn.GRUCell(6, 6), "rnn_tanh_cell": nn.RNNCell(6, 6),
        "rnn_relu_cell": nn.RNNCell(6, 6, nonlinearity="relu")}.items()),
    Case("index by two", lambda y: y + y.permute(2, 3, 0, 1)[torch.tensor([0, 2]), torch.tensor([1, 0])].mean(0)[:, :, None, None]),  # noqa: E501
    Case("index", lambda y: y[:, [5, 3, 1, 0]], after=wide(4), frozen="picks channels"),
    # no rule
    Case("view as another type", lambda y: y.view(torch.int32).view(torch.float32), frozen="unknown operator view.dtype"),  # noqa: E501
    places("index, a position each", lambda y: y[torch.arange(y.shape[0]), torch.arange(y.shape[0]) % 4]),
    Case("index of axes apart", lambda y: y[:, [0, 1], :, [2, 3]].movedim(0, 1), after=lambda: nn.Conv1d(2, 4, 1), frozen="unknown operator index"),  # noqa: E501
    Case("index by a mask", lambda y: y[:, torch.tensor([True] * 4 + [False] * 2)], after=wide(4), frozen="unknown operator index"),  # noqa: E501
]  # fmt: skip
IDS = [case.name for case in CASES]


@functools.cache
def captured(name: str) -> tuple[nn.Module, tuple[Tensor], fx.GraphModule]:
    model, inputs = CASES[IDS.index(name)].build()
    return model, inputs, capture(model, inputs)


def test_names_of_cases_are_unique() -> None:
    assert len(set(IDS)) == len(IDS)


def test_every_rule_is_covered() -> None:
    met: set[str] = {"sym_size"}
    for name in IDS:
        for node in captured(name)[2].graph.nodes:
            if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
                met.add(operator_name(node))
    raised = {"dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"} & set(IDS)
    assert not set(RULES) - met - raised


def test_the_overloads_of_a_name_compute_the_same() -> None:
    """A row holds for all overloads that have none of their own: they read as many tensors as its rule does."""
    by_type = {("to", "other"), ("type_as", "default")}  # of their second operand the type alone
    one = ("unary", "reduce", "along", "spatial", "reshape", "permute", "expand", "slice", "narrow")
    odd = []
    for name in (n for n, row in ATEN.items() if "." not in n and row.kind in one):
        for overload in getattr(aten, name).overloads():
            arguments = getattr(getattr(aten, name), overload)._schema.arguments
            apart = any(a.is_out or "Dimname" in str(a.type) for a in arguments)
            if not apart and f"{name}.{overload}" not in ATEN and (name, overload) not in by_type:
                odd += [(name, overload)] * (sum("Tensor" in str(a.type) for a in arguments) > 1)
    assert not odd
    assert ATEN["max"].kind in one and "Tensor" in str(aten.max.other._schema.arguments[1].type)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_operator(case: Case) -> None:
    model, inputs, graph = captured(case.name)
    if case.frozen:
        with pytest.raises(SluiceError, match="nothing in this model can be cut") as error:
            analyze(graph)
        assert case.frozen in str(error.value)
        return
    gated = insert_gates(graph, inputs)
    analysis = gated.meta["space"].analysis
    assert analysis.groups[0].name == case.group
    assert_close(gated(*inputs), model(*inputs), 2e-6)
    dense = strip_gates(gated)
    changed = 0.0
    for seed, single in enumerate((False, True)):
        rng = np.random.default_rng(seed)
        kept = {
            g.name: sorted(rng.choice(g.size, 1 if single else g.size - 1, replace=False).tolist())
            for g in analysis.groups
        }
        for name, gate in gated.gates.items():
            gate.set_decision(torch.isin(torch.arange(gate.size), torch.tensor(kept[name])))
        closed = close_gates(gated, kept)
        slim = rewrite_torch(dense, make_plan(analysis, kept), inputs)
        with torch.no_grad():
            assert_close(closed(*inputs), gated(*inputs), what="closed")
            assert_close(slim(*inputs), closed(*inputs), what="slim")
            changed = max(changed, relative_error(closed(*inputs), model(*inputs)))
    assert changed > 1e-3


def test_a_plan_of_one_channel_keeps_every_axis() -> None:
    """``squeeze()`` must not remove a channel axis that was cut to one."""
    case = next(c for c in CASES if c.name == "squeeze")
    model, inputs = case.build()
    dense = capture(model, inputs)
    plan = make_plan(analyze(dense), {"before": [2]})
    slim = rewrite_torch(dense, plan, inputs)
    assert slim(*inputs).shape == model(*inputs).shape
    exported = to_onnx(dense, inputs)
    assert [len(node.input) for node in exported.graph.node if node.op_type == "Squeeze"] == [1]
    session = OrtRunner().build(rewrite_onnx(exported, plan))
    (found,) = session.run({exported.graph.input[0].name: inputs[0].numpy()}).values()
    assert_close(found, slim(*inputs))


def test_exclude() -> None:
    model, inputs = next(c for c in CASES if c.name == "conv2d grouped").build()
    gm = capture(model, inputs)
    assert [g.name for g in analyze(gm).groups] == ["before", "layer"]
    for pattern in ("before", "bef*", "before.weight"):
        analysis = analyze(gm, [pattern])
        assert [g.name for g in analysis.groups] == ["layer"]
        assert "excluded by" in analysis.frozen["before"]
    with pytest.raises(SluiceError, match="'nowhere' matches no layer"):
        analyze(gm, ["nowhere"])
    with pytest.raises(SluiceError, match="nothing in this model can be cut"):
        analyze(gm, ["*"])


def test_nothing_to_cut() -> None:
    with pytest.raises(SluiceError, match="it has no layer with a weight"):
        analyze(capture(nn.ReLU(), torch.rand(3, 5)))


def test_unions_keep_the_first_reason() -> None:
    coupling = Coupling({"w": (4, 3)})
    first, second = coupling.param("w", 0), coupling.new(4)
    coupling.freeze((second,), "because")
    coupling.union(first, second)
    assert [coupling.reason((first[k : k + 1],)) for k in range(4)] == ["because"] * 4
    assert coupling.reason((coupling.param("w", 1),)) is None
