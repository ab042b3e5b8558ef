"""Every verb of the command line, in this process, on a network of two convolutions."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from sluice import __version__
from sluice.cli import main, parser
from sluice.cli_model import inputs_of
from sluice.models import EXAMPLE_SHAPES
from sluice.passes.sites import keep_masks
from sluice.plan import Plan
from sluice.report import Report
from sluice.runtime.compare import assert_close
from sluice.runtime.ort import OrtRunner
from sluice.store import load
from tests import tiny
from tests.tiny import compressed_in, dense_onnx_in, files_of, table_in, words

MODEL = "tests.tiny:model"
DEVICE = f"--batch {tiny.BATCH} --quiet"
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    with tiny.simulated_device():
        yield


def run(capsys: pytest.CaptureFixture[str], *parts: object, status: int = 0) -> str:
    assert main(words(*parts)) == status
    out, err = capsys.readouterr()
    assert err == ""
    return out


def outputs(path: Path) -> np.ndarray:
    (found,) = OrtRunner().build(path).run({onnx.load(path).graph.input[0].name: tiny.inputs().numpy()}).values()
    return found


def test_inspect(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = run(capsys, "inspect", MODEL, "--shape 3,9,9")
    assert "conv1: 10 in conv1.weight[0], conv1.bias[0], conv2.weight[1]" in text
    assert "2 groups, 23 channels" in text
    assert "fc: is an output of the model" in text
    found = json.loads(run(capsys, "inspect", MODEL, "--shape 3,9,9 --json --exclude conv1"))
    assert list(found["groups"]) == ["conv2"]
    assert found["groups"]["conv2"]["size"] == 13
    assert found["frozen"]["conv1"] == "excluded by 'conv1'"
    graph = json.loads(run(capsys, "inspect", dense_onnx_in(tmp_path), "--json"))
    assert {name: group["size"] for name, group in graph["groups"].items()} == {"conv1": 10, "conv2": 13}


def test_profile(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    table = tmp_path / "new.db"
    text = run(capsys, "profile", MODEL, "--shape 3,9,9", DEVICE, "--table", table)
    macs = tiny.BATCH * (81 * 10 * 27 + 49 * 13 * 90 + 65)
    assert float(re.findall(r"dense (\S+) ms", text)[0]) == pytest.approx(macs * tiny.MAC_MS, rel=0.02)
    assert re.search(r"least reachable \S+ ms", text)
    assert "rank correlation" in text
    again = json.loads(run(capsys, "profile", dense_onnx_in(tmp_path), DEVICE, "--json --table", table))
    assert again["levels"]["conv1"][-1] == 10
    assert again["least_ms"] < again["dense_ms"]


def test_compress_and_check(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    table, out = table_in(tmp_path), tmp_path / "new" / "60"
    text = run(
        capsys, "compress", MODEL, "--shape 3,9,9 --budget 60% --data tests.tiny:data --gate-epochs 1 --epochs 1",
        DEVICE, "--table", table, "--out", out,
    )  # fmt: skip
    assert "met as measured" in text
    assert sorted(files_of(out)) == ["plan.json", "report.json", "slim.onnx", "slim.safetensors"]
    report = Report.from_json((out / "report.json").read_text())
    assert report.met()
    assert report.measured_ms is not None
    assert report.measured_ms <= 0.6 * report.dense_ms
    slim = load(tiny.model(), out)
    assert_close(torch.from_numpy(outputs(out / "slim.onnx")), slim(tiny.inputs()))

    text = run(capsys, "check", MODEL, out)
    assert text.count(" and ") == 3
    found = json.loads(run(capsys, "check", MODEL, out, "--json"))
    assert 0 <= found["worst"] <= found["tolerance"] == 1e-5


def test_compress_as_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = run(
        capsys, "compress", MODEL, "--shape 3,9,9 --budget 60% --data tests.tiny:data --gate-epochs 0 --epochs 0",
        DEVICE, "--json --table", table_in(tmp_path), "--out", tmp_path / "slim",
    )  # fmt: skip
    assert Report.from_json(text) == Report.from_json((tmp_path / "slim/report.json").read_text())


def test_check_without_the_module(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = json.loads(run(capsys, "check", dense_onnx_in(tmp_path), compressed_in(tmp_path), "--json"))
    assert list(found["errors"]) == ["slim.onnx and plan on dense ONNX"]


def test_check_fails_for_a_changed_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = compressed_in(tmp_path)
    model = onnx.load(folder / "slim.onnx")
    (weight,) = [init for init in model.graph.initializer if init.name == "conv2.weight"]
    values = onnx.numpy_helper.to_array(weight).copy()
    values[0, 0] += 0.01
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(model, folder / "slim.onnx")
    text = run(capsys, "check", MODEL, folder, "--json", status=1)
    assert json.loads(text)["worst"] > 1e-4
    run(capsys, "check", MODEL, folder, "--tolerance 1", status=0)


def test_plan_apply_export_bench(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    table, budget = table_in(tmp_path), "--data tests.tiny:data --budget"
    args = ("plan", MODEL, "--shape 3,9,9", DEVICE, "--table", table, budget)
    run(capsys, *args, "50% -o", tmp_path / "a.json")
    found = json.loads(run(capsys, *args, "70% --json -o", tmp_path / "b.json"))
    assert 0 < found["retained"] < 1
    assert found["promised_ms"] <= found["budget_ms"] == pytest.approx(0.7 * found["dense_ms"])
    narrow, wide = Plan.load(tmp_path / "a.json"), Plan.load(tmp_path / "b.json")
    assert found["widths"] == dict(wide.widths)
    assert sum(narrow.widths.values()) < sum(wide.widths.values())

    dense, slim = tmp_path / "dense.onnx", tmp_path / "slim.onnx"
    run(capsys, "export", MODEL, "--shape 3,9,9 --names -o", dense)
    run(capsys, "apply", dense, tmp_path / "a.json", "-o", slim)
    cut = load(tiny.model(), narrow)
    assert_close(outputs(slim), cut(tiny.inputs()).detach())
    text = run(capsys, "bench", dense, slim, f"--batch {tiny.BATCH}")
    assert re.search(r"second/first \d+\.\d%", text)
    assert json.loads(run(capsys, "bench", slim, "--json"))["engines"][0]["ms"] > 0


def test_export_of_both_networks(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = compressed_in(tmp_path)
    run(capsys, "export", MODEL, "--shape 3,9,9 -o", tmp_path / "dense.onnx")
    assert_close(outputs(tmp_path / "dense.onnx"), tiny.model()(tiny.inputs()).detach())
    text = run(capsys, "export", MODEL, "--shape 3,9,9 --json --plan", folder, "-o", tmp_path / "slim.onnx")
    assert json.loads(text)["bytes"] == (tmp_path / "slim.onnx").stat().st_size
    assert_close(outputs(tmp_path / "slim.onnx"), outputs(folder / "slim.onnx"))


def test_apply_needs_no_torch(tmp_path: Path) -> None:
    dense, folder, slim = dense_onnx_in(tmp_path), compressed_in(tmp_path), tmp_path / "cut.onnx"
    code = (
        "import sys; from sluice.cli import main; "
        f"status = main(['apply', {str(dense)!r}, {str(folder / 'plan.json')!r}, '-o', {str(slim)!r}]); "
        "print(status, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "0 False"
    assert outputs(slim).shape == (tiny.BATCH, 5)


def test_python_m_sluice() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sluice", "--version"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == f"sluice {__version__}"


@pytest.mark.parametrize(
    "line",
    ["", "nothing", "inspect", "profile x", "inspect x --shape 3,0", "inspect x --shape a", "bench --batch -1 x"],
)
def test_wrong_usage_exits_with_2(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(line.split())
    assert caught.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_interrupted(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sluice.cli.model_of", stop)
    assert main(words("inspect", MODEL)) == 130
    assert "interrupted" in capsys.readouterr().err


def test_own_networks_know_their_inputs() -> None:
    for name, shape in EXAMPLE_SHAPES.items():
        assert tuple(inputs_of(f"sluice:{name}", None, 2).shape) == (2, *shape)
    assert tuple(inputs_of("sluice:resnet20", (1, 20, 20), 5).shape) == (5, 1, 20, 20)


def test_every_verb_has_a_description() -> None:
    verbs = next(iter(parser()._subparsers._group_actions)).choices  # type: ignore[union-attr]
    assert list(verbs) == ["inspect", "profile", "compress", "plan", "apply", "export", "check", "bench"]
    assert all(verb.description for verb in verbs.values())


def test_plan_keeps_the_best_channels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The plan's slices are those of its widths, on every axis that a group lies on."""
    from sluice import analyze, capture

    out = tmp_path / "plan.json"
    run(
        capsys, "plan", MODEL, "--shape 3,9,9", DEVICE, "--budget 50% --data tests.tiny:data --table",
        table_in(tmp_path), "-o", out,
    )  # fmt: skip
    plan = Plan.load(out)
    keep = {(s.param, s.axis): s.keep for s in plan.slices}
    analysis = analyze(capture(tiny.model(), tiny.inputs()))
    kept = {
        g.name: keep[(g.refs[0].param, g.refs[0].axis)]
        for g in analysis.groups
        if (g.refs[0].param, g.refs[0].axis) in keep
    }
    for group, mask in zip(analysis.groups, keep_masks(analysis, kept), strict=True):
        assert mask.sum() == plan.widths[group.name]
        for ref in group.refs:
            assert keep.get((ref.param, ref.axis), tuple(range(group.size))) == tuple(np.flatnonzero(mask))
