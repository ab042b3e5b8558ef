"""Capture: any ``nn.Module`` becomes one ``torch.fx`` form.

1. ``torch.export.export(strict=False)``, not decomposed: about forty ATen operators, every tensor under its
   ``state_dict`` name, pytree inputs and outputs kept, the batch dynamic unless the model refuses.
2. The model is captured in eval mode; operators whose behaviour depends on the mode are raised to modules at their
   own path, so that ``.train()`` and ``.eval()`` work: batch norm (`BatchNorm`, whose affine tensors stay graph
   inputs, so that gates can multiply them) and the dropouts. Other parts that differ between the modes (drop path,
   auxiliary heads) stay as they are in eval mode.
3. All other operators stay functional: shapes follow from the tensors, so cutting is slicing named tensors.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from sluice.core.errors import SluiceError, first_line
from sluice.core.plan import InputSpec, Plan
from sluice.passes.graph.capture_modes import raise_modes

__all__ = [
    "Inputs",
    "capture",
    "clone",
    "example_inputs_of",
    "export_again",
    "free_batch",
    "has_captured_form",
    "input_specs",
    "mark_as_cut",
    "normalize_inputs",
    "set_tensor",
]

Inputs = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]
MARK = "sluice_capture"
_POOLS = {torch.ops.aten.adaptive_avg_pool1d.default: [-1], torch.ops.aten.adaptive_avg_pool2d.default: [-2, -1]}
CUT = "sluice_cut"


def normalize_inputs(example_inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A tensor or tuple is positional, a mapping is keyword arguments."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    return tuple(example_inputs) if isinstance(example_inputs, (tuple, list)) else (example_inputs,), {}


def capture(model: nn.Module, example_inputs: Inputs, *, dynamic_batch: bool = True) -> fx.GraphModule:
    """The model as a trainable ``fx.GraphModule`` with the same ``state_dict`` names.

    Args:
        model: left unchanged (its tensors are copied); a module that this function returned is copied as it is.
        example_inputs: tensor, tuple of positional or mapping of keyword arguments; axis 0 is the batch.
        dynamic_batch: keep axis 0 of every input free; falls back to the example's size where the model refuses.
    Raises:
        SluiceError: the example inputs do not fit the model, or it cannot be exported.
    """
    if isinstance(model, fx.GraphModule) and MARK in model.meta:
        return clone(model)
    args, kwargs = normalize_inputs(example_inputs)
    kwargs = _in_order(model, kwargs)
    source = copy.deepcopy(model).eval()
    exported, dynamic = _export(source, args, kwargs, dynamic_batch)
    gm = exported.module(check_guards=False)
    gm.__dict__.pop("train", None)  # the exporter forbids both; raised modules make them right again
    gm.__dict__.pop("eval", None)
    raise_modes(gm, source)
    _write_means(gm)
    for node in list(gm.graph.nodes):
        guard = node.op == "call_module" and node.target == "_guards_fn"
        if guard or node.target is torch.ops.aten._assert_tensor_metadata.default:
            gm.graph.erase_node(node)
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    _same_names(gm, model)
    gm.meta[MARK] = {"args": args, "kwargs": kwargs, "dynamic": dynamic}
    return gm.train(model.training)


def _write_means(gm: fx.GraphModule) -> None:
    """Pools to one position as means, where their input lies channels last.

    An exporter restores the strides of such a pool with a Gather by computed positions. It computes nothing, and no
    reader could follow it.
    """
    for node in gm.graph.nodes:
        axes = _POOLS.get(node.target)
        if (
            axes is not None
            and all(size == 1 for size in node.args[1])
            and not node.args[0].meta["val"].is_contiguous()
        ):
            node.target, node.args = torch.ops.aten.mean.dim, (node.args[0], axes, True)


def export_again(gm: fx.GraphModule, example_inputs: Inputs) -> torch.export.ExportedProgram:
    """The program of a network in captured form, cut or not; the network is in eval mode.

    A cut network is exported with ``example_inputs``, any other with those that it was captured with.

    Raises:
        SluiceError: the example inputs do not fit a cut network.
    """
    if MARK not in gm.meta:
        args, kwargs = normalize_inputs(example_inputs)
        return _export(gm, args, _in_order(gm, kwargs), dynamic=True)[0]
    args, kwargs, shapes = gm.meta[MARK]["args"], gm.meta[MARK]["kwargs"], None
    if gm.meta[MARK]["dynamic"]:
        args, kwargs, shapes = free_batch(args, kwargs)
    return _program(gm, args, kwargs, dynamic_shapes=shapes)


def has_captured_form(model: nn.Module) -> TypeGuard[fx.GraphModule]:
    """Is this a module of `capture`, perhaps rewritten since (`mark_as_cut`)?"""
    return isinstance(model, fx.GraphModule) and bool({MARK, CUT} & model.meta.keys())


def mark_as_cut(gm: fx.GraphModule) -> None:
    """Mark the network as cut: it keeps its form, but its shapes are outdated. To analyse it, capture it again."""
    gm.meta.pop(MARK, None)
    gm.meta[CUT] = True
    for node in gm.graph.nodes:
        node.meta.pop("val", None)


def clone(gm: fx.GraphModule, *, sharing: bool = False) -> fx.GraphModule:
    """Deep copy that keeps tensors no node reads (``copy.deepcopy`` of a GraphModule drops them).

    ``sharing``: modules and graph are its own, the tensors that nodes read those of ``gm``.
    """
    tensors = [*gm.named_parameters(), *gm.named_buffers()]
    with warnings.catch_warnings():  # copying torch's own tree specifications warns of their next form
        warnings.simplefilter("ignore", FutureWarning)
        result = copy.deepcopy(gm, {id(tensor): tensor for _, tensor in tensors} if sharing else None)
    for name, tensor in tensors:
        try:
            _owner(result, name).__getattr__(name.rpartition(".")[2])
        except AttributeError:
            set_tensor(result, name, tensor.detach().clone(), isinstance(tensor, nn.Parameter))
    saved = set(gm.state_dict())
    for path, module in result.named_modules():  # copying makes saved buffers of lifted constants and of all buffers
        names = {leaf: f"{path}.{leaf}" if path else leaf for leaf in module._buffers}
        module._non_persistent_buffers_set.update(leaf for leaf, name in names.items() if name not in saved)
    return result.train(gm.training)


def set_tensor(module: nn.Module, name: str, value: Tensor, parameter: bool) -> None:
    """Replace (or create) the parameter or buffer ``name``."""
    path, _, leaf = name.rpartition(".")
    owner = module
    for part in path.split(".") if path else []:
        if part not in owner._modules:
            owner.add_module(part, nn.Module())
        owner = owner.get_submodule(part)
    old = getattr(owner, leaf, None)
    if parameter:
        requires_grad = old.requires_grad if isinstance(old, Tensor) else True
        setattr(owner, leaf, nn.Parameter(value, requires_grad=requires_grad))
    elif leaf in owner._buffers:
        owner._buffers[leaf] = value
    else:
        owner.register_buffer(leaf, value)


def _owner(module: nn.Module, name: str) -> nn.Module:
    return module.get_submodule(name.rpartition(".")[0])


def _in_order(model: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keyword inputs in the order of ``forward``: the graph may then be called with positional ones as well."""
    names = list(inspect.signature(model.forward).parameters)
    return {name: kwargs[name] for name in sorted(kwargs, key=lambda n: names.index(n) if n in names else len(names))}


