"""Operators whose behaviour depends on the mode, raised to modules at their own path.

Batch norm becomes `BatchNorm`, whose affine tensors stay graph inputs, so that gates can multiply them; dropouts become
the modules of ``torch.nn``. The dropout of attention weights is a number among the arguments of an operator, 0 in eval
mode; a module, `AttentionDropout`, gives it, and a call in training mode tells how much it is. So ``.train()`` and
``.eval()`` work on a captured graph. What the user keeps in eval mode while the rest trains stays so: such a norm uses
its statistics always, such a dropout drops nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

__all__ = ["DROPOUTS", "AttentionDropout", "BatchNorm", "raise_attention", "raise_modes"]

DROPOUTS = {
    "dropout": nn.Dropout,
    "feature_dropout": nn.Dropout2d,
    "alpha_dropout": nn.AlphaDropout,
    "feature_alpha_dropout": nn.FeatureAlphaDropout,
}


class AttentionDropout(nn.Module):
    """Gives the share of attention weights that are dropped: ``p`` in training, else none."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self) -> float:
        return self.p if self.training else 0.0


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


def raise_attention(gm: fx.GraphModule, training: nn.Module, args: Any, kwargs: Any) -> None:
    """Give attention its dropout; ``training`` is a copy of the model in training mode, which is used up.

    Where it does not run on the example inputs, or attends more or less often than in eval mode, nothing is dropped.
    """
    nodes = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.scaled_dot_product_attention.default)
    if not nodes:
        return
    try:
        with torch.random.fork_rng(), torch.no_grad(), _shares() as found:
            training(*args, **kwargs)
    except Exception:  # of any kind: it is the user's own code, in a mode that nothing else needs
        return
    taken = set(dict(gm.named_modules()))
    for node, p in zip(nodes, found if len(found) == len(nodes) else (), strict=False):
        if p:
            stack = list((node.meta.get("nn_module_stack") or {}).values())
            here = ".".join(part for part in (str(stack[-1][0]) if stack else "", "attention_dropout") if part)
            path = next(name for name in _names(here) if name not in taken)
            taken.add(path)
            _parents(gm, path)
            gm.set_submodule(path, AttentionDropout(p))
            with gm.graph.inserting_before(node):
                share = gm.graph.call_module(path)
            share.meta = {"val": 0.0}
            node.args = (*node.args[:3], *[*node.args[3:], None][:1], share, *node.args[5:])


@contextmanager
def _shares() -> Iterator[list[float]]:
    """The dropout of every attention that is computed meanwhile, also inside functions of torch."""
    original, found = nn.functional.scaled_dot_product_attention, list[float]()

    def told(*args: Any, **kwargs: Any) -> Tensor:
        found.append(float(kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0)))
        return original(*args, **kwargs)

    nn.functional.scaled_dot_product_attention = told
    try:
        yield found
    finally:
        nn.functional.scaled_dot_product_attention = original


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
