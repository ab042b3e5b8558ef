"""What was trained outlives whatever fails after the training, and goes when the result is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sluice
from sluice.artifacts.store_trained import kept, trained_beside
from sluice.core.errors import SluiceError
from tests import tiny
from tests.artifacts.test_store import cut
from tests.tiny import table_in


def test_a_failure_keeps_it_and_success_does_not(tmp_path: Path) -> None:
    slim, plan = cut(tiny.model(), tiny.inputs())
    place = trained_beside(tmp_path / "out")
    with kept(tmp_path / "out", slim, plan):
        assert sorted(p.name for p in place.iterdir()) == ["manifest.json", "plan.json", "slim.safetensors"]
    assert not place.exists()
    told = r"no room; what was trained is kept in '.*out\.trained', for sluice\.load"
    with pytest.raises(SluiceError, match=told), kept(tmp_path / "out", slim, plan):
        raise SluiceError("no room")
    with pytest.raises(ZeroDivisionError) as fault, kept(tmp_path / "out", slim, plan):
        raise ZeroDivisionError
    assert "what was trained is kept in" in fault.value.__notes__[0]
    loaded = sluice.load(tiny.model, place)
    assert all(torch.equal(t, slim.state_dict()[name]) for name, t in loaded.state_dict().items())


def test_without_an_output_it_is_kept_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    slim, plan = cut(tiny.model(), tiny.inputs())
    with kept(None, slim, plan):
        pass
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("mine")
    for out in (None, tmp_path / "file" / "out"):
        with pytest.raises(SluiceError, match="sluice-trained-") as told, kept(out, slim, plan):
            raise SluiceError("no")
        place = Path(str(told.value).split("'")[1])
        assert place.parent == tmp_path and sluice.load(tiny.model, place) is not None


def test_an_evaluate_that_fails_after_training_loses_nothing(tmp_path: Path) -> None:
    calls: list[nn.Module] = []

    def evaluate(module: nn.Module) -> Any:
        calls.append(module)
        return 1.0 if len(calls) == 1 else "94%"

    with (
        tiny.simulated_device(),
        pytest.raises(SluiceError, match=r"evaluate returned str; .* kept in '.*out\.trained'"),
    ):
        sluice.compress(
            tiny.model(), tiny.inputs(), budget="60%", data=tiny.data(), table=table_in(tmp_path),
            out=tmp_path / "out", batch=tiny.BATCH, methods=("filter",), epochs=1, progress=False, evaluate=evaluate,
        )  # fmt: skip
    assert len(calls) == 2
    assert sluice.load(tiny.model, tmp_path / "out.trained")(tiny.inputs()).shape == (tiny.BATCH, 5)
