"""The MNIST recipe that the demo and the benchmarks share: data, dense network, the two training stages.

``python -m examples.mnist`` prints what the dense network scores; the stages are

1. train with gates, the expected latency as a penalty beside the task loss, and
2. fine-tune what is left after the cut, with the dense network as teacher.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from sluice.models import resnet20_mnist
from sluice.models.mnist import Digits, accuracy, load_digits, train

__all__ = ["SEED", "dense_network", "digits", "fine_tune", "score", "train_gated"]

SEED = 0


def digits() -> Digits:
    """4,000 digits to train on and 1,000 to test on; the shipped network was trained on the same 4,000."""
    return load_digits(SEED)


def dense_network() -> nn.Module:
    """The trained ResNet-20 to be made faster, (N, 1, 28, 28) to (N, 10)."""
    return resnet20_mnist()


def score(model: nn.Module, data: Digits) -> float:
    """Percent right of the test digits."""
    return accuracy(model, data.test_x, data.test_y)


def train_gated(
    gated: nn.Module,
    data: Digits,
    teacher: nn.Module,
    penalty: Callable[[], torch.Tensor],
    after_step: Callable[[], None] | None = None,
    epochs: int = 4,
    lr: float = 1e-3,
    progress: bool = True,
) -> nn.Module:
    """Stage 1, in place: weights and gates together, ``penalty()`` in every step's loss."""
    return train(
        gated, data, epochs, lr, seed=SEED, teacher=teacher, penalty=penalty, after_step=after_step, progress=progress
    )


def fine_tune(
    slim: nn.Module, data: Digits, teacher: nn.Module, epochs: int = 4, lr: float = 1e-3, progress: bool = True
) -> nn.Module:
    """Stage 2, in place: plain training with the teacher's logits as the target."""
    return train(slim, data, epochs, lr, seed=SEED + 1, teacher=teacher, progress=progress)


if __name__ == "__main__":
    loaded = digits()
    print(f"dense ResNet-20: {score(dense_network(), loaded):.2f}% of {len(loaded.test_x)} test digits")
