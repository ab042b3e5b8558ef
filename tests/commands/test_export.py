"""``sluice export``: the file in its precision, the engine, and the commands for another machine."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from sluice.artifacts.deploy import as_module
from sluice.cli import main
from sluice.commands import export as cli_export
from sluice.commands import export_network
from sluice.commands.export import commands
from sluice.commands.specs import inputs_of
from sluice.core.deployment import PRECISIONS
from sluice.core.errors import SluiceError
from sluice.runtime.base import nvidia
from sluice.runtime.base.compare import relative_error
from sluice.runtime.openvino.runner import OpenVinoSession
from sluice.runtime.ort.cpu import OrtSession
from sluice.runtime.targets import available_targets
from sluice.runtime.trt import build as trt_build
from sluice.runtime.trt.build import static_model
from tests import tiny
from tests.device import chain
from tests.fake_tensorrt import fake_tensorrt
from tests.rtx import INSTALLED
from tests.tiny import words

ROOT = Path(__file__).resolve().parents[2]
MODEL = "export tests.tiny:model --shape 3,9,9"
Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def called(*parts: object, status: int = 0, error: str = "") -> dict[str, Any]:
        """The result; ``error`` is on standard error, which is empty without it or a status."""
        assert main(words(*parts, "--json")) == status
        out, err = capsys.readouterr()
        assert error in err and bool(err) == bool(status or error)
        return json.loads(out) if out else {}

    return called


def install(monkeypatch: pytest.MonkeyPatch, **faults: Any) -> Any:
    trt = fake_tensorrt(**faults)
    monkeypatch.setattr(trt_build, "find_tensorrt", lambda: trt)
    return trt


def types_in(path: Path) -> set[int]:
    return {init.data_type for init in onnx.load(path).graph.initializer if len(init.dims) > 1}


def test_trtexec_builds_and_times_what_is_deployed() -> None:
    found = commands(chain([5], batch="N"), "slim.onnx", "out/slim.engine", precision="fp16", batch=8)
    assert shlex.split(found.trtexec) == [
        "trtexec",
        "--onnx=slim.onnx",
        "--saveEngine=out/slim.engine",
        "--shapes=x:8x3x9x9",
        "--timingCacheFile=out/slim.cache",
        "--maxAuxStreams=0",
        "--avgTiming=8",
        "--useCudaGraph",
        "--useSpinWait",
        "--noDataTransfers",
    ]
    assert shlex.split(found.polygraphy) == [
        *(
            "polygraphy",
            "run",
            "slim.onnx",
            "--trt",
            "--strongly-typed",
            "--onnxrt",
            "--rtol",
            "0.02",
            "--atol",
            "0.02",
        ),
        *("--input-shapes", "x:[8,3,9,9]"),
        *("--load-timing-cache", "out/slim.cache", "--save-timing-cache", "out/slim.cache"),
    ]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_no_flag_gives_a_precision(precision: str) -> None:
    found = commands(chain([5]), "a.onnx", "a.engine", precision=precision)
    used = {word.partition("=")[0] for text in (found.trtexec, found.polygraphy) for word in shlex.split(text)}
    assert not used & {"--fp16", "--bf16", "--int8", "--fp8", "--best", "--stronglyTyped", "--shapes", "--input-shapes"}
    assert ("--onnxrt" in used, "--validate" in used) == (precision != "bf16", precision == "bf16")


def test_tolerances_widen_with_the_step_of_the_precision() -> None:
    def tolerance(precision: str) -> float:
        line = shlex.split(commands(chain([5]), "a.onnx", "a.engine", precision=precision).polygraphy)
        assert line[line.index("--rtol") + 1] == line[line.index("--atol") + 1]
        return float(line[line.index("--rtol") + 1])

    assert tolerance("fp32") < tolerance("fp16") < tolerance("int8") < 0.5


def test_inputs_and_paths_of_any_name() -> None:
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, dims) for name, dims in
             (("a b", ["N", 3]), ("fixed", [4, 3]), ("c:0", ["N", 2, 5]), ("y", ["N", 3]))]  # fmt: skip
    graph = helper.make_graph([helper.make_node("Relu", ["a b"], ["y"])], "g", infos[:3], infos[3:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    found = commands(model, "my files/a.onnx", "my files/a.engine", precision="fp32", batch=6)
    assert "--shapes=a b:6x3,c:0:6x2x5" in shlex.split(found.trtexec)
    assert "--onnx=my files/a.onnx" in shlex.split(found.trtexec)
    line = shlex.split(found.polygraphy)
    assert line[line.index("--input-shapes") + 1 : line.index("--load-timing-cache")] == ["a b:[6,3]", "c:0:[6,2,5]"]
    infos[2].type.tensor_type.shape.dim[1].dim_param = "length"
    graph.input[2].CopyFrom(infos[2])
    model.graph.CopyFrom(graph)
    with pytest.raises(SluiceError, match=r"'c:0' has shape \[6, 'length', 5\], of which only the batch may be open"):
        commands(model, "a.onnx", "a.engine", precision="fp32", batch=6)


def test_export_in_half_precision_with_its_engine(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trt = install(monkeypatch)
    path, engine = tmp_path / "slim.onnx", tmp_path / "deep" / "out.engine"
    found = run(MODEL, "-o", path, "--precision fp16 --batch 4 --engine", engine)
    assert types_in(path) == {TensorProto.FLOAT16}
    assert engine.read_bytes() == static_model(onnx.load(path), 4).SerializeToString()
    assert found["engine"] == {"file": str(engine), "bytes": engine.stat().st_size, "builder": "TensorRT 11.4.0.106"}
    assert (found["out"], found["precision"], found["bytes"]) == (str(path), "fp16", path.stat().st_size)
    assert f"--saveEngine={engine.with_suffix('.trtexec.engine')}" in shlex.split(found["trtexec"])
    assert f"--timingCacheFile={engine.with_suffix('.cache')}" in shlex.split(found["trtexec"])
    assert ":4x3x9x9" in found["trtexec"] and found["batch_fixed"] is False
    cache = (tmp_path / "deep" / "out.cache").read_bytes()
    assert cache
    run(MODEL, "-o", path, "--precision fp16 --batch 4 --engine", engine)
    assert trt.calls["caches"] == [b"", cache]


@pytest.mark.parametrize(
    ("version", "name", "major"),
    [("10.13.3.9", "tensorrt", "10"), ("11.4.0.106", "tensorrt", "11"), ("1.2.0.54", "tensorrt_rtx", "11 (10 wants")],
)
def test_types_are_strong_in_the_version_found(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    version: str, name: str, major: str,
) -> None:  # fmt: skip
    """TensorRT 10 must be told, 11 refuses the flag; so too where it is only installed and builds nothing here."""
    install(monkeypatch, version=version, name=name)
    monkeypatch.setattr(cli_export, "find_spec", lambda module: module == name or None)
    for option in ((), ("--engine", tmp_path / "a.engine")):
        assert main(words(MODEL, "-o", tmp_path / "a.onnx", *option)) == 0
        lines = capsys.readouterr().out.splitlines()
        title, line = next((a, b) for a, b in pairwise(lines) if a.startswith("build and time"))
        assert title.startswith(f"build and time with TensorRT {major}")
        assert ("--stronglyTyped" in shlex.split(line)) is (major == "10")


def test_what_is_installed_and_cannot_be_loaded_is_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise SluiceError("TensorRT is not here")

    monkeypatch.setattr(trt_build, "find_tensorrt", broken)
    monkeypatch.setattr(cli_export, "find_spec", lambda module: True)
    assert cli_export._version(None) is None


class Stubborn(nn.Module):
    """Takes any batch, but not a free one: its Python asks for the number."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).relu().mean((2, 3)) * float(1 / int(x.shape[0]))


