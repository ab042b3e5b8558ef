from __future__ import annotations

import onnx
import pytest

from sluice.passes.cut.export import to_onnx
from sluice.passes.precision.plain_sums import with_plain_sums
from sluice.passes.precision.to_precision import to_precision
from sluice.runtime.base.compare import assert_close
from sluice.runtime.ort.blocked_part import optimized
from sluice.runtime.ort.cpu import OrtRunner
from tests.exported import named
from tests.sequences import sequence


def operators(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


@pytest.mark.parametrize("name", ["language", "sdpa"])
def test_sums_and_norms_stay_apart_and_compute_the_same(name: str) -> None:
    model, inputs = sequence(name)
    exported = to_onnx(model, inputs)
    written = with_plain_sums(exported)
    onnx.checker.check_model(written, full_check=True)
    feeds = {i.name: x.numpy() for i, x in zip(exported.graph.input, inputs, strict=True)}
    fused, apart = (OrtRunner().build(one, batch=3) for one in (exported, written))
    assert_close(apart.run(feeds), fused.run(feeds))
    assert "SkipLayerNormalization" in operators(optimized(exported))
    assert "SkipLayerNormalization" not in operators(optimized(written))
    norms = operators(written).count("LayerNormalization")
    assert 0 < operators(written).count("Sum") <= norms and operators(exported).count("Sum") == 0


def test_other_sums_and_models_without_norms_stay() -> None:
    model = named("resnet20")
    assert with_plain_sums(model) is model


@pytest.mark.parametrize(("target", "expected"), [("ort-cpu", True), ("openvino", False), ("ort-cuda", False)])
def test_sums_are_written_for_the_cpu_of_onnx_runtime(target: str, expected: bool) -> None:
    model, inputs = sequence("sdpa")
    exported = to_onnx(model, inputs)
    for threads in (1, 2):
        assert ("Sum" in operators(to_precision(exported, "fp32", target=target, threads=threads))) == expected
