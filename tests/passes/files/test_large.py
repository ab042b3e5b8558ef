"""Files whose weights are too many for one protobuf: the limit is lowered here, and passed in the slow lane."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from sluice.core import weight_bytes
from sluice.core.errors import SluiceError
from sluice.passes.cut.resolve import make_plan
from sluice.passes.cut.rewrite_onnx import rewrite_onnx
from sluice.passes.files.read import read_onnx_file, written_back
from sluice.passes.graph.onnx_axes import analyze_onnx
from sluice.passes.graph.onnx_file import finalize, save_onnx
from sluice.runtime.base.compare import assert_close
from sluice.runtime.ort.cpu import OrtRunner

SIZES = {"v": (7, 270), "w": (270, 150), "t": (150, 310), "u": (310, 3)}


def layers(sizes: dict[str, tuple[int, int]]) -> onnx.ModelProto:
    """Four products with a bend after the first three, their batch open; the rows of a weight are equal."""
    nodes = [
        helper.make_node("MatMul", ["x", "v"], ["a"]), helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("MatMul", ["b", "w"], ["c"]), helper.make_node("Tanh", ["c"], ["d"]),
        helper.make_node("MatMul", ["d", "t"], ["e"]), helper.make_node("Sigmoid", ["e"], ["f"]),
        helper.make_node("MatMul", ["f", "u"], ["y"]),
    ]  # fmt: skip
    rng, weights = np.random.default_rng(0), []
    for name, (rows, columns) in sizes.items():
        block = rng.standard_normal((1, columns)).astype(np.float32) / rows
        weights.append(numpy_helper.from_array(np.repeat(block, rows, axis=0), name))
    ends = [("x", next(iter(sizes.values()))[0]), ("y", list(sizes.values())[-1][1])]
    given, made = (helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["n", size]) for n, size in ends)
    graph = helper.make_graph(nodes, "layers", [given], [made], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


@pytest.fixture
def low_limit(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(weight_bytes, "LARGE", 2**16)
    yield


@pytest.mark.usefixtures("low_limit")
def test_weights_lie_beside_a_large_file_and_a_large_model(tmp_path: Path) -> None:
    model, feeds = layers(SIZES), {"x": np.random.default_rng(1).standard_normal((2, 7)).astype(np.float32)}
    want = onnx.load_from_string(model.SerializeToString())
    expected = list(onnx.reference.ReferenceEvaluator(want).run(None, feeds))
    size = save_onnx(model, tmp_path / "large.onnx")
    assert {path.name for path in tmp_path.iterdir()} == {"large.onnx", "large.onnx.data"}
    assert size == sum(path.stat().st_size for path in tmp_path.iterdir())
    onnx.checker.check_model(str(tmp_path / "large.onnx"), full_check=True)
    assert_close(list(OrtRunner().build(str(tmp_path / "large.onnx")).run(feeds).values()), expected)
    session = OrtRunner().build(model)
    del model
    assert_close(list(session.run(feeds).values()), expected)
    (tmp_path / "other.onnx.data").write_bytes(bytes(range(256)))
    with pytest.raises(SluiceError, match="is a file of another kind, not weights of an ONNX file"):
        save_onnx(want, tmp_path / "other.onnx")
    assert not (tmp_path / "other.onnx").exists()


@pytest.mark.usefixtures("low_limit")
def test_a_large_file_is_read_cut_and_written(tmp_path: Path) -> None:
    way_through(layers(SIZES), tmp_path)


@pytest.mark.slow
def test_a_file_beyond_two_gibibytes_is_read_cut_and_written(tmp_path: Path) -> None:
    """16 GB of memory and 4 GB of disk."""
    way_through(layers({"v": (7, 16500), "w": (16500, 16500), "t": (16500, 16500), "u": (16500, 3)}), tmp_path)


def way_through(model: onnx.ModelProto, folder: Path) -> None:
    """Half of every group is kept, and numpy computes the same with the same halves."""
    assert weight_bytes.is_large(model)
    save_onnx(model, folder / "given.onnx")
    del model
    file = read_onnx_file(folder / "given.onnx")
    assert file.batch_is_open
    analysis = analyze_onnx(file.model)
    assert len(analysis.groups) == 3
    kept = {group.name: range(0, group.size, 2) for group in analysis.groups}
    slim = rewrite_onnx(file.model, make_plan(analysis, kept))
    save_onnx(written_back(file, finalize(slim)), folder / "slim.onnx")
    feeds = {"x": np.random.default_rng(1).standard_normal((2, file.inputs["x"].shape[1])).astype(np.float32)}
    w = {init.name: numpy_helper.to_array(init) for init in file.model.graph.initializer}
    half = np.tanh(np.maximum(feeds["x"] @ w["v"][:, ::2], 0) @ w["w"][::2, ::2]) @ w["t"][::2, ::2]
    expected = (1 / (1 + np.exp(-half))) @ w["u"][::2]
    assert_close(list(OrtRunner().build(str(folder / "slim.onnx")).run(feeds).values()), [expected], 1e-4)
