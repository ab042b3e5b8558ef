"""Which axes must be cut together: one engine of rules, used for ``torch.fx`` and for ONNX graphs.

A rule looks at one operator and says which atoms (`sluice.passes.graph.atoms`) are one and the same channel, and which
may never be cut, with a reason. After the whole graph has been read, the classes of atoms are the channels.

1. A value has at most one labelled axis, ``Axis(dim, atoms)``; ``None`` means that nothing in it can be cut.
2. A weight makes new atoms for its output axis and ties its input axis to the axis it contracts.
3. Element-wise operators tie the axes of their operands. A reshape carries labels by index (`sluice.core.algebra`);
   where it splits one labelled axis into two, the outer positions are tied, so that the kept entries form a rectangle.
4. An operator without a rule freezes its inputs. Nothing is guessed.

The two front ends (`sluice.passes.graph.aten`, `sluice.passes.graph.onnx_axes`) only translate operators into these
rules.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from sluice.core.algebra import reshape_labels
from sluice.passes.graph.atoms import Atoms, Axis, Shape

__all__ = ["Axis", "Coupling", "Shape"]


class Coupling(Atoms):
    """The rules. Sizes are plain ints (a dynamic batch is given some large prime)."""

    def contract(
        self, x: Axis | None, dim: int, rank: int, weight: str | None, out_axis: int, in_axis: int,
        bias: str | None, groups: int, where: str,
    ) -> Axis | None:  # fmt: skip
        """Convolutions, transposed convolutions and matrix products with a named weight.

        ``dim``: the contracted axis of x (for the result: of the output), ``out_axis``/``in_axis``: the weight's.
        """
        dim %= rank
        if weight is None:
            self.freeze(x, f"the weight of {where} is computed, not a named tensor")
            return None
        if x is not None and x.dim != dim:
            self.freeze(x, f"{where} contracts another axis than the labelled one")
            x = None
        if groups == 1:
            out = self.param(weight, out_axis)
            if x is None:
                self.freeze(self.param(weight, in_axis), f"{where} reads a value whose size is fixed")
            else:
                self.union(x.atoms, self.param(weight, in_axis))
        else:
            out = self._grouped(x, weight, out_axis, in_axis, groups, where)
        if (weight, out_axis) not in self.producers:
            self.producers.append((weight, out_axis))
        if bias is not None:
            self._along(out, bias)
        return Axis(dim, out)

    def _grouped(self, x: Axis | None, weight: str, out_axis: int, in_axis: int, groups: int, where: str) -> np.ndarray:
        """Depthwise: out channel follows in channel. Grouped: the same position of every group is one channel."""
        transposed = out_axis == 1
        first = self.param(weight, 0)  # (in channels if transposed else out channels)
        second = self.param(weight, 1)  # per group
        per_group = len(second)
        if x is None:
            reason = f"{where} reads a value whose size is fixed"
            self.freeze(first if transposed else second, reason)
            if per_group == 1 or transposed:
                self.freeze(first, reason)
        if per_group == 1:  # depthwise, perhaps with a channel multiplier
            self.freeze(second, f"{where} is depthwise")
            rows = first.reshape(groups, -1)
            self.tie(rows.T.reshape(rows.shape[1], groups))
            if x is not None:
                self.union(x.atoms, rows[:, 0])
            if transposed and rows.shape[1] > 1:
                self.freeze(first, f"{where} is a depthwise transposed convolution with several inputs per group")
                return self.new(groups)
            return first
        rows = first.reshape(groups, -1)
        shared = self.tie(rows)
        if transposed:
            if x is not None:
                self.union(x.atoms, first)
            return np.tile(second, groups)
        if x is not None:
            self.union(x.atoms, np.tile(second, groups))
        return np.tile(shared, groups)

    def _along(self, atoms: np.ndarray, tensor: str) -> None:
        shape = self.tensors[tensor]
        axis = next((i for i, n in enumerate(shape) if n == len(atoms) and n > 1), 0 if len(atoms) == 1 else None)
        if axis is None:
            self.freeze(atoms, f"{tensor} {shape} does not run along the {len(atoms)} channels")
        else:
            self.union(atoms, self.param(tensor, axis))

    def per_channel(self, x: Axis | None, dim: int, tensors: Iterable[str | None], where: str) -> Axis | None:
        """Batch and instance norm: vectors along ``dim``, no mixing of channels."""
        names = [t for t in tensors if t is not None]
        if x is not None and x.dim != dim:
            self.freeze(x, f"{where} mixes the labelled axis")
        elif x is not None:
            for name in names:
                self._along(x.atoms, name)
        return x

    def group_norm(
        self, x: Axis | None, dim: int, groups: int, tensors: Iterable[str | None], where: str
    ) -> Axis | None:
        """Equal numbers of channels leave every group, so that the number of groups stays."""
        if x is not None and x.dim == dim:
            self.tie(x.atoms.reshape(groups, -1))
        return self.per_channel(x, dim, tensors, where)

    def layer_norm(self, x: Axis | None, first: int, tensors: Iterable[str | None], where: str) -> Axis | None:
        """Statistics over the axes from ``first`` on; affine tensors have the shape of those axes."""
        if x is not None and x.dim >= first:
            for name in tensors:
                if name is not None:
                    self.union(x.atoms, self.param(name, x.dim - first))
        return x

    def combine(self, operands: Sequence[tuple[Axis | None, Shape, str | None]], out: Shape, where: str) -> Axis | None:
        """Element-wise operator with broadcasting; an operand is (axis, shape, name of the tensor or None)."""
        lead = None
        # The first labelled operand that is not broadcast decides, computed values before parameters.
        for axis, shape, _ in sorted(operands, key=lambda operand: operand[2] is not None):
            if axis is not None and len(axis.atoms) == out[axis.dim - len(shape) + len(out)]:
                lead = Axis(axis.dim - len(shape) + len(out), axis.atoms)
                break
        for axis, shape, tensor in operands:
            if lead is None:
                self.freeze(axis, f"{where} broadcasts a single channel")
                continue
            dim = lead.dim - len(out) + len(shape)
            if axis is not None:
                if axis.dim == dim and len(axis.atoms) == len(lead.atoms):
                    self.union(axis.atoms, lead.atoms)
                else:
                    self.freeze(axis, f"{where} broadcasts along another axis")
                    if dim >= 0 and shape[dim] != 1 and axis.dim != dim:
                        self.freeze(lead, f"{where} combines it with a value whose size is fixed")
            elif dim >= 0 and shape[dim] != 1:
                if tensor is None:
                    self.freeze(lead, f"{where} combines it with a value whose size is fixed")
                else:
                    self.union(self.param(tensor, dim), lead.atoms)
        return lead

    def concat(self, parts: Sequence[tuple[Axis | None, Shape]], dim: int, where: str) -> Axis | None:
        labelled = [axis for axis, _ in parts if axis is not None]
        if not labelled:
            return None
        dim %= len(parts[0][1])
        if all(axis.dim == dim for axis in labelled):
            atoms: list[np.ndarray] = []
            for axis, shape in parts:
                if axis is None:
                    fixed = self.new(shape[dim])
                    self.freeze(fixed, f"{where} joins a value whose size is fixed")
                    atoms.append(fixed)
                else:
                    atoms.append(axis.atoms)
            return Axis(dim, np.concatenate(atoms))
        return self.combine([(a, s, None) for a, s in parts], parts[0][1], where)

    def narrow(self, x: Axis | None, dim: int, start: int, stop: int, where: str) -> Axis | None:
        """Positions ``start .. stop`` along ``dim``."""
        return Axis(dim, x.atoms[start:stop]) if x is not None and x.dim == dim else x

    def reshape(self, x: Axis | None, before: Shape, after: Shape, where: str) -> Axis | None:
        if x is None:
            return None
        result = reshape_labels(x.atoms, x.dim, before, after)
        if result is None:
            self.freeze(x, f"{where} reshapes {before} to {after}, which cannot be aligned")
            return None
        labels, dims = result
        varying = [k for k, n in enumerate(labels.shape) if n > 1]
        if not varying:
            if labels.size == 1 and len(x.atoms) == 1:
                same = [d for d in dims if after[d] == 1]
                return Axis(same[0], x.atoms) if same else None
            self.freeze(x, f"{where} hides the labelled axis")
            return None
        last = varying[-1]
        atoms = self.tie(np.moveaxis(labels, last, -1))
        if len(atoms) != after[dims[last]]:
            raise AssertionError(f"{where}: {len(atoms)} labels for size {after[dims[last]]}")
        return Axis(dims[last], atoms)

    def permute(self, x: Axis | None, order: Sequence[int]) -> Axis | None:
        """Output axis i is input axis ``order[i]``."""
        return None if x is None else Axis([d % len(order) for d in order].index(x.dim), x.atoms)

    def reduce(self, x: Axis | None, dims: Iterable[int], rank: int, keepdim: bool, where: str) -> Axis | None:
        """Sums, means, maxima over ``dims``."""
        if x is None:
            return None
        gone = sorted({d % rank for d in dims})
        if x.dim in gone:
            self.freeze(x, f"{where} reduces over the channels")
            return None
        return Axis(x.dim if keepdim else x.dim - sum(d < x.dim for d in gone), x.atoms)

    def pick(self, x: Axis | None, dim: int, positions: Axis | None, where: str) -> Axis | None:
        """Some positions along ``dim``, listed by a value with one axis."""
        self.freeze(positions, f"{where} reads it as positions")
        if x is not None and x.dim == dim:
            self.freeze(x, f"{where} picks channels")
            return None
        return x

    def spatial(self, x: Axis | None, first: int, where: str) -> Axis | None:
        """Pooling, padding, resizing: works on the axes from ``first`` on, leaves the others alone."""
        if x is not None and x.dim >= first:
            self.freeze(x, f"{where} works along the labelled axis")
            return None
        return x

    def along(self, x: Axis | None, dim: int, where: str) -> Axis | None:
        """Softmax, cumulative sums: mixes ``dim``."""
        if x is not None and x.dim == dim:
            self.freeze(x, f"{where} mixes the channels")
        return x

    def shuffle(
        self, x: Axis | None, shape: Shape, inner: Shape, order: Sequence[int], out: Shape, where: str
    ) -> Axis | None:
        """Reshape to ``inner``, permute by ``order``, reshape to ``out``: pixel and channel shuffles."""
        middle = self.permute(self.reshape(x, shape, inner, where), order)
        return self.reshape(middle, tuple(inner[i] for i in order), out, where)

    def tie_runs(self, x: Axis | None, runs: int) -> Axis | None:
        """Each of ``runs`` equal stretches of the axis becomes one channel (they stay or go together)."""
        if x is None:
            return None
        rows = x.atoms.reshape(runs, -1)
        for column in rows.T[1:]:
            self.union(rows[:, 0], column)
        return Axis(x.dim, np.repeat(rows[:, 0], rows.shape[1]))
