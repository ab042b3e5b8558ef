"""What the user gets wrong is told in one sentence with exit status 1, and no file is lost or half-written."""

from __future__ import annotations

import sqlite3
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sluice
from sluice.cli import main
from sluice.core.deployment import Deployment
from sluice.core.errors import SluiceError
from sluice.core.plan import Plan
from sluice.importance.taylor import fisher_scores
from sluice.passes.cut.export import to_onnx
from sluice.passes.graph.onnx_file import save_onnx
from sluice.pipeline.compress import compress
from sluice.profiler.pieces.partition import partition_graph
from sluice.profiler.profile import fingerprint_here
from sluice.profiler.table import latency_table as table_module
from sluice.profiler.table.latency_table import LatencyTable
from sluice.training.train import fit
from tests import tiny
from tests.tiny import compressed_in, dense_onnx_in, files_of, table_in, words

DEVICE = f"--batch {tiny.BATCH} --quiet"
COMPRESS = f"--shape 3,9,9 {DEVICE} --epochs 1"
Refused = Callable[..., str]


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    with tiny.simulated_device():
        yield


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Refused:
    """Runs a command line that must fail; returns the sentence. Files stay, but those in ``new``: tables may grow."""

    def run(*parts: object, new: tuple[str, ...] = ()) -> str:
        before = files_of(tmp_path)
        assert main(words(*parts)) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1, err
        assert err.startswith("sluice: error: ")
        assert "Traceback" not in err
        kept = {name: text for name, text in before.items() if name not in new}
        assert {name: text for name, text in files_of(tmp_path).items() if name not in new} == kept
        return err.removeprefix("sluice: error: ").strip()

    return run


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("nothing", "'nothing' names no factory; write package.module:factory or sluice:resnet20"),
        ("nosuch.module:make", "there is no module 'nosuch' for 'nosuch.module:make'"),
        ("tests.nosuch:make", "there is no module 'tests.nosuch'"),
        ("tests.tiny:nosuch", "'tests.tiny' has no factory 'nosuch'"),
        ("sluice:alexnet", "has no factory 'alexnet'; it has EXAMPLE_SHAPES, attention_recommender"),
        ("tests.tiny:raises", "'tests.tiny:raises' raised RuntimeError: no checkpoint; "),
        ("tests.tiny:returns_a_number", "'tests.tiny:returns_a_number' returned int; let the factory return"),
        ("tests.tiny:Linear", "'tests.tiny' has no factory 'Linear'"),
        ("nosuch.onnx", "cannot read 'nosuch.onnx': No such file"),
    ],
)
def test_model(model: str, message: str, refused: Refused) -> None:
    assert message in refused("inspect", model, "--shape 3,9,9")


def test_modules_that_cannot_be_imported(refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "half.py").write_text("import nosuchpackage\n")
    (tmp_path / "broken.py").write_text("x = (\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    assert "'half' imports 'nosuchpackage', which is not installed" in refused("inspect half:make --shape 3,9,9")
    assert "'broken' cannot be imported (SyntaxError: " in refused("inspect broken:make --shape 3,9,9")


def test_shapes(refused: Refused) -> None:
    message = refused("inspect tests.tiny:model --shape 2,9,9")
    assert "the model does not run on the example inputs (2, 2, 9, 9)" in message
    assert "--shape 3,32,32" in refused("inspect tests.tiny:model")


def test_torch_model_where_a_factory_is_needed(refused: Refused, tmp_path: Path) -> None:
    table = table_in(tmp_path)
    line = ("plan", dense_onnx_in(tmp_path), "--budget 50% --data tests.tiny:data --table", table, "-o")
    assert "is an ONNX file" in refused(*line, tmp_path / "p.json", new=("t.db",))


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ("1%", "least"),
        ("half", "budget 'half' is not understood; say '50%', '2.4ms'"),
        ("2", "budget '2' is not understood"),
        ("-3ms", "budget '-3ms' is out of range"),
        ("0%", "budget '0%' is out of range"),
        ("120%", "budget '120%' is out of range"),
        ("nan%", "budget 'nan%' is not understood"),
    ],
)
def test_budget(budget: str, message: str, refused: Refused, tmp_path: Path) -> None:
    said = refused(
        "compress --out", tmp_path / "out", f"tests.tiny:model --shape 3,9,9 --data tests.tiny:data {DEVICE}",
        f"--budget={budget} --table", table_in(tmp_path),
    )  # fmt: skip
    assert message in said


