"""Atoms are tied as a plain union-find ties them, and what is no atom stays none."""

from __future__ import annotations

import numpy as np
import pytest

from sluice.passes.graph.atoms import Atoms


def lowest(count: int, pairs: list[tuple[int, int]]) -> list[int]:
    """By atom the lowest of its class, found one pair at a time."""
    of = list(range(count))
    for a, b in pairs:
        low, high = sorted((of[a], of[b]))
        of = [low if one == high else one for one in of]
    return of


@pytest.mark.parametrize("seed", range(20))
def test_unions_tie_what_they_name(seed: int) -> None:
    rng, count = np.random.default_rng(seed), 40
    atoms, pairs = Atoms({}), list[tuple[int, int]]()
    made = atoms.new(count)
    for _ in range(3):
        a, b = rng.integers(0, count, (2, 7))
        atoms.union(a, b)
        pairs += list(zip(a.tolist(), b.tolist(), strict=True))
        assert atoms.roots(made).tolist() == lowest(count, pairs)


def test_a_root_that_is_tied_to_several_takes_all_along() -> None:
    atoms = Atoms({})
    made = atoms.new(6)
    atoms.union(np.array([0, 4, 5]), np.array([5, 5, 3]))
    assert atoms.roots(made).tolist() == [0, 1, 2, 0, 0, 0]


def test_reasons_go_along() -> None:
    atoms = Atoms({})
    made = atoms.new(4)
    atoms.freeze((made[3:],), "it is read")
    atoms.union(np.array([1, 0]), np.array([3, 1]))
    assert atoms.reason((made[:1],)) == "it is read" and atoms.reason((made[2:3],)) is None


@pytest.mark.parametrize("count", [1, 62, 63, 64, 65, 127, 128, 129])
def test_no_atom_is_no_atom_at_any_size(count: int) -> None:
    atoms = Atoms({"w": (count, 2)})
    layer = np.array([-1, *atoms.param("w", 0), -1])
    assert atoms.roots(layer).tolist() == layer.tolist()
    assert atoms.homes((layer,)) == [("w", 0)]
    (kept,) = atoms.resolved((layer,))
    assert kept.tolist() == layer.tolist()
    assert atoms.resolved((np.full(3, -1),)) == ()
    more = atoms.new(1)
    assert atoms.roots(more).tolist() == more.tolist()


def test_what_is_one_channel_on_one_axis_is_one_on_the_other() -> None:
    atoms = Atoms({})
    a, b = atoms.new(2), atoms.new(3)
    atoms.unite((a[[0, 0, 1, 1]],), (b[[0, 1, 2, 2]],), "add")
    assert atoms.resolved((b[:1],))[0].tolist() == atoms.resolved((b[1:2],))[0].tolist()
