"""Slow files are priced on fewer examples."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from sluice.importance.onnx_losses import FEWEST, MACS, MOST, examples_for


@pytest.mark.parametrize(
    ("macs", "expected"),
    [(1, MOST), (int(MACS / (7 * 20)), 20), (int(MACS), FEWEST), (0, MOST)],
)
def test_all_prices_together_take_about_the_same_work(macs: int, expected: int) -> None:
    """Four widths of a site with many levels, two of one with three, one of a switch."""
    latency = SimpleNamespace(levels={"wide": tuple(range(1, 9)), "narrow": (1, 2, 3), "switch": (0, 1), "still": (5,)})
    assert examples_for(macs, latency) == expected  # type: ignore[arg-type]
