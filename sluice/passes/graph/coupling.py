"""Which axes must be cut together: one engine of rules, used for ``torch.fx`` and for ONNX graphs.

A rule looks at one operator and says which atoms (`sluice.passes.graph.atoms`) are one and the same channel, and which
may never be cut, with a reason. After the whole graph has been read, the classes of atoms are the channels.

1. A value has layers of atoms on every axis; an axis without layers is fixed, an axis of size 1 carries nothing.
   Named tensors are values like any other, labelled on all axes. What is computed from them needs no rule of its own.
2. A contraction unites the axes that its operands share and passes the others on. That is one rule for linear layers,
   matrix products of two activations, attention and einsum.
3. Element-wise operators unite the axes of their operands. A reshape carries labels by index (`sluice.core.algebra`);
   where it splits a layer over several axes, every atom becomes a product (`sluice.passes.graph.atoms`, 3).
4. Of a split, the inner axis can be cut, so that the kept entries form a rectangle. The other axes can be as well where
   they are *heads*: axes that a product of two activations has in common and keeps. Then the inner ones, which are the
   dimensions of heads, stay as they are unless they are asked for.
5. An operator without a rule freezes its inputs. Nothing is guessed.
6. Means, sums and variances over channels are those of the channels that are kept, as in norms. A variance that divides
   by n - 1 needs two entries wherever one channel is left.

The two front ends (`sluice.passes.graph.aten`, `sluice.passes.graph.onnx_axes`) only translate operators into these
rules.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from sluice.passes.graph.atoms import FIXED, Layers, Shape, Value
from sluice.passes.graph.layout import READS, SHAPED, Layout, Operand, fixed

__all__ = ["FIXED", "Coupling", "Layers", "Operand", "Shape", "Value", "fixed", "matmul_letters"]


def matmul_letters(left: int, right: int) -> tuple[str, str, str]:
    """Operands and result of a matrix product of two ranks in letters, as einsum has them; ``k`` is summed over."""
    batch = "abcdefgh"[: max(left, right, 2) - 2]
    one = "k" if left == 1 else batch[len(batch) - (left - 2) :] + "mk"
    two = "k" if right == 1 else batch[len(batch) - (right - 2) :] + "kn"
    return one, two, batch + "m" * (left > 1) + "n" * (right > 1)


class Coupling(Layout):
    """The rules of operators that compute, beside those of `sluice.passes.graph.layout`."""

    def __init__(self, tensors: Mapping[str, Shape]):
        super().__init__(tensors)
        self.heads: list[np.ndarray] = []  # layers on the shared axes of products of two activations
        self._of_heads: set[int] = set()  # the roots on them, once the graph has been read
        self.variances: list[tuple[list[tuple[Layers, int]], float, str]] = []  # unbiased ones: axes, correction, where

    def contract(self, operands: Sequence[tuple[Value, Shape, str, bool]], out: str, where: str) -> Value:
        """A sum of products, written as in einsum: a letter per axis of each operand, and those of the result.

        Args:
            operands: value, shape, letters, and whether it is a weight: computed from named tensors alone. The axes
                that weights alone have are channels that the layer makes.
        """
        parts: dict[str, list[tuple[Layers, int]]] = {}
        free: dict[str, list[bool]] = {}
        for value, shape, letters, is_weight in operands:
            for layers, size, letter in zip(value, shape, letters, strict=True):
                parts.setdefault(letter, []).append((layers, size))
                free.setdefault(letter, []).append(is_weight)
        found = {}
        for letter, each in parts.items():
            reason = SHAPED if letter in out else READS
            found[letter] = self.match(each, where, reason)
            if letter in out and free[letter].count(False) > 1:
                self.heads.extend(found[letter])
            if letter in out and all(free[letter]):
                self.produce(found[letter])
        return tuple(found[letter] for letter in out)

    def attend(self, q: Operand, k: Operand, v: Operand, mask: Operand | None, where: str) -> Value:
        """Softmax(q k^T + mask) v, with heads in the third axis from the end and positions in the second.

        Where q has several times as many heads, each of k and v serves as many of q, one behind the other.
        """
        (value, size), (_, shared) = q, k
        lead, times = "abcdefg"[: len(size) - 2], size[-3] // shared[-3] if len(size) > 3 else 1
        grouped = (*size[:-3], shared[-3], times) if times > 1 else size[:-2]
        letters = lead + "h" * (times > 1)

        def regrouped(x: Value, to: Shape, tail: Shape) -> Value:
            return (
                x
                if times == 1
                else self.reshape(x, (*(size[:-2] if to is grouped else grouped), *tail), (*to, *tail), where)
            )

        value, scored = regrouped(value, grouped, size[-2:]), (size[-2], shared[-2])
        self.heads.extend(value[-3] if times > 1 else ())  # of those, each of k and v serves all
        factors = [(value, (*grouped, *size[-2:]), f"{letters}qd", False), (*k, f"{lead}kd", False)]
        scores = self.contract(factors, f"{letters}qk", where)
        if mask is not None:
            plain = (regrouped(scores, size[:-2], scored), (*size[:-2], *scored))
            scores = regrouped(self.combine([plain, mask], len(size), where), grouped, scored)
        self.along(scores, -1, where)
        factors = [(scores, (*grouped, *scored), f"{letters}qk", False), (*v, f"{lead}kv", False)]
        return regrouped(self.contract(factors, f"{letters}qv", where), size[:-2], (size[-2], v[1][-1]))

    def convolve(
        self, x: Operand, weight: Operand, bias: Operand | None, groups: int, transposed: bool, where: str
    ) -> Value:  # fmt: skip
        """Convolutions: axis 1 of x is contracted. The result has the rank of x."""
        (value, shape), (w, sizes) = x, weight
        dim = len(shape) - len(sizes) + 1
        for d, layers in enumerate(value):
            if d > dim:
                self.freeze(layers, f"{where} contracts another axis than the labelled one")
        if groups > 1:
            out, size = self._grouped(value[dim], w, sizes, groups, transposed, where)
        else:
            into, out, size = (w[0], w[1], sizes[1]) if transposed else (w[1], w[0], sizes[0])
            self.match([(value[dim], shape[dim]), (into, shape[dim])], where, READS)
        self.produce(out)
        if bias is not None:
            self.match([(out, size), (bias[0][0], bias[1][0])], where)
        return (*value[:dim], out, *fixed(shape[dim + 1 :]))

    def _grouped(
        self, x: Layers, w: Value, sizes: Shape, groups: int, transposed: bool, where: str
    ) -> tuple[Layers, int]:
        """Depthwise: out channel follows in channel. Grouped: the same position of every group is one channel."""
        first, second, per_group = w[0], w[1], sizes[1]
        rows, size = sizes[0] // groups, per_group * groups if transposed else sizes[0]
        if not x:
            self.freeze(first if transposed or per_group == 1 else second, f"{where} {READS}")
        if per_group > 1:
            self.tie(first, np.tile(np.arange(rows), groups))
            spread = tuple(np.tile(layer, groups) for layer in second)
            if x:
                self.unite(x, first if transposed else spread, where)
            return (spread if transposed else first), size
        self.freeze(second, f"{where} is depthwise")
        self.tie(first, np.repeat(np.arange(groups) * rows, rows))  # perhaps with a channel multiplier
        if x:
            self.unite(x, tuple(layer[::rows] for layer in first), where)
        if transposed and rows > 1:
            self.freeze(first, f"{where} is a depthwise transposed convolution with several inputs per group")
            return (self.new(groups),), size
        return first, size

    def per_channel(self, x: Operand, dim: int, vectors: Iterable[Operand], where: str) -> Value:
        """Batch and instance norm: vectors along ``dim``, no mixing of channels."""
        value, shape = x
        for d, layers in enumerate(value):
            if d != dim:
                self.freeze(layers, f"{where} mixes the labelled axis")
        self.match([(value[dim], shape[dim]), *((layers, size) for (layers,), (size,) in vectors)], where)
        return (*fixed(shape[:dim]), value[dim], *fixed(shape[dim + 1 :]))

    def group_norm(self, x: Operand, dim: int, groups: int, vectors: Iterable[Operand], where: str) -> Value:
        """Equal numbers of channels leave every group, so that the number of groups stays; one of one goes with it."""
        value, shape = x
        if groups == shape[dim]:
            return self.per_channel(x, dim, vectors, where)
        self.tie(value[dim], np.tile(np.arange(shape[dim] // groups), groups))
        return self.per_channel(x, dim, vectors, where)

    def layer_norm(self, x: Operand, first: int, affine: Iterable[Operand], where: str) -> Value:
        """Statistics over the axes from ``first`` on; affine tensors have the shape of those axes, or of the last."""
        (value, shape), vectors = x, list(affine)
        for back in range(len(shape) - first, 0, -1):
            parts = [(own[-back], size[-back]) for own, size in vectors if len(size) >= back]
            self.match([(value[-back], shape[-back]), *parts], where)
        return value

    def beside(self, x: Value, dims: Iterable[int], where: str) -> Value:
        """Pooling, padding, resizing: works on the axes ``dims``, leaves the others alone."""
        gone = set(dims)
        for d in gone:
            self.freeze(x[d], f"{where} works along the labelled axis")
        return tuple(FIXED if d in gone else layers for d, layers in enumerate(x))

    def along(self, x: Value, dim: int, where: str) -> Value:
        """Softmax, cumulative sums: mixes ``dim``."""
        self.freeze(x[dim], f"{where} mixes the channels")
        return x

    def unbiased(self, x: Operand, dims: Sequence[int], correction: float, where: str) -> None:
        """A variance over ``dims``, divided by the number of entries less ``correction`` (rule 6)."""
        value, shape = x
        if correction:
            self.variances.append(([(value[d], shape[d]) for d in dims], correction, where))

    def _without_few_entries(self) -> None:
        if not self.variances:
            return
        made = np.concatenate([np.unique(self.axes[key]) for key in self.producers] or [np.empty(0, dtype=np.int64)])
        roots = np.concatenate([np.unique(layer) for layer in self.resolved((made,))] or [made])
        roots = np.setdiff1d(roots, [-1, *self.frozen])
        for axes, correction, where in self.variances:
            least = 1
            for layers, size in axes:
                cut = [layer for layer in self.resolved(layers) if np.isin(layer, roots).any()]
                one = int(np.unique(cut[0], return_counts=True)[1].min()) if cut else size
                least *= 1 if len(cut) > 1 else one
            for layers, _ in axes if least <= correction else ():
                self.freeze(layers, f"{where} takes an unbiased variance over the channels")

    def reason(self, layers: Layers) -> str | None:
        """The first reason why indices of an axis must stay; of an axis that is split into heads, why heads must."""
        outer = tuple(one for one in self.resolved(layers) if not self._of_heads.isdisjoint(one.tolist()))
        return super().reason(outer) or super().reason(layers)

    def settle(self, dims: bool) -> None:
        """Freeze the axes of splits that cannot be cut, and dimensions of heads unless ``dims`` (rule 4)."""
        self._of_heads = {root for layer in self.resolved(tuple(self.heads)) for root in layer.tolist()} - {-1}
        for split in self.splits:
            shared = [
                any(not self._of_heads.isdisjoint(layer.tolist()) for layer in self.resolved((factor,)))
                for factor in split.factors
            ]
            for factor, is_head in zip(split.factors, shared, strict=True):
                if is_head or (dims if any(shared) else factor is split.factors[-1]):
                    continue
                what = "keeps the dimensions of its heads" if any(shared) else "splits the axis in equal parts"
                self.freeze((factor,), f"{split.where} {what}")
        self._without_few_entries()
