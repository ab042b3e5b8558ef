"""Remove tensors that a captured graph no longer reads.

A tensor goes, with all its names, if no node reads it under any of them. The count of a batch norm goes with its
statistics. A module that holds nothing more and is not called goes as well.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, fx

__all__ = ["read_tensors", "remove_unused"]


def read_tensors(gm: fx.GraphModule) -> set[str]:
    """Names of the parameters and buffers that the graph reads."""
    modules = dict(gm.named_modules())
    found: set[str] = set()
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            found.add(str(node.target))
        elif node.op == "call_module":
            module = modules[str(node.target)]
            found |= {f"{node.target}.{leaf}" for leaf, _ in [*module.named_parameters(), *module.named_buffers()]}
    return found


def remove_unused(gm: fx.GraphModule, names: Iterable[str]) -> None:
    """Of the tensors with these names, remove those that nothing reads."""
    for node in reversed(list(gm.graph.nodes)):
        if node.op == "get_attr" and not node.users:
            gm.graph.erase_node(node)
    tensors: dict[str, Tensor] = {
        **dict(gm.named_buffers(remove_duplicate=False)),
        **gm.state_dict(keep_vars=True),
    }
    read = {id(tensors[name]) for name in read_tensors(gm) & tensors.keys()}
    unread = {id(tensors[name]) for name in names if name in tensors} - read
    gone = {name for name, tensor in tensors.items() if id(tensor) in unread}
    gone |= {name for name in tensors if name.endswith("num_batches_tracked") and _statistics(name) in gone}
    for name in gone:
        path, _, leaf = name.rpartition(".")
        owner = gm.get_submodule(path)
        owner._parameters.pop(leaf, None)
        owner._buffers.pop(leaf, None)
        owner._non_persistent_buffers_set.discard(leaf)
    called = {str(node.target) for node in gm.graph.nodes if node.op == "call_module"}
    for path, module in sorted(gm.named_modules(), key=lambda item: -item[0].count(".")):
        empty = not (module._parameters or module._buffers or module._modules)
        if path and empty and path not in called:
            parent, _, leaf = path.rpartition(".")
            del gm.get_submodule(parent)._modules[leaf]


def _statistics(count: str) -> str:
    return f"{count.rpartition('.')[0]}.running_mean".removeprefix(".")
