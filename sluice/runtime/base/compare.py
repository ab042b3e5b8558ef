"""The one way numbers are compared: the largest error relative to the largest reference value.

    relative_error = max|a - r| / max(max|r|, tiny),    tiny = 1e-30

1. The error is relative to the scale of the *whole* reference tensor, because a sum of many terms has an error in
   proportion to its terms, not to their sum in one element.
2. A NaN or an infinity on either side is an infinite error, even on both sides: nothing was shown to agree.
3. Several tensors (dict, tuple, list, nested) give the largest of their errors. Other keys, lengths or shapes are not
   a number but an error, because broadcasting would hide a wrong axis.

Tensors of any library that has ``detach`` and ``numpy`` are taken as they are; no library is imported.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from sluice.core.errors import SluiceError

__all__ = ["assert_close", "relative_error"]

TINY = 1e-30


def relative_error(actual: Any, reference: Any) -> float:
    """Largest relative error over all tensors; `SluiceError` naming the place and both shapes where those differ."""
    return max((error for _, error in _errors(actual, reference, "output")), default=0.0)


def assert_close(actual: Any, reference: Any, tol: float = 1e-5, what: str = "") -> None:
    """Raise `AssertionError` with the figures unless ``relative_error(actual, reference) <= tol``."""
    errors = _errors(actual, reference, what or "output")
    if not errors:
        raise AssertionError(f"{what or 'output'}: there is nothing to compare")
    place, worst = max(errors, key=lambda item: item[1])
    if not worst <= tol:
        raise AssertionError(f"{place}: relative error {worst:.3g} is above the tolerance {tol:.3g}")


def _errors(actual: Any, reference: Any, where: str) -> list[tuple[str, float]]:
    if isinstance(reference, Mapping) or isinstance(actual, Mapping):
        if not (isinstance(reference, Mapping) and isinstance(actual, Mapping)) or actual.keys() != reference.keys():
            raise SluiceError(f"{where} has {_kind(actual)}, the reference {_kind(reference)}; compare like with like")
        return [item for key in reference for item in _errors(actual[key], reference[key], f"{where}[{key!r}]")]
    if isinstance(reference, (tuple, list)) or isinstance(actual, (tuple, list)):
        both = isinstance(reference, (tuple, list)) and isinstance(actual, (tuple, list))
        if not both or len(actual) != len(reference):
            raise SluiceError(f"{where} has {_kind(actual)}, the reference {_kind(reference)}; compare like with like")
        pairs = enumerate(zip(actual, reference, strict=True))
        return [item for i, (a, r) in pairs for item in _errors(a, r, f"{where}[{i}]")]
    return [(where, _error(_array(actual), _array(reference), where))]


def _error(actual: np.ndarray, reference: np.ndarray, where: str) -> float:
    if actual.shape != reference.shape:
        raise SluiceError(
            f"{where} has shape {actual.shape}, the reference {reference.shape}; compare tensors of one shape"
        )
    if actual.size == 0:
        return 0.0
    wide = np.complex128 if np.iscomplexobj(actual) or np.iscomplexobj(reference) else np.float64
    a, r = actual.astype(wide), reference.astype(wide)
    if not (np.isfinite(a).all() and np.isfinite(r).all()):
        return math.inf
    with np.errstate(over="ignore"):
        return float(np.abs(a - r).max() / max(float(np.abs(r).max()), TINY))


def _array(value: Any) -> np.ndarray:
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        # numpy has no bfloat16, and float64 holds every value of the narrower kinds.
        value = value.double().numpy() if value.is_floating_point() else value.numpy()
    return np.asarray(value)


def _kind(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"keys {sorted(map(str, value))}"
    if isinstance(value, (tuple, list)):
        return f"{len(value)} items"
    return f"one tensor of shape {_array(value).shape}"