@pytest.mark.parametrize("option", ["", "--names"])
def test_a_network_that_fixes_its_batch_is_exported_at_the_one_asked_for(
    option: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    line = f"export tests.commands.test_export:Stubborn --shape 3,9,9 {option}"
    for batch in (1, 5):
        assert main(words(line, f"--batch {batch} -o", tmp_path / "a.onnx")) == 0
        (info,) = onnx.load(tmp_path / "a.onnx").graph.input
        assert [dim.dim_value for dim in info.type.tensor_type.shape.dim] == [batch, 3, 9, 9]
        out = capsys.readouterr().out
        assert f"bytes, fp32, batch fixed at {batch}\n" in out or option


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "--engine a.engine --target ort-cpu",
            "--engine is built by the TensorRT of this machine, not for --target ort-cpu",
        ),
        (
            "--engine a.engine --target ort-cuda",
            "--engine is built by the TensorRT of this machine, not for --target ort-cuda",
        ),
        ("--precision int8 --target ort-cuda", "ort-cuda cannot be timed in int8: its CUDA provider"),
        ("--precision int8 --target torch-cuda", "torch-cuda cannot be timed in int8: it has no int8"),
        ("--precision bf16 --target ort-cpu", "ort-cpu cannot be timed in bf16"),
        ("--target abacus", "there is no target 'abacus'"),
    ],
)
def test_options_that_do_not_go_together(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, options: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sluice.cli.model_of", lambda *_: pytest.fail("the model was made"))
    calibration = "--calibration tests.tiny:data" if "int8" in options else ""
    run(MODEL, "-o a.onnx", options, calibration, status=1, error=message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("out", "engine", "said"),
    [
        ("same", "same", "-o and --engine are both 'same'"),
        ("same.onnx", "./folder/../same.onnx", "-o and --engine are both './folder/../same.onnx'"),
        ("a.cache", "a.engine", "-o and the timing cache beside the engine are both 'a.cache'"),
        ("a.onnx", "a.cache", "--engine and the timing cache beside the engine are both 'a.cache'"),
    ],
)
def test_no_file_is_written_over_another(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, out: str, engine: str, said: str
) -> None:
    install(monkeypatch)
    monkeypatch.chdir(tmp_path)
    run(MODEL, "-o", out, "--engine", engine, status=1, error=said)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("precision", "data"), [("fp16", ""), ("bf16", ""), ("int8", "data"), ("int8", "data_once")])
