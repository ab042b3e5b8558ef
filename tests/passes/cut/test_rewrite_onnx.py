"""The ONNX rewriter refuses what it cannot follow and keeps what it does not cut."""

from __future__ import annotations

import dataclasses
import gc

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from sluice.core.errors import SluiceError
from sluice.core.plan import Plan, Slice
from sluice.passes.cut.export import finalize, to_onnx
from sluice.passes.cut.resolve import make_plan
from sluice.passes.cut.rewrite_onnx import cut_graph, rewrite_onnx
from sluice.passes.cut.rewrite_torch import rewrite_torch
from sluice.passes.graph.aten import analyze
from sluice.passes.graph.capture import capture
from sluice.passes.graph.groups import Analysis, keep_masks
from sluice.passes.graph.onnx_graph import OnnxGraph, hollow, is_hollow
from sluice.runtime.base.compare import assert_close
from sluice.runtime.ort.cpu import OrtRunner
from tests.networks import build, random_kept


@pytest.fixture(scope="module")
def plain() -> tuple[onnx.ModelProto, Analysis]:
    model, inputs = build("plain")
    dense = capture(model, inputs)
    return to_onnx(dense, inputs), analyze(dense)


def shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    return {i.name: tuple(i.dims) for i in model.graph.initializer}


def test_tensors_are_sliced_by_name(plain: tuple[onnx.ModelProto, Analysis]) -> None:
    dense, analysis = plain
    before = dense.SerializeToString()
    slim = rewrite_onnx(dense, make_plan(analysis, {"conv1": [1, 4], "conv2": [0, 2, 3]}))
    assert dense.SerializeToString() == before
    assert shapes(slim)["conv1.weight"] == (2, 3, 3, 3) and shapes(slim)["conv2.weight"] == (3, 2, 3, 3)
    assert shapes(slim)["fc1.weight"] == (9, 3 * 6 * 4) and shapes(slim)["bn1.running_mean"] == (2,)
    old = {i.name: numpy_helper.to_array(i) for i in dense.graph.initializer}
    new = {i.name: numpy_helper.to_array(i) for i in slim.graph.initializer}
    np.testing.assert_array_equal(new["conv2.weight"], old["conv2.weight"][[0, 2, 3]][:, [1, 4]])
    assert slim.ir_version == dense.ir_version and slim.opset_import == dense.opset_import