def test_malformed_budget_is_said_before_measuring(refused: Refused, tmp_path: Path) -> None:
    for verb in ("plan -o", "compress --out"):
        refused(
            verb, tmp_path / "out", "tests.tiny:model --shape 3,9,9 --data tests.tiny:data --budget half", DEVICE,
            "--table", tmp_path / "new.db",
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", ["plan -o", "compress --gate-epochs 0 --out", "compress --gate-epochs 1 --out"])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("tests.tiny:no_data", "data has no batches"),
        ("tests.tiny:data_once", "can be read only once"),
        ("tests.tiny:data_of_another_shape", "does not run on the first batch of data (4, 2, 9, 9)"),
        ("tests.tiny:returns_a_number", "returned int; let it return batches"),
        ("tests.tiny:raises", "raised RuntimeError"),
    ],
)
def test_data(verb: str, data: str, message: str, refused: Refused, tmp_path: Path) -> None:
    said = refused(
        verb, tmp_path / "out", f"tests.tiny:model --shape 3,9,9 --budget 50% {DEVICE} --data", data,
        "--table", tmp_path / "new.db",
    )  # fmt: skip
    assert message in said
    assert list(tmp_path.iterdir()) == []


def test_iterator_that_ends_while_training() -> None:
    class Once:
        """Says that it can be read again, and cannot."""

        def __init__(self) -> None:
            self.left = iter(tiny.data())

        def __iter__(self) -> Iterator[object]:
            yield from self.left

    with pytest.raises(SluiceError, match="epoch 2 had no batches"):
        fit(tiny.model(), Once(), epochs=2, teacher=tiny.model(), progress=False)


@pytest.mark.parametrize("gates", [0, 1])
def test_loss_that_is_not_finite(gates: int, refused: Refused, tmp_path: Path) -> None:
    folder = compressed_in(tmp_path)
    said = refused(
        f"compress tests.tiny:model {COMPRESS} --gate-epochs {gates} --data tests.tiny:data_with_nan --budget 60%",
        "--table", table_in(tmp_path), "--out", folder, new=("t.db",),
    )  # fmt: skip
    assert "nan" in said
    assert "step 3; lower the learning rate" in said or "sums to nan" in said


def test_fisher_of_nan() -> None:
    gated = sluice.insert_gates(tiny.model(), tiny.inputs())
    state = {name: t.clone() for name, t in gated.state_dict().items()}
    with pytest.raises(SluiceError, match="sums to nan"):
        fisher_scores(gated, tiny.data_with_nan())
    assert all(torch.equal(t, state[name]) for name, t in gated.state_dict().items())


def test_nothing_to_cut(refused: Refused, tmp_path: Path) -> None:
    assert "nothing in this model can be cut" in refused("inspect tests.tiny:uncuttable --shape 3,9,9")
    uncuttable = f"profile tests.tiny:uncuttable --shape 3,9,9 {DEVICE} --table"
    assert "nothing in this model can be cut" in refused(uncuttable, tmp_path / "new.db", "--methods filter")
    # Whether a factor pays is known only when it has been measured.
    assert "nothing in this model can be cut" in refused(uncuttable, tmp_path / "new.db", new=("new.db",))
    said = refused("inspect tests.tiny:model --shape 3,9,9 --exclude conv9")
    assert "exclude pattern 'conv9' matches no layer" in said


