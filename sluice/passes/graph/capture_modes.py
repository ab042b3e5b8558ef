"""Operators whose behaviour depends on the mode, raised to modules at their own path.

Batch norm becomes `BatchNorm`, whose affine tensors stay graph inputs, so that gates can multiply them; dropouts become
the modules of ``torch.nn``. So ``.train()`` and ``.eval()`` work on a captured graph. What the user keeps in eval mode
while the rest trains stays so: such a norm uses its statistics always, such a dropout drops nothing.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, fx, nn

__all__ = ["DROPOUTS", "BatchNorm", "raise_modes"]

DROPOUTS = {
    "dropout": nn.Dropout,
    "feature_dropout": nn.Dropout2d,
    "alpha_dropout": nn.AlphaDropout,
    "feature_alpha_dropout": nn.FeatureAlphaDropout,
}


class BatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over any number of spatial axes whose scale and shift are arguments of ``forward``.

    ``held``: it uses its running statistics in training as well, and leaves them as they are.
    """

    held = False

    def _check_input_dim(self, input: Tensor) -> None:
        pass

    def forward(self, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        momentum, training = self.momentum, self.training and not self.held
        if training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
        return nn.functional.batch_norm(
            x, self.running_mean, self.running_var, weight, bias, training, momentum or 0.0, self.eps
        )


def raise_modes(gm: fx.GraphModule, source: nn.Module, held: Collection[str] = ()) -> None:
    """Batch norm and dropout calls become modules with state and mode of their own.

    ``held``: the modules of ``source`` that stay in eval mode while it trains.
    """
    taken = set(dict(gm.named_modules())) | {name for name, _ in gm.named_parameters()}
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        kind = node.target._schema.name.removeprefix("aten::").removesuffix("_")
        if kind == "batch_norm" and isinstance(node.args[3], fx.Node):
            x, weight, bias, mean, _, _, momentum, eps, _ = node.args
            path = str(mean.target).rpartition(".")[0]
            if not path:
                continue  # statistics registered on the root: stays functional, in eval mode
            norm = _batch_norm(gm.get_submodule(path), source.get_submodule(path), momentum, eps)
            norm.held = path in held
            gm.set_submodule(path, norm)
            args: tuple[Any, ...] = (x, weight, bias)
        elif kind in DROPOUTS:
            stack = list((node.meta.get("nn_module_stack") or {}).values())
            parent = str(stack[-1][0]) if stack else ""
            if parent in held:
                continue  # the operator, which does nothing in eval mode
            here = parent if parent and parent not in taken else ".".join(p for p in (parent, node.name) if p)
            path = next(name for name in _names(here) if name not in taken)
            taken.add(path)
            _parents(gm, path)
            gm.set_submodule(path, DROPOUTS[kind](node.args[1]))
            args = (node.args[0],)
        else:
            continue
        with gm.graph.inserting_before(node):
            new = gm.graph.call_module(path, args)
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)


def _batch_norm(holder: nn.Module, original: nn.Module, momentum: float, eps: float) -> BatchNorm:
    if isinstance(holder, BatchNorm):
        return holder
    features = int(holder.get_buffer("running_mean").shape[0])
    module = BatchNorm(features, eps=eps, momentum=getattr(original, "momentum", momentum), affine=False)
    del module.running_mean, module.running_var, module.num_batches_tracked
    for name, buffer in holder.named_buffers(recurse=False):
        module.register_buffer(name, buffer, persistent=name not in holder._non_persistent_buffers_set)
    if "num_batches_tracked" not in module._buffers:
        module.num_batches_tracked = None
    for name, parameter in holder.named_parameters(recurse=False):
        module.register_parameter(name, parameter)
    return module


def _parents(gm: nn.Module, path: str) -> None:
    owner = gm
    for part in path.split(".")[:-1]:
        if part not in owner._modules:
            owner.add_module(part, nn.Module())
        owner = owner.get_submodule(part)


def _names(base: str) -> Any:
    yield base
    yield from (f"{base}_{i}" for i in range(1, 10_000))
