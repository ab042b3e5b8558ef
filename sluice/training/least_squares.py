"""Least squares of one layer from streamed normal equations.

A convolution (of any dimension, in any number of groups) or a linear layer is ``Y = A W^T + b``: the rows of ``A`` are
the patches of its input, one per position of its output; those of ``Y`` are its output. With weights ``W0`` as they are
now, targets ``Y`` and means taken off both sides where the layer can mend a constant,

    W = W0 + R^T A (A^T A + l I)^-1,    R = Y - A W0^T,    l = `RIDGE` times the mean diagonal of A^T A

1. ``A^T A`` and ``A^T Y`` are sums over rows, so batches come one after another and nothing but the sums is kept, in
   float64. Each group of a grouped convolution has sums of its own; a depthwise one has as many as channels.
2. Of a batch at most `ROWS` positions count, evenly spread. They are gathered a few at a time, so that their patches
   take less than the sums.
3. The ridge pulls towards ``W0``: directions that the inputs do not show stay as they are.
4. Sums are mended and solved where they lie, by Cholesky: the largest layer of a network takes its ``A^T A`` once.

No torch, since networks come as modules and as ONNX files.

Source: ridge regression of pruned layers, as in He et al. (ICCV 2017), who refit after every layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

__all__ = ["Geometry", "Misfit", "NormalEquations", "patches"]

ROWS = 8192
FEWEST = 256  # rows that are gathered at once
SHARE = 4  # of the sums, one part in so many: rows gathered at once, and products of them
RIDGE = 1e-3


class Misfit(Exception):
    """The targets have other positions than the layer makes."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """What a layer does to positions; a linear layer has empty ``kernel``.

    ``padding`` is zero padding in front and behind, by spatial axis.
    """

    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1


def patches(x: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Rows of ``A`` by group, shape ``(groups, rows, columns)``; columns are ordered as ``weight[n].reshape(-1)`` is.

    Args:
        x: ``(batch, channels, *positions)`` for a convolution, ``(..., features)`` for a linear layer.
    """
    rows = Patches(x, geometry)
    return rows.at(np.arange(rows.count))


class Patches:
    """The rows of ``A``, to be gathered as they are needed; arguments are those of `patches`.

    Attributes:
        count, columns: rows in all, and columns of a group.
    """

    def __init__(self, x: np.ndarray, geometry: Geometry) -> None:
        self._groups = geometry.groups
        if not geometry.kernel:
            self._windows = x.reshape(-1, x.shape[-1])
            self._places: tuple[int, ...] = (len(self._windows),)
        else:
            self._windows = _windows(x, geometry)
            n, _, *sizes = map(int, self._windows.shape)
            self._places = (n, *sizes[: len(geometry.kernel)])
        self.count = math.prod(self._places)
        self.columns = self._windows.size // max(1, self.count) // self._groups

    def at(self, rows: np.ndarray) -> np.ndarray:
        """Some rows by group, shape ``(groups, len(rows), columns)``."""
        first, *others = np.unravel_index(rows, self._places)
        at: tuple[Any, ...] = (first, slice(None), *others)
        taken = self._windows[at]
        return taken.reshape(len(rows), self._groups, self.columns).swapaxes(0, 1)


def _windows(x: np.ndarray, geometry: Geometry) -> np.ndarray:
    """A view of the padded input, shape ``(batch, channels, *positions, *taps)``."""
    dims = len(geometry.kernel)
    if any(map(any, geometry.padding)):
        x = np.pad(x, [(0, 0), (0, 0), *geometry.padding])
    windows = tuple(apart * (k - 1) + 1 for k, apart in zip(geometry.kernel, geometry.dilation, strict=True))
    x = np.lib.stride_tricks.sliding_window_view(x, windows, axis=tuple(range(2, 2 + dims)))
    steps = [slice(None, None, step) for step in (*geometry.stride, *geometry.dilation)]
    return x[(slice(None), slice(None), *steps)]


