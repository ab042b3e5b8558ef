"""An ONNX file becomes a faster one without torch, and keeps its form."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import WeakSet

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

import sluice
from sluice.cli import main
from sluice.core import weight_bytes
from sluice.core.errors import SluiceError
from sluice.core.plan import Plan
from sluice.importance.activity import activity_scores
from sluice.importance.onnx_losses import onnx_losses
from sluice.importance.output_distance import BROKEN, OutputDistance, cosine
from sluice.passes.cut.resolve import make_plan
from sluice.passes.cut.rewrite_onnx import rewrite_onnx
from sluice.passes.files.read import OnnxFile, read_onnx_file
from sluice.passes.files.rows import Rows, rows_of
from sluice.passes.graph.onnx_axes import analyze_onnx
from sluice.passes.graph.onnx_file import save_onnx
from sluice.passes.graph.onnx_graph import OnnxGraph
from sluice.profiler.view import Profile
from sluice.runtime.base.compare import assert_close
from sluice.solver.options import EditSpace
from sluice.training.refit_onnx import refit_onnx, with_biases
from tests import tiny

compress_file = importlib.import_module("sluice.pipeline.compress_onnx")
refit_module = importlib.import_module("sluice.training.refit_onnx")
losses_module = importlib.import_module("sluice.importance.onnx_losses")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    with tiny.simulated_device():
        yield


@cache
def content() -> bytes:
    """The file as torch exports it, its batch open, with an entry of metadata."""
    model = onnx.load_model_from_string(tiny.plain_file())
    model.metadata_props.add(key="owner", value="somebody")
    return bytes(model.SerializeToString())


def given() -> onnx.ModelProto:
    return onnx.load_model_from_string(content())


def examples(count: int = 96) -> dict[str, np.ndarray]:
    """Pictures whose channels depend on each other, so that a cut can be made up for."""
    rng = np.random.default_rng(3)
    mixed = rng.standard_normal((count, 2, 9, 9)).astype(np.float32)
    return {"picture": np.stack([mixed[:, 0], mixed[:, 1], mixed[:, 0] - mixed[:, 1]], axis=1)}


def read() -> tuple[OnnxFile, Rows]:
    file = read_onnx_file(given(), examples())
    return file, rows_of(file, examples())


def compressed(tmp_path: Path, **options: Any) -> Any:
    return sluice.compress_onnx(
        given(), examples(), budget="60%", table=tmp_path / "t.db", batch=tiny.BATCH, progress=False, **options
    )


def test_a_file_meets_its_budget_and_keeps_its_form(tmp_path: Path) -> None:
    done, before = compressed(tmp_path, out=tmp_path / "out"), given()
    after = onnx.load(tmp_path / "out" / "slim.onnx")
    assert done.report.met() and done.report.measured_ms < 0.62 * done.report.dense_ms
    assert done.report.params_slim < done.report.params_dense
    for field in ("input", "output"):
        assert [str(i) for i in getattr(after.graph, field)] == [str(i) for i in getattr(before.graph, field)]
    assert after.opset_import == before.opset_import
    said = {entry.key: entry.value for entry in after.metadata_props}
    assert said["owner"] == "somebody" and "sluice.plan" in said
    assert Plan.load(tmp_path / "out" / "plan.json") == done.plan
    assert 0 < done.report.metric_slim < done.report.metric_dense == pytest.approx(100.0)
    assert "cosine" in done.report.figure


def test_the_file_is_the_one_that_its_plan_cuts(tmp_path: Path) -> None:
    done = compressed(tmp_path, refit=False)
    file, rows = read()
    cut = rewrite_onnx(file.model, done.plan)
    (feeds,) = rows.part(0, 5).batches(5)
    assert_close(tiny_run(done.onnx, feeds), tiny_run(cut, feeds))
    assert done.report.parity_max_rel is not None and done.report.parity_max_rel < 1e-5


def test_training_counts_where_the_file_is_nearer_by_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [tmp_path / name for name in ("plain", "trained", "kept")]
    for folder in folders:  # a table that knows more may give another plan
        folder.mkdir()
    plain = compressed(folders[0], refit=False)
    trained = compressed(folders[1], refit=False, steps=60)
    assert trained.plan == plain.plan and trained.report.recovery.loss == "distance to the file's outputs"
    assert trained.report.metric_slim > plain.report.metric_slim
    assert [str(i) for i in trained.onnx.graph.input] == [str(i) for i in given().graph.input]

    def worse(slim: onnx.ModelProto, dense: onnx.ModelProto, *rest: Any, **more: Any) -> tuple[onnx.ModelProto, float]:
        made = onnx.ModelProto()
        made.CopyFrom(slim)
        for init in made.graph.initializer:
            if init.data_type == onnx.TensorProto.FLOAT:
                init.CopyFrom(numpy_helper.from_array(3 * numpy_helper.to_array(init), init.name))
        return made, 1e-3

    monkeypatch.setattr("sluice.training.distill_onnx.distill_onnx", worse)
    kept = compressed(folders[2], refit=False, steps=4)
    assert kept.report.metric_slim == pytest.approx(plain.report.metric_slim, abs=1e-6)
    assert kept.report.recovery is None or not kept.report.recovery.loss


def test_a_result_beyond_two_gibibytes_lies_in_two_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The limit is lowered: the result has weights beside it, and every verb reads them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(weight_bytes, "LARGE", 2**13)
    save_onnx(given(), "given.onnx")
    done = sluice.compress_onnx(
        "given.onnx", examples(), budget="60%", table="t.db", batch=tiny.BATCH, progress=False, out="out"
    )
    assert weight_bytes.is_large(done.onnx) and Path("given.onnx.data").is_file()
    assert "slim.onnx.data" in json.loads(Path("out/manifest.json").read_text())["files"]
    sized = ["--input", "picture=2,3,9,9"]
    assert main(["check", "given.onnx", "out", *sized]) == 0
    assert main(["apply", "given.onnx", "out/plan.json", "-o", "cut.onnx", *sized]) == 0
    assert main(["export", "given.onnx", "--plan", "out", "-o", "again.onnx", *sized]) == 0
    assert main(["inspect", "out/slim.onnx", *sized]) == 0
    feeds = {name: value[:2] for name, value in examples().items()}
    want = tiny_run(done.onnx, feeds)
    for name in ("out/slim.onnx", "again.onnx"):
        assert Path(f"{name}.data").is_file()
        assert_close(tiny_run(onnx.load(name), feeds), want)
    assert Path("cut.onnx.data").is_file() and len(tiny_run(onnx.load("cut.onnx"), feeds)) == len(want)
    data = Path("out/slim.onnx.data")
    data.write_bytes(data.read_bytes() + b"other")
    assert main(["check", "given.onnx", "out", *sized]) == 1
    assert "'out/slim.onnx.data' is not the file that was saved" in capsys.readouterr().err
    monkeypatch.setattr(weight_bytes, "LARGE", 2**31)
    done.save("out")
    assert not data.exists() and main(["check", "given.onnx", "out", *sized]) == 0


def test_the_folder_is_checked_against_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("given.onnx").write_bytes(content())
    compressed(tmp_path, out=tmp_path / "out")
    asked = ["check", "given.onnx", "out", "--input", "picture=2,3,9,9"]
    assert main(asked) == 0 and "slim.onnx and plan on dense ONNX" in capsys.readouterr().out
    slim = onnx.load("out/slim.onnx")
    last = max((i for i in slim.graph.initializer if len(i.dims) == 2), key=lambda init: init.dims[1])
    last.CopyFrom(numpy_helper.from_array(1.01 * numpy_helper.to_array(last), last.name))
    onnx.save(slim, "out/slim.onnx")
    Path("out/manifest.json").unlink()
    assert main(asked) == 1


def test_biases_that_a_refit_made_are_put_back() -> None:
    file, _ = read()
    bare = onnx.ModelProto()
    bare.CopyFrom(file.model)
    first = next(node for node in bare.graph.node if node.op_type == "Conv")
    del first.input[2:]
    values = np.arange(OnnxGraph(bare).initializers[first.input[1]].dims[0], dtype=np.float32)
    with_biases(bare, {f"{first.input[1]}.refit_bias": values, "other.refit_bias": values})
    assert first.input[2] == f"{first.input[1]}.refit_bias" and len(bare.graph.initializer) > 0
    assert np.array_equal(numpy_helper.to_array(bare.graph.initializer[-1]), values)


class _Wrong:
    """A runner whose engines give the outputs of others with the sign turned."""

    def __init__(self, own: Any) -> None:
        self._own = own

    def build(self, model: Any, **options: Any) -> Any:
        session = self._own.build(model, **options)
        return SimpleNamespace(run=lambda feeds: {name: -value for name, value in session.run(feeds).items()})


def test_an_engine_of_the_result_that_computes_something_else_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The engines of the search are right, the one of the file that comes out is not: its weights are others."""
    monkeypatch.chdir(tmp_path)
    Path("given.onnx").write_bytes(content())
    np.savez("data.npz", picture=examples()["picture"])
    timed, own = compress_file.final_pair, Profile.runner

    def wrong_from_now_on(*args: Any) -> Any:
        times = timed(*args)
        monkeypatch.setattr(Profile, "runner", lambda self: _Wrong(own(self)))
        return times

    monkeypatch.setattr(compress_file, "final_pair", wrong_from_now_on)
    line = ["compress", "given.onnx", "--data", "data.npz", "--budget", "60%", "--methods", "filter", "--table", "t.db"]
    assert main([*line, "--out", "out", "--quiet"]) == 1
    error = capsys.readouterr().err
    assert "the engine of ort-cpu computes another network than the one in fp32" in error and error.count("\n") == 1
    report = json.loads(Path("out/report.json").read_text())
    assert report["engine_error"] > report["engine_tolerance"] > 0
    monkeypatch.setattr(Profile, "runner", own)
    monkeypatch.setattr(compress_file, "final_pair", timed)
    assert main([*line, "--out", "right", "--quiet"]) == 0
    report = json.loads(Path("right/report.json").read_text())
    assert report["engine_error"] <= report["engine_tolerance"]


