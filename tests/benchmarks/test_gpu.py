"""The benchmark of GPUs: its stages on a simulated device, its limits, its files; and, slowly, on this machine."""

from __future__ import annotations

import gc
import json
import signal
import sys
import time
import weakref
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import gpu, gpu_stages
from benchmarks.gpu import Record, TimeUp, main, time_limit
from benchmarks.gpu_plot import staircase_plot, ticks
from benchmarks.gpu_stages import CHECK, FULL, SMALL
from sluice.core.errors import SluiceError
from sluice.runtime.base.compare import assert_close
from tests.device import FakeRunner, chain, profile_on, staircase


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> FakeRunner:
    runner = FakeRunner(staircase(8))
    monkeypatch.setattr(gpu, "make_runner", lambda target, threads=1: runner)
    profile_on(lambda target, threads=1: runner, monkeypatch)
    monkeypatch.setattr(gpu, "_export", lambda network: chain([50, 36], batch="N"))
    return runner


def called(tmp_path: Path, *arguments: str, seconds: float = 300) -> int:
    folders = ("--out", tmp_path / "results", "--plots", tmp_path / "plots", "--tables", tmp_path / "tables")
    return main(["--small", "--seconds", str(seconds), *map(str, folders), *arguments])


def written(tmp_path: Path, device: str = "a-fake-device") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((tmp_path / "results" / f"gpu-{device}.json").read_text())
    return found


