from __future__ import annotations

import math

import numpy as np
import pytest

from sluice.core.errors import SluiceError
from sluice.runtime.base.compare import assert_close, relative_error


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


class Tensor:
    """Looks like a tensor of a framework."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def detach(self) -> Tensor:
        return self

    def cpu(self) -> Tensor:
        return self

    def is_floating_point(self) -> bool:
        return bool(np.issubdtype(self.array.dtype, np.floating))

    def double(self) -> Tensor:
        return Tensor(self.array.astype(np.float64))

    def numpy(self) -> np.ndarray:
        return self.array


def test_relative_to_the_largest_reference_value() -> None:
    reference = np.array([[4.0, -8.0, 1.0]])
    assert relative_error(reference + np.array([[0.0, 0.0, 0.5]]), reference) == 0.5 / 8.0
    assert relative_error(reference, reference) == 0.0


def test_largest_error_of_a_tree_with_its_place() -> None:
    first, second = random(3, 5), random(2)
    reference = {"a": first, "b": (second, [np.array([2.0])])}
    actual = {"b": (second, [np.array([2.5])]), "a": first}
    assert relative_error(actual, reference) == 0.25
    with pytest.raises(
        AssertionError, match=r"logits\['b'\]\[1\]\[0\]: relative error 0.25 is above the tolerance 1e-05"
    ):
        assert_close(actual, reference, what="logits")
    assert_close(actual, reference, tol=0.25)


def test_a_wrong_model_fails() -> None:
    weight, x = random(7, 5), random(3, 5, seed=1)
    reference = x @ weight.T
    rolled = x @ np.roll(weight, 1, axis=0).T
    assert_close(x.astype(np.float64) @ weight.T.astype(np.float64), reference)
    with pytest.raises(AssertionError):
        assert_close(rolled, reference)
    with pytest.raises(AssertionError):
        assert_close(np.zeros_like(reference), reference)
    with pytest.raises(AssertionError):
        assert_close(reference * (1 + 1e-4), reference)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite_is_never_close(bad: float) -> None:
    reference = random(3, 5)
    spoiled = reference.copy()
    spoiled[1, 2] = bad
    for actual, wanted in ((spoiled, reference), (reference, spoiled), (spoiled, spoiled)):
        assert relative_error(actual, wanted) == math.inf
        with pytest.raises(AssertionError, match="relative error inf"):
            assert_close(actual, wanted, tol=1e9)


def test_not_finite_is_seen_behind_a_larger_finite_error() -> None:
    with pytest.raises(AssertionError):
        assert_close([np.ones(3), np.array([np.nan])], [np.ones(3) * 2, np.array([np.nan])], tol=10.0)


def test_shapes_are_not_broadcast() -> None:
    with pytest.raises(SluiceError, match=r"output has shape \(1, 5\), the reference \(3, 5\)"):
        relative_error(random(1, 5), random(3, 5))
    with pytest.raises(SluiceError, match=r"\(\).*\(1,\)"):
        assert_close(np.float32(1.0), np.ones(1))


@pytest.mark.parametrize(
    ("actual", "reference"),
    [
        ({"a": np.ones(2)}, {"b": np.ones(2)}),
        ([np.ones(2)], [np.ones(2), np.ones(2)]),
        (np.ones(2), [np.ones(2)]),
        ({"a": np.ones(2)}, np.ones(2)),
    ],
)
def test_structures_must_agree(actual: object, reference: object) -> None:
    with pytest.raises(SluiceError, match="compare like with like"):
        relative_error(actual, reference)


def test_tiny_references_keep_their_scale() -> None:
    reference = random(3, 5).astype(np.float64) * 1e-20
    with pytest.raises(AssertionError):
        assert_close(np.zeros_like(reference), reference)
    assert_close(reference * (1 + 1e-9), reference)
    assert relative_error(np.full(3, 1e-3), np.zeros(3)) > 1e20
    assert relative_error(np.zeros(3), np.zeros(3)) == 0.0


def test_nothing_to_compare_is_not_agreement() -> None:
    with pytest.raises(AssertionError, match="nothing"):
        assert_close({}, {})


def test_tensors_integers_and_booleans() -> None:
    array = random(3, 5)
    assert relative_error(Tensor(array), array) == 0.0
    assert relative_error([Tensor(array * 2)], [Tensor(array)]) == pytest.approx(1.0)
    assert relative_error(Tensor(np.array([1, 4])), np.array([1, 8])) == 0.5
    assert relative_error(np.array([True, False]), np.array([True, True])) == 1.0
    assert relative_error(np.array([1 + 2j]), np.array([1 + 0j])) == 2.0