@dataclass(slots=True)
class NormalEquations:
    """The sums of one layer, by group: ``gram`` ``(groups, columns, columns)``, ``cross`` ``(groups, columns, out)``.

    ``centred`` takes the means off both sides.
    """

    geometry: Geometry
    centred: bool
    count: int = 0
    gram: np.ndarray = field(default_factory=lambda: np.zeros(()))
    cross: np.ndarray = field(default_factory=lambda: np.zeros(()))
    inputs: np.ndarray = field(default_factory=lambda: np.zeros(()))
    outputs: np.ndarray = field(default_factory=lambda: np.zeros(()))

    def add(self, x: np.ndarray, y: np.ndarray | None) -> None:
        """One batch: ``x`` as for `patches`, ``y`` ``(batch, out, *positions)`` or ``(..., out)``; no ``y``: gram."""
        rows = Patches(x, self.geometry)
        b = None if y is None else _targets(y, self.geometry)
        if b is not None and b.shape[1] != rows.count:
            raise Misfit(f"{rows.count} rows of inputs, {b.shape[1]} of targets")
        step = max(1, math.ceil(rows.count / ROWS))
        chosen = np.arange(rows.count % step // 2, rows.count, step)
        self.count += len(chosen)
        some = max(FEWEST, rows.columns // SHARE)
        for part in (chosen[start : start + some] for start in range(0, len(chosen), some)):
            a = rows.at(part)
            self._add_products(a)
            self.inputs = _added(self.inputs, a.sum(1, dtype=np.float64))
            if b is not None:
                self.cross = _added(self.cross, _turned(a) @ b[:, part])
                self.outputs = _added(self.outputs, b[:, part].sum(1, dtype=np.float64))

    def _add_products(self, a: np.ndarray) -> None:
        """``A^T A`` of some rows, a band of columns after the other."""
        columns = a.shape[-1]
        if not self.gram.ndim:
            self.gram = np.zeros((len(a), columns, columns))
        for band in _bands(columns):
            self.gram[:, band] += _turned(a[..., band]) @ a

    def solve(self, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The weight of least squares, in the shape of ``weight``, and the bias ``(out,)`` that goes with it.

        The bias is zero where the equations are not centred. The sums are used up (rule 4). Where they cannot be
        solved, since they hold no finite numbers or too few digits of them, the weight is not finite.
        """
        from scipy.linalg import cho_factor, cho_solve

        groups = self.geometry.groups
        before = weight.astype(np.float64).reshape(groups, weight.shape[0] // groups, -1)
        gram, cross = self.covariance(), self.cross / self.count
        if self.centred:
            cross = cross - _turned(self._mean(self.inputs)) @ self._mean(self.outputs)
        missed = cross - gram @ _turned(before)
        try:  # of a symmetric matrix the transposed is itself, and it lies as LAPACK takes it: no copy is made
            factors = (cho_factor(one.T, lower=True, overwrite_a=True, check_finite=False) for one in ridged(gram))
            moved = [cho_solve(one, by, check_finite=False) for one, by in zip(factors, missed, strict=True)]
        except np.linalg.LinAlgError:  # more is lost in the sums than the ridge holds up
            return np.full_like(weight, np.nan), np.full(weight.shape[0], np.nan, weight.dtype)
        after = before + _turned(np.stack(moved))
        bias = np.zeros(weight.shape[0])
        if self.centred:
            held = self._mean(self.inputs) @ _turned(after)
            bias = (self._mean(self.outputs) - held).reshape(-1)
        return after.reshape(weight.shape).astype(weight.dtype), bias.astype(weight.dtype)

    def covariance(self) -> np.ndarray:
        """``A^T A`` per row, centred if the equations are, shape ``(groups, columns, columns)``; once (rule 4)."""
        gram, self.gram = self.gram, np.zeros(())
        gram /= self.count
        if self.centred:
            mean = self._mean(self.inputs)
            for band in _bands(gram.shape[-1]):
                gram[:, band] -= _turned(mean[..., band]) @ mean
        return gram

    def _mean(self, total: np.ndarray) -> np.ndarray:
        return (total / self.count)[:, None]


def ridged(gram: np.ndarray) -> np.ndarray:
    """The gram with the ridge on its diagonal, in place, positive definite even for inputs that are all zero."""
    places = np.arange(gram.shape[-1])
    mean = np.diagonal(gram, axis1=1, axis2=2).mean(1, keepdims=True)
    gram[:, places, places] += RIDGE * np.maximum(mean, 1e-12)
    return gram


def _bands(columns: int) -> list[slice]:
    width = max(FEWEST, columns // SHARE)
    return [slice(start, start + width) for start in range(0, columns, width)]


def _added(total: np.ndarray, more: np.ndarray) -> np.ndarray:
    """The sum in float64, in place once there is one."""
    if not total.ndim:
        return more.astype(np.float64)
    total += more
    return total


def _turned(matrices: np.ndarray) -> np.ndarray:
    return matrices.swapaxes(1, 2)


def _targets(y: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Rows of ``Y`` by group, shape ``(groups, rows, out per group)``."""
    if not geometry.kernel:
        return y.reshape(1, -1, y.shape[-1])
    n, out = y.shape[:2]
    flat = y.reshape(n, geometry.groups, out // geometry.groups, -1)
    return flat.transpose(1, 0, 3, 2).reshape(geometry.groups, -1, out // geometry.groups)