def test_sizes_that_do_not_fit_are_one_sentence(
    plain: tuple[onnx.ModelProto, Analysis], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a literal size stays what it was."""
    dense, analysis = plain
    plan = make_plan(analysis, {"conv2": [0, 2, 3]})
    rewrite_onnx(dense, plan)
    monkeypatch.setattr("sluice.passes.cut.rewrite_onnx.Mender.mend", lambda self, node: None)
    with pytest.raises(SluiceError, match="the plan leaves a graph whose sizes do not fit each other") as error:
        rewrite_onnx(dense, plan)
    assert "\n" not in str(error.value)


def test_of_tensors_without_numbers_the_shapes_are_cut(plain: tuple[onnx.ModelProto, Analysis]) -> None:
    dense, analysis = plain
    masks, bare = keep_masks(analysis, {"conv1": [1, 4], "conv2": [0, 2, 3]}), hollow(dense)
    told = shapes(bare)
    slim = cut_graph(bare, analysis, masks)
    assert shapes(slim) == shapes(cut_graph(dense, analysis, masks)) and shapes(bare) == told != shapes(slim)
    empty = {init.name for init in slim.graph.initializer if is_hollow(init)}
    assert empty == {init.name for init in bare.graph.initializer if is_hollow(init)} and "fc1.weight" in empty


def test_the_optimiser_keeps_nothing_of_a_network(plain: tuple[onnx.ModelProto, Analysis]) -> None:
    def held() -> int:
        gc.collect()
        return sum(type(one).__name__ == "TensorProtoTensor" for one in gc.get_objects())

    before = held()
    want = finalize(plain[0])
    assert held() <= before
    gone = OnnxGraph(want).initializers["fc1.weight"]  # what is made stands by itself
    np.testing.assert_array_equal(
        numpy_helper.to_array(gone), numpy_helper.to_array(OnnxGraph(plain[0]).initializers["fc1.weight"])
    )


def test_empty_plan(plain: tuple[onnx.ModelProto, Analysis]) -> None:
    dense, analysis = plain
    slim = rewrite_onnx(dense, make_plan(analysis, {}))
    assert shapes(slim) == shapes(dense)


def test_metadata_is_kept(plain: tuple[onnx.ModelProto, Analysis]) -> None:
    dense = onnx.ModelProto()
    dense.CopyFrom(plain[0])
    dense.metadata_props.add(key="author", value="x")
    dense.graph.node[0].metadata_props.add(key="scope", value="conv1")
    slim = rewrite_onnx(dense, make_plan(plain[1], {"conv1": [1]}))
    assert [(p.key, p.value) for p in slim.metadata_props] == [("author", "x")]
    assert ("scope", "conv1") in [(p.key, p.value) for n in slim.graph.node for p in n.metadata_props]


def test_wrong_shape_and_missing_names(plain: tuple[onnx.ModelProto, Analysis]) -> None:
    dense, analysis = plain
    plan = make_plan(analysis, {"conv1": [1, 2]})
    renamed = onnx.ModelProto()
    renamed.CopyFrom(dense)
    for init in renamed.graph.initializer:
        if init.name == "conv1.weight":
            init.name = "onnx::Conv_64"
    for node in renamed.graph.node:
        node.input[:] = ["onnx::Conv_64" if name == "conv1.weight" else name for name in node.input]
    with pytest.raises(SluiceError, match=r"'conv1\.weight' is missing instead of \(7, 3, 3, 3\)"):
        rewrite_onnx(renamed, plan)
    other = Plan({**plan.fingerprint, "conv1.weight": (8, 3, 3, 3)}, (Slice("conv1.weight", 0, 8, (1, 2)),))
    with pytest.raises(SluiceError, match=r"'conv1\.weight' is \(7, 3, 3, 3\) instead of \(8, 3, 3, 3\)"):
        rewrite_onnx(dense, other)


def test_tensors_that_the_file_shares_between_layers() -> None:
    """An exporter may keep one of two equal tensors; their layers are cut differently all the same."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    with torch.no_grad():
        model[2].bias.copy_(model[0].bias)
    x = torch.randn(3, 4)
    gm = capture(model, x)
    dense = to_onnx(gm, x)
    for node in dense.graph.node:
        node.input[:] = ["0.bias" if name == "2.bias" else name for name in node.input]
    kept = [i for i in dense.graph.initializer if i.name != "2.bias"]
    del dense.graph.initializer[:]
    dense.graph.initializer.extend(kept)
    plan = make_plan(analyze(gm), {"0": [1, 2, 4], "2": [0, 5]})
    slim = rewrite_onnx(dense, plan)
    out = OrtRunner().build(slim).run({dense.graph.input[0].name: x.numpy()})
    with torch.no_grad():
        assert_close(next(iter(out.values())), rewrite_torch(gm, plan, x)(x))


def test_a_tensor_that_the_model_shares_is_not_split() -> None:
    model, inputs = build("in_place")
    gm = capture(model, inputs)
    dense = to_onnx(gm, inputs)
    plan = make_plan(analyze(gm), {"conv1": [0, 2, 3]})
    bad = dataclasses.replace(plan, slices=tuple(s for s in plan.slices if (s.param, s.axis) != ("fc1.weight", 1)))
    with pytest.raises(SluiceError, match=r"does not fit this graph at 'fc1\.weight' axis 1"):
        rewrite_onnx(dense, bad)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_token_that_is_expanded_over_the_batch(seed: int) -> None:
    """Its target holds the batch, which the graph computes, and the width, which is cut."""
    model, (x,) = build("class_token", batch=5)
    dense = capture(model, (x,))
    plan = make_plan(analyze(dense), random_kept(analyze(dense), seed))
    slim, cut = rewrite_torch(dense, plan, (x,)), rewrite_onnx(to_onnx(dense, (x,)), plan)
    for file in (cut, finalize(cut)):
        for batch in (1, 2, 5):
            with torch.no_grad():
                assert_close(list(OrtRunner().build(file).run({"x": x[:batch].numpy()}).values()), [slim(x[:batch])])