def test_foreign_table(refused: Refused, tmp_path: Path) -> None:
    here = fingerprint_here(Deployment(batch=tiny.BATCH))
    other = replace(here, device="Some Other CPU", runtime_version="0.9")
    LatencyTable.create(tmp_path / "t.db", other).close()
    dense = dense_onnx_in(tmp_path)
    said = refused("profile", dense, DEVICE, "--table", tmp_path / "t.db")
    assert "t.db was measured under other conditions: device is 'Some Other CPU', not" in said
    assert "runtime version is '0.9'" in said
    said = refused("profile", dense, "--batch 7 --quiet --table", table_in(tmp_path))
    assert f"batch is {tiny.BATCH}, not 7" in said
    assert "no target 'trt'" in refused("profile", dense, "--target trt", DEVICE, "--table", tmp_path / "new.db")


def test_damaged_tables(refused: Refused, tmp_path: Path) -> None:
    table = table_in(tmp_path)
    whole = table.read_bytes()
    profile = ("profile", dense_onnx_in(tmp_path), DEVICE, "--table", table)
    table.write_bytes(whole[:8192] + bytes(4096) + whole[12288:])
    assert "is damaged" in refused(*profile)
    table.write_bytes(whole[: len(whole) // 2])
    assert "is damaged" in refused(*profile)
    table.write_text("this is my thesis")
    assert "is not a latency table; choose another file, it was left as it is" in refused(*profile)
    connection = sqlite3.connect(tmp_path / "other.db")
    connection.execute("CREATE TABLE mine (x)")
    connection.commit()
    connection.close()
    assert "is not a latency table" in refused(*profile[:-1], tmp_path / "other.db")
    assert "cannot write" in refused(*profile[:-1], tmp_path / "other.db" / "t.db")
    assert "Is a directory; check the path" in refused(*profile[:-1], tmp_path)


def test_damaged_plans(refused: Refused, tmp_path: Path) -> None:
    dense, folder = dense_onnx_in(tmp_path), compressed_in(tmp_path)
    plan, out = folder / "plan.json", tmp_path / "out.onnx"
    text = plan.read_text()
    for damaged, message in (
        (text[: len(text) // 2], "is not a readable sluice plan"),
        ("[]", "is not a readable sluice plan"),
        (text.replace('"version": 2', '"version": 99'), "has version 99"),
        (text.replace('"size": 10', '"size": 9'), "damaged, make it again"),
        (text.replace('"slices"', '"slice"'), "it has the unknown 'slice'"),
        ("\x00\xff", "is not a readable sluice plan"),
    ):
        assert damaged != text
        plan.write_text(damaged)
        assert message in refused("apply", dense, plan, "-o", out)
    assert "No such file" in refused("apply", dense, tmp_path / "nosuch.json", "-o", out)


def test_plan_for_another_model(refused: Refused, tmp_path: Path) -> None:
    folder, out = compressed_in(tmp_path), tmp_path / "out.onnx"
    said = refused("export tests.tiny:other_model --shape 3,9,9 --plan", folder, "-o", out)
    assert "the plan was made for another model: 'conv2.weight' is (11, 10, 3, 3) instead of (13, 10, 3, 3)" in said
    assert "made for another model" in refused("check tests.tiny:other_model", folder)
    other = tmp_path / "other.onnx"
    save_onnx(to_onnx(tiny.other_model(), tiny.inputs()), other)
    assert "made for another model" in refused("apply", other, folder / "plan.json", "-o", out)
    assert "made for another model" in refused("check", other, folder)


def test_onnx_files_that_are_none(refused: Refused, tmp_path: Path) -> None:
    folder, out, file = compressed_in(tmp_path), tmp_path / "out.onnx", tmp_path / "x.onnx"
    for content in (b"", b"\xff" * 50, b"hello"):
        file.write_bytes(content)
        assert "is not an ONNX file" in refused("apply", file, folder / "plan.json", "-o", out)
        refused("bench", file)
    slim = folder / "slim.onnx"
    assert "made for another model" in refused("apply", slim, folder / "plan.json", "-o", out)


def test_weights_of_another_plan(refused: Refused, tmp_path: Path) -> None:
    folder, dense = compressed_in(tmp_path), dense_onnx_in(tmp_path)
    plan = Plan.load(folder / "plan.json")
    changed = next(s for s in plan.slices if s.param == "conv1.weight")
    fewer = tuple(
        replace(s, keep=s.keep[:-1]) if s.size == changed.size and s.keep == changed.keep else s for s in plan.slices
    )
    replace(plan, slices=fewer).save(folder / "plan.json")
    assert "plan.json' is not the file that was saved with the others" in refused("check", dense, folder)
    (folder / "manifest.json").unlink()
    for model in ("tests.tiny:model", dense):
        said = refused("check", model, folder)
        assert "slim.safetensors' does not belong to this plan: 'conv1." in said
    (folder / "slim.safetensors").write_bytes(b"no tensors")
    assert "cannot read the weights" in refused("check tests.tiny:model", folder)
    (folder / "slim.safetensors").unlink()
    assert "cannot read the weights" in refused("check tests.tiny:model", folder)


def test_places_that_cannot_be_written(refused: Refused, tmp_path: Path) -> None:
    dense, folder, table = dense_onnx_in(tmp_path), compressed_in(tmp_path), table_in(tmp_path)
    file = tmp_path / "file"
    file.write_text("mine")
    assert "cannot write" in refused("apply", dense, folder / "plan.json", "-o", file / "x.onnx")
    assert "cannot write" in refused("export tests.tiny:model --shape 3,9,9 -o", file / "x.onnx")
    assert "cannot write" in refused("apply", dense, folder / "plan.json", "-o", tmp_path)
    new = tmp_path / "new.db"
    said = refused(
        f"compress tests.tiny:model {COMPRESS} --gate-epochs 0 --data tests.tiny:data --budget 60% --out", file,
        "--table", new,
    )  # fmt: skip
    assert "cannot write" in said
    assert not new.exists()  # said before anything was measured
    said = refused(
        f"plan tests.tiny:model --shape 3,9,9 {DEVICE} --data tests.tiny:data --budget 60% -o", file / "p.json",
        "--table", table, new=("t.db",),
    )  # fmt: skip
    assert "cannot write" in said


def test_disk_full_while_saving(refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The third of four files does not fit: the earlier result stays whole."""
    folder, table = compressed_in(tmp_path), table_in(tmp_path)

    def full(*_: object) -> None:
        raise SluiceError("cannot write 'slim.onnx': No space left on device; choose another folder or make room")

    monkeypatch.setattr("sluice.artifacts.result.save_onnx", full)
    trained = [f"slim.trained/{name}" for name in ("manifest.json", "plan.json", "slim.safetensors")]
    kept = [f"slim.unfinished/{name}.safetensors" for name in ("fine-tune", "prices", "trial", "verified")]
    said = refused(
        f"compress tests.tiny:model {COMPRESS} --gate-epochs 0 --data tests.tiny:data --budget 80% --out", folder,
        "--table", table, new=("t.db", *trained, *kept),
    )  # fmt: skip
    assert "No space left" in said and "what was trained is kept in" in said
    assert [name for name in files_of(tmp_path) if ".trained" in name] == trained


def test_disk_full_while_profiling(refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was recorded stays, and with room the next run goes on from there to the same result."""
    connect = table_module.connect

    def small(*names: Any) -> sqlite3.Connection:
        connection = connect(*names)
        connection.execute("PRAGMA max_page_count = 7")
        return connection

    table = tmp_path / "new.db"
    profile = ("profile --complete", dense_onnx_in(tmp_path), DEVICE, "--table")
    with monkeypatch.context() as patch:
        patch.setattr(table_module, "connect", small)
        said = refused(*profile, table, new=("new.db",))
    assert "full" in said
    assert "what was recorded before is kept" in said
    expected = fingerprint_here(Deployment(batch=tiny.BATCH))
    with LatencyTable.open(table, expected) as opened:
        kept = len(opened)
    assert main(words(*profile, table)) == main(words(*profile, tmp_path / "whole.db")) == 0
    with LatencyTable.open(table, expected) as opened, LatencyTable.open(tmp_path / "whole.db", expected) as whole:
        assert 0 < kept < len(opened)
        assert opened.keys() == whole.keys()


def test_read_only_table(refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rights do not bind the superuser, so the connection is made read-only."""
    connect = table_module.connect

    def read_only(name: str) -> sqlite3.Connection:
        connection = connect(name)
        connection.execute("PRAGMA query_only = 1")
        return connection

    table = tmp_path / "t.db"
    LatencyTable.create(table, fingerprint_here(Deployment(batch=tiny.BATCH))).close()
    monkeypatch.setattr(table_module, "connect", read_only)
    said = refused("profile", dense_onnx_in(tmp_path), DEVICE, "--table", table)
    assert "readonly" in said
    assert "make the file and its folder writable" in said


def test_failures_of_ours_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("sluice.commands.inspect.model_of", broken)
    with pytest.raises(ZeroDivisionError):
        main(words("inspect tests.tiny:model --shape 3,9,9"))


def test_the_model_is_not_changed(tmp_path: Path) -> None:
    model = tiny.model().train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(SluiceError):
        compress(
            model, tiny.inputs(), budget="60%", data=tiny.data_with_nan(), table=table_in(tmp_path), batch=tiny.BATCH,
            gate_epochs=1, progress=False,
        )  # fmt: skip
    assert model.training
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_a_fixed_batch_is_not_measured_under_another_name() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 6, 3)
            self.fc = nn.Linear(6 * 49, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.conv(x).relu().view(3, 294))

    with pytest.raises(SluiceError, match=r"the model fixes its batch: input .* has 3 rows, not 8"):
        partition_graph(to_onnx(Fixed().eval(), torch.randn(3, 3, 9, 9)), 8)


def test_a_network_that_is_not_float32_is_refused_before_anything_is_measured() -> None:
    with pytest.raises(
        SluiceError,
        match=r"'conv1\.weight' is torch\.float64; call model\.float\(\)",
    ):
        sluice.compress(tiny.model().double(), tiny.inputs().double(), budget="50%", data=tiny.data())


def test_labels_that_the_loss_cannot_take_are_said_at_once() -> None:
    wrong = [(x, y + 100) for x, y in tiny.data()]
    with pytest.raises(SluiceError, match="labels of the first batch of data go from 100 to 104"):
        sluice.compress(tiny.model(), tiny.inputs(), budget="50%", data=wrong)


def test_a_frozen_model_cannot_be_trained() -> None:
    model = tiny.model()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(SluiceError, match="no parameter of the model requires a gradient"):
        sluice.compress(model, tiny.inputs(), budget="50%", data=tiny.data())


def test_a_budget_needs_measured_latencies() -> None:
    gated = sluice.insert_gates(tiny.model(), tiny.inputs())
    with pytest.raises(SluiceError, match=r"a budget needs measured latencies, not .table\.db."):
        sluice.Budget(gated, "table.db", "50%")  # type: ignore[arg-type]


def test_a_plan_whose_inputs_are_empty_shows_nothing(refused: Refused, tmp_path: Path) -> None:
    folder, dense = compressed_in(tmp_path), dense_onnx_in(tmp_path)
    (folder / "manifest.json").unlink()
    plan = Plan.load(folder / "plan.json")
    replace(plan, inputs=tuple(replace(i, shape=(0, *i.shape[1:])) for i in plan.inputs)).save(folder / "plan.json")
    assert "on which all networks agree" in refused("check", dense, folder)
