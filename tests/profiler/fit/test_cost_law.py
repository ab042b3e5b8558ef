"""The cost law on devices whose milliseconds are computed: what is known is exact, the rest is near and bounded."""

from __future__ import annotations

import functools
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sluice.profiler.fit.cost_law import SAME, CostLaw, Known, fit_law
from sluice.profiler.pieces.levels import width_levels
from sluice.profiler.pieces.partition import Partition, build_piece, partition_graph, spread_widths
from sluice.profiler.pieces.work import Work, work_of
from tests.device import Cost, FakeRunner, chain, line, staircase

DEVICES: dict[str, Cost] = {
    "4": staircase(4),
    "8": staircase(8),
    "8 slow": staircase(8, 1.3),
    "12": staircase(12),  # blocks that the law does not know
    "16": staircase(16),
    "line": line,
    "constant": lambda into, out, rest: 0.5,
}


@functools.cache
def cut() -> Partition:
    return partition_graph(chain([48, 64, 32]), 2)


@functools.cache
def everything(device: str) -> tuple[Known, ...]:
    """All points of all pieces on all levels, with their milliseconds."""
    found, runner = [], FakeRunner(DEVICES[device])
    for piece in cut().pieces:
        axes = [width_levels(int(extent.at(cut().dense)), "fp32") for extent in piece.extents]
        points = list(itertools.product(*axes))
        models = [build_piece(cut(), piece, spread_widths(piece, at, cut().dense)) for at in points]
        ms = np.array([runner.ms(model) for model in models])
        found.append(Known(piece.key, work_of(piece, cut()), np.array(points, dtype=np.float64), ms))
    return tuple(found)


def part(device: str, share: float, seed: int = 0) -> list[Known]:
    """Some of the points, the dense ones among them."""
    rng, found = np.random.default_rng(seed), []
    for one in everything(device):
        pick = rng.random(len(one.ms)) < share
        pick[-1] = True
        found.append(Known(one.key, one.work, one.points[pick], one.ms[pick]))
    return found


def relative(device: str, known: list[Known]) -> tuple[np.ndarray, np.ndarray]:
    """Estimates and bounds of the points that are not known, over the truth."""
    law, ms, bound = fit_law(known), [], []
    for own, whole in zip(known, everything(device), strict=True):
        found = law.estimate(own, whole.points)
        ms.append((found.ms / whole.ms)[~found.measured])
        bound.append((found.bound / whole.ms)[~found.measured])
    return np.concatenate(ms), np.concatenate(bound)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("share", [0.0, 0.2])
def test_known_points_are_exact_and_bounds_are_below_estimates(device: str, share: float) -> None:
    known = part(device, share)
    law = fit_law(known)
    assert (law.rates >= 0.0).all() and law.rates.any()
    for own, whole in zip(known, everything(device), strict=True):
        found = law.estimate(own, whole.points)
        there = {tuple(at): ms for at, ms in zip(own.points, own.ms, strict=True)}
        for k, at in enumerate(map(tuple, whole.points)):
            assert found.measured[k] == (at in there)
            if at in there:
                assert found.ms[k] == found.bound[k] == there[at]
        assert (found.bound > 0.0).all() and (found.bound <= found.ms).all() and np.isfinite(found.ms).all()


@pytest.mark.parametrize(
    ("device", "errors"),
    [("4", (0.15, 0.03, 0.01)), ("8", (0.2, 0.01, 0.01)), ("12", (0.4, 0.2, 0.1)), ("16", (0.01, 0.01, 0.01)),
     ("8 slow", (0.2, 0.02, 0.01)), ("line", (0.02, 0.02, 0.01)), ("constant", (0.02, 0.02, 0.01))],
)  # fmt: skip
def test_the_error_falls_with_the_share_that_is_known(device: str, errors: tuple[float, ...]) -> None:
    found = [float(np.median(np.abs(relative(device, part(device, share))[0] - 1.0))) for share in (0.0, 0.08, 0.25)]
    assert all(off < most for off, most in zip(found, errors, strict=True)), found
    assert found[2] <= found[0] + 1e-3


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.3])
def test_few_points_take_less_than_their_bound(device: str, share: float) -> None:
    """Of a normal law a part of 16% is more than one deviation below its mean."""
    _, bound = relative(device, part(device, share))
    assert float(np.mean(bound > 1.05)) <= 0.16


