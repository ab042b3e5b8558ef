"""The fine-tune of a cut network: what is tried, what is obeyed, what the report gets."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import sluice
from sluice.artifacts.report import Report
from sluice.commands import options
from sluice.core.errors import SluiceError
from sluice.core.plan import Plan
from sluice.passes.cut.resolve import make_plan
from sluice.passes.cut.rewrite_torch import rewrite_captured
from sluice.passes.graph.aten import analyze
from sluice.passes.graph.capture import capture, clone
from sluice.pipeline import recover as stage
from sluice.pipeline.compress import compress
from sluice.pipeline.recipe import Recipe
from sluice.pipeline.recover import recover
from sluice.runtime.base.compare import relative_error
from sluice.training.dense_parametrisation import merge_dense, widened
from sluice.training.recovery import RATES, Recovery
from sluice.training.rehearse import HELD, held_out_loss
from sluice.training.train import default_loss, fit
from sluice.training.trial import SHARE
from tests import tiny


@cache
def cut() -> tuple[fx.GraphModule, fx.GraphModule, Plan]:
    """The dense network, the slim one, the plan between."""
    dense = capture(tiny.model().eval(), tiny.inputs())
    analysis, slim = analyze(dense), clone(dense)
    plan = make_plan(analysis, {g.name: range(1, g.size, 2) for g in analysis.groups})
    rewrite_captured(slim, plan)
    return dense, slim, plan


def recovered(
    recovery: Recovery, epochs: int = 1, data: Any = None, foreseen: float | None = None
) -> tuple[fx.GraphModule, Any]:
    dense, slim, plan = cut()
    made = clone(slim)
    recipe = Recipe(tiny.data() if data is None else data, recovery=recovery, epochs=epochs, progress=False)
    return made, recover(made, plan, recipe, dense=dense, teacher=dense, foreseen=foreseen)


def same(one: fx.GraphModule, other: fx.GraphModule) -> bool:
    return all(torch.equal(t, other.state_dict()[n]) for n, t in one.state_dict().items())


def test_a_number_is_obeyed_as_plain_training() -> None:
    dense, slim, _ = cut()
    made, row = recovered(Recovery(0.01, warmup=0.0))
    assert (row.lr, row.loss, row.parametrisation, row.steps, row.trials) == (0.01, "default loss", "plain", 6, ())
    by_hand = fit(clone(slim), tiny.data(), epochs=1, teacher=dense, lr=0.01, progress=False)
    assert same(made, by_hand) and not same(made, slim)  # type: ignore[arg-type]


def test_the_end_is_told_beside_the_forecast() -> None:
    dense, _, _ = cut()
    made, row = recovered(Recovery(0.01), foreseen=0.25)
    assert row.foreseen == 0.25
    assert row.ended == held_out_loss(made, tiny.data()[:HELD], dense, default_loss)
    assert recovered(Recovery(0.01))[1].ended is None


def test_dense_weights_are_merged_into_the_slim_network() -> None:
    dense, slim, plan = cut()
    made, row = recovered(Recovery(0.01, parametrisation="dense"))
    assert row.parametrisation == "dense" and list(made.state_dict()) == list(slim.state_dict())
    wide, merged = widened(slim, dense, plan), clone(slim)
    fit(wide, tiny.data(), epochs=1, teacher=dense, recovery=Recovery(0.01), progress=False)
    merge_dense(wide, merged)
    assert same(made, merged) and not same(made, recovered(Recovery(0.01))[0])


def test_the_trial_decides_and_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sluice.training.trial.WHOLE", 4)  # such short runs tell nothing, but cost little
    _, row = recovered(Recovery(), epochs=120)
    assert row.steps == 720 and 0.1 < row.share() <= SHARE and row.measure == "labels"
    assert row.dense is not None and row.before is not None and row.dense < row.before
    kinds = {(r.loss, r.parametrisation) for r in row.trials}
    assert kinds == {("default loss", "plain"), ("labels", "plain"), ("logits", "plain"), ("default loss", "dense")}
    assert len(row.chosen()) >= 2 and row.fall() is not None


def test_nothing_is_trained_without_epochs() -> None:
    _, slim, _ = cut()
    made, row = recovered(Recovery(compensate=False), epochs=0)
    assert row is None and same(made, slim)


@pytest.fixture
def table(tmp_path: Path) -> Iterator[Path]:
    with tiny.simulated_device():
        yield tiny.table_in(tmp_path)


def test_the_whole_way_says_how_it_was_trained(table: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = dict(
        budget="60%", data=tiny.data(), table=table, batch=tiny.BATCH, rehearsal=10, progress=False,
    )  # fmt: skip
    found = compress(tiny.model(), tiny.inputs(), epochs=50, out=tmp_path / "out", **settings).report
    assert found.recovery is not None and found.recovery.trials and found.recovery.lr in RATES["adamw"]
    assert Report.from_json((tmp_path / "out" / "report.json").read_text()) == found
    rounds = len(found.readings[0][2])
    assert (found.recovery.foreseen is not None) == (found.recovery.ended is not None) == (rounds > 1)
    fixed = compress(tiny.model(), tiny.inputs(), epochs=1, lr=0.02, **settings).report
    assert fixed.recovery is not None and (fixed.recovery.lr, fixed.recovery.trials) == (0.02, ())
    with pytest.raises(SluiceError, match=r"lr=0.02 and recovery= both say how to train"):
        compress(tiny.model(), tiny.inputs(), lr=0.02, recovery=Recovery(), **settings)


def test_the_command_line_says_the_same() -> None:
    from sluice.cli import parser

    line = "compress m:f --table t.db --budget 50% --data m:d --out o"

    def asked(more: str = "") -> Recovery:
        return options.recovery_settings(parser().parse_args(tiny.words(line, more)))

    assert asked() == Recovery() == asked("--lr auto")
    assert asked("--lr 3e-3") == Recovery(0.003)
    assert asked("--optimizer sgd --weight-decay 0 --warmup 0.1") == Recovery(
        optimizer="sgd", weight_decay=0.0, warmup=0.1
    )


@pytest.mark.parametrize("word", ["fast", "0", "-1", "nan", "inf"])
def test_rates_that_are_none(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    from sluice.cli import parser

    with pytest.raises(SystemExit):
        parser().parse_args(tiny.words("compress m:f --table t.db --budget 50% --data m:d --out o", f"--lr={word}"))
    assert f"argument --lr: '{word}' is no learning rate; give a positive number, or auto" in capsys.readouterr().err


def test_the_fine_tune_draws_what_it_would_have_drawn_without_a_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    class Loader:
        def __len__(self) -> int:
            return 50

        def __iter__(self) -> Iterator[Any]:
            return (tiny.data()[int(k) % 6] for k in torch.randperm(50))

    monkeypatch.setattr(stage, "fit", lambda *args, **options: seen.append(torch.get_rng_state()))
    for recovery in (Recovery(), Recovery(0.01)):
        torch.manual_seed(3)
        recovered(recovery, epochs=6, data=Loader())
    assert torch.equal(*seen)
    assert sluice.Recovery is Recovery


def test_a_network_that_is_not_trained_is_refitted() -> None:
    """By default without epochs, and with them where it is asked for; the dense network stays."""
    dense, slim, _ = cut()
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    made, row = recovered(Recovery(), epochs=0)
    assert row.refitted > 0 and not same(made, slim)
    assert [line for line in row.lines()] == [f"{row.refitted} layers refitted by least squares on unlabelled inputs"]
    plain, none = recovered(Recovery(compensate=False), epochs=0)
    assert none is None and same(plain, slim)
    x = tiny.inputs()
    assert relative_error(made(x), dense(x)) < relative_error(slim(x), dense(x))
    both = recovered(Recovery(0.01, compensate=True))[1]
    assert both.refitted == row.refitted and both.steps == 6
    assert recovered(Recovery(0.01))[1].refitted == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())
