"""Export keeps every parameter name (the anchor of all rewriting), the numbers and a free batch."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sluice.errors import SluiceError
from sluice.passes.capture import capture
from sluice.passes.export import OPSET, export, finalize, save_onnx, to_onnx
from sluice.runtime.compare import assert_close
from sluice.runtime.ort import OrtRunner
from tests.networks import build


@pytest.mark.parametrize("name", ["plain", "norms"])
def test_names_survive(name: str) -> None:
    """The canary: that names survive is how the exporter behaves, not what it promises."""
    model, inputs = build(name)
    exported = to_onnx(model, inputs)
    names = {i.name: tuple(i.dims) for i in exported.graph.initializer}
    wanted = {k: tuple(v.shape) for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    assert {k: names.get(k) for k in wanted} == wanted


def test_export_writes_what_it_returns(tmp_path: Path) -> None:
    model, inputs = build("plain")
    done = export(model, tmp_path / "new" / "plain.onnx", inputs)
    assert onnx.load(tmp_path / "new" / "plain.onnx") == done
    assert "BatchNormalization" not in {n.op_type for n in done.graph.node}
    assert done.opset_import[0].version == OPSET
    for batch in (1, 3, 5):
        x = torch.randn(batch, 3, 8, 6)
        with torch.no_grad():
            assert_close(next(iter(OrtRunner().build(done).run({"x": x.numpy()}).values())), model(x))


def test_training_mode_does_not_matter() -> None:
    model, inputs = build("tied")
    x, y = (i.numpy() for i in inputs)
    out = OrtRunner().build(finalize(to_onnx(model.train(), inputs))).run({"x": x, "y": y})
    with torch.no_grad():
        assert_close(list(out.values()), list(model.eval()(*inputs).values()))
    assert not any(node.op_type == "Dropout" for node in to_onnx(model.train(), inputs).graph.node)


def test_static_batch() -> None:
    model, (x,) = build("plain")
    exported = to_onnx(capture(model, x, dynamic_batch=False), x)
    assert [d.dim_value for d in exported.graph.input[0].type.tensor_type.shape.dim] == [3, 3, 8, 6]


def test_metadata_survives_finalize() -> None:
    exported = to_onnx(nn.Linear(3, 2), torch.rand(2, 3))
    exported.metadata_props.add(key="precision", value="fp32")
    assert [(p.key, p.value) for p in finalize(exported).metadata_props] == [("precision", "fp32")]


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
