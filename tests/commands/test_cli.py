"""Every verb of the command line, in this process, on a network of two convolutions."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sluice
from sluice import __version__
from sluice.artifacts.deploy import deploy_onnx
from sluice.artifacts.report import Report
from sluice.artifacts.report_text import first_line
from sluice.artifacts.store import load, read_tensors, save_weights
from sluice.cli import main, parser
from sluice.commands import options as options
from sluice.commands.specs import check_batch, evaluate_of, fixed_rows, inputs_of
from sluice.core.errors import SluiceError
from sluice.core.plan import Edits, Factorize, Merge, Plan
from sluice.models import EXAMPLE_SHAPES, enliven
from sluice.passes.cut.export import to_onnx
from sluice.passes.cut.resolve import make_plan
from sluice.passes.cut.rewrite_torch import merge_runs, rewrite_torch
from sluice.passes.graph.aten import analyze
from sluice.passes.graph.blocks import find_blocks
from sluice.passes.graph.capture import capture, input_specs
from sluice.passes.graph.groups import keep_masks
from sluice.passes.graph.onnx_file import finalize, save_onnx
from sluice.passes.graph.static_shapes import static_graph
from sluice.passes.graph.view_torch import view_torch
from sluice.runtime.base.compare import assert_close
from sluice.runtime.ort.cpu import OrtRunner
from sluice.solver.options import METHODS
from tests import tiny
from tests.device import profile_on
from tests.tiny import compressed_in, dense_onnx_in, files_of, table_in, words

MODEL = "tests.tiny:model"
BRANCHED = "tests.commands.test_cli:branched"
DEVICE = f"--batch {tiny.BATCH} --quiet"
ROOT = Path(__file__).resolve().parents[2]


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class Branched(nn.Module):
    """(N, 3, 9, 9) to (N, 5): two residual blocks, one that no gate closes, an addition that is none, groups."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 9, 3, padding=1), Block(9), Block(9)
        self.soft = nn.Conv2d(9, 9, 3, padding=1)
        self.left, self.right = nn.Conv2d(9, 12, 3), nn.Conv2d(9, 12, 3)
        self.grouped = nn.Conv2d(12, 12, 3, groups=3)
        self.mid, self.fc = nn.Linear(12, 13), nn.Linear(13, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(F.relu(self.stem(x))))
        x = x + torch.sigmoid(self.soft(x))
        x = self.grouped(F.relu(self.left(x) + self.right(x)))
        return self.fc(F.relu(self.mid(F.relu(x).mean((2, 3)))))


def branched() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(6)
        return enliven(Branched(), 6)


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
    assert "filter 2 groups, 23 channels that can be cut, on 99.7% of the parameters" in text
    assert "fc: is an output of the model" in text
    found = json.loads(run(capsys, "inspect", MODEL, "--shape 3,9,9 --json --exclude conv1"))
    assert list(found["groups"]) == ["conv2"]
    assert found["groups"]["conv2"]["size"] == 13
    assert found["frozen"]["conv1"] == "excluded by 'conv1'"
    graph = json.loads(run(capsys, "inspect", dense_onnx_in(tmp_path), "--json"))
    assert {name: group["size"] for name, group in graph["groups"].items()} == {"conv1": 10, "conv2": 13}
    assert graph["parameters"] == found["parameters"] == sum(p.numel() for p in tiny.model().parameters())
    assert graph["macs"] == found["macs"] > 0


def test_inspect_has_a_line_of_a_hundred_columns_per_group(capsys: pytest.CaptureFixture[str]) -> None:
    text, whole = (run(capsys, "inspect", BRANCHED, "--shape 3,9,9", more) for more in ("", "-v"))
    assert text.splitlines()[0] == whole.splitlines()[0]
    (short,) = (line for line in text.splitlines() if line.startswith("  stem: 9 in "))
    (full,) = (line for line in whole.splitlines() if line.startswith("  stem: 9 in "))
    shown, _, more = short.partition(" and ")
    assert len(short) <= 100 < len(full) and full.startswith(shown)
    assert int(more.split()[0]) == full.count("[") - shown.count("[")


