"""What the command line does with TensorRT beyond building an engine, on one that exists in memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx
import pytest

from sluice.cli import main
from sluice.commands.engine_layers import check_inspector, place_profile, placement_lines
from sluice.core.errors import SluiceError
from sluice.passes.search_space import find_search_space, read_onnx
from sluice.profiler.fit.assemble import lay_out
from sluice.profiler.pieces.partition import partition_graph
from sluice.profiler.pieces.variants import Alternatives
from sluice.profiler.survey import closed_bench
from sluice.profiler.table.fingerprint import Fingerprint
from sluice.profiler.table.latency_table import LatencyTable
from sluice.profiler.table.measurement import Measurement
from sluice.profiler.timing import sm_clock as clocks
from sluice.profiler.timing.timing_cache import NAME, keep_kernels
from sluice.profiler.view import Profile
from sluice.runtime.base import nvidia
from sluice.runtime.base import runner as runner_module
from sluice.runtime.base.cuda import Cuda
from sluice.runtime.ort.cuda import OrtCudaRunner
from sluice.runtime.torch_cuda.runner import TorchCudaRunner
from sluice.runtime.trt import build as trt_build
from sluice.runtime.trt import runner as tensorrt
from sluice.runtime.trt.inspect import EngineLayers, kernels
from sluice.runtime.trt.runner import TensorRtRunner
from sluice.runtime.trt.session import TensorRtSession
from sluice.solver.options import EditSpace
from tests.device import FINGERPRINT, chain
from tests.fake_tensorrt import MS, FakeCuda, fake_tensorrt
from tests.tiny import words

BATCH = 2
Run = Callable[..., tuple[str, str]]


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> Any:
    cuda = FakeCuda()
    fake = fake_tensorrt(cuda)
    for module in (tensorrt, trt_build):
        monkeypatch.setattr(module, "find_tensorrt", lambda: fake)
    monkeypatch.setattr(Cuda, "load", lambda: cuda)
    monkeypatch.setattr(nvidia, "gpu_names", lambda: ("NVIDIA Some",))
    monkeypatch.setattr(nvidia, "driver_version", lambda: "580.65.06")
    monkeypatch.setattr(nvidia, "sm_clock_mhz", lambda: 1410)
    monkeypatch.setattr(runner_module, "TRIALS_MS", 0.01)
    return fake


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def called(*parts: object, status: int = 0) -> tuple[str, str]:
        assert main(words(*parts)) == status
        found = capsys.readouterr()
        return found.out, found.err

    return called


def fingerprint_of(runner: TensorRtRunner) -> Fingerprint:
    return Fingerprint(runner.device, "tensorrt", runner.version, 1, "fp32", BATCH, runner.clock)


def test_pieces_are_found_in_the_dense_engine(trt: Any) -> None:
    """Here every node is a layer, and none is shared."""
    partition = partition_graph(chain([5, 7]), BATCH)
    runner = TensorRtRunner()
    layout, space = lay_out(partition, Alternatives(EditSpace()), "fp32"), find_search_space(read_onnx(partition.model))
    with LatencyTable.create(":memory:", fingerprint_of(runner)) as table:
        placed = place_profile(Profile(layout, closed_bench(table), space, EditSpace()))
    assert list(placed.pieces) == [piece.name for piece in partition.pieces]
    nodes = {piece.name: [node.name for node in piece.model.graph.node] for piece in partition.pieces}
    assert {name: len(layers) for name, layers in placed.pieces.items()} == {n: len(v) for n, v in nodes.items()}
    assert not placed.shared and not placed.own


def test_a_placement_for_people() -> None:
    placed = EngineLayers({"a": ("k0", "k1"), "b": ("k1",), "c": ()}, {"k1": ("a", "b")}, ("copy",))
    assert placement_lines(placed) == [
        "layers of the dense engine, by piece; 1 are shared by several pieces",
        "  a: k0, k1 (with 1 more)",
        "  b: k1 (with 1 more)",
        "  c: no layer of its own",
        "  put in by the compiler: copy",
    ]
    assert json.loads(json.dumps(asdict(placed)))["shared"] == {"k1": ["a", "b"]}


def test_other_runtimes_do_not_tell_their_layers(run: Run, tmp_path: Path) -> None:
    with pytest.raises(SluiceError, match="ort-cuda does not tell the layers"):
        check_inspector("ort-cuda")
    table = tmp_path / "t.db"
    _, error = run("profile tests.tiny:model --shape 3,9,9 --layers --table", table, status=1)
    assert error.startswith("sluice: error: ort-cpu does not tell the layers of its engines") and not table.exists()
    with pytest.raises(SystemExit):
        run("profile tests.tiny:model --shape 3,9,9 --layers --pack -o", tmp_path / "job.zip")
    with pytest.raises(SystemExit):
        run("profile tests.tiny:model --shape 3,9,9 --layers --shard 1/2 --target tensorrt --table", table)


def test_an_engine_is_timed_beside_the_file_it_came_from(trt: Any, run: Run, tmp_path: Path) -> None:
    model = chain([5], batch=BATCH)
    file, engine = tmp_path / "a.onnx", tmp_path / "a.engine"
    onnx.save(model, file)
    engine.write_bytes(model.SerializeToString())
    out, _ = run("bench --json --target tensorrt --batch", BATCH, file, engine)
    assert [e["ms"] for e in json.loads(out)["engines"]] == pytest.approx([MS, MS])
    _, error = run("bench", engine, status=1)
    assert "is an engine of TensorRT, --target is ort-cpu" in error
    _, error = run("bench --target tensorrt", tmp_path / "none.engine", status=1)
    assert "cannot read" in error and "give the path of an engine" in error


def export(folder: Path, table: Path) -> list[object]:
    return [
        "export tests.tiny:model --shape 3,9,9 -o",
        folder / "a.onnx",
        "--engine",
        folder / "a.engine",
        "--table",
        table,
    ]


def test_an_engine_is_built_with_the_timing_cache_of_the_table(trt: Any, run: Run, tmp_path: Path) -> None:
    with LatencyTable.create(tmp_path / "t.db", fingerprint_of(TensorRtRunner())) as table:
        table.put_blob(NAME, b"[measured]")
    (tmp_path / "a.cache").write_bytes(b"[beside]")
    run(*export(tmp_path, tmp_path / "t.db"))
    assert trt.calls["caches"] == [b"[measured]"]
    assert (tmp_path / "a.cache").read_bytes().startswith(b"[measured]")


@pytest.mark.parametrize("strange", [0, 2])
def test_kernels_that_no_part_of_the_table_ran_are_told(trt: Any, run: Run, tmp_path: Path, strange: int) -> None:
    """And the outputs of the engine are compared."""
    runner = TensorRtRunner()
    file = tmp_path / "first.onnx"
    run("export tests.tiny:model --shape 3,9,9 -o", file)
    engine = runner.build(str(file), batch=1)
    own = [kernel for layer in engine.layers()[strange:] for kernel in kernels([layer])]
    with LatencyTable.create(tmp_path / "t.db", fingerprint_of(runner)) as table:
        table.put_blob(NAME, b"[measured]")
        keep_kernels(runner, table, own if strange == 0 else ["another"])
    out, _ = run(*export(tmp_path, tmp_path / "t.db"), "--json")
    found, names = json.loads(out), [layer.name for layer in engine.layers()]
    assert found["kernels"] == len(names) and found["engine_error"] < 1e-5
    assert found["kernels_not_in_table"] == ([] if strange == 0 else names)
    out, _ = run(*export(tmp_path, tmp_path / "t.db"))
    count = len(names)
    assert (f"all {count} kernels of the engine are among those" in out) == (strange == 0)
    assert (f"{count} of {count} kernels of the engine were measured in no part" in out) == (strange > 0)


def test_an_engine_that_computes_something_else_is_an_error(
    trt: Any, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = TensorRtSession.run
    monkeypatch.setattr(TensorRtSession, "run", lambda self, feeds: {n: -y for n, y in own(self, feeds).items()})
    words = ["export tests.tiny:model --shape 3,9,9 -o", tmp_path / "a.onnx", "--engine", tmp_path / "a.engine"]
    out, error = run(*words, status=1)
    assert "a.engine: relative error to fp32 2.0e+00, as it runs" in out
    assert "a.engine computes another network than the one in fp32" in error and (tmp_path / "a.engine").exists()


def test_tables_without_a_cache_for_this_device_are_refused(trt: Any, run: Run, tmp_path: Path) -> None:
    with LatencyTable.create(tmp_path / "cpu.db", FINGERPRINT) as table:
        table.put("k", (), Measurement(1.0, 0.01, 40, FINGERPRINT.clock))
    _, error = run(*export(tmp_path, tmp_path / "cpu.db"), status=1)
    assert "holds no timing cache (its runtime is fake)" in error
    here = fingerprint_of(TensorRtRunner())
    other = Fingerprint("NVIDIA Other", *[getattr(here, n) for n in list(Fingerprint.__dataclass_fields__)[1:]])
    with LatencyTable.create(tmp_path / "other.db", other) as table:
        table.put_blob(NAME, b"[measured]")
    _, error = run(*export(tmp_path, tmp_path / "other.db"), status=1)
    assert "of no use here: device is 'NVIDIA Other', not 'NVIDIA Some'" in error
    _, error = run("export tests.tiny:model --shape 3,9,9 -o", tmp_path / "a.onnx", "--table x.db", status=1)
    assert "--table gives an engine the timing cache" in error


def test_clocks_of_all_gpu_targets_are_logged(trt: Any) -> None:
    for runner in (TensorRtRunner(), OrtCudaRunner(), TorchCudaRunner()):
        with LatencyTable.create(":memory:", FINGERPRINT) as table:
            clocks.keep(runner, table)
            assert clocks.clock_range(table) == (1410, 1410)
