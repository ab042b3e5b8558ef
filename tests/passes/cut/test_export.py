"""Export keeps every parameter name (the anchor of all rewriting), the numbers and a free batch."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sluice.core.errors import SluiceError
from sluice.passes.cut.export import finalize, save_onnx, to_onnx, with_values
from sluice.passes.cut.resolve import make_plan
from sluice.passes.cut.rewrite_torch import rewrite_torch
from sluice.passes.graph.aten import analyze
from sluice.passes.graph.capture import capture, clone
from sluice.runtime.base.compare import assert_close
from sluice.runtime.ort.cpu import OrtRunner
from tests.networks import build, random_kept


@pytest.mark.parametrize("name", ["plain", "norms"])
def test_names_survive(name: str) -> None:
    """The canary: that names survive is how the exporter behaves, not what it promises."""
    model, inputs = build(name)
    exported = to_onnx(model, inputs)
    names = {i.name: tuple(i.dims) for i in exported.graph.initializer}
    wanted = {k: tuple(v.shape) for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    assert {k: names.get(k) for k in wanted} == wanted


def test_training_mode_does_not_matter() -> None:
    model, inputs = build("tied")
    x, y = (i.numpy() for i in inputs)
    out = OrtRunner().build(finalize(to_onnx(model.train(), inputs))).run({"x": x, "y": y})
    with torch.no_grad():
        assert_close(list(out.values()), list(model.eval()(*inputs).values()))
    assert not any(node.op_type == "Dropout" for node in to_onnx(model.train(), inputs).graph.node)


@pytest.mark.parametrize("name", ["norms", "tied"])
def test_a_captured_form_is_not_captured_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it was captured, and as a plan has cut it: the file is the one that another capture leads to."""
    model, inputs = build(name)
    captured = capture(model.train(), inputs)
    analysis = analyze(captured)
    slim = rewrite_torch(captured, make_plan(analysis, random_kept(analysis, 3)), inputs)
    uncut = clone(slim)
    uncut.meta.clear()  # as a module of the user's would come
    expected = [to_onnx(model, inputs), to_onnx(uncut, inputs)]
    monkeypatch.setattr("sluice.passes.cut.export.capture", lambda *args: pytest.fail("captured again"))
    assert [to_onnx(captured, inputs), to_onnx(slim, inputs)] == expected
    assert captured.training and slim.training
    with pytest.raises(SluiceError, match="does not run on the example inputs"):
        to_onnx(slim, torch.zeros(2, 1))


@pytest.mark.parametrize("name", ["plain", "tied"])
def test_new_values_are_another_export(name: str) -> None:
    model, inputs = build(name)
    before = to_onnx(model, inputs)
    content = before.SerializeToString()
    assert with_values(before, model) is before
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.mul_(1.25)
    after = with_values(before, model)
    assert after == to_onnx(model, inputs) != before
    assert before.SerializeToString() == content


def test_static_batch() -> None:
    model, (x,) = build("plain")
    exported = to_onnx(capture(model, x, dynamic_batch=False), x)
    assert [d.dim_value for d in exported.graph.input[0].type.tensor_type.shape.dim] == [3, 3, 8, 6]


def test_metadata_survives_finalize() -> None:
    exported = to_onnx(nn.Linear(3, 2), torch.rand(2, 3))
    exported.metadata_props.add(key="precision", value="fp32")
    assert [(p.key, p.value) for p in finalize(exported).metadata_props] == [("precision", "fp32")]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_convolutions_with_any_number_of_axes(axes: int, bias: bool) -> None:
    """The exporter's zeros for a missing bias have a shape that runtimes refuse where there are not two axes."""
    make = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
    model = nn.Sequential(make(2, 5, 3, bias=bias), nn.ReLU(), make(5, 4, 2, stride=2, bias=bias)).eval()
    x = torch.randn(3, 2, *(9, 7, 5)[:axes])
    exported = to_onnx(model, x)
    layers = [node for node in exported.graph.node if node.op_type == "Conv"]
    assert [n.input[1] for n in layers] == ["0.weight", "2.weight"]
    if bias:
        assert [n.input[2] for n in layers] == ["0.bias", "2.bias"]
    with torch.no_grad():
        for onnx_model in (exported, finalize(exported)):
            feeds = {onnx_model.graph.input[0].name: x.numpy()}
            assert_close(next(iter(OrtRunner().build(onnx_model).run(feeds).values())), model(x))


class Biased(nn.Module):
    """Attention with a learned mask, given its shape before or after its axes are exchanged."""

    def __init__(self, at_once: bool):
        super().__init__()
        self.qkv, self.proj, self.at_once = nn.Linear(5, 18), nn.Linear(6, 4), at_once
        self.bias = nn.Parameter(torch.randn(1, 3, 7, 7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).view(-1, 7, 3, 3, 2).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias * 2)
        y = y if self.at_once else y.reshape(-1, 3, 7, 2)
        return self.proj(y.transpose(1, 2).reshape(-1, 7, 6))


@pytest.mark.parametrize("at_once", [True, False])
def test_attention_with_a_learned_mask(at_once: bool) -> None:
    """The exporter writes it out with other strides than it had, and then finds no view of them."""
    model, x = Biased(at_once).eval(), torch.randn(2, 7, 5)
    (out,) = OrtRunner().build(to_onnx(model, x)).run({"x": x.numpy()}).values()
    with torch.no_grad():
        assert_close(out, model(x))


def test_what_onnx_has_no_operator_for() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv3d(2, 3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.adaptive_avg_pool3d(self.conv(x), (2, 3, 1))

    with pytest.raises(SluiceError, match=r"torch\.onnx cannot export Net: .*_adaptive_avg_pool3d"):
        to_onnx(Net(), torch.rand(2, 2, 5, 7, 3))


def test_a_path_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(SluiceError, match="cannot write"):
        save_onnx(onnx.ModelProto(), tmp_path / "file" / "x.onnx")