def free_batch(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """Inputs to export with, and the ``dynamic_shapes`` that leave their common first axis free.

    A batch of one would be specialised, so it is doubled; all tensors are copies, since export marks the ones it is
    given as dynamic, for good.
    """
    leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.ndim > 0]
    batch = leaves[0].shape[0] if leaves else 1

    def widen(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        batched = leaf.ndim > 0 and leaf.shape[0] == batch
        return torch.cat([leaf, leaf]) if batched and batch == 1 else leaf.clone()

    def free(leaf: Any) -> Any:
        batched = isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == batch
        return {0: torch.export.Dim.DYNAMIC} if batched else None

    wide_args, wide_kwargs = pytree.tree_map(widen, (args, kwargs))
    return wide_args, wide_kwargs, pytree.tree_map(free, kwargs if kwargs else args)


def _export(source: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: bool) -> tuple[Any, bool]:
    try:
        with torch.no_grad():
            source(*args, **kwargs)
    except Exception as error:
        raise SluiceError(
            f"the model does not run on the example inputs {_shapes(args, kwargs)}: {first_line(error)}; "
            "give inputs as its forward() takes them"
        ) from error
    if dynamic and any(isinstance(leaf, Tensor) and leaf.ndim for leaf in pytree.tree_leaves((args, kwargs))):
        try:
            wide_args, wide_kwargs, shapes = free_batch(args, kwargs)
            return _program(source, wide_args, wide_kwargs, dynamic_shapes=shapes), True
        except Exception:  # the model fixes its batch size, or the static export below raises the fault
            pass
    try:
        return _program(source, args, kwargs), False
    except Exception as error:
        raise SluiceError(
            f"torch.export cannot capture {type(source).__name__}: {first_line(error)}; change its forward() so that "
            "torch.export.export(model, inputs, strict=False) succeeds"
        ) from error


def _program(module: nn.Module, args: Any, kwargs: Any, *, dynamic_shapes: Any = None) -> torch.export.ExportedProgram:
    with warnings.catch_warnings():  # a recurrent layer lists its weights anew, which changes nothing
        warnings.filterwarnings("ignore", message="The tensor attribute.*_flat_weights")
        return torch.export.export(module, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)


def _same_names(gm: fx.GraphModule, model: nn.Module) -> None:
    """Constants that export lifted must not appear in the state_dict; every name of the model must."""
    want = model.state_dict()
    for name, tensor in want.items():
        if name not in gm.state_dict():
            set_tensor(gm, name, tensor.detach().clone(), parameter=name in dict(model.named_parameters()))
    for name in [n for n in gm.state_dict() if n not in want]:
        owner, leaf = _owner(gm, name), name.rpartition(".")[2]
        if leaf in owner._buffers:
            owner._non_persistent_buffers_set.add(leaf)


def _shapes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    leaves = pytree.tree_leaves((args, kwargs))
    return ", ".join(str(tuple(x.shape)) if isinstance(x, Tensor) else repr(x) for x in leaves)


def input_specs(gm: fx.GraphModule) -> tuple[InputSpec, ...]:
    """Shapes and dtypes of the positional example inputs a graph was captured with; empty if they are not tensors."""
    args, kwargs = gm.meta[MARK]["args"], gm.meta[MARK]["kwargs"]
    if kwargs or not all(isinstance(a, Tensor) for a in args):
        return ()
    return tuple(InputSpec(tuple(a.shape), str(a.dtype).removeprefix("torch.")) for a in args)


def example_inputs_of(plan: Plan) -> tuple[Tensor, ...]:
    """Inputs of the shapes that the plan remembers: standard normal, ones for integers."""
    if not plan.inputs:
        raise SluiceError("the plan does not say what inputs the model takes; pass example_inputs")
    made = []
    for spec in plan.inputs:
        dtype = getattr(torch, spec.dtype)
        made.append(
            torch.randn(spec.shape, dtype=dtype) if dtype.is_floating_point else torch.ones(spec.shape, dtype=dtype)
        )
    return tuple(made)
