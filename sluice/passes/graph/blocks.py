"""Residual blocks: the branches of a network that can be left out.

An addition ``z = a + b`` of two activations of one shape is a block with *branch* a and *shortcut* b if

1. the branch's own nodes (they reach the output through a alone) hold at least one convolution or linear layer,
2. they start at a *fork*: an activation that b is or depends on (the last of them, if there are several). Sums of
   separate inputs are no residuals,
3. between fork and b there are fewer such layers (none: b is the fork, or only passes through activations and pools;
   some: a projection). So the shortcut is never dropped,
4. no tensor of the branch is read elsewhere.

Then the network with ``z := b`` has outputs of the same shapes. It equals the network whose branch is *closed*: the
affine of the last norm, or weight and bias of the last layer, are zero, and the operators behind them map 0 to 0 up to
the addition (zero-initialised last norms, Goyal et al. 2017, section 5.1). Blocks may be nested; then both are found,
and their tensors overlap.

An activation behind a dropped branch (ReLU, ReLU6, clip) may limit a value to a range that has limited it before, or
to a wider one. Such an activation changes nothing, and goes as well.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from sluice.core.errors import SluiceError
from sluice.core.plan import Drop
from sluice.passes.graph.groups import module_of
from sluice.passes.graph.view import GraphView

__all__ = ["Block", "dropped_values", "find_blocks", "match_drops"]


@dataclass(frozen=True, slots=True)
class Block:
    """One branch that can be dropped. Values (``add``, outputs, ``fork``, ``own``) are named as in the graph.

    Attributes:
        params: sorted names of the named tensors that only the branch reads.
        layers: the weights of its convolutions and linear layers, in execution order.
        own: first output of every node of the branch, in execution order.
        closing: tensors whose zeroing makes the branch output exactly zero; None if there are none, then ``reason``.
        identity: the shortcut is the fork itself.
    """

    name: str
    params: tuple[str, ...]
    add: str
    shortcut_output: str
    fork: tuple[str, ...]
    own: tuple[str, ...]
    layers: tuple[str, ...]
    closing: tuple[str, ...] | None
    reason: str = ""

    @property
    def identity(self) -> bool:
        return self.shortcut_output in self.fork

    def drop(self) -> Drop:
        return Drop(self.name, self.params)


def find_blocks(view: GraphView, strict: bool = True) -> tuple[tuple[Block, ...], Mapping[str, str]]:
    """Every residual block of a graph.

    Args:
        strict: refuse where a shape is unknown or a tensor is read outside the branch as well. A rewriter, to which
            the plan says what to drop, needs neither: a sliced graph may have no shapes, a file may share equal
            tensors.
    Returns:
        The blocks in execution order of their additions, so inner before outer ones, all names different; and, by
        name, why other additions of two activations are none.
    """
    found: list[Block] = []
    refused: dict[str, str] = {}
    taken: set[str] = set()
    for index, node in enumerate(view.nodes):
        if not node.residual:
            continue
        block = _block(view, index, strict)
        if isinstance(block, Block):
            twin = next((b.name for b in found if b.params == block.params), None)
            if twin is None:
                found.append(replace(block, name=_unique(block.name, taken)))
                continue
            block = (block.name, f"has the same tensors as block {twin!r}")
        refused[_unique(block[0], taken)] = block[1]
    return tuple(found), refused


def match_drops(view: GraphView, drops: Sequence[Drop]) -> tuple[Block, ...]:
    """The block of the graph that each drop means, by the tensors that the graph still has.

    Raises:
        SluiceError: no block fits, or several do.
    """
    blocks, _ = find_blocks(view, strict=False)
    present = view.tensors()
    matched = []
    for drop in drops:
        wanted = present.intersection(drop.params)
        fits = {b.name: extras for b in blocks if (extras := _extras(view, b, wanted)) is not None}
        best = [b for b in blocks if fits.get(b.name) == min(fits.values())] if fits else []
        if len(best) != 1:
            raise SluiceError(
                f"the plan drops {drop.name!r} with {len(drop.params)} tensors ({', '.join(drop.params[:2])}...), but "
                f"{'more than one' if best else 'no'} residual block of this graph has just these; "
                "apply the plan to the dense model that it was made for"
            )
        matched.append(best[0])
    return tuple(matched)


def dropped_values(view: GraphView, blocks: Collection[Block]) -> dict[str, str]:
    """Value -> the value that takes its place: every addition, and activations that no longer change anything."""
    shortcuts = {block.add: block.shortcut_output for block in blocks}
    gone = {out for block in blocks for out in block.own}
    taken: dict[str, str] = {}
    for node in view.nodes:
        out = node.outputs[0]
        if out in gone:
            continue
        if out in shortcuts:
            taken[out] = taken.get(shortcuts[out], shortcuts[out])
        elif node.bounds is not None and node.inputs[0] in taken:
            source = taken[node.inputs[0]]
            maker = view.producer.get(source)
            inner = None if maker is None else view.nodes[maker].bounds
            if inner is not None and node.bounds[0] <= inner[0] <= inner[1] <= node.bounds[1]:
                taken[out] = source
    return taken


def _block(view: GraphView, index: int, strict: bool) -> Block | tuple[str, str]:
    """The block at an addition, or a name and the reason why there is none."""
    node = view.nodes[index]
    z, (left, right) = node.outputs[0], node.inputs
    owns = {value: view.own(value, index) for value in (left, right)}
    layers = {value: view.weighted(nodes) for value, nodes in owns.items()}
    branch, shortcut = (left, right) if layers[left] >= layers[right] else (right, left)
    own = owns[branch]
    name = _name(view, own) or z
    shapes = [view.shapes.get(value) for value in (branch, shortcut)]
    if None not in shapes and shapes[0] != shapes[1]:
        return name, f"its operands have the shapes {shapes[0]} and {shapes[1]}"
    if strict and None in shapes:
        return name, "the shape of an operand is unknown"
    if not layers[branch]:
        return name, "no operand has a convolution or linear layer of its own"
    common = view.entries(own) & view.before(shortcut)[1]
    earlier = {v for value in common for v in view.before(value)[1] - {value}}
    fork = sorted(common - earlier)
    if not fork:
        return name, "its operands have no activation in common that both start from"
    rest = view.weighted(view.between(fork, shortcut))
    if rest >= layers[branch]:
        return name, f"the shortcut has {rest} convolutions or linear layers, the branch {layers[branch]}"
    others = view.tensors(set(range(len(view.nodes))) - set(own))
    shared = sorted(view.tensors(own) & others)
    if strict and shared:
        return name, f"tensor {shared[0]!r} is read outside the branch as well"
    params = tuple(sorted(view.tensors(own) - others))
    if not params:
        return name, "no tensor of the branch is its own"
    closing = _closing(view, branch, set(own))
    reason = closing if isinstance(closing, str) else ""
    if not isinstance(closing, str) and not closing <= set(params):
        reason = f"tensor {min(closing - set(params))!r} is read outside the branch as well"
    return Block(
        name,
        params,
        z,
        shortcut,
        tuple(fork),
        tuple(view.nodes[i].outputs[0] for i in own),
        _layers(view, own),
        None if reason else tuple(sorted(closing)),
        reason,
    )


def _closing(view: GraphView, value: str, own: set[int]) -> set[str] | str:
    """Tensors that make ``value`` zero, or why there are none."""
    index = view.producer.get(value)
    if index is None or index not in own:
        return "an input of the branch reaches the addition past every layer"
    node = view.nodes[index]
    inputs = [v for v in node.inputs if v not in view.derived]
    if node.kind == "zero":
        return _closing(view, node.inputs[0], own)
    if node.kind == "mul":
        found = [_closing(view, v, own) for v in inputs]
        tensors = [f for f in found if not isinstance(f, str)]
        return tensors[0] if tensors else set(node.closes) if node.closes else found[0]
    if node.closes is None:
        return f"{node.op} before the addition does not become zero with the tensors of the branch"
    closes = set(node.closes)
    added = (
        inputs if node.kind == "sum" else [v for v in inputs if v != node.inputs[0]] if node.kind == "choice" else []
    )
    for operand in added:
        more = _closing(view, operand, own)
        if isinstance(more, str):
            return more
        closes |= more
    return closes


def _extras(view: GraphView, block: Block, wanted: set[str]) -> int | None:
    """How many tensors the block has beyond those wanted, if it can be the one that is meant.

    Tensors without a name of the model may be beyond them: constants of an exporter, copies of a shared tensor.
    """
    reads = view.tensors(view.producer[out] for out in block.own)
    extras = set(block.params) - wanted
    if not wanted.intersection(block.params) or not wanted <= reads:
        return None
    return len(extras) if all("." not in name or "::" in name for name in extras) else None


def _name(view: GraphView, own: Sequence[int]) -> str:
    """The module that all tensors of the branch lie in; its first layer if that is the whole network."""
    paths = [module_of(name).split(".") for name in sorted(view.tensors(own))]
    common = 0
    while paths and all(len(p) > common and p[common] == paths[0][common] for p in paths):
        common += 1
    if common:
        return ".".join(paths[0][:common])
    return next((module_of(name) for name in _layers(view, own)), "")


def _layers(view: GraphView, own: Sequence[int]) -> tuple[str, ...]:
    """Weights that are named tensors; a weight that is computed from several has no name."""
    weighted = [view.nodes[i] for i in own if view.nodes[i].kind == "weighted"]
    return tuple(node.closes[0] for node in weighted if node.closes)


def _unique(name: str, taken: set[str]) -> str:
    new, count = name, 1
    while new in taken:
        count += 1
        new = f"{name}#{count}"
    taken.add(new)
    return new