def test_steps_need_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sluice.pipeline.compress_onnx.find_spec", lambda name: None)
    with pytest.raises(SluiceError, match="steps=5 train the file, which needs PyTorch"):
        sluice.compress_onnx(given(), examples(), budget="60%", steps=5, progress=False)


def tiny_run(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    import onnxruntime as ort

    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(None, feeds))


def test_refitted_weights_are_nearer_and_the_dense_ones_are_found_again() -> None:
    file, rows = read()
    analysis = analyze_onnx(file.model)
    scores = activity_scores(file.model, analysis, rows)
    kept = {g.name: tuple(sorted(np.argsort(-scores[g.name])[: g.size // 2].tolist())) for g in analysis.groups}
    plan, distance = make_plan(analysis, kept), OutputDistance(file.model, rows)
    slim = rewrite_onnx(file.model, plan)
    refitted, count = refit_onnx(slim, file.model, plan, rows)
    assert count >= 4
    assert distance.of(refitted) < 0.7 * distance.of(slim)
    assert [tuple(i.dims) for i in slim.graph.initializer if len(i.dims) > 1] == [
        tuple(i.dims) for i in refitted.graph.initializer if len(i.dims) > 1
    ]
    nothing = make_plan(analysis, {})
    same, count = refit_onnx(rewrite_onnx(file.model, nothing), file.model, nothing, rows)
    assert count == 0 and distance.of(same) < 1e-9


def test_targets_that_take_little_room_come_before_the_other_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether they do or not, weights are the same; where they do, one session is there at a time."""
    file, rows = read()
    analysis = analyze_onnx(file.model)
    plan = make_plan(analysis, {group.name: range(group.size // 2) for group in analysis.groups})
    slim, real = rewrite_onnx(file.model, plan), refit_module.untimed_session
    most = 0

    def session(*given: Any) -> Any:
        nonlocal most
        made = real(*given)
        alive.add(made)
        most = max(most, len(alive))
        return made

    monkeypatch.setattr(refit_module, "untimed_session", session)
    found = list[dict[str, np.ndarray]]()
    for share, expected in ((2, 1), (2**40, 2)):
        monkeypatch.setattr(refit_module, "SHARE", share)
        alive, most = WeakSet[Any](), 0
        made, count = refit_onnx(slim, file.model, plan, rows)
        assert count >= 4 and most == expected
        found.append({init.name: numpy_helper.to_array(init) for init in made.graph.initializer})
    assert found[0].keys() == found[1].keys()
    assert all(np.array_equal(found[0][name], found[1][name]) for name in found[0])


def test_numbers_of_one_group_at_a_time_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    file, rows = read()
    analysis, asked = analyze_onnx(file.model), list[str]()
    copied, cut = losses_module.hollow, losses_module.cut_graph
    monkeypatch.setattr(losses_module, "hollow", lambda *given: asked.append("copied") or copied(*given))
    monkeypatch.setattr(losses_module, "cut_graph", lambda *given: asked.append("cut") or cut(*given))
    levels = {group.name: (1, group.size // 2, group.size) for group in analysis.groups}
    scores = {group.name: np.arange(1.0, group.size + 1) for group in analysis.groups}
    latency = SimpleNamespace(levels=levels, dense={name: sizes[-1] for name, sizes in levels.items()}, switches=set())
    losses = onnx_losses(file.model, analysis, latency, EditSpace(), scores, OutputDistance(file.model, rows))  # type: ignore[arg-type]
    assert losses.keys() == levels.keys() and len(levels) > 2
    assert asked == ["copied", "cut", "cut"] * len(levels)


def test_layers_that_share_a_bias_stay_as_they_are() -> None:
    """The bias is a part of what they make and cannot move, so least squares would put it into the weights as well."""
    rng, helper = np.random.default_rng(0), onnx.helper
    shapes = {"w0": (6, 7), "w1": (5, 6), "w2": (5, 5), "b": (5,)}
    nodes = [
        helper.make_node("Gemm", ["x", "w0"], ["a"], transB=1), helper.make_node("Relu", ["a"], ["r"]),
        helper.make_node("Gemm", ["r", "w1", "b"], ["c"], transB=1), helper.make_node("Relu", ["c"], ["s"]),
        helper.make_node("Gemm", ["s", "w2", "b"], ["y"], transB=1),
    ]  # fmt: skip
    values = [numpy_helper.from_array(rng.standard_normal(s).astype(np.float32), name) for name, s in shapes.items()]
    ends = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["n", size]) for n, size in (("x", 7), ("y", 5))]
    graph = helper.make_graph(nodes, "shared", ends[:1], ends[1:], values)
    dense = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    analysis = analyze_onnx(dense)
    (group,) = analysis.groups
    plan = make_plan(analysis, {group.name: range(4)})
    rows = Rows({"x": rng.standard_normal((64, 7)).astype(np.float32)}, {"x": 0}, 64)
    assert refit_onnx(rewrite_onnx(dense, plan), dense, plan, rows)[1] == 0
    alone = onnx.ModelProto()
    alone.CopyFrom(dense)
    alone.graph.node[-1].input.pop()
    assert refit_onnx(rewrite_onnx(alone, plan), alone, plan, rows)[1] == 2


def test_scores_are_what_a_channel_adds_to_its_reader() -> None:
    """Of the channels that the classifier alone reads."""
    file, rows = read()
    analysis = analyze_onnx(file.model)
    reader = next(node for node in file.model.graph.node if "fc.weight" in node.input)
    weight = numpy_helper.to_array(OnnxGraph(file.model).initializers["fc.weight"])
    probe = onnx.ModelProto()
    probe.CopyFrom(file.model)
    probe.graph.output.append(onnx.helper.make_tensor_value_info(reader.input[0], onnx.TensorProto.FLOAT, None))
    (feeds,) = rows.batches(rows.count)
    read_values = tiny_run(probe, feeds)[1]
    expected = (read_values.astype(np.float64) ** 2).mean(0) * (weight.astype(np.float64) ** 2).sum(0)
    group = next(g for g in analysis.groups if any(r.param == "fc.weight" and r.axis == 1 for r in g.refs))
    assert_close(activity_scores(file.model, analysis, rows)[group.name], expected / expected.sum(), 1e-4)


def test_distances_know_their_outputs() -> None:
    file, rows = read()
    auto = OutputDistance(file.model, rows)
    assert auto.of(file.model) == 0.0
    doubled = given()
    for init in doubled.graph.initializer:
        if init.name in ("fc.weight", "fc.bias"):
            init.CopyFrom(numpy_helper.from_array(2 * numpy_helper.to_array(init), init.name))
    assert OutputDistance(given(), rows, "cosine").of(doubled) < 1e-6  # of the same direction
    assert auto.of(doubled) >= 1.0
    want = np.array([[0.2, 0.8], [0.5, 0.5]])
    assert cosine(want, want) == pytest.approx(1.0)
    assert cosine(want, -want) == pytest.approx(-1.0)
    broken = given()
    for init in broken.graph.initializer:
        if init.name == "fc.weight":
            init.CopyFrom(numpy_helper.from_array(np.full(tuple(init.dims), np.nan, np.float32), init.name))
    assert auto.of(broken) == BROKEN
    with pytest.raises(SluiceError, match="'huber' is unknown"):
        OutputDistance(given(), rows, "huber")


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        ({}, "give a mapping"),
        ({"image": np.zeros((4, 3, 9, 9), np.float32)}, "no input 'image'"),
        ({"picture": np.zeros((4, 3, 9), np.float32)}, "axes|runs"),
        ({"picture": np.zeros((4, 3, 9, 9), np.int64)}, "int64|runs"),
        ({"picture": np.full((4, 3, 9, 9), np.nan, np.float32)}, "no finite numbers"),
    ],
)  # fmt: skip
def test_data_that_does_not_fit_is_refused(tmp_path: Path, inputs: dict[str, np.ndarray], reason: str) -> None:
    with pytest.raises(SluiceError, match=reason):
        sluice.compress_onnx(given(), inputs, budget="60%", progress=False)


def test_a_fixed_batch_takes_whole_batches() -> None:
    rows = Rows({"x": np.arange(7), "rate": np.array(3)}, {"x": 0}, 7, batch=2)
    assert [feeds["x"].tolist() for feeds in rows.batches(32)] == [[0, 1], [2, 3], [4, 5]]
    assert all(feeds["rate"] == 3 for feeds in rows.batches(32))
    assert rows.spread(5).count == 4
    free = Rows({"x": np.arange(7)}, {"x": 0}, 7)
    assert [len(feeds["x"]) for feeds in free.batches(3)] == [3, 3, 1]


def test_open_sizes_beside_the_batch_stay_open(tmp_path: Path) -> None:
    program = torch.onnx.export(
        tiny.residual().eval(), (tiny.inputs(),), dynamo=True, verbose=False, input_names=["picture"],
        dynamic_shapes=({0: torch.export.Dim("n"), 2: torch.export.Dim("h", min=5), 3: torch.export.Dim("w", min=5)},),
    )  # fmt: skip
    assert program is not None
    before = program.model_proto
    done = sluice.compress_onnx(
        before, examples(), budget="60%", table=tmp_path / "t.db", batch=tiny.BATCH, progress=False, methods=("filter",)
    )
    assert done.report.met() and done.report.dense_ms > done.report.budget_ms
    assert [str(i) for i in done.onnx.graph.input] == [str(i) for i in before.graph.input]
    wide = {"picture": np.random.default_rng(1).standard_normal((2, 3, 12, 7)).astype(np.float32)}
    (found,), (cut,) = tiny_run(done.onnx, wide), tiny_run(before, wide)
    assert found.shape == cut.shape and np.isfinite(found).all()


def test_the_figure_of_merit_is_the_users(tmp_path: Path) -> None:
    def largest(session: Any) -> float:
        return float(session.run(None, examples(6))[0].max())

    done = compressed(tmp_path, evaluate=largest, methods=("filter",))
    assert done.report.figure == "accuracy"
    assert done.report.metric_dense == pytest.approx(float(tiny_run(given(), examples(6))[0].max()))
    with pytest.raises(SluiceError, match="evaluate raised ZeroDivisionError"):
        compressed(tmp_path, evaluate=lambda session: 1 / 0)


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
from sluice.core.weight_bytes import bytes_of_weights
from sluice.runtime.ort.cpu import OrtRunner, OrtSession
real = OrtRunner.build
def build(self, model, **options):
    session = real(self, model, **options)
    session.ms = 1e-6 * (100 + bytes_of_weights(model))
    return session
OrtRunner.build = build
OrtRunner.build_part = build
OrtSession.sample = lambda self, repeats: self.ms
from sluice.cli import main
sys.exit(main(["compress", "given.onnx", "--data", "data.npz", "--budget", "70%", "--methods", "filter", "--table",
               "t.db", "--out", "out", "--quiet", "--in-process"]))
"""


def test_it_runs_without_torch(tmp_path: Path) -> None:
    """In a process that cannot import torch, on a device whose milliseconds are the bytes of the weights."""
    (tmp_path / "given.onnx").write_bytes(content())
    np.savez(tmp_path / "data.npz", picture=examples()["picture"])
    found = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    made, before = onnx.load(tmp_path / "out" / "slim.onnx"), given()
    assert made.ByteSize() < 0.75 * before.ByteSize()
    assert "cosine of outputs" in found.stdout


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--data", "random"], ""),
        (["--data", "folder", "--steps", "4"], ""),
        (["--data", "folder"], ""),
        (["--data", "tests.pipeline.test_compress_onnx:examples"], ""),
        (["--data", "data.csv"], "is no data of an ONNX file"),
        (["--data", "empty"], "holds no .npy file"),
        (["--data", "broken.npz"], "cannot read"),
        (["--data", "tests.tiny:returns_a_number"], "returned int"),
        (["--data", "random", "--precision", "fp16"], "compressed in fp32"),
        (["--data", "random", "--gates"], "gates and stops are trained"),
        (["--data", "random", "--rotate"], "weights of an ONNX file keep their basis"),
        (["--data", "random", "--loss", "huber"], "'huber' is unknown"),
    ],
)  # fmt: skip
def test_words_of_the_command_line(
    words: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[2]), *sys.path])
    (tmp_path / "given.onnx").write_bytes(content())
    for folder in ("folder", "empty"):
        (tmp_path / folder).mkdir()
    np.save(tmp_path / "folder" / "any name.npy", examples()["picture"])
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 nothing")
    asked = ["compress", "given.onnx", "--budget", "70%", "--methods", "filter", "--table", "t.db", "--out", "out"]
    status = main([*asked, *words, "--quiet"])
    out, err = capsys.readouterr()
    if sentence:
        assert status == 1 and sentence in err and err.count("\n") == 1
    else:
        assert status == 0, err
        assert (tmp_path / "out" / "slim.onnx").exists()
        assert ("chosen blindly" in out) == ("random" in words)


def test_the_seed_reaches_the_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from sluice.cli import main
    from sluice.training import distill_onnx as training

    class Seen(Exception):
        pass

    def distill(*_: object, seed: int, **__: object) -> object:
        raise Seen(seed)

    monkeypatch.setattr(training, "distill_onnx", distill)
    onnx.save(given(), tmp_path / "m.onnx")
    np.savez(tmp_path / "x.npz", **examples())
    line = ["compress", tmp_path / "m.onnx", "--data", tmp_path / "x.npz", "--budget", "60%", "--methods", "filter"]
    line += ["--table", tmp_path / "t.db", "--out", tmp_path / "o", "--steps", "4", "--seed", "7", "--quiet"]
    with pytest.raises(Seen, match="7"):
        main([str(word) for word in line])