def test_inspect_shows_what_can_be_restructured(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = json.loads(run(capsys, "inspect", BRANCHED, "--shape 3,9,9 --json"))
    blocks = {b["name"]: b for b in found["blocks"]}
    assert blocks["a"]["layers"] == ["a.conv1.weight", "a.conv2.weight"]
    assert [b["closes"] for b in blocks.values()] == [True, True, False]
    assert [b["layers"] for b in blocks.values()][2] == ["soft.weight"]
    assert blocks["a"]["reason"] == ""
    assert len(found["additions"]) == 1
    assert found["weights"]["a.conv1.weight"] == {
        "shape": [9, 9, 3, 3],
        "forms": {"kxk-1x1": 9, "1x1-kxk": 9, "kx1-1xk": 27},
    }
    assert found["weights"]["mid.weight"]["forms"] == {"kxk-1x1": 12}
    assert found["dense"] == {
        "grouped.weight": "is the weight of 3 groups",
        "fc.weight": "is a matrix of 5 x 13, which has no rank to choose",
    }
    runs = {(r["layers"][0], r["layers"][-1]): r["kernels"] for r in found["runs"]}
    assert runs["b.conv1.weight", "b.conv2.weight"] == ["3x3", "5x5"]
    assert runs["stem.weight", "b.conv2.weight"][-1] == "9x9"  # what would be larger is never offered
    assert found["alone"]["right.weight"].startswith("between ")

    save_onnx(to_onnx(branched(), tiny.inputs()), tmp_path / "dense.onnx")
    graph = json.loads(run(capsys, "inspect", tmp_path / "dense.onnx", "--json"))
    assert {k: graph[k] for k in ("weights", "runs", "dense")} == {k: found[k] for k in ("weights", "runs", "dense")}
    assert [b["layers"] for b in graph["blocks"]] == [b["layers"] for b in found["blocks"]]

    text = run(capsys, "inspect", BRANCHED, "--shape 3,9,9")
    assert "  a: a.conv1.weight, a.conv2.weight\n" in text
    assert "soft.weight; no gate can close it: " in text
    assert "  mid.weight 13x12: kxk-1x1 12\n" in text
    assert "  b.conv1.weight to b.conv2.weight: 3x3, 5x5\n" in text
    assert "  grouped.weight: is the weight of 3 groups\n" in text

    rest = json.loads(run(capsys, "inspect", BRANCHED, "--shape 3,9,9 --json --exclude b.*"))
    assert rest["dense"]["b.conv1.weight"] == rest["alone"]["b.conv1.weight"] == "excluded by 'b.*'"
    assert not [r for r in rest["runs"] if any(name.startswith("b.") for name in r["layers"])]


def test_inspect_leaves_out_what_lies_under_an_excluded_module(capsys: pytest.CaptureFixture[str]) -> None:
    """A pattern means modules around a layer as well, for weights, blocks and runs as for widths."""
    found = json.loads(run(capsys, "inspect", "sluice:resnet20 --json --exclude stages.0"))
    shown = [*found["weights"], *(b["name"] for b in found["blocks"]), *(n for r in found["runs"] for n in r["layers"])]
    shown += [name for group in found["groups"].values() for name, _ in group["axes"]]
    assert [name for name in shown if name.startswith("stages.1")]
    assert not [name for name in shown if name.startswith("stages.0")]
    for key in ("frozen", "dense", "additions", "alone"):
        assert "excluded by 'stages.0'" in found[key].values(), key


def test_methods_are_those_of_the_library() -> None:
    assert tuple(options.METHODS.split(",")) == METHODS


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("profile {model} --methods filter,filtr", r"methods \['filter', 'filtr'\] are not understood; give some of"),
        ("profile {model} --methods ,", r"methods \['', ''\] are not understood"),
        ("plan {model} --budget 50% --data a:b -o p.json --methods ranks", r"methods \['ranks'\] are not understood"),
        ("compress {model} --budget 50% --data tests.tiny:data --out o --methods x", "are not understood"),
    ],
)
def test_bad_methods(
    line: str, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words(line.format(model=MODEL), "--shape 3,9,9 --table t.db", DEVICE)) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert re.match(f"sluice: error: .*{message}", err)
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


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
    assert set(again["levels"]) == {"conv1", "conv2"}
    assert list(again["least_ms_alone"]) == list(METHODS)
    # Together is at least as good as the best alone, to what the solver leaves unproved.
    assert again["least_ms"] <= min(again["least_ms_alone"].values()) * 1.02
    assert again["blocks"] == []
    line = f"profile {MODEL} --shape 3,9,9 {DEVICE} --json --methods filter --table {table}"
    only = json.loads(run(capsys, line))
    assert (only["ranks"], only["merges"], only["least_ms_alone"]) == ({}, [], {})
    assert only["least_ms"] == pytest.approx(again["least_ms_alone"]["filter"], rel=0.05)


