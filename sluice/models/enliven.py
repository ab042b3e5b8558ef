"""Give a fresh network random values under which every channel is alive.

A channel that is zero after its ReLU hides mistakes: a cut at the wrong place changes nothing. A fresh batch
norm (mean 0, variance 1, scale 1, shift 0) hides them as well, being the same for every channel. So

1. a normalisation gets scale ~ U(0.5, 1.5) and shift ~ U(0.3, 0.7);
2. its running mean becomes ``m + 0.2 sqrt(v) n`` with n ~ N(0, 1), its running variance ``v u`` with
   u ~ U(0.5, 1.5);
3. the bias of a convolution or linear layer becomes ``b sqrt(v) - m`` with b ~ U(0.3, 0.7); any other bias is
   drawn from U(-0.2, 0.2).

With example inputs, m and v are mean and variance, per channel, of the norm's input (2) or of the layer's output
without its bias (3), once all layers before have been set. So every channel is positive somewhere, at any depth.
Without example inputs, m = 0 and v = 1: enough for a few layers, while a deep network drifts off. Weights stay as
they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

__all__ = ["enliven"]

M = TypeVar("M", bound=nn.Module)
_Affine = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
# A channel that is constant over a small batch would otherwise be divided by nearly zero.
_SMALLEST_VARIANCE = 1e-3


def enliven(
    model: M, seed: int, example_inputs: Sequence[torch.Tensor] | Mapping[str, torch.Tensor] | None = None
) -> M:
    """Overwrite norms and biases of ``model`` in place, the same for the same seed; returns it, in eval mode.

    Args:
        example_inputs: positional or keyword arguments of ``model``, a batch of at least two.
    """
    generator = torch.Generator().manual_seed(seed)
    model.eval()
    with torch.no_grad():
        for module in model.modules():
            norm = isinstance(module, (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm))
            for name, parameter in module.named_parameters(recurse=False):
                if norm:
                    low, high = (0.3, 0.7) if name == "bias" else (0.5, 1.5)
                    parameter.copy_(_uniform(parameter, low, high, generator))
                elif "bias" in name:
                    parameter.copy_(_uniform(parameter, -0.2, 0.2, generator))
            if example_inputs is None:
                _set_layer(module, torch.zeros(()), torch.ones(()), generator)
        if example_inputs is not None:
            _set_in_order(model, example_inputs, generator)
    return model


def _set_in_order(
    model: nn.Module, example_inputs: Sequence[torch.Tensor] | Mapping[str, torch.Tensor], generator: torch.Generator
) -> None:
    """One forward pass in which every layer is set from its own input just before it runs."""

    def before_norm(layer: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        _set_layer(layer, *_moments(args[0], channel_axis=1), generator)

    def after_affine(layer: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        assert isinstance(layer, _Affine) and layer.bias is not None
        spatial = 0 if isinstance(layer, nn.Linear) else len(layer.kernel_size)
        shape = (-1,) + (1,) * spatial
        plain = output - layer.bias.view(shape)
        _set_layer(layer, *_moments(plain, channel_axis=-1 - spatial), generator)
        return plain + layer.bias.view(shape)

    handles = []
    for module in model.modules():
        if isinstance(module, _NormBase):
            handles.append(module.register_forward_pre_hook(before_norm))
        elif isinstance(module, _Affine) and module.bias is not None:
            handles.append(module.register_forward_hook(after_affine))
    try:
        if isinstance(example_inputs, Mapping):
            model(**example_inputs)
        else:
            model(*example_inputs)
    finally:
        for handle in handles:
            handle.remove()


def _set_layer(layer: nn.Module, mean: torch.Tensor, var: torch.Tensor, generator: torch.Generator) -> None:
    """Rules 2 and 3; any other layer is left alone."""
    if isinstance(layer, _NormBase) and layer.running_mean is not None and layer.running_var is not None:
        noise = torch.randn(layer.running_mean.shape, generator=generator).to(layer.running_mean)
        layer.running_mean.copy_(mean + 0.2 * var.sqrt() * noise)
        layer.running_var.copy_(var * _uniform(layer.running_var, 0.5, 1.5, generator))
    elif isinstance(layer, _Affine) and layer.bias is not None:
        layer.bias.copy_(_uniform(layer.bias, 0.3, 0.7, generator) * var.sqrt() - mean)


def _moments(x: torch.Tensor, channel_axis: int) -> tuple[torch.Tensor, torch.Tensor]:
    others = [axis for axis in range(x.dim()) if axis != channel_axis % x.dim()]
    return x.mean(others), x.var(others, correction=0).clamp(min=_SMALLEST_VARIANCE)


def _uniform(like: torch.Tensor, low: float, high: float, generator: torch.Generator) -> torch.Tensor:
    # Drawn on the CPU in float32, so that device and precision do not change the values.
    return (torch.rand(like.shape, generator=generator) * (high - low) + low).to(like)
