"""Tensors by their names in the ``state_dict``, which identify them.

1. A tensor may have several names: layers that stand in the module tree twice, tied weights. It is one tensor: nodes
   read it by its first name, and a copy keeps the names together, so that a cut changes all of them.
2. Every name of the model is in the captured network, also of tensors that nothing reads. What is not in the model's
   ``state_dict``, buffers that are not saved, plain attributes and literals, is none of the captured network's.
3. A captured network is a ``torch.fx.GraphModule``, which has attributes of its own: ``meta``, ``graph``, ``code``. A
   part of the model with such a name has an underscore behind it in the captured network, in plans and in files. The
   networks that are given to the user have the model's own names in their ``state_dict`` (`with_own_names`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from operator import attrgetter
from typing import Any

from torch import Tensor, fx, nn

__all__ = [
    "all_tensors",
    "free_names",
    "read_by_first_name",
    "renamed",
    "renamed_path",
    "same_names",
    "saved_tensors",
    "set_tensor",
    "with_all_names",
    "with_own_names",
]

NAMES = "sluice_names"  # in the meta of a captured network: its own names for parts of the model -> the model's
OURS = "gates"


def free_names(model: nn.Module) -> dict[str, str]:
    """Rule 3: the parts of a model whose names a captured network cannot have -> the names that they get there."""
    parts = [*model._modules, *model._parameters, *model._buffers]
    reserved = {OURS, *dir(fx.GraphModule), *vars(fx.GraphModule(nn.Module(), fx.Graph()))}
    found: dict[str, str] = {}
    for name in (n for n in parts if n in reserved):
        free = f"{name}_"
        while free in reserved or free in parts:
            free += "_"
        found[name] = free
    return found


def renamed(copy: nn.Module, names: Mapping[str, str]) -> nn.Module:
    """A copy of the model, changed: parts have other names, and forward() finds them by the old ones as well."""
    tables: tuple[dict[str, Any], ...] = (copy._modules, copy._parameters, copy._buffers)
    for table in tables if names else ():
        parts = dict(table)
        table.clear()
        table.update({names.get(name, name): part for name, part in parts.items()})
    if names:  # an export puts other tensors in the place of parameters, so the old name must lead to the new one
        old = {name: property(attrgetter(free)) for name, free in names.items()}
        copy.__class__ = type(type(copy).__name__, (type(copy),), old)
    return copy


def renamed_path(path: str, names: Mapping[str, str]) -> str:
    """A path of the model, its first part renamed."""
    first, dot, rest = path.partition(".")
    return names.get(first, first) + dot + rest


def with_own_names(gm: fx.GraphModule) -> fx.GraphModule:
    """Let the ``state_dict`` of a captured network speak in the model's names (rule 3), in place."""
    names: dict[str, str] = gm.meta.get(NAMES, {})
    if names:
        gm.register_state_dict_post_hook(partial(_rename, names))
        gm.register_load_state_dict_pre_hook(partial(_rename, {own: name for name, own in names.items()}))
    return gm


def _rename(names: Mapping[str, str], module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    items = list(state.items())
    state.clear()
    for name, value in items:
        own = name.startswith(prefix)
        state[prefix + renamed_path(name.removeprefix(prefix), names) if own else name] = value


def saved_tensors(module: nn.Module) -> dict[str, Tensor]:
    """What the ``state_dict`` holds, in its order, under the names of the captured network."""
    found: dict[str, Tensor] = {}
    for path, part in module.named_modules(remove_duplicate=False):
        buffers = ((n, t) for n, t in part._buffers.items() if n not in part._non_persistent_buffers_set)
        own: Iterable[tuple[str, Tensor | None]] = (*part._parameters.items(), *buffers)
        found.update({f"{path}.{n}" if path else n: t for n, t in own if t is not None})
    return found


def read_by_first_name(gm: fx.GraphModule) -> None:
    """One name for every tensor that nodes read: of several, the first in the state_dict, which an exporter keeps."""
    first: dict[int, str] = {}
    for name, tensor in all_tensors(gm):
        first.setdefault(id(tensor), name)
    named = dict(all_tensors(gm))
    for node in gm.graph.nodes:
        if node.op == "get_attr" and node.target in named:
            node.target = first[id(named[str(node.target)])]


def all_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters, then buffers; a tensor that has several names comes once under each."""
    return [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]


def set_tensor(module: nn.Module, name: str, value: Tensor, parameter: bool) -> None:
    """Replace (or create) the parameter or buffer ``name``."""
    path, _, leaf = name.rpartition(".")
    owner = module
    for part in path.split(".") if path else []:
        if part not in owner._modules:
            owner.add_module(part, nn.Module())
        owner = owner._modules[part]  # type: ignore[assignment]
    old = getattr(owner, leaf, None)
    if parameter:
        trains = value.is_floating_point() or value.is_complex()
        requires_grad = trains and (old.requires_grad if isinstance(old, Tensor) else True)
        setattr(owner, leaf, nn.Parameter(value, requires_grad=requires_grad))
    elif leaf in owner._buffers:
        owner._buffers[leaf] = value
    else:
        owner.register_buffer(leaf, value)


def _put(module: nn.Module, name: str, twin: Tensor | None, tensor: Tensor) -> None:
    """A name that is missing: of ``twin``, the same tensor under another name, or of a copy of ``tensor``."""
    parameter = isinstance(tensor, nn.Parameter)
    set_tensor(module, name, tensor.detach().clone() if twin is None else twin, parameter)
    if twin is not None and parameter:
        _owner(module, name)._parameters[name.rpartition(".")[2]] = twin  # type: ignore[assignment]


def _tensor(module: nn.Module, name: str) -> Tensor:
    found = getattr(_owner(module, name), name.rpartition(".")[2])
    assert isinstance(found, Tensor)
    return found


def _owner(module: nn.Module, name: str) -> nn.Module:
    return module.get_submodule(name.rpartition(".")[0])


def same_names(gm: fx.GraphModule, model: nn.Module) -> None:
    """Constants that export lifted must not appear in the state_dict; every name of the model must."""
    want, have = model.state_dict(keep_vars=True), gm.state_dict(keep_vars=True)
    made = {id(tensor): have[name] for name, tensor in want.items() if name in have}
    for name, tensor in want.items():
        if name not in have:
            _put(gm, name, made.get(id(tensor)), tensor)
            made[id(tensor)] = _tensor(gm, name)
    for name in [n for n in gm.state_dict() if n not in want]:
        owner, leaf = _owner(gm, name), name.rpartition(".")[2]
        if leaf in owner._buffers:
            owner._non_persistent_buffers_set.add(leaf)


def with_all_names(copy: fx.GraphModule, original: fx.GraphModule) -> None:
    """Give a copy the names that copying left out, since no node reads them."""
    tensors, kept = all_tensors(original), dict(all_tensors(copy))
    made = {id(tensor): kept[name] for name, tensor in tensors if name in kept}
    for name, tensor in tensors:
        if name not in kept:
            _put(copy, name, made.get(id(tensor)), tensor)
            made[id(tensor)] = _tensor(copy, name)
