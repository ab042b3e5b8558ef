"""What the others tried so far in one run, kept after every training, so that a kill costs one of a dozen.

1. A training is known by its setting and by the shapes of its parameters: a network that was cut otherwise is trained.
2. The weights of the best one are kept beside the figures. Both files stay; a finished run does not read them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from benchmarks.methods_climb import Setting
from sluice.core.errors import SluiceError
from sluice.core.files import write_atomically
from sluice.models.pretrained import save_checkpoint

__all__ = ["Tried"]


@dataclass(slots=True, eq=False)
class Tried:
    """Figures of trainings at ``path`` (.json), and the weights of the best beside it (.safetensors)."""

    path: Path
    _figures: dict[str, float] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        if self.path.is_file() and self._weights.is_file():
            self._figures = json.loads(self.path.read_text())

    @property
    def _weights(self) -> Path:
        return self.path.with_suffix(".safetensors")

    def figure(self, setting: Setting, model: nn.Module, train: Callable[[nn.Module], float]) -> float:
        """That of ``model`` trained with the setting; it is trained where that is not known yet."""
        key = _key(setting, model)
        if key not in self._figures:
            found = train(model)
            # Weights first: a kill between the two leaves a training to do again, and no figure without its weights.
            if found > max(self._figures.values(), default=0.0):
                save_checkpoint(model, self._weights, {"training": key})
            self._figures[key] = found
            write_atomically(self.path, (json.dumps(self._figures, indent=1) + "\n").encode())
        return self._figures[key]

    def best(self, setting: Setting, model: nn.Module) -> nn.Module:
        """``model``, as it is before training with the best setting, with the weights that it had afterwards.

        Raises:
            SluiceError: nothing was trained, or what lies there is of another network.
        """
        from safetensors import safe_open
        from safetensors.torch import load_file

        if not self._weights.is_file():
            raise SluiceError(f"no training in {str(self.path)!r} has a finite loss; look at the data")
        with safe_open(self._weights, "pt") as file:
            kept = (file.metadata() or {}).get("training")
        if kept != _key(setting, model):
            raise SluiceError(f"{str(self._weights)!r} are weights of another training; delete them, to run it again")
        model.load_state_dict(load_file(self._weights))
        return model


def _key(setting: Setting, model: nn.Module) -> str:
    shapes = [tuple(p.shape) for p in model.parameters()]
    return json.dumps([setting.variant, setting.rate, setting.loss, shapes])