@given(share=st.floats(0.0, 0.5), seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_a_bound_is_no_absurdity(share: float, seed: int) -> None:
    """Optimism that nothing supports would have everything measured."""
    ms, bound = relative("8 slow", part("8 slow", share, seed))
    assert float(np.median(bound / ms)) > 0.3


@pytest.mark.parametrize("device", ["8", "line", "constant"])
def test_one_known_point_of_all_is_enough_to_begin_with(device: str) -> None:
    """Others scale with their work."""
    whole = everything(device)[1]
    known = Known(whole.key, whole.work, whole.points[-1:], whole.ms[-1:])
    law = fit_law([known])
    here = law.estimate(known, whole.points)
    assert here.ms[-1] == whole.ms[-1] and (here.bound > 0).all() and (here.bound <= here.ms).all()
    other = everything(device)[2]
    nothing = Known(other.key, other.work, np.zeros((0, 2)), np.zeros(0))
    there = law.estimate(nothing, other.points)
    assert not there.measured.any() and np.isfinite(there.ms).all() and (there.bound < there.ms).all()
    if device != "constant":
        assert 0.4 < np.median(there.ms / other.ms) < 2.5


def two_points(slow: tuple[float, float], ms: float) -> tuple[CostLaw, Known]:
    """The law of a piece of which the dense size and one slow point are known."""
    whole = everything("line")[1]
    known = Known(whole.key, whole.work, np.array([slow, (48.0, 64.0)]), np.array([ms, 10 * ms]))
    return fit_law([known]), known


def test_a_larger_point_takes_no_less_where_it_is_aligned_no_better() -> None:
    law, known = two_points((18.0, 18.0), 9.0)
    floor = (1.0 - SAME) * 9.0

    def bound(into: int, out: int) -> float:
        return float(law.estimate(known, np.array([[into, out]], dtype=np.float64)).bound[0])

    assert min(bound(18, 22), bound(22, 18), bound(22, 22), bound(19, 23)) >= floor - 1e-9
    # A multiple of four may take another kernel.
    slow_law, slow = _slow_unless_aligned()
    aligned = slow_law.estimate(slow, np.array([[20.0, 20.0], [22.0, 22.0]])).bound
    worst = float(slow.ms.max())
    assert aligned[0] < (1.0 - SAME) * worst <= aligned[1]


def _slow_unless_aligned() -> tuple[CostLaw, Known]:
    """18 channels take ten times what multiples of eight, which are known as well, let expect."""
    whole = everything("line")[1]
    points = np.array([[18.0, 18.0], [8.0, 8.0], [16.0, 16.0], [24.0, 24.0], [32.0, 32.0], [48.0, 64.0]])
    ms = 1e-4 * points[:, 0] * points[:, 1]
    ms[0] *= 10.0
    known = Known(whole.key, whole.work, points, ms)
    return fit_law([known]), known


def test_a_piece_tells_of_pieces_of_its_kind() -> None:
    """Where 3x3 convolutions take twice what their work lets expect, so does one of which nothing is known."""
    whole = everything("8")
    known = [Known(one.key, one.work, one.points, one.ms * (2.0 if k < 2 else 1.0)) for k, one in enumerate(whole)]
    law, unknown = fit_law([known[0], known[1], known[3]]), whole[2]
    found = law.estimate(Known(unknown.key, unknown.work, np.zeros((0, 2)), np.zeros(0)), unknown.points)
    assert 1.6 < np.median(found.ms / unknown.ms) < 2.4
    assert {one.work.kind for one in whole[:3]} == {"Conv 3x3"} != {whole[3].work.kind}


def test_the_law_is_the_same_every_time_and_in_any_order() -> None:
    known = part("8 slow", 0.2)
    points = everything("8 slow")[1].points
    first, again = (fit_law(known).estimate(known[1], points) for _ in range(2))
    assert (first.ms == again.ms).all() and (first.bound == again.bound).all()
    other = fit_law(known[::-1]).estimate(known[1], points)
    assert other.ms == pytest.approx(first.ms, rel=1e-6) and other.bound == pytest.approx(first.bound, rel=1e-6)


def test_a_time_of_nothing_harms_nothing() -> None:
    """Net of calls and sources a piece may take no time at all."""
    known = part("8", 0.2)
    known[0] = Known(known[0].key, known[0].work, known[0].points, np.zeros(len(known[0].ms)))
    law = fit_law(known)
    for one, whole in zip(known, everything("8"), strict=True):
        found = law.estimate(one, whole.points)
        assert np.isfinite(found.ms).all() and (found.bound <= found.ms).all()


def test_the_law_needs_no_scipy() -> None:
    """A device that profiles may lack it."""
    code = """
import sys
sys.modules["scipy"] = None
import numpy as np
from sluice.profiler.fit.cost_law import Known, fit_law
from sluice.profiler.pieces.work import Work
known = Known("k", Work("MaxPool", (), (), (), None), np.zeros((1, 0)), np.array([2.0]))
found = fit_law([known]).estimate(known, np.zeros((1, 0)))
print(found.ms[0], bool(found.measured[0]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[3], timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "2.0 True"


def test_a_piece_without_extents() -> None:
    work = Work("MaxPool", (), (), (), None)
    known = Known("k", work, np.zeros((1, 0)), np.array([2.0]))
    found = fit_law([known]).estimate(known, np.zeros((1, 0)))
    assert (found.ms.tolist(), found.bound.tolist(), found.measured.tolist()) == ([2.0], [2.0], [True])
