"""A slim network on disk: ``plan.json`` + ``slim.safetensors`` + the user's own model factory. No pickle.

Loading makes the dense architecture, applies the plan to it and fills in the weights by name. Every name and shape
must match; an error names those that do not.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from torch import Tensor, fx, nn

from sluice.artifacts.folder import held
from sluice.core.errors import SluiceError
from sluice.core.files import write_atomically
from sluice.core.plan import Plan
from sluice.passes.cut.rewrite_torch import rewrite_torch
from sluice.passes.graph.capture import example_inputs_of
from sluice.passes.graph.names_torch import saved_tensors, with_own_names

__all__ = ["load", "read_tensors", "save_weights"]


def save_weights(module: nn.Module, path: str | os.PathLike[str]) -> None:
    """The state_dict as safetensors, by the names that plan and ONNX file have, whole or not at all."""
    from safetensors.torch import save

    write_atomically(
        path, save({name: t.detach().cpu().contiguous().clone() for name, t in saved_tensors(module).items()})
    )


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Tensors of a safetensors file by name."""
    from safetensors import SafetensorError
    from safetensors.torch import load as load_bytes

    try:
        return dict(load_bytes(Path(path).read_bytes()))
    except (OSError, SafetensorError) as error:
        raise SluiceError(f"cannot read the weights {os.fspath(path)!r}: {error}; give a .safetensors file") from None


def load(
    model: nn.Module | Callable[[], nn.Module],
    plan: str | os.PathLike[str] | Plan,
    weights: str | os.PathLike[str] | None = None,
    example_inputs: object = None,
) -> fx.GraphModule:
    """The slim network, in eval mode.

    Args:
        model: the dense model or its factory (its weights do not matter if ``weights`` are given).
        plan: a plan, the path of one, or the folder that `compress` wrote (then ``weights`` is found there).
        example_inputs: needed only for models whose inputs are not plain tensors.
    Raises:
        SluiceError: plan, weights and model do not belong together, or a file is not the one of its folder's manifest.
    """
    if not isinstance(plan, Plan):
        path = Path(plan)
        if path.is_dir():
            weights = weights if weights is not None else path / "slim.safetensors"
            path = path / "plan.json"
        plan = Plan.load(held(path))
    dense = model if isinstance(model, nn.Module) else model()
    inputs = example_inputs if example_inputs is not None else example_inputs_of(plan)
    slim = rewrite_torch(dense, plan, inputs)  # type: ignore[arg-type]
    if weights is not None:
        tensors = read_tensors(held(weights))
        own = {name: tuple(t.shape) for name, t in slim.state_dict().items()}
        wrong = [n for n in {**own, **tensors} if n not in tensors or own.get(n) != tuple(tensors[n].shape)]
        if wrong:
            found = tuple(tensors[wrong[0]].shape) if wrong[0] in tensors else "missing"
            raise SluiceError(
                f"{os.fspath(weights)!r} does not belong to this plan: {wrong[0]!r} is {found} instead of "
                f"{own.get(wrong[0], 'absent')} ({len(wrong)} differences); give the weights saved beside the plan"
            )
        slim.load_state_dict(tensors)
    return with_own_names(slim).eval()
