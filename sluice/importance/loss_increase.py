"""The increase of a network's loss by a change, on a few fixed batches.

    increase(change) = max(0, L(network with the change) - L(network))

1. ``L`` is the training loss, the dense network being the teacher. Batch norm statistics are taken from the batches, so
   a network with a part removed is judged as after one pass of re-estimation.
2. Values before a change stay as they were. So the values that are alive at one place of the dense graph, the
   *frontier*, are kept, and a changed network runs from there on. The frontier moves forward with the changes, and
   starts again for a change that lies before it: in the order of the graph, changes cost half or less.
3. A node of a restructured copy has the dense value if it has the same operator and tensors as in the dense graph, and
   reads dense values. Where the copy needs a value that is no longer kept, all of it runs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from sluice.core.errors import SluiceError
from sluice.passes.graph.capture import clone
from sluice.passes.graph.capture_modes import BatchNorm
from sluice.training.train import Data, Given, Loss, call, count_rows, in_order, on_device, split_batch

__all__ = ["SAMPLES", "LossIncrease"]

SAMPLES = 128
BROKEN = 100.0  # times the network's own loss: the increase for a change that makes the loss infinite
Batch = tuple[tuple[Any, ...], Any, Any]  # inputs, outputs of the teacher, labels


class LossIncrease:
    """The dense network on fixed batches, and the loss of changed copies of it."""

    def __init__(self, gm: fx.GraphModule, data: Data, loss: Loss, samples: int = SAMPLES):
        self.gm, self.loss = clone(gm), loss
        self.batches: list[Batch] = []
        teacher, seen = clone(gm).eval(), 0
        with torch.no_grad():
            for batch in data:
                inputs, labels = on_device(_at_most(split_batch(batch), samples - seen), gm)
                self.batches.append((in_order(gm, inputs), call(teacher, inputs), labels))
                seen += count_rows(inputs)
                if seen >= samples:
                    break
        _batch_statistics(self.gm)
        self._nodes = list(self.gm.graph.nodes)
        self._place = {node: place for place, node in enumerate(self._nodes)}
        self._in_place = any(
            isinstance(n.target, torch._ops.OpOverload) and n.target._schema.is_mutable for n in self._nodes
        )
        self._first: dict[int, int] = {}  # by the tensor itself, which may have several names
        for place, node in enumerate(self._nodes):
            for source in (node, *node.all_input_nodes) if node.op != "get_attr" else ():
                if source is node or source.op == "get_attr":
                    for tensor in _tensors(self.gm, source):
                        self._first.setdefault(id(tensor), place)
        self._start_again()
        self.base = self._loss(self.gm)
        if not np.isfinite(self.base):
            raise SluiceError(f"the loss is {self.base} on the first batches; give data the network was made for")

    def place(self, tensors: Collection[str]) -> int:
        """The place in the dense graph of the first node that computes with one of the named tensors."""
        state = self.gm.state_dict(keep_vars=True)
        return min((self._first[id(state[name])] for name in tensors if id(state[name]) in self._first), default=0)

    def weights(self, changed: Mapping[str, Tensor]) -> float:
        """The increase of the loss with other values of some tensors."""
        self._advance(self.place(changed))
        with _swapped(self.gm, changed):
            return self._increase(self.gm, {node: node for node in self._nodes[: self._frontier]})

    def restructured(self, change: Callable[[fx.GraphModule], object], near: Collection[str] = ()) -> float:
        """The increase of the loss with another graph, made by ``change`` from a copy that shares the tensors.

        Args:
            near: names of tensors at which the change begins, if known.
        """
        self._advance(self.place(near))
        changed = clone(self.gm, sharing=True)
        twins = dict(zip(changed.graph.nodes, self._nodes, strict=True))
        result = change(changed)
        if isinstance(result, fx.GraphModule):
            changed = result
        _batch_statistics(changed)
        return self._increase(changed, self._unchanged(changed, twins))

    def _unchanged(self, changed: fx.GraphModule, twins: Mapping[fx.Node, fx.Node]) -> dict[fx.Node, fx.Node]:
        """Nodes of the copy with dense values -> their twins before the frontier (rule 3)."""
        same: dict[fx.Node, fx.Node] = {}
        for node in changed.graph.nodes:
            twin = twins.get(node)
            if twin is None or self._place[twin] >= self._frontier or (node.op, node.target) != (twin.op, twin.target):
                continue
            if fx.map_arg((node.args, node.kwargs), same.get) != fx.map_arg((twin.args, twin.kwargs), lambda n: n):
                continue
            if all(a is b for a, b in zip(_tensors(changed, node), _tensors(self.gm, twin), strict=True)):
                same[node] = twin
        return same

    def _increase(self, changed: fx.GraphModule, same: Mapping[fx.Node, fx.Node]) -> float:
        value = self._loss(changed, same)
        return max(0.0, value - self.base) if np.isfinite(value) else BROKEN * (1.0 + abs(self.base))

    def _loss(self, module: fx.GraphModule, same: Mapping[fx.Node, fx.Node] | None = None) -> float:
        same = same or {}
        every = [node for node in module.graph.nodes if node.op != "placeholder"]
        # Tensors are fetched anew, or an in-place network would copy all weights with the kept values.
        open_nodes = [node for node in every if node not in same or node.op == "get_attr"]
        needed = {n for node in open_nodes for n in node.all_input_nodes if n in same and n.op != "get_attr"}
        if not all(same[n] in self._kept[0].env for n in needed):
            open_nodes, needed = every, set()
        values = []
        with torch.no_grad():
            for (inputs, taught, labels), kept in zip(self.batches, self._kept, strict=True):
                known = [kept.env[same[n]] for n in needed]
                if self._in_place:  # the kept values serve the next network as well; views are copied as views
                    known = copy.deepcopy(known)
                runner = _runner(module, inputs, dict(zip(needed, known, strict=True)))
                for node in open_nodes:
                    runner.env[node] = runner.run_node(node)
                outputs = module.graph.process_outputs(runner.env[open_nodes[-1]])
                values.append(float(self.loss(outputs, taught, labels)))
        return float(np.mean(values))

    def _start_again(self) -> None:
        self._frontier = 0
        self._kept = [_runner(self.gm, inputs, {}) for inputs, _, _ in self.batches]

    def _advance(self, place: int) -> None:
        """Bring the frontier to ``place``, and forget values that no node from there on reads."""
        if place == self._frontier:
            return
        if place < self._frontier:
            self._start_again()
        alive = {n for node in self._nodes[place:] for n in node.all_input_nodes}
        with torch.no_grad():
            for kept in self._kept:
                for node in self._nodes[self._frontier : place]:
                    if node.op != "placeholder":
                        kept.env[node] = kept.run_node(node)
                kept.env = {n: value for n, value in kept.env.items() if n in alive}
        self._frontier = place


def _runner(module: fx.GraphModule, inputs: tuple[Any, ...], env: dict[fx.Node, Any]) -> fx.Interpreter:
    """Runs nodes of the module one by one; ``env`` holds the values that are known besides the inputs."""
    runner = fx.Interpreter(module, garbage_collect_values=False)
    runner.env = dict(zip(module.graph.find_nodes(op="placeholder"), module.graph.process_inputs(*inputs), strict=True))
    runner.env |= env
    return runner


def _tensors(gm: fx.GraphModule, node: fx.Node) -> list[Any]:
    """The tensors that a node reads besides its inputs."""
    if node.op == "get_attr":
        owner, _, leaf = str(node.target).rpartition(".")
        return [getattr(gm.get_submodule(owner), leaf)]
    if node.op == "call_module":
        return list(gm.get_submodule(str(node.target)).state_dict(keep_vars=True).values())
    return []


def _batch_statistics(module: nn.Module) -> None:
    module.eval()
    for part in module.modules():
        if isinstance(part, BatchNorm):
            part.train()
            part.momentum = 0.0


def _at_most(batch: tuple[Given, Any], count: int) -> tuple[Given, Any]:
    """The first examples of a batch, if all its tensors have the same number of them; else the whole batch."""
    sizes = {len(t) for t in pytree.tree_leaves(batch) if isinstance(t, Tensor) and t.ndim}
    if len(sizes) != 1 or max(sizes) <= count:
        return batch
    cut: tuple[Given, Any] = pytree.tree_map_only(Tensor, lambda t: t[:count] if t.ndim else t, batch)
    return cut


@contextmanager
def _swapped(module: nn.Module, changed: Mapping[str, Tensor]) -> Iterator[None]:
    state = module.state_dict(keep_vars=True)
    old = {name: state[name].data for name in changed}
    try:
        for name, value in changed.items():
            state[name].data = value
        yield
    finally:
        for name, value in old.items():
            state[name].data = value