def test_what_the_precision_costs_is_said(
    run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path, precision: str, data: str
) -> None:
    """On the first calibration inputs, or else on those that the file was exported with."""
    options = f"--precision {precision} --batch 3 {f'--calibration tests.tiny:{data}' * bool(data)}"
    path = tmp_path / "a.onnx"
    found = run(MODEL, "-o", path, options)
    given = tiny.data()[0][0] if data else inputs_of("tests.tiny:model", (3, 9, 9), 3)
    with torch.no_grad():
        want = tiny.model().eval()(given)
    assert found["error"] == pytest.approx(relative_error(as_module(onnx.load(path))(given), want), rel=0.02)
    assert 0 < found["error"] < 0.05
    assert main(words(MODEL, "-o", path, options)) == 0
    place = "the first calibration inputs" if data else "random inputs"
    assert f"relative error to fp32 {found['error']:.1e}, on {place}" in capsys.readouterr().out.splitlines()


class Overflowing(nn.Module):
    """Beyond what fp16 can hold."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 6e4 * 6e4


def test_an_error_without_a_number(run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    line = f"export tests.commands.test_export:Overflowing --shape 5 --precision fp16 -o {tmp_path / 'a.onnx'}"
    assert run(line, status=1, error="computes another network than the one in fp32")["error"] is None
    assert main(words(line)) == 1
    assert "relative error to fp32 inf, on random inputs" in capsys.readouterr().out


def test_fp32_costs_nothing(run: Run, tmp_path: Path) -> None:
    assert "error" not in run(MODEL, "-o", tmp_path / "a.onnx")


def test_rtx_leaves_the_timing_cache_of_another(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, name="tensorrt_rtx")
    cache = tmp_path / "out.cache"
    cache.write_bytes(b"[old]")
    run(MODEL, "-o", tmp_path / "a.onnx", "--engine", tmp_path / "out.engine")
    assert cache.read_bytes() == b"[old]"
    run(MODEL, "-o", tmp_path / "a.onnx", "--engine", tmp_path / "new.engine")
    assert not (tmp_path / "new.cache").exists()


def test_lines_for_people(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch)
    assert main(words(MODEL, "-o", tmp_path / "a.onnx", "--engine", tmp_path / "a.engine")) == 0
    first, second, *rest = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{tmp_path / 'a.onnx'}: ") and first.endswith("bytes, fp32")
    assert second.startswith(f"{tmp_path / 'a.engine'}: ") and second.endswith("batch 1, by TensorRT 11.4.0.106")
    assert rest[0].startswith(f"{tmp_path / 'a.engine'} was not compared with fp32: target 'tensorrt' cannot run here")
    assert [line.split()[0] for line in rest[1:]] == ["build", "trtexec", "check", "polygraphy"]


@pytest.mark.parametrize(("target", "precision"), [("ort-cpu", "fp32"), ("openvino", "fp32"), ("openvino", "int8")])
def test_the_engine_of_a_target_is_compared_with_fp32(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, target: str,
    precision: str,
) -> None:  # fmt: skip
    if reason := available_targets()[target]:
        pytest.skip(reason)
    calibration = "--calibration tests.tiny:data" if precision == "int8" else ""
    line = f"{MODEL} --precision {precision} {calibration} --target {target} -o {tmp_path / 'a.onnx'}"
    assert 0 <= run(line)["engine_error"] < (0.05 if precision == "int8" else 1e-5)
    session = OrtSession if target == "ort-cpu" else OpenVinoSession
    own = session.run

    def shifted(self: Any, feeds: Any) -> dict[str, Any]:
        return {name: np.roll(x, 1, -1) for name, x in own(self, feeds).items()}

    if target == "ort-cpu":  # it computes the reference, too
        return
    monkeypatch.setattr(session, "run", shifted)
    data = run(line, status=1, error=f"on {target} computes another network than the one in fp32")
    assert data["engine_error"] > 0.1 and (tmp_path / "a.onnx").exists()


def test_what_is_missing_is_told_before_the_export(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An export of a large network takes a minute, and nobody reads a reason for nothing then."""
    told: list[str] = []
    export = export_network.network_to_export

    def exported(args: Any) -> Any:
        told.append(capsys.readouterr().err)
        return export(args)

    monkeypatch.setattr(export_network, "network_to_export", exported)
    monkeypatch.setattr(nvidia, "gpu_names", lambda: ())
    path = tmp_path / "slim.onnx"
    assert main(words(MODEL, "-o", path, "--target torch-cuda")) == 0
    assert told[0].startswith(f"{path} is written, and not compared with fp32: target 'torch-cuda' cannot run here: ")
    assert path.is_file() and "torch-cuda was not compared with fp32: target" in capsys.readouterr().out
    assert main(words(MODEL, "-o", path, "--target ort-cpu")) == 0
    assert told[1] == ""

    def absent() -> Any:
        raise SluiceError("TensorRT is not here; install tensorrt")

    monkeypatch.setattr(trt_build, "find_tensorrt", absent)
    path.unlink()
    assert main(words(MODEL, "-o", path, "--engine", tmp_path / "out.engine")) == 1
    assert "out.engine' cannot be built here: TensorRT is not here; install tensorrt; or leave out --engine" in (
        capsys.readouterr().err
    )
    assert len(told) == 2 and not path.exists()


