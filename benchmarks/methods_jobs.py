"""The networks, data and recipes that `benchmarks.methods` compares on.

1. ``ds-cnn``: a spotter of ten synthesised words (`benchmarks.methods_words`), trained here once and kept.
2. ``resnet20-mnist``: the trained network that ships with the package, on 4,000 + 1,000 MNIST digits.
3. ``mobilenet_v2-mnist``: trained here once and kept. Its stem has the stride 2 of the paper, in exchange the stage of
   160 channels has stride 1: 28x28 digits become 14x14, 7x7 and, from the stage of 64 on, 4x4. So an epoch takes a
   quarter of the minute and a half of the small-image form, and no image is smaller than a kernel.
4. ``crepe-tiny``: the published weights, on synthesised tones; label-free (`examples.crepe`).

Everybody trains on batches of `TRAIN_BATCH`, with the losses of the job. The control is the same architecture with all
widths scaled alike, from random weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.methods_words import WIDTH, WordBatches, ds_cnn, make_words
from sluice.core.errors import SluiceError
from sluice.models import mobilenet_v2, resnet20, resnet20_mnist
from sluice.models.mnist import accuracy, load_digits, train
from sluice.models.pretrained import save_checkpoint
from sluice.training.recovery import Recovery
from sluice.training.train import LOSSES, Data, Loss, default_loss, fit

__all__ = ["JOBS", "Job", "Silent"]

BATCH = 8  # of the deployment
TRAIN_BATCH = 32
TRAIN_FRAMES = 4096  # about as many as there are digits
SPOKEN, HELD_OUT = 4096, 2000
DENSE_EPOCHS = {"ds-cnn": 15, "mobilenet_v2-mnist": 30}
DENSE_LR = {"ds-cnn": 3e-3, "mobilenet_v2-mnist": 2e-3}
SIXTEENTHS = tuple(k / 16 for k in range(16, 0, -1))


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """A trained network, with the data and recipe of its compression.

    ``data(seed)`` are re-iterable batches, ``evaluate`` gives percent. ``loss`` is what `sluice.compress` is given,
    ``losses`` are all that others may train with, by name, the first one without a teacher if there is such a one.
    ``price`` is the loss whose gradients rank channels for others. ``thin(share)`` is the untrained control, for every
    share of the widths in ``shares`` (falling). ``plain`` is the network as others are given it.
    """

    name: str
    model: nn.Module
    example: Tensor
    data: Callable[[int], Data]
    loss: Loss
    losses: Mapping[str, Loss]
    price: Loss
    evaluate: Callable[[nn.Module], float]
    thin: Callable[[float], nn.Module]
    shares: tuple[float, ...]
    plain: nn.Module
    batch: int = BATCH


class Silent(nn.Module):
    """A teacher for losses that do not ask one: it costs nothing."""

    def forward(self, *inputs: Tensor) -> None:
        return None


def _labels(outputs: Any, taught: Any, labels: Any) -> Tensor:
    return F.cross_entropy(outputs, labels)


# As in the trial of `sluice.compress`: labels, logits with a tenth of labels, logits.
CLASSIFIER_LOSSES: Mapping[str, Loss] = {
    "labels": _labels, "default loss": default_loss, "logits": LOSSES["logits"],
}  # fmt: skip


def ds_cnn_job(folder: Path) -> Job:
    """Trains the dense network if ``folder`` does not have it yet."""
    name, words = "ds-cnn", make_words(SPOKEN, HELD_OUT)

    def data(seed: int) -> Data:
        return WordBatches(words.train, TRAIN_BATCH, seed)

    def evaluate(made: nn.Module) -> float:
        return accuracy(made, words.test.x, words.test.y)

    def trained() -> nn.Module:
        recovery, epochs = Recovery(DENSE_LR[name]), DENSE_EPOCHS[name]
        return fit(
            ds_cnn(), data(0), epochs=epochs, teacher=Silent(), loss=_labels, recovery=recovery, progress=False
        )  # fmt: skip

    model = _kept(folder / f"{name}.safetensors", ds_cnn, trained, evaluate)
    return Job(
        name=name,
        model=model,
        example=words.test.x[:BATCH],
        data=data,
        loss=default_loss,
        losses=CLASSIFIER_LOSSES,
        price=_labels,
        evaluate=evaluate,
        thin=lambda share: ds_cnn(_scaled(WIDTH, share)),
        shares=SIXTEENTHS,  # depthwise layers of widths that are no multiple of 4 take four times as long
        plain=model,
    )


def resnet20_job(folder: Path) -> Job:
    return _digits_job("resnet20-mnist", resnet20_mnist(), _thin_resnet20, SIXTEENTHS)


def mobilenet_job(folder: Path) -> Job:
    """Trains the dense network if ``folder`` does not have it yet."""
    name, digits = "mobilenet_v2-mnist", load_digits()

    def trained() -> nn.Module:
        return train(_channels_last(_mobilenet(1.0)), digits, DENSE_EPOCHS[name], DENSE_LR[name], 64, 0, progress=False)

    def evaluate(made: nn.Module) -> float:
        return accuracy(made, digits.test_x, digits.test_y)

    model = _kept(folder / f"{name}.safetensors", lambda: _mobilenet(1.0), trained, evaluate)
    # Widths are multiples of 8, so finer steps would give the same networks again.
    return _digits_job(name, _channels_last(model), _mobilenet, tuple(k / 20 for k in range(20, 1, -1)))


def crepe_job(folder: Path) -> Job:
    """CREPE tiny, its batch norms with running statistics that move (the published weights have momentum 0)."""
    try:
        from examples.crepe import __main__ as tracker
        from examples.crepe.model import TINY, Crepe, crepe_tiny
        from examples.crepe.tones import Frames, make_tones, raw_pitch_accuracy
    except ImportError as error:
        raise SluiceError(f"the job crepe-tiny lacks {error.name}; run from the root of the source tree") from error
    momentum = tracker.MOMENTUM
    model = crepe_tiny(momentum)
    training = make_tones(TRAIN_FRAMES, tracker.TRAIN_SEED)
    held_out = make_tones(tracker.TEST_FRAMES, tracker.TEST_SEED)

    class ChannelsFirst(Crepe):
        """The same network, flattened as other pruners expect it: column ``c T + t`` belongs to channel c."""

        def forward(self, x: Tensor) -> Tensor:
            x = x[:, None, :, None]
            for index in range(1, self.depth + 1):
                x = F.pad(x, (0, 0, 254, 254) if index == 1 else (0, 0, 31, 32))
                x = F.relu(self.get_submodule(f"conv{index}")(x))
                x = F.max_pool2d(self.get_submodule(f"conv{index}_BN")(x), (2, 1))
            return torch.sigmoid(self.classifier(x.flatten(1)))

    def channels_first() -> nn.Module:
        plain, columns = ChannelsFirst(TINY, momentum=momentum), model.state_dict()
        weight = columns["classifier.weight"].unflatten(1, (-1, TINY[-1]))
        plain.load_state_dict({**columns, "classifier.weight": weight.transpose(1, 2).flatten(1)})
        return plain.eval()

    def own_verdict(outputs: Tensor, taught: Tensor, labels: Any) -> Tensor:
        """Without labels: cross-entropy with the bin that the dense network takes for the highest."""
        return F.binary_cross_entropy(outputs, F.one_hot(taught.argmax(1), taught.shape[1]).to(outputs))

    return Job(
        name="crepe-tiny",
        model=model,
        example=held_out.frames[: tracker.BATCH],
        data=lambda seed: Frames(training, TRAIN_BATCH, seed),
        loss=tracker.distillation,
        losses={"own loss": tracker.distillation},
        price=own_verdict,
        evaluate=lambda made: raw_pitch_accuracy(made, held_out),
        thin=lambda share: Crepe([_scaled(width, share) for width in TINY], momentum=momentum),
        shares=SIXTEENTHS,
        plain=channels_first(),
        batch=tracker.BATCH,
    )


JOBS: Mapping[str, Callable[[Path], Job]] = {
    "ds-cnn": ds_cnn_job,
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
        losses=CLASSIFIER_LOSSES,
        price=_labels,
        evaluate=lambda made: accuracy(made, digits.test_x, digits.test_y),
        thin=lambda share: _channels_last(thin(share)),
        shares=shares,
        plain=model,
    )


def _kept(
    path: Path, make: Callable[[], nn.Module], trained: Callable[[], nn.Module], evaluate: Callable[[nn.Module], float]
) -> nn.Module:
    """The network of a file, which is trained and written first if there is none."""
    from safetensors.torch import load_file

    if not path.is_file():
        torch.manual_seed(0)
        made = trained()
        save_checkpoint(made, path, {"accuracy": f"{evaluate(made):.2f}"})
    model = make()
    model.load_state_dict(load_file(path))
    return model.eval()


def _thin_resnet20(share: float) -> nn.Module:
    return resnet20(widths=[_scaled(width, share) for width in (16, 32, 64)])


def _mobilenet(width: float) -> nn.Module:
    """MobileNetV2 with the strides of rule 3; as in the paper the last 1x1 convolution keeps its 1,280 channels."""
    return mobilenet_v2(width=width, strides=(2, 1, 1, 2, 2, 1, 1, 1))


def _scaled(width: int, share: float) -> int:
    return max(1, round(width * share))


def _channels_last(model: nn.Module) -> nn.Module:
    """The same network with weights in the layout that trains up to twice as fast on a CPU."""
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
