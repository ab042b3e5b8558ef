"""A trained network that ships with the package: ResNet-20 on the MNIST digits.

The checkpoint is a safetensors file: the state dict, and in its header as text ``accuracy`` (percent on the
test digits), ``epochs``, ``seed``, ``data_seed`` and the ``command`` that made it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from sluice.core.errors import SluiceError, first_line
from sluice.models.resnet import ResNet, resnet20

__all__ = ["CHECKPOINT", "resnet20_mnist", "save_checkpoint"]

CHECKPOINT = Path(__file__).parent / "weights" / "resnet20_mnist.safetensors"


def resnet20_mnist(path: str | Path = CHECKPOINT) -> ResNet:
    """The trained ResNet-20, (N, 1, 28, 28) to (N, 10), in eval mode.

    Raises:
        SluiceError: the checkpoint is missing, damaged or of another network.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    model = resnet20()
    _require(path)
    try:
        model.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as error:
        raise SluiceError(f"cannot read the checkpoint {str(path)!r}: {first_line(error)}; {_REMEDY}") from error
    return model.eval()


def save_checkpoint(model: nn.Module, path: str | Path, metadata: Mapping[str, str]) -> None:
    """Write the state dict and ``metadata`` to ``path``, making its folder."""
    from safetensors.torch import save

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    Path(path).write_bytes(save(tensors, dict(metadata)))


_REMEDY = "make it again with 'python -m sluice.models.train_resnet20'"


def _require(path: str | Path) -> None:
    if not Path(path).is_file():
        raise SluiceError(f"the checkpoint {str(path)!r} does not exist; {_REMEDY}")
