"""Sizes that an ONNX graph holds as numbers, after a cut.

1. Numbers follow from the labelled axes of the value: Reshape, Expand and ConstantOfShape targets, Split sizes, Slice
   bounds, pads, Resize sizes, the number of depthwise groups, hidden sizes. The scale of attention stays that of the
   dense head.
2. Where nothing but the batch is open, a target is written anew, as numbers. Where other sizes are open as well, no
   number is written but that of an axis that is cut.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import onnx

from sluice.core.algebra import bounds_of_kept
from sluice.passes.cut.target_shape_onnx import constant, with_size
from sluice.passes.graph.groups import Analysis
from sluice.passes.graph.onnx_graph import OnnxGraph, sizes_of
from sluice.passes.graph.static_shapes import static_sizes

__all__ = ["Mender"]

AXES_ARE_INPUTS = 13  # the first operator set in which Squeeze takes its axes as an input


class Mender:
    """Literal sizes of graphsurgeon nodes."""

    def __init__(self, model: onnx.ModelProto, analysis: Analysis, keeps: Sequence[np.ndarray]):
        self.model, self.analysis, self.keeps = model, analysis, keeps
        self.has_open_sizes = bool(sizes_of(model)[0])  # beside the batch
        self.added: list[Any] = []  # nodes that compute sizes

    @cached_property
    def opset(self) -> int:
        return max(entry.version for entry in self.model.opset_import if entry.domain in ("", "ai.onnx"))

    @cached_property
    def _literals(self) -> dict[str, np.ndarray]:
        """What the arithmetic of sizes gives at the sizes of the analysis."""
        return OnnxGraph(static_sizes(self.model, self.analysis.batch or 1)).literals

    def numbers(self, tensor: Any) -> np.ndarray:
        """The numbers of a literal, also of one that nodes compute."""
        values = getattr(tensor, "values", None)
        return np.array(self._literals[tensor.name] if values is None else values)

    def lost(self, name: str) -> dict[int, np.ndarray]:
        """By axis what is kept of a value, for the axes that lose something."""
        masks = {axis.dim: axis.mask(self.keeps) for axis in self.analysis.values.get(name, ())}
        return {dim: mask for dim, mask in masks.items() if not mask.all()}

    def mend(self, node: Any) -> None:
        cut_in = self.lost(node.inputs[0].name) if node.inputs else {}
        cut_out = self.lost(node.outputs[0].name) if node.outputs else {}
        if node.op in ("Reshape", "Expand", "ConstantOfShape") and cut_out:
            self._target(node, cut_out)
        elif node.op == "Squeeze" and cut_in and len(node.inputs) < 2 and "axes" not in node.attrs:
            self._squeeze(node)
        elif node.op == "Split" and cut_in:
            self._split(node, cut_in)
        elif node.op == "Slice" and cut_in:
            self._slice(node, cut_in)
        elif node.op == "Resize" and cut_out and len(node.inputs) > 3 and not _empty(node.inputs[3]):
            self._resize(node, cut_out)
        elif node.op in ("Conv", "ConvTranspose") and node.attrs.get("group", 1) > 1 and 1 in cut_in:
            depthwise = self.analysis.shapes[node.inputs[1].name][1] == 1  # one group per input channel
            kept = int(cut_in[1].sum()) if depthwise else len(cut_in[1])
            node.attrs["group"] = node.attrs["group"] * kept // len(cut_in[1])
        elif node.op in ("LSTM", "GRU", "RNN") and (again := self.lost(node.inputs[2].name)):
            node.attrs["hidden_size"] = int(again[2].sum())
        elif node.op == "Pad" and cut_out:
            self._pad(node, cut_out)
        elif node.op == "ReduceMean" and cut_in:
            self._unbiased(node)
        elif node.op == "Attention" and 3 in cut_in and "scale" not in node.attrs:
            node.attrs["scale"] = 1.0 / math.sqrt(len(cut_in[3]))  # that of the dense head

    def _target(self, node: Any, cut: dict[int, np.ndarray]) -> None:
        """Sizes of the output: the cut ones as they are now, dynamic ones copied, inferred or computed."""
        place = 0 if node.op == "ConstantOfShape" else 1
        after = self.analysis.shapes[node.outputs[0].name]
        before = () if place == 0 else self.analysis.shapes[node.inputs[0].name]
        target, old = node.inputs[place], getattr(node.inputs[place], "values", None)
        expands = node.op != "Reshape"
        name = f"{node.outputs[0].name}_shape"
        if expands and target.inputs and self._follows(target.inputs[0], cut):
            return
        if self.has_open_sizes and old is not None:  # numbers stay true, and nothing else is known
            sizes = old.copy()
            for dim, mask in cut.items():
                place_of = dim - len(after) + len(sizes)
                sizes[place_of] = -1 if sizes[place_of] == -1 else int(mask.sum())
            node.inputs[place] = constant(name, sizes)
            return
        if node.op == "Expand" and old is not None:  # a 1 keeps what the input has, whatever that is
            sizes = old.copy()
            for dim, mask in cut.items():
                place_of = dim - len(after) + len(sizes)
                if place_of >= 0 and sizes[place_of] != 1:
                    sizes[place_of] = int(mask.sum())
            node.inputs[place] = constant(name, sizes)
            return
        if expands:
            before = (1,) * (len(after) - len(before)) + tuple(before)
        sizes = [self._literal(expands, size, before[d : d + 1]) for d, size in enumerate(after)]
        if place == 0:
            sizes = [None if self._is_dynamic(size) else size for size in after]
        for dim, mask in cut.items():
            if expands or old is None or int(old.reshape(-1)[dim]) != -1:
                sizes[dim] = -1 if self._is_dynamic(after[dim]) else int(mask.sum())
            else:
                sizes[dim] = -1
        if not self.has_open_sizes and None not in sizes and sizes.count(-1) < 2:
            node.attrs.pop("allowzero", None)
            node.inputs[place] = constant(name, np.array(sizes, dtype=np.int64))
            return
        for dim, mask in cut.items():
            self.added += with_size(target, dim - len(after), int(mask.sum()), f"{name}_{dim}")
            target = node.inputs[place] = self.added[-1].outputs[0]

    def _pad(self, node: Any, cut: dict[int, np.ndarray]) -> None:
        """As many entries of the padding as readers still take."""
        shape, pads = self.analysis.shapes[node.inputs[0].name], self.numbers(node.inputs[1])
        given = len(node.inputs) > 3 and not _empty(node.inputs[3])
        axes = [int(d) % len(shape) for d in self.numbers(node.inputs[3])] if given else list(range(len(shape)))
        for k, dim in enumerate(axes):
            if dim in cut:
                front, mask = int(pads[k]), cut[dim]
                pads[k], pads[k + len(axes)] = mask[:front].sum(), mask[front + shape[dim] :].sum()
        node.inputs[1] = constant(f"{node.outputs[0].name}_pads", pads)

    def _resize(self, node: Any, cut: dict[int, np.ndarray]) -> None:
        """Sizes of the output, numbers or computed."""
        sizes, name = node.inputs[3], f"{node.outputs[0].name}_sizes"
        if hasattr(sizes, "values"):
            numbers = sizes.values.copy()
            for dim, mask in cut.items():
                numbers[dim] = int(mask.sum())
            node.inputs[3] = constant(name, numbers)
            return
        rank = len(self.analysis.shapes[node.outputs[0].name])
        for dim, mask in cut.items():
            self.added += with_size(node.inputs[3], dim - rank, int(mask.sum()), f"{name}_{dim}")
            node.inputs[3] = self.added[-1].outputs[0]

    def _unbiased(self, node: Any) -> None:
        """A variance that is ``mean * n / (n - c)``: n counts the entries that the mean is of, c is 1 as a rule."""
        shape, kept = self.analysis.shapes[node.inputs[0].name], self.lost(node.inputs[0].name)
        axes = node.attrs.get("axes", node.inputs[1].values.tolist() if len(node.inputs) > 1 else range(len(shape)))
        axes = [d % len(shape) for d in axes]
        before = math.prod(shape[d] for d in axes)
        after = math.prod(int(kept[d].sum()) if d in kept else shape[d] for d in axes)
        times = next((n for n in node.outputs[0].outputs if n.op == "Mul" and _number(n.inputs[1]) == before), None)
        over = next((n for n in times.outputs[0].outputs if n.op == "Div"), None) if times else None
        if times is not None and over is not None and after != before:
            by = _number(over.inputs[1])
            assert by is not None
            for n, number in ((times, after), (over, by - before + after)):
                like = n.inputs[1].values
                n.inputs[1] = constant(f"{n.outputs[0].name}_count", np.full(like.shape, number, like.dtype))

    def _follows(self, maker: Any, cut: dict[int, np.ndarray]) -> bool:
        """Is a target the shape of a value that is cut in the same way?"""
        other = self.lost(maker.inputs[0].name) if maker.op == "Shape" else {}
        whole = not maker.attrs.get("start") and "end" not in maker.attrs
        return whole and cut.keys() == other.keys() and all(np.array_equal(cut[d], other[d]) for d in cut)

    def _literal(self, expands: bool, size: int, before: Sequence[int]) -> int | None:
        """One size of a target, if a number can say it; ``before`` is the size of the input in this place, if any."""
        if not self._is_dynamic(size):
            return size
        if expands:
            return 1 if size in before else None
        return 0 if size in before else -1

    def _is_dynamic(self, size: int) -> bool:
        return self.analysis.batch is not None and size % self.analysis.batch == 0

    def _squeeze(self, node: Any) -> None:
        """The axes that the dense graph squeezes: an axis that was cut to one entry is none of them."""
        axes = [d for d, size in enumerate(self.analysis.shapes[node.inputs[0].name]) if size == 1]
        if not axes:
            node.op = "Identity"
        elif self.opset < AXES_ARE_INPUTS:
            node.attrs["axes"] = axes
        else:
            node.inputs.append(constant(f"{node.outputs[0].name}_axes", np.array(axes, dtype=np.int64)))

    def _split(self, node: Any, cut: dict[int, np.ndarray]) -> None:
        dim = node.attrs.get("axis", 0) % len(self.analysis.shapes[node.inputs[0].name])
        if dim not in cut:
            return
        bounds = np.cumsum([0, *(self.analysis.shapes[out.name][dim] for out in node.outputs)])
        sizes = np.array([cut[dim][i:j].sum() for i, j in itertools.pairwise(bounds)], dtype=np.int64)
        node.attrs.pop("num_outputs", None)
        node.inputs = [node.inputs[0], constant(f"{node.outputs[0].name}_sizes", sizes)]

    def _slice(self, node: Any, cut: dict[int, np.ndarray]) -> None:
        rank = len(self.analysis.shapes[node.inputs[0].name])
        starts, ends = (self.numbers(node.inputs[index]) for index in (1, 2))
        given = len(node.inputs) > 3 and not _empty(node.inputs[3])
        axes = self.numbers(node.inputs[3]).tolist() if given else list(range(rank))
        steps = self.numbers(node.inputs[4]).tolist() if len(node.inputs) > 4 else [1] * len(axes)
        for k, d in enumerate(axes):
            if (mask := cut.get(d % rank)) is not None:
                bounds = slice(int(starts[k]), int(ends[k]), int(steps[k])).indices(len(mask))
                starts[k], ends[k] = bounds_of_kept(mask, *bounds)
                for index, name, values in ((1, "starts", starts), (2, "ends", ends)):
                    node.inputs[index] = constant(f"{node.outputs[0].name}_{name}", values)


def _number(tensor: Any) -> float | None:
    values = getattr(tensor, "values", None)
    return float(values.reshape(-1)[0]) if values is not None and values.size == 1 else None


def _empty(tensor: Any) -> bool:
    return tensor is None or tensor.name == ""
