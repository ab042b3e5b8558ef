from __future__ import annotations

import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sluice.profiler.pieces.levels import BELOW, OCTAVES, SUMS, TOP, step_of, sum_levels, width_levels

PRECISIONS = st.sampled_from(["fp32", "fp16", "bf16", "int8"])


@pytest.mark.parametrize(
    ("size", "precision", "step"),
    [
        (64, "fp32", 4),
        (64, "fp16", 8),
        (64, "int8", 16),
        (26, "int8", 8),
        (7, "fp32", 2),
        (3, "bf16", 1),
        (1, "fp32", 1),
    ],
)
def test_widths_are_tried_in_packs(size: int, precision: str, step: int) -> None:
    assert step_of(size, precision) == step


@pytest.mark.parametrize(
    ("size", "levels"),
    [
        (1, (1,)),
        (2, (1, 2)),
        (6, (2, 4, 6)),
        (16, (4, 8, 12, 16)),
        (64, (4, 8, 12, 16, 24, 32, 40, 48, 56, 64)),
        (256, (16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)),
    ],
)
def test_levels_by_hand(size: int, levels: tuple[int, ...]) -> None:
    assert width_levels(size, "fp32") == levels


@given(st.integers(1, 4096), PRECISIONS)
@example(7, "fp32")
@example(4096, "int8")
def test_levels_of_any_width(size: int, precision: str) -> None:
    levels, step = width_levels(size, precision), step_of(size, precision)
    assert list(levels) == sorted(set(levels)) and levels[-1] == size
    assert all(width % step == 0 for width in levels[:-1])
    assert all(width >= max(step, size / 2**OCTAVES - max(step / 2, size / 96)) for width in levels[:-1])
    assert sum(width > size / 2 for width in levels[:-1]) <= TOP
    assert len(levels) <= 1 + TOP + BELOW * (OCTAVES - 1)
    if size >= 2 * step:
        assert levels[0] <= max(step, size / 8)  # narrow enough for any budget
        # No gap that a budget would feel: a level is at least half the next one, by and large.
        assert all(b <= 2 * a + 2 * step for a, b in itertools.pairwise(levels))


@given(st.integers(64, 2048))
def test_levels_are_as_round_as_their_distance_allows(size: int) -> None:
    """Kernels work in blocks of eight or sixteen, too: no odd multiple of four where a multiple of 16 is as near."""
    levels, gap = width_levels(size, "fp32"), size / 2 / TOP
    for k in range(TOP):
        middle = size / 2 + k * gap
        near = [w for w in range(4, size, 4) if abs(w - middle) <= gap / 3]
        roundest = max((w & -w for w in near), default=0)
        assert not near or any(w in levels and w & -w == roundest for w in near)


@given(st.integers(1, 600), PRECISIONS, st.integers(2, 12))
def test_ranks_are_thinned_with_their_ends(size: int, precision: str, most: int) -> None:
    every, some = width_levels(size, precision), width_levels(size, precision, most)
    assert set(some) <= set(every) and len(some) == min(most, len(every))
    assert (some[0], some[-1]) == (every[0], every[-1])


@given(st.lists(st.integers(4, 300).map(lambda n: width_levels(n, "fp32")), min_size=1, max_size=5))
def test_a_sum_of_groups_is_known_at_sums_of_levels(levels: list[tuple[int, ...]]) -> None:
    """A total between two levels may be a width that no device likes, and that no plan has."""
    found = sum_levels(levels)
    assert found[0] == sum(own[0] for own in levels) and found[-1] == sum(own[-1] for own in levels)
    assert list(found) == sorted(set(found)) and len(found) <= SUMS
    for total in found:
        assert any(sum(each) == total for each in _at_equal_shares(levels))


def _at_equal_shares(levels: list[tuple[int, ...]]) -> list[list[int]]:
    return [[own[round(k / (SUMS - 1) * (len(own) - 1))] for own in levels] for k in range(SUMS)]


def test_sums_of_groups_that_are_aligned_are_aligned() -> None:
    assert all(total % 4 == 0 for total in sum_levels([width_levels(n, "fp32") for n in (48, 36, 64)]))
