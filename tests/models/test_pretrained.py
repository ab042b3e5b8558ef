"""The shipped checkpoint loads, says what it is, and scores what it says; a bad file is the user's to mend."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from sluice.core.errors import SluiceError
from sluice.models import pretrained, resnet20, resnet20_mnist
from sluice.models.mnist import accuracy, load_digits
from sluice.models.pretrained import CHECKPOINT, save_checkpoint
from sluice.models.train_resnet20 import main


def header(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


def test_stated_accuracy_is_reproduced() -> None:
    stated = header(CHECKPOINT)
    assert stated["network"] == "resnet20"
    assert stated["command"].startswith("python -m sluice.models.train_resnet20 ")
    assert f"--epochs {stated['epochs']} " in stated["command"]
    data = load_digits(int(stated["data_seed"]))
    model = resnet20_mnist()
    assert not model.training
    # One digit either way: another CPU may round a tie differently.
    assert accuracy(model, data.test_x, data.test_y) == pytest.approx(float(stated["accuracy"]), abs=0.1001)
    assert float(stated["accuracy"]) >= 98.5


def test_checkpoint_round_trip(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = resnet20()
    path = tmp_path / "new" / "net.safetensors"
    save_checkpoint(model, path, {"accuracy": "12.5"})
    assert header(path) == {"accuracy": "12.5"}
    loaded = resnet20_mnist(path).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())


def test_missing_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(SluiceError, match=r"'.*gone\.safetensors' does not exist; make it again"):
        resnet20_mnist(tmp_path / "gone.safetensors")


@pytest.mark.parametrize("keep", [0, 5, 1000, -1])
def test_truncated_checkpoint(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes(CHECKPOINT.read_bytes()[:keep])
    with pytest.raises(SluiceError, match=r"cannot read the checkpoint '.*cut\.safetensors'"):
        resnet20_mnist(path)


def test_checkpoint_of_another_network(tmp_path: Path) -> None:
    path = tmp_path / "narrow.safetensors"
    save_checkpoint(resnet20(widths=(5, 7, 9)), path, {})
    with pytest.raises(SluiceError, match=r"narrow\.safetensors"):
        resnet20_mnist(path)


def test_training_command_writes_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = load_digits()
    few = type(data)(data.train_x[:64], data.train_y[:64], data.test_x[:50], data.test_y[:50])
    monkeypatch.setattr("sluice.models.train_resnet20.load_digits", lambda: few)
    path = tmp_path / "net.safetensors"
    assert main(["--epochs", "1", "--batch", "32", "--seed", "3", "-o", str(path)]) == 0
    stated = header(path)
    assert stated["command"].endswith("--epochs 1 --lr 0.002 --batch 32 --seed 3")
    measured = accuracy(resnet20_mnist(path), few.test_x, few.test_y)
    assert stated["accuracy"] == f"{measured:.2f}"
    assert f"accuracy {measured:.2f}% on 50 test digits" in capsys.readouterr().out


def test_training_command_reports_a_mistake(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--epochs", "0", "-o", str(tmp_path / "no.safetensors")]) == 1
    assert "epochs=0" in capsys.readouterr().err
    assert not (tmp_path / "no.safetensors").exists()
    assert pretrained.CHECKPOINT.is_file()
