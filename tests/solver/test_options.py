"""What a merge does to the groups on its layers' axes, and what a configuration says of ranks."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from sluice.core.errors import SluiceError
from sluice.core.plan import Merge
from sluice.passes.cut.merge_ties import groups_on, inside, tie_removed
from sluice.passes.graph.groups import Analysis, AxisGroup, AxisRef
from sluice.solver.options import RankOption, dense_switch


def analysis_of(groups: Mapping[str, list[tuple[str, int]]], shapes: Mapping[str, tuple[int, ...]]) -> Analysis:
    """Groups that own whole axes."""
    found = []
    for name, places in groups.items():
        size = shapes[places[0][0]][places[0][1]]
        refs = tuple(AxisRef(param, axis, np.arange(size)) for param, axis in places)
        found.append(AxisGroup(name, size, refs))
    return Analysis(tuple(found), {}, {}, {}, dict(shapes))


# stem -> a -> b -> deep (depthwise) -> c -> head, and stem -> side; the network's input is in no group.
SHAPES = {
    "stem": (7, 3, 3, 3), "a": (7, 7, 3, 3), "b": (7, 7, 3, 3), "deep": (7, 1, 3, 3), "c": (7, 7, 1, 1),
    "head": (5, 7), "a.bias": (7,), "side": (4, 7),
}  # fmt: skip
CHAIN = analysis_of(
    {
        "s": [("stem", 0), ("a", 1), ("side", 1)],
        "g": [("a", 0), ("b", 1), ("a.bias", 0)],
        "h": [("b", 0), ("deep", 0), ("c", 1)],
        "out": [("c", 0), ("head", 1)],
    },
    SHAPES,
)


def merge(layers: list[str], kept: list[str]) -> Merge:
    return Merge(tuple(layers), (tuple(kept),))


@pytest.mark.parametrize(
    ("layers", "kept", "inner", "tied"),
    [
        (["a", "b"], ["a", "b"], {"g"}, []),
        (["a", "b"], ["b"], {"g"}, [{"s", "g"}]),
        (["a", "b"], ["a"], {"g"}, [{"g", "h"}]),
        (["a", "b", "deep", "c"], ["c"], {"g", "h"}, [{"s", "g", "h"}]),
        (["a", "b", "deep", "c"], ["b"], {"g", "h"}, [{"s", "g"}, {"h", "out"}]),
        (["b", "deep"], ["b"], set(), [{"h"}]),  # the group of a depthwise layer is seen by the next one
        (["stem", "a"], ["a"], set(), [{None, "s"}]),  # and that of a second reader, by that
    ],
)
def test_groups_inside_a_merge(
    layers: list[str], kept: list[str], inner: set[str], tied: list[set[str | None]]
) -> None:
    found = inside(CHAIN, layers, kept, groups_on(CHAIN))
    assert found.inner == inner and set(found.tied) == {frozenset(together) for together in tied}


def masks(**kept: list[int]) -> list[np.ndarray]:
    return [np.isin(np.arange(7), kept.get(g.name, range(7))) for g in CHAIN.groups]


def test_inner_groups_follow_the_outer_one_that_a_removed_layer_ties_them_to() -> None:
    cut = [0, 2, 5]
    tied = tie_removed(CHAIN, [merge(["a", "b", "deep", "c"], ["c"])], masks(s=cut, g=[1], h=[3, 4], out=[6]))
    assert [np.flatnonzero(m).tolist() for m in tied] == [cut, cut, cut, [6]]
    tied = tie_removed(CHAIN, [merge(["a", "b"], ["a", "b"])], masks(s=cut, g=[1], h=[3, 4]))
    assert [int(m.sum()) for m in tied] == [3, 7, 2, 7], "tied to nothing, it stays whole"


@pytest.mark.parametrize(
    ("layers", "kept", "cut"),
    [
        (["stem", "a", "b", "deep", "c"], ["stem"], {"s": [0, 2], "out": [1, 2]}),
        (["stem", "a", "b", "deep", "c"], ["stem"], {"out": [1, 2]}),
        (["stem", "a"], ["a"], {"s": [1]}),  # what is passed on is the network's input
    ],
)
def test_both_sides_of_what_goes_keep_the_same(layers: list[str], kept: list[str], cut: dict[str, list[int]]) -> None:
    edit = merge(layers, kept)
    with pytest.raises(SluiceError, match=r"removes a layer between the groups .* keep the same in both"):
        tie_removed(CHAIN, [edit], masks(**cut))
    same = masks()
    assert all(mask.all() for mask in tie_removed(CHAIN, [edit], same))


def test_a_rank_says_all_of_its_layer() -> None:
    option = RankOption("a", "kxk-1x1")
    assert option.at(3) == {"a|dense": 0, "a|kxk-1x1": 1, "a|kxk-1x1|rank": 3} and dense_switch("a") in option.at(3)