def test_every_stage_has_its_figures(simulated: FakeRunner, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert called(tmp_path, "--target", "torch-cuda", "--batch", "2") == 0
    found = written(tmp_path)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == found
    assert found["device"] == simulated.device and found["targets"] == {"torch-cuda": simulated.version}
    which = "resnet torch-cuda batch 2 fp32"
    stages = {name: stage["result"] for name, stage in found["stages"].items()}
    assert list(stages) == [
        "staircase torch-cuda batch 2 fp32",
        "export resnet",
        *(f"{kind} {which}" for kind in ("dense", "profile", "pieces", "half", "fidelity")),
    ]
    stairs = dict(stages["staircase torch-cuda batch 2 fp32"])
    assert list(stairs) == sorted(SMALL.layer.widths)
    assert stairs[17] > 1.4 * stairs[16] and stairs[16] < 1.1 * stairs[15]  # one block of eight more
    dense = simulated.ms(chain([50, 36], batch="N"))
    half, profile = stages[f"half {which}"], stages[f"profile {which}"]
    assert_close(
        [stages[f"dense {which}"]["ms"], profile["promised_dense_ms"], half["dense_ms"]], [dense, dense, dense], 1e-6
    )
    assert profile["points"] > 5 and profile["calibration"]["p95_abs_err"] < 1e-6
    # Where times add up, what is promised is what is measured, and the solver comes close to half.
    assert half["promised_over_measured"] == pytest.approx(1.0, abs=1e-6)
    assert 0.3 < half["slim_over_dense"] <= 0.5 and 0.0 < half["channels_kept"] < 1.0
    table = stages[f"pieces {which}"]
    assert_close([table["engine_ms"], table["pieces_ms"]], [dense, dense], 1e-6)
    assert sum(row["times"] for row in table["rows"]) == 3  # two convolutions and a product
    fidelity = stages[f"fidelity {which}"]
    assert fidelity["n"] == SMALL.plans and fidelity["p95_abs_err"] < 1e-6
    picture = ElementTree.parse(tmp_path / "plots" / "gpu-a-fake-device-staircase.svg").getroot()
    assert len(picture.findall("{*}polyline")) == 1


def test_a_check_runs_the_tests_first_and_says_when_they_fail(
    simulated: FakeRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def python(code: str) -> tuple[str, ...]:
        return sys.executable, "-c", code

    monkeypatch.setattr(gpu, "device_tests", partial(gpu_stages.device_tests, python("print('3 passed')")))
    assert called(tmp_path, "--check", "--target", "torch-cuda", "--batch", "2") == 0
    stages = written(tmp_path)["stages"]
    assert next(iter(stages)) == "tests" and stages["tests"]["result"] == {"status": 0, "told": ["3 passed"]}
    assert "half resnet torch-cuda batch 2 fp32" in stages

    failing = python("print('1 failed'); raise SystemExit(1)")
    monkeypatch.setattr(gpu, "device_tests", partial(gpu_stages.device_tests, failing))
    assert called(tmp_path / "again", "--check", "--target", "torch-cuda", "--batch", "2") == 1
    stages = written(tmp_path / "again")["stages"]
    assert "1 failed" in stages["tests"]["reason"]
    assert stages["half resnet torch-cuda batch 2 fp32"]["result"]  # the others go on


def test_what_a_lent_gpu_is_asked() -> None:
    assert CHECK.precision == "fp16" and set(CHECK.networks) == {"resnet20", "mobilenet_v2"}
    for network in CHECK.networks.values():
        assert network.make().eval()(torch.randn(2, *network.image)).shape[0] == 2


def test_a_wrong_promise_shows(simulated: FakeRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole engines of random plans that take a fifth longer than their pieces: the figures must say so."""
    measure_engines = gpu_stages.measure_engines
    monkeypatch.setattr(
        gpu_stages, "measure_engines", lambda *given, **more: [1.25 * ms for ms in measure_engines(*given, **more)]
    )
    assert called(tmp_path, "--target", "torch-cuda", "--batch", "2") == 0
    fidelity = written(tmp_path)["stages"]["fidelity resnet torch-cuda batch 2 fp32"]["result"]
    assert fidelity["median_abs_err"] == pytest.approx(0.2, abs=1e-3)


def test_a_stage_that_fails_leaves_the_others(
    simulated: FakeRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*arguments: object) -> None:
        raise ZeroDivisionError("no such kernel")

    def refused(*arguments: object) -> None:
        raise SluiceError("the layer is too wide; take another")

    monkeypatch.setattr(gpu, "staircase", refused)
    monkeypatch.setattr(gpu, "half", broken)
    assert called(tmp_path, "--target", "torch-cuda", "--batch", "2") == 1
    stages = written(tmp_path)["stages"]
    assert stages["staircase torch-cuda batch 2 fp32"]["reason"] == "the layer is too wide; take another"
    assert stages["half resnet torch-cuda batch 2 fp32"]["reason"] == "ZeroDivisionError: no such kernel"
    assert "result" in stages["fidelity resnet torch-cuda batch 2 fp32"]
    assert "Traceback" in capsys.readouterr().err
    assert not (tmp_path / "plots").exists()


def test_out_of_time_every_stage_says_so_and_the_next_call_goes_on(simulated: FakeRunner, tmp_path: Path) -> None:
    assert called(tmp_path, "--target", "torch-cuda", "--batch", "2", seconds=0) == 0
    stages = written(tmp_path)["stages"]
    assert stages and all(stage["reason"].startswith("the time limit came first") for stage in stages.values())
    assert called(tmp_path, "--target", "torch-cuda", "--batch", "2") == 0
    assert all("result" in stage for stage in written(tmp_path)["stages"].values())
    whole, engines = written(tmp_path), simulated.built
    assert called(tmp_path, "--target", "torch-cuda", "--batch", "2") == 0
    assert simulated.built == engines  # all is known
    assert written(tmp_path)["stages"] == whole["stages"]


def test_a_network_is_exported_only_for_what_is_not_known(
    simulated: FakeRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exports: list[object] = []
    export = gpu._export

    def counted(network: gpu_stages.Network) -> Any:
        exports.append(network)
        return export(network)

    monkeypatch.setattr(gpu, "_export", counted)
    which = "resnet torch-cuda batch 2 fp32"
    for _ in range(2):
        assert called(tmp_path, "--target", "torch-cuda", "--batch", "2") == 0
        assert len(exports) == 1
    path = tmp_path / "results" / "gpu-a-fake-device.json"
    for count, kind in enumerate(("dense", "profile", "half", "fidelity"), start=2):
        found = written(tmp_path)
        del found["stages"][f"{kind} {which}"]
        path.write_text(json.dumps(found))
        assert called(tmp_path, "--target", "torch-cuda", "--batch", "2") == 0
        assert len(exports) == count and "result" in written(tmp_path)["stages"][f"{kind} {which}"]


def test_a_call_that_was_cut_off_loses_no_point(
    simulated: FakeRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fidelity = gpu.fidelity

    def long(*arguments: object) -> None:
        raise TimeUp

    monkeypatch.setattr(gpu, "fidelity", long)
    assert called(tmp_path, "--target", "torch-cuda", "--batch", "2") == 0
    which = "resnet torch-cuda batch 2 fp32"
    assert written(tmp_path)["stages"][f"fidelity {which}"]["reason"].startswith("the time limit")
    engines, half = simulated.built, written(tmp_path)["stages"][f"half {which}"]["result"]

    def at_last(*arguments: Any) -> Any:
        assert simulated.built == engines  # all else is in file and tables
        return fidelity(*arguments)

    monkeypatch.setattr(gpu, "fidelity", at_last)
    assert called(tmp_path, "--target", "torch-cuda", "--batch", "2") == 0
    assert "result" in written(tmp_path)["stages"][f"fidelity {which}"]
    assert written(tmp_path)["stages"][f"half {which}"]["result"] == half


@pytest.fixture
def two(simulated: FakeRunner, monkeypatch: pytest.MonkeyPatch) -> dict[str, FakeRunner]:
    """Two targets, each with a version of its own."""
    runners = {"torch-cuda": simulated, "ort-cuda": FakeRunner(staircase(4))}
    monkeypatch.setattr(gpu, "make_runner", lambda target, threads=1: runners[target])
    profile_on(lambda target, threads=1: runners[target], monkeypatch)
    return runners


def of(found: dict[str, Any], target: str) -> dict[str, Any]:
    return {name: stage for name, stage in found["stages"].items() if target in name.split()}


def test_calls_with_other_targets_keep_what_is_known(two: dict[str, FakeRunner], tmp_path: Path) -> None:
    assert called(tmp_path, "--target", "torch-cuda", "--batch", "2") == 0
    first = written(tmp_path)
    assert called(tmp_path, "--target", "ort-cuda", "--batch", "2") == 0
    both = written(tmp_path)
    assert both["targets"] == {"torch-cuda": "0", "ort-cuda": "0"}
    assert of(both, "torch-cuda") == of(first, "torch-cuda") and len(of(both, "ort-cuda")) == 6
    assert all("result" in stage for stage in both["stages"].values())
    engines = [runner.built for runner in two.values()]
    assert called(tmp_path, "--target", "ort-cuda", "torch-cuda", "--batch", "2") == 0
    assert [runner.built for runner in two.values()] == engines and written(tmp_path)["stages"] == both["stages"]
    picture = ElementTree.parse(tmp_path / "plots" / "gpu-a-fake-device-staircase.svg").getroot()
    assert len(picture.findall("{*}polyline")) == 2


@pytest.mark.parametrize("named", [pytest.param(["ort-cuda"], marks=pytest.mark.slow), ["torch-cuda", "ort-cuda"]])
def test_figures_of_another_version_go_and_no_others(
    named: list[str], two: dict[str, FakeRunner], tmp_path: Path
) -> None:
    assert called(tmp_path, "--target", *two, "--batch", "2") == 0
    before, tables = written(tmp_path), set((tmp_path / "tables").iterdir())
    two["ort-cuda"].version = "1"
    assert called(tmp_path, "--target", *named, "--batch", "2", seconds=0) == 0
    found = written(tmp_path)
    assert found["targets"] == {"torch-cuda": "0", "ort-cuda": "1"}
    assert of(found, "torch-cuda") == of(before, "torch-cuda")
    assert of(found, "ort-cuda") and all("result" not in stage for stage in of(found, "ort-cuda").values())
    # The table of the other version is neither opened nor lost.
    assert called(tmp_path, "--target", *named, "--batch", "2") == 0
    assert len(set((tmp_path / "tables").iterdir()) - tables) == 1 and tables <= set((tmp_path / "tables").iterdir())
    assert all("result" in stage for stage in written(tmp_path)["stages"].values())


def test_tables_of_other_devices_have_other_names(two: dict[str, FakeRunner], tmp_path: Path) -> None:
    for device in ("a fake device", "a second device"):
        two["torch-cuda"].device = device
        assert called(tmp_path, "--target", "torch-cuda", "--batch", "2") == 0
    names = {path.name for path in (tmp_path / "tables").iterdir()}
    assert len(names) == 2 and all(name.startswith("resnet-torch-cuda-b2-fp32-") for name in names)
    assert all("result" in stage for stage in written(tmp_path, "a-second-device")["stages"].values())


def test_results_of_other_sizes_are_not_overwritten(
    simulated: FakeRunner, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert called(tmp_path, "--target", "torch-cuda", "--batch", "2", seconds=0) == 0
    path, first = tmp_path / "results" / "gpu-a-fake-device.json", written(tmp_path)
    for key in ("device", "precision", "small"):
        other = json.dumps(first | {key: "other"})
        path.write_text(other)
        capsys.readouterr()
        assert called(tmp_path, "--target", "torch-cuda", "--batch", "2") == 1
        assert f"holds results with {key} 'other', not " in capsys.readouterr().err and path.read_text() == other


def test_staircases_can_be_left_out(simulated: FakeRunner, tmp_path: Path) -> None:
    assert called(tmp_path, "--target", "torch-cuda", "--batch", "2", "--skip-staircases") == 0
    kinds = [name.split()[0] for name in written(tmp_path)["stages"]]
    assert kinds == ["export", "dense", "profile", "pieces", "half", "fidelity"] and not (tmp_path / "plots").exists()
    assert called(tmp_path, "--target", "torch-cuda", "--batch", "2") == 0
    assert "staircase torch-cuda batch 2 fp32" in written(tmp_path)["stages"]


def test_no_question_to_the_solver_takes_long(
    simulated: FakeRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[float] = []
    for name in ("decide", "least_ms"):
        solver = getattr(gpu_stages, name)

        def watched(*arguments: Any, solver: Any = solver, time_limit_s: float = 20.0, **options: Any) -> Any:
            limits.append(time_limit_s)
            return solver(*arguments, time_limit_s=time_limit_s, **options)

        monkeypatch.setattr(gpu_stages, name, watched)
    assert called(tmp_path, "--target", "torch-cuda", "--batch", "2", "--skip-staircases") == 0
    assert len(limits) > 1 and set(limits) == {5.0}


def test_the_clock_is_read_before_and_after_a_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = iter([210, 1980])
    monkeypatch.setattr(gpu.nvidia, "sm_clock_mhz", lambda: next(clocks))
    record = Record(tmp_path / "r.json", 60, {"device": "this"})
    record.stage("dense", lambda: [1])
    entry = record.found["stages"]["dense"]
    assert (entry["sm_clock_mhz_before"], entry["sm_clock_mhz_after"]) == (210, 1980)


def test_the_limit_cuts_a_stage_off(tmp_path: Path) -> None:
    with pytest.raises(TimeUp), time_limit(0.05):
        time.sleep(60)
    with pytest.raises(TimeUp), time_limit(0.0):
        raise AssertionError("too late to begin")
    with time_limit(60):
        pass
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    record = Record(tmp_path / "r.json", 0.05, {"device": "this"})
    assert record.stage("long", lambda: time.sleep(60)) is None
    assert not record.failed and "reason" in record.found["stages"]["long"]


def test_the_limit_outlasts_what_swallows_it() -> None:
    """A callback that a runtime calls from inside loses what is raised in it, as often as it is raised there."""
    swallowed = 0
    with pytest.raises(TimeUp), time_limit(0.05):
        for _ in range(4):
            try:
                time.sleep(60)
            except TimeUp:
                swallowed += 1
        time.sleep(60)
    assert swallowed == 4 and gpu.AGAIN_S <= 0.25


@pytest.mark.parametrize("failure", [ZeroDivisionError, SluiceError, TimeUp])
def test_a_stage_that_fails_leaves_no_engine_behind(failure: type[BaseException], tmp_path: Path) -> None:
    class Engine:
        pass

    alive: list[weakref.ref[Engine]] = []

    def work() -> None:
        engine = Engine()
        alive.append(weakref.ref(engine))
        try:
            raise failure("no room")
        except failure as error:
            kept = error  # a cycle: the exception, its frame, this variable
            raise kept from None

    record = Record(tmp_path / "r.json", 60, {"device": "this"})
    gc.disable()
    try:
        record.stage("broken", work)
        assert alive[0]() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"device": "a fake', "cannot read the results in "),
        (b"\xff\xfe", "cannot read the results in "),
        (b"[1]", "holds no results of this benchmark; move it away"),
        (b'{"stages": {"dense": 3}}', "holds no results of this benchmark; move it away"),
        (b'{"stages": {}, "targets": ["x"]}', "holds no results of this benchmark; move it away"),
        (b'{"stages": {}}', "holds results with device None, not 'a fake device'; move it away"),
    ],
)
def test_results_that_cannot_be_read_are_one_sentence(
    content: bytes, reason: str, simulated: FakeRunner, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results" / "gpu-a-fake-device.json"
    path.parent.mkdir()
    path.write_bytes(content)
    assert called(tmp_path, "--target", "torch-cuda", "--batch", "2") == 1
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1 and reason in printed and str(path) in printed
    assert path.read_bytes() == content and not simulated.built


def test_what_is_asked_for_is_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "available_targets", lambda: {"ort-cpu": "", "torch-cuda": "there is no GPU"})
    for arguments, reason in (
        ([], r"error: no target that needs a GPU can run here (torch-cuda: there is no GPU); name one with --target"),
        (["--target", "abacus"], "error: there is no target 'abacus'"),
        (["--target", "ort-cpu", "--network", "vgg"], "error: there is no network 'vgg' here; choose of resnet"),
    ):
        assert called(tmp_path, *arguments) == 1
        assert reason in capsys.readouterr().err
    monkeypatch.setattr(gpu, "find_spec", lambda name: None if name == "scipy" else object())
    assert called(tmp_path, "--target", "ort-cpu") == 1
    assert "the packages scipy are missing here" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_torch_comes_first_of_what_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    here = {"ort-cpu": "", "ort-cuda": "", "torch-cuda": "", "tensorrt": "not installed"}
    monkeypatch.setattr(gpu, "available_targets", lambda: here)
    assert gpu._targets(None) == ["torch-cuda", "ort-cuda"]
    assert gpu._targets(["ort-cpu"]) == ["ort-cpu"]


def test_the_full_sizes_are_those_of_the_networks() -> None:
    counts = {name: sum(p.numel() for p in network.make().parameters()) for name, network in FULL.networks.items()}
    assert counts == {"mobilenet_v2_224": 3_504_872, "resnet50": 25_557_032}
    widths = FULL.layer.widths
    assert max(widths) == 256 and {1, 31, 32, 33, 63, 64, 65}.issubset(widths)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_convolution_of_a_staircase_keeps_its_size(precision: str) -> None:
    model = gpu_stages.to_precision(gpu_stages._conv(SMALL.layer, 15, 2), precision, part=True)
    shapes = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph.output[0].type.tensor_type
    assert [d.dim_value for d in shapes.shape.dim] == [2, 15, SMALL.layer.size, SMALL.layer.size]
    assert shapes.elem_type == (1 if precision == "fp32" else 10)


@given(st.floats(1e-4, 1e5))
def test_ticks_are_few_and_round(most: float) -> None:
    found = ticks(most)
    assert 4 <= len(found) <= 10 and found[0] == 0 and found[-1] <= most * (1 + 1e-9)
    step = found[1]
    while step < 1 - 1e-9:
        step *= 10
    while step >= 10 - 1e-9:
        step /= 10
    assert min(abs(step - k) for k in (1, 2, 5)) < 1e-6


def test_the_plot_puts_points_where_they_belong() -> None:
    picture = ElementTree.fromstring(
        staircase_plot("a < b", {"one": {"x": [(1, 0.5), (100, 1.0)], "y": [(100, 2.0)]}, "two": {"y": [(50, 1.0)]}})
    )
    first, second, *_ = [line.get("points") or "" for line in picture.findall("{*}polyline")]
    ends = [tuple(float(v) for v in point.split(",")) for point in (*first.split(), *second.split())]
    (left, low), (right, middle), (same, top) = ends
    assert left < right == same and low > middle > top
    assert (low - middle) * 2 == pytest.approx(middle - top, abs=0.3)  # half a millisecond, and one
    assert "a < b" in [node.text for node in picture.findall("{*}text")]


@pytest.mark.slow
def test_it_runs_on_this_machine(tmp_path: Path) -> None:
    assert called(tmp_path, "--target", "ort-cpu") == 0
    (path,) = (tmp_path / "results").iterdir()
    stages = json.loads(path.read_text())["stages"]
    assert len(stages) == 2 + 1 + 2 * 4 and all("result" in stage for stage in stages.values())
