"""The arguments of `sluice.compress` and its like, checked together before anything is measured, as one recipe."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sluice.core.errors import SluiceError, first_line
from sluice.core.version import __version__
from sluice.passes.graph.exclusion_torch import named_by_type
from sluice.pipeline.prepare import check_float32
from sluice.pipeline.recipe import Evaluate, Recipe, recovery_of
from sluice.training.batches import check_data, checked
from sluice.training.losses import loss_of
from sluice.training.recovery import Rate, Recovery
from sluice.training.stages import NOTHING, Stages, unfinished_beside, weights_of
from sluice.training.train import Data

__all__ = ["check_inputs", "check_paths", "numeric", "patterns", "recipe_of", "room_for", "stages_of"]


def recipe_of(
    model: nn.Module, example_inputs: object, data: Data, *, loss: object, lr: Rate, recovery: Recovery | None,
    gate_epochs: int, epochs: int, rehearsal: float, evaluate: Evaluate | None, minutes: float, progress: bool,
    gates: bool = False, progressive: bool = False, rotate: bool = False,
) -> Recipe:  # fmt: skip
    """The recipe; its loss, its batches and its figure of merit tell their faults in one sentence.

    Raises:
        SluiceError: an argument is none that can be used, or the model, the data and the loss do not fit each other.
    """
    check_float32(model)
    check_inputs(example_inputs)
    if isinstance(minutes, bool) or not isinstance(minutes, (int, float)) or not minutes > 0:
        raise SluiceError(f"minutes={minutes!r} is no time; give a number above 0")
    taken = loss_of(loss)
    figure = None if evaluate is None else numeric(evaluate)
    recipe = Recipe(
        data, taken, recovery_of(lr, recovery), gate_epochs, epochs, rehearsal,
        figure, progress,
    )  # fmt: skip
    check_data(model, data, loss=taken)
    return replace(recipe, data=checked(model, data, taken), gates=gates, progressive=progressive,
                   rotate=rotate)  # fmt: skip


def numeric(evaluate: object) -> Evaluate:
    """The figure of merit, checked to be one number whenever it is taken."""
    if isinstance(evaluate, type) or not callable(evaluate):
        raise SluiceError(f"evaluate={evaluate!r} is no function; give one from a module to a number")

    def taken(module: nn.Module) -> float:
        try:
            value: Any = evaluate(module)
        except SluiceError:
            raise
        except Exception as error:
            raise SluiceError(f"evaluate raised {type(error).__name__}: {first_line(error)}; mend it") from error
        single = value.size == 1 if isinstance(value, np.ndarray) else isinstance(value, Tensor) and value.numel() == 1
        if not single and not isinstance(value, (int, float, np.number)):
            raise SluiceError(
                f"evaluate returned {type(value).__name__}; let it return a number, the higher the better"
            )
        return float(value)

    return taken


def check_inputs(example_inputs: object) -> None:
    """Raises `SluiceError` unless there are tensors, and all of their values are numbers."""
    tensors = [leaf for leaf in pytree.tree_leaves(example_inputs) if isinstance(leaf, Tensor)]
    if not tensors:
        raise SluiceError(
            f"example_inputs is {type(example_inputs).__name__} without a tensor; give a tensor, a tuple or a mapping"
        )
    for tensor in tensors:
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise SluiceError(
                f"an example input {tuple(tensor.shape)} holds values that are no finite numbers; give others"
            )


def check_paths(**given: object) -> None:
    """Raises `SluiceError` unless all of them are paths."""
    for name, path in given.items():
        if not isinstance(path, (str, os.PathLike)):
            raise SluiceError(f"{name}={path!r} is no path; give a string or a pathlib.Path")


def patterns(exclude: object, model: nn.Module) -> Sequence[str]:
    """``exclude=`` as a sequence of patterns, types as names; one entry may stand for itself, None for none.

    Raises:
        SluiceError: it holds something else.
    """
    found = () if exclude is None else (exclude,) if isinstance(exclude, (str, type)) else exclude
    if not isinstance(found, (tuple, list, set, frozenset)):
        raise SluiceError(f"exclude={exclude!r} is no list of layers; give names or shell patterns, exclude=['head.*']")
    return tuple(named_by_type(model, found))


def room_for(model: nn.Module) -> int:
    """Bytes that are enough for weights and files of a result."""
    return 3 * sum(t.numel() * t.element_size() for t in model.state_dict().values())


def stages_of(
    model: nn.Module, example_inputs: object, out: str | os.PathLike[str] | None, recipe: Recipe, *more: object
) -> Stages:
    """Where the stages of this command are kept, with what it was asked for; nowhere without an output folder.

    Args:
        more: what else was asked for.
    """
    if out is None:
        return NOTHING
    folder = unfinished_beside(Path(os.path.abspath(out)))

    def say(name: str) -> None:
        if recipe.progress:
            print(f"{name}: as an interrupted run of the same command left it in {str(folder)!r}", file=sys.stderr)

    first = None if recipe.data is None else next(iter(recipe.data), None)
    asked = [
        __version__, weights_of(model), example_inputs, first, recipe.loss, recipe.recovery, recipe.gate_epochs,
        recipe.epochs, recipe.rehearsal, recipe.gates, recipe.progressive, recipe.rotate, *more,
    ]  # fmt: skip
    return Stages(folder, say=say).for_(*asked)