def test_where_no_engine_can_be_built_the_rest_is_there(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install(monkeypatch, build_error="no kernel for this")
    path, engine = tmp_path / "slim.onnx", tmp_path / "out.engine"
    found = run(
        MODEL, "-o", path, "--engine", engine, status=1, error="cannot build the model in memory: no kernel for"
    )
    assert types_in(path) == {TensorProto.FLOAT}
    assert "engine" not in found and not engine.exists()
    assert found["trtexec"].startswith("trtexec ") and found["polygraphy"].startswith("polygraphy ")


def test_int8_is_for_one_runtime(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(nvidia, "gpu_names", lambda: ())
    path = tmp_path / "slim.onnx"
    int8 = (MODEL, "-o", path, "--precision int8")
    run(*int8, status=1, error="int8 needs to know the ranges")
    found = run(*int8, "--calibration tests.tiny:data")
    assert "trtexec" not in found
    zero_points = {init.data_type for init in onnx.load(path).graph.initializer if "zero" in init.name}
    found = run(*int8, "--calibration tests.tiny:data --target tensorrt", error="target 'tensorrt' cannot run here")
    assert found["trtexec"].startswith("trtexec ") and "--onnxrt" in found["polygraphy"]
    nodes = {node.op_type for node in onnx.load(path).graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= nodes
    assert zero_points != {init.data_type for init in onnx.load(path).graph.initializer if "zero" in init.name}


def test_layers_that_stay_out_of_int8(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"
    run(MODEL, "-o", path, "--precision int8 --calibration tests.tiny:data --exclude conv1 --exclude f?")
    names = {init.name for init in onnx.load(path).graph.initializer if init.data_type == TensorProto.FLOAT}
    assert {"conv1.weight", "fc.weight"} <= names and "conv2.weight" not in names
    run(MODEL, "-o", path, "--precision int8 --calibration tests.tiny:data --exclude con", status=1,
        error="exclude names 'con', which is no layer of the network")  # fmt: skip
    run(MODEL, "-o", path, "--precision fp16 --exclude conv1", status=1, error="--exclude keeps layers out of int8")
    run(MODEL, "-o", path, "--precision fp16 --reduce-range", status=1, error="--reduce-range is about weights in int8")
    for option, largest in (("--reduce-range", 64), ("--no-reduce-range", 127)):
        run(MODEL, "-o", path, f"--precision int8 --calibration tests.tiny:data {option}")
        weights = [
            numpy_helper.to_array(w) for w in onnx.load(path).graph.initializer if w.data_type == TensorProto.INT8
        ]
        assert max(int(abs(w.astype(int)).max()) for w in weights) == largest


@pytest.mark.parametrize("option", ["--precision fp16", "--engine out.engine"])
def test_a_file_for_plans_is_no_deployment(run: Run, tmp_path: Path, option: str) -> None:
    run(MODEL, "-o", tmp_path / "a.onnx", "--names", option, status=1, error="--names writes what plans are applied to")
    assert not (tmp_path / "a.onnx").exists()


def test_an_unknown_precision_is_refused(run: Run, tmp_path: Path) -> None:
    run(MODEL, "-o", tmp_path / "a.onnx", "--precision fp8", status=1, error="there is no precision 'fp8'")


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="TensorRT-RTX is not installed")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_real_engine(tmp_path: Path, precision: str) -> None:
    calibration = "--calibration tests.tiny:data" if precision == "int8" else ""
    line = f"{MODEL} --json --precision {precision} {calibration} --engine {tmp_path / 'a.engine'}"
    done = subprocess.run(
        [sys.executable, "-m", "sluice", *line.split(), "-o", str(tmp_path / "a.onnx")],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    if precision == "int8":
        assert done.returncode == 1 and "gains nothing from int8" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    engine = json.loads(done.stdout)["engine"]
    assert engine["builder"].startswith("TensorRT-RTX ") and engine["bytes"] == (tmp_path / "a.engine").stat().st_size


def test_a_file_of_another_network_is_a_failure(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp16 whose weights are all zero, as an overflow would leave them."""
    import sluice.artifacts.in_precision as deploy

    own = deploy.to_precision

    def broken(model: onnx.ModelProto, *args: object, **kwargs: object) -> onnx.ModelProto:
        made = own(model, *args, **kwargs)  # type: ignore[arg-type]
        for init in made.graph.initializer:
            if len(init.dims) > 1:
                init.raw_data = bytes(len(init.raw_data))
        return made

    words = tiny.words("export tests.tiny:model --shape 3,9,9 --precision fp16 -o", tmp_path / "x.onnx")
    assert main(words) == 0
    capsys.readouterr()
    monkeypatch.setattr(deploy, "to_precision", broken)
    assert main(words) == 1
    out, err = capsys.readouterr()
    assert "relative error to fp32" in out and (tmp_path / "x.onnx").exists()
    assert "computes another network than the one in fp32" in err and err.count("\n") == 1