def test_a_complete_profile_leaves_nothing_to_measure(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    asked = ("profile", dense_onnx_in(tmp_path), DEVICE, "--json --methods filter --table")
    few = json.loads(run(capsys, *asked, tmp_path / "few.db"))
    whole = json.loads(run(capsys, *asked, tmp_path / "whole.db", "--complete"))
    assert few["points"] < few["complete"] == whole["complete"] <= whole["points"]
    assert whole["error"]["n"] > few["error"]["n"]
    assert whole["least_ms"] == pytest.approx(few["least_ms"], rel=0.01)
    text = run(capsys, "profile", tmp_path / "dense.onnx", DEVICE, "--methods filter --table", tmp_path / "few.db")
    assert f"{few['points']} points measured, a complete table has {few['complete']}; " in text


def test_minutes_of_a_profile(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    asked = ("profile", dense_onnx_in(tmp_path), DEVICE, "--json --methods filter --minutes 5 --table")
    found = json.loads(run(capsys, *asked, tmp_path / "t.db"))
    assert 0 < found["points"] < found["complete"]
    with pytest.raises(SystemExit) as wrong:
        main([*words(*asked), str(tmp_path / "t.db"), "--shard", "1/2"])
    assert wrong.value.code == 2 and "--minutes ends with estimates" in capsys.readouterr().err


def test_the_help_of_profile_tells_of_complete_tables(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as asked:
        main(["profile", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert asked.value.code == 0 and "--complete measure all points now" in text


def test_a_plan_from_another_devices_table_says_what_is_estimated(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table of a device that is away holds the dense network, and nothing is measured here."""
    asked = ("plan", MODEL, "--shape 3,9,9", DEVICE, "--budget 60% --data tests.tiny:data -o")
    asked = (*asked, tmp_path / "p.json", "--table", table_in(tmp_path))
    here = json.loads(run(capsys, *asked, "--json"))
    assert here["estimated"] == 0.0
    table_in(tmp_path, tiny.dense_table_bytes())
    profile_on(_away, monkeypatch)
    found = json.loads(run(capsys, *asked, "--json"))
    assert 0.0 < found["estimated"] <= 1.0 and found["dense_ms"] == pytest.approx(here["dense_ms"])
    text = run(capsys, *asked)
    assert f"{found['estimated']:.1%} of these milliseconds are estimated, as the table lacks points" in text


def _away(target: str, threads: int = 1) -> object:
    raise SluiceError(f"the target {target!r} is not here")


def test_compress_and_check(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    table, out = table_in(tmp_path), tmp_path / "new" / "60"
    text = run(
        capsys, "compress", MODEL, "--shape 3,9,9 --budget 60% --data tests.tiny:data --gate-epochs 1 --epochs 1",
        DEVICE, "--table", table, "--out", out,
    )  # fmt: skip
    assert " met, promised " in text
    assert sorted(files_of(out)) == ["manifest.json", "plan.json", "report.json", "slim.onnx", "slim.safetensors"]
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


@pytest.mark.slow
def test_structure_on_the_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Blocks are what can go: the plan says so, the report says what that saved, and the files belong together."""
    table = tmp_path / "t.db"
    few = f"--exclude stem --exclude left --exclude mid --methods block --table {table}"  # a fast table
    common = f"{BRANCHED} --shape 3,9,9 --data tests.tiny:data {DEVICE} {few}"
    text = run(capsys, "profile", BRANCHED, "--shape 3,9,9", DEVICE, few)
    assert re.search(r"blocks that can be dropped: 3\n  a\n  b\n", text)
    text = run(capsys, "plan", common, "--budget 75% -o", tmp_path / "p.json")
    plan = Plan.load(tmp_path / "p.json")
    assert plan.drops
    assert not plan.slices
    assert [line for line in text.splitlines() if line.startswith("  ")] == [
        f"  block {drop.name}: dropped, {len(drop.params)} tensors" for drop in plan.drops
    ]
    line = ("compress", common, "--budget 75% --gate-epochs 0 --epochs 1 --rehearsal 0 --json --out", tmp_path / "out")
    report = Report.from_json(run(capsys, *line))
    rows = {row.name: row for row in report.methods}
    assert [rows[name].sites for name in ("filter", "rank", "merge")] == [0, 0, 0]
    assert rows["block"].sites == len(report.edits) == len(Plan.load(tmp_path / "out/plan.json").drops) > 0
    assert rows["block"].saved_ms == pytest.approx(report.dense_ms - report.promised_ms, rel=0.05)
    assert json.loads(run(capsys, "check", BRANCHED, tmp_path / "out", "--json"))["worst"] <= 1e-5


def test_compress_as_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = run(
        capsys, "compress", MODEL, "--shape 3,9,9 --budget 60% --data tests.tiny:data --gate-epochs 0 --epochs 0",
        DEVICE, "--json --table", table_in(tmp_path), "--out", tmp_path / "slim",
    )  # fmt: skip
    assert Report.from_json(text) == Report.from_json((tmp_path / "slim/report.json").read_text())


def test_check_without_the_module(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = json.loads(run(capsys, "check", dense_onnx_in(tmp_path), compressed_in(tmp_path), "--json"))
    assert list(found["errors"]) == ["slim.onnx and plan on dense ONNX"]


def restructured_in(folder: Path) -> Path:
    """A folder of `branched` as `sluice.compress` writes it, with a slice, a drop, a merge and two factorizations."""
    gm = capture(branched(), tiny.inputs())
    analysis = analyze(gm)
    blocks, _ = find_blocks(view_torch(gm))
    merge = Merge(("b.conv1.weight", "b.conv2.weight"), (("b.conv1.weight", "b.conv2.weight"),))
    edits = Edits(
        (Factorize("soft.weight", "kx1-1xk", 7), Factorize("mid.weight", "kxk-1x1", 5)),
        tuple(block.drop() for block in blocks if block.name == "a"),
        (merge,),
    )
    plan = make_plan(analysis, {"mid": tuple(range(2, 13)), "stem": tuple(range(1, 9))}, input_specs(gm), edits)
    assert plan.slices
    slim = rewrite_torch(gm, plan, tiny.inputs(), merged=False).train()
    with torch.no_grad():
        slim(3 * tiny.inputs(7))  # other statistics of the norms that are going to be merged
        for param in slim.parameters():
            param.mul_(1.25)  # other weights than the dense network's
    slim = merge_runs(slim.eval(), plan).eval()
    folder.mkdir()
    plan.save(folder / "plan.json")
    save_weights(slim, folder / "slim.safetensors")
    save_onnx(finalize(to_onnx(slim, tiny.inputs())), folder / "slim.onnx")
    return folder


def test_check_of_a_plan_with_every_edit(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = restructured_in(tmp_path / "slim")
    assert json.loads(run(capsys, "check", BRANCHED, folder, "--json"))["worst"] <= 1e-5
    dense = tmp_path / "dense.onnx"
    save_onnx(to_onnx(branched(), tiny.inputs()), dense)
    assert json.loads(run(capsys, "check", dense, folder, "--json"))["worst"] <= 1e-5

    # Weights of other names are refused, not passed over: the dense graph's own would take their place.
    whole = read_tensors(folder / "slim.safetensors")
    for gone in ("soft.weight_u", "b.conv2.bias", "mid.weight_v", "stem.weight"):
        save_file({name: t for name, t in whole.items() if name != gone}, folder / "slim.safetensors")
        for model in (dense, BRANCHED):
            assert main(words("check", model, folder)) == 1
            err = capsys.readouterr().err
            assert "does not belong to this plan: " in err
            assert repr(gone) in err
    # A factor of the wrong values is a number.
    save_file({**whole, "soft.weight_u": -whole["soft.weight_u"]}, folder / "slim.safetensors")
    assert json.loads(run(capsys, "check", dense, folder, "--json", status=1))["worst"] > 1e-4


def test_check_fails_for_a_changed_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = compressed_in(tmp_path)
    model = onnx.load(folder / "slim.onnx")
    (weight,) = [init for init in model.graph.initializer if init.name == "conv2.weight"]
    values = onnx.numpy_helper.to_array(weight).copy()
    values[0, 0] += 0.01
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(model, folder / "slim.onnx")
    assert main(words("check", MODEL, folder)) == 1
    assert "slim.onnx' is not the file that was saved with the others" in capsys.readouterr().err
    (folder / "manifest.json").unlink()
    text = run(capsys, "check", MODEL, folder, "--json", status=1)
    assert json.loads(text)["worst"] > 1e-4
    run(capsys, "check", MODEL, folder, "--tolerance 1", status=0)


def deployed_in(folder: Path, precision: str, source: Path, **options: Any) -> Path:
    """Beside what is in ``folder``, the network of an fp32 file as it is deployed."""
    path = folder / f"slim.{precision}.onnx"
    save_onnx(deploy_onnx(onnx.load(source), precision, tiny.data(), **options), path)
    return path


@pytest.mark.parametrize(
    ("precision", "target"), [("fp16", "ort-cpu"), ("bf16", "ort-cpu"), ("int8", "ort-cpu"), ("int8", "tensorrt")]
)
def test_check_of_the_deployed_file(
    precision: str, target: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder, dense = compressed_in(tmp_path), dense_onnx_in(tmp_path)
    assert json.loads(run(capsys, "check", dense, folder, "--json"))["deployed"] == {}
    file = deployed_in(folder, precision, folder / "slim.onnx", target=target)
    found = json.loads(run(capsys, "check", dense, folder, "--json"))
    (entry,) = found["deployed"].values()
    assert list(found["deployed"]) == [file.name]
    assert found["worst"] <= 1e-5 < entry["error"] < entry["tolerance"] <= entry["by_chance"] / 2 <= 0.5
    text = run(capsys, "check", dense, folder)
    assert f"\n{file.name} and slim.onnx: {entry['error']:.1e}" in text
    assert ("by its weights, " in text) == (precision == "int8")
    assert "the same network" in text

    # The file of another network of the same sizes, and one that is no network.
    other = onnx.load(folder / "slim.onnx")
    for init in other.graph.initializer:
        if len(init.dims) > 1:
            array = onnx.numpy_helper.to_array(init)
            init.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(array[::-1]), init.name))
    save_onnx(other, tmp_path / "other.onnx")
    deployed_in(folder, precision, tmp_path / "other.onnx", target=target)
    text = run(capsys, "check", dense, folder, status=1)
    assert "ANOTHER network" in text
    found = json.loads(run(capsys, "check", dense, folder, "--json --tolerance 1", status=1))
    assert found["worst"] <= 1e-5, "the fp32 files agree"
    assert found["deployed"][file.name]["error"] > entry["tolerance"]
    file.write_bytes(b"")
    assert main(words("check", dense, folder)) == 1
    assert "is not an ONNX file" in capsys.readouterr().err


def test_report_prints_what_compress_saved(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = compressed_in(tmp_path)
    saved = Report.load(folder / "report.json")
    text = run(capsys, "report", folder)
    assert text.replace("\n", " ").startswith(first_line(saved)[:100]) and "\nlayer " in text and "\njoint " not in text
    assert "\npiece " in run(capsys, "report", folder / "report.json", "--full")
    assert Report.from_json(run(capsys, "report", folder, "--json")) == saved
    (tmp_path / "report.json").write_bytes(b"\xff\xfe")
    assert main(words("report", tmp_path)) == main(words("report", tmp_path / "none")) == 1


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
    ["", "nothing", "inspect", "profile x"],
)
def test_wrong_usage_exits_with_2(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(line.split())
    assert caught.value.code == 2
    assert "usage:" in capsys.readouterr().err


DROPS = "compress x --data a:b --table t.db --out o"
COMPRESS = "compress x --budget 50% --data a:b --table t.db --out o"


@pytest.mark.parametrize(
    ("line", "option", "message"),
    [
        *(
            (f"inspect x --shape {shape}", "--shape", f"{shape!r} is no shape; give whole numbers of 1 or more")
            for shape in ("3,x", "3,0", "a", "3,,9", "-1")
        ),
        *(
            (f"{verb} --batch {batch}", "--batch", f"{batch!r} is too small or no whole number; give one of 1 or more")
            for verb in ("bench x", "export x -o y.onnx", "profile x --table t.db")
            for batch in ("0", "-1", "2.5")
        ),
        *(
            (f"{COMPRESS} {option} {steps}", option, f"{steps!r} is too small or no whole number; give one of 0 or")
            for option in ("--epochs", "--gate-epochs")
            for steps in ("-1", "many")
        ),
        *(
            (f"{COMPRESS} --rehearsal {share}", "--rehearsal", f"{share!r} is no share of the epochs; give a number")
            for share in ("-1", "40", "many", "nan")
        ),
        *(
            (f"{DROPS} --max-drop {drop}", "--max-drop", f"{drop!r} is no drop of a figure of merit; give a number of")
            for drop in ("-1", "1%", "nan", "inf")
        ),
        (f"{COMPRESS} --max-drop 1", "--max-drop", "not allowed with argument --budget"),
    ],
)
def test_wrong_numbers_are_told(line: str, option: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(line.split())
    assert caught.value.code == 2
    assert f"error: argument {option}: {message}" in capsys.readouterr().err


def test_zero_steps_are_steps() -> None:
    args = parser().parse_args(f"{COMPRESS} --epochs 0 --gate-epochs 0 --rehearsal 0".split())
    assert (args.epochs, args.gate_epochs, args.rehearsal) == (0, 0, 0) and not args.gates
    assert parser().parse_args(f"{COMPRESS} --gates".split()).gates


def fixed_in(folder: Path, batch: int) -> Path:
    """An ONNX file, in fp32 and with parameter names, of one batch."""
    path = folder / f"fixed{batch}.onnx"
    save_onnx(static_graph(onnx.load(dense_onnx_in(folder)), batch), path)
    return path


def refused(capsys: pytest.CaptureFixture[str], *parts: object) -> str:
    """The sentence of a command that fails and prints nothing else."""
    assert main(words(*parts)) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("sluice: error: ") and err.count("\n") == 1
    return err


def test_files_of_another_batch_are_not_timed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, free = fixed_in(tmp_path, 1), dense_onnx_in(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(OrtRunner, "build", lambda *_, **__: pytest.fail("built"))
        said = refused(capsys, "bench", free, one, "--batch 8")
        assert (
            "fixed1.onnx' fixes its batch: input 'x' has 1 rows, not 8; give --batch 1, or a file that leaves" in said
        )
        said = refused(capsys, "profile", one, "--batch 8 --table", tmp_path / "t.db")
        assert "fixes its batch: input 'x' has 1 rows, not 8" in said
        assert "fixes its batch" in refused(capsys, "profile --pack", one, "--batch 8 -o", tmp_path / "job.zip")
    run(capsys, "bench", free, one, "--batch 1")
    assert sorted(files_of(tmp_path)) == ["dense.onnx", "fixed1.onnx"]


def test_a_file_with_one_free_batch_is_not_fixed(tmp_path: Path) -> None:
    model = onnx.load(dense_onnx_in(tmp_path))
    table = onnx.helper.make_tensor_value_info("table", onnx.TensorProto.FLOAT, [5, 3])
    scalar = onnx.helper.make_tensor_value_info("scalar", onnx.TensorProto.FLOAT, [])
    model.graph.input.extend([table, scalar])
    assert fixed_rows(model) == {}
    check_batch(model, 8, "a.onnx")
    fixed = static_graph(model, 8)
    assert fixed_rows(fixed) == {"x": 8, "table": 5}
    check_batch(fixed, 8, "a.onnx")
    with pytest.raises(SluiceError, match="input 'x' has 8 rows, not 3"):
        check_batch(fixed, 3, "a.onnx")


def test_an_onnx_file_has_its_shape(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    dense = dense_onnx_in(tmp_path)
    for line in (("inspect",), ("profile --table", tmp_path / "t.db"), ("profile --pack -o", tmp_path / "j.zip")):
        said = refused(capsys, *line, dense, "--shape 3,9,9")
        assert "--shape 3,9,9 is for a factory, the ONNX file" in said and "leave it out" in said
    assert sorted(files_of(tmp_path)) == ["dense.onnx"]


def constant_in_half(model: onnx.ModelProto) -> onnx.ModelProto:
    """What nobody reads is left out of a file when it is read, so this one scales the output."""
    (out,) = model.graph.output
    last = next(node for node in model.graph.node if out.name in node.output)
    last.output[:] = ["whole"]
    model.graph.node.extend([
        onnx.helper.make_node("Constant", [], ["half"], value=onnx.numpy_helper.from_array(np.ones(1, np.float16))),
        onnx.helper.make_node("Cast", ["half"], ["scale"], to=onnx.TensorProto.FLOAT),
        onnx.helper.make_node("Mul", ["whole", "scale"], [out.name]),
    ])  # fmt: skip
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: deploy_onnx(m, "fp16"), "tensor 'conv1.weight' is FLOAT16"),
        (lambda m: deploy_onnx(m, "bf16"), "tensor 'conv1.weight' is BFLOAT16"),
        (lambda m: deploy_onnx(m, "int8", tiny.data()), "is QuantizeLinear"),
        (constant_in_half, "constant 'half' is FLOAT16"),
        (lambda m: to_onnx(tiny.model().double(), tiny.inputs().double()), "input 'x' is DOUBLE"),
    ],
    ids=["fp16", "bf16", "int8", "constant", "double"],
)
def test_a_dense_file_is_in_fp32(
    change: Callable[[onnx.ModelProto], onnx.ModelProto],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    file = tmp_path / "other.onnx"
    save_onnx(change(onnx.load(dense_onnx_in(tmp_path))), file)
    for line in (("inspect",), ("profile --table", tmp_path / "t.db"), ("profile --pack -o", tmp_path / "j.zip")):
        said = refused(capsys, *line, file)
        assert "other.onnx' is not in fp32: " in said and message in said and "`sluice export --names` writes" in said
    assert sorted(files_of(tmp_path)) == ["dense.onnx", "other.onnx"]


def test_interrupted(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sluice.commands.inspect.model_of", stop)
    assert main(words("inspect", MODEL)) == 130
    assert "interrupted" in capsys.readouterr().err


def test_a_function_that_evaluates_is_found_and_not_called() -> None:
    assert evaluate_of("tests.tiny:raises") is tiny.raises
    with pytest.raises(SluiceError, match=r"'tests\.tiny' has no factory 'nosuch'"):
        evaluate_of("tests.tiny:nosuch")


def test_what_compress_is_given_arrives(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: dict[str, object] = {}

    def stop(*args: object, **settings: object) -> None:
        given.update(settings)
        raise SluiceError("stopped")

    monkeypatch.setattr(sluice, "compress", stop, raising=False)
    line = f"compress {MODEL} --shape 3,9,9 --budget 50% --data tests.tiny:data --precision int8 --target tensorrt"
    assert main(words(line, "--evaluate tests.tiny:returns_a_number --table t.db --out", tmp_path / "out")) == 1
    assert given["evaluate"] is tiny.returns_a_number
    assert (given["precision"], given["target"], given["table"]) == ("int8", "tensorrt", "t.db")


def wide(model: nn.Module) -> float:
    """Percent of the parameters of the dense network."""
    return 100.0 * sum(p.numel() for p in model.parameters()) / sum(p.numel() for p in tiny.model().parameters())


def test_the_least_latency_of_a_drop(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    line = f"compress {MODEL} --shape 3,9,9 --data tests.tiny:data --table {table_in(tmp_path)} {DEVICE} --epochs 0"
    line += f" --methods filter --out {tmp_path / 'out'}"
    assert "give evaluate= (--evaluate)" in refused(capsys, line, "--max-drop 1.0")
    judged = f"{line} --evaluate tests.commands.test_cli:wide"
    found = json.loads(run(capsys, judged, "--max-drop 45 --json"))["least"]
    assert (found["drop"], found["dense"]) == (45.0, 100.0)
    assert max(row["metric"] for row in found["tried"] if row["full"]) >= 55.0
    text = run(capsys, judged, "--max-drop 0", status=1)
    assert "NO NETWORK FOUND that is at most 0 below the dense 100.0000" in text and (tmp_path / "out").exists()


def test_a_drop_is_for_compress_alone(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    line = f"plan {MODEL} --shape 3,9,9 --data tests.tiny:data --table {table_in(tmp_path)} {DEVICE} -o p.json"
    assert "budget '-1.0' allows a drop of 1, which is for sluice.compress" in refused(capsys, line, "--budget=-1.0")


def test_calibration_is_for_int8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"export {MODEL} --shape 3,9,9 --calibration tests.tiny:data --precision fp16 -o"
    assert main(words(line, tmp_path / "a.onnx")) == 1
    assert "--calibration is for int8, not fp16; leave it out" in capsys.readouterr().err
    assert not (tmp_path / "a.onnx").exists()


def test_own_networks_know_their_inputs() -> None:
    for name, shape in EXAMPLE_SHAPES.items():
        assert tuple(inputs_of(f"sluice:{name}", None, 2).shape) == (2, *shape)
    assert tuple(inputs_of("sluice:resnet20", (1, 20, 20), 5).shape) == (5, 1, 20, 20)


def test_every_verb_has_a_description() -> None:
    verbs = next(iter(parser()._subparsers._group_actions)).choices  # type: ignore[union-attr]
    assert list(verbs) == [
        "inspect",
        "profile",
        "compress",
        "plan",
        "apply",
        "export",
        "check",
        "report",
        "bench",
        "serve",
        "models",
        "table",
    ]
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


def test_what_libraries_print_stays_out_of_the_results() -> None:
    code = "import os; from sluice.core import stdout; stdout.keep_stdout(); os.write(1, b'noise'); print('{}')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("{}\n", "noise")
    closed = f"""exec >&-; "{sys.executable}" -c 'from sluice.core import stdout; stdout.keep_stdout()'"""
    done = subprocess.run(["bash", "-c", closed], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
