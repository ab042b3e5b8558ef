"""The networks, data and recipes that `benchmarks.methods` compares on.

1. ``resnet20-mnist``: the trained network that ships with the package, on 4,000 + 1,000 MNIST digits.
2. ``mobilenet_v2-mnist``: trained here once by the same recipe and kept. Its stem has the stride 2 of the paper, in
   exchange the stage of 160 channels has stride 1: 28x28 digits become 14x14, 7x7 and, from the stage of 64 on, 4x4.
   So an epoch takes a quarter of the minute and a half of the small-image form, and no image is smaller than a kernel.
3. ``crepe-tiny``: the published weights, on synthesised tones; label-free (`examples.crepe`).

The control of every job is the same architecture with all widths scaled alike, from random weights. It trains for as
many epochs as the dense network had, by its recipe, and is then fine-tuned as the compressed networks are, with the
dense network as teacher. The training of CREPE is not published in epochs of these tones; its control gets as many as
ResNet-20 had.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sluice.core.errors import SluiceError
from sluice.models import mobilenet_v2, resnet20, resnet20_mnist
from sluice.models.mnist import accuracy, load_digits, train
from sluice.models.pretrained import save_checkpoint
from sluice.training.train import Data, Loss, default_loss, fit

__all__ = ["JOBS", "Job"]

BATCH = 8  # of the deployment
TRAIN_BATCH = 64
TRAIN_FRAMES = 4096  # about as many as there are digits
DENSE_EPOCHS = {"resnet20-mnist": 20, "mobilenet_v2-mnist": 30, "crepe-tiny": 20}
DENSE_LR = 2e-3
SIXTEENTHS = tuple(k / 16 for k in range(16, 0, -1))


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """A trained network, with the data and recipe of its compression.

    ``data(seed)`` are re-iterable batches, ``evaluate`` gives percent. ``thin(share)`` is the untrained control, for
    every share of the widths in ``shares`` (falling). ``scratch(model, seed)`` trains it by the recipe of the dense
    network, for ``dense_epochs``.
    """

    name: str
    model: nn.Module
    example: Tensor
    data: Callable[[int], Data]
    loss: Loss
    evaluate: Callable[[nn.Module], float]
    thin: Callable[[float], nn.Module]
    shares: tuple[float, ...]
    scratch: Callable[[nn.Module, int], nn.Module]
    dense_epochs: int
    batch: int = BATCH


def resnet20_job(folder: Path) -> Job:
    return _digits_job("resnet20-mnist", resnet20_mnist(), _thin_resnet20, SIXTEENTHS)


def mobilenet_job(folder: Path) -> Job:
    """Trains the dense network if ``folder`` does not have it yet."""
    from safetensors.torch import load_file

    name = "mobilenet_v2-mnist"
    path = folder / f"{name}.safetensors"
    if not path.is_file():
        epochs, digits = DENSE_EPOCHS[name], load_digits()
        torch.manual_seed(0)
        made = train(_channels_last(_mobilenet(1.0)), digits, epochs, DENSE_LR, TRAIN_BATCH, 0)
        percent = accuracy(made, digits.test_x, digits.test_y)
        metadata = {"network": "mobilenet_v2", "epochs": str(epochs), "accuracy": f"{percent:.2f}"}
        save_checkpoint(made, path, metadata)
    model = _mobilenet(1.0)
    model.load_state_dict(load_file(path))
    # Widths are multiples of 8, so finer steps would give the same networks again.
    return _digits_job(name, _channels_last(model).eval(), _mobilenet, tuple(k / 20 for k in range(20, 1, -1)))


def crepe_job(folder: Path) -> Job:
    """CREPE tiny, its batch norms with running statistics that move (the published weights have momentum 0)."""
    try:
        from examples.crepe import __main__ as tracker
        from examples.crepe.model import TINY, Crepe, crepe_tiny
        from examples.crepe.tones import Frames, make_tones, raw_pitch_accuracy
    except ImportError as error:
        raise SluiceError(f"the job crepe-tiny lacks {error.name}; run from the root of the source tree") from error
    name, momentum = "crepe-tiny", tracker.MOMENTUM
    model = crepe_tiny(momentum)
    training = make_tones(TRAIN_FRAMES, tracker.TRAIN_SEED)
    held_out = make_tones(tracker.TEST_FRAMES, tracker.TEST_SEED)

    def data(seed: int) -> Data:
        return Frames(training, TRAIN_BATCH, seed)

    def scratch(made: nn.Module, seed: int) -> nn.Module:
        epochs = DENSE_EPOCHS[name]
        return fit(
            made, data(seed), epochs=epochs, teacher=model, loss=tracker.distillation, lr=DENSE_LR, name="control"
        )

    return Job(
        name=name,
        model=model,
        example=held_out.frames[: tracker.BATCH],
        data=data,
        loss=tracker.distillation,
        evaluate=lambda made: raw_pitch_accuracy(made, held_out),
        thin=lambda share: Crepe([_scaled(width, share) for width in TINY], momentum=momentum),
        shares=SIXTEENTHS,
        scratch=scratch,
        dense_epochs=DENSE_EPOCHS[name],
        batch=tracker.BATCH,
    )


JOBS: Mapping[str, Callable[[Path], Job]] = {
    "resnet20-mnist": resnet20_job,
    "crepe-tiny": crepe_job,
    "mobilenet_v2-mnist": mobilenet_job,
}


def _digits_job(name: str, model: nn.Module, thin: Callable[[float], nn.Module], shares: tuple[float, ...]) -> Job:
    from examples.demo import Batches

    digits = load_digits()
    return Job(
        name=name,
        model=model,
        example=digits.test_x[:BATCH],
        data=lambda seed: Batches(digits, TRAIN_BATCH, seed),
        loss=default_loss,
        evaluate=lambda made: accuracy(made, digits.test_x, digits.test_y),
        thin=thin,
        shares=shares,
        scratch=lambda made, seed: train(_channels_last(made), digits, DENSE_EPOCHS[name], DENSE_LR, TRAIN_BATCH, seed),
        dense_epochs=DENSE_EPOCHS[name],
    )


def _thin_resnet20(share: float) -> nn.Module:
    return resnet20(widths=[_scaled(width, share) for width in (16, 32, 64)])


def _mobilenet(width: float) -> nn.Module:
    """MobileNetV2 with the strides of rule 2; as in the paper the last 1x1 convolution keeps its 1,280 channels."""
    return mobilenet_v2(width=width, strides=(2, 1, 1, 2, 2, 1, 1, 1))


def _scaled(width: int, share: float) -> int:
    return max(1, round(width * share))


def _channels_last(model: nn.Module) -> nn.Module:
    """The same network with weights in the layout that trains up to twice as fast on a CPU."""
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
