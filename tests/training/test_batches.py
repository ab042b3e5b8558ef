"""Outputs, labels and gradient are checked before anything is measured; a later fault names its batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sluice.core.errors import SluiceError
from sluice.training.batches import check_data, checked
from sluice.training.losses import loss_of
from sluice.training.train import default_loss

CLASSES = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
ONE = nn.Linear(6, 1)
PIXELS = nn.Conv2d(3, 4, 1)
X, IMAGES = torch.randn(7, 6, generator=torch.Generator().manual_seed(0)), torch.ones(2, 3, 5, 8)


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"a": self.a(x)}


REFUSED: list[tuple[nn.Module, Any, Any, str]] = [
    (PIXELS, IMAGES, None, r"without labels, nothing says on which axis of the outputs \(2, 4, 5, 8\) the classes lie"),
    (PIXELS, (IMAGES, torch.ones(2, 5, 8).long()), None, r"labels of the first batch of data are \(2, 5, 8\), where"),
    (ONE, X, None, r"the model's outputs \(7, 1\) are no logits of classes"),
    (ONE, (X, torch.ones(7).long()), None, r"outputs \(7, 1\) are no logits"),
    (CLASSES, (X, torch.ones(7)), None, r"labels of the first batch of data are torch\.float32; give class indices"),
    (CLASSES, (X, torch.full((7,), 4)), None, "go from 4 to 4; give those of 0 to 3"),
    (CLASSES, (X, torch.full((7,), -1)), None, "go from -1 to -1"),
    (CLASSES, (X, 3), None, "labels of the first batch of data are int"),
    (TwoHeads(), X, None, "the model returns dict, not logits"),
    (CLASSES, X, lambda o, t, y: (o - t).square(), r"the loss returns shape \(7, 4\) .* no scalar"),
    (CLASSES, X, lambda o, t, y: 3.0, "the loss returns float"),
    (CLASSES, X, lambda o, t, y: o.argmax(1).sum(), r"the loss returns shape \(\) .* no scalar"),
    (CLASSES, X, lambda o, t, y: (o.detach() - t).square().mean(), "no gradient in any parameter"),
    (CLASSES, X, lambda o, t, y: o.mean() * float("nan"), "the loss is nan on the first batch"),
    (CLASSES, X * float("inf"), "mse", "the loss is nan on the first batch"),
    (CLASSES, (X, torch.ones(7)), "mse", r"labels have shape \(7,\), the outputs \(7, 4\)"),
    (CLASSES, X, lambda o, t, y: o.nothing, "the loss cannot be taken on the first batch of data .7, 6.: 'Tensor'"),
]


@pytest.mark.parametrize(("model", "batch", "loss", "message"), REFUSED)
def test_refused_before(model: nn.Module, batch: Any, loss: Any, message: str) -> None:
    with pytest.raises(SluiceError, match=message) as told:
        check_data(model, [batch], loss=loss_of(loss))
    assert "\n" not in str(told.value)


def test_accepted() -> None:
    state = {name: t.clone() for name, t in CLASSES.state_dict().items()}
    labels = torch.tensor([0, 1, 2, 3, -100, 0, 1])
    for model, batch, loss in (
        (CLASSES, X, None), (CLASSES, (X, labels), None), (ONE, X, "mse"), (ONE, (X, torch.ones(7)), "mse"),
        (PIXELS, IMAGES, "cross-entropy"), (PIXELS, (IMAGES, torch.ones(2, 5, 8).long()), "cross-entropy"),
        (TwoHeads(), X, lambda o, t, y: (o["a"] - t["a"]).square().mean()), (PIXELS, IMAGES, "logits"),
    ):  # fmt: skip
        check_data(model, [batch], loss=loss_of(loss))
    assert all(torch.equal(t, state[name]) for name, t in CLASSES.state_dict().items())
    assert all(p.grad is None for p in CLASSES.parameters())


def test_accepts_losses_of_outputs_in_a_range_or_with_a_sum() -> None:
    """The teacher of the check gives what the model could give: probabilities stay such, and differ from its own."""
    taught: list[tuple[Tensor, Tensor]] = []

    def of_probabilities(outputs: Tensor, known: Tensor, labels: Any) -> Tensor:
        taught.append((outputs.detach(), known))
        return F.binary_cross_entropy(outputs, known)

    bins, classes = nn.Sequential(CLASSES, nn.Sigmoid()), nn.Sequential(CLASSES, nn.Softmax(1))
    one = nn.Sequential(ONE, nn.Sigmoid())
    for model, x in ((bins, X), (bins, X[:1]), (classes, X), (one, X)):
        check_data(model, [100 * x], loss=of_probabilities)  # sharp ones, next to 0 and 1
        check_data(model, [x], loss=of_probabilities)
        own, known = taught[-1]
        assert not torch.equal(own, known)
    sums = [known.sum(1) for own, known in taught if own.shape[1] == 4 and torch.allclose(own.sum(1), torch.ones(1))]
    assert sums and all(torch.allclose(total, torch.ones(1)) for total in sums)
    check_data(one, [X[:1]], loss=loss_of("mse"))  # a single output has no neighbour


class Raising:
    def __iter__(self) -> Iterator[Tensor]:
        yield from (X, X)
        raise OSError("disk gone\nreally")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([X, X, X[:, :5]], r"the model does not run on batch 2 of data \(7, 5\)"),
        ([(X, torch.ones(7).long()), (X, torch.full((7,), 9))], "labels of batch 1 of data go from 9 to 9"),
        ([(X, torch.ones(7).long()), (X, torch.full((7,), -9))], "labels of batch 1 of data go from -9 to -9"),
        ([(X, torch.ones(7).long()), (X, torch.ones(7))], r"labels of batch 1 of data are torch\.float32"),
        ([X, "text"], "a batch of data is str"),
        (Raising(), "data raised OSError at batch 2: disk gone; mend the loader"),
    ],
)
def test_later_batches(data: Any, message: str) -> None:
    with pytest.raises(SluiceError, match=message) as told:
        list(checked(CLASSES, data, default_loss))
    assert "\n" not in str(told.value)


def test_sound_batches_pass_as_they_are() -> None:
    data = [X, X[:3], X]
    found = checked(CLASSES, data, default_loss)
    assert len(found) == 3 and all(a is b for a, b in zip(found, data, strict=True))  # type: ignore[arg-type]
    assert not hasattr(checked(CLASSES, Raising(), None), "__len__")
