"""The state of a training after an epoch, as a stage (`sluice.training.stages`): weights, optimizer, steps done.

An optimizer whose state holds more than tensors and numbers by parameter is not kept, and its training begins anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sluice.training.stages import Stage, Stages

__all__ = ["find_epoch", "keep_epoch"]

WEIGHT, STATE = "weight.", "optimizer."


def keep_epoch(
    stages: Stages, name: str, model: nn.Module, optimizer: torch.optim.Optimizer, *, epochs: int, steps: int
) -> None:
    """Keep the state after so many epochs, and steps in all."""
    if stages.folder is None:
        return
    arrays = {WEIGHT + key: tensor.detach().cpu().numpy() for key, tensor in model.state_dict().items()}
    for index, values in optimizer.state_dict()["state"].items():
        if not isinstance(index, int) or not isinstance(values, Mapping):
            return
        for key, value in values.items():
            if not isinstance(value, (Tensor, int, float)):
                return
            arrays[f"{STATE}{index}.{key}"] = torch.as_tensor(value).detach().cpu().numpy()
    stages.keep(name, Stage(arrays, [epochs, steps]))


def find_epoch(
    stages: Stages, name: str, model: nn.Module, optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LambdaLR,
) -> tuple[int, int]:  # fmt: skip
    """Epochs and steps that are done; model, optimizer and schedule are brought to where they were then."""
    found = stages.find(name)
    if found is None:
        return 0, 0
    epochs, steps = found.words
    model.load_state_dict({k.removeprefix(WEIGHT): _tensor(v) for k, v in found.arrays.items() if k.startswith(WEIGHT)})
    state: dict[int, dict[str, Any]] = {}
    for key, value in found.arrays.items():
        if key.startswith(STATE):
            index, own = key.removeprefix(STATE).split(".", 1)
            state.setdefault(int(index), {})[own] = _tensor(value)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    schedule.last_epoch = steps
    for group, base, factor in zip(optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
        group["lr"] = base * factor(steps)
    return epochs, steps


def _tensor(value: np.ndarray) -> Tensor:
    return torch.from_numpy(value.copy())
