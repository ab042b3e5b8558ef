"""The split is stratified, disjoint and fixed; training learns, and refuses what cannot be trained."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sluice.core.errors import SluiceError
from sluice.models.mnist import MEAN, STD, Digits, accuracy, load_digits, random_affine, split_per_class, train

BLACK = -MEAN / STD


@pytest.fixture(scope="module")
def digits() -> Digits:
    return load_digits()


def few(data: Digits, n: int) -> Digits:
    """``n`` training digits of all classes; they are stored class by class."""
    every = len(data.train_x) // n
    return Digits(data.train_x[::every][:n], data.train_y[::every][:n], data.test_x, data.test_y)


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 5, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Dropout(0.1), nn.Linear(320, 10)
    )


def test_digits_are_stratified_normalised_and_disjoint(digits: Digits) -> None:
    assert digits.train_x.shape == (4000, 1, 28, 28)
    assert digits.test_x.shape == (1000, 1, 28, 28)
    assert digits.train_x.dtype == torch.float32
    assert digits.train_y.dtype == torch.int64
    assert digits.train_y.bincount().tolist() == [400] * 10
    assert digits.test_y.bincount().tolist() == [100] * 10
    assert digits.train_x.min() == pytest.approx(BLACK, rel=1e-5)
    assert digits.train_x.max() == pytest.approx((1 - MEAN) / STD, rel=1e-5)
    train_images = {image.numpy().tobytes() for image in digits.train_x}
    assert not train_images & {image.numpy().tobytes() for image in digits.test_x}


def test_digits_are_the_same_every_time_and_the_seed_decides(digits: Digits) -> None:
    again, other = load_digits(), load_digits(seed=1)
    assert torch.equal(again.train_x, digits.train_x)
    assert torch.equal(again.test_y, digits.test_y)
    assert not torch.equal(other.test_x, digits.test_x)


def test_split_keeps_the_proportion_of_unequal_classes() -> None:
    labels = np.array([2] * 15 + [0] * 40 + [7] * 5)
    train_index, test_index = split_per_class(labels, 0.2, seed=3)
    assert sorted([*train_index, *test_index]) == list(range(60))
    assert {int(c): int((labels[test_index] == c).sum()) for c in np.unique(labels)} == {0: 8, 2: 3, 7: 1}


def test_affine_moves_little_and_brings_in_black(digits: Digits) -> None:
    x = digits.train_x[:13]
    moved = random_affine(x, torch.Generator().manual_seed(1))
    again = random_affine(x, torch.Generator().manual_seed(1))
    assert moved.shape == x.shape
    assert torch.equal(moved, again)
    assert not torch.equal(moved, x)
    assert moved.min() >= BLACK - 1e-4
    assert (moved[:, :, 0, 0] - BLACK).abs().max() < 1e-4

    def centre(images: torch.Tensor) -> torch.Tensor:
        ink = (images[:, 0] - BLACK).double()
        where = torch.arange(28.0, dtype=torch.float64)
        mass = ink.sum((1, 2))
        return torch.stack(((ink.sum(2) @ where) / mass, (ink.sum(1) @ where) / mass), 1)

    shift = (centre(moved) - centre(x)).abs()
    # Two pixels, and what turning and scaling do to a centre of mass that is a little off the middle.
    assert 0.5 < shift.max() < 3.5


def test_training_learns(digits: Digits) -> None:
    data = few(digits, 300)
    model = small_net()
    before = accuracy(model, data.test_x, data.test_y)
    trained = train(model, data, epochs=4, lr=1e-2, batch=32, augment=False, progress=False)
    assert trained is model
    assert not model.training
    assert accuracy(model, data.test_x, data.test_y) > max(60.0, before + 20.0)


def test_training_repeats_exactly(digits: Digits) -> None:
    data = few(digits, 70)
    runs = []
    for seed in (5, 5, 6):
        model = small_net()
        torch.manual_seed(0)
        train(model, data, epochs=2, batch=32, seed=seed, progress=False)
        runs.append(model.get_parameter("0.weight").detach())
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_penalty_enters_the_loss_and_after_step_counts(digits: Digits) -> None:
    model = small_net()
    weight = model.get_parameter("0.weight")
    before = float(weight.detach().square().sum())
    steps: list[int] = []
    train(
        model,
        few(digits, 70),
        epochs=2,
        lr=1e-2,
        batch=32,
        penalty=lambda: 100.0 * weight.square().sum(),
        after_step=lambda: steps.append(1),
        progress=False,
    )
    assert len(steps) == 2 * (70 // 32)
    assert float(weight.detach().square().sum()) < 0.9 * before


def test_teacher_is_imitated_and_left_alone(digits: Digits) -> None:
    data = few(digits, 200)
    wrong = Digits(data.train_x, data.train_y.flip(0), data.test_x, data.test_y)
    options: dict[str, Any] = {"epochs": 6, "lr": 1e-2, "batch": 32, "augment": False, "progress": False}
    teacher = train(small_net(), data, **options)
    kept = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    student = train(small_net(), wrong, teacher=teacher, **options)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in teacher.state_dict().items())
    # The labels are wrong, so whatever the student gets right it has from the teacher.
    assert accuracy(student, data.test_x, data.test_y) > 60.0
    assert accuracy(train(small_net(), wrong, **options), data.test_x, data.test_y) < 30.0


def test_a_loss_that_is_not_finite_is_refused(digits: Digits) -> None:
    with pytest.raises(SluiceError, match="nan in epoch 1 of 1"):
        train(small_net(), few(digits, 40), 1, batch=20, penalty=lambda: torch.tensor(float("nan")), progress=False)


def test_nothing_to_train_is_refused(digits: Digits) -> None:
    with pytest.raises(SluiceError, match="epochs=0"):
        train(small_net(), few(digits, 40), epochs=0, progress=False)


def test_accuracy_counts_in_percent_and_keeps_the_mode() -> None:
    class Echo(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert not self.training
            return x

    x = torch.eye(5)[[0, 1, 2, 3, 4, 0, 1]]
    model = Echo().train()
    assert accuracy(model, x, torch.tensor([0, 1, 2, 0, 0, 0, 0]), batch=3) == pytest.approx(400 / 7)
    assert model.training
    with pytest.raises(SluiceError, match=r"\(0, 5\)"):
        accuracy(model, x[:0], torch.zeros(0, dtype=torch.int64))
