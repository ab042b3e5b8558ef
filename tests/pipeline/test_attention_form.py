"""Attention is marked where it is timed and deployed in one operator, the same in every export of one run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sluice.core.deployment import Deployment
from sluice.passes.cut.export import to_onnx
from sluice.passes.cut.resolve import make_plan
from sluice.passes.cut.rewrite_onnx import rewrite_onnx
from sluice.passes.cut.rewrite_torch import rewrite_torch
from sluice.passes.graph.aten import analyze
from sluice.passes.graph.capture import capture
from sluice.passes.graph.onnx_file import finalize
from sluice.passes.precision.flat_attention import has_marked_cores
from sluice.passes.precision.to_precision import to_precision
from sluice.pipeline import attention_form
from sluice.pipeline.attention_form import marked_for, marked_like
from sluice.pipeline.pairs import structure
from sluice.profiler.pieces.partition import partition_graph
from tests.exported import named_sequence, ops
from tests.networks import random_kept
from tests.sequences import sequence


def profile_of(model: Any) -> Any:
    return SimpleNamespace(partition=partition_graph(model, 1), fingerprint=SimpleNamespace(batch=1))


def test_the_file_after_training_is_the_engine_that_was_verified() -> None:
    model, inputs = sequence("fused")
    dense = marked_for(named_sequence("fused"), Deployment())
    assert has_marked_cores(dense)
    captured = capture(model, inputs)
    analysis = analyze(captured)
    plan = make_plan(analysis, random_kept(analysis, 0))
    slim = rewrite_torch(captured, plan, inputs)
    exported = marked_like(to_onnx(slim, inputs), profile_of(dense))
    verified, deployed = (to_precision(finalize(each), "fp32") for each in (rewrite_onnx(dense, plan), exported))
    assert ops(deployed)["Attention"] == 1
    assert structure(verified) == structure(deployed)


def test_marked_on_this_machine_in_fp32_with_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    exported = named_sequence("fused")
    for other in (
        Deployment(threads=2), Deployment(precision="int8"), Deployment(target="openvino"), Deployment("ort-cpu@host"),
    ):  # fmt: skip
        assert marked_for(exported, other) is exported
    monkeypatch.setattr(attention_form, "runs_attention", lambda: False)
    assert marked_for(exported, Deployment()) is exported
    assert marked_like(exported, profile_of(exported)) is exported
