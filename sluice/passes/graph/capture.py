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
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from sluice.core.errors import SluiceError, first_line
from sluice.core.plan import InputSpec, Plan
from sluice.passes.graph.capture_forms import inline, write_out
from sluice.passes.graph.capture_modes import raise_attention, raise_modes
from sluice.passes.graph.capture_recurrent import split_layers
from sluice.passes.graph.names_torch import (
    NAMES,
    all_tensors,
    free_names,
    read_by_first_name,
    renamed,
    renamed_path,
    same_names,
    saved_tensors,
    with_all_names,
)
from sluice.passes.graph.preflight_torch import (
    check_function,
    check_gradient,
    check_module,
    check_runs,
    copied,
    own_backwards,
)

__all__ = [
    "Inputs",
    "capture",
    "captured_leaves",
    "clone",
    "example_inputs_of",
    "export_again",
    "free_batch",
    "has_captured_form",
    "input_specs",
    "mark_as_cut",
    "named_inputs",
    "normalize_inputs",
]

Inputs = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]
MARK = "sluice_capture"
CUT = "sluice_cut"


def normalize_inputs(example_inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A tensor or tuple is positional, a mapping is keyword arguments."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    return tuple(example_inputs) if isinstance(example_inputs, (tuple, list)) else (example_inputs,), {}


def capture(
    model: nn.Module, example_inputs: Inputs, *, dynamic_batch: bool = True, trained: bool = True
) -> fx.GraphModule:
    """The model as a trainable ``fx.GraphModule`` with the same ``state_dict`` names.

    Args:
        model: left unchanged (its tensors are copied); a module that this function returned is copied as it is.
        example_inputs: tensor, tuple of positional or mapping of keyword arguments; axis 0 is the batch.
        dynamic_batch: keep axis 0 of every input free; falls back to the example's size where the model refuses.
        trained: the graph may be trained, so it must have the model's gradient as well.
    Raises:
        SluiceError: the example inputs do not fit the model, it cannot be exported, or it is none of the networks that
            a graph can keep (`sluice.passes.graph.preflight_torch`).
    """
    check_module(model)
    if isinstance(model, fx.GraphModule) and MARK in model.meta:
        return clone(model)
    args, kwargs = normalize_inputs(example_inputs)
    kwargs = _in_order(model, kwargs)
    functions = own_backwards(copied(model), args, kwargs) if trained else ()
    names = free_names(model)
    source = renamed(copied(model), names)
    check_function(source, args, kwargs)
    exported, dynamic = _export(source, args, kwargs, dynamic_batch)
    gm = exported.module(check_guards=False)
    gm.__dict__.pop("train", None)  # the exporter forbids both; raised modules make them right again
    gm.__dict__.pop("eval", None)
    inline(gm)
    read_by_first_name(gm)
    split_layers(gm)
    held = _kept_in_eval(model)
    raise_modes(gm, source, {renamed_path(path, names) for path in held})
    if trained:
        raise_attention(gm, _in_training(model, held), args, kwargs)
    write_out(gm)
    for node in list(gm.graph.nodes):
        guard = node.op == "call_module" and node.target == "_guards_fn"
        if guard or node.target is torch.ops.aten._assert_tensor_metadata.default:
            gm.graph.erase_node(node)
    _without_writes(gm)
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    same_names(gm, source)
    gm.meta[NAMES] = {free: name for name, free in names.items()}
    gm.meta[MARK] = {"args": args, "kwargs": kwargs, "dynamic": dynamic}
    if functions:
        check_gradient(gm.eval(), renamed(copied(model), names), args, kwargs, functions)
    return gm.train(model.training)


def _kept_in_eval(model: nn.Module) -> frozenset[str]:
    """Modules that training leaves in eval mode: by a train() of the model's own, or by the user's hand."""
    names = {name for name, part in model.named_modules() if not part.training} if model.training else set()
    if any(type(part).train is not nn.Module.train for part in model.modules()):
        names |= {name for name, part in copied(model).train().named_modules() if not part.training}
    return frozenset(names)


def _in_training(model: nn.Module, held: Collection[str]) -> nn.Module:
    """A copy in training mode, but for the modules that stay in eval mode."""
    copy = copied(model).train()
    for name in held:
        copy.get_submodule(name).eval()
    return copy


def _without_writes(gm: fx.GraphModule) -> None:
    """Leave out what forward() writes into tensors of its own; no output depends on it (`check_function`)."""
    for node in reversed(list(gm.graph.nodes)):
        target = node.args[0] if node.args and isinstance(node.target, torch._ops.OpOverload) else None
        owned = isinstance(target, fx.Node) and target.op == "get_attr"
        if owned and not node.users and node.target._schema.is_mutable:
            gm.graph.erase_node(node)


def export_again(gm: fx.GraphModule, example_inputs: Inputs) -> torch.export.ExportedProgram:
    """The program of a network in captured form, cut or not; the network is in eval mode.

    A cut network is exported with ``example_inputs``, any other with those that it was captured with.

    Raises:
        SluiceError: the example inputs do not fit a cut network.
    """
    if MARK not in gm.meta:
        args, kwargs = normalize_inputs(example_inputs)
        kwargs = _in_order(gm, kwargs)
        check_runs(gm, args, kwargs)
        return _export(gm, args, kwargs, dynamic=True)[0]
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
    tensors = all_tensors(gm)
    with warnings.catch_warnings():  # copying torch's own tree specifications warns of their next form
        warnings.simplefilter("ignore", FutureWarning)
        result = copy.deepcopy(gm, {id(tensor): tensor for _, tensor in tensors} if sharing else None)
    with_all_names(result, gm)
    saved = set(saved_tensors(gm))
    for path, module in result.named_modules():  # copying makes saved buffers of lifted constants and of all buffers
        names = {leaf: f"{path}.{leaf}" if path else leaf for leaf in module._buffers}
        module._non_persistent_buffers_set.update(leaf for leaf, name in names.items() if name not in saved)
    return result.train(gm.training)


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
    if dynamic and any(isinstance(leaf, Tensor) and leaf.ndim for leaf in pytree.tree_leaves((args, kwargs))):
        try:
            wide_args, wide_kwargs, shapes = free_batch(args, kwargs)
            exported = _program(source, wide_args, wide_kwargs, dynamic_shapes=shapes)
            if _one_batch(exported) or _takes_one(source, args, kwargs):
                return exported, True
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
    with (
        warnings.catch_warnings()
    ):  # layers list or compute their weights anew, which changes nothing (`check_function`)
        warnings.filterwarnings("ignore", message="The tensor attribute")
        return torch.export.export(module, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)


def _one_batch(exported: torch.export.ExportedProgram) -> bool:
    """Do all inputs whose first axis is free have the same size there?"""
    values = [n.meta["val"] for n in exported.graph.find_nodes(op="placeholder")]
    sizes = [v.shape[0] for v in values if isinstance(v, Tensor) and v.ndim and isinstance(v.shape[0], torch.SymInt)]
    return len({str(size) for size in sizes}) <= 1


def _takes_one(source: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Is axis 0 of every input a batch? Else one that is as long as the batch by chance cannot be cut to one entry."""
    try:
        check_runs(source, *pytree.tree_map_only(Tensor, lambda t: t[:1] if t.ndim else t, (args, kwargs)))
    except SluiceError:
        return False
    return True


def captured_leaves(gm: fx.GraphModule) -> list[Any]:
    """The inputs that a graph was captured with, one for each of its placeholders."""
    return pytree.tree_leaves((gm.meta[MARK]["args"], gm.meta[MARK]["kwargs"]))


def input_specs(gm: fx.GraphModule) -> tuple[InputSpec, ...]:
    """Shapes and dtypes of the example inputs a graph was captured with; empty if they are not plain tensors."""
    named = [*(("", x) for x in gm.meta[MARK]["args"]), *gm.meta[MARK]["kwargs"].items()]
    if not all(isinstance(x, Tensor) for _, x in named):
        return ()
    return tuple(InputSpec(tuple(x.shape), str(x.dtype).removeprefix("torch."), name) for name, x in named)


def example_inputs_of(plan: Plan) -> Inputs:
    """Inputs of the shapes that the plan remembers: standard normal, ones for integers."""
    if not plan.inputs:
        raise SluiceError("the plan does not say what inputs the model takes; pass example_inputs")
    made = []
    for spec in plan.inputs:
        dtype = getattr(torch, spec.dtype)
        made.append(
            torch.randn(spec.shape, dtype=dtype) if dtype.is_floating_point else torch.ones(spec.shape, dtype=dtype)
        )
    return named_inputs(plan.inputs, made)


def named_inputs(specs: Sequence[InputSpec], tensors: Sequence[Tensor]) -> Inputs:
    """The tensors as they are given to a model: a mapping where they are keyword arguments."""
    if specs[0].name:
        return {spec.name: tensor for spec, tensor in zip(specs, tensors, strict=True)}
    return tuple(tensors)
