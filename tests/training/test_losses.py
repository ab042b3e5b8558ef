"""Ready losses against their formulas; losses of the user's; what is no loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sluice.core.errors import SluiceError
from sluice.runtime.base.compare import assert_close
from sluice.training.losses import READY, loss_of
from sluice.training.train import default_loss


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def softmax(x: Tensor, axis: int) -> np.ndarray:
    e = np.exp(x.numpy().astype(np.float64))
    return e / e.sum(axis, keepdims=True)


def test_cross_entropy_is_per_pixel() -> None:
    s, t = drawn(3, 4, 5, 2, seed=1), drawn(3, 4, 5, 2, seed=2)
    labels = torch.randint(4, (3, 5, 2), generator=torch.Generator().manual_seed(3))
    p, q = softmax(s, 1), softmax(t, 1)
    own = np.take_along_axis(p, labels.numpy()[:, None], 1)
    assert_close(READY["cross-entropy"](s, t, labels), np.array(-np.log(own).mean()), tol=1e-5)
    assert_close(READY["cross-entropy"](s, t, None), np.array((q * np.log(q / p)).sum(1).mean()), tol=1e-5)


def test_the_others() -> None:
    s, t, y = drawn(6, 3, seed=1), drawn(6, 3, seed=2), (drawn(6, 3, seed=3) > 0).float()
    p = 1 / (1 + np.exp(-s.numpy()))
    for target, labels in ((y.numpy(), y), (1 / (1 + np.exp(-t.numpy())), None)):
        bce = -(target * np.log(p) + (1 - target) * np.log(1 - p)).mean()
        assert_close(READY["bce"](s, t, labels), np.array(bce), tol=1e-5)
    for target, labels in ((y, y), (t, None)):
        assert_close(READY["mse"](s, t, labels), (s - target).square().mean(), tol=1e-5)
        a, b = s.numpy(), np.asarray(target.tolist())
        norms = np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-8)
        assert_close(READY["cosine"](s, t, labels), np.array((1 - (a * b).sum(1) / norms).mean()), tol=1e-5)


@pytest.mark.parametrize("name", ["bce", "mse"])
def test_nothing_is_broadcast(name: str) -> None:
    s = drawn(6, 1, seed=1)
    assert_close(READY[name](s, s, torch.ones(6)), READY[name](s, s, torch.ones(6, 1)), tol=1e-7)
    assert READY[name](s, s, torch.ones(6).long()).ndim == 0  # labels that are integers
    for labels in (torch.ones(5), torch.ones(6, 2), torch.tensor(1.0)):
        with pytest.raises(SluiceError, match=r"the outputs \(6, 1\); give labels of that shape"):
            READY[name](s, s, labels)


def test_what_a_loss_may_be() -> None:
    s, t, y = drawn(4, 5, seed=1), drawn(4, 5, seed=2), torch.tensor([0, 4, 2, 1])
    assert loss_of(None) is default_loss and loss_of("mse") is READY["mse"]

    def three(outputs: Tensor, taught: Tensor, labels: Tensor) -> Tensor:
        return outputs.sum()

    assert loss_of(three) is three
    for two in (nn.CrossEntropyLoss(), nn.functional.cross_entropy, lambda a, b: nn.functional.cross_entropy(a, b)):
        if two is nn.functional.cross_entropy:  # its third argument are the weights of classes: three are handed over
            continue
        assert_close(loss_of(two)(s, t, y), nn.functional.cross_entropy(s, y), tol=1e-6)
    assert_close(loss_of(nn.MSELoss())(s, t, None), nn.functional.mse_loss(s, t), tol=1e-6)


@pytest.mark.parametrize("loss", [7, "mae", nn.MSELoss, lambda x: x, lambda a, b, c, d: a, [default_loss]])
def test_what_is_no_loss(loss: object) -> None:
    with pytest.raises(SluiceError, match="loss") as told:
        loss_of(loss)
    assert "\n" not in str(told.value)
